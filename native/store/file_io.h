// Whole reads and writes of the store's files, with the errors callers know.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dedup::store {

/** Writes all of it. `what` names the file in errors. Throws Error STORE_FULL (no room), STORE_IO. */
void write_all(int fd, const std::uint8_t* data, std::size_t length, std::uint64_t offset, const char* what);

/** Reads until `length` bytes or the end of the file; `*got` says how many. False when reading fails. */
bool read_up_to(int fd, std::uint8_t* data, std::size_t length, std::uint64_t offset, std::size_t* got);

}  // namespace dedup::store
