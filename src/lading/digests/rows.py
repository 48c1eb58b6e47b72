"""Canonical rows of a tensor, for `digests`: which elements of a region are in which row and which
column, and the weights of both. Arithmetic on indices; the formula is in `digests`.

Positions and columns count stored elements of the tensor, rows are rows of W bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lading.regions import Region

__all__ = [
    "BLOCK_ROWS",
    "NUM_LANES",
    "ONES",
    "Tile",
    "Weights",
    "byte_weights",
    "column_parts",
    "row_weights",
    "splitmix64",
    "tiles_of",
    "weights_of",
    "word_weights",
]

Array = npt.NDArray[Any]

NUM_LANES = 6

MIN_RUN_BYTES = 2048
"""Of runs that are summed one by one; shorter ones by the element."""

POINTS = 2**15
"""Elements whose weights are worked out one by one at a time."""

BLOCK_ROWS = 2**15
"""Rows whose sums are held at a time, and whose weights are worked out only once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Neighbouring elements of a region's row-major order, and where they are in the tensor.

    first     position in the region of the first
    rows      the canonical rows
    columns   the columns, in elements, a range where they are neighbours; of a grid every row has
              all of them, and elements are in row-major order; of points element i is in rows[i]
              and columns[i]
    """

    first: int
    rows: Array
    columns: Array | range
    is_grid: bool = True

    @property
    def num_elements(self) -> int:
        """How many there are."""
        return len(self.rows) * len(self.columns) if self.is_grid else len(self.rows)


def tiles_of(region: Region, width_bytes: int, item: int) -> Iterator[Tile]:
    """Cuts a region into tiles of rows of `width_bytes`: one where the view has these rows."""
    width = width_bytes // item
    if not region.num_elements:
        return
    split = _split_dim(region, width)
    if split is not None:
        yield Tile(
            first=0,
            rows=_positions(region, 0, split),
            columns=_columns(region, split),
        )
        return
    runs = region.runs()
    if runs.num_runs == 1 or runs.length * item >= MIN_RUN_BYTES:
        for number, start in enumerate(runs.offsets()):
            yield from _run_tiles(number * runs.length, start, runs.length, width)
        return
    index = _flat_blocks(region)
    first = 0
    for block in index:
        rows, columns = np.divmod(block, width)
        yield Tile(first=first, rows=rows, columns=columns, is_grid=False)
        first += len(block)


def _split_dim(region: Region, width: int) -> int | None:
    """The dim from which on the region's view has exactly a canonical row's elements."""
    inner = 1
    for dim in reversed(range(len(region.shape))):
        inner *= region.shape[dim]
        if inner == width:
            return dim
        if inner > width:
            return None
    return None


def _columns(region: Region, split: int) -> Array | range:
    found = _positions(region, split, len(region.size))
    first, last = int(found[0]), int(found[-1])
    return range(first, last + 1) if last + 1 - first == len(found) else found


def _positions(region: Region, low: int, high: int) -> Array:
    """The region's indices along dims low .. high - 1, seen as one dim."""
    found = np.zeros(1, np.int64)
    for n, start, size, step in zip(
        region.shape[low:high],
        region.start[low:high],
        region.size[low:high],
        region.step[low:high],
        strict=True,
    ):
        here = start + step * np.arange(size, dtype=np.int64)
        found = (found[:, None] * n + here).reshape(-1)
    return found


def _run_tiles(first: int, start: int, length: int, width: int) -> Iterator[Tile]:
    """A run of neighbouring elements: the end of a row, whole rows, the beginning of a row."""
    stop = start + length
    while start < stop:
        row, column = divmod(start, width)
        if column or stop - start < width:
            rows, size = 1, min(width - column, stop - start)
        else:
            rows, size = (stop - start) // width, width
        yield Tile(
            first=first,
            rows=np.arange(row, row + rows, dtype=np.int64),
            columns=range(column, column + size),
        )
        first, start = first + rows * size, start + rows * size


def _flat_blocks(region: Region) -> Iterator[Array]:
    """The flat indices of a region's elements in row-major order, some at a time."""
    if region.num_elements <= POINTS:
        yield _positions(region, 0, len(region.size))
        return
    dim = next(i for i, size in enumerate(region.size) if size > 1)
    half = region.size[dim] // 2
    for at, size in ((0, half), (half, region.size[dim] - half)):
        yield from _flat_blocks(
            Region(
                shape=region.shape,
                start=_with(region.start, dim, region.start[dim] + at * region.step[dim]),
                size=_with(region.size, dim, size),
                step=region.step,
            )
        )


def _with(numbers: tuple[int, ...], place: int, number: int) -> tuple[int, ...]:
    return (*numbers[:place], number, *numbers[place + 1 :])


# ------------------------------------------------------------------------------------------ weights


def splitmix64(numbers: Array) -> Array:
    """Outputs of splitmix64 with seed 0, by their numbers (uint64, from 0)."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: Array = z ^ (z >> np.uint64(31))
    return result


def row_weights(rows: Array) -> Array:
    """u of these rows: uint64 [rows, lanes]."""
    last = int(rows.max(initial=0))
    if last >= BLOCK_ROWS:
        return _row_weights(rows)
    found: Array = _row_table(1 << max(last.bit_length(), 9))[rows]
    return found


def _row_weights(rows: Array) -> Array:
    lanes = np.arange(8, 8 + NUM_LANES, dtype=np.uint64)
    numbers = rows.astype(np.uint64)[:, None] * np.uint64(16) + lanes
    weights: Array = splitmix64(numbers) | np.uint64(1)
    return weights


@lru_cache(maxsize=8)
def _row_table(num_rows: int) -> Array:
    """u of the first rows, worked out once: [rows, lanes]."""
    table = _row_weights(np.arange(num_rows, dtype=np.int64))
    table.flags.writeable = False
    return table


@lru_cache(maxsize=20)
def _table(num_words: int) -> Array:
    """v of the first words of a row: int64 [words, lanes]."""
    numbers: Array = np.arange(num_words, dtype=np.uint64)[:, None] * np.uint64(16)
    numbers = numbers + np.arange(NUM_LANES, dtype=np.uint64)
    table: Array = ((splitmix64(numbers) >> np.uint64(39)) | np.uint64(1)).astype(np.int64)
    table.flags.writeable = False
    return table


def word_weights(words: Array) -> Array:
    """v of these words of a row: int64 [words, lanes]."""
    last = int(words.max(initial=0))
    found: Array = _table(1 << max(last.bit_length(), 9))[words]
    return found


def byte_weights(columns: Array) -> Array:
    """v of these bytes of a row by themselves, their place in their word included."""
    weights: Array = word_weights(columns // 2) << (8 * (columns % 2))[:, None]
    return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Of the columns of a grid.

    integers    int64 [units, lanes]
    floats      the same in float64: exact, they are below 2^33
    are_words   whether a unit is a word; bytes that do not pair into words are units by themselves
    ones        what the +1 of each byte adds to a row, in each lane
    """

    integers: Array
    floats: Array
    are_words: bool
    ones: Array


def weights_of(columns: Array | range, item: int) -> Weights:
    """The weights of some columns of elements of `item` bytes."""
    if isinstance(columns, range):
        return _range_weights(columns.start, columns.stop, item)
    if item == 1:
        return _weights(byte_weights(columns), are_words=False)
    words: Array = columns[:, None] * (item // 2) + np.arange(item // 2)
    return _weights(word_weights(words.reshape(-1)), are_words=True)


def column_parts(columns: Array | range, item: int) -> list[tuple[slice, Weights]]:
    """The columns in parts, each with its weights: bytes at the ends of a range that have no other
    byte of their word beside them are parts of their own.
    """
    if item > 1 or not isinstance(columns, range) or len(columns) < 3:
        return [(slice(None), weights_of(columns, item))]
    bounds = sorted({0, columns.start % 2, len(columns) - columns.stop % 2, len(columns)})
    return [
        (slice(low, high), weights_of(columns[low:high], item)) for low, high in pairwise(bounds)
    ]


@lru_cache(maxsize=8)
def _range_weights(start: int, stop: int, item: int) -> Weights:
    low, high = start * item, stop * item
    if low % 2 or high % 2:
        return _weights(byte_weights(np.arange(low, high)), are_words=False)
    return _weights(word_weights(np.arange(low // 2, high // 2)), are_words=True)


def _weights(integers: Array, *, are_words: bool) -> Weights:
    ones = integers.sum(0).astype(np.uint64) * np.uint64(ONES[are_words])
    floats: Array = integers.astype(np.float64)
    return Weights(integers=integers, floats=floats, are_words=are_words, ones=ones)


ONES = {True: 257, False: 1}
"""What the +1 of each byte adds to a word, and to a byte by itself."""
