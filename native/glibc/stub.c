// Names of functions whose newest version in glibc 2.34 only marks their move from libpthread into libc. Linked against
// and never loaded (native/Makefile).
void pthread_create(void) {}
void pthread_join(void) {}
void pthread_detach(void) {}
void pthread_once(void) {}
void pthread_key_create(void) {}
void __pthread_key_create(void) {}
void pthread_key_delete(void) {}
void pthread_getspecific(void) {}
void pthread_setspecific(void) {}
void pthread_cond_clockwait(void) {}
