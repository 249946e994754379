/*
** stdio.c - standard input, output and error as streams.
**
** The descriptors 0, 1 and 2 are shared: by this process's own print and io.write, by the shell that
** started it, by those who come after. So none of them is made non-blocking, not even for a while:
** nobody could undo it after a crash. A pipe or a terminal is opened once more by its name, which gives
** an open file of our own that libuv may treat as it likes; all else (files, devices, sockets, what
** cannot be opened again) is left to threads (fdstream.c).
**
** Closing such a stream leaves the descriptor to print and io.write, as Lua's own library does.
** `shutdown` tells the reader that this was all: from then on nothing of this process is behind the
** descriptor.
**
** A descriptor that is closed when the module is loaded would be the number of the next thing that is
** opened: print would write into a connection. It is occupied by something that refuses what a closed
** one would.
**
** When the state closes, what was written is sent, for a bounded time (shutdown.c).
**
** SPDX-License-Identifier: MIT
*/
#include "uvstream.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

enum { STANDARD = 3 }; /* 0 is read, 1 and 2 are written */

/* ---- libuv side: no Lua below this line until the Lua face ---- */

void stdio_guard(void) {
  for (int fd = 0; fd < STANDARD; fd++)
    if (fcntl(fd, F_GETFD) < 0 && errno == EBADF)
      (void)!open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY); /* the lowest number that is free */
}

int stdio_end(int fd) {
  if (fd == 1) fflush(stdout);
  int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
  if (null < 0) return uv_translate_sys_error(errno);
  int status = dup2(null, fd) < 0 ? uv_translate_sys_error(errno) : 0;
  close(null);
  return status;
}

bool stdio_sends(const struct runtime *rt) {
  for (struct link *l = rt->handles.next; l != &rt->handles; l = l->next) {
    struct handle *h = container_of(l, struct handle, link);
    if (h->holder.tag != TAG_STREAM || h->closing) continue;
    const struct stream *s = as_stream(h);
    if (s->standard != 0 && s->queued > 0) return true;
  }
  return false;
}

static bool is_terminal(int fd) {
#ifdef TIOCGPTN
  unsigned number;
  if (ioctl(fd, TIOCGPTN, &number) == 0)
    return false; /* opened again, its other end is a new one */
#endif
  return isatty(fd);
}

/* a descriptor of our own for the same pipe or terminal, or -1 */
static int open_again(int fd, const struct stat *st) {
  struct stat opened;
  char path[64];
  int flags = fcntl(fd, F_GETFL), access = fd == 0 ? O_RDONLY : O_WRONLY;
  if (!S_ISFIFO(st->st_mode) && !is_terminal(fd)) return -1;
  if (flags < 0 || ((flags & O_ACCMODE) != access && (flags & O_ACCMODE) != O_RDWR)) return -1;
  snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
  int own = open(path, access | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
  if (own < 0 && !S_ISFIFO(st->st_mode) && ttyname_r(fd, path, sizeof path) == 0)
    own = open(path, access | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
  if (own < 0) return -1;
  if (fstat(own, &opened) == 0 && opened.st_ino == st->st_ino && opened.st_dev == st->st_dev)
    return own;
  close(own);
  return -1;
}

/* ---- Lua face ---- */

/* [-0, +0, v] */
static int check_number(lua_State *L, int i) {
  lua_Integer fd = luaL_checkinteger(L, i);
  luaL_argcheck(L, fd >= 0 && fd < STANDARD, i, "0, 1 or 2");
  return (int)fd;
}

/* open_standard(number) -> a stream */
static int l_open_standard(lua_State *L) {
  struct stat st;
  int fd = check_number(L, 1), own = -1, status;
  lua_settop(L, 1);
  struct stream *s = stream_new(L, STREAM_FD);
  if (fstat(fd, &st) == 0 && (own = open_again(fd, &st)) >= 0)
    s->kind = STREAM_PIPE;
  else
    own = fcntl(fd, F_DUPFD_CLOEXEC, STANDARD);
  status = own >= 0 ? stream_adopt(s, own) : uv_translate_sys_error(errno);
  if (status != 0) {
    handle_changed(L, 2); /* it is closing, or has never been open */
    io_push_error(L, status, "open", NULL);
    return lua_error(L);
  }
  s->standard = (uint8_t)(fd + 1);
  task_forget_weak(L, s); /* it outlives whoever asked for it first: no test has left it behind */
  if (fd != 0) s->read_status = UV_EBADF;
  return 1;
}

/* is_terminal(number) */
static int l_is_terminal(lua_State *L) {
  lua_pushboolean(L, isatty(check_number(L, 1)));
  return 1;
}

static const luaL_Reg functions[] = {
    {"open_standard", l_open_standard}, {"is_terminal", l_is_terminal}, {NULL, NULL}};

const struct part stdio_part = {functions, NULL, NULL};
