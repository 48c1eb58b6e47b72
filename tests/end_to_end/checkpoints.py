"""Checkpoints made with transformers, random weights, odd sizes; cached for the test session."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from .inputs import input_ids

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"head_dim": 12}),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {"sliding_window": 7, "head_dim": 12},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 12}),
    "phi3": (
        transformers.Phi3Config,
        transformers.Phi3ForCausalLM,
        {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    ),
}


@functools.cache
def checkpoint(
    family: str, *, tied: bool = False, files: int = 1, heads: int = 8, kv_heads: int = 2
) -> Path:
    """The folder of a small checkpoint, and its logits on `input_ids()` in logits.pt."""
    config_class, model_class, extra = FAMILIES[family]
    torch.manual_seed(7)
    config = config_class(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=88,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **extra,
    )
    model = model_class(config).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases and norms too: transformers starts them at 0, 1
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.dim() == 1) * 0.5)
    folder = Path(tempfile.mkdtemp(prefix=f"lading-{family}-"))
    size = sum(p.numel() * 4 for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, max_shard_size=size // files + 1 if files > 1 else "1GB")
    with torch.no_grad():
        torch.save(model(input_ids()).logits, folder / "logits.pt")
    return folder
