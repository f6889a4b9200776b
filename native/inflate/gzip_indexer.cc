#include "inflate/gzip_indexer.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <string>

#include "error.h"

namespace dedup::inflate {

// The output of one push. It starts with room for 32 KiB that repeat the end of the output before, so that a window
// is one contiguous copy wherever the point lies. It fills memory of the caller's while that is enough; its own is
// grown with realloc, which moves pages, not bytes, when it is large.
class GzipIndexer::Output {
 public:
  Output(std::size_t input_length, const std::vector<std::uint8_t>& tail, std::span<std::uint8_t> into)
      : tail_length_(tail.size()) {
    if (into.size() >= kWindowBytes + kMinGrowBytes) {
      base_ = into.data();
      capacity_ = into.size() - kWindowBytes;
    } else {
      grow(std::max<std::size_t>(input_length * 4, kMinGrowBytes));
    }
    if (!tail.empty()) std::memcpy(base_ + kWindowBytes - tail.size(), tail.data(), tail.size());
  }

  std::uint8_t* next() { return base_ + kWindowBytes + length_; }
  std::size_t room() const { return capacity_ - length_; }
  std::size_t length() const { return length_; }
  void advance(std::size_t count) { length_ += count; }

  void grow(std::size_t more) {
    if (capacity_ >= kMaxPushOutputBytes) {
      throw Error("INVALID_ARGUMENT", "one push of a gzip stream gives more than 1 GiB; push less at a time");
    }
    const std::size_t capacity = std::min(capacity_ + more, kMaxPushOutputBytes);
    void* grown = std::realloc(memory_.get(), kWindowBytes + capacity);
    if (grown == nullptr) throw std::bad_alloc();
    if (memory_ == nullptr && base_ != nullptr) std::memcpy(grown, base_, kWindowBytes + length_);
    (void)memory_.release();
    memory_.reset(static_cast<std::uint8_t*>(grown));
    base_ = memory_.get();
    capacity_ = capacity;
  }

  void grow_when_full() {
    if (room() == 0) grow(std::max(capacity_, kMinGrowBytes));
  }

  /** The last `length` bytes of all output so far; the caller asks for no more than 32 KiB and than there were. */
  std::vector<std::uint8_t> last(std::size_t length) const {
    const std::uint8_t* end = base_ + kWindowBytes + length_;
    return std::vector<std::uint8_t>(end - std::min(length, tail_length_ + length_), end);
  }

  PushResult take() {
    // Give back what was not needed: the Buffer lives as long as its user likes.
    if (memory_ != nullptr && capacity_ - length_ > kMinGrowBytes) {
      void* shrunk = std::realloc(memory_.get(), kWindowBytes + length_);
      if (shrunk != nullptr) {
        (void)memory_.release();
        memory_.reset(static_cast<std::uint8_t*>(shrunk));
      }
    }
    PushResult result;
    result.memory = std::move(memory_);
    result.start = kWindowBytes;
    result.length = length_;
    return result;
  }

 private:
  static constexpr std::size_t kMinGrowBytes = 16 * 1024;
  /** Null while the caller's memory is used. */
  MallocBytes memory_;
  std::uint8_t* base_ = nullptr;
  std::size_t capacity_ = 0;
  std::size_t length_ = 0;
  std::size_t tail_length_;
};

GzipIndexer::GzipIndexer(std::uint64_t span_bytes) : span_bytes_(span_bytes) {
  if (inflateInit2(&stream_, kGzipWindowBits) != Z_OK) throw Error("INTERNAL", "inflateInit2 failed");
}

GzipIndexer::~GzipIndexer() { inflateEnd(&stream_); }

void GzipIndexer::fail(const char* what) {
  const char* detail = stream_.msg != nullptr ? stream_.msg : what;
  throw Error("LAYER_INVALID", std::string("gzip stream is invalid near compressed offset ") +
                                   std::to_string(in_offset_) + ": " + detail);
}

PushResult GzipIndexer::push(const std::uint8_t* input, std::size_t length, std::span<std::uint8_t> into) {
  if (failed_) throw Error("LAYER_INVALID", "gzip stream was found invalid before");
  // Set until the push is over: after any exception the state of zlib and ours no longer agree.
  failed_ = true;
  Output output(length, tail_, into);
  std::vector<RestartPoint> points;
  std::size_t fed = 0;
  while (fed < length) {
    const std::size_t part = std::min<std::size_t>(length - fed, UINT_MAX / 2);
    stream_.next_in = const_cast<Bytef*>(input + fed);
    stream_.avail_in = static_cast<uInt>(part);
    inflate(output, points);
    fed += part;
  }
  tail_ = output.last(kWindowBytes);
  PushResult result = output.take();
  result.points = std::move(points);
  failed_ = false;
  return result;
}

void GzipIndexer::on_member_start(std::vector<RestartPoint>& points) {
  in_member_ = true;
  member_out_offset_ = out_offset_;
  RestartPoint point;
  point.out_offset = out_offset_;
  point.in_offset = in_offset_;
  point.member_start = true;
  if (!any_member_) {
    any_member_ = true;
    points.push_back(std::move(point));
  } else if (out_offset_ - last_point_out_ >= span_bytes_) {
    last_point_out_ = out_offset_;
    pending_ = std::move(point);
  }
}

void GzipIndexer::on_output(std::uint64_t produced, std::vector<RestartPoint>& points) {
  if (produced == 0) return;
  if (pending_.has_value()) {
    points.push_back(std::move(*pending_));
    pending_.reset();
  }
  out_offset_ += produced;
}

// Consumes all of stream_.avail_in. Up to one byte before a point is due zlib runs freely; from there it is told to
// stop at every block boundary. One byte before, not at it: with its output full zlib may or may not pass a boundary,
// depending on how much input it had, and the points must not depend on that.
void GzipIndexer::inflate(Output& output, std::vector<RestartPoint>& points) {
  // Output that zlib holds back for lack of room comes with the next push: a member never ends with it, because its
  // trailer is still to be read.
  while (stream_.avail_in > 0) {
    if (!in_member_) on_member_start(points);
    const std::uint64_t due = last_point_out_ + span_bytes_;
    const bool free_run = out_offset_ + 1 < due;
    output.grow_when_full();
    std::uint64_t room = std::min<std::uint64_t>(output.room(), UINT_MAX / 2);
    if (free_run) room = std::min(room, due - 1 - out_offset_);

    const uInt in_before = stream_.avail_in;
    stream_.next_out = output.next();
    stream_.avail_out = static_cast<uInt>(room);
    const int status = ::inflate(&stream_, free_run ? Z_NO_FLUSH : Z_BLOCK);
    const std::size_t produced = room - stream_.avail_out;
    in_offset_ += in_before - stream_.avail_in;
    output.advance(produced);
    on_output(produced, points);

    if (status == Z_STREAM_END) {
      in_member_ = false;
      if (inflateReset(&stream_) != Z_OK) fail("inflateReset failed");
      continue;
    }
    if (status == Z_MEM_ERROR) throw std::bad_alloc();
    // Z_BUF_ERROR only says that there was no progress with this input and room.
    if (status != Z_OK && status != Z_BUF_ERROR) fail(status == Z_NEED_DICT ? "preset dictionary" : "inflate failed");

    // Bits of data_type (zlib.h, inflate): 128 at a block boundary, 64 after the last block, 0-2 unused bits.
    const bool before_block = (stream_.data_type & 128) != 0 && (stream_.data_type & 64) == 0;
    if (before_block && out_offset_ >= due) {
      RestartPoint point;
      point.out_offset = out_offset_;
      point.in_offset = in_offset_;
      point.bits = static_cast<std::uint32_t>(stream_.data_type & 7);
      point.window = output.last(std::min<std::uint64_t>(kWindowBytes, out_offset_ - member_out_offset_));
      last_point_out_ = out_offset_;
      pending_ = std::move(point);
    }
  }
}

void GzipIndexer::finish() {
  if (failed_) throw Error("LAYER_INVALID", "gzip stream was found invalid before");
  if (!any_member_ || in_member_) {
    failed_ = true;
    stream_.msg = nullptr;
    fail("the stream ends too early");
  }
}

}  // namespace dedup::inflate
