"""bitsandbytes in 4 bits: nf4 and fp4, with or without double quantisation.

    weight                U8 [O*I/2, 1], row after row, the first element in the high nibble; or the
                          same bytes viewed as I8, BF16, F16 or F32 (bnb_4bit_quant_storage)
    weight.absmax         F32 [O*I/B]; double: U8
    weight.quant_map      F32 [16]
    weight.quant_state.bitsandbytes__nf4 (or fp4)
                          U8, a JSON text: quant_type, blocksize B, shape (O, I); double:
                          nested_blocksize, nested_offset
    weight.nested_absmax, weight.nested_quant_map
                          double: F32 [O*I/(256*B)], F32 [256]

    W = quant_map[nibble] * absmax
    double: absmax = nested_quant_map[u8] * nested_absmax + nested_offset

Blocks run through the weight row after row, so they can be cut where rows are whole blocks. Where a
row is none, only outputs can be cut, into pieces of whole blocks. Letters: O = outputs, I = inputs,
B = block size. Source: bitsandbytes 0.50, `QuantState.as_dict`, `dequantize_4bit`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING

from lading.dtypes import BITS
from lading.errors import CheckpointError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme
from lading.schemes.evidence import contradiction, spelt
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["STATE", "Bnb4", "bnb4_of"]

STATE = "weight.quant_state.bitsandbytes__"
STORAGE = ("U8", "I8", "BF16", "F16", "F32")
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 32)
NESTED = 256
"""Block scales under one nested scale, a constant of the writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bnb4(Scheme):
    """Four bits, each an entry of a table of 16 numbers that the checkpoint has.

    kind     "nf4" or "fp4"
    block    B: elements under one scale
    nested   the scales are quantised, too
    """

    kind: str
    block: int = 64
    nested: bool = False

    @property
    def name(self) -> str:
        """For reports."""
        nested = ", quantised scales" if self.nested else ""
        return f"bitsandbytes {self.kind}, blocks of {self.block}{nested}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """weight, its scales, tables and quant_state."""
        inputs, state = found.inputs, f"{STATE}{self.kind}"
        scales = ("U8",) if self.nested else ("F32",)
        specs = [
            TensorSpec(
                name="weight",
                dims=(Dim(along=Along.OUTPUT), self._packed_dim(found)),
                dtypes=STORAGE,
                stored=_pattern(found, "weight"),
            ),
            TensorSpec(
                name="weight.absmax",
                dims=self._scale_dims(inputs),
                dtypes=scales,
                stored=_pattern(found, "weight.absmax"),
            ),
            _table("weight.quant_map", 16, "F32"),
            _table(state, found.tensors[state].shape[0], "U8"),
        ]
        if self.nested:
            specs += [self._nested_spec(inputs), _table("weight.nested_quant_map", 256, "F32")]
        return tuple(specs)

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        from lading.schemes.bits import spread

        state = _State.parse(tensors[f"{STATE}{self.kind}"])
        state.compare(self, view)
        packed = tensors["weight"].contiguous().view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 0xF), dim=-1).reshape(view.outputs, view.inputs)
        values = tensors["weight.quant_map"].reshape(-1)[codes.to(torch.int64)]
        scales = self._scales(tensors, view, state).reshape(-1)
        scales = spread(scales, 0, self.block, 0, values.numel())
        return values * scales.reshape(values.shape)

    def _scales(
        self, tensors: Mapping[str, torch.Tensor], view: PartView, state: _State
    ) -> torch.Tensor:
        import torch

        absmax = tensors["weight.absmax"]
        if not self.nested:
            return absmax
        values = tensors["weight.nested_quant_map"].reshape(-1)[absmax.to(torch.int64)].reshape(-1)
        # Where this rank's first element lies behind the first nested scale that it holds. A cut
        # through the inputs leaves the nested scales whole, and each row's blocks apart.
        if view.inputs != state.inputs:
            row = torch.arange(view.outputs, device=values.device) * state.inputs
            column = torch.arange(0, view.inputs, self.block, device=values.device)
            first = (row.unsqueeze(1) + column + view.first_input).reshape(-1)
        else:
            before = view.offset("weight.nested_absmax", 0) * view.inputs
            first = torch.arange(len(values), device=values.device) * self.block + before
        index = first // (self.block * NESTED)
        return values * tensors["weight.nested_absmax"][index] + state.nested_offset

    def _packed_dim(self, found: Found) -> Dim:
        """The inputs of the weight: two to a byte, more where bytes are viewed as a wider dtype."""
        stored = found.tensors.get("weight")
        size = 2 * BITS[stored.dtype] // 8 if stored is not None else 2
        code = "uint8" if size == 2 else f"{size // 2}-byte"
        return Dim(
            along=Along.INPUT,
            grain=Fraction(size),
            reason=f"{self.kind} packs {size} inputs per {code} entry",
            align=1 if found.inputs % self.block == 0 else found.inputs,
            align_reason=f"blocks of {self.block} run across rows of {found.inputs} inputs",
        )

    def _scale_dims(self, inputs: int) -> tuple[Dim, ...]:
        if inputs % self.block == 0:
            block = Dim(
                along=Along.INPUT,
                grain=Fraction(self.block),
                reason=f"one scale covers a block of {self.block} inputs",
            )
            return (Dim(along=Along.OUTPUT), block)
        return (
            Dim(
                along=Along.OUTPUT,
                grain=Fraction(self.block, inputs),
                ragged=True,
                reason=f"blocks of {self.block} run across rows of {inputs} inputs",
            ),
        )

    def _nested_spec(self, inputs: int) -> TensorSpec:
        grain = Fraction(NESTED * self.block, inputs)
        covers = Dim(
            along=Along.OUTPUT,
            grain=grain,
            ragged=True,
            straddle=grain.denominator == 1,
            reason=f"one nested scale covers {NESTED} blocks of {self.block}",
        )
        return TensorSpec(name="weight.nested_absmax", dims=(covers,), dtypes=("F32",))


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """The JSON text beside a 4-bit weight."""

    kind: str
    block: int
    outputs: int
    inputs: int
    nested_block: int
    nested_offset: float

    @staticmethod
    def parse(text: torch.Tensor) -> _State:
        """A CheckpointError where the text is not what bitsandbytes writes."""
        raw = bytes(text.reshape(-1).tolist()).rstrip(b"\0")
        try:
            values = json.loads(raw)
            outputs, inputs = values["shape"]
            return _State(
                kind=str(values["quant_type"]),
                block=int(values["blocksize"]),
                outputs=int(outputs),
                inputs=int(inputs),
                nested_block=int(values.get("nested_blocksize", NESTED)),
                nested_offset=float(values.get("nested_offset", 0.0)),
            )
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"weight.quant_state is {raw[:60]!r}, needs a JSON object with quant_type, "
                f"blocksize and shape ({type(error).__name__})"
            ) from None

    def compare(self, scheme: Bnb4, view: PartView) -> None:
        """Raises where the text says something else than the shapes and names do."""
        told = (self.kind, self.block, self.nested_block)
        if told != (scheme.kind, scheme.block, NESTED):
            raise CheckpointError(
                f"weight.quant_state says {told[0]}, blocks of {told[1]} under nested blocks of "
                f"{told[2]}, the tensors have {scheme.kind}, blocks of {scheme.block} under "
                f"{NESTED}"
            )
        if (
            view.first_output + view.outputs > self.outputs
            or view.first_input + view.inputs > self.inputs
        ):
            raise CheckpointError(
                f"weight.quant_state says [{self.outputs}, {self.inputs}], the rank holds outputs "
                f"{view.first_output}:{view.first_output + view.outputs} and inputs "
                f"{view.first_input}:{view.first_input + view.inputs}"
            )


def bnb4_of(kind: str, found: Found, says: str) -> Bnb4:
    """The scheme whose block size the number of scales shows; the bytes have to be as many."""
    _check_weight(found, says)
    nested = "weight.nested_absmax" in found.tensors
    return Bnb4(kind=kind, block=_block_size(found, says), nested=nested)


def _block_size(found: Found, says: str) -> int:
    count = prod(found.tensors["weight.absmax"].shape)
    elements = found.outputs * found.inputs
    for size in BLOCK_SIZES:
        if -(-elements // size) == count:
            return size
    raise contradiction(
        found,
        says,
        [f"weight.absmax {spelt(found.tensors['weight.absmax'])}"],
        f"needs {-(-elements // 64)} scales ({found.outputs} * {found.inputs} elements in blocks "
        "of 64)",
    )


def _check_weight(found: Found, says: str) -> None:
    stored = found.tensors["weight"]
    elements = found.outputs * found.inputs
    if stored.dtype not in STORAGE or prod(stored.shape) * BITS[stored.dtype] != elements * 4:
        raise contradiction(
            found,
            says,
            [f"weight {spelt(stored)}"],
            f"needs {elements // 2} bytes ({found.outputs} * {found.inputs} elements of 4 bits)",
        )


def _pattern(found: Found, name: str) -> tuple[int, ...]:
    """The file's shape with -1 for its long dim: parts of one layer differ in that."""
    shape = found.tensors[name].shape
    long = shape.index(max(shape)) if shape else 0
    return tuple(-1 if dim == long else size for dim, size in enumerate(shape))


def _table(name: str, size: int, dtype: str) -> TensorSpec:
    """A small tensor of each part, whole on every rank."""
    return TensorSpec(name=name, dims=(Dim(along=Along.FIXED, size=size),), dtypes=(dtype,))
