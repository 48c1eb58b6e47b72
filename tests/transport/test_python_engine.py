"""What only the engine in Python shows: its units, and threads that cannot be started or fail."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.transport import python_engine
from lading.transport.engine import NO_MEMORY, Engine, Fault
from lading.transport.python_engine import MAX_SEGMENTS, units

from .made import Work, neighbours, noise, opened, work_of, works


def bytes_of(work: Work, unit: tuple[int, int, int, int]) -> list[tuple[int, int]]:
    """(job, byte of its runs laid end to end) of a unit, byte by byte."""
    first, last, begin, end = unit
    if first == last:
        return [(first, at) for at in range(begin, end)]
    assert begin == 0
    return [(k, at) for k in range(first, last + 1) for at in range(work.table[k][3])]


@settings(max_examples=20, deadline=None)
@given(
    work=works(), chunk=st.sampled_from([4096, 6000, 1 << 20]), gap=st.sampled_from([0, 64, 2048])
)
def test_each_byte_is_in_one_unit_that_is_not_too_long(work: Work, chunk: int, gap: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    found = list(units(work.jobs, chunk, gap))
    for unit in found:
        first, last, begin, end = unit
        have = bytes_of(work, unit)
        assert 0 < len(have) <= chunk
        seen.update(have)
        _, offset, _, run, rows, stride, _, direct = work.table[first]
        if first < last:
            assert {work.table[k][4] for k in range(first, last + 1)} == {1}
            assert len({(work.table[k][0], work.table[k][7]) for k in range(first, last + 1)}) == 1
            assert work.table[last][1] + work.table[last][3] - offset <= chunk
            assert last - first < MAX_SEGMENTS // 2
        elif direct:  # the whole span passes through one buffer
            span = (end - 1) // run * stride + (end - 1) % run - begin // run * stride - begin % run
            assert span + 1 <= chunk
        if run > chunk or (direct and rows > 1 and stride > chunk):
            assert begin // run == (end - 1) // run, "a piece of one long row"
    needed = [(k, at) for k, row in enumerate(work.table) for at in range(row[3] * row[4])]
    assert seen == Counter(needed)
    assert found == sorted(found), "in order"


def test_an_empty_job_takes_no_others_with_it() -> None:
    work = work_of(
        [noise(100)], [(0, 0, 0, 1, 0, 0, 0), (0, 0, 8, 1, 8, 0, 0), (0, 8, 0, 3, 0, 0, 1)]
    )
    assert list(units(work.jobs, 4096, 64)) == [(1, 1, 0, 8)]


class NoThreads(threading.Thread):
    """A system that has threads for so many."""

    left = 0

    def start(self) -> None:
        if not NoThreads.left:
            raise RuntimeError("can't start new thread")
        NoThreads.left -= 1
        super().start()


@pytest.mark.parametrize("num_threads", [0, 1, 2])
def test_a_system_without_threads(
    num_threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = neighbours(20, 4096)
    monkeypatch.setattr(python_engine.threading, "Thread", NoThreads)
    NoThreads.left = num_threads
    with opened(work.write(tmp_path)) as files:
        fault = Engine(threads=4, chunk_bytes=4096, native=False).run(work.jobs, files)
    if num_threads:
        assert fault is None
        assert work.is_done()
    else:
        assert fault == Fault(kind=NO_MEMORY, code=errno.EAGAIN, job=0, offset=0, wanted=0, got=0)


def test_an_error_of_its_own_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = python_engine._Worker.move, []

    def move(self: Any, unit: Any) -> None:
        calls.append(unit)
        if len(calls) == 3:
            raise ZeroDivisionError("of all things")
        real(self, unit)

    monkeypatch.setattr(python_engine._Worker, "move", move)
    work = neighbours(20, 4096)
    with opened(work.write(tmp_path)) as files, pytest.raises(ZeroDivisionError):
        Engine(threads=1, chunk_bytes=4096, native=False).run(work.jobs, files)
    assert len(calls) == 3
    assert work.is_partly_done()


class Late(threading.Thread):
    """A system on which Ctrl-C comes while the second thread is started; that begins afterwards."""

    made: list[threading.Thread]

    def start(self) -> None:
        Late.made.append(self)
        if len(Late.made) == 2:
            raise KeyboardInterrupt
        super().start()


def test_a_thread_that_begins_after_the_end_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Late.made = []
    work = neighbours(400, 4096)
    monkeypatch.setattr(python_engine.threading, "Thread", Late)
    taken: list[threading.Thread] = []
    take = python_engine.PythonRun.take

    def noted(self: Any) -> Any:
        taken.append(threading.current_thread())
        return take(self)

    monkeypatch.setattr(python_engine.PythonRun, "take", noted)
    with opened(work.write(tmp_path)) as files, pytest.raises(KeyboardInterrupt):
        Engine(threads=4, chunk_bytes=4096, native=False).run(work.jobs, files)
    first, late = Late.made
    assert not first.is_alive()
    threading.Thread.start(late)
    late.join()
    assert late not in taken
    assert work.is_partly_done()
