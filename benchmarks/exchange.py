"""Row cuts over gloo on the CPU: each rank reads its own columns, or bands that are exchanged.

    python benchmarks/exchange.py [--tp 2] [--tensors 8] [--rows 4096] [--columns 6144]

Prints, for a file in the page cache, the median of 5 loads, alternating, slowest rank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lading import ranks as ranks_module
from lading.checkpoint import open_checkpoint
from lading.launch import run_ranks
from lading.layers import Layer
from lading.plan import Target, make_plan
from lading.ranks import Ranks
from lading.specs import dense_specs
from lading.transport import Transport

REPEATS = 5


def loads(ranks: Ranks, folder: str) -> dict[bool, list[tuple[float, int]]]:
    """Seconds and bytes read of each load, without and with an exchange."""
    group = ranks_module.group_of(ranks, None)
    checkpoint = open_checkpoint(folder)
    (weight,) = dense_specs(bias=False)
    targets = [
        Target(
            name=name,
            layout=Layer.row(source.shape[1], source.shape[0]).layout(weight, ranks.tp_size),
            dtype="BF16",
        )
        for name, source in checkpoint.tensors.items()
    ]
    plan = make_plan(targets, checkpoint.tensors, ranks=[ranks])
    memory = {t.name: torch.zeros(t.layout.local_shape, dtype=torch.bfloat16) for t in targets}
    found: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
    for _ in range(REPEATS):
        for exchange in found:
            with checkpoint.reader() as reader:
                transport = Transport(
                    reader=reader, num_local=ranks.tp_size, group=group, exchange=exchange
                )
                ranks_module.exchange(None, group)
                began = time.perf_counter()
                moved = transport.run(plan, plan.share(ranks), memory, lambda _: None)
                ranks_module.exchange(None, group)
                found[exchange].append((time.perf_counter() - began, moved.read_bytes))
    return found


def main() -> None:
    """Makes the checkpoint, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("tp", 2), ("tensors", 8), ("rows", 4096), ("columns", 6144)):
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = (asked.rows, asked.columns)
        tensors = {f"l{i}.weight": torch.randn(shape).bfloat16() for i in range(asked.tensors)}
        save_file(tensors, Path(folder) / "model.safetensors")
        size = sum(tensor.nbytes for tensor in tensors.values())
        del tensors
        found = run_ranks(loads, asked.tp, (folder,))
    for exchange in (False, True):
        runs = zip(*(ranks[exchange] for ranks in found), strict=True)
        seconds = statistics.median(max(one for one, _ in run) for run in runs)
        read = sum(ranks[exchange][0][1] for ranks in found)
        name = "exchanged" if exchange else "each its own"
        print(f"{name:12} {size / seconds / 1e9:.3g} GB/s, read {read / size:.3g} x the checkpoint")


if __name__ == "__main__":
    main()
