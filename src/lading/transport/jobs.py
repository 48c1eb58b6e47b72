"""Copies as jobs: numbers that say which bytes of which file go to which address. No torch.

A job is a grid of equal runs of bytes. A copy whose two regions are boxes of row-major memory is
one job, or a few: dims that both regions take whole are folded into the run, neighbouring grid dims
into one. Letters: n = jobs, F = fields.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from lading.regions import Region

__all__ = ["FIELDS", "Grid", "JobList", "Jobs", "Piece", "common_runs"]

FIELDS = ("file", "offset", "target", "run", "rows", "file_stride", "target_stride", "direct")
"""What a job says, in the order that `_engine.c` reads: eight int64, bytes where they count any.

file            position in the list of open files
offset, target  of the first run: in the file; the address in memory
run             bytes of one run
rows            how many runs there are
file_stride, target_stride   bytes from one run to the next, on either side
direct          1 = read in whole spans; past the page cache, if the file has a descriptor for it
"""

Jobs = NDArray[np.int64]
"""[n, F]"""

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Two regions of equal sizes as runs that are dense on both sides, counted in elements.

    length          of each run
    counts          runs along each dim of the grid, outermost first
    source_first, source_strides   where the runs lie in the source
    target_first, target_strides   where they lie in the target
    """

    length: int
    counts: Ints
    source_first: int
    source_strides: Ints
    target_first: int
    target_strides: Ints

    @property
    def num_runs(self) -> int:
        """How many runs there are."""
        return prod(self.counts)

    def pieces(self) -> Iterable[tuple[int, int, int, int, int]]:
        """Grids of one dim: (source first, target first, runs, source stride, target stride)."""
        if not self.counts:
            yield self.source_first, self.target_first, 1, self.length, self.length
            return
        *outer, rows = self.counts
        for index in product(*map(range, outer)):
            source = sum(i * s for i, s in zip(index, self.source_strides, strict=False))
            target = sum(i * s for i, s in zip(index, self.target_strides, strict=False))
            yield (
                self.source_first + source,
                self.target_first + target,
                rows,
                self.source_strides[-1],
                self.target_strides[-1],
            )


def common_runs(source: Region, target: Region) -> Grid:
    """The longest runs that are dense in both regions; their sizes are equal, dim by dim.

    Example: [0:4, 3:6] of (4, 6) into all of (4, 3) -> 4 runs of 3, 6 apart here and 3 apart there.
    """
    if source.size != target.size:
        raise ValueError(f"regions {source} and {target} have different sizes")
    length, folding = 1, True
    counts: list[int] = []
    strides: list[tuple[int, int]] = []
    first, stride = [0, 0], [1, 1]
    for dim in reversed(range(len(source.size))):
        size = source.size[dim]
        for side, region in enumerate((source, target)):
            first[side] += region.start[dim] * stride[side]
        steps = tuple(r.step[dim] * s for r, s in zip((source, target), stride, strict=True))
        if folding and (size == 1 or (source.step[dim], target.step[dim]) == (1, 1)):
            length *= size
            folding = size == source.shape[dim] == target.shape[dim]
        elif size != 1:
            folding = False
            if strides and tuple(s * counts[0] for s in strides[0]) == steps:
                counts[0] *= size
            else:
                counts.insert(0, size)
                strides.insert(0, (steps[0], steps[1]))
        for side, region in enumerate((source, target)):
            stride[side] *= region.shape[dim]
    return Grid(
        length=length,
        counts=tuple(counts),
        source_first=first[0],
        source_strides=tuple(pair[0] for pair in strides),
        target_first=first[1],
        target_strides=tuple(pair[1] for pair in strides),
    )


def job_rows(
    grid: Grid, *, file: int, offset: int, address: int, element_bytes: int, direct: bool
) -> list[Ints]:
    """The jobs of one copy: its source begins at `offset` of the file, its target at `address`."""
    e = element_bytes
    if not grid.counts:
        at, to = offset + grid.source_first * e, address + grid.target_first * e
        run = grid.length * e
        return [(file, at, to, run, 1, run, run, int(direct))] if run else []
    return [
        (
            file,
            offset + source * e,
            address + target * e,
            grid.length * e,
            rows,
            source_stride * e,
            target_stride * e,
            int(direct),
        )
        for source, target, rows, source_stride, target_stride in grid.pieces()
        if rows and grid.length
    ]


def as_jobs(rows: Sequence[Ints]) -> tuple[Jobs, NDArray[np.int64]]:
    """[n, F] from one tuple a job, in the order of the files and of the bytes in each; and which of
    the given rows each job is.
    """
    jobs = np.array(rows, dtype=np.int64).reshape(-1, len(FIELDS))
    order = np.lexsort((jobs[:, 1], jobs[:, 0]))
    return np.ascontiguousarray(jobs[order]), order


class Piece:
    """The jobs that copies of one grid have in common: at offset 0 of file 0, to address 0."""

    def __init__(self, grid: Grid, element_bytes: int) -> None:
        self.rows = job_rows(
            grid, file=0, offset=0, address=0, element_bytes=element_bytes, direct=False
        )


class JobList:
    """Jobs of many copies. Until all are known a copy is five numbers, as what Python does for each
    of 20,000 copies of 16 KiB may not take longer than moving them.
    """

    def __init__(self) -> None:
        self._copies = array("q")  # position in _spans, file, offset, address, direct
        self._spans: list[tuple[int, int]] = []
        self._rows: list[Ints] = []
        self._known: dict[Piece, int] = {}

    def add(self, piece: Piece, file: int, offset: int, address: int, direct: bool) -> None:
        """One more copy: its source begins at `offset` of the file, its target at `address`."""
        span = self._known.get(piece)
        if span is None:
            span = self._known[piece] = len(self._spans)
            self._spans.append((len(self._rows), len(piece.rows)))
            self._rows += piece.rows
        self._copies.extend((span, file, offset, address, direct))

    def jobs(self) -> tuple[Jobs, NDArray[np.int64]]:
        """[n, F] in the order of the files and of the bytes in each; and the number of the copy,
        as they were added, that each job is of.
        """
        copies = np.frombuffer(self._copies, dtype=np.int64).reshape(-1, 5)
        spans = np.array(self._spans, dtype=np.int64).reshape(-1, 2)[copies[:, 0]]
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, len(FIELDS))
        owner = np.repeat(np.arange(len(copies)), spans[:, 1])
        before = np.cumsum(spans[:, 1]) - spans[:, 1]
        jobs = rows[spans[owner, 0] + np.arange(len(owner)) - before[owner]]
        jobs[:, 0] = copies[owner, 1]
        jobs[:, 1:3] += copies[owner, 2:4]
        jobs[:, 7] = copies[owner, 4]
        order = np.lexsort((jobs[:, 1], jobs[:, 0]))
        return np.ascontiguousarray(jobs[order]), owner[order]
