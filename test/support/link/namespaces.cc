#include "namespaces.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <system_error>
#include <utility>

namespace link_emulation {
namespace {

using dedup::OwnedFd;

constexpr int kMtu = 1500;
// Frames that wait for us in the device; the queue of the link is ours, so this one must not fill.
constexpr int kDeviceQueue = 10'000;

// A new namespace inherits what the machine's administrator chose; figures from two machines would not compare. Values:
// Documentation/networking/ip-sysctl.rst and net/ipv4/tcp.c of a machine with more than 128 MiB.
constexpr std::pair<const char*, std::string_view> kSysctls[] = {
    // No router solicitations and neighbour probes among the packets that are counted.
    {"/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"},
    {"/proc/sys/net/ipv4/tcp_rmem", "4096 131072 6291456"},
    {"/proc/sys/net/ipv4/tcp_wmem", "4096 16384 4194304"},
    // The one that is not the default: a connection does not begin with what an earlier one learned, or the order of
    // measurements would show in them.
    {"/proc/sys/net/ipv4/tcp_no_metrics_save", "1"},
};

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

OwnedFd open_file(const char* path, int flags) {
  OwnedFd file(::open(path, flags | O_CLOEXEC));
  if (!file.valid()) fail(std::string("open(2) ") + path);
  return file;
}

ifreq request_for(const std::string& device) {
  ifreq request{};
  std::strncpy(request.ifr_name, device.c_str(), IFNAMSIZ - 1);
  return request;
}

void control(const OwnedFd& socket, unsigned long number, ifreq& request, const char* what) {
  if (::ioctl(socket.get(), number, &request) != 0) fail(std::string(what) + " of " + request.ifr_name);
}

void set_address(const OwnedFd& socket, unsigned long number, ifreq request, const std::string& address) {
  sockaddr_in ip{};
  ip.sin_family = AF_INET;
  if (::inet_pton(AF_INET, address.c_str(), &ip.sin_addr) != 1) {
    errno = EINVAL;
    fail("address " + address);
  }
  std::memcpy(&request.ifr_addr, &ip, sizeof ip);
  control(socket, number, request, "address");
}

void bring_up(const OwnedFd& socket, ifreq request) {
  control(socket, SIOCGIFFLAGS, request, "SIOCGIFFLAGS");
  request.ifr_flags = static_cast<short>(request.ifr_flags | IFF_UP | IFF_RUNNING);
  control(socket, SIOCSIFFLAGS, request, "SIOCSIFFLAGS");
}

OwnedFd make_tun(ifreq request) {
  OwnedFd tun = open_file("/dev/net/tun", O_RDWR | O_NONBLOCK);
  request.ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR;
  control(tun, TUNSETIFF, request, "TUNSETIFF");
  return tun;
}

}  // namespace

End make_end(const std::string& name, const std::string& address, const std::string& peer) {
  if (::unshare(CLONE_NEWNET) != 0) fail("unshare(2) of the network namespace");
  for (const auto& [path, value] : kSysctls) {
    const OwnedFd file = open_file(path, O_WRONLY);
    if (::write(file.get(), value.data(), value.size()) < 0) fail(std::string("write(2) ") + path);
  }
  const OwnedFd socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!socket.valid()) fail("socket(2)");
  bring_up(socket, request_for("lo"));
  OwnedFd tun = make_tun(request_for(name));
  ifreq request = request_for(name);
  request.ifr_mtu = kMtu;
  control(socket, SIOCSIFMTU, request, "SIOCSIFMTU");
  request.ifr_qlen = kDeviceQueue;
  control(socket, SIOCSIFTXQLEN, request, "SIOCSIFTXQLEN");
  set_address(socket, SIOCSIFADDR, request_for(name), address);
  set_address(socket, SIOCSIFDSTADDR, request_for(name), peer);
  bring_up(socket, request_for(name));
  return {open_file("/proc/thread-self/ns/net", O_RDONLY), std::move(tun)};
}

}  // namespace link_emulation
