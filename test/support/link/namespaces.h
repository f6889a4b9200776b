// The two ends of the link: a network namespace with loopback and one TUN device each. Made once at start by main.cc.
#pragma once

#include <string>

#include "owned_fd.h"

namespace link_emulation {

struct End {
  /** Keeps the namespace alive; others enter it through /proc/PID/fd. */
  dedup::OwnedFd space;
  /** Frames are an abi::VirtioNetHeader and an IP packet; non-blocking. */
  dedup::OwnedFd tun;
};

/**
 * Makes a namespace, moves this thread into it, and sets up loopback and a TUN device `name` with `address` whose peer
 * is `peer`. TCP has the kernel's own defaults there, whatever this machine's are. Throws std::system_error.
 */
End make_end(const std::string& name, const std::string& address, const std::string& peer);

}  // namespace link_emulation
