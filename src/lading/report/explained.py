"""Where elements are, as text and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lading import dtypes
from lading.checkpoint import Source
from lading.explaining import Box, Element, Entry, Explanation
from lading.ranks import Ranks
from lading.regions import Ints, Region
from lading.report.blocks import Block, Line, Table


def explain_report(found: Explanation) -> tuple[Block, ...]:
    """What was asked for, what is to be said of it, and its elements or its regions."""
    is_tensor = found.kind == "tensor"
    what = "checkpoint tensor" if is_tensor else f"parameter on each of {found.tp_size} ranks"
    if not is_tensor and found.tp_size == 1:
        what = "parameter"
    at = "" if found.index is None else f" {_index(found.index)}"
    title = f"{found.name}{at}: {what}, {dtypes.spell(found.dtype, found.shape)}"
    blocks: list[Block] = [Line(text=title, style="bold")]
    if found.source is not None:
        blocks.append(Line(text=f"  in {found.source.file}{_bytes_of(found)}"))
    blocks += [Line(text=f"  {note}") for note in found.notes]
    if found.padding:
        blocks.append(Line(text=f"  is padding on {_ranks(found.padding)}: no tensor fills it"))
    for entry in found.entries:
        blocks += [Line(text=""), *_entry_lines(entry, found.has_offsets)]
    if found.boxes:
        blocks += [Line(text=""), _boxes(found)]
    return tuple(blocks)


def _bytes_of(found: Explanation) -> str:
    source = found.source
    if source is None or not found.has_offsets:
        return ""
    return f", bytes {source.offset_bytes}:{source.offset_bytes + source.num_bytes}"


def _entry_lines(entry: Entry, has_offsets: bool) -> list[Block]:
    span = f"bytes {entry.start_byte}:{entry.stop_byte}"
    where = f"{span} of {entry.source.file}"
    if not has_offsets:
        where = f"{span} of the tensor's own, in {entry.source.file}"
    lines: list[Block] = [
        Line(
            text=f"  {entry.source.name} {_index(entry.index)} {dtypes.printed(entry.source.dtype)}"
        ),
        Line(text=f"    {where}"),
    ]
    lines += [Line(text=f"    here bytes {a}:{b} of {file}") for file, a, b in entry.stored]
    for covered in entry.covered:
        why = f" ({covered.reason})" if covered.reason else ""
        text = f"    covers {covered.start}:{covered.stop} of {covered.axis}{why}"
        lines.append(Line(text=text))
    if not entry.elements:
        lines.append(Line(text="    no rank asked for keeps it"))
    rows: dict[tuple[str, str | int | None, Ints], list[Ranks]] = {}
    for element in entry.elements:
        key = (element.parameter, element.part, element.index)
        rows.setdefault(key, []).append(element.ranks)
    for (parameter, part, index), ranks in rows.items():
        of_part = "" if part is None else f", part {part}"
        lines.append(Line(text=f"    {_ranks(ranks)}: {parameter} {_index(index)}{of_part}"))
    return lines


def _boxes(found: Explanation) -> Table:
    rows = []
    for box in found.boxes:
        source = "padding" if box.source is None else box.source.name
        region = "" if box.source_region is None else _region(box.source_region)
        part = "" if box.part is None else str(box.part)
        target = _region(box.target_region)
        rows.append((_ranks(box.ranks), box.parameter, part, target, source, region))
    heads = ("rank", "parameter", "part", "its region", "checkpoint tensor", "its region")
    return Table(heads=heads, rows=tuple(rows))


def _region(region: Region) -> str:
    return f"{region} of {list(region.shape)}"


def _index(index: Ints) -> str:
    return str(list(index))


def _ranks(ranks: Sequence[Ranks]) -> str:
    """rank 3; ranks 0, 1; ranks 0-7."""
    numbers = [one.tp_rank for one in ranks]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"ranks {numbers[0]}-{numbers[-1]}"
    return f"ranks {', '.join(map(str, numbers))}"


def explain_json(found: Explanation) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "name": found.name,
        "kind": found.kind,
        "tp_size": found.tp_size,
        "dtype": found.dtype,
        "shape": list(found.shape),
        "index": None if found.index is None else list(found.index),
        "tensor": None if found.source is None else _source_dict(found.source, found.has_offsets),
        "notes": list(found.notes),
        "entries": [_entry_dict(entry, found.has_offsets) for entry in found.entries],
        "boxes": [_box_dict(box) for box in found.boxes],
        "padding": [ranks.tp_rank for ranks in found.padding],
    }


def _source_dict(source: Source, has_offsets: bool) -> dict[str, Any]:
    start = source.offset_bytes
    return {
        "name": source.name,
        "dtype": source.dtype,
        "shape": list(source.shape),
        "file": source.file,
        "bytes": [start, start + source.num_bytes] if has_offsets else None,
    }


def _entry_dict(entry: Entry, has_offsets: bool) -> dict[str, Any]:
    span = [entry.start_byte, entry.stop_byte]
    return {
        "tensor": entry.source.name,
        "dtype": entry.source.dtype,
        "index": list(entry.index),
        "file": entry.source.file,
        "bytes": span if has_offsets else None,
        "tensor_bytes": None if has_offsets else span,
        "stored": [{"file": file, "bytes": [a, b]} for file, a, b in entry.stored],
        "covers": [
            {"dim": c.dim, "axis": c.axis, "start": c.start, "stop": c.stop, "reason": c.reason}
            for c in entry.covered
        ],
        "held": [_element_dict(element) for element in entry.elements],
    }


def _element_dict(element: Element) -> dict[str, Any]:
    return {
        "rank": element.ranks.tp_rank,
        "parameter": element.parameter,
        "part": element.part,
        "index": list(element.index),
    }


def _region_dict(region: Region | None) -> dict[str, Any] | None:
    if region is None:
        return None
    return {
        "shape": list(region.shape),
        "start": list(region.start),
        "size": list(region.size),
        "step": list(region.step),
    }


def _box_dict(box: Box) -> dict[str, Any]:
    return {
        "ranks": [ranks.tp_rank for ranks in box.ranks],
        "parameter": box.parameter,
        "part": box.part,
        "region": _region_dict(box.target_region),
        "tensor": None if box.source is None else box.source.name,
        "tensor_region": _region_dict(box.source_region),
    }
