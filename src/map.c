/*
** map.c - maps from ids to values that are never changed while somebody could tell.
**
** A map is a trie of userdata whose user values are the values:
**
**     leaf    up to 16 entries: keys[] beside, value i in user value i
**     branch  8 children by three bits of the id, lowest first
**
**            root (branch)                 a put copies the nodes on its way:
**           /   |       \                  for 1000 entries two branches and a leaf
**        leaf  branch    leaf
**             /  |  \
**
** Ids count up and are never reused, so the trie stays as shallow as it can be, and an entry can never
** be mistaken for that of another key. A key remembers the way to its value in the map that it was last
** found in (by that map's serial number), never the value itself. So a map keeps its values alive, and
** a key none.
**
** Copy on write. Whoever takes a map out of a task's hands, to keep it, to give it to another or to
** make a new one of its nodes, marks it as *shared*, for good (map_share). A map that is not shared is
** seen by its task alone, and so are those of its nodes that were made for it, which bear its serial
** number: in these map_replace changes the value in place. The keys of a node never change. So a map is
** immutable as soon as somebody could tell, and many sets in a row copy each node once.
**
** When there is no memory for a node, or a finalizer looks while one is made, the old map stands as it
** was: nobody has the new one before it is whole.
**
** Source: Bagwell's tries, with buckets for leaves.
** SPDX-License-Identifier: MIT
*/
#include "map.h"

#include <string.h>

enum { LEAF_MAX = 16, FANOUT = 8, BITS = 3 };

/* ---- nodes ---- */

/* [-0, +1, m] */
static struct map *node_new(lua_State *L, bool branch, int count, bool watched) {
  size_t keys = branch ? 0 : sizeof(uint64_t) * (size_t)count;
  struct map *m =
      (struct map *)lua_newuserdatauv(L, sizeof(struct map) + keys, branch ? FANOUT : count);
  m->tag = TAG_CONTEXT;
  m->branch = branch;
  m->watched = watched;
  m->shared = false;
  m->count = (uint8_t)count;
  m->serial = 0;
  return m;
}

/* [-0, +0, -] the new node on top, m, is a whole map, which scripts may see */
static void map_made(lua_State *L, struct map *m, uint64_t serial) {
  m->serial = serial;
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_CONTEXT));
  lua_setmetatable(L, -2);
}

static int leaf_find(const struct map *m, uint64_t id) {
  for (int i = 0; i < m->count; i++)
    if (m->keys[i] == id) return i + 1;
  return 0;
}

static int child_of(uint64_t id, int shift) { return (int)(id >> shift & (FANOUT - 1)) + 1; }

/* [-0, +0, -] moves user value `from` of the node at `source` to `to` of that at `target` */
static void copy_value(lua_State *L, int source, int from, int target, int to) {
  lua_getiuservalue(L, source, from);
  lua_setiuservalue(L, target, to);
}

/* [-0, +0, -] copies user values 1 … n of the node at i, but for `at`, to the node on top */
static void copy_others(lua_State *L, int i, int n, int at) {
  for (int k = 1; k < at; k++) {
    lua_getiuservalue(L, i, k);
    lua_setiuservalue(L, -2, k);
  }
  for (int k = at + 1; k <= n; k++) {
    lua_getiuservalue(L, i, k);
    lua_setiuservalue(L, -2, k);
  }
}

/* [-0, +1, m] a copy of the node at i in which user value `at`, one that is there, is that at v */
static struct map *node_with(lua_State *L, int i, int at, int v) {
  const struct map *old = (const struct map *)lua_touserdata(L, i);
  struct map *m = node_new(L, old->branch, old->count, old->watched);
  if (!old->branch) memcpy(m->keys, old->keys, sizeof(uint64_t) * old->count);
  copy_others(L, i, old->branch ? FANOUT : old->count, at);
  lua_pushvalue(L, v);
  lua_setiuservalue(L, -2, at);
  return m;
}

/* [-0, +1, m] a branch with the entries of the full leaf at i, dealt out by the bits at shift */
static void split(lua_State *L, int i, int shift) {
  const struct map *old = (const struct map *)lua_touserdata(L, i);
  struct map *b = node_new(L, true, 0, old->watched);
  int branch = lua_gettop(L);
  for (int child = 1; child <= FANOUT; child++) {
    int n = 0;
    for (int k = 0; k < old->count; k++) n += child_of(old->keys[k], shift) == child;
    if (n == 0) continue;
    struct map *leaf = node_new(L, false, n, old->watched);
    n = 0;
    for (int k = 0; k < old->count; k++)
      if (child_of(old->keys[k], shift) == child) {
        leaf->keys[n++] = old->keys[k];
        copy_value(L, i, k + 1, branch + 1, n);
      }
    lua_setiuservalue(L, branch, child);
    b->count++;
  }
}

/* [-0, +1, m] the leaf at i (0: none) with id = the value at v */
static void leaf_put(lua_State *L, int i, uint64_t id, int v, bool watched) {
  const struct map *old = i ? (const struct map *)lua_touserdata(L, i) : NULL;
  int n = old ? old->count : 0, at = old ? leaf_find(old, id) : 0;
  if (at == 0) at = n + 1;
  struct map *m = node_new(L, false, at > n ? at : n, watched || (old && old->watched));
  if (n > 0) memcpy(m->keys, old->keys, sizeof(uint64_t) * (size_t)n);
  m->keys[at - 1] = id;
  copy_others(L, i, n, at);
  lua_pushvalue(L, v);
  lua_setiuservalue(L, -2, at);
}

/* [-0, +1, m] the leaf at i without id (which it has), or nil when nothing is left */
static void leaf_remove(lua_State *L, int i, int at) {
  const struct map *old = (const struct map *)lua_touserdata(L, i);
  if (old->count == 1) {
    lua_pushnil(L);
    return;
  }
  struct map *m = node_new(L, false, old->count - 1, old->watched);
  int fresh = lua_gettop(L);
  for (int k = 1, n = 0; k <= old->count; k++)
    if (k != at) {
      m->keys[n++] = old->keys[k - 1];
      copy_value(L, i, k, fresh, n);
    }
}

/* [-0, +1, m] the node at i (nil: empty) with id = the value at v, nil meaning without id */
static void node_put(lua_State *L, int i, uint64_t id, int v, bool watched, int shift) {
  luaL_checkstack(L, 8, NULL);
  if (lua_isnil(L, i)) {
    if (lua_isnil(L, v))
      lua_pushnil(L);
    else
      leaf_put(L, 0, id, v, watched);
    return;
  }
  const struct map *old = (const struct map *)lua_touserdata(L, i);
  if (!old->branch) {
    int at = leaf_find(old, id);
    if (lua_isnil(L, v)) {
      if (at)
        leaf_remove(L, i, at);
      else
        lua_pushvalue(L, i);
    } else if (at || old->count < LEAF_MAX)
      leaf_put(L, i, id, v, watched);
    else {
      split(L, i, shift);
      node_put(L, lua_gettop(L), id, v, watched, shift);
      lua_remove(L, -2);
    }
    return;
  }
  int child = child_of(id, shift), count = old->count;
  lua_getiuservalue(L, i, child);
  count -= !lua_isnil(L, -1);
  node_put(L, lua_gettop(L), id, v, watched, shift + BITS); /* … child new_child */
  lua_remove(L, -2);
  count += !lua_isnil(L, -1);
  if (count == 0) return; /* the nil on top is the whole map */
  node_new(L, true, count, watched || old->watched);
  copy_others(L, i, FANOUT, child);
  lua_pushvalue(L, -2);
  lua_setiuservalue(L, -2, child);
  lua_remove(L, -2);
}

/* ---- maps ---- */

void map_push_empty(lua_State *L, struct runtime *rt) {
  struct map *m = node_new(L, false, 0, false);
  map_made(L, m, ++rt->next_serial);
}

void map_put(lua_State *L, struct runtime *rt, int i, const struct map_key *k, int v) {
  map_share(L, i); /* its nodes, with the new one */
  node_put(L, i, k->id, v, k->watched, 0);
  struct map *m = (struct map *)lua_touserdata(L, -1);
  if (m != NULL && m->serial == 0) map_made(L, m, ++rt->next_serial);
}

bool map_find(lua_State *L, const struct map *m, struct map_key *k) {
  uint64_t serial = m->serial;
  int depth = 0;
  k->serial = 0; /* until the way is complete */
  for (int shift = 0; m->branch; shift += BITS) {
    int child = child_of(k->id, shift);
    lua_getiuservalue(L, -1, child);
    if (depth < WAY_MAX - 1)
      k->way[depth++] = (uint8_t)child;
    else {
      lua_replace(L, -2);
      serial = 0;
    }
    m = (const struct map *)lua_touserdata(L, -1);
    if (m == NULL) return false;
  }
  int at = leaf_find(m, k->id);
  if (at == 0) return false;
  k->way[depth++] = (uint8_t)at;
  k->depth = (uint8_t)depth;
  k->serial = serial;
  lua_getiuservalue(L, -1, at);
  return true;
}

bool map_get(lua_State *L, struct map_key *k) {
  const struct map *m = (const struct map *)lua_touserdata(L, -1);
  if (m == NULL) return false; /* the nil stays */
  int map = lua_gettop(L);
  bool found = map_push_way(L, m, k);
  if (!found) lua_pushnil(L);
  lua_replace(L, map);
  lua_settop(L, map);
  return found;
}

void map_list(lua_State *L, int i, int names, int t) {
  luaL_checkstack(L, 8, NULL);
  const struct map *m = (const struct map *)lua_touserdata(L, i);
  if (m == NULL) return;
  for (int k = 1; k <= (m->branch ? FANOUT : m->count); k++) {
    lua_getiuservalue(L, i, k);
    if (m->branch)
      map_list(L, lua_gettop(L), names, t);
    else if (lua_rawgeti(L, names, (lua_Integer)m->keys[k - 1]) != LUA_TNIL) { /* value name */
      lua_pushvalue(L, -2);
      lua_rawset(L, t);
    } else
      lua_pop(L, 1);
    lua_pop(L, 1);
  }
}

/* Finalizers, which run when a node is made, may read this key and the map, and give the task another
** one: then this one is shared before the next look. */
bool map_copy_way(lua_State *L, struct runtime *rt, int i, const struct map *m, struct map_key *k,
                  int v) {
  uint64_t serial = m->shared ? ++rt->next_serial : m->serial;
  uint8_t way[WAY_MAX];
  int depth = k->depth;
  memcpy(way, k->way, sizeof way);
  for (int d = depth - 1; !map_change(L, i, m, d, way[d], v); d--) {
    struct map *node = node_with(L, i + d, way[d], v); /* map … old … node */
    if (d == 0) {
      map_made(L, node, serial == m->serial ? ++rt->next_serial : serial);
      k->serial = node->serial;
      k->depth = (uint8_t)depth;
      memcpy(k->way, way, sizeof way);
      return false;
    }
    node->serial = serial;
    lua_replace(L, v = i + d);
  }
  return true;
}
