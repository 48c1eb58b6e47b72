"""Bytes between a checkpoint's own files and files that hold ranks' parameters, a band at a time.

A band is a box of one checkpoint tensor, or equal rows of several that lie side by side in one
parameter, of bounded size. It is read whole from wherever its pieces are, and written to wherever
they go. Elements only move: nothing is decoded, cast or computed. Each end of a move is a `Files`
(the checkpoint's own files) or a `Shards` (ranks' parameters); any two make a verb:

    Files -> Shards    shard
    Shards -> Files    merge
    Shards -> Shards   reshard

A parameter whose parts lie side by side along a later dim (GPTQ's qweight [I/8, Q + 2 KV]) has no
long runs of any one part. That is why bands may be of several tensors: its rows are then put
together in memory, and read or written in one call.

No torch: arrays are numpy's, of unsigned integers as wide as the elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lading import dtypes
from lading.checkpoint import FileWriter, Reader, Source
from lading.plan import Plan
from lading.regions import Copy, Region
from lading.routes import holdings, pieces
from lading.views import common_shape, seen_as

__all__ = [
    "Band",
    "End",
    "Files",
    "Shards",
    "array_of",
    "bands",
    "bytes_of",
    "index_of",
    "views_of",
]

Array = npt.NDArray[Any]
Ints = tuple[int, ...]
Views = Mapping[str, Ints]
"""In which shape each checkpoint tensor is seen."""

_MIXED_BYTES = 1 << 16
"""A window that is read with gaps: up to this size it is one call whatever it is good for."""

ALIGN_BYTES = 1 << 16
"""Bands begin at multiples of this in their tensor where that costs nothing (blocks of digests)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """What moves together.

    boxes   (checkpoint tensor, box of it in its view); each box is one run of the tensor's bytes
    """

    boxes: tuple[tuple[str, Region], ...]


class End(Protocol):
    """Where bands come from, or go to."""

    def read(self, band: Band) -> dict[str, Array]:
        """The elements of each box, in its shape."""

    def write(self, band: Band, values: Mapping[str, Array]) -> None:
        """Puts the elements of each box where they belong."""


def array_of(shape: Ints, dtype: str) -> Array:
    """Memory for elements of a dtype; not initialised."""
    return np.empty(shape, dtype=f"u{dtypes.storage_bytes(dtype)}")


def bytes_of(array: Array) -> memoryview:
    """The bytes of a contiguous array."""
    flat: Any = array.reshape(-1).view(np.uint8)
    assert not array.size or np.shares_memory(flat, array), "the array has gaps"
    return memoryview(flat)


def views_of(plans: Sequence[Plan]) -> Views:
    """A shape in which every plan's copies of each checkpoint tensor are boxes."""
    shapes: dict[str, dict[Ints, None]] = {}
    for plan in plans:
        for share in plan.shares:
            for copy in share.copies:
                shapes.setdefault(copy.source, {})[copy.source_region.shape] = None
    return {name: common_shape(list(found)) for name, found in shapes.items()}


# -------------------------------------------------------------------------------------- the bands


def bands(plan: Plan, views: Views, band_bytes: int) -> Iterator[Band]:
    """All elements of all tensors that ranks keep, each once, in model order.

    band_bytes   the most that a band has; one element is always enough
    """
    for names in _together(plan, views):
        sizes = [dtypes.storage_bytes(plan.sources[name].dtype) for name in names]
        row_bytes = sum(
            prod(views[name][1:]) * size for name, size in zip(names, sizes, strict=True)
        )
        if len(names) > 1 and row_bytes <= band_bytes:
            rows = views[names[0]][0]
            for start, stop in _spans(rows, row_bytes, band_bytes):
                yield Band(boxes=tuple((name, _rows(views[name], start, stop)) for name in names))
            continue
        for name, size in zip(names, sizes, strict=True):
            for box in _boxes(views[name], size, band_bytes):
                yield Band(boxes=((name, box),))


def _together(plan: Plan, views: Views) -> Iterator[tuple[str, ...]]:
    """Tensors that one parameter has side by side, row by row; every other by itself."""
    bound: dict[str, list[str]] = {}
    for binding in plan.bindings:
        bound.setdefault(binding.target, []).append(binding.source)
    done: set[str] = set()
    for target in plan.targets:
        found = dict.fromkeys(bound.get(target.name, ()))
        names = [name for name in found if name in views and name not in done]
        done.update(names)
        rows = {views[name][:1] for name in names}
        if (target.layout.fused_dim or 0) > 0 and len(rows) == 1:
            yield tuple(names)
        else:
            yield from ((name,) for name in names)


def _rows(shape: Ints, start: int, stop: int) -> Region:
    return Region.box(shape, [(start, stop), *((0, n) for n in shape[1:])])


def _spans(rows: int, row_bytes: int, band_bytes: int) -> Iterator[tuple[int, int]]:
    """Equal spans of rows that fit a band."""
    step = max(1, band_bytes // max(row_bytes, 1))
    whole = ALIGN_BYTES // gcd(ALIGN_BYTES, max(row_bytes, 1))
    step = step // whole * whole or step
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _boxes(shape: Ints, item_bytes: int, band_bytes: int, prefix: Ints = ()) -> Iterator[Region]:
    """Boxes of one tensor, each one run of its elements: rows, or parts of a row."""
    dim = len(prefix)
    first = [(at, at + 1) for at in prefix]
    if dim == len(shape):
        if dim == 0:
            yield Region.whole(())
        return
    row_bytes = prod(shape[dim + 1 :]) * item_bytes
    rest = [(0, n) for n in shape[dim + 1 :]]
    if row_bytes <= band_bytes or dim + 1 == len(shape):
        for start, stop in _spans(shape[dim], row_bytes, band_bytes):
            if prod(shape):
                yield Region.box(shape, [*first, (start, stop), *rest])
        return
    for at in range(shape[dim]):
        yield from _boxes(shape, item_bytes, band_bytes, (*prefix, at))


# --------------------------------------------------------------------------- the checkpoint's files


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The checkpoint's own files, one end of a move.

    sources   where each tensor is, or is to be
    reader    for reading, writers by file for writing
    """

    sources: Mapping[str, Source]
    reader: Reader | None = None
    writers: Mapping[str, FileWriter] | None = None

    def read(self, band: Band) -> dict[str, Array]:
        assert self.reader is not None, "this end was made for writing"
        found = {}
        for name, box in band.boxes:
            source = self.sources[name]
            values = array_of(box.size, source.dtype)
            offset = box.runs().first * values.itemsize
            if values.size:
                self.reader.read_into(source, offset, bytes_of(values))
            found[name] = values
        return found

    def write(self, band: Band, values: Mapping[str, Array]) -> None:
        assert self.writers is not None, "this end was made for reading"
        for name, box in band.boxes:
            source = self.sources[name]
            offset = source.offset_bytes + box.runs().first * values[name].itemsize
            if values[name].size:
                self.writers[source.file].write(offset, bytes_of(values[name]))


# ----------------------------------------------------------------------------- ranks' parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """Where a box of a checkpoint tensor is in a rank's parameter."""

    rank: int
    copy: Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The share of a band that one copy moves.

    values   a view into the band's array, in the order of the target's dims
    """

    values: Array
    target_region: Region


_Window = dict[tuple[int, str, Ints], list[_Part]]
"""By rank, parameter and the shape in which it is seen."""


class Shards:
    """Files that hold ranks' parameters, one end of a move.

    plan     of all ranks
    stored   by rank: where each parameter is, or is to be
    views    in which the bands' boxes are
    reader   for reading: each element comes from the first rank that holds it
    writers  by file, for writing: each rank gets all that it holds. Padding stays as the file has
             it: zeros
    """

    def __init__(
        self,
        plan: Plan,
        stored: Sequence[Mapping[str, Source]],
        views: Views,
        *,
        reader: Reader | None = None,
        writers: Mapping[str, FileWriter] | None = None,
    ) -> None:
        self.plan, self.stored, self.reader, self.writers = plan, stored, reader, writers
        self._held: dict[str, tuple[_Held, ...]] = {}
        self.views = views
        self._fills: dict[tuple[int, str], list[Region]] = {}
        for share in plan.shares:
            for fill in share.fills:
                key = share.ranks.tp_rank, fill.target
                self._fills.setdefault(key, []).append(fill.region)

    def read(self, band: Band) -> dict[str, Array]:
        assert self.reader is not None, "this end was made for writing"
        found = {
            name: array_of(box.size, self.plan.sources[name].dtype) for name, box in band.boxes
        }
        for (rank, target, _), parts in self._windows(band, found, unique=True).items():
            self._read(self.stored[rank][target], parts)
        return found

    def write(self, band: Band, values: Mapping[str, Array]) -> None:
        assert self.writers is not None, "this end was made for reading"
        for (rank, target, shape), parts in self._windows(band, values, unique=False).items():
            fills = [f for f in self._fills.get((rank, target), ()) if f.shape == shape]
            self._write(self.stored[rank][target], parts, fills)

    def _windows(self, band: Band, values: Mapping[str, Array], *, unique: bool) -> _Window:
        windows: _Window = {}
        for name, box in band.boxes:
            for held in self._holders(name, unique=unique):
                copy = _within(held.copy, box)
                if copy is None:
                    continue
                view = values[name][index_of(copy.source_region.inside(box))]
                if copy.axes:
                    view = view.transpose(copy.axes)
                key = held.rank, copy.target, copy.target_region.shape
                part = _Part(values=view, target_region=copy.target_region)
                windows.setdefault(key, []).append(part)
        return windows

    def _holders(self, name: str, *, unique: bool) -> tuple[_Held, ...]:
        found = self._held.get(name)
        if found is None:
            if unique:
                held = [piece.holders[0] for piece in pieces(self.plan, name)]
            else:
                held = list(holdings(self.plan).get(name, ()))
            found = self._held[name] = tuple(
                _Held(rank=one.ranks.tp_rank, copy=copy)
                for one in held
                for copy in seen_as(one.copy, self.views[name])
            )
        return found

    def _read(self, stored: Source, parts: Sequence[_Part]) -> None:
        assert self.reader is not None, "this end was made for writing"
        if len(parts) == 1 and parts[0].values.flags.c_contiguous:
            runs = parts[0].target_region.runs()
            if runs.num_runs == 1:
                offset = runs.first * parts[0].values.itemsize
                self.reader.read_into(stored, offset, bytes_of(parts[0].values))
                return
        wanted = sum(part.values.size for part in parts)
        box = _box_around([part.target_region for part in parts])
        if box is not None and _is_worth(box, wanted * 2, parts):
            around = np.empty(box.size, dtype=parts[0].values.dtype)
            self.reader.read_into(stored, box.runs().first * around.itemsize, bytes_of(around))
            for part in parts:
                part.values[...] = around[index_of(part.target_region.inside(box))]
            return
        for part in parts:
            self._read_runs(stored, part)

    def _read_runs(self, stored: Source, part: _Part) -> None:
        assert self.reader is not None, "this end was made for writing"
        size = part.values.itemsize
        runs = part.target_region.runs()
        flat = np.empty(part.values.shape, dtype=part.values.dtype)
        memory = bytes_of(flat)
        length = runs.length * size
        for at, offset in enumerate(runs.offsets()):
            self.reader.read_into(stored, offset * size, memory[at * length : (at + 1) * length])
        part.values[...] = flat

    def _write(self, stored: Source, parts: Sequence[_Part], fills: Sequence[Region]) -> None:
        assert self.writers is not None, "this end was made for reading"
        writer, size = self.writers[stored.file], parts[0].values.itemsize
        box = _box_with_padding([part.target_region for part in parts], fills)
        if box is not None:
            padding = [both for fill in fills if (both := fill.intersect(box)) is not None]
            covered = sum(part.values.size for part in parts)
            if covered + sum(region.num_elements for region in padding) == box.num_elements:
                around = _assembled(box, parts, padding)
                writer.write(stored.offset_bytes + box.runs().first * size, bytes_of(around))
                return
        for part in parts:
            runs = part.target_region.runs()
            memory = bytes_of(np.ascontiguousarray(part.values))
            length = runs.length * size
            for at, offset in enumerate(runs.offsets()):
                piece = memory[at * length : (at + 1) * length]
                writer.write(stored.offset_bytes + offset * size, piece)


def _assembled(box: Region, parts: Sequence[_Part], padding: Sequence[Region]) -> Array:
    if len(parts) == 1 and not padding:
        return np.ascontiguousarray(parts[0].values)
    around = (np.zeros if padding else np.empty)(box.size, dtype=parts[0].values.dtype)
    for part in parts:
        around[index_of(part.target_region.inside(box))] = part.values
    return around


def _is_worth(box: Region, most: int, parts: Sequence[_Part]) -> bool:
    size = parts[0].values.itemsize
    return box.num_elements <= most or box.num_elements * size <= _MIXED_BYTES


def _box_around(regions: Sequence[Region]) -> Region | None:
    """The smallest box that has all regions, where it is one run of its tensor; None elsewhere."""
    if any(step != 1 for region in regions for step in region.step):
        return None
    spans = []
    for dim in range(len(regions[0].shape)):
        start = min(region.start[dim] for region in regions)
        spans.append((start, max(region.start[dim] + region.size[dim] for region in regions)))
    box = Region.box(regions[0].shape, spans)
    return box if box.runs().num_runs == 1 else None


def _box_with_padding(regions: Sequence[Region], fills: Sequence[Region]) -> Region | None:
    """`_box_around`; of padding that lies beside the regions, row by row, too."""
    box = _box_around(regions)
    if box is not None or not fills:
        return box
    start = min(region.start[0] for region in regions)
    stop = max(region.start[0] + region.size[0] for region in regions)
    shape = regions[0].shape
    rows = Region.box(shape, [(start, stop), *((0, n) for n in shape[1:])])
    beside = [both for fill in fills if (both := fill.intersect(rows)) is not None]
    return _box_around([*regions, *beside])


def _within(copy: Copy, box: Region) -> Copy | None:
    """The share of a copy that comes from a box of its source, None where none does."""
    mine = copy.source_region
    for a, n, b, m in zip(mine.start, mine.size, box.start, box.size, strict=True):
        if not n or not m or a >= b + m:
            return None
    if mine.is_whole and box.is_whole:
        return copy
    found = copy.invert().restrict(box)
    return None if found is None else found.invert()


def index_of(region: Region) -> tuple[slice, ...]:
    """The region as numpy's index."""
    return tuple(
        slice(start, start + (size - 1) * step + 1 if size else start, step)
        for start, size, step in zip(region.start, region.size, region.step, strict=True)
    )
