"""Small quantised checkpoints, made of random bits, and what ranks load of them.

Whole models have the names and sizes of SIZES; single layers are any `Layer`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lading.checkpoint import open_checkpoint
from lading.layers import Layer
from lading.loading import load
from lading.models import build_layer
from lading.names import Names
from lading.nn import ParallelLayer
from lading.ranks import Ranks, all_ranks
from lading.schemes import QuantConfig, Straddle
from lading.schemes.base import Quantization

Tensors = dict[str, torch.Tensor]

MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LINEARS = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.k_proj": (32, 64),
    "model.layers.0.self_attn.v_proj": (32, 64),
    "model.layers.0.self_attn.o_proj": (64, 64),
    "model.layers.0.mlp.gate_proj": (128, 64),
    "model.layers.0.mlp.up_proj": (128, 64),
    "model.layers.0.mlp.down_proj": (64, 128),
}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "static"}


def bits(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Any bits."""
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, shape, dtype=torch.int64).to(dtype)


def fp8(*shape: int) -> torch.Tensor:
    """Any finite values."""
    return torch.randn(shape).to(torch.float8_e4m3fn)


def gptq(outputs: int, inputs: int, group: int = 16, width: int = 4) -> Tensors:
    """The tensors of a GPTQ module."""
    return {
        "qweight": bits(inputs * width // 32, outputs),
        "qzeros": bits(inputs // group, outputs * width // 32),
        "scales": torch.rand(inputs // group, outputs).half(),
        "g_idx": (torch.arange(inputs) // group).int(),
    }


def fp8_static(outputs: int, inputs: int) -> Tensors:
    """The tensors of an AutoFP8 module."""
    return {
        "weight": fp8(outputs, inputs),
        "weight_scale": torch.rand(()),
        "input_scale": torch.rand(()),
    }


def model_tensors(make: Callable[[int, int], Tensors]) -> Tensors:
    """A whole model: `make` gives the tensors of each linear layer but the head."""
    hidden, vocab = MODEL["hidden_size"], MODEL["vocab_size"]
    tensors = {
        f"{module}.{leaf}": tensor
        for module, size in LINEARS.items()
        for leaf, tensor in make(*size).items()
    }
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = torch.randn(vocab, hidden).bfloat16()
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = torch.randn(hidden).bfloat16()
    return tensors


def write_model(folder: Path, tensors: Tensors, quantization: Mapping[str, Any] | None) -> Path:
    """A checkpoint folder."""
    config = MODEL | ({"quantization_config": dict(quantization)} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return folder


def load_layer(
    folder: Path,
    prefix: str,
    layer: Layer,
    tensors: Tensors,
    quantization: Quantization,
    tp_size: int,
    *,
    names: Names | None = None,
    straddle: Straddle = Straddle.DUPLICATE,
    head: bool = False,
) -> list[ParallelLayer]:
    """One layer, written to a file, as each rank has loaded it."""
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    names = names or Names()
    checkpoint = open_checkpoint(folder)
    config = QuantConfig(quantization, checkpoint.tensors, names, straddle=straddle)
    return [
        _load_layer(folder, prefix, layer, config, ranks, names, head)
        for ranks in all_ranks(tp_size)
    ]


def _load_layer(
    folder: Path,
    prefix: str,
    layer: Layer,
    config: QuantConfig,
    ranks: Ranks,
    names: Names,
    head: bool,
) -> ParallelLayer:
    module = build_layer(
        layer,
        prefix=prefix,
        ranks=ranks,
        group=None,
        dtype=torch.float32,
        quant_config=config,
        head=head,
    )
    model = nn.Module()
    model.add_module(prefix, module)
    load(model, folder, ranks=ranks, names=names)
    return module


def decoded(layers: list[ParallelLayer]) -> dict[Any, torch.Tensor]:
    """Part → its full weight, put together from what all ranks decode; replicas are compared."""
    layer = layers[0].layer
    whole = {}
    for part in layer.output.parts:
        found = [one.dequantized_part(part.name) for one in layers]
        if layer.kind.value == "row":
            whole[part.name] = torch.cat(found, 1)
            continue
        step = len(layers) // part.pieces(len(layers))
        whole[part.name] = torch.cat(found[::step])
        assert all(torch.equal(one, found[i // step * step]) for i, one in enumerate(found))
    return whole
