#include "inflate/isal.h"

#include <dlfcn.h>

#include <climits>
#include <cstdlib>
#include <memory>

#if __has_include(<isa-l/igzip_lib.h>)
#include <isa-l/igzip_lib.h>
#define DEDUP_HAS_ISAL 1
#endif

namespace dedup::inflate {

#ifdef DEDUP_HAS_ISAL
namespace {

struct Library {
  decltype(&::isal_inflate_init) init = nullptr;
  decltype(&::isal_inflate_set_dict) set_dict = nullptr;
  decltype(&::isal_inflate) inflate = nullptr;
};

/** The functions of the library, or null ones. Never unloaded: threads may be in it until the process ends. */
const Library& library() {
  static const Library loaded = [] {
    Library found;
    if (::getenv("DEDUP_NO_ISAL") != nullptr) return found;
    // The number is that of the ABI; `inflate_state` is part of it.
    void* handle = ::dlopen("libisal.so.2", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return found;
    found.init = reinterpret_cast<decltype(found.init)>(::dlsym(handle, "isal_inflate_init"));
    found.set_dict = reinterpret_cast<decltype(found.set_dict)>(::dlsym(handle, "isal_inflate_set_dict"));
    found.inflate = reinterpret_cast<decltype(found.inflate)>(::dlsym(handle, "isal_inflate"));
    if (found.init == nullptr || found.set_dict == nullptr) found.inflate = nullptr;
    return found;
  }();
  return loaded;
}

}  // namespace

bool isal_available() { return library().inflate != nullptr; }

bool isal_inflate_raw(std::span<const std::uint8_t> input, std::uint32_t bits, std::uint32_t first_bits,
                      std::span<const std::uint8_t> window, std::span<std::uint8_t> output) {
  const Library& isal = library();
  if (isal.inflate == nullptr || input.size() > UINT_MAX || output.size() > UINT_MAX) return false;
  // More than 100 KiB: too large for the stack of a pool thread, and worth keeping.
  thread_local const std::unique_ptr<inflate_state> state(new inflate_state);
  isal.init(state.get());
  state->crc_flag = ISAL_DEFLATE;
  if (!window.empty() && isal.set_dict(state.get(), const_cast<std::uint8_t*>(window.data()),
                                       static_cast<std::uint32_t>(window.size())) != COMP_OK)
    return false;
  state->read_in = first_bits;
  state->read_in_length = static_cast<std::int32_t>(bits);
  state->next_in = const_cast<std::uint8_t*>(input.data());
  state->avail_in = static_cast<std::uint32_t>(input.size());
  state->next_out = output.data();
  state->avail_out = static_cast<std::uint32_t>(output.size());
  return isal.inflate(state.get()) == ISAL_DECOMP_OK && state->avail_out == 0;
}

#else

bool isal_available() { return false; }

bool isal_inflate_raw(std::span<const std::uint8_t>, std::uint32_t, std::uint32_t, std::span<const std::uint8_t>,
                      std::span<std::uint8_t>) {
  return false;
}

#endif

}  // namespace dedup::inflate
