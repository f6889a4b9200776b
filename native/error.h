// The one exception type of the addon and its translation into a JavaScript Error with `code`, `errno` and `path`.
// Nothing else is thrown across the edge: every exported function goes through `edge`.
#pragma once

#include <napi.h>

#include <exception>
#include <stdexcept>
#include <string>

namespace dedup {

/** A failure with the code of src/errors.ts, or the name of an errno ('ENOENT'), as `code`. */
class Error : public std::runtime_error {
 public:
  Error(std::string code, const std::string& message, int err = 0, std::string path = {})
      : std::runtime_error(message), code_(std::move(code)), path_(std::move(path)), errno_(err) {}
  const std::string& code() const { return code_; }
  const std::string& path() const { return path_; }
  int err() const { return errno_; }

 private:
  std::string code_;
  std::string path_;
  int errno_;
};

/** 'ENOENT' for 2; 'E<number>' for one without a known name. */
std::string errno_name(int err);

/** "<doing>: <text of err>" with the name of `err` as code. `doing` names call and operands: "mount(2) /a on /b". */
Error sys_error(int err, const std::string& doing, std::string path = {});

/** The JavaScript Error for any exception in flight. JS thread only. */
Napi::Error to_js(Napi::Env env, const std::exception_ptr& failure);

/** A Promise rejected with it. JS thread only. */
Napi::Promise rejected(Napi::Env env, const std::exception_ptr& failure);

/** Wraps a native function so that any exception leaves as a JavaScript one. */
template <auto function>
Napi::Value edge(const Napi::CallbackInfo& info) {
  try {
    return function(info);
  } catch (const Napi::Error&) {
    throw;
  } catch (...) {
    throw to_js(info.Env(), std::current_exception());
  }
}

/** The same for a function that returns a Promise: any exception becomes its rejection. */
template <auto function>
Napi::Value edge_async(const Napi::CallbackInfo& info) {
  try {
    return function(info);
  } catch (...) {
    return rejected(info.Env(), std::current_exception());
  }
}

/** Adds a native function to the addon's exports. */
template <auto function>
void export_function(Napi::Env env, Napi::Object exports, const char* name) {
  exports.Set(name, Napi::Function::New<edge<function>>(env, name));
}

/** Adds a native function that returns a Promise. */
template <auto function>
void export_async(Napi::Env env, Napi::Object exports, const char* name) {
  exports.Set(name, Napi::Function::New<edge_async<function>>(env, name));
}

}  // namespace dedup
