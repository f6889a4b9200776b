// Inflates a gzip stream of one or more members once, from the front, and collects the points where inflation can be
// restarted. Used by the JS class GzipIndexer, one push at a time, each on some native thread; it knows
// nothing of JS. Where the points lie depends on the stream and spanBytes alone, never on how the input was split.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "aligned_memory.h"
#include "inflate/node_zlib.h"

namespace dedup::inflate {

/** Where inflation can start: the boundary before a deflate block, or the header of a gzip member. */
struct RestartPoint {
  /** Offset in the uncompressed stream, bytes. */
  std::uint64_t out_offset = 0;
  /** Offset of the first whole compressed byte to feed. */
  std::uint64_t in_offset = 0;
  /** High bits (0–7) of the byte before `in_offset` that belong to the block. */
  std::uint32_t bits = 0;
  bool member_start = false;
  /** Up to 32 KiB of output of the same member before the point. */
  std::vector<std::uint8_t> window;
};

/** What one push gave. The output is `length` bytes from `start` in `memory`, or in the caller's if that is null. */
struct PushResult {
  MallocBytes memory;
  std::size_t start = 0;
  std::size_t length = 0;
  std::vector<RestartPoint> points;
};

/**
 * The output of one push is returned whole: up to about 1032 times the input, so a caller bounds its memory by what it
 * pushes (64 KiB of input: at most 66 MiB). A push that would give more than `kMaxPushOutputBytes` is refused.
 */
class GzipIndexer {
 public:
  static constexpr std::size_t kMaxPushOutputBytes = std::size_t{1} << 30;

  /** `span_bytes` > 0: uncompressed bytes between restart points; a point lies at the first boundary after that. */
  explicit GzipIndexer(std::uint64_t span_bytes);
  ~GzipIndexer();
  GzipIndexer(const GzipIndexer&) = delete;
  GzipIndexer& operator=(const GzipIndexer&) = delete;

  /**
   * The output goes to `into` if it fits after 32 KiB that are left to the indexer, else to memory of its own. Throws
   * Error LAYER_INVALID (bad stream), INVALID_ARGUMENT (too much output); fails for good then.
   */
  PushResult push(const std::uint8_t* input, std::size_t length, std::span<std::uint8_t> into = {});
  /** Throws Error LAYER_INVALID when the input so far does not end at the end of a member. */
  void finish();

 private:
  class Output;
  void inflate(Output& output, std::vector<RestartPoint>& points);
  void on_member_start(std::vector<RestartPoint>& points);
  void on_output(std::uint64_t produced, std::vector<RestartPoint>& points);
  [[noreturn]] void fail(const char* what);

  const std::uint64_t span_bytes_;
  z_stream stream_{};
  /** True from the first byte of a member's header to the last byte of its trailer. */
  bool in_member_ = false;
  bool failed_ = false;
  bool any_member_ = false;
  std::uint64_t in_offset_ = 0;
  std::uint64_t out_offset_ = 0;
  std::uint64_t member_out_offset_ = 0;
  std::uint64_t last_point_out_ = 0;
  /** A point with no output after it yet; dropped when none comes, so that no span is empty. */
  std::optional<RestartPoint> pending_;
  /** Last 32 KiB of output, carried from push to push. */
  std::vector<std::uint8_t> tail_;
};

}  // namespace dedup::inflate
