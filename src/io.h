/*
** io.h - what libuv does for a task: operations in flight, and handles that live on between them.
**
** io.c tells what holds for every operation, handle.c what holds for every handle.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_io_h
#define coflow_io_h

#include "waiter.h"

#pragma GCC visibility push(hidden)

/* ---- io.c: operations that libuv has in hands ---- */

/* user values of those on libuv: what errors call .path, or nil; then their own */
enum { IO_PATH = OP_INPUT, IO_FIRST };

struct io;
struct io_class {
  const char *name;    /* of the task: "fs.open" */
  const char *syscall; /* of its errors, unless op->syscall tells another one */
  /* [-0, +n, e] it is at index 1, op->status >= 0: its results. Takes what it gives away last of all,
  ** and only if it is not done by then. */
  int (*land)(lua_State *L, struct io *op);
  /* asks libuv to stop; io_end(op) if it has stopped at once. No Lua. */
  void (*abort)(struct io *op);
  /* or NULL: frees what is left, once, when libuv has let go. No Lua. */
  void (*release)(struct io *op);
  /* or NULL: [-0, +1, m] the error for op->status < 0 */
  void (*fail)(lua_State *L, struct io *op);
};
struct io {
  struct pending pending;
  const struct io_class *class;
  struct runtime *rt;
  const char *syscall; /* that failed; NULL: that of the class */
  struct link flight;  /* in rt->flights while libuv has it in hands */
  ssize_t status;      /* a number >= 0 or an error of libuv, from the callback */
  bool deaf;           /* given `none` */
  bool quiet;          /* whoever awaits it in direct style is not told how it ended */
  bool aborted, released;
  bool landing; /* its result is being made, in which finalizers of users may cancel it */
};
static inline bool io_in_flight(const struct io *op) { return op->flight.next != NULL; }
/* [-0, +1, e] given the token at k; NULL: canceled before */
struct io *io_begin(lua_State *L, int k, const struct io_class *class, size_t size, int uservalues);
/* [-0, +0, m] op is on top; what libuv said; returns 1 */
int io_started(lua_State *L, struct io *op, int status);
void io_done(struct io *op, ssize_t status); /* called by libuv: its callback has come. No Lua. */
void io_end(struct io *op); /* libuv knows it no more, and will not call. No Lua. */
void io_land(lua_State *L, int i);
/* returns for the direct style, with the operation on top */
int io_await(lua_State *L, struct fiber *me);
int io_call(lua_State *L, lua_CFunction start); /* x(...) for the function that x_async is */
/* [-0, +0/1, -] An argument that stands before the token, at i, may be left out: then the token stands
** in its place, and nil is put before it. */
void io_token_last(lua_State *L, int i);
const char *io_check_path(lua_State *L, int i); /* [-0, +0, v] a string that C takes whole */
/* [-0, +0, m] into the table on top: as x_async and x */
void io_functions(lua_State *L, const luaL_Reg *functions);
/* [-0, +0, m] … of a class */
void io_methods(lua_State *L, uint32_t tag, const luaL_Reg *functions);
/* [-0, +1, m] the IO error; both may be NULL */
void io_push_error(lua_State *L, int status, const char *syscall, const char *path);
void io_abort_all(struct runtime *rt);   /* the state is closing */
void io_release_all(struct runtime *rt); /* then: what was done, and has not landed */
void io_open(lua_State *L);              /* [-0, +0, m] before all that begins operations */

/* ---- job.c, fs.c, watch.c, dns.c ---- */

/* A thread is busy with a file, or soon will be, and that will end. False: of the requests that libuv
** has in hands, that many are of file operations that may wait for ever. No Lua. */
bool jobs_work(const struct runtime *rt, unsigned *patient);

struct file;
/* the state is closing: those that are open yet. No Lua. */
void file_close_all(struct runtime *rt);
void watch_close_all(struct runtime *rt);
/* what a child gets: the descriptor, whose position is that of the file from then on; UV_EBADF: it is
** closed, UV_EBUSY: it is in use, or has more than the system knows of */
int file_lend(struct file *f);
extern const struct part fs_part;
void watch_open(lua_State *L); /* [-0, +0, m] into the table of fs.c on top */
extern const struct part dns_part;

/* ---- handle.c: streams and listeners: what of libuv's lives long; the contract is there ---- */

struct handle;
struct request;
struct handle_class {
  const char *name; /* "stream" */
  /* a waiter came or went, or it has landed. Is it in use? No Lua. */
  bool (*changed)(struct handle *h);
  void (*land)(lua_State *L, struct handle *h, int i); /* [-0, +0, m] there is news from libuv */
  void (*collected)(struct handle *h);                 /* forgets its waiters. No Lua. */
  uv_close_cb on_close; /* frees what it has, then handle_closed. No Lua. */
  /* or NULL: who waited has given up: what its error tells as .written, or -1. No Lua. */
  int64_t (*left)(struct handle *h);
};
struct handle {
  struct holder holder;
  const struct handle_class *class;
  struct runtime *rt;
  struct link link; /* in rt->handles */
  struct task task; /* by which it lands; its slot is that of the handle */
  uv_handle_t *uv;  /* NULL: there is none yet, or no more */
  bool held;        /* by the anchors */
  bool pinned;      /* it is to be, though nobody uses it yet */
  bool closing;     /* uv_close has been called */
  bool disposed;    /* the script has closed it */
  bool awaited;     /* it keeps the loop alive */
  bool look_again;  /* a waiter may have left without a word */
  struct nap *gone; /* the waiter that leaves just now, or NULL */
};
enum look {
  LOOK_VALUE, /* the value is on top, and is taken by `take` */
  LOOK_ERROR, /* the error is on top */
  LOOK_AGAIN, /* something has changed meanwhile: ask again; nothing is on top */
  LOOK_WAIT   /* it is not there: nothing is on top */
};
/* What is asked for. Nothing of it is taken before it is known who gets it. */
struct verb {
  const char *name;
  enum look (*look)(lua_State *L, int i, struct handle *h, struct request *r); /* [-0, +0/1, e] */
  /* or NULL: [-0, +0, -] what `look` has shown */
  void (*take)(lua_State *L, int i, struct handle *h, struct request *r);
  /* [-0, +0, -] who asked is about to wait; false: look again */
  bool (*wait)(lua_State *L, struct handle *h, struct request *r);
  struct link *(*queue)(struct handle *h);
};
struct request {
  const struct verb *verb;
  int data; /* index of a value that it is about, or 0 */
  int what;
  int cost; /* of the slice of ready tasks, if it need not wait; 0: none */
  size_t size, seen, found, skip;
};
/* [-0, +1, m] not libuv's yet */
void *handle_new(lua_State *L, uint32_t tag, const struct handle_class *class, size_t size,
                 int uservalues);
void handle_ignore_broken_pipes(void);                 /* SIGPIPE. No Lua. */
void handle_opened(struct handle *h, uv_handle_t *uv); /* after uv_…_init. No Lua. */
void handle_close(struct handle *h);                   /* at once. No Lua; then handle_changed */
void handle_closed(struct handle *h);                  /* by on_close. No Lua. */
void handle_changed(lua_State *L, int i);              /* [-0, +0, -] of the one at i */
/* [-0, +0, -] the same: a waiter has come, or `gone` has left */
void handle_moved(lua_State *L, int i, struct nap *gone);
/* [-0, +0, -] one that waited for any of them does so no more */
void handle_look_again(lua_State *L, struct runtime *rt);
void handle_await(struct handle *h, bool awaited); /* whether it keeps the loop alive. No Lua. */
void handle_news(struct handle *h);                /* it will land. No Lua. */
void handle_land(lua_State *L, int i);
int64_t handle_left(struct handle *h); /* a waiter has given up: a number for it, or -1. No Lua. */
/* [-0, +0, m] that number, of the operation at i, to its error on top */
void handle_tell_written(lua_State *L, int i);
/* x(…) with the arguments 1 … k, the last one the token */
int handle_ask(lua_State *L, struct handle *h, struct request *r, int k, lua_CFunction f);
/* an answer that need not wait costs a part of the slice; true: there is no more of it. No Lua. */
static inline bool handle_spend(struct runtime *rt, int cost) {
  rt->slice -= cost;
  if (rt->slice > 0 || cost == 0) return false;
  rt->slice = 0;
  return true;
}
enum { COST_BYTES = 16384 }; /* so many cost as much as an answer by itself */
static inline int handle_cost(size_t bytes) {
  return 1 + (int)(bytes < (size_t)COST_BYTES << 10 ? bytes / COST_BYTES : 1 << 10);
}
/* [-1, …, e] gives the value, or the error, on top to the running fiber when it is its turn again */
int handle_give_way(lua_State *L, struct runtime *rt, bool failed);
static inline int handle_return(lua_State *L, struct runtime *rt, int cost) { /* … if it must */
  return handle_spend(rt, cost) ? handle_give_way(L, rt, false) : 1;
}
/* suspends the running fiber, with the handle and nil on its stack */
int handle_wait(lua_State *L, struct handle *h, struct link *q, bool deaf);
int handle_ask_async(lua_State *L, struct handle *h, struct request *r, int k); /* its twin */
/* [-0, +0, m] those who wait for it, as far as it is there */
void handle_answer(lua_State *L, int i, struct handle *h, struct request *r);
void handle_refuse(lua_State *L, int i, struct link *q); /* [-1, +0, m] all in q, with that error */
int handle_gc(lua_State *L);
void handle_close_all(struct runtime *rt); /* the state is closing */
/* [-0, +1, m] an IO error */
void handle_push_code(lua_State *L, const char *code, const char *syscall, const char *format, ...);
void handle_push_disposed(lua_State *L, const struct handle *h); /* [-0, +1, m] */

/* ---- uvstream.c, uvread.c, listener.c, tcp.c, udp.c ---- */

struct stream;
enum stream_kind { STREAM_TCP, STREAM_PIPE, STREAM_FD };        /* FD: what libuv cannot poll */
struct stream *stream_new(lua_State *L, enum stream_kind kind); /* [-0, +1, m] not libuv's yet */
int stream_init(struct stream *s);                              /* a status of libuv. No Lua. */
int stream_adopt(struct stream *s, int fd); /* the same, of a descriptor, which it owns. No Lua. */
uv_stream_t *stream_uv(struct stream *s);
int stream_lend(struct stream *s);       /* what a child gets: as file_lend. No Lua. */
void stream_take_back(struct stream *s); /* there is no child. No Lua. */
void stream_connected(struct stream *s); /* it is for its user now. No Lua; then handle_changed */
void stream_open(lua_State *L);
void read_free(struct runtime *rt); /* the state is closed */
struct listener;
struct listener *listener_new(lua_State *L, enum stream_kind kind); /* [-0, +1, m] */
/* a status of libuv; it owns fd, and the path if any. No Lua. */
int listener_adopt(struct listener *l, int fd, const char *path);

void listener_open(lua_State *L); /* [-0, +0, m] into the table of coflow.net on top */
bool address_parse(const char *host, int port, struct sockaddr_storage *to); /* a numeric one */
/* of either family: what the system is told of its length; its port, in the order of the net */
static inline socklen_t address_length(const struct sockaddr_storage *a) {
  return a->ss_family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6);
}
static inline in_port_t *address_port(struct sockaddr_storage *a) {
  return a->ss_family == AF_INET ? &((struct sockaddr_in *)(void *)a)->sin_port
                                 : &((struct sockaddr_in6 *)(void *)a)->sin6_port;
}
int address_socket(int family, int type); /* a descriptor, or an error of libuv. No Lua. */
enum { ADDRESS_SIZE = 80 };               /* of an address of IPv6, '%' and an interface */
/* the link-local ones with their interface, "fe80::1%eth0", without which they are nobody's. No Lua. */
bool address_name6(const struct sockaddr_in6 *a, char name[ADDRESS_SIZE]);
/* [-0, +0/1, m] "host:port" */
bool address_push(lua_State *L, const struct sockaddr_storage *from);

extern const struct part tcp_part;
extern const struct part udp_part;

/* ---- stdio.c: the standard streams ---- */

ONCE void stdio_guard(void); /* nothing else gets the descriptors 0, 1 and 2 */
int stdio_end(int fd);       /* what is written to it is over. A status of libuv. No Lua. */
bool stdio_sends(const struct runtime *rt); /* one of them has something to send yet. No Lua. */
extern const struct part stdio_part;

/* ---- signal.c ---- */

const char *signal_name(int number); /* "SIGTERM"; NULL: it has none */
int signal_number(const char *name); /* 0: no such signal */
bool signal_is_caught(const struct runtime *rt, int number);
void signal_land(lua_State *L, int i);
void signal_end_all(struct runtime *rt);            /* the state is closing. No Lua. */
void signal_free(lua_State *L, struct runtime *rt); /* [-0, +0, -] when the loop is closed */
extern const struct part signal_part;

/* ---- process.c ---- */

bool process_is_child(const uv_handle_t *h); /* it is one that runs, and is not detached */
void process_end_all(struct runtime *rt); /* the state is closing: ends those that run. No Lua. */
extern const struct part process_part;

#pragma GCC visibility pop
#endif
