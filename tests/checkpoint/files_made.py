"""Checkpoints made for tests: real headers, and payloads that take no space on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lading.checkpoint import encode_header
from lading.dtypes import BITS

Spec = tuple[str, str, tuple[int, ...]]
"""(name, dtype, shape as the header counts it)"""


def raw_file(header: object, data: bytes = b"", *, raw: bytes | None = None) -> bytes:
    """A file with any header, right or wrong: `header` as JSON, or `raw` as it is."""
    raw = json.dumps(header).encode() if raw is None else raw
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: object, start: object, stop: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_sparse(path: Path, header_bytes: bytes, data_bytes: int) -> None:
    """A file that begins with `header_bytes` and goes on with zeros that are not stored on disk."""
    path.write_bytes(header_bytes)
    os.truncate(path, len(header_bytes) + data_bytes)


def write_tensors(
    path: Path, tensors: Sequence[Spec], metadata: Mapping[str, str] | None = None
) -> None:
    """A sparse safetensors file of these tensors."""
    data_bytes = 0
    for _, dtype, shape in tensors:
        bits = BITS[dtype]
        for size in shape:
            bits *= size
        data_bytes += bits // 8
    write_sparse(path, encode_header(tensors, metadata), data_bytes)


def write_index(
    folder: Path, weight_map: object, name: str = "model.safetensors.index.json"
) -> None:
    (folder / name).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
