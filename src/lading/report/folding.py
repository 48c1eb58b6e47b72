"""Equal rows of neighbouring layers as one row: `layers.{0..31}`, with the count."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from lading.report.blocks import Line, Row

MAX_FOLD_LINES = 12
"""How many lines a note (casts, padding, skipped tensors) takes before it says how many more."""


_NUMBER = re.compile(r"(?<=\.)\d+(?=[.,:']|$)")


def fold(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    """Rows that differ only in the number of their layer as one row, with how many they are.

    A layer's number is a whole component of the first column, `layers.3.`; the same component of
    the other columns goes with it. Inner numbers (experts) fold first, contiguous ones only.

    Example: ("layers.0.w", "[4]"), ("layers.1.w", "[4]"), ("layers.2.w", "[8]")
             -> ("layers.{0..1}.w", "[4]") 2 times, ("layers.2.w", "[8]") once
    """
    folded = [(row, 1) for row in rows]
    depth = max((len(_NUMBER.findall(row[0])) for row, _ in folded if row), default=0)
    for place in reversed(range(depth)):
        folded = _fold_at(folded, place)
    return folded


def _fold_at(rows: Sequence[tuple[Row, int]], place: int) -> list[tuple[Row, int]]:
    """Folds over the number that stands `place` numbers from the left of the first column."""
    numbers: dict[tuple[Row, int], list[tuple[int, Row]]] = {}
    for row, count in rows:
        key, number = _with_hole(row, place)
        numbers.setdefault((key, count), []).append((number, row))
    result: list[tuple[Row, int]] = []
    done: set[tuple[Row, int]] = set()
    for row, count in rows:
        key, _ = _with_hole(row, place)
        if (key, count) in done:
            continue
        done.add((key, count))
        for first, last, original in runs_of(numbers[key, count]):
            braces = f"{{{first}..{last}}}"
            folded = tuple(cell.replace("\0", braces) for cell in key)
            result.append((original if first == last else folded, count * (last - first + 1)))
    return result


def _with_hole(row: Row, place: int) -> tuple[Row, int]:
    """The row with a NUL for the layer's number, and the number; -1 where it has none."""
    found = list(_NUMBER.finditer(row[0]))
    if place >= len(found):
        return row, -1
    text = found[place].group()
    return tuple(_punched(cell, place, text) for cell in row), int(text)


def _punched(cell: str, place: int, text: str) -> str:
    """The cell with a NUL for that number, in each of its words: names stand in sentences too."""
    words = cell.split(" ")
    for at, word in enumerate(words):
        found = list(_NUMBER.finditer(word))
        if place < len(found) and found[place].group() == text:
            start, stop = found[place].span()
            words[at] = f"{word[:start]}\0{word[stop:]}"
    return " ".join(words)


def runs_of(found: list[tuple[int, Row]]) -> list[tuple[int, int, Row]]:
    """(first, last, row of the first) of each run of contiguous numbers."""
    runs: list[tuple[int, int, Row]] = []
    for number, row in sorted(found):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number, runs[-1][2])
        else:
            runs.append((number, number, row))
    return runs


def folded_lines(rows: Iterable[Row], join: Callable[[Row], str]) -> list[Line]:
    """One indented line a folded row, with its count, and how many were left out."""
    folded = fold(dict.fromkeys(rows))
    lines = [
        Line(text=f"  {join(row)}{f' ({count} tensors)' if count > 1 else ''}")
        for row, count in folded[:MAX_FOLD_LINES]
    ]
    left = len(folded) - MAX_FOLD_LINES
    return [*lines, Line(text=f"  ... and {left} more (--json has all)")] if left > 0 else lines
