/*
** tcp.c - TCP and pipes (sockets with a path): connect, listen, addresses. Names of hosts are looked up in
** Lua (net.lua).
**
** A connection that is being made is an operation (io.c) that holds its stream. Canceled, it closes that at
** once; so does one that is refused.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { CONNECT_STREAM = IO_FIRST };

struct connect_op {
  struct io io;
  uv_connect_t req;
  struct stream *stream; /* NULL: handed over */
};

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static struct connect_op *as_connect(struct io *op) { return (struct connect_op *)(void *)op; }

static struct handle *handle_of(struct connect_op *c) { return (struct handle *)(void *)c->stream; }

static void on_connect(uv_connect_t *req, int status) {
  struct connect_op *c = container_of(req, struct connect_op, req);
  c->io.rt->patient--;
  io_done(&c->io, status);
}

static void connect_abort(struct io *op) { handle_close(handle_of(as_connect(op))); }

/* nobody has got the stream, which is pinned */
static void connect_release(struct io *op) {
  struct connect_op *c = as_connect(op);
  if (c->stream != NULL) handle_close(handle_of(c));
}

bool address_parse(const char *host, int port, struct sockaddr_storage *to) {
  memset(to, 0, sizeof *to);
  return uv_ip4_addr(host, port, (struct sockaddr_in *)(void *)to) == 0 ||
         uv_ip6_addr(host, port, (struct sockaddr_in6 *)(void *)to) == 0;
}

bool address_name6(const struct sockaddr_in6 *a, char name[ADDRESS_SIZE]) {
  char interface[IF_NAMESIZE];
  if (uv_ip6_name(a, name, ADDRESS_SIZE) != 0) return false;
  bool local = IN6_IS_ADDR_LINKLOCAL(&a->sin6_addr) || IN6_IS_ADDR_MC_LINKLOCAL(&a->sin6_addr);
  if (local && a->sin6_scope_id != 0 && if_indextoname(a->sin6_scope_id, interface) != NULL) {
    size_t n = strlen(name);
    snprintf(name + n, ADDRESS_SIZE - n, "%%%s", interface);
  }
  return true;
}

int address_socket(int family, int type) {
#ifdef SOCK_CLOEXEC
  int fd = socket(family, type | SOCK_CLOEXEC, 0);
#else
  int fd = socket(family, type, 0);
  if (fd >= 0) fcntl(fd, F_SETFD, FD_CLOEXEC);
#endif
  return fd >= 0 ? fd : uv_translate_sys_error(errno);
}

/* a socket of ours that listens, or an error of libuv */
static int listen_at(const struct sockaddr *address, socklen_t n, bool reuse_port, int backlog) {
  int on = 1, fd = address_socket(address->sa_family, SOCK_STREAM);
  if (fd < 0) return fd;
  if (address->sa_family != AF_UNIX) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if ((!reuse_port || setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) == 0) &&
      bind(fd, address, n) == 0 && listen(fd, backlog) == 0)
    return fd;
  int status = uv_translate_sys_error(errno);
  close(fd);
  return status;
}

/* ---- Lua face ---- */

bool address_push(lua_State *L, const struct sockaddr_storage *from) {
  char host[ADDRESS_SIZE];
  if (from->ss_family == AF_INET) {
    const struct sockaddr_in *a = (const struct sockaddr_in *)(const void *)from;
    if (uv_ip4_name(a, host, sizeof host) != 0) return false;
    lua_pushfstring(L, "%s:%d", host, (int)ntohs(a->sin_port));
    return true;
  }
  const struct sockaddr_in6 *a = (const struct sockaddr_in6 *)(const void *)from;
  if (from->ss_family != AF_INET6 || !address_name6(a, host)) return false;
  lua_pushfstring(L, "[%s]:%d", host, (int)ntohs(a->sin6_port));
  return true;
}

static int connect_land(lua_State *L, struct io *op) {
  struct connect_op *c = as_connect(op);
  lua_getiuservalue(L, 1, CONNECT_STREAM);
  stream_connected(c->stream);
  c->stream = NULL;
  handle_changed(L, -1);
  return 1;
}

static const struct io_class connect_class = {"net.connect", "connect",       connect_land,
                                              connect_abort, connect_release, NULL};

/* [-0, +1, e] to what is named at i, given the token at k; NULL: canceled before */
static struct connect_op *begin(lua_State *L, enum stream_kind kind, int i, int k, int *status) {
  struct stream *s = stream_new(L, kind);
  int stream = lua_gettop(L);
  struct connect_op *c =
      (struct connect_op *)(void *)io_begin(L, k, &connect_class, sizeof *c, CONNECT_STREAM);
  if (c == NULL) return NULL;
  lua_pushvalue(L, i);
  lua_setiuservalue(L, -2, IO_PATH);
  lua_pushvalue(L, stream);
  lua_setiuservalue(L, -2, CONNECT_STREAM);
  *status = stream_init(s);
  if (*status == 0) {
    c->stream = s;
    handle_of(c)->pinned = true;
    handle_changed(L, stream);
  }
  return c;
}

static int started(lua_State *L, struct connect_op *c, int status) {
  if (status == 0) c->io.rt->patient++;
  return io_started(L, &c->io, status);
}

/* [-0, +0, v] */
static int check_port(lua_State *L, int i, int least) {
  lua_Integer port = luaL_checkinteger(L, i);
  luaL_argcheck(L, port >= least && port <= 65535, i, "no such port");
  return (int)port;
}

/* connect_address(address, port, token) */
static int l_connect_address(lua_State *L) {
  struct sockaddr_storage to;
  const char *host = luaL_checkstring(L, 1);
  int port = check_port(L, 2, 1), status = 0;
  luaL_argcheck(L, address_parse(host, port, &to), 1, "a numeric address expected");
  token_opt(L, 3);
  lua_settop(L, 3);
  address_push(L, &to);
  struct connect_op *c = begin(L, STREAM_TCP, 4, 3, &status);
  if (c == NULL) return 1;
  if (status == 0)
    status = uv_tcp_connect(&c->req, (uv_tcp_t *)stream_uv(c->stream), (struct sockaddr *)&to,
                            on_connect);
  return started(L, c, status);
}

/* [-0, +0, v] */
static const char *check_path(lua_State *L, int i) {
  const char *path = io_check_path(L, i);
  luaL_argcheck(L, *path != '\0', i, "a path is not empty");
  return path;
}

static bool too_long(const char *path) {
  return strlen(path) >= sizeof((struct sockaddr_un *)NULL)->sun_path;
}

/* connect_pipe(path, token) */
static int l_connect_pipe(lua_State *L) {
  const char *path = check_path(L, 1);
  int status = 0;
  token_opt(L, 2);
  lua_settop(L, 2);
  struct connect_op *c = begin(L, STREAM_PIPE, 1, 2, &status);
  if (c == NULL) return 1;
  if (status == 0 && too_long(path)) status = UV_ENAMETOOLONG; /* libuv would cut it */
  if (status == 0) uv_pipe_connect(&c->req, (uv_pipe_t *)stream_uv(c->stream), path, on_connect);
  return started(L, c, status);
}

/* [-0, +1, e] */
static int listen_on(lua_State *L, enum stream_kind kind, const struct sockaddr *address,
                     socklen_t n, const char *name, bool reuse_port, int backlog) {
  struct listener *l = listener_new(L, kind);
  int fd = listen_at(address, n, reuse_port, backlog);
  int status = fd < 0 ? fd : listener_adopt(l, fd, kind == STREAM_PIPE ? name : NULL);
  if (status == 0) return 1;
  io_push_error(L, status, "listen", name);
  return lua_error(L);
}

/* listen_address(address, port, backlog, reuse_port) */
static int l_listen_address(lua_State *L) {
  struct sockaddr_storage at;
  const char *host = luaL_checkstring(L, 1);
  int port = check_port(L, 2, 0), backlog = (int)luaL_checkinteger(L, 3);
  luaL_argcheck(L, address_parse(host, port, &at), 1, "a numeric address expected");
  bool reuse_port = lua_toboolean(L, 4);
  lua_settop(L, 1);
  address_push(L, &at);
  return listen_on(L, STREAM_TCP, (struct sockaddr *)&at, address_length(&at), lua_tostring(L, 2),
                   reuse_port, backlog);
}

/* listen_pipe(path, backlog) */
static int l_listen_pipe(lua_State *L) {
  struct sockaddr_un at = {.sun_family = AF_UNIX};
  const char *path = check_path(L, 1);
  int backlog = (int)luaL_checkinteger(L, 2);
  if (too_long(path)) {
    io_push_error(L, UV_ENAMETOOLONG, "listen", path);
    return lua_error(L);
  }
  strcpy(at.sun_path, path);
  return listen_on(L, STREAM_PIPE, (struct sockaddr *)&at, sizeof at, path, false, backlog);
}

/* is_address(host): a numeric one */
static int l_is_address(lua_State *L) {
  struct sockaddr_storage to;
  lua_pushboolean(L, address_parse(luaL_checkstring(L, 1), 0, &to));
  return 1;
}

/* report_failure(error): to the handler of unobserved exceptions, while the running task goes on */
static int l_report_failure(lua_State *L) {
  lua_settop(L, 1);
  error_report_caught(L);
  return 0;
}

static const luaL_Reg operations[] = {
    {"connect_address", l_connect_address}, {"connect_pipe", l_connect_pipe}, {NULL, NULL}};
static const luaL_Reg plain[] = {{"listen_address", l_listen_address},
                                 {"listen_pipe", l_listen_pipe},
                                 {"is_address", l_is_address},
                                 {"report_failure", l_report_failure},
                                 {NULL, NULL}};

/* open_net() -> the functions that coflow.net is made of; makes the classes */
static int l_open_net(lua_State *L) {
  lua_newtable(L);
  stream_open(L);
  listener_open(L);
  io_functions(L, operations);
  module_functions(L, plain);
  return 1;
}

static const luaL_Reg functions[] = {{"open_net", l_open_net}, {NULL, NULL}};

const struct part tcp_part = {functions, io_open, NULL};
