/*
** cancel.c - cancellation sources, tokens and registrations.
**
** The token is the thing; a source is the right to cancel it. A token knows
**
** - its registrations, newest first, each a userdata that holds the next older one, so that a callback
**   runs though nobody kept its registration. Unregistering only marks it and lets its callback go: the
**   dead leave the chain when they are at its head, or when they might outnumber the living (sweep).
**   A linked source is a registration of another sort: it holds the token to be canceled next.
** - what it interrupts: operations (struct pending), which it holds in a table, and fibers, by address:
**   those that sleep, or have not started, which the anchors hold. Both leave when they complete. So a
**   token does keep what awaits an operation under it; to keep only what an armed deadline will end
**   is the promise still to be kept.
**
** Canceling is iterative however deep the links are: a token that is being canceled remembers the one
** above it (TOKEN_UP), the walk goes down into a link and comes back up. Every callback runs, newest
** first, under a protected call; the errors are collected in that order and raised as one Aggregate.
**
** Invariant: token->newest is the C face of TOKEN_NEWEST, r->older that of REGISTRATION_OLDER.
**
** Source:    .NET CancellationTokenSource. One thread cancels here, so dispose never waits.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <math.h>

struct registration;
struct token {
  uint32_t tag;
  bool canceled, disposed, never;
  int free_slot;    /* of TOKEN_HELD, the table of interrupted operations */
  int count, limit; /* registrations in the chain; when to sweep it */
  struct registration *newest;
  struct link pendings; /* head of a circular list */
};
enum {
  TOKEN_NEWEST = TOKEN_HELD + 1,
  TOKEN_REASON,
  TOKEN_CAUSE,
  TOKEN_UP,
  TOKEN_LINKS,
  TOKEN_PROMISE,
  TOKEN_INERT,
  TOKEN_EXPIRY
};

struct source {
  uint32_t tag;
};
enum { SOURCE_TOKEN = 1 };

struct registration {
  uint32_t tag;
  bool pending; /* its callback may still run */
  bool link, captured, packed;
  bool in_context; /* the captured context is not the empty one */
  struct registration *older;
};
/* of a link, REGISTRATION_TARGET is the token to cancel; else a function or { function, arguments, n } */
enum { REGISTRATION_TARGET = 1, REGISTRATION_CONTEXT, REGISTRATION_OLDER };

struct expiry { /* the armed deadline of a token, which it holds */
  struct task task;
  struct deadline deadline;
};

/* ---- what a token interrupts ---- */

bool token_canceled(const struct token *k) { return k->canceled; }

void token_link(struct token *k, struct link *l) {
  l->next = &k->pendings;
  l->prev = k->pendings.prev;
  k->pendings.prev->next = l;
  k->pendings.prev = l;
}

void link_drop(struct link *l) {
  if (l->next == NULL) return;
  l->next->prev = l->prev;
  l->prev->next = l->next;
  l->next = l->prev = NULL;
}

/* [-0, +1, m] the slot table of the token at k */
static void push_held(lua_State *L, int k) {
  k = lua_absindex(L, k);
  if (lua_getiuservalue(L, k, TOKEN_HELD) != LUA_TNIL) return;
  lua_pop(L, 1);
  lua_createtable(L, 1, 0);
  if (lua_getiuservalue(L, k, TOKEN_HELD) != LUA_TNIL) { /* a finalizer has been here */
    lua_remove(L, -2);
    return;
  }
  lua_pop(L, 1);
  lua_pushvalue(L, -1);
  lua_setiuservalue(L, k, TOKEN_HELD);
}

bool token_hold(lua_State *L, int k, int i) {
  struct pending *p = (struct pending *)lua_touserdata(L, i);
  i = lua_absindex(L, i);
  push_held(L, k);
  if (((struct token *)lua_touserdata(L, k))->canceled) {
    lua_pop(L, 1);
    return false;
  }
  lua_pushvalue(L, k);
  lua_setiuservalue(L, i, OP_TOKEN);
  lua_pushvalue(L, i);
  p->task.held = (uint32_t)slots_add(L, -2, &((struct token *)lua_touserdata(L, k))->free_slot);
  lua_pop(L, 1);
  token_link((struct token *)lua_touserdata(L, k), &p->link);
  return true;
}

void token_drop(lua_State *L, int i) {
  struct pending *p = (struct pending *)lua_touserdata(L, i);
  link_drop(&p->link);
  if (p->task.held == 0) return;
  i = lua_absindex(L, i);
  lua_getiuservalue(L, i, OP_TOKEN);
  struct token *token = (struct token *)lua_touserdata(L, -1);
  lua_getiuservalue(L, -1, TOKEN_HELD);
  slots_free(L, -1, &token->free_slot, (int)p->task.held);
  p->task.held = 0;
  lua_pop(L, 2);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_TOKEN);
}

/* ---- tokens ---- */

static struct token *check_token(lua_State *L, int i) {
  return (struct token *)object_check(L, i, TAG_TOKEN);
}

struct token *token_opt(lua_State *L, int i) {
  if (lua_isnoneornil(L, i)) return NULL;
  struct token *k = check_token(L, i);
  return k->never ? NULL : k;
}

/* [-0, +1, m] */
static struct token *token_new(lua_State *L) {
  struct token *k = (struct token *)object_new(L, TAG_TOKEN, sizeof *k, TOKEN_EXPIRY);
  k->pendings.next = k->pendings.prev = &k->pendings;
  return k;
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
  if (lua_getiuservalue(L, i, TOKEN_CAUSE) == LUA_TNIL) {
    lua_pop(L, 1);
    lua_pushvalue(L, i);
  }
  lua_setfield(L, -2, "cause");
  lua_remove(L, -2);
}

/* [-0, +0, -] */
static void disarm(lua_State *L, int k) {
  k = lua_absindex(L, k);
  if (lua_getiuservalue(L, k, TOKEN_EXPIRY) == LUA_TUSERDATA) {
    struct expiry *e = (struct expiry *)lua_touserdata(L, -1);
    timer_drop(runtime(L), &e->deadline);
    if (!(e->task.flags & TASK_LINKED)) task_forget(L, &e->task);
    e->task.state = TASK_CANCELED; /* should it be on the ready list, it does nothing there */
    lua_pushnil(L);
    lua_setiuservalue(L, k, TOKEN_EXPIRY);
  }
  lua_pop(L, 1);
}

/* [-0, +0, -] the callback of the registration r at i will not run any more; lets go of it */
static void clear(lua_State *L, int i, struct registration *r) {
  if (i < 0) i = lua_absindex(L, i);
  r->pending = false;
  lua_pushnil(L);
  lua_setiuservalue(L, i, REGISTRATION_TARGET);
  if (!r->in_context) return;
  lua_pushnil(L);
  lua_setiuservalue(L, i, REGISTRATION_CONTEXT);
}

/* [-0, +1, -] takes the newest registration off the chain of the token at k */
static struct registration *take_newest(lua_State *L, int k) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  struct registration *r = token->newest;
  k = lua_absindex(L, k);
  lua_getiuservalue(L, k, TOKEN_NEWEST);
  lua_getiuservalue(L, -1, REGISTRATION_OLDER);
  lua_setiuservalue(L, k, TOKEN_NEWEST);
  lua_pushnil(L);
  lua_setiuservalue(L, -2, REGISTRATION_OLDER);
  token->newest = r->older;
  token->count--;
  r->older = NULL;
  return r;
}

/* [-0, +0, -] takes the dead out of the chain of the token at k */
static void sweep(lua_State *L, int k) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  while (token->newest && !token->newest->pending) {
    take_newest(L, k);
    lua_pop(L, 1);
  }
  if (token->newest == NULL) return;
  lua_getiuservalue(L, k, TOKEN_NEWEST); /* one that stays */
  for (struct registration *r = token->newest; r->older != NULL;) {
    lua_getiuservalue(L, -1, REGISTRATION_OLDER); /* stays next */
    struct registration *next = r->older;
    if (next->pending) {
      lua_replace(L, -2);
      r = next;
      continue;
    }
    lua_getiuservalue(L, -1, REGISTRATION_OLDER);
    lua_setiuservalue(L, -3, REGISTRATION_OLDER);
    lua_pushnil(L);
    lua_setiuservalue(L, -2, REGISTRATION_OLDER);
    lua_pop(L, 1);
    r->older = next->older;
    next->older = NULL;
    token->count--;
  }
  lua_pop(L, 1);
}

/* [-0, +0, -] puts the registration at i on top of the chain of the token at k */
static void attach(lua_State *L, int k, int i) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  struct registration *r = (struct registration *)lua_touserdata(L, i);
  if (token->count > token->limit) {
    sweep(L, k);
    token->limit = 2 * token->count + 16;
  }
  struct registration *head = token->newest;
  r->older = head;
  if (head != NULL) {
    lua_getiuservalue(L, k, TOKEN_NEWEST);
    if (!head->pending) { /* registered and unregistered again and again: it gives up its place */
      if (head->older != NULL) {
        lua_getiuservalue(L, -1, REGISTRATION_OLDER);
        lua_pushnil(L);
        lua_setiuservalue(L, -3, REGISTRATION_OLDER);
        lua_setiuservalue(L, i, REGISTRATION_OLDER);
      }
      lua_pop(L, 1);
      r->older = head->older;
      head->older = NULL;
      token->count--;
    } else
      lua_setiuservalue(L, i, REGISTRATION_OLDER);
  }
  lua_pushvalue(L, i);
  lua_setiuservalue(L, k, TOKEN_NEWEST);
  token->newest = r;
  token->count++;
  r->pending = true;
}

/* [-0, +0, -] drops all registrations of the token at k */
static void drop_registrations(lua_State *L, int k) {
  struct token *token = (struct token *)lua_touserdata(L, k);
  while (token->newest) {
    struct registration *r = take_newest(L, k);
    clear(L, -1, r);
    lua_pop(L, 1);
  }
}

/* [-0, +0, -] takes the token at k out of the tokens it is linked to */
static void unlink_parents(lua_State *L, int k) {
  k = lua_absindex(L, k);
  if (lua_getiuservalue(L, k, TOKEN_LINKS) == LUA_TTABLE) {
    for (int i = 1; lua_rawgeti(L, -1, i) == LUA_TUSERDATA; i++, lua_pop(L, 1))
      clear(L, -1, (struct registration *)lua_touserdata(L, -1));
    lua_pop(L, 1);
    lua_pushnil(L);
    lua_setiuservalue(L, k, TOKEN_LINKS);
  }
  lua_pop(L, 1);
}

/* ---- canceling ---- */

/* [-0, +0, -] the token at k is canceled from now on: interrupts what is under it; no callback yet */
static void mark(lua_State *L, int k, int reason, int cause) {
  struct runtime *rt = runtime(L);
  struct token *token = (struct token *)lua_touserdata(L, k);
  token->canceled = true;
  k = lua_absindex(L, k);
  lua_pushvalue(L, reason);
  lua_setiuservalue(L, k, TOKEN_REASON);
  if (cause != 0) {
    lua_pushvalue(L, cause);
    lua_setiuservalue(L, k, TOKEN_CAUSE);
  }
  disarm(L, k);
  unlink_parents(L, k);
  while (token->pendings.next != &token->pendings) {
    struct link *l = token->pendings.next;
    link_drop(l);
    pending_interrupt(L, container_of(l, struct pending, link), k);
  }
  if (lua_getiuservalue(L, k, TOKEN_PROMISE) == LUA_TUSERDATA) task_settle(L, rt, lua_gettop(L), 0);
  lua_pop(L, 1);
  if (rt->landing != NULL) loop_land_all(L, rt);
}

/* [-0, +n, -] calls the callback of the registration at i in its context; the status, error on top */
static int call(lua_State *L, int i) {
  struct registration *r = (struct registration *)lua_touserdata(L, i);
  struct runtime *rt = runtime(L);
  i = lua_absindex(L, i);
  uint16_t suppressed = rt->me->flags & TASK_SUPPRESSED;
  bool swap = r->captured && (r->in_context || rt->me->flags & TASK_HAS_CONTEXT);
  struct task *me = rt->me;
  if (r->captured) rt->me->flags &= (uint16_t)~TASK_SUPPRESSED;
  if (swap) {
    lua_getiuservalue(L, i, REGISTRATION_CONTEXT);
    context_swap(L); /* old */
  } else
    context_push_current(L); /* the canceler's, whom the callback's writes do not reach */
  int old = lua_gettop(L), arguments = 0;
  lua_getiuservalue(L, i, REGISTRATION_TARGET);
  if (r->packed) {
    lua_getfield(L, -1, "n");
    int n = (int)lua_tointeger(L, -1), packed = lua_gettop(L) - 1;
    lua_pop(L, 1);
    luaL_checkstack(L, n, NULL);
    for (int a = 1; a <= n; a++) lua_rawgeti(L, packed, a);
    lua_remove(L, packed);
    arguments = n - 1;
  }
  clear(L, i, r);
  rt->depth++;
  int status = lua_pcall(L, arguments, 0, 0);
  rt->depth--;
  me->flags = (uint16_t)((me->flags & ~TASK_SUPPRESSED) | suppressed);
  if (me->flags & TASK_HAS_CONTEXT || !lua_isnil(L, old)) {
    lua_pushvalue(L, old);
    context_swap(L);
    lua_pop(L, 1);
  }
  lua_remove(L, old);
  return status;
}

/* [-0, +1, m] runs the callbacks of the canceled token at k and of all linked to it; leaves the list
** of their errors, or nil. With `first` the first error is raised and the other callbacks dropped. */
static void run_callbacks(lua_State *L, int k, bool first) {
  luaL_checkstack(L, 20, NULL);
  lua_pushnil(L); /* errors */
  int errors = lua_gettop(L), at = errors + 1;
  lua_pushvalue(L, k); /* errors token */
  for (;;) {
    struct token *token = (struct token *)lua_touserdata(L, at);
    struct registration *r = token->newest;
    if (r == NULL) {
      if (lua_getiuservalue(L, at, TOKEN_UP) == LUA_TNIL) break;
      lua_pushnil(L);
      lua_setiuservalue(L, at, TOKEN_UP);
      lua_replace(L, at);
      continue;
    }
    take_newest(L, at); /* errors token registration */
    if (!r->pending) {
      lua_pop(L, 1);
      continue;
    }
    if (r->link) {
      lua_getiuservalue(L, -1, REGISTRATION_TARGET); /* … child */
      clear(L, -2, r);
      struct token *child = (struct token *)lua_touserdata(L, -1);
      if (child != NULL && !child->canceled && !child->disposed) {
        lua_getiuservalue(L, at, TOKEN_REASON);
        if (lua_getiuservalue(L, at, TOKEN_CAUSE) == LUA_TNIL) {
          lua_pop(L, 1);
          lua_pushvalue(L, at);
        }
        mark(L, at + 2, at + 3, at + 4);
        lua_pushvalue(L, at);
        lua_setiuservalue(L, at + 2, TOKEN_UP);
        lua_settop(L, at + 2);
        lua_replace(L, at);
      }
      lua_settop(L, at);
      continue;
    }
    if (call(L, -1) != LUA_OK) { /* errors token registration error */
      if (first) {
        for (bool up = true; up;) { /* what is left of the whole walk is dropped */
          drop_registrations(L, at);
          up = lua_getiuservalue(L, at, TOKEN_UP) != LUA_TNIL;
          if (!up) break;
          lua_pushnil(L);
          lua_setiuservalue(L, at, TOKEN_UP);
          lua_replace(L, at);
        }
        lua_pushvalue(L, at + 2);
        lua_error(L);
      }
      if (lua_isnil(L, errors)) {
        lua_newtable(L);
        lua_pushinteger(L, 0);
        lua_setfield(L, -2, "n");
        lua_replace(L, errors);
      }
      lua_getfield(L, errors, "n");
      lua_Integer n = lua_tointeger(L, -1) + 1;
      lua_pop(L, 1);
      lua_rawseti(L, errors, n);
      lua_pushinteger(L, n);
      lua_setfield(L, errors, "n");
    }
    lua_settop(L, at);
  }
  lua_settop(L, errors);
}

/* [-1, +0, v] raises an Aggregate of the list of errors on top, unless it is nil */
static void raise_errors(lua_State *L) {
  if (!lua_isnil(L, -1)) {
    lua_getfield(L, -1, "n");
    error_push(L, ERROR_AGGREGATE, "%d callback(s) of a cancellation token failed",
               (int)lua_tointeger(L, -1));
    lua_pushvalue(L, -3);
    lua_setfield(L, -2, "inner_exceptions");
    lua_error(L);
  }
  lua_pop(L, 1);
}

/* cancel_token(token, reason, first) */
static int l_cancel_token(lua_State *L) {
  struct token *token = check_token(L, 1);
  lua_settop(L, 3);
  if (token->canceled || token->never) {
    lua_pushboolean(L, 0);
    return 1;
  }
  mark(L, 1, 2, 0);
  run_callbacks(L, 1, lua_toboolean(L, 3));
  raise_errors(L);
  lua_pushboolean(L, 1);
  return 1;
}

/* upvalues as ever; argument: a canceled token */
static int l_run_callbacks(lua_State *L) {
  run_callbacks(L, 1, false);
  raise_errors(L);
  return 0;
}

void expiry_land(lua_State *L, int i) {
  struct expiry *e = (struct expiry *)lua_touserdata(L, i);
  task_forget(L, &e->task);
  if (task_done(&e->task)) return; /* disarmed in the meantime */
  e->task.state = TASK_SUCCEEDED;
  lua_getiuservalue(L, i, OP_TOKEN);
  int k = lua_gettop(L);
  if (!((struct token *)lua_touserdata(L, k))->canceled) {
    module_push_function(L, l_cancel_token);
    lua_pushvalue(L, k);
    if (lua_pcall(L, 1, 0, 0) != LUA_OK) error_report(L, -1, 0);
  }
  lua_settop(L, k - 1);
}

/* ---- Lua face: tokens ---- */

static int l_token_requested(lua_State *L) {
  lua_pushboolean(L, check_token(L, 1)->canceled);
  return 1;
}

static int l_token_can_be(lua_State *L) {
  lua_pushboolean(L, !check_token(L, 1)->never);
  return 1;
}

static int l_token_reason(lua_State *L) {
  check_token(L, 1);
  lua_getiuservalue(L, 1, TOKEN_REASON);
  return 1;
}

static int l_token_throw(lua_State *L) {
  if (!check_token(L, 1)->canceled) return 0;
  token_push_error(L, 1);
  return lua_error(L);
}

/* token:wait_async(other) -> a task that is complete once the token is canceled */
static int l_token_wait_async(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct token *k = check_token(L, 1);
  token_opt(L, 2);
  lua_settop(L, 2);
  if (lua_getiuservalue(L, 1, TOKEN_PROMISE) == LUA_TNIL) {
    lua_pop(L, 1);
    task_new(L, KIND_PROMISE, sizeof(struct task), 2);
    if (k->canceled) task_settle(L, rt, 3, 0);
    lua_pushvalue(L, 3);
    lua_setiuservalue(L, 1, TOKEN_PROMISE);
  }
  lua_replace(L, 1); /* promise other: as wait_async(promise, nil, other) */
  lua_pushnil(L);
  lua_insert(L, 2);
  return timer_wait_async(L);
}

static int l_token_wait(lua_State *L) {
  l_token_wait_async(L);
  lua_insert(L, 1);
  lua_settop(L, 1);
  return fiber_await_value(L);
}

static int l_is_token(lua_State *L) {
  lua_pushboolean(L, object_test(L, 1, TAG_TOKEN) != NULL);
  return 1;
}

/* [-0, +1, m] a registration, not yet in a chain; its user values are nil */
static struct registration *registration_new(lua_State *L) {
  return (struct registration *)object_new(L, TAG_REGISTRATION, sizeof(struct registration),
                                           REGISTRATION_OLDER);
}

/* [-0, +1, m] the one registration of the token at k whose callback will not run, or has run */
static int push_inert(lua_State *L, int k) {
  if (lua_getiuservalue(L, k, TOKEN_INERT) == LUA_TNIL) {
    lua_pop(L, 1);
    registration_new(L);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, k, TOKEN_INERT);
  }
  return 1;
}

static int register_callback(lua_State *L, bool capture) {
  struct runtime *rt = runtime(L);
  struct token *token = check_token(L, 1);
  module_check_callable(L, 2);
  int n = lua_gettop(L) - 1;
  if (n > 1) {
    lua_createtable(L, n, 1);
    lua_insert(L, 2); /* token packed fn arguments */
    for (int a = n; a >= 1; a--) lua_rawseti(L, 2, a);
    lua_pushinteger(L, n);
    lua_setfield(L, 2, "n");
  }
  if (token->never || (token->disposed && !token->canceled)) return push_inert(L, 1);
  struct registration *r = registration_new(L);
  r->captured = capture;
  r->packed = n > 1;
  lua_pushvalue(L, 2);
  lua_setiuservalue(L, 3, REGISTRATION_TARGET);
  if (capture && rt->me->flags & TASK_HAS_CONTEXT) {
    context_push_flowing(L, rt->me);
    r->in_context = !lua_isnil(L, -1);
    lua_setiuservalue(L, 3, REGISTRATION_CONTEXT);
  }
  if (!token->canceled) {
    attach(L, 1, 3);
    return 1;
  }
  if (call(L, 3) != LUA_OK) return lua_error(L); /* late: at once, its error to the caller */
  return push_inert(L, 1);
}

static int l_register(lua_State *L) { return register_callback(L, true); }
static int l_unsafe_register(lua_State *L) { return register_callback(L, false); }

static int l_unregister(lua_State *L) {
  struct registration *r = (struct registration *)object_check(L, 1, TAG_REGISTRATION);
  bool pending = r->pending;
  if (pending) clear(L, 1, r);
  lua_pushboolean(L, pending);
  return 1;
}

static int l_registration_dispose(lua_State *L) {
  l_unregister(L);
  return 0;
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

/* [-0, +0, m] arms the deadline of the token at k */
static void arm(lua_State *L, int k, double seconds) {
  k = lua_absindex(L, k);
  if (seconds == HUGE_VAL) {
    disarm(L, k);
    return;
  }
  struct expiry *e = (struct expiry *)task_new(L, KIND_EXPIRY, sizeof *e, OP_TOKEN);
  e->deadline.index = -1;
  disarm(L, k);
  timer_reserve(L);
  lua_pushvalue(L, k);
  lua_setiuservalue(L, -2, OP_TOKEN);
  task_hold(L, -1, &e->task);
  lua_setiuservalue(L, k, TOKEN_EXPIRY);
  timer_add(runtime(L), &e->deadline, &e->task, seconds);
}

/* [-0, +1, m] a source and its token, whose index is returned */
static int source_new(lua_State *L) {
  object_new(L, TAG_SOURCE, sizeof(struct source), 1);
  token_new(L);
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

/* the class itself, called */
static int l_source_call(lua_State *L) {
  lua_remove(L, 1);
  return l_source_new(L);
}

static int l_source_linked(lua_State *L) {
  int n = lua_gettop(L);
  luaL_checkany(L, 1);
  for (int i = 1; i <= n; i++) check_token(L, i);
  luaL_checkstack(L, 20, NULL);
  int k = source_new(L); /* … source token */
  struct token *token = (struct token *)lua_touserdata(L, k);
  lua_createtable(L, n, 0); /* … source token links */
  for (int i = 1; i <= n; i++) {
    registration_new(L)->link = true;
    lua_pushvalue(L, k);
    lua_setiuservalue(L, -2, REGISTRATION_TARGET);
    lua_rawseti(L, k + 1, i);
  }
  for (int i = 1; i <= n; i++)
    if (((struct token *)lua_touserdata(L, i))->canceled) { /* born canceled */
      token->canceled = true;
      lua_getiuservalue(L, i, TOKEN_REASON);
      lua_setiuservalue(L, k, TOKEN_REASON);
      if (lua_getiuservalue(L, i, TOKEN_CAUSE) == LUA_TNIL) {
        lua_pop(L, 1);
        lua_pushvalue(L, i);
      }
      lua_setiuservalue(L, k, TOKEN_CAUSE);
      lua_settop(L, k - 1);
      return 1;
    }
  for (int i = 1; i <= n; i++)
    if (!((struct token *)lua_touserdata(L, i))->never) {
      lua_rawgeti(L, k + 1, i);
      attach(L, i, k + 2);
      lua_pop(L, 1);
    }
  lua_setiuservalue(L, k, TOKEN_LINKS);
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
  source_token(L, true);
  lua_replace(L, 1);
  lua_pushboolean(L, first);
  return l_cancel_token(L) && 0;
}

static int l_source_cancel_async(lua_State *L) {
  struct runtime *rt = runtime(L);
  object_check(L, 1, TAG_SOURCE);
  lua_settop(L, 2);
  struct token *token = source_token(L, false); /* source reason token */
  if (token->disposed) {
    task_new(L, KIND_PROMISE, sizeof(struct task), 2);
    error_push(L, ERROR_DISPOSED, "the cancellation source has been disposed");
    task_settle_faulted(L, rt, 4, 0);
    return 1;
  }
  bool begun = token->canceled;
  if (!begun) {
    mark(L, 3, 2, 0);
    sweep(L, 3);
  }
  if (begun || token->newest == NULL) {
    task_new(L, KIND_PROMISE, sizeof(struct task), 2);
    task_settle(L, rt, 4, 0);
    return 1;
  }
  module_push_function(L, l_run_callbacks);
  lua_pushvalue(L, 3);
  struct fiber *f = fiber_new(L, rt, 1);
  f->task.state = TASK_QUEUED;
  loop_ready(rt, &f->task);
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
    disarm(L, 2);
    drop_registrations(L, 2);
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
  disarm(L, 2);
  unlink_parents(L, 2);
  if (!k->canceled) drop_registrations(L, 2); /* else they are being run, and go on */
  return 0;
}

static const luaL_Reg functions[] = {{"call_source", l_source_call},
                                     {"linked_source", l_source_linked},
                                     {"is_token", l_is_token},

                                     {NULL, NULL}};

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
static const luaL_Reg source_methods[] = {{"cancel", l_source_cancel},
                                          {"cancel_async", l_source_cancel_async},
                                          {"cancel_after", l_source_cancel_after},
                                          {"try_reset", l_source_try_reset},
                                          {"dispose", l_source_dispose},
                                          {"__close", l_source_dispose},
                                          {NULL, NULL}};
static const luaL_Reg source_properties[] = {
    {"token", l_source_token}, {"is_cancellation_requested", l_source_requested}, {NULL, NULL}};

void cancel_open(lua_State *L) {
  module_functions(L, functions);
  module_class(L, TAG_TOKEN, "coflow.CancellationToken", token_methods, token_properties);
  module_class(L, TAG_REGISTRATION, "coflow.CancellationTokenRegistration", registration_methods,
               NULL);
  module_class(L, TAG_SOURCE, "coflow.CancellationTokenSource", source_methods, source_properties);
  token_new(L)->never = true;
  lua_setfield(L, -2, "none");
  token_new(L)->canceled = true;
  lua_setfield(L, -2, "canceled");
}
