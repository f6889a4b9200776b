// The zlib of the Node runtime: node exports its symbols and ships this header, so the addon links no zlib of its own.
// It is the build with SIMD chunk copies, 1.5 times as fast as zlib 1.2.13 (docs/decisions/0005-zlib-of-node.md).
// Included by everything that inflates; nothing else may include zlib.h.
#pragma once

// Node's zconf.h includes a renaming header that is not shipped, unless this is set; node exports the plain names.
#ifndef CHROMIUM_ZLIB_NO_CHROMECONF
#define CHROMIUM_ZLIB_NO_CHROMECONF
#endif
#include <zlib.h>

#include <cstddef>

namespace dedup::inflate {

/** RFC 1951: the farthest a match reaches back, bytes. */
inline constexpr std::size_t kWindowBytes = 32768;
/** inflateInit2: zlib's largest window, with a gzip header and trailer, checked by zlib. */
inline constexpr int kGzipWindowBits = 15 + 16;
/** inflateInit2: deflate blocks only. */
inline constexpr int kRawWindowBits = -15;
/** RFC 1952: CRC32 and ISIZE after the last block of a member, bytes. */
inline constexpr std::size_t kGzipTrailerBytes = 8;

}  // namespace dedup::inflate
