"""What tests of layers share: ranks as threads, index-valued tensors, cuts written out by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lading import ranks as ranks_module
from lading.ranks import Ranks, all_ranks

SECONDS = 10


def on_ranks(
    monkeypatch: pytest.MonkeyPatch, tp_size: int, work: Callable[[Ranks], Any]
) -> list[Any]:
    """`work` on every rank, each a thread; collectives meet at a barrier."""
    barrier = threading.Barrier(tp_size)
    slots: list[torch.Tensor] = [torch.empty(0)] * tp_size

    def everyones(tensor: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
        slots[ranks.tp_rank] = tensor.clone()
        barrier.wait(SECONDS)
        found = list(slots)
        barrier.wait(SECONDS)
        return found

    def all_reduce(tensor: torch.Tensor, ranks: Ranks, _group: object) -> torch.Tensor:
        if ranks.tp_size == 1:
            return tensor
        return torch.stack(everyones(tensor, ranks)).sum(0)

    def all_gather(tensor: torch.Tensor, ranks: Ranks, _group: object) -> torch.Tensor:
        return tensor if ranks.tp_size == 1 else torch.cat(everyones(tensor, ranks), dim=-1)

    monkeypatch.setattr(ranks_module, "all_reduce", all_reduce)
    monkeypatch.setattr(ranks_module, "all_gather", all_gather)
    with ThreadPoolExecutor(tp_size) as pool:
        return list(pool.map(work, all_ranks(tp_size)))


def numbered(*shape: int, start: int = 1) -> torch.Tensor:
    """Elements that are their own row-major positions, from `start` on; none is zero."""
    count = int(torch.tensor(shape).prod())
    return torch.arange(start, start + count, dtype=torch.float64).reshape(shape)


def rows_kept(size: int, pieces: int, ranks: Ranks) -> range:
    """The rows of a part that a rank keeps, by the definition: neighbours share a piece."""
    length = size // pieces
    piece = [rank * pieces // ranks.tp_size for rank in range(ranks.tp_size)][ranks.tp_rank]
    return range(piece * length, piece * length + length)


def kept(parts: Sequence[tuple[torch.Tensor, int]], ranks: Ranks) -> torch.Tensor:
    """The local tensor of parts (full tensor, pieces), row by row."""
    return torch.stack([full[i] for full, n in parts for i in rows_kept(len(full), n, ranks)])
