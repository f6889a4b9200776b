// Runs work of one owner in order and one at a time on the pool, without keeping a pool thread between two pieces of
// it: others' work in the pool gets its turn. Used by objects that take calls before the last one is over.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "promise_thread.h"

namespace dedup {

class Strand : public std::enable_shared_from_this<Strand> {
 public:
  /** `pool` lives as long as the JavaScript environment. */
  explicit Strand(Pool& pool) : pool_(pool) {}
  Strand(const Strand&) = delete;
  Strand& operator=(const Strand&) = delete;

  /** JS thread. `work` must not throw, nor hold the strand; it is destroyed without a call when the pool closes first.
   */
  void submit(std::function<void()> work) {
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(std::move(work));
      if (std::exchange(running_, true)) return;
    }
    schedule();
  }

  /** Any thread: pieces of work that have not begun. */
  std::size_t waiting() {
    std::lock_guard lock(mutex_);
    return queue_.size();
  }

 private:
  void schedule() {
    pool_.submit([self = shared_from_this()] { self->run_one(); });
  }

  void run_one() {
    std::function<void()> work;
    {
      std::lock_guard lock(mutex_);
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
    // Gone before the next starts: it may hold the last reference to something.
    work = nullptr;
    {
      std::lock_guard lock(mutex_);
      running_ = !queue_.empty();
      if (!running_) return;
    }
    schedule();
  }

  Pool& pool_;
  std::mutex mutex_;
  std::deque<std::function<void()>> queue_;  // mutex_
  bool running_ = false;                     // mutex_; run_one is scheduled or runs
};

/** For CPU work of one owner: `strand`. JS thread. */
template <class Work, class Convert>
Napi::Promise run_on_strand(Napi::Env env, Strand& strand, Work work, Convert convert) {
  auto settler = Settler::create(env);
  Napi::Promise promise = settler->promise();
  strand.submit(settling(std::move(settler), std::move(work), std::move(convert)));
  return promise;
}

}  // namespace dedup
