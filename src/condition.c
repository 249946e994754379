/*
** condition.c - Condition: waiting, with a lock open meanwhile, for a change of what it guards.
**
** A condition does without callbacks what its Lua callers could not do exactly: it is waited for by an
** operation, which is in the queue before the lock is opened. When that has ended, however it did, the lock
** is taken again, deaf to cancellation, by a *stand-in* (lock.c): a key that has the number of the one that
** the caller holds, so that this one fits again.
**
** Who waits must hold the lock. wait_async is a task of its own that waits for whoever called it, the owner.
**
** Invariant: a wait that has begun ends with the lock taken, however it ends, unless the lock has been
** disposed.
** Source:    .NET Monitor.
** SPDX-License-Identifier: MIT
*/
#include "sync.h"

#include <math.h>

enum { CONDITION_LOCK = HOLDER_WAITERS + 1 };

/* [-0, +0, e] the lock at i is held by the task at `owner`, or by nobody knows whom */
static void check_held(lua_State *L, int i, int owner) {
  if (!lock_push_owner(L, i))
    error_throw(L, ERROR_OPERATION,
                "a condition is waited for by who holds its lock: lock it first");
  if (lua_isuserdata(L, -1) && !lua_rawequal(L, -1, owner)) {
    task_push_name(L, -1);
    error_throw(L, ERROR_OPERATION,
                "a condition is waited for by who holds its lock: task '%s' does",
                lua_tostring(L, -1));
  }
  lua_pop(L, 1);
}

/* ---- the lock is taken again ---- */

enum { RETAKE_LOCK = 1, RETAKE_OPERATION, RETAKE_KEY };

/* the wait ends as its operation did, or as interrupted */
static int retaken(lua_State *L, bool interrupted) {
  struct fiber *me = (struct fiber *)runtime(L)->me;
  lua_settop(L, RETAKE_KEY);
  lock_returned(L, RETAKE_LOCK, RETAKE_KEY);
  struct task *op = (struct task *)lua_touserdata(L, RETAKE_OPERATION);
  if (interrupted && op->state != TASK_SUCCEEDED) return scope_throw(L, me->member.scope);
  return task_push_outcome(L, RETAKE_OPERATION, op);
}

static int retake_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = (struct runtime *)ctx;
  (void)status;
  if (waiter_resumed(L, rt) == WAITER_STRAY) {
    lua_settop(L, RETAKE_KEY);
    return lua_yieldk(L, 0, ctx, retake_k);
  }
  return retaken(L, waiter_what(rt));
}

/* with the operation and the key at 1 and 2 */
static int retake(lua_State *L, bool interrupted) {
  struct runtime *rt = runtime(L);
  lua_settop(L, 2);
  lua_getiuservalue(L, 2, KEY_LOCK);
  lua_insert(L, 1);
  lua_rotate(L, 2, 1); /* lock key operation */
  struct sync *lock = (struct sync *)lua_touserdata(L, RETAKE_LOCK);
  sync_check_live(L, lock);
  bool taken = lock->class->attempt(L, lock);
  lua_settop(L, 3);
  lua_insert(L, RETAKE_OPERATION);
  if (taken) return retaken(L, interrupted);
  return waiter_wait(L, rt, &lock->holder, &lock->waiters, interrupted, true, retake_k);
}

/* ---- the wait ---- */

static int condition_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  (void)status;
  if (!fiber_on_top(L, rt)) return lua_yieldk(L, 0, ctx, condition_k); /* not by us: wait on */
  bool interrupted = rt->me->flags & TASK_INTERRUPTED;
  rt->me->flags &= (uint16_t)~TASK_INTERRUPTED;
  return retake(L, interrupted);
}

enum {
  CONDITION_SELF = 1,
  CONDITION_TOKEN,
  CONDITION_OWNER,
  CONDITION_MUTEX,
  CONDITION_OPERATION,
  CONDITION_KEY
};

/* with the condition, the token and the owner at 1, 2, 3. twin: of wait_async, a task of its own */
static int wait(lua_State *L, bool twin, lua_CFunction f) {
  struct runtime *rt = runtime(L);
  struct sync *s = sync_check(L, &condition_class);
  bool deaf = token_none(L, CONDITION_TOKEN) && !twin;
  luaL_checkstack(L, 30, NULL); /* another waiter may get the lock while all this is on it */
  lua_settop(L, CONDITION_OWNER);
  lua_getiuservalue(L, CONDITION_SELF, CONDITION_LOCK);
  operation_check_tokens(L, rt, CONDITION_TOKEN);
  check_held(L, CONDITION_MUTEX, CONDITION_OWNER);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) {
    lua_settop(L, CONDITION_OWNER);
    if (deaf) { /* to no token, which is none there either: it is to be withdrawn if it cannot end */
      lua_pushnil(L);
      lua_replace(L, CONDITION_TOKEN);
    }
    return fiber_outside(L, f);
  }
  struct scope *scope = deaf ? rt->root : scope_ambient(L, rt);
  struct queued *op = waiter_operation(L, KIND_QUEUED, 1, HUGE_VAL);
  struct task *t = &op->timed.pending.task;
  lock_push_stand_in(L, CONDITION_MUTEX);
  sync_check_live(L, s); /* once more, since finalizers were here */
  operation_check_tokens(L, rt, CONDITION_TOKEN);
  check_held(L, CONDITION_MUTEX, CONDITION_OWNER);
  t->flags |= TASK_OBSERVED; /* we tell how it ended, if nothing worse happens */
  waiter_start(L, CONDITION_OPERATION, &s->waiters, CONDITION_TOKEN, scope);
  lock_lend(L, CONDITION_MUTEX, CONDITION_KEY);
  lua_remove(L, CONDITION_MUTEX);
  lua_rotate(L, 1, 2); /* operation key … */
  lua_settop(L, 2);
  if (me->member.scope->canceled && !deaf) return retake(L, true); /* by a finalizer */
  if (task_done(t)) return retake(L, false);                       /* the same */
  op->direct = true; /* only now: it would be taken for one that nobody awaits */
  return fiber_await(L, rt, me, t, condition_k, deaf);
}

/* condition_wait(condition, token, owner): in a task of its own */
int condition_wait(lua_State *L) { return wait(L, true, condition_wait); }

/* in the task that stands for the code outside every task */
static int l_wait_outside(lua_State *L) { return wait(L, false, l_wait_outside); }

/* condition:wait(token) */
static int l_wait(lua_State *L) {
  sync_check(L, &condition_class);
  token_opt(L, 2);
  lua_settop(L, 2);
  task_push(L, runtime(L)->me);
  return wait(L, false, l_wait_outside);
}

/* check_condition(condition, token) -> the running task: raises what wait_async raises at once */
int condition_check(lua_State *L) {
  struct sync *s = (struct sync *)object_test(L, 1, TAG_CONDITION);
  if (s == NULL) return blame_type(L, 1, "coflow.Condition", 1);
  if (!lua_isnoneornil(L, 2) && object_test(L, 2, TAG_TOKEN) == NULL)
    return blame_type(L, 2, "coflow.CancellationToken", 2);
  sync_check_live(L, s);
  lua_settop(L, 1);
  task_push(L, runtime(L)->me);
  lua_getiuservalue(L, 1, CONDITION_LOCK);
  check_held(L, 3, 2);
  lua_settop(L, 2);
  return 1;
}

/* ---- Lua face ---- */

/* Condition(lock) */
static int l_new(lua_State *L) {
  object_check(L, 1, TAG_LOCK);
  sync_new(L, &condition_class, sizeof(struct sync), CONDITION_LOCK);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, CONDITION_LOCK);
  return 1;
}

static int l_notify(lua_State *L) {
  struct sync *s = sync_check(L, &condition_class);
  lua_Integer n = sync_opt_number(L);
  lua_pushinteger(L, sync_grant(L, s, n));
  return 1;
}

static int l_notify_all(lua_State *L) {
  struct sync *s = sync_check(L, &condition_class);
  lua_pushboolean(L, 1);
  lua_pushinteger(L, sync_grant_all(L, s));
  return 1;
}

static const luaL_Reg methods[] = {
    {"wait", l_wait}, {"notify", l_notify}, {"notify_all", l_notify_all}, {NULL, NULL}};

const struct sync_class condition_class = {
    .tag = TAG_CONDITION, .name = "Condition", .new = l_new, .methods = methods};
