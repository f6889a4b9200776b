// SHA-256 of a stream as a whole and of pieces of it, in one pass while its bytes are in the cache. Used by the JS
// class StreamHasher, one push at a time, each on some pool thread; it knows nothing of JS.
#pragma once

#include <openssl/evp.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "store/sha256.h"

namespace dedup::hash {

/** Bytes of a push that belong to the current piece, after those of earlier ranges; `ends`: they are its last. */
struct Range {
  std::size_t offset = 0;
  std::size_t length = 0;
  /** `length` zeros that are not in the stream (a hole); `offset` says nothing. */
  bool zeros = false;
  bool ends = false;
};

class StreamHasher {
 public:
  /** Throws Error INTERNAL when OpenSSL refuses. */
  StreamHasher();

  /**
   * The next bytes of the stream and the pieces in them. Ranges lie in `data`. Returns the digests of the pieces that
   * end, joined. Throws Error INTERNAL.
   */
  std::vector<std::uint8_t> push(std::span<const std::uint8_t> data, std::span<const Range> ranges);
  /** Digest of the stream so far; nothing may follow. Throws Error INTERNAL. */
  store::Digest finish();

 private:
  struct FreeContext {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  using Context = std::unique_ptr<EVP_MD_CTX, FreeContext>;
  static Context start();

  const Context stream_;
  const Context piece_;
};

}  // namespace dedup::hash
