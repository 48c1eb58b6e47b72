"""Moves bytes from files through host memory: straight into a parameter where both ends are
contiguous, through one bounded staging buffer otherwise.

A region of a file is read in blocks that fit the buffer. Within a block either the whole span from
its first to its last byte is read, gaps included, or each run of neighbouring bytes by itself,
whichever the cost model says is cheaper; what is read in excess is counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch

from lading import dtypes, writing
from lading.checkpoint import Reader, Source
from lading.errors import CheckpointError, ConflictError, DtypeError, FileError, LadingError
from lading.layouts import PartName
from lading.plan import Check, Plan, Share, Tie
from lading.regions import Copy, Region, reordered
from lading.specs import Constant

__all__ = ["DEFAULT_STAGING_BYTES", "HostTransport", "Moved"]

DEFAULT_STAGING_BYTES = 8 * 2**20
"""Small enough to stay in the cache between the read and the strided copy out of it."""

DIRECT_CHUNK_BYTES = 64 * 2**20
"""Progress is reported at least this often."""

SECONDS_PER_READ = 3e-6
SECONDS_PER_BYTE = 1 / 5e9
"""The cost of a call and of a byte from the page cache (benchmarks/README.md, "cost model")."""

Advance = Callable[[int], None]


@dataclass(slots=True)
class Moved:
    """What was moved for one rank, in bytes.

    received_bytes, given_bytes   of what other ranks read for this one; read, but only for others
    """

    read_bytes: int = 0
    kept_bytes: int = 0
    num_copies: int = 0
    received_bytes: int = 0
    given_bytes: int = 0

    @property
    def excess_bytes(self) -> int:
        """Read, but kept by nobody: gaps between the runs of row cuts."""
        return self.read_bytes + self.received_bytes - self.kept_bytes - self.given_bytes


MAX_THREADS = 4
"""More threads than this gain nothing from the page cache (benchmarks/README.md)."""


class _Thread(threading.local):
    staging: torch.Tensor | None = None


@dataclass(slots=True)
class HostTransport:
    """Executes one rank's share of a plan.

    reader          serves the checkpoint's bytes
    staging_bytes   the largest block that each thread holds besides the parameters
    num_threads     threads that read; by default as many as torch computes with, 4 at most
    """

    reader: Reader
    staging_bytes: int = DEFAULT_STAGING_BYTES
    num_threads: int = field(default_factory=lambda: min(torch.get_num_threads(), MAX_THREADS))
    moved: Moved = field(default_factory=Moved)
    _thread: _Thread = field(default_factory=_Thread)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compare(self, plan: Plan, share: Share) -> None:
        """All that can be found wrong before anything is written: files, constants, tied twins."""
        for copy in {plan.sources[copy.source].file: copy for copy in share.copies}.values():
            source = plan.sources[copy.source]
            with located(source, copy.target, copy.part):  # it is there, and what it was
                self.reader.read_into(source, 0, memoryview(bytearray(min(1, source.num_bytes))))
        for check in plan.checks():
            with located(plan.sources[check.source], check.target, None):
                self._check(plan.sources[check.source], check)
        for tie in plan.ties:
            self._compare(plan, share, tie)

    def run(
        self, plan: Plan, share: Share, tensors: Mapping[str, torch.Tensor], advance: Advance
    ) -> Moved:
        """Fills the tensors, by target name. `advance` is told kept bytes as they arrive.

        Call `compare` before. Raises the error of the first copy, in file order, that failed; what
        was not begun by then is left out, and nothing is written after this has returned.
        """
        for fill in share.fills:
            with torch.inference_mode(tensors[fill.target].is_inference()):
                writing.fill(tensors[fill.target], fill.region)
        order = sorted(share.copies, key=lambda copy: position(plan.sources[copy.source], copy))
        stop = threading.Event()

        def work(copy: Copy) -> None:
            if stop.is_set():
                return
            source, target = plan.sources[copy.source], tensors[copy.target]
            try:
                with (
                    located(source, copy.target, copy.part),
                    torch.inference_mode(target.is_inference()),
                ):
                    self._copy(source, copy, target, advance)
            except BaseException:
                stop.set()
                raise
            with self._lock:
                self.moved.num_copies += 1

        pool = ThreadPoolExecutor(max(1, self.num_threads))
        try:
            futures: list[Future[None]] = [pool.submit(work, copy) for copy in order]
            pool.shutdown()
        except BaseException:  # Ctrl-C: the threads still write, and read from open files
            stop.set()
            pool.shutdown()
            raise
        for future in futures:
            future.result()
        return self.moved

    def _copy(self, source: Source, copy: Copy, target: torch.Tensor, advance: Advance) -> None:
        dtype = dtypes.to_torch(source.dtype)
        size = _element_bytes(source)
        runs = copy.source_region.runs()
        if runs.num_runs == 1 and not copy.axes and dtype == target.dtype:
            memory = writing.memory(target, copy.target_region)
            if memory is not None:
                self._read_straight(source, runs.first * size, memory, advance)
                return
        for inner in blocks(copy.source_region, self.staging_bytes // size):
            values = self._block(source, copy.source_region.compose(inner), dtype)
            values = writing.permuted(values, copy)
            writing.check_values(values, target.dtype)
            into = reordered(inner, copy.axes) if copy.axes else inner
            writing.write(target, copy.target_region.compose(into), values)
            self._kept(inner.num_elements * size, advance)

    def _read_straight(
        self, source: Source, offset: int, memory: memoryview, advance: Advance
    ) -> None:
        for at in range(0, memory.nbytes, DIRECT_CHUNK_BYTES):
            piece = memory[at : at + DIRECT_CHUNK_BYTES]
            self._read(source, offset + at, piece)
            self._kept(piece.nbytes, advance)

    def _kept(self, num_bytes: int, advance: Advance) -> None:
        with self._lock:
            self.moved.kept_bytes += num_bytes
            advance(num_bytes)

    def _read(self, source: Source, offset: int, buffer: memoryview) -> None:
        self.reader.read_into(source, offset, buffer)
        with self._lock:
            self.moved.read_bytes += buffer.nbytes

    def _block(self, source: Source, region: Region, dtype: torch.dtype) -> torch.Tensor:
        """The values of a region that fits the staging buffer, valid until the next call."""
        size = _element_bytes(source)
        runs = region.runs()
        strides = _strides(region)
        span = _span(region)
        gaps = span - region.num_elements
        staging = self._staging_for(span * size)
        whole = memoryview(staging.numpy())  # type: ignore[arg-type]  # ndarrays have a buffer
        if runs.num_runs == 1 or gaps * size * SECONDS_PER_BYTE < runs.num_runs * SECONDS_PER_READ:
            self._read(source, runs.first * size, whole[: span * size])
            return staging[: span * size].view(dtype).as_strided(region.size, strides)
        length = runs.length * size
        for number, first in enumerate(runs.offsets()):
            self._read(source, first * size, whole[number * length : (number + 1) * length])
        return staging[: region.num_elements * size].view(dtype).view(region.size)

    def _staging_for(self, num_bytes: int) -> torch.Tensor:
        staging = self._thread.staging
        if staging is None or staging.numel() < num_bytes:
            size = max(num_bytes, self.staging_bytes)
            staging = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._thread.staging = staging
        return staging

    def _check(self, source: Source, check: Check) -> None:
        """Raises a ShapeError or CheckpointError where a constant is not what it has to be."""
        dtype, size = dtypes.to_torch(source.dtype), _element_bytes(source)
        whole = Region.whole((source.num_bytes // size,))
        unordered = check.constant is Constant.GROUP_INDEX  # all zeros is how some tools say it
        first: CheckpointError | None = None
        for region in blocks(whole, self.staging_bytes // size):
            found = self._block(source, region, dtype)
            needed = _needed_values(check, region.start[0], region.size[0]).to(found.dtype)
            wrong = torch.nonzero(found != needed)
            unordered = unordered and not bool(found.any())
            if len(wrong) and first is None:
                at = int(wrong[0])
                first = CheckpointError(
                    f"checkpoint tensor {source.name!r} has {found[at].item()} at "
                    f"{region.start[0] + at}, needs {needed[at].item()} "
                    f"({_REASONS[check.constant]})",
                    subject=check.target,
                    file=source.file,
                )
            if first is not None and not unordered:
                raise first

    def _compare(self, plan: Plan, share: Share, tie: Tie) -> None:
        """Raises a ConflictError where a tied parameter's two tensors differ in this rank's
        share.
        """
        one, two = plan.sources[tie.source], plan.sources[tie.twin]
        dtype, size = dtypes.to_torch(one.dtype), _element_bytes(one)
        for copy in share.copies:
            if copy.source != tie.source:
                continue
            for inner in blocks(copy.source_region, self.staging_bytes // size):
                region = copy.source_region.compose(inner)
                with located(one, copy.target, copy.part):
                    first = self._block(one, region, dtype).clone()
                with located(two, copy.target, copy.part):
                    second = self._block(two, region, dtype)
                if not writing.same_bits(first, second):
                    raise ConflictError(
                        f"is tied, but checkpoint tensors {one.name!r} and {two.name!r} differ "
                        f"in {region}",
                        subject=tie.target,
                        file=two.file,
                    )


_REASONS = {
    Constant.SHAPE: "the sizes of the declared layer",
    Constant.GROUP_INDEX: "groups in order, as the config declares",
    Constant.ZERO: "the model declares no such tensor, so it may only be zero",
}


@contextmanager
def located(source: Source, target: str, part: PartName) -> Iterator[None]:
    """Says in whatever is raised which parameter, checkpoint tensor and file it is about."""
    try:
        yield
    except FileError as error:  # of the file alone
        raise FileError(
            f"checkpoint tensor {source.name!r} cannot be read: the file {error.fact}",
            subject=target,
            part=part,
            file=source.file,
            hint=error.hint,
        ) from error
    except DtypeError as error:
        raise DtypeError(
            f"checkpoint tensor {source.name!r}: {error.fact}",
            subject=target,
            part=part,
            file=source.file,
        ) from None
    except LadingError as error:
        raise error.located(subject=target, part=part, file=source.file) from None


def _needed_values(check: Check, start: int, size: int) -> torch.Tensor:
    """The values of a constant from element `start` on."""
    with torch.device("cpu"):  # whatever the caller's default is
        if check.constant is Constant.SHAPE:
            return torch.tensor(check.numbers)[start : start + size]
        if check.constant is Constant.GROUP_INDEX:
            return torch.arange(start, start + size) // check.numbers[1]
        return torch.zeros(size)


def position(source: Source, copy: Copy) -> tuple[str, int]:
    """The file of a copy's first element, and its byte there: the order in which files are read."""
    return source.file, source.offset_bytes + copy.source_region.runs().first * _element_bytes(
        source
    )


def _element_bytes(source: Source) -> int:
    """Bytes of one stored element; one for F4, of which two share a byte."""
    return dtypes.storage_bytes(source.dtype)


def _strides(region: Region) -> tuple[int, ...]:
    """Elements from one index of the region to the next, along each dim."""
    return tuple(prod(region.shape[dim + 1 :]) * step for dim, step in enumerate(region.step))


def _span(region: Region) -> int:
    """Elements from the region's first to its last, gaps included."""
    if not region.num_elements:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(region.size, _strides(region), strict=True))


def blocks(region: Region, limit: int) -> Iterator[Region]:
    """Cuts a region, in its own coordinates, into boxes whose span is at most `limit` elements."""
    yield from _split(region, Region.whole(region.size), max(limit, 1), 0)


def _split(region: Region, inner: Region, limit: int, dim: int) -> Iterator[Region]:
    if not inner.num_elements:
        return
    if dim == len(inner.size) or _span(region.compose(inner)) <= limit:
        yield inner
        return
    stride = _strides(region)[dim]
    rest = _span(region.compose(_narrowed(inner, dim, 0, 1)))
    count = max(1, (limit - rest) // stride + 1) if rest <= limit else 1
    for at in range(0, inner.size[dim], count):
        box = _narrowed(inner, dim, at, min(count, inner.size[dim] - at))
        yield from _split(region, box, limit, dim + 1) if rest > limit else (box,)


def _narrowed(box: Region, dim: int, at: int, size: int) -> Region:
    return Region(
        shape=box.shape,
        start=(*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :]),
        size=(*box.size[:dim], size, *box.size[dim + 1 :]),
        step=box.step,
    )
