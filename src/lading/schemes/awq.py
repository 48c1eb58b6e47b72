"""AWQ, version "gemm": 4-bit codes packed along the outputs, interleaved by eight.

    qweight   I32 [I, O/8]     nibble j of a word is column ORDER[j] of its eight
    qzeros    I32 [I/g, O/8]   zero points, packed alike
    scales    F16 [I/g, O]
W[o, i] = (q[i, o] - z[i // g, o]) * s[i // g, o]. As AutoAWQ 0.2 (`WQLinear_GEMM`), GPTQModel and
auto-round write it. The other versions are refused: they cannot be cut as they are stored.
Letters: O = outputs, I = inputs, g = group size.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lading.errors import ConfigError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Quantization, Scheme
from lading.schemes.evidence import check, is_dense
from lading.schemes.ignoring import ignored_names, matching, refuse_ignored
from lading.schemes.options import Options
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Awq", "AwqQuantization", "parse_awq"]

BITS = 4
SCALE_DTYPES = ("F16", "BF16", "F32")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
REFUSED = {
    "gemv": "its groups are padded to whole words, so no slice of a row is a row",
    "gemv_fast": "it interleaves four outputs and 64 inputs in int16 entries",
    "marlin": "AutoAWQ's Marlin layout permutes scales and has no zero points",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq(Scheme):
    """AWQ gemm.

    group_size   inputs that share a scale and a zero point; -1: all
    """

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(f"AWQ groups are of {self.group_size} inputs, needs -1 or above 0")

    @property
    def name(self) -> str:
        """For reports."""
        size = self.group_size
        return f"AWQ int4, {'one scale an output' if size == -1 else f'groups of {size}'}"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """qweight, qzeros, scales."""
        inputs, outputs = Dim(along=Along.INPUT), Dim(along=Along.OUTPUT)
        packed = Dim(
            along=Along.OUTPUT,
            grain=Fraction(8),
            reason="AWQ packs 8 columns per int32 entry",
        )
        groups = Dim(along=Along.FIXED)
        if self.group_size != -1:
            groups = Dim(
                along=Along.INPUT,
                grain=Fraction(self.group_size),
                reason=f"one scale covers a group of {self.group_size} inputs",
            )
        return (
            TensorSpec(name="qweight", dims=(inputs, packed), dtypes=("I32",)),
            TensorSpec(name="qzeros", dims=(groups, packed), dtypes=("I32",)),
            TensorSpec(name="scales", dims=(groups, outputs), dtypes=SCALE_DTYPES),
        )

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        from lading.schemes.bits import spread

        size = view.inputs if self.group_size == -1 else self.group_size
        codes, zeros = (_columns(tensors[name]) for name in ("qweight", "qzeros"))
        codes -= spread(zeros, 0, size, 0, view.inputs)
        scales = tensors["scales"].to(torch.float32)
        return (codes * spread(scales, 0, size, 0, view.inputs)).t()


def _columns(words: torch.Tensor) -> torch.Tensor:
    """I32 [n, O/8] -> int32 [n, O]."""
    import torch

    from lading.schemes.bits import unpack_padded

    nibbles = torch.tensor([ORDER.index(column) for column in range(8)], device=words.device)
    eights = unpack_padded(words, BITS, 1).reshape(len(words), -1, 8)
    return eights.index_select(2, nibbles).flatten(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqQuantization(Quantization):
    """A parsed AWQ config. Made by `parse_awq` alone.

    dense   names of modules that the config says are not quantised

    Tools match these by substring, so that "gate" covers "gate_proj": the headers show what is
    quantised. Only a name that is listed component by component contradicts them.
    """

    scheme: Awq
    dense: tuple[str, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The scheme of a stored module, None where it is dense."""
        if not found.tensors or is_dense(found):
            return None
        refuse_ignored(found, "modules_to_not_convert", self.dense)
        check(self.scheme.specs(layer, found), found, self.scheme.name)
        return self.scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The entry of the list of dense modules that names it."""
        return matching(module, self.dense)


def parse_awq(config: Mapping[str, Any]) -> AwqQuantization:
    """The quantisation that an AWQ config describes.

    Raises a ConfigError for a value that is missing, of the wrong type, or of a layout that is not
    known or cannot be cut.
    """
    options = Options(raw=config)
    _check_version(options)
    options.integer("w_bit" if options.given("w_bit") else "bits", allowed=(BITS,))
    options.flag("zero_point", True)
    size = options.group_size("q_group_size" if options.given("q_group_size") else "group_size")
    return AwqQuantization(
        scheme=Awq(group_size=size), dense=ignored_names(options, "modules_to_not_convert")
    )


def _check_version(options: Options) -> None:
    """Whether it is gemm by every key that says so; by default it is."""
    for key in ("version", "checkpoint_format", "format"):
        found = (options.word(key) or "gemm").lower()
        if found != "gemm":
            reason = REFUSED.get(found)
            raise options.problem(key, f"gemm{f' ({found}: {reason})' if reason else ''}")
    if (options.word("backend") or "").lower() == "llm-awq":
        raise options.problem("backend", "autoawq (llm-awq has a layout of its own in int16)")
