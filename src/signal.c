/*
** signal.c - signals of the system, for those who catch them.
**
** A *catcher* is for some signals. While it is open, their default action is off for the whole process,
** and each one that comes is noted in every catcher that is for it: in order of arrival, and once until
** it is taken, as the system itself does with signals that are pending. So none is lost between two
** waits.
**
** There is one uv_signal_t for each number ever caught, shared by the catchers: started when the first
** one opens, stopped when the last one closes, which gives the signal back to the system. It is freed
** with the loop. While it is started it keeps the loop alive: whoever waits for a signal does not wait
** in vain.
**
** A catcher may be for the first signal only (`once`). Those share a handle of their own, a one-shot
** one: the system gives the signal back when it comes, so that a second one has its default action even
** if the program computes and hears of none.
**
** Who waits awaits a promise of the catcher's, complete once something is noted. It is the catcher that
** lands then: it begins with a struct task for the ready list's sake, as a scope does, and is nothing
** for scripts. While its promise is pending its anchor holds it, so that who waits for a signal is not
** garbage.
**
** Invariants: link.next != NULL while it is open; then it counts once in `users` of each signal of its mask.
**             task.slot != 0 while its promise is pending, or it is on the ready list.
**             order[0 .. count-1] are the numbers in `noted`, each once.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <signal.h>
#include <string.h>

enum { NUMBERS = 32 }; /* the names below are of lower ones */
enum { CATCHER_PROMISE = 1 };

struct catcher {
  struct task task;
  struct link link; /* in rt->catchers */
  uint32_t mask, noted;
  bool once;
  uint8_t order[NUMBERS];
  int count;
};

struct caught {
  struct caught *next;
  int number, users;
  bool once;
  uv_signal_t uv;
};

struct name {
  const char *name;
  int number;
};
static const struct name names[] = {{"SIGHUP", SIGHUP},   {"SIGINT", SIGINT},
                                    {"SIGQUIT", SIGQUIT}, {"SIGABRT", SIGABRT},
                                    {"SIGUSR1", SIGUSR1}, {"SIGUSR2", SIGUSR2},
                                    {"SIGPIPE", SIGPIPE}, {"SIGALRM", SIGALRM},
                                    {"SIGTERM", SIGTERM}, {"SIGCHLD", SIGCHLD},
                                    {"SIGCONT", SIGCONT}, {"SIGTSTP", SIGTSTP},
                                    {"SIGTTIN", SIGTTIN}, {"SIGTTOU", SIGTTOU},
                                    {"SIGURG", SIGURG},   {"SIGXCPU", SIGXCPU},
                                    {"SIGXFSZ", SIGXFSZ}, {"SIGVTALRM", SIGVTALRM},
                                    {"SIGPROF", SIGPROF}, {"SIGWINCH", SIGWINCH},
                                    {"SIGIO", SIGIO},     {NULL, 0}};

/* those that only end or stop a process: nobody catches them here */
static const struct name others[] = {
    {"SIGKILL", SIGKILL}, {"SIGSTOP", SIGSTOP}, {"SIGSEGV", SIGSEGV},
    {"SIGBUS", SIGBUS},   {"SIGILL", SIGILL},   {"SIGFPE", SIGFPE},
    {"SIGTRAP", SIGTRAP}, {"SIGSYS", SIGSYS},   {NULL, 0}};

const char *signal_name(int number) {
  for (int i = 0; names[i].name; i++)
    if (names[i].number == number) return names[i].name;
  for (int i = 0; others[i].name; i++)
    if (others[i].number == number) return others[i].name;
  return NULL;
}

int signal_number(const char *name) {
  for (int i = 0; names[i].name; i++)
    if (strcmp(names[i].name, name) == 0) return names[i].number;
  for (int i = 0; others[i].name; i++)
    if (strcmp(others[i].name, name) == 0) return others[i].number;
  return 0;
}

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static void on_signal(uv_signal_t *handle, int number) {
  struct runtime *rt = container_of(handle->loop, struct runtime, loop);
  const struct caught *s = container_of(handle, struct caught, uv);
  uint32_t bit = (uint32_t)1 << number;
  for (struct link *l = rt->catchers.next; l != &rt->catchers; l = l->next) {
    struct catcher *c = container_of(l, struct catcher, link);
    if (!(c->mask & bit) || c->noted & bit || c->once != s->once) continue;
    c->noted |= bit;
    c->order[c->count++] = (uint8_t)number;
    if (c->task.slot != 0) loop_ready(rt, &c->task);
  }
}

bool signal_is_caught(const struct runtime *rt, int number) {
  for (const struct link *l = rt->catchers.next; l != &rt->catchers; l = l->next)
    if (container_of(l, struct catcher, link)->mask & (uint32_t)1 << number) return true;
  return false;
}

static struct caught *find(struct runtime *rt, int number, bool once) {
  struct caught *s = rt->caught;
  while (s != NULL && (s->number != number || s->once != once)) s = s->next;
  return s;
}

static void unuse(struct caught *s) {
  if (--s->users > 0) return;
  uv_signal_stop(&s->uv);
  uv_unref((uv_handle_t *)&s->uv);
  if (s->number == SIGPIPE) handle_ignore_broken_pipes(); /* libuv has made it deadly again */
}

static int use(struct caught *s) {
  int status = 0;
  if (!uv_is_active((uv_handle_t *)&s->uv)) /* nobody, or a one-shot one whose signal has come */
    status = s->once ? uv_signal_start_oneshot(&s->uv, on_signal, s->number)
                     : uv_signal_start(&s->uv, on_signal, s->number);
  if (status < 0) return status;
  uv_ref((uv_handle_t *)&s->uv);
  s->users++;
  return 0;
}

static void unuse_all(struct runtime *rt, uint32_t mask, bool once) {
  for (int number = 0; number < NUMBERS; number++)
    if (mask >> number & 1) unuse(find(rt, number, once));
}

/* what was opened; an error of libuv leaves everything as it was */
static int use_all(struct runtime *rt, uint32_t mask, bool once) {
  for (int number = 0; number < NUMBERS; number++) {
    if (!(mask >> number & 1)) continue;
    int status = use(find(rt, number, once));
    if (status >= 0) continue;
    unuse_all(rt, mask & (((uint32_t)1 << number) - 1), once);
    return status;
  }
  return 0;
}

static void catcher_close(struct runtime *rt, struct catcher *c) {
  if (c->link.next == NULL) return;
  link_drop(&c->link);
  unuse_all(rt, c->mask, c->once);
}

void signal_end_all(struct runtime *rt) {
  while (rt->catchers.next != &rt->catchers)
    catcher_close(rt, container_of(rt->catchers.next, struct catcher, link));
}

void signal_free(lua_State *L, struct runtime *rt) {
  while (rt->caught != NULL) {
    struct caught *s = rt->caught;
    rt->caught = s->next;
    module_resize(L, s, sizeof *s, 0);
  }
}

/* ---- Lua face ---- */

/* [-0, +0, m] there is a handle for that signal */
static void need(lua_State *L, struct runtime *rt, int number, bool once) {
  if (find(rt, number, once) != NULL) return;
  struct caught *s = (struct caught *)module_resize(L, NULL, 0, sizeof *s);
  if (s == NULL) luaL_error(L, "not enough memory");
  *s = (struct caught){.next = rt->caught, .number = number, .once = once};
  uv_signal_init(&rt->loop,
                 &s->uv); /* which cannot fail: uv_loop_init has made the pipe that it needs */
  uv_unref((uv_handle_t *)&s->uv);
  rt->caught = s;
}

/* catch(once, number …) -> a catcher */
static int l_catch(lua_State *L) {
  struct runtime *rt = runtime(L);
  bool once = lua_toboolean(L, 1);
  uint32_t mask = 0;
  loop_check_uv(L);
  for (int i = lua_gettop(L); i > 1; i--) {
    lua_Integer number = luaL_checkinteger(L, i);
    luaL_argcheck(L, number > 0 && number < NUMBERS, i, "no such signal");
    mask |= (uint32_t)1 << number;
    need(L, rt, (int)number, once);
  }
  struct catcher *c =
      (struct catcher *)object_new(L, TAG_CATCHER | KIND_CATCHER, sizeof *c, CATCHER_PROMISE);
  c->task.state = TASK_WAITING;
  c->mask = mask;
  c->once = once;
  int status = use_all(rt, mask, once);
  if (status < 0) {
    error_push(L, ERROR_IO, "cannot catch the signal: %s", uv_strerror(status));
    lua_pushstring(L, uv_err_name(status));
    lua_setfield(L, -2, "code");
    return lua_error(L);
  }
  link_append(&rt->catchers, &c->link);
  return 1;
}

static struct catcher *check_catcher(lua_State *L) {
  return (struct catcher *)object_check(L, 1, TAG_CATCHER | KIND_CATCHER);
}

/* catcher:take() -> the number of the first signal that was noted, which is not any more; or nil */
static int l_take(lua_State *L) {
  struct catcher *c = check_catcher(L);
  if (c->count == 0) return 0;
  int number = c->order[0];
  c->noted &= ~((uint32_t)1 << number);
  c->count--;
  for (int i = 0; i < c->count; i++) c->order[i] = c->order[i + 1];
  lua_pushinteger(L, number);
  return 1;
}

/* catcher:wait() -> a task that is complete once there is something to take, or it is closed */
static int l_wait(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct catcher *c = check_catcher(L);
  lua_settop(L, 1);
  if (lua_getiuservalue(L, 1, CATCHER_PROMISE) != LUA_TNIL) return 1;
  task_new_named(L, "signal"); /* catcher nil promise */
  if (c->count > 0 || c->link.next == NULL) {
    task_settle(L, rt, 3, 0);
    return 1;
  }
  task_hold(L, 1, &c->task);
  lua_pushvalue(L, 3);
  lua_setiuservalue(L, 1, CATCHER_PROMISE);
  return 1;
}

void signal_land(lua_State *L, int i) {
  struct catcher *c = (struct catcher *)lua_touserdata(L, i);
  bool pending = lua_getiuservalue(L, i, CATCHER_PROMISE) == LUA_TUSERDATA;
  task_forget(L, &c->task);
  lua_pushnil(L);
  lua_setiuservalue(L, i, CATCHER_PROMISE);
  if (pending) task_settle(L, runtime(L), lua_gettop(L), 0);
}

static int l_close(lua_State *L) {
  struct catcher *c = check_catcher(L);
  lua_settop(L, 1);
  catcher_close(runtime(L), c);
  if (c->task.slot != 0 && !(c->task.flags & TASK_LINKED)) signal_land(L, 1);
  return 0;
}

static int l_gc(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct catcher *c = (struct catcher *)object_test(L, 1, TAG_CATCHER | KIND_CATCHER);
  if (c != NULL && !rt->closed && c->task.slot == 0) catcher_close(rt, c);
  return 0;
}

/* signals() -> { SIGINT = number, … } */
static int l_signals(lua_State *L) {
  lua_newtable(L);
  for (int i = 0; names[i].name; i++) {
    lua_pushinteger(L, names[i].number);
    lua_setfield(L, -2, names[i].name);
  }
  return 1;
}

static const luaL_Reg methods[] = {
    {"take", l_take}, {"wait", l_wait}, {"__close", l_close}, {"__gc", l_gc}, {NULL, NULL}};

static const luaL_Reg functions[] = {{"catch", l_catch}, {"signals", l_signals}, {NULL, NULL}};

ONCE static void signal_open(lua_State *L) {
  module_class(L, TAG_CATCHER, "coflow.SignalCatcher", methods, NULL);
}

const struct part signal_part = {functions, signal_open, NULL};
