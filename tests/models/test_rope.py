"""Frequencies and scalings of every kind against transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lading.errors import ConfigError
from lading.models import RopeConfig, parse_config
from lading.models.rope import inverse_frequencies, rotate, tables

from .made import ORACLES

SIZES: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FACTORS = {
    "short_factor": [1 + i / 8 for i in range(32)],
    "long_factor": [1 + i for i in range(32)],
}
LONG = {"rope_type": "longrope", **FACTORS}
LENGTHS = {"max_position_embeddings": 131072}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {"rope_theta": 500000.0}),
    "default-untold": ("qwen2", {}),
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "llama3": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3, **LENGTHS}),
    "llama3-32": (
        "llama",
        {"rope_parameters": {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0}, **LENGTHS},
    ),
    "yarn": ("qwen2", {"rope_theta": 1000000.0, "rope_scaling": YARN, **LENGTHS}),
    "yarn-attention": (
        "qwen3",
        {"head_dim": 64, "rope_scaling": {**YARN, "attention_factor": 0.7}},
    ),
    "yarn-mscale": (
        "llama",
        {"rope_scaling": {**YARN, "factor": 40, "mscale": 0.8, "mscale_all_dim": 1.5}},
    ),
    "yarn-betas": (
        "llama",
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    ),
    "yarn-one-index": (
        "llama",
        {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 4, "truncate": False}},
    ),
    "longrope": ("phi3", {"rope_scaling": LONG, **LENGTHS}),
    "longrope-factor": ("phi3", {"rope_scaling": {**LONG, "factor": 8.0}, **LENGTHS}),
    "longrope-attention": ("phi3", {"rope_scaling": {**LONG, "attention_factor": 1.25}, **LENGTHS}),
    "longrope-llama": (
        "llama",
        {"rope_scaling": {**LONG, "original_max_position_embeddings": 4096}, **LENGTHS},
    ),
    "longrope-partial": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 24,
                "long_factor": [3.0] * 24,
            },
            **LENGTHS,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seq_len", [None, 100, 4096, 4097, 200000])
def test_frequencies(name: str, seq_len: int | None) -> None:
    family, keys = CASES[name]
    config = ORACLES[family][0](**SIZES, **copy.deepcopy(keys))
    rope = parse_config({"model_type": family, **SIZES, **keys}).rope
    frequencies, scaling = inverse_frequencies(rope, seq_len=seq_len)
    if rope.kind == "default":
        expected, factor = _plain(config), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, "cpu", seq_len=seq_len)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected, rtol=1e-6, atol=0)
    assert scaling == pytest.approx(factor, rel=1e-12)


def _plain(config: Any) -> torch.Tensor:
    model = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    found, _ = model.compute_default_rope_parameters(config)
    assert isinstance(found, torch.Tensor)
    return found


def test_the_docstring_example() -> None:
    rope = RopeConfig(kind="linear", rotary_dim=4, max_position=8, factor=2.0)
    frequencies, scaling = inverse_frequencies(rope)
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.005]))
    assert scaling == 1.0


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError) as caught:
        inverse_frequencies(RopeConfig(kind="axial", rotary_dim=4, max_position=8))
    assert str(caught.value) == (
        'rope_type: is "axial", needs one of: default, linear, dynamic, llama3, yarn, longrope.'
    )


def test_rotation_keeps_lengths_and_angles_between_places() -> None:
    """The dot product of two turned heads depends on the distance of their places alone."""
    rope = RopeConfig(rotary_dim=6, max_position=64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).unbind()
    frequencies, scaling = inverse_frequencies(rope)

    def turned(x: torch.Tensor, place: int) -> torch.Tensor:
        cos, sin = tables(torch.tensor([[place]]), frequencies, scaling, torch.float64)
        return rotate(x, cos, sin)

    dots = [float((turned(q, p) * turned(k, p + 5)).sum()) for p in (0, 3, 11)]
    assert dots == pytest.approx([dots[0]] * 3, rel=1e-5)
    assert torch.equal(turned(q, 3)[..., 6:], q[..., 6:])
    assert torch.equal(turned(q, 0), q)
