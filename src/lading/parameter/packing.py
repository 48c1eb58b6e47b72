"""From logical elements to packed words, for the sizes and offsets that callers give."""

from __future__ import annotations

from fractions import Fraction

import torch

from lading.errors import DeclarationError, LayoutError

__all__ = ["check_packing"]


def check_packing(
    subject: str, factor: int | Fraction, dim: int, tile: int | None, data: torch.Tensor
) -> None:
    """Raises a DeclarationError where a packing cannot be."""
    problem = None
    if isinstance(factor, bool) or not isinstance(factor, int | Fraction) or factor <= 0:
        problem = f"packed_factor is {factor!r}, needs a positive int or Fraction"
    elif tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        problem = f"marlin_tile_size is {tile!r}, needs an int of at least 1 or None"
    elif data.numel() and not -data.dim() <= dim < data.dim():  # a placeholder has no dims yet
        problem = f"packed_dim is {dim}, needs a dim of its shape {list(data.shape)}"
    if problem is not None:
        raise DeclarationError(problem, subject=subject)


def _adjust_shard_indexes_for_marlin(
    shard_size: int, shard_offset: int, marlin_tile_size: int
) -> tuple[int, int]:
    """(size, offset) in words → in a Marlin layout's words: `tile` times as many an output."""
    return shard_size * marlin_tile_size, shard_offset * marlin_tile_size


def _adjust_shard_indexes_for_packing(
    shard_size: int,
    shard_offset: int,
    packed_factor: int | Fraction,
    marlin_tile_size: int | None,
) -> tuple[int, int]:
    """(size, offset) in logical elements → in stored entries, exactly or with a LayoutError."""
    words = []
    for what, value in (("size", shard_size), ("offset", shard_offset)):
        count = Fraction(value) / packed_factor
        if count.denominator != 1:
            unit = Fraction(packed_factor).numerator
            per = f"{packed_factor} elements in a word"
            raise LayoutError(
                f"a shard {what} of {value} rows is no whole number of packed words: {per}, "
                f"{value} = {value // unit} * {unit} + {value % unit}"
            )
        words.append(int(count))
    if marlin_tile_size is not None:
        return _adjust_shard_indexes_for_marlin(words[0], words[1], marlin_tile_size)
    return words[0], words[1]
