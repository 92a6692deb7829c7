/* Makes the n-th call of one system function on one file go wrong, across all processes of a run.
 *
 * FAULT="FUNCTION:PATH:FIRST:LAST:HOW" in the environment: the calls FIRST to LAST of FUNCTION on
 * files whose path contains PATH.  HOW is an errno to fail with, "short" to transfer half of what
 * is asked for (at least a byte), or "end" to return 0.  FUNCTION is read or write (of any kind, at
 * an offset or not), readv or writev (only those with a list of buffers), open, sync, rename, link
 * or unlink.  FAULT_COUNT names a file of 8 bytes in which the calls are counted.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

static char function[16], part[256], how[16];
static unsigned long first, last;
static uint64_t *count;

__attribute__((constructor)) static void prepare(void)
{
    const char *fault = getenv("FAULT"), *counter = getenv("FAULT_COUNT");
    if (!fault || !counter ||
        sscanf(fault, "%15[^:]:%255[^:]:%lu:%lu:%15s", function, part, &first, &last, how) != 5)
        return;
    int file = open(counter, O_RDWR | O_CLOEXEC);
    if (file < 0)
        abort();
    count = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (count == MAP_FAILED)
        abort();
}

/* Tells whether a call is of the kind: "read" stands for "readv" too. */
static int meant(const char *name) { return !strncmp(name, function, strlen(function)); }

/* Tells whether this call is one of those that go wrong. */
static int strikes(const char *name, const char *path)
{
    if (!count || count == MAP_FAILED || !meant(name) || !path || !strstr(path, part))
        return 0;
    uint64_t number = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
    return first <= number && number <= last;
}

static int strikes_open_file(const char *name, int file)
{
    char link[64], path[PATH_MAX];
    if (!count || !meant(name))
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int before = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = before;
    path[length < 0 ? 0 : length] = 0;
    return strikes(name, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Returns -1 with errno set, or 0; never for "short". */
static int fails(void)
{
    if (!strcmp(how, "end"))
        return 0;
    errno = atoi(how);
    return -1;
}

#define TRANSFER(kind, name, parameters, whole, half)                                              \
    ssize_t name parameters                                                                        \
    {                                                                                              \
        if (!strikes_open_file(kind, file))                                                        \
            return whole;                                                                          \
        return strcmp(how, "short") ? fails() : half;                                              \
    }
#define HALF ((size + 1) / 2)
#define PLAIN(kind, name, type)                                                                    \
    TRANSFER(kind, name, (int file, type buffer, size_t size), REAL(name)(file, buffer, size),     \
             REAL(name)(file, buffer, HALF))
#define PLACED(kind, name, type)                                                                   \
    TRANSFER(kind, name, (int file, type buffer, size_t size, off_t offset),                       \
             REAL(name)(file, buffer, size, offset), REAL(name)(file, buffer, HALF, offset))

PLAIN("read", read, void *)
PLAIN("write", write, const void *)
PLACED("read", pread, void *)
PLACED("read", pread64, void *)
PLACED("write", pwrite, const void *)
PLACED("write", pwrite64, const void *)

static struct iovec halved(const struct iovec *vector)
{
    struct iovec half = {vector->iov_base, (vector->iov_len + 1) / 2};
    return half;
}

#define VECTOR(kind, name, parameters, whole, half_done)                                           \
    ssize_t name parameters                                                                        \
    {                                                                                              \
        if (!strikes_open_file(kind, file))                                                        \
            return whole;                                                                          \
        if (strcmp(how, "short"))                                                                  \
            return fails();                                                                        \
        struct iovec half = halved(vector);                                                        \
        return half_done;                                                                          \
    }
#define VECTORS(kind, name)                                                                        \
    VECTOR(kind, name, (int file, const struct iovec *vector, int length, off_t offset),           \
           REAL(name)(file, vector, length, offset), REAL(name)(file, &half, 1, offset))
#define FLAGGED(kind, name)                                                                        \
    VECTOR(kind, name, (int file, const struct iovec *vector, int length, off_t offset, int flags), \
           REAL(name)(file, vector, length, offset, flags),                                        \
           REAL(name)(file, &half, 1, offset, flags))

VECTORS("readv", preadv)
VECTORS("readv", preadv64)
FLAGGED("readv", preadv2)
FLAGGED("readv", preadv64v2)
VECTORS("writev", pwritev)
VECTORS("writev", pwritev64)

#define ON_FILE(kind, name)                                                                        \
    int name(int file) { return strikes_open_file(kind, file) ? fails() : REAL(name)(file); }
ON_FILE("sync", fsync)
ON_FILE("sync", fdatasync)

#define ON_PATHS(kind, name)                                                                       \
    int name(const char *from, const char *to)                                                     \
    {                                                                                              \
        return strikes(kind, from) ? fails() : REAL(name)(from, to);                               \
    }
ON_PATHS("rename", rename)
ON_PATHS("link", link)
int linkat(int one, const char *from, int other, const char *to, int flags)
{
    return strikes("link", from) ? fails() : REAL(linkat)(one, from, other, to, flags);
}
int unlink(const char *path) { return strikes("unlink", path) ? fails() : REAL(unlink)(path); }

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...)                                                     \
    {                                                                                              \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        mode_t mode = va_arg(more, mode_t);                                                        \
        va_end(more);                                                                              \
        return strikes("open", path) ? fails() : REAL(name)(path, flags, mode);                    \
    }
OPEN(open)
OPEN(open64)
