"""The digest's definition, written out in Python's own integers, one byte at a time."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

MASK = 2**64 - 1


def splitmix64(number: int) -> int:
    z = (number + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def width(last_dim_bytes: int | None) -> int:
    """W, of the bytes of the last dim; None where there is none, or it is no whole number."""
    is_usual = last_dim_bytes is not None and 64 <= last_dim_bytes <= 2**18
    return last_dim_bytes if is_usual and last_dim_bytes else 8192


def lanes(row_bytes: int, raw: bytes, places: Iterable[int] | None = None) -> tuple[int, ...]:
    """S of some of a tensor's bytes, by their positions; of all where none are given."""
    sums = [0] * 6
    columns: dict[int, list[int]] = {}
    rows: dict[int, list[int]] = {}
    for place in range(len(raw)) if places is None else places:
        row, column = divmod(place, row_bytes)
        if column not in columns:
            weights = [splitmix64(16 * (column // 2) + lane) >> 39 | 1 for lane in range(6)]
            columns[column] = [weight * 256 ** (column % 2) for weight in weights]
        if row not in rows:
            rows[row] = [splitmix64(16 * row + 8 + lane) | 1 for lane in range(6)]
        value, of_column, of_row = raw[place] + 1, columns[column], rows[row]
        for lane in range(6):
            sums[lane] += value * of_column[lane] * of_row[lane]
    return tuple(one & MASK for one in sums)


def digest(dtype: str, shape: tuple[int, ...], row_bytes: int, raw: bytes) -> str:
    text = f"lading digest 1 {dtype} {list(shape)} ".encode()
    values = b"".join(one.to_bytes(8, "little") for one in lanes(row_bytes, raw))
    return hashlib.sha256(text + values).hexdigest()


NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


@functools.cache
def of_folder(folder: Path) -> Mapping[str, str]:
    """Every tensor's digest, as the safetensors library reads it; worked out once a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                tensor = handle.get_tensor(name).contiguous()
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                shape = tuple(tensor.shape)
                row = width(shape[-1] * tensor.element_size() if shape else None)
                found[name] = digest(NAMES[tensor.dtype], shape, row, raw)
    return found
