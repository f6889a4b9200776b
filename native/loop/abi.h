// Kernel interface of loop devices: include/uapi/linux/loop.h (LOOP_CONFIGURE: Linux 5.8, LOOP_SET_BLOCK_SIZE: 4.14,
// LOOP_SET_DIRECT_IO: 4.4) and Documentation/admin-guide/devices.txt for the major number.
#pragma once

#include <linux/loop.h>

#include <cstddef>

namespace dedup::loop_abi {

static_assert(LOOP_CONFIGURE == 0x4C0A && LOOP_SET_BLOCK_SIZE == 0x4C09 && LOOP_SET_DIRECT_IO == 0x4C08);
static_assert(LOOP_CHANGE_FD == 0x4C06 && LOOP_CTL_GET_FREE == 0x4C82);
static_assert(sizeof(loop_config) == 304 && offsetof(loop_config, info) == 8 && sizeof(loop_info64) == 232);

inline constexpr unsigned kMajor = 7;
inline constexpr const char* kControl = "/dev/loop-control";
inline constexpr const char* kDevicePrefix = "/dev/loop";
/** lo_file_name with its NUL. */
inline constexpr std::size_t kNameBytes = LO_NAME_SIZE;

}  // namespace dedup::loop_abi
