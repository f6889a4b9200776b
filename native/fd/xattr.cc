// Extended attributes, which Node does not offer: read when an image takes those of an unpacked directory below it, and
// when such a directory is indexed.
#include <sys/xattr.h>

#include <cerrno>
#include <string>
#include <vector>

#include "arguments.h"
#include "registry.h"

namespace dedup {
namespace {

/** Attributes may grow between the two calls of a read; so often the size is asked for again. */
constexpr int kAttempts = 8;

/** Calls read(buffer, size) with a buffer as large as it asks for. Answers its result, or a negative errno. */
template <class Read>
ssize_t read_sized(std::vector<char>& out, Read read) {
  for (int attempt = 0; attempt < kAttempts; attempt++) {
    const ssize_t wanted = read(nullptr, 0);
    if (wanted < 0) return -errno;
    out.resize(static_cast<std::size_t>(wanted));
    if (wanted == 0) return 0;
    const ssize_t got = read(out.data(), out.size());
    if (got >= 0) {
      out.resize(static_cast<std::size_t>(got));
      return got;
    }
    if (errno != ERANGE) return -errno;
  }
  return -ERANGE;
}

/** Names are bytes; as everywhere one character stands for one. */
Napi::String to_latin1(Napi::Env env, const std::string& bytes) {
  napi_value value;
  const napi_status status = napi_create_string_latin1(env, bytes.data(), bytes.size(), &value);
  NAPI_THROW_IF_FAILED(env, status, Napi::String());
  return Napi::String(env, value);
}

/** readXattrs(path: Uint8Array): { name, value }[]; none where the file system knows none. Symlinks are not followed.
 */
Napi::Value read_xattrs(const Napi::CallbackInfo& info) {
  const Napi::Uint8Array bytes = to_bytes(info[0], "path");
  const std::string path(reinterpret_cast<const char*>(bytes.Data()), bytes.ByteLength());
  if (path.find('\0') != std::string::npos) throw Error("INVALID_ARGUMENT", "path contains NUL");
  Napi::Env env = info.Env();
  Napi::Array result = Napi::Array::New(env);
  std::vector<char> names;
  const ssize_t listed =
      read_sized(names, [&](char* buffer, std::size_t size) { return ::llistxattr(path.c_str(), buffer, size); });
  if (listed == -ENOTSUP) return result;
  if (listed < 0) throw sys_error(static_cast<int>(-listed), "llistxattr(2) of " + path, path);
  for (std::size_t at = 0; at < names.size();) {
    const std::string name(&names[at]);
    at += name.size() + 1;
    std::vector<char> value;
    const ssize_t got = read_sized(
        value, [&](char* buffer, std::size_t size) { return ::lgetxattr(path.c_str(), name.c_str(), buffer, size); });
    // Removed meanwhile, or one that only the kernel reads.
    if (got == -ENODATA || got == -ENOTSUP) continue;
    if (got < 0) throw sys_error(static_cast<int>(-got), "lgetxattr(2) " + name + " of " + path, path);
    Napi::Object attribute = Napi::Object::New(env);
    attribute.Set("name", to_latin1(env, name));
    attribute.Set("value", Napi::Buffer<char>::Copy(env, value.data(), value.size()));
    result.Set(result.Length(), attribute);
  }
  return result;
}

}  // namespace

void register_xattr(Napi::Env env, Napi::Object exports) { export_function<read_xattrs>(env, exports, "readXattrs"); }

}  // namespace dedup
