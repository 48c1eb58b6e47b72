"""Checkpoint folders and their hashes: what the tests of pre-sharded folders share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lading.demo import write_checkpoint

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def made(folder: Path, **changes: Any) -> Path:
    """A small Llama-shaped checkpoint in two files, with what usually lies beside it."""
    folder.mkdir(parents=True)
    write_checkpoint(str(folder), **{**SMALL, **changes})
    (folder / "tokenizer.json").write_bytes(b'{"model": "\xc3\xa9"}')
    (folder / "README.md").write_text("read me")
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor) -> Path:
    """The same checkpoint in one file, with more tensors; '__' stands for a dot."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    found |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(found, folder / "model.safetensors")
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, as safetensors reads them."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file()
    }


def edit_json(path: Path, **changes: Any) -> None:
    """Other values for some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def pieces(tensor: torch.Tensor, count: int, rank: int, tp_size: int, dim: int = 0) -> torch.Tensor:
    """What a rank keeps of a tensor that is cut into `count` pieces, by torch alone."""
    return tensor.chunk(count, dim)[rank * count // tp_size]


def rank_tensors(full: dict[str, torch.Tensor], rank: int, tp_size: int) -> dict[str, torch.Tensor]:
    """What a rank's file has to hold of a SMALL checkpoint, written out by hand."""
    kv_pieces = min(tp_size, SMALL["num_key_value_heads"])
    found: dict[str, torch.Tensor] = {}
    for name, tensor in full.items():
        head, _, leaf = name.rpartition(".")
        stem, _, module = head.rpartition(".")
        if module in ("embed_tokens", "lm_head"):
            padded = torch.zeros(128, tensor.shape[1], dtype=tensor.dtype)
            padded[:101] = tensor
            found[name] = padded.chunk(tp_size)[rank]
        elif module in ("o_proj", "down_proj"):
            found[name] = tensor.chunk(tp_size, 1)[rank]
        elif module == "q_proj":
            parts = [
                pieces(full[f"{stem}.{part}_proj.{leaf}"], count, rank, tp_size)
                for part, count in (("q", tp_size), ("k", kv_pieces), ("v", kv_pieces))
            ]
            found[f"{stem}.qkv_proj.{leaf}"] = torch.cat(parts)
        elif module == "gate_proj":
            both = [tensor, full[f"{stem}.up_proj.{leaf}"]]
            found[f"{stem}.gate_up_proj.{leaf}"] = torch.cat(
                [one.chunk(tp_size)[rank] for one in both]
            )
        elif module not in ("k_proj", "v_proj", "up_proj"):
            found[name] = tensor
    return found
