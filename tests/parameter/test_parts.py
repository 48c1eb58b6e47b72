"""load_part: by a parameter's own declared layout, padding included."""

from __future__ import annotations

import pytest
import torch

from lading.errors import CallError, DeclarationError, DtypeError, LayoutError, ShapeError
from lading.layouts import Axis, Cut, Layout, Part
from lading.parameter import ModelWeightParameter, load_part
from lading.ranks import Ranks, all_ranks

from .made import POISON, numbered, poisoned, refused


def vocabulary(tp_size: int, dtype: torch.dtype = torch.int64) -> ModelWeightParameter:
    """10 tokens, padded to a multiple of 4 and of T."""
    rows = Axis(parts=(Part(size=10, pad_to=4),))
    layout = Layout(cuts=(Cut(axis=rows), Cut(axis=Axis.of(3, max_pieces=1))), tp_size=tp_size)
    param = ModelWeightParameter(
        data=poisoned(layout.local_shape, dtype), input_dim=1, output_dim=0, weight_loader=None
    )
    param.tp_layout, param.qualified_name = layout, "embed.weight"
    return param


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 12])
def test_padding_is_zero_and_rows_are_the_tensors(tp_size: int) -> None:
    rows = []
    for ranks in all_ranks(tp_size):
        param = vocabulary(tp_size)
        load_part(param, numbered((10, 3)), ranks=ranks)
        assert POISON not in param.data
        assert param._ledger.missing(param, ()) is None
        rows += param.data.tolist()
    assert len(rows) == 12
    assert rows == [*numbered((10, 3)).tolist(), [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("tp_size", [2, 12])
def test_refusals_write_nothing_on_any_rank(tp_size: int) -> None:
    """Not even padding; nor does a rank that has only padding pass what the others refuse."""
    for ranks in all_ranks(tp_size):
        param = vocabulary(tp_size)
        with refused(
            ShapeError,
            "embed.weight: tensor is int64[11, 3], needs int64[10, 3] (the declared layout).",
            param,
        ):
            load_part(param, numbered((11, 3)), ranks=ranks)
        with refused(
            DtypeError,
            "embed.weight: tensor is fp32, needs int64 (a float does not fit into an integer).",
            param,
        ):
            load_part(param, torch.zeros(10, 3), ranks=ranks)
        half = vocabulary(tp_size, torch.float16)
        with refused(
            DtypeError,
            "embed.weight: 30 values are too large for fp16: up to 1e+06, needs at most 65504.",
            half,
        ):
            load_part(half, torch.full((10, 3), 1e6), ranks=ranks)


def test_parts() -> None:
    parts = Axis(parts=(Part(name="gate", size=4), Part(name="up", size=2)))
    layout = Layout(cuts=(Cut(axis=parts), Cut(axis=Axis.of(1, max_pieces=1))), tp_size=2)
    for ranks in all_ranks(2):
        apart, fused = (
            ModelWeightParameter(data=poisoned((3, 1)), input_dim=1, output_dim=0) for _ in range(2)
        )
        apart.tp_layout = fused.tp_layout = layout
        load_part(apart, numbered((4, 1)), part="gate", ranks=ranks)
        load_part(apart, numbered((2, 1)) + 4, part="up", ranks=ranks)
        for part in ("gate", "up"):
            load_part(fused, numbered((6, 1)), part=part, ranks=ranks, fused_source=True)
        want = [[2 * ranks.tp_rank], [2 * ranks.tp_rank + 1], [4 + ranks.tp_rank]]
        assert apart.data.tolist() == fused.data.tolist() == want
    fused.qualified_name = "gate_up.weight"
    with refused(
        LayoutError, "gate_up.weight: has no part 'down', needs one of: 'gate', 'up'.", fused
    ):
        load_part(fused, numbered((6, 1)), part="down", ranks=ranks)


def test_a_declaration_that_does_not_fit() -> None:
    param = vocabulary(2)
    with refused(
        CallError,
        "embed.weight: is loaded as rank 1 of 3, needs a rank of 2 (the declared layout).",
        param,
    ):
        load_part(param, numbered((10, 3)), ranks=Ranks(tp_rank=1, tp_size=3))
    param.data = poisoned((5, 3))
    with refused(
        DeclarationError,
        "embed.weight: has shape [5, 3], needs [6, 3] (the declared layout).",
        param,
    ):
        load_part(param, numbered((10, 3)), ranks=Ranks(tp_rank=1, tp_size=2))
    param.tp_layout = None
    with refused(DeclarationError, "embed.weight: declares no layout, needs `tp_layout`.", param):
        load_part(param, numbered((10, 3)), ranks=Ranks(tp_rank=1, tp_size=2))
