"""Both engines: the same bytes by the same calls, the same faults, nothing written afterwards."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lading
from lading.errors import CallError
from lading.transport import engine as engines
from lading.transport.engine import (
    BLOCK_BYTES,
    FAILED_CUDA,
    FAILED_READ,
    FILE_ENDED,
    Engine,
    Fault,
    Stats,
    native_engine,
)

from .made import ENGINES, FakeGpu, neighbours, noise, opened, work_of, works

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are for Linux")

HERE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


UNIT = 4 * BLOCK_BYTES
"""The smallest of runs on a GPU."""


@HERE
@given(data=st.data())
def test_all_ways_give_the_same(data: st.DataObject, tmp_path: Path) -> None:
    work = data.draw(works())
    threads, depth = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    chunk = data.draw(st.sampled_from([4096, 6000, 8192, UNIT, UNIT, 20_000, 1 << 20]))
    gap = data.draw(st.sampled_from([0, 64, 2048]))
    counted: dict[bool, list[Stats]] = {True: [], False: []}
    with opened(work.write(tmp_path), direct=True) as files:
        for native in [True, False] if native_engine() else [False]:
            for on_gpu in (False, True) if chunk >= UNIT else (False,):
                engine = Engine(threads=threads, chunk_bytes=chunk, gap_bytes=gap, native=native)
                gpu = FakeGpu(threads, depth, engine.chunk_bytes) if on_gpu else None
                told: list[int] = []
                work.memory[:] = 0xEE
                fault = engine.run(work.jobs, files, device=gpu, advance=told.append)
                assert fault is None
                assert work.is_done(), (native, on_gpu)
                assert sum(told) == engine.stats.moved_bytes == work.num_bytes
                assert engine.stats.read_bytes >= 0
                if gpu is not None and len(work.jobs):
                    assert gpu.moved_bytes == work.num_bytes
                    assert gpu.contexts <= {4321}
                    assert gpu.events == {}, "events are given back"
                counted[native].append(engine.stats)
    for one, two in zip(counted[True], counted[False], strict=False):
        assert (one.calls, one.read_bytes) == (two.calls, two.read_bytes)
    if not any(row[-1] for row in work.table):  # the file's bytes that were read besides
        assert counted[False][0].read_bytes <= work.num_bytes + gap * sum(r[4] for r in work.table)


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("direct", [0, 1])
def test_long_runs_are_cut_and_small_ones_joined(native: bool, direct: int, tmp_path: Path) -> None:
    engine = Engine(threads=2, chunk_bytes=8192, gap_bytes=100, native=native)
    work = neighbours(1000, 16, gap=0, direct=direct)
    with opened(work.write(tmp_path), direct=True) as files:
        assert engine.run(work.jobs, files) is None
    assert work.is_done()
    assert engine.stats.calls == 2  # 512 jobs at the most
    engine.stats = Stats()
    work = neighbours(1, 100_000, direct=direct)
    with opened(work.write(tmp_path), direct=True) as files:
        assert engine.run(work.jobs, files) is None
    assert work.is_done()
    assert engine.stats.calls == -(-100_000 // 8192)


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize(("gap", "calls", "read"), [(100, 1, 20 * 300 + 19 * 100), (101, 20, 6000)])
def test_small_gaps_are_read(native: bool, gap: int, calls: int, read: int, tmp_path: Path) -> None:
    work = work_of([noise(10_000)], [(0, 0, 300, 20, 300 + gap, 9, 0)])
    engine = Engine(threads=1, gap_bytes=100, native=native)
    with opened(work.write(tmp_path)) as files:
        assert engine.run(work.jobs, files) is None
    assert work.is_done()
    assert (engine.stats.calls, engine.stats.read_bytes) == (calls, read)


@pytest.mark.parametrize("native", ENGINES)
def test_direct_reads_where_the_file_does_not_allow_them(native: bool, tmp_path: Path) -> None:
    work = neighbours(30, 1000, direct=1)
    with opened(work.write(tmp_path)) as files:  # no descriptor for them at all
        assert Engine(chunk_bytes=4096, native=native).run(work.jobs, files) is None
        assert work.is_done()
        work.memory[:] = 0xEE
        folder = os.open(tmp_path, os.O_RDONLY)  # one whose reads fail
        try:
            bad = [(files[0][0], folder)]
            assert Engine(chunk_bytes=4096, native=native).run(work.jobs, bad) is None
        finally:
            os.close(folder)
    assert work.is_done()


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("size", [100, 30_000])
def test_a_file_that_has_shrunk(
    native: bool, direct: int, on_gpu: bool, size: int, tmp_path: Path
) -> None:
    work = neighbours(60, size, direct=direct)
    engine = Engine(threads=3, chunk_bytes=UNIT, native=native)
    gpu = FakeGpu(3, 2, engine.chunk_bytes) if on_gpu else None
    paths = work.write(tmp_path)
    with opened(paths, direct=True) as files:
        os.truncate(paths[0], 37 * size + 50)
        fault = engine.run(work.jobs, files, device=gpu)
    assert fault is not None
    assert (fault.kind, fault.code, fault.job) == (FILE_ENDED, 0, 37)
    assert fault.offset + fault.got == 37 * size + 50
    assert fault.got < fault.wanted
    assert work.is_partly_done()
    assert not work.is_done()


@pytest.mark.parametrize("native", ENGINES)
def test_what_the_system_refuses(native: bool, tmp_path: Path) -> None:
    work = neighbours(4, 5000, file=0)
    paths = work.write(tmp_path)
    folder, memory = os.open(tmp_path, os.O_RDONLY), os.open("/proc/self/mem", os.O_RDONLY)
    try:
        for fd, code in ((folder, errno.EISDIR), (memory, errno.EIO), (1 << 20, errno.EBADF)):
            for direct_fd in (-1, fd):
                fault = Engine(native=native).run(work.jobs, [(fd, direct_fd)])
                needed = Fault(
                    kind=FAILED_READ, code=code, job=0, offset=0, wanted=fault.wanted, got=0
                )
                assert fault == needed
                assert bool((work.memory == 0xEE).all())
    finally:
        os.close(folder)
        os.close(memory)
    with opened(paths) as files:
        assert Engine(native=native).run(work.jobs, files) is None
    assert work.is_done()


@pytest.mark.parametrize("native", ENGINES)
def test_the_first_fault_in_order_is_told(native: bool, tmp_path: Path) -> None:
    """However the threads are scheduled: units are begun in order, and those begun are finished."""
    size = 20_000
    files = [noise(10 * size, i) for i in range(3)]
    grids = [(file, i * size, size, 1, size, 0, 0) for file in range(3) for i in range(10)]
    work = work_of(files, grids)
    paths = work.write(tmp_path)
    folder = os.open(tmp_path, os.O_RDONLY)
    with opened(paths) as good:
        os.truncate(paths[1], 4 * size + UNIT + 404)
        for number in range(60):
            engine = Engine(threads=8, chunk_bytes=UNIT, native=native)
            gpu = FakeGpu(8, 2, UNIT) if number % 2 else None
            fault = engine.run(work.jobs, [*good[:2], (folder, -1)], device=gpu)
            assert fault is not None
            assert (fault.kind, fault.job, fault.offset) == (FILE_ENDED, 14, 4 * size + UNIT)
            assert fault.got == 404
    os.close(folder)
    assert work.is_partly_done()


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("gap", [0, 50])
def test_of_small_jobs_read_together_the_right_one_is_told(
    native: bool, gap: int, tmp_path: Path
) -> None:
    work = neighbours(40, 64, gap=gap)
    paths = work.write(tmp_path)
    for kept in (0, 1, 64, 64 + gap, 700, 2000, 39 * (64 + gap) + 63):
        with opened(paths) as files:
            os.truncate(paths[0], kept)
            fault = Engine(native=native).run(work.jobs, files)
        assert fault is not None
        inside = kept % (64 + gap) < 64
        assert fault.job == kept // (64 + gap) + (not inside)


@pytest.mark.parametrize("native", ENGINES)
def test_a_storm_of_signals(native: bool, tmp_path: Path) -> None:
    work = neighbours(3000, 3000)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        with opened(work.write(tmp_path), direct=True) as files:
            for _ in range(3):
                work.memory[:] = 0xEE
                engine = Engine(threads=2, chunk_bytes=4096, native=native)
                assert engine.run(work.jobs, files) is None
                assert work.is_done()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen


class Stop(BaseException):
    """What a progress bar, or Ctrl-C, raises in the middle of a run."""


def gated(threads: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> tuple[FakeGpu, Any]:
    """A GPU whose copies wait until the run is being ended."""
    gate, real = threading.Event(), engines._end

    def end(run: Any) -> None:
        run.stop()
        gate.set()
        real(run)

    monkeypatch.setattr(engines, "_end", end)
    gpu = FakeGpu(threads, 2, engine.chunk_bytes, on_copy=lambda: gate.wait(30) or None)
    return gpu, gate


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("raised", [Stop, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("where", ["advance", "meanwhile"])
def test_what_is_raised_meanwhile_ends_the_run_at_once(
    native: bool,
    raised: type[BaseException],
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    engine = Engine(threads=2, chunk_bytes=UNIT, native=native)
    gpu, _ = gated(2, engine, monkeypatch)
    work = neighbours(200, UNIT)

    def fail(*_: int) -> None:
        raise raised

    options: Any = {where: fail}
    with opened(work.write(tmp_path)) as files, pytest.raises(raised):
        engine.run(work.jobs, files, device=gpu, **options)
    assert gpu.calls["copy"] <= 2 if "copy" in gpu.calls else True
    assert all(left == [] for left in gpu.pending.values()), "nothing is under way any more"
    assert gpu.events == {}
    assert work.is_partly_done()


@pytest.mark.parametrize("native", ENGINES)
def test_ctrl_c(native: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Engine(threads=2, chunk_bytes=UNIT, native=native)
    gpu, gate = gated(2, engine, monkeypatch)
    work, main = neighbours(200, UNIT), threading.main_thread().ident or 0
    copies = count()

    def on_copy() -> None:
        if next(copies) == 0:
            signal.pthread_kill(main, signal.SIGINT)
        gate.wait(30)

    gpu.on_copy = on_copy
    with opened(work.write(tmp_path)) as files, pytest.raises(KeyboardInterrupt):
        engine.run(work.jobs, files, device=gpu)
    assert gpu.calls["copy"] <= 4
    assert all(left == [] for left in gpu.pending.values())
    assert work.is_partly_done()
    assert not work.is_done()


def test_a_second_ctrl_c_does_not_let_the_threads_go_on() -> None:
    class Run:
        waits = stops = 0

        def begin(self) -> None: ...

        def stop(self) -> None:
            self.stops += 1

        def wait(self, _: float) -> tuple[bool, int]:
            self.waits += 1
            if self.waits in (2, 3):
                raise KeyboardInterrupt
            return self.waits > 5, 0

        def result(self) -> tuple[None, Stats]:
            return None, Stats()

    run = Run()
    engines._end(run)
    assert (run.waits, run.stops) == (6, 3)


@pytest.mark.parametrize("native", ENGINES)
def test_host_memory_is_not_written_after_an_error_was_raised(native: bool, tmp_path: Path) -> None:
    work = neighbours(4000, 4096)

    def fail() -> None:
        raise Stop

    with opened(work.write(tmp_path)) as files:
        for _ in range(5):
            work.memory[:] = 0xEE
            engine = Engine(threads=3, chunk_bytes=4096, native=native)
            with pytest.raises(Stop):
                engine.run(work.jobs, files, meanwhile=fail)
            left = work.memory.copy()
            other = neighbours(4000, 4096)  # time in which it would be written
            assert Engine(threads=2, native=native).run(other.jobs, files) is None
            assert np.array_equal(work.memory, left)
            assert work.is_partly_done()


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("failing", ["set_context", "create", "copy", "record", "wait"], ids=str)
@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_a_driver_that_fails(
    native: bool, direct: int, failing: str, fail_at: int, tmp_path: Path
) -> None:
    files = [noise(900_000)]
    small = [(0, i * 500, 500, 1, 500, 7, direct) for i in range(40)]
    grids = [(0, 30_000 + i * 140_000, 700, 130, 1000, 99, direct) for i in range(6)]
    work = work_of(files, small + grids)
    engine = Engine(threads=2, chunk_bytes=UNIT, native=native)
    gpu = FakeGpu(2, 2, engine.chunk_bytes, failing=failing, fail_at=fail_at)
    with opened(work.write(tmp_path), direct=True) as descriptors:
        fault = engine.run(work.jobs, descriptors, device=gpu)
    if gpu.calls.get(failing, 0) <= fail_at:  # it has not come so far
        assert fault is None
        assert work.is_done()
        return
    assert fault is not None
    assert (fault.kind, fault.code) == (FAILED_CUDA, 201 if failing == "set_context" else 700)
    assert gpu.events == {}
    assert work.is_partly_done()
    if failing not in ("record", "wait"):
        left = {stream: copies for stream, copies in gpu.pending.items() if copies}
        assert left == {}, "what was begun before the failure has been waited for"


@pytest.mark.parametrize("native", ENGINES)
def test_a_driver_that_fails_when_all_buffers_are_full(native: bool, tmp_path: Path) -> None:
    """The readers then wait for a buffer that nobody sends any more: they have to be told."""
    work = neighbours(50, UNIT)
    engine = Engine(threads=3, chunk_bytes=UNIT, native=native)
    full = threading.Event()  # it never comes: time in which the buffers are filled
    gpu = FakeGpu(3, 1, engine.chunk_bytes, failing="set_context", fail_at=0)
    gpu.on_context = lambda: full.wait(0.05) or None
    with opened(work.write(tmp_path)) as files:
        fault = engine.run(work.jobs, files, device=gpu)
    assert fault is not None
    assert (fault.kind, fault.code) == (FAILED_CUDA, 201)


@pytest.mark.parametrize("native", ENGINES)
def test_buffers_are_used_in_turn_and_not_too_early(native: bool, tmp_path: Path) -> None:
    """The fake GPU copies at the last moment: a buffer filled before that would show."""
    work = neighbours(50, UNIT)
    for depth in (1, 2, 3):
        engine = Engine(threads=2, chunk_bytes=UNIT, native=native)
        gpu = FakeGpu(2, depth, engine.chunk_bytes)
        work.memory[:] = 0xEE
        with opened(work.write(tmp_path)) as files:
            assert engine.run(work.jobs, files, device=gpu) is None
        assert work.is_done()
        assert 50 / (2 * depth) <= gpu.calls["record"] <= 50, "neighbours may go together"


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("direct", [0, 1])
def test_more_threads_than_a_word_has_bits(native: bool, direct: int, tmp_path: Path) -> None:
    """The native engine notes in one word which threads have their place in a slab."""
    work = neighbours(300, UNIT, direct=direct)
    engine = Engine(threads=70, chunk_bytes=UNIT, native=native)
    with opened(work.write(tmp_path), direct=bool(direct)) as files:
        for depth in (1, 3):
            work.memory[:] = 0xEE
            assert engine.run(work.jobs, files, device=FakeGpu(70, depth, UNIT)) is None
            assert work.is_done()


@pytest.mark.parametrize("native", ENGINES)
def test_no_jobs_and_empty_ones(native: bool) -> None:
    asked = []
    engine = Engine(native=native)
    nothing = np.zeros((0, 8), dtype=np.int64)
    assert engine.run(nothing, [], meanwhile=lambda: asked.append(1)) is None
    empty = work_of(
        [noise(10)], [(0, 0, 0, 1, 0, 0, 0), (0, 3, 0, 5, 0, 0, 1), (0, 4, 7, 0, 7, 0, 0)]
    )
    assert engine.run(empty.jobs, [(-1, -1)], meanwhile=lambda: asked.append(2)) is None
    assert asked == [1, 2]
    assert engine.stats == Stats()


@pytest.mark.parametrize("native", ENGINES)
def test_threads_end_with_the_run(native: bool, tmp_path: Path) -> None:
    work = neighbours(100, 4096)
    with opened(work.write(tmp_path)) as files:
        before, known = len(os.listdir("/proc/self/task")), threading.active_count()
        for _ in range(20):
            assert Engine(threads=8, chunk_bytes=4096, native=native).run(work.jobs, files) is None
        assert threading.active_count() == known
        if native:  # the system's view of Python's threads lags behind
            assert len(os.listdir("/proc/self/task")) <= before


@pytest.mark.parametrize(
    "spoilt", [{"threads": 0}, {"chunk_bytes": 4095}, {"gap_bytes": -1}], ids=str
)
@pytest.mark.skipif(not native_engine(), reason="not built")
def test_the_native_engine_checks_what_it_is_given(spoilt: dict[str, int]) -> None:
    work = neighbours(1, 10)
    options: Any = {"native": True, **spoilt}
    with pytest.raises(ValueError, match="out of range"):
        Engine(**options).run(work.jobs, [(-1, -1)])


@pytest.mark.skipif(not native_engine(), reason="not built")
def test_results_are_for_runs_that_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    native: Any = native_engine()
    for call in (native.stop, native.result, lambda x: native.wait(x, 0.0)):
        with pytest.raises((TypeError, ValueError)):
            call(object())


def test_which_engine_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADING_ENGINE", raising=False)
    built = native_engine() is not None
    assert Engine().native == built
    monkeypatch.setenv("LADING_ENGINE", "python")
    assert native_engine() is None
    assert not Engine().native
    for value in ("foo", "Python", "0", " "):
        monkeypatch.setenv("LADING_ENGINE", value)
        with pytest.raises(CallError) as error:
            Engine()
        fact = f"is {value!r}, needs 'native' or 'python', or to be unset."
        assert str(error.value) == f"LADING_ENGINE: {fact}"
    if built:
        monkeypatch.setenv("LADING_ENGINE", "native")
        assert Engine().native
    monkeypatch.delenv("LADING_ENGINE")
    monkeypatch.setitem(sys.modules, "lading.transport._engine", None)  # as if it were not built
    monkeypatch.delattr(sys.modules["lading.transport"], "_engine", raising=False)
    assert native_engine() is None
    assert not Engine().native
    monkeypatch.setenv("LADING_ENGINE", "")
    assert not Engine().native
    monkeypatch.setenv("LADING_ENGINE", "native")
    with pytest.raises(CallError, match=r"is 'native', and the native engine cannot be imported"):
        native_engine()


SOURCE = Path(lading.__file__).parent / "transport" / "_engine.c"


def compiler() -> str | None:
    from shutil import which

    found = (sysconfig.get_config_var("CC") or "cc").split()[0]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return which(found) if header.exists() and SOURCE.exists() else None


@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("direct", [0, 1])
def test_memory_that_nobody_has_touched(native: bool, direct: int, tmp_path: Path) -> None:
    """Large, new, and not at the start of a page; what is beside it in its pages stays."""
    size, at = 3 << 20, BLOCK_BYTES + 64
    room = mmap.mmap(-1, size + 3 * BLOCK_BYTES)
    memory = np.frombuffer(room, dtype=np.uint8)
    memory[:at], memory[at + size :] = 7, 9
    path, data = tmp_path / "x.bin", noise(size)
    path.write_bytes(data.tobytes())
    fd = os.open(path, os.O_RDONLY)
    try:
        jobs = np.array([[0, 0, memory.ctypes.data + at, size, 1, size, size, direct]])
        fault = Engine(threads=2, chunk_bytes=1 << 20, native=native).run(jobs, [(fd, -1)])
    finally:
        os.close(fd)
    assert fault is None
    assert np.array_equal(memory[at : at + size], data)
    assert (memory[:at] == 7).all()
    assert (memory[at + size :] == 9).all()


@pytest.mark.skipif(compiler() is None, reason="no C compiler, or not the sources")
def test_the_source_is_short_and_compiles_without_a_word(tmp_path: Path) -> None:
    assert len(SOURCE.read_text().splitlines()) < 600
    done = subprocess.run(
        [
            *(compiler() or "", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC"),
            *("-pthread", "-shared", f"-I{sysconfig.get_path('include')}", str(SOURCE)),
            *("-o", str(tmp_path / "_engine.so")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# the layout that launch of _engine.c has as words
def test_the_copy_of_two_dims_is_laid_out_as_cuda_h_has_it() -> None:
    from .made import _Copy2d

    assert ctypes.sizeof(_Copy2d) == 128
    assert _Copy2d.dst_device.offset == 88
    assert _Copy2d.width.offset == 112
