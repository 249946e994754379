/*
** outside.c - what happens outside of the tasks, for spec/testing_spec.lua, which builds it: work in the pool,
** file operations, processes, sockets and timers on coflow's own loop, without a module of coflow's.
**
** Looks into the runtime (src/core.h) for the loop. Each thing is one struct, told by its address; `done` says
** whether it has come to its end.
**
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <unistd.h>

struct thing {
  union {
    uv_work_t work;
    uv_fs_t fs;
    uv_process_t process;
    uv_tcp_t tcp;
    uv_timer_t timer;
    uv_idle_t idle;
    uv_handle_t handle;
  } u;
  unsigned ms;
  int done;
};

static uv_loop_t *loop;

static struct thing *push_thing(lua_State *L) {
  static struct thing things[128]; /* may be in use until the loop is closed */
  static int count;
  if (count == 128) luaL_error(L, "too many things");
  struct thing *t = &things[count++];
  lua_pushlightuserdata(L, t);
  return t;
}

static void check(lua_State *L, int status) {
  if (status < 0) luaL_error(L, "%s", uv_strerror(status));
}

static void on_work(uv_work_t *work) { usleep(((struct thing *)work)->ms * 1000); }
static void on_worked(uv_work_t *work, int status) { ((struct thing *)work)->done = status == 0; }
static void on_fs(uv_fs_t *fs) {
  ((struct thing *)fs)->done = 1;
  uv_fs_req_cleanup(fs);
}
static void on_exit_process(uv_process_t *process, int64_t status, int signal) {
  (void)status, (void)signal;
  ((struct thing *)process)->done = 1;
  uv_close((uv_handle_t *)process, NULL);
}
static void on_time(uv_timer_t *timer) {
  ((struct thing *)timer)->done = 1;
  uv_close((uv_handle_t *)timer, NULL);
}
static void on_idle(uv_idle_t *idle) { ((struct thing *)idle)->done++; }
static void on_connection(uv_stream_t *server, int status) { (void)server, (void)status; }

/* work(ms): a job of the pool */
static int l_work(lua_State *L) {
  unsigned ms = (unsigned)lua_tointeger(L, 1);
  struct thing *t = push_thing(L);
  t->ms = ms;
  check(L, uv_queue_work(loop, &t->u.work, on_work, on_worked));
  return 1;
}

static int l_stat(lua_State *L) {
  struct thing *t = push_thing(L);
  check(L, uv_fs_stat(loop, &t->u.fs, "/", on_fs));
  return 1;
}

/* process(seconds, a string) */
static int l_process(lua_State *L) {
  char *args[] = {"sleep", (char *)lua_tostring(L, 1), NULL};
  uv_process_options_t options = {.exit_cb = on_exit_process, .file = "sleep", .args = args};
  check(L, uv_spawn(loop, &push_thing(L)->u.process, &options));
  return 1;
}

static int l_listen(lua_State *L) {
  struct thing *t = push_thing(L);
  struct sockaddr_in address;
  check(L, uv_tcp_init(loop, &t->u.tcp));
  uv_ip4_addr("127.0.0.1", 0, &address);
  check(L, uv_tcp_bind(&t->u.tcp, (const struct sockaddr *)&address, 0));
  check(L, uv_listen((uv_stream_t *)&t->u.tcp, 1, on_connection));
  return 1;
}

/* timer(ms): of libuv's own, in real time */
static int l_timer(lua_State *L) {
  struct thing *t = push_thing(L);
  uv_timer_init(loop, &t->u.timer);
  uv_update_time(loop);
  uv_timer_start(&t->u.timer, on_time, (uint64_t)lua_tointeger(L, 1), 0);
  return 1;
}

/* spin(): is called at every turn, and never lets the loop wait */
static int l_spin(lua_State *L) {
  struct thing *t = push_thing(L);
  uv_idle_init(loop, &t->u.idle);
  uv_idle_start(&t->u.idle, on_idle);
  return 1;
}

static int l_close(lua_State *L) {
  uv_close(&((struct thing *)lua_touserdata(L, 1))->u.handle, NULL);
  return 0;
}

static int l_done(lua_State *L) {
  lua_pushboolean(L, ((struct thing *)lua_touserdata(L, 1))->done);
  return 1;
}

static const luaL_Reg functions[] = {{"work", l_work},     {"stat", l_stat},   {"process", l_process},
                                     {"listen", l_listen}, {"timer", l_timer}, {"spin", l_spin},
                                     {"close", l_close},   {"done", l_done},   {NULL, NULL}};

/* called with a function of the core, which has the runtime as an upvalue; the loop must be open */
__attribute__((visibility("default"))) int luaopen_outside(lua_State *L);
int luaopen_outside(lua_State *L) {
  lua_getupvalue(L, 1, 1);
  struct runtime *rt = (struct runtime *)lua_touserdata(L, -1);
  if (rt == NULL || !rt->loop_open) return luaL_error(L, "no open loop in it");
  loop = &rt->loop;
  luaL_newlib(L, functions);
  return 1;
}
