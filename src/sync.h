/*
** sync.h - what tasks agree by: what its classes share, and what a lock does for its conditions.
**
** How objects of these classes are asked for is told in sync.c. A class is one struct sync_class, in
** the file of its idea: semaphore.c, event.c, barrier.c, lock.c, condition.c.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_sync_h
#define coflow_sync_h

#include "waiter.h"

#pragma GCC visibility push(hidden)

struct sync_class;

/* All objects begin so. */
struct sync {
  struct holder holder;
  bool disposed;
  const struct sync_class *class;
  lua_Integer count;            /* the class says of what */
  struct link waiters, leaving; /* leaving: whose turn has come, all together */
};

/* What is asked for. The other two are asked of locks, with a key. */
enum sync_what { SYNC_WAIT, SYNC_LOCK, SYNC_READ };

struct sync_class {
  uint32_t tag;
  bool timed; /* to ask takes a timeout, and gives a boolean */
  const char *name;
  lua_CFunction new;
  const luaL_Reg *methods, *properties; /* properties: or NULL */
  /* [-0, +1, m] what is asked for of the object at index 1, if it is there; false: [-0, +0]. Of a lock it is
  ** the key at index 2. Creates nothing before it has it. */
  bool (*attempt)(lua_State *L, struct sync *s);
  const char *(*state)(lua_State *L, const struct sync *s); /* or NULL: [-0, +1, m] for tostring */
};

extern const struct sync_class semaphore_class, lock_class, shared_lock_class, manual_event_class,
    auto_event_class, countdown_class, barrier_class, condition_class;

/* ---- sync.c ---- */

/* [-0, +1, m] */
struct sync *sync_new(lua_State *L, const struct sync_class *class, size_t size, int uservalues);
void sync_refuse(lua_State *L, const struct sync *s); /* [-0, +0, e] it has been disposed */
static inline void sync_check_live(lua_State *L, const struct sync *s) { /* [-0, +0, e] */
  if (s->disposed) sync_refuse(L, s);
}
/* [-0, +0, e] the object at index 1, which has not been disposed */
static inline struct sync *sync_check(lua_State *L, const struct sync_class *class) {
  struct sync *s = (struct sync *)object_check(L, 1, class->tag);
  sync_check_live(L, s);
  return s;
}
lua_Integer sync_opt_number(lua_State *L); /* [-0, +0, v] how many: argument 2 */
/* [-0, +0, m] grants true to at most n waiters of the object at index 1; how many there were */
lua_Integer sync_grant(lua_State *L, struct sync *s, lua_Integer n);
/* [-1, +0, m] the value on top to all that wait for it now, and to none that comes meanwhile; how many
** got it */
lua_Integer sync_grant_all(lua_State *L, struct sync *s);
/* asks in direct style; f is the function that calls this, which may have to begin again elsewhere */
int sync_direct(lua_State *L, const struct sync_class *class, enum sync_what what, lua_CFunction f);
/* asks by an operation */
int sync_twin(lua_State *L, const struct sync_class *class, enum sync_what what);

/* ---- lock.c, for sync.c ---- */

/* [-0, +1, m] a key to the lock at index 1, which does not fit yet */
void lock_push_key(lua_State *L, enum sync_what what);
void lock_own(lua_State *L, int i);   /* [-0, +0, m] the running task has what the key at i opens */
void lock_refuse_owner(lua_State *L); /* [-0, +0, e] if it has the lock at index 1 already */
struct link *lock_readers(struct sync *s); /* the queue of those of a shared lock, or NULL */
void lock_open(lua_State *L);

/* ---- lock.c, for condition.c: an exclusive lock is lent, and taken again for who has lent it ---- */

enum { KEY_LOCK = 1 };

/* [-0, +1, -] the task that has taken the lock at i, or nil or false; false: [-0, +0] the lock is open */
bool lock_push_owner(lua_State *L, int i);
/* [-0, +1, m] a key to it, which does not fit yet */
void lock_push_stand_in(lua_State *L, int i);
/* [-0, +0, m] opens it, which is taken; the stand-in at k is to fit in place of the key that does */
void lock_lend(lua_State *L, int i, int k);
void lock_returned(lua_State *L, int i, int k); /* [-0, +0, -] it is taken again, with that */

int lock_enter(lua_State *L); /* enter_lock */

/* ---- condition.c ---- */

int condition_wait(lua_State *L);
int condition_check(lua_State *L); /* check_condition */

#pragma GCC visibility pop
#endif
