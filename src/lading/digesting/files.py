"""Digests of files: of a checkpoint's own, and of the files of a pre-sharded folder, each as it is.

Tensors are read in blocks, by a few threads. No torch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lading import dtypes
from lading.checkpoint import Checkpoint, Reader, Source
from lading.digesting.report import DigestReport, Held, sums_by_tensor, value_of
from lading.digests.sums import Sums, num_stored, row_bytes, sums_of
from lading.regions import Copy, Region, reordered
from lading.routes import holdings, pieces
from lading.shards.files import rank_file
from lading.shards.folder import Sharded, is_sharded, open_any, open_sharded
from lading.shards.held import RankDifference, differing_ranks

__all__ = [
    "copy_sums_of_file",
    "differing_ranks_of",
    "digest_of_checkpoint",
    "digest_of_path",
    "digest_of_shards",
    "region_blocks",
    "region_sums",
    "tensor_sums",
]

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]
Key = TypeVar("Key")

BLOCK_BYTES = 2**22
"""Read at a time."""

JOB_BYTES = 2**26
"""Of one tensor that one thread reads at a time, so that a large tensor is shared by all."""

MAX_THREADS = 4

SECONDS_PER_READ, SECONDS_PER_BYTE = 3e-6, 1 / 5e9
"""Of a call and of a byte, as in `transport`: when gaps between runs are read too."""


def digest_of_path(path: PathLike) -> DigestReport:
    """Of a checkpoint, or of a pre-sharded folder: there every rank's file is read."""
    return digest_of_shards(open_sharded(path)) if is_sharded(path) else _of_files(open_any(path))


def digest_of_checkpoint(checkpoint: Checkpoint) -> DigestReport:
    """Of files that were opened before."""
    served_by = checkpoint.served_by
    return digest_of_shards(served_by) if isinstance(served_by, Sharded) else _of_files(checkpoint)


def _of_files(checkpoint: Checkpoint) -> DigestReport:
    began = time.perf_counter()
    jobs = [
        (source.name, span) for source in checkpoint.tensors.values() for span in _spans(source)
    ]
    totals = dict.fromkeys(checkpoint.tensors, Sums())
    with checkpoint.reader() as reader:

        def work(job: tuple[str, tuple[int, int]]) -> Sums:
            return _span_sums(reader, checkpoint.tensors[job[0]], *job[1])

        for (name, _), sums in _in_threads(work, jobs):
            totals[name] += sums
    return _report("checkpoint", checkpoint.tensors, totals, began)


def digest_of_shards(sharded: Sharded) -> DigestReport:
    """Of the ranks' files: every copy is read, and copies of the same elements are compared."""
    began = time.perf_counter()
    plan = sharded.plan
    kept = holdings(plan)
    jobs = [
        (name, number, at)
        for name in sharded.sources
        if name in kept
        for number, piece in enumerate(pieces(plan, name))
        for at in range(len(piece.holders))
    ]
    with sharded.open_files() as reader:

        def work(job: tuple[str, int, int]) -> Sums:
            name, number, at = job
            holder = pieces(plan, name)[number].holders[at]
            stored = sharded.stored[holder.ranks.tp_rank][holder.copy.target]
            return copy_sums_of_file(reader, stored, holder.copy, sharded.sources[name])

        held: Held = dict(_in_threads(work, jobs))
        totals, replicas = sums_by_tensor(plan, held)
        for name, stored in sharded.rest.items():
            totals[name] = tensor_sums(reader, stored)
    ranks = tuple(_differing(sharded, held, [name for name in sharded.sources if name in kept]))
    recorded = sharded.manifest.digests if sharded.manifest is not None else {}
    return _report(
        "shards",
        sharded.sources,
        totals,
        began,
        replicas=replicas,
        recorded=recorded,
        ranks=ranks,
    )


def differing_ranks_of(sharded: Sharded, names: Iterable[str]) -> list[RankDifference]:
    """Which ranks' files have other bytes of these tensors than were sharded: they are read."""
    kept = holdings(sharded.plan)
    known = [name for name in names if name in kept]
    with sharded.open_files() as reader:
        held = {
            (name, number, at): copy_sums_of_file(
                reader,
                sharded.stored[holder.ranks.tp_rank][holder.copy.target],
                holder.copy,
                sharded.sources[name],
            )
            for name in known
            for number, piece in enumerate(pieces(sharded.plan, name))
            for at, holder in enumerate(piece.holders)
        }
    return list(_differing(sharded, held, known))


def _differing(sharded: Sharded, held: Held, names: Iterable[str]) -> Iterator[RankDifference]:
    manifest = sharded.manifest
    if manifest is None:
        return
    for name in names:
        yield from differing_ranks(
            sharded.plan,
            sharded.sources[name],
            lambda rank: rank_file(rank, sharded.plan.tp_size),
            lambda *key: held[key],
            manifest.digests[name],
            manifest.ranks.get(name),
        )


def _report(
    kind: str,
    sources: Mapping[str, Source],
    totals: Mapping[str, Sums],
    began: float,
    *,
    replicas: tuple[Any, ...] = (),
    recorded: Mapping[str, str] | None = None,
    ranks: tuple[RankDifference, ...] = (),
) -> DigestReport:
    values = {name: value_of(source, totals[name]) for name, source in sources.items()}
    recorded = recorded or {}
    return DigestReport(
        kind=kind,
        tensors=values,
        replicas=replicas,
        ranks=ranks,
        recorded=tuple(n for n, v in values.items() if recorded.get(n, v.hex) != v.hex),
        num_bytes=sum(source.num_bytes for source in sources.values()),
        seconds=time.perf_counter() - began,
    )


def _in_threads(work: Callable[[Key], Sums], jobs: Iterable[Key]) -> Iterator[tuple[Key, Sums]]:
    """(job, its sums) of every job, in order; the error of the first that failed."""
    jobs = list(jobs)
    num_threads = max(min(MAX_THREADS, os.cpu_count() or 1), 1)
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            yield from zip(jobs, pool.map(work, jobs), strict=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ----------------------------------------------------------------------------------------- reading


class _Thread(threading.local):
    memory: Array | None = None


_thread = _Thread()


def _memory(num_bytes: int) -> Any:  # numpy's stubs declare no buffer
    """Bytes of this thread, valid until the next call."""
    if _thread.memory is None or _thread.memory.size < num_bytes:
        _thread.memory = np.empty(max(num_bytes, BLOCK_BYTES), np.uint8)
    return _thread.memory[:num_bytes]


def _spans(source: Source) -> list[tuple[int, int]]:
    """A tensor's stored elements in jobs (first, last + 1), of whole canonical rows."""
    item, whole = dtypes.storage_bytes(source.dtype), num_stored(source.dtype, source.shape)
    step = _rows_of(source, JOB_BYTES) // item
    return [(at, min(at + step, whole)) for at in range(0, whole, step)]


def _rows_of(source: Source, num_bytes: int) -> int:
    """Bytes of as many canonical rows as fit, one at least."""
    width = row_bytes(source.dtype, source.shape)
    return max(num_bytes // width, 1) * width


def tensor_sums(reader: Reader, source: Source) -> Sums:
    """The sums of a whole tensor, from its file."""
    return _span_sums(reader, source, 0, num_stored(source.dtype, source.shape))


def _span_sums(reader: Reader, source: Source, first: int, last: int) -> Sums:
    item, whole = dtypes.storage_bytes(source.dtype), num_stored(source.dtype, source.shape)
    step = _rows_of(source, BLOCK_BYTES) // item
    total = Sums()
    for at in range(first, last, step):
        stop = min(at + step, last)
        data = _memory((stop - at) * item)
        reader.read_into(source, at * item, memoryview(data))
        total += sums_of(source.dtype, source.shape, Region.box((whole,), ((at, stop),)), data)
    return total


def region_sums(reader: Reader, source: Source, region: Region) -> Sums:
    """The sums of a region of a tensor, from its file."""
    total = Sums()
    for box, data in region_blocks(reader, source, region):
        total += sums_of(source.dtype, source.shape, box, data)
    return total


def copy_sums_of_file(reader: Reader, stored: Source, copy: Copy, source: Source) -> Sums:
    """The sums of a copy's source region, from a file that has the copy's target.

    stored   where the target is
    source   the checkpoint tensor, of which only dtype and shape are looked at
    """
    total = Sums()
    back = copy.invert().axes
    for inner in row_blocks(
        copy.source_region.size, BLOCK_BYTES // dtypes.storage_bytes(stored.dtype)
    ):
        into = reordered(inner, copy.axes) if copy.axes else inner
        region = copy.source_region.compose(inner)
        data = _read(reader, stored, copy.target_region.compose(into))
        total += sums_of(source.dtype, source.shape, region, data.transpose(back) if back else data)
    return total


def region_blocks(reader: Reader, source: Source, region: Region) -> Iterator[tuple[Region, Array]]:
    """(box, its elements as unsigned integers) of boxes that make up a region, in order; each is
    valid until the next.
    """
    for inner in row_blocks(region.size, BLOCK_BYTES // dtypes.storage_bytes(source.dtype)):
        box = region.compose(inner)
        yield box, _read(reader, source, box)


def _read(reader: Reader, source: Source, box: Region) -> Array:
    """The elements of a box, of its sizes; gaps are read where that is cheaper than more calls."""
    item = dtypes.storage_bytes(source.dtype)
    runs = box.runs()
    strides = [step * stride for step, stride in zip(box.step, _strides(box.shape), strict=True)]
    span = 1 + sum((n - 1) * s for n, s in zip(box.size, strides, strict=True))
    gaps = (span - box.num_elements) * item
    if runs.num_runs == 1 or gaps * SECONDS_PER_BYTE < runs.num_runs * SECONDS_PER_READ:
        data = _memory(span * item)
        reader.read_into(source, runs.first * item, memoryview(data))
        array = data.view(f"u{item}")
        return np.lib.stride_tricks.as_strided(
            array, box.size, [s * item for s in strides], writeable=False
        )
    data = _memory(box.num_elements * item)
    length = runs.length * item
    for number, first in enumerate(runs.offsets()):
        reader.read_into(
            source, first * item, memoryview(data[number * length : (number + 1) * length])
        )
    found: Array = data.view(f"u{item}").reshape(box.size)
    return found


def _strides(shape: tuple[int, ...]) -> list[int]:
    found: list[int] = []
    stride = 1
    for n in reversed(shape):
        found.insert(0, stride)
        stride *= n
    return found


def row_blocks(size: tuple[int, ...], limit: int) -> Iterator[Region]:
    """Boxes of at most `limit` elements, whose elements are, one box after the other, in order."""
    yield from _split(Region.whole(size), max(limit, 1), 0)


def _split(box: Region, limit: int, dim: int) -> Iterator[Region]:
    if not box.num_elements:
        return
    if box.num_elements <= limit or dim == len(box.size):
        yield box
        return
    step = max(limit * box.size[dim] // box.num_elements, 1)
    spans = [(a, a + n) for a, n in zip(box.start, box.size, strict=True)]
    low, high = spans[dim]
    for at in range(low, high, step):
        spans[dim] = at, min(at + step, high)
        yield from _split(Region.box(box.shape, spans), limit, dim + 1)
