/*
** shutdown.c - the end of the state: what is in flight is stopped, and all is given back.
**
** It is the finalizer of the runtime that comes here. The runtime is older than all objects of ours, so
** theirs have run by then: no task will, and nothing lands any more; operations are released without
** Lua (io.c). Objects that finalizers of users have made since Lua began to close the state have no
** finalizer any more: what these have open is found by the lists of the runtime. Finalizers of objects
** that are older still run after the end, and may use what is there; but what needs more than Lua's
** memory is refused from then on (shutdown_check).
**
** What was written to the standard streams is sent, for a bounded time. Then all is canceled, and libuv
** waited for until it has let go, for a bounded time again. A thread of its pool that is stuck in a
** system call cannot be stopped, and may still write where it was told to: then the memory of the whole
** state is given up, not freed.
**
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <dlfcn.h>
#include <stdio.h>

/* to send what was written, and again for threads to let go */
#define CLOSE_SECONDS 2.0

static void close_any(uv_handle_t *handle, void *timer) {
  if (handle != timer && !uv_is_closing(handle)) uv_close(handle, NULL);
}

/* false: a thread is stuck, so that libuv has not let go */
static bool close_uv(struct runtime *rt) {
  uv_handle_t *timer = (uv_handle_t *)&rt->timer;
  double start = loop_real_now();
  uv_unref(timer); /* it bounds each wait, and is no reason for one */
  while (stdio_sends(rt) && poll_until(rt, start + CLOSE_SECONDS)) continue;
  io_abort_all(rt);
  io_release_all(rt); /* now: a file whose job was done may have another waiting, which closes it */
  uv_ref(timer);      /* nothing else may be a reason to poll for the end of children */
  process_end_all(rt);
  uv_unref(timer);
  start = loop_real_now();
  handle_close_all(rt);
  watch_close_all(rt);
  signal_end_all(rt);
  uv_walk(&rt->loop, close_any, timer);
  while (uv_loop_alive(&rt->loop) && poll_until(rt, start + CLOSE_SECONDS)) continue;
  if (uv_loop_alive(&rt->loop)) return false;
  uv_close(timer, NULL);
  uv_run(&rt->loop, UV_RUN_DEFAULT);
  return uv_loop_close(&rt->loop) == 0;
}

/* An allocator that frees nothing any more. */
struct keeper {
  lua_Alloc alloc;
  void *ud;
};

static void *keep(void *ud, void *block, size_t old, size_t size) {
  const struct keeper *k = (const struct keeper *)ud;
  return size == 0 ? NULL : k->alloc(k->ud, block, old, size);
}

/* [-0, +0, -] The memory of a state that a thread may still write to is given up, all of it, and the code
** that it runs stays loaded. */
static void keep_memory(lua_State *L) {
  static const char anything;
  Dl_info here;
  void *ud;
  lua_Alloc alloc = lua_getallocf(L, &ud);
  if (dladdr(&anything, &here) != 0) dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
  struct keeper *k = (struct keeper *)alloc(ud, NULL, 0, sizeof *k);
  fprintf(stderr, "coflow: closed while a system call is stuck in a thread: nothing is freed\n");
  if (k == NULL) return;
  *k = (struct keeper){alloc, ud};
  lua_setallocf(L, keep, k);
}

void shutdown_refuse(lua_State *L) {
  error_throw(L, ERROR_OPERATION,
              "nothing begins any more: the library has been closed, as the Lua state is closing");
}

void shutdown_run(lua_State *L, struct runtime *rt) {
  rt->closed = true;
  if (rt->loop_open) {
    bool clean = close_uv(rt);
    file_close_all(rt);
    if (!clean)
      keep_memory(L);
    else {
      signal_free(L, rt);
      read_free(rt);
    }
    rt->loop_open = rt->timer_armed = false; /* for finalizers that are still to come */
  }
  module_resize(L, rt->idle, rt->idle_size * sizeof *rt->idle, 0);
  if (rt->births) testing_forget(L, rt);
  probe_close(L, rt);
  if (rt->ready || rt->idle_ticks || rt->lands) periodic_close(L, rt);
  deadline_close(L, rt);
  rt->idle = NULL;
  rt->idle_count = rt->idle_size = 0;
}
