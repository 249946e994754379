/*
** timer.c - deadlines, ordered by due time and driven by the loop; delay, sleep and wait_async.
**
** A binary heap of (due, order) with a back index in each deadline: setting and dropping one is
** O(log n), and nothing is compared through pointers. Deadlines due at the same instant fire in the
** order they were set. All that are due move to the ready list before any of them runs, so a task
** resumed by one may freely set or drop others. The time they fire by is loop_now: real or virtual.
**
** Invariant: timers[d->index].deadline == d, or d->index == -1 when d is not set.
** An owner with a deadline set is held by the anchors: it lives until the deadline fires or is dropped.
**
** Source:    .NET Task.Delay and Task.WaitAsync; the tie-break is libuv's.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <math.h>

/* ---- the heap ---- */

static bool before(const struct timer_entry *a, const struct timer_entry *b) {
  return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void put(struct runtime *rt, size_t at, struct timer_entry e) {
  rt->timers[at] = e;
  e.deadline->index = (int32_t)at;
}

static void sift_up(struct runtime *rt, size_t at, struct timer_entry e) {
  while (at > 0 && before(&e, &rt->timers[(at - 1) / 2])) {
    put(rt, at, rt->timers[(at - 1) / 2]);
    at = (at - 1) / 2;
  }
  put(rt, at, e);
}

static void sift_down(struct runtime *rt, size_t at, struct timer_entry e) {
  for (;;) {
    size_t child = at * 2 + 1;
    if (child >= rt->timer_count) break;
    if (child + 1 < rt->timer_count && before(&rt->timers[child + 1], &rt->timers[child])) child++;
    if (!before(&rt->timers[child], &e)) break;
    put(rt, at, rt->timers[child]);
    at = child;
  }
  put(rt, at, e);
}

void timer_reserve(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (rt->timer_count < rt->timer_size) return;
  void *ud;
  lua_Alloc alloc = lua_getallocf(L, &ud);
  size_t size = rt->timer_size ? rt->timer_size * 2 : 16;
  struct timer_entry *timers = (struct timer_entry *)alloc(
      ud, rt->timers, rt->timer_size * sizeof *timers, size * sizeof *timers);
  if (timers == NULL) luaL_error(L, "not enough memory");
  rt->timers = timers;
  rt->timer_size = size;
}

void timer_add(struct runtime *rt, struct deadline *d, struct task *owner, double seconds) {
  d->owner = owner;
  sift_up(rt, rt->timer_count++,
          (struct timer_entry){loop_now(rt) + seconds, rt->timer_order++, d});
}

void timer_drop(struct runtime *rt, struct deadline *d) {
  if (d->index < 0) return;
  size_t at = (size_t)d->index;
  d->index = -1;
  struct timer_entry last = rt->timers[--rt->timer_count];
  if (at == rt->timer_count) return;
  if (at > 0 && before(&last, &rt->timers[(at - 1) / 2]))
    sift_up(rt, at, last);
  else
    sift_down(rt, at, last);
}

void timer_fire_due(struct runtime *rt) {
  if (rt->timer_count == 0) return;
  double now = loop_now(rt);
  while (rt->timer_count > 0 && rt->timers[0].due <= now) {
    struct deadline *d = rt->timers[0].deadline;
    struct task *t = d->owner;
    timer_drop(rt, d);
    t->flags |= TASK_EXPIRED;
    if (task_is(t, KIND_FIBER)) {
      link_drop(&((struct fiber *)t)->link);
      t->state = TASK_QUEUED;
    }
    loop_ready(rt, t);
  }
}

/* ---- interruption ---- */

void pending_interrupt(lua_State *L, struct pending *p, int k) {
  struct runtime *rt = runtime(L);
  struct task *t = &p->task;
  if (!task_is(t, KIND_FIBER)) {
    lua_getiuservalue(L, k, TOKEN_HELD);
    lua_rawgeti(L, -1, (lua_Integer)t->held);
    t->flags |= TASK_INTERRUPTED;
    loop_land(L, rt, -1, t);
    lua_pop(L, 2);
    return;
  }
  struct fiber *f = (struct fiber *)t;
  bool started = t->flags & TASK_STARTED;
  task_push(L, t);
  if (f->u.wait.on) {
    fiber_push_awaited(L, f);
    wait_remove(L, -1, &f->u.wait);
    lua_pop(L, 1);
  } else if (started)
    timer_drop(runtime(L), &f->u.deadline);
  t->flags |= TASK_INTERRUPTED;
  fiber_wake(L, rt, -1, f); /* a continuation starts, and finds its token canceled */
  lua_pop(L, 1);
}

/* ---- delay ---- */

struct delay {
  struct pending pending;
  struct deadline deadline;
};

void delay_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct delay *d = (struct delay *)lua_touserdata(L, i);
  struct task *t = &d->pending.task;
  timer_drop(runtime(L), &d->deadline);
  if (t->flags & TASK_EXPIRED) {
    token_drop(L, i);
    task_forget(L, t);
    task_settle(L, rt, i, 0);
  } else {
    lua_getiuservalue(L, i, OP_TOKEN);
    token_push_error(L, -1);
    lua_remove(L, -2);
    token_drop(L, i);
    task_forget(L, t);
    task_settle_canceled(L, rt, i);
  }
}

/* delay(seconds, token) */
static int l_delay(lua_State *L) {
  struct runtime *rt = runtime(L);
  double seconds = module_seconds(L, 1);
  struct token *k = token_opt(L, 2);
  lua_settop(L, 2);
  struct delay *d = (struct delay *)task_new(L, KIND_DELAY, sizeof *d, k ? OP_TOKEN : OP_TOKEN - 1);
  struct task *t = &d->pending.task;
  d->deadline.index = -1;
  if (k != NULL && token_canceled(k)) {
    token_push_error(L, 2);
    task_settle_canceled(L, rt, 3);
  } else if (seconds == 0)
    task_settle(L, rt, 3, 0);
  else if (k != NULL && !token_hold(L, 2, 3)) {
    token_push_error(L, 2); /* a finalizer has canceled it */
    task_settle_canceled(L, rt, 3);
  } else if (seconds != HUGE_VAL) { /* else it lives by who awaits it, or by its token */
    timer_reserve(L);
    task_hold(L, 3, t);
    timer_add(rt, &d->deadline, t, seconds);
  }
  return 1;
}

static int sleep_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *me = runtime(L)->me;
  (void)status, (void)ctx;
  bool interrupted = me->flags & TASK_INTERRUPTED;
  if (((struct fiber *)me)->co != L || !(me->flags & (TASK_INTERRUPTED | TASK_EXPIRED)))
    return lua_yieldk(L, 0, 0, sleep_k); /* somebody else has resumed the coroutine: sleep on */
  me->flags &= (uint16_t) ~(TASK_INTERRUPTED | TASK_EXPIRED);
  if (!interrupted) return 0;
  token_push_error(L, 2);
  return lua_error(L);
}

/* sleep(seconds, token) */
static int l_sleep(lua_State *L) {
  struct runtime *rt = runtime(L);
  double seconds = module_seconds(L, 1);
  struct token *k = token_opt(L, 2);
  if (k != NULL && token_canceled(k)) {
    token_push_error(L, 2);
    return lua_error(L);
  }
  if (seconds == 0) return 0;
  struct fiber *me = fiber_here(L, rt);
  lua_settop(L, 2);
  if (me == NULL) return fiber_outside(L, l_sleep);
  timer_reserve(L);
  me->u.deadline.index = -1;
  me->u.wait.on = NULL;
  me->task.state = TASK_WAITING;
  if (seconds != HUGE_VAL)
    timer_add(rt, &me->u.deadline, &me->task, seconds);
  else if (k ==
           NULL) { /* for ever: nothing holds it; under a token, which may have a deadline, we do */
    task_push(L, &me->task);
    task_release(L, &me->task);
    lua_pop(L, 1);
  }
  if (k != NULL) token_link(k, &me->link);
  return fiber_suspend(L, me, 0, sleep_k);
}

/* ---- wait_async: whichever comes first of a task, a deadline and a token ---- */

struct wait_op {
  struct pending pending;
  struct deadline deadline;
  struct wait wait;
  double seconds;
};

void wait_op_fire(lua_State *L, struct runtime *rt, int i) {
  loop_land(L, rt, i, (struct task *)lua_touserdata(L, i));
}

void wait_op_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct wait_op *op = (struct wait_op *)lua_touserdata(L, i);
  struct task *t = &op->pending.task;
  lua_getiuservalue(L, i, OP_INPUT);
  int input = lua_gettop(L);
  struct task *on = (struct task *)lua_touserdata(L, input);
  bool quiet = t->flags & TASK_QUIET, done = task_done(on);
  if (!done) {
    if (t->flags & TASK_INTERRUPTED) {
      lua_getiuservalue(L, i, OP_TOKEN);
      token_push_error(L, -1);
    } else if (quiet)
      lua_pushboolean(L, 0);
    else {
      task_push_name(L, input);
      error_push(L, ERROR_TIMEOUT, "task '%s' did not complete within %f s", lua_tostring(L, -1),
                 (LUAI_UACNUMBER)op->seconds);
    }
  } else
    lua_pushboolean(L, 1);
  /* nothing raises from here */
  wait_remove(L, input, &op->wait);
  timer_drop(runtime(L), &op->deadline);
  token_drop(L, i);
  task_forget(L, t);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_INPUT);
  if (done && !quiet) {
    on->flags |= TASK_OBSERVED;
    task_settle_like(L, rt, i, input);
  } else if (quiet && !(t->flags & TASK_INTERRUPTED && !done))
    task_settle(L, rt, i, 1);
  else if (t->flags & TASK_INTERRUPTED)
    task_settle_canceled(L, rt, i);
  else
    task_settle_faulted(L, rt, i, 0);
  lua_settop(L, input - 1);
}

/* [-0, +1, e] for wait_async(task, timeout, token) at 1, 2, 3 */
static int new_wait(lua_State *L, bool quiet) {
  struct runtime *rt = runtime(L);
  struct task *on = task_check(L, 1);
  double seconds = lua_isnoneornil(L, 2) ? HUGE_VAL : module_seconds(L, 2);
  struct token *k = token_opt(L, 3);
  lua_settop(L, 3);
  if (!quiet && (task_done(on) || (k == NULL && seconds == HUGE_VAL))) {
    lua_settop(L, 1);
    return 1;
  }
  struct wait_op *op = (struct wait_op *)task_new(L, KIND_WAIT, sizeof *op, OP_INPUT);
  struct task *t = &op->pending.task;
  op->deadline.index = -1;
  op->seconds = seconds;
  if (quiet) t->flags |= TASK_QUIET;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 4, OP_INPUT);
  if (k != NULL) {
    lua_pushvalue(L, 3);
    lua_setiuservalue(L, 4, OP_TOKEN);
  }
  if (task_done(on) || (k != NULL && token_canceled(k)) || seconds == 0) {
    if (k != NULL && token_canceled(k)) t->flags |= TASK_INTERRUPTED;
    wait_op_land(L, 4);
    return 1;
  }
  task_release(L, t);
  if (k != NULL && !token_hold(L, 3, 4)) {
    t->flags |= TASK_INTERRUPTED; /* a finalizer has canceled it */
    wait_op_land(L, 4);
  } else if (!wait_add(L, 1, &op->wait, 4, WAIT_OP))
    wait_op_land(L, 4);
  else if (seconds != HUGE_VAL && !task_done(t)) {
    timer_reserve(L);
    task_hold(L, 4, t);
    timer_add(rt, &op->deadline, t, seconds);
  }
  return 1;
}

int timer_wait_async(lua_State *L) { return new_wait(L, false); }

void timer_push_wait(lua_State *L) { new_wait(L, true); }

static const luaL_Reg functions[] = {
    {"delay", l_delay}, {"sleep", l_sleep}, {"wait_async", timer_wait_async}, {NULL, NULL}};

void timer_open(lua_State *L) { module_functions(L, functions); }
