/*
** probe.c - what is measured while tasks run, once coflow.diagnostics is there to ask for it: since when
** each of them waits, which of them keep the loop, and a trace of it all.
**
** A *step* is one run of a task, from its resumption to its next suspension or its end. Steps nest: a hot
** start, and an await in place, run on top of the caller's step, whose own time theirs is not. A step is
** known by the depth at which it runs; one that had begun before there was a probe has no start, and is not
** looked at.
**
** A step ends in the midst of the kernel's work. So it is only noted then, which creates nothing and cannot
** fail: in an array, and its task in a list that has room for it. What is to be done about it the pump does
** after the slice (probe_tell), where names may be made, and a handler of the user's be called.
**
** A trace is a JSON array of Chrome's trace events. The steps are slices of the one thread that there is,
** nested as they are; each task is an asynchronous event by its id, and each of its waits one within that.
** The array may lack its end, as those who read it allow: what a process that is killed leaves behind can
** still be read.
**
** With no probe all this costs one untaken branch after each step; before it there is one anyway.
**
** Invariants: the task of events[k] is RUNTIME_STEPS[k + 1], that of late[k] RUNTIME_LATE[k + 1].
** Source:     the trace event format (Google, 2016); slow_callback_duration of asyncio.
** SPDX-License-Identifier: MIT
*/
#include "io.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>

/* EVENTS: no more steps are noted between two tellings; there is room for their tasks from the beginning. */
enum { DEPTHS = 64, EVENTS = 4096, TELLINGS = 10 };

struct step {
  double start; /* 0: before there was a probe */
  double inner; /* seconds of the steps on top of it */
  bool first;   /* of its task */
};

/* of the task in a slot of the anchors */
struct slot {
  double since;    /* when it began to wait; NAN: before there was a probe */
  bool real;       /* … by the real clock */
  unsigned traced; /* the trace that has its beginning */
};

/* a step for the trace */
struct event {
  double start, end;
  bool begins, ends; /* its task, as far as the trace knows */
  bool lost;         /* no step: the task has ended while it waited */
  int line;          /* where it came to rest; 0: no line of a user's */
  char source[LUA_IDSIZE];
};

struct probe {
  struct step steps[DEPTHS];
  struct slot *slots;
  size_t size;
  double loaded;       /* when there began to be a probe */
  double busy;         /* seconds in steps */
  lua_Integer count;   /* of steps */
  lua_Integer started; /* tasks */
  double limit;        /* what a step may take; HUGE_VAL: anything */
  double *late;        /* of EVENTS, or NULL: what those took that nobody has been told of yet */
  size_t late_count;
  FILE *trace;
  unsigned traces;      /* its number */
  double traced;        /* since when */
  bool some;            /* it has some events; these are still to be written: */
  struct event *events; /* of EVENTS, or NULL */
  size_t event_count, written;
  lua_Integer lost; /* there was no room for so many */
};

/* ---- traces ---- */

/* how long the UTF-8 sequence is that begins at s; 0: that is none */
static size_t sequence(const char *s, const char *end) {
  static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  unsigned char c = (unsigned char)*s;
  size_t n = c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
  if (n < 2) return n;
  if (n > (size_t)(end - s)) return 0;
  uint32_t code = c & (0x7Fu >> n);
  for (size_t k = 1; k < n; k++) {
    if (((unsigned char)s[k] & 0xC0) != 0x80) return 0;
    code = code << 6 | ((unsigned char)s[k] & 0x3F);
  }
  return code < least[n] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000) ? 0 : n;
}

static void write_string(FILE *f, const char *s, size_t length) {
  const char *end = s + length;
  fputc('"', f);
  while (s < end) {
    size_t n = sequence(s, end);
    if (n == 0)
      fputs("\\ufffd", f);
    else if (*s == '"' || *s == '\\')
      fprintf(f, "\\%c", *s);
    else if ((unsigned char)*s < ' ')
      fprintf(f, "\\u%04x", *s);
    else
      fwrite(s, 1, n, f);
    s += n > 0 ? n : 1;
  }
  fputc('"', f);
}

static struct slot *slot_of(const struct probe *p, const struct fiber *f) {
  size_t at = (size_t)f->task.slot;
  return at != 0 && at < p->size ? &p->slots[at] : NULL;
}

struct name {
  const char *at;
  size_t length;
};
static const struct name wait_name = {"wait", 4};

/* in microseconds; whatever the locale */
static void write_time(struct probe *p, double seconds) {
  long long n = llround(seconds * 1e9);
  fprintf(p->trace, "%lld.%03lld", n / 1000, n % 1000);
}

/* the beginning of an event, which is to be ended by "}" */
static void write_event(struct probe *p, char phase, const char *category, struct name name,
                        double at) {
  fputs(p->some ? ",\n{" : "{", p->trace);
  p->some = true;
  fprintf(p->trace, "\"ph\":\"%c\",\"pid\":1,\"tid\":1,\"cat\":\"%s\",\"ts\":", phase, category);
  write_time(p, at - p->traced);
  fputs(",\"name\":", p->trace);
  write_string(p->trace, name.at, name.length);
}

static void write_async(struct probe *p, char phase, struct name name, lua_Integer id, double at) {
  write_event(p, phase, "task", name, at);
  fprintf(p->trace, ",\"id\":%lld}", (long long)id);
}

/* began: the name under which the trace has the task */
static void write_step(struct probe *p, const struct event *e, struct name name, struct name began,
                       lua_Integer id) {
  if (!e->lost) {
    write_async(p, e->begins ? 'b' : 'e', e->begins ? began : wait_name, id, e->start);
    write_event(p, 'X', "step", name, e->start);
    fputs(",\"dur\":", p->trace);
    write_time(p, e->end - e->start);
    fprintf(p->trace, ",\"args\":{\"task\":%lld", (long long)id);
    if (e->line > 0) {
      char at[LUA_IDSIZE + 20];
      int n = snprintf(at, sizeof at, "%s:%d", e->source, e->line);
      fputs(",\"until\":", p->trace);
      write_string(p->trace, at, (size_t)n);
    }
    fputs("}}", p->trace);
  } else
    write_async(p, 'e', wait_name, id, e->end);
  write_async(p, e->ends ? 'e' : 'b', e->ends ? began : wait_name, id, e->end);
}

static struct name to_name(lua_State *L, int i) {
  struct name n;
  n.at = lua_tolstring(L, i, &n.length);
  return n;
}

/* [-0, +1, m] the name under which the trace has the task at i: that which it has now if it begins */
static void push_began(lua_State *L, int i, bool begins) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_TRACED);
  if (begins) {
    lua_pushvalue(L, i);
    task_push_name(L, i);
    lua_rawset(L, -3);
  }
  lua_pushvalue(L, i);
  if (lua_rawget(L, -2) != LUA_TSTRING) {
    lua_pop(L, 1);
    task_push_name(L, i);
  }
  lua_replace(L, -2);
}

/* [-0, +0, m] writes what has been noted. Finalizers that run meanwhile may add to it, or end the trace. */
static void flush(lua_State *L, struct probe *p) {
  const unsigned number = p->traces;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_STEPS);
  int list = lua_gettop(L), task = list + 1;
  for (; p->written < p->event_count; lua_settop(L, list)) {
    lua_Integer k = (lua_Integer)++p->written;
    lua_rawgeti(L, list, k);
    lua_pushnil(L);
    lua_rawseti(L, list, k);
    if (p->trace == NULL) continue;
    bool begins = p->events[k - 1].begins;
    lua_Integer id = task_id(L, task);
    task_push_name(L, task);
    push_began(L, task, begins);
    if (p->traces != number) { /* the rest is for the next one */
      lua_settop(L, list - 1);
      return;
    }
    if (p->trace != NULL)
      write_step(p, &p->events[k - 1], to_name(L, task + 1), to_name(L, task + 2), id);
  }
  if (p->lost > 0 && p->trace != NULL) {
    char text[60];
    int n = snprintf(text, sizeof text, "%lld steps are not in the trace", (long long)p->lost);
    write_event(p, 'i', "step", (struct name){text, (size_t)n}, loop_real_now());
    fputs(",\"s\":\"g\"}", p->trace);
  }
  p->event_count = p->written = 0;
  p->lost = 0;
  lua_settop(L, list - 1);
}

/* room for one more event, or NULL */
static struct event *new_event(struct probe *p) {
  if (p->event_count < EVENTS) return &p->events[p->event_count];
  p->lost++;
  return NULL;
}

/* [-0, +0, -] the event that was made last is of f, which its slot holds */
static void keep_event(lua_State *L, struct probe *p, struct fiber *f) {
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_STEPS);
  if (task_push_whole(L, &f->task)) { /* else nobody has it any more */
    lua_rawseti(L, -2, (lua_Integer)p->event_count + 1);
    p->event_count++;
  }
  lua_pop(L, 1);
}

/* [-0, +0, -] the step of f */
static void note_step(lua_State *L, struct probe *p, struct fiber *f, const struct step *s,
                      double end) {
  struct slot *slot = slot_of(p, f);
  struct event *e = new_event(p);
  bool ends = task_done(&f->task), known = !s->first && slot != NULL && slot->traced == p->traces;
  if (slot != NULL) slot->traced = ends || e == NULL ? 0 : p->traces;
  if (e == NULL) return;
  *e = (struct event){
      .start = fmax(s->start, p->traced), .end = end, .begins = !known, .ends = ends};
  lua_State *co = f->co;
  lua_Debug ar;
  for (lua_State *inner; !e->ends && (inner = coroutine_inner(co, NULL)) != NULL;) co = inner;
  if (!e->ends && blame_find_line(L, co, 0, &ar)) {
    e->line = ar.currentline;
    memcpy(e->source, ar.short_src, sizeof e->source);
  }
  keep_event(L, p, f);
}

void probe_lost(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct probe *p = rt->probe;
  struct slot *slot = slot_of(p, f);
  if (p->trace == NULL || slot == NULL || slot->traced != p->traces || !lua_checkstack(L, 5))
    return;
  struct event *e = new_event(p);
  slot->traced = 0;
  if (e == NULL) return;
  *e = (struct event){.end = loop_real_now(), .ends = true, .lost = true};
  keep_event(L, p, f);
}

/* 0, or why not all of it could be written */
static int trace_close(struct probe *p) {
  FILE *f = p->trace;
  p->trace = NULL;
  if (f == NULL) return 0;
  errno = 0;
  bool written = fputs(p->some ? "\n]\n" : "]\n", f) >= 0 && fflush(f) == 0 && !ferror(f);
  int error = written ? 0 : errno != 0 ? errno : EIO;
  if (fclose(f) != 0 && error == 0) error = errno;
  return error;
}

/* ---- steps ---- */

static bool is_watched(const struct probe *p) { return p->trace != NULL || p->limit != HUGE_VAL; }

static struct step *step_at(struct probe *p, int depth) {
  return depth > 0 && depth < DEPTHS ? &p->steps[depth] : NULL;
}

/* the step below that at `depth`: between them may be callbacks, which are none */
static struct step *step_below(struct probe *p, int depth) {
  while (--depth > 0)
    if (depth < DEPTHS && p->steps[depth].start != 0) return &p->steps[depth];
  return NULL;
}

/* for want of memory it is not known since when it waits */
static void make_room(lua_State *L, struct probe *p, size_t slot) {
  size_t size = p->size * 2 > slot ? p->size * 2 : slot + 64;
  struct slot *slots =
      (struct slot *)module_resize(L, p->slots, p->size * sizeof *slots, size * sizeof *slots);
  if (slots == NULL) return;
  for (size_t i = p->size; i < size; i++) slots[i] = (struct slot){.since = NAN};
  p->slots = slots;
  p->size = size;
}

void probe_begin(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct probe *p = rt->probe;
  struct step *s = step_at(p, rt->depth);
  double now = loop_real_now();
  p->count++;
  if (!(f->task.flags & TASK_STARTED)) p->started++;
  if (f->task.slot > 0 && (size_t)f->task.slot >= p->size) make_room(L, p, (size_t)f->task.slot);
  if (s != NULL) *s = (struct step){.start = now, .first = !(f->task.flags & TASK_STARTED)};
  if (!is_watched(p)) return;
  task_push(L, &f->task); /* so that its slot holds it, also when it has ended */
  lua_pop(L, 1);
}

/* [-0, +0, -] the task f, which is held, has kept the loop for so long */
static void note_late(lua_State *L, struct probe *p, struct fiber *f, double seconds) {
  if (p->late_count == EVENTS) return;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LATE);
  task_push(L, &f->task);
  lua_rawseti(L, -2, (lua_Integer)p->late_count + 1);
  p->late[p->late_count++] = seconds;
  lua_pop(L, 1);
}

void probe_end(lua_State *L, struct runtime *rt, struct fiber *f) {
  struct probe *p = rt->probe;
  struct step *s = step_at(p, rt->depth), *outer = step_below(p, rt->depth);
  struct slot *slot = slot_of(p, f);
  if (slot != NULL) {
    slot->since = loop_now(rt);
    slot->real = rt->clock == CLOCK_REAL;
  }
  if (s == NULL || s->start == 0) return;
  double now = loop_real_now(), took = now - s->start, own = took - s->inner;
  if (outer != NULL) outer->inner += took;
  p->busy += own;
  if (is_watched(p) && f->task.flags & TASK_HELD && f->task.slot != 0 && lua_checkstack(L, 5)) {
    if (p->trace != NULL) note_step(L, p, f, s, now);
    if (own > p->limit) note_late(L, p, f, own);
  }
  s->start = 0;
}

/* What a handler of the user's raises goes where errors of callbacks go. It may make others late: these are
** told of after it, TELLINGS times at most, or it might go on for ever. */
static void tell_late(lua_State *L, struct runtime *rt, struct probe *p) {
  size_t count = p->late_count, k = 0;
  lua_getiuservalue(L, UP_RUNTIME, RUNTIME_LATE);
  int list = lua_gettop(L);
  for (; k < count && lua_getiuservalue(L, UP_RUNTIME, RUNTIME_BLOCKED) != LUA_TNIL;
       lua_settop(L, list)) {
    if (p->late[k] <= p->limit) { /* there is another limit now */
      k++;
      continue;
    }
    lua_rawgeti(L, list, (lua_Integer)k + 1);
    lua_pushnumber(L, p->late[k++]);
    if (schedule_call_outside(L, rt, 2) != LUA_OK) error_report(L, -1, 0);
  }
  lua_settop(L, list);
  for (k = count; k < p->late_count; k++) {
    p->late[k - count] = p->late[k];
    lua_rawgeti(L, list, (lua_Integer)k + 1);
    lua_rawseti(L, list, (lua_Integer)(k - count) + 1);
  }
  for (k = p->late_count - count; k < p->late_count; k++) {
    lua_pushnil(L);
    lua_rawseti(L, list, (lua_Integer)k + 1);
  }
  p->late_count -= count;
  lua_pop(L, 1);
}

void probe_tell(lua_State *L, struct runtime *rt) {
  struct probe *p = rt->probe;
  if (!lua_checkstack(L, 20)) return;
  if (p->event_count > 0) flush(L, p);
  for (int n = 0; n < TELLINGS && p->late_count > 0; n++) tell_late(L, rt, p);
}

double probe_since(const struct runtime *rt, const struct fiber *f) {
  const struct slot *s = rt->probe != NULL ? slot_of(rt->probe, f) : NULL;
  return s != NULL && s->real == (rt->clock == CLOCK_REAL) ? s->since : NAN;
}

void probe_close(lua_State *L, struct runtime *rt) {
  struct probe *p = rt->probe;
  if (p == NULL) return;
  trace_close(p);
  rt->probe = NULL;
  rt->probed = false;
  module_resize(L, p->slots, p->size * sizeof *p->slots, 0);
  if (p->events != NULL) module_resize(L, p->events, EVENTS * sizeof *p->events, 0);
  if (p->late != NULL) module_resize(L, p->late, EVENTS * sizeof *p->late, 0);
  module_resize(L, p, sizeof *p, 0);
}

/* ---- Lua face ---- */

/* [-0, +0, m] the list in that user value has room for EVENTS tasks */
static void reserve_list(lua_State *L, int uservalue) {
  int top = lua_gettop(L);
  if (lua_getiuservalue(L, UP_RUNTIME, uservalue) == LUA_TNIL) {
    lua_createtable(L, EVENTS, 0);
    if (lua_getiuservalue(L, UP_RUNTIME, uservalue) == LUA_TNIL) { /* else by a finalizer */
      lua_pop(L, 1);
      lua_setiuservalue(L, UP_RUNTIME, uservalue);
    }
  }
  lua_settop(L, top);
}

/* [-0, +0, m] room for what goes with them: the block, or a new one if it is NULL */
static void *reserve(lua_State *L, void *block, size_t size) {
  if (block == NULL) block = module_resize(L, NULL, 0, EVENTS * size);
  if (block == NULL) luaL_error(L, "not enough memory");
  return block;
}

/* on_blocked(seconds, fn), or (nil) */
static int l_on_blocked(lua_State *L) {
  struct probe *p = runtime(L)->probe;
  if (p == NULL) shutdown_refuse(L);
  lua_settop(L, 2);
  reserve_list(L, RUNTIME_LATE);
  p->late = (double *)reserve(L, p->late, sizeof *p->late);
  p->limit = lua_isnil(L, 1) ? HUGE_VAL : lua_tonumber(L, 1);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_BLOCKED);
  return 0;
}

/* trace(path): false if there is one already */
static int l_trace(lua_State *L) {
  struct probe *p = runtime(L)->probe;
  const char *path = luaL_checkstring(L, 1);
  if (p == NULL) shutdown_refuse(L);
  reserve_list(L, RUNTIME_STEPS);
  p->events = (struct event *)reserve(L, p->events, sizeof *p->events);
  lua_pushboolean(L, p->trace == NULL);
  if (p->trace != NULL) return 1;
  FILE *f = fopen(path, "we");
  if (f == NULL) {
    io_push_error(L, uv_translate_sys_error(errno), "open", path);
    return lua_error(L);
  }
  fputs("[\n", f);
  p->trace = f;
  p->traced = loop_real_now();
  p->traces++;
  p->some = false;
  return 1;
}

/* trace_end(path) */
static int l_trace_end(lua_State *L) {
  struct probe *p = runtime(L)->probe;
  if (p == NULL) return 0;
  const unsigned number = p->traces;
  flush(L, p);
  if (p->traces != number) return 0; /* a finalizer has ended it, and begun another one */
  int error = trace_close(p);
  if (error == 0) return 0;
  io_push_error(L, uv_translate_sys_error(error), "write", luaL_checkstring(L, 1));
  return lua_error(L);
}

static void count(lua_State *L, const char *name, lua_Integer n) {
  lua_pushinteger(L, n);
  lua_setfield(L, -2, name);
}

static lua_Integer length(const struct link *list) {
  lua_Integer n = 0;
  for (const struct link *l = list->next; l != list; l = l->next) n++;
  return n;
}

/* counts() -> a table */
static int l_counts(lua_State *L) {
  struct runtime *rt = runtime(L);
  const struct probe *p = rt->probe;
  lua_Integer ready = 0;
  if (p == NULL) shutdown_refuse(L);
  for (const struct task *t = rt->ready; t != NULL; t = t->next) ready++;
  lua_createtable(L, 0, 12);
  count(L, "ready", ready);
  count(L, "steps", p->count);
  count(L, "started", p->started);
  count(L, "deadlines", deadline_count(rt));
  count(L, "requests", length(&rt->flights));
  count(L, "handles", length(&rt->handles));
  count(L, "processes", length(&rt->children));
  count(L, "idle_coroutines", (lua_Integer)rt->idle_count);
  lua_pushnumber(L, p->busy);
  lua_setfield(L, -2, "busy");
  lua_pushnumber(L, loop_real_now() - p->loaded);
  lua_setfield(L, -2, "elapsed");
  return 1;
}

static const luaL_Reg functions[] = {{"on_blocked", l_on_blocked},
                                     {"trace", l_trace},
                                     {"trace_end", l_trace_end},
                                     {"counts", l_counts},
                                     {NULL, NULL}};

static void load(lua_State *L) {
  struct runtime *rt = runtime(L);
  shutdown_check(L, rt);
  lua_newtable(L);
  lua_createtable(L, 0, 1);
  lua_pushliteral(L, "k");
  lua_setfield(L, -2, "__mode");
  lua_setmetatable(L, -2);
  lua_setiuservalue(L, UP_RUNTIME, RUNTIME_TRACED);
  if (rt->probe != NULL) return;
  struct probe *p = (struct probe *)module_resize(L, NULL, 0, sizeof *p);
  if (p == NULL) luaL_error(L, "not enough memory");
  *p = (struct probe){.limit = HUGE_VAL, .loaded = loop_real_now()};
  rt->probe = p;
  rt->probed = true;
}

const struct part probe_part = {functions, load, "probe"};
