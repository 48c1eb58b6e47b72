"""Which parameter class a stored tensor gets, by its dims alone."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch

from lading.layers import Layer
from lading.nn.stored import parameter_of
from lading.parameter import (
    BasevLLMParameter,
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
)
from lading.specs import Along, Dim, TensorSpec

OUT, IN, PARTS = Along.OUTPUT, Along.INPUT, Along.PARTS
INT, HALF, FP8 = torch.int32, torch.float16, torch.float8_e4m3fn


def dim(along: Along, grain: Any = 1) -> Dim:
    return Dim(along=along, grain=Fraction(grain))


@dataclass(frozen=True)
class Case:
    id: str
    dims: tuple[Dim, ...]
    dtype: torch.dtype
    cls: type[BasevLLMParameter]
    facts: dict[str, Any]
    row: bool = False


CASES = [
    Case(
        "weight", (dim(OUT), dim(IN)), HALF, ModelWeightParameter, {"output_dim": 0, "input_dim": 1}
    ),
    Case("fp8", (dim(IN), dim(OUT)), FP8, ModelWeightParameter, {"output_dim": 1, "input_dim": 0}),
    Case(
        "packed along inputs",
        (dim(IN, 8), dim(OUT)),
        INT,
        PackedvLLMParameter,
        {"output_dim": 1, "input_dim": 0, "packed_dim": 0, "packed_factor": 8},
    ),
    Case(
        "packed by three bits",
        (dim(IN, "32/3"), dim(OUT)),
        INT,
        PackedvLLMParameter,
        {"packed_dim": 0, "packed_factor": Fraction(32, 3)},
    ),
    Case(
        "zero points",
        (dim(IN, 64), dim(OUT, 8)),
        INT,
        PackedvLLMParameter,
        {"packed_dim": 1, "packed_factor": 8},
    ),
    Case(
        "group scales",
        (dim(IN, 64), dim(OUT)),
        HALF,
        GroupQuantScaleParameter,
        {"output_dim": 1, "input_dim": 0},
    ),
    Case(
        "block scales",
        (dim(OUT, 64), dim(IN, 64)),
        torch.float32,
        BlockQuantScaleParameter,
        {"output_dim": 0, "input_dim": 1},
    ),
    Case("bias", (dim(OUT),), HALF, ChannelQuantScaleParameter, {"output_dim": 0}),
    Case("bias of rows", (dim(OUT),), HALF, BasevLLMParameter, {}, row=True),
    Case("packed vector", (dim(OUT, 8),), INT, PackedColumnParameter, {"packed_dim": 0}),
    Case("input scales", (dim(IN, 64),), HALF, RowvLLMParameter, {"input_dim": 0}, row=True),
    Case("scales of tensors", (dim(PARTS),), HALF, PerTensorScaleParameter, {}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_class_and_dims(case: Case) -> None:
    layer = Layer.row(192, 256) if case.row else Layer.column(192, [256])
    spec = TensorSpec(name="x", dims=case.dims)
    layout = layer.layout(spec, 1)
    data = torch.empty(layout.local_shape).to(case.dtype)

    def loader(*_: object) -> None:
        return None

    param = parameter_of(spec, layout, data, loader)
    assert type(param) is case.cls
    assert {name: getattr(param, name) for name in case.facts} == case.facts
    assert param.weight_loader is loader
    assert param.data_ptr() == data.data_ptr()
