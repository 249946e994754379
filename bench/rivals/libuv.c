/*
** libuv.c - the rival that is plain C on libuv: what the event loop alone charges.
**
** Same interface as the Lua rivals: `libuv <workload> <n>` prints one JSON line, `list` the names.
** `w1_idle` is one turn of the loop and `w1_async` one uv_async_send hop: nobody's operation, but the
** scale for every other row. Built by bench/run: cc -O2 libuv.c -luv
**
** SPDX-License-Identifier: MIT
*/
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <uv.h>

struct figure { double ns, bytes; };    /* bytes < 0: not measured */

static uv_loop_t *loop;
static long left;                       /* operations still to come */

static double cpu(void) {
  struct rusage r;
  getrusage(RUSAGE_SELF, &r);
  return 1e9 * (r.ru_utime.tv_sec + r.ru_stime.tv_sec)
       + 1e3 * (r.ru_utime.tv_usec + r.ru_stime.tv_usec);
}

static double rss(void) {
  size_t bytes = 0;
  uv_resident_set_memory(&bytes);
  return bytes;
}

/* Runs the loop until nothing is left alive; ns each since `start`. */
static struct figure finish(uint64_t start, long n) {
  uv_run(loop, UV_RUN_DEFAULT);
  return (struct figure){ (double)(uv_hrtime() - start) / n, -1 };
}

static void on_idle(uv_idle_t *h) {
  if (--left == 0) uv_close((uv_handle_t *)h, NULL);
}

static struct figure w1_idle(long n) {
  static uv_idle_t idle;
  uint64_t start = uv_hrtime();
  left = n;
  uv_idle_init(loop, &idle);
  uv_idle_start(&idle, on_idle);
  return finish(start, n);
}

static void on_async(uv_async_t *h) {
  if (--left == 0) uv_close((uv_handle_t *)h, NULL);
  else uv_async_send(h);
}

static struct figure w1_async(long n) {
  static uv_async_t async;
  uint64_t start = uv_hrtime();
  left = n;
  uv_async_init(loop, &async, on_async);
  uv_async_send(&async);
  return finish(start, n);
}

static void on_never(uv_timer_t *h) { (void)h; }
static void on_closed(uv_handle_t *h) { free(h); }
static void on_timer(uv_timer_t *h) { uv_close((uv_handle_t *)h, on_closed); }

static uv_timer_t *timer_new(uint64_t due, uv_timer_cb cb) {
  uv_timer_t *t = malloc(sizeof *t);
  uv_timer_init(loop, t);
  uv_timer_start(t, cb, due, 0);
  return t;
}

static struct figure w8_timer_cancel(long n) {
  uv_timer_t **timers = malloc(n * sizeof *timers);
  memset(timers, 0xff, n * sizeof *timers);   /* resident before we look */
  double before = rss();
  uint64_t start = uv_hrtime();
  for (long i = 0; i < n; i++) timers[i] = timer_new(3600000 + i % 1000, on_never);
  double bytes = (rss() - before) / n;
  for (long i = 0; i < n; i++) uv_close((uv_handle_t *)timers[i], on_closed);
  struct figure f = finish(start, n);
  f.bytes = bytes;
  free(timers);
  return f;
}

static struct figure w8_timer_fire(long n) {  /* processor time, n timers spread over 100 ms */
  double start = cpu();
  for (long i = 0; i < n; i++) timer_new(i * 100 / n, on_timer);
  uv_run(loop, UV_RUN_DEFAULT);
  return (struct figure){ (cpu() - start) / n, -1 };
}

static void on_work(uv_work_t *w) { w->data = (char *)w->data + 1; }

static void after_work(uv_work_t *w, int status) {
  (void)status;
  if (left > 0) {
    left--;
    uv_queue_work(loop, w, on_work, after_work);
  }
}

static struct figure pool(long n, int in_flight) {
  static uv_work_t requests[64];
  uint64_t start = uv_hrtime();
  left = n - in_flight;
  for (int i = 0; i < in_flight; i++) uv_queue_work(loop, &requests[i], on_work, after_work);
  return finish(start, n);
}

static struct figure w11_pool(long n) { return pool(n, 1); }
static struct figure w11_pool_64(long n) { return pool(n, 64); }

static const struct { const char *name; struct figure (*run)(long n); } workloads[] = {
  { "w1_async", w1_async }, { "w1_idle", w1_idle },
  { "w8_timer_cancel", w8_timer_cancel }, { "w8_timer_fire", w8_timer_fire },
  { "w11_pool", w11_pool }, { "w11_pool_64", w11_pool_64 },
};

int main(int argc, char **argv) {
  const char *name = argc > 1 ? argv[1] : "";
  long n = argc > 2 ? atol(argv[2]) : 0;
  loop = uv_default_loop();
  for (size_t i = 0; i < sizeof workloads / sizeof *workloads; i++) {
    if (strcmp(name, "list") == 0) {
      puts(workloads[i].name);
    } else if (strcmp(name, workloads[i].name) == 0 && n > 0) {
      struct figure f = workloads[i].run(n);
      printf("{\"peer\":\"libuv-c\",\"workload\":\"%s\",\"n\":%ld,\"ns_per_op\":%.2f", name, n, f.ns);
      if (f.bytes >= 0) printf(",\"bytes_per_item\":%.1f", f.bytes);
      puts("}");
      return 0;
    }
  }
  return strcmp(name, "list") != 0;
}
