"""Plans as JSON values, so that another process or machine can make, look at or execute them.

`plan_to_json` writes plain values; `plan_from_json` believes none of them. It parses each one into
the type that it claims to be, works the copies out again from layouts and bindings, proves over all
ranks that they cover, and compares them with the copies in the file. Every fault is a PlanFileError
whose subject says where: "sources['model.norm.weight'].shape".

    "format": "lading.plan", "version": 1, "tp_size": T
    "ranks"     [[tp_rank, tp_size, ep_rank, ep_size]]
    "sources"   {name: {"dtype", "shape", "file", "bytes": [offset, count]}}
    "layouts"   [{"dims": [{"axis", "parts", "grain", ...}], ...}]; defaults are left out
    "targets"   [{"name", "layout": position in "layouts", "dtype", "aliases", ...}]
    "bindings"  [{"target", "part", "source", "fused"}]
    "ties"      [{"target", "source", "twin"}]
    "skipped"   [{"source", "reason"}]
    "shares"    one a rank: {"copies": [{"source", "target", "part", "from", "to"}],
                             "fills": [{"target", "to"}]}

Regions are [[start, stop], ...], one pair a dim, and [start, stop, step] where every step-th
element is meant: "from" counts in the checkpoint tensor, "to" in the rank's parameter. A part is a
string, an int or null; a grain is 8 or "32/3".

Example: rank 1 of 2, part "up" of a gate_up_proj [8, 6]: {"source": "up_proj.weight", "target":
"gate_up_proj.weight", "part": "up", "from": [[2, 4], [0, 6]], "to": [[2, 4], [0, 6]]}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import prod
from typing import Any, TypeVar

from lading import dtypes
from lading.checkpoint import Source
from lading.errors import LadingError, PlanError, PlanFileError
from lading.json_values import (
    MAX_INT,
    fail,
    read_bool,
    read_int,
    read_items,
    read_list,
    read_mapping,
    read_object,
    read_text,
    short,
)
from lading.layouts import Axis, Cut, Layout, Part, PartName
from lading.plan import Binding, Expected, Fill, Plan, Share, Skipped, Target, Tie, prove_bindings
from lading.ranks import Ranks
from lading.regions import Copy, Region
from lading.specs import Constant

__all__ = ["FORMAT", "VERSION", "plan_from_json", "plan_to_json"]

FORMAT = "lading.plan"
VERSION = 1
MAX_RANKS = 4096
"""A file that claims more ranks is not believed: the proof works through all of them."""

_T = TypeVar("_T")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; `plan_from_json` gives an equal plan back."""
    layouts: dict[Layout, int] = {}
    by_id: dict[int, int] = {}
    for target in plan.targets:  # equal layouts are written once, and each object is hashed once
        if id(target.layout) not in by_id:
            by_id[id(target.layout)] = layouts.setdefault(target.layout, len(layouts))
    spans = _Spans()
    return {
        "format": FORMAT,
        "version": VERSION,
        "tp_size": plan.tp_size,
        "ranks": [_ranks_to_json(share.ranks) for share in plan.shares],
        "sources": {
            s.name: {
                "dtype": s.dtype,
                "shape": list(s.shape),
                "file": s.file,
                "bytes": [s.offset_bytes, s.num_bytes],
            }
            for s in plan.sources.values()
        },
        "layouts": [_layout_to_json(layout) for layout in layouts],
        "targets": [_target_to_json(t, by_id[id(t.layout)]) for t in plan.targets],
        "bindings": [
            {"target": b.target, "part": b.part, "source": b.source, "fused": b.fused}
            for b in plan.bindings
        ],
        "ties": [{"target": t.target, "source": t.source, "twin": t.twin} for t in plan.ties],
        "skipped": [{"source": s.source, "reason": s.reason} for s in plan.skipped],
        "shares": [_share_to_json(share, spans) for share in plan.shares],
    }


def _ranks_to_json(ranks: Ranks) -> list[int]:
    return [ranks.tp_rank, ranks.tp_size, ranks.ep_rank, ranks.ep_size]


def _target_to_json(target: Target, layout: int) -> dict[str, Any]:
    facts = {"name": target.name, "layout": layout, "dtype": target.dtype}
    return facts | _unless_default(
        ("aliases", list(target.aliases), []),
        ("leaf", target.leaf, ""),
        ("stored", None if target.stored is None else list(target.stored), None),
        ("expected", None if target.expected is None else _expected_to_json(target.expected), None),
    )


def _expected_to_json(expected: Expected) -> dict[str, Any]:
    return {"constant": expected.constant.value} | _unless_default(
        ("outputs", [list(pair) for pair in expected.outputs], []),
        ("inputs", expected.inputs, 0),
        ("group", expected.group, 0),
    )


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    dims = [_cut_to_json(cut) for cut in layout.cuts]
    return {"dims": dims} | _unless_default(("fused_source", layout.fused_source, False))


def _cut_to_json(cut: Cut) -> dict[str, Any]:
    grain = int(cut.grain) if cut.grain.denominator == 1 else str(cut.grain)
    return {"parts": [_part_to_json(part) for part in cut.axis.parts]} | _unless_default(
        ("axis", cut.axis.name, ""),
        ("scalars", cut.axis.scalars, False),
        ("grain", grain, 1),
        ("ragged", cut.ragged, False),
        ("straddle", cut.straddle, False),
        ("reason", cut.reason, ""),
        ("align", cut.align, 1),
        ("align_reason", cut.align_reason, ""),
    )


def _part_to_json(part: Part) -> dict[str, Any]:
    return {"size": part.size} | _unless_default(
        ("name", part.name, None),
        ("max_pieces", part.max_pieces, None),
        ("unit", part.unit, 1),
        ("unit_name", part.unit_name, ""),
        ("pad_to", part.pad_to, 0),
    )


def _unless_default(*facts: tuple[str, Any, Any]) -> dict[str, Any]:
    """The values that are not their default, of (name, value, default)."""
    return {name: value for name, value, default in facts if value != default}


def _share_to_json(share: Share, spans: _Spans) -> dict[str, Any]:
    copies = []
    for copy in share.copies:
        assert not copy.axes, "copies of a plan keep the order of dims: layouts know no other"
        copies.append(
            {
                "source": copy.source,
                "target": copy.target,
                "part": copy.part,
                "from": spans.of(copy.source_region),
                "to": spans.of(copy.target_region),
            }
        )
    fills = [{"target": fill.target, "to": spans.of(fill.region)} for fill in share.fills]
    return {"copies": copies, "fills": fills}


class _Spans:
    """Regions as lists; targets of one layout share their regions, so each is spelt once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Region, list[list[int]]]] = {}

    def of(self, region: Region) -> list[list[int]]:
        """[[start, stop], ...], or [start, stop, step] where the step is not 1."""
        known = self._known.get(id(region))
        if known is None:
            # The region is kept beside its spelling: an id is one object only while that lives.
            known = self._known[id(region)] = (region, _spans_of(region))
        return known[1]


def _spans_of(region: Region) -> list[list[int]]:
    spans = []
    for start, size, step in zip(region.start, region.size, region.step, strict=True):
        stop = start + (size - 1) * step + 1 if size else start
        spans.append([start, stop] if step == 1 else [start, stop, step])
    return spans


def plan_from_json(value: object) -> Plan:
    """The plan that a JSON value describes, proved again as if it had just been made.

    Raises a PlanFileError: for a value that is no plan or of another version, a key that is missing
    or unknown, a value of the wrong type, a name that does not exist, bytes that are not the
    tensor's, a tensor of the wrong shape or dtype, copies that leave an element out or differ from
    what layouts and bindings say.
    """
    facts = read_object(
        value,
        "plan",
        "format version tp_size ranks sources layouts targets bindings ties skipped shares",
    )
    if facts["format"] != FORMAT:
        fail("format", f"is {short(facts['format'])}, needs {FORMAT!r}")
    if type(facts["version"]) is not int or facts["version"] != VERSION:
        fail("version", f"is {short(facts['version'])}, needs {VERSION}")
    tp_size = read_int(facts["tp_size"], "tp_size", at_least=1, at_most=MAX_RANKS)
    ranks = read_list(facts["ranks"], "ranks", lambda v, at: _ranks(v, at, tp_size))
    if not ranks or len(set(ranks)) < len(ranks):
        fail("ranks", f"names {len(ranks)} ranks, needs at least one and each once")
    sources = {
        name: _source(v, f"sources[{name!r}]", name)
        for name, v in read_mapping(facts["sources"], "sources").items()
    }
    layouts = read_list(facts["layouts"], "layouts", lambda v, at: _layout(v, at, tp_size))
    targets = read_list(facts["targets"], "targets", lambda v, at: _target(v, at, layouts))
    by_name: dict[str, Target] = {}
    for i, target in enumerate(targets):
        if by_name.setdefault(target.name, target) is not target:
            fail(f"targets[{i}].name", f"is {target.name!r}, needs a name of its own")
    bindings = read_list(
        facts["bindings"], "bindings", lambda v, at: _binding(v, at, by_name, sources)
    )
    _check_fused(bindings)
    bound = {(binding.target, binding.source) for binding in bindings}
    ties = read_list(facts["ties"], "ties", lambda v, at: _tie(v, at, bound, sources))
    skipped = read_list(facts["skipped"], "skipped", lambda v, at: _skipped(v, at, sources))
    try:
        plan = prove_bindings(
            targets, sources, bindings, ranks=ranks, ties=tuple(ties), skipped=tuple(skipped)
        )
    except LadingError as error:
        first = error.problems[0] if isinstance(error, PlanError) else error
        raise PlanFileError(f"is not proved: {first}", subject="plan") from error
    if len(plan.sources) < len(sources):
        unused = next(name for name in sources if name not in plan.sources)
        fail(f"sources[{unused!r}]", "is in no binding and no tie, needs to be in one")
    _check_views(plan)
    _compare(plan, facts["shares"])
    return plan


def _check_views(plan: Plan) -> None:
    """Where a tensor is stored as another view of its elements, these are as many in both views."""
    for i, binding in enumerate(plan.bindings):
        layout = plan.target(binding.target).layout
        view = layout.fused_shape if binding.fused else layout.source_shape(binding.part)
        stored = plan.sources[binding.source].storage_shape
        if prod(stored) != prod(view):
            fail(f"bindings[{i}]", f"takes {list(stored)} as {list(view)}, needs as many elements")


def _compare(plan: Plan, value: object) -> None:
    """The file's copies are those that follow from its layouts and bindings, each, in order."""
    shares = read_list(value, "shares", lambda v, at: read_object(v, at, "copies fills"))
    if len(shares) != len(plan.shares):
        fail("shares", f"has {len(shares)} shares, needs {len(plan.shares)} (one for each rank)")
    for i, (share, found) in enumerate(zip(plan.shares, shares, strict=True)):
        _compare_each(found["copies"], f"shares[{i}].copies", share.copies, _copy, share.ranks)
        _compare_each(found["fills"], f"shares[{i}].fills", share.fills, _fill, share.ranks)


def _compare_each(
    values: object,
    at: str,
    needed: tuple[_T, ...],
    parse: Callable[[object, str, _T], _T],
    ranks: Ranks,
) -> None:
    items = read_items(values, at)
    for i, (item, want) in enumerate(zip(items, needed, strict=False)):
        found = parse(item, f"{at}[{i}]", want)
        if found != want:
            why = f"from layout and binding, for {ranks}"
            fail(f"{at}[{i}]", f"is {_told(found)}, needs {_told(want)} ({why})")
    if len(items) != len(needed):
        kind = at.rpartition(".")[2]
        fail(at, f"has {len(items)} {kind}, needs {len(needed)} (for {ranks})")


def _told(thing: object) -> str:
    if isinstance(thing, Copy):
        part = "" if thing.part is None else f", part {thing.part!r}"
        return f"{thing.source} {thing.source_region} to {thing.target}{part} {thing.target_region}"
    assert isinstance(thing, Fill), "a share is copies and fills"
    return f"zeros to {thing.target} {thing.region}"


def _copy(value: object, at: str, want: Copy) -> Copy:
    """A copy; its regions lie in the same views of its tensors as those of the wanted copy."""
    facts = read_object(value, at, "source target part from to")
    found = {
        "source": read_text(facts["source"], f"{at}.source"),
        "target": read_text(facts["target"], f"{at}.target"),
        "part": _part_name(facts["part"], f"{at}.part"),
    }
    needed = {"source": want.source, "target": want.target, "part": want.part}
    for key, name in found.items():
        if name != needed[key]:
            fail(f"{at}.{key}", f"is {name!r}, needs {needed[key]!r} (the order of the bindings)")
    source_region = _region(facts["from"], f"{at}.from", want.source_region.shape)
    target_region = _region(facts["to"], f"{at}.to", want.target_region.shape)
    if source_region.size != target_region.size:
        fail(at, f"copies {source_region} to {target_region}, needs equal sizes")
    return Copy(
        source=want.source,
        target=want.target,
        part=want.part,
        source_region=source_region,
        target_region=target_region,
    )


def _fill(value: object, at: str, want: Fill) -> Fill:
    facts = read_object(value, at, "target to")
    target = read_text(facts["target"], f"{at}.target")
    if target != want.target:
        fail(f"{at}.target", f"is {target!r}, needs {want.target!r} (the order of the targets)")
    return Fill(target=target, region=_region(facts["to"], f"{at}.to", want.region.shape))


def _region(value: object, at: str, shape: tuple[int, ...]) -> Region:
    spans = read_list(value, at, _span)
    if len(spans) != len(shape):
        fail(at, f"has {len(spans)} dims, needs {len(shape)} (the tensor is {list(shape)})")
    start, size, step = zip(*spans, strict=True) if spans else ((), (), ())
    try:
        return Region(shape=shape, start=start, size=size, step=step)
    except ValueError as error:
        fail(at, str(error))


def _span(value: object, at: str) -> tuple[int, int, int]:
    numbers = read_list(value, at, read_int)
    if len(numbers) not in (2, 3) or numbers[1] < numbers[0] or 0 in numbers[2:]:
        fail(at, f"is {numbers}, needs [start, stop] or [start, stop, step]")
    start, stop, step = (*numbers, 1)[:3]
    size = -(-(stop - start) // step)
    return start, size, step


def _ranks(value: object, at: str, tp_size: int) -> Ranks:
    numbers = read_list(value, at, read_int)
    if len(numbers) != 4 or numbers[1] != tp_size:
        fail(at, f"is {numbers}, needs [tp_rank, {tp_size}, ep_rank, ep_size]")
    tp_rank, _, ep_rank, ep_size = numbers
    return Ranks(tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank, ep_size=ep_size)


def _source(value: object, at: str, name: str) -> Source:
    facts = read_object(value, at, "dtype shape file bytes")
    dtype = _dtype(facts["dtype"], f"{at}.dtype")
    shape = tuple(read_list(facts["shape"], f"{at}.shape", read_int))
    offset_and_count = read_list(facts["bytes"], f"{at}.bytes", read_int)
    if len(offset_and_count) != 2:
        fail(f"{at}.bytes", f"is {offset_and_count}, needs [offset, count]")
    offset_bytes, num_bytes = offset_and_count
    if num_bytes * 8 != prod(shape) * dtypes.BITS[dtype]:
        bits = prod(shape) * dtypes.BITS[dtype]
        fail(
            f"{at}.bytes", f"counts {num_bytes}, needs {bits / 8:g} ({dtypes.spell(dtype, shape)})"
        )
    return Source(
        name=name,
        dtype=dtype,
        shape=shape,
        file=_file(facts["file"], f"{at}.file"),
        offset_bytes=offset_bytes,
        num_bytes=num_bytes,
    )


def _file(value: object, at: str) -> str:
    """A name inside the checkpoint's folder: a plan from elsewhere does not choose what is read."""
    file = read_text(value, at)
    steps = file.split("/")
    if {"", ".", ".."} & set(steps) or "\\" in file or ":" in steps[0] or "\0" in file:
        fail(at, f"is {short(file)}, needs a file inside the checkpoint's folder")
    return file


def _layout(value: object, at: str, tp_size: int) -> Layout:
    facts = read_object(value, at, "dims", "fused_source")
    return Layout(
        cuts=tuple(read_list(facts["dims"], f"{at}.dims", _cut)),
        tp_size=tp_size,
        fused_source=read_bool(facts.get("fused_source", False), f"{at}.fused_source"),
    )


def _cut(value: object, at: str) -> Cut:
    optional = "axis scalars grain ragged straddle reason align align_reason"
    facts = read_object(value, at, "parts", optional)
    return Cut(
        axis=Axis(
            parts=tuple(read_list(facts["parts"], f"{at}.parts", _part)),
            name=read_text(facts.get("axis", ""), f"{at}.axis"),
            scalars=read_bool(facts.get("scalars", False), f"{at}.scalars"),
        ),
        grain=_grain(facts.get("grain", 1), f"{at}.grain"),
        ragged=read_bool(facts.get("ragged", False), f"{at}.ragged"),
        straddle=read_bool(facts.get("straddle", False), f"{at}.straddle"),
        reason=read_text(facts.get("reason", ""), f"{at}.reason"),
        align=read_int(facts.get("align", 1), f"{at}.align"),
        align_reason=read_text(facts.get("align_reason", ""), f"{at}.align_reason"),
    )


def _part(value: object, at: str) -> Part:
    facts = read_object(value, at, "size", "name max_pieces unit unit_name pad_to")
    pieces = facts.get("max_pieces")
    return Part(
        name=_part_name(facts.get("name"), f"{at}.name"),
        size=read_int(facts["size"], f"{at}.size"),
        max_pieces=None if pieces is None else read_int(pieces, f"{at}.max_pieces"),
        unit=read_int(facts.get("unit", 1), f"{at}.unit"),
        unit_name=read_text(facts.get("unit_name", ""), f"{at}.unit_name"),
        pad_to=read_int(facts.get("pad_to", 0), f"{at}.pad_to"),
    )


def _grain(value: object, at: str) -> Fraction:
    if isinstance(value, str):
        over, slash, under = value.partition("/")
        digits = [n for n in (over, under) if n.isascii() and n.isdigit() and len(n) <= 18]
        if slash and len(digits) == 2 and int(under):
            return Fraction(int(over), int(under))
        fail(at, f"is {short(value)}, needs a number or 'n/d'")
    return Fraction(read_int(value, at))


def _target(value: object, at: str, layouts: list[Layout]) -> Target:
    facts = read_object(value, at, "name layout dtype", "aliases leaf stored expected")
    layout = read_int(facts["layout"], f"{at}.layout")
    if layout >= len(layouts):
        fail(f"{at}.layout", f"is {layout}, needs the position of one of {len(layouts)} layouts")
    stored, expected = facts.get("stored"), facts.get("expected")
    return Target(
        name=read_text(facts["name"], f"{at}.name"),
        layout=layouts[layout],
        dtype=_dtype(facts["dtype"], f"{at}.dtype"),
        aliases=tuple(read_list(facts.get("aliases", []), f"{at}.aliases", read_text)),
        leaf=read_text(facts.get("leaf", ""), f"{at}.leaf"),
        stored=None if stored is None else _stored(stored, f"{at}.stored"),
        expected=None
        if expected is None
        else _expected(expected, f"{at}.expected", layouts[layout].part_names),
    )


def _stored(value: object, at: str) -> tuple[int, ...]:
    pattern = tuple(read_list(value, at, lambda v, where: read_int(v, where, at_least=-1)))
    if 0 in pattern or pattern.count(-1) > 1:
        fail(at, f"is {list(pattern)}, needs sizes of at least 1 and at most one -1")
    return pattern


def _expected(value: object, at: str, parts: tuple[PartName, ...]) -> Expected:
    facts = read_object(value, at, "constant", "outputs inputs group")
    known = {constant.value: constant for constant in Constant}
    constant = known[_known(facts["constant"], f"{at}.constant", known, "the rules")]
    outputs = read_list(facts.get("outputs", []), f"{at}.outputs", _part_size)
    group = read_int(facts.get("group", 0), f"{at}.group")
    if constant is Constant.SHAPE and {name for name, _ in outputs} != set(parts):
        fail(f"{at}.outputs", f"is {outputs}, needs one size for each of the parts {list(parts)}")
    if constant is Constant.GROUP_INDEX and not group:
        fail(f"{at}.group", "is 0, needs at least 1")
    inputs = read_int(facts.get("inputs", 0), f"{at}.inputs")
    return Expected(constant=constant, outputs=tuple(outputs), inputs=inputs, group=group)


def _part_size(value: object, at: str) -> tuple[PartName, int]:
    pair = read_items(value, at)
    if len(pair) != 2:
        fail(at, f"is {short(pair)}, needs [part, size]")
    return _part_name(pair[0], f"{at}[0]"), read_int(pair[1], f"{at}[1]")


def _binding(
    value: object, at: str, targets: Mapping[str, Target], sources: Mapping[str, Source]
) -> Binding:
    facts = read_object(value, at, "target part source fused")
    target = _known(facts["target"], f"{at}.target", targets, "targets")
    part = _part_name(facts["part"], f"{at}.part")
    fused = read_bool(facts["fused"], f"{at}.fused")
    parts = targets[target].layout.part_names
    if part not in parts:
        fail(f"{at}.part", f"is {part!r}, needs one of: {', '.join(map(repr, parts))}")
    if fused and len(parts) == 1:
        fail(f"{at}.fused", f"is true, needs false ({target!r} has one part)")
    source = _known(facts["source"], f"{at}.source", sources, "sources")
    return Binding(target=target, part=part, source=source, fused=fused)


def _check_fused(bindings: Iterable[Binding]) -> None:
    """What is fused on disk is one tensor: the proof looks at the shape of the first part only."""
    first: dict[str, str] = {}
    for i, binding in enumerate(bindings):
        if binding.fused and first.setdefault(binding.target, binding.source) != binding.source:
            needed = first[binding.target]
            fail(
                f"bindings[{i}].source",
                f"is {binding.source!r}, needs {needed!r} (which holds all parts)",
            )


def _tie(value: object, at: str, bound: set[tuple[str, str]], sources: Mapping[str, Source]) -> Tie:
    facts = read_object(value, at, "target source twin")
    target, source = (
        read_text(facts["target"], f"{at}.target"),
        read_text(facts["source"], f"{at}.source"),
    )
    twin = _known(facts["twin"], f"{at}.twin", sources, "sources")
    if (target, source) not in bound:
        fail(at, f"ties {source!r} to {target!r}, needs a binding of the two")
    if twin == source:
        fail(f"{at}.twin", f"is {twin!r}, needs another tensor than the source")
    return Tie(target=target, source=source, twin=twin)


def _skipped(value: object, at: str, sources: Mapping[str, Source]) -> Skipped:
    facts = read_object(value, at, "source reason")
    source = read_text(facts["source"], f"{at}.source")
    if source in sources:
        fail(f"{at}.source", f"is {source!r}, needs a tensor that is not among the sources")
    return Skipped(source=source, reason=read_text(facts["reason"], f"{at}.reason"))


def _part_name(value: object, at: str) -> PartName:
    if value is None or isinstance(value, str):
        return value
    if type(value) is int and abs(value) <= MAX_INT:
        return value
    fail(at, f"is {short(value)}, needs a string, an int or null")


def _dtype(value: object, at: str) -> str:
    dtype = read_text(value, at)
    if dtype not in dtypes.BITS:
        fail(at, f"is {short(dtype)}, needs one of: {', '.join(dtypes.BITS)}")
    return dtype


def _known(value: object, at: str, names: Mapping[str, object], where: str) -> str:
    name = read_text(value, at)
    if name not in names:
        fail(at, f"is {short(name)}, needs a name from {where}")
    return name
