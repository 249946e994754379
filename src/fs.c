/*
** fs.c - files: each operation is a job in a thread of libuv's pool.
**
** A job is one function that makes plain system calls, one after another (`run`, in the thread), however
** many the operation takes: reading a whole file is one trip to the pool, not four. It looks at `stop`
** between them; a job that was canceled before a thread took it never runs. What it may touch there
** are its own fields, the strings that it was given (held by user values) and, if it is about an open
** file, that file.
**
** An open file runs one job after another, in the order they were asked for, so its position, its
** buffer and the order of its writes need no lock; closing is the last of them. The position is
** kept here, not by the system, and moves when a result is handed over: a canceled read loses nothing,
** and a canceled write may be repeated in its place. Bytes that were read ahead stay in the buffer: those
** at the position, which is the kernel's own for what cannot be sought (a pipe, a terminal).
**
** No thread stays where nobody may ever come: reads and writes of pipes and terminals wait in poll, and
** look at `stop`; a FIFO is opened without waiting.
**
** Invariants: file->running is the job that a thread, or the ready list, has; it holds the file. Those after
**             it wait in file->first …; none waits when none runs. A descriptor is closed by the job that
**             opened it (release), by the file's own close job, or by the finalizer, for whom no job is left.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 64 * 1024, BIG_CHUNK = 1 << 20, LOOK_MS = 50 };
enum { FILE_PATH = 1 }; /* user values of files */
enum {
  JOB_FILE = IO_FIRST,
  JOB_DATA,
  JOB_COUNT = JOB_DATA
}; /* of jobs; the second path is in JOB_DATA */

struct job;
struct file {
  uint32_t tag;
  int fd; /* -1: closed */
  bool seekable, append;
  bool closing; /* asked for: nothing new is begun */
  bool doomed;  /* finalized while a job runs, as the state closes */
  int64_t position;
  struct job *running, *first, *last;
  /* the running job writes, the loop reads when none runs */
  char *buffer;
  size_t at, length, size; /* the bytes read ahead */
  bool end;                /* the last read found the end */
};

struct bytes {
  char *at;
  size_t length, size;
};

struct job {
  struct io io;
  uv_work_t work;
  ssize_t (*run)(struct job *); /* in a thread: a number >= 0 or an error of libuv */
  bool (*ready)(struct job *);  /* of a file's job, or NULL: it can do without a thread */
  atomic_bool stop;             /* loop writes, worker reads */
  bool started;                 /* given to libuv */
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

/* ---- in the thread: no Lua, no loop ---- */

static int failure(void) { return uv_translate_sys_error(errno); }

/* what `call` returned, as libuv's errors */
static ssize_t checked(struct job *j, const char *syscall, ssize_t result) {
  if (result >= 0) return result;
  j->io.syscall = syscall;
  return failure();
}

static bool bytes_reserve(struct bytes *b, size_t more) {
  if (b->size - b->length >= more) return true;
  size_t size = b->size * 2 > b->length + more ? b->size * 2 : b->length + more;
  char *at = realloc(b->at, size);
  if (at == NULL) return false;
  b->at = at;
  b->size = size;
  return true;
}

static ssize_t read_some(int fd, char *to, size_t n, int64_t offset) {
  ssize_t got;
  do got = offset < 0 ? read(fd, to, n) : pread(fd, to, n, offset);
  while (got < 0 && errno == EINTR);
  return got;
}

/* waits until something that is no plain file can be read, or written */
static int wait_for(struct job *j, int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  while (!atomic_load(&j->stop)) {
    int n = poll(&p, 1, LOOK_MS);
    if (n > 0) return 0;
    if (n < 0 && errno != EINTR) return failure();
  }
  return UV_ECANCELED;
}

/* writes all of it; offset < 0: where the system stands */
static ssize_t write_all(struct job *j, int fd, const char *data, size_t n, int64_t offset,
                         bool plain) {
  size_t done = 0;
  while (done < n) {
    size_t chunk = n - done < BIG_CHUNK ? n - done : BIG_CHUNK;
    if (atomic_load(&j->stop)) return UV_ECANCELED;
    if (!plain) {
      int status = wait_for(j, fd, POLLOUT);
      if (status < 0) return status;
      if (chunk > 4096) chunk = 4096; /* what a pipe that can be written takes without waiting */
    }
    ssize_t put = offset < 0 ? write(fd, data + done, chunk)
                             : pwrite(fd, data + done, chunk, offset + (int64_t)done);
    if (put >= 0)
      done += (size_t)put;
    else if (errno != EINTR)
      return checked(j, "write", put);
  }
  return (ssize_t)done;
}

/* reads to the end; more than `limit` bytes: EMSGSIZE */
static ssize_t read_to_end(struct job *j, int fd, struct bytes *b, int64_t offset, int64_t limit,
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
    if (atomic_load(&j->stop)) return UV_ECANCELED;
    if (!bytes_reserve(b, hint)) return UV_ENOMEM;
    if (!plain) {
      int status = wait_for(j, fd, POLLIN);
      if (status < 0) return status;
    }
    size_t room = b->size - b->length;
    ssize_t got = read_some(fd, b->at + b->length, room < 8 * BIG_CHUNK ? room : 8 * BIG_CHUNK,
                            offset < 0 ? -1 : offset + (int64_t)(b->length - start));
    if (got <= 0) return checked(j, "read", got);
    b->length += (size_t)got;
    if (limit >= 0 && (int64_t)b->length > limit) return UV_EMSGSIZE;
  }
}

static bool plain(mode_t mode) { return S_ISREG(mode) || S_ISBLK(mode) || S_ISDIR(mode); }

/* Opening the writing end of a FIFO would wait for a reader, where nobody can be told to leave. */
static ssize_t open_fifo(struct job *j) {
  for (;;) {
    int fd = open(j->path, j->flags | O_NONBLOCK | O_CLOEXEC);
    if (fd >= 0) {
      int flags = fcntl(fd, F_GETFL);
      if (flags >= 0) fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
      return fd;
    }
    if (errno != ENXIO) return failure();
    if (atomic_load(&j->stop)) return UV_ECANCELED;
    poll(NULL, 0, LOOK_MS / 5);
  }
}

static ssize_t run_open(struct job *j) {
  struct stat s;
  if (stat(j->path, &s) == 0 && S_ISFIFO(s.st_mode))
    j->fd = (int)open_fifo(j);
  else
    j->fd = uv_fs_open(NULL, &j->fs, j->path, j->flags, 0666, NULL);
  if (j->fd < 0) {
    int error = j->fd;
    j->fd = -1;
    return error;
  }
  if (fstat(j->fd, &s) != 0) return checked(j, "fstat", -1);
  j->mode = (int)s.st_mode;
  return 0;
}

/* the descriptor that the job has opened; a failed close is a failure of what was written */
static ssize_t close_own(struct job *j, ssize_t result) {
  int fd = j->fd;
  j->fd = -1;
  if (close(fd) != 0 && errno != EINTR && errno != EINPROGRESS && result >= 0)
    return checked(j, "close", -1);
  return result;
}

static ssize_t run_read_file(struct job *j) {
  ssize_t status = run_open(j);
  if (status < 0) {
    if (j->io.syscall == NULL) j->io.syscall = "open";
    return status;
  }
  return close_own(j, read_to_end(j, j->fd, &j->bytes, -1, -1, plain((mode_t)j->mode)));
}

static ssize_t run_write_file(struct job *j) {
  ssize_t status = run_open(j);
  if (status < 0) {
    if (j->io.syscall == NULL) j->io.syscall = "open";
    return status;
  }
  return close_own(j, write_all(j, j->fd, j->data, j->length, -1, plain((mode_t)j->mode)));
}

/* the directory of a path, with its slash; "" is the current one */
static size_t directory_of(const char *path) {
  const char *slash = strrchr(path, '/');
  return slash == NULL ? 0 : (size_t)(slash - path) + 1;
}

/* creates a file of an unused name beside `target`, in j->fd; its name is in `name` */
static ssize_t open_beside(struct job *j, const char *target, char **name) {
  static atomic_uint serial;
  size_t dir = directory_of(target);
  *name = malloc(dir + 64);
  if (*name == NULL) return UV_ENOMEM;
  memcpy(*name, target, dir);
  for (int tries = 0; tries < 100; tries++) {
    snprintf(*name + dir, 64, ".coflow-%lx-%x-%llx", (unsigned long)getpid(),
             atomic_fetch_add(&serial, 1), (unsigned long long)uv_hrtime());
    j->fd = open(*name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (j->fd >= 0 || errno != EEXIST) break;
  }
  if (j->fd >= 0) return 0;
  ssize_t status = checked(j, "open", -1);
  free(*name);
  *name = NULL;
  return status;
}

/* the entry in its directory survives a crash as well, where directories can be synchronized */
static void sync_directory(const char *path) {
  size_t n = directory_of(path);
  char *dir = malloc(n + 2);
  if (dir == NULL) return;
  memcpy(dir, path, n);
  strcpy(dir + n, ".");
  int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  free(dir);
  if (fd < 0) return;
  fsync(fd);
  close(fd);
}

/* Beside the target, then in its place: at every instant the target is whole, the old one or the new one. */
static ssize_t replace(struct job *j, const char *target) {
  struct stat old;
  char *name;
  ssize_t status = open_beside(j, target, &name);
  if (status < 0) return status;
  if (stat(target, &old) == 0 && fchmod(j->fd, old.st_mode & 07777) != 0)
    status = checked(j, "chmod", -1);
  if (status >= 0) status = write_all(j, j->fd, j->data, j->length, -1, true);
  if (status >= 0 && fsync(j->fd) != 0) status = checked(j, "fsync", -1);
  status = close_own(j, status);
  if (status >= 0 && atomic_load(&j->stop)) status = UV_ECANCELED;
  if (status >= 0) status = checked(j, "rename", rename(name, target));
  if (status < 0)
    unlink(name);
  else
    sync_directory(target);
  free(name);
  return status;
}

static ssize_t run_replace(struct job *j) {
  char *real = realpath(j->path, NULL); /* a link stays one */
  ssize_t status = replace(j, real ? real : j->path);
  free(real);
  return status;
}

static ssize_t run_stat(struct job *j) { return uv_fs_stat(NULL, &j->fs, j->path, NULL); }
static ssize_t run_lstat(struct job *j) { return uv_fs_lstat(NULL, &j->fs, j->path, NULL); }
static ssize_t run_access(struct job *j) {
  int status = uv_fs_access(NULL, &j->fs, j->path, j->mode, NULL);
  j->mode = status; /* a refusal is an answer */
  return 0;
}
static ssize_t run_chmod(struct job *j) {
  return uv_fs_chmod(NULL, &j->fs, j->path, j->mode, NULL);
}
static ssize_t run_truncate(struct job *j) {
  return checked(j, "truncate", truncate(j->path, (off_t)j->offset));
}
static ssize_t run_symlink(struct job *j) {
  return uv_fs_symlink(NULL, &j->fs, j->to, j->path, 0, NULL);
}
static ssize_t run_readlink(struct job *j) { return uv_fs_readlink(NULL, &j->fs, j->path, NULL); }
static ssize_t run_realpath(struct job *j) { return uv_fs_realpath(NULL, &j->fs, j->path, NULL); }
static ssize_t run_rename(struct job *j) {
  return uv_fs_rename(NULL, &j->fs, j->path, j->to, NULL);
}

static ssize_t run_mkdtemp(struct job *j) {
  size_t n = strlen(j->path);
  if (!bytes_reserve(&j->bytes, n + 7)) return UV_ENOMEM;
  memcpy(j->bytes.at, j->path, n);
  memcpy(j->bytes.at + n, "XXXXXX", 7);
  j->bytes.length = n + 6;
  if (mkdtemp(j->bytes.at) == NULL) return failure();
  j->made = true;
  return 0;
}

static ssize_t run_scandir(struct job *j) { return uv_fs_scandir(NULL, &j->fs, j->path, 0, NULL); }

static bool is_directory(const char *path) {
  struct stat s;
  return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

static ssize_t run_mkdir(struct job *j) {
  if (mkdir(j->path, (mode_t)j->mode) == 0) return 0;
  if (!j->flags) return failure(); /* not recursive */
  if (errno == EEXIST && is_directory(j->path)) return 0;
  if (errno != ENOENT || *j->path == '\0') return failure();
  char *path = strdup(j->path);
  if (path == NULL) return UV_ENOMEM;
  ssize_t status = 0;
  for (char *end = path; status == 0 && *end != '\0';) {
    while (*end == '/') end++;
    while (*end != '/' && *end != '\0') end++;
    char c = *end;
    *end = '\0';
    if (atomic_load(&j->stop))
      status = UV_ECANCELED;
    else if (mkdir(path, (mode_t)j->mode) != 0 && !(errno == EEXIST && is_directory(path))) {
      status = failure();
      j->where = strdup(path);
    }
    *end = c;
  }
  free(path);
  return status;
}

/* what `name` in the directory `dir` is about to fail with: errors tell the whole path, in j->bytes */
static ssize_t refused(struct job *j, const char *syscall) {
  ssize_t status = checked(j, syscall, -1);
  if (j->where == NULL) j->where = strdup(j->bytes.at);
  return status;
}

static bool path_append(struct bytes *path, const char *name) {
  size_t n = strlen(name);
  if (!bytes_reserve(path, n + 2)) return false;
  if (path->length > 0 && path->at[path->length - 1] != '/') path->at[path->length++] = '/';
  memcpy(path->at + path->length, name, n + 1);
  path->length += n;
  return true;
}

/* Removes `name` in the directory dir and all that is below. By descriptors: a directory that somebody
** replaces by a link meanwhile leads nowhere else. j->bytes is its path, for errors. */
static ssize_t remove_below(struct job *j, int dir, const char *name) {
  if (atomic_load(&j->stop)) return UV_ECANCELED;
  if (unlinkat(dir, name, 0) == 0) return 0;
  int error = errno;
  if (error != EISDIR && error != EPERM) return refused(j, "unlink");
  int fd = openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
  if (fd < 0) {
    if (error == EPERM && (errno == ENOTDIR || errno == ELOOP)) errno = EPERM; /* no directory */
    return refused(j, "unlink");
  }
  ssize_t status = 0;
  DIR *list = fdopendir(fd);
  if (list == NULL) {
    status = refused(j, "opendir");
    close(fd);
    return status;
  }
  size_t length = j->bytes.length;
  while (status == 0) {
    errno = 0;
    const struct dirent *e = readdir(list);
    if (e == NULL) {
      if (errno != 0) status = refused(j, "readdir");
      break;
    }
    if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0) continue;
    status = path_append(&j->bytes, e->d_name) ? remove_below(j, fd, e->d_name) : UV_ENOMEM;
    j->bytes.length = length;
    j->bytes.at[length] = '\0';
  }
  closedir(list);
  if (status == 0 && unlinkat(dir, name, AT_REMOVEDIR) != 0) status = refused(j, "rmdir");
  return status;
}

static ssize_t run_remove(struct job *j) {
  if (j->flags) {
    if (!path_append(&j->bytes, j->path)) return UV_ENOMEM;
    return remove_below(j, AT_FDCWD, j->path);
  }
  if (unlink(j->path) == 0) return 0;
  int error = errno;
  if (error != EISDIR && error != EPERM) return failure();
  if (rmdir(j->path) == 0) return 0;
  if (errno == ENOTDIR) errno = error;
  return checked(j, errno == error ? "unlink" : "rmdir", -1);
}

static ssize_t run_copy(struct job *j) {
  struct stat from, to;
  int in = open(j->path, O_RDONLY | O_CLOEXEC);
  if (in < 0) return checked(j, "open", -1);
  ssize_t status = checked(j, "fstat", fstat(in, &from));
  if (status >= 0 && S_ISDIR(from.st_mode)) {
    errno = EISDIR;
    status = checked(j, "copy", -1);
  }
  bool same = status >= 0 && stat(j->to, &to) == 0 && to.st_dev == from.st_dev &&
              to.st_ino == from.st_ino; /* nothing to do, and truncating it would be the end */
  if (status >= 0 && !same) {
    j->fd = open(j->to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, from.st_mode & 0777);
    if (j->fd < 0) {
      status = checked(j, "open", -1);
      j->where = strdup(j->to);
    }
  }
  if (j->fd >= 0) {
    bool made = true;
    if (fstat(j->fd, &to) == 0 && S_ISREG(to.st_mode)) {
      if (fchmod(j->fd, from.st_mode & 07777) != 0 && errno != EPERM)
        status = checked(j, "chmod", -1);
    } else
      made = false; /* a device: nothing to remove */
    for (ssize_t n = 1; status >= 0 && n > 0;) {
      uv_fs_t fs;
      if (atomic_load(&j->stop)) {
        status = UV_ECANCELED;
        break;
      }
      n = uv_fs_sendfile(NULL, &fs, j->fd, in, j->offset, 8 * BIG_CHUNK, NULL);
      uv_fs_req_cleanup(&fs);
      if (n < 0) {
        status = n;
        j->io.syscall = "sendfile";
      } else
        j->offset += n;
    }
    status = close_own(j, status);
    if (status < 0 && made) unlink(j->to);
  }
  close(in);
  return status < 0 ? status : 0;
}

/* ---- in the thread: jobs of an open file ---- */

/* reads ahead: one read more into the buffer, whose start it may move */
static ssize_t fill(struct job *j, size_t wanted) {
  struct file *f = j->file;
  if (atomic_load(&j->stop)) return UV_ECANCELED;
  if (f->at > 0) {
    memmove(f->buffer, f->buffer + f->at, f->length);
    f->at = 0;
  }
  struct bytes b = {f->buffer, f->length, f->size};
  bool room = bytes_reserve(&b, wanted);
  f->buffer = b.at;
  f->size = b.size;
  if (!room) return UV_ENOMEM;
  if (!f->seekable) {
    int status = wait_for(j, f->fd, POLLIN);
    if (status < 0) return status;
  }
  ssize_t got = read_some(f->fd, f->buffer + f->length, wanted,
                          f->seekable ? f->position + (int64_t)f->length : -1);
  if (got < 0) return failure();
  f->end = got == 0;
  f->length += (size_t)got;
  return got;
}

static ssize_t run_read(struct job *j) {
  return fill(j, j->limit > 0 && j->limit < CHUNK ? CHUNK
                 : j->limit < 64 * BIG_CHUNK      ? (size_t)j->limit
                                                  : 64 * BIG_CHUNK);
}

static ssize_t run_read_all(struct job *j) {
  struct file *f = j->file;
  if (f->at > 0) {
    memmove(f->buffer, f->buffer + f->at, f->length);
    f->at = 0;
  }
  struct bytes b = {f->buffer, f->length, f->size};
  int64_t offset = f->seekable ? f->position + (int64_t)f->length : -1;
  ssize_t status = read_to_end(j, f->fd, &b, offset, j->limit, f->seekable);
  f->buffer = b.at;
  f->length = b.length;
  f->size = b.size;
  return status;
}

/* the length of the first line, with its end, from `from` on; 0: not yet there */
static size_t line_in(const struct file *f, size_t from) {
  const char *start = f->buffer + f->at;
  const char *end = f->length > from ? memchr(start + from, '\n', f->length - from) : NULL;
  return end ? (size_t)(end - start) + 1 : 0;
}

static bool line_too_long(const struct job *j, size_t length) {
  return j->limit >= 0 && (int64_t)length > j->limit;
}

static ssize_t run_read_line(struct job *j) {
  struct file *f = j->file;
  for (;;) {
    size_t seen = f->length;
    ssize_t got = fill(j, CHUNK);
    if (got < 0) return got;
    size_t line = line_in(f, seen);
    if (line > 0 || got == 0)
      return line_too_long(j, line ? line - 1 : f->length) ? UV_EMSGSIZE : 0;
    if (line_too_long(j, f->length)) return UV_EMSGSIZE;
  }
}

static ssize_t run_write(struct job *j) {
  struct file *f = j->file;
  bool positioned = f->seekable && !f->append;
  ssize_t status =
      write_all(j, f->fd, j->data, j->length, positioned ? f->position : -1, f->seekable);
  if (status >= 0 && f->append && f->seekable) { /* it stands behind what was written */
    j->offset = (int64_t)lseek(f->fd, 0, SEEK_CUR);
    if (j->offset < 0) return checked(j, "lseek", -1);
  } else
    j->offset = f->position + (int64_t)j->length;
  return status;
}

static ssize_t run_seek(struct job *j) {
  if (!j->file->seekable) return UV_ESPIPE;
  struct stat s;
  if (fstat(j->file->fd, &s) != 0) return failure();
  int64_t size = S_ISBLK(s.st_mode) ? (int64_t)lseek(j->file->fd, 0, SEEK_END) : (int64_t)s.st_size;
  if (j->offset > 0 && size > INT64_MAX - j->offset) return UV_EINVAL;
  j->offset += size;
  return j->offset < 0 ? UV_EINVAL : 0;
}

static ssize_t run_sync(struct job *j) { return fsync(j->file->fd) == 0 ? 0 : failure(); }
static ssize_t run_fstat(struct job *j) { return uv_fs_fstat(NULL, &j->fs, j->file->fd, NULL); }
static ssize_t run_ftruncate(struct job *j) {
  return ftruncate(j->file->fd, (off_t)j->offset) == 0 ? 0 : failure();
}

static ssize_t run_close(struct job *j) {
  int fd = j->file->fd;
  j->file->fd = -1;
  return close(fd) == 0 || errno == EINTR || errno == EINPROGRESS ? 0 : failure();
}

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void on_run(uv_work_t *work) {
  struct job *j = container_of(work, struct job, work);
  j->result = atomic_load(&j->stop) ? UV_ECANCELED : j->run(j);
}

static void on_job(uv_work_t *work, int status) {
  struct job *j = container_of(work, struct job, work);
  io_done(&j->io, status < 0 ? status : j->result);
}

static int job_start(struct job *j) {
  j->started = true;
  return uv_queue_work(loop_uv(j->io.rt), &j->work, on_run, on_job);
}

/* the next job of the file has its turn; one that needs no thread is done */
static void file_next(struct file *f) {
  struct job *j = f->first;
  f->running = j;
  if (j == NULL) return;
  f->first = j->next;
  if (f->first == NULL) f->last = NULL;
  if (j->ready != NULL && j->ready(j)) {
    io_done(&j->io, 0);
    return;
  }
  int status = job_start(j);
  if (status < 0) io_done(&j->io, status);
}

static void file_leave(struct file *f, struct job *j) { /* it was waiting */
  struct job **at = &f->first, *before = NULL;
  for (; *at != j; at = &(*at)->next) before = *at;
  *at = j->next;
  if (f->last == j) f->last = before;
}

static void file_close(struct file *f) {
  if (f->fd >= 0) close(f->fd);
  f->fd = -1;
  free(f->buffer);
  f->buffer = NULL;
  f->at = f->length = f->size = 0;
}

static void job_abort(struct io *op) {
  struct job *j = (struct job *)(void *)op;
  if (j->run == run_close) return; /* once asked for it happens */
  atomic_store(&j->stop, true);
  if (j->started)
    uv_cancel((uv_req_t *)&j->work); /* or it looks at `stop` */
  else if (j->file != NULL && j->file->running != j) {
    file_leave(j->file, j);
    io_end(op);
  }
}

static void job_release(struct io *op) {
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
  if (f->running == NULL && (f->doomed || f->fd < 0)) file_close(f);
}

/* ---- results ---- */

static struct job *as_job(struct io *op) { return (struct job *)(void *)op; }

static void job_fail(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  const char *path = j->where;
  if (path == NULL) {
    lua_getiuservalue(L, 1, IO_PATH);
    path = lua_tostring(L, -1);
  }
  io_push_error(L, (int)op->status, op->syscall ? op->syscall : op->class->syscall, path);
}

static int land_nothing(lua_State *L, struct io *op) {
  (void)L, (void)op;
  return 0;
}

static int land_bytes(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  lua_pushlstring(L, j->bytes.at ? j->bytes.at : "", j->bytes.length);
  return 1;
}

static int land_mkdtemp(lua_State *L, struct io *op) {
  land_bytes(L, op);
  as_job(op)->made = false;
  return 1;
}

static int land_text(lua_State *L, struct io *op) {
  lua_pushstring(L, (const char *)as_job(op)->fs.ptr);
  return 1;
}

static int land_access(lua_State *L, struct io *op) {
  int status = as_job(op)->mode;
  char code[32];
  lua_pushboolean(L, status >= 0);
  if (status >= 0) return 1;
  lua_pushstring(L, uv_err_name_r(status, code, sizeof code));
  return 2;
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

static int land_stat(lua_State *L, struct io *op) {
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

/* upvalues: { name, type, name, type … }, how many of them are told */
static int l_next_entry(lua_State *L) {
  lua_Integer n = lua_tointeger(L, lua_upvalueindex(2));
  lua_rawgeti(L, lua_upvalueindex(1), n + 1);
  lua_rawgeti(L, lua_upvalueindex(1), n + 2);
  if (lua_isnil(L, -1)) return 1;
  lua_pushinteger(L, n + 2);
  lua_replace(L, lua_upvalueindex(2));
  return 2;
}

static int land_scandir(lua_State *L, struct io *op) {
  static const char *const types[] = {"unknown", "file",   "directory", "link",
                                      "fifo",    "socket", "char",      "block"};
  struct job *j = as_job(op);
  uv_dirent_t e;
  lua_Integer n = 0;
  lua_newtable(L);
  while (uv_fs_scandir_next(&j->fs, &e) != UV_EOF) {
    lua_pushstring(L, e.name);
    lua_rawseti(L, -2, ++n);
    lua_pushstring(L, types[e.type <= UV_DIRENT_BLOCK ? e.type : 0]);
    lua_rawseti(L, -2, ++n);
  }
  lua_pushinteger(L, 0);
  lua_pushcclosure(L, l_next_entry, 2);
  return 1;
}

static int land_open(lua_State *L, struct io *op) {
  struct job *j = as_job(op);
  struct file *f = (struct file *)object_new(L, TAG_FILE, sizeof *f, FILE_PATH);
  f->fd = -1;
  lua_getiuservalue(L, 1, IO_PATH);
  lua_setiuservalue(L, -2, FILE_PATH);
  f->fd = j->fd;
  j->fd = -1;
  f->seekable = plain((mode_t)j->mode);
  f->append = j->flags & O_APPEND;
  return 1;
}

/* [-0, +1, m] n bytes of the buffer, which then are read */
static void take(lua_State *L, struct file *f, size_t n, size_t drop) {
  lua_pushlstring(L, n > 0 ? f->buffer + f->at : "", n);
  f->at += n + drop;
  f->length -= n + drop;
  f->position += (int64_t)(n + drop);
  if (f->length > 0) return;
  f->at = 0;
  if (f->size <= BIG_CHUNK) return;
  free(f->buffer);
  f->buffer = NULL;
  f->size = 0;
}

static int land_read(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  struct file *f = j->file;
  if (f->length > 0 || j->limit == 0)
    take(L, f, (int64_t)f->length < j->limit ? f->length : (size_t)j->limit, 0);
  else
    lua_pushnil(L);
  return 1;
}

static int land_read_all(lua_State *L, struct io *op) {
  struct file *f = as_job(op)->file;
  if (f->length > 0)
    take(L, f, f->length, 0);
  else
    lua_pushliteral(L, "");
  return 1;
}

static void take_line(lua_State *L, struct file *f) {
  size_t line = line_in(f, 0);
  if (line > 0)
    take(L, f, line - 1, 1);
  else if (f->length > 0)
    take(L, f, f->length, 0);
  else
    lua_pushnil(L);
}

static int land_read_line(lua_State *L, struct io *op) {
  take_line(L, as_job(op)->file);
  return 1;
}

static void file_move(struct file *f, int64_t position) {
  if (!f->seekable) return;
  f->position = position;
  f->at = f->length = 0;
}

static int land_write(lua_State *L, struct io *op) {
  file_move(as_job(op)->file, as_job(op)->offset);
  lua_getiuservalue(L, 1, JOB_FILE);
  return 1;
}

static int land_seek(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  if (j->offset != j->file->position) file_move(j->file, j->offset);
  lua_pushinteger(L, (lua_Integer)j->offset);
  return 1;
}

static int land_ftruncate(lua_State *L, struct io *op) {
  (void)L;
  struct file *f = as_job(op)->file;
  file_move(f, f->position);
  return 0;
}

/* ---- Lua face: starting ---- */

#define CLASS(id, name, syscall, land)                                                             \
  static const struct io_class id = {name, syscall, land, job_abort, job_release, job_fail}

/* [-0, +1, e] begins it with the token at k; NULL: canceled before */
static struct job *begin(lua_State *L, int k, const struct io_class *class,
                         ssize_t (*run)(struct job *)) {
  struct job *j = (struct job *)(void *)io_begin(L, k, class, sizeof *j, JOB_COUNT);
  if (j == NULL) return NULL;
  j->run = run;
  j->fd = -1;
  j->result = UV_ECANCELED;
  return j;
}

/* … and starts it, unless it was canceled; returns the task */
static int start(lua_State *L, struct job *j) {
  return j == NULL ? 1 : io_started(L, &j->io, job_start(j));
}

static const char *check_path(lua_State *L, int i) {
  size_t n;
  luaL_checktype(L, i, LUA_TSTRING);
  const char *path = lua_tolstring(L, i, &n);
  luaL_argcheck(L, memchr(path, '\0', n) == NULL, i, "a path has no zero bytes");
  return path;
}

/* [-0, +0, -] what is at i is kept for the thread, and errors call it path */
static void give_path(lua_State *L, struct job *j, int i) {
  j->path = lua_tostring(L, i);
  lua_pushvalue(L, i);
  lua_setiuservalue(L, -2, IO_PATH);
}
static void give_data(lua_State *L, struct job *j, int i) {
  j->data = j->to = lua_tolstring(L, i, &j->length);
  lua_pushvalue(L, i);
  lua_setiuservalue(L, -2, JOB_DATA);
}

/* [-0, +1, e] f(path, …, token at k): the last argument, after which nothing is read */
static struct job *begin_path(lua_State *L, int k, const struct io_class *class,
                              ssize_t (*run)(struct job *)) {
  token_opt(L, k);
  lua_settop(L, k);
  struct job *j = begin(L, k, class, run);
  if (j != NULL) give_path(L, j, 1);
  return j;
}

/* most: f(path, token) */
static int path_only(lua_State *L, const struct io_class *class, ssize_t (*run)(struct job *)) {
  check_path(L, 1);
  return start(L, begin_path(L, 2, class, run));
}

/* f(path, other path, token) */
static int two_paths(lua_State *L, const struct io_class *class, ssize_t (*run)(struct job *),
                     int about) {
  check_path(L, 1);
  check_path(L, 2);
  struct job *j = begin_path(L, 3, class, run);
  if (j != NULL) {
    give_path(L, j, about);
    give_data(L, j, 3 - about);
  }
  return start(L, j);
}

static bool option(lua_State *L, int i, const char *name) {
  if (lua_isnoneornil(L, i)) return false;
  lua_getfield(L, i, name);
  bool on = lua_toboolean(L, -1);
  lua_pop(L, 1);
  return on;
}

static void check_options(lua_State *L, int i, const char *const names[]) {
  if (!lua_isnoneornil(L, i)) module_check_options(L, i, names);
}

static int check_mode(lua_State *L, int i) {
  const char *mode = luaL_optstring(L, i, "r");
  int flags = *mode == 'r' ? O_RDONLY : *mode == 'w' ? O_CREAT | O_TRUNC : O_CREAT | O_APPEND;
  bool update = false, exclusive = false, known = *mode == 'r' || *mode == 'w' || *mode == 'a';
  for (const char *c = known ? mode + 1 : mode; *c != '\0'; c++) switch (*c) {
      case '+': update = true; break;
      case 'x': exclusive = true; break;
      case 'b': break;
      default: known = false;
    }
  luaL_argcheck(L, known && !(exclusive && *mode == 'r'), i, "invalid mode");
  if (exclusive) flags |= O_EXCL;
  return flags | (update ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY);
}

CLASS(open_class, "fs.open", "open", land_open);
CLASS(read_file_class, "fs.read_file", "read", land_bytes);
CLASS(write_file_class, "fs.write_file", "write", land_nothing);
CLASS(stat_class, "fs.stat", "stat", land_stat);
CLASS(lstat_class, "fs.lstat", "lstat", land_stat);
CLASS(access_class, "fs.access", "access", land_access);
CLASS(chmod_class, "fs.chmod", "chmod", land_nothing);
CLASS(truncate_class, "fs.truncate", "truncate", land_nothing);
CLASS(symlink_class, "fs.symlink", "symlink", land_nothing);
CLASS(readlink_class, "fs.readlink", "readlink", land_text);
CLASS(realpath_class, "fs.realpath", "realpath", land_text);
CLASS(rename_class, "fs.rename", "rename", land_nothing);
CLASS(mkdtemp_class, "fs.mkdtemp", "mkdtemp", land_mkdtemp);
CLASS(scandir_class, "fs.scandir", "scandir", land_scandir);
CLASS(mkdir_class, "fs.mkdir", "mkdir", land_nothing);
CLASS(remove_class, "fs.remove", "unlink", land_nothing);
CLASS(copy_class, "fs.copy", "copy", land_nothing);

/* open(path, mode, token) */
static int l_open(lua_State *L) {
  check_path(L, 1);
  int flags = check_mode(L, 2);
  struct job *j = begin_path(L, 3, &open_class, run_open);
  if (j != NULL) j->flags = flags;
  return start(L, j);
}

static int l_read_file(lua_State *L) { return path_only(L, &read_file_class, run_read_file); }

/* write_file(path, data, options, token) */
static int l_write_file(lua_State *L) {
  static const char *const options[] = {"atomic", "append", NULL};
  check_path(L, 1);
  luaL_checktype(L, 2, LUA_TSTRING);
  check_options(L, 3, options);
  bool atomic = option(L, 3, "atomic"), append = option(L, 3, "append");
  luaL_argcheck(L, !(atomic && append), 3, "'atomic' replaces the file, 'append' keeps it");
  struct job *j = begin_path(L, 4, &write_file_class, atomic ? run_replace : run_write_file);
  if (j != NULL) {
    j->flags = O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC);
    give_data(L, j, 2);
  }
  return start(L, j);
}

static int l_stat(lua_State *L) { return path_only(L, &stat_class, run_stat); }
static int l_lstat(lua_State *L) { return path_only(L, &lstat_class, run_lstat); }
static int l_readlink(lua_State *L) { return path_only(L, &readlink_class, run_readlink); }
static int l_realpath(lua_State *L) { return path_only(L, &realpath_class, run_realpath); }
static int l_mkdtemp(lua_State *L) { return path_only(L, &mkdtemp_class, run_mkdtemp); }
static int l_scandir(lua_State *L) { return path_only(L, &scandir_class, run_scandir); }
static int l_rename(lua_State *L) { return two_paths(L, &rename_class, run_rename, 1); }
static int l_copy(lua_State *L) { return two_paths(L, &copy_class, run_copy, 1); }
static int l_symlink(lua_State *L) { return two_paths(L, &symlink_class, run_symlink, 2); }

/* access(path, how, token) */
static int l_access(lua_State *L) {
  check_path(L, 1);
  int mode = F_OK;
  for (const char *c = luaL_optstring(L, 2, ""); *c != '\0'; c++) {
    luaL_argcheck(L, strchr("rwx", *c) != NULL, 2, "only r, w and x are known");
    mode |= *c == 'r' ? R_OK : *c == 'w' ? W_OK : X_OK;
  }
  struct job *j = begin_path(L, 3, &access_class, run_access);
  if (j != NULL) j->mode = mode;
  return start(L, j);
}

static int check_permissions(lua_State *L, int i) {
  lua_Integer mode = luaL_checkinteger(L, i);
  luaL_argcheck(L, mode >= 0 && mode <= 07777, i, "permissions are between 0 and 0xFFF");
  return (int)mode;
}

/* chmod(path, mode, token) */
static int l_chmod(lua_State *L) {
  check_path(L, 1);
  int mode = check_permissions(L, 2);
  struct job *j = begin_path(L, 3, &chmod_class, run_chmod);
  if (j != NULL) j->mode = mode;
  return start(L, j);
}

static int64_t check_size(lua_State *L, int i) {
  lua_Integer n = luaL_checkinteger(L, i);
  luaL_argcheck(L, n >= 0, i, "must not be negative");
  return (int64_t)n;
}

/* truncate(path, size, token) */
static int l_truncate(lua_State *L) {
  check_path(L, 1);
  int64_t size = check_size(L, 2);
  struct job *j = begin_path(L, 3, &truncate_class, run_truncate);
  if (j != NULL) j->offset = size;
  return start(L, j);
}

/* mkdir(path, options, token) */
static int l_mkdir(lua_State *L) {
  static const char *const options[] = {"recursive", "mode", NULL};
  check_path(L, 1);
  check_options(L, 2, options);
  lua_settop(L, 3);
  bool recursive = option(L, 2, "recursive");
  int mode = 0777;
  if (!lua_isnil(L, 2) && lua_getfield(L, 2, "mode") != LUA_TNIL) {
    luaL_argcheck(L, lua_isinteger(L, -1), 2, "mode must be an integer");
    mode = (int)(lua_tointeger(L, -1) & 07777);
  }
  lua_settop(L, 3);
  struct job *j = begin_path(L, 3, &mkdir_class, run_mkdir);
  if (j != NULL) {
    j->flags = recursive;
    j->mode = mode;
  }
  return start(L, j);
}

/* remove(path, options, token) */
static int l_remove(lua_State *L) {
  static const char *const options[] = {"recursive", NULL};
  check_path(L, 1);
  check_options(L, 2, options);
  bool recursive = option(L, 2, "recursive");
  struct job *j = begin_path(L, 3, &remove_class, run_remove);
  if (j != NULL) j->flags = recursive;
  return start(L, j);
}

/* ---- Lua face: files ---- */

CLASS(read_class, "file:read", "read", land_read);
CLASS(read_all_class, "file:read_all", "read", land_read_all);
CLASS(read_line_class, "file:read_line", "read", land_read_line);
CLASS(write_class, "file:write", "write", land_write);
CLASS(seek_class, "file:seek", "seek", land_seek);
CLASS(sync_class, "file:sync", "fsync", land_nothing);
CLASS(fstat_class, "file:stat", "fstat", land_stat);
CLASS(ftruncate_class, "file:truncate", "ftruncate", land_ftruncate);
CLASS(close_class, "file:close", "close", land_nothing);

static struct file *check_file(lua_State *L) {
  struct file *f = (struct file *)object_check(L, 1, TAG_FILE);
  if (!f->closing) return f;
  lua_getiuservalue(L, 1, FILE_PATH);
  error_throw(L, ERROR_DISPOSED, "the file '%s' is closed", lua_tostring(L, -1));
  return NULL;
}

int file_lend(struct file *f) {
  if (f->fd < 0 || f->closing) return UV_EBADF;
  if (f->running != NULL || (!f->seekable && f->length > 0)) return UV_EBUSY;
  if (f->seekable) lseek(f->fd, (off_t)f->position, SEEK_SET); /* the position is kept here */
  return f->fd;
}

/* [-0, +1, e] file:f(…, token at k): a job of the file at index 1 */
static struct job *begin_for(lua_State *L, int k, const struct io_class *class,
                             ssize_t (*run)(struct job *), bool (*ready)(struct job *)) {
  token_opt(L, k);
  struct job *j = begin(L, k, class, run);
  if (j == NULL) return NULL;
  j->file = (struct file *)lua_touserdata(L, 1);
  j->ready = ready;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, JOB_FILE);
  lua_getiuservalue(L, 1, FILE_PATH);
  lua_setiuservalue(L, -2, IO_PATH);
  return j;
}

/* [-0, +0, m] … takes its turn, unless it was canceled; returns the task, which is on top */
static int queue(lua_State *L, struct job *j) {
  if (j == NULL) return 1;
  struct file *f = j->file;
  if (f->closing && j->run != run_close) { /* a finalizer has closed it since */
    j->file = NULL;
    return io_started(L, &j->io, UV_EBADF);
  }
  if (f->running != NULL) {
    if (f->last)
      f->last->next = j;
    else
      f->first = j;
    f->last = j;
    return 1;
  }
  f->running = j;
  if (j->ready == NULL || !j->ready(j)) return start(L, j);
  io_end(&j->io); /* it is done already */
  io_land(L, lua_gettop(L));
  return 1;
}

static bool read_ready(struct job *j) { return j->limit == 0 || j->file->length > 0; }

/* read(max, token) */
static int l_read(lua_State *L) {
  check_file(L);
  int64_t max = lua_isnoneornil(L, 2) ? CHUNK : check_size(L, 2);
  lua_settop(L, 3);
  struct job *j = begin_for(L, 3, &read_class, run_read, read_ready);
  if (j != NULL) j->limit = max;
  return queue(L, j);
}

/* read_all(max, token) */
static int l_read_all(lua_State *L) {
  check_file(L);
  int64_t max = lua_isnoneornil(L, 2) ? -1 : check_size(L, 2);
  lua_settop(L, 3);
  struct job *j = begin_for(L, 3, &read_all_class, run_read_all, NULL);
  if (j != NULL) j->limit = max;
  return queue(L, j);
}

static bool line_ready(struct job *j) {
  size_t line = line_in(j->file, 0);
  if (line == 0 || !line_too_long(j, line - 1)) return line > 0;
  return false; /* the thread says so */
}

static ssize_t run_read_first_line(struct job *j) {
  size_t line = line_in(j->file, 0);
  if (line_too_long(j, line ? line - 1 : j->file->length)) return UV_EMSGSIZE;
  return line > 0 ? 0 : run_read_line(j);
}

/* read_line(max, token) */
static int l_read_line(lua_State *L) {
  check_file(L);
  int64_t max = lua_isnoneornil(L, 2) ? -1 : check_size(L, 2);
  lua_settop(L, 3);
  struct job *j = begin_for(L, 3, &read_line_class, run_read_first_line, line_ready);
  if (j != NULL) j->limit = max;
  return queue(L, j);
}

/* next_line(file, token) -> the next line, if it has been read ahead and nothing is in the way: no task */
static int l_next_line(lua_State *L) {
  struct file *f = check_file(L);
  const struct token *k = token_opt(L, 2);
  size_t line = f->running == NULL ? line_in(f, 0) : 0;
  if (line == 0 || (k != NULL && token_canceled(k))) return 0;
  if (((struct fiber *)runtime(L)->me)->member.scope->canceled)
    return 0; /* the operation says so */
  take(L, f, line - 1, 1);
  return 1;
}

/* write(s, ..., token) */
static int l_write(lua_State *L) {
  check_file(L);
  int top = lua_gettop(L), last = object_test(L, top, TAG_TOKEN) ? top - 1 : top;
  if (last == top) lua_pushnil(L);
  for (int i = 2; i <= last; i++)
    if (lua_type(L, i) != LUA_TSTRING) {
      luaL_argcheck(L, lua_isnumber(L, i), i,
                    lua_pushfstring(L, "string expected, got %s", luaL_typename(L, i)));
      lua_tostring(L, i);
    }
  lua_insert(L, 2); /* file token strings … */
  if (last < 2)
    lua_pushliteral(L, "");
  else
    lua_concat(L, last - 1);
  struct job *j = begin_for(L, 2, &write_class, run_write, NULL);
  if (j != NULL) give_data(L, j, 3);
  return queue(L, j);
}

enum whence { WHENCE_SET, WHENCE_CUR, WHENCE_END };

static bool seek_ready(struct job *j) {
  if (!j->file->seekable || j->flags == WHENCE_END) return false; /* the thread says so */
  int64_t base = j->flags == WHENCE_CUR ? j->file->position : 0;
  if (j->offset > INT64_MAX - base || base + j->offset < 0) {
    j->flags = WHENCE_END;
    j->offset = INT64_MIN; /* EINVAL */
    return false;
  }
  j->offset += base;
  return true;
}

/* seek(whence, offset, token) */
static int l_seek(lua_State *L) {
  static const char *const names[] = {"set", "cur", "end", NULL};
  check_file(L);
  int whence = luaL_checkoption(L, 2, "cur", names);
  lua_Integer offset = luaL_optinteger(L, 3, 0);
  lua_settop(L, 4);
  struct job *j = begin_for(L, 4, &seek_class, run_seek, seek_ready);
  if (j != NULL) {
    j->flags = whence;
    j->offset = (int64_t)offset;
  }
  return queue(L, j);
}

/* f(file, token) */
static int file_only(lua_State *L, const struct io_class *class, ssize_t (*run)(struct job *)) {
  check_file(L);
  lua_settop(L, 2);
  return queue(L, begin_for(L, 2, class, run, NULL));
}

static int l_sync(lua_State *L) { return file_only(L, &sync_class, run_sync); }
static int l_fstat(lua_State *L) { return file_only(L, &fstat_class, run_fstat); }

/* truncate(size, token): at the position unless told */
static int l_ftruncate(lua_State *L) {
  check_file(L);
  int64_t size = check_size(L, 2);
  lua_settop(L, 3);
  struct job *j = begin_for(L, 3, &ftruncate_class, run_ftruncate, NULL);
  if (j != NULL) j->offset = size;
  return queue(L, j);
}

static bool always(struct job *j) {
  (void)j;
  return true;
}

/* close(): after all that was begun before; nothing cancels it, so no descriptor is left behind */
static int l_close(lua_State *L) {
  struct file *f = (struct file *)object_check(L, 1, TAG_FILE);
  lua_settop(L, 1);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NONE);
  bool closed = f->closing; /* then only what is left before it is waited for */
  struct job *j = begin_for(L, 2, &close_class, run_close, closed ? always : NULL);
  f->closing = true;
  return queue(L, j);
}

static int l_file_close(lua_State *L) { /* __close: waits where that is possible */
  struct runtime *rt = runtime(L);
  const struct file *f = (const struct file *)object_check(L, 1, TAG_FILE);
  if (f->closing) return 0;
  bool top_level = rt->me == rt->outside && rt->depth == 0 && !rt->pumping;
  struct fiber *me = fiber_can_suspend(L, rt) ? (struct fiber *)rt->me : NULL;
  bool unwinds = !lua_isnoneornil(L, 2); /* an error, which goes on */
  l_close(L);
  ((struct io *)lua_touserdata(L, -1))->quiet = unwinds;
  return me || top_level ? io_await(L, me) : 0;
}

static int l_file_gc(lua_State *L) {
  struct file *f = (struct file *)object_test(L, 1, TAG_FILE);
  if (f == NULL) return 0;
  f->closing = true;
  if (f->running != NULL)
    f->doomed = true; /* the state is closing: when the job is done */
  else
    file_close(f);
  return 0;
}

static int l_file_tostring(lua_State *L) {
  const struct file *f = (const struct file *)object_check(L, 1, TAG_FILE);
  lua_getiuservalue(L, 1, FILE_PATH);
  lua_pushfstring(L, "coflow.File '%s'%s", lua_tostring(L, -1), f->closing ? " (closed)" : "");
  return 1;
}

static int l_is_closed(lua_State *L) {
  lua_pushboolean(L, ((const struct file *)object_check(L, 1, TAG_FILE))->closing);
  return 1;
}

static int l_path(lua_State *L) {
  object_check(L, 1, TAG_FILE);
  lua_getiuservalue(L, 1, FILE_PATH);
  return 1;
}

static const luaL_Reg operations[] = {
    {"open", l_open},         {"read_file", l_read_file}, {"write_file", l_write_file},
    {"stat", l_stat},         {"lstat", l_lstat},         {"access", l_access},
    {"chmod", l_chmod},       {"truncate", l_truncate},   {"symlink", l_symlink},
    {"readlink", l_readlink}, {"realpath", l_realpath},   {"scandir", l_scandir},
    {"mkdir", l_mkdir},       {"mkdtemp", l_mkdtemp},     {"rename", l_rename},
    {"remove", l_remove},     {"copy", l_copy},           {NULL, NULL}};

static const luaL_Reg file_operations[] = {{"read", l_read},
                                           {"read_all", l_read_all},
                                           {"read_line", l_read_line},
                                           {"write", l_write},
                                           {"seek", l_seek},
                                           {"sync", l_sync},
                                           {"stat", l_fstat},
                                           {"truncate", l_ftruncate},
                                           {"close", l_close},
                                           {"dispose", l_close},
                                           {NULL, NULL}};
static const luaL_Reg file_methods[] = {
    {"__close", l_file_close}, {"__gc", l_file_gc}, {"__tostring", l_file_tostring}, {NULL, NULL}};
static const luaL_Reg file_properties[] = {
    {"is_closed", l_is_closed}, {"path", l_path}, {NULL, NULL}};

/* open_fs() -> the functions of coflow.fs that are in C, and next_line; makes the classes */
static int l_open_fs(lua_State *L) {
  module_class(L, TAG_FILE, "coflow.File", file_methods, file_properties);
  io_methods(L, TAG_FILE, file_operations);
  lua_newtable(L);
  io_functions(L, operations);
  watch_open(L);
  module_push_function(L, l_next_line);
  return 2;
}

static const luaL_Reg functions[] = {{"open_fs", l_open_fs}, {NULL, NULL}};

void fs_open(lua_State *L) {
  io_open(L);
  module_functions(L, functions);
}
