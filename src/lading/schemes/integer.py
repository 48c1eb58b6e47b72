"""Integer weights with scales: packed into 32-bit words, or one value per byte. compressed-tensors.

No configs here. Letters: O = outputs, I = inputs, b = bits, g = group size, G = I / g.

    PackedInt   weight_packed      int32 [O, I*b/32]   along the inputs
                weight_scale       [O, G], [O, 1] or [1]
                weight_zero_point  int32 [O*b/32, G] or [O*b/32, 1], packed along the outputs
                weight_g_idx       int32 [I], the group of each input (act-order): the scales of all
                                   groups are then whole on every rank
                weight_shape       int64 [2] = (O, I), compared and dropped
                W = (u - z) * s, with u and z unsigned; z = 2^(b-1) where there is no zero point
    PlainInt    weight             int8 [O, I], also for fewer bits
                weight_scale       [O, G], [O, 1] or [1]
                weight_zero_point  int8, of the scale's shape
                W = (w - z) * s

A packed dim is a dense stream of bits (32/b values per word, of which some cross words), or, for 3,
5, 6 and 7 bits up to compressed-tensors 0.17.1, padded: 32 // b whole values per word. Either may
end in a word that is not full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from lading.errors import ConfigError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme
from lading.schemes.floating import FLOATS, ScaleLayout, scalar_spec, scalar_specs
from lading.specs import Along, Constant, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["PackedInt", "PlainInt", "num_words"]

SCALARS = ("input_scale", "input_zero_point")
SCALAR_DTYPES = (*FLOATS, "I8")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInt(Scheme):
    """Weights of `bits` bits in int32 words, along the inputs.

    layout       what one scale covers: GROUP, CHANNEL or TENSOR
    group_size   g of GROUP, else 0
    symmetric    there are no zero points
    act_order    the groups of the inputs are listed in weight_g_idx
    padded       32 // b whole values per word, not a dense stream
    """

    bits: int
    layout: ScaleLayout
    group_size: int = 0
    symmetric: bool = True
    act_order: bool = False
    padded: bool = False

    def __post_init__(self) -> None:
        _check_layout(self.layout, self.group_size)
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"int{self.bits} weights, needs 2 to 8 bits")
        if self.act_order and self.layout is not ScaleLayout.GROUP:
            raise ConfigError(f"act-order with one scale a {self.layout.value}, needs groups")

    @property
    def name(self) -> str:
        """For reports."""
        text = f"int{self.bits} packed, {_covers(self.layout, self.group_size)}"
        text += "" if self.symmetric else ", zero points"
        return text + (", act-order" if self.act_order else "")

    @property
    def per_word(self) -> Fraction:
        """Values per word."""
        return Fraction(32 // self.bits) if self.padded else Fraction(32, self.bits)

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """Words, scales, zero points, group indices, the shape, and the scalars that there are."""
        along = Along.WHOLE_INPUT if self.act_order else Along.INPUT
        specs = [
            TensorSpec(
                name="weight_packed",
                dims=(Dim(along=Along.OUTPUT), self._packed(Along.INPUT, "columns")),
                dtypes=("I32",),
            ),
            _scale_spec(found, "weight_scale", self.layout, self.group_size, along, FLOATS),
        ]
        if not self.symmetric:
            rows = self._packed(Along.OUTPUT, "zero points")
            if self.layout is ScaleLayout.TENSOR:  # the only layout whose zero point is not packed
                zero = _scale_spec(found, "weight_zero_point", self.layout, 0, along, ("I8",))
            else:
                columns = _scale_dim(self.layout, self.group_size, along)
                zero = TensorSpec(name="weight_zero_point", dims=(rows, columns), dtypes=("I32",))
            specs.append(zero)
        if self.act_order:
            specs.append(
                TensorSpec(name="weight_g_idx", dims=(Dim(along=Along.INPUT),), dtypes=("I32",))
            )
        if "weight_shape" in found.tensors:
            specs.append(
                TensorSpec(
                    name="weight_shape",
                    dims=(Dim(along=Along.FIXED, size=2),),
                    dtypes=("I64", "I32"),
                    constant=Constant.SHAPE,
                )
            )
        return (*specs, *scalar_specs(found, SCALARS, SCALAR_DTYPES))

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        scale = tensors["weight_scale"].to(torch.float32)
        codes = self._unpack(tensors["weight_packed"], 1, view.inputs)
        zero: torch.Tensor | int = 1 << (self.bits - 1)
        if not self.symmetric:
            zero = tensors["weight_zero_point"]
            if self.layout is ScaleLayout.TENSOR:
                zero = zero.to(torch.int32) + (1 << (self.bits - 1))
            else:
                zero = self._unpack(zero, 0, view.outputs)
        if self.layout is ScaleLayout.GROUP:
            groups = self._groups(tensors, view, scale.device)
            scale = scale.index_select(1, groups)
            zero = zero if isinstance(zero, int) else zero.index_select(1, groups)
        return (codes - zero).to(torch.float32) * scale

    def _packed(self, along: Along, word: str) -> Dim:
        values = self.per_word
        if values.denominator == 1:
            reason = f"int{self.bits} packs {values} {word} per int32 entry"
        else:
            reason = (
                f"int{self.bits} packs {values.numerator} {word} into {values.denominator} "
                "int32 entries"
            )
        return Dim(along=along, grain=values, ragged=True, reason=reason)

    def _unpack(self, words: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        from lading.schemes.bits import unpack_dense, unpack_padded

        return (unpack_padded if self.padded else unpack_dense)(words, self.bits, dim).narrow(
            dim, 0, size
        )

    def _groups(
        self, tensors: Mapping[str, torch.Tensor], view: PartView, device: torch.device
    ) -> torch.Tensor:
        """The group of each input: with act-order of the full layer, else of the rank's own."""
        import torch

        order = torch.arange(view.inputs, device=device)
        if not self.act_order:
            return order // self.group_size
        listed = tensors["weight_g_idx"].to(torch.int64)
        # -1 throughout is how compressed-tensors leaves indices that were never ordered.
        return torch.where(listed < 0, (order + view.first_input) // self.group_size, listed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainInt(Scheme):
    """Weights of up to 8 bits, each in a byte.

    bits         for reports: 8, or fewer in W4A8
    layout       what one scale covers: GROUP, CHANNEL or TENSOR
    group_size   g of GROUP, else 0
    symmetric    there are no zero points
    """

    bits: int = 8
    layout: ScaleLayout
    group_size: int = 0
    symmetric: bool = True

    def __post_init__(self) -> None:
        _check_layout(self.layout, self.group_size)
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"int{self.bits} weights in bytes, needs 2 to 8 bits")

    @property
    def name(self) -> str:
        """For reports."""
        text = f"int{self.bits}, {_covers(self.layout, self.group_size)}"
        return text if self.symmetric else text + ", zero points"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """Weight, scales, zero points, and the scalars that there are."""
        weight = TensorSpec(
            name="weight",
            dims=(Dim(along=Along.OUTPUT), Dim(along=Along.INPUT)),
            dtypes=("I8",),
        )
        pairs: list[tuple[str, tuple[str, ...]]] = [("weight_scale", FLOATS)]
        if not self.symmetric:
            pairs.append(("weight_zero_point", ("I8",)))
        scales = (
            _scale_spec(found, name, self.layout, self.group_size, Along.INPUT, dtypes)
            for name, dtypes in pairs
        )
        return (weight, *scales, *scalar_specs(found, SCALARS, SCALAR_DTYPES))

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        from lading.schemes.bits import spread

        def over_inputs(tensor: torch.Tensor) -> torch.Tensor:
            if self.layout is not ScaleLayout.GROUP:
                return tensor
            return spread(tensor, 1, self.group_size, 0, view.inputs)

        values = tensors["weight"].to(torch.int32)
        if not self.symmetric:
            values = values - over_inputs(tensors["weight_zero_point"])
        return values.to(torch.float32) * over_inputs(tensors["weight_scale"].to(torch.float32))


def num_words(size: int, bits: int, *, padded: bool) -> int:
    """int32 words of `size` values."""
    return -(-size // (32 // bits)) if padded else -(-size * bits // 32)


def _check_layout(layout: ScaleLayout, group_size: int) -> None:
    if layout is ScaleLayout.BLOCK or (layout is ScaleLayout.GROUP) != (group_size > 0):
        raise ConfigError(
            f"integer weights with one scale a {layout.value} and groups of {group_size}, needs "
            "groups of at least 1 input, or one scale a channel or tensor and groups of 0"
        )


def _covers(layout: ScaleLayout, group_size: int) -> str:
    if layout is ScaleLayout.GROUP:
        return f"groups of {group_size}"
    return "one scale an output" if layout is ScaleLayout.CHANNEL else "one scale a tensor"


def _scale_dim(layout: ScaleLayout, group_size: int, along: Along) -> Dim:
    if layout is ScaleLayout.CHANNEL:
        return Dim(along=Along.FIXED)
    return Dim(
        along=along,
        grain=Fraction(group_size),
        ragged=True,
        reason=f"one scale covers a group of {group_size} inputs",
    )


def _scale_spec(
    found: Found,
    name: str,
    layout: ScaleLayout,
    group_size: int,
    along: Along,
    dtypes: tuple[str, ...],
) -> TensorSpec:
    """The spec of a scale, or of a zero point that is not packed."""
    if layout is ScaleLayout.TENSOR:
        return scalar_spec(found, name, dtypes)
    dims = (Dim(along=Along.OUTPUT), _scale_dim(layout, group_size, along))
    shown = found.tensors.get(name)
    # [O] is [O, 1] in other words: a channel's scale has no other view.
    is_flat = layout is ScaleLayout.CHANNEL and shown is not None and len(shown.shape) == 1
    if is_flat and shown is not None and shown.shape == (found.outputs,):
        return TensorSpec(name=name, dims=dims, dtypes=dtypes, stored=(-1,))
    return TensorSpec(name=name, dims=dims, dtypes=dtypes)
