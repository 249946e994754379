/*
** uvstream.c - streams of bytes: life and closing; shared by TCP, pipes and the standard streams.
** uvread.c reads, uvwrite.c writes; libuv does both, or for what it cannot poll, a thread (fdstream.c).
**
** Closing: a script's `close` makes the stream unusable for everybody, and waits for the queue, in
** which are also the writes that are operations (x_async): these come to their end. Whoever else is
** still reading or writing is told so (ECANCELED). With nobody waiting for the queue any more, canceled
** or not, the handle is closed; what is then left of such operations is told so as well.
**
** SPDX-License-Identifier: MIT
*/
#include "uvstream.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void on_close(uv_handle_t *uv) {
  struct stream *s = of_uv(uv);
  write_free(s);
  read_drop(s);
  if (s->kind == STREAM_FD) fd_close(s);
  handle_closed(&s->handle);
}

static bool changed(struct handle *h) {
  struct stream *s = as_stream(h);
  s->epoch++;
  s->was_cut = false;
  if (waiter_any(&s->writes)) write_changed(s);
  if (waiter_any(&s->closers)) s->lingers = false;
  if (h->disposed && !s->lingers && !waiter_any(&s->closers) && !h->closing) {
    if (waiter_any(&s->writes)) { /* operations, for which nobody waits any more */
      write_stop(s);
      handle_news(h);
    }
    handle_close(h);
  }
  bool reads = waiter_any(&s->readers), awaited = reads;
  if (s->kind == STREAM_FD) {
    if (!reads && s->reading) read_stop(s);
    awaited = reads || s->flying;
  }
  handle_await(h, awaited);
  return reads || waiter_any(&s->writers) || waiter_any(&s->flushers) || waiter_any(&s->closers) ||
         s->flying || s->done != NULL;
}

/* who gave up is told what was sent, if it was a write that has been cut just now */
static int64_t left(struct handle *h) {
  const struct stream *s = as_stream(h);
  return s->was_cut ? s->written : -1;
}

static void collected(struct handle *h) {
  struct stream *s = as_stream(h);
  holder_drop(&s->readers);
  holder_drop(&s->writers);
  holder_drop(&s->flushers);
  holder_drop(&s->closers);
}

int stream_init(struct stream *s) {
  uv_loop_t *loop = loop_uv(s->handle.rt);
  int status = 0;
  switch ((enum stream_kind)s->kind) {
    case STREAM_TCP: status = uv_tcp_init(loop, &s->uv.tcp); break;
    case STREAM_PIPE: status = uv_pipe_init(loop, &s->uv.pipe, 0); break;
    case STREAM_FD: return 0; /* fd_open does it */
  }
  if (status == 0) handle_opened(&s->handle, (uv_handle_t *)&s->uv);
  return status;
}

int stream_adopt(struct stream *s, int fd) {
  int status = stream_init(s);
  if (status == 0) switch ((enum stream_kind)s->kind) {
      case STREAM_TCP: status = uv_tcp_open(&s->uv.tcp, fd); break;
      case STREAM_PIPE: status = uv_pipe_open(&s->uv.pipe, fd); break;
      case STREAM_FD: status = fd_open(s, fd); break;
    }
  if (status != 0) {
    close(fd);
    handle_close(&s->handle);
  } else if (s->kind == STREAM_TCP)
    uv_tcp_nodelay(&s->uv.tcp, 1);
  return status;
}

void stream_connected(struct stream *s) {
  s->handle.pinned = false;
  if (s->kind == STREAM_TCP) uv_tcp_nodelay(&s->uv.tcp, 1);
}

uv_stream_t *stream_uv(struct stream *s) { return &s->uv.stream; }

int stream_lend(struct stream *s) {
  uv_os_fd_t fd;
  if (s->handle.disposed || s->broken || s->handle.closing || s->handle.uv == NULL) return UV_EBADF;
  if (waiter_any(&s->readers) || waiter_any(&s->writers) || waiter_any(&s->flushers) ||
      s->queued > 0 || s->in.end > s->in.start || s->part.length > 0)
    return UV_EBUSY;
  if (s->kind == STREAM_FD && (s->uv.fd.read != NULL || s->uv.fd.write != NULL))
    return UV_EBUSY; /* by a thread, whoever has given up what it does: it moves the position */
  if (s->standard != 0) return s->standard - 1; /* not the open file of our own */
  return uv_fileno(s->handle.uv, &fd) == 0 ? fd : UV_EBADF;
}

/* libuv has made what was lent wait, in the child that came to nothing. A standard stream has lent a
** descriptor that is not ours to make non-blocking; what libuv has of it is another open file, or no
** stream at all (STREAM_FD). */
void stream_take_back(struct stream *s) {
  if (s->standard == 0) uv_stream_set_blocking(&s->uv.stream, 0);
}

/* ---- Lua face ---- */

static void land(lua_State *L, struct handle *h, int i);
static const struct handle_class class = {"stream", changed, land, collected, on_close, left};

struct stream *stream_new(lua_State *L, enum stream_kind kind) {
  struct stream *s = (struct stream *)handle_new(L, TAG_STREAM, &class, sizeof *s, STREAM_STRINGS);
  link_init(&s->readers);
  link_init(&s->writers);
  link_init(&s->flushers);
  link_init(&s->closers);
  link_init(&s->writes);
  s->kind = (uint8_t)kind;
  return s;
}

void stream_push_broken(lua_State *L, const struct stream *s, const char *syscall) {
  handle_push_code(L, "ECANCELED", syscall,
                   "a canceled write has broken the stream: %I bytes of it were sent",
                   (LUAI_UACINT)s->broken_by);
  lua_pushinteger(L, (lua_Integer)s->broken_by);
  lua_setfield(L, -2, "written");
}

bool stream_push_hindrance(lua_State *L, struct stream *s, const struct request *r,
                           const struct link *q) {
  if (s->handle.disposed)
    handle_push_disposed(L, &s->handle);
  else if (s->broken) {
    stream_push_broken(L, s, r->verb->name);
    s->unsent = false; /* it is told */
  } else if (q != NULL && is_new(s, r) && waiter_any(q))
    error_push(L, ERROR_OPERATION, "%s: another task is reading from this stream: one at a time",
               r->verb->name);
  else
    return false;
  return true;
}

static struct link *queue_close(struct handle *h) { return &as_stream(h)->closers; }

static const struct verb close_verb = {"close", write_look_flush, NULL, write_wait_flush,
                                       queue_close};

/* [-0, +0, m] the stream at i is of no use any more: whoever waits is told so */
static void refuse_all(lua_State *L, int i, struct stream *s, bool linger) {
  struct link *queues[] = {&s->readers, &s->flushers, &s->closers};
  bool broken = s->broken; /* before: else it is closed, whatever that breaks */
  write_refuse(L, i, s, linger);
  for (int n = 0; n < 3; n++) {
    if (!waiter_any(queues[n]) || (n > 0 && !s->broken)) continue;
    const char *syscall = n == 0 ? "read" : n == 1 ? "flush" : "close";
    if (broken) {
      stream_push_broken(L, s, syscall);
      s->unsent = false;
    } else
      handle_push_code(L, "ECANCELED", syscall, "the stream was closed meanwhile");
    handle_refuse(L, i, queues[n]);
  }
}

/* [-0, +0, m] nothing new is begun from here on; linger: operations that write go on */
static void dispose(lua_State *L, struct stream *s, bool linger) {
  s->handle.disposed = true;
  read_stop(s);
  refuse_all(L, 1, s, linger);
}

/* it is closed, and there is nothing to wait for */
static int closed_now(lua_State *L, struct stream *s, bool async) {
  struct runtime *rt = s->handle.rt;
  bool unsent = s->unsent;
  handle_changed(L, 1);
  s->unsent = false;
  lua_settop(L, 1);
  if (async) task_new_promise(L);
  if (!unsent)
    lua_pushboolean(L, 1);
  else if (s->broken)
    stream_push_broken(L, s, "close");
  else
    io_push_error(L, s->write_status, "close", NULL);
  if (!async) return unsent ? lua_error(L) : 1;
  if (unsent)
    task_settle_error(L, rt, 2, 0);
  else
    task_settle(L, rt, 2, 1);
  return 1;
}

/* (stream, token, async): it lingers */
static int wait_and_close(lua_State *L) {
  struct stream *s = stream_check(L);
  struct request r = {.verb = &close_verb, .what = FLUSH_CLOSING};
  bool async = lua_toboolean(L, 3);
  lua_settop(L, 2);
  dispose(L, s, true); /* which may break it */
  if (s->queued == 0 || s->broken || s->handle.closing) return closed_now(L, s, async);
  return async ? handle_ask_async(L, &s->handle, &r, 2)
               : handle_ask(L, &s->handle, &r, 2, wait_and_close);
}

/* whoever closes the stream at 1 is in the queue of those who wait, or does not wait any more */
static int close_k(lua_State *L, int status, lua_KContext ctx) {
  struct stream *s = stream_check(L);
  (void)ctx;
  s->lingers = false;
  handle_changed(L, 1);
  return status == LUA_OK || status == LUA_YIELD ? 1 : lua_error(L);
}

/* Until it waits the stream lingers, while much is created: a finalizer may cancel it before it has
** begun, memory may fail. Whatever comes of it, the stream is closed in the end. */
static int close_any(lua_State *L, lua_CFunction f) {
  struct stream *s = stream_check(L);
  token_opt(L, 2);
  lua_settop(L, 2);
  if (s->queued > 0 && !s->handle.disposed) {
    if (f != NULL && fiber_here(L, s->handle.rt) == NULL) return fiber_outside(L, f);
    module_push_function(L, wait_and_close); /* stream token function */
  }
  if (s->handle.disposed) {
    s->unsent = false; /* it was told, or dropped on purpose: a second time is harmless */
    return closed_now(L, s, f == NULL);
  }
  if (s->queued == 0) {
    dispose(L, s, false);
    return closed_now(L, s, f == NULL);
  }
  lua_pushvalue(L, 1);
  lua_pushvalue(L, 2);
  lua_pushboolean(L, f == NULL);
  s->lingers = true;
  return close_k(L, lua_pcallk(L, 3, 1, 0, 0, f != NULL ? close_k : NULL), 0);
}

static int l_close(lua_State *L) { return close_any(L, l_close); }
static int l_close_async(lua_State *L) { return close_any(L, NULL); }

/* dispose(): at once; what has not been sent is dropped */
static int l_dispose(lua_State *L) {
  struct stream *s = stream_check(L);
  lua_settop(L, 1);
  if (!s->handle.disposed || waiter_any(&s->writers)) dispose(L, s, false);
  handle_close(&s->handle);
  handle_changed(L, 1);
  return 0;
}

/* abort(): the same, and the peer gets an error instead of an end */
static int l_abort(lua_State *L) {
  struct stream *s = stream_check(L);
  uv_os_fd_t fd;
  struct linger at_once = {1, 0};
  if (s->handle.uv != NULL && !s->handle.closing && s->kind == STREAM_TCP &&
      uv_fileno(s->handle.uv, &fd) == 0)
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  return l_dispose(L);
}

/* __close(stream, error) */
static int l_leave(lua_State *L) {
  bool failed = !lua_isnoneornil(L, 2);
  lua_settop(L, 1);
  return failed ? l_dispose(L) : l_close(L);
}

static void land(lua_State *L, struct handle *h, int i) {
  struct stream *s = as_stream(h);
  struct request end = {.verb = &close_verb, .what = FLUSH_CLOSING};
  if (s->done != NULL) write_forget(L, s, i);
  if (h->uv == NULL) { /* on_close knows nothing of them */
    lua_pushnil(L);
    lua_setiuservalue(L, i, STREAM_STRINGS);
  }
  if (s->broken || (h->closing && waiter_any(&s->writers))) refuse_all(L, i, s, false);
  if (waiter_any(&s->readers) || s->part.length > 0) read_answer(L, i, s);
  if (waiter_any(&s->writers) || waiter_any(&s->flushers)) write_answer(L, i, s);
  if (waiter_any(&s->closers)) handle_answer(L, i, h, &end);
}

/* ---- properties ---- */

static int push_address(lua_State *L, bool peer) {
  struct stream *s = stream_check(L);
  struct sockaddr_storage address;
  int n = sizeof address;
  memset(&address, 0, sizeof address);
  if (s->handle.uv == NULL || s->handle.closing) return 0;
  if (s->kind == STREAM_TCP) {
    int status = peer ? uv_tcp_getpeername(&s->uv.tcp, (struct sockaddr *)&address, &n)
                      : uv_tcp_getsockname(&s->uv.tcp, (struct sockaddr *)&address, &n);
    return status == 0 && address_push(L, &address);
  }
  if (s->kind != STREAM_PIPE || s->standard != 0) return 0;
  char path[256];
  size_t length = sizeof path;
  int status = peer ? uv_pipe_getpeername(&s->uv.pipe, path, &length)
                    : uv_pipe_getsockname(&s->uv.pipe, path, &length);
  if (status != 0) return 0;
  lua_pushlstring(L, path, length);
  return 1;
}

static int l_local_address(lua_State *L) { return push_address(L, false); }
static int l_peer_address(lua_State *L) { return push_address(L, true); }

static int l_is_closed(lua_State *L) {
  const struct stream *s = stream_check(L);
  lua_pushboolean(L, s->handle.disposed || s->broken);
  return 1;
}

static struct stream *check_tcp(lua_State *L, const char *what) {
  struct stream *s = stream_check(L);
  if (s->handle.disposed || s->broken) {
    handle_push_disposed(L, &s->handle);
    lua_error(L);
  }
  if (s->kind != STREAM_TCP) error_throw(L, ERROR_OPERATION, "%s: only of TCP streams", what);
  return s;
}

static int finish_option(lua_State *L, int status, const char *what) {
  if (status == 0) return 0;
  io_push_error(L, status, what, NULL);
  return lua_error(L);
}

/* nodelay(on): true by default */
static int l_nodelay(lua_State *L) {
  struct stream *s = check_tcp(L, "nodelay");
  bool on = lua_isnone(L, 2) || lua_toboolean(L, 2);
  return finish_option(L, uv_tcp_nodelay(&s->uv.tcp, on), "nodelay");
}

/* keepalive(seconds), or false */
static int l_keepalive(lua_State *L) {
  struct stream *s = check_tcp(L, "keepalive");
  if (!lua_toboolean(L, 2))
    return finish_option(L, uv_tcp_keepalive(&s->uv.tcp, 0, 0), "keepalive");
  double seconds = module_seconds(L, 2);
  luaL_argcheck(L, seconds >= 1 && seconds <= 32767, 2, "1 to 32767 seconds");
  return finish_option(L, uv_tcp_keepalive(&s->uv.tcp, 1, (unsigned)ceil(seconds)), "keepalive");
}

static int l_tostring(lua_State *L) {
  static const char *const kinds[] = {"tcp", "pipe", "file"};
  static const char *const standard[] = {"stdin", "stdout", "stderr"};
  const struct stream *s = stream_check(L);
  lua_pushfstring(L, "coflow.Stream (%s%s)",
                  s->standard != 0 ? standard[s->standard - 1] : kinds[s->kind],
                  s->handle.disposed || s->broken ? ", closed" : "");
  return 1;
}

/* What a standard stream has still to send is sent by shutdown_run: that its queue is collected can
** only mean that the state closes. */
static int l_gc(lua_State *L) {
  const struct stream *s = (const struct stream *)lua_touserdata(L, 1);
  return s->standard != 0 && s->queued > 0 ? 0 : handle_gc(L);
}

static const luaL_Reg methods[] = {{"close", l_close},         {"close_async", l_close_async},
                                   {"dispose", l_dispose},     {"abort", l_abort},
                                   {"nodelay", l_nodelay},     {"keepalive", l_keepalive},
                                   {"__close", l_leave},       {"__gc", l_gc},
                                   {"__tostring", l_tostring}, {NULL, NULL}};
static const luaL_Reg properties[] = {{"local_address", l_local_address},
                                      {"peer_address", l_peer_address},
                                      {"is_closed", l_is_closed},
                                      {NULL, NULL}};

void stream_open(lua_State *L) {
  module_class(L, TAG_STREAM, "coflow.Stream", methods, properties);
  module_methods(L, TAG_STREAM, read_methods);
  module_methods(L, TAG_STREAM, write_methods);
}
