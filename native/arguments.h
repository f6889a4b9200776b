// Reads typed values out of JavaScript arguments. Every exported function uses it; a wrong type is INVALID_ARGUMENT.
#pragma once

#include <napi.h>

#include <cmath>
#include <cstdint>
#include <string>

#include "error.h"

namespace dedup {

inline std::uint64_t to_u64(const Napi::Value& value, const char* name) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  // 2^53 - 1: the largest integer a JavaScript number holds exactly.
  if (!(number >= 0 && number <= 9007199254740991.0) || std::floor(number) != number)
    throw Error("INVALID_ARGUMENT", std::string(name) + " must be a non-negative integer");
  return static_cast<std::uint64_t>(number);
}

inline int to_fd(const Napi::Value& value, const char* name) {
  const std::uint64_t number = to_u64(value, name);
  if (number > 0x7fffffff) throw Error("INVALID_ARGUMENT", std::string(name) + " is not a descriptor");
  return static_cast<int>(number);
}

/** A string without NUL: it goes to system calls. */
inline std::string to_text(const Napi::Value& value, const char* name) {
  if (!value.IsString()) throw Error("INVALID_ARGUMENT", std::string(name) + " must be a string");
  std::string text = value.As<Napi::String>().Utf8Value();
  if (text.find('\0') != std::string::npos) throw Error("INVALID_ARGUMENT", std::string(name) + " contains NUL");
  return text;
}

inline bool to_bool(const Napi::Value& value, const char* name) {
  if (!value.IsBoolean()) throw Error("INVALID_ARGUMENT", std::string(name) + " must be a boolean");
  return value.As<Napi::Boolean>().Value();
}

inline Napi::Object to_object(const Napi::Value& value, const char* name) {
  if (!value.IsObject()) throw Error("INVALID_ARGUMENT", std::string(name) + " must be an object");
  return value.As<Napi::Object>();
}

inline Napi::Uint8Array to_bytes(const Napi::Value& value, const char* name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint8_array)
    throw Error("INVALID_ARGUMENT", std::string(name) + " must be a Uint8Array");
  return value.As<Napi::Uint8Array>();
}

inline Napi::Function to_function(const Napi::Value& value, const char* name) {
  if (!value.IsFunction()) throw Error("INVALID_ARGUMENT", std::string(name) + " must be a function");
  return value.As<Napi::Function>();
}

}  // namespace dedup
