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
import time
from functools import cache

__all__ = ["HugePages", "huge_pages", "is_remote", "resident_bytes", "resident_part"]

MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_POPULATE_WRITE = 14, 15, 23
HUGE_PAGE_BYTES = 2**21
TRIAL_PAGES = 32
"""64 MiB: more than a guest seems to keep of what it has given back."""

PAGES_BETWEEN_PROBES = 64
SLOW_PAGE_SECONDS = 1.5e-3
"""A page is cleared in a tenth of this."""

NUM_SAMPLES, SAMPLE_BYTES = 32, 2**18
"""Spread over a file, these say within a tenth of a millisecond how much of it is in memory."""

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
"""`f_type` of statfs(2) of file systems whose bytes come over a network, or from a process."""


def resident_bytes(fd: int, num_bytes: int) -> int | None:
    """How many of a file's first bytes are in the page cache; None where nobody can say."""
    return _resident(fd, 0, num_bytes)


def resident_part(fd: int, num_bytes: int) -> float | None:
    """The part of a file's first bytes in the page cache, 0 to 1; None where nobody can say.

    Of a large file samples are asked for: the kernel counts page by page, 6 ms for a GB.
    """
    step = num_bytes // NUM_SAMPLES // mmap.PAGESIZE * mmap.PAGESIZE
    if step <= SAMPLE_BYTES:
        found = _resident(fd, 0, num_bytes)
        return None if found is None else found / max(num_bytes, 1)
    samples = [_resident(fd, at * step, SAMPLE_BYTES) for at in range(NUM_SAMPLES)]
    known = [sample for sample in samples if sample is not None]
    return sum(known) / SAMPLE_BYTES / len(known) if known else None


def _resident(fd: int, offset: int, num_bytes: int) -> int | None:
    library = _library()
    if library is None:
        return None
    span = struct.pack("QQ", offset, num_bytes)
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


class HugePages:
    """Asks for huge pages where memory is touched for the first time: fewer faults while it fills.

    A virtual machine whose host has taken free memory back needs 6 ms for a huge page, ten times
    what the small pages in its place take that are still its own (benchmarks/README.md). So the
    first pages are touched at once, one by one, and timed, and after them one of many; at two
    slow ones in a row no more are asked for (one alone may be a thread that had to wait).
    """

    def __init__(self) -> None:
        self._library = _library()
        self._num_tried = 0
        self._num_slow = 0  # in a row

    def use(self, address: int, num_bytes: int) -> None:
        """For memory at this address, whose contents stay what they are."""
        size = HUGE_PAGE_BYTES
        at, stop = -(-address // size) * size, (address + num_bytes) // size * size
        while self._library is not None and at < stop and self._num_slow < 2:
            is_trial = self._num_tried < TRIAL_PAGES or self._num_slow
            step = min(size if is_trial else size * PAGES_BETWEEN_PROBES, stop - at)
            self._advise(at, step, MADV_HUGEPAGE)
            began = time.perf_counter()
            self._advise(at, size, MADV_POPULATE_WRITE)
            is_slow = time.perf_counter() - began > SLOW_PAGE_SECONDS
            self._num_slow = self._num_slow + 1 if is_slow else 0
            self._num_tried += 1
            if is_slow:
                self._advise(at, step, MADV_NOHUGEPAGE)
            at += step

    def _advise(self, address: int, num_bytes: int, advice: int) -> None:
        assert self._library is not None, "`use` has asked"
        self._library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice)


@cache
def huge_pages() -> HugePages:
    """This process's: what one load has found out, at some milliseconds, holds for the next."""
    return HugePages()


def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    return _c_library()


@cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library
