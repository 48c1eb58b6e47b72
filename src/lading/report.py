"""Eyes: plans, checkpoints, loads and checks as text for people and as JSON values for programs.

Values in, values out: nothing here opens a file, asks for a rank or needs torch. A report is a
tuple of blocks (lines, tables, sections); `render` makes text of it with rich, for a width and with
colour or without. Numbers of bytes print as GB = 10^9 bytes, three figures.

Rows fold (`model.layers.{0..31}.mlp.down_proj.weight`, 32 layers) only where the layers are
contiguous and every printed column is equal up to the layer's number.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from math import prod
from typing import TYPE_CHECKING, Any, TextIO

from lading import dtypes
from lading.checkpoint import Checkpoint, Source
from lading.plan import Binding, Plan, Share, Target
from lading.specs import Constant

if TYPE_CHECKING:
    from lading.launch import RankLoad
    from lading.verify import ElementCheck, LogitCheck

__all__ = [
    "Block",
    "Line",
    "Look",
    "Section",
    "Sections",
    "Table",
    "checks_json",
    "checks_report",
    "Indented",
    "fold",
    "indented",
    "inspect_json",
    "inspect_report",
    "load_json",
    "load_report",
    "look_of",
    "overview",
    "plan_json",
    "plan_report",
    "notes",
    "proof",
    "proof_block",
    "proof_lines",
    "render",
    "speed",
    "spell_bytes",
    "where",
]

Row = tuple[str, ...]

_CONSTANTS: Mapping[Constant, str] = {
    Constant.SHAPE: "has to be the layer's own sizes",
    Constant.GROUP_INDEX: "has to number the groups in order",
    Constant.ZERO: "has to be zero",
}

MAX_FOLD_LINES = 12
"""How many lines a note (casts, padding, skipped tensors) takes before it says how many more."""


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


# -------------------------------------------------------------------------------------------- fold

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
        for first, last, original in _runs(numbers[key, count]):
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


def _runs(found: list[tuple[int, Row]]) -> list[tuple[int, int, Row]]:
    """(first, last, row of the first) of each run of contiguous numbers."""
    runs: list[tuple[int, int, Row]] = []
    for number, row in sorted(found):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number, runs[-1][2])
        else:
            runs.append((number, number, row))
    return runs


def _folded_lines(rows: Iterable[Row], join: Callable[[Row], str]) -> list[Line]:
    """One indented line a folded row, with its count, and how many were left out."""
    folded = fold(dict.fromkeys(rows))
    lines = [
        Line(text=f"  {join(row)}{f' ({count} tensors)' if count > 1 else ''}")
        for row, count in folded[:MAX_FOLD_LINES]
    ]
    left = len(folded) - MAX_FOLD_LINES
    return [*lines, Line(text=f"  ... and {left} more (--json has all)")] if left > 0 else lines


# -------------------------------------------------------------------------------------------- plan


def proof(plan: Plan) -> str:
    """What the plan proves, in one line."""
    return "; ".join(proof_lines(plan))


def proof_block(plan: Plan) -> tuple[Block, ...]:
    """The same, to be shown."""
    lines = [Line(text=f"✓ {text}", style="green") for text in proof_lines(plan)]
    num_padding = sum(fill.region.num_elements for share in plan.shares for fill in share.fills)
    if num_padding:
        lines.insert(1, Line(text=f"  {num_padding:,} of them are declared padding, zeros"))
    return tuple(lines)


def proof_lines(plan: Plan) -> tuple[str, str]:
    """What it says of the parameters, and what of the checkpoint."""
    parameters = _parameters(plan)
    num_elements = sum(prod(target.layout.local_shape) for target in parameters)
    num_ranks = len(plan.shares)
    on = f" on {num_ranks} ranks" if num_ranks > 1 else f" on {plan.shares[0].ranks}"
    if plan.tp_size == 1:
        on = ""
    used, skipped = len(plan.sources), len(plan.skipped)
    return (
        f"{num_elements * num_ranks:,} elements in {count_of(len(parameters), 'parameter')}{on}: "
        "each written exactly once",
        f"{count_of(used + skipped, 'checkpoint tensor')}: {used:,} used, {skipped:,} skipped",
    )


def _parameters(plan: Plan) -> tuple[Target, ...]:
    """The targets that are filled; the others are compared and not kept."""
    return tuple(target for target in plan.targets if target.expected is None)


def plan_report(plan: Plan, *, look: Look, title: str, one_rank: bool) -> tuple[Block, ...]:
    """Bytes of each rank, where everything goes, what is special, and the proof.

    one_rank   the regions of the plan's only rank instead of the overview of all
    """
    tables: list[Block] = [_shares_table(plan), Line(text="")]
    tables.append(where(plan, look=look) if one_rank else overview(plan, look=look))
    return (
        Line(text=title, style="bold"),
        Line(text=""),
        *tables,
        *notes(plan),
        Line(text=""),
        *proof_block(plan),
    )


def _shares_table(plan: Plan) -> Table:
    """Bytes and copies of each rank; ranks that are alike, as most are, share a row."""
    alike: dict[Row, list[int]] = {}
    for share in plan.shares:
        row = (
            spell_bytes(plan.parameter_bytes()),
            spell_bytes(plan.share_bytes(share)),
            f"{len(share.copies):,}",
            spell_bytes(_padding_bytes(plan, share)),
        )
        alike.setdefault(row, []).append(share.ranks.tp_rank)
    heads = ("rank", "parameters", "of the checkpoint", "copies", "padding")
    rows = tuple((_spell_ranks(ranks), *row) for row, ranks in alike.items())
    return Table(heads=heads, rows=rows, right=(1, 2, 3, 4))


def _padding_bytes(plan: Plan, share: Share) -> int:
    return sum(
        fill.region.num_elements * dtypes.BITS[plan.target(fill.target).dtype] // 8
        for fill in share.fills
    )


def overview(plan: Plan, *, look: Look) -> Sections:
    """Each parameter, the checkpoint tensors of its parts, how many pieces they are cut into."""

    def rows(target: Target, binding: Binding) -> list[Row]:
        source = plan.sources[binding.source]
        return [
            (
                "" if binding.part is None else str(binding.part),
                source.name,
                dtypes.spell(source.dtype, source.shape),
                _pieces(target, binding, plan.tp_size),
            )
        ]

    return _sections(plan, ("part", "checkpoint tensor", "is", "cut"), rows, look=look)


def _pieces(target: Target, binding: Binding, tp_size: int) -> str:
    """'8 pieces', '2 pieces, each on 4 ranks', 'whole'."""
    count = 1
    for cut in target.layout.cuts:
        for part in cut.axis.parts:
            if len(cut.axis.parts) == 1 or part.name == binding.part:
                count *= part.pieces(tp_size)
    if count == 1:
        return "whole"
    return (
        f"{count} pieces"
        if count == tp_size
        else f"{count} pieces, each on {tp_size // count} ranks"
    )


def where(plan: Plan, *, look: Look) -> Sections:
    """Each part of each parameter, by rank: region of the checkpoint tensor, of the parameter."""
    copies: dict[tuple[str, object], list[tuple[int, str, str]]] = {}
    for share in plan.shares:
        for copy in share.copies:
            copies.setdefault((copy.target, copy.part), []).append(
                (share.ranks.tp_rank, str(copy.source_region), str(copy.target_region))
            )

    def rows(target: Target, binding: Binding) -> list[Row]:
        alike: dict[tuple[str, str], list[int]] = {}
        for rank, source, into in copies.get((target.name, binding.part), []):
            alike.setdefault((source, into), []).append(rank)
        part = "" if binding.part is None else str(binding.part)
        found: list[Row] = []
        for (source, into), ranks in alike.items():
            found.append((part, binding.source, _spell_ranks(ranks), source, into))
        return found

    heads = ("part", "checkpoint tensor", "rank", "takes", "puts it at")
    return _sections(plan, heads, rows, look=look)


def _spell_ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0..2, 5'."""
    runs = _runs([(rank, ()) for rank in ranks])
    return ", ".join(str(first) if first == last else f"{first}..{last}" for first, last, _ in runs)


def _sections(
    plan: Plan, heads: Row, rows: Callable[[Target, Binding], list[Row]], *, look: Look
) -> Sections:
    """One section a parameter, equal layers folded: their headings and all their rows are equal."""
    bindings: dict[str, list[Binding]] = {}
    for binding in plan.bindings:
        bindings.setdefault(binding.target, []).append(binding)
    flat: list[Row] = []
    for target in _parameters(plan):
        found = [row for binding in bindings[target.name] for row in rows(target, binding)]
        note = dtypes.spell(target.dtype, target.layout.local_shape)
        aliases = ", ".join(target.aliases)
        # One row a parameter for `fold`; the cells of its rows are joined by what is in no name.
        flat.append((target.name, note, aliases, *("\x1f".join(row) for row in found)))
    sections = []
    for (name, note, aliases, *cells), count in fold(flat):
        notes = [note]
        notes += [f"also {aliases}"] if aliases else []
        notes += [f"{count} {_counted(name)}"] if count > 1 else []
        body = [_shown_row(tuple(cell.split("\x1f")), name, look) for cell in cells]
        sections.append(
            Section(heading=name, note=", ".join(notes), rows=tuple(_without_repeats(body)))
        )
    if all(not row[0] for section in sections for row in section.rows):
        sections = [
            Section(heading=s.heading, note=s.note, rows=tuple(row[1:] for row in s.rows))
            for s in sections
        ]
        heads = heads[1:]
    return Sections(heads=heads, sections=tuple(sections))


def _counted(folded: str) -> str:
    """What a folded name counts: layers, or with experts in them just how many there are."""
    return "layers" if folded.count("{") == 1 else "times"


def _shown_row(row: Row, parameter: str, look: Look) -> Row:
    """The checkpoint tensor's name, in little space without what the parameter's begins with."""
    part, source, *rest = row
    if source == parameter:
        return (part, "same name", *rest)
    if look.is_wide:
        return row
    ours, theirs = parameter.split("."), source.split(".")
    same = [one == two for one, two in zip(ours, theirs, strict=False)]
    num_shared = same.index(False) if False in same else 0
    return (part, f"…{'.'.join(theirs[num_shared:])}" if num_shared else source, *rest)


def _without_repeats(rows: Sequence[Row]) -> list[Row]:
    """Part and tensor once, above the ranks that take from it."""
    shown = []
    before: Row = ()
    for row in rows:
        shown.append(("", "", *row[2:]) if row[:2] == before else row)
        before = row[:2]
    return shown


def notes(plan: Plan) -> tuple[Block, ...]:
    """Casts, padding, ties and skipped tensors: what is not a plain copy."""
    found: list[Block] = []

    def note(title: str, lines: list[Line]) -> None:
        if lines:
            found.extend((Line(text=""), Line(text=title, style="yellow"), *lines))

    casts = [(name, dtypes.printed(a), dtypes.printed(b)) for name, a, b in plan.casts()]
    note("cast:", _folded_lines(casts, lambda row: f"{row[0]}: {row[1]} to {row[2]}"))
    fills = [
        (fill.target, str(fill.region), str(share.ranks.tp_rank))
        for share in plan.shares
        for fill in share.fills
    ]
    padding = "padding, set to zero, in no checkpoint tensor:"
    note(padding, _folded_lines(fills, lambda row: f"{row[0]}: {row[1]} on rank {row[2]}"))
    ties = [(tie.target, tie.source, tie.twin) for tie in plan.ties]
    tied = "tied, both tensors are read and have to be equal:"
    note(tied, _folded_lines(ties, lambda row: f"{row[0]}: {row[1]}, {row[2]}"))
    checks = [(check.source, _CONSTANTS[check.constant]) for check in plan.checks()]
    note("read and compared, not kept:", _folded_lines(checks, lambda row: f"{row[0]}: {row[1]}"))
    skipped = [(one.source, one.reason) for one in plan.skipped]
    note("skipped:", _folded_lines(skipped, lambda row: f"{row[0]}: {row[1]}"))
    return tuple(found)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan, for --json; the plan itself is `plan_json.plan_to_json`'s."""
    return {
        "tp_size": plan.tp_size,
        "num_parameters": len(_parameters(plan)),
        "num_elements": sum(prod(target.layout.local_shape) for target in _parameters(plan)),
        "parameter_bytes": plan.parameter_bytes(),
        "checkpoint_bytes": plan.checkpoint_bytes(),
        "num_tensors_used": len(plan.sources),
        "num_tensors_skipped": len(plan.skipped),
        "ranks": [
            {
                "tp_rank": share.ranks.tp_rank,
                "parameter_bytes": plan.parameter_bytes(),
                "kept_bytes": plan.share_bytes(share),
                "num_copies": len(share.copies),
                "padding_elements": sum(fill.region.num_elements for fill in share.fills),
            }
            for share in plan.shares
        ],
        "casts": [{"parameter": n, "stored": a, "dtype": b} for n, a, b in plan.casts()],
        "skipped": [{"tensor": one.source, "reason": one.reason} for one in plan.skipped],
        "ties": [
            {"parameter": tie.target, "tensor": tie.source, "twin": tie.twin} for tie in plan.ties
        ],
        "compared": [
            {"tensor": check.source, "constant": check.constant.value} for check in plan.checks()
        ],
        "digest": plan.digest,
        "proof": proof(plan),
    }


# ----------------------------------------------------------------------------------------- inspect


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


# ------------------------------------------------------------------------------------ load, verify


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
    style, mark, are = ("green", "✓", "are") if logits.ok else ("red", "✗", "are not")
    against = f"transformers {logits.transformers_version}"
    return (
        Line(text=f"{mark} logits: {logits.num_logits:,} {are} as {against} has them", style=style),
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
            "max_abs_diff": logits.max_abs_diff,
            "tolerance": logits.tolerance,
            "transformers_version": logits.transformers_version,
        },
    }


# ------------------------------------------------------------------------------------------ render


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
