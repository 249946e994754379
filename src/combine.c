/*
** combine.c - when_all, when_any and when_each: tasks made of other tasks.
**
** A combinator embeds one wait for every input. It is held by its inputs, and holds them in a list
** (OP_INPUT) copied at the call; keyed inputs keep their keys beside (OP_KEYS). It lands once, as
** soon as enough inputs are complete, and then withdraws from those that are not: a loop of when_any
** over one long-lived task leaves nothing behind. The list of a when_all becomes its result: the value of
** an input takes its place as soon as it is complete, while it is at hand.
**
** await_all and await_any of up to MANY inputs do without a task of their own. Their combinator is *direct*:
** it is taken from the spares of the runtime and given back at the end of the wait, it never lands, and the
** stack of the C function that waits is its list:
**
**     [combinator] [nil] [input] [input] …        or, from a table,   … [key] [input] [key] [input] …
**
** The fiber waits for it as for any task (so it is interrupted, closed and reported like any), the inputs hold
** it, it holds the fiber. When enough inputs are complete the fiber becomes ready; when it goes on, for whatever
** reason, it withdraws from the inputs (leave). If it never goes on (somebody has closed its coroutine, or it
** was abandoned) the combinator is garbage as soon as the inputs are. Only leave, which has the inputs on the
** stack, looks at an input from the combinator's side: its waits may outlive those inputs that have died.
**
** Nothing is registered before every input is known to be awaitable. The order of inputs is that of
** the arguments, of the list, or of the table's traversal at the call.
**
** Source: .NET Task.WhenAll, WhenAny and WhenEach; errors stand in input order.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

struct combine {
  struct task task;
  uint32_t count, left; /* inputs; not yet complete (of a failed when_all, finally: its errors) */
  uint32_t first;       /* of when_any: the index of the winner */
  uint32_t done, taken; /* of when_each: how far the order of completion is known, and handed out */
  bool list;            /* the result carries n */
  bool failed, canceled; /* of when_all: an input was */
  bool direct, large;    /* of await_all and await_any; its size */
  bool fired, pairs;     /* of these: enough inputs are complete; a key lies below each input */
  bool later;            /* somebody else awaits one of the inputs */
  uint8_t mark;          /* that its inputs bear: task.mark */
  uint32_t kept, mine;   /* how many tasks keep it, and how many of these it waits for now */
  struct wait waits[];
};
#define WAIT_FAILED (UINT32_MAX - 1) /* pos, of an input that is complete but did not succeed */

enum { FEW = 8, MANY = 128, MAX_SPARES = 64 };

/* of when_each, behind the waits: the inputs in order of completion */
static uint32_t *order(struct combine *c) { return (uint32_t *)(void *)&c->waits[c->count]; }

/* where the stack of an await_all or await_any holds input k */
static int place(const struct combine *c, uint32_t k) {
  return (int)(c->pairs ? 4 + 2 * k : 3 + k);
}

/* ---- inputs ---- */

/* [-0, +0, e] the value at i, known to the caller as key at `key`, becomes its task */
static void check_input(lua_State *L, int i, int key) {
  if (task_awaitable(L, i) != NULL) return;
  luaL_tolstring(L, key, NULL);
  luaL_argerror(L, 1,
                lua_pushfstring(L, "element '%s' is not awaitable (a %s value)",
                                lua_tostring(L, -1), luaL_typename(L, i)));
}

/* [-n, +2, e] the arguments become a list of tasks, and a list of keys or nil; their number */
static lua_Integer collect(lua_State *L, bool *list) {
  int n = lua_gettop(L);
  *list = true;
  if (n != 1 || !lua_istable(L, 1) || luaL_getmetafield(L, 1, "__await") != LUA_TNIL) {
    lua_settop(L, n);
    for (int i = 1; i <= n; i++)
      if (task_awaitable(L, i) == NULL) luaL_typeerror(L, i, "Task or awaitable");
    lua_createtable(L, n, 1); /* it may become the result, which has n */
    lua_insert(L, 1);
    for (int i = n; i >= 1; i--) lua_rawseti(L, 1, i);
    lua_pushnil(L);
    return n;
  }
  lua_Integer count = 0, size = 0;
  lua_pushliteral(L, "n");
  bool counted = lua_rawget(L, 1) == LUA_TNUMBER && lua_isinteger(L, -1);
  if (counted)
    size = lua_tointeger(L, -1);
  else {
    for (lua_pushnil(L); lua_next(L, 1); lua_pop(L, 1)) count++;
    size = (lua_Integer)lua_rawlen(L, 1);
    *list = count == size;
  }
  luaL_argcheck(L, size >= 0 && size < 100000000, 1, "field 'n' is out of range");
  lua_settop(L, 1);
  lua_createtable(L, (int)(*list ? size : count), *list); /* table tasks */
  if (*list) {
    for (lua_Integer i = 1; i <= size; i++) {
      if (lua_rawgeti(L, 1, i) == LUA_TNIL && !counted) { /* as many other keys as holes: no list */
        *list = false;
        lua_settop(L, 2);
        break;
      }
      if (object_test(L, 3, TAG_TASK) == NULL) {
        lua_pushinteger(L, i);
        check_input(L, 3, 4);
        lua_settop(L, 3);
      }
      lua_rawseti(L, 2, i);
    }
  }
  if (*list) {
    lua_pushnil(L);
    lua_remove(L, 1);
    return size;
  }
  lua_newtable(L); /* table tasks keys */
  count = 0;
  for (lua_pushnil(L); lua_next(L, 1);) {
    count++;
    lua_pushvalue(L, 4);
    lua_rawseti(L, 3, count);
    check_input(L, 5, 4);
    lua_rawseti(L, 2, count);
    lua_settop(L, 4);
  }
  lua_remove(L, 1);
  return count;
}

/* [-n, +1, e] a combinator of the arguments, its inputs not yet waited for */
static struct combine *combine_new(lua_State *L, int kind) {
  bool list;
  lua_Integer n = collect(L, &list); /* tasks keys */
  size_t each = sizeof(struct wait) + (kind == KIND_EACH ? sizeof(uint32_t) : 0);
  size_t size = sizeof(struct combine) + (size_t)n * each;
  struct combine *c = (struct combine *)task_new(L, kind, size, OP_KEYS, true);
  c->count = (uint32_t)n;
  c->list = list;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 3, OP_INPUT);
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, 3, OP_KEYS);
  lua_replace(L, 1);
  lua_settop(L, 1);
  return c;
}

/* [-0, +1, m] the key of input k of the combinator at i */
static void push_key(lua_State *L, int i, uint32_t k) {
  if (lua_getiuservalue(L, i, OP_KEYS) == LUA_TTABLE) {
    lua_rawgeti(L, -1, (lua_Integer)k + 1);
    lua_remove(L, -2);
  } else {
    lua_pop(L, 1);
    lua_pushinteger(L, (lua_Integer)k + 1);
  }
}

/* [-0, +1, -] the first value of the task t at i, which has succeeded */
static void push_first(lua_State *L, int i, const struct task *t) {
  lua_getiuservalue(L, i, TASK_RESULT);
  if (t->flags & TASK_MANY && lua_istable(L, -1)) {
    lua_rawgeti(L, -1, 1);
    lua_remove(L, -2);
  }
}

static void keep_outcome(lua_State *L, struct combine *c, int inputs, uint32_t k, int on,
                         const struct task *t);

/* [-0, +0, m] waits for the inputs, and lands if enough are complete; the combinator is at index 1 */
static void watch_inputs(lua_State *L, struct combine *c) {
  struct runtime *rt = runtime(L);
  lua_getiuservalue(L, 1, OP_INPUT);
  int inputs = lua_gettop(L);
  bool any = task_is(&c->task, KIND_ANY), each = task_is(&c->task, KIND_EACH);
  task_release(L, &c->task); /* a slot to land from */
  c->left = 1;               /* it must not land before the last one is looked at */
  for (uint32_t k = 0; k < c->count; k++) {
    lua_rawgeti(L, inputs, (lua_Integer)k + 1);
    struct task *t = (struct task *)lua_touserdata(L, -1);
    if (t->waiters == NULL && !task_done(t) && !fiber_is_lost(t)) {
      lua_pushvalue(L, 1);
      wait_first(L, inputs + 1, t, &c->waits[k], WAIT_INPUT + k);
      c->left++;
    } else if (wait_add(L, inputs + 1, &c->waits[k], 1, WAIT_INPUT + k))
      c->left++;
    else if (each)
      order(c)[c->done++] = k;
    else if (!any)
      keep_outcome(L, c, inputs, k, inputs + 1, t);
    lua_pop(L, 1);
    if (any && task_done(&c->task)) break; /* a finalizer completed an input */
    if (any && task_done(t)) {
      c->first = k;
      combine_land(L, 1);
      break;
    }
  }
  c->left--;
  if (c->left == 0 && task_is(&c->task, KIND_ALL)) loop_land(L, rt, 1, &c->task);
  lua_settop(L, inputs - 1);
  if (rt->landing) loop_land_all(L, rt);
}

/* [-0, +0, -] withdraws from the inputs that are not complete */
static void unwatch(lua_State *L, int i, struct combine *c) {
  lua_getiuservalue(L, i, OP_INPUT);
  int inputs = lua_gettop(L);
  for (uint32_t k = 0; k < c->count; k++)
    if (c->waits[k].on != NULL) {
      lua_rawgeti(L, inputs, (lua_Integer)k + 1);
      wait_remove(L, inputs + 1, &c->waits[k]);
      lua_settop(L, inputs);
    }
  lua_settop(L, inputs - 1);
}

/* [-0, +0, -] input k of a when_all, at `on`, is complete: in the list at `inputs` its first value takes its
** place, so that nothing has to be looked at again when the last one is complete; a failure stays */
static void keep_outcome(lua_State *L, struct combine *c, int inputs, uint32_t k, int on,
                         const struct task *t) {
  if (t->state != TASK_SUCCEEDED) {
    c->failed = c->failed || t->state == TASK_FAULTED;
    c->canceled = true;
    c->waits[k].pos = WAIT_FAILED;
    return;
  }
  push_first(L, on, t);
  lua_rawseti(L, inputs, (lua_Integer)k + 1);
}

/* [-0, +0, -] enough inputs of the await_any or await_all at i are complete: its fiber goes on */
static void fire(lua_State *L, struct runtime *rt, int i, struct combine *c) {
  struct wait *w = c->task.waiters;
  c->fired = true;
  if (w == NULL) return; /* it has not parked yet, or was interrupted */
  if (w->next != w) {    /* found by debug, and awaited by others */
    wait_notify(L, rt, i, &c->task);
    return;
  }
  c->task.waiters = NULL;
  w->on = NULL;
  lua_getiuservalue(L, i, TASK_WAITERS);
  lua_pushnil(L);
  lua_setiuservalue(L, i, TASK_WAITERS);
  fiber_wake(L, rt, container_of(w, struct fiber, u.wait));
}

void combine_fire(lua_State *L, struct runtime *rt, int i, struct wait *w, int on,
                  const struct task *t) {
  uint32_t k = w->role - WAIT_INPUT;
  struct combine *c = container_of(w - k, struct combine, waits);
  c->left--;
  switch (task_kind(&c->task)) {
    case KIND_ALL:
      if (c->direct) {
        if (c->left == 0) fire(L, rt, i, c);
        break;
      }
      lua_getiuservalue(L, i, OP_INPUT);
      keep_outcome(L, c, i + 1, k, on, t);
      if (c->left == 0) loop_land(L, rt, i, &c->task);
      break;
    case KIND_ANY:
      if (c->fired || c->task.flags & TASK_LINKED || task_done(&c->task)) break;
      c->first = k;
      if (c->direct)
        fire(L, rt, i, c);
      else
        loop_land(L, rt, i, &c->task);
      break;
    default:
      order(c)[c->done++] = k;
      if (task_waiters(&c->task)) wait_notify(L, rt, i, &c->task);
  }
}

/* ---- landing ---- */

/* the number of errors in the list on top */
static lua_Integer inner_count(lua_State *L) {
  lua_Integer n = (lua_Integer)lua_rawlen(L, -1);
  if (lua_getfield(L, -1, "n") != LUA_TNIL) n = lua_tointeger(L, -1);
  lua_pop(L, 1);
  return n;
}

static bool has_nil(lua_State *L, int i, lua_Integer n) {
  bool found = false;
  for (lua_Integer k = 1; k <= n && !found; k++) {
    found = lua_rawgeti(L, i, k) == LUA_TNIL;
    lua_pop(L, 1);
  }
  return found;
}

/* [-0, +1, -] input k of a combinator whose list is at `inputs`, or whose inputs are on the stack */
static struct task *push_input(lua_State *L, const struct combine *c, int inputs, uint32_t k) {
  if (c->direct)
    lua_pushvalue(L, place(c, k));
  else
    lua_rawgeti(L, inputs, (lua_Integer)k + 1);
  return (struct task *)lua_touserdata(L, -1);
}

/* [-0, +1, m] the Aggregate of the errors of a combinator's inputs; how many, and which comes first */
static uint32_t push_aggregate(lua_State *L, const struct combine *c, int inputs, uint32_t *first) {
  lua_Integer count = 0;
  lua_newtable(L);
  int errors = lua_gettop(L);
  for (uint32_t k = 0; k < c->count; k++) {
    if (!c->direct && c->waits[k].pos != WAIT_FAILED) continue; /* its place holds a value */
    struct task *t = push_input(L, c, inputs, k);
    if (t->state == TASK_FAULTED) {
      if (count == 0) *first = k;
      t->flags |= TASK_OBSERVED;
      lua_getiuservalue(L, -1, TASK_RESULT);
      if (t->flags & TASK_AGGREGATE) { /* of a when_all: its errors are laid beside the others */
        lua_getfield(L, -1, "inner_exceptions");
        lua_Integer inner = inner_count(L);
        for (lua_Integer e = 1; e <= inner; e++) {
          lua_rawgeti(L, -1, e);
          lua_rawseti(L, errors, ++count);
        }
      } else {
        lua_pushvalue(L, -1);
        lua_rawseti(L, errors, ++count);
      }
    }
    lua_settop(L, errors);
  }
  if ((lua_Integer)lua_rawlen(L, errors) != count || has_nil(L, errors, count)) {
    lua_pushinteger(L, count); /* nil is a legal error value: only n tells how many */
    lua_setfield(L, errors, "n");
  }
  error_push(L, ERROR_AGGREGATE, count == 1 ? "a task failed" : "%d tasks failed", (int)count);
  lua_insert(L, errors);
  lua_setfield(L, errors, "inner_exceptions");
  return (uint32_t)count;
}

static void land_all(lua_State *L, int i, struct combine *c) {
  struct runtime *rt = runtime(L);
  lua_getiuservalue(L, i, OP_INPUT);
  int inputs = lua_gettop(L);
  if (c->failed) {
    uint32_t first = 0;
    c->left = push_aggregate(L, c, inputs, &first);
    c->task.flags |= TASK_AGGREGATE;
    lua_rawgeti(L, inputs, (lua_Integer)first + 1);
    lua_insert(L, -2);
    task_settle_faulted(L, rt, i, lua_gettop(L) - 1);
  } else if (c->canceled) {
    uint32_t first = 0;
    while (c->waits[first].pos != WAIT_FAILED) first++;
    lua_rawgeti(L, inputs, (lua_Integer)first + 1);
    task_settle_like(L, rt, i, lua_gettop(L));
  } else if (c->list) { /* the list has become the result */
    lua_pushinteger(L, c->count);
    lua_setfield(L, inputs, "n");
    task_settle(L, rt, i, 1);
    return;
  } else {
    lua_createtable(L, 0, (int)c->count);
    lua_getiuservalue(L, i, OP_KEYS);
    for (uint32_t k = 1; k <= c->count; k++) { /* inputs result keys */
      lua_rawgeti(L, inputs + 2, k);
      lua_rawgeti(L, inputs, k);
      lua_rawset(L, inputs + 1);
    }
    lua_settop(L, inputs + 1);
    task_settle(L, rt, i, 1);
  }
  lua_settop(L, inputs - 1);
}

static void land_any(lua_State *L, int i, struct combine *c) {
  struct runtime *rt = runtime(L);
  unwatch(L, i, c);
  lua_getiuservalue(L, i, OP_INPUT);
  push_key(L, i, c->first);
  lua_setiuservalue(L, i, OP_KEYS); /* where the second value of a when_any is */
  lua_rawgeti(L, -1, (lua_Integer)c->first + 1);
  lua_remove(L, -2);
  c->task.flags |= TASK_MANY;
  task_settle(L, rt, i, 1);
}

void combine_land(lua_State *L, int i) {
  struct combine *c = (struct combine *)lua_touserdata(L, i);
  if (task_is(&c->task, KIND_ALL)) {
    land_all(L, i, c);
    lua_pushnil(L);
    lua_setiuservalue(L, i, OP_KEYS);
  } else
    land_any(L, i, c);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_INPUT);
  task_forget(L, &c->task);
}

void combine_cancel(lua_State *L, int i) {
  struct combine *c = (struct combine *)lua_touserdata(L, i);
  token_push_error(L, -1);
  lua_remove(L, -2);
  if (task_done(&c->task)) { /* by a finalizer */
    lua_pop(L, 1);
    return;
  }
  unwatch(L, i, c);
  for (int uv = OP_INPUT; uv <= OP_KEYS; uv++) {
    lua_pushnil(L);
    lua_setiuservalue(L, i, uv);
  }
  task_forget(L, &c->task);
  task_settle_canceled(L, runtime(L), i);
}

/* ---- Lua face ---- */

static int l_when_all(lua_State *L) {
  struct combine *c = combine_new(L, KIND_ALL);
  watch_inputs(L, c);
  return 1;
}

static int l_when_any(lua_State *L) {
  struct combine *c = combine_new(L, KIND_ANY);
  if (c->count == 0) return error_throw(L, ERROR_ARGUMENT, "when_any needs at least one task");
  watch_inputs(L, c);
  return 1;
}

/* the next one to hand out of the when_each at index 1 */
static int next_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  struct combine *c = (struct combine *)lua_touserdata(L, 1);
  if (status != LUA_OK && !fiber_on_top(L, rt))
    return lua_yieldk(L, 0, ctx, next_k); /* not resumed by us */
  lua_settop(L, 1);
  fiber_resumed(L, rt);
  if (task_done(&c->task)) return 0; /* closed meanwhile */
  if (c->taken == c->done) {
    struct fiber *me = fiber_here(L, rt);
    return fiber_await(L, rt, me, &c->task, next_k);
  }
  uint32_t k = order(c)[c->taken++];
  lua_getiuservalue(L, 1, OP_INPUT);
  lua_rawgeti(L, -1, (lua_Integer)k + 1);
  ((struct task *)lua_touserdata(L, -1))->flags |= TASK_OBSERVED;
  push_key(L, 1, k);
  return 2;
}

static struct combine *check_each(lua_State *L) {
  struct combine *c = (struct combine *)task_check(L, 1);
  luaL_argcheck(L, task_is(&c->task, KIND_EACH), 1, "the state of a when_each iteration expected");
  return c;
}

static int l_each_next(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct combine *c = check_each(L);
  lua_settop(L, 1);
  if (c->taken == c->count || task_done(&c->task)) return 0;
  if (c->taken == c->done && fiber_here(L, rt) == NULL) return fiber_outside(L, l_each_next);
  return next_k(L, LUA_OK, 0);
}

static int l_each_close(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct combine *c = check_each(L);
  if (task_done(&c->task)) return 0;
  unwatch(L, 1, c);
  task_forget(L, &c->task);
  lua_settop(L, 1);
  task_settle(L, rt, 1, 0);
  return 0;
}

/* the `<close>` value of a loop */
static int l_each_leave(lua_State *L) {
  object_check(L, 1, TAG_EACH);
  lua_getiuservalue(L, 1, 1);
  lua_replace(L, 1);
  lua_settop(L, 1);
  return l_each_close(L);
}

/* when_each(tasks) -> iterator, its state, nil, what closes it */
static int l_when_each(lua_State *L) {
  luaL_checkany(L, 1);
  struct combine *c = combine_new(L, KIND_EACH);
  object_new(L, TAG_EACH, sizeof(uint32_t), 1); /* state close */
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, 2, 1);
  watch_inputs(L, c);
  module_push_function(L, l_each_next);
  lua_insert(L, 1);
  lua_pushnil(L);
  lua_insert(L, 3);
  return 4;
}

/* the values of the when_all at index 1, one by one; the one error as it is, else the Aggregate */
static int await_all_k(lua_State *L, int status, lua_KContext ctx) {
  struct combine *c = (struct combine *)lua_touserdata(L, 1);
  if (!fiber_awaited(L, &c->task, status)) return lua_yieldk(L, 0, ctx, await_all_k);
  lua_settop(L, 1);
  if (c->task.state != TASK_SUCCEEDED && !(c->task.flags & TASK_AGGREGATE && c->left > 1))
    return task_push_outcome(L, 1, &c->task);
  lua_getiuservalue(L, 1, TASK_RESULT);
  if (c->task.state == TASK_FAULTED) {
    error_remember(L, 1);
    c->task.flags |= TASK_OBSERVED;
    return lua_error(L);
  }
  if (!c->list) return 1;
  luaL_checkstack(L, (int)c->count, "too many tasks");
  for (uint32_t k = 1; k <= c->count; k++) lua_rawgeti(L, 2, k);
  return (int)c->count;
}

static int await_all(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct combine *c = (struct combine *)lua_touserdata(L, 1);
  if (task_done(&c->task)) return await_all_k(L, LUA_OK, 0);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) return fiber_outside(L, await_all);
  return fiber_await(L, rt, me, &c->task, await_all_k);
}

static int combined_await_all(lua_State *L) {
  l_when_all(L);
  return await_all(L);
}

static int combined_await_any(lua_State *L) {
  l_when_any(L);
  return fiber_await_value(L);
}

/* ---- await_all and await_any in direct style ---- */

/* [-0, +1, m] a combinator for up to n inputs, which nobody else sees */
static struct combine *take(lua_State *L, struct runtime *rt, int kind, uint32_t n) {
  bool large = n > FEW;
  struct combine *c = (struct combine *)rt->spares[large];
  if (c != NULL) {
    rt->spares[large] = c->task.next;
    rt->spare_count[large]--;
    c->task.next = NULL;
    lua_rawgeti(L, UP_ANCHORS, c->task.slot);
  } else {
    size_t size = sizeof *c + (large ? MANY : FEW) * sizeof(struct wait);
    c = (struct combine *)task_new(L, kind, size, 2, true);
    c->direct = true;
    c->large = large;
    c->mark = (uint8_t)(1 + rt->marks++ % 127);
  }
  task_release(L, &c->task); /* a waiter that is collected takes it along */
  c->task.tag = TAG_TASK | (uint32_t)kind;
  c->count = c->mine = 0;
  c->left = 1; /* until all are looked at */
  c->fired = c->later = false;
  return c;
}

/* ---- habit: inputs that many awaits have in common ----
**
** A loop of await_any over a hundred long-lived tasks would store a hundred references and remove them
** again, each time round. So a task that meets the same combinator for the second time *keeps* it: its
** TASK_WAITERS goes on to hold the combinator when nobody waits, and t->waiters points to the node that it
** had there, which tells the combinator. Such a node is none of the list: its `on` is not this task.
**
** A combinator holds its fiber only during a wait. What a task keeps must not be used for a wait that the task
** is not in: it would keep a stranger alive. `kept` counts the tasks that keep it, dead ones included; a wait
** among whose inputs they are not all gives the combinator up.
**
** Invariant: of a task that keeps a combinator, the list is empty or the combinator's one node: whoever joins
** the list first calls combine_forget. */

static struct combine *combine_of(struct wait *w) {
  return container_of(w - (w->role - WAIT_INPUT), struct combine, waits);
}

/* the task t keeps nothing; the caller sees to what TASK_WAITERS holds */
static void unkeep(struct task *t) {
  struct wait *w = t->waiters;
  struct combine *c = combine_of(w);
  c->kept--;
  if (w->on == t)
    c->mine--;
  else
    t->waiters = NULL;
  t->keeps = t->mark = 0;
}

void combine_forget(lua_State *L, int i) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  unkeep(t);
  if (t->waiters != NULL) return;
  lua_pushnil(L);
  lua_setiuservalue(L, i, TASK_WAITERS);
}

/* [-0, +0, -] the wait of the function that has c at index 1 is over, however it ended */
static void leave(lua_State *L, struct runtime *rt, struct combine *c) {
  bool spare = c->kept == c->mine && c->task.waiters == NULL &&
               rt->spare_count[c->large] < (c->large ? MAX_SPARES / 8 : MAX_SPARES);
  for (uint32_t k = 0; k < c->count; k++) {
    struct wait *w = &c->waits[k];
    struct task *t = w->on;
    if (t == NULL) continue;
    if (w->next == w && w->pos == 0) { /* mostly: nobody else waits for it */
      w->on = NULL;
      if (t->keeps) {
        if (!spare) combine_forget(L, place(c, k));
        continue;
      }
      t->waiters = NULL;
      lua_pushnil(L);
      lua_setiuservalue(L, place(c, k), TASK_WAITERS);
    } else
      wait_remove(L, place(c, k), w);
  }
  if (!spare) {
    task_forget(L, &c->task);
    return;
  }
  task_hold(L, 1, &c->task);
  c->task.next = rt->spares[c->large];
  rt->spares[c->large] = &c->task;
  rt->spare_count[c->large]++;
}

/* of the inputs from k on, which is complete, the first complete one in input order: a list may lie here
** in another order */
static uint32_t first_done(lua_State *L, const struct combine *c, uint32_t k) {
  if (!c->pairs || !c->list) return k;
  for (uint32_t j = 0; j < c->count; j++)
    if (!lua_isinteger(L, place(c, j) - 1)) return k; /* no list, after all */
  for (uint32_t j = k + 1; j < c->count; j++)
    if (task_done((struct task *)lua_touserdata(L, place(c, j))) &&
        lua_tointeger(L, place(c, j) - 1) < lua_tointeger(L, place(c, k) - 1))
      k = j;
  return k;
}

/* [-0, +0, -] input k is on top, at its place: waits for it if that can be done at once. Nothing runs
** and nothing is created, so a table may be traversed meanwhile. False: it is no task. */
static bool watch_plain(lua_State *L, struct combine *c, uint32_t k, int i) {
  struct task *t = (struct task *)object_test(L, -1, TAG_TASK);
  if (t == NULL) return false;
  if (fiber_is_lost(t)) {
    c->later = true;
    return true;
  }
  if (task_done(t)) {
    if (!c->fired && task_is(&c->task, KIND_ANY)) {
      c->first = k;
      c->fired = true;
    }
    return true;
  }
  if (c->fired) return true;
  struct wait *w = &c->waits[k];
  if (t->waiters == NULL) {
    lua_pushvalue(L, 1);
    wait_first(L, i, t, w, WAIT_INPUT + k);
    if (c->large && t->mark == c->mark) {
      t->keeps = 1;
      c->kept++;
      c->mine++;
    } else if (c->large)
      t->mark = c->mark & 0x7f;
  } else if (t->waiters->on != t && combine_of(t->waiters) == c) { /* it is held by t already */
    w->next = w->prev = t->waiters = w;
    w->on = t;
    w->pos = 0;
    w->role = WAIT_INPUT + k;
    c->mine++;
  } else {
    c->later = true;
    return true;
  }
  c->left++;
  return true;
}

/* [-0, +0, m] waits for those inputs that others await already, too */
static void watch_shared(lua_State *L, struct combine *c) {
  for (uint32_t k = 0; k < c->count && !c->fired; k++) {
    int i = place(c, k);
    if (c->waits[k].on != NULL || task_done((struct task *)lua_touserdata(L, i))) continue;
    if (wait_add(L, i, &c->waits[k], 1, WAIT_INPUT + k))
      c->left++;
    else if (task_is(&c->task, KIND_ANY) && !c->fired) {
      c->first = k;
      c->fired = true;
    }
  }
}

/* whether the inputs lie in the order of a list */
static bool is_ordered(lua_State *L, const struct combine *c) {
  for (uint32_t k = 0; k < c->count; k++)
    if (!lua_isinteger(L, place(c, k) - 1) ||
        lua_tointeger(L, place(c, k) - 1) != (lua_Integer)k + 1)
      return false;
  return true;
}

/* [-0, +n, m] lays out the inputs in the table at 2. False: it takes a closer look to tell what they are. */
static bool watch_table(lua_State *L, struct combine *c, lua_Integer size) {
  uint32_t room = c->large ? MANY : FEW;
  bool counted = false; /* by a field n, as lists are */
  lua_Integer count = 0;
  luaL_checkstack(L, 2 * (int)size + LUA_MINSTACK, NULL);
  for (lua_pushnil(L); lua_next(L, 2);) {
    if (c->count == room || (c->count >= size && !lua_checkstack(L, LUA_MINSTACK))) return false;
    if (watch_plain(L, c, c->count, place(c, c->count))) {
      c->count++;
      lua_pushvalue(L, -2);
    } else if (lua_isinteger(L, -1) && lua_type(L, -2) == LUA_TSTRING &&
               strcmp(lua_tostring(L, -2), "n") == 0) {
      count = lua_tointeger(L, -1);
      counted = true;
      lua_pop(L, 1);
    } else
      return false;
  }
  c->list = c->count == size;
  if (c->count == 0 || (counted && (!c->list || count != size))) return false;
  return !c->list || (!counted && task_is(&c->task, KIND_ANY)) || is_ordered(L, c);
}

/* the arguments are again what they were: a table, or the inputs */
static void give_back(lua_State *L) {
  lua_remove(L, 1);
  if (lua_isnil(L, 1))
    lua_remove(L, 1);
  else
    lua_settop(L, 1);
}

static int await_several(lua_State *L, int kind, lua_KFunction k, lua_CFunction combined) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  struct combine *c;
  int n = lua_gettop(L);
  if (me->co != L || !lua_isyieldable(L)) return combined(L);
  if (n == 1 && lua_istable(L, 1) && luaL_getmetafield(L, 1, "__await") == LUA_TNIL) {
    lua_Integer size = (lua_Integer)lua_rawlen(L, 1);
    if (size > MANY) return combined(L);
    c = take(L, rt, kind, (uint32_t)size);
    lua_insert(L, 1); /* combinator table */
    c->pairs = true;
    if (!watch_table(L, c, size)) {
      leave(L, rt, c);
      give_back(L);
      return combined(L);
    }
  } else {
    lua_settop(L, n);
    if (n == 0 || n > MANY) return combined(L);
    for (int i = 1; i <= n; i++)
      if (task_awaitable(L, i) == NULL) luaL_typeerror(L, i, "Task or awaitable");
    c = take(L, rt, kind, (uint32_t)n);
    lua_pushnil(L);
    lua_rotate(L, 1, 2); /* combinator nil inputs */
    c->pairs = false;
    c->list = true;
    for (; c->count < (uint32_t)n; c->count++) {
      lua_pushvalue(L, place(c, c->count));
      watch_plain(L, c, c->count, place(c, c->count));
      lua_pop(L, 1);
    }
  }
  if (c->fired)
    c->first = first_done(L, c, c->first);
  else if (c->later)
    watch_shared(L, c);
  if (--c->left == 0) c->fired = true;
  if (c->fired) return k(L, LUA_OK, 0);
  if (c->kept != c->mine) { /* a task keeps it that is not among the inputs */
    leave(L, rt, c);
    give_back(L);
    return combined(L);
  }
  lua_pushnil(L);
  lua_replace(L, 2); /* what else the table holds is none of ours */
  struct scope *s = me->member.scope;
  if (s->canceled && !(me->task.flags & TASK_DEAF)) {
    leave(L, rt, c);
    return scope_throw(L, s);
  }
  bool held = fiber_push_me(L, rt, me);
  wait_first(L, 1, &c->task, &me->u.wait, WAIT_FIBER);
  me->task.state = TASK_WAITING;
  fiber_park(L, me, s->armed, held);
  return fiber_suspend(L, rt, me, 0, k);
}

/* false: somebody else has resumed the coroutine; raises when its scope has. In either case nothing is known
** but the stack: an interruption has withdrawn the fiber from c, and leaves the inputs to us. */
static bool is_over(lua_State *L, struct combine *c, int status) {
  struct runtime *rt = runtime(L);
  if (status != LUA_OK && !fiber_on_top(L, rt)) return false;
  if (rt->me->flags & TASK_INTERRUPTED) {
    leave(L, rt, c);
    fiber_resumed(L, rt);
  }
  if (c->fired) leave(L, rt, c);
  return c->fired;
}

static int any_k(lua_State *L, int status, lua_KContext ctx) {
  struct combine *c = (struct combine *)lua_touserdata(L, 1);
  if (!is_over(L, c, status)) return lua_yieldk(L, 0, ctx, any_k);
  int i = place(c, c->first); /* it is free for others, but nobody runs yet */
  lua_pushvalue(L, i);
  if (c->pairs)
    lua_pushvalue(L, i - 1);
  else
    lua_pushinteger(L, (lua_Integer)c->first + 1);
  return 2;
}

static int all_k(lua_State *L, int status, lua_KContext ctx) {
  struct combine *c = (struct combine *)lua_touserdata(L, 1);
  if (!is_over(L, c, status)) return lua_yieldk(L, 0, ctx, all_k);
  struct combine was = *c; /* what follows may run finalizers, which may use it */
  c = &was;
  uint32_t n = c->count, canceled = n;
  int top = place(c, n - 1);
  bool failed = false;
  lua_settop(L, top);
  luaL_checkstack(L, (int)n, "too many tasks");
  for (uint32_t j = 0; j < n; j++) {
    const struct task *t = (const struct task *)lua_touserdata(L, place(c, j));
    failed = failed || t->state == TASK_FAULTED;
    if (canceled == n && t->state == TASK_CANCELED) canceled = j;
  }
  if (failed) {
    uint32_t first = 0;
    bool one = push_aggregate(L, c, 0, &first) == 1;
    if (one)
      return task_push_outcome(L, place(c, first),
                               (struct task *)lua_touserdata(L, place(c, first)));
    error_remember(L, place(c, first));
    return lua_error(L);
  }
  if (canceled < n)
    return task_push_outcome(L, place(c, canceled),
                             (struct task *)lua_touserdata(L, place(c, canceled)));
  if (!c->list) lua_createtable(L, 0, (int)n);
  for (uint32_t j = 0; j < n; j++) {
    int i = place(c, j);
    if (!c->list) lua_pushvalue(L, i - 1);
    push_first(L, i, (const struct task *)lua_touserdata(L, i));
    if (!c->list) lua_rawset(L, top + 1);
  }
  return c->list ? (int)n : 1;
}

static int l_await_all(lua_State *L) {
  return await_several(L, KIND_ALL, all_k, combined_await_all);
}

static int l_await_any(lua_State *L) {
  return await_several(L, KIND_ANY, any_k, combined_await_any);
}

static const luaL_Reg functions[] = {{"when_all", l_when_all},   {"await_all", l_await_all},
                                     {"await_any", l_await_any}, {"when_any", l_when_any},
                                     {"when_each", l_when_each}, {NULL, NULL}};

static const luaL_Reg each_methods[] = {{"__close", l_each_leave}, {NULL, NULL}};

void combine_open(lua_State *L) {
  module_class(L, TAG_EACH, "coflow.WhenEach", each_methods, NULL);
  module_functions(L, functions);
}
