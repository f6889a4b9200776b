#include "inflate/isal.h"

#include <dlfcn.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#if __has_include(<isa-l/igzip_lib.h>)
#include <isa-l/igzip_lib.h>
#define DEDUP_HAS_ISAL 1
#endif

namespace dedup::inflate {

#ifdef DEDUP_HAS_ISAL
namespace {

using Bytes = std::span<const std::uint8_t>;

struct Library {
  decltype(&::isal_inflate_init) init = nullptr;
  decltype(&::isal_inflate_set_dict) set_dict = nullptr;
  decltype(&::isal_inflate) inflate = nullptr;
};

bool inflate_with(const Library& isal, inflate_state* state, Bytes input, std::uint32_t bits, std::uint32_t first_bits,
                  Bytes window, std::span<std::uint8_t> output) {
  // Raw deflate without a checksum is what a fresh state is set to.
  isal.init(state);
  if (!window.empty() && isal.set_dict(state, const_cast<std::uint8_t*>(window.data()),
                                       static_cast<std::uint32_t>(window.size())) != COMP_OK)
    return false;
  state->read_in = first_bits;
  state->read_in_length = static_cast<std::int32_t>(bits);
  state->next_in = const_cast<std::uint8_t*>(input.data());
  state->avail_in = static_cast<std::uint32_t>(input.size());
  state->next_out = output.data();
  state->avail_out = static_cast<std::uint32_t>(output.size());
  return isal.inflate(state) == ISAL_DECOMP_OK && state->avail_out == 0;
}

/**
 * The state's layout is part of the library's ABI but not of its version number. So it is asked for a known answer - a
 * start at a bit, with a window - in memory twice as large, whose second half it must leave alone.
 */
bool answers_rightly(const Library& isal) {
  static constexpr std::uint8_t kStream[] = {0x1d, 0x86, 0x10, 0x98, 0x83, 0x55, 0xbb, 0xb5, 0x42,
                                             0x62, 0x52, 0x32, 0x1c, 0x29, 0x18, 0x18, 0x1a, 0x19,
                                             0x9b, 0x98, 0x9a, 0x99, 0x5b, 0x58, 0x02, 0x00};
  constexpr std::uint32_t kSkippedBits = 3;
  constexpr std::string_view kWindow = "the quick brown fox jumps over the lazy dog; ";
  constexpr std::string_view kAnswer = "over the lazy dog the quick brown fox jumps; abcabcabcabc 0123456789";
  constexpr std::uint8_t kUntouched = 0xa5;
  constexpr std::size_t kStateBytes = sizeof(inflate_state);

  struct Free {
    void operator()(std::uint8_t* memory) const { ::operator delete (memory, std::align_val_t{64}); }
  };
  const std::unique_ptr<std::uint8_t, Free> memory(
      static_cast<std::uint8_t*>(::operator new (2 * kStateBytes, std::align_val_t{64})));
  std::memset(memory.get(), kUntouched, 2 * kStateBytes);
  std::uint8_t output[kAnswer.size()];
  const auto* window = reinterpret_cast<const std::uint8_t*>(kWindow.data());
  if (!inflate_with(isal, reinterpret_cast<inflate_state*>(memory.get()), Bytes(kStream).subspan(1), 8 - kSkippedBits,
                    kStream[0] >> kSkippedBits, {window, kWindow.size()}, output))
    return false;
  return std::memcmp(output, kAnswer.data(), kAnswer.size()) == 0 &&
         std::all_of(memory.get() + kStateBytes, memory.get() + 2 * kStateBytes,
                     [](std::uint8_t byte) { return byte == kUntouched; });
}

/** The functions of the library, or null ones. Never unloaded: threads may be in it until the process ends. */
const Library& library() {
  static const Library loaded = [] {
    if (::getenv("DEDUP_NO_ISAL") != nullptr) return Library{};
    void* handle = ::dlopen("libisal.so.2", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return Library{};
    Library found;
    found.init = reinterpret_cast<decltype(found.init)>(::dlsym(handle, "isal_inflate_init"));
    found.set_dict = reinterpret_cast<decltype(found.set_dict)>(::dlsym(handle, "isal_inflate_set_dict"));
    found.inflate = reinterpret_cast<decltype(found.inflate)>(::dlsym(handle, "isal_inflate"));
    const bool whole = found.init != nullptr && found.set_dict != nullptr && found.inflate != nullptr;
    return whole && answers_rightly(found) ? found : Library{};
  }();
  return loaded;
}

}  // namespace

bool isal_available() { return library().inflate != nullptr; }

bool isal_inflate_raw(Bytes input, std::uint32_t bits, std::uint32_t first_bits, Bytes window,
                      std::span<std::uint8_t> output) {
  const Library& isal = library();
  if (isal.inflate == nullptr || input.size() > UINT_MAX || output.size() > UINT_MAX) return false;
  // About 85 KiB: too large for the stack of a pool thread, and worth keeping.
  thread_local const std::unique_ptr<inflate_state> state(new inflate_state);
  return inflate_with(isal, state.get(), input, bits, first_bits, window, output);
}

#else

bool isal_available() { return false; }

bool isal_inflate_raw(std::span<const std::uint8_t>, std::uint32_t, std::uint32_t, std::span<const std::uint8_t>,
                      std::span<std::uint8_t>) {
  return false;
}

#endif

}  // namespace dedup::inflate
