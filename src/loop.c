/*
** loop.c - the ready list, landing, the pump, run.
**
** One turn of the pump:
**
**     ready      tasks are resumed or landed, first in first out: until none is left, but no longer
**                than SLICE tasks, those that are run in place included, or about a millisecond
**     timers     what is due moves to the ready list
**     libuv      polled without waiting while tasks are ready; else until the next deadline (poll.c)
**
** so neither a burst of ready tasks nor one of events starves the other. What is set to be due at once
** does not wait until so many have run: a *nudge*, put behind those that are ready then, ends the step.
**
** The pump is an ordinary C function called under protection by loop_run and loop.run only, outside
** every libuv callback: nothing that Lua raises, and no os.exit in a task, ever unwinds through libuv.
**
** Time is loop_now: monotonic, or virtual (poll.c). That, and which ready task comes first, is all that
** a test changes (testing.c); the real clock is not looked at then, so that a test takes one course.
**
** Landing: an operation that completes while another task is settled, or a token canceled, lands at
** the end of that, not on a later turn, in order and without recursion.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <math.h>
#include <unistd.h>

enum { SLICE = 256, LOOK = 16 };
#define SLICE_SECONDS 0.001
#define TRIM_SECONDS 1.0

/* ---- time ---- */

double loop_now(struct runtime *rt) {
  return rt->clock != CLOCK_REAL ? rt->virtual_now : loop_real_now();
}

/* ---- libuv's loop ---- */

void loop_init(struct runtime *rt) {
  link_init(&rt->catchers);
  link_init(&rt->flights);
  link_init(&rt->handles);
  link_init(&rt->children);
  link_init(&rt->files);
  link_init(&rt->watchers);
  stdio_guard();
  rt->closed = false;
}

/* Whether there are descriptors for a loop: libuv ends the process when there are some, but too few. */
static bool has_descriptors(void) {
  int pipes[2][2], n = 0;
  while (n < 2 && pipe(pipes[n]) == 0) n++;
  for (int i = 0; i < n; i++) close(pipes[i][0]), close(pipes[i][1]);
  return n == 2;
}

/* libuv's loop is made when something is first waited for: a program that never does starts sooner */
uv_loop_t *loop_uv(struct runtime *rt) {
  if (!rt->loop_open) {
    if (rt->closed) return NULL;
    rt->loop_error = has_descriptors() ? uv_loop_init(&rt->loop) : UV_EMFILE;
    if (rt->loop_error < 0) return NULL;
    uv_timer_init(&rt->loop, &rt->timer);
    rt->loop_open = true;
  }
  return &rt->loop;
}

uv_loop_t *loop_check_uv(lua_State *L) {
  struct runtime *rt = runtime(L);
  shutdown_check(L, rt);
  if (loop_uv(rt) != NULL) return &rt->loop;
  io_push_error(L, rt->loop_error, "event loop", NULL);
  lua_error(L);
  return NULL;
}

/* ---- lists ---- */

void loop_remove(struct runtime *rt, struct task *t) {
  struct task *before = NULL, *at = rt->ready;
  while (at != t && at != NULL) before = at, at = at->next;
  t->flags &= (uint16_t)~TASK_LINKED;
  rt->removals++;
  if (at == NULL) return;
  *(before != NULL ? &before->next : &rt->ready) = t->next;
  if (rt->ready_last == t) rt->ready_last = before;
  t->next = NULL;
}

void loop_nudge(struct runtime *rt) {
  if (!rt->pumping || rt->nudge.flags & TASK_LINKED)
    return; /* else what is due comes first anyway */
  rt->nudge.tag = TAG_TASK | KIND_NUDGE;
  loop_ready(rt, &rt->nudge);
}

void loop_land(lua_State *L, struct runtime *rt, int i, struct task *t) {
  if (t->flags & TASK_LINKED || task_done(t)) return;
  task_hold(L, i, t);
  t->flags |= TASK_LINKED;
  t->next = NULL;
  if (rt->landing == NULL)
    rt->landing = t;
  else
    rt->landing_last->next = t;
  rt->landing_last = t;
}

/* Most are settled by their landing. Of some of these more may become known while they land; the others
** land only to run callbacks. */
static bool is_settled(const struct task *t) {
  switch (task_kind(t)) {
    case KIND_IO:
    case KIND_HANDLE:
    case KIND_CATCHER:
    case KIND_GATE:
    case KIND_SCOPE:
    case KIND_EXPIRY: return false;
    default: return true;
  }
}

/* [-0, +0, m] Until it has landed it counts as linked: a finalizer that runs meanwhile can neither link
** it again nor cancel it. If it fails for want of memory, which is before it has changed anything,
** land_again puts it back. */
static void land(lua_State *L, struct runtime *rt, struct task *t) {
  rt->lands = t;
  if (task_is(t, KIND_TICK)) { /* no object of Lua's */
    periodic_land(L, rt, t);
    rt->lands = NULL;
    return;
  }
  bool settled = is_settled(t);
  if (task_done(t) && settled) { /* it has been settled since it was linked */
    task_forget(L, t);
    rt->lands = NULL;
    return;
  }
  task_push(L, t);
  int i = lua_gettop(L);
  if (settled) t->flags |= TASK_LINKED;
  switch (task_kind(t)) {
    case KIND_DELAY: delay_land(L, i); break;
    case KIND_WAIT: wait_op_land(L, i); break;
    case KIND_IO: io_land(L, i); break;
    case KIND_HANDLE: handle_land(L, i); break;
    case KIND_SCOPE: scope_land(L, i); break;
    case KIND_EXPIRY: expiry_land(L, i); break;
    case KIND_FIBER: fiber_land(L, i); break;
    case KIND_CATCHER: signal_land(L, i); break;
    case KIND_IDLE: testing_land(L, i); break;
    case KIND_QUEUED:
    case KIND_SELECT: waiter_land(L, i); break;
    case KIND_PERIOD: periodic_wait_land(L, i); break;
    case KIND_GATE: lock_land(L, i); break;
    default: combine_land(L, i);
  }
  if (settled) t->flags &= (uint16_t)~TASK_LINKED;
  lua_settop(L, i - 1);
  rt->lands = NULL;
}

/* [-0, +0, -] a landing has failed: it is tried again on a later turn, before those that come after it */
static void land_again(struct runtime *rt) {
  struct task *t = rt->lands;
  rt->lands = NULL;
  if (t != NULL && is_settled(t)) t->flags &= (uint16_t)~TASK_LINKED;
  if (t != NULL && (task_is(t, KIND_TICK) || t->slot != 0)) loop_ready(rt, t);
  while ((t = rt->landing) != NULL) {
    rt->landing = t->next;
    t->flags &= (uint16_t)~TASK_LINKED;
    loop_ready(rt, t);
  }
}

static int lander(lua_State *L) {
  struct runtime *rt = runtime(L);
  while (rt->landing != NULL) {
    struct task *t = rt->landing;
    rt->landing = t->next;
    t->flags &= (uint16_t)~TASK_LINKED;
    land(L, rt, t);
  }
  return 0;
}

void loop_land_all(lua_State *L, struct runtime *rt) {
  if (rt->land_busy) return;
  struct task *outer = rt->lands;
  rt->land_busy = true;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LANDER);
  if (lua_pcall(L, 0, 0, 0) != LUA_OK) {
    lua_pop(L, 1); /* out of memory, which is not to be told to who completed something */
    land_again(rt);
  }
  rt->land_busy = false;
  rt->lands = outer;
}

/* ---- the pump ---- */

/* An operation of libuv's: whoever it wakes takes its place in the list, before those that became ready
** after it, and runs while what the landing has touched is at hand. Runs nothing of the user's but
** finalizers. */
static void land_in_place(lua_State *L, struct runtime *rt, struct task *t) {
  struct mark m = loop_mark(rt);
  land(L, rt, t);
  if (m.last == NULL || m.removals != rt->removals || m.last->next == NULL) return;
  rt->ready_last->next = rt->ready;
  rt->ready = m.last->next;
  rt->ready_last = m.last;
  m.last->next = NULL;
}

static void run_one(lua_State *L, struct runtime *rt) {
  struct task *t = rt->ready;
  loop_unready(rt, t);
  if (!task_is(t, KIND_FIBER)) {
    if (task_is(t, KIND_HANDLE) || task_is(t, KIND_IO))
      land_in_place(L, rt, t);
    else if (task_is(t, KIND_NUDGE))
      rt->slice = 0;
    else
      land(L, rt, t);
  } else if (t->flags & TASK_ABANDONED)
    fiber_end_abandoned(L, rt, (struct fiber *)t);
  else if (t->traits & TRAIT_SCHEDULED) /* perhaps not ours to run */
    schedule_run(L, rt, (struct fiber *)t);
  else if (t->flags & TASK_STARTED)
    fiber_run(L, rt, (struct fiber *)t);
  else
    fiber_start(L, rt, (struct fiber *)t);
}

static void run_slice(lua_State *L, struct runtime *rt, const struct task *until) {
  double start = 0;
  int every = LOOK, look = SLICE - LOOK;  /* at the clock: less often while tasks are short */
  if (rt->clock != CLOCK_REAL) look = -1; /* never */
  if (rt->seeded && rt->ready != NULL) {
    testing_choose(rt);
    look = SLICE; /* at who comes next: after each */
  }
  for (rt->slice = SLICE; rt->ready != NULL && rt->slice > 0;) {
    rt->slice--;
    run_one(L, rt);
    if ((until && task_done(until)) || rt->stopping || rt->signaled) return;
    if (rt->slice > look) continue;
    if (rt->seeded) {
      if (rt->ready != NULL) testing_choose(rt);
      continue;
    }
    double now = loop_real_now();
    if (start == 0)
      start = now;
    else if (now - start > SLICE_SECONDS)
      return;
    else if (now - start < SLICE_SECONDS / 16)
      every *= 2;
    look = rt->slice - every;
  }
}

static void run_ready(lua_State *L, struct runtime *rt, const struct task *until) {
  run_slice(L, rt, until);
  if (rt->probed) probe_tell(L, rt);
}

/* ---- driving ---- */

enum drive_end { DRIVE_DONE, DRIVE_DEAD, DRIVE_STOPPED, DRIVE_SIGNALED };

/* [-0, +0, e] turns until the task is complete (NULL: until nothing is left alive) */
static enum drive_end drive(lua_State *L, struct runtime *rt, const struct task *until) {
  for (;;) {
    if (until && (task_done(until) || fiber_is_lost(until))) return DRIVE_DONE;
    if (rt->stopping) return DRIVE_STOPPED;
    if (rt->signaled) return DRIVE_SIGNALED;
    bool ran = rt->ready != NULL;
    if (ran) run_ready(L, rt, until);
    if (until && task_done(until)) return DRIVE_DONE;
    timer_fire_due(L, rt);
    if (ran && rt->ready != NULL) poll_events(rt); /* not only when nothing is ready */
    if (rt->ready != NULL || rt->stopping || rt->signaled) continue;
    double now = loop_real_now();
    if (now - rt->last_trim > TRIM_SECONDS) {
      fiber_trim(L);
      periodic_trim(L, rt);
      rt->last_trim = now;
    }
    if (!poll_pass_time(rt)) return DRIVE_DEAD;
  }
}

/* [-0, +0, e] one turn; waits for an event only if nothing was ready, and if told to */
static void turn(lua_State *L, struct runtime *rt, bool wait) {
  timer_fire_due(L, rt);
  if (rt->ready == NULL) {
    if (wait)
      poll_pass_time(rt);
    else
      poll_events(rt);
    timer_fire_due(L, rt);
  }
  run_ready(L, rt, NULL);
}

/* [-0, +0, e] what is ready runs, and nothing is waited for but handles that are closing; whoever is ready
** again and again is not waited for either */
static void settle(lua_State *L, struct runtime *rt) {
  enum { SLICES = 10000 };
  for (int n = 0; n < SLICES && (n < 2 || rt->ready != NULL); n++) {
    run_ready(L, rt, NULL);
    timer_fire_due(L, rt);
    poll_events(rt);
  }
}

/* [-0, +0, e] the root of an operation, which is ready, runs once more though the loop has ended: what
** it has been given is its caller's */
static void run_alone(lua_State *L, struct runtime *rt, struct task *t) {
  if (!(t->flags & TASK_LINKED) || !(t->flags & TASK_STARTED) || t->flags & TASK_ABANDONED ||
      t->traits & TRAIT_SCHEDULED || task_done(t))
    return;
  loop_remove(rt, t);
  fiber_run(L, rt, (struct fiber *)t);
}

enum loop_mode { LOOP_DEFAULT, LOOP_ONCE, LOOP_NOWAIT, LOOP_SETTLE, LOOP_ALONE };

/* pump(task or nil, mode) under protection -> how it ended */
static int pump(lua_State *L) {
  struct runtime *rt = runtime(L);
  enum loop_mode mode = (enum loop_mode)lua_tointeger(L, 2);
  enum drive_end end = DRIVE_DONE;
  if (mode == LOOP_SETTLE)
    settle(L, rt);
  else if (mode == LOOP_ALONE)
    run_alone(L, rt, (struct task *)lua_touserdata(L, 1));
  else if (mode == LOOP_DEFAULT)
    end = drive(L, rt, (struct task *)lua_touserdata(L, 1));
  else
    turn(L, rt, mode == LOOP_ONCE);
  lua_pushinteger(L, end);
  return 1;
}

/* [-0, +0, e] the one place that enters the pump; the task at i, or 0 */
static enum drive_end enter(lua_State *L, int i, enum loop_mode mode) {
  struct runtime *rt = runtime(L);
  rt->pumping = true;
  if (mode != LOOP_ALONE) { /* else they are why, and to be told */
    rt->stopping = false;
    rt->signaled = 0;
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_PUMP); /* creates nothing: who has been queued is run */
  if (i != 0)
    lua_pushvalue(L, i);
  else
    lua_pushnil(L);
  lua_pushinteger(L, mode);
  int status = lua_pcall(L, 2, 1, 0);
  rt->pumping = false;
  if (rt->nudge.flags & TASK_LINKED) loop_remove(rt, &rt->nudge);
  if (status != LUA_OK) { /* out of memory, wherever it was: what ran then does so no more */
    rt->me = rt->outside;
    rt->depth = rt->hot = 0;
    rt->resetting = NULL;
    rt->level = NULL;
    rt->entering = NULL;
    rt->handoff = NULL;
    rt->land_busy = false;
    land_again(rt);
  }
  context_switched(L, rt, rt->outside);
  if (status != LUA_OK) lua_error(L);
  enum drive_end end = (enum drive_end)lua_tointeger(L, -1);
  lua_pop(L, 1);
  return end;
}

void loop_check_outside(lua_State *L, const char *what) {
  struct runtime *rt = runtime(L);
  shutdown_check(L, rt);
  if (rt->me != rt->outside)
    error_throw(L, ERROR_OPERATION,
                "%s inside a task would block the event loop: await the work instead", what);
  if (rt->pumping || rt->depth > 0)
    error_throw(
        L, ERROR_OPERATION,
        "%s inside a callback: the event loop is running already; start a task (flow.spawn)", what);
}

int loop_settle(lua_State *L) {
  loop_check_outside(L, "settle");
  enter(L, 0, LOOP_SETTLE);
  return 0;
}

/* [-0, +0, m] the root at index 1 is an operation whose caller learns that it has failed: it waits for
** nothing any more, lest it took what comes for somebody else */
static void withdraw(lua_State *L, struct runtime *rt, struct fiber *root) {
  if (!(root->task.flags & TASK_STARTED) && root->task.flags & TASK_LINKED) {
    loop_remove(rt, &root->task);
    lua_pushvalue(L, -1); /* that error; nobody looks */
    fiber_discard(L, rt, 1);
    return;
  }
  lua_pushliteral(L, "its caller has been told that it cannot end");
  scope_cancel(L, scope_own(L, rt, root), lua_gettop(L));
  lua_pop(L, 1);
  enter(L, 1, LOOP_ALONE); /* a condition takes its lock again */
  if (root->task.state == TASK_WAITING) fiber_abandon(L, 1, root); /* deaf to that */
}

static int run(lua_State *L, bool operation) {
  struct runtime *rt = runtime(L);
  loop_check_outside(L, "run");
  struct fiber *root = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  if (operation) scope_own(L, rt, root); /* so that what it begins can be canceled */
  enum drive_end end = DRIVE_DONE;
  if (!fiber_is_lost(&root->task)) { /* else a finalizer has closed its coroutine */
    loop_queue(rt, root);
    end = enter(L, 1, LOOP_DEFAULT);
  }
  if (fiber_is_lost(&root->task)) { /* somebody has closed its coroutine */
    fiber_settle_lost(L, 1);
    end = DRIVE_DONE;
  }
  if (end != DRIVE_DONE && operation) {
    enter(L, 1, LOOP_ALONE);
    if (task_done(&root->task)) end = DRIVE_DONE;
  }
  if (end == DRIVE_DONE) return task_push_outcome(L, 1, &root->task);
  root->task.flags |= TASK_OBSERVED; /* told now, not again when it is collected */
  if (operation) {                   /* it is known by who asked for it */
    blame_push_place(L, 1);
    lua_setfield(L, 1, "name");
  }
  if (end == DRIVE_DEAD)
    deadlock_push(L, rt, 1, operation);
  else if (end == DRIVE_SIGNALED) {
    error_push(L, ERROR_CANCELED, "interrupted by %s", signal_name(rt->signaled));
    lua_pushinteger(L, rt->signaled);
    lua_setfield(L, -2, "signal");
  } else
    error_push(L, ERROR_OPERATION, "the event loop was stopped by loop.stop");
  if (operation && !task_done(&root->task)) withdraw(L, rt, root);
  return lua_error(L);
}

int loop_run(lua_State *L) { return run(L, false); }
int loop_run_operation(lua_State *L) { return run(L, true); }

/* ---- Lua face ---- */

static int l_run(lua_State *L) {
  argument_callable(L, 1);
  return loop_run(L);
}

/* loop.run(mode) */
static int l_loop_run(lua_State *L) {
  static const char *const modes[] = {"default", "once", "nowait", NULL};
  struct runtime *rt = runtime(L);
  enum loop_mode mode = (enum loop_mode)luaL_checkoption(L, 1, "default", modes);
  loop_check_outside(L, "loop.run");
  enter(L, 0, mode);
  lua_pushboolean(L, poll_alive(rt));
  return 1;
}

static int l_loop_stop(lua_State *L) {
  runtime(L)->stopping = true;
  return 0;
}

static int l_loop_now(lua_State *L) {
  lua_pushnumber(L, loop_now(runtime(L)));
  return 1;
}

static int l_loop_is_alive(lua_State *L) {
  lua_pushboolean(L, poll_alive(runtime(L)));
  return 1;
}

/* watch_signals(bool) */
static int l_watch_signals(lua_State *L) {
  loop_check_uv(L);
  poll_watch_signals(runtime(L), lua_toboolean(L, 1));
  return 0;
}

static int l_loop_backend_fd(lua_State *L) {
  lua_pushinteger(L, uv_backend_fd(loop_check_uv(L)));
  return 1;
}

/* seconds until the loop has something to do; nil: only an event can tell */
static int l_loop_timeout(lua_State *L) {
  struct runtime *rt = runtime(L);
  double now = loop_now(rt);
  if (rt->ready != NULL)
    lua_pushnumber(L, 0);
  else if (!deadline_any(rt))
    lua_pushnil(L);
  else
    lua_pushnumber(L, fmax(deadline_next(rt) - now, 0));
  return 1;
}

static const luaL_Reg functions[] = {
    {"run", l_run}, {"watch_signals", l_watch_signals}, {NULL, NULL}};
static const luaL_Reg loop_functions[] = {{"run", l_loop_run},
                                          {"stop", l_loop_stop},
                                          {"now", l_loop_now},
                                          {"is_alive", l_loop_is_alive},
                                          {"backend_fd", l_loop_backend_fd},
                                          {"timeout", l_loop_timeout},
                                          {NULL, NULL}};

void loop_open(lua_State *L) {
  module_functions(L, functions);
  lua_newtable(L);
  module_functions(L, loop_functions);
  lua_setfield(L, -2, "loop");
  module_push_function(L, lander);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_LANDER);
  module_push_function(L, pump);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_PUMP);
}
