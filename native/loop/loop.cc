// Loop devices for JavaScript. Every call runs on a thread of its own.
#include "arguments.h"
#include "loop/abi.h"
#include "loop/device.h"
#include "promise_thread.h"
#include "registry.h"

namespace dedup {
namespace {

Napi::Value attach(const Napi::CallbackInfo& info) {
  const Napi::Object object = to_object(info[0], "args");
  loop::AttachArgs args;
  args.fd = to_fd(object.Get("fd"), "fd");
  args.read_only = to_bool(object.Get("readOnly"), "readOnly");
  args.direct_io = to_bool(object.Get("directIo"), "directIo");
  args.offset = to_u64(object.Get("offset"), "offset");
  args.size_limit = to_u64(object.Get("sizeLimit"), "sizeLimit");
  const std::uint64_t block_size = to_u64(object.Get("blockSize"), "blockSize");
  if (block_size > 65536) throw Error("INVALID_ARGUMENT", "blockSize is too large");
  args.block_size = static_cast<std::uint32_t>(block_size);
  args.autoclear = to_bool(object.Get("autoclear"), "autoclear");
  args.name = to_text(object.Get("name"), "name");
  if (args.name.size() >= loop_abi::kNameBytes) throw Error("INVALID_ARGUMENT", "name is longer than 63 bytes");
  const Napi::Value legacy = object.Get("forceLegacy");
  args.force_legacy = !legacy.IsUndefined() && to_bool(legacy, "forceLegacy");
  return run_on_thread(
      info.Env(), [args] { return loop::attach(args); },
      [](Napi::Env env, const loop::Device& device) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result.Set("path", device.path);
        result.Set("number", device.number);
        result.Set("configured", device.configured);
        return result;
      });
}

Napi::Value detach(const Napi::CallbackInfo& info) {
  const std::string path = to_text(info[0], "path");
  const std::string name = info[1].IsUndefined() ? "" : to_text(info[1], "name");
  return run_on_thread(
      info.Env(), [path, name] { loop::detach(path, name); }, to_undefined);
}

Napi::Value status(const Napi::CallbackInfo& info) {
  const std::string path = to_text(info[0], "path");
  return run_on_thread(
      info.Env(), [path] { return loop::status(path); },
      [](Napi::Env env, const loop::Status& status) -> Napi::Value {
        Napi::Object result = Napi::Object::New(env);
        result.Set("name", status.name);
        // As fs.Stats has them, and as imprecise beyond 2^53.
        result.Set("device", static_cast<double>(status.device));
        result.Set("inode", static_cast<double>(status.inode));
        return result;
      });
}

Napi::Value change_fd(const Napi::CallbackInfo& info) {
  const std::string path = to_text(info[0], "path");
  const int fd = to_fd(info[1], "fd");
  const std::string name = info[2].IsUndefined() ? "" : to_text(info[2], "name");
  return run_on_thread(
      info.Env(), [path, fd, name] { loop::change_fd(path, fd, name); }, to_undefined);
}

}  // namespace

void register_loop(Napi::Env env, Napi::Object exports) {
  export_async<attach>(env, exports, "loopAttach");
  export_async<detach>(env, exports, "loopDetach");
  export_async<status>(env, exports, "loopStatus");
  export_async<change_fd>(env, exports, "loopChangeFd");
}

}  // namespace dedup
