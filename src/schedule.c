/*
** schedule.c - tasks that somebody else runs: schedulers and synchronization contexts.
**
** Whatever wakes a task puts it on the ready list, as ever, for nobody's code may run while another
** task is settled. When the pump takes a task with traits off that list, it does not run it but *hands
** it over*: its start, and each continuation, to the `queue_task` of its scheduler; a continuation to
** the `post` of the synchronization context that the task has, if any, instead. Both are called
** with no task running and undo whatever they do to async locals. The task then counts as ready, but
** it runs when they say so: `try_execute_task` and the posted function run it at once, up to its next
** suspension, on the stack of their caller. A hot start is not handed over: its caller runs it.
**
** What a task needs for that is its *plan*, a table in RUNTIME_PLANS beside it, so that the many tasks
** without one pay for a look at one byte:
**
**     scheduler   where its start and its continuations go, or nil: to the loop
**     context     the synchronization context that it is in
**     key         what may run it while it is handed over: the scheduler, or a posted function's number
**     home        the scheduler that it was given to: told when it ends (`_ended`), even if it has left;
**                 of a detached task, which is the loop's, whoever has started it
**
** Who owns it: a task that is handed over is held by whoever has it, not by us. If they drop it, it is
** garbage like a parked one that nobody can wake, and is reported and closed by its watch (fiber_abandon.c).
** RUNTIME_HANDED tells whether the collector has given it up in the meantime: it forgets such a
** task before it calls finalizers, so none of these can run it any more.
**
** Invariants: TRAIT_HANDED is set from the call of queue_task or post until the task is run, taken back,
**             failed or closed; TASK_LINKED with it, so that no wake, and no cancellation, puts it
**             on the ready list a second time.
**             Each way out of it but the end of the task (abandoned, lost) goes through take_back, which voids
**             the key: nothing runs twice.
**
** Source:    .NET TaskScheduler and SynchronizationContext; the order and the one stack are ours.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

enum plan_field { PLAN_SCHEDULER = 1, PLAN_CONTEXT, PLAN_KEY, PLAN_HOME };
enum { PLAN_SIZE = PLAN_HOME };
enum { CONFIGURED_TASK = 1 };

struct configured { /* what configure_await returns */
  uint32_t tag;
  bool captures;
};

/* ---- plans ---- */

/* [-0, +1, -] the plan of the task at i, or nil */
static void push_plan(lua_State *L, int i) {
  i = lua_absindex(L, i);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_PLANS);
  lua_pushvalue(L, i);
  lua_rawget(L, -2);
  lua_remove(L, -2);
}

/* [-0, +1, m] the same, made if there is none */
static void need_plan(lua_State *L, int i) {
  i = lua_absindex(L, i);
  push_plan(L, i);
  if (lua_istable(L, -1)) return;
  lua_pop(L, 1);
  lua_createtable(L, PLAN_SIZE, 0);
  push_plan(L, i);
  if (lua_istable(L, -1)) { /* a finalizer has made one */
    lua_remove(L, -2);
    return;
  }
  lua_pop(L, 1);
  for (int field = 1; field <= PLAN_SIZE; field++) { /* stores into it cannot fail from here on */
    lua_pushboolean(L, 0);
    lua_rawseti(L, -2, field);
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_PLANS);
  lua_pushvalue(L, i);
  lua_pushvalue(L, -3);
  lua_rawset(L, -3);
  lua_pop(L, 1);
  ((struct task *)lua_touserdata(L, i))->traits |= TRAIT_PLAN;
}

/* [-1, +0, -] a field of the plan at p; what is not true is stored as false */
static void plan_set(lua_State *L, int p, enum plan_field field) {
  p = lua_absindex(L, p);
  if (!lua_toboolean(L, -1)) {
    lua_pop(L, 1);
    lua_pushboolean(L, 0);
  }
  lua_rawseti(L, p, field);
}

/* [-0, +1, m] the field of the object at i itself, or nil: no metamethod is asked */
static void push_raw(lua_State *L, int i, const char *name) {
  i = lua_absindex(L, i);
  lua_pushstring(L, name);
  lua_rawget(L, i);
}

/* [-0, +0, m] the traits of t follow from its plan at p */
static void set_traits(lua_State *L, int p, struct task *t) {
  p = lua_absindex(L, p);
  uint8_t traits = 0;
  lua_rawgeti(L, p, PLAN_SCHEDULER);
  if (lua_toboolean(L, -1)) traits |= TRAIT_QUEUES;
  lua_rawgeti(L, p, PLAN_CONTEXT);
  if (lua_toboolean(L, -1)) {
    push_raw(L, -1, "_plain"); /* one without a post of its own counts as none */
    if (!lua_toboolean(L, -1)) traits |= TRAIT_POSTS;
    lua_pop(L, 1);
  }
  lua_pop(L, 2);
  t->traits = (uint8_t)((t->traits & ~TRAIT_ELSEWHERE) | traits);
}

bool schedule_give(lua_State *L, int i, int s) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  i = lua_absindex(L, i);
  s = lua_absindex(L, s);
  push_raw(L, s, "_default");
  bool other = !lua_toboolean(L, -1);
  lua_pop(L, 1);
  if (!other) return false;
  fiber_hold(L, i, (struct fiber *)t);
  need_plan(L, i);
  lua_pushvalue(L, s);
  plan_set(L, -2, PLAN_SCHEDULER);
  lua_pushvalue(L, s);
  plan_set(L, -2, PLAN_HOME);
  push_raw(L, s, "_context");
  if (!lua_istable(L, -1)) {
    lua_pop(L, 1);
    lua_pushnil(L);
  }
  plan_set(L, -2, PLAN_CONTEXT);
  set_traits(L, -1, t);
  lua_pop(L, 1);
  return true;
}

bool schedule_find(lua_State *L, const struct fiber *f) {
  int top = lua_gettop(L);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_PLANS);
  for (lua_pushnil(L); lua_next(L, top + 1); lua_pop(L, 1))
    if (lua_touserdata(L, -2) == (const void *)f) {
      lua_pop(L, 1);
      lua_replace(L, top + 1);
      return true;
    }
  lua_settop(L, top);
  return false;
}

void schedule_push_context(lua_State *L, struct task *t) {
  if (!(t->traits & TRAIT_PLAN)) {
    lua_pushnil(L);
    return;
  }
  task_push(L, t);
  push_plan(L, -1);
  lua_rawgeti(L, -1, PLAN_CONTEXT);
  lua_replace(L, -3);
  lua_pop(L, 1);
  if (lua_toboolean(L, -1)) return;
  lua_pop(L, 1);
  lua_pushnil(L);
}

void schedule_set_context(lua_State *L, struct task *t) {
  if (lua_isnil(L, -1) && !(t->traits & TRAIT_PLAN)) {
    lua_pop(L, 1);
    return;
  }
  task_push(L, t);
  need_plan(L, -1); /* context task plan */
  lua_pushvalue(L, -3);
  plan_set(L, -2, PLAN_CONTEXT);
  set_traits(L, -1, t);
  lua_pop(L, 3);
}

/* ---- calling out ---- */

/* [-(n+1), +1 if it fails, -] calls a function of the user as a callback: with no task running, from
** which nothing leaks into the code outside */
int schedule_call_outside(lua_State *L, struct runtime *rt, int arguments) {
  struct task *me = rt->me, *outside = rt->outside;
  uint16_t suppressed = outside->flags & TASK_SUPPRESSED;
  int base = lua_gettop(L) - arguments;
  rt->me = outside;
  rt->depth++;
  context_push_current(L);
  schedule_push_context(L, outside);
  lua_rotate(L, base, 2); /* locals context fn arguments */
  int status = guard_call(L, rt, arguments, 0);
  outside->flags = (uint16_t)((outside->flags & ~TASK_SUPPRESSED) | suppressed);
  rt->me = outside;
  context_push_current(L);
  if (!lua_rawequal(L, -1, base)) { /* else there is nothing to tell anybody */
    lua_pushvalue(L, base);
    context_swap(L);
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  if (outside->traits & TRAIT_PLAN) {
    lua_pushvalue(L, base + 1);
    schedule_set_context(L, outside);
  }
  rt->depth--;
  rt->me = me;
  if (me != outside && !task_done(me)) context_switched(L, rt, me);
  lua_remove(L, base + 1);
  lua_remove(L, base);
  return status;
}

/* [-0, +0, -] tells the scheduler at s about the task at i, if it wants to know */
static void tell(lua_State *L, struct runtime *rt, int s, const char *what, int i) {
  i = lua_absindex(L, i);
  s = lua_absindex(L, s);
  if (!lua_istable(L, s)) return;
  push_raw(L, s, what);
  if (lua_isnil(L, -1)) {
    lua_pop(L, 1);
    return;
  }
  lua_pushvalue(L, s);
  lua_pushvalue(L, i);
  if (schedule_call_outside(L, rt, 2) != LUA_OK) {
    error_report(L, -1, 0);
    lua_pop(L, 1);
  }
}

/* ---- handing over ---- */

/* [-0, +0, -] nobody else has the task at i from here on */
static void take_back(lua_State *L, int i, struct task *t) {
  push_plan(L, i);
  lua_pushboolean(L, 0);
  lua_rawseti(L, -2, PLAN_KEY);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDED);
  lua_pushnil(L);
  lua_rawseti(L, -2, t->slot);
  lua_pop(L, 2);
  t->traits &= (uint8_t)~TRAIT_HANDED;
  t->flags &= (uint16_t)~TASK_LINKED;
  task_hold(L, i, t);
}

/* [-0, +1, -] the plan of the task at i, if it waits to be run by somebody else; NULL, and nil, if not */
static struct fiber *handed(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct fiber *f = (struct fiber *)object_test(L, i, TAG_TASK);
  if (f == NULL || !task_is(&f->task, KIND_FIBER) || !(f->task.traits & TRAIT_HANDED) ||
      f->task.flags & TASK_ABANDONED || task_done(&f->task) || f->co == NULL || rt->closed) {
    lua_pushnil(L);
    return NULL;
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDED);
  lua_rawgeti(L, -1, f->task.slot);
  bool alive = lua_touserdata(L, -1) == (void *)f; /* not given up by the collector */
  lua_pop(L, 2);
  if (alive)
    push_plan(L, i);
  else
    lua_pushnil(L);
  return alive ? f : NULL;
}

/* [-0, +0, -] as above, only if the scheduler at s has it */
static struct fiber *queued_in(lua_State *L, int i, int s) {
  struct fiber *f = handed(L, i);
  if (f != NULL) {
    lua_rawgeti(L, -1, PLAN_KEY);
    if (!lua_rawequal(L, -1, s)) f = NULL;
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return f;
}

static int executed_k(lua_State *L, int status, lua_KContext ctx) {
  if (status != LUA_OK && !fiber_on_top(L, runtime(L)))
    return lua_yieldk(L, 0, ctx, executed_k); /* not resumed by us */
  lua_pushboolean(L, 1);
  return 1;
}

/* runs the fiber at i at once, up to its next suspension; k ends the caller */
static int execute(lua_State *L, int i, struct fiber *f, lua_KFunction k) {
  take_back(L, i, &f->task);
  return fiber_run_hot(L, i, f, k);
}

static int posted_k(lua_State *L, int status, lua_KContext ctx) {
  return status == LUA_OK || fiber_on_top(L, runtime(L)) ? 0 : lua_yieldk(L, 0, ctx, posted_k);
}

/* what a context gets; upvalues: runtime, anchors, task, number */
static int posted(lua_State *L) {
  lua_settop(L, 0);
  lua_pushvalue(L, lua_upvalueindex(3));
  struct fiber *f = handed(L, 1); /* task plan */
  if (f == NULL) return 0;
  lua_rawgeti(L, 2, PLAN_KEY);
  if (!lua_rawequal(L, 3, lua_upvalueindex(4))) return 0;
  lua_settop(L, 1);
  return execute(L, 1, f, posted_k);
}

/* hand(task), under protection and outside every task */
static int hand(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *t = (struct task *)lua_touserdata(L, 1);
  bool post = t->flags & TASK_STARTED && t->traits & TRAIT_POSTS;
  push_plan(L, 1);
  lua_rawgeti(L, 2, post ? PLAN_CONTEXT : PLAN_SCHEDULER); /* task plan receiver */
  lua_getfield(L, 3, post ? "post" : "queue_task");
  lua_pushvalue(L, 3);
  if (post) {
    lua_Integer number = (lua_Integer)++rt->next_serial;
    lua_pushvalue(L, UP_RUNTIME);
    lua_pushvalue(L, UP_ANCHORS);
    lua_pushvalue(L, 1);
    lua_pushinteger(L, number);
    lua_pushcclosure(L, posted, 4);
    lua_pushinteger(L, number);
  } else {
    lua_pushvalue(L, 1);
    lua_pushvalue(L, 3);
  }
  if (t->flags & TASK_ABANDONED || t->slot == 0)
    return 0; /* a finalizer has closed its coroutine */
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDED);
  lua_pushvalue(L, 1);
  lua_rawseti(L, -2, t->slot);
  lua_pop(L, 1); /* task plan receiver method receiver what key */
  lua_rawseti(L, 2, PLAN_KEY);
  task_release(L, t);
  lua_call(L, 2, 0);
  return 0;
}

/* [-0, +1 if false, -] the task at i is handed over; or it is not, with the error on top */
static bool hand_over(lua_State *L, struct runtime *rt, int i, struct task *t) {
  t->traits |= TRAIT_HANDED;
  t->flags |= TASK_LINKED;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HAND);
  lua_pushvalue(L, i);
  return schedule_call_outside(L, rt, 1) == LUA_OK;
}

/* [-1, +0, -] it was not: the task at i, if nobody has run it yet, fails with the error on top */
static void refuse(lua_State *L, struct runtime *rt, int i, struct fiber *f) {
  if (!(f->task.traits & TRAIT_HANDED) || f->task.flags & TASK_ABANDONED) { /* run, or closed */
    error_report(L, -1, 0);
    lua_pop(L, 1);
    return;
  }
  take_back(L, i, &f->task);
  if (f->task.label == 0) fiber_label(L, i);
  fiber_fail(L, rt, f);
}

void schedule_run(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct task *t = &f->task;
  int elsewhere = t->flags & TASK_STARTED ? TRAIT_ELSEWHERE : TRAIT_QUEUES;
  bool direct = t->traits & TRAIT_DIRECT || !(t->traits & elsewhere);
  t->traits = (uint8_t)((t->traits & ~TRAIT_DIRECT) | TRAIT_RESUMED);
  if (direct && t->flags & TASK_STARTED) {
    fiber_run(L, rt, f);
    return;
  }
  task_push(L, t);
  int i = lua_gettop(L);
  if (direct) {
    fiber_run_at(L, rt, f, i);
    lua_settop(L, i - 1);
    return;
  }
  fiber_hold(L, i, f);
  if (!hand_over(L, rt, i, t)) refuse(L, rt, i, f);
  lua_settop(L, i - 1);
}

void schedule_start(lua_State *L, struct runtime *rt, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  f->task.state = TASK_QUEUED;
  if (hand_over(L, rt, i, &f->task)) return;
  /* one that has been run, or closed, meanwhile leaves the error to its caller alone */
  if (f->task.traits & TRAIT_HANDED && !(f->task.flags & TASK_ABANDONED)) {
    f->task.flags |= TASK_OBSERVED;
    lua_pushvalue(L, -1);
    refuse(L, rt, i, f);
  }
  lua_error(L);
}

/* ---- hot starts, the end ---- */

void schedule_join(lua_State *L, struct runtime *rt, int i) {
  push_plan(L, i);
  lua_rawgeti(L, -1, PLAN_HOME);
  tell(L, rt, -1, "_joined", i);
  if (task_done((struct task *)lua_touserdata(L, i))) tell(L, rt, -1, "_ended", i); /* meanwhile */
  lua_pop(L, 2);
}

void schedule_inherit(lua_State *L, struct runtime *rt, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  if (!(rt->me->traits & TRAIT_PLAN)) return;
  task_push(L, rt->me);
  push_plan(L, -1);
  lua_remove(L, -2);
  int from = lua_gettop(L);
  lua_rawgeti(L, from, PLAN_SCHEDULER);
  lua_rawgeti(L, from, PLAN_CONTEXT); /* from scheduler context */
  if (lua_toboolean(L, -1) || lua_toboolean(L, -2)) {
    fiber_make_cold(L, i, f); /* should anything raise */
    need_plan(L, i);
    if (fiber_is_lost(&f->task)) fiber_settle_lost(L, i); /* a finalizer has closed its coroutine */
    if (f->task.state != TASK_CREATED) {                  /* … or has started it */
      lua_settop(L, from - 1);
      return;
    }
    lua_insert(L, -2); /* from scheduler plan context */
    plan_set(L, -2, PLAN_CONTEXT);
    lua_pushvalue(L, -2);
    plan_set(L, -2, PLAN_SCHEDULER);
    lua_pushvalue(L, -2);
    plan_set(L, -2, PLAN_HOME);
    set_traits(L, -1, &f->task);
    if (f->task.state == TASK_CREATED && f->task.traits & TRAIT_QUEUES) schedule_join(L, rt, i);
    if (f->task.slot != 0) task_hold(L, i, &f->task);
  }
  lua_settop(L, from - 1);
}

void schedule_end(lua_State *L, struct runtime *rt) {
  int i = lua_gettop(L);
  struct task *me = rt->me;
  if (me->slot == 0) rt->me = rt->outside; /* it has given its coroutine back: nobody runs */
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_PLANS);
  push_plan(L, i); /* task plans plan */
  ((struct task *)lua_touserdata(L, i))->traits &= (uint8_t)~TRAIT_SCHEDULED;
  if (lua_istable(L, -1)) {
    lua_pushvalue(L, i);
    lua_pushnil(L);
    lua_rawset(L, -4);
    lua_rawgeti(L, -1, PLAN_HOME);
    tell(L, rt, -1, "_ended", i);
  }
  lua_settop(L, i - 1);
  rt->me = me;
}

/* ---- configure_await ---- */

enum { CONFIGURED_ON = 1, CONFIGURED_PLAN, CONFIGURED_SCHEDULER, CONFIGURED_CONTEXT };

static int configured_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *me = runtime(L)->me;
  (void)ctx;
  if (status == LUA_OK || status == LUA_YIELD) return lua_gettop(L) - CONFIGURED_CONTEXT;
  if (me->traits & TRAIT_PLAN && !(me->traits & TRAIT_RESUMED)) { /* refused: as it was */
    lua_pushvalue(L, CONFIGURED_SCHEDULER);
    plan_set(L, CONFIGURED_PLAN, PLAN_SCHEDULER);
    lua_pushvalue(L, CONFIGURED_CONTEXT);
    plan_set(L, CONFIGURED_PLAN, PLAN_CONTEXT);
    set_traits(L, CONFIGURED_PLAN, me);
  }
  return lua_error(L);
}

/* A wait that does not come back: the task leaves its scheduler and its context, for it is the loop that
** runs its continuation. Nothing happens if it need not wait, or is refused. */
int schedule_await(lua_State *L, lua_CFunction f) {
  struct runtime *rt = runtime(L);
  struct task *me = rt->me;
  bool captures = ((const struct configured *)lua_touserdata(L, 1))->captures;
  lua_settop(L, 2);
  lua_getiuservalue(L, 1, CONFIGURED_TASK);
  lua_replace(L, CONFIGURED_ON);
  const struct task *on = (const struct task *)lua_touserdata(L, CONFIGURED_ON);
  if (captures || task_done(on) || !(me->traits & TRAIT_PLAN) || fiber_here(L, rt) == NULL)
    return f(L);
  task_push(L, me);
  push_plan(L, -1);
  lua_replace(L, -2);
  lua_insert(L, CONFIGURED_PLAN);
  lua_rawgeti(L, CONFIGURED_PLAN, PLAN_SCHEDULER);
  lua_rawgeti(L, CONFIGURED_PLAN, PLAN_CONTEXT);
  lua_rotate(L, CONFIGURED_SCHEDULER, -1); /* on plan scheduler context token */
  module_push_function(L, f);
  lua_pushvalue(L, CONFIGURED_ON);
  lua_rotate(L, CONFIGURED_CONTEXT + 1, -1); /* … f on token */
  for (int field = PLAN_SCHEDULER; field <= PLAN_CONTEXT; field++) {
    lua_pushboolean(L, 0);
    lua_rawseti(L, CONFIGURED_PLAN, field);
  }
  me->traits &= (uint8_t) ~(TRAIT_ELSEWHERE | TRAIT_RESUMED);
  return configured_k(L, lua_pcallk(L, 2, LUA_MULTRET, 0, 0, configured_k), 0);
}

/* configure_await(task, captures) */
static int l_configure_await(lua_State *L) {
  task_check(L, 1);
  luaL_checktype(L, 2, LUA_TBOOLEAN);
  lua_settop(L, 2);
  struct configured *c = (struct configured *)object_new(L, TAG_CONFIGURED, sizeof *c, 1);
  c->captures = lua_toboolean(L, 2);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 3, CONFIGURED_TASK);
  return 1;
}

/* for what awaits several: the task itself */
static int l_configured_await(lua_State *L) {
  object_check(L, 1, TAG_CONFIGURED);
  lua_getiuservalue(L, 1, CONFIGURED_TASK);
  return 1;
}

/* ---- Lua face ---- */

static bool is_scheduler(lua_State *L, int i) {
  bool is = lua_istable(L, i) && luaL_getmetafield(L, i, "__name") == LUA_TSTRING;
  if (!is) return false;
  is = strcmp(lua_tostring(L, -1), "coflow.TaskScheduler") == 0;
  lua_pop(L, 1);
  return is;
}

void schedule_check(lua_State *L, int i) {
  if (!is_scheduler(L, i)) luaL_typeerror(L, i, "coflow.TaskScheduler");
}

/* is_scheduler(value) */
static int l_is_scheduler(lua_State *L) {
  lua_pushboolean(L, is_scheduler(L, 1));
  return 1;
}

/* spawn_on(scheduler, fn, ...) */
static int l_spawn_on(lua_State *L) {
  struct runtime *rt = runtime(L);
  schedule_check(L, 1);
  argument_callable(L, 2);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 2, scope_flowing(L, rt)); /* scheduler task */
  fiber_make_cold(L, 2, f); /* should anything raise */
  if (schedule_give(L, 2, 1))
    schedule_start(L, rt, 2);
  else {
    task_hold(L, 2, &f->task);
    loop_queue(rt, f);
  }
  return 1;
}

/* detached(home, named, fn, ...) -> a task in the context of the running one, but under no scope: what
** becomes of who made it does not concern it. It waits for `launch`; a cancellation before that ends
** it. In the end, however it comes, `home:_ended(task)` is called. It is named after the function
** `named`, if that is not nil. */
static int l_detached(lua_State *L) {
  struct runtime *rt = runtime(L);
  luaL_checktype(L, 1, LUA_TTABLE);
  argument_callable(L, 3);
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 3, rt->root); /* home named task */
  fiber_make_cold(L, 3, f);                                        /* should anything raise */
  need_plan(L, 3);
  lua_pushvalue(L, 1);
  plan_set(L, -2, PLAN_HOME);
  lua_settop(L, 3);
  if (fiber_is_lost(&f->task)) { /* a finalizer has closed its coroutine */
    fiber_settle_lost(L, 3);
    return task_push_outcome(L, 3, &f->task); /* raises */
  }
  if (lua_isfunction(L, 2)) {
    lua_pushvalue(L, 2);
    fiber_name(L, f);
  }
  f->task.state = TASK_QUEUED;
  f->task.traits |= TRAIT_QUEUED;
  return 1;
}

/* launch(task, hot) -> false: that detached task does not wait for it any more. Hot: it runs at once, up to
** its first suspension, instead of on a later turn. */
static int l_launch(lua_State *L) {
  struct fiber *f = (struct fiber *)task_check(L, 1);
  bool hot = lua_toboolean(L, 2);
  bool waits = f->task.traits & TRAIT_QUEUED && !(f->task.flags & TASK_LINKED) &&
               !task_done(&f->task) && f->co != NULL;
  if (waits) {
    task_hold(L, 1, &f->task);
    f->task.traits &= (uint8_t)~TRAIT_QUEUED;
    if (hot) return fiber_run_hot(L, 1, f, executed_k);
    loop_ready(runtime(L), &f->task);
  }
  lua_pushboolean(L, waits);
  return 1;
}

/* try_execute(scheduler, task) */
static int l_try_execute(lua_State *L) {
  schedule_check(L, 1);
  task_check(L, 2);
  lua_settop(L, 2);
  struct fiber *f = queued_in(L, 2, 1);
  if (f != NULL) return execute(L, 2, f, executed_k);
  lua_pushboolean(L, 0);
  return 1;
}

/* is_queued(scheduler, task) */
static int l_is_queued(lua_State *L) {
  lua_pushboolean(L, queued_in(L, 2, 1) != NULL);
  return 1;
}

/* release(scheduler, task): a task queued there is the loop's to run, on a later turn */
static int l_release(lua_State *L) {
  struct fiber *f = queued_in(L, 2, 1);
  if (f != NULL) {
    take_back(L, 2, &f->task);
    f->task.traits |= TRAIT_DIRECT;
    loop_ready(runtime(L), &f->task);
  }
  lua_pushboolean(L, f != NULL);
  return 1;
}

/* recall(task): its token was canceled before it started; nobody need be asked to run what only ends it */
static int l_recall(lua_State *L) {
  struct fiber *f = (struct fiber *)task_check(L, 1);
  if (!task_is(&f->task, KIND_FIBER) || f->task.flags & TASK_STARTED || task_done(&f->task))
    return 0;
  if (handed(L, 1) != NULL) {
    take_back(L, 1, &f->task);
    loop_ready(runtime(L), &f->task);
  }
  f->task.traits |= TRAIT_DIRECT;
  return 0;
}

/* current_scheduler() -> that of the running task, or nil: the default */
static int l_current_scheduler(lua_State *L) {
  struct task *me = runtime(L)->me;
  if (!(me->traits & TRAIT_PLAN)) return 0;
  task_push(L, me);
  push_plan(L, -1);
  lua_rawgeti(L, -1, PLAN_SCHEDULER);
  return lua_toboolean(L, -1) ? 1 : 0;
}

/* synchronization_context() -> the current one, or nil */
static int l_context(lua_State *L) {
  schedule_push_context(L, runtime(L)->me);
  return 1;
}

/* set_synchronization_context(context or nil) */
static int l_set_context(lua_State *L) {
  lua_settop(L, 1);
  if (!lua_isnil(L, 1)) luaL_checktype(L, 1, LUA_TTABLE);
  schedule_set_context(L, runtime(L)->me);
  return 0;
}

static const luaL_Reg functions[] = {{"spawn_on", l_spawn_on},
                                     {"detached", l_detached},
                                     {"launch", l_launch},
                                     {"try_execute", l_try_execute},
                                     {"is_queued", l_is_queued},
                                     {"release", l_release},
                                     {"recall", l_recall},
                                     {"is_scheduler", l_is_scheduler},
                                     {"current_scheduler", l_current_scheduler},
                                     {"synchronization_context", l_context},
                                     {"set_synchronization_context", l_set_context},
                                     {"configure_await", l_configure_await},
                                     {NULL, NULL}};

static const luaL_Reg configured_methods[] = {{NULL, NULL}};

ONCE static void schedule_open(lua_State *L) {
  module_class(L, TAG_CONFIGURED, "coflow.ConfiguredTask", configured_methods, NULL);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_CONFIGURED));
  module_push_function(L, l_configured_await);
  lua_setfield(L, -2, "__await");
  lua_getfield(L, -1, "methods");
  lua_getfield(L, -3, "await"); /* module class methods await: as they take any awaitable */
  lua_setfield(L, -2, "await");
  lua_getfield(L, -3, "try_await");
  lua_setfield(L, -2, "try_await");
  lua_pop(L, 2);
  module_push_function(L, hand);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_HAND);
}

const struct part schedule_part = {functions, schedule_open, NULL};
