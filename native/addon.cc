// Entry point of the native addon, loaded by src/fs/native.ts only. Collects what the folders export.
#include "error.h"
#include "promise_thread.h"
#include "registry.h"

namespace dedup {

namespace {

Napi::Object init(Napi::Env env, Napi::Object exports) {
  AddonState::create(env);
  register_mount(env, exports);
  register_loop(env, exports);
  register_fd(env, exports);
  register_xattr(env, exports);
  register_presence(env, exports);
  register_fuse(env, exports);
  register_inflate(env, exports);
  register_store(env, exports);
  register_hash(env, exports);
  register_thread(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(dedup_native, init)

}  // namespace dedup
