/*
** loop.c - the ready list, the pump, run, time, shutdown.
**
** One turn of the pump:
**
**     ready      tasks are resumed or landed, first in first out: until none is left, but no longer
**                than SLICE tasks, those that are run in place included, or about a millisecond
**     timers     what is due moves to the ready list
**     libuv      polled without waiting while tasks are ready; else until the next deadline
**
** so neither a burst of ready tasks nor one of events starves the other. The pump is an ordinary C
** function called under protection by loop_run and loop.run only, outside every libuv callback:
** nothing that Lua raises, and no os.exit in a task, ever unwinds through libuv.
**
** Time is loop_now: monotonic, or virtual. A virtual clock moves only when the loop is idle: no task is
** ready, no deadline is due, and nothing outside will end by itself (is_idle). Then it jumps to the next
** deadline, or stands until somebody moves it. That, and which ready task comes first, is all that a
** test changes (testing.c); the real clock is not looked at then, so that a test takes one course.
**
** Landing: an operation that completes while another task is settled, or a token canceled, lands at
** the end of that, not on a later turn, in order and without recursion.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <dlfcn.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>

enum { SLICE = 256, LOOK = 16 };
#define SLICE_SECONDS 0.001
#define TRIM_SECONDS 1.0
/* to send what was written, and again for threads to let go, when a state closes */
#define CLOSE_SECONDS 2.0

/* ---- time ---- */

double loop_now(struct runtime *rt) {
  return rt->clock != CLOCK_REAL ? rt->virtual_now : (double)uv_hrtime() / 1e9;
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

/* of most its landing is the end; of these more may become known while they land */
static bool lands_again(const struct task *t) {
  return task_is(t, KIND_IO) || task_is(t, KIND_HANDLE) || task_is(t, KIND_CATCHER) ||
         task_is(t, KIND_GATE);
}

/* [-0, +0, m] Until it has landed it counts as linked: a finalizer that runs meanwhile can neither link it again nor
** cancel it. If it fails for want of memory, which is before it has changed anything, land_again puts it back. */
static void land(lua_State *L, struct runtime *rt, struct task *t) {
  rt->lands = t;
  if (task_is(t, KIND_TICK)) { /* no object of Lua's */
    periodic_land(L, rt, t);
    rt->lands = NULL;
    return;
  }
  bool again = lands_again(t);
  if (task_done(t) && !again) { /* it has been settled since it was linked */
    task_forget(L, t);
    rt->lands = NULL;
    return;
  }
  task_push(L, t);
  int i = lua_gettop(L);
  if (!again) t->flags |= TASK_LINKED;
  switch (task_kind(t)) {
    case KIND_DELAY: delay_land(L, i); break;
    case KIND_WAIT: wait_op_land(L, i); break;
    case KIND_IO: io_land(L, i); break;
    case KIND_HANDLE: handle_land(L, i); break;
    case KIND_EXPIRY: expiry_land(L, i); break;
    case KIND_FIBER: group_discard(L, i); break;
    case KIND_CATCHER: signal_land(L, i); break;
    case KIND_IDLE: testing_land(L, i); break;
    case KIND_QUEUED:
    case KIND_SELECT: waiter_land(L, i); break;
    case KIND_PERIOD: periodic_wait_land(L, i); break;
    case KIND_GATE: lock_land(L, i); break;
    default: combine_land(L, i);
  }
  if (!again) t->flags &= (uint16_t)~TASK_LINKED;
  lua_settop(L, i - 1);
  rt->lands = NULL;
}

/* [-0, +0, -] a landing has failed: it is tried again on a later turn, before those that come after it */
static void land_again(struct runtime *rt) {
  struct task *t = rt->lands;
  rt->lands = NULL;
  if (t != NULL && !lands_again(t)) t->flags &= (uint16_t)~TASK_LINKED;
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
  if (lua_pcall(L, 0, 0, 0) !=
      LUA_OK) { /* out of memory, which is not to be told to who completed something */
    lua_pop(L, 1);
    land_again(rt);
  }
  rt->land_busy = false;
  rt->lands = outer;
}

/* ---- the pump ---- */

/* An operation of libuv's, or a delay: whoever it wakes takes its place in the list, before those that became ready
** after it, and runs while what the landing has touched is at hand. Runs nothing of the user's but finalizers. */
static void land_in_place(lua_State *L, struct runtime *rt, struct task *t) {
  struct task *last = rt->ready != NULL ? rt->ready_last : NULL;
  unsigned removals = rt->removals;
  land(L, rt, t);
  if (last == NULL || rt->removals != removals || last->next == NULL) return;
  rt->ready_last->next = rt->ready;
  rt->ready = last->next;
  rt->ready_last = last;
  last->next = NULL;
}

static void run_one(lua_State *L, struct runtime *rt) {
  struct task *t = rt->ready;
  loop_unready(rt, t);
  if (!task_is(t, KIND_FIBER)) {
    if (task_is(t, KIND_HANDLE) || task_is(t, KIND_IO) || task_is(t, KIND_DELAY))
      land_in_place(L, rt, t);
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

static void run_ready(lua_State *L, struct runtime *rt, const struct task *until) {
  double start = 0;
  int every = LOOK,
      look = SLICE - LOOK; /* at the clock: less and less often while tasks are short */
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
    double now = (double)uv_hrtime() / 1e9;
    if (start == 0)
      start = now;
    else if (now - start > SLICE_SECONDS)
      return;
    else if (now - start < SLICE_SECONDS / 16)
      every *= 2;
    look = rt->slice - every;
  }
}

/* ---- libuv side: no Lua below this line until the Lua face ---- */

/* libuv's loop is made when something is first waited for: a program that never does starts sooner */
uv_loop_t *loop_uv(struct runtime *rt) {
  if (!rt->loop_open) {
    rt->loop_error = uv_loop_init(&rt->loop);
    if (rt->loop_error < 0) return NULL;
    uv_timer_init(&rt->loop, &rt->timer);
    rt->loop_open = true;
  }
  return &rt->loop;
}

/* Before 1.45, libuv runs timers first and waits for events then: a timer that fires before that wait (it
** was due at once, or a millisecond passed on the way there) would be forgotten. Stopped, it does not wait. */
static void on_timer(uv_timer_t *timer) { uv_stop(timer->loop); }

static void on_signal(uv_signal_t *handle, int number) {
  struct runtime *rt =
      (struct runtime *)(void *)((char *)handle->loop - offsetof(struct runtime, loop));
  rt->signaled = number;
}

static void disarm(struct runtime *rt) {
  if (!rt->timer_armed) return;
  uv_timer_stop(&rt->timer);
  rt->timer_armed = false;
}

/* libuv waits for something */
static bool outside_alive(struct runtime *rt) {
  disarm(rt);
  return rt->loop_open && uv_loop_alive(&rt->loop);
}

/* something may still happen that nobody here has to do */
static bool is_alive(struct runtime *rt) {
  return rt->ready != NULL || deadline_any(rt) || outside_alive(rt);
}

static void arm(struct runtime *rt, double seconds) {
  if (loop_uv(rt) == NULL) return;
  uint64_t ms = seconds <= 0 ? 0 : seconds > 1e9 ? (uint64_t)1e12 : (uint64_t)ceil(seconds * 1e3);
  uv_update_time(&rt->loop);
  uv_timer_start(&rt->timer, on_timer, ms, 0);
  rt->timer_armed = true;
}

static void run_uv(struct runtime *rt, uv_run_mode mode) {
  if (loop_uv(rt) == NULL) { /* no descriptor for it: deadlines need none */
    if (mode != UV_RUN_NOWAIT) uv_sleep(1);
    return;
  }
  uv_run(&rt->loop, mode);
  if (!uv_is_active((uv_handle_t *)&rt->timer)) rt->timer_armed = false;
}

static void poll(struct runtime *rt, bool wait) {
  if (wait && deadline_any(rt) && rt->clock == CLOCK_REAL) {
    double due = deadline_look(rt);
    if (!rt->timer_armed || rt->timer_due != due) {
      arm(rt, due - loop_now(rt));
      rt->timer_due = due;
    }
  } else if (wait)
    disarm(rt);
  if (!wait && !rt->loop_open) return; /* nothing can have happened */
  run_uv(rt, wait ? UV_RUN_ONCE : UV_RUN_NOWAIT);
}

/* what libuv waits for: work ends by itself, an event may never come */
struct outside {
  bool work, events;
};

static void look_at(uv_handle_t *h, void *arg) {
  struct outside *o = (struct outside *)arg;
  if (!uv_is_active(h) || !uv_has_ref(h) || uv_is_closing(h)) return;
  if (h->type == UV_PROCESS)
    o->work = true;
  else
    o->events = true;
}

/* Nothing is ready, and under a virtual clock nothing is to move before all is done: true when it is.
** Work in flight is waited for; what may wait for ever, until it was quiet for some real time. False:
** look again. */
static bool is_idle(struct runtime *rt) {
  double end = 0;
  while (rt->ready == NULL && !rt->signaled) {
    if (!outside_alive(rt)) return true;
    struct outside o = {rt->loop.active_reqs.count > rt->patient, rt->patient > 0};
    uv_walk(&rt->loop, look_at, &o);
    double now = (double)uv_hrtime() / 1e9;
    if (o.work) {
      end = 0;
      run_uv(rt, UV_RUN_ONCE);
    } else if (!o.events) { /* handles that are closing: they need a turn */
      run_uv(rt, UV_RUN_NOWAIT);
    } else if (end == 0 || now < end) {
      if (end == 0) end = now + rt->quiet;
      arm(rt, end - now);
      run_uv(rt, UV_RUN_ONCE);
    } else
      return true;
  }
  return false;
}

/* the loop is idle: a test's clock moves, or whoever waited for that goes on */
static void pass_virtual_time(struct runtime *rt) {
  struct task *t = rt->idlers;
  if (t != NULL) {
    rt->idlers = t->next;
    t->flags &= (uint16_t)~TASK_LINKED;
    loop_ready(rt, t);
  } else
    rt->virtual_now = fmax(rt->virtual_now, deadline_next(rt));
}

/* nothing is ready: let time pass. False when nothing can ever happen. */
static bool pass_time(struct runtime *rt) {
  if (rt->idlers != NULL || (rt->clock == CLOCK_JUMPING && deadline_any(rt))) {
    if (is_idle(rt)) pass_virtual_time(rt);
    return true;
  }
  if (!(rt->clock == CLOCK_HELD ? outside_alive(rt) : is_alive(rt))) return false;
  poll(rt, true);
  return true;
}

static void on_close(uv_handle_t *handle) { (void)handle; }

static void close_any(uv_handle_t *handle, void *timer) {
  if (handle != timer && !uv_is_closing(handle)) uv_close(handle, on_close);
}

void loop_init(struct runtime *rt) {
  link_init(&rt->catchers);
  link_init(&rt->flights);
  link_init(&rt->handles);
  link_init(&rt->children);
  stdio_guard();
  rt->closed = false;
}

/* one turn of libuv's; false: it is later than `end` */
static bool turn_until(struct runtime *rt, double end) {
  double left = end - (double)uv_hrtime() / 1e9;
  if (left <= 0) return false;
  uv_timer_start(&rt->timer, on_timer, (uint64_t)ceil(left * 1e3), 0);
  uv_run(&rt->loop, UV_RUN_ONCE);
  return true;
}

/* Lets the standard streams send what they have. Then cancels what libuv has in hands and waits until it has let
** go, but not for ever: false if a thread of its pool is stuck in a system call, and may still write where it was
** told to. */
static bool close_uv(struct runtime *rt) {
  uv_handle_t *timer = (uv_handle_t *)&rt->timer;
  double start = (double)uv_hrtime() / 1e9;
  uv_unref(timer); /* it bounds each wait, and is no reason for one */
  while (stdio_sends(rt) && turn_until(rt, start + CLOSE_SECONDS)) continue;
  io_abort_all(rt);
  uv_ref(timer); /* nothing else may be a reason to poll for the end of children */
  process_end_all(rt);
  uv_unref(timer);
  start = (double)uv_hrtime() / 1e9;
  handle_close_all(rt);
  uv_walk(&rt->loop, close_any, timer);
  while (uv_loop_alive(&rt->loop) && turn_until(rt, start + CLOSE_SECONDS)) continue;
  if (uv_loop_alive(&rt->loop)) return false;
  uv_close(timer, on_close);
  uv_run(&rt->loop, UV_RUN_DEFAULT);
  return uv_loop_close(&rt->loop) == 0;
}

/* An allocator that frees nothing any more. */
struct keeper {
  lua_Alloc alloc;
  void *ud;
};

static void *keep(void *ud, void *block, size_t old, size_t size) {
  const struct keeper *k = (const struct keeper *)ud;
  return size == 0 ? NULL : k->alloc(k->ud, block, old, size);
}

/* [-0, +0, -] The memory of a state that a thread may still write to is given up, all of it, and the code
** that it runs stays loaded. */
static void keep_memory(lua_State *L, lua_Alloc alloc, void *ud) {
  static const char anything;
  Dl_info here;
  if (dladdr(&anything, &here) != 0) dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
  struct keeper *k = (struct keeper *)alloc(ud, NULL, 0, sizeof *k);
  fprintf(stderr, "coflow: closed while a system call is stuck in a thread: nothing is freed\n");
  if (k == NULL) return;
  *k = (struct keeper){alloc, ud};
  lua_setallocf(L, keep, k);
}

/* ---- driving ---- */

enum drive_end { DRIVE_DONE, DRIVE_DEAD, DRIVE_STOPPED, DRIVE_SIGNALED };

/* [-0, +0, e] turns until the task is complete (NULL: until nothing is left alive) */
static enum drive_end drive(lua_State *L, struct runtime *rt, const struct task *until) {
  for (;;) {
    if (until && (task_done(until) || fiber_is_lost(until))) return DRIVE_DONE;
    if (rt->stopping) return DRIVE_STOPPED;
    if (rt->signaled) return DRIVE_SIGNALED;
    if (rt->ready != NULL) {
      run_ready(L, rt, until);
      if (until && task_done(until)) return DRIVE_DONE;
      timer_fire_due(L, rt);
      if (rt->ready != NULL) {
        poll(rt, false);
        continue;
      }
    }
    timer_fire_due(L, rt);
    if (rt->ready != NULL) continue;
    double now = (double)uv_hrtime() / 1e9;
    if (now - rt->last_trim > TRIM_SECONDS) {
      fiber_trim(L);
      periodic_trim(L, rt);
      rt->last_trim = now;
    }
    if (!pass_time(rt)) return DRIVE_DEAD;
  }
}

/* [-0, +0, e] one turn; waits for an event only if nothing was ready, and if told to */
static void turn(lua_State *L, struct runtime *rt, bool wait) {
  timer_fire_due(L, rt);
  if (rt->ready == NULL) {
    if (wait)
      pass_time(rt);
    else
      poll(rt, false);
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
    poll(rt, false);
  }
}

void loop_push_wait(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  const char *place = f->task.flags & TASK_STARTED ? "at ?" : "not started",
             *what = "waits for ever";
  int top = lua_gettop(L);
  if (f->task.traits & TRAIT_HANDED)
    what = "waits to be run by its scheduler or synchronization context,";
  else if (f->task.state == TASK_QUEUED)
    what = "is ready";
  else if (!fiber_naps(f) && fiber_push_awaited(L, f)) {
    task_push_name(L, -1);
    what = lua_pushfstring(L, "waits for '%s'", lua_tostring(L, -1));
  } else if (fiber_naps(f) && f->u.nap.pos != 0 && waiter_push_name(L, f))
    what = lua_pushfstring(L, "waits for %s", lua_tostring(L, -1));
  else if (fiber_naps(f) && deadline_is_set(&f->u.nap.deadline))
    what = "sleeps";
  if (f->co != NULL && f->task.flags & TASK_STARTED) {
    fiber_push_place(L, f);
    place = lua_pushfstring(L, "at %s", lua_tostring(L, -1));
  }
  lua_pushfstring(L, "%s %s", what, place);
  lua_insert(L, top + 1);
  lua_settop(L, top + 1);
}

/* [-0, +1, m] what waits where, a line each */
static void push_report(lua_State *L) {
  enum { LINES = 30 };
  int lines = 0, more = 0;
  luaL_checkstack(L, 20, NULL);
  lua_newtable(L);
  int list = lua_gettop(L);
  lua_Integer n = (lua_Integer)lua_rawlen(L, UP_ANCHORS);
  for (lua_Integer slot = 2; slot <= n; slot++, lua_settop(L, list)) {
    lua_rawgeti(L, UP_ANCHORS, slot);
    bool parked = lua_islightuserdata(L, -1); /* else it sleeps, under a clock that stands */
    struct task *t =
        parked ? (struct task *)lua_touserdata(L, -1) : (struct task *)object_test(L, -1, TAG_TASK);
    if (t == NULL || !task_is(t, KIND_FIBER)) continue;
    if (!(t->traits & TRAIT_HANDED) && !(t->flags & TASK_STARTED && t->state == TASK_WAITING))
      continue;
    task_push(L, t);
    if (lua_isnil(L, -1)) continue; /* somebody is closing its coroutine */
    if (++lines > LINES) {
      more++;
      continue;
    }
    task_push_name(L, -1); /* … task name */
    loop_push_wait(L, -2);
    lua_pushfstring(L, "\n\ttask '%s' %s", lua_tostring(L, -2), lua_tostring(L, -1));
    lua_rawseti(L, list, lines);
  }
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  for (int i = 1; i <= lines - more; i++) {
    lua_rawgeti(L, list, i);
    luaL_addvalue(&b);
  }
  if (more > 0) {
    lua_pushfstring(L, "\n\t… and %d more", more);
    luaL_addvalue(&b);
  }
  luaL_pushresult(&b);
  lua_remove(L, list);
}

enum loop_mode { LOOP_DEFAULT, LOOP_ONCE, LOOP_NOWAIT, LOOP_SETTLE };

/* pump(task or nil, mode) under protection -> how it ended */
static int pump(lua_State *L) {
  struct runtime *rt = runtime(L);
  enum loop_mode mode = (enum loop_mode)lua_tointeger(L, 2);
  enum drive_end end = DRIVE_DONE;
  if (mode == LOOP_SETTLE)
    settle(L, rt);
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
  rt->stopping = false;
  rt->signaled = 0;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_PUMP); /* creates nothing: who has been queued is run */
  if (i != 0)
    lua_pushvalue(L, i);
  else
    lua_pushnil(L);
  lua_pushinteger(L, mode);
  int status = lua_pcall(L, 2, 1, 0);
  rt->pumping = false;
  if (status != LUA_OK) { /* out of memory, wherever it was: what ran then does so no more */
    rt->me = rt->outside;
    rt->depth = rt->hot = rt->resetting = 0;
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

int loop_run(lua_State *L) {
  struct runtime *rt = runtime(L);
  loop_check_outside(L, "run");
  struct fiber *root = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  loop_queue(rt, root);
  enum drive_end end = enter(L, 1, LOOP_DEFAULT);
  if (fiber_is_lost(&root->task)) { /* somebody has closed its coroutine */
    fiber_settle_lost(L, 1);
    end = DRIVE_DONE;
  }
  switch (end) {
    case DRIVE_DONE: return task_push_outcome(L, 1, &root->task);
    case DRIVE_DEAD:
      root->task.flags |= TASK_OBSERVED; /* told now, not again when it is collected */
      push_report(L);
      if (rt->clock == CLOCK_HELD && deadline_any(rt))
        return error_throw(
            L, ERROR_OPERATION,
            "deadlock: no task is ready, and the fake clock never advances: it stands at "
            "%f, the next deadline is at %f%s",
            (LUAI_UACNUMBER)rt->virtual_now, (LUAI_UACNUMBER)deadline_next(rt),
            lua_tostring(L, -1));
      return error_throw(
          L, ERROR_OPERATION,
          "deadlock: no task is ready, and no timer, request or handle is alive that "
          "could complete one%s",
          lua_tostring(L, -1));
    case DRIVE_SIGNALED:
      root->task.flags |= TASK_OBSERVED;
      error_push(L, ERROR_CANCELED, "interrupted by signal %d", rt->signaled);
      lua_pushinteger(L, rt->signaled);
      lua_setfield(L, -2, "signal");
      return lua_error(L);
    default:
      root->task.flags |= TASK_OBSERVED;
      return error_throw(L, ERROR_OPERATION, "the event loop was stopped by loop.stop");
  }
}

/* [-0, +0, -] at the end of the state: no finalizer of a fiber runs after this one */
void loop_close(lua_State *L, struct runtime *rt) {
  void *ud;
  lua_Alloc alloc = lua_getallocf(L, &ud);
  rt->closed = true;
  if (rt->loop_open) {
    bool clean = close_uv(rt);
    io_release_all(rt);
    if (!clean)
      keep_memory(L, alloc, ud);
    else {
      signal_free(L, rt);
      read_free(rt);
    }
  }
  alloc(ud, rt->idle, rt->idle_size * sizeof *rt->idle, 0);
  if (rt->births) testing_forget(L, rt);
  if (rt->ready || rt->idle_ticks) periodic_close(L, rt);
  deadline_close(L, rt);
  rt->idle = NULL;
  rt->idle_count = 0;
}

/* ---- Lua face ---- */

static int l_run(lua_State *L) {
  module_check_callable(L, 1);
  return loop_run(L);
}

/* loop.run(mode) */
static int l_loop_run(lua_State *L) {
  static const char *const modes[] = {"default", "once", "nowait", NULL};
  struct runtime *rt = runtime(L);
  enum loop_mode mode = (enum loop_mode)luaL_checkoption(L, 1, "default", modes);
  loop_check_outside(L, "loop.run");
  enter(L, 0, mode);
  lua_pushboolean(L, is_alive(rt));
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
  lua_pushboolean(L, is_alive(runtime(L)));
  return 1;
}

uv_loop_t *loop_check_uv(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (loop_uv(rt) != NULL) return &rt->loop;
  io_push_error(L, rt->loop_error, "event loop", NULL);
  lua_error(L);
  return NULL;
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

/* watch_signals(bool): SIGINT and SIGTERM end the pump; the handles do not keep the loop alive */
static int l_watch_signals(lua_State *L) {
  struct runtime *rt = runtime(L);
  static const int numbers[] = {SIGINT, SIGTERM};
  bool on = lua_toboolean(L, 1);
  for (int i = 0; i < 2; i++) {
    if (!rt->signals_open) {
      uv_signal_init(loop_check_uv(L), &rt->signals[i]);
      uv_unref((uv_handle_t *)&rt->signals[i]);
    }
    if (on)
      uv_signal_start(&rt->signals[i], on_signal, numbers[i]);
    else
      uv_signal_stop(&rt->signals[i]);
  }
  rt->signals_open = true;
  return 0;
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
