"""The parameter classes of which several elements lie in one stored word."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from lading import owners
from lading.errors import LayoutError
from lading.parameter.base import WeightLoader
from lading.parameter.checks import dim_of
from lading.parameter.classes import ModelWeightParameter, _ColumnvLLMParameter
from lading.parameter.packing import _adjust_shard_indexes_for_packing, check_packing

__all__ = ["PackedColumnParameter", "PackedvLLMParameter"]


class PackedColumnParameter(_ColumnvLLMParameter):
    """A packed parameter that is cut along its outputs only. See PackedvLLMParameter."""

    _packed_factor: int | Fraction
    _packed_dim: int
    _marlin_tile_size: int | None

    def __init__(
        self,
        packed_factor: int | Fraction,
        packed_dim: int,
        marlin_tile_size: int | None = None,
        *,
        output_dim: int,
        data: torch.Tensor,
        weight_loader: WeightLoader | None = None,
        **more: Any,
    ) -> None:
        check_packing(type(self).__name__, packed_factor, packed_dim, marlin_tile_size, data)
        self._packed_factor = packed_factor
        self._packed_dim = packed_dim
        self._marlin_tile_size = marlin_tile_size
        super().__init__(output_dim=output_dim, data=data, weight_loader=weight_loader, **more)

    @property
    def packed_dim(self) -> int:
        """The dim along which elements are packed."""
        return self._packed_dim

    @property
    def packed_factor(self) -> int | Fraction:
        """Elements in one stored word: 8 for int4 in int32, Fraction(32, 3) for 3-bit."""
        return self._packed_factor

    @property
    def marlin_tile_size(self) -> int | None:
        """Marlin tiles hold so many rows of inputs: each output takes that many times the words."""
        return self._marlin_tile_size

    def adjust_shard_indexes_for_packing(
        self, shard_size: int, shard_offset: int
    ) -> tuple[int, int]:
        """(size, offset) in logical elements → in stored entries, exactly or with a LayoutError."""
        try:
            return _adjust_shard_indexes_for_packing(
                shard_size, shard_offset, self.packed_factor, self.marlin_tile_size
            )
        except LayoutError as error:
            raise error.located(subject=owners.name_of(self)) from None

    def _stored(self, size: int, offset: int, dim: int) -> tuple[int, int]:
        if dim_of(self.packed_dim, tuple(self.data.shape)) != dim:
            return size, offset
        # Through the instance: engines replace the method on one parameter.
        return self.adjust_shard_indexes_for_packing(shard_size=size, shard_offset=offset)


class PackedvLLMParameter(ModelWeightParameter):
    """A weight of which several elements lie in one stored word.

    packed_factor      elements in a word: an int, or Fraction(32, 3) for 3-bit in 3 words
    packed_dim         the dim along which they are packed
    marlin_tile_size   for Marlin tiles: multiplies local sizes after the division

    Example: int4, outputs packed, 3 parts of 64 rows a rank: 8 entries each, at 0, 8 and 16.
    """

    _packed_factor: int | Fraction
    _packed_dim: int
    _marlin_tile_size: int | None

    def __init__(
        self,
        packed_factor: int | Fraction,
        packed_dim: int,
        marlin_tile_size: int | None = None,
        *,
        input_dim: int,
        output_dim: int,
        data: torch.Tensor,
        weight_loader: WeightLoader | None = None,
        **more: Any,
    ) -> None:
        check_packing(type(self).__name__, packed_factor, packed_dim, marlin_tile_size, data)
        self._packed_factor = packed_factor
        self._packed_dim = packed_dim
        self._marlin_tile_size = marlin_tile_size
        super().__init__(
            input_dim=input_dim,
            output_dim=output_dim,
            data=data,
            weight_loader=weight_loader,
            **more,
        )

    packed_dim = PackedColumnParameter.packed_dim
    packed_factor = PackedColumnParameter.packed_factor
    marlin_tile_size = PackedColumnParameter.marlin_tile_size
    adjust_shard_indexes_for_packing = PackedColumnParameter.adjust_shard_indexes_for_packing
    _stored = PackedColumnParameter._stored
