/*
** fs.c - files and directories by their paths. Each operation is a job (job.c); open files are in file.c.
**
** A FIFO is opened without waiting for its other end, so that no thread stays where nobody may ever
** come. A file that is replaced (`atomic`) is written beside the old one and takes its name when all is
** on the disk.
**
** SPDX-License-Identifier: MIT
*/
#include "job.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- in the thread: no Lua, no loop ---- */

/* a descriptor, or an error. Opening one end of a FIFO would wait for the other, where nobody can be
** told to leave. */
static int open_path(struct job *j, const char *path, int flags, mode_t mode) {
  struct stat s;
  int fd;
  if (stat(path, &s) != 0 || !S_ISFIFO(s.st_mode)) {
    do fd = open(path, flags | O_CLOEXEC, mode);
    while (fd < 0 && errno == EINTR);
    return fd >= 0 ? fd : job_error();
  }
  while ((fd = open(path, flags | O_NONBLOCK | O_CLOEXEC)) < 0) {
    if (errno != ENXIO) return job_error();
    if (job_stops(j)) return UV_ECANCELED;
    atomic_store(&j->phase, JOB_WAITS);
    poll(NULL, 0, LOOK_MS / 5);
  }
  atomic_store(&j->phase, JOB_WORKS);
  int now = fcntl(fd, F_GETFL);
  if (now >= 0) fcntl(fd, F_SETFL, now & ~O_NONBLOCK);
  return fd;
}

static ssize_t run_open(struct job *j) {
  struct stat s;
  j->fd = open_path(j, j->path, j->flags, 0666);
  if (j->fd < 0) {
    int error = j->fd;
    j->fd = -1;
    return error;
  }
  if (fstat(j->fd, &s) != 0) return job_checked(j, "fstat", -1);
  j->mode = (int)s.st_mode;
  return 0;
}

/* the descriptor that the job has opened; a failed close is a failure of what was written */
static ssize_t close_own(struct job *j, ssize_t result) {
  int fd = j->fd;
  j->fd = -1;
  if (close(fd) != 0 && errno != EINTR && errno != EINPROGRESS && result >= 0)
    return job_checked(j, "close", -1);
  return result;
}

static ssize_t run_read_file(struct job *j) {
  ssize_t status = run_open(j);
  if (status < 0) {
    if (j->io.syscall == NULL) j->io.syscall = "open";
    return status;
  }
  return close_own(j, job_read_to_end(j, j->fd, &j->bytes, -1, -1, job_is_plain((mode_t)j->mode)));
}

static ssize_t run_write_file(struct job *j) {
  ssize_t status = run_open(j);
  if (status < 0) {
    if (j->io.syscall == NULL) j->io.syscall = "open";
    return status;
  }
  return close_own(j,
                   job_write_all(j, j->fd, j->data, j->length, -1, job_is_plain((mode_t)j->mode)));
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
  ssize_t status = job_checked(j, "open", -1);
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
  if (stat(target, &old) == 0) {
    bool owned = (old.st_uid == geteuid() && old.st_gid == getegid()) ||
                 fchown(j->fd, old.st_uid, old.st_gid) == 0;
    if (fchmod(j->fd, old.st_mode & (owned ? 07777 : 0777)) != 0) /* no setuid of another user */
      status = job_checked(j, "chmod", -1);
  }
  if (status >= 0) status = job_write_all(j, j->fd, j->data, j->length, -1, true);
  if (status >= 0 && fsync(j->fd) != 0) status = job_checked(j, "fsync", -1);
  status = close_own(j, status);
  if (status >= 0 && job_stops(j)) status = UV_ECANCELED;
  if (status >= 0) status = job_checked(j, "rename", rename(name, target));
  if (status < 0)
    unlink(name);
  else
    sync_directory(target);
  free(name);
  return status;
}

static ssize_t run_replace(struct job *j) {
  struct stat now;
  char *real = realpath(j->path, NULL); /* a link stays one */
  ssize_t status;
  if (real != NULL ? stat(real, &now) == 0 && !S_ISREG(now.st_mode) : lstat(j->path, &now) == 0)
    status = run_write_file(
        j); /* a device, a FIFO, a link to nothing: there is nothing to be replaced */
  else
    status = replace(j, real ? real : j->path);
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
  return job_checked(j, "truncate", truncate(j->path, (off_t)j->offset));
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
  if (mkdtemp(j->bytes.at) == NULL) return job_error();
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
  if (!j->flags) return job_error(); /* not recursive */
  if (errno == EEXIST && is_directory(j->path)) return 0;
  if (errno != ENOENT || *j->path == '\0') return job_error();
  char *path = strdup(j->path);
  if (path == NULL) return UV_ENOMEM;
  ssize_t status = 0;
  for (char *end = path; status == 0 && *end != '\0';) {
    while (*end == '/') end++;
    while (*end != '/' && *end != '\0') end++;
    char c = *end;
    *end = '\0';
    if (job_stops(j))
      status = UV_ECANCELED;
    else if (mkdir(path, (mode_t)j->mode) != 0 && !(errno == EEXIST && is_directory(path))) {
      status = job_error();
      j->where = strdup(path);
    }
    *end = c;
  }
  free(path);
  return status;
}

/* what `name` in the directory `dir` is about to fail with: errors tell the whole path, in j->bytes */
static ssize_t refused(struct job *j, const char *syscall) {
  ssize_t status = job_checked(j, syscall, -1);
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
  if (job_stops(j)) return UV_ECANCELED;
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
  if (error != EISDIR && error != EPERM) return job_error();
  if (rmdir(j->path) == 0) return 0;
  if (errno == ENOTDIR) errno = error;
  return job_checked(j, errno == error ? "unlink" : "rmdir", -1);
}

/* from one to the other, of which one at least is no plain file */
static ssize_t copy_bytes(struct job *j, int in, bool plain_in, bool plain_out) {
  char *buffer = malloc(CHUNK);
  ssize_t status = buffer != NULL ? 0 : UV_ENOMEM;
  while (status >= 0) {
    if (job_stops(j)) status = UV_ECANCELED;
    if (status >= 0 && !plain_in) status = job_wait(j, in, POLLIN);
    if (status < 0) break;
    status = job_checked(j, "read", job_read_some(in, buffer, CHUNK, -1));
    if (status == 0) break;
    if (status > 0) status = job_write_all(j, j->fd, buffer, (size_t)status, -1, plain_out);
  }
  free(buffer);
  return status;
}

/* … of plain files */
static ssize_t copy_file(struct job *j, int in) {
  for (;;) {
    uv_fs_t fs;
    if (job_stops(j)) return UV_ECANCELED;
    int n = uv_fs_sendfile(NULL, &fs, j->fd, in, j->offset, 8 * BIG_CHUNK, NULL);
    uv_fs_req_cleanup(&fs);
    if (n < 0) j->io.syscall = "sendfile";
    if (n <= 0) return n;
    j->offset += n;
  }
}

static ssize_t run_copy(struct job *j) {
  struct stat from, to;
  int in = open_path(j, j->path, O_RDONLY, 0);
  if (in < 0) {
    j->io.syscall = "open";
    return in;
  }
  ssize_t status = job_checked(j, "fstat", fstat(in, &from));
  if (status >= 0 && S_ISDIR(from.st_mode)) {
    errno = EISDIR;
    status = job_checked(j, "copy", -1);
  }
  bool same = status >= 0 && stat(j->to, &to) == 0 && to.st_dev == from.st_dev &&
              to.st_ino == from.st_ino; /* nothing to do, and truncating it would be the end */
  if (status >= 0 && !same) {
    int out = open_path(j, j->to, O_WRONLY | O_CREAT | O_TRUNC, from.st_mode & 0777);
    if (out < 0) {
      status = out;
      j->io.syscall = "open";
      j->where = strdup(j->to);
    } else
      j->fd = out;
  }
  if (j->fd >= 0) {
    status = job_checked(j, "fstat", fstat(j->fd, &to));
    bool regular = status >= 0 && S_ISREG(to.st_mode); /* else there is nothing to remove */
    if (regular && S_ISREG(from.st_mode) && fchmod(j->fd, from.st_mode & 07777) != 0 &&
        errno != EPERM)
      status = job_checked(j, "chmod", -1);
    if (status >= 0)
      status = regular && S_ISREG(from.st_mode)
                   ? copy_file(j, in)
                   : copy_bytes(j, in, job_is_plain(from.st_mode), job_is_plain(to.st_mode));
    status = close_own(j, status);
    if (status < 0 && regular) unlink(j->to);
  }
  close(in);
  return status < 0 ? status : 0;
}

/* ---- results ---- */

static int land_bytes(lua_State *L, struct io *op) {
  const struct job *j = as_job(op);
  lua_pushlstring(L, j->bytes.at ? j->bytes.at : "", j->bytes.length);
  return 1;
}

static int land_mkdtemp(lua_State *L, struct io *op) {
  land_bytes(L, op);
  if (!task_done(&op->pending.task))
    as_job(op)->made = false; /* else a finalizer has canceled it */
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

/* ---- Lua face ---- */

/* [-0, +0, -] what is at i is kept for the thread, and errors call it path */
static void give_path(lua_State *L, struct job *j, int i) {
  j->path = lua_tostring(L, i);
  lua_pushvalue(L, i);
  lua_setiuservalue(L, -2, IO_PATH);
}

/* [-0, +1, e] f(path, …, token at k): the last argument, after which nothing is read */
static struct job *begin_path(lua_State *L, int k, const struct io_class *class,
                              ssize_t (*run)(struct job *)) {
  token_opt(L, k);
  lua_settop(L, k);
  struct job *j = job_begin(L, k, class, run);
  if (j != NULL) give_path(L, j, 1);
  return j;
}

/* most: f(path, token) */
static int path_only(lua_State *L, const struct io_class *class, ssize_t (*run)(struct job *)) {
  io_check_path(L, 1);
  return job_started(L, begin_path(L, 2, class, run));
}

/* f(path, other path, token) */
static int two_paths(lua_State *L, const struct io_class *class, ssize_t (*run)(struct job *),
                     int about) {
  io_check_path(L, 1);
  io_check_path(L, 2);
  struct job *j = begin_path(L, 3, class, run);
  if (j != NULL) {
    give_path(L, j, about);
    job_give_data(L, j, 3 - about);
  }
  return job_started(L, j);
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
  luaL_argcheck(
      L, known && !(exclusive && *mode == 'r'), i,
      "invalid mode: \"r\", \"w\" or \"a\", with \"+\" to read and write, \"x\" to create "
      "(not with \"r\")");
  if (exclusive) flags |= O_EXCL;
  return flags | (update ? O_RDWR : *mode == 'r' ? O_RDONLY : O_WRONLY);
}

JOB_CLASS(open_class, "fs.open", "open", file_land_open);
JOB_CLASS(read_file_class, "fs.read_file", "read", land_bytes);
JOB_CLASS(write_file_class, "fs.write_file", "write", job_land_nothing);
JOB_CLASS(stat_class, "fs.stat", "stat", job_land_stat);
JOB_CLASS(lstat_class, "fs.lstat", "lstat", job_land_stat);
JOB_CLASS(access_class, "fs.access", "access", land_access);
JOB_CLASS(chmod_class, "fs.chmod", "chmod", job_land_nothing);
JOB_CLASS(truncate_class, "fs.truncate", "truncate", job_land_nothing);
JOB_CLASS(symlink_class, "fs.symlink", "symlink", job_land_nothing);
JOB_CLASS(readlink_class, "fs.readlink", "readlink", land_text);
JOB_CLASS(realpath_class, "fs.realpath", "realpath", land_text);
JOB_CLASS(rename_class, "fs.rename", "rename", job_land_nothing);
JOB_CLASS(mkdtemp_class, "fs.mkdtemp", "mkdtemp", land_mkdtemp);
JOB_CLASS(scandir_class, "fs.scandir", "scandir", land_scandir);
JOB_CLASS(mkdir_class, "fs.mkdir", "mkdir", job_land_nothing);
JOB_CLASS(remove_class, "fs.remove", "unlink", job_land_nothing);
JOB_CLASS(copy_class, "fs.copy", "copy", job_land_nothing);

/* open(path, mode, token) */
static int l_open(lua_State *L) {
  io_check_path(L, 1);
  io_token_last(L, 2);
  int flags = check_mode(L, 2);
  struct job *j = begin_path(L, 3, &open_class, run_open);
  if (j != NULL) j->flags = flags;
  return job_started(L, j);
}

static int l_read_file(lua_State *L) { return path_only(L, &read_file_class, run_read_file); }

/* write_file(path, data, options, token) */
static int l_write_file(lua_State *L) {
  static const char *const options[] = {"atomic", "append", NULL};
  io_check_path(L, 1);
  luaL_checktype(L, 2, LUA_TSTRING);
  io_token_last(L, 3);
  check_options(L, 3, options);
  bool atomic = option(L, 3, "atomic"), append = option(L, 3, "append");
  luaL_argcheck(L, !(atomic && append), 3, "'atomic' replaces the file, 'append' keeps it");
  struct job *j = begin_path(L, 4, &write_file_class, atomic ? run_replace : run_write_file);
  if (j != NULL) {
    j->flags = O_WRONLY | O_CREAT | (append ? O_APPEND : O_TRUNC);
    job_give_data(L, j, 2);
  }
  return job_started(L, j);
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
  io_check_path(L, 1);
  int mode = F_OK;
  io_token_last(L, 2);
  for (const char *c = luaL_optstring(L, 2, ""); *c != '\0'; c++) {
    luaL_argcheck(L, strchr("rwx", *c) != NULL, 2, "only r, w and x are known");
    mode |= *c == 'r' ? R_OK : *c == 'w' ? W_OK : X_OK;
  }
  struct job *j = begin_path(L, 3, &access_class, run_access);
  if (j != NULL) j->mode = mode;
  return job_started(L, j);
}

static int check_permissions(lua_State *L, int i) {
  luaL_checktype(L, i, LUA_TNUMBER); /* "755" would be a decimal number */
  lua_Integer mode = luaL_checkinteger(L, i);
  luaL_argcheck(L, mode >= 0 && mode <= 07777, i, "permissions are between 0 and 0xFFF");
  return (int)mode;
}

/* chmod(path, mode, token) */
static int l_chmod(lua_State *L) {
  io_check_path(L, 1);
  int mode = check_permissions(L, 2);
  struct job *j = begin_path(L, 3, &chmod_class, run_chmod);
  if (j != NULL) j->mode = mode;
  return job_started(L, j);
}

/* truncate(path, size, token) */
static int l_truncate(lua_State *L) {
  io_check_path(L, 1);
  int64_t size = job_check_size(L, 2);
  struct job *j = begin_path(L, 3, &truncate_class, run_truncate);
  if (j != NULL) j->offset = size;
  return job_started(L, j);
}

/* mkdir(path, options, token) */
static int l_mkdir(lua_State *L) {
  static const char *const options[] = {"recursive", "mode", NULL};
  io_check_path(L, 1);
  io_token_last(L, 2);
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
  return job_started(L, j);
}

/* remove(path, options, token) */
static int l_remove(lua_State *L) {
  static const char *const options[] = {"recursive", NULL};
  io_check_path(L, 1);
  io_token_last(L, 2);
  check_options(L, 2, options);
  bool recursive = option(L, 2, "recursive");
  struct job *j = begin_path(L, 3, &remove_class, run_remove);
  if (j != NULL) j->flags = recursive;
  return job_started(L, j);
}

static const luaL_Reg operations[] = {
    {"open", l_open},         {"read_file", l_read_file}, {"write_file", l_write_file},
    {"stat", l_stat},         {"lstat", l_lstat},         {"access", l_access},
    {"chmod", l_chmod},       {"truncate", l_truncate},   {"symlink", l_symlink},
    {"readlink", l_readlink}, {"realpath", l_realpath},   {"scandir", l_scandir},
    {"mkdir", l_mkdir},       {"mkdtemp", l_mkdtemp},     {"rename", l_rename},
    {"remove", l_remove},     {"copy", l_copy},           {NULL, NULL}};

/* open_fs() -> the functions of coflow.fs that are in C, and next_line; makes the classes */
static int l_open_fs(lua_State *L) {
  file_open(L);
  lua_newtable(L);
  io_functions(L, operations);
  watch_open(L);
  file_push_next_line(L);
  return 2;
}

static const luaL_Reg functions[] = {{"open_fs", l_open_fs}, {NULL, NULL}};

const struct part fs_part = {functions, io_open, NULL};
