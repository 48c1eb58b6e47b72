"""What regions and copies mean, said in numpy: the independent side of the arithmetic's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from lading.regions import Copy, Region

Ints = npt.NDArray[np.int64]


def numbered(shape: tuple[int, ...]) -> Ints:
    """A tensor whose elements are their own row-major positions."""
    return np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def index_of(region: Region) -> Any:
    """The region as a numpy index: one array of positions a dim."""
    dims = zip(region.start, region.size, region.step, strict=True)
    return np.ix_(*(start + step * np.arange(size) for start, size, step in dims))


def take(array: Ints, region: Region) -> Ints:
    """The region's elements of an array that has as many elements as the region's tensor."""
    found: Ints = array.reshape(region.shape)[index_of(region)]
    return found


def positions(region: Region) -> list[int]:
    """The row-major positions of the region's elements, in the region's own order."""
    return [int(n) for n in take(numbered(region.shape), region).ravel()]


def run(copy: Copy, source: Ints, target: Ints) -> None:
    """Does a copy."""
    values = take(source, copy.source_region)
    if copy.axes:
        values = values.transpose(copy.axes)
    target.reshape(copy.target_region.shape)[index_of(copy.target_region)] = values


@st.composite
def shapes(draw: Callable[..., Any], max_dims: int = 3) -> tuple[int, ...]:
    """Shapes of up to `max_dims` dims; 0-d ones and empty ones, too."""
    size = st.integers(0, 9) if draw(st.integers(0, 9)) == 0 else st.integers(1, 9)
    return tuple(draw(st.lists(size, max_size=max_dims)))


@st.composite
def regions(draw: Callable[..., Any], shape: tuple[int, ...]) -> Region:
    """Strided boxes of a tensor; empty ones, and steps that a size of 1 never takes."""
    start, size, step = [], [], []
    for n in shape:
        first = draw(st.integers(0, n))
        stride = draw(st.integers(1, 5))
        most = -(-(n - first) // stride)
        fewest = 0 if draw(st.integers(0, 9)) == 0 else min(1, most)
        start.append(first)
        size.append(draw(st.integers(fewest, most)))
        step.append(stride)
    return Region(shape=shape, start=tuple(start), size=tuple(size), step=tuple(step))


@st.composite
def copies(
    draw: Callable[..., Any], source: str, target: str, shape: tuple[int, ...] | None = None
) -> Copy:
    """Copies with any order of dims; from a tensor of `shape` where that is given."""
    region = draw(regions(draw(shapes()) if shape is None else shape))
    axes = tuple(draw(st.permutations(range(len(region.shape)))))
    size, start, step, full = [], [], [], []
    for axis in axes:
        n = region.size[axis]
        stride = draw(st.integers(1, 3))
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        size.append(n)
        start.append(before)
        step.append(stride)
        full.append(before + max(n - 1, 0) * stride + bool(n) + after)
    return Copy(
        source=source,
        target=target,
        part=None,
        source_region=region,
        target_region=Region(
            shape=tuple(full), start=tuple(start), size=tuple(size), step=tuple(step)
        ),
        axes=() if axes == tuple(range(len(axes))) and draw(st.booleans()) else axes,
    )
