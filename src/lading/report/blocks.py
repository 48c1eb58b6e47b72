"""Blocks of a report, the words for numbers, and their rendering as text with rich."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, TextIO

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of text; `style` is rich's: "bold", "green", "dim"."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns under heads; `right` are the numbers of the right-aligned ones."""

    heads: Row
    rows: tuple[Row, ...]
    right: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Rows under a heading of their own, which is as long as it likes."""

    heading: str
    note: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """Sections whose rows share the heads and the widths of their columns."""

    heads: Row
    sections: tuple[Section, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Indented:
    """A block further to the right."""

    block: Line | Table | Sections
    columns: int = 3


Block = Line | Table | Sections | Indented


def indented(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """Each of the blocks further to the right."""
    return tuple(b if isinstance(b, Indented) else Indented(block=b) for b in blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How text may look: columns to fit in (0 = lines are as long as they are), and colour."""

    width: int = 0
    colour: bool = False

    @property
    def is_wide(self) -> bool:
        """Whether names are printed in full."""
        return self.width == 0 or self.width >= 110


def look_of(stream: TextIO, environ: Mapping[str, str]) -> Look:
    """Fitted and coloured on a terminal (no colour with NO_COLOR or TERM=dumb), plain elsewhere."""
    if not stream.isatty():
        return Look()
    colour = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return Look(width=shutil.get_terminal_size().columns, colour=colour)


def spell_bytes(num_bytes: int | float) -> str:
    """16060556288 -> '16.1 GB', 912384 -> '912 kB'; three figures, powers of ten."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit * 0.9995:
            return f"{_three(num_bytes / unit)} {name}"
    return f"{num_bytes:.0f} B"


def _three(value: float) -> str:
    """Three figures, without an exponent: 1.00, 16.1, 812."""
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f}"


def count_of(number: int, what: str) -> str:
    """(1, 'tensor') -> '1 tensor', (2, 'copy') -> '2 copies'."""
    if number != 1:
        what = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{number:,} {what}"


def render(blocks: Iterable[Block], look: Look) -> str:
    """The text of a report. Nothing is cut: on a terminal cells wrap, elsewhere lines are long."""
    from rich.console import Console
    from rich.padding import Padding

    stream = StringIO()
    console = Console(
        file=stream,
        width=look.width or 10_000,
        force_terminal=look.colour,
        color_system="standard" if look.colour else None,
        legacy_windows=False,
        highlight=False,
    )
    for block in blocks:
        if block == Line(text=""):
            console.print()
            continue
        left = block.columns if isinstance(block, Indented) else 0
        inner = block.block if isinstance(block, Indented) else block
        for piece in _pieces_of(inner, console.width - left):
            console.print(Padding(piece, (0, 0, 0, left), expand=False))
    lines = stream.getvalue().splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _pieces_of(block: Line | Table | Sections, width: int) -> Iterator[Any]:
    """What rich prints of a block, one under the other."""
    from rich.text import Text

    if isinstance(block, Line):
        yield Text(block.text, style=block.style)
    elif isinstance(block, Table):
        yield _rich_table(block.heads, block.rows, right=block.right)
    else:
        yield from _pieces_of_sections(block, width)


def _rich_table(
    heads: Row, rows: Sequence[Row], *, right: Sequence[int] = (), widths: Sequence[int] = ()
) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=None, show_header=bool(heads), pad_edge=False, padding=(0, 2, 0, 0))
    for number in range(len(heads) or len(widths)):
        table.add_column(
            Text(heads[number], style="dim") if heads else "",
            justify="right" if number in right else "left",
            overflow="fold",
            min_width=widths[number] if widths else None,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _pieces_of_sections(block: Sections, width: int) -> Iterator[Any]:
    from rich.padding import Padding
    from rich.text import Text

    rows = [block.heads, *(row for section in block.sections for row in section.rows)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(block.heads))]
    if sum(widths) + 2 * len(widths) > width:  # columns wrap, each as rich sees fit
        widths = [1] * len(widths)
    yield Text("parameter  on each rank", style="dim")
    yield Padding(_rich_table(block.heads, (), widths=widths), (0, 0, 0, 2), expand=False)
    for section in block.sections:
        yield Text(section.heading, style="bold cyan") + Text(f"  {section.note}")
        if section.rows:
            yield Padding(_rich_table((), section.rows, widths=widths), (0, 0, 0, 2), expand=False)
