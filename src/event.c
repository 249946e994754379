/*
** event.c - ManualResetEvent, AutoResetEvent, CountdownEvent: waiting until something has happened.
**
** The count of an event is 1 while it is set, else 0; that of a countdown, how many signals are still
** to come. A manual event lets all through while it is set, an automatic one the first, which resets
** it; a countdown, once it has come to zero, all and for ever.
**
** Invariant: somebody waits for an event only while its count is 0, for a countdown only while it is not.
** Source:    .NET ManualResetEventSlim, AutoResetEvent, CountdownEvent.
** SPDX-License-Identifier: MIT
*/
#include "sync.h"

/* ---- events ---- */

/* [-0, +1, v] as told by argument 1; not set unless it is */
static int event_new(lua_State *L, const struct sync_class *class) {
  if (!lua_isnoneornil(L, 1)) luaL_checktype(L, 1, LUA_TBOOLEAN);
  bool set = lua_toboolean(L, 1);
  sync_new(L, class, sizeof(struct sync), HOLDER_WAITERS)->count = set;
  return 1;
}

static int event_reset(lua_State *L, const struct sync_class *class) {
  sync_check(L, class)->count = 0;
  return 0;
}

static int event_is_set(lua_State *L, uint32_t tag) {
  lua_pushboolean(L, ((struct sync *)object_check(L, 1, tag))->count != 0);
  return 1;
}

static const char *event_state(lua_State *L, const struct sync *s) {
  return lua_pushstring(L, s->count ? "set" : "not set");
}

/* ---- Lua face: ManualResetEvent ---- */

static bool manual_attempt(lua_State *L, struct sync *s) {
  if (s->count == 0) return false;
  lua_pushboolean(L, 1);
  return true;
}

static int l_new_manual(lua_State *L) { return event_new(L, &manual_event_class); }
static int l_manual_reset(lua_State *L) { return event_reset(L, &manual_event_class); }
static int l_manual_is_set(lua_State *L) { return event_is_set(L, TAG_MANUAL_EVENT); }
static int l_manual_wait(lua_State *L) {
  return sync_direct(L, &manual_event_class, SYNC_WAIT, l_manual_wait);
}
static int l_manual_wait_async(lua_State *L) {
  return sync_twin(L, &manual_event_class, SYNC_WAIT);
}

static int l_manual_set(lua_State *L) {
  struct sync *s = sync_check(L, &manual_event_class);
  s->count = 1;
  lua_pushboolean(L, 1);
  sync_grant_all(L, s); /* and none that comes after a reset */
  return 0;
}

static const luaL_Reg manual_methods[] = {{"set", l_manual_set},
                                          {"reset", l_manual_reset},
                                          {"wait", l_manual_wait},
                                          {"wait_async", l_manual_wait_async},
                                          {NULL, NULL}};
static const luaL_Reg manual_properties[] = {{"is_set", l_manual_is_set}, {NULL, NULL}};

const struct sync_class manual_event_class = {.tag = TAG_MANUAL_EVENT,
                                              .timed = true,
                                              .name = "ManualResetEvent",
                                              .new = l_new_manual,
                                              .methods = manual_methods,
                                              .properties = manual_properties,
                                              .attempt = manual_attempt,
                                              .state = event_state};

/* ---- Lua face: AutoResetEvent ---- */

static bool auto_attempt(lua_State *L, struct sync *s) {
  if (s->count == 0 || waiter_any(&s->waiters)) return false;
  s->count = 0;
  lua_pushboolean(L, 1);
  return true;
}

static int l_new_auto(lua_State *L) { return event_new(L, &auto_event_class); }
static int l_auto_reset(lua_State *L) { return event_reset(L, &auto_event_class); }
static int l_auto_is_set(lua_State *L) { return event_is_set(L, TAG_AUTO_EVENT); }
static int l_auto_wait(lua_State *L) {
  return sync_direct(L, &auto_event_class, SYNC_WAIT, l_auto_wait);
}
static int l_auto_wait_async(lua_State *L) { return sync_twin(L, &auto_event_class, SYNC_WAIT); }

static int l_auto_set(lua_State *L) {
  struct sync *s = sync_check(L, &auto_event_class);
  if (sync_grant(L, s, 1) == 0) s->count = 1;
  return 0;
}

static const luaL_Reg auto_methods[] = {{"set", l_auto_set},
                                        {"reset", l_auto_reset},
                                        {"wait", l_auto_wait},
                                        {"wait_async", l_auto_wait_async},
                                        {NULL, NULL}};
static const luaL_Reg auto_properties[] = {{"is_set", l_auto_is_set}, {NULL, NULL}};

const struct sync_class auto_event_class = {.tag = TAG_AUTO_EVENT,
                                            .timed = true,
                                            .name = "AutoResetEvent",
                                            .new = l_new_auto,
                                            .methods = auto_methods,
                                            .properties = auto_properties,
                                            .attempt = auto_attempt,
                                            .state = event_state};

/* ---- Lua face: CountdownEvent ---- */

static bool countdown_attempt(lua_State *L, struct sync *s) {
  if (s->count != 0) return false;
  lua_pushboolean(L, 1);
  return true;
}

static const char *countdown_state(lua_State *L, const struct sync *s) {
  return lua_pushfstring(L, "%I to come", (LUAI_UACINT)s->count);
}

/* CountdownEvent(signals) */
static int l_new_countdown(lua_State *L) {
  lua_Integer n = luaL_checkinteger(L, 1);
  luaL_argcheck(L, n >= 0, 1, "must not be negative");
  sync_new(L, &countdown_class, sizeof(struct sync), HOLDER_WAITERS)->count = n;
  return 1;
}

static int l_countdown_wait(lua_State *L) {
  return sync_direct(L, &countdown_class, SYNC_WAIT, l_countdown_wait);
}
static int l_countdown_wait_async(lua_State *L) {
  return sync_twin(L, &countdown_class, SYNC_WAIT);
}

static int l_signal(lua_State *L) {
  struct sync *s = sync_check(L, &countdown_class);
  lua_Integer n = sync_opt_number(L);
  if (n > s->count)
    return error_throw(L, ERROR_OPERATION, "%I signals are more than the %I that are still to come",
                       (LUAI_UACINT)n, (LUAI_UACINT)s->count);
  s->count -= n;
  bool last = s->count == 0;
  lua_pushboolean(L, last);
  if (last) {
    lua_pushboolean(L, 1);
    sync_grant_all(L, s);
  }
  return 1;
}

static int l_add(lua_State *L) {
  struct sync *s = sync_check(L, &countdown_class);
  lua_Integer n = sync_opt_number(L);
  if (s->count == 0)
    return error_throw(L, ERROR_OPERATION,
                       "the CountdownEvent has come to zero: it cannot be added to any more");
  luaL_argcheck(L, n <= LUA_MAXINTEGER - s->count, 2, "too many");
  s->count += n;
  return 0;
}

static int l_countdown_count(lua_State *L) {
  lua_pushinteger(L, ((struct sync *)object_check(L, 1, TAG_COUNTDOWN))->count);
  return 1;
}

static int l_countdown_is_set(lua_State *L) {
  lua_pushboolean(L, ((struct sync *)object_check(L, 1, TAG_COUNTDOWN))->count == 0);
  return 1;
}

static const luaL_Reg countdown_methods[] = {{"signal", l_signal},
                                             {"add", l_add},
                                             {"wait", l_countdown_wait},
                                             {"wait_async", l_countdown_wait_async},
                                             {NULL, NULL}};
static const luaL_Reg countdown_properties[] = {
    {"current_count", l_countdown_count}, {"is_set", l_countdown_is_set}, {NULL, NULL}};

const struct sync_class countdown_class = {.tag = TAG_COUNTDOWN,
                                           .timed = true,
                                           .name = "CountdownEvent",
                                           .new = l_new_countdown,
                                           .methods = countdown_methods,
                                           .properties = countdown_properties,
                                           .attempt = countdown_attempt,
                                           .state = countdown_state};
