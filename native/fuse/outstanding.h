// The table of READs that were read from the kernel and not answered yet. Each leaves it exactly once: taken by an
// answer or drained by the end of the session. Any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fuse/channel.h"

namespace dedup::fuse {

struct Miss {
  std::uint64_t id = 0;
  std::uint64_t unique = 0;  // the kernel's name of the request
  std::uint64_t file = 0;
  std::uint64_t offset = 0;  // bytes
  std::uint32_t length = 0;  // bytes
  bool damaged = false;      // some of it was present, and is not what was written
  std::shared_ptr<const Channel> channel;
};

class Outstanding {
 public:
  /**
   * Enters a READ and gives it its id; false once closed: the caller answers it. `*first` tells whether the queue for
   * `take_queued` was empty, that is, whether somebody has to be woken.
   */
  bool add(Miss miss, bool* first) {
    std::lock_guard lock(mutex_);
    if (closed_) return false;
    *first = queued_.empty();
    miss.id = next_id_++;
    queued_.push_back(miss.id);
    table_.emplace(miss.id, std::move(miss));
    return true;
  }

  /** What was entered since the last call and is still unanswered. */
  std::vector<Miss> take_queued() {
    std::lock_guard lock(mutex_);
    std::vector<Miss> misses;
    misses.reserve(queued_.size());
    for (const std::uint64_t id : queued_) {
      auto found = table_.find(id);
      if (found != table_.end()) misses.push_back(found->second);
    }
    queued_.clear();
    return misses;
  }

  /** Removes one: the caller answers it, nobody else will. */
  std::optional<Miss> take(std::uint64_t id) {
    std::lock_guard lock(mutex_);
    auto found = table_.find(id);
    if (found == table_.end()) return std::nullopt;
    std::optional<Miss> miss(std::move(found->second));
    table_.erase(found);
    return miss;
  }

  /** Refuses new entries and removes all: the caller answers them. */
  std::vector<Miss> close() {
    std::lock_guard lock(mutex_);
    closed_ = true;
    std::vector<Miss> misses;
    misses.reserve(table_.size());
    for (auto& [id, miss] : table_) misses.push_back(std::move(miss));
    table_.clear();
    queued_.clear();
    return misses;
  }

  bool closed() const {
    std::lock_guard lock(mutex_);
    return closed_;
  }

  std::size_t size() const {
    std::lock_guard lock(mutex_);
    return table_.size();
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::uint64_t, Miss> table_;  // mutex_
  std::vector<std::uint64_t> queued_;              // mutex_
  std::uint64_t next_id_ = 1;                      // mutex_
  bool closed_ = false;                            // mutex_
};

}  // namespace dedup::fuse
