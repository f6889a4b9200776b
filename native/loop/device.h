// Attaches, switches and detaches loop devices with the ioctls of the kernel at hand. Blocking: called from threads of
// their own only, because the kernel may read the backing file — our transport — before an ioctl returns.
#pragma once

#include <cstdint>
#include <string>

namespace dedup::loop {

struct AttachArgs {
  int fd = -1;
  bool read_only = true;
  bool direct_io = false;
  std::uint64_t offset = 0;      // bytes
  std::uint64_t size_limit = 0;  // bytes, 0 = to the end
  std::uint32_t block_size = 0;  // bytes, 0 = the kernel's default
  bool autoclear = false;
  std::string name;
  bool force_legacy = false;
};

struct Device {
  std::string path;
  std::uint32_t number = 0;
  bool configured = false;  // by LOOP_CONFIGURE
};

/**
 * Takes a free device and gives it the backing file. With `direct_io` the result has it, or KERNEL_UNSUPPORTED is
 * thrown. An autoclear device is held open by this process until `detach`, so that it does not go before it is mounted.
 */
Device attach(const AttachArgs& args);

/**
 * Detaches at once, or, while somebody uses the device, when the last user closes it. ENXIO when it is not called
 * `name`, unless that is empty: somebody else may have taken the number.
 */
void detach(const std::string& path, const std::string& name);

struct Status {
  std::string name;          // that the device was attached with
  std::uint64_t device = 0;  // st_dev of the backing file
  std::uint64_t inode = 0;   // st_ino of the backing file
};

/** What a device is; ENXIO when it has no backing file. */
Status status(const std::string& path);

/** Switches the backing file of a read-only device; waits for every request in flight. `name` as for detach. */
void change_fd(const std::string& path, int fd, const std::string& name);

}  // namespace dedup::loop
