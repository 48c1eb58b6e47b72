"""Regions and copies against numpy index arrays, over boxes of every kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.regions import Copy, Region, cover, merge, partition, reordered

from .oracles import copies, index_of, numbered, positions, regions, run, shapes, take

FEW = settings(max_examples=150, deadline=None)


def region(shape: tuple[int, ...], *spans: tuple[int, int, int]) -> Region:
    """A region of (start, size, step) a dim."""
    start, size, step = zip(*spans, strict=True) if spans else ((), (), ())
    return Region(shape=shape, start=start, size=size, step=step)


@st.composite
def pairs(draw: Callable[..., Any]) -> tuple[Region, Region]:
    shape = draw(shapes())
    return draw(regions(shape)), draw(regions(shape))


@st.composite
def nested(draw: Callable[..., Any]) -> tuple[Region, Region]:
    outer = draw(regions(draw(shapes())))
    return outer, draw(regions(outer.size))


@dataclass(frozen=True)
class Printed:
    id: str
    region: Region
    text: str


PRINTED = [
    Printed("box", region((8, 6), (2, 4, 1), (0, 6, 1)), "[2:6, 0:6]"),
    Printed("every second", region((8, 6), (1, 4, 2), (0, 6, 1)), "[1:8:2, 0:6]"),
    Printed("one row, whatever its step", region((8,), (3, 1, 5)), "[3:4]"),
    Printed("empty", region((8,), (3, 0, 1)), "[3:3]"),
    Printed("0-d", region(()), "[]"),
]


@pytest.mark.parametrize("case", PRINTED, ids=lambda case: case.id)
def test_printed(case: Printed) -> None:
    assert str(case.region) == case.text


@dataclass(frozen=True)
class Fails:
    id: str
    make: Callable[[], object]
    text: str


WHOLE = Region.whole((4, 6))
FAILS = [
    Fails(
        "numbers of dims",
        lambda: Region(shape=(4, 6), start=(0,), size=(4, 6), step=(1, 1)),
        "region of 2 dims has (0,), (4, 6), (1, 1)",
    ),
    Fails(
        "past the end",
        lambda: region((4, 6), (1, 4, 1), (0, 6, 1)),
        "region [1:5, 0:6] leaves the tensor of shape [4, 6]",
    ),
    Fails(
        "steps past the end",
        lambda: region((8,), (1, 4, 3)),
        "region [1:11:3] leaves the tensor of shape [8]",
    ),
    Fails(
        "nothing, behind the end",
        lambda: region((4,), (5, 0, 1)),
        "region [5:5] leaves the tensor of shape [4]",
    ),
    Fails(
        "before the start",
        lambda: Region.box((4,), [(-1, 2)]),
        "region [-1:2] leaves the tensor of shape [4]",
    ),
    Fails(
        "negative size",
        lambda: Region.box((4,), [(2, 1)]),
        "region [2:1] leaves the tensor of shape [4]",
    ),
    Fails(
        "step 0",
        lambda: region((4,), (0, 1, 0)),
        "region [0:1] leaves the tensor of shape [4]",
    ),
    Fails(
        "intersection in two tensors",
        lambda: WHOLE.intersect(Region.whole((6, 4))),
        "regions of different tensors: [4, 6], [6, 4]",
    ),
    Fails(
        "inside of another tensor",
        lambda: WHOLE.inside(Region.whole((6, 4))),
        "regions of different tensors: [4, 6], [6, 4]",
    ),
    Fails(
        "not inside",
        lambda: region((9,), (0, 4, 2)).inside(region((9,), (1, 4, 2))),
        "region [0:7:2] is not inside [1:8:2]",
    ),
    Fails(
        "partly inside",
        lambda: region((9,), (0, 4, 1)).inside(region((9,), (1, 4, 1))),
        "region [0:4] is not inside [1:5]",
    ),
    Fails(
        "composed with a region of another box",
        lambda: WHOLE.compose(Region.whole((6, 4))),
        "a region of [6, 4] inside a box of [4, 6]",
    ),
    Fails(
        "covering another tensor",
        lambda: cover((4, 5), [WHOLE]),
        "region of [4, 6] in a tensor of [4, 5]",
    ),
    Fails(
        "copy of other sizes",
        lambda: Copy(
            source="a",
            target="b",
            part=None,
            source_region=WHOLE,
            target_region=Region.whole((6, 4)),
        ),
        "copy of [0:4, 0:6] into [0:6, 0:4]: sizes differ",
    ),
    Fails(
        "axes that are none",
        lambda: Copy(
            source="a",
            target="b",
            part=None,
            source_region=WHOLE,
            target_region=WHOLE,
            axes=(0, 2),
        ),
        "axes (0, 2) are no permutation of [0:4, 0:6]'s dims",
    ),
    Fails(
        "copy after a copy to elsewhere",
        lambda: whole_copy("a", "b").then(whole_copy("c", "d")),
        "'c' is not the target of the first copy, 'b'",
    ),
]


def whole_copy(source: str, target: str) -> Copy:
    return Copy(source=source, target=target, part=None, source_region=WHOLE, target_region=WHOLE)


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused(case: Fails) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the text is compared below
        case.make()
    assert str(caught.value) == case.text


def test_whole_and_box() -> None:
    assert Region.box((4, 6), [(0, 4), (0, 6)]) == WHOLE
    assert (WHOLE.num_elements, WHOLE.is_whole) == (24, True)
    box = Region.box((4, 6), [(1, 3), (0, 6)])
    assert (box.num_elements, box.is_whole) == (12, False)
    assert (Region.whole(()).num_elements, Region.whole(()).is_whole) == (1, True)


@FEW
@given(pairs())
def test_intersect(pair: tuple[Region, Region]) -> None:
    one, two = pair
    both = one.intersect(two)
    common = set(positions(one)) & set(positions(two))
    assert common == (set() if both is None else set(positions(both)))
    assert both is None or both.num_elements, "None, not a region of nothing"


@FEW
@given(nested())
def test_compose_takes_from_what_was_taken(pair: tuple[Region, Region]) -> None:
    outer, inner = pair
    whole = numbered(outer.shape)
    np.testing.assert_array_equal(
        take(whole, outer.compose(inner)), take(take(whole, outer), inner)
    )


@FEW
@given(nested())
def test_inside_is_the_way_back_of_compose(pair: tuple[Region, Region]) -> None:
    outer, inner = pair
    back = outer.compose(inner).inside(outer)
    assert (back.shape, back.size) == (inner.shape, inner.size)
    assert positions(back) == positions(inner)


def test_inside_of_a_step_that_is_never_taken() -> None:
    # compose used to leave such a step behind, and inside then found the region not inside.
    outer = region((8,), (0, 4, 2))
    one = outer.compose(region((4,), (2, 1, 1)))
    assert one == region((8,), (4, 1, 1))
    assert region((8,), (4, 1, 7)).inside(outer) == region((4,), (2, 1, 1))


def test_nothing_at_the_end_of_a_strided_box() -> None:
    outer = region((8,), (1, 4, 2))
    assert outer.compose(region((4,), (4, 0, 1))) == region((8,), (8, 0, 1))


@FEW
@given(st.data())
def test_runs(data: st.DataObject) -> None:
    found = data.draw(regions(data.draw(shapes())))
    runs = found.runs()
    offsets = list(runs.offsets())
    assert len(offsets) == runs.num_runs
    assert [at + i for at in offsets for i in range(runs.length)] == positions(found)
    # Longest: what lies in memory without a gap is one run. (Runs are of equal length, so two may
    # touch: [0:2, 0:6:5] of [2, 6] is 0, 5, 6, 11.)
    if all(b == a + 1 for a, b in pairwise(positions(found))):
        assert runs.num_runs * runs.length <= runs.length


@dataclass(frozen=True)
class Lies:
    id: str
    region: Region
    first: int
    length: int
    counts: tuple[int, ...]
    strides: tuple[int, ...]


LIES = [
    Lies("whole", WHOLE, 0, 24, (), ()),
    Lies("rows", region((4, 6), (1, 2, 1), (0, 6, 1)), 6, 12, (), ()),
    Lies("columns", region((4, 6), (0, 4, 1), (2, 3, 1)), 2, 3, (4,), (6,)),
    Lies("every second row", region((4, 6), (1, 2, 2), (0, 6, 1)), 6, 6, (2,), (12,)),
    Lies(
        "columns of rows of all heads, one grid",
        region((3, 4, 6), (0, 3, 1), (0, 4, 1), (2, 3, 1)),
        2,
        3,
        (12,),
        (6,),
    ),
    Lies(
        "rows and columns",
        region((3, 4, 6), (0, 3, 1), (1, 2, 1), (2, 3, 1)),
        8,
        3,
        (3, 2),
        (24, 6),
    ),
    Lies("0-d", region(()), 0, 1, (), ()),
]


@pytest.mark.parametrize("case", LIES, ids=lambda case: case.id)
def test_runs_of(case: Lies) -> None:
    runs = case.region.runs()
    found = (runs.first, runs.length, runs.counts, runs.strides)
    assert found == (case.first, case.length, case.counts, case.strides)


@FEW
@given(st.data())
def test_reordered(data: st.DataObject) -> None:
    found = data.draw(regions(data.draw(shapes())))
    order = tuple(data.draw(st.permutations(range(len(found.shape)))))
    turned = numbered(found.shape).transpose(order)
    np.testing.assert_array_equal(
        turned[index_of(reordered(found, order))],
        take(numbered(found.shape), found).transpose(order),
    )


@FEW
@given(st.data())
def test_cover(data: st.DataObject) -> None:
    shape = data.draw(shapes())
    boxes = data.draw(st.lists(regions(shape), max_size=6))
    assert_cover(shape, boxes)


@FEW
@given(st.data())
def test_cover_of_a_whole_that_was_cut(data: st.DataObject) -> None:
    """Random boxes hardly ever cover: cut a whole into boxes and strides, then perhaps break it."""
    shape = data.draw(shapes())
    boxes = [Region.whole(shape)]
    for _ in range(data.draw(st.integers(0, 5))):
        box = boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))
        boxes += data.draw(halves(box))
    assert_cover(shape, boxes)
    assert cover(shape, boxes).is_exact
    if boxes and boxes[0].num_elements:
        assert cover(shape, boxes[1:]).missing is not None
        assert cover(shape, [*boxes, boxes[0]]).twice is not None


@st.composite
def halves(draw: Callable[..., Any], box: Region) -> list[Region]:
    """A box as two: cut at a place, or dealt out by a stride."""
    dims = [dim for dim, n in enumerate(box.size) if n > 1]
    if not dims:
        return [box]
    dim = draw(st.sampled_from(dims))
    n = box.size[dim]
    at = draw(st.integers(1, n - 1))
    spans = [(0, n, 1) for n in box.size]
    cuts = [(0, at, 1), (at, n - at, 1)]
    if draw(st.booleans()):
        cuts = [(0, (n + 1) // 2, 2), (1, n // 2, 2)]
    return [
        box.compose(region(box.size, *spans[:dim], cut, *spans[dim + 1 :]))
        for cut in cuts
        if cut[1]
    ]


def assert_cover(shape: tuple[int, ...], boxes: list[Region]) -> None:
    found = cover(shape, boxes)
    count = Counter(at for box in boxes for at in positions(box))
    missing = set(range(numbered(shape).size)) - set(count)
    twice = {at for at, number in count.items() if number > 1}
    assert (found.missing is None) == (not missing)
    assert (found.twice is None) == (not twice)
    assert found.is_exact == (not missing and not twice)
    if found.missing is not None:
        assert set(positions(found.missing)) <= missing
        assert found.missing.num_elements
    if found.twice is not None:
        assert found.writers is not None
        assert found.twice.num_elements
        one, two = found.writers
        assert one != two
        both = set(positions(boxes[one])) & set(positions(boxes[two]))
        assert set(positions(found.twice)) <= both


def test_cover_names_the_box_and_the_writers() -> None:
    boxes = [Region.box((8, 6), [(0, 3), (0, 6)]), Region.box((8, 6), [(2, 7), (0, 6)])]
    found = cover((8, 6), boxes)
    assert found.missing == Region.box((8, 6), [(7, 8), (0, 6)])
    assert found.twice == Region.box((8, 6), [(2, 3), (0, 6)])
    assert found.writers == (0, 1)


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_cover_of_nothing(shape: tuple[int, ...]) -> None:
    assert cover(shape, []).is_exact
    assert cover(shape, [Region.whole(shape)] * 2).is_exact


def test_cover_of_a_scalar() -> None:
    assert cover((), []).missing == region(())
    assert cover((), [region(())]).is_exact
    assert cover((), [region(())] * 2).writers == (0, 1)


@FEW
@given(copies("a", "b"))
def test_invert(copy: Copy) -> None:
    source = numbered(copy.source_region.shape)
    target = np.full(copy.target_region.shape, -1)
    run(copy, source, target)
    back = np.full(source.shape, -1)
    run(copy.invert(), target, back)
    np.testing.assert_array_equal(take(back, copy.source_region), take(source, copy.source_region))
    assert (back >= 0).sum() == copy.source_region.num_elements
    assert copy.invert().invert() == copy
    assert (copy.invert().source, copy.invert().target) == ("b", "a")


@FEW
@given(st.data())
def test_restrict(data: st.DataObject) -> None:
    copy = data.draw(copies("a", "b"))
    box = data.draw(regions(copy.target_region.shape))
    source = numbered(copy.source_region.shape)
    wanted = np.full(copy.target_region.shape, -1)
    run(copy, source, wanted)
    outside = np.full(wanted.shape, True)
    outside[index_of(box)] = False
    wanted[outside] = -1
    found = np.full(wanted.shape, -1)
    share = copy.restrict(box)
    if share is not None:
        run(share, source, found)
    np.testing.assert_array_equal(found, wanted)
    assert (share is None) == (not (wanted >= 0).any())


@FEW
@given(st.data())
def test_then(data: st.DataObject) -> None:
    first = data.draw(copies("a", "b"))
    after = data.draw(copies("b", "c", first.target_region.shape))
    source = numbered(first.source_region.shape)
    middle = np.full(first.target_region.shape, -1)
    run(first, source, middle)
    wanted = np.full(after.target_region.shape, -1)
    run(after, middle, wanted)
    found = np.full(wanted.shape, -1)
    both = first.then(after)
    if both is not None:
        assert (both.source, both.target) == ("a", "c")
        run(both, source, found)
    np.testing.assert_array_equal(found, wanted)
    assert (both is None) == (not (wanted >= 0).any())


@pytest.mark.parametrize("after", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("first", list(permutations(range(3))), ids=str)
def test_then_of_permutations(first: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Orders of three dims do not commute, and random ones hardly ever show it."""

    def turn(source: str, target: str, shape: tuple[int, ...], axes: tuple[int, ...]) -> Copy:
        turned = tuple(shape[axis] for axis in axes)
        return Copy(
            source=source,
            target=target,
            part=None,
            source_region=Region.whole(shape),
            target_region=Region.whole(turned),
            axes=axes,
        )

    one = turn("a", "b", (2, 3, 4), first)
    both = one.then(turn("b", "c", one.target_region.size, after))
    assert both is not None
    source = numbered((2, 3, 4))
    found = np.full(both.target_region.shape, -1)
    run(both, source, found)
    np.testing.assert_array_equal(found, source.transpose(first).transpose(after))


def test_then_keeps_what_passes_through() -> None:
    def copy(source: str, target: str, span: tuple[int, int]) -> Copy:
        box = Region.box((8,), [span])
        return Copy(source=source, target=target, part=None, source_region=box, target_region=box)

    both = copy("a", "b", (2, 6)).then(copy("b", "c", (4, 8)))
    assert both == copy("a", "c", (4, 6))
    assert copy("a", "b", (0, 4)).then(copy("b", "c", (4, 8))) is None


@FEW
@given(st.data())
def test_merge_does_the_same(data: st.DataObject) -> None:
    shape = data.draw(shapes(max_dims=2))
    boxes = [Region.whole(shape)]
    for _ in range(data.draw(st.integers(0, 5))):
        boxes += data.draw(halves(boxes.pop(data.draw(st.integers(0, len(boxes) - 1)))))
    pieces = [
        Copy(source="a", target="b", part=i, source_region=box, target_region=box)
        for i, box in enumerate(boxes)
    ]
    merged = merge(pieces)
    source = numbered(shape)
    target = np.full(shape, -1)
    for piece in merged:
        run(piece, source, target)
    np.testing.assert_array_equal(target, source)
    assert sum(piece.source_region.num_elements for piece in merged) == source.size
    assert len(merged) <= len(pieces)


def rows(
    start: int, stop: int, at: int, part: str = "q", *, source: str = "a", target: str = "b"
) -> Copy:
    """Rows start:stop of a source [12, 5] to rows at: of a target [9, 5]."""
    return Copy(
        source=source,
        target=target,
        part=part,
        source_region=Region.box((12, 5), [(start, stop), (0, 5)]),
        target_region=Region.box((9, 5), [(at, at + stop - start), (0, 5)]),
    )


def columns(start: int, stop: int) -> Copy:
    box = Region.box((4, 6), [(0, 4), (start, stop)])
    return Copy(source="a", target="b", part=None, source_region=box, target_region=box)


@dataclass(frozen=True)
class Merged:
    id: str
    copies: list[Copy]
    wanted: list[Copy]


MERGED = [
    Merged("neighbours", [rows(2, 4, 0), rows(4, 7, 2)], [rows(2, 7, 0)]),
    Merged("columns", [columns(0, 2), columns(2, 6)], [columns(0, 6)]),
    Merged("gap in the source", [rows(2, 4, 0), rows(5, 7, 2)], [rows(2, 4, 0), rows(5, 7, 2)]),
    Merged("gap in the target", [rows(2, 4, 0), rows(4, 7, 3)], [rows(2, 4, 0), rows(4, 7, 3)]),
    Merged("out of order", [rows(4, 7, 2), rows(2, 4, 0)], [rows(4, 7, 2), rows(2, 4, 0)]),
    Merged(
        "another source",
        [rows(2, 4, 0), rows(4, 7, 2, source="c")],
        [rows(2, 4, 0), rows(4, 7, 2, source="c")],
    ),
    Merged(
        "another target",
        [rows(2, 4, 0), rows(4, 7, 2, target="c")],
        [rows(2, 4, 0), rows(4, 7, 2, target="c")],
    ),
]


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.id)
def test_merged(case: Merged) -> None:
    assert merge(case.copies) == case.wanted


def test_merge_forgets_the_part_where_parts_are_joined() -> None:
    (joined,) = merge([rows(2, 4, 0, "q"), rows(4, 7, 2, "k")])
    assert joined.part is None
    assert joined.source_region == Region.box((12, 5), [(2, 7), (0, 5)])


# --------------------------------------------------------------------------------------- partition


@st.composite
def many(draw: Callable[..., Any]) -> tuple[tuple[int, ...], list[Region]]:
    shape = draw(shapes())
    return shape, draw(st.lists(regions(shape), max_size=5))


@FEW
@given(many())
def test_partition(drawn: tuple[tuple[int, ...], list[Region]]) -> None:
    """Each element's box names exactly the regions that have the element."""
    shape, of = drawn
    having: dict[int, list[int]] = {}
    for number, one in enumerate(of):
        for position in positions(one):
            having.setdefault(position, []).append(number)
    found: dict[int, list[int]] = {}
    for box, inside in partition(shape, of):
        assert box.shape == shape
        for position in positions(box):
            assert position not in found, "boxes are disjoint"
            found[position] = list(inside)
    assert found == having


def test_partition_of_ranks_that_share() -> None:
    rows = [region((8, 3), (start, size, 1), (0, 3, 1)) for start, size in ((0, 4), (2, 4), (2, 4))]
    assert [(str(box), inside) for box, inside in partition((8, 3), rows)] == [
        ("[0:2, 0:3]", (0,)),
        ("[2:4, 0:3]", (0, 1, 2)),
        ("[4:6, 0:3]", (1, 2)),
    ]


def test_partition_of_another_tensor() -> None:
    with pytest.raises(ValueError, match=r"region of \[8\] in a tensor of \[9\]"):
        partition((9,), [region((8,), (0, 4, 1))])
