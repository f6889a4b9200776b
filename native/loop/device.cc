#include "loop/device.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <mutex>

#include "error.h"
#include "loop/abi.h"
#include "owned_fd.h"

namespace dedup::loop {
namespace {

// Somebody else may take the free device between the question and the configuration.
constexpr int kAttempts = 64;
// LOOP_SET_STATUS64 and LOOP_SET_BLOCK_SIZE answer EAGAIN while the device has cached pages (drivers/block/loop.c).
constexpr int kAgainLimit = 50;
constexpr useconds_t kAgainPauseUs = 10'000;

// Autoclear devices this process holds open, by path.
std::mutex held_mutex;
std::map<std::string, OwnedFd> held;

int again(int fd, unsigned long request, unsigned long argument) {
  for (int i = 0;; i++) {
    const int result = ::ioctl(fd, request, argument);
    if (result >= 0) return result;
    if (errno == EINTR) continue;
    if (errno != EAGAIN || i >= kAgainLimit) return -1;
    ::usleep(kAgainPauseUs);
  }
}

std::uint32_t free_number() {
  OwnedFd control(::open(loop_abi::kControl, O_RDWR | O_CLOEXEC));
  if (!control.valid()) throw sys_error(errno, std::string("open(2) ") + loop_abi::kControl, loop_abi::kControl);
  const int number = ::ioctl(control.get(), LOOP_CTL_GET_FREE);
  if (number < 0) throw sys_error(errno, "LOOP_CTL_GET_FREE", loop_abi::kControl);
  return static_cast<std::uint32_t>(number);
}

OwnedFd open_device(const std::string& path, int mode) {
  OwnedFd device(::open(path.c_str(), mode | O_CLOEXEC));
  if (!device.valid()) throw sys_error(errno, "open(2) " + path, path);
  return device;
}

/** Opens /dev/loopN; makes the node where devtmpfs does not show new devices (some containers). */
OwnedFd open_new(std::uint32_t number, const std::string& path, int mode) {
  OwnedFd device(::open(path.c_str(), mode | O_CLOEXEC));
  if (device.valid()) return device;
  if (errno != ENOENT) throw sys_error(errno, "open(2) " + path, path);
  // mknod(3) of glibc 2.33 and later is a symbol that older ones lack.
  const unsigned long device_number = ::makedev(loop_abi::kMajor, number);
  if (::syscall(SYS_mknodat, AT_FDCWD, path.c_str(), S_IFBLK | 0600, device_number) != 0 && errno != EEXIST)
    throw sys_error(errno, "mknod(2) " + path, path);
  return open_device(path, mode);
}

loop_info64 status_of(const OwnedFd& device, const std::string& path) {
  loop_info64 info{};
  if (::ioctl(device.get(), LOOP_GET_STATUS64, &info) != 0) throw sys_error(errno, "LOOP_GET_STATUS64 " + path, path);
  return info;
}

std::string text_of(const loop_info64& info) {
  const auto* name = reinterpret_cast<const char*>(info.lo_file_name);
  return {name, ::strnlen(name, loop_abi::kNameBytes)};
}

/** Somebody else may have taken the number since the caller looked. */
void require_name(const loop_info64& info, const std::string& path, const std::string& name) {
  if (text_of(info) != name) throw sys_error(ENXIO, path + " is not " + name + " any more", path);
}

loop_info64 wanted_info(const AttachArgs& args) {
  loop_info64 info{};
  info.lo_offset = args.offset;
  info.lo_sizelimit = args.size_limit;
  info.lo_flags = args.autoclear ? LO_FLAGS_AUTOCLEAR : 0;
  std::memcpy(info.lo_file_name, args.name.data(), std::min(args.name.size(), loop_abi::kNameBytes - 1));
  return info;
}

enum class Outcome { done, busy, missing };

Outcome configure(const OwnedFd& device, const std::string& path, const AttachArgs& args) {
  loop_config config{};
  config.fd = static_cast<std::uint32_t>(args.fd);
  config.block_size = args.block_size;
  config.info = wanted_info(args);
  if (args.read_only) config.info.lo_flags |= LO_FLAGS_READ_ONLY;
  if (args.direct_io) config.info.lo_flags |= LO_FLAGS_DIRECT_IO;
  if (again(device.get(), LOOP_CONFIGURE, reinterpret_cast<unsigned long>(&config)) == 0) return Outcome::done;
  if (errno == EBUSY) return Outcome::busy;
  if (errno == EINVAL || errno == ENOTTY || errno == ENOSYS) return Outcome::missing;
  throw sys_error(errno, "LOOP_CONFIGURE " + path + " with " + args.name, path);
}

Outcome configure_legacy(const OwnedFd& device, const std::string& path, const AttachArgs& args) {
  if (::ioctl(device.get(), LOOP_SET_FD, args.fd) != 0) {
    if (errno == EBUSY) return Outcome::busy;
    throw sys_error(errno, "LOOP_SET_FD " + path + " with " + args.name, path);
  }
  auto fail = [&](const char* request) {
    const int err = errno;
    ::ioctl(device.get(), LOOP_CLR_FD);
    return sys_error(err, std::string(request) + " " + path + " with " + args.name, path);
  };
  loop_info64 info = wanted_info(args);
  if (again(device.get(), LOOP_SET_STATUS64, reinterpret_cast<unsigned long>(&info)) != 0)
    throw fail("LOOP_SET_STATUS64");
  if (args.block_size != 0 && again(device.get(), LOOP_SET_BLOCK_SIZE, args.block_size) != 0)
    throw fail("LOOP_SET_BLOCK_SIZE");
  if (args.direct_io && again(device.get(), LOOP_SET_DIRECT_IO, 1) != 0) throw fail("LOOP_SET_DIRECT_IO");
  return Outcome::done;
}

/** The kernel drops direct I/O silently when the backing file or the block size does not allow it. */
void require_direct_io(const OwnedFd& device, const std::string& path, const std::string& name) {
  if ((status_of(device, path).lo_flags & LO_FLAGS_DIRECT_IO) != 0) return;
  throw Error("KERNEL_UNSUPPORTED", "the kernel does not grant direct I/O on " + name + " to " + path, EINVAL, path);
}

}  // namespace

Device attach(const AttachArgs& args) {
  // Opened for reading only, a device is read-only with either set of ioctls.
  const int mode = args.read_only ? O_RDONLY : O_RDWR;
  bool legacy = args.force_legacy;
  for (int attempt = 0; attempt < kAttempts; attempt++) {
    const std::uint32_t number = free_number();
    const std::string path = loop_abi::kDevicePrefix + std::to_string(number);
    OwnedFd device = open_new(number, path, mode);
    Outcome outcome = legacy ? configure_legacy(device, path, args) : configure(device, path, args);
    if (outcome == Outcome::missing) {
      legacy = true;
      outcome = configure_legacy(device, path, args);
    }
    if (outcome != Outcome::done) continue;
    try {
      if (args.direct_io) require_direct_io(device, path, args.name);
      if (args.autoclear) {
        std::lock_guard lock(held_mutex);
        held[path] = std::move(device);
      }
    } catch (...) {
      ::ioctl(device.get(), LOOP_CLR_FD);
      throw;
    }
    return {path, number, !legacy};
  }
  throw Error("EBUSY", "no loop device stayed free long enough to be configured", EBUSY, loop_abi::kControl);
}

void detach(const std::string& path, const std::string& name) {
  // As long as it is open here it stays what it is.
  OwnedFd device = open_device(path, O_RDONLY);
  if (!name.empty()) require_name(status_of(device, path), path, name);
  const bool failed = ::ioctl(device.get(), LOOP_CLR_FD) != 0;
  const int err = errno;
  {
    std::lock_guard lock(held_mutex);
    held.erase(path);
  }
  if (failed) throw sys_error(err, "LOOP_CLR_FD " + path, path);
}

Status status(const std::string& path) {
  const loop_info64 info = status_of(open_device(path, O_RDONLY), path);
  return {text_of(info), info.lo_device, info.lo_inode};
}

void change_fd(const std::string& path, int fd, const std::string& name) {
  // As long as it is open here it stays what it is.
  OwnedFd device = open_device(path, O_RDONLY);
  const loop_info64 info = status_of(device, path);
  if (!name.empty()) require_name(info, path, name);
  const bool direct = (info.lo_flags & LO_FLAGS_DIRECT_IO) != 0;
  if (::ioctl(device.get(), LOOP_CHANGE_FD, fd) != 0)
    throw sys_error(errno, "LOOP_CHANGE_FD " + path + " to descriptor " + std::to_string(fd), path);
  if (direct) require_direct_io(device, path, "descriptor " + std::to_string(fd));
}

}  // namespace dedup::loop
