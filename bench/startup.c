/*
** startup.c - W13: what it costs to start an interpreter, wall time and memory.
**
**     startup <runs> <interpreter> <chunk>...
**
** Runs `interpreter -e chunk` for each chunk in turn, so that all meet the same disturbances, `runs`
** times after a few that warm the file cache. Prints a line for each chunk: the median of the wall
** times in milliseconds and of the largest resident sizes in kilobytes. It is C because a shell
** around the interpreter would cost more than what is measured.
**
** SPDX-License-Identifier: MIT
*/
#define _GNU_SOURCE
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

enum { WARM = 5 };

extern char **environ;

static double now_ms(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void run(char *interpreter, char *chunk, double *ms, double *kilobytes) {
  char *argv[] = { interpreter, "-e", chunk, NULL };
  struct rusage usage;
  int status;
  pid_t pid;
  double start = now_ms();
  if (posix_spawnp(&pid, interpreter, NULL, NULL, argv, environ) != 0
      || wait4(pid, &status, 0, &usage) != pid || status != 0) {
    fprintf(stderr, "startup: failed: %s -e '%s'\n", interpreter, chunk);
    exit(1);
  }
  *ms = now_ms() - start;
  *kilobytes = usage.ru_maxrss;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(double *v, int n) {
  qsort(v, n, sizeof *v, ascending);
  return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

int main(int argc, char **argv) {
  int runs = argc > 3 ? atoi(argv[1]) : 0, chunks = argc - 3;
  if (runs < 1) {
    fputs("usage: startup <runs> <interpreter> <chunk>...\n", stderr);
    return 2;
  }
  double *ms = calloc((size_t)chunks * runs, sizeof *ms);
  double *kilobytes = calloc((size_t)chunks * runs, sizeof *kilobytes);
  for (int r = -WARM; r < runs; r++) {
    for (int c = 0; c < chunks; c++) {
      int i = c * runs + (r > 0 ? r : 0);
      run(argv[2], argv[3 + c], &ms[i], &kilobytes[i]);
    }
  }
  for (int c = 0; c < chunks; c++)
    printf("%.3f %.0f\n", median(ms + c * runs, runs), median(kilobytes + c * runs, runs));
  free(ms);
  free(kilobytes);
  return 0;
}
