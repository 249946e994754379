/*
** memory.c - an allocator that fails when it is told to, for spec/memory_spec.lua, which builds it.
**
** What fails is a request for more. Lua answers a failure with a collection and asks once more, so that is
** refused as well.
**
** SPDX-License-Identifier: MIT
*/
#include <lauxlib.h>
#include <lua.h>
#include <stddef.h>

static lua_Alloc original;
static void *original_ud;
static lua_Integer count, fail_at;

static void *allocate(void *ud, void *p, size_t old, size_t size) {
  (void)ud;
  if (size > 0 && (p == NULL || size > old)) {
    count++;
    if (count == fail_at || count == fail_at + 1) return NULL;
  }
  return original(original_ud, p, old, size);
}

/* fail(n) -> how many requests there were since the last call: the n-th from now on fails. fail(): none, by the
** usual allocator; this module may be unloaded then */
static int l_fail(lua_State *L) {
  lua_Integer n = luaL_optinteger(L, 1, 0);
  if (original == NULL) original = lua_getallocf(L, &original_ud);
  lua_setallocf(L, n > 0 ? allocate : original, original_ud);
  lua_pushinteger(L, count);
  count = 0;
  fail_at = n;
  return 1;
}

__attribute__((visibility("default"))) int luaopen_memory(lua_State *L);
int luaopen_memory(lua_State *L) {
  lua_pushcfunction(L, l_fail);
  return 1;
}
