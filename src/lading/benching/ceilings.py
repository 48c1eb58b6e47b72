"""What this machine can do at most, measured: the rates that a load is held against.

    memcpy           memory to memory, as much as fits no cache; of loads into host memory
    page_cache       preadv of the checkpoint's own files, once they are resident: into memory that
                     fits no cache, or for a GPU into as little as its page-locked buffers are
    disk             O_DIRECT reads of the same files, 4 MiB each, 16 at a time
    host_to_device   copies of page-locked memory to this rank's GPU

Every rank measures at the same time as the others: sums over ranks are what the host can do.
Rates are bytes a second, of at least `MIN_SECONDS` of work or all there is to read.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from lading.checkpoint import Checkpoint
    from lading.checkpoint.files import ByteReader

__all__ = ["Ceilings", "disk_rate", "host_to_device_rate", "memcpy_rate", "page_cache_rate"]

MIN_SECONDS = 0.3
MAX_BYTES = 2 * 10**9
BUFFER_BYTES = 64 * 2**20
LOCKED_BYTES = 4 * 2**20
DIRECT_BYTES, DIRECT_THREADS, BLOCK_BYTES = 4 * 2**20, 16, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Bytes a second of one rank, while the others are measured too; None = not measured."""

    memcpy: float | None = None
    page_cache: float | None = None
    disk: float | None = None
    host_to_device: float | None = None


def memcpy_rate(num_threads: int) -> float:
    """Bytes that so many threads copy, each between buffers of its own, counted once."""
    buffers = [
        (np.ones(BUFFER_BYTES, np.uint8), np.ones(BUFFER_BYTES, np.uint8))
        for _ in range(num_threads)
    ]

    def copy(worker: int) -> int:
        source, target = buffers[worker]
        ctypes.memmove(target.ctypes.data, source.ctypes.data, BUFFER_BYTES)
        return BUFFER_BYTES

    return _rate(num_threads, copy)


def page_cache_rate(
    checkpoint: Checkpoint, num_threads: int, buffer_bytes: int = BUFFER_BYTES
) -> float | None:
    """Bytes that so many threads read from the files' pages, each into a buffer of its own; None
    without plain files.
    """
    buffers = [memoryview(np.ones(buffer_bytes, np.uint8)) for _ in range(num_threads)]  # type: ignore[arg-type]
    with checkpoint.reader() as reader:
        if reader.files is None:
            return None
        pieces = _Pieces(reader.files, sorted(checkpoint.file_bytes), max(buffer_bytes // 8, 2**21))

        def read(worker: int) -> int:
            files, (file, offset, size) = pieces.files, pieces.take()
            at = offset % (buffer_bytes - pieces.piece_bytes)  # other memory than the last time
            files.read_into(file, offset, buffers[worker][at : at + size])
            return size

        return _rate(num_threads, read)


def disk_rate(checkpoint: Checkpoint) -> float | None:
    """Bytes that the disk gives past the page cache; None where the system has no such reads."""
    with checkpoint.reader() as reader:
        if reader.files is None:
            return None
        files = sorted(checkpoint.file_bytes)
        if any(reader.files.direct_descriptor(file) < 0 for file in files):
            return None
        pieces = _Pieces(reader.files, files, DIRECT_BYTES)
        memory = [np.ones(DIRECT_BYTES + BLOCK_BYTES, np.uint8) for _ in range(DIRECT_THREADS)]
        aligned = [one[-one.ctypes.data % BLOCK_BYTES :][:DIRECT_BYTES] for one in memory]

        def read(worker: int) -> int:
            import os

            file, offset, _ = pieces.take()
            fd = pieces.files.direct_descriptor(file)
            return os.preadv(fd, [memoryview(aligned[worker])], offset)  # type: ignore[arg-type]

        return _rate(DIRECT_THREADS, read, at_most=MAX_BYTES)


def host_to_device_rate(device: torch.device) -> float:
    """Bytes that go from page-locked memory to the GPU, in pieces of 64 MiB."""
    import torch

    with torch.cuda.device(device):  # the memory is locked for it
        pinned = torch.ones(BUFFER_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    pinned.to(device)
    torch.cuda.synchronize(device)
    moved, began = 0, time.perf_counter()
    while moved < MAX_BYTES or time.perf_counter() - began < MIN_SECONDS:
        for _ in range(8):
            pinned.to(device, non_blocking=True)
        torch.cuda.synchronize(device)
        moved += 8 * BUFFER_BYTES
    return moved / (time.perf_counter() - began)


class _Pieces:
    """Pieces of files, one after another, for several threads; after the last the first again."""

    def __init__(self, files: ByteReader, names: Sequence[str], piece_bytes: int) -> None:
        self.files, self.piece_bytes = files, piece_bytes
        self._pieces = [
            (name, at, min(piece_bytes, files.file_bytes(name) - at))
            for name in names
            for at in range(0, files.file_bytes(name), piece_bytes)
        ]
        self._next, self._lock = 0, threading.Lock()

    def take(self) -> tuple[str, int, int]:
        """File, offset, bytes."""
        with self._lock:
            self._next += 1
            return self._pieces[(self._next - 1) % len(self._pieces)]


def _rate(num_threads: int, work: Callable[[int], int], *, at_most: int | None = None) -> float:
    """Bytes a second of all threads together, each of which works until the time is over."""
    moved = [0] * num_threads
    problems: list[BaseException] = []
    began = time.perf_counter()

    def run(worker: int) -> None:
        try:
            while True:
                moved[worker] += work(worker)
                is_over = time.perf_counter() - began >= MIN_SECONDS
                if is_over and (at_most is None or sum(moved) >= at_most or _is_late(began)):
                    return
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return sum(moved) / (time.perf_counter() - began)


def _is_late(began: float) -> bool:
    return time.perf_counter() - began > 10 * MIN_SECONDS
