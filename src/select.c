/*
** select.c - waiting for several channels and tasks at once: the first that is there, and only that.
**
** The clauses are tried in the order of the list; the first that is there is taken. Else the operation
** waits for all of them, with a node in the queue of each channel and a wait on each task, and
** whichever comes first takes it out of the others (waiter.c): they lose nothing, and nothing of it is
** left there.
**
** Source: Go's select; the order among what is ready is that of the list, where Go draws lots.
** SPDX-License-Identifier: MIT
*/
#include "waiter.h"

#include <math.h>
#include <string.h>

/* what stands where on the stack in the functions below */
enum { SELECT_LIST = 1, SELECT_INPUTS, SELECT_VALUES, SELECT_TOKEN, SELECT_OP };

/* [-0, +2, e] element k, on top, becomes what it waits for and the item to be written or nil */
static enum ask check_clause(lua_State *L, lua_Integer k, bool *task) {
  int i = lua_gettop(L);
  *task = !lua_istable(L, i) || lua_getmetatable(L, i);
  lua_settop(L, i);
  if (*task) {
    if (task_awaitable(L, i) == NULL)
      luaL_argerror(L, 1,
                    lua_pushfstring(L,
                                    "element %d is neither a clause {channel, \"read\" or "
                                    "\"write\", item} nor awaitable (a %s value)",
                                    (int)k, luaL_typename(L, i)));
    lua_pushnil(L);
    return ASK_READ;
  }
  lua_rawgeti(L, i, 1);
  lua_rawgeti(L, i, 2);
  lua_rawgeti(L, i, 3); /* element channel what item */
  const char *name = lua_type(L, i + 2) == LUA_TSTRING ? lua_tostring(L, i + 2) : "";
  enum ask what = strcmp(name, "write") == 0 ? ASK_WRITE : ASK_READ;
  if (what == ASK_READ && strcmp(name, "read") != 0)
    luaL_argerror(L, 1, lua_pushfstring(L, "element %d must say \"read\" or \"write\"", (int)k));
  if (!channel_check(L, i + 1, what))
    luaL_argerror(L, 1, lua_pushfstring(L, "element %d has no channel to %s", (int)k, name));
  if (what == ASK_WRITE && lua_isnil(L, i + 3))
    luaL_argerror(L, 1, lua_pushfstring(L, "element %d: nil is not an item", (int)k));
  lua_remove(L, i + 2);
  lua_remove(L, i);
  return what;
}

/* [-0, +2, v] the number of clauses of the list at 1, and its options; only the token stays, at
** SELECT_TOKEN: that of the list, or else the one that was given at 2 */
static lua_Integer check_list(lua_State *L, double *seconds) {
  luaL_checktype(L, 1, LUA_TTABLE);
  token_opt(L, 2);
  lua_settop(L, 2);
  lua_Integer n = (lua_Integer)lua_rawlen(L, 1);
  luaL_argcheck(L, n >= 1, 1, "a clause or a task is needed");
  luaL_argcheck(L, n < INT32_MAX, 1, "too many clauses");
  for (lua_pushnil(L); lua_next(L, 1); lua_pop(L, 1)) {
    if (lua_isinteger(L, -2) && lua_tointeger(L, -2) >= 1 && lua_tointeger(L, -2) <= n) continue;
    if (lua_type(L, -2) == LUA_TSTRING &&
        (strcmp(lua_tostring(L, -2), "timeout") == 0 || strcmp(lua_tostring(L, -2), "token") == 0))
      continue;
    luaL_argerror(L, 1,
                  lua_pushfstring(L, "unknown option '%s': known are timeout, token",
                                  luaL_tolstring(L, -2, NULL)));
  }
  *seconds = HUGE_VAL;
  lua_pushliteral(L, "timeout");
  if (lua_rawget(L, 1) != LUA_TNIL) {
    luaL_argcheck(L, lua_type(L, -1) == LUA_TNUMBER && lua_tonumber(L, -1) >= 0, 1,
                  "timeout must be a number of seconds, not negative");
    *seconds = (double)lua_tonumber(L, -1);
  }
  lua_settop(L, 2);
  lua_pushliteral(L, "token");
  if (lua_rawget(L, 1) == LUA_TNIL)
    lua_pop(L, 1);
  else {
    luaL_argcheck(L, object_test(L, 3, TAG_TOKEN), 1, "token must be a CancellationToken");
    lua_replace(L, 2);
  }
  lua_createtable(L, (int)n, 0);
  lua_createtable(L, (int)n, 0);
  lua_rotate(L, 2, -1);
  return n;
}

/* [-n, +5, e] */
static struct queued *select_new(lua_State *L) {
  double seconds;
  lua_Integer n = check_list(L, &seconds);
  struct queued *op = waiter_operation(L, KIND_SELECT, (uint32_t)n, seconds);
  for (lua_Integer k = 1; k <= n; k++) {
    struct clause *c = &op->clauses[k - 1];
    lua_rawgeti(L, 1, k);
    c->u.nap.what = check_clause(L, k, &c->task);
    lua_rawseti(L, SELECT_VALUES, k);
    lua_rawseti(L, SELECT_INPUTS, k);
  }
  lua_pushvalue(L, SELECT_INPUTS);
  lua_setiuservalue(L, SELECT_OP, OP_INPUT);
  lua_pushvalue(L, SELECT_VALUES);
  lua_setiuservalue(L, SELECT_OP, OP_KEYS);
  return op;
}

/* [-0, +0, e] settles it by the first clause that is there; false: none is */
static bool select_poll(lua_State *L, struct queued *op) {
  struct runtime *rt = runtime(L);
  for (uint32_t k = 0; k < op->count; k++) {
    struct clause *clause = &op->clauses[k];
    lua_settop(L, SELECT_OP);
    lua_rawgeti(L, SELECT_INPUTS, (lua_Integer)k + 1);
    lua_rawgeti(L, SELECT_VALUES, (lua_Integer)k + 1);
    if (clause->task) {
      if (!task_done((struct task *)lua_touserdata(L, SELECT_OP + 1))) continue;
      waiter_land(L, SELECT_OP); /* it is the first of them */
      return true;
    }
    if (channel_poll(L, rt, SELECT_OP, k, SELECT_OP + 1, (enum ask)clause->u.nap.what,
                     SELECT_OP + 2))
      return true;
  }
  return false;
}

/* [-0, +0, e] none of its clauses was there: waits for all. Waits on tasks may create, so they come first. */
static void select_start(lua_State *L, struct queued *op, struct scope *s) {
  struct runtime *rt = runtime(L);
  struct task *t = &op->timed.pending.task;
  lua_settop(L, SELECT_OP);
  operation_start(L, SELECT_OP, &op->timed, SELECT_TOKEN, s);
  for (uint32_t k = 0; k < op->count; k++) {
    struct clause *clause = &op->clauses[k];
    if (!clause->task) continue;
    lua_rawgeti(L, SELECT_INPUTS, (lua_Integer)k + 1);
    memset(&clause->u, 0, sizeof clause->u);
    wait_add(L, SELECT_OP + 1, &clause->u.wait, SELECT_OP, WAIT_OP);
    lua_settop(L, SELECT_OP);
  }
  if (t->flags & TASK_LINKED || task_done(t)) return; /* a finalizer has been here */
  t->flags |= TASK_LINKED; /* so that it cannot land while we may have an item for it */
  bool settled = select_poll(L, op), ended = false;
  t->flags &= (uint16_t)~TASK_LINKED;
  lua_settop(L, SELECT_OP);
  if (settled) return;
  for (uint32_t k = 0; k < op->count; k++) /* a task of it is complete, in the meantime … */
    ended = ended || (op->clauses[k].task && op->clauses[k].u.wait.on == NULL);
  if (ended || t->flags & TASK_INTERRUPTED) { /* … or it was canceled */
    loop_land(L, rt, SELECT_OP, t);
    loop_land_all(L, rt);
    return;
  }
  for (uint32_t k = 0; k < op->count; k++) {
    struct clause *clause = &op->clauses[k];
    if (clause->task) continue;
    lua_settop(L, SELECT_OP);
    lua_rawgeti(L, SELECT_INPUTS, (lua_Integer)k + 1);
    channel_enqueue(L, SELECT_OP, SELECT_OP + 1, clause);
  }
  for (uint32_t k = 0; k < op->count; k++) {
    if (op->clauses[k].task) continue;
    lua_settop(L, SELECT_OP);
    lua_rawgeti(L, SELECT_INPUTS, (lua_Integer)k + 1);
    channel_announce(L, rt, SELECT_OP + 1, (enum ask)op->clauses[k].u.nap.what);
  }
}

static bool has_complete_task(lua_State *L, const struct queued *op) {
  bool found = false;
  for (uint32_t k = 0; k < op->count && !found; k++) {
    if (!op->clauses[k].task) continue;
    lua_rawgeti(L, SELECT_INPUTS, (lua_Integer)k + 1);
    found = task_done((struct task *)lua_touserdata(L, -1));
    lua_pop(L, 1);
  }
  return found;
}

/* [-0, +0, e] canceled before, which only a complete task beats, or there already, or without the time
** to wait */
static bool select_at_once(lua_State *L, struct queued *op, struct scope *s) {
  struct runtime *rt = runtime(L);
  struct token *token = token_opt(L, SELECT_TOKEN);
  struct task *t = &op->timed.pending.task;
  bool canceled = operation_canceled(token, s);
  if (canceled && has_complete_task(L, op)) {
    waiter_land(L, SELECT_OP);
    return true;
  }
  if (!canceled && select_poll(L, op)) return true;
  if (canceled || operation_canceled(token, s)) { /* the latter by a finalizer */
    lua_settop(L, SELECT_OP);
    operation_push_canceled(L, token, SELECT_TOKEN, s);
    task_settle_canceled(L, rt, SELECT_OP);
    return true;
  }
  if (op->timed.seconds > 0) return false;
  lua_settop(L, SELECT_OP);
  t->flags |= TASK_EXPIRED;
  waiter_land(L, SELECT_OP);
  return true;
}

static int l_select_async(lua_State *L) {
  struct queued *op = select_new(L);
  struct scope *s = operation_scope(L, SELECT_TOKEN);
  if (!select_at_once(L, op, s)) select_start(L, op, s);
  lua_settop(L, SELECT_OP);
  return 1;
}

static int l_select_outside(lua_State *L);

static int select_here(lua_State *L, bool outside) {
  struct runtime *rt = runtime(L);
  struct queued *op = select_new(L);
  struct task *t = &op->timed.pending.task;
  struct fiber *me = (struct fiber *)rt->me;
  bool deaf = token_none(L, SELECT_TOKEN) &&
              !outside; /* where no token is ambient: it is to be withdrawn */
  struct scope *s = deaf ? rt->root : scope_ambient(L, rt);
  if (!select_at_once(L, op, s)) {
    me = fiber_here(L, rt);
    if (me == NULL) {
      lua_settop(L, SELECT_TOKEN);
      lua_replace(L, 2);
      lua_settop(L, 2);
      return fiber_outside(L, l_select_outside);
    }
    select_start(L, op, s);
  }
  lua_settop(L, SELECT_OP);
  return waiter_await_direct(L, me, t, deaf);
}

static int l_select(lua_State *L) { return select_here(L, false); }
static int l_select_outside(lua_State *L) { return select_here(L, true); }

static const luaL_Reg functions[] = {
    {"select", l_select}, {"select_async", l_select_async}, {NULL, NULL}};

const struct part select_part = {functions, NULL, NULL};
