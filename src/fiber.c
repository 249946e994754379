/*
** fiber.c - tasks whose body is a Lua function: their coroutines, how they start and run.
**
** A fiber runs in a coroutine of its own. Coroutines are reused: each has the watch at its bottom
** (fiber_abandon.c) and runs fiber_main, which never returns. Idle, it has yielded with
**
**     [handler]                                               on its stack, and a new fiber puts
**     [handler] [task] [fn] [arguments] [fn] [argument] …     there: its function once more, to be named after, and
**                                                             how many arguments there are.
**
** The body runs under a protected call *inside* the coroutine, so that `<close>` variables run, and may
** await, while an error unwinds; then fiber_main yields again. A coroutine that an error did leave is
** not used again.
**
** Whoever has kept the coroutine of a task that has ended may resume it when it is idle, which kills
** it, or when it is another task's that has not started: it yields again. Closing it is noticed by the
** watch.
**
** Starting. spawn queues; an async function starts hot: its fiber runs on top of the caller, up to
** its first suspension. C calls nest at most FIBER_MAX_DEPTH deep that way. Beyond, the caller yields with
** a *handoff*: whoever resumed it runs the child first and then the caller, in a loop, so that the
** depth of recursion is bounded by memory only.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

enum { HARD_DEPTH = 50, MIN_IDLE = 64 };
enum {
  BODY_HANDLER = 1,
  BODY_TASK,
  BODY_LABEL,
  BODY_COUNT,
  BODY_RESULTS
}; /* on the stack of fiber_main */

/* ---- coroutines ---- */

/* makes room for one more idle coroutine; false without memory, or after the end */
static bool idle_room(lua_State *L, struct runtime *rt) {
  if (rt->idle_count < rt->idle_size) return true;
  if (rt->closed) return false;
  size_t size = rt->idle_size ? rt->idle_size * 2 : MIN_IDLE;
  struct idle *idle =
      (struct idle *)module_resize(L, rt->idle, rt->idle_size * sizeof *idle, size * sizeof *idle);
  if (idle == NULL) return false;
  rt->idle = idle;
  rt->idle_size = size;
  return true;
}

/* [-0, +0, m] adds a coroutine to the idle ones */
static void idle_grow(lua_State *L, struct runtime *rt) {
  shutdown_check(L, rt);
  if (!idle_room(L, rt)) luaL_error(L, "not enough memory");
  lua_State *co = lua_newthread(L);
  lua_newuserdatauv(L, 0, 1); /* co watch: no tag, to be small; it is told by its metatable */
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_WATCH));
  lua_setmetatable(L, -2);
  lua_pushvalue(L, -2);
  lua_setiuservalue(L, -2, FIBER_WATCHED);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_MAIN);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_HANDLER);
  lua_xmove(L, co, 3);
  lua_toclose(co, 1);
  int results;
  if (lua_resume(co, L, 1, &results) != LUA_YIELD) { /* no memory, or no C stack */
    lua_xmove(co, L, 1);
    lua_error(L);
  }
  int slot = slots_add(L, UP_ANCHORS, &rt->free_slot);
  rt->idle[rt->idle_count++] = (struct idle){co, slot};
}

/* false when somebody who kept the coroutine of a task has resumed or closed it since */
static bool is_idle(lua_State *co) { return lua_status(co) == LUA_YIELD; }

static bool has_same_hook(lua_State *a, lua_State *b) {
  lua_Hook hook = lua_gethook(a);
  return hook == lua_gethook(b) && (hook == NULL || (lua_gethookmask(a) == lua_gethookmask(b) &&
                                                     lua_gethookcount(a) == lua_gethookcount(b)));
}

/* the coroutine of a fiber that ended well goes back to the idle ones, or is dropped */
static void recycle(lua_State *L, struct runtime *rt, lua_State *co, int slot, bool held) {
  rt->busy--;
  if ((rt->idle_count < MIN_IDLE || rt->idle_count + rt->busy < rt->busy_peak) &&
      has_same_hook(co, L) && /* one of its own is not for the next task */
      idle_room(L, rt)) {
    if (held) { /* else the slot holds it already */
      lua_pushthread(co);
      lua_xmove(co, L, 1);
      lua_rawseti(L, UP_ANCHORS, slot);
    }
    rt->idle[rt->idle_count++] = (struct idle){co, slot};
  } else
    slots_free(L, UP_ANCHORS, &rt->free_slot, slot);
}

void fiber_trim(lua_State *L) {
  struct runtime *rt = runtime(L);
  size_t keep = rt->busy_peak > rt->busy ? rt->busy_peak - rt->busy : 0;
  if (keep < MIN_IDLE) keep = MIN_IDLE;
  while (rt->idle_count > keep)
    slots_free(L, UP_ANCHORS, &rt->free_slot, rt->idle[--rt->idle_count].slot);
  rt->busy_peak = rt->busy;
}

/* ---- the bottom of a coroutine, seen from outside ---- */

/* [-0, +1, -] an argument of fiber_main, on whose coroutine anything may be going on; or nil */
static void push_bottom(lua_State *L, lua_State *co, int n) {
  lua_Debug ar;
  int low = -1, high = 3; /* mostly: what suspends, the function, fiber_main */
  if (co == NULL || !lua_checkstack(co, 1)) {
    lua_pushnil(L);
    return;
  }
  while (lua_getstack(co, high, &ar)) low = high, high *= 2;
  int middle = high - 1;
  for (; high - low > 1; middle = low + (high - low) / 2) { /* the outermost level lies between */
    if (lua_getstack(co, middle, &ar))
      low = middle;
    else
      high = middle;
  }
  /* `ar` is of the last level that was found, which is low: nothing was found above it since */
  if (low < 0 || lua_getlocal(co, &ar, n) == NULL) lua_pushnil(co);
  if (co != L) lua_xmove(co, L, 1);
}

void fiber_push(lua_State *L, lua_State *co) { push_bottom(L, co, BODY_TASK); }

void fiber_push_unheld(lua_State *L, struct runtime *rt, struct fiber *f) {
  if (rt->started == f && rt->me == &f->task &&
      lua_touserdata(rt->started_on, rt->started_at) == (void *)f) { /* else the state closes */
    lua_pushvalue(rt->started_on, rt->started_at);
    if (rt->started_on != L) lua_xmove(rt->started_on, L, 1);
  } else
    push_bottom(L, f->co, BODY_TASK);
  fiber_hold(L, -1, f);
}

void fiber_push_awaiting(lua_State *L, struct fiber *f, int i) {
  bool started = f->task.flags & TASK_STARTED;
  lua_State *co = f->co;
  if (started && co != NULL) /* it stands where the innermost coroutine does */
    for (lua_State *inner; (inner = coroutine_inner(co, NULL)) != NULL;) co = inner;
  if (co == NULL || !lua_checkstack(co, 1) || (!started && lua_gettop(co) <= BODY_RESULTS))
    lua_pushnil(L);
  else {
    lua_pushvalue(co, i);
    if (co != L) lua_xmove(co, L, 1);
  }
}

bool fiber_push_awaited(lua_State *L, struct fiber *f) {
  bool started = f->task.flags & TASK_STARTED; /* else a continuation: it is the last argument */
  fiber_push_awaiting(L, f, started ? 1 : -1);
  if (lua_touserdata(L, -1) == (void *)f->u.wait.on) return true;
  lua_pop(L, 1); /* somebody has closed the coroutine */
  lua_pushnil(L);
  return false;
}

void fiber_hold(lua_State *L, int i, struct fiber *f) {
  if (f->task.flags & TASK_HELD || f->co == NULL) return;
  i = lua_absindex(L, i);
  if (f->task.label == LABEL_NOBODY) f->task.label = 0;
  lua_pushthread(f->co);
  if (f->co != L) lua_xmove(f->co, L, 1);
  lua_setiuservalue(L, i, TASK_RESULT);
  f->task.flags |= TASK_HELD;
}

void fiber_make_cold(lua_State *L, int i, struct fiber *f) {
  fiber_hold(L, i, f);
  task_release(L, &f->task);
}

/* ---- labels ---- */

/* [-1, +0, m] the label with the text on top */
static uint32_t label_of(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LABELS); /* text labels */
  lua_pushvalue(L, -2);
  if (lua_rawget(L, -2) == LUA_TNIL) {
    lua_pop(L, 1);
    lua_pushvalue(L, -2);
    lua_rawseti(L, -2, ++rt->label_count);
    lua_pushvalue(L, -2);
    lua_pushinteger(L, rt->label_count);
    lua_rawset(L, -3);
    lua_pushinteger(L, rt->label_count);
  }
  uint32_t found = (uint32_t)lua_tointeger(L, -1);
  lua_pop(L, 3);
  return found;
}

/* [-0, +1, m] "coflow.resilience.retry" for that path of a file of the library */
static void push_module(lua_State *L, const char *path) {
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  luaL_addstring(&b, "coflow");
  for (const char *end = strrchr(path, '.'); *path != '\0' && path != end; path++) {
    if (luaL_bufflen(&b) == strlen("coflow")) luaL_addchar(&b, '.');
    luaL_addchar(&b, *path == '/' || *path == '\\' ? '.' : *path);
  }
  luaL_pushresult(&b);
}

/* [-1, +0, m] sets the label of t: "file:line" of the function on top, the name of one of C, or the
** module of one of the library's. The few labels that are used again and again are found by a look. */
static void label(lua_State *L, struct runtime *rt, struct task *t) {
  lua_Debug ar;
  if (lua_iscfunction(L, -1)) {
    blame_push_name(L);
    lua_remove(L, -2);
    t->label = label_of(L);
    return;
  }
  lua_getinfo(L, ">S", &ar);
  size_t at = ((size_t)ar.linedefined * 31 + (size_t)(uintptr_t)ar.source / 16) % LABEL_CACHE;
  struct label_cache *c = &rt->labels[at];
  if (c->label == 0 || c->line != ar.linedefined || strcmp(c->source, ar.short_src) != 0) {
    if (module_is_ours(rt, ar.source))
      push_module(L, ar.source + rt->library_length);
    else if (ar.linedefined > 0)
      lua_pushfstring(L, "%s:%d", ar.short_src, ar.linedefined);
    else
      lua_pushstring(L, ar.short_src);
    c->label = label_of(L);
    c->line = ar.linedefined;
    memcpy(c->source, ar.short_src, sizeof c->source);
  }
  t->label = c->label;
}

void fiber_name(lua_State *L, struct fiber *f) {
  lua_xmove(L, f->co, 1);
  lua_replace(f->co, BODY_LABEL);
}

void fiber_label(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  if (f->co == NULL)
    lua_getiuservalue(L, i, TASK_CONTEXT); /* complete: see keep_name */
  else
    push_bottom(L, f->co, BODY_LABEL);
  if (lua_isfunction(L, -1))
    label(L, runtime(L), &f->task);
  else
    lua_pop(L, 1);
}

/* A task that ends must not keep what its function refers to, but tell its name: a function without
** upvalues, save the globals, is kept instead of a label, which costs less. */
static void keep_name(lua_State *L, struct runtime *rt, struct task *t) {
  if (t->label != 0) {
    if (t->label != LABEL_NOBODY || t->state == TASK_SUCCEEDED) return;
    t->label = 0; /* an error is to be reported */
  }
  if (lua_getupvalue(L, BODY_LABEL, 1) != NULL) {
    lua_copy(L, BODY_LABEL, -1);
    label(L, rt, t);
  } else if (lua_isfunction(L, BODY_LABEL)) {
    lua_pushvalue(L, BODY_LABEL);
    lua_setiuservalue(L, BODY_TASK, TASK_CONTEXT);
  }
}

/* ---- the body ---- */

static int start_k(lua_State *L, int status, lua_KContext ctx);

static int finish(lua_State *L, struct runtime *rt, struct fiber *f, int status) {
  int results = lua_gettop(L) - BODY_COUNT;
  if (results > 1 &&
      !lua_checkstack(L, LUA_MINSTACK)) { /* Lua has made room for these, and no more */
    lua_settop(L, BODY_COUNT);
    lua_pushliteral(L, "stack overflow (too many results)");
    status = LUA_ERRRUN;
  }
  if (f->task.traits & TRAIT_CHILD) group_child_ended(L, rt, f, status <= LUA_YIELD);
  if (status <= LUA_YIELD)
    task_succeed(L, rt, BODY_TASK, &f->task, results);
  else
    task_settle_error(L, rt, BODY_TASK, 0);
  keep_name(L, rt, &f->task);
  scope_end_task(L, rt, f);
  lua_settop(L, BODY_HANDLER);
  return lua_yieldk(L, 0, (lua_KContext)rt, start_k);
}

static int main_k(lua_State *L, int status, lua_KContext ctx) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, BODY_TASK);
  if (f == NULL) return luaL_error(L, "somebody has changed the stack of the task");
  return finish(L, (struct runtime *)ctx, f, status);
}

/* somebody else has resumed the coroutine, which waits for a task, or for the start of one */
static int refuse_stranger(lua_State *L, struct runtime *rt) {
  struct fiber *f = (struct fiber *)object_test(L, BODY_TASK, TAG_TASK);
  if (f != NULL && task_is(&f->task, KIND_FIBER) && f->co == L && !(f->task.flags & TASK_STARTED)) {
    lua_settop(L, BODY_RESULTS + (int)lua_tointeger(L, BODY_COUNT));
    return lua_yieldk(L, 0, (lua_KContext)rt, start_k);
  }
  rt->meddled = true;
  lua_pushliteral(L, "cannot resume dead coroutine");
  return lua_error(L);
}

/* ctx is the runtime, here and in main_k: this is too often to ask for it */
static int start_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = (struct runtime *)ctx;
  struct fiber *f = (struct fiber *)rt->me;
  if (f->co != L || rt->entering == f) return refuse_stranger(L, rt);
  status = lua_pcallk(L, lua_gettop(L) - BODY_RESULTS, LUA_MULTRET, BODY_HANDLER, ctx, main_k);
  return finish(L, rt, f, status);
}

/* fiber_main(handler): the life of a coroutine */
static int fiber_main(lua_State *L) { return lua_yieldk(L, 0, (lua_KContext)runtime(L), start_k); }

/* as object_new does it, but that the compiler knows the size */
struct fiber *fiber_blank(lua_State *L) {
  struct fiber *f = (struct fiber *)lua_newuserdatauv(L, sizeof *f, 3);
  *f = (struct fiber){.task = {.tag = TAG_TASK | KIND_FIBER}};
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_TASK));
  lua_setmetatable(L, -2);
  return f;
}

bool fiber_reuse(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  if (f->task.state != TASK_SUCCEEDED || f->task.flags & TASK_HELD || f->task.traits) return false;
  lua_pushnil(L);
  lua_setiuservalue(L, i, TASK_RESULT);
  *f = (struct fiber){.task = {.tag = f->task.tag}};
  return true;
}

void fiber_reserve(lua_State *L, struct runtime *rt) {
  while (rt->idle_count == 0 || !is_idle(rt->idle[rt->idle_count - 1].co))
    if (rt->idle_count == 0)
      idle_grow(L, rt);
    else
      slots_free(L, UP_ANCHORS, &rt->free_slot, rt->idle[--rt->idle_count].slot);
}

/* [-(n+2), +1, m] gives the blank fiber on top a coroutine, with the function and arguments below it */
static inline struct fiber *fit(lua_State *L, struct runtime *rt, struct fiber *f, int arguments,
                                struct scope *s) {
  if (rt->idle_count == 0 || rt->meddled) fiber_reserve(L, rt);
  lua_State *co = rt->idle[rt->idle_count - 1].co;
  if (arguments > 10 && !lua_checkstack(co, arguments + 10)) luaL_error(L, "too many arguments");
  /* nothing raises from here: the coroutine leaves the idle ones and is the task's */
  f->co = co;
  f->task.slot = rt->idle[--rt->idle_count].slot;
  if (++rt->busy > rt->busy_peak) rt->busy_peak = rt->busy;
  if (lua_gethook(co) != lua_gethook(L)) /* as a new coroutine it has that of who makes it */
    lua_sethook(co, lua_gethook(L), lua_gethookmask(L), lua_gethookcount(L));
  scope_join(s, &f->member);
  testing_born(L, rt, f->task.slot);
  if (rt->me->flags & TASK_HAS_CONTEXT) context_inherit(L, -1, &f->task, rt->me);
  lua_pushvalue(L, -1);
  lua_pushvalue(L, -arguments - 3); /* fn arguments task task fn */
  lua_xmove(L, co, 2);
  lua_pushinteger(co, arguments);
  lua_xmove(L, co, arguments + 2); /* and the task, which comes back: no insert, for speed */
  lua_xmove(co, L, 1);
  return f;
}

struct fiber *fiber_new(lua_State *L, struct runtime *rt, int arguments, struct scope *s) {
  return fit(L, rt, fiber_blank(L), arguments, s);
}

struct fiber *fiber_fit(lua_State *L, struct runtime *rt, int arguments, struct scope *s) {
  return fit(L, rt, (struct fiber *)lua_touserdata(L, -1), arguments, s);
}

/* ---- running ---- */

void fiber_drop_coroutine(lua_State *L, struct runtime *rt, struct fiber *f) {
  bool planned = f->task.traits & TRAIT_SCHEDULED;
  if (rt->probed) probe_lost(L, rt, f);
  if (planned) task_push(L, &f->task);
  rt->busy--;
  task_forget(L, &f->task);
  f->co = NULL;
  if (planned) schedule_end(L, rt);
}

/* It never starts: a child that was queued in a canceled group, or a continuation whose token has been
** canceled, which has what it waited for as its last argument. */
void fiber_land(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  if (f->task.label == 0) fiber_label(L, i); /* while it has its function */
  if (f->task.traits & TRAIT_QUEUED) {
    group_discard(L, i);
    return;
  }
  fiber_push_awaiting(L, f, -1);
  if (object_test(L, -1, TAG_TASK) != NULL)
    task_push_error(L, lua_gettop(L));
  else /* somebody has closed its coroutine meanwhile */
    error_push(L, ERROR_CANCELED, "the operation was canceled");
  if (!task_done(&f->task)) fiber_discard(L, runtime(L), i);
}

void fiber_discard(lua_State *L, struct runtime *rt, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  task_settle_canceled(L, rt, i);
  scope_end_task(L, rt, f);
  fiber_drop_coroutine(L, rt, f);
}

/* The coroutine has yielded past us, or an error has left it: its `<close>` variables run now, without
** suspending; the task fails with the error on top, unless it is complete. [-1, +0, -] */
void fiber_fail(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct task *me = rt->me;
  task_push(L, &f->task);
  lua_insert(L, -2); /* task error */
  rt->me = &f->task;
  f->task.state = TASK_RUNNING;
  coroutine_close_inner(L, rt, f->co);
  const lua_State *resetting = rt->resetting;
  rt->resetting = f->co;
  coroutine_reset(f->co, L);
  rt->resetting = resetting;
  if (f->task.traits & TRAIT_CHILD) group_child_ended(L, rt, f, false);
  scope_end_task(L, rt, f);
  rt->me = me;
  if (!task_done(&f->task))
    task_settle_faulted(L, rt, -2, 0);
  else
    lua_pop(L, 1);
  trace_forget(L, &f->task);
  fiber_drop_coroutine(L, rt, f);
  lua_pop(L, 1);
}

/* [-0, +n, m] where a coroutine stands: in the innermost one that has a place; false, and nothing.
** ours: that is a line of the library. */
static bool push_place(lua_State *L, lua_State *co, bool *is_ours) {
  lua_Debug ar;
  lua_State *inner = coroutine_inner(co, NULL);
  if (inner != NULL && push_place(L, inner, is_ours)) return true;
  bool found = false;
  for (int level = 0; lua_getstack(co, level, &ar); level++) {
    lua_getinfo(co, "Sl", &ar);
    if (ar.currentline <= 0) continue;
    bool ours = module_is_ours(runtime(L), ar.source); /* only if there is no other */
    if (found && ours) continue;
    if (found) lua_pop(L, 1);
    lua_pushfstring(L, "%s:%d", ar.short_src, ar.currentline);
    found = true;
    *is_ours = ours;
    if (!ours) break;
  }
  return found;
}

bool fiber_push_place(lua_State *L, struct fiber *f) {
  bool ours = false;
  if (push_place(L, f->co, &ours)) return !ours;
  lua_pushliteral(L, "?");
  return false;
}

/* [-0, +1, m] the error of a body that called coroutine.yield */
static void push_stray_yield(lua_State *L, struct fiber *f) {
  fiber_push_place(L, f);
  error_push(
      L, ERROR_OPERATION,
      "%s: coroutine.yield in the body of a task would suspend it for ever: use flow.await or "
      "flow.yield, or make the generator with coroutine.wrap",
      lua_tostring(L, -1));
  lua_remove(L, -2);
}

/* [-0, +0, m] Tells the handlers that the running f, which is about to be resumed, has another context.
** What they do may ask for the task, so it is held; may resume its coroutine, which is a stranger's
** doing (fiber_on_top); and may close it: false then. */
static bool show_context(lua_State *L, struct runtime *rt, struct fiber *f) {
  const struct fiber *before = rt->entering;
  task_push(L, &f->task);
  lua_pop(L, 1);
  rt->entering = f;
  context_show(L, rt, &f->task);
  rt->entering = before;
  return !(f->task.flags & TASK_ABANDONED);
}

/* [-0, +0, m] what few programs need before f is resumed, and is to cost the others nothing; false:
** somebody has closed it */
static __attribute__((noinline)) bool may_step(lua_State *L, struct runtime *rt, struct fiber *f) {
  bool watched = rt->shown_watched || f->task.flags & TASK_WATCHED;
  if (watched && !show_context(L, rt, f)) return false;
  if (rt->probed) probe_begin(L, rt, f);
  return true;
}

/* it runs, so that it could not be resumed */
static bool is_active(lua_State *co) {
  lua_Debug ar;
  return lua_status(co) == LUA_OK && lua_getstack(co, 0, &ar);
}

/* [-0, +0, -] f has ended, and given its coroutine back */
static void retire(lua_State *L, struct runtime *rt, struct fiber *f) {
  bool planned = f->task.traits & TRAIT_SCHEDULED;
  if (planned) task_push(L, &f->task);
  lua_State *co = f->co;
  int slot = f->task.slot;
  trace_forget(L, &f->task);
  f->co = NULL;
  f->task.slot = 0;
  recycle(L, rt, co, slot, f->task.flags & TASK_HELD);
  if (planned) schedule_end(L, rt); /* only now: nothing held its coroutine before */
}

void fiber_run(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct task *before = rt->me;
  struct fiber *callers = NULL;
  int results;
  rt->depth++;
  for (;;) {
    if (task_done(&f->task)) { /* it ended in the hands of somebody who resumed its coroutine */
      trace_forget(L, &f->task);
      fiber_drop_coroutine(L, rt, f);
      goto stopped;
    }
    f->task.state = TASK_RUNNING;
    rt->me = &f->task;
    if ((rt->shown_watched || rt->probed || f->task.flags & TASK_WATCHED) && !may_step(L, rt, f))
      goto stopped;
    f->task.flags = (uint16_t)((f->task.flags & ~(TASK_PARKED | TASK_DEAF)) | TASK_STARTED);
    int status = lua_resume(f->co, L, 0, &results);
    if (rt->probed) probe_end(L, rt, f);
    switch (status) {
      case LUA_YIELD:
        if (rt->handoff != NULL) {
          f->u.caller = callers;
          callers = f;
          rt->hot++;
          f = rt->handoff;
          rt->handoff = NULL;
          rt->started = NULL; /* it lies nowhere */
          continue;
        }
        if (f->task.flags & TASK_PARKED) break;
        if (task_done(&f->task)) {
          retire(L, rt, f);
          break;
        }
        lua_pop(f->co, results);
        push_stray_yield(L, f);
        fiber_fail(L, rt, f);
        break;
      default:
        if (is_active(f->co)) {
          lua_pop(f->co, 1); /* somebody is closing it, and runs the loop: its watch sees to it */
          f->task.state = TASK_QUEUED;
          f->task.flags |= TASK_PARKED;
          break;
        }
        lua_xmove(f->co, L, 1);
        fiber_fail(L, rt, f);
    }
  stopped:
    do {
      if (callers == NULL) goto out;
      f = callers;
      callers = f->u.caller;
      rt->hot--;
    } while (f->task.flags &
             TASK_ABANDONED); /* somebody has closed its coroutine: the pump sees to it */
  }
out:
  rt->depth--;
  rt->me = before;
  if (before != rt->outside) context_switched(L, rt, before);
}

void fiber_run_at(lua_State *L, struct runtime *rt, struct fiber *f, int i) {
  rt->started = f;
  rt->started_on = L;
  rt->started_at = i;
  fiber_run(L, rt, f);
}

void fiber_start(lua_State *L, struct runtime *rt, struct fiber *f) {
  lua_pushvalue(f->co, BODY_TASK);
  lua_xmove(f->co, L, 1);
  fiber_run_at(L, rt, f, lua_gettop(L));
  lua_pop(L, 1);
}

void fiber_wake(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct task *t = &f->task;
  if (t->flags & (TASK_LINKED | TASK_ABANDONED) ||
      t->slot == 0) { /* or somebody has closed its coroutine */
    lua_pop(L, 1);
    return;
  }
  lua_rawseti(L, UP_ANCHORS, t->slot);
  t->state = TASK_QUEUED;
  loop_ready(rt, t);
}

/* ---- Lua face ---- */

static int l_spawn(lua_State *L) {
  struct runtime *rt = runtime(L);
  argument_callable(L, 1);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  loop_queue(rt, f);
  return 1;
}

static int hot_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (!fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, ctx, hot_k); /* not resumed by us */
  lua_settop(L, 1);
  return 1;
}

int fiber_run_hot(lua_State *L, int i, struct fiber *f, lua_KFunction k) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  bool handoff = rt->depth >= FIBER_MAX_DEPTH && fiber_can_suspend(L, rt);
  if (handoff) {
    rt->handoff = f;
    return fiber_suspend(L, rt, me, 0, k);
  }
  if (rt->depth < HARD_DEPTH) {
    rt->hot++;
    fiber_run_at(L, rt, f, i);
    rt->hot--;
  } else { /* a recursion through C: it starts on a later turn */
    f->task.state = TASK_QUEUED;
    if (f->task.traits & TRAIT_SCHEDULED) f->task.traits |= TRAIT_DIRECT;
    loop_ready(rt, &f->task);
  }
  return k == hot_k ? 1 : k(L, LUA_OK, 0);
}

/* upvalues: runtime, anchors, fn */
static int async_call(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_insert(L, 1);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  if (rt->me->traits & TRAIT_PLAN) {
    schedule_inherit(L, rt, 1);
    if (f->task.state != TASK_CREATED) { /* a finalizer was here */
      lua_settop(L, 1);
      return 1;
    }
  }
  return fiber_run_hot(L, 1, f, hot_k);
}

static int l_async(lua_State *L) {
  argument_callable(L, 1);
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_pushvalue(L, 1);
  lua_pushcclosure(L, async_call, 3);
  return 1;
}

/* Task.new(fn, ...): cold */
static int l_new(lua_State *L) {
  struct runtime *rt = runtime(L);
  argument_callable(L, 1);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  fiber_make_cold(L, 1, f);
  return 1;
}

/* the task at index 1 is cold; to be asked after whatever creates, as a finalizer may start it */
static struct fiber *check_cold(lua_State *L) {
  struct fiber *f = (struct fiber *)task_check(L, 1);
  if (!task_is(&f->task, KIND_FIBER) || f->task.state != TASK_CREATED) {
    task_push_name(L, 1);
    error_throw(L, ERROR_OPERATION,
                "task '%s' was started before: only a task made by Task.new starts, once",
                lua_tostring(L, -1));
  }
  return f;
}

/* the cold task at index 1, with a scheduler or nil at 2, which is to be started here */
static struct fiber *adopt_cold(lua_State *L, struct runtime *rt) {
  task_check(L, 1);
  lua_settop(L, 2);
  if (!lua_isnil(L, 2)) schedule_check(L, 2);
  struct scope *s = scope_flowing(L, rt);
  struct fiber *f = check_cold(L);
  scope_adopt(L, rt, f, s);
  return f;
}

static int l_start(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *f = adopt_cold(L, rt);
  bool elsewhere = !lua_isnil(L, 2) && schedule_give(L, 1, 2);
  check_cold(L);
  if (elsewhere) {
    lua_settop(L, 1);
    schedule_start(L, rt, 1);
    return 1;
  }
  lua_settop(L, 1);
  task_hold(L, 1, &f->task);
  loop_queue(rt, f);
  return 1;
}

static int l_run_synchronously(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *f = adopt_cold(L, rt);
  if (!lua_isnil(L, 2)) {
    bool joins = schedule_give(L, 1, 2);
    check_cold(L); /* before it takes a place there */
    if (joins) schedule_join(L, rt, 1);
  } else if (rt->me->traits & TRAIT_PLAN)
    schedule_inherit(L, rt, 1);
  check_cold(L);
  lua_settop(L, 1);
  task_hold(L, 1, &f->task);
  return fiber_run_hot(L, 1, f, hot_k);
}

static int l_current_task(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (rt->me == rt->outside)
    lua_pushnil(L);
  else
    task_push(L, rt->me);
  return 1;
}

/* name_after(task, fn): one that has not started is named after that function */
static int l_name_after(lua_State *L) {
  struct task *t = task_check(L, 1);
  lua_settop(L, 2);
  if (!lua_isfunction(L, 2) || !task_is(t, KIND_FIBER) || task_done(t) || t->flags & TASK_STARTED)
    return 0;
  struct fiber *f = (struct fiber *)t;
  if (f->co != NULL) fiber_name(L, f);
  return 0;
}

static const luaL_Reg functions[] = {{"spawn", l_spawn},
                                     {"async", l_async},
                                     {"new", l_new},
                                     {"start", l_start},
                                     {"run_synchronously", l_run_synchronously},
                                     {"current_task", l_current_task},
                                     {"name_after", l_name_after},
                                     {NULL, NULL}};

void fiber_open(lua_State *L) {
  struct runtime *rt = runtime(L);
  module_functions(L, functions);
  module_push_function(L, fiber_main);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_MAIN);
  module_push_function(L, trace_handler);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_HANDLER);
  if (rt->outside != NULL) return;
  struct fiber *outside =
      (struct fiber *)task_new(L, KIND_FIBER, sizeof *outside, TASK_CONTEXT, false);
  rt->root->owner = outside;
  scope_join(rt->root, &outside->member);
  outside->task.state = TASK_RUNNING;
  outside->task.flags = TASK_STARTED;
  task_hold(L, -1, &outside->task);
  lua_pop(L, 1);
  rt->outside = rt->me = &outside->task;
}
