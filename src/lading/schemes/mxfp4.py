"""MXFP4 as gpt-oss stores it (quant_method "mxfp4"): all experts of a layer in one pair of tensors.

    mlp.experts.gate_up_proj_blocks    U8 [E, 2*F, H/32, 16]   rows 2i = gate i, 2i + 1 = up i
    mlp.experts.gate_up_proj_scales    U8 [E, 2*F, H/32]
    mlp.experts.gate_up_proj_bias      BF16 [E, 2*F]
    mlp.experts.down_proj_blocks       U8 [E, H, F/32, 16]
    mlp.experts.down_proj_scales       U8 [E, H, F/32]
    mlp.experts.down_proj_bias         BF16 [E, H]
    W[e, o, i] = fp4 * 2^(s - 127), fp4 with the low nibble first

`Mxfp4Blocks` is one projection of all experts as a layer: O outputs by I inputs, of each expert.
Gate and up are one part of 2*F outputs, cut into pairs of rows, so that a piece holds a gate's row
and its up's. transformers' own parameters are the transpose, [E, I, O].

Letters: E = experts, H = hidden size, F = intermediate size, O = outputs, I = inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme
from lading.schemes.floating import group_dim
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Mxfp4Blocks", "dequantize_blocks", "split_pairs"]

GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Blocks(Scheme):
    """One projection of every expert.

    projection   "gate_up_proj" or "down_proj": the names' first half
    experts      E
    pairs        rows of two matrices alternate: gate_up_proj
    """

    projection: str
    experts: int
    pairs: bool

    @property
    def name(self) -> str:
        """For reports."""
        return f"MXFP4 of {self.experts} experts, groups of {GROUP}"

    @property
    def blocks(self) -> str:
        """The name of the packed weight."""
        return f"{self.projection}_blocks"

    @property
    def scales(self) -> str:
        """The name of its scales."""
        return f"{self.projection}_scales"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """Blocks and scales."""
        outputs = Dim(
            along=Along.OUTPUT,
            align=2 if self.pairs else 1,
            align_reason="rows of gate and up alternate",
        )
        dims = (Dim(along=Along.FIXED, size=self.experts), outputs, group_dim(GROUP))
        packed = Dim(along=Along.FIXED, size=GROUP // 2)
        return (
            TensorSpec(name=self.blocks, dims=(*dims, packed), dtypes=("U8",)),
            TensorSpec(name=self.scales, dims=dims, dtypes=("U8", "F8_E8M0")),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [E, O, I]: of every expert, rows in the file's order (see `split_pairs`)."""
        return dequantize_blocks(tensors[self.blocks], tensors[self.scales])


def dequantize_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [..., O, I] of blocks U8 [..., O, I/32, 16] and scales U8 [..., O, I/32].

    Any rows, any run of blocks, and any number of experts decode by themselves.
    """
    from lading.schemes.bits import e2m1, e8m0, low_nibbles_first

    values = e2m1(low_nibbles_first(blocks))
    return (values * e8m0(scales).unsqueeze(-1)).flatten(-2)


def split_pairs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, [..., F, I] each, of [..., 2*F, I] (or of a bias, with a last dim of 1)."""
    return weight[..., 0::2, :], weight[..., 1::2, :]
