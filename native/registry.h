// What each folder adds to the addon's exports. addon.cc calls all of them.
#pragma once

#include <napi.h>

namespace dedup {

void register_mount(Napi::Env env, Napi::Object exports);
void register_loop(Napi::Env env, Napi::Object exports);
void register_fd(Napi::Env env, Napi::Object exports);
void register_xattr(Napi::Env env, Napi::Object exports);
void register_presence(Napi::Env env, Napi::Object exports);
void register_fuse(Napi::Env env, Napi::Object exports);
void register_inflate(Napi::Env env, Napi::Object exports);
void register_store(Napi::Env env, Napi::Object exports);
void register_hash(Napi::Env env, Napi::Object exports);
void register_thread(Napi::Env env, Napi::Object exports);

}  // namespace dedup
