/*
** sync.c - what tasks agree by: how it is asked for, whatever it is.
**
** Each object is a holder of waiters (waiter.c) and a number. Who asks for something gets it at once if
** it is there and nobody waits for it already; else it is handed over later, in the order of arrival,
** while the waiter still sleeps: from then on it is the waiter's, whatever is canceled. The functions
** that change the number first change it, then hand out what there is: finalizers of users, which may
** run in between, find an object in order.
**
** A class knows what is there (attempt) and when to hand it out. All else is here: arguments, tokens
** and times, the two ways to wait, the end by dispose. Canceled comes before there, and both before a
** time of 0.
**
** A lock is asked for with a key, made here for whoever asks (lock.c): the waiter brings it along, as
** the value that it waits with, and is granted it. In direct style the running task is noted as its
** owner then. What was taken by an operation (lock_async) has no owner: the operation may be anybody's.
**
** Invariant: nobody waits for what is there.
**
** Source:    System.Threading of .NET; the locks are AsyncEx's.
** SPDX-License-Identifier: MIT
*/
#include "sync.h"

#include <math.h>

static const struct sync_class *const classes[] = {
    &semaphore_class,  &lock_class,      &shared_lock_class, &manual_event_class,
    &auto_event_class, &countdown_class, &barrier_class,     &condition_class};
enum { CLASSES = sizeof classes / sizeof *classes };

static struct link *queue_of(struct sync *s, enum sync_what what) {
  return what == SYNC_READ ? lock_readers(s) : &s->waiters;
}

/* ---- for all classes ---- */

struct sync *sync_new(lua_State *L, const struct sync_class *class, size_t size, int uservalues) {
  struct sync *s = (struct sync *)holder_new(L, class->tag, size, uservalues);
  s->class = class;
  link_init(&s->waiters);
  link_init(&s->leaving);
  return s;
}

/* [-0, +1, m] */
static void push_disposed(lua_State *L, const struct sync *s) {
  error_push(L, ERROR_DISPOSED, "the %s has been disposed", s->class->name);
}

void sync_refuse(lua_State *L, const struct sync *s) {
  push_disposed(L, s);
  lua_error(L);
}

lua_Integer sync_opt_number(lua_State *L) {
  lua_Integer n = luaL_optinteger(L, 2, 1);
  luaL_argcheck(L, n >= 1, 2, "must be at least 1");
  return n;
}

lua_Integer sync_grant(lua_State *L, struct sync *s, lua_Integer n) {
  struct runtime *rt = runtime(L);
  lua_Integer granted = 0;
  struct nap *w;
  while (granted < n && (w = waiter_take(L, 1, &s->holder, &s->waiters)) != NULL) {
    granted++;
    lua_pushboolean(L, 1);
    waiter_grant(L, rt, w);
  }
  return granted;
}

/* Tasks may land in that, and some of those that are granted may come back here. */
lua_Integer sync_grant_all(lua_State *L, struct sync *s) {
  struct runtime *rt = runtime(L);
  int value = lua_gettop(L);
  lua_Integer granted = 0;
  struct nap *w;
  link_move(&s->waiters, &s->leaving);
  while ((w = waiter_take(L, 1, &s->holder, &s->leaving)) != NULL) {
    granted++;
    lua_pushvalue(L, value);
    waiter_grant(L, rt, w);
  }
  lua_pop(L, 1);
  return granted;
}

/* ---- operations ---- */

/* [-n, +3-n, e] the arguments of what is asked for, as: object, timeout or key or nil, token */
static struct sync *arguments(lua_State *L, const struct sync_class *class, enum sync_what what,
                              double *seconds) {
  struct sync *s = (struct sync *)object_check(L, 1, class->tag);
  *seconds = HUGE_VAL;
  if (class->timed) {
    if (!lua_isnoneornil(L, 2)) *seconds = module_seconds(L, 2);
    token_opt(L, 3);
    sync_check_live(L, s);
    lua_settop(L, 3);
    return s;
  }
  token_opt(L, 2);
  sync_check_live(L, s);
  lua_settop(L, 2);
  if (what == SYNC_WAIT)
    lua_pushnil(L);
  else {
    lock_push_key(L, what);
    sync_check_live(L, s); /* a finalizer may have been here */
  }
  lua_insert(L, 2);
  return s;
}

/* [-0, +1, e] an operation, for arguments that are in their places */
static struct task *start(lua_State *L, struct sync *s, enum sync_what what, double seconds,
                          struct scope *scope) {
  struct runtime *rt = runtime(L);
  struct token *token = token_opt(L, 3);
  struct queued *op = waiter_operation(L, KIND_QUEUED, 1, seconds); /* at 4 */
  struct task *t = &op->timed.pending.task;
  sync_check_live(L, s);
  if (operation_canceled(token, scope)) {
    operation_push_canceled(L, token, 3, scope);
    task_settle_canceled(L, rt, 4);
  } else if (s->class->attempt(L, s))
    waiter_settle(L, rt, 4, 0, false);
  else if (seconds == 0) {
    lua_pushboolean(L, 0);
    waiter_settle(L, rt, 4, 0, false);
  } else {
    if (what != SYNC_WAIT) {
      lua_pushvalue(L, 2);
      lua_setiuservalue(L, 4, OP_KEYS);
    }
    waiter_start(L, 4, queue_of(s, what), 3, scope);
  }
  return t;
}

int sync_twin(lua_State *L, const struct sync_class *class, enum sync_what what) {
  double seconds;
  struct sync *s = arguments(L, class, what, &seconds);
  start(L, s, what, seconds, operation_scope(L, 3));
  lua_settop(L, 4);
  return 1;
}

/* ---- direct style ---- */

static int operation_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  (void)status;
  if (!fiber_on_top(L, rt)) return lua_yieldk(L, 0, ctx, operation_k); /* not by us: wait on */
  fiber_resumed(L, rt);
  int n = task_push_outcome(L, 1, (struct task *)ctx);
  if (object_test(L, -1, TAG_KEY)) lock_own(L, lua_gettop(L));
  return n;
}

static int wait_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = (struct runtime *)ctx;
  (void)status;
  switch (waiter_resumed(L, rt)) {
    case WAITER_STRAY: lua_settop(L, 2); return lua_yieldk(L, 0, ctx, wait_k);
    case WAITER_EXPIRED: lua_pushboolean(L, 0); return 1;
    default: break;
  }
  if (waiter_what(rt) != SYNC_WAIT) lock_own(L, 2);
  return 1;
}

/* what cannot be had at once; the arguments are in their places. f: from the start */
static int wait_for(lua_State *L, struct sync *s, enum sync_what what, double seconds,
                    lua_CFunction f) {
  struct runtime *rt = runtime(L);
  if (what != SYNC_WAIT) lock_refuse_owner(L);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) {
    if (!s->class->timed) lua_remove(L, 2);
    int n = fiber_outside(L, f);
    if (what != SYNC_WAIT) lock_own(L, lua_gettop(L)); /* not by the task that did it for us */
    return n;
  }
  if (token_opt(L, 3) != NULL) { /* as an operation, whose scope is ours whatever flows to others */
    struct scope *scope = scope_ambient(L, rt);
    struct task *op = start(L, s, what, seconds, scope);
    ((struct queued *)(void *)op)->direct = true;
    lua_settop(L, 4);
    lua_replace(L, 1);
    lua_settop(L, 1);
    if (task_done(op)) return operation_k(L, LUA_OK, (lua_KContext)op);
    return fiber_await(L, rt, me, op, operation_k, false);
  }
  bool deaf = token_none(L, 3);
  lua_settop(L, 2);
  return waiter_wait_for(L, rt, &s->holder, queue_of(s, what), what, seconds, deaf, wait_k);
}

int sync_direct(lua_State *L, const struct sync_class *class, enum sync_what what,
                lua_CFunction f) {
  double seconds;
  struct runtime *rt = runtime(L);
  struct sync *s = (struct sync *)object_test(L, 1, class->tag);
  if (s != NULL && !s->disposed && class->timed && lua_gettop(L) == 1) { /* the common case */
    operation_check_tokens(L, rt, 2);
    if (class->attempt(L, s)) return 1;
    lua_settop(L, 3);
    return wait_for(L, s, what, HUGE_VAL, f);
  }
  s = arguments(L, class, what, &seconds);
  operation_check_tokens(L, rt, 3);
  if (class->attempt(L, s)) {
    if (what != SYNC_WAIT) lock_own(L, 2);
    return 1;
  }
  if (seconds > 0) return wait_for(L, s, what, seconds, f);
  lua_pushboolean(L, 0);
  return 1;
}

/* ---- Lua face ---- */

static struct sync *any(lua_State *L, int i) {
  for (int k = 0; k < CLASSES; k++)
    if (object_test(L, i, classes[k]->tag)) return (struct sync *)lua_touserdata(L, i);
  return NULL;
}

static struct sync *check_any(lua_State *L, int i) {
  struct sync *s = any(L, i);
  if (s == NULL) luaL_typeerror(L, i, "object of coflow.sync");
  return s;
}

/* [-0, +0, m] */
static void fail_all(lua_State *L, struct sync *s, struct link *q, int error) {
  struct nap *n;
  while ((n = waiter_take(L, 1, &s->holder, q)) != NULL) {
    lua_pushvalue(L, error);
    waiter_fail(L, runtime(L), n);
  }
}

static int l_dispose(lua_State *L) {
  struct sync *s = check_any(L, 1);
  lua_settop(L, 1);
  if (s->disposed) return 0;
  push_disposed(L, s);
  s->disposed = true;
  fail_all(L, s, &s->waiters, 2);
  if (lock_readers(s) != NULL) fail_all(L, s, lock_readers(s), 2);
  return 0;
}

static int l_gc(lua_State *L) {
  struct sync *s = any(L, 1);
  if (s == NULL || s->waiters.next == NULL) return 0;
  holder_drop(&s->waiters);
  holder_drop(&s->leaving);
  if (lock_readers(s) != NULL) holder_drop(lock_readers(s));
  return 0;
}

static int l_tostring(lua_State *L) {
  const struct sync *s = check_any(L, 1);
  const char *state = "";
  if (s->class->state) state = lua_pushfstring(L, "%s, ", s->class->state(L, s));
  lua_pushfstring(L, "coflow.%s (%s%d waiting%s)", s->class->name, state, (int)s->holder.waiting,
                  s->disposed ? ", disposed" : "");
  return 1;
}

static const luaL_Reg methods[] = {{"dispose", l_dispose}, {NULL, NULL}};
static const luaL_Reg metamethods[] = {
    {"__close", l_dispose}, {"__gc", l_gc}, {"__tostring", l_tostring}, {NULL, NULL}};

/* [-0, +0, m] */
static void class_open(lua_State *L, const struct sync_class *class) {
  lua_pushfstring(L, "coflow.%s", class->name);
  module_class(L, class->tag, lua_tostring(L, -1), class->methods, class->properties);
  module_methods(L, class->tag, methods);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(class->tag));
  module_functions(L, metamethods);
  lua_pop(L, 2);
}

/* sync() -> the constructors */
static int l_sync(lua_State *L) {
  lua_createtable(L, 0, CLASSES);
  for (int k = 0; k < CLASSES; k++) {
    module_push_function(L, classes[k]->new);
    lua_setfield(L, -2, classes[k]->name);
  }
  return 1;
}

static const luaL_Reg functions[] = {{"sync", l_sync},
                                     {"enter_lock", lock_enter},
                                     {"condition_wait", condition_wait},
                                     {"check_condition", condition_check},
                                     {NULL, NULL}};

ONCE static void sync_open(lua_State *L) {
  for (int k = 0; k < CLASSES; k++) class_open(L, classes[k]);
  lock_open(L);
}

const struct part sync_part = {functions, sync_open, NULL};
