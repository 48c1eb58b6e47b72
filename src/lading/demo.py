"""`lading demo`: a small checkpoint is made, planned, loaded on two ranks and verified.

The checkpoint is Llama-shaped with grouped-query attention and random weights, written by the
safetensors library, as a folder that `lading` and transformers load like any other:

    3 layers, hidden size 96, 6 q heads and 2 KV heads of 16, intermediate size 160, vocabulary 101

Nothing is printed here: `run` yields what there is to say as it happens.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lading import launch, report
from lading.checkpoint import write_json
from lading.errors import CallError
from lading.preflight import Preflight, preflight
from lading.ranks import all_ranks
from lading.report import Block, Line, Look

if TYPE_CHECKING:
    import torch

    from lading.verify import RankCheck

__all__ = ["Demo", "run", "write_checkpoint"]

TP_SIZE = 2

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 101,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

Say = Callable[[tuple[Block, ...]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demo found out."""

    folder: str
    preflight: Preflight
    checks: tuple[RankCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether everything is where it belongs."""
        return all(one.elements.first is None and one.logits.ok for one in self.checks)


def run(say: Say, look: Look, *, keep: str | None = None) -> Demo:
    """Makes, plans, loads and verifies; `say` is told each step when it is done.

    keep   a folder for the checkpoint, which must be new or empty; by default it is removed
    """
    launch.warm_up(TP_SIZE)
    if keep is not None:
        if os.path.lexists(keep) and (not os.path.isdir(keep) or os.listdir(keep)):
            raise CallError("is not empty, needs a new or empty folder", subject=keep)
        os.makedirs(keep, exist_ok=True)
        return _run(say, look, keep)
    with tempfile.TemporaryDirectory(prefix="lading-demo-") as folder:
        return _run(say, look, folder)


def _run(say: Say, look: Look, folder: str) -> Demo:
    num_tensors, num_bytes = write_checkpoint(folder)
    facts = CONFIG
    say(
        (
            Line(text="lading demo", style="bold"),
            Line(text=""),
            Line(text="1  A checkpoint is made", style="bold"),
            Line(
                text=f"   Llama-shaped, random weights: {facts['num_hidden_layers']} layers, "
                f"{facts['num_attention_heads']} heads of {facts['head_dim']} that share "
                f"{facts['num_key_value_heads']} KV heads,"
            ),
            Line(
                text=f"   vocabulary {facts['vocab_size']}; {num_tensors} tensors in 2 files, "
                f"bf16, {report.spell_bytes(num_bytes)}"
            ),
            Line(text=""),
        )
    )
    ahead = preflight(folder, all_ranks(TP_SIZE))
    say(
        (
            Line(text="2  The load is planned, from the files' headers alone", style="bold"),
            *report.indented(report.proof_block(ahead.plan)),
            Line(text=""),
            Line(text="3  Where everything goes", style="bold"),
            Line(text=""),
            *report.indented((report.where(ahead.plan, look=look),)),
            *report.indented(report.notes(ahead.plan)),
            Line(text=""),
            Line(text=f"4  {TP_SIZE} processes load it, each its own share", style="bold"),
        )
    )
    from lading.verify import verify_rank

    # One call does both steps: the processes that loaded are those that compare what they hold.
    args = (folder, None, "cpu", None)
    checks = tuple(launch.run_ranks(verify_rank, TP_SIZE, args, device="cpu"))
    loads = [one.load for one in checks]
    say(
        (
            *report.indented(report.load_report(loads)),
            Line(text=""),
            Line(text="5  What they hold is compared with other readers", style="bold"),
            *report.indented(
                report.checks_report([one.elements for one in checks], checks[0].logits)
            ),
        )
    )
    return Demo(folder=folder, preflight=ahead, checks=checks)


def write_checkpoint(folder: str, *, seed: int = 0, **changes: Any) -> tuple[int, int]:
    """A Llama-shaped checkpoint in two files with an index; (number of tensors, their bytes).

    changes   other values for keys of CONFIG
    """
    import torch
    from safetensors.torch import save_file

    config = {**CONFIG, **changes}
    random = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config["dtype"]]
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in _shapes(config).items():
        values = torch.randn(shape, generator=random)
        values = 1 + values / 8 if len(shape) == 1 else values / shape[-1] ** 0.5
        tensors[name] = values.to(dtype)
    names = list(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for file, half in zip(files, halves, strict=True):
        path = os.path.join(folder, file)
        save_file({name: tensors[name] for name in half}, path, metadata={"format": "pt"})
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    write_json(os.path.join(folder, "model.safetensors.index.json"), index)
    write_json(os.path.join(folder, "config.json"), config)
    return len(tensors), num_bytes


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors as Hugging Face stores them: q, k, v and gate, up apart, [outputs, inputs]."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_size, kv_size = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        path = f"model.layers.{layer}"
        shapes |= {
            f"{path}.input_layernorm.weight": (hidden,),
            f"{path}.self_attn.q_proj.weight": (q_size, hidden),
            f"{path}.self_attn.k_proj.weight": (kv_size, hidden),
            f"{path}.self_attn.v_proj.weight": (kv_size, hidden),
            f"{path}.self_attn.o_proj.weight": (hidden, q_size),
            f"{path}.post_attention_layernorm.weight": (hidden,),
            f"{path}.mlp.gate_proj.weight": (inner, hidden),
            f"{path}.mlp.up_proj.weight": (inner, hidden),
            f"{path}.mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes
