"""A live model from TP 1 to one rank a process: by routes, and as is usually done, where everyone
gets each whole tensor (a broadcast) and keeps its share.

    torchrun --nproc-per-node 2 benchmarks/reshard.py [--layers 8] [--hidden 4096] [--repeats 3]

Weights are random, on GPUs over NCCL where there is one for each process, else on CPUs over gloo.
The time is the slowest process', from memory to memory; the target model exists already.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lading import models, reshard
from lading import ranks as ranks_module
from lading.ranks import Ranks
from lading.targeting import state_of
from lading.writing import view_of

VOCABULARY = 32_000


def config(hidden: int, layers: int) -> models.ModelConfig:
    """A Llama with 8 KV heads."""
    return models.parse_config(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "intermediate_size": hidden * 7 // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "bfloat16",
        }
    )


def build(settings: models.ModelConfig, ranks: Ranks, device: torch.device) -> nn.Module:
    """A model of random weights."""
    with device:
        model = models.CausalLM(settings, ranks=ranks, group=None, dtype=torch.bfloat16)
    for _, tensor in state_of(model):
        tensor.detach().normal_()
    return model


def by_broadcast(
    source: nn.Module | None, target: nn.Module, ranks: Ranks, whole: nn.Module
) -> None:
    """Each parameter whole to everyone, one after the other; each keeps its parts' shares."""
    params = dict(state_of(source)) if source is not None else {}
    kept: dict[str, Any] = dict(state_of(target))
    shapes: dict[str, Any] = dict(state_of(whole))
    for name, shaped in shapes.items():
        tensor = (
            params[name].detach()
            if source is not None
            else torch.empty_like(shaped, device=kept[name].device)
        )
        dist.broadcast(tensor, 0)
        layout, full = kept[name].tp_layout, shaped.tp_layout
        for part in layout.part_names:
            place, whole_place = layout.place(part, ranks.tp_rank), full.place(part, 0)
            if place is not None and whole_place is not None:
                values = view_of(view_of(tensor, whole_place.target), place.source)
                view_of(kept[name].detach(), place.target).copy_(values)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the slowest process."""
    dist.barrier()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    spent = torch.tensor(time.perf_counter() - began, device=device)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return float(spent)


def main() -> None:
    """Prints one line for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    ranks_module.join_world(device_type="cuda" if on_gpu else "cpu")
    ranks = ranks_module.world()
    device = torch.device("cuda", ranks.tp_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    settings = config(args.hidden, args.layers)
    source = build(settings, Ranks(), device) if ranks.tp_rank == 0 else None
    whole = build_shapes(settings)
    targets = {way: build(settings, ranks, device) for way in ("reshard", "broadcast")}
    ways: dict[str, Callable[[], object]] = {
        "reshard": lambda: reshard(source, targets["reshard"], target_ranks=ranks),
        "broadcast": lambda: by_broadcast(source, targets["broadcast"], ranks, whole),
    }
    found = {
        way: min(seconds(work, device) for _ in range(args.repeats)) for way, work in ways.items()
    }
    one, two = (dict[str, Any](state_of(targets[way])) for way in ("reshard", "broadcast"))
    same = all(
        torch.equal(tensor, two[name])
        for name, tensor in one.items()
        if tensor.tp_layout.padding(ranks.tp_rank) == ()
    )
    assert same, "both ways give the same weights"
    if ranks.tp_rank == 0:
        size = sum(tensor.numel() * 2 for _, tensor in state_of(whole))
        for way, spent in found.items():
            rate = size / 1e9 / spent
            print(f"{way:10} {size / 1e9:.3g} GB in {spent:.3g} s, {rate:.3g} GB/s ({device.type})")
    ranks_module.leave_world()


def build_shapes(settings: models.ModelConfig) -> nn.Module:
    """The whole model without memory."""
    with torch.device("meta"):
        return models.CausalLM(settings, ranks=Ranks(), group=None, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
