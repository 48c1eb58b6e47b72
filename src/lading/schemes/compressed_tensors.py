"""compressed-tensors, the format of llm-compressor: which scheme each module has.

No bits and no scales here: the schemes are in `integer`, `floating` and `marlin`; how the groups of
the config are read is in `config_groups`.

    format of a group        weights            scheme
    pack-quantized           int, 2 to 8 bits   PackedInt
    int-quantized,           int, 2 to 8 bits   PlainInt
    float-quantized,         float, 8 bits      Fp8
    naive-quantized                             (three names for one value per byte)
    nvfp4-pack-quantized     float, 4 bits      Nvfp4, the global scale divides
    mxfp4-pack-quantized     float, 4 bits      Mxfp4
    mxfp8-quantized          float, 8 bits      Fp8, scales are exponents
    marlin-24                int, 4 bits        Marlin24

Which group a module belongs to: an exact name goes before a "re:" expression (matched from the
name's beginning; several in the order of their texts), and that before a class ("Linear"), as
`match_targets` of compressed-tensors 0.19 orders them. What the files show goes before what the
config says: a module that is dense there is dense, and one that is packed although the config
ignores it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from lading.errors import ConfigError
from lading.layers import Kind, Layer
from lading.schemes.base import Found, Quantization, Scheme
from lading.schemes.cache_scales import CacheScales, parse_kv_cache
from lading.schemes.config_groups import (
    FORMATS,
    Group,
    expressions,
    parse_group,
    section,
    word,
)
from lading.schemes.evidence import check, contradiction, is_dense, spelt
from lading.schemes.floating import Fp8, Mxfp4, Nvfp4, ScaleLayout
from lading.schemes.integer import PackedInt, PlainInt, num_words
from lading.schemes.options import Options

__all__ = ["CompressedTensors", "parse_compressed_tensors"]

CLASSES = ("Linear", "LinearBase")
INPUT_SCALARS = ("input_scale", "input_zero_point", "input_global_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensors(Quantization):
    """A parsed config. Made by `parse_compressed_tensors` only.

    ignore     names, "re:" expressions and classes of the modules that are dense
    kv_cache   the scales of a quantised KV cache, which lie beside the layers; None without one
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    kv_cache: CacheScales | None = None

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The scheme of a stored module, None where it is dense."""
        if is_dense(found) or not found.tensors:
            return None
        shown = [f"{n} {spelt(t)}" for n, t in found.tensors.items() if n != "bias"]
        for entry in self.ignore:
            if _match(entry, layer, found.module) is not None:
                raise contradiction(found, f'that "{entry}" is not quantised (ignore)', shown)
        group = self._group(layer, found.module)
        if group is None:
            raise contradiction(found, "nothing of it (no target of config_groups fits)", shown)
        scheme = _scheme(group, found)
        check(scheme.specs(layer, found), found, scheme.name)
        _check_inputs(group, found, scheme.name)
        return scheme

    def cache_scales(self) -> CacheScales | None:
        """Those of kv_cache_scheme."""
        return self.kv_cache

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The first entry of `ignore` that names it, and its group's name."""
        ignored = next((e for e in self.ignore if _match(e, layer, module) is not None), None)
        group = self._group(layer, module)
        return ignored, None if group is None else group.name

    def _group(self, layer: Layer, module: str) -> Group | None:
        fits = [
            (rank, target, group)
            for group in self.groups
            for target in group.targets
            if (rank := _match(target, layer, module)) is not None
        ]
        return min(fits, key=lambda fit: fit[:2])[2] if fits else None


def parse_compressed_tensors(config: Mapping[str, Any]) -> CompressedTensors:
    """The quantization_config of quant_method "compressed-tensors".

    Raises a ConfigError with the key, what it is, and what it needs to be.
    """
    options = Options(raw=config)
    word(options, "quant_method", ("compressed-tensors",), "compressed-tensors")
    sparsity = section(options, "sparsity_config")
    if sparsity is not None:
        word(sparsity, "format", ("dense", "marlin-24"), "dense")
    transforms = section(options, "transform_config")
    if transforms is not None and transforms.raw.get("config_groups"):
        raise transforms.problem("config_groups", "none (the inputs would be rotated, too)")
    groups = []
    entries = options.objects("config_groups")
    if entries:
        whole = word(options, "format", (*FORMATS, "mixed-precision", "dense"))
        groups = [g for name, raw in entries if (g := parse_group(name, raw, whole)) is not None]
    _check_targets(groups)
    return CompressedTensors(
        groups=tuple(groups),
        ignore=expressions(options, "ignore"),
        kv_cache=parse_kv_cache(section(options, "kv_cache_scheme")),
    )


def _check_targets(groups: list[Group]) -> None:
    owners: dict[str, str] = {}
    for group in groups:
        for target in group.targets:
            if owners.setdefault(target, group.name) != group.name:
                raise ConfigError(
                    f'has "{target}", a target of {owners[target]!r} as well, needs each target in '
                    "one group",
                    subject=f"quantization_config.config_groups[{group.name!r}].targets",
                )


def _match(target: str, layer: Layer, module: str) -> int | None:
    """0 where the name is the module's, 1 where an expression fits, 2 where the class does."""
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if re.match(target[3:], module) else None
    is_class = target in CLASSES or (target == "Embedding" and layer.kind is Kind.EMBEDDING)
    return 2 if is_class else None


def _scheme(group: Group, found: Found) -> Scheme:
    weights = group.weights
    if group.format == "marlin-24":
        from lading.schemes.marlin import Marlin24

        return Marlin24.of(weights.group_size or -1, found.inputs, compressed_tensors=True)
    if group.format == "nvfp4-pack-quantized":
        return Nvfp4()
    if group.format == "mxfp4-pack-quantized":
        return Mxfp4()
    if group.format == "pack-quantized":
        # Indices are used wherever there are some: they hold, whatever the config says of them.
        # The other way round, weights in the order of their groups cannot be read without them.
        grouped = weights.layout is ScaleLayout.GROUP
        return PackedInt(
            bits=weights.bits,
            layout=weights.layout,
            group_size=weights.group_size,
            symmetric=weights.symmetric,
            act_order=grouped and (weights.act_order or "weight_g_idx" in found.tensors),
            padded=_is_padded(weights.bits, found),
        )
    if weights.is_float:
        is_mx = group.format == "mxfp8-quantized"
        return Fp8(layout=weights.layout, block=weights.block, exponents=is_mx)
    return PlainInt(
        bits=weights.bits,
        layout=weights.layout,
        group_size=weights.group_size,
        symmetric=weights.symmetric,
    )


def _is_padded(bits: int, found: Found) -> bool:
    """Whether words hold whole values: up to compressed-tensors 0.17.1, where 32 % bits != 0."""
    packed = found.tensors.get("weight_packed")
    if not 32 % bits or packed is None or len(packed.shape) != 2:
        return False
    dense, padded = (num_words(found.inputs, bits, padded=p) for p in (False, True))
    if dense == padded > 1:  # in one word both are the same
        raise contradiction(
            found,
            f"int{bits} packed",
            [f"weight_packed {spelt(packed)}"],
            f"needs more than {found.inputs} inputs to tell a dense stream of bits "
            f"(compressed-tensors 0.18 and newer) from {32 // bits} values per word (older): both "
            f"take {dense} words",
        )
    return packed.shape[1] == padded != dense


def _check_inputs(group: Group, found: Found, declared: str) -> None:
    inputs = group.inputs
    missing = [f"no {name}" for name in inputs.needed if name not in found.tensors]
    surplus = [
        f"{name} {spelt(found.tensors[name])}"
        for name in INPUT_SCALARS
        if name in found.tensors and name not in inputs.needed + inputs.allowed
    ]
    if missing or surplus:
        kind = "static input scales" if inputs.needed else "no static input scales"
        raise contradiction(found, f"{declared}, with {kind}", missing + surplus)
