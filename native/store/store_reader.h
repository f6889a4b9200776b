// Reads a range of the store when every block of it may be served, and checks each block against its sum. The only
// code that reads chunk bytes of the store.
#pragma once

#include <cstdint>

namespace dedup::store {

/** A READ is at most this long. */
inline constexpr std::uint32_t kMaxReadBytes = 1u << 20;

/** The store as its readers see it. Descriptors and bitmap belong to the caller and outlive the readers. */
struct StoreView {
  int fd = -1;
  /** The file of block_sums.h. */
  int sums_fd = -1;
  std::uint64_t bytes = 0;
  std::uint64_t head_bytes = 0;  // answered with zeros, never looked up
  std::uint64_t tail_bytes = 0;  // likewise
  std::uint8_t* presence = nullptr;
  /** Where reads leave their marks (touched.h); may be null. */
  std::uint32_t* touched = nullptr;
};

enum class Hit {
  /** `buffer` holds the range. */
  yes,
  /** Some block is not verified, or was taken away while it was read. */
  no,
  /** Some block is not what was written; it is not present any more. */
  damaged,
  /** The store is shorter than it must be, or reading it failed. */
  failed,
};

/**
 * Reads [offset, offset + length) into `buffer` (4 KiB aligned). The range lies within the store and has at most
 * kMaxReadBytes.
 */
Hit read_store(const StoreView& store, std::uint64_t offset, std::uint32_t length, std::uint8_t* buffer);

}  // namespace dedup::store
