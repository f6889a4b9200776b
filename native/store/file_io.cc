#include "store/file_io.h"

#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "error.h"

namespace dedup::store {

void write_all(int fd, const std::uint8_t* data, std::size_t length, std::uint64_t offset, const char* what) {
  std::size_t done = 0;
  while (done < length) {
    const ssize_t written = ::pwrite(fd, data + done, length - done, static_cast<off_t>(offset + done));
    if (written > 0) {
      done += static_cast<std::size_t>(written);
      continue;
    }
    const int err = written == 0 ? EIO : errno;
    if (err == EINTR) continue;
    const std::string doing = "pwrite(2) of " + std::to_string(length) + " bytes to the " + what + " at " +
                              std::to_string(offset) + ": " + std::generic_category().message(err);
    if (err == ENOSPC || err == EDQUOT) throw Error("STORE_FULL", doing, err);
    if (err == EINVAL)
      throw Error("STORE_IO", doing + " (direct writes of 4 KiB blocks are refused by this file system or device)",
                  err);
    throw Error("STORE_IO", doing, err);
  }
}

bool read_up_to(int fd, std::uint8_t* data, std::size_t length, std::uint64_t offset, std::size_t* got) {
  *got = 0;
  while (*got < length) {
    const ssize_t bytes = ::pread(fd, data + *got, length - *got, static_cast<off_t>(offset + *got));
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) return false;
    if (bytes == 0) break;
    *got += static_cast<std::size_t>(bytes);
  }
  return true;
}

}  // namespace dedup::store
