/*
** waiter.c - the FIFO of waiters under channels, semaphores, locks, events.
**
** A *holder* is a userdata that begins with struct holder (holder_new) and has any number of queues:
** heads of circular lists (link_init). Waiters leave a queue in order, and are *handed* what they wait
** for: the holder decides, and changes its state, while they are still suspended. So no newcomer
** overtakes, nobody is woken in vain, and one that has been granted what it asked for is on the ready
** list, where no cancellation reaches it: it resumes with what it was given, and its next suspension
** raises. A waiter that is canceled, or expires, leaves its queue at once, in O(1), and takes nothing.
**
** There are two sorts. A *fiber* in direct style costs nothing but a slot: its node is laid over the
** wait that it would have on a task. An *operation* (x_async, select) is a task with a node for each
** clause.
**
** Direct style, in the function of the holder at index 1, when what it asks for is not there:
**
**     me = fiber_here(L, rt);                 raises where nobody can suspend; NULL: fiber_outside(L, f)
**     lua_settop / push:  [1] holder, … on top anything: what the holder may look at (waiter_push_value)
**     return waiter_wait(L, rt, &h->holder, &h->queue, what, whether no token counts, k);   or waiter_wait_for
**
**     k: switch (waiter_resumed(L, rt)) {     raises if it was interrupted, or waiter_fail'ed
**       case WAITER_STRAY: lua_settop(L, as it was); return lua_yieldk(L, 0, ctx, k);
**       case WAITER_EXPIRED: …                its time is up; it is in no queue
**       case WAITER_GRANTED: …                on top, in place of that, is the value that it was granted
**     }
**
** With an explicit token direct style is waiter_await of the operation, started under scope_ambient after
** fiber_here.
**
** Operations: everything is created first, then the state is looked at, and from there to the end nothing is
** created, so that no finalizer of a user comes between:
**
**     op = waiter_operation(L, KIND_QUEUED, 1, seconds);
**     operation_canceled(token, scope)?       operation_push_canceled, task_settle_canceled
**     it is there?                            task_settle
**     op->clauses[0].u.nap.what = …; waiter_start(L, i, &h->queue, k, scope);
**
** Handing over:    n = waiter_take(L, i, h, q)      pushes the waiter, which is in no queue now
**                  waiter_push_value(L, n)          if wanted: what it brought
**                  push the value, which for one that came to an end may be nil
**                  waiter_grant(L, rt, n)           last: other tasks may land in it
**
** Holding. The holder holds its waiters, in its first two user values, and a waiter holds the holder,
** on its stack or among its user values; so a task that waits for what nobody else refers to is
** collected with it, and reported. Whoever ends the wait, be it grant, cancellation, deadline or
** finalizer, gives the slot back. The finalizer of a holder calls holder_drop for each queue: the two
** may die in one collection, in any order. A handle must know of all that come and go, since it is held
** while somebody waits (handle_changed). One that gives up may be left a number in place of what it
** brought: how much of its write was sent (handle_left). A shared lock must know of waiters that give
** up, since others may be let in then: it is told (lock_left).
**
** Invariants: n->pos != 0 exactly while n is in a queue; then the holder holds its task there.
**             h->waiting counts those, and any whose coroutine somebody has closed since.
**             A fiber in a queue is TASK_WAITING and not TASK_LINKED; an operation in one is not TASK_LINKED.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <math.h>

/* ---- holders ---- */

void *holder_new(lua_State *L, uint32_t tag, size_t size, int uservalues) {
  void *h = object_new(L, tag, size, uservalues);
  lua_createtable(L, 1, 0);
  lua_setiuservalue(L, -2, HOLDER_WAITERS);
  return h;
}

/* pos is ONE, or that of a slot and ONE */
enum { ONE = 1 };

/* [-1, +0, m] the waiter on top is held by the holder at i, and is the last in q */
static inline void append(lua_State *L, int i, struct holder *h, struct link *q, struct nap *n) {
  if (!h->one) {
    h->one = true;
    n->pos = ONE;
    lua_setiuservalue(L, i, HOLDER_ONE);
  } else {
    lua_getiuservalue(L, i, HOLDER_WAITERS);
    lua_insert(L, -2);
    n->pos = ONE + (uint32_t)slots_add(L, -2, &h->free_slot);
    lua_pop(L, 1);
  }
  link_append(q, &n->link);
  h->waiting++;
  if (h->handle) handle_moved(L, i, NULL);
}

/* [-0, +1, -] the waiter whose node is n */
static inline void push_waiter(lua_State *L, int i, const struct nap *n) {
  if (n->pos == ONE) {
    lua_getiuservalue(L, i, HOLDER_ONE);
    return;
  }
  lua_getiuservalue(L, i, HOLDER_WAITERS);
  lua_rawgeti(L, -1, (lua_Integer)n->pos - ONE);
  lua_remove(L, -2);
}

/* [-0, +0, -] n leaves the queue, and the holder at i holds it no more */
static inline void drop(lua_State *L, int i, struct holder *h, struct nap *n) {
  link_drop(&n->link);
  if (n->pos == ONE) {
    h->one = false;
    lua_pushnil(L);
    lua_setiuservalue(L, i < 0 ? i - 1 : i, HOLDER_ONE);
  } else {
    lua_getiuservalue(L, i, HOLDER_WAITERS);
    slots_free(L, -1, &h->free_slot, (int)n->pos - ONE);
    lua_pop(L, 1);
  }
  n->pos = 0;
  h->waiting--;
  if (h->handle) handle_moved(L, i, n);
}

/* ---- fibers ---- */

/* where f is suspended: in its own coroutine, or in one that it is in; NULL: nowhere, somebody has
** closed it */
static lua_State *stack_of(struct fiber *f) {
  lua_State *co = f->co;
  if (co != NULL && !f->u.nap.own)
    for (lua_State *inner; (inner = coroutine_inner(co, NULL)) != NULL;) co = inner;
  return co != NULL && lua_status(co) == LUA_YIELD ? co : NULL;
}

/* [-1, +0, -] the value on top in place of what the waiter, suspended there, has brought */
static inline void replace_value(lua_State *L, lua_State *co) {
  lua_pop(co, 1);
  lua_xmove(L, co, 1);
}

/* [-0, +1, -] the holder at the bottom of the function that f is suspended in, if f is held there: somebody
** may have closed the coroutine; NULL: [-0, +0] */
static struct holder *push_holder(lua_State *L, struct fiber *f) {
  int top = lua_gettop(L);
  lua_State *co = stack_of(f);
  if (co != NULL && lua_checkstack(co, 1)) {
    lua_pushvalue(co, 1);
    lua_xmove(co, L, 1);
    if (lua_type(L, -1) == LUA_TUSERDATA && lua_rawlen(L, -1) >= sizeof(struct holder) &&
        lua_getiuservalue(L, -1, HOLDER_WAITERS) == LUA_TTABLE) {
      lua_pop(L, 1);
      push_waiter(L, -1, &f->u.nap);
      bool held = lua_touserdata(L, -1) == (void *)f;
      lua_pop(L, 1);
      if (held) return (struct holder *)lua_touserdata(L, -1);
    }
  }
  lua_settop(L, top);
  return NULL;
}

/* [-0, +0, -] a waiter of the holder on top has left without having got anything: f, or the operation at i */
static void left(lua_State *L, struct holder *h, struct fiber *f, int i) {
  if (h->tag == TAG_SHARED_LOCK) lock_left(L, -1);
  int64_t n = h->handle ? handle_left((struct handle *)(void *)h) : -1;
  if (n < 0) return;
  if (f != NULL) {
    lua_pushinteger(L, (lua_Integer)n);
    replace_value(L, stack_of(f)); /* where the holder has been found */
  } else {
    lua_pushinteger(L, (lua_Integer)n);
    lua_setiuservalue(L, i, OP_KEYS);
  }
}

void waiter_leave(lua_State *L, struct fiber *f, bool quiet) {
  struct nap *n = &f->u.nap;
  struct holder *h = n->pos != 0 ? push_holder(L, f) : NULL;
  if (h != NULL) {
    drop(L, -1, h, n);
    if (!quiet) left(L, h, f, 0);
    lua_pop(L, 1);
    return;
  }
  link_drop(&n->link);
  if (n->pos != 0) handle_look_again(L, runtime(L)); /* its holder was on the stack that is gone */
  n->pos = 0;
  if (!n->given) return;
  n->given = false;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_GIVEN);
  task_push(L, &f->task);
  if (!lua_isnil(L, -1)) { /* else its coroutine is being closed: held as long as it lives */
    lua_pushnil(L);
    lua_rawset(L, -3);
    lua_pushnil(L);
  }
  lua_pop(L, 2);
}

bool waiter_push_holder(lua_State *L, struct fiber *f) {
  return fiber_naps(f) && f->u.nap.pos != 0 && push_holder(L, f) != NULL;
}

/* [-0, +0, m] the running fiber is the last in q, and is to park: as fiber_push_me tells */
static inline bool enter(lua_State *L, struct runtime *rt, struct fiber *me, struct holder *h,
                         struct link *q, uint32_t what, bool deaf) {
  me->u.nap = (struct nap){.deadline = {.kind = DEADLINE_NAP}, .what = what, .own = me->co == L};
  bool held = fiber_push_me(L, rt, me);
  append(L, 1, h, q, &me->u.nap);
  if (deaf) me->task.flags |= TASK_DEAF;
  me->task.state = TASK_WAITING;
  return held;
}

int waiter_wait(lua_State *L, struct runtime *rt, struct holder *h, struct link *q, uint32_t what,
                bool deaf, lua_KFunction k) {
  struct fiber *me = (struct fiber *)rt->me;
  bool held = enter(L, rt, me, h, q, what, deaf);
  fiber_park(L, me, me->member.scope->armed, held);
  return fiber_suspend(L, rt, me, (lua_KContext)rt, k);
}

int waiter_wait_for(lua_State *L, struct runtime *rt, struct holder *h, struct link *q,
                    uint32_t what, double seconds, bool deaf, lua_KFunction k) {
  struct fiber *me = (struct fiber *)rt->me;
  if (seconds == HUGE_VAL) return waiter_wait(L, rt, h, q, what, deaf, k);
  deadline_reserve(L, rt);
  bool held = enter(L, rt, me, h, q, what, deaf);
  deadline_add(rt, &me->u.nap.deadline, seconds);
  fiber_park(L, me, true, held);
  return fiber_suspend(L, rt, me, (lua_KContext)rt, k);
}

enum waiter_end waiter_not_granted(lua_State *L, struct runtime *rt) {
  struct fiber *me = (struct fiber *)rt->me;
  uint16_t flags = me->task.flags;
  if (!fiber_on_top(L, rt)) return WAITER_STRAY;
  me->task.flags &= (uint16_t) ~(TASK_INTERRUPTED | TASK_EXPIRED);
  if (flags & TASK_INTERRUPTED) scope_throw(L, me->member.scope);
  if (flags & TASK_EXPIRED) return WAITER_EXPIRED;
  if (me->u.nap.failed) lua_error(L); /* that on top */
  return WAITER_GRANTED;
}

/* ---- operations ---- */

static struct queued *operation_of(struct clause *c) {
  return container_of(c - c->index, struct queued, clauses);
}

struct queued *waiter_operation(lua_State *L, int kind, uint32_t clauses, double seconds) {
  size_t size = sizeof(struct queued) + clauses * sizeof(struct clause);
  struct queued *op = (struct queued *)operation_new(L, kind, size, OP_KEYS, seconds);
  op->count = clauses;
  for (uint32_t k = 0; k < clauses; k++) {
    op->clauses[k].index = k;
    op->clauses[k].u.nap.deadline = (struct deadline){.kind = DEADLINE_CLAUSE};
  }
  return op;
}

void waiter_enqueue(lua_State *L, int i, int holder, struct link *q, struct clause *c) {
  struct holder *h = (struct holder *)lua_touserdata(L, holder);
  lua_pushvalue(L, i);
  append(L, holder, h, q, &c->u.nap);
}

void waiter_start(lua_State *L, int i, struct link *q, int k, struct scope *s) {
  struct queued *op = (struct queued *)lua_touserdata(L, i);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, i, OP_INPUT);
  operation_start(L, i, &op->timed, k, s);
  waiter_enqueue(L, i, 1, q, &op->clauses[0]);
}

/* [-0, +1, -] what clause k of the operation at i waits for */
static void push_input(lua_State *L, int i, uint32_t k) {
  const struct task *t = (const struct task *)lua_touserdata(L, i);
  lua_getiuservalue(L, i, OP_INPUT);
  if (task_is(t, KIND_QUEUED)) return;
  lua_rawgeti(L, -1, (lua_Integer)k + 1);
  lua_remove(L, -2);
}

void waiter_withdraw(lua_State *L, int i, bool quiet) {
  struct queued *op = (struct queued *)lua_touserdata(L, i);
  i = lua_absindex(L, i);
  if (op == NULL) return;
  for (uint32_t k = 0; k < op->count; k++) {
    struct clause *c = &op->clauses[k];
    if (c->task || c->u.nap.pos == 0) continue;
    push_input(L, i, k);
    struct holder *h = (struct holder *)lua_touserdata(L, -1);
    drop(L, -1, h, &c->u.nap);
    if (!quiet) left(L, h, NULL, i);
    lua_pop(L, 1);
  }
}

/* [-0, +0, -] the operation at i is about to be settled */
static void finish(lua_State *L, int i, struct queued *op) {
  i = lua_absindex(L, i);
  for (uint32_t k = 0; k < op->count; k++) {
    struct clause *c = &op->clauses[k];
    if (!c->task || c->u.wait.on == NULL) continue;
    push_input(L, i, k);
    wait_remove(L, -1, &c->u.wait);
    lua_pop(L, 1);
  }
  operation_stop(L, i, &op->timed);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_INPUT);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_KEYS);
}

/* with the value, or the error, on top; a select says of which clause it is */
void waiter_settle(lua_State *L, struct runtime *rt, int i, uint32_t k, bool failed) {
  struct queued *op = (struct queued *)lua_touserdata(L, i);
  struct task *t = &op->timed.pending.task;
  i = lua_absindex(L, i);
  waiter_withdraw(L, i, true);
  finish(L, i, op);
  if (failed) {
    task_settle_error(L, rt, i, 0);
    return;
  }
  if (task_is(t, KIND_SELECT)) {
    lua_setiuservalue(L, i, OP_KEYS);
    lua_pushinteger(L, (lua_Integer)k + 1);
    t->flags |= TASK_MANY;
  }
  task_settle(L, rt, i, 1);
}

void waiter_settle_later(lua_State *L, struct runtime *rt, int i) {
  struct queued *op = (struct queued *)lua_touserdata(L, i);
  lua_setiuservalue(L, i, OP_KEYS);
  op->granted = true;
  task_hold(L, i, &op->timed.pending.task);
  loop_ready(rt, &op->timed.pending.task);
}

/* the first of its tasks that is complete, or NULL */
static struct clause *complete_task(lua_State *L, int i, struct queued *op) {
  for (uint32_t k = 0; k < op->count; k++) {
    if (!op->clauses[k].task) continue;
    push_input(L, i, k);
    bool done = task_done((struct task *)lua_touserdata(L, -1));
    lua_pop(L, 1);
    if (done) return &op->clauses[k];
  }
  return NULL;
}

/* [-0, +0, m] the operation at i ends as the task of its clause did */
static void end_like(lua_State *L, struct runtime *rt, int i, struct queued *op,
                     const struct clause *c) {
  push_input(L, i, c->index);
  int input = lua_gettop(L);
  struct task *t = (struct task *)lua_touserdata(L, input);
  if (t->state == TASK_SUCCEEDED) {
    if (task_push_outcome(L, input, t) == 0) lua_pushnil(L);
    lua_settop(L, input + 1);
    waiter_settle(L, rt, i, c->index, false);
  } else {
    task_push_error(L, input);
    finish(L, i, op);
    task_settle_error(L, rt, i, input);
  }
  lua_settop(L, input - 1);
}

/* It was canceled, or its time is up, or a task of a select is complete; it is in no queue. Or it was
** granted before. */
void waiter_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct queued *op = (struct queued *)lua_touserdata(L, i);
  struct task *t = &op->timed.pending.task;
  if (op->granted) {
    lua_getiuservalue(L, i, OP_KEYS);
    lua_pushnil(L);
    lua_setiuservalue(L, i, OP_KEYS);
    task_forget(L, t);
    task_settle(L, rt, i, 1);
    return;
  }
  struct clause *c = complete_task(L, i, op);
  if (c != NULL)
    end_like(L, rt, i, op, c);
  else if (t->flags & TASK_EXPIRED) {
    lua_pushliteral(L, "timeout");
    if (task_done(t)) return; /* by a finalizer */
    finish(L, i, op);
    if (task_is(t, KIND_SELECT)) { /* nil, "timeout" */
      lua_setiuservalue(L, i, OP_KEYS);
      lua_pushnil(L);
      t->flags |= TASK_MANY;
    } else
      lua_pushboolean(L, 0);
    task_settle(L, rt, i, 1);
  } else {
    operation_push_interruption(L, i);
    if (task_is(t, KIND_QUEUED)) handle_tell_written(L, i);
    if (task_done(t)) return; /* by a finalizer */
    finish(L, i, op);
    task_settle_canceled(L, rt, i);
  }
}

static int await_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *on = (struct task *)ctx;
  if (!fiber_awaited(L, on, status)) return lua_yieldk(L, 0, ctx, await_k);
  return task_push_outcome(L, 1, on);
}

int waiter_await(lua_State *L, struct fiber *me, struct task *op, bool deaf) {
  lua_replace(L, 1);
  lua_settop(L, 1);
  if (task_done(op)) return task_push_outcome(L, 1, op);
  return fiber_await(L, runtime(L), me, op, await_k, deaf);
}

/* ---- handing over ---- */

/* somebody has closed the coroutine that awaited it, and nobody else ever will */
static bool is_orphan(lua_State *L, const struct queued *op) {
  if (!op->direct) return false;
  struct wait *w = task_waiters(&op->timed.pending.task);
  if (w == NULL) return true;
  bool awaited = fiber_push_awaited(L, container_of(w, struct fiber, u.wait));
  lua_pop(L, 1);
  return !awaited;
}

struct nap *waiter_take(lua_State *L, int i, struct holder *h, struct link *q) {
  while (q->next != q) {
    struct nap *n = container_of(q->next, struct nap, link);
    push_waiter(L, i, n);
    struct clause *c = waiter_clause(n);
    if (c != NULL) {
      waiter_withdraw(L, -1, true);
      if (!is_orphan(L, operation_of(c))) return n;
      lua_pop(L, 1);
      continue;
    }
    struct fiber *f = container_of(n, struct fiber, u.nap);
    drop(L, i, h, n);
    if (deadline_is_set(&n->deadline)) deadline_drop(runtime(L), &n->deadline);
    if (stack_of(f) != NULL) return n;
    fiber_wake(L, runtime(L), f); /* somebody has closed its coroutine: it gets nothing */
  }
  return NULL;
}

void waiter_push_value(lua_State *L, struct nap *n) {
  struct clause *c = waiter_clause(n);
  if (c == NULL) {
    struct fiber *f = container_of(n, struct fiber, u.nap);
    lua_State *co = n->own ? f->co : stack_of(f);
    lua_pushvalue(co, -1);
    lua_xmove(co, L, 1);
    return;
  }
  lua_getiuservalue(L, -1, OP_KEYS);
  if (!task_is(&operation_of(c)->timed.pending.task, KIND_SELECT)) return;
  lua_rawgeti(L, -1, (lua_Integer)c->index + 1);
  lua_remove(L, -2);
}

void waiter_grant(lua_State *L, struct runtime *rt, struct nap *n) {
  struct clause *c = waiter_clause(n);
  if (c == NULL) {
    struct fiber *f = container_of(n, struct fiber, u.nap);
    lua_State *co = n->own ? f->co : stack_of(f);
    replace_value(L, co);
    lua_rawseti(L, UP_ANCHORS, f->task.slot); /* as fiber_wake */
    loop_queue(rt, f);
    return;
  }
  waiter_settle(L, rt, -2, c->index, false);
  lua_pop(L, 1);
}

void waiter_fail(lua_State *L, struct runtime *rt, struct nap *n) {
  struct clause *c = waiter_clause(n);
  if (c == NULL) {
    struct fiber *f = container_of(n, struct fiber, u.nap);
    replace_value(L, stack_of(f));
    n->failed = true;
    fiber_wake(L, rt, f);
    return;
  }
  waiter_settle(L, rt, -2, c->index, true);
  lua_pop(L, 1);
}
