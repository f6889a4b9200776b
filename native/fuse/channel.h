// One open /dev/fuse: an own queue of requests that must be answered where they were read. Holds the only function that
// answers a READ.
#pragma once

#include <linux/fuse.h>
#include <sys/uio.h>

#include <cstdint>
#include <span>

#include "owned_fd.h"

namespace dedup::fuse {

/** What became of an answer. */
enum class Answer {
  sent,
  /** The request was gone: aborted connection, or already ended by the kernel. */
  gone,
  /** The bytes were not what was asked for; the kernel got EIO. */
  wrong_length,
};

class Channel {
 public:
  explicit Channel(OwnedFd fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }

  /** Answers anything but a READ: `error` 0 with `body`, or a positive errno. */
  Answer reply(std::uint64_t unique, int error, const void* body = nullptr, std::size_t bytes = 0) const;

  /**
   * Answers a READ of `wanted` bytes with exactly that many, or, when `parts` hold another number, with EIO. A shorter
   * answer would make a loop device hand out zeros with success.
   */
  Answer reply_read(std::uint64_t unique, std::uint32_t wanted, std::span<const iovec> parts) const;

 private:
  Answer write_out(std::uint64_t unique, int error, std::span<const iovec> parts, std::size_t bytes) const;
  const OwnedFd fd_;
};

}  // namespace dedup::fuse
