#include "store/piece_writer.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>

#include "aligned_memory.h"
#include "error.h"
#include "presence/bitmap.h"
#include "store/block_sums.h"
#include "store/file_io.h"

namespace dedup::store {
namespace {

using presence::kBlockBytes;

std::size_t padded(std::size_t length) { return (length + kBlockBytes - 1) / kBlockBytes * kBlockBytes; }

// Scratch memory outlives a job: touching 4 MiB of new pages costs as much as hashing 1 MiB.
class Scratch {
 public:
  Scratch() {
    {
      std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        memory_ = std::move(idle_.back());
        idle_.pop_back();
      }
    }
    if (memory_ == nullptr) memory_ = allocate_aligned(kMaxWriteBytes);
  }
  ~Scratch() {
    std::lock_guard lock(mutex_);
    if (idle_.size() < kMaxIdle) idle_.push_back(std::move(memory_));
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::uint8_t* get() const { return memory_.get(); }

 private:
  static constexpr std::size_t kMaxIdle = 4;
  static inline std::mutex mutex_;
  static inline std::vector<MallocBytes> idle_;  // mutex_
  MallocBytes memory_;
};

// Neighbouring pieces on their way into one write. Bytes are copied first and verified in the copy: what is hashed is
// what is written, even if the source changes meanwhile.
class Run {
 public:
  Run(const PieceJob& job, std::vector<std::uint8_t>& result) : job_(job), result_(result) {}

  void add(std::size_t index) {
    const Piece& piece = job_.pieces[index];
    const std::size_t length = padded(piece.bytes.size());
    if (length_ > 0 && (piece.address != address_ + length_ || length_ + length > kMaxWriteBytes)) flush();
    std::uint8_t* to = scratch_.get() + length_;
    std::memcpy(to, piece.bytes.data(), piece.bytes.size());
    if (sha256(to, piece.bytes.size()) != piece.digest) return;
    if (presence::all_set(job_.presence.data(), piece.address / kBlockBytes, length / kBlockBytes)) {
      result_[index] = 1;
      return;
    }
    std::memset(to + piece.bytes.size(), 0, length - piece.bytes.size());
    if (length_ == 0) address_ = piece.address;
    length_ += length;
    members_.push_back(index);
  }

  void flush() {
    if (length_ == 0) return;
    const std::uint64_t first = address_ / kBlockBytes;
    const std::size_t blocks = length_ / kBlockBytes;
    write_all(job_.fd, scratch_.get(), length_, address_, "store");
    block_sums(scratch_.get(), blocks, sums_.data());
    write_sums(job_.sums_fd, sums_.data(), blocks, first);
    presence::set(job_.presence.data(), first, blocks);
    for (const std::size_t index : members_) result_[index] = 1;
    members_.clear();
    length_ = 0;
  }

 private:
  const PieceJob& job_;
  std::vector<std::uint8_t>& result_;
  Scratch scratch_;
  std::vector<std::size_t> members_;
  std::array<Sum, kMaxWriteBytes / kBlockBytes> sums_;
  std::uint64_t address_ = 0;
  std::size_t length_ = 0;
};

bool same(const Piece& a, const Piece& b) {
  return a.address == b.address && a.bytes.size() == b.bytes.size() && a.digest == b.digest;
}

/** Indexes of the pieces by address. Throws INVALID_ARGUMENT for a job that cannot be right. */
std::vector<std::size_t> checked_order(const PieceJob& job) {
  const std::uint64_t store_bytes = static_cast<std::uint64_t>(job.presence.size()) * 8 * kBlockBytes;
  for (const Piece& piece : job.pieces) {
    if (piece.bytes.empty() || piece.bytes.size() > kMaxWriteBytes)
      throw Error("INVALID_ARGUMENT", "a piece must have 1 byte to 4 MiB");
    if (piece.address % kBlockBytes != 0)
      throw Error("INVALID_ARGUMENT", "the address of a piece is not 4 KiB aligned");
    if (piece.address > store_bytes || padded(piece.bytes.size()) > store_bytes - piece.address)
      throw Error("INVALID_ARGUMENT", "the address of a piece is beyond the end of the store");
  }
  std::vector<std::size_t> order(job.pieces.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return job.pieces[a].address < job.pieces[b].address; });
  for (std::size_t i = 1; i < order.size(); i++) {
    const Piece& before = job.pieces[order[i - 1]];
    const Piece& piece = job.pieces[order[i]];
    if (piece.address < before.address + padded(before.bytes.size()) && !same(before, piece))
      throw Error("INVALID_ARGUMENT", "two different pieces overlap in the store at " + std::to_string(piece.address));
  }
  return order;
}

}  // namespace

std::vector<std::uint8_t> write_pieces(const PieceJob& job) {
  std::vector<std::uint8_t> result(job.pieces.size(), 0);
  Run run(job, result);
  // The same piece may come several times (one content twice in a layer): each copy stands for itself, a bad one does
  // not spoil a good one, and once the first good one is written the others find it present.
  std::size_t previous = job.pieces.size();
  for (const std::size_t index : checked_order(job)) {
    if (previous < job.pieces.size() && same(job.pieces[previous], job.pieces[index])) run.flush();
    run.add(index);
    previous = index;
  }
  run.flush();
  return result;
}

}  // namespace dedup::store
