// streamHasher as src/fs/native.ts declares it: argument checks, buffers and threads around stream_hasher.h.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "hash/stream_hasher.h"
#include "kept_alive.h"
#include "promise_thread.h"
#include "registry.h"
#include "strand.h"

namespace dedup {
namespace {

/** Offset of a range of zeros that are not in the stream. */
constexpr std::uint32_t kHole = 0xffffffff;
/** Numbers per range: offset, length, 1 when the piece ends with it. */
constexpr std::size_t kRangeNumbers = 3;

std::vector<hash::Range> to_ranges(const Napi::Value& value, std::size_t available) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array)
    throw Error("INVALID_ARGUMENT", "ranges must be a Uint32Array");
  const auto numbers = value.As<Napi::Uint32Array>();
  const std::uint32_t* from = numbers.Data();
  const std::size_t count = numbers.ElementLength() / kRangeNumbers;
  if (count * kRangeNumbers != numbers.ElementLength())
    throw Error("INVALID_ARGUMENT", "ranges must have three numbers each");
  std::vector<hash::Range> ranges(count);
  for (hash::Range& range : ranges) {
    range.zeros = from[0] == kHole;
    range.offset = from[0];
    range.length = from[1];
    range.ends = from[2] != 0;
    if (!range.zeros && (range.offset > available || range.length > available - range.offset))
      throw Error("INVALID_ARGUMENT", "a range lies beyond the end of the bytes");
    from += kRangeNumbers;
  }
  return ranges;
}

/** The JS object of one StreamHasher. Calls are worked on in order; it keeps its state until the last one is over. */
class JsStreamHasher : public Napi::ObjectWrap<JsStreamHasher> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "StreamHasher",
        {InstanceMethod<&JsStreamHasher::push>("push"), InstanceMethod<&JsStreamHasher::finish>("finish")});
  }

  explicit JsStreamHasher(const Napi::CallbackInfo& info) : Napi::ObjectWrap<JsStreamHasher>(info) {
    try {
      hasher_ = std::make_shared<hash::StreamHasher>();
      strand_ = std::make_shared<Strand>(AddonState::of(info.Env()).pool());
    } catch (const Napi::Error&) {
      throw;
    } catch (...) {
      throw to_js(info.Env(), std::current_exception());
    }
  }

 private:
  Napi::Value push(const Napi::CallbackInfo& info) {
    try {
      if (hasher_ == nullptr) throw Error("CLOSED", "the stream hasher is finished");
      Napi::Uint8Array bytes = to_bytes(info[0], "bytes");
      const std::span<const std::uint8_t> data(bytes.Data(), bytes.ByteLength());
      auto ranges = to_ranges(info[1], data.size());
      auto kept = std::make_shared<KeptAlive>(info.Env());
      kept->keep(bytes);
      return run_on_strand(
          info.Env(), *strand_,
          [kept, hasher = hasher_, data, ranges = std::move(ranges)] { return hasher->push(data, ranges); },
          [](Napi::Env env, const std::vector<std::uint8_t>& digests) -> Napi::Value {
            return Napi::Buffer<std::uint8_t>::Copy(env, digests.data(), digests.size());
          });
    } catch (...) {
      return rejected(info.Env(), std::current_exception());
    }
  }

  Napi::Value finish(const Napi::CallbackInfo& info) {
    try {
      if (hasher_ == nullptr) throw Error("CLOSED", "the stream hasher is finished");
      return run_on_strand(
          info.Env(), *strand_, [hasher = std::exchange(hasher_, nullptr)] { return hasher->finish(); },
          [](Napi::Env env, const store::Digest& digest) -> Napi::Value {
            return Napi::Buffer<std::uint8_t>::Copy(env, digest.data(), digest.size());
          });
    } catch (...) {
      return rejected(info.Env(), std::current_exception());
    }
  }

  std::shared_ptr<hash::StreamHasher> hasher_;  // JS thread; null after finish. The object itself: the strand
  std::shared_ptr<Strand> strand_;
};

Napi::Value stream_hasher(const Napi::CallbackInfo& info) {
  return static_cast<Napi::FunctionReference*>(info.Data())->Value().New({});
}

}  // namespace

void register_hash(Napi::Env env, Napi::Object exports) {
  auto* constructor = new Napi::FunctionReference(Napi::Persistent(JsStreamHasher::define(env)));
  env.AddCleanupHook([constructor] { delete constructor; });
  exports.Set("streamHasher", Napi::Function::New<edge<stream_hasher>>(env, "streamHasher", constructor));
}

}  // namespace dedup
