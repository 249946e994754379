/*
** sync.c - semaphore, locks, events, countdown, condition, barrier: what tasks agree by.
**
** Each is a holder of waiters (waiter.c) and a number. Who asks for something gets it at once if it is there
** and nobody waits for it already; else it is handed over later, in the order of arrival, while the waiter
** still sleeps: from then on it is the waiter's, whatever is canceled. The functions that change the number
** first change it, then hand out what there is: finalizers of users, which may run in between, find an object
** in order.
**
** Locks are opened by *keys*, each good for one time. A waiter brings its key along, as the value that it waits
** with; when its turn comes the key is made to fit. An exclusive lock fits one key at a time, the one with its
** serial number, so an old key opens nothing; those of readers are good while they have a number at all.
**
** Owners. So that a task can be told that it would wait for itself, a lock remembers which tasks took it, in a
** weak table: it must not keep them alive, nor take a new task for an old one that had its address. What was
** taken by an operation (lock_async) has no owner: the operation may be anybody's.
**
** A shared lock prefers writers: readers come in only while no writer waits. When the last waiting writer gives
** up, the readers behind it go in. That may be found out in the middle of a cancellation, when nothing may be
** completed; so the lock has a *gate*, which is put on the landing list like a task, and lands a moment later.
**
** A condition does without callbacks what its Lua callers could not do exactly: it is waited for by an
** operation, which is in the queue before the lock is opened. When that has ended, however it did, the lock
** is taken again, deaf to cancellation, with a key that has the number of the one that the caller holds.
**
** Invariants: nobody waits for what is there: a semaphore or an auto event has waiters only while its count is
**             0, a countdown while it is not; a lock's writers only while it is taken, its readers only while
**             a writer is in or waits, save that the gate is about to land.
**             A lock is EXCLUSIVE exactly while its serial is not 0.
**
** Source:     SemaphoreSlim, ManualResetEventSlim, CountdownEvent, Barrier, Monitor of .NET; the locks and the
**             order of readers and writers are AsyncEx's.
** SPDX-License-Identifier: MIT
*/
#include "waiter.h"

#include <math.h>

enum { EXCLUSIVE = -1 };

struct sync {
  struct holder holder;
  bool disposed;
  lua_Integer count; /* slots; an event: 1 if set; signals; phases; readers, or EXCLUSIVE */
  lua_Integer max;   /* of a semaphore: slots; of a barrier: participants */
  struct link waiters;
};
struct barrier {
  struct sync sync;
  uint32_t leaving; /* waiters that a phase has yet to wake */
};
struct lock {
  struct sync sync;
  uint64_t serial, last;  /* of the key that fits, or 0; the last one that was given out */
  int free_owner, owners; /* slots for readers in the table of owners */
  struct link readers;    /* of a shared lock, as is what follows */
  struct task gate;
};
enum { LOCK_OWNERS = HOLDER_WAITERS + 1 }; /* the one of an exclusive lock is the first */
enum { CONDITION_LOCK = HOLDER_WAITERS + 1 };

struct key {
  uint32_t tag;
  bool reader;
  int owner; /* of a reader: its slot among the owners, or 0 */
  uint64_t serial;
};
enum { KEY_LOCK = 1, KEY_OWNER };

enum what { WAIT, LOCK, READ };

static struct link *queue_of(struct sync *s, enum what what) {
  return what == READ ? &container_of(s, struct lock, sync)->readers : &s->waiters;
}

/* ---- helpers ---- */

/* [-0, +1, m] the name of the class of the object at i, for messages */
static const char *push_class(lua_State *L, int i) {
  luaL_getmetafield(L, i, "__name");
  return lua_tostring(L, -1) + sizeof "coflow." - 1;
}

/* [-0, +1, m] */
static void push_disposed(lua_State *L, int i) {
  error_push(L, ERROR_DISPOSED, "the %s has been disposed", push_class(L, i));
  lua_remove(L, -2);
}

static void check_live(lua_State *L, const struct sync *s) {
  if (!s->disposed) return;
  push_disposed(L, 1);
  lua_error(L);
}

/* [-0, +0, v] the object at index 1, which has not been disposed */
static struct sync *check(lua_State *L, uint32_t tag) {
  struct sync *s = (struct sync *)object_check(L, 1, tag);
  check_live(L, s);
  return s;
}

/* [-0, +0, v] how many: argument 2 */
static lua_Integer opt_number(lua_State *L) {
  lua_Integer n = luaL_optinteger(L, 2, 1);
  luaL_argcheck(L, n >= 1, 2, "must be at least 1");
  return n;
}

/* takes a timeout, and gives a boolean */
static bool is_timed(uint32_t tag) {
  return tag == TAG_SEMAPHORE || tag == TAG_MANUAL_EVENT || tag == TAG_AUTO_EVENT ||
         tag == TAG_COUNTDOWN;
}

/* [-0, +0, m] grants true to at most n waiters; how many there were */
static lua_Integer grant(lua_State *L, int i, struct sync *s, lua_Integer n) {
  struct runtime *rt = runtime(L);
  lua_Integer granted = 0;
  struct nap *w;
  while (granted < n && (w = waiter_take(L, i, &s->waiters)) != NULL) {
    granted++;
    lua_pushboolean(L, 1);
    waiter_grant(L, rt, w);
  }
  return granted;
}

/* ---- owners ---- */

/* [-0, +0, m] the running task has taken the lock of the key at i */
static void own(lua_State *L, int i) {
  struct key *key = (struct key *)lua_touserdata(L, i);
  lua_getiuservalue(L, i, KEY_LOCK);
  struct lock *l = (struct lock *)lua_touserdata(L, -1);
  lua_getiuservalue(L, -1, LOCK_OWNERS); /* lock owners */
  if (!key->reader)
    key->owner = 1;
  else if (key->owner != 0)
    ; /* it has a slot */
  else if (l->free_owner == 0)
    key->owner = ++l->owners;
  else {
    key->owner = l->free_owner;
    lua_rawgeti(L, -1, key->owner);
    l->free_owner = (int)lua_tointeger(L, -1);
    lua_pop(L, 1);
  }
  task_push(L, runtime(L)->me);
  lua_rawseti(L, -2, key->owner);
  lua_pop(L, 2);
}

/* [-0, +0, -] the lock at i is not taken any more by whoever had the key */
static void disown(lua_State *L, int i, struct lock *l, struct key *key) {
  if (key->owner == 0) return;
  lua_getiuservalue(L, i, LOCK_OWNERS);
  if (key->reader)
    slots_free(L, -1, &l->free_owner, key->owner);
  else {
    lua_pushboolean(L, 0);
    lua_rawseti(L, -2, 1);
  }
  key->owner = 0;
  lua_pop(L, 1);
}

/* the running task has taken the lock at i and not given it back */
static bool is_mine(lua_State *L, int i) {
  const struct task *me = runtime(L)->me;
  const struct lock *l = (const struct lock *)lua_touserdata(L, i);
  bool mine = false;
  lua_getiuservalue(L, i, LOCK_OWNERS);
  for (int k = l->owners; k >= 1 && !mine; k--) {
    lua_rawgeti(L, -1, k);
    mine = lua_touserdata(L, -1) == (const void *)me;
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return mine;
}

static int refuse_own(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  const char *who = "the code outside every task";
  if (rt->me != rt->outside) {
    task_push(L, rt->me);
    task_push_name(L, -1);
    who = lua_pushfstring(L, "task '%s'", lua_tostring(L, -1));
  }
  return error_throw(L, ERROR_OPERATION,
                     "%s holds this %s already, and would wait for itself: it is not re-entrant",
                     who, push_class(L, i));
}

/* ---- locks ---- */

/* [-0, +1, m] a key to the lock at index 1, which does not fit yet */
static void key_new(lua_State *L, enum what what) {
  struct key *key = (struct key *)object_new(L, TAG_KEY, sizeof *key, KEY_LOCK);
  key->reader = what == READ;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, KEY_LOCK);
}

/* takes the lock, if that can be; fit says for which key */
static bool enter(struct lock *l, enum what what) {
  struct sync *s = &l->sync;
  if (waiter_any(&s->waiters)) return false;
  if (what == READ) {
    if (s->count == EXCLUSIVE) return false;
    s->count++;
  } else {
    if (s->count != 0) return false;
    s->count = EXCLUSIVE;
  }
  return true;
}

static void fit(struct lock *l, struct key *key) {
  if (key->serial == 0) key->serial = ++l->last;
  if (!key->reader) l->serial = key->serial;
}

/* [-1, +0, m] the waiter on top gets the lock, which has been entered for it */
static void hand(lua_State *L, struct lock *l, struct nap *n) {
  waiter_push_value(L, n);
  fit(l, (struct key *)lua_touserdata(L, -1));
  waiter_grant(L, runtime(L), n);
}

/* [-0, +0, m] lets in who can be */
static void admit(lua_State *L, int i, struct lock *l) {
  struct sync *s = &l->sync;
  struct nap *n;
  if (s->count == 0 && waiter_any(&s->waiters)) {
    s->count = EXCLUSIVE;
    if ((n = waiter_take(L, i, &s->waiters)) != NULL) {
      hand(L, l, n);
      return;
    }
    s->count = 0;
  }
  if (s->holder.tag == TAG_LOCK) return;
  while (s->count != EXCLUSIVE && !waiter_any(&s->waiters) &&
         (n = waiter_take(L, i, &l->readers)) != NULL) {
    s->count++;
    hand(L, l, n);
  }
}

/* [-0, +0, m] if the key at i fits, its lock is opened, and the key fits no more */
static void unlock(lua_State *L, int i) {
  struct key *key = (struct key *)lua_touserdata(L, i);
  lua_getiuservalue(L, i, KEY_LOCK);
  int lock = lua_gettop(L);
  struct lock *l = (struct lock *)lua_touserdata(L, lock);
  if (key->serial != 0 && (key->reader || key->serial == l->serial)) {
    if (key->reader) {
      key->serial = 0;
      l->sync.count--;
    } else {
      l->serial = 0;
      l->sync.count = 0;
    }
    disown(L, lock, l, key);
    admit(L, lock, l);
  }
  lua_settop(L, lock - 1);
}

void sync_left(lua_State *L, int i) {
  struct lock *l = (struct lock *)lua_touserdata(L, i);
  if (l->sync.count != EXCLUSIVE && !waiter_any(&l->sync.waiters) && waiter_any(&l->readers))
    loop_land(L, runtime(L), i, &l->gate);
}

void sync_land(lua_State *L, int i) {
  struct lock *l = (struct lock *)lua_touserdata(L, i);
  task_forget(L, &l->gate);
  admit(L, i, l);
}

/* ---- the barrier ---- */

/* Those who wait, by the list: somebody may have closed the coroutine of one. */
static uint32_t waiting(struct sync *s) {
  uint32_t n = 0;
  for (const struct link *l = s->waiters.next; l != &s->waiters; l = l->next) n++;
  return s->holder.waiting = n;
}

/* [-0, +1, m] the last participant ends the phase: its number; false: it is not the last */
static bool arrive(lua_State *L, struct barrier *b) {
  struct sync *s = &b->sync;
  if (s->holder.waiting - b->leaving + 1 < s->max || waiting(s) - b->leaving + 1 < s->max)
    return false;
  struct runtime *rt = runtime(L);
  struct nap *n;
  lua_Integer phase = s->count++;
  b->leaving = s->holder.waiting;
  while (b->leaving > 0 && (n = waiter_take(L, 1, &s->waiters)) != NULL) {
    b->leaving--;
    lua_pushinteger(L, phase);
    waiter_grant(L, rt, n);
  }
  b->leaving = 0;
  lua_pushinteger(L, phase);
  return true;
}

/* ---- asking ---- */

/* [-0, +1, m] what is asked for of the object at index 1, if it is there; false: [-0, +0]. Of a lock it is the
** key at index 2. Creates nothing before it has it. */
static bool attempt(lua_State *L, struct sync *s, enum what what) {
  switch (s->holder.tag) {
    case TAG_SEMAPHORE:
    case TAG_AUTO_EVENT:
      if (s->count == 0 || waiter_any(&s->waiters)) return false;
      s->count--;
      break;
    case TAG_MANUAL_EVENT:
      if (s->count == 0) return false;
      break;
    case TAG_COUNTDOWN:
      if (s->count != 0) return false;
      break;
    case TAG_BARRIER: return arrive(L, container_of(s, struct barrier, sync));
    default: {
      struct lock *l = container_of(s, struct lock, sync);
      if (!enter(l, what)) return false;
      lua_pushvalue(L, 2);
      fit(l, (struct key *)lua_touserdata(L, 2));
      return true;
    }
  }
  lua_pushboolean(L, 1);
  return true;
}

/* [-n, +3-n, v] the arguments of what is asked for, as: object, timeout or key or nil, token */
static struct sync *arguments(lua_State *L, uint32_t tag, enum what what, double *seconds) {
  struct sync *s = (struct sync *)object_check(L, 1, tag);
  *seconds = HUGE_VAL;
  if (is_timed(tag)) {
    if (!lua_isnoneornil(L, 2)) *seconds = module_seconds(L, 2);
    token_opt(L, 3);
    check_live(L, s);
    lua_settop(L, 3);
    return s;
  }
  token_opt(L, 2);
  check_live(L, s);
  lua_settop(L, 2);
  if (what == WAIT)
    lua_pushnil(L);
  else {
    key_new(L, what);
    check_live(L, s); /* a finalizer may have been here */
  }
  lua_insert(L, 2);
  return s;
}

/* [-0, +1, e] an operation, for arguments that are in their places */
static struct task *start(lua_State *L, struct sync *s, enum what what, double seconds,
                          struct scope *scope) {
  struct runtime *rt = runtime(L);
  struct token *token = token_opt(L, 3);
  struct queued *op = waiter_operation(L, KIND_QUEUED, 1, seconds); /* at 4 */
  struct task *t = &op->timed.pending.task;
  check_live(L, s);
  if (operation_canceled(token, scope)) {
    operation_push_canceled(L, token, 3, scope);
    task_settle_canceled(L, rt, 4);
  } else if (attempt(L, s, what))
    waiter_settle(L, rt, 4, 0, false);
  else if (seconds == 0) {
    lua_pushboolean(L, 0);
    waiter_settle(L, rt, 4, 0, false);
  } else {
    if (what != WAIT) {
      lua_pushvalue(L, 2);
      lua_setiuservalue(L, 4, OP_KEYS);
    }
    op->clauses[0].what = (uint8_t)what;
    waiter_start(L, 4, queue_of(s, what), 3, scope);
  }
  return t;
}

static int twin(lua_State *L, uint32_t tag, enum what what) {
  double seconds;
  struct sync *s = arguments(L, tag, what, &seconds);
  start(L, s, what, seconds, operation_scope(L, 3));
  lua_settop(L, 4);
  return 1;
}

static int operation_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  (void)status;
  if (!fiber_on_top(L, rt)) return lua_yieldk(L, 0, ctx, operation_k); /* not by us: wait on */
  fiber_resumed(L, rt);
  int n = task_push_outcome(L, 1, (struct task *)ctx);
  if (object_test(L, -1, TAG_KEY)) own(L, lua_gettop(L));
  return n;
}

static int wait_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  switch (waiter_resumed(L, runtime(L))) {
    case WAITER_STRAY: lua_settop(L, 2); return lua_yieldk(L, 0, ctx, wait_k);
    case WAITER_EXPIRED: lua_pushboolean(L, 0); return 1;
    default: break;
  }
  lua_settop(L, 2);
  if (ctx != WAIT) own(L, 2);
  return 1;
}

/* what cannot be had at once; the arguments are in their places. f: from the start */
static int wait_for(lua_State *L, struct sync *s, enum what what, double seconds, lua_CFunction f) {
  struct runtime *rt = runtime(L);
  if (what != WAIT && is_mine(L, 1)) return refuse_own(L, 1);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) {
    if (!is_timed(s->holder.tag)) lua_remove(L, 2);
    int n = fiber_outside(L, f);
    if (what != WAIT) own(L, lua_gettop(L)); /* not by the task that did it for us */
    return n;
  }
  if (token_opt(L, 3) != NULL) { /* as an operation, whose scope is ours whatever flows to others */
    struct scope *scope = scope_ambient(L, rt);
    struct task *op = start(L, s, what, seconds, scope);
    lua_settop(L, 4);
    lua_replace(L, 1);
    lua_settop(L, 1);
    if (task_done(op)) return operation_k(L, LUA_OK, (lua_KContext)op);
    return fiber_await(L, rt, me, op, operation_k);
  }
  if (token_none(L, 3)) me->task.flags |= TASK_DEAF;
  lua_settop(L, 2);
  return waiter_wait(L, rt, me, queue_of(s, what), seconds, (lua_KContext)what, wait_k);
}

/* raises if the token at k, or the ambient one, is canceled */
static inline void check_tokens(lua_State *L, int k) {
  struct scope *s = ((struct fiber *)runtime(L)->me)->member.scope;
  if (lua_gettop(L) < k) {
    if (s->canceled) scope_throw(L, s);
    return;
  }
  struct token *token = token_opt(L, k);
  if (operation_canceled(token, s) && !token_none(L, k)) operation_throw_canceled(L, token, k, s);
}

/* direct style. Canceled comes before there, and both before a time of 0. */
static int direct(lua_State *L, uint32_t tag, enum what what, lua_CFunction f) {
  double seconds;
  struct sync *s = (struct sync *)object_test(L, 1, tag);
  if (s != NULL && !s->disposed && is_timed(tag) && lua_gettop(L) == 1) { /* the common case */
    check_tokens(L, 2);
    if (attempt(L, s, what)) return 1;
    lua_settop(L, 3);
    return wait_for(L, s, what, HUGE_VAL, f);
  }
  s = arguments(L, tag, what, &seconds);
  check_tokens(L, 3);
  if (attempt(L, s, what)) {
    if (what != WAIT) own(L, 2);
    return 1;
  }
  if (seconds > 0) return wait_for(L, s, what, seconds, f);
  lua_pushboolean(L, 0);
  return 1;
}

/* the key, or nil */
static int try(lua_State *L, uint32_t tag, enum what what) {
  struct sync *s = check(L, tag);
  lua_settop(L, 1);
  key_new(L, what);
  check_live(L, s);
  if (attempt(L, s, what))
    own(L, 2);
  else
    lua_pushnil(L);
  return 1;
}

/* ---- Lua face: what all have ---- */

/* [-0, +0, m] */
static void fail_all(lua_State *L, struct link *q, int error) {
  struct nap *n;
  while ((n = waiter_take(L, 1, q)) != NULL) {
    lua_pushvalue(L, error);
    waiter_fail(L, runtime(L), n);
  }
}

static struct sync *any(lua_State *L, int i) {
  for (uint32_t tag = TAG_SEMAPHORE; tag <= TAG_BARRIER; tag += TAG_LOCK - TAG_SEMAPHORE)
    if (tag != TAG_KEY && tag != TAG_RETAKE && object_test(L, i, tag))
      return (struct sync *)lua_touserdata(L, i);
  return NULL;
}

static int l_dispose(lua_State *L) {
  struct sync *s = any(L, 1);
  if (s == NULL) return luaL_typeerror(L, 1, "object of coflow.sync");
  lua_settop(L, 1);
  if (s->disposed) return 0;
  push_disposed(L, 1);
  s->disposed = true;
  fail_all(L, &s->waiters, 2);
  if (s->holder.tag == TAG_SHARED_LOCK)
    fail_all(L, &container_of(s, struct lock, sync)->readers, 2);
  return 0;
}

static int l_gc(lua_State *L) {
  struct sync *s = any(L, 1);
  if (s == NULL || s->waiters.next == NULL) return 0;
  holder_drop(&s->waiters);
  if (s->holder.tag == TAG_SHARED_LOCK) holder_drop(&container_of(s, struct lock, sync)->readers);
  return 0;
}

static int l_tostring(lua_State *L) {
  const struct sync *s = any(L, 1);
  const char *state = "";
  if (s == NULL) return luaL_typeerror(L, 1, "object of coflow.sync");
  luaL_getmetafield(L, 1, "__name");
  switch (s->holder.tag) {
    case TAG_SEMAPHORE: state = lua_pushfstring(L, "%I slots, ", (LUAI_UACINT)s->count); break;
    case TAG_LOCK: state = s->count ? "locked, " : "free, "; break;
    case TAG_SHARED_LOCK:
      state = s->count > 0 ? lua_pushfstring(L, "%I readers, ", (LUAI_UACINT)s->count)
              : s->count   ? "a writer, "
                           : "free, ";
      break;
    case TAG_MANUAL_EVENT:
    case TAG_AUTO_EVENT: state = s->count ? "set, " : "not set, "; break;
    case TAG_COUNTDOWN: state = lua_pushfstring(L, "%I to come, ", (LUAI_UACINT)s->count); break;
    case TAG_BARRIER:
      state =
          lua_pushfstring(L, "phase %I of %I tasks, ", (LUAI_UACINT)s->count, (LUAI_UACINT)s->max);
      break;
    default: break;
  }
  lua_pushfstring(L, "%s (%s%d waiting%s)", lua_tostring(L, 2), state, (int)s->holder.waiting,
                  s->disposed ? ", disposed" : "");
  return 1;
}

/* [-0, +1, m] */
static struct sync *sync_new(lua_State *L, uint32_t tag, size_t size, int uservalues) {
  struct sync *s = (struct sync *)holder_new(L, tag, size, uservalues);
  link_init(&s->waiters);
  return s;
}

/* ---- Lua face: Semaphore ---- */

/* Semaphore(initial, max) */
static int l_semaphore(lua_State *L) {
  lua_Integer initial = luaL_checkinteger(L, 1);
  bool unlimited =
      lua_isnoneornil(L, 2) || (lua_type(L, 2) == LUA_TNUMBER && lua_tonumber(L, 2) == HUGE_VAL);
  lua_Integer max = unlimited ? LUA_MAXINTEGER : luaL_checkinteger(L, 2);
  luaL_argcheck(L, initial >= 0, 1, "must not be negative");
  luaL_argcheck(L, max >= 1, 2, "must be at least 1");
  luaL_argcheck(L, initial <= max, 1, "must not be greater than the maximum");
  struct sync *s = sync_new(L, TAG_SEMAPHORE, sizeof *s, HOLDER_WAITERS);
  s->count = initial;
  s->max = max;
  return 1;
}

static int l_semaphore_wait(lua_State *L) {
  return direct(L, TAG_SEMAPHORE, WAIT, l_semaphore_wait);
}
static int l_semaphore_wait_async(lua_State *L) { return twin(L, TAG_SEMAPHORE, WAIT); }

static int l_release(lua_State *L) {
  struct sync *s = check(L, TAG_SEMAPHORE);
  lua_Integer n = opt_number(L), before = s->count;
  if (n > s->max - before)
    return error_throw(
        L, ERROR_SEMAPHORE,
        "%I slots more than the %I that are free would be more than the maximum, %I: "
        "nothing is released",
        (LUAI_UACINT)n, (LUAI_UACINT)before, (LUAI_UACINT)s->max);
  s->count += n;
  while (s->count > 0 && waiter_any(&s->waiters)) {
    s->count--;
    if (grant(L, 1, s, 1) == 0) s->count++;
  }
  lua_pushinteger(L, before);
  return 1;
}

static int l_semaphore_count(lua_State *L) {
  lua_pushinteger(L, ((struct sync *)object_check(L, 1, TAG_SEMAPHORE))->count);
  return 1;
}

/* ---- Lua face: Lock, ReaderWriterLock ---- */

static int l_dispose_key(lua_State *L) {
  object_check(L, 1, TAG_KEY);
  lua_settop(L, 1);
  unlock(L, 1);
  return 0;
}

/* [-0, +1, m] */
static int lock_new(lua_State *L, uint32_t tag) {
  size_t size = tag == TAG_LOCK ? offsetof(struct lock, readers) : sizeof(struct lock);
  struct lock *l = container_of(sync_new(L, tag, size, LOCK_OWNERS), struct lock, sync);
  l->owners = 1;
  if (tag == TAG_SHARED_LOCK) {
    link_init(&l->readers);
    l->gate.tag = TAG_TASK | KIND_GATE;
    l->gate.state = TASK_WAITING;
  }
  lua_createtable(L, 1, 0);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WEAK);
  lua_getmetatable(L, -1); /* that of all tables with weak values */
  lua_setmetatable(L, -3);
  lua_pop(L, 1);
  lua_setiuservalue(L, -2, LOCK_OWNERS);
  return 1;
}

static int l_new_lock(lua_State *L) { return lock_new(L, TAG_LOCK); }
static int l_lock(lua_State *L) { return direct(L, TAG_LOCK, LOCK, l_lock); }
static int l_lock_async(lua_State *L) { return twin(L, TAG_LOCK, LOCK); }
static int l_try_lock(lua_State *L) { return try(L, TAG_LOCK, LOCK); }

static int l_new_shared_lock(lua_State *L) { return lock_new(L, TAG_SHARED_LOCK); }
static int l_read_lock(lua_State *L) { return direct(L, TAG_SHARED_LOCK, READ, l_read_lock); }
static int l_read_lock_async(lua_State *L) { return twin(L, TAG_SHARED_LOCK, READ); }
static int l_try_read_lock(lua_State *L) { return try(L, TAG_SHARED_LOCK, READ); }
static int l_write_lock(lua_State *L) { return direct(L, TAG_SHARED_LOCK, LOCK, l_write_lock); }
static int l_write_lock_async(lua_State *L) { return twin(L, TAG_SHARED_LOCK, LOCK); }
static int l_try_write_lock(lua_State *L) { return try(L, TAG_SHARED_LOCK, LOCK); }

/* ---- Lua face: events ---- */

static int event_new(lua_State *L, uint32_t tag) {
  bool set = lua_toboolean(L, 1);
  sync_new(L, tag, sizeof(struct sync), HOLDER_WAITERS)->count = set;
  return 1;
}

static int event_reset(lua_State *L, uint32_t tag) {
  check(L, tag)->count = 0;
  return 0;
}

static int event_is_set(lua_State *L, uint32_t tag) {
  lua_pushboolean(L, ((struct sync *)object_check(L, 1, tag))->count != 0);
  return 1;
}

static int l_new_manual(lua_State *L) { return event_new(L, TAG_MANUAL_EVENT); }
static int l_manual_reset(lua_State *L) { return event_reset(L, TAG_MANUAL_EVENT); }
static int l_manual_is_set(lua_State *L) { return event_is_set(L, TAG_MANUAL_EVENT); }
static int l_manual_wait(lua_State *L) { return direct(L, TAG_MANUAL_EVENT, WAIT, l_manual_wait); }
static int l_manual_wait_async(lua_State *L) { return twin(L, TAG_MANUAL_EVENT, WAIT); }

static int l_manual_set(lua_State *L) {
  struct sync *s = check(L, TAG_MANUAL_EVENT);
  s->count = 1;
  grant(L, 1, s, (lua_Integer)s->holder.waiting); /* and none that comes after a reset */
  return 0;
}

static int l_new_auto(lua_State *L) { return event_new(L, TAG_AUTO_EVENT); }
static int l_auto_reset(lua_State *L) { return event_reset(L, TAG_AUTO_EVENT); }
static int l_auto_is_set(lua_State *L) { return event_is_set(L, TAG_AUTO_EVENT); }
static int l_auto_wait(lua_State *L) { return direct(L, TAG_AUTO_EVENT, WAIT, l_auto_wait); }
static int l_auto_wait_async(lua_State *L) { return twin(L, TAG_AUTO_EVENT, WAIT); }

static int l_auto_set(lua_State *L) {
  struct sync *s = check(L, TAG_AUTO_EVENT);
  if (grant(L, 1, s, 1) == 0) s->count = 1;
  return 0;
}

/* ---- Lua face: CountdownEvent ---- */

static int l_countdown(lua_State *L) {
  lua_Integer n = luaL_checkinteger(L, 1);
  luaL_argcheck(L, n >= 0, 1, "must not be negative");
  sync_new(L, TAG_COUNTDOWN, sizeof(struct sync), HOLDER_WAITERS)->count = n;
  return 1;
}

static int l_countdown_wait(lua_State *L) {
  return direct(L, TAG_COUNTDOWN, WAIT, l_countdown_wait);
}
static int l_countdown_wait_async(lua_State *L) { return twin(L, TAG_COUNTDOWN, WAIT); }

static int l_signal(lua_State *L) {
  struct sync *s = check(L, TAG_COUNTDOWN);
  lua_Integer n = opt_number(L);
  if (n > s->count)
    return error_throw(L, ERROR_OPERATION, "%I signals are more than the %I that are still to come",
                       (LUAI_UACINT)n, (LUAI_UACINT)s->count);
  s->count -= n;
  bool last = s->count == 0;
  if (last) grant(L, 1, s, (lua_Integer)s->holder.waiting);
  lua_pushboolean(L, last);
  return 1;
}

static int l_add(lua_State *L) {
  struct sync *s = check(L, TAG_COUNTDOWN);
  lua_Integer n = opt_number(L);
  if (s->count == 0)
    return error_throw(L, ERROR_OPERATION,
                       "the CountdownEvent has come to zero: it cannot be added to any more");
  luaL_argcheck(L, n <= LUA_MAXINTEGER - s->count, 2, "too many");
  s->count += n;
  return 0;
}

static int l_countdown_count(lua_State *L) {
  lua_pushinteger(L, ((struct sync *)object_check(L, 1, TAG_COUNTDOWN))->count);
  return 1;
}

static int l_countdown_is_set(lua_State *L) {
  lua_pushboolean(L, ((struct sync *)object_check(L, 1, TAG_COUNTDOWN))->count == 0);
  return 1;
}

/* ---- Lua face: Barrier ---- */

static int l_barrier(lua_State *L) {
  lua_Integer n = luaL_checkinteger(L, 1);
  luaL_argcheck(L, n >= 1 && n < INT32_MAX, 1, n < 1 ? "must be at least 1" : "too many");
  sync_new(L, TAG_BARRIER, sizeof(struct barrier), HOLDER_WAITERS)->max = n;
  return 1;
}

static int l_signal_and_wait(lua_State *L) {
  return direct(L, TAG_BARRIER, WAIT, l_signal_and_wait);
}
static int l_signal_and_wait_async(lua_State *L) { return twin(L, TAG_BARRIER, WAIT); }

static int l_participants(lua_State *L) {
  lua_pushinteger(L, ((struct sync *)object_check(L, 1, TAG_BARRIER))->max);
  return 1;
}

static int l_remaining(lua_State *L) {
  struct barrier *b = (struct barrier *)object_check(L, 1, TAG_BARRIER);
  lua_pushinteger(L, b->sync.max - (waiting(&b->sync) - b->leaving));
  return 1;
}

static int l_phase(lua_State *L) {
  lua_pushinteger(L, ((struct sync *)object_check(L, 1, TAG_BARRIER))->count);
  return 1;
}

/* ---- Lua face: Condition ---- */

/* Condition(lock) */
static int l_condition(lua_State *L) {
  object_check(L, 1, TAG_LOCK);
  sync_new(L, TAG_CONDITION, sizeof(struct sync), CONDITION_LOCK);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, CONDITION_LOCK);
  return 1;
}

static int l_notify(lua_State *L) {
  struct sync *s = check(L, TAG_CONDITION);
  lua_Integer n = opt_number(L);
  lua_pushinteger(L, grant(L, 1, s, n));
  return 1;
}

static int l_notify_all(lua_State *L) {
  struct sync *s = check(L, TAG_CONDITION);
  lua_pushinteger(L, grant(L, 1, s, (lua_Integer)s->holder.waiting));
  return 1;
}

/* [-0, +0, e] the lock at i is held by the task at `owner`, or by nobody knows whom */
static void check_held(lua_State *L, int i, int owner) {
  const struct sync *s = (const struct sync *)lua_touserdata(L, i);
  if (s->count != EXCLUSIVE)
    error_throw(L, ERROR_OPERATION,
                "a condition is waited for by who holds its lock: lock it first");
  lua_getiuservalue(L, i, LOCK_OWNERS);
  lua_rawgeti(L, -1, 1);
  if (lua_isuserdata(L, -1) && !lua_rawequal(L, -1, owner)) {
    task_push_name(L, -1);
    error_throw(L, ERROR_OPERATION,
                "a condition is waited for by who holds its lock: task '%s' does",
                lua_tostring(L, -1));
  }
  lua_pop(L, 2);
}

enum { RETAKE_LOCK = 1, RETAKE_KEY, RETAKE_OPERATION };

/* the lock is taken again: the wait ends as its operation did, or as interrupted */
static int retaken(lua_State *L, bool interrupted) {
  struct fiber *me = (struct fiber *)runtime(L)->me;
  lua_settop(L, RETAKE_OPERATION);
  if (lua_getiuservalue(L, RETAKE_KEY, KEY_OWNER) != LUA_TNIL) {
    lua_getiuservalue(L, RETAKE_LOCK, LOCK_OWNERS);
    lua_insert(L, -2);
    lua_rawseti(L, -2, 1);
  }
  lua_settop(L, RETAKE_OPERATION);
  struct task *op = (struct task *)lua_touserdata(L, RETAKE_OPERATION);
  if (interrupted && op->state != TASK_SUCCEEDED) return scope_throw(L, me->member.scope);
  return task_push_outcome(L, RETAKE_OPERATION, op);
}

static int retake_k(lua_State *L, int status, lua_KContext interrupted) {
  (void)status;
  if (waiter_resumed(L, runtime(L)) == WAITER_STRAY) {
    lua_settop(L, RETAKE_OPERATION);
    return lua_yieldk(L, 0, interrupted, retake_k);
  }
  return retaken(L, interrupted);
}

/* with the operation and the key at 1 and 2 */
static int retake(lua_State *L, bool interrupted) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  lua_settop(L, 2);
  lua_getiuservalue(L, 2, KEY_LOCK);
  lua_insert(L, 1);
  lua_rotate(L, 2, 1); /* lock key operation */
  struct lock *l = (struct lock *)lua_touserdata(L, RETAKE_LOCK);
  check_live(L, &l->sync);
  if (attempt(L, &l->sync, LOCK)) return retaken(L, interrupted);
  me->task.flags |= TASK_DEAF;
  return waiter_wait(L, rt, me, &l->sync.waiters, HUGE_VAL, interrupted, retake_k);
}

static int condition_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  (void)status;
  if (!fiber_on_top(L, rt)) return lua_yieldk(L, 0, ctx, condition_k); /* not by us: wait on */
  bool interrupted = rt->me->flags & TASK_INTERRUPTED;
  rt->me->flags &= (uint16_t) ~(TASK_INTERRUPTED | TASK_DEAF);
  return retake(L, interrupted);
}

enum { CONDITION_SELF = 1, CONDITION_TOKEN, CONDITION_OWNER, CONDITION_MUTEX, CONDITION_OPERATION };

/* the wait, with the condition, the token and the owner at 1, 2, 3. twin: of wait_async, a task of its own */
static int condition_wait(lua_State *L, bool twin, lua_CFunction f) {
  struct runtime *rt = runtime(L);
  struct sync *s = check(L, TAG_CONDITION);
  bool deaf = token_none(L, CONDITION_TOKEN) && !twin;
  luaL_checkstack(L, 30, NULL); /* another waiter may get the lock while all this is on it */
  lua_settop(L, CONDITION_OWNER);
  lua_getiuservalue(L, CONDITION_SELF, CONDITION_LOCK);
  check_tokens(L, CONDITION_TOKEN);
  check_held(L, CONDITION_MUTEX, CONDITION_OWNER);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) {
    lua_settop(L, CONDITION_OWNER);
    return fiber_outside(L, f);
  }
  struct scope *scope = deaf ? rt->root : scope_ambient(L, rt);
  struct queued *op = waiter_operation(L, KIND_QUEUED, 1, HUGE_VAL);
  struct task *t = &op->timed.pending.task;
  struct key *key = (struct key *)object_new(L, TAG_RETAKE, sizeof *key, KEY_OWNER);
  lua_pushvalue(L, CONDITION_MUTEX);
  lua_setiuservalue(L, -2, KEY_LOCK);
  check_live(L, s); /* once more, since finalizers were here */
  check_tokens(L, CONDITION_TOKEN);
  check_held(L, CONDITION_MUTEX, CONDITION_OWNER);
  t->flags |= TASK_OBSERVED; /* we tell how it ended, if nothing worse happens */
  key->serial = ((struct lock *)lua_touserdata(L, CONDITION_MUTEX))->serial;
  key->owner = 1;
  lua_getiuservalue(L, CONDITION_MUTEX, LOCK_OWNERS);
  if (lua_rawgeti(L, -1, 1) == LUA_TUSERDATA) {
    lua_setiuservalue(L, CONDITION_OPERATION + 1, KEY_OWNER);
    lua_pop(L, 1);
  } else
    lua_pop(L, 2);
  waiter_start(L, CONDITION_OPERATION, &s->waiters, CONDITION_TOKEN, scope);
  unlock(L, CONDITION_OPERATION + 1);
  lua_remove(L, CONDITION_OPERATION - 1);
  lua_rotate(L, 1, 2); /* operation key … */
  lua_settop(L, 2);
  if (me->member.scope->canceled && !deaf) return retake(L, true); /* by a finalizer */
  if (deaf) me->task.flags |= TASK_DEAF;
  return fiber_await(L, rt, me, t, condition_k);
}

/* condition_wait(condition, token, owner): in a task of its own */
static int l_condition_task(lua_State *L) { return condition_wait(L, true, l_condition_task); }

/* in the task that stands for the code outside every task */
static int l_wait_outside(lua_State *L) { return condition_wait(L, false, l_wait_outside); }

/* condition:wait(token) */
static int l_condition_wait(lua_State *L) {
  check(L, TAG_CONDITION);
  token_opt(L, 2);
  lua_settop(L, 2);
  task_push(L, runtime(L)->me);
  return condition_wait(L, false, l_wait_outside);
}

/* enter_lock(lock, fn) -> key: for lock:run, of which it checks the arguments */
static int l_enter_lock(lua_State *L) {
  if (object_test(L, 1, TAG_LOCK) == NULL) return module_blame_type(L, 1, "coflow.Lock", 1);
  if (!lua_isfunction(L, 2) && luaL_getmetafield(L, 2, "__call") == LUA_TNIL)
    return module_blame_type(L, 2, "function", 2);
  lua_settop(L, 1);
  return l_lock(L);
}

/* check_condition(condition, token) -> the running task: raises what wait_async raises at once */
static int l_check_condition(lua_State *L) {
  struct sync *s = (struct sync *)object_test(L, 1, TAG_CONDITION);
  if (s == NULL) return module_blame_type(L, 1, "coflow.Condition", 1);
  if (!lua_isnoneornil(L, 2) && object_test(L, 2, TAG_TOKEN) == NULL)
    return module_blame_type(L, 2, "coflow.CancellationToken", 2);
  check_live(L, s);
  lua_settop(L, 1);
  task_push(L, runtime(L)->me);
  lua_getiuservalue(L, 1, CONDITION_LOCK);
  check_held(L, 3, 2);
  lua_settop(L, 2);
  return 1;
}

/* ---- classes ---- */

static const luaL_Reg classes[] = {{"Semaphore", l_semaphore},
                                   {"Lock", l_new_lock},
                                   {"ReaderWriterLock", l_new_shared_lock},
                                   {"ManualResetEvent", l_new_manual},
                                   {"AutoResetEvent", l_new_auto},
                                   {"CountdownEvent", l_countdown},
                                   {"Barrier", l_barrier},
                                   {"Condition", l_condition},
                                   {NULL, NULL}};

static const luaL_Reg semaphore[] = {{"wait", l_semaphore_wait},
                                     {"wait_async", l_semaphore_wait_async},
                                     {"release", l_release},
                                     {NULL, NULL}};
static const luaL_Reg semaphore_properties[] = {{"current_count", l_semaphore_count}, {NULL, NULL}};
static const luaL_Reg lock[] = {
    {"lock", l_lock}, {"lock_async", l_lock_async}, {"try_lock", l_try_lock}, {NULL, NULL}};
static const luaL_Reg shared_lock[] = {{"read_lock", l_read_lock},
                                       {"read_lock_async", l_read_lock_async},
                                       {"try_read_lock", l_try_read_lock},
                                       {"write_lock", l_write_lock},
                                       {"write_lock_async", l_write_lock_async},
                                       {"try_write_lock", l_try_write_lock},
                                       {NULL, NULL}};
static const luaL_Reg manual_event[] = {{"set", l_manual_set},
                                        {"reset", l_manual_reset},
                                        {"wait", l_manual_wait},
                                        {"wait_async", l_manual_wait_async},
                                        {NULL, NULL}};
static const luaL_Reg manual_properties[] = {{"is_set", l_manual_is_set}, {NULL, NULL}};
static const luaL_Reg auto_event[] = {{"set", l_auto_set},
                                      {"reset", l_auto_reset},
                                      {"wait", l_auto_wait},
                                      {"wait_async", l_auto_wait_async},
                                      {NULL, NULL}};
static const luaL_Reg auto_properties[] = {{"is_set", l_auto_is_set}, {NULL, NULL}};
static const luaL_Reg countdown[] = {{"signal", l_signal},
                                     {"add", l_add},
                                     {"wait", l_countdown_wait},
                                     {"wait_async", l_countdown_wait_async},
                                     {NULL, NULL}};
static const luaL_Reg countdown_properties[] = {
    {"current_count", l_countdown_count}, {"is_set", l_countdown_is_set}, {NULL, NULL}};
static const luaL_Reg barrier[] = {{"signal_and_wait", l_signal_and_wait},
                                   {"signal_and_wait_async", l_signal_and_wait_async},
                                   {NULL, NULL}};
static const luaL_Reg barrier_properties[] = {{"participant_count", l_participants},
                                              {"participants_remaining", l_remaining},
                                              {"current_phase_number", l_phase},
                                              {NULL, NULL}};
static const luaL_Reg condition[] = {
    {"wait", l_condition_wait}, {"notify", l_notify}, {"notify_all", l_notify_all}, {NULL, NULL}};
static const luaL_Reg key[] = {
    {"dispose", l_dispose_key}, {"__close", l_dispose_key}, {NULL, NULL}};
static const luaL_Reg none[] = {{NULL, NULL}};

static const luaL_Reg disposing[] = {{"dispose", l_dispose}, {NULL, NULL}};
static const luaL_Reg common[] = {
    {"__close", l_dispose}, {"__gc", l_gc}, {"__tostring", l_tostring}, {NULL, NULL}};

/* [-0, +0, m] a class with what all have */
static void class(lua_State *L, uint32_t tag, const char *name, const luaL_Reg *methods,
                  const luaL_Reg *properties) {
  module_class(L, tag, name, methods, properties);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(tag));
  module_functions(L, common);
  lua_getfield(L, -1, "methods");
  module_functions(L, disposing);
  lua_pop(L, 2);
}

/* sync() -> the classes, which are made when they are first asked for: few programs need them */
static int l_sync(lua_State *L) {
  lua_settop(L, 0);
  lua_newtable(L);
  module_functions(L, classes);
  if (lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_BARRIER)) == LUA_TTABLE) {
    lua_settop(L, 1);
    return 1;
  }
  class(L, TAG_SEMAPHORE, "coflow.Semaphore", semaphore, semaphore_properties);
  class(L, TAG_LOCK, "coflow.Lock", lock, NULL);
  class(L, TAG_SHARED_LOCK, "coflow.ReaderWriterLock", shared_lock, NULL);
  class(L, TAG_MANUAL_EVENT, "coflow.ManualResetEvent", manual_event, manual_properties);
  class(L, TAG_AUTO_EVENT, "coflow.AutoResetEvent", auto_event, auto_properties);
  class(L, TAG_COUNTDOWN, "coflow.CountdownEvent", countdown, countdown_properties);
  class(L, TAG_CONDITION, "coflow.Condition", condition, NULL);
  module_class(L, TAG_KEY, "coflow.Key", key, NULL);
  module_class(L, TAG_RETAKE, "coflow.Retake", none, NULL);
  class(L, TAG_BARRIER, "coflow.Barrier", barrier, barrier_properties);
  lua_settop(L, 1);
  return 1;
}

static const luaL_Reg functions[] = {{"sync", l_sync},
                                     {"condition_wait", l_condition_task},
                                     {"check_condition", l_check_condition},
                                     {"enter_lock", l_enter_lock},
                                     {NULL, NULL}};

void sync_open(lua_State *L) { module_functions(L, functions); }
