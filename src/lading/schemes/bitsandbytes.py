"""quant_method "bitsandbytes": 4 bits (`bnb4`), and int8:

    weight           I8 [O, I]
    SCB              F32 [O], the largest magnitude of each output
    weight_format    U8 [], 0 = rows in order; other orders are tiles of one kind of GPU
    W = w * SCB * (1 / 127)

Letters: O = outputs, I = inputs. Source: bitsandbytes 0.50, `int8_vectorwise_dequant`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lading.errors import CheckpointError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Quantization, Scheme
from lading.schemes.bnb4 import STATE, bnb4_of
from lading.schemes.evidence import check, contradiction, is_dense, spelt
from lading.schemes.ignoring import choice, ignored_names, matching, refuse_ignored, shown
from lading.schemes.options import Options
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["BnbInt8", "BnbQuantization", "parse_bitsandbytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BnbInt8(Scheme):
    """int8 with the largest magnitude of each output as its scale."""

    @property
    def name(self) -> str:
        """For reports."""
        return "bitsandbytes int8, one scale an output"

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """weight, SCB and, where there is one, weight_format."""
        output = Dim(along=Along.OUTPUT)
        specs = (
            TensorSpec(name="weight", dims=(output, Dim(along=Along.INPUT)), dtypes=("I8",)),
            TensorSpec(name="SCB", dims=(output,), dtypes=("F32", "F16", "BF16")),
        )
        if "weight_format" not in found.tensors:
            return specs
        shape = found.tensors["weight_format"].shape
        order = TensorSpec(
            name="weight_format",
            dims=(Dim(along=Along.PARTS),),
            dtypes=("U8",),
            stored=None if shape else (),
        )
        return (*specs, order)

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        order = tensors.get("weight_format")
        if order is not None and int(order.max()) != 0:
            raise CheckpointError(
                f"weight_format is {int(order.max())}, needs 0 (rows in order; others are tiles of "
                "one kind of GPU)"
            )
        scale = tensors["SCB"].to(torch.float32).unsqueeze(1)
        return tensors["weight"].to(torch.float32) * scale * (1 / 127)


@dataclass(frozen=True, slots=True, kw_only=True)
class BnbQuantization(Quantization):
    """What the config declares.

    bits      4 or 8
    kind      "nf4" or "fp4", of 4 bits
    nested    double quantisation; None where the config does not say
    ignored   names of modules that are not quantised
    """

    bits: int
    kind: str = "fp4"
    nested: bool | None = None
    ignored: tuple[str, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The module's scheme; None where it is dense."""
        if is_dense(found):
            return None
        refuse_ignored(found, "llm_int8_skip_modules", self.ignored)
        if self.bits == 8:
            return self._int8(layer, found)
        says = f"bitsandbytes {self.kind}"
        needed = ("weight", "weight.absmax", "weight.quant_map", f"{STATE}{self.kind}")
        if any(name not in found.tensors for name in needed):
            raise contradiction(found, says, shown(found), f"needs {', '.join(needed)}")
        scheme = bnb4_of(self.kind, found, says)
        if self.nested is not None and scheme.nested != self.nested:
            absmax = f"weight.absmax {spelt(found.tensors['weight.absmax'])}"
            raise contradiction(
                found, f"bnb_4bit_use_double_quant {str(self.nested).lower()}", [absmax]
            )
        check(scheme.specs(layer, found), found, says)
        return scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The entry of the list of dense modules that names it."""
        return matching(module, self.ignored)

    def _int8(self, layer: Layer, found: Found) -> Scheme:
        says = "bitsandbytes int8"
        if "SCB" not in found.tensors:
            raise contradiction(found, says, shown(found), "needs weight, SCB")
        scheme = BnbInt8()
        check(scheme.specs(layer, found), found, says)
        return scheme


def parse_bitsandbytes(config: Mapping[str, Any]) -> BnbQuantization:
    """The quantization_config of quant_method "bitsandbytes"."""
    options = Options(raw=config)
    bits = {
        number
        for number in (4, 8)
        for key in (f"load_in_{number}bit", f"_load_in_{number}bit")
        if options.flag(key, default=False)
    }
    if len(bits) != 1:
        raise options.problem("load_in_4bit", "one of load_in_4bit and load_in_8bit to be true")
    double = "bnb_4bit_use_double_quant"
    return BnbQuantization(
        bits=bits.pop(),
        kind=choice(options, "bnb_4bit_quant_type", {"nf4": "nf4", "fp4": "fp4"}, "fp4"),
        nested=options.flag(double, default=False) if options.given(double) else None,
        ignored=ignored_names(options, "llm_int8_skip_modules"),
    )
