// idmapped-mount UID GID SIZE SOURCE TARGET
// Mounts SOURCE on TARGET, read-only and without what is mounted below it, with IDs 0 to SIZE-1 shown as UID.. and GID..:
// what containerd from 2.0 on does with the lower directories of an overlay (core/mount, IDMapMountWithAttrs). Needs root.
// System calls: mount_setattr(2), open_tree(2), move_mount(2), Linux 5.12.
#define _GNU_SOURCE
#include <err.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void write_map(pid_t pid, const char *file, const char *to, const char *size) {
  char path[64], text[64];
  snprintf(path, sizeof path, "/proc/%d/%s", pid, file);
  const int length = snprintf(text, sizeof text, "0 %s %s\n", to, size);
  const int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0 || write(fd, text, length) != length) err(1, "%s", path);
  close(fd);
}

int main(int argc, char **argv) {
  if (argc != 6) errx(2, "idmapped-mount UID GID SIZE SOURCE TARGET");
  // The namespace lives in a child that waits; the mount keeps it after that has gone.
  int ready[2];
  if (pipe(ready) != 0) err(1, "pipe");
  const pid_t child = fork();
  if (child < 0) err(1, "fork");
  if (child == 0) {
    if (unshare(CLONE_NEWUSER) != 0 || write(ready[1], "x", 1) != 1) _exit(1);
    pause();
    _exit(0);
  }
  close(ready[1]);
  char byte;
  if (read(ready[0], &byte, 1) != 1) errx(1, "no user namespace");
  write_map(child, "uid_map", argv[1], argv[3]);
  write_map(child, "gid_map", argv[2], argv[3]);
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/ns/user", child);
  const int namespace = open(path, O_RDONLY | O_CLOEXEC);
  if (namespace < 0) err(1, "%s", path);
  kill(child, SIGKILL);
  waitpid(child, NULL, 0);

  const int tree = syscall(SYS_open_tree, AT_FDCWD, argv[4], OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
  if (tree < 0) err(1, "open_tree %s", argv[4]);
  struct mount_attr attributes = {
      .attr_set = MOUNT_ATTR_IDMAP | MOUNT_ATTR_RDONLY,
      .userns_fd = namespace,
  };
  if (syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof attributes) != 0)
    err(1, "mount_setattr %s", argv[4]);
  if (syscall(SYS_move_mount, tree, "", AT_FDCWD, argv[5], MOVE_MOUNT_F_EMPTY_PATH) != 0)
    err(1, "move_mount %s", argv[5]);
  return 0;
}
