/*
** scope.c - ambient cancellation: a tree of scopes, of which every task is a member somewhere.
**
**     root ── scope of task A ─┬─ with_timeout in A ─┬─ A itself, which is inside it now
**                              │                     └─ B, started there
**                              └─ C, started before
**
** A scope is opened by a task: one for the task itself (its *base*, made when it first starts or opens
** something: a task that only runs and waits needs none), and one for each with_timeout, group … that it
** is inside of. A task is a member of the innermost one that it has opened, or else of the one that it was
** started in. So whoever is to be interrupted by a cancellation is below what is canceled, and whether a
** suspension may begin is one flag: that of the scope that the task is a member of.
**
** Canceling marks all that is below, top down and without recursion, and interrupts what waits there.
** Nobody's code runs and nothing is created meanwhile; callbacks of tokens are collected and run after.
**
** A scope that has ended (owner == NULL) stays while tasks that were started in it go on: a cancellation
** from above still finds them. With one member left it gives up its place to it, so that there are never
** more such scopes than tasks, however long the chain of tasks that each start the next.
**
** The token of a scope is made when somebody asks for it. It is held by the block that the scope belongs
** to, by way of the task (RUNTIME_TOKENS), so a callback that refers to the task keeps neither alive. A
** canceled scope holds its own, for the reason and the cause.
**
** Holding: a parked task is held only while a deadline above it may end its wait: `armed`, which is handed
** down when a scope is opened, and changed below it when a deadline comes or goes.
**
** Invariants: a scope is anchored in its slot until it is freed; m->scope->members contains m->link;
**             a member of a canceled scope is canceled; s->armed implies that those below are, shields apart.
** Source:     the scopes are trio's, level-triggered; .NET has tokens only.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <math.h>

enum { IDLE_SCOPES = 64, REFUSALS = 1000, LEVELS = 1000 };

/* ---- walking over what is below a scope ---- */

struct walk {
  struct scope *top, *in;
  struct link *at;
};

static void walk_into(struct walk *w, struct scope *s) {
  w->in = s;
  w->at = s->members.next;
}

static struct walk walk_below(struct scope *s) {
  struct walk w = {.top = s};
  walk_into(&w, s);
  return w;
}

/* the next member, or NULL at the end; those of a scope only after walk_into */
static struct pending *walk_next(struct walk *w) {
  while (w->at == &w->in->members) {
    if (w->in == w->top) return NULL;
    w->at = w->in->member.link.next;
    w->in = w->in->member.scope;
  }
  struct pending *p = container_of(w->at, struct pending, member.link);
  w->at = w->at->next;
  return p;
}

static struct scope *as_scope(struct pending *p) {
  return task_is(&p->task, KIND_SCOPE) ? (struct scope *)(void *)p : NULL;
}

struct fiber *scope_find(struct runtime *rt, const lua_State *co) {
  struct walk w = walk_below(rt->root);
  for (struct pending *p = walk_next(&w); p != NULL; p = walk_next(&w)) {
    struct scope *s = as_scope(p);
    if (s != NULL)
      walk_into(&w, s);
    else if (task_is(&p->task, KIND_FIBER) && ((struct fiber *)(void *)p)->co == co)
      return (struct fiber *)(void *)p;
  }
  return NULL;
}

/* the fiber below which f was started, or NULL: outside every task, or in a scope of one that has ended */
static struct fiber *parent_of(const struct runtime *rt, const struct fiber *f) {
  const struct scope *s = f->member.scope;
  if (s->owner == f) s = s->base->member.scope;
  while (s->owner == NULL && s != rt->root) s = s->outer != NULL ? s->outer : s->member.scope;
  return (const struct task *)s->owner != rt->outside ? s->owner : NULL;
}

lua_Integer scope_push_tasks(lua_State *L, struct runtime *rt) {
  lua_Integer n = 0;
  luaL_checkstack(L, 10, NULL);
  lua_newtable(L);
  lua_newtable(L); /* from here on nothing is created */
  struct walk w = walk_below(rt->root);
  for (struct pending *p = walk_next(&w); p != NULL; p = walk_next(&w)) {
    struct scope *s = as_scope(p);
    if (s != NULL) walk_into(&w, s);
    if (!task_is(&p->task, KIND_FIBER) || &p->task == rt->outside || task_done(&p->task)) continue;
    if (!task_push_whole(L, &p->task)) continue;
    lua_rawseti(L, -3, ++n);
    struct fiber *parent = parent_of(rt, (struct fiber *)(void *)p);
    if (parent == NULL || !task_push_whole(L, &parent->task)) lua_pushboolean(L, 0);
    lua_rawseti(L, -2, n);
  }
  return n;
}

/* ---- arming ---- */

static bool arms_itself(struct scope *s) {
  return s->due != HUGE_VAL || (s->token != NULL && token_armed_itself(s->token));
}

static void set_armed(lua_State *L, struct scope *s, bool armed) {
  s->armed = armed;
  if (s->token != NULL) token_rearmed(L, s->token);
}

static void scope_set_armed(lua_State *L, struct scope *s, bool armed) {
  if (s->armed == armed) return;
  set_armed(L, s, armed);
  struct walk w = walk_below(s);
  for (struct pending *p = walk_next(&w); p != NULL; p = walk_next(&w)) {
    struct scope *below = as_scope(p);
    if (below == NULL)
      pending_hold(L, p, armed);
    else if (below->armed != armed && (armed || !arms_itself(below))) {
      set_armed(L, below, armed);
      walk_into(&w, below);
    }
  }
}

void scope_rearm(lua_State *L, struct scope *s) {
  scope_set_armed(L, s, arms_itself(s) || s->member.scope->armed);
}

/* ---- life ---- */

/* [-0, +0, m] a scope that is anchored, and not yet in the tree */
static struct scope *scope_new(lua_State *L, struct runtime *rt, enum scope_kind kind,
                               size_t size) {
  struct scope *s = kind == SCOPE_GROUP ? NULL : rt->idle_scopes;
  if (s != NULL) {
    rt->idle_scopes = s->outer;
    rt->idle_scope_count--;
  } else {
    bool group = kind == SCOPE_GROUP;
    s = (struct scope *)object_new(L, group ? TAG_GROUP : TAG_SCOPE, size,
                                   group ? GROUP_QUEUE : SCOPE_RUN);
    s->task.tag |= KIND_SCOPE;
    task_hold(L, -1, &s->task);
    lua_pop(L, 1);
  }
  link_init(&s->members);
  s->rt = rt;
  s->outer = NULL;
  s->due = HUGE_VAL;
  s->deadline = (struct deadline){.kind = DEADLINE_SCOPE};
  s->kind = (uint8_t)kind;
  return s;
}

void scope_push(lua_State *L, const struct scope *s) { lua_rawgeti(L, UP_ANCHORS, s->task.slot); }

/* nothing can come through it any more, but for its members */
static bool is_done(const struct scope *s) {
  return s->owner == NULL && s->refs == 0 && !(s->task.flags & TASK_LINKED) &&
         (s->token == NULL || s->canceled);
}

static void scope_free(lua_State *L, struct runtime *rt, struct scope *s) {
  int32_t slot = s->task.slot;
  if (s->canceled) {
    scope_push(L, s);
    lua_pushnil(L);
    lua_setiuservalue(L, -2, SCOPE_TOKEN);
    lua_pop(L, 1);
  }
  /* one that its block did not close may still be known there: it must not be another one's */
  bool reuse = s->kind != SCOPE_GROUP && rt->idle_scope_count < IDLE_SCOPES &&
               (s->closed || s->kind == SCOPE_BASE);
  if (!reuse) {
    task_forget(L, &s->task);
    slot = 0;
  }
  *s = (struct scope){.task = {.tag = s->task.tag, .slot = slot}};
  if (!reuse) return;
  s->outer = rt->idle_scopes;
  rt->idle_scopes = s;
  rt->idle_scope_count++;
}

/* the only member of an ended scope takes its place */
static void dissolve(struct scope *s) {
  struct member *m = container_of(s->members.next, struct member, link);
  link_drop(&m->link);
  m->scope = s->member.scope;
  m->link.next = &s->member.link;
  m->link.prev = s->member.link.prev;
  m->link.prev->next = m->link.next->prev = &m->link;
}

void scope_let_go(lua_State *L, struct runtime *rt, struct scope *s) {
  if (--s->refs == 0 && s->owner == NULL) scope_left(L, rt, s);
}

void scope_left(lua_State *L, struct runtime *rt, struct scope *s) {
  while (s != NULL && is_done(s)) {
    struct scope *up = s->member.scope, *origin = s->origin, *outer = s->outer;
    struct link *head = &s->members;
    if (head->next != head) {
      if (head->next->next != head || (s->canceled && !up->canceled)) return;
      dissolve(s);
    }
    if (s->token != NULL) token_detach(s->token);
    link_drop(&s->member.link);
    if (origin == s) origin = NULL;
    scope_free(L, rt, s);
    up->refs++; /* it is next: those that we let go of must not take it along */
    if (origin != NULL) scope_let_go(L, rt, origin);
    if (outer != NULL) scope_let_go(L, rt, outer);
    up->refs--;
    s = up;
  }
}

static void set_canceled(struct scope *s, struct scope *origin) {
  s->canceled = true;
  s->origin = origin;
  if (s != origin) origin->refs++;
}

/* puts s into the tree below `up`, and its owner into it */
static void enter(struct scope *s, struct scope *up, struct fiber *f, lua_State *co) {
  s->owner = f;
  s->co = co;
  scope_join(up, &s->member);
  s->armed = up->armed;
  if (up->canceled) set_canceled(s, up->origin);
  link_drop(&f->member.link);
  scope_join(s, &f->member);
}

struct scope *scope_own(lua_State *L, struct runtime *rt, struct fiber *f) {
  if (f->member.scope->owner == f) return f->member.scope->base;
  if (task_done(&f->task)) return rt->root;
  struct scope *s = scope_new(L, rt, SCOPE_BASE, sizeof *s);
  if (f->member.scope->owner == f || task_done(&f->task) || fiber_is_lost(&f->task)) {
    scope_free(L, rt, s); /* a finalizer was here before us */
    return f->member.scope->owner == f ? f->member.scope->base : rt->root;
  }
  s->base = s;
  enter(s, f->member.scope, f, NULL);
  return s;
}

/* [-0, +0, m] a scope of the running task, within the one that it is in; `timed`: with room for a deadline */
static struct scope *scope_begin(lua_State *L, struct runtime *rt, enum scope_kind kind,
                                 size_t size, bool timed) {
  struct fiber *me = (struct fiber *)rt->me;
  if (scope_own(L, rt, me) == rt->root) luaL_error(L, "the task has ended");
  struct scope *s = scope_new(L, rt, kind, size), *outer = me->member.scope;
  if (timed && !deadline_has_room(L, rt)) { /* here: a finalizer may use what was there before */
    scope_free(L, rt, s);
    deadline_refuse(L, rt);
  }
  s->outer = outer;
  outer->refs++;
  s->base = outer->base;
  enter(s, kind == SCOPE_SHIELD ? rt->root : outer, me, L);
  return s;
}

/* [-0, +1, -] the token of s, or nil when there is none */
static bool push_known_token(lua_State *L, const struct scope *s) {
  if (s->token == NULL) {
    lua_pushnil(L);
    return false;
  }
  return task_push_weak(L, s->token);
}

/* [-0, +0, -] what goes on in s is under the scope above it only */
static void end(lua_State *L, struct runtime *rt, struct scope *s) {
  s->owner = NULL;
  if (s->kind == SCOPE_GROUP) group_end(s); /* even if nobody has joined it */
  deadline_drop(rt, &s->deadline);
  s->due = HUGE_VAL;
  if (s->token != NULL &&
      !s->closed) { /* left open in a coroutine: what it is linked to lets it go */
    if (push_known_token(L, s)) token_unfollow(L, lua_gettop(L));
    lua_pop(L, 1);
  }
  if (s->members.next == &s->members && s->token == NULL)
    s->armed = false; /* nobody is to know */
  else if (s->armed && !s->member.scope->armed)
    scope_set_armed(L, s, false);
  scope_left(L, rt, s);
}

/* the owner leaves a scope, with the block that it was opened for */
static void scope_close(lua_State *L, struct runtime *rt, struct scope *s) {
  struct fiber *f = s->owner;
  if (f->member.scope == s) {
    struct scope *back = s->outer;
    while (back->owner == NULL) back = back->outer; /* closed before this one */
    link_drop(&f->member.link);
    scope_join(back, &f->member);
    if (&f->task != rt->me) { /* another task has closed the coroutine: f waits under `back` now */
      pending_hold(L, (struct pending *)f, back->armed);
      if (back->canceled) pending_interrupt(L, (struct pending *)f);
    }
  }
  end(L, rt, s);
}

void scope_end_owner(lua_State *L, struct runtime *rt, struct fiber *f, struct scope *s) {
  if (s->owner == NULL) {
    scope_left(L, rt, s);
    return;
  }
  if (s->base->guards) guard_drop_all(&s->base->guards);
  while (s != NULL) {
    struct scope *outer = s->outer;
    if (outer != NULL) outer->refs++;
    if (s->owner == f)
      end(L, rt, s);
    else
      scope_left(L, rt, s); /* closed before, out of order */
    if (outer != NULL) outer->refs--;
    s = outer;
  }
}

void scope_adopt(lua_State *L, struct runtime *rt, struct fiber *f, struct scope *s) {
  struct member *m = f->member.scope->owner == f ? &f->member.scope->member : &f->member;
  scope_leave(L, rt, m);
  scope_join(s, m);
  if (m == &f->member) return;
  struct scope *base = f->member.scope;
  if (s->canceled && !base->canceled) set_canceled(base, s->origin);
  scope_rearm(L, base);
}

/* ---- canceling ---- */

/* [-0, +0, m] the task that has opened s holds the token on top */
static void hold_token(lua_State *L, struct scope *s) {
  int token = lua_gettop(L);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TOKENS);
  task_push(L, &s->owner->task); /* token tokens task */
  if (lua_isnil(L, -1)) {        /* somebody is closing its coroutine */
    lua_settop(L, token);
    return;
  }
  lua_pushvalue(L, -1);
  if (lua_rawget(L, -3) == LUA_TNIL) {
    lua_pop(L, 1);
    lua_newtable(L);
    lua_pushvalue(L, -2);
    lua_pushvalue(L, -2);
    lua_rawset(L, -5); /* token tokens task table */
  }
  lua_pushvalue(L, token);
  lua_rawsetp(L, -2, s);
  lua_settop(L, token);
}

/* [-0, +0, -] … and lets go of it when the scope is closed */
static void drop_token(lua_State *L, struct scope *s) {
  if (s->token == NULL || s->owner == NULL) return;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TOKENS);
  task_push(L, &s->owner->task);
  if (lua_rawget(L, -2) == LUA_TTABLE) {
    lua_pushnil(L);
    lua_rawsetp(L, -2, s);
  }
  lua_pop(L, 2);
}

/* [-0, +0, -] the canceled scope s holds the token on top */
static void keep_token(lua_State *L, struct scope *s) {
  scope_push(L, s);
  lua_pushvalue(L, -2);
  lua_setiuservalue(L, -2, SCOPE_TOKEN);
  lua_pop(L, 1);
}

/* [-0, +1, m] … of one that has none, and is held */
static void push_new_token(lua_State *L, struct scope *s) {
  struct token *k = token_new(L, true);
  task_weaken(L, -1); /* into the table of what may die */
  if (!s->canceled && s->owner != NULL) hold_token(L, s);
  if (push_known_token(L,
                       s)) { /* a finalizer has asked as well: that one is held in place of ours */
    if (!s->canceled && s->owner != NULL) hold_token(L, s);
    lua_remove(L, -2);
    return;
  }
  lua_pop(L, 1);
  token_attach(k, s); /* only now: it may be left to the collector before */
  if (!s->canceled) return;
  scope_push_token(L, s->origin); /* which has one: it had one when it was canceled */
  token_inherit(L, -2, -1);
  lua_pop(L, 1);
  keep_token(L, s);
}

/* [-0, +1, m] */
void scope_push_token(lua_State *L, struct scope *s) {
  luaL_checkstack(L, 10, NULL);
  if (push_known_token(L, s)) return;
  lua_pop(L, 1);
  s->refs++; /* a finalizer may end it */
  push_new_token(L, s);
  scope_let_go(L, runtime(L), s);
}

void scope_push_error(lua_State *L, struct scope *s) {
  scope_push_token(L, s);
  token_push_error(L, -1);
  lua_remove(L, -2);
}

static int throw_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = runtime(L);
  (void)status;
  if (!fiber_on_top(L, rt)) return lua_yieldk(L, 0, ctx, throw_k); /* not resumed by us */
  return scope_throw(L, ((struct fiber *)rt->me)->member.scope);
}

/* [-0, +1, m] */
static void push_timeout(lua_State *L, double seconds) {
  error_push(L, ERROR_TIMEOUT, "the operation did not complete within %f s",
             (LUAI_UACNUMBER)error_seconds(seconds));
}

bool scope_times_out(const struct task *t) {
  const struct fiber *f = (const struct fiber *)t;
  const struct scope *block = f->member.scope->origin;
  return block != NULL && block->expired && block->kind == SCOPE_BLOCK && block->owner == f;
}

static bool holds(lua_State *L, lua_Debug *ar, const struct scope *s) {
  bool found = false;
  for (int n = 1; !found && lua_getlocal(L, ar, n) != NULL; n++, lua_pop(L, 1))
    found = lua_touserdata(L, -1) == (const void *)s;
  return found;
}

/* The error of the scope s is about to be raised. Whether its block is called by xpcall, and nothing on
** the way could catch the error: then a message handler sees it first, and the block gets what that
** makes of it. */
static bool is_handled(lua_State *L, const struct runtime *rt, const struct scope *s) {
  const struct scope *block = s->origin;
  if (block == NULL || !block->expired || block->kind != SCOPE_BLOCK || block->co != L)
    return false;
  lua_Debug ar;
  bool inside = true;
  for (int level = 1; level < LEVELS && lua_getstack(L, level, &ar);
       level++) { /* each costs its depth */
    lua_getinfo(L, "Sf", &ar);
    lua_CFunction f = lua_tocfunction(L, -1);
    lua_pop(L, 1);
    if (f == NULL) {
      if (inside) inside = !holds(L, &ar, block);
    } else if (inside || f == rt->pcall)
      return false;
    else if (f == rt->xpcall)
      return !lua_getstack(L, level + 1, &ar) || !lua_getinfo(L, "S", &ar) ||
             !module_is_ours(rt, ar.source);
  }
  return false;
}

/* A task that goes on after each refusal, and never waits, shall hold up itself only: now and then it is
** suspended after all, and others run. */
int scope_throw(lua_State *L, struct scope *s) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  if (rt->refused != &me->task) rt->refusals = 0;
  rt->refused = &me->task;
  if (++rt->refusals == REFUSALS && s == me->member.scope && fiber_can_suspend(L, rt)) {
    rt->refusals = 0;
    loop_queue(rt, me);
    return fiber_suspend(L, rt, me, 0, throw_k);
  }
  if (is_handled(L, rt, s)) /* it shall see what comes out in the end */
    push_timeout(L, s->origin->seconds);
  else
    scope_push_error(L, s == me->member.scope ? scope_ambient(L, rt) : s);
  return lua_error(L);
}

/* [-0, +0, -] s alone; its token gets on the list at run. One that has ended, and stays only until its token
** is collected, must not hold that: nobody would come to free the two. */
static void mark_one(lua_State *L, struct scope *s, struct scope *origin, int reason, int cause,
                     int run) {
  bool used = s->owner != NULL || s->refs > 0 || s->members.next != &s->members;
  set_canceled(s, origin);
  if (push_known_token(L, s)) {
    token_mark(L, lua_gettop(L), reason, cause, run);
    if (used) keep_token(L, s);
  }
  lua_pop(L, 1);
}

void scope_mark(lua_State *L, struct runtime *rt, struct scope *s, int reason, int cause, int run) {
  if (s->canceled) return;
  bool busy = rt->land_busy;
  rt->land_busy = true; /* what completes lands when all is marked */
  mark_one(L, s, s, reason, cause, run);
  struct walk w = walk_below(s);
  for (struct pending *p = walk_next(&w); p != NULL; p = walk_next(&w)) {
    struct scope *below = as_scope(p);
    if (below == NULL)
      pending_interrupt(L, p);
    else if (!below->canceled) {
      mark_one(L, below, s, reason, cause, run);
      walk_into(&w, below);
    } else if (below->owner != NULL && below->owner->task.traits & TRAIT_QUEUED)
      pending_interrupt(L,
                        (struct pending *)(void *)below->owner); /* canceled, it would yet start */
  }
  rt->land_busy = busy;
}

/* [-0, +1, m] marks s; leaves the list of the tokens whose callbacks are to run */
static void mark_all(lua_State *L, struct scope *s, int reason, bool expired) {
  struct runtime *rt = runtime(L);
  int top = lua_gettop(L);
  luaL_checkstack(L, 20, NULL);
  lua_pushvalue(L, reason);
  scope_push_token(L, s); /* nothing is created from here on */
  lua_pushnil(L);         /* reason token list */
  s->expired = expired && !s->canceled;
  scope_mark(L, rt, s, top + 1, top + 2, top + 3);
  lua_replace(L, top + 1);
  lua_settop(L, top + 1);
  if (rt->landing != NULL) loop_land_all(L, rt);
}

bool scope_cancel(lua_State *L, struct scope *s, int reason) {
  if (s->canceled || s == runtime(L)->root) return false;
  s->refs++; /* a finalizer may end it */
  mark_all(L, s, reason, false);
  scope_let_go(L, runtime(L), s);
  token_run(L, false);
  return true;
}

void scope_expire(lua_State *L, struct runtime *rt, struct scope *s) {
  if (s->canceled) {
    deadline_drop(rt, &s->deadline);
    return;
  }
  s->refs++; /* a finalizer may end it */
  lua_pushstring(L, s->kind == SCOPE_GROUP    ? "the grace of the task group is over"
                    : s->kind == SCOPE_SHIELD ? "the grace of the shield is over"
                                              : "timeout");
  loop_ready(rt, &s->task);            /* its callbacks come before what it wakes */
  mark_all(L, s, lua_gettop(L), true); /* reason list */
  if (!lua_isnil(L, -1)) {
    scope_push(L, s);
    lua_insert(L, -2);
    lua_setiuservalue(L, -2, SCOPE_RUN);
  }
  lua_pop(L, 2);
  deadline_drop(rt, &s->deadline); /* only now: what fails for want of memory is still due */
  scope_let_go(L, rt, s);
}

void scope_land(lua_State *L, int i) {
  struct scope *s = (struct scope *)lua_touserdata(L, i);
  lua_getiuservalue(L, i, SCOPE_RUN);
  lua_pushnil(L);
  lua_setiuservalue(L, i, SCOPE_RUN);
  s->refs++; /* a callback may end it */
  token_run_reported(L);
  scope_let_go(L, runtime(L), s);
}

/* ---- Lua face: functions of the library, not of scripts ---- */

static struct scope *check_scope(lua_State *L, int i) {
  struct scope *s = (struct scope *)object_test(L, i, TAG_SCOPE | KIND_SCOPE);
  return s ? s : (struct scope *)blame_object(L, i, TAG_SCOPE);
}

/* [-0, +0, e] raises outside every task, in the name of what the library was asked for */
static void check_inside(lua_State *L, struct runtime *rt, const char *what) {
  if (rt->me == rt->outside)
    error_throw(L, ERROR_OPERATION,
                "%s outside every task: run the program with flow.run(fn), and use it in there",
                what);
  if (!fiber_on_top(L, rt))
    error_throw(L, ERROR_OPERATION,
                "%s inside a coroutine made by coroutine.create or coroutine.wrap, out of which a "
                "yield would leave it open: make it with coflow.coroutine",
                what);
}

struct scope *scope_block(lua_State *L, const char *what, enum scope_kind kind, size_t size,
                          double seconds) {
  struct runtime *rt = runtime(L);
  check_inside(L, rt, what);
  struct scope *s = scope_begin(L, rt, kind, size, seconds != HUGE_VAL);
  if (seconds != HUGE_VAL) {
    s->seconds = seconds;
    s->due = deadline_add(rt, &s->deadline, seconds);
    s->armed = true;
  }
  scope_push(L, s);
  return s;
}

/* [-0, +0, v] argument 1 of a public function in Lua: seconds, or nil: for ever */
static double opt_seconds(lua_State *L, int i) {
  int is_number;
  double s = (double)lua_tonumberx(L, i, &is_number);
  if (!is_number && lua_isnoneornil(L, i)) return HUGE_VAL;
  if (!is_number) blame_type(L, 1, "number", i);
  if (!(s >= 0)) blame(L, 1, s < 0 ? "seconds must not be negative" : "seconds must not be NaN");
  return s;
}

/* open_timeout(seconds or nil, fn) -> scope; checks the arguments of with_timeout */
static int l_open_timeout(lua_State *L) {
  double seconds = opt_seconds(L, 1);
  module_check_function(L, 2, 2);
  if (seconds == 0) {
    struct runtime *rt = runtime(L);
    check_inside(L, rt, "with_timeout");
    struct scope *outer = ((struct fiber *)rt->me)->member.scope;
    if (outer->canceled) return scope_throw(L, outer);
    push_timeout(L, 0);
    return lua_error(L);
  }
  scope_block(L, "with_timeout", SCOPE_BLOCK, sizeof(struct scope), seconds);
  return 1;
}

/* open_shield(grace or nil) -> scope */
static int l_open_shield(lua_State *L) {
  scope_block(L, "shield", SCOPE_SHIELD, sizeof(struct scope), opt_seconds(L, 1));
  return 1;
}

/* open_linked(token, fn) -> scope, which is canceled with the token; checks for with_cancellation */
static int l_open_linked(lua_State *L) {
  if (object_test(L, 1, TAG_TOKEN) == NULL) blame_type(L, 1, "coflow.CancellationToken", 1);
  module_check_function(L, 2, 2);
  struct token *k = token_opt(L, 1);
  lua_settop(L, 1);
  if (k != NULL && token_canceled(k)) {
    check_inside(L, runtime(L), "with_cancellation");
    token_push_error(L, 1);
    return lua_error(L);
  }
  struct scope *s = scope_block(L, "with_cancellation", SCOPE_BLOCK, sizeof *s, HUGE_VAL);
  if (k == NULL) return 1;
  scope_push_token(L, s);
  token_follow(L, 3, 1);
  lua_settop(L, 2);
  return 1;
}

void scope_arm(lua_State *L, struct scope *s, double seconds) {
  if (s->owner == NULL || s->due != HUGE_VAL || seconds == HUGE_VAL) return;
  deadline_reserve(L, runtime(L));
  s->due = deadline_add(runtime(L), &s->deadline, seconds);
  scope_set_armed(L, s, true);
}

void scope_finish(lua_State *L, struct runtime *rt, struct scope *s) {
  if (s->token != NULL) {
    if (push_known_token(L, s)) token_unfollow(L, lua_gettop(L));
    lua_pop(L, 1);
    drop_token(L, s);
  }
  scope_close(L, rt, s);
}

/* [-0, +0, m] the block ends with the error at `error`, or nil. True if that was a cancellation and has
** become a Timeout, because the deadline of the block itself has passed. */
static bool close_block(lua_State *L, struct runtime *rt, struct scope *s, int error) {
  bool late = s->kind == SCOPE_BLOCK && s->seconds != HUGE_VAL && lua_istable(L, error) &&
              (s->expired || (!s->canceled && s->due <= loop_now(rt)));
  double seconds = s->seconds;
  scope_finish(L, rt, s);
  if (!late || !error_is(L, error, ERROR_CANCELED)) return false;
  push_timeout(L, seconds);
  if (lua_getfield(L, error, "written") != LUA_TNIL) /* of a write that it has cut short */
    lua_setfield(L, -2, "written");
  else
    lua_pop(L, 1);
  trace_go_on(L, error);
  lua_replace(L, error);
  return true;
}

/* __close(scope, error) */
static int l_close(lua_State *L) {
  struct scope *s = check_scope(L, 1);
  if (s->owner == NULL || s->kind == SCOPE_BASE) return 0;
  s->closed = true;
  if (!close_block(L, s->rt, s, 2)) return 0;
  lua_settop(L, 2);
  return lua_error(L);
}

/* the next scope outside s that its task has open, or NULL after the last */
static struct scope *outside(struct scope *s) {
  do s = s->outer;
  while (s != NULL && s->owner == NULL);
  return s == NULL || s->kind == SCOPE_BASE ? NULL : s;
}

static struct scope *innermost(struct fiber *me) {
  struct scope *s = me->member.scope;
  return s->owner != me || s->kind == SCOPE_BASE ? NULL : s;
}

void scope_unwind(lua_State *L, struct runtime *rt, lua_State *co) {
  for (struct scope *s = innermost((struct fiber *)rt->me), *next; s != NULL; s = next) {
    next = outside(s);
    if (s->co == co && s->kind != SCOPE_GROUP) /* a group waits for its end */
      close_block(L, rt, s, lua_gettop(L));
  }
}

/* [-0, +1, m] where in the coroutine co s was opened: by the function on its stack that holds it */
static void push_opening(lua_State *L, lua_State *co, const struct scope *s) {
  lua_Debug ar;
  for (int level = co == L; lua_getstack(co, level, &ar); level++) {
    if (!holds(co, &ar, s)) continue;
    if (!blame_find_line(L, co, level, &ar)) break; /* by whom of the user's that was called */
    lua_pushfstring(L, "%s:%d", ar.short_src, ar.currentline);
    return;
  }
  lua_pushliteral(L, "?");
}

bool scope_push_left_open(lua_State *L, struct runtime *rt, lua_State *co) {
  for (struct scope *s = innermost((struct fiber *)rt->me); s != NULL; s = outside(s))
    if (s->co == co) {
      luaL_checkstack(co, LUA_MINSTACK, NULL);
      push_opening(L, co, s);
      return true;
    }
  return false;
}

void scope_refuse_yield(lua_State *L) {
  if (scope_push_left_open(L, runtime(L), L)) coroutine_refuse(L, lua_tostring(L, -1));
}

/* throw_if_canceled(token or nil): the error of the token, or of the ambient one; `none` opts out of both */
static int l_throw_if_canceled(lua_State *L) {
  operation_check_tokens(L, runtime(L), 1);
  return 0;
}

/* ---- Lua face ---- */

static int l_cancellation_token(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct fiber *me = (struct fiber *)rt->me;
  struct scope *s = &me->task == rt->outside ? rt->root : scope_ambient(L, rt);
  if (s == rt->root || (s->kind == SCOPE_SHIELD && s->due == HUGE_VAL))
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NONE);
  else
    scope_push_token(L, s);
  return 1;
}

/* seconds left to the nearest deadline, or nil */
static int l_deadline(lua_State *L) {
  struct runtime *rt = runtime(L);
  double due = HUGE_VAL;
  for (struct scope *s = ((struct fiber *)rt->me)->member.scope; s->armed; s = s->member.scope)
    due = fmin(due, s->due);
  if (due == HUGE_VAL)
    lua_pushnil(L);
  else
    lua_pushnumber(L, fmax(due - loop_now(rt), 0));
  return 1;
}

/* task:cancel(reason) */
static int l_cancel(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *t = task_check(L, 1);
  task_refuse_state(L, 1, t);
  lua_settop(L, 2);
  bool fresh = false;
  if (task_is(t, KIND_FIBER) && !task_done(t))
    fresh = scope_cancel(L, scope_own(L, rt, (struct fiber *)t), 2);
  else if (!task_is(t, KIND_PROMISE) && !task_done(t)) /* of a promise there is nobody to cancel */
    fresh = operation_cancel(L, 1, 2);
  lua_pushboolean(L, fresh);
  return 1;
}

static const luaL_Reg functions[] = {{"open_timeout", l_open_timeout},
                                     {"open_shield", l_open_shield},
                                     {"open_linked", l_open_linked},
                                     {"throw_if_canceled", l_throw_if_canceled},
                                     {"cancellation_token", l_cancellation_token},
                                     {"deadline", l_deadline},
                                     {"cancel", l_cancel},
                                     {NULL, NULL}};

static const luaL_Reg scope_methods[] = {{"__close", l_close}, {NULL, NULL}};

static lua_CFunction global_function(lua_State *L, const char *name) {
  lua_pushglobaltable(L);
  lua_pushstring(L, name);
  lua_rawget(L, -2);
  lua_CFunction f = lua_tocfunction(L, -1);
  lua_pop(L, 2);
  return f;
}

void scope_open(lua_State *L) {
  struct runtime *rt = runtime(L);
  module_functions(L, functions);
  module_class(L, TAG_SCOPE, "coflow.CancellationScope", scope_methods, NULL);
  rt->pcall = global_function(L, "pcall");
  rt->xpcall = global_function(L, "xpcall");
  rt->root = scope_new(L, rt, SCOPE_BASE, sizeof *rt->root);
  rt->root->base = rt->root;
}
