/*
 * For programs of xfstests: FIEMAP and the two modes of fallocate(2) that FUSE does not
 * carry, by the ioctls that uext has for them. Everything else stays as it is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#define FS_IOC_FIEMAP 0xC020660BUL
#define UEXT_FIEMAP 0xC0205502UL
#define UEXT_COLLAPSE 0x40105503UL
#define UEXT_INSERT 0x40105504UL
#define FUSE_MAGIC 0x65735546

static int is_fuse(int fd)
{
	struct statfs s;
	int saved = errno;
	int fuse = fstatfs(fd, &s) == 0 && (uint32_t)s.f_type == FUSE_MAGIC;

	errno = saved;
	return fuse;
}

int ioctl(int fd, unsigned long request, ...)
{
	va_list list;
	void *arg;

	va_start(list, request);
	arg = va_arg(list, void *);
	va_end(list);
	if ((uint32_t)request == FS_IOC_FIEMAP && is_fuse(fd)) {
		/* What lies in the kernel's cache is written first, as its FIEMAP does. */
		if (((uint32_t *)arg)[4] & 1)
			sync_file_range(fd, 0, 0, 7);
		request = UEXT_FIEMAP;
	}
	return syscall(SYS_ioctl, fd, request, arg);
}

static int shift(int fd, unsigned long request, off_t offset, off_t len)
{
	uint64_t range[2] = { offset, len };
	struct stat s;
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0)
		return -1;
	if ((flags & O_ACCMODE) == O_RDONLY) {
		errno = EBADF;
		return -1;
	}
	if (offset < 0 || len <= 0) {
		errno = EINVAL;
		return -1;
	}
	if (fsync(fd) < 0 || syscall(SYS_ioctl, fd, request, range) < 0)
		return -1;
	/* Has the kernel ask for the new size. */
	return fstat(fd, &s);
}

int fallocate(int fd, int mode, off_t offset, off_t len)
{
	if ((mode == FALLOC_FL_COLLAPSE_RANGE || mode == FALLOC_FL_INSERT_RANGE) && is_fuse(fd))
		return shift(fd, mode == FALLOC_FL_COLLAPSE_RANGE ? UEXT_COLLAPSE : UEXT_INSERT,
			     offset, len);
	return syscall(SYS_fallocate, fd, mode, offset, len);
}

int fallocate64(int fd, int mode, off_t offset, off_t len)
{
	return fallocate(fd, mode, offset, len);
}
