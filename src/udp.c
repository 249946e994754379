/*
** udp.c - UDP sockets: send, receive, options. Names of hosts, and the loop around a send that must
** wait, are in Lua (udp.lua).
**
** As a listener does with connections, a socket takes a datagram from the system only for somebody who
** asks. So what nobody receives stays in the system's queue, whose bound is the bound, and it is the
** system that drops what does not fit, as it does for any socket. What was taken is first the socket's,
** then whoever's it is given to; if that has gone meanwhile, the next one gets it. It is taken whole:
** no datagram is longer than the buffer.
**
** A datagram is sent at once, or not at all, if the system's buffer is full: then who sends waits until it is
** not, in a queue of its own, and tries again. Canceled meanwhile, it has sent nothing.
**
** What the system has heard about earlier datagrams (ECONNREFUSED, for a connected socket) is raised by
** the next operation. libuv ends its polling then, and says so with an error of its own: only the
** system is believed.
**
** A socket for IPv6 that takes IPv4 as well is given, and gives, addresses as each family writes them.
**
** Invariants: length >= 0 exactly while a datagram is the socket's; serial changes when it comes and goes.
**             events is what is polled for: all that somebody waits for, and what nobody does until it comes.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BUFFER = 65536, KEPT = 4096 };

struct udp {
  struct handle handle;
  struct link receivers, senders;
  int fd;
  int family;
  int events;    /* polled for */
  int status;    /* why it cannot be */
  bool writable; /* for the first one of the senders */
  bool only_ipv6;
  uint32_t serial;
  char *data; /* of BUFFER bytes, or as many as the datagram has */
  size_t size;
  ssize_t length;
  struct sockaddr_storage from;
  uv_poll_t poll;
};

static struct udp *as_udp(struct handle *h) { return (struct udp *)(void *)h; }

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void on_event(uv_poll_t *poll, int status, int events);

static int wanted(const struct udp *u) {
  return (waiter_any(&u->receivers) ? UV_READABLE : 0) |
         (waiter_any(&u->senders) ? UV_WRITABLE : 0);
}

static void poll_for(struct udp *u, int events) {
  if (events == u->events || u->handle.uv == NULL || u->handle.closing) return;
  u->status = events ? uv_poll_start(&u->poll, events, on_event) : uv_poll_stop(&u->poll);
  u->events = u->status == 0 ? events : 0;
}

static void on_event(uv_poll_t *poll, int status, int events) {
  struct udp *u = container_of(poll, struct udp, poll);
  if (status < 0) { /* it is polled no more, and there is an error to be told */
    u->events = 0;
    events = UV_READABLE | UV_WRITABLE;
  }
  if (events & wanted(u)) handle_news(&u->handle);
  if (events & UV_WRITABLE && waiter_any(&u->senders)) u->writable = true;
  if (events & u->events & ~wanted(u)) poll_for(u, wanted(u));
}

static void drop(struct udp *u) {
  u->serial++;
  u->length = -1;
  if (u->size <= KEPT) return;
  free(u->data);
  u->data = NULL;
  u->size = 0;
}

static void close_fd(struct udp *u) {
  if (u->fd >= 0) close(u->fd);
  u->fd = -1;
}

static void on_close(uv_handle_t *uv) {
  struct udp *u = container_of((uv_poll_t *)uv, struct udp, poll);
  close_fd(u);
  free(u->data);
  u->data = NULL;
  u->length = -1;
  handle_closed(&u->handle);
}

static bool changed(struct handle *h) {
  struct udp *u = as_udp(h);
  bool awaited = waiter_any(&u->receivers) || waiter_any(&u->senders);
  if (h->disposed && !h->closing && h->uv != NULL) {
    handle_close(h);
    close_fd(u); /* libuv has let go of it */
  }
  handle_await(h, awaited);
  return awaited;
}

static void collected(struct handle *h) {
  struct udp *u = as_udp(h);
  holder_drop(&u->receivers);
  holder_drop(&u->senders);
  h->disposed = true;
  changed(h);
}

/* the next datagram is the socket's; or an error of libuv */
static int receive(struct udp *u) {
  char data[BUFFER];
  socklen_t n = sizeof u->from;
  ssize_t length;
  do length = recvfrom(u->fd, data, sizeof data, 0, (struct sockaddr *)&u->from, &n);
  while (length < 0 && errno == EINTR);
  if (length < 0) return uv_translate_sys_error(errno);
  if ((size_t)length > u->size || u->data == NULL) {
    size_t size = (size_t)length > 256 ? (size_t)length : 256;
    char *room = realloc(u->data, size);
    if (room == NULL) return UV_ENOMEM;
    u->data = room;
    u->size = size;
  }
  memcpy(u->data, data, (size_t)length);
  u->length = length;
  u->serial++;
  return 0;
}

/* sent, or an error of libuv; to == NULL: to the peer */
static int send_now(const struct udp *u, const char *data, size_t length,
                    const struct sockaddr_storage *to) {
  socklen_t n = to == NULL ? 0 : address_length(to);
  ssize_t sent;
  do sent = sendto(u->fd, data, length, 0, (const struct sockaddr *)to, n);
  while (sent < 0 && errno == EINTR);
  return sent >= 0 ? 0 : uv_translate_sys_error(errno);
}

/* no peer any more; then the system gives back a port of its own choice, which is ours */
static int disconnect(const struct udp *u) {
  struct sockaddr_storage before = {0}, after = {0};
  struct sockaddr none = {.sa_family = AF_UNSPEC};
  socklen_t n = sizeof before, m = sizeof after;
  if (getsockname(u->fd, (struct sockaddr *)&before, &n) != 0 ||
      (connect(u->fd, &none, sizeof none) != 0 && errno != EAFNOSUPPORT) ||
      getsockname(u->fd, (struct sockaddr *)&after, &m) != 0)
    return uv_translate_sys_error(errno);
  if (*address_port(&after) == *address_port(&before)) return 0;
  *address_port(&after) = *address_port(&before);
  return bind(u->fd, (struct sockaddr *)&after, address_length(&after)) == 0
             ? 0
             : uv_translate_sys_error(errno);
}

/* an IPv4 address as an IPv6 socket wants it */
static void map(const struct udp *u, struct sockaddr_storage *a) {
  if (a->ss_family != AF_INET || u->family != AF_INET6) return;
  const struct sockaddr_in v4 = *(const struct sockaddr_in *)(const void *)a;
  struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)(void *)a;
  memset(a, 0, sizeof *a);
  v6->sin6_family = AF_INET6;
  v6->sin6_port = v4.sin_port;
  v6->sin6_addr.s6_addr[10] = v6->sin6_addr.s6_addr[11] = 0xff;
  memcpy(&v6->sin6_addr.s6_addr[12], &v4.sin_addr, 4);
}

/* … and back */
static void unmap(struct sockaddr_storage *a) {
  const struct sockaddr_in6 v6 = *(const struct sockaddr_in6 *)(const void *)a;
  struct sockaddr_in *v4 = (struct sockaddr_in *)(void *)a;
  if (a->ss_family != AF_INET6 || !IN6_IS_ADDR_V4MAPPED(&v6.sin6_addr)) return;
  memset(a, 0, sizeof *a);
  v4->sin_family = AF_INET;
  v4->sin_port = v6.sin6_port;
  memcpy(&v4->sin_addr, &v6.sin6_addr.s6_addr[12], 4);
}

static int set(const struct udp *u, int level, int name, int value) {
  return setsockopt(u->fd, level, name, &value, sizeof value) == 0 ? 0
                                                                   : uv_translate_sys_error(errno);
}

/* ---- Lua face ---- */

static void land(lua_State *L, struct handle *h, int i);
static const struct handle_class class = {"socket", changed, land, collected, on_close, NULL};

static struct udp *check(lua_State *L) { return (struct udp *)object_check(L, 1, TAG_UDP); }

static struct udp *check_open(lua_State *L) {
  struct udp *u = check(L);
  if (!u->handle.disposed) return u;
  handle_push_disposed(L, &u->handle);
  lua_error(L);
  return NULL;
}

static int fail(lua_State *L, int status, const char *syscall) {
  io_push_error(L, status, syscall, NULL);
  return lua_error(L);
}

/* [-0, +0, v] the numeric address at i and the port behind it */
static struct sockaddr_storage check_address(lua_State *L, int i, int least) {
  struct sockaddr_storage a;
  lua_Integer port = luaL_checkinteger(L, i + 1);
  luaL_argcheck(L, port >= least && port <= 65535, i + 1, "no such port");
  luaL_argcheck(L, address_parse(luaL_checkstring(L, i), (int)port, &a), i,
                "a numeric address expected");
  return a;
}

enum { REUSE_ADDRESS = 1, REUSE_PORT = 2, ONLY_IPV6 = 4 };

/* a bound socket, or an error of libuv */
static int open_socket(const struct sockaddr_storage *at, int flags) {
  int fd = address_socket(at->ss_family, SOCK_DGRAM);
  bool v6 = at->ss_family == AF_INET6;
  int on = 1, only = flags & ONLY_IPV6 ? 1 : 0;
  if (fd < 0) return fd;
  if ((flags & REUSE_ADDRESS && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0) ||
      (flags & REUSE_PORT && setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0) ||
      (v6 && setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only, sizeof only) != 0) ||
      bind(fd, (const struct sockaddr *)at, address_length(at)) != 0) {
    int status = uv_translate_sys_error(errno);
    close(fd);
    return status;
  }
  return fd;
}

/* open(address, port, reuse_address, reuse_port, ipv6_only) -> a socket */
static int l_open(lua_State *L) {
  struct sockaddr_storage at = check_address(L, 1, 0);
  int flags = (lua_toboolean(L, 3) ? REUSE_ADDRESS : 0) | (lua_toboolean(L, 4) ? REUSE_PORT : 0) |
              (lua_toboolean(L, 5) ? ONLY_IPV6 : 0);
  lua_settop(L, 0);
  address_push(L, &at);
  struct udp *u = (struct udp *)handle_new(L, TAG_UDP, &class, sizeof *u, HOLDER_WAITERS);
  link_init(&u->receivers);
  link_init(&u->senders);
  u->fd = open_socket(&at, flags);
  u->family = at.ss_family;
  u->only_ipv6 = flags & ONLY_IPV6;
  u->length = -1;
  int status = u->fd < 0 ? u->fd : uv_poll_init(loop_uv(u->handle.rt), &u->poll, u->fd);
  if (status == 0) {
    handle_opened(&u->handle, (uv_handle_t *)&u->poll);
    return 1;
  }
  close_fd(u);
  io_push_error(L, status, "bind", lua_tostring(L, 1));
  return lua_error(L);
}

/* ---- receiving ---- */

static enum look look_receive(lua_State *L, int i, struct handle *h, struct request *r) {
  struct udp *u = as_udp(h);
  int top = lua_gettop(L);
  (void)i, (void)r;
  if (h->disposed) {
    handle_push_disposed(L, h);
    return LOOK_ERROR;
  }
  if (u->length < 0) {
    int status = u->status != 0 ? u->status : receive(u);
    u->status = 0;
    if (status == UV_EAGAIN) return LOOK_WAIT;
    if (status != 0) {
      io_push_error(L, status, "receive", NULL);
      return LOOK_ERROR;
    }
  }
  uint32_t serial = u->serial;
  struct sockaddr_storage from = u->from;
  lua_createtable(L, 2, 0);
  if (u->serial == serial) {
    lua_pushlstring(L, u->data, (size_t)u->length);
    lua_rawseti(L, -2, 1);
  }
  unmap(&from);
  if (address_push(L, &from)) lua_rawseti(L, -2, 2);
  if (u->serial == serial) return LOOK_VALUE;
  lua_settop(L, top); /* a finalizer has been here */
  return LOOK_AGAIN;
}

static void take_receive(lua_State *L, int i, struct handle *h, struct request *r) {
  (void)L, (void)i, (void)r;
  drop(as_udp(h));
}

/* who asks is not in the queue yet */
static bool wait_for(struct udp *u, int event) {
  poll_for(u, u->events | event);
  return u->status == 0;
}

static bool wait_receive(lua_State *L, struct handle *h, struct request *r) {
  (void)L, (void)r;
  return wait_for(as_udp(h), UV_READABLE);
}

static struct link *queue_receive(struct handle *h) { return &as_udp(h)->receivers; }

static const struct verb receive_verb = {"receive", look_receive, take_receive, wait_receive,
                                         queue_receive};

/* receive(socket, token) -> { data, address } */
static int l_receive(lua_State *L) {
  struct udp *u = check(L);
  struct request r = {.verb = &receive_verb};
  token_opt(L, 2);
  lua_settop(L, 2);
  return handle_ask(L, &u->handle, &r, 2, l_receive);
}

/* ---- sending ---- */

static enum look look_writable(lua_State *L, int i, struct handle *h, struct request *r) {
  struct udp *u = as_udp(h);
  int status = u->status;
  (void)i, (void)r;
  u->status = 0;
  if (h->disposed)
    handle_push_disposed(L, h);
  else if (status != 0)
    io_push_error(L, status, "send", NULL);
  else if (!u->writable)
    return LOOK_WAIT;
  else {
    lua_pushboolean(L, 1);
    return LOOK_VALUE;
  }
  return LOOK_ERROR;
}

static void take_writable(lua_State *L, int i, struct handle *h, struct request *r) {
  (void)L, (void)i, (void)r;
  as_udp(h)->writable = false; /* one at a time: libuv calls again */
}

static bool wait_writable(lua_State *L, struct handle *h, struct request *r) {
  (void)L, (void)r;
  return wait_for(as_udp(h), UV_WRITABLE);
}

static struct link *queue_writable(struct handle *h) { return &as_udp(h)->senders; }

static const struct verb writable_verb = {"send", look_writable, take_writable, wait_writable,
                                          queue_writable};

/* wait_writable(socket, token): the system's buffer may have room */
static int l_wait_writable(lua_State *L) {
  struct udp *u = check(L);
  struct request r = {.verb = &writable_verb};
  token_opt(L, 2);
  lua_settop(L, 2);
  return handle_ask(L, &u->handle, &r, 2, l_wait_writable);
}

/* try_send(socket, data, address or nil, port, token, again) -> whether it was sent; unless it is tried
** again, no one is overtaken who waits */
static int l_try_send(lua_State *L) {
  struct udp *u = check_open(L);
  size_t length;
  const char *data = luaL_checklstring(L, 2, &length);
  struct sockaddr_storage to;
  bool addressed = !lua_isnil(L, 3);
  if (addressed) to = check_address(L, 3, 1);
  operation_check_tokens(L, u->handle.rt, 5);
  int status = UV_EAGAIN;
  if (addressed) map(u, &to);
  if (lua_toboolean(L, 6) || !waiter_any(&u->senders))
    status = send_now(u, data, length, addressed ? &to : NULL);
  if (status != 0 && status != UV_EAGAIN) {
    if (addressed) unmap(&to);
    io_push_error(L, status, "send",
                  addressed && address_push(L, &to) ? lua_tostring(L, -1) : NULL);
    return lua_error(L);
  }
  lua_pushboolean(L, status == 0);
  return status == 0 ? handle_return(L, u->handle.rt, handle_cost(length)) : 1;
}

static void land(lua_State *L, struct handle *h, int i) {
  struct udp *u = as_udp(h);
  struct request receive = {.verb = &receive_verb}, send = {.verb = &writable_verb};
  if (h->disposed) return;
  if (waiter_any(&u->receivers)) handle_answer(L, i, h, &receive);
  if (waiter_any(&u->senders)) handle_answer(L, i, h, &send);
  u->writable = false;
  if (h->disposed || !(wanted(u) & ~u->events)) return;
  poll_for(u, u->events | wanted(u));
  if (u->status != 0) handle_news(h); /* those who wait are told: nothing else would come */
}

/* ---- the peer, options, closing ---- */

/* family(socket) -> of the addresses that it can send to */
static int l_family(lua_State *L) {
  const struct udp *u = check(L);
  lua_pushstring(L, u->family == AF_INET ? "ipv4" : u->only_ipv6 ? "ipv6" : "any");
  return 1;
}

/* connect(socket, address, port); without an address: no peer any more */
static int l_connect(lua_State *L) {
  struct udp *u = check_open(L);
  int status;
  if (lua_isnoneornil(L, 2))
    status = disconnect(u);
  else {
    struct sockaddr_storage to = check_address(L, 2, 1);
    map(u, &to);
    status = connect(u->fd, (struct sockaddr *)&to, address_length(&to)) == 0
                 ? 0
                 : uv_translate_sys_error(errno);
  }
  return status == 0 ? 0 : fail(L, status, "connect");
}

static int finish(lua_State *L, int status, const char *syscall) {
  return status == 0 ? 0 : fail(L, status, syscall);
}

/* broadcast(on): true by default */
static int l_broadcast(lua_State *L) {
  const struct udp *u = check_open(L);
  bool on = lua_isnone(L, 2) || lua_toboolean(L, 2);
  return finish(L, set(u, SOL_SOCKET, SO_BROADCAST, on), "broadcast");
}

static int check_hops(lua_State *L, int least) {
  lua_Integer n = luaL_checkinteger(L, 2);
  luaL_argcheck(L, n >= least && n <= 255, 2, "a number of hops up to 255 expected");
  return (int)n;
}

static int l_ttl(lua_State *L) {
  const struct udp *u = check_open(L);
  int n = check_hops(L, 1);
  bool v6 = u->family == AF_INET6;
  return finish(L, v6 ? set(u, IPPROTO_IPV6, IPV6_UNICAST_HOPS, n) : set(u, IPPROTO_IP, IP_TTL, n),
                "ttl");
}

static int l_multicast_ttl(lua_State *L) {
  const struct udp *u = check_open(L);
  int n = check_hops(L, 0);
  bool v6 = u->family == AF_INET6;
  return finish(L,
                v6 ? set(u, IPPROTO_IPV6, IPV6_MULTICAST_HOPS, n)
                   : set(u, IPPROTO_IP, IP_MULTICAST_TTL, n),
                "multicast_ttl");
}

/* multicast_loop(on): true by default */
static int l_multicast_loop(lua_State *L) {
  const struct udp *u = check_open(L);
  bool on = lua_isnone(L, 2) || lua_toboolean(L, 2);
  bool v6 = u->family == AF_INET6;
  return finish(L,
                v6 ? set(u, IPPROTO_IPV6, IPV6_MULTICAST_LOOP, on)
                   : set(u, IPPROTO_IP, IP_MULTICAST_LOOP, on),
                "multicast_loop");
}

/* [-0, +0, e] the index of the interface at i, by its name; nil: the system's choice */
static unsigned check_interface(lua_State *L, int i) {
  if (lua_isnoneornil(L, i)) return 0;
  unsigned index = if_nametoindex(luaL_checkstring(L, i));
  if (index == 0) fail(L, UV_ENODEV, "if_nametoindex");
  return index;
}

/* multicast_interface(name): by which datagrams for groups leave */
static int l_multicast_interface(lua_State *L) {
  const struct udp *u = check_open(L);
  struct ip_mreqn v4 = {.imr_ifindex = (int)check_interface(L, 2)};
  int status = 0;
  if (u->family == AF_INET6)
    status = set(u, IPPROTO_IPV6, IPV6_MULTICAST_IF, v4.imr_ifindex);
  else if (setsockopt(u->fd, IPPROTO_IP, IP_MULTICAST_IF, &v4, sizeof v4) != 0)
    status = uv_translate_sys_error(errno);
  return finish(L, status, "multicast_interface");
}

/* (group, interface) */
static int membership(lua_State *L, int v4_option, int v6_option, const char *syscall) {
  const struct udp *u = check_open(L);
  struct sockaddr_storage group;
  luaL_argcheck(L, address_parse(luaL_checkstring(L, 2), 0, &group), 2,
                "the numeric address of a group expected");
  unsigned interface = check_interface(L, 3);
  struct ip_mreqn v4 = {.imr_multiaddr = ((struct sockaddr_in *)(void *)&group)->sin_addr,
                        .imr_ifindex = (int)interface};
  struct ipv6_mreq v6 = {((struct sockaddr_in6 *)(void *)&group)->sin6_addr, interface};
  int failed = group.ss_family == AF_INET
                   ? setsockopt(u->fd, IPPROTO_IP, v4_option, &v4, sizeof v4)
                   : setsockopt(u->fd, IPPROTO_IPV6, v6_option, &v6, sizeof v6);
  return finish(L, failed ? uv_translate_sys_error(errno) : 0, syscall);
}

static int l_join(lua_State *L) {
  return membership(L, IP_ADD_MEMBERSHIP, IPV6_JOIN_GROUP, "join");
}

static int l_leave_group(lua_State *L) {
  return membership(L, IP_DROP_MEMBERSHIP, IPV6_LEAVE_GROUP, "leave");
}

/* close(): at once; who waits is told so. __close, too. */
static int l_close(lua_State *L) {
  struct udp *u = check(L);
  lua_settop(L, 1);
  if (u->handle.disposed) return 0;
  handle_push_code(L, "ECANCELED", "socket", "it was closed meanwhile");
  if (u->handle.disposed) return 0; /* by a finalizer */
  u->handle.disposed = true;
  lua_pushvalue(L, -1);
  handle_refuse(L, 1, &u->receivers);
  handle_refuse(L, 1, &u->senders);
  handle_changed(L, 1);
  return 0;
}

/* ---- properties ---- */

static bool address_of(const struct udp *u, bool peer, struct sockaddr_storage *a) {
  socklen_t n = sizeof *a;
  memset(a, 0, sizeof *a);
  if (u->handle.disposed || u->fd < 0) return false;
  return (peer ? getpeername(u->fd, (struct sockaddr *)a, &n)
               : getsockname(u->fd, (struct sockaddr *)a, &n)) == 0;
}

static int push_address(lua_State *L, bool peer) {
  struct sockaddr_storage a;
  if (!address_of(check(L), peer, &a)) return 0;
  unmap(&a);
  return address_push(L, &a);
}

static int l_local_address(lua_State *L) { return push_address(L, false); }
static int l_peer_address(lua_State *L) { return push_address(L, true); }

static int l_port(lua_State *L) {
  struct sockaddr_storage a;
  if (!address_of(check(L), false, &a)) return 0;
  lua_pushinteger(L, ntohs(*address_port(&a)));
  return 1;
}

static int l_is_closed(lua_State *L) {
  lua_pushboolean(L, check(L)->handle.disposed);
  return 1;
}

static int l_tostring(lua_State *L) {
  lua_pushfstring(L, "coflow.UdpSocket%s", check(L)->handle.disposed ? " (closed)" : "");
  return 1;
}

static const luaL_Reg methods[] = {{"broadcast", l_broadcast},
                                   {"ttl", l_ttl},
                                   {"multicast_ttl", l_multicast_ttl},
                                   {"multicast_loop", l_multicast_loop},
                                   {"multicast_interface", l_multicast_interface},
                                   {"join", l_join},
                                   {"leave", l_leave_group},
                                   {"close", l_close},
                                   {"dispose", l_close},
                                   {"__close", l_close},
                                   {"__gc", handle_gc},
                                   {"__tostring", l_tostring},
                                   {NULL, NULL}};
static const luaL_Reg properties[] = {{"port", l_port},
                                      {"local_address", l_local_address},
                                      {"peer_address", l_peer_address},
                                      {"is_closed", l_is_closed},
                                      {NULL, NULL}};
static const luaL_Reg of_sockets[] = {{"open", l_open},
                                      {"receive", l_receive},
                                      {"wait_writable", l_wait_writable},
                                      {"try_send", l_try_send},
                                      {"connect", l_connect},
                                      {"family", l_family},
                                      {NULL, NULL}};

/* open_udp() -> the functions that the sockets of coflow.net are made of; makes the class */
static int l_open_udp(lua_State *L) {
  module_class(L, TAG_UDP, "coflow.UdpSocket", methods, properties);
  lua_newtable(L);
  module_functions(L, of_sockets);
  return 1;
}

static const luaL_Reg functions[] = {{"open_udp", l_open_udp}, {NULL, NULL}};

const struct part udp_part = {functions, NULL, NULL};
