"""What the processes of these tests run: importable functions of a rank."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import lading
from lading.errors import LadingError
from lading.ranks import Ranks

from ..loading_made import Spoiling, break_disk
from .inputs import input_ids


def logits(ranks: Ranks, folder: str) -> dict[str, Any]:
    """Loads and runs; the logits' distance from transformers', and each element against the
    file.
    """
    model = lading.from_pretrained(folder, ranks=ranks, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        found = model(input_ids())
    expected = torch.load(Path(folder) / "logits.pt", weights_only=True)
    return {
        "distance": float((found - expected).abs().max()),
        "elements": _wrong_elements(dict(model.named_parameters()), folder, ranks),
    }


def _wrong_elements(parameters: dict[str, torch.Tensor], folder: str, ranks: Ranks) -> int:
    """How many local elements differ from the file, by sizes and chunks written out by hand."""
    size, rank = ranks.tp_size, ranks.tp_rank
    full: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            full.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
    config = lading.open_checkpoint(folder).config
    assert config is not None
    kv_pieces = min(size, config["num_key_value_heads"])
    wrong = 0
    for name, local in parameters.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            padded = torch.zeros(local.shape[0] * size, local.shape[1])
            padded[:101] = full[name]
            needed = padded.chunk(size)[rank]
        elif "qkv_proj" in name:
            heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
            if name in full:
                head = full[name].shape[0] // (heads + 2 * kv)
                q, k, v = full[name].split([heads * head, kv * head, kv * head])
            else:
                q, k, v = (full[name.replace("qkv_proj", f"{p}_proj")] for p in "qkv")
            piece = rank // (size // kv_pieces)
            needed = torch.cat(
                [q.chunk(size)[rank], k.chunk(kv_pieces)[piece], v.chunk(kv_pieces)[piece]]
            )
        elif "gate_up_proj" in name:
            if name in full:
                gate, up = full[name].chunk(2)
            else:
                gate, up = (full[name.replace("gate_up", p)] for p in ("gate", "up"))
            needed = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            needed = full[name].chunk(size, dim=1)[rank]
        else:
            needed = full[name]
        assert local.shape == needed.shape, f"{name}: {local.shape}, needs {needed.shape}"
        wrong += int((local != needed).sum())
    return wrong


def load_error(
    ranks: Ranks, folder: str, broken_rank: int | None = None, how: str = "disk"
) -> dict[str, Any]:
    """Loads what cannot be loaded: the error, how long it took, and what is left of the model.

    broken_rank   where, when all ranks have checked and none has read, the last file fails: its
                  "disk" answers with an error, or it is "shorter" than it was, for all ranks
    """
    from lading.pretrained import prepare_pretrained

    victim = max(Path(folder).glob("*.safetensors"))
    spoil = partial(break_disk, victim) if how == "disk" else partial(os.truncate, victim, 3000)
    progress = Spoiling(spoil) if broken_rank == ranks.tp_rank else None
    model = None
    began = time.monotonic()
    try:
        if broken_rank is not None:
            model = prepare_pretrained(folder, ranks=ranks).model
            lading.load(model, folder, ranks=ranks, device="cpu", progress=progress)
        else:
            lading.from_pretrained(folder, ranks=ranks, device="cpu")
    except LadingError as error:
        left = {p.device.type for p in model.parameters()} if model is not None else {"meta"}
        return {"error": str(error), "seconds": time.monotonic() - began, "left": sorted(left)}
    return {"error": None, "seconds": time.monotonic() - began, "left": []}
