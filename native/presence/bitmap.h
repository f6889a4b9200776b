// The presence bitmap: one bit per 4 KiB block of the store, block b in byte b / 8, bit b % 8. Set by whoever has
// written verified bytes, tested by the threads that answer the kernel. A set bit is the only licence to serve a block.
#pragma once

#include <cstdint>

namespace dedup::presence {

inline constexpr std::uint64_t kBlockBytes = 4096;

/**
 * Sets `count` bits from block `first`, with release order: what was written to the store before is seen by whoever
 * tests the bits. The caller has checked the range against the size of the bitmap.
 */
void set(std::uint8_t* bitmap, std::uint64_t first, std::uint64_t count);

/** Clears `count` bits and then advances `clear_epoch`. The caller punches or overwrites only afterwards. */
void clear(std::uint8_t* bitmap, std::uint64_t first, std::uint64_t count);

/** True when all `count` bits from block `first` are set, with acquire order. True for `count` 0. */
bool all_set(const std::uint8_t* bitmap, std::uint64_t first, std::uint64_t count);

/**
 * Number of calls of `clear` in this process. Who reads it before `all_set` and again after the read from the store,
 * and finds it unchanged, knows that no block was taken away in between.
 */
std::uint64_t clear_epoch();

}  // namespace dedup::presence
