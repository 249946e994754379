/*
** semaphore.c - Semaphore: so many slots, and who waits for one.
**
** The count is that of the slots that are free.
**
** Invariants: 0 <= count <= max; somebody waits only while it is 0.
** Source:     .NET SemaphoreSlim.
** SPDX-License-Identifier: MIT
*/
#include "sync.h"

#include <math.h>

struct semaphore {
  struct sync sync;
  lua_Integer max;
};

static bool attempt(lua_State *L, struct sync *s) {
  if (s->count == 0 || waiter_any(&s->waiters)) return false;
  s->count--;
  lua_pushboolean(L, 1);
  return true;
}

static const char *state(lua_State *L, const struct sync *s) {
  return lua_pushfstring(L, "%I slots", (LUAI_UACINT)s->count);
}

/* Semaphore(initial, max) */
static int l_new(lua_State *L) {
  lua_Integer initial = luaL_checkinteger(L, 1);
  bool unlimited =
      lua_isnoneornil(L, 2) || (lua_type(L, 2) == LUA_TNUMBER && lua_tonumber(L, 2) == HUGE_VAL);
  lua_Integer max = unlimited ? LUA_MAXINTEGER : luaL_checkinteger(L, 2);
  luaL_argcheck(L, initial >= 0, 1, "must not be negative");
  luaL_argcheck(L, max >= 1, 2, "must be at least 1");
  luaL_argcheck(L, initial <= max, 1, "must not be greater than the maximum");
  struct sync *s = sync_new(L, &semaphore_class, sizeof(struct semaphore), HOLDER_WAITERS);
  s->count = initial;
  container_of(s, struct semaphore, sync)->max = max;
  return 1;
}

static int l_wait(lua_State *L) { return sync_direct(L, &semaphore_class, SYNC_WAIT, l_wait); }
static int l_wait_async(lua_State *L) { return sync_twin(L, &semaphore_class, SYNC_WAIT); }

static int l_release(lua_State *L) {
  struct sync *s = sync_check(L, &semaphore_class);
  lua_Integer max = container_of(s, struct semaphore, sync)->max;
  lua_Integer n = sync_opt_number(L), before = s->count;
  if (n > max - before)
    return error_throw(
        L, ERROR_SEMAPHORE,
        "%I slots are free, and no more than %I may be: %I more cannot be released, and none is",
        (LUAI_UACINT)before, (LUAI_UACINT)max, (LUAI_UACINT)n);
  s->count += n;
  while (s->count > 0 && waiter_any(&s->waiters)) {
    s->count--;
    if (sync_grant(L, s, 1) == 0) s->count++;
  }
  lua_pushinteger(L, before);
  return 1;
}

static int l_current_count(lua_State *L) {
  lua_pushinteger(L, ((struct sync *)object_check(L, 1, TAG_SEMAPHORE))->count);
  return 1;
}

static const luaL_Reg methods[] = {
    {"wait", l_wait}, {"wait_async", l_wait_async}, {"release", l_release}, {NULL, NULL}};
static const luaL_Reg properties[] = {{"current_count", l_current_count}, {NULL, NULL}};

const struct sync_class semaphore_class = {.tag = TAG_SEMAPHORE,
                                           .timed = true,
                                           .name = "Semaphore",
                                           .new = l_new,
                                           .methods = methods,
                                           .properties = properties,
                                           .attempt = attempt,
                                           .state = state};
