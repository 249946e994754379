/*
** blame.c - wrong arguments: what the error says, and of whom.
**
** Lua's own checks call a function by the name that its caller has for it, and tell that caller's line.
** Where the caller is one of ours, as in `flow.call(flow.sleep, "x")`, that would be 'fn', at a line of
** the library; where it is C, as for the function of a task, '?'. So ours go by the name under which a
** user knows the function (coflow.sleep, coflow.Channel:write) there, and by the line of the innermost
** caller that is not the library's. And where a method has got no object of its class, the error says
** how methods are called.
**
** There are two ways in. A function of C finds its own arguments wrong: the checks of verbs.h, which
** stand in for Lua's. Or it finds those of a public function in Lua wrong, which has called it, itself
** or through helpers.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

/* ---- names ---- */

/* [-0, +n, m] "coflow.f" or "coflow.Class.f" of the function on top, which C has called without a name;
** or false */
static bool push_public_name(lua_State *L) {
  int fn = lua_gettop(L);
  luaL_checkstack(L, 10, NULL);
  luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
  lua_getfield(L, -1, "coflow");
  if (!lua_istable(L, -1)) return false;
  for (lua_pushnil(L); lua_next(L, fn + 2); lua_pop(L, 1))
    if (lua_type(L, fn + 3) == LUA_TSTRING && lua_rawequal(L, -1, fn)) {
      lua_pushfstring(L, "coflow.%s", lua_tostring(L, fn + 3));
      return true;
    }
  for (lua_pushnil(L); lua_next(L, fn + 2);
       lua_pop(L, 1)) { /* what is also a method comes second */
    if (lua_type(L, fn + 3) != LUA_TSTRING || !lua_istable(L, -1)) continue;
    for (lua_pushnil(L); lua_next(L, fn + 4); lua_pop(L, 1))
      if (lua_type(L, fn + 5) == LUA_TSTRING && lua_rawequal(L, -1, fn)) {
        lua_pushfstring(L, "coflow.%s.%s", lua_tostring(L, fn + 3), lua_tostring(L, fn + 5));
        return true;
      }
  }
  return false;
}

/* [-0, +1, m] "coflow.Class:f", if the class whose metatable is at i has the function at fn; false:
** [-0, +0] */
static bool push_method_of(lua_State *L, int i, int fn) {
  int top = lua_gettop(L);
  lua_pushliteral(L, "__name");
  if (lua_rawget(L, i) == LUA_TSTRING) {
    lua_pushliteral(L, "methods"); /* else its __index is the table of these */
    if (lua_rawget(L, i) != LUA_TTABLE) {
      lua_pop(L, 1);
      lua_pushliteral(L, "__index");
      lua_rawget(L, i);
    }
    if (lua_istable(L, -1))
      for (lua_pushnil(L); lua_next(L, top + 2); lua_pop(L, 1)) { /* name methods key value */
        if (lua_type(L, -2) != LUA_TSTRING || !lua_rawequal(L, -1, fn)) continue;
        lua_pushfstring(L, "%s:%s", lua_tostring(L, top + 1), lua_tostring(L, -2));
        lua_replace(L, top + 1);
        lua_settop(L, top + 1);
        return true;
      }
  }
  lua_settop(L, top);
  return false;
}

/* [-0, +1, m] the same for the function at fn, of any class written in C */
static bool push_method(lua_State *L, int fn) {
  for (lua_Integer class = TAG_FIRST; class <= TAG_LAST; class ++) {
    int at = lua_gettop(L) + 1;
    bool found = lua_rawgeti(L, UP_ANCHORS, class) == LUA_TTABLE && push_method_of(L, at, fn);
    lua_remove(L, at);
    if (found) return true;
  }
  return false;
}

/* [-0, +1, m] "module.f" of the function at fn, the last value, which a loaded module has in its table;
** or false */
static bool push_module_name(lua_State *L, int fn) {
  bool found = false;
  luaL_checkstack(L, 10, NULL);
  luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
  for (lua_pushnil(L); !found && lua_next(L, fn + 1);) { /* loaded name module */
    if (lua_type(L, fn + 2) == LUA_TSTRING && lua_istable(L, fn + 3))
      for (lua_pushnil(L); !found && lua_next(L, fn + 3);) { /* … key value */
        found = lua_type(L, fn + 4) == LUA_TSTRING && lua_rawequal(L, -1, fn);
        if (!found) lua_pop(L, 1);
      }
    if (!found) lua_settop(L, fn + 2);
  }
  if (!found) {
    lua_settop(L, fn);
    return false;
  }
  if (strcmp(lua_tostring(L, fn + 2), LUA_GNAME) == 0)
    lua_pushvalue(L, fn + 4);
  else
    lua_pushfstring(L, "%s.%s", lua_tostring(L, fn + 2), lua_tostring(L, fn + 4));
  lua_replace(L, fn + 1);
  lua_settop(L, fn + 1);
  return true;
}

void blame_push_name(lua_State *L) {
  int fn = lua_gettop(L);
  if (push_public_name(L)) {
    lua_replace(L, fn + 1);
    lua_settop(L, fn + 1);
    return;
  }
  lua_settop(L, fn);
  if (!push_method(L, fn) && !push_module_name(L, fn)) lua_pushliteral(L, "[C]");
}

/* [-0, +1, m] what the user calls the function at fn, which is that of `ar`; "?": that is not known. A
** class that is written in Lua is known by its object, the first argument, or by its metatable at
** `class`, if that is not 0. Returns whether it is a method, and no function besides. */
static bool push_known_name(lua_State *L, lua_Debug *ar, int fn, int class) {
  int top = lua_gettop(L);
  lua_pushvalue(L, fn);
  if (push_public_name(L)) {
    lua_replace(L, top + 1);
    lua_settop(L, top + 1);
    return false;
  }
  lua_settop(L, top);
  if (push_method(L, fn) || (class != 0 && push_method_of(L, class, fn))) return true;
  lua_getinfo(L, "u", ar);
  bool variable = ar->nparams == 0 && !lua_iscfunction(L, fn); /* the arguments have no names */
  bool is_method = lua_getlocal(L, ar, variable ? -1 : 1) != NULL && lua_getmetatable(L, top + 1) &&
                   push_method_of(L, top + 2, fn);
  if (!is_method) { /* of a module that is no field of ours yet */
    lua_settop(L, top);
    lua_pushvalue(L, fn);
    if (!push_module_name(L, top + 1)) lua_pushliteral(L, "?");
  }
  lua_insert(L, top + 1);
  lua_settop(L, top + 1);
  return is_method;
}

/* ---- of whom ---- */

bool blame_find_line(lua_State *L, lua_State *at, int level, lua_Debug *ar) {
  /* where there are so many tail calls they have taken those of users away, and there is no end of ours */
  for (int tails = 0; tails < 100 && lua_getstack(at, level, ar); level++) {
    lua_getinfo(at, "Slt", ar);
    if (ar->currentline > 0 && !module_is_ours(runtime(L), ar->source)) return true;
    tails += ar->istailcall != 0;
  }
  return false;
}

void blame_push_place(lua_State *L, int level) {
  lua_Debug ar;
  if (blame_find_line(L, L, level, &ar))
    lua_pushfstring(L, "%s:%d", ar.short_src, ar.currentline);
  else
    lua_pushliteral(L, "a tail call");
}

static bool is_ours_at(lua_State *L, int level) {
  lua_Debug ar;
  return lua_getstack(L, level, &ar) && lua_getinfo(L, "S", &ar) &&
         module_is_ours(runtime(L), ar.source);
}

/* Ours call what a user gave them by this name, and no other function of C. */
static bool is_called_fn(const lua_Debug *ar) {
  return strcmp(ar->namewhat, "local") == 0 && strcmp(ar->name, "fn") == 0;
}

/* whether the user has called that function of ours, by a function that is gone or by one of ours that
** calls `fn` */
static bool is_called_for_user(lua_State *L, lua_Debug *ar) {
  int top = lua_gettop(L);
  lua_getinfo(L, "ntf", ar);
  bool is = ar->istailcall ? push_public_name(L) : is_called_fn(ar);
  lua_settop(L, top);
  return is;
}

/* What is wrong with an argument. */
struct wrong {
  int n;
  const char *message;
  bool self; /* it is no object of the class that is expected … */
  int class; /* … whose metatable is at this index, if it is written in Lua; or 0 */
};

/* [-0, +0, v] an argument of the function at that level, which has been called for the user, or else by
** the name that its caller has for it */
static int accuse(lua_State *L, int level, bool for_user, const struct wrong *w) {
  lua_Debug ar;
  int n = w->n;
  luaL_checkstack(L, 20, NULL);
  lua_getstack(L, level, &ar);
  lua_getinfo(L, "nf", &ar);
  bool named = !for_user && ar.name != NULL;
  bool on_object = named && strcmp(ar.namewhat, "method") == 0;
  bool is_method = push_known_name(L, &ar, lua_gettop(L), w->class) || w->class != 0;
  const char *name = named ? ar.name : lua_tostring(L, -1), *message = w->message;
  if (w->self && n == 1 && !on_object && is_method)
    message =
        lua_pushfstring(L, "%s: %s", message,
                        named ? "use ':' to call a method" : "a method takes its object first");
  do level++;
  while (is_ours_at(L, level));
  luaL_where(L, level);
  if (on_object && --n == 0)
    lua_pushfstring(L, "calling '%s' on bad self (%s)", name, message);
  else
    lua_pushfstring(L, "bad argument #%d to '%s' (%s)", n, name, message);
  lua_concat(L, 2);
  return lua_error(L);
}

/* ---- the arguments of the running function ---- */

static int raise_own(lua_State *L, const struct wrong *w) {
  lua_Debug ar;
  lua_getstack(L, 0, &ar);
  lua_getinfo(L, "n", &ar);
  return accuse(L, 0, is_called_fn(&ar) && is_ours_at(L, 1), w);
}

/* [-0, +1, m] what there is at i */
static const char *push_got(lua_State *L, int i) {
  if (luaL_getmetafield(L, i, "__name") == LUA_TSTRING) return lua_tostring(L, -1);
  if (lua_type(L, i) == LUA_TLIGHTUSERDATA) return lua_pushliteral(L, "light userdata");
  return lua_pushstring(L, luaL_typename(L, i));
}

/* whether it is the name of a class of ours, and the argument that must be of that class may be a
** method's object */
static bool is_class(const char *expected) { return strncmp(expected, "coflow.", 7) == 0; }

int blame_argument(lua_State *L, int i, const char *message) {
  struct wrong w = {i, message, false, 0};
  return raise_own(L, &w);
}

int blame_argument_type(lua_State *L, int i, const char *expected) {
  const char *got = push_got(L, i);
  struct wrong w = {i, lua_pushfstring(L, "%s expected, got %s", expected, got), is_class(expected),
                    0};
  return raise_own(L, &w);
}

void *blame_object(lua_State *L, int i, uint32_t tag) {
  const char *got =
      push_got(L, i); /* now: what is not there is something as soon as more is pushed */
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(tag));
  lua_getfield(L, -1, "__name");
  struct wrong w = {i, lua_pushfstring(L, "%s expected, got %s", lua_tostring(L, -1), got), true,
                    0};
  raise_own(L, &w);
  return NULL;
}

lua_Integer blame_integer(lua_State *L, int i) {
  if (lua_isnumber(L, i)) return blame_argument(L, i, "number has no integer representation");
  return blame_argument_type(L, i, "number");
}

int blame_option(lua_State *L, int i, const char *given) {
  return blame_argument(L, i, lua_pushfstring(L, "invalid option '%s'", given));
}

/* ---- the arguments of a public function in Lua ---- */

static int raise_outer(lua_State *L, const struct wrong *w) {
  lua_Debug ar;
  int level = 1;
  if (!lua_getstack(L, level, &ar)) return raise_own(L, w);
  bool for_user = is_called_for_user(L, &ar);
  while (!for_user && is_ours_at(L, level + 1)) {
    lua_getstack(L, ++level, &ar);
    for_user = is_called_for_user(L, &ar);
  }
  return accuse(L, level, for_user, w);
}

int blame(lua_State *L, int n, const char *message) {
  struct wrong w = {n, message, false, 0};
  return raise_outer(L, &w);
}

/* [-0, +1, m] as push_got, but a missing argument of a function in Lua is nil */
static const char *push_given(lua_State *L, int i) {
  return lua_isnoneornil(L, i) ? lua_pushliteral(L, "no value") : push_got(L, i);
}

int blame_type(lua_State *L, int n, const char *expected, int i) {
  const char *got = push_given(L, i);
  struct wrong w = {n, lua_pushfstring(L, "%s expected, got %s", expected, got), is_class(expected),
                    0};
  return raise_outer(L, &w);
}

int blame_self(lua_State *L, int class, int i) {
  lua_getfield(L, class, "__name");
  const char *got = push_given(L, i);
  struct wrong w = {1, lua_pushfstring(L, "%s expected, got %s", lua_tostring(L, -2), got), true,
                    class};
  return raise_outer(L, &w);
}
