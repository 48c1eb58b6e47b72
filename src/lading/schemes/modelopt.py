"""quant_method "modelopt", and the `quantization` object of hf_quant_config.json (ModelOpt 0.47).

    quant_algo                   tensors                                            W
    FP8                          weight F8 [O, I], weight_scale []                   w * s
    FP8_PER_CHANNEL_PER_TOKEN    weight F8, weight_scale [O]                         w * s
    FP8_PB_WO                    weight F8, weight_scale [O/128, 1, I/128, 1]        w * s
    MXFP8                        weight F8, weight_scale U8 [O, I/32]                w * 2^(s - 127)
    NVFP4, W4A16_NVFP4           weight U8 [O, I/2], weight_scale F8 [O, I/16],
                                 weight_scale_2 [], a factor                         fp4 * (s * s2)
    W4A16_AWQ                    weight U8 [O/2, I]: row i holds rows 2i (low) and
                                 2i + 1 (high), weight_scale [O, I/g]                int4 * s
    W8A8_SQ_PER_CHANNEL          weight I8 [O, I], weight_scale [O]                  w * s
    MIXED_PRECISION              `quantized_layers` names the algorithm of each module
    each                         and, where there are: input_scale [], pre_quant_scale [I]

Inputs are multiplied by pre_quant_scale before the product; W is the weight that gives the same
outputs from the inputs as they are, so its column k is multiplied by pre_quant_scale[k].
Letters: O = outputs, I = inputs, g = group size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from lading.layers import Layer
from lading.schemes.base import Found, Quantization, Scheme
from lading.schemes.evidence import check, contradiction, is_dense
from lading.schemes.floating import Fp8, Nvfp4, ScaleLayout
from lading.schemes.ignoring import ignored_names, matching, refuse_ignored, shown
from lading.schemes.options import Options, one_of
from lading.schemes.smoothed import PairedInt4, SmoothedInt8

__all__ = ["ModelOptQuantization", "parse_modelopt"]

IGNORED = ("ignore", "exclude_modules")


def _nvfp4(group: int) -> Scheme:
    return Nvfp4(
        weight="weight",
        global_scale="weight_scale_2",
        divide=False,
        scalars=("input_scale",),
        group_size=group,
    )


_ALGORITHMS: dict[str, tuple[int, Callable[[int], Scheme]]] = {  # default group size, the scheme
    "FP8": (0, lambda _: Fp8(layout=ScaleLayout.TENSOR)),
    "FP8_PER_CHANNEL_PER_TOKEN": (0, lambda _: Fp8(layout=ScaleLayout.CHANNEL)),
    "FP8_PB_WO": (0, lambda _: Fp8(layout=ScaleLayout.BLOCK, block=(128, 128))),
    "MXFP8": (32, lambda g: Fp8(layout=ScaleLayout.GROUP, block=(1, g), exponents=True)),
    "NVFP4": (16, _nvfp4),
    "W4A16_NVFP4": (16, _nvfp4),
    "W4A16_AWQ": (128, lambda g: PairedInt4(group_size=g)),
    "W8A8_SQ_PER_CHANNEL": (0, lambda _: SmoothedInt8()),
}
_MIXED = "MIXED_PRECISION"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptQuantization(Quantization):
    """What the config declares.

    algorithm   of every module that is not ignored; None where `modules` has them one by one
    modules     (module, algorithm, scheme) of MIXED_PRECISION
    ignored     names and wildcards of modules that are not quantised
    """

    algorithm: str | None
    scheme: Scheme | None
    modules: Mapping[str, tuple[str, Scheme]]
    ignored: tuple[str, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The module's scheme; None where it is dense."""
        if is_dense(found):
            return None
        refuse_ignored(found, " or ".join(IGNORED), self.ignored)
        algorithm, scheme = self._declared(found)
        check(scheme.specs(layer, found), found, f"quant_algo {algorithm}")
        return scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The entry of the list of dense modules that names it, and its own algorithm."""
        return matching(module, self.ignored), self.modules.get(module)

    def _declared(self, found: Found) -> tuple[str, Scheme]:
        if self.scheme is not None and self.algorithm is not None:
            return self.algorithm, self.scheme
        if found.module in self.modules:
            return self.modules[found.module]
        raise contradiction(
            found,
            f"quant_algo {_MIXED} and nothing of this module in quantized_layers"
            if self.modules
            else "that only the KV cache is quantised (quant_algo null)",
            shown(found),
            "needs a weight of the model's dtype",
        )


def parse_modelopt(config: Mapping[str, Any]) -> ModelOptQuantization:
    """The quantization_config, or hf_quant_config.json's `quantization`, which says the same."""
    inner = config.get("quantization")
    options = Options(raw=inner if isinstance(inner, Mapping) else config)
    ignored = ignored_names(options, *IGNORED)
    if not options.given("quant_algo") and options.given("kv_cache_quant_algo"):
        return ModelOptQuantization(algorithm=None, scheme=None, modules={}, ignored=ignored)
    name = _algorithm(options, (*_ALGORITHMS, _MIXED))
    if name != _MIXED:
        scheme = _scheme(name, options)
        return ModelOptQuantization(algorithm=name, scheme=scheme, modules={}, ignored=ignored)
    modules: dict[str, tuple[str, Scheme]] = {}
    for module, own in options.objects("quantized_layers"):
        algorithm = _algorithm(own, tuple(_ALGORITHMS))
        modules[module] = (algorithm, _scheme(algorithm, own))
    if not modules:
        raise options.problem("quantized_layers", f"the algorithm of each module ({_MIXED})")
    return ModelOptQuantization(algorithm=None, scheme=None, modules=modules, ignored=ignored)


def _algorithm(options: Options, known: tuple[str, ...]) -> str:
    name = (options.word("quant_algo") or "").upper()
    if name not in known:
        raise options.problem("quant_algo", one_of(known))
    return name


def _scheme(algorithm: str, options: Options) -> Scheme:
    if options.flag("has_zero_point", default=False):
        raise options.problem("has_zero_point", f"false for {algorithm}")
    default, make = _ALGORITHMS[algorithm]
    group = options.integer("group_size", default) if default else 0
    if default and group < 1:
        raise options.problem("group_size", "an int of at least 1")
    return make(group)
