/*
** uvwrite.c - writing to streams.
**
** What the system takes at once never leaves the caller's stack. The rest is a queue of pieces: short
** strings lie together in blocks, long ones are held, not copied. libuv has at most one request at a
** time, of up to BUFFERS pieces, so what is written meanwhile goes out together. A write returns when
** no more than HIGH bytes are waiting; else it suspends until only LOW are. To standard output and
** error it returns when it is all sent, so that what the program writes otherwise (print) comes after
** it. Any number of tasks may be suspended in writes, each a record of what is its own in the queue;
** while one is, others that come suspend behind it. libuv is given nothing of those that are behind the
** first, so that they can be taken back.
**
**     written before │ a write that suspends │ the next one
**     ───────────────┼───────────────────────┼─────────────
**        sent  given │ …                                     given: to libuv, which cannot take it back
**
** Canceled, a write is taken out of the queue if nothing of it was given; if something was, what the
** peer would get is cut somewhere in the middle, so the stream is broken: closed at once, and all that
** is asked of it later is refused.
**
** Invariants: queued == sum of the pieces' lengths; while `flying` the first `flight` bytes of the queue are given.
**             The records are in the order of `writers`, and of their bytes in the queue.
** SPDX-License-Identifier: MIT
*/
#include "uvstream.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { SHORT = 4096, BLOCK = 16384, BUFFERS = 16, ON_STACK = 16 };
#define FLIGHT_MOST ((size_t)1 << 18)
#define TRY_MOST ((size_t)1 << 20) /* in one call: libuv's lengths are unsigned, not size_t */

struct piece {
  struct piece *next;
  const char *base;
  size_t length;
  int slot;      /* of the string, in STREAM_STRINGS; 0: the bytes lie behind */
  uint32_t room; /* … of which this many are not used yet */
  char own[];
};

struct record {
  struct link link;
  struct nap *who; /* NULL: about to wait */
  uint64_t from;   /* since the beginning of the stream */
  size_t size;
};

struct flight {
  uv_write_t req;
  struct stream *stream;
};

/* ---- libuv side: no Lua below this line until the Lua face ---- */

/* it is out of the queue */
static void drop_piece(struct stream *s, struct piece *p) {
  if (p->slot == 0) {
    free(p);
    return;
  }
  p->next = s->done;
  s->done = p;
}

static void drop_first(struct stream *s) {
  struct piece *p = s->first;
  s->first = p->next;
  if (s->first == NULL) s->last = NULL;
  s->queued -= p->length;
  drop_piece(s, p);
}

static struct record *record_of(struct link *l) { return container_of(l, struct record, link); }

static void drop_record(struct record *r) {
  link_drop(&r->link);
  free(r);
}

static void drop_all(struct stream *s) {
  while (s->first != NULL) drop_first(s);
}

/* the same after a failure. Whoever waits is told; of bytes that were taken before, whoever comes
** first. Of what a canceled write has lost, `cut` knows. */
static void lose_all(struct stream *s) {
  if (s->queued > 0 && !s->broken &&
      (!waiter_any(&s->writes) || record_of(s->writes.next)->from > s->sent))
    s->unsent = true;
  drop_all(s);
}

void write_free(struct stream *s) {
  drop_all(s);
  if (!waiter_any(&s->writers) || s->handle.rt->closed) /* else they are to be told what was sent */
    while (waiter_any(&s->writes)) drop_record(record_of(s->writes.next));
  for (struct piece *p; (p = s->done) != NULL; free(p)) s->done = p->next;
  free(s->spare);
  s->spare = NULL;
}

static void was_sent(struct stream *s, size_t n) {
  s->sent += n;
  while (n > 0 && s->first->length <= n) {
    n -= s->first->length;
    drop_first(s);
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
  if (s->standard != 0) {
    s->write_status = stdio_end(s->standard - 1);
    handle_close(&s->handle);
  } else if (uv_fileno(s->handle.uv, &fd) != 0 || shutdown(fd, SHUT_WR) == 0 || errno == ENOTCONN)
    return;
  else if (errno == ENOTSOCK)
    handle_close(
        &s->handle); /* a pipe without a name goes one way: there is no other side to keep */
  else
    s->write_status = uv_translate_sys_error(errno);
}

static void on_write(uv_write_t *req, int status) {
  struct flight *f = container_of(req, struct flight, req);
  struct stream *s = f->stream;
  free(f);
  s->handle.rt->patient--;
  write_done(s, status);
}

/* how many bytes may be given: not beyond the first write that is suspended and not yet sent */
static size_t most_to_give(const struct stream *s) {
  for (struct link *l = s->writes.next; l != &s->writes; l = l->next) {
    const struct record *r = record_of(l);
    if (r->from + r->size <= s->sent) continue;
    uint64_t n = r->from + r->size - s->sent;
    return n < FLIGHT_MOST ? (size_t)n : FLIGHT_MOST;
  }
  return FLIGHT_MOST;
}

/* the first `flight` bytes of the queue, to libuv */
static int launch(struct stream *s) {
  uv_buf_t buffers[BUFFERS];
  unsigned n = 0;
  size_t size = 0, most = most_to_give(s);
  for (struct piece *p = s->first; p != NULL && n < BUFFERS && size < most; p = p->next) {
    size_t length = p->length < most - size ? p->length : most - size;
    buffers[n++] = uv_buf_init((char *)p->base, (unsigned)length);
    size += length;
  }
  struct flight *f = malloc(sizeof *f);
  if (f == NULL) return UV_ENOMEM;
  f->stream = s;
  s->flight = size;
  int status = uv_write(&f->req, &s->uv.stream, buffers, n, on_write);
  if (status == 0)
    s->handle.rt->patient++;
  else
    free(f);
  return status;
}

size_t write_copy(const struct stream *s, char *to, size_t most) {
  size_t n = 0;
  for (const struct piece *p = s->first; p != NULL && n < most; p = p->next) {
    size_t length = p->length < most - n ? p->length : most - n;
    memcpy(to + n, p->base, length);
    n += length;
  }
  return n;
}

/* gives away what is first in the queue */
static void send_more(struct stream *s) {
  if (s->flying || s->first == NULL || s->handle.closing) return;
  s->flying = true;
  int status = s->kind == STREAM_FD ? fd_write(s) : launch(s);
  if (status == 0) return;
  s->flying = false;
  s->flight = 0;
  s->write_status = status;
  lose_all(s);
}

void write_done(struct stream *s, int status) {
  size_t size = s->flight;
  s->flying = false;
  s->flight = 0;
  if (status == 0)
    was_sent(s, size);
  else {
    if (s->write_status == 0) s->write_status = status;
    lose_all(s);
  }
  send_more(s);
  end_writing(s);
  handle_news(&s->handle);
}

/* n bytes of the queue, behind `at`, leave it; none of them has been given to libuv */
static void take_out(struct stream *s, size_t at, size_t n) {
  struct piece **to = &s->first, *before = NULL;
  s->queued -= n;
  while (n > 0) {
    struct piece *p = *to;
    size_t k = p->length - at < n ? p->length - at : n;
    if (at >= p->length) {
      at -= p->length;
    } else if (k == p->length) {
      n -= k;
      *to = p->next;
      if (s->last == p) s->last = before;
      drop_piece(s, p);
      continue;
    } else { /* of a block: what belongs to others moves down */
      n -= k;
      memmove((char *)p->base + at, p->base + at + k, p->length - at - k);
      p->length -= k;
      p->room += (uint32_t)k;
      at = 0;
    }
    before = p;
    to = &p->next;
  }
}

/* how much of it has been sent; *given: up to there nobody can take anything back */
static size_t sent_of(struct stream *s, const struct record *r, uint64_t *given) {
  uint64_t sent = s->stopped_at;
  if (!s->stopped) {
    if (s->flying && s->kind == STREAM_FD && s->sent + s->flight > r->from)
      s->flight = fd_write_stop(s);
    sent = s->sent + s->flight;
    *given = sent;
    if (s->flying && s->kind != STREAM_FD) sent -= uv_stream_get_write_queue_size(&s->uv.stream);
  }
  if (sent <= r->from) return 0;
  return sent - r->from < r->size ? (size_t)(sent - r->from) : r->size;
}

/* how much the system has taken */
static uint64_t reached(const struct stream *s) {
  size_t left =
      s->flying && s->kind != STREAM_FD ? uv_stream_get_write_queue_size(&s->uv.stream) : 0;
  return s->sent + s->flight - left;
}

void write_stop(struct stream *s) {
  if (s->stopped) return;
  if (s->flying && s->kind == STREAM_FD) s->flight = fd_write_stop(s);
  s->stopped_at = reached(s);
  s->stopped = true;
}

/* a suspended write is canceled, or its stream is being closed */
static void cut(struct stream *s, struct record *r) {
  uint64_t given = 0;
  size_t n = sent_of(s, r, &given);
  s->was_cut = true;
  s->written = (int64_t)n;
  if (s->stopped || s->write_status != 0 || n == r->size) { /* nothing is left of it in the queue */
  } else if (given <= r->from) {
    take_out(s, (size_t)(r->from - s->sent), r->size);
    for (struct link *l = r->link.next; l != &s->writes; l = l->next) record_of(l)->from -= r->size;
    if (s->queued == 0 && s->flying && s->kind == STREAM_FD && fd_write_rest(s)) {
      s->flying = false;
      handle_news(&s->handle); /* others may wait for just that */
    }
    end_writing(s);
  } else {
    if (reached(s) < r->from) s->unsent = true;
    s->broken = true;
    s->broken_by = s->written;
    s->stopped = true;
    s->stopped_at = r->from + n;
    handle_close(&s->handle);
    handle_news(&s->handle);
  }
  drop_record(r);
}

/* those whose waiters are not in the queue any more */
static void look_again(struct stream *s) {
  const struct link *q = s->writers.next;
  s->handle.look_again = false;
  for (struct link *l = s->writes.next, *next; l != &s->writes; l = next) {
    struct record *r = record_of(l);
    next = l->next;
    if (q != &s->writers && r->who != NULL && &r->who->link == q)
      q = q->next;
    else if (r->who != NULL)
      cut(s, r);
  }
}

static struct record *record_for(struct stream *s, const struct nap *who) {
  for (struct link *l = s->writes.next; l != &s->writes; l = l->next)
    if (record_of(l)->who == who) return record_of(l);
  return NULL;
}

/* There may be many, so that only what has changed is looked at: the last one is about to wait, or one
** has left. */
void write_changed(struct stream *s) {
  struct nap *gone = s->handle.gone;
  if (s->handle.look_again) look_again(s);
  if (waiter_any(&s->writes) && waiter_any(&s->writers)) {
    struct record *last = record_of(s->writes.prev);
    struct nap *n = container_of(s->writers.prev, struct nap, link);
    if (last->who == NULL && !n->noted) {
      last->who = n;
      n->noted = 1;
    }
  }
  if (gone == NULL || !gone->noted) return;
  gone->noted = 0;
  struct record *r = record_for(s, gone);
  if (r != NULL) cut(s, r);
}

/* ---- Lua face ---- */

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
void write_forget(lua_State *L, struct stream *s, int i) {
  lua_getiuservalue(L, i, STREAM_STRINGS);
  for (struct piece *p; (p = s->done) != NULL; free(p)) {
    s->done = p->next;
    slots_free(L, -1, &s->free_slot, p->slot);
  }
  lua_pop(L, 1);
}

/* [-0, +0, m] there is a table for long strings. Made before anything is sent: a finalizer that runs
** meanwhile may write, too, and must not do so in the middle. */
static void make_room(lua_State *L) {
  module_push_table(L, 1, STREAM_STRINGS);
  lua_pop(L, 1);
}

static bool push_write_hindrance(lua_State *L, struct stream *s, const struct request *r) {
  if (stream_push_hindrance(L, s, r, NULL)) return true;
  int status = s->standard == 1 ? UV_EBADF : s->write_status;
  if (status != 0) {
    io_push_error(L, status, r->verb->name, NULL);
    s->unsent = false; /* it is told */
  }
  return status != 0;
}

/* how many bytes may wait for the system when a write returns; `usual`, but for the standard streams */
static size_t patience(const struct stream *s, size_t usual) {
  return s->standard != 0 ? 0 : usual;
}

/* The strings are at 2 … r->what. Before it waits nothing has been done; so `wait` does all, and nothing can
** raise in it but for want of memory. */
static enum look look_write(lua_State *L, int i, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  (void)i;
  if (push_write_hindrance(L, s, r)) return LOOK_ERROR;
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
  if (s->standard == 2) fflush(stdout); /* what was printed before comes first */
  while (s->first == NULL && s->kind != STREAM_FD && s->write_status == 0 && i <= n) {
    uv_buf_t buffers[ON_STACK];
    size_t size = 0;
    int last = i;
    for (; last <= n && last - i < ON_STACK && size < TRY_MOST; last++) {
      size_t length;
      const char *text = lua_tolstring(L, last, &length);
      size_t skip = last == i ? from : 0, room = TRY_MOST - size;
      length -= skip;
      if (length > room) length = room; /* then nothing follows: it is full */
      buffers[last - i] = uv_buf_init((char *)text + skip, (unsigned)length);
      size += length;
    }
    int status = size > 0 ? uv_try_write(&s->uv.stream, buffers, (unsigned)(last - i)) : 0;
    if (status < 0 && status != UV_EAGAIN) s->write_status = status;
    if (status < 0) break;
    s->sent += (size_t)status;
    size_t sent = (size_t)status;
    for (size_t left; i <= n && sent >= (left = lua_rawlen(L, i) - from); i++, from = 0)
      sent -= left;
    from += sent;
    if ((size_t)status < size) break;
  }
  if (s->write_status != 0) return;
  for (; i <= n; i++, from = 0) enqueue(L, s, i, from);
  send_more(s);
}

static bool wait_write(lua_State *L, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  struct record *record = s->spare;
  if (record == NULL) record = s->spare = malloc(sizeof *record);
  if (record == NULL) luaL_error(L, "not enough memory");
  *record = (struct record){.from = s->sent + s->queued, .size = r->size};
  put(L, s, r->what);
  r->found = 1;
  if (s->write_status != 0) return false;
  if (s->queued <= patience(s, HIGH) && !waiter_any(&s->writes)) {
    handle_changed(L, 1); /* libuv may have it in hands */
    return false;
  }
  link_append(&s->writes, &record->link);
  s->spare = NULL;
  return true;
}

static struct link *queue_write(struct handle *h) { return &as_stream(h)->writers; }

static const struct verb write_verb = {"write", look_write, NULL, wait_write, queue_write};

/* write(s, …, token): a nil after strings is a token that is not given; after nothing it is no string */
static int write_any(lua_State *L, lua_CFunction f) {
  struct stream *s = stream_check(L);
  struct request r = {.verb = &write_verb};
  int n = lua_gettop(L);
  if (n > 2 && lua_isnil(L, n) && object_test(L, n - 1, TAG_TOKEN) != NULL) lua_settop(L, --n);
  if (n > 1 && (object_test(L, n, TAG_TOKEN) != NULL || (n > 2 && lua_isnil(L, n))))
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
  r.cost = handle_cost(r.size);
  if (r.size > SHORT) make_room(L);
  if (f == NULL) return handle_ask_async(L, &s->handle, &r, n + 1);
  if (lua_isnil(L, n + 1) && !s->handle.disposed && !s->broken && !s->shut &&
      s->write_status == 0 && s->queued + r.size <= patience(s, HIGH) && !waiter_any(&s->writers)) {
    const struct scope *scope = ((const struct fiber *)s->handle.rt->me)->member.scope;
    if (!scope->canceled) { /* it will not wait, wherever this is */
      put(L, s, n);
      if (s->queued > 0) handle_changed(L, 1);
      if (s->write_status == 0) {
        lua_pushboolean(L, 1);
        return handle_return(L, s->handle.rt, r.cost);
      }
    }
  }
  return handle_ask(L, &s->handle, &r, n + 1, f);
}

static int l_write(lua_State *L) { return write_any(L, l_write); }
static int l_write_async(lua_State *L) { return write_any(L, NULL); }

/* ---- flush, shutdown, close ---- */

enum look write_look_flush(lua_State *L, int i, struct handle *h, struct request *r) {
  struct stream *s = as_stream(h);
  (void)i;
  if (r->what == FLUSH_NEW && stream_push_hindrance(L, s, r, NULL)) return LOOK_ERROR;
  bool lost = r->what != FLUSH_CLOSING || s->unsent; /* else those whose bytes they were are told */
  if (s->broken && lost)
    stream_push_broken(L, s, r->verb->name);
  else if (s->write_status != 0 && lost)
    io_push_error(L, s->write_status, r->verb->name, NULL);
  else if (s->queued > 0)
    return LOOK_WAIT;
  else {
    lua_pushboolean(L, 1);
    return LOOK_VALUE;
  }
  s->unsent = false;
  return LOOK_ERROR;
}

bool write_wait_flush(lua_State *L, struct handle *h, struct request *r) {
  (void)L, (void)h, (void)r; /* whatever is written before it waits is waited for as well */
  return true;
}

static struct link *queue_flush(struct handle *h) { return &as_stream(h)->flushers; }

static const struct verb flush_verb = {"flush", write_look_flush, NULL, write_wait_flush,
                                       queue_flush};
static const struct verb shutdown_verb = {"shutdown", write_look_flush, NULL, write_wait_flush,
                                          queue_flush};

static int flush_any(lua_State *L, lua_CFunction f) {
  struct stream *s = stream_check(L);
  struct request r = {.verb = &flush_verb};
  token_opt(L, 2);
  lua_settop(L, 2);
  return f != NULL ? handle_ask(L, &s->handle, &r, 2, f) : handle_ask_async(L, &s->handle, &r, 2);
}

static int l_flush(lua_State *L) { return flush_any(L, l_flush); }
static int l_flush_async(lua_State *L) { return flush_any(L, NULL); }

static int shutdown_any(lua_State *L, lua_CFunction f) {
  struct stream *s = stream_check(L);
  struct request r = {.verb = &shutdown_verb};
  token_opt(L, 2);
  lua_settop(L, 2);
  if (s->standard == 1) {
    io_push_error(L, UV_EBADF, "shutdown", NULL);
    return lua_error(L);
  }
  const struct scope *scope = ((const struct fiber *)s->handle.rt->me)->member.scope;
  const struct token *token = token_opt(L, 2);
  bool canceled =
      token != NULL ? operation_canceled(token, scope) : scope->canceled && !token_none(L, 2);
  if (!s->handle.disposed && !s->broken && s->write_status == 0 && !canceled) {
    if (f != NULL && s->queued > 0) fiber_here(L, s->handle.rt);
    s->shut = true;
    end_writing(s);
    handle_changed(L, 1); /* it may be closing */
  }
  return f != NULL ? handle_ask(L, &s->handle, &r, 2, f) : handle_ask_async(L, &s->handle, &r, 2);
}

static int l_shutdown(lua_State *L) { return shutdown_any(L, l_shutdown); }
static int l_shutdown_async(lua_State *L) { return shutdown_any(L, NULL); }

/* [-1, +0, m] who is suspended in a write at `link` gets what is on top; false: nobody, for somebody
** has closed its coroutine */
static bool end_one(lua_State *L, int i, struct stream *s, struct link *link, bool failed) {
  struct link one;
  link_init(&one);
  link_drop(link);
  link_append(&one, link);
  struct nap *n = waiter_take(L, i, &s->handle.holder, &one);
  if (n == NULL) {
    lua_pop(L, 1);
    return false;
  }
  lua_insert(L, -2);
  if (failed)
    waiter_fail(L, s->handle.rt, n);
  else
    waiter_grant(L, s->handle.rt, n);
  return true;
}

/* an operation that somebody may look at, and no task that is suspended in the call */
static bool is_operation(struct link *l) {
  const struct clause *c = waiter_clause(container_of(l, struct nap, link));
  return c != NULL && !container_of(c - c->index, struct queued, clauses)->direct;
}

/* the first to be refused, or NULL */
static struct link *first_refused(struct stream *s, bool linger) {
  for (struct link *l = s->writers.next; l != &s->writers; l = l->next)
    if (!linger || s->stopped || s->write_status != 0 || !is_operation(l)) return l;
  return NULL;
}

void write_refuse(lua_State *L, int i, struct stream *s, bool linger) {
  int top = lua_gettop(L);
  bool broken = s->broken;
  for (struct link *l; write_changed(s), (l = first_refused(s, linger)) != NULL;) {
    const struct record *r = record_for(s, container_of(l, struct nap, link));
    uint32_t epoch = s->epoch;
    uint64_t given;
    size_t sent = r != NULL ? sent_of(s, r, &given) : 0;
    bool failed = r == NULL || sent < r->size, fatal = broken || s->write_status != 0;
    if (!failed)
      lua_pushboolean(L, 1);
    else {
      if (broken)
        stream_push_broken(L, s, "write");
      else if (s->write_status != 0 && !s->stopped)
        io_push_error(L, s->write_status, "write", NULL);
      else
        handle_push_code(L, "ECANCELED", "write", "the stream was closed meanwhile");
      lua_pushinteger(L, (lua_Integer)sent);
      lua_setfield(L, -2, "written");
    }
    if (s->epoch == epoch && end_one(L, i, s, l, failed) && failed && fatal)
      s->unsent = false; /* it is told. (If the epoch is another, a finalizer has been here) */
    lua_settop(L, top);
  }
}

void write_answer(lua_State *L, int i, struct stream *s) {
  struct request flush = {.verb = &flush_verb, .what = FLUSH_WAITING};
  if (s->write_status != 0) write_refuse(L, i, s, false);
  write_changed(s); /* somebody may have closed the coroutine of one: it has gone without a word */
  while (waiter_any(&s->writes) && !s->broken) {
    struct record *first = record_of(s->writes.next);
    if (first->from + first->size > s->sent + patience(s, LOW)) break;
    bool waits = first->who != NULL; /* else there was no memory for it */
    if (waits) first->who->noted = 0;
    drop_record(first);
    lua_pushboolean(L, 1);
    if (waits)
      end_one(L, i, s, s->writers.next, false);
    else
      lua_pop(L, 1);
  }
  if (waiter_any(&s->flushers)) handle_answer(L, i, &s->handle, &flush);
}

const luaL_Reg write_methods[] = {{"write", l_write},
                                  {"write_async", l_write_async},
                                  {"flush", l_flush},
                                  {"flush_async", l_flush_async},
                                  {"shutdown", l_shutdown},
                                  {"shutdown_async", l_shutdown_async},
                                  {NULL, NULL}};
