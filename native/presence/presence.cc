// The presence bitmap, and the marks of reads, as JavaScript sees them: arrays over shared memory, whose pages appear
// when touched.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "arguments.h"
#include "owned_fd.h"
#include "presence/bitmap.h"
#include "registry.h"
#include "store/touched.h"

namespace dedup {
namespace {

constexpr std::uint64_t kPage = 4096;
// 16 TiB: the largest address EROFS' 32-bit block numbers reach.
constexpr std::uint64_t kMaxStoreBytes = 1ULL << 44;

std::uint64_t to_store_bytes(const Napi::Value& value) {
  const std::uint64_t store_bytes = to_u64(value, "storeBytes");
  if (store_bytes == 0 || store_bytes > kMaxStoreBytes || store_bytes % presence::kBlockBytes != 0)
    throw Error("INVALID_ARGUMENT", "storeBytes must be a multiple of 4096 up to 16 TiB");
  return store_bytes;
}

/** Zeroed shared memory, whole pages, of which `bytes` are shown. */
Napi::ArrayBuffer shared_memory(Napi::Env env, const char* name, std::uint64_t bytes) {
  const std::uint64_t mapped = (bytes + kPage - 1) / kPage * kPage;
  OwnedFd memory(::memfd_create(name, MFD_CLOEXEC));
  if (!memory.valid()) throw sys_error(errno, std::string("memfd_create(2) ") + name);
  if (::ftruncate(memory.get(), static_cast<off_t>(mapped)) != 0)
    throw sys_error(errno, std::string("ftruncate(2) ") + name);
  void* base = ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, memory.get(), 0);
  if (base == MAP_FAILED) throw sys_error(errno, std::string("mmap(2) ") + name);
  return Napi::ArrayBuffer::New(env, base, bytes, [mapped](Napi::Env, void* data) { ::munmap(data, mapped); });
}

Napi::Value create(const Napi::CallbackInfo& info) {
  const std::uint64_t bytes = (to_store_bytes(info[0]) / presence::kBlockBytes + 7) / 8;
  return Napi::Uint8Array::New(info.Env(), bytes, shared_memory(info.Env(), "dedup-presence", bytes), 0);
}

Napi::Value create_touched(const Napi::CallbackInfo& info) {
  const std::uint64_t regions = (to_store_bytes(info[0]) + store::kTouchedBytes - 1) / store::kTouchedBytes;
  const std::uint64_t bytes = regions * sizeof(std::uint32_t);
  return Napi::Uint32Array::New(info.Env(), regions, shared_memory(info.Env(), "dedup-touched", bytes), 0);
}

struct Range {
  std::uint8_t* bitmap;
  std::uint64_t first;
  std::uint64_t count;
};

Range to_range(const Napi::CallbackInfo& info) {
  Napi::Uint8Array bitmap = to_bytes(info[0], "presence");
  const std::uint64_t first = to_u64(info[1], "firstBlock");
  const std::uint64_t count = to_u64(info[2], "count");
  const std::uint64_t blocks = static_cast<std::uint64_t>(bitmap.ByteLength()) * 8;
  if (first > blocks || count > blocks - first) throw Error("INVALID_ARGUMENT", "blocks beyond the end of the store");
  if (reinterpret_cast<std::uintptr_t>(bitmap.Data()) % kPage != 0)
    throw Error("INVALID_ARGUMENT", "presence must come from presenceCreate");
  return {bitmap.Data(), first, count};
}

Napi::Value set_blocks(const Napi::CallbackInfo& info) {
  const Range range = to_range(info);
  if (to_bool(info[3], "value")) {
    presence::set(range.bitmap, range.first, range.count);
  } else {
    presence::clear(range.bitmap, range.first, range.count);
  }
  return info.Env().Undefined();
}

Napi::Value test_blocks(const Napi::CallbackInfo& info) {
  const Range range = to_range(info);
  return Napi::Boolean::New(info.Env(), presence::all_set(range.bitmap, range.first, range.count));
}

Napi::Value clear_epoch(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), static_cast<double>(presence::clear_epoch()));
}

}  // namespace

void register_presence(Napi::Env env, Napi::Object exports) {
  export_function<create>(env, exports, "presenceCreate");
  export_function<create_touched>(env, exports, "touchedCreate");
  export_function<set_blocks>(env, exports, "presenceSet");
  export_function<test_blocks>(env, exports, "presenceTest");
  export_function<clear_epoch>(env, exports, "presenceClearEpoch");
}

}  // namespace dedup
