"""The one place that writes: regions, dtypes, values, bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lading import dtypes, writing
from lading.errors import DtypeError
from lading.regions import Copy, Region

progressions = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3))


def indices(region: Region) -> list[tuple[int, ...]]:
    """Every element of a region, as indices of its view."""
    dims = [
        [start + i * step for i in range(size)]
        for start, size, step in zip(region.start, region.size, region.step, strict=True)
    ]
    return list(itertools.product(*dims))


def region_of(parts: list[tuple[int, int, int]], spare: int) -> Region:
    shape = tuple(start + max(size, 1) * step + spare for start, size, step in parts)
    start, size, step = zip(*parts, strict=True)
    return Region(shape=shape, start=start, size=size, step=step)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(progressions, min_size=1, max_size=3), spare=st.integers(0, 1))
def test_write_touches_a_region_and_nothing_else(
    parts: list[tuple[int, int, int]], spare: int
) -> None:
    region = region_of(parts, spare)
    target = torch.full(region.shape, -1)
    values = torch.arange(region.num_elements).reshape(region.size)
    writing.write(target, region, values)
    want = torch.full(region.shape, -1)
    for number, index in enumerate(indices(region)):
        want[index] = number
    assert torch.equal(target, want)
    writing.fill(target, region)
    assert (target != want).sum() == sum(want[index] != 0 for index in indices(region))


def test_regions_of_a_reshaped_view() -> None:
    """A fused [6, 2] seen as [2, 3, 2]."""
    target = torch.zeros(6, 2)
    region = Region.box((2, 3, 2), [(1, 2), (0, 2), (0, 2)])
    writing.write(target, region, torch.ones(1, 2, 2))
    assert target[:, 0].tolist() == [0, 0, 0, 1, 1, 0]


def test_permuted() -> None:
    whole = Region.whole((2, 3))
    copy = Copy(
        source="a", target="b", part=None, source_region=whole,
        target_region=Region.whole((3, 2)), axes=(1, 0),
    )  # fmt: skip
    tensor = torch.arange(6).reshape(2, 3)
    assert torch.equal(writing.permuted(tensor, copy), tensor.t())


def test_writing_records_no_gradient() -> None:
    source = torch.ones(2, requires_grad=True)
    target = torch.zeros(2)
    writing.write(target, Region.whole((2,)), source)
    assert not target.requires_grad
    leaf = torch.nn.Parameter(torch.zeros(2))
    writing.write(leaf.data, Region.whole((2,)), source)
    assert leaf.tolist() == [1, 1]


def test_shapes_that_would_broadcast_are_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="shapes are checked before anything is written"):
        writing.write(torch.zeros(2, 2), Region.whole((2, 2)), torch.ones(1, 2))


def test_memory() -> None:
    target = torch.zeros(4, 3, dtype=torch.int16)
    rows = writing.memory(target, Region.box((4, 3), [(1, 3), (0, 3)]))
    assert rows is not None
    assert (rows.nbytes, rows.format, rows.readonly) == (12, "B", False)
    rows[:2] = b"\x01\x02"
    assert target[1].tolist() == [0x0201, 0, 0]
    assert writing.memory(target, Region.box((4, 3), [(0, 4), (0, 2)])) is None
    assert writing.memory(target.t(), Region.whole((3, 4))) is None
    assert writing.memory(torch.zeros(2, device="meta"), Region.whole((2,))) is None
    empty = writing.memory(target, Region.box((4, 3), [(2, 2), (0, 3)]))
    assert empty is not None
    assert empty.nbytes == 0
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64):
        view = writing.memory(torch.zeros(3, dtype=dtype), Region.whole((3,)))
        assert view is not None
        assert view.nbytes == 3 * dtype.itemsize
    parameter = torch.nn.Parameter(torch.zeros(2))
    view = writing.memory(parameter, Region.whole((2,)))
    assert view is not None


ALL = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
       torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
MODEL = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
BYTES = {torch.bool, torch.int8, torch.uint8}


def limits(dtype: torch.dtype) -> tuple[int, int]:
    return (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)


@pytest.mark.parametrize("source", ALL, ids=str)
@pytest.mark.parametrize("target", ALL, ids=str)
def test_check_dtypes(source: torch.dtype, target: torch.dtype) -> None:
    """Allowed: what holds every value, and one model dtype into another."""
    if target.is_floating_point:
        allowed = source == target or target in MODEL
        if not source.is_floating_point:  # 8 bits are held by all, 31 by fp64, 63 by none
            allowed = (source in BYTES and target in MODEL) or (
                source == torch.int32 and target == torch.float64
            )
    elif source.is_floating_point:
        allowed = False
    else:
        (low, high), (least, most) = limits(source), limits(target)
        allowed = least <= low and high <= most
    if allowed:
        writing.check_dtypes(source, target)
        return
    with pytest.raises(DtypeError) as caught:
        writing.check_dtypes(source, target)
    have, want = (dtypes.printed(dtypes.from_torch(dtype)) for dtype in (source, target))
    assert str(caught.value).startswith(f"tensor is {have}, needs {want} (")


def test_dtypes_that_no_file_has() -> None:
    writing.check_dtypes(torch.complex128, torch.complex128)
    with pytest.raises(DtypeError) as caught:
        writing.check_dtypes(torch.complex128, torch.float32)
    assert str(caught.value) == (
        "tensor is torch.complex128, needs torch.float32 "
        "(safetensors files have no dtype for torch.complex128)."
    )


@pytest.mark.parametrize(
    ("values", "target", "text"),
    [
        ([1.0, 65504.0, -65504.0], torch.float16, None),
        ([65519.0], torch.float16, None),  # rounds down to 65504
        ([65520.0, 1.0], torch.float16,
         "1 values are too large for fp16: up to 65520, needs at most 65504."),
        ([-1e6, 1e5], torch.float16,
         "2 values are too large for fp16: up to 1e+06, needs at most 65504."),
        ([float("inf"), float("-inf"), float("nan")], torch.float16, None),
        ([float("nan"), 1e6], torch.float16,
         "1 values are too large for fp16: up to 1e+06, needs at most 65504."),
        ([3.4e38], torch.bfloat16,
         "1 values are too large for bf16: up to 3.4e+38, needs at most 3.38953e+38."),
        ([3.4e38], torch.float32, None),
        ([3.4e38], torch.float64, None),
        ([], torch.float16, None),
    ],
)  # fmt: skip
def test_check_values(values: list[float], target: torch.dtype, text: str | None) -> None:
    tensor = torch.tensor(values, requires_grad=True)
    if text is None:
        writing.check_values(tensor, target)
        return
    with pytest.raises(DtypeError) as caught:
        writing.check_values(tensor, target)
    assert str(caught.value) == text


def test_check_values_looks_only_at_what_has_values() -> None:
    class Lazy(torch.Tensor):
        pass

    too_large = torch.full((2,), 1e6)
    writing.check_values(too_large.as_subclass(Lazy), torch.float16)
    writing.check_values(too_large.to("meta"), torch.float16)
    writing.check_values(torch.tensor([300]), torch.int8)  # refused by its dtype already


def test_same_bits() -> None:
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00002], dtype=torch.int32).view(torch.float32)
    assert writing.same_bits(nan, nan.clone())
    assert not writing.same_bits(nan, other)
    assert not writing.same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not writing.same_bits(torch.zeros(1), torch.zeros(2))
    assert not writing.same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.float64))
    assert writing.same_bits(torch.ones(3, 2).t(), torch.ones(2, 3))
    assert writing.same_bits(torch.zeros(0, 3), torch.zeros(0, 3))
    for dtype in (torch.bool, torch.uint64, torch.float8_e8m0fnu, torch.complex64):
        one = torch.ones(2).to(dtype)
        assert writing.same_bits(one, one.clone())
        assert not writing.same_bits(one, torch.tensor([1.0, 0.0]).to(dtype))


def test_one_element_with_any_stride_is_memory_too() -> None:
    # torch calls it contiguous, and refuses to see its bytes.
    for dtype in (torch.int32, torch.float64):
        one = torch.arange(6).to(dtype).as_strided((1, 1), (1, 2), 2)
        assert one.is_contiguous()
        assert writing.same_bits(one, torch.tensor([[2]], dtype=dtype))
        found = writing.memory(one, Region.whole((1, 1)))
        assert found is not None
        assert bytes(found) == torch.tensor([2], dtype=dtype).numpy().tobytes()


def test_what_cannot_be_seen_in_the_regions_shape_is_not_written_to_a_copy() -> None:
    """A transposed parameter is no [12] in memory: `reshape` would copy it, and lose the write."""
    target = torch.zeros(4, 3).t()
    with pytest.raises(RuntimeError, match="view"):
        writing.write(target, Region.whole((12,)), torch.ones(12))
    with pytest.raises(RuntimeError, match="view"):
        writing.fill(target, Region.whole((12,)))
    writing.write(target.t(), Region.whole((12,)), torch.ones(12))
    assert bool(target.eq(1).all())
