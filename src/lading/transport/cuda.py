"""A CUDA device as the engine sees it: page-locked buffers, streams, and the driver's functions.

The driver's library is asked, not the runtime's: it has one name and one stable interface wherever
a GPU works, while each build of torch brings a runtime of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch

from lading import writing
from lading.errors import DeviceError
from lading.transport.engine import BLOCK_BYTES
from lading.transport.residency import HugePages

__all__ = ["Gpu", "Gpus", "cuda_problem", "release_pinned"]

DRIVER = "libcuda.so.1"
FUNCTIONS = (
    "cuCtxSetCurrent",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuEventDestroy_v2",
)
HUGE_PAGE_BYTES = 2**21
NUM_STREAMS = 1


def _driver() -> Any:
    try:
        return ctypes.CDLL(DRIVER)
    except OSError as error:
        raise DeviceError(f"cannot be loaded: {error}", subject=DRIVER) from None


class Gpu:
    """Page-locked buffers and streams for `threads` threads; a context manager, which unlocks them.

    depth          buffers of each thread: one is filled while the others are copied
    buffer_bytes   of each
    """

    def __init__(
        self, device: torch.device, *, threads: int, depth: int, buffer_bytes: int
    ) -> None:
        self.threads, self.depth = threads, depth
        self.buffer_bytes = -(-buffer_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._device = device
        self._driver = _driver()
        with torch.cuda.device(device):
            self._streams = [torch.cuda.Stream(device) for _ in range(NUM_STREAMS)]  # type: ignore[no-untyped-call]
        self.follow()
        self.streams: Sequence[int] = [stream.cuda_stream for stream in self._streams]
        self.table: Sequence[int] = [*map(self._address, FUNCTIONS), self._context()]
        self._first, self._locked = 0, False
        self._memory = self._lock(threads * depth * self.buffer_bytes)
        self.addresses: Sequence[int] = [
            self._first + i * self.buffer_bytes for i in range(threads * depth)
        ]

    @staticmethod
    def bytes_for(num_buffers: int, buffer_bytes: int) -> int:
        """What so many buffers take."""
        return num_buffers * (-(-buffer_bytes // BLOCK_BYTES) * BLOCK_BYTES)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked memory in all."""
        return len(self.addresses) * self.buffer_bytes

    def follow(self) -> None:
        """What is copied from now on comes after what the current stream was given before: the
        memory of the parameters may still be in use by it.
        """
        before = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            stream.wait_stream(before)

    def close(self) -> None:
        """Unlocks the buffers. Nothing may be copied from them any more."""
        if self._locked:
            self._locked = False
            for stream in self._streams:
                with contextlib.suppress(RuntimeError):  # of a GPU that has failed
                    stream.synchronize()
            self._driver.cuMemHostUnregister(ctypes.c_void_p(self._first))
        self._memory = None

    def __enter__(self) -> Gpu:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self, num_bytes: int) -> torch.Tensor | None:
        """Memory in huge pages, locked: a tenth of the time that locking small pages takes."""
        memory = torch.empty(num_bytes + HUGE_PAGE_BYTES, dtype=torch.uint8, device="cpu")
        address = writing.address(memory)
        assert address is not None, "a new tensor is dense"
        self._first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        HugePages().use(self._first, num_bytes)
        with torch.cuda.device(self._device):
            torch.cuda.current_stream(self._device).query()  # the device's context is current
            code = self._driver.cuMemHostRegister_v2(
                ctypes.c_void_p(self._first), ctypes.c_size_t(num_bytes), 1
            )
        if code:
            raise cuda_problem(code, f"cannot lock {num_bytes} bytes of host memory")
        self._locked = True
        return memory

    def _address(self, function: str) -> int:
        return ctypes.cast(getattr(self._driver, function), ctypes.c_void_p).value or 0

    def _context(self) -> int:
        context = ctypes.c_void_p()
        with torch.cuda.device(self._device):
            torch.cuda.current_stream(self._device).query()
            code = self._driver.cuCtxGetCurrent(ctypes.byref(context))
        if code or not context.value:
            raise cuda_problem(code, "has no context")
        return context.value


class Gpus:
    """Page-locked memory for each GPU that a load writes to: a context manager, which keeps it for
    the next load of this process, or unlocks it where the load has failed. Locking takes 20 ms, and
    unlocking holds up whatever the GPU is asked for next.

    threads, depth, buffer_bytes   of each GPU, as `Gpu` takes them
    pinned_bytes   the most that one GPU may take; there are fewer threads where it is little
    """

    def __init__(self, *, threads: int, depth: int, buffer_bytes: int, pinned_bytes: int) -> None:
        while threads > 1 and Gpu.bytes_for(threads * depth, buffer_bytes) > pinned_bytes:
            threads -= 1
        self._threads, self._depth, self._buffer_bytes = threads, depth, buffer_bytes
        self._futures: dict[torch.device, Future[Gpu]] = {}
        self._used: set[torch.device] = set()

    def begin(self, device: torch.device) -> None:
        """Begins to lock memory on another thread: a load has other things to do meanwhile."""
        if device in self._futures:
            return
        future: Future[Gpu] = Future()
        self._futures[device] = future
        shape = (self._threads, self._depth, Gpu.bytes_for(1, self._buffer_bytes))
        kept = _kept.take(device)
        if kept is not None and (kept.threads, kept.depth, kept.buffer_bytes) == shape:
            future.set_result(kept)
            return

        def lock() -> None:
            try:
                if kept is not None:
                    kept.close()
                gpu = Gpu(
                    device,
                    threads=self._threads,
                    depth=self._depth,
                    buffer_bytes=self._buffer_bytes,
                )
                future.set_result(gpu)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=lock, daemon=True).start()

    def ready(self, device: torch.device) -> Gpu:
        """Raises a DeviceError where the memory cannot be locked."""
        self.begin(device)
        self._used.add(device)
        return self._futures[device].result()

    def __enter__(self) -> Gpus:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        futures, self._futures = self._futures, {}
        for device in self._used if kind is None else ():
            future = futures.pop(device)
            if future.exception() is None:
                _kept.put(device, future.result())

        def unlock() -> None:
            for future in futures.values():
                if future.exception() is None:
                    future.result().close()

        if futures:  # nobody waits for it; an interpreter that ends does
            threading.Thread(target=unlock).start()


class _Kept:
    """What the last load on each GPU has left for the next one of this process."""

    def __init__(self) -> None:
        self._gpus: dict[torch.device, Gpu] = {}
        self._lock = threading.Lock()

    def take(self, device: torch.device) -> Gpu | None:
        """What is kept for a GPU: the caller's from now on."""
        with self._lock:
            return self._gpus.pop(device, None)

    def put(self, device: torch.device, gpu: Gpu) -> None:
        """Keeps it, and unlocks what a load on another thread has left in the meantime."""
        with self._lock:
            before = self._gpus.pop(device, None)
            self._gpus[device] = gpu
        if before is not None:
            before.close()

    def close(self) -> None:
        """Unlocks all."""
        with self._lock:
            gpus, self._gpus = self._gpus, {}
        for gpu in gpus.values():
            gpu.close()


_kept = _Kept()


def release_pinned() -> None:
    """Unlocks the page-locked memory that loads have left for the next one: 56 MiB a GPU, unless
    their `Limits` said less.
    """
    _kept.close()


atexit.register(release_pinned)
# Writing to memory that a child shares gives the writer another page, on older kernels also where
# it is locked: the GPU would go on reading the first one.
os.register_at_fork(before=release_pinned)


def cuda_problem(code: int, fact: str) -> DeviceError:
    """What the driver's return code says in its own words."""
    words = ctypes.c_char_p()
    _driver().cuGetErrorString(code, ctypes.byref(words))
    text = words.value.decode() if words.value else f"error {code}"
    return DeviceError(f"{fact}: {text}", subject="the GPU")
