/*
** module.c - luaopen_coflow_core, and what every other file needs to define classes.
**
** The module's state is one userdata, the runtime, at a registry key with a static address; there are
** no C globals (but for what is the process's own), so any number of Lua states may each open the
** module. Every function is a closure over the runtime and the anchors (core.h), which are at hand
** there.
**
** A class is a metatable whose __index function looks into the table of its methods and properties.
** The latter are C functions called with the object, kept as light userdata so that reading
** `task.status` costs one call.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static const char runtime_key = 0;

/* Tables made of the right size open sooner. */
enum { METATABLE_FIELDS = 8, MODULE_FIELDS = 64 };

/* ---- objects ---- */

void *object_new(lua_State *L, uint32_t tag, size_t size, int uservalues) {
  uint32_t *o = (uint32_t *)lua_newuserdatauv(L, size, uservalues);
  memset(o, 0, size);
  *o = tag;
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(tag));
  lua_setmetatable(L, -2);
  return o;
}

void *module_resize(lua_State *L, void *block, size_t from, size_t to) {
  void *ud;
  lua_Alloc alloc = lua_getallocf(L, &ud);
  return alloc(ud, block, from, to);
}

void module_push_table(lua_State *L, int i, int uservalue) {
  if (i < 0) i = lua_absindex(L, i);
  if (lua_getiuservalue(L, i, uservalue) != LUA_TNIL) return;
  lua_pop(L, 1);
  lua_createtable(L, 1, 0);
  if (lua_getiuservalue(L, i, uservalue) == LUA_TNIL) {
    lua_pop(L, 1);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, i, uservalue);
  } else
    lua_remove(L, -2); /* a finalizer has made one */
}

/* ---- classes ---- */

void module_push_function(lua_State *L, lua_CFunction f) {
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_pushcclosure(L, f, 2);
}

void module_functions(lua_State *L, const luaL_Reg *functions) {
  for (; functions->name; functions++) {
    if (functions->func == NULL) continue;
    module_push_function(L, functions->func);
    lua_setfield(L, -2, functions->name);
  }
}

static int l_newindex(lua_State *L) {
  lua_settop(L, 2);
  luaL_tolstring(L, 2, NULL);
  luaL_tolstring(L, 1, NULL);
  return luaL_error(L, "field '%s' of '%s' cannot be assigned", lua_tostring(L, 3),
                    lua_tostring(L, 4));
}

/* upvalues: runtime, anchors, methods and properties */
static int l_index(lua_State *L) {
  if (lua_gettop(L) != 2) lua_settop(L, 2);
  if (lua_gettable(L, lua_upvalueindex(3)) != LUA_TLIGHTUSERDATA) return 1;
  lua_CFunction get;
  void *p = lua_touserdata(L, -1);
  memcpy(&get, &p, sizeof p);
  lua_settop(L, 1);
  return get(L);
}

static int count(const luaL_Reg *functions) {
  int n = 0;
  while (functions && functions[n].name) n++;
  return n;
}

void module_class(lua_State *L, uint32_t tag, const char *name, const luaL_Reg *methods,
                  const luaL_Reg *properties) {
  lua_createtable(L, 0, METATABLE_FIELDS); /* metatable */
  lua_pushstring(L, name);
  lua_setfield(L, -2, "__name");
  lua_pushboolean(L, 0);
  lua_setfield(L, -2, "__metatable");
  lua_pushcfunction(L, l_newindex);
  lua_setfield(L, -2, "__newindex");
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_createtable(L, 0, count(methods) + count(properties)); /* metatable runtime anchors methods */
  for (; methods->name; methods++) {
    module_push_function(L, methods->func);
    if (strncmp(methods->name, "__", 2) == 0 && strcmp(methods->name, "__await") != 0)
      lua_setfield(L, -5, methods->name);
    else
      lua_setfield(L, -2, methods->name);
  }
  lua_pushvalue(L, -1);
  lua_setfield(L, -5, "methods"); /* the library adds to them; not visible to scripts */
  if (properties != NULL) {
    for (; properties->name; properties++) {
      void *p;
      memcpy(&p, &properties->func, sizeof p);
      lua_pushlightuserdata(L, p);
      lua_setfield(L, -2, properties->name);
    }
    lua_pushcclosure(L, l_index, 3);
  } else { /* the methods themselves */
    lua_replace(L, -3);
    lua_pop(L, 1);
  }
  lua_setfield(L, -2, "__index");
  lua_rawseti(L, UP_ANCHORS, TAG_CLASS(tag));
}

void module_methods(lua_State *L, uint32_t tag, const luaL_Reg *methods) {
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(tag));
  lua_getfield(L, -1, "methods");
  module_functions(L, methods);
  lua_pop(L, 2);
}

void module_finalized(lua_State *L, uint32_t tag, uint32_t twin, lua_CFunction gc) {
  lua_newtable(L);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(tag));
  for (lua_pushnil(L); lua_next(L, -2);) {
    lua_pushvalue(L, -2);
    lua_insert(L, -2);
    lua_rawset(L, -5);
  }
  lua_pop(L, 1);
  module_push_function(L, gc);
  lua_setfield(L, -2, "__gc");
  lua_rawseti(L, UP_ANCHORS, TAG_CLASS(twin));
}

/* ---- arguments ---- */

double module_seconds(lua_State *L, int i) {
  lua_Number s = luaL_checknumber(L, i);
  luaL_argcheck(L, s >= 0, i, s < 0 ? "seconds must not be negative" : "seconds must not be NaN");
  return (double)s;
}

bool module_is_callable(lua_State *L, int i) {
  if (lua_isfunction(L, i)) return true;
  if (luaL_getmetafield(L, i, "__call") == LUA_TNIL) return false;
  lua_pop(L, 1);
  return true;
}

void module_check_function(lua_State *L, int n, int i) {
  if (!module_is_callable(L, i)) blame_type(L, n, "function", i);
}

/* [-0, +1, m] the message for the key on top, which is none of these n names */
static const char *push_unknown(lua_State *L, const char **names, int n) {
  luaL_Buffer b;
  const char *key = luaL_tolstring(L, -1, NULL);
  for (int i = 1; i < n; i++) /* in order */
    for (int k = i; k > 0 && strcmp(names[k - 1], names[k]) > 0; k--) {
      const char *name = names[k];
      names[k] = names[k - 1];
      names[k - 1] = name;
    }
  luaL_buffinit(L, &b);
  for (int i = 0; i < n; i++) {
    luaL_addstring(&b, i == 0 ? ": known are " : ", ");
    luaL_addstring(&b, names[i]);
  }
  luaL_pushresult(&b);
  return lua_pushfstring(L, "unknown option '%s'%s", key, lua_tostring(L, -1));
}

enum { MAX_OPTIONS = 32 }; /* that are listed */

void module_check_options(lua_State *L, int i, const char *const names[]) {
  luaL_checktype(L, i, LUA_TTABLE);
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    const char *const *name = names;
    if (lua_type(L, -2) == LUA_TSTRING)
      while (*name && strcmp(*name, lua_tostring(L, -2)) != 0) name++;
    else
      while (*name) name++;
    if (*name == NULL) {
      const char *known[MAX_OPTIONS];
      int n = 0;
      for (; names[n] != NULL && n < MAX_OPTIONS; n++) known[n] = names[n];
      lua_pushvalue(L, -2);
      luaL_argerror(L, i, push_unknown(L, known, n));
    }
  }
}

/* ---- values as one ---- */

void values_pack(lua_State *L, int n) {
  lua_createtable(L, n, 1); /* v1 … vn table */
  lua_insert(L, -(n + 1));
  for (int k = n; k >= 1; k--) lua_rawseti(L, -(k + 1), k);
  lua_pushinteger(L, n);
  lua_setfield(L, -2, "n");
}

void values_mark(lua_State *L, int i, lua_Integer n) {
  bool holes = (lua_Integer)lua_rawlen(L, i) != n;
  i = lua_absindex(L, i);
  for (lua_Integer k = 1; k <= n && !holes; k++) {
    holes = lua_rawgeti(L, i, k) == LUA_TNIL;
    lua_pop(L, 1);
  }
  lua_pushliteral(L, "n");
  holes ? lua_pushinteger(L, n) : lua_pushnil(L);
  lua_rawset(L, i);
}

lua_Integer values_count(lua_State *L, int i) {
  lua_Integer n = lua_getfield(L, i, "n") == LUA_TNUMBER ? lua_tointeger(L, -1) : -1;
  lua_pop(L, 1);
  return n >= 0 ? n : (lua_Integer)lua_rawlen(L, i);
}

int values_unpack(lua_State *L) {
  int table = lua_gettop(L), n = (int)values_count(L, table);
  luaL_checkstack(L, n, "too many values");
  for (int k = 1; k <= n; k++) lua_rawgeti(L, table, k);
  lua_remove(L, table);
  return n;
}

/* ---- slot tables: a free slot holds the number of the next free one; 0 ends the chain ---- */

int slots_add(lua_State *L, int i, int *first_free) {
  int slot = *first_free;
  if (slot == 0)
    slot = (int)lua_rawlen(L, i) + 1;
  else {
    lua_rawgeti(L, i, slot);
    *first_free = (int)lua_tointeger(L, -1);
    lua_pop(L, 1);
  }
  lua_rawseti(L, i, slot);
  return slot;
}

void slots_free(lua_State *L, int i, int *first_free, int slot) {
  lua_pushinteger(L, *first_free);
  lua_rawseti(L, i < 0 && i > LUA_REGISTRYINDEX ? i - 1 : i, slot);
  *first_free = slot;
}

/* ---- Lua face ---- */

/* mark_count(list, n) -> list: values_mark */
static int l_mark_count(lua_State *L) {
  lua_settop(L, 2);
  values_mark(L, 1, lua_tointeger(L, 2));
  lua_settop(L, 1);
  return 1;
}

/* methods(class name) -> the table of its methods, for the library to add those written in Lua */
static int l_methods(lua_State *L) {
  const char *name = luaL_checkstring(L, 1);
  for (lua_Integer class = TAG_FIRST; class <= TAG_LAST; class ++) {
    if (lua_rawgeti(L, UP_ANCHORS, class) != LUA_TTABLE) { /* not made yet */
      lua_pop(L, 1);
      continue;
    }
    lua_getfield(L, -1, "__name");
    if (strcmp(lua_tostring(L, -1), name) == 0) {
      lua_getfield(L, -2, "methods");
      return 1;
    }
    lua_pop(L, 2);
  }
  return luaL_argerror(L, 1, "no such class");
}

/* take(names, t) -> t, into which the fields of this module with those names have been put (which takes
** a tenth of the time that compiling as many assignments would) */
static int l_take(lua_State *L) {
  const char *names = luaL_checkstring(L, 1);
  luaL_checktype(L, 2, LUA_TTABLE);
  lua_settop(L, 2);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_MODULE);
  for (const char *end; *names; names = end) {
    for (end = names; (unsigned char)*end > ' ';) end++;
    if (end == names) { /* white space */
      end++;
      continue;
    }
    lua_pushlstring(L, names, (size_t)(end - names));
    lua_pushvalue(L, -1); /* names t module name name */
    if (lua_gettable(L, 3) == LUA_TNIL)
      return luaL_error(L, "coflow.core has no '%s'", lua_tostring(L, 4));
    lua_rawset(L, 2);
  }
  lua_settop(L, 2);
  return 1;
}

/* [-0, +0, v] the module coflow.<name> could not be loaded: raises the error on top, or why the file
** cannot be read now, if that is all */
static void refuse_module(lua_State *L, const char *name) {
  const struct runtime *rt = runtime(L);
  if (rt->library_length > 0) {
    const char *path = lua_pushfstring(L, "%s%s.lua", rt->library + 1, name);
    FILE *file = fopen(path, "r");
    if (file != NULL)
      fclose(file);
    else if (errno == EMFILE || errno == ENFILE)
      io_push_error(L, uv_translate_sys_error(errno), "require", path);
    if (!lua_istable(L, -1)) lua_pop(L, 1);
  }
  lua_error(L);
}

/* All that is loaded when it is first used comes in this way. */
void module_push(lua_State *L, const char *name) {
  lua_getglobal(L, "require");
  lua_pushfstring(L, "coflow.%s", name);
  if (lua_pcall(L, 1, 1, 0) != LUA_OK) refuse_module(L, name);
}

/* require(name) -> the module coflow.<name>, in a function: there may be no descriptor to read it with */
static int l_require(lua_State *L) {
  module_push(L, luaL_checkstring(L, 1));
  return 1;
}

/* upvalues: runtime, anchors, " field=module …": the __index of a table made by late */
static int l_late_index(lua_State *L) {
  size_t n;
  const char *key = lua_type(L, 2) == LUA_TSTRING ? lua_tolstring(L, 2, &n) : NULL;
  const char *p = lua_tostring(L, lua_upvalueindex(3));
  lua_settop(L, 2);
  if (key == NULL || n == 0 || (unsigned char)key[0] <= ' ') return 0;
  while ((p = strstr(p, key)) != NULL && (p[-1] > ' ' || p[n] != '=')) p += n;
  if (p == NULL) return 0;
  const char *name = p += n + 1;
  while ((unsigned char)*p > ' ') p++;
  lua_pushlstring(L, name, (size_t)(p - name));
  module_push(L, lua_tostring(L, 3)); /* table key name module */
  lua_pushvalue(L, 2);
  if (lua_rawget(L, 1) != LUA_TNIL) return 1; /* the module has put it there */
  lua_pushvalue(L, 2);
  if (lua_gettable(L, 4) == LUA_TNIL && lua_rawequal(L, 2, 3)) lua_pushvalue(L, 4);
  lua_pushvalue(L, 2);
  lua_pushvalue(L, -2);
  lua_rawset(L, 1);
  return 1;
}

/* [-0, +0, m] notes where the Lua files of the library are: in the directory of the module that opens
** the core, on the stack */
ONCE static void find_library(lua_State *L, struct runtime *rt) {
  lua_Debug ar;
  size_t n = 0;
  for (int level = 1; n == 0 && lua_getstack(L, level, &ar); level++) {
    if (lua_getlocal(L, &ar, -1) == NULL)
      continue; /* else a chunk, perhaps, whose argument is its name */
    const char *name = lua_tostring(L, -1);
    lua_getinfo(L, "S", &ar);
    if (*ar.what == 'm' && *ar.source == '@' && name != NULL &&
        (strcmp(name, "coflow") == 0 || strncmp(name, "coflow.", 7) == 0))
      for (const char *p = ar.source; (p = strstr(p, "coflow/")) != NULL; p += 7)
        n = (size_t)(p + 7 - ar.source);
    lua_pop(L, 1);
  }
  if (n == 0 || n >= sizeof rt->library) return;
  memcpy(rt->library, ar.source, n);
  rt->library_length = n;
}

/* late(t, "field=module …") -> t: its fields come, when they are first read, from the Lua module
** coflow.x, which puts them into t or has them; what has the module's own name may be the module
** itself */
static int l_late(lua_State *L) {
  if (runtime(L)->library_length == 0) find_library(L, runtime(L)); /* it was no file of ours */
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_pushfstring(L, " %s", luaL_checkstring(L, 2));
  lua_replace(L, 2);
  lua_settop(L, 2);
  lua_createtable(L, 0, 1);
  lua_pushvalue(L, UP_RUNTIME);
  lua_pushvalue(L, UP_ANCHORS);
  lua_pushvalue(L, 2);
  lua_pushcclosure(L, l_late_index, 3);
  lua_setfield(L, 3, "__index");
  lua_setmetatable(L, 1);
  lua_settop(L, 1);
  return 1;
}

/* argument_error(n, message) */
static int l_argument_error(lua_State *L) {
  return blame(L, (int)luaL_checkinteger(L, 1), luaL_checkstring(L, 2));
}

/* type_error(n, expected, value) */
static int l_type_error(lua_State *L) {
  lua_settop(L, 3);
  return blame_type(L, (int)luaL_checkinteger(L, 1), luaL_checkstring(L, 2), 3);
}

/* check_function(n, value) */
static int l_check_function(lua_State *L) {
  lua_settop(L, 2);
  module_check_function(L, (int)luaL_checkinteger(L, 1), 2);
  return 0;
}

/* is_callable(value) */
static int l_is_callable(lua_State *L) {
  luaL_checkany(L, 1);
  lua_pushboolean(L, module_is_callable(L, 1));
  return 1;
}

/* refuse_self(class, value): for a method of a class written in Lua, whose metatable that is */
static int l_refuse_self(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_settop(L, 2);
  return blame_self(L, 1, 2);
}

/* check_class(n, value, "coflow.Class") */
static int l_check_class(lua_State *L) {
  const char *name = luaL_checkstring(L, 3);
  lua_settop(L, 3);
  if (lua_isuserdata(L, 2) && luaL_getmetafield(L, 2, "__name") == LUA_TSTRING &&
      strcmp(lua_tostring(L, -1), name) == 0 && lua_getmetatable(L, 2)) {
    for (lua_Integer class = TAG_FIRST; class <= TAG_LAST; class ++) {
      lua_rawgeti(L, UP_ANCHORS, class);
      if (lua_rawequal(L, -1, -2)) return 0;
      lua_pop(L, 1);
    }
  }
  lua_settop(L, 3);
  return blame_type(L, (int)luaL_checkinteger(L, 1), name, 2);
}

/* check_options(n, options or nil, known) -> options: a table with keys of `known` only */
static int l_check_options(lua_State *L) {
  int n = (int)luaL_checkinteger(L, 1);
  lua_settop(L, 3);
  if (lua_isnil(L, 2)) {
    lua_newtable(L);
    return 1;
  }
  if (!lua_istable(L, 2)) return blame_type(L, n, "table of options", 2);
  for (lua_pushnil(L); lua_next(L, 2); lua_pop(L, 1)) {
    lua_pushvalue(L, -2);
    if (lua_rawget(L, 3) == LUA_TNIL) {
      const char *known[MAX_OPTIONS];
      int count = 0;
      lua_settop(L, 4); /* n options known key */
      lua_pushnil(L);
      while (count < MAX_OPTIONS && lua_next(L, 3)) {
        known[count++] = lua_tostring(L, -2); /* held by that table */
        lua_pop(L, 1);
      }
      lua_settop(L, 4);
      return blame(L, n, push_unknown(L, known, count));
    }
    lua_pop(L, 1);
  }
  lua_settop(L, 2);
  return 1;
}

static int l_runtime_gc(lua_State *L) {
  struct runtime *rt = (struct runtime *)lua_touserdata(L, 1);
  if (!rt->closed) shutdown_run(L, rt);
  return 0;
}

static const luaL_Reg functions[] = {{"methods", l_methods},
                                     {"mark_count", l_mark_count},
                                     {"take", l_take},
                                     {"late", l_late},
                                     {"require", l_require},
                                     {"argument_error", l_argument_error},
                                     {"type_error", l_type_error},
                                     {"check_function", l_check_function},
                                     {"is_callable", l_is_callable},
                                     {"refuse_self", l_refuse_self},
                                     {"check_class", l_check_class},
                                     {"check_options", l_check_options},
                                     {NULL, NULL}};

static const struct part *const parts[] = {
    &periodic_part, &group_part,  &channel_part,  &select_part, &sync_part,   &coroutine_part,
    &testing_part,  &signal_part, &fs_part,       &dns_part,    &tcp_part,    &process_part,
    &udp_part,      &stdio_part,  &schedule_part, &probe_part,  &survey_part,
};

/* whether it puts that name into the module */
static bool part_has(const struct part *part, const char *name) {
  if (part->table != NULL) return strcmp(part->table, name) == 0;
  const luaL_Reg *f = part->functions;
  while (f->name != NULL && strcmp(f->name, name) != 0) f++;
  return f->name != NULL;
}

/* [-0, +0, m] opens a part of the module on top; its functions come last, when they can be called */
static void open_part(lua_State *L, const struct part *part) {
  if (part->open != NULL) part->open(L);
  if (part->table != NULL) lua_newtable(L);
  module_functions(L, part->functions);
  if (part->table != NULL) lua_setfield(L, -2, part->table);
}

/* the __index of the module */
static int l_part(lua_State *L) {
  const char *name = lua_type(L, 2) == LUA_TSTRING ? lua_tostring(L, 2) : "";
  lua_settop(L, 2);
  for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
    if (part_has(parts[i], name)) {
      lua_pushvalue(L, 1);
      open_part(L, parts[i]);
      lua_settop(L, 2);
      lua_rawget(L, 1);
      return 1;
    }
  return 0;
}

/* upvalues: runtime, anchors */
static int open_all(lua_State *L) {
  lua_createtable(L, 0, MODULE_FIELDS);
  module_functions(L, functions);
  error_open(L);
  trace_open(L);
  context_open(L);
  guard_open(L);
  task_open(L);
  fiber_abandon_open(L);
  scope_open(L);
  fiber_open(L);
  fiber_await_open(L);
  combine_open(L);
  direct_open(L);
  cancel_open(L);
  source_open(L);
  timer_open(L);
  loop_open(L);
  lua_createtable(L, 0, 1);
  module_push_function(L, l_part);
  lua_setfield(L, -2, "__index");
  lua_setmetatable(L, -2);
  return 1;
}

/* [-0, +1, m] a new table, also kept in that user value of the runtime on top; weak if told */
static void runtime_table(lua_State *L, int n, const char *mode) {
  lua_newtable(L);
  if (mode) {
    lua_newtable(L);
    lua_pushstring(L, mode);
    lua_setfield(L, -2, "__mode");
    lua_setmetatable(L, -2);
  }
  lua_setiuservalue(L, -2, n);
}

static void runtime_new(lua_State *L) {
  struct runtime *rt =
      (struct runtime *)lua_newuserdatauv(L, sizeof(struct runtime), RUNTIME_UV_COUNT);
  memset(rt, 0, sizeof *rt);
  rt->closed = true; /* nothing to close before loop_init */
  runtime_table(L, RUNTIME_ANCHORS, NULL);
  runtime_table(L, RUNTIME_ERRORS, NULL);
  runtime_table(L, RUNTIME_TRACES, NULL);
  runtime_table(L, RUNTIME_LABELS, NULL);
  runtime_table(L, RUNTIME_NAMES, "k");
  runtime_table(L, RUNTIME_IDS, "k");
  runtime_table(L, RUNTIME_LOCALS, "v");
  runtime_table(L, RUNTIME_WATCHED, "v");
  runtime_table(L, RUNTIME_WEAK, "v");
  runtime_table(L, RUNTIME_TOKENS, "k");
  runtime_table(L, RUNTIME_PLANS, "k");
  runtime_table(L, RUNTIME_HANDED, "v");
  runtime_table(L, RUNTIME_GIVEN, "k");
  runtime_table(L, RUNTIME_COROUTINES, "k");
  runtime_table(L, RUNTIME_TIMERS, NULL);
  lua_getiuservalue(L, -1, RUNTIME_ANCHORS);
  for (lua_Integer class = 1; class <= TAG_LAST;
       class ++) { /* no free slot; room for the metatables */
    lua_pushinteger(L, 0);
    lua_rawseti(L, -2, class);
  }
  lua_pop(L, 1);
  lua_rawgeti(L, LUA_REGISTRYINDEX, LUA_RIDX_MAINTHREAD);
  rt->main = lua_tothread(L, -1);
  lua_pop(L, 1);
  lua_newtable(L);
  lua_pushcfunction(L, l_runtime_gc);
  lua_setfield(L, -2, "__gc");
  lua_setmetatable(L, -2);
  loop_init(rt);
}

/* ---- which Lua ---- */

ONCE static int l_raise_true(lua_State *L) {
  lua_pushboolean(L, 1);
  return lua_error(L);
}

/* raises false, and while that unwinds a __close metamethod raises true */
ONCE static int l_raise_both(lua_State *L) {
  lua_newtable(L);
  lua_createtable(L, 0, 1);
  lua_pushcfunction(L, l_raise_true);
  lua_setfield(L, -2, "__close");
  lua_setmetatable(L, -2);
  lua_toclose(L, -1);
  lua_pushboolean(L, 0);
  return lua_error(L);
}

/* [-0, +0, e] Since Lua 5.4.3 a __close metamethod may wait, and its error takes the place of the one that
** unwinds: scopes end so. One library serves all of 5.4, so it is not the headers that tell. */
ONCE static void check_lua(lua_State *L) {
  luaL_checkversion(L);
  lua_pushcfunction(L, l_raise_both);
  lua_pcall(L, 0, 0, 0);
  if (!lua_toboolean(L, -1))
    luaL_error(L, "coflow needs Lua 5.4.3 or later: in this older one a __close metamethod can "
                  "neither wait nor raise");
  lua_pop(L, 1);
}

__attribute__((visibility("default"))) int luaopen_coflow_core(lua_State *L);

int luaopen_coflow_core(lua_State *L) {
  if (lua_rawgetp(L, LUA_REGISTRYINDEX, &runtime_key) == LUA_TNIL) {
    check_lua(L);
    runtime_new(L); /* nil runtime */
    lua_replace(L, -2);
    find_library(L, (struct runtime *)lua_touserdata(L, -1));
    lua_pushvalue(L, -1);
    lua_getiuservalue(L, -1, RUNTIME_ANCHORS);
    lua_pushcclosure(L, open_all, 2);
    lua_call(L, 0, 1); /* runtime module */
    lua_newtable(L);   /* a proxy, so that tracebacks find no other name for flow's functions */
    lua_createtable(L, 0, 1);
    lua_pushvalue(L, -3);
    lua_setfield(L, -2, "__index");
    lua_setmetatable(L, -2);
    lua_setiuservalue(L, -3, RUNTIME_MODULE);
    lua_pop(L, 1);
    lua_pushvalue(L, -1);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &runtime_key);
  }
  lua_getiuservalue(L, -1, RUNTIME_MODULE); /* loaded again: the same classes on the same loop */
  return 1;
}
