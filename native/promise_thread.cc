#include "promise_thread.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <utility>

namespace dedup {

namespace {
// How long teardown waits for a thread that sits in a system call before it is abandoned.
constexpr std::chrono::seconds kJoinLimit{5};
}  // namespace

Pool::Pool(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) threads_.emplace_back([this] { run(); });
}

Pool::~Pool() {
  std::deque<std::function<void()>> dropped;
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
    dropped.swap(queue_);
  }
  wake_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::submit(std::function<void()> work) {
  {
    std::lock_guard lock(mutex_);
    if (closing_) return;
    queue_.push_back(std::move(work));
  }
  wake_.notify_one();
}

void Pool::run() {
  for (;;) {
    std::function<void()> work;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return closing_ || !queue_.empty(); });
      if (closing_) return;
      work = std::move(queue_.front());
      queue_.pop_front();
    }
    work();
  }
}

void AddonState::create(Napi::Env env) {
  auto* held = new std::shared_ptr<AddonState>(new AddonState(env));
  env.SetInstanceData(held);
  // Hooks run last in, first out: this one before those of the thread-safe function and the instance data.
  napi_add_env_cleanup_hook(
      env, [](void* data) { static_cast<AddonState*>(data)->close(); }, held->get());
}

AddonState& AddonState::of(Napi::Env env) { return **env.GetInstanceData<std::shared_ptr<AddonState>>(); }

AddonState::AddonState(Napi::Env env) : env_(env) {
  const auto name = Napi::String::New(env, "dedup_native");
  const napi_status status =
      napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, call_js, &calls_);
  if (status != napi_ok) throw Error("INTERNAL", "cannot create the thread-safe function of the addon");
  napi_unref_threadsafe_function(env, calls_);
}

AddonState::~AddonState() = default;

void AddonState::begin() {
  if (open_promises_++ == 0) napi_ref_threadsafe_function(env_, calls_);
}

void AddonState::settled() {
  if (--open_promises_ == 0) napi_unref_threadsafe_function(env_, calls_);
}

bool AddonState::post(std::function<void(Napi::Env)> job) {
  std::lock_guard lock(mutex_);
  if (closed_) return false;
  jobs_.push_back(std::move(job));
  // One wake-up carries all that was queued before it ran.
  if (jobs_.size() == 1) napi_call_threadsafe_function(calls_, nullptr, napi_tsfn_nonblocking);
  return true;
}

void AddonState::call_js(napi_env env, napi_value, void* context, void*) {
  if (env != nullptr) static_cast<AddonState*>(context)->drain(env);
}

void AddonState::drain(Napi::Env env) {
  std::deque<std::function<void(Napi::Env)>> jobs;
  {
    std::lock_guard lock(mutex_);
    jobs.swap(jobs_);
  }
  for (auto& job : jobs) {
    Napi::HandleScope scope(env);
    try {
      job(env);
    } catch (...) {
      napi_fatal_exception(env, to_js(env, std::current_exception()).Value());
    }
  }
}

void AddonState::start_thread(std::function<void()> body) {
  std::lock_guard lock(mutex_);
  if (closed_) return;
  const std::uint64_t id = next_token_++;
  // The map node exists before the thread does; the thread finds it under the mutex we hold.
  Worker& worker = workers_[id];
  try {
    worker.thread = std::thread([this, self = shared_from_this(), id, body = std::move(body)]() mutable {
      body();
      body = nullptr;  // Releases what it captured before teardown may go on.
      {
        std::lock_guard lock(mutex_);
        workers_[id].done = true;
        worker_done_.notify_all();
      }
      post([this, id](Napi::Env) {  // Called only while this environment, and with it `this`, lives.
        std::thread finished;
        {
          std::lock_guard lock(mutex_);
          auto found = workers_.find(id);
          if (found == workers_.end()) return;
          finished = std::move(found->second.thread);
          workers_.erase(found);
        }
        finished.join();
      });
    });
  } catch (...) {
    workers_.erase(id);
    throw sys_error(EAGAIN, "pthread_create(3)");
  }
}

Pool& AddonState::pool() {
  if (!pool_) pool_ = std::make_unique<Pool>(std::max(1U, std::thread::hardware_concurrency()));
  return *pool_;
}

std::uint64_t AddonState::add_closer(std::function<void()> closer) {
  const std::uint64_t token = next_token_++;
  closers_[token] = std::move(closer);
  return token;
}

void AddonState::forget_closer(std::uint64_t token) { closers_.erase(token); }

void AddonState::close() {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
  }
  // Sessions first: what waits in the kernel for them returns then.
  auto closers = std::exchange(closers_, {});
  for (auto& [token, closer] : closers) closer();
  pool_.reset();
  // Destroyed after the lock is released: what they hold may post in its destructor.
  std::deque<std::function<void(Napi::Env)>> dropped;
  {
    std::unique_lock lock(mutex_);
    closed_ = true;
    dropped.swap(jobs_);
    worker_done_.wait_for(lock, kJoinLimit, [this] {
      for (auto& [id, worker] : workers_)
        if (!worker.done) return false;
      return true;
    });
    for (auto& [id, worker] : workers_) {
      // It sits in a system call and keeps this object alive until it returns.
      if (!worker.done) worker.thread.detach();
    }
  }
  for (auto& [id, worker] : workers_)
    if (worker.thread.joinable()) worker.thread.join();
  napi_release_threadsafe_function(calls_, napi_tsfn_abort);
}

Settler::Settler(Napi::Env env, std::shared_ptr<AddonState> state) : state_(std::move(state)), deferred_(env) {}

std::shared_ptr<Settler> Settler::create(Napi::Env env) {
  AddonState& state = AddonState::of(env);
  std::shared_ptr<Settler> settler(new Settler(env, state.shared_from_this()));
  state.begin();
  return settler;
}

bool Settler::take() {
  std::lock_guard lock(mutex_);
  return !std::exchange(settled_, true);
}

void Settler::resolve(std::function<Napi::Value(Napi::Env)> convert) {
  if (!take()) return;
  state_->post([state = state_.get(), deferred = deferred_, convert = std::move(convert)](Napi::Env env) {
    state->settled();
    try {
      deferred.Resolve(convert(env));
    } catch (...) {
      deferred.Reject(to_js(env, std::current_exception()).Value());
    }
  });
}

void Settler::reject(std::exception_ptr failure) {
  if (!take()) return;
  state_->post([state = state_.get(), deferred = deferred_, failure = std::move(failure)](Napi::Env env) {
    state->settled();
    deferred.Reject(to_js(env, failure).Value());
  });
}

Settler::~Settler() { reject(std::make_exception_ptr(Error("INTERNAL", "native work ended without an outcome"))); }

}  // namespace dedup
