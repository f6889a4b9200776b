// Runs native work off the JavaScript thread and settles a Promise with its outcome on the JavaScript thread.
// Work that can wait in the kernel gets a thread of its own; work that needs the CPU shares a pool with one thread a
// core.
#pragma once

#include <napi.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

#include "error.h"

namespace dedup {

/** A fixed set of threads for work that keeps a core busy: inflate, SHA-256. Must not be given work that waits. */
class Pool {
 public:
  explicit Pool(unsigned threads);
  ~Pool();
  /** Any thread. After close() began the work is dropped (destroyed without a call). */
  void submit(std::function<void()> work);
  unsigned size() const { return static_cast<unsigned>(threads_.size()); }

 private:
  void run();
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;  // mutex_
  bool closing_ = false;                     // mutex_
  std::vector<std::thread> threads_;         // constructor and destructor only
};

/** What one JavaScript environment owns of the addon. Closed by an environment cleanup hook. */
class AddonState : public std::enable_shared_from_this<AddonState> {
 public:
  /** Creates the state of this environment; called once, by the addon's init. */
  static void create(Napi::Env env);
  /** JS thread. What another thread keeps must be a shared_from_this() of it. */
  static AddonState& of(Napi::Env env);

  /** JS thread: one more Promise is open; the event loop stays alive until `settled`. */
  void begin();
  void settled();
  /** Any thread: calls `job` on the JS thread soon. False, without a call ever, when the environment is going. */
  bool post(std::function<void(Napi::Env)> job);
  /** JS thread: runs `body` on a new thread, which close() joins. */
  void start_thread(std::function<void()> body);
  /** JS thread; the pool starts with its first use. */
  Pool& pool();
  /** JS thread: `closer` runs at teardown before threads are joined. Returns a token for `forget_closer`. */
  std::uint64_t add_closer(std::function<void()> closer);
  void forget_closer(std::uint64_t token);

  AddonState(const AddonState&) = delete;
  AddonState& operator=(const AddonState&) = delete;
  ~AddonState();

 private:
  explicit AddonState(Napi::Env env);
  static void call_js(napi_env env, napi_value, void* context, void*);
  void close();
  void drain(Napi::Env env);

  struct Worker {
    std::thread thread;
    bool done = false;
  };

  const Napi::Env env_;
  napi_threadsafe_function calls_ = nullptr;                // constructor and close()
  std::uint64_t open_promises_ = 0;                         // JS thread
  std::unique_ptr<Pool> pool_;                              // JS thread
  std::map<std::uint64_t, std::function<void()>> closers_;  // JS thread
  std::uint64_t next_token_ = 1;                            // JS thread

  std::mutex mutex_;
  std::condition_variable worker_done_;
  std::deque<std::function<void(Napi::Env)>> jobs_;  // mutex_
  std::map<std::uint64_t, Worker> workers_;          // mutex_
  bool closed_ = false;                              // mutex_
};

/**
 * A Promise that any thread may settle, once, with a value made on the JS thread. Dropped without an outcome it rejects
 * INTERNAL, so that no caller waits for ever.
 */
class Settler {
 public:
  /** JS thread. */
  static std::shared_ptr<Settler> create(Napi::Env env);
  Napi::Promise promise() const { return deferred_.Promise(); }
  /** Any thread. `convert` runs on the JS thread. Calls after the first have no effect. */
  void resolve(std::function<Napi::Value(Napi::Env)> convert);
  void reject(std::exception_ptr failure);
  ~Settler();

 private:
  Settler(Napi::Env env, std::shared_ptr<AddonState> state);
  bool take();
  const std::shared_ptr<AddonState> state_;
  const Napi::Promise::Deferred deferred_;
  std::mutex mutex_;
  bool settled_ = false;  // mutex_
};

/** The two ways of `run_on_*`: `work` runs off the JS thread; `convert(env, result)` makes the value on the JS thread.
 */
template <class Work, class Convert>
std::function<void()> settling(std::shared_ptr<Settler> settler, Work work, Convert convert) {
  using Result = std::invoke_result_t<Work&>;
  return [settler = std::move(settler), work = std::move(work), convert = std::move(convert)]() mutable {
    try {
      if constexpr (std::is_void_v<Result>) {
        work();
        settler->resolve([convert](Napi::Env env) -> Napi::Value { return convert(env); });
      } else {
        auto result = std::make_shared<Result>(work());
        settler->resolve([convert, result](Napi::Env env) -> Napi::Value { return convert(env, *result); });
      }
    } catch (...) {
      settler->reject(std::current_exception());
    }
  };
}

/** For system calls that may wait, for our own transport too: a thread of their own. JS thread. */
template <class Work, class Convert>
Napi::Promise run_on_thread(Napi::Env env, Work work, Convert convert) {
  auto settler = Settler::create(env);
  Napi::Promise promise = settler->promise();
  AddonState::of(env).start_thread(settling(std::move(settler), std::move(work), std::move(convert)));
  return promise;
}

/** For CPU work: the pool. JS thread. */
template <class Work, class Convert>
Napi::Promise run_on_pool(Napi::Env env, Work work, Convert convert) {
  auto settler = Settler::create(env);
  Napi::Promise promise = settler->promise();
  AddonState::of(env).pool().submit(settling(std::move(settler), std::move(work), std::move(convert)));
  return promise;
}

/** `convert` of work without a result. */
inline Napi::Value to_undefined(Napi::Env env) { return env.Undefined(); }

}  // namespace dedup
