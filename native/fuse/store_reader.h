// Answers a range of the store when every block of it may be served: the fast path of a READ, on the thread that read
// it.
#pragma once

#include <cstdint>

namespace dedup::fuse {

/** The store as a session sees it. Descriptor and bitmap belong to the caller and outlive the session. */
struct StoreView {
  int fd = -1;
  std::uint64_t bytes = 0;
  std::uint64_t head_bytes = 0;  // answered with zeros, never looked up
  std::uint64_t tail_bytes = 0;  // likewise
  const std::uint8_t* presence = nullptr;
};

enum class Hit {
  /** `buffer` holds the range. */
  yes,
  /** Some block is not verified, or was taken away while it was read. */
  no,
  /** The store is shorter than it must be, or reading it failed. */
  failed,
};

/** Reads [offset, offset + length) into `buffer` (4 KiB aligned). The range lies within the store. */
Hit read_store(const StoreView& store, std::uint64_t offset, std::uint32_t length, std::uint8_t* buffer);

}  // namespace dedup::fuse
