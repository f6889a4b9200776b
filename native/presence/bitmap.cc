#include "presence/bitmap.h"

#include <algorithm>
#include <atomic>
#include <bit>

namespace dedup::presence {
namespace {

static_assert(std::endian::native == std::endian::little, "bit b % 8 of byte b / 8 is bit b % 64 of word b / 64");

std::atomic<std::uint64_t> epoch{0};

using Word = std::uint64_t;
constexpr std::uint64_t kWordBits = 64;

// The mapping is page aligned and whole pages long, so every word of it may be touched.
std::atomic_ref<Word> word_at(std::uint8_t* bitmap, std::uint64_t index) {
  return std::atomic_ref<Word>(reinterpret_cast<Word*>(bitmap)[index]);
}

/** Calls visit(word index, mask) for each word that holds some of the bits, until it returns false. */
template <class Visit>
bool each_word(std::uint64_t first, std::uint64_t count, Visit visit) {
  while (count > 0) {
    const std::uint64_t shift = first % kWordBits;
    const std::uint64_t bits = std::min(count, kWordBits - shift);
    const Word mask = (bits == kWordBits ? ~Word{0} : (Word{1} << bits) - 1) << shift;
    if (!visit(first / kWordBits, mask)) return false;
    first += bits;
    count -= bits;
  }
  return true;
}

}  // namespace

void set(std::uint8_t* bitmap, std::uint64_t first, std::uint64_t count) {
  each_word(first, count, [bitmap](std::uint64_t index, Word mask) {
    word_at(bitmap, index).fetch_or(mask, std::memory_order_release);
    return true;
  });
}

void clear(std::uint8_t* bitmap, std::uint64_t first, std::uint64_t count) {
  each_word(first, count, [bitmap](std::uint64_t index, Word mask) {
    word_at(bitmap, index).fetch_and(~mask, std::memory_order_seq_cst);
    return true;
  });
  // After the bits and before the caller's punch: a reader that saw a bit and then a hole sees another epoch.
  epoch.fetch_add(1, std::memory_order_seq_cst);
}

bool all_set(const std::uint8_t* bitmap, std::uint64_t first, std::uint64_t count) {
  // atomic_ref needs a mutable object; nothing is written.
  auto* words = const_cast<std::uint8_t*>(bitmap);
  return each_word(first, count, [words](std::uint64_t index, Word mask) {
    return (word_at(words, index).load(std::memory_order_acquire) & mask) == mask;
  });
}

std::uint64_t clear_epoch() {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return epoch.load(std::memory_order_seq_cst);
}

}  // namespace dedup::presence
