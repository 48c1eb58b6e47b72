"""Executes jobs: by the native engine where it was built, in Python otherwise. Same units, same
bytes, same errors; only the speed differs.

What a job, a unit and a gap are is said in `jobs` and in `_engine.c`. A run never enters the
interpreter; this thread waits for it in short steps, so that Ctrl-C and a progress bar are served.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lading.errors import CallError
from lading.transport.jobs import Jobs

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["DEFAULT_CHUNK_BYTES", "Device", "Engine", "Fault", "Stats", "native_engine"]

DEFAULT_CHUNK_BYTES = 2 * 2**20
"""A unit: large enough that its calls do not count, small enough to stay in a core's cache."""

DEFAULT_GAP_BYTES = 4096
"""A gap of so many bytes costs as much to read as a second call (benchmarks/README.md)."""

BLOCK_BYTES = 4096
"""What offsets, lengths and memory of direct reads are multiples of."""

POLL_SECONDS = 0.05

FAILED_READ, FILE_ENDED, FAILED_CUDA, NO_MEMORY = 1, 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a run ended early: the first job, in order, that failed.

    kind     FAILED_READ: code is an errno; FILE_ENDED; FAILED_CUDA: code is the driver's; NO_MEMORY
    offset   in the file; `wanted` bytes were asked for there, `got` came
    """

    kind: int
    code: int
    job: int
    offset: int
    wanted: int
    got: int


@dataclass(slots=True)
class Stats:
    """What runs have done. Seconds are summed over threads; reading and waiting for the bus are
    told apart only where there is a bus.
    """

    read_bytes: int = 0
    moved_bytes: int = 0
    calls: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0

    def add(self, other: Stats) -> None:
        """Sums up."""
        self.read_bytes += other.read_bytes
        self.moved_bytes += other.moved_bytes
        self.calls += other.calls
        self.read_seconds += other.read_seconds
        self.wait_seconds += other.wait_seconds


class Device(Protocol):
    """A GPU as the engine sees it: page-locked buffers, streams, and the driver's functions."""

    @property
    def threads(self) -> int:
        """That read; one more starts the copies."""

    @property
    def buffer_bytes(self) -> int:
        """Of each buffer."""

    @property
    def addresses(self) -> Sequence[int]:
        """Of the buffers, a multiple of `threads`, which lie one after another."""

    @property
    def streams(self) -> Sequence[int]:
        """Copies go to one after the other."""

    @property
    def table(self) -> Sequence[int]:
        """The addresses of set_context, copy, copy_2d, event_create, _record, _query, _wait and
        _destroy; the context.
        """


def native_engine() -> ModuleType | None:
    """The native engine, None where it was not built or LADING_ENGINE=python asks for the other.

    Raises a CallError where LADING_ENGINE is something else, or `native` and that was not built.
    """
    asked = os.environ.get("LADING_ENGINE", "")
    if asked not in ("", "native", "python"):
        fact = f"is {asked!r}, needs 'native' or 'python', or to be unset"
        raise CallError(fact, subject="LADING_ENGINE")
    if asked == "python":
        return None
    try:
        from lading.transport import _engine
    except ImportError as error:
        if asked == "native":
            raise CallError(
                f"is 'native', and the native engine cannot be imported ({error}); needs one that "
                "was built when lading was installed",
                subject="LADING_ENGINE",
                hint="install lading where there is a C compiler, or unset LADING_ENGINE",
            ) from None
        return None
    return _engine


@dataclass(slots=True)
class Engine:
    """Threads that move jobs.

    threads        that read
    chunk_bytes    the size of a unit
    gap_bytes      a gap up to this size is read rather than skipped
    native         whether the native engine is used; by default wherever there is one
    """

    threads: int = 2
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    gap_bytes: int = DEFAULT_GAP_BYTES
    native: bool = field(default_factory=lambda: native_engine() is not None)
    stats: Stats = field(default_factory=Stats)

    def run(
        self,
        jobs: Jobs,
        files: Sequence[tuple[int, int]],
        *,
        device: Device | None = None,
        advance: Callable[[int], None] = lambda _: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Fault | None:
        """Moves all jobs, [n, F] in ascending order of files and offsets. None where all is well.

        files       (descriptor, descriptor for direct reads or -1), as jobs number them
        device      where the targets are; None = this host's memory
        advance     is told, on this thread, how many bytes have been moved
        meanwhile   is called once, on this thread, while the jobs are being moved
        Nothing is written any more once this has returned or raised.
        """
        if not len(jobs):
            meanwhile()
            return None
        start = self._start_native if self.native else self._start_python
        run = start(np.ascontiguousarray(jobs), files, device)
        told = 0
        try:
            run.begin()
            meanwhile()
            over = False
            while not over:
                over, moved = run.wait(POLL_SECONDS)
                advance(moved - told)
                told = moved
        except BaseException:  # Ctrl-C, or a progress bar that failed: the memory is still written
            _end(run)
            raise
        fault, stats = run.result()
        self.stats.add(stats)
        return fault and _in_its_job(fault, jobs)

    def _start_native(
        self, jobs: Jobs, files: Sequence[tuple[int, int]], device: Device | None
    ) -> _Run:
        return _NativeRun(self, jobs, files, device)

    def _start_python(
        self, jobs: Jobs, files: Sequence[tuple[int, int]], device: Device | None
    ) -> _Run:
        from lading.transport.python_engine import PythonRun

        return PythonRun(self, jobs, files, device)


class _Run(Protocol):
    def begin(self) -> None: ...

    def wait(self, seconds: float) -> tuple[bool, int]: ...

    def stop(self) -> None: ...

    def result(self) -> tuple[Fault | None, Stats]: ...


def _end(run: _Run) -> None:
    """Returns when nothing is written any more, however often Ctrl-C is pressed."""
    while True:
        try:
            run.stop()
            while not run.wait(POLL_SECONDS)[0]:
                pass
        except KeyboardInterrupt:
            continue
        return


def _in_its_job(fault: Fault, jobs: Jobs) -> Fault:
    """Names, of small jobs that were read together, the one whose bytes were missing first."""
    job, place = fault.job, fault.offset + (fault.got if fault.kind == FILE_ENDED else 0)
    while job + 1 < len(jobs) and fault.kind in (FAILED_READ, FILE_ENDED):
        file, offset, _, run, rows, *_ = jobs[job].tolist()
        if rows > 1 or place < offset + run or jobs[job + 1, :5:4].tolist() != [file, 1]:
            break
        job += 1
    return replace(fault, job=job)


def _table(numbers: Iterable[int]) -> bytes:
    return np.fromiter(numbers, dtype=np.int64).tobytes()


def _slabs(device: Device | None) -> Sequence[int]:
    """Where the slabs of a device begin and how many there are: each is one buffer a thread."""
    return (device.addresses[0], len(device.addresses) // device.threads) if device else ()


class _NativeRun:
    def __init__(
        self, engine: Engine, jobs: Jobs, files: Sequence[tuple[int, int]], device: Device | None
    ) -> None:
        from lading.transport import _engine

        self._module = _engine
        self._engine, self._jobs, self._files, self._device = engine, jobs, files, device
        self._run: Any = None

    def begin(self) -> None:
        engine, device = self._engine, self._device
        self._run = self._module.start(
            self._jobs.tobytes(),
            _table(number for pair in self._files for number in pair),
            _table(_slabs(device)),
            _table(device.streams if device else ()),
            _table(device.table if device else ()),
            device.threads if device else engine.threads,
            engine.chunk_bytes,
            engine.gap_bytes,
            device.threads * device.buffer_bytes
            if device
            else engine.chunk_bytes + 2 * BLOCK_BYTES,
        )

    def wait(self, seconds: float) -> tuple[bool, int]:
        if self._run is None:
            return True, 0
        over, moved = self._module.wait(self._run, seconds)
        return bool(over), moved

    def stop(self) -> None:
        if self._run is not None:
            self._module.stop(self._run)

    def result(self) -> tuple[Fault | None, Stats]:
        (kind, code, job, offset, wanted, got), numbers = self._module.result(self._run)
        read, moved, calls, read_ns, wait_ns = numbers
        fault = Fault(kind=kind, code=code, job=job, offset=offset, wanted=wanted, got=got)
        return fault if kind else None, Stats(read, moved, calls, read_ns / 1e9, wait_ns / 1e9)
