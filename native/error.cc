#include "error.h"

#include <cerrno>
#include <system_error>

namespace dedup {

std::string errno_name(int err) {
  // strerrorname_np(3) is newer than the oldest glibc the addon loads on.
  switch (err) {
#define NAME(e) \
  case e:       \
    return #e;
    NAME(EPERM)
    NAME(ENOENT)
    NAME(EINTR)
    NAME(EIO)
    NAME(ENXIO)
    NAME(E2BIG)
    NAME(EBADF)
    NAME(EAGAIN)
    NAME(ENOMEM)
    NAME(EACCES)
    NAME(EFAULT)
    NAME(ENOTBLK)
    NAME(EBUSY)
    NAME(EEXIST)
    NAME(EXDEV)
    NAME(ENODEV)
    NAME(ENOTDIR)
    NAME(EISDIR)
    NAME(EINVAL)
    NAME(ENFILE)
    NAME(EMFILE)
    NAME(ENOTTY)
    NAME(ETXTBSY)
    NAME(EFBIG)
    NAME(ENOSPC)
    NAME(ESPIPE)
    NAME(EROFS)
    NAME(EMLINK)
    NAME(EPIPE)
    NAME(ERANGE)
    NAME(EDEADLK)
    NAME(ENAMETOOLONG)
    NAME(ENOLCK)
    NAME(ENOSYS)
    NAME(ENOTEMPTY)
    NAME(ELOOP)
    NAME(ENODATA)
    NAME(EPROTO)
    NAME(EBADMSG)
    NAME(EOVERFLOW)
    NAME(EUSERS)
    NAME(EOPNOTSUPP)
    NAME(ENOTCONN)
    NAME(ECONNABORTED)
    NAME(ETIMEDOUT)
    NAME(ESTALE)
    NAME(EUCLEAN)
    NAME(EDQUOT)
    NAME(ECANCELED)
#undef NAME
    default:
      return "E" + std::to_string(err);
  }
}

Error sys_error(int err, const std::string& doing, std::string path) {
  return Error(errno_name(err), doing + ": " + std::generic_category().message(err), err, std::move(path));
}

Napi::Error to_js(Napi::Env env, const std::exception_ptr& failure) {
  std::string code = "INTERNAL";
  std::string message = "unknown native exception";
  std::string path;
  int err = 0;
  try {
    std::rethrow_exception(failure);
  } catch (const Napi::Error& error) {
    return error;
  } catch (const Error& error) {
    code = error.code();
    message = error.what();
    path = error.path();
    err = error.err();
  } catch (const std::bad_alloc&) {
    code = "ENOMEM";
    message = "out of memory";
    err = ENOMEM;
  } catch (const std::exception& error) {
    message = error.what();
  } catch (...) {
  }
  Napi::Error result = Napi::Error::New(env, message);
  result.Value().Set("code", code);
  if (err != 0) result.Value().Set("errno", err);
  if (!path.empty()) result.Value().Set("path", path);
  return result;
}

Napi::Promise rejected(Napi::Env env, const std::exception_ptr& failure) {
  const auto deferred = Napi::Promise::Deferred::New(env);
  deferred.Reject(to_js(env, failure).Value());
  return deferred.Promise();
}

}  // namespace dedup
