/*
** testing.c - what a test changes: another source of time and of choice, and that births are noted.
**
** A test runs on the scheduler, the timers and the poll of production. While one runs
**
** - time is virtual (poll.c). What waits until the loop is *idle*, a task of KIND_IDLE, comes before any
**   jump of the clock: one at a time, the last one first, so that settling inside settling nests. Whoever moves a
**   clock by hand comes after all of these.
** - with a seed, any of the first WINDOW ready tasks comes next, and equal deadlines fire in any order.
**   Nothing but the seed decides: no address, no hash, no real clock. Nobody starves: the first of the
**   list is passed over PATIENCE times at most.
** - rt->births knows where each fiber, and each operation that may outlive the test, was made, and each Timer
**   was armed. What is in it and still waits in the end is what the test has left behind. It is an array over
**   the slots of the anchors, and for Timers one over the indices of deadlines, so it grows with what is there
**   at a time, not with what there ever was; and no object of Lua's, so that noting a birth creates nothing
**   and may happen in the middle of making a task.
** - a stream, listener or the like (handle.c) says so, too: one that is open in the end is left, though it keeps
**   no loop alive while nobody waits. Nothing of ours refers to an idle one; so that it can be closed,
**   RUNTIME_WEAK knows those that were made meanwhile by their addresses, and watchers of files by their handles'.
**   So does a PeriodicTimer or a File, of which RUNTIME_OPENED knows.
** - what is open, or a task that waits, and is collected is left behind as well, or whether a test passes that leaves
**   it in a local would be the collector's to say: its finalizer tells (testing_lost). But where somebody has set a
**   handler for unobserved exceptions, that is told of such a task instead.
**
** With no test running this costs one untaken branch for each slice of ready tasks, each fiber made and
** each deadline set.
**
** Invariants: a task in the list of idlers is held by its anchor and flagged TASK_LINKED.
**             births.of[…][i] is of the last one with that slot, or index, that said so, or 0.
**
** Source:    splitmix64 (Steele, Lea, Flood 2014); autojump clock and leak checks: trio.
** SPDX-License-Identifier: MIT
*/
#include "job.h"

#include <signal.h>
#include <string.h>

enum { WINDOW = 64, PATIENCE = 256 };
enum { HEADS = 256 };

/* ---- choice ---- */

uint64_t testing_random(struct runtime *rt) {
  uint64_t z = rt->random += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

void testing_choose(struct runtime *rt) {
  struct task *seen[WINDOW], *first = rt->ready;
  uint64_t n = 0;
  for (struct task *t = first; t != NULL && n < WINDOW; t = t->next) {
    seen[n++] = t;
    if (task_is(t, KIND_SCOPE) || task_is(t, KIND_EXPIRY)) break; /* its callbacks come first */
  }
  uint64_t k = n == 1 || rt->passed_over >= PATIENCE ? 0 : (testing_random(rt) >> 32) * n >> 32;
  if (k == 0) {
    rt->passed_over = 0;
    return;
  }
  rt->passed_over++;
  seen[k - 1]->next = seen[k]->next;
  if (rt->ready_last == seen[k]) rt->ready_last = seen[k - 1];
  seen[k]->next = first;
  rt->ready = seen[k];
}

/* ---- births ---- */

struct place {
  int line;
  uint32_t next; /* with the same hash; 0: none */
  char source[LUA_IDSIZE];
};

struct births {
  uint32_t *of[BIRTH_COUNT]; /* -> number of its place, from 1 on; 0: from before the test */
  size_t sizes[BIRTH_COUNT];
  struct place *places;
  uint32_t place_count, place_size;
  uint32_t heads[HEADS]; /* of the lists of places */
};

/* the number of its place, or 0 */
static uint32_t born_at(const struct births *b, enum birth of, size_t at) {
  return b != NULL && at < b->sizes[of] ? b->of[of][at] : 0;
}

/* the number of the innermost line that is not the library's own; what a task of the library makes was
** made where that one was. 0: none, or no memory */
static uint32_t find_place(lua_State *L, struct births *b) {
  lua_Debug ar;
  if (!blame_find_line(L, L, 0, &ar)) return born_at(b, BIRTH_SLOT, (size_t)runtime(L)->me->slot);
  uint32_t *head = &b->heads[((unsigned)ar.currentline + ar.srclen * 31) % HEADS];
  for (uint32_t n = *head; n != 0; n = b->places[n - 1].next)
    if (b->places[n - 1].line == ar.currentline &&
        strcmp(b->places[n - 1].source, ar.short_src) == 0)
      return n;
  if (b->place_count == b->place_size) {
    uint32_t size = b->place_size ? b->place_size * 2 : 16;
    struct place *places = (struct place *)module_resize(
        L, b->places, b->place_size * sizeof *places, size * sizeof *places);
    if (places == NULL) return 0;
    b->places = places;
    b->place_size = size;
  }
  struct place *p = &b->places[b->place_count++];
  p->line = ar.currentline;
  memcpy(p->source, ar.short_src, sizeof p->source);
  p->next = *head;
  return *head = b->place_count;
}

/* What has no place, or no memory to note it, is not missed when it is left. */
static void note(lua_State *L, struct births *b, enum birth of, size_t at, uint32_t place) {
  if (at >= b->sizes[of]) {
    size_t old = b->sizes[of], size = old * 2 > at ? old * 2 : at + 64;
    uint32_t *list =
        (uint32_t *)module_resize(L, b->of[of], old * sizeof *list, size * sizeof *list);
    if (list == NULL) return;
    memset(list + old, 0, (size - old) * sizeof *list);
    b->of[of] = list;
    b->sizes[of] = size;
  }
  b->of[of][at] = place;
}

void testing_note(lua_State *L, struct runtime *rt, enum birth of, size_t at) {
  note(L, rt->births, of, at, find_place(L, rt->births));
}

void testing_started(lua_State *L, struct runtime *rt, uint32_t index, int slot) {
  note(L, rt->births, BIRTH_SLOT, (size_t)slot, born_at(rt->births, BIRTH_TIMER, index));
}

void testing_forget(lua_State *L, struct runtime *rt) {
  struct births *b = rt->births;
  if (b == NULL) return;
  rt->births = NULL;
  for (int of = 0; of < BIRTH_COUNT; of++)
    module_resize(L, b->of[of], b->sizes[of] * sizeof *b->of[of], 0);
  module_resize(L, b->places, b->place_size * sizeof *b->places, 0);
  module_resize(L, b, sizeof *b, 0);
}

/* ---- what is left ---- */

/* the deadline of an operation that has one armed, or NULL */
static const struct deadline *deadline_of(const struct task *t) {
  if (!task_is(t, KIND_DELAY) && !task_is(t, KIND_WAIT) && !task_is(t, KIND_EXPIRY) &&
      !task_is(t, KIND_PERIOD) && !waiter_is_queued(t))
    return NULL;
  const struct deadline *d = &((const struct timed *)(const void *)t)->deadline;
  return deadline_is_set(d) ? d : NULL;
}

/* [-0, +0 or +1, -] the task in that slot, if the running test has left it: a function that was started,
** or an operation that libuv has in hands or with its deadline armed */
static struct task *push_left(lua_State *L, lua_Integer slot) {
  struct runtime *rt = runtime(L);
  if (born_at(rt->births, BIRTH_SLOT, (size_t)slot) == 0) return NULL;
  int type = lua_rawgeti(L, UP_ANCHORS, slot);
  struct task *t = (struct task *)lua_touserdata(L, -1);
  if (type == LUA_TLIGHTUSERDATA && task_is(t, KIND_FIBER)) { /* parked */
    lua_pop(L, 1);
    task_push(L, t);
  }
  t = (struct task *)object_test(L, -1, TAG_TASK);
  bool left = t != NULL && t != rt->outside && !task_done(t) && t->state != TASK_CREATED &&
              !(t->flags & TASK_ABANDONED);
  if (left && !task_is(t, KIND_FIBER)) left = task_is(t, KIND_IO) || deadline_of(t) != NULL;
  if (left && task_is(t, KIND_FIBER) && t->state == TASK_WAITING && !(t->flags & TASK_STARTED))
    left = false; /* a continuation: it will start when what it follows is complete, or never */
  if (left) return t;
  lua_pop(L, 1);
  return NULL;
}

/* [-0, +0 or +1, -] the armed Timer with that index, if the running test has left it */
static bool push_left_timer(lua_State *L, uint32_t index, double *due) {
  struct runtime *rt = runtime(L);
  return born_at(rt->births, BIRTH_TIMER, index) != 0 && periodic_push_armed(L, rt, index, due);
}

/* no index of a Timer is as great, or 0 */
static uint32_t timer_end(const struct runtime *rt) {
  return rt->births ? (uint32_t)rt->births->sizes[BIRTH_TIMER] : 0;
}

/* [-0, +0, -] tasks on the ready list are held themselves from now on, so that push_left finds them */
static void hold_ready(lua_State *L, struct runtime *rt) {
  for (struct task *t = rt->ready; t != NULL; t = t->next) {
    if (task_is(t, KIND_TICK)) continue; /* no object of Lua's */
    task_push(L, t);
    lua_pop(L, 1);
  }
}

/* that stream, listener … is open, and was made in the running test */
static bool is_left_open(const struct runtime *rt, const struct handle *h) {
  return h->uv != NULL && !h->closing && !h->disposed && !h->pinned &&
         born_at(rt->births, BIRTH_SLOT, (size_t)h->task.slot) != 0;
}

/* [-0, +0 or +1, -] the same, if the running test has left it */
static bool push_left_open(lua_State *L, const struct handle *h) {
  if (!is_left_open(runtime(L), h)) return false;
  if (task_push_weak(L, h)) return true;
  lua_pop(L, 1); /* its finalizer is about to run */
  return false;
}

/* [-0, +0 or +1, -] the open watcher of files with that handle, if it was made in a test */
static bool push_watcher(lua_State *L, const uv_handle_t *h) {
  if (h->type != UV_FS_EVENT || uv_is_closing(h)) return false;
  if (task_push_weak(L, h)) return true;
  lua_pop(L, 1);
  return false;
}

struct open {
  lua_State *L;
  lua_Integer count;
};

static void list_watcher(uv_handle_t *h, void *arg) {
  struct open *list = (struct open *)arg;
  if (push_watcher(list->L, h)) lua_rawseti(list->L, -2, ++list->count);
}

void testing_note_opened(lua_State *L, struct runtime *rt) {
  const struct task *lands = rt->lands; /* of which it is the result: who began that has made it */
  uint32_t number = lands ? born_at(rt->births, BIRTH_SLOT, (size_t)lands->slot) : 0;
  if (number == 0) number = find_place(L, rt->births);
  int object = lua_gettop(L);
  luaL_checkstack(L, 8, NULL);
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_OPENED) == LUA_TTABLE) {
    lua_pushvalue(L, object);
    if (number == 0)
      lua_pushboolean(L, 1);
    else {
      const struct place *p = &rt->births->places[number - 1];
      lua_pushfstring(L, "%s:%d", p->source, p->line);
    }
    lua_rawset(L, object + 1);
  }
  lua_settop(L, object);
}

/* a PeriodicTimer or File at i that has not been disposed; watchers are found by their handles */
static bool is_undisposed(lua_State *L, int i) {
  const void *object = lua_touserdata(L, i);
  if (object_test(L, i, TAG_FILE) != NULL) return file_is_open((const struct file *)object);
  return object_test(L, i, TAG_PERIODIC) != NULL && periodic_is_open(object);
}

/* [-0, +1, m] a list of all these */
static void list_open(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct open list = {L, 0};
  lua_newtable(L); /* which may have run finalizers; from here on nothing is created */
  for (struct link *l = rt->handles.next; l != &rt->handles; l = l->next)
    if (push_left_open(L, container_of(l, struct handle, link))) lua_rawseti(L, -2, ++list.count);
  if (rt->loop_open) uv_walk(&rt->loop, list_watcher, &list);
  int top = lua_gettop(L);
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_OPENED) == LUA_TTABLE)
    for (lua_pushnil(L); lua_next(L, top + 1);) {
      lua_pop(L, 1);
      if (!is_undisposed(L, -1)) continue;
      lua_pushvalue(L, -1);
      lua_rawseti(L, top, ++list.count);
    }
  lua_settop(L, top);
}

/* The other handles, while they keep the loop alive, and the children that run. */
struct handles {
  struct runtime *rt;
  size_t count, size;
  uv_handle_t **at;
};

static void note_handle(uv_handle_t *h, void *arg) {
  struct handles *list = (struct handles *)arg;
  if (uv_is_closing(h) || !(uv_has_ref(h) || process_is_child(h))) return;
  for (struct link *l = list->rt->handles.next; l != &list->rt->handles; l = l->next)
    if (container_of(l, struct handle, link)->uv == h) return;
  if (list->count < list->size) list->at[list->count] = h;
  list->count++;
}

/* [-0, +1, m] a list of these, without our timer; the userdata keeps it */
static struct handles list_handles(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct handles list = {rt, 0, 0, NULL};
  if (rt->loop_open) uv_walk(&rt->loop, note_handle, &list);
  list.size = list.count;
  list.count = 0;
  list.at = (uv_handle_t **)lua_newuserdatauv(L, (list.size + 1) * sizeof *list.at, 0);
  if (rt->loop_open) uv_walk(&rt->loop, note_handle, &list);
  if (list.count > list.size) list.count = list.size; /* a finalizer has made some */
  for (size_t i = 0; i < list.count; i++)
    if (list.at[i] == (uv_handle_t *)&rt->timer) list.at[i--] = list.at[--list.count];
  return list;
}

/* ---- idle ---- */

void testing_land(lua_State *L, int i) {
  task_forget(L, (struct task *)lua_touserdata(L, i));
  task_settle(L, runtime(L), i, 0);
}

/* idle(last) -> a task that is complete once nothing else is left to do; last: nor anybody else waits
** for that */
static int l_idle(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task **at = &rt->idlers;
  lua_settop(L, 1);
  struct task *t = task_new(L, KIND_IDLE, sizeof *t, TASK_WAITERS, false);
  if (rt->clock == CLOCK_REAL)
    return error_throw(L, ERROR_OPERATION, "only under testing.run is there such a moment");
  task_hold(L, -1, t);
  if (lua_toboolean(L, 1))
    while (*at != NULL) at = &(*at)->next;
  t->flags |= TASK_LINKED;
  t->next = *at;
  *at = t;
  return 1;
}

/* release(): whoever waits until the loop is idle waits no more */
static int l_release(lua_State *L) {
  struct runtime *rt = runtime(L);
  for (struct task *t; (t = rt->idlers) != NULL;) {
    rt->idlers = t->next;
    t->flags &= (uint16_t)~TASK_LINKED;
    loop_ready(rt, t);
  }
  return 0;
}

/* ---- Lua face ---- */

/* begin(jumping, start, quiet, seed or nil): time is virtual from now on */
static int l_begin(lua_State *L) {
  struct runtime *rt = runtime(L);
  double start = luaL_checknumber(L, 2), quiet = luaL_checknumber(L, 3);
  lua_settop(L, 4);
  lua_newtable(L);
  lua_newtable(L); /* … before opened */
  lua_createtable(L, 0, 1);
  lua_pushliteral(L, "k");
  lua_setfield(L, -2, "__mode");
  lua_setmetatable(L, -2);
  struct handles list = list_handles(L);
  for (size_t i = 0; i < list.count; i++) { /* those that were there before */
    lua_pushboolean(L, 1);
    lua_rawsetp(L, 5, list.at[i]);
  }
  loop_check_outside(L, "testing.run");
  if (rt->clock != CLOCK_REAL)
    return error_throw(L, ERROR_OPERATION, "testing.run inside another testing.run");
  struct births *b = (struct births *)module_resize(L, NULL, 0, sizeof *b);
  if (b == NULL) return luaL_error(L, "not enough memory");
  /* nothing raises from here */
  memset(b, 0, sizeof *b);
  rt->births = b;
  lua_settop(L, 6);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_OPENED);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_BEFORE);
  timer_shift(rt, loop_now(rt), start); /* deadlines from before have the same time left */
  rt->clock = lua_toboolean(L, 1) ? CLOCK_JUMPING : CLOCK_HELD;
  rt->virtual_now = start;
  rt->quiet = quiet;
  rt->seeded = !lua_isnil(L, 4);
  rt->seed = lua_tointeger(L, 4);
  rt->random = (uint64_t)rt->seed;
  rt->passed_over = 0;
  return 0;
}

/* finish(): real time again */
static int l_finish(lua_State *L) {
  struct runtime *rt = runtime(L);
  rt->clock = CLOCK_REAL;
  rt->seeded = false;
  timer_shift(rt, rt->virtual_now, loop_now(rt));
  testing_forget(L, rt);
  lua_pushnil(L);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_BEFORE);
  lua_pushnil(L);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_OPENED);
  return 0;
}

/* step(target) -> is a deadline due by then? The clock stands at the first such one, else at the target */
static int l_step(lua_State *L) {
  struct runtime *rt = runtime(L);
  double to = luaL_checknumber(L, 1);
  bool due = deadline_any(rt) && deadline_next(rt) <= to;
  if (due) to = deadline_next(rt);
  if (to > rt->virtual_now) rt->virtual_now = to;
  lua_pushboolean(L, due);
  return 1;
}

/* settle(quietly): what is ready runs; quietly: what nobody observes, garbage included, is not reported */
static int l_settle(lua_State *L) {
  bool quietly = lua_toboolean(L, 1);
  lua_settop(L, 0);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDLER);
  module_push_function(L, loop_settle);
  if (quietly) {
    lua_pushboolean(L, 0);
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_HANDLER);
  }
  int status = lua_pcall(L, 0, 0, 0);
  if (quietly) {
    lua_gc(L, LUA_GCCOLLECT);
    lua_gc(L, LUA_GCCOLLECT); /* the first one may only finalize what holds others */
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_HANDLER);
  }
  return status == LUA_OK ? 0 : lua_error(L);
}

/* [-0, +1, m] "file:line", of one that has a place */
static void push_place(lua_State *L, const struct births *b, enum birth of, size_t at) {
  const struct place *p = &b->places[born_at(b, of, at) - 1];
  lua_pushfstring(L, "%s:%d", p->source, p->line);
}

/* left() -> a list of what the test has left behind, in words, without what is open */
static int l_left(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_Integer count = 0;
  lua_settop(L, 0);
  lua_newtable(L);
  hold_ready(L, rt);
  lua_Integer n = (lua_Integer)lua_rawlen(L, UP_ANCHORS);
  for (lua_Integer slot = TAG_LAST + 1; slot <= n; slot++, lua_settop(L, 1)) {
    struct task *t = push_left(L, slot);
    if (t == NULL) continue;
    const struct deadline *deadline = deadline_of(t); /* now: what follows may run finalizers */
    double due = deadline != NULL ? deadline_due(rt, deadline) : HUGE_VAL;
    push_place(L, rt->births, BIRTH_SLOT, (size_t)slot);
    task_push_name(L, 2); /* list task place name */
    if (task_is(t, KIND_FIBER)) {
      t->flags |= TASK_OBSERVED; /* told now, not again when it is collected */
      deadlock_push_wait(L, 2);
      lua_pushfstring(L, "task '%s' %s", lua_tostring(L, -2), lua_tostring(L, -1));
    } else if (task_is(t, KIND_IO))
      lua_pushfstring(L, "operation '%s'", lua_tostring(L, -1));
    else
      lua_pushfstring(L, "timer '%s', due in %f s", lua_tostring(L, -1),
                      (LUAI_UACNUMBER)error_seconds(due - rt->virtual_now));
    lua_pushfstring(L, "%s, made at %s", lua_tostring(L, -1), lua_tostring(L, 3));
    lua_rawseti(L, 1, ++count);
  }
  double due;
  for (uint32_t index = 1; index < timer_end(rt); index++, lua_settop(L, 1)) {
    if (!push_left_timer(L, index, &due)) continue;
    push_place(L, rt->births, BIRTH_TIMER, index);
    lua_pushfstring(L, "a Timer, due in %f s, made at %s",
                    (LUAI_UACNUMBER)error_seconds(due - rt->virtual_now), lua_tostring(L, -1));
    lua_rawseti(L, 1, ++count);
  }
  lua_settop(L, 1);
  return 1;
}

/* [-0, +1, m] where the stream, listener … at i was made, true if nobody knows, or nil: before the test */
static void push_opening(lua_State *L, int i) {
  const struct births *b = runtime(L)->births;
  if (object_test(L, i, TAG_FILE) != NULL || object_test(L, i, TAG_PERIODIC) != NULL ||
      object_test(L, i, TAG_WATCHER) != NULL) {
    if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_OPENED) != LUA_TTABLE) return;
    lua_pushvalue(L, i);
    lua_rawget(L, -2);
    lua_remove(L, -2);
    return;
  }
  size_t slot = (size_t)((const struct handle *)lua_touserdata(L, i))->task.slot;
  if (born_at(b, BIRTH_SLOT, slot) != 0)
    push_place(L, b, BIRTH_SLOT, slot);
  else
    lua_pushnil(L);
}

/* [-0, +2, m] where the task at i, which waits, was made, or nil: before the test; and what it was */
static void push_lost_task(lua_State *L, int i) {
  struct fiber *f = (struct fiber *)lua_touserdata(L, i);
  const struct births *b = runtime(L)->births;
  if (born_at(b, BIRTH_SLOT, (size_t)f->task.slot) != 0)
    push_place(L, b, BIRTH_SLOT, (size_t)f->task.slot);
  else
    lua_pushnil(L);
  task_push_name(L, i);
  if (!fiber_push_place(L, f))
    lua_pushfstring(L, "task '%s' was collected while it waited", lua_tostring(L, -1));
  else
    lua_pushfstring(L, "task '%s' was collected while it waited at %s", lua_tostring(L, -2),
                    lua_tostring(L, -1));
  lua_replace(L, i + 2);
  lua_settop(L, i + 2);
}

/* note_lost(object). The weak key of what is no task is there until its finalizer has run. What calls
** this runs in the midst of anything, but a traversal of that table. */
static int note_lost(lua_State *L) {
  if (object_test(L, 1, TAG_TASK) != NULL)
    push_lost_task(L, 1);
  else {
    push_opening(L, 1);
    lua_pushfstring(L, "a %s that was open when it was collected", luaL_tolstring(L, 1, NULL));
    lua_replace(L, 3);
    lua_settop(L, 3);
  }
  if (lua_toboolean(L, 2) &&
      lua_getiuservalue(L, UP_RUNTIME, RUNTIME_OPENED) == LUA_TTABLE) { /* object place text list */
    if (lua_isstring(L, 2))
      lua_pushfstring(L, "%s, made at %s", lua_tostring(L, 3), lua_tostring(L, 2));
    else
      lua_pushvalue(L, 3);
    if (object_test(L, 1, TAG_PERIODIC) != NULL) /* it is open still, and a task that was … */
      lua_pushvalue(L, 1);                       /* … collected with it may dispose of it */
    lua_rawseti(L, 4, (lua_Integer)lua_rawlen(L, 4) + 1);
  }
  return 0;
}

void testing_note_lost(lua_State *L, int i) {
  bool handled = lua_getiuservalue(L, UP_RUNTIME, RUNTIME_HANDLER) != LUA_TNIL;
  lua_pop(L, 1);
  if (handled && object_test(L, i, TAG_TASK) != NULL) return;
  lua_pushvalue(L, i);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LOSSES);
  lua_insert(L, -2);
  if (lua_pcall(L, 1, 0, 0) != LUA_OK) lua_pop(L, 1); /* no memory: it is not missed */
}

/* lost() -> a list of what was made in the test and has been collected while it was open, in words;
** each is told once */
static int l_lost(lua_State *L) {
  struct runtime *rt = runtime(L);
  bool pending = false; /* a finalizer that has not run yet */
  lua_settop(L, 0);
  for (struct link *l = rt->handles.next; l != &rt->handles && !pending; l = l->next) {
    struct handle *h = container_of(l, struct handle, link);
    pending = is_left_open(rt, h) && !task_push_weak(L, h);
    lua_settop(L, 0);
  }
  if (pending) lua_gc(L, LUA_GCCOLLECT);
  lua_newtable(L); /* list opened */
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_OPENED) == LUA_TTABLE) {
    lua_Integer count = 0, n = (lua_Integer)lua_rawlen(L, 2);
    for (lua_Integer k = 1; k <= n; k++, lua_settop(L, 2)) {
      int type = lua_rawgeti(L, 2, k);
      lua_pushnil(L);
      lua_rawseti(L, 2, k);
      if (type == LUA_TSTRING) lua_rawseti(L, 1, ++count); /* else it is told as open, if it is */
    }
  }
  lua_settop(L, 1);
  return 1;
}

/* [-0, +1, m] of a child that runs */
static void push_process(lua_State *L, const uv_handle_t *h) {
  int text = lua_gettop(L) + 1;
  lua_pushfstring(L, "process %d runs", uv_process_get_pid((const uv_process_t *)(const void *)h));
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_OPENED) == LUA_TTABLE &&
      lua_rawgetp(L, -1, h) == LUA_TSTRING) {
    lua_pushfstring(L, "%s, made at %s", lua_tostring(L, text), lua_tostring(L, -1));
    lua_replace(L, text);
  }
  lua_settop(L, text);
}

/* left_open() -> the same of what is open: streams, listeners, handles of libuv */
static int l_left_open(lua_State *L) {
  lua_Integer count = 0;
  lua_settop(L, 0);
  lua_newtable(L);
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_BEFORE) != LUA_TTABLE) lua_newtable(L);
  list_open(L);
  while (lua_rawgeti(L, 3, count + 1) != LUA_TNIL) { /* list before open handle */
    lua_pushfstring(L, "an open %s", luaL_tolstring(L, 4, NULL));
    push_opening(L, 4);
    if (!lua_isstring(L, -1))
      lua_pop(L, 1);
    else
      lua_pushfstring(L, "%s, made at %s", lua_tostring(L, -2), lua_tostring(L, -1));
    lua_rawseti(L, 1, ++count);
    lua_settop(L, 3);
  }
  lua_settop(L, 2);
  struct handles list = list_handles(L);
  for (size_t i = 0; i < list.count; i++, lua_settop(L, 3)) {
    if (lua_rawgetp(L, 2, list.at[i]) != LUA_TNIL || push_watcher(L, list.at[i])) continue;
    if (process_is_child(list.at[i]))
      push_process(L, list.at[i]);
    else
      lua_pushfstring(L, "an open %s handle", uv_handle_type_name(list.at[i]->type));
    lua_rawseti(L, 1, ++count);
  }
  lua_settop(L, 1);
  return 1;
}

/* [-0, +0, m] closes what is open */
static void close_left(lua_State *L) {
  int top = lua_gettop(L);
  list_open(L);
  for (lua_Integer i = 1; lua_rawgeti(L, top + 1, i) != LUA_TNIL; i++, lua_settop(L, top + 1)) {
    if (object_test(L, -1, TAG_FILE) != NULL) { /* nobody uses it: no task is left */
      file_dispose((struct file *)lua_touserdata(L, -1));
      continue;
    }
    lua_getfield(L, -1, "dispose");
    lua_insert(L, -2);
    lua_pcall(L, 1, 0, 0);
  }
  lua_settop(L, top);
}

/* give_up(): tasks that are left are closed on a later turn; what the others wait for is canceled, Timers
** are disarmed, children killed. Without tasks left: what is open is closed. */
static int l_give_up(lua_State *L) {
  struct runtime *rt = runtime(L);
  lua_settop(L, 0);
  lua_pushliteral(L, "its test is over");
  bool tasks = false;
  hold_ready(L, rt);
  lua_Integer n = (lua_Integer)lua_rawlen(L, UP_ANCHORS);
  for (lua_Integer slot = TAG_LAST + 1; slot <= n; slot++, lua_settop(L, 1)) {
    struct task *t = push_left(L, slot);
    if (t == NULL) continue;
    tasks = true;
    t->flags |= TASK_OBSERVED;
    if (task_is(t, KIND_FIBER))
      fiber_abandon(L, 2, (struct fiber *)t);
    else if (task_is(t, KIND_EXPIRY))
      expiry_drop(L, 2);
    else
      operation_cancel(L, 2, 1);
  }
  double due;
  for (uint32_t index = 1; index < timer_end(rt); index++, lua_settop(L, 1))
    if (push_left_timer(L, index, &due)) periodic_disarm(L, -1);
  bool running = lua_getiuservalue(L, UP_RUNTIME, RUNTIME_BEFORE) == LUA_TTABLE;
  struct handles list = list_handles(L);
  for (size_t i = 0; running && i < list.count; i++, lua_settop(L, 3))
    if (lua_rawgetp(L, 2, list.at[i]) == LUA_TNIL && process_is_child(list.at[i]))
      uv_process_kill((uv_process_t *)list.at[i], SIGKILL);
  if (!tasks) close_left(L);
  while (rt->idlers != NULL) {
    struct task *t = rt->idlers;
    rt->idlers = t->next;
    t->flags &= (uint16_t)~TASK_LINKED;
    loop_ready(rt, t);
  }
  return 0;
}

static const luaL_Reg functions[] = {
    {"begin", l_begin},         {"finish", l_finish}, {"idle", l_idle}, {"release", l_release},
    {"step", l_step},           {"settle", l_settle}, {"left", l_left}, {"give_up", l_give_up},
    {"left_open", l_left_open}, {"lost", l_lost},     {NULL, NULL}};

ONCE static void testing_open(lua_State *L) {
  module_push_function(L, note_lost);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_LOSSES);
}

const struct part testing_part = {functions, testing_open, "testing"};
