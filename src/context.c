/*
** context.c - async locals and execution contexts.
**
** An execution context is an immutable map from the ids of async locals to values. The running task
** holds one (user value TASK_CONTEXT, nil when empty); setting a local replaces it by a new map that
** shares what did not change (map.c); starting a task copies one reference; switching tasks does
** nothing. What leaves TASK_CONTEXT is marked as shared (map_share) before anybody else has it: a map
** that is not is changed in place.
**
** Values of locals with flow = "none" live in a second map. A *pair* then stands in TASK_CONTEXT:
** { what flows, what stays }; captures and children take the first half.
**
** Handlers (value_changed): the runtime remembers the context whose values the handlers saw last.
** Only when that one or the new one holds a local with a handler are the two compared.
**
** Source: .NET ExecutionContext and AsyncLocal.
** SPDX-License-Identifier: MIT
*/
#include "map.h"

#include <string.h>

struct pair {
  uint32_t tag;
  bool watched;
};
enum { PAIR_FLOWING = 1, PAIR_PRIVATE };

enum local_flow { FLOW_TASK, FLOW_NONE, FLOW_THREAD };
struct local {
  uint32_t tag;
  uint8_t flow;
  struct map_key key; /* watched: the local has a handler */
  struct runtime *rt; /* at hand sooner than by the upvalue */
};
enum { LOCAL_NAME = 1, LOCAL_DEFAULT, LOCAL_HANDLER };

/* ---- what a task holds ---- */

/* the value at i of some TASK_CONTEXT, if it is a pair; NULL: a map, or nil */
static const struct pair *to_pair(lua_State *L, int i) {
  const struct pair *p = (const struct pair *)lua_touserdata(L, i);
  return p != NULL && p->tag == TAG_PAIR ? p : NULL;
}

/* [-0, +1, -] the map in which l lives, of the value at i of some TASK_CONTEXT; nil when empty */
static void push_half(lua_State *L, int i, const struct local *l) {
  bool none = l->flow == FLOW_NONE;
  if (to_pair(L, i) != NULL)
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
    map_share(L, -1);
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
  const struct map *c = (const struct map *)lua_touserdata(L, -1);
  if (c->tag == TAG_CONTEXT && l->flow != FLOW_NONE) {
    if (l->key.serial == c->serial) /* the way is known: the values pass by on the stack */
      return map_push_way(L, c, &l->key);
  } else {
    push_half(L, lua_gettop(L), l);
    lua_replace(L, -2);
  }
  return map_get(L, &l->key);
}

static bool is_watched(lua_State *L, int i) {
  const struct map *c = (const struct map *)lua_touserdata(L, i);
  const struct pair *p = to_pair(L, i);
  return p != NULL ? p->watched : c != NULL && c->watched;
}

void context_give(lua_State *L, int i, struct task *t) {
  const struct map *c = (const struct map *)lua_touserdata(L, -1);
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
  if (to_pair(L, -1) != NULL) {
    lua_getiuservalue(L, -1, PAIR_FLOWING);
    lua_remove(L, -2);
  }
}

void context_inherit(lua_State *L, int i, struct task *t, struct task *me) {
  if (me->flags & TASK_SUPPRESSED) return;
  task_push(L, me);
  lua_getiuservalue(L, -1, TASK_CONTEXT);
  struct map *c = (struct map *)lua_touserdata(L, -1);
  if (c->tag == TAG_PAIR) {
    lua_getiuservalue(L, -1, PAIR_FLOWING);
    lua_replace(L, -2);
    c = (struct map *)lua_touserdata(L, -1);
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
  if (map_get(L, &o->key)) return true;
  lua_pop(L, 1);
  lua_getiuservalue(L, l, LOCAL_DEFAULT);
  return false;
}

/* [-0, +0, -] the context at `new` is current, after that at `old`: tells the handlers that see a difference.
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
  map_share(L, flowing); /* with what is made of this pair */
  map_share(L, private);
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
  map_put(L, o->rt, lua_gettop(L), &o->key, v);
  lua_remove(L, -2); /* context previous map' */
  bool pair = to_pair(L, context) != NULL;
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
  if (o->key.watched) {
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

/* [-0, +n, me] local at l, o, = value at v for the running task; nil removes it. Calls the handler. */
static void local_assign(lua_State *L, int l, struct local *o, int v) {
  struct runtime *rt = o->rt;
  struct task *me = rt->me;
  int task = lua_gettop(L) + 1, map = task + 1;
  const struct map *old = NULL;
  task_push(L, me);
  if (me->flags & TASK_HAS_CONTEXT) {
    lua_getiuservalue(L, -1, TASK_CONTEXT); /* task map */
    old = (const struct map *)lua_touserdata(L, -1);
  } else
    lua_pushnil(L);
  if (o->flow == FLOW_NONE || o->key.watched || rt->shown_watched || me->flags & TASK_WATCHED ||
      (old != NULL && old->tag != TAG_CONTEXT)) {
    local_set_anyhow(L, l, v);
    return;
  }
  bool found = old != NULL && map_push_way(L, old, &o->key);
  if (!found) lua_getiuservalue(L, l, LOCAL_DEFAULT);
  if (lua_rawequal(L, -1, v)) return;
  if (found && o->key.serial == old->serial && !lua_isnil(L, v)) {
    if (map_replace(L, rt, map, old, &o->key, v)) return;
  } else {
    lua_settop(L, map);
    map_put(L, rt, map, &o->key, v);
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
  return ((const struct local *)lua_touserdata(L, l))->key.watched;
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
    luaL_argcheck(L, lua_isnil(L, 4) || module_is_callable(L, 4), 1,
                  "value_changed must be a function");
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
  o->key.id = ++rt->next_local;
  o->rt = rt;
  o->flow = (uint8_t)flow;
  o->key.watched = !lua_isnil(L, 4);
  for (int uv = LOCAL_NAME; uv <= LOCAL_HANDLER; uv++) {
    lua_pushvalue(L, uv + 1);
    lua_setiuservalue(L, 5, uv);
  }
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LOCALS);
  lua_pushvalue(L, 5);
  lua_rawseti(L, -2, (lua_Integer)o->key.id);
  if (o->key.watched) {
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
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LOCALS);
  module_push_function(L, next_pair);
  lua_newtable(L); /* context locals next list */
  map_list(L, 1, 2, 4);
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
    map_push_empty(L, runtime(L));
    lua_setiuservalue(L, UP_RUNTIME, RUNTIME_EMPTY);
    lua_pop(L, 1);
    lua_getiuservalue(L, UP_RUNTIME, RUNTIME_EMPTY);
  }
  lua_setfield(L, -2, "empty_context");
}
