/*
** items.c - where the items of a channel lie, and in which order.
**
** In a ring whose size is a power of two: a Lua table (CHANNEL_ITEMS) that doubles when it is full, or,
** when the capacity is small, user values of the channel itself (CHANNEL_RING on), which cost less. The
** items of a prioritized channel lie in sorted pieces instead, which lua/coflow/channel.lua makes: a
** list (CHANNEL_ITEMS) of lists, in which the first item to be read is the last one of the last list.
**
** Who waits for an item, or for room, is no concern of this file (channel.c).
**
** Invariants: the ring's items are at head, head + 1 … head + count - 1, modulo size; all else in it is nil.
**             Of sorted pieces none is empty; count is the sum of their lengths.
** SPDX-License-Identifier: MIT
*/
#include "channel.h"

enum { MIN_RING = 8, MAX_OWN = 256 };

int items_own(lua_Integer capacity) {
  int size = 1;
  if (capacity > MAX_OWN) return 0;
  while (size < capacity) size *= 2;
  return size;
}

void items_init(lua_State *L, int ch, struct channel *c, int own) {
  c->own = own > 0;
  c->size = own;
  if (c->own) return;
  lua_createtable(L, c->sorted ? 0 : MIN_RING, 0);
  lua_setiuservalue(L, ch, CHANNEL_ITEMS);
}

void items_close(lua_State *L, int ch) {
  lua_pushnil(L);
  lua_setiuservalue(L, ch, CHANNEL_ITEMS);
}

/* ---- the ring ---- */

/* [-0, +0, m] room for one more: the part of the ring that lies before the head moves behind it */
static void grow(lua_State *L, struct channel *c, int items) {
  lua_Integer size = c->size ? c->size * 2 : MIN_RING;
  if (c->size > 0) c->head &= c->size - 1;
  for (lua_Integer k = 1; k <= c->head; k++) {
    lua_rawgeti(L, items, k);
    lua_rawseti(L, items, c->size + k);
  }
  for (lua_Integer k = 1; k <= c->head; k++) {
    lua_pushnil(L);
    lua_rawseti(L, items, k);
  }
  c->size = size;
}

void items_put(lua_State *L, int ch, struct channel *c, int v) {
  if (c->own) {
    lua_pushvalue(L, v);
    lua_setiuservalue(L, ch, CHANNEL_RING + (int)items_place(c, c->count++));
    return;
  }
  lua_getiuservalue(L, ch, CHANNEL_ITEMS);
  if (c->count == c->size) grow(L, c, lua_gettop(L));
  lua_pushvalue(L, v < 0 ? v - 1 : v);
  lua_rawseti(L, -2, items_place(c, c->count) + 1);
  lua_pop(L, 1);
  if (++c->count > c->peak) c->peak = c->count;
}

void items_shrink(lua_State *L, int ch, struct channel *c) {
  if (c->peak <= c->size / 4) {
    lua_createtable(L, MIN_RING, 0);
    if (c->count == 0) {
      lua_setiuservalue(L, ch, CHANNEL_ITEMS);
      c->size = c->head = 0;
    } else
      lua_pop(L, 1);
  }
  c->peak = c->count;
}

/* ---- sorted pieces ---- */

/* [-0, +1, -] the first of a prioritized channel, the last one of its last piece */
static void pop_sorted(lua_State *L, int ch, struct channel *c, bool remove) {
  lua_getiuservalue(L, ch, CHANNEL_ITEMS);
  lua_Integer pieces = (lua_Integer)lua_rawlen(L, -1);
  lua_rawgeti(L, -1, pieces); /* items piece */
  lua_Integer n = (lua_Integer)lua_rawlen(L, -1);
  lua_rawgeti(L, -1, n);
  lua_insert(L, -3); /* item items piece */
  if (remove) {
    lua_pushnil(L);
    lua_rawseti(L, -2, n);
    if (n == 1) {
      lua_pushnil(L);
      lua_rawseti(L, -3, pieces);
    }
    c->count--;
    c->version++;
  }
  lua_pop(L, 2);
}

bool items_insert(lua_State *L, int ch, struct channel *c, int v) {
  luaL_checkstack(L, 100,
                  NULL); /* where it grows finalizers run: not while the item is being put in */
  lua_getiuservalue(L, ch, CHANNEL_INSERT);
  lua_pushvalue(L, ch);
  lua_getiuservalue(L, ch, CHANNEL_ITEMS);
  lua_pushvalue(L, v);
  lua_call(L, 3, 1); /* comparers run in it; the last thing that it does is to put the item there */
  bool done = lua_toboolean(L, -1);
  lua_pop(L, 1);
  if (!done) return false;
  c->count++;
  c->version++;
  return true;
}

/* ---- either ---- */

void items_fetch(lua_State *L, int ch, struct channel *c, lua_Integer k, bool remove) {
  if (c->sorted) {
    pop_sorted(L, ch, c, remove);
    return;
  }
  lua_Integer at = items_place(c, k);
  if (c->own) {
    lua_getiuservalue(L, ch, CHANNEL_RING + (int)at);
    if (remove) {
      lua_pushnil(L);
      lua_setiuservalue(L, ch, CHANNEL_RING + (int)at);
    }
  } else {
    lua_getiuservalue(L, ch, CHANNEL_ITEMS);
    lua_rawgeti(L, -1, at + 1);
    if (remove) {
      lua_pushnil(L);
      lua_rawseti(L, -3, at + 1);
    }
    lua_replace(L, -2);
  }
  if (!remove) return;
  c->count--;
  if (k == 0) c->head++;
}
