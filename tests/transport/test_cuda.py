"""Page-locked memory and the driver's functions; with a driver of this file's own, and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lading.errors import DeviceError
from lading.transport import cuda
from lading.transport.cuda import Gpu, Gpus, cuda_problem, release_pinned
from lading.transport.engine import Engine

from .made import ENGINES, neighbours, opened

DEVICE = torch.device("cuda", 0)


class Driver:
    """What is asked of libcuda. `locked` has the memory that is page-locked now."""

    def __init__(self, *, fails: bool = False) -> None:
        self.locked: dict[int, int] = {}
        self.most_bytes = 0
        self._fails = fails
        kind = ctypes.CFUNCTYPE(ctypes.c_int)
        for number, name in enumerate(cuda.FUNCTIONS):
            setattr(self, name, kind(lambda number=number: number))

    def cuMemHostRegister_v2(self, address: Any, size: Any, flags: int) -> int:
        if self._fails:
            return 2
        assert flags == 1, "for all contexts"
        self.locked[address.value] = size.value
        self.most_bytes = max(self.most_bytes, sum(self.locked.values()))
        return 0

    def cuMemHostUnregister(self, address: Any) -> int:
        del self.locked[address.value]
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = 4321
        return 0

    def cuGetErrorString(self, code: int, words: Any) -> int:
        words._obj.value = {2: b"out of memory"}.get(code)
        return 0


class Stream:
    """A stream of torch; `after` has those that it waits for."""

    made = 0

    def __init__(self, *_: object) -> None:
        Stream.made += 1
        self.cuda_stream, self.after = 100 + Stream.made, 0

    def wait_stream(self, _other: object) -> None:
        self.after += 1

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: found)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    return found


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_kept", cuda._Kept())


def settle() -> None:
    """Memory of a load that failed is unlocked by a thread that nobody waits for."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def test_buffers_lie_apart_in_locked_memory(driver: Driver) -> None:
    with Gpu(DEVICE, threads=3, depth=2, buffer_bytes=5000) as gpu:
        assert gpu.threads == 3
        assert gpu.buffer_bytes == 8192
        assert len(gpu.addresses) == 6
        assert gpu.pinned_bytes == 6 * 8192 == Gpu.bytes_for(6, 5000)
        ((first, size),) = driver.locked.items()
        assert first % cuda.HUGE_PAGE_BYTES == 0
        for one, two in zip(gpu.addresses, [*gpu.addresses[1:], first + size], strict=True):
            assert one % 4096 == 0
            assert two - one == 8192
        memory = (ctypes.c_char * size).from_address(first)
        memory[0], memory[size - 1] = b"a", b"z"  # it is there
        assert len(gpu.streams) == len(set(gpu.streams)) >= 1
        assert gpu.table[-1] == 4321
        functions = [ctypes.CFUNCTYPE(ctypes.c_int)(address) for address in gpu.table[:-1]]
        assert [function() for function in functions] == list(range(len(cuda.FUNCTIONS)))
    assert driver.locked == {}
    gpu.close()  # once more does nothing


def test_copies_come_after_what_the_current_stream_was_given(driver: Driver) -> None:
    with Gpu(DEVICE, threads=2, depth=1, buffer_bytes=4096) as gpu:
        before = [stream.after for stream in gpu._streams]
        gpu.follow()
        assert [stream.after for stream in gpu._streams] == [count + 1 for count in before]


def test_memory_that_cannot_be_locked(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_driver", lambda: Driver(fails=True))
    with pytest.raises(DeviceError) as caught:
        Gpu(DEVICE, threads=2, depth=1, buffer_bytes=4096)
    assert str(caught.value) == "the GPU: cannot lock 8192 bytes of host memory: out of memory."
    with Gpus(threads=2, depth=1, buffer_bytes=4096, pinned_bytes=1 << 20) as gpus:
        for _ in range(2):
            with pytest.raises(DeviceError, match="cannot lock 8192 bytes"):
                gpus.ready(DEVICE)
    settle()


@pytest.mark.parametrize(
    ("limit", "threads"), [(1 << 20, 16), (16 * 8192, 8), (3 * 8192, 1), (100, 1)]
)
def test_no_more_is_locked_than_allowed(driver: Driver, limit: int, threads: int) -> None:
    with Gpus(threads=16, depth=2, buffer_bytes=8192, pinned_bytes=limit) as gpus:
        gpus.begin(DEVICE)
        gpu = gpus.ready(DEVICE)
        assert gpus.ready(DEVICE) is gpu
        assert gpu.threads == threads
        assert driver.most_bytes <= max(limit, 2 * 8192)
    assert sum(driver.locked.values()) == gpu.pinned_bytes, "kept for the next load"
    release_pinned()
    assert driver.locked == {}
    release_pinned()  # once more does nothing


def test_the_next_load_has_the_memory_of_the_last(driver: Driver) -> None:
    def load(threads: int = 2) -> Gpu:
        with Gpus(threads=threads, depth=1, buffer_bytes=5000, pinned_bytes=1 << 20) as gpus:
            return gpus.ready(DEVICE)

    first = load()
    assert load() is first
    second = load(threads=3)
    assert second is not first, "it has another shape"
    assert sum(driver.locked.values()) == second.pinned_bytes, "never both"
    other = torch.device("cuda", 1)
    with Gpus(threads=3, depth=1, buffer_bytes=5000, pinned_bytes=1 << 20) as gpus:
        third = gpus.ready(other)
    assert third is not second, "each GPU has its own"
    assert load(threads=3) is second
    release_pinned()
    assert driver.locked == {}
    assert load(threads=3) is not second


def test_after_a_failure_nothing_is_kept(driver: Driver) -> None:
    def load() -> None:
        with Gpus(threads=2, depth=1, buffer_bytes=4096, pinned_bytes=1 << 20) as gpus:
            gpus.ready(DEVICE)
            raise RuntimeError("of the load")

    with pytest.raises(RuntimeError, match="of the load"):
        load()
    settle()
    assert driver.locked == {}


def test_two_loads_at_once_leave_one_memory(driver: Driver) -> None:
    def gpus() -> Gpus:
        return Gpus(threads=2, depth=1, buffer_bytes=4096, pinned_bytes=1 << 20)

    with gpus() as one, gpus() as two:
        assert one.ready(DEVICE) is not two.ready(DEVICE)
        assert len(driver.locked) == 2
    assert len(driver.locked) == 1


def test_nothing_is_kept_over_a_fork(driver: Driver) -> None:
    with Gpus(threads=2, depth=1, buffer_bytes=4096, pinned_bytes=1 << 20) as gpus:
        gpus.ready(DEVICE)
    assert len(driver.locked) == 1
    if not (child := os.fork()):
        os._exit(len(driver.locked))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert driver.locked == {}


def test_memory_of_a_gpu_that_was_not_written_to_is_unlocked(driver: Driver) -> None:
    with Gpus(threads=2, depth=1, buffer_bytes=4096, pinned_bytes=1 << 20) as gpus:
        gpus.begin(DEVICE)
    settle()
    assert driver.locked == {}


def test_loads_that_end_together_lose_nothing(driver: Driver) -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    kept = cuda._kept
    try:
        for _ in range(200):
            made = [Gpu(DEVICE, threads=1, depth=1, buffer_bytes=4096) for _ in range(4)]
            threads = [threading.Thread(target=kept.put, args=(DEVICE, gpu)) for gpu in made]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(driver.locked) == 1
    finally:
        sys.setswitchinterval(before)


def test_words_of_the_driver(driver: Driver) -> None:
    assert str(cuda_problem(2, "is full")) == "the GPU: is full: out of memory."
    assert str(cuda_problem(999, "is full")) == "the GPU: is full: error 999."


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER", "libnosuchdriver.so.1")
    with pytest.raises(DeviceError) as caught:
        cuda._driver()
    assert str(caught.value).startswith("libnosuchdriver.so.1: cannot be loaded: ")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("native", ENGINES)
@pytest.mark.parametrize("direct", [0, 1])
def test_on_a_gpu(native: bool, direct: int, tmp_path: Path) -> None:
    work = neighbours(40, 100_000, gap=3000, direct=direct)
    memory = torch.full((len(work.needed),), 0xEE, dtype=torch.uint8, device="cuda")
    jobs = work.jobs
    jobs[:, 2] += memory.data_ptr() - work.memory.ctypes.data
    engine = Engine(chunk_bytes=1 << 16, native=native)
    with (
        Gpu(memory.device, threads=3, depth=2, buffer_bytes=1 << 16) as gpu,
        opened(work.write(tmp_path), direct=True) as files,
    ):
        gpu.follow()
        assert engine.run(jobs, files, device=gpu) is None
    assert np.array_equal(memory.cpu().numpy(), work.needed)
