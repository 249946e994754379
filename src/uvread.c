/*
** uvread.c - reading from streams.
**
** libuv reads into a slab that all streams share: between the callback and the landing the bytes lie
** there, and are made a string straight from it. What nobody takes then goes into a buffer of the
** stream, which exists only while it holds something; whoever asks for more than one read brings has
** the rest read straight into that. Reading begins when somebody first asks, and stops when nobody does
** and HIGH bytes are there: so a peer that sends without end costs HIGH bytes and one read. Bytes are
** taken out only when it is certain who gets them (handle.c), so a canceled read loses none.
**
** Invariants: `in` has memory only while it holds bytes; part.slab is NULL or counts us among its refs. What is
**             beyond `used` of the slab belongs to nobody: whoever reads next writes there.
** SPDX-License-Identifier: MIT
*/
#include "uvstream.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { SLAB = 65536, SLAB_LEAST = 8192, GROW_LEAST = 16384 };
#define LINE_MOST ((size_t)1 << 20)
#define ALL_MOST ((size_t)1 << 26)
#define UNLIMITED (SIZE_MAX / 4)

enum { ASK_SOME, ASK_EXACTLY, ASK_LINE, ASK_UNTIL, ASK_ALL_BYTES };

struct slab {
  uint32_t refs, used;
  char data[SLAB];
};

/* ---- libuv side: no Lua below this line until the Lua face ---- */

/* ---- the buffer of what was read ---- */

static size_t available(const struct stream *s) { return s->in.end - s->in.start + s->part.length; }

static void drop_part(struct stream *s) {
  struct slab *slab = s->part.slab;
  if (slab == NULL) return;
  s->part.slab = NULL;
  s->part.length = 0;
  if (--slab->refs > 0) return;
  if (slab == s->handle.rt->slab)
    slab->used = 0;
  else
    free(slab);
}

static void drop_in(struct stream *s) {
  free(s->in.base);
  s->in.base = NULL;
  s->in.start = s->in.end = s->in.size = 0;
}

/* room for n bytes behind those that are there */
static bool reserve(struct stream *s, size_t n) {
  size_t used = s->in.end - s->in.start;
  if (s->in.size - s->in.end >= n) return true;
  if (s->in.start > 0 && s->in.size - used >= n && s->in.start >= used) { /* move them down */
    memmove(s->in.base, s->in.base + s->in.start, used);
  } else {
    size_t size = s->in.size * 2 > used + n ? s->in.size * 2 : used + n;
    char *base = malloc(size);
    if (base == NULL) return false;
    if (used > 0) memcpy(base, s->in.base + s->in.start, used);
    free(s->in.base);
    s->in.base = base;
    s->in.size = size;
  }
  s->in.start = 0;
  s->in.end = used;
  return true;
}

/* what lies in the slab moves into the buffer */
static bool gather(struct stream *s) {
  if (s->part.length == 0) return true;
  if (!reserve(s, s->part.length)) return false;
  memcpy(s->in.base + s->in.end, s->part.base, s->part.length);
  s->in.end += s->part.length;
  drop_part(s);
  return true;
}

void read_drop(struct stream *s) {
  drop_in(s);
  drop_part(s);
}

/* n bytes have been taken, or are not wanted */
static void consume(struct stream *s, size_t n) {
  size_t first = s->in.end - s->in.start < n ? s->in.end - s->in.start : n;
  if (n == 0) return;
  s->epoch++;
  s->in.start += first;
  s->part.base += n - first;
  s->part.length -= n - first;
  if (s->in.start == s->in.end) drop_in(s);
  if (s->part.length == 0) drop_part(s);
}

/* all that is there, in one piece; false: no memory */
static bool look_at(struct stream *s, const char **base) {
  if (s->in.end == s->in.start) {
    *base = s->part.base;
    return true;
  }
  if (!gather(s)) return false;
  *base = s->in.base + s->in.start;
  return true;
}

/* ---- reading ---- */

void read_stop(struct stream *s) {
  if (s->reading && s->handle.uv != NULL && !s->handle.closing) {
    if (s->kind == STREAM_FD)
      fd_read_stop(s);
    else
      uv_read_stop(&s->uv.stream);
  }
  s->reading = false;
}

static void on_alloc(uv_handle_t *uv, size_t suggested, uv_buf_t *buf) {
  struct stream *s = of_uv(uv);
  struct runtime *rt = s->handle.rt;
  (void)suggested;
  *buf = uv_buf_init(NULL, 0);
  if (s->in.end > s->in.start) { /* more for whoever wants more than has come */
    size_t missing =
        waiter_any(&s->readers) && s->ask.size < UNLIMITED && s->ask.size > available(s)
            ? s->ask.size - available(s)
            : 0;
    if (missing > HIGH) missing = HIGH;
    if (!gather(s) || !reserve(s, missing > GROW_LEAST ? missing : GROW_LEAST)) return;
    *buf = uv_buf_init(s->in.base + s->in.end, (unsigned)(s->in.size - s->in.end));
    return;
  }
  if (rt->slab == NULL || SLAB - rt->slab->used < SLAB_LEAST) {
    struct slab *slab = malloc(sizeof *slab);
    if (slab == NULL) return;
    slab->refs = slab->used = 0; /* the old one lives by its refs */
    rt->slab = slab;
  }
  *buf = uv_buf_init(rt->slab->data + rt->slab->used, SLAB - rt->slab->used);
}

/* n bytes of the slab are ours */
static void take_part(struct stream *s, const char *base, size_t n) {
  struct slab *slab = s->handle.rt->slab;
  slab->used += (uint32_t)n;
  if (s->part.slab == slab && s->part.base + s->part.length == base) {
    s->part.length += n;
    return;
  }
  slab->refs++; /* first: else it begins anew, over these bytes, when the part before them is gathered */
  if (!gather(s)) {
    slab->used -= (uint32_t)n;
    slab->refs--;
    s->read_status = UV_ENOMEM;
    return;
  }
  s->part.slab = slab;
  s->part.base = base;
  s->part.length = n;
}

static void on_read(uv_stream_t *uv, ssize_t n, const uv_buf_t *buf);

static int start_reading(struct stream *s) {
  return s->kind == STREAM_FD ? fd_read(s) : uv_read_start(&s->uv.stream, on_alloc, on_read);
}

/* libuv says that this is the end. It also does so where the system has said no more than that the
** connection is gone (POLLHUP after a read that brought less than it could): the end, or its error, or
** even bytes, are still to be read. 0: these. */
static int end_of(const struct stream *s) {
  uv_os_fd_t fd;
  char byte;
  if (s->write_status == UV_ECONNRESET) return UV_ECONNRESET; /* told once, to who wrote */
  if (uv_fileno(s->handle.uv, &fd) != 0) return UV_EOF;
  ssize_t n;
  do n = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  while (n < 0 && errno == EINTR);
  if (n > 0) return 0;
  if (n == 0 || errno == ENOTSOCK || errno == EAGAIN || errno == EWOULDBLOCK) return UV_EOF;
  return uv_translate_sys_error(errno);
}

static void on_read(uv_stream_t *uv, ssize_t n, const uv_buf_t *buf) {
  struct stream *s = of_uv(uv);
  if (n == 0) return;
  if (n == UV_EOF && (n = end_of(s)) == 0 && (n = start_reading(s)) == 0) return;
  if (n < 0)
    s->read_status = n == UV_ENOBUFS ? UV_ENOMEM : (int)n;
  else if (s->in.end > s->in.start)
    s->in.end += (size_t)n;
  else
    take_part(s, buf->base, (size_t)n);
  if (s->read_status != 0) read_stop(s);
  if (waiter_any(&s->readers)) {
    size_t wanted = s->ask.what == ASK_SOME ? 3 * HIGH : s->ask.size; /* libuv reads on and on */
    if (available(s) > wanted && available(s) - wanted >= HIGH) read_stop(s);
    handle_news(&s->handle);
    return;
  }
  if (!gather(s)) s->read_status = UV_ENOMEM; /* what is in the slab stays until somebody asks */
  if (available(s) >= HIGH) read_stop(s);
}

void read_came(struct stream *s, char *base, size_t n, size_t size, int status) {
  s->reading = false; /* whoever wants more asks again */
  if (n > 0 && available(s) == 0) {
    read_drop(s);
    s->in.base = base;
    s->in.end = n;
    s->in.size = size;
  } else {
    if (n > 0 && gather(s) && reserve(s, n)) {
      memcpy(s->in.base + s->in.end, base, n);
      s->in.end += n;
    } else if (n > 0)
      status = UV_ENOMEM;
    free(base);
  }
  if (status != 0) s->read_status = status;
  if (waiter_any(&s->readers)) handle_news(&s->handle);
}

/* ---- Lua face ---- */

enum finding { FOUND, MISSING, AT_END, CUT, TOO_LONG, FAILED };

/* where the delimiter begins, or -1; what was searched before is not searched again */
static ptrdiff_t search(struct request *r, const char *base, size_t n, const char *delimiter,
                        size_t length) {
  size_t from = r->seen > length - 1 ? r->seen - (length - 1) : 0;
  if (from > n) from = 0;
  const char *at = length == 1 ? memchr(base + from, *delimiter, n - from)
                               : memmem(base + from, n - from, delimiter, length);
  r->seen = n;
  return at == NULL ? -1 : at - base;
}

/* r->found bytes are the answer, r->skip behind them go with it */
static enum finding find(struct stream *s, struct request *r, const char *base,
                         const char *delimiter, size_t length) {
  size_t n = available(s);
  r->skip = 0;
  if (r->what == ASK_SOME && n > 0) {
    r->found = n < r->size ? n : r->size;
    return FOUND;
  }
  if (r->what == ASK_EXACTLY && n >= r->size) {
    r->found = r->size;
    return FOUND;
  }
  if (r->what == ASK_ALL_BYTES) {
    if (n > r->size) return TOO_LONG;
    r->found = n;
    if (s->read_status == UV_EOF) return FOUND;
  }
  if (length > 0 && n > 0) {
    ptrdiff_t at = search(r, base, n, delimiter, length);
    if (at >= 0) {
      r->found = (size_t)at;
      r->skip = length;
      if (r->what == ASK_LINE && at > 0 && base[at - 1] == '\r') {
        r->found--;
        r->skip++;
      }
      if (r->found <= r->size) return FOUND;
      r->seen = 0;
      return TOO_LONG;
    }
    if (n > r->size + length) {
      r->seen = 0;
      return TOO_LONG;
    }
  }
  if (s->read_status == 0) return MISSING;
  if (s->read_status != UV_EOF) return FAILED;
  if (n == 0) return AT_END;
  if (r->what != ASK_LINE) return CUT;
  r->found = n; /* the last line has no end */
  if (n <= r->size) return FOUND;
  return TOO_LONG;
}

static enum look look_read(lua_State *L, int i, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  const char *base = NULL, *delimiter = r->what == ASK_LINE ? "\n" : NULL;
  size_t length = r->what == ASK_LINE;
  int top = lua_gettop(L);
  if (stream_push_hindrance(L, s, r, &s->readers)) return LOOK_ERROR;
  if (r->what == ASK_UNTIL) {
    if (r->data != 0)
      lua_pushvalue(L, r->data);
    else
      lua_getiuservalue(L, i, STREAM_DELIMITER);
    delimiter = lua_tolstring(L, -1, &length);
  }
  if (!look_at(s, &base)) return luaL_error(L, "not enough memory");
  enum finding f = find(s, r, base, delimiter, length);
  uint32_t epoch = s->epoch;
  const char *name = r->verb->name;
  switch (f) {
    case MISSING: lua_settop(L, top); return LOOK_WAIT;
    case FOUND: lua_pushlstring(L, r->found ? base : "", r->found); break;
    case AT_END:
      r->found = 0;
      lua_pushnil(L);
      break;
    case CUT:
      handle_push_code(L, "EOF", name, "the stream ended after %I bytes of what was asked for",
                       (LUAI_UACINT)available(s));
      break;
    case TOO_LONG:
      handle_push_code(L, "EMSGSIZE", name, "more than the option max allows (%I bytes)",
                       (LUAI_UACINT)r->size);
      break;
    default: io_push_error(L, s->read_status, name, NULL);
  }
  if (r->what == ASK_UNTIL) lua_remove(L, top + 1);
  if (s->epoch != epoch) { /* a finalizer has been here */
    r->seen = 0;
    lua_settop(L, top);
    return LOOK_AGAIN;
  }
  return f == FOUND || f == AT_END ? LOOK_VALUE : LOOK_ERROR;
}

static void take_read(lua_State *L, int i, struct handle *h, struct request *r) {
  (void)L, (void)i;
  consume(as_stream(h), r->found + r->skip);
  r->seen = 0;
}

static bool wait_read(lua_State *L, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  if (!gather(s)) s->read_status = UV_ENOMEM; /* what is kept is not kept in the slab */
  if (!s->reading && s->read_status == 0) {
    int status = start_reading(s);
    if (status == 0)
      s->reading = true;
    else
      s->read_status = status;
  }
  if (s->read_status != 0) return false;
  if (is_new(s, r)) {
    if (r->what == ASK_UNTIL) {
      lua_pushvalue(L, r->data);
      lua_setiuservalue(L, 1, STREAM_DELIMITER);
    }
    s->ask = *r;
    s->ask.data = 0;
  }
  return true;
}

static struct link *queue_read(struct handle *h) { return &as_stream(h)->readers; }

#define READ_VERB(name)                                                                            \
  { name, look_read, take_read, wait_read, queue_read }
static const struct verb read_verbs[] = {READ_VERB("read"), READ_VERB("read_exactly"),
                                         READ_VERB("read_line"), READ_VERB("read_until"),
                                         READ_VERB("read_all")};

/* [-0, +0, v] a number of bytes */
static size_t check_size(lua_State *L, int i, lua_Integer least, size_t otherwise) {
  if (otherwise != 0 && lua_isnoneornil(L, i)) return otherwise;
  if (otherwise != 0 && lua_type(L, i) == LUA_TNUMBER && lua_tonumber(L, i) == HUGE_VAL)
    return UNLIMITED;
  lua_Integer n = luaL_checkinteger(L, i);
  luaL_argcheck(L, n >= least, i, least > 0 ? "must be positive" : "must not be negative");
  return (size_t)n < UNLIMITED ? (size_t)n : UNLIMITED;
}

static int read_any(lua_State *L, int what, lua_CFunction f) {
  struct stream *s = stream_check(L);
  struct request r = {.verb = &read_verbs[what], .what = what};
  int k = what == ASK_UNTIL ? 4 : 3;
  if (what != ASK_EXACTLY) io_token_last(L, k - 1);
  switch (what) {
    case ASK_SOME: r.size = check_size(L, 2, 1, UNLIMITED); break;
    case ASK_EXACTLY: r.size = check_size(L, 2, 0, 0); break;
    case ASK_LINE: r.size = check_size(L, 2, 1, LINE_MOST); break;
    case ASK_ALL_BYTES: r.size = check_size(L, 2, 1, ALL_MOST); break;
    default:
      luaL_checktype(L, 2, LUA_TSTRING);
      luaL_argcheck(L, lua_rawlen(L, 2) > 0, 2, "a delimiter is not empty");
      r.data = 2;
      r.size = check_size(L, 3, 1, LINE_MOST);
  }
  token_opt(L, k);
  lua_settop(L, k);
  return f != NULL ? handle_ask(L, &s->handle, &r, k, f) : handle_ask_async(L, &s->handle, &r, k);
}

/* Mostly nothing is there, and somebody waits: the same as read_any, without what others need. */
static int l_read(lua_State *L) {
  struct stream *s = (struct stream *)object_test(L, 1, TAG_STREAM);
  if (s == NULL || lua_gettop(L) != 1 || !s->reading || s->broken || s->handle.disposed ||
      available(s) > 0 || waiter_any(&s->readers))
    return read_any(L, ASK_SOME, l_read);
  struct runtime *rt = s->handle.rt;
  struct fiber *me = (struct fiber *)rt->me;
  if (me->co != L || me->member.scope->canceled || rt->me == rt->outside || !lua_isyieldable(L))
    return read_any(L, ASK_SOME, l_read);
  s->ask.verb = &read_verbs[ASK_SOME];
  s->ask.what = ASK_SOME;
  s->ask.data = 0;
  s->ask.size = UNLIMITED;
  lua_pushnil(L);
  return handle_wait(L, &s->handle, &s->readers, false);
}

static int l_read_exactly(lua_State *L) { return read_any(L, ASK_EXACTLY, l_read_exactly); }
static int l_read_line(lua_State *L) { return read_any(L, ASK_LINE, l_read_line); }
static int l_read_until(lua_State *L) { return read_any(L, ASK_UNTIL, l_read_until); }
static int l_read_all(lua_State *L) { return read_any(L, ASK_ALL_BYTES, l_read_all); }
static int l_read_async(lua_State *L) { return read_any(L, ASK_SOME, NULL); }
static int l_read_exactly_async(lua_State *L) { return read_any(L, ASK_EXACTLY, NULL); }
static int l_read_line_async(lua_State *L) { return read_any(L, ASK_LINE, NULL); }
static int l_read_until_async(lua_State *L) { return read_any(L, ASK_UNTIL, NULL); }
static int l_read_all_async(lua_State *L) { return read_any(L, ASK_ALL_BYTES, NULL); }

/* [-0, +0, m] a plain read gets what has come: the same as handle_answer, in one go */
static void answer_some(lua_State *L, int i, struct stream *s) {
  const char *base;
  uint32_t epoch = s->epoch;
  size_t n = available(s) < s->ask.size ? available(s) : s->ask.size;
  if (n == 0 || s->broken || s->handle.disposed || !look_at(s, &base)) return;
  lua_pushlstring(L, base, n);
  if (s->epoch == epoch) {           /* and so the one who waits is still there */
    s->handle.holder.handle = false; /* handle_land is about to look for itself */
    struct nap *who = waiter_take(L, i, &s->handle.holder, &s->readers);
    s->handle.holder.handle = true;
    if (who != NULL) {
      lua_insert(L, -2);
      consume(s, n);
      waiter_grant(L, s->handle.rt, who);
      return;
    }
  }
  lua_pop(L, 1);
}

void read_answer(lua_State *L, int i, struct stream *s) {
  if (waiter_any(&s->readers) && s->ask.what == ASK_SOME) answer_some(L, i, s);
  if (waiter_any(&s->readers)) handle_answer(L, i, &s->handle, &s->ask);
  if (s->part.length > 0 && !gather(s)) s->read_status = UV_ENOMEM;
}

void read_free(struct runtime *rt) {
  free(rt->slab);
  rt->slab = NULL;
}

const luaL_Reg read_methods[] = {{"read", l_read},
                                 {"read_async", l_read_async},
                                 {"read_exactly", l_read_exactly},
                                 {"read_exactly_async", l_read_exactly_async},
                                 {"read_line", l_read_line},
                                 {"read_line_async", l_read_line_async},
                                 {"read_until", l_read_until},
                                 {"read_until_async", l_read_until_async},
                                 {"read_all", l_read_all},
                                 {"read_all_async", l_read_all_async},
                                 {NULL, NULL}};
