// What precedes each packet of a TUN device with IFF_VNET_HDR: struct virtio_net_hdr of include/uapi/linux/virtio_net.h
// (Linux 2.6.27 for TUN). Stated here because that header names a member `class`, which C++ refuses.
#pragma once

#include <cstdint>

namespace link_emulation::abi {

struct VirtioNetHeader {
  std::uint8_t flags;
  /** 0: the packet is no larger than the MTU. */
  std::uint8_t gso_type;
  /** A hint: how much of the packet had better be linear, headers and maybe data. */
  std::uint16_t hdr_len;
  /** Payload of each packet that this one stands for. */
  std::uint16_t gso_size;
  /** Where the transport header begins, if its checksum has still to be made. */
  std::uint16_t csum_start;
  std::uint16_t csum_offset;
};
static_assert(sizeof(VirtioNetHeader) == 10);

inline constexpr std::uint8_t kGsoNone = 0;

}  // namespace link_emulation::abi
