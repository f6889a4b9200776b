// What a session answers to each kind of request: a root with any decimal number as a file, all of them the store.
// Runs on the reader threads.
#include <fcntl.h>
#include <sys/stat.h>

#include <cerrno>
#include <charconv>
#include <optional>

#include "fuse/abi.h"
#include "fuse/request.h"
#include "fuse/session.h"

namespace dedup::fuse {
namespace {

static_assert(fuse_abi::kMaxReadBytes <= store::kMaxReadBytes);

// Node 1 is the root (FUSE_ROOT_ID), file n is node n + 2.
constexpr std::uint64_t kFirstFileNode = 2;
// Names and attributes never change; a year in seconds.
constexpr std::uint64_t kValidSeconds = 365ULL * 24 * 3600;
constexpr std::uint32_t kBlock = 4096;
// File numbers are JavaScript integers.
constexpr std::uint64_t kMaxFile = (1ULL << 53) - 1;

std::optional<std::uint64_t> file_number(std::string_view name) {
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  if (error != std::errc() || end != name.data() + name.size() || number > kMaxFile) return std::nullopt;
  // One name a file: no leading zero.
  if (name.size() > 1 && name.front() == '0') return std::nullopt;
  return number;
}

}  // namespace

fuse_attr Session::attributes(std::uint64_t node) const {
  fuse_attr attr{};
  attr.ino = node;
  attr.blksize = kBlock;
  if (node == FUSE_ROOT_ID) {
    attr.mode = S_IFDIR | 0500;
    attr.nlink = 2;
  } else {
    attr.mode = S_IFREG | 0400;
    attr.nlink = 1;
    attr.size = args_.store.bytes;
    attr.blocks = args_.store.bytes / 512;
  }
  return attr;
}

void Session::look_up(const Channel& channel, const Request& request) {
  const std::optional<std::uint64_t> file = file_number(request.name());
  if (request.node() != FUSE_ROOT_ID || !file) {
    channel.reply(request.unique(), ENOENT);
    return;
  }
  fuse_entry_out out{};
  out.nodeid = *file + kFirstFileNode;
  out.entry_valid = kValidSeconds;
  out.attr_valid = kValidSeconds;
  out.attr = attributes(out.nodeid);
  channel.reply(request.unique(), 0, &out, sizeof out);
}

void Session::get_attributes(const Channel& channel, const Request& request) {
  fuse_attr_out out{};
  out.attr_valid = kValidSeconds;
  out.attr = attributes(request.node());
  channel.reply(request.unique(), 0, &out, sizeof out);
}

void Session::read(const std::shared_ptr<const Channel>& channel, const Request& request, std::uint8_t* buffer) {
  const auto fail = [&](int err) {
    errors_.fetch_add(1, std::memory_order_relaxed);
    channel->reply(request.unique(), err);
  };
  const auto* in = request.body<fuse_read_in>();
  if (in == nullptr || request.node() < kFirstFileNode) return fail(EINVAL);
  const store::StoreView& view = args_.store;
  // The size of the file is constant and a multiple of a block: the kernel asks for nothing beyond it, so a READ that
  // does is not shortened but refused.
  if (in->size > fuse_abi::kMaxReadBytes || in->offset > view.bytes || in->size > view.bytes - in->offset)
    return fail(EIO);
  const store::Hit hit = store::read_store(view, in->offset, in->size, buffer);
  read_log_.add(request.node() - kFirstFileNode, in->offset, in->size, hit != store::Hit::yes);
  switch (hit) {
    case store::Hit::yes: {
      const iovec part{buffer, in->size};
      if (channel->reply_read(request.unique(), in->size, {&part, 1}) != Answer::sent)
        errors_.fetch_add(1, std::memory_order_relaxed);
      hits_.fetch_add(1, std::memory_order_relaxed);
      hit_bytes_.fetch_add(in->size, std::memory_order_relaxed);
      return;
    }
    case store::Hit::failed:
      return fail(EIO);
    case store::Hit::damaged:
    case store::Hit::no:
      break;
  }
  misses_.fetch_add(1, std::memory_order_relaxed);
  Miss miss;
  miss.unique = request.unique();
  miss.file = request.node() - kFirstFileNode;
  miss.offset = in->offset;
  miss.length = in->size;
  miss.damaged = hit == store::Hit::damaged;
  miss.channel = channel;
  bool first = false;
  if (!outstanding_.add(std::move(miss), &first)) return fail(EIO);
  if (first) args_.on_queued();
}

void Session::handle(const std::shared_ptr<const Channel>& channel, const Request& request, std::uint8_t* buffer) {
  switch (request.opcode()) {
    case FUSE_READ:
      read(channel, request, buffer);
      return;
    case FUSE_LOOKUP:
      look_up(*channel, request);
      return;
    case FUSE_GETATTR:
      get_attributes(*channel, request);
      return;
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
      const auto* in = request.body<fuse_open_in>();
      if (in == nullptr || (in->flags & O_ACCMODE) != O_RDONLY) {
        channel->reply(request.unique(), EROFS);
        return;
      }
      fuse_open_out out{};
      out.open_flags = fuse_abi::kNoFlush;
      channel->reply(request.unique(), 0, &out, sizeof out);
      return;
    }
    case FUSE_STATFS: {
      fuse_statfs_out out{};
      out.st.bsize = kBlock;
      out.st.frsize = kBlock;
      out.st.namelen = 255;
      channel->reply(request.unique(), 0, &out, sizeof out);
      return;
    }
    case FUSE_READDIR:  // Empty: which files exist is not for show.
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_ACCESS:
    case FUSE_DESTROY:
      channel->reply(request.unique(), 0);
      return;
    case FUSE_FORGET:  // These three take no answer. An interrupted READ is still answered, once, by its own answer.
    case FUSE_BATCH_FORGET:
    case FUSE_INTERRUPT:
      return;
    case FUSE_FLUSH:  // Never asked again on this connection.
    default:
      channel->reply(request.unique(), ENOSYS);
      return;
  }
}

}  // namespace dedup::fuse
