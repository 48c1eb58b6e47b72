"""From a stored tensor's spec to a parameter of the right class, and to what a plan compares.

The class says to engines what the dims are; how the tensor is cut follows from its layout alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lading.layouts import Layout
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

if TYPE_CHECKING:
    from lading.nn.base import ParallelLayer

__all__ = ["KernelFormat", "parameter_of"]

MARLIN_TILE = 16
"""Rows of inputs in a Marlin tile (https://github.com/IST-DASLab/marlin)."""


class KernelFormat(Protocol):
    """How an engine's kernel holds a layer's weights.

    pack     replaces the layer's stored parameters by the kernel's, after loading
    unpack   the inverse, None where there is none
    apply    the product with the packed weights
    """

    def pack(self, layer: ParallelLayer) -> None:
        """Packs the layer's weights."""

    unpack: Callable[[ParallelLayer], None] | None

    def apply(
        self, layer: ParallelLayer, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """X @ weight.T + bias."""


def parameter_of(
    spec: TensorSpec, layout: Layout, data: torch.Tensor, loader: Callable[..., Any]
) -> BasevLLMParameter:
    """The parameter class that fits the spec's dims."""
    along = [dim.along for dim in spec.dims]
    if along[0] is Along.PARTS:
        cls = PerTensorScaleParameter if len(along) == 1 else BasevLLMParameter
        return cls(data=data, weight_loader=loader)
    output = along.index(Along.OUTPUT) if Along.OUTPUT in along else None
    inputs = along.index(Along.INPUT) if Along.INPUT in along else None
    packed = _packing(spec, data.dtype)
    if output is not None and inputs is not None:
        both: dict[str, Any] = {
            "data": data,
            "weight_loader": loader,
            "output_dim": output,
            "input_dim": inputs,
        }
        if packed is not None:
            return PackedvLLMParameter(**both, **packed)
        return _two_dims(spec.dims[output], spec.dims[inputs], both)
    if output is not None:
        if not any(part.max_pieces != 1 for part in layout.cuts[output].axis.parts):
            return BasevLLMParameter(data=data, weight_loader=loader)
        one: dict[str, Any] = {"data": data, "weight_loader": loader, "output_dim": output}
        if packed is not None:
            return PackedColumnParameter(**one, **packed)
        return ChannelQuantScaleParameter(**one)
    if inputs is not None:
        return RowvLLMParameter(data=data, input_dim=inputs, weight_loader=loader)
    return BasevLLMParameter(data=data, weight_loader=loader)


def _two_dims(output: Dim, inputs: Dim, both: dict[str, Any]) -> BasevLLMParameter:
    if both["data"].dtype.is_floating_point and both["data"].element_size() > 0:
        if output.grain > 1 and inputs.grain > 1:
            return BlockQuantScaleParameter(**both)
        if inputs.grain > 1:
            return GroupQuantScaleParameter(**both)
    return ModelWeightParameter(**both)


def _packing(spec: TensorSpec, dtype: torch.dtype) -> dict[str, Any] | None:
    """Which dim holds packed words, for tensors of int32 words."""
    if dtype != torch.int32:
        return None
    grained = [i for i, dim in enumerate(spec.dims) if dim.grain != 1]
    if not grained:
        return None
    outputs = [i for i in grained if spec.dims[i].along is Along.OUTPUT]
    dim = grained[0] if len(grained) == 1 or not outputs else outputs[0]
    grain = spec.dims[dim].grain
    tile = MARLIN_TILE if grain < 1 else None
    factor = grain if tile is None else grain * tile
    whole = int(factor) if factor.denominator == 1 else factor
    return {"packed_dim": dim, "packed_factor": whole, "marlin_tile_size": tile}
