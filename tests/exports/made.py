"""What tests of the verb `export` share: models of all ranks in one process, files as digests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import lading
from lading.exports.verb import ExportReport, Options, export_models
from lading.ranks import Ranks, all_ranks

DEFAULTS: dict[str, Any] = {
    "source": None,
    "as_new": False,
    "overwrite": False,
    "max_file_bytes": 10**9,
    "staging_bytes": 4096,  # so small that every tensor is cut into blocks
    "sync": False,
}


def models_of(
    folder: Path, tp_size: int, dtype: torch.dtype | None = None
) -> dict[Ranks, nn.Module]:
    """The model of each rank."""
    return {
        ranks: lading.from_pretrained(folder, ranks=ranks, device="cpu", dtype=dtype)
        for ranks in all_ranks(tp_size)
    }


def export_all(models: Mapping[Ranks, nn.Module], out: Path, **chosen: Any) -> ExportReport:
    """One export of all ranks, in this process."""
    return export_models(models, Options(path=out, **(DEFAULTS | chosen)))[0]


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of each file, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by safetensors."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal bytes, dtypes, shapes."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, two)))
