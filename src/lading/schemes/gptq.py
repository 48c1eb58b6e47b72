"""GPTQ: integer codes packed along the inputs, scales and zero points for groups of inputs.

    qweight   I32 [I*b/32, O]     codes, a dense stream of b bits along the inputs
    qzeros    I32 [G, O*b/32]     zero points, a dense stream along the outputs
    scales    F16 [G, O]
    g_idx     I32 [I]             the group of each input; may be missing
W[o, i] = (q[i, o] - z[g, o]) * s[g, o], with g = g_idx[i], which is i // group size unless the
columns were quantised in the order of their activations (desc_act, "act-order").

Format "gptq" (v1) stores z - 1 modulo 2^b, "gptq_v2" stores z. "marlin" and "marlin_24" under the
same quant_method are the layouts of `marlin`. Written by AutoGPTQ, GPTQModel, optimum, auto-round.
Letters: O = outputs, I = inputs, G = groups, b = bits.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from lading.errors import CheckpointError, ConfigError
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Quantization, Scheme
from lading.schemes.evidence import check, contradiction, is_dense
from lading.schemes.ignoring import shown
from lading.schemes.marlin import GROUP_SIZES as MARLIN_GROUP_SIZES
from lading.schemes.marlin import Marlin, Marlin24
from lading.schemes.options import Options, one_of
from lading.specs import Along, Constant, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["BITS", "Container", "Gptq", "GptqQuantization", "Rule", "Settings", "parse_gptq"]

BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("F16", "BF16", "F32")


class Container(str, Enum):
    """The layouts under quant_method gptq, as `checkpoint_format` spells them."""

    V1 = "gptq"
    V2 = "gptq_v2"
    MARLIN = "marlin"
    MARLIN_24 = "marlin_24"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq(Scheme):
    """GPTQ, v1 or v2.

    group_size       inputs that share a scale; -1: all
    act_order        the groups are not in the order of the inputs: g_idx is kept and followed. Its
                     values count over all ranks, so scales and zero points are whole on each rank
    zeros_minus_one  v1: the stored zero points are one too small
    """

    bits: int
    group_size: int
    act_order: bool = False
    zeros_minus_one: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"GPTQ codes are of {self.bits} bits, needs {one_of(BITS)}")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(f"GPTQ groups are of {self.group_size} inputs, needs -1 or above 0")

    @property
    def name(self) -> str:
        """For reports."""
        size = self.group_size
        covers = "one scale an output" if size == -1 else f"groups of {size}"
        return f"GPTQ int{self.bits}, {covers}{', act-order' if self.has_order else ''}"

    @property
    def has_order(self) -> bool:
        """Whether the order matters: a single group has none."""
        return self.act_order and self.group_size != -1

    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """qweight, qzeros, scales, and g_idx where it means something or is there."""
        groups, packed = self._group_dim(), Fraction(32, self.bits)
        rows, columns = (
            Dim(along=along, grain=packed, reason=self._packs(word))
            for along, word in ((Along.INPUT, "rows"), (Along.OUTPUT, "columns"))
        )
        outputs = Dim(along=Along.OUTPUT)
        return (
            TensorSpec(name="qweight", dims=(rows, outputs), dtypes=("I32",)),
            TensorSpec(name="qzeros", dims=(groups, columns), dtypes=("I32",)),
            TensorSpec(name="scales", dims=(groups, outputs), dtypes=SCALE_DTYPES),
            *self._index_specs(found),
        )

    def _index_specs(self, found: Found) -> tuple[TensorSpec, ...]:
        index = TensorSpec(name="g_idx", dims=(Dim(along=Along.INPUT),), dtypes=("I32",))
        if self.has_order:
            return (index,)
        if "g_idx" not in found.tensors:
            return ()
        size = found.inputs if self.group_size == -1 else self.group_size
        return (replace(index, constant=Constant.GROUP_INDEX, group=size),)

    def _group_dim(self) -> Dim:
        if self.group_size == -1:
            return Dim(along=Along.FIXED)
        return Dim(
            along=Along.WHOLE_INPUT if self.has_order else Along.INPUT,
            grain=Fraction(self.group_size),
            ragged=True,
            reason=f"one scale covers a group of {self.group_size} inputs",
        )

    def _packs(self, word: str) -> str:
        if self.bits == 3:
            return f"int3 packs 32 {word} per 3 int32 entries"
        return f"int{self.bits} packs {32 // self.bits} {word} per int32 entry"

    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I]."""
        import torch

        from lading.schemes.bits import unpack_dense

        codes = unpack_dense(tensors["qweight"], self.bits, 0)
        zeros = unpack_dense(tensors["qzeros"], self.bits, 1)
        if self.zeros_minus_one:
            # No quantiser has a zero point of 2^b, so 2^b - 1 can only be the 0 that wrapped.
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        scales = tensors["scales"].to(torch.float32)
        groups = self._groups(tensors, codes.shape[0], scales)
        codes -= zeros.index_select(0, groups)
        return (codes * scales.index_select(0, groups)).t()

    def _groups(
        self, tensors: Mapping[str, torch.Tensor], inputs: int, scales: torch.Tensor
    ) -> torch.Tensor:
        """Int [I]: the row of `scales` that each input has."""
        import torch

        if not self.has_order:
            size = inputs if self.group_size == -1 else self.group_size
            return torch.arange(inputs, device=scales.device) // size
        groups = tensors["g_idx"].reshape(-1)
        low, high = groups.aminmax()
        if low < 0 or high >= scales.shape[0]:
            raise CheckpointError(
                f"g_idx has groups {int(low)} to {int(high)}, needs them in 0 to "
                f"{scales.shape[0] - 1} ({scales.shape[0]} rows of scales)"
            )
        return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a config says of one module, or of all without a rule."""

    bits: int
    group_size: int
    act_order: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """An entry of `dynamic`: for modules whose name begins with a match.

    text       the key as written, "-:.*lm_head"
    settings   None: the modules are dense
    """

    text: str
    pattern: re.Pattern[str]
    settings: Settings | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqQuantization(Quantization):
    """A parsed GPTQ config. Made by `parse_gptq` alone.

    lm_head   what the config says of the head; None where it says nothing
    rules     the first that matches counts (GPTQModel 7.4, `dynamic_get`)

    Lists of what is quantised (`modules_in_block_to_quantize`) are not consulted: there are good
    checkpoints whose list leaves out modules that they hold quantised, and the headers show it.
    """

    container: Container
    settings: Settings
    lm_head: bool | None
    rules: tuple[Rule, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The scheme of a stored module, None where it is dense."""
        if not found.tensors or is_dense(found):
            return None
        rule = next((rule for rule in self.rules if rule.pattern.match(found.module)), None)
        settings = self.settings if rule is None else rule.settings
        is_head = found.module.rpartition(".")[2] == "lm_head"
        if settings is None or (rule is None and is_head and self.lm_head is False):
            said = "lm_head false" if rule is None else f'dynamic "{rule.text}"'
            raise contradiction(
                found,
                f"that it is not quantised ({said})",
                shown(found),
                "needs a weight of the model's dtype",
            )
        scheme = self._scheme(settings, found.inputs)
        check(scheme.specs(layer, found), found, scheme.name)
        return scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The first rule that matches, and whether it is the head."""
        rule = next((rule.text for rule in self.rules if rule.pattern.match(module)), None)
        return rule, module.rpartition(".")[2] == "lm_head"

    def _scheme(self, settings: Settings, inputs: int) -> Scheme:
        if self.container is Container.MARLIN:
            return Marlin.of(settings.group_size, inputs)
        if self.container is Container.MARLIN_24:
            return Marlin24.of(settings.group_size, inputs, compressed_tensors=False)
        return Gptq(
            bits=settings.bits,
            group_size=settings.group_size,
            act_order=settings.act_order,
            zeros_minus_one=self.container is Container.V1,
        )


def parse_gptq(config: Mapping[str, Any]) -> GptqQuantization:
    """The quantisation that a GPTQ config describes (config.json's or quantize_config.json's).

    Without `checkpoint_format` it is v1, as from every AutoGPTQ before 0.8. Raises a ConfigError
    for a value that is missing, of the wrong type or of a layout that is not known.
    """
    options = Options(raw=config)
    container = _container(options)
    settings = _settings(options, container)
    pack_dtype = options.word("pack_dtype")
    if pack_dtype not in (None, "int32"):
        raise options.problem("pack_dtype", "int32, the only width that is known to be written")
    return GptqQuantization(
        container=container,
        settings=settings,
        lm_head=options.flag("lm_head", False) if options.given("lm_head") else None,
        rules=tuple(
            _rule(text, inner, settings, container) for text, inner in options.objects("dynamic")
        ),
    )


def _container(options: Options) -> Container:
    names = [options.word(key) for key in ("checkpoint_format", "format")]
    known = [container.value for container in Container]
    for key, name in zip(("checkpoint_format", "format"), names, strict=True):
        if name is not None and name not in known:
            raise options.problem(key, one_of(known))
    declared = {name for name in names if name is not None}
    if options.flag("is_marlin_format", False):
        declared.add(Container.MARLIN.value)
    if len(declared) > 1:
        raise ConfigError(
            f"checkpoint_format, format and is_marlin_format say {' and '.join(sorted(declared))}, "
            "needs one of them",
            subject=options.scope,
        )
    return Container(declared.pop()) if declared else Container.V1


def _settings(options: Options, container: Container, base: Settings | None = None) -> Settings:
    """The settings of an object; what it does not say is as in `base`."""
    is_marlin = container in (Container.MARLIN, Container.MARLIN_24)
    options.flag("sym", True)
    settings = Settings(
        bits=options.integer(
            "bits", base.bits if base else None, allowed=(4,) if is_marlin else BITS
        ),
        group_size=options.group_size("group_size", base.group_size if base else None),
        act_order=options.flag("desc_act", base.act_order if base else False),
    )
    if is_marlin:
        needs = f" ({container.value} stores nothing else)"
        if settings.group_size not in MARLIN_GROUP_SIZES:
            raise options.problem("group_size", f"{one_of(MARLIN_GROUP_SIZES)}{needs}")
        if settings.act_order:
            raise options.problem("desc_act", f"false{needs}")
        if not options.flag("sym", True):
            raise options.problem("sym", f"true{needs}")
    return settings


def _rule(text: str, options: Options, base: Settings, container: Container) -> Rule:
    """'+:regex' and 'regex' change settings, '-:regex' leaves modules dense."""
    for key in ("quant_method", "method", "checkpoint_format", "format", "pack_dtype"):
        if options.given(key):
            raise options.problem(key, "no other layout than that of the whole checkpoint")
    try:
        pattern = re.compile(text.removeprefix("-:").removeprefix("+:"))
    except re.error as error:
        raise ConfigError(f"is no regular expression: {error}", subject=options.scope) from error
    is_dense = text.startswith("-:")
    return Rule(
        text=text,
        pattern=pattern,
        settings=None if is_dense else _settings(options, container, base),
    )
