"""config.json: defaults and spellings as in transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lading.models import FAMILIES, ExpertsConfig, ModelConfig, parse_config

from .made import ORACLES, YARN, Case, over_cases

MINIMAL = {
    "vocab_size": 32064,
    "hidden_size": 2048,
    "intermediate_size": 66,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
}
over_families = pytest.mark.parametrize("family", FAMILIES)


def windows_of(config: Any, family: str) -> tuple[int | None, ...]:
    """The windows of transformers: one for all layers, or by layer_types."""
    everywhere = (config.to_dict().get("sliding_window"),) * config.num_hidden_layers
    if family == "llama":
        return (None,) * config.num_hidden_layers
    if family in ("mistral", "phi3", "qwen3_moe", "mixtral"):
        return everywhere
    return tuple(
        config.sliding_window if t == "sliding_attention" else None for t in config.layer_types
    )


def experts_of(config: Any, model: Any) -> ExpertsConfig | None:
    """From the modules of transformers: which layers have a router, and how it chooses."""
    found = [block.mlp for block in model.model.layers]
    sparse = [mlp for mlp in found if hasattr(mlp, "experts")]
    if not sparse:
        return None
    mlp, is_mixtral = sparse[0], config.model_type == "mixtral"
    return ExpertsConfig(
        layers=tuple(mlp in sparse for mlp in found),
        num_experts=mlp.experts.num_experts,
        per_token=mlp.gate.top_k,
        intermediate_size=mlp.experts.intermediate_dim,
        normalised=True if is_mixtral else mlp.gate.norm_topk_prob,
        block="block_sparse_moe" if is_mixtral else "mlp",
        down="w2" if is_mixtral else "down_proj",
    )


def head_dim_of(config: Any) -> int:
    """As every attention module of transformers finds it."""
    found = config.to_dict().get("head_dim")
    return found or config.hidden_size // config.num_attention_heads


def assert_equal(found: ModelConfig, config: Any, family: str) -> None:
    """Every derived field, against an instance of transformers' config class."""
    _, model_class = ORACLES[family]
    import torch

    with torch.device("meta"):
        model = model_class(config)
    names = {name for name, _ in model.named_parameters()}
    fused = family == "phi3"
    rope = config.rope_parameters
    head_dim = head_dim_of(config)
    assert found == ModelConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=f"model.layers.0.self_attn.{'qkv' if fused else 'q'}_proj.bias" in names,
        o_bias="model.layers.0.self_attn.o_proj.bias" in names,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in names,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in names,
        rope=found.rope,
        max_position=config.max_position_embeddings,
        sliding_windows=windows_of(config, family),
        experts=experts_of(config, model),
        dtype=None,
        quantization=None,
    )
    assert found.rope.kind == rope["rope_type"]
    assert found.rope.theta == rope["rope_theta"]
    assert found.rope.partial_rotary_factor == rope.get("partial_rotary_factor", 1.0)
    assert found.rope.rotary_dim == int(head_dim * rope.get("partial_rotary_factor", 1.0))
    assert found.rope.max_position == config.max_position_embeddings
    assert found.rope.original_max_position == rope.get("original_max_position_embeddings")
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        assert getattr(found.rope, key) == rope.get(key)


@over_families
def test_defaults(family: str) -> None:
    config = ORACLES[family][0](**MINIMAL)
    assert_equal(parse_config({"model_type": family, **MINIMAL}), config, family)


@over_families
def test_saved_by_transformers(family: str) -> None:
    """What transformers 5 writes, all keys there."""
    config = ORACLES[family][0](**MINIMAL)
    raw = json.loads(config.to_json_string(use_diff=False))
    assert raw["model_type"] == family
    assert_equal(parse_config(raw), config, family)


@over_cases
def test_both_spellings(case: Case) -> None:
    """The file by hand and the file that transformers saves of it are one model."""
    keys = {key: value for key, value in case.raw().items() if key != "model_type"}
    config = ORACLES[case.family][0](**keys)
    found = parse_config(case.raw())
    assert_equal(found, config, case.family)
    assert parse_config(json.loads(config.to_json_string())) == found


@over_families
def test_null_kv_heads_are_as_many_as_q_heads(family: str) -> None:
    raw = {"model_type": family, **MINIMAL, "num_key_value_heads": None, "head_dim": None}
    assert parse_config(raw).num_kv_heads == 32
    assert parse_config(raw).head_dim == 64


def test_family_by_architectures_alone() -> None:
    raw = {"architectures": ["Qwen3ForCausalLM"], **MINIMAL}
    assert parse_config(raw).family == "qwen3"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float16"}, "F16"),
        ({"dtype": "torch.float32", "torch_dtype": "float32"}, "F32"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "BF16"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "F16"),  # as AutoAWQ writes it
        ({}, None),
    ],
)
def test_dtype(keys: dict[str, Any], expected: str | None) -> None:
    assert parse_config({"model_type": "llama", **MINIMAL, **keys}).dtype == expected


def test_quantization_is_handed_on() -> None:
    facts = {"quant_method": "awq", "bits": 4}
    raw = {"model_type": "llama", **MINIMAL, "quantization_config": facts}
    assert parse_config(raw).quantization == facts
    assert isinstance(hash(parse_config(raw)), int)


def test_unknown_rope_keys_are_left_alone() -> None:
    raw = {"model_type": "llama", **MINIMAL, "rope_scaling": {**YARN, "finetuned": True}}
    assert parse_config(raw).rope.kind == "yarn"
