/*
** periodic.c - Timer, which starts a task when it is due, and PeriodicTimer, which is waited for.
**
** Timer. One is 96 bytes, and a node in deadline.c. While armed it is held by the loop, in RUNTIME_TIMERS
** at the index of its deadline: whoever made it need not keep it. What it needs to start its function is
** the function and its *origin*: the context captured at creation, and the cancellation scope of whoever
** created it, of which its tasks become members; or, once that has ended, of the next one outside.
** Timers made at the same place share one origin. The scope stays while an origin of it does
** (scope->refs), though nothing else may be left in it.
**
** When a Timer is due it puts a *tick* on the ready list, a task in memory of ours; when that lands the fiber
** is made, and run at once. So a million timers due at one instant need no million coroutines. A tick that
** has not started is taken back by change and dispose, and while it has not started no second one is made.
** Until it lands the timer keeps its index, and so is held: its deadline rests, if it is not armed.
** A periodic Timer keeps to its grid: after a delay of the program it goes on with the next tick to come.
**
** PeriodicTimer. It knows when its next tick is (`next`) and has no deadline: its waiter has one, a
** fiber that naps or an operation. A tick is pending if `next` has passed, so any number of missed
** ticks is one, nothing runs while nobody waits, and a timer that nobody refers to is garbage. A wait
** ends when it *returns*: until then another one is refused, also if the first has been woken already.
**
** Invariants: RUNTIME_TIMERS[index] is the Timer whose deadline has that index.
**             p->waiter is the C face of PERIODIC_WAITER.
** Source:     .NET System.Threading.Timer and PeriodicTimer. A Timer that is disposed starts no task any more.
** SPDX-License-Identifier: MIT
*/
#include "waiter.h"

#include <math.h>
#include <string.h>

#define UP_TIMERS lua_upvalueindex(3) /* RUNTIME_TIMERS, for the functions of a Timer */

struct timer {
  uint32_t tag;
  struct deadline deadline;
  double period; /* 0: once */
};
enum { TIMER_FUNCTION = 1, TIMER_ORIGIN }; /* nil: no context, in the root scope */

struct origin {
  uint32_t tag;
  struct scope *scope;
};
enum { ORIGIN_CONTEXT = 1 };

struct periodic {
  uint32_t tag;
  bool closed;
  bool pending; /* a tick that came before the period was changed */
  double period, next;
  double shifted; /* rt->shifted when `next` was set */
  struct pending *waiter;
};
enum { PERIODIC_WAITER = 1, PERIODIC_TOKEN }; /* … and the token that it was given */

/* the first tick after `now` on the grid of which `due` is one */
static double tick_after(double due, double period, double now) {
  double next = due + period;
  if (next <= now) next = due + (floor((now - due) / period) + 1) * period;
  if (next <= now) next += period; /* it was rounded */
  return next > now && next < HUGE_VAL ? next : nextafter(now, HUGE_VAL);
}

/* ---- Timer: origins ---- */

/* [-1, +1, m] replaces a context, or nil, by an origin with it in the scope s, of a task that runs */
static void make_origin(lua_State *L, struct scope *s) {
  struct origin *o = (struct origin *)object_new(L, TAG_ORIGIN, sizeof *o, 1);
  o->scope = s;
  s->refs++;
  lua_insert(L, -2);
  lua_setiuservalue(L, -2, ORIGIN_CONTEXT);
}

/* [-0, +1, m] the origin of what the running task makes in its scope s, if that is all there is to it;
** or nil. The last one is kept, with its scope, until the next one is wanted. */
static void push_bare_origin(lua_State *L, struct runtime *rt, struct scope *s) {
  if (s == rt->root)
    lua_pushnil(L);
  else if (rt->origin == s)
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_ORIGIN);
  else {
    lua_pushnil(L);
    make_origin(L, s);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_ORIGIN);
    rt->origin = s;
  }
}

/* [-0, +1, m] the same where there is a context to be captured */
static void push_origin(lua_State *L, struct runtime *rt, struct scope *s) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WEAK);
  context_push_flowing(L, rt->me); /* weak context */
  if (lua_rawgetp(L, -2, s) == LUA_TUSERDATA) {
    lua_getiuservalue(L, -1, ORIGIN_CONTEXT); /* weak context origin its */
    if (lua_rawequal(L, -1, -3)) {
      lua_pop(L, 1);
      lua_replace(L, -3);
      lua_pop(L, 1);
      return;
    }
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  make_origin(L, s);
  lua_pushvalue(L, -1);
  lua_rawsetp(L, -3, s);
  lua_replace(L, -2);
}

static int l_origin_gc(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct origin *o = (struct origin *)object_test(L, 1, TAG_ORIGIN);
  if (o == NULL || o->scope == NULL || rt->closed) return 0;
  struct scope *s = o->scope;
  o->scope = NULL;
  if (rt->origin == s) rt->origin = NULL; /* one more of it will do no harm */
  s->refs--;
  if (s->owner == NULL) scope_left(L, rt, s);
  return 0;
}

/* ---- Timer: armed, due, started ---- */

/* [-0, +0, m] the Timer at i, which is not armed, is due after `seconds` */
static void arm(lua_State *L, int i, struct timer *t, double seconds) {
  struct runtime *rt = runtime(L);
  uint32_t index = deadline_reserve(L, rt);
  testing_timer_born(L, rt, index);
  lua_pushvalue(L, i);
  lua_rawseti(L, UP_TIMERS, (lua_Integer)index);
  deadline_add(rt, &t->deadline, seconds);
}

/* [-0, +0, -] it is not armed any more, and a tick that has not started is taken back */
static void disarm(lua_State *L, int timers, struct timer *t) {
  uint32_t index = t->deadline.index;
  if (index == 0) return;
  t->deadline.ticked = false;
  if (t->deadline.queued) {
    deadline_rest(runtime(L), &t->deadline);
    return;
  }
  deadline_drop(runtime(L), &t->deadline);
  lua_pushboolean(L, 0);
  lua_rawseti(L, timers, (lua_Integer)index);
}

void periodic_disarm(lua_State *L, int i) {
  struct timer *t = (struct timer *)lua_touserdata(L, i);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TIMERS);
  disarm(L, lua_gettop(L), t);
  lua_pop(L, 1);
}

bool periodic_push_armed(lua_State *L, struct runtime *rt, uint32_t index, double *due) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TIMERS);
  lua_rawgeti(L, -1, (lua_Integer)index);
  lua_remove(L, -2);
  const struct timer *t = (const struct timer *)object_test(L, -1, TAG_TIMER);
  if (t != NULL && (t->deadline.ticked || !deadline_rests(rt, &t->deadline))) {
    *due = t->deadline.ticked ? loop_now(rt) : deadline_due(rt, &t->deadline);
    return true;
  }
  lua_pop(L, 1);
  return false;
}

struct tick {
  struct task task;
  struct timer *timer;
};

/* [-0, +0, m] puts a tick of the Timer on the ready list */
static void add_tick(lua_State *L, struct runtime *rt, struct timer *t) {
  struct task *tick = rt->idle_ticks;
  if (tick != NULL)
    rt->idle_ticks = tick->next;
  else {
    tick = (struct task *)module_resize(L, NULL, 0, sizeof(struct tick));
    if (tick == NULL) luaL_error(L, "not enough memory");
  }
  *(struct tick *)(void *)tick =
      (struct tick){{.tag = TAG_TASK | KIND_TICK, .state = TASK_QUEUED}, t};
  loop_ready(rt, tick);
}

static void free_ticks(lua_State *L, struct task *list) {
  while (list != NULL) {
    struct task *next = list->next;
    if (task_is(list, KIND_TICK)) module_resize(L, list, sizeof(struct tick), 0);
    list = next;
  }
}

void periodic_fire(lua_State *L, struct runtime *rt, struct deadline *d, double now) {
  struct timer *t = container_of(d, struct timer, deadline);
  if (!d->queued) add_tick(L, rt, t);
  d->queued = d->ticked = true;
  if (t->period > 0)
    deadline_move(rt, d, tick_after(deadline_due(rt, d), t->period, now));
  else
    deadline_rest(rt, d);
}

/* the scope of the tasks that start by o: that in which the Timer was made, or, should that have ended,
** the next one outside that has not */
static struct scope *scope_of(const struct runtime *rt, const struct origin *o) {
  struct scope *s = o ? o->scope : NULL;
  while (s != NULL && s != rt->root && s->owner == NULL) s = s->member.scope;
  return s ? s : rt->root;
}

/* [-0, +n, m] runs the function of the Timer at i, whose deadline had that index, as the blank task on
** top. Most of these tasks end at once, and nobody has seen them: then the next one is made of the same
** object. */
static void start(lua_State *L, struct runtime *rt, int i, uint32_t index, bool spare) {
  int task = lua_gettop(L) + 1; /* below it comes the origin */
  lua_getiuservalue(L, i, TIMER_ORIGIN);
  const struct origin *o = (const struct origin *)lua_touserdata(L, -1);
  lua_insert(L, -2);
  lua_getiuservalue(L, i, TIMER_FUNCTION);
  lua_insert(L, -2);                                      /* origin fn task */
  struct fiber *f = fiber_fit(L, rt, 0, scope_of(rt, o)); /* origin task */
  if (o != NULL)
    lua_getiuservalue(L, task - 1, ORIGIN_CONTEXT);
  else
    lua_pushnil(L);
  context_give(L, task, &f->task);
  f->task.label = LABEL_NOBODY;
  if (rt->births != NULL) testing_started(L, rt, index, f->task.slot);
  f->task.state = TASK_QUEUED;
  fiber_run_at(L, rt, f, task);
  bool again = fiber_reuse(L, task);
  if (again == spare) return;
  if (again)
    lua_pushvalue(L, task);
  else
    lua_pushnil(L);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_SPARE);
}

void periodic_land(lua_State *L, struct runtime *rt, struct task *tick) {
  struct timer *t = ((struct tick *)(void *)tick)->timer;
  struct deadline *d = &t->deadline;
  int top = lua_gettop(L);
  uint32_t index = d->index;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TIMERS);
  lua_rawgeti(L, -1, (lua_Integer)index); /* timers timer */
  bool spare = lua_getiuservalue(L, UP_RUNTIME, RUNTIME_SPARE) == LUA_TUSERDATA;
  if (!spare) {
    lua_pop(L, 1);
    fiber_blank(L);
  }
  fiber_reserve(L, rt); /* timers timer task: nothing more is needed, so the tick is taken now */
  tick->next = rt->idle_ticks;
  rt->idle_ticks = tick;
  bool ticked = d->ticked;
  d->queued = d->ticked = false;
  if (deadline_rests(rt, d)) {
    lua_pushboolean(L, 0); /* not nil, so that the table stays an array */
    lua_rawseti(L, top + 1, (lua_Integer)index);
    deadline_drop(rt, d);
  }
  rt->lands = NULL;
  if (ticked) start(L, rt, top + 2, index, spare);
  lua_settop(L, top);
}

void periodic_trim(lua_State *L, struct runtime *rt) {
  free_ticks(L, rt->idle_ticks);
  rt->idle_ticks = NULL;
  if (!deadline_trim(L, rt)) return;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TIMERS);
  for (lua_Integer n = (lua_Integer)lua_rawlen(L, -1); n > 0; n--) {
    lua_pushnil(L);
    lua_rawseti(L, -2, n);
  }
  for (int end = 1; end >= 0; end--) { /* a key out of order makes Lua look for the right size */
    end ? lua_pushboolean(L, 0) : lua_pushnil(L);
    lua_rawseti(L, -2, -1);
  }
  lua_pop(L, 1);
}

void periodic_close(lua_State *L, struct runtime *rt) {
  if (rt->lands != NULL) { /* a finalizer that runs as it lands has called os.exit */
    rt->lands->next = rt->idle_ticks;
    rt->idle_ticks = rt->lands;
  }
  free_ticks(L, rt->ready);
  free_ticks(L, rt->idle_ticks);
  rt->ready = rt->idle_ticks = rt->lands = NULL;
}

/* ---- Timer: Lua face ---- */

static struct timer *check_timer(lua_State *L) {
  return (struct timer *)object_check(L, 1, TAG_TIMER);
}

static double opt_period(lua_State *L, int i) {
  double period = lua_isnoneornil(L, i) ? 0 : module_seconds(L, i);
  return period == HUGE_VAL ? 0 : period;
}

/* Timer(fn, due, period) */
static int l_timer_new(lua_State *L) {
  struct runtime *rt = runtime(L);
  argument_callable(L, 1);
  double due = module_seconds(L, 2), period = opt_period(L, 3);
  struct scope *s = scope_flowing(L, rt);
  struct timer *t = (struct timer *)object_new(L, TAG_TIMER, sizeof *t, TIMER_ORIGIN);
  t->deadline.kind = DEADLINE_TIMER;
  t->period = period;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, TIMER_FUNCTION);
  if (rt->me->flags & TASK_HAS_CONTEXT && !(rt->me->flags & TASK_SUPPRESSED))
    push_origin(L, rt, s);
  else
    push_bare_origin(L, rt, s);
  lua_setiuservalue(L, -2, TIMER_ORIGIN);
  if (due != HUGE_VAL) arm(L, -1, t, due);
  return 1;
}

/* timer:change(due, period) -> false: it has been disposed */
static int l_timer_change(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct timer *t = check_timer(L);
  double due = module_seconds(L, 2), period = opt_period(L, 3);
  lua_pushboolean(L, !t->deadline.closed);
  if (t->deadline.closed) return 1;
  if (due == HUGE_VAL)
    disarm(L, UP_TIMERS, t);
  else if (deadline_is_set(&t->deadline))
    deadline_move(rt, &t->deadline, loop_after(loop_now(rt), due));
  else
    arm(L, 1, t, due);
  t->period = period;
  t->deadline.ticked = false;
  return 1;
}

static int l_timer_dispose(lua_State *L) {
  struct timer *t = check_timer(L);
  if (t->deadline.closed) return 0;
  disarm(L, UP_TIMERS, t);
  t->deadline.closed = true;
  lua_pushnil(L);
  lua_setiuservalue(L, 1, TIMER_FUNCTION);
  lua_pushnil(L);
  lua_setiuservalue(L, 1, TIMER_ORIGIN);
  return 0;
}

/* ---- PeriodicTimer: waits ---- */

/* The clock has been set: `next` goes with it, as the deadline of the waiter has done. */
static void catch_up(const struct runtime *rt, struct periodic *p) {
  if (p->shifted == rt->shifted) return;
  p->next += rt->shifted - p->shifted;
  p->shifted = rt->shifted;
}

static struct periodic *check_periodic(lua_State *L) {
  struct periodic *p = (struct periodic *)object_check(L, 1, TAG_PERIODIC);
  catch_up(runtime(L), p);
  return p;
}

/* somebody waits, or has not yet returned from the wait */
static bool has_waiter(const struct periodic *p) {
  if (p->waiter == NULL) return false;
  const struct task *t = &p->waiter->task;
  return (t->state == TASK_WAITING || t->state == TASK_QUEUED) && !(t->flags & TASK_ABANDONED) &&
         !fiber_is_lost(t);
}

/* the deadline of the waiter, or NULL: there is none, or it has been woken */
static struct deadline *waiting(const struct periodic *p) {
  if (!has_waiter(p) || p->waiter->task.state != TASK_WAITING ||
      p->waiter->task.flags & TASK_LINKED)
    return NULL;
  if (task_is(&p->waiter->task, KIND_FIBER))
    return &((struct fiber *)(void *)p->waiter)->u.nap.deadline;
  return &((struct timed *)(void *)p->waiter)->deadline;
}

/* [-0, +0, -] the task on top, given the token at 2, waits for the one at 1 */
static void set_waiter(lua_State *L, struct periodic *p, struct pending *w) {
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, 1, PERIODIC_WAITER);
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, 1, PERIODIC_TOKEN);
  p->waiter = w;
}

/* [-0, +0, -] the wait w for the one at i is over */
static void clear_waiter(lua_State *L, int i, struct periodic *p, const struct task *w) {
  if (p->waiter == NULL || &p->waiter->task != w) return;
  p->waiter = NULL;
  lua_pushnil(L);
  lua_setiuservalue(L, i, PERIODIC_WAITER);
  lua_pushnil(L);
  lua_setiuservalue(L, i, PERIODIC_TOKEN);
}

static bool has_tick(const struct periodic *p, double now) { return p->pending || p->next <= now; }

/* whether it was a tick that ended a wait; it is consumed */
static bool take_tick(struct periodic *p, double now) {
  if (p->closed) return false;
  p->pending = false;
  if (p->next <= now) p->next = tick_after(p->next, p->period, now);
  return true;
}

/* the same when its deadline, or dispose, has ended it: whatever was rounded since, the tick has come */
static bool end_wait(struct runtime *rt, struct periodic *p) {
  double now = loop_now(rt);
  if (p->shifted != rt->shifted) {
    catch_up(rt, p);
    p->next = fmin(p->next, now);
  }
  return take_tick(p, now);
}

/* [-0, +0, -] the waiter is woken by the next tick of the one at 1, from now on; there is room for a
** deadline */
static void aim(lua_State *L, struct periodic *p, double now) {
  struct runtime *rt = runtime(L);
  struct deadline *d = waiting(p);
  if (d == NULL) return;
  if (p->next == HUGE_VAL) {
    lua_getiuservalue(L, 1, PERIODIC_TOKEN);
    const struct token *k = token_opt(L, -1);
    deadline_drop(rt, d);
    pending_hold(L, p->waiter, p->waiter->member.scope->armed || (k != NULL && token_armed(k)));
    lua_pop(L, 1);
  } else if (deadline_is_set(d))
    deadline_move(rt, d, p->next);
  else {
    pending_hold(L, p->waiter, true);
    deadline_set(rt, d, now, p->next);
  }
}

static void check_no_waiter(lua_State *L, const struct periodic *p) {
  if (has_waiter(p))
    error_throw(L, ERROR_OPERATION,
                "another task is waiting for this PeriodicTimer: a tick is for one waiter");
}

static int wait_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  struct periodic *p = (struct periodic *)lua_touserdata(L, 1);
  uint16_t flags = me->task.flags;
  (void)status, (void)ctx;
  if (!fiber_on_top(L, rt) || !(flags & (TASK_INTERRUPTED | TASK_EXPIRED)))
    return lua_yieldk(L, 0, 0, wait_k); /* somebody else has resumed the coroutine */
  me->task.flags &= (uint16_t) ~(TASK_INTERRUPTED | TASK_EXPIRED);
  clear_waiter(L, 1, p, &me->task);
  if (flags & TASK_INTERRUPTED)
    return operation_throw_canceled(L, token_opt(L, 2), 2, me->member.scope);
  lua_pushboolean(L, end_wait(rt, p));
  return 1;
}

/* wait_for_next_tick(token) -> true, or false: it has been disposed */
static int l_wait(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct periodic *p = check_periodic(L);
  struct token *k = token_opt(L, 2);
  bool deaf = token_none(L, 2);
  check_no_waiter(L, p);
  operation_check_tokens(L, rt, 2);
  double now = loop_now(rt);
  if (p->closed || has_tick(p, now)) {
    lua_pushboolean(L, take_tick(p, now));
    return 1;
  }
  struct fiber *me = fiber_here(L, rt);
  lua_settop(L, 2);
  if (me == NULL) return fiber_outside(L, l_wait);
  timer_nap(L, me, k, deaf, now, p->next);
  task_push(L, &me->task);
  set_waiter(L, p, (struct pending *)(void *)me);
  lua_pop(L, 1);
  return fiber_suspend(L, rt, me, 0, wait_k);
}

void periodic_wait_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct timed *op = (struct timed *)lua_touserdata(L, i);
  struct task *t = &op->pending.task;
  bool canceled = !(t->flags & TASK_EXPIRED);
  if (canceled) {
    operation_push_interruption(L, i);
    if (task_done(t)) return; /* by a finalizer */
  }
  lua_getiuservalue(L, i, OP_INPUT);
  int on = lua_gettop(L);
  struct periodic *p = (struct periodic *)lua_touserdata(L, on);
  clear_waiter(L, on, p, t);
  operation_stop(L, i, op);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_INPUT);
  if (canceled) {
    lua_settop(L, on - 1);
    task_settle_canceled(L, rt, i);
    return;
  }
  lua_pushboolean(L, end_wait(rt, p));
  task_settle(L, rt, i, 1);
}

/* wait_for_next_tick_async(token) */
static int l_wait_async(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct periodic *p = check_periodic(L);
  struct token *k = token_opt(L, 2);
  check_no_waiter(L, p);
  lua_settop(L, 2);
  struct scope *s = operation_scope(L, 2);
  struct timed *op = operation_new(L, KIND_PERIOD, sizeof *op, OP_INPUT, HUGE_VAL);
  if (operation_canceled(k, s)) {
    operation_push_canceled(L, k, 2, s);
    task_settle_canceled(L, rt, 3);
    return 1;
  }
  check_no_waiter(L, p); /* a finalizer … */
  double now = loop_now(rt);
  if (p->closed || has_tick(p, now)) {
    lua_pushboolean(L, take_tick(p, now));
    task_settle(L, rt, 3, 1);
    return 1;
  }
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 3, OP_INPUT);
  deadline_reserve(L, rt);
  operation_start(L, 3, op, 2, s);
  set_waiter(L, p, &op->pending);
  aim(L, p, now);
  return 1;
}

/* ---- PeriodicTimer: Lua face ---- */

static const char not_positive[] = "a period must be greater than 0 seconds";

static void check_period(lua_State *L, int i) {
  luaL_argcheck(L, luaL_checknumber(L, i) > 0, i, not_positive);
}

/* PeriodicTimer(period) */
static int l_periodic_new(lua_State *L) {
  check_period(L, 1);
  double period = (double)lua_tonumber(L, 1);
  struct periodic *p = (struct periodic *)object_new(L, TAG_PERIODIC, sizeof *p, PERIODIC_TOKEN);
  p->period = period;
  p->next = loop_now(runtime(L)) + period;
  p->shifted = runtime(L)->shifted;
  testing_opened(L, runtime(L));
  return 1;
}

/* It has nothing to give back; but a test that forgets one fails, whether or not the collector comes
** before its end. */
static int l_periodic_gc(lua_State *L) {
  const struct periodic *p = (const struct periodic *)object_test(L, 1, TAG_PERIODIC);
  if (p != NULL && !p->closed && !runtime(L)->closed) testing_lost(L, runtime(L), 1);
  return 0;
}

bool periodic_is_open(const void *periodic) { return !((const struct periodic *)periodic)->closed; }

static int l_period(lua_State *L) {
  lua_pushnumber(L, check_periodic(L)->period);
  return 1;
}

static int l_newindex(lua_State *L) {
  static const char bad[] =
      "bad argument #1 to 'period' (%s)"; /* which is what the user calls it */
  struct periodic *p = check_periodic(L);
  const char *key = luaL_tolstring(L, 2, NULL);
  if (strcmp(key, "period") != 0)
    return luaL_error(L, "field '%s' of a PeriodicTimer cannot be assigned", key);
  if (!lua_isnumber(L, 3)) {
    const char *type = luaL_typename(L, 3);
    return luaL_error(L, bad, lua_pushfstring(L, "number expected, got %s", type));
  }
  if (!(lua_tonumber(L, 3) > 0)) return luaL_error(L, bad, not_positive);
  if (p->closed) return error_throw(L, ERROR_DISPOSED, "the PeriodicTimer has been disposed");
  struct runtime *rt = runtime(L);
  deadline_reserve(L, rt);
  double now = loop_now(rt);
  p->pending = has_tick(p, now);
  p->period = (double)lua_tonumber(L, 3);
  p->next = loop_after(now, p->period);
  aim(L, p, now);
  return 0;
}

static int l_dispose(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct periodic *p = check_periodic(L);
  struct deadline *d = waiting(p);
  p->closed = true;
  if (d == NULL) return 0;
  struct task *t = &p->waiter->task;
  lua_getiuservalue(L, 1, PERIODIC_WAITER);
  deadline_drop(rt, d);
  t->flags |= TASK_EXPIRED;
  if (task_is(t, KIND_FIBER)) {
    waiter_leave(L, (struct fiber *)t, true);
    fiber_wake(L, rt, (struct fiber *)t);
  } else {
    loop_land(L, rt, lua_gettop(L), t);
    loop_land_all(L, rt);
  }
  return 0;
}

static const luaL_Reg functions[] = {
    {"PeriodicTimer", l_periodic_new}, {"Timer", NULL}, {NULL, NULL}};

static const luaL_Reg timer_methods[] = {
    {"change", l_timer_change}, {"dispose", l_timer_dispose}, {NULL, NULL}};
static const luaL_Reg methods[] = {{"wait_for_next_tick", l_wait},
                                   {"wait_for_next_tick_async", l_wait_async},
                                   {"dispose", l_dispose},
                                   {"__close", l_dispose},
                                   {"__newindex", l_newindex},
                                   {"__gc", l_periodic_gc},
                                   {NULL, NULL}};
static const luaL_Reg properties[] = {{"period", l_period}, {NULL, NULL}};
static const luaL_Reg origin_methods[] = {{"__gc", l_origin_gc}, {NULL, NULL}};

/* [-0, +1, m] those of a Timer have one upvalue more */
static void push_function(lua_State *L, lua_CFunction f) {
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TIMERS);
  lua_pushcclosure(L, f, 3);
}

ONCE static void periodic_open(lua_State *L) {
  module_class(L, TAG_TIMER, "coflow.Timer", timer_methods, NULL);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_TIMER));
  push_function(L, l_timer_dispose);
  lua_setfield(L, -2, "__close");
  lua_getfield(L, -1, "methods");
  for (const luaL_Reg *m = timer_methods; m->name; m++) {
    push_function(L, m->func);
    lua_setfield(L, -2, m->name);
  }
  lua_pop(L, 2);
  module_class(L, TAG_PERIODIC, "coflow.PeriodicTimer", methods, properties);
  module_class(L, TAG_ORIGIN, "coflow.Origin", origin_methods, NULL);
  push_function(L, l_timer_new);
  lua_setfield(L, -2, "Timer");
}

const struct part periodic_part = {functions, periodic_open, NULL};
