"""Tensors, parameters and brute-force expectations for the tests of the parameter classes.

`numbered` tensors hold each element's own row-major number, so an expectation is plain index
arithmetic: which numbers must lie where. No code of lading is used to make one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch

from lading.errors import LadingError
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
    _ColumnvLLMParameter,
)
from lading.ranks import Ranks, as_current

COLUMN_ONLY = (_ColumnvLLMParameter, ChannelQuantScaleParameter, PackedColumnParameter)
BOTH = (
    ModelWeightParameter,
    GroupQuantScaleParameter,
    BlockQuantScaleParameter,
    PackedvLLMParameter,
)
COLUMN = COLUMN_ONLY + BOTH
ROW = (RowvLLMParameter, *BOTH)
WHOLE = (BasevLLMParameter, PerTensorScaleParameter)
ALL = (*WHOLE, RowvLLMParameter, *COLUMN)
PACKED = (PackedColumnParameter, PackedvLLMParameter)

POISON = -77


def numbered(shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """0, 1, 2, ... in row-major order."""
    return torch.arange(prod(shape)).reshape(tuple(shape)).to(dtype)


def poisoned(shape: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """What no load writes."""
    return torch.full(tuple(shape), POISON, dtype=torch.int64).to(dtype)


def make(cls: type[Any], data: torch.Tensor, **keywords: Any) -> Any:
    """A parameter of any class, with only the dims that the class has, named after its class."""
    facts: dict[str, Any] = {"data": data, "weight_loader": None}
    if issubclass(cls, _ColumnvLLMParameter):
        facts["output_dim"] = keywords.get("output_dim", 0)
    if issubclass(cls, RowvLLMParameter):
        facts["input_dim"] = keywords.get("input_dim", 1)
    if cls in PACKED:
        facts["packed_factor"] = keywords.get("packed_factor", 8)
        facts["packed_dim"] = keywords.get("packed_dim", 1)
        facts["marlin_tile_size"] = keywords.get("marlin_tile_size")
    param = cls(**facts)
    param.qualified_name = cls.__name__  # spares each refusal the search for a model
    return param


def moved(
    target: Sequence[int], full: Sequence[int], dim: int, *, at: int, size: int, first: int
) -> torch.Tensor:
    """A poisoned target whose entries at : at + size of `dim` hold a full numbered tensor's entries
    first : first + size. Element by element.
    """
    expected = poisoned(target)
    for index in itertools.product(*map(range, target)):
        if not at <= index[dim] < at + size:
            continue
        source = list(index)
        source[dim] = index[dim] - at + first
        number = 0
        for i, n in zip(source, full, strict=True):
            number = number * n + i
        expected[index] = number
    return expected


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor, in row-major order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def times(shape: Sequence[int], dim: int, factor: int) -> list[int]:
    """The shape with one dim multiplied."""
    return [n * factor if i == dim else n for i, n in enumerate(shape)]


@contextmanager
def refused(error: type[LadingError], text: str, *params: torch.Tensor) -> Iterator[None]:
    """The block raises exactly this error, and leaves the bytes of the parameters as they were."""
    before = [bits(param) for param in params]
    with pytest.raises(LadingError) as caught:
        yield
    assert str(caught.value) == text
    assert type(caught.value) is error
    assert [bits(param) for param in params] == before


def on_every_rank(tp_size: int, check: Callable[[], None]) -> None:
    """Runs a check as each of the ranks."""
    for rank in range(tp_size):
        with as_current(Ranks(tp_rank=rank, tp_size=tp_size)):
            check()
