#include "direction.h"

#include <linux/if_tun.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "abi.h"

namespace link_emulation {
namespace {

// A GSO packet has at most 65,535 bytes (include/linux/netdevice.h, GSO_LEGACY_MAX_SIZE).
constexpr std::size_t kLargeBytes = sizeof(abi::VirtioNetHeader) + 65'536;
constexpr std::size_t kSmallBytes = 2'048;
// What Ethernet adds to each IP packet: preamble, header, checksum, gap (IEEE 802.3).
constexpr std::uint32_t kFramingBytes = 8 + 14 + 4 + 12;
constexpr int kBatch = 64;
// One wake-up hands over what is due within this time: at 1 Gbit/s without offload a packet is due every 12 us.
constexpr std::int64_t kEarlyNs = 50'000;
// Doff, the length of the TCP header in words, is in the upper half of byte 12 (RFC 9293, 3.1).
constexpr std::size_t kTcpLengthOffset = 12;

struct Size {
  std::uint32_t segments;
  std::uint32_t wire_bytes;
};

/** What a packet becomes on a wire that has no offload. hdr_len is a hint that may hold data, so the headers are read.
 */
Size wire_size(const unsigned char* frame, std::size_t length) {
  abi::VirtioNetHeader head;
  std::memcpy(&head, frame, sizeof head);
  const auto packet = static_cast<std::uint32_t>(length - sizeof head);
  const std::size_t tcp_length = head.csum_start + kTcpLengthOffset;
  if (head.gso_type == abi::kGsoNone || head.gso_size == 0 || tcp_length >= packet) return {1, packet + kFramingBytes};
  const std::uint32_t headers = head.csum_start + (frame[sizeof head + tcp_length] >> 4) * 4u;
  if (headers >= packet) return {1, packet + kFramingBytes};
  const std::uint32_t segments = (packet - headers + head.gso_size - 1) / head.gso_size;
  return {segments, packet + (segments - 1) * headers + segments * kFramingBytes};
}

}  // namespace

std::int64_t now_ns() {
  timespec time;
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

void Direction::set(const Settings& settings) {
  // Loss hits single packets of the MTU, so the kernel must cut large ones before they come here.
  const unsigned long segmentation = settings.loss > 0 ? 0 : TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
  if (::ioctl(from_, TUNSETOFFLOAD, TUN_F_CSUM | segmentation) != 0)
    throw std::system_error(errno, std::generic_category(), "TUNSETOFFLOAD");
  random_.seed(settings.seed);
  settings_ = settings;
}

std::int64_t Direction::clock(std::int64_t monotonic_ns) const {
  return monotonic_ns - stalled_ns_ - (std::min(monotonic_ns, stall_end_ns_) - stall_begin_ns_);
}

void Direction::stall(std::int64_t duration_ns) {
  const std::int64_t now = now_ns();
  if (now < stall_end_ns_) {
    stall_end_ns_ = std::max(stall_end_ns_, now + duration_ns);
    return;
  }
  stalled_ns_ += stall_end_ns_ - stall_begin_ns_;
  stall_begin_ns_ = now;
  stall_end_ns_ = now + duration_ns;
}

Direction::Buffer Direction::buffer(std::vector<Buffer>& free, std::size_t capacity) {
  if (free.empty()) return {capacity, std::make_unique_for_overwrite<unsigned char[]>(capacity)};
  Buffer last = std::move(free.back());
  free.pop_back();
  return last;
}

void Direction::recycle(Buffer buffer) {
  auto& free = buffer.capacity == kLargeBytes ? large_ : small_;
  free.push_back(std::move(buffer));
}

bool Direction::take() {
  for (int i = 0; i < kBatch; i++) {
    if (large_.empty()) large_.push_back(buffer(large_, kLargeBytes));
    const ssize_t length = ::read(from_, large_.back().bytes.get(), kLargeBytes);
    if (length < 0 && errno == EINTR) continue;
    if (length < 0 && errno == EAGAIN) return false;
    if (length < 0) throw std::system_error(errno, std::generic_category(), "read(2) of a TUN device");
    if (static_cast<std::size_t>(length) > sizeof(abi::VirtioNetHeader)) admit(static_cast<std::size_t>(length));
  }
  return true;
}

void Direction::admit(std::size_t length) {
  const Size size = wire_size(large_.back().bytes.get(), length);
  if (settings_.loss > 0 && std::uniform_real_distribution<>()(random_) < settings_.loss) {
    counters_.lost += size.segments;
    return;
  }
  const std::int64_t now = clock(now_ns());
  const std::int64_t start = std::max(now, wire_free_ns_);
  const double waiting = static_cast<double>(start - now) * settings_.rate / 8e9;
  // An idle wire takes anything, however short the queue is.
  if (waiting > 0 && waiting + size.wire_bytes > settings_.queue_bytes) {
    counters_.dropped += size.segments;
    return;
  }
  wire_free_ns_ = start + static_cast<std::int64_t>(size.wire_bytes * 8e9 / settings_.rate);
  // A delay that became shorter does not let packets overtake each other.
  latest_due_ns_ = std::max(latest_due_ns_, wire_free_ns_ + settings_.delay_ns);
  Buffer kept = buffer(length <= kSmallBytes ? small_ : large_, length <= kSmallBytes ? kSmallBytes : kLargeBytes);
  if (kept.capacity == kSmallBytes) std::memcpy(kept.bytes.get(), large_.back().bytes.get(), length);
  under_way_.push_back({std::move(kept), length, latest_due_ns_, size.segments, size.wire_bytes});
}

void Direction::deliver() {
  if (under_way_.empty()) return;
  const std::int64_t now = clock(now_ns());
  if (under_way_.front().due_ns > now) return;
  while (!under_way_.empty() && under_way_.front().due_ns <= now + kEarlyNs) {
    Packet packet = std::move(under_way_.front());
    under_way_.pop_front();
    if (::write(to_, packet.buffer.bytes.get(), packet.length) == static_cast<ssize_t>(packet.length)) {
      counters_.packets += packet.segments;
      counters_.bytes += packet.wire_bytes;
    } else {
      counters_.refused += packet.segments;
    }
    recycle(std::move(packet.buffer));
  }
}

std::int64_t Direction::deadline() const {
  if (under_way_.empty()) return kNever;
  return under_way_.front().due_ns + stalled_ns_ + (stall_end_ns_ - stall_begin_ns_);
}

}  // namespace link_emulation
