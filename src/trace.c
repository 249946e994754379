/*
** trace.c - async tracebacks: where an error was raised, and the tasks that it has come through since.
**
** A *record* is one task's part in a failure: its stack as text, made by the message handler where the
** error was raised, the error, the name. `inner` is the record of the awaited task that the same error
** came from, so the records of a chain of tasks share structure and cost one text each; `root` is the
** innermost of them, one for all failures of one origin. A record keeps no task alive: `task` is only
** an address, by which an error that the same task raises once more is known to be recorded already.
** The same error is the same value; one that a task makes of another begins anew.
**
** The *traces* hold, for a task that runs (TASK_TRACED), the record of the error that it saw last at
** its slot, and of the error that it raised last at the negative slot: the `<close>` handlers that this
** one unwinds may see others. A task that has failed has its record in its fault (error.c); one that
** awaits it and is about to raise the same error is given that (trace_remember), to be the `inner` of
** its own should the error leave it, too.
**
** An error that leaves a coroutine of coflow.coroutine makes a record without name and task. It goes on
** as that of whoever the error reaches next: the text of this one is continued by the stack further
** out.
**
** Finalizers of users, which may run while a record is made, may see failures of their own in this
** task: the traces get it when it is whole.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <limits.h>
#include <string.h>

enum record_field {
  RECORD_TEXT = 1,
  RECORD_ERROR,
  RECORD_NAME,
  RECORD_INNER, /* of the task that it came from, or nil */
  RECORD_ROOT,  /* the innermost one, or nil */
  RECORD_TASK
};
enum { SEGMENTS = 40, FRAMES = 30, LEVELS = 1000, LENGTH = 1 << 16 };

/* ---- the stack as text ---- */

/* [-0, +0, m] adds the frame to the buffer, as luaL_traceback would, but for the search of all loaded
** modules for a better name, which costs more than everything else here */
static void add_frame(lua_State *L, luaL_Buffer *b, const lua_Debug *ar) {
  if (ar->currentline > 0)
    lua_pushfstring(L, "\n\t%s:%d: in ", ar->short_src, ar->currentline);
  else
    lua_pushfstring(L, "\n\t%s: in ", ar->short_src);
  luaL_addvalue(b);
  if (strcmp(ar->namewhat, "global") == 0)
    lua_pushfstring(L, "function '%s'", ar->name);
  else if (*ar->namewhat != '\0')
    lua_pushfstring(L, "%s '%s'", ar->namewhat, ar->name);
  else if (*ar->what == 'm')
    lua_pushliteral(L, "main chunk");
  else if (*ar->what != 'C')
    lua_pushfstring(L, "function <%s:%d>", ar->short_src, ar->linedefined);
  else
    lua_pushliteral(L, "?");
  luaL_addvalue(b);
  if (ar->istailcall) luaL_addstring(b, "\n\t(...tail calls...)");
}

/* [-0, +1, m] the stack of `from` as lines; not the last frame if that is a body of ours */
static void push_frames(lua_State *L, lua_State *from, int level, bool body) {
  lua_Debug ar, next;
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  bool more = lua_getstack(from, level, &ar);
  for (int n = 0; more; n++) {
    more = lua_getstack(from, ++level, &next);
    if (!more && body) break;
    if (n == FRAMES || level > LEVELS) { /* to get at one costs its depth */
      luaL_addstring(&b, "\n\t...");
      break;
    }
    lua_getinfo(from, "Slnt", &ar);
    if (module_is_ours(runtime(L), ar.source))
      n--;
    else
      add_frame(L, &b, &ar);
    ar = next;
  }
  luaL_pushresult(&b);
}

/* [-0, +1, m] the stacks of a suspended or running task: that of the innermost coroutine of ours first */
static void push_stacks(lua_State *L, lua_State *from, bool body) {
  bool inner_body;
  lua_State *inner = coroutine_inner(from, &inner_body);
  luaL_checkstack(L, 20, NULL);
  if (inner != NULL) push_stacks(L, inner, inner_body);
  push_frames(L, from, from == L ? 1 : 0, body);
  if (inner != NULL) lua_concat(L, 2);
}

/* [-0, +1, m] one line, for cancellations: they are many, and no accident, unless they end as a Timeout */
static void push_place(lua_State *L, lua_State *from, int level) {
  lua_Debug ar;
  if (blame_find_line(L, from, level, &ar))
    lua_pushfstring(L, "\n\t%s:%d: canceled here", ar.short_src, ar.currentline);
  else
    lua_pushliteral(L, "");
}

/* ---- what a task has seen ---- */

/* [-1, +0, -] the record on top is that of the error that `me` saw last */
static void see(lua_State *L, struct task *me) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  lua_insert(L, -2);
  lua_rawseti(L, -2, me->slot);
  lua_pop(L, 1);
  me->flags |= TASK_TRACED;
}

/* [-0, +1, -] the record at that slot of the traces, if it is of the error at i; false: [-0, +0] it is not */
static bool find_record(lua_State *L, int slot, int i) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  if (lua_rawgeti(L, -1, slot) == LUA_TTABLE) {
    lua_rawgeti(L, -1, RECORD_ERROR);
    bool same = lua_rawequal(L, -1, i);
    lua_pop(L, 1);
    if (same) {
      lua_remove(L, -2);
      return true;
    }
  }
  lua_pop(L, 2);
  return false;
}

void trace_push_seen(lua_State *L, const struct task *t, int i) {
  i = lua_absindex(L, i);
  if (!(t->flags & TASK_TRACED) || (!find_record(L, t->slot, i) && !find_record(L, -t->slot, i)))
    lua_pushnil(L);
}

/* [-0, +1, -] that of the error at index 1, if t saw it last; false: [-0, +0] it did not. own: t has
** raised it, and it was caught to clean up. */
static bool find_last(lua_State *L, const struct task *t, bool *own) {
  *own = false;
  if (!(t->flags & TASK_TRACED) || !find_record(L, t->slot, 1)) return false;
  lua_rawgeti(L, -1, RECORD_TASK);
  *own = lua_touserdata(L, -1) == t;
  lua_pop(L, 1);
  return true;
}

void trace_remember(lua_State *L, int i) {
  struct task *me = runtime(L)->me;
  error_push_record(L, i);
  if (lua_isnil(L, -1) || me->slot == 0)
    lua_pop(L, 1);
  else
    see(L, me);
}

void trace_clear(lua_State *L, const struct task *t) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  lua_pushboolean(L, 0);
  lua_rawseti(L, -2, t->slot);
  lua_pushboolean(L, 0);
  lua_rawseti(L, -2, -t->slot);
  lua_pop(L, 1);
}

/* ---- records, made where an error is raised ---- */

/* [-0, +1, m] error record before text -> … text inner: the same error goes on, whose record `before`
** is. Out of a coroutine it goes on as that of whoever it reaches; else from task to task. */
static void record_link(lua_State *L) {
  bool coroutine = lua_rawgeti(L, 3, RECORD_NAME) == LUA_TNIL;
  lua_pop(L, 1);
  if (coroutine) {
    lua_rawgeti(L, 3, RECORD_TEXT);
    lua_insert(L, 4);
    if (lua_rawlen(L, 4) > LENGTH) /* a loop, more likely, that catches equal strings */
      lua_remove(L, 4);
    else
      lua_concat(L, 2);
    lua_rawgeti(L, 3, RECORD_INNER);
  } else
    lua_pushvalue(L, 3);
  if (!lua_istable(L, 5)) return;
  if (lua_rawgeti(L, 5, RECORD_ROOT) == LUA_TNIL) {
    lua_pop(L, 1);
    lua_pushvalue(L, 5);
  }
  lua_rawseti(L, 2, RECORD_ROOT);
}

/* [-0, +1, m] error -> error record, which has no name yet */
static void record_new(lua_State *L, lua_State *from, int level, bool body) {
  const struct task *me = runtime(L)->me;
  bool own, same = find_last(L, me, &own);
  if (own) { /* it goes on */
    lua_pushnil(L);
    lua_rawseti(L, 2, RECORD_NAME);
    lua_pushnil(L);
    lua_rawseti(L, 2, RECORD_TASK);
    return;
  }
  if (!same) lua_pushnil(L);
  lua_createtable(L, RECORD_TASK, 0);
  lua_insert(L, 2); /* error record before */
  if (error_is(L, 1, ERROR_CANCELED) && !scope_times_out(me))
    push_place(L, from, level);
  else
    push_frames(L, from, level, body); /* … text */
  if (same) {
    record_link(L);
    lua_rawseti(L, 2, RECORD_INNER);
  }
  lua_rawseti(L, 2, RECORD_TEXT);
  lua_pushvalue(L, 1);
  lua_rawseti(L, 2, RECORD_ERROR);
  lua_settop(L, 2);
}

int trace_handler(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *me = rt->me;
  bool own;
  lua_settop(L, 1);
  if (me == rt->outside) return 1; /* called by hand */
  if (find_last(L, me, &own)) lua_settop(L, 1);
  if (own) return 1; /* raised again where it was only caught to clean up */
  record_new(L, L, 1, coroutine_has_body(L, rt));
  lua_pushlightuserdata(L, me);
  lua_rawseti(L, 2, RECORD_TASK);
  task_push(L, me);
  task_push_name(L, -1);
  lua_rawseti(L, 2, RECORD_NAME);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  lua_pushvalue(L, 2);
  lua_rawseti(L, -2, -me->slot);
  lua_pushvalue(L, 2);
  see(L, me);
  lua_settop(L, 1);
  return 1;
}

/* ---- records of errors that leave a coroutine ---- */

int trace_leaving(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_settop(L, 1);
  if (rt->me == rt->outside) return 1;
  record_new(L, L, 1, true);
  lua_pushvalue(L, 2);
  see(L, rt->me);
  lua_settop(L, 1);
  return 1;
}

/* leaver(error, coroutine, body) -> the record of an error that has left a coroutine */
static int leaver(lua_State *L) {
  lua_State *co = lua_tothread(L, 2);
  bool body = lua_toboolean(L, 3);
  lua_settop(L, 1);
  record_new(L, co, 0, body);
  return 1;
}

void trace_push_left(lua_State *L, lua_State *co, bool body) {
  if (runtime(L)->me == runtime(L)->outside) {
    lua_pushnil(L);
    return;
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LEAVER);
  lua_pushvalue(L, -2);
  lua_pushthread(co);
  lua_xmove(co, L, 1);
  lua_pushboolean(L, body);
  if (lua_pcall(L, 3, 1, 0) == LUA_OK) return;
  lua_pop(L, 1); /* no memory, or no stack, for it */
  lua_pushnil(L);
}

void trace_go_on(lua_State *L, int i) {
  int top = lua_gettop(L);
  trace_push_seen(L, runtime(L)->me, i);
  lua_pushvalue(L, top);
  trace_keep_left(L, top + 1);
  lua_settop(L, top);
}

void trace_keep_left(lua_State *L, int i) {
  struct task *me = runtime(L)->me;
  if (!lua_istable(L, i)) return;
  lua_pushvalue(L, -1);
  lua_rawseti(L, i, RECORD_ERROR);
  lua_pushvalue(L, i);
  see(L, me);
}

/* ---- rendering ---- */

/* [-0, +0, -] the record on top gives way to the n-th further in, if there is one; how far it was */
static int go_inwards(lua_State *L, int n) {
  int far = 0;
  for (; far < n && lua_rawgeti(L, -1, RECORD_INNER) == LUA_TTABLE; far++) lua_replace(L, -2);
  if (far < n) lua_pop(L, 1);
  return far;
}

/* [-1, +1, m] the record on top, rendered: what failed first, then who awaited it. Of too many those in the
** middle are left out. */
static void render_record(lua_State *L) {
  enum { OUTER = SEGMENTS / 2 };
  int record = lua_gettop(L);
  luaL_checkstack(L, SEGMENTS + 10, NULL);
  lua_pushvalue(L, record);
  int all = 1 + go_inwards(L, INT_MAX), left_out = all > SEGMENTS ? all - SEGMENTS : 0;
  lua_settop(L, record);
  for (int k = 0; k < all - left_out; k++) { /* record r1 … rn, outermost first */
    lua_pushvalue(L, k == 0 ? record : -1);
    if (k > 0) go_inwards(L, k == OUTER ? 1 + left_out : 1);
  }
  lua_newtable(L);
  int parts = lua_gettop(L), n = 0;
  for (int i = parts - 1; i > record; i--) {
    if (left_out > 0 && i == record + OUTER) {
      lua_pushfstring(L, "… (%d tasks left out)", left_out);
      lua_rawseti(L, parts, ++n);
    }
    lua_rawgeti(L, i, RECORD_NAME);
    lua_rawgeti(L, i, RECORD_TEXT);
    lua_pushfstring(L, "%s task '%s':%s", n == 0 ? "in" : "awaited by", lua_tostring(L, -2),
                    lua_tostring(L, -1));
    lua_rawseti(L, parts, ++n);
    lua_pop(L, 2);
  }
  luaL_Buffer b;
  luaL_buffinit(L, &b);
  for (int i = 1; i <= n; i++) {
    if (i > 1) luaL_addchar(&b, '\n');
    lua_rawgeti(L, parts, i);
    luaL_addvalue(&b);
  }
  luaL_pushresult(&b);
  lua_replace(L, record);
  lua_settop(L, record);
}

/* [-0, +1, m] a live task: its own stack, then those of the tasks that await it */
static void render_live(lua_State *L, int i) {
  static const char *const states[] = {"created", "queued", "running", "waiting", "", "", ""};
  const struct task *seen[SEGMENTS];
  lua_pushvalue(L, i);
  int at = lua_gettop(L);
  lua_pushliteral(L, "");
  for (int n = 0; n < SEGMENTS; n++) {
    struct task *t = (struct task *)lua_touserdata(L, at);
    task_push_name(L, at);
    int k = 0;
    while (k < n && seen[k] != t) k++;
    if (k < n) { /* through combinators: other circles are refused */
      lua_pushfstring(L, "%s\nawaited by task '%s' again: a circle", lua_tostring(L, at + 1),
                      lua_tostring(L, at + 2));
      lua_replace(L, at + 1);
      lua_settop(L, at + 1);
      break;
    }
    seen[n] = t;
    if (task_is(t, KIND_FIBER) && t->flags & TASK_STARTED && !task_done(t) &&
        ((struct fiber *)t)->co != NULL)
      push_stacks(L, ((struct fiber *)t)->co, true);
    else
      lua_pushliteral(L, "");
    lua_pushfstring(L, "%s%s task '%s' (%s):%s", lua_tostring(L, at + 1),
                    n == 0 ? "in" : "\nawaited by", lua_tostring(L, at + 2), states[t->state],
                    lua_tostring(L, at + 3));
    lua_replace(L, at + 1);
    lua_settop(L, at + 1);
    if (task_waiters(t) == NULL) break;
    wait_owner(L, at, t->waiters->next);
    lua_replace(L, at);
  }
  lua_remove(L, at);
}

void trace_push(lua_State *L, int i) {
  i = lua_absindex(L, i);
  struct task *t = (struct task *)lua_touserdata(L, i);
  luaL_checkstack(L, 20, NULL);
  if (!task_done(t)) {
    render_live(L, i);
    return;
  }
  error_push_record(L, i);
  if (lua_istable(L, -1)) {
    render_record(L);
    return;
  }
  lua_pop(L, 1);
  task_push_name(L, i);
  static const char *const ends[] = {"completed", "faulted", "canceled"};
  lua_pushfstring(L, "in task '%s' (%s)", lua_tostring(L, -1), ends[t->state - TASK_SUCCEEDED]);
  lua_remove(L, -2);
}

/* ---- Lua face ---- */

/* failure_root(failed task), failure_root(nil, error of the running one) -> a table, one for all failures of
** one origin, or nil */
static int l_failure_root(lua_State *L) {
  lua_settop(L, 2);
  if (lua_isnil(L, 1))
    trace_push_seen(L, runtime(L)->me, 2);
  else {
    task_check(L, 1);
    error_push_record(L, 1);
  }
  if (lua_istable(L, -1) && lua_rawgeti(L, -1, RECORD_ROOT) != LUA_TTABLE) lua_pop(L, 1);
  return 1;
}

static const luaL_Reg functions[] = {{"failure_root", l_failure_root}, {NULL, NULL}};

void trace_open(lua_State *L) {
  module_functions(L, functions);
  module_push_function(L, trace_handler);
  lua_setfield(L, -2, "trace_handler");
  module_push_function(L, leaver);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_LEAVER);
}
