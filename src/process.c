/*
** process.c - programs that run beside this one: start, signal, wait. What is asked of them in Lua
** (options, run, closing) is in process.lua.
**
** A process is two things: the object of the script, and the *child*, what libuv knows of it. The child
** is there until it has been reaped and libuv has let go, whether or not anybody still has the object:
** one that is forgotten goes on, with its pipes closed, and leaves no zombie. Waiting is an operation
** (io.c) that holds the object; all who wait are told the same.
**
**     spawn ── runs, in rt->children ── on_end: reaped, the waiters are done ── on_close: freed
**                 │
**                 └ terminate: SIGTERM ── the grace ── SIGKILL
**
** The grace is counted by libuv, in real time, under a test's clock as well: the child does not live in
** that. And so that SIGKILL comes whatever has become of whoever asked. It comes only to a child that
** has not been reaped, whose number is nobody else's.
**
** Nothing of Lua happens between the first descriptor that is opened and the last one that is closed or
** handed over. The child gets nothing that it is not given: all descriptors of the library are
** close-on-exec. libuv gives it default dispositions and an empty mask of signals.
**
** While the state closes, children that are not detached are ended in the same way, in bounded time
** (process_end_all).
**
** Invariants: link.next != NULL exactly while it runs; then who waits is in `waiting`, and libuv's handle keeps the
**             loop alive exactly if somebody does.
**             child->object->child == child, or the object has been collected.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

extern char **environ;

enum { STREAMS = 3 }; /* user values 1 to 3 of the object: its ends of the pipes, or nil */
enum { WAIT_PROCESS = IO_FIRST };      /* of those who wait */
enum { UNKNOWN = -1, SIGNALED = 128 }; /* exit codes */
#define END_SECONDS 1.0 /* for children to end when a state closes, and again to be killed */

struct child {
  uv_process_t uv;
  uv_timer_t timer; /* of the grace */
  struct link link; /* in rt->children */
  struct link waiting;
  struct process *object; /* NULL: it has been collected */
  struct runtime *rt;
  double grace; /* seconds */
  int handles;  /* how many of the two libuv has */
  bool detached;
  bool ending; /* it was told to */
};

struct process {
  uint32_t tag;
  int pid, code, signal;
  bool collected; /* yet closed by a task that was collected with it */
  bool detached;
  struct child *child; /* NULL: it has ended */
};

struct wait_op {
  struct io io;
  struct link link;
  struct child *child;
  int code, signal;
};

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void on_close(uv_handle_t *uv) {
  struct child *c = uv->type == UV_TIMER ? container_of((uv_timer_t *)uv, struct child, timer)
                                         : container_of((uv_process_t *)uv, struct child, uv);
  if (--c->handles == 0) free(c);
}

static void close_child(struct child *c) {
  if (c->handles > 1) uv_close((uv_handle_t *)&c->timer, on_close);
  uv_close((uv_handle_t *)&c->uv, on_close);
}

static void stop_waiting(struct wait_op *op) {
  struct child *c = op->child;
  link_drop(&op->link);
  if (!waiter_any(&c->waiting)) uv_unref((uv_handle_t *)&c->uv);
}

static void end(struct child *c, int code, int signal) {
  link_drop(&c->link);
  if (c->object != NULL) {
    c->object->child = NULL;
    c->object->code = code;
    c->object->signal = signal;
  }
  while (waiter_any(&c->waiting)) {
    struct wait_op *op = container_of(c->waiting.next, struct wait_op, link);
    stop_waiting(op);
    op->code = code;
    op->signal = signal;
    io_done(&op->io, 0);
  }
  close_child(c);
}

static void on_end(uv_process_t *uv, int64_t code, int signal) {
  end(container_of(uv, struct child, uv), signal != 0 ? SIGNALED + signal : (int)code, signal);
}

/* false: it has ended */
static int send_signal(struct child *c, int signal) {
  int status = uv_process_kill(&c->uv, signal);
  if (status == UV_ESRCH) end(c, UNKNOWN, 0); /* another part of the program has reaped it */
  return status;
}

static void on_grace(uv_timer_t *timer) {
  send_signal(container_of(timer, struct child, timer), SIGKILL);
}

static void terminate(struct child *c) {
  if (c->ending || c->detached) return;
  c->ending = true;
  if (c->grace > 0 && c->grace < 1e9) {
    uv_timer_init(c->uv.loop, &c->timer);
    c->timer.data = NULL;
    c->handles++;
    uv_unref((uv_handle_t *)&c->timer);
    uv_update_time(c->uv.loop);
    uv_timer_start(&c->timer, on_grace, (uint64_t)ceil(c->grace * 1e3), 0);
  }
  send_signal(c, c->grace > 0 ? SIGTERM : SIGKILL);
}

bool process_is_child(const uv_handle_t *h) {
  const uv_process_t *uv = (const uv_process_t *)(const void *)h;
  return h->type == UV_PROCESS && uv_is_active(h) && uv->exit_cb == on_end &&
         !container_of(uv, const struct child, uv)->detached;
}

/* turns of the loop until none runs, but no longer than that */
static void wait_for_all(struct runtime *rt, double seconds) {
  double end = loop_real_now() + seconds;
  while (waiter_any(&rt->children) && poll_until(rt, end)) continue;
}

/* it is not ours any more */
static void leave(struct child *c) {
  link_drop(&c->link);
  if (c->object != NULL) c->object->child = NULL;
  close_child(c);
}

void process_end_all(struct runtime *rt) {
  for (struct link *l = rt->children.next, *next; l != &rt->children; l = next) {
    struct child *c = container_of(l, struct child, link);
    next = l->next;
    c->detached ? leave(c) : terminate(c);
  }
  wait_for_all(rt, END_SECONDS);
  for (struct link *l = rt->children.next, *next; l != &rt->children; l = next) {
    next = l->next;
    send_signal(container_of(l, struct child, link), SIGKILL);
  }
  wait_for_all(rt, END_SECONDS);
  while (waiter_any(&rt->children)) /* the system cannot end it */
    leave(container_of(rt->children.next, struct child, link));
}

static struct wait_op *as_wait(struct io *op) { return (struct wait_op *)(void *)op; }

static void wait_abort(struct io *op) {
  stop_waiting(as_wait(op));
  io_end(op);
}

/* the two ends of a pipe, [0] to read from; an error of libuv */
static int open_pipe(int fds[2]) {
#ifdef __linux__
  if (pipe2(fds, O_CLOEXEC) == 0) return 0;
#else
  if (pipe(fds) == 0) {
    fcntl(fds[0], F_SETFD, FD_CLOEXEC);
    fcntl(fds[1], F_SETFD, FD_CLOEXEC);
    return 0;
  }
#endif
  return uv_translate_sys_error(errno);
}

/* why nothing can be started there; 0: there is such a directory */
static int check_directory(const char *path) {
  struct stat s;
  if (stat(path, &s) != 0) return uv_translate_sys_error(errno);
  if (!S_ISDIR(s.st_mode)) return UV_ENOTDIR;
  return access(path, X_OK) == 0 ? 0 : uv_translate_sys_error(errno);
}

/* ---- Lua face ---- */

static struct process *check(lua_State *L) {
  return (struct process *)object_check(L, 1, TAG_PROCESS);
}

/* the child while it runs, or NULL */
static struct child *child_of(struct runtime *rt, const struct process *p) {
  if (!p->collected) return p->child;
  for (struct link *l = rt->children.next; l != &rt->children; l = l->next) {
    struct child *c = container_of(l, struct child, link);
    if (c->uv.pid == p->pid && c->object == NULL) return c;
  }
  return NULL;
}

/* ---- spawn ---- */

/* What one of the standard descriptors of the child is. */
struct standard {
  enum { GIVEN, NOTHING, PIPE, STREAM, LIKE_OUTPUT } kind;
  int fd;     /* for the child; -1: none yet */
  bool owned; /* to be closed here afterwards */
  int index;  /* of the stream, or 0 */
};

/* [-0, +0, e] the value at i is for the descriptor n. Opens nothing. */
static struct standard standard(lua_State *L, int i, int n) {
  static const char *const words[] = {"inherit", "null", "pipe", "stdout", NULL};
  static const char *const names[STREAMS] = {"stdin", "stdout", "stderr"};
  struct standard s = {GIVEN, -1, false, 0};
  if (lua_type(L, i) == LUA_TSTRING) {
    switch (luaL_checkoption(L, i, NULL, words)) {
      case 0: s.fd = n; break;
      case 1: s.kind = NOTHING; break;
      case 2: s.kind = PIPE; break;
      default:
        luaL_argcheck(L, n == STDERR_FILENO, i, "only stderr can be like stdout");
        s.kind = LIKE_OUTPUT;
    }
    return s;
  }
  luaL_Stream *file = (luaL_Stream *)luaL_testudata(L, i, LUA_FILEHANDLE);
  if (file != NULL) {
    s.fd = file->closef == NULL ? UV_EBADF : fileno(file->f);
    if (s.fd >= 0) fflush(file->f);
  } else if (object_test(L, i, TAG_FILE) != NULL)
    s.fd = file_lend(lua_touserdata(L, i));
  else if (object_test(L, i, TAG_STREAM) != NULL) {
    s.kind = STREAM;
    s.index = i;
    s.fd = stream_lend((struct stream *)lua_touserdata(L, i));
  } else {
    lua_Integer fd = luaL_checkinteger(L, i);
    s.fd = fd >= 0 && fd <= INT_MAX && fcntl((int)fd, F_GETFD) != -1 ? (int)fd : UV_EBADF;
  }
  if (s.fd == UV_EBUSY)
    error_throw(L, ERROR_OPERATION, "spawn: %s is in use here, or bytes of it were read ahead",
                names[n]);
  if (s.fd < 0) {
    handle_push_code(L, "EBADF", "spawn", "%s is closed, or no descriptor", names[n]);
    lua_error(L);
  }
  return s;
}

/* [-0, +1, m] the strings of the list at i, which keeps them, as C wants them: in a userdata */
static char **push_strings(lua_State *L, int i) {
  size_t n = lua_rawlen(L, i);
  char **list = (char **)lua_newuserdatauv(L, (n + 1) * sizeof *list, 0);
  for (size_t k = 0; k < n; k++) {
    lua_rawgeti(L, i, (lua_Integer)k + 1);
    luaL_argcheck(L, lua_type(L, -1) == LUA_TSTRING, i, "a list of strings expected");
    list[k] = (char *)lua_tostring(L, -1);
    lua_pop(L, 1);
  }
  list[n] = NULL;
  return list;
}

/* [-0, +1, m] the list of "NAME=value" that the table of changes at i makes of our environment, or of
** nothing */
static void push_environment(lua_State *L, int i, bool clear) {
  lua_Integer n = 0;
  lua_newtable(L);
  int list = lua_gettop(L);
  for (int k = 0; !clear && environ != NULL && environ[k] != NULL; k++) {
    lua_pushstring(L, environ[k]);
    const char *entry = lua_tostring(L, -1), *is = strchr(entry, '=');
    lua_pushlstring(L, entry, is != NULL ? (size_t)(is - entry) : strlen(entry));
    if (lua_rawget(L, i) != LUA_TNIL) { /* it has another value, or none */
      lua_pop(L, 2);
      continue;
    }
    lua_pop(L, 1);
    lua_rawseti(L, list, ++n);
  }
  for (lua_pushnil(L); lua_next(L, i); lua_pop(L, 1)) {
    if (lua_type(L, -1) != LUA_TSTRING || lua_type(L, -2) != LUA_TSTRING) continue;
    lua_pushfstring(L, "%s=%s", lua_tostring(L, -2), lua_tostring(L, -1));
    lua_rawseti(L, list, ++n);
  }
}

/* is_standard(value): a descriptor, or something that has one */
static int l_is_standard(lua_State *L) {
  lua_pushboolean(L, (lua_isinteger(L, 1) && lua_tointeger(L, 1) >= 0) ||
                         luaL_testudata(L, 1, LUA_FILEHANDLE) != NULL ||
                         object_test(L, 1, TAG_FILE) != NULL ||
                         object_test(L, 1, TAG_STREAM) != NULL);
  return 1;
}

enum {
  ARGS = 1,
  CWD,
  ENV,
  CLEAR,
  STANDARD,
  DETACHED = STANDARD + STREAMS,
  GRACE,
  SPAWN_COUNT = GRACE
};

static void free_child(struct child *c) { c->handles > 0 ? close_child(c) : free(c); }

/* Opens the pipes, whose ends are the streams at `streams` and on, and starts the child. No Lua. Whatever it
** returns, an error of libuv or 0, what it has opened for the child is closed. */
static int start(struct child *c, uv_process_options_t *options, struct standard at[],
                 struct stream *ends[]) {
  uv_stdio_container_t containers[STREAMS];
  int status = 0;
  for (int n = 0; n < STREAMS && status == 0; n++) {
    int fds[2];
    if (at[n].kind != PIPE) continue;
    status = open_pipe(fds);
    if (status != 0) break;
    at[n].fd = fds[n == STDIN_FILENO ? 0 : 1];
    at[n].owned = true;
    status = stream_adopt(ends[n], fds[n == STDIN_FILENO ? 1 : 0]);
  }
  if (at[STDERR_FILENO].kind == LIKE_OUTPUT) at[STDERR_FILENO].fd = at[STDOUT_FILENO].fd;
  for (int n = 0; n < STREAMS; n++) {
    containers[n].flags = at[n].fd >= 0 ? UV_INHERIT_FD : UV_IGNORE;
    containers[n].data.fd = at[n].fd;
  }
  options->stdio = containers;
  options->stdio_count = STREAMS;
  if (status == 0) {
    status = uv_spawn(&c->rt->loop, &c->uv, options);
    c->handles = 1; /* in any case */
    c->uv.data = NULL;
  }
  for (int n = 0; n < STREAMS; n++)
    if (at[n].owned) close(at[n].fd);
  return status;
}

/* [-0, +0, -] the stream at i is not used here any more */
static void drop_stream(lua_State *L, int i) {
  struct handle *h = (struct handle *)lua_touserdata(L, i);
  if (h == NULL) return;
  h->disposed = true;
  handle_changed(L, i);
}

/* spawn(args, cwd or nil, changes of the environment or nil, clear, stdin, stdout, stderr, detached,
** grace) */
static int l_spawn(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct standard at[STREAMS];
  struct stream *ends[STREAMS] = {NULL, NULL, NULL};
  uv_process_options_t options;
  memset(&options, 0, sizeof options);
  luaL_checktype(L, ARGS, LUA_TTABLE);
  options.cwd = luaL_optstring(L, CWD, NULL);
  if (!lua_isnil(L, ENV)) luaL_checktype(L, ENV, LUA_TTABLE);
  double grace = luaL_checknumber(L, GRACE);
  lua_settop(L, SPAWN_COUNT);
  luaL_checkstack(L, 20, NULL);
  loop_check_uv(L);

  options.args = push_strings(L, ARGS);
  luaL_argcheck(L, options.args[0] != NULL, ARGS, "no program");
  options.file = options.args[0];
  if (!lua_isnil(L, ENV)) {
    push_environment(L, ENV, lua_toboolean(L, CLEAR));
    options.env = push_strings(L, lua_gettop(L));
  }
  if (lua_toboolean(L, DETACHED)) options.flags |= UV_PROCESS_DETACHED;
  options.exit_cb = on_end;
  struct process *p = (struct process *)object_new(L, TAG_PROCESS, sizeof *p, STREAMS);
  int object = lua_gettop(L);
  p->code = UNKNOWN;
  p->detached = lua_toboolean(L, DETACHED);
  for (int n = 0; n < STREAMS; n++) {
    bool pipe = lua_type(L, STANDARD + n) == LUA_TSTRING &&
                strcmp(lua_tostring(L, STANDARD + n), "pipe") == 0;
    ends[n] = pipe ? stream_new(L, STREAM_PIPE) : NULL;
    if (!pipe) lua_pushnil(L);
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, object, n + 1);
  }
  for (int n = 0; n < STREAMS; n++) at[n] = standard(L, STANDARD + n, n);
  /* nothing creates an object from here on, so what is lent stays as it is */
  struct child *c = (struct child *)calloc(1, sizeof *c);
  if (c == NULL) return luaL_error(L, "not enough memory");
  c->rt = rt;
  c->grace = grace;
  c->detached = p->detached;
  link_init(&c->waiting);
  int status = start(c, &options, at, ends);
  for (int n = 0; n < STREAMS; n++) {
    if (ends[n] != NULL && status != 0) drop_stream(L, object + 1 + n);
    if (at[n].kind == STREAM && status == 0) drop_stream(L, at[n].index);
    if (at[n].kind == STREAM && status != 0) /* it stays here */
      stream_take_back((struct stream *)lua_touserdata(L, at[n].index));
  }
  if (status == 0) {
    uv_unref((uv_handle_t *)&c->uv);
    link_append(&rt->children, &c->link);
    c->object = p;
    p->child = c;
    p->pid = c->uv.pid;
    lua_settop(L, object);
    lua_pushlightuserdata(
        L, &c->uv); /* by which a test finds it, also when nobody has the object any more */
    testing_opened(L, rt);
    lua_pop(L, 1);
    return 1;
  }
  free_child(c);
  int refused = options.cwd != NULL ? check_directory(options.cwd) : 0;
  if (refused != 0) { /* the child tells only what, not where */
    char text[128], code[32];
    uv_strerror_r(refused, text, sizeof text);
    uv_err_name_r(refused, code, sizeof code);
    handle_push_code(L, code, "spawn", "the working directory '%s': %s", options.cwd, text);
    lua_pushstring(L, options.cwd);
    lua_setfield(L, -2, "path");
  } else
    io_push_error(L, status, "spawn", options.file);
  return lua_error(L);
}

/* ---- wait, signals ---- */

/* [-0, +1, m] */
static void push_signal(lua_State *L, int signal) {
  const char *name = signal_name(signal);
  if (name != NULL)
    lua_pushstring(L, name);
  else
    lua_pushfstring(L, "SIG%d", signal);
}

static int wait_land(lua_State *L, struct io *op) {
  const struct wait_op *w = as_wait(op);
  lua_pushinteger(L, w->code);
  if (w->signal == 0)
    lua_pushnil(L);
  else
    push_signal(L, w->signal);
  return 2;
}

static const struct io_class wait_class = {"process:wait", "wait", wait_land,
                                           wait_abort,     NULL,   NULL};

/* ended(process, token): waits for its end, and touches nothing when it is canceled */
static int l_ended(lua_State *L) {
  const struct process *p = check(L);
  token_opt(L, 2);
  lua_settop(L, 2);
  struct wait_op *op =
      (struct wait_op *)(void *)io_begin(L, 2, &wait_class, sizeof *op, WAIT_PROCESS);
  if (op == NULL) return 1;
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, WAIT_PROCESS);
  struct child *c = child_of(runtime(L), p);
  if (c == NULL) {
    op->code = p->code;
    op->signal = p->signal;
    io_end(&op->io);
    io_land(L, lua_gettop(L));
    return 1;
  }
  op->child = c;
  if (!waiter_any(&c->waiting)) uv_ref((uv_handle_t *)&c->uv);
  link_append(&c->waiting, &op->link);
  return 1;
}

/* terminate(process): unless it is detached. Returns at once. */
static int l_terminate(lua_State *L) {
  struct child *c = child_of(runtime(L), check(L));
  if (c != NULL) terminate(c);
  return 0;
}

/* give_up(process): whoever waited does so no more: terminates it, if nobody else waits. Was that so? */
static int l_give_up(lua_State *L) {
  struct child *c = child_of(runtime(L), check(L));
  bool alone = c != NULL && !c->detached && !waiter_any(&c->waiting);
  if (alone) terminate(c);
  lua_pushboolean(L, alone);
  return 1;
}

/* kill(signal): SIGTERM by default -> was it sent? */
static int l_kill(lua_State *L) {
  struct process *p = check(L);
  const char *name = luaL_optstring(L, 2, "SIGTERM");
  int signal = signal_number(name);
  if (signal == 0) {
    const char *full = lua_pushfstring(L, "SIG%s", name);
    luaL_argerror(L, 2,
                  signal_number(full) == 0
                      ? "no such signal"
                      : lua_pushfstring(L, "no such signal: its name is %s", full));
  }
  struct child *c = child_of(runtime(L), p);
  int status = c != NULL ? send_signal(c, signal) : UV_ESRCH;
  if (status < 0 && status != UV_ESRCH) {
    io_push_error(L, status, "kill", NULL);
    return lua_error(L);
  }
  lua_pushboolean(L, status == 0);
  return 1;
}

/* ---- the object ---- */

static int l_gc(lua_State *L) {
  struct process *p = (struct process *)object_test(L, 1, TAG_PROCESS);
  if (p == NULL || p->child == NULL || runtime(L)->closed) return 0;
  p->child->object = NULL;
  p->child = NULL;
  p->collected = true;
  return 0;
}

static int push_stream(lua_State *L, int n) {
  check(L);
  lua_getiuservalue(L, 1, n + 1);
  return 1;
}

static int l_stdin(lua_State *L) { return push_stream(L, STDIN_FILENO); }
static int l_stdout(lua_State *L) { return push_stream(L, STDOUT_FILENO); }
static int l_stderr(lua_State *L) { return push_stream(L, STDERR_FILENO); }

static int l_pid(lua_State *L) {
  lua_pushinteger(L, check(L)->pid);
  return 1;
}

static int l_is_running(lua_State *L) {
  lua_pushboolean(L, child_of(runtime(L), check(L)) != NULL);
  return 1;
}

static int l_is_detached(lua_State *L) {
  lua_pushboolean(L, check(L)->detached);
  return 1;
}

static int l_tostring(lua_State *L) {
  const struct process *p = check(L);
  if (child_of(runtime(L), p) != NULL)
    lua_pushfstring(L, "coflow.Process (%d, running)", p->pid);
  else if (p->signal == 0)
    lua_pushfstring(L, "coflow.Process (%d, ended with %d)", p->pid, p->code);
  else {
    push_signal(L, p->signal);
    lua_pushfstring(L, "coflow.Process (%d, ended by %s)", p->pid, lua_tostring(L, -1));
  }
  return 1;
}

static const luaL_Reg methods[] = {
    {"kill", l_kill}, {"__gc", l_gc}, {"__tostring", l_tostring}, {NULL, NULL}};
static const luaL_Reg properties[] = {
    {"stdin", l_stdin}, {"stdout", l_stdout},         {"stderr", l_stderr},
    {"pid", l_pid},     {"is_running", l_is_running}, {"is_detached", l_is_detached},
    {NULL, NULL}};
static const luaL_Reg operations[] = {{"ended", l_ended}, {NULL, NULL}};
static const luaL_Reg plain[] = {{"spawn", l_spawn},
                                 {"is_standard", l_is_standard},
                                 {"terminate", l_terminate},
                                 {"give_up", l_give_up},
                                 {NULL, NULL}};

/* open_process(close) -> the functions that coflow.process is made of; makes the class, whose __close
** it is */
static int l_open_process(lua_State *L) {
  luaL_checktype(L, 1, LUA_TFUNCTION);
  lua_settop(L, 1);
  module_class(L, TAG_PROCESS, "coflow.Process", methods, properties);
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_PROCESS));
  lua_pushvalue(L, 1);
  lua_setfield(L, -2, "__close");
  lua_newtable(L);
  io_functions(L, operations);
  module_functions(L, plain);
  return 1;
}

static const luaL_Reg functions[] = {{"open_process", l_open_process}, {NULL, NULL}};

const struct part process_part = {functions, io_open, NULL};
