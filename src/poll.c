/*
** poll.c - what libuv has to tell, for how long to wait for that, and what is worth waiting for.
**
** Libuv's side of the pump; no Lua in this file.
**
** Deadlines are our own (deadline.c). One timer of libuv's bounds the wait for events: it is armed for
** the first of them, and stays so as long as that is the first.
**
** The loop is *alive* while something may still happen that nobody here has to do: a task is ready, a
** deadline is set, libuv has a request in hands, or a handle that is active and counts. Otherwise no
** wait would ever end: that is a deadlock, or the end of the program. A deadline does not count under a
** clock that stands.
**
** A virtual clock moves only when the loop is *idle*: no task is ready, no deadline is due, and nothing
** outside will end by itself (is_idle). Then it jumps to the next deadline, or stands until somebody
** moves it (testing.c).
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <math.h>
#include <signal.h>

#define LOOK_SECONDS 0.01

/* ---- turns of libuv's loop ---- */

/* Before 1.45, libuv runs timers first and waits for events then: a timer that fires before that wait
** (it was due at once, or a millisecond passed on the way there) would be forgotten. Stopped, it does
** not wait. */
static void on_timer(uv_timer_t *timer) { uv_stop(timer->loop); }

static void disarm(struct runtime *rt) {
  if (!rt->timer_armed) return;
  uv_timer_stop(&rt->timer);
  rt->timer_armed = false;
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

/* libuv looks at nothing while nothing keeps its loop alive. The signals that end a program do not:
** here they count. */
void poll_events(struct runtime *rt) {
  if (!rt->loop_open) return; /* nothing can have happened */
  for (int i = 0; rt->signals_open && i < 2; i++) uv_ref((uv_handle_t *)&rt->signals[i]);
  run_uv(rt, UV_RUN_NOWAIT);
  for (int i = 0; rt->signals_open && i < 2; i++) uv_unref((uv_handle_t *)&rt->signals[i]);
}

/* until libuv has something to tell, or the first deadline */
static void wait_for_event(struct runtime *rt) {
  if (deadline_any(rt) && rt->clock == CLOCK_REAL) {
    double due = deadline_look(rt);
    if (!rt->timer_armed || rt->timer_due != due) {
      arm(rt, due - loop_now(rt));
      rt->timer_due = due;
    }
  } else
    disarm(rt);
  run_uv(rt, UV_RUN_ONCE);
}

bool poll_until(struct runtime *rt, double end) {
  double left = end - loop_real_now();
  if (left <= 0) return false;
  uv_update_time(&rt->loop);
  uv_timer_start(&rt->timer, on_timer, (uint64_t)ceil(left * 1e3), 0);
  uv_run(&rt->loop, UV_RUN_ONCE);
  return true;
}

/* ---- what is worth waiting for ---- */

/* libuv waits for something */
static bool outside_alive(struct runtime *rt) {
  disarm(rt);
  return rt->loop_open && uv_loop_alive(&rt->loop);
}

bool poll_alive(struct runtime *rt) {
  return rt->ready != NULL || deadline_any(rt) || outside_alive(rt);
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
    unsigned jobs = 0;
    bool threads = jobs_work(rt, &jobs) || rt->loop.active_reqs.count > rt->patient + jobs;
    struct outside o = {threads, rt->patient + jobs > 0};
    uv_walk(&rt->loop, look_at, &o);
    double now = loop_real_now();
    if (o.work) {
      end = 0;
      if (threads)
        arm(rt, LOOK_SECONDS); /* one that comes to wait for what may never come tells nobody */
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

bool poll_pass_time(struct runtime *rt) {
  if (rt->idlers != NULL || (rt->clock == CLOCK_JUMPING && deadline_any(rt))) {
    if (is_idle(rt)) pass_virtual_time(rt);
    return true;
  }
  if (!(rt->clock == CLOCK_HELD ? outside_alive(rt) : poll_alive(rt))) return false;
  wait_for_event(rt);
  return true;
}

/* ---- signals ----
**
** Each of the two is watched for once. The system itself gives a signal back when it comes, so that a
** second one ends the process although the program computes for ever and nobody hears of the first. */

static void on_signal(uv_signal_t *handle, int number) {
  struct runtime *rt = container_of(handle->loop, struct runtime, loop);
  if (!signal_is_caught(rt, number))
    rt->signaled = number; /* else it is for whoever waits for it */
}

void poll_watch_signals(struct runtime *rt, bool on) {
  static const int numbers[] = {SIGINT, SIGTERM};
  for (int i = 0; i < 2; i++) {
    if (!rt->signals_open) {
      uv_signal_init(&rt->loop, &rt->signals[i]);
      uv_unref((uv_handle_t *)&rt->signals[i]);
    }
    if (on)
      uv_signal_start_oneshot(&rt->signals[i], on_signal, numbers[i]);
    else
      uv_signal_stop(&rt->signals[i]);
  }
  rt->signals_open = true;
}
