"""auto-round's own configs: the tensors are GPTQ's (v1, no g_idx) or AWQ's.

`packing_format` says which; `extra_config` changes the settings of single modules, by name or by
regular expression (auto-round 0.8; `bits` of 16 and more: not quantised).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from lading.errors import ConfigError
from lading.layers import Layer
from lading.schemes.awq import Awq
from lading.schemes.base import Found, Quantization, Scheme
from lading.schemes.evidence import check, contradiction, is_dense
from lading.schemes.gptq import BITS, Gptq
from lading.schemes.ignoring import shown
from lading.schemes.options import Options, one_of

__all__ = ["AutoRoundQuantization", "Override", "Packing", "parse_auto_round"]

DENSE_BITS = (16, 32)
SPECIAL = frozenset("*+?^$()[]{}|\\")
"""A name with one of these is a regular expression, searched for anywhere in a module's name."""


class Packing(str, Enum):
    """The packings that are known, as `packing_format` spells them."""

    GPTQ = "auto_round:auto_gptq"
    AWQ = "auto_round:auto_awq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """An entry of `extra_config`: its modules' scheme, None where they are dense."""

    text: str
    pattern: re.Pattern[str] | None
    scheme: Scheme | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRoundQuantization(Quantization):
    """A parsed auto-round config. Made by `parse_auto_round` alone.

    overrides   a module's own name counts first, then the first expression that is found in it
    """

    scheme: Scheme
    overrides: tuple[Override, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The scheme of a stored module, None where it is dense."""
        if not found.tensors or is_dense(found):
            return None
        override = self._override(found.module)
        scheme = self.scheme if override is None else override.scheme
        if scheme is None:
            said = f'extra_config "{override.text}"' if override is not None else ""
            raise contradiction(
                found,
                f"that it is not quantised ({said})",
                shown(found),
                "needs a weight of the model's dtype",
            )
        check(scheme.specs(layer, found), found, scheme.name)
        return scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The entry of extra_config that counts."""
        override = self._override(module)
        return None if override is None else override.text

    def _override(self, module: str) -> Override | None:
        named = (o for o in self.overrides if o.pattern is None and o.text == module)
        matching = (o for o in self.overrides if o.pattern and o.pattern.search(module))
        return next(named, None) or next(matching, None)


def parse_auto_round(config: Mapping[str, Any]) -> AutoRoundQuantization:
    """The quantisation that an auto-round config describes.

    Raises a ConfigError for a value that is missing, of the wrong type, or of a packing that is not
    known: others (exllamav2, llm_compressor, fp8, ...) differ in zero points or in everything.
    """
    options = Options(raw=config)
    known = [packing.value for packing in Packing]
    name = options.word("packing_format")
    if name not in known:
        raise options.problem("packing_format", one_of(known))
    packing = Packing(name)
    scheme = _scheme(options, packing, None)
    if scheme is None:
        raise options.problem("bits", one_of(_bits(packing)))
    return AutoRoundQuantization(
        scheme=scheme,
        overrides=tuple(
            _override(text, inner, packing, options)
            for text, inner in options.objects("extra_config")
        ),
    )


def _bits(packing: Packing) -> tuple[int, ...]:
    return BITS if packing is Packing.GPTQ else (4,)


def _override(text: str, options: Options, packing: Packing, base: Options) -> Override:
    pattern = None
    if SPECIAL & set(text):
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise ConfigError(
                f"is no regular expression: {error}", subject=options.scope
            ) from error
    return Override(text=text, pattern=pattern, scheme=_scheme(options, packing, base))


def _scheme(options: Options, packing: Packing, base: Options | None) -> Scheme | None:
    """The scheme of an object; what it does not say is as in `base`."""
    default = None if base is None else base.integer("bits")
    bits = options.integer("bits", default, allowed=(*_bits(packing), *DENSE_BITS))
    if bits in DENSE_BITS:
        return None
    if (options.word("data_type") or "int") != "int":
        raise options.problem("data_type", "int, where bits are fewer than 16")
    options.flag("sym", True)
    size = options.group_size("group_size", None if base is None else base.group_size())
    if packing is Packing.AWQ:
        return Awq(group_size=size)
    return Gptq(bits=bits, group_size=size)
