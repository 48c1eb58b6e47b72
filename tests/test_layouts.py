"""Layouts against numpy: index tensors cut with split, repeat and pad, for all of TP 1 to 16."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.errors import LayoutError
from lading.layouts import Axis, Cut, Layout, Part, PartName, entries, piece_of, span_of_piece
from lading.regions import Region, cover

from .oracles import Ints, index_of, numbered, take

PADDING = -2
SIZES = range(1, 17)


def cut(
    *parts: Part,
    grain: Fraction | int = 1,
    ragged: bool = False,
    straddle: bool = False,
    reason: str = "",
) -> Cut:
    grain = Fraction(grain)
    return Cut(axis=Axis(parts=parts), grain=grain, ragged=ragged, straddle=straddle, reason=reason)


def whole(size: int) -> Cut:
    """A dim that no rank cuts."""
    return cut(Part(size=size, max_pieces=1))


def sources_of(layout: Layout) -> dict[PartName, Ints]:
    """A checkpoint tensor for each part; no two elements of all of them are equal."""
    found: dict[PartName, Ints] = {}
    at = 0
    for name in layout.part_names:
        found[name] = numbered(layout.source_shape(name)) + at
        at += found[name].size
    return found


def local(layout: Layout, tp_rank: int, sources: dict[PartName, Ints], *, fused: bool) -> Ints:
    """What the placements of a rank make of the sources. Whatever they leave out is -1."""
    found = np.full(layout.local_shape, -1)
    for name, source in sources.items():
        placement = layout.place(name, tp_rank, fused_source=fused)
        if placement is not None:
            found[index_of(placement.target)] = take(source, placement.source)
    for box in layout.padding(tp_rank):
        assert box.num_elements, "padding is something"
        assert (take(found, box) == -1).all(), "nothing is copied to the padding"
        found[index_of(box)] = PADDING
    return found


def assert_same(layout: Layout, wanted: Callable[[dict[PartName, Ints], int], Ints]) -> None:
    """Every rank's parameter is `wanted`, from the parts one by one and from a fused tensor."""
    sources = sources_of(layout)
    dim = layout.fused_dim
    for rank in range(layout.tp_size):
        np.testing.assert_array_equal(
            local(layout, rank, sources, fused=False), wanted(sources, rank)
        )
        if dim is not None:
            side_by_side = np.concatenate(list(sources.values()), axis=dim)
            assert layout.fused_shape == side_by_side.shape
            fused = dict.fromkeys(sources, side_by_side)
            np.testing.assert_array_equal(
                local(layout, rank, fused, fused=True), wanted(sources, rank)
            )


def chunk(array: Ints, tp_size: int, tp_rank: int, axis: int = 0) -> Ints:
    return np.split(array, tp_size, axis=axis)[tp_rank]


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("sizes", [(48,), (240,), (48, 96), (240, 48, 144), (15, 30)], ids=str)
def test_column_and_merged_column(sizes: tuple[int, ...], tp_size: int) -> None:
    names: Sequence[PartName] = range(len(sizes)) if len(sizes) > 1 else [None]
    parts = [Part(name=n, size=s) for n, s in zip(names, sizes, strict=True)]

    def layout() -> Layout:
        return Layout(cuts=(cut(*parts), whole(5)), tp_size=tp_size)

    if any(size % tp_size for size in sizes):
        with pytest.raises(LayoutError):
            layout()
        return
    assert_same(
        layout(),
        lambda sources, rank: np.concatenate([chunk(s, tp_size, rank) for s in sources.values()]),
    )


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("size", [48, 3, 240], ids=str)
def test_row(size: int, tp_size: int) -> None:
    def layout() -> Layout:
        return Layout(cuts=(whole(5), cut(Part(size=size))), tp_size=tp_size)

    if size % tp_size:
        with pytest.raises(LayoutError):
            layout()
        return
    assert_same(layout(), lambda sources, rank: chunk(sources[None], tp_size, rank, axis=1))


def qkv(heads: int, kv_heads: int, head: int, tp_size: int, v_head: int | None = None) -> Layout:
    v_head = v_head or head
    q = Part(name="q", size=heads * head, unit=head, unit_name="q heads")
    k, v = (
        Part(name=n, size=kv_heads * d, max_pieces=kv_heads, unit=d, unit_name="KV heads")
        for n, d in (("k", head), ("v", v_head))
    )
    return Layout(cuts=(cut(q, k, v), whole(5)), tp_size=tp_size)


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head", "v_head"),
    [(16, 2, 4, 4), (3, 3, 2, 2), (6, 2, 4, 3), (15, 5, 2, 2), (48, 1, 2, 2)],
    ids=["16 and 2", "3 and 3", "6 and 2, smaller v", "15 and 5", "48 and 1"],
)
def test_qkv(heads: int, kv_heads: int, head: int, v_head: int, tp_size: int) -> None:
    kv_pieces = min(tp_size, kv_heads)
    if heads % tp_size or kv_heads % kv_pieces or tp_size % kv_pieces:
        with pytest.raises(LayoutError):
            qkv(heads, kv_heads, head, tp_size, v_head)
        return

    def wanted(sources: dict[PartName, Ints], rank: int) -> Ints:
        kept = [chunk(sources["q"], tp_size, rank)]
        for name in ("k", "v"):
            # What engines did before they shared heads: repeat each, then cut as if there were T.
            by_head = sources[name].reshape(kv_heads, -1, 5)
            repeated = np.repeat(by_head, tp_size // kv_pieces, axis=0)
            kept.append(chunk(repeated, tp_size, rank).reshape(-1, 5))
        return np.concatenate(kept)

    assert_same(qkv(heads, kv_heads, head, tp_size, v_head), wanted)


@pytest.mark.parametrize("tp_size", [8, 16])
def test_shared_kv_heads_lie_with_neighbours(tp_size: int) -> None:
    layout = qkv(16, 2, 4, tp_size)
    assert layout.local_shape == (16 // tp_size * 4 + 4 + 4, 5)
    for rank in range(tp_size):
        placement = layout.place("k", rank)
        assert placement is not None
        head = rank // (tp_size // 2)
        assert placement.source == Region.box((8, 5), [(4 * head, 4 * head + 4), (0, 5)])


@pytest.mark.parametrize("pad_to", [1, 4, 64])
@pytest.mark.parametrize("tp_size", SIZES)
def test_padded_vocabulary(tp_size: int, pad_to: int) -> None:
    layout = Layout(cuts=(cut(Part(size=101, pad_to=pad_to)), whole(4)), tp_size=tp_size)
    rows = next(n for n in range(101, 5000) if n % pad_to == 0 and n % tp_size == 0)
    assert layout.local_shape == (rows // tp_size, 4)
    assert layout.source_shape() == (101, 4)

    def wanted(sources: dict[PartName, Ints], rank: int) -> Ints:
        padded = np.pad(sources[None], ((0, rows - 101), (0, 0)), constant_values=PADDING)
        return chunk(padded, tp_size, rank)

    assert_same(layout, wanted)


@pytest.mark.parametrize(
    ("tp_size", "empty_ranks"),
    [(3, [2]), (5, [4]), (7, [4, 5, 6])],
    ids=["TP 3", "TP 5", "TP 7"],
)
def test_ranks_with_nothing_but_padding(tp_size: int, empty_ranks: list[int]) -> None:
    layout = Layout(cuts=(cut(Part(size=101, pad_to=32)), whole(4)), tp_size=tp_size)
    found = [rank for rank in range(tp_size) if layout.place(None, rank) is None]
    assert found == empty_ranks
    for rank in empty_ranks:
        assert layout.padding(rank) == (Region.whole(layout.local_shape),)


@pytest.mark.parametrize("tp_size", SIZES)
def test_padded_parts(tp_size: int) -> None:
    """Two padded parts: each is padded by itself, so the padding lies in the middle, too."""
    parts = [Part(name=n, size=s, pad_to=4) for n, s in (("a", 10), ("b", 101))]
    layout = Layout(cuts=(cut(*parts), whole(3)), tp_size=tp_size)

    def wanted(sources: dict[PartName, Ints], rank: int) -> Ints:
        kept = []
        for source in sources.values():
            rows = -(-len(source) // math.lcm(4, tp_size)) * math.lcm(4, tp_size)
            widths = ((0, rows - len(source)), (0, 0))
            kept.append(chunk(np.pad(source, widths, constant_values=PADDING), tp_size, rank))
        return np.concatenate(kept)

    assert_same(layout, wanted)


def entries_of(elements: Ints, grain: Fraction) -> list[int]:
    """The stored entries of some logical elements, by looking at each element.

    `grain.numerator` elements and `grain.denominator` entries are one group, on their own.
    """
    groups = dict.fromkeys(int(x) // grain.numerator for x in elements)
    return [group * grain.denominator + i for group in groups for i in range(grain.denominator)]


GRAINS = [Fraction(1), Fraction(8), Fraction(32, 3), Fraction(1, 2), Fraction(16, 5)]


@pytest.mark.parametrize("tp_size", SIZES)
@pytest.mark.parametrize("grain", GRAINS, ids=str)
def test_grains(grain: Fraction, tp_size: int) -> None:
    """Parts of 16 and of 2 units of 32 columns, by the elements that each rank keeps."""
    q = Part(name="q", size=512, unit=32)
    k = Part(name="k", size=64, unit=32, max_pieces=2)

    def layout() -> Layout:
        return Layout(cuts=(whole(3), cut(q, k, grain=grain)), tp_size=tp_size)

    if 16 % tp_size:
        with pytest.raises(LayoutError):
            layout()
        return

    def wanted(sources: dict[PartName, Ints], rank: int) -> Ints:
        logical_q = chunk(np.arange(512), tp_size, rank)
        pieces = min(tp_size, 2)
        logical_k = chunk(np.arange(64), pieces, rank * pieces // tp_size)
        kept = [
            sources[name][:, entries_of(elements, grain)]
            for name, elements in (("q", logical_q), ("k", logical_k))
        ]
        return np.concatenate(kept, axis=1)

    assert layout().source_shape("q") == (3, int(512 / grain))
    assert_same(layout(), wanted)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 300, 512], ids=str)
def test_ragged_blocks_of_one_rank(size: int) -> None:
    """A scale for each 128 columns: the last one covers what is left, at TP 1 and on each rank."""
    blocks = len({x // 128 for x in range(size)})
    for tp_size in (1, 3):
        parts = Part(size=size, max_pieces=1)
        layout = Layout(cuts=(whole(3), cut(parts, grain=128, ragged=True)), tp_size=tp_size)
        assert layout.source_shape() == layout.local_shape == (3, blocks)
        assert_same(layout, lambda sources, rank: sources[None])


def test_ragged_blocks_of_parts_side_by_side() -> None:
    parts = [Part(name="a", size=200), Part(name="b", size=300)]
    layout = Layout(cuts=(cut(*parts, grain=128, ragged=True),))
    assert [layout.source_shape(n) for n in ("a", "b")] == [(2,), (3,)]
    assert layout.local_shape == (5,)
    sources = sources_of(layout)
    np.testing.assert_array_equal(local(layout, 0, sources, fused=False), np.arange(5))
    # On disk as one tensor, the block that has the end of a and the start of b belongs to neither.
    with pytest.raises(LayoutError) as caught:
        layout.place("b", 0, fused_source=True)
    assert (
        str(caught.value) == "element 200 is inside a stored entry: one entry covers 128 elements."
    )


def test_ragged_blocks_of_a_padded_part() -> None:
    """101 rows are 4 blocks of 32; 128 with the padding, so each of 2 ranks has 2 of them."""
    layout = Layout(
        cuts=(cut(Part(size=101, pad_to=64), grain=32, ragged=True), whole(2)), tp_size=2
    )
    assert (layout.source_shape(), layout.local_shape) == ((4, 2), (2, 2))
    assert_same(layout, lambda sources, rank: chunk(sources[None], 2, rank))


@pytest.mark.parametrize("fused", [False, True], ids=["parts", "fused"])
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("grain", [1, 5, 8, 128])
def test_straddling_blocks(grain: int, tp_size: int, fused: bool) -> None:
    """Each rank has, for each of its elements, the entry that the checkpoint has for it."""
    parts = [Part(name="a", size=36), Part(name="b", size=60), Part(name="c", size=2, max_pieces=1)]
    along = cut(*parts, grain=grain, ragged=True, straddle=True)
    layout = Layout(cuts=(whole(2), along), tp_size=tp_size, fused_source=fused)
    sources = sources_of(layout)
    base = dict.fromkeys("abc", 0)
    if fused:
        everything = numbered(layout.fused_shape)
        assert everything.shape == (2, -(-98 // grain))
        sources, base = dict.fromkeys("abc", everything), {"a": 0, "b": 36, "c": 96}
    for rank in range(tp_size):
        found = local(layout, rank, sources, fused=fused)
        at = 0
        for part in parts:
            pieces = min(tp_size, part.max_pieces or tp_size)
            kept = chunk(np.arange(part.size), pieces, rank * pieces // tp_size)
            offset = layout.offset(part.name, rank, 1)
            source = sources[part.name]
            for column, element in enumerate(kept + base[str(part.name)]):
                mine = found[:, at + (offset + column) // grain]
                np.testing.assert_array_equal(mine, source[:, element // grain])
            # As few entries as the rank that needs the most of them.
            all_kept = np.split(np.arange(part.size) + base[str(part.name)], pieces)
            at += max(len(set(piece // grain)) for piece in all_kept)
        assert found.shape == (2, at)
    assert layout.shares_entries


def test_straddling_blocks_of_a_padded_part() -> None:
    """101 rows padded to 128, 64 a rank, in 5 blocks of 24: rank 1 needs 2:5, both keep 3."""
    along = cut(Part(size=101, pad_to=128), grain=24, ragged=True, straddle=True)
    layout = Layout(cuts=(along,), tp_size=2)
    sources = sources_of(layout)
    np.testing.assert_array_equal(local(layout, 0, sources, fused=False), [0, 1, 2])
    np.testing.assert_array_equal(local(layout, 1, sources, fused=False), [2, 3, 4])
    assert [layout.offset(None, rank, 0) for rank in range(2)] == [0, 64 - 2 * 24]
    empty = Layout(cuts=(along,), tp_size=8)
    assert empty.place(None, 7) is None
    np.testing.assert_array_equal(local(empty, 7, sources, fused=False), [PADDING, PADDING])


def test_straddling_blocks_know_how_their_parts_are_stored() -> None:
    parts = [Part(name="a", size=36), Part(name="b", size=60)]
    layout = Layout(cuts=(cut(*parts, grain=8, straddle=True, ragged=True),), tp_size=2)
    with pytest.raises(LayoutError) as caught:
        layout.place("b", 0, fused_source=True)
    assert str(caught.value) == (
        "part 'b': was declared for parts that are stored each by itself, the checkpoint stores "
        "them side by side."
    )


def test_one_number_for_all_parts() -> None:
    """A scale of each part; on disk fused, it is one number, which every part gets."""
    parts = tuple(Part(name=n, size=1, max_pieces=1) for n in "ab")
    layout = Layout(cuts=(Cut(axis=Axis(parts=parts, scalars=True)),), tp_size=3)
    assert (layout.local_shape, layout.fused_shape) == ((2,), (1,))
    both: dict[PartName, Ints] = dict.fromkeys("ab", np.array([7]))
    np.testing.assert_array_equal(local(layout, 2, both, fused=True), [7, 7])
    one_each: dict[PartName, Ints] = {"a": np.array([7]), "b": np.array([8])}
    np.testing.assert_array_equal(local(layout, 2, one_each, fused=False), [7, 8])


def test_scale_repeated_on_every_rank() -> None:
    layout = Layout.replicated((3, 7), tp_size=5)
    assert layout.local_shape == layout.source_shape() == (3, 7)
    assert_same(layout, lambda sources, rank: sources[None])


def test_scalar() -> None:
    layout = Layout.replicated((), tp_size=3)
    assert layout.local_shape == layout.source_shape() == layout.fused_shape == ()
    placement = layout.place(None, 2)
    assert placement is not None
    assert placement.source == placement.target == Region.whole(())


def test_part_of_nothing() -> None:
    layout = Layout(cuts=(cut(Part(size=0)), whole(3)), tp_size=2)
    placement = layout.place(None, 1)
    assert placement is not None
    assert placement.target == Region.whole((0, 3))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_permuted(order: tuple[int, int]) -> None:
    layout = qkv(6, 2, 4, 2)
    turned = layout.permuted(order)
    assert turned.local_shape == tuple(layout.local_shape[i] for i in order)
    assert turned.fused_dim == order.index(0)
    sources = sources_of(layout)
    for rank in range(2):
        np.testing.assert_array_equal(
            local(turned, rank, {n: s.transpose(order) for n, s in sources.items()}, fused=False),
            local(layout, rank, sources, fused=False).transpose(order),
        )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_layout_covers_or_is_refused(data: st.DataObject) -> None:
    """Each element of each parameter once, each of the checkpoint somewhere."""
    tp_size = data.draw(st.integers(1, 8))
    grain = data.draw(st.sampled_from([*GRAINS, Fraction(3)]))
    pads = data.draw(st.sampled_from([0, 0, 1, 8]))
    straddle = grain.denominator == 1 and data.draw(st.booleans())
    is_ragged = straddle or data.draw(st.booleans())
    parts = [
        Part(
            name=i,
            size=data.draw(st.integers(1, 40)) * data.draw(st.sampled_from([1, 4, 32, 96])),
            max_pieces=data.draw(st.sampled_from([None, 1, 2, 4])),
            pad_to=pads,
        )
        for i in range(data.draw(st.integers(1, 3)))
    ]
    try:
        layout = Layout(
            cuts=(whole(2), cut(*parts, grain=grain, ragged=is_ragged, straddle=straddle)),
            tp_size=tp_size,
        )
    except LayoutError:
        return
    kept: dict[PartName, set[Region]] = {name: set() for name in layout.part_names}
    for rank in range(tp_size):
        placements = {name: layout.place(name, rank) for name in layout.part_names}
        written = [p.target for p in placements.values() if p is not None]
        assert cover(layout.local_shape, [*written, *layout.padding(rank)]).is_exact
        for name, placement in placements.items():
            if placement is not None:
                kept[name].add(placement.source)
    for name, regions in kept.items():
        coverage = cover(layout.source_shape(name), sorted(regions, key=str))
        assert coverage.missing is None
        assert coverage.twice is None or straddle


@dataclass(frozen=True)
class Refused:
    """`make` raises `text` for `tp_size`; it takes the sizes that the text suggests, no others."""

    id: str
    make: Callable[[int], object]
    tp_size: int
    text: str


def tiled(size: int, align: int, reason: str) -> Cut:
    return Cut(axis=Axis.of(size), align=align, align_reason=reason)


INT4 = "int4 packs 8 rows per int32 entry"
REFUSED = [
    Refused(
        "rows",
        lambda t: Layout(cuts=(cut(Part(size=800)), whole(4)), tp_size=t),
        3,
        "TP 3 does not cut 800 rows into 3 equal pieces: 800 = 3 * 266 + 2. "
        "Try: TP 1, 2, 4, 5 or 8.",
    ),
    Refused(
        "columns",
        lambda t: Layout(cuts=(whole(4), cut(Part(size=6))), tp_size=t),
        4,
        "TP 4 does not cut 6 columns into 4 equal pieces: 6 = 4 * 1 + 2. Try: TP 1, 2, 3 or 6.",
    ),
    Refused(
        "one size",
        lambda t: Layout(cuts=(cut(Part(size=11)),), tp_size=t),
        5,
        "TP 5 does not cut 11 rows into 5 equal pieces: 11 = 5 * 2 + 1. Try: TP 1.",
    ),
    Refused(
        "3 heads",
        lambda t: qkv(3, 3, 4, t),
        2,
        "part 'q': TP 2 does not cut 3 q heads into 2 equal pieces: 3 = 2 * 1 + 1. Try: TP 1 or 3.",
    ),
    Refused(
        "heads that KV heads do not allow: 3 divides 6 q heads, but 2 KV heads are not shared by 3",
        lambda t: qkv(6, 2, 4, t),
        4,
        "part 'q': TP 4 does not cut 6 q heads into 4 equal pieces: 6 = 4 * 1 + 2. "
        "Try: TP 1, 2 or 6.",
    ),
    Refused(
        "KV heads that do not divide",
        lambda t: qkv(24, 6, 4, t),
        4,
        "part 'k': TP 4 does not cut 6 KV heads into 4 equal pieces: 6 = 4 * 1 + 2. "
        "Try: TP 1, 2, 3 or 6.",
    ),
    Refused(
        "KV heads that are not shared equally",
        lambda t: qkv(30, 2, 4, t),
        5,
        "part 'k': TP 5 does not share 2 KV heads among neighbouring ranks: 5 = 2 * 2 + 1. "
        "Try: TP 1, 2 or 6.",
    ),
    Refused(
        "packed rows",
        lambda t: Layout(cuts=(cut(Part(size=800), grain=8, reason=INT4), whole(4)), tp_size=t),
        8,
        "TP 8 cuts 800 rows into 100 per rank; int4 packs 8 rows per int32 entry and "
        "100 = 12 * 8 + 4. Try: TP 1, 2, 4 or 5.",
    ),
    Refused(
        "packed rows of one rank",
        lambda t: Layout(cuts=(cut(Part(size=801), grain=8, reason=INT4), whole(4)), tp_size=t),
        1,
        "has 801 rows; int4 packs 8 rows per int32 entry and 801 = 100 * 8 + 1.",
    ),
    Refused(
        "3-bit",
        lambda t: Layout(cuts=(whole(4), cut(Part(size=96), grain=Fraction(32, 3))), tp_size=t),
        2,
        "TP 2 cuts 96 columns into 48 per rank; one stored entry covers 32/3 columns and "
        "48 = 1 * 32 + 16. Try: TP 1 or 3.",
    ),
    Refused(
        "blocks that are cut",
        lambda t: Layout(cuts=(whole(4), cut(Part(size=640), grain=128, ragged=True)), tp_size=t),
        2,
        "TP 2 cuts 640 columns into 320 per rank; one stored entry covers 128 columns and "
        "320 = 2 * 128 + 64. Try: TP 1 or 5.",
    ),
    Refused(
        "packed rows of which the padding is a whole number, but not the vocabulary",
        lambda t: Layout(
            cuts=(cut(Part(size=101, pad_to=64), grain=8, reason=INT4), whole(4)), tp_size=t
        ),
        2,
        "has 101 rows; int4 packs 8 rows per int32 entry and 101 = 12 * 8 + 5.",
    ),
    Refused(
        "tiles",
        lambda t: Layout(cuts=(tiled(192, 64, "Marlin tiles hold 64 rows"),), tp_size=t),
        2,
        "TP 2 cuts 192 rows into 96 per rank; Marlin tiles hold 64 rows and 96 = 1 * 64 + 32. "
        "Try: TP 1 or 3.",
    ),
    Refused(
        "tiles without a reason",
        lambda t: Layout(cuts=(tiled(192, 64, ""),), tp_size=t),
        4,
        "TP 4 cuts 192 rows into 48 per rank; pieces are multiples of 64 and 48 = 0 * 64 + 48. "
        "Try: TP 1 or 3.",
    ),
    Refused(
        "more ranks than the suggestions of 8 reach",
        lambda t: Layout(cuts=(cut(Part(size=36)),), tp_size=t),
        24,
        "TP 24 does not cut 36 rows into 24 equal pieces: 36 = 24 * 1 + 12. "
        "Try: TP 1, 2, 3, 4, 6, 9, 12 or 18.",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused(case: Refused) -> None:
    with pytest.raises(LayoutError) as caught:
        case.make(case.tp_size)
    assert str(caught.value) == case.text


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_the_suggested_sizes_are_those_that_work(case: Refused) -> None:
    def works(tp_size: int) -> bool:
        try:
            case.make(tp_size)
        except LayoutError:
            return False
        return True

    hint = case.text.partition("Try: TP ")[2]
    suggested = [int(n) for n in re.findall(r"\d+", hint)]
    assert suggested == [t for t in range(1, max(8, case.tp_size) + 1) if works(t)]


@dataclass(frozen=True)
class Fails:
    id: str
    make: Callable[[], object]
    text: str


FAILS = [
    Fails(
        "negative part",
        lambda: Part(name="q", size=-1),
        "part 'q': part of -1 elements in units of 1, needs positive numbers.",
    ),
    Fails(
        "no pieces",
        lambda: Part(size=4, max_pieces=0),
        "has 0 pieces, needs at least 1.",
    ),
    Fails(
        "half a head",
        lambda: Part(name="q", size=10, unit=4, unit_name="q heads"),
        "part 'q': has 10 elements, needs a multiple of 4 (one of its q heads).",
    ),
    Fails(
        "padding of half a unit",
        lambda: Part(name="q", size=8, unit=4, pad_to=6),
        "part 'q': is padded to a multiple of 6 elements, needs a multiple of 4 "
        "(one of its units).",
    ),
    Fails("no part", lambda: Axis(parts=()), "an axis has no part, needs at least one."),
    Fails(
        "a name twice",
        lambda: Axis(parts=(Part(name="q", size=4), Part(name="q", size=8))),
        "part 'q': is the name of two parts, needs to be that of one.",
    ),
    Fails(
        "grain of nothing",
        lambda: cut(Part(size=4), grain=0),
        "has a grain of 0, needs a positive number.",
    ),
    Fails(
        "straddling halves",
        lambda: cut(Part(size=4), grain=Fraction(3, 2), straddle=True),
        "straddles with a grain of 3/2, needs a whole number.",
    ),
    Fails(
        "tiles of nothing",
        lambda: tiled(4, 0, ""),
        "has pieces that are multiples of 0, needs at least 1.",
    ),
    Fails(
        "two fused dims",
        lambda: Layout(cuts=(cut(Part(name=0, size=4), Part(name=1, size=4)),) * 2),
        "dims [0, 1] both have several parts, needs at most one such dim.",
    ),
    Fails(
        "two padded dims",
        lambda: Layout(cuts=(cut(Part(size=4, pad_to=8)),) * 2),
        "dims [0, 1] are both padded, needs at most one such dim.",
    ),
    Fails(
        "no ranks",
        lambda: Layout(cuts=(whole(4),), tp_size=0),
        "tp_size is 0, needs at least 1.",
    ),
    Fails(
        "no such part",
        lambda: qkv(3, 3, 4, 1).source_shape("o"),
        "has no part 'o', needs one of: 'q', 'k', 'v'.",
    ),
    Fails(
        "a part of what has one",
        lambda: Layout.replicated((4,)).place("q", 0),
        "has no part 'q', needs one of: none.",
    ),
    Fails(
        "unequal pieces",
        lambda: span_of_piece(10, 4, 0),
        "10 elements are not 4 equal pieces: 10 = 4 * 2 + 2.",
    ),
    Fails(
        "inside an entry",
        lambda: entries(8, 20, cut(Part(size=24), grain=8, reason=INT4), 24),
        "element 20 is inside a stored entry: int4 packs 8 rows per int32 entry.",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_cannot_be(case: Fails) -> None:
    with pytest.raises(LayoutError) as caught:
        case.make()
    assert str(caught.value) == case.text


def test_place_of_a_rank_that_is_none() -> None:
    # The padded vocabulary of a rank too many used to be "nothing but padding".
    layout = Layout(cuts=(cut(Part(size=101, pad_to=64)),), tp_size=2)
    with pytest.raises(AssertionError, match="rank 2 of a layout for 2 ranks"):
        layout.place(None, 2)


def test_pieces_and_spans() -> None:
    assert [piece_of(rank, 6, 2) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert span_of_piece(12, 3, 2) == (8, 12)
    assert entries(32, 64, cut(Part(size=96), grain=Fraction(32, 3)), 96) == (3, 6)
    assert Axis.of(12, name="in_features").local_size(3) == 4
    assert Axis(parts=(Part(name=0, size=12), Part(name=1, size=6))).size == 18
    assert Part(size=101, pad_to=64).span(2, 3) == (128, 192)
