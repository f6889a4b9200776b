#include "hash/stream_hasher.h"

#include <algorithm>
#include <array>
#include <new>

#include "error.h"

namespace dedup::hash {
namespace {

constexpr std::array<std::uint8_t, 64 * 1024> kZeros{};

void check(int status) {
  if (status != 1) throw Error("INTERNAL", "OpenSSL cannot compute SHA-256");
}

}  // namespace

StreamHasher::Context StreamHasher::start() {
  Context context(EVP_MD_CTX_new());
  if (context == nullptr) throw std::bad_alloc();
  check(EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr));
  return context;
}

StreamHasher::StreamHasher() : stream_(start()), piece_(start()) {}

std::vector<std::uint8_t> StreamHasher::push(std::span<const std::uint8_t> data, std::span<const Range> ranges) {
  check(EVP_DigestUpdate(stream_.get(), data.data(), data.size()));
  std::vector<std::uint8_t> digests(store::kDigestBytes *
                                    std::ranges::count_if(ranges, [](const Range& range) { return range.ends; }));
  std::uint8_t* to = digests.data();
  for (const Range& range : ranges) {
    if (range.zeros) {
      for (std::size_t left = range.length; left > 0;) {
        const std::size_t part = std::min(left, kZeros.size());
        check(EVP_DigestUpdate(piece_.get(), kZeros.data(), part));
        left -= part;
      }
    } else {
      check(EVP_DigestUpdate(piece_.get(), data.data() + range.offset, range.length));
    }
    if (!range.ends) continue;
    check(EVP_DigestFinal_ex(piece_.get(), to, nullptr));
    to += store::kDigestBytes;
    // Without a type: the context keeps the one it has, which saves OpenSSL's look-up for every small file.
    check(EVP_DigestInit_ex(piece_.get(), nullptr, nullptr));
  }
  return digests;
}

store::Digest StreamHasher::finish() {
  store::Digest digest;
  check(EVP_DigestFinal_ex(stream_.get(), digest.data(), nullptr));
  return digest;
}

}  // namespace dedup::hash
