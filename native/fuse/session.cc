#include "fuse/session.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "error.h"
#include "fuse/abi.h"
#include "fuse/mark.h"
#include "fuse/request.h"

namespace dedup::fuse {
namespace {

// FUSE_INIT is queued by mount(2) itself.
constexpr int kInitTimeoutMs = 10'000;

OwnedFd open_fuse_device() {
  OwnedFd device(::open(fuse_abi::kDevice, O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!device.valid()) throw sys_error(errno, std::string("open(2) ") + fuse_abi::kDevice, fuse_abi::kDevice);
  return device;
}

/** The connection of the file system mounted on `directory`. Asks no server: nobody may have to wait for us yet. */
std::uint32_t connection_on(const char* directory) {
  struct statx status {};
  if (::statx(AT_FDCWD, directory, AT_STATX_DONT_SYNC, STATX_TYPE, &status) != 0)
    throw sys_error(errno, std::string("statx(2) ") + directory, directory);
  return status.stx_dev_minor;
}

}  // namespace

Session::Session(SessionArgs args) : args_(std::move(args)) {
  // Only blocks known to be present are asked for; readahead would bring holes into the page cache.
  ::posix_fadvise(args_.store.fd, 0, 0, POSIX_FADV_RANDOM);
  stop_ = OwnedFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop_.valid()) throw sys_error(errno, "eventfd(2)");

  OwnedFd device = open_fuse_device();
  char options[128];
  std::snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", device.get());
  const char* directory = args_.mount_dir.c_str();
  if (::mount("dedup", directory, "fuse.dedup", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, options) != 0)
    throw sys_error(errno, "mount(2) type fuse on " + args_.mount_dir, args_.mount_dir);
  bool hidden = false;
  try {
    // Before anything waits for this session: whoever is killed while it does can be helped only by who sees the mark.
    connection_ = connection_on(directory);
    mark_ = mark_connection(connection_);
    auto main = std::make_shared<const Channel>(std::move(device));
    channels_.push_back(main);
    negotiate(*main);
    for (unsigned i = 1; i < args_.threads; i++) {
      OwnedFd clone = open_fuse_device();
      std::uint32_t origin = static_cast<std::uint32_t>(main->fd());
      if (::ioctl(clone.get(), FUSE_DEV_IOC_CLONE, &origin) != 0) throw sys_error(errno, "FUSE_DEV_IOC_CLONE");
      channels_.push_back(std::make_shared<const Channel>(std::move(clone)));
    }
    for (const auto& channel : channels_) threads_.emplace_back([this, channel] { run(channel); });
    hide_mount();
    hidden = true;
    forbid_flush();
  } catch (...) {
    if (!hidden) {
      // Nobody has opened a file of it: it goes with the mount, and its number may be another session's at once.
      connection_ = 0;
      ::umount2(directory, MNT_DETACH);
    }
    close();
    throw;
  }
}

Session::~Session() { close(); }

void Session::negotiate(const Channel& channel) {
  pollfd waiting{channel.fd(), POLLIN, 0};
  if (::poll(&waiting, 1, kInitTimeoutMs) <= 0) throw Error("ETIMEDOUT", "FUSE_INIT does not come", ETIMEDOUT);
  RequestBuffer buffer;
  const Request request = buffer.read(channel.fd());
  if (request.error != 0) throw sys_error(request.error, "reading FUSE_INIT");
  const auto* in = request.body<fuse_abi::InitIn>();
  if (request.opcode() != FUSE_INIT || in == nullptr) throw Error("INTERNAL", "the first FUSE request is not INIT");
  const bool version = in->major == fuse_abi::kMajor && in->minor >= fuse_abi::kMinor;
  const bool flags = (in->flags & fuse_abi::kRequiredFlags) == fuse_abi::kRequiredFlags;
  if (!version || !flags) {
    channel.reply(request.unique(), EPROTO);
    throw Error("KERNEL_UNSUPPORTED", "FUSE protocol " + std::to_string(in->major) + "." + std::to_string(in->minor) +
                                          " of this kernel is not enough: 7.31 with ASYNC_DIO and MAX_PAGES is needed");
  }
  fuse_init_out out{};
  out.major = fuse_abi::kMajor;
  out.minor = fuse_abi::kMinor;
  out.max_readahead = std::max(in->max_readahead, fuse_abi::kMaxReadBytes);
  out.flags = in->flags & fuse_abi::kWantedFlags;
  out.max_background = args_.max_background;
  out.congestion_threshold = args_.max_background;
  out.max_write = fuse_abi::kMaxWriteBytes;
  out.time_gran = 1;
  out.max_pages = fuse_abi::kMaxPages;
  if (channel.reply(request.unique(), 0, &out, sizeof out) != Answer::sent)
    throw Error("EIO", "the kernel did not take the answer to FUSE_INIT", EIO);
}

void Session::hide_mount() {
  const char* directory = args_.mount_dir.c_str();
  auto root = std::make_shared<const OwnedFd>(::open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!root->valid()) throw sys_error(errno, "open(2) " + args_.mount_dir, args_.mount_dir);
  if (::umount2(directory, MNT_DETACH) != 0) throw sys_error(errno, "umount2(2) " + args_.mount_dir, args_.mount_dir);
  std::lock_guard lock(root_mutex_);
  root_ = std::move(root);
}

/**
 * A process that is killed closes its files one by one, and waits for the answer to each FLUSH; ours would wait for
 * itself, for ever, because /dev/fuse is let go after that. Kernels that do not know FOPEN_NOFLUSH send none once the
 * first was answered with ENOSYS: this is the first (fuse_flush in fs/fuse/file.c).
 */
void Session::forbid_flush() { OwnedFd closed(open_file(0)); }

int Session::open_file(std::uint64_t file) {
  std::shared_ptr<const OwnedFd> root;
  {
    std::lock_guard lock(root_mutex_);
    root = root_;
  }
  if (!root) throw Error("CLOSED", "the FUSE session is closed");
  const std::string name = std::to_string(file);
  const int fd = ::openat(root->get(), name.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw sys_error(errno, "openat(2) of file " + name + " of the FUSE session", name);
  return fd;
}

void Session::run(const std::shared_ptr<const Channel>& channel) {
  OwnedFd waiter(::epoll_create1(EPOLL_CLOEXEC));
  // Exclusive: one request wakes one idle thread, not all.
  epoll_event on_request{EPOLLIN | EPOLLEXCLUSIVE, {}};
  epoll_event on_stop{EPOLLIN, {}};
  if (!waiter.valid() || ::epoll_ctl(waiter.get(), EPOLL_CTL_ADD, channel->fd(), &on_request) != 0 ||
      ::epoll_ctl(waiter.get(), EPOLL_CTL_ADD, stop_.get(), &on_stop) != 0) {
    ended(errno);
    return;
  }
  RequestBuffer requests;
  DataBuffer data;
  while (!stopping_.load(std::memory_order_acquire)) {
    const Request request = requests.read(channel->fd());
    switch (request.error) {
      case 0:
        requests_.fetch_add(1, std::memory_order_relaxed);
        handle(channel, request, data.data());
        break;
      case EAGAIN: {
        epoll_event event{};
        if (::epoll_wait(waiter.get(), &event, 1, -1) < 0 && errno != EINTR) {
          ended(errno);
          return;
        }
        break;
      }
      case EINTR:
      case ENOENT:  // The request was interrupted before it was read.
        break;
      default:
        ended(request.error);
        return;
    }
  }
}

void Session::ended(int err) {
  if (stopping_.load(std::memory_order_acquire) || ended_.exchange(true)) return;
  args_.on_end(err);
}

Miss Session::take(std::uint64_t id) {
  std::optional<Miss> miss = outstanding_.take(id);
  if (miss) return std::move(*miss);
  if (outstanding_.closed()) throw Error("CLOSED", "the FUSE session is closed");
  throw Error("INTERNAL", "request " + std::to_string(id) + " is unknown or was answered before");
}

void Session::reply(std::uint64_t id, std::span<const iovec> parts) {
  const Miss miss = take(id);
  switch (miss.channel->reply_read(miss.unique, miss.length, parts)) {
    case Answer::sent:
      return;
    case Answer::gone:
      errors_.fetch_add(1, std::memory_order_relaxed);
      return;
    case Answer::wrong_length:
      errors_.fetch_add(1, std::memory_order_relaxed);
      throw Error("INTERNAL", "the answer to request " + std::to_string(id) + " does not have the " +
                                  std::to_string(miss.length) + " bytes asked for; the reader gets EIO");
  }
}

void Session::reply_error(std::uint64_t id, int err) {
  const Miss miss = take(id);
  errors_.fetch_add(1, std::memory_order_relaxed);
  miss.channel->reply(miss.unique, err);
}

Stats Session::stats() const {
  return {requests_.load(), hits_.load(), misses_.load(), hit_bytes_.load(), outstanding_.size(), errors_.load()};
}

void Session::abort_connection() {
  if (connection_ == 0) return;
  // Closing the last descriptor does the same; this also ends it while a child between fork and exec holds one.
  const std::string path = "/sys/fs/fuse/connections/" + std::to_string(connection_) + "/abort";
  OwnedFd control(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (control.valid() && ::write(control.get(), "1", 1) != 1) errors_.fetch_add(1, std::memory_order_relaxed);
}

void Session::close() {
  std::lock_guard lock(close_mutex_);
  if (std::exchange(closed_, true)) return;
  stopping_.store(true, std::memory_order_release);
  const std::uint64_t one = 1;
  // Fails only when the counter overflows.
  if (::write(stop_.get(), &one, sizeof one) < 0) errors_.fetch_add(1, std::memory_order_relaxed);
  for (const Miss& miss : outstanding_.close()) miss.channel->reply(miss.unique, EIO);
  for (auto& thread : threads_) thread.join();
  threads_.clear();
  if (!ended_.load()) abort_connection();
  channels_.clear();
  // Before the root: once that has gone the number may be another session's.
  mark_.reset();
  stop_.reset();
  {
    std::lock_guard root_lock(root_mutex_);
    root_.reset();
  }
  args_.on_queued = nullptr;
  args_.on_end = nullptr;
}

}  // namespace dedup::fuse
