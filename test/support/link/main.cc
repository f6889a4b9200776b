// Emulates a network link between two namespaces of its own (README.md). Started by link.ts, which writes commands to
// stdin, one a line, and reads one line of JSON for each; the first line names the namespaces. Ends with stdin.
//   set up|down rate BITS_PER_SECOND delay NS queue BYTES loss PROBABILITY seed N
//   stall up|down NS
//   counters
// "up" is from near to far.
#include <poll.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>

#include "direction.h"
#include "namespaces.h"

namespace link_emulation {
namespace {

constexpr const char* kNearAddress = "10.213.0.1";
constexpr const char* kFarAddress = "10.213.0.2";

void answer(const std::string& line) {
  const std::string text = line + "\n";
  // A reader that has gone ends us through stdin.
  if (::write(STDOUT_FILENO, text.data(), text.size()) < 0) return;
}

std::string json(const Counters& counters) {
  std::ostringstream out;
  out << "{\"packets\":" << counters.packets << ",\"bytes\":" << counters.bytes << ",\"lost\":" << counters.lost
      << ",\"dropped\":" << counters.dropped << ",\"refused\":" << counters.refused << "}";
  return out.str();
}

class Commands {
 public:
  Commands(Direction& up, Direction& down) : up_(up), down_(down) {}

  /** Carries out what has arrived on stdin. False when it has ended. */
  bool read() {
    char bytes[4096];
    const ssize_t length = ::read(STDIN_FILENO, bytes, sizeof bytes);
    if (length < 0 && errno == EINTR) return true;
    if (length <= 0) return false;
    text_.append(bytes, static_cast<std::size_t>(length));
    for (std::size_t end; (end = text_.find('\n')) != std::string::npos; text_.erase(0, end + 1))
      answer(attempt(text_.substr(0, end)));
    return true;
  }

 private:
  std::string attempt(const std::string& line) {
    try {
      return run(line);
    } catch (const std::exception& error) {
      // Only our own messages and strerror's: neither holds a quote.
      return std::string("{\"error\":\"") + error.what() + "\"}";
    }
  }

  std::string run(const std::string& line) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    if (verb == "counters") return "{\"up\":" + json(up_.counters()) + ",\"down\":" + json(down_.counters()) + "}";
    std::string name;
    words >> name;
    if (name != "up" && name != "down") throw std::invalid_argument("no such direction: " + line);
    Direction& direction = name == "up" ? up_ : down_;
    if (verb == "stall") {
      std::int64_t duration_ns = 0;
      if (!(words >> duration_ns) || duration_ns < 0) throw std::invalid_argument("no duration: " + line);
      direction.stall(duration_ns);
    } else if (verb == "set") {
      direction.set(settings(words, line));
    } else {
      throw std::invalid_argument("no such command: " + line);
    }
    return "{}";
  }

  static Settings settings(std::istringstream& words, const std::string& line) {
    Settings wanted;
    std::string keys[5];
    words >> keys[0] >> wanted.rate >> keys[1] >> wanted.delay_ns >> keys[2] >> wanted.queue_bytes >> keys[3] >>
        wanted.loss >> keys[4] >> wanted.seed;
    const bool complete = keys[0] == "rate" && keys[1] == "delay" && keys[2] == "queue" && keys[3] == "loss" &&
                          keys[4] == "seed" && !words.fail();
    if (!complete || wanted.rate <= 0 || wanted.delay_ns < 0 || wanted.loss < 0 || wanted.loss > 1)
      throw std::invalid_argument("bad settings: " + line);
    return wanted;
  }

  Direction& up_;
  Direction& down_;
  std::string text_;
};

/** A real link does not wait for a processor: be woken before others, exactly on time. Where it is refused, do without.
 */
void be_punctual() {
  ::prctl(PR_SET_TIMERSLACK, 1);
  sched_param priority{};
  priority.sched_priority = 1;
  if (::sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &priority) != 0) ::setpriority(PRIO_PROCESS, 0, -20);
}

void loop(Direction& up, Direction& down) {
  Commands commands(up, down);
  pollfd waits[] = {{STDIN_FILENO, POLLIN, 0}, {up.from(), POLLIN, 0}, {down.from(), POLLIN, 0}};
  for (bool more = false;;) {
    const std::int64_t deadline = std::min(up.deadline(), down.deadline());
    const std::int64_t left = more ? 0 : std::max<std::int64_t>(0, deadline - now_ns());
    const timespec timeout{left / 1'000'000'000, left % 1'000'000'000};
    if (::ppoll(waits, 3, deadline == kNever && !more ? nullptr : &timeout, nullptr) < 0) {
      if (errno == EINTR) continue;
      throw std::system_error(errno, std::generic_category(), "ppoll(2)");
    }
    if (waits[0].revents != 0 && !commands.read()) return;
    up.deliver();
    down.deliver();
    // Also when ppoll saw nothing: what deliver() handed over may have been answered already.
    const bool up_more = up.take();
    const bool down_more = down.take();
    more = up_more || down_more;
  }
}

int run() {
  End near = make_end("near", kNearAddress, kFarAddress);
  End far = make_end("far", kFarAddress, kNearAddress);
  Direction up(near.tun.get(), far.tun.get());
  Direction down(far.tun.get(), near.tun.get());
  up.set({});
  down.set({});
  be_punctual();
  answer("{\"near\":" + std::to_string(near.space.get()) + ",\"far\":" + std::to_string(far.space.get()) +
         ",\"nearAddress\":\"" + kNearAddress + "\",\"farAddress\":\"" + kFarAddress + "\"}");
  loop(up, down);
  return 0;
}

}  // namespace
}  // namespace link_emulation

int main() {
  try {
    return link_emulation::run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "link: %s\n", error.what());
    return 1;
  }
}
