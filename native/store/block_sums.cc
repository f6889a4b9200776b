#include "store/block_sums.h"

#include <array>
#include <cstdlib>
#include <cstring>

#include "presence/bitmap.h"
#include "store/file_io.h"

namespace dedup::store {
namespace {

using presence::kBlockBytes;

constexpr Sum kPolynomial = 0x82F63B78;  // Castagnoli's, bits reversed
constexpr std::size_t kSlices = 8;

using Tables = std::array<std::array<Sum, 256>, kSlices>;

constexpr Tables make_tables() {
  Tables tables{};
  for (Sum byte = 0; byte < 256; byte++) {
    Sum sum = byte;
    for (int bit = 0; bit < 8; bit++) sum = (sum >> 1) ^ ((sum & 1) != 0 ? kPolynomial : 0);
    tables[0][byte] = sum;
  }
  for (std::size_t slice = 1; slice < kSlices; slice++)
    for (std::size_t byte = 0; byte < 256; byte++) {
      const Sum before = tables[slice - 1][byte];
      tables[slice][byte] = (before >> 8) ^ tables[0][before & 0xff];
    }
  return tables;
}

constexpr Tables kTables = make_tables();

Sum finish(std::uint64_t state) {
  const Sum sum = ~static_cast<Sum>(state);
  return sum == 0 ? 1 : sum;
}

void by_table(const std::uint8_t* data, std::size_t blocks, Sum* sums) {
  for (std::size_t block = 0; block < blocks; block++) {
    Sum state = ~Sum{0};
    for (std::size_t at = 0; at < kBlockBytes; at += 8) {
      std::uint64_t word;
      std::memcpy(&word, data + block * kBlockBytes + at, 8);
      word ^= state;
      state = 0;
      for (std::size_t i = 0; i < kSlices; i++) state ^= kTables[kSlices - 1 - i][(word >> (8 * i)) & 0xff];
    }
    sums[block] = finish(state);
  }
}

#if defined(__x86_64__)
/** `lanes` blocks side by side: one after the other, each instruction would wait for the one before. */
template <std::size_t lanes>
__attribute__((target("sse4.2"))) void sum_side_by_side(const std::uint8_t* data, Sum* sums) {
  std::uint64_t state[lanes];
  for (std::uint64_t& one : state) one = 0xffffffff;
  for (std::size_t at = 0; at < kBlockBytes; at += 8)
// In registers, not in memory: at -O2 the compiler leaves the loop as it is.
#pragma GCC unroll 4
    for (std::size_t lane = 0; lane < lanes; lane++) {
      std::uint64_t word;
      std::memcpy(&word, data + lane * kBlockBytes + at, 8);
      state[lane] = __builtin_ia32_crc32di(state[lane], word);
    }
  for (std::size_t lane = 0; lane < lanes; lane++) sums[lane] = finish(state[lane]);
}

void by_instruction(const std::uint8_t* data, std::size_t blocks, Sum* sums) {
  std::size_t block = 0;
  for (; block + 4 <= blocks; block += 4) sum_side_by_side<4>(data + block * kBlockBytes, sums + block);
  for (; block < blocks; block++) sum_side_by_side<1>(data + block * kBlockBytes, sums + block);
}
#endif

using Function = void (*)(const std::uint8_t*, std::size_t, Sum*);

Function fastest() {
#if defined(__x86_64__)
  if (::getenv("DEDUP_NO_SSE42") == nullptr && __builtin_cpu_supports("sse4.2")) return by_instruction;
#endif
  return by_table;
}

}  // namespace

void block_sums(const std::uint8_t* data, std::size_t blocks, Sum* sums) {
  static const Function function = fastest();
  function(data, blocks, sums);
}

void write_sums(int fd, const Sum* sums, std::size_t blocks, std::uint64_t first) {
  write_all(fd, reinterpret_cast<const std::uint8_t*>(sums), blocks * sizeof(Sum), first * sizeof(Sum), "sums");
}

bool read_sums(int fd, Sum* sums, std::size_t blocks, std::uint64_t first) {
  const std::size_t bytes = blocks * sizeof(Sum);
  std::size_t got = 0;
  if (!read_up_to(fd, reinterpret_cast<std::uint8_t*>(sums), bytes, first * sizeof(Sum), &got)) return false;
  std::memset(reinterpret_cast<std::uint8_t*>(sums) + got, 0, bytes - got);
  return true;
}

}  // namespace dedup::store
