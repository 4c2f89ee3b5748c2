/* A wall clock that jumps, for a process and its children: the seconds in the file that $TEST_CLOCK names are added to
 * it. The monotonic clock is left alone, as it is when an administrator, or NTP, sets the time.
 *
 * libfaketime 0.9.10 is no way to have this: told to leave the monotonic clock alone, it makes Python's sleep fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *ahead;

__attribute__((constructor)) static void map(void) {
    const char *path = getenv("TEST_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *at = mmap(NULL, sizeof *ahead, PROT_READ, MAP_SHARED, fd, 0);
    if (at != MAP_FAILED)
        ahead = at;
    close(fd);
}

static int64_t seconds_ahead(void) { return ahead ? *ahead : 0; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int clock_gettime(clockid_t clock, struct timespec *now) {
    static __typeof__(&clock_gettime) real;
    if (!real)
        real = REAL(clock_gettime);
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)
        now->tv_sec += seconds_ahead();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static __typeof__(&gettimeofday) real;
    if (!real)
        real = REAL(gettimeofday);
    int result = real(now, zone);
    now->tv_sec += seconds_ahead();
    return result;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now)
        *now = exact.tv_sec;
    return exact.tv_sec;
}

/* The system waits by its own clock. A time this large is of the wall clock; the monotonic one starts at 0. */
static struct timespec by_the_systems_clock(const struct timespec *until) {
    struct timespec translated = *until;
    if (translated.tv_sec > 1000000000)
        translated.tv_sec -= seconds_ahead();
    return translated;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static __typeof__(&pthread_cond_timedwait) real;
    if (!real)
        real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real)
        real = REAL(pthread_cond_timedwait);
    struct timespec translated = by_the_systems_clock(until);
    return real(cond, mutex, &translated);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static __typeof__(&sem_timedwait) real;
    if (!real)
        real = REAL(sem_timedwait);
    struct timespec translated = by_the_systems_clock(until);
    return real(semaphore, &translated);
}
