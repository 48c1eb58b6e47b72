"""Every class and every load call against element-by-element index arithmetic, on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lading.parameter import (
    BasevLLMParameter,
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)
from lading.ranks import Ranks, all_ranks, as_current

from .made import (
    ALL,
    COLUMN,
    COLUMN_ONLY,
    POISON,
    ROW,
    WHOLE,
    bits,
    make,
    moved,
    numbered,
    poisoned,
    times,
)

SIZES = (1, 2, 3, 5, 8)
SHAPES = {1: (4,), 2: (3, 4), 3: (3, 2, 4), 4: (2, 3, 2, 4)}
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
]
WHOLE_CALLS = [
    *((cls, "load_column_parallel_weight") for cls in (*WHOLE, RowvLLMParameter)),
    *((cls, "load_row_parallel_weight") for cls in (*WHOLE, *COLUMN_ONLY)),
    *(
        (cls, call)
        for cls in (BasevLLMParameter, RowvLLMParameter)
        for call in ("load_merged_column_weight", "load_qkv_weight")
    ),
]


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
@pytest.mark.parametrize("cls", COLUMN)
def test_column(cls: type[Any], num_dims: int) -> None:
    shape = SHAPES[num_dims]
    for dim in range(num_dims):
        for ranks in (r for size in SIZES for r in all_ranks(size)):
            full = times(shape, dim, ranks.tp_size)
            with as_current(ranks):
                param = make(
                    cls, poisoned(shape), output_dim=dim, input_dim=0, packed_dim=num_dims - 1
                )
                param.load_column_parallel_weight(numbered(full))
            at = ranks.tp_rank * shape[dim]
            want = moved(shape, full, dim, at=0, size=shape[dim], first=at)
            assert torch.equal(param.data, want)


@pytest.mark.parametrize("num_dims", [1, 2, 3, 4])
@pytest.mark.parametrize("cls", ROW)
def test_row(cls: type[Any], num_dims: int) -> None:
    shape = SHAPES[num_dims]
    for dim in range(num_dims):
        for ranks in (r for size in SIZES for r in all_ranks(size)):
            full = times(shape, dim, ranks.tp_size)
            with as_current(ranks):
                param = make(cls, poisoned(shape), input_dim=dim, packed_dim=0)
                param.load_row_parallel_weight(numbered(full))
            at = ranks.tp_rank * shape[dim]
            want = moved(shape, full, dim, at=0, size=shape[dim], first=at)
            assert torch.equal(param.data, want)


@pytest.mark.parametrize(("cls", "call"), WHOLE_CALLS)
def test_whole(cls: type[Any], call: str) -> None:
    for ranks in all_ranks(3):
        with as_current(ranks):
            param = make(cls, poisoned((4,)), input_dim=0, packed_dim=0)
            getattr(param, call)(numbered((4,)))
        assert param.data.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("cls", COLUMN)
def test_merged(cls: type[Any], dim: int) -> None:
    sizes = (3, 1, 2)
    shape = (6, 2) if dim == 0 else (2, 6)
    for ranks in (r for size in SIZES for r in all_ranks(size)):
        with as_current(ranks):
            param = make(
                cls, poisoned(shape), output_dim=dim, input_dim=1 - dim, packed_dim=1 - dim
            )
            for part, size in enumerate(sizes):
                offset = sum(sizes[:part])
                full = [size * ranks.tp_size if i == dim else 2 for i in range(2)]
                before = param.data.clone()
                param.load_merged_column_weight(
                    loaded_weight=numbered(full),
                    shard_id=part,
                    shard_offset=offset,
                    shard_size=size,
                )
                want = moved(shape, full, dim, at=offset, size=size, first=ranks.tp_rank * size)
                assert torch.equal(param.data, torch.where(want == POISON, before, want))
        assert POISON not in param.data


@pytest.mark.parametrize("cls", COLUMN)
def test_qkv(cls: type[Any]) -> None:
    """num_heads ranks share one KV head: q has T pieces, k and v have T / num_heads."""
    sizes = {"q": 4, "k": 2, "v": 2}
    for tp_size in (1, 2, 3, 4, 6, 8):
        for sharing in (s for s in range(1, tp_size + 1) if tp_size % s == 0):
            for ranks in all_ranks(tp_size):
                with as_current(ranks):
                    param = make(cls, poisoned((8, 3)))
                    rows = {}
                    for offset, part in zip((0, 4, 6), "qkv", strict=True):
                        pieces = tp_size if part == "q" else tp_size // sharing
                        full = numbered((pieces * sizes[part], 3))
                        rows[part] = full
                        param.load_qkv_weight(
                            full,
                            shard_id=part,
                            shard_offset=offset,
                            shard_size=sizes[part],
                            num_heads=sharing,
                        )
                for offset, part in zip((0, 4, 6), "qkv", strict=True):
                    piece = ranks.tp_rank if part == "q" else ranks.tp_rank // sharing
                    for row in range(sizes[part]):
                        want = rows[part][piece * sizes[part] + row]
                        assert param.data[offset + row].tolist() == want.tolist()


def test_qkv_by_number() -> None:
    param = ModelWeightParameter(data=poisoned((4, 1)), input_dim=1, output_dim=0)
    for slot, (offset, size) in enumerate([(0, 2), (2, 1), (3, 1)]):
        with as_current(Ranks(tp_rank=3, tp_size=4)):
            param.load_qkv_weight(
                numbered((size * (4 if slot == 0 else 2), 1)),
                shard_id=slot,
                shard_offset=offset,
                shard_size=size,
                num_heads=2,
            )
    assert param.data.flatten().tolist() == [6, 7, 1, 1]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_into_slots(shape: tuple[int, ...]) -> None:
    param = PerTensorScaleParameter(data=torch.full((5,), -1.0), weight_loader=None)
    for slot, shard_id in enumerate(["q", "k", "v", 3, 4]):
        loaded = torch.tensor(float(slot)).reshape(shape)
        if slot % 2:
            param.load_merged_column_weight(loaded_weight=loaded, shard_id=shard_id)
        else:
            param.load_qkv_weight(loaded, shard_id, shard_offset=0, shard_size=1, num_heads=1)
    assert param.data.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_rows_into_slots() -> None:
    """A scale of several entries for each part: [parts, 2]."""
    param = PerTensorScaleParameter(data=torch.zeros(3, 2), weight_loader=None)
    param.load_merged_column_weight(torch.tensor([[5.0, 6.0]]), shard_id=2)
    assert param.data.tolist() == [[0, 0], [0, 0], [5, 6]]


def test_a_scale_of_a_fused_tensor_goes_to_the_first_slot() -> None:
    """Engines give a fused checkpoint's only scale to slot 0, without offsets."""
    param = PerTensorScaleParameter(data=torch.zeros(2), weight_loader=None)
    param.load_merged_column_weight(
        loaded_weight=torch.tensor(2.0), shard_id=0, tp_rank=1, use_presharded_weights=False
    )
    assert param.data.tolist() == [2, 0]


@pytest.mark.parametrize("cls", [c for c in ALL if c is not PackedvLLMParameter])
@pytest.mark.parametrize("call", ["load_column_parallel_weight", "load_row_parallel_weight"])
def test_a_zero_dim_tensor_fits_one_element(cls: type[Any], call: str) -> None:
    param = make(cls, torch.zeros(1), input_dim=0, packed_dim=0)
    getattr(param, call)(torch.tensor(3.0))
    assert param.data.tolist() == [3.0]


def test_a_zero_dim_tensor_is_whole_on_every_rank() -> None:
    for ranks in all_ranks(3):
        with as_current(ranks):
            param = RowvLLMParameter(data=torch.zeros(1), input_dim=0, weight_loader=None)
            param.load_row_parallel_weight(torch.tensor(3.0))
        assert param.data.tolist() == [3.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_every_dtype_arrive(dtype: torch.dtype) -> None:
    """All byte values, NaN payloads and negative zeros included."""
    payload = torch.arange(256, dtype=torch.uint8).repeat(8)
    payload = payload % 2 if dtype == torch.bool else payload
    full = payload.view(dtype).reshape(16, -1)
    for ranks in all_ranks(4):
        with as_current(ranks):
            local = torch.zeros(4, full.shape[1], dtype=torch.float32).to(dtype)
            param = GroupQuantScaleParameter(data=local, input_dim=1, output_dim=0)
            param.load_column_parallel_weight(full)
        assert bits(param.data) == bits(full[4 * ranks.tp_rank : 4 * ranks.tp_rank + 4])


def test_float4_pairs_arrive() -> None:
    full = torch.arange(32, dtype=torch.uint8).reshape(8, 4)
    local = torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        param = ModelWeightParameter(data=local, input_dim=1, output_dim=0)
        param.load_column_parallel_weight(full.view(torch.float4_e2m1fn_x2))
        param.load_column_parallel_weight(full.view(torch.float4_e2m1fn_x2))
    assert bits(param.data) == list(range(16, 32))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e8m0fnu, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.float32),
        (torch.int32, torch.int64),
        (torch.uint8, torch.int32),
        (torch.int8, torch.bfloat16),
        (torch.bool, torch.uint8),
    ],
    ids=str,
)
def test_allowed_dtype_changes(source: torch.dtype, target: torch.dtype) -> None:
    loaded = torch.tensor([1.0, 2.0, 4.0, 1.0]).to(source)
    param = BlockQuantScaleParameter(
        data=torch.zeros(4, 1, dtype=target), input_dim=1, output_dim=0, weight_loader=None
    )
    param.load_column_parallel_weight(loaded.reshape(4, 1))
    assert param.data.dtype == target
    assert param.data.flatten().tolist() == loaded.to(target).tolist()


def test_rounding_is_torchs_own() -> None:
    loaded = torch.tensor([1.00390625, 3.3895e38, float("nan"), float("inf"), -0.0])
    param = BasevLLMParameter(data=torch.zeros(5, dtype=torch.bfloat16), weight_loader=None)
    param.load_column_parallel_weight(loaded)
    assert bits(param.data) == bits(loaded.to(torch.bfloat16))


def test_zero_sized_parts() -> None:
    param = ModelWeightParameter(data=poisoned((2, 3)), input_dim=1, output_dim=0)
    for ranks in (None, *all_ranks(2)):
        with as_current(ranks):
            for keywords in ({}, {"tp_rank": 0}):
                param.load_merged_column_weight(
                    numbered((0, 3)), shard_id=0, shard_offset=2, shard_size=0, **keywords
                )
    assert (param.data == POISON).all()
    empty = ChannelQuantScaleParameter(data=torch.zeros(0), output_dim=0, weight_loader=None)
    empty.load_column_parallel_weight(torch.zeros(0), tp_rank=1)


def test_experts() -> None:
    """[experts, out, in], cut along the outputs of every expert."""
    for ranks in all_ranks(2):
        with as_current(ranks):
            param = ModelWeightParameter(data=poisoned((3, 4, 2)), input_dim=2, output_dim=1)
            for part in range(2):
                param.load_merged_column_weight(
                    numbered((3, 4, 2)), shard_id=part, shard_offset=2 * part, shard_size=2
                )
        want = numbered((3, 4, 2))[:, 2 * ranks.tp_rank : 2 * ranks.tp_rank + 2]
        assert torch.equal(param.data, torch.cat([want, want], dim=1))


def test_weights_that_require_grad_or_lie_strided() -> None:
    full = numbered((4, 8), torch.float32).t().requires_grad_()
    assert not full.is_contiguous()
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        param = ModelWeightParameter(data=torch.zeros(4, 4), input_dim=1, output_dim=0)
        param.load_column_parallel_weight(full)
    assert torch.equal(param.data, full.detach()[4:])
    assert not param.requires_grad
    assert param.grad_fn is None


def test_a_strided_parameter() -> None:
    data = torch.zeros(3, 4).t()
    param = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=None)
    param.load_column_parallel_weight(numbered((4, 3), torch.float32))
    assert torch.equal(param.data, numbered((4, 3), torch.float32))
    assert param.data.data_ptr() == data.data_ptr()


def test_on_meta() -> None:
    """A parameter without memory checks as one with memory does, and a load leaves it on meta."""
    param = ModelWeightParameter(data=torch.empty(4, 2, device="meta"), input_dim=1, output_dim=0)
    for ranks in all_ranks(2):
        with as_current(ranks):
            param.load_column_parallel_weight(torch.ones(8, 2))
            param.load_column_parallel_weight(torch.zeros(8, 2, device="meta"))
    assert param.is_meta


def test_in_inference_mode() -> None:
    outside = ModelWeightParameter(data=torch.zeros(2, 2), input_dim=1, output_dim=0)
    with torch.inference_mode():
        outside.load_column_parallel_weight(torch.ones(2, 2))
    outside.load_column_parallel_weight(torch.ones(2, 2))
    with torch.inference_mode():
        param = ModelWeightParameter(data=torch.zeros(2, 2), input_dim=1, output_dim=0)
        param.load_column_parallel_weight(torch.ones(2, 2))
        param.load_column_parallel_weight(torch.ones(2, 2))
    assert param.data.tolist() == [[1, 1], [1, 1]]
