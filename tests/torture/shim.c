/* Loaded by LD_PRELOAD: writes down every change to files below one directory, and makes the n-th of a kind fail.

   A record: int32 operation, int64 inode, int64 offset, int32 length of path, int32 length of data, then both.
   The inode is that of the open file, so that a trace can be replayed through renames.  Nothing is written down or
   fails before torture_arm. */
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
#include <sys/stat.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, FSYNC, RENAME, UNLINK, MKDIR, RMDIR, CLOSE, MARK, OPEN };

static char root[PATH_MAX];
static int trace = -1, fail_operation = 0, fail_errno = 0, armed = 0;
static long fail_at = 0, *counts; /* shared with forked processes: joining has one of its own */

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) { return armed && strncmp(path, root, strlen(root)) == 0; }

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static void absolute(int dirfd, const char *path, char *out) {
    char base[PATH_MAX];
    if (path[0] == '/') snprintf(out, PATH_MAX, "%s", path);
    else {
        char link[64];
        snprintf(link, sizeof link, dirfd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dirfd);
        ssize_t n = readlink(link, base, sizeof base - 1);
        base[n < 0 ? 0 : n] = 0;
        if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) abort();
    }
}

static void put(int operation, int64_t inode, int64_t offset, const char *path, const void *data, size_t size) {
    if (trace < 0) return;
    size_t names = path ? strlen(path) : 0;
    int32_t head[6];
    char record[28];
    memcpy(record, &operation, 4);
    memcpy(record + 4, &inode, 8);
    memcpy(record + 12, &offset, 8);
    head[0] = (int32_t)names, head[1] = (int32_t)size;
    memcpy(record + 20, head, 8);
    if (REAL(write)(trace, record, 28) != 28) abort();
    if (names && REAL(write)(trace, path, names) != (ssize_t)names) abort();
    if (size && REAL(write)(trace, data, size) != (ssize_t)size) abort();
}

/* Whether this operation is the one to fail. */
static int fails(int operation) {
    long count = __sync_add_and_fetch(&counts[operation], 1);
    if (operation != fail_operation || count != fail_at) return 0;
    errno = fail_errno;
    return 1;
}

static int64_t inode_of(int fd) {
    struct stat s;
    return fstat(fd, &s) ? -1 : (int64_t)s.st_ino;
}

void torture_arm(const char *directory, int fd, int operation, long at, int number) {
    snprintf(root, sizeof root, "%s", directory);
    size_t size = 16 * sizeof *counts;
    if (!counts) counts = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (counts == MAP_FAILED) abort();
    memset(counts, 0, size);
    trace = fd, fail_operation = operation, fail_at = at, fail_errno = number, armed = 1;
}

void torture_disarm(void) { armed = 0; }
long torture_count(int operation) { return counts[operation]; }
void torture_mark(long number) { put(MARK, number, 0, 0, 0, 0); }

static int opened(int dirfd, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    absolute(dirfd, path, full);
    if (below(full) && fails(OPEN)) return -1;
    int existed = faccessat(dirfd, path, F_OK, AT_SYMLINK_NOFOLLOW) == 0;
    int fd = REAL(openat)(dirfd, path, flags, mode);
    if (fd >= 0 && below(full) && (flags & O_ACCMODE) != O_RDONLY) {
        if (!existed) put(CREATE, inode_of(fd), 0, full, 0, 0);
        else if (flags & O_TRUNC) put(TRUNCATE, inode_of(fd), 0, 0, 0, 0);
    }
    return fd;
}

#define MODE(last) va_list list; va_start(list, last); mode_t mode = va_arg(list, int); va_end(list)
int open(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int dirfd, const char *path, int flags, ...) { MODE(flags); return opened(dirfd, path, flags, mode); }
int openat64(int dirfd, const char *path, int flags, ...) { MODE(flags); return opened(dirfd, path, flags, mode); }

ssize_t write(int fd, const void *data, size_t size) {
    char path[PATH_MAX];
    if (!armed || fd == trace || !path_of(fd, path)) return REAL(write)(fd, data, size);
    if (fails(WRITE)) return -1;
    off_t at = lseek(fd, 0, SEEK_CUR);
    ssize_t n = REAL(write)(fd, data, size);
    if (n > 0) put(WRITE, inode_of(fd), at, 0, data, n);
    return n;
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    char path[PATH_MAX];
    if (!armed || !path_of(fd, path)) return REAL(pwrite)(fd, data, size, at);
    if (fails(WRITE)) return -1;
    ssize_t n = REAL(pwrite)(fd, data, size, at);
    if (n > 0) put(WRITE, inode_of(fd), at, 0, data, n);
    return n;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return pwrite(fd, data, size, at); }

int ftruncate(int fd, off_t size) {
    char path[PATH_MAX];
    int ours = armed && path_of(fd, path), code = REAL(ftruncate)(fd, size);
    if (ours && !code) put(TRUNCATE, inode_of(fd), size, 0, 0, 0);
    return code;
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

int fsync(int fd) {
    char path[PATH_MAX];
    if (!armed || !path_of(fd, path)) return REAL(fsync)(fd);
    if (fails(FSYNC)) return -1;
    int code = REAL(fsync)(fd);
    if (!code) put(FSYNC, inode_of(fd), 0, path, 0, 0);
    return code;
}

int close(int fd) {
    char path[PATH_MAX];
    if (!armed || fd == trace || !path_of(fd, path)) return REAL(close)(fd);
    if (fails(CLOSE)) { /* as the kernel does: the descriptor is gone all the same */
        REAL(close)(fd);
        errno = fail_errno;
        return -1;
    }
    return REAL(close)(fd);
}

int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    char source[PATH_MAX], target[PATH_MAX];
    absolute(from_dir, from, source);
    absolute(to_dir, to, target);
    if (!below(source)) return REAL(renameat)(from_dir, from, to_dir, to);
    if (fails(RENAME)) return -1;
    int code = REAL(renameat)(from_dir, from, to_dir, to);
    if (!code) put(RENAME, 0, 0, source, target, strlen(target));
    return code;
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int dirfd, const char *path, int flags) {
    char full[PATH_MAX];
    absolute(dirfd, path, full);
    int code = REAL(unlinkat)(dirfd, path, flags);
    if (!code && below(full)) put(flags & AT_REMOVEDIR ? RMDIR : UNLINK, 0, 0, full, 0, 0);
    return code;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dirfd, const char *path, mode_t mode) {
    char full[PATH_MAX];
    absolute(dirfd, path, full);
    int code = REAL(mkdirat)(dirfd, path, mode);
    if (!code && below(full)) put(MKDIR, 0, 0, full, 0, 0);
    return code;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
