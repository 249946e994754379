/*
** uvstream.h - what the files of the streams share: uvstream.c (life, closing), uvread.c, uvwrite.c,
** and fdstream.c for descriptors that libuv cannot poll.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_uvstream_h
#define coflow_uvstream_h

#include "io.h"

#pragma GCC visibility push(hidden)

enum { STREAM_DELIMITER = HOLDER_WAITERS + 1, STREAM_STRINGS };
enum { HIGH = 65536, LOW = 16384 }; /* bytes that wait: to be taken, to be sent */

struct slab; /* uvread.c */
struct piece;
struct record; /* uvwrite.c */
struct descriptor;
struct read_job;
struct write_job; /* fdstream.c */

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
  bool reading;
  /* writing */
  bool flying;                       /* libuv, or a thread, … */
  size_t flight;                     /* … has so many bytes in hands, the first of the queue */
  struct piece *first, *last, *done; /* done: their strings are to be forgotten */
  struct link writes;                /* the suspended ones, as in `writers` */
  struct record *spare;              /* for the next one, or NULL */
  size_t queued;
  uint64_t sent;       /* since the beginning of the stream */
  int64_t written;     /* of the write that was cut short last */
  int64_t broken_by;   /* the same, of the one that has broken it */
  uint64_t stopped_at; /* `sent`, when nothing more is sent */
  int write_status, free_slot;
  bool broken, stopped, shut, ended;
  bool was_cut; /* a write, by the last change of who waits */
  bool unsent;  /* bytes of writes that have returned were lost, and nobody has been told */
  bool lingers; /* `close` is about to wait for the queue: the handle stays open */
  uint8_t kind;
  uint8_t standard; /* 1, 2, 3: it is standard input, output or error; 0: none of these */
  union {
    uv_stream_t stream;
    uv_tcp_t tcp;
    uv_pipe_t pipe;
    struct {
      union {
        uv_poll_t poll;   /* of its epoll instance, or … */
        uv_check_t check; /* … never started: that libuv closes, like the others */
      };
      struct descriptor *descriptor;
      struct read_job *read;
      struct write_job *write;
      int wanted, polled; /* UV_READABLE, UV_WRITABLE */
    } fd;
  } uv;
};

static inline struct stream *as_stream(struct handle *h) { return (struct stream *)(void *)h; }
static inline struct stream *of_uv(void *uv) { return container_of(uv, struct stream, uv); }
static inline bool is_new(const struct stream *s, const struct request *r) { return r != &s->ask; }
static inline struct stream *stream_check(lua_State *L) { /* [-0, +0, v] at index 1 */
  return (struct stream *)object_check(L, 1, TAG_STREAM);
}

/* ---- uvstream.c ---- */

/* [-0, +0/1, m] what hinders every new request; q: that of the readers, one at a time, or NULL */
bool stream_push_hindrance(lua_State *L, struct stream *s, const struct request *r,
                           const struct link *q);
/* [-0, +1, m] why it is of no use any more */
void stream_push_broken(lua_State *L, const struct stream *s, const char *syscall);

/* ---- uvread.c ---- */

extern const luaL_Reg read_methods[];
void read_stop(struct stream *s); /* No Lua. */
void read_drop(struct stream *s); /* frees what has come. No Lua. */
/* n bytes of that block, which is the stream's now. No Lua. */
void read_came(struct stream *s, char *base, size_t n, size_t size, int status);
void read_answer(lua_State *L, int i, struct stream *s); /* [-0, +0, m] of the one at i */

/* ---- uvwrite.c ---- */

extern const luaL_Reg write_methods[];
void write_changed(struct stream *s);          /* it may be a writer who came, or went. No Lua. */
void write_free(struct stream *s);             /* … and all is freed. No Lua. */
void write_done(struct stream *s, int status); /* of what was in flight. No Lua. */
enum look write_look_flush(lua_State *L, int i, struct handle *h, struct request *r);
bool write_wait_flush(lua_State *L, struct handle *h, struct request *r);
enum { FLUSH_NEW, FLUSH_WAITING, FLUSH_CLOSING };         /* what is asked of these */
void write_answer(lua_State *L, int i, struct stream *s); /* [-0, +0, m] of the one at i */
/* [-0, +0, m] all that are suspended; linger: but for operations, if it can be written to */
void write_refuse(lua_State *L, int i, struct stream *s, bool linger);
void write_stop(struct stream *s);                        /* nothing more is sent. No Lua. */
void write_forget(lua_State *L, struct stream *s, int i); /* [-0, +0, -] strings that are sent */
/* the first of the queue. No Lua. */
size_t write_copy(const struct stream *s, char *to, size_t most);

/* ---- fdstream.c: streams of descriptors that libuv cannot poll. No Lua. ---- */

int fd_open(struct stream *s, int fd);  /* a status of libuv; it owns fd then */
int fd_read(struct stream *s);          /* a status of libuv; read_came follows */
void fd_read_stop(struct stream *s);    /* … or not, if nothing has come */
int fd_write(struct stream *s);         /* a status of libuv; write_done follows; sets `flight` */
size_t fd_write_stop(struct stream *s); /* what is written nevertheless */
bool fd_write_rest(struct stream *s);   /* there is nothing to write; false: write_done follows */
void fd_close(struct stream *s);

#pragma GCC visibility pop
#endif
