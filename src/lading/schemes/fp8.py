"""quant_method "fp8": AutoFP8, transformers and DeepSeek checkpoints, and GPTQModel's FP8.

    scale of a module                             written by
    weight_scale [] or [1], input_scale []        AutoFP8: W = w * s
    weight_scale [O] or [O, 1]                    one an output: W = w * s
    weight_scale_inv [O/b, I/c]                   transformers, DeepSeek: W = w * s, despite its
                                                  name; fp32, bf16, or exponents (e8m0, uint8)
    weight_scale_inv [], activation_scale []      transformers, one a tensor: W = w * s
    weight_scale_inv [], [O] or [O/b, I/c]        GPTQModel 7.4, weight_scale_semantics "inverse":
                                                  W = w / s

The same name multiplies or divides, so a scale of a name and shape that only the second kind of
writer uses is refused where the config does not say which. Letters: O = outputs, I = inputs,
(b, c) = weight_block_size.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from lading.layers import Layer
from lading.schemes.base import Found, Quantization, Scheme
from lading.schemes.evidence import check, contradiction, is_dense, spelt
from lading.schemes.floating import Fp8, ScaleLayout
from lading.schemes.ignoring import choice, ignored_names, matching, refuse_ignored, shown
from lading.schemes.options import Options

__all__ = ["Fp8Quantization", "parse_fp8"]

SCALES = ("weight_scale_inv", "weight_scale")
INPUT_SCALES = ("input_scale", "activation_scale")
IGNORED = ("ignored_layers", "modules_to_not_convert")

_FORMATS = {
    "e4m3": "F8_E4M3",
    "float8_e4m3fn": "F8_E4M3",
    "e5m2": "F8_E5M2",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_METHODS = {
    "tensor": ScaleLayout.TENSOR,
    "row": ScaleLayout.CHANNEL,
    "block": ScaleLayout.BLOCK,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Quantization(Quantization):
    """What the config declares.

    dtype      of the weights
    static     inputs have stored scales
    block      weight_block_size, None where scales cover no blocks
    method     what a scale covers, where the config has a word for it
    inverse    weight_scale_inv divides
    ignored    names of modules that are not quantised
    """

    dtype: str = "F8_E4M3"
    static: bool = False
    block: tuple[int, int] | None = None
    method: ScaleLayout | None = None
    inverse: bool = False
    ignored: tuple[str, ...] = ()

    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The module's FP8 scheme; None where it is dense."""
        if is_dense(found):
            return None
        refuse_ignored(found, " or ".join(IGNORED), self.ignored)
        name = self._scale_name(found)
        layout = self._layout(found, name)
        scheme = Fp8(
            layout=layout,
            block=self.block or (128, 128),
            scale=name,
            divide=self._divides(found, name, layout),
            scalars=INPUT_SCALES if self.static else (),
            dtypes=(self.dtype,),
        )
        says = f"{scheme.name}, {'static' if self.static else 'dynamic'} inputs"
        check(scheme.specs(layer, found), found, says)
        if self.static and not any(scalar in found.tensors for scalar in INPUT_SCALES):
            raise contradiction(found, says, ["no input_scale"])
        return scheme

    def said_of(self, layer: Layer, module: str) -> Hashable:
        """The entry of the list of dense modules that names it."""
        return matching(module, self.ignored)

    def _scale_name(self, found: Found) -> str:
        names = [name for name in SCALES if name in found.tensors]
        if len(names) == 1:
            return names[0]
        raise contradiction(
            found,
            "quant_method fp8",
            shown(found),
            f"needs one of {' and '.join(SCALES)}",
        )

    def _layout(self, found: Found, name: str) -> ScaleLayout:
        if self.block is not None:
            return ScaleLayout.BLOCK
        shape = found.tensors[name].shape
        if self.method is None and shape in ((), (1,)):
            return ScaleLayout.TENSOR
        if self.method is None and shape in ((found.outputs,), (found.outputs, 1)):
            return ScaleLayout.CHANNEL
        if self.method is not None:
            return self.method
        raise contradiction(
            found,
            "quant_method fp8 and no weight_block_size",
            [f"{name} {spelt(found.tensors[name])}"],
            f"needs one scale, or one for each of {found.outputs} outputs",
        )

    def _divides(self, found: Found, name: str, layout: ScaleLayout) -> bool:
        if self.inverse and name == "weight_scale":
            raise contradiction(
                found,
                'weight_scale_semantics "inverse"',
                [f"{name} {spelt(found.tensors[name])}"],
                "needs weight_scale_inv",
            )
        if not self.inverse and name == "weight_scale_inv" and layout is ScaleLayout.CHANNEL:
            raise contradiction(
                found,
                "no weight_scale_semantics",
                [f"{name} {spelt(found.tensors[name])}"],
                "one a row, it may multiply or divide: needs the config to say which",
            )
        return self.inverse


def parse_fp8(config: Mapping[str, Any]) -> Fp8Quantization:
    """The quantization_config of quant_method "fp8"; a ConfigError where a value cannot be."""
    options = Options(raw=config)
    static = choice(options, "activation_scheme", {"static": True, "dynamic": False}, False)
    choice(options, "scale_fmt", {"ue8m0": True, "float": True}, True)
    block = _block_size(options)
    method = choice(options, "weight_scale_method", {**_METHODS}, None)
    if method is not None and (method is ScaleLayout.BLOCK) != (block is not None):
        needed = "no" if method is not ScaleLayout.BLOCK else "a"
        raise options.problem("weight_scale_method", f"{needed} weight_block_size beside it")
    return Fp8Quantization(
        dtype=_dtype(options),
        static=static,
        block=block,
        method=method,
        inverse=choice(options, "weight_scale_semantics", {"inverse": True}, False),
        ignored=ignored_names(options, *IGNORED),
    )


def _dtype(options: Options) -> str:
    given = [key for key in ("fmt", "format", "checkpoint_format") if options.given(key)]
    dtypes = {choice(options, key, _FORMATS, "") for key in given}
    if len(dtypes) > 1:
        raise options.problem(given[0], f"the same as {' and '.join(given[1:])}")
    return dtypes.pop() if dtypes else "F8_E4M3"


def _block_size(options: Options) -> tuple[int, int] | None:
    value = options.raw.get("weight_block_size")
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_is_size, value)):
        raise options.problem("weight_block_size", "two ints of at least 1, or null")
    return value[0], value[1]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
