// The mark by which somebody else can tell which FUSE connection a process serves: an empty memory file that is named
// after it. It is seen in /proc/PID/fd of the process, as long as that has its descriptors; src/fs/lock-holder.ts reads
// it.
#pragma once

#include <sys/mman.h>

#include <cerrno>
#include <cstdint>
#include <string>

#include "error.h"
#include "owned_fd.h"

namespace dedup::fuse {

/** `connection`: its number below /sys/fs/fuse/connections, the minor number of the file system. */
inline OwnedFd mark_connection(std::uint32_t connection) {
  const std::string name = "dedup-fuse-connection-" + std::to_string(connection);
  OwnedFd mark(::memfd_create(name.c_str(), MFD_CLOEXEC));
  if (!mark.valid()) throw sys_error(errno, "memfd_create(2) " + name);
  return mark;
}

}  // namespace dedup::fuse
