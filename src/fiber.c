/*
** fiber.c - tasks whose body is a Lua function: start, run, suspend, await.
**
** A fiber runs in a coroutine of its own. Coroutines are reused: an idle one has a fixed bottom
**
**     [watch] [fiber_main] [fiber_trace]
**
** on which a new fiber puts the call  fiber_main(task, fn, trace, fn, arguments …). The body runs
** under a protected call *inside* the coroutine, so that `<close>` variables run, and may await,
** while an error unwinds; a coroutine that an error did leave is not used again.
**
** Starting. spawn queues; an async function starts hot: its fiber runs on top of the caller, up to
** its first suspension. C calls nest at most MAX_DEPTH deep that way. Beyond, the caller yields with
** a *handoff*: whoever resumed it runs the child first and then the caller, in a loop, so that the
** depth of recursion is bounded by memory only.
**
** An await of a task that is queued, not started and the only one ready runs it in place: the same
** order as through the ready list, without two switches. Not while a hot start below waits to go on as
** soon as its callee suspends (rt->hot).
**
** Parking. A fiber that waits for a task has that task at index 1 of the C function that suspended
** it, and lives by it (core.h, rule 2). The *watch* at the bottom of its coroutine has a finalizer:
** when the two die together the fiber is abandoned, is reported, and its `<close>` variables run on
** a later turn. Any other finalizer that may run first only makes objects inert, so closing them
** afterwards is harmless. The watch is to be closed as well: so we know when somebody else, who has got hold
** of the coroutine, closes it. The task then fails, or, when only that stack knew it, is let go.
**
** SPDX-License-Identifier: MIT
*/
#include "waiter.h"

#include <math.h>
#include <string.h>

enum { BOTTOM = 3, MAX_DEPTH = 16, HARD_DEPTH = 50, MIN_IDLE = 64 };
enum { WATCH_COROUTINE = 1 };
enum { BODY_TASK = 1, BODY_LABEL, BODY_TRACE, BODY_RESULTS }; /* arguments of fiber_main */

/* ---- coroutines ---- */

/* makes room for one more idle coroutine; false without memory */
static bool idle_room(lua_State *L, struct runtime *rt) {
  if (rt->idle_count < rt->idle_size) return true;
  void *ud;
  lua_Alloc alloc = lua_getallocf(L, &ud);
  size_t size = rt->idle_size ? rt->idle_size * 2 : MIN_IDLE;
  struct idle *idle =
      (struct idle *)alloc(ud, rt->idle, rt->idle_size * sizeof *idle, size * sizeof *idle);
  if (idle == NULL) return false;
  rt->idle = idle;
  rt->idle_size = size;
  return true;
}

/* [-0, +0, m] adds a coroutine to the idle ones */
static void idle_grow(lua_State *L, struct runtime *rt) {
  if (!idle_room(L, rt)) luaL_error(L, "not enough memory");
  lua_State *co = lua_newthread(L);
  lua_newuserdatauv(L, 0, 1); /* co watch: no tag, to be small; it is told by its metatable */
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_WATCH));
  lua_setmetatable(L, -2);
  lua_pushvalue(L, -2);
  lua_setiuservalue(L, -2, WATCH_COROUTINE);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_MAIN);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_TRACE);
  lua_xmove(L, co, BOTTOM);
  lua_toclose(co, 1);
  int slot = slots_add(L, UP_ANCHORS, &rt->free_slot);
  rt->idle[rt->idle_count++] = (struct idle){co, slot};
}

/* false when somebody who kept the coroutine of a task has resumed or closed it since */
static bool is_idle(lua_State *co) { return lua_gettop(co) == BOTTOM && lua_status(co) == LUA_OK; }

/* the coroutine of a fiber that ended well goes back to the idle ones, or is dropped */
static void recycle(lua_State *L, struct runtime *rt, lua_State *co, int slot, bool held) {
  rt->busy--;
  if ((rt->idle_count < MIN_IDLE || rt->idle_count + rt->busy < rt->busy_peak) &&
      idle_room(L, rt)) {
    if (held) { /* else the slot holds it already */
      lua_pushthread(co);
      lua_xmove(co, L, 1);
      lua_rawseti(L, UP_ANCHORS, slot);
    }
    rt->idle[rt->idle_count++] = (struct idle){co, slot};
  } else
    slots_free(L, UP_ANCHORS, &rt->free_slot, slot);
}

void fiber_trim(lua_State *L) {
  struct runtime *rt = runtime(L);
  size_t keep = rt->busy_peak > rt->busy ? rt->busy_peak - rt->busy : 0;
  if (keep < MIN_IDLE) keep = MIN_IDLE;
  while (rt->idle_count > keep)
    slots_free(L, UP_ANCHORS, &rt->free_slot, rt->idle[--rt->idle_count].slot);
  rt->busy_peak = rt->busy;
}

/* ---- the bottom of a coroutine, seen from outside ---- */

/* [-0, +1, -] an argument of fiber_main, on whose coroutine anything may be going on; or nil */
static void push_argument(lua_State *L, lua_State *co, int n) {
  lua_Debug ar;
  int low = -1, high = 3; /* mostly: what suspends, the function, fiber_main */
  if (co == NULL || !lua_checkstack(co, 1)) {
    lua_pushnil(L);
    return;
  }
  if (co != L && lua_status(co) == LUA_OK &&
      !lua_getstack(co, 0, &ar)) { /* not started: it lies below the call */
    if (lua_gettop(co) <= BOTTOM)
      lua_pushnil(co);
    else
      lua_pushvalue(co, BOTTOM + 1 + n);
  } else {
    while (lua_getstack(co, high, &ar)) low = high, high *= 2;
    int middle = high - 1;
    for (; high - low > 1; middle = low + (high - low) / 2) { /* the outermost level lies between */
      if (lua_getstack(co, middle, &ar))
        low = middle;
      else
        high = middle;
    }
    /* `ar` is of the last level that was found, which is low: nothing was found above it since */
    if (low < 0 || lua_getlocal(co, &ar, n) == NULL) lua_pushnil(co);
  }
  if (co != L) lua_xmove(co, L, 1);
}

void fiber_push(lua_State *L, struct fiber *f) { push_argument(L, f->co, BODY_TASK); }

bool fiber_push_awaited(lua_State *L, struct fiber *f) {
  bool started = f->task.flags & TASK_STARTED; /* else a continuation: it is the last argument */
  lua_State *co = f->co;
  if (started && co != NULL) /* it stands where the innermost coroutine does */
    for (lua_State *inner; (inner = coroutine_inner(co, NULL)) != NULL;) co = inner;
  if (co == NULL || !lua_checkstack(co, 1) || (!started && lua_gettop(co) <= BOTTOM))
    lua_pushnil(L);
  else {
    lua_pushvalue(co, started ? 1 : -1);
    if (co != L) lua_xmove(co, L, 1);
  }
  if (lua_touserdata(L, -1) == (void *)f->u.wait.on) return true;
  lua_pop(L, 1); /* somebody has closed the coroutine */
  lua_pushnil(L);
  return false;
}

void fiber_hold(lua_State *L, int i, struct fiber *f) {
  if (f->task.flags & TASK_HELD || f->co == NULL) return;
  i = lua_absindex(L, i);
  if (f->task.label == LABEL_NOBODY) f->task.label = 0;
  lua_pushthread(f->co);
  if (f->co != L) lua_xmove(f->co, L, 1);
  lua_setiuservalue(L, i, TASK_RESULT);
  f->task.flags |= TASK_HELD;
}

/* ---- labels ---- */

/* [-1, +0, m] sets the label of t, "file:line" of the function on top; the few labels that are used
** again and again are found by a look */
static void label(lua_State *L, struct task *t) {
  struct runtime *rt = runtime(L);
  lua_Debug ar;
  lua_getinfo(L, ">S", &ar);
  size_t at = ((size_t)ar.linedefined * 31 + (size_t)(uintptr_t)ar.source / 16) % LABEL_CACHE;
  struct label_cache *c = &rt->labels[at];
  if (c->label == 0 || c->line != ar.linedefined || strcmp(c->source, ar.short_src) != 0) {
    if (ar.linedefined > 0)
      lua_pushfstring(L, "%s:%d", ar.short_src, ar.linedefined);
    else
      lua_pushstring(L, ar.short_src);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LABELS); /* text labels */
    lua_pushvalue(L, -2);
    if (lua_rawget(L, -2) == LUA_TNIL) {
      lua_pushvalue(L, -3);
      lua_rawseti(L, -3, ++rt->label_count);
      lua_pushvalue(L, -3);
      lua_pushinteger(L, rt->label_count);
      lua_rawset(L, -4);
      c->label = rt->label_count;
    } else
      c->label = (uint32_t)lua_tointeger(L, -1);
    lua_pop(L, 3);
    c->line = ar.linedefined;
    memcpy(c->source, ar.short_src, sizeof c->source);
  }
  t->label = c->label;
}

void fiber_name(lua_State *L, struct fiber *f) {
  lua_xmove(L, f->co, 1);
  lua_replace(f->co, BOTTOM + 1 + BODY_LABEL);
}

void fiber_label(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  if (f->co == NULL)
    lua_getiuservalue(L, i, TASK_CONTEXT); /* complete: see keep_name */
  else
    push_argument(L, f->co, BODY_LABEL);
  if (lua_isfunction(L, -1))
    label(L, &f->task);
  else
    lua_pop(L, 1);
}

/* A task that ends must not keep what its function refers to, but tell its name: a function without
** upvalues, save the globals, is kept instead of a label, which costs less. */
static void keep_name(lua_State *L, struct task *t) {
  if (t->label != 0) {
    if (t->label != LABEL_NOBODY || t->state == TASK_SUCCEEDED) return;
    t->label = 0; /* an error is to be reported */
  }
  if (!lua_isfunction(L, BODY_LABEL)) return;
  bool plain = lua_getupvalue(L, BODY_LABEL, 1) == NULL;
  if (!plain) lua_pop(L, 1);
  lua_pushvalue(L, BODY_LABEL);
  if (plain)
    lua_setiuservalue(L, BODY_TASK, TASK_CONTEXT);
  else
    label(L, t);
}

/* ---- the body ---- */

static int finish(lua_State *L, struct runtime *rt, struct fiber *f, int status) {
  if (f->task.traits & TRAIT_CHILD) group_child_ended(L, rt, f, status <= LUA_YIELD);
  if (status <= LUA_YIELD)
    task_succeed(L, rt, BODY_TASK, &f->task, lua_gettop(L) - BODY_TRACE);
  else
    task_settle_error(L, rt, BODY_TASK, 0);
  keep_name(L, &f->task);
  scope_end_task(L, rt, f);
  return 0;
}

static int main_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  struct fiber *f = (struct fiber *)lua_touserdata(L, BODY_TASK);
  (void)ctx;
  if (task_done(&f->task)) return 0;
  return finish(L, rt, f, status);
}

/* fiber_main(task, fn, trace, fn, arguments …) */
static int fiber_main(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *f = rt->starting;
  if (f == NULL)
    return luaL_error(L, "the body of a task is not to be called"); /* found by debug */
  rt->starting = NULL;
  int status = lua_pcallk(L, lua_gettop(L) - BODY_RESULTS, LUA_MULTRET, BODY_TRACE, 0, main_k);
  return finish(L, rt, f, status);
}

struct fiber *fiber_blank(lua_State *L) {
  return (struct fiber *)object_new(L, TAG_TASK | KIND_FIBER, sizeof(struct fiber), 3);
}

bool fiber_reuse(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  if (f->task.state != TASK_SUCCEEDED || f->task.flags & TASK_HELD || f->task.traits) return false;
  lua_pushnil(L);
  lua_setiuservalue(L, i, TASK_RESULT);
  *f = (struct fiber){.task = {.tag = f->task.tag}};
  return true;
}

/* [-(n+2), +1, m] gives the blank fiber on top a coroutine, with the function and arguments below it */
static inline struct fiber *fit(lua_State *L, struct runtime *rt, struct fiber *f, int arguments,
                                struct scope *s) {
  while (rt->idle_count == 0 || !is_idle(rt->idle[rt->idle_count - 1].co))
    if (rt->idle_count == 0)
      idle_grow(L, rt);
    else
      slots_free(L, UP_ANCHORS, &rt->free_slot, rt->idle[--rt->idle_count].slot);
  lua_State *co = rt->idle[rt->idle_count - 1].co;
  if (arguments > 10 && !lua_checkstack(co, arguments + 10)) luaL_error(L, "too many arguments");
  /* nothing raises from here: the coroutine leaves the idle ones and is the task's */
  f->co = co;
  f->task.slot = rt->idle[--rt->idle_count].slot;
  if (++rt->busy > rt->busy_peak) rt->busy_peak = rt->busy;
  scope_join(s, &f->member);
  testing_born(L, rt, f->task.slot);
  if (rt->me->flags & TASK_HAS_CONTEXT) context_inherit(L, -1, &f->task, rt->me);
  int first = -arguments - 2;
  lua_insert(L, first); /* task fn arguments */
  lua_pushvalue(co, 2);
  lua_pushvalue(L, first);
  lua_pushvalue(L, first); /* fn: it has moved up by one */
  lua_xmove(L, co, 2);
  lua_pushvalue(co, 3);
  lua_xmove(L, co, arguments + 1);
  return f;
}

struct fiber *fiber_new(lua_State *L, struct runtime *rt, int arguments, struct scope *s) {
  struct fiber *f = (struct fiber *)object_new(L, TAG_TASK | KIND_FIBER, sizeof *f, 3);
  return fit(L, rt, f, arguments, s);
}

struct fiber *fiber_fit(lua_State *L, struct runtime *rt, int arguments, struct scope *s) {
  return fit(L, rt, (struct fiber *)lua_touserdata(L, -1), arguments, s);
}

/* ---- running ---- */

/* [-0, +0, -] gives up the coroutine of a fiber that did not end well */
static void drop_coroutine(lua_State *L, struct runtime *rt, struct fiber *f) {
  bool planned = f->task.traits & TRAIT_SCHEDULED;
  if (planned) task_push(L, &f->task);
  rt->busy--;
  task_forget(L, &f->task);
  f->co = NULL;
  if (planned) schedule_end(L, rt);
}

void fiber_discard(lua_State *L, struct runtime *rt, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  task_settle_canceled(L, rt, i);
  scope_end_task(L, rt, f);
  drop_coroutine(L, rt, f);
}

static void clear_trace(lua_State *L, struct fiber *f) {
  if (!(f->task.flags & TASK_TRACED)) return;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  lua_pushboolean(L, 0);
  lua_rawseti(L, -2, f->task.slot);
  lua_pushboolean(L, 0);
  lua_rawseti(L, -2, -f->task.slot);
  lua_pop(L, 1);
}

/* The coroutine has yielded past us, or an error has left it: its `<close>` variables run now, without
** suspending; the task fails with the error on top, unless it is complete. [-1, +0, -] */
void fiber_fail(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct task *me = rt->me;
  task_push(L, &f->task);
  lua_insert(L, -2); /* task error */
  rt->me = &f->task;
  f->task.state = TASK_RUNNING;
  coroutine_close_inner(L, rt, f->co);
  rt->resetting++;
  coroutine_reset(f->co, L);
  rt->resetting--;
  if (f->task.traits & TRAIT_CHILD) group_child_ended(L, rt, f, false);
  scope_end_task(L, rt, f);
  rt->me = me;
  if (!task_done(&f->task))
    task_settle_faulted(L, rt, -2, 0);
  else
    lua_pop(L, 1);
  clear_trace(L, f);
  drop_coroutine(L, rt, f);
  lua_pop(L, 1);
}

/* [-0, +n, m] where a coroutine stands: in the innermost one that has a place; false, and nothing */
static bool push_place(lua_State *L, lua_State *co) {
  lua_Debug ar;
  lua_State *inner = coroutine_inner(co, NULL);
  if (inner != NULL && push_place(L, inner)) return true;
  bool found = false;
  for (int level = 0; lua_getstack(co, level, &ar); level++) {
    lua_getinfo(co, "Sl", &ar);
    if (ar.currentline <= 0) continue;
    bool ours = module_is_ours(runtime(L), ar.source); /* only if there is no other */
    if (found && ours) continue;
    if (found) lua_pop(L, 1);
    lua_pushfstring(L, "%s:%d", ar.short_src, ar.currentline);
    found = true;
    if (!ours) break;
  }
  return found;
}

void fiber_push_place(lua_State *L, struct fiber *f) {
  if (!push_place(L, f->co)) lua_pushliteral(L, "?");
}

/* [-0, +1, m] the error of a body that called coroutine.yield */
static void push_stray_yield(lua_State *L, struct fiber *f) {
  fiber_push_place(L, f);
  error_push(
      L, ERROR_OPERATION,
      "%s: coroutine.yield in the body of a task would suspend it for ever: use flow.await or "
      "flow.yield, or make the generator with coroutine.wrap",
      lua_tostring(L, -1));
  lua_remove(L, -2);
}

void fiber_run(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct task *before = rt->me;
  struct fiber *callers = NULL;
  bool resuming = rt->resuming;
  int results;
  rt->depth++;
  for (;;) {
    int arguments = 0;
    if (!(f->task.flags & TASK_STARTED)) {
      arguments = lua_gettop(f->co) - BOTTOM - 1;
      rt->starting = f;
    } else if (task_done(
                   &f->task)) { /* it ended in the hands of somebody who resumed its coroutine */
      clear_trace(L, f);
      drop_coroutine(L, rt, f);
      goto stopped;
    }
    f->task.flags = (uint16_t)((f->task.flags & ~TASK_PARKED) | TASK_STARTED);
    f->task.state = TASK_RUNNING;
    rt->me = &f->task;
    context_switched(L, rt, &f->task);
    rt->resuming = true;
    int status = lua_resume(f->co, L, arguments, &results);
    rt->resuming = resuming;
    switch (status) {
      case LUA_YIELD:
        if (rt->handoff != NULL) {
          f->u.caller = callers;
          callers = f;
          rt->hot++;
          f = rt->handoff;
          rt->handoff = NULL;
          continue;
        }
        if (!(f->task.flags & TASK_PARKED)) {
          lua_pop(f->co, results);
          push_stray_yield(L, f);
          fiber_fail(L, rt, f);
        }
        break;
      case LUA_OK: {
        if (f->task.traits & TRAIT_SCHEDULED) task_push(L, &f->task);
        lua_State *co = f->co;
        int slot = f->task.slot;
        clear_trace(L, f);
        f->co = NULL;
        f->task.slot = 0;
        recycle(L, rt, co, slot, f->task.flags & TASK_HELD);
        if (f->task.traits & TRAIT_SCHEDULED)
          schedule_end(L, rt); /* only now: nothing held its coroutine before */
        break;
      }
      default: lua_xmove(f->co, L, 1); fiber_fail(L, rt, f);
    }
  stopped:
    if (callers == NULL) break;
    f = callers;
    callers = f->u.caller;
    rt->hot--;
  }
  rt->depth--;
  rt->me = before;
  if (before != rt->outside) context_switched(L, rt, before);
}

/* ---- suspending ---- */

/* [-0, +1, m] the name of the C function on the stack of L that a suspension cannot pass */
static void push_barrier(lua_State *L, lua_State *at) {
  static const char *const passable[] = {"pcall",  "xpcall", "error", "assert",
                                         "dofile", "await",  NULL};
  lua_Debug ar;
  for (int level = 1; lua_getstack(at, level, &ar); level++) {
    lua_getinfo(at, "Sn", &ar);
    if (ar.what[0] != 'C' || ar.name == NULL) continue;
    const char *const *p = passable;
    while (*p && strcmp(*p, ar.name) != 0) p++;
    if (*p != NULL) continue;
    lua_pushfstring(L, "inside a function called by '%s'", ar.name);
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
  return loop_run(L);
}

void fiber_wake(lua_State *L, struct runtime *rt, int i, struct fiber *f) {
  struct task *t = &f->task;
  (void)f;
  if (t->flags & (TASK_LINKED | TASK_ABANDONED)) return;
  lua_pushvalue(L, i);
  lua_rawseti(L, UP_ANCHORS, t->slot);
  t->state = TASK_QUEUED;
  loop_ready(rt, t);
}

/* [-0, +0, e] raises if the running task would await itself, directly or round a circle */
static void refuse_circle(lua_State *L, struct task *me, struct task *on) {
  struct task *t = on;
  if (me != on) {
    if (me->waiters == NULL) return;
    while (t != me && task_is(t, KIND_FIBER) && !task_done(t) && ((struct fiber *)t)->u.wait.on)
      t = ((struct fiber *)t)->u.wait.on;
    if (t != me) return;
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
         !(on->flags & (TASK_STARTED | TASK_ABANDONED)) && rt->hot == 0 && rt->depth < MAX_DEPTH &&
         rt->inlined > 0 && !((me->traits | on->traits) & TRAIT_SCHEDULED);
}

/* Returns a value >= 0 when the await is over without a suspension: call k then. */
static bool await_in_place(lua_State *L, struct runtime *rt, struct fiber *me, struct task *on) {
  struct wait *w = &me->u.wait;
  rt->inlined--;
  loop_unready(rt, on);
  if (on->keeps) combine_forget(L, 1);
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
  fiber_run(L, rt, (struct fiber *)on);
  if (w->on != NULL) { /* it has suspended, and so do we: from here we are held by it */
    wait_remove(L, 1, w);
    return false;
  }
  if (rt->ready == NULL && !rt->stopping) {
    me->task.state = TASK_RUNNING;
    return true;
  }
  return false;
}

/* [-0, +1, m] */
static void push_closed(lua_State *L, int i) {
  task_push_name(L, i);
  error_push(L, ERROR_OPERATION, "somebody has closed the coroutine of task '%s'",
             lua_tostring(L, -1));
  lua_remove(L, -2);
}

int fiber_await(lua_State *L, struct runtime *rt, struct fiber *f, struct task *on,
                lua_KFunction k) {
  struct task *me = &f->task;
  bool deaf = me->flags & TASK_DEAF;
  if (on->slot == 0 && task_is(on, KIND_FIBER)) { /* its coroutine is gone: see l_watch_close */
    push_closed(L, 1);
    task_settle_faulted(L, rt, 1, 0);
    return k(L, LUA_OK, (lua_KContext)on);
  }
  if (f->member.scope->canceled && !deaf) return scope_throw(L, f->member.scope);
  refuse_circle(L, me, on);
  if (can_run_in_place(rt, me, on)) {
    if (await_in_place(L, rt, f, on)) return k(L, LUA_OK, (lua_KContext)on);
    if (me->flags & TASK_LINKED) /* interrupted by the other one */
      return fiber_suspend(L, f, (lua_KContext)on, k);
    if (task_done(on)) { /* others became ready meanwhile, and come first */
      me->state = TASK_QUEUED;
      loop_ready(rt, me);
      return fiber_suspend(L, f, (lua_KContext)on, k);
    }
  }
  task_push(L, me);
  bool waits = wait_add(L, 1, &f->u.wait, lua_gettop(L), WAIT_FIBER);
  lua_settop(L, -2);
  if (!waits) return k(L, LUA_OK, (lua_KContext)on);
  me->state = TASK_WAITING;
  fiber_let_go(L, f, NULL);
  return fiber_suspend(L, f, (lua_KContext)on, k);
}

/* ---- abandonment ---- */

/* [-0, +1, m] */
static void push_abandoned(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  i = lua_absindex(L, i);
  task_push_name(L, i);
  fiber_push_place(L, f);
  if (!(f->task.traits & TRAIT_HANDED))
    error_push(
        L, ERROR_ABANDONED,
        "task '%s' was collected while it waited at %s: nothing alive could ever complete what it "
        "awaits",
        lua_tostring(L, -2), lua_tostring(L, -1));
  else if (f->task.flags & TASK_STARTED)
    error_push(L, ERROR_ABANDONED,
               "task '%s' was collected while it waited at %s, ready to go on: its scheduler or "
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
  if (t->state == TASK_WAITING &&
      fiber_naps(f)) { /* else it is ready, or awaits: see fiber_close */
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

void fiber_close(lua_State *L, struct runtime *rt, struct fiber *f) {
  task_push(L, &f->task);
  int i = lua_gettop(L);
  if (f->u.wait.on) {
    fiber_push_awaited(L, f);
    wait_remove(L, -1, &f->u.wait);
    lua_pop(L, 1);
  }
  if (is_closed(f->co))
    push_closed(L, i);
  else {
    f->task.flags |= TASK_OBSERVED;
    push_abandoned(L, i);
  }
  fiber_fail(L, rt, f);
  lua_settop(L, i - 1);
}

/* Lua calls finalizers for everything when a state closes. It then runs on the main thread: below no
** function, below os.exit, or, when a task has called that, while the main thread resumes the task. */
static bool state_closes(lua_State *L, struct runtime *rt) {
  lua_Debug ar;
  if (L != rt->main) return false;
  if (rt->resuming || !lua_getstack(L, 1, &ar)) return true;
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

/* [-0, +0, -] a parked fiber whose coroutine is gone waits for nothing any more */
static void withdraw(lua_State *L, struct runtime *rt, struct fiber *f) {
  if (f->task.state != TASK_WAITING) return;
  f->task.state = TASK_QUEUED;
  if (fiber_naps(f)) {
    waiter_leave(L, f, true);
    deadline_drop(rt, &f->u.nap.deadline);
    return;
  }
  lua_pushnil(L); /* what it awaits may be gone soon: it was on that stack */
  wait_remove(L, -1, &f->u.wait);
  lua_pop(L, 1);
}

/* The coroutine L is being closed, by somebody else unless rt->resetting. Creates nothing: it may be that nobody
** holds the task any more. Should somebody do, it fails when it is awaited (fiber_await). */
static int l_watch_close(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (rt->closed || rt->resetting > 0 || !is_watch(L)) return 0;
  struct fiber *f = scope_find(rt, L);
  if (f == NULL || f->task.slot == 0 || task_done(&f->task)) return 0;
  withdraw(L, rt, f);
  bool known = lua_rawgeti(L, UP_ANCHORS, f->task.slot) == LUA_TUSERDATA;
  struct wait *w = task_waiters(&f->task);
  if (!known && w != NULL && w->role == WAIT_FIBER) { /* who waits for it has it */
    lua_settop(L, 1);
    known = fiber_push_awaited(L, container_of(w, struct fiber, u.wait));
  }
  if (known) {
    fiber_abandon(L, 2, f);
    return 0;
  }
  scope_end_task(L, rt, f);
  drop_coroutine(L, rt, f);
  return 0;
}

static int l_watch_gc(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (!is_watch(L)) return 0;
  if (lua_getiuservalue(L, 1, WATCH_COROUTINE) != LUA_TTHREAD) return 0;
  lua_State *co = lua_tothread(L, 2);
  bool closes = state_closes(L, rt);
  push_argument(L, co, BODY_TASK); /* watch coroutine task */
  struct fiber *f = (struct fiber *)object_test(L, 3, TAG_TASK);
  if (f == NULL || f->co != co || task_done(&f->task)) return 0; /* an idle one */
  bool handed = f->task.traits & TRAIT_HANDED; /* a scheduler, or a context, has dropped it */
  if (!(f->task.flags & TASK_STARTED) &&
      !handed) { /* cold, or a continuation that will never start: no loss */
    if (f->u.wait.on) {
      fiber_push_awaited(L, f);
      wait_remove(L, -1, &f->u.wait);
    }
    scope_end_task(L, rt, f);
    if (!closes) drop_coroutine(L, rt, f);
    return 0;
  }
  if (f->task.state == TASK_WAITING && fiber_naps(f)) waiter_leave(L, f, true);
  if (closes) {
    lua_pushvalue(L, 3); /* its `<close>` variables may ask for it */
    lua_rawseti(L, UP_ANCHORS, f->task.slot);
    fiber_dispose(L, f);
    return 0;
  }
  if (f->task.flags & TASK_LINKED &&
      !handed) { /* a token woke it in the meantime: watch it again */
    luaL_getmetafield(L, 1, "__gc");
    lua_pop(L, 1);
    lua_getmetatable(L, 1);
    lua_setmetatable(L, 1);
    return 0;
  }
  fiber_abandon(L, 3, f);
  if (!(f->task.flags & TASK_OBSERVED)) {
    push_abandoned(L, 3);
    error_report(L, -1, 3);
  }
  return 0;
}

void fiber_dispose(lua_State *L, struct fiber *f) {
  struct runtime *rt = runtime(L);
  struct task *me = rt->me;
  rt->me = &f->task;
  lua_State *co = f->co;
  f->co = NULL;
  rt->depth++;
  coroutine_close_inner(L, rt, co);
  rt->resetting++;
  coroutine_reset(co, L);
  rt->resetting--;
  rt->depth--;
  scope_end_task(L, rt, f);
  rt->me = me;
}

/* ---- Lua face ---- */

static int l_spawn(lua_State *L) {
  struct runtime *rt = runtime(L);
  module_check_callable(L, 1);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  f->task.state = TASK_QUEUED;
  loop_ready(rt, &f->task);
  return 1;
}

static int hot_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (!fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, ctx, hot_k); /* not resumed by us */
  lua_settop(L, 1);
  return 1;
}

int fiber_run_hot(lua_State *L, struct fiber *f, lua_KFunction k) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  bool handoff = rt->depth >= MAX_DEPTH && fiber_can_suspend(L, rt);
  if (handoff) {
    rt->handoff = f;
    return fiber_suspend(L, me, 0, k);
  }
  if (rt->depth < HARD_DEPTH) {
    rt->hot++;
    fiber_run(L, rt, f);
    rt->hot--;
  } else { /* a recursion through C: it starts on a later turn */
    f->task.state = TASK_QUEUED;
    if (f->task.traits & TRAIT_SCHEDULED) f->task.traits |= TRAIT_DIRECT;
    loop_ready(rt, &f->task);
  }
  return k == hot_k ? 1 : k(L, LUA_OK, 0);
}

/* upvalues: runtime, anchors, fn */
static int async_call(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_insert(L, 1);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  if (rt->me->traits & TRAIT_PLAN) schedule_inherit(L, rt, 1);
  return fiber_run_hot(L, f, hot_k);
}

static int l_async(lua_State *L) {
  module_check_callable(L, 1);
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_pushvalue(L, 1);
  lua_pushcclosure(L, async_call, 3);
  return 1;
}

/* Task.new(fn, ...): cold */
static int l_new(lua_State *L) {
  struct runtime *rt = runtime(L);
  module_check_callable(L, 1);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 1, scope_flowing(L, rt));
  fiber_hold(L, 1, f);
  task_release(L, &f->task);
  return 1;
}

/* the cold task at index 1, with a scheduler or nil at 2 */
static struct fiber *check_cold(lua_State *L) {
  struct fiber *f = (struct fiber *)task_check(L, 1);
  lua_settop(L, 2);
  if (!lua_isnil(L, 2)) schedule_check(L, 2);
  if (!task_is(&f->task, KIND_FIBER) || f->task.state != TASK_CREATED) {
    task_push_name(L, 1);
    error_throw(L, ERROR_OPERATION,
                "task '%s' was started before: only a task made by Task.new starts, once",
                lua_tostring(L, -1));
  }
  scope_adopt(L, runtime(L), f, scope_flowing(L, runtime(L))); /* it is started here */
  return f;
}

static int l_start(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *f = check_cold(L);
  if (!lua_isnil(L, 2) && schedule_give(L, 1, 2)) {
    lua_settop(L, 1);
    schedule_start(L, rt, 1);
    return 1;
  }
  lua_settop(L, 1);
  task_hold(L, 1, &f->task);
  f->task.state = TASK_QUEUED;
  loop_ready(rt, &f->task);
  return 1;
}

static int l_run_synchronously(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *f = check_cold(L);
  if (!lua_isnil(L, 2)) {
    if (schedule_give(L, 1, 2)) schedule_join(L, rt, 1);
  } else if (rt->me->traits & TRAIT_PLAN)
    schedule_inherit(L, rt, 1);
  lua_settop(L, 1);
  task_hold(L, 1, &f->task);
  return fiber_run_hot(L, f, hot_k);
}

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
  struct token *k = token_opt(L, 3);
  module_check_callable(L, 2);
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
  if (!lua_isnil(L, 5)) schedule_give(L, 7, 5);
  if (wait_add(L, 6, &f->u.wait, 7, WAIT_FIBER)) {
    f->task.state = TASK_WAITING;
    fiber_hold(L, 7, f);
    fiber_let_go(L, f, NULL);
  } else {
    f->task.state = TASK_QUEUED;
    loop_ready(rt, &f->task);
  }
  return 1;
}

static int l_try_await(lua_State *L);

static int await_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *on = (struct task *)ctx;
  if (status != LUA_OK) {
    fiber_resumed(L, runtime(L));
    if (!task_done(on) || !fiber_on_top(L, runtime(L)))
      return lua_yieldk(L, 0, ctx, await_k); /* not resumed by us: wait on */
  }
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
  lua_settop(L, 1);
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
  return luaL_typeerror(L, 1, "Task or awaitable");
}

int fiber_await_value(lua_State *L) {
  struct task *t = (struct task *)object_test(L, 1, TAG_TASK);
  if (t == NULL) return await_other(L, false);
  if (task_done(t)) return task_push_outcome(L, 1, t);
  struct runtime *rt = runtime(L);
  struct fiber *me = fiber_here(L, rt);
  if (lua_gettop(L) != 1) lua_settop(L, 1);
  if (me == NULL) return fiber_outside(L, fiber_await_value);
  return fiber_await(L, rt, me, t, await_k);
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
  if (status != LUA_OK) {
    fiber_resumed(L, runtime(L));
    if (!task_done(t) || !fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, ctx, try_await_k);
  }
  lua_settop(L, 1);
  lua_pushboolean(L, t->state == TASK_SUCCEEDED);
  if (t->state == TASK_SUCCEEDED) return 1 + task_push_outcome(L, 1, t);
  error_remember(L, 1);
  task_push_error(L, 1);
  return 2;
}

static int l_try_await(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *t = (struct task *)object_test(L, 1, TAG_TASK);
  if (t == NULL) return await_other(L, true);
  if (task_done(t)) return try_await_k(L, LUA_OK, (lua_KContext)t);
  struct fiber *me = fiber_here(L, rt);
  lua_settop(L, 1);
  if (me == NULL) return fiber_outside(L, l_try_await);
  return fiber_await(L, rt, me, t, try_await_k);
}

/* of a yield in a coroutine of ours, which anybody can resume before its turn */
static int yield_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  return fiber_on_top(L, runtime(L)) ? 0 : lua_yieldk(L, 0, ctx, yield_k);
}

static int l_yield(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) return fiber_outside(L, l_yield);
  if (me->member.scope->canceled) return scope_throw(L, me->member.scope);
  me->task.state = TASK_QUEUED;
  loop_ready(rt, &me->task);
  return fiber_suspend(L, me, 0, L == me->co ? NULL : yield_k); /* returns nothing */
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

static int l_current_task(lua_State *L) {
  struct runtime *rt = runtime(L);
  if (rt->me == rt->outside)
    lua_pushnil(L);
  else
    task_push(L, rt->me);
  return 1;
}

static int l_is_awaitable_here(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_pushboolean(L, fiber_can_suspend(L, rt));
  return 1;
}

static const luaL_Reg functions[] = {{"spawn", l_spawn},
                                     {"async", l_async},
                                     {"new", l_new},
                                     {"start", l_start},
                                     {"run_synchronously", l_run_synchronously},
                                     {"continuation", l_continuation},
                                     {"await", fiber_await_value},
                                     {"try_await", l_try_await},
                                     {"wait", l_wait},
                                     {"yield", l_yield},
                                     {"pcall", l_pcall},
                                     {"current_task", l_current_task},
                                     {"is_awaitable_here", l_is_awaitable_here},
                                     {NULL, NULL}};

static const luaL_Reg watch_methods[] = {
    {"__gc", l_watch_gc}, {"__close", l_watch_close}, {NULL, NULL}};

void fiber_open(lua_State *L) {
  struct runtime *rt = runtime(L);
  module_functions(L, functions);
  module_class(L, TAG_WATCH, "coflow.Watch", watch_methods, NULL);
  module_push_function(L, fiber_main);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_MAIN);
  module_push_function(L, error_handler);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_FIBER_TRACE);
  if (rt->outside != NULL) return;
  struct fiber *outside =
      (struct fiber *)task_new(L, KIND_FIBER, sizeof *outside, TASK_CONTEXT, false);
  rt->root->owner = outside;
  scope_join(rt->root, &outside->member);
  outside->task.state = TASK_RUNNING;
  outside->task.flags = TASK_STARTED;
  task_hold(L, -1, &outside->task);
  lua_pop(L, 1);
  rt->outside = rt->me = &outside->task;
}
