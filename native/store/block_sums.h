// A sum for each 4 KiB block of the store, so that bytes the disk changed are never served. The sum of block b is the
// little-endian 32-bit word at 4 b of the file `chunks/sums`; written after the block, checked whenever it is read.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dedup::store {

using Sum = std::uint32_t;

/**
 * CRC-32C (RFC 3720, appendix B.4) of each of `blocks` blocks; a sum of 0 becomes 1. So 0, which a hole of the file
 * reads as, is the sum of no block.
 */
void block_sums(const std::uint8_t* data, std::size_t blocks, Sum* sums);

/** Writes sums from block `first` on. Throws Error STORE_FULL or STORE_IO. */
void write_sums(int fd, const Sum* sums, std::size_t blocks, std::uint64_t first);

/** Reads sums from block `first` on; what lies behind the end of the file is 0. False when reading fails. */
bool read_sums(int fd, Sum* sums, std::size_t blocks, std::uint64_t first);

}  // namespace dedup::store
