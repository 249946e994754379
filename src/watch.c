/*
** watch.c - changes of files and directories, one after another.
**
** libuv calls back for each change; it is put in a list, and whoever waits longest gets it. A watcher is two
** things: the object of the script, and what libuv knows, which lives until the handle is closed. The
** handle keeps the loop alive only while somebody waits for a change.
**
** A change goes over from the list to a waiter when that becomes ready, and is told when that lands: if
** it is canceled in between, or while the change is made a table, which may run finalizers of users,
** the change goes back to its place in the list, and is the next one's.
**
** Invariants: a change is in the list, or one waiter's that is ready, and `count` counts both; the list is in the order
**             of `number`. Somebody waits only if the list is empty, and the watcher is open.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <stdlib.h>
#include <string.h>

enum { WATCHER_PATH = 1 };         /* user values of the object */
enum { WATCH_WATCHER = IO_FIRST }; /* of those who wait */
enum { MOST = 4096 };              /* changes that nobody has asked for; then some are lost */
enum { OVERFLOW = 1 << 30 };       /* … which is a change of its own */

struct change {
  struct change *next;
  uint64_t number; /* of the watcher's changes */
  int events;
  char name[];
};

struct watch {
  uv_fs_event_t handle;
  struct change *first, *last; /* nobody's yet */
  uint64_t number;             /* of the last one that came */
  int count;                   /* not told yet */
  int error;
  bool closed;
  struct link waiting;
};

struct watcher {
  uint32_t tag;
  struct watch *watch; /* NULL: closed */
  struct link link;    /* in rt->watchers until then */
};

struct next_op {
  struct io io;
  struct watcher *watcher; /* a user value as well */
  struct change *change;   /* NULL: none, or it is told */
  struct link link;        /* among those who wait */
};

/* ---- libuv side: no Lua below this line until the Lua face ---- */

static struct next_op *first_waiting(struct watch *w) {
  return w->waiting.next == &w->waiting ? NULL
                                        : container_of(w->waiting.next, struct next_op, link);
}

static void stop_waiting(struct watch *w, struct next_op *op) {
  link_drop(&op->link);
  if (first_waiting(w) == NULL) uv_unref((uv_handle_t *)&w->handle);
}

/* the first of the list, or NULL */
static struct change *take_first(struct watch *w) {
  struct change *c = w->first;
  if (c == NULL) return NULL;
  w->first = c->next;
  if (w->first == NULL) w->last = NULL;
  return c;
}

/* whoever waits longest gets what has come */
static void promise(struct watch *w) {
  for (struct next_op *op; (op = first_waiting(w)) != NULL;) {
    if (w->first == NULL && w->error == 0 && !w->closed) return;
    stop_waiting(w, op);
    op->change = take_first(w);
    io_done(&op->io, 0);
  }
}

static void give_back(struct watch *w, struct change *c) {
  struct change **at = &w->first;
  while (*at != NULL && (*at)->number < c->number) at = &(*at)->next;
  c->next = *at;
  *at = c;
  if (c->next == NULL) w->last = c;
  promise(w);
}

static void add(struct watch *w, const char *name, int events) {
  if (name == NULL) name = "";
  if (w->last != NULL && w->last->events == events && strcmp(w->last->name, name) == 0)
    return; /* the same once more */
  if (w->count > MOST) return;
  if (w->count == MOST) {
    name = "";
    events = OVERFLOW;
  }
  size_t n = strlen(name);
  struct change *c = malloc(sizeof *c + n + 1);
  if (c == NULL) return;
  c->next = NULL;
  c->number = ++w->number;
  c->events = events;
  memcpy(c->name, name, n + 1);
  if (w->last)
    w->last->next = c;
  else
    w->first = c;
  w->last = c;
  w->count++;
}

static void on_change(uv_fs_event_t *handle, const char *name, int events, int status) {
  struct watch *w = container_of(handle, struct watch, handle);
  if (status < 0)
    w->error = status;
  else
    add(w, name, events);
  promise(w);
}

static void on_close(uv_handle_t *handle) {
  struct watch *w = container_of((uv_fs_event_t *)handle, struct watch, handle);
  for (struct change *c; (c = take_first(w)) != NULL;) free(c);
  free(w);
}

static void close_watch(struct watch *w) {
  w->closed = true;
  promise(w);
  uv_close((uv_handle_t *)&w->handle, on_close);
}

static void close_watcher(struct watcher *object) {
  struct watch *w = object->watch;
  object->watch = NULL;
  link_drop(&object->link);
  close_watch(w);
}

void watch_close_all(struct runtime *rt) {
  while (rt->watchers.next != &rt->watchers)
    close_watcher(container_of(rt->watchers.next, struct watcher, link));
}

static struct next_op *as_next(struct io *op) { return (struct next_op *)(void *)op; }

static void next_abort(struct io *op) {
  stop_waiting(as_next(op)->watcher->watch, as_next(op));
  io_end(op);
}

static void next_release(struct io *op) {
  struct change *c = as_next(op)->change;
  if (c == NULL) return;
  as_next(op)->change = NULL;
  struct watch *w = as_next(op)->watcher->watch;
  if (w == NULL || op->rt->closed)
    free(c);
  else
    give_back(w, c);
}

/* ---- Lua face ---- */

/* [-0, +1, m] */
static void push_change(lua_State *L, const struct change *c) {
  lua_createtable(L, 0, 2);
  lua_pushstring(L, c->events & OVERFLOW    ? "overflow"
                    : c->events & UV_RENAME ? "rename"
                                            : "change");
  lua_setfield(L, -2, "kind");
  if (*c->name == '\0') return;
  lua_pushstring(L, c->name);
  lua_setfield(L, -2, "name");
}

static int next_land(lua_State *L, struct io *op) {
  struct next_op *n = as_next(op);
  const struct watch *w = n->watcher->watch;
  if (w == NULL) { /* closed */
    lua_pushnil(L);
    return 1;
  }
  if (n->change != NULL) {
    push_change(L, n->change);
    if (task_done(&op->pending.task)) return 1;                /* canceled by a finalizer */
    if (n->watcher->watch != NULL) n->watcher->watch->count--; /* else closed by one */
    free(n->change);
    n->change = NULL;
    return 1;
  }
  lua_getiuservalue(L, 1, IO_PATH);
  io_push_error(L, w->error, "watch", lua_tostring(L, -1));
  return lua_error(L);
}

static const struct io_class next_class = {"watcher:next", "watch",      next_land,
                                           next_abort,     next_release, NULL};

static struct watcher *check_watcher(lua_State *L) {
  return (struct watcher *)object_check(L, 1, TAG_WATCHER);
}

/* next(token) */
static int l_next(lua_State *L) {
  check_watcher(L);
  token_opt(L, 2);
  lua_settop(L, 2);
  struct next_op *op =
      (struct next_op *)(void *)io_begin(L, 2, &next_class, sizeof *op, WATCH_WATCHER);
  if (op == NULL) return 1;
  op->watcher = (struct watcher *)lua_touserdata(L, 1);
  struct watch *w = op->watcher->watch; /* looked at last */
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, WATCH_WATCHER);
  lua_getiuservalue(L, 1, WATCHER_PATH);
  lua_setiuservalue(L, -2, IO_PATH);
  if (w == NULL || w->error != 0 || w->first != NULL) {
    if (w != NULL) op->change = take_first(w);
    io_end(&op->io);
    io_land(L, lua_gettop(L));
    return 1;
  }
  if (first_waiting(w) == NULL) uv_ref((uv_handle_t *)&w->handle);
  link_append(&w->waiting, &op->link);
  return 1;
}

/* watch(path) */
static int l_watch(lua_State *L) {
  const char *path = io_check_path(L, 1);
  struct runtime *rt = runtime(L);
  struct watcher *object =
      (struct watcher *)object_new(L, TAG_WATCHER, sizeof *object, WATCHER_PATH);
  lua_pushvalue(L, 1);
  lua_setiuservalue(L, -2, WATCHER_PATH);
  uv_loop_t *loop = loop_check_uv(L);
  struct watch *w = calloc(1, sizeof *w);
  if (w == NULL) return luaL_error(L, "not enough memory");
  link_init(&w->waiting);
  uv_fs_event_init(loop, &w->handle);
  uv_unref((uv_handle_t *)&w->handle);
  int status = uv_fs_event_start(&w->handle, on_change, path, 0);
  if (status < 0) {
    close_watch(w);
    io_push_error(L, status, "watch", path);
    return lua_error(L);
  }
  object->watch = w;
  link_append(&rt->watchers, &object->link);
  if (rt->births != NULL) { /* if the test leaves it, it is to be found */
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WEAK);
    lua_pushvalue(L, -2);
    lua_rawsetp(L, -2, w);
    lua_pop(L, 1);
    testing_opened(L, rt);
  }
  return 1;
}

static int l_close(lua_State *L) {
  struct watcher *object = check_watcher(L);
  if (object->watch == NULL) return 0;
  task_forget_weak(L, object->watch);
  close_watcher(object);
  return 0;
}

static int l_gc(lua_State *L) {
  if (object_test(L, 1, TAG_WATCHER) == NULL || runtime(L)->closed) return 0;
  lua_settop(L, 1);
  if (((struct watcher *)lua_touserdata(L, 1))->watch != NULL) testing_lost(L, runtime(L), 1);
  return l_close(L);
}

static int l_tostring(lua_State *L) {
  const struct watcher *object = check_watcher(L);
  lua_getiuservalue(L, 1, WATCHER_PATH);
  lua_pushfstring(L, "coflow.Watcher '%s'%s", lua_tostring(L, -1),
                  object->watch ? "" : " (closed)");
  return 1;
}

static const luaL_Reg operations[] = {{"next", l_next}, {NULL, NULL}};
static const luaL_Reg methods[] = {{"close", l_close},         {"dispose", l_close},
                                   {"__close", l_close},       {"__gc", l_gc},
                                   {"__tostring", l_tostring}, {NULL, NULL}};
static const luaL_Reg functions[] = {{"watch", l_watch}, {NULL, NULL}};

void watch_open(lua_State *L) {
  module_class(L, TAG_WATCHER, "coflow.Watcher", methods, NULL);
  io_methods(L, TAG_WATCHER, operations);
  module_functions(L, functions);
}
