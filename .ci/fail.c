// Preloaded by .ci/faults: makes a process's n-th call that changes a file fail. Linux and glibc.
//   FAIL_MATCH   part of the absolute paths that count; unset: nothing counts
//   FAIL_AT      the number of the call to fail, from 1 on; 0: only count
//   FAIL_ERRNO   why; with ENOSPC and EDQUOT half a write is done and the next call fails, as on a full disk
//   FAIL_ALWAYS  set: all later calls fail too
//   FAIL_VANISH  a folder: at that call it is renamed to <folder>.gone, and no call is made to fail
//   FAIL_LOG     a file outside the matched paths: a line for each counted call, with FAILED if it failed
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define WRITING (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)
static int calls, halved;

static int number(const char *name)
{
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

static void note(const char *call, const char *path, const char *what)
{
    const char *name = getenv("FAIL_LOG");
    int fd = name ? syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_APPEND | O_CREAT, 0644) : -1;
    if (fd >= 0) {
        dprintf(fd, "%s %s%s\n", call, path, what);
        syscall(SYS_close, fd);
    }
}

// -1 if this call is to fail, with errno set; the bytes to write first if it is to be cut short; else 0
static ssize_t fault(const char *call, int dir, const char *name, size_t size)
{
    char path[8192] = "", link[64];
    const char *match = getenv("FAIL_MATCH");
    if (!match)
        return 0;
    if (!name || name[0] != '/') {  // below a descriptor, or the descriptor's own
        ssize_t length = 0;
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        length = readlink(link, path, 4095);
        path[length < 0 ? 0 : length] = 0;
    }
    if (name && *name)
        snprintf(path + strlen(path), 4096, "%s%s", name[0] == '/' ? "" : "/", name);
    if (!strstr(path, match))
        return 0;
    int n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST), at = number("FAIL_AT");
    int why = number("FAIL_ERRNO");
    const char *folder = getenv("FAIL_VANISH");
    if (at && n == at && folder) {
        char gone[4096];
        snprintf(gone, sizeof gone, "%s.gone", folder);
        syscall(SYS_renameat2, AT_FDCWD, folder, AT_FDCWD, gone, 0);
        note(call, path, " FAILED");
        return 0;
    }
    if (at && n == at && size > 1 && (why == ENOSPC || why == EDQUOT)) {
        halved = 1;
        note(call, path, " HALVED");
        return size / 2;
    }
    int fails = at && !folder && (n == at || n == at + halved || n > at && getenv("FAIL_ALWAYS"));
    note(call, path, fails ? " FAILED" : "");
    errno = fails ? why : errno;
    return -fails;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        return flags & WRITING && fault("open", AT_FDCWD, path, 0) ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) \
    { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        return flags & WRITING && fault("open", dir, path, 0) ? -1 : REAL(name)(dir, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) \
    { return strpbrk(mode, "wa+") && fault("open", AT_FDCWD, path, 0) ? NULL : REAL(name)(path, mode); }
FOPEN(fopen)
FOPEN(fopen64)

#define WRITE(name, more, ...) \
    ssize_t name(int fd, const void *data, size_t size more) \
    { \
        ssize_t part = fault("write", fd, NULL, size); \
        return part < 0 ? -1 : REAL(name)(fd, data, part ? part : size __VA_ARGS__); \
    }
#define COMMA ,
WRITE(write, )
WRITE(pwrite, COMMA off_t at, , at)
WRITE(pwrite64, COMMA off64_t at, , at)

ssize_t writev(int fd, const struct iovec *parts, int count)
{ return fault("write", fd, NULL, 0) ? -1 : REAL(writev)(fd, parts, count); }

#define ON_DESCRIPTOR(name) int name(int fd) { return fault("fsync", fd, NULL, 0) ? -1 : REAL(name)(fd); }
ON_DESCRIPTOR(fsync)
ON_DESCRIPTOR(fdatasync)

#define CUT(name, type) \
    int name(int fd, type size) { return fault("truncate", fd, NULL, 0) ? -1 : REAL(name)(fd, size); }
CUT(ftruncate, off_t)
CUT(ftruncate64, off64_t)

int rename(const char *old, const char *new)
{ return fault("rename", AT_FDCWD, new, 0) ? -1 : REAL(rename)(old, new); }
int renameat(int from, const char *old, int to, const char *new)
{ return fault("rename", to, new, 0) ? -1 : REAL(renameat)(from, old, to, new); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{ return fault("rename", to, new, 0) ? -1 : REAL(renameat2)(from, old, to, new, flags); }
int unlink(const char *path)
{ return fault("unlink", AT_FDCWD, path, 0) ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags)
{ return fault("unlink", dir, path, 0) ? -1 : REAL(unlinkat)(dir, path, flags); }
int mkdir(const char *path, mode_t mode)
{ return fault("mkdir", AT_FDCWD, path, 0) ? -1 : REAL(mkdir)(path, mode); }
