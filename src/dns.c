/*
** dns.c - names to addresses and back, by the system's resolver, in a thread of libuv's pool.
**
** libuv lets lookups have half of its threads at most, so that slow name servers never stop file
** operations. A lookup that has begun cannot be stopped: its answer is dropped.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <netdb.h>
#include <string.h>

enum { LOOKUP_HOST = IO_PATH }; /* user value: what errors are about */

struct resolve {
  struct io io;
  uv_getaddrinfo_t req;
  struct addrinfo *found;
};

struct reverse {
  struct io io;
  uv_getnameinfo_t req;
};

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static struct resolve *as_resolve(struct io *op) { return (struct resolve *)(void *)op; }
static struct reverse *as_reverse(struct io *op) { return (struct reverse *)(void *)op; }

static void on_resolve(uv_getaddrinfo_t *req, int status, struct addrinfo *found) {
  struct resolve *r = container_of(req, struct resolve, req);
  r->found = found;
  io_done(&r->io, status);
}

static void on_reverse(uv_getnameinfo_t *req, int status, const char *host, const char *service) {
  (void)host, (void)service;
  io_done(&container_of(req, struct reverse, req)->io, status);
}

static void resolve_abort(struct io *op) { uv_cancel((uv_req_t *)&as_resolve(op)->req); }
static void reverse_abort(struct io *op) { uv_cancel((uv_req_t *)&as_reverse(op)->req); }

static void resolve_release(struct io *op) {
  uv_freeaddrinfo(as_resolve(op)->found);
  as_resolve(op)->found = NULL;
}

/* ---- Lua face ---- */

static void fail(lua_State *L, struct io *op) {
  lua_getiuservalue(L, 1, LOOKUP_HOST);
  io_push_error(L, (int)op->status, op->class->syscall, lua_tostring(L, -1));
  lua_pushnil(L);
  lua_setfield(L, -2, "path");
  lua_pushvalue(L, -2);
  lua_setfield(L, -2, "host");
}

static int resolve_land(lua_State *L, struct io *op) {
  lua_newtable(L); /* list */
  lua_newtable(L); /* list seen */
  lua_Integer n = 0;
  for (const struct addrinfo *a = as_resolve(op)->found; a != NULL; a = a->ai_next) {
    char text[ADDRESS_SIZE];
    bool named =
        a->ai_family == AF_INET
            ? uv_ip4_name((const struct sockaddr_in *)(void *)a->ai_addr, text, sizeof text) == 0
            : a->ai_family == AF_INET6 &&
                  address_name6((const struct sockaddr_in6 *)(void *)a->ai_addr, text);
    if (!named) continue;
    lua_pushstring(L, text);
    lua_pushvalue(L, -1);
    if (lua_rawget(L, -3) != LUA_TNIL) { /* once for each sort of socket */
      lua_pop(L, 2);
      continue;
    }
    lua_pop(L, 1);
    lua_pushvalue(L, -1);
    lua_rawseti(L, -4, ++n);
    lua_pushboolean(L, 1);
    lua_rawset(L, -3);
  }
  lua_pop(L, 1);
  return 1;
}

static int reverse_land(lua_State *L, struct io *op) {
  lua_pushstring(L, as_reverse(op)->req.host);
  return 1;
}

static const struct io_class resolve_class = {"dns.resolve", "getaddrinfo",   resolve_land,
                                              resolve_abort, resolve_release, fail};
static const struct io_class reverse_class = {"dns.reverse", "getnameinfo", reverse_land,
                                              reverse_abort, NULL,          fail};

static const char *check_host(lua_State *L, int i) {
  size_t n;
  luaL_checktype(L, i, LUA_TSTRING);
  const char *host = lua_tolstring(L, i, &n);
  luaL_argcheck(L, n > 0 && memchr(host, '\0', n) == NULL, i,
                n == 0 ? "a name is not empty" : "a name has no zero bytes");
  return host;
}

/* [-0, +0, v] the family in the options at i */
static int check_family(lua_State *L, int i) {
  static const char *const options[] = {"family", NULL};
  static const char *const names[] = {"any", "ipv4", "ipv6"};
  static const int families[] = {AF_UNSPEC, AF_INET, AF_INET6};
  if (lua_isnoneornil(L, i)) return AF_UNSPEC;
  module_check_options(L, i, options);
  int family = -1;
  switch (lua_getfield(L, i, "family")) {
    case LUA_TNIL: family = AF_UNSPEC; break;
    case LUA_TNUMBER:
      family = lua_tonumber(L, -1) == 4 ? AF_INET : lua_tonumber(L, -1) == 6 ? AF_INET6 : -1;
      break;
    case LUA_TSTRING:
      for (int n = 0; n < 3; n++)
        if (strcmp(lua_tostring(L, -1), names[n]) == 0) family = families[n];
  }
  lua_pop(L, 1);
  return family >= 0 ? family : luaL_argerror(L, i, "family must be \"ipv4\", \"ipv6\" or \"any\"");
}

/* resolve(host, options, token) */
static int l_resolve(lua_State *L) {
  const char *host = check_host(L, 1);
  io_token_last(L, 2);
  struct addrinfo hints = {.ai_family = check_family(L, 2), .ai_socktype = SOCK_STREAM};
  token_opt(L, 3);
  lua_settop(L, 3);
  struct resolve *r =
      (struct resolve *)(void *)io_begin(L, 3, &resolve_class, sizeof *r, LOOKUP_HOST);
  if (r == NULL) return 1;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, LOOKUP_HOST);
  return io_started(L, &r->io,
                    uv_getaddrinfo(loop_uv(r->io.rt), &r->req, on_resolve, host, NULL, &hints));
}

/* reverse(address, token) */
static int l_reverse(lua_State *L) {
  const char *address = check_host(L, 1);
  union {
    struct sockaddr any;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
  } to;
  memset(&to, 0, sizeof to);
  luaL_argcheck(L, uv_ip4_addr(address, 0, &to.v4) == 0 || uv_ip6_addr(address, 0, &to.v6) == 0, 1,
                "a numeric address expected");
  token_opt(L, 2);
  lua_settop(L, 2);
  struct reverse *r =
      (struct reverse *)(void *)io_begin(L, 2, &reverse_class, sizeof *r, LOOKUP_HOST);
  if (r == NULL) return 1;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, LOOKUP_HOST);
  return io_started(L, &r->io,
                    uv_getnameinfo(loop_uv(r->io.rt), &r->req, on_reverse, &to.any, NI_NAMEREQD));
}

static const luaL_Reg operations[] = {{"resolve", l_resolve}, {"reverse", l_reverse}, {NULL, NULL}};

/* open_dns() -> the functions of coflow.dns */
static int l_open_dns(lua_State *L) {
  lua_newtable(L);
  io_functions(L, operations);
  return 1;
}

static const luaL_Reg functions[] = {{"open_dns", l_open_dns}, {NULL, NULL}};

const struct part dns_part = {functions, io_open, NULL};
