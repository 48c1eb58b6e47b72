"""Weights stored in the order of the Marlin kernels: 4 bits, symmetric, permuted inside tiles.

    Marlin      B            I32 [I/16, 2*O]    codes in tiles of 16 inputs by 64 outputs
                s            F16 [I/g, O]       permuted inside 64 (one group: 32) outputs
    Marlin24    packed       I32 [I/32, 2*O]    the two kept codes of each four inputs, in tiles
                meta         I16 [I/32, 2*O]    which two: 2 bits each, reordered inside 64 outputs
                scale        F16 [I/g, O]       permuted inside 8 outputs
W = (q - 8) * s. g = group size, 128 or one group over all inputs. Every permutation stays inside 64
outputs and 16 (2:4: 32) inputs, so pieces of whole tiles are slices; smaller pieces cannot be.

The orders are those of AutoGPTQ 0.7 (Marlin) and of compressed-tensors 0.10 and CUTLASS (2:4).
Letters: O = outputs, I = inputs, G = groups; b = blocks of 64 outputs, t = tiles along the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from lading.errors import ConfigError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Marlin", "Marlin24"]

GROUP_SIZES = (128, -1)
SCALE_DTYPES = ("F16", "BF16")
TILE_OUTPUTS = 64
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Element e of a thread's 8 lies in nibble NIBBLES[e] of its word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Marlin(Scheme):
    """Dense Marlin tiles.

    group_size   128, or -1 for one group over all inputs
    one_group    the file's scales are ordered as those of a single group are: its layer has but one
                 group over all ranks, however many a rank holds
    """

    group_size: int
    one_group: bool

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)

    @staticmethod
    def of(group_size: int, inputs: int) -> Marlin:
        """The scheme of a module with so many inputs over all ranks."""
        return Marlin(group_size=group_size, one_group=group_size in (-1, inputs))

    @property
    def name(self) -> str:
        """For reports."""
        return f"Marlin int4, {_covers(self.group_size)}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """B and s."""
        _check_tiles(layer, found)
        inputs = Dim(
            along=Along.INPUT, grain=Fraction(16), reason="a Marlin tile is 16 inputs high"
        )
        return (
            TensorSpec(name="B", dims=(inputs, _outputs(Fraction(1, 2))), dtypes=("I32",)),
            _scale_spec("s", self.group_size),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        scales = tensors["s"].to(torch.float32)
        if self.one_group:  # stored 8i + 2j + k is true 8j + 2i + k, inside 32
            scales = scales.reshape(len(scales), -1, 4, 4, 2).transpose(2, 3).flatten(1)
        else:  # stored 8i + j is true 8j + i, inside 64
            scales = scales.reshape(len(scales), -1, 8, 8).transpose(2, 3).flatten(1)
        return _scaled(_codes(tensors["B"], sparse=False) - 8, scales, self.group_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Marlin24(Scheme):
    """2:4 sparse Marlin tiles: of each four inputs two are stored, the others are zero.

    group_size            128, or -1 for one group over all inputs; in inputs of the layer
    one_group             as for Marlin; see `of`
    packed, meta, scale   names of the tensors
    """

    group_size: int
    one_group: bool
    packed: str = "B_24"
    meta: str = "B_meta"
    scale: str = "s"

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)

    @staticmethod
    def of(group_size: int, inputs: int, *, compressed_tensors: bool) -> Marlin24:
        """The scheme of a module with so many inputs over all ranks.

        compressed_tensors   has the names of that format; and its packer compares the group size
                             with the stored half of the inputs, so that two groups are ordered as
                             one (compressed-tensors 0.10, `marlin_24.py`)
        Example: groups of 128, 256 inputs: 2 groups, one_group True for compressed-tensors alone.
        """
        if not compressed_tensors:
            return Marlin24(group_size=group_size, one_group=group_size in (-1, inputs))
        return Marlin24(
            group_size=group_size,
            one_group=group_size == -1 or 2 * group_size >= inputs,
            packed="weight_packed",
            meta="meta",
            scale="scale_packed",
        )

    @property
    def name(self) -> str:
        """For reports."""
        return f"Marlin 2:4 int4, {_covers(self.group_size)}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """Codes, which inputs they are of, and scales."""
        _check_tiles(layer, found)
        inputs = Dim(
            along=Along.INPUT, grain=Fraction(32), reason="a Marlin 2:4 tile is 32 inputs high"
        )
        dims = (inputs, _outputs(Fraction(1, 2)))
        return (
            TensorSpec(name=self.packed, dims=dims, dtypes=("I32",)),
            TensorSpec(name=self.meta, dims=dims, dtypes=("I16",)),
            _scale_spec(self.scale, self.group_size),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        scales = tensors[self.scale].to(torch.float32)
        if not self.one_group:  # inside 8: stored 0, 1, 2, ... is true 0, 4, 1, 5, 2, 6, 3, 7
            scales = scales.reshape(len(scales), -1, 4, 2).transpose(2, 3).flatten(1)
        kept = _codes(tensors[self.packed], sparse=True) - 8
        where = _kept_inputs(tensors[self.meta])
        whole = torch.zeros(view.outputs, view.inputs, dtype=kept.dtype, device=kept.device)
        whole.scatter_(1, where, kept)
        return _scaled(whole, scales, self.group_size)


def _codes(words: torch.Tensor, *, sparse: bool) -> torch.Tensor:
    """I32 [t, 2*O] -> int32 [O, 16*t] of codes 0 to 15.

    Inside a tile of 16 inputs by 64 outputs (128 words), word w = 4*l + j is of thread l, 0 to 31;
    its element e is, with (h, m, p) = (e // 4, e // 2 % 2, e % 2),
        of input   2*(l % 4) + 8*m + p
        of output  16*j + l // 4 + 8*h                             in the dense order
                   16*(l // 8) + 8*(l // 4 % 2) + 4*h + j          in the 2:4 order
    """
    import torch

    from lading.schemes.bits import unpack_padded

    nibbles = torch.tensor(NIBBLES, device=words.device)
    tiles = words.shape[0]
    codes = unpack_padded(words, 4, 1).reshape(tiles, -1, 8).index_select(2, nibbles)
    if sparse:  # t, b, l//8, l//4%2, l%4, j, h, m, p
        codes = codes.reshape(tiles, -1, 4, 2, 4, 4, 2, 2, 2).permute(1, 2, 3, 6, 5, 0, 7, 4, 8)
    else:  # t, b, l//4, l%4, j, h, m, p
        codes = codes.reshape(tiles, -1, 8, 4, 4, 2, 2, 2).permute(1, 4, 5, 2, 0, 6, 3, 7)
    return codes.flatten(0, -5).flatten(1)


def _kept_inputs(meta: torch.Tensor) -> torch.Tensor:
    """I16 [t, 2*O] -> int64 [O, 16*t]: of which input each stored code is, 32*t inputs in all.

    An entry holds the places of 8 codes, 2 bits each, of 4 groups of four inputs. The entries of
    two neighbouring columns of 16 inputs lie side by side, their outputs reordered inside 64
    (CUTLASS's reordered, column-major interleaved metadata):
        output 8*a + 4*b + 2*c + d goes to row 32*c + 4*a + 2*d + b, and then inside each two rows
        and two columns the off-diagonal entries are exchanged.
    """
    import torch

    tiles = meta.shape[0]
    # rows of 64 = (c, a, d, b), columns = x; entry (b, x) holds what belongs to (x, b)
    entries = meta.reshape(tiles, -1, 2, 8, 2, 2, 2)  # t, block, c, a, d, b, x
    entries = entries.transpose(5, 6).permute(1, 3, 5, 2, 4, 0, 6)  # block, a, b, c, d, t, x
    entries = entries.flatten(0, 4).flatten(1).to(torch.int64)  # [O, 2*t]
    shifts = torch.arange(8, device=meta.device) * 2
    places = (entries.unsqueeze(-1) >> shifts) & 3  # [O, 2*t, 8]
    fours = torch.arange(8 * tiles, device=meta.device).repeat_interleave(2) * 4
    return places.flatten(1) + fours


def _scaled(codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """[O, I] codes by [G, O] scales."""
    from lading.schemes.bits import spread

    size = codes.shape[1]
    return codes * spread(scales.t(), 1, size if group_size == -1 else group_size, 0, size)


def _outputs(grain: Fraction) -> Dim:
    return Dim(
        along=Along.OUTPUT,
        grain=grain,
        align=TILE_OUTPUTS,
        align_reason=f"a Marlin tile is {TILE_OUTPUTS} outputs wide",
    )


def _scale_spec(name: str, group_size: int) -> TensorSpec:
    groups = Dim(along=Along.FIXED)
    if group_size != -1:
        groups = Dim(
            along=Along.INPUT,
            grain=Fraction(group_size),
            reason=f"one scale covers a group of {group_size} inputs",
        )
    return TensorSpec(name=name, dims=(groups, _outputs(Fraction(1))), dtypes=SCALE_DTYPES)


def _check_tiles(layer: Layer, found: Found) -> None:
    """Parts that lie side by side in one tensor must be whole tiles, however they are cut."""
    parts = layer.output.parts if found.fused else ()
    for size, name in [(found.outputs, None), *((part.size, part.name) for part in parts)]:
        if size % TILE_OUTPUTS:
            raise ConfigError(
                f"has {size} outputs; a Marlin tile is {TILE_OUTPUTS} outputs wide and {size} = "
                f"{size // TILE_OUTPUTS} * {TILE_OUTPUTS} + {size % TILE_OUTPUTS}",
                subject=found.module,
                part=name,
            )


def _covers(group_size: int) -> str:
    return "one scale an output" if group_size == -1 else f"groups of {group_size}"


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ConfigError(
            f"Marlin groups are of {group_size} inputs, needs 128 or all of them (-1)"
        )
