// Verifies pieces and writes the good ones into the store file with O_DIRECT, then the sums of their blocks; their
// presence is set only after that.
// Called by storePieces on a native thread; it knows nothing of JS. Nothing else writes chunk bytes into the store.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "store/sha256.h"

namespace dedup::store {

/** A piece is at most this long; a write joins neighbours up to this. */
inline constexpr std::size_t kMaxWriteBytes = std::size_t{4} << 20;

struct Piece {
  std::span<const std::uint8_t> bytes;
  Digest digest;
  /** Address in the store, bytes; a multiple of 4096. */
  std::uint64_t address;
};

struct PieceJob {
  /** Store file, open for direct writes. */
  int fd;
  /** The file of block_sums.h, open for writing. */
  int sums_fd;
  std::vector<Piece> pieces;
  /** Bitmap from presenceCreate, one bit per 4 KiB block. */
  std::span<std::uint8_t> presence;
};

/**
 * One byte per piece: 1 = its bytes are right and present in the store, 0 = they do not have its digest (then nothing
 * of it is written). A good piece that is present already is not written again. Throws Error: INVALID_ARGUMENT before
 * anything is written (address not aligned or beyond the store, empty or above 4 MiB, different pieces that overlap);
 * STORE_FULL, STORE_IO when a write fails: pieces of earlier writes are in the store and present then, which is safe,
 * because they are verified and whole; no piece of the failed write is.
 */
std::vector<std::uint8_t> write_pieces(const PieceJob& job);

}  // namespace dedup::store
