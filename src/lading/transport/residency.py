"""What the kernel knows of memory: which bytes of a file are in its page cache, whether a file lies
behind a network, where huge pages help.

It is asked through the C library, and answers within microseconds. Where it cannot say (another
system, cachestat before Linux 6.5), the answer is None.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys

__all__ = ["is_remote", "resident_bytes", "use_huge_pages"]

MADV_HUGEPAGE = 14
CACHESTAT = 451  # the same number on every architecture

REMOTE = {
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x00C36400: "ceph",
    0x01021997: "9p",
    0x65735546: "fuse",
    0x19830326: "beegfs",
    0x5346414F: "afs",
}
"""`f_type` of statfs(2) for file systems whose bytes come over a network, or from another process."""


def resident_bytes(fd: int, num_bytes: int) -> int | None:
    """How many of a file's first bytes are in the page cache; None where nobody can say."""
    library = _library()
    if library is None:
        return None
    span = struct.pack("QQ", 0, num_bytes)
    answer = ctypes.create_string_buffer(5 * 8)
    if library.syscall(CACHESTAT, fd, span, answer, 0) != 0:
        return None
    pages: int = struct.unpack("5Q", answer.raw)[0]
    return min(pages * mmap.PAGESIZE, num_bytes)


def is_remote(fd: int) -> bool | None:
    """Whether the file lies behind a network file system; None where nobody can say."""
    library = _library()
    if library is None:
        return None
    answer = ctypes.create_string_buffer(256)
    if library.fstatfs(fd, answer) != 0:
        return None
    kind: int = struct.unpack_from("l", answer.raw)[0]
    return kind & 0xFFFFFFFF in REMOTE


def use_huge_pages(address: int, num_bytes: int) -> None:
    """Asks for huge pages where memory of this size is touched for the first time: fewer faults."""
    library = _library()
    page = mmap.PAGESIZE
    first, stop = -(-address // page) * page, (address + num_bytes) // page * page
    if library is not None and stop > first:
        library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), MADV_HUGEPAGE)


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library
