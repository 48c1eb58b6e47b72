"""Jobs, files and a GPU for the tests of the engines: what they have to do, said in numpy."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st

from lading.transport.engine import BLOCK_BYTES, native_engine
from lading.transport.jobs import Jobs

Bytes = npt.NDArray[np.uint8]

ENGINES = [
    pytest.param(True, id="native", marks=pytest.mark.skipif(not native_engine(), reason="none")),
    pytest.param(False, id="python"),
]

O_DIRECT: int = vars(os).get("O_DIRECT", 0)


def noise(size: int, seed: int = 0) -> Bytes:
    """Bytes that are never 0xEE, which is what memory that nobody has written holds here."""
    found = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    found[found == 0xEE] = 1
    return found


@dataclass
class Work:
    """Jobs, the files that they read, the memory that they write, and what has to be in it."""

    files: list[Bytes]
    table: list[tuple[int, ...]]
    needed: Bytes
    memory: Bytes = field(init=False)

    def __post_init__(self) -> None:
        self.memory = np.full_like(self.needed, 0xEE)

    @property
    def jobs(self) -> Jobs:
        """[n, F], targets being addresses of `memory` now."""
        jobs = np.array(self.table, dtype=np.int64).reshape(-1, 8)
        jobs[:, 2] += self.memory.ctypes.data
        return jobs

    @property
    def num_bytes(self) -> int:
        return sum(row[3] * row[4] for row in self.table)

    def is_done(self) -> bool:
        return bool(np.array_equal(self.memory, self.needed))

    def is_partly_done(self) -> bool:
        """Each byte is what it has to be, or was not written."""
        return bool(((self.memory == self.needed) | (self.memory == 0xEE)).all())

    def write(self, folder: Path) -> list[Path]:
        paths = [folder / f"{i}.bin" for i in range(len(self.files))]
        for path, data in zip(paths, self.files, strict=True):
            path.write_bytes(data.tobytes())
        return paths


def work_of(files: list[Bytes], grids: Sequence[tuple[int, ...]]) -> Work:
    """Jobs (file, offset, run, rows, file stride, target gap, direct), in any order, whose targets
    lie one after another with some bytes between them.
    """
    table, at = [], 7
    filled: list[tuple[int, Bytes]] = []
    for file, offset, run, rows, stride, gap, direct in sorted(grids, key=lambda g: g[:2]):
        table.append((file, offset, at, run, rows, stride, run + gap, direct))
        for i in range(rows):
            begin = offset + i * stride
            filled.append((at + i * (run + gap), files[file][begin : begin + run]))
        at += rows * (run + gap) + 5
    needed = np.full(at, 0xEE, dtype=np.uint8)
    for begin, data in filled:
        needed[begin : begin + len(data)] = data
    return Work(files, table, needed)


@st.composite
def works(draw: Callable[..., Any]) -> Work:
    """Small neighbours, long runs, grids with gaps of any size, empty jobs; in one or two files."""
    sizes = draw(st.lists(st.integers(30_000, 90_000), min_size=1, max_size=2))
    grids = []
    for _ in range(draw(st.integers(1, 10))):
        file = draw(st.integers(0, len(sizes) - 1))
        kind = draw(st.sampled_from(["small", "long", "grid", "grid", "empty"]))
        run, rows, stride = draw(st.integers(1, 300)), 1, 0
        if kind == "long":
            run = draw(st.integers(1000, 30_000))
        elif kind == "empty":
            run, rows = draw(st.sampled_from([(0, 1), (0, 3), (5, 0)]))
        elif kind == "grid":
            run = draw(st.sampled_from([1, 4, 100, 1000, 4096, 5000, 20_000]))
            stride = run + draw(st.sampled_from([0, 1, 90, 2000, 2048, 2049, 9000]))
            rows = draw(st.integers(1, max(1, min(60, (sizes[file] - run) // stride))))
        if rows <= 1:
            stride = run
        span = max(rows - 1, 0) * stride + run
        offset = draw(st.integers(0, sizes[file] - span))
        gap = draw(st.sampled_from([0, 0, 3, 4096]))
        grids.append((file, offset, run, rows, stride, gap, draw(st.integers(0, 1))))
    return work_of([noise(size, i) for i, size in enumerate(sizes)], grids)


def neighbours(count: int, size: int, *, gap: int = 0, direct: int = 0, file: int = 0) -> Work:
    """`count` runs of `size` bytes in one file, the next `gap` bytes after the last."""
    data = [noise(count * (size + gap), file + 3) for file in range(file + 1)]
    grids = [(file, i * (size + gap), size, 1, size, 0, direct) for i in range(count)]
    return work_of(data, grids)


@contextmanager
def opened(paths: Sequence[Path], *, direct: bool = False) -> Iterator[list[tuple[int, int]]]:
    """Descriptors as the engine takes them."""
    found = []
    try:
        for path in paths:
            fd = os.open(path, os.O_RDONLY)
            past = os.open(path, os.O_RDONLY | O_DIRECT) if direct and O_DIRECT else -1
            found.append((fd, past))
        yield found
    finally:
        for fd in (fd for pair in found for fd in pair if fd >= 0):
            os.close(fd)


class _Copy2d(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = (
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_int),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_int),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class FakeGpu:
    """A GPU whose memory is this host's. A copy is done at the latest moment that is allowed: when
    an event that was recorded after it is waited for. A buffer that is filled too early shows.

    fail_at   the number of the call of `failing` that returns error 700, None = none does
    on_copy   is called as each copy is begun, on_context before a thread's first call
    """

    def __init__(
        self,
        threads: int,
        depth: int,
        buffer_bytes: int,
        *,
        failing: str = "",
        fail_at: int | None = None,
        on_copy: Callable[[], None] = lambda: None,
        on_context: Callable[[], None] = lambda: None,
    ) -> None:
        self.threads = threads
        self.buffer_bytes = -(-buffer_bytes // BLOCK_BYTES) * BLOCK_BYTES
        room = threads * depth * self.buffer_bytes
        self._memory = np.full(room + BLOCK_BYTES, 0xDD, dtype=np.uint8)
        first = -(-self._memory.ctypes.data // BLOCK_BYTES) * BLOCK_BYTES
        self.addresses = [first + i * self.buffer_bytes for i in range(threads * depth)]
        self.streams = [1000 + i for i in range(threads)]
        self.failing, self.fail_at = failing, fail_at
        self.on_copy, self.on_context = on_copy, on_context
        self.calls: dict[str, int] = {}
        self.pending: dict[int, list[tuple[int, int, int]]] = {s: [] for s in self.streams}
        self.moved_bytes = 0
        self.contexts: set[int] = set()
        self.events: dict[int, tuple[int, int]] = {}
        self._waited = dict.fromkeys(self.streams, 0)
        self._begun = dict.fromkeys(self.streams, 0)
        self._lock = threading.RLock()
        self._new_event = 1
        self._asked: dict[int, int] = {}
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        self._functions = [
            ctypes.CFUNCTYPE(ctypes.c_int, *types)(call)
            for types, call in (
                ((pointer,), self._set_context),
                ((ctypes.c_uint64, pointer, size, pointer), self._copy),
                ((pointer, pointer), self._copy_2d),
                ((pointer, ctypes.c_uint), self._create),
                ((pointer, pointer), self._record),
                ((pointer,), self._query),
                ((pointer,), self._wait),
                ((pointer,), self._destroy),
            )
        ]
        codes = [ctypes.cast(f, pointer).value or 0 for f in self._functions]
        self.table = [*codes, 4321]

    def _counted(self, name: str) -> bool:
        """Counts a call; whether it fails."""
        number = self.calls.get(name, 0)
        self.calls[name] = number + 1
        return name == self.failing and number == self.fail_at

    def _set_context(self, context: int | None) -> int:
        self.on_context()
        with self._lock:
            self.contexts.add(context or 0)
            return 201 if self._counted("set_context") else 0

    def _begin(self, stream: int, copies: list[tuple[int, int, int]]) -> None:
        for _, host, size in copies:
            stop = self.addresses[-1] + self.buffer_bytes
            assert self.addresses[0] <= host < host + size <= stop, "from page-locked memory"
        self.pending[stream] += copies
        self._begun[stream] += len(copies)

    def _copy(self, target: int, host: int, size: int, stream: int) -> int:
        self.on_copy()
        with self._lock:
            if self._counted("copy"):
                return 700
            self._begin(stream, [(target, host, size)])
        return 0

    def _copy_2d(self, parameters: int, stream: int) -> int:
        self.on_copy()
        with self._lock:
            if self._counted("copy"):
                return 700
            p = _Copy2d.from_address(parameters)
            assert (p.src_type, p.dst_type) == (1, 2), "from the host to the device"
            assert p.src_pitch >= p.width <= p.dst_pitch, "as the driver demands"
            rows = range(p.height)
            copies = [
                (p.dst_device + i * p.dst_pitch, p.src_host + i * p.src_pitch, p.width)
                for i in rows
            ]
            self._begin(stream, copies)
        return 0

    def _create(self, place: int, flags: int) -> int:
        with self._lock:
            if self._counted("create"):
                return 700
            assert flags & 2, "an event that takes no time"
            ctypes.c_void_p.from_address(place).value = self._new_event
            self.events[self._new_event] = (0, 0)
            self._new_event += 1
        return 0

    def _record(self, event: int, stream: int) -> int:
        with self._lock:
            if self._counted("record"):
                return 700
            self.events[event] = (stream, self._begun[stream])
        return 0

    def _query(self, event: int) -> int:
        """600, which is not yet, twice; then what it stands for is done."""
        with self._lock:
            if self._counted("wait"):
                return 700
            self._asked[event] = self._asked.get(event, 0) + 1
            if self._asked[event] % 3:
                return 600
        return self._arrive(event)

    def _wait(self, event: int) -> int:
        with self._lock:
            if self._counted("wait"):
                return 700
        return self._arrive(event)

    def _arrive(self, event: int) -> int:
        with self._lock:
            stream, until = self.events[event]
            while stream and self._waited[stream] < until:
                target, host, size = self.pending[stream].pop(0)
                ctypes.memmove(target, host, size)
                self.moved_bytes += size
                self._waited[stream] += 1
        return 0

    def _destroy(self, event: int) -> int:
        with self._lock:
            del self.events[event]
        return 0
