// Keeps JavaScript buffers alive while native threads read or write their memory. Held by the work of a promise; may be
// destroyed on any thread, and the references go on the JS thread then.
#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "promise_thread.h"

namespace dedup {

class KeptAlive {
 public:
  /** JS thread. */
  explicit KeptAlive(Napi::Env env) : state_(AddonState::of(env)), references_(new References) {}
  /** JS thread. The caller must not detach or transfer the buffer before the promise is settled. */
  void keep(const Napi::Object& value) { references_->push_back(Napi::Persistent(value)); }
  ~KeptAlive() {
    References* references = references_;
    // When the environment is going nobody may touch it from here; it frees the values itself.
    (void)state_.post([references](Napi::Env) { delete references; });
  }
  KeptAlive(const KeptAlive&) = delete;
  KeptAlive& operator=(const KeptAlive&) = delete;

 private:
  using References = std::vector<Napi::ObjectReference>;
  AddonState& state_;
  References* const references_;
};

}  // namespace dedup
