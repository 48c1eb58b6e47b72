"""Checks the parameter classes on a device whose views are lazy: torch_xla's CPU.

    pip install torch==2.9.0 torch_xla==2.9.0      (a release of torch_xla needs its own torch)
    PJRT_DEVICE=CPU python checks/xla.py

Loads column, row, merged and QKV parameters on the XLA device as every rank of 4, through their own
`weight_loader`, and compares each element with the CPU. Exits 1 where anything differs.
"""

from __future__ import annotations

import sys

import torch
import torch_xla

from lading.parameter import ModelWeightParameter
from lading.ranks import all_ranks, as_current


def loader(
    param: ModelWeightParameter, loaded: torch.Tensor, call: str, **keywords: object
) -> None:
    """What an engine's layer does: one load call."""
    getattr(param, call)(loaded, **keywords)


def main() -> int:
    """0 where everything is equal."""
    device = torch_xla.device()
    full = torch.arange(96.0).reshape(16, 6)
    wide = torch.arange(96.0).reshape(4, 24)
    wrong = 0
    for ranks in all_ranks(4):
        r = ranks.tp_rank
        with as_current(ranks):
            for call, source, shape, keywords, needed in (
                ("load_column_parallel_weight", full, (4, 6), {}, full[4 * r : 4 * r + 4]),
                ("load_row_parallel_weight", wide, (4, 6), {}, wide[:, 6 * r : 6 * r + 6]),
                (
                    "load_merged_column_weight",
                    full,
                    (4, 6),
                    {"shard_id": 0, "shard_offset": 0, "shard_size": 4},
                    full[4 * r : 4 * r + 4],
                ),
                (
                    "load_qkv_weight",
                    full,
                    (8, 6),
                    {"shard_id": "k", "shard_offset": 0, "shard_size": 8, "num_heads": 2},
                    full[8 * (r // 2) : 8 * (r // 2) + 8],
                ),
            ):
                param = ModelWeightParameter(
                    data=torch.zeros(shape, device=device),
                    input_dim=1,
                    output_dim=0,
                    weight_loader=loader,
                )
                load = param.weight_loader
                assert load is not None, "it was given"
                load(param, source.to(device), call, **keywords)
                equal = torch.equal(param.data.cpu(), needed)
                wrong += not equal
                print(f"rank {r} {call}: {'equal' if equal else 'DIFFERS'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
