"""Plans as JSON values, so that another process or machine can make, look at or execute them.

`plan_to_json` writes plain values; `plan_from_json` believes none of them. It parses each one into
the type that it claims to be, works the copies out again from layouts and bindings, proves over all
ranks that they cover, and compares them with the copies in the file. Every fault is a PlanFileError
whose subject says where: "sources['model.norm.weight'].shape".

    "format": "lading.plan", "version": 1, "tp_size": T
    "ranks"     [[tp_rank, tp_size, ep_rank, ep_size]]
    "sources"   {name: {"dtype", "shape", "file", "bytes": [offset, count]}}
    "layouts"   [[{"axis", "parts", "grain", ...} for each dim]]; defaults are left out
    "targets"   [{"name", "layout": position in "layouts", "dtype", "aliases"}]
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

import reprlib
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import prod
from typing import Any, NoReturn, TypeVar

from lading import dtypes
from lading.checkpoint import Source
from lading.errors import LadingError, PlanError, PlanFileError
from lading.layouts import Axis, Cut, Layout, Part, PartName
from lading.plan import Binding, Fill, Plan, Share, Skipped, Target, Tie, prove_bindings
from lading.ranks import Ranks
from lading.regions import Copy, Region

__all__ = ["FORMAT", "VERSION", "plan_from_json", "plan_to_json"]

FORMAT = "lading.plan"
VERSION = 1
MAX_RANKS = 4096
"""A file that claims more ranks is not believed: the proof works through all of them."""
_MAX_INT = 2**63 - 1

_T = TypeVar("_T")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


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
        "layouts": [[_cut_to_json(cut) for cut in layout.cuts] for layout in layouts],
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
    facts: dict[str, Any] = {"name": target.name, "layout": layout, "dtype": target.dtype}
    return facts | ({"aliases": list(target.aliases)} if target.aliases else {})


def _cut_to_json(cut: Cut) -> dict[str, Any]:
    grain = cut.grain
    facts: dict[str, Any] = {"parts": [_part_to_json(part) for part in cut.axis.parts]}
    if cut.axis.name:
        facts["axis"] = cut.axis.name
    if grain != 1:
        facts["grain"] = int(grain) if grain.denominator == 1 else str(grain)
    if cut.ragged:
        facts["ragged"] = True
    if cut.reason:
        facts["reason"] = cut.reason
    return facts


def _part_to_json(part: Part) -> dict[str, Any]:
    facts: dict[str, Any] = {"size": part.size}
    for name, value, default in (
        ("name", part.name, None),
        ("max_pieces", part.max_pieces, None),
        ("unit", part.unit, 1),
        ("unit_name", part.unit_name, ""),
        ("pad_to", part.pad_to, 0),
    ):
        if value != default:
            facts[name] = value
    return facts


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
    facts = _object(
        value,
        "plan",
        "format version tp_size ranks sources layouts targets bindings ties skipped shares",
    )
    if facts["format"] != FORMAT:
        _fail("format", f"is {_short.repr(facts['format'])}, needs {FORMAT!r}")
    if type(facts["version"]) is not int or facts["version"] != VERSION:
        _fail("version", f"is {_short.repr(facts['version'])}, needs {VERSION}")
    tp_size = _int(facts["tp_size"], "tp_size", at_least=1, at_most=MAX_RANKS)
    ranks = _list(facts["ranks"], "ranks", lambda v, at: _ranks(v, at, tp_size))
    if not ranks or len(set(ranks)) < len(ranks):
        _fail("ranks", f"names {len(ranks)} ranks, needs at least one and each once")
    sources = {
        name: _source(v, f"sources[{name!r}]", name)
        for name, v in _mapping(facts["sources"], "sources").items()
    }
    layouts = _list(facts["layouts"], "layouts", lambda v, at: _layout(v, at, tp_size))
    targets = _list(facts["targets"], "targets", lambda v, at: _target(v, at, layouts))
    by_name: dict[str, Target] = {}
    for i, target in enumerate(targets):
        if by_name.setdefault(target.name, target) is not target:
            _fail(f"targets[{i}].name", f"is {target.name!r}, needs a name of its own")
    bindings = _list(facts["bindings"], "bindings", lambda v, at: _binding(v, at, by_name, sources))
    _check_fused(bindings)
    bound = {(binding.target, binding.source) for binding in bindings}
    ties = _list(facts["ties"], "ties", lambda v, at: _tie(v, at, bound, sources))
    skipped = _list(facts["skipped"], "skipped", lambda v, at: _skipped(v, at, sources))
    try:
        plan = prove_bindings(
            targets, sources, bindings, ranks=ranks, ties=tuple(ties), skipped=tuple(skipped)
        )
    except LadingError as error:
        first = error.problems[0] if isinstance(error, PlanError) else error
        raise PlanFileError(f"is not proved: {first}", subject="plan") from error
    if len(plan.sources) < len(sources):
        unused = next(name for name in sources if name not in plan.sources)
        _fail(f"sources[{unused!r}]", "is in no binding and no tie, needs to be in one")
    _compare(plan, facts["shares"])
    return plan


def _compare(plan: Plan, value: object) -> None:
    """The file's copies are those that follow from its layouts and bindings, each, in order."""
    shares = _list(value, "shares", lambda v, at: _object(v, at, "copies fills"))
    if len(shares) != len(plan.shares):
        _fail("shares", f"has {len(shares)} shares, needs {len(plan.shares)} (one for each rank)")
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
    items = _items(values, at)
    for i, (item, want) in enumerate(zip(items, needed, strict=False)):
        found = parse(item, f"{at}[{i}]", want)
        if found != want:
            why = f"from layout and binding, for {ranks}"
            _fail(f"{at}[{i}]", f"is {_told(found)}, needs {_told(want)} ({why})")
    if len(items) != len(needed):
        kind = at.rpartition(".")[2]
        _fail(at, f"has {len(items)} {kind}, needs {len(needed)} (for {ranks})")


def _told(thing: object) -> str:
    if isinstance(thing, Copy):
        part = "" if thing.part is None else f", part {thing.part!r}"
        return f"{thing.source} {thing.source_region} to {thing.target}{part} {thing.target_region}"
    assert isinstance(thing, Fill), "a share is copies and fills"
    return f"zeros to {thing.target} {thing.region}"


def _copy(value: object, at: str, want: Copy) -> Copy:
    """A copy; its regions lie in the same views of its tensors as those of the wanted copy."""
    facts = _object(value, at, "source target part from to")
    found = {
        "source": _text(facts["source"], f"{at}.source"),
        "target": _text(facts["target"], f"{at}.target"),
        "part": _part_name(facts["part"], f"{at}.part"),
    }
    needed = {"source": want.source, "target": want.target, "part": want.part}
    for key, name in found.items():
        if name != needed[key]:
            _fail(f"{at}.{key}", f"is {name!r}, needs {needed[key]!r} (the order of the bindings)")
    source_region = _region(facts["from"], f"{at}.from", want.source_region.shape)
    target_region = _region(facts["to"], f"{at}.to", want.target_region.shape)
    if source_region.size != target_region.size:
        _fail(at, f"copies {source_region} to {target_region}, needs equal sizes")
    return Copy(
        source=want.source,
        target=want.target,
        part=want.part,
        source_region=source_region,
        target_region=target_region,
    )


def _fill(value: object, at: str, want: Fill) -> Fill:
    facts = _object(value, at, "target to")
    target = _text(facts["target"], f"{at}.target")
    if target != want.target:
        _fail(f"{at}.target", f"is {target!r}, needs {want.target!r} (the order of the targets)")
    return Fill(target=target, region=_region(facts["to"], f"{at}.to", want.region.shape))


def _region(value: object, at: str, shape: tuple[int, ...]) -> Region:
    spans = _list(value, at, _span)
    if len(spans) != len(shape):
        _fail(at, f"has {len(spans)} dims, needs {len(shape)} (the tensor is {list(shape)})")
    start, size, step = zip(*spans, strict=True) if spans else ((), (), ())
    try:
        return Region(shape=shape, start=start, size=size, step=step)
    except ValueError as error:
        _fail(at, str(error))


def _span(value: object, at: str) -> tuple[int, int, int]:
    numbers = _list(value, at, _int)
    if len(numbers) not in (2, 3) or numbers[1] < numbers[0] or 0 in numbers[2:]:
        _fail(at, f"is {numbers}, needs [start, stop] or [start, stop, step]")
    start, stop, step = (*numbers, 1)[:3]
    size = -(-(stop - start) // step)
    return start, size, step


def _ranks(value: object, at: str, tp_size: int) -> Ranks:
    numbers = _list(value, at, _int)
    if len(numbers) != 4 or numbers[1] != tp_size:
        _fail(at, f"is {numbers}, needs [tp_rank, {tp_size}, ep_rank, ep_size]")
    tp_rank, _, ep_rank, ep_size = numbers
    return Ranks(tp_rank=tp_rank, tp_size=tp_size, ep_rank=ep_rank, ep_size=ep_size)


def _source(value: object, at: str, name: str) -> Source:
    facts = _object(value, at, "dtype shape file bytes")
    dtype = _dtype(facts["dtype"], f"{at}.dtype")
    shape = tuple(_list(facts["shape"], f"{at}.shape", _int))
    offset_and_count = _list(facts["bytes"], f"{at}.bytes", _int)
    if len(offset_and_count) != 2:
        _fail(f"{at}.bytes", f"is {offset_and_count}, needs [offset, count]")
    offset_bytes, num_bytes = offset_and_count
    if num_bytes * 8 != prod(shape) * dtypes.BITS[dtype]:
        bits = prod(shape) * dtypes.BITS[dtype]
        _fail(
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
    file = _text(value, at)
    steps = file.split("/")
    if {"", ".", ".."} & set(steps) or "\\" in file or ":" in steps[0] or "\0" in file:
        _fail(at, f"is {_short.repr(file)}, needs a file inside the checkpoint's folder")
    return file


def _layout(value: object, at: str, tp_size: int) -> Layout:
    return Layout(cuts=tuple(_list(value, at, _cut)), tp_size=tp_size)


def _cut(value: object, at: str) -> Cut:
    facts = _object(value, at, "parts", "axis grain ragged reason")
    parts = tuple(_list(facts["parts"], f"{at}.parts", _part))
    return Cut(
        axis=Axis(parts=parts, name=_text(facts.get("axis", ""), f"{at}.axis")),
        grain=_grain(facts.get("grain", 1), f"{at}.grain"),
        ragged=_bool(facts.get("ragged", False), f"{at}.ragged"),
        reason=_text(facts.get("reason", ""), f"{at}.reason"),
    )


def _part(value: object, at: str) -> Part:
    facts = _object(value, at, "size", "name max_pieces unit unit_name pad_to")
    pieces = facts.get("max_pieces")
    return Part(
        name=_part_name(facts.get("name"), f"{at}.name"),
        size=_int(facts["size"], f"{at}.size"),
        max_pieces=None if pieces is None else _int(pieces, f"{at}.max_pieces"),
        unit=_int(facts.get("unit", 1), f"{at}.unit"),
        unit_name=_text(facts.get("unit_name", ""), f"{at}.unit_name"),
        pad_to=_int(facts.get("pad_to", 0), f"{at}.pad_to"),
    )


def _grain(value: object, at: str) -> Fraction:
    if isinstance(value, str):
        over, slash, under = value.partition("/")
        digits = [n for n in (over, under) if n.isascii() and n.isdigit() and len(n) <= 18]
        if slash and len(digits) == 2 and int(under):
            return Fraction(int(over), int(under))
        _fail(at, f"is {_short.repr(value)}, needs a number or 'n/d'")
    return Fraction(_int(value, at))


def _target(value: object, at: str, layouts: list[Layout]) -> Target:
    facts = _object(value, at, "name layout dtype", "aliases")
    layout = _int(facts["layout"], f"{at}.layout")
    if layout >= len(layouts):
        _fail(f"{at}.layout", f"is {layout}, needs the position of one of {len(layouts)} layouts")
    return Target(
        name=_text(facts["name"], f"{at}.name"),
        layout=layouts[layout],
        dtype=_dtype(facts["dtype"], f"{at}.dtype"),
        aliases=tuple(_list(facts.get("aliases", []), f"{at}.aliases", _text)),
    )


def _binding(
    value: object, at: str, targets: Mapping[str, Target], sources: Mapping[str, Source]
) -> Binding:
    facts = _object(value, at, "target part source fused")
    target = _known(facts["target"], f"{at}.target", targets, "targets")
    part = _part_name(facts["part"], f"{at}.part")
    fused = _bool(facts["fused"], f"{at}.fused")
    parts = targets[target].layout.part_names
    if part not in parts:
        _fail(f"{at}.part", f"is {part!r}, needs one of: {', '.join(map(repr, parts))}")
    if fused and len(parts) == 1:
        _fail(f"{at}.fused", f"is true, needs false ({target!r} has one part)")
    source = _known(facts["source"], f"{at}.source", sources, "sources")
    return Binding(target=target, part=part, source=source, fused=fused)


def _check_fused(bindings: Iterable[Binding]) -> None:
    """What is fused on disk is one tensor: the proof looks at the shape of the first part only."""
    first: dict[str, str] = {}
    for i, binding in enumerate(bindings):
        if binding.fused and first.setdefault(binding.target, binding.source) != binding.source:
            needed = first[binding.target]
            _fail(
                f"bindings[{i}].source",
                f"is {binding.source!r}, needs {needed!r} (which holds all parts)",
            )


def _tie(value: object, at: str, bound: set[tuple[str, str]], sources: Mapping[str, Source]) -> Tie:
    facts = _object(value, at, "target source twin")
    target, source = _text(facts["target"], f"{at}.target"), _text(facts["source"], f"{at}.source")
    twin = _known(facts["twin"], f"{at}.twin", sources, "sources")
    if (target, source) not in bound:
        _fail(at, f"ties {source!r} to {target!r}, needs a binding of the two")
    if twin == source:
        _fail(f"{at}.twin", f"is {twin!r}, needs another tensor than the source")
    return Tie(target=target, source=source, twin=twin)


def _skipped(value: object, at: str, sources: Mapping[str, Source]) -> Skipped:
    facts = _object(value, at, "source reason")
    source = _text(facts["source"], f"{at}.source")
    if source in sources:
        _fail(f"{at}.source", f"is {source!r}, needs a tensor that is not among the sources")
    return Skipped(source=source, reason=_text(facts["reason"], f"{at}.reason"))


def _object(value: object, at: str, keys: str, optional: str = "") -> dict[str, Any]:
    """A JSON object that has all of `keys` and nothing but `optional` ones besides."""
    found = _mapping(value, at)
    needed = keys.split()
    for key in needed:
        if key not in found:
            _fail(at, f"has no key {key!r}, needs {', '.join(needed)}")
    for key in found:
        if key not in needed and key not in optional.split():
            known = ", ".join((*needed, *optional.split()))
            _fail(at, f"has the key {_short.repr(key)}, needs no others than {known}")
    return found


def _mapping(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _fail(at, f"is {_short.repr(value)}, needs an object")
    for key in value:
        if not isinstance(key, str):
            _fail(at, f"has the key {_short.repr(key)}, needs strings")
    return value


def _items(value: object, at: str) -> list[Any]:
    if not isinstance(value, list):
        _fail(at, f"is {_short.repr(value)}, needs a list")
    return value


def _list(value: object, at: str, parse: Callable[[object, str], _T]) -> list[_T]:
    """Each item, parsed; what a value's own type refuses becomes a fault of the file."""
    return [_parsed(parse, item, f"{at}[{i}]") for i, item in enumerate(_items(value, at))]


def _parsed(parse: Callable[[object, str], _T], value: object, at: str) -> _T:
    try:
        return parse(value, at)
    except PlanFileError:
        raise
    except LadingError as error:
        raise PlanFileError(f"cannot be: {error}", subject=at) from error


def _int(value: object, at: str, *, at_least: int = 0, at_most: int = _MAX_INT) -> int:
    if type(value) is not int or not at_least <= value <= at_most:
        _fail(at, f"is {_short.repr(value)}, needs an int from {at_least} to {at_most}")
    return value


def _bool(value: object, at: str) -> bool:
    if not isinstance(value, bool):
        _fail(at, f"is {_short.repr(value)}, needs true or false")
    return value


def _text(value: object, at: str) -> str:
    if not isinstance(value, str):
        _fail(at, f"is {_short.repr(value)}, needs a string")
    return value


def _part_name(value: object, at: str) -> PartName:
    if value is None or isinstance(value, str):
        return value
    if type(value) is int and abs(value) <= _MAX_INT:
        return value
    _fail(at, f"is {_short.repr(value)}, needs a string, an int or null")


def _dtype(value: object, at: str) -> str:
    dtype = _text(value, at)
    if dtype not in dtypes.BITS:
        _fail(at, f"is {_short.repr(dtype)}, needs one of: {', '.join(dtypes.BITS)}")
    return dtype


def _known(value: object, at: str, names: Mapping[str, object], where: str) -> str:
    name = _text(value, at)
    if name not in names:
        _fail(at, f"is {_short.repr(name)}, needs a name from {where}")
    return name


def _fail(at: str, fact: str) -> NoReturn:
    raise PlanFileError(fact, subject=at)
