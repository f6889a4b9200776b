// SHA-256 by the OpenSSL that node carries and exports. Used by the piece writer and by sha256() of the addon.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace dedup::store {

inline constexpr std::size_t kDigestBytes = 32;
using Digest = std::array<std::uint8_t, kDigestBytes>;

/** Any thread. Throws Error INTERNAL when OpenSSL refuses. */
Digest sha256(const std::uint8_t* data, std::size_t length);

}  // namespace dedup::store
