/*
** deadlock.c - what waits where, and for whom: told when nothing can go on, and to whoever asks (diagnostics.lua).
**
** A task that waits is suspended somewhere, so the place is that of its code; what it waits for is a
** task, a queue, a deadline, or in the hands of a scheduler. Of a task that is made of others these are
** named, too, so that circles through them show; and of a lock, who has it. Nothing here changes anything.
**
** SPDX-License-Identifier: MIT
*/
#include "combine.h"
#include "waiter.h"

/* [-1, +1, m] the task on top in words: its name, and what it waits for itself if it is no function
** that runs: "'when_all' of 'A', ('when_any' of 'B', 'C' and 7 more)". f: who awaits it, or NULL */
static void describe(lua_State *L, struct fiber *f, int depth) {
  enum { NAMES = 4, DEPTH = 3 };
  const int i = lua_gettop(L), text = i + 1, input = i + 2;
  const struct task *t = (const struct task *)lua_touserdata(L, i);
  bool many = task_is(t, KIND_ALL) || task_is(t, KIND_ANY) || task_is(t, KIND_EACH);
  luaL_checkstack(L, 10, NULL);
  task_push_name(L, i);
  lua_pushfstring(L, "'%s'", lua_tostring(L, -1));
  lua_replace(L, text);
  if (!task_done(t) && (many || task_is(t, KIND_WAIT)) && depth < DEPTH) {
    int named = 0, more = 0;
    if (f == NULL || !direct_push_inputs(L, f))
      lua_getiuservalue(L, i, OP_INPUT); /* a list, or one */
    lua_Integer n = many ? (lua_Integer)lua_rawlen(L, input) : 1;
    for (lua_Integer k = 1; k <= n; k++, lua_settop(L, input)) {
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

/* [-1, +1, m] the holder on top in words, and if it is a lock, who has it: "coflow.Lock, which 'A' has" */
static void describe_holder(lua_State *L) {
  enum { NAMES = 4 };
  const int holder = lua_gettop(L), text = holder + 1, list = holder + 2;
  if (luaL_getmetafield(L, holder, "__name") != LUA_TSTRING) lua_pushliteral(L, "?");
  lock_push_owners(L, holder);
  lua_Integer n = (lua_Integer)lua_rawlen(L, list);
  for (lua_Integer k = 1; k <= n && k <= NAMES; k++, lua_settop(L, list)) {
    lua_rawgeti(L, list, k);
    const struct task *t = (const struct task *)lua_touserdata(L, -1);
    if (t == runtime(L)->outside)
      lua_pushliteral(L, "the code outside every task");
    else {
      task_push_name(L, -1);
      lua_pushfstring(L, "'%s'%s", lua_tostring(L, -1), task_done(t) ? " (which has ended)" : "");
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
  const char *place = f->task.flags & TASK_STARTED ? " at ?" : " not started",
             *what = "waits for ever";
  int top = lua_gettop(L);
  if (f->task.traits & TRAIT_HANDED)
    what = "waits to be run by its scheduler or synchronization context,";
  else if (f->task.state == TASK_QUEUED)
    what = "is ready";
  else if (!fiber_naps(f) && group_is_joined(L, f))
    what = "waits for the tasks of its group";
  else if (!fiber_naps(f) && fiber_push_awaited(L, f)) {
    describe(L, f, 0);
    what = lua_pushfstring(L, "waits for %s", lua_tostring(L, -1));
  } else if (waiter_push_holder(L, f)) {
    describe_holder(L);
    what = lua_pushfstring(L, "waits for %s", lua_tostring(L, -1));
  } else if (fiber_naps(f) && deadline_is_set(&f->u.nap.deadline))
    what = "sleeps";
  if (f->co != NULL && f->task.flags & TASK_STARTED) {
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

/* [-0, +1, m] what waits where, a line each; f: an operation at the top level, or NULL */
static void push_report(lua_State *L, struct fiber *f) {
  enum { LINES = 30 };
  int lines = 0, more = 0;
  luaL_checkstack(L, 20, NULL);
  lua_newtable(L);
  int list = lua_gettop(L);
  lua_Integer n = (lua_Integer)lua_rawlen(L, UP_ANCHORS);
  for (lua_Integer slot = 2; slot <= n; slot++, lua_settop(L, list)) {
    lua_rawgeti(L, UP_ANCHORS, slot);
    bool parked = lua_islightuserdata(L, -1); /* else it sleeps, under a clock that stands */
    struct task *t =
        parked ? (struct task *)lua_touserdata(L, -1) : (struct task *)object_test(L, -1, TAG_TASK);
    if (t == NULL || !task_is(t, KIND_FIBER)) continue;
    if (!(t->traits & TRAIT_HANDED) && t->state != TASK_WAITING) continue;
    if (f != NULL && t == &f->task && is_told(L, f)) continue;
    task_push(L, t);
    if (lua_isnil(L, -1)) continue; /* somebody is closing its coroutine */
    if (++lines > LINES) {
      more++;
      continue;
    }
    task_push_name(L, -1); /* … task name */
    deadlock_push_wait(L, -2);
    lua_pushfstring(L, "\n\ttask '%s' %s", lua_tostring(L, -2), lua_tostring(L, -1));
    lua_rawseti(L, list, lines);
  }
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  for (int i = 1; i <= lines - more; i++) {
    lua_rawgeti(L, list, i);
    luaL_addvalue(&b);
  }
  if (more > 0) {
    lua_pushfstring(L, "\n\t… and %d more", more);
    luaL_addvalue(&b);
  }
  luaL_pushresult(&b);
  lua_remove(L, list);
}

/* ---- who waits for whom ---- */

/* how far to look: inputs may have inputs, and many may have the same */
enum { BLOCKERS = 1000 };

/* [-1, +0, m] what is on top, a task or what has a queue, holds somebody up: who that is goes into the list at i */
static void list_behind(lua_State *L, int i, int *budget) {
  const int at = lua_gettop(L);
  const struct task *t = (const struct task *)object_test(L, at, TAG_TASK);
  luaL_checkstack(L, 10, NULL);
  if (--*budget < 0)
    ;
  else if (t == NULL) { /* a holder: those who have it */
    lock_push_owners(L, at);
    for (lua_Integer k = 1; lua_rawgeti(L, at + 1, k) != LUA_TNIL; k++) list_behind(L, i, budget);
  } else if (task_done(t))
    ;
  else if (task_is(t, KIND_FIBER)) {
    lua_pushvalue(L, at);
    lua_rawseti(L, i, (lua_Integer)lua_rawlen(L, i) + 1);
  } else if (task_is(t, KIND_ALL)) {
    lua_getiuservalue(L, at, OP_INPUT);
    for (lua_Integer k = 1; lua_istable(L, at + 1) && lua_rawgeti(L, at + 1, k) != LUA_TNIL; k++)
      list_behind(L, i, budget);
  } else if (task_is(t, KIND_WAIT) || task_is(t, KIND_QUEUED)) {
    if (lua_getiuservalue(L, at, OP_INPUT) == LUA_TUSERDATA) list_behind(L, i, budget);
  }
  lua_settop(L, at - 1);
}

void deadlock_list_blockers(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  int list = lua_gettop(L), budget = BLOCKERS;
  if (f->task.state != TASK_WAITING || !(f->task.flags & TASK_STARTED)) return;
  if (fiber_naps(f)) {
    if (waiter_push_holder(L, f)) list_behind(L, list, &budget);
  } else if (group_is_joined(L, f))
    group_list_children(L, f);
  else if (fiber_push_awaited(L, f) && direct_push_inputs(L, f)) { /* on inputs */
    if (task_is(f->u.wait.on, KIND_ALL))
      for (lua_Integer k = 1; lua_rawgeti(L, list + 2, k) != LUA_TNIL; k++)
        list_behind(L, list, &budget);
  } else if (lua_toboolean(L, -1))
    list_behind(L, list, &budget);
  lua_settop(L, list);
}

/* survey() -> a list of { task, parent or false, what it waits for and where, or false, seconds since it does or
** false, a list of those that hold it up }, for each task with a body that has not ended, outer ones first */
static int l_survey(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_settop(L, 0);
  lua_Integer n = scope_push_tasks(L, rt);
  lua_createtable(L, (int)n, 0);
  for (lua_Integer k = 1; k <= n; k++, lua_settop(L, 3)) {
    lua_rawgeti(L, 1, k);
    struct fiber *f = (struct fiber *)lua_touserdata(L, 4);
    if (task_done(&f->task))
      continue; /* by a finalizer, as may be whatever changes here meanwhile */
    double since = probe_since(rt, f);
    bool waits = f->task.state == TASK_WAITING && f->task.flags & TASK_STARTED;
    lua_createtable(L, 5, 0);
    lua_pushvalue(L, 4);
    lua_rawseti(L, 5, 1);
    lua_rawgeti(L, 2, k);
    lua_rawseti(L, 5, 2);
    if (waits || f->task.state == TASK_QUEUED)
      deadlock_push_wait(L, 4);
    else
      lua_pushboolean(L, 0);
    lua_rawseti(L, 5, 3);
    if (waits && since == since)
      lua_pushnumber(L, fmax(loop_now(rt) - since, 0));
    else
      lua_pushboolean(L, 0);
    lua_rawseti(L, 5, 4);
    lua_newtable(L);
    if (!task_done(&f->task)) deadlock_list_blockers(L, 4);
    lua_rawseti(L, 5, 5);
    lua_rawseti(L, 3, (lua_Integer)lua_rawlen(L, 3) + 1);
  }
  return 1;
}

static const luaL_Reg functions[] = {{"survey", l_survey}, {NULL, NULL}};

const struct part survey_part = {functions, NULL, NULL};

/* ---- the error ---- */

void deadlock_push(lua_State *L, struct runtime *rt, struct fiber *f) {
  push_report(L, f);
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
