/*
** token.h - the token: what cancel.c and source.c have in common.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_token_h
#define coflow_token_h

#include "core.h"

struct registration;
struct token {
  uint32_t tag;
  bool canceled, disposed, never;
  bool told; /* what those linked to it know: it is armed. Once canceled, it stays as it was */
  int count, limit; /* registrations in the list; when to sweep it */
  int arms;         /* armed deadlines: its own, and each token above that is armed */
  unsigned swept;   /* rt->unregistered when none of the list was dead */
  struct registration *last;
  struct link links;      /* those among them that are links; head of a circular list */
  struct link pendings;   /* head of a circular list */
  struct scope *scope;    /* whose token it is, or NULL */
  struct token *rearming; /* the next one of those that have just been armed, or disarmed */
};
enum {
  TOKEN_LIST = 1,
  TOKEN_REASON,
  TOKEN_CAUSE,
  TOKEN_UP,
  TOKEN_LINKS,
  TOKEN_PROMISE,
  TOKEN_INERT,
  TOKEN_EXPIRY
};

/* ---- cancel.c ---- */

struct token *token_check(lua_State *L, int i);
/* [-0, +0, -] one armed deadline more, or less */
void token_count_arm(lua_State *L, struct token *k, int n);
/* [-0, +0, -] takes the dead out of its list, on top */
void token_sweep(lua_State *L, struct token *token);
void token_drop_registrations(lua_State *L, int k); /* [-0, +0, -] all those of the token at k */
void token_drop_pendings(struct token *k);          /* it interrupts nothing that waits now */
/* [-0, +0, -] as token_mark, and its scope */
void token_mark_all(lua_State *L, int k, int reason, int cause, int run);
int token_run_callbacks(lua_State *L); /* run_callbacks(list of marked tokens) */

/* ---- source.c ---- */

void token_disarm(lua_State *L, int k); /* [-0, +0, -] the token at k has no deadline any more */

#endif
