// Small operations on descriptors and memory that Node does not offer: flock(2), aligned buffers, hole punching, which
// pages are cached.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "arguments.h"
#include "promise_thread.h"
#include "registry.h"

namespace dedup {
namespace {

Napi::Value lock_file(const Napi::CallbackInfo& info) {
  const int fd = to_fd(info[0], "fd");
  int result;
  do result = ::flock(fd, LOCK_EX | LOCK_NB);
  while (result != 0 && errno == EINTR);
  if (result != 0 && errno != EWOULDBLOCK) throw sys_error(errno, "flock(2) on descriptor " + std::to_string(fd));
  return Napi::Boolean::New(info.Env(), result == 0);
}

Napi::Value aligned_buffer(const Napi::CallbackInfo& info) {
  const std::uint64_t bytes = to_u64(info[0], "bytes");
  if (bytes > (1ULL << 30)) throw Error("INVALID_ARGUMENT", "an aligned buffer holds at most 1 GiB");
  if (bytes == 0) return Napi::Buffer<std::uint8_t>::New(info.Env(), 0);
  // Anonymous pages: aligned and zero.
  void* base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw sys_error(errno, "mmap(2) of " + std::to_string(bytes) + " bytes");
  return Napi::Buffer<std::uint8_t>::New(info.Env(), static_cast<std::uint8_t*>(base), bytes,
                                         [bytes](Napi::Env, std::uint8_t* data) { ::munmap(data, bytes); });
}

Napi::Value punch_hole(const Napi::CallbackInfo& info) {
  const int fd = to_fd(info[0], "fd");
  const auto offset = static_cast<off_t>(to_u64(info[1], "offset"));
  const auto length = static_cast<off_t>(to_u64(info[2], "length"));
  return run_on_thread(
      info.Env(),
      [=] {
        int result;
        do result = ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length);
        while (result != 0 && errno == EINTR);
        if (result != 0)
          throw sys_error(errno, "fallocate(2) punching " + std::to_string(length) + " bytes at " +
                                     std::to_string(offset) + " of descriptor " + std::to_string(fd));
      },
      to_undefined);
}

/** Mapped at a time, so that a file of any size needs little address space; a multiple of every page size. */
constexpr std::uint64_t kWindow = 1ULL << 30;

/** residentPages(fd, length): one byte for each page of the file, 1 when the page cache has it. Reads nothing. */
Napi::Value resident_pages(const Napi::CallbackInfo& info) {
  const int fd = to_fd(info[0], "fd");
  const std::uint64_t length = to_u64(info[1], "length");
  const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  return run_on_thread(
      info.Env(),
      [=] {
        std::vector<std::uint8_t> pages((length + page - 1) / page);
        for (std::uint64_t offset = 0; offset < length; offset += kWindow) {
          const std::uint64_t bytes = std::min(kWindow, length - offset);
          void* base = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, static_cast<off_t>(offset));
          if (base == MAP_FAILED) throw sys_error(errno, "mmap(2) of descriptor " + std::to_string(fd));
          const int result = ::mincore(base, bytes, pages.data() + offset / page);
          const int failure = errno;
          ::munmap(base, bytes);
          if (result != 0) throw sys_error(failure, "mincore(2) of descriptor " + std::to_string(fd));
        }
        // Only the lowest bit is defined (mincore(2)).
        for (std::uint8_t& value : pages) value &= 1;
        return pages;
      },
      [](Napi::Env env, const std::vector<std::uint8_t>& pages) -> Napi::Value {
        return Napi::Buffer<std::uint8_t>::Copy(env, pages.data(), pages.size());
      });
}

constexpr std::uint64_t kBlock = 4096;

/** Adds the blocks of [start, end) that no data lies under; bytes. Errors: of lseek(2). */
void add_holes(int fd, std::uint64_t start, std::uint64_t end, std::vector<double>& holes) {
  while (start < end) {
    const off_t hole = ::lseek(fd, static_cast<off_t>(start), SEEK_HOLE);
    if (hole < 0) throw sys_error(errno, "lseek(2) to a hole of descriptor " + std::to_string(fd));
    const std::uint64_t first = static_cast<std::uint64_t>(hole) / kBlock * kBlock;
    if (first >= end) return;
    const off_t data = ::lseek(fd, hole, SEEK_DATA);
    // ENXIO: no data up to the end of the file.
    if (data < 0 && errno != ENXIO) throw sys_error(errno, "lseek(2) to data of descriptor " + std::to_string(fd));
    const std::uint64_t next = data < 0 ? end : (static_cast<std::uint64_t>(data) + kBlock - 1) / kBlock * kBlock;
    start = std::min(end, next);
    holes.push_back(static_cast<double>(first / kBlock));
    holes.push_back(static_cast<double>((start - first) / kBlock));
  }
}

/** findHoles(fd, ranges): ranges and result are first block and number of blocks, alternating. Moves the file's offset.
 */
Napi::Value find_holes(const Napi::CallbackInfo& info) {
  const int fd = to_fd(info[0], "fd");
  if (!info[1].IsTypedArray() || info[1].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
    throw Error("INVALID_ARGUMENT", "ranges must be a Float64Array");
  const auto given = info[1].As<Napi::Float64Array>();
  std::vector<double> ranges(given.Data(), given.Data() + given.ElementLength());
  return run_on_thread(
      info.Env(),
      [fd, ranges = std::move(ranges)] {
        std::vector<double> holes;
        for (std::size_t i = 0; i + 1 < ranges.size(); i += 2) {
          const auto start = static_cast<std::uint64_t>(ranges[i]) * kBlock;
          add_holes(fd, start, start + static_cast<std::uint64_t>(ranges[i + 1]) * kBlock, holes);
        }
        return holes;
      },
      [](Napi::Env env, const std::vector<double>& holes) -> Napi::Value {
        auto result = Napi::Float64Array::New(env, holes.size());
        std::copy(holes.begin(), holes.end(), result.Data());
        return result;
      });
}

}  // namespace

void register_fd(Napi::Env env, Napi::Object exports) {
  export_function<lock_file>(env, exports, "flock");
  export_function<aligned_buffer>(env, exports, "alignedBuffer");
  export_async<punch_hole>(env, exports, "punchHole");
  export_async<resident_pages>(env, exports, "residentPages");
  export_async<find_holes>(env, exports, "findHoles");
}

}  // namespace dedup
