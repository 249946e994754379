/*
** core.h - start here: the rules and the structs. What each file does for the others is in verbs.h.
**
** Two rules hold everywhere.
**
** 1. libuv callbacks never touch Lua. A callback writes fields of its operation, links it on the
**    ready list and returns. The pump (loop.c), entered from one place under protection, takes
**    tasks off that list in order: a task with a Lua body is resumed, any other one *lands*.
**
** 2. What C can reach is held. Every task owns a slot of one table, the anchors. While it runs, is
**    ready or has an operation in flight, the slot holds the task, or the coroutine with the task at
**    its bottom; while it is merely parked, the slot holds its address only, and the task lives by
**    what it awaits: the awaited task holds its waiters (user value TASK_WAITERS), the waiter holds
**    what it awaits (on its stack, or among its user values). So a task that nothing alive can wake
**    is garbage, and its finalizer says so.
**
** One noun: an asynchronous operation *is* a task, its struct begins with struct task. One wait:
** struct wait links a waiter to the task that it awaits; whichever event comes first withdraws the
** others, so a waiter is woken once, and a stale wake cannot exist.
**
** One tree: every task is a member of one cancellation scope, that in which it was started or which it
** has opened since (scope.c). Canceling a scope interrupts all that is below it; a suspension looks at
** one flag of one scope.
**
** Finalizers of users run inside any call that creates an object, and may use everything here. So
** whoever changes a structure creates first, then looks at the state, then changes it without creating.
** (Stores into tables that are there, and our own arrays, may fail for want of memory, but collect
** nothing.)
**
** Every C function of the module is a closure over the same two upvalues, the runtime and the
** anchors; helpers called from them use these through UP_RUNTIME and UP_ANCHORS.
**
** SPDX-License-Identifier: MIT
*/
#ifndef coflow_core_h
#define coflow_core_h

#include <lauxlib.h>
#include <lua.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <uv.h>

#pragma GCC visibility push(hidden) /* only luaopen_coflow_* and coflow.h are for others */

#define UP_RUNTIME lua_upvalueindex(1)
#define UP_ANCHORS lua_upvalueindex(2)

/* Runs once, when the module is loaded or the state closes: such functions lie together, and the pages of
** other code are not read for their sake. */
#define ONCE __attribute__((cold))

#define container_of(ptr, type, field) ((type *)(void *)((char *)(ptr)-offsetof(type, field)))

/* The first word of every userdata of ours says what it is; for tasks the low byte is the kind. */
enum tag {
  TAG_TASK = 0xC0F10200,      /* the first slot of the anchors is the head of the free ones */
  TAG_OPERATION = 0xC0F10300, /* only names the metatable of the tasks that need a finalizer */
  TAG_COMPLETION = 0xC0F10400,
  TAG_LOCAL = 0xC0F10500,
  TAG_CONTEXT = 0xC0F10600,
  TAG_PAIR = 0xC0F10700,
  TAG_GUARD = 0xC0F10800,
  TAG_SOURCE = 0xC0F10900,
  TAG_TOKEN = 0xC0F10A00,
  TAG_REGISTRATION = 0xC0F10B00,
  TAG_FAULT = 0xC0F10C00,
  TAG_WATCH = 0xC0F10D00,
  TAG_SCOPE = 0xC0F10E00,   /* a struct task as well, but not for scripts */
  TAG_AMBIENT = 0xC0F10F00, /* only names the metatable of the tokens of scopes */
  TAG_GROUP = 0xC0F11000,   /* of the scopes that are task groups */
  TAG_CONFIGURED = 0xC0F11100,
  TAG_COROUTINE = 0xC0F11200,
  TAG_CHANNEL = 0xC0F11300,
  TAG_READER = 0xC0F11400, /* the halves of a channel */
  TAG_WRITER = 0xC0F11500,
  TAG_SEMAPHORE = 0xC0F11600,
  TAG_LOCK = 0xC0F11700,
  TAG_SHARED_LOCK = 0xC0F11800, /* for readers and writers */
  TAG_KEY = 0xC0F11900,         /* to one of these */
  TAG_RETAKE = 0xC0F11A00,      /* a key that takes the place of another */
  TAG_MANUAL_EVENT = 0xC0F11B00,
  TAG_AUTO_EVENT = 0xC0F11C00,
  TAG_COUNTDOWN = 0xC0F11D00,
  TAG_CONDITION = 0xC0F11E00,
  TAG_BARRIER = 0xC0F11F00,
  TAG_TIMER = 0xC0F12000,
  TAG_PERIODIC = 0xC0F12100,
  TAG_ORIGIN = 0xC0F12200,
  TAG_CATCHER = 0xC0F12300, /* of signals; a struct task as well, but not for scripts */
  TAG_FILE = 0xC0F12400,
  TAG_WATCHER = 0xC0F12500,
  TAG_STREAM = 0xC0F12600,
  TAG_LISTENER = 0xC0F12700,
  TAG_PROCESS = 0xC0F12800,
  TAG_UDP = 0xC0F12900,
  TAG_EACH = 0xC0F12A00 /* the `<close>` value of a loop over when_each */
};
#define TAG_CLASS(tag) ((lua_Integer)((tag) >> 8 & 0xff)) /* where the anchors hold its metatable */
#define TAG_FIRST TAG_CLASS(TAG_TASK)
#define TAG_LAST TAG_CLASS(TAG_EACH)

enum task_kind {
  KIND_FIBER,   /* runs a Lua function in a coroutine of its own */
  KIND_PROMISE, /* completed by hand: completion sources, from_result … */
  KIND_DELAY,
  KIND_WAIT, /* wait_async: another task, a deadline and a token */
  KIND_ALL,
  KIND_ANY,
  KIND_EACH,   /* what an iteration of when_each waits on */
  KIND_EXPIRY, /* the armed deadline of a cancellation source */
  KIND_SCOPE,
  KIND_IDLE,    /* complete once the loop has nothing to do: for tests */
  KIND_QUEUED,  /* it waits in a queue of waiters (waiter.c) */
  KIND_SELECT,  /* … in several, and for tasks, whichever comes first (select.c) */
  KIND_PERIOD,  /* wait_for_next_tick_async */
  KIND_TICK,    /* of a Timer; no object of Lua's */
  KIND_NUDGE,   /* no task: something is due already (loop.c) */
  KIND_GATE,    /* no task: a lock that is to let readers in (lock.c) */
  KIND_CATCHER, /* no task: of signals (signal.c) */
  KIND_IO,      /* libuv has it in hands: its struct begins with struct io */
  KIND_HANDLE,  /* no task: of a struct handle, which lands when libuv has news of it */
  KIND_COUNT
};

enum task_state {
  TASK_CREATED,
  TASK_QUEUED,
  TASK_RUNNING,
  TASK_WAITING,
  TASK_SUCCEEDED, /* this and what follows: complete */
  TASK_FAULTED,
  TASK_CANCELED
};

enum task_flags {
  TASK_STARTED = 1 << 0,      /* its body has been entered */
  TASK_PARKED = 1 << 1,       /* suspended by us, not by a stray coroutine.yield */
  TASK_LINKED = 1 << 2,       /* on the ready list or the landing list */
  TASK_OBSERVED = 1 << 3,     /* somebody has seen its failure */
  TASK_HAS_CONTEXT = 1 << 4,  /* user value TASK_CONTEXT is not nil */
  TASK_WATCHED = 1 << 5,      /* that context holds a local with a value_changed handler */
  TASK_SUPPRESSED = 1 << 6,   /* the flow of context is suppressed */
  TASK_ABANDONED = 1 << 7,    /* collected while parked: to be closed by the pump */
  TASK_MANY = 1 << 8,         /* the result is a packed table */
  TASK_NONE = 1 << 9,         /* the result is no value at all */
  TASK_AGGREGATE = 1 << 10,   /* faulted with an Aggregate of which await raises the first */
  TASK_TRACED = 1 << 11,      /* the traces table holds a record at its slot */
  TASK_HELD = 1 << 12,        /* a fiber: TASK_RESULT holds its coroutine (fiber_hold) */
  TASK_INTERRUPTED = 1 << 13, /* woken by its token, not by what it awaited */
  TASK_EXPIRED = 1 << 14,     /* woken by its deadline */
  TASK_QUIET = 1 << 15, /* a wait that tells true or false instead of passing the outcome on */
  TASK_DEAF = 1 << 15   /* a fiber that no token interrupts while it waits: until it is resumed */
};

/* User values. TASK_CONTEXT of a complete fiber is its function, if that tells its name and holds
** nothing else alive. TASK_RESULT holds the coroutine until the task is complete, then the outcome;
** TASK_WAITERS the one waiter, or a slot table of them, then (when faulted) its fault (error.c). */
enum task_uservalue { TASK_RESULT = 1, TASK_WAITERS, TASK_CONTEXT };
enum { OP_TOKEN = 3, OP_INPUT, OP_KEYS }; /* of operations: what they hold on to */
struct wait {
  struct wait *next, *prev; /* circular; prev of the first is the last */
  struct task *on;          /* what is waited for, or NULL: not waiting */
  uint32_t pos;  /* where TASK_WAITERS of `on` holds the waiter; 0: it is the value itself */
  uint32_t role; /* WAIT_FIBER, WAIT_OP, or WAIT_INPUT + index in a combinator */
};
enum { WAIT_FIBER, WAIT_OP, WAIT_INPUT };
#define WAIT_INLINE UINT32_MAX /* pos: the waiter is on the C stack and needs no holding */

/* A node in a circular list with a head. Unlinked: next == NULL. */
struct link {
  struct link *next, *prev;
};
static inline void link_init(struct link *head) { head->next = head->prev = head; }
static inline void link_append(struct link *head, struct link *l) {
  l->next = head;
  l->prev = head->prev;
  head->prev->next = l;
  head->prev = l;
}
static inline void link_drop(struct link *l) {
  if (l->next == NULL) return;
  l->next->prev = l->prev;
  l->prev->next = l->next;
  l->next = l->prev = NULL;
}
/* all that `from` has go behind what `to` has */
static inline void link_move(struct link *from, struct link *to) {
  if (from->next == from) return;
  from->next->prev = to->prev;
  from->prev->next = to;
  to->prev->next = from->next;
  to->prev = from->prev;
  link_init(from);
}

/* What makes a task, or a scope, a member of a scope. */
struct member {
  struct link link;
  struct scope *scope; /* NULL: of an operation that is not in flight */
};

enum deadline_kind {
  DEADLINE_NAP,
  DEADLINE_TIMED,
  DEADLINE_SCOPE,
  DEADLINE_TIMER,
  DEADLINE_CLAUSE /* never set */
};
struct deadline {
  uint32_t index : 26; /* of its node (deadline.c); 0: none */
  uint32_t kind : 3;   /* what it is part of: a fiber, a struct timed, a scope, a Timer, a clause */
  uint32_t queued : 1; /* of a Timer (periodic.c): a tick of it is on the ready list … */
  uint32_t ticked : 1; /* … and has not been taken back */
  uint32_t closed : 1; /* it has been disposed */
};

/* What is special about a fiber. Of nearly all no bit is set. */
enum task_traits {
  TRAIT_PLAN = 1 << 0,    /* there is a plan for it (schedule.c) */
  TRAIT_QUEUES = 1 << 1,  /* it runs on a scheduler of the user */
  TRAIT_POSTS = 1 << 2,   /* its continuations go to a synchronization context */
  TRAIT_HANDED = 1 << 3,  /* in the hands of one of these (and TASK_LINKED: no wake counts) */
  TRAIT_DIRECT = 1 << 4,  /* its next run is the loop's */
  TRAIT_RESUMED = 1 << 5, /* the loop has run it since somebody looked */
  TRAIT_QUEUED = 1 << 6,  /* waits for its start in the queue of its task group, or of its home */
  TRAIT_CHILD = 1 << 7    /* of a task group, which wants to know its end */
};
#define TRAIT_ELSEWHERE (TRAIT_QUEUES | TRAIT_POSTS)
#define TRAIT_SCHEDULED 0x3f /* those of schedule.c: somebody else may have a say */

struct task {
  uint32_t tag; /* TAG_TASK | kind */
  uint8_t state, traits;
  uint16_t flags;
  struct task *next;    /* on the ready or the landing list */
  struct wait *waiters; /* the last one of a circular list; NULL, or one with another `on`: none */
  int32_t slot;         /* in the anchors; 0: none */
  uint32_t label : 24;  /* of a fiber: index of "file:line" in the labels */
  uint32_t mark : 7;    /* of the await_all or await_any that last waited for it, or 0 (direct.c) */
  uint32_t keeps : 1;   /* TASK_WAITERS holds the combinator of t->waiters, list or no list */
};

/* What can be interrupted: fibers and operations begin so. The link is in the list of the token that the
** operation was given, besides its scope; of a fiber it is valid while it naps. */
struct pending {
  struct task task;
  struct member member;
  struct link link;
};

struct timed { /* operations with a deadline begin so */
  struct pending pending;
  struct deadline deadline;
  double seconds; /* HUGE_VAL: none, so that it may die while it is parked */
};

/* A fiber asleep, or any waiter in a queue; laid over struct wait so that wait.on is NULL. The link is in the
** list of the token that a sleep was given, or in the queue. */
struct nap {
  struct link link;
  void *none;
  struct deadline deadline;
  uint32_t pos : 25;   /* in a queue: where its holder holds it (waiter.c); else 0 */
  uint32_t what : 3;   /* … for the holder to tell apart what it is asked for */
  uint32_t noted : 1;  /* … its holder's own mark (uvwrite.c) */
  uint32_t own : 1;    /* of a fiber there: suspended in its own coroutine, in no inner one */
  uint32_t failed : 1; /* … woken by an error */
  uint32_t given : 1;  /* a token, which RUNTIME_GIVEN holds */
};

/* The phases of a fiber.
**
**     phase                      state     flags, traits    its slot holds        what ends the phase
**     cold                       CREATED   HELD             its address           start
**     continuation, not started  WAITING   HELD             its address (1)       what it waits for
**     queued, not started        QUEUED    LINKED           its coroutine (2)     the pump
**     runs, never suspended      RUNNING   STARTED          its coroutine         itself
**     runs                       RUNNING   STARTED HELD     it                    itself
**     runs another in place      WAITING   STARTED (3)      as before             that one's suspension or end
**     waits in a chain of hot starts
**                                RUNNING   PARKED HELD      it                    the callee's (fiber_run)
**     parked                     WAITING   PARKED HELD      its address (1)       what it waits for, its scope, a deadline
**     ready again                QUEUED    LINKED HELD      it                    the pump
**     handed to a scheduler      QUEUED    LINKED HANDED    its address           the scheduler, who holds it
**     abandoned, or closed       any       LINKED ABANDONED it                    the pump, which fails it
**     lost                       any       not complete     has none              whoever looks at it (fiber_abandon.c)
**     complete                   from SUCCEEDED on          has none
**
** (1) it, if its scope or token is armed, or it has a deadline of its own. (2) it, if HELD. (3) u.wait.pos is
** WAIT_INLINE. HELD: TASK_RESULT holds the coroutine, else the bottom of the coroutine holds the task. */
struct fiber {
  struct task task;
  struct member member;
  union {
    struct wait wait;     /* parked on a task */
    struct nap nap;       /* asleep */
    struct fiber *caller; /* waiting for a hot start to come back */
  } u;
  lua_State *co;
};
_Static_assert(offsetof(struct fiber, u) == offsetof(struct pending, link), "nap.link");
_Static_assert(offsetof(struct nap, none) == offsetof(struct wait, on), "nap.none");

/* A node of the tree of ambient cancellation (scope.c). */
struct scope {
  struct task task; /* it lands, to run callbacks, when its deadline has passed */
  struct member member;
  struct link members;  /* fibers, operations and scopes */
  struct fiber *owner;  /* who opened it; NULL: it has ended */
  struct runtime *rt;   /* at hand sooner than by the upvalue */
  struct scope *base;   /* the one of its owner as a task */
  struct scope *outer;  /* in which its owner was before, which it holds; of a base: NULL */
  struct scope *origin; /* canceled: the one whose cancellation it is */
  struct token *token;  /* that of the scope, if somebody has asked for it */
  struct guard *guards; /* of a base: the innermost open guard of its owner (guard.c) */
  lua_State *co;        /* the coroutine in which it was opened */
  double due, seconds;  /* HUGE_VAL: no deadline of its own */
  struct deadline deadline;
  uint32_t refs;          /* scopes that have it as outer or origin */
  uint8_t kind;           /* scope.c */
  bool canceled, expired; /* expired: its own deadline came first */
  bool armed;             /* a deadline here or above may wake what is below: hold it */
  bool closed;            /* by its block, which does not know it any more */
};
enum { SCOPE_TOKEN = 1, SCOPE_RUN }; /* canceled: its token; the tokens with callbacks to run */
enum {
  GROUP_FAILED = SCOPE_RUN + 1,
  GROUP_WINNER,
  GROUP_IDLE,
  GROUP_STOPPING,
  GROUP_TOKEN,
  GROUP_QUEUE
};
enum scope_kind { SCOPE_BASE, SCOPE_BLOCK, SCOPE_SHIELD, SCOPE_GROUP };

static inline bool fiber_naps(const struct fiber *f) { /* or has not suspended */
  return f->u.wait.on == NULL;
}
/* what it has run in place, on its own C stack, is complete or has suspended: it runs on */
static inline void wait_end_inline(struct wait *w) {
  struct fiber *f = container_of(w, struct fiber, u.wait);
  w->on = NULL;
  f->task.state = TASK_RUNNING;
}

/* A coroutine of coflow.coroutine while it is resumed or closed: a frame on the C stack of who does it.
** That is a C function with the coroutine at index 1 and its record at index 2 of `from`. */
struct level {
  struct level *up;
  struct task *task; /* the one that does it; a task started further in has levels of its own */
  lua_State *from, *co;
  struct coroutine *record;
  bool open;    /* a suspension of the task passes through */
  bool closing; /* its `<close>` variables run */
};

struct idle {
  lua_State *co;
  int slot;
};

enum error_kind {
  ERROR_CANCELED,
  ERROR_TIMEOUT,
  ERROR_AGGREGATE,
  ERROR_DISPOSED,
  ERROR_OPERATION,
  ERROR_ARGUMENT,
  ERROR_SEMAPHORE,
  ERROR_CHANNEL,
  ERROR_ABANDONED,
  ERROR_CIRCUIT,
  ERROR_BULKHEAD,
  ERROR_RATE,
  ERROR_IO,
  ERROR_WORKER,
  ERROR_COUNT
};

enum runtime_uservalue {
  RUNTIME_ANCHORS = 1,   /* the slot table of rule 2 */
  RUNTIME_ERRORS,        /* error_kind -> metatable */
  RUNTIME_TRACES,        /* slot -> trace record of the error last seen by that task */
  RUNTIME_LABELS,        /* list of "file:line" */
  RUNTIME_NAMES,         /* task -> name, weak keys */
  RUNTIME_IDS,           /* task -> id, weak keys */
  RUNTIME_REPORTER,      /* the default handler of unobserved exceptions */
  RUNTIME_HANDLER,       /* of unobserved exceptions: a function, false, or nil: the default */
  RUNTIME_LOCALS,        /* id -> AsyncLocal, weak values */
  RUNTIME_WATCHED,       /* list of the locals with a handler, weak values */
  RUNTIME_TELLER,        /* the function that tells one of them */
  RUNTIME_SHOWN,         /* the context whose values the handlers saw last */
  RUNTIME_LANDER,        /* the function that lands what is on the landing list */
  RUNTIME_PUMP,          /* the function that runs what is ready, and polls */
  RUNTIME_CALLBACKS,     /* the function that runs the callbacks of canceled tokens */
  RUNTIME_EMPTY,         /* the empty execution context */
  RUNTIME_NONE,          /* CancellationToken.none */
  RUNTIME_MODULE,        /* what luaopen_coflow_core returns */
  RUNTIME_FIBER_MAIN,    /* the body of every coroutine of ours */
  RUNTIME_FIBER_HANDLER, /* the message handler around their functions */
  /* address -> what may die: a parked operation, the token of a scope, the last origin made in a scope
  ** (periodic.c) */
  RUNTIME_WEAK,
  RUNTIME_TOKENS,     /* task -> { address of a scope of its = token }, weak keys */
  RUNTIME_PLANS,      /* task -> its plan (schedule.c), weak keys */
  RUNTIME_HANDED,     /* slot -> task in the hands of a scheduler or context, weak values */
  RUNTIME_HAND,       /* the function that hands a task over */
  RUNTIME_GIVEN,      /* fiber -> the token that it naps with, weak keys */
  RUNTIME_COROUTINES, /* coroutine made by coflow.coroutine -> its record, weak keys */
  RUNTIME_LEAVER,     /* the function that records where an error has left a coroutine */
  RUNTIME_WRAP_MAIN,  /* the body of coroutines made by wrap */
  RUNTIME_WRAP_TRACE, /* the message handler around their functions */
  RUNTIME_WRAP_START, /* the Lua function that calls these */
  RUNTIME_BEFORE,     /* while a test runs: the handles from before */
  /* … PeriodicTimer, File, Watcher or process made in it -> where, or true; weak keys. And a list of what was
  ** collected while it was open, in words */
  RUNTIME_OPENED,
  RUNTIME_LOSSES,    /* the function that notes that */
  RUNTIME_TIMERS,    /* index of a deadline -> the armed Timer that it is part of, or false */
  RUNTIME_ORIGIN,    /* the last origin of Timers without a context (periodic.c) */
  RUNTIME_SPARE,     /* a blank fiber for the next tick of a Timer, or nil */
  RUNTIME_IO_RESULT, /* the function that makes the result of an operation on libuv */
  RUNTIME_STEPS,     /* tasks of which a trace is to be written (probe.c) */
  RUNTIME_TRACED,    /* task -> the name under which it is in the trace, weak keys */
  RUNTIME_LATE,      /* those that have kept the loop … */
  RUNTIME_BLOCKED,   /* … and who is to be told of them */
  RUNTIME_NAMESAKES, /* whose ids are told with their names (deadlock.c) */
  RUNTIME_UV_COUNT = RUNTIME_NAMESAKES
};

enum clock {
  CLOCK_REAL,
  CLOCK_JUMPING, /* virtual: when nothing is left to do, to the next deadline */
  CLOCK_HELD     /* virtual: it stands until testing.c moves it */
};

enum { LABEL_CACHE = 64 };
#define LABEL_NOBODY 0xFFFFFF /* label of a fiber to which nobody has a reference (fiber_hold) */
struct label_cache {
  int line;
  uint32_t label;
  char source[LUA_IDSIZE];
};

/* the end of the ready list at some time, for as long as nothing has been removed from its midst */
struct mark {
  struct task *last;
  unsigned removals;
};

struct runtime {
  lua_State *main;
  struct task *me;      /* the running task; `outside` when none is */
  struct task *outside; /* a task that stands for the code outside every task */
  struct scope *root;   /* in which what nobody can cancel is; the outside's */
  struct scope *idle_scopes;
  int idle_scope_count;
  struct task *ready, *ready_last;
  unsigned removals;                           /* from the midst of that list */
  struct task *landing, *landing_last, *lands; /* to land; the one that does */
  bool pumping, land_busy, stopping;
  bool closed;
  int signaled;                 /* set by the signal callback, read by the pump */
  const struct fiber *entering; /* of which handlers are told, before it is resumed */
  const struct fiber *started;  /* the one started last: until it suspends, it lies … */
  lua_State *started_on;        /* … on this stack, … */
  int started_at;               /* … there */
  struct fiber *handoff;        /* to be run at once by whoever runs the one that yields now */
  int depth;                    /* fibers nested on the C stack */
  int hot;                   /* of these, hot starts: their callers go on as soon as they suspend */
  int reports;               /* errors that are being reported now, one within the other */
  int faults;                /* failed tasks that are not known to be garbage */
  struct level *level;       /* the innermost coroutine of ours that is resumed now */
  struct callback *callback; /* the innermost one that runs within a task's code (guard.c) */
  int slice;                 /* how many more tasks may run before the pump polls */

  bool meddled;      /* somebody has resumed or closed an idle coroutine: look at each */
  struct idle *idle; /* coroutines ready for reuse, each anchored in its slot */
  size_t idle_count, idle_size;
  int free_slot;       /* of the anchors */
  struct token *rearm; /* tokens that have just been armed or disarmed (cancel.c) */
  bool rearm_busy;
  unsigned unregistered; /* how many callbacks have been: dead ones lie in the lists of tokens */
  bool linked;           /* to a token that has been marked as canceled others are linked */
  struct task *hurried;  /* scopes and sources that have expired, whose callbacks are to run now */
  const struct task *refused; /* who was refused a suspension last, its scope being canceled, … */
  unsigned refusals;          /* … and how often in succession */
  const lua_State *resetting; /* the coroutine of a task that we ourselves are closing */
  size_t busy, busy_peak;     /* coroutines in use, and their highest number since the last trim */

  struct task *spares[2]; /* of await_all and await_any (direct.c), few inputs and many */
  int spare_count[2];
  uint8_t marks; /* given to them */

  struct deadlines *deadlines; /* NULL until one is set */
  struct scope *origin;        /* the scope of RUNTIME_ORIGIN */
  struct task *idle_ticks;     /* memory for ticks of Timers */
  struct task nudge;           /* what is due is looked at when this comes off the ready list */

  /* What a test changes (testing.c): the source of time, of choice, and that births are noted. */
  enum clock clock;
  double shifted; /* how far deadlines have been moved since the start (timer_shift) */
  double virtual_now;
  double quiet;     /* real seconds for which what may wait for ever holds a jumping clock back */
  unsigned patient; /* requests in flight that may wait for ever: those of sockets and pipes */
  struct task *idlers; /* wait until nothing is left to do, the last one first */
  bool seeded;
  struct births *births; /* who was made where; NULL: no test runs */
  struct probe *probe;   /* of steps, or NULL */
  uint64_t random;
  lua_Integer seed;
  int passed_over; /* how often in succession the first ready task was not chosen */

  char library[256]; /* how the sources of the library's Lua files begin: "@…/coflow/" */
  size_t library_length;

  uint64_t next_id, next_local, next_serial;
  int watched_count;      /* locals with a handler ever made */
  bool shown_watched : 1; /* RUNTIME_SHOWN holds one of them */
  bool probed : 1;        /* there is a probe */
  uint32_t label_count;
  struct label_cache labels[LABEL_CACHE];
  const void *error_metatables[ERROR_COUNT];
  lua_CFunction pcall, xpcall; /* Lua's own */

  struct link catchers;  /* the open ones (signal.c) */
  struct caught *caught; /* a list of the handles of signals */
  struct link flights;   /* the operations that libuv has in hands (io.c) */
  struct link handles;   /* from their init to their close callback (handle.c) */
  struct link children;  /* that run (process.c) */
  struct link files;     /* the open ones (file.c) */
  struct link watchers;  /* the open ones (watch.c) */
  struct slab *slab;     /* where streams read to (uvread.c) */
  uv_loop_t loop;
  int loop_error; /* why it could not be opened */
  uv_timer_t timer;
  uv_signal_t signals[2];
  bool loop_open, timer_armed, signals_open;
  double timer_due, last_trim;
};

#pragma GCC visibility pop

#include "verbs.h"

#endif
