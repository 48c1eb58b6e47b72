"""FP8, NVFP4, MXFP4 and MXFP8 weights with their scales, for every config that describes them.

No configs here: names and shapes differ between producers and are fields. Letters: O = outputs,
I = inputs, (b, c) = outputs and inputs of a block, g = group size along the inputs.

    Fp8      weight F8_E4M3 [O, I], scale by `layout`:
                 TENSOR     [] or [1]
                 CHANNEL    [O] or [O, 1]
                 BLOCK      [O/b, I/c] or [O/b, 1, I/c, 1], last blocks may be partial
                 GROUP      [O, I/g]; exponents (uint8, e8m0) with g = 32 are MXFP8
             W = w * s, or w / s where `divide`
    Nvfp4    weight U8 [O, I/2], low nibble first; scale F8_E4M3 [O, I/16]; global scale [] or [1]
             W = fp4 * (s * global), or fp4 * (s / global) where `divide`
    Mxfp4    weight U8 [O, I/2], low nibble first; scale U8 [O, I/32]
             W = fp4 * 2^(s - 127)
    each     and, where the checkpoint has them, scalars for the inputs

Which of two shapes a scale has follows from the headers: they mean the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING

from lading.errors import ConfigError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = [
    "Fp8",
    "Mxfp4",
    "Nvfp4",
    "ScaleLayout",
    "fp4_spec",
    "group_dim",
    "scalar_spec",
    "scalar_specs",
]

FLOATS = ("F32", "BF16", "F16")
EXPONENTS = ("U8", "F8_E8M0")


class ScaleLayout(str, Enum):
    """What one scale covers."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"
    GROUP = "group"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8(Scheme):
    """FP8 weights, one value per byte.

    layout       what one scale covers
    block        (b, c) of BLOCK; (1, g) of GROUP
    scale        the scale's name: "weight_scale", "weight_scale_inv"
    exponents    scales must be powers of two, stored as their exponents: MXFP8. Where False,
                 exponents are still taken for what their dtype shows they are
    divide       W = w / s
    scalars      names of scalars for the inputs that the module may have: "input_scale"
    dtypes       of the weight
    """

    layout: ScaleLayout
    block: tuple[int, int] = (128, 128)
    scale: str = "weight_scale"
    exponents: bool = False
    divide: bool = False
    scalars: tuple[str, ...] = ("input_scale",)
    dtypes: tuple[str, ...] = ("F8_E4M3",)

    def __post_init__(self) -> None:
        if min(self.block) < 1 or (self.layout is ScaleLayout.GROUP and self.block[0] != 1):
            raise ConfigError(f"FP8 scales of {self.layout.value}s cover {self.block}")

    @property
    def name(self) -> str:
        """For reports."""
        kind = "MXFP8" if self.exponents else "FP8"
        return f"{kind}, {self.covers}"

    @property
    def covers(self) -> str:
        """What one scale covers, in words."""
        return {
            ScaleLayout.TENSOR: "one scale a tensor",
            ScaleLayout.CHANNEL: "one scale an output",
            ScaleLayout.BLOCK: f"blocks of {self.block[0]} x {self.block[1]}",
            ScaleLayout.GROUP: f"groups of {self.block[1]}",
        }[self.layout]

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """weight, scale, and the scalars that there are."""
        weight = TensorSpec(
            name="weight",
            dims=(Dim(along=Along.OUTPUT), Dim(along=Along.INPUT)),
            dtypes=self.dtypes,
        )
        return (weight, self._scale_spec(found), *scalar_specs(found, self.scalars))

    def _scale_spec(self, found: Found) -> TensorSpec:
        dtypes = EXPONENTS if self.exponents else FLOATS + EXPONENTS
        if self.layout is ScaleLayout.TENSOR:
            return scalar_spec(found, self.scale, dtypes)
        shown = found.tensors.get(self.scale)
        num_dims = len(shown.shape) if shown is not None else 2
        one = Dim(along=Along.FIXED)
        dims: tuple[Dim, ...]
        if self.layout is ScaleLayout.CHANNEL:
            output = Dim(along=Along.OUTPUT)
            dims = (output,) if num_dims == 1 else (output, one)
        elif self.layout is ScaleLayout.GROUP:
            dims = (Dim(along=Along.OUTPUT), group_dim(self.block[1]))
        else:
            rows, columns = (
                Dim(
                    along=along,
                    grain=Fraction(size),
                    ragged=True,
                    straddle=True,
                    reason=f"one scale covers {size} {word}",
                )
                for along, size, word in zip(
                    (Along.OUTPUT, Along.INPUT), self.block, ("outputs", "inputs"), strict=True
                )
            )
            dims = (rows, one, columns, one) if num_dims == 4 else (rows, columns)
        return TensorSpec(name=self.scale, dims=dims, dtypes=dtypes)

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        from lading.schemes.bits import spread

        weight, scale = tensors["weight"].to(torch.float32), numbers(tensors[self.scale])
        if self.layout is ScaleLayout.TENSOR:
            scale = scale.reshape(1, 1)
        elif self.layout is ScaleLayout.CHANNEL:
            scale = scale.reshape(-1, 1)
        else:
            last = scale.dim() // 2  # 1 of [O/b, I/c], 2 of [O/b, 1, I/c, 1]
            rows, columns = (view.offset(self.scale, dim) for dim in (0, last))
            scale = scale.reshape(scale.shape[0], scale.shape[last])
            scale = spread(scale, 0, self.block[0], rows, view.outputs)
            scale = spread(scale, 1, self.block[1], columns, view.inputs)
        return weight / scale if self.divide else weight * scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4(Scheme):
    """FP4 in groups of 16 with FP8 scales under one scale for the tensor.

    weight, scale, global_scale   names of the tensors
    divide                        the global scale is a divisor (compressed-tensors), not a factor
    scalars                       names of scalars for the inputs that the module may have
    """

    weight: str = "weight_packed"
    scale: str = "weight_scale"
    global_scale: str = "weight_global_scale"
    divide: bool = True
    scalars: tuple[str, ...] = ("input_global_scale",)
    group_size: int = 16

    @property
    def name(self) -> str:
        """For reports."""
        return f"NVFP4, groups of {self.group_size}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """weight, scale, global scale, and the scalars that there are."""
        return (
            fp4_spec(self.weight),
            _group_spec(self.scale, self.group_size, ("F8_E4M3",)),
            scalar_spec(found, self.global_scale, ("F32",)),
            *scalar_specs(found, self.scalars),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        scale = numbers(tensors[self.scale])
        whole = tensors[self.global_scale].reshape(1, 1).to(scale.dtype)
        return _fp4(tensors[self.weight], scale / whole if self.divide else scale * whole)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4(Scheme):
    """FP4 in groups of 32 with powers of two as scales.

    weight, scale   names of the tensors
    """

    weight: str = "weight_packed"
    scale: str = "weight_scale"
    group_size: int = 32

    @property
    def name(self) -> str:
        """For reports."""
        return f"MXFP4, groups of {self.group_size}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """Weight and scale."""
        return (fp4_spec(self.weight), _group_spec(self.scale, self.group_size, EXPONENTS))

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        return _fp4(tensors[self.weight], numbers(tensors[self.scale]))


def scalar_specs(
    found: Found, names: tuple[str, ...], dtypes: tuple[str, ...] = FLOATS
) -> tuple[TensorSpec, ...]:
    """The specs of those scalars that the module has: one for each part, [] or [1] in the file."""
    return tuple(scalar_spec(found, name, dtypes) for name in names if name in found.tensors)


def fp4_spec(name: str) -> TensorSpec:
    """U8 [O, I/2]."""
    packed = Dim(along=Along.INPUT, grain=Fraction(2), reason="fp4 packs 2 inputs per uint8 entry")
    return TensorSpec(name=name, dims=(Dim(along=Along.OUTPUT), packed), dtypes=("U8",))


def group_dim(size: int) -> Dim:
    """The inputs, one entry for each group."""
    return Dim(
        along=Along.INPUT,
        grain=Fraction(size),
        reason=f"one scale covers a group of {size} inputs",
    )


def numbers(scale: torch.Tensor) -> torch.Tensor:
    """float32 values of a scale: exponents where its dtype shows them."""
    import torch

    from lading.schemes.bits import e8m0

    is_exponent = scale.dtype in (torch.uint8, torch.float8_e8m0fnu)
    return e8m0(scale) if is_exponent else scale.to(torch.float32)


def _group_spec(name: str, size: int, dtypes: tuple[str, ...]) -> TensorSpec:
    return TensorSpec(name=name, dims=(Dim(along=Along.OUTPUT), group_dim(size)), dtypes=dtypes)


def scalar_spec(found: Found, name: str, dtypes: tuple[str, ...]) -> TensorSpec:
    """One number for each part; in the file [], [1], [1, 1], ... mean the same."""
    shown = found.tensors.get(name)
    is_other = shown is not None and shown.shape != (1,) and set(shown.shape) <= {1}
    stored = shown.shape if shown is not None and is_other else None
    return TensorSpec(name=name, dims=(Dim(along=Along.PARTS),), dtypes=dtypes, stored=stored)


def _fp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from lading.schemes.bits import e2m1, low_nibbles_first

    values = e2m1(low_nibbles_first(packed))
    groups = values.reshape(*scale.shape, -1)
    return (groups * scale.unsqueeze(-1)).flatten(1)
