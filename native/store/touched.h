// When each part of the store was last read: one 32-bit number of seconds since 1970 for each MiB. Written by whoever
// answers a read, asked by the eviction (src/fs/chunks/touched.ts); a lost mark costs nothing but a wrong order.
#pragma once

#include <time.h>

#include <atomic>
#include <cstdint>

namespace dedup::store {

inline constexpr std::uint64_t kTouchedBytes = 1u << 20;

/** Marks [begin, end), which is not empty. A plain store, and only when the second is another one. */
inline void touch(std::uint32_t* touched, std::uint64_t begin, std::uint64_t end) {
  if (touched == nullptr) return;
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME_COARSE, &now);
  const auto second = static_cast<std::uint32_t>(now.tv_sec);
  for (std::uint64_t region = begin / kTouchedBytes; region <= (end - 1) / kTouchedBytes; region++) {
    std::atomic_ref<std::uint32_t> mark(touched[region]);
    if (mark.load(std::memory_order_relaxed) != second) mark.store(second, std::memory_order_relaxed);
  }
}

}  // namespace dedup::store
