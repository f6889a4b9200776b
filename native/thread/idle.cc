// Takes the calling thread out of everybody's way. For worker threads with work that can wait, such as directory
// conversions (src/fs/directory); never for a thread that others wait for.
#include <linux/ioprio.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "arguments.h"
#include "registry.h"

namespace dedup {
namespace {

/** idleThread(): SCHED_IDLE and the idle I/O class, for the calling thread alone (sched(7), ioprio_set(2): 0). */
Napi::Value idle_thread(const Napi::CallbackInfo& info) {
  const sched_param none{};
  if (::sched_setscheduler(0, SCHED_IDLE, &none) != 0) throw sys_error(errno, "sched_setscheduler(2) to SCHED_IDLE");
  constexpr int kIdle = IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0);
  if (::syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, kIdle) != 0)
    throw sys_error(errno, "ioprio_set(2) to the idle class");
  return info.Env().Undefined();
}

}  // namespace

void register_thread(Napi::Env env, Napi::Object exports) { export_function<idle_thread>(env, exports, "idleThread"); }

}  // namespace dedup
