#include "fuse/store_reader.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "presence/bitmap.h"

namespace dedup::fuse {

namespace {

/** True when `length` bytes were read; end of file before that is a failure. */
bool read_fully(int fd, std::uint8_t* buffer, std::uint64_t length, std::uint64_t offset) {
  while (length > 0) {
    const ssize_t got = ::pread(fd, buffer, length, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    buffer += got;
    offset += static_cast<std::uint64_t>(got);
    length -= static_cast<std::uint64_t>(got);
  }
  return true;
}

}  // namespace

Hit read_store(const StoreView& store, std::uint64_t offset, std::uint32_t length, std::uint8_t* buffer) {
  const std::uint64_t end = offset + length;
  // [begin, stop) is the part between the edges; empty when the range lies within one of them.
  const std::uint64_t begin = std::clamp(store.head_bytes, offset, end);
  const std::uint64_t stop = std::clamp(store.bytes - store.tail_bytes, begin, end);
  if (begin < stop) {
    const std::uint64_t first = begin / presence::kBlockBytes;
    const std::uint64_t count = (stop + presence::kBlockBytes - 1) / presence::kBlockBytes - first;
    const std::uint64_t epoch = presence::clear_epoch();
    if (!presence::all_set(store.presence, first, count)) return Hit::no;
    if (!read_fully(store.fd, buffer + (begin - offset), stop - begin, begin)) return Hit::failed;
    // A block may have been taken away and punched between the look and the read. Present again or not: ask.
    if (presence::clear_epoch() != epoch) return Hit::no;
  }
  std::memset(buffer, 0, begin - offset);
  std::memset(buffer + (stop - offset), 0, end - stop);
  return Hit::yes;
}

}  // namespace dedup::fuse
