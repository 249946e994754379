/*
** source.c - cancellation sources: the right to cancel a token, at once, after a time, or with another one.
**
** The deadline of a token is a task of its own, the *expiry* (TOKEN_EXPIRY). When it is due the token
** is canceled at once; it lands, and callbacks run, in its place of the ready list: before what the
** cancellation has woken.
**
** SPDX-License-Identifier: MIT
*/
#include "token.h"

enum { SOURCE_TOKEN = 1 };

/* ---- the deadline of a token ---- */

/* [-0, +0, -] */
void token_disarm(lua_State *L, int k) {
  k = lua_absindex(L, k);
  if (lua_getiuservalue(L, k, TOKEN_EXPIRY) == LUA_TUSERDATA) {
    struct timed *e = (struct timed *)lua_touserdata(L, -1);
    struct task *t = &e->pending.task;
    deadline_drop(runtime(L), &e->deadline);
    if (!(t->flags & TASK_LINKED)) task_forget(L, t);
    t->state = TASK_CANCELED;
    lua_pushnil(L);
    lua_setiuservalue(L, k, TOKEN_EXPIRY);
    token_count_arm(L, (struct token *)lua_touserdata(L, k), -1);
  }
  lua_pop(L, 1);
}

/* [-0, +0, m] arms the deadline of the token at k */
static void arm(lua_State *L, int k, double seconds) {
  k = lua_absindex(L, k);
  if (seconds == HUGE_VAL) {
    token_disarm(L, k);
    return;
  }
  struct timed *e = (struct timed *)task_new(L, KIND_EXPIRY, sizeof *e, OP_TOKEN, false);
  e->deadline = (struct deadline){.kind = DEADLINE_TIMED};
  deadline_reserve(L, runtime(L));
  struct token *token = (struct token *)lua_touserdata(L, k);
  if (token->canceled || token->disposed) { /* by a finalizer */
    lua_pop(L, 1);
    return;
  }
  lua_pushvalue(L, k);
  lua_setiuservalue(L, -2, OP_TOKEN);
  task_hold(L, -1, &e->pending.task);
  token_disarm(L, k); /* nothing raises from here */
  testing_born(L, runtime(L), e->pending.task.slot);
  lua_setiuservalue(L, k, TOKEN_EXPIRY);
  deadline_add(runtime(L), &e->deadline, seconds);
  token_count_arm(L, token, 1);
}

void expiry_fire(lua_State *L, struct runtime *rt, int i) {
  struct task *t = (struct task *)lua_touserdata(L, i);
  loop_ready(rt, t); /* it keeps its slot until it lands */
  lua_getiuservalue(L, i, OP_TOKEN);
  lua_pushnil(L); /* reason */
  lua_pushnil(L); /* token reason list */
  int list = lua_gettop(L);
  token_mark_all(L, list - 2, list - 1, list - 2, list);
  lua_setiuservalue(L, i, OP_TOKEN);
  lua_pop(L, 2);
}

void expiry_land(lua_State *L, int i) {
  task_forget(L, (struct task *)lua_touserdata(L, i));
  lua_getiuservalue(L, i, OP_TOKEN);
  token_run_reported(L);
}

void expiry_drop(lua_State *L, int i) {
  lua_getiuservalue(L, i, OP_TOKEN);
  token_disarm(L, -1);
  lua_pop(L, 1);
}

/* ---- Lua face: sources ---- */

/* [-0, +1, v] the token of the source at index 1 */
static struct token *source_token(lua_State *L, bool alive) {
  object_check(L, 1, TAG_SOURCE);
  lua_getiuservalue(L, 1, SOURCE_TOKEN);
  struct token *k = (struct token *)lua_touserdata(L, -1);
  if (alive && k->disposed)
    error_throw(L, ERROR_DISPOSED, "the cancellation source has been disposed");
  return k;
}

/* [-0, +1, m] a source and its token, whose index is returned */
static int source_new(lua_State *L) {
  object_new(L, TAG_SOURCE, sizeof(uint32_t), SOURCE_TOKEN);
  token_new(L, false);
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, -3, SOURCE_TOKEN);
  return lua_gettop(L);
}

static int l_source_new(lua_State *L) {
  double seconds = lua_isnoneornil(L, 1) ? HUGE_VAL : module_seconds(L, 1);
  lua_settop(L, 1);
  int k = source_new(L);
  if (seconds == 0)
    ((struct token *)lua_touserdata(L, k))->canceled = true;
  else
    arm(L, k, seconds);
  lua_settop(L, k - 1);
  return 1;
}

/* the class itself, called; by whoever takes this out of its metatable, perhaps without it */
static int l_source_call(lua_State *L) {
  if (lua_gettop(L) > 0) lua_remove(L, 1);
  return l_source_new(L);
}

static int l_source_linked(lua_State *L) {
  int n = lua_gettop(L);
  luaL_checkany(L, 1);
  for (int i = 1; i <= n; i++) token_check(L, i);
  luaL_checkstack(L, 20, NULL);
  int k = source_new(L); /* … source token */
  for (int i = 1; i <= n; i++)
    if (((struct token *)lua_touserdata(L, i))->canceled) { /* born canceled */
      token_inherit(L, k, i);
      lua_settop(L, k - 1);
      return 1;
    }
  for (int i = 1; i <= n; i++) token_follow(L, k, i);
  lua_settop(L, k - 1);
  return 1;
}

static int l_source_token(lua_State *L) {
  source_token(L, true);
  return 1;
}

static int l_source_requested(lua_State *L) {
  lua_pushboolean(L, source_token(L, false)->canceled);
  return 1;
}

/* source:cancel(reason, { throw_on_first_exception = }) */
static int l_source_cancel(lua_State *L) {
  static const char *const options[] = {"throw_on_first_exception", NULL};
  object_check(L, 1, TAG_SOURCE);
  bool first = false;
  if (!lua_isnoneornil(L, 3)) {
    module_check_options(L, 3, options);
    lua_getfield(L, 3, options[0]);
    luaL_argcheck(L, lua_isnil(L, -1) || lua_isboolean(L, -1), 3,
                  "throw_on_first_exception must be a boolean");
    first = lua_toboolean(L, -1);
  }
  lua_settop(L, 2);
  if (source_token(L, true)->canceled) return 0;
  lua_pushnil(L); /* source reason token list */
  token_mark_all(L, 3, 2, 3, 4);
  token_run(L, first);
  return 0;
}

static int l_source_cancel_async(lua_State *L) {
  struct runtime *rt = runtime(L);
  object_check(L, 1, TAG_SOURCE);
  lua_settop(L, 2);
  struct token *token = source_token(L, false); /* source reason token */
  if (token->disposed) {
    task_new_promise(L);
    error_push(L, ERROR_DISPOSED, "the cancellation source has been disposed");
    task_settle_faulted(L, rt, 4, 0);
    return 1;
  }
  lua_pushnil(L); /* … list */
  if (!token->canceled) {
    lua_getiuservalue(L, 3, TOKEN_LIST);
    token_sweep(L, token);
    lua_pop(L, 1);
    token_mark_all(L, 3, 2, 3, 4);
  }
  if (lua_isnil(L, 4)) {
    task_new_promise(L);
    task_settle(L, rt, 5, 0);
    return 1;
  }
  module_push_function(L, token_run_callbacks);
  lua_pushvalue(L, 4);
  struct fiber *f = fiber_new(L, rt, 1, scope_flowing(L, rt));
  loop_queue(rt, f);
  return 1;
}

static int l_source_cancel_after(lua_State *L) {
  object_check(L, 1, TAG_SOURCE);
  double seconds = module_seconds(L, 2);
  lua_settop(L, 1);
  if (!source_token(L, true)->canceled) arm(L, 2, seconds);
  return 0;
}

static int l_source_try_reset(lua_State *L) {
  lua_settop(L, 1);
  struct token *k = source_token(L, true);
  if (!k->canceled) {
    token_disarm(L, 2);
    token_drop_registrations(L, 2);
    token_drop_pendings(k);
  }
  lua_pushboolean(L, !k->canceled);
  return 1;
}

static int l_source_dispose(lua_State *L) {
  object_check(L, 1, TAG_SOURCE);
  lua_settop(L, 1);
  struct token *k = source_token(L, false);
  if (k->disposed) return 0;
  k->disposed = true;
  token_disarm(L, 2);
  token_unfollow(L, 2);
  if (!k->canceled) token_drop_registrations(L, 2); /* else they are being run, and go on */
  return 0;
}

static const luaL_Reg functions[] = {
    {"call_source", l_source_call}, {"linked_source", l_source_linked}, {NULL, NULL}};
static const luaL_Reg source_methods[] = {{"cancel", l_source_cancel},
                                          {"cancel_async", l_source_cancel_async},
                                          {"cancel_after", l_source_cancel_after},
                                          {"try_reset", l_source_try_reset},
                                          {"dispose", l_source_dispose},
                                          {"__close", l_source_dispose},
                                          {NULL, NULL}};
static const luaL_Reg source_properties[] = {
    {"token", l_source_token}, {"is_cancellation_requested", l_source_requested}, {NULL, NULL}};

void source_open(lua_State *L) {
  module_functions(L, functions);
  module_class(L, TAG_SOURCE, "coflow.CancellationTokenSource", source_methods, source_properties);
}
