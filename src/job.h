/*
** job.h - what the files of files share: job.c, fs.c (by paths), file.c (open ones).
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_job_h
#define coflow_job_h

#include "io.h"

#include <errno.h>
#include <stdatomic.h>
#include <sys/stat.h>

#pragma GCC visibility push(hidden)

enum { CHUNK = 64 * 1024, BIG_CHUNK = 1 << 20, LOOK_MS = 50 };
enum { FILE_PATH = 1 };                 /* user values of files */
enum { JOB_FILE = IO_FIRST, JOB_DATA }; /* of jobs; the second path is in JOB_DATA */

struct job;
struct file {
  uint32_t tag;
  int fd; /* -1: closed */
  bool seekable, append;
  bool lent;    /* to a child: the position is that of the descriptor */
  bool closing; /* asked for: nothing new is begun */
  int64_t position;
  struct link link; /* in rt->files while it is open */
  struct job *running, *first, *last;
  /* the running job writes, the loop reads when none runs */
  char *buffer;
  size_t at, length, size; /* the bytes read ahead */
  uint32_t epoch;          /* changes whenever bytes of these are read, or dropped; the loop's */
};

struct bytes {
  char *at;
  size_t length, size;
};

enum job_phase { JOB_QUEUED, JOB_WORKS, JOB_WAITS /* for what may never come */ };
struct job {
  struct io io;
  uv_work_t work;
  ssize_t (*run)(struct job *); /* in a thread: a number >= 0 or an error of libuv */
  bool (*ready)(struct job *);  /* of a file's job, or NULL: it can do without a thread */
  atomic_bool stop;             /* loop writes, worker reads */
  atomic_uchar phase;           /* worker writes, loop reads: enum job_phase */
  bool started;                 /* given to libuv */
  bool certain; /* it happens: a cancellation ends the wait for it only, `stop` is never set */
  const char *path, *to, *data;
  size_t length;
  int flags, mode; /* mode: permissions, or the result of fstat */
  int64_t offset, limit;
  ssize_t result;     /* worker writes, loop reads after on_job */
  uv_fs_t fs;         /* the same: what libuv allocates */
  struct bytes bytes; /* the same */
  char *where;        /* the same: the path that the failure is about, if it is not `path` */
  int fd;             /* opened, and not handed over; or -1 */
  bool made;          /* the directory in `bytes`, not handed over */
  struct file *file;
  struct job *next;
};

static inline struct job *as_job(struct io *op) { return (struct job *)(void *)op; }

/* ---- job.c: in the thread ---- */

static inline int job_error(void) { return uv_translate_sys_error(errno); }
static inline bool job_is_plain(mode_t mode) {
  return S_ISREG(mode) || S_ISBLK(mode) || S_ISDIR(mode);
}
bool job_stops(struct job *j); /* nobody wants the result any more */
/* what that call returned, with a failure as an error of libuv */
ssize_t job_checked(struct job *j, const char *syscall, ssize_t result);

bool bytes_reserve(struct bytes *b, size_t more);
int job_wait(struct job *j, int fd, short events); /* until what is not plain can be used */
/* offset < 0, in these three: where the system stands */
ssize_t job_read_some(int fd, char *to, size_t n, int64_t offset);
ssize_t job_write_all(struct job *j, int fd, const char *data, size_t n, int64_t offset,
                      bool plain);
/* UV_EMSGSIZE: more than `limit` bytes, if that is not negative */
ssize_t job_read_to_end(struct job *j, int fd, struct bytes *b, int64_t offset, int64_t limit,
                        bool plain);

/* ---- job.c: on the loop ---- */

#define JOB_CLASS(id, name, syscall, land)                                                         \
  static const struct io_class id = {name, syscall, land, job_abort, job_release, job_fail}

/* [-0, +1, e] with the token at k; NULL: canceled before */
struct job *job_begin(lua_State *L, int k, const struct io_class *class,
                      ssize_t (*run)(struct job *));
/* [-0, +0, -] the string at i is kept for the thread */
void job_give_data(lua_State *L, struct job *j, int i);
int job_started(lua_State *L, struct job *j); /* … starts it, unless it was canceled; returns 1 */
int job_start(struct job *j);                 /* a status of libuv. No Lua. */
void job_abort(struct io *op);
void job_release(struct io *op);
void job_fail(lua_State *L, struct io *op);
int job_land_nothing(lua_State *L, struct io *op);
int job_land_stat(lua_State *L, struct io *op);
int64_t job_check_size(lua_State *L, int i); /* [-0, +0, v] */

/* ---- file.c ---- */

int file_land_open(lua_State *L, struct io *op); /* the File of what a job has opened */
void file_next(struct file *f);                  /* its next job has its turn. No Lua. */
void file_leave(struct file *f, struct job *j);  /* it was waiting. No Lua. */
void file_close(struct file *f);                 /* at once. No Lua. */
bool file_is_open(const struct file *f);
void file_dispose(struct file *f); /* closes one that nobody uses */
void file_open(lua_State *L);
/* [-0, +1, m] next_line(file, token): a line, if it is there */
void file_push_next_line(lua_State *L);

#pragma GCC visibility pop
#endif
