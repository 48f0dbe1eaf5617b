"""System calls that Python's os module lacks, for the numbered tests."""

import ctypes
import errno
import os
import struct
import sys

_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4


def _call(number, *args):
    result = _libc.syscall(number, *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def renameat2(old, new, flags):
    return _call(316, AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)


def link_fd(fd, path):
    """Gives an open file a name."""
    return _call(265, AT_FDCWD, f"/proc/self/fd/{fd}".encode(), AT_FDCWD, os.fsencode(path), 0x400)


def name_to_handle(path):
    """The handle of a path, and the number of its mount."""
    handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0) + bytes(128))
    mount = ctypes.c_int()
    _call(303, AT_FDCWD, os.fsencode(path), handle, ctypes.byref(mount), 0)
    size, kind = struct.unpack_from("Ii", handle)
    return struct.pack("Ii", size, kind) + handle.raw[8 : 8 + size]


def open_by_handle(mount_fd, handle, flags):
    return _call(304, mount_fd, ctypes.create_string_buffer(handle), flags)


def statx(path, mask=0xFFF):
    """(mask, attributes, btime) of a path."""
    buf = ctypes.create_string_buffer(256)
    _call(332, AT_FDCWD, os.fsencode(path), 0, mask, buf)
    got, _, attributes = struct.unpack_from("IIQ", buf)
    seconds, nanos = struct.unpack_from("qI", buf, 0x50)
    return got, attributes, seconds + nanos / 1e9


def attempt(what, call, *args, **kwargs):
    """Prints what a call gave, or its error."""
    try:
        result = call(*args, **kwargs)
        print(what, "ok" if result is None else result)
        return result
    except OSError as error:
        print(what, errno.errorcode.get(error.errno, error.errno))
        return None
    finally:
        sys.stdout.flush()
