/*
** waiter.h - queues of waiters, and what is built on them: channels, select, locks and events.
**
** The contract of the queues is told in waiter.c.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_waiter_h
#define coflow_waiter_h

#include "core.h"

#pragma GCC visibility push(hidden)

/* What waiters can wait for begins so, and holds them: one in a user value, others in a slot table. */
struct holder {
  uint32_t tag;
  int free_slot;
  uint32_t waiting; /* how many it holds */
  bool one;         /* HOLDER_ONE is taken */
  bool handle;      /* it begins a struct handle, which is told who comes and goes */
};
enum { HOLDER_ONE = 1, HOLDER_WAITERS };

/* An operation that waits in queues has one clause for each (and of a select, for each task). */
struct clause {
  union {
    struct nap nap;
    struct wait wait; /* `task`: for a task */
  } u;
  uint32_t index; /* in the operation */
  bool task;
};
struct queued {
  struct timed timed;
  uint32_t count;
  bool direct;  /* known to nobody but the fiber that awaits it, from when it does */
  bool granted; /* OP_KEYS, when it lands; nothing interrupts it */
  struct clause clauses[];
}; /* OP_INPUT: the holder, OP_KEYS: a value of its; of a select: lists of these, one for each clause */

/* ---- waiter.c ---- */

enum waiter_end { WAITER_GRANTED, WAITER_EXPIRED, WAITER_STRAY };

void *holder_new(lua_State *L, uint32_t tag, size_t size, int uservalues); /* [-0, +1, m] */
static inline void holder_drop(struct link *q) { /* in the finalizer of the holder */
  while (q->next != q) link_drop(q->next);
}
static inline bool waiter_any(const struct link *q) { return q->next != q; }
static inline struct clause *waiter_clause(struct nap *n) { /* NULL: a fiber */
  return n->deadline.kind != DEADLINE_CLAUSE ? NULL : container_of(n, struct clause, u.nap);
}
/* suspends the running fiber, with what it brings on top, in a queue of the holder at 1; deaf: to
** cancellation. k gets rt */
int waiter_wait(lua_State *L, struct runtime *rt, struct holder *h, struct link *q, uint32_t what,
                bool deaf, lua_KFunction k);
int waiter_wait_for(lua_State *L, struct runtime *rt, struct holder *h, struct link *q,
                    uint32_t what, double seconds, bool deaf, lua_KFunction k); /* … so long */
enum waiter_end waiter_not_granted(lua_State *L, struct runtime *rt);
/* [-0, +0, e] in k */
static inline enum waiter_end waiter_resumed(lua_State *L, struct runtime *rt) {
  const struct fiber *me = (const struct fiber *)rt->me;
  bool granted = me->co == L && rt->entering == NULL && !me->u.nap.failed &&
                 !(me->task.flags & (TASK_INTERRUPTED | TASK_EXPIRED));
  return granted ? WAITER_GRANTED : waiter_not_granted(L, rt);
}
static inline uint32_t waiter_what(const struct runtime *rt) { /* … then: what was asked for */
  return ((const struct fiber *)rt->me)->u.nap.what;
}
/* [-0, +1, m] */
struct queued *waiter_operation(lua_State *L, int kind, uint32_t clauses, double seconds);
/* [-0, +0, m] the operation at i waits in q of the holder at 1 */
void waiter_start(lua_State *L, int i, struct link *q, int k, struct scope *s);
/* [-1, …, e] waits for the pending or complete operation on top, perhaps deaf to cancellation */
int waiter_await(lua_State *L, struct fiber *me, struct task *op, bool deaf);
/* … in direct style: it was made for this */
static inline int waiter_await_direct(lua_State *L, struct fiber *me, struct task *op, bool deaf) {
  ((struct queued *)(void *)op)->direct = true;
  return waiter_await(L, me, op, deaf);
}
/* [-0, +0, m] one clause of it */
void waiter_enqueue(lua_State *L, int i, int holder, struct link *q, struct clause *c);
/* [-0, +1, -] the first of q, of the holder at i; NULL: [-0, +0] */
struct nap *waiter_take(lua_State *L, int i, struct holder *h, struct link *q);
void waiter_push_value(lua_State *L, struct nap *n); /* [-0, +1, -] of one that was taken, below */
/* [-1, +0, m] the operation at i, by its clause k */
void waiter_settle(lua_State *L, struct runtime *rt, int i, uint32_t k, bool failed);
/* [-1, +0, m] the operation at i, which has not been started, with that value, when it lands */
void waiter_settle_later(lua_State *L, struct runtime *rt, int i);
void waiter_grant(lua_State *L, struct runtime *rt, struct nap *n); /* [-2, +0, m] */
void waiter_fail(lua_State *L, struct runtime *rt, struct nap *n);  /* [-2, +0, m] */
/* quiet: the holder need not hear of it: it knows, or is being collected with its waiters.
** [-0, +0, -] it naps no more, but for its deadline */
void waiter_leave(lua_State *L, struct fiber *f, bool quiet);
/* [-0, +0, -] the operation at i leaves all queues */
void waiter_withdraw(lua_State *L, int i, bool quiet);

void waiter_land(lua_State *L, int i);
/* [-0, +1, -] what it waits for, in a queue; false: [-0, +0] */
bool waiter_push_holder(lua_State *L, struct fiber *f);
static inline bool waiter_is_queued(const struct task *t) {
  return task_is(t, KIND_QUEUED) || task_is(t, KIND_SELECT);
}

/* ---- channel.c, select.c ---- */

/* What is asked for. ASK_NEXT: by iterate, which raises the error as it is; ASK_BATCH: by
** read_batch_async, which brings a list. */
enum ask { ASK_READ, ASK_NEXT, ASK_BATCH, ASK_WRITE, ASK_CAN_READ, ASK_CAN_WRITE };

/* [-0, +0, -] a half at i becomes its channel; false: no such */
bool channel_check(lua_State *L, int i, enum ask what);
/* [-0, +0, e] if it is there, settles the operation at i by its clause k; the item to be written is at v */
bool channel_poll(lua_State *L, struct runtime *rt, int i, uint32_t k, int ch, enum ask what,
                  int v);
/* [-0, +0, m] … else it waits */
void channel_enqueue(lua_State *L, int i, int ch, struct clause *clause);
/* [-0, +0, m] somebody waits for it: tells those for whom that counts */
void channel_announce(lua_State *L, struct runtime *rt, int ch, enum ask what);

extern const struct part channel_part;
extern const struct part select_part;

/* ---- sync.c, lock.c; what else they have is in sync.h ---- */

extern const struct part sync_part;
void lock_left(lua_State *L, int i); /* [-0, +0, -] a waiter of the shared lock at i has given up */
void lock_land(lua_State *L, int i);
/* [-0, +1, m] a list of the tasks that have what is at i, at most so many, if that is a lock; else an empty
** one. How many have it, as far as that is known. */
lua_Integer lock_push_owners(lua_State *L, int i, lua_Integer most);

#pragma GCC visibility pop
#endif
