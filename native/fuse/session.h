// A FUSE session of our own: mounts, detaches, answers the kernel on threads of its own, and hands READs it may not
// answer to its owner. Knows nothing of JavaScript (binding.cc does). Every file below its root shows the whole store.
#pragma once

#include <linux/fuse.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "fuse/channel.h"
#include "fuse/outstanding.h"
#include "fuse/read_log.h"
#include "owned_fd.h"
#include "store/store_reader.h"

namespace dedup::fuse {

struct SessionArgs {
  std::string mount_dir;
  store::StoreView store;
  unsigned threads = 4;
  std::uint16_t max_background = 512;
  /** Any thread: `take_misses` has something new. */
  std::function<void()> on_queued;
  /** Any thread, at most once: the connection ended, and not by close(). */
  std::function<void(int)> on_end;
};

struct Request;

struct Stats {
  std::uint64_t requests = 0;
  std::uint64_t hits = 0;
  std::uint64_t misses = 0;
  std::uint64_t hit_bytes = 0;
  std::uint64_t outstanding = 0;
  std::uint64_t errors = 0;
};

class Session {
 public:
  /** Mounts, negotiates, starts the threads and takes the mount out of sight. Blocks; not on the JS thread. */
  explicit Session(SessionArgs args);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /** A descriptor for the file with this number, read-only. Blocks until our threads have answered LOOKUP and OPEN. */
  int open_file(std::uint64_t file);
  std::vector<Miss> take_misses() { return outstanding_.take_queued(); }
  /** Answers a miss. Throws INTERNAL for an unknown id or a wrong length (the kernel got EIO), CLOSED after close(). */
  void reply(std::uint64_t id, std::span<const iovec> parts);
  void reply_error(std::uint64_t id, int err);
  /** Begins or ends noting the reads of a file, hits too. */
  void watch(std::uint64_t file, bool on) { read_log_.watch(file, on); }
  auto take_reads() { return read_log_.take(); }
  Stats stats() const;
  /** EIO for everything outstanding, end of the connection, threads joined. Blocks; idempotent; any other thread. */
  void close();

 private:
  void negotiate(const Channel& channel);
  void hide_mount();
  void forbid_flush();
  void run(const std::shared_ptr<const Channel>& channel);
  void handle(const std::shared_ptr<const Channel>& channel, const Request& request, std::uint8_t* buffer);
  void read(const std::shared_ptr<const Channel>& channel, const Request& request, std::uint8_t* buffer);
  void look_up(const Channel& channel, const Request& request);
  void get_attributes(const Channel& channel, const Request& request);
  fuse_attr attributes(std::uint64_t node) const;
  Miss take(std::uint64_t id);
  void ended(int err);
  void abort_connection();

  SessionArgs args_;  // callbacks: cleared by close() after the threads are joined
  Outstanding outstanding_;
  ReadLog read_log_;
  OwnedFd stop_;                                          // eventfd, readable once close() began
  std::vector<std::shared_ptr<const Channel>> channels_;  // constructor and close()
  std::vector<std::thread> threads_;                      // constructor and close()
  std::mutex close_mutex_;                                // held by close()
  bool closed_ = false;                                   // close_mutex_
  std::mutex root_mutex_;
  std::shared_ptr<const OwnedFd> root_;  // root_mutex_; O_PATH, keeps the detached mount
  std::uint32_t connection_ = 0;         // number below /sys/fs/fuse/connections
  OwnedFd mark_;                         // names it for others (mark.h); constructor and close()
  std::atomic<bool> stopping_{false};
  std::atomic<bool> ended_{false};
  std::atomic<std::uint64_t> requests_{0}, hits_{0}, misses_{0}, hit_bytes_{0}, errors_{0};
};

}  // namespace dedup::fuse
