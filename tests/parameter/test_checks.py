"""Where a load must not go on: each refusal's full text, on every rank alike, nothing written.

The cases are those in which the field's reference is silent, broadcasts, wraps, or fails on some
ranks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
import torch

from lading.errors import (
    CallError,
    ConflictError,
    DeclarationError,
    DtypeError,
    KeywordError,
    LadingError,
    LayoutError,
    ShapeError,
)
from lading.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)
from lading.ranks import Ranks, all_ranks, as_current

from .made import ALL, make, numbered, poisoned, refused

COLUMN, ROW = "load_column_parallel_weight", "load_row_parallel_weight"
MERGED, QKV = "load_merged_column_weight", "load_qkv_weight"


@dataclass(frozen=True)
class Fails:
    """One call that every rank of `tp_size` refuses; `{T}` and `{full}` of a text are filled in."""

    id: str
    call: str
    loaded: Callable[[int], Any]
    error: type[LadingError]
    text: str
    keywords: dict[str, Any] = field(default_factory=dict)
    cls: type[Any] = ModelWeightParameter
    local: Callable[[], torch.Tensor] = lambda: poisoned((4, 6), torch.float32)
    facts: dict[str, Any] = field(default_factory=dict)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


PART = {"shard_id": 0, "shard_offset": 0, "shard_size": 4}
CASES = [
    Fails(
        "too long",
        COLUMN,
        lambda t: floats(4 * t + 4, 6),
        ShapeError,
        "ModelWeightParameter: tensor is fp32[{long}, 6], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4).",
    ),
    Fails(
        "too short",
        COLUMN,
        lambda t: floats(4 * t - 4, 6),
        ShapeError,
        "ModelWeightParameter: tensor is fp32[{short}, 6], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4).",
    ),
    Fails(
        "inputs too long",
        ROW,
        lambda t: floats(4, 6 * t + 1),
        ShapeError,
        "ModelWeightParameter: tensor is fp32[4, {row1}], needs fp32[4, {row}] "
        "({row} = {T} pieces * 6).",
    ),
    Fails(
        "part too long",
        MERGED,
        lambda t: floats(4 * t + 4, 6),
        ShapeError,
        "ModelWeightParameter, part 0: tensor is fp32[{long}, 6], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4).",
        keywords=PART,
    ),
    Fails(
        "q too short",
        QKV,
        lambda t: floats(4 * t - 4, 6),
        ShapeError,
        "ModelWeightParameter, part 'q': tensor is fp32[{short}, 6], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4).",
        keywords={**PART, "shard_id": "q", "num_heads": 1},
    ),
    Fails(
        "shared k too long",
        QKV,
        lambda t: floats(8, 6),
        ShapeError,
        "ModelWeightParameter, part 'k': tensor is fp32[8, 6], needs fp32[4, 6] "
        "(the parameter's shape).",
        keywords={**PART, "shard_id": "k", "num_heads": "T"},
    ),
    Fails(
        "wrong other dim",
        COLUMN,
        lambda t: floats(4 * t, 7),
        ShapeError,
        "ModelWeightParameter: tensor is fp32[{full}, 7], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4).",
    ),
    Fails(
        "transposed",
        COLUMN,
        lambda t: floats(6, 4 * t),
        ShapeError,
        "ModelWeightParameter: tensor is fp32[6, {full}], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4; it is transposed).",
    ),
    Fails(
        "wrong shape and dtype",
        COLUMN,
        lambda t: floats(2, 6, dtype=torch.int32),
        ShapeError,
        "ModelWeightParameter: tensor is int32[2, 6], needs fp32[{full}, 6] "
        "({full} = {T} pieces * 4).",
    ),
    Fails(
        "one row would broadcast",
        COLUMN,
        lambda t: floats(1),
        ShapeError,
        "BasevLLMParameter: tensor is fp32[1], needs fp32[4, 6] (the parameter's shape).",
        cls=BasevLLMParameter,
    ),
    Fails(
        "one column would broadcast",
        ROW,
        lambda t: floats(4, 1),
        ShapeError,
        "BasevLLMParameter: tensor is fp32[4, 1], needs fp32[4, 6] (the parameter's shape).",
        cls=BasevLLMParameter,
    ),
    Fails(
        "a scalar would broadcast",
        COLUMN,
        lambda t: torch.tensor(1.0),
        ShapeError,
        "BasevLLMParameter: tensor is fp32[], needs fp32[4, 6] (the parameter's shape).",
        cls=BasevLLMParameter,
    ),
    Fails(
        "a scalar into cut outputs",
        COLUMN,
        lambda t: torch.tensor(1.0),
        ShapeError,
        "ChannelQuantScaleParameter: tensor is fp32[], needs fp32[{T}] ({T} = {T} pieces * 1).",
        cls=ChannelQuantScaleParameter,
        local=lambda: torch.zeros(1),
    ),
    Fails(
        "two scalars into one slot",
        MERGED,
        lambda t: floats(2),
        ShapeError,
        "PerTensorScaleParameter, part 0: tensor is fp32[2], needs fp32[1] "
        "(one scalar for each part).",
        keywords={"shard_id": 0},
        cls=PerTensorScaleParameter,
        local=lambda: torch.zeros(3),
    ),
    Fails(
        "float into int",
        COLUMN,
        lambda t: floats(4 * t, 6) * 300.7,
        DtypeError,
        "ModelWeightParameter: tensor is fp32, needs int8 (a float does not fit into an integer).",
        local=lambda: poisoned((4, 6), torch.int8),
    ),
    Fails(
        "int into narrower int",
        COLUMN,
        lambda t: floats(4 * t, 6, dtype=torch.int64),
        DtypeError,
        "ModelWeightParameter: tensor is int64, needs int32 (the integer would be narrowed).",
        local=lambda: poisoned((4, 6), torch.int32),
    ),
    Fails(
        "int8 into uint8",
        COLUMN,
        lambda t: floats(4 * t, 6, dtype=torch.int8),
        DtypeError,
        "ModelWeightParameter: tensor is int8, needs uint8 (the integer would be narrowed).",
        local=lambda: poisoned((4, 6), torch.uint8),
    ),
    Fails(
        "int into a float that has not all of its values",
        COLUMN,
        lambda t: floats(4 * t, 6, dtype=torch.int32),
        DtypeError,
        "ModelWeightParameter: tensor is int32, needs fp32 (fp32 does not hold every int32).",
    ),
    Fails(
        "bf16 into fp8",
        COLUMN,
        lambda t: floats(4 * t, 6, dtype=torch.bfloat16),
        DtypeError,
        "ModelWeightParameter: tensor is bf16, needs fp8_e4m3 "
        "(fp8_e4m3 is a storage format, not a dtype to round into).",
        local=lambda: poisoned((4, 6), torch.float8_e4m3fn),
    ),
    Fails(
        "overflow",
        COLUMN,
        lambda t: floats(4 * t, 6) * 1e6,
        DtypeError,
        "ModelWeightParameter: {numel} values are too large for fp16: up to 1e+06, "
        "needs at most 65504.",
        local=lambda: poisoned((4, 6), torch.float16),
    ),
    Fails(
        "100 rows packed by 8",
        MERGED,
        lambda t: floats(12 * t, 6, dtype=torch.int32),
        LayoutError,
        "PackedColumnParameter, part 1: a shard size of 100 rows is no whole number of packed "
        "words: 8 elements in a word, 100 = 12 * 8 + 4.",
        keywords={"shard_id": 1, "shard_offset": 0, "shard_size": 100},
        cls=PackedColumnParameter,
        local=lambda: poisoned((13, 6), torch.int32),
        facts={"packed_dim": 0},
    ),
    Fails(
        "40 rows of 3-bit",
        QKV,
        lambda t: floats(3 * t, 6, dtype=torch.int32),
        LayoutError,
        "PackedvLLMParameter, part 'v': a shard size of 40 rows is no whole number of packed "
        "words: 32/3 elements in a word, 40 = 1 * 32 + 8.",
        keywords={"shard_id": "v", "shard_offset": 32, "shard_size": 40, "num_heads": 1},
        cls=PackedvLLMParameter,
        local=lambda: poisoned((13, 6), torch.int32),
        facts={"packed_dim": 0, "packed_factor": Fraction(32, 3)},
    ),
    Fails(
        "an offset inside a word",
        MERGED,
        lambda t: floats(t, 6, dtype=torch.int32),
        LayoutError,
        "PackedColumnParameter, part 1: a shard offset of 12 rows is no whole number of packed "
        "words: 8 elements in a word, 12 = 1 * 8 + 4.",
        keywords={"shard_id": 1, "shard_offset": 12, "shard_size": 8},
        cls=PackedColumnParameter,
        local=lambda: poisoned((13, 6), torch.int32),
        facts={"packed_dim": 0},
    ),
    Fails(
        "unknown shard_id of a scale",
        QKV,
        lambda t: floats(1),
        CallError,
        "PerTensorScaleParameter: shard_id is 'x', needs 'q', 'k', 'v' or an int of at least 0.",
        keywords={"shard_id": "x"},
        cls=PerTensorScaleParameter,
        local=lambda: torch.zeros(3),
    ),
    Fails(
        "negative slot",
        MERGED,
        lambda t: floats(1),
        CallError,
        "PerTensorScaleParameter: shard_id is -1, needs 'q', 'k', 'v' or an int of at least 0.",
        keywords={"shard_id": -1},
        cls=PerTensorScaleParameter,
        local=lambda: torch.zeros(3),
    ),
    Fails(
        "no such slot",
        MERGED,
        lambda t: floats(1),
        CallError,
        "PerTensorScaleParameter: shard_id is 'v', slot 2, needs a slot of 0 to 1 "
        "(the parameter has one for each part).",
        keywords={"shard_id": "v"},
        cls=PerTensorScaleParameter,
        local=lambda: torch.zeros(2),
    ),
    Fails(
        "unknown part of qkv",
        QKV,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter: shard_id is 'o', needs 'q', 'k', 'v' or an int of at least 0.",
        keywords={**PART, "shard_id": "o", "num_heads": 1},
    ),
    Fails(
        "fourth part of qkv",
        QKV,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter: shard_id is 3, needs 'q', 'k', 'v', 0, 1 or 2.",
        keywords={**PART, "shard_id": 3, "num_heads": 1},
    ),
    Fails(
        "negative part",
        MERGED,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter: shard_id is -1, needs an int of at least 0.",
        keywords={**PART, "shard_id": -1},
    ),
    Fails(
        "misspelt keyword",
        MERGED,
        lambda t: floats(4 * t, 6),
        KeywordError,
        "BasevLLMParameter: load_merged_column_weight got keyword 'shard_offest', needs some of: "
        "loaded_weight, shard_id, shard_offset, shard_size, tp_rank, use_presharded_weights.",
        keywords={"shard_id": 0, "shard_offest": 0, "shard_size": 4},
        cls=BasevLLMParameter,
    ),
    Fails(
        "missing offset",
        MERGED,
        lambda t: floats(4 * t, 6),
        KeywordError,
        "ModelWeightParameter, part 0: load_merged_column_weight got no shard_offset, "
        "needs it in local rows.",
        keywords={"shard_id": 0, "shard_size": 4},
    ),
    Fails(
        "missing size",
        QKV,
        lambda t: floats(4 * t, 6),
        KeywordError,
        "ModelWeightParameter, part 'q': load_qkv_weight got no shard_size, "
        "needs it in local rows.",
        keywords={"shard_id": "q", "shard_offset": 0, "num_heads": 1},
    ),
    Fails(
        "missing num_heads",
        QKV,
        lambda t: floats(4 * t, 6),
        KeywordError,
        "ModelWeightParameter, part 'k': load_qkv_weight got no num_heads, "
        "needs the number of ranks that share a KV head.",
        keywords={**PART, "shard_id": "k"},
    ),
    Fails(
        "missing part",
        QKV,
        lambda t: floats(4 * t, 6),
        KeywordError,
        "ModelWeightParameter: load_qkv_weight got no shard_id, needs 'q', 'k' or 'v'.",
        keywords={"shard_offset": 0, "shard_size": 4, "num_heads": 1},
    ),
    Fails(
        "missing slot",
        QKV,
        lambda t: floats(1),
        KeywordError,
        "PerTensorScaleParameter: load_qkv_weight got no shard_id, needs the scalar's slot.",
        cls=PerTensorScaleParameter,
        local=lambda: torch.zeros(3),
    ),
    Fails(
        "beyond the parameter",
        MERGED,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter, part 1: entries 2:6 of dim 0, needs a range inside 0:4 "
        "(the parameter's size).",
        keywords={"shard_id": 1, "shard_offset": 2, "shard_size": 4},
    ),
    Fails(
        "negative offset",
        MERGED,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter, part 1: shard_offset is -4, needs an int of at least 0.",
        keywords={"shard_id": 1, "shard_offset": -4, "shard_size": 4},
    ),
    Fails(
        "an offset that is no number of rows",
        MERGED,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter, part 1: shard_offset is 2.0, needs an int of at least 0.",
        keywords={"shard_id": 1, "shard_offset": 2.0, "shard_size": 2},
    ),
    Fails(
        "no rank shares a KV head",
        QKV,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter, part 'k': num_heads is 0, needs an int of at least 1.",
        keywords={**PART, "shard_id": "k", "num_heads": 0},
    ),
    Fails(
        "KV heads that straddle the group",
        QKV,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter, part 'k': num_heads is 7, needs a divisor of {T} (the ranks that "
        "share a KV head are neighbours in the tensor-parallel group).",
        keywords={**PART, "shard_id": "k", "num_heads": 7},
    ),
    Fails(
        "a rank outside the group",
        COLUMN,
        lambda t: floats(4 * t, 6),
        CallError,
        "ModelWeightParameter: tp_rank is 9, needs 0 to {last} (tp_size is {T}).",
        keywords={"tp_rank": 9},
    ),
    Fails(
        "a negative rank",
        ROW,
        lambda t: floats(4, 6 * t),
        CallError,
        "ModelWeightParameter: tp_rank is -1, needs an int of at least 0.",
        keywords={"tp_rank": -1},
    ),
    Fails(
        "no tensor",
        COLUMN,
        lambda t: None,
        CallError,
        "ModelWeightParameter: loaded_weight is NoneType, needs a tensor.",
    ),
    Fails(
        "a tensor without values",
        COLUMN,
        lambda t: torch.empty(4 * t, 6, device="meta"),
        CallError,
        "ModelWeightParameter: loaded_weight is on meta, needs a tensor with values.",
    ),
    Fails(
        "outputs along a dim that is not there",
        COLUMN,
        lambda t: floats(4 * t, 6),
        DeclarationError,
        "ModelWeightParameter: is cut along dim 2, needs a dim of its shape [4, 6].",
        facts={"output_dim": 2},
    ),
    Fails(
        "presharded, but full",
        COLUMN,
        lambda t: floats(4 * t, 6),
        ShapeError,
        "ModelWeightParameter: tensor is fp32[{full}, 6], needs fp32[4, 6] "
        "(the parameter's shape).",
        keywords={"use_presharded_weights": True},
    ),
]


@pytest.mark.parametrize("tp_size", [2, 3, 5])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_refusals(case: Fails, tp_size: int) -> None:
    keywords = {k: tp_size if v == "T" else v for k, v in case.keywords.items()}
    loaded = case.loaded(tp_size)
    text = case.text.format(
        T=tp_size,
        last=tp_size - 1,
        full=4 * tp_size,
        long=4 * tp_size + 4,
        short=4 * tp_size - 4,
        row=6 * tp_size,
        row1=6 * tp_size + 1,
        numel=24 * tp_size,
    )
    for ranks in all_ranks(tp_size):
        with as_current(ranks):
            param = make(case.cls, case.local(), **case.facts)
            with refused(case.error, text, param):
                getattr(param, case.call)(loaded, **keywords)


@pytest.mark.parametrize("tp_size", [2, 3, 5])
def test_one_overflow_stops_every_rank(tp_size: int) -> None:
    """The value is in the last rank's piece; a rank that went on alone would hang the others."""
    full = torch.ones(2 * tp_size, 1)
    full[-1] = 1e6
    for ranks in all_ranks(tp_size):
        with as_current(ranks):
            param = ModelWeightParameter(
                data=torch.zeros(2, 1, dtype=torch.float16), input_dim=1, output_dim=0
            )
            text = (
                "ModelWeightParameter: 1 values are too large for fp16: up to 1e+06, "
                "needs at most 65504."
            )
            with refused(DtypeError, text, param):
                param.load_column_parallel_weight(full)


@pytest.mark.parametrize("tp_size", [1, 2, 3, 5])
def test_a_part_written_twice(tp_size: int) -> None:
    full = numbered((2 * tp_size, 3), torch.float32)
    for ranks in all_ranks(tp_size):
        with as_current(ranks):
            param = ModelWeightParameter(data=torch.zeros(4, 3), input_dim=1, output_dim=0)
            where = {"shard_offset": 2, "shard_size": 2}
            param.load_merged_column_weight(full, shard_id=1, **where)
            param.load_merged_column_weight(full.clone(), shard_id=1, **where)
            text = (
                "ModelWeightParameter, part 1: elements [2:4, 0:3] were loaded before, with other "
                "bytes. Try: lading.start_load(model) before loading new weights into a loaded "
                "model."
            )
            with refused(ConflictError, text, param):
                param.load_merged_column_weight(full + 1, shard_id=1, **where)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("call", [COLUMN, ROW, MERGED, QKV])
def test_every_class_checks_its_keywords(cls: type[Any], call: str) -> None:
    param = make(cls, poisoned((2, 2)))
    good = "loaded_weight, tp_rank, use_presharded_weights"
    if call == MERGED:
        good = "loaded_weight, shard_id, shard_offset, shard_size, tp_rank, use_presharded_weights"
    if call == QKV and cls is PerTensorScaleParameter:
        good = (
            "loaded_weight, shard_id, shard_offset, shard_size, num_heads, tp_rank, "
            "use_presharded_weights"
        )
    elif call == QKV:
        good = (
            "loaded_weight, tp_rank, use_presharded_weights, shard_id, shard_offset, shard_size, "
            "num_heads"
        )
    name, method = cls.__name__, getattr(param, call)
    with refused(
        KeywordError, f"{name}: {call} got keyword 'shard_ids', needs some of: {good}.", param
    ):
        method(numbered((2, 2)), shard_ids=0)
    with refused(KeywordError, f"{name}: {call} got no loaded_weight, needs a tensor.", param):
        method(tp_rank=0)
    with refused(KeywordError, f"{name}: {call} got loaded_weight twice, needs it once.", param):
        method(numbered((2, 2)), loaded_weight=numbered((2, 2)))
    with refused(KeywordError, f"{name}: {call} got 8 values, needs {good}.", param):
        method(*[numbered((2, 2))] * 8)
    with pytest.raises(TypeError):
        method(numbered((2, 2)), shard_ids=0)


def test_a_rank_alone_cannot_tell_a_longer_tensor_but_a_shorter_one() -> None:
    """With nothing but `tp_rank=`, T is what the tensor says."""
    param = ModelWeightParameter(data=poisoned((4, 1)), input_dim=1, output_dim=0)
    with refused(
        ShapeError,
        "ModelWeightParameter: tensor has 8 entries along the cut dim, needs at least 12 "
        "(4 for each piece up to rank 2's).",
        param,
    ):
        param.load_column_parallel_weight(numbered((8, 1)), tp_rank=2)
    with refused(
        ShapeError,
        "ModelWeightParameter: tensor is int64[9, 1], needs int64[8, 1] (8 = 2 pieces * 4).",
        param,
    ):
        param.load_column_parallel_weight(numbered((9, 1)), tp_rank=0)


def test_data_that_is_no_tensor() -> None:
    with refused(DeclarationError, "BasevLLMParameter: data is list, needs a tensor."):
        BasevLLMParameter(data=[1.0], weight_loader=None)


def test_a_scale_without_slots() -> None:
    param = PerTensorScaleParameter(data=torch.tensor(1.0), weight_loader=None)
    with refused(
        DeclarationError,
        "PerTensorScaleParameter: has no dims, needs one entry for each part.",
        param,
    ):
        param.load_qkv_weight(torch.tensor(1.0), shard_id="q")


def test_a_rank_that_was_overwritten_with_nonsense() -> None:
    param = RowvLLMParameter(data=poisoned((2,)), input_dim=0, weight_loader=None)
    param.tp_rank, param.tp_size = 3, 2
    with refused(CallError, "RowvLLMParameter: tp_rank is 3, needs 0 to 1 (tp_size is 2).", param):
        param.load_row_parallel_weight(numbered((4,)))
    param.tp_size = 0
    with refused(CallError, "RowvLLMParameter: tp_size is 0, needs an int of at least 1.", param):
        param.load_row_parallel_weight(numbered((4,)))
    with as_current(Ranks(tp_rank=0, tp_size=2)):
        del param  # the attributes of one parameter are no other's
        other = RowvLLMParameter(data=poisoned((2,)), input_dim=0, weight_loader=None)
        other.load_row_parallel_weight(numbered((4,)))
    assert other.data.tolist() == [0, 1]
