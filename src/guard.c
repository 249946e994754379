/*
** guard.c - scopes of the context: with(), enter(), call(), and the suppression of its flow.
**
** A *guard* remembers what to put back. The open guards of a task, or of a coroutine with a context of
** its own (coroutine.c), form a stack. `dispose` insists on that order; `__close`, which Lua calls
** while errors unwind, also closes the guards above that nobody closed. In another task both are
** refused and change nothing, unless that task is closing the coroutine in which the guard was opened:
** what it kept then goes without a word.
**
** A *callback* (guard_call) is code of the user's that runs within somebody else's on the same task, as
** cancel's do: it has a part of that stack to itself. What was opened outside is refused to it as to
** another task: the context that it was opened in is not the one of the callback, or is about to be put
** back. What a callback leaves open is dropped at its end, as at the end of a task; a dropped guard is
** refused to everybody. (Not that of a coroutine that has ended: it is as disposed of.)
**
** The suppression of flow is ordered only with what puts it back; a second one is inert.
**
** Invariant: a guard that is neither done nor dropped is in the stack at its home. Those of a callback that
**            runs are on top; it cannot suspend.
** Source:    .NET AsyncFlowControl and ExecutionContext.Run; with() is a token of Python's contextvars as
**            a scope.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

enum guard_kind { GUARD_VALUE, GUARD_CONTEXT, GUARD_FLOW };
struct guard {
  uint32_t tag;
  uint8_t kind;
  bool done;
  bool suppressed;             /* the flow of its owner, before */
  bool called;                 /* opened in a callback */
  void *owner;                 /* the task, or the coroutine's record, that it belongs to */
  struct guard **home;         /* the owner's stack of guards; NULL: dropped */
  const struct callback *in;   /* the callback that it belongs to, or NULL */
  lua_State *co;               /* where it was opened: order is kept per coroutine */
  struct guard *below, *above; /* in that stack */
  char place[];                /* where it was opened, if a yield could leave it; else not there */
};
enum { GUARD_SAVED = 1, GUARD_OWNER, GUARD_LOCAL };
/* of GUARD_CONTEXT: the synchronization context before, which is the task's and no part of a context */
enum { GUARD_SYNCHRONIZATION = GUARD_LOCAL };

/* A callback while it runs: a frame on the C stack. */
struct callback {
  struct callback *up;
  const struct task *task;
  const struct level *own; /* the coroutine with a context of its own that it runs in, or NULL */
  const lua_State *co;
  struct guard **home; /* where it has opened guards, or NULL */
};

/* the callback that runs now, or NULL: the innermost one, unless that has started a task, or resumed a
** coroutine with a context of its own, since */
static struct callback *callback_of(const struct runtime *rt, const struct level *own) {
  struct callback *c = rt->callback;
  return c != NULL && c->task == rt->me && c->own == own ? c : NULL;
}

static const void *owner_of(const struct runtime *rt, const struct level *own) {
  return own != NULL ? (const void *)own->record : (const void *)rt->me;
}

/* the scope belongs to the code that runs now, not to another task, coroutine or callback */
static bool is_own(lua_State *L, const struct guard *g) {
  const struct runtime *rt = runtime(L);
  const struct level *own = coroutine_own(rt);
  return g->home != NULL && g->owner == owner_of(rt, own) && g->in == callback_of(rt, own);
}

/* [-0, +1, m] a guard of the running code, on its stack of guards; its user values are still nil */
static struct guard *guard_new(lua_State *L, enum guard_kind kind) {
  struct runtime *rt = runtime(L);
  size_t size = sizeof(struct guard), length = 0;
  bool shares = coroutine_shares(L, rt);
  if (shares) {
    blame_push_place(L, 1);
    length = lua_rawlen(L, -1) + 1;
  }
  struct guard *g = (struct guard *)object_new(L, TAG_GUARD, size + length, GUARD_LOCAL);
  if (shares) {
    memcpy(g->place, lua_tostring(L, -2), length);
    lua_remove(L, -2);
  }
  g->kind = (uint8_t)kind;
  g->suppressed = rt->me->flags & TASK_SUPPRESSED;
  const struct level *own = coroutine_own(rt);
  struct callback *in = callback_of(rt, own);
  struct guard **home =
      own ? coroutine_guards(own->record) : &scope_own(L, rt, (struct fiber *)rt->me)->guards;
  if (own)
    coroutine_push_record(L, own);
  else
    task_push(L, rt->me);
  g->owner = lua_touserdata(L, -1);
  lua_setiuservalue(L, -2, GUARD_OWNER);
  g->home = home;
  g->co = L;
  if (in != NULL) {
    g->in = in;
    g->called = true;
    in->home = home;
  }
  g->below = *home;
  if (g->below) g->below->above = g;
  *home = g;
  return g;
}

static void unlink_guard(struct guard *g) {
  g->done = true; /* who has the guard at hand makes it forget what it kept */
  if (g->home == NULL) return;
  if (g->above)
    g->above->below = g->below;
  else
    *g->home = g->below;
  if (g->below) g->below->above = g->above;
  g->above = g->below = NULL;
}

/* the innermost guards at home, those of the callback `in`, or all (NULL): their end has come */
static void drop(struct guard **home, const struct callback *in) {
  struct guard *g = *home;
  for (struct guard *below; g != NULL && (in == NULL || g->in == in); g = below) {
    below = g->below;
    g->home = NULL;
    g->in = NULL;
    g->above = g->below = NULL;
  }
  if (g != NULL) g->above = NULL;
  *home = g;
}

void guard_drop_all(struct guard **home) { drop(home, NULL); }

int guard_call(lua_State *L, struct runtime *rt, int arguments, int handler) {
  struct callback here = {rt->callback, rt->me, coroutine_own(rt), L, NULL};
  rt->callback = &here;
  int status = lua_pcall(L, arguments, 0, handler);
  rt->callback = here.up;
  if (here.home != NULL) drop(here.home, &here);
  return status;
}

/* [-0, +0, -] the guard at i remembers the synchronization context of the running task */
static void guard_save_synchronization(lua_State *L, int i, struct task *me) {
  if (!(me->traits & TRAIT_PLAN)) return;
  schedule_push_context(L, me);
  lua_setiuservalue(L, i, GUARD_SYNCHRONIZATION);
}

/* [-0, +1, -] what the guard at i keeps in that user value, and keeps no more */
static void take(lua_State *L, int i, int uservalue) {
  lua_getiuservalue(L, i, uservalue);
  lua_pushnil(L);
  lua_setiuservalue(L, i, uservalue);
}

/* g, which puts the suppression back, is about to: what has suppressed the flow since has no more to undo */
static void drop_suppressions(struct guard *g) {
  for (struct guard *a = g->above, *next; a != NULL; a = next) {
    next = a->above;
    if (a->kind != GUARD_FLOW) continue;
    unlink_guard(a);
    a->done = false;
    a->home = NULL;
  }
}

/* [-0, +0, me] puts back what the guard at i, whose owner is running, remembers */
static void guard_restore(lua_State *L, int i, struct guard *g) {
  struct task *me = runtime(L)->me;
  if (g->kind == GUARD_CONTEXT) drop_suppressions(g);
  unlink_guard(g);
  take(L, i, GUARD_SAVED);
  if (g->kind == GUARD_VALUE) {
    lua_getiuservalue(L, i, GUARD_LOCAL);
    context_set_local(L, lua_gettop(L), lua_gettop(L) - 1);
    lua_pop(L, 1);
  } else {
    me->flags = (uint16_t)((me->flags & ~TASK_SUPPRESSED) | (g->suppressed ? TASK_SUPPRESSED : 0));
    context_swap(L);
    if (me->traits & TRAIT_PLAN) {
      take(L, i, GUARD_SYNCHRONIZATION);
      schedule_set_context(L, me);
    }
  }
  lua_pop(L, 1);
}

static bool is_of_coroutine(const struct guard *g) {
  return *(const uint32_t *)g->owner == TAG_COROUTINE;
}

/* a guard that is not the running code's */
static int refuse_stranger(lua_State *L, const struct guard *g) {
  const struct runtime *rt = runtime(L);
  const struct level *own = coroutine_own(rt);
  bool here = g->owner == owner_of(rt, own);
  const char *where;
  if (here && !g->called && callback_of(rt, own) != NULL)
    where = "outside this callback";
  else if (g->called)
    where = "in a callback";
  else if (here)
    where = "in a call or scope that has ended";
  else if (g->owner == rt->me)
    where = "outside this coroutine";
  else if (is_of_coroutine(g))
    where = "in another coroutine";
  else
    where = "in another task";
  error_push(L, ERROR_OPERATION,
             g->kind == GUARD_FLOW ? "the flow was suppressed %s: undo it there"
                                   : "this scope was opened %s: dispose of it there",
             where);
  return lua_error(L);
}

/* a, above g, must be closed before g: it is of the same coroutine; or of the one that runs now, and would
** put back what g undoes */
static bool is_before(const lua_State *L, const struct guard *a, const struct guard *g) {
  return a->co == g->co || (a->co == L && a->kind == GUARD_CONTEXT);
}

/* ends a suppression, also for the guards above, which are to put it back */
static void end_suppression(struct guard *g, struct task *me) {
  for (struct guard *a = g->above; a != NULL; a = a->above) a->suppressed = false;
  unlink_guard(g);
  me->flags &= (uint16_t)~TASK_SUPPRESSED;
}

static void undo_flow(lua_State *L, struct guard *g) {
  struct task *me = runtime(L)->me;
  if (!(me->flags & TASK_SUPPRESSED))
    error_throw(L, ERROR_OPERATION, "the flow of the execution context is not suppressed here");
  for (const struct guard *a = g->above; a != NULL; a = a->above)
    if (a->kind == GUARD_CONTEXT && is_before(L, a, g))
      error_throw(
          L, ERROR_OPERATION,
          "the flow was suppressed outside a call or scope that is still open, and would put "
          "the suppression back: undo it when that has ended");
  end_suppression(g, me);
}

static int l_guard_dispose(lua_State *L) {
  struct guard *g = (struct guard *)object_check(L, 1, TAG_GUARD);
  lua_settop(L, 1);
  if (g->done) return 0;
  if (g->home == NULL && !g->called && is_of_coroutine(g)) return 0; /* its end has done so */
  if (!is_own(L, g)) return refuse_stranger(L, g);
  if (g->kind == GUARD_FLOW) {
    undo_flow(L, g);
    return 0;
  }
  for (const struct guard *a = g->above; a != NULL; a = a->above)
    if (a->kind != GUARD_FLOW && is_before(L, a, g))
      return error_throw(
          L, ERROR_OPERATION,
          "scopes must be disposed of in reverse order: one opened later is still open");
  guard_restore(L, 1, g);
  return 0;
}

static int l_guard_close(lua_State *L) {
  struct guard *g = (struct guard *)object_check(L, 1, TAG_GUARD);
  lua_settop(L, 1);
  if (g->done) return 0;
  if (!is_own(L, g)) {
    const struct callback *c = runtime(L)->callback;
    bool called = c != NULL && c->co == L; /* in the midst of the block, whose coroutine this is */
    if (g->home != NULL && (L != g->co || called)) return refuse_stranger(L, g);
    unlink_guard(g); /* somebody else has closed that coroutine */
    take(L, 1, GUARD_SAVED);
    return 0;
  }
  if (g->kind == GUARD_FLOW) {
    end_suppression(g, runtime(L)->me);
    return 0;
  }
  for (struct guard *a = g->above, *next; a != NULL; a = next) {
    next = a->above; /* left open by their blocks, which nobody makes good any more */
    if (a->kind != GUARD_FLOW && a->co == g->co) unlink_guard(a);
  }
  guard_restore(L, 1, g);
  return 0;
}

static int l_guard_gc(lua_State *L) {
  struct guard *g = (struct guard *)object_test(L, 1, TAG_GUARD);
  if (g != NULL && !g->done) unlink_guard(g);
  return 0;
}

bool guard_push_left_open(lua_State *L, struct runtime *rt, const lua_State *co) {
  const struct level *own = coroutine_own(rt);
  const struct guard *g =
      own ? *coroutine_guards(own->record) : scope_own(L, rt, (struct fiber *)rt->me)->guards;
  for (; g != NULL; g = g->below)
    if (g->co == co && g->kind != GUARD_FLOW) {
      lua_pushstring(L, g->place);
      return true;
    }
  return false;
}

void guard_refuse_yield(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (coroutine_shares(L, rt) && guard_push_left_open(L, rt, L))
    coroutine_refuse(L, lua_tostring(L, -1));
}

/* ---- Lua face: what opens them ---- */

/* set_local(local, value) */
static int set_local(lua_State *L) {
  context_set_local(L, 1, 2);
  return 0;
}

/* [-1, +0 or +1, m] sets the local at index 1 to the value on top, protected; false: the error is on top */
static bool try_set(lua_State *L) {
  module_push_function(L, set_local);
  lua_insert(L, -2);
  lua_pushvalue(L, 1);
  lua_insert(L, -2);
  return lua_pcall(L, 2, 0, 0) == LUA_OK;
}

static int l_with(lua_State *L) {
  object_check(L, 1, TAG_LOCAL);
  luaL_checkany(L, 2);
  lua_settop(L, 2);
  struct guard *g = guard_new(L, GUARD_VALUE);
  context_push_local(L, 1);
  lua_setiuservalue(L, 3, GUARD_SAVED); /* local value guard */
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 3, GUARD_LOCAL);
  if (!context_watches(L, 1)) {
    context_set_local(L, 1, 2);
    return 1;
  }
  lua_pushvalue(L, 2);
  if (try_set(L)) return 1;
  if (!g->done) unlink_guard(g); /* a handler has raised: as if it had not been set */
  lua_getiuservalue(L, 3, GUARD_SAVED);
  try_set(L);
  lua_settop(L, 4); /* local value guard error */
  return lua_error(L);
}

/* enter(ctx) -> guard */
static int l_enter(lua_State *L) {
  context_check(L, 1);
  lua_settop(L, 1);
  guard_new(L, GUARD_CONTEXT);
  struct task *me = runtime(L)->me;
  me->flags &= (uint16_t)~TASK_SUPPRESSED;
  guard_save_synchronization(L, 2, me);
  lua_pushvalue(L, 1);
  context_swap(L); /* ctx guard old */
  lua_setiuservalue(L, 2, GUARD_SAVED);
  return 1;
}

static int l_context_enter(lua_State *L) {
  object_check(L, 1, TAG_CONTEXT);
  return l_enter(L);
}

/* isolate() -> guard: whatever happens to the context until it is closed is undone */
static int l_isolate(lua_State *L) {
  lua_settop(L, 0);
  guard_new(L, GUARD_CONTEXT);
  struct task *me = runtime(L)->me;
  guard_save_synchronization(L, 1, me);
  context_push_current(L);
  lua_setiuservalue(L, 1, GUARD_SAVED);
  return 1;
}

static int l_suppress(lua_State *L) {
  struct task *me = runtime(L)->me;
  struct guard *g = guard_new(L, GUARD_FLOW);
  if (me->flags & TASK_SUPPRESSED)
    unlink_guard(g); /* a second one is inert */
  else
    me->flags |= TASK_SUPPRESSED;
  return 1;
}

static int l_restore_flow(lua_State *L) {
  struct task *me = runtime(L)->me;
  if (!(me->flags & TASK_SUPPRESSED))
    return error_throw(L, ERROR_OPERATION, "the flow of the execution context is not suppressed");
  me->flags &= (uint16_t)~TASK_SUPPRESSED;
  return 0;
}

/* dies_open() -> this coroutine, if Lua leaves what is to be closed in it open when an error ends it:
** all but the main one, those of tasks, and those made by wrap; else false */
static int l_dies_open(lua_State *L) {
  struct runtime *rt = runtime(L);
  bool closes = fiber_on_top(L, rt) && coroutine_has_body(L, rt);
  if (lua_pushthread(L) || closes) lua_pushboolean(L, false);
  return 1;
}

static int l_is_suppressed(lua_State *L) {
  lua_pushboolean(L, runtime(L)->me->flags & TASK_SUPPRESSED);
  return 1;
}

static const luaL_Reg functions[] = {{"enter", l_enter},
                                     {"isolate", l_isolate},
                                     {"suppress_flow", l_suppress},
                                     {"restore_flow", l_restore_flow},
                                     {"is_flow_suppressed", l_is_suppressed},
                                     {"dies_open", l_dies_open},
                                     {NULL, NULL}};
static const luaL_Reg local_methods[] = {{"with", l_with}, {NULL, NULL}};
static const luaL_Reg context_methods[] = {{"enter", l_context_enter}, {NULL, NULL}};
static const luaL_Reg guard_methods[] = {{"dispose", l_guard_dispose},
                                         {"undo", l_guard_dispose},
                                         {"__close", l_guard_close},
                                         {"__gc", l_guard_gc},
                                         {NULL, NULL}};

void guard_open(lua_State *L) {
  module_functions(L, functions);
  module_class(L, TAG_GUARD, "coflow.Scope", guard_methods, NULL);
  module_methods(L, TAG_LOCAL, local_methods);
  module_methods(L, TAG_CONTEXT, context_methods);
}
