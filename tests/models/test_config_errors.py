"""config.json: the full text of every error, all of a file's at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from lading.errors import ConfigError, PlanError
from lading.models import parse_config

from .made import COMMON, LLAMA3, LONGROPE, YARN


@dataclass(frozen=True, slots=True, kw_only=True)
class Fails:
    """Keys over COMMON (... takes one away), and the text of each problem."""

    id: str
    keys: dict[str, Any]
    texts: list[str]
    family: str = "llama"


QWEN = {"num_key_value_heads": 2}
WINDOW = {**QWEN, "use_sliding_window": True, "sliding_window": 4}
BAD_CONFIGS = [
    Fails(
        id="unknown-model-type",
        keys={"model_type": "gemma"},
        texts=[
            'model_type: is "gemma", needs one of: llama, mistral, qwen2, qwen3, phi3, qwen3_moe, '
            "mixtral (the families that lading knows). In config.json."
        ],
    ),
    Fails(
        id="unknown-architecture",
        keys={"architectures": ["LlamaForSequenceClassification"]},
        texts=[
            'architectures: is ["LlamaForSequenceClassification"], needs one of: '
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
            "Phi3ForCausalLM, Qwen3MoeForCausalLM, MixtralForCausalLM (the models that lading "
            "knows). In config.json."
        ],
    ),
    Fails(
        id="no-family",
        keys={"model_type": ...},
        texts=[
            "model_type: is missing, needs one of: llama, mistral, qwen2, qwen3, phi3, qwen3_moe, "
            "mixtral. In config.json."
        ],
    ),
    Fails(
        id="two-families",
        keys={"architectures": ["Qwen2ForCausalLM"]},
        texts=[
            'architectures: is ["Qwen2ForCausalLM"], needs LlamaForCausalLM (model_type is '
            '"llama"). In config.json.'
        ],
    ),
    Fails(
        id="all-at-once",
        keys={
            "vocab_size": ...,
            "hidden_size": "48",
            "intermediate_size": 0,
            "num_hidden_layers": True,
            "num_attention_heads": None,
            "rms_norm_eps": -1e-6,
            "tie_word_embeddings": 1,
            "attention_bias": "no",
            "hidden_act": "gelu",
            "torch_dtype": "int8",
        },
        texts=[
            "vocab_size: is missing, needs an int of at least 1. In config.json.",
            'hidden_size: is "48", needs an int of at least 1. In config.json.',
            "intermediate_size: is 0, needs an int of at least 1. In config.json.",
            "num_hidden_layers: is true, needs an int of at least 1. In config.json.",
            "num_attention_heads: is null, needs an int of at least 1. In config.json.",
            'torch_dtype: is "int8", needs one of: float32, float16, bfloat16, float64. In '
            "config.json.",
            'hidden_act: is "gelu", needs "silu" (the only gate that lading computes). In '
            "config.json.",
            "rms_norm_eps: is -1e-06, needs a number above 0. In config.json.",
            "tie_word_embeddings: is 1, needs true or false. In config.json.",
            'attention_bias: is "no", needs true or false. In config.json.',
        ],
    ),
    Fails(
        id="kv-heads",
        keys={"num_key_value_heads": 4},
        texts=[
            "num_key_value_heads: is 4, needs a divisor of 6 (num_attention_heads): 6 = 4 * 1 + "
            "2. In config.json."
        ],
    ),
    Fails(
        id="kv-heads-default",
        family="mistral",
        keys={},
        texts=[
            "num_key_value_heads: is 8 (the default of mistral), needs a divisor of 6 "
            "(num_attention_heads): 6 = 8 * 0 + 6. In config.json."
        ],
    ),
    Fails(
        id="head-dim-not-whole",
        keys={"hidden_size": 50},
        texts=[
            "head_dim: is not given, needs to be (hidden_size / num_attention_heads is no whole "
            "number: 50 = 6 * 8 + 2). In config.json."
        ],
    ),
    Fails(
        id="head-dim-odd",
        keys={"head_dim": 9},
        texts=[
            "head_dim: leaves 9 elements to rotate, needs an even number above 0. In config.json."
        ],
    ),
    Fails(
        id="quantization-not-an-object",
        keys={"quantization_config": "gptq"},
        texts=['quantization_config: is "gptq", needs an object or null. In config.json.'],
    ),
    Fails(
        id="rope-kind",
        keys={"rope_scaling": {"type": "proportional", "factor": 2.0}},
        texts=[
            'rope_scaling.type: is "proportional", needs one of: default, linear, dynamic, '
            "llama3, yarn, longrope (what lading knows for llama). In config.json."
        ],
    ),
    Fails(
        id="rope-kind-of-the-family",
        family="phi3",
        keys={"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        texts=[
            'rope_parameters.rope_type: is "linear", needs one of: default, longrope, su, yarn '
            "(what lading knows for phi3). In config.json."
        ],
    ),
    Fails(
        id="rope-keys",
        keys={"rope_scaling": {"rope_type": "llama3", "factor": "8", "high_freq_factor": True}},
        texts=[
            'rope_scaling.factor: is "8", needs a number above 0. In config.json.',
            "rope_scaling.low_freq_factor: is missing, needs a number above 0. In config.json.",
            "rope_scaling.high_freq_factor: is true, needs a number above 0. In config.json.",
        ],
    ),
    Fails(
        id="rope-frequencies-crossed",
        keys={"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}},
        texts=[
            "rope_scaling.high_freq_factor: is 4, needs more than 4 (low_freq_factor). In "
            "config.json."
        ],
    ),
    Fails(
        id="rope-type-and-rope-type",
        keys={"rope_scaling": {**YARN, "rope_type": "linear"}},
        texts=[
            'rope_scaling.type: is "yarn", needs to equal rope_type, "linear", or to be left out. '
            "In config.json."
        ],
    ),
    Fails(
        id="rope-theta-twice",
        keys={"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
        texts=[
            "rope_parameters.rope_theta: is 10000, needs 500000 (the file's other rope_theta). In "
            "config.json."
        ],
    ),
    Fails(
        id="rope-by-layer-type",
        keys={"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
        texts=[
            'rope_parameters.full_attention: is {"rope_theta": 1.0}, needs a number (one rotation '
            "for all layers). In config.json."
        ],
    ),
    Fails(
        id="rope-both-spellings",
        keys={
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"type": "linear", "factor": 3},
        },
        texts=[
            'rope_scaling: is {"type": "linear", "factor": 2}, needs to equal rope_parameters, '
            '{"type": "linear", "factor": 3}, or to be left out. In config.json.'
        ],
    ),
    Fails(
        id="rope-not-an-object",
        keys={"rope_scaling": 2.0},
        texts=["rope_scaling: is 2.0, needs an object or null. In config.json."],
    ),
    Fails(
        id="rope-dynamic-of-two",
        keys={"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        texts=[
            'rope_scaling.rope_type: is "dynamic", needs heads of more than 2 rotated elements. In '
            "config.json."
        ],
    ),
    Fails(
        id="longrope-lists",
        family="phi3",
        keys={
            "rope_scaling": {**LONGROPE, "short_factor": [1.0, 2.0], "long_factor": [1, 2, 3, "4"]}
        },
        texts=[
            "rope_scaling.short_factor: has 2 numbers, needs 4 (one for each pair of the 8 rotated "
            "elements of a head). In config.json.",
            'rope_scaling.long_factor: is [1, 2, 3, "4"], needs a list of numbers above 0. In '
            "config.json.",
        ],
    ),
    Fails(
        id="longrope-original-length-of-phi3",
        family="phi3",
        keys={"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16}},
        texts=[
            "rope_scaling.original_max_position_embeddings: is 16, needs 4096 (phi3 reads "
            "original_max_position_embeddings at the top of the file, where a missing one means "
            '4096). In config.json. Try: "original_max_position_embeddings": 16 at the top of the '
            "file."
        ],
    ),
    Fails(
        id="original-length-twice",
        keys={"original_max_position_embeddings": 32, "rope_scaling": YARN},
        texts=[
            "rope_scaling.original_max_position_embeddings: is 16, needs 32 (the file's other "
            "original_max_position_embeddings). In config.json."
        ],
    ),
    Fails(
        id="partial-rotary-of-another-family",
        keys={"partial_rotary_factor": 0.5},
        texts=[
            "partial_rotary_factor: is 0.5, needs 1 (llama rotates whole heads). In config.json."
        ],
    ),
    Fails(
        id="partial-rotary-too-large",
        family="phi3",
        keys={"partial_rotary_factor": 1.5},
        texts=["partial_rotary_factor: is 1.5, needs at most 1. In config.json."],
    ),
    Fails(
        id="partial-rotary-odd",
        family="phi3",
        keys={"partial_rotary_factor": 0.4},
        texts=[
            "head_dim: leaves 3 = 8 * 0.4 elements to rotate, needs an even number above 0. In "
            "config.json."
        ],
    ),
    Fails(
        id="window",
        family="mistral",
        keys={"num_key_value_heads": 2, "sliding_window": 0},
        texts=["sliding_window: is 0, needs an int of at least 1. In config.json."],
    ),
    Fails(
        id="layer-types-names",
        family="qwen3",
        keys={**WINDOW, "layer_types": ["full_attention", "chunked_attention"]},
        texts=[
            'layer_types: is ["full_attention", "chunked_attention"], needs a list of: '
            "full_attention, sliding_attention. In config.json."
        ],
    ),
    Fails(
        id="layer-types-length",
        family="qwen2",
        keys={**WINDOW, "layer_types": ["full_attention"]},
        texts=["layer_types: has 1 entries, needs 2 (num_hidden_layers). In config.json."],
    ),
    Fails(
        id="layer-types-without-window",
        family="qwen2",
        keys={**QWEN, "layer_types": ["full_attention", "sliding_attention"]},
        texts=[
            "layer_types: has sliding_attention for layer 1, needs full_attention (the model has "
            "no sliding window). In config.json."
        ],
    ),
    Fails(
        id="layer-types-unread",
        family="mistral",
        keys={**QWEN, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        texts=[
            "layer_types: has full_attention for layer 1, needs sliding_attention (mistral has "
            "sliding_window 4 in every layer). In config.json."
        ],
    ),
    Fails(
        id="experts-of-a-token",
        family="mixtral",
        keys={"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 5},
        texts=["num_experts_per_tok: is 5, needs at most 4 (all experts). In config.json."],
    ),
    Fails(
        id="experts-twice",
        family="qwen3_moe",
        keys={**QWEN, "num_experts": 16, "num_local_experts": 8},
        texts=["num_experts: is 16, needs 8 (num_local_experts, the same number). In config.json."],
    ),
    Fails(
        id="experts-values",
        family="qwen3_moe",
        keys={
            **QWEN,
            "num_experts": "8",
            "moe_intermediate_size": 0,
            "decoder_sparse_step": 0,
            "mlp_only_layers": 1,
            "norm_topk_prob": None,
        },
        texts=[
            'num_experts: is "8", needs an int of at least 1. In config.json.',
            "decoder_sparse_step: is 0, needs an int of at least 1. In config.json.",
            "mlp_only_layers: is 1, needs a list of ints of at least 0. In config.json.",
            "moe_intermediate_size: is 0, needs an int of at least 1. In config.json.",
            "norm_topk_prob: is null, needs true or false. In config.json.",
        ],
    ),
    Fails(
        id="experts-layers",
        family="qwen3_moe",
        keys={**QWEN, "mlp_only_layers": [0, 2]},
        texts=["mlp_only_layers: has 2, needs 0 to 1 (num_hidden_layers). In config.json."],
    ),
]


@pytest.mark.parametrize("case", BAD_CONFIGS, ids=[case.id for case in BAD_CONFIGS])
def test_problems(case: Fails) -> None:
    raw = {"model_type": case.family, **COMMON, **case.keys}
    raw = {key: value for key, value in raw.items() if value is not ...}
    with pytest.raises(PlanError) as caught:
        parse_config(raw)
    assert [str(problem) for problem in caught.value.problems] == case.texts
    assert all(isinstance(problem, ConfigError) for problem in caught.value.problems)
    head = f"config.json has {len(case.texts)} problems:"
    one = len(case.texts) == 1
    assert str(caught.value) == (case.texts[0] if one else "\n  ".join([head, *case.texts]))


def test_the_file_s_name() -> None:
    with pytest.raises(PlanError, match=r"In model/config\.json\."):
        parse_config({}, file="model/config.json")


def test_not_an_object() -> None:
    with pytest.raises(PlanError) as caught:
        parse_config([1, 2])  # type: ignore[arg-type]
    assert str(caught.value) == "config.json: is [1, 2], needs an object."
