/*
** barrier.c - Barrier: so many tasks wait for each other, again and again.
**
** The count is that of the phases that are over. Whoever comes last ends the phase and goes on; the
** others are granted its number, all together: some may come back here for the next phase before the
** last of them has it.
**
** Invariant: fewer than `participants` wait, not counting those that are leaving.
** Source:    .NET Barrier.
** SPDX-License-Identifier: MIT
*/
#include "sync.h"

struct barrier {
  struct sync sync;
  lua_Integer participants;
};

/* Those who wait, by the list: somebody may have closed the coroutine of one. */
static lua_Integer waiting(const struct sync *s) {
  lua_Integer n = 0;
  for (const struct link *l = s->waiters.next; l != &s->waiters; l = l->next) n++;
  return n;
}

/* the last participant ends the phase, and gets its number */
static bool attempt(lua_State *L, struct sync *s) {
  struct barrier *b = container_of(s, struct barrier, sync);
  if ((lua_Integer)s->holder.waiting + 1 < b->participants || waiting(s) + 1 < b->participants)
    return false;
  lua_pushinteger(L, s->count++);
  lua_pushvalue(L, -1);
  sync_grant_all(L, s);
  return true;
}

static const char *state(lua_State *L, const struct sync *s) {
  return lua_pushfstring(L, "phase %I of %I tasks", (LUAI_UACINT)s->count,
                         (LUAI_UACINT)container_of(s, struct barrier, sync)->participants);
}

/* ---- Lua face ---- */

static struct barrier *check(lua_State *L) {
  return (struct barrier *)object_check(L, 1, TAG_BARRIER);
}

/* Barrier(participants) */
static int l_new(lua_State *L) {
  lua_Integer n = luaL_checkinteger(L, 1);
  luaL_argcheck(L, n >= 1 && n < INT32_MAX, 1, n < 1 ? "must be at least 1" : "too many");
  struct sync *s = sync_new(L, &barrier_class, sizeof(struct barrier), HOLDER_WAITERS);
  container_of(s, struct barrier, sync)->participants = n;
  return 1;
}

static int l_signal_and_wait(lua_State *L) {
  return sync_direct(L, &barrier_class, SYNC_WAIT, l_signal_and_wait);
}
static int l_signal_and_wait_async(lua_State *L) { return sync_twin(L, &barrier_class, SYNC_WAIT); }

static int l_participants(lua_State *L) {
  lua_pushinteger(L, check(L)->participants);
  return 1;
}

static int l_remaining(lua_State *L) {
  struct barrier *b = check(L);
  lua_pushinteger(L, b->participants - waiting(&b->sync));
  return 1;
}

static int l_phase(lua_State *L) {
  lua_pushinteger(L, check(L)->sync.count);
  return 1;
}

static const luaL_Reg methods[] = {{"signal_and_wait", l_signal_and_wait},
                                   {"signal_and_wait_async", l_signal_and_wait_async},
                                   {NULL, NULL}};
static const luaL_Reg properties[] = {{"participant_count", l_participants},
                                      {"participants_remaining", l_remaining},
                                      {"current_phase_number", l_phase},
                                      {NULL, NULL}};

const struct sync_class barrier_class = {.tag = TAG_BARRIER,
                                         .name = "Barrier",
                                         .new = l_new,
                                         .methods = methods,
                                         .properties = properties,
                                         .attempt = attempt,
                                         .state = state};
