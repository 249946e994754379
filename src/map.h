/*
** map.h - maps from ids to values that are never changed while somebody could tell: what contexts are
** made of.
**
** map.c tells how they are built, and when one is changed in place after all.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_map_h
#define coflow_map_h

#include "core.h"

#pragma GCC visibility push(hidden)

/* A node; a map is the topmost one, or nil when it is empty. */
struct map {
  uint32_t tag; /* TAG_CONTEXT: scripts know a map as an ExecutionContext */
  bool branch;
  bool watched;    /* a key that is watched has been put below */
  bool shared;     /* of a map: more than one task's TASK_CONTEXT may hold it or nodes of it */
  uint8_t count;   /* leaf: entries; branch: children */
  uint64_t serial; /* a map's own, never used again; inside: of the map it was made for, or 0 */
  uint64_t keys[]; /* of a leaf */
};

/* What a value is put under. It remembers the way to that in the map where it was last found, never the
** value. */
enum { WAY_MAX = 9 };
struct map_key {
  uint64_t id;     /* counts up */
  uint64_t serial; /* of that map, or 0 */
  bool watched;
  uint8_t depth;        /* of the way … */
  uint8_t way[WAY_MAX]; /* … which user value of each node */
};

void map_push_empty(lua_State *L, struct runtime *rt); /* [-0, +1, m] one that scripts may see */
/* [-0, +0, -] the map at i, if it is one, will not change any more */
static inline void map_share(lua_State *L, int i) {
  struct map *m = (struct map *)lua_touserdata(L, i);
  if (m != NULL && m->tag == TAG_CONTEXT) m->shared = true;
}
bool map_find(lua_State *L, const struct map *m, struct map_key *k);
/* [-0, +n, -] from the map on top, m, the nodes below it that lead to the entry of k, and its value;
** false, and some nodes, if it has none. k remembers the way, but for one too long: then what is left
** on the stack is of no use but for the value. */
static inline bool map_push_way(lua_State *L, const struct map *m, struct map_key *k) {
  if (k->serial != m->serial) return map_find(L, m, k);
  for (int d = 0; d < k->depth; d++) lua_getiuservalue(L, -1, k->way[d]);
  return true;
}
/* [-1, +1, -] the value of k in the map on top (nil: empty); false, and nil, if it has none */
bool map_get(lua_State *L, struct map_key *k);
/* [-0, +1, m] the map at i (nil: empty) with the value at v under k, without one if that is nil; or nil */
void map_put(lua_State *L, struct runtime *rt, int i, const struct map_key *k, int v);
/* [-0, +0, -] where the way to an entry, as map_push_way leaves it, stands above the map m at i: user
** value `step` of its node d becomes the value at v; false, and nothing, if others may see that node */
static inline bool map_change(lua_State *L, int i, const struct map *m, int d, int step, int v) {
  const struct map *node = d == 0 ? m : (const struct map *)lua_touserdata(L, i + d);
  if (m->shared || node->serial != m->serial) return false;
  lua_pushvalue(L, v);
  lua_setiuservalue(L, i + d, step);
  return true;
}
/* [-0, +n, m] map_replace where others may see the last node */
bool map_copy_way(lua_State *L, struct runtime *rt, int i, const struct map *m, struct map_key *k,
                  int v);
/* [-0, +n, m] the value at v, not nil, in place of that under k, where the way to it, which k
** remembers, stands above the map m at i. True: done; false: a new map, which has it, is on top. */
static inline bool map_replace(lua_State *L, struct runtime *rt, int i, const struct map *m,
                               struct map_key *k, int v) {
  int last = k->depth - 1;
  return map_change(L, i, m, last, k->way[last], v) || map_copy_way(L, rt, i, m, k, v);
}
/* [-0, +0, m] copies the entries of the map at i (nil: empty) whose id stands for something in the table at
** `names` into the table at t, as names[id] = value */
void map_list(lua_State *L, int i, int names, int t);

#pragma GCC visibility pop
#endif
