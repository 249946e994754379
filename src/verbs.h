/*
** verbs.h - what each file of the kernel does for the others, in the order that data flows.
**
** The rules that all of this keeps, and the structs, are in core.h, which includes this file. Notes in
** brackets are those of Lua's manual: [-values popped, +values pushed, what it may raise]: nothing (-),
** only for want of memory (m), also for wrong arguments (v), anything (e).
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_verbs_h
#define coflow_verbs_h

#include "core.h"

#pragma GCC visibility push(hidden)

/* ---- module.c: objects ---- */

static inline struct runtime *runtime(lua_State *L) {
  return (struct runtime *)lua_touserdata(L, UP_RUNTIME);
}

/* the userdata at i if it is such an object, or NULL; TAG_TASK stands for every kind of task */
static inline void *object_test(lua_State *L, int i, uint32_t tag) {
  uint32_t *o = (uint32_t *)lua_touserdata(L, i);
  if (o == NULL || lua_rawlen(L, i) < sizeof *o) return NULL; /* a light one has no length */
  return (*o & (tag == TAG_TASK ? 0xFFFFFF00 : 0xFFFFFFFF)) == tag ? (void *)o : NULL;
}
void *blame_object(lua_State *L, int i, uint32_t tag); /* [-0, +0, v] raises the type error */
static inline void *object_check(lua_State *L, int i, uint32_t tag) { /* [-0, +0, v] */
  void *o = object_test(L, i, tag);
  return o ? o : blame_object(L, i, tag);
}
void *object_new(lua_State *L, uint32_t tag, size_t size, int uservalues); /* [-0, +1, m] */
void module_push_function(lua_State *L, lua_CFunction f);                  /* [-0, +1, m] */
/* [-0, +0, -] memory by Lua's allocator that is no object: collects nothing; NULL: there is none, or to
** == 0 */
void *module_resize(lua_State *L, void *block, size_t from, size_t to);
/* whether that is the source (lua_Debug) of a Lua file of the library, which a user wants not to see */
static inline bool module_is_ours(const struct runtime *rt, const char *source) {
  return rt->library_length > 0 && strncmp(source, rt->library, rt->library_length) == 0;
}
/* [-0, +1, e] the Lua module coflow.<name> */
void module_push(lua_State *L, const char *name);
/* [-0, +1, m] that of the object at i, made if it is not there */
void module_push_table(lua_State *L, int i, int uservalue);
/* [-0, +0, m] */
void module_class(lua_State *L, uint32_t tag, const char *name, const luaL_Reg *methods,
                  const luaL_Reg *properties);
/* [-0, +0, m] more of them */
void module_methods(lua_State *L, uint32_t tag, const luaL_Reg *methods);
/* [-0, +0, m] the class once more, with a finalizer */
void module_finalized(lua_State *L, uint32_t tag, uint32_t twin, lua_CFunction gc);
/* [-0, +0, m] into the table on top; NULL stands for what is put there by other means */
void module_functions(lua_State *L, const luaL_Reg *functions);
/* What is opened when one of its names is first asked for, for what a script does not use is to cost it
** no time to start, and no memory. */
struct part {
  const luaL_Reg *functions;
  void (*open)(
      lua_State *L); /* [-0, +0, m] makes what they need, with the module on top; or NULL */
  const char *table; /* the functions are fields of that one of the module, or NULL */
};
double module_seconds(lua_State *L, int i);   /* [-0, +0, v] >= 0, no NaN */
bool module_is_callable(lua_State *L, int i); /* [-0, +0, -] a function, or it has __call */
/* [-0, +0, v] it is argument n of a public function in Lua (blame_type) */
void module_check_function(lua_State *L, int n, int i);
void module_check_options(lua_State *L, int i, const char *const names[]); /* [-0, +0, v] */
/* Several values as one: { value, …, n = their number }, since any of them may be nil. */
void values_pack(lua_State *L, int n);         /* [-n, +1, m] */
int values_unpack(lua_State *L);               /* [-1, +n, e] of the table on top; their number */
lua_Integer values_count(lua_State *L, int i); /* … of a list without n: its length */
/* [-0, +0, m] the list at i, of so many values, gets an n if its length might not tell: a nil is among them */
void values_mark(lua_State *L, int i, lua_Integer n);
/* [-1, +0, m] stores the value on top in a free slot */
int slots_add(lua_State *L, int i, int *free);
void slots_free(lua_State *L, int i, int *free, int slot); /* [-0, +0, -] */

/* ---- blame.c: wrong arguments: what the error says, and of whom ---- */

/* [-0, +1, m] that of the function of C on top: "string.rep" */
void blame_push_name(lua_State *L);
/* ar: the innermost line from that level of `at` on that is not the library's; false: there is none */
bool blame_find_line(lua_State *L, lua_State *at, int level, lua_Debug *ar);
/* [-0, +1, m] "file:line" of it, on the stack of L */
void blame_push_place(lua_State *L, int level);
/* for a public function in Lua, which calls us: its argument */
int blame(lua_State *L, int n, const char *message);
int blame_type(lua_State *L, int n, const char *expected, int i);
/* … its object, which should be one of the class whose metatable is at `class` */
int blame_self(lua_State *L, int class, int i);

/* [-0, +0, v] the argument at i of the running function, as luaL_argerror and luaL_typeerror */
int blame_argument(lua_State *L, int i, const char *message);
int blame_argument_type(lua_State *L, int i, const char *expected);
lua_Integer blame_integer(lua_State *L, int i); /* … which is none */
int blame_option(lua_State *L, int i, const char *given);

static inline lua_Number argument_number(lua_State *L, int i) {
  int is;
  lua_Number n = lua_tonumberx(L, i, &is);
  if (!is) blame_argument_type(L, i, "number");
  return n;
}
static inline lua_Integer argument_integer(lua_State *L, int i) {
  int is;
  lua_Integer n = lua_tointegerx(L, i, &is);
  return is ? n : blame_integer(L, i);
}
static inline const char *argument_string(lua_State *L, int i, size_t *length) {
  const char *s = lua_tolstring(L, i, length);
  if (s == NULL) blame_argument_type(L, i, "string");
  return s;
}
static inline void argument_callable(lua_State *L, int i) { /* [-0, +0, v] */
  if (!lua_isfunction(L, i) && !module_is_callable(L, i)) blame_argument_type(L, i, "function");
}
static inline void argument_type(lua_State *L, int i, int type) {
  if (lua_type(L, i) != type) blame_argument_type(L, i, lua_typename(L, type));
}
static inline void argument_any(lua_State *L, int i) {
  if (lua_isnone(L, i)) blame_argument(L, i, "value expected");
}
static inline int argument_option(lua_State *L, int i, const char *def, const char *const list[]) {
  const char *s = def && lua_isnoneornil(L, i) ? def : argument_string(L, i, NULL);
  for (int k = 0; list[k] != NULL; k++)
    if (strcmp(list[k], s) == 0) return k;
  return blame_option(L, i, s);
}

/* Lua's own would blame somebody else. */
#undef luaL_checkstring
#undef luaL_optstring
#define luaL_argerror blame_argument
#define luaL_typeerror blame_argument_type
#define luaL_checknumber argument_number
#define luaL_checkinteger argument_integer
#define luaL_checklstring argument_string
#define luaL_checkstring(L, i) argument_string(L, i, NULL)
#define luaL_checktype argument_type
#define luaL_checkany argument_any
#define luaL_checkoption argument_option
#define luaL_optinteger(L, i, def) luaL_opt(L, argument_integer, i, def)
#define luaL_optstring(L, i, def) luaL_opt(L, luaL_checkstring, i, def)

/* ---- error.c: error objects, failures that nobody observed ---- */

void error_push(lua_State *L, enum error_kind kind, const char *format, ...); /* [-0, +1, m] */
int error_throw(lua_State *L, enum error_kind kind, const char *format, ...);
double error_seconds(double seconds); /* as a message tells it: rounded to six digits */
bool error_is(lua_State *L, int i, enum error_kind kind);
/* [-0, +1, m] the error at i as a person is shown it, whatever it is */
void error_push_text(lua_State *L, int i);
/* [-0, +0, -] the task at i has failed, with the error of the one at `from`, or 0: keeps the record of
** that, and reports the task if nobody looks */
void error_attach(lua_State *L, int i, int from);
/* [-0, +1, -] the trace record of the failed task at i, or nil */
void error_push_record(lua_State *L, int i);
/* [-1, +0, m] the error on top, as if the running task had failed with it, but that goes on: a
** task that has failed stands for it */
void error_report_caught(lua_State *L);
void error_report(lua_State *L, int error, int task); /* [-0, +0, -] to the handler; task 0: nil */
ONCE void error_open(lua_State *L);

/* ---- trace.c: async tracebacks ---- */

int trace_handler(lua_State *L); /* the message handler of fibers */
int trace_leaving(lua_State *L); /* … in coroutines made by wrap */
/* [-0, +1, -] the record of the error on top, which has left the coroutine (with a body of ours);
** nil outside tasks */
void trace_push_left(lua_State *L, lua_State *co, bool body);
void trace_keep_left(lua_State *L, int i); /* [-0, +0, m] that one goes on as the error on top */
/* [-0, +0, m] the error at i, which the running task has seen, goes on as that on top */
void trace_go_on(lua_State *L, int i);
/* [-0, +0, -] the running task is about to raise the error of the failed one at i */
void trace_remember(lua_State *L, int i);
/* [-0, +1, -] the record that t has of the error at i, or nil */
void trace_push_seen(lua_State *L, const struct task *t, int i);
void trace_clear(lua_State *L, const struct task *t);
/* [-0, +0, -] of t, which gives its slot away */
static inline void trace_forget(lua_State *L, const struct task *t) {
  if (t->flags & TASK_TRACED) trace_clear(L, t);
}
void trace_push(lua_State *L, int i); /* [-0, +1, m] the async traceback of the task at i */
ONCE void trace_open(lua_State *L);

/* ---- task.c: what all tasks share: anchors, waits, outcomes ---- */

static inline struct wait *task_waiters(const struct task *t) {
  return t->waiters != NULL && t->waiters->on == t ? t->waiters : NULL;
}
static inline bool task_done(const struct task *t) { return t->state >= TASK_SUCCEEDED; }
static inline int task_kind(const struct task *t) { return (int)(t->tag & 0xff); }
static inline bool task_is(const struct task *t, int kind) { return task_kind(t) == kind; }
struct task *task_check(lua_State *L, int i);
/* [-0, +0, v] the state of a loop over when_each is a task, but none to wait for */
static inline void task_refuse_state(lua_State *L, int i, const struct task *t) {
  if (task_is(t, KIND_EACH))
    luaL_argerror(L, i, "the state of a when_each iteration is nobody's task");
}
/* [-0, +0, e] replaces what is at i by its task; NULL if none */
struct task *task_awaitable(lua_State *L, int i);
/* [-0, +1, m] mortal: it may die before it lands */
struct task *task_new(lua_State *L, int kind, size_t size, int uservalues, bool mortal);
static inline struct task *task_new_promise(lua_State *L) { /* [-0, +1, m] to be settled by hand */
  return task_new(L, KIND_PROMISE, sizeof(struct task), TASK_WAITERS, false);
}
/* [-0, +1, m] … which has that name */
static inline struct task *task_new_named(lua_State *L, const char *name) {
  struct task *t = task_new_promise(L);
  lua_pushstring(L, name);
  lua_setfield(L, -2, "name");
  return t;
}
void task_hold(lua_State *L, int i, struct task *t); /* [-0, +0, -] the anchor holds it */
void task_release(lua_State *L, struct task *t); /* [-0, +0, -] the anchor knows its address only */
void task_forget(lua_State *L, struct task *t);  /* [-0, +0, -] gives its slot back */
void task_push(lua_State *L, struct task *t);    /* [-0, +1, -] a task that is held, or parked */
/* [-0, +1, -] the same; false, and [-0, +0]: somebody is closing its coroutine, and nobody else has it */
bool task_push_whole(lua_State *L, struct task *t);
/* [-0, +1, -] what has that address, and may die; false, and nil: it has */
bool task_push_weak(lua_State *L, const void *p);
/* [-0, +0, m] the operation at i may die while it is parked */
void task_weaken(lua_State *L, int i);
/* [-0, +0, -] the address p means nothing now */
void task_forget_weak(lua_State *L, const void *p);
/* [-1, +0, -] the waiter on top is the only one of the pending task t at `on`, an absolute index */
static inline void wait_first(lua_State *L, int on, struct task *t, struct wait *w, uint32_t role) {
  lua_setiuservalue(L, on, TASK_WAITERS);
  w->next = w->prev = t->waiters = w;
  w->on = t;
  w->pos = 0;
  w->role = role;
}
/* [-0, +0, m] false: it is complete; `on` is absolute */
bool wait_add(lua_State *L, int on, struct wait *w, int owner, uint32_t role);
/* [-0, +0, -] from the task at on, or nil */
void wait_remove(lua_State *L, int on, struct wait *w);
void wait_owner(lua_State *L, int on, const struct wait *w); /* [-0, +1, -] */
/* [-0, +0, -] wakes all that wait for the task at on */
void wait_notify(lua_State *L, struct runtime *rt, int on, struct task *t);
void task_settle(lua_State *L, struct runtime *rt, int i, int results); /* [-n, +0, m] succeeded */
/* [-n, +0, m] … of a t that is known */
void task_succeed(lua_State *L, struct runtime *rt, int i, struct task *t, int results);
/* [-1, +0, -] canceled or faulted, as the error says */
void task_settle_error(lua_State *L, struct runtime *rt, int i, int from);
void task_settle_canceled(lua_State *L, struct runtime *rt, int i); /* [-1, +0, -] */
/* [-0, +0, -] the outcome of the one at `from` */
void task_settle_like(lua_State *L, struct runtime *rt, int i, int from);
/* [-1, +0, -] `from`: the input it comes from, or 0 */
void task_settle_faulted(lua_State *L, struct runtime *rt, int i, int from);
/* [-0, +n, e] the values, or raises the error */
int task_push_outcome(lua_State *L, int i, struct task *t);
void task_push_error(lua_State *L, int i); /* [-0, +1, -] what await raises; counts as observing */
void task_push_name(lua_State *L, int i);  /* [-0, +1, m] */
lua_Integer task_id(lua_State *L, int i);  /* [-0, +0, m] */
ONCE void task_open(lua_State *L);

/* ---- fiber.c: tasks with a body: their coroutines, start, run ---- */

enum { FIBER_MAX_DEPTH = 16 }; /* how deep fibers run on top of each other on the C stack */
enum { FIBER_WATCHED = 1 };    /* user value of the watch: its coroutine */

/* [-(n+1), +1, m] held, in state created, in s */
struct fiber *fiber_new(lua_State *L, struct runtime *rt, int arguments, struct scope *s);
void fiber_reserve(lua_State *L, struct runtime *rt); /* [-0, +0, m] the next fit cannot fail */
/* [-(n+2), +1, m] the same, of the blank one on top */
struct fiber *fiber_fit(lua_State *L, struct runtime *rt, int arguments, struct scope *s);
struct fiber *fiber_blank(lua_State *L); /* [-0, +1, m] */
/* [-0, +0, -] makes the one at i blank, if it ended well and nobody has it */
bool fiber_reuse(lua_State *L, int i);
void fiber_run(lua_State *L, struct runtime *rt, struct fiber *f); /* [-0, +0, m] until it stops */
/* [-0, +0, m] … the one that lies at i, an absolute index */
void fiber_run_at(lua_State *L, struct runtime *rt, struct fiber *f, int i);
/* [-0, +0, m] … one that lies on its coroutine only */
void fiber_start(lua_State *L, struct runtime *rt, struct fiber *f);
/* the one at i, at once, up to its first suspension; k ends the caller */
int fiber_run_hot(lua_State *L, int i, struct fiber *f, lua_KFunction k);
/* [-1, +0, -] the fiber on top becomes ready */
void fiber_wake(lua_State *L, struct runtime *rt, struct fiber *f);
/* [-1, +0, m] stops it where it stands, with the error on top */
void fiber_fail(lua_State *L, struct runtime *rt, struct fiber *f);
void fiber_land(lua_State *L, int i); /* [-0, +0, m] the one at i is called off before it starts */
/* [-1, +0, -] the fiber at i never starts: canceled with that error */
void fiber_discard(lua_State *L, struct runtime *rt, int i);
/* [-0, +0, -] of one that did not end well */
void fiber_drop_coroutine(lua_State *L, struct runtime *rt, struct fiber *f);
void fiber_trim(lua_State *L); /* [-0, +0, -] drops coroutines long unused */
/* [-0, +0, -] the new one at i may be dropped */
void fiber_make_cold(lua_State *L, int i, struct fiber *f);
/* [-0, +0, -] the fiber at i holds its coroutine */
void fiber_hold(lua_State *L, int i, struct fiber *f);
/* [-0, +1, -] the one whose coroutine that is, or nil */
void fiber_push(lua_State *L, lua_State *co);
/* [-0, +1, -] what is at i on the stack of the function in which it is suspended, or nil */
void fiber_push_awaiting(lua_State *L, struct fiber *f, int i);
/* [-0, +1, -] the task it waits for, or nil */
bool fiber_push_awaited(lua_State *L, struct fiber *f);
/* [-0, +1, m] "file:line" where it is suspended; false: that is no line of a user's */
bool fiber_push_place(lua_State *L, struct fiber *f);
/* [-1, +0, -] f, not started, is named after the function on top */
void fiber_name(lua_State *L, struct fiber *f);
void fiber_label(lua_State *L, int i); /* [-0, +0, m] finds the label of the fiber at i */
ONCE void fiber_open(lua_State *L);

/* ---- fiber_await.c: where a task may suspend, and how it waits ---- */

int scope_throw(lua_State *L, struct scope *s); /* raises the OperationCanceled of s */

/* L belongs to the running task: its own coroutine, or the innermost one of ours that it is in */
static inline bool fiber_on_top(lua_State *L, struct runtime *rt) {
  const struct level *l = rt->level;
  const struct fiber *me = (struct fiber *)rt->me;
  return (me->co == L && rt->entering != me) || (l != NULL && l->co == L && l->task == rt->me);
}
bool fiber_can_suspend(lua_State *L, struct runtime *rt);
struct fiber *fiber_not_here(lua_State *L, struct runtime *rt); /* NULL outside, or raises why */
/* who would suspend at this point; NULL outside every task; raises where nobody can */
static inline struct fiber *fiber_here(lua_State *L, struct runtime *rt) {
  struct fiber *f = (struct fiber *)rt->me;
  return f->co == L && lua_isyieldable(L) ? f : fiber_not_here(L, rt);
}
int fiber_outside(lua_State *L, lua_CFunction f); /* runs the operation f as a root task */
/* A suspended coroutine is anybody's, who may even close it: from the first suspension on the slot
** holds the task, and the task the coroutine; until then it was the other way round. */
/* [-0, +1, -] f, which holds its coroutine from now on */
void fiber_push_unheld(lua_State *L, struct runtime *rt, struct fiber *f);
/* [-0, +1, -] the running task, which is to park; returns whether its slot holds it, for fiber_park */
static inline bool fiber_push_me(lua_State *L, struct runtime *rt, struct fiber *f) {
  if (f->task.flags & TASK_HELD) {
    if (lua_rawgeti(L, UP_ANCHORS, f->task.slot) == LUA_TUSERDATA) return true;
    lua_pop(L, 1);
  }
  fiber_push_unheld(L, rt, f);
  return false;
}
/* [-0, +0, -] it parks: its slot is to hold it, or to know its address only */
static inline void fiber_park(lua_State *L, struct fiber *f, bool hold, bool held) {
  if (!hold) {
    lua_pushlightuserdata(L, f);
    lua_rawseti(L, UP_ANCHORS, f->task.slot);
  } else if (!held) {
    task_push(L, &f->task);
    lua_pop(L, 1);
  }
}
static inline int fiber_suspend(lua_State *L, struct runtime *rt, struct fiber *f, lua_KContext ctx,
                                lua_KFunction k) {
  f->task.flags |= TASK_PARKED;
  if (!(f->task.flags & TASK_HELD)) {
    fiber_push_unheld(L, rt, f);
    lua_rawseti(L, UP_ANCHORS, f->task.slot);
  }
  return lua_yieldk(L, 0, ctx, k);
}
/* [-0, +0, e] in a continuation: raises when it was its scope that has resumed the running task */
static inline void fiber_resumed(lua_State *L, struct runtime *rt) {
  struct fiber *f = (struct fiber *)rt->me;
  if (!(f->task.flags & TASK_INTERRUPTED) || !fiber_on_top(L, rt)) return;
  f->task.flags &= (uint16_t)~TASK_INTERRUPTED;
  scope_throw(L, f->member.scope);
}
/* [-0, +0, e] in the continuation of fiber_await: `on` is complete. False: it was not us who has resumed the
** task, which is to yield again. */
static inline bool fiber_awaited(lua_State *L, const struct task *on, int status) {
  if (status == LUA_OK) return true; /* without a suspension */
  struct runtime *rt = runtime(L);
  fiber_resumed(L, rt);
  return task_done(on) && fiber_on_top(L, rt);
}
/* waits for the pending task `on` at index 1, perhaps deaf to cancellation; k gets its address as context */
int fiber_await(lua_State *L, struct runtime *rt, struct fiber *f, struct task *on, lua_KFunction k,
                bool deaf);
int fiber_await_value(lua_State *L); /* await(x) for the x at index 1 */
ONCE void fiber_await_open(lua_State *L);

/* ---- fiber_abandon.c: collected while it waits, or its coroutine closed by somebody ---- */

/* [-0, +0, -] the pump will close the parked one at i */
void fiber_abandon(lua_State *L, int i, struct fiber *f);
/* [-0, +0, -] an abandoned one */
void fiber_end_abandoned(lua_State *L, struct runtime *rt, struct fiber *f);
static inline bool fiber_is_lost(const struct task *t) {
  return t->slot == 0 && task_is(t, KIND_FIBER) && !task_done(t);
}
void fiber_settle_lost(lua_State *L, int i); /* [-0, +0, m] the one at i fails */
ONCE void fiber_abandon_open(lua_State *L);

/* ---- combine.c: tasks made of other tasks ---- */

/* [-0, +0, -] the input at `on` is complete */
void combine_fire(lua_State *L, struct runtime *rt, int i, struct wait *w, int on,
                  const struct task *t);

void combine_land(lua_State *L, int i);
/* [-0, +0, m] by hand, with the token on top; false: it is complete, or about to be */
bool combine_cancel(lua_State *L, int i);
ONCE void combine_open(lua_State *L);

/* ---- direct.c: await_all and await_any without a task of their own ---- */

void direct_forget(lua_State *L, int i); /* [-0, +0, -] the input at i keeps no combinator */
ONCE void direct_open(lua_State *L);

/* ---- context.c: async locals and execution contexts ---- */

void context_push_flowing(lua_State *L, struct task *t); /* [-0, +1, -] what a child gets, or nil */
void context_push_current(lua_State *L); /* [-0, +1, -] of the running task, or nil */
void context_give(lua_State *L, int i, struct task *t); /* [-1, +0, -] the context on top to t */
/* [-0, +0, -] the new task t at i, negative, gets what flows from me, which has a context */
void context_inherit(lua_State *L, int i, struct task *t, struct task *me);
void context_drop(lua_State *L, int i, struct task *t); /* [-0, +0, -] t, at i, is complete */
/* [-1, +1, -] the running task gets that on top; leaves the old one */
void context_swap(lua_State *L);

void context_show(lua_State *L, struct runtime *rt, struct task *t);
/* [-0, +0, -] the context of t has become the current one: tells the handlers, if there are any */
static inline void context_switched(lua_State *L, struct runtime *rt, struct task *t) {
  if (rt->shown_watched || t->flags & TASK_WATCHED) context_show(L, rt, t);
}
/* [-0, +1, -] its value there, or nil: of the local at i */
void context_push_local(lua_State *L, int i);
/* [-0, +0, m] the local at l to the value at v */
void context_set_local(lua_State *L, int l, int v);
bool context_watches(lua_State *L, int l); /* the local at l has a handler, which may raise */
void context_check(lua_State *L, int i);   /* [-0, +0, e] there is a context */
ONCE void context_open(lua_State *L);

/* ---- guard.c: scopes of the context ---- */

void guard_drop_all(struct guard **home); /* [-0, +0, -] of an owner whose end has come */
/* [-(n+1), +1 if it fails, -] calls a function of the user with n arguments as a callback, within the
** running task's code; handler: index of a message handler, or 0 */
int guard_call(lua_State *L, struct runtime *rt, int arguments, int handler);
/* [-0, +1, m] where one was opened in the coroutine co, which shares our context, that is open yet;
** false: [-0, +0] */
bool guard_push_left_open(lua_State *L, struct runtime *rt, const lua_State *co);
void guard_refuse_yield(lua_State *L); /* [-0, +0, e] out of a guard opened in the coroutine L */
ONCE void guard_open(lua_State *L);

/* ---- coroutine.c: the coroutine library, with awaits that pass through ---- */

/* runs its `<close>` variables */
static inline int coroutine_reset(lua_State *co, lua_State *from) {
#if LUA_VERSION_RELEASE_NUM >= 50406
  return lua_closethread(co, from);
#else
  (void)from;
  return lua_resetthread(co);
#endif
}
/* the one that it resumes, even if suspended, or NULL; body: its outermost function is ours */
lua_State *coroutine_inner(lua_State *co, bool *body);
/* the innermost one with a context of its own that the running task is in, or NULL */
const struct level *coroutine_own(const struct runtime *rt);
struct guard **coroutine_guards(struct coroutine *record);       /* its stack of open guards */
void coroutine_push_record(lua_State *L, const struct level *l); /* [-0, +1, -] */
/* L is one of ours in its resumer's context */
bool coroutine_shares(lua_State *L, struct runtime *rt);
/* [-0, +0, -] all those in the suspended `co` */
void coroutine_close_inner(lua_State *L, struct runtime *rt, lua_State *co);
/* the outermost function of L, which runs, is ours */
bool coroutine_has_body(lua_State *L, struct runtime *rt);
/* [-0, +0, e] to yield: out of that scope */
void coroutine_refuse(lua_State *L, const char *place);
extern const struct part coroutine_part;

/* ---- cancel.c: tokens, registrations ---- */

struct token;
struct token *token_opt(lua_State *L, int i); /* the token at i; NULL for nil, nothing and `none` */
bool token_canceled(const struct token *k);
bool token_none(lua_State *L, int i);    /* at i is `none`, which opts out of the scope as well */
bool token_armed(const struct token *k); /* a deadline on it or above it will cancel it */
bool token_armed_itself(const struct token *k);      /* … other than one of its scope */
struct token *token_new(lua_State *L, bool ambient); /* [-0, +1, m] of a scope, or of a source */
void token_attach(struct token *k, struct scope *s); /* it is that of the scope */
void token_push_canceled(lua_State *L, int reason);  /* [-0, +1, m] a new one */
void token_link(struct token *k, struct link *l);    /* l will be interrupted, while it is alive */
/* [-0, +1, m] the OperationCanceled of the token at i */
void token_push_error(lua_State *L, int i);
/* [-0, +0, -] canceled; its callbacks are put on the list at run */
void token_mark(lua_State *L, int k, int reason, int cause, int run);
void token_run(lua_State *L, bool first); /* [-1, +0, e] the callbacks of the list on top */
void token_run_reported(lua_State *L);    /* [-1, +0, -] the same; what they raise is reported */
void token_detach(struct token *k);       /* its scope is gone, and can cancel it no more */
/* [-0, +0, -] canceled at birth, as the one at `from` is */
void token_inherit(lua_State *L, int k, int from);
void token_rearmed(lua_State *L, struct token *k); /* [-0, +0, -] it is armed now, or is not */
/* [-0, +0, m] it is canceled with the one at `up` */
void token_follow(lua_State *L, int k, int up);
void token_unfollow(lua_State *L, int k); /* [-0, +0, -] … no longer */
ONCE void cancel_open(lua_State *L);

/* ---- source.c: the right to cancel; the deadline of a token ---- */

/* [-0, +0, m] the expiry at i is due: its token is canceled */
void expiry_fire(lua_State *L, struct runtime *rt, int i);
void expiry_land(lua_State *L, int i); /* [-0, +0, -] the callbacks of that token */
void expiry_drop(lua_State *L, int i); /* [-0, +0, -] it will not come, for a token that lives on */
ONCE void source_open(lua_State *L);

/* ---- scope.c: the tree of ambient cancellation ---- */

/* [-0, +0, m] that of the task itself */
struct scope *scope_own(lua_State *L, struct runtime *rt, struct fiber *f);
/* [-0, +0, m] the one of the running task that what it waits for becomes a member of */
static inline struct scope *scope_ambient(lua_State *L, struct runtime *rt) {
  struct fiber *me = (struct fiber *)rt->me;
  struct scope *s = me->member.scope;
  return s->owner == me ? s : (scope_own(L, rt, me), me->member.scope);
}
/* [-0, +0, m] … that what it starts becomes a member of */
static inline struct scope *scope_flowing(lua_State *L, struct runtime *rt) {
  return rt->me->flags & TASK_SUPPRESSED ? rt->root : scope_ambient(L, rt);
}
static inline void scope_join(struct scope *s, struct member *m) {
  m->scope = s;
  link_append(&s->members, &m->link);
}
void scope_left(lua_State *L, struct runtime *rt, struct scope *s);
/* [-0, +0, -] one less holds it (refs) */
void scope_let_go(lua_State *L, struct runtime *rt, struct scope *s);
/* [-0, +0, -] a member leaves; its scope may end with it */
static inline void scope_leave(lua_State *L, struct runtime *rt, struct member *m) {
  struct scope *s = m->scope;
  if (s == NULL) return;
  link_drop(&m->link);
  m->scope = NULL;
  if (s->owner == NULL) scope_left(L, rt, s);
}
void scope_end_owner(lua_State *L, struct runtime *rt, struct fiber *f, struct scope *s);
/* [-0, +0, -] the task is complete, or was never started */
static inline void scope_end_task(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct scope *s = f->member.scope;
  link_drop(&f->member.link);
  f->member.scope = rt->root; /* for finalizers that run on it from now on */
  if (s->owner == f || s->owner == NULL) scope_end_owner(L, rt, f, s);
}
/* [-0, +1, m] where a scope was opened in the coroutine co that is open yet; false: [-0, +0] there is none */
bool scope_push_left_open(lua_State *L, struct runtime *rt, lua_State *co);
void scope_refuse_yield(lua_State *L); /* [-0, +0, e] out of a scope opened in the coroutine L */
/* [-1, +1, m] the error on top has left the coroutine, and with it the scopes opened there */
void scope_unwind(lua_State *L, struct runtime *rt, lua_State *co);
/* [-0, +0, -] f, not started, becomes a member of s */
void scope_adopt(lua_State *L, struct runtime *rt, struct fiber *f, struct scope *s);
/* [-0, +0, m] its deadline has passed */
void scope_expire(lua_State *L, struct runtime *rt, struct scope *s);
void scope_land(lua_State *L, int i);            /* [-0, +0, -] callbacks of the expired one at i */
void scope_rearm(lua_State *L, struct scope *s); /* [-0, +0, -] what arms it has come or gone */
/* a cancellation that leaves the running t now becomes a Timeout on its way: of a block of its own */
bool scope_times_out(const struct task *t);
void scope_push_error(lua_State *L, struct scope *s); /* [-0, +1, m] */
/* [-0, +0, e] false: it was canceled before */
bool scope_cancel(lua_State *L, struct scope *s, int reason);
/* [-0, +0, -] as token_mark */
void scope_mark(lua_State *L, struct runtime *rt, struct scope *s, int reason, int cause, int run);
/* [-0, +1, e] opened by the running task for `what` */
struct scope *scope_block(lua_State *L, const char *what, enum scope_kind kind, size_t size,
                          double seconds);
/* [-0, +0, -] its block has been left */
void scope_finish(lua_State *L, struct runtime *rt, struct scope *s);
/* [-0, +0, m] unless it has a deadline */
void scope_arm(lua_State *L, struct scope *s, double seconds);
void scope_push(lua_State *L, const struct scope *s); /* [-0, +1, -] */
void scope_push_token(lua_State *L, struct scope *s); /* [-0, +1, m] */
/* whose coroutine it is, or NULL */
struct fiber *scope_find(struct runtime *rt, const lua_State *co);
/* [-0, +2, m] the tasks with a body that have not ended; of each the one that has started it, or false. Their
** number. */
lua_Integer scope_push_tasks(lua_State *L, struct runtime *rt);

ONCE void scope_open(lua_State *L);

/* ---- group.c: task groups ---- */

struct group;
/* [-0, +0, m] before it settles; else its error is on top */
void group_child_ended(lua_State *L, struct runtime *rt, struct fiber *f, bool well);
struct group *group_leave(struct fiber *f); /* the group that the child is in no more */
/* [-0, +0, m] after that */
void group_child_lost(lua_State *L, struct runtime *rt, struct group *g);
bool group_canceled(const struct fiber *f); /* of a child; a detached task has none to ask */
/* [-0, +0, -] what f awaits is the end of the tasks of a group of its */
bool group_is_joined(lua_State *L, const struct fiber *f);
/* [-0, +0, m] … they are put into the list on top */
void group_list_children(lua_State *L, const struct fiber *f);
void group_discard(lua_State *L, int i); /* [-0, +0, m] the queued child at i never starts */
void group_end(struct scope *s);         /* [-0, +0, -] nothing can be started in it any more */
extern const struct part group_part;

/* ---- schedule.c: schedulers and synchronization contexts ---- */

void schedule_check(lua_State *L, int i); /* [-0, +0, v] it is a TaskScheduler */
/* [-0, +0, m] the task at i gets the scheduler at s; false: the default */
bool schedule_give(lua_State *L, int i, int s);
/* [-0, +0, m] the hot task at i goes on where its caller does */
void schedule_inherit(lua_State *L, struct runtime *rt, int i);
/* [-0, +0, m] it starts there unqueued */
void schedule_join(lua_State *L, struct runtime *rt, int i);
/* [-0, +0, e] queues the task at i, or fails it and raises */
void schedule_start(lua_State *L, struct runtime *rt, int i);
/* [-0, +0, -] a ready one with traits */
void schedule_run(lua_State *L, struct runtime *rt, struct fiber *f);
/* [-1, +0, -] the task on top is over: forgets its plan */
void schedule_end(lua_State *L, struct runtime *rt);
/* [-0, +1, -] f, which has a plan; false: [-0, +0] */
bool schedule_find(lua_State *L, const struct fiber *f);
/* [-(n+1), +1 if it fails, -] calls a function of the user under no task */
int schedule_call_outside(lua_State *L, struct runtime *rt, int arguments);
void schedule_push_context(lua_State *L, struct task *t); /* [-0, +1, -] its current one, or nil */
void schedule_set_context(lua_State *L, struct task *t);  /* [-1, +0, m] the one on top, or nil */
/* the operation f on the configured task at index 1 */
int schedule_await(lua_State *L, lua_CFunction f);

extern const struct part schedule_part;

/* ---- deadline.c: what waits for a time, in order ---- */

/* [-0, +0, -] makes room for one more; false: there is no memory */
bool deadline_has_room(lua_State *L, struct runtime *rt);
/* [-0, +0, v] raises why there is none */
void deadline_refuse(lua_State *L, const struct runtime *rt);
/* [-0, +0, m] … the index that it will get */
uint32_t deadline_reserve(lua_State *L, struct runtime *rt);
double deadline_add(struct runtime *rt, struct deadline *d, double seconds); /* when it is due */
void deadline_set(struct runtime *rt, struct deadline *d, double now, double due);
/* one that is set, as if set now */
void deadline_move(struct runtime *rt, struct deadline *d, double due);

void deadline_drop(struct runtime *rt, struct deadline *d);
/* not set any more, but it keeps its index */
void deadline_rest(struct runtime *rt, struct deadline *d);

bool deadline_rests(const struct runtime *rt, const struct deadline *d);
bool deadline_any(const struct runtime *rt);
lua_Integer deadline_count(const struct runtime *rt);
static inline bool deadline_is_set(const struct deadline *d) { /* or rests */
  return d->index != 0;
}
double deadline_due(const struct runtime *rt, const struct deadline *d);
/* of what is due by now, or NULL */
struct deadline *deadline_first(struct runtime *rt, double now);
/* when the first one is due, found by a look at some */
double deadline_next(const struct runtime *rt);
/* a time, not after that, at which to look: found at once */
double deadline_look(const struct runtime *rt);
/* the clock goes from … to …: all have the same time left */
void deadline_shift(struct runtime *rt, double from, double to);
bool deadline_trim(lua_State *L, struct runtime *rt); /* gives memory back if none is set */
ONCE void deadline_close(lua_State *L, struct runtime *rt);

/* ---- timer.c: delay, sleep, wait_async; interruption ---- */

/* [-0, +0, m] wakes the owners of what is due */
void timer_fire_due(lua_State *L, struct runtime *rt);
/* moves all deadlines: the clock changes */
void timer_shift(struct runtime *rt, double from, double to);
/* [-0, +0, m] the fiber sleeps until then, or until the token k (at index 2, or NULL) or its scope,
** unless deaf to it */
void timer_nap(lua_State *L, struct fiber *f, struct token *k, bool deaf, double now, double due);
void delay_land(lua_State *L, int i);
/* [-0, +0, -] what the operation at i awaited is complete */
void wait_op_fire(lua_State *L, struct runtime *rt, int i);

void wait_op_land(lua_State *L, int i);
/* [-0, +1, e] for task, timeout, token at 1, 2, 3: a task of true, or of false after the timeout;
** it observes nothing */
void timer_push_wait(lua_State *L);
/* await_with(task, token): … that ends with the token, too; `none` opts out of the ambient one */
int timer_await_with(lua_State *L);
int timer_wait_async(lua_State *L); /* wait_async(task, timeout, token) */
/* [-0, +0, -] the suspended f waits for nothing any more; gone: its coroutine is, and what it awaited
** was there */
void pending_withdraw(lua_State *L, struct runtime *rt, struct fiber *f, bool gone);
void pending_interrupt(lua_State *L, struct pending *p); /* [-0, +0, -] by its token or its scope */
/* [-0, +0, -] if parked: whether the anchors hold it */
void pending_hold(lua_State *L, struct pending *p, bool hold);
/* [-0, +0, m] the operation at i, by hand */
bool operation_cancel(lua_State *L, int i, int reason);
/* What all operations share. k: index of the token that it was given, or of nil. */
/* [-0, +1, m] one with no deadline (HUGE_VAL) is mortal: with one it is held until that passes */
struct timed *operation_new(lua_State *L, int kind, size_t size, int uservalues, double seconds);
struct scope *operation_scope(lua_State *L, int k); /* [-0, +0, m] that of a new one */
/* [-0, +0, m] in flight */
void operation_start(lua_State *L, int i, struct timed *op, int k, struct scope *s);
void operation_stop(lua_State *L, int i, struct timed *op); /* [-0, +0, -] about to be settled */
bool operation_canceled(const struct token *k, const struct scope *s); /* before it started */
/* [-0, +1, m] the error of that */
void operation_push_canceled(lua_State *L, struct token *token, int k, struct scope *s);

int operation_throw_canceled(lua_State *L, struct token *token, int k, struct scope *s);
/* [-0, +0, e] raises if the token at k, or the ambient one, is canceled: before what is there is looked at */
static inline void operation_check_tokens(lua_State *L, const struct runtime *rt, int k) {
  struct scope *s = ((const struct fiber *)rt->me)->member.scope;
  if (lua_gettop(L) < k) {
    if (s->canceled) scope_throw(L, s);
    return;
  }
  struct token *token = token_opt(L, k);
  if (operation_canceled(token, s) && !token_none(L, k)) operation_throw_canceled(L, token, k, s);
}
void operation_push_interruption(lua_State *L, int i); /* [-0, +1, m] of the one at i, in flight */
ONCE void timer_open(lua_State *L);

/* ---- periodic.c: Timer and PeriodicTimer ---- */

/* [-0, +0, m] a Timer is due */
void periodic_fire(lua_State *L, struct runtime *rt, struct deadline *d, double now);
void periodic_land(lua_State *L, struct runtime *rt, struct task *tick); /* [-0, +0, m] */
void periodic_wait_land(lua_State *L, int i);
/* [-0, +1, -] the Timer whose deadline has that index, if it will start a task; false: [-0, +0] */
bool periodic_push_armed(lua_State *L, struct runtime *rt, uint32_t index, double *due);
void periodic_disarm(lua_State *L, int i);   /* [-0, +0, -] the Timer at i */
bool periodic_is_open(const void *periodic); /* a PeriodicTimer that has not been disposed */
void periodic_close(lua_State *L, struct runtime *rt);
void periodic_trim(lua_State *L, struct runtime *rt); /* [-0, +0, m] */
extern const struct part periodic_part;

/* ---- loop.c: the ready list, the pump ---- */

uv_loop_t *loop_uv(struct runtime *rt); /* libuv's, made when it is first needed; NULL: refused */
uv_loop_t *loop_check_uv(lua_State *L); /* [-0, +0, e] … or raises */
static inline double loop_real_now(void) { return (double)uv_hrtime() / 1e9; }
double loop_now(struct runtime *rt);                          /* the same, or virtual */
static inline double loop_after(double now, double seconds) { /* later, however short that is */
  double due = now + seconds;
  return due > now || seconds <= 0 ? due : nextafter(now, HUGE_VAL);
}
void loop_check_outside(lua_State *L, const char *what); /* [-0, +0, e] */
int loop_settle(lua_State *L); /* runs what is ready, and waits for nothing */
static inline void loop_ready(struct runtime *rt, struct task *t) { /* at the end of the list */
  if (t->flags & TASK_LINKED) return;
  t->flags |= TASK_LINKED;
  t->next = NULL;
  if (rt->ready == NULL)
    rt->ready = t;
  else
    rt->ready_last->next = t;
  rt->ready_last = t;
}
/* the first one of the list */
static inline void loop_unready(struct runtime *rt, struct task *t) {
  rt->ready = t->next;
  t->next = NULL;
  t->flags &= (uint16_t)~TASK_LINKED;
}
static inline void loop_queue(struct runtime *rt, struct fiber *f) { /* … a fiber that is to run */
  f->task.state = TASK_QUEUED;
  loop_ready(rt, &f->task);
}
void loop_remove(struct runtime *rt, struct task *t); /* from anywhere on the list */
void loop_nudge(struct runtime *rt);                  /* something is due already */
static inline struct mark loop_mark(const struct runtime *rt) {
  return (struct mark){rt->ready != NULL ? rt->ready_last : NULL, rt->removals};
}
/* [-0, +0, -] at the end of this settling */
void loop_land(lua_State *L, struct runtime *rt, int i, struct task *t);
void loop_land_all(lua_State *L, struct runtime *rt); /* [-0, +0, -] what cannot, later */
/* the function at index 1 as a root task, with the arguments above it */
int loop_run(lua_State *L);
/* … which is one of ours: when it fails to end, it is withdrawn */
int loop_run_operation(lua_State *L);

ONCE void loop_init(struct runtime *rt);
ONCE void loop_open(lua_State *L);

/* ---- poll.c: what libuv has to tell, and how long to wait for it ---- */

void poll_events(struct runtime *rt); /* takes what has happened; waits for nothing */
/* nothing is ready: lets time pass. False when nothing can ever happen. */
bool poll_pass_time(struct runtime *rt);
bool poll_alive(struct runtime *rt); /* something may still happen that nobody here has to do */
bool poll_until(struct runtime *rt, double end); /* one turn of libuv's; false: it is later */
/* SIGINT and SIGTERM end the pump; the handles do not keep the loop alive */
void poll_watch_signals(struct runtime *rt, bool on);

/* ---- deadlock.c: what waits where, in words ---- */

/* [-0, +1, m] "waits for 'x' at file:line": the fiber at i */
void deadlock_push_wait(lua_State *L, int i);
/* [-0, +1, m] the error that nothing can go on, for whoever runs the loop; the task at root does, perhaps as an
** operation at the top level */
void deadlock_push(lua_State *L, struct runtime *rt, int root, bool operation);
extern const struct part survey_part;

/* ---- probe.c: what is measured while tasks run ---- */

/* [-0, +0, -] f is about to be resumed, and has suspended or ended */
void probe_begin(lua_State *L, struct runtime *rt, struct fiber *f);
void probe_end(lua_State *L, struct runtime *rt, struct fiber *f);
/* [-0, +0, -] f, which has its slot yet, has ended while it waited */
void probe_lost(lua_State *L, struct runtime *rt, struct fiber *f);
void probe_tell(lua_State *L, struct runtime *rt); /* [-0, +0, m] of those that took too long */
/* when the waiting f suspended, by loop_now; NAN: unknown */
double probe_since(const struct runtime *rt, const struct fiber *f);
ONCE void probe_close(lua_State *L, struct runtime *rt); /* [-0, +0, -] */
extern const struct part probe_part;

/* ---- shutdown.c: the end of the state ---- */

/* [-0, +0, -] no finalizer of a fiber runs after this one */
ONCE void shutdown_run(lua_State *L, struct runtime *rt);
ONCE void shutdown_refuse(lua_State *L); /* [-0, +0, v] */
/* [-0, +0, v] what needs more than Lua's memory is not begun after the end: nobody would give it back */
static inline void shutdown_check(lua_State *L, const struct runtime *rt) {
  if (rt->closed) shutdown_refuse(L);
}

/* ---- testing.c: what a test changes ---- */

void testing_choose(struct runtime *rt); /* moves any ready task to the front */
uint64_t testing_random(struct runtime *rt);
/* A fiber or an operation in flight that may outlive its test says so when it has its slot, and a Timer
** when it is armed, by the index of its deadline: notes the line that makes it. Creates nothing and
** raises nothing. */
enum birth { BIRTH_SLOT, BIRTH_TIMER, BIRTH_COUNT };
void testing_note(lua_State *L, struct runtime *rt, enum birth of, size_t at); /* [-0, +0, -] */
static inline void testing_born(lua_State *L, struct runtime *rt, int slot) {
  if (rt->births != NULL) testing_note(L, rt, BIRTH_SLOT, (size_t)slot);
}
static inline void testing_timer_born(lua_State *L, struct runtime *rt, uint32_t index) {
  if (rt->births != NULL) testing_note(L, rt, BIRTH_TIMER, index);
}
/* [-0, +0, -] the task with that slot was made by the Timer whose deadline has that index */
void testing_started(lua_State *L, struct runtime *rt, uint32_t index, int slot);
void testing_forget(lua_State *L, struct runtime *rt); /* [-0, +0, -] frees what was noted */
void testing_note_opened(lua_State *L, struct runtime *rt);
/* [-0, +0, m] the PeriodicTimer, File or Watcher on top, or the address of a process, is to be disposed
** of before its test ends */
static inline void testing_opened(lua_State *L, struct runtime *rt) {
  if (rt->births != NULL) testing_note_opened(L, rt);
}
void testing_note_lost(lua_State *L, int i);
/* [-0, +0, -] the open object at i, of these or of handle.c's, or the task that waits there has been
** collected: its test has left it */
static inline void testing_lost(lua_State *L, struct runtime *rt, int i) {
  if (rt->births != NULL) testing_note_lost(L, i);
}
void testing_land(lua_State *L, int i);
extern const struct part testing_part;

#pragma GCC visibility pop
#endif
