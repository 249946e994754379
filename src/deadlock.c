/*
** deadlock.c - what waits where, and for whom: told when nothing can go on, and to whoever asks
** (lua/coflow/diagnostics.lua).
**
** A task that waits is suspended somewhere, so the place is that of its code; what it waits for is a
** task, a queue, a deadline, or in the hands of a scheduler. Of a task that is made of others these are
** named, too, so that circles through them show; and of a lock, who has it. Nothing here changes anything.
**
** SPDX-License-Identifier: MIT
*/
#include "combine.h"
#include "waiter.h"

/* [-0, +1, m] the name of the task at i, in quotes; with its id where names are told apart by that
** (RUNTIME_NAMESAKES): all, or those that more than one task has */
static void push_quoted(lua_State *L, int i) {
  i = lua_absindex(L, i);
  task_push_name(L, i);
  bool ids = false;
  switch (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NAMESAKES)) {
    case LUA_TBOOLEAN: ids = lua_toboolean(L, -1); break;
    case LUA_TTABLE:
      lua_pushvalue(L, -2);
      lua_rawget(L, -2);
      ids = lua_tointeger(L, -1) > 1;
      lua_pop(L, 1);
      break;
    default: break;
  }
  lua_pop(L, 1);
  if (ids && task_is((const struct task *)lua_touserdata(L, i), KIND_FIBER))
    lua_pushfstring(L, "'%s' (#%I)", lua_tostring(L, -1), (LUAI_UACINT)task_id(L, i));
  else
    lua_pushfstring(L, "'%s'", lua_tostring(L, -1));
  lua_replace(L, -2);
}

static void describe_holder(lua_State *L);

/* [-1, +1, m] the task on top in words: its name, and what it waits for itself if it is no function
** that runs: "'when_all' of 'A', ('when_any' of 'B', 'C' and 7 more)". f: who awaits it, or NULL */
static void describe(lua_State *L, struct fiber *f, int depth) {
  enum { NAMES = 4, DEPTH = 3 };
  const int i = lua_gettop(L), text = i + 1, input = i + 2;
  const struct task *t = (const struct task *)lua_touserdata(L, i);
  bool many = task_is(t, KIND_ALL) || task_is(t, KIND_ANY) || task_is(t, KIND_EACH);
  luaL_checkstack(L, 20, NULL);
  push_quoted(L, i);
  if (task_is(t, KIND_QUEUED) && lua_getiuservalue(L, i, OP_INPUT) == LUA_TUSERDATA) {
    describe_holder(L);
    if (strcmp(lua_tostring(L, text), "'operation'") != 0) /* somebody has given it a name */
      lua_pushfstring(L, "%s on %s", lua_tostring(L, text), lua_tostring(L, -1));
    lua_replace(L, text);
  }
  lua_settop(L, text);
  if (!task_done(t) && (many || task_is(t, KIND_WAIT)) && depth < DEPTH) {
    const struct combine *c = many ? (const struct combine *)(const void *)t : NULL;
    bool direct = f != NULL && direct_push_inputs(L, f);
    int named = 0, more = 0;
    lua_Integer n = many ? (lua_Integer)c->count : 1;
    if (!direct && lua_getiuservalue(L, i, OP_INPUT) != LUA_TTABLE && many)
      n = 0; /* f has been woken by a finalizer meanwhile; else: a list, or one */
    for (lua_Integer k = 1; k <= n; k++, lua_settop(L, input)) {
      if (many && !direct && c->waits[k - 1].on == NULL) continue; /* there is a result instead */
      many ? (void)lua_rawgeti(L, input, k) : lua_pushvalue(L, input);
      const struct task *other = (const struct task *)object_test(L, -1, TAG_TASK);
      if (other == NULL || task_done(other)) continue;
      if (named == NAMES) {
        more++;
        continue;
      }
      describe(L, NULL, depth + 1);
      lua_pushfstring(L, "%s%s%s", lua_tostring(L, text), named++ == 0 ? " of " : ", ",
                      lua_tostring(L, -1));
      lua_replace(L, text);
    }
    if (more > 0) {
      lua_pushfstring(L, "%s and %d more", lua_tostring(L, text), more);
      lua_replace(L, text);
    }
    if (named > 0 && depth > 0) {
      lua_pushfstring(L, "(%s)", lua_tostring(L, text));
      lua_replace(L, text);
    }
  }
  lua_settop(L, text);
  lua_replace(L, i);
}

/* [-1, +1, m] the holder on top in words, and if it is a lock, who has it: "coflow.Lock, held by 'A'," */
static void describe_holder(lua_State *L) {
  enum { NAMES = 4 };
  const int holder = lua_gettop(L), text = holder + 1, list = holder + 2;
  if (luaL_getmetafield(L, holder, "__name") != LUA_TSTRING) lua_pushliteral(L, "?");
  lua_Integer n = lock_push_owners(L, holder, NAMES);
  for (lua_Integer k = 1; k <= n && k <= NAMES; k++, lua_settop(L, list)) {
    lua_rawgeti(L, list, k);
    const struct task *t = (const struct task *)lua_touserdata(L, -1);
    if (t == runtime(L)->outside)
      lua_pushliteral(L, "the code outside every task");
    else {
      push_quoted(L, -1);
      if (task_done(t)) lua_pushfstring(L, "%s (which has ended)", lua_tostring(L, -1));
    }
    lua_pushfstring(L, "%s%s%s", lua_tostring(L, text), k == 1 ? ", held by " : " and ",
                    lua_tostring(L, -1));
    lua_replace(L, text);
  }
  if (n > NAMES) {
    lua_pushfstring(L, "%s and %d more", lua_tostring(L, text), (int)n - NAMES);
    lua_replace(L, text);
  }
  if (n > 0) {
    lua_pushfstring(L, "%s,", lua_tostring(L, text));
    lua_replace(L, text);
  }
  lua_settop(L, text);
  lua_replace(L, holder);
}

void deadlock_push_wait(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  bool started = f->task.flags & TASK_STARTED;
  const char *place = started ? " at ?" : " not started", *what = "waits for ever";
  int top = lua_gettop(L);
  if (f->task.traits & TRAIT_HANDED)
    what = "waits to be run by its scheduler or synchronization context,";
  else if (f->task.state == TASK_QUEUED)
    what = "is ready";
  else if (!fiber_naps(f) && group_is_joined(L, f))
    what = "waits for the tasks of its group";
  else if (!fiber_naps(f) && fiber_push_awaited(L, f)) {
    describe(L, started ? f : NULL, 0);
    what = lua_pushfstring(L, started ? "waits for %s" : "is to run after %s", lua_tostring(L, -1));
    if (!started) place = "";
  } else if (waiter_push_holder(L, f)) {
    describe_holder(L);
    what = lua_pushfstring(L, "waits for %s", lua_tostring(L, -1));
  } else if (fiber_naps(f) && deadline_is_set(&f->u.nap.deadline))
    what = "sleeps";
  if (f->co != NULL && started) {
    place = fiber_push_place(L, f) ? lua_pushfstring(L, " at %s", lua_tostring(L, -1))
                                   : ""; /* of the library, or an operation at the top level */
  }
  lua_pushfstring(L, "%s%s", what, place);
  lua_insert(L, top + 1);
  lua_settop(L, top + 1);
}

/* f, by which the top level awaits a task, is told of by that task */
static bool is_told(lua_State *L, struct fiber *f) {
  if (f->task.state != TASK_WAITING || fiber_naps(f) || !fiber_push_awaited(L, f)) return false;
  const struct task *on = (const struct task *)lua_touserdata(L, -1);
  lua_pop(L, 1);
  return task_is(on, KIND_FIBER) && on->flags & TASK_STARTED && on->state == TASK_WAITING;
}

/* [-0, +0 or +1, m] the task in that slot, if it is one that waits */
static bool push_waiting(lua_State *L, lua_Integer slot, struct fiber *operation) {
  lua_rawgeti(L, UP_ANCHORS, slot);
  bool parked = lua_islightuserdata(L, -1); /* else it sleeps, under a clock that stands */
  struct task *t =
      parked ? (struct task *)lua_touserdata(L, -1) : (struct task *)object_test(L, -1, TAG_TASK);
  lua_pop(L, 1);
  if (t == NULL || !task_is(t, KIND_FIBER)) return false;
  if (!(t->traits & TRAIT_HANDED) && t->state != TASK_WAITING) return false;
  if (operation != NULL && t == &operation->task && is_told(L, operation)) return false;
  return task_push_whole(L, t);
}

/* [-0, +0, m] how many of those that wait have which name */
static void count_names(lua_State *L, lua_Integer slots, struct fiber *operation) {
  lua_newtable(L);
  for (lua_Integer slot = 2; slot <= slots; slot++) {
    if (!push_waiting(L, slot, operation)) continue;
    task_push_name(L, -1);
    lua_pushvalue(L, -1);
    lua_Integer n = lua_rawget(L, -4) == LUA_TNIL ? 0 : lua_tointeger(L, -1);
    lua_pop(L, 1);
    lua_pushinteger(L, n + 1);
    lua_rawset(L, -4);
    lua_pop(L, 1);
  }
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_NAMESAKES);
}

/* [-0, +1, m] circles of tasks that hold each other up, a line each */
static int circles(lua_State *L) {
  enum { CIRCLES = 10 };
  module_push(L, "hang");
  lua_getfield(L, -1, "circles");
  lua_call(L, 0, 1);
  luaL_checktype(L, -1, LUA_TTABLE);
  lua_Integer n = (lua_Integer)lua_rawlen(L, -1);
  lua_pushliteral(L, "");
  for (lua_Integer k = 1; k <= n && k <= CIRCLES; k++) {
    lua_rawgeti(L, -2, k);
    lua_pushfstring(L, "%s\n\t%s", lua_tostring(L, -2), lua_tostring(L, -1));
    lua_replace(L, -3);
    lua_pop(L, 1);
  }
  if (n > CIRCLES)
    lua_pushfstring(L, "%s\n\t… and %I more circles", lua_tostring(L, -1),
                    (LUAI_UACINT)(n - CIRCLES));
  return 1;
}

/* [-0, +1, m] what waits where, a line each, that of the root first; and the circles */
static int report(lua_State *L) {
  enum { LINES = 30 };
  struct fiber *root = (struct fiber *)lua_touserdata(L, 1);
  struct fiber *operation = lua_toboolean(L, 2) ? root : NULL;
  lua_Integer slots = (lua_Integer)lua_rawlen(L, UP_ANCHORS), first = root->task.slot;
  int lines = 0, more = 0;
  luaL_checkstack(L, 30, NULL);
  count_names(L, slots, operation);
  lua_settop(L, 2);
  lua_newtable(L); /* at 3 */
  for (lua_Integer slot = 1; slot <= slots; slot++, lua_settop(L, 3)) {
    if (slot > 1 && slot == first)
      continue; /* it has been told in the turn of the first, which is no task's */
    if (!push_waiting(L, slot > 1 ? slot : first, operation)) continue;
    if (++lines > LINES) {
      more++;
      continue;
    }
    push_quoted(L, -1); /* list task name */
    deadlock_push_wait(L, -2);
    lua_pushfstring(L, "\n\ttask %s %s", lua_tostring(L, -2), lua_tostring(L, -1));
    lua_rawseti(L, 3, lines);
  }
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  for (int i = 1; i <= lines - more; i++) {
    lua_rawgeti(L, 3, i);
    luaL_addvalue(&b);
  }
  if (more > 0) {
    lua_pushfstring(L, "\n\t… and %d more", more);
    luaL_addvalue(&b);
  }
  luaL_pushresult(&b);
  module_push_function(L, circles);
  if (lua_pcall(L, 0, 1, 0) == LUA_OK)
    lua_pushfstring(L, "%s%s", lua_tostring(L, -2), lua_tostring(L, -1));
  else
    lua_pop(L, 1); /* its file cannot be read: it is an addition */
  return 1;
}

/* [-n, +1, m] calls f, which says whose names come with ids. That is put back: a finalizer may ask for a report in
** the midst of another one. */
static void call_naming(lua_State *L, lua_CFunction f, int arguments) {
  int before = lua_gettop(L) - arguments + 1;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NAMESAKES);
  module_push_function(L, f);
  lua_rotate(L, before, 2); /* before f arguments */
  int status = lua_pcall(L, arguments, 1, 0);
  lua_insert(L, before);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_NAMESAKES);
  if (status != LUA_OK) lua_error(L);
}

/* ---- who waits for whom ---- */

/* How far to look: inputs may have inputs, and many may have the same; and a lock many owners. */
enum { LOOKS = 1000000, DEPTH = 1000, OWNERS = 100 };

struct blockers {
  int list; /* where they are put */
  int looks, depth;
};

static void list_behind(lua_State *L, struct blockers *b);

/* [-1, +0, m] what the combinator t waits for, its inputs on top: all of them, or the only one, if one is
** enough. Of those that are complete the list has the results. */
static void list_inputs(lua_State *L, struct blockers *b, const struct task *t, bool direct) {
  const struct combine *c = (const struct combine *)(const void *)t;
  const int inputs = lua_gettop(L);
  if (task_is(t, KIND_ALL) || (task_is(t, KIND_ANY) && c->left == 1 && c->count == 1))
    for (uint32_t k = 0; k < c->count && b->looks > 0; k++) {
      if (!direct && c->waits[k].on == NULL) continue;
      lua_rawgeti(L, inputs, (lua_Integer)k + 1);
      list_behind(L, b);
    }
  lua_settop(L, inputs - 1);
}

/* [-1, +0, m] what is on top, a task or what has a queue, holds somebody up: who that is goes into the
** list */
static void list_behind(lua_State *L, struct blockers *b) {
  const int at = lua_gettop(L);
  const struct task *t = (const struct task *)object_test(L, at, TAG_TASK);
  luaL_checkstack(L, 10, NULL);
  b->depth++;
  if (--b->looks < 0 || b->depth > DEPTH)
    ;
  else if (t == NULL) { /* those who have it */
    lock_push_owners(L, at, OWNERS);
    for (lua_Integer k = 1; lua_rawgeti(L, at + 1, k) != LUA_TNIL; k++) list_behind(L, b);
  } else if (task_done(t))
    ;
  else if (task_is(t, KIND_FIBER)) {
    lua_pushvalue(L, at);
    lua_rawseti(L, b->list, (lua_Integer)lua_rawlen(L, b->list) + 1);
  } else if (task_is(t, KIND_ALL) || task_is(t, KIND_ANY)) {
    if (lua_getiuservalue(L, at, OP_INPUT) == LUA_TTABLE) list_inputs(L, b, t, false);
  } else if (task_is(t, KIND_WAIT) || task_is(t, KIND_QUEUED)) {
    if (lua_getiuservalue(L, at, OP_INPUT) == LUA_TUSERDATA) list_behind(L, b);
  }
  b->depth--;
  lua_settop(L, at - 1);
}

/* [-0, +0 or +1, m] what the waiting f waits for: a task, or what has a queue. Those that hold it up go
** into the list. */
static bool push_target(lua_State *L, struct fiber *f, struct blockers *b) {
  if (fiber_naps(f)) {
    if (!waiter_push_holder(L, f)) return false;
    lua_pushvalue(L, -1);
    list_behind(L, b);
    return true;
  }
  if (!fiber_push_awaited(L, f)) {
    lua_pop(L, 1);
    return false;
  }
  if (group_is_joined(L, f)) {
    lua_pushvalue(L, b->list);
    group_list_children(L, f);
    lua_pop(L, 1);
  } else if (f->task.flags & TASK_STARTED && direct_push_inputs(L, f))
    list_inputs(L, b, (const struct task *)lua_touserdata(L, -2), true);
  else {
    lua_pushvalue(L, -1);
    list_behind(L, b);
  }
  return true;
}

/* [-0, +1, m] the row of the task at i */
static void push_row(lua_State *L, struct runtime *rt, int i, int *looks) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  double since = probe_since(rt, f);
  lua_createtable(L, 0, 6);
  lua_pushvalue(L, i);
  lua_setfield(L, -2, "task");
  if (f->task.state != TASK_WAITING && f->task.state != TASK_QUEUED) return;
  deadlock_push_wait(L, i);
  lua_setfield(L, -2, "wait");
  lua_newtable(L); /* row on */
  if (f->task.state == TASK_WAITING) {
    lua_pushboolean(L, 1);
    lua_setfield(L, -3, "waits");
    if (since == since && f->task.flags & TASK_STARTED) {
      lua_pushnumber(L, fmax(loop_now(rt) - since, 0));
      lua_setfield(L, -3, "seconds");
    }
    if (looks != NULL) {
      struct blockers b = {.list = lua_gettop(L), .looks = *looks};
      if (push_target(L, f, &b)) lua_setfield(L, -3, "target");
      *looks = b.looks;
    }
  }
  lua_setfield(L, -2, "on");
}

static int survey(lua_State *L) {
  struct runtime *rt = runtime(L);
  int looks = LOOKS;
  bool deep = lua_toboolean(L, 1);
  lua_settop(L, 0);
  lua_pushboolean(L, 1);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_NAMESAKES);
  lua_Integer n = scope_push_tasks(L, rt);
  for (lua_Integer k = 1; k <= n; k++, lua_settop(L, 2)) {
    lua_rawgeti(L, 1, k);
    task_id(L, 3); /* so that the ids are in that order */
  }
  lua_createtable(L, (int)n, 0);
  for (lua_Integer k = 1; k <= n; k++, lua_settop(L, 3)) {
    lua_rawgeti(L, 1, k);
    if (task_done((const struct task *)lua_touserdata(L, 4)))
      continue; /* by a finalizer, as may be whatever changes here meanwhile */
    push_row(L, rt, 4, deep ? &looks : NULL);
    lua_rawgeti(L, 2, k);
    lua_setfield(L, -2, "parent");
    lua_rawseti(L, 3, (lua_Integer)lua_rawlen(L, 3) + 1);
  }
  return 1;
}

/* survey(deep) -> a list of rows, for each task with a body that has not ended (lua/coflow/hang.lua); not
** deep: nothing of who holds them up, which takes long */
static int l_survey(lua_State *L) {
  lua_settop(L, 1);
  call_naming(L, survey, 1);
  return 1;
}

/* live_tasks() -> those tasks, the parent of each or false, how many of them wait */
static int l_live_tasks(lua_State *L) {
  lua_settop(L, 0);
  lua_Integer n = scope_push_tasks(L, runtime(L)), waiting = 0;
  for (lua_Integer k = 1; k <= n; k++, lua_settop(L, 2)) {
    lua_rawgeti(L, 1, k);
    waiting += ((const struct task *)lua_touserdata(L, 3))->state == TASK_WAITING;
  }
  lua_pushinteger(L, waiting);
  return 3;
}

static const luaL_Reg functions[] = {
    {"survey", l_survey}, {"live_tasks", l_live_tasks}, {NULL, NULL}};

const struct part survey_part = {functions, NULL, NULL};

/* ---- the error ---- */

void deadlock_push(lua_State *L, struct runtime *rt, int root, bool operation) {
  lua_pushvalue(L, root);
  lua_pushboolean(L, operation);
  call_naming(L, report, 2);
  if (rt->seeded) {
    lua_pushfstring(L, "%s\n\t(seed %I)", lua_tostring(L, -1), (LUAI_UACINT)rt->seed);
    lua_replace(L, -2);
  }
  if (rt->clock == CLOCK_HELD && deadline_any(rt))
    error_push(L, ERROR_OPERATION,
               "deadlock: no task is ready, and the fake clock never advances: it stands at "
               "%f, the next deadline is at %f%s",
               (LUAI_UACNUMBER)rt->virtual_now, (LUAI_UACNUMBER)deadline_next(rt),
               lua_tostring(L, -1));
  else
    error_push(L, ERROR_OPERATION,
               "deadlock: no task is ready, and no timer, request or handle is alive that "
               "could complete one%s",
               lua_tostring(L, -1));
  lua_remove(L, -2);
}
