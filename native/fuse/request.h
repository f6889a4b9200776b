// A request as read from /dev/fuse, and the buffers a reader thread owns.
#pragma once

#include <linux/fuse.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "fuse/abi.h"

namespace dedup::fuse {

/** Page-aligned memory of a fixed size. */
template <std::size_t bytes>
class AlignedMemory {
 public:
  AlignedMemory() : memory_(static_cast<std::uint8_t*>(std::aligned_alloc(4096, bytes)), &std::free) {
    if (!memory_) throw std::bad_alloc();
  }
  std::uint8_t* data() { return memory_.get(); }

 private:
  std::unique_ptr<std::uint8_t, decltype(&std::free)> memory_;
};

using DataBuffer = AlignedMemory<fuse_abi::kMaxReadBytes>;

/** Points into the buffer it was read into. */
struct Request {
  int error = 0;  // errno of the read; 0 = a request is here
  const std::uint8_t* data = nullptr;
  std::size_t bytes = 0;

  const fuse_in_header& header() const { return *reinterpret_cast<const fuse_in_header*>(data); }
  std::uint32_t opcode() const { return header().opcode; }
  std::uint64_t unique() const { return header().unique; }
  std::uint64_t node() const { return header().nodeid; }
  /** The struct after the header; null when the request is shorter. */
  template <class T>
  const T* body() const {
    return bytes < sizeof(fuse_in_header) + sizeof(T) ? nullptr
                                                      : reinterpret_cast<const T*>(data + sizeof(fuse_in_header));
  }
  /** The NUL-terminated name after the header; empty when malformed. */
  std::string_view name() const {
    const char* text = reinterpret_cast<const char*>(data + sizeof(fuse_in_header));
    const std::size_t room = bytes - sizeof(fuse_in_header);
    const std::size_t length = ::strnlen(text, room);
    return length == room ? std::string_view() : std::string_view(text, length);
  }
};

class RequestBuffer {
 public:
  /** Reads the next request; `error` EAGAIN when there is none. Valid until the next call. */
  Request read(int fd) {
    const ssize_t got = ::read(fd, memory_.data(), fuse_abi::kRequestBytes);
    if (got < 0) return {.error = errno};
    if (static_cast<std::size_t>(got) < sizeof(fuse_in_header)) return {.error = EPROTO};
    return {.error = 0, .data = memory_.data(), .bytes = static_cast<std::size_t>(got)};
  }

 private:
  AlignedMemory<fuse_abi::kRequestBytes> memory_;
};

}  // namespace dedup::fuse
