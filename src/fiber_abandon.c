/*
** fiber_abandon.c - tasks that end though nothing wakes them: collected while they wait, or their
** coroutine closed.
**
** The *watch* at the bottom of the coroutine of every fiber has a finalizer: when task and coroutine,
** which live by what the task awaits, die together, the fiber is abandoned, is reported, and its
** `<close>` variables run on a later turn. Any other finalizer that may run first only makes objects
** inert, so closing them afterwards is harmless. The watch is to be closed as well: so we know when
** somebody else, who has got hold of the coroutine, closes it. The task then fails. When C can find it
** on that stack only it is *lost*: it has no slot and no coroutine any more, and fails as soon as
** somebody looks at it who has it.
**
** SPDX-License-Identifier: MIT
*/
#include "waiter.h"

#include <string.h>

static void push_closed(lua_State *L, int i) {
  task_push_name(L, i);
  error_push(L, ERROR_OPERATION, "somebody has closed the coroutine of task '%s'",
             lua_tostring(L, -1));
  lua_remove(L, -2);
}

/* [-0, +1, m] */
static void push_abandoned(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  i = lua_absindex(L, i);
  task_push_name(L, i);
  if (fiber_push_place(L, f))
    lua_pushfstring(L, " at %s", lua_tostring(L, -1));
  else
    lua_pushliteral(L, "");
  lua_remove(L, -2);
  if (!(f->task.traits & TRAIT_HANDED))
    error_push(
        L, ERROR_ABANDONED,
        "task '%s' was collected while it waited%s: nothing alive could ever complete what it "
        "awaits",
        lua_tostring(L, -2), lua_tostring(L, -1));
  else if (f->task.flags & TASK_STARTED)
    error_push(L, ERROR_ABANDONED,
               "task '%s' was collected while it waited%s, ready to go on: its scheduler or "
               "synchronization context has dropped it",
               lua_tostring(L, -2), lua_tostring(L, -1));
  else
    error_push(L, ERROR_ABANDONED,
               "task '%s' was collected before it started: its scheduler has dropped it",
               lua_tostring(L, -2));
  lua_replace(L, -3);
  lua_pop(L, 1);
}

void fiber_abandon(lua_State *L, int i, struct fiber *f) {
  struct runtime *rt = runtime(L);
  struct task *t = &f->task;
  fiber_hold(L, i, f);
  if (t->state == TASK_WAITING &&
      fiber_naps(f)) { /* else it is ready, or awaits: see fiber_end_abandoned */
    waiter_leave(L, f, true);
    deadline_drop(rt, &f->u.nap.deadline);
  }
  if (t->traits & TRAIT_HANDED) t->flags &= (uint16_t)~TASK_LINKED; /* it is on no list */
  t->flags |= TASK_ABANDONED;
  lua_pushvalue(L, i);
  lua_rawseti(L, UP_ANCHORS, t->slot);
  loop_ready(rt, t);
}

static bool is_closed(lua_State *co) { return lua_status(co) == LUA_OK && lua_gettop(co) == 0; }

void fiber_end_abandoned(lua_State *L, struct runtime *rt, struct fiber *f) {
  task_push(L, &f->task);
  int i = lua_gettop(L);
  if (f->co == NULL) { /* it has ended with the state */
    fiber_settle_lost(L, i);
    fiber_drop_coroutine(L, rt, f);
    lua_settop(L, i - 1);
    return;
  }
  if (is_closed(f->co))
    push_closed(L, i);
  else {
    bool waits = f->u.wait.on != NULL, known = waits && fiber_push_awaited(L, f);
    if (known) wait_remove(L, -1, &f->u.wait);
    lua_settop(L, i);
    if (waits && !known) /* the coroutine of ours, in it, where it waits: see pending_withdraw */
      push_closed(L, i);
    else {
      f->task.flags |= TASK_OBSERVED;
      push_abandoned(L, i);
    }
  }
  fiber_fail(L, rt, f);
  lua_settop(L, i - 1);
}

/* Lua calls finalizers for everything when a state closes. It then runs on the main thread: below no
** function, below os.exit, or, when a task has called that, while the main thread resumes the task. */
static bool state_closes(lua_State *L, struct runtime *rt) {
  lua_Debug ar;
  lua_State *co = ((struct fiber *)rt->me)->co;
  if (L != rt->main) return false;
  if (co != NULL && lua_status(co) == LUA_OK && lua_getstack(co, 0, &ar)) return true; /* it runs */
  if (!lua_getstack(L, 1, &ar)) return true;
  lua_getinfo(L, "Sn", &ar);
  return ar.what[0] == 'C' && ar.name && strcmp(ar.name, "exit") == 0;
}

static bool is_watch(lua_State *L) {
  lua_settop(L, 1);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_WATCH));
  bool is = lua_getmetatable(L, 1) && lua_rawequal(L, 2, 3);
  lua_settop(L, 1);
  return is;
}

void fiber_settle_lost(lua_State *L, int i) {
  i = lua_absindex(L, i);
  push_closed(L, i);
  if (!task_done((struct task *)lua_touserdata(L, i)))
    task_settle_faulted(L, runtime(L), i, 0);
  else
    lua_pop(L, 1);
}

/* The coroutine L is being closed, by somebody else unless it is rt->resetting. Creates nothing while
** it looks for the task, which it may be that nobody holds any more. Should somebody do, it fails when
** it is awaited (fiber_await). */
static int l_watch_close(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (rt->closed || rt->resetting == L || !is_watch(L)) return 0;
  struct fiber *f = scope_find(rt, L);
  rt->meddled = true;
  if (f == NULL || f->task.slot == 0 || task_done(&f->task)) return 0;
  if (f->task.state == TASK_WAITING) {
    f->task.state = TASK_QUEUED;
    /* What it awaited was on the stack that is being unwound: it may have been collected since. Its
    ** node stays in that list, and holds f: see fiber_wake. */
    if (fiber_naps(f)) pending_withdraw(L, rt, f, true);
  }
  bool known = lua_rawgeti(L, UP_ANCHORS, f->task.slot) == LUA_TUSERDATA;
  if (!known && f->task.traits & TRAIT_HANDED) {
    lua_settop(L, 1);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDED);
    known = lua_rawgeti(L, 2, f->task.slot) == LUA_TUSERDATA;
    lua_remove(L, 2);
  }
  if (!known &&
      f->task.traits & TRAIT_PLAN) { /* the keys of the plans are still there when finalizers run */
    lua_settop(L, 1);
    known = schedule_find(L, f);
  }
  struct wait *w = task_waiters(&f->task);
  if (!known && w != NULL && w->role == WAIT_FIBER) { /* who waits for it has it */
    lua_settop(L, 1);
    known = fiber_push_awaited(L, container_of(w, struct fiber, u.wait));
  }
  if (known) {
    fiber_abandon(L, 2, f);
    return 0;
  }
  if (f->task.flags & TASK_LINKED && !(f->task.traits & TRAIT_HANDED)) loop_remove(rt, &f->task);
  struct group *g = f->task.traits & TRAIT_CHILD ? group_leave(f) : NULL;
  scope_end_task(L, rt, f);
  fiber_drop_coroutine(L, rt, f); /* nothing refers to it from here on */
  if (g != NULL) group_child_lost(L, rt, g);
  return 0;
}

/* [-0, +0, -] at the end of the state: the `<close>` variables of the one at i run, which may ask for
** it. Finalizers of users that come after may run the loop yet, and look at it: nothing wakes it any
** more, and it is lost. */
static void dispose(lua_State *L, int i, struct fiber *f) {
  struct runtime *rt = runtime(L);
  struct task *me = rt->me;
  bool ready = f->task.flags & TASK_LINKED && !(f->task.traits & TRAIT_HANDED);
  lua_pushvalue(L, i);
  lua_rawseti(L, UP_ANCHORS, f->task.slot);
  if (f->task.state == TASK_WAITING) {
    pending_withdraw(L, rt, f, false);
    f->task.state = TASK_QUEUED;
  }
  if (f->task.label == 0) fiber_label(L, i);
  rt->me = &f->task;
  lua_State *co = f->co;
  f->co = NULL;
  rt->depth++;
  coroutine_close_inner(L, rt, co);
  const lua_State *resetting = rt->resetting;
  rt->resetting = co;
  coroutine_reset(co, L);
  rt->resetting = resetting;
  rt->depth--;
  scope_end_task(L, rt, f);
  rt->me = me == &f->task ? rt->outside : me; /* it has called os.exit */
  f->task.flags |= TASK_OBSERVED;             /* nobody is told of what ends with the state */
  if (ready)
    f->task.flags |= TASK_ABANDONED; /* should the loop ever come to it */
  else
    fiber_drop_coroutine(L, rt, f);
}

static int l_watch_gc(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (!is_watch(L)) return 0;
  if (lua_getiuservalue(L, 1, FIBER_WATCHED) != LUA_TTHREAD) return 0;
  lua_State *co = lua_tothread(L, 2);
  bool closes = state_closes(L, rt);
  fiber_push(L, co); /* watch coroutine task */
  struct fiber *f = (struct fiber *)object_test(L, 3, TAG_TASK);
  if (f == NULL || f->co != co || task_done(&f->task)) return 0; /* an idle one */
  bool handed = f->task.traits & TRAIT_HANDED; /* a scheduler, or a context, has dropped it */
  if (f->task.flags & TASK_LINKED && !handed &&
      !closes) { /* woken in the meantime: watch it again */
    lua_getmetatable(L, 1);
    lua_setmetatable(L, 1);
    return 0;
  }
  if (!(f->task.flags & TASK_STARTED) &&
      !handed) { /* cold, or a continuation that will never start: no loss */
    if (f->u.wait.on && fiber_push_awaited(L, f)) wait_remove(L, -1, &f->u.wait);
    scope_end_task(L, rt, f);
    if (!closes) fiber_drop_coroutine(L, rt, f);
    return 0;
  }
  if (closes) {
    dispose(L, 3, f);
    return 0;
  }
  if (f->task.state == TASK_WAITING && fiber_naps(f)) waiter_leave(L, f, true);
  fiber_abandon(L, 3, f);
  if (!(f->task.flags & TASK_OBSERVED)) {
    testing_lost(L, rt, 3);
    push_abandoned(L, 3);
    error_report(L, -1, 3);
  }
  return 0;
}

static const luaL_Reg watch_methods[] = {
    {"__gc", l_watch_gc}, {"__close", l_watch_close}, {NULL, NULL}};

void fiber_abandon_open(lua_State *L) {
  module_class(L, TAG_WATCH, "coflow.Watch", watch_methods, NULL);
}
