"""Copies seen in other shapes, against numpy: the same elements go the same way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.regions import Copy, Region, cover
from lading.views import common_shape, ravel, seen_as, through, unravel

from .oracles import copies, numbered, regions, run

FEW = settings(max_examples=200, deadline=None)


@dataclass(frozen=True)
class Seen:
    id: str
    shapes: tuple[tuple[int, ...], ...]
    common: tuple[int, ...]


SEEN = [
    Seen("one", ((6, 4),), (6, 4)),
    Seen("equal, with dims of one", ((6, 1, 4), (6, 1, 4)), (6, 1, 4)),
    Seen("fused", ((6, 4), (3, 2, 4)), (3, 2, 4)),
    Seen("flattened", ((6, 4), (24,)), (6, 4)),
    Seen("three", ((12, 4), (3, 4, 4), (12, 2, 2)), (3, 4, 2, 2)),
    Seen("no common view", ((6, 4), (4, 6)), (24,)),
    Seen("a column", ((6, 1), (6,)), (6,)),
    Seen("a number", ((), (1,)), (1,)),
    Seen("a number in a number of dims", ((1, 1), (1,), ()), (1,)),
    Seen("nothing", ((0, 4), (0,)), (0,)),
]


@pytest.mark.parametrize("case", SEEN, ids=lambda case: case.id)
def test_common_shape(case: Seen) -> None:
    assert common_shape(case.shapes) == case.common
    assert common_shape(case.shapes[::-1]) == case.common


def test_shapes_of_different_tensors() -> None:
    with pytest.raises(ValueError, match=r"shapes \[6, 4\], \[5, 4\] of one tensor"):
        common_shape([(6, 4), (5, 4)])


def made(copy: Copy, source: Any) -> Any:
    target = np.full(copy.target_region.shape, -1)
    run(copy, source, target)
    return target


def check(copy: Copy, shape: tuple[int, ...]) -> tuple[Copy, ...]:
    found = seen_as(copy, shape)
    source = numbered(copy.source_region.shape)
    target = np.full(copy.target_region.shape, -1)
    for one in found:
        assert one.source_region.shape == shape
        run(one, source, target)
    np.testing.assert_array_equal(target, made(copy, source))
    assert cover(shape, [one.source_region for one in found]).twice is None
    assert sum(one.source_region.num_elements for one in found) == copy.source_region.num_elements
    return found


@st.composite
def split_copies(draw: Callable[..., Any]) -> tuple[Copy, tuple[int, ...]]:
    """A copy whose source's dims are products of small factors, and a shape of those factors."""
    factors = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), max_size=3))
    shape = tuple(prod(of_dim) for of_dim in factors)
    fine = common_shape([shape, tuple(n for of_dim in factors for n in of_dim)])
    return draw(copies("s", "t", shape)), fine


@FEW
@given(split_copies())
def test_a_finer_view(drawn: tuple[Copy, tuple[int, ...]]) -> None:
    check(*drawn)


@FEW
@given(split_copies())
def test_the_flat_view(drawn: tuple[Copy, tuple[int, ...]]) -> None:
    copy, _ = drawn
    check(copy, (prod(copy.source_region.shape),))


@FEW
@given(st.data())
def test_a_view_without_the_dims_of_one(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.sampled_from([1, 1, 3, 4]), min_size=1, max_size=4)))
    region = data.draw(regions(shape))
    copy = Copy(
        source="s",
        target="t",
        part=None,
        source_region=Region.whole(region.size),
        target_region=region,
    )
    plain = tuple(n for n in region.size if n != 1) or (prod(region.size),)
    check(copy, common_shape([region.size, plain]))


def test_whole_rows_stay_one_copy() -> None:
    """A fused [3*D, I] cut in its columns, seen as [3, D, I]: one copy, not three."""
    copy = Copy(
        source="s",
        target="t",
        part=None,
        source_region=Region.box((12, 6), [(0, 12), (2, 4)]),
        target_region=Region.whole((12, 2)),
    )
    (one,) = check(copy, (3, 4, 6))
    assert str(one.source_region) == "[0:3, 0:4, 2:4]"
    assert str(one.target_region) == "[0:3, 0:4, 0:2]"


@FEW
@given(copies("s", "t"))
def test_where_an_element_goes(copy: Copy) -> None:
    target = made(copy, numbered(copy.source_region.shape)).ravel()
    for at in range(prod(copy.source_region.shape)):
        place = through(copy, at)
        assert [place] == list(np.flatnonzero(target == at)) or (place is None and at not in target)


def test_positions_and_indices() -> None:
    array = numbered((3, 4, 5))
    assert all(ravel(index, (3, 4, 5)) == at for index, at in np.ndenumerate(array))
    assert [unravel(at, (3, 4, 5)) for at in range(60)] == list(np.ndindex(3, 4, 5))
    assert (ravel((), ()), unravel(0, ())) == (0, ())
