"""The sums against their definition in Python's integers; what a digest notices."""

from __future__ import annotations

import random
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.digests import sums as digests
from lading.digests.rows import splitmix64, tiles_of
from lading.digests.sums import Sums, TensorDigest, digest_of_bytes, hex_of, sums_of, total_of
from lading.dtypes import BITS
from lading.errors import CallError
from lading.regions import Region
from tests import oracles
from tests.digests import oracle

ITEM = {name: max(bits // 8, 1) for name, bits in BITS.items()}
WHOLE_BYTES = sorted(name for name in BITS if BITS[name] >= 8)
Bytes = npt.NDArray[np.uint8]


def random_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def width_of(dtype: str, shape: tuple[int, ...]) -> int:
    return oracle.width(shape[-1] * BITS[dtype] // 8 if shape else None)


def elements(raw: bytes, item: int, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.frombuffer(raw, f"u{item}").reshape(shape)


def places(region: Region, item: int) -> list[int]:
    """The positions of the region's bytes in its tensor."""
    return [at * item + i for at in oracles.positions(region) for i in range(item)]


def test_the_generator_is_splitmix64() -> None:
    """The first outputs for seed 0, as its author's program prints them."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(np.arange(3, dtype=np.uint64)).tolist() == expected
    assert [oracle.splitmix64(i) for i in range(3)] == expected


def test_the_definition_does_not_change() -> None:
    """Digests are kept in files: another value is another version."""
    raw = bytes(range(240))
    found = digest_of_bytes("BF16", (3, 40), raw)
    assert found == oracle.digest("BF16", (3, 40), 80, raw)
    assert found == PINNED


PINNED = "f034ff01177e2d11c05d97ebf12907cd5ae4f7adf1f4e0db8a7848eeb1a4a6fb"


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("shape", [(), (1,), (7, 8), (3, 5, 64), (0, 4), (2, 3, 200), (130, 2)])
def test_whole_tensors(dtype: str, shape: tuple[int, ...]) -> None:
    if BITS[dtype] < 8 and (not shape or shape[-1] % 4):
        return  # no whole bytes
    num_bytes = prod(shape) * BITS[dtype] // 8
    raw = random_bytes(num_bytes)
    expected = oracle.digest(dtype, shape, width_of(dtype, shape), raw)
    assert digest_of_bytes(dtype, shape, raw) == expected


@st.composite
def cases(draw: Any) -> tuple[str, tuple[int, ...], Region]:
    """A dtype, a shape, and a region in any view of it that splits or joins dims."""
    dtype = draw(st.sampled_from([name for name in WHOLE_BYTES if name != "F4"]))
    sizes = st.sampled_from([1, 2, 3, 5, 8, 16, 33, 64, 70])
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    while prod(shape) * ITEM[dtype] > 4000:
        shape = shape[1:]
    view = shape
    kind = draw(st.sampled_from(["same", "flat", "split", "joined", "ones"]))
    if kind == "flat":
        view = (prod(shape),)
    elif kind == "split" and shape and not shape[0] % 2:
        view = (2, shape[0] // 2, *shape[1:])
    elif kind == "joined" and len(shape) > 1:
        view = (shape[0] * shape[1], *shape[2:])
    elif kind == "ones":
        view = (*shape[:-1], 1, *shape[-1:], 1)
    return dtype, shape, draw(oracles.regions(view))


@given(cases(), st.booleans())
def test_regions(case: tuple[str, tuple[int, ...], Region], as_bytes: bool) -> None:
    dtype, shape, region = case
    item = ITEM[dtype]
    raw = random_bytes(prod(shape) * item)
    data: Any = oracles.take(elements(raw, item, (prod(shape),)), region)
    if as_bytes:
        data = memoryview(data.tobytes())
    found = sums_of(dtype, shape, region, data)
    row_bytes = width_of(dtype, shape)
    assert found.lanes == oracle.lanes(row_bytes, raw, places(region, item))
    assert found.num_elements == region.num_elements


@st.composite
def partitions(draw: Any, shape: tuple[int, ...]) -> list[Region]:
    """Boxes that have each element once: cut in two, or into every other index, and so on."""
    done: list[Region] = []
    open_boxes = [Region.whole(shape)]
    while open_boxes:
        box = open_boxes.pop(draw(st.integers(0, len(open_boxes) - 1)))
        dims = [dim for dim, size in enumerate(box.size) if size > 1]
        if not dims or len(done) + len(open_boxes) > 12 or draw(st.integers(0, 3)) == 0:
            done.append(box)
            continue
        dim = draw(st.sampled_from(dims))
        size = box.size[dim]
        if draw(st.booleans()):
            cut = draw(st.integers(1, size - 1))
            chosen = [(0, cut, 1), (cut, size - cut, 1)]
        else:
            chosen = [(0, -(-size // 2), 2), (1, size // 2, 2)]
        for start, count, step in chosen:
            inner = Region(
                shape=box.size,
                start=tuple(start if d == dim else 0 for d in range(len(shape))),
                size=tuple(count if d == dim else n for d, n in enumerate(box.size)),
                step=tuple(step if d == dim and count > 1 else 1 for d in range(len(shape))),
            )
            open_boxes.append(box.compose(inner))
    return done


@given(st.data(), st.sampled_from(WHOLE_BYTES), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_any_partition_gives_the_same_digest(data: Any, dtype: str, order: Any) -> None:
    shape = data.draw(st.sampled_from([(6, 40), (3, 7, 11), (35,), (5, 3, 65), (2, 130), (64, 3)]))
    item = ITEM[dtype]
    raw = random_bytes(prod(shape) * item)
    values = elements(raw, item, (prod(shape),))
    boxes = data.draw(partitions(shape))
    order.shuffle(boxes)
    digest = TensorDigest(dtype, shape)
    for box in boxes:
        digest.add(box, np.ascontiguousarray(oracles.take(values, box)))
    assert digest.hexdigest() == oracle.digest(dtype, shape, width_of(dtype, shape), raw)


@given(st.lists(st.integers(0, 600), max_size=6), st.sampled_from(["U8", "I16", "F32", "F64"]))
def test_flat_ranges(cuts: list[int], dtype: str) -> None:
    shape, item = (6, 100), ITEM[dtype]
    raw = random_bytes(600 * item)
    digest = TensorDigest(dtype, shape)
    bounds = sorted({0, 600, *cuts})
    for low, high in pairwise(bounds):
        digest.add_flat(low, raw[low * item : high * item])
    assert digest.hexdigest() == oracle.digest(dtype, shape, 100 * item, raw)


def fast(row_bytes: int, raw: Bytes) -> tuple[int, ...]:
    """`oracle.lanes` for large tensors of whole rows: the same sums, in wrapping integers."""
    data = raw.reshape(-1, row_bytes).astype(np.uint64) + np.uint64(1)
    numbers = 16 * (np.arange(row_bytes) // 2)
    shifts = (8 * (np.arange(row_bytes) % 2)).astype(np.uint64)
    found = []
    for lane in range(6):
        column = splitmix64((numbers + lane).astype(np.uint64)) >> np.uint64(39) | np.uint64(1)
        rows = 16 * np.arange(len(data)) + 8 + lane
        row = splitmix64(rows.astype(np.uint64)) | np.uint64(1)
        found.append(int((data * (column << shifts) * row[:, None]).sum(dtype=np.uint64)))
    return tuple(found)


def test_the_two_oracles_agree() -> None:
    raw = random_bytes(700)
    assert fast(70, np.frombuffer(raw, np.uint8)) == oracle.lanes(70, raw)


LARGE = [
    ("F32", (3, 9001)),  # more words than are converted together
    ("U8", (5, 8193)),  # bytes that do not pair, more than one product
    ("U8", (2**15 + 3, 65)),  # more rows than are summed at a time
    ("BF16", (300, 1025)),  # blocks that end within 16 rows
    ("U8", (2**18 + 1, 32)),  # rows of 8192 bytes, and a part of one
    ("F32", (1, 2**16 + 1)),
]


@pytest.mark.parametrize(("dtype", "shape"), LARGE)
def test_large_tensors(dtype: str, shape: tuple[int, ...]) -> None:
    """More words, rows, blocks than one product takes."""
    num_bytes = prod(shape) * ITEM[dtype]
    raw = np.frombuffer(random_bytes(num_bytes), np.uint8)
    row_bytes = width_of(dtype, shape)
    whole = num_bytes // row_bytes * row_bytes
    tail = oracle.lanes(row_bytes, raw.tobytes(), range(whole, num_bytes))
    sums = Sums(lanes=fast(row_bytes, raw[:whole])) + Sums(lanes=tail)
    found = sums_of(dtype, shape, Region.whole(shape), raw)
    assert found.lanes == sums.lanes


@pytest.mark.parametrize("num_columns", [2**12, 2**12 - 1, 2**13, 3 * 2**12 + 5])
@pytest.mark.parametrize("value", [0, 255])
def test_largest_sums_are_exact(num_columns: int, value: int) -> None:
    """Every bit set: the sum of a product is as large as it can be, in words and in bytes."""
    raw = np.full(33 * num_columns, value, np.uint8)
    found = sums_of("U8", (33, num_columns), Region.whole((33, num_columns)), raw)
    assert found.lanes == fast(num_columns, raw)


def test_bounds_of_exact_products() -> None:
    """No partial sum of a product leaves what float64 counts exactly."""
    largest = 2**25 - 1
    assert digests.CHUNK_WORDS * 0xFFFF * largest < 2**53
    assert digests.CHUNK_WORDS * 0xFF * 256 * largest < 2**53
    rows = 2**18 // 2
    assert rows * (0xFFFF + 257) * largest < 2**64  # of the longest row, all products together


def test_runs_and_points() -> None:
    """A view without the canonical rows: long runs are summed one by one, short ones by element."""
    shape = (10, 1000, 2)
    raw = random_bytes(prod(shape) * 4)
    values = elements(raw, 4, shape)
    for spans in [((0, 10), (100, 700), (0, 2)), ((1, 9), (3, 900), (1, 2))]:
        region = Region.box(shape, spans)
        tiles = list(tiles_of(region, 8192, 4))
        assert all(tile.is_grid for tile in tiles) == (spans[2] == (0, 2))
        data = values[tuple(slice(*span) for span in spans)]
        found = sums_of("F32", shape, region, data)
        assert found.lanes == oracle.lanes(8192, raw, places(region, 4))


def test_many_points() -> None:
    """More elements than are worked out at a time."""
    shape = (50, 1000, 2)
    raw = np.frombuffer(random_bytes(prod(shape) * 2), np.uint8)
    values = raw.view(np.uint16).reshape(shape)
    halves = [Region.box(shape, ((0, 50), (0, 1000), (i, i + 1))) for i in range(2)]
    found = [sums_of("I16", shape, half, values[:, :, i]) for i, half in enumerate(halves)]
    whole = sums_of("I16", shape, Region.whole(shape), values)
    assert found[0] + found[1] == whole


def test_strided_data() -> None:
    """A parameter's columns, transposed memory, rows backwards."""
    values = np.arange(60 * 64, dtype=np.uint16).reshape(60, 64)
    region = Region.box((60, 64), ((0, 60), (10, 30)))
    want = sums_of("I16", (60, 64), region, np.ascontiguousarray(values[:, 10:30]))
    assert sums_of("I16", (60, 64), region, values[:, 10:30]) == want
    turned = np.ascontiguousarray(values.T)
    assert sums_of("I16", (60, 64), region, turned.T[:, 10:30]) == want
    backwards = np.ascontiguousarray(values[::-1])
    assert sums_of("I16", (60, 64), region, backwards[::-1, 10:30]) == want


# ------------------------------------------------------------------------------- what it notices


def lanes_of(dtype: str, shape: tuple[int, ...], raw: bytes) -> tuple[int, ...]:
    return sums_of(dtype, shape, Region.whole(shape), raw).lanes


@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (3, 40)), ("I64", (2, 9)), ("U8", (75,))])
def test_every_single_bit(dtype: str, shape: tuple[int, ...]) -> None:
    """Each lane by itself has another value, for any bit that flips, the sign's too."""
    raw = random_bytes(prod(shape) * ITEM[dtype])
    before = lanes_of(dtype, shape, raw)
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        after = lanes_of(dtype, shape, bytes(changed))
        assert all(one != two for one, two in zip(before, after, strict=True))


@given(st.integers(0, 2**32), st.sampled_from(["U8", "BF16", "F32", "F64"]))
def test_order(seed: int, dtype: str) -> None:
    """Elements, rows, columns in another order; the rows one further; the bytes one further."""
    rng = np.random.default_rng(seed)
    values = rng.permutation(12 * 80).astype(f"u{ITEM[dtype]}").reshape(12, 80)
    values[:, 0], values[:, 1], values[0], values[1] = 3, 4, 5, 6
    i, j = rng.choice(960, 2, replace=False)
    swapped = values.reshape(-1).copy()
    swapped[[i, j]] = swapped[[j, i]]
    others = [
        values[[1, 0, *range(2, 12)]],
        values[:, [1, 0, *range(2, 80)]],
        np.roll(values, 1),
        np.roll(values, 1, axis=0),
        np.roll(values, 1, axis=1),
    ]
    if values.reshape(-1)[i] != values.reshape(-1)[j]:
        others.append(swapped)
    one = lanes_of(dtype, (12, 80), values.tobytes())
    for other in others:
        two = lanes_of(dtype, (12, 80), np.ascontiguousarray(other).tobytes())
        assert all(a != b for a, b in zip(one, two, strict=True))


def test_high_bits_do_not_cancel() -> None:
    """Two flipped sign bits of 64-bit elements cancel in any linear hash of whole elements."""
    values = np.zeros((4, 16), np.uint64)
    before = lanes_of("I64", (4, 16), values.tobytes())
    values[0, 0] = values[2, 5] = np.uint64(2**63)
    after = lanes_of("I64", (4, 16), values.tobytes())
    assert all(one != two for one, two in zip(before, after, strict=True))


def test_zeros_are_not_nothing() -> None:
    zeros = bytes(4 * 64)
    first = Region.box((4, 64), ((0, 2), (0, 64)))
    half = sums_of("U8", (4, 64), first, zeros[:128])
    assert 0 not in half.lanes
    twice = half + half  # as many elements as the tensor has
    assert twice.num_elements == 256
    assert hex_of("U8", (4, 64), twice) != digest_of_bytes("U8", (4, 64), zeros)


def test_dtype_and_shape_are_in_it() -> None:
    raw = random_bytes(256)
    found = {
        digest_of_bytes(dtype, shape, raw)
        for dtype, shape in [("BF16", (2, 64)), ("F16", (2, 64)), ("BF16", (1, 2, 64))]
    }
    assert len(found) == 3


def test_total() -> None:
    assert total_of({"a": "1", "b": "2"}) == total_of({"b": "2", "a": "1"})
    assert total_of({"a": "1", "b": "2"}) != total_of({"a": "2", "b": "1"})


# ------------------------------------------------------------------------------------------ errors


def test_elements_are_missing() -> None:
    digest = TensorDigest("BF16", (4, 64))
    digest.add_flat(0, bytes(200))
    with pytest.raises(CallError) as caught:
        digest.hexdigest()
    needed = "digest: has the sums of 100 elements, needs 256 (bf16[4, 64])."
    assert str(caught.value) == needed


def test_bytes_do_not_fit() -> None:
    digest = TensorDigest("BF16", (4, 64))
    with pytest.raises(CallError) as caught:
        digest.add_flat(0, bytes(3))
    assert str(caught.value) == "data: has 3 bytes, needs a multiple of 2 (bf16)."
    with pytest.raises(CallError) as caught:
        digest.add_flat(250, bytes(14))
    expected = "data: is elements 250 to 257, needs 0 to 256 of bf16[4, 64]."
    assert str(caught.value) == expected
    region = Region.box((4, 64), ((0, 1), (0, 64)))
    with pytest.raises(CallError) as caught:
        digest.add(region, bytes(130))
    expected = "region [0:1, 0:64]: has 130 bytes, needs 128 (64 elements of 2)."
    assert str(caught.value) == expected
    with pytest.raises(CallError) as caught:
        digest.add(Region.whole((4, 65)), bytes(520))
    expected = "region [0:4, 0:65]: is of a tensor of 260 elements, needs 256 (bf16[4, 64])."
    assert str(caught.value) == expected
    assert digest.sums == Sums()
