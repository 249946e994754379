/*
** full.c - a datagram socket whose buffer is soon full, for spec/udp_spec.lua, which builds it. On loopback a
** UDP socket's never is.
**
** SPDX-License-Identifier: MIT
*/
#include <fcntl.h>
#include <lauxlib.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

static int udp_port(int fd) {
  struct sockaddr_in a;
  socklen_t n = sizeof a;
  if (getsockname(fd, (struct sockaddr *)&a, &n) != 0 || a.sin_family != AF_INET) return -1;
  return ntohs(a.sin_port);
}

/* the first datagram, or nil; upvalue: the other end */
static int l_drain(lua_State *L) {
  char data[256];
  ssize_t n = recv((int)lua_tointeger(L, lua_upvalueindex(1)), data, sizeof data, MSG_DONTWAIT);
  if (n < 0) return 0;
  lua_pushlstring(L, data, (size_t)n);
  return 1;
}

static int l_done(lua_State *L) {
  close((int)lua_tointeger(L, lua_upvalueindex(1)));
  return 0;
}

/* swap(port) -> drain, done: the descriptor of the socket with that port is one end of a pair */
static int l_swap(lua_State *L) {
  int pair[2], port = (int)luaL_checkinteger(L, 1);
  if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) != 0)
    return luaL_error(L, "socketpair");
  for (int fd = 3; fd < 1000; fd++)
    if (udp_port(fd) == port) dup3(pair[0], fd, O_CLOEXEC);
  close(pair[0]);
  lua_pushinteger(L, pair[1]);
  lua_pushcclosure(L, l_drain, 1);
  lua_pushinteger(L, pair[1]);
  lua_pushcclosure(L, l_done, 1);
  return 2;
}

int luaopen_full(lua_State *L);
int luaopen_full(lua_State *L) {
  lua_pushcfunction(L, l_swap);
  return 1;
}
