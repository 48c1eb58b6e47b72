"""config.json as a checked value: what a family's decoder is built from. No torch.

`parse_config` is the only maker of a ModelConfig: what it returns is complete and consistent, and
what is wrong with a file comes out as one PlanError that has every problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lading.errors import ConfigError, PlanError
from lading.models.families import FAMILIES, Experts, Family, Flag, Windows
from lading.models.reading import Reader, spell
from lading.models.rope_config import RopeConfig, read_rope

__all__ = ["ExpertsConfig", "ModelConfig", "parse_config"]

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_LAYERS = 10_000
"""Of which no model has come near; a larger count is a mistake, or an attack on memory."""

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The experts of a model's layers: small MLPs, of which each token goes through a few.

    layers             one a layer: whether it has experts, and not one MLP for all tokens
    per_token          how many experts a token goes through
    intermediate_size  of each expert
    normalised         the weights of a token's experts add up to 1
    block, down        names of the modules: of router and experts, of an expert's second layer
    """

    layers: tuple[bool, ...]
    num_experts: int
    per_token: int
    intermediate_size: int
    normalised: bool
    block: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of a known family. Made by `parse_config` alone.

    family            model_type, a key of `lading.models.FAMILIES`
    head_dim          may differ from hidden_size / num_heads
    qkv_bias, o_bias, mlp_bias    which linear layers have a bias
    qk_norm           q and k are normalised head by head
    rope              the rotary embedding
    sliding_windows   one a layer: how many tokens it looks back on, itself included; None = all
    experts           None where every layer has one MLP
    dtype             of the weights, in the safetensors spelling; None where the file does not say
    quantization      the file's `quantization_config` as it is, None where it has none
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    max_position: int
    sliding_windows: tuple[int | None, ...]
    experts: ExpertsConfig | None = None
    dtype: str | None = None
    quantization: Mapping[str, Any] | None = field(default=None, hash=False)

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of a layer, None where it has one MLP."""
        return self.experts if self.experts is not None and self.experts.layers[layer] else None


def parse_config(raw: Mapping[str, Any], *, file: str = "config.json") -> ModelConfig:
    """The model that a config.json describes.

    raw    the file's JSON object
    file   what messages call it
    Raises a PlanError with every ConfigError: unknown families, missing keys, wrong types, numbers
    that contradict each other.

    Example: {"model_type": "qwen3", "hidden_size": 96, "num_attention_heads": 6, ...} without a
    head_dim has heads of 128, the family's default, not of 96 / 6 = 16.
    """
    if not isinstance(raw, Mapping):
        problem = ConfigError(f"is {spell(raw)}, needs an object", subject=file)
        raise PlanError([problem], what=file)
    reader = Reader(raw, file=file)
    family = _family(reader)
    sizes = {key: reader.integer(key) for key in SIZES}
    if sizes["num_hidden_layers"] > MAX_LAYERS:  # each becomes an object: not before it is checked
        reader.note(
            "num_hidden_layers", f"is {sizes['num_hidden_layers']}, needs at most {MAX_LAYERS}"
        )
        raise PlanError(reader.problems, what=file)
    dtype = _dtype(reader)
    _check_activation(reader)
    quantization = reader.inner("quantization_config").raw or None
    if family is None:
        raise PlanError(reader.problems, what=file)
    num_kv_heads = _num_kv_heads(reader, family)
    head_dim = _head_dim(reader, family)
    max_position = reader.integer("max_position_embeddings", family.max_position)
    config = ModelConfig(
        family=family.model_type,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", family.rms_norm_eps),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        qkv_bias=_flag(reader, family.qkv_bias),
        o_bias=_flag(reader, family.o_bias),
        mlp_bias=_flag(reader, family.mlp_bias),
        qk_norm=family.qk_norm,
        rope=read_rope(reader, family, head_dim=head_dim, max_position=max_position),
        max_position=max_position,
        sliding_windows=_windows(reader, family, sizes["num_hidden_layers"]),
        experts=_experts(reader, family.experts, sizes["num_hidden_layers"]),
        dtype=dtype,
        quantization=quantization,
    )
    if reader.problems:
        raise PlanError(_once(reader.problems), what=file)
    return config


def _once(problems: list[ConfigError]) -> list[ConfigError]:
    """Without repeats: two flags may read one key."""
    return list({str(problem): problem for problem in problems}.values())


def _family(reader: Reader) -> Family | None:
    """The family by model_type and architectures, which have to agree; None after a problem."""
    model_type, listed = reader.raw.get("model_type"), reader.raw.get("architectures")
    by_type = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    names = listed if isinstance(listed, list) else [] if listed is None else [listed]
    by_name = [f for f in FAMILIES.values() if any(name in f.architectures for name in names)]
    known_types = ", ".join(FAMILIES)
    known_names = ", ".join(name for f in FAMILIES.values() for name in f.architectures)
    if model_type is None and not names:
        reader.note("model_type", f"is missing, needs one of: {known_types}")
        return None
    if model_type is not None and by_type is None:
        reader.note(
            "model_type",
            f"is {spell(model_type)}, needs one of: {known_types} (the families that lading knows)",
        )
    if names and not by_name:
        reader.note(
            "architectures",
            f"is {spell(listed)}, needs one of: {known_names} (the models that lading knows)",
        )
    if not reader.sound("model_type", "architectures"):
        return None
    family = by_type if by_type is not None else by_name[0]
    if by_name and by_name != [family]:
        reader.note(
            "architectures",
            f"is {spell(listed)}, needs {', '.join(family.architectures)} (model_type is "
            f"{spell(family.model_type)})",
        )
        return None
    return family


def _flag(reader: Reader, flag: Flag) -> bool:
    return flag.default if flag.key is None else reader.flag(flag.key, flag.default)


def _num_kv_heads(reader: Reader, family: Family) -> int:
    key, q_key = "num_key_value_heads", "num_attention_heads"
    num_heads = reader.integer(q_key) if reader.sound(q_key) else 1
    found = reader.optional_integer(key, family.num_kv_heads)
    if found is None or not reader.sound(key, q_key):
        return num_heads
    if num_heads % found:
        default = f" (the default of {family.model_type})" if key not in reader.raw else ""
        reader.note(
            key,
            f"is {found}{default}, needs a divisor of {num_heads} ({q_key}): "
            f"{num_heads} = {found} * {num_heads // found} + {num_heads % found}",
        )
    return found


def _head_dim(reader: Reader, family: Family) -> int:
    found = reader.optional_integer("head_dim", family.head_dim)
    if found is not None or not reader.sound("hidden_size", "num_attention_heads"):
        return found or 2
    hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    if hidden % heads:
        reader.note(
            "head_dim",
            f"is not given, needs to be (hidden_size / num_attention_heads is no whole number: "
            f"{hidden} = {heads} * {hidden // heads} + {hidden % heads})",
        )
    return max(1, hidden // heads)


def _experts(reader: Reader, experts: Experts | None, num_layers: int) -> ExpertsConfig | None:
    if experts is None:
        return None
    num_experts = _num_experts(reader, experts.num_experts)
    per_token = reader.integer("num_experts_per_tok", experts.num_experts_per_tok)
    if per_token > num_experts and reader.sound("num_experts", "num_local_experts"):
        reader.note(
            "num_experts_per_tok", f"is {per_token}, needs at most {num_experts} (all experts)"
        )
    step, dense = 1, tuple[int, ...]()
    if experts.choosable:
        step = reader.integer("decoder_sparse_step", 1)
        if reader.sound("num_hidden_layers"):
            dense = reader.integers("mlp_only_layers", num_layers, "num_hidden_layers")
    return ExpertsConfig(
        layers=tuple((i + 1) % step == 0 and i not in dense for i in range(num_layers)),
        num_experts=num_experts,
        per_token=per_token,
        intermediate_size=reader.integer(experts.size_key, experts.size),
        normalised=_flag(reader, experts.normalised),
        block=experts.block,
        down=experts.down,
    )


def _num_experts(reader: Reader, default: int) -> int:
    """From `num_experts` or `num_local_experts`, which are one key to transformers."""
    keys = ("num_experts", "num_local_experts")
    found = {key: reader.integer(key) for key in keys if reader.given(key)}
    if len(set(found.values())) > 1 and reader.sound(*keys):
        one, other = found.values()
        reader.note(keys[0], f"is {one}, needs {other} (num_local_experts, the same number)")
    return next(iter(found.values()), default)


def _dtype(reader: Reader) -> str | None:
    """From `dtype` or, where there is none, `torch_dtype`, its name before transformers 5.

    Where both are there the older one does not count: quantisers leave it in the file while they
    write another dtype.
    """
    key = next((key for key in ("dtype", "torch_dtype") if reader.given(key)), None)
    if key is None:
        return None
    value = reader.raw[key]
    code = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else None
    if code is None:
        reader.note(key, f"is {spell(value)}, needs one of: {', '.join(DTYPES)}")
    return code


def _check_activation(reader: Reader) -> None:
    found = reader.raw.get("hidden_act", "silu")
    if found != "silu":
        reader.note(
            "hidden_act", f'is {spell(found)}, needs "silu" (the only gate that lading computes)'
        )


def _windows(reader: Reader, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    if not reader.sound("num_hidden_layers"):
        return ()
    window = None
    is_asked = family.windows in (Windows.BY_LAYER, Windows.EVERY_LAYER_IF_USED)
    if family.windows is Windows.EVERY_LAYER or (
        is_asked and reader.flag("use_sliding_window", False)
    ):
        window = reader.optional_integer("sliding_window", family.sliding_window)
    first = 0
    if family.windows is Windows.BY_LAYER:
        first = reader.integer("max_window_layers", 28, least=0)
    usual = tuple(window if layer >= first else None for layer in range(num_layers))
    return usual if not reader.given("layer_types") else _listed(reader, family, usual, window)


def _listed(
    reader: Reader, family: Family, usual: tuple[int | None, ...], window: int | None
) -> tuple[int | None, ...]:
    """The windows by `layer_types`; where the family does not read it, it has to agree."""
    key, listed = "layer_types", reader.raw["layer_types"]
    if not isinstance(listed, list) or not set(map(str, listed)) <= set(LAYER_TYPES):
        reader.note(key, f"is {spell(listed)}, needs a list of: {', '.join(LAYER_TYPES)}")
        return usual
    if len(listed) != len(usual):
        reader.note(key, f"has {len(listed)} entries, needs {len(usual)} (num_hidden_layers)")
        return usual
    found = tuple(window if kind == "sliding_attention" else None for kind in listed)
    slides = [kind == "sliding_attention" for kind in listed]
    if any(slides) and window is None:
        reader.note(
            key,
            f"has sliding_attention for layer {slides.index(True)}, needs full_attention "
            "(the model has no sliding window)",
        )
    elif family.windows is not Windows.BY_LAYER and found != usual:
        layer = slides.index(False)
        reader.note(
            key,
            f"has full_attention for layer {layer}, needs sliding_attention ({family.model_type} "
            f"has sliding_window {window} in every layer)",
        )
    return found
