/*
** channel.c - queues of items between tasks: bounded, unbounded, rendezvous, prioritized.
**
** Writers that found the channel full wait with their item; readers that found it empty wait to be
** handed one. Beside them wait those who only asked to be told (wait_to_read, wait_to_write): they are
** told all at once, and only when nobody waits for the thing itself. Where the items lie, and in which
** order, is told in items.c.
**
** Callbacks of users (item_dropped, comparer) are called when the channel is in order and nothing is in our
** hands but what the callback is about; whatever they do to the channel, they do to it as it is.
**
** Invariants: readers wait only while there is no item, writers only while there is no room and nobody
**             reads; after completion nobody waits but for the end, which is when it is drained.
**
** Source:     System.Threading.Channels. There end of data is an exception too; here read returns nil.
** SPDX-License-Identifier: MIT
*/
#include "channel.h"

#include <math.h>

enum { HALF_CHANNEL = 1 };

enum outcome { PENDING, VALUE, DROPPED, FAILURE };

static struct link *queue_of(struct channel *c, enum ask what) {
  switch (what) {
    case ASK_WRITE: return &c->writers;
    case ASK_CAN_READ: return &c->can_read;
    case ASK_CAN_WRITE: return &c->can_write;
    default: return &c->readers;
  }
}

/* ---- handing over ---- */

/* [-2, +0, m] the reader below the item on top gets it */
static void hand(lua_State *L, struct runtime *rt, struct nap *n) {
  if (n->what == ASK_BATCH) {
    lua_insert(L, -2); /* item reader */
    waiter_push_value(L, n);
    lua_rotate(L, -3, 2); /* reader list item */
    lua_rawseti(L, -2, 1);
  }
  waiter_grant(L, rt, n);
}

/* [-0, +0, m] all who asked to be told are */
static void tell(lua_State *L, struct runtime *rt, int ch, struct channel *c, struct link *q) {
  struct nap *n;
  while ((n = waiter_take(L, ch, &c->holder, q)) != NULL) {
    lua_pushboolean(L, 1);
    waiter_grant(L, rt, n);
  }
}

/* [-0, +0, m] the channel is complete and drained */
static void drained(lua_State *L, struct runtime *rt, int ch, const struct channel *c) {
  items_close(L, ch);
  if (lua_getiuservalue(L, ch, CHANNEL_COMPLETION) == LUA_TUSERDATA) {
    int i = lua_gettop(L);
    struct task *t = (struct task *)lua_touserdata(L, i);
    if (task_done(t))
      ;
    else if (!c->failed)
      task_settle(L, rt, i, 0);
    else {
      t->flags |= TASK_OBSERVED; /* the error is for those who read */
      lua_getiuservalue(L, ch, CHANNEL_ERROR);
      task_settle_error(L, rt, i, 0);
    }
  }
  lua_pop(L, 1);
}

/* [-0, +1, m] an item, if there is one */
static bool take(lua_State *L, struct runtime *rt, int ch, struct channel *c) {
  struct nap *n;
  if (c->count == 0) { /* of a rendezvous */
    if (!waiter_any(&c->writers) || (n = waiter_take(L, ch, &c->holder, &c->writers)) == NULL)
      return false;
    waiter_push_value(L, n);
    lua_insert(L, -2); /* item writer */
    lua_pushboolean(L, 1);
    waiter_grant(L, rt, n);
    return true;
  }
  bool in_place = items_in_place(c);
  if (in_place)
    items_push_first(L, ch, c);
  else
    items_fetch(L, ch, c, 0, true);
  if (waiter_any(&c->writers) && (n = waiter_take(L, ch, &c->holder, &c->writers)) != NULL) {
    waiter_push_value(L, n);
    if (in_place)
      items_replace_first(L, ch, c);
    else {
      items_put(L, ch, c, -1);
      lua_pop(L, 1);
    }
    lua_pushboolean(L, 1);
    waiter_grant(L, rt, n);
    return true;
  }
  if (in_place) items_drop_first(L, ch, c);
  if (waiter_any(&c->can_write)) tell(L, rt, ch, c, &c->can_write);
  if (c->count == 0 && c->completed) drained(L, rt, ch, c);
  return true;
}

/* [-0, +0, m] gives the item at v to a reader, or stores it; false: there is no room */
static bool offer(lua_State *L, struct runtime *rt, int ch, struct channel *c, int v) {
  struct nap *n;
  if (waiter_any(&c->readers) && (n = waiter_take(L, ch, &c->holder, &c->readers)) != NULL) {
    lua_pushvalue(L, v);
    hand(L, rt, n);
    return true;
  }
  if (c->count >= c->capacity) return false;
  items_put(L, ch, c, v);
  if (waiter_any(&c->can_read)) tell(L, rt, ch, c, &c->can_read);
  return true;
}

/* [-0, +1, m] there is no room for the item at v: leaves the one that is dropped */
static void drop(lua_State *L, int ch, struct channel *c, int v) {
  if (c->capacity == 0 || c->mode == MODE_DROP_WRITE) {
    lua_pushvalue(L, v);
    return;
  }
  items_fetch(L, ch, c, c->mode == MODE_DROP_NEWEST ? c->count - 1 : 0, true);
  items_put(L, ch, c, v);
}

/* [-0, +0, e] the item at v into a prioritized channel; false: it was completed meanwhile */
static bool insert(lua_State *L, struct runtime *rt, int ch, struct channel *c, int v) {
  struct nap *n;
  if (!items_insert(L, ch, c, v)) return false;
  while (c->count > 0 && (n = waiter_take(L, ch, &c->holder, &c->readers)) != NULL) {
    items_fetch(L, ch, c, 0, true);
    hand(L, rt, n);
  }
  if (c->count > 0) tell(L, rt, ch, c, &c->can_read);
  return true;
}

/* ---- the end ---- */

/* [-0, +1, -] what `what` has come to after completion; true: an error */
static bool push_end(lua_State *L, int ch, const struct channel *c, enum ask what) {
  if (what == ASK_WRITE || (c->failed && (what == ASK_READ || what == ASK_BATCH))) {
    lua_getiuservalue(L, ch, CHANNEL_CLOSED);
    return true;
  }
  if (c->failed)
    lua_getiuservalue(L, ch, CHANNEL_ERROR);
  else if (what == ASK_CAN_READ || what == ASK_CAN_WRITE)
    lua_pushboolean(L, 0);
  else
    lua_pushnil(L);
  return c->failed;
}

/* [-0, +0, m] ends the waits of a queue */
static void end_waits(lua_State *L, struct runtime *rt, int ch, struct channel *c, struct link *q) {
  struct nap *n;
  while ((n = waiter_take(L, ch, &c->holder, q)) != NULL) {
    if (push_end(L, ch, c, (enum ask)n->what))
      waiter_fail(L, rt, n);
    else
      waiter_grant(L, rt, n);
  }
}

/* [-0, +0, m] with the error at index 2, or nil; false: it was completed before. The channel is at 1. */
static bool complete(lua_State *L, struct channel *c) {
  struct runtime *rt = runtime(L);
  bool failed = !lua_isnil(L, 2);
  if (c->completed) return false;
  if (failed && error_is(L, 2, ERROR_CANCELED))
    lua_pushvalue(L, 2);
  else {
    lua_pushliteral(L, "");
    if (failed) {
      error_push_text(L, 2);
      lua_pushfstring(L, " with an error: %s", lua_tostring(L, -1));
    }
    error_push(L, ERROR_CHANNEL, "the channel has been completed%s", lua_tostring(L, -1));
    if (failed) {
      lua_pushvalue(L, 2);
      lua_setfield(L, -2, "inner");
    }
  }
  if (c->completed) return false; /* by a finalizer */
  lua_setiuservalue(L, 1, CHANNEL_CLOSED);
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, 1, CHANNEL_ERROR);
  c->completed = true;
  c->plain = false;
  c->failed = failed;
  end_waits(L, rt, 1, c, &c->writers);
  end_waits(L, rt, 1, c, &c->readers);
  end_waits(L, rt, 1, c, &c->can_write);
  end_waits(L, rt, 1, c, &c->can_read);
  if (c->count == 0) drained(L, rt, 1, c);
  return true;
}

/* ---- what is asked for ---- */

/* [-0, +1, m] the list at i with at most max items, if there are any */
static bool fill(lua_State *L, struct runtime *rt, int ch, struct channel *c, int i,
                 lua_Integer max) {
  lua_Integer n = 0;
  while (n < max && take(L, rt, ch, c)) lua_rawseti(L, i, ++n);
  if (n > 0) lua_pushvalue(L, i);
  return n > 0;
}

/* [-0, +1, e] true, or the dropped item; PENDING: [-0, +0] there is no room, or it has been completed
** meanwhile */
static enum outcome write_item(lua_State *L, struct runtime *rt, int ch, struct channel *c, int v) {
  if (items_may_shrink(c)) {
    items_shrink(L, ch, c);
    if (c->completed) return PENDING; /* by a finalizer */
  }
  if (c->sorted) {
    if (!insert(L, rt, ch, c, v)) return PENDING;
  } else if (!offer(L, rt, ch, c, v)) {
    if (c->mode == MODE_WAIT) return PENDING;
    drop(L, ch, c, v);
    return DROPPED;
  }
  lua_pushboolean(L, 1);
  return VALUE;
}

/* [-0, +1, e] the result, the dropped item, or the error, as the outcome says; PENDING: [-0, +0].
** v: the item to be written, or the list to be filled with at most max items */
static enum outcome attempt(lua_State *L, struct runtime *rt, int ch, struct channel *c,
                            enum ask what, int v, lua_Integer max) {
  switch (what) {
    case ASK_BATCH:
      if (fill(L, rt, ch, c, v, max)) return VALUE;
      break;
    case ASK_READ:
    case ASK_NEXT:
      if (take(L, rt, ch, c)) return VALUE;
      break;
    case ASK_WRITE: {
      enum outcome outcome = c->completed ? PENDING : write_item(L, rt, ch, c, v);
      if (outcome != PENDING) return outcome;
      break;
    }
    case ASK_CAN_READ:
      if (c->count == 0 && !waiter_any(&c->writers)) break;
      lua_pushboolean(L, 1);
      return VALUE;
    default:
      if (c->completed) break;
      if (c->mode == MODE_WAIT && c->count >= c->capacity && !waiter_any(&c->readers))
        return PENDING;
      lua_pushboolean(L, 1);
      return VALUE;
  }
  if (!c->completed) return PENDING;
  return push_end(L, ch, c, what) ? FAILURE : VALUE;
}

void channel_announce(lua_State *L, struct runtime *rt, int ch, enum ask what) {
  struct channel *c = (struct channel *)lua_touserdata(L, ch);
  if (c->capacity != 0) return;
  if (what == ASK_WRITE && waiter_any(&c->can_read))
    tell(L, rt, ch, c, &c->can_read);
  else if (what < ASK_WRITE && waiter_any(&c->can_write))
    tell(L, rt, ch, c, &c->can_write);
}

/* ---- dropped items ---- */

static int dropped_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status, (void)ctx;
  lua_pushboolean(L, 1);
  return 1;
}

/* [-1, +1, e] tells the user about the dropped item on top; the result of the write */
static int tell_dropped(lua_State *L, int ch, const struct channel *c) {
  if (c->drops) {
    lua_getiuservalue(L, ch, CHANNEL_DROPPED);
    lua_insert(L, -2);
    lua_callk(L, 1, 0, 0, dropped_k);
  }
  return dropped_k(L, LUA_OK, 0);
}

/* [-1, +1, m] the same for an operation, whose result is on top then; false: the callback's error */
static bool try_tell_dropped(lua_State *L, int ch, const struct channel *c) {
  if (c->drops) {
    lua_getiuservalue(L, ch, CHANNEL_DROPPED);
    lua_insert(L, -2);
    if (lua_pcall(L, 1, 0, 0) != LUA_OK) return false;
  } else
    lua_pop(L, 1);
  lua_pushboolean(L, 1);
  return true;
}

/* ---- arguments ---- */

/* the half that does it */
static uint32_t half_for(enum ask what) {
  return what == ASK_WRITE || what == ASK_CAN_WRITE ? TAG_WRITER : TAG_READER;
}

/* the channel at index 1, or that of the half there, which it replaces */
static struct channel *check(lua_State *L, uint32_t half) {
  struct channel *c = (struct channel *)object_test(L, 1, TAG_CHANNEL);
  if (c != NULL) return c;
  if (half == 0 || object_test(L, 1, half) == NULL) blame_object(L, 1, TAG_CHANNEL);
  lua_getiuservalue(L, 1, HALF_CHANNEL);
  lua_replace(L, 1);
  return (struct channel *)lua_touserdata(L, 1);
}

bool channel_check(lua_State *L, int i, enum ask what) {
  if (object_test(L, i, TAG_CHANNEL) != NULL) return true;
  if (object_test(L, i, half_for(what)) == NULL) return false;
  lua_getiuservalue(L, i, HALF_CHANNEL);
  lua_replace(L, i);
  return true;
}

static void check_item(lua_State *L, int v) {
  if (lua_isnoneornil(L, v)) luaL_argerror(L, v, "nil is not an item: it means the end");
}

/* ---- operations ---- */

/* [-0, +0, e] as declared, for at most max items */
static bool poll(lua_State *L, struct runtime *rt, int i, uint32_t k, int ch, enum ask what, int v,
                 lua_Integer max) {
  struct channel *c = (struct channel *)lua_touserdata(L, ch);
  enum outcome outcome = attempt(L, rt, ch, c, what, v, max);
  if (outcome == PENDING) return false;
  if (outcome == DROPPED) outcome = try_tell_dropped(L, ch, c) ? VALUE : FAILURE;
  waiter_settle(L, rt, i, k, outcome == FAILURE);
  return true;
}

bool channel_poll(lua_State *L, struct runtime *rt, int i, uint32_t k, int ch, enum ask what,
                  int v) {
  return poll(L, rt, i, k, ch, what, v, 1);
}

void channel_enqueue(lua_State *L, int i, int ch, struct clause *clause) {
  struct channel *c = (struct channel *)lua_touserdata(L, ch);
  waiter_enqueue(L, i, ch, queue_of(c, (enum ask)clause->u.nap.what), clause);
}

/* [-0, +1, e] an operation on the channel at 1, with the item, the list or nil at 2 and the token at 3 */
static struct task *start(lua_State *L, struct channel *c, enum ask what, lua_Integer max,
                          struct scope *s) {
  struct runtime *rt = runtime(L);
  struct token *token = token_opt(L, 3);
  lua_settop(L, 3);
  struct queued *op = waiter_operation(L, KIND_QUEUED, 1, HUGE_VAL);
  struct task *t = &op->timed.pending.task;
  if (operation_canceled(token, s)) {
    operation_push_canceled(L, token, 3, s);
    task_settle_canceled(L, rt, 4);
    return t;
  }
  if (poll(L, rt, 4, 0, 1, what, 2, max)) return t;
  if (operation_canceled(token, s)) { /* by a finalizer */
    operation_push_canceled(L, token, 3, s);
    task_settle_canceled(L, rt, 4);
    return t;
  }
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, 4, OP_KEYS);
  op->clauses[0].u.nap.what = what;
  waiter_start(L, 4, queue_of(c, what), 3, s);
  channel_announce(L, rt, 1, what);
  return t;
}

/* x_async: the arguments are the channel, for ASK_WRITE the item, and the token */
static int twin(lua_State *L, enum ask what) {
  struct channel *c = check(L, half_for(what));
  if (what == ASK_WRITE)
    check_item(L, 2);
  else {
    token_opt(L, 2); /* it is argument 2 as long as nothing is moved */
    lua_settop(L, 2);
    lua_pushnil(L);
    lua_insert(L, 2);
  }
  lua_settop(L, 3);
  start(L, c, what, 0, operation_scope(L, 3));
  return 1;
}

/* ---- direct style ---- */

static int wait_k(lua_State *L, int status, lua_KContext ctx) {
  (void)status;
  if (waiter_resumed(L, (struct runtime *)ctx) != WAITER_STRAY) return 1;
  lua_settop(L, 2);
  return lua_yieldk(L, 0, ctx, wait_k);
}

/* returns, or raises, what attempt has left on top */
static int give(lua_State *L, const struct channel *c, enum outcome outcome) {
  if (outcome == DROPPED) return tell_dropped(L, 1, c);
  return outcome == FAILURE ? lua_error(L) : 1;
}

/* what cannot be had at once, with the arguments as of twin, the token at k; f: from the start */
static int wait_for(lua_State *L, struct channel *c, enum ask what, int k, lua_CFunction f) {
  struct runtime *rt = runtime(L);
  struct token *token = token_opt(L, k);
  bool deaf = token_none(L, k);
  struct fiber *me = fiber_here(L, rt);
  lua_settop(L, k);
  if (me == NULL) return fiber_outside(L, f);
  if (what != ASK_WRITE) {
    lua_pushnil(L);
    lua_insert(L, 2);
  }                    /* channel item token */
  if (token != NULL) { /* as an operation, whose scope is ours whatever flows to others */
    struct scope *s = scope_ambient(L, rt);
    return waiter_await_direct(L, me, start(L, c, what, 0, s), false);
  }
  lua_settop(L, 2);
  if (c->capacity == 0) {
    channel_announce(L, rt, 1, what);
    enum outcome outcome = attempt(L, rt, 1, c, what, 2, 0); /* a finalizer may have been here */
    if (outcome != PENDING) return give(L, c, outcome);
  }
  if (!deaf && me->member.scope->canceled) return scope_throw(L, me->member.scope); /* by one */
  return waiter_wait(L, rt, &c->holder, queue_of(c, what), what, deaf, wait_k);
}

/* with the arguments as of twin, the token at k; f is the function that calls this */
static inline int direct(lua_State *L, enum ask what, int k, lua_CFunction f) {
  struct channel *c = check(L, half_for(what));
  struct runtime *rt = runtime(L);
  if (what == ASK_WRITE) check_item(L, 2);
  operation_check_tokens(L, rt, k);
  enum outcome outcome = attempt(L, rt, 1, c, what, 2, 0);
  return outcome == PENDING ? wait_for(L, c, what, k, f) : give(L, c, outcome);
}

/* ---- the common cases of read and write: the same as direct, without what the others need ----
**
** No token, nobody to be told, and an item or room there, or the wait for it. */

static inline bool is_canceled(const struct runtime *rt) {
  return ((const struct fiber *)rt->me)->member.scope->canceled;
}

/* [-0, +0, e] whether the running task may wait here and now */
static inline bool can_wait(lua_State *L, const struct channel *c, const struct runtime *rt) {
  return c->capacity > 0 && rt->me != rt->outside && ((const struct fiber *)rt->me)->co == L &&
         lua_isyieldable(L);
}

static int l_read(lua_State *L) {
  struct channel *c = (struct channel *)object_test(L, 1, TAG_CHANNEL);
  if (c == NULL || !c->plain || lua_gettop(L) != 1) return direct(L, ASK_READ, 2, l_read);
  struct runtime *rt = c->rt;
  if (is_canceled(rt)) return direct(L, ASK_READ, 2, l_read);
  if (c->count > 0 && !waiter_any(&c->writers) && !waiter_any(&c->can_write)) {
    items_fetch_first(L, 1, c);
    return 1;
  }
  if (c->count > 0) {
    take(L, rt, 1, c);
    return 1;
  }
  if (!can_wait(L, c, rt)) return direct(L, ASK_READ, 2, l_read);
  lua_pushnil(L);
  return waiter_wait(L, rt, &c->holder, &c->readers, ASK_READ, false, wait_k);
}

static int l_write(lua_State *L) {
  struct channel *c = (struct channel *)object_test(L, 1, TAG_CHANNEL);
  if (c == NULL || !c->plain || lua_gettop(L) != 2 || lua_isnil(L, 2))
    return direct(L, ASK_WRITE, 3, l_write);
  struct runtime *rt = c->rt;
  if (is_canceled(rt)) return direct(L, ASK_WRITE, 3, l_write);
  if (c->count == 0) {
    struct nap *n;
    if (waiter_any(&c->readers) && (n = waiter_take(L, 1, &c->holder, &c->readers)) != NULL) {
      lua_pushvalue(L, 2);
      hand(L, rt, n);
      lua_pushboolean(L, 1);
      return 1;
    }
    if (waiter_any(&c->can_read) || items_may_shrink(c)) return direct(L, ASK_WRITE, 3, l_write);
  }
  if (c->count < c->size && c->count < c->capacity) {
    items_put_last(L, 1, c);
    lua_pushboolean(L, 1);
    return 1;
  }
  if (c->count < c->capacity || c->mode != MODE_WAIT || !can_wait(L, c, rt))
    return direct(L, ASK_WRITE, 3, l_write);
  return waiter_wait(L, rt, &c->holder, &c->writers, ASK_WRITE, false, wait_k);
}

/* ---- Lua face: reading and writing ---- */

static int l_wait_to_read(lua_State *L) { return direct(L, ASK_CAN_READ, 2, l_wait_to_read); }
static int l_wait_to_write(lua_State *L) { return direct(L, ASK_CAN_WRITE, 2, l_wait_to_write); }

static int l_read_async(lua_State *L) { return twin(L, ASK_READ); }
static int l_write_async(lua_State *L) { return twin(L, ASK_WRITE); }
static int l_wait_to_read_async(lua_State *L) { return twin(L, ASK_CAN_READ); }
static int l_wait_to_write_async(lua_State *L) { return twin(L, ASK_CAN_WRITE); }

/* read_batch_async(max, token) */
static int l_read_batch_async(lua_State *L) {
  struct channel *c = check(L, TAG_READER);
  lua_Integer max = LUA_MAXINTEGER;
  if (!lua_isnoneornil(L, 2) && lua_tonumber(L, 2) != HUGE_VAL) max = luaL_checkinteger(L, 2);
  luaL_argcheck(L, max >= 1, 2, "at least one item must be asked for");
  lua_settop(L, 3);
  lua_createtable(L, 1, 0);
  lua_replace(L, 2);
  start(L, c, ASK_BATCH, max, operation_scope(L, 3));
  return 1;
}

static int next_item(lua_State *L) { return direct(L, ASK_NEXT, 2, next_item); }

/* next(whatever a loop gives it); upvalues: runtime, anchors, channel, token or nil */
static int l_next(lua_State *L) {
  lua_settop(L, 0);
  lua_pushvalue(L, lua_upvalueindex(3));
  lua_pushvalue(L, lua_upvalueindex(4));
  return next_item(L);
}

/* iterate(token) */
static int l_iterate(lua_State *L) {
  check(L, TAG_READER);
  token_opt(L, 2);
  lua_settop(L, 2);
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_rotate(L, 1, 2);
  lua_pushcclosure(L, l_next, 4);
  return 1;
}

static int l_try_read(lua_State *L) {
  struct channel *c = check(L, TAG_READER);
  if (!take(L, runtime(L), 1, c)) lua_pushnil(L);
  return 1;
}

static int l_try_write(lua_State *L) {
  struct channel *c = check(L, TAG_WRITER);
  check_item(L, 2);
  switch (attempt(L, runtime(L), 1, c, ASK_WRITE, 2, 0)) {
    case VALUE: return 1;
    case DROPPED: return tell_dropped(L, 1, c);
    default: lua_pushboolean(L, 0); return 1;
  }
}

static int l_peek(lua_State *L) {
  struct channel *c = check(L, TAG_READER);
  if (c->count > 0)
    items_fetch(L, 1, c, 0, false);
  else
    lua_pushnil(L);
  return 1;
}

static int l_try_complete(lua_State *L) {
  struct channel *c = check(L, TAG_WRITER);
  lua_settop(L, 2);
  lua_pushboolean(L, complete(L, c));
  return 1;
}

static int l_complete(lua_State *L) {
  struct channel *c = check(L, TAG_WRITER);
  lua_settop(L, 2);
  if (!complete(L, c))
    return error_throw(L, ERROR_CHANNEL,
                       "the channel has been completed before: use try_complete "
                       "where several may complete it");
  return 0;
}

/* ---- Lua face: the channel and its halves ---- */

static int l_count(lua_State *L) {
  lua_pushinteger(L, check(L, TAG_READER)->count);
  return 1;
}

static int l_completion(lua_State *L) {
  struct channel *c = check(L, TAG_READER);
  lua_settop(L, 1);
  if (lua_getiuservalue(L, 1, CHANNEL_COMPLETION) != LUA_TNIL) return 1;
  task_new_named(L, "completion");
  if (lua_getiuservalue(L, 1, CHANNEL_COMPLETION) != LUA_TNIL) return 1; /* by a finalizer */
  lua_settop(L, 3);
  lua_pushvalue(L, 3);
  lua_setiuservalue(L, 1, CHANNEL_COMPLETION);
  if (c->completed && c->count == 0) drained(L, runtime(L), 1, c);
  lua_settop(L, 3);
  return 1;
}

/* [-0, +1, m] the half of the channel at 1 */
static int push_half(lua_State *L, uint32_t tag, int uservalue) {
  check(L, 0);
  if (lua_getiuservalue(L, 1, uservalue) != LUA_TNIL) return 1;
  object_new(L, tag, sizeof(uint32_t), HALF_CHANNEL);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, HALF_CHANNEL);
  if (lua_getiuservalue(L, 1, uservalue) != LUA_TNIL) return 1;
  lua_pop(L, 1);
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, 1, uservalue);
  return 1;
}

static int l_reader(lua_State *L) { return push_half(L, TAG_READER, CHANNEL_READER); }
static int l_writer(lua_State *L) { return push_half(L, TAG_WRITER, CHANNEL_WRITER); }

static int l_tostring(lua_State *L) {
  const struct channel *c = check(L, 0);
  if (c->capacity == LUA_MAXINTEGER)
    lua_pushfstring(L, "coflow.Channel (%I items%s)", (LUAI_UACINT)c->count,
                    c->completed ? ", completed" : "");
  else
    lua_pushfstring(L, "coflow.Channel (%I of %I items%s)", (LUAI_UACINT)c->count,
                    (LUAI_UACINT)c->capacity, c->completed ? ", completed" : "");
  return 1;
}

static int l_gc(lua_State *L) {
  struct channel *c = (struct channel *)object_test(L, 1, TAG_CHANNEL);
  if (c == NULL || c->readers.next == NULL) return 0;
  holder_drop(&c->readers);
  holder_drop(&c->writers);
  holder_drop(&c->can_read);
  holder_drop(&c->can_write);
  return 0;
}

/* channel_new(capacity or nil, mode or nil, item_dropped, insert): checked by the library.
** insert(channel, item): of a prioritized one */
static int l_new(lua_State *L) {
  static const char *const modes[] = {"wait", "drop_newest", "drop_oldest", "drop_write", NULL};
  lua_settop(L, 4);
  lua_Integer capacity = luaL_optinteger(L, 1, LUA_MAXINTEGER);
  int mode = luaL_checkoption(L, 2, "wait", modes);
  int own = items_own(capacity);
  struct channel *c =
      (struct channel *)holder_new(L, TAG_CHANNEL, sizeof *c, CHANNEL_WRITER + own); /* at 5 */
  link_init(&c->readers);
  link_init(&c->writers);
  link_init(&c->can_read);
  link_init(&c->can_write);
  c->capacity = capacity;
  c->mode = (uint8_t)mode;
  c->drops = !lua_isnil(L, 3);
  c->sorted = !lua_isnil(L, 4);
  c->plain = !c->sorted;
  c->rt = runtime(L);
  items_init(L, 5, c, own);
  lua_pushvalue(L, 3);
  lua_setiuservalue(L, 5, CHANNEL_DROPPED);
  lua_pushvalue(L, 4);
  lua_setiuservalue(L, 5, CHANNEL_INSERT);
  return 1;
}

/* check_batch(reader, max, token): checks the arguments of read_batch; the greatest number of items */
static int l_check_batch(lua_State *L) {
  lua_settop(L, 3);
  if (object_test(L, 1, TAG_CHANNEL) == NULL && object_test(L, 1, TAG_READER) == NULL)
    return blame_type(L, 1, "coflow.Channel", 1);
  if (!lua_isnil(L, 3) && object_test(L, 3, TAG_TOKEN) == NULL)
    return blame_type(L, 3, "coflow.CancellationToken", 3);
  int integer = 1;
  lua_Integer max = LUA_MAXINTEGER;
  if (!lua_isnil(L, 2) && !(lua_type(L, 2) == LUA_TNUMBER && lua_tonumber(L, 2) == HUGE_VAL))
    max = lua_tointegerx(L, 2, &integer);
  if (!integer && lua_type(L, 2) != LUA_TNUMBER) return blame_type(L, 2, "number", 2);
  if (!integer || max < 1) return blame(L, 2, "at least one item must be asked for");
  lua_pushinteger(L, max);
  return 1;
}

/* channel_version(channel): counts the changes of a prioritized one; nil once it is complete */
static int l_version(lua_State *L) {
  const struct channel *c = check(L, 0);
  if (c->completed)
    lua_pushnil(L);
  else
    lua_pushinteger(L, c->version);
  return 1;
}

/* less(a, b): a < b; in C, so that the error for what it cannot compare has no place of the library's */
static int l_less(lua_State *L) {
  lua_pushboolean(L, lua_compare(L, 1, 2, LUA_OPLT));
  return 1;
}

static const luaL_Reg functions[] = {{"channel_new", l_new},
                                     {"less", l_less},
                                     {"channel_version", l_version},
                                     {"check_batch", l_check_batch},
                                     {NULL, NULL}};

static const luaL_Reg reading[] = {{"read", l_read},
                                   {"read_async", l_read_async},
                                   {"read_batch_async", l_read_batch_async},
                                   {"try_read", l_try_read},
                                   {"peek", l_peek},
                                   {"wait_to_read", l_wait_to_read},
                                   {"wait_to_read_async", l_wait_to_read_async},
                                   {"iterate", l_iterate},
                                   {NULL, NULL}};
static const luaL_Reg writing[] = {{"write", l_write},
                                   {"write_async", l_write_async},
                                   {"try_write", l_try_write},
                                   {"wait_to_write", l_wait_to_write},
                                   {"wait_to_write_async", l_wait_to_write_async},
                                   {"complete", l_complete},
                                   {"try_complete", l_try_complete},
                                   {NULL, NULL}};
static const luaL_Reg methods[] = {{"__gc", l_gc}, {"__tostring", l_tostring}, {NULL, NULL}};
static const luaL_Reg reader_properties[] = {
    {"count", l_count}, {"completion", l_completion}, {NULL, NULL}};
static const luaL_Reg properties[] = {{"count", l_count},
                                      {"completion", l_completion},
                                      {"reader", l_reader},
                                      {"writer", l_writer},
                                      {NULL, NULL}};

ONCE static void channel_open(lua_State *L) {
  module_class(L, TAG_READER, "coflow.ChannelReader", reading, reader_properties);
  module_class(L, TAG_WRITER, "coflow.ChannelWriter", writing, NULL);
  module_class(L, TAG_CHANNEL, "coflow.Channel", methods, properties);
  module_methods(L, TAG_CHANNEL, reading); /* a channel has those of both halves */
  module_methods(L, TAG_CHANNEL, writing);
}

const struct part channel_part = {functions, channel_open, NULL};
