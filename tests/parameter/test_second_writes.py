"""Loading a place twice: equal bytes pass, other bytes are an error unless a new load was begun."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lading.errors import ConflictError
from lading.parameter import (
    BasevLLMParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
    permute_param_layout_,
)

from .made import bits, make, numbered, refused

TRY = "Try: lading.start_load(model) before loading new weights into a loaded model."


def loaded() -> ModelWeightParameter:
    param = make(ModelWeightParameter, torch.zeros(3, 3))
    param.load_column_parallel_weight(numbered((3, 3), torch.float32))
    assert isinstance(param, ModelWeightParameter)
    return param


def conflict(text: str, *params: torch.Tensor) -> Any:
    return refused(ConflictError, f"{text} were loaded before, with other bytes. {TRY}", *params)


def test_equal_and_other_bytes() -> None:
    param = loaded()
    param.load_column_parallel_weight(numbered((3, 3), torch.float32))
    param.load_row_parallel_weight(numbered((3, 3), torch.bfloat16))  # equal after the cast
    with conflict("ModelWeightParameter: elements [0:3, 0:3]", param):
        param.load_column_parallel_weight(torch.zeros(3, 3))


def test_parts_that_overlap() -> None:
    param = make(ModelWeightParameter, torch.zeros(4, 1))
    param.load_merged_column_weight(torch.ones(3, 1), shard_id=0, shard_offset=0, shard_size=3)
    with conflict("ModelWeightParameter, part 1: elements [2:3, 0:1]", param):
        param.load_merged_column_weight(torch.zeros(2, 1), shard_id=1, shard_offset=2, shard_size=2)
    param.load_merged_column_weight(torch.ones(2, 1), shard_id=1, shard_offset=2, shard_size=2)
    assert param._ledger.missing(param, ()) is None


def test_slots() -> None:
    param = make(PerTensorScaleParameter, torch.zeros(3))
    param.load_qkv_weight(torch.tensor(1.0), shard_id="k")
    param.load_qkv_weight(torch.tensor(2.0), shard_id="v")
    with conflict("PerTensorScaleParameter, part 1: elements [1:2]", param):
        param.load_qkv_weight(torch.tensor(2.0), shard_id=1)


def test_nan_payloads_and_zeros_are_bytes() -> None:
    quiet = torch.tensor([0x7FC00001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    param = make(BasevLLMParameter, torch.zeros(2))
    param.load_column_parallel_weight(quiet)
    param.load_column_parallel_weight(quiet.clone())
    assert bits(param.data) == bits(quiet)
    with conflict("BasevLLMParameter: elements [0:2]", param):
        param.load_column_parallel_weight(quiet.flip(0))
    zero = make(BasevLLMParameter, torch.ones(1))
    zero.load_column_parallel_weight(torch.tensor([0.0]))
    with conflict("BasevLLMParameter: elements [0:1]", zero):
        zero.load_column_parallel_weight(torch.tensor([-0.0]))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint64, torch.bool, torch.complex64], ids=str
)
def test_dtypes(dtype: torch.dtype) -> None:
    param = make(BasevLLMParameter, torch.zeros(2).to(dtype))
    param.load_column_parallel_weight(torch.ones(2).to(dtype))
    param.load_column_parallel_weight(torch.ones(2).to(dtype))
    with conflict("BasevLLMParameter: elements [0:2]", param):
        param.load_column_parallel_weight(torch.zeros(2).to(dtype))


def test_a_new_load() -> None:
    param = loaded()
    param._ledger.start()
    param.load_column_parallel_weight(torch.zeros(3, 3))
    assert param.data.sum() == 0


def assign(param: Any) -> None:
    param[:] = 7.0


def fill(param: Any) -> None:
    param.zero_()


def replace(param: Any) -> None:
    param.data = torch.zeros(3, 3)


def replace_with_the_same_address(param: Any) -> None:
    param.data = torch.empty(0)
    param.data = torch.zeros(3, 3)  # the allocator likes to hand out what was just freed


def transpose(param: Any) -> None:
    param.data = param.data.t()


def replace_and_permute(param: Any) -> None:
    param.data = torch.zeros(3, 3)
    permute_param_layout_(param, input_dim=0, output_dim=1)
    permute_param_layout_(param, input_dim=1, output_dim=0)


@pytest.mark.parametrize(
    "change",
    [assign, fill, replace, replace_with_the_same_address, transpose, replace_and_permute],
    ids=lambda change: change.__name__,
)
def test_changes_from_outside_are_no_conflict(change: Any) -> None:
    param = loaded()
    change(param)
    assert param._ledger.missing(param, ()) is None
    param.load_column_parallel_weight(torch.full((3, 3), 5.0))
    assert param.data.sum() == 45


def test_permuting_keeps_what_was_noted() -> None:
    param = make(ModelWeightParameter, torch.zeros(4, 3))
    param.load_merged_column_weight(torch.ones(2, 3), shard_id=0, shard_offset=0, shard_size=2)
    permute_param_layout_(param, input_dim=0, output_dim=1)
    assert str(param._ledger.missing(param, ())) == "[0:3, 2:4]"
    with conflict("ModelWeightParameter, part 0: elements [0:3, 0:2]", param):
        param.load_merged_column_weight(torch.zeros(3, 2), shard_id=0, shard_offset=0, shard_size=2)
    param.load_merged_column_weight(torch.zeros(3, 2), shard_id=1, shard_offset=2, shard_size=2)
    assert param._ledger.missing(param, ()) is None


def test_what_was_never_written() -> None:
    param = make(ModelWeightParameter, torch.zeros(6, 2))
    assert param._ledger.missing(param, ()) is None  # nothing was loaded: perhaps nothing will be
    where = {"shard_id": "k", "shard_offset": 2, "shard_size": 2, "num_heads": 1}
    param.load_qkv_weight(torch.ones(2, 2), **where)
    assert str(param._ledger.missing(param, ())) == "[0:2, 0:2]"


def test_each_part_has_its_own_whole_tensor() -> None:
    """compressed-tensors stores each part's `weight_shape`; engines load all into one parameter."""
    param = make(BasevLLMParameter, torch.zeros(2, dtype=torch.int64))
    for part, rows in (("q", 256), ("k", 64), ("v", 64)):
        param.load_qkv_weight(
            loaded_weight=torch.tensor([rows, 256]),
            shard_id=part,
            shard_offset=0,
            shard_size=rows,
            num_heads=1,
        )
    assert param.data.tolist() == [64, 256]
    with conflict("BasevLLMParameter, part 'v': elements [0:2]", param):
        param.load_qkv_weight(torch.tensor([256, 256]), shard_id="v")
    for part, rows in ((0, 256), (1, 128)):
        param.load_merged_column_weight(torch.tensor([rows, 256]), shard_id=part)
    assert param.data.tolist() == [128, 256]


def test_what_runs_along_the_inputs_is_one_for_all_parts() -> None:
    """GPTQ's g_idx: parts that would order the inputs differently cannot be fused."""
    param = make(RowvLLMParameter, torch.zeros(4, dtype=torch.int32), input_dim=0)
    order = numbered((4,), torch.int32)
    param.load_merged_column_weight(order, shard_id=0)
    param.load_merged_column_weight(order.clone(), shard_id=1)
    with conflict("RowvLLMParameter, part 1: elements [0:4]", param):
        param.load_merged_column_weight(order.flip(0), shard_id=1)
