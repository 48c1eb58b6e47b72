"""Loads from tensors that allow view operations, metadata reads and being copied once, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lading.errors import DtypeError, ShapeError
from lading.parameter import (
    BasevLLMParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)
from lading.ranks import Ranks, as_current

from .made import numbered, poisoned, refused

VIEWS = {
    getattr(torch.Tensor, name)
    for name in (
        "narrow",
        "view",
        "reshape",
        "__getitem__",
        "unsqueeze",
        "squeeze",
        "transpose",
        "t",
        "permute",
        "flatten",
        "contiguous",
        "chunk",
        "unbind",
    )
}
READS = {torch.Tensor.dim, torch.Tensor.size, torch.Tensor.numel, torch.Tensor.__len__} | {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")
}


class Lazy(torch.Tensor):
    """Views stay lazy; `copy_` from it is the only read; anything else fails the test."""

    copies: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    @staticmethod
    def of(tensor: torch.Tensor) -> Lazy:
        return torch.Tensor._make_subclass(Lazy, tensor)  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func == torch.Tensor.copy_:
            target, source = args
            assert type(target) is torch.Tensor
            assert isinstance(source, Lazy)
            assert Lazy.copies is not None
            assert target.shape == torch.Size(plain(source).shape)
            Lazy.copies.append((target, plain(source)))
            return target
        assert func in VIEWS or func in READS, f"a lazy tensor cannot do {func}"
        return super().__torch_function__(func, types, args, kwargs or {})


def plain(tensor: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


@pytest.fixture
def copies() -> Any:
    """Where the lazy tensors of a test record what was copied where."""
    Lazy.copies = []
    yield Lazy.copies
    Lazy.copies = None


def column(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = ModelWeightParameter(data=poisoned((2, 3), dtype), input_dim=1, output_dim=0)
    return param, "load_column_parallel_weight", {}, numbered((4, 3), torch.float32)


def row(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = RowvLLMParameter(data=poisoned((2, 3), dtype), input_dim=1, weight_loader=None)
    return param, "load_row_parallel_weight", {}, numbered((2, 6), torch.float32)


def scalar_row(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = RowvLLMParameter(data=poisoned((1,), dtype), input_dim=0, weight_loader=None)
    return param, "load_row_parallel_weight", {}, torch.tensor(5.0)


def whole(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = BasevLLMParameter(data=poisoned((2, 3), dtype), weight_loader=None)
    return param, "load_qkv_weight", {"shard_id": "q"}, numbered((2, 3), torch.float32)


def slot(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = PerTensorScaleParameter(data=poisoned((3,), dtype), weight_loader=None)
    return param, "load_merged_column_weight", {"shard_id": 2}, torch.tensor(5.0)


def merged(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = ModelWeightParameter(data=poisoned((4, 3), dtype), input_dim=1, output_dim=0)
    keywords = {"shard_id": 1, "shard_offset": 2, "shard_size": 2}
    return param, "load_merged_column_weight", keywords, numbered((4, 3), torch.float32)


def qkv(dtype: torch.dtype) -> tuple[Any, str, dict[str, Any], torch.Tensor]:
    param = PackedvLLMParameter(
        data=poisoned((3, 4), dtype), input_dim=0, output_dim=1, packed_dim=1, packed_factor=8
    )
    keywords = {"shard_id": "v", "shard_offset": 8, "shard_size": 16, "num_heads": 2}
    return param, "load_qkv_weight", keywords, numbered((3, 2), torch.float32)


CALLS = [column, row, scalar_row, whole, slot, merged, qkv]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_every_call_is_one_copy_into_a_view(
    call: Callable[[torch.dtype], Any], dtype: torch.dtype, copies: list[Any]
) -> None:
    for rank in range(2):
        with as_current(Ranks(tp_rank=rank, tp_size=2)):
            expected, name, keywords, full = call(dtype)
            getattr(expected, name)(full, **keywords)
            param, _, _, _ = call(dtype)
            getattr(param, name)(loaded_weight=Lazy.of(full), **keywords)
        ((target, source),) = copies
        before = param.data.clone()
        target.copy_(source)
        assert torch.equal(param.data, expected.data)
        assert not torch.equal(param.data, before)
        copies.clear()


def test_a_lazy_tensor_is_copied_again_without_being_compared(copies: list[Any]) -> None:
    """Whether it has other bytes than before cannot be known without reading it."""
    param, name, keywords, full = column(torch.float32)
    getattr(param, name)(Lazy.of(full[:2]), **keywords)
    getattr(param, name)(Lazy.of(full[2:]), **keywords)
    assert len(copies) == 2


def test_lazy_tensors_are_checked_by_what_they_say(copies: list[Any]) -> None:
    param, name, keywords, full = column(torch.int32)
    with refused(
        DtypeError,
        "ModelWeightParameter: tensor is fp32, needs int32 (a float does not fit into an integer).",
        param,
    ):
        getattr(param, name)(Lazy.of(full[:2]), **keywords)
    with refused(
        ShapeError,
        "ModelWeightParameter: tensor is int32[4, 3], needs int32[2, 3] (the parameter's shape).",
        param,
    ):
        getattr(param, name)(Lazy.of(full.int()), **keywords)
    assert not copies


def test_a_recording_loader_sees_which_bytes_go_where(copies: list[Any]) -> None:
    """Offsets and strides of both ends say the whole copy: nothing has to be read."""
    param = ModelWeightParameter(data=torch.zeros(6, 4), input_dim=1, output_dim=0)
    full = numbered((8, 4), torch.float32)
    with as_current(Ranks(tp_rank=3, tp_size=4)):
        param.load_qkv_weight(
            Lazy.of(full), shard_id="q", shard_offset=4, shard_size=2, num_heads=2
        )
    ((target, source),) = copies
    assert target.untyped_storage().data_ptr() == param.untyped_storage().data_ptr()
    assert (target.storage_offset(), tuple(target.shape)) == (16, (2, 4))
    assert (source.storage_offset(), tuple(source.shape)) == (24, (2, 4))
    assert param.data.sum() == 0


def test_parameters_on_meta_take_lazy_tensors(copies: list[Any]) -> None:
    param = ModelWeightParameter(data=torch.empty(2, 3, device="meta"), input_dim=1, output_dim=0)
    param.load_column_parallel_weight(Lazy.of(numbered((2, 3), torch.float32)))
    assert len(copies) == 1
