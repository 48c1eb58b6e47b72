"""Checks loading and forward passes on CUDA with NCCL; needs one GPU for each rank.

    torchrun --nproc-per-node 2 checks/gpu.py [FOLDER ...]

Makes a small Llama-shaped checkpoint, loads it on the GPUs and on the CPU, and compares every
element of every parameter, and the logits with those of one rank on the CPU. Each FOLDER (a
checkpoint, for instance a quantised one) is loaded and decoded on both and compared in the same
way. Exits 1 where anything differs.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import lading
from lading.demo import write_checkpoint
from lading.nn import ParallelLayer
from lading.pretrained import load_pretrained
from lading.ranks import Ranks

LOGIT_TOLERANCE = 1e-4


def compare(folder: Path, ranks: Ranks, device: torch.device) -> list[str]:
    """What differs between the GPU and the CPU."""
    model, report = load_pretrained(folder, ranks=ranks, device=device, dtype=torch.float32)
    # The CPU's copy of this rank's share is loaded alone: the group belongs to the GPUs.
    alone = lading.ranks.group_of
    lading.ranks.group_of = lambda ranks, group: None
    try:
        twin, _ = load_pretrained(folder, ranks=ranks, device="cpu", dtype=torch.float32)
        single, _ = load_pretrained(folder, ranks=Ranks(), device="cpu", dtype=torch.float32)
    finally:
        lading.ranks.group_of = alone
    wrong = []
    for (name, one), (_, two) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        if one.device.type != "cuda":
            wrong.append(f"{name} is on {one.device}")
        if not torch.equal(one.detach().cpu().view(torch.uint8), two.detach().view(torch.uint8)):
            wrong.append(f"{name} differs")
    for (name, one), (_, two) in zip(model.named_modules(), twin.named_modules(), strict=True):
        if not isinstance(one, ParallelLayer) or one.quant is None:
            continue
        if not torch.equal(one.dequantized_weight().cpu(), two.dequantized_weight()):
            wrong.append(f"{name} decodes differently")
    ids = torch.arange(26).reshape(2, 13)
    with torch.no_grad():
        found, needed = model(ids.to(device)).cpu(), single(ids)
    distance = float((found - needed).abs().max() / needed.abs().max())
    if distance > LOGIT_TOLERANCE:
        wrong.append(f"logits differ by {distance:.2g} of their scale")
    if ranks.tp_rank == 0:
        print(f"{folder.name}: {report}, logits within {distance:.1e}", flush=True)
    return wrong


def main() -> int:
    """0 where everything is equal."""
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    ranks = lading.ranks.current()
    with tempfile.TemporaryDirectory() as name:
        names = [name if ranks.tp_rank == 0 else None]
        dist.broadcast_object_list(names)
        made = Path(str(names[0])) / "made"
        if ranks.tp_rank == 0:
            made.mkdir()
            write_checkpoint(str(made))
        dist.barrier()
        wrong = []
        for folder in [made, *map(Path, sys.argv[1:])]:
            wrong += [f"{folder.name}: {text}" for text in compare(folder, ranks, device)]
        dist.barrier()
    for text in wrong:
        print(f"rank {ranks.tp_rank}: {text}", flush=True)
    total = torch.tensor([len(wrong)], device=device)
    dist.all_reduce(total)
    dist.destroy_process_group()
    if ranks.tp_rank == 0:
        print("equal" if not int(total) else f"{int(total)} differences", flush=True)
    return 1 if int(total) else 0


if __name__ == "__main__":
    sys.exit(main())
