/*
** job.c - jobs: operations of files in a thread of libuv's pool.
**
** A job is one function that makes plain system calls, one after another (`run`, in the thread), however
** many the operation takes: reading a whole file is one trip to the pool, not four. It looks at `stop`
** between them; a job that was canceled before a thread took it never runs. What it may touch there
** are its own fields, the strings that it was given (held by user values) and, if it is about an open
** file, that file.
**
** Reads and writes of pipes and terminals wait in poll, as does who opens a FIFO for writing, and look
** at `stop`: each has a thread of the pool meanwhile, but once it is stopped no thread stays where
** nobody may ever come. A test's clock must know of these, which may wait for ever, as no file
** operation else does: the thread says so in `phase`, and the loop looks (jobs_work).
**
** SPDX-License-Identifier: MIT
*/
#include "job.h"

#include <poll.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- in the thread: no Lua, no loop ---- */

/* The process ends, by os.exit, with the state open: libuv then waits for its threads. This is set
** first, as that which depends on another library is taken down before it. */
static atomic_bool exiting;
__attribute__((destructor)) static void leave(void) { atomic_store(&exiting, true); }

bool job_stops(struct job *j) { return atomic_load(&j->stop) || atomic_load(&exiting); }

ssize_t job_checked(struct job *j, const char *syscall, ssize_t result) {
  if (result >= 0) return result;
  j->io.syscall = syscall;
  return job_error();
}

bool bytes_reserve(struct bytes *b, size_t more) {
  if (b->size - b->length >= more) return true;
  size_t size = b->size * 2 > b->length + more ? b->size * 2 : b->length + more;
  char *at = realloc(b->at, size);
  if (at == NULL) return false;
  b->at = at;
  b->size = size;
  return true;
}

ssize_t job_read_some(int fd, char *to, size_t n, int64_t offset) {
  ssize_t got;
  do got = offset < 0 ? read(fd, to, n) : pread(fd, to, n, offset);
  while (got < 0 && errno == EINTR);
  return got;
}

int job_wait(struct job *j, int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  int n = 0;
  for (int ms = 0; n == 0 && !job_stops(j); ms = LOOK_MS) {
    if (ms > 0) atomic_store(&j->phase, JOB_WAITS);
    n = poll(&p, 1, ms);
    if (n < 0 && errno == EINTR) n = 0;
  }
  atomic_store(&j->phase, JOB_WORKS);
  if (n < 0) return job_error();
  return n > 0 ? 0 : UV_ECANCELED;
}

ssize_t job_write_all(struct job *j, int fd, const char *data, size_t n, int64_t offset,
                      bool plain) {
  size_t done = 0;
  while (done < n) {
    size_t chunk = n - done < BIG_CHUNK ? n - done : BIG_CHUNK;
    if (job_stops(j)) return UV_ECANCELED;
    if (!plain) {
      int status = job_wait(j, fd, POLLOUT);
      if (status < 0) return status;
      if (chunk > 4096) chunk = 4096; /* what a pipe that can be written takes without waiting */
    }
    ssize_t put = offset < 0 ? write(fd, data + done, chunk)
                             : pwrite(fd, data + done, chunk, offset + (int64_t)done);
    if (put >= 0)
      done += (size_t)put;
    else if (errno != EINTR)
      return job_checked(j, "write", put);
  }
  return (ssize_t)done;
}

ssize_t job_read_to_end(struct job *j, int fd, struct bytes *b, int64_t offset, int64_t limit,
                        bool plain) {
  struct stat s;
  size_t hint = CHUNK, start = b->length;
  if (plain && fstat(fd, &s) == 0 && S_ISREG(s.st_mode) && s.st_size > offset)
    hint = (size_t)(s.st_size - (offset < 0 ? 0 : offset)) + 1;
  if (limit >= 0) {
    if ((int64_t)b->length > limit) return UV_EMSGSIZE;
    if ((int64_t)hint > limit) hint = (size_t)limit + 1;
  }
  for (;; hint = 1) {
    if (job_stops(j)) return UV_ECANCELED;
    if (!bytes_reserve(b, hint)) return UV_ENOMEM;
    if (!plain) {
      int status = job_wait(j, fd, POLLIN);
      if (status < 0) return status;
    }
    size_t room = b->size - b->length;
    ssize_t got = job_read_some(fd, b->at + b->length, room < 8 * BIG_CHUNK ? room : 8 * BIG_CHUNK,
                                offset < 0 ? -1 : offset + (int64_t)(b->length - start));
    if (got <= 0) return job_checked(j, "read", got);
    b->length += (size_t)got;
    if (limit >= 0 && (int64_t)b->length > limit) return UV_EMSGSIZE;
  }
}

/* ---- libuv side: no Lua below this line until the Lua face; on_run is in the thread still ---- */

static void on_run(uv_work_t *work) {
  struct job *j = container_of(work, struct job, work);
  atomic_store(&j->phase, JOB_WORKS);
  j->result = job_stops(j) ? UV_ECANCELED : j->run(j);
}

static void on_job(uv_work_t *work, int status) {
  struct job *j = container_of(work, struct job, work);
  io_done(&j->io, status < 0 ? status : j->result);
}

int job_start(struct job *j) {
  j->started = true;
  if (j->data != NULL) handle_ignore_broken_pipes(); /* it may write, to a FIFO as well */
  return uv_queue_work(loop_uv(j->io.rt), &j->work, on_run, on_job);
}

/* One that has no thread yet will soon get one; but if others wait, they may have all of them. */
bool jobs_work(const struct runtime *rt, unsigned *patient) {
  unsigned waiting = 0, queued = 0;
  for (const struct link *l = rt->flights.next; l != &rt->flights; l = l->next) {
    struct io *op = container_of(l, struct io, flight);
    struct job *j = (struct job *)(void *)op;
    if (op->class->abort != job_abort || !j->started) continue;
    unsigned char phase = atomic_load(&j->phase);
    if (phase == JOB_WORKS || atomic_load(&j->stop)) return true;
    phase == JOB_WAITS ? waiting++ : queued++;
  }
  if (waiting == 0 && queued > 0) return true;
  *patient = waiting + queued;
  return false;
}

void job_abort(struct io *op) {
  struct job *j = (struct job *)(void *)op;
  if (j->certain) return;
  atomic_store(&j->stop, true);
  if (j->started)
    uv_cancel((uv_req_t *)&j->work); /* or it looks at `stop` */
  else if (j->file != NULL && j->file->running != j) {
    file_leave(j->file, j);
    io_end(op);
  }
}

void job_release(struct io *op) {
  struct job *j = (struct job *)(void *)op;
  struct file *f = j->file;
  if (j->fd >= 0) close(j->fd);
  if (j->made) rmdir(j->bytes.at);
  if (j->fs.fs_type ==
      UV_FS_SCANDIR) { /* libuv frees the last entry only when it is asked for the next */
    uv_dirent_t e;
    while (uv_fs_scandir_next(&j->fs, &e) >= 0)
      ;
  }
  uv_fs_req_cleanup(&j->fs);
  free(j->bytes.at);
  free(j->where);
  j->made = false;
  j->bytes.at = j->where = NULL;
  j->fd = -1;
  if (f == NULL || f->running != j) return;
  file_next(f);
  if (f->running == NULL && f->fd < 0) file_close(f);
}

/* ---- results ---- */

void job_fail(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  const char *path = j->where;
  if (path == NULL) {
    lua_getiuservalue(L, 1, IO_PATH);
    path = lua_tostring(L, -1);
  }
  io_push_error(L, (int)op->status, op->syscall ? op->syscall : op->class->syscall, path);
}

int job_land_nothing(lua_State *L, struct io *op) {
  (void)L, (void)op;
  return 0;
}

static const char *type_of(uint64_t mode) {
  switch (mode & S_IFMT) {
    case S_IFREG: return "file";
    case S_IFDIR: return "directory";
    case S_IFLNK: return "link";
    case S_IFIFO: return "fifo";
    case S_IFSOCK: return "socket";
    case S_IFCHR: return "char";
    case S_IFBLK: return "block";
    default: return "unknown";
  }
}

static void set_integer(lua_State *L, const char *name, uint64_t n) {
  lua_pushinteger(L, (lua_Integer)n);
  lua_setfield(L, -2, name);
}

static void set_time(lua_State *L, const char *name, const uv_timespec_t *t) {
  lua_pushnumber(L, (lua_Number)t->tv_sec + (lua_Number)t->tv_nsec / 1e9);
  lua_setfield(L, -2, name);
}

int job_land_stat(lua_State *L, struct io *op) {
  const uv_stat_t *s = &as_job(op)->fs.statbuf;
  lua_createtable(L, 0, 14);
  lua_pushstring(L, type_of(s->st_mode));
  lua_setfield(L, -2, "type");
  set_integer(L, "size", s->st_size);
  set_integer(L, "mode", s->st_mode & 07777);
  set_integer(L, "uid", s->st_uid);
  set_integer(L, "gid", s->st_gid);
  set_integer(L, "ino", s->st_ino);
  set_integer(L, "dev", s->st_dev);
  set_integer(L, "nlink", s->st_nlink);
  set_integer(L, "blocks", s->st_blocks);
  set_time(L, "atime", &s->st_atim);
  set_time(L, "mtime", &s->st_mtim);
  set_time(L, "ctime", &s->st_ctim);
  set_time(L, "birthtime", &s->st_birthtim);
  return 1;
}

/* ---- Lua face: starting ---- */

struct job *job_begin(lua_State *L, int k, const struct io_class *class,
                      ssize_t (*run)(struct job *)) {
  struct job *j = (struct job *)(void *)io_begin(L, k, class, sizeof *j, JOB_DATA);
  if (j == NULL) return NULL;
  j->run = run;
  j->fd = -1;
  j->result = UV_ECANCELED;
  return j;
}

int job_started(lua_State *L, struct job *j) {
  return j == NULL ? 1 : io_started(L, &j->io, job_start(j));
}

void job_give_data(lua_State *L, struct job *j, int i) {
  j->data = j->to = lua_tolstring(L, i, &j->length);
  lua_pushvalue(L, i);
  lua_setiuservalue(L, -2, JOB_DATA);
}

int64_t job_check_size(lua_State *L, int i) {
  lua_Integer n = luaL_checkinteger(L, i);
  luaL_argcheck(L, n >= 0, i, "must not be negative");
  return (int64_t)n;
}
