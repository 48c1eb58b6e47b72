"""From logical elements to packed words: exactly, or not at all."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.errors import DeclarationError, LadingError, LayoutError
from lading.parameter import (
    PackedColumnParameter,
    PackedvLLMParameter,
    _adjust_shard_indexes_for_marlin,
    _adjust_shard_indexes_for_packing,
)
from lading.ranks import Ranks, as_current

from .made import PACKED, bits, make, moved, numbered, poisoned, refused


@pytest.mark.parametrize(
    ("factor", "tile", "size", "offset", "words"),
    [
        (8, None, 64, 24, (8, 3)),
        (4, None, 64, 24, (16, 6)),
        (8, 16, 64, 24, (128, 48)),
        (Fraction(32, 3), None, 64, 32, (6, 3)),
        (Fraction(32, 3), 2, 64, 32, (12, 6)),
        (Fraction(8), None, 0, 8, (0, 1)),
        (1, None, 5, 7, (5, 7)),
    ],
)
def test_words(
    factor: int | Fraction, tile: int | None, size: int, offset: int, words: tuple[int, int]
) -> None:
    found = _adjust_shard_indexes_for_packing(
        shard_size=size, shard_offset=offset, packed_factor=factor, marlin_tile_size=tile
    )
    assert found == words
    assert all(type(count) is int for count in found)
    for cls in PACKED:
        param = make(
            cls, torch.zeros(2, 2), packed_factor=factor, marlin_tile_size=tile, packed_dim=0
        )
        assert param.adjust_shard_indexes_for_packing(size, offset) == words


def test_marlin_tiles() -> None:
    assert _adjust_shard_indexes_for_marlin(3, 5, marlin_tile_size=16) == (48, 80)


@pytest.mark.parametrize("cls", PACKED)
def test_packings_that_cannot_be(cls: type[Any]) -> None:
    data = torch.zeros(2, 2, dtype=torch.int32)
    for facts, text in [
        ({"packed_factor": 0}, "packed_factor is 0, needs a positive int or Fraction."),
        ({"packed_factor": 2.5}, "packed_factor is 2.5, needs a positive int or Fraction."),
        ({"packed_dim": 2}, "packed_dim is 2, needs a dim of its shape [2, 2]."),
        ({"marlin_tile_size": 0}, "marlin_tile_size is 0, needs an int of at least 1 or None."),
    ]:
        with refused(DeclarationError, f"{cls.__name__}: {text}"):
            make(cls, data, **facts)
    param = make(cls, data)
    with refused(
        LayoutError,
        f"{cls.__name__}: a shard size of 12 rows is no whole number of packed words: "
        "8 elements in a word, 12 = 1 * 8 + 4.",
    ):
        param.adjust_shard_indexes_for_packing(shard_size=12, shard_offset=0)
    with refused(
        LayoutError,
        "a shard size of 12 rows is no whole number of packed words: "
        "8 elements in a word, 12 = 1 * 8 + 4.",
    ):
        _adjust_shard_indexes_for_packing(12, 0, 8, None)


@settings(max_examples=300, deadline=None)
@given(
    cls=st.sampled_from(PACKED),
    factor=st.sampled_from([8, 4, 2, 1, Fraction(32, 3), Fraction(32, 5)]),
    tile=st.sampled_from([None, 2, 16]),
    offset=st.integers(0, 96),
    size=st.integers(0, 96),
    ranks=st.integers(1, 4).flatmap(lambda t: st.tuples(st.integers(0, t - 1), st.just(t))),
)
def test_random_packings(
    cls: type[PackedColumnParameter | PackedvLLMParameter],
    factor: int | Fraction,
    tile: int | None,
    offset: int,
    size: int,
    ranks: tuple[int, int],
) -> None:
    """Bits are counted: words that are not filled exactly are refused, never rounded."""
    rank, tp_size = ranks
    numerator, denominator = Fraction(factor).as_integer_ratio()
    exact = (size * denominator) % numerator == 0 and (offset * denominator) % numerator == 0
    words, at = (n * denominator // numerator * (tile or 1) for n in (size, offset))
    local = [48 * (tile or 1)]
    facts = {"packed_factor": factor, "packed_dim": 0, "marlin_tile_size": tile, "input_dim": 0}
    with as_current(Ranks(tp_rank=rank, tp_size=tp_size)):
        param = make(cls, poisoned(local, torch.int32), **facts)
        full = numbered([words * tp_size], torch.int32)
        before, error = bits(param), None
        try:
            param.load_merged_column_weight(full, 0, shard_offset=offset, shard_size=size)
        except LadingError as raised:
            error = raised
    assert error is None or bits(param) == before
    assert (error is None) == (exact and at + words <= local[0])
    if error is None:
        want = moved(local, [words * tp_size], 0, at=at, size=words, first=rank * words)
        assert torch.equal(param.data, want.int())
