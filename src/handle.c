/*
** handle.c - what streams and listeners share: life, holding, landing, asking.
**
** A handle is one userdata: the holder of those who wait for it (waiter.c), a task by which it lands, and
** libuv's handle. From uv_…_init until its close callback libuv may call back, so the memory stays: one that
** is forgotten by the script is closed by its finalizer, which brings it back to the anchors until libuv has
** let go.
**
**     handle_new ── handle_opened ──┬─ in use: held by its slot of the anchors
**                                   ├─ idle: held by the script only
**                                   └─ handle_close: held until the close callback has landed
**
** A callback of libuv writes fields and calls handle_news; the handle lands, and whoever waits is given what
** has come. Callbacks that come while nobody waits only write fields.
**
** Asking is the same for all verbs. `look` makes the value (which may run finalizers of users, so it
** says LOOK_AGAIN if they have changed something), and only when it is certain who gets it does `take`
** take it: whoever is canceled has taken nothing. Whoever must wait does so in the queue of the verb.
**
** What need not wait costs a part of the slice of ready tasks that is running (loop.c): writes, sends,
** accepts. When the slice is spent, others, deadlines and signals have their turn. What a verb takes is
** not taken then: who asked waits for it in the queue, as if it had not come yet. What a verb does is
** done, and who asked goes behind those that are ready, with the answer: it waits for nothing, so no
** cancellation reaches it; its next suspension raises. An operation (x_async) comes to its end that
** much later. Where nobody can suspend all goes on at once. (Reads and receives need no such bound:
** each takes from what the system, or one turn of libuv's, could hold.)
**
** Invariants: anchors[task.slot] is the handle while it is `held`, else its address. It is held while somebody
**             waits for it, while it is on the ready list, while libuv has a request of it, and from
**             uv_close until the close callback has landed.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <math.h>
#include <signal.h>
#include <stdarg.h>

/* ---- errors ---- */

void handle_push_code(lua_State *L, const char *code, const char *syscall, const char *format,
                      ...) {
  va_list arguments;
  va_start(arguments, format);
  lua_pushvfstring(L, format, arguments);
  va_end(arguments);
  error_push(L, ERROR_IO, "%s: %s (%s)", syscall, lua_tostring(L, -1), code);
  lua_remove(L, -2);
  lua_pushstring(L, code);
  lua_setfield(L, -2, "code");
  lua_pushstring(L, syscall);
  lua_setfield(L, -2, "syscall");
}

void handle_push_disposed(lua_State *L, const struct handle *h) {
  error_push(L, ERROR_DISPOSED, "the %s has been closed", h->class->name);
}

/* ---- life ---- */

void *handle_new(lua_State *L, uint32_t tag, const struct handle_class *class, size_t size,
                 int uservalues) {
  struct runtime *rt = runtime(L);
  loop_check_uv(L);
  struct handle *h = (struct handle *)holder_new(L, tag, size, uservalues);
  h->holder.handle = true;
  h->class = class;
  h->task.tag = TAG_TASK | KIND_HANDLE;
  h->task.state = TASK_WAITING;
  lua_pushlightuserdata(L, &h->task);
  h->task.slot = slots_add(L, UP_ANCHORS, &rt->free_slot);
  h->rt = rt;               /* from now on it has a finalizer */
  if (rt->births != NULL) { /* if the test leaves it, it is to be found */
    testing_born(L, rt, h->task.slot);
    task_weaken(L, -1);
  }
  return h;
}

/* [-0, +0, -] the one at i */
static void hold(lua_State *L, int i, struct handle *h, bool use) {
  if (use == h->held || h->task.slot == 0) return;
  h->held = use;
  if (use)
    lua_pushvalue(L, i);
  else
    lua_pushlightuserdata(L, &h->task);
  lua_rawseti(L, UP_ANCHORS, h->task.slot);
}

void handle_changed(lua_State *L, int i) {
  struct handle *h = (struct handle *)lua_touserdata(L, i);
  bool use = h->class->changed(h);
  hold(L, i, h, use || h->closing || h->pinned || h->task.flags & TASK_LINKED);
}

void handle_moved(lua_State *L, int i, struct nap *gone) {
  struct handle *h = (struct handle *)lua_touserdata(L, i);
  h->gone = gone;
  handle_changed(L, i);
  h->gone = NULL;
}

void handle_look_again(lua_State *L, struct runtime *rt) {
  for (struct link *l = rt->handles.next; l != &rt->handles; l = l->next) {
    struct handle *h = container_of(l, struct handle, link);
    h->look_again = true;
    if (!h->held) continue;
    lua_rawgeti(L, UP_ANCHORS, h->task.slot);
    if (lua_touserdata(L, -1) == (void *)h) handle_changed(L, lua_gettop(L));
    lua_pop(L, 1);
  }
}

void handle_land(lua_State *L, int i) {
  struct handle *h = (struct handle *)lua_touserdata(L, i);
  h->class->land(L, h, i);
  if (h->closing && h->uv == NULL && !(h->task.flags & TASK_LINKED)) {
    h->held = false;
    task_forget(L, &h->task);
  } else
    handle_changed(L, i);
}

/* nobody has it any more. No Lua. */
static void drop(struct handle *h) {
  h->class->collected(h);
  h->disposed = true;
  handle_close(h);
}

int handle_gc(lua_State *L) {
  struct handle *h = (struct handle *)lua_touserdata(L, 1);
  if (h == NULL || h->rt == NULL || h->rt->closed) return 0; /* half built; libuv's loop is gone */
  if (h->uv != NULL && !h->closing && !h->disposed && !h->pinned) testing_lost(L, h->rt, 1);
  drop(h);
  if (h->closing)
    hold(L, 1, h, true);
  else
    task_forget(L, &h->task);
  return 0;
}

void handle_close_all(struct runtime *rt) {
  for (struct link *l = rt->handles.next; l != &rt->handles; l = l->next)
    drop(container_of(l, struct handle, link));
}

/* ---- libuv side: no Lua below this line until the Lua face ---- */

/* Writing to a connection that the peer has closed, or to a FIFO that nobody reads any more (job.c), is
** an error, not the end of the process: unless the host has a handler of its own. Asked again and
** again, since others may have made it the default since. */
void handle_ignore_broken_pipes(void) {
  struct sigaction now;
  if (sigaction(SIGPIPE, NULL, &now) != 0 || now.sa_handler != SIG_DFL) return;
  now.sa_handler = SIG_IGN;
  sigaction(SIGPIPE, &now, NULL);
}

void handle_opened(struct handle *h, uv_handle_t *uv) {
  if (h->rt->handles.next == &h->rt->handles) handle_ignore_broken_pipes();
  uv->data = NULL; /* luv, on the same loop, takes what is there for its own */
  uv_unref(uv);
  h->uv = uv;
  link_append(&h->rt->handles, &h->link);
}

void handle_await(struct handle *h, bool awaited) {
  if (awaited == h->awaited || h->uv == NULL || h->closing) return;
  h->awaited = awaited;
  if (awaited)
    uv_ref(h->uv);
  else
    uv_unref(h->uv);
}

void handle_news(struct handle *h) {
  if (!h->rt->closed) loop_ready(h->rt, &h->task);
}

void handle_closed(struct handle *h) {
  link_drop(&h->link);
  h->uv = NULL;
  handle_news(h);
}

void handle_close(struct handle *h) {
  if (h->uv == NULL || h->closing) return;
  h->closing = true;
  uv_close(h->uv, h->class->on_close);
}

/* ---- asking ---- */

/* [-1, +0, m] the first of q gets the value, or the error, on top; false: there is none, and it is
** still there */
static bool give(lua_State *L, int i, struct handle *h, struct link *q, struct request *r,
                 bool failed) {
  struct nap *n = waiter_take(L, i, &h->holder, q);
  if (n == NULL) return false;
  lua_insert(L, -2); /* waiter value */
  if (failed)
    waiter_fail(L, h->rt, n);
  else {
    if (r->verb->take != NULL) r->verb->take(L, i, h, r);
    waiter_grant(L, h->rt, n);
  }
  return true;
}

void handle_answer(lua_State *L, int i, struct handle *h, struct request *r) {
  int top = lua_gettop(L);
  struct link *q = r->verb->queue(h);
  while (waiter_any(q)) {
    enum look a = r->verb->look(L, i, h, r);
    if (a == LOOK_WAIT && r->verb->wait(L, h, r)) break;
    if (a == LOOK_VALUE || a == LOOK_ERROR) give(L, i, h, q, r, a == LOOK_ERROR);
    lua_settop(L, top);
  }
}

void handle_refuse(lua_State *L, int i, struct link *q) {
  struct handle *h = (struct handle *)lua_touserdata(L, i);
  int error = lua_gettop(L);
  for (struct nap *n; (n = waiter_take(L, i, &h->holder, q)) != NULL;) {
    lua_pushvalue(L, error);
    waiter_fail(L, h->rt, n);
  }
  lua_settop(L, error - 1);
}

static int answered_k(lua_State *L, int status, lua_KContext failed) {
  (void)status;
  lua_settop(L, 1);
  if (!fiber_on_top(L, runtime(L))) return lua_yieldk(L, 0, failed, answered_k);
  return failed ? lua_error(L) : 1;
}

int handle_give_way(lua_State *L, struct runtime *rt, bool failed) {
  if (!fiber_can_suspend(L, rt)) return failed ? lua_error(L) : 1;
  struct fiber *me = (struct fiber *)rt->me;
  lua_replace(L, 1);
  lua_settop(L, 1);
  loop_queue(rt, me);
  return fiber_suspend(L, rt, me, failed, answered_k);
}

/* [-0, +1, m] the operation, settled or under way; the token at k. late: it may end on a later turn */
static struct task *start(lua_State *L, struct handle *h, struct request *r, int k, struct scope *s,
                          bool late) {
  struct runtime *rt = h->rt;
  struct token *token = token_opt(L, k);
  struct queued *op = waiter_operation(L, KIND_QUEUED, 1, HUGE_VAL);
  int i = lua_gettop(L);
  if (operation_canceled(token, s)) {
    operation_push_canceled(L, token, k, s);
    task_settle_canceled(L, rt, i);
    return &op->timed.pending.task;
  }
  bool spent = late && r->verb->take != NULL && handle_spend(rt, r->cost);
  for (;;) {
    enum look a = r->verb->look(L, 1, h, r);
    if (a == LOOK_VALUE && !spent) {
      if (r->verb->take != NULL)
        r->verb->take(L, 1, h, r);
      else if (late && handle_spend(rt, r->cost)) {
        waiter_settle_later(L, rt, i);
        break;
      }
      task_settle(L, rt, i, 1);
    } else if (operation_canceled(token, s)) { /* by a finalizer */
      operation_push_canceled(L, token, k, s);
      task_settle_canceled(L, rt, i);
    } else if (a == LOOK_ERROR)
      task_settle_error(L, rt, i, 0);
    else {
      spent = spent && a != LOOK_VALUE;
      if (a == LOOK_AGAIN || !r->verb->wait(L, h, r)) continue;
      waiter_start(L, i, r->verb->queue(h), k, s);
      if (a == LOOK_VALUE) handle_news(h);
    }
    break;
  }
  lua_settop(L, i);
  return &op->timed.pending.task;
}

static int wait_k(lua_State *L, int status, lua_KContext ctx) {
  struct runtime *rt = (struct runtime *)ctx;
  (void)status;
  if (rt->me->flags & TASK_INTERRUPTED && lua_isinteger(L, 2) && fiber_on_top(L, rt)) {
    rt->me->flags &= (uint16_t)~TASK_INTERRUPTED;
    scope_push_error(L, scope_ambient(L, rt));
    lua_pushvalue(L, 2); /* handle_left */
    lua_setfield(L, -2, "written");
    return lua_error(L);
  }
  if (waiter_resumed(L, rt) == WAITER_STRAY) {
    lua_settop(L, 2);
    return lua_yieldk(L, 0, ctx, wait_k);
  }
  return 1;
}

int handle_wait(lua_State *L, struct handle *h, struct link *q, bool deaf) {
  return waiter_wait(L, h->rt, &h->holder, q, 0, deaf, wait_k);
}

int64_t handle_left(struct handle *h) { return h->class->left != NULL ? h->class->left(h) : -1; }

void handle_tell_written(lua_State *L, int i) {
  lua_getiuservalue(L, i, OP_INPUT);
  const struct holder *h = (const struct holder *)lua_touserdata(L, -1);
  lua_getiuservalue(L, i, OP_KEYS); /* error holder number */
  if (h != NULL && h->handle && lua_isinteger(L, -1))
    lua_setfield(L, -3, "written");
  else
    lua_pop(L, 1);
  lua_pop(L, 1);
}

int handle_ask_async(lua_State *L, struct handle *h, struct request *r, int k) {
  start(L, h, r, k, operation_scope(L, k), true);
  return 1;
}

int handle_ask(lua_State *L, struct handle *h, struct request *r, int k, lua_CFunction f) {
  struct runtime *rt = h->rt;
  struct fiber *me = (struct fiber *)rt->me;
  if (token_opt(L, k) != NULL) {
    me = fiber_here(L, rt);
    if (me == NULL) return fiber_outside(L, f);
    struct task *op = start(L, h, r, k, scope_ambient(L, rt), false);
    bool done = task_done(op);
    int n = waiter_await_direct(L, me, op, false);
    return done ? handle_return(L, rt, r->cost) : n;
  }
  bool deaf = token_none(L, k);
  if (me->member.scope->canceled && !deaf) scope_throw(L, me->member.scope);
  bool spent = r->verb->take != NULL && handle_spend(rt, r->cost) && fiber_can_suspend(L, rt);
  for (;;) {
    enum look a = r->verb->look(L, 1, h, r);
    if (a == LOOK_VALUE && !spent) {
      if (r->verb->take == NULL) return handle_return(L, rt, r->cost);
      r->verb->take(L, 1, h, r);
      return 1;
    }
    if (a == LOOK_ERROR)
      return r->verb->take == NULL && handle_spend(rt, r->cost) ? handle_give_way(L, rt, true)
                                                                : lua_error(L);
    if (me->member.scope->canceled && !deaf) scope_throw(L, me->member.scope); /* by a finalizer */
    if (a == LOOK_AGAIN) continue;
    me = fiber_here(L, rt); /* raises before anything is changed */
    if (me == NULL) return fiber_outside(L, f);
    spent = spent && a != LOOK_VALUE;
    if (!r->verb->wait(L, h, r)) continue;
    if (a == LOOK_VALUE) handle_news(h);
    lua_settop(L, 1);
    lua_pushnil(L);
    return handle_wait(L, h, r->verb->queue(h), deaf);
  }
}
