// Decodes one restartable part (span) of a compressed layer into its slice of a result. Called for many spans at once
// on native threads; it knows nothing of JS. It reads nothing outside its input and writes nothing outside its slice,
// and stops as soon as the slice is full. It cannot know whether the bytes are right: pieces are verified afterwards.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace dedup::inflate {

enum class Compression { kNone, kGzip, kZstd };

struct Span {
  /** Compressed bytes; a gzip span may run through the end of its member into the following ones. */
  std::span<const std::uint8_t> input;
  /** First whole byte to feed; with `bits` > 0 the byte before it must be in `input`. */
  std::size_t input_offset = 0;
  std::uint32_t bits = 0;
  bool member_start = false;
  /** At most 32 KiB; empty at a member's start. */
  std::span<const std::uint8_t> window;
  /** The slice to fill. */
  std::span<std::uint8_t> output;
};

/** Fills `span.output`. Throws Error LAYER_INVALID when the input is bad or too short for it. */
void decode_span(Compression compression, const Span& span);

}  // namespace dedup::inflate
