/* A layer between a process and the C library that counts what the process does to the files below one folder, and at
 * a chosen operation kills the process, tears a write, or answers with an error as a full or broken disk does.
 *
 * It is preloaded (LD_PRELOAD), so it sees Python's writes, those of C++ (torch.save, SentencePiece) and of Rust alike.
 * Nothing is counted before `fault_layer_arm`, and nothing in the children of the process that called it. Reads are not
 * counted: a kill between two reads leaves the same folder as a kill before the next write.
 *
 * Operations, as they are named in the log and in the filter:
 *   create    open for writing of a file that is not there       open     of one that is
 *   write     write, pwrite, writev, sendfile, copy_file_range    truncate
 *   rename    exchange (renameat2)    link    symlink    unlink    mkdir    rmdir
 *   fsync     of a file               fsyncdir   of a folder       flock
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT = 0, KILL = 1, TEAR = 2, FAIL = 3 };
enum answer { PROCEED, TORN, FAILED };

static char prefix[PATH_MAX], filter[512];
static size_t prefix_length;
static int action, first, last, error_number, log_descriptor = -1;
static pid_t armed_process;
static atomic_int counted;

/* Count from now on in this process.
 *
 * folder: absolute; only what lies below it counts. log: file to which "<number> <operation> <path>" lines go (of a
 * rename: "<to> < <from>", without what comes from outside the folder).
 * from, to: the operations, counted from 1, that are killed, torn or fail. error: errno of those that fail.
 * operations: names with a comma before and behind each (",write,create,"), the only ones that fail; "" for all. */
void fault_layer_arm(const char* folder, const char* log, int what, int from, int to, int error,
                     const char* operations) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    snprintf(filter, sizeof filter, "%s", operations);
    prefix_length = strlen(prefix);
    action = what, first = from, last = to, error_number = error;
    log_descriptor = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    atomic_store(&counted, 0);
    armed_process = getpid();
}

static _Noreturn void die(void) {
    for (;;) {
        syscall(SYS_kill, getpid(), SIGKILL);
        pause();
    }
}

/* One operation on `path` (of a rename: its target, and what comes there): what becomes of it. */
static enum answer meets_both(const char* operation, const char* path, const char* from) {
    char text[2 * PATH_MAX + 64], quoted[32];
    int number = atomic_fetch_add(&counted, 1) + 1;
    int length = snprintf(text, sizeof text, "%d %s %s%s%s\n", number, operation, path + prefix_length,
                          from[0] ? " < " : "", from[0] ? from + prefix_length : "");
    if (syscall(SYS_write, log_descriptor, text, length) != length) die();
    if (action == COUNT || number < first || number > last) return PROCEED;
    if (action == KILL) die();
    if (action == TEAR) return TORN;
    snprintf(quoted, sizeof quoted, ",%s,", operation);
    if (filter[0] && !strstr(filter, quoted)) return PROCEED;
    errno = error_number;
    return FAILED;
}

static enum answer meets(const char* operation, const char* path) { return meets_both(operation, path, ""); }

static int armed(void) { return armed_process && armed_process == getpid(); }

static int below(const char* path) {
    return !strncmp(path, prefix, prefix_length) && (path[prefix_length] == '/' || !path[prefix_length]);
}

static int path_of(int descriptor, char* path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0 && below(path);
}

/* The absolute path that `name` means beside `directory`; whether it lies below the folder. */
static int full_path(int directory, const char* name, char* path) {
    int saved = errno, inside = 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        char start[PATH_MAX];
        if (directory == AT_FDCWD) {
            if (!getcwd(start, sizeof start)) start[0] = 0;
        } else {
            path_of(directory, start);
        }
        while (name[0] == '.' && name[1] == '/') name += 2;
        if (snprintf(path, PATH_MAX, "%s/%s", start, name) >= PATH_MAX) path[0] = 0;
    }
    inside = below(path);
    errno = saved;
    return inside;
}

static enum answer meets_name(const char* operation, int directory, const char* name) {
    char path[PATH_MAX];
    if (!armed() || !full_path(directory, name, path)) return PROCEED;
    return meets(operation, path);
}

static enum answer meets_rename(const char* operation, int from_at, const char* from, int to_at, const char* to) {
    char source[PATH_MAX], path[PATH_MAX];
    if (!armed()) return PROCEED;
    int comes_from_here = full_path(from_at, from, source);
    if (!full_path(to_at, to, path)) return PROCEED;
    return meets_both(operation, path, comes_from_here ? source : "");
}

static enum answer meets_descriptor(const char* operation, int descriptor) {
    char path[PATH_MAX];
    int saved = errno;
    if (!armed() || !path_of(descriptor, path)) {
        errno = saved;
        return PROCEED;
    }
    errno = saved;
    return meets(operation, path);
}

static enum answer meets_open(int directory, const char* name, int writes) {
    char path[PATH_MAX];
    struct stat found;
    if (!writes || !armed() || !full_path(directory, name, path)) return PROCEED;
    int saved = errno, exists = !stat(path, &found);
    errno = saved;
    return meets(exists ? "open" : "create", path);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ORIGINAL(name)                 \
    static __typeof__(&name) original; \
    if (!original) original = NEXT(name)

/* After a torn operation that is no write, the operation itself and then the kill. */
#define GUARDED(met, call, failed)          \
    do {                                    \
        enum answer found = (met);          \
        if (found == FAILED) return failed; \
        __typeof__(call) result = (call);   \
        if (found == TORN) die();           \
        return result;                      \
    } while (0)

#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define MODE(flags)                                                \
    mode_t mode = 0;                                               \
    if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
        va_list rest;                                              \
        va_start(rest, flags);                                     \
        mode = (mode_t)va_arg(rest, int);                          \
        va_end(rest);                                              \
    }

int open(const char* name, int flags, ...) {
    MODE(flags);
    ORIGINAL(open);
    GUARDED(meets_open(AT_FDCWD, name, WRITES(flags)), original(name, flags, mode), -1);
}
int open64(const char* name, int flags, ...) {
    MODE(flags);
    ORIGINAL(open64);
    GUARDED(meets_open(AT_FDCWD, name, WRITES(flags)), original(name, flags, mode), -1);
}
int openat(int directory, const char* name, int flags, ...) {
    MODE(flags);
    ORIGINAL(openat);
    GUARDED(meets_open(directory, name, WRITES(flags)), original(directory, name, flags, mode), -1);
}
int openat64(int directory, const char* name, int flags, ...) {
    MODE(flags);
    ORIGINAL(openat64);
    GUARDED(meets_open(directory, name, WRITES(flags)), original(directory, name, flags, mode), -1);
}
FILE* fopen(const char* name, const char* mode) {
    ORIGINAL(fopen);
    GUARDED(meets_open(AT_FDCWD, name, strpbrk(mode, "wa+") != NULL), original(name, mode), NULL);
}
FILE* fopen64(const char* name, const char* mode) {
    ORIGINAL(fopen64);
    GUARDED(meets_open(AT_FDCWD, name, strpbrk(mode, "wa+") != NULL), original(name, mode), NULL);
}

/* A torn write leaves half of its bytes. A disk that fills takes half of them too, and says so by a short count; what
 * is written next fails. */
#define WRITE(descriptor, length, whole, half)                                                         \
    do {                                                                                               \
        enum answer found = meets_descriptor("write", descriptor);                                     \
        if (found == FAILED) {                                                                         \
            if (error_number == ENOSPC && atomic_load(&counted) == first && (length) > 1) return half; \
            return -1;                                                                                 \
        }                                                                                              \
        ssize_t result = found == TORN ? half : whole;                                                 \
        if (found == TORN) die();                                                                      \
        return result;                                                                                 \
    } while (0)

ssize_t write(int descriptor, const void* bytes, size_t length) {
    ORIGINAL(write);
    WRITE(descriptor, length, original(descriptor, bytes, length), original(descriptor, bytes, length / 2));
}
ssize_t pwrite64(int descriptor, const void* bytes, size_t length, off64_t offset) {
    ORIGINAL(pwrite64);
    WRITE(descriptor, length, original(descriptor, bytes, length, offset),
          original(descriptor, bytes, length / 2, offset));
}
ssize_t pwrite(int descriptor, const void* bytes, size_t length, off_t offset) {
    return pwrite64(descriptor, bytes, length, offset);
}
ssize_t writev(int descriptor, const struct iovec* parts, int count) {
    ORIGINAL(writev);
    WRITE(descriptor, count, original(descriptor, parts, count),
          original(descriptor, parts, count > 1 ? count / 2 : 1));
}
ssize_t sendfile64(int out, int in, off64_t* offset, size_t length) {
    ORIGINAL(sendfile64);
    WRITE(out, length, original(out, in, offset, length), original(out, in, offset, length / 2));
}
ssize_t sendfile(int out, int in, off_t* offset, size_t length) { return sendfile64(out, in, offset, length); }
ssize_t copy_file_range(int in, off64_t* in_at, int out, off64_t* out_at, size_t length, unsigned flags) {
    ORIGINAL(copy_file_range);
    WRITE(out, length, original(in, in_at, out, out_at, length, flags),
          original(in, in_at, out, out_at, length / 2, flags));
}

int rename(const char* from, const char* to) {
    ORIGINAL(rename);
    GUARDED(meets_rename("rename", AT_FDCWD, from, AT_FDCWD, to), original(from, to), -1);
}
int renameat(int from_at, const char* from, int to_at, const char* to) {
    ORIGINAL(renameat);
    GUARDED(meets_rename("rename", from_at, from, to_at, to), original(from_at, from, to_at, to), -1);
}
int renameat2(int from_at, const char* from, int to_at, const char* to, unsigned flags) {
    ORIGINAL(renameat2);
    GUARDED(meets_rename("exchange", from_at, from, to_at, to), original(from_at, from, to_at, to, flags), -1);
}
int link(const char* from, const char* to) {
    ORIGINAL(link);
    GUARDED(meets_name("link", AT_FDCWD, to), original(from, to), -1);
}
int linkat(int from_at, const char* from, int to_at, const char* to, int flags) {
    ORIGINAL(linkat);
    GUARDED(meets_name("link", to_at, to), original(from_at, from, to_at, to, flags), -1);
}
int symlink(const char* target, const char* name) {
    ORIGINAL(symlink);
    GUARDED(meets_name("symlink", AT_FDCWD, name), original(target, name), -1);
}
int unlink(const char* name) {
    ORIGINAL(unlink);
    GUARDED(meets_name("unlink", AT_FDCWD, name), original(name), -1);
}
int unlinkat(int directory, const char* name, int flags) {
    ORIGINAL(unlinkat);
    GUARDED(meets_name(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, name), original(directory, name, flags),
            -1);
}
int mkdir(const char* name, mode_t mode) {
    ORIGINAL(mkdir);
    GUARDED(meets_name("mkdir", AT_FDCWD, name), original(name, mode), -1);
}
int mkdirat(int directory, const char* name, mode_t mode) {
    ORIGINAL(mkdirat);
    GUARDED(meets_name("mkdir", directory, name), original(directory, name, mode), -1);
}
int rmdir(const char* name) {
    ORIGINAL(rmdir);
    GUARDED(meets_name("rmdir", AT_FDCWD, name), original(name), -1);
}
int truncate64(const char* name, off64_t length) {
    ORIGINAL(truncate64);
    GUARDED(meets_name("truncate", AT_FDCWD, name), original(name, length), -1);
}
int truncate(const char* name, off_t length) { return truncate64(name, length); }
int ftruncate64(int descriptor, off64_t length) {
    ORIGINAL(ftruncate64);
    GUARDED(meets_descriptor("truncate", descriptor), original(descriptor, length), -1);
}
int ftruncate(int descriptor, off_t length) { return ftruncate64(descriptor, length); }

static enum answer meets_sync(int descriptor) {
    struct stat found;
    int saved = errno, folder = armed() && !fstat(descriptor, &found) && S_ISDIR(found.st_mode);
    errno = saved;
    return meets_descriptor(folder ? "fsyncdir" : "fsync", descriptor);
}
int fsync(int descriptor) {
    ORIGINAL(fsync);
    GUARDED(meets_sync(descriptor), original(descriptor), -1);
}
int fdatasync(int descriptor) {
    ORIGINAL(fdatasync);
    GUARDED(meets_sync(descriptor), original(descriptor), -1);
}
int flock(int descriptor, int operation) {
    ORIGINAL(flock);
    GUARDED(meets_descriptor("flock", descriptor), original(descriptor, operation), -1);
}
