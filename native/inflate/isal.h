// Raw inflate by ISA-L (libisal.so.2), two to three times as fast as zlib on processors it knows. Loaded when it is
// there; without it, and for whatever it refuses, the caller uses zlib.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace dedup::inflate {

/** True when the library was found. The first call looks for it, unless DEDUP_NO_ISAL is in the environment. */
bool isal_available();

/**
 * Fills `output` from raw deflate blocks that begin at `input`, after the `bits` (0-7) low bits of `first_bits`, with
 * `window` (at most 32 KiB) before them. False when the stream ends before that, is bad, or the library is not there:
 * `output` then holds anything.
 */
bool isal_inflate_raw(std::span<const std::uint8_t> input, std::uint32_t bits, std::uint32_t first_bits,
                      std::span<const std::uint8_t> window, std::span<std::uint8_t> output);

}  // namespace dedup::inflate
