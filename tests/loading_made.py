"""A small model and its checkpoint: what tests of the verb `load` share."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lading.nn import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lading.ranks import Ranks


class Block(nn.Module):
    """Attention without attention: one layer of each kind, a norm, a persistent buffer."""

    def __init__(
        self, ranks: Ranks, *, heads: int = 16, kv_heads: int = 16, dtype: Any = None
    ) -> None:
        super().__init__()
        common: Any = {"ranks": ranks, "params_dtype": dtype}
        self.embed = VocabParallelEmbedding(37, 6, padding_size=4, **common)
        self.qkv_proj = QKVParallelLinear(6, 3, heads, kv_heads, **common)
        self.o_proj = RowParallelLinear(heads * 3, 6, **common)
        self.gate_up_proj = MergedColumnParallelLinear(6, [48, 48], False, **common)
        self.down_proj = RowParallelLinear(48, 6, False, **common)
        self.up = ColumnParallelLinear(6, 240, False, **common)
        self.norm = nn.Parameter(torch.ones(6, dtype=dtype), requires_grad=False)
        self.register_buffer("scale", torch.zeros(3, dtype=dtype))
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.head = ParallelLMHead(37, 6, padding_size=4, **common)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.norm


Shapes = Mapping[str, tuple[int, ...]]


def shapes(*, heads: int = 16, kv_heads: int = 16, fused: bool = False) -> Shapes:
    """The checkpoint tensors of a Block."""
    q, kv = heads * 3, kv_heads * 3
    found: dict[str, tuple[int, ...]] = {
        "embed.weight": (37, 6),
        "o_proj.weight": (6, q),
        "o_proj.bias": (6,),
        "down_proj.weight": (6, 48),
        "up.weight": (240, 6),
        "norm": (6,),
        "scale": (3,),
        "head.weight": (37, 6),
    }
    if fused:
        found |= {"qkv_proj.weight": (q + 2 * kv, 6), "qkv_proj.bias": (q + 2 * kv,)}
        return found | {"gate_up_proj.weight": (96, 6)}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        found |= {f"{name}_proj.weight": (rows, 6), f"{name}_proj.bias": (rows,)}
    return found | {"gate_proj.weight": (48, 6), "up_proj.weight": (48, 6)}


def indices(needed: Shapes, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Tensors whose elements are their own flat index in the checkpoint, from 1 on."""
    found, start = {}, 1
    for name, shape in needed.items():
        stop = start + math.prod(shape)
        found[name] = torch.arange(start, stop, dtype=dtype).reshape(shape)
        start = stop
    return found


def save(folder: Path, tensors: Mapping[str, torch.Tensor], files: int = 1) -> Path:
    """A checkpoint folder of that many safetensors files."""
    folder.mkdir(parents=True, exist_ok=True)
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    index = {}
    for i in range(files):
        name = f"model-{i + 1:05}-of-{files:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::files]}
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def on_meta(ranks: Ranks, **options: Any) -> Block:
    with torch.device("meta"):
        return Block(ranks, **options)


def local(full: Mapping[str, torch.Tensor], ranks: Ranks, kv_heads: int) -> dict[str, torch.Tensor]:
    """What a rank has to hold, index by index: the definition, written out by hand."""
    size, rank = ranks.tp_size, ranks.tp_rank

    def rows(tensor: torch.Tensor, pieces: int) -> list[torch.Tensor]:
        length = len(tensor) // pieces
        piece = rank * pieces // size
        return [tensor[i] for i in range(piece * length, piece * length + length)]

    def vocabulary(tensor: torch.Tensor) -> torch.Tensor:
        per_rank = math.lcm(4, size)
        while per_rank < 37:
            per_rank += math.lcm(4, size)
        per_rank //= size
        zero = torch.zeros(6, dtype=tensor.dtype)
        wanted = range(rank * per_rank, (rank + 1) * per_rank)
        return torch.stack([tensor[i] if i < 37 else zero for i in wanted])

    kv = min(size, kv_heads)
    found = {name: full[name] for name in ("o_proj.bias", "norm", "scale")}
    found |= {name: vocabulary(full[name]) for name in ("embed.weight", "head.weight")}
    for leaf in ("weight", "bias"):
        q, k, v = (full[f"{part}_proj.{leaf}"] for part in "qkv")
        found[f"qkv_proj.{leaf}"] = torch.stack(rows(q, size) + rows(k, kv) + rows(v, kv))
    gate, up = full["gate_proj.weight"], full["up_proj.weight"]
    found["gate_up_proj.weight"] = torch.stack(rows(gate, size) + rows(up, size))
    found["up.weight"] = torch.stack(rows(full["up.weight"], size))
    for name in ("o_proj.weight", "down_proj.weight"):
        found[name] = torch.stack(rows(full[name].T, size), dim=1)
    return found


def break_disk(file: Path) -> None:
    """From now on this process's open descriptors of a file answer reads with EIO."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)  # nothing is mapped at a file's offsets
    for fd in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd", fd)
        if link.is_symlink() and os.readlink(link) == str(file.resolve()):
            os.dup2(memory, int(fd), inheritable=False)
    os.close(memory)


class Spoiling:
    """A progress object at whose start, when all has been checked and nothing read, something
    happens. It remembers its calls.
    """

    def __init__(self, spoil: Callable[[], None] = lambda: None) -> None:
        self.calls: list[Any] = []
        self._spoil = spoil

    def start(self, total_bytes: int) -> None:
        self.calls.append(("start", total_bytes))
        self._spoil()

    def advance(self, num_bytes: int) -> None:
        self.calls.append(num_bytes)

    def finish(self) -> None:
        self.calls.append("finish")
