/*
** direct.c - await_all and await_any of up to MANY inputs, which do without a task of their own.
**
** Their combinator (combine.h) is taken from the spares of the runtime and given back at the end of the
** wait, it never lands, and the stack of the C function that waits is its list:
**
**     [combinator] [nil] [input] [input] …        or, from a table,   … [key] [input] [key] [input] …
**
** The fiber waits for it as for any task (so it is interrupted, closed and reported like any), the
** inputs hold it, it holds the fiber. When enough inputs are complete the fiber becomes ready; when it
** goes on, for whatever reason, it withdraws from the inputs (leave). If it never goes on (somebody has
** closed its coroutine, or it was abandoned) the combinator is garbage as soon as the inputs are. Only
** leave, which has the inputs on the stack, looks at an input from the combinator's side: its waits may
** outlive those inputs that have died.
**
** Anything out of the way (more inputs, awaitables that are no tasks, a list with holes) is left to
** combine.c. SPDX-License-Identifier: MIT
*/
#include "combine.h"

#include <string.h>

enum { FEW = 8, MANY = 128, MAX_SPARES = 64 };

/* ---- the combinator ---- */

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

bool direct_push_inputs(lua_State *L, struct fiber *f) {
  const struct task *t = f->u.wait.on;
  const struct combine *c = (const struct combine *)(const void *)t;
  if (t == NULL || !(task_is(t, KIND_ALL) || task_is(t, KIND_ANY)) || !c->direct) return false;
  lua_createtable(L, (int)c->count, 0);
  if (f->u.wait.on != t) return true; /* by a finalizer: it waits no more */
  for (uint32_t k = 0; k < c->count; k++) {
    fiber_push_awaiting(L, f, direct_place(c, k));
    lua_rawseti(L, -2, (lua_Integer)k + 1);
  }
  return true;
}

/* ---- habit: inputs that many awaits have in common ----
**
** A loop of await_any over a hundred long-lived tasks would store a hundred references and remove them
** again, each time round. So a task that meets the same combinator for the second time *keeps* it: its
** TASK_WAITERS goes on to hold the combinator when nobody waits, and t->waiters points to the node that it
** had there, which tells the combinator. Such a node is none of the list: its `on` is not this task.
**
** A combinator holds its fiber only during a wait. What a task keeps must not be used for a wait that
** the task is not in: it would keep a stranger alive. `kept` counts the tasks that keep it, dead ones
** included; a wait among whose inputs they are not all gives the combinator up.
**
** Invariant: of a task that keeps a combinator, the list is empty or the combinator's one node: whoever joins
** the list first calls direct_forget. */

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

void direct_forget(lua_State *L, int i) {
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
        if (!spare) direct_forget(L, direct_place(c, k));
        continue;
      }
      t->waiters = NULL;
      lua_pushnil(L);
      lua_setiuservalue(L, direct_place(c, k), TASK_WAITERS);
    } else
      wait_remove(L, direct_place(c, k), w);
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

/* [-0, +0, -] enough inputs of the await_any or await_all at i are complete: its fiber goes on */
void direct_fire(lua_State *L, struct runtime *rt, int i, struct combine *c) {
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

/* of the inputs from k on, which is complete, the first complete one in input order: a list may lie here
** in another order */
static uint32_t first_done(lua_State *L, const struct combine *c, uint32_t k) {
  if (!c->pairs || !c->list) return k;
  for (uint32_t j = 0; j < c->count; j++)
    if (!lua_isinteger(L, direct_place(c, j) - 1)) return k; /* no list, after all */
  for (uint32_t j = k + 1; j < c->count; j++)
    if (task_done((struct task *)lua_touserdata(L, direct_place(c, j))) &&
        lua_tointeger(L, direct_place(c, j) - 1) < lua_tointeger(L, direct_place(c, k) - 1))
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
    int i = direct_place(c, k);
    if (c->waits[k].on != NULL) continue;
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
    if (!lua_isinteger(L, direct_place(c, k) - 1) ||
        lua_tointeger(L, direct_place(c, k) - 1) != (lua_Integer)k + 1)
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
    if (watch_plain(L, c, c->count, direct_place(c, c->count))) {
      c->count++;
      lua_pushvalue(L, -2);
    } else if (lua_isinteger(L, -1) && lua_type(L, -2) == LUA_TSTRING &&
               strcmp(lua_tostring(L, -2), "n") == 0) {
      count = lua_tointeger(L, -1);
      counted = true;
      lua_pop(L, 1);
    } else
      return false; /* a float n among them */
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
      lua_pushvalue(L, direct_place(c, c->count));
      watch_plain(L, c, c->count, direct_place(c, c->count));
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
  if (s->canceled) {
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
  int i = direct_place(c, c->first); /* it is free for others, but nobody runs yet */
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
  int top = direct_place(c, n - 1);
  bool failed = false;
  lua_settop(L, top);
  luaL_checkstack(L, (int)n, "too many tasks");
  for (uint32_t j = 0; j < n; j++) {
    const struct task *t = (const struct task *)lua_touserdata(L, direct_place(c, j));
    failed = failed || t->state == TASK_FAULTED;
    if (canceled == n && t->state == TASK_CANCELED) canceled = j;
  }
  if (failed) {
    uint32_t first = 0;
    bool one = combine_push_aggregate(L, c, 0, &first) == 1;
    if (one)
      return task_push_outcome(L, direct_place(c, first),
                               (struct task *)lua_touserdata(L, direct_place(c, first)));
    trace_remember(L, direct_place(c, first));
    return lua_error(L);
  }
  if (canceled < n)
    return task_push_outcome(L, direct_place(c, canceled),
                             (struct task *)lua_touserdata(L, direct_place(c, canceled)));
  if (!c->list) lua_createtable(L, 0, (int)n);
  for (uint32_t j = 0; j < n; j++) {
    int i = direct_place(c, j);
    if (!c->list) lua_pushvalue(L, i - 1);
    combine_push_first(L, i, (const struct task *)lua_touserdata(L, i));
    if (!c->list) lua_rawset(L, top + 1);
  }
  return c->list ? (int)n : 1;
}

static int l_await_all(lua_State *L) {
  return await_several(L, KIND_ALL, all_k, combine_await_all);
}

static int l_await_any(lua_State *L) {
  return await_several(L, KIND_ANY, any_k, combine_await_any);
}

static const luaL_Reg functions[] = {
    {"await_all", l_await_all}, {"await_any", l_await_any}, {NULL, NULL}};

void direct_open(lua_State *L) { module_functions(L, functions); }
