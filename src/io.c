/*
** io.c - operations that libuv has in hands: start, land, abort, errors, the direct style.
**
** Such an operation is a task whose struct begins with struct io; its class has the verbs.
**
**     io_begin ── in flight ── io_done, in libuv's callback ── ready list ── io_land: result, settle, release
**                     │
**                     └ interrupted: io_land: abort, settle canceled ┄┄ io_done ┄┄ io_land: release
**
** A canceled operation ends at once, whatever libuv still does for it: a thread in the middle of a
** system call cannot be stopped. So the task may be complete while it is in flight, and its late result
** is *released*: an opened descriptor is closed, memory is freed. Release runs once, after libuv has
** let go, for every operation; what `land` has handed over is not there any more. An interruption that
** comes between the callback and the landing wins, for its result has not been given to anybody: bytes
** that were read are where they were. So does one by a finalizer, while `land` makes the result: it
** settles the operation, `land` takes nothing then, and what it looks at is there until it returns, as
** only then is the operation released.
**
** Invariants: from io_begin until release the operation is held by its slot, complete or not, so libuv
**             may write to it. It is in rt->flights exactly while libuv may call back. It is a member of its
**             scope, and in the list of its token, exactly until it is settled.
**
** While the state closes no Lua is left: all are aborted, and io_done releases by itself (shutdown.c).
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <string.h>

/* ---- errors ---- */

void io_push_error(lua_State *L, int status, const char *syscall, const char *path) {
  char text[128], code[32];
  uv_strerror_r(status, text, sizeof text);
  uv_err_name_r(status, code, sizeof code);
  if (path != NULL)
    error_push(L, ERROR_IO, "%s '%s': %s (%s)", syscall ? syscall : "io", path, text, code);
  else
    error_push(L, ERROR_IO, "%s: %s (%s)", syscall ? syscall : "io", text, code);
  lua_pushstring(L, code);
  lua_setfield(L, -2, "code");
  if (syscall != NULL) {
    lua_pushstring(L, syscall);
    lua_setfield(L, -2, "syscall");
  }
  if (path != NULL) {
    lua_pushstring(L, path);
    lua_setfield(L, -2, "path");
  }
}

/* [-0, +1, m] */
static void push_failure(lua_State *L, struct io *op) {
  if (op->class->fail != NULL) {
    op->class->fail(L, op);
    return;
  }
  lua_getiuservalue(L, 1, IO_PATH);
  io_push_error(L, (int)op->status, op->syscall ? op->syscall : op->class->syscall,
                lua_tostring(L, -1));
}

/* ---- life ---- */

struct io *io_begin(lua_State *L, int k, const struct io_class *class, size_t size,
                    int uservalues) {
  struct runtime *rt = runtime(L);
  struct token *token = token_opt(L, k);
  bool deaf = token_none(L, k);
  loop_check_uv(L);
  k = lua_absindex(L, k);
  struct scope *s = operation_scope(L, k);
  struct io *op = (struct io *)task_new(L, KIND_IO, size, uservalues, false);
  int i = lua_gettop(L);
  op->class = class;
  op->rt = rt;
  op->deaf = deaf;
  if (operation_canceled(token, s)) {
    operation_push_canceled(L, token, k, s);
    op->released = true; /* there is nothing */
    task_settle_canceled(L, rt, i);
    return NULL;
  }
  if (token != NULL) {
    lua_pushvalue(L, k);
    lua_setiuservalue(L, i, OP_TOKEN);
  }
  task_hold(L, i, &op->pending.task);
  testing_born(L, rt, op->pending.task.slot);
  /* nothing raises from here to io_started */
  scope_join(s, &op->pending.member);
  if (token != NULL) token_link(token, &op->pending.link);
  link_append(&rt->flights, &op->flight);
  return op;
}

int io_started(lua_State *L, struct io *op, int status) {
  if (status < 0) {
    op->status = status;
    io_end(op);
    io_land(L, lua_gettop(L));
  }
  return 1;
}

static void release(struct io *op) {
  if (op->released) return;
  op->released = true;
  if (op->class->release != NULL) op->class->release(op);
}

static void abort_op(struct io *op) {
  if (op->aborted || !io_in_flight(op)) return;
  op->aborted = true;
  op->class->abort(op);
}

/* [-0, +0, -] it is about to be settled: nobody interrupts it any more */
static void leave(lua_State *L, int i, struct io *op) {
  link_drop(&op->pending.link);
  scope_leave(L, op->rt, &op->pending.member);
  lua_pushnil(L);
  lua_setiuservalue(L, i, OP_TOKEN);
}

/* result(operation) -> its results, or raises; under protection, so that it lands whatever happens */
static int result(lua_State *L) {
  struct io *op = (struct io *)lua_touserdata(L, 1);
  if (op->status >= 0) return op->class->land(L, op);
  push_failure(L, op);
  return lua_error(L);
}

void io_land(lua_State *L, int i) {
  struct runtime *rt = runtime(L);
  struct io *op = (struct io *)lua_touserdata(L, i);
  struct task *t = &op->pending.task;
  int top = lua_gettop(L);
  if (task_done(t)) { /* canceled before */
  } else if (t->flags & TASK_INTERRUPTED) {
    operation_push_interruption(L, i);
    abort_op(op);
    if (!task_done(t)) { /* else by a finalizer */
      leave(L, i, op);
      task_settle_canceled(L, rt, i);
    }
  } else {
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_IO_RESULT);
    lua_pushvalue(L, i);
    op->landing = true;
    int status = lua_pcall(L, 1, LUA_MULTRET, 0);
    op->landing = false;
    if (!task_done(t)) { /* the same */
      leave(L, i, op);
      if (status == LUA_OK)
        task_settle(L, rt, i, lua_gettop(L) - top);
      else
        task_settle_error(L, rt, i, 0);
    }
  }
  lua_settop(L, top);
  if (op->landing) return;                                /* from within, and there it goes on */
  if (io_in_flight(op) || t->flags & TASK_LINKED) return; /* it lands once more */
  release(op);
  for (int n = IO_PATH;; n++) {
    lua_pushnil(L);
    if (!lua_setiuservalue(L, i, n)) break;
  }
  task_forget(L, t);
}

/* ---- closing ---- */

void io_abort_all(struct runtime *rt) {
  for (struct link *l = rt->flights.next, *next; l != &rt->flights; l = next) {
    next = l->next;
    struct io *op = container_of(l, struct io, flight);
    abort_op(op);
    if (!io_in_flight(op)) release(op);
  }
}

static void release_list(struct task *t) {
  for (; t != NULL; t = t->next)
    if (task_is(t, KIND_IO) && !io_in_flight((struct io *)t)) release((struct io *)t);
}

void io_release_all(struct runtime *rt) {
  release_list(rt->ready);
  release_list(rt->landing);
}

/* ---- libuv side: no Lua below this line until the Lua face ---- */

void io_end(struct io *op) { link_drop(&op->flight); }

void io_done(struct io *op, ssize_t status) {
  op->status = status;
  io_end(op);
  if (op->rt->closed)
    release(op);
  else
    loop_ready(op->rt, &op->pending.task);
}

/* ---- Lua face ---- */

void io_token_last(lua_State *L, int i) {
  if (object_test(L, i, TAG_TOKEN) == NULL || !lua_isnoneornil(L, i + 1)) return;
  lua_settop(L, i);
  lua_pushnil(L);
  lua_insert(L, i);
}

const char *io_check_path(lua_State *L, int i) {
  size_t n;
  luaL_checktype(L, i, LUA_TSTRING);
  const char *path = lua_tolstring(L, i, &n);
  luaL_argcheck(L, memchr(path, '\0', n) == NULL, i, "a path has no zero bytes");
  return path;
}

static int await_k(lua_State *L, int status, lua_KContext ctx) {
  struct task *on = (struct task *)ctx;
  if (!fiber_awaited(L, on, status)) return lua_yieldk(L, 0, ctx, await_k);
  if (!((struct io *)on)->quiet) return task_push_outcome(L, 1, on);
  on->flags |= TASK_OBSERVED;
  return 0;
}

int io_await(lua_State *L, struct fiber *me) {
  struct io *op = (struct io *)lua_touserdata(L, -1);
  struct task *on = &op->pending.task;
  if (lua_gettop(L) > 1) lua_replace(L, 1);
  lua_settop(L, 1);
  if (task_done(on)) return task_push_outcome(L, 1, on);
  if (me == NULL) return fiber_outside(L, fiber_await_value);
  return fiber_await(L, runtime(L), me, on, await_k, op->deaf);
}

/* [-0, +0, m] In direct style the operation on top is a part of the running task, whatever that lets flow to
** what it starts. */
static void adopt(lua_State *L, struct runtime *rt) {
  struct io *op = (struct io *)lua_touserdata(L, -1);
  if (!(rt->me->flags & TASK_SUPPRESSED) || op->deaf) return;
  struct scope *s = scope_ambient(L, rt);
  if (task_done(&op->pending.task)) return;
  scope_leave(L, rt, &op->pending.member);
  scope_join(s, &op->pending.member);
  if (!s->canceled) return;
  pending_interrupt(L, &op->pending);
  loop_land_all(L, rt);
}

int io_call(lua_State *L, lua_CFunction start) {
  struct runtime *rt = runtime(L);
  struct fiber *me = fiber_here(L, rt); /* where nobody can wait nothing is started */
  start(L);
  if (me != NULL) adopt(L, rt);
  return io_await(L, me);
}

/* upvalues: runtime, anchors, the operation */
static int direct(lua_State *L) {
  lua_CFunction start;
  void *p = lua_touserdata(L, lua_upvalueindex(3));
  memcpy(&start, &p, sizeof start);
  return io_call(L, start);
}

void io_functions(lua_State *L, const luaL_Reg *functions) {
  for (; functions->name; functions++) {
    void *p;
    memcpy(&p, &functions->func, sizeof p);
    module_push_function(L, functions->func);
    lua_pushfstring(L, "%s_async", functions->name);
    lua_insert(L, -2);
    lua_rawset(L, -3);
    lua_pushvalue(L, UP_RUNTIME);
    lua_pushvalue(L, UP_ANCHORS);
    lua_pushlightuserdata(L, p);
    lua_pushcclosure(L, direct, 3);
    lua_setfield(L, -2, functions->name);
  }
}

void io_methods(lua_State *L, uint32_t tag, const luaL_Reg *functions) {
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(tag));
  lua_getfield(L, -1, "methods");
  io_functions(L, functions);
  lua_pop(L, 2);
}

void io_open(lua_State *L) {
  module_push_function(L, result);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_IO_RESULT);
}
