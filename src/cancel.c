/*
** cancel.c - cancellation sources, tokens and registrations.
**
** The token is the thing; a source is the right to cancel it. A token knows
**
** - its registrations, oldest first in a list (TOKEN_LIST), each a userdata of its own, so that a callback
**   runs though nobody kept its registration. Unregistering only marks it and lets its callback go: the
**   dead leave the list when they are its last, or when they might outnumber the living (token_sweep).
**   A linked source is a registration of another sort: it holds the token to be canceled next.
** - what it interrupts besides (struct pending): operations that were given it, and fibers that nap with
**   it, both by address; for them it is held (OP_TOKEN, RUNTIME_GIVEN). They leave when they complete.
**   A token keeps none of them alive, unless a deadline is armed on it or above it: then it will fire,
**   and what waits for it is held (token_armed).
** - for the token of a scope (scope.c): the scope, which is canceled with it.
**
** Canceling is iterative however deep the links are. Whoever cancels marks tokens, which puts them on a
** list (chained by TOKEN_UP, the newest on top); then the callbacks of the one on top run, newest first,
** each under a protected call, and a link among them marks the next token, which goes on top. The errors
** are collected in that order and raised as one Aggregate.
**
** Invariants: token->last is the registration at token->count of TOKEN_LIST, if there is one; a link that may
**             still cancel its child is in the links of its token.
**
** Source:    .NET CancellationTokenSource. One thread cancels here, so dispose never waits.
** SPDX-License-Identifier: MIT
*/
#include "token.h"

/* A token may have many: of most, nothing but this and their first user value is there. */
struct registration {
  uint32_t tag;
  bool pending; /* its callback may still run */
  bool captured, packed;
  bool in_context; /* it has a captured context, which is not the empty one */
  bool link;       /* it begins a struct token_link */
};
/* of a link, REGISTRATION_TARGET is the token to cancel; else a function or { function, arguments, n } */
enum { REGISTRATION_TARGET = 1, REGISTRATION_CONTEXT };

struct token_link {
  struct registration registration;
  struct link sibling; /* among those of the same token */
  struct token *child; /* the token to be canceled next */
};

static struct token_link *link_of(struct registration *r) { return (struct token_link *)(void *)r; }

/* ---- what a token interrupts ---- */

bool token_canceled(const struct token *k) { return k->canceled; }

bool token_armed(const struct token *k) {
  return k->arms > 0 || (k->scope != NULL && k->scope->armed);
}

bool token_armed_itself(const struct token *k) { return k->arms > 0; }

void token_link(struct token *k, struct link *l) { link_append(&k->pendings, l); }

/* [-0, +0, -] k was armed and is not, or the reverse: so are those linked to it, and what waits for any
** of them is held, or not. Nothing is created, nobody's code runs. */
void token_rearmed(lua_State *L, struct token *k) {
  struct runtime *rt = runtime(L);
  /* what is linked to a canceled one is about to be canceled, and must live until then */
  if (k->canceled || k->told == token_armed(k)) return;
  k->told = token_armed(k);
  k->rearming = rt->rearm;
  rt->rearm = k;
  if (rt->rearm_busy) return; /* a scope is between two tokens: no recursion */
  rt->rearm_busy = true;
  while ((k = rt->rearm) != NULL) {
    rt->rearm = k->rearming;
    bool armed = k->told;
    for (struct link *l = k->pendings.next; l != &k->pendings; l = l->next)
      pending_hold(L, container_of(l, struct pending, link), armed);
    for (struct link *l = k->links.next; l != &k->links; l = l->next)
      token_count_arm(L, container_of(l, struct token_link, sibling)->child, armed ? 1 : -1);
  }
  rt->rearm_busy = false;
}

/* [-0, +0, -] one armed deadline more, or less; a scope says itself when that makes a difference */
void token_count_arm(lua_State *L, struct token *k, int n) {
  bool before = token_armed(k);
  k->arms += n;
  if (k->scope != NULL)
    scope_rearm(L, k->scope);
  else if (token_armed(k) != before)
    token_rearmed(L, k);
}

/* ---- tokens ---- */

struct token *token_check(lua_State *L, int i) {
  return (struct token *)object_check(L, i, TAG_TOKEN);
}

struct token *token_opt(lua_State *L, int i) {
  if (lua_isnoneornil(L, i)) return NULL;
  struct token *k = token_check(L, i);
  return k->never ? NULL : k;
}

struct token *token_new(lua_State *L, bool ambient) {
  uint32_t class = ambient ? TAG_AMBIENT : TAG_TOKEN;
  struct token *k = (struct token *)object_new(L, class, sizeof *k, TOKEN_EXPIRY);
  k->tag = TAG_TOKEN;
  link_init(&k->pendings);
  link_init(&k->links);
  return k;
}

bool token_none(lua_State *L, int i) {
  const struct token *k = (const struct token *)object_test(L, i, TAG_TOKEN);
  return k != NULL && k->never;
}

void token_attach(struct token *k, struct scope *s) {
  k->scope = s;
  k->told = s->armed;
  s->token = k;
}

void token_detach(struct token *k) { k->scope = NULL; }

/* [-0, +1, -] the token from which the cancellation of the one at i comes: that itself, if from no other */
static void push_cause(lua_State *L, int i) {
  if (lua_getiuservalue(L, i, TOKEN_CAUSE) != LUA_TNIL) return;
  lua_pop(L, 1);
  lua_pushvalue(L, i);
}

void token_inherit(lua_State *L, int k, int from) {
  k = lua_absindex(L, k);
  from = lua_absindex(L, from);
  ((struct token *)lua_touserdata(L, k))->canceled = true;
  lua_getiuservalue(L, from, TOKEN_REASON);
  lua_setiuservalue(L, k, TOKEN_REASON);
  push_cause(L, from);
  lua_setiuservalue(L, k, TOKEN_CAUSE);
}

void token_push_error(lua_State *L, int i) {
  i = lua_absindex(L, i);
  bool token = object_test(L, i, TAG_TOKEN) != NULL;
  if (!token || lua_getiuservalue(L, i, TOKEN_REASON) != LUA_TSTRING)
    error_push(L, ERROR_CANCELED, "the operation was canceled");
  else
    error_push(L, ERROR_CANCELED, "the operation was canceled: %s", lua_tostring(L, -1));
  if (!token) return;
  lua_pushvalue(L, i);
  lua_setfield(L, -2, "token");
  lua_pushvalue(L, -2);
  lua_setfield(L, -2, "reason");
  push_cause(L, i);
  lua_setfield(L, -2, "cause");
  lua_remove(L, -2);
}

void token_push_canceled(lua_State *L, int reason) {
  struct token *k = token_new(L, false);
  k->canceled = true;
  lua_pushvalue(L, reason);
  lua_setiuservalue(L, -2, TOKEN_REASON);
}

/* [-0, +0, -] the callback of the registration r at i will not run any more; lets go of it */
static void clear(lua_State *L, int i, struct registration *r) {
  if (i < 0) i = lua_absindex(L, i);
  r->pending = false;
  if (r->link) link_drop(&link_of(r)->sibling);
  lua_pushnil(L);
  lua_setiuservalue(L, i, REGISTRATION_TARGET);
  if (!r->in_context) return;
  lua_pushnil(L);
  lua_setiuservalue(L, i, REGISTRATION_CONTEXT);
}

/* [-0, +0, -] takes the dead out of the list on top, of that token */
void token_sweep(lua_State *L, struct token *token) {
  int kept = 0;
  for (int i = 1; i <= token->count; i++) {
    lua_rawgeti(L, -1, i);
    struct registration *r = (struct registration *)lua_touserdata(L, -1);
    if (r->pending) {
      token->last = r;
      if (++kept != i) {
        lua_rawseti(L, -2, kept);
        continue;
      }
    }
    lua_pop(L, 1);
  }
  for (int i = kept + 1; i <= token->count; i++) {
    lua_pushnil(L);
    lua_rawseti(L, -2, i);
  }
  token->count = kept;
  token->swept = runtime(L)->unregistered;
}

/* [-1, +0, m] appends the registration r on top to the list below it, of that token */
static void attach(lua_State *L, struct token *token, struct registration *r) {
  if (token->count > token->limit) {
    if (token->swept != runtime(L)->unregistered) { /* else all are alive, as they were then */
      lua_insert(L, -2);
      token_sweep(L, token);
      lua_insert(L, -2);
    }
    token->limit = 2 * token->count + 16;
  }
  /* registered and unregistered again and again: the last one gives up its place */
  int at = token->count > 0 && !token->last->pending ? token->count : token->count + 1;
  lua_rawseti(L, -2, at);
  token->count = at;
  token->last = r;
  r->pending = true;
}

/* [-0, +0, -] the token above, whose link r is, will not cancel r->child any more */
static void drop_link(lua_State *L, const struct token *up, struct registration *r) {
  if (r->pending && r->link && up->told) token_count_arm(L, link_of(r)->child, -1);
}

/* [-0, +0, -] drops all registrations of the token at k */
void token_drop_registrations(lua_State *L, int k) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  k = lua_absindex(L, k);
  lua_getiuservalue(L, k, TOKEN_LIST);
  lua_pushnil(L);
  lua_setiuservalue(L, k, TOKEN_LIST);
  for (; token->count > 0; token->count--) {
    lua_rawgeti(L, -1, token->count);
    struct registration *r = (struct registration *)lua_touserdata(L, -1);
    drop_link(L, token, r);
    clear(L, -1, r);
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
}

void token_drop_pendings(struct token *k) {
  while (k->pendings.next != &k->pendings) link_drop(k->pendings.next);
}

/* The links of a token: { registration, token above, registration, token above … }. */

void token_unfollow(lua_State *L, int k) {
  k = lua_absindex(L, k);
  if (lua_getiuservalue(L, k, TOKEN_LINKS) == LUA_TTABLE) {
    lua_pushnil(L);
    lua_setiuservalue(L, k, TOKEN_LINKS);
    for (int i = 1; lua_rawgeti(L, -1, i) == LUA_TUSERDATA; i += 2) {
      struct registration *r = (struct registration *)lua_touserdata(L, -1);
      lua_rawgeti(L, -2, i + 1);
      runtime(L)->unregistered++;
      drop_link(L, (const struct token *)lua_touserdata(L, -1), r);
      clear(L, -2, r);
      lua_pop(L, 2);
    }
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
}

void token_follow(lua_State *L, int k, int up) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  struct token *above = (struct token *)lua_touserdata(L, up);
  if (above->never) return;
  luaL_checkstack(L, 10, NULL);
  struct token_link *l =
      (struct token_link *)object_new(L, TAG_REGISTRATION, sizeof *l, REGISTRATION_TARGET);
  l->registration.link = true;
  lua_pushvalue(L, k);
  lua_setiuservalue(L, -2, REGISTRATION_TARGET);
  module_push_table(L, k, TOKEN_LINKS); /* registration links */
  lua_Integer n = (lua_Integer)lua_rawlen(L, -1);
  lua_pushvalue(L, up);
  lua_rawseti(L, -2, n + 2); /* the one that may want memory first: until n + 1 is there, none is */
  lua_pushvalue(L, -2);
  lua_rawseti(L, -2, n + 1);
  lua_pop(L, 1);
  module_push_table(
      L, up, TOKEN_LIST); /* last: a finalizer that runs meanwhile may reset the token above */
  lua_insert(L, -2);      /* list registration */
  bool cleared = lua_getiuservalue(L, -1, REGISTRATION_TARGET) == LUA_TNIL;
  lua_pop(L, 1);
  if (cleared || token->canceled ||
      token->disposed) { /* a finalizer has canceled it, or disposed */
    lua_pop(L, 2);
    return;
  }
  if (!above->canceled && !above->disposed) {
    l->child = token;
    attach(L, above, &l->registration);
    link_append(&above->links, &l->sibling);
    if (above->told) token_count_arm(L, token, 1);
    lua_pop(L, 1);
    return;
  }
  if (above->canceled && !token->canceled) { /* a finalizer has canceled it */
    lua_getiuservalue(L, up, TOKEN_REASON);
    push_cause(L, up);
    lua_pushnil(L); /* … reason cause list */
    int list = lua_gettop(L);
    token_mark_all(L, k, list - 2, list - 1, list);
    token_run(L, false);
    lua_pop(L, 2);
  }
  lua_pop(L, 2);
}

/* ---- canceling ---- */

void token_mark(lua_State *L, int k, int reason, int cause, int run) {
  struct runtime *rt = runtime(L);
  struct token *token = (struct token *)lua_touserdata(L, k);
  bool busy = rt->land_busy;
  rt->land_busy = true; /* what completes lands when all is marked */
  token->canceled = true;
  if (token->links.next != &token->links) rt->linked = true;
  lua_pushvalue(L, reason);
  lua_setiuservalue(L, k, TOKEN_REASON);
  if (!lua_rawequal(L, k, cause)) {
    lua_pushvalue(L, cause);
    lua_setiuservalue(L, k, TOKEN_CAUSE);
  }
  while (token->pendings.next != &token->pendings) {
    struct link *l = token->pendings.next;
    link_drop(l);
    pending_interrupt(L, container_of(l, struct pending, link));
  }
  token_disarm(L, k);
  token_unfollow(L, k);
  if (lua_getiuservalue(L, k, TOKEN_PROMISE) == LUA_TUSERDATA) task_settle(L, rt, lua_gettop(L), 0);
  lua_pop(L, 1);
  if (token->count > 0) {
    lua_pushvalue(L, run);
    lua_setiuservalue(L, k, TOKEN_UP);
    lua_pushvalue(L, k);
    lua_replace(L, run);
  }
  rt->land_busy = busy;
}

/* [-0, +0, -] the token at k, and its scope */
void token_mark_all(lua_State *L, int k, int reason, int cause, int run) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  struct runtime *rt = runtime(L);
  if (token->scope != NULL) scope_mark(L, rt, token->scope, reason, cause, run);
  if (!token->canceled) token_mark(L, k, reason, cause, run);
  if (rt->landing != NULL) loop_land_all(L, rt);
}

/* [-0, +0, e] there is room for the callback of the registration at i, and for what is done about it */
static void check_room(lua_State *L, int i, const struct registration *r) {
  if (!r->packed) return;
  lua_getiuservalue(L, i, REGISTRATION_TARGET);
  luaL_checkstack(L, (int)values_count(L, -1) + LUA_MINSTACK, "too many arguments of a callback");
  lua_pop(L, 1);
}

/* What the running task had before is above the registration while the callback runs. */
enum { SAVED_LOCALS = 1, SAVED_CONTEXT };

/* [-0, +n, e] calls the callback of the registration at i, which is on top, in its context; the status,
** error on top */
static int call(lua_State *L, struct runtime *rt, int i, struct registration *r) {
  struct task *me = rt->me;
  uint16_t suppressed = me->flags & TASK_SUPPRESSED;
  bool plain = !r->in_context && !(me->flags & TASK_HAS_CONTEXT);
  check_room(L, i, r);
  if (r->captured) me->flags &= (uint16_t)~TASK_SUPPRESSED;
  if (plain)
    lua_pushnil(L);
  else if (r->captured) {
    lua_getiuservalue(L, i, REGISTRATION_CONTEXT);
    context_swap(L);
  } else
    context_push_current(L);    /* the canceler's, whom the callback's writes do not reach */
  schedule_push_context(L, me); /* what it does to the synchronization context stays inside, too */
  int status = LUA_OK;
  if (lua_getiuservalue(L, i, REGISTRATION_TARGET) == LUA_TNIL)
    lua_pop(L, 1); /* a value_changed handler has unregistered it */
  else {
    int arguments = r->packed ? values_unpack(L) - 1 : 0;
    clear(L, i, r);
    rt->depth++;
    status = guard_call(L, rt, arguments, 0);
    rt->depth--;
  }
  if (me->traits & TRAIT_PLAN) {
    lua_pushvalue(L, i + SAVED_CONTEXT);
    schedule_set_context(L, me);
  }
  me->flags = (uint16_t)((me->flags & ~TASK_SUPPRESSED) | suppressed);
  if (plain && !(me->flags & TASK_HAS_CONTEXT)) return status;
  lua_pushvalue(L, i + SAVED_LOCALS);
  context_swap(L);
  lua_pop(L, 1);
  return status;
}

/* [-0, +0, -] takes the token on top of the list at `run` off */
static void next_token(lua_State *L, int run) {
  lua_pushnil(L);
  lua_setiuservalue(L, run, TOKEN_LIST);
  lua_getiuservalue(L, run, TOKEN_UP);
  lua_pushnil(L);
  lua_setiuservalue(L, run, TOKEN_UP);
  lua_replace(L, run);
}

/* [-0, +0, m] adds the error on top to the list at `errors` */
static void add_error(lua_State *L, int errors) {
  if (lua_isnil(L, errors)) {
    lua_newtable(L);
    lua_replace(L, errors);
  }
  lua_Integer n = values_count(L, errors) + 1;
  lua_rawseti(L, errors, n);
  lua_pushinteger(L, n);
  lua_setfield(L, errors, "n");
}

/* [-0, +0, m] marks the token that the link at i, in the chain of the token at `up`, leads to */
static void follow_link(lua_State *L, int i, int up) {
  struct registration *r = (struct registration *)lua_touserdata(L, i);
  int top = lua_gettop(L);
  lua_getiuservalue(L, i, REGISTRATION_TARGET);
  struct token *child = (struct token *)lua_touserdata(L, -1);
  clear(L, i, r);
  if (child != NULL && !child->canceled && !child->disposed) {
    lua_getiuservalue(L, up, TOKEN_REASON);
    push_cause(L, up);
    token_mark_all(L, top + 1, top + 2, top + 3, up); /* replaces `up`, which it is above */
  }
  lua_settop(L, top);
}

/* [-0, +0, m] cancels the scopes that are under the token on top of the list at `run`, whose tokens come
** above it there; false: there are none any more */
static bool follow_scopes(lua_State *L, int run) {
  const struct token *token = (const struct token *)lua_touserdata(L, run);
  bool found = false;
  lua_getiuservalue(L, run, TOKEN_LIST);
  for (lua_Integer k = token->count; k > 0; k--) {
    lua_rawgeti(L, -1, k);
    struct registration *r = (struct registration *)lua_touserdata(L, -1);
    if (r->pending && r->link && link_of(r)->child->scope != NULL) {
      found = true;
      follow_link(L, lua_gettop(L), run);
    }
    lua_pop(L, 1);
  }
  lua_pop(L, 1);
  return found;
}

/* [-0, +0, m] the callbacks of the list at `run` do not run; nor are sources canceled that are linked to
** those tokens, but scopes under them are */
static void drop_rest(lua_State *L, int run) {
  while (!lua_isnil(L, run)) {
    if (follow_scopes(L, run)) continue;
    token_drop_registrations(L, run);
    next_token(L, run);
  }
}

/* [-0, +1, m] the next registration of the token, which is on top of the list at `run`, whose callback
** is to run; they lie above that list. NULL: [-0, +n] another token may be on top now, to which a link
** has led, or the one below. */
static struct registration *next_callback(lua_State *L, int run, struct token *token) {
  while (token->count > 0) {
    lua_rawgeti(L, run + 1, token->count--);
    struct registration *r = (struct registration *)lua_touserdata(L, run + 2);
    if (r->pending && !r->link) return r;
    if (r->pending) {
      follow_link(L, run + 2, run);
      return NULL;
    }
    lua_pop(L, 1);
  }
  next_token(L, run);
  return NULL;
}

/* [-1, +1, m] runs the callbacks of the list of marked tokens on top, and of all linked to them; leaves
** the list of their errors, or nil. With `first` the first error is raised and the other callbacks
** dropped: raw if it is of the token itself, as that list if it is of one that is linked to it. */
static void run_callbacks(lua_State *L, bool first) {
  luaL_checkstack(L, 20, NULL);
  lua_pushnil(L);
  lua_insert(L, -2); /* errors run */
  int run = lua_gettop(L), errors = run - 1;
  struct runtime *rt = runtime(L);
  const struct token *own = (const struct token *)lua_touserdata(L, run), *end = NULL;
  struct token *token;
  while ((token = (struct token *)lua_touserdata(L, run)) != NULL && token != end) {
    struct registration *r;
    lua_getiuservalue(L, run, TOKEN_LIST); /* errors run registrations */
    while ((r = next_callback(L, run, token)) != NULL) {
      if (call(L, rt, run + 2, r) != LUA_OK) { /* … error */
        if (first && token == own) {
          drop_rest(L, run);
          lua_error(L);
        }
        add_error(L, errors);
        if (first) end = own;
      }
      lua_settop(L, run + 1);
    }
    lua_settop(L, run);
  }
  drop_rest(L, run);
  lua_settop(L, errors);
}

/* [-1, +0, v] raises an Aggregate of the list of errors on top, unless it is nil */
static void raise_errors(lua_State *L) {
  if (!lua_isnil(L, -1)) {
    lua_Integer n = values_count(L, -1);
    values_mark(L, -1, n);
    error_push(L, ERROR_AGGREGATE, "%d callback(s) of a cancellation token failed", (int)n);
    lua_pushvalue(L, -2);
    lua_setfield(L, -2, "inner_exceptions");
    lua_error(L);
  }
  lua_pop(L, 1);
}

void token_run(lua_State *L, bool first) {
  if (lua_isnil(L, -1)) {
    lua_pop(L, 1);
    return;
  }
  run_callbacks(L, first);
  raise_errors(L);
}

void token_run_reported(lua_State *L) {
  if (lua_isnil(L, -1)) {
    lua_pop(L, 1);
    return;
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_CALLBACKS);
  lua_insert(L, -2);
  if (lua_pcall(L, 1, 0, 0) == LUA_OK) return;
  error_report(L, -1, 0);
  lua_pop(L, 1);
}

/* arguments: a list of marked tokens */
int token_run_callbacks(lua_State *L) {
  lua_settop(L, 1);
  token_run(L, false);
  return 0;
}

/* ---- Lua face: tokens ---- */

static int l_token_requested(lua_State *L) {
  lua_pushboolean(L, token_check(L, 1)->canceled);
  return 1;
}

static int l_token_can_be(lua_State *L) {
  lua_pushboolean(L, !token_check(L, 1)->never);
  return 1;
}

static int l_token_reason(lua_State *L) {
  token_check(L, 1);
  lua_getiuservalue(L, 1, TOKEN_REASON);
  return 1;
}

static int l_token_throw(lua_State *L) {
  if (!token_check(L, 1)->canceled) return 0;
  token_push_error(L, 1);
  return lua_error(L);
}

/* [-0, +1, m] the task that is complete once the token at index 1 is canceled */
static void push_promise(lua_State *L) {
  struct runtime *rt = runtime(L);
  const struct token *k = token_check(L, 1);
  if (lua_getiuservalue(L, 1, TOKEN_PROMISE) != LUA_TNIL) return;
  lua_pop(L, 1);
  task_new_named(L, "cancellation");
  if (lua_getiuservalue(L, 1, TOKEN_PROMISE) != LUA_TNIL) { /* by a finalizer */
    lua_remove(L, -2);
    return;
  }
  lua_pop(L, 1);
  if (k->canceled) task_settle(L, rt, lua_gettop(L), 0);
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, 1, TOKEN_PROMISE);
}

/* token:wait_async(other) -> a task that is complete once the token is canceled */
static int l_token_wait_async(lua_State *L) {
  token_check(L, 1);
  token_opt(L, 2);
  lua_settop(L, 2);
  push_promise(L);
  lua_replace(L, 1); /* promise other: as wait_async(promise, nil, other) */
  lua_pushnil(L);
  lua_insert(L, 2);
  return timer_wait_async(L);
}

static int wait_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  struct task *on = (struct task *)ctx, *me = rt->me;
  bool interrupted = me->flags & TASK_INTERRUPTED && fiber_on_top(L, rt);
  if (interrupted && token_check(L, 2)->canceled) { /* the ambient token: it was waited for */
    me->flags &= (uint16_t)~TASK_INTERRUPTED;
    return 0;
  }
  if (!fiber_awaited(L, on, status)) return lua_yieldk(L, 0, ctx, wait_k);
  return task_push_outcome(L, 1, on);
}

/* token:wait(other): returns once the token is canceled, be it the ambient one */
static int l_token_wait(lua_State *L) {
  struct runtime *rt = runtime(L);
  const struct token *k = token_check(L, 1);
  struct token *other = token_opt(L, 2);
  lua_settop(L, 2);
  if (k->canceled && (other == NULL || !token_canceled(other))) return 0;
  bool deaf = token_none(L, 2);
  struct fiber *me = fiber_here(L, rt);
  if (me == NULL) return fiber_outside(L, l_token_wait);
  if (other == NULL)
    push_promise(L);
  else {
    module_push_function(L, l_token_wait_async);
    lua_pushvalue(L, 1);
    lua_pushvalue(L, 2);
    lua_call(L, 2, 1);
  }
  lua_replace(L, 2);
  lua_insert(L, 1); /* task token */
  struct task *on = (struct task *)lua_touserdata(L, 1);
  if (task_done(on)) return task_push_outcome(L, 1, on);
  return fiber_await(L, rt, me, on, wait_k, deaf);
}

static int l_is_token(lua_State *L) {
  lua_pushboolean(L, object_test(L, 1, TAG_TOKEN) != NULL);
  return 1;
}

/* [-0, +1, m] the registration of a callback, not yet in a list; its user values are nil */
static struct registration *registration_new(lua_State *L, int uservalues) {
  return (struct registration *)object_new(L, TAG_REGISTRATION, sizeof(struct registration),
                                           uservalues);
}

/* [-0, +1, m] the one registration of the token at k whose callback will not run, or has run */
static int push_inert(lua_State *L, int k) {
  if (lua_getiuservalue(L, k, TOKEN_INERT) == LUA_TNIL) {
    lua_pop(L, 1);
    registration_new(L, 0);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, k, TOKEN_INERT);
  }
  return 1;
}

static int register_callback(lua_State *L, bool capture) {
  struct runtime *rt = runtime(L);
  struct token *token = token_check(L, 1);
  argument_callable(L, 2);
  int n = lua_gettop(L) - 1;
  if (n > 1) values_pack(L, n); /* token packed */
  if (token->never || (token->disposed && !token->canceled)) return push_inert(L, 1);
  bool context = capture && rt->me->flags & TASK_HAS_CONTEXT;
  struct registration *r =
      registration_new(L, context ? REGISTRATION_CONTEXT : REGISTRATION_TARGET);
  r->captured = capture;
  r->packed = n > 1;
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, 3, REGISTRATION_TARGET);
  if (context) {
    context_push_flowing(L, rt->me);
    r->in_context = !lua_isnil(L, -1);
    lua_setiuservalue(L, 3, REGISTRATION_CONTEXT);
  }
  if (token->count > 0)
    lua_getiuservalue(L, 1, TOKEN_LIST);
  else
    module_push_table(L, 1, TOKEN_LIST);
  if (!token->canceled) {
    lua_pushvalue(L, 3);
    attach(L, token, r);
    lua_settop(L, 3);
    return 1;
  }
  lua_settop(L, 3);
  if (call(L, rt, 3, r) != LUA_OK) return lua_error(L); /* late: at once, its error to the caller */
  return push_inert(L, 1);
}

static int l_register(lua_State *L) { return register_callback(L, true); }
static int l_unsafe_register(lua_State *L) { return register_callback(L, false); }

static int l_unregister(lua_State *L) {
  struct registration *r = (struct registration *)object_check(L, 1, TAG_REGISTRATION);
  bool pending = r->pending;
  if (pending) {
    runtime(L)->unregistered++;
    clear(L, 1, r);
  }
  lua_pushboolean(L, pending);
  return 1;
}

static int l_registration_dispose(lua_State *L) {
  l_unregister(L);
  return 0;
}

/* the token of a scope, which may now be gone */
static int l_ambient_gc(lua_State *L) {
  struct token *k = (struct token *)object_test(L, 1, TAG_TOKEN);
  if (k == NULL || k->scope == NULL) return 0;
  struct scope *s = k->scope;
  if (task_push_weak(L, k)) return 0; /* called by hand */
  token_unfollow(L, 1);
  k->scope = NULL;
  if (s->token != k) return 0;
  s->token = NULL;
  if (s->owner == NULL) scope_left(L, runtime(L), s);
  return 0;
}

static const luaL_Reg functions[] = {{"is_token", l_is_token}, {NULL, NULL}};

static const luaL_Reg token_methods[] = {{"throw_if_cancellation_requested", l_token_throw},
                                         {"wait", l_token_wait},
                                         {"wait_async", l_token_wait_async},
                                         {"register", l_register},
                                         {"unsafe_register", l_unsafe_register},
                                         {NULL, NULL}};
static const luaL_Reg token_properties[] = {{"is_cancellation_requested", l_token_requested},
                                            {"can_be_canceled", l_token_can_be},
                                            {"reason", l_token_reason},
                                            {NULL, NULL}};
static const luaL_Reg registration_methods[] = {{"unregister", l_unregister},
                                                {"dispose", l_registration_dispose},
                                                {"__close", l_registration_dispose},
                                                {NULL, NULL}};

void cancel_open(lua_State *L) {
  module_functions(L, functions);
  module_push_function(L, token_run_callbacks);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_CALLBACKS);
  module_class(L, TAG_TOKEN, "coflow.CancellationToken", token_methods, token_properties);
  module_class(L, TAG_REGISTRATION, "coflow.CancellationTokenRegistration", registration_methods,
               NULL);
  module_finalized(L, TAG_TOKEN, TAG_AMBIENT, l_ambient_gc);
  token_new(L, false)->never = true;
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_NONE);
  lua_setfield(L, -2, "none");
  token_new(L, false)->canceled = true;
  lua_setfield(L, -2, "canceled");
}
