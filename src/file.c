/*
** file.c - open files.
**
** An open file runs one job after another, in the order they were asked for, so its position, its
** buffer and the order of its writes need no lock; closing is the last of them. The position is
** kept here, not by the system, and moves when a result is handed over: a canceled read loses nothing,
** and a canceled write may be repeated in its place. Bytes that were read ahead stay in the buffer: those
** at the position, which is the kernel's own for what cannot be sought (a pipe, a terminal).
**
** A file that has been *lent* to a child shares its descriptor's position with that for good, in both
** directions: what is kept here follows the system's when a job has its turn (follow), and is told to
** the system when it moves. A write to it is made where the system stands, so neither ever overwrites
** what the other wrote; like one that appends it is then done, and what follows stands behind it,
** though its caller has been canceled meanwhile.
**
** Making the string that a read gives may run finalizers of users. Only then are the bytes taken, if
** the read is not canceled by now; others wait meanwhile, for it is the running job until it has
** landed. next_line is no job, and so looks whether the file is still as it was.
**
** Invariants: file->running is the job that a thread, or the ready list, has; it holds the file. Those after
**             it wait in file->first …; none waits when none runs. A descriptor is closed by the job that
**             opened it (release), by the file's own close job, or by the finalizer, for whom no job is left.
** SPDX-License-Identifier: MIT
*/
#include "job.h"

#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- in the thread: no Lua, no loop ---- */

/* reads ahead: one read more into the buffer, whose start it may move */
static ssize_t fill(struct job *j, size_t wanted) {
  struct file *f = j->file;
  if (job_stops(j)) return UV_ECANCELED;
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
    int status = job_wait(j, f->fd, POLLIN);
    if (status < 0) return status;
  }
  ssize_t got = job_read_some(f->fd, f->buffer + f->length, wanted,
                              f->seekable ? f->position + (int64_t)f->length : -1);
  if (got < 0) return job_error();
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
  ssize_t status = job_read_to_end(j, f->fd, &b, offset, j->limit, f->seekable);
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
  bool positioned = f->seekable && !f->append && !f->lent;
  ssize_t status =
      job_write_all(j, f->fd, j->data, j->length, positioned ? f->position : -1, f->seekable);
  if (status >= 0 && f->seekable && !positioned) { /* it stands behind what was written */
    j->offset = (int64_t)lseek(f->fd, 0, SEEK_CUR);
    if (j->offset < 0) return job_checked(j, "lseek", -1);
  } else if (status >= 0)
    j->offset = f->position + (int64_t)j->length;
  return status;
}

static ssize_t run_seek(struct job *j) {
  if (!j->file->seekable) return UV_ESPIPE;
  struct stat s;
  if (fstat(j->file->fd, &s) != 0) return job_error();
  int64_t size = S_ISBLK(s.st_mode) ? (int64_t)lseek(j->file->fd, 0, SEEK_END) : (int64_t)s.st_size;
  if (j->offset > 0 && size > INT64_MAX - j->offset) return UV_EINVAL;
  j->offset += size;
  return j->offset < 0 ? UV_EINVAL : 0;
}

static ssize_t run_sync(struct job *j) { return fsync(j->file->fd) == 0 ? 0 : job_error(); }
static ssize_t run_fstat(struct job *j) { return uv_fs_fstat(NULL, &j->fs, j->file->fd, NULL); }
static ssize_t run_ftruncate(struct job *j) {
  return ftruncate(j->file->fd, (off_t)j->offset) == 0 ? 0 : job_error();
}

static ssize_t run_close(struct job *j) {
  int fd = j->file->fd;
  j->file->fd = -1;
  return close(fd) == 0 || errno == EINTR || errno == EINPROGRESS ? 0 : job_error();
}

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void file_move(struct file *f, int64_t position) {
  if (!f->seekable) return;
  f->position = position;
  f->at = f->length = 0;
  f->epoch++;
}

/* no job runs: the position of a file that children have is where they have left it */
static void follow(struct file *f) {
  if (!f->lent) return;
  int64_t now = (int64_t)lseek(f->fd, 0, SEEK_CUR);
  if (now >= 0 && now != f->position) file_move(f, now);
}

/* … and where they go on */
static void tell_position(const struct file *f) {
  if (f->lent) lseek(f->fd, (off_t)f->position, SEEK_SET);
}

/* the next job of the file has its turn; one that needs no thread is done */
void file_next(struct file *f) {
  struct job *j = f->first;
  f->running = j;
  if (j == NULL) return;
  follow(f);
  f->first = j->next;
  if (f->first == NULL) f->last = NULL;
  if (j->ready != NULL && j->ready(j)) {
    io_done(&j->io, 0);
    return;
  }
  int status = job_start(j);
  if (status < 0) io_done(&j->io, status);
}

void file_leave(struct file *f, struct job *j) { /* it was waiting */
  struct job **at = &f->first, *before = NULL;
  for (; *at != j; at = &(*at)->next) before = *at;
  *at = j->next;
  if (f->last == j) f->last = before;
}

void file_close(struct file *f) {
  if (f->fd >= 0) close(f->fd);
  f->fd = -1;
  link_drop(&f->link);
  free(f->buffer);
  f->buffer = NULL;
  f->at = f->length = f->size = 0;
  f->epoch++;
}

void file_close_all(struct runtime *rt) {
  for (struct link *l = rt->files.next, *next; l != &rt->files; l = next) {
    struct file *f = container_of(l, struct file, link);
    next = l->next;
    f->closing = true;
    if (f->running == NULL) file_close(f); /* else a thread is stuck in it */
  }
}

/* ---- results ---- */

bool file_is_open(const struct file *f) { return f->fd >= 0 && !f->closing; }

void file_dispose(struct file *f) {
  f->closing = true;
  file_close(f);
}

int file_land_open(lua_State *L, struct io *op) {
  struct job *j = as_job(op);
  struct file *f = (struct file *)object_new(L, TAG_FILE, sizeof *f, FILE_PATH);
  f->fd = -1;
  lua_getiuservalue(L, 1, IO_PATH);
  lua_setiuservalue(L, -2, FILE_PATH);
  if (task_done(&op->pending.task)) return 1; /* canceled by a finalizer: nobody gets the file */
  f->fd = j->fd;
  j->fd = -1;
  link_append(&op->rt->files, &f->link);
  f->seekable = job_is_plain((mode_t)j->mode);
  f->append = j->flags & O_APPEND;
  testing_opened(L, runtime(L));
  return 1;
}

/* n bytes of the buffer have been read */
static void consume(struct file *f, size_t n) {
  f->epoch++;
  f->at += n;
  f->length -= n;
  f->position += (int64_t)n;
  tell_position(f);
  if (f->length > 0) return;
  f->at = 0;
  if (f->size <= BIG_CHUNK) return;
  free(f->buffer);
  f->buffer = NULL;
  f->size = 0;
}

/* [-0, +1, m] n bytes of the buffer; these, and `drop` behind them, then are read */
static void take(lua_State *L, const struct io *op, struct file *f, size_t n, size_t drop) {
  lua_pushlstring(L, n > 0 ? f->buffer + f->at : "", n);
  if (!task_done(&op->pending.task)) consume(f, n + drop);
}

static int land_read(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  struct file *f = j->file;
  if (f->length > 0 || j->limit == 0)
    take(L, op, f, (int64_t)f->length < j->limit ? f->length : (size_t)j->limit, 0);
  else
    lua_pushnil(L);
  return 1;
}

static int land_read_all(lua_State *L, struct io *op) {
  struct file *f = as_job(op)->file;
  if (f->length > 0)
    take(L, op, f, f->length, 0);
  else
    lua_pushliteral(L, "");
  return 1;
}

static int land_read_line(lua_State *L, struct io *op) {
  struct file *f = as_job(op)->file;
  size_t line = line_in(f, 0);
  if (line > 0)
    take(L, op, f, line - 1, 1);
  else if (f->length > 0)
    take(L, op, f, f->length, 0);
  else
    lua_pushnil(L);
  return 1;
}

static int land_write(lua_State *L, struct io *op) {
  file_move(as_job(op)->file, as_job(op)->offset);
  lua_getiuservalue(L, 1, JOB_FILE);
  return 1;
}

static int land_seek(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  if (j->offset != j->file->position) file_move(j->file, j->offset);
  tell_position(j->file);
  lua_pushinteger(L, (lua_Integer)j->offset);
  return 1;
}

static int land_ftruncate(lua_State *L, struct io *op) {
  (void)L;
  struct file *f = as_job(op)->file;
  file_move(f, f->position);
  return 0;
}

/* ---- Lua face ---- */

JOB_CLASS(read_class, "file:read", "read", land_read);
JOB_CLASS(read_all_class, "file:read_all", "read", land_read_all);
JOB_CLASS(read_line_class, "file:read_line", "read", land_read_line);
JOB_CLASS(write_class, "file:write", "write", land_write);
JOB_CLASS(seek_class, "file:seek", "seek", land_seek);
JOB_CLASS(sync_class, "file:sync", "fsync", job_land_nothing);
JOB_CLASS(fstat_class, "file:stat", "fstat", job_land_stat);
JOB_CLASS(ftruncate_class, "file:truncate", "ftruncate", land_ftruncate);
JOB_CLASS(close_class, "file:close", "close", job_land_nothing);

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
  if (f->seekable && !f->lent) { /* until now the position was kept here only */
    f->lent = true;
    tell_position(f);
  }
  return f->fd;
}

/* [-0, +1, e] file:f(…, token at k): a job of the file at index 1 */
static struct job *begin_for(lua_State *L, int k, const struct io_class *class,
                             ssize_t (*run)(struct job *), bool (*ready)(struct job *)) {
  token_opt(L, k);
  struct job *j = job_begin(L, k, class, run);
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
  if (f->closing && !j->certain) { /* a finalizer has closed it since */
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
  follow(f);
  if (j->ready == NULL || !j->ready(j)) return job_started(L, j);
  io_end(&j->io); /* it is done already */
  io_land(L, lua_gettop(L));
  return 1;
}

static bool read_ready(struct job *j) { return j->limit == 0 || j->file->length > 0; }

/* read…(max, token): max is `usual` unless given; -1: no limit */
static int read_some(lua_State *L, int64_t usual, const struct io_class *class,
                     ssize_t (*run)(struct job *), bool (*ready)(struct job *)) {
  check_file(L);
  io_token_last(L, 2);
  bool unlimited = lua_isnoneornil(L, 2) || (usual < 0 && lua_tonumber(L, 2) == HUGE_VAL);
  int64_t max = unlimited ? usual : job_check_size(L, 2);
  lua_settop(L, 3);
  struct job *j = begin_for(L, 3, class, run, ready);
  if (j != NULL) j->limit = max;
  return queue(L, j);
}

static int l_read(lua_State *L) { return read_some(L, CHUNK, &read_class, run_read, read_ready); }
static int l_read_all(lua_State *L) {
  return read_some(L, -1, &read_all_class, run_read_all, NULL);
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

static int l_read_line(lua_State *L) {
  return read_some(L, -1, &read_line_class, run_read_first_line, line_ready);
}

/* next_line(file, max, token) -> the next line, if it has been read ahead and nothing is in the way: no task */
static int l_next_line(lua_State *L) {
  struct file *f = check_file(L);
  const struct token *k = token_opt(L, 3);
  lua_Number max = luaL_optnumber(L, 2, HUGE_VAL);
  if (f->running == NULL) follow(f);
  size_t line = f->running == NULL ? line_in(f, 0) : 0;
  const struct scope *s = ((const struct fiber *)runtime(L)->me)->member.scope;
  if (line == 0 || (lua_Number)(line - 1) > max || operation_canceled(k, s))
    return 0; /* the operation says so */
  uint32_t epoch = f->epoch;
  lua_pushlstring(L, f->buffer + f->at, line - 1);
  if (f->running != NULL || f->epoch != epoch) return 0; /* a finalizer has been here */
  consume(f, line);
  return 1;
}

/* write(s, ..., token): a nil after strings is a token that is not given; after nothing it is no string */
static int l_write(lua_State *L) {
  check_file(L);
  int last = lua_gettop(L);
  if (object_test(L, last, TAG_TOKEN) != NULL || (last > 2 && lua_isnil(L, last)))
    last--;
  else
    lua_pushnil(L);
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
  if (j != NULL) job_give_data(L, j, 3);
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
  io_token_last(L, 2);
  io_token_last(L, 3);
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
  int64_t size = job_check_size(L, 2);
  lua_settop(L, 3);
  struct job *j = begin_for(L, 3, &ftruncate_class, run_ftruncate, NULL);
  if (j != NULL) j->offset = size;
  return queue(L, j);
}

static bool always(struct job *j) {
  (void)j;
  return true;
}

static void hurry(struct job *j) {
  if (!j->certain) atomic_store(&j->stop, true); /* another close is */
}

/* close(): after all that was begun before; nothing cancels it, so no descriptor is left behind */
static int l_close(lua_State *L) {
  struct file *f = (struct file *)object_check(L, 1, TAG_FILE);
  lua_settop(L, 1);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_NONE);
  struct job *j = begin_for(L, 2, &close_class, run_close, NULL);
  if (j != NULL) {
    j->certain = true;
    if (f->closing) j->ready = always; /* only what is left before it is waited for */
  }
  f->closing = true;
  if (!f->seekable) { /* those that wait for others do so no longer */
    if (f->running != NULL) hurry(f->running);
    for (struct job *before = f->first; before != NULL; before = before->next) hurry(before);
  }
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
  if (file_is_open(f) && !runtime(L)->closed) testing_lost(L, runtime(L), 1);
  f->closing = true;
  if (f->running == NULL) file_close(f); /* else the state is closing, and waits for the job */
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

void file_open(lua_State *L) {
  module_class(L, TAG_FILE, "coflow.File", file_methods, file_properties);
  io_methods(L, TAG_FILE, file_operations);
}

void file_push_next_line(lua_State *L) { module_push_function(L, l_next_line); }
