// Maps every file named on standard input (names end in NUL) and fails when a
// byte between its end and the end of the last page is not zero. Prints how
// many files it looked at. For tests of what a mapping shows beyond a file's
// end.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int main(void) {
  char *name = NULL;
  size_t room = 0;
  long looked = 0, wrong = 0;
  const long page = sysconf(_SC_PAGESIZE);
  while (getdelim(&name, &room, '\0', stdin) > 0) {
    const int fd = open(name, O_RDONLY);
    struct stat about;
    if (fd < 0 || fstat(fd, &about) != 0) {
      perror(name);
      return 2;
    }
    const long rest = about.st_size % page;
    if (rest != 0) {
      const unsigned char *last =
          mmap(NULL, page, PROT_READ, MAP_SHARED, fd, about.st_size - rest);
      if (last == MAP_FAILED) {
        perror(name);
        return 2;
      }
      for (long i = rest; i < page; i++) {
        if (last[i] == 0)
          continue;
        fprintf(stderr, "%s: byte %ld after its end is %d\n", name, i - rest,
                last[i]);
        wrong++;
        break;
      }
      munmap((void *)last, page);
      looked++;
    }
    close(fd);
  }
  printf("%ld\n", looked);
  return wrong == 0 ? 0 : 1;
}
