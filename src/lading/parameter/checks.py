"""What the load calls check: numbers that callers give, and tensors that they hand over."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from lading import dtypes, writing
from lading.errors import CallError, DeclarationError, LadingError, ShapeError
from lading.layouts import PartName

__all__ = ["as_needed", "check_values", "dim_of", "spelt", "whole_number"]


def dim_of(dim: int, shape: tuple[int, ...]) -> int:
    """The dim counted from the front. Raises a DeclarationError where the shape has none such."""
    if not -len(shape) <= dim < len(shape):
        raise DeclarationError(f"is cut along dim {dim}, needs a dim of its shape {list(shape)}")
    return dim % len(shape)


def whole_number(keyword: str, value: Any, *, least: int = 0, part: PartName = None) -> int:
    """The value as an int. Raises a CallError where it is none, or too small."""
    try:
        number = operator.index(value) if not isinstance(value, bool) else None
    except TypeError:
        number = None
    if number is None or number < least:
        raise CallError(f"{keyword} is {value!r}, needs an int of at least {least}", part=part)
    return number


def check_values(loaded_weight: torch.Tensor, data: torch.Tensor) -> None:
    """Raises where the tensor's values cannot become those of `data`.

    The whole tensor is looked at, not only this rank's piece: every rank reaches the same verdict.
    """
    writing.check_dtypes(loaded_weight.dtype, data.dtype)
    if type(loaded_weight) is torch.Tensor and loaded_weight.is_meta and not data.is_meta:
        raise CallError("loaded_weight is on meta, needs a tensor with values")
    writing.check_values(loaded_weight, data.dtype)


def as_needed(
    loaded: torch.Tensor, needed: tuple[int, ...], dtype: torch.dtype, why: str
) -> torch.Tensor:
    """The tensor, if it has the full shape that is needed; a 0-d one fits (1,)."""
    shape = tuple(loaded.shape)
    if shape == needed:
        return loaded
    if shape == () and needed == (1,):
        return loaded.reshape(1)
    transposed = "; it is transposed" if len(shape) == 2 and shape == needed[::-1] else ""
    try:
        writing.check_dtypes(loaded.dtype, dtype)
        dtype = loaded.dtype  # it may stay as it is: only the shape is wrong
    except LadingError:
        pass
    have, want = spelt(loaded.dtype, shape), spelt(dtype, needed)
    raise ShapeError(f"tensor is {have}, needs {want} ({why}{transposed})")


def spelt(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """bf16[4, 8]; a dtype that no file has is spelt as torch does."""
    try:
        return dtypes.spell(dtypes.from_torch(dtype), tuple(shape))
    except LookupError:
        return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
