// Reads of images that somebody wants to know about: what hits are answered natively would be seen by nobody else.
// Written by the reader threads, taken by the JS thread; bounded, what does not fit is lost and counted.
#pragma once

#include <time.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <unordered_set>
#include <utility>
#include <vector>

namespace dedup::fuse {

struct SeenRead {
  std::uint64_t file = 0;
  std::uint64_t offset = 0;  // bytes
  std::uint32_t length = 0;  // bytes
  bool missed = false;
  double at_ms = 0;  // CLOCK_MONOTONIC
};

class ReadLog {
 public:
  /** Entries that are kept between two calls of take(). */
  static constexpr std::size_t kCapacity = 1u << 16;

  void watch(std::uint64_t file, bool on) {
    std::lock_guard lock(mutex_);
    if (on)
      files_.insert(file);
    else
      files_.erase(file);
    watching_.store(!files_.empty(), std::memory_order_relaxed);
  }

  /** One relaxed load while nobody watches anything. */
  void add(std::uint64_t file, std::uint64_t offset, std::uint32_t length, bool missed) {
    if (!watching_.load(std::memory_order_relaxed)) return;
    std::lock_guard lock(mutex_);
    if (!files_.contains(file)) return;
    if (reads_.size() >= kCapacity) {
      lost_++;
      return;
    }
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    reads_.push_back(
        {file, offset, length, missed, static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6});
  }

  /** What was added since the last call, in order, and how much was lost meanwhile. */
  std::pair<std::vector<SeenRead>, std::uint64_t> take() {
    std::lock_guard lock(mutex_);
    return {std::exchange(reads_, {}), std::exchange(lost_, 0)};
  }

 private:
  std::atomic<bool> watching_{false};
  mutable std::mutex mutex_;
  std::unordered_set<std::uint64_t> files_;  // mutex_
  std::vector<SeenRead> reads_;              // mutex_
  std::uint64_t lost_ = 0;                   // mutex_
};

}  // namespace dedup::fuse
