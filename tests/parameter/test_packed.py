"""The packed classes: logical sizes and offsets become words, where the outputs are packed."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from lading.parameter import PackedColumnParameter, PackedvLLMParameter
from lading.ranks import all_ranks, as_current

from .made import POISON, make, numbered, poisoned


@pytest.mark.parametrize(
    ("factor", "logical"),
    [(8, (64, 16, 8)), (4, (8, 4, 4)), (Fraction(32, 3), (32, 64, 32)), (Fraction(8), (8, 8, 8))],
)
@pytest.mark.parametrize("tile", [None, 16])
@pytest.mark.parametrize("cls", [PackedColumnParameter, PackedvLLMParameter])
def test_packed_outputs(
    cls: type[Any], tile: int | None, factor: int | Fraction, logical: tuple[int, ...]
) -> None:
    """Sizes and offsets are logical; words are counted by hand: n * bits / 32, then tiles."""
    words = [n * 3 // 32 if factor == Fraction(32, 3) else n // int(factor) for n in logical]
    words = [n * (tile or 1) for n in words]
    shape = (2, sum(words))
    for ranks in all_ranks(3):
        with as_current(ranks):
            param = make(
                cls,
                poisoned(shape, torch.int32),
                output_dim=1,
                input_dim=0,
                packed_dim=1,
                packed_factor=factor,
                marlin_tile_size=tile,
            )
            for part, (n, count) in enumerate(zip(logical, words, strict=True)):
                full = numbered((2, 3 * count), torch.int32) + 1000 * part
                offset = sum(logical[:part])
                assert param.adjust_shard_indexes_for_packing(
                    shard_size=n, shard_offset=offset
                ) == (count, sum(words[:part]))
                param.load_merged_column_weight(
                    full, shard_id=part, shard_offset=offset, shard_size=n
                )
                at, first = sum(words[:part]), ranks.tp_rank * count
                got = param.data[:, at : at + count]
                assert got.tolist() == [row[first : first + count] for row in full.tolist()]
        assert POISON not in param.data


@pytest.mark.parametrize("cls", [PackedColumnParameter, PackedvLLMParameter])
def test_packed_inputs_leave_outputs_alone(cls: type[Any]) -> None:
    """Offsets along an unpacked output dim are not divided."""
    for ranks in all_ranks(2):
        with as_current(ranks):
            param = make(cls, poisoned((3, 2), torch.int32), packed_dim=1, packed_factor=8)
            param.load_merged_column_weight(
                numbered((4, 2), torch.int32), shard_id=1, shard_offset=1, shard_size=2
            )
        first = ranks.tp_rank * 4
        assert param.data.flatten().tolist() == [POISON, POISON, *range(first, first + 4)]


def test_dims_counted_from_the_end() -> None:
    for ranks in all_ranks(2):
        with as_current(ranks):
            param = PackedvLLMParameter(
                data=poisoned((2, 4), torch.int32),
                input_dim=-2,
                output_dim=-1,
                packed_dim=1,
                packed_factor=8,
            )
            param.load_qkv_weight(
                numbered((2, 4), torch.int32),
                shard_id="k",
                shard_offset=16,
                shard_size=16,
                num_heads=1,
            )
            first = 2 * ranks.tp_rank
            assert param.data[:, 2:].tolist() == [[first, first + 1], [4 + first, 5 + first]]


def test_engines_replace_the_packing_of_one_parameter() -> None:
    param = PackedColumnParameter(
        data=poisoned((3, 1), torch.int32), output_dim=0, packed_dim=0, packed_factor=64
    )
    param.adjust_shard_indexes_for_packing = lambda shard_size, shard_offset: (
        max(shard_size // 64, 1),
        shard_offset // 64,
    )
    param.load_merged_column_weight(
        torch.ones(1, 1, dtype=torch.int32), shard_id=1, shard_offset=64, shard_size=32
    )
    assert param.data.flatten().tolist() == [POISON, 1, POISON]


def test_engines_subclass_with_narrower_calls() -> None:
    class Unpacked(PackedvLLMParameter):
        def __init__(self, packed_factor: int, packed_dim: int, weight_bits: int, **more: Any):
            super().__init__(packed_factor, packed_dim, None, **more)
            self.weight_bits = weight_bits

        def load_merged_column_weight(self, loaded_weight: torch.Tensor, **more: Any) -> None:
            super().load_merged_column_weight(loaded_weight.t(), **more)

    param = Unpacked(
        weight_bits=4,
        packed_factor=8,
        packed_dim=0,
        data=poisoned((4, 2), torch.int32),
        input_dim=0,
        output_dim=1,
        weight_loader=None,
    )
    param.load_merged_column_weight(
        torch.ones(1, 4, dtype=torch.int32), shard_id=0, shard_offset=1, shard_size=1
    )
    assert param.data[:, 1].tolist() == [1] * 4
    param._assert_and_load(torch.ones(4, 2, dtype=torch.int32))
    assert param.weight_bits == 4
