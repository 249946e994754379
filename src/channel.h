/*
** channel.h - what a channel is made of, and where its items lie: for channel.c and items.c.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_channel_h
#define coflow_channel_h

#include "waiter.h"

#pragma GCC visibility push(hidden)

enum mode { MODE_WAIT, MODE_DROP_NEWEST, MODE_DROP_OLDEST, MODE_DROP_WRITE };

struct channel {
  struct holder holder;
  uint8_t mode;
  bool completed, failed; /* failed: with an error */
  bool sorted;            /* prioritized */
  bool plain;             /* neither completed nor prioritized */
  bool own;               /* the ring is among its user values */
  bool drops;             /* CHANNEL_DROPPED is a function */
  lua_Integer capacity, count;
  lua_Integer head, size; /* of the ring */
  lua_Integer peak;       /* the highest count since the ring was empty */
  lua_Integer version;    /* of a prioritized one: counts the changes */
  struct link readers, writers, can_read, can_write;
  struct runtime *rt;
};
/* CHANNEL_ERROR: what it was completed with; CHANNEL_CLOSED: what read and write raise then.
** CHANNEL_INSERT: of a prioritized one, a function that puts an item in its place. */
enum {
  CHANNEL_ITEMS = HOLDER_WAITERS + 1,
  CHANNEL_COMPLETION,
  CHANNEL_ERROR,
  CHANNEL_CLOSED,
  CHANNEL_DROPPED,
  CHANNEL_INSERT,
  CHANNEL_READER,
  CHANNEL_WRITER,
  CHANNEL_RING
};

/* ---- items.c ---- */

int items_own(lua_Integer capacity); /* how many user values they take, from CHANNEL_RING on */
/* [-0, +0, m] makes the channel at ch, which has so many, ready for items */
void items_init(lua_State *L, int ch, struct channel *c, int own);
void items_close(lua_State *L, int ch); /* [-0, +0, -] there are none, and none will come */
/* [-0, +0, m] the item at v becomes the last one; a ring among the user values must have room for it */
void items_put(lua_State *L, int ch, struct channel *c, int v);
/* [-0, +0, e] the item at v into a prioritized channel; false: it was completed meanwhile */
bool items_insert(lua_State *L, int ch, struct channel *c, int v);
/* [-0, +1, -] item k of those that are there, from 0, which is removed if told: it must be the first or
** the last then. Of a prioritized channel always the first one. */
void items_fetch(lua_State *L, int ch, struct channel *c, lua_Integer k, bool remove);
enum { SMALL_RING = 1024 };
static inline bool items_may_shrink(const struct channel *c) {
  return c->size > SMALL_RING && c->count == 0 && !c->sorted;
}
/* [-0, +0, m] a ring that had to be large once, and was not since, is given up. Creates. */
void items_shrink(lua_State *L, int ch, struct channel *c);

/* the place in the ring of item k of those that are there, both from 0 */
static inline lua_Integer items_place(const struct channel *c, lua_Integer k) {
  return (c->head + k) & (c->size - 1);
}

/* The place of the first item is that of the next one, too: it may be put there without the first one
** having been removed. */
static inline bool items_in_place(const struct channel *c) { return c->own && c->count == c->size; }
static inline void items_push_first(lua_State *L, int ch, struct channel *c) { /* [-0, +1, -] */
  lua_getiuservalue(L, ch, CHANNEL_RING + (int)items_place(c, 0));
}
static inline void items_replace_first(lua_State *L, int ch, struct channel *c) { /* [-1, +0, -] */
  lua_setiuservalue(L, ch, CHANNEL_RING + (int)items_place(c, 0));
  c->head++;
}
static inline void items_drop_first(lua_State *L, int ch, struct channel *c) { /* [-0, +0, -] */
  lua_pushnil(L);
  items_replace_first(L, ch, c);
  c->count--;
}

/* items_fetch of the first item, and items_put of the one on top, in a ring that has it, or room for
** it. They leave more on the stack, for a function that is about to return. */
static inline void items_fetch_first(lua_State *L, int ch, struct channel *c) {
  lua_Integer at = items_place(c, 0);
  if (c->own) {
    lua_getiuservalue(L, ch, CHANNEL_RING + (int)at);
    lua_pushnil(L);
    lua_setiuservalue(L, ch, CHANNEL_RING + (int)at);
  } else {
    lua_getiuservalue(L, ch, CHANNEL_ITEMS);
    lua_rawgeti(L, -1, at + 1); /* items item */
    lua_pushnil(L);
    lua_rawseti(L, -3, at + 1);
  }
  c->head++;
  c->count--;
}
static inline void items_put_last(lua_State *L, int ch, struct channel *c) {
  lua_Integer at = items_place(c, c->count);
  if (c->own) {
    lua_setiuservalue(L, ch, CHANNEL_RING + (int)at);
    c->count++;
  } else {
    lua_getiuservalue(L, ch, CHANNEL_ITEMS);
    lua_pushvalue(L, -2); /* item items item */
    lua_rawseti(L, -2, at + 1);
    if (++c->count > c->peak) c->peak = c->count;
  }
}

#pragma GCC visibility pop
#endif
