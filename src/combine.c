/*
** combine.c - when_all, when_any and when_each: tasks made of other tasks.
**
** A combinator embeds one wait for every input. It is held by its inputs, and holds them in a list
** (OP_INPUT) copied at the call; keyed inputs keep their keys beside (OP_KEYS). It lands once, as
** soon as enough inputs are complete, and then withdraws from those that are not: a loop of when_any
** over one long-lived task leaves nothing behind. The list of a when_all becomes its result: the value of
** an input takes its place as soon as it is complete, while it is at hand.
**
** await_all and await_any mostly do without a task of their own: direct.c.
**
** Nothing is registered before every input is known to be awaitable. The order of inputs is that of
** the arguments, of the list, or of the table's traversal at the call.
**
** Source: .NET Task.WhenAll, WhenAny and WhenEach; errors stand in input order.
** SPDX-License-Identifier: MIT
*/
#include "combine.h"

/* of when_each, behind the waits: the inputs in order of completion */
static uint32_t *order(struct combine *c) { return (uint32_t *)(void *)&c->waits[c->count]; }

/* ---- inputs ---- */

/* [-0, +0, e] the value at i, known to the caller as key at `key`, becomes its task */
static void check_input(lua_State *L, int i, int key) {
  if (task_awaitable(L, i) != NULL) return;
  luaL_tolstring(L, key, NULL);
  luaL_argerror(L, 1,
                lua_pushfstring(L, "element '%s' is not awaitable (a %s value)",
                                lua_tostring(L, -1), luaL_typename(L, i)));
}

/* [-n, +2, e] task … -> tasks nil; their number */
static lua_Integer collect_arguments(lua_State *L) {
  int n = lua_gettop(L);
  for (int i = 1; i <= n; i++)
    if (task_awaitable(L, i) == NULL) luaL_typeerror(L, i, "Task or awaitable");
  lua_createtable(L, n, 1); /* it may become the result, which has n */
  lua_insert(L, 1);
  for (int i = n; i >= 1; i--) lua_rawseti(L, 1, i);
  lua_pushnil(L);
  return n;
}

/* [-1, +2, e] { task, … } -> tasks nil; false: [-0, +0] there is a hole, which only one that is counted
** may have */
static bool collect_list(lua_State *L, lua_Integer size, bool counted) {
  lua_createtable(L, (int)size, 1); /* list tasks */
  for (lua_Integer i = 1; i <= size; i++) {
    if (lua_rawgeti(L, 1, i) == LUA_TNIL && !counted) {
      lua_settop(L, 1);
      return false;
    }
    if (object_test(L, 3, TAG_TASK) == NULL) {
      lua_pushinteger(L, i);
      check_input(L, 3, 4);
      lua_settop(L, 3);
    }
    lua_rawseti(L, 2, i);
  }
  lua_remove(L, 1);
  lua_pushnil(L);
  return true;
}

/* [-1, +2, e] { key = task, … } -> tasks keys; their number, about `room` */
static lua_Integer collect_keyed(lua_State *L, lua_Integer room) {
  lua_Integer count = 0;
  lua_createtable(L, (int)room, 0);
  lua_newtable(L); /* table tasks keys */
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

/* [-n, +2, e] the arguments become a list of tasks, and a list of keys or nil; their number */
static lua_Integer collect(lua_State *L, bool *list) {
  int n = lua_gettop(L), counted = 0;
  *list = true;
  if (n != 1 || !lua_istable(L, 1) || luaL_getmetafield(L, 1, "__await") != LUA_TNIL) {
    lua_settop(L, n);
    return collect_arguments(L);
  }
  lua_Integer count = 0, size = 0;
  lua_pushliteral(L, "n");
  if (lua_rawget(L, 1) == LUA_TNUMBER) size = lua_tointegerx(L, -1, &counted);
  if (!counted) {
    for (lua_pushnil(L); lua_next(L, 1); lua_pop(L, 1)) count++;
    size = (lua_Integer)lua_rawlen(L, 1);
  }
  luaL_argcheck(L, size >= 0 && size < 100000000, 1, "field 'n' is out of range");
  lua_settop(L, 1);
  *list = (counted || count == size) && collect_list(L, size, counted);
  return *list ? size : collect_keyed(L, count);
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
void combine_push_first(lua_State *L, int i, const struct task *t) {
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
    if (any && (task_done(&c->task) || c->task.flags & TASK_LINKED))
      break; /* a finalizer has completed an input */
    if (any && task_done(t)) {
      c->first = k;
      loop_land(L, rt, 1, &c->task);
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
  combine_push_first(L, on, t);
  lua_rawseti(L, inputs, (lua_Integer)k + 1);
}

void combine_fire(lua_State *L, struct runtime *rt, int i, struct wait *w, int on,
                  const struct task *t) {
  uint32_t k = w->role - WAIT_INPUT;
  struct combine *c = container_of(w - k, struct combine, waits);
  c->left--;
  switch (task_kind(&c->task)) {
    case KIND_ALL:
      if (c->direct) {
        if (c->left == 0) direct_fire(L, rt, i, c);
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
        direct_fire(L, rt, i, c);
      else
        loop_land(L, rt, i, &c->task);
      break;
    default:
      order(c)[c->done++] = k;
      if (task_waiters(&c->task)) wait_notify(L, rt, i, &c->task);
  }
}

/* ---- landing ---- */

/* [-0, +1, -] input k of a combinator whose list is at `inputs`, or whose inputs are on the stack */
static struct task *push_input(lua_State *L, const struct combine *c, int inputs, uint32_t k) {
  if (c->direct)
    lua_pushvalue(L, direct_place(c, k));
  else
    lua_rawgeti(L, inputs, (lua_Integer)k + 1);
  return (struct task *)lua_touserdata(L, -1);
}

/* [-0, +1, m] the Aggregate of the errors of a combinator's inputs; how many, and which comes first */
uint32_t combine_push_aggregate(lua_State *L, const struct combine *c, int inputs,
                                uint32_t *first) {
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
        lua_Integer inner = values_count(L, -1);
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
  values_mark(L, errors, count); /* nil is a legal error value */
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
    c->left = combine_push_aggregate(L, c, inputs, &first);
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

bool combine_cancel(lua_State *L, int i) {
  struct combine *c = (struct combine *)lua_touserdata(L, i);
  token_push_error(L, -1);
  if (task_done(&c->task) || c->task.flags & TASK_LINKED) { /* by a finalizer */
    lua_pop(L, 1);
    return false;
  }
  unwatch(L, i, c);
  for (int uv = OP_INPUT; uv <= OP_KEYS; uv++) {
    lua_pushnil(L);
    lua_setiuservalue(L, i, uv);
  }
  task_forget(L, &c->task);
  task_settle_canceled(L, runtime(L), i);
  return true;
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
  if (task_done(&c->task) || c->taken == c->count)
    return 0; /* closed, or others had them, meanwhile */
  if (c->taken == c->done) {
    struct fiber *me = fiber_here(L, rt);
    return fiber_await(L, rt, me, &c->task, next_k, false);
  }
  uint32_t k = order(c)[c->taken++];
  lua_getiuservalue(L, 1, OP_INPUT);
  lua_rawgeti(L, -1, (lua_Integer)k + 1);
  ((struct task *)lua_touserdata(L, -1))->flags |= TASK_OBSERVED;
  push_key(L, 1, k);
  return 2;
}

static struct combine *check_each(lua_State *L) {
  struct combine *c = (struct combine *)object_test(L, 1, TAG_TASK);
  luaL_argcheck(L, c != NULL && task_is(&c->task, KIND_EACH), 1,
                "the state of a when_each iteration expected: for task, key in "
                "flow.when_each(tasks) do");
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
    trace_remember(L, 1);
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
  return fiber_await(L, rt, me, &c->task, await_all_k, false);
}

int combine_await_all(lua_State *L) {
  l_when_all(L);
  return await_all(L);
}

int combine_await_any(lua_State *L) {
  l_when_any(L);
  return fiber_await_value(L);
}

static const luaL_Reg functions[] = {
    {"when_all", l_when_all}, {"when_any", l_when_any}, {"when_each", l_when_each}, {NULL, NULL}};

static const luaL_Reg each_methods[] = {{"__close", l_each_leave}, {NULL, NULL}};

void combine_open(lua_State *L) {
  module_class(L, TAG_EACH, "coflow.WhenEach", each_methods, NULL);
  module_functions(L, functions);
}
