/*
** fdstream.c - streams of descriptors that libuv cannot poll, or that are not ours to make non-blocking.
**
** A file, a device, and a socket or pipe of others (stdio.c says which) are read and written in threads
** of libuv's pool, a chunk at a time. The flags of the descriptor stay as they are: they belong to an
** open file that other processes may have as well. Where nobody may ever come, or take, no thread is
** sent before something is there: the descriptor is in an epoll instance of its own, and it is that
** which libuv polls.
**
**     wanted ── epoll says so ── a job ──┬─ something came, or went: read_came, write_done
**               (files: at once)         └─ somebody else was faster: wanted
**
** What a thread reads becomes the stream's, whether somebody still waits for it or not: no byte is
** lost. What is written was copied for it. A thread *claims* a part of that before it writes it; when
** it is stopped, it has written just what it has claimed, so the loop knows without waiting for it.
**
**     claimed   bytes that are written, or are being written; with STOP: and no more
**
** A stream that is closed while a thread works for it leaves its job alone (job->stream == NULL); the
** last one of stream and jobs closes the descriptor.
**
** Without epoll a thread waits, for LOOK_MS, before it gives up and is sent again.
**
** Invariants: uv.fd.read, uv.fd.write are the jobs in flight, or NULL; job->stream->uv.fd.… == job, or stream == NULL.
**             uv.fd.polled is what the epoll instance is asked for: what is wanted, but for what has a job.
**             descriptor->refs == the open stream and its jobs, touched by the loop only.
**             While no job writes, nothing is given away: flight == 0.
** SPDX-License-Identifier: MIT
*/
#include "uvstream.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__) && !defined(COFLOW_NO_EPOLL)
#include <sys/epoll.h>
#define EPOLL 1
#else
#define EPOLL 0
#endif

enum { CHUNK = 65536, LOOK_MS = 50 };
enum { SURE = 4096 }; /* what a pipe or socket that can be written takes without waiting */
#define FILE_MOST ((size_t)1 << 18)
#define STOP (SIZE_MAX / 2 + 1)

struct descriptor {
  int fd;
  unsigned refs;
  bool waits; /* for others: no file */
  int epoll;  /* -1: there is none */
};

struct read_job {
  uv_work_t work;
  struct runtime *rt;
  struct descriptor *from;
  struct stream *stream;
  char *base;     /* worker writes, loop reads after on_read */
  ssize_t result; /* the same */
};

struct write_job {
  uv_work_t work;
  struct runtime *rt;
  struct descriptor *to;
  struct stream *stream;
  atomic_size_t claimed;
  atomic_bool gone; /* loop writes, worker reads: nobody cares any more */
  int result;       /* worker writes, loop reads after on_write */
  size_t size;
  char data[];
};

/* ---- in the thread: no Lua, no loop ---- */

static int failure(void) { return uv_translate_sys_error(errno); }

static bool ready(int fd, short events, int ms) {
  struct pollfd p = {.fd = fd, .events = events};
  return poll(&p, 1, ms) > 0;
}

/* whether it can be read, or written, so that a thread is not held up */
static bool ready_now(const struct descriptor *d, short events) {
  return !d->waits || ready(d->fd, events, d->epoll >= 0 ? 0 : LOOK_MS);
}

static void run_read(uv_work_t *work) {
  struct read_job *j = container_of(work, struct read_job, work);
  j->result = UV_EAGAIN;
  if (!ready_now(j->from, POLLIN)) return;
  j->base = malloc(CHUNK);
  j->result = UV_ENOMEM;
  if (j->base == NULL) return;
  do j->result = read(j->from->fd, j->base, CHUNK);
  while (j->result < 0 && errno == EINTR);
  if (j->result < 0) j->result = failure();
}

static int write_whole(struct write_job *j, const char *data, size_t n) {
  while (n > 0) {
    ssize_t put = write(j->to->fd, data, n);
    if (put >= 0) {
      data += put;
      n -= (size_t)put;
    } else if (errno == EAGAIN) { /* somebody else has made it non-blocking */
      if (atomic_load(&j->gone)) return UV_ECANCELED;
      ready(j->to->fd, POLLOUT, LOOK_MS);
    } else if (errno != EINTR)
      return failure();
  }
  return 0;
}

static void run_write(uv_work_t *work) {
  struct write_job *j = container_of(work, struct write_job, work);
  size_t done = 0, most = j->to->waits ? SURE : CHUNK;
  while (j->result == 0 && done < j->size && ready_now(j->to, POLLOUT)) {
    size_t n = j->size - done < most ? j->size - done : most, claimed = done;
    if (!atomic_compare_exchange_strong(&j->claimed, &claimed, done + n)) break;
    j->result = write_whole(j, j->data + done, n);
    done += n;
  }
}

/* ---- libuv side: no Lua below this line ---- */

static void drop(struct descriptor *d) {
  if (--d->refs > 0) return;
  if (d->epoll >= 0) close(d->epoll);
  close(d->fd);
  free(d);
}

/* A job that waits may do so for ever: it is no work that ends by itself (testing.c). */
static void begin(struct runtime *rt, struct descriptor *d) {
  d->refs++;
  if (d->waits && d->epoll < 0) rt->patient++;
}

static void end(struct runtime *rt, struct descriptor *d) {
  if (d->waits && d->epoll < 0) rt->patient--;
  drop(d);
}

static int arm(struct stream *s);

static void on_read(uv_work_t *work, int status) {
  struct read_job *j = container_of(work, struct read_job, work);
  struct stream *s = j->stream;
  char *base = j->base;
  ssize_t n = status < 0 ? status : j->result;
  end(j->rt, j->from);
  free(j);
  if (s == NULL || n <= 0) free(base);
  if (s == NULL) return;
  s->uv.fd.read = NULL;
  if (n == UV_EAGAIN && (n = arm(s)) == 0) return;
  s->uv.fd.wanted &= ~UV_READABLE;
  if (n > 0)
    read_came(s, base, (size_t)n, CHUNK, 0);
  else
    read_came(s, NULL, 0, 0, n == 0 ? UV_EOF : (int)n);
}

static int start_read(struct stream *s) {
  struct read_job *j = calloc(1, sizeof *j);
  if (j == NULL) return UV_ENOMEM;
  j->rt = s->handle.rt;
  j->from = s->uv.fd.descriptor;
  j->stream = s;
  int status = uv_queue_work(&j->rt->loop, &j->work, run_read, on_read);
  if (status != 0) {
    free(j);
    return status;
  }
  begin(j->rt, j->from);
  s->uv.fd.read = j;
  return 0;
}

static void on_write(uv_work_t *work, int status) {
  struct write_job *j = container_of(work, struct write_job, work);
  struct stream *s = j->stream;
  size_t done = atomic_load(&j->claimed) & ~STOP;
  if (status == 0) status = j->result;
  end(j->rt, j->to);
  free(j);
  if (s == NULL) return;
  s->uv.fd.write = NULL;
  s->uv.fd.wanted &= ~UV_WRITABLE;
  s->flight = done;
  write_done(s, status);
}

static int start_write(struct stream *s) {
  size_t most = s->uv.fd.descriptor->waits ? CHUNK : FILE_MOST;
  size_t size = s->queued < most ? s->queued : most;
  struct write_job *j = malloc(sizeof *j + size);
  if (j == NULL) return UV_ENOMEM;
  memset(j, 0, sizeof *j);
  j->rt = s->handle.rt;
  j->to = s->uv.fd.descriptor;
  j->stream = s;
  j->size = write_copy(s, j->data, size);
  atomic_init(&j->claimed, 0);
  atomic_init(&j->gone, false);
  int status = uv_queue_work(&j->rt->loop, &j->work, run_write, on_write);
  if (status != 0) {
    free(j);
    return status;
  }
  begin(j->rt, j->to);
  s->uv.fd.write = j;
  s->flight = size;
  return 0;
}

/* what is wanted and has no job */
static int missing(const struct stream *s) {
  return s->uv.fd.wanted &
         ~((s->uv.fd.read != NULL ? UV_READABLE : 0) | (s->uv.fd.write != NULL ? UV_WRITABLE : 0));
}

/* starts the jobs for these events */
static int start(struct stream *s, int events) {
  int status = 0;
  if (events & UV_READABLE) status = start_read(s);
  if (events & UV_WRITABLE && status == 0) status = start_write(s);
  return status;
}

#if EPOLL
static void on_ready(uv_poll_t *poll, int status, int events) {
  struct stream *s = of_uv(poll);
  struct epoll_event e = {0};
  int now = 0, polled = s->uv.fd.polled;
  (void)events;
  if (epoll_wait(s->uv.fd.descriptor->epoll, &e, 1, 0) < 0) status = failure();
  if (status < 0 || e.events & (EPOLLERR | EPOLLHUP)) now = polled;
  if (e.events & EPOLLIN) now |= UV_READABLE & polled;
  if (e.events & EPOLLOUT) now |= UV_WRITABLE & polled;
  if (now & UV_READABLE && (status = start_read(s)) != 0) {
    s->uv.fd.wanted &= ~UV_READABLE;
    read_came(s, NULL, 0, 0, status);
  }
  if (now & UV_WRITABLE && (status = start_write(s)) != 0) {
    s->uv.fd.wanted &= ~UV_WRITABLE;
    write_done(s, status);
  }
  arm(s);
}

/* asks the epoll instance for what is missing */
static int arm(struct stream *s) {
  int events = missing(s), epoll = s->uv.fd.descriptor->epoll;
  if (epoll < 0) return start(s, events);
  if (events == s->uv.fd.polled || s->handle.closing) return 0;
  struct epoll_event e = {.events = (events & UV_READABLE ? EPOLLIN : 0u) |
                                    (events & UV_WRITABLE ? EPOLLOUT : 0u)};
  s->uv.fd.polled = 0;
  if (epoll_ctl(epoll, EPOLL_CTL_MOD, s->uv.fd.descriptor->fd, &e) != 0) return failure();
  int status = events != 0 ? uv_poll_start(&s->uv.fd.poll, UV_READABLE, on_ready)
                           : uv_poll_stop(&s->uv.fd.poll);
  if (status == 0) s->uv.fd.polled = events;
  return status;
}

/* what cannot be in an epoll instance never waits; fails for other reasons as well */
static int watch(struct descriptor *d) {
  struct epoll_event e = {0};
  d->epoll = epoll_create1(EPOLL_CLOEXEC);
  if (d->epoll < 0) return failure();
  if (epoll_ctl(d->epoll, EPOLL_CTL_ADD, d->fd, &e) == 0) return 0;
  int status = failure();
  close(d->epoll);
  d->epoll = -1;
  d->waits = false;
  return status == UV_EPERM ? 0 : status;
}
#else
static int arm(struct stream *s) { return start(s, missing(s)); }

static int watch(struct descriptor *d) {
  (void)d;
  return 0;
}
#endif

int fd_open(struct stream *s, int fd) {
  uv_loop_t *loop = loop_uv(s->handle.rt);
  struct stat st;
  if (fstat(fd, &st) != 0) return failure();
  struct descriptor *d = malloc(sizeof *d);
  if (d == NULL) return UV_ENOMEM;
  *d = (struct descriptor){
      fd, 1, !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode) && !S_ISDIR(st.st_mode), -1};
  int status = d->waits ? watch(d) : 0;
  if (status == 0)
    status = d->epoll >= 0 ? uv_poll_init(loop, &s->uv.fd.poll, d->epoll)
                           : uv_check_init(loop, &s->uv.fd.check);
  if (status != 0) {
    if (d->epoll >= 0) close(d->epoll);
    free(d);
    return status;
  }
  s->uv.fd.descriptor = d;
  handle_opened(&s->handle, (uv_handle_t *)&s->uv);
  return 0;
}

int fd_read(struct stream *s) {
  s->uv.fd.wanted |= UV_READABLE;
  return arm(s);
}

void fd_read_stop(struct stream *s) { /* a job that has begun goes on */
  s->uv.fd.wanted &= ~UV_READABLE;
  arm(s);
}

int fd_write(struct stream *s) {
  s->flight = 0;
  s->uv.fd.wanted |= UV_WRITABLE;
  return arm(s);
}

size_t fd_write_stop(struct stream *s) {
  struct write_job *j = s->uv.fd.write;
  return j != NULL ? atomic_fetch_or(&j->claimed, STOP) & ~STOP : 0;
}

bool fd_write_rest(struct stream *s) {
  if (s->uv.fd.write != NULL) return false;
  s->uv.fd.wanted &= ~UV_WRITABLE;
  arm(s);
  return true;
}

void fd_close(struct stream *s) {
  struct read_job *r = s->uv.fd.read;
  struct write_job *w = s->uv.fd.write;
  if (r != NULL) {
    r->stream = NULL;
    uv_cancel((uv_req_t *)&r->work); /* if no thread has it yet */
  }
  if (w != NULL) {
    fd_write_stop(s);
    atomic_store(&w->gone, true);
    w->stream = NULL;
    uv_cancel((uv_req_t *)&w->work);
  }
  s->flying = false;
  s->uv.fd.read = NULL;
  s->uv.fd.write = NULL;
  if (s->uv.fd.descriptor != NULL) drop(s->uv.fd.descriptor);
  s->uv.fd.descriptor = NULL;
}
