"""Exports as text and as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lading import dtypes
from lading.report.blocks import Block, Line, Table, count_of, spell_bytes

if TYPE_CHECKING:
    from lading.exports.verb import ExportReport


def export_report(exports: Sequence[ExportReport]) -> tuple[Block, ...]:
    """What each rank wrote, what came along, and the line that says how fast."""
    first = exports[0]
    rows = tuple((str(one.ranks.tp_rank), spell_bytes(one.written_bytes)) for one in exports)
    files = f"{count_of(first.num_tensors, 'tensor')} in {count_of(len(first.files), 'file')}"
    lines: list[Block] = [
        Table(heads=("rank", "written"), rows=rows, right=(1,)),
        Line(text=""),
        Line(text=f"{first.path}: {files}, {count_of(len(first.copied), 'other file')} copied"),
    ]
    casts = Counter((dtypes.printed(a), dtypes.printed(b)) for _, a, b in first.casts)
    lines += [
        Line(text=f"{count_of(count, 'parameter')} of {a} written as {b}, no value lost")
        for (a, b), count in casts.items()
    ]
    lines += [
        Line(text=f"{name} has values in its padding, which is left out", style="yellow")
        for name in first.padding
    ]
    lines += [Line(text=note, style="yellow") for note in first.notes]
    seconds = max(one.seconds for one in exports)
    rate = spell_bytes(first.num_bytes / seconds)
    return (*lines, Line(text=f"{spell_bytes(first.num_bytes)} in {seconds:.3g} s, {rate}/s"))


def export_json(exports: Sequence[ExportReport]) -> dict[str, Any]:
    """The same as JSON values."""
    first = exports[0]
    return {
        "path": first.path,
        "tp_size": len(exports),
        "files": list(first.files),
        "bytes": first.num_bytes,
        "tensors": first.num_tensors,
        "copied": list(first.copied),
        "casts": [{"parameter": n, "dtype": a, "stored": b} for n, a, b in first.casts],
        "padding": list(first.padding),
        "notes": list(first.notes),
        "seconds": max(one.seconds for one in exports),
        "ranks": [
            {"tp_rank": one.ranks.tp_rank, "written_bytes": one.written_bytes} for one in exports
        ],
    }
