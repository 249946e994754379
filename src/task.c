/*
** task.c - what all tasks share: the anchor, the waits, the outcome.
**
** A task is complete once; then its outcome never changes, and everybody who waited has been made
** ready, first in, first out. Nobody's code runs while a task is settled (queue-all): fibers are put
** on the ready list, and tasks made of others (when_all …) land at the end of the settling.
**
** Waiting. Every waiter embeds one struct wait per task that it waits for. The nodes form a circular
** list, which gives order and O(1) removal; what keeps the waiters alive is beside it, in the user
** value TASK_WAITERS of the awaited task: nil, the one waiter, or a slot table of several.
**
** Invariants: w->on != NULL exactly while w is in the list of w->on. t->waiters is the last node; a node
**             with another `on` there means an empty list (a combinator that is kept: direct.c).
**             A task in the slot of the anchors by its address only is parked, or not started.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <string.h>

/* ---- anchors ---- */

struct task *task_new(lua_State *L, int kind, size_t size, int uservalues, bool mortal) {
  struct task *t =
      (struct task *)object_new(L, mortal ? TAG_OPERATION : TAG_TASK, size, uservalues);
  t->tag = TAG_TASK | (uint32_t)kind;
  t->state = kind == KIND_FIBER ? TASK_CREATED : TASK_WAITING;
  return t;
}

/* [-1, +0, m] its slot, given to it if it has none, gets the value on top */
static void anchor(lua_State *L, struct task *t) {
  if (t->slot == 0)
    t->slot = slots_add(L, UP_ANCHORS, &runtime(L)->free_slot);
  else
    lua_rawseti(L, UP_ANCHORS, t->slot);
}

void task_hold(lua_State *L, int i, struct task *t) {
  lua_pushvalue(L, i);
  anchor(L, t);
}

void task_release(lua_State *L, struct task *t) {
  lua_pushlightuserdata(L, t);
  anchor(L, t);
}

void task_forget(lua_State *L, struct task *t) {
  if (t->slot == 0) return;
  slots_free(L, UP_ANCHORS, &runtime(L)->free_slot, t->slot);
  t->slot = 0;
}

void task_push(lua_State *L, struct task *t) {
  if (lua_rawgeti(L, UP_ANCHORS, t->slot) == LUA_TUSERDATA) return;
  int kind = lua_type(L, -1);
  lua_pop(L, 1);
  if (!task_is(t, KIND_FIBER)) {
    task_push_weak(L, t);
    return;
  }
  struct fiber *f = (struct fiber *)t;
  if (kind != LUA_TTHREAD) {
    fiber_push(L, f->co);
    return;
  }
  fiber_push_unheld(L, runtime(L), f);
  task_hold(L, -1, t); /* next time it is here */
}

bool task_push_whole(lua_State *L, struct task *t) {
  task_push(L, t);
  if (lua_type(L, -1) == LUA_TUSERDATA && lua_touserdata(L, -1) == (void *)t) return true;
  lua_pop(L, 1);
  return false;
}

bool task_push_weak(lua_State *L, const void *p) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WEAK);
  bool alive = lua_rawgetp(L, -1, p) != LUA_TNIL;
  lua_remove(L, -2);
  return alive;
}

void task_weaken(lua_State *L, int i) {
  lua_pushvalue(L, i);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WEAK);
  lua_insert(L, -2);
  lua_rawsetp(L, -2, lua_touserdata(L, i < 0 ? i - 2 : i));
  lua_pop(L, 1);
}

void task_forget_weak(lua_State *L, const void *p) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WEAK);
  if (lua_rawgetp(L, -1, p) != LUA_TNIL) {
    lua_pushnil(L);
    lua_rawsetp(L, -3, p);
  }
  lua_pop(L, 2);
}

/* ---- waits ---- */

static void list_append(struct task *t, struct wait *w) {
  struct wait *last = t->waiters;
  if (last == NULL)
    w->next = w->prev = w;
  else {
    w->next = last->next;
    w->prev = last;
    last->next->prev = w;
    last->next = w;
  }
  t->waiters = w;
  w->on = t;
}

static void list_remove(struct wait *w) {
  struct task *t = w->on;
  if (w->next == w)
    t->waiters = NULL;
  else {
    w->next->prev = w->prev;
    w->prev->next = w->next;
    if (t->waiters == w) t->waiters = w->prev;
  }
  w->on = NULL;
}

/* A table of waiters keeps the number of its first free slot in its first slot. */

/* [-1, +0, m] puts the waiter on top into the table below it */
static uint32_t table_add(lua_State *L) {
  lua_rawgeti(L, -2, 1);
  int first_free = (int)lua_tointeger(L, -1);
  lua_pop(L, 1);
  int slot = slots_add(L, -2, &first_free);
  lua_pushinteger(L, first_free);
  lua_rawseti(L, -2, 1);
  return (uint32_t)slot;
}

/* [-0, +0, -] from the table on top */
static void table_free(lua_State *L, uint32_t slot) {
  lua_rawgeti(L, -1, 1);
  int first_free = (int)lua_tointeger(L, -1);
  lua_pop(L, 1);
  slots_free(L, -1, &first_free, (int)slot);
  lua_pushinteger(L, first_free);
  lua_rawseti(L, -2, 1);
}

/* the waiter that TASK_WAITERS holds without a table, or NULL: somebody has closed its coroutine */
static struct wait *single(const struct task *t) {
  struct wait *w = t->waiters;
  if (w == NULL) return NULL;
  do {
    if (w->pos == 0) return w;
    w = w->next;
  } while (w != t->waiters);
  return NULL;
}

bool wait_add(lua_State *L, int on, struct wait *w, int owner, uint32_t role) {
  struct task *t = (struct task *)lua_touserdata(L, on);
  uint32_t pos = 0;
  if (fiber_is_lost(t)) fiber_settle_lost(L, on);
  if (task_done(t)) return false;
  if (t->keeps) direct_forget(L, on);
  if (t->waiters == NULL) { /* mostly; this can neither raise nor run anything */
    lua_pushvalue(L, owner);
    wait_first(L, on, t, w, role);
    return true;
  }
  owner = lua_absindex(L, owner);
  int held = lua_getiuservalue(L, on, TASK_WAITERS);
  if (held == LUA_TUSERDATA && single(t) != NULL) { /* it moves into a table with the second one */
    lua_createtable(L, 3, 0);
    lua_pushinteger(L, 0);
    lua_rawseti(L, -2, 1);
    if (t->keeps) direct_forget(L, on);
    held = lua_getiuservalue(L, on, TASK_WAITERS); /* first table held */
    struct wait *first = held == LUA_TUSERDATA && !task_done(t) ? single(t) : NULL;
    if (first != NULL) {
      uint32_t first_pos = table_add(L);
      lua_pushvalue(L, -1);
      lua_setiuservalue(L, on, TASK_WAITERS);
      first->pos = first_pos;
      held = LUA_TTABLE;
    } else
      lua_replace(L, -2); /* a finalizer has changed it */
    lua_remove(L, -2);
  }
  if (task_done(t)) {
    lua_pop(L, 1);
    return false;
  }
  lua_pushvalue(L, owner); /* held owner */
  if (held == LUA_TTABLE)
    pos = table_add(L);
  else
    lua_setiuservalue(L, on, TASK_WAITERS);
  lua_pop(L, 1);
  w->pos = pos;
  w->role = role;
  list_append(t, w);
  return true;
}

void wait_remove(lua_State *L, int on, struct wait *w) {
  struct task *t = w->on;
  if (t == NULL) return;
  list_remove(w);
  if (w->pos == WAIT_INLINE || lua_isnil(L, on)) return;
  on = lua_absindex(L, on);
  if (w->pos == 0 || t->waiters == NULL) {
    lua_pushnil(L);
    lua_setiuservalue(L, on, TASK_WAITERS);
  } else {
    lua_getiuservalue(L, on, TASK_WAITERS);
    table_free(L, w->pos);
    lua_pop(L, 1);
  }
}

void wait_owner(lua_State *L, int on, const struct wait *w) {
  if (w->pos == WAIT_INLINE) {
    task_push(L, &container_of(w, struct fiber, u.wait)->task);
    return;
  }
  lua_getiuservalue(L, on, TASK_WAITERS);
  if (w->pos != 0) {
    lua_rawgeti(L, -1, (lua_Integer)w->pos);
    lua_remove(L, -2);
  }
}

/* [-1, +0, m] the fiber on top has waited for t. A continuation whose token has ended the wait never
** starts, and is settled with the others that the token cancels; what has a scheduler tells it first. */
static void wake_fiber(lua_State *L, struct runtime *rt, struct fiber *f, const struct task *t) {
  const struct task *me = &f->task;
  if (task_is(t, KIND_WAIT) && t->flags & TASK_QUIET && t->state == TASK_CANCELED &&
      me->slot != 0 && !(me->flags & (TASK_STARTED | TASK_LINKED | TASK_ABANDONED)) &&
      !(me->traits & TRAIT_SCHEDULED)) {
    loop_land(L, rt, -1, &f->task);
    lua_pop(L, 1);
  } else
    fiber_wake(L, rt, f);
}

void wait_notify(lua_State *L, struct runtime *rt, int on, struct task *t) {
  struct wait *last = t->waiters, *w = last->next;
  on = lua_absindex(L, on);
  lua_getiuservalue(L, on, TASK_WAITERS);
  int waiters = lua_gettop(L);
  if (t->keeps) direct_forget(L, on);
  t->waiters = NULL;
  lua_pushnil(L);
  lua_setiuservalue(L, on, TASK_WAITERS);
  for (;;) {
    struct wait *next = w->next;
    bool end = w == last;
    w->on = NULL;
    if (w->pos == WAIT_INLINE)
      wait_end_inline(w);
    else {
      if (w->pos != 0)
        lua_rawgeti(L, waiters, (lua_Integer)w->pos); /* else it is the value itself */
      if (w->role == WAIT_FIBER)
        wake_fiber(L, rt, container_of(w, struct fiber, u.wait), t);
      else if (w->role == WAIT_OP)
        wait_op_fire(L, rt, -1);
      else
        combine_fire(L, rt, lua_gettop(L), w, on, t);
      if (!end) lua_settop(L, waiters);
    }
    if (end) break;
    w = next;
  }
  lua_settop(L, waiters - 1);
}

/* ---- outcomes ---- */

/* [-1, +0, -] the task t at i is complete, with the outcome on top; `from`: the failed task that the
** error comes from, whose record goes along, or 0 */
static void settle(lua_State *L, struct runtime *rt, int i, struct task *t, enum task_state s,
                   int from) {
  if (i < 0) i = lua_absindex(L, i);
  lua_setiuservalue(L, i, TASK_RESULT);
  t->state = (uint8_t)s;
  struct wait *w = t->waiters;
  if (w != NULL && w->on != t)
    direct_forget(L, i);
  else if (w != NULL && w->pos == WAIT_INLINE && w->next == w)
    t->waiters = NULL, wait_end_inline(w); /* it looks itself */
  else if (w != NULL)
    wait_notify(L, rt, i, t);
  if (s == TASK_FAULTED || (s == TASK_CANCELED && t->flags & TASK_TRACED)) error_attach(L, i, from);
  if (t->flags & TASK_HAS_CONTEXT) context_drop(L, i, t);
  if (rt->landing != NULL) loop_land_all(L, rt);
}

static int pack(lua_State *L, int results) {
  if (results == 1) return 0;
  if (results == 0) {
    lua_pushnil(L);
    return TASK_NONE;
  }
  values_pack(L, results);
  return TASK_MANY;
}

void task_succeed(lua_State *L, struct runtime *rt, int i, struct task *t, int results) {
  if (results != 1) t->flags |= (uint16_t)pack(L, results);
  settle(L, rt, i, t, TASK_SUCCEEDED, 0);
}

void task_settle(lua_State *L, struct runtime *rt, int i, int results) {
  task_succeed(L, rt, i, (struct task *)lua_touserdata(L, i), results);
}

void task_settle_canceled(lua_State *L, struct runtime *rt, int i) {
  settle(L, rt, i, (struct task *)lua_touserdata(L, i), TASK_CANCELED, 0);
}

void task_settle_faulted(lua_State *L, struct runtime *rt, int i, int from) {
  settle(L, rt, i, (struct task *)lua_touserdata(L, i), TASK_FAULTED, from);
}

void task_settle_error(lua_State *L, struct runtime *rt, int i, int from) {
  settle(L, rt, i, (struct task *)lua_touserdata(L, i),
         error_is(L, -1, ERROR_CANCELED) ? TASK_CANCELED : TASK_FAULTED, from);
}

void task_settle_like(lua_State *L, struct runtime *rt, int i, int from) {
  const struct task *source = (const struct task *)lua_touserdata(L, from);
  struct task *t = (struct task *)lua_touserdata(L, i);
  t->flags |= source->flags & (TASK_MANY | TASK_NONE | TASK_AGGREGATE);
  lua_getiuservalue(L, from, TASK_RESULT);
  if (source->flags & TASK_MANY && !lua_istable(L, -1)) {
    lua_getiuservalue(L, from, OP_KEYS);
    values_pack(L, 2);
  }
  settle(L, rt, i, t, (enum task_state)source->state, from);
}

void task_push_error(lua_State *L, int i) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  t->flags |= TASK_OBSERVED;
  lua_getiuservalue(L, i, TASK_RESULT);
  if (t->flags & TASK_AGGREGATE) {
    lua_getfield(L, -1, "inner_exceptions");
    lua_rawgeti(L, -1, 1);
    lua_replace(L, -3);
    lua_pop(L, 1);
  }
}

static int push_values(lua_State *L, int i) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  if (t->flags & TASK_NONE) return 0;
  lua_getiuservalue(L, i, TASK_RESULT);
  if (!(t->flags & TASK_MANY)) return 1;
  if (lua_istable(L, -1)) return values_unpack(L);
  lua_getiuservalue(L, i, OP_KEYS); /* of a when_any: the task here, its key there */
  return 2;
}

int task_push_outcome(lua_State *L, int i, struct task *t) {
  if (t->state == TASK_SUCCEEDED) {
    if (t->flags & (TASK_NONE | TASK_MANY)) return push_values(L, i);
    lua_getiuservalue(L, i, TASK_RESULT);
    return 1;
  }
  trace_remember(L, i);
  task_push_error(L, i);
  return lua_error(L);
}

void task_push_name(lua_State *L, int i) {
  static const char *const kinds[KIND_COUNT] = {[KIND_FIBER] = "task",
                                                [KIND_PROMISE] = "promise",
                                                [KIND_DELAY] = "delay",
                                                [KIND_WAIT] = "wait_async",
                                                [KIND_ALL] = "when_all",
                                                [KIND_ANY] = "when_any",
                                                [KIND_EACH] = "when_each",
                                                [KIND_EXPIRY] = "cancel_after",
                                                [KIND_SCOPE] = "scope",
                                                [KIND_IDLE] = "idle",
                                                [KIND_QUEUED] = "operation",
                                                [KIND_SELECT] = "select",
                                                [KIND_PERIOD] = "wait_for_next_tick",
                                                [KIND_TICK] = "tick"};
  i = lua_absindex(L, i);
  struct task *t = (struct task *)lua_touserdata(L, i);
  bool fiber = task_is(t, KIND_FIBER);
  if (fiber && t->label == 0) fiber_label(L, i);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NAMES);
  lua_pushvalue(L, i);
  if (lua_rawget(L, -2) == LUA_TNIL && fiber && t->label != 0) {
    lua_pop(L, 1);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LABELS);
    lua_rawgeti(L, -1, (lua_Integer)t->label);
    lua_remove(L, -2);
  } else if (lua_isnil(L, -1)) {
    lua_pop(L, 1);
    lua_pushstring(L, task_is(t, KIND_IO) ? ((struct io *)t)->class->name : kinds[task_kind(t)]);
  }
  lua_remove(L, -2);
}

/* ---- arguments ---- */

struct task *task_check(lua_State *L, int i) {
  struct task *t = (struct task *)object_check(L, i, TAG_TASK);
  if (fiber_is_lost(t)) fiber_settle_lost(L, i);
  return t;
}

struct task *task_awaitable(lua_State *L, int i) {
  struct task *t = (struct task *)object_test(L, i, TAG_TASK);
  if (t != NULL) {
    task_refuse_state(L, i, t);
    return t;
  }
  i = lua_absindex(L, i);
  if (luaL_getmetafield(L, i, "__await") == LUA_TNIL) return NULL;
  lua_pushvalue(L, i);
  lua_call(L, 1, 1);
  if (object_test(L, -1, TAG_TASK) == NULL)
    error_throw(L, ERROR_ARGUMENT, "the __await metamethod must return a Task, not a %s value",
                luaL_typename(L, -1));
  lua_replace(L, i);
  return (struct task *)lua_touserdata(L, i);
}

/* ---- Lua face: Task ---- */

static int l_status(lua_State *L) {
  static const char *const names[] = {
      "created",           "waiting_to_run", "running", "waiting_for_activation",
      "ran_to_completion", "faulted",        "canceled"};
  const struct task *t = task_check(L, 1);
  bool resuming = t->state == TASK_QUEUED && t->flags & TASK_STARTED; /* still suspended */
  lua_pushstring(L, names[resuming ? TASK_WAITING : t->state]);
  return 1;
}

static int l_is_completed(lua_State *L) {
  lua_pushboolean(L, task_done(task_check(L, 1)));
  return 1;
}

static int l_is_successful(lua_State *L) {
  lua_pushboolean(L, task_check(L, 1)->state == TASK_SUCCEEDED);
  return 1;
}

static int l_is_faulted(lua_State *L) {
  lua_pushboolean(L, task_check(L, 1)->state == TASK_FAULTED);
  return 1;
}

static int l_is_canceled(lua_State *L) {
  lua_pushboolean(L, task_check(L, 1)->state == TASK_CANCELED);
  return 1;
}

/* is_awaited(task) -> whether anybody waits for it: whoever was interrupted does so no more, even
** before it runs */
static int l_is_awaited(lua_State *L) {
  lua_pushboolean(L, task_waiters(task_check(L, 1)) != NULL);
  return 1;
}

static int l_exception(lua_State *L) {
  struct task *t = task_check(L, 1);
  if (t->state == TASK_FAULTED) {
    t->flags |= TASK_OBSERVED;
    lua_getiuservalue(L, 1, TASK_RESULT);
  } else
    lua_pushnil(L);
  return 1;
}

static int l_results(lua_State *L) {
  struct task *t = task_check(L, 1);
  lua_settop(L, 1);
  if (!task_done(t)) {
    task_push_name(L, 1);
    return error_throw(L, ERROR_OPERATION,
                       "task '%s' is not complete: await it (a result never blocks)",
                       lua_tostring(L, -1));
  }
  return task_push_outcome(L, 1, t);
}

static int l_result(lua_State *L) {
  int n = l_results(L);
  if (n == 0) lua_pushnil(L);
  if (n > 1) lua_settop(L, 2);
  return 1;
}

static int l_name(lua_State *L) {
  task_check(L, 1);
  task_push_name(L, 1);
  return 1;
}

lua_Integer task_id(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  lua_pushvalue(L, i);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_IDS);
  lua_pushvalue(L, -2); /* task ids task */
  if (lua_rawget(L, -2) == LUA_TNIL) {
    lua_pushvalue(L, -3);
    lua_pushinteger(L, (lua_Integer)++rt->next_id);
    lua_copy(L, -1, -3);
    lua_rawset(L, -4);
  }
  lua_Integer id = lua_tointeger(L, -1);
  lua_pop(L, 3);
  return id;
}

static int l_id(lua_State *L) {
  task_check(L, 1);
  lua_pushinteger(L, task_id(L, 1));
  return 1;
}

static int l_newindex(lua_State *L) {
  task_check(L, 1);
  const char *key = luaL_tolstring(L, 2, NULL);
  if (strcmp(key, "name") != 0)
    return luaL_error(L, "field '%s' of a Task cannot be assigned", key);
  if (lua_type(L, 3) != LUA_TSTRING)
    return luaL_error(L, "bad argument #1 to 'name' (string expected, got %s)",
                      luaL_typename(L, 3)); /* which is what the user calls it */
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NAMES);
  lua_pushvalue(L, 1);
  lua_pushvalue(L, 3);
  lua_rawset(L, -3);
  return 0;
}

static int l_tostring(lua_State *L) {
  task_check(L, 1);
  lua_settop(L, 1);
  task_push_name(L, 1);
  lua_pushvalue(L, 1);
  lua_insert(L, 1);
  l_status(L);
  lua_pushfstring(L, "coflow.Task '%s' (%s)", lua_tostring(L, 3), lua_tostring(L, -1));
  return 1;
}

static int l_traceback(lua_State *L) {
  task_check(L, 1);
  lua_settop(L, 1);
  trace_push(L, 1);
  return 1;
}

/* An operation that dies unfinished gives its slot back and leaves its token and its scope. */
static int l_operation_gc(lua_State *L) {
  struct task *t = (struct task *)object_test(L, 1, TAG_TASK);
  if (t == NULL || t->slot == 0 || runtime(L)->closed) return 0;
  if (lua_rawgeti(L, UP_ANCHORS, t->slot) == LUA_TUSERDATA) return 0; /* held: called by hand */
  bool queued = waiter_is_queued(t);
  if (task_is(t, KIND_WAIT) || task_is(t, KIND_DELAY) || task_is(t, KIND_PERIOD) || queued) {
    task_push(L, t);
    if (!lua_isnil(L, -1)) return 0; /* the same */
    if (queued) waiter_withdraw(L, 1, true);
    link_drop(&((struct pending *)t)->link);
    scope_leave(L, runtime(L), &((struct pending *)t)->member);
  }
  task_forget(L, t);
  return 0;
}

/* ---- Lua face: promises ---- */

static int l_from_result(lua_State *L) {
  struct runtime *rt = runtime(L);
  int n = lua_gettop(L);
  task_new_promise(L);
  lua_insert(L, 1);
  task_settle(L, rt, 1, n);
  return 1;
}

static int l_from_exception(lua_State *L) { /* nil is a legal error value */
  struct runtime *rt = runtime(L);
  lua_settop(L, 1);
  task_new_promise(L);
  lua_insert(L, 1);
  task_settle_faulted(L, rt, 1, 0);
  return 1;
}

/* from_canceled(token): complete, canceled with the error of the token, which is canceled */
static int l_from_canceled(lua_State *L) {
  struct runtime *rt = runtime(L);
  object_check(L, 1, TAG_TOKEN);
  struct token *k = token_opt(L, 1);
  if (k == NULL || !token_canceled(k))
    return error_throw(L, ERROR_ARGUMENT,
                       "from_canceled needs a token whose cancellation has been requested");
  lua_settop(L, 1);
  task_new_promise(L);
  token_push_error(L, 1);
  task_settle_canceled(L, rt, 2);
  return 1;
}

enum { COMPLETION_TASK = 1 };

/* [-0, +1, v] the task of the completion source at index 1 */
static struct task *completion(lua_State *L) {
  object_check(L, 1, TAG_COMPLETION);
  lua_getiuservalue(L, 1, COMPLETION_TASK);
  return (struct task *)lua_touserdata(L, -1);
}

static int l_completion_new(lua_State *L) {
  if (lua_gettop(L) > 0 && !lua_isnil(L, 1))
    return luaL_argerror(L, 1, "a TaskCompletionSource takes no arguments");
  object_new(L, TAG_COMPLETION, sizeof(uint32_t), 1);
  task_new_promise(L);
  lua_setiuservalue(L, -2, COMPLETION_TASK);
  return 1;
}

static int l_completion_task(lua_State *L) {
  completion(L);
  return 1;
}

/* false, or raises if `must`, when the source at index 1 has been completed before */
static bool completable(lua_State *L, bool must) {
  struct task *t = completion(L);
  lua_pop(L, 1);
  if (!task_done(t)) return true;
  if (must)
    error_throw(L, ERROR_OPERATION,
                "the completion source has already been completed: "
                "use the try_ form where several may complete it");
  return false;
}

static int set_result(lua_State *L, bool must) {
  struct runtime *rt = runtime(L);
  object_check(L, 1, TAG_COMPLETION);
  int flag = pack(L, lua_gettop(L) - 1);
  bool first = completable(L, must);
  if (first) {
    completion(L)->flags |= (uint16_t)flag;
    lua_replace(L, 1);
    task_settle(L, rt, 1, 1);
  }
  lua_pushboolean(L, first);
  return !must;
}

static int set_exception(lua_State *L, bool must) {
  struct runtime *rt = runtime(L);
  object_check(L, 1, TAG_COMPLETION);
  lua_settop(L, 2); /* nil is a legal error value */
  bool first = completable(L, must);
  if (first) {
    completion(L);
    lua_replace(L, 1);
    task_settle_faulted(L, rt, 1, 0);
  }
  lua_pushboolean(L, first);
  return !must;
}

static int set_canceled(lua_State *L, bool must) {
  struct runtime *rt = runtime(L);
  object_check(L, 1, TAG_COMPLETION);
  lua_settop(L, 2);
  token_opt(L, 2);
  completable(L, must);
  token_push_error(L, 2);
  bool first = completable(L, must);
  if (first) {
    completion(L);
    lua_replace(L, 1);
    task_settle_canceled(L, rt, 1);
  }
  lua_pushboolean(L, first);
  return !must;
}

static int l_set_result(lua_State *L) { return set_result(L, true); }
static int l_try_set_result(lua_State *L) { return set_result(L, false); }
static int l_set_exception(lua_State *L) { return set_exception(L, true); }
static int l_try_set_exception(lua_State *L) { return set_exception(L, false); }
static int l_set_canceled(lua_State *L) { return set_canceled(L, true); }
static int l_try_set_canceled(lua_State *L) { return set_canceled(L, false); }

static const luaL_Reg functions[] = {
    {"from_result", l_from_result},     {"from_exception", l_from_exception},
    {"from_canceled", l_from_canceled}, {"TaskCompletionSource", l_completion_new},
    {"is_awaited", l_is_awaited},       {NULL, NULL}};

static const luaL_Reg methods[] = {{"results", l_results},
                                   {"traceback", l_traceback},
                                   {"__newindex", l_newindex},
                                   {"__tostring", l_tostring},
                                   {NULL, NULL}};
static const luaL_Reg properties[] = {{"status", l_status},
                                      {"is_completed", l_is_completed},
                                      {"is_completed_successfully", l_is_successful},
                                      {"is_faulted", l_is_faulted},
                                      {"is_canceled", l_is_canceled},
                                      {"exception", l_exception},
                                      {"result", l_result},
                                      {"name", l_name},
                                      {"id", l_id},
                                      {NULL, NULL}};

static const luaL_Reg completion_methods[] = {{"set_result", l_set_result},
                                              {"try_set_result", l_try_set_result},
                                              {"set_exception", l_set_exception},
                                              {"try_set_exception", l_try_set_exception},
                                              {"set_canceled", l_set_canceled},
                                              {"try_set_canceled", l_try_set_canceled},
                                              {NULL, NULL}};
static const luaL_Reg completion_properties[] = {{"task", l_completion_task}, {NULL, NULL}};

void task_open(lua_State *L) {
  module_functions(L, functions);
  module_class(L, TAG_TASK, "coflow.Task", methods, properties);
  module_class(L, TAG_COMPLETION, "coflow.TaskCompletionSource", completion_methods,
               completion_properties);
  module_finalized(L, TAG_TASK, TAG_OPERATION, l_operation_gc);
}
