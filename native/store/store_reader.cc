#include "store/store_reader.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "presence/bitmap.h"
#include "store/block_sums.h"
#include "store/file_io.h"
#include "store/touched.h"

namespace dedup::store {

namespace {

using presence::kBlockBytes;

constexpr std::size_t kMaxBlocks = kMaxReadBytes / kBlockBytes;

/** Reads whole blocks and compares them with their sums; blocks that differ are made absent. */
Hit read_blocks(const StoreView& store, std::uint64_t first, std::size_t blocks, std::uint8_t* buffer) {
  std::array<Sum, kMaxBlocks> written;
  std::array<Sum, kMaxBlocks> found;
  const std::uint64_t epoch = presence::clear_epoch();
  if (!presence::all_set(store.presence, first, blocks)) return Hit::no;
  std::size_t got = 0;
  const std::size_t wanted = blocks * kBlockBytes;
  if (!read_up_to(store.fd, buffer, wanted, first * kBlockBytes, &got) || got < wanted) return Hit::failed;
  if (!read_sums(store.sums_fd, written.data(), blocks, first)) return Hit::failed;
  // A block may have been taken away, and punched or written anew, between the look and the read. Present again or not:
  // ask.
  if (presence::clear_epoch() != epoch) return Hit::no;
  block_sums(buffer, blocks, found.data());
  if (std::memcmp(written.data(), found.data(), blocks * sizeof(Sum)) == 0) return Hit::yes;
  for (std::size_t i = 0; i < blocks; i++)
    if (written[i] != found[i]) presence::clear(store.presence, first + i, 1);
  return Hit::damaged;
}

/** [begin, end) block by block: it does not begin or end with one. */
Hit read_part(const StoreView& store, std::uint64_t begin, std::uint64_t end, std::uint8_t* out) {
  while (begin < end) {
    alignas(4096) std::uint8_t block[kBlockBytes];
    const std::uint64_t from = begin % kBlockBytes;
    const std::uint64_t length = std::min(end - begin, kBlockBytes - from);
    const Hit hit = read_blocks(store, begin / kBlockBytes, 1, block);
    if (hit != Hit::yes) return hit;
    std::memcpy(out, block + from, length);
    out += length;
    begin += length;
  }
  return Hit::yes;
}

}  // namespace

Hit read_store(const StoreView& store, std::uint64_t offset, std::uint32_t length, std::uint8_t* buffer) {
  const std::uint64_t end = offset + length;
  // [begin, stop) is the part between the edges; empty when the range lies within one of them.
  const std::uint64_t begin = std::clamp(store.head_bytes, offset, end);
  const std::uint64_t stop = std::clamp(store.bytes - store.tail_bytes, begin, end);
  if (begin < stop) {
    // EROFS and loop devices ask for whole blocks; whoever else opens the file may not.
    const bool whole = begin % kBlockBytes == 0 && stop % kBlockBytes == 0;
    std::uint8_t* out = buffer + (begin - offset);
    const Hit hit = whole ? read_blocks(store, begin / kBlockBytes, (stop - begin) / kBlockBytes, out)
                          : read_part(store, begin, stop, out);
    if (hit != Hit::yes) return hit;
    touch(store.touched, begin, stop);
  }
  std::memset(buffer, 0, begin - offset);
  std::memset(buffer + (stop - offset), 0, end - stop);
  return Hit::yes;
}

}  // namespace dedup::store
