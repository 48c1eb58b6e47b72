"""The engine in Python, for machines where the native one was not built: the same units, in turn.

It is the same work in the same order; what the native engine gains is that its threads do not wait
for the interpreter. Tests hold the two to the same bytes, the same calls and the same faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lading.transport.engine import (
    BLOCK_BYTES,
    FAILED_CUDA,
    FAILED_READ,
    FILE_ENDED,
    NO_MEMORY,
    Device,
    Engine,
    Fault,
    Stats,
)
from lading.transport.jobs import FIELDS, Jobs

__all__ = ["PythonRun", "units"]

MAX_SEGMENTS = 1024

_FILE, _OFFSET, _TARGET, _RUN, _ROWS, _FILE_STRIDE, _TARGET_STRIDE, _DIRECT = range(len(FIELDS))

Unit = tuple[int, int, int, int]
"""(job, last job, begin, end): bytes [begin, end) of one job's runs, or all of several jobs."""


def units(jobs: Jobs, chunk_bytes: int, gap_bytes: int) -> Iterator[Unit]:
    """What a thread does at a time; as `cut_units` of _engine.c."""
    table: list[list[int]] = jobs.tolist()
    k = 0
    while k < len(table):
        _, _, _, run, rows, file_stride, _, direct = table[k]
        last, total = k, run * rows
        if not total:
            k += 1
            continue
        row = file_stride if direct and rows > 1 else run
        most = room_for(chunk_bytes, direct=bool(direct))
        step = min(most, run) if rows == 1 or row > most else most // row * run
        if rows == 1 and run < chunk_bytes // 2:
            last += _num_neighbours(table[k : k + MAX_SEGMENTS // 2], chunk_bytes, gap_bytes)
        at = 0
        while at < total:
            end = min(at - at % run + run if step < run < at % run + step else at + step, total)
            yield k, last, at, end
            at = total if last > k else end
        k = last + 1


def room_for(chunk_bytes: int, *, direct: bool) -> int:
    """The most bytes of a unit: a direct read is widened to whole blocks, and has to fit too."""
    is_widened = direct and chunk_bytes >= 4 * BLOCK_BYTES
    return chunk_bytes - 2 * BLOCK_BYTES if is_widened else chunk_bytes


def _num_neighbours(table: list[list[int]], chunk_bytes: int, gap_bytes: int) -> int:
    """How many small jobs after the first are read with it."""
    file, offset, _, run, _, _, _, direct = table[0]
    stop, size = offset + run, run
    for count, other in enumerate(table[1:]):
        end = other[_OFFSET] + other[_RUN]
        if (
            (other[_ROWS], other[_FILE], other[_DIRECT]) != (1, file, direct)
            or not other[_RUN]
            or not stop <= other[_OFFSET] <= stop + gap_bytes
            or max(size + other[_RUN], end - offset) > room_for(chunk_bytes, direct=bool(direct))
        ):
            return count
        stop, size = end, size + other[_RUN]
    return len(table) - 1


class _Stopped(Exception):
    """This unit failed, and the run knows: the thread ends."""


class PythonRun:
    """The same in Python."""

    def __init__(
        self, engine: Engine, jobs: Jobs, files: Sequence[tuple[int, int]], device: Device | None
    ) -> None:
        self.jobs: list[list[int]] = jobs.tolist()
        self.files = list(files)
        self.device = device
        self.gap_bytes = engine.gap_bytes
        self.buffer_bytes = engine.chunk_bytes + 2 * BLOCK_BYTES
        self.stats = Stats()
        self.lock = threading.Lock()
        self._ended = threading.Condition(self.lock)
        self._begun = self._running = 0
        self._closed = False
        self._fault: Fault | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._units = units(jobs, engine.chunk_bytes, engine.gap_bytes)
        self._num_threads = device.threads if device else engine.threads
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        for index in range(self._num_threads):
            thread = threading.Thread(target=self._work, args=[index], name=f"lading-{index}")
            self._threads.append(thread)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads: those that began do it all
                self._threads.pop()
                if not index:
                    self.fail(Fault(kind=NO_MEMORY, code=errno.EAGAIN, job=0, **_NOWHERE))
                return

    def wait(self, seconds: float) -> tuple[bool, int]:
        """Whether all is over, and the bytes moved.

        Ctrl-C can come while a thread is being started: nobody knows then whether it is, so one
        that begins after the end does nothing.
        """
        with self._ended:
            self._closed = self._closed or self._ended.wait_for(self._is_over, seconds)
        if self._closed:
            for thread in self._threads:
                if thread.is_alive():  # on its last steps
                    thread.join()
        return self._closed, self.stats.moved_bytes

    def _is_over(self) -> bool:
        return not self._running and (self._stopped or self._begun == len(self._threads))

    def stop(self) -> None:
        self._stopped = True

    def result(self) -> tuple[Fault | None, Stats]:
        if self._error is not None:
            raise self._error  # a fault of this file
        return self._fault, self.stats

    def take(self) -> Unit | None:
        """The next unit; None where there is none, or none may be begun any more.

        Units are begun in order, so the fault that ends a run is that of the first job with one.
        """
        with self.lock:
            return None if self._stopped else next(self._units, None)

    def fail(self, fault: Fault) -> None:
        """Notes a fault, of several that of the first place, and lets no unit begin."""
        with self.lock:
            known = self._fault
            if known is None or (fault.job, fault.offset) < (known.job, known.offset):
                self._fault = fault
            self._stopped = True

    def _work(self, index: int) -> None:
        with self.lock:
            if self._closed:
                return
            self._begun, self._running = self._begun + 1, self._running + 1
        try:
            self._do_units(index)
        finally:
            with self._ended:
                self._running -= 1
                self._ended.notify_all()

    def _do_units(self, index: int) -> None:
        try:
            worker = _Worker(self, index)
            try:
                worker.begin()
                while (unit := self.take()) is not None:
                    worker.move(unit)
            except _Stopped:
                pass
            finally:
                worker.end()
        except BaseException as error:  # raised where the result is asked for
            self._error = error
            self.stop()


class _Worker:
    """What one thread works with."""

    def __init__(self, run: PythonRun, index: int) -> None:
        self._run = run
        self._gap = memoryview(bytearray(run.gap_bytes))
        self._lane = _Lane(run.device, index) if run.device else None
        self._bounce: int | None = None
        self._spare: np.ndarray[tuple[int], np.dtype[np.uint8]] | None = None

    def begin(self) -> None:
        if self._lane is not None:
            self._checked(self._lane.begin(), 0)

    def end(self) -> None:
        """Waits for the copies that were begun."""
        if self._lane is not None and (code := self._lane.end()):
            self._failed(FAILED_CUDA, code, len(self._run.jobs))

    def move(self, unit: Unit) -> None:
        runs = list(self._runs(unit))
        if self._lane is None:
            self._on_host(unit, runs)
        else:
            self._on_device(unit, runs, self._lane)
        with self._run.lock:
            self._run.stats.moved_bytes += sum(size for *_, size in runs)

    def _runs(self, unit: Unit) -> Iterator[_Piece]:
        """Each dense piece of a unit."""
        first, last, begin, end = unit
        for k in range(first, last + 1):
            _, offset, target, run, _, file_stride, target_stride, _ = self._run.jobs[k]
            at, stop = (begin, end) if last == first else (0, run)
            while at < stop:
                row, inner = divmod(at, run)
                size = min(run - inner, stop - at)
                here, there = row * file_stride + inner, row * target_stride + inner
                yield k, offset + here, target + there, size
                at += size

    def _on_host(self, unit: Unit, runs: list[_Piece]) -> None:
        if not self._run.jobs[unit[0]][_DIRECT]:
            self._read_runs(unit, runs)
            return
        bounce = self._bounce_buffer()
        first = self._read_span(unit, runs, bounce)
        for _, offset, target, size in runs:
            ctypes.memmove(target, bounce + offset - first, size)

    def _on_device(self, unit: Unit, runs: list[_Piece], lane: _Lane) -> None:
        run, began = self._run, time.perf_counter()
        slot, code = lane.next_slot()
        self._checked(code, unit[0])
        buffer, waited = lane.buffers[slot], time.perf_counter()
        if run.jobs[unit[0]][_DIRECT]:
            first = self._read_span(unit, runs, buffer)
            places = [buffer + offset - first for _, offset, _, _ in runs]
        else:
            places, at = [], buffer
            for *_, size in runs:
                places.append(at)
                at += size
            packed = [(k, at, place, n) for (k, at, _, n), place in zip(runs, places, strict=True)]
            self._read_runs(unit, packed)
        with run.lock:
            run.stats.wait_seconds += waited - began
            run.stats.read_seconds += time.perf_counter() - waited
        try:
            for job, place, target, size in _joined(runs, places):
                self._checked(lane.copy(target, place, size), job)
        finally:  # also after a failure: what was begun before it has to be waited for
            self._checked(lane.record(slot), unit[0])

    def _read_runs(self, unit: Unit, pieces: Iterable[_Piece]) -> None:
        """Fills each piece, given in ascending order of offsets; small gaps are read too."""
        fd = self._run.files[self._run.jobs[unit[0]][_FILE]][0]
        batch: list[tuple[int, int]] = []  # (address, or 0 for a gap; bytes)
        first = following = 0
        for _, offset, into, size in pieces:
            gap = offset - following
            if batch and (not 0 <= gap <= self._run.gap_bytes or len(batch) + 2 > MAX_SEGMENTS):
                self._read(unit[0], fd, self._views(batch), first)
                batch = []
            if not batch:
                first, gap = offset, 0
            if gap:
                batch.append((0, gap))
            if batch and not gap and sum(batch[-1]) == into:
                batch[-1] = (batch[-1][0], batch[-1][1] + size)
            else:
                batch.append((into, size))
            following = offset + size
        self._read(unit[0], fd, self._views(batch), first)

    def _views(self, batch: Iterable[tuple[int, int]]) -> list[memoryview]:
        return [_memory(at, size) if at else self._gap[:size] for at, size in batch]

    def _read_span(self, unit: Unit, runs: list[_Piece], buffer: int) -> int:
        """Reads, with direct I/O, all from a unit's first byte to its last; where it begins."""
        fd, direct = self._run.files[self._run.jobs[unit[0]][_FILE]]
        first = runs[0][1] // BLOCK_BYTES * BLOCK_BYTES
        needed = runs[-1][1] + runs[-1][3] - first
        length = -(-needed // BLOCK_BYTES) * BLOCK_BYTES
        got = 0
        if direct >= 0:
            with contextlib.suppress(
                OSError
            ):  # what it cannot do, the usual read does, or says why
                got = os.preadv(direct, [_memory(buffer, length)], first)
            self._count(got if got >= needed else 0)
        if got < needed:
            self._read(unit[0], fd, [_memory(buffer, needed)], first)
        return first

    def _read(self, job: int, fd: int, into: list[memoryview], offset: int) -> None:
        wanted, done = sum(view.nbytes for view in into), 0
        while done < wanted:
            try:
                got = os.preadv(fd, into, offset + done)  # repeated by Python on EINTR
            except OSError as error:
                self._count(0)
                code = error.errno or errno.EIO
                self._failed(FAILED_READ, code, job, offset + done, wanted, done)
                raise _Stopped from None
            self._count(got)
            if not got:
                self._failed(FILE_ENDED, 0, job, offset, wanted, done)
                raise _Stopped
            done += got
            while into and got >= into[0].nbytes:
                got -= into.pop(0).nbytes
            if got:
                into[0] = into[0][got:]

    def _count(self, num_bytes: int) -> None:
        with self._run.lock:
            self._run.stats.calls += 1
            self._run.stats.read_bytes += num_bytes

    def _checked(self, code: int, job: int) -> None:
        if code:
            self._failed(FAILED_CUDA, code, job)
            raise _Stopped

    def _failed(
        self, kind: int, code: int, job: int, offset: int = 0, wanted: int = 0, got: int = 0
    ) -> None:
        self._run.fail(Fault(kind=kind, code=code, job=job, offset=offset, wanted=wanted, got=got))

    def _bounce_buffer(self) -> int:
        if self._bounce is None:
            self._spare = np.empty(self._run.buffer_bytes + BLOCK_BYTES, dtype=np.uint8)
            self._bounce = -(-self._spare.ctypes.data // BLOCK_BYTES) * BLOCK_BYTES
        return self._bounce


_Piece = tuple[int, int, int, int]
"""(job, offset in the file, address, bytes)"""

_NOWHERE = {"offset": 0, "wanted": 0, "got": 0}


class _Lane:
    """One thread's page-locked buffers, events and stream. What fails returns the driver's code."""

    def __init__(self, device: Device, index: int) -> None:
        depth = len(device.addresses) // device.threads
        self.buffers = device.addresses[index * depth : (index + 1) * depth]
        self._stream = ctypes.c_void_p(device.streams[index % len(device.streams)])
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        kinds = (
            (pointer,),
            (ctypes.c_uint64, pointer, size, pointer),
            (pointer, pointer),
            (pointer, ctypes.c_uint),
            (pointer, pointer),
            (pointer,),
            (pointer,),
            (pointer,),
        )
        functions = [
            ctypes.CFUNCTYPE(ctypes.c_int, *types)(address)
            for types, address in zip(kinds, device.table, strict=False)
        ]
        (
            self._set_context,
            self._copy,
            _,
            self._create,
            self._record,
            _,
            self._wait,
            self._destroy,
        ) = functions
        self._context = ctypes.c_void_p(device.table[-1])
        self._events = [ctypes.c_void_p() for _ in range(depth)]
        self._used = [False] * depth
        self._next = 0

    def begin(self) -> int:
        code: int = self._set_context(self._context)
        for event in self._events:
            code = code or self._create(ctypes.byref(event), 3)
        return code

    def next_slot(self) -> tuple[int, int]:
        """A buffer that nothing is copied from any more."""
        slot = self._next
        self._next = (slot + 1) % len(self._events)
        return slot, self._wait(self._events[slot]) if self._used[slot] else 0

    def copy(self, target: int, host: int, size: int) -> int:
        code: int = self._copy(target, ctypes.c_void_p(host), size, self._stream)
        return code

    def record(self, slot: int) -> int:
        self._used[slot] = True
        code: int = self._record(self._events[slot], self._stream)
        return code

    def end(self) -> int:
        """Waits for all that was begun; the first code that is not 0."""
        first = 0
        for used, event in zip(self._used, self._events, strict=True):
            code: int = self._wait(event) if used else 0
            first = first or code
        for event in self._events:
            if event.value:
                self._destroy(event)
        return first


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _joined(runs: Iterable[_Piece], places: Iterable[int]) -> Iterator[_Piece]:
    """(job, place, address, bytes), neighbours on both sides joined."""
    here: _Piece | None = None
    for (job, _, to, size), at in zip(runs, places, strict=True):
        if here is not None and here[1] + here[3] == at and here[2] + here[3] == to:
            here = (*here[:3], here[3] + size)
            continue
        if here is not None:
            yield here
        here = (job, at, to, size)
    if here is not None:
        yield here
