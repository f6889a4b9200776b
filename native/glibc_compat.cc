// Binds pthread_create to its oldest version, so that an addon built on a new glibc loads on glibc 2.31 too: version
// 2.34 of that symbol only marks its move from libpthread into libc. The linker's --wrap sends every caller here.
#include <pthread.h>

#if defined(__x86_64__)
__asm__(".symver pthread_create_oldest, pthread_create@GLIBC_2.2.5");
#elif defined(__aarch64__)
__asm__(".symver pthread_create_oldest, pthread_create@GLIBC_2.17");
#else
#error "the oldest version of pthread_create on this architecture is not known"
#endif

extern "C" {
int pthread_create_oldest(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument);

int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument);
int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*body)(void*), void* argument) {
  return pthread_create_oldest(thread, attributes, body, argument);
}
}
