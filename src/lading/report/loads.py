"""Loads and checks as text and as JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from lading import dtypes
from lading.report.blocks import Block, Line, Table, count_of, spell_bytes

if TYPE_CHECKING:
    from lading.launch import RankLoad
    from lading.verify import ElementCheck, LogitCheck


def load_report(loads: Sequence[RankLoad]) -> tuple[Block, ...]:
    """What each rank read and kept, and the line that says how fast."""
    rows = tuple(
        (
            str(one.tp_rank),
            one.device,
            dtypes.printed(one.dtype),
            spell_bytes(one.parameter_bytes),
            spell_bytes(one.read_bytes),
            spell_bytes(one.excess_bytes),
            f"{one.num_copies:,}",
        )
        for one in loads
    )
    heads = ("rank", "device", "dtype", "parameters", "read", "of it not kept", "copies")
    return (Table(heads=heads, rows=rows, right=(3, 4, 5, 6)), *_load_notes(loads[0]))


def _load_notes(load: RankLoad) -> list[Block]:
    """Casts and skipped tensors, counted; `plan` lists them."""
    casts = Counter((dtypes.printed(a), dtypes.printed(b)) for _, a, b in load.casts)
    lines: list[Block] = [
        Line(text=f"{count_of(count, 'parameter')} cast from {a} to {b}", style="yellow")
        for (a, b), count in casts.items()
    ]
    skips = Counter(reason for _, reason in load.skipped)
    return lines + [
        Line(text=f"{count_of(count, 'tensor')} skipped: {reason}", style="yellow")
        for reason, count in skips.items()
    ]


def speed(loads: Sequence[RankLoad]) -> str:
    """'16.1 GB in 0.81 s, 19.8 GB/s': each byte of the checkpoint counted once, over all ranks."""
    size, seconds = loads[0].checkpoint_bytes, _seconds(loads)
    return f"{spell_bytes(size)} in {seconds:.3g} s, {spell_bytes(size / seconds)}/s"


def _seconds(loads: Sequence[RankLoad]) -> float:
    return max(one.seconds for one in loads)


def load_json(loads: Sequence[RankLoad]) -> dict[str, Any]:
    """The same as JSON values."""
    first, seconds = loads[0], _seconds(loads)
    return {
        "tp_size": len(loads),
        "dtype": first.dtype,
        "checkpoint_bytes": first.checkpoint_bytes,
        "seconds": seconds,
        "gigabytes_per_second": first.checkpoint_bytes / 1e9 / seconds,
        "ranks": [
            {
                "tp_rank": one.tp_rank,
                "device": one.device,
                "parameter_bytes": one.parameter_bytes,
                "read_bytes": one.read_bytes,
                "excess_bytes": one.excess_bytes,
                "num_copies": one.num_copies,
                "seconds": one.seconds,
            }
            for one in loads
        ],
        "casts": [{"parameter": n, "stored": a, "dtype": b} for n, a, b in first.casts],
        "skipped": [{"tensor": name, "reason": reason} for name, reason in first.skipped],
    }


def checks_report(elements: Sequence[ElementCheck], logits: LogitCheck) -> tuple[Block, ...]:
    """What was compared with the independent readers."""
    total, wrong = _total(elements)
    reader = elements[0].reader
    if wrong:
        text = f"✗ elements: {wrong:,} of {total:,} differ from what {reader} reads"
    else:
        ranks = count_of(len(elements), "rank")
        text = f"✓ elements: all {total:,} on {ranks} are what {reader} reads, bit for bit"
    lines = [Line(text=text, style="red" if wrong else "green")]
    lines += [Line(text=f"  {one.first}", style="red") for one in elements if one.first is not None]
    return (*lines, *_logits_lines(logits))


def _logits_lines(logits: LogitCheck) -> tuple[Line, ...]:
    if not logits.compared:
        return (Line(text=f"- logits: not compared, {logits.reason}", style="yellow"),)
    if logits.nan is not None:
        return (Line(text=f"✗ logits: {logits.nan}", style="red"),)
    style, mark, are = ("green", "✓", "are") if logits.ok else ("red", "✗", "are not")
    against = f"transformers {logits.transformers_version}"
    return (
        Line(
            text=f"{mark} logits: {logits.num_logits:,} on {logits.num_sequences} x "
            f"{logits.num_tokens} tokens {are} as {against} has them",
            style=style,
        ),
        Line(
            text=f"  at most {logits.max_abs_diff:.2g} apart in fp32; allowed "
            f"{logits.tolerance:.2g}, 1e-5 of the largest (or of 1)"
        ),
    )


def _total(elements: Sequence[ElementCheck]) -> tuple[int, int]:
    return sum(one.num_elements for one in elements), sum(one.num_mismatches for one in elements)


def checks_json(elements: Sequence[ElementCheck], logits: LogitCheck) -> dict[str, Any]:
    """The same as JSON values."""
    total, wrong = _total(elements)
    firsts = [(one.tp_rank, one.first) for one in elements if one.first is not None]
    return {
        "elements_compared": total,
        "mismatches": wrong,
        "first_mismatches": [
            {
                "tp_rank": tp_rank,
                "parameter": first.parameter,
                "part": first.part,
                "tensor": first.tensor,
                "index": list(first.index),
                "found": first.found,
                "expected": first.expected,
            }
            for tp_rank, first in firsts
        ],
        "reader": elements[0].reader,
        "logits": {
            "compared": logits.compared,
            "ok": logits.ok,
            "reason": logits.reason,
            "num_logits": logits.num_logits,
            "num_sequences": logits.num_sequences,
            "num_tokens": logits.num_tokens,
            "nan": logits.nan,
            # JSON has no infinity, which stands for NaN on one side.
            "max_abs_diff": logits.max_abs_diff if isfinite(logits.max_abs_diff) else None,
            "tolerance": logits.tolerance,
            "transformers_version": logits.transformers_version,
        },
    }
