"""Integer weights whose inputs are multiplied by a stored vector: ModelOpt's AWQ and SmoothQuant.

    PairedInt4     weight U8 [O/2, I]: row i holds rows 2i (low nibble) and 2i + 1 (high nibble),
                   two's complement; weight_scale [O, I/g]; pre_quant_scale [I] or folded away
                   W = int4 * s * p[k]
    SmoothedInt8   weight I8 [O, I]; weight_scale [O]; input_scale []; pre_quant_scale [I] or none
                   W = w * s * p[k]

Letters: O = outputs, I = inputs, k = an input, g = group size, p = pre_quant_scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme
from lading.schemes.evidence import MODEL_DTYPES
from lading.schemes.floating import group_dim, scalar_specs
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["PairedInt4", "SmoothedInt8"]

PRE_QUANT_SCALE = "pre_quant_scale"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedInt4(Scheme):
    """int4 in groups along the inputs, two outputs in a byte."""

    group_size: int

    @property
    def name(self) -> str:
        """For reports."""
        return f"int4 by pairs of outputs, groups of {self.group_size}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """weight, weight_scale and, where there is one, pre_quant_scale."""
        pairs = Dim(
            along=Along.OUTPUT,
            grain=Fraction(2),
            reason="int4 packs 2 outputs per uint8 entry",
        )
        scale = (Dim(along=Along.OUTPUT), group_dim(self.group_size))
        return (
            TensorSpec(name="weight", dims=(pairs, Dim(along=Along.INPUT)), dtypes=("U8",)),
            TensorSpec(name="weight_scale", dims=scale, dtypes=MODEL_DTYPES),
            *_pre_quant_specs(found),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        from lading.schemes.bits import spread

        packed, scale = tensors["weight"], tensors["weight_scale"].to(torch.float32)
        codes = torch.stack((packed & 0xF, packed >> 4), dim=1).flatten(0, 1).to(torch.float32)
        values = torch.where(codes >= 8, codes - 16, codes)
        weight = values * spread(scale, 1, self.group_size, 0, view.inputs)
        return _smoothed(weight, tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothedInt8(Scheme):
    """int8 with one scale an output."""

    @property
    def name(self) -> str:
        """For reports."""
        return "int8, one scale an output"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """weight, weight_scale and, where there are, input_scale and pre_quant_scale."""
        output = Dim(along=Along.OUTPUT)
        return (
            TensorSpec(name="weight", dims=(output, Dim(along=Along.INPUT)), dtypes=("I8",)),
            TensorSpec(name="weight_scale", dims=(output,), dtypes=MODEL_DTYPES),
            *scalar_specs(found, ("input_scale",)),
            *_pre_quant_specs(found),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        scale = tensors["weight_scale"].to(torch.float32).unsqueeze(1)
        return _smoothed(tensors["weight"].to(torch.float32) * scale, tensors)


def _pre_quant_specs(found: Found) -> tuple[TensorSpec, ...]:
    """A row for each part: parts of a fused layer have their own."""
    if PRE_QUANT_SCALE not in found.tensors:
        return ()
    dims = (Dim(along=Along.PARTS), Dim(along=Along.INPUT))
    return (
        TensorSpec(name=PRE_QUANT_SCALE, dims=dims, dtypes=MODEL_DTYPES, stored=(found.inputs,)),
    )


def _smoothed(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    scale = tensors.get(PRE_QUANT_SCALE)
    return weight if scale is None else weight * scale.reshape(1, -1).to(weight.dtype)
