/*
** context.c - async locals and execution contexts.
**
** An execution context is an immutable map from the ids of async locals to values. The running task
** holds one (user value TASK_CONTEXT, nil when empty); setting a local replaces it by a new map that
** shares what did not change; starting a task copies one reference; switching tasks does nothing.
**
** The map is a trie of userdata whose user values are the values:
**
**     leaf    up to 16 entries: keys[] beside, value i in user value i
**     branch  8 children by three bits of the id, lowest first
**
**            root (branch)                 a set copies the nodes on its way:
**           /   |       \                  for 1000 locals two branches and a leaf
**        leaf  branch    leaf
**             /  |  \
**
** Ids count up and are never reused, so the trie stays as shallow as it can be, and an entry can
** never be mistaken for that of another local. A local remembers the way to its value in the map
** that it was last read from (by that map's serial number), never the value itself.
**
** Copy on write. Whoever takes a map out of a task's hands, to keep it, to give it to another or to
** make a new one of its nodes, marks it as *shared*, for good. A map that is not shared is seen by its
** task alone, and so are those of its nodes that were made for it, which bear its serial number: in
** these a set changes the value in place. The keys of a node never change. So a map is immutable as
** soon as somebody could tell, and many sets in a row copy each node once.
**
** Values of locals with flow = "none" live in a second map. A *pair* then stands in TASK_CONTEXT:
** { what flows, what stays }; captures and children take the first half.
**
** Handlers (value_changed): the runtime remembers the context whose values the handlers saw last.
** Only when that one or the new one holds a local with a handler are the two compared.
**
** Source: .NET ExecutionContext and AsyncLocal; the trie is Bagwell's, with buckets for leaves.
** SPDX-License-Identifier: MIT
*/
#include "core.h"

#include <string.h>

enum { LEAF_MAX = 16, FANOUT = 8, BITS = 3, WAY_MAX = 9 };

struct context {
  uint32_t tag;
  bool branch, watched;
  bool shared;     /* of a map: more than one task's TASK_CONTEXT may hold it or nodes of it */
  uint8_t count;   /* leaf: entries; branch: children */
  uint64_t serial; /* a map's own, never used again; inside: of the map it was made for, or 0 */
  uint64_t keys[]; /* of a leaf */
};

struct pair {
  uint32_t tag;
  bool watched;
};
enum { PAIR_FLOWING = 1, PAIR_PRIVATE };

enum local_flow { FLOW_TASK, FLOW_NONE, FLOW_THREAD };
struct local {
  uint32_t tag;
  uint8_t flow;
  bool watched;
  uint8_t depth; /* of the remembered way, in the map with that serial */
  uint8_t way[WAY_MAX];
  uint64_t id, serial;
  struct runtime *rt; /* at hand sooner than by the upvalue */
};
enum { LOCAL_NAME = 1, LOCAL_DEFAULT, LOCAL_HANDLER };

/* ---- the map ---- */

/* [-0, +1, m] */
static struct context *node_new(lua_State *L, bool branch, int count, bool watched) {
  size_t keys = branch ? 0 : sizeof(uint64_t) * (size_t)count;
  struct context *c = (struct context *)lua_newuserdatauv(L, sizeof(struct context) + keys,
                                                          branch ? FANOUT : count);
  c->tag = TAG_CONTEXT;
  c->branch = branch;
  c->watched = watched;
  c->shared = false;
  c->count = (uint8_t)count;
  c->serial = 0;
  return c;
}

/* [-0, +0, -] the new node on top, c, is a whole map, which scripts may see */
static void map_made(lua_State *L, struct context *c, uint64_t serial) {
  c->serial = serial;
  lua_rawgeti(L, UP_ANCHORS, TAG_CLASS(TAG_CONTEXT));
  lua_setmetatable(L, -2);
}

static int leaf_find(const struct context *c, uint64_t id) {
  for (int i = 0; i < c->count; i++)
    if (c->keys[i] == id) return i + 1;
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
static struct context *node_with(lua_State *L, int i, int at, int v) {
  const struct context *old = (const struct context *)lua_touserdata(L, i);
  struct context *c = node_new(L, old->branch, old->count, old->watched);
  if (!old->branch) memcpy(c->keys, old->keys, sizeof(uint64_t) * old->count);
  copy_others(L, i, old->branch ? FANOUT : old->count, at);
  lua_pushvalue(L, v);
  lua_setiuservalue(L, -2, at);
  return c;
}

/* [-0, +1, m] a branch with the entries of the full leaf at i, dealt out by the bits at shift */
static void split(lua_State *L, int i, int shift) {
  const struct context *old = (const struct context *)lua_touserdata(L, i);
  struct context *b = node_new(L, true, 0, old->watched);
  int branch = lua_gettop(L);
  for (int child = 1; child <= FANOUT; child++) {
    int n = 0;
    for (int k = 0; k < old->count; k++) n += child_of(old->keys[k], shift) == child;
    if (n == 0) continue;
    struct context *leaf = node_new(L, false, n, old->watched);
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
  const struct context *old = i ? (const struct context *)lua_touserdata(L, i) : NULL;
  int n = old ? old->count : 0, at = old ? leaf_find(old, id) : 0;
  if (at == 0) at = n + 1;
  struct context *c = node_new(L, false, at > n ? at : n, watched || (old && old->watched));
  if (n > 0) memcpy(c->keys, old->keys, sizeof(uint64_t) * (size_t)n);
  c->keys[at - 1] = id;
  copy_others(L, i, n, at);
  lua_pushvalue(L, v);
  lua_setiuservalue(L, -2, at);
}

/* [-0, +1, m] the leaf at i without id (which it has), or nil when nothing is left */
static void leaf_remove(lua_State *L, int i, int at) {
  const struct context *old = (const struct context *)lua_touserdata(L, i);
  if (old->count == 1) {
    lua_pushnil(L);
    return;
  }
  struct context *c = node_new(L, false, old->count - 1, old->watched);
  int fresh = lua_gettop(L);
  for (int k = 1, n = 0; k <= old->count; k++)
    if (k != at) {
      c->keys[n++] = old->keys[k - 1];
      copy_value(L, i, k, fresh, n);
    }
}

/* [-0, +1, m] the map at i (nil: empty) with id = the value at v, nil meaning without id */
static void node_put(lua_State *L, int i, uint64_t id, int v, bool watched, int shift) {
  luaL_checkstack(L, 8, NULL);
  if (lua_isnil(L, i)) {
    if (lua_isnil(L, v))
      lua_pushnil(L);
    else
      leaf_put(L, 0, id, v, watched);
    return;
  }
  const struct context *old = (const struct context *)lua_touserdata(L, i);
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

/* [-0, +0, -] the map at i, if it is one, will not change any more */
static void share(lua_State *L, int i) {
  struct context *c = (struct context *)lua_touserdata(L, i);
  if (c != NULL && c->tag == TAG_CONTEXT) c->shared = true;
}

/* [-0, +1, m] the same, for a whole map */
static void map_put(lua_State *L, int i, const struct local *l, int v) {
  share(L, i); /* its nodes, with the new one */
  node_put(L, i, l->id, v, l->watched, 0);
  struct context *c = (struct context *)lua_touserdata(L, -1);
  if (c != NULL && c->serial == 0) map_made(L, c, ++l->rt->next_serial);
}

/* [-0, +n, -] from the map on top, c, the nodes below it that lead to the entry of l, and its value;
** false, and some nodes, if it has none. The local remembers the way, but for one too long: then
** what is left on the stack is of no use but for the value. */
static bool map_push_way(lua_State *L, const struct context *c, struct local *l) {
  if (l->serial == c->serial) {
    for (int d = 0; d < l->depth; d++) lua_getiuservalue(L, -1, l->way[d]);
    return true;
  }
  uint64_t serial = c->serial;
  int depth = 0;
  l->serial = 0; /* until the way is complete */
  for (int shift = 0; c->branch; shift += BITS) {
    int child = child_of(l->id, shift);
    lua_getiuservalue(L, -1, child);
    if (depth < WAY_MAX - 1)
      l->way[depth++] = (uint8_t)child;
    else {
      lua_replace(L, -2);
      serial = 0;
    }
    c = (const struct context *)lua_touserdata(L, -1);
    if (c == NULL) return false;
  }
  int at = leaf_find(c, l->id);
  if (at == 0) return false;
  l->way[depth++] = (uint8_t)at;
  l->depth = (uint8_t)depth;
  l->serial = serial;
  lua_getiuservalue(L, -1, at);
  return true;
}

/* [-1, +1, -] the value of l in the map on top (nil: empty); false, and nil, if it has none */
static bool map_get(lua_State *L, struct local *l) {
  const struct context *c = (const struct context *)lua_touserdata(L, -1);
  if (c == NULL) return false; /* the nil stays */
  int map = lua_gettop(L);
  bool found = map_push_way(L, c, l);
  if (!found) lua_pushnil(L);
  lua_replace(L, map);
  lua_settop(L, map);
  return found;
}

/* [-0, +0, m] copies the entries of the map at i into the table at t, as local = value */
static void map_list(lua_State *L, int i, int t) {
  luaL_checkstack(L, 8, NULL);
  const struct context *c = (const struct context *)lua_touserdata(L, i);
  if (c == NULL) return;
  for (int k = 1; k <= (c->branch ? FANOUT : c->count); k++) {
    lua_getiuservalue(L, i, k);
    if (c->branch)
      map_list(L, lua_gettop(L), t);
    else {
      lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LOCALS);
      lua_rawgeti(L, -1, (lua_Integer)c->keys[k - 1]);
      if (!lua_isnil(L, -1)) { /* value locals local */
        lua_pushvalue(L, -3);
        lua_rawset(L, t);
        lua_pop(L, 1);
      } else
        lua_pop(L, 2);
    }
    lua_pop(L, 1);
  }
}

/* ---- what a task holds ---- */

/* [-0, +1, -] the map in which l lives, of the value at i of some TASK_CONTEXT; nil when empty */
static void push_half(lua_State *L, int i, const struct local *l) {
  const struct pair *p = (const struct pair *)lua_touserdata(L, i);
  bool none = l->flow == FLOW_NONE;
  if (p != NULL && p->tag == TAG_PAIR)
    lua_getiuservalue(L, i, none ? PAIR_PRIVATE : PAIR_FLOWING);
  else if (none)
    lua_pushnil(L);
  else
    lua_pushvalue(L, i);
}

/* [-0, +1, -] */
static void push_of(lua_State *L, struct task *t) {
  if (t->flags & TASK_HAS_CONTEXT) {
    task_push(L, t);
    lua_getiuservalue(L, -1, TASK_CONTEXT);
    lua_remove(L, -2);
    share(L, -1);
  } else
    lua_pushnil(L);
}

/* [-0, +n, -] on top the value of l for the running task; false, and nil, when it has none */
static inline bool local_get(lua_State *L, struct local *l) {
  struct task *me = l->rt->me;
  if (!(me->flags & TASK_HAS_CONTEXT)) {
    lua_pushnil(L);
    return false;
  }
  if (lua_rawgeti(L, UP_ANCHORS, me->slot) != LUA_TUSERDATA) {
    lua_pop(L, 1);
    task_push(L, me);
  }
  lua_getiuservalue(L, -1, TASK_CONTEXT);
  const struct context *c = (const struct context *)lua_touserdata(L, -1);
  if (c->tag == TAG_CONTEXT && l->flow != FLOW_NONE) {
    if (l->serial == c->serial) { /* the way is known: the values pass by on the stack */
      for (int d = 0; d < l->depth; d++) lua_getiuservalue(L, -1, l->way[d]);
      return true;
    }
  } else {
    push_half(L, lua_gettop(L), l);
    lua_replace(L, -2);
  }
  return map_get(L, l);
}

static bool is_watched(lua_State *L, int i) {
  const struct context *c = (const struct context *)lua_touserdata(L, i);
  if (c == NULL) return false;
  return c->tag == TAG_PAIR ? ((const struct pair *)(const void *)c)->watched : c->watched;
}

void context_give(lua_State *L, int i, struct task *t) {
  const struct context *c = (const struct context *)lua_touserdata(L, -1);
  if (c != NULL && c->tag == TAG_CONTEXT && c->count == 0) { /* the empty one is written nil */
    lua_pop(L, 1);
    lua_pushnil(L);
    c = NULL;
  }
  t->flags &= (uint16_t) ~(TASK_HAS_CONTEXT | TASK_WATCHED);
  if (c != NULL) t->flags |= TASK_HAS_CONTEXT;
  if (is_watched(L, -1)) t->flags |= TASK_WATCHED;
  lua_setiuservalue(L, i, TASK_CONTEXT);
}

void context_push_flowing(lua_State *L, struct task *t) {
  if (!(t->flags & TASK_HAS_CONTEXT) || t->flags & TASK_SUPPRESSED) {
    lua_pushnil(L);
    return;
  }
  push_of(L, t);
  const struct pair *p = (const struct pair *)lua_touserdata(L, -1);
  if (p->tag == TAG_PAIR) {
    lua_getiuservalue(L, -1, PAIR_FLOWING);
    lua_remove(L, -2);
  }
}

void context_inherit(lua_State *L, int i, struct task *t, struct task *me) {
  if (me->flags & TASK_SUPPRESSED) return;
  task_push(L, me);
  lua_getiuservalue(L, -1, TASK_CONTEXT);
  struct context *c = (struct context *)lua_touserdata(L, -1);
  if (c->tag == TAG_PAIR) {
    lua_getiuservalue(L, -1, PAIR_FLOWING);
    lua_replace(L, -2);
    c = (struct context *)lua_touserdata(L, -1);
  }
  if (c != NULL) {
    c->shared = true;
    t->flags |= c->watched ? TASK_HAS_CONTEXT | TASK_WATCHED : TASK_HAS_CONTEXT;
    lua_setiuservalue(L, i - 2, TASK_CONTEXT);
    lua_pop(L, 1);
  } else
    lua_pop(L, 2);
}

void context_drop(lua_State *L, int i, struct task *t) {
  t->flags &= (uint16_t) ~(TASK_HAS_CONTEXT | TASK_WATCHED);
  lua_pushnil(L);
  lua_setiuservalue(L, i, TASK_CONTEXT);
}

void context_push_current(lua_State *L) { push_of(L, runtime(L)->me); }

static void push_captured(lua_State *L) {
  context_push_flowing(L, runtime(L)->me);
  if (lua_isnil(L, -1)) {
    lua_pop(L, 1);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_EMPTY);
  }
}

/* ---- handlers ---- */

/* arguments: handler, previous, current, changed */
static int call_handler(lua_State *L) {
  lua_createtable(L, 0, 3);
  lua_pushvalue(L, 2);
  lua_setfield(L, -2, "previous_value");
  lua_pushvalue(L, 3);
  lua_setfield(L, -2, "current_value");
  lua_pushvalue(L, 4);
  lua_setfield(L, -2, "context_changed");
  lua_pushvalue(L, 1);
  lua_insert(L, -2);
  lua_call(L, 1, 0);
  return 0;
}

/* [-0, +1, -] the value that code under the TASK_CONTEXT value at i reads from the local at l */
static bool push_seen(lua_State *L, int i, int l) {
  struct local *o = (struct local *)lua_touserdata(L, l);
  push_half(L, i, o);
  if (map_get(L, o)) return true;
  lua_pop(L, 1);
  lua_getiuservalue(L, l, LOCAL_DEFAULT);
  return false;
}

/* [-0, +0, -] the context on top of `old` became current: tell the handlers that see a difference.
** Those of the old context first, in the order the locals were made, then those only in the new. */
static void tell_switch(lua_State *L, int old, int new) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WATCHED);
  int list = lua_gettop(L), n = runtime(L)->watched_count;
  for (int pass = 0; pass < 2; pass++)
    for (int k = 1; k <= n; k++, lua_settop(L, list)) {
      if (lua_rawgeti(L, list, k) == LUA_TNIL) continue;
      bool had = push_seen(L, old, list + 1);
      push_seen(L, new, list + 1);
      if (had != (pass == 0) || lua_rawequal(L, -1, -2)) continue;
      lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TELLER); /* list local previous current call */
      lua_getiuservalue(L, list + 1, LOCAL_HANDLER);
      lua_pushvalue(L, list + 2);
      lua_pushvalue(L, list + 3);
      lua_pushboolean(L, 1);
      if (lua_pcall(L, 4, 0, 0) != LUA_OK) error_report(L, -1, 0);
    }
  lua_settop(L, list - 1);
}

void context_show(lua_State *L, struct runtime *rt, struct task *t) {
  if (!lua_checkstack(L, 20)) return;
  int top = lua_gettop(L);
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_SHOWN);
  push_of(L, t);
  if (!lua_rawequal(L, -1, -2)) {
    lua_pushvalue(L, -1);
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_SHOWN);
    rt->shown_watched = t->flags & TASK_WATCHED;
    rt->depth++;
    tell_switch(L, top + 1, top + 2);
    rt->depth--;
  }
  lua_settop(L, top);
}

/* [-1, +0, m] the running task's context becomes that on top, by a set */
static void replace(lua_State *L) {
  struct runtime *rt = runtime(L);
  task_push(L, rt->me);
  lua_insert(L, -2);
  context_give(L, lua_gettop(L) - 1, rt->me);
  lua_pop(L, 1);
  if (rt->shown_watched || rt->me->flags & TASK_WATCHED) {
    push_of(L, rt->me);
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_SHOWN);
    rt->shown_watched = rt->me->flags & TASK_WATCHED;
  }
}

void context_swap(lua_State *L) {
  struct runtime *rt = runtime(L);
  struct task *me = rt->me;
  push_of(L, me); /* new old */
  lua_insert(L, -2);
  task_push(L, me);
  lua_insert(L, -2); /* old me new */
  context_give(L, lua_gettop(L) - 1, me);
  lua_pop(L, 1);
  context_switched(L, rt, me);
}

/* ---- AsyncLocal ---- */

static struct local *check_local(lua_State *L, int i) {
  return (struct local *)object_check(L, i, TAG_LOCAL);
}

/* [-0, +1, m] the pair or map that holds `flowing` and `private`, both absolute indices */
static void push_pair(lua_State *L, int flowing, int private) {
  if (lua_isnil(L, private)) {
    lua_pushvalue(L, flowing);
    return;
  }
  share(L, flowing); /* with what is made of this pair */
  share(L, private);
  struct pair *p = (struct pair *)object_new(L, TAG_PAIR, sizeof(struct pair), 2);
  p->watched = is_watched(L, flowing) || is_watched(L, private);
  lua_pushvalue(L, flowing);
  lua_setiuservalue(L, -2, PAIR_FLOWING);
  lua_pushvalue(L, private);
  lua_setiuservalue(L, -2, PAIR_PRIVATE);
}

/* [-0, +0, me] local at l = value at v for the running task, where handlers or pairs are about */
static void local_set_anyhow(lua_State *L, int l, int v) {
  struct local *o = (struct local *)lua_touserdata(L, l);
  int top = lua_gettop(L);
  luaL_checkstack(L, 30, NULL);
  push_of(L, runtime(L)->me); /* context */
  int context = top + 1;
  push_seen(L, context, l); /* context previous */
  if (lua_rawequal(L, -1, v)) {
    lua_settop(L, top);
    return;
  }
  push_half(L, context, o); /* context previous map */
  map_put(L, lua_gettop(L), o, v);
  lua_remove(L, -2); /* context previous map' */
  bool pair = lua_touserdata(L, context) && *(uint32_t *)lua_touserdata(L, context) == TAG_PAIR;
  if (o->flow == FLOW_NONE) {
    if (pair)
      lua_getiuservalue(L, context, PAIR_FLOWING);
    else
      lua_pushvalue(L, context);
    push_pair(L, lua_gettop(L), lua_gettop(L) - 1);
  } else if (pair) {
    lua_getiuservalue(L, context, PAIR_PRIVATE);
    push_pair(L, lua_gettop(L) - 1, lua_gettop(L));
  }
  replace(L);
  lua_settop(L, context + 1);
  if (o->watched) {
    if (lua_isnil(L, v))
      lua_getiuservalue(L, l, LOCAL_DEFAULT);
    else
      lua_pushvalue(L, v); /* context previous current */
    if (!lua_rawequal(L, -1, -2)) {
      module_push_function(L, call_handler);
      lua_getiuservalue(L, l, LOCAL_HANDLER);
      lua_pushvalue(L, context + 1);
      lua_pushvalue(L, context + 2);
      lua_pushboolean(L, 0);
      lua_call(L, 4, 0);
    }
  }
  lua_settop(L, top);
}

/* [-0, +n, m] the value at v for the entry of l in the task's map at `map`, old, above which stands the
** way to it, just pushed. True: done, in place; false: a map that has it is on top. Finalizers, which
** run when a node is made, may use and replace the task's map: then it is shared before the next look. */
static bool replace_value(lua_State *L, int map, const struct context *old, struct local *l,
                          int v) {
  uint64_t serial = old->shared ? ++l->rt->next_serial : old->serial;
  uint8_t way[WAY_MAX];
  int last = l->depth - 1;
  memcpy(way, l->way, sizeof way);
  for (int d = last;; d--) {
    const struct context *node = d == 0 ? old : (const struct context *)lua_touserdata(L, map + d);
    if (!old->shared && node->serial == old->serial) {
      lua_pushvalue(L, v);
      lua_setiuservalue(L, map + d, way[d]);
      return true;
    }
    struct context *c = node_with(L, map + d, way[d], v); /* map … node … node' */
    if (d == 0) {
      map_made(L, c, serial == old->serial ? ++l->rt->next_serial : serial);
      l->serial = c->serial;
      l->depth = (uint8_t)(last + 1);
      memcpy(l->way, way, sizeof way);
      return false;
    }
    c->serial = serial;
    lua_replace(L, v = map + d);
  }
}

/* [-0, +n, me] local at l, o, = value at v for the running task; nil removes it. Calls the handler. */
static void local_assign(lua_State *L, int l, struct local *o, int v) {
  struct runtime *rt = o->rt;
  struct task *me = rt->me;
  int task = lua_gettop(L) + 1, map = task + 1;
  const struct context *old = NULL;
  task_push(L, me);
  if (me->flags & TASK_HAS_CONTEXT) {
    lua_getiuservalue(L, -1, TASK_CONTEXT); /* task map */
    old = (const struct context *)lua_touserdata(L, -1);
  } else
    lua_pushnil(L);
  if (o->flow == FLOW_NONE || o->watched || rt->shown_watched || me->flags & TASK_WATCHED ||
      (old != NULL && old->tag != TAG_CONTEXT)) {
    local_set_anyhow(L, l, v);
    return;
  }
  bool found = old != NULL && map_push_way(L, old, o);
  if (!found) lua_getiuservalue(L, l, LOCAL_DEFAULT);
  if (lua_rawequal(L, -1, v)) return;
  if (found && o->serial == old->serial && !lua_isnil(L, v)) {
    if (replace_value(L, map, old, o, v)) return;
  } else {
    lua_settop(L, map);
    map_put(L, map, o, v);
  }
  if (lua_isnil(L, -1))
    me->flags &= (uint16_t)~TASK_HAS_CONTEXT;
  else
    me->flags |= TASK_HAS_CONTEXT;
  lua_setiuservalue(L, task, TASK_CONTEXT);
}

void context_set_local(lua_State *L, int l, int v) {
  int top = lua_gettop(L);
  local_assign(L, l, (struct local *)lua_touserdata(L, l), v);
  lua_settop(L, top);
}

bool context_watches(lua_State *L, int l) {
  return ((const struct local *)lua_touserdata(L, l))->watched;
}

void context_push_local(lua_State *L, int i) {
  int top = lua_gettop(L);
  local_get(L, check_local(L, i));
  lua_replace(L, top + 1);
  lua_settop(L, top + 1);
}

static int l_local_get(lua_State *L) {
  struct local *o = check_local(L, 1);
  if (!local_get(L, o)) lua_getiuservalue(L, 1, LOCAL_DEFAULT);
  return 1;
}

static int l_local_set(lua_State *L) {
  struct local *o = check_local(L, 1);
  if (lua_gettop(L) != 2) {
    luaL_checkany(L, 2);
    lua_settop(L, 2);
  }
  local_assign(L, 1, o, 2);
  return 0;
}

static int l_local_newindex(lua_State *L) {
  struct local *o = check_local(L, 1);
  lua_settop(L, 3);
  if (lua_type(L, 2) != LUA_TSTRING || strcmp(lua_tostring(L, 2), "value") != 0)
    return luaL_error(L, "field '%s' of an AsyncLocal cannot be assigned, only 'value'",
                      luaL_tolstring(L, 2, NULL));
  local_assign(L, 1, o, 3);
  return 0;
}

static int l_local_name(lua_State *L) {
  check_local(L, 1);
  lua_getiuservalue(L, 1, LOCAL_NAME);
  return 1;
}

static int l_local_tostring(lua_State *L) {
  check_local(L, 1);
  if (lua_getiuservalue(L, 1, LOCAL_NAME) == LUA_TSTRING)
    lua_pushfstring(L, "coflow.AsyncLocal '%s'", lua_tostring(L, -1));
  else
    lua_pushfstring(L, "coflow.AsyncLocal: %p", lua_topointer(L, 1));
  return 1;
}

/* AsyncLocal(), AsyncLocal(name), AsyncLocal{ name =, default =, value_changed =, flow = } */
static int l_local_new(lua_State *L) {
  static const char *const options[] = {"name", "default", "value_changed", "flow", NULL};
  static const char *const flows[] = {"task", "none", "thread", NULL};
  struct runtime *rt = runtime(L);
  int flow = FLOW_TASK;
  lua_settop(L, 1); /* argument name default handler */
  if (lua_type(L, 1) == LUA_TTABLE) {
    module_check_options(L, 1, options);
    lua_getfield(L, 1, "name");
    lua_getfield(L, 1, "default");
    lua_getfield(L, 1, "value_changed");
    lua_getfield(L, 1, "flow");
    luaL_argcheck(L, lua_isnil(L, 2) || lua_type(L, 2) == LUA_TSTRING, 1, "name must be a string");
    if (!lua_isnil(L, 4) && !lua_isfunction(L, 4)) {
      luaL_argcheck(L, luaL_getmetafield(L, 4, "__call") != LUA_TNIL, 1,
                    "value_changed must be a function");
      lua_pop(L, 1);
    }
    if (!lua_isnil(L, 5)) {
      const char *name = lua_type(L, 5) == LUA_TSTRING ? lua_tostring(L, 5) : "";
      while (flows[flow] && strcmp(flows[flow], name) != 0) flow++;
      luaL_argcheck(L, flows[flow], 1, "flow must be \"task\", \"none\" or \"thread\"");
    }
    luaL_argcheck(L, flow != FLOW_THREAD || !lua_isnil(L, 2), 1,
                  "flow = \"thread\" needs a name: it crosses into workers by it");
  } else {
    if (!lua_isnil(L, 1) && lua_type(L, 1) != LUA_TSTRING)
      return luaL_typeerror(L, 1, "name or table of options");
    lua_pushvalue(L, 1);
  }
  lua_settop(L, 4);
  struct local *o = (struct local *)object_new(L, TAG_LOCAL, sizeof(struct local), 3);
  o->id = ++rt->next_local;
  o->rt = rt;
  o->flow = (uint8_t)flow;
  o->watched = !lua_isnil(L, 4);
  for (int uv = LOCAL_NAME; uv <= LOCAL_HANDLER; uv++) {
    lua_pushvalue(L, uv + 1);
    lua_setiuservalue(L, 5, uv);
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LOCALS);
  lua_pushvalue(L, 5);
  lua_rawseti(L, -2, (lua_Integer)o->id);
  if (o->watched) {
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_WATCHED);
    lua_pushvalue(L, 5);
    lua_rawseti(L, -2, ++rt->watched_count);
  }
  lua_settop(L, 5);
  return 1;
}

/* ---- ExecutionContext ---- */

void context_check(lua_State *L, int i) {
  luaL_checkany(L, i);
  if (lua_isnil(L, i))
    error_throw(L, ERROR_OPERATION,
                "there is no context: it was captured while the flow was suppressed");
  object_check(L, i, TAG_CONTEXT);
}

static int l_capture(lua_State *L) {
  if (runtime(L)->me->flags & TASK_SUPPRESSED)
    lua_pushnil(L);
  else
    push_captured(L);
  return 1;
}

static int l_restore(lua_State *L) {
  context_check(L, 1);
  lua_settop(L, 1);
  context_swap(L);
  return 0;
}

static int l_context_get(lua_State *L) {
  object_check(L, 1, TAG_CONTEXT);
  check_local(L, 2);
  push_seen(L, 1, 2);
  return 1;
}

static int next_pair(lua_State *L) {
  luaL_checktype(L, 1, LUA_TTABLE);
  lua_settop(L, 2);
  return lua_next(L, 1) ? 2 : 0;
}

static int l_context_pairs(lua_State *L) {
  object_check(L, 1, TAG_CONTEXT);
  lua_settop(L, 1);
  lua_pushcfunction(L, next_pair);
  lua_newtable(L);
  map_list(L, 1, 3);
  return 2;
}

static const luaL_Reg functions[] = {
    {"AsyncLocal", l_local_new}, {"capture", l_capture}, {"restore", l_restore}, {NULL, NULL}};

static const luaL_Reg local_methods[] = {{"get", l_local_get},
                                         {"set", l_local_set},
                                         {"__newindex", l_local_newindex},
                                         {"__tostring", l_local_tostring},
                                         {NULL, NULL}};
static const luaL_Reg local_properties[] = {
    {"value", l_local_get}, {"name", l_local_name}, {NULL, NULL}};

static const luaL_Reg context_methods[] = {
    {"get", l_context_get}, {"__pairs", l_context_pairs}, {NULL, NULL}};
static const luaL_Reg pair_methods[] = {{NULL, NULL}};

void context_open(lua_State *L) {
  module_functions(L, functions);
  module_class(L, TAG_LOCAL, "coflow.AsyncLocal", local_methods, local_properties);
  module_class(L, TAG_CONTEXT, "coflow.ExecutionContext", context_methods, NULL);
  module_class(L, TAG_PAIR, "coflow.ContextPair", pair_methods, NULL);
  module_push_function(L, call_handler);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_TELLER);
  if (lua_getiuservalue(L, UP_RUNTIME, RUNTIME_EMPTY) == LUA_TNIL) { /* one for the whole state */
    struct context *c = node_new(L, false, 0, false);
    map_made(L, c, ++runtime(L)->next_serial);
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_EMPTY);
    lua_pop(L, 1);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_EMPTY);
  }
  lua_setfield(L, -2, "empty_context");
}
