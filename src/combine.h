/*
** combine.h - the combinator: what combine.c and direct.c have in common.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_combine_h
#define coflow_combine_h

#include "core.h"

struct combine {
  struct task task;
  uint32_t count, left; /* inputs; not yet complete (of a failed when_all, finally: its errors) */
  uint32_t first;       /* of when_any: the index of the winner */
  uint32_t done, taken; /* of when_each: how far the order of completion is known, and handed out */
  bool list;            /* the result carries n */
  bool failed, canceled; /* of when_all: an input was */
  bool direct, large;    /* of await_all and await_any; its size */
  bool fired, pairs;     /* of these: enough inputs are complete; a key lies below each input */
  bool later;            /* somebody else awaits one of the inputs */
  uint8_t mark;          /* that its inputs bear: task.mark */
  uint32_t kept, mine;   /* how many tasks keep it, and how many of these it waits for now */
  struct wait waits[];
};
#define WAIT_FAILED (UINT32_MAX - 1) /* pos, of an input that is complete but did not succeed */

/* ---- combine.c ---- */

/* [-0, +1, -] the first value of t, which has succeeded */
void combine_push_first(lua_State *L, int i, const struct task *t);
/* [-0, +1, m] the Aggregate of the errors of a combinator's inputs; how many, and which comes first */
uint32_t combine_push_aggregate(lua_State *L, const struct combine *c, int inputs, uint32_t *first);
int combine_await_all(lua_State *L); /* by way of when_all, whatever the arguments are */
int combine_await_any(lua_State *L);

/* ---- direct.c ---- */

/* where the stack of an await_all or await_any holds input k */
static inline int direct_place(const struct combine *c, uint32_t k) {
  return (int)(c->pairs ? 4 + 2 * k : 3 + k);
}
/* [-0, +1, m] a list of the inputs of the await_all or await_any that f waits in; false: [-0, +0], in none */
bool direct_push_inputs(lua_State *L, struct fiber *f);
/* [-0, +0, -] enough inputs of the one at i are complete */
void direct_fire(lua_State *L, struct runtime *rt, int i, struct combine *c);

#endif
