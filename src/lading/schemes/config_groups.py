"""The config_groups of compressed-tensors: how the weights and inputs of a group are quantised.

Checked when the config is parsed, before any header is looked at; the first wrong value is a
ConfigError. Keys and their defaults: `QuantizationArgs` of compressed-tensors 0.19. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lading.errors import ConfigError
from lading.schemes.floating import ScaleLayout
from lading.schemes.options import Options, one_of

__all__ = ["FORMATS", "Group", "Inputs", "Weights", "expressions", "parse_group", "section", "word"]

NAIVE = ("int-quantized", "float-quantized", "naive-quantized")
"""Three names for one format: one value per byte."""

FORMATS = (
    "pack-quantized",
    *NAIVE,
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "marlin-24",
)
GROUP_SIZES = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32, "mxfp8-quantized": 32}
"""The formats of floats in groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How the weights of a group are quantised.

    bits, is_float   of one weight
    layout           what one scale covers
    block            (b, c) of BLOCK, (1, g) of GROUP, else (1, 1)
    symmetric        there are no zero points
    act_order        the groups of the inputs are listed (weight_g_idx)
    """

    bits: int
    is_float: bool
    layout: ScaleLayout
    block: tuple[int, int] = (1, 1)
    symmetric: bool = True
    act_order: bool = False

    @property
    def group_size(self) -> int:
        """Inputs of a group; 0 where the layout is not GROUP."""
        return self.block[1] if self.layout is ScaleLayout.GROUP else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Which scalars for its inputs a module has: those of `needed`, perhaps those of `allowed`."""

    needed: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The modules that are quantised alike: one entry of config_groups that has weights."""

    name: str
    targets: tuple[str, ...]
    format: str
    weights: Weights
    inputs: Inputs


def parse_group(name: str, options: Options, whole: str) -> Group | None:
    """One entry of config_groups; None where it says nothing of weights.

    whole   the format of the checkpoint, for groups without one of their own
    """
    raw = section(options, "weights")
    if raw is None:
        return None
    targets = expressions(options, "targets")
    if not targets:
        raise options.problem("targets", "a list of at least one string")
    chosen = whole
    if options.given("format") or whole == "mixed-precision":
        chosen = word(options, "format", FORMATS)
    elif whole not in FORMATS:
        raise ConfigError(
            f'is "{whole}", needs {one_of(FORMATS)} ({options.scope} has weights)',
            subject="quantization_config.format",
        )
    return Group(
        name=name,
        targets=targets,
        format=chosen,
        weights=_weights(raw, chosen),
        inputs=_inputs(section(options, "input_activations")),
    )


def section(options: Options, key: str) -> Options | None:
    """The object under a key; None where it is missing, null or empty."""
    value = options.raw.get(key)
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise options.problem(key, "an object or null")
    return Options(raw=value, scope=f"{options.scope}.{key}")


def word(options: Options, key: str, allowed: Sequence[str], default: str | None = None) -> str:
    """One of the allowed words, in any case of letters."""
    value = options.word(key)
    if value is None and default is not None:
        return default
    if value is None or value.lower() not in allowed:
        raise options.problem(key, one_of(allowed))
    return value.lower()


def expressions(options: Options, key: str) -> tuple[str, ...]:
    """A list of names, classes and "re:" expressions that compile."""
    entries = options.words(key)
    for entry in entries:
        try:
            re.compile(entry[3:] if entry.startswith("re:") else "")
        except re.error as error:
            raise options.problem(key, f"regular expressions after re: ({error})") from None
    return entries


def _weights(options: Options, format_name: str) -> Weights:
    if options.raw.get("dynamic") not in (None, False):
        raise options.problem("dynamic", "false (weights are stored)")
    is_float = word(options, "type", ("int", "float"), "int") == "float"
    if format_name not in NAIVE and is_float != (format_name in GROUP_SIZES):
        needed = "int" if is_float else "float"
        raise options.problem("type", f'"{needed}" (format {format_name})')
    bits = options.integer("num_bits", 8, allowed=_widths(format_name, is_float))
    symmetric = options.flag("symmetric", True)
    if not symmetric and (is_float or format_name == "marlin-24"):
        kind = "floats" if is_float else "Marlin 2:4 weights"
        raise options.problem("symmetric", f"true ({kind} have no zero points)")
    layout, block = _layout(options, format_name, is_float)
    return Weights(
        bits=bits,
        is_float=is_float,
        layout=layout,
        block=block,
        symmetric=symmetric,
        act_order=_is_act_order(options),
    )


def _widths(format_name: str, is_float: bool) -> tuple[int, ...]:
    if format_name in ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "marlin-24"):
        return (4,)
    return (8,) if is_float else (2, 3, 4, 5, 6, 7, 8)


def _layout(
    options: Options, format_name: str, is_float: bool
) -> tuple[ScaleLayout, tuple[int, int]]:
    allowed = ["tensor", "channel", "group", "tensor_group"]
    if is_float:
        allowed.append("block")
    if format_name == "nvfp4-pack-quantized":
        allowed = ["tensor_group", "group"]
    elif format_name in GROUP_SIZES:
        allowed = ["group"]
    elif format_name == "marlin-24":
        allowed = ["channel", "group"]
    else:
        allowed.remove("tensor_group")  # group scales under one for the tensor: only NVFP4
    size = options.group_size(default=0) if options.given("group_size") else 0
    inferred = "group" if size > 0 else "channel" if size == -1 else "tensor"
    strategy = word(options, "strategy", allowed, inferred if inferred in allowed else None)
    if strategy == "block":
        return ScaleLayout.BLOCK, _block(options)
    if strategy in ("tensor", "channel"):
        return ScaleLayout(strategy), (1, 1)
    if size < 1:
        raise options.problem("group_size", f"an int of at least 1 (strategy {strategy})")
    if size != GROUP_SIZES.get(format_name, size):
        raise options.problem("group_size", f"{GROUP_SIZES[format_name]} (format {format_name})")
    return ScaleLayout.GROUP, (1, size)


def _is_act_order(options: Options) -> bool:
    value = options.raw.get("actorder")
    if isinstance(value, bool):
        return value
    order = word(options, "actorder", ("group", "dynamic", "weight", "static"), "weight")
    return order in ("group", "dynamic")


def _block(options: Options) -> tuple[int, int]:
    value = options.raw.get("block_structure")
    if isinstance(value, str) and re.fullmatch(r"[0-9]+x[0-9]+", value):
        value = [int(size) for size in value.split("x")]
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    ):
        raise options.problem("block_structure", "two ints of at least 1: outputs, inputs")
    return value[0], value[1]


def _inputs(options: Options | None) -> Inputs:
    if options is None or options.raw.get("dynamic") is True:
        return Inputs()
    if options.raw.get("dynamic") == "local":
        return Inputs(needed=("input_global_scale",))
    if options.given("dynamic") and options.raw["dynamic"] is not False:
        raise options.problem("dynamic", 'true, false or "local"')
    word(options, "strategy", ("tensor",), "tensor")
    # Early versions did not write zero points that are all 0.
    return Inputs(needed=("input_scale",), allowed=("input_zero_point",))
