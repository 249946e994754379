/*
** parent.c - a parent process for spec/stdio_spec.lua, which builds it: gives its child standard streams of one kind,
** and tells what became of them.
**
**     parent KIND[,OPTION…] COMMAND ARGUMENT…
**
** KIND is pipe, socket, terminal (the slave of a new one) or master (the master of a new one, read and written by
** nobody). The child has one end as its descriptors 0 and 1; what it writes there is written to our own output. For
** each '?' in it, which is not, one line of our input goes to the child; after the last one its input ends.
**
** OPTION: held - nothing is read from the child until it has ended; nonblocking - its ends are so from the start.
** In the end a line on standard error says so if one of the child's ends has become non-blocking, or blocking, and
** the status of the child is ours; killed by a signal: 128 + its number.
**
** SPDX-License-Identifier: MIT
*/
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

static int to = -1, from = -1;       /* our ends */
static int child_in, child_out;      /* the child's */
static char input[1 << 20], *next = input;
static size_t left;
static int terminal;

static void die(const char *what) {
  perror(what);
  exit(99);
}

static void open_streams(const char *kind) {
  int in[2], out[2];
  if (strncmp(kind, "pipe", 4) == 0) {
    if (pipe(in) != 0 || pipe(out) != 0) die("pipe");
    child_in = in[0], to = in[1], from = out[0], child_out = out[1];
  } else if (strncmp(kind, "socket", 6) == 0) {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, in) != 0 || socketpair(AF_UNIX, SOCK_STREAM, 0, out) != 0)
      die("socketpair");
    child_in = in[0], to = in[1], from = out[0], child_out = out[1];
  } else {
    struct termios t;
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) die("openpt");
    int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    if (slave < 0) die("ptsname");
    tcgetattr(slave, &t);
    t.c_oflag &= ~(tcflag_t)OPOST;
    t.c_lflag &= ~(tcflag_t)ECHO;
    tcsetattr(slave, TCSANOW, &t);
    terminal = 1;
    if (strncmp(kind, "master", 6) == 0) {
      child_in = child_out = master;
      to = from = slave;
    } else {
      child_in = child_out = slave;
      to = from = master;
    }
  }
}

/* the next line, or the end, to the child */
static void feed(void) {
  char *end = left > 0 ? memchr(next, '\n', left) : NULL;
  size_t n = end != NULL ? (size_t)(end - next) + 1 : left;
  if (to < 0) return;
  if (left == 0 && terminal)
    (void)!write(to, "\004", 1);
  else if (left == 0) {
    close(to);
    to = -1;
  } else if (write(to, next, n) != (ssize_t)n)
    die("write");
  next += n;
  left -= n;
}

/* what the child has written; 0: nothing now */
static int drain(int wait) {
  char data[65536];
  struct pollfd p = {.fd = from, .events = POLLIN};
  if (poll(&p, 1, wait) <= 0 || !(p.revents & POLLIN)) return 0;
  ssize_t n = read(from, data, sizeof data), kept = 0;
  for (ssize_t i = 0; i < n; i++) {
    if (data[i] == '?')
      feed();
    else
      data[kept++] = data[i];
  }
  if (kept > 0 && write(1, data, (size_t)kept) != kept) die("write");
  return n > 0;
}

int main(int argc, char **argv) {
  if (argc < 3) return 98;
  int held = strstr(argv[1], ",held") != NULL, status;
  int nonblocking = strstr(argv[1], ",nonblocking") != NULL ? O_NONBLOCK : 0;
  signal(SIGPIPE, SIG_IGN);
  for (ssize_t n; (n = read(0, input + left, sizeof input - left)) > 0;) left += (size_t)n;
  open_streams(argv[1]);
  if (nonblocking) {
    fcntl(child_in, F_SETFL, fcntl(child_in, F_GETFL) | O_NONBLOCK);
    fcntl(child_out, F_SETFL, fcntl(child_out, F_GETFL) | O_NONBLOCK);
  }
  pid_t pid = fork();
  if (pid < 0) die("fork");
  if (pid == 0) {
    int in = fcntl(child_in, F_DUPFD, 10), out = fcntl(child_out, F_DUPFD, 10);
    close(to);
    close(from);
    close(child_in);
    close(child_out);
    dup2(in, 0);
    dup2(out, 1);
    close(in);
    close(out);
    execvp(argv[2], argv + 2);
    die("exec");
  }
  while (waitpid(pid, &status, WNOHANG) == 0) {
    if (!held)
      drain(10);
    else
      poll(NULL, 0, 10);
  }
  while (drain(0)) {
  }
  if ((fcntl(child_in, F_GETFL) & O_NONBLOCK) != nonblocking ||
      (fcntl(child_out, F_GETFL) & O_NONBLOCK) != nonblocking)
    fprintf(stderr, "its descriptors have other flags now\n");
  return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
