/*
** deadline.c - everything that waits for a time, in the order of due times: one structure, one uv_timer_t.
**
** A hierarchical timing wheel over a heap. The wheel is cheap and rough: it sorts the far deadlines by tick
** (1/1024 s), ten levels of 64 buckets. The heap is exact: it holds the deadlines whose tick has come.
**
**     level 0   the 64 ticks around `current`, one bucket each
**     level 1   the 64 × 64 ticks around it, but for those of level 0: 64 ticks a bucket       … and so on
**
** A tick t lies at the level of the highest digit (of 6 bits) in which it differs from `current`. As time
** goes on, a bucket whose turn has come is distributed over the levels below it, and at last over the heap.
** So setting, moving and dropping a deadline is O(1) until its tick has come, and most are dropped before.
**
** Order. All deadlines of one tick are in one bucket at any time, in the order they were set, and buckets
** are distributed in that order. So they get into the heap, which numbers them (push_near, the only place
** that knows of ties), in that order too: equal deadlines fire in the order they were set.
**
** A deadline is one index (core.h) into an array of nodes; a dropped one leaves nothing behind. Only
** making room may fail, and it makes room in the heap as well (memory that is not touched before it
** is needed): from there on nothing that moves time or deadlines ever raises.
**
** Under a test's seed equal deadlines draw lots there instead.
**
** The clock may be set (virtual time): then all deadlines move with it, by way of the heap.
**
** Invariants: nodes[d->index].deadline == d, or d->index == 0: not set.
**             a node in the wheel has tick_of(due) > current, one that is near has not, unless there are few, or the
**             clock has been set since.
**             near[nodes[n].prev].node == n for those that are near (next == NEAR).
**             whoever has a deadline set is held by the anchors, until it fires or is dropped.
**
** Source:     Varghese and Lauck 1987; the levels by the highest digit that differs are tokio's.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <math.h>
#include <string.h>

enum { BITS = 6, SLOTS = 1 << BITS, LEVELS = 10, FEW = 32, KEEP = 4096 };
#define TICKS 1024.0 /* in a second; a power of two, so that no order is lost in multiplying */
#define LAST_TICK (((uint64_t)1 << BITS * LEVELS) - 1)
#define NEAR UINT32_MAX
#define RESTS (UINT32_MAX - 1)
#define MOST (1 << 26) /* as many as struct deadline can tell */

struct node {
  double due;
  struct deadline *deadline;
  uint32_t next,
      prev; /* in its bucket, circular; or NEAR and the position in the heap; or next free one */
};

struct near {
  double due;
  uint64_t order;
  uint32_t node; /* 0: it has been dropped */
};

struct deadlines {
  struct runtime *rt;
  struct node *nodes; /* the first one is not used */
  struct near *near;  /* from `first` to `end`: sorted, or a binary heap; with room for all nodes */
  uint32_t first, end, near_count; /* a heap has first == 0, end == near_count */
  bool sorted;
  bool few; /* there have been no more than FEW since there was none: all are near */
  uint32_t size, used, free, count;
  uint32_t levels; /* a bit for each that is not empty */
  uint64_t order, current;
  uint64_t slots[LEVELS];       /* a bit for each bucket that is not empty … */
  uint32_t last[LEVELS][SLOTS]; /* … of which this is the last node */
};

/* ---- what is near ---- */

static bool before(const struct near *a, const struct near *b) {
  return a->due < b->due || (a->due == b->due && a->order < b->order);
}

static void put(struct deadlines *w, uint32_t at, struct near e) {
  w->near[at] = e;
  w->nodes[e.node].prev = at;
}

static void sift_up(struct deadlines *w, uint32_t at, struct near e) {
  while (at > 0 && before(&e, &w->near[(at - 1) / 2])) {
    put(w, at, w->near[(at - 1) / 2]);
    at = (at - 1) / 2;
  }
  put(w, at, e);
}

static void sift_down(struct deadlines *w, uint32_t at, struct near e) {
  for (;;) {
    uint32_t child = at * 2 + 1;
    if (child >= w->end) break;
    if (child + 1 < w->end && before(&w->near[child + 1], &w->near[child])) child++;
    if (!before(&w->near[child], &e)) break;
    put(w, at, w->near[child]);
    at = child;
  }
  put(w, at, e);
}

static void make_heap(struct deadlines *w) { /* what is sorted is a heap, but for the dropped */
  uint32_t to = 0;
  for (uint32_t at = w->first; at < w->end; at++)
    if (w->near[at].node != 0) put(w, to++, w->near[at]);
  w->first = 0;
  w->end = to;
  w->sorted = false;
}

static void push_near(struct deadlines *w, uint32_t n) {
  struct runtime *rt = w->rt;
  struct near e = {w->nodes[n].due, rt->seeded ? testing_random(rt) : w->order++, n};
  w->nodes[n].next = NEAR;
  if (w->near_count++ == 0) {
    w->first = w->end = 0;
    w->sorted = true;
  } else if (w->sorted && (w->end == w->size || before(&e, &w->near[w->end - 1])))
    make_heap(w);
  if (w->sorted)
    put(w, w->end++, e);
  else
    sift_up(w, w->end++, e);
}

static void remove_near(struct deadlines *w, uint32_t at) {
  w->near_count--;
  if (w->sorted) {
    w->near[at].node = 0;
    if (at == w->first)
      while (w->first < w->end && w->near[w->first].node == 0) w->first++;
    else
      while (w->near[w->end - 1].node == 0) w->end--;
    return;
  }
  struct near e = w->near[--w->end];
  if (at == w->end) return;
  if (at > 0 && before(&e, &w->near[(at - 1) / 2]))
    sift_up(w, at, e);
  else
    sift_down(w, at, e);
}

/* ---- the wheel ---- */

static uint64_t tick_of(double due) {
  double tick = due * TICKS;
  if (!(tick > 0)) return 0;
  return tick < (double)LAST_TICK ? (uint64_t)(int64_t)tick : LAST_TICK;
}

static int level_of(const struct deadlines *w, uint64_t tick) {
  return (63 - __builtin_clzll(tick ^ w->current)) / BITS;
}

static int slot_of(uint64_t tick, int level) { return (int)(tick >> level * BITS & (SLOTS - 1)); }

static void place(struct deadlines *w, uint32_t n) {
  struct node *node = &w->nodes[n];
  uint64_t tick;
  if (w->few || (tick = tick_of(node->due)) <= w->current) {
    push_near(w, n);
    return;
  }
  int level = level_of(w, tick), slot = slot_of(tick, level);
  uint32_t *last = &w->last[level][slot];
  if (w->slots[level] >> slot & 1) {
    node->prev = *last;
    node->next = w->nodes[*last].next;
    w->nodes[node->next].prev = n;
    w->nodes[*last].next = n;
  } else {
    node->next = node->prev = n;
    w->slots[level] |= (uint64_t)1 << slot;
    w->levels |= 1u << level;
  }
  *last = n;
}

static void empty(struct deadlines *w, int level, int slot) {
  w->slots[level] &= ~((uint64_t)1 << slot);
  if (w->slots[level] == 0) w->levels &= ~(1u << level);
}

/* takes a node out of where it is */
static void displace(struct deadlines *w, uint32_t n) {
  struct node *node = &w->nodes[n];
  if (node->next == RESTS) return;
  if (node->next == NEAR) {
    remove_near(w, node->prev);
    return;
  }
  uint64_t tick = tick_of(node->due);
  int level = level_of(w, tick), slot = slot_of(tick, level);
  if (node->next == n) {
    empty(w, level, slot);
    return;
  }
  w->nodes[node->next].prev = node->prev;
  w->nodes[node->prev].next = node->next;
  if (w->last[level][slot] == n) w->last[level][slot] = node->prev;
}

/* there are too many to be near: those that are not go into the wheel, in order */
static void spread(struct deadlines *w, double now) {
  uint32_t nodes[FEW], count = 0;
  while (w->near_count > 0) {
    nodes[count++] = w->near[w->first].node;
    remove_near(w, w->first);
  }
  w->few = false;
  w->current = tick_of(now);
  for (uint32_t i = 0; i < count; i++) place(w, nodes[i]);
}

struct bucket {
  int level, slot;
  uint64_t start; /* its first tick */
};

/* the first bucket that is not empty */
static struct bucket first_bucket(const struct deadlines *w) {
  if (w->levels == 0) return (struct bucket){0, 0, LAST_TICK + 1};
  int level = __builtin_ctz(w->levels), slot = __builtin_ctzll(w->slots[level]);
  uint64_t above = w->current >> level * BITS & ~(uint64_t)(SLOTS - 1);
  return (struct bucket){level, slot, (above | (uint64_t)slot) << level * BITS};
}

/* moves `current` on, and into the heap what is due by then */
static void advance(struct deadlines *w, uint64_t to) {
  for (struct bucket b; (b = first_bucket(w)).start <= to;) {
    uint32_t last = w->last[b.level][b.slot], next = w->nodes[last].next, n;
    empty(w, b.level, b.slot);
    w->current = b.start;
    do {
      n = next;
      next = w->nodes[n].next;
      place(w, n);
    } while (n != last);
  }
  if (to > w->current) w->current = to;
}

/* ---- memory ---- */

static bool grow(lua_State *L, struct deadlines *w) {
  uint32_t size = w->size ? w->size * 2 : 16;
  if (size > MOST) return false;
  struct near *near = (struct near *)module_resize(L, NULL, 0, size * sizeof *near);
  struct node *nodes = near ? (struct node *)module_resize(L, w->nodes, w->size * sizeof *nodes,
                                                           size * sizeof *nodes)
                            : NULL;
  if (nodes == NULL) {
    module_resize(L, near, size * sizeof *near, 0);
    return false;
  }
  if (w->end > 0) memcpy(near, w->near, w->end * sizeof *near); /* touch no more */
  module_resize(L, w->near, w->size * sizeof *near, 0);
  w->near = near;
  w->nodes = nodes;
  w->size = size;
  return true;
}

static void shrink(lua_State *L, struct deadlines *w) {
  module_resize(L, w->nodes, w->size * sizeof *w->nodes, 0);
  module_resize(L, w->near, w->size * sizeof *w->near, 0);
  w->nodes = NULL;
  w->near = NULL;
  w->size = w->free = w->end = 0;
  w->used = 1;
}

/* apart, so that asking whether there is room costs no more than that */
static __attribute__((noinline)) bool make_room(lua_State *L, struct runtime *rt) {
  struct deadlines *w = rt->deadlines;
  if (rt->closed) return false;
  if (w == NULL) {
    w = (struct deadlines *)module_resize(L, NULL, 0, sizeof *w);
    if (w == NULL) return false;
    memset(w, 0, sizeof *w);
    w->rt = rt;
    w->used = 1;
    rt->deadlines = w;
  }
  return grow(L, w);
}

bool deadline_has_room(lua_State *L, struct runtime *rt) {
  const struct deadlines *w = rt->deadlines;
  if (w == NULL || rt->closed || (w->free == 0 && w->used >= w->size)) return make_room(L, rt);
  return true;
}

void deadline_refuse(lua_State *L, const struct runtime *rt) {
  shutdown_check(L, rt);
  luaL_error(L, "not enough memory");
}

uint32_t deadline_reserve(lua_State *L, struct runtime *rt) {
  if (!deadline_has_room(L, rt)) deadline_refuse(L, rt);
  const struct deadlines *w = rt->deadlines;
  return w->free ? w->free : w->used;
}

bool deadline_trim(lua_State *L, struct runtime *rt) {
  struct deadlines *w = rt->deadlines;
  if (w == NULL || w->count > 0 || w->size <= KEEP) return false;
  shrink(L, w);
  return true;
}

void deadline_close(lua_State *L, struct runtime *rt) {
  struct deadlines *w = rt->deadlines;
  if (w == NULL) return;
  rt->deadlines = NULL;
  shrink(L, w);
  module_resize(L, w, sizeof *w, 0);
}

/* ---- deadlines ---- */

void deadline_set(struct runtime *rt, struct deadline *d, double now, double due) {
  struct deadlines *w = rt->deadlines;
  uint32_t n = w->free;
  if (n != 0)
    w->free = w->nodes[n].next;
  else
    n = w->used++;
  if (w->count++ == 0)
    w->few = true;
  else if (w->few && w->near_count == FEW)
    spread(w, now);
  d->index = n;
  w->nodes[n].due = due;
  w->nodes[n].deadline = d;
  place(w, n);
}

double deadline_add(struct runtime *rt, struct deadline *d, double seconds) {
  double now = loop_now(rt), due = loop_after(now, seconds);
  deadline_set(rt, d, now, due);
  if (seconds == 0) loop_nudge(rt);
  return due;
}

void deadline_move(struct runtime *rt, struct deadline *d, double due) {
  struct deadlines *w = rt->deadlines;
  if (w == NULL) return; /* the state closes */
  displace(w, d->index);
  w->nodes[d->index].due = due;
  place(w, d->index);
}

void deadline_drop(struct runtime *rt, struct deadline *d) {
  struct deadlines *w = rt->deadlines;
  uint32_t n = d->index;
  if (n == 0 || w == NULL) return; /* NULL: the state closes */
  displace(w, n);
  d->index = 0;
  w->nodes[n].next = w->free;
  w->free = n;
  w->count--;
}

void deadline_rest(struct runtime *rt, struct deadline *d) {
  if (rt->deadlines == NULL) return;
  displace(rt->deadlines, d->index);
  rt->deadlines->nodes[d->index].next = RESTS;
}

bool deadline_rests(const struct runtime *rt, const struct deadline *d) {
  return d->index != 0 && rt->deadlines != NULL && rt->deadlines->nodes[d->index].next == RESTS;
}

bool deadline_any(const struct runtime *rt) {
  const struct deadlines *w = rt->deadlines;
  return w != NULL && (w->near_count > 0 || w->levels != 0);
}

lua_Integer deadline_count(const struct runtime *rt) {
  return rt->deadlines != NULL ? rt->deadlines->count : 0;
}

double deadline_due(const struct runtime *rt, const struct deadline *d) {
  return d->index && rt->deadlines != NULL ? rt->deadlines->nodes[d->index].due : HUGE_VAL;
}

struct deadline *deadline_first(struct runtime *rt, double now) {
  struct deadlines *w = rt->deadlines;
  if (!deadline_any(rt)) return NULL;
  if (!w->few) advance(w, tick_of(now));
  if (w->near_count == 0 || w->near[w->first].due > now) return NULL;
  return w->nodes[w->near[w->first].node].deadline;
}

double deadline_next(const struct runtime *rt) {
  const struct deadlines *w = rt->deadlines;
  if (!deadline_any(rt)) return HUGE_VAL;
  if (w->near_count > 0) return w->near[w->first].due;
  struct bucket b = first_bucket(w);
  uint32_t last = w->last[b.level][b.slot];
  double due = w->nodes[last].due;
  for (uint32_t n = w->nodes[last].next; n != last; n = w->nodes[n].next)
    due = fmin(due, w->nodes[n].due);
  return due;
}

double deadline_look(const struct runtime *rt) {
  const struct deadlines *w = rt->deadlines;
  if (!deadline_any(rt)) return HUGE_VAL;
  return w->near_count > 0 ? w->near[w->first].due : (double)first_bucket(w).start / TICKS;
}

/* Sums that are rounded may make deadlines equal that were not, so the heap is built anew. */
void deadline_shift(struct runtime *rt, double from, double to) {
  struct deadlines *w = rt->deadlines;
  if (w == NULL) return;
  advance(w, LAST_TICK);
  if (w->sorted) make_heap(w);
  for (uint32_t at = 0; at < w->end; at++) {
    struct node *n = &w->nodes[w->near[at].node];
    w->near[at].due = n->due += to - from;
    if (n->deadline->kind == DEADLINE_SCOPE)
      container_of(n->deadline, struct scope, deadline)->due = n->due;
  }
  for (uint32_t at = w->end / 2; at-- > 0;) sift_down(w, at, w->near[at]);
  w->current = tick_of(to);
}
