#include "store/sha256.h"

#include <openssl/evp.h>

#include "error.h"

namespace dedup::store {

Digest sha256(const std::uint8_t* data, std::size_t length) {
  Digest digest;
  unsigned int written = 0;
  if (EVP_Digest(data, length, digest.data(), &written, EVP_sha256(), nullptr) != 1 || written != kDigestBytes)
    throw Error("INTERNAL", "OpenSSL cannot compute SHA-256");
  return digest;
}

}  // namespace dedup::store
