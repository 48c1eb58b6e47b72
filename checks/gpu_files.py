"""Files as gpu_back.py looks at them: digests, the page cache, the disk."""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lading.transport.residency import resident_bytes


def sha256(path: Path) -> str:
    """Of a file; of one that is not there, nothing."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def drop(files: list[Path]) -> int:
    """Empties the page cache of the files; how many of their bytes stay."""
    left = 0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = resident_bytes(file.fileno(), path.stat().st_size)
            if found is None:
                raise OSError("the system does not say what is resident (no cachestat)")
            left += found
    return left


def disk_bytes() -> int:
    """What this process has had read from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def read_direct(files: list[Path], num_threads: int = 16, chunk: int = 4 * 2**20) -> None:
    """All bytes of the files, past the page cache, into the same few buffers."""
    opened = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files]
    pieces = iter([(fd, at) for fd in opened for at in range(0, os.fstat(fd).st_size, chunk)])
    lock = threading.Lock()

    def work(_: int) -> None:
        buffer = mmap.mmap(-1, chunk)  # pages are aligned
        while True:
            with lock:
                fd, at = next(pieces, (-1, 0))
            if fd < 0:
                return
            os.preadv(fd, [buffer], at)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(work, range(num_threads)))
    for fd in opened:
        os.close(fd)
