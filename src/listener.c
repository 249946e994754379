/*
** listener.c - sockets that listen: accept.
**
** A listening socket is polled while somebody waits for a connection, and the system's queue is asked for one
** only for somebody: so connections that nobody accepts stay where they are, the peers wait, and when there
** are no descriptors left (EMFILE) no connection is lost. Who asked is told so, and asks again later.
** (uv_listen takes connections before anybody wants them, and when there are no descriptors left closes them
** without a word.)
**
** An accepted connection is first the listener's, then whoever's it is given to; if that has gone meanwhile,
** the next one gets it.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { LISTENER_STREAM = HOLDER_WAITERS + 1, LISTENER_HOOK };

struct listener {
  struct handle handle;
  struct link acceptors;
  int fd;
  char *path;   /* of a pipe: the file goes with the listener, … */
  dev_t device; /* … if it is this one still */
  ino_t number;
  int status;     /* of the poll: an error, or 0 */
  bool connected; /* the stream in LISTENER_STREAM is; else it is a blank one, or nil */
  bool polling;
  uint8_t kind;
  uv_poll_t poll;
};

static struct listener *as_listener(struct handle *h) { return (struct listener *)(void *)h; }

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void on_event(uv_poll_t *poll, int status, int events) {
  struct listener *l = container_of(poll, struct listener, poll);
  (void)events;
  if (status < 0) l->status = status;
  if (waiter_any(&l->acceptors))
    handle_news(&l->handle);
  else { /* nobody wants it now */
    uv_poll_stop(poll);
    l->polling = false;
  }
}

static void on_close(uv_handle_t *uv) {
  struct listener *l = container_of((uv_poll_t *)uv, struct listener, poll);
  if (l->fd >= 0) close(l->fd);
  free(l->path);
  handle_closed(&l->handle);
}

static bool changed(struct handle *h) {
  struct listener *l = as_listener(h);
  bool awaited = waiter_any(&l->acceptors);
  if (h->disposed && !h->closing && h->uv != NULL) {
    handle_close(h);
    close(l->fd); /* libuv has let go of it */
    l->fd = -1;
    struct stat now;
    if (l->path != NULL && lstat(l->path, &now) == 0 && now.st_dev == l->device &&
        now.st_ino == l->number)
      unlink(l->path);
  }
  handle_await(h, awaited);
  return awaited;
}

static void collected(struct handle *h) {
  struct listener *l = as_listener(h);
  holder_drop(&l->acceptors);
  h->disposed = true;
  changed(h);
}

int listener_adopt(struct listener *l, int fd, const char *path) {
  int status = UV_ENOMEM;
  if (path == NULL || (l->path = strdup(path)) != NULL)
    status = uv_poll_init(loop_uv(l->handle.rt), &l->poll, fd);
  if (status != 0) {
    close(fd);
    if (path != NULL) unlink(path);
    free(l->path);
    l->path = NULL;
    return status;
  }
  struct stat made;
  if (path != NULL && lstat(path, &made) == 0) l->device = made.st_dev, l->number = made.st_ino;
  l->fd = fd;
  handle_opened(&l->handle, (uv_handle_t *)&l->poll);
  return 0;
}

/* the descriptor of a connection, or an error of libuv */
static int accept_one(const struct listener *l) {
  int fd;
  do {
#ifdef SOCK_CLOEXEC
    fd = accept4(l->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
    fd = accept(l->fd, NULL, NULL);
    if (fd >= 0) fcntl(fd, F_SETFD, FD_CLOEXEC);
#endif
  } while (fd < 0 && (errno == EINTR || errno == ECONNABORTED || errno == EPROTO));
  return fd >= 0 ? fd : uv_translate_sys_error(errno);
}

/* ---- Lua face ---- */

static void land(lua_State *L, struct handle *h, int i);
static const struct handle_class class = {"listener", changed, land, collected, on_close, NULL};

struct listener *listener_new(lua_State *L, enum stream_kind kind) {
  struct listener *l =
      (struct listener *)handle_new(L, TAG_LISTENER, &class, sizeof *l, LISTENER_HOOK);
  link_init(&l->acceptors);
  l->kind = (uint8_t)kind;
  l->fd = -1;
  return l;
}

static struct listener *check(lua_State *L) {
  return (struct listener *)object_check(L, 1, TAG_LISTENER);
}

static enum look look_accept(lua_State *L, int i, struct handle *h, struct request *r) {
  struct listener *l = as_listener(h);
  (void)r;
  if (h->disposed) {
    handle_push_disposed(L, h);
    return LOOK_ERROR;
  }
  lua_getiuservalue(L, i, LISTENER_STREAM);
  if (l->connected) return LOOK_VALUE;
  if (lua_isnil(L, -1)) { /* it may be for the next one, if there is no connection */
    lua_pop(L, 1);
    stream_new(L, (enum stream_kind)l->kind);
    lua_setiuservalue(L, i, LISTENER_STREAM);
    return LOOK_AGAIN; /* finalizers may have run */
  }
  int fd = l->status != 0 ? l->status : accept_one(l);
  if (fd >= 0) {
    fd = stream_adopt((struct stream *)lua_touserdata(L, -1), fd);
    l->connected = fd == 0;
    if (fd == 0) return LOOK_VALUE;
    handle_changed(L, -1); /* it is closing */
    lua_pushnil(L);        /* a new one next time */
    lua_setiuservalue(L, i, LISTENER_STREAM);
  }
  lua_pop(L, 1);
  if (fd == UV_EAGAIN) return LOOK_WAIT;
  io_push_error(L, fd, "accept", NULL);
  return LOOK_ERROR;
}

static void take_accept(lua_State *L, int i, struct handle *h, struct request *r) {
  (void)r;
  as_listener(h)->connected = false;
  lua_pushnil(L);
  lua_setiuservalue(L, i, LISTENER_STREAM);
}

static bool wait_accept(lua_State *L, struct handle *h, struct request *r) {
  struct listener *l = as_listener(h);
  (void)L, (void)r;
  if (l->polling) return true;
  l->status = uv_poll_start(&l->poll, UV_READABLE, on_event);
  l->polling = l->status == 0;
  return l->polling;
}

static struct link *queue_accept(struct handle *h) { return &as_listener(h)->acceptors; }

enum { ACCEPT_COST = 16 }; /* whoever has got one has more to do */
static const struct verb accept_verb = {"accept", look_accept, take_accept, wait_accept,
                                        queue_accept};

static void land(lua_State *L, struct handle *h, int i) {
  struct request r = {.verb = &accept_verb};
  if (!h->disposed) handle_answer(L, i, h, &r);
}

static int accept_any(lua_State *L, lua_CFunction f) {
  struct listener *l = check(L);
  struct request r = {.verb = &accept_verb, .cost = ACCEPT_COST};
  token_opt(L, 2);
  lua_settop(L, 2);
  return f != NULL ? handle_ask(L, &l->handle, &r, 2, f) : handle_ask_async(L, &l->handle, &r, 2);
}

static int l_accept(lua_State *L) { return accept_any(L, l_accept); }
static int l_accept_async(lua_State *L) { return accept_any(L, NULL); }

static int l_close(lua_State *L) {
  struct listener *l = check(L);
  lua_settop(L, 1);
  if (l->handle.disposed) return 0;
  handle_push_code(L, "ECANCELED", "accept", "the listener was closed meanwhile");
  if (l->handle.disposed) return 0; /* by a finalizer */
  l->handle.disposed = true;
  handle_refuse(L, 1, &l->acceptors);
  handle_changed(L, 1);
  lua_getiuservalue(L, 1, LISTENER_STREAM);
  struct handle *stream = (struct handle *)lua_touserdata(L, -1);
  if (stream != NULL) {
    stream->disposed = true;
    handle_changed(L, -1);
    l->connected = false;
    lua_pushnil(L);
    lua_setiuservalue(L, 1, LISTENER_STREAM);
  }
  lua_getiuservalue(L, 1, LISTENER_HOOK);
  if (!lua_isnil(L, -1)) lua_call(L, 0, 0);
  return 0;
}

/* when_closed(listener, fn): fn is called once it is closed, by whatever name; nil: nobody is */
static int l_when_closed(lua_State *L) {
  check(L);
  lua_settop(L, 2);
  lua_setiuservalue(L, 1, LISTENER_HOOK);
  return 0;
}

static bool local_address(const struct listener *l, struct sockaddr_storage *address) {
  socklen_t n = sizeof *address;
  memset(address, 0, sizeof *address);
  return l->kind == STREAM_TCP && !l->handle.disposed &&
         getsockname(l->fd, (struct sockaddr *)address, &n) == 0;
}

static int l_port(lua_State *L) {
  struct sockaddr_storage address;
  if (!local_address(check(L), &address)) return 0;
  lua_pushinteger(L, ntohs(*address_port(&address)));
  return 1;
}

static int l_local_address(lua_State *L) {
  struct listener *l = check(L);
  struct sockaddr_storage address;
  if (l->kind == STREAM_PIPE && !l->handle.disposed)
    lua_pushstring(L, l->path);
  else if (!local_address(l, &address) || !address_push(L, &address))
    return 0;
  return 1;
}

static int l_is_closed(lua_State *L) {
  lua_pushboolean(L, check(L)->handle.disposed);
  return 1;
}

static int l_tostring(lua_State *L) {
  const struct listener *l = check(L);
  lua_pushfstring(L, "coflow.Listener (%s%s)", l->kind == STREAM_TCP ? "tcp" : "pipe",
                  l->handle.disposed ? ", closed" : "");
  return 1;
}

static const luaL_Reg methods[] = {{"accept", l_accept},       {"accept_async", l_accept_async},
                                   {"close", l_close},         {"dispose", l_close},
                                   {"__close", l_close},       {"__gc", handle_gc},
                                   {"__tostring", l_tostring}, {NULL, NULL}};
static const luaL_Reg properties[] = {
    {"port", l_port}, {"local_address", l_local_address}, {"is_closed", l_is_closed}, {NULL, NULL}};

static const luaL_Reg functions[] = {{"when_closed", l_when_closed}, {NULL, NULL}};

void listener_open(lua_State *L) {
  module_functions(L, functions);
  module_class(L, TAG_LISTENER, "coflow.Listener", methods, properties);
}
