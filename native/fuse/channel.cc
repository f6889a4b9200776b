#include "fuse/channel.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

namespace dedup::fuse {

namespace {
// UIO_MAXIOV is 1024; one vector is the header.
constexpr std::size_t kMaxParts = 1000;
}  // namespace

Answer Channel::reply(std::uint64_t unique, int error, const void* body, std::size_t bytes) const {
  if (error != 0 || bytes == 0) return write_out(unique, error, {}, 0);
  const iovec part{const_cast<void*>(body), bytes};
  return write_out(unique, 0, {&part, 1}, bytes);
}

Answer Channel::reply_read(std::uint64_t unique, std::uint32_t wanted, std::span<const iovec> parts) const {
  std::uint64_t total = 0;
  for (const iovec& part : parts) total += part.iov_len;
  if (total != wanted) {
    write_out(unique, EIO, {}, 0);
    return Answer::wrong_length;
  }
  return write_out(unique, 0, parts, wanted);
}

Answer Channel::write_out(std::uint64_t unique, int error, std::span<const iovec> parts, std::size_t bytes) const {
  fuse_out_header header{};
  header.len = static_cast<std::uint32_t>(sizeof header + bytes);
  header.error = -error;
  header.unique = unique;

  std::vector<std::uint8_t> joined;
  std::array<iovec, kMaxParts + 1> vectors;
  vectors[0] = {&header, sizeof header};
  int count = 1;
  if (parts.size() > kMaxParts) {
    joined.reserve(bytes);
    for (const iovec& part : parts) {
      const auto* data = static_cast<const std::uint8_t*>(part.iov_base);
      joined.insert(joined.end(), data, data + part.iov_len);
    }
    vectors[count++] = {joined.data(), joined.size()};
  } else {
    for (const iovec& part : parts)
      if (part.iov_len > 0) vectors[count++] = part;
  }

  for (;;) {
    const ssize_t written = ::writev(fd_.get(), vectors.data(), count);
    if (written >= 0) return Answer::sent;
    if (errno == EINTR) continue;
    // ENOENT: the request was ended; ENODEV, EPERM: the connection is gone.
    if (errno == ENOENT || errno == ENODEV || errno == EPERM || errno == ECONNABORTED) return Answer::gone;
    if (error != 0) return Answer::gone;
    // ENOMEM, EFAULT: the kernel has not ended the request; ENOENT comes back when it has.
    error = EIO;
    header.len = sizeof header;
    header.error = -EIO;
    count = 1;
  }
}

}  // namespace dedup::fuse
