/*
** timer.c - what waits for a time: delay, sleep, wait_async; and how waits are interrupted.
**
** The deadlines themselves are kept in deadline.c. Those that are due fire in the order of their times,
** equal ones in that in which they were set: a sleeper is made ready, an operation is settled, a scope
** or a source is canceled, and its callbacks are put on the ready list, before whoever that wakes. None
** of the user's code runs meanwhile, so whoever is resumed may freely set or drop others.
**
** A deadline that ends what somebody waits for *judges*: what was due before it has the time to be
** done. So it fires when whoever earlier ones have made ready has run; of real time, in which it may be
** late, a quarter of the delay counts as one moment, lest the loop fall behind for ever.
**
** Callbacks wait for no task when others are linked to their source: those are canceled by them. The
** time deadlines fire by is loop_now: real or virtual.
**
** An owner with a deadline set is held by the anchors: it lives until the deadline fires or is dropped.
**
** Source:    .NET Task.Delay and Task.WaitAsync.
** SPDX-License-Identifier: MIT
*/
#include "waiter.h"

#include <math.h>

#define MOMENT 0.001

/* ---- firing ---- */

void timer_shift(struct runtime *rt, double from, double to) {
  rt->shifted += to - from;
  deadline_shift(rt, from, to);
}

/* [-0, +0, m] */
static void fire(lua_State *L, struct runtime *rt, struct deadline *d, double now) {
  struct task *t;
  if (d->kind == DEADLINE_TIMER) {
    periodic_fire(L, rt, d, now);
    return;
  }
  if (d->kind == DEADLINE_SCOPE) {
    scope_expire(L, rt, container_of(d, struct scope, deadline));
    return;
  }
  luaL_checkstack(L, 30, NULL); /* what fails for want of memory is still due */
  deadline_drop(rt, d);
  switch (d->kind) {
    case DEADLINE_NAP: {
      struct fiber *f = container_of(d, struct fiber, u.nap.deadline);
      t = &f->task;
      waiter_leave(L, f, false);
      t->state = TASK_QUEUED;
      break;
    }
    default:
      t = &container_of(d, struct timed, deadline)->pending.task;
      if (task_is(t, KIND_EXPIRY)) {
        task_push(L, t);
        expiry_fire(L, rt, lua_gettop(L));
        lua_pop(L, 1);
        return;
      }
      task_push(L, t);
      t->flags |= TASK_EXPIRED;
      loop_land(L, rt, -1, t);
      if (waiter_is_queued(t)) waiter_withdraw(L, -1, false); /* others may land in consequence */
      lua_pop(L, 1);
      loop_land_all(L, rt);
      return;
  }
  t->flags |= TASK_EXPIRED;
  loop_ready(rt, t);
}

static bool has_callbacks(const struct task *t) {
  return task_is(t, KIND_SCOPE) || task_is(t, KIND_EXPIRY);
}

/* [-0, +0, -] Those that are ready since m are to land now. In their places of the ready list it would
** be too late for the tokens that are linked to them, which are canceled only then: others would see
** one canceled and the other not yet. */
static void hurry(struct runtime *rt, struct mark m) {
  struct task *before = m.removals == rt->removals ? m.last : NULL, **end = &rt->hurried;
  while (*end != NULL) end = &(*end)->next;
  for (struct task *t = before ? before->next : rt->ready, *next; t != NULL; t = next) {
    next = t->next;
    if (!has_callbacks(t)) {
      before = t;
      continue;
    }
    *(before ? &before->next : &rt->ready) = next;
    if (next == NULL) rt->ready_last = before;
    t->next = NULL;
    *end = t;
    end = &t->next;
  }
  rt->removals++;
}

static void land_hurried(lua_State *L, struct runtime *rt) {
  for (struct task *t; (t = rt->hurried) != NULL;) {
    rt->hurried = t->next;
    t->next = NULL;
    t->flags &= (uint16_t)~TASK_LINKED;
    lua_rawgeti(L, UP_ANCHORS, t->slot);
    if (task_is(t, KIND_SCOPE))
      scope_land(L, lua_gettop(L));
    else
      expiry_land(L, lua_gettop(L));
    lua_pop(L, 1);
  }
}

static bool judges(const struct deadline *d) {
  return d->kind == DEADLINE_NAP ? container_of(d, struct fiber, u.nap.deadline)->u.nap.pos != 0
                                 : d->kind != DEADLINE_TIMER;
}

void timer_fire_due(lua_State *L, struct runtime *rt) {
  if (!deadline_any(rt) && rt->hurried == NULL) return; /* those are left when memory has failed */
  double now = loop_now(rt), moment = HUGE_VAL;
  struct mark m = loop_mark(rt);
  rt->linked = false;
  for (struct deadline *d; (d = deadline_first(rt, now)) != NULL; fire(L, rt, d, now)) {
    double due = deadline_due(rt, d);
    if (moment == HUGE_VAL) /* the first one */
      moment = rt->clock == CLOCK_REAL ? due + fmax((now - due) / 4, MOMENT) : -HUGE_VAL;
    else if (due > moment && rt->ready != NULL && judges(d))
      break;
  }
  if (rt->linked) hurry(rt, m);
  land_hurried(L, rt);
}

/* ---- interruption ---- */

void pending_withdraw(lua_State *L, struct runtime *rt, struct fiber *f, bool gone) {
  int top = lua_gettop(L);
  if (fiber_naps(f)) {
    waiter_leave(L, f, gone);
    deadline_drop(rt, &f->u.nap.deadline);
    return;
  }
  /* else that may have been collected; if not, the node stays in its list, for f waits no more */
  if (!gone && fiber_push_awaited(L, f)) wait_remove(L, -1, &f->u.wait);
  lua_settop(L, top);
}

void pending_interrupt(lua_State *L, struct pending *p) {
  struct runtime *rt = runtime(L);
  struct task *t = &p->task;
  if (!task_is(t, KIND_FIBER)) {
    task_push(L, t);
    if (!lua_isnil(L, -1)) { /* else it is about to be finalized */
      t->flags |= TASK_INTERRUPTED;
      loop_land(L, rt, -1, t);
      if (waiter_is_queued(t)) waiter_withdraw(L, -1, false); /* others may land in consequence */
    }
    lua_pop(L, 1);
    return;
  }
  struct fiber *f = (struct fiber *)t;
  if (t->flags & (TASK_LINKED | TASK_DEAF)) return;
  if (!(t->flags & TASK_STARTED)) {
    if (t->traits & TRAIT_QUEUED && group_canceled(f)) { /* it never starts */
      task_push(L, t);
      loop_land(L, rt, -1, t);
      lua_pop(L, 1);
    }
    return;
  }
  if (t->state != TASK_WAITING) return;
  if (!fiber_naps(f)) {
    bool known = fiber_push_awaited(L, f);
    lua_pop(L, 1);
    if (!known) { /* somebody has closed the coroutine where it waits, or does so now, which its watch sees to */
      task_push(L, t);
      if (lua_status(f->co) == LUA_YIELD && !lua_isnil(L, -1)) fiber_abandon(L, -1, f);
      lua_pop(L, 1);
      return;
    }
  }
  task_push(L, t);
  pending_withdraw(L, rt, f, false);
  t->flags |= TASK_INTERRUPTED;
  fiber_wake(L, rt, f);
}

void pending_hold(lua_State *L, struct pending *p, bool hold) {
  struct task *t = &p->task;
  if (t->state != TASK_WAITING || t->flags & TASK_LINKED) return;
  if (task_is(t, KIND_IO)) return; /* held while libuv has it */
  if (!task_is(t, KIND_FIBER)) {
    if (deadline_is_set(&((struct timed *)(void *)p)->deadline)) return; /* held by it */
  } else if (fiber_naps((struct fiber *)t) && deadline_is_set(&((struct fiber *)t)->u.nap.deadline))
    return;
  task_push(L, t);
  if (!lua_isnil(L, -1)) {
    if (hold)
      task_hold(L, -1, t);
    else
      task_release(L, t);
  }
  lua_pop(L, 1);
}

/* ---- what all operations share ---- */

/* given the token at k: `none` opts out of the ambient one */
struct scope *operation_scope(lua_State *L, int k) {
  struct runtime *rt = runtime(L);
  return token_none(L, k) ? rt->root : scope_flowing(L, rt);
}

bool operation_canceled(const struct token *k, const struct scope *s) {
  return s->canceled || (k != NULL && token_canceled(k));
}

/* its token (at k; NULL, k: none) or its scope has canceled it */
void operation_push_canceled(lua_State *L, struct token *token, int k, struct scope *s) {
  if (token != NULL && token_canceled(token))
    token_push_error(L, k);
  else
    scope_push_error(L, s);
}

int operation_throw_canceled(lua_State *L, struct token *token, int k, struct scope *s) {
  if (token != NULL && token_canceled(token)) {
    token_push_error(L, k);
    return lua_error(L);
  }
  return scope_throw(L, s);
}

void operation_push_interruption(lua_State *L, int i) {
  struct pending *p = (struct pending *)lua_touserdata(L, i);
  lua_getiuservalue(L, i, OP_TOKEN);
  operation_push_canceled(L, token_opt(L, -1), lua_gettop(L), p->member.scope);
  lua_remove(L, -2);
}

/* makes it a member of s, and of what the token at k interrupts; it may die while parked, unless
** it is held by its deadline, or by one above it */
void operation_start(lua_State *L, int i, struct timed *op, int k, struct scope *s) {
  struct runtime *rt = runtime(L);
  struct task *t = &op->pending.task;
  struct token *token = token_opt(L, k);
  if (token != NULL) {
    lua_pushvalue(L, k);
    lua_setiuservalue(L, i, OP_TOKEN);
  }
  if (op->seconds != HUGE_VAL)
    deadline_reserve(L, rt);
  else
    task_weaken(L, i);
  task_hold(L, i, t);
  testing_born(L, rt, t->slot);
  scope_join(s, &op->pending.member);
  if (token != NULL) token_link(token, &op->pending.link);
  if (op->seconds != HUGE_VAL)
    deadline_add(rt, &op->deadline, op->seconds);
  else if (!s->armed && (token == NULL || !token_armed(token)))
    task_release(L, t);
}

/* it has landed: nothing knows it any more */
void operation_stop(lua_State *L, int i, struct timed *op) {
  struct task *t = &op->pending.task;
  struct runtime *rt = runtime(L);
  deadline_drop(rt, &op->deadline);
  link_drop(&op->pending.link);
  scope_leave(L, rt, &op->pending.member);
  if (op->seconds == HUGE_VAL) task_forget_weak(L, t);
  task_forget(L, t);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_TOKEN);
}

struct timed *operation_new(lua_State *L, int kind, size_t size, int uservalues, double seconds) {
  struct timed *op = (struct timed *)task_new(L, kind, size, uservalues, seconds == HUGE_VAL);
  op->deadline = (struct deadline){.kind = DEADLINE_TIMED};
  op->seconds = seconds;
  return op;
}

bool operation_cancel(lua_State *L, int i, int reason) {
  struct runtime *rt = runtime(L);
  struct task *t = (struct task *)lua_touserdata(L, i);
  bool combinator = task_is(t, KIND_ALL) || task_is(t, KIND_ANY);
  token_push_canceled(L, reason);               /* … token */
  if (task_done(t) || t->flags & TASK_LINKED) { /* it is about to land */
    lua_pop(L, 1);
    return false;
  }
  if (combinator) {
    bool canceled = combine_cancel(L, i);
    lua_pop(L, 1);
    return canceled;
  }
  link_drop(&((struct pending *)t)->link);
  lua_setiuservalue(L, i, OP_TOKEN);
  t->flags |= TASK_INTERRUPTED;
  loop_land(L, rt, i, t);
  if (waiter_is_queued(t)) waiter_withdraw(L, i, false);
  loop_land_all(L, rt);
  return true;
}

/* ---- delay ---- */

void delay_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct timed *op = (struct timed *)lua_touserdata(L, i);
  if (op->pending.task.flags & TASK_EXPIRED) {
    operation_stop(L, i, op);
    task_settle(L, rt, i, 0);
  } else {
    operation_push_interruption(L, i);
    if (task_done(&op->pending.task)) return; /* by a finalizer */
    operation_stop(L, i, op);
    task_settle_canceled(L, rt, i);
  }
}

/* delay(seconds, token) */
static int l_delay(lua_State *L) {
  struct runtime *rt = runtime(L);
  double seconds = module_seconds(L, 1);
  struct token *k = token_opt(L, 2);
  lua_settop(L, 2);
  struct scope *s = operation_scope(L, 2);
  struct timed *op = operation_new(L, KIND_DELAY, sizeof *op, OP_TOKEN, seconds);
  if (operation_canceled(k, s)) {
    operation_push_canceled(L, k, 2, s);
    task_settle_canceled(L, rt, 3);
  } else if (seconds == 0)
    task_settle(L, rt, 3, 0);
  else
    operation_start(L, 3, op, 2, s);
  return 1;
}

/* [-0, +0, -] f naps: held no more, unless its scope or the token that it was given (or NULL) is armed */
static void let_go(lua_State *L, struct runtime *rt, struct fiber *f, struct token *k) {
  if (f->member.scope->armed || (k != NULL && token_armed(k))) return;
  fiber_push_me(L, rt, f);
  lua_pop(L, 1);
  fiber_park(L, f, false, false);
}

/* [-0, +0, m] The token at index 2, in whose list f will be, lives as long as f naps: this stack may be
** gone then, for somebody closes the coroutine. It is no more than a key that holds it, lest what the
** token knows of held f. */
static void keep_given(lua_State *L, struct runtime *rt, struct fiber *f) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_GIVEN);
  bool held = fiber_push_me(L, rt, f);
  lua_pushvalue(L, 2);
  lua_rawset(L, -3);
  lua_pop(L, 1);
  fiber_park(L, f, true, held);
}

void timer_nap(lua_State *L, struct fiber *f, struct token *k, bool deaf, double now, double due) {
  struct runtime *rt = runtime(L);
  deadline_reserve(L, rt);
  if (k != NULL) keep_given(L, rt, f);
  f->u.nap = (struct nap){.deadline = {.kind = DEADLINE_NAP}, .given = k != NULL};
  f->task.state = TASK_WAITING;
  if (deaf) f->task.flags |= TASK_DEAF;
  if (k != NULL) token_link(k, &f->u.nap.link);
  if (due != HUGE_VAL)
    deadline_set(rt, &f->u.nap.deadline, now, due);
  else
    let_go(L, rt, f, k);
}

static int sleep_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  uint16_t flags = me->task.flags;
  (void)status, (void)ctx;
  if (!fiber_on_top(L, rt) || !(flags & (TASK_INTERRUPTED | TASK_EXPIRED)))
    return lua_yieldk(L, 0, 0, sleep_k); /* somebody else has resumed the coroutine: sleep on */
  me->task.flags &= (uint16_t) ~(TASK_INTERRUPTED | TASK_EXPIRED);
  if (!(flags & TASK_INTERRUPTED)) return 0;
  return operation_throw_canceled(L, token_opt(L, 2), 2, me->member.scope);
}

/* sleep(seconds, token) */
static int l_sleep(lua_State *L) {
  struct runtime *rt = runtime(L);
  double seconds = module_seconds(L, 1);
  struct token *k = token_opt(L, 2);
  bool deaf = token_none(L, 2);
  operation_check_tokens(L, rt, 2);
  if (seconds == 0) return 0;
  struct fiber *me = fiber_here(L, rt);
  lua_settop(L, 2);
  if (me == NULL) return fiber_outside(L, l_sleep);
  double now = loop_now(rt);
  timer_nap(L, me, k, deaf, now, loop_after(now, seconds));
  return fiber_suspend(L, rt, me, 0, sleep_k);
}

/* ---- wait_async: whichever comes first of a task, a deadline and a token ---- */

struct wait_op {
  struct timed timed;
  struct wait wait;
};

void wait_op_fire(lua_State *L, struct runtime *rt, int i) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  if (waiter_is_queued(t)) waiter_withdraw(L, i, false);
  loop_land(L, rt, i, t);
}

void wait_op_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct wait_op *op = (struct wait_op *)lua_touserdata(L, i);
  struct task *t = &op->timed.pending.task;
  lua_getiuservalue(L, i, OP_INPUT);
  int input = lua_gettop(L);
  struct task *on = (struct task *)lua_touserdata(L, input);
  bool quiet = t->flags & TASK_QUIET, done = task_done(on);
  bool interrupted = t->flags & TASK_INTERRUPTED; /* now: a finalizer may cancel its token */
  if (!done) {
    if (interrupted)
      operation_push_interruption(L, i);
    else if (quiet)
      lua_pushboolean(L, 0);
    else {
      task_push_name(L, input);
      error_push(L, ERROR_TIMEOUT, "task '%s' did not complete within %f s", lua_tostring(L, -1),
                 (LUAI_UACNUMBER)error_seconds(op->timed.seconds));
    }
    if (task_done(t)) return; /* by a finalizer */
    done = task_done(on);
  }
  if (done) lua_pushboolean(L, 1);
  /* nothing raises from here */
  wait_remove(L, input, &op->wait);
  operation_stop(L, i, &op->timed);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_INPUT);
  if (done && !quiet) {
    on->flags |= TASK_OBSERVED;
    task_settle_like(L, rt, i, input);
  } else if (quiet && !(interrupted && !done))
    task_settle(L, rt, i, 1);
  else if (interrupted)
    task_settle_canceled(L, rt, i);
  else
    task_settle_faulted(L, rt, i, 0);
  lua_settop(L, input - 1);
}

/* [-0, +1, e] for (task, timeout, token) at 1, 2, 3, in the scope s */
static void new_wait(lua_State *L, struct scope *s, bool quiet) {
  struct runtime *rt = runtime(L);
  struct token *k = token_opt(L, 3);
  double seconds = lua_isnoneornil(L, 2) ? HUGE_VAL : module_seconds(L, 2);
  struct wait_op *op = (struct wait_op *)operation_new(L, KIND_WAIT, sizeof *op, OP_INPUT, seconds);
  struct task *t = &op->timed.pending.task;
  if (quiet) t->flags |= TASK_QUIET;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 4, OP_INPUT);
  operation_start(L, 4, &op->timed, 3, s); /* so that it lands from where it is known */
  bool canceled = operation_canceled(k, s);
  if (canceled) t->flags |= TASK_INTERRUPTED;
  if (canceled || seconds == 0 || !wait_add(L, 1, &op->wait, 4, WAIT_OP)) {
    loop_land(L, rt, 4, t);
    loop_land_all(L, rt);
  } else if (task_done(t)) /* a finalizer has canceled it */
    wait_remove(L, 1, &op->wait);
}

/* wait_async(task, timeout, token) */
int timer_wait_async(lua_State *L) {
  struct task *on = task_check(L, 1);
  task_refuse_state(L, 1, on);
  if (!lua_isnoneornil(L, 2)) module_seconds(L, 2);
  token_opt(L, 3);
  lua_settop(L, 3);
  if (task_done(on))
    lua_settop(L, 1);
  else
    new_wait(L, operation_scope(L, 3), false);
  return 1;
}

void timer_push_wait(lua_State *L) {
  task_refuse_state(L, 1, task_check(L, 1));
  if (!lua_isnoneornil(L, 2)) module_seconds(L, 2);
  lua_settop(L, 3);
  new_wait(L, runtime(L)->root, true);
}

int timer_await_with(lua_State *L) {
  struct runtime *rt = runtime(L);
  task_refuse_state(L, 1, task_check(L, 1));
  bool given = token_opt(L, 2) != NULL, deaf = token_none(L, 2);
  if (given && !task_done((struct task *)lua_touserdata(L, 1))) {
    lua_settop(L, 2);
    lua_pushnil(L);
    lua_insert(L, 2);
    timer_wait_async(L);
    lua_replace(L, 1);
  }
  lua_settop(L, 1);
  struct task *on = (struct task *)lua_touserdata(L, 1);
  if (task_done(on)) return task_push_outcome(L, 1, on);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) return fiber_outside(L, fiber_await_value);
  lua_pushvalue(L, 1);
  return waiter_await(L, me, on, deaf);
}

static const luaL_Reg functions[] = {{"delay", l_delay},
                                     {"sleep", l_sleep},
                                     {"wait_async", timer_wait_async},
                                     {"await_with", timer_await_with},
                                     {NULL, NULL}};

void timer_open(lua_State *L) { module_functions(L, functions); }
