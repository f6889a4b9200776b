// storePieces and sha256 as src/fs/native.ts declares them: argument checks and threads around piece_writer.h.
#include <algorithm>
#include <string>
#include <utility>

#include "arguments.h"
#include "kept_alive.h"
#include "presence/bitmap.h"
#include "promise_thread.h"
#include "registry.h"
#include "store/piece_writer.h"
#include "store/sha256.h"
#include "store/store_reader.h"

namespace dedup {
namespace {

template <class Array>
Array to_numbers(const Napi::Value& value, napi_typedarray_type type, const char* name) {
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != type)
    throw Error("INVALID_ARGUMENT", std::string(name) + " is not the typed array it should be");
  return value.As<Array>();
}

/** An integer below 2^53 out of a Float64Array. */
std::uint64_t to_integer(double number, const char* name) {
  if (!(number >= 0 && number <= 9007199254740991.0) || std::floor(number) != number)
    throw Error("INVALID_ARGUMENT", std::string(name) + " must hold non-negative integers");
  return static_cast<std::uint64_t>(number);
}

Napi::Value store_pieces(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object args = to_object(info[0], "job");
  store::PieceJob job;
  job.fd = to_fd(args.Get("fd"), "fd");
  job.sums_fd = to_fd(args.Get("sumsFd"), "sumsFd");
  Napi::Uint8Array source = to_bytes(args.Get("source"), "source");
  Napi::Uint8Array digests = to_bytes(args.Get("digests"), "digests");
  Napi::Uint8Array bitmap = to_bytes(args.Get("presence"), "presence");
  auto offsets = to_numbers<Napi::Float64Array>(args.Get("offsets"), napi_float64_array, "offsets");
  auto lengths = to_numbers<Napi::Uint32Array>(args.Get("lengths"), napi_uint32_array, "lengths");
  auto addresses = to_numbers<Napi::Float64Array>(args.Get("addresses"), napi_float64_array, "addresses");
  const std::size_t count = offsets.ElementLength();
  if (lengths.ElementLength() != count || addresses.ElementLength() != count ||
      digests.ByteLength() != count * store::kDigestBytes)
    throw Error("INVALID_ARGUMENT", "the arrays of the pieces differ in length");
  // The bitmap is accessed by words of 64 bits up to the end of its last page.
  if (reinterpret_cast<std::uintptr_t>(bitmap.Data()) % presence::kBlockBytes != 0)
    throw Error("INVALID_ARGUMENT", "presence must come from presenceCreate");
  job.presence = {bitmap.Data(), bitmap.ByteLength()};

  job.pieces.resize(count);
  for (std::size_t i = 0; i < count; i++) {
    store::Piece& piece = job.pieces[i];
    const std::uint64_t offset = to_integer(offsets[i], "offsets");
    const std::uint32_t length = lengths[i];
    if (offset > source.ByteLength() || length > source.ByteLength() - offset)
      throw Error("INVALID_ARGUMENT", "piece " + std::to_string(i) + " lies beyond the end of source");
    piece.bytes = {source.Data() + offset, length};
    std::copy_n(digests.Data() + i * store::kDigestBytes, store::kDigestBytes, piece.digest.begin());
    piece.address = to_integer(addresses[i], "addresses");
  }

  auto kept = std::make_shared<KeptAlive>(env);
  kept->keep(source);
  kept->keep(bitmap);
  // A thread of its own: direct writes wait for the disk, and decoding must not wait behind them.
  return run_on_thread(
      env, [kept, job = std::move(job)] { return store::write_pieces(job); },
      [](Napi::Env to, const std::vector<std::uint8_t>& written) -> Napi::Value {
        auto result = Napi::Uint8Array::New(to, written.size());
        std::copy(written.begin(), written.end(), result.Data());
        return result;
      });
}

Napi::Value read_store(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object args = to_object(info[0], "job");
  Napi::Uint8Array bitmap = to_bytes(args.Get("presence"), "presence");
  Napi::Uint8Array target = to_bytes(args.Get("target"), "target");
  store::StoreView view;
  view.fd = to_fd(args.Get("fd"), "fd");
  view.sums_fd = to_fd(args.Get("sumsFd"), "sumsFd");
  view.bytes = static_cast<std::uint64_t>(bitmap.ByteLength()) * 8 * presence::kBlockBytes;
  view.presence = bitmap.Data();
  const std::uint64_t at = to_u64(args.Get("at"), "at");
  const std::uint64_t length = to_u64(args.Get("length"), "length");
  const std::uint64_t address = to_u64(args.Get("address"), "address");
  if (at > target.ByteLength() || length > target.ByteLength() - at)
    throw Error("INVALID_ARGUMENT", "target is shorter than the range");
  if (address > view.bytes || length > view.bytes - address)
    throw Error("INVALID_ARGUMENT", "the range lies beyond the end of the store");
  if (reinterpret_cast<std::uintptr_t>(bitmap.Data()) % presence::kBlockBytes != 0)
    throw Error("INVALID_ARGUMENT", "presence must come from presenceCreate");
  auto kept = std::make_shared<KeptAlive>(env);
  kept->keep(target);
  kept->keep(bitmap);
  return run_on_thread(
      env,
      [kept, view, address, length, out = target.Data() + at] {
        for (std::uint64_t done = 0; done < length; done += store::kMaxReadBytes) {
          const auto part = static_cast<std::uint32_t>(std::min<std::uint64_t>(length - done, store::kMaxReadBytes));
          const store::Hit hit = store::read_store(view, address + done, part, out + done);
          if (hit == store::Hit::failed)
            throw Error("STORE_IO", "the store could not be read at " + std::to_string(address + done));
          if (hit != store::Hit::yes) return hit;
        }
        return store::Hit::yes;
      },
      [](Napi::Env to, store::Hit hit) -> Napi::Value {
        const char* word = hit == store::Hit::yes ? "read" : hit == store::Hit::damaged ? "damaged" : "absent";
        return Napi::String::New(to, word);
      });
}

Napi::Value sha256(const Napi::CallbackInfo& info) {
  Napi::Uint8Array bytes = to_bytes(info[0], "bytes");
  auto kept = std::make_shared<KeptAlive>(info.Env());
  kept->keep(bytes);
  return run_on_pool(
      info.Env(), [kept, data = bytes.Data(), length = bytes.ByteLength()] { return store::sha256(data, length); },
      [](Napi::Env env, const store::Digest& digest) -> Napi::Value {
        return Napi::Buffer<std::uint8_t>::Copy(env, digest.data(), digest.size());
      });
}

}  // namespace

void register_store(Napi::Env env, Napi::Object exports) {
  export_async<store_pieces>(env, exports, "storePieces");
  export_async<read_store>(env, exports, "readStore");
  export_async<sha256>(env, exports, "sha256");
}

}  // namespace dedup
