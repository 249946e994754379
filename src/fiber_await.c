/*
** fiber_await.c - how a task waits: where it may suspend, await, yield.
**
** Whoever suspends asks first who would (fiber_here): the running task, on whose coroutine L is on top,
** or nobody, outside every task, where the same operation drives the loop instead (fiber_outside).
** Everywhere else it is refused, with what is in the way, before anything is registered.
**
** A fiber that waits for a task has that task at index 1 of the C function that suspended it, and lives
** by it (core.h, rule 2). Anybody may have got hold of its coroutine and resume it: a continuation that
** finds itself not on top of the running task yields again.
**
** An await of a task that is queued, not started and the only one ready runs it in place: the same
** order as through the ready list, without two switches. Not while a hot start below waits to go on as
** soon as its callee suspends (rt->hot).
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

/* ---- where ---- */

/* [-0, +1, m] that of a C function which C has called, say pcall; NULL: none is known */
static const char *push_known_name(lua_State *L, lua_State *at, lua_Debug *ar) {
  lua_getinfo(at, "f", ar);
  lua_xmove(at, L, 1);
  blame_push_name(L);
  const char *name = lua_tostring(L, -1);
  return strcmp(name, "[C]") != 0 ? name : NULL;
}

/* [-0, +1, m] the name of the C function on the stack of L that a suspension cannot pass */
static void push_barrier(lua_State *L, lua_State *at) {
  static const char *const passable[] = {"pcall",  "xpcall", "error", "assert",
                                         "dofile", "await",  NULL};
  lua_Debug ar;
  int top = lua_gettop(L);
  luaL_checkstack(L, 20, NULL);
  for (int level = 1; lua_getstack(at, level, &ar); level++, lua_settop(L, top)) {
    lua_getinfo(at, "Sn", &ar);
    if (ar.what[0] != 'C') continue;
    const char *name = ar.name != NULL ? ar.name : push_known_name(L, at, &ar);
    const char *const *p = passable;
    while (name != NULL && *p != NULL && strcmp(*p, name) != 0) p++;
    if (name == NULL || *p != NULL) continue;
    lua_pushfstring(L, "inside a function called by '%s'", name);
    return;
  }
  lua_pushliteral(L, "inside a message handler or another callback of C");
}

bool fiber_can_suspend(lua_State *L, struct runtime *rt) {
  return rt->me != rt->outside && lua_isyieldable(L) && fiber_on_top(L, rt) &&
         (((struct fiber *)rt->me)->co == L || rt->level->open);
}

struct fiber *fiber_not_here(lua_State *L, struct runtime *rt) {
  struct fiber *me = (struct fiber *)rt->me;
  const struct level *l = rt->level;
  if (fiber_can_suspend(L, rt)) return me;
  if (rt->me == rt->outside) {
    if (rt->depth == 0 && !rt->pumping) return NULL;
    error_throw(L, ERROR_OPERATION,
                "cannot suspend inside a callback of the library: start a task in it (flow.spawn)");
  }
  if (rt->entering == me)
    error_throw(L, ERROR_OPERATION,
                "cannot suspend a task inside a value_changed handler: start a task in it "
                "(flow.spawn)");
  if (rt->resetting == L || me->co == NULL)
    error_throw(
        L, ERROR_OPERATION,
        "cannot suspend a task in a __close handler that runs because the task was given up, or "
        "the Lua state closes: nobody would resume it");
  lua_State *at = L; /* what is in the way lies between here and the task's own coroutine */
  for (; at != me->co && l != NULL && l->co == at && l->task == rt->me; at = l->from, l = l->up) {
    if (l->closing)
      error_throw(
          L, ERROR_OPERATION,
          "cannot suspend a task in a __close handler that coroutine.close, or the end of the "
          "task, runs: close the variables in the coroutine");
    if (!lua_isyieldable(at)) break;
  }
  if (at != me->co && !(l != NULL && l->co == at && l->task == rt->me))
    error_throw(
        L, ERROR_OPERATION,
        "cannot suspend a task inside a coroutine made by coroutine.create or coroutine.wrap: "
        "make it with coflow.coroutine, or await outside it");
  push_barrier(L, at);
  error_throw(L, ERROR_OPERATION,
              "cannot suspend a task %s, where Lua cannot yield: await before the call, or start a "
              "task there (flow.spawn)",
              lua_tostring(L, -1));
  return NULL;
}

int fiber_outside(lua_State *L, lua_CFunction f) {
  module_push_function(L, f);
  lua_insert(L, 1);
  return loop_run_operation(L);
}

/* ---- await ---- */

/* [-0, +0, -] what t awaits, or NULL; not by an address that somebody who has closed its coroutine may
** have made stale */
static struct task *awaited_by(lua_State *L, struct task *t) {
  struct fiber *f = (struct fiber *)t;
  if (!task_is(t, KIND_FIBER) || task_done(t) || t->slot == 0 || t->flags & TASK_ABANDONED ||
      fiber_naps(f))
    return NULL;
  bool known = fiber_push_awaited(L, f);
  lua_pop(L, 1);
  return known ? f->u.wait.on : NULL;
}

/* [-0, +0, e] raises if the running task would await itself, directly or round a circle */
static void refuse_circle(lua_State *L, struct task *me, struct task *on) {
  struct task *t = on;
  if (me != on) {
    if (me->waiters == NULL) return;
    while (t != NULL && t != me) t = awaited_by(L, t);
    if (t == NULL) return;
  }
  task_push(L, me);
  task_push_name(L, -1); /* me text */
  t = on;
  for (int n = 0;; n++) {
    task_push(L, t);
    task_push_name(L, -1);
    lua_pushfstring(L, n == 0 ? "'%s' awaits '%s'" : "%s, which awaits '%s'", lua_tostring(L, -3),
                    lua_tostring(L, -1));
    lua_replace(L, -4);
    lua_pop(L, 2);
    if (t == me || n == 8) break;
    t = ((struct fiber *)t)->u.wait.on;
  }
  error_throw(L, ERROR_OPERATION, "a task cannot await itself: %s", lua_tostring(L, -1));
}

static bool can_run_in_place(struct runtime *rt, const struct task *me, const struct task *on) {
  return rt->ready == on && on->next == NULL && task_is(on, KIND_FIBER) &&
         !(on->flags & (TASK_STARTED | TASK_ABANDONED)) && rt->hot == 0 &&
         rt->depth < FIBER_MAX_DEPTH && rt->slice > 0 &&
         !((me->traits | on->traits) & TRAIT_SCHEDULED);
}

/* true: the await is over without a suspension, call k */
static bool await_in_place(lua_State *L, struct runtime *rt, struct fiber *me, struct task *on) {
  struct wait *w = &me->u.wait;
  rt->slice--;
  loop_unready(rt, on);
  if (on->keeps) direct_forget(L, 1);
  w->pos = WAIT_INLINE; /* so that the circle is seen and the waiter is named */
  w->role = WAIT_FIBER;
  w->next = w->prev = w; /* it has not started: nobody else waits for it before us … */
  if (on->waiters) {     /* … or they do */
    w->next = on->waiters->next;
    w->prev = on->waiters;
    on->waiters->next->prev = w;
    on->waiters->next = w;
  }
  on->waiters = w;
  w->on = on;
  me->task.state = TASK_WAITING;
  fiber_run_at(L, rt, (struct fiber *)on, 1);
  if (w->on == NULL) return rt->ready == NULL && !rt->stopping;
  wait_remove(L, 1, w); /* it has suspended, and so do we: from here we are held by it */
  wait_end_inline(w);
  return false;
}

int fiber_await(lua_State *L, struct runtime *rt, struct fiber *f, struct task *on, lua_KFunction k,
                bool deaf) {
  struct task *me = &f->task;
  if (fiber_is_lost(on)) {
    fiber_settle_lost(L, 1);
    return k(L, LUA_OK, (lua_KContext)on);
  }
  if (f->member.scope->canceled && !deaf) return scope_throw(L, f->member.scope);
  refuse_circle(L, me, on);
  if (!deaf && can_run_in_place(rt, me, on)) {
    if (await_in_place(L, rt, f, on)) return k(L, LUA_OK, (lua_KContext)on);
    if (me->flags & TASK_LINKED) /* interrupted by the other one */
      return fiber_suspend(L, rt, f, (lua_KContext)on, k);
    if (task_done(on)) { /* others became ready meanwhile, and come first */
      loop_queue(rt, f);
      return fiber_suspend(L, rt, f, (lua_KContext)on, k);
    }
  }
  bool held = fiber_push_me(L, rt, f), waits = true;
  if (on->waiters == NULL)
    wait_first(L, 1, on, &f->u.wait, WAIT_FIBER);
  else {
    waits = wait_add(L, 1, &f->u.wait, lua_gettop(L), WAIT_FIBER);
    lua_pop(L, 1);
    if (waits && f->member.scope->canceled && !deaf) { /* by a finalizer */
      wait_remove(L, 1, &f->u.wait);
      return scope_throw(L, f->member.scope);
    }
  }
  if (!waits) return k(L, LUA_OK, (lua_KContext)on);
  me->state = TASK_WAITING;
  if (deaf) me->flags |= TASK_DEAF;
  fiber_park(L, f, f->member.scope->armed, held);
  return fiber_suspend(L, rt, f, (lua_KContext)on, k);
}

/* ---- Lua face ---- */

/* first(task, timeout, token): true once the task is complete … (timer.c) */
static int l_first(lua_State *L) {
  timer_push_wait(L);
  return 1;
}

/* continuation(task, fn, token, named, scheduler): fn(task, token) as a task, named after the function
** `named`, once `task` is complete, or the token is canceled */
static int l_continuation(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *on = task_check(L, 1);
  task_refuse_state(L, 1, on);
  struct token *k = token_opt(L, 3);
  argument_callable(L, 2);
  lua_settop(L, 5);
  on->flags |= TASK_OBSERVED;
  lua_pushvalue(L, 2);
  lua_pushvalue(L, 1);
  lua_pushvalue(L, 3);
  if (k == NULL)
    lua_pushvalue(L, 1);
  else { /* whichever comes first */
    module_push_function(L, l_first);
    lua_pushvalue(L, 1);
    lua_pushnil(L);
    lua_pushvalue(L, 3);
    lua_call(L, 3, 1);
  } /* … fn task token on */
  lua_pushvalue(L, -1);
  lua_insert(L, 6);
  struct fiber *f = fiber_new(L, rt, 3, scope_flowing(L, rt)); /* … scheduler on new */
  if (lua_isfunction(L, 4)) {
    lua_pushvalue(L, 4);
    fiber_name(L, f);
  }
  fiber_make_cold(L, 7, f); /* should anything raise */
  if (!lua_isnil(L, 5)) schedule_give(L, 7, 5);
  if (fiber_is_lost(&f->task)) { /* a finalizer has closed its coroutine */
    fiber_settle_lost(L, 7);
    return 1;
  }
  if (wait_add(L, 6, &f->u.wait, 7, WAIT_FIBER)) {
    f->task.state = TASK_WAITING;
    if (f->member.scope->armed) task_hold(L, 7, &f->task);
  } else {
    task_hold(L, 7, &f->task);
    loop_queue(rt, f);
  }
  return 1;
}

static int l_try_await(lua_State *L);

static int await_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *on = (struct task *)ctx;
  if (!fiber_awaited(L, on, status)) return lua_yieldk(L, 0, ctx, await_k);
  return task_push_outcome(L, 1, on);
}

/* __await has returned what to wait for instead; ctx is the operation to go on with */
static int converted_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (object_test(L, -1, TAG_TASK) == NULL)
    return error_throw(L, ERROR_ARGUMENT,
                       "the __await metamethod must return a Task, not a %s value",
                       luaL_typename(L, -1));
  lua_replace(L, 1);
  lua_settop(L, 2); /* the token */
  return ctx ? l_try_await(L) : fiber_await_value(L);
}

/* [-0, +0, e] the operation on an awaitable at index 1 that is no task; __await may suspend */
static int await_other(lua_State *L, bool try) {
  if (object_test(L, 1, TAG_CONFIGURED))
    return schedule_await(L, try ? l_try_await : fiber_await_value);
  if (luaL_getmetafield(L, 1, "__await") != LUA_TNIL) {
    luaL_argcheck(L, lua_isfunction(L, -1), 1, "its __await metamethod is not a function");
    lua_pushvalue(L, 1);
    lua_callk(L, 1, 1, try, converted_k);
    return converted_k(L, LUA_OK, try);
  }
  if (lua_istable(L, 1) && !lua_getmetatable(L, 1))
    return luaL_argerror(
        L, 1, "a plain table is not awaitable: for a table of tasks await when_all(tasks)");
  if (lua_isnone(L, 1)) /* a method as well as a function */
    return luaL_argerror(
        L, 1, "Task or awaitable expected, got no value: task:await(), or flow.await(task)");
  return luaL_typeerror(L, 1, "Task or awaitable");
}

/* [-0, +0, v] a source in place of its token would cancel nothing, without a word */
static void refuse_source(lua_State *L) {
  if (object_test(L, 2, TAG_SOURCE) != NULL) luaL_typeerror(L, 2, "coflow.CancellationToken");
}

int fiber_await_value(lua_State *L) {
  struct task *t = (struct task *)object_test(L, 1, TAG_TASK);
  if (t == NULL) return await_other(L, false);
  if (task_done(t)) return task_push_outcome(L, 1, t);
  task_refuse_state(L, 1, t);
  struct runtime *rt = runtime(L);
  struct fiber *me = fiber_here(L, rt);
  if (lua_gettop(L) != 1) {
    if (object_test(L, 2, TAG_TOKEN) != NULL) return timer_await_with(L);
    refuse_source(L);
    lua_settop(L, 1); /* whatever else a call has returned */
  }
  if (me == NULL) return fiber_outside(L, fiber_await_value);
  return fiber_await(L, rt, me, t, await_k, false);
}

/* task:wait(timeout, token), at the top level only */
static int l_wait(lua_State *L) {
  lua_settop(L, 3);
  timer_push_wait(L);
  lua_insert(L, 1);
  lua_settop(L, 1);
  if (runtime(L)->me != runtime(L)->outside)
    return error_throw(L, ERROR_OPERATION,
                       "wait inside a task would block the event loop: use task:await() or "
                       "task:wait_async(timeout)");
  return fiber_await_value(L);
}

static int try_await_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *t = (struct task *)ctx;
  if (!fiber_awaited(L, t, status)) return lua_yieldk(L, 0, ctx, try_await_k);
  lua_settop(L, 1);
  lua_pushboolean(L, t->state == TASK_SUCCEEDED);
  if (t->state == TASK_SUCCEEDED) return 1 + task_push_outcome(L, 1, t);
  trace_remember(L, 1);
  task_push_error(L, 1);
  return 2;
}

/* [1] what is waited for: the task, or that and the token, [2] the task */
static int try_await_with_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *on = (struct task *)ctx, *t = (struct task *)lua_touserdata(L, 2);
  if (!fiber_awaited(L, on, status)) return lua_yieldk(L, 0, ctx, try_await_with_k);
  if (!task_done(t)) return task_push_outcome(L, 1, on); /* raises the cancellation */
  on->flags |= TASK_OBSERVED;
  lua_remove(L, 1);
  return try_await_k(L, LUA_OK, (lua_KContext)t);
}

/* try_await(task, token) in the running task me */
static int try_await_with(lua_State *L, struct fiber *me) {
  lua_settop(L, 2);
  bool deaf = token_none(L, 2);
  lua_pushvalue(L, 1);
  lua_insert(L, 1); /* task task token */
  if (!deaf) {
    module_push_function(L, timer_wait_async);
    lua_pushvalue(L, 1);
    lua_pushnil(L);
    lua_pushvalue(L, 3);
    lua_call(L, 3, 1);
    lua_replace(L, 1);
  }
  lua_settop(L, 2);
  struct task *on = (struct task *)lua_touserdata(L, 1);
  if (task_done(on)) return try_await_with_k(L, LUA_OK, (lua_KContext)on);
  return fiber_await(L, runtime(L), me, on, try_await_with_k, deaf);
}

static int l_try_await(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *t = (struct task *)object_test(L, 1, TAG_TASK);
  if (t == NULL) return await_other(L, true);
  if (task_done(t)) return try_await_k(L, LUA_OK, (lua_KContext)t);
  task_refuse_state(L, 1, t);
  struct fiber *me = fiber_here(L, rt);
  if (lua_gettop(L) != 1) {
    if (object_test(L, 2, TAG_TOKEN) == NULL) {
      refuse_source(L);
      lua_settop(L, 1);
    } else if (me != NULL)
      return try_await_with(L, me);
  }
  if (me == NULL) return fiber_outside(L, l_try_await);
  return fiber_await(L, rt, me, t, try_await_k, false);
}

/* anybody can resume the coroutine before its turn; ctx: the runtime */
static int yield_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  return fiber_on_top(L, (struct runtime *)ctx) ? 0 : lua_yieldk(L, 0, ctx, yield_k);
}

static int l_yield(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) return fiber_outside(L, l_yield);
  if (me->member.scope->canceled) return scope_throw(L, me->member.scope);
  loop_queue(rt, me);
  return fiber_suspend(L, rt, me, (lua_KContext)rt, yield_k); /* returns nothing */
}

static int pcall_k(lua_State *L, int status, lua_KContext ctx) {
  (void)ctx;
  if (status != LUA_OK && status != LUA_YIELD) {
    const struct scope *s = ((struct fiber *)runtime(L)->me)->member.scope;
    if (s->canceled && error_is(L, -1, ERROR_CANCELED)) return lua_error(L);
    lua_pushboolean(L, 0);
    lua_insert(L, -2);
    return 2;
  }
  return lua_gettop(L);
}

static int l_pcall(lua_State *L) {
  luaL_checkany(L, 1);
  lua_pushboolean(L, 1);
  lua_insert(L, 1); /* true fn arguments: what a success returns */
  return pcall_k(L, lua_pcallk(L, lua_gettop(L) - 2, LUA_MULTRET, 0, 0, pcall_k), 0);
}

static int l_is_awaitable_here(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_pushboolean(L, fiber_can_suspend(L, rt));
  return 1;
}

/* check_here(): raises what an await here would, but for a cancellation. For what is to be refused
** before anything is changed. */
static int l_check_here(lua_State *L) {
  fiber_here(L, runtime(L));
  return 0;
}

static const luaL_Reg functions[] = {{"continuation", l_continuation},
                                     {"await", fiber_await_value},
                                     {"try_await", l_try_await},
                                     {"wait", l_wait},
                                     {"yield", l_yield},
                                     {"pcall", l_pcall},
                                     {"is_awaitable_here", l_is_awaitable_here},
                                     {"check_here", l_check_here},
                                     {NULL, NULL}};

void fiber_await_open(lua_State *L) { module_functions(L, functions); }
