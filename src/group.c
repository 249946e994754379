/*
** group.c - task groups: a scope that knows its children.
**
** A child is a fiber with TRAIT_CHILD, a member of the group's scope. When its body has been left, and
** before it settles, it tells the group, while it is still the running task: so the first failure cancels
** the others at once, on the failing child's stack, where callbacks may do what they like. Children over the
** limit wait in a queue, held by the group alone; a cancellation discards them as it would interrupt a wait.
**
** The end (lua/coflow/group.lua) is for join, which waits, deaf to all tokens, until no child is left, and
** closes the scope. When all went well that is the end of it; else the failures are looked at in Lua.
**
** The group is the scope's userdata. It refers to failed children, the winner and the queue by user
** values, so it dies with the task that it belongs to, and a task that waits in vain for a child is
** reported.
**
** Source: trio's nurseries.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <math.h>

enum policy { FAIL_FAST, SUPERVISE, FIRST_SUCCESS };

struct group {
  struct scope scope;
  uint8_t policy;
  bool had_children;
  bool stopping;
  bool ended;       /* joined: nothing can be started in it */
  bool canceled;    /* by its own code, before its body was left by an error */
  bool body_failed; /* by any error, … */
  bool body_raised; /* … which was no cancellation, and is told in GROUP_FAILED by false */
  int depth;        /* groups that its task is in */
  uint32_t running;
  uint32_t first, last; /* of the queue: the index of the first one in it, and of the last */
  double limit, grace;
};

/* ---- children ---- */

static void push_group(lua_State *L, const struct group *g) { scope_push(L, &g->scope); }

/* upvalues as ever; arguments: group, reason */
static int cancel_group(lua_State *L) {
  scope_cancel(L, (struct scope *)lua_touserdata(L, 1), 2);
  return 0;
}

/* [-0, +0, m] errors of callbacks have no caller here */
static void cancel(lua_State *L, struct group *g, const char *reason) {
  if (g->scope.canceled) return;
  module_push_function(L, cancel_group);
  push_group(L, g);
  lua_pushstring(L, reason);
  if (lua_pcall(L, 2, 0, 0) != LUA_OK) {
    error_report(L, -1, 0);
    lua_pop(L, 1);
  }
}

/* [-1, +0, m] appends the value on top to the list in that user value of the group */
static void append(lua_State *L, const struct group *g, int list) {
  push_group(L, g);
  lua_insert(L, -2); /* group value */
  module_push_table(L, -2, list);
  lua_insert(L, -2); /* group list value */
  lua_rawseti(L, -2, (lua_Integer)lua_rawlen(L, -2) + 1);
  lua_pop(L, 2);
}

/* [-0, +0, m] the task on top has failed */
static void child_failed(lua_State *L, struct group *g) {
  lua_pushvalue(L, -1);
  append(L, g, GROUP_FAILED);
  if (g->policy == FAIL_FAST) cancel(L, g, "a task of the group failed");
}

/* One child more runs. While any does, the group stays in the tree, though its owner may be gone: a
** child finds it there (group_of). */
static void child_runs(struct group *g) {
  if (g->running++ == 0) g->scope.refs++;
}

/* [-0, +0, m] starts those in the queue for which there is room now */
static void start_next(lua_State *L, struct runtime *rt, struct group *g) {
  if (g->scope.canceled) return; /* they are being discarded */
  push_group(L, g);
  while (g->first <= g->last && g->running < g->limit) {
    lua_getiuservalue(L, -1, GROUP_QUEUE); /* anew: a finalizer may have emptied it */
    lua_rawgeti(L, -1, g->first);
    lua_pushboolean(L, 0);
    lua_rawseti(L, -3, g->first++);
    lua_remove(L, -2);
    struct task *t = (struct task *)lua_touserdata(L, -1);
    if (t != NULL && fiber_is_lost(t)) fiber_settle_lost(L, -1);
    if (t != NULL && t->state == TASK_FAULTED) { /* somebody has closed its coroutine */
      child_failed(L, g);
      if (g->scope.canceled) { /* the others are being discarded */
        lua_pop(L, 2);
        return;
      }
    }
    if (t != NULL && !task_done(t)) {
      task_hold(L, -1, t);
      t->traits ^= TRAIT_QUEUED | TRAIT_CHILD;
      child_runs(g);
      loop_ready(rt, t);
    }
    lua_pop(L, 1);
  }
  if (g->first > g->last) {
    g->first = 1;
    g->last = 0;
    lua_pushnil(L);
    lua_setiuservalue(L, -2, GROUP_QUEUE);
  }
  lua_pop(L, 1);
}

/* [-0, +0, m] there is one less that runs */
static void child_left(lua_State *L, struct runtime *rt, struct group *g) {
  bool last = --g->running == 0;
  if (g->first <= g->last) start_next(L, rt, g);
  if (g->running == 0) {
    push_group(L, g);
    if (lua_getiuservalue(L, -1, GROUP_IDLE) != LUA_TNIL) {
      lua_pushnil(L);
      lua_setiuservalue(L, -3, GROUP_IDLE);
      task_settle(L, rt, lua_gettop(L), 0);
    }
    lua_pop(L, 2);
  }
  if (last) scope_let_go(L, rt, &g->scope); /* of child_runs; the group may be gone now */
}

/* the scope that it was started in */
static struct scope *started_in(const struct fiber *f) {
  struct scope *s = f->member.scope;
  return s->owner == f ? s->base->member.scope : s;
}

static struct group *group_of(const struct fiber *f) { return (struct group *)started_in(f); }

struct group *group_leave(struct fiber *f) {
  f->task.traits &= (uint8_t)~TRAIT_CHILD;
  return group_of(f);
}

void group_child_ended(lua_State *L, struct runtime *rt, struct fiber *f, bool well) {
  struct group *g = group_of(f); /* until all that may raise is done: then it is told once more */
  luaL_checkstack(L, 10, NULL);
  if (well && g->policy == FIRST_SUCCESS && !g->scope.expired && !g->body_raised) {
    push_group(L, g);
    bool first = lua_getiuservalue(L, -1, GROUP_WINNER) == LUA_TNIL;
    if (first) {
      task_push(L, &f->task);
      lua_setiuservalue(L, -3, GROUP_WINNER);
    }
    lua_pop(L, 2);
    if (first) cancel(L, g, "another task of the group succeeded");
  } else if (!well && !error_is(L, -1, ERROR_CANCELED)) {
    task_push(L, &f->task);
    child_failed(L, g);
    lua_pop(L, 1);
  }
  child_left(L, rt, group_leave(f));
}

void group_child_lost(lua_State *L, struct runtime *rt, struct group *g) {
  task_new_promise(L); /* stands for it */
  error_push(L, ERROR_OPERATION, "somebody has closed the coroutine of a task of the group");
  task_settle_faulted(L, rt, lua_gettop(L) - 1, 0);
  child_failed(L, g);
  lua_pop(L, 1);
  child_left(L, rt, g);
}

bool group_canceled(const struct fiber *f) {
  const struct scope *s = started_in(f);
  return s->kind != SCOPE_GROUP || s->canceled;
}

void group_discard(lua_State *L, int i) {
  const struct fiber *f = (const struct fiber *)lua_touserdata(L, i);
  scope_push_error(L, f->member.scope);
  if (!task_done(&f->task)) fiber_discard(L, runtime(L), i);
}

/* ---- Lua face ---- */

static struct group *check_group(lua_State *L) {
  struct group *g = (struct group *)object_test(L, 1, TAG_GROUP | KIND_SCOPE);
  return g ? g : (struct group *)blame_object(L, 1, TAG_GROUP);
}

/* group:spawn(fn, ...) */
static int l_spawn(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct group *g = check_group(L);
  argument_callable(L, 2);
  if (g->ended)
    return error_throw(L, ERROR_OPERATION,
                       "the task group has ended: no task can be started in it any more");
  struct fiber *f = fiber_new(L, rt, lua_gettop(L) - 2, rt->root); /* group task */
  if (g->ended) { /* by a finalizer, and its scope may be gone */
    fiber_make_cold(L, 2, f);
    return error_throw(L, ERROR_OPERATION, "the task group has ended");
  }
  scope_adopt(L, rt, f, &g->scope);
  f->task.state = TASK_QUEUED;
  g->had_children = true;
  if (g->running < g->limit) {
    f->task.traits |= TRAIT_CHILD;
    child_runs(g);
    loop_ready(rt, &f->task);
    return 1;
  }
  fiber_make_cold(L, 2, f); /* should anything raise */
  if (g->scope.canceled) {
    group_discard(L, 2);
    return 1;
  }
  f->task.traits |= TRAIT_QUEUED;
  lua_pushvalue(L, 2);
  append(L, g, GROUP_QUEUE);
  g->last++;
  start_next(L, rt, g); /* should a finalizer have ended a child meanwhile */
  return 1;
}

/* group:cancel(reason) -> true if it was not canceled before */
static int l_cancel(lua_State *L) {
  struct group *g = check_group(L);
  lua_settop(L, 2);
  lua_pushboolean(L, !g->ended && scope_cancel(L, &g->scope, 2));
  return 1;
}

/* group:stop() */
static int l_stop(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct group *g = check_group(L);
  lua_settop(L, 1);
  if (g->stopping || g->ended) return 0;
  if (g->grace > 0) deadline_reserve(L, runtime(L));
  g->stopping = true;
  if (lua_getiuservalue(L, 1, GROUP_STOPPING) != LUA_TNIL) task_settle(L, rt, 2, 0);
  if (g->grace > 0)
    scope_arm(L, &g->scope, g->grace);
  else {
    lua_settop(L, 1);
    lua_pushliteral(L, "the task group was stopped");
    scope_cancel(L, &g->scope, 2);
  }
  return 0;
}

static void push_never_stopped(lua_State *L) {
  error_push(L, ERROR_OPERATION, "the task group has ended: it will never be stopped");
}

/* group:wait_stopping(token) */
static int l_wait_stopping(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct group *g = check_group(L);
  operation_check_tokens(L, rt, 2);
  lua_settop(L, 2);
  if (g->stopping) return 0;
  if (g->ended) {
    push_never_stopped(L);
    return lua_error(L);
  }
  if (lua_getiuservalue(L, 1, GROUP_STOPPING) == LUA_TNIL) {
    lua_pop(L, 1);
    task_new_promise(L);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NAMES);
    lua_pushvalue(L, -2);
    lua_pushliteral(L, "wait_stopping");
    lua_rawset(L, -3);
    lua_pop(L, 1);
    if (g->stopping) return 0; /* by a finalizer */
    if (g->ended) {            /* the same */
      push_never_stopped(L);
      return lua_error(L);
    }
    if (lua_getiuservalue(L, 1, GROUP_STOPPING) == LUA_TNIL) {
      lua_pop(L, 1);
      lua_pushvalue(L, -1);
      lua_setiuservalue(L, 1, GROUP_STOPPING);
    }
  }
  lua_replace(L, 1);
  return timer_await_with(L);
}

static int l_is_stopping(lua_State *L) {
  lua_pushboolean(L, check_group(L)->stopping);
  return 1;
}

static int l_token(lua_State *L) {
  struct group *g = check_group(L);
  if (!g->ended || (g->scope.token != NULL && !g->scope.canceled)) {
    scope_push_token(L, &g->scope);
    return 1;
  }
  if (lua_getiuservalue(L, 1, GROUP_TOKEN) != LUA_TNIL) return 1;
  token_new(L, false); /* nobody has asked before the end, and nobody cancels it now */
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, 1, GROUP_TOKEN);
  return 1;
}

/* ---- the end ---- */

void group_end(struct scope *s) { ((struct group *)s)->ended = true; }

static int join_k(lua_State *L, int status, lua_KContext ctx);

/* waits until no child runs, then closes the group; true if there is nothing more to tell */
static int join(lua_State *L, struct group *g) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  if (g->running > 0 && fiber_can_suspend(L, rt)) { /* else it is being abandoned */
    lua_settop(L, 1);
    struct task *idle = task_new_promise(L);
    if (g->running > 0) { /* still: a finalizer may have ended the last one */
      lua_pushvalue(L, -1);
      lua_setiuservalue(L, 1, GROUP_IDLE);
      lua_insert(L, 1); /* promise group */
      return fiber_await(L, rt, me, idle, join_k, true);
    }
  }
  lua_settop(L, 1);
  bool awaited = !g->stopping && lua_getiuservalue(L, 1, GROUP_STOPPING) != LUA_TNIL;
  int promise = lua_gettop(L);
  if (awaited) { /* by tasks that are not in it */
    push_never_stopped(L);
    if (g->running > 0 && fiber_can_suspend(L, rt))
      return join(L, g);    /* a finalizer has started one */
    awaited = !g->stopping; /* … or has stopped it */
  }
  g->ended = true; /* nothing is created from the last look on */
  if (awaited) {
    ((struct task *)lua_touserdata(L, promise))->flags |= TASK_OBSERVED;
    task_settle_faulted(L, rt, promise, 0);
  }
  if (!g->body_failed) g->canceled = g->scope.canceled;
  bool told = lua_getiuservalue(L, 1, GROUP_FAILED) != LUA_TNIL;
  told = lua_getiuservalue(L, 1, GROUP_WINNER) != LUA_TNIL || told;
  told = told || g->body_failed || g->canceled || g->policy == FIRST_SUCCESS;
  if (g->scope.canceled) { /* the scope lets go of it */
    scope_push_token(L, &g->scope);
    lua_setiuservalue(L, 1, GROUP_TOKEN);
  }
  if (g->scope.owner != NULL) scope_finish(L, rt, &g->scope);
  lua_pushboolean(L, !told);
  return 1;
}

bool group_is_joined(lua_State *L, const struct fiber *f) {
  const struct scope *s = f->member.scope;
  if (s == NULL || s->kind != SCOPE_GROUP || s->owner != f) return false;
  scope_push(L, s);
  lua_getiuservalue(L, -1, GROUP_IDLE);
  const struct task *idle = (const struct task *)lua_touserdata(L, -1);
  lua_pop(L, 2);
  return idle != NULL && idle == f->u.wait.on;
}

void group_list_children(lua_State *L, const struct fiber *f) {
  struct link *members = &f->member.scope->members;
  lua_Integer n = (lua_Integer)lua_rawlen(L, -1);
  for (struct link *l = members->next; l != members; l = l->next) {
    struct task *t = &container_of(l, struct pending, member.link)->task;
    if (task_is(t, KIND_SCOPE)) t = (struct task *)((struct scope *)(void *)t)->owner; /* a base */
    if (t == NULL || !task_is(t, KIND_FIBER) || !(t->traits & TRAIT_CHILD)) continue;
    if (t == &f->task) continue; /* the owner, who is in it, may be a child of another group */
    if (task_push_whole(L, t)) lua_rawseti(L, -2, ++n);
  }
}

static int join_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  (void)status;
  if (!fiber_on_top(L, rt) || !task_done((const struct task *)ctx))
    return lua_yieldk(L, 0, ctx, join_k); /* not resumed by us */
  lua_remove(L, 1);
  return join(L, (struct group *)lua_touserdata(L, 1));
}

/* join(group, ok, error): the body has returned, or was left by that error */
static int l_join(lua_State *L) {
  struct group *g = check_group(L);
  lua_settop(L, 3);
  if (g->scope.co != L && !g->ended)
    return error_throw(
        L, ERROR_OPERATION,
        "a task group is not for others to close: task_group does, when its function returns");
  if (!lua_toboolean(L, 2) && !g->ended) {
    g->body_failed = true;
    g->canceled = g->scope.canceled;
    if (!error_is(L, 3, ERROR_CANCELED)) {
      g->body_raised = true;
      lua_pushboolean(L, 0);
      append(L, g, GROUP_FAILED);
    }
    cancel(L, g, "the body of the task group was left by an error");
  }
  lua_settop(L, 1);
  return join(L, g);
}

static int l_ended(lua_State *L) {
  lua_pushboolean(L, check_group(L)->ended);
  return 1;
}

/* [-0, +1, -] takes it out: a scope may stay for tokens below it, of tasks that it must not keep */
static void take(lua_State *L, int list) {
  lua_getiuservalue(L, 1, list);
  lua_pushnil(L);
  lua_setiuservalue(L, 1, list);
}

/* closed_by_user(group): whether it is not task_group whose variable is closed, with the function that
** calls us. Where an error closes it, that cannot be told of one in the same coroutine. */
static int l_closed_by_user(lua_State *L) {
  const struct group *g = check_group(L);
  const struct runtime *rt = runtime(L);
  lua_Debug ar;
  lua_pushboolean(L, g->scope.co != L || (lua_getstack(L, 2, &ar) && lua_getinfo(L, "S", &ar) &&
                                          *ar.what != 'C' && !module_is_ours(rt, ar.source)));
  return 1;
}

/* take_group_state(group) -> policy, failures or nil, winner or nil, canceled by its own code, had
** children */
static int l_state(lua_State *L) {
  static const char *const policies[] = {"fail_fast", "supervise", "first_success"};
  const struct group *g = check_group(L);
  lua_pushstring(L, policies[g->policy]);
  take(L, GROUP_FAILED);
  take(L, GROUP_WINNER);
  lua_pushboolean(L, g->canceled);
  lua_pushboolean(L, g->had_children);
  return 5;
}

static int group_depth(const struct scope *s) {
  for (s = s->outer; s != NULL; s = s->outer)
    if (s->kind == SCOPE_GROUP) return ((const struct group *)s)->depth + 1;
  return 1;
}

/* open_group(limit or nil, policy, grace or nil) -> group, how many groups the task is in */
static int l_open(lua_State *L) {
  struct runtime *rt = runtime(L);
  double limit = lua_isnoneornil(L, 1) ? HUGE_VAL : (double)luaL_checknumber(L, 1);
  enum policy policy = (enum policy)luaL_checkinteger(L, 2);
  double grace = lua_isnoneornil(L, 3) ? 0 : (double)luaL_checknumber(L, 3);
  if (rt->me != rt->outside) fiber_here(L, rt); /* it could not wait for its children */
  struct group *g =
      (struct group *)scope_block(L, "task_group", SCOPE_GROUP, sizeof(struct group), HUGE_VAL);
  g->limit = limit;
  g->policy = (uint8_t)policy;
  g->grace = grace;
  g->first = 1;
  g->depth = group_depth(&g->scope);
  lua_pushinteger(L, g->depth);
  return 2;
}

/* on_group_close(fn): what closes a group that is left by an error */
static int l_on_close(lua_State *L) {
  lua_settop(L, 1);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_GROUP));
  lua_insert(L, 1);
  lua_setfield(L, 1, "__close");
  return 0;
}

static const luaL_Reg functions[] = {{"open_group", l_open},
                                     {"join_group", l_join},
                                     {"group_ended", l_ended},
                                     {"take_group_state", l_state},
                                     {"on_group_close", l_on_close},
                                     {"closed_by_user", l_closed_by_user},
                                     {NULL, NULL}};

static const luaL_Reg methods[] = {{"spawn", l_spawn},
                                   {"cancel", l_cancel},
                                   {"stop", l_stop},
                                   {"wait_stopping", l_wait_stopping},
                                   {NULL, NULL}};
static const luaL_Reg properties[] = {
    {"token", l_token}, {"is_stopping", l_is_stopping}, {NULL, NULL}};

ONCE static void group_open(lua_State *L) {
  module_class(L, TAG_GROUP, "coflow.TaskGroup", methods, properties);
}

const struct part group_part = {functions, group_open, NULL};
