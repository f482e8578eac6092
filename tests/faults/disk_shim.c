/* A disk that can be watched, cut off from power, filled up and slowed down; loaded with LD_PRELOAD.

   Every change to the files below one folder is appended to a log, with its bytes, in the order in
   which it happened; so is every sync, with how much of the log it covers. `disk.py` makes from the
   log what a power loss would have left. Nothing is really synced: the log says what is durable.

   NEARLINE_DISK_ROOT     the folder that is watched (an absolute path without links)
   NEARLINE_DISK_LOG      the log, outside that folder
   NEARLINE_DISK_CONTROL  a file of sizeof(struct control) bytes, shared with whoever sets the faults

   64-bit Linux. Not seen: writes through a shared mapping (SQLite's -shm, which is never durable) and
   through C stdio. A test compares the log with the folder, so that nothing else can be missed. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* glibc redirects these names to their 64-bit twins; both are defined here. */
#undef open
#undef openat
#undef creat
#undef pwrite
#undef pwritev
#undef pwritev2
#undef ftruncate
#undef truncate
#undef fallocate
#undef posix_fallocate
#undef sendfile

struct control {
    int64_t room_bytes;   /* what still fits on the disk; negative: no limit */
    uint32_t ignore_sync; /* 1: a sync says it is done, and does nothing */
    uint32_t sync_us;     /* how long a sync takes */
    uint64_t n_syncs;
    uint64_t n_refused;   /* how often something did not fit */
    int64_t kill_after;   /* the process ends, as by `kill -9`, after so many more changes; 0: never */
    uint32_t write_us;    /* how long a write takes */
};

struct record {
    uint32_t total;
    uint8_t op, _pad[3];
    uint16_t name_length, other_length;
    uint32_t _more;
    uint64_t a, b, c;
};

#define N_TRACKED (1u << 18)
static char root[PATH_MAX];
static size_t root_length;
static int log_fd = -1;
static struct control *control;
static volatile ino_t tracked[N_TRACKED];
static dev_t device;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("NEARLINE_DISK_ROOT"), *log = getenv("NEARLINE_DISK_LOG");
    const char *shared = getenv("NEARLINE_DISK_CONTROL");
    if (!folder || !log || !shared) return;
    struct stat st;
    if (stat(folder, &st)) return;
    device = st.st_dev;
    strncpy(root, folder, sizeof root - 1);
    root_length = strlen(root);
    int fd = syscall(SYS_openat, AT_FDCWD, shared, O_RDWR | O_CLOEXEC, 0);
    control = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (control == MAP_FAILED) abort();
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (log_fd < 0) abort();
}

/* ---- what is watched --------------------------------------------------------------------------- */

static unsigned slot_of(ino_t ino) {
    unsigned at = (unsigned)(ino * 2654435761u) % N_TRACKED;
    while (tracked[at] && tracked[at] != ino) at = (at + 1) % N_TRACKED;
    return at;
}

static void track(ino_t ino) { tracked[slot_of(ino)] = ino; }

/* The absolute path in `out`; 0 when it is outside the folder. */
static int inside(int dirfd, const char *path, char *out) {
    if (log_fd < 0 || !path) return 0;
    size_t at = 0;
    if (path[0] != '/') {
        if (dirfd == AT_FDCWD) {
            if (!getcwd(out, PATH_MAX)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
            ssize_t n = readlink(link, out, PATH_MAX - 1);
            if (n < 0) return 0;
            out[n] = 0;
        }
        at = strlen(out);
        out[at++] = '/';
    }
    strncpy(out + at, path, PATH_MAX - at - 1);
    out[PATH_MAX - 1] = 0;
    return strncmp(out, root, root_length) == 0 && (out[root_length] == '/' || !out[root_length]);
}

static ino_t number_of(const char *path) {
    struct stat st;
    return lstat(path, &st) ? 0 : st.st_ino;
}

/* Cuts a path into folder (its number) and name. */
static ino_t folder_of(const char *path, const char **name) {
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    *name = slash + 1;
    memcpy(folder, path, slash - path);
    folder[slash - path] = 0;
    return number_of(folder);
}

static int is_watched(int fd, struct stat *st) {
    if (log_fd < 0 || fd == log_fd || fstat(fd, st)) return 0;
    if (st->st_dev != device || !(S_ISREG(st->st_mode) || S_ISDIR(st->st_mode))) return 0;
    return tracked[slot_of(st->st_ino)] == st->st_ino;
}

/* ---- the log ----------------------------------------------------------------------------------- */

static void note(uint8_t op, uint64_t a, uint64_t b, uint64_t c, const char *name, const char *other,
                 const struct iovec *iov, int count, size_t n_bytes) {
    struct record head = {0};
    struct iovec out[1027];
    head.op = op;
    head.a = a, head.b = b, head.c = c;
    head.name_length = name ? strlen(name) : 0;
    head.other_length = other ? strlen(other) : 0;
    head.total = sizeof head + head.name_length + head.other_length + n_bytes;
    out[0] = (struct iovec){&head, sizeof head};
    out[1] = (struct iovec){(void *)name, head.name_length};
    out[2] = (struct iovec){(void *)other, head.other_length};
    int n = 3;
    for (int i = 0; i < count && n_bytes; i++) {
        size_t part = iov[i].iov_len < n_bytes ? iov[i].iov_len : n_bytes;
        out[n++] = (struct iovec){iov[i].iov_base, part};
        n_bytes -= part;
    }
    if (syscall(SYS_writev, log_fd, out, n) != head.total) abort();
    if (control->kill_after > 0 && --control->kill_after == 0) kill(getpid(), SIGKILL);
}

static uint64_t log_end(void) {
    struct stat st;
    fstat(log_fd, &st);
    return st.st_size;
}

/* ---- faults ------------------------------------------------------------------------------------ */

/* How much of `wanted` more bytes there is room for; takes it. */
static int64_t take_room(int64_t wanted) {
    if (control->room_bytes < 0 || wanted <= 0) return wanted;
    int64_t given = wanted < control->room_bytes ? wanted : control->room_bytes;
    control->room_bytes -= given;
    if (given < wanted) control->n_refused++;
    return given;
}

static void give_room(int64_t bytes) {
    if (control->room_bytes >= 0 && bytes > 0) control->room_bytes += bytes;
}

static int is_full(void) {
    if (control->room_bytes != 0) return 0;
    control->n_refused++;
    errno = ENOSPC;
    return 1;
}

static int sync_file(int fd) {
    struct stat st;
    if (!is_watched(fd, &st)) return syscall(SYS_fsync, fd);
    __atomic_add_fetch(&control->n_syncs, 1, __ATOMIC_RELAXED);
    if (control->ignore_sync) return 0;
    pthread_mutex_lock(&mutex);
    uint64_t covered = log_end();
    pthread_mutex_unlock(&mutex);
    if (control->sync_us) usleep(control->sync_us);
    pthread_mutex_lock(&mutex);
    note('S', st.st_ino, covered, 0, NULL, NULL, NULL, 0, 0);
    pthread_mutex_unlock(&mutex);
    return 0;
}

int fsync(int fd) { return sync_file(fd); }
int fdatasync(int fd) { return sync_file(fd); }

/* ---- bytes ------------------------------------------------------------------------------------- */

static size_t length_of(const struct iovec *iov, int count) {
    size_t n = 0;
    for (int i = 0; i < count; i++) n += iov[i].iov_len;
    return n;
}

/* The first parts of `iov` that make up `allowed` bytes; how many parts that is. */
static int shortened(const struct iovec *iov, int count, size_t allowed, struct iovec *out) {
    int n = 0;
    for (; n < count && allowed; n++) {
        out[n] = iov[n];
        if (out[n].iov_len > allowed) out[n].iov_len = allowed;
        allowed -= out[n].iov_len;
    }
    return n;
}

/* offset < 0: where the file stands. */
static ssize_t write_parts(int fd, const struct iovec *iov, int count, off_t offset, int flags) {
    struct stat st;
    struct iovec fitting[1024];
    if (!is_watched(fd, &st) || count > 1024) {
        return offset < 0 ? syscall(SYS_writev, fd, iov, count) : syscall(SYS_pwritev2, fd, iov, count, offset, 0L, flags);
    }
    if (control->write_us) usleep(control->write_us);
    pthread_mutex_lock(&mutex);
    fstat(fd, &st);
    int mode = fcntl(fd, F_GETFL);
    off_t at = offset >= 0 ? offset : mode & O_APPEND ? st.st_size : lseek(fd, 0, SEEK_CUR);
    int64_t wanted = length_of(iov, count), growth = at + wanted - st.st_size;
    int64_t given = growth > 0 ? take_room(growth) : growth, allowed = growth > 0 ? wanted - (growth - given) : wanted;
    ssize_t written = -1;
    if (allowed <= 0 && wanted > 0) {
        errno = ENOSPC;
    } else {
        int n = shortened(iov, count, allowed, fitting);
        written = offset < 0 ? syscall(SYS_writev, fd, fitting, n) : syscall(SYS_pwritev, fd, fitting, n, offset, 0L);
    }
    int saved = errno;
    if (written > 0) note('W', st.st_ino, at, 0, NULL, NULL, iov, count, written);
    pthread_mutex_unlock(&mutex);
    if (written > 0 && (mode & O_DSYNC || flags & (RWF_DSYNC | RWF_SYNC))) sync_file(fd);
    errno = saved;
    return written;
}

ssize_t write(int fd, const void *data, size_t n) {
    struct stat st;
    if (!is_watched(fd, &st)) return syscall(SYS_write, fd, data, n);
    return write_parts(fd, &(struct iovec){(void *)data, n}, 1, -1, 0);
}
ssize_t writev(int fd, const struct iovec *iov, int count) { return write_parts(fd, iov, count, -1, 0); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    return write_parts(fd, &(struct iovec){(void *)data, n}, 1, at, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off_t at) { return pwrite(fd, data, n, at); }
ssize_t pwritev(int fd, const struct iovec *iov, int count, off_t at) { return write_parts(fd, iov, count, at, 0); }
ssize_t pwritev64(int fd, const struct iovec *iov, int count, off_t at) { return write_parts(fd, iov, count, at, 0); }
ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t at, int flags) {
    return write_parts(fd, iov, count, at, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *iov, int count, off_t at, int flags) {
    return write_parts(fd, iov, count, at, flags);
}

static int set_length(int fd, off_t length, int may_shrink) {
    struct stat st;
    if (!is_watched(fd, &st)) return syscall(SYS_ftruncate, fd, length);
    pthread_mutex_lock(&mutex);
    fstat(fd, &st);
    int result = 0;
    if (length < st.st_size ? may_shrink : length > st.st_size) {
        result = syscall(SYS_ftruncate, fd, length);
        give_room(st.st_size - length);
        if (!result) note('T', st.st_ino, length, 0, NULL, NULL, NULL, 0, 0);
    }
    pthread_mutex_unlock(&mutex);
    return result;
}

int ftruncate(int fd, off_t length) { return set_length(fd, length, 1); }
int ftruncate64(int fd, off_t length) { return set_length(fd, length, 1); }

static int allocate(int fd, int mode, off_t offset, off_t length) {
    struct stat st;
    if (!is_watched(fd, &st)) return syscall(SYS_fallocate, fd, mode, offset, length);
    if (mode) return errno = EOPNOTSUPP, -1;
    pthread_mutex_lock(&mutex);
    fstat(fd, &st);
    int64_t growth = offset + length - st.st_size;
    int fits = growth <= 0 || control->room_bytes < 0 || control->room_bytes >= growth;
    if (fits) take_room(growth); else control->n_refused++;
    pthread_mutex_unlock(&mutex);
    return fits ? set_length(fd, offset + length, 0) : (errno = ENOSPC, -1);
}

int fallocate(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }
int fallocate64(int fd, int mode, off_t offset, off_t length) { return allocate(fd, mode, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return allocate(fd, 0, offset, length) ? errno : 0; }
int posix_fallocate64(int fd, off_t offset, off_t length) { return posix_fallocate(fd, offset, length); }

/* Copies inside the kernel are done by hand, so that the bytes are seen. */
static ssize_t copy(int out, int in, off_t *in_at, size_t n) {
    char part[65536];
    ssize_t got = in_at ? pread(in, part, n < sizeof part ? n : sizeof part, *in_at)
                        : syscall(SYS_read, in, part, n < sizeof part ? n : sizeof part);
    if (got <= 0) return got;
    ssize_t put = write(out, part, got);
    if (in_at && put > 0) *in_at += put;
    return put;
}

ssize_t sendfile64(int out, int in, off_t *in_at, size_t n) {
    struct stat st;
    return is_watched(out, &st) ? copy(out, in, in_at, n) : syscall(SYS_sendfile, out, in, in_at, n);
}
ssize_t sendfile(int out, int in, off_t *in_at, size_t n) { return sendfile64(out, in, in_at, n); }
ssize_t copy_file_range(int in, off_t *in_at, int out, off_t *out_at, size_t n, unsigned flags) {
    struct stat st;
    if (is_watched(out, &st)) return errno = EXDEV, -1;
    return syscall(SYS_copy_file_range, in, in_at, out, out_at, n, flags);
}

/* ---- names ------------------------------------------------------------------------------------- */

static int open_at(int dirfd, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    const char *name;
    if (!inside(dirfd, path, full)) return syscall(SYS_openat, dirfd, path, flags, mode);
    pthread_mutex_lock(&mutex);
    struct stat before, after;
    int existed = stat(full, &before) == 0;
    int fd = -1;
    if (flags & O_CREAT && !existed && is_full()) {
        pthread_mutex_unlock(&mutex);
        return -1;
    }
    fd = syscall(SYS_openat, dirfd, path, flags, mode);
    int saved = errno;
    if (fd >= 0 && !fstat(fd, &after)) {
        track(after.st_ino);
        if (!existed) {
            ino_t folder = folder_of(full, &name);
            note('C', folder, after.st_ino, 0, name, NULL, NULL, 0, 0);
        } else if (flags & O_TRUNC && S_ISREG(after.st_mode) && before.st_size) {
            give_room(before.st_size);
            note('T', after.st_ino, 0, 0, NULL, NULL, NULL, 0, 0);
        }
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
    return fd;
}

#define MODE_ARGUMENT(last)                          \
    mode_t mode = 0;                                 \
    if (flags & (O_CREAT | __O_TMPFILE)) {           \
        va_list arguments;                           \
        va_start(arguments, last);                   \
        mode = va_arg(arguments, mode_t);            \
        va_end(arguments);                           \
    }

int open(const char *path, int flags, ...) { MODE_ARGUMENT(flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE_ARGUMENT(flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE_ARGUMENT(flags) return open_at(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE_ARGUMENT(flags) return open_at(dir, path, flags, mode); }
int __open_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_at(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

static int make_folder(int dirfd, const char *path, mode_t mode) {
    char full[PATH_MAX];
    const char *name;
    if (!inside(dirfd, path, full)) return syscall(SYS_mkdirat, dirfd, path, mode);
    pthread_mutex_lock(&mutex);
    int result = number_of(full) ? (errno = EEXIST, -1) : is_full() ? -1 : (int)syscall(SYS_mkdirat, dirfd, path, mode);
    int saved = errno;
    if (!result) {
        ino_t folder = folder_of(full, &name);
        track(number_of(full));
        note('D', folder, number_of(full), 0, name, NULL, NULL, 0, 0);
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
    return result;
}

int mkdir(const char *path, mode_t mode) { return make_folder(AT_FDCWD, path, mode); }
int mkdirat(int dirfd, const char *path, mode_t mode) { return make_folder(dirfd, path, mode); }

static int remove_name(int dirfd, const char *path, int flags) {
    char full[PATH_MAX];
    const char *name;
    if (!inside(dirfd, path, full)) return syscall(SYS_unlinkat, dirfd, path, flags);
    pthread_mutex_lock(&mutex);
    struct stat st;
    int had = lstat(full, &st) == 0;
    int result = syscall(SYS_unlinkat, dirfd, path, flags);
    int saved = errno;
    if (!result) {
        ino_t folder = folder_of(full, &name);
        note('U', folder, had ? st.st_ino : 0, 0, name, NULL, NULL, 0, 0);
        if (had && S_ISREG(st.st_mode) && st.st_nlink == 1) give_room(st.st_size);
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
    return result;
}

int unlink(const char *path) { return remove_name(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return remove_name(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int dirfd, const char *path, int flags) { return remove_name(dirfd, path, flags); }
int remove(const char *path) {
    struct stat st;
    return remove_name(AT_FDCWD, path, !lstat(path, &st) && S_ISDIR(st.st_mode) ? AT_REMOVEDIR : 0);
}

static int link_at(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    char full[PATH_MAX];
    const char *name;
    if (!inside(to_dir, to, full)) return syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
    pthread_mutex_lock(&mutex);
    int result = number_of(full) ? (errno = EEXIST, -1)
                 : is_full()     ? -1
                                 : (int)syscall(SYS_linkat, from_dir, from, to_dir, to, flags);
    int saved = errno;
    if (!result) {
        ino_t folder = folder_of(full, &name);
        note('L', folder, number_of(full), 0, name, NULL, NULL, 0, 0);
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
    return result;
}

int link(const char *from, const char *to) { return link_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int linkat(int from_dir, const char *from, int to_dir, const char *to, int flags) {
    return link_at(from_dir, from, to_dir, to, flags);
}

static int rename_at(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char source[PATH_MAX], target[PATH_MAX];
    const char *name, *other;
    if (!inside(from_dir, from, source) || !inside(to_dir, to, target))
        return syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
    pthread_mutex_lock(&mutex);
    struct stat replaced;
    int had = lstat(target, &replaced) == 0;
    ino_t moved = number_of(source);
    int result = syscall(SYS_renameat2, from_dir, from, to_dir, to, flags);
    int saved = errno;
    if (!result) {
        ino_t old = folder_of(source, &name), new = folder_of(target, &other);
        note('R', old, moved, new, name, other, NULL, 0, 0);
        if (had && S_ISREG(replaced.st_mode) && replaced.st_nlink == 1) give_room(replaced.st_size);
    }
    pthread_mutex_unlock(&mutex);
    errno = saved;
    return result;
}

int rename(const char *from, const char *to) { return rename_at(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return rename_at(from_dir, from, to_dir, to, 0);
}
int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    return rename_at(from_dir, from, to_dir, to, flags);
}
