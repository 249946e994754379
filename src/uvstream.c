/*
** uvstream.c - streams of bytes: reading, writing, closing; shared by TCP and pipes.
**
** Reading. libuv reads into a slab that all streams share: between the callback and the landing the bytes lie
** there, and are made a string straight from it. What nobody takes then goes into a buffer of the stream,
** which exists only while it holds something; whoever asks for more than one read brings has the rest read
** straight into that. Reading begins when somebody first asks, and stops when nobody does and HIGH bytes are
** there: so a peer that sends without end costs HIGH bytes and one read. Bytes are taken out only when it is
** certain who gets them (handle.c), so a canceled read loses none.
**
** Writing. What the system takes at once never leaves the caller's stack. The rest is a queue of pieces: short
** strings lie together in blocks, long ones are held, not copied. libuv has at most one request at a time,
** of up to BUFFERS pieces, so what is written meanwhile goes out together. A write returns when no more than
** HIGH bytes are waiting; else it suspends until only LOW are.
**
**     written before │ the write that suspends
**     ───────────────┼────────────────────────
**        sent  given │ …                          given: to libuv, which cannot take it back
**
** Canceled, it is taken out of the queue if nothing of it was given; if something was, what the peer would get
** is cut somewhere in the middle, so the stream is broken: closed at once, and all that is asked of it
** later is refused.
**
** Closing: a script's `close` makes the stream unusable for everybody, and waits for the queue; who is still
** reading or writing is told so (ECANCELED). With nobody waiting for the queue any more, canceled or not, the
** handle is closed.
**
** Invariants: `in` has memory only while it holds bytes; part.slab is NULL or counts us among its refs.
**             queued == sum of the pieces' lengths; flight == NULL or its bytes are the first of the queue.
**             writing: exactly while a write is suspended, the last bytes of the queue being its own.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { STREAM_DELIMITER = HOLDER_WAITERS + 1, STREAM_STRINGS };
enum { SLAB = 65536, SLAB_LEAST = 8192, GROW_LEAST = 16384 };
enum { HIGH = 65536, LOW = 16384 };
enum { SHORT = 4096, BLOCK = 16384, BUFFERS = 16, ON_STACK = 16 };
#define FLIGHT_MOST ((size_t)1 << 18)
#define LINE_MOST ((size_t)1 << 20)
#define ALL_MOST ((size_t)1 << 26)
#define UNLIMITED (SIZE_MAX / 4)

enum { ASK_SOME, ASK_EXACTLY, ASK_LINE, ASK_UNTIL, ASK_ALL_BYTES };

struct slab {
  uint32_t refs, used;
  char data[SLAB];
};

struct piece {
  struct piece *next;
  const char *base;
  size_t length;
  int slot;      /* of the string, in STREAM_STRINGS; 0: the bytes lie behind */
  uint32_t room; /* … of which this many are not used yet */
  char own[];
};

struct flight {
  uv_write_t req;
  struct stream *stream;
  size_t size;
};

struct stream {
  struct handle handle;
  struct link readers, writers, flushers, closers;
  /* reading */
  struct request ask; /* of who waits */
  struct {
    char *base;
    size_t start, end, size;
  } in;
  struct {
    struct slab *slab;
    const char *base;
    size_t length;
  } part;          /* follows what is in `in` */
  int read_status; /* the end, or the error, that comes after these */
  uint32_t epoch;  /* changes whenever bytes are taken, or who waits changes */
  bool reading, awaited;
  /* writing */
  struct piece *first, *last, *done; /* done: their strings are to be forgotten */
  struct flight *flight;
  size_t queued, write_size;
  uint64_t sent, write_from; /* counted from the beginning of the stream */
  int64_t written;           /* of the write that was cut short last */
  int write_status, free_slot;
  bool writing, broken, shut, ended;
  bool was_cut; /* by the last change of who waits */
  bool lingers; /* `close` is about to wait for the queue */
  uint8_t kind;
  union {
    uv_stream_t stream;
    uv_tcp_t tcp;
    uv_pipe_t pipe;
  } uv;
};

static struct stream *as_stream(struct handle *h) { return (struct stream *)(void *)h; }
static struct stream *of_uv(void *uv) { return container_of(uv, struct stream, uv); }

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

static void stop_reading(struct stream *s) {
  if (s->reading && s->handle.uv != NULL && !s->handle.closing) uv_read_stop(&s->uv.stream);
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
  if (s->part.slab != NULL && (s->part.slab != slab || s->part.base + s->part.length != base) &&
      !gather(s)) {
    s->read_status = UV_ENOMEM;
    return;
  }
  slab->used += (uint32_t)n;
  if (s->part.slab != NULL) {
    s->part.length += n;
    return;
  }
  slab->refs++;
  s->part.slab = slab;
  s->part.base = base;
  s->part.length = n;
}

static void on_read(uv_stream_t *uv, ssize_t n, const uv_buf_t *buf) {
  struct stream *s = of_uv(uv);
  if (n == 0) return;
  if (n < 0)
    s->read_status = n == UV_ENOBUFS ? UV_ENOMEM : (int)n;
  else if (s->in.end > s->in.start)
    s->in.end += (size_t)n;
  else
    take_part(s, buf->base, (size_t)n);
  if (s->read_status != 0) stop_reading(s);
  if (waiter_any(&s->readers)) {
    size_t wanted = s->ask.what == ASK_SOME ? 3 * HIGH : s->ask.size; /* libuv reads on and on */
    if (available(s) > wanted && available(s) - wanted >= HIGH) stop_reading(s);
    handle_news(&s->handle);
    return;
  }
  if (!gather(s)) s->read_status = UV_ENOMEM; /* what is in the slab stays until somebody asks */
  if (available(s) >= HIGH) stop_reading(s);
}

/* ---- writing ---- */

static void drop_piece(struct stream *s) {
  struct piece *p = s->first;
  s->first = p->next;
  if (s->first == NULL) s->last = NULL;
  s->queued -= p->length;
  if (p->slot == 0) {
    free(p);
    return;
  }
  p->next = s->done;
  s->done = p;
}

static void drop_queue(struct stream *s) {
  while (s->first != NULL) drop_piece(s);
}

static void was_sent(struct stream *s, size_t n) {
  s->sent += n;
  while (n > 0 && s->first->length <= n) {
    n -= s->first->length;
    drop_piece(s);
  }
  if (n > 0) {
    s->first->base += n;
    s->first->length -= n;
    s->queued -= n;
  }
}

static void end_writing(struct stream *s) {
  uv_os_fd_t fd;
  if (!s->shut || s->ended || s->queued > 0 || s->handle.uv == NULL || s->handle.closing) return;
  s->ended = true;
  if (uv_fileno(s->handle.uv, &fd) == 0 && shutdown(fd, SHUT_WR) != 0 && errno != ENOTCONN)
    s->write_status = uv_translate_sys_error(errno);
}

static void on_write(uv_write_t *req, int status);

/* gives libuv what is first in the queue */
static void send_more(struct stream *s) {
  uv_buf_t buffers[BUFFERS];
  unsigned n = 0;
  size_t size = 0;
  if (s->flight != NULL || s->first == NULL || s->handle.closing) return;
  for (struct piece *p = s->first; p != NULL && n < BUFFERS && size < FLIGHT_MOST; p = p->next) {
    size_t length = p->length < FLIGHT_MOST - size ? p->length : FLIGHT_MOST - size;
    buffers[n++] = uv_buf_init((char *)p->base, (unsigned)length);
    size += length;
  }
  struct flight *f = malloc(sizeof *f);
  int status = UV_ENOMEM;
  if (f != NULL) {
    f->stream = s;
    f->size = size;
    s->flight = f;
    status = uv_write(&f->req, &s->uv.stream, buffers, n, on_write);
  }
  if (status == 0) {
    s->handle.rt->patient++;
    return;
  }
  free(f);
  s->flight = NULL;
  s->write_status = status;
  drop_queue(s);
}

static void on_write(uv_write_t *req, int status) {
  struct flight *f = container_of(req, struct flight, req);
  struct stream *s = f->stream;
  s->flight = NULL;
  s->handle.rt->patient--;
  if (status == 0)
    was_sent(s, f->size);
  else {
    if (s->write_status == 0) s->write_status = status;
    drop_queue(s);
  }
  free(f);
  send_more(s);
  end_writing(s);
  handle_news(&s->handle);
}

/* what was put into the queue beyond the first n bytes leaves it; none of it has been given to libuv */
static void truncate_queue(struct stream *s, size_t n) {
  struct piece *p = s->first, *rest;
  s->queued = n;
  if (n == 0) {
    rest = s->first;
    s->first = s->last = NULL;
  } else {
    for (; p->length < n; p = p->next) n -= p->length;
    rest = p->next;
    p->length = n;
    p->room = 0;
    p->next = NULL;
    s->last = p;
  }
  for (struct piece *next; rest != NULL; rest = next) {
    next = rest->next;
    if (rest->slot == 0)
      free(rest);
    else {
      rest->next = s->done;
      s->done = rest;
    }
  }
}

/* the suspended write is canceled, or its stream is being closed */
static void cut(struct stream *s) {
  size_t size = s->flight != NULL ? s->flight->size : 0;
  uint64_t given = s->sent + size, sent = given;
  if (size > 0) sent -= uv_stream_get_write_queue_size(&s->uv.stream);
  s->writing = false;
  s->was_cut = true;
  s->written = sent > s->write_from ? (int64_t)(sent - s->write_from) : 0;
  if (sent >= s->write_from + s->write_size) return; /* all was sent, and nobody knew yet */
  if (given <= s->write_from) {
    truncate_queue(s, (size_t)(s->write_from - s->sent));
    end_writing(s);
    return;
  }
  s->broken = true;
  handle_close(&s->handle);
  handle_news(&s->handle);
}

/* ---- life ---- */

static void on_close(uv_handle_t *uv) {
  struct stream *s = of_uv(uv);
  drop_queue(s);
  for (struct piece *p; (p = s->done) != NULL; free(p)) s->done = p->next;
  drop_in(s);
  drop_part(s);
  handle_closed(&s->handle);
}

static bool changed(struct handle *h) {
  struct stream *s = as_stream(h);
  s->epoch++;
  s->was_cut = false;
  if (s->writing && !waiter_any(&s->writers)) cut(s);
  if (h->disposed && !s->lingers && !waiter_any(&s->closers)) handle_close(h);
  bool reads = waiter_any(&s->readers);
  if (reads != s->awaited && h->uv != NULL && !h->closing) {
    s->awaited = reads;
    if (reads)
      uv_ref(h->uv);
    else
      uv_unref(h->uv);
  }
  return reads || waiter_any(&s->writers) || waiter_any(&s->flushers) || waiter_any(&s->closers) ||
         s->flight != NULL || s->done != NULL;
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
  struct runtime *rt = s->handle.rt;
  int status = s->kind == STREAM_TCP ? uv_tcp_init(loop_uv(rt), &s->uv.tcp)
                                     : uv_pipe_init(loop_uv(rt), &s->uv.pipe, 0);
  if (status == 0) handle_opened(&s->handle, (uv_handle_t *)&s->uv);
  return status;
}

int stream_adopt(struct stream *s, int fd) {
  int status = stream_init(s);
  if (status == 0)
    status = s->kind == STREAM_TCP ? uv_tcp_open(&s->uv.tcp, fd) : uv_pipe_open(&s->uv.pipe, fd);
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

void stream_free(struct runtime *rt) {
  free(rt->slab);
  rt->slab = NULL;
}

uv_stream_t *stream_uv(struct stream *s) { return &s->uv.stream; }

/* ---- Lua face ---- */

static void land(lua_State *L, struct handle *h, int i);
static const struct handle_class class = {"stream", changed, land, collected, on_close, left};

struct stream *stream_new(lua_State *L, enum stream_kind kind) {
  struct stream *s = (struct stream *)handle_new(L, TAG_STREAM, &class, sizeof *s, STREAM_STRINGS);
  link_init(&s->readers);
  link_init(&s->writers);
  link_init(&s->flushers);
  link_init(&s->closers);
  s->kind = (uint8_t)kind;
  return s;
}

static struct stream *check(lua_State *L) {
  return (struct stream *)object_check(L, 1, TAG_STREAM);
}

/* [-0, +1, m] why the stream is of no use any more */
static void push_broken(lua_State *L, const struct stream *s, const char *syscall) {
  handle_push_code(L, "ECANCELED", syscall,
                   "a canceled write has broken the stream: %I bytes of it were sent",
                   (LUAI_UACINT)s->written);
  lua_pushinteger(L, (lua_Integer)s->written);
  lua_setfield(L, -2, "written");
}

static bool is_new(const struct stream *s, const struct request *r) { return r != &s->ask; }

/* [-0, +0/1, m] what hinders every new request; `busy`: somebody waits in q already */
static bool push_hindrance(lua_State *L, struct stream *s, const struct request *r,
                           const struct link *q) {
  if (s->handle.disposed)
    handle_push_disposed(L, &s->handle);
  else if (s->broken)
    push_broken(L, s, r->verb->name);
  else if (q != NULL && is_new(s, r) && waiter_any(q))
    error_push(L, ERROR_OPERATION, "%s: another task is %s this stream: one at a time",
               r->verb->name, q == &s->readers ? "reading from" : "writing to");
  else
    return false;
  return true;
}

/* ---- reading ---- */

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
  if (push_hindrance(L, s, r, &s->readers)) return LOOK_ERROR;
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
    int status = uv_read_start(&s->uv.stream, on_alloc, on_read);
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
  struct stream *s = check(L);
  struct request r = {.verb = &read_verbs[what], .what = what};
  int k = 3;
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
      k = 4;
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
  return handle_wait(L, me, &s->readers);
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

/* ---- writing ---- */

/* [-0, +0, m] n bytes of the string at i, from `from` on, are last in the queue */
static void enqueue(lua_State *L, struct stream *s, int i, size_t from) {
  size_t length;
  const char *text = lua_tolstring(L, i, &length);
  text += from;
  length -= from;
  if (length == 0) return;
  if (length <= SHORT) {
    struct piece *p = s->last;
    if (p == NULL || p->slot != 0 || p->room < length) {
      p = malloc(sizeof *p + BLOCK);
      if (p == NULL) luaL_error(L, "not enough memory");
      *p = (struct piece){.base = p->own, .room = BLOCK};
      if (s->last != NULL)
        s->last->next = p;
      else
        s->first = p;
      s->last = p;
    }
    memcpy(p->own + (BLOCK - p->room), text, length);
    p->room -= (uint32_t)length;
    p->length += length;
  } else {
    lua_getiuservalue(L, 1, STREAM_STRINGS);
    lua_pushvalue(L, i);
    int slot = slots_add(L, -2, &s->free_slot);
    struct piece *p = malloc(sizeof *p);
    if (p == NULL) slots_free(L, -1, &s->free_slot, slot);
    lua_pop(L, 1);
    if (p == NULL) luaL_error(L, "not enough memory");
    *p = (struct piece){.base = text, .length = length, .slot = slot};
    if (s->last != NULL)
      s->last->next = p;
    else
      s->first = p;
    s->last = p;
  }
  s->queued += length;
}

/* [-0, +0, -] strings that are written, or will never be, are held no more */
static void forget_strings(lua_State *L, struct stream *s, int i) {
  if (s->done == NULL) return;
  lua_getiuservalue(L, i, STREAM_STRINGS);
  for (struct piece *p; (p = s->done) != NULL; free(p)) {
    s->done = p->next;
    slots_free(L, -1, &s->free_slot, p->slot);
  }
  lua_pop(L, 1);
}

/* [-0, +0, m] there is a table for long strings. Made before anything is sent: a finalizer that runs meanwhile
** may write, too, and must not do so in the middle. */
static void make_room(lua_State *L) {
  if (lua_getiuservalue(L, 1, STREAM_STRINGS) == LUA_TNIL) {
    lua_createtable(L, 2, 0);
    if (lua_getiuservalue(L, 1, STREAM_STRINGS) == LUA_TNIL) { /* else by a finalizer */
      lua_pop(L, 1);
      lua_setiuservalue(L, 1, STREAM_STRINGS);
      lua_pop(L, 1);
      return;
    }
    lua_pop(L, 2);
  }
  lua_pop(L, 1);
}

static bool push_write_hindrance(lua_State *L, struct stream *s, const struct request *r,
                                 const struct link *q) {
  if (push_hindrance(L, s, r, q)) return true;
  if (s->write_status != 0)
    io_push_error(L, s->write_status, r->verb->name, NULL);
  else
    return false;
  return true;
}

/* The strings are at 2 … r->what. Before it waits nothing has been done; so `wait` does all, and nothing can
** raise in it but for want of memory. */
static enum look look_write(lua_State *L, int i, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  (void)i;
  if (push_write_hindrance(L, s, r, &s->writers)) return LOOK_ERROR;
  if (is_new(s, r) && s->shut) {
    error_push(L, ERROR_OPERATION, "write: this side of the stream has been shut down");
    return LOOK_ERROR;
  }
  if (is_new(s, r) && r->found == 0) return LOOK_WAIT;
  lua_pushboolean(L, 1);
  return LOOK_VALUE;
}

/* [-0, +0, m] the strings at 2 … n: what the system does not take at once is in the queue */
static void put(lua_State *L, struct stream *s, int n) {
  int i = 2;
  size_t from = 0;
  while (s->first == NULL && s->write_status == 0 && i <= n) {
    uv_buf_t buffers[ON_STACK];
    size_t size = 0;
    int last = i;
    for (; last <= n && last - i < ON_STACK; last++) {
      size_t length;
      const char *text = lua_tolstring(L, last, &length);
      size_t skip = last == i ? from : 0;
      buffers[last - i] = uv_buf_init((char *)text + skip, (unsigned)(length - skip));
      size += length - skip;
    }
    int status = size > 0 ? uv_try_write(&s->uv.stream, buffers, (unsigned)(last - i)) : 0;
    if (status < 0 && status != UV_EAGAIN) s->write_status = status;
    if (status < 0) break;
    s->sent += (size_t)status;
    bool all = (size_t)status == size;
    if (all) {
      i = last;
      from = 0;
      continue;
    }
    for (size_t sent = (size_t)status;; i++, from = 0) {
      size_t left = lua_rawlen(L, i) - from;
      if (sent < left) {
        from += sent;
        break;
      }
      sent -= left;
    }
    break;
  }
  if (s->write_status != 0) return;
  for (; i <= n; i++, from = 0) enqueue(L, s, i, from);
  send_more(s);
}

static bool wait_write(lua_State *L, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  if (!is_new(s, r)) return true;
  uint64_t before = s->sent + s->queued;
  put(L, s, r->what);
  if (s->write_status != 0) return false;
  r->found = 1;
  if (s->queued <= HIGH) {
    handle_changed(L, 1); /* libuv may have it in hands */
    return false;
  }
  s->write_from = before;
  s->write_size = r->size;
  s->writing = true;
  return true;
}

static struct link *queue_write(struct handle *h) { return &as_stream(h)->writers; }

static const struct verb write_verb = {"write", look_write, NULL, wait_write, queue_write};

/* write(s, …, token) */
static int write_any(lua_State *L, lua_CFunction f) {
  struct stream *s = check(L);
  struct request r = {.verb = &write_verb};
  int n = lua_gettop(L);
  if (n > 1 && (object_test(L, n, TAG_TOKEN) != NULL || lua_isnil(L, n)))
    n--;
  else {
    luaL_checkstack(L, 8, NULL);
    lua_pushnil(L);
  }
  luaL_checkstack(L, 8, NULL);
  for (int i = 2; i <= n; i++) {
    size_t length;
    luaL_checklstring(L, i, &length);
    r.size += length;
  }
  r.what = n;
  if (r.size > SHORT) make_room(L);
  if (f == NULL) return handle_ask_async(L, &s->handle, &r, n + 1);
  if (lua_isnil(L, n + 1) && !s->handle.disposed && !s->broken && !s->shut &&
      s->write_status == 0 && s->queued + r.size <= HIGH && !waiter_any(&s->writers)) {
    const struct scope *scope = ((const struct fiber *)s->handle.rt->me)->member.scope;
    if (!scope->canceled) { /* it will not wait, wherever this is */
      put(L, s, n);
      if (s->queued > 0) handle_changed(L, 1);
      if (s->write_status == 0) {
        lua_pushboolean(L, 1);
        return 1;
      }
    }
  }
  return handle_ask(L, &s->handle, &r, n + 1, f);
}

static int l_write(lua_State *L) { return write_any(L, l_write); }
static int l_write_async(lua_State *L) { return write_any(L, NULL); }

/* ---- flush, shutdown, close ---- */

enum { FLUSH_NEW, FLUSH_WAITING, FLUSH_CLOSE };

static enum look look_flush(lua_State *L, int i, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  int top = lua_gettop(L);
  if (r->what == FLUSH_NEW && push_hindrance(L, s, r, NULL)) return LOOK_ERROR;
  if (s->broken)
    push_broken(L, s, r->verb->name);
  else if (s->write_status != 0)
    io_push_error(L, s->write_status, r->verb->name, NULL);
  else if (s->queued > 0)
    return LOOK_WAIT;
  if (r->what == FLUSH_CLOSE) { /* it needs not wait */
    s->lingers = false;
    handle_changed(L, i);
  }
  if (lua_gettop(L) > top) return LOOK_ERROR;
  lua_pushboolean(L, 1);
  return LOOK_VALUE;
}

static bool wait_flush(lua_State *L, struct handle *h, struct request *r) {
  (void)L, (void)r;
  as_stream(h)->lingers = false; /* it waits */
  return true;
}

static struct link *queue_flush(struct handle *h) { return &as_stream(h)->flushers; }

static const struct verb flush_verb = {"flush", look_flush, NULL, wait_flush, queue_flush};
static const struct verb shutdown_verb = {"shutdown", look_flush, NULL, wait_flush, queue_flush};
static struct link *queue_close(struct handle *h) { return &as_stream(h)->closers; }

static const struct verb close_verb = {"close", look_flush, NULL, wait_flush, queue_close};

static int flush_any(lua_State *L, lua_CFunction f) {
  struct stream *s = check(L);
  struct request r = {.verb = &flush_verb};
  token_opt(L, 2);
  lua_settop(L, 2);
  return f != NULL ? handle_ask(L, &s->handle, &r, 2, f) : handle_ask_async(L, &s->handle, &r, 2);
}

static int l_flush(lua_State *L) { return flush_any(L, l_flush); }
static int l_flush_async(lua_State *L) { return flush_any(L, NULL); }

static int shutdown_any(lua_State *L, lua_CFunction f) {
  struct stream *s = check(L);
  struct request r = {.verb = &shutdown_verb};
  token_opt(L, 2);
  lua_settop(L, 2);
  if (!s->handle.disposed && !s->broken && s->write_status == 0) {
    if (waiter_any(&s->writers))
      return error_throw(L, ERROR_OPERATION, "shutdown: another task is writing to this stream");
    if (f != NULL && s->queued > 0) fiber_here(L, s->handle.rt);
    s->shut = true;
    end_writing(s);
  }
  return f != NULL ? handle_ask(L, &s->handle, &r, 2, f) : handle_ask_async(L, &s->handle, &r, 2);
}

static int l_shutdown(lua_State *L) { return shutdown_any(L, l_shutdown); }
static int l_shutdown_async(lua_State *L) { return shutdown_any(L, NULL); }

/* [-0, +0, m] the stream at i is of no use any more: whoever waits is told so */
static void refuse_all(lua_State *L, int i, struct stream *s) {
  struct link *queues[] = {&s->readers, &s->writers, &s->flushers, &s->closers};
  for (int n = 0; n < 4; n++) {
    if (!waiter_any(queues[n]) || (n >= 2 && !s->broken)) continue;
    if (s->broken)
      push_broken(L, s, n == 0 ? "read" : "write");
    else
      handle_push_code(L, "ECANCELED", n == 0 ? "read" : "write",
                       "the stream was closed by another task");
    handle_refuse(L, i, queues[n]); /* which cuts a write */
  }
}

/* [-0, +0, m] nothing new is begun from here on */
static void dispose(lua_State *L, struct stream *s) {
  s->handle.disposed = true;
  stop_reading(s);
  refuse_all(L, 1, s);
}

/* it is closed, and there is nothing to wait for */
static int closed_now(lua_State *L, struct stream *s, bool async) {
  handle_changed(L, 1);
  if (async) {
    struct task *t = task_new(L, KIND_PROMISE, sizeof *t, 2, false);
    lua_pushboolean(L, 1);
    task_settle(L, s->handle.rt, lua_gettop(L) - 1, 1);
  } else
    lua_pushboolean(L, 1);
  return 1;
}

static int close_any(lua_State *L, lua_CFunction f) {
  struct stream *s = check(L);
  struct request r = {.verb = &close_verb, .what = FLUSH_CLOSE};
  struct token *token = token_opt(L, 2);
  lua_settop(L, 2);
  if (s->handle.disposed) return closed_now(L, s, f == NULL);
  if (f != NULL && s->queued > 0) {
    struct fiber *me = fiber_here(L, s->handle.rt);
    if (me == NULL) return fiber_outside(L, f);
    struct scope *scope = me->member.scope;
    if (operation_canceled(token, scope) && !token_none(L, 2)) {
      dispose(L, s); /* what is left is not sent */
      handle_changed(L, 1);
      operation_throw_canceled(L, token, 2, scope);
    }
  }
  s->lingers = true;
  dispose(L, s); /* which may break it */
  if (s->queued == 0 || s->broken || s->handle.closing) {
    s->lingers = false;
    return closed_now(L, s, f == NULL);
  }
  if (f != NULL) return handle_ask(L, &s->handle, &r, 2, f);
  handle_ask_async(L, &s->handle, &r, 2);
  s->lingers = false; /* the operation waits, or is canceled */
  handle_changed(L, 1);
  return 1;
}

static int l_close(lua_State *L) { return close_any(L, l_close); }
static int l_close_async(lua_State *L) { return close_any(L, NULL); }

/* dispose(): at once; what has not been sent is dropped */
static int l_dispose(lua_State *L) {
  struct stream *s = check(L);
  lua_settop(L, 1);
  if (!s->handle.disposed) dispose(L, s);
  handle_close(&s->handle);
  handle_changed(L, 1);
  return 0;
}

/* abort(): the same, and the peer gets an error instead of an end */
static int l_abort(lua_State *L) {
  struct stream *s = check(L);
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

/* [-0, +0, m] a plain read gets what has come: the same as handle_answer, in one go */
static void answer_some(lua_State *L, int i, struct stream *s) {
  const char *base;
  uint32_t epoch = s->epoch;
  size_t n = available(s) < s->ask.size ? available(s) : s->ask.size;
  if (n == 0 || s->broken || s->handle.disposed || !look_at(s, &base)) return;
  lua_pushlstring(L, base, n);
  if (s->epoch == epoch) {           /* and so the one who waits is still there */
    s->handle.holder.handle = false; /* handle_land is about to look for itself */
    struct nap *who = waiter_take(L, i, &s->readers);
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

static void land(lua_State *L, struct handle *h, int i) {
  struct stream *s = as_stream(h);
  struct request flush = {.verb = &flush_verb, .what = FLUSH_WAITING};
  struct request end = {.verb = &close_verb, .what = FLUSH_WAITING};
  forget_strings(L, s, i);
  if (s->broken) refuse_all(L, i, s);
  if (waiter_any(&s->readers) && s->ask.what == ASK_SOME) answer_some(L, i, s);
  if (waiter_any(&s->readers)) handle_answer(L, i, h, &s->ask);
  if (waiter_any(&s->writers) && (s->queued <= LOW || s->write_status != 0)) {
    s->writing = false;
    if (s->write_status != 0) {
      io_push_error(L, s->write_status, "write", NULL);
      handle_refuse(L, i, &s->writers);
    } else {
      struct nap *n = waiter_take(L, i, &s->writers);
      if (n != NULL) {
        lua_pushboolean(L, 1);
        waiter_grant(L, h->rt, n);
      }
    }
  }
  if (waiter_any(&s->flushers)) handle_answer(L, i, h, &flush);
  if (waiter_any(&s->closers)) handle_answer(L, i, h, &end);
  if (s->part.length > 0 && !gather(s)) s->read_status = UV_ENOMEM;
}

/* ---- properties ---- */

static int push_address(lua_State *L, bool peer) {
  struct stream *s = check(L);
  struct sockaddr_storage address;
  int n = sizeof address;
  memset(&address, 0, sizeof address);
  if (s->handle.uv == NULL || s->handle.closing) return 0;
  if (s->kind == STREAM_TCP) {
    int status = peer ? uv_tcp_getpeername(&s->uv.tcp, (struct sockaddr *)&address, &n)
                      : uv_tcp_getsockname(&s->uv.tcp, (struct sockaddr *)&address, &n);
    return status == 0 && address_push(L, &address);
  }
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
  const struct stream *s = check(L);
  lua_pushboolean(L, s->handle.disposed || s->broken);
  return 1;
}

static struct stream *check_tcp(lua_State *L, const char *what) {
  struct stream *s = check(L);
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
  const struct stream *s = check(L);
  lua_pushfstring(L, "coflow.Stream (%s%s)", s->kind == STREAM_TCP ? "tcp" : "pipe",
                  s->handle.disposed || s->broken ? ", closed" : "");
  return 1;
}

static const luaL_Reg methods[] = {{"read", l_read},
                                   {"read_async", l_read_async},
                                   {"read_exactly", l_read_exactly},
                                   {"read_exactly_async", l_read_exactly_async},
                                   {"read_line", l_read_line},
                                   {"read_line_async", l_read_line_async},
                                   {"read_until", l_read_until},
                                   {"read_until_async", l_read_until_async},
                                   {"read_all", l_read_all},
                                   {"read_all_async", l_read_all_async},
                                   {"write", l_write},
                                   {"write_async", l_write_async},
                                   {"flush", l_flush},
                                   {"flush_async", l_flush_async},
                                   {"shutdown", l_shutdown},
                                   {"shutdown_async", l_shutdown_async},
                                   {"close", l_close},
                                   {"close_async", l_close_async},
                                   {"dispose", l_dispose},
                                   {"abort", l_abort},
                                   {"nodelay", l_nodelay},
                                   {"keepalive", l_keepalive},
                                   {"__close", l_leave},
                                   {"__gc", handle_gc},
                                   {"__tostring", l_tostring},
                                   {NULL, NULL}};
static const luaL_Reg properties[] = {{"local_address", l_local_address},
                                      {"peer_address", l_peer_address},
                                      {"is_closed", l_is_closed},
                                      {NULL, NULL}};

void stream_open(lua_State *L) {
  module_class(L, TAG_STREAM, "coflow.Stream", methods, properties);
}
