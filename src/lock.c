/*
** lock.c - Lock and ReaderWriterLock: who is in, and with which key.
**
** A lock is opened by its *keys*, each good for one time. A waiter brings its key along, as the value
** that it waits with; when its turn comes the key is made to fit. An exclusive lock fits one key at a
** time, the one with its serial number, so an old key opens nothing; those of readers are good while
** they have a number at all.
**
** Owners. So that a task can be told that it would wait for itself, a lock remembers which tasks took
** it, in a weak table: it must not keep them alive, nor take a new task for an old one that had its
** address.
**
** A shared lock prefers writers: readers come in only while no writer waits. When the last waiting
** writer gives up, the readers behind it go in. That may be found out in the middle of a cancellation,
** when nothing may be completed; so the lock has a *gate*, which is put on the landing list like a
** task, and lands a moment later.
**
** The count is that of the readers that are in, or EXCLUSIVE.
**
** Invariants: a lock is EXCLUSIVE exactly while its serial is not 0.
**             Its writers wait only while it is taken, its readers only while a writer is in or waits,
**             save that the gate is about to land.
**
** Source:     the locks of AsyncEx, and its order of readers and writers.
** SPDX-License-Identifier: MIT
*/
#include "sync.h"

enum { EXCLUSIVE = -1 };

struct lock {
  struct sync sync;
  uint64_t serial, last;  /* of the key that fits, or 0; the last one that was given out */
  int free_owner, owners; /* slots for readers in the table of owners */
  struct link readers;    /* of a shared lock, as is what follows */
  struct task gate;
};
enum { LOCK_OWNERS = HOLDER_WAITERS + 1 }; /* the one of an exclusive lock is the first */

struct key {
  uint32_t tag;
  bool reader;
  int owner; /* of a reader: its slot among the owners, or 0 */
  uint64_t serial;
};
enum { KEY_OWNER = KEY_LOCK + 1 }; /* of a stand-in: for whom it takes the lock */

struct link *lock_readers(struct sync *s) {
  return s->class == &shared_lock_class ? &container_of(s, struct lock, sync)->readers : NULL;
}

/* ---- owners ---- */

void lock_own(lua_State *L, int i) {
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

/* the running task has taken the lock at index 1 and not given it back */
static bool is_mine(lua_State *L) {
  const struct task *me = runtime(L)->me;
  const struct lock *l = (const struct lock *)lua_touserdata(L, 1);
  bool mine = false;
  lua_getiuservalue(L, 1, LOCK_OWNERS);
  for (int k = l->owners; k >= 1 && !mine; k--) {
    lua_rawgeti(L, -1, k);
    mine = lua_touserdata(L, -1) == (const void *)me;
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return mine;
}

lua_Integer lock_push_owners(lua_State *L, int i, lua_Integer most) {
  const struct lock *l = (const struct lock *)object_test(L, i, TAG_LOCK);
  lua_Integer n = 0;
  i = lua_absindex(L, i);
  if (l == NULL) l = (const struct lock *)object_test(L, i, TAG_SHARED_LOCK);
  lua_newtable(L);
  if (l == NULL) return 0;
  lua_getiuservalue(L, i, LOCK_OWNERS); /* list owners */
  for (int k = 1; k <= l->owners && n < most; k++) {
    lua_rawgeti(L, -1, k);
    if (object_test(L, -1, TAG_TASK) != NULL)
      lua_rawseti(L, -3, ++n);
    else
      lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return n < most || l->sync.count < n ? n : l->sync.count;
}

void lock_refuse_owner(lua_State *L) {
  if (!is_mine(L)) return;
  struct runtime *rt = runtime(L);
  const char *who = "the code outside every task";
  if (rt->me != rt->outside) {
    task_push(L, rt->me);
    task_push_name(L, -1);
    who = lua_pushfstring(L, "task '%s'", lua_tostring(L, -1));
  }
  error_throw(L, ERROR_OPERATION,
              "%s holds this %s already, and would wait for itself: it is not re-entrant", who,
              ((const struct sync *)lua_touserdata(L, 1))->class->name);
}

/* ---- going in and out ---- */

void lock_push_key(lua_State *L, enum sync_what what) {
  struct key *key = (struct key *)object_new(L, TAG_KEY, sizeof *key, KEY_LOCK);
  key->reader = what == SYNC_READ;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, KEY_LOCK);
}

/* takes the lock, if that can be; fit says for which key */
static bool enter(struct lock *l, bool reader) {
  struct sync *s = &l->sync;
  if (waiter_any(&s->waiters)) return false;
  if (reader) {
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

static bool attempt(lua_State *L, struct sync *s) {
  struct lock *l = container_of(s, struct lock, sync);
  struct key *key = (struct key *)lua_touserdata(L, 2);
  if (!enter(l, key->reader)) return false;
  fit(l, key);
  lua_pushvalue(L, 2);
  return true;
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
  struct link *readers = lock_readers(s);
  struct nap *n;
  if (s->count == 0 && waiter_any(&s->waiters)) {
    s->count = EXCLUSIVE;
    if ((n = waiter_take(L, i, &s->holder, &s->waiters)) != NULL) {
      hand(L, l, n);
      return;
    }
    s->count = 0;
  }
  if (readers == NULL) return;
  while (s->count != EXCLUSIVE && !waiter_any(&s->waiters) &&
         (n = waiter_take(L, i, &s->holder, readers)) != NULL) {
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

/* ---- the gate ---- */

void lock_left(lua_State *L, int i) {
  struct lock *l = (struct lock *)lua_touserdata(L, i);
  if (l->sync.count != EXCLUSIVE && !waiter_any(&l->sync.waiters) && waiter_any(&l->readers))
    loop_land(L, runtime(L), i, &l->gate);
}

void lock_land(lua_State *L, int i) {
  struct lock *l = (struct lock *)lua_touserdata(L, i);
  task_forget(L, &l->gate);
  admit(L, i, l);
}

/* ---- for conditions ---- */

bool lock_push_owner(lua_State *L, int i) {
  if (((const struct sync *)lua_touserdata(L, i))->count != EXCLUSIVE) return false;
  lua_getiuservalue(L, i, LOCK_OWNERS);
  lua_rawgeti(L, -1, 1);
  lua_replace(L, -2);
  return true;
}

void lock_push_stand_in(lua_State *L, int i) {
  object_new(L, TAG_RETAKE, sizeof(struct key), KEY_OWNER);
  lua_pushvalue(L, i);
  lua_setiuservalue(L, -2, KEY_LOCK);
}

void lock_lend(lua_State *L, int i, int k) {
  struct key *key = (struct key *)lua_touserdata(L, k);
  key->serial = ((const struct lock *)lua_touserdata(L, i))->serial;
  key->owner = 1;
  lock_push_owner(L, i);
  lua_setiuservalue(L, k, KEY_OWNER);
  unlock(L, k);
}

void lock_returned(lua_State *L, int i, int k) {
  lua_getiuservalue(L, i, LOCK_OWNERS);
  if (lua_getiuservalue(L, k, KEY_OWNER) == LUA_TUSERDATA)
    lua_rawseti(L, -2, 1);
  else
    lua_pop(L, 1);
  lua_pop(L, 1);
}

/* ---- Lua face: what both have ---- */

/* [-0, +1, m] */
static int lock_new(lua_State *L, const struct sync_class *class) {
  bool shared = class == &shared_lock_class;
  size_t size = shared ? sizeof(struct lock) : offsetof(struct lock, readers);
  struct lock *l = container_of(sync_new(L, class, size, LOCK_OWNERS), struct lock, sync);
  l->owners = 1;
  if (shared) {
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

/* the key, or nil */
static int try(lua_State *L, const struct sync_class *class, enum sync_what what) {
  struct sync *s = sync_check(L, class);
  lua_settop(L, 1);
  lock_push_key(L, what);
  sync_check_live(L, s);
  if (attempt(L, s))
    lock_own(L, 2);
  else
    lua_pushnil(L);
  return 1;
}

/* ---- Lua face: Lock ---- */

static const char *state(lua_State *L, const struct sync *s) {
  return lua_pushstring(L, s->count ? "locked" : "free");
}

static int l_new(lua_State *L) { return lock_new(L, &lock_class); }
static int l_lock(lua_State *L) { return sync_direct(L, &lock_class, SYNC_LOCK, l_lock); }
static int l_lock_async(lua_State *L) { return sync_twin(L, &lock_class, SYNC_LOCK); }
static int l_try_lock(lua_State *L) { return try(L, &lock_class, SYNC_LOCK); }

/* enter_lock(lock, fn) -> key: for lock:run, of which it checks the arguments */
int lock_enter(lua_State *L) {
  if (object_test(L, 1, TAG_LOCK) == NULL) return blame_type(L, 1, "coflow.Lock", 1);
  module_check_function(L, 2, 2);
  lua_settop(L, 1);
  return l_lock(L);
}

static const luaL_Reg methods[] = {
    {"lock", l_lock}, {"lock_async", l_lock_async}, {"try_lock", l_try_lock}, {NULL, NULL}};

const struct sync_class lock_class = {.tag = TAG_LOCK,
                                      .name = "Lock",
                                      .new = l_new,
                                      .methods = methods,
                                      .attempt = attempt,
                                      .state = state};

/* ---- Lua face: ReaderWriterLock ---- */

static const char *shared_state(lua_State *L, const struct sync *s) {
  if (s->count > 0) return lua_pushfstring(L, "%I readers", (LUAI_UACINT)s->count);
  return lua_pushstring(L, s->count ? "a writer" : "free");
}

static int l_new_shared(lua_State *L) { return lock_new(L, &shared_lock_class); }

static int l_read_lock(lua_State *L) {
  return sync_direct(L, &shared_lock_class, SYNC_READ, l_read_lock);
}
static int l_read_lock_async(lua_State *L) { return sync_twin(L, &shared_lock_class, SYNC_READ); }
static int l_try_read_lock(lua_State *L) { return try(L, &shared_lock_class, SYNC_READ); }

static int l_write_lock(lua_State *L) {
  return sync_direct(L, &shared_lock_class, SYNC_LOCK, l_write_lock);
}
static int l_write_lock_async(lua_State *L) { return sync_twin(L, &shared_lock_class, SYNC_LOCK); }
static int l_try_write_lock(lua_State *L) { return try(L, &shared_lock_class, SYNC_LOCK); }

static const luaL_Reg shared_methods[] = {{"read_lock", l_read_lock},
                                          {"read_lock_async", l_read_lock_async},
                                          {"try_read_lock", l_try_read_lock},
                                          {"write_lock", l_write_lock},
                                          {"write_lock_async", l_write_lock_async},
                                          {"try_write_lock", l_try_write_lock},
                                          {NULL, NULL}};

const struct sync_class shared_lock_class = {.tag = TAG_SHARED_LOCK,
                                             .name = "ReaderWriterLock",
                                             .new = l_new_shared,
                                             .methods = shared_methods,
                                             .attempt = attempt,
                                             .state = shared_state};

/* ---- Lua face: keys ---- */

static int l_dispose(lua_State *L) {
  object_check(L, 1, TAG_KEY);
  lua_settop(L, 1);
  unlock(L, 1);
  return 0;
}

static const luaL_Reg key[] = {{"dispose", l_dispose}, {"__close", l_dispose}, {NULL, NULL}};
static const luaL_Reg stand_in[] = {{NULL, NULL}};

void lock_open(lua_State *L) {
  module_class(L, TAG_KEY, "coflow.Key", key, NULL);
  module_class(L, TAG_RETAKE, "coflow.Retake", stand_in, NULL);
}
