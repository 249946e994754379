/*
** error.c - error objects, async tracebacks, and failures that nobody observed.
**
** An error object is a table with `name` and `message` and the metatable of its name; a value that
** user code raises is never touched. What is known about a failure stands beside it:
**
** - A *trace record* (the list RECORD_…) is made by the message handler where the error was raised. `task` is only
**   an address: raised once more by the same task, the record is the same. `inner` is the record of the awaited
**   task that the same error came from, so the records of a chain of tasks share structure, cost one text each,
**   and keep no task alive. The record of what a task saw last is at its slot of the traces.
** - A *fault*, a small userdata with a finalizer, holds the record and the task. The task holds it
**   in the user value that its waiters had. Both die in one collection, and the finalizer reports
**   the task unless it was observed. Tasks that do not fail pay nothing for this.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char *const error_names[ERROR_COUNT] = {"OperationCanceled",
                                                     "Timeout",
                                                     "Aggregate",
                                                     "ObjectDisposed",
                                                     "InvalidOperation",
                                                     "Argument",
                                                     "SemaphoreFull",
                                                     "ChannelClosed",
                                                     "TaskAbandoned",
                                                     "BrokenCircuit",
                                                     "BulkheadRejected",
                                                     "RateLimitRejected",
                                                     "IO",
                                                     "Worker"};

enum record_field {
  RECORD_TEXT = 1,
  RECORD_ERROR,
  RECORD_NAME,
  RECORD_INNER, /* of the task that it came from, or nil */
  RECORD_ROOT,  /* the innermost one, or nil */
  RECORD_TASK
};
enum { FAULT_TASK = 1, FAULT_RECORD };
enum { TRACE_SEGMENTS = 40, TRACE_FRAMES = 30, FIELDS = 20, NESTED_REPORTS = 8 };

/* ---- objects ---- */

static int l_error_tostring(lua_State *L);
static int l_error_concat(lua_State *L);

/* [-0, +1, m] the metatable of such errors, made when it is first needed */
static void push_metatable(lua_State *L, enum error_kind kind) {
  int top = lua_gettop(L);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_ERRORS); /* errors */
  if (lua_rawgeti(L, top + 1, kind + 1) == LUA_TNIL) {
    luaL_checkstack(L, 8, NULL);
    lua_createtable(L, 0, 3);
    module_push_function(L, l_error_tostring);
    lua_setfield(L, -2, "__tostring");
    module_push_function(L, l_error_concat);
    lua_setfield(L, -2, "__concat");
    lua_pushfstring(L, "coflow.%s", error_names[kind]);
    lua_setfield(L, -2, "__name");                       /* errors nil metatable */
    if (lua_rawgeti(L, top + 1, kind + 1) == LUA_TNIL) { /* still: no finalizer has made one */
      lua_pop(L, 1);
      lua_pushvalue(L, -1);
      lua_rawseti(L, top + 1, kind + 1);
      runtime(L)->error_metatables[kind] = lua_topointer(L, -1);
    }
  }
  lua_replace(L, top + 1);
  lua_settop(L, top + 1);
}

/* [-1, +1, m] a new error object whose message is on top */
static void make(lua_State *L, enum error_kind kind) {
  lua_createtable(L, 0, 4);
  lua_insert(L, -2);
  lua_setfield(L, -2, "message");
  lua_pushstring(L, error_names[kind]);
  lua_setfield(L, -2, "name");
  push_metatable(L, kind);
  lua_setmetatable(L, -2);
}

void error_push(lua_State *L, enum error_kind kind, const char *format, ...) {
  va_list args;
  va_start(args, format);
  lua_pushvfstring(L, format, args);
  va_end(args);
  make(L, kind);
}

int error_throw(lua_State *L, enum error_kind kind, const char *format, ...) {
  va_list args;
  va_start(args, format);
  lua_pushvfstring(L, format, args);
  va_end(args);
  make(L, kind);
  return lua_error(L);
}

bool error_is(lua_State *L, int i, enum error_kind kind) {
  if (lua_type(L, i) != LUA_TTABLE || !lua_getmetatable(L, i)) return false;
  bool same = lua_topointer(L, -1) == runtime(L)->error_metatables[kind];
  lua_pop(L, 1);
  return same;
}

/* ---- traces ---- */

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
    if (n == TRACE_FRAMES) {
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

/* [-0, +1, m] one line, for cancellations: they are many, and no accident */
static void push_place(lua_State *L, lua_State *from, int level) {
  lua_Debug ar;
  for (; lua_getstack(from, level, &ar); level++) {
    lua_getinfo(from, "Sl", &ar);
    if (ar.currentline > 0) {
      lua_pushfstring(L, "\n\t%s:%d: canceled here", ar.short_src, ar.currentline);
      return;
    }
  }
  lua_pushliteral(L, "");
}

/* error -> error record traces, where the record has no name yet */
static void record_new(lua_State *L, lua_State *from, int level, bool body) {
  const struct task *me = runtime(L)->me;
  bool same = false;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  if (me->flags & TASK_TRACED && lua_rawgeti(L, 2, me->slot) == LUA_TTABLE) {
    lua_rawgeti(L, 3, RECORD_ERROR);
    same = lua_rawequal(L, 4, 1) && !lua_isnil(L, 1);
  }
  lua_settop(L, 3); /* error traces before */
  if (same) {
    lua_rawgeti(L, 3, RECORD_TASK);
    if (lua_touserdata(L, 4) == me) { /* recorded where it was caught to clean up; it goes on */
      for (int field = RECORD_NAME; field <= RECORD_TASK; field += RECORD_TASK - RECORD_NAME) {
        lua_pushnil(L);
        lua_rawseti(L, 3, field);
      }
      lua_settop(L, 3);
      lua_insert(L, 2);
      return;
    }
    lua_settop(L, 3);
  }
  lua_createtable(L, RECORD_TASK, 0);
  lua_insert(L, 2); /* error record traces before */
  if (error_is(L, 1, ERROR_CANCELED))
    push_place(L, from, level);
  else
    push_frames(L, from, level, body); /* … text */
  if (same) {
    if (lua_rawgeti(L, 4, RECORD_NAME) == LUA_TNIL) { /* it came out of a coroutine */
      lua_pop(L, 1);
      lua_rawgeti(L, 4, RECORD_TEXT);
      lua_insert(L, -2);
      lua_concat(L, 2);
      lua_rawgeti(L, 4, RECORD_INNER);
    } else {
      lua_pop(L, 1);
      lua_pushvalue(L, 4);
    }
    if (lua_istable(L, -1)) {
      if (lua_rawgeti(L, -1, RECORD_ROOT) == LUA_TNIL) {
        lua_pop(L, 1);
        lua_pushvalue(L, -1);
      }
      lua_rawseti(L, 2, RECORD_ROOT);
    }
    lua_rawseti(L, 2, RECORD_INNER);
  }
  lua_rawseti(L, 2, RECORD_TEXT);
  lua_pushvalue(L, 1);
  lua_rawseti(L, 2, RECORD_ERROR);
  lua_settop(L, 3);
}

int error_handler(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *me = rt->me;
  lua_settop(L, 1);
  if (me == rt->outside) return 1; /* called by hand */
  if (me->flags & TASK_TRACED) {   /* raised again where it was only caught to clean up? */
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
    if (lua_rawgeti(L, 2, me->slot) == LUA_TTABLE) {
      lua_rawgeti(L, 3, RECORD_ERROR);
      lua_rawgeti(L, 3, RECORD_TASK);
      if (lua_rawequal(L, 4, 1) && lua_touserdata(L, 5) == me && !lua_isnil(L, 1)) {
        lua_settop(L, 1);
        return 1;
      }
    }
    lua_settop(L, 1);
  }
  record_new(L, L, 1, coroutine_has_body(L, rt));
  lua_pushlightuserdata(L, me);
  lua_rawseti(L, 2, RECORD_TASK);
  task_push(L, me);
  task_push_name(L, -1);
  lua_rawseti(L, 2, RECORD_NAME);
  lua_settop(L, 3);
  lua_pushvalue(L, 2);
  lua_rawseti(L, 3, -me->slot);
  lua_pushvalue(L, 2);
  lua_rawseti(L, 3, me->slot);
  me->flags |= TASK_TRACED;
  lua_settop(L, 1);
  return 1;
}

/* The record of an error that leaves a coroutine has no name: that of whoever it reaches goes on. */

int error_leaving(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_settop(L, 1);
  if (rt->me == rt->outside) return 1;
  record_new(L, L, 1, true);
  lua_pushvalue(L, 2);
  lua_rawseti(L, 3, rt->me->slot);
  rt->me->flags |= TASK_TRACED;
  lua_settop(L, 1);
  return 1;
}

/* leaver(error, coroutine, body) -> the record of an error that has left a coroutine */
static int leaver(lua_State *L) {
  lua_State *co = lua_tothread(L, 2);
  bool body = lua_toboolean(L, 3);
  lua_settop(L, 1);
  record_new(L, co, 0, body);
  lua_settop(L, 2);
  return 1;
}

void error_push_left(lua_State *L, lua_State *co, bool body) {
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

void error_keep_left(lua_State *L, int i) {
  struct task *me = runtime(L)->me;
  if (!lua_istable(L, i)) return;
  lua_pushvalue(L, -1);
  lua_rawseti(L, i, RECORD_ERROR);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  lua_pushvalue(L, i);
  lua_rawseti(L, -2, me->slot);
  lua_pop(L, 1);
  me->flags |= TASK_TRACED;
}

/* [-0, +1, -] the record that the task t has of the error at i, or nil. While that unwinds `<close>` handlers
** may see other failures, which take the place of what was seen last: so the handler has put it aside. */
static void push_trace_of(lua_State *L, const struct task *t, int i) {
  i = lua_absindex(L, i);
  if (t->flags & TASK_TRACED) {
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
    for (int slot = t->slot, n = 0; n < 2; slot = -slot, n++) {
      if (lua_rawgeti(L, -1, slot) == LUA_TTABLE) {
        lua_rawgeti(L, -1, RECORD_ERROR);
        bool same = lua_rawequal(L, -1, i);
        lua_pop(L, 1);
        if (same) {
          lua_remove(L, -2);
          return;
        }
      }
      lua_pop(L, 1);
    }
    lua_pop(L, 1);
  }
  lua_pushnil(L);
}

/* [-1, +1, m] the record on top, rendered: what failed first, then who awaited it */
static void render_record(lua_State *L) {
  int record = lua_gettop(L), segments = 0;
  luaL_checkstack(L, TRACE_SEGMENTS + 10, NULL);
  lua_pushvalue(L, record);
  while (segments < TRACE_SEGMENTS &&
         lua_type(L, -1) == LUA_TTABLE) { /* … records, outermost first */
    lua_rawgeti(L, -1, RECORD_INNER);
    segments++;
  }
  bool more = lua_type(L, -1) == LUA_TTABLE;
  lua_pop(L, 1);
  lua_newtable(L); /* record r1 … rn parts */
  int parts = lua_gettop(L), n = 0;
  if (more) {
    lua_pushliteral(L, "… (deeper tasks left out)");
    lua_rawseti(L, parts, ++n);
  }
  for (int i = parts - 1; i > record; i--) {
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
  lua_pushvalue(L, i);
  int at = lua_gettop(L);
  lua_pushliteral(L, "");
  for (int n = 0; n < TRACE_SEGMENTS; n++) {
    struct task *t = (struct task *)lua_touserdata(L, at);
    task_push_name(L, at);
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

/* [-0, +1, m] the record of the failed task at i, or nil */
static void push_record(lua_State *L, int i) {
  lua_getiuservalue(L, i, TASK_WAITERS);
  if (object_test(L, -1, TAG_FAULT))
    lua_getiuservalue(L, -1, FAULT_RECORD);
  else
    lua_pushnil(L);
  lua_remove(L, -2);
}

static void push_root(lua_State *L, int i, int error) {
  if (i != 0)
    push_record(L, i);
  else
    push_trace_of(L, runtime(L)->me, error);
  if (!lua_istable(L, -1)) return;
  if (lua_rawgeti(L, -1, RECORD_ROOT) == LUA_TTABLE)
    lua_remove(L, -2);
  else
    lua_pop(L, 1);
}

void error_trace(lua_State *L, int i) {
  i = lua_absindex(L, i);
  struct task *t = (struct task *)lua_touserdata(L, i);
  luaL_checkstack(L, 20, NULL);
  if (!task_done(t)) {
    render_live(L, i);
    return;
  }
  push_record(L, i);
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

/* ---- failures ---- */

/* [-0, +0, m] task: gives the faulted task at index 1 its fault, with the record at index 2 */
static int attach(lua_State *L) {
  object_new(L, TAG_FAULT, sizeof(uint32_t), 2);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, FAULT_TASK);
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, -2, FAULT_RECORD);
  lua_setiuservalue(L, 1, TASK_WAITERS);
  return 0;
}

/* [-1, +0, -] the record (or nil) on top becomes that of the failed task at i. Without memory for it
** the failure is still kept, only its trace and the report are lost. */
static void attach_record(lua_State *L, int i) {
  i = lua_absindex(L, i);
  module_push_function(L, attach);
  lua_pushvalue(L, i);
  lua_rotate(L, -3, 2);
  if (lua_pcall(L, 2, 0, 0) != LUA_OK) lua_pop(L, 1);
}

/* called by whoever settles: the task at i has failed; `from` is the input it has the error from, or 0 */
void error_attach(lua_State *L, int i, int from) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  if (from != 0)
    push_record(L, from);
  else {
    lua_getiuservalue(L, i, TASK_RESULT);
    push_trace_of(L, t, -1);
    lua_remove(L, -2);
  }
  attach_record(L, i);
}

/* called before the error of the task at i is raised in the running task: remembers where it is from */
void error_remember(lua_State *L, int i) {
  struct task *me = runtime(L)->me;
  push_record(L, i);
  if (lua_isnil(L, -1) || me->slot == 0) {
    lua_pop(L, 1);
    return;
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACES);
  lua_insert(L, -2);
  lua_rawseti(L, -2, me->slot);
  lua_pop(L, 1);
  me->flags |= TASK_TRACED;
}

/* [-1, +1, m] the text on top goes on with the fields of the table at i, which has no metatable */
static void add_fields(lua_State *L, int i) {
  int text = lua_gettop(L), shown = 0;
  lua_pushnil(L);
  while (shown < FIELDS && lua_next(L, i)) { /* text key value */
    if (lua_type(L, -2) == LUA_TSTRING) {
      luaL_tolstring(L, -1, NULL);
      lua_pushfstring(L, "%s%s %s = %s", lua_tostring(L, text), shown++ > 0 ? "," : " {",
                      lua_tostring(L, -3), lua_tostring(L, -1));
      lua_replace(L, text);
      lua_pop(L, 1);
    }
    lua_pop(L, 1);
  }
  lua_settop(L, text);
  if (shown == 0) return;
  lua_pushliteral(L, " }");
  lua_concat(L, 2);
}

static int to_line(lua_State *L) {
  lua_settop(L, 1);
  luaL_tolstring(L, 1, NULL);
  if (!lua_istable(L, 1)) return 1;
  if (lua_getmetatable(L, 1))
    lua_pop(L, 1);
  else
    add_fields(L, 1);
  return 1;
}

/* [-0, +1, -] what `to` makes of the error at i, which is on top if that can be had */
static const char *push_made(lua_State *L, int i, lua_CFunction to) {
  i = lua_absindex(L, i);
  lua_pushcfunction(L, to);
  lua_pushvalue(L, i);
  return lua_pcall(L, 1, 1, 0) == LUA_OK ? lua_tostring(L, -1)
                                         : "(an error whose __tostring fails)";
}

/* [-1, +1, m] … with the errors of the Aggregate at i, a line each; it may be among them itself */
static void add_inner(lua_State *L, int i) {
  int text = lua_gettop(L), list = text + 1;
  if (lua_getfield(L, i, "inner_exceptions") == LUA_TTABLE) {
    lua_Integer n = (lua_Integer)lua_rawlen(L, list);
    if (lua_getfield(L, list, "n") == LUA_TNUMBER) n = lua_tointeger(L, -1);
    for (lua_Integer k = 1; k <= n && k <= FIELDS; k++) {
      lua_rawgeti(L, list, k);
      const char *inner = push_made(L, -1, to_line);
      lua_pushfstring(L, "%s\n  %d. %s", lua_tostring(L, text), (int)k, inner);
      lua_replace(L, text);
      lua_settop(L, list);
    }
  }
  lua_settop(L, text);
}

static int to_text(lua_State *L) {
  to_line(L);
  if (!lua_istable(L, 1)) return 1;
  lua_pushliteral(L, "name");
  lua_rawget(L, 1);
  bool many = lua_type(L, -1) == LUA_TSTRING && strcmp(lua_tostring(L, -1), "Aggregate") == 0;
  lua_pop(L, 1);
  if (many) add_inner(L, 1);
  return 1;
}

/* [-0, +1, -] the error at i as a person is shown it */
static const char *push_text(lua_State *L, int i) { return push_made(L, i, to_text); }

/* arguments: error, task or nil */
static int default_handler(lua_State *L) {
  lua_settop(L, 2);
  const char *text = push_text(L, 1);
  if (lua_isnil(L, 2))
    fprintf(stderr, "coflow: error in a callback: %s\n", text);
  else {
    task_push_name(L, 2);
    error_trace(L, 2);
    fprintf(stderr, "coflow: unobserved error in task '%s': %s\n%s\n", lua_tostring(L, 4), text,
            lua_tostring(L, 5));
  }
  fflush(stderr);
  return 0;
}

void error_report(lua_State *L, int error, int task) {
  struct runtime *rt = runtime(L);
  error = lua_absindex(L, error);
  if (task != 0) task = lua_absindex(L, task);
  int top = lua_gettop(L);
  if (!lua_checkstack(L, 16)) return;
  if (rt->reports == NESTED_REPORTS) { /* to report one brings about the next */
    fprintf(stderr, "coflow: error while errors are reported: %s\n", push_text(L, error));
    lua_settop(L, top);
    return;
  }
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDLER) == LUA_TBOOLEAN) {
    lua_settop(L, top);
    return;
  }
  if (lua_isnil(L, -1)) {
    lua_pop(L, 1);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_REPORTER);
  }
  lua_pushvalue(L, error);
  if (task != 0)
    lua_pushvalue(L, task);
  else
    lua_pushnil(L);
  rt->reports++;
  if (schedule_call_outside(L, rt, 2) !=
      LUA_OK) { /* it is not part of the task that happens to run now */
    const char *text = push_text(L, -1);
    fprintf(stderr, "coflow: error in the handler of unobserved exceptions: %s\n", text);
  }
  rt->reports--;
  lua_settop(L, top);
}

void error_report_caught(lua_State *L) {
  struct runtime *rt = runtime(L);
  int error = lua_gettop(L), stand_in = error + 3;
  task_push(L, rt->me);
  task_push_name(L, error + 1);
  struct task *t = task_new(L, KIND_PROMISE, sizeof *t, 2, false); /* error me name task */
  lua_pushvalue(L, error + 2);
  lua_setfield(L, stand_in, "name");
  t->flags |= TASK_OBSERVED; /* it is told here */
  lua_pushvalue(L, error);
  task_settle_faulted(L, rt, stand_in, 0);
  push_trace_of(L, rt->me, error);
  attach_record(L, stand_in);
  error_report(L, error, stand_in);
  lua_settop(L, error - 1);
}

static int l_fault_gc(lua_State *L) {
  lua_settop(L, 1);
  if (!object_test(L, 1, TAG_FAULT) || lua_getiuservalue(L, 1, FAULT_TASK) != LUA_TUSERDATA)
    return 0;
  struct task *t = (struct task *)lua_touserdata(L, 2);
  if (t->state != TASK_FAULTED || t->flags & TASK_OBSERVED) return 0;
  t->flags |= TASK_OBSERVED;
  lua_getiuservalue(L, 2, TASK_RESULT);
  error_report(L, 3, 2);
  return 0;
}

/* ---- Lua face ---- */

/* "it failed: " .. err */
static int l_error_concat(lua_State *L) {
  lua_settop(L, 2);
  luaL_tolstring(L, 1, NULL);
  luaL_tolstring(L, 2, NULL);
  lua_concat(L, 2);
  return 1;
}

static int l_error_tostring(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_getfield(L, 1, "name");
  lua_getfield(L, 1, "message");
  luaL_tolstring(L, -2, NULL);
  luaL_tolstring(L, -2, NULL);
  lua_pushfstring(L, "%s: %s", lua_tostring(L, -2), lua_tostring(L, -1));
  return 1;
}

/* upvalues: runtime, anchors, kind */
static int l_error_new(lua_State *L) {
  enum error_kind kind = (enum error_kind)lua_tointeger(L, lua_upvalueindex(3));
  luaL_optstring(L, 1, "");
  if (!lua_isnoneornil(L, 2)) luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 2);
  if (lua_isnil(L, 1))
    lua_pushstring(L, error_names[kind]);
  else
    lua_pushvalue(L, 1);
  make(L, kind);
  if (lua_istable(L, 2))
    for (lua_pushnil(L); lua_next(L, 2);) { /* message fields error key value */
      lua_pushvalue(L, -2);
      lua_insert(L, -2);
      lua_pushvalue(L, -2);
      if (lua_type(L, -1) == LUA_TSTRING && (strcmp(lua_tostring(L, -1), "name") == 0 ||
                                             strcmp(lua_tostring(L, -1), "message") == 0)) {
        lua_pop(L, 3);
        continue;
      }
      lua_pop(L, 1);
      lua_rawset(L, 3);
    }
  lua_settop(L, 3);
  return 1;
}

static int l_error_is(lua_State *L) {
  luaL_checkany(L, 1);
  const char *name = luaL_checkstring(L, 2);
  bool is = false;
  for (int kind = 0; kind < ERROR_COUNT && !is; kind++)
    is = strcmp(name, error_names[kind]) == 0 && error_is(L, 1, (enum error_kind)kind);
  lua_pushboolean(L, is);
  return 1;
}

static int l_on_unobserved(lua_State *L) {
  bool none = lua_isnil(L, 1) || (lua_isboolean(L, 1) && !lua_toboolean(L, 1));
  if (!none && !lua_isfunction(L, 1) && luaL_getmetafield(L, 1, "__call") == LUA_TNIL)
    return luaL_typeerror(L, 1, "function, false or nil");
  lua_settop(L, 1);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_HANDLER);
  return 0;
}

/* report(error, task or nil): an error of a callback that has no caller, or of a task that nobody has */
static int l_report(lua_State *L) {
  luaL_checkany(L, 1);
  lua_settop(L, 2);
  if (!lua_isnil(L, 2)) task_check(L, 2);
  error_report(L, 1, lua_isnil(L, 2) ? 0 : 2);
  return 0;
}

/* failure_root(failed task), failure_root(nil, error of the running one) -> a table, one for all failures of
** one origin, or nil */
static int l_failure_root(lua_State *L) {
  lua_settop(L, 2);
  if (!lua_isnil(L, 1)) task_check(L, 1);
  push_root(L, lua_isnil(L, 1) ? 0 : 1, 2);
  return 1;
}

/* is_observed(task) -> whether somebody has seen its failure */
static int l_is_observed(lua_State *L) {
  lua_pushboolean(L, task_check(L, 1)->flags & TASK_OBSERVED);
  return 1;
}

/* error_text(value) -> what a person is shown, whatever its __tostring does */
static int l_error_text(lua_State *L) {
  luaL_checkany(L, 1);
  lua_pushstring(L, push_text(L, 1));
  return 1;
}

static const luaL_Reg functions[] = {{"on_unobserved_exception", l_on_unobserved},
                                     {"error_text", l_error_text},
                                     {"report", l_report},
                                     {"failure_root", l_failure_root},
                                     {"is_observed", l_is_observed},
                                     {NULL, NULL}};

static const luaL_Reg fault_methods[] = {{"__gc", l_fault_gc}, {NULL, NULL}};

void error_open(lua_State *L) {
  module_functions(L, functions);
  module_push_function(L, error_handler);
  lua_setfield(L, -2, "trace_handler");
  module_push_function(L, default_handler);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_REPORTER);
  module_class(L, TAG_FAULT, "coflow.Fault", fault_methods, NULL);
  module_push_function(L, leaver);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_LEAVER);
  lua_createtable(L, 0, ERROR_COUNT + 1); /* module errors */
  for (int kind = 0; kind < ERROR_COUNT; kind++) {
    lua_pushvalue(L, UP_RUNTIME);
    lua_pushvalue(L, UP_ANCHORS);
    lua_pushinteger(L, kind);
    lua_pushcclosure(L, l_error_new, 3);
    lua_setfield(L, -2, error_names[kind]);
  }
  module_push_function(L, l_error_is);
  lua_setfield(L, -2, "is");
  lua_setfield(L, -2, "errors");
}
