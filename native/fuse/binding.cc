// The FUSE session as JavaScript sees it: fuseStart and the class FuseSession. Misses and the end of the connection
// reach JavaScript through the addon's queue; answers go to the kernel from the JS thread without another hop.
#include <memory>
#include <vector>

#include "arguments.h"
#include "fuse/mark.h"
#include "fuse/session.h"
#include "promise_thread.h"
#include "registry.h"
#include "store/touched.h"

namespace dedup {
namespace {

using fuse::Miss;
using fuse::Session;

/** The session's way back to JavaScript. Made and destroyed on the JS thread. */
struct Callbacks {
  Napi::FunctionReference on_miss;
  Napi::FunctionReference on_end;
  /** Keep the memory mapped while threads use it. */
  Napi::ObjectReference presence;
  Napi::ObjectReference touched;
  std::weak_ptr<Session> session;

  void deliver(Napi::Env env) {
    const std::shared_ptr<Session> target = session.lock();
    if (!target) return;
    const std::vector<Miss> misses = target->take_misses();
    if (misses.empty()) return;
    try {
      Napi::Array list = Napi::Array::New(env, misses.size());
      for (std::uint32_t i = 0; i < misses.size(); i++) {
        Napi::Object item = Napi::Object::New(env);
        item.Set("id", static_cast<double>(misses[i].id));
        item.Set("file", static_cast<double>(misses[i].file));
        item.Set("offset", static_cast<double>(misses[i].offset));
        item.Set("length", misses[i].length);
        item.Set("damaged", misses[i].damaged);
        list.Set(i, item);
      }
      on_miss.Call({list});
    } catch (...) {
      // Whatever of the batch was not answered would wait for ever.
      for (const Miss& miss : misses) {
        try {
          target->reply_error(miss.id, EIO);
        } catch (const Error&) {
          // Answered before onMiss threw.
        }
      }
      throw;
    }
  }
};

/** Shared by the session's threads; the last owner sends it to the JS thread to be destroyed. */
std::shared_ptr<Callbacks> make_callbacks(AddonState& state, std::unique_ptr<Callbacks> callbacks) {
  return {callbacks.release(), [state = state.shared_from_this()](Callbacks* last) {
            // Without an environment its references are gone already, and only memory of a dead one is left.
            state->post([last](Napi::Env) { delete last; });
          }};
}

class FuseSession : public Napi::ObjectWrap<FuseSession> {
 public:
  static Napi::Object create(Napi::Env env, std::shared_ptr<Session> session, std::uint64_t closer) {
    const Napi::Function constructor =
        DefineClass(env, "FuseSession",
                    {
                        InstanceMethod("openFile", &FuseSession::guarded_async<&FuseSession::open_file>),
                        InstanceMethod("reply", &FuseSession::guarded<&FuseSession::reply>),
                        InstanceMethod("replyError", &FuseSession::guarded<&FuseSession::reply_error>),
                        InstanceMethod("watchReads", &FuseSession::guarded<&FuseSession::watch_reads>),
                        InstanceMethod("takeReads", &FuseSession::guarded<&FuseSession::take_reads>),
                        InstanceMethod("stats", &FuseSession::guarded<&FuseSession::stats>),
                        InstanceMethod("close", &FuseSession::guarded_async<&FuseSession::close>),
                    });
    Napi::Object object = constructor.New({});
    FuseSession* self = Unwrap(object);
    self->session_ = std::move(session);
    self->closer_ = closer;
    return object;
  }

  explicit FuseSession(const Napi::CallbackInfo& info) : Napi::ObjectWrap<FuseSession>(info) {}

 private:
  template <Napi::Value (FuseSession::*method)(const Napi::CallbackInfo&)>
  Napi::Value guarded(const Napi::CallbackInfo& info) {
    try {
      if (!session_) throw Error("CLOSED", "the FUSE session was not started");
      return (this->*method)(info);
    } catch (const Napi::Error&) {
      throw;
    } catch (...) {
      throw to_js(info.Env(), std::current_exception());
    }
  }

  template <Napi::Value (FuseSession::*method)(const Napi::CallbackInfo&)>
  Napi::Value guarded_async(const Napi::CallbackInfo& info) {
    try {
      return guarded<method>(info);
    } catch (...) {
      return rejected(info.Env(), std::current_exception());
    }
  }

  Napi::Value open_file(const Napi::CallbackInfo& info) {
    const std::uint64_t file = to_u64(info[0], "file");
    return run_on_thread(
        info.Env(), [session = session_, file] { return session->open_file(file); },
        [](Napi::Env env, int fd) -> Napi::Value { return Napi::Number::New(env, fd); });
  }

  Napi::Value reply(const Napi::CallbackInfo& info) {
    const std::uint64_t id = to_u64(info[0], "id");
    if (!info[1].IsArray()) throw Error("INVALID_ARGUMENT", "parts must be an array");
    const Napi::Array list = info[1].As<Napi::Array>();
    std::vector<iovec> parts;
    parts.reserve(list.Length());
    for (std::uint32_t i = 0; i < list.Length(); i++) {
      Napi::Uint8Array part = to_bytes(list.Get(i), "part");
      parts.push_back({part.Data(), part.ByteLength()});
    }
    session_->reply(id, parts);
    return info.Env().Undefined();
  }

  Napi::Value reply_error(const Napi::CallbackInfo& info) {
    const std::uint64_t id = to_u64(info[0], "id");
    const std::uint64_t err = to_u64(info[1], "errno");
    // The range the kernel accepts: fs/fuse/dev.c, -512 < error <= 0.
    if (err == 0 || err >= 512) throw Error("INVALID_ARGUMENT", "errno must be between 1 and 511");
    session_->reply_error(id, static_cast<int>(err));
    return info.Env().Undefined();
  }

  Napi::Value watch_reads(const Napi::CallbackInfo& info) {
    session_->watch(to_u64(info[0], "file"), info[1].ToBoolean());
    return info.Env().Undefined();
  }

  /** Four numbers a read: file, offset, length (negative when it was a miss), milliseconds of CLOCK_MONOTONIC. */
  Napi::Value take_reads(const Napi::CallbackInfo& info) {
    const auto [reads, lost] = session_->take_reads();
    Napi::Float64Array numbers = Napi::Float64Array::New(info.Env(), reads.size() * 4);
    double* at = numbers.Data();
    for (const fuse::SeenRead& read : reads) {
      *at++ = static_cast<double>(read.file);
      *at++ = static_cast<double>(read.offset);
      *at++ = read.missed ? -static_cast<double>(read.length) : static_cast<double>(read.length);
      *at++ = read.at_ms;
    }
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("reads", numbers);
    result.Set("lost", static_cast<double>(lost));
    return result;
  }

  Napi::Value stats(const Napi::CallbackInfo& info) {
    const fuse::Stats stats = session_->stats();
    Napi::Object result = Napi::Object::New(info.Env());
    result.Set("requests", static_cast<double>(stats.requests));
    result.Set("hits", static_cast<double>(stats.hits));
    result.Set("misses", static_cast<double>(stats.misses));
    result.Set("hitBytes", static_cast<double>(stats.hit_bytes));
    result.Set("outstanding", static_cast<double>(stats.outstanding));
    result.Set("errors", static_cast<double>(stats.errors));
    return result;
  }

  Napi::Value close(const Napi::CallbackInfo& info) {
    AddonState& state = AddonState::of(info.Env());
    const std::uint64_t closer = std::exchange(closer_, 0);
    return run_on_thread(
        info.Env(), [session = session_] { session->close(); },
        [&state, closer](Napi::Env env) -> Napi::Value {
          if (closer != 0) {
            state.forget_closer(closer);
            state.settled();
          }
          return env.Undefined();
        });
  }

  std::shared_ptr<Session> session_;
  std::uint64_t closer_ = 0;
};

Napi::Value start(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  const Napi::Object object = to_object(info[0], "args");
  fuse::SessionArgs args;
  args.mount_dir = to_text(object.Get("mountDir"), "mountDir");
  args.store.fd = to_fd(object.Get("storeFd"), "storeFd");
  args.store.sums_fd = to_fd(object.Get("sumsFd"), "sumsFd");
  args.store.bytes = to_u64(object.Get("storeBytes"), "storeBytes");
  args.store.head_bytes = to_u64(object.Get("headBytes"), "headBytes");
  args.store.tail_bytes = to_u64(object.Get("tailBytes"), "tailBytes");
  const std::uint64_t threads = to_u64(object.Get("threads"), "threads");
  const std::uint64_t background = to_u64(object.Get("maxBackground"), "maxBackground");
  Napi::Uint8Array presence = to_bytes(object.Get("presence"), "presence");
  const std::uint64_t blocks = args.store.bytes / 4096;
  if (args.store.bytes == 0 || args.store.bytes % 4096 != 0 || args.store.bytes > (1ULL << 44))
    throw Error("INVALID_ARGUMENT", "storeBytes must be a multiple of 4096 up to 16 TiB");
  if (args.store.head_bytes % 4096 != 0 || args.store.tail_bytes % 4096 != 0 ||
      args.store.head_bytes > args.store.bytes || args.store.tail_bytes > args.store.bytes - args.store.head_bytes)
    throw Error("INVALID_ARGUMENT", "headBytes and tailBytes must be multiples of 4096 within the store");
  if (threads < 1 || threads > 64) throw Error("INVALID_ARGUMENT", "threads must be between 1 and 64");
  if (background < 1 || background > 65535)
    throw Error("INVALID_ARGUMENT", "maxBackground must be between 1 and 65535");
  if (presence.ByteLength() < (blocks + 7) / 8 || reinterpret_cast<std::uintptr_t>(presence.Data()) % 4096 != 0)
    throw Error("INVALID_ARGUMENT", "presence must come from presenceCreate for this store");
  args.store.presence = presence.Data();
  Napi::ObjectReference kept_touched;
  if (const Napi::Value value = object.Get("touched"); !value.IsUndefined()) {
    if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array)
      throw Error("INVALID_ARGUMENT", "touched must be a Uint32Array");
    auto touched = value.As<Napi::Uint32Array>();
    if (touched.ElementLength() < (args.store.bytes + store::kTouchedBytes - 1) / store::kTouchedBytes)
      throw Error("INVALID_ARGUMENT", "touched must come from touchedCreate for this store");
    args.store.touched = touched.Data();
    kept_touched = Napi::Persistent(touched.As<Napi::Object>());
  }
  args.threads = static_cast<unsigned>(threads);
  args.max_background = static_cast<std::uint16_t>(background);

  AddonState& state = AddonState::of(env);
  auto fresh = std::make_unique<Callbacks>();
  fresh->on_miss = Napi::Persistent(to_function(object.Get("onMiss"), "onMiss"));
  fresh->on_end = Napi::Persistent(to_function(object.Get("onEnd"), "onEnd"));
  fresh->presence = Napi::Persistent(presence.As<Napi::Object>());
  fresh->touched = std::move(kept_touched);
  std::shared_ptr<Callbacks> callbacks = make_callbacks(state, std::move(fresh));
  const std::shared_ptr<AddonState> held = state.shared_from_this();
  args.on_queued = [held, callbacks] { held->post([callbacks](Napi::Env env) { callbacks->deliver(env); }); };
  args.on_end = [held, callbacks](int err) {
    held->post([callbacks, err](Napi::Env env) { callbacks->on_end.Call({Napi::Number::New(env, err)}); });
  };
  return run_on_thread(
      env, [args] { return std::make_shared<Session>(args); },
      [callbacks, &state](Napi::Env env, const std::shared_ptr<Session>& session) -> Napi::Value {
        callbacks->session = session;
        // Open like a socket: it keeps the event loop alive, and the environment's end closes it.
        state.begin();
        const std::uint64_t closer = state.add_closer([session] { session->close(); });
        const Napi::Object object = FuseSession::create(env, session, closer);
        // A wake-up that came before the session was known here found nothing to take.
        callbacks->deliver(env);
        return object;
      });
}

Napi::Value mark(const Napi::CallbackInfo& info) {
  const std::uint64_t connection = to_u64(info[0], "connection");
  if (connection == 0 || connection > 0xfffff) throw Error("INVALID_ARGUMENT", "connection is not a minor number");
  return Napi::Number::New(info.Env(), fuse::mark_connection(static_cast<std::uint32_t>(connection)).release());
}

}  // namespace

void register_fuse(Napi::Env env, Napi::Object exports) {
  export_async<start>(env, exports, "fuseStart");
  export_function<mark>(env, exports, "fuseMark");
}

}  // namespace dedup
