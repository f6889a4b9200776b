// Memory that starts at a multiple of 4096, as O_DIRECT wants it; freed by its owner or by the Buffer that took it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dedup {

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};
/** Memory of malloc, realloc or aligned_alloc. */
using MallocBytes = std::unique_ptr<std::uint8_t, FreeMemory>;

inline constexpr std::size_t kMemoryAlignment = 4096;

/** `bytes`, rounded up to whole 4 KiB, not initialised. Throws std::bad_alloc. */
inline MallocBytes allocate_aligned(std::size_t bytes) {
  const std::size_t blocks = bytes == 0 ? 1 : (bytes + kMemoryAlignment - 1) / kMemoryAlignment;
  MallocBytes memory(static_cast<std::uint8_t*>(std::aligned_alloc(kMemoryAlignment, blocks * kMemoryAlignment)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace dedup
