"""A checkpoint as text and as JSON values: files, tensors, dtypes, what config.json declares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lading import dtypes
from lading.checkpoint import Checkpoint, Source
from lading.report.blocks import Block, Line, Row, Table, count_of, spell_bytes
from lading.report.folding import MAX_FOLD_LINES, fold


def inspect_report(checkpoint: Checkpoint, facts: Sequence[tuple[str, str]]) -> tuple[Block, ...]:
    """Files, what the config declares (`facts`, as pairs), dtypes, and every tensor, folded."""
    sources = list(checkpoint.tensors.values())
    total = sum(source.num_bytes for source in sources)
    title = (
        f"{checkpoint.folder}: {checkpoint.format}, "
        f"{count_of(len(checkpoint.file_bytes), 'file')}, {count_of(len(sources), 'tensor')}, "
        f"{spell_bytes(total)}"
    )
    rows = [(s.name, dtypes.spell(s.dtype, s.shape), spell_bytes(s.num_bytes)) for s in sources]
    folded = tuple((*row, f"{count:,}" if count > 1 else "") for row, count in fold(rows))
    return (
        Line(text=title, style="bold"),
        Line(text=""),
        Table(heads=("config.json", "declares"), rows=tuple(facts)),
        Line(text=""),
        Table(heads=("dtype", "tensors", "bytes"), rows=_dtype_rows(sources), right=(1, 2)),
        Line(text=""),
        Table(heads=("file", "tensors", "bytes"), rows=_file_rows(checkpoint), right=(1, 2)),
        Line(text=""),
        Table(heads=("tensor", "is", "each", "n"), rows=folded, right=(2, 3)),
    )


def _dtype_rows(sources: Sequence[Source]) -> tuple[Row, ...]:
    return _totals((dtypes.printed(s.dtype), s.num_bytes) for s in sources)


def _file_rows(checkpoint: Checkpoint) -> tuple[Row, ...]:
    rows = _totals((s.file, s.num_bytes) for s in checkpoint.tensors.values())
    left = len(rows) - MAX_FOLD_LINES
    if left > 0:
        return (*rows[:MAX_FOLD_LINES], (f"... and {left} more (--json has all)", "", ""))
    return rows


def _totals(pairs: Iterable[tuple[str, int]]) -> tuple[Row, ...]:
    """(key, how many, bytes) of each key."""
    found: dict[str, list[int]] = {}
    for key, num_bytes in pairs:
        found.setdefault(key, []).append(num_bytes)
    return tuple((key, f"{len(sizes):,}", spell_bytes(sum(sizes))) for key, sizes in found.items())


def inspect_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every tensor and file as JSON values."""
    return {
        "folder": checkpoint.folder,
        "format": checkpoint.format,
        "num_tensors": len(checkpoint.tensors),
        "num_bytes": sum(source.num_bytes for source in checkpoint.tensors.values()),
        "files": [{"file": f, "file_bytes": n} for f, n in checkpoint.file_bytes.items()],
        "tensors": [
            {
                "name": s.name,
                "dtype": s.dtype,
                "shape": list(s.shape),
                "num_bytes": s.num_bytes,
                "file": s.file,
            }
            for s in checkpoint.tensors.values()
        ],
    }
