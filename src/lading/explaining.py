"""Where one element is: in a parameter of a rank, in a checkpoint tensor, in a file. In both
directions, from the plan and the headers alone: no payload is read, no torch.

Whether one asks for a parameter or for a checkpoint tensor, the answer has one form: entries of
checkpoint tensors with their place in a file, each with all ranks that hold it. Regions and indices
are in the coordinates of the tensor that is named beside them.

    model.layers.0.self_attn.qkv_proj.weight [5, 3] on rank 1 of 2   (part q, 24 rows a rank)
    <->  model.layers.0.self_attn.q_proj.weight [29, 3]
    <->  bytes 2312:2314 of model.safetensors                        (64 columns of bf16)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from lading import dtypes
from lading.checkpoint import Checkpoint, Source
from lading.errors import CallError
from lading.layouts import PartName
from lading.plan import Plan, Share, Target
from lading.ranks import Ranks
from lading.regions import Ints, Region
from lading.routes import Holding, holdings
from lading.shards.folder import Sharded
from lading.views import ravel, through, unravel

__all__ = [
    "Box",
    "Covered",
    "Element",
    "Entry",
    "Explanation",
    "Kind",
    "close_names",
    "explain",
    "header_index",
]

Kind = Literal["parameter", "tensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """One entry of one rank's parameter.

    index    in the rank's own parameter
    """

    ranks: Ranks
    parameter: str
    part: PartName
    index: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """The logical elements along one dim of which a stored entry has something: start to stop.

    axis   what they are: "in_features of the layer", "part 'k' of out_features of the layer"
    """

    dim: int
    axis: str
    start: int
    stop: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One stored entry of a checkpoint tensor, and who holds it.

    index         in the tensor as its header has it; of two fp4 values in one entry, the first
    start_byte, stop_byte   in the file; in the tensor's own bytes where the format has no offsets
    stored        (file, first byte, last byte + 1) of each copy in a pre-sharded folder, whose
                  original files, to which the other bytes refer, need not exist
    covered       logical elements, along the dims where an entry covers other than one
    elements      in rank order; () where no rank keeps it
    """

    source: Source
    index: Ints
    start_byte: int
    stop_byte: int
    covered: tuple[Covered, ...]
    elements: tuple[Element, ...]
    stored: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A region of a checkpoint tensor that is a region of these ranks' parameters.

    source, source_region   None where the parameter's region is padding
    """

    ranks: tuple[Ranks, ...]
    parameter: str
    part: PartName
    target_region: Region
    source: Source | None
    source_region: Region | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What became of the question; entries where it had an index, boxes where it had none.

    kind       what `name` was taken as
    dtype, shape   the parameter's on each rank, or the checkpoint tensor's
    notes      why no rank keeps a tensor, a cast, a name that is both
    entries    in rank order of a parameter's index; one of a tensor's
    padding    ranks on which the index is padding
    """

    name: str
    kind: Kind
    tp_size: int
    dtype: str
    shape: Ints
    index: Ints | None
    has_offsets: bool
    notes: tuple[str, ...]
    entries: tuple[Entry, ...] = ()
    boxes: tuple[Box, ...] = ()
    padding: tuple[Ranks, ...] = ()
    source: Source | None = None


def explain(
    plan: Plan,
    checkpoint: Checkpoint,
    name: str,
    *,
    index: Ints | None = None,
    rank: int | None = None,
    kind: Kind | None = None,
) -> Explanation:
    """Where a parameter or a checkpoint tensor, or one entry of it, comes from and goes to.

    plan    for all ranks of the checkpoint's load
    index   of one entry: in the parameter of a rank, or in the tensor as its header has it
    rank    only this one
    kind    what a name is that is both; by default a parameter where `rank` is given
    Raises a CallError for a name, index or rank that is not there.
    """
    if rank is not None and not 0 <= rank < plan.tp_size:
        allowed = f"0 to {plan.tp_size - 1}" if plan.tp_size > 1 else "0"
        raise CallError(f"is {rank}, needs {allowed} (TP is {plan.tp_size})", subject="rank")
    targets = {name: target for target in plan.targets for name in (target.name, *target.aliases)}
    is_both = name in targets and name in checkpoint.tensors
    if kind is None and is_both:
        kind = "tensor" if rank is None else "parameter"
    asked = _Asked(plan, checkpoint, name, index, rank)
    if name in targets and kind != "tensor":
        return asked.parameter(targets[name], is_both=is_both)
    if name in checkpoint.tensors and kind != "parameter":
        return asked.tensor(checkpoint.tensors[name], is_both=is_both)
    raise _unknown(name, kind, targets, checkpoint)


class _Asked:
    """One question, and the ways to its answer."""

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, name: str, index: Ints | None, rank: int | None
    ) -> None:
        self.plan, self.checkpoint, self.name = plan, checkpoint, name
        self.index, self.rank = index, rank
        self.has_offsets = checkpoint.format == "safetensors"

    def parameter(self, target: Target, *, is_both: bool) -> Explanation:
        """Of a parameter, by its name or an alias."""
        notes = list(self._target_notes(target))
        if is_both:
            notes.append("a checkpoint tensor has this name, too; this is the parameter")
        shape = target.layout.local_shape
        entries: list[Entry] = []
        padding: list[Ranks] = []
        if self.index is not None:
            _check_index(self.name, self.index, shape)
            for share in self._shares() if target.expected is None else ():
                found = self._source_of(share, target, self.index)
                if found is None:
                    padding.append(share.ranks)
                else:
                    entries.append(self._entry(*found))
        boxes = self._parameter_boxes(target) if self.index is None else ()
        return self._answer(
            "parameter",
            target.dtype,
            shape,
            notes,
            entries=tuple(dict.fromkeys(entries)),
            boxes=boxes,
            padding=tuple(padding),
        )

    def tensor(self, source: Source, *, is_both: bool) -> Explanation:
        """Of a checkpoint tensor."""
        notes = list(self._source_notes(source))
        if is_both:
            notes.append("a parameter has this name, too; this is the checkpoint tensor")
        entries: tuple[Entry, ...] = ()
        boxes: tuple[Box, ...] = ()
        if self.index is None:
            boxes = self._tensor_boxes(source)
        else:
            _check_index(self.name, self.index, source.shape)
            entries = (self._entry(source, _storage_index(source, self.index), by=self.rank),)
        return self._answer(
            "tensor",
            source.dtype,
            source.shape,
            notes,
            entries=entries,
            boxes=boxes,
            source=source,
        )

    def _answer(
        self, kind: Kind, dtype: str, shape: Ints, notes: Sequence[str], **more: Any
    ) -> Explanation:
        if self.checkpoint.served_by is not None:
            notes = [*notes, "the folder is pre-sharded: bytes are those of the original file"]
        return Explanation(
            name=self.name,
            kind=kind,
            tp_size=self.plan.tp_size,
            dtype=dtype,
            shape=shape,
            index=self.index,
            has_offsets=self.has_offsets,
            notes=tuple(notes),
            **more,
        )

    def _shares(self) -> list[Share]:
        wanted = range(self.plan.tp_size) if self.rank is None else (self.rank,)
        return [share for share in self.plan.shares if share.ranks.tp_rank in wanted]

    def _held(self, source: Source, *, by: int | None = None) -> tuple[Holding, ...]:
        """Who keeps a tensor, or what one rank does; of a twin, who keeps what it is tied to."""
        held = holdings(self.plan).get(self._kept_name(source), ())
        return tuple(h for h in held if by is None or h.ranks.tp_rank == by)

    def _kept_name(self, source: Source) -> str:
        tied = {tie.twin: tie.source for tie in self.plan.ties}
        return tied.get(source.name, source.name)

    def _source_of(self, share: Share, target: Target, index: Ints) -> tuple[Source, Ints] | None:
        """The checkpoint tensor of a parameter's entry and its index there; None for padding."""
        at = ravel(index, target.layout.local_shape)
        for copy in share.copies:
            if copy.target == target.name:
                place = through(copy.invert(), at)
                if place is not None:
                    source = self.plan.sources[copy.source]
                    return source, unravel(place, source.storage_shape)
        return None

    def _entry(self, source: Source, index: Ints, *, by: int | None = None) -> Entry:
        """The stored entry at an index of the tensor that torch would hold, and who keeps it."""
        at = ravel(index, source.storage_shape)
        size = dtypes.storage_bytes(source.dtype)
        start = at * size + (source.offset_bytes if self.has_offsets else 0)
        elements = []
        for holding in self._held(source, by=by):
            place = through(holding.copy, at)
            if place is not None:
                shape = self.plan.target(holding.copy.target).layout.local_shape
                elements.append(
                    Element(
                        ranks=holding.ranks,
                        parameter=holding.copy.target,
                        part=holding.copy.part,
                        index=unravel(place, shape),
                    )
                )
        return Entry(
            source=source,
            index=header_index(source, index),
            start_byte=start,
            stop_byte=start + size,
            covered=tuple(self._covered(source, at)),
            elements=tuple(elements),
            stored=tuple(self._stored(source, at)),
        )

    def _stored(self, source: Source, at: int) -> Iterator[tuple[str, int, int]]:
        """Where a pre-sharded folder has the entry: in its ranks' files, or in that of the rest."""
        folder = self.checkpoint.served_by
        if not isinstance(folder, Sharded):
            return
        found = [(folder.rest[source.name], at)] if source.name in folder.rest else []
        for holding in holdings(folder.plan).get(source.name, ()):
            place = through(holding.copy, at)
            if place is not None:
                found.append((folder.stored[holding.ranks.tp_rank][holding.copy.target], place))
        for file, place in found:
            size = dtypes.storage_bytes(file.dtype)
            start = file.offset_bytes + place * size
            yield file.file, start, start + size

    def _covered(self, source: Source, at: int) -> Iterator[Covered]:
        """What an entry covers along the dims where that is not one element."""
        name = self._kept_name(source)
        binding = next((b for b in self.plan.bindings if b.source == name), None)
        if binding is None:
            return
        layout = self.plan.target(binding.target).layout
        shape = layout.fused_shape if binding.fused else layout.source_shape(binding.part)
        if prod(shape) != prod(source.storage_shape):
            return
        for dim, (cut, place) in enumerate(zip(layout.cuts, unravel(at, shape), strict=True)):
            if cut.grain == 1:
                continue
            size = cut.axis.size
            axis = cut.axis.name or ("rows" if dim == 0 else "columns")
            if not binding.fused and dim == layout.fused_dim:
                size = next(p.size for p in cut.axis.parts if p.name == binding.part)
                axis = f"part {binding.part!r} of {axis}"
            first, last = place * cut.grain, (place + 1) * cut.grain
            stop = -(-last.numerator // last.denominator)
            yield Covered(
                dim=dim,
                axis=axis,
                start=first.numerator // first.denominator,
                stop=min(stop, size),
                reason=cut.reason,
            )

    def _parameter_boxes(self, target: Target) -> tuple[Box, ...]:
        rows: dict[tuple[Any, ...], list[Ranks]] = {}
        for share in self._shares():
            for copy in share.copies:
                if copy.target == target.name:
                    key = (copy.part, copy.target_region, copy.source, copy.source_region)
                    rows.setdefault(key, []).append(share.ranks)
            for fill in share.fills:
                if fill.target == target.name:
                    rows.setdefault((None, fill.region, None, None), []).append(share.ranks)
        return tuple(
            Box(
                ranks=tuple(ranks),
                parameter=target.name,
                part=part,
                target_region=region,
                source=None if source is None else self.plan.sources[source],
                source_region=source_region,
            )
            for (part, region, source, source_region), ranks in rows.items()
        )

    def _tensor_boxes(self, source: Source) -> tuple[Box, ...]:
        rows: dict[tuple[Any, ...], list[Ranks]] = {}
        for holding in self._held(source, by=self.rank):
            copy = holding.copy
            key = (copy.target, copy.part, copy.target_region, copy.source_region)
            rows.setdefault(key, []).append(holding.ranks)
        return tuple(
            Box(
                ranks=tuple(ranks),
                parameter=parameter,
                part=part,
                target_region=region,
                source=source,
                source_region=source_region,
            )
            for (parameter, part, region, source_region), ranks in rows.items()
        )

    def _target_notes(self, target: Target) -> Iterator[str]:
        if target.expected is not None:
            yield f"is no parameter: the stored tensor is compared with {_constant(target)}"
            return
        if self.name != target.name:
            yield f"is another name of {target.name}"
        elif target.aliases:
            yield f"is also called {', '.join(target.aliases)}"
        for tie in self.plan.ties:
            if tie.target == target.name:
                yield f"its twin {tie.twin} is stored, too, and has to be equal to {tie.source}"
        for name, stored, dtype in self.plan.casts():
            if name == target.name:
                yield f"values are cast from {dtypes.printed(stored)} to {dtypes.printed(dtype)}"

    def _source_notes(self, source: Source) -> Iterator[str]:
        for skipped in self.plan.skipped:
            if skipped.source == source.name:
                yield f"is skipped, no rank keeps it: {skipped.reason}"
        for tie in self.plan.ties:
            if tie.twin == source.name:
                yield (
                    f"is tied to {tie.source}, and has to be equal to it: it is compared, and "
                    "the ranks keep the other"
                )
        for binding in self.plan.bindings:
            target = self.plan.target(binding.target)
            if binding.source == source.name and target.expected is not None:
                yield f"is compared with {_constant(target)}, no rank keeps it"
                return
        for name, stored, dtype in self.plan.casts():
            if any(b.source == source.name and b.target == name for b in self.plan.bindings):
                text = f"{dtypes.printed(stored)} to {dtypes.printed(dtype)}"
                yield f"values are cast from {text} in {name}"


def _constant(target: Target) -> str:
    assert target.expected is not None, "asked before"
    return f"what the declaration says ({target.expected.constant.value})"


def _per_entry(source: Source) -> int:
    """Elements along the last dim in one torch entry: 2 of fp4, else 1."""
    shape, stored = source.shape, source.storage_shape
    return shape[-1] // stored[-1] if shape and stored[-1] else 1


def _storage_index(source: Source, index: Ints) -> Ints:
    return (*index[:-1], index[-1] // _per_entry(source)) if index else ()


def header_index(source: Source, index: Ints) -> Ints:
    """The index of a stored entry in the tensor as its header has it."""
    return (*index[:-1], index[-1] * _per_entry(source)) if index else ()


def _check_index(name: str, index: Ints, shape: Ints) -> None:
    if len(index) != len(shape):
        dims = f"{len(shape)} number{'' if len(shape) == 1 else 's'}"
        raise CallError(
            f"index {list(index)} has {len(index)}, needs {dims} (its shape is {list(shape)})",
            subject=name,
        )
    for place, n in zip(index, shape, strict=True):
        if not 0 <= place < n:
            raise CallError(
                f"index {list(index)} is outside of it, needs {_limits(shape)} "
                f"(its shape is {list(shape)})",
                subject=name,
            )


def _limits(shape: Ints) -> str:
    return f"at most {[n - 1 for n in shape]}" if all(shape) else "an element, and it has none"


def close_names(name: str, names: Sequence[str]) -> str | None:
    """Names that may have been meant, as a hint."""
    found = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return " or ".join(found) if found else None


def _unknown(
    name: str, kind: Kind | None, targets: Mapping[str, Target], checkpoint: Checkpoint
) -> CallError:
    words = {"parameter": "no parameter", "tensor": "no checkpoint tensor"}
    found = words[kind] if kind else "neither a parameter nor a checkpoint tensor"
    names = [
        *(targets if kind != "tensor" else ()),
        *(checkpoint.tensors if kind != "parameter" else ()),
    ]
    return CallError(
        f"is {found} of {checkpoint.folder}",
        subject=name,
        hint=close_names(name, list(dict.fromkeys(names))),
    )
