"""Tiny models of every family, described as config.json does; transformers is the oracle.

Sizes are odd on purpose: 3 or 6 heads, a head size that is not hidden_size / heads, a vocabulary
that no rank count divides.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lading import ranks as ranks_module
from lading.models import FAMILIES, CausalLM, parse_config
from lading.nn import check_loaded
from lading.ranks import Ranks

COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 66,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ORACLES: dict[str, tuple[Any, Any]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A config.json, beside COMMON, and the length of the sequence to run."""

    id: str
    family: str
    keys: dict[str, Any]
    seq_len: int = 19

    def raw(self) -> dict[str, Any]:
        """The whole config.json, the caller's to change."""
        return copy.deepcopy({"model_type": self.family, **COMMON, **self.keys})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5],
    "long_factor": [1.0, 2.0, 4.0, 8.5],
    "rope_theta": 5000.0,
}
LLAMA = {"num_key_value_heads": 2, "head_dim": 10}
CASES = [
    Case(id="llama", family="llama", keys=LLAMA),
    Case(
        id="llama3-scaling",
        family="llama",
        keys={**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    Case(
        id="llama-biases-tied",
        family="llama",
        keys={
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        id="llama-linear",
        family="llama",
        keys={**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    ),
    Case(
        id="llama-dynamic",
        family="llama",
        keys={
            **LLAMA,
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    Case(
        id="mistral-window", family="mistral", keys={"num_key_value_heads": 3, "sliding_window": 5}
    ),
    Case(
        id="mistral-no-window",
        family="mistral",
        keys={"num_key_value_heads": 6, "head_dim": 12, "sliding_window": None},
    ),
    Case(
        id="qwen2-tied",
        family="qwen2",
        keys={"num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    Case(
        id="qwen2-window-yarn",
        family="qwen2",
        keys={
            "num_key_value_heads": 3,
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "rope_theta": 1000000.0,
            "rope_scaling": YARN,
        },
    ),
    Case(
        id="qwen3",
        family="qwen3",
        keys={"num_key_value_heads": 2, "head_dim": 20, "tie_word_embeddings": True},
    ),
    Case(
        id="qwen3-biases-layer-types",
        family="qwen3",
        keys={
            "num_key_value_heads": 6,
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Case(
        id="phi3-partial-window",
        family="phi3",
        keys={"num_key_value_heads": 2, "partial_rotary_factor": 0.5, "sliding_window": 6},
    ),
    Case(
        id="phi3-longrope-short",
        family="phi3",
        keys={
            "num_key_value_heads": 3,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE,
        },
        seq_len=16,
    ),
    Case(
        id="phi3-longrope-long",
        family="phi3",
        keys={
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 16,
            "rope_theta": 5000.0,
            "rope_scaling": {**LONGROPE, "rope_type": "su", "original_max_position_embeddings": 16},
        },
        seq_len=17,
    ),
    Case(
        id="qwen3-moe",
        family="qwen3_moe",
        keys={
            "num_key_value_heads": 2,
            "head_dim": 10,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 18,
            "norm_topk_prob": True,
        },
    ),
    Case(
        id="qwen3-moe-some-layers",
        family="qwen3_moe",
        keys={
            "num_hidden_layers": 4,
            "num_key_value_heads": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    Case(
        id="mixtral",
        family="mixtral",
        keys={"num_key_value_heads": 2, "num_local_experts": 3, "sliding_window": 6},
    ),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def oracle(case: Case) -> Any:
    """The model of transformers with random weights, large enough that each of them matters."""
    config_class, model_class = ORACLES[case.family]
    keys = {key: value for key, value in case.raw().items() if key != "model_type"}
    model = model_class._from_config(
        config_class(**keys), attn_implementation="eager", experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            shift = 1.0 if param.dim() == 1 else 0.0
            param.copy_(torch.randn(param.shape, generator=generator) * 0.2 + shift)
    return model.eval()


def stored(model: Any) -> dict[str, torch.Tensor]:
    """What transformers saves of its model: experts one by one, as they are on the hub."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def fill(model: CausalLM, checkpoint: Mapping[str, torch.Tensor]) -> None:
    """Loads a state dict as engines do: one weight_loader call for each tensor."""
    params = dict(model.named_parameters(remove_duplicate=False))
    fused = {
        part: (module, index)
        for module, parts in model.packed_modules_mapping.items()
        for index, part in enumerate(parts)
    }
    for name, tensor in checkpoint.items():
        path, _, leaf = name.rpartition(".")
        head, _, last = path.rpartition(".")
        if last not in fused:
            params[name].weight_loader(params[name], tensor)
            continue
        module, index = fused[last]
        param = params[f"{head}.{module}.{leaf}"]
        param.weight_loader(param, tensor, param.tp_layout.part_names[index])
    check_loaded(model)


def loaded(case: Case, checkpoint: Mapping[str, torch.Tensor], ranks: Ranks) -> CausalLM:
    """Our model of one rank with the oracle's weights."""
    model = CausalLM(parse_config(case.raw()), ranks=ranks, dtype=torch.float32)
    fill(model, checkpoint)
    return model


def ids(case: Case) -> torch.Tensor:
    """[2, S] token ids, the last of the vocabulary among them."""
    found = torch.randint(0, 101, (2, case.seq_len), generator=torch.Generator().manual_seed(1))
    found[0, 0] = 100
    return found


class Together:
    """Ranks as threads of one process: collectives that meet at a barrier."""

    def __init__(self, tp_size: int) -> None:
        self.barrier = threading.Barrier(tp_size, timeout=60)
        self.slots: list[torch.Tensor] = [torch.empty(0)] * tp_size

    def everyone(self, tensor: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
        """Every rank's tensor, in rank order."""
        self.slots[ranks.tp_rank] = tensor.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def all_reduce(self, tensor: torch.Tensor, ranks: Ranks, group: object) -> torch.Tensor:
        """The sum."""
        return torch.stack(self.everyone(tensor, ranks)).sum(0)

    def all_gather(self, tensor: torch.Tensor, ranks: Ranks, group: object) -> torch.Tensor:
        """Side by side."""
        return torch.cat(self.everyone(tensor, ranks), dim=-1)


def logits_of_ranks(
    models: list[CausalLM],
    input_ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    together: Together | None = None,
) -> list[torch.Tensor]:
    """Every rank's logits, all ranks running at once."""
    together = together or Together(len(models))
    monkeypatch.setattr(ranks_module, "all_reduce", together.all_reduce)
    monkeypatch.setattr(ranks_module, "all_gather", together.all_gather)
    found: dict[int, torch.Tensor] = {}

    def run(rank: int) -> None:
        with torch.no_grad():
            found[rank] = models[rank](input_ids)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(len(models))]


assert set(ORACLES) == set(FAMILIES), "every family has an oracle"
