// gzipIndexer and decodeSpans as src/fs/native.ts declares them: argument checks, buffers and threads around
// gzip_indexer.h and span_decoder.h.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "aligned_memory.h"
#include "arguments.h"
#include "inflate/gzip_indexer.h"
#include "inflate/isal.h"
#include "inflate/span_decoder.h"
#include "kept_alive.h"
#include "promise_thread.h"
#include "registry.h"
#include "strand.h"

namespace dedup {
namespace {

using inflate::Compression;
using inflate::Span;

/** A Buffer over `memory`, which it frees. */
Napi::Value to_buffer(Napi::Env env, MallocBytes& memory, std::size_t start, std::size_t length) {
  if (length == 0) return Napi::Buffer<std::uint8_t>::New(env, 0);
  auto buffer = Napi::Buffer<std::uint8_t>::New(
      env, memory.get() + start, length, [](Napi::Env, std::uint8_t*, std::uint8_t* base) { std::free(base); },
      memory.get());
  (void)memory.release();
  return buffer;
}

Napi::Value to_js_points(Napi::Env env, const inflate::PushResult& pushed) {
  auto points = Napi::Array::New(env, pushed.points.size());
  std::uint32_t index = 0;
  for (const auto& point : pushed.points) {
    auto object = Napi::Object::New(env);
    object.Set("outOffset", static_cast<double>(point.out_offset));
    object.Set("inOffset", static_cast<double>(point.in_offset));
    object.Set("bits", point.bits);
    object.Set("window", Napi::Buffer<std::uint8_t>::Copy(env, point.window.data(), point.window.size()));
    object.Set("memberStart", Napi::Boolean::New(env, point.member_start));
    points.Set(index++, object);
  }
  return points;
}

/** Each queued call holds its input and, when it is over, its output: a caller bounds both. */
constexpr std::size_t kMaxQueued = 8;

/**
 * The JS object of one GzipIndexer. Calls are worked on in order, so that the next is at hand when one ends. `close`
 * may come while pushes are queued: they end normally and are the last.
 */
class JsGzipIndexer : public Napi::ObjectWrap<JsGzipIndexer> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(env, "GzipIndexer",
                       {InstanceMethod<&JsGzipIndexer::push>("push"), InstanceMethod<&JsGzipIndexer::finish>("finish"),
                        InstanceMethod<&JsGzipIndexer::close>("close")});
  }

  explicit JsGzipIndexer(const Napi::CallbackInfo& info) : Napi::ObjectWrap<JsGzipIndexer>(info) {
    try {
      const std::uint64_t span_bytes = to_u64(to_object(info[0], "options").Get("spanBytes"), "spanBytes");
      if (span_bytes == 0) throw Error("INVALID_ARGUMENT", "spanBytes must be above 0");
      indexer_ = std::make_shared<inflate::GzipIndexer>(span_bytes);
      strand_ = std::make_shared<Strand>(AddonState::of(info.Env()).pool());
    } catch (const Napi::Error&) {
      throw;
    } catch (...) {
      throw to_js(info.Env(), std::current_exception());
    }
  }

 private:
  /** Throws when it is closed, or when more is queued than a caller can have reason to. */
  std::shared_ptr<inflate::GzipIndexer> open_indexer() const {
    if (indexer_ == nullptr) throw Error("CLOSED", "the gzip indexer is closed");
    if (strand_->waiting() >= kMaxQueued)
      throw Error("INVALID_ARGUMENT", "the gzip indexer takes " + std::to_string(kMaxQueued) + " calls at a time");
    return indexer_;
  }

  Napi::Value push_checked(const Napi::CallbackInfo& info) {
    Napi::Uint8Array input = to_bytes(info[0], "input");
    auto indexer = open_indexer();
    auto kept = std::make_shared<KeptAlive>(info.Env());
    kept->keep(input);
    std::span<std::uint8_t> into;
    if (!info[1].IsUndefined()) {
      Napi::Uint8Array given = to_bytes(info[1], "into");
      kept->keep(given);
      into = {given.Data(), given.ByteLength()};
    }
    return run_on_strand(
        info.Env(), *strand_,
        [indexer, kept, data = input.Data(), length = input.ByteLength(), into] {
          return indexer->push(data, length, into);
        },
        [](Napi::Env env, inflate::PushResult& pushed) -> Napi::Value {
          auto result = Napi::Object::New(env);
          result.Set("points", to_js_points(env, pushed));
          if (pushed.memory == nullptr) {
            // The caller, who has the Buffer, makes the view.
            result.Set("start", static_cast<double>(pushed.start));
            result.Set("length", static_cast<double>(pushed.length));
          } else {
            result.Set("output", to_buffer(env, pushed.memory, pushed.start, pushed.length));
          }
          return result;
        });
  }

  Napi::Value finish_checked(const Napi::CallbackInfo& info) {
    auto indexer = open_indexer();
    return run_on_strand(
        info.Env(), *strand_, [indexer] { indexer->finish(); }, to_undefined);
  }

  /** As edge_async, for a method. */
  template <auto method>
  Napi::Value guarded(const Napi::CallbackInfo& info) {
    try {
      return (this->*method)(info);
    } catch (...) {
      return rejected(info.Env(), std::current_exception());
    }
  }
  Napi::Value push(const Napi::CallbackInfo& info) { return guarded<&JsGzipIndexer::push_checked>(info); }
  Napi::Value finish(const Napi::CallbackInfo& info) { return guarded<&JsGzipIndexer::finish_checked>(info); }
  Napi::Value close(const Napi::CallbackInfo& info) {
    indexer_.reset();
    return info.Env().Undefined();
  }

  std::shared_ptr<inflate::GzipIndexer> indexer_;  // JS thread; null after close. The object itself: the strand
  std::shared_ptr<Strand> strand_;
};

Napi::Value gzip_indexer(const Napi::CallbackInfo& info) {
  return static_cast<Napi::FunctionReference*>(info.Data())->Value().New({info[0]});
}

/** One decodeSpans call, shared by the pool threads that work on it. */
struct DecodeState {
  Compression compression = Compression::kNone;
  std::vector<Span> spans;
  MallocBytes memory;
  std::size_t output_bytes = 0;
  /** Parts of the result no span fills; zeroed, so that no stale memory gets out. */
  std::vector<std::span<std::uint8_t>> gaps;
  std::shared_ptr<Settler> settler;
  std::shared_ptr<KeptAlive> kept;

  std::atomic<std::size_t> next{0};
  std::atomic<std::size_t> workers{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::exception_ptr failure;  // mutex
};

Compression to_compression(const Napi::Value& value) {
  const std::string name = to_text(value, "compression");
  if (name == "none") return Compression::kNone;
  if (name == "gzip") return Compression::kGzip;
  if (name == "zstd") return Compression::kZstd;
  throw Error("INVALID_ARGUMENT", "compression must be none, gzip or zstd");
}

void find_gaps(DecodeState& state) {
  std::vector<std::span<std::uint8_t>> slices;
  for (const Span& span : state.spans)
    if (!span.output.empty()) slices.push_back(span.output);
  std::sort(slices.begin(), slices.end(), [](const auto& a, const auto& b) { return a.data() < b.data(); });
  std::uint8_t* at = state.memory.get();
  for (const auto& slice : slices) {
    if (slice.data() < at) throw Error("INVALID_ARGUMENT", "two spans have overlapping outputs");
    if (slice.data() > at) state.gaps.emplace_back(at, slice.data());
    at = slice.data() + slice.size();
  }
  std::uint8_t* end = state.memory.get() + state.output_bytes;
  if (at < end) state.gaps.emplace_back(at, end);
}

void decode_one(DecodeState& state, std::size_t index) {
  const Span& span = state.spans[index];
  try {
    inflate::decode_span(state.compression, span);
  } catch (const Error& error) {
    throw Error(error.code(), "span " + std::to_string(index) + " (from byte " + std::to_string(span.input_offset) +
                                  " of the run): " + error.what());
  }
}

void decode_worker(const std::shared_ptr<DecodeState>& state) {
  while (!state->failed.load()) {
    const std::size_t index = state->next.fetch_add(1);
    if (index >= state->spans.size()) break;
    try {
      decode_one(*state, index);
    } catch (...) {
      std::lock_guard lock(state->mutex);
      if (!state->failed.exchange(true)) state->failure = std::current_exception();
    }
  }
  if (state->workers.fetch_sub(1) != 1) return;
  // The last worker: all others are done with the memory.
  auto settler = std::move(state->settler);
  state->kept.reset();
  if (state->failed.load()) {
    settler->reject(state->failure);
    return;
  }
  for (const auto& gap : state->gaps) std::memset(gap.data(), 0, gap.size());
  settler->resolve([state](Napi::Env env) { return to_buffer(env, state->memory, 0, state->output_bytes); });
}

/** Above any run the loader fetches; a size from a damaged index must not exhaust memory. */
constexpr std::uint64_t kMaxOutputBytes = std::uint64_t{1} << 30;

Napi::Value decode_spans(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object job = to_object(info[0], "job");
  auto state = std::make_shared<DecodeState>();
  state->compression = to_compression(job.Get("compression"));
  const std::uint64_t output_bytes = to_u64(job.Get("outputLength"), "outputLength");
  if (output_bytes > kMaxOutputBytes) throw Error("INVALID_ARGUMENT", "outputLength is above 1 GiB");
  state->output_bytes = output_bytes;
  state->memory = allocate_aligned(output_bytes);
  state->kept = std::make_shared<KeptAlive>(env);
  Napi::Uint8Array input = to_bytes(job.Get("input"), "input");
  state->kept->keep(input);

  const Napi::Value list = job.Get("spans");
  if (!list.IsArray()) throw Error("INVALID_ARGUMENT", "spans must be an array");
  const Napi::Array spans = list.As<Napi::Array>();
  const std::uint32_t count = spans.Length();
  state->spans.reserve(count);
  for (std::uint32_t i = 0; i < count; i++) {
    Napi::HandleScope scope(env);
    const Napi::Object object = to_object(spans.Get(i), "span");
    Span span;
    span.input = {input.Data(), input.ByteLength()};
    span.input_offset = to_u64(object.Get("inputOffset"), "inputOffset");
    span.bits = static_cast<std::uint32_t>(std::min<std::uint64_t>(to_u64(object.Get("bits"), "bits"), 8));
    span.member_start = to_bool(object.Get("memberStart"), "memberStart");
    Napi::Uint8Array window = to_bytes(object.Get("window"), "window");
    if (window.ByteLength() > 0) state->kept->keep(window);
    span.window = {window.Data(), window.ByteLength()};
    const std::uint64_t offset = to_u64(object.Get("outputOffset"), "outputOffset");
    const std::uint64_t length = to_u64(object.Get("outputLength"), "outputLength");
    if (offset > output_bytes || length > output_bytes - offset)
      throw Error("INVALID_ARGUMENT", "a span lies beyond the end of the result");
    span.output = {state->memory.get() + offset, length};
    state->spans.push_back(span);
  }
  find_gaps(*state);

  Pool& pool = AddonState::of(env).pool();
  const std::size_t workers = std::max<std::size_t>(1, std::min<std::size_t>(pool.size(), count));
  state->settler = Settler::create(env);
  const Napi::Promise promise = state->settler->promise();
  state->workers.store(workers);
  for (std::size_t i = 0; i < workers; i++) pool.submit([state] { decode_worker(state); });
  return promise;
}

Napi::Value inflater(const Napi::CallbackInfo& info) {
  return Napi::String::New(info.Env(), inflate::isal_available() ? "isa-l" : "zlib");
}

}  // namespace

void register_inflate(Napi::Env env, Napi::Object exports) {
  auto* constructor = new Napi::FunctionReference(Napi::Persistent(JsGzipIndexer::define(env)));
  env.AddCleanupHook([constructor] { delete constructor; });
  exports.Set("gzipIndexer", Napi::Function::New<edge<gzip_indexer>>(env, "gzipIndexer", constructor));
  export_async<decode_spans>(env, exports, "decodeSpans");
  export_function<inflater>(env, exports, "inflater");
}

}  // namespace dedup
