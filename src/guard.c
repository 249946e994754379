/*
** guard.c - scopes of the context: with(), enter(), call(), and the suppression of its flow.
**
** A *guard* remembers what to put back. The open guards of a task, or of a coroutine with a context of
** its own (coroutine.c), form a stack. `dispose` insists on that order; `__close`, which Lua calls
** while errors unwind, also closes the guards above that nobody closed. In another task both are
** refused and change nothing, unless that task is closing the coroutine in which the guard was opened:
** what it kept then goes without a word.
**
** The suppression of flow is not ordered with the others; a second one is inert.
**
** Source: .NET AsyncFlowControl and ExecutionContext.Run; with() is a token of Python's contextvars as
** a scope. SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

enum guard_kind { GUARD_VALUE, GUARD_CONTEXT, GUARD_FLOW };
struct guard {
  uint32_t tag;
  uint8_t kind;
  bool done;
  uint16_t suppressed;         /* TASK_SUPPRESSED of the owner before */
  void *owner;                 /* the task, or the coroutine's record, that it belongs to */
  struct guard **home;         /* the owner's stack of guards; NULL once its end has come */
  lua_State *co;               /* where it was opened: order is kept per coroutine */
  struct guard *below, *above; /* in that stack */
  char place[];                /* where it was opened, if a yield could leave it; else not there */
};
enum { GUARD_SAVED = 1, GUARD_OWNER, GUARD_LOCAL };
/* of GUARD_CONTEXT: the synchronization context before, which is the task's and no part of a context */
enum { GUARD_SYNCHRONIZATION = GUARD_LOCAL };

/* the scope belongs to the code that runs now, not to another task or coroutine */
static bool is_own(lua_State *L, const struct guard *g) {
  struct runtime *rt = runtime(L);
  const struct level *own = coroutine_own(rt);
  return g->owner == (own != NULL ? (void *)own->record : (void *)rt->me);
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
  if (kind == GUARD_FLOW) return g; /* not ordered with the others */
  g->below = *home;
  if (g->below) g->below->above = g;
  *home = g;
  return g;
}

static void unlink_guard(struct guard *g) {
  g->done = true; /* who has the guard at hand makes it forget what it kept */
  if (g->home == NULL || g->kind == GUARD_FLOW) return;
  if (g->above)
    g->above->below = g->below;
  else
    *g->home = g->below;
  if (g->below) g->below->above = g->above;
  g->above = g->below = NULL;
}

void guard_drop_all(struct guard **home) {
  for (struct guard *g = *home, *below; g != NULL; g = below) {
    below = g->below;
    g->done = true;
    g->home = NULL;
    g->above = g->below = NULL;
  }
  *home = NULL;
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

/* [-0, +0, me] puts back what the guard at i, whose owner is running, remembers */
static void guard_restore(lua_State *L, int i, struct guard *g) {
  struct task *me = runtime(L)->me;
  unlink_guard(g);
  take(L, i, GUARD_SAVED);
  if (g->kind == GUARD_VALUE) {
    lua_getiuservalue(L, i, GUARD_LOCAL);
    context_set_local(L, lua_gettop(L), lua_gettop(L) - 1);
    lua_pop(L, 1);
  } else {
    me->flags = (uint16_t)((me->flags & ~TASK_SUPPRESSED) | g->suppressed);
    context_swap(L);
    if (me->traits & TRAIT_PLAN) {
      take(L, i, GUARD_SYNCHRONIZATION);
      schedule_set_context(L, me);
    }
  }
  lua_pop(L, 1);
}

static int refuse_stranger(lua_State *L, const struct guard *g) {
  return error_throw(
      L, ERROR_OPERATION,
      g->kind == GUARD_FLOW
          ? "the flow was suppressed by another task: undo it in the task that suppressed it"
          : "this scope belongs to another task: dispose of it in the task that opened it");
}

static void undo_flow(lua_State *L, struct guard *g) {
  struct task *me = runtime(L)->me;
  if (g->done) return;
  if (!is_own(L, g)) refuse_stranger(L, g);
  if (!(me->flags & TASK_SUPPRESSED))
    error_throw(L, ERROR_OPERATION, "the flow of the execution context is not suppressed here");
  g->done = true;
  me->flags &= (uint16_t)~TASK_SUPPRESSED;
}

static int l_guard_dispose(lua_State *L) {
  struct guard *g = (struct guard *)object_check(L, 1, TAG_GUARD);
  lua_settop(L, 1);
  if (g->kind == GUARD_FLOW) {
    undo_flow(L, g);
    return 0;
  }
  if (g->done) return 0;
  if (!is_own(L, g)) return refuse_stranger(L, g);
  for (const struct guard *a = g->above; a != NULL; a = a->above)
    if (a->co == g->co)
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
    if (L != g->co) return refuse_stranger(L, g);
    unlink_guard(g); /* somebody else has closed that coroutine */
    take(L, 1, GUARD_SAVED);
    return 0;
  }
  if (g->kind == GUARD_FLOW) {
    if (runtime(L)->me->flags & TASK_SUPPRESSED) undo_flow(L, g);
    g->done = true;
    return 0;
  }
  for (struct guard *a = g->above, *next; a != NULL; a = next) {
    next = a->above; /* left open by their blocks: their values go with this scope */
    if (a->co == g->co) unlink_guard(a);
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
    if (g->co == co) {
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
    g->done = true; /* a second one is inert */
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
