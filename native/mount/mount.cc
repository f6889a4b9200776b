// mount(2) and umount2(2) for JavaScript, each call on a thread of its own: mount reads the superblock through our own
// transport, so it must never run where that transport is served.
#include <sys/mount.h>

#include <cerrno>

#include "arguments.h"
#include "promise_thread.h"
#include "registry.h"

namespace dedup {
namespace {

Napi::Value mount_filesystem(const Napi::CallbackInfo& info) {
  const Napi::Object args = to_object(info[0], "args");
  const std::string source = to_text(args.Get("source"), "source");
  const std::string target = to_text(args.Get("target"), "target");
  const std::string type = to_text(args.Get("fstype"), "fstype");
  const std::uint64_t flags = to_u64(args.Get("flags"), "flags");
  const std::string data = to_text(args.Get("data"), "data");
  return run_on_thread(
      info.Env(),
      [=] {
        if (::mount(source.c_str(), target.c_str(), type.c_str(), flags, data.c_str()) != 0)
          throw sys_error(errno, "mount(2) type " + type + ", " + source + " on " + target, target);
      },
      to_undefined);
}

Napi::Value umount_filesystem(const Napi::CallbackInfo& info) {
  const std::string target = to_text(info[0], "target");
  const int flags = static_cast<int>(to_u64(info[1], "flags"));
  return run_on_thread(
      info.Env(),
      [=] {
        if (::umount2(target.c_str(), flags) != 0) throw sys_error(errno, "umount2(2) " + target, target);
      },
      to_undefined);
}

}  // namespace

void register_mount(Napi::Env env, Napi::Object exports) {
  export_async<mount_filesystem>(env, exports, "mount");
  export_async<umount_filesystem>(env, exports, "umount");
}

}  // namespace dedup
