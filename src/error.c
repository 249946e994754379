/*
** error.c - error objects, and failures that nobody observed.
**
** An error object is a table with `name` and `message` and the metatable of its name; a value that user
** code raises is never touched. What is known about a failure stands beside it: a *fault*, a small
** userdata with a finalizer, holds the task and the trace record (trace.c). The task holds its fault in
** the user value that its waiters had. Both die in one collection, and the finalizer reports the task
** unless it was observed. Tasks that do not fail pay nothing for this.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
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

enum { FAULT_TASK = 1, FAULT_RECORD };
enum { FIELDS = 20 }; /* and errors of an Aggregate: no more are shown */
enum { NESTED_REPORTS = 8 };

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

double error_seconds(double seconds) {
  char text[32];
  snprintf(text, sizeof text, "%.6g", seconds);
  return strtod(text, NULL);
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

/* ---- failures ---- */

/* [-0, +0, m] task: gives the faulted task at index 1 its fault, with the record at index 2 */
static int attach(lua_State *L) {
  object_new(L, TAG_FAULT, sizeof(uint32_t), 2);
  runtime(L)->faults++;
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

void error_push_record(lua_State *L, int i) {
  lua_getiuservalue(L, i, TASK_WAITERS);
  if (object_test(L, -1, TAG_FAULT))
    lua_getiuservalue(L, -1, FAULT_RECORD);
  else
    lua_pushnil(L);
  lua_remove(L, -2);
}

void error_attach(lua_State *L, int i, int from) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  if (from != 0)
    error_push_record(L, from);
  else {
    lua_getiuservalue(L, i, TASK_RESULT);
    trace_push_seen(L, t, -1);
    lua_remove(L, -2);
  }
  attach_record(L, i);
}

/* ---- what a person is told ---- */

/* A text of the user may have zero bytes, so none goes through a format. */

/* [-1, +1, m] the text on top goes on with the fields of the table at i, which has no metatable */
static void add_fields(lua_State *L, int i) {
  int text = lua_gettop(L), shown = 0;
  lua_pushnil(L);
  while (shown < FIELDS && lua_next(L, i)) { /* text key value */
    if (lua_type(L, -2) == LUA_TSTRING) {
      lua_pushvalue(L, text);
      lua_pushstring(L, shown++ > 0 ? ", " : " { ");
      lua_pushvalue(L, text + 1);
      lua_pushliteral(L, " = ");
      luaL_tolstring(L, text + 2, NULL);
      lua_concat(L, 5);
      lua_replace(L, text);
    }
    lua_settop(L, text + 1);
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

struct text {
  const char *at;
  size_t length;
};

static struct text text_of(const char *s) {
  struct text t = {s, strlen(s)};
  return t;
}

/* [-0, +1, -] what `to` makes of the error at i, which is on top if that can be had */
static struct text push_made(lua_State *L, int i, lua_CFunction to) {
  struct text t;
  i = lua_absindex(L, i);
  lua_pushcfunction(L, to);
  lua_pushvalue(L, i);
  if (lua_pcall(L, 1, 1, 0) != LUA_OK) return text_of("(an error whose __tostring fails)");
  t.at = lua_tolstring(L, -1, &t.length);
  return t;
}

/* [-1, +1, m] … with the errors of the Aggregate at i, a line each; it may be among them itself */
static void add_inner(lua_State *L, int i) {
  int text = lua_gettop(L), list = text + 1;
  if (lua_getfield(L, i, "inner_exceptions") == LUA_TTABLE) {
    lua_Integer n = values_count(L, list);
    for (lua_Integer k = 1; k <= n && k <= FIELDS; k++) {
      lua_rawgeti(L, list, k);
      struct text inner = push_made(L, -1, to_line);
      lua_pushvalue(L, text);
      lua_pushfstring(L, "\n  %d. ", (int)k);
      lua_pushlstring(L, inner.at, inner.length);
      lua_concat(L, 3);
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
static struct text push_text(lua_State *L, int i) { return push_made(L, i, to_text); }

void error_push_text(lua_State *L, int i) {
  struct text text = push_text(L, i);
  lua_pushlstring(L, text.at, text.length);
  lua_replace(L, -2);
}

static void write_line(const char *what, struct text t) {
  fprintf(stderr, "coflow: %s", what);
  fwrite(t.at, 1, t.length, stderr);
  fputc('\n', stderr);
}

/* arguments: error, task or nil */
static int default_handler(lua_State *L) {
  lua_settop(L, 2);
  struct text text = push_text(L, 1);
  if (lua_isnil(L, 2))
    write_line("error in a callback: ", text);
  else {
    task_push_name(L, 2);
    trace_push(L, 2);
    write_line(lua_pushfstring(L, "unobserved error in task '%s': ", lua_tostring(L, 4)), text);
    fprintf(stderr, "%s\n", lua_tostring(L, 5));
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
    write_line("error while errors are reported: ", push_text(L, error));
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
  /* outside: it is not part of the task that happens to run now */
  if (schedule_call_outside(L, rt, 2) != LUA_OK) {
    struct text text = push_text(L, -1);
    write_line("error in the handler of unobserved exceptions: ", text);
  }
  rt->reports--;
  lua_settop(L, top);
}

void error_report_caught(lua_State *L) {
  struct runtime *rt = runtime(L);
  int error = lua_gettop(L), stand_in = error + 3;
  task_push(L, rt->me);
  task_push_name(L, error + 1);
  struct task *t = task_new_promise(L); /* error me name task */
  lua_pushvalue(L, error + 2);
  lua_setfield(L, stand_in, "name");
  t->flags |= TASK_OBSERVED; /* it is told here */
  lua_pushvalue(L, error);
  task_settle_faulted(L, rt, stand_in, 0);
  trace_push_seen(L, rt->me, error);
  attach_record(L, stand_in);
  error_report(L, error, stand_in);
  lua_settop(L, error - 1);
}

static int l_fault_gc(lua_State *L) {
  lua_settop(L, 1);
  if (!object_test(L, 1, TAG_FAULT) || lua_getiuservalue(L, 1, FAULT_TASK) != LUA_TUSERDATA)
    return 0;
  struct task *t = (struct task *)lua_touserdata(L, 2);
  lua_pushnil(L); /* once, though somebody calls it by hand */
  lua_setiuservalue(L, 1, FAULT_TASK);
  runtime(L)->faults--;
  if (t->state != TASK_FAULTED || t->flags & TASK_OBSERVED) return 0;
  t->flags |= TASK_OBSERVED;
  lua_getiuservalue(L, 2, TASK_RESULT);
  error_report(L, 3, 2);
  return 0;
}

/* report_garbage(task): reports what nobody can observe any more now, before the program ends; not that
** task, which the argument keeps alive */
static int l_report_garbage(lua_State *L) {
  if (runtime(L)->faults > 0) lua_gc(L, LUA_GCCOLLECT);
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
  lua_settop(L, 1);
  lua_getfield(L, 1, "name");
  lua_getfield(L, 1, "message");
  luaL_tolstring(L, 2, NULL);
  lua_pushliteral(L, ": ");
  luaL_tolstring(L, 3, NULL);
  lua_concat(L, 3);
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
  if (!none && !module_is_callable(L, 1)) return luaL_typeerror(L, 1, "function, false or nil");
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

/* is_observed(task) -> whether somebody has seen its failure */
static int l_is_observed(lua_State *L) {
  lua_pushboolean(L, task_check(L, 1)->flags & TASK_OBSERVED);
  return 1;
}

/* error_text(value) -> what a person is shown, whatever its __tostring does */
static int l_error_text(lua_State *L) {
  luaL_checkany(L, 1);
  error_push_text(L, 1);
  return 1;
}

static const luaL_Reg functions[] = {{"on_unobserved_exception", l_on_unobserved},
                                     {"error_text", l_error_text},
                                     {"report", l_report},
                                     {"report_garbage", l_report_garbage},
                                     {"is_observed", l_is_observed},
                                     {NULL, NULL}};

static const luaL_Reg fault_methods[] = {{"__gc", l_fault_gc}, {NULL, NULL}};

void error_open(lua_State *L) {
  module_functions(L, functions);
  module_push_function(L, default_handler);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_REPORTER);
  module_class(L, TAG_FAULT, "coflow.Fault", fault_methods, NULL);
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
