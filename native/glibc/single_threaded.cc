// Stands in for a variable that came with glibc 2.32 and that libstdc++ reads to leave out atomic operations. Zero:
// the process has threads.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
