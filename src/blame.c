/*
** blame.c - who is blamed for a wrong argument: the name of the function in the message, the number of the argument,
** and the line.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

/* [-0, +n, m] "coflow.f" or "coflow.Class.f" of the function on top, which C has called without a name; or false */
static bool push_public_name(lua_State *L) {
  int fn = lua_gettop(L);
  luaL_checkstack(L, 10, NULL);
  luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
  lua_getfield(L, -1, "coflow");
  if (!lua_istable(L, -1)) return false;
  for (lua_pushnil(L); lua_next(L, fn + 2); lua_pop(L, 1)) {
    if (lua_type(L, fn + 3) != LUA_TSTRING) continue;
    if (lua_rawequal(L, -1, fn)) {
      lua_pushfstring(L, "coflow.%s", lua_tostring(L, fn + 3));
      return true;
    }
    if (!lua_istable(L, -1)) continue;
    for (lua_pushnil(L); lua_next(L, fn + 4); lua_pop(L, 1))
      if (lua_type(L, fn + 5) == LUA_TSTRING && lua_rawequal(L, -1, fn)) {
        lua_pushfstring(L, "coflow.%s.%s", lua_tostring(L, fn + 3), lua_tostring(L, fn + 5));
        return true;
      }
  }
  return false;
}

void blame_push_name(lua_State *L) {
  int fn = lua_gettop(L);
  bool found = push_public_name(L);
  if (!found) {
    lua_settop(L, fn);
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_LOADED_TABLE);
    for (lua_pushnil(L); !found && lua_next(L, fn + 1);) { /* loaded name module */
      if (lua_type(L, fn + 2) == LUA_TSTRING && lua_istable(L, fn + 3))
        for (lua_pushnil(L); !found && lua_next(L, fn + 3);) { /* … key value */
          found = lua_type(L, fn + 4) == LUA_TSTRING && lua_rawequal(L, -1, fn);
          if (!found) lua_pop(L, 1);
        }
      if (!found) lua_settop(L, fn + 2);
    }
    if (found && strcmp(lua_tostring(L, fn + 2), LUA_GNAME) == 0)
      lua_pushvalue(L, fn + 4);
    else if (found)
      lua_pushfstring(L, "%s.%s", lua_tostring(L, fn + 2), lua_tostring(L, fn + 4));
    else
      lua_pushliteral(L, "[C]");
  }
  lua_replace(L, fn + 1);
  lua_settop(L, fn + 1);
}

/* Like luaL_argerror for a public function written in Lua, which calls us, itself or through helpers: counts as its
** caller sees the arguments, and blames the line of that caller. */
/* whether the user has called that function of ours, by a function that is gone or by one of ours that calls `fn` */
static bool is_called_for_user(lua_State *L, lua_Debug *ar) {
  int top = lua_gettop(L);
  lua_getinfo(L, "ntf", ar);
  bool is = ar->istailcall ? push_public_name(L)
                           : strcmp(ar->namewhat, "local") == 0 && strcmp(ar->name, "fn") == 0;
  lua_settop(L, top);
  return is;
}

static bool is_ours_at(lua_State *L, int level) {
  lua_Debug ar;
  return lua_getstack(L, level, &ar) && lua_getinfo(L, "S", &ar) &&
         module_is_ours(runtime(L), ar.source);
}

int blame(lua_State *L, int n, const char *message) {
  lua_Debug ar;
  int level = 1;
  if (!lua_getstack(L, level, &ar)) return luaL_argerror(L, n, message);
  bool for_user = is_called_for_user(L, &ar);
  while (!for_user && is_ours_at(L, level + 1)) {
    lua_getstack(L, ++level, &ar);
    for_user = is_called_for_user(L, &ar);
  }
  lua_getinfo(L, "nf", &ar);
  const char *name = for_user ? NULL : ar.name;
  if (name == NULL) name = push_public_name(L) ? lua_tostring(L, -1) : "?";
  do level++;
  while (is_ours_at(L, level));
  luaL_where(L, level);
  if (!for_user && strcmp(ar.namewhat, "method") == 0 && --n == 0)
    lua_pushfstring(L, "calling '%s' on bad self (%s)", name, message);
  else
    lua_pushfstring(L, "bad argument #%d to '%s' (%s)", n, name, message);
  lua_concat(L, 2);
  return lua_error(L);
}

int blame_type(lua_State *L, int n, const char *expected, int i) {
  const char *got = lua_isnone(L, i) || lua_isnil(L, i) ? "no value" : luaL_typename(L, i);
  if (luaL_getmetafield(L, i, "__name") == LUA_TSTRING) got = lua_tostring(L, -1);
  return blame(L, n, lua_pushfstring(L, "%s expected, got %s", expected, got));
}
