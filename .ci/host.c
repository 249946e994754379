/*
** host.c - a Lua interpreter for `make check`: host [-e CHUNK | SCRIPT] ARG...
**
** Differs from lua5.4 in what makes faults show. It carries the sanitizers' runtime, so that a
** sanitized module can be loaded. It closes its state however the script ends, so that what is
** still allocated then is a leak. It never unloads a module, so that a report can name functions.
**
** With COFLOW_GC_STRESS set, each state of the process, workers' too, runs a full collection
** whenever an allocation lets the collector run: a value that C forgot to hold is gone at once.
** This lasts for a share of time, which debug.stress(true) grants again and debug.stress(false) ends.
**
** SPDX-License-Identifier: MIT
*/
#include <dlfcn.h>
#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Full collections end once the heap is large or the share of processor time is spent. */
#define STRESS_KB 4096
#define STRESS_SECONDS 1
static atomic_long stress_end = STRESS_SECONDS * CLOCKS_PER_SEC;

/*
** The collector's parameters as far as they go: a pause of 1 starts a cycle when the last one
** ends, and a step of 2^63 bytes, more than the collector can count, is a whole cycle. Otherwise
** the collector still never rests, at a usual pace. A hook repeats the call, as specs and the
** heap's size change.
*/
static void stress(lua_State *L, lua_Debug *ar) {
  (void)ar;
  if (clock() < stress_end && lua_gc(L, LUA_GCCOUNT) < STRESS_KB)
    lua_gc(L, LUA_GCINC, 1, 1000, 63);
  else
    lua_gc(L, LUA_GCINC, 100, 200, 10);
}

static int l_stress(lua_State *L) {
  stress_end = lua_toboolean(L, 1) ? clock() + STRESS_SECONDS * CLOCKS_PER_SEC : 0;
  if (getenv("COFLOW_GC_STRESS") != NULL) stress(L, NULL);
  return 0;
}

/* Found before the Lua library's function of this name, by the module too. */
lua_State *luaL_newstate(void) {
  lua_State *(*original)(void);
  *(void **)&original = dlsym(RTLD_NEXT, "luaL_newstate");
  lua_State *L = original();
  if (L == NULL || getenv("COFLOW_GC_STRESS") == NULL) return L;
  stress(L, NULL);
  lua_sethook(L, stress, LUA_MASKCOUNT, 100);
  return L;
}

int dlclose(void *handle) {
  (void)handle;
  return 0;
}

/* os.exit that always closes the state; upvalue 1 is the original */
static int l_exit(lua_State *L) {
  lua_settop(L, 1);
  lua_pushvalue(L, lua_upvalueindex(1));
  lua_insert(L, 1);
  lua_pushboolean(L, 1);
  lua_call(L, 2, 0);
  return 0;
}

static int with_traceback(lua_State *L) {
  luaL_traceback(L, L, luaL_tolstring(L, 1, NULL), 1);
  return 1;
}

/* Runs below a protected call; argc and argv as main's. */
static int run(lua_State *L) {
  int argc = (int)lua_tointeger(L, 1);
  char **argv = lua_touserdata(L, 2);
  int script = argc > 2 && strcmp(argv[1], "-e") == 0 ? 2 : 1;

  luaL_openlibs(L);
  lua_getglobal(L, "os");
  lua_getfield(L, -1, "exit");
  lua_pushcclosure(L, l_exit, 1);
  lua_setfield(L, -2, "exit");
  lua_getglobal(L, "debug");
  lua_pushcfunction(L, l_stress);
  lua_setfield(L, -2, "stress");

  lua_createtable(L, argc, script + 1);
  for (int i = 0; i < argc; i++) {
    lua_pushstring(L, argv[i]);
    lua_rawseti(L, -2, i - script);
  }
  lua_setglobal(L, "arg");

  if (script >= argc) return luaL_error(L, "usage: %s [-e CHUNK | SCRIPT] ARG...", argv[0]);
  int status = script == 2 ? luaL_loadstring(L, argv[2]) : luaL_loadfile(L, argv[1]);
  if (status != LUA_OK) return lua_error(L);
  luaL_checkstack(L, argc, NULL);
  for (int i = script + 1; i < argc; i++) lua_pushstring(L, argv[i]);
  lua_call(L, argc - script - 1, 0);
  return 0;
}

int main(int argc, char **argv) {
  lua_State *L = luaL_newstate();
  if (L == NULL) return EXIT_FAILURE;
  lua_pushcfunction(L, with_traceback);
  lua_pushcfunction(L, run);
  lua_pushinteger(L, argc);
  lua_pushlightuserdata(L, argv);
  int status = lua_pcall(L, 2, 0, 1);
  if (status != LUA_OK) fprintf(stderr, "%s: %s\n", argv[0], lua_tostring(L, -1));
  lua_close(L);
  return status == LUA_OK ? EXIT_SUCCESS : EXIT_FAILURE;
}
