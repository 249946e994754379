/*
** fdstream.c - streams of descriptors that libuv cannot poll, or that are not ours to make non-blocking.
**
** A file, a device, and a socket or pipe of others (stdio.c says which) are read and written in threads of libuv's
** pool, a chunk at a time. The flags of the descriptor stay as they are: they belong to an open file that other
** processes may have as well. Where nobody may ever come, or take, a thread waits in poll, and looks now and then
** whether it is to stop.
**
** What a thread reads becomes the stream's, whether somebody still waits for it or not: no byte is lost. What is
** written was copied for it. A thread *claims* a part of that before it writes it; when it is stopped, it has written
** just what it has claimed, so the loop knows without waiting for it.
**
**     claimed   bytes that are written, or are being written; with STOP: and no more
**
** A stream that is closed while a thread works for it leaves its job alone (job->stream == NULL); the last one of
** stream and jobs closes the descriptor.
**
** Invariants: uv.fd.read, uv.fd.write are the jobs in flight, or NULL; job->stream->uv.fd.… == job, or stream == NULL.
**             descriptor->refs == the open stream and its jobs, touched by the loop only.
** SPDX-License-Identifier: MIT
*/
#include "uvstream.h"

#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CHUNK = 65536, LOOK_MS = 50 };
enum { SURE = 4096 }; /* what a pipe or socket that can be written takes without waiting */
#define STOP (SIZE_MAX / 2 + 1)

struct descriptor {
  int fd;
  unsigned refs;
  bool waits; /* for others: no plain file */
};

struct read_job {
  uv_work_t work;
  struct runtime *rt;
  struct descriptor *from;
  struct stream *stream;
  atomic_bool stop; /* loop writes, worker reads */
  char *base;       /* worker writes, loop reads after on_read */
  ssize_t result;   /* the same */
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

/* whether it can be read, or written, within a moment */
static bool ready(int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  return poll(&p, 1, LOOK_MS) > 0;
}

static ssize_t read_chunk(struct read_job *j) {
  int fd = j->from->fd;
  for (;;) {
    if (atomic_load(&j->stop)) return UV_ECANCELED;
    if (j->from->waits && !ready(fd, POLLIN)) continue;
    if (j->base == NULL && (j->base = malloc(CHUNK)) == NULL) return UV_ENOMEM;
    ssize_t n = read(fd, j->base, CHUNK);
    if (n >= 0) return n;
    if (errno == EAGAIN)
      ready(fd, POLLIN); /* somebody else has made it non-blocking, or was faster */
    else if (errno != EINTR)
      return failure();
  }
}

static int write_whole(struct write_job *j, const char *data, size_t n) {
  while (n > 0) {
    ssize_t put = write(j->to->fd, data, n);
    if (put >= 0) {
      data += put;
      n -= (size_t)put;
    } else if (errno == EAGAIN) {
      if (atomic_load(&j->gone)) return UV_ECANCELED;
      ready(j->to->fd, POLLOUT);
    } else if (errno != EINTR)
      return failure();
  }
  return 0;
}

static int write_chunks(struct write_job *j) {
  size_t done = 0, most = j->to->waits ? SURE : CHUNK;
  int status = 0;
  while (status == 0 && done < j->size) {
    size_t n = j->size - done < most ? j->size - done : most, claimed = done;
    if (atomic_load(&j->claimed) & STOP) break;
    if (j->to->waits && !ready(j->to->fd, POLLOUT)) continue;
    if (!atomic_compare_exchange_strong(&j->claimed, &claimed, done + n)) break;
    status = write_whole(j, j->data + done, n);
    done += n;
  }
  return status;
}

static void run_read(uv_work_t *work) {
  struct read_job *j = container_of(work, struct read_job, work);
  j->result = read_chunk(j);
}

static void run_write(uv_work_t *work) {
  struct write_job *j = container_of(work, struct write_job, work);
  j->result = write_chunks(j);
}

/* ---- libuv side: no Lua below this line ---- */

static void drop(struct descriptor *d) {
  if (--d->refs > 0) return;
  close(d->fd);
  free(d);
}

/* requests that may wait for ever are no work that ends by itself (testing.c) */
static void begin(struct runtime *rt, struct descriptor *d) {
  d->refs++;
  if (d->waits) rt->patient++;
}

static void end(struct runtime *rt, struct descriptor *d) {
  if (d->waits) rt->patient--;
  drop(d);
}

int fd_open(struct stream *s, int fd) {
  struct stat st;
  if (fstat(fd, &st) != 0) return failure();
  struct descriptor *d = malloc(sizeof *d);
  if (d == NULL) return UV_ENOMEM;
  *d = (struct descriptor){fd, 1,
                           !S_ISREG(st.st_mode) && !S_ISBLK(st.st_mode) && !S_ISDIR(st.st_mode)};
  s->uv.fd.descriptor = d;
  return 0;
}

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
  if (n == UV_ECANCELED) {
    if (!s->reading || (n = fd_read(s)) == 0) return;
    read_came(s, NULL, 0, 0, (int)n);
  } else if (n > 0)
    read_came(s, base, (size_t)n, CHUNK, 0);
  else
    read_came(s, NULL, 0, 0, n == 0 ? UV_EOF : (int)n);
}

int fd_read(struct stream *s) {
  struct read_job *j = s->uv.fd.read;
  if (j != NULL) { /* it was told to stop; if it does all the same, on_read begins anew */
    atomic_store(&j->stop, false);
    return 0;
  }
  j = calloc(1, sizeof *j);
  if (j == NULL) return UV_ENOMEM;
  j->rt = s->handle.rt;
  j->from = s->uv.fd.descriptor;
  j->stream = s;
  atomic_init(&j->stop, false);
  int status = uv_queue_work(&j->rt->loop, &j->work, run_read, on_read);
  if (status != 0) {
    free(j);
    return status;
  }
  begin(j->rt, j->from);
  s->uv.fd.read = j;
  return 0;
}

static void stop_read(struct read_job *j) {
  atomic_store(&j->stop, true);
  uv_cancel((uv_req_t *)&j->work); /* if no thread has it yet */
}

void fd_read_stop(struct stream *s) {
  if (s->uv.fd.read != NULL) stop_read(s->uv.fd.read);
}

static void on_write(uv_work_t *work, int status) {
  struct write_job *j = container_of(work, struct write_job, work);
  struct stream *s = j->stream;
  if (status == 0) status = j->result;
  end(j->rt, j->to);
  free(j);
  if (s == NULL) return;
  s->uv.fd.write = NULL;
  write_done(s, status);
}

int fd_write(struct stream *s, size_t size) {
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
  return 0;
}

size_t fd_write_stop(struct stream *s) {
  return atomic_fetch_or(&s->uv.fd.write->claimed, STOP) & ~STOP;
}

void fd_close(struct stream *s) {
  struct read_job *r = s->uv.fd.read;
  struct write_job *w = s->uv.fd.write;
  if (r != NULL) {
    r->stream = NULL;
    stop_read(r);
  }
  if (w != NULL) {
    fd_write_stop(s);
    atomic_store(&w->gone, true);
    w->stream = NULL;
    s->flying = false;
    uv_cancel((uv_req_t *)&w->work);
  }
  s->uv.fd.read = NULL;
  s->uv.fd.write = NULL;
  if (s->uv.fd.descriptor != NULL) drop(s->uv.fd.descriptor);
  s->uv.fd.descriptor = NULL;
}
