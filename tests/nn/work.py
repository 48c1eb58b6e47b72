"""What real processes run: every kind of layer on gloo, beside one process's dense product."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lading.nn import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lading.ranks import Ranks


def random(*shape: int) -> torch.Tensor:
    seed = sum(n * 31**i for i, n in enumerate(shape))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def filled(layer: ParallelLayer, *full: tuple[torch.Tensor, torch.Tensor | None]) -> ParallelLayer:
    """The layer with (weight, bias) of each part."""
    for i, (weight, bias) in enumerate(full):
        part = i if len(full) > 1 else None
        layer.weight_loader(layer._parameters["weight"], weight, part)  # type: ignore[arg-type]
        if bias is not None:
            layer.weight_loader(layer._parameters["bias"], bias, part)  # type: ignore[arg-type]
    return layer


def distances(ranks: Ranks) -> dict[str, float]:
    """How far each layer's output is from the dense one."""
    double = torch.float64
    x, found = random(5, 30), {}

    def note(name: str, output: torch.Tensor, expected: torch.Tensor) -> None:
        assert output.shape == expected.shape, f"{name}: {output.shape}, needs {expected.shape}"
        found[name] = float((output - expected).abs().max())

    w, b = random(9, 30), random(9)
    column = filled(ColumnParallelLinear(30, 9, True, True, False, double, ranks=ranks), (w, b))
    note("column", column(x)[0], F.linear(x, w, b))
    v, c = random(3, 30), random(3)
    merged = MergedColumnParallelLinear(30, [9, 3], True, True, params_dtype=double, ranks=ranks)
    filled(merged, (w, b), (v, c))
    note("merged", merged(x)[0], torch.cat([F.linear(x, w, b), F.linear(x, v, c)], -1))
    row = filled(RowParallelLinear(30, 9, True, False, False, double, ranks=ranks), (w, b))
    note("row", row(x)[0], F.linear(x, w, b))
    table, ids = random(101, 6), torch.tensor([[0, 63, 64], [100, 99, 7]])
    embedding = filled(VocabParallelEmbedding(101, 6, double, ranks=ranks), (table, None))
    note("embedding", embedding(ids), table[ids])
    head = filled(ParallelLMHead(101, 6, params_dtype=double, ranks=ranks), (table, None))
    note("head", head(random(2, 3, 6)), random(2, 3, 6) @ table.T)
    return found
