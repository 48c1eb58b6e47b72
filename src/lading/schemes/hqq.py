"""HQQ (hqq 0.2): W_q, scale, zero and the metadata of each module, one tensor each.

The weight is grouped, R = O*I/g rows of g inputs, and its codes are packed b bits each:

    8 bits   W_q U8 [R, g]
    4 bits   W_q U8 [R/2, g]           row i holds rows i (high nibble) and i + R/2 (low)
    2, 1     W_q U8 [R/4, g], [R/8, g]  likewise, from the high bits down
    3 bits   W_q I32 [ceil(R/10), g]   likewise, ten rows at bits 27, 24, ... 0; R padded with zeros
    scale, zero   [R, 1];   W = (code - zero) * scale

Where packed rows are made of whole rows of the weight (O is a multiple of 8 / b), W_q is
[O*b/8, I]: its inputs can be cut between groups, and for 8 bits its outputs as well. Of fewer bits,
outputs cannot be cut without repacking: each byte holds outputs from all over the weight.

`hqq` itself saves no quantization_config: the tensors tell everything. Letters: O = outputs,
I = inputs, g = group size, b = bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from lading.errors import CheckpointError, LayoutError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Quantization, Scheme
from lading.schemes.evidence import MODEL_DTYPES, check, contradiction, is_dense, spelt
from lading.schemes.floating import group_dim
from lading.schemes.ignoring import ignored_names, matching, refuse_ignored, shown
from lading.schemes.options import Options
from lading.specs import Along, Constant, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Hqq", "HqqQuantization", "hqq_from_evidence", "parse_hqq"]

ROWS_PER_ENTRY = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}

_NEEDED = ("W_q", "scale", "zero")
_FLAGS = (
    "channel_wise",
    "encoded_state_dict",
    "offload_meta",
    "optimize",
    "quant_scale",
    "quant_zero",
    "round_zero",
    "stores_quant_config",
    "view_as_float",
)
_NUMBERS = ("axis", "group_size", "nbits")
_TEXTS = ("compute_dtype", "packing", "unpack_view_dtype")
_MUST_BE = {"axis": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hqq(Scheme):
    """Codes of `bits` bits in groups of `group_size` along the inputs, with float zero points."""

    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """For reports."""
        return f"HQQ int{self.bits}, groups of {self.group_size}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """W_q, scale, zero, the shape to compare, and what else the module says of itself."""
        if found.fused and self.bits != 8:
            raise LayoutError(
                f"{found.module}.W_q holds all parts of the layer in one tensor, whose bytes have "
                f"outputs from all over it ({self.name}); needs one tensor for each part"
            )
        specs = [self._codes(layer, found)]
        specs += [
            TensorSpec(name=name, dims=self._groups(found), dtypes=MODEL_DTYPES, stored=(-1, 1))
            for name in ("scale", "zero")
        ]
        if "shape" in found.tensors:
            two = (Dim(along=Along.FIXED, size=2),)
            specs.append(
                TensorSpec(name="shape", dims=two, dtypes=("I64",), constant=Constant.SHAPE)
            )
        for names, dtypes in ((_FLAGS, ("U8", "BOOL")), (_NUMBERS, ("I32", "I64"))):
            specs += [_number(found, name, dtypes) for name in names if name in found.tensors]
        specs += [_text(found, name) for name in _TEXTS if name in found.tensors]
        return tuple(specs)

    def _has_whole_rows(self, found: Found) -> bool:
        """Whether each packed row has whole rows of the weight beside each other."""
        return self.bits != 3 and found.outputs % ROWS_PER_ENTRY[self.bits] == 0

    def _groups(self, found: Found) -> tuple[Dim, ...]:
        groups = group_dim(self.group_size)
        if not self._has_whole_rows(found):
            why = f"HQQ packs int{self.bits} rows of groups that end inside rows of the weight"
            groups = replace(groups, align=found.inputs, align_reason=why)
        return (Dim(along=Along.OUTPUT), groups)

    def _codes(self, layer: Layer, found: Found) -> TensorSpec:
        rows = ROWS_PER_ENTRY[self.bits]
        outputs = Dim(
            along=Along.OUTPUT,
            grain=Fraction(rows),
            reason=f"int{self.bits} packs {rows} outputs per uint8 entry",
        )
        if rows > 1:
            why = f"HQQ packs {rows} outputs from all over an int{self.bits} weight into one entry"
            outputs = replace(outputs, align=layer.output.size, align_reason=why)
        if self._has_whole_rows(found):
            dims = (outputs, Dim(along=Along.INPUT))
            stored = (-1, self.group_size)
            return TensorSpec(name="W_q", dims=dims, dtypes=("U8",), stored=stored)
        # No dim runs along the inputs here; cutting them is refused by the scales.
        grain = Fraction(rows * self.group_size, found.inputs)
        return TensorSpec(
            name="W_q",
            dims=(
                replace(outputs, grain=grain, ragged=True),
                Dim(along=Along.FIXED, size=self.group_size),
            ),
            dtypes=("I32",) if self.bits == 3 else ("U8",),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        self._compare(tensors)
        rows = ROWS_PER_ENTRY[self.bits]
        packed = tensors["W_q"].reshape(-1, self.group_size).to(torch.int32)
        shifts = range((rows - 1) * self.bits, -1, -self.bits)
        codes = torch.cat([(packed >> shift) & ((1 << self.bits) - 1) for shift in shifts])
        scale, zero = (tensors[name].to(torch.float32).reshape(-1, 1) for name in ("scale", "zero"))
        codes = codes[: len(scale)].to(torch.float32)
        return ((codes - zero) * scale).reshape(view.outputs, view.inputs)

    def _compare(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises where the metadata says something else than the shapes do."""
        needed: dict[str, int] = {"nbits": self.bits, "group_size": self.group_size, **_MUST_BE}
        for name, value in needed.items():
            told = tensors.get(name)
            if told is not None and not bool((told == value).all()):
                raise CheckpointError(
                    f"{name} is {int(told.reshape(-1)[0])}, needs {value} ({self.name}, as the "
                    "shapes of W_q and scale show)"
                )
        text = tensors.get("packing")
        if text is not None:
            packing = bytes(text.reshape(-1).tolist())
            if packing != PACKING[self.bits].encode():
                raise CheckpointError(
                    f"packing is {packing!r}, needs {PACKING[self.bits].encode()!r} ({self.name})"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class HqqQuantization(Quantization):
    """What the config declares; None where it says nothing, or nothing of one module.

    bits, group_size   of every module
    ignored            names of modules that are not quantised
    """

    bits: int | None = None
    group_size: int | None = None
    ignored: tuple[str, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The module's scheme; None where it is dense."""
        if is_dense(found):
            return None
        refuse_ignored(found, "skip_modules", self.ignored)
        scheme = _shown_scheme(found)
        told = (self.bits or scheme.bits, self.group_size or scheme.group_size)
        if told != (scheme.bits, scheme.group_size):
            raise contradiction(
                found, f"HQQ int{told[0]}, groups of {told[1]}", _sizes(found), f"is {scheme.name}"
            )
        check(scheme.specs(layer, found), found, scheme.name)
        return scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The entry of the list of dense modules that names it."""
        return matching(module, self.ignored)


class _Header(Protocol):
    """A tensor of the checkpoint, by its header."""

    @property
    def dtype(self) -> str: ...


def hqq_from_evidence(tensors: Mapping[str, _Header]) -> HqqQuantization | None:
    """HQQ, where a checkpoint without any config has tensors that only HQQ writes; None elsewhere.

    tensors   all of the checkpoint, by full name
    """
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "W_q" and not tensor.dtype.startswith(("F8", "F4")):
            return HqqQuantization() if f"{module}.scale" in tensors else None
    return None


def parse_hqq(config: Mapping[str, Any]) -> HqqQuantization:
    """The quantization_config of quant_method "hqq", as transformers writes it.

    `quant_config` has weight_quant_params, or such an object for each kind of module; then the
    shapes of each tell its bits and groups.
    """
    options = Options(raw=config)
    ignored = ignored_names(options, "skip_modules")
    inner = dict(options.objects("quant_config"))
    weights = inner.get("weight_quant_params")
    if weights is None:
        return HqqQuantization(ignored=ignored)
    if weights.integer("axis", 1) != 1:
        raise weights.problem("axis", "1 (groups along the inputs)")
    if weights.flag("view_as_float", default=False):
        raise weights.problem("view_as_float", "false")
    return HqqQuantization(
        bits=weights.integer("nbits", allowed=sorted(ROWS_PER_ENTRY)),
        group_size=weights.integer("group_size") if weights.given("group_size") else None,
        ignored=ignored,
    )


def _shown_scheme(found: Found) -> Hqq:
    """The only bits and groups that the shapes allow."""
    missing = [name for name in _NEEDED if name not in found.tensors]
    if missing:
        needed = f"needs {', '.join(_NEEDED)} (scales that are quantised themselves are not read)"
        raise contradiction(found, "HQQ", shown(found), needed)
    codes, scale = found.tensors["W_q"], found.tensors["scale"]
    elements = found.outputs * found.inputs
    if len(scale.shape) != 2 or scale.shape[1] != 1 or not scale.shape[0]:
        raise contradiction(
            found, "HQQ", _sizes(found), "needs scale [groups, 1] (groups along the inputs)"
        )
    num_rows = scale.shape[0]
    group, rest = divmod(elements, num_rows)
    if rest or found.inputs % group:
        raise contradiction(
            found,
            "HQQ",
            _sizes(found),
            f"needs whole groups of the {found.inputs} inputs ({found.outputs} * {found.inputs} = "
            f"{num_rows} * {group} + {rest})",
        )
    for bits, rows in ROWS_PER_ENTRY.items():
        kinds = ("I32",) if bits == 3 else ("U8",)
        whole = bits == 3 or num_rows % rows == 0
        if codes.dtype in kinds and whole and codes.shape == (-(-num_rows // rows), group):
            return Hqq(bits=bits, group_size=group)
    raise contradiction(
        found, "HQQ", _sizes(found), f"needs W_q of {num_rows} rows of {group}, packed by bits"
    )


def _sizes(found: Found) -> list[str]:
    return [f"{name} {spelt(found.tensors[name])}" for name in _NEEDED]


def _number(found: Found, name: str, dtypes: tuple[str, ...]) -> TensorSpec:
    stored = () if not found.tensors[name].shape else None
    return TensorSpec(name=name, dims=(Dim(along=Along.PARTS),), dtypes=dtypes, stored=stored)


def _text(found: Found, name: str) -> TensorSpec:
    shape = found.tensors[name].shape
    dims = (Dim(along=Along.PARTS), Dim(along=Along.FIXED, size=shape[0] if shape else 1))
    return TensorSpec(name=name, dims=dims, dtypes=("U8",), stored=shape)
