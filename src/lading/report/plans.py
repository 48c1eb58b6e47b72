"""A plan as text and as JSON values: what is proved, and where everything goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import Any

from lading import dtypes
from lading.plan import Binding, Plan, Share, Target
from lading.regions import Region
from lading.report.blocks import (
    Block,
    Line,
    Look,
    Row,
    Section,
    Sections,
    Table,
    count_of,
    spell_bytes,
)
from lading.report.folding import fold, folded_lines, runs_of
from lading.specs import Constant

_CONSTANTS: Mapping[Constant, str] = {
    Constant.SHAPE: "has to be the layer's own sizes",
    Constant.GROUP_INDEX: "has to number the groups in order",
    Constant.ZERO: "has to be zero",
}


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
    num_ranks = len(plan.shares)
    on = f" on {num_ranks} ranks" if num_ranks > 1 else f" on {plan.shares[0].ranks}"
    if plan.tp_size == 1:
        on = ""
    used, skipped = len(plan.sources), len(plan.skipped)
    return (
        f"{_num_elements(plan):,} elements in {count_of(len(parameters), 'parameter')}{on}: "
        "each written exactly once",
        f"{count_of(used + skipped, 'checkpoint tensor')}: {used:,} used, {skipped:,} skipped",
    )


def _parameters(plan: Plan) -> tuple[Target, ...]:
    """The targets that are filled; the others are compared and not kept."""
    return tuple(target for target in plan.targets if target.expected is None)


def _num_elements(plan: Plan) -> int:
    """Of the parameters of all ranks that are planned for."""
    local = sum(prod(target.layout.local_shape) for target in _parameters(plan))
    return local * len(plan.shares)


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
    kept: dict[tuple[str, object], set[Region]] = {}
    for share in plan.shares:
        for copy in share.copies:
            kept.setdefault((copy.target, copy.part), set()).add(copy.source_region)

    def rows(target: Target, binding: Binding) -> list[Row]:
        source = plan.sources[binding.source]
        straddles = any(cut.straddle for cut in target.layout.cuts)
        regions = kept.get((target.name, binding.part), set())
        return [
            (
                "" if binding.part is None else str(binding.part),
                source.name,
                dtypes.spell(source.dtype, source.shape),
                _shared_pieces(regions, plan.tp_size)
                if straddles
                else _pieces(target, binding, plan.tp_size),
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


def _shared_pieces(regions: Collection[Region], tp_size: int) -> str:
    """The same where a cut may go through an entry, which both sides then keep: 'whole',
    '2 pieces, shared' (some entries are in both), '2 pieces, each on 4 ranks'.
    """
    if len(regions) < 2:
        return "whole"
    text = f"{len(regions)} pieces"
    spans = [
        (min(r.start[dim] for r in regions), max(r.start[dim] + r.size[dim] for r in regions))
        for dim in range(len(next(iter(regions)).start))
    ]
    if sum(region.num_elements for region in regions) > prod(b - a for a, b in spans):
        return f"{text}, shared"
    return text if len(regions) == tp_size else f"{text}, each on {tp_size // len(regions)} ranks"


def where(plan: Plan, *, look: Look) -> Sections:
    """Each part of each parameter, by rank: region of the checkpoint tensor, of the parameter."""
    copies: dict[tuple[str, object], list[tuple[int, str, str]]] = {}
    for share in plan.shares:
        for copy in share.copies:
            copies.setdefault((copy.target, copy.part), []).append(
                (share.ranks.tp_rank, str(copy.source_region), str(copy.target_region))
            )

    padded: dict[str, list[int]] = {}
    for share in plan.shares:
        for name in dict.fromkeys(fill.target for fill in share.fills):
            padded.setdefault(name, []).append(share.ranks.tp_rank)

    def rows(target: Target, binding: Binding) -> list[Row]:
        alike: dict[tuple[str, str], list[int]] = {}
        for rank, source, into in copies.get((target.name, binding.part), []):
            alike.setdefault((source, into), []).append(rank)
        part = "" if binding.part is None else str(binding.part)
        found: list[Row] = []
        for (source, into), ranks in alike.items():
            found.append((part, binding.source, _spell_ranks(ranks), source, into))
        if target.name in padded:
            held = {rank for ranks in alike.values() for rank in ranks}
            empty = [rank for rank in padded[target.name] if rank not in held]
            if empty:
                found.append((part, binding.source, _spell_ranks(empty), "nothing", "padding only"))
        return found

    heads = ("part", "checkpoint tensor", "rank", "takes", "puts it at")
    return _sections(plan, heads, rows, look=look)


def _spell_ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0..2, 5'."""
    runs = runs_of([(rank, ()) for rank in ranks])
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
    note("cast:", folded_lines(casts, lambda row: f"{row[0]}: {row[1]} to {row[2]}"))
    fills = [
        (fill.target, str(fill.region), str(share.ranks.tp_rank))
        for share in plan.shares
        for fill in share.fills
    ]
    padding = "padding, set to zero, in no checkpoint tensor:"
    note(padding, folded_lines(fills, lambda row: f"{row[0]}: {row[1]} on rank {row[2]}"))
    ties = [(tie.target, tie.source, tie.twin) for tie in plan.ties]
    tied = "tied, both tensors are read and have to be equal:"
    note(tied, folded_lines(ties, lambda row: f"{row[0]}: {row[1]}, {row[2]}"))
    checks = [(check.source, _CONSTANTS[check.constant]) for check in plan.checks()]
    note("read and compared, not kept:", folded_lines(checks, lambda row: f"{row[0]}: {row[1]}"))
    skipped = [(one.source, one.reason) for one in plan.skipped]
    note("skipped:", folded_lines(skipped, lambda row: f"{row[0]}: {row[1]}"))
    return tuple(found)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan, for --json; the plan itself is `plan_json.plan_to_json`'s."""
    return {
        "tp_size": plan.tp_size,
        "num_parameters": len(_parameters(plan)),
        "num_elements": _num_elements(plan),
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
