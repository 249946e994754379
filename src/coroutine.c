/*
** coroutine.c - Lua's coroutine library once more, such that an await inside a coroutine suspends the
** enclosing task, not the coroutine: a generator may await.
**
** The coroutines are plain Lua threads, and every function does what Lua's own does. What is more
** about one of ours is in its *record*, found by a table with weak keys:
**
** - Its execution context, captured when it was made. Resuming exchanges it with that of the running
**   task, and the end of the resume exchanges them back: what the coroutine writes stays with it. So
**   do its open guards (guard.c) and the suppression of flow. A coroutine made with
**   { context = "caller" } exchanges nothing, and must not yield out of a guard, which would then be
**   open in its caller; nor must any out of a cancellation scope (scope.c), which belongs to the task.
** - Whether it is entered: being resumed by us, on the C stack (struct level); or held: the task has
**   been suspended in it, and nobody but that task may go on with it.
**
** Passing a suspension on. An operation that suspends the task yields from the innermost coroutine. The
** resume below sees TASK_PARKED, which no other yield sets, and yields itself, and so does each one
** until the task's own coroutine has yielded to fiber_run. When the task goes on, each continuation
** resumes the coroutine above it, and the innermost operation goes on as if nothing had happened:
**
**     fiber_run > task, in wrap > a generator, in resume > another, in sleep        (> resumes)
**
** Each resume has its coroutine at index 1 and the record at index 2 of its frame, whether it is on
** the C stack or suspended: so whoever looks at a suspended task finds the innermost coroutine, where
** it waits (coroutine_inner). A continuation that is entered while its coroutine is not on top of the
** running task has been resumed by a stranger, and yields again.
**
** A suspension passes a level only if all below let it pass (level->open); else it is refused before
** anything is registered.
**
** Wrapping. The function of a coroutine made by wrap runs under a protected call inside the
** coroutine, so that its `<close>` variables may await while an error, or a cancellation, unwinds;
** Lua's own wrap closes them after the coroutine has ended. They cannot yield then, here as there.
** That call must not cost a level of the C stack, of which nested generators have about 200: when it
** is first resumed the coroutine is *primed*. A Lua function has then paused in the protected call; it
** goes on as any coroutine does, without nesting, and calls the generator's function in a tail call.
** What generator makes differs in its errors only: strings do not get the place of the call put before
** them, for whoever calls it on somebody else's behalf (lua/coflow/stream/source.lua).
**
** Between entering and leaving nothing raises but handlers of async locals, whose errors are caught, and
** the coroutine itself, which is protected. What is closed with an abandoned task is closed here too,
** the innermost first; nothing can suspend then, nor in what coroutine.close runs.
**
** Source: lcorolib.c, whose behaviour and messages these functions keep.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

enum record_state { IDLE, ENTERED, HELD };
struct coroutine {
  uint32_t tag;
  uint8_t state;
  bool shares;          /* the context of whoever resumes it */
  bool has_context;     /* the user value is not nil */
  bool body;            /* made by wrap: with the body below */
  bool failing;         /* an error unwinds that body */
  uint16_t suppressed;  /* TASK_SUPPRESSED; like the user value it is the resumer's while entered */
  struct guard *guards; /* the innermost open one */
};
enum { COROUTINE_CONTEXT = 1 };
enum { FRAME_COROUTINE = 1, FRAME_RECORD }; /* of a C function that resumes or closes one */

/* ---- what others ask ---- */

lua_State *coroutine_inner(lua_State *co, bool *body) {
  if (lua_gettop(co) < FRAME_RECORD || lua_type(co, FRAME_COROUTINE) != LUA_TTHREAD) return NULL;
  const struct coroutine *c = (struct coroutine *)object_test(co, FRAME_RECORD, TAG_COROUTINE);
  if (c == NULL || c->state == IDLE) return NULL;
  if (body != NULL) *body = c->body;
  return lua_tothread(co, FRAME_COROUTINE);
}

const struct level *coroutine_own(const struct runtime *rt) {
  for (const struct level *l = rt->level; l != NULL && l->task == rt->me; l = l->up)
    if (!l->record->shares) return l;
  return NULL;
}

struct guard **coroutine_guards(struct coroutine *record) {
  return &record->guards;
}

void coroutine_push_record(lua_State *L, const struct level *l) {
  lua_pushvalue(l->from, FRAME_RECORD);
  if (l->from != L) lua_xmove(l->from, L, 1);
}

bool coroutine_shares(lua_State *L, struct runtime *rt) {
  const struct level *l = rt->level;
  return l != NULL && l->co == L && l->record->shares;
}

bool coroutine_has_body(lua_State *L, struct runtime *rt) {
  const struct level *l = rt->level;
  return l == NULL || l->co != L || l->record->body;
}

void coroutine_refuse(lua_State *L, const char *place) {
  blame_push_place(L, 1);
  error_throw(
      L, ERROR_OPERATION,
      "%s: a yield here would leave the scope opened at %s, which would then be open in whoever "
      "resumes the coroutine: close it before, or let another task do what it is for",
      lua_tostring(L, -1), place);
}

/* ---- records ---- */

/* [-0, +1, -] the record of the coroutine at i, or nil: then it is not one of ours */
static struct coroutine *push_record(lua_State *L, int i) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_COROUTINES);
  lua_pushvalue(L, i);
  lua_rawget(L, -2);
  lua_remove(L, -2);
  return (struct coroutine *)lua_touserdata(L, -1);
}

/* [-0, +0, -] the running task gets the context of the record at i, and that gets the task's; or back */
static void exchange(lua_State *L, struct runtime *rt, struct coroutine *c, int i) {
  struct task *me = rt->me;
  if (c->shares) return;
  uint16_t suppressed = me->flags & TASK_SUPPRESSED;
  me->flags = (uint16_t)((me->flags & ~TASK_SUPPRESSED) | c->suppressed);
  c->suppressed = suppressed;
  bool had = me->flags & TASK_HAS_CONTEXT;
  if (!had && !c->has_context) return;
  lua_getiuservalue(L, i, COROUTINE_CONTEXT);
  c->has_context = had;
  context_swap(L);
  lua_setiuservalue(L, i, COROUTINE_CONTEXT);
}

/* [-0, +0, -] the coroutine of the record at i has come to its end: it keeps nothing */
static void drop(lua_State *L, struct coroutine *c, int i) {
  guard_drop_all(&c->guards);
  c->suppressed = 0;
  c->failing = false;
  if (!c->has_context) return;
  c->has_context = false;
  lua_pushnil(L);
  lua_setiuservalue(L, i, COROUTINE_CONTEXT);
}

/* [-0, +0, -] closes `co`, which is entered, from the frame of `from`; the status, as of lua_resetthread */
static int run_closers(lua_State *L, struct runtime *rt, lua_State *from, lua_State *co,
                       struct coroutine *c) {
  struct level here = {rt->level, rt->me, from, co, c, false, true};
  rt->level = &here;
  int status = coroutine_reset(co, L);
  rt->level = here.up;
  return status;
}

void coroutine_close_inner(lua_State *L, struct runtime *rt, lua_State *co) {
  lua_State *inner = coroutine_inner(co, NULL);
  if (inner == NULL) return;
  coroutine_close_inner(L, rt, inner);
  lua_pushvalue(co, FRAME_RECORD);
  if (co != L) lua_xmove(co, L, 1);
  struct coroutine *c = (struct coroutine *)lua_touserdata(L, -1);
  int i = lua_gettop(L);
  c->state = ENTERED;
  run_closers(L, rt, co, inner, c);
  lua_settop(inner, 0); /* what a variable raised is nobody's: its resumer is being closed too */
  exchange(L, rt, c, i);
  drop(L, c, i);
  c->state = IDLE;
  lua_pop(L, 1);
}

/* ---- the body of coroutines made by wrap ---- */

enum { BODY_SIZE = 4, BODY_ARGUMENTS = BODY_SIZE - 1 }; /* on a new one: main trace start fn */
static const char start[] = "local fn, pause = ... return fn(pause())";

static int l_pause(lua_State *L) { return lua_yield(L, 0); }

static int wrap_main_k(lua_State *L, int status, lua_KContext ctx) {
  (void)ctx;
  return status <= LUA_YIELD ? lua_gettop(L) - 1 : lua_error(L);
}

/* main(trace, start, fn) */
static int wrap_main(lua_State *L) {
  lua_pushcfunction(L, l_pause);
  return wrap_main_k(L, lua_pcallk(L, 2, LUA_MULTRET, 1, 0, wrap_main_k), 0);
}

/* the message handler: nothing in the coroutine catches the error */
static int wrap_trace(lua_State *L) {
  const struct level *l = runtime(L)->level;
  if (l != NULL && l->co == L) l->record->failing = true;
  return trace_leaving(L);
}

static bool is_new(lua_State *co) {
  return lua_status(co) == LUA_OK && lua_gettop(co) == BODY_SIZE;
}

/* ---- resuming ---- */

enum status { RUNNING, DEAD, SUSPENDED, NORMAL };
static const char *const status_names[] = {"running", "dead", "suspended", "normal"};

static enum status status_of(lua_State *L, lua_State *co, const struct coroutine *c) {
  lua_Debug ar;
  if (L == co) return RUNNING;
  switch (lua_status(co)) {
    case LUA_YIELD: break;
    case LUA_OK:
      if (lua_getstack(co, 0, &ar)) return NORMAL;
      if (lua_gettop(co) == 0) return DEAD;
      break;
    default: return DEAD;
  }
  bool taken = c != NULL && c->state != IDLE; /* lua_resume would go on with it */
  return taken ? NORMAL : SUSPENDED;
}

static lua_State *check(lua_State *L, int i) {
  lua_State *co = lua_tothread(L, i);
  if (co == NULL) luaL_typeerror(L, i, "thread");
  return co;
}

/* How a resume may fail: with two values on the stack, what is known of the error (trace_push_left), and
** the error. */
enum { FAILED = -1, FAILED_MEMORY = -2 };

static int refuse(lua_State *L, const char *message) {
  lua_pushnil(L);
  lua_pushstring(L, message);
  return FAILED;
}

/* [-0, +2, m] the error on top of `co` has left it; a wrapped coroutine is closed then */
static int take_error(lua_State *L, struct runtime *rt, lua_State *co, struct coroutine *c,
                      bool wrapped) {
  int status = lua_status(co);
  bool ended = status != LUA_OK && status != LUA_YIELD; /* else it has not been resumed at all */
  lua_xmove(co, L, 1);
  if (ended)
    trace_push_left(L, co, c->body);
  else
    lua_pushnil(L);
  lua_insert(L, -2); /* … left error */
  if (ended && wrapped) {
    status = run_closers(L, rt, L, co, c);
    if (lua_gettop(co) > 0) { /* else a finalizer has closed it before */
      lua_pop(L, 1);
      lua_xmove(co, L, 1);
    }
  }
  exchange(L, rt, c, FRAME_RECORD);
  if (ended && wrapped) drop(L, c, FRAME_RECORD);
  c->state = IDLE;
  if (ended && !wrapped) scope_unwind(L, rt, co); /* its variables are closed later, or never */
  return status == LUA_ERRMEM ? FAILED_MEMORY : FAILED;
}

/* [-0, +0, -] starts the body of a wrapped coroutine, up to its pause. If Lua refuses, for want of C
** stack, it takes the arguments away, though nothing has been run: they are put back. */
static int prime(lua_State *L, lua_State *co) {
  int results;
  lua_pushvalue(co, BODY_SIZE); /* fn */
  lua_xmove(co, L, 1);
  int status = lua_resume(co, L, BODY_ARGUMENTS, &results);
  if (status != LUA_OK && status != LUA_YIELD && lua_status(co) == LUA_OK) { /* … main error */
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WRAP_TRACE);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WRAP_START);
    lua_pushvalue(L, -3);
    lua_xmove(L, co, 3);
    lua_rotate(co, -BODY_SIZE, BODY_ARGUMENTS); /* main trace start fn error */
  }
  lua_pop(L, 1);
  return status;
}

/* [-1, +2, m] Lua's own coroutine.yield has left a scope open, whose place is on top: the coroutine
** ends there. Else the scope would be open in whoever resumes it. */
static int end_stray(lua_State *L, struct runtime *rt, lua_State *co, struct coroutine *c) {
  lua_Debug ar = {.currentline = -1};
  for (int level = 0; ar.currentline <= 0 && lua_getstack(co, level, &ar); level++)
    lua_getinfo(co, "Sl", &ar);
  lua_pushnil(L);
  error_push(
      L, ERROR_OPERATION,
      "%s:%d: coroutine.yield here has left the scope opened at %s, which would be open in whoever "
      "resumes the coroutine, so it was closed: yield with coflow.coroutine, which refuses that",
      ar.short_src, ar.currentline, lua_tostring(L, -2));
  lua_remove(L, -3); /* nil error */
  run_closers(L, rt, L, co, c);
  lua_settop(co, 0); /* of two errors the first one goes out */
  exchange(L, rt, c, FRAME_RECORD);
  drop(L, c, FRAME_RECORD);
  c->state = IDLE;
  return FAILED;
}

/* [-arguments, +n, m] resumes the coroutine of ours in the frame until it yields or ends; n, or how it
** failed. If the task is suspended in it, we are, until k. */
static int step(lua_State *L, int arguments, lua_KFunction k, bool wrapped) {
  struct runtime *rt = runtime(L);
  lua_State *co = lua_tothread(L, FRAME_COROUTINE);
  struct coroutine *c = (struct coroutine *)lua_touserdata(L, FRAME_RECORD);
  struct level here = {rt->level, rt->me, L, co, c, fiber_can_suspend(L, rt), false};
  int results, status = LUA_YIELD;
  rt->level = &here;
  if (c->body && is_new(co)) status = prime(L, co);
  if (status == LUA_YIELD && !lua_checkstack(co, arguments)) {
    rt->level = here.up;
    lua_pop(L, arguments);
    exchange(L, rt, c, FRAME_RECORD);
    c->state = IDLE;
    return refuse(L, "too many arguments to resume");
  }
  if (status == LUA_YIELD) {
    lua_xmove(L, co, arguments);
    status = lua_resume(co, L, arguments, &results);
  }
  rt->level = here.up;
  if (status == LUA_YIELD && here.open && rt->me->flags & TASK_PARKED) {
    c->state = HELD;
    return lua_yieldk(L, 0, 0, k);
  }
  if (status != LUA_OK && status != LUA_YIELD) return take_error(L, rt, co, c, wrapped);
  if (status == LUA_YIELD &&
      (scope_push_left_open(L, rt, co) || (c->shares && guard_push_left_open(L, rt, co))))
    return end_stray(L, rt, co, c);
  bool fits = lua_checkstack(L, results + 10);
  if (fits)
    lua_xmove(co, L, results);
  else
    lua_pop(co, results);
  exchange(L, rt, c, FRAME_RECORD);
  if (status == LUA_OK) drop(L, c, FRAME_RECORD);
  c->state = IDLE;
  return fits ? results : refuse(L, "too many results to resume");
}

/* as step, for a coroutine that is not one of ours */
static int step_plain(lua_State *L, lua_State *co, int arguments) {
  int results;
  lua_xmove(L, co, arguments);
  int status = lua_resume(co, L, arguments, &results);
  if (status != LUA_OK && status != LUA_YIELD) {
    lua_xmove(co, L, 1);
    lua_pushnil(L);
    lua_insert(L, -2);
    return status == LUA_ERRMEM ? FAILED_MEMORY : FAILED;
  }
  if (!lua_checkstack(L, results + 10)) {
    lua_pop(co, results);
    return refuse(L, "too many results to resume");
  }
  lua_xmove(co, L, results);
  return results;
}

/* [-arguments, +n, m] starts to resume, with the stack: coroutine record arguments. As step. */
static int enter(lua_State *L, lua_KFunction k, bool wrapped) {
  lua_State *co = lua_tothread(L, FRAME_COROUTINE);
  struct coroutine *c = (struct coroutine *)lua_touserdata(L, FRAME_RECORD);
  int arguments = lua_gettop(L) - FRAME_RECORD;
  if (!lua_checkstack(co, arguments)) return refuse(L, "too many arguments to resume");
  enum status status = status_of(L, co, c);
  if (status == NORMAL || status == RUNNING)
    return refuse(L, "cannot resume non-suspended coroutine");
  if (c == NULL || status != SUSPENDED) return step_plain(L, co, arguments);
  c->state = ENTERED;
  exchange(L, runtime(L), c, FRAME_RECORD);
  return step(L, arguments, k, wrapped);
}

/* what coroutine.resume returns */
static int resumed(lua_State *L, int n) {
  lua_pushboolean(L, n >= 0);
  if (n < 0) { /* left error false */
    lua_insert(L, -2);
    trace_keep_left(L, lua_gettop(L) - 2);
    return 2;
  }
  lua_insert(L, -(n + 1));
  return n + 1;
}

/* what a generator does: it raises the error as it is */
static int generated(lua_State *L, int n) {
  if (n >= 0) return n;
  trace_keep_left(L, lua_gettop(L) - 1);
  return lua_error(L);
}

/* what the function made by coroutine.wrap does */
static int wrapped(lua_State *L, int n) {
  if (n < 0 && n != FAILED_MEMORY && lua_type(L, -1) == LUA_TSTRING) { /* says where the call was */
    luaL_where(L, 1);
    lua_insert(L, -2);
    lua_concat(L, 2);
  }
  return generated(L, n);
}

static int go_on(lua_State *L, lua_KFunction k, bool wrapped) {
  struct coroutine *c = (struct coroutine *)lua_touserdata(L, FRAME_RECORD);
  if (c == NULL || lua_tothread(L, FRAME_COROUTINE) == NULL)
    return luaL_error(L, "somebody has changed the stack of the task"); /* by debug.setlocal */
  c->state = ENTERED;
  lua_settop(L, FRAME_RECORD);
  return step(L, 0, k, wrapped);
}

static int resume_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (!fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, ctx, resume_k); /* not resumed by us */
  return resumed(L, go_on(L, resume_k, false));
}

static int wrap_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (!fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, ctx, wrap_k);
  return wrapped(L, go_on(L, wrap_k, true));
}

static int generator_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (!fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, ctx, generator_k);
  return generated(L, go_on(L, generator_k, true));
}

/* ---- Lua face ---- */

static int l_resume(lua_State *L) {
  check(L, 1);
  push_record(L, 1);
  lua_insert(L, FRAME_RECORD);
  return resumed(L, enter(L, resume_k, false));
}

/* upvalues: runtime, anchors, coroutine, record */
static int call_wrapped(lua_State *L) {
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_pushvalue(L, lua_upvalueindex(4));
  lua_rotate(L, 1, 2);
  return wrapped(L, enter(L, wrap_k, true));
}

static int call_generator(lua_State *L) {
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_pushvalue(L, lua_upvalueindex(4));
  lua_rotate(L, 1, 2);
  return generated(L, enter(L, generator_k, true));
}

/* [-0, +3, v] create(fn, { context = "caller" }): nothing else remains but fn, record, coroutine. As
** Lua's own it takes no notice of a second argument that is no table. */
static void create(lua_State *L, bool body) {
  static const char *const options[] = {"context", NULL};
  luaL_checktype(L, 1, LUA_TFUNCTION);
  bool shares = false;
  if (lua_istable(L, 2)) {
    module_check_options(L, 2, options);
    if (lua_getfield(L, 2, options[0]) != LUA_TNIL) {
      shares = lua_type(L, -1) == LUA_TSTRING && strcmp(lua_tostring(L, -1), "caller") == 0;
      luaL_argcheck(L, shares, 2, "context must be \"caller\"");
    }
  }
  lua_settop(L, 1);
  struct coroutine *c =
      (struct coroutine *)object_new(L, TAG_COROUTINE, sizeof *c, COROUTINE_CONTEXT);
  lua_State *co = lua_newthread(L); /* fn record coroutine */
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_COROUTINES);
  lua_pushvalue(L, 3);
  lua_pushvalue(L, 2);
  lua_rawset(L, 4);
  c->shares = shares;
  c->body = body;
  if (!shares) {
    context_push_flowing(L, runtime(L)->me);
    c->has_context = !lua_isnil(L, -1);
    lua_setiuservalue(L, 2, COROUTINE_CONTEXT);
  }
  lua_settop(L, 3);
  if (body)
    for (int uv = RUNTIME_WRAP_MAIN; uv <= RUNTIME_WRAP_START; uv++)
      lua_getiuservalue(L, UP_RUNTIME, uv);
  lua_pushvalue(L, 1);
  lua_xmove(L, co, body ? BODY_SIZE : 1);
}

static int l_create(lua_State *L) {
  create(L, false);
  return 1;
}

/* the function that resumes a new coroutine */
static int create_wrapped(lua_State *L, lua_CFunction call) {
  create(L, !lua_iscfunction(L, 1)); /* a C function has nothing to close */
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_pushvalue(L, 3);
  lua_pushvalue(L, 2);
  lua_pushcclosure(L, call, 4);
  return 1;
}

static int l_wrap(lua_State *L) { return create_wrapped(L, call_wrapped); }

static int l_generator(lua_State *L) { return create_wrapped(L, call_generator); }

static int l_yield(lua_State *L) {
  const struct level *l = runtime(L)->level;
  if (l != NULL && l->co == L && lua_isyieldable(L)) {
    if (l->record->failing) { /* as Lua's own: the coroutine has ended */
      lua_pushliteral(L, "attempt to yield across a C-call boundary");
      return lua_error(L);
    }
    guard_refuse_yield(L);
    scope_refuse_yield(L);
  }
  return lua_yield(L, lua_gettop(L));
}

static int l_status(lua_State *L) {
  lua_State *co = check(L, 1);
  lua_pushstring(L, status_names[status_of(L, co, push_record(L, 1))]);
  return 1;
}

static int l_running(lua_State *L) {
  bool main = lua_pushthread(L);
  lua_pushboolean(L, main);
  return 2;
}

static int l_isyieldable(lua_State *L) {
  if (lua_isnone(L, 1)) lua_pushthread(L);
  lua_State *co = check(L, 1);
  const struct coroutine *c = push_record(L, 1);
  lua_pushboolean(L, lua_isyieldable(co) && !(c != NULL && c->failing));
  return 1;
}

static int l_close(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_State *co = check(L, 1);
  lua_settop(L, 1);
  struct coroutine *c = push_record(L, 1);
  enum status status = status_of(L, co, c);
  if (status != SUSPENDED && status != DEAD)
    return luaL_error(L, "cannot close a %s coroutine", status_names[status]);
  bool ours = c != NULL && c->state == IDLE; /* not if a stranger has closed it while it was held */
  int result;
  if (ours) {
    c->state = ENTERED;
    exchange(L, rt, c, FRAME_RECORD);
    result = run_closers(L, rt, L, co, c);
  } else
    result = coroutine_reset(co, L);
  lua_pushboolean(L, result == LUA_OK);
  if (result != LUA_OK) lua_xmove(co, L, 1);
  if (ours) {
    exchange(L, rt, c, FRAME_RECORD);
    drop(L, c, FRAME_RECORD);
    c->state = IDLE;
  }
  return result == LUA_OK ? 1 : 2;
}

static const luaL_Reg functions[] = {{"create", l_create},       {"wrap", l_wrap},
                                     {"generator", l_generator}, {"resume", l_resume},
                                     {"yield", l_yield},         {"status", l_status},
                                     {"running", l_running},     {"isyieldable", l_isyieldable},
                                     {"close", l_close},         {NULL, NULL}};
static const luaL_Reg methods[] = {{NULL, NULL}};

ONCE static void coroutine_open(lua_State *L) {
  module_push_function(L, wrap_main);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_WRAP_MAIN);
  module_push_function(L, wrap_trace);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_WRAP_TRACE);
  if (luaL_loadbufferx(L, start, sizeof start - 1, "=[coflow]", "t") != LUA_OK) lua_error(L);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_WRAP_START);
  module_class(L, TAG_COROUTINE, "coflow.CoroutineRecord", methods, NULL);
}

const struct part coroutine_part = {functions, coroutine_open, "coroutine"};
