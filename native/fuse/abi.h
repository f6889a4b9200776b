// Kernel interface of FUSE: include/uapi/linux/fuse.h, protocol 7.31 as of Linux 5.4, which every later kernel speaks.
// Flags newer than that are not offered. fs/fuse/dev.c and fs/fuse/inode.c say how replies are checked.
#pragma once

#include <linux/fuse.h>

#include <cstddef>
#include <cstdint>

namespace dedup::fuse_abi {

inline constexpr std::uint32_t kMajor = 7;
inline constexpr std::uint32_t kMinor = 31;
inline constexpr const char* kDevice = "/dev/fuse";

static_assert(FUSE_KERNEL_VERSION == kMajor && FUSE_KERNEL_MINOR_VERSION >= kMinor);
static_assert(sizeof(fuse_in_header) == 40 && sizeof(fuse_out_header) == 16);
static_assert(sizeof(fuse_init_out) == 64 && sizeof(fuse_read_in) == 40 && sizeof(fuse_attr) == 88);
static_assert(sizeof(fuse_entry_out) == 128 && sizeof(fuse_attr_out) == 104);

/** FUSE_INIT as Linux 5.4 sends it; from 5.17 (7.36) on more fields follow, which are not needed. */
struct InitIn {
  std::uint32_t major;
  std::uint32_t minor;
  std::uint32_t max_readahead;
  std::uint32_t flags;
};
static_assert(sizeof(InitIn) == 16 && offsetof(fuse_init_in, flags) == offsetof(InitIn, flags));

/** Most bytes of one READ: 256 pages of 4 KiB (FUSE_MAX_MAX_PAGES in fs/fuse/fuse_i.h; 7.28). */
inline constexpr std::uint32_t kMaxPages = 256;
inline constexpr std::uint32_t kMaxReadBytes = kMaxPages * 4096;
/** fuse_dev_do_read wants room for a WRITE of max_write bytes; the file system is read-only, so the least possible. */
inline constexpr std::uint32_t kMaxWriteBytes = 4096;
inline constexpr std::size_t kRequestBytes = 64 * 1024;

/** What we need (`required`) and what we take when the kernel has it (`wanted`). */
inline constexpr std::uint32_t kRequiredFlags = FUSE_ASYNC_READ | FUSE_ASYNC_DIO | FUSE_MAX_PAGES;
inline constexpr std::uint32_t kWantedFlags = kRequiredFlags | FUSE_PARALLEL_DIROPS;

/** FOPEN_NOFLUSH: close(2) of the file sends no FLUSH (7.35, Linux 5.16; older kernels take no notice of it). */
inline constexpr std::uint32_t kNoFlush = 1U << 5;

}  // namespace dedup::fuse_abi
