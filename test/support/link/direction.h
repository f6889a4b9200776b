// One direction of the link: packets go in at one TUN device and leave at the other after queue, serialisation, loss
// and delay. Owned and driven by main.cc's loop, on its one thread; knows nothing of namespaces or commands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <vector>

namespace link_emulation {

struct Settings {
  /** Bits a second on the wire. */
  double rate = 1e9;
  /** Propagation, one way. */
  std::int64_t delay_ns = 0;
  /** Bytes that may wait for the wire; what comes on top is dropped (drop tail). */
  double queue_bytes = 1e6;
  /** Probability of each packet to vanish. */
  double loss = 0;
  std::uint64_t seed = 1;
};

struct Counters {
  /** Handed to the other side: packets of at most the MTU, and their bytes with framing. */
  std::uint64_t packets = 0;
  std::uint64_t bytes = 0;
  /** Taken by random loss; taken by the full queue; refused by the device. */
  std::uint64_t lost = 0;
  std::uint64_t dropped = 0;
  std::uint64_t refused = 0;
};

constexpr std::int64_t kNever = INT64_MAX;

/** CLOCK_MONOTONIC. */
std::int64_t now_ns();

class Direction {
 public:
  /** Both descriptors stay the caller's; TUN devices with virtio headers, non-blocking. */
  Direction(int from, int to) : from_(from), to_(to) {}

  /** Holds for packets that come from now on; what is under way keeps its time. Throws std::system_error. */
  void set(const Settings& settings);
  /** Stops this direction's time for so long: nothing moves, nothing is lost. Stalls add up to the latest end. */
  void stall(std::int64_t duration_ns);
  /** Reads what waits at the device, up to one batch. True when more may wait. */
  bool take();
  /** Hands over everything that is due. */
  void deliver();
  /** When deliver() has work next, CLOCK_MONOTONIC; kNever when nothing is under way. */
  std::int64_t deadline() const;

  int from() const { return from_; }
  const Settings& settings() const { return settings_; }
  const Counters& counters() const { return counters_; }

 private:
  struct Buffer {
    std::size_t capacity;
    std::unique_ptr<unsigned char[]> bytes;
  };
  struct Packet {
    Buffer buffer;
    std::size_t length;
    /** On this direction's own clock. */
    std::int64_t due_ns;
    std::uint32_t segments;
    std::uint32_t wire_bytes;
  };

  static Buffer buffer(std::vector<Buffer>& free, std::size_t capacity);
  void recycle(Buffer buffer);
  /** Decides over the packet in `large_.back()`. */
  void admit(std::size_t length);
  /** Monotonic time less the stalls so far; stands still during one. */
  std::int64_t clock(std::int64_t monotonic_ns) const;

  const int from_;
  const int to_;
  Settings settings_;
  Counters counters_;
  std::mt19937_64 random_;
  std::deque<Packet> under_way_;
  /** Last freed is first used: its memory is still in the processor's cache. */
  std::vector<Buffer> large_;
  std::vector<Buffer> small_;
  /** When the wire has sent all it was given, and when the latest packet arrives; this direction's clock. */
  std::int64_t wire_free_ns_ = 0;
  std::int64_t latest_due_ns_ = 0;
  /** Sum of the stalls before the latest; begin and end of that one, monotonic. */
  std::int64_t stalled_ns_ = 0;
  std::int64_t stall_begin_ns_ = 0;
  std::int64_t stall_end_ns_ = 0;
};

}  // namespace link_emulation
