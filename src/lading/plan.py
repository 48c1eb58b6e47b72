"""A plan: every copy from checkpoint tensors to parameters, for a set of ranks, proved.

`make_plan` is pure: declarations, headers and ranks in, a frozen value out, or every problem at once
(a PlanError). It opens no file, touches no tensor and needs no torch, so that all ranks can be planned
in one process. Which tensor goes where does not depend on the rank, so all ranks reach one verdict.

What a plan proves, from the regions alone:
    each element of each parameter is written exactly once, or is declared padding;
    each element of each used checkpoint tensor is kept by at least one rank: none is dropped;
    each checkpoint tensor is used, compared with its tied twin, skipped by a named rule, or an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from lading import dtypes
from lading.checkpoint import Source
from lading.errors import (
    CallError,
    DtypeError,
    LadingError,
    LayoutError,
    MissingTensorError,
    PlanError,
    ShapeError,
    SurplusTensorError,
)
from lading.layouts import Layout, PartName, Placement
from lading.names import Names
from lading.ranks import Ranks
from lading.regions import Copy, Coverage, Region, cover

__all__ = ["Binding", "Fill", "Plan", "Share", "Skipped", "Target", "Tie", "make_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A parameter (or buffer) to fill.

    name      qualified name in the model
    layout    its parts and cuts; its tp_size is that of the ranks
    dtype     in the safetensors spelling, "BF16"
    aliases   other names of the same tensor (tied weights)
    """

    name: str
    layout: Layout
    dtype: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """One part of one target is this checkpoint tensor: the same for every rank.

    fused   the checkpoint tensor holds all parts of the target side by side
    """

    target: str
    part: PartName
    source: str
    fused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """A box of a local parameter that is declared padding, and is set to zero."""

    target: str
    region: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """Two checkpoint tensors for one tied parameter: their bytes have to be equal."""

    target: str
    source: str
    twin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A checkpoint tensor that is left alone, and the rule's reason."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank does: its copies, in target order, and its fills."""

    ranks: Ranks
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A proved load. Build it with `make_plan`; a JSON value through `lading.plan_json`.

    targets    parameters, in model order
    sources    the checkpoint tensors that are used, by name
    bindings   which part is which tensor
    shares     one for each rank that was planned
    ties, skipped   tensors that are compared, or left alone
    """

    targets: tuple[Target, ...]
    sources: Mapping[str, Source]
    bindings: tuple[Binding, ...]
    shares: tuple[Share, ...]
    ties: tuple[Tie, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    _by_name: dict[str, Target] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {target.name: target for target in self.targets})

    @property
    def tp_size(self) -> int:
        """T."""
        return self.shares[0].ranks.tp_size

    def target(self, name: str) -> Target:
        """The target of this name."""
        return self._by_name[name]

    def share(self, ranks: Ranks) -> Share:
        """What one rank does. Raises a CallError where the plan was not made for it."""
        for share in self.shares:
            if share.ranks == ranks:
                return share
        planned = ", ".join(str(share.ranks) for share in self.shares)
        raise CallError(f"was made for {planned}, needs {ranks}", subject="plan")

    def parameter_bytes(self) -> int:
        """Bytes of the parameters that each rank holds, padding included."""
        return sum(prod(t.layout.local_shape) * dtypes.BITS[t.dtype] // 8 for t in self.targets)

    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoint tensors that are used, each counted once."""
        return sum(source.num_bytes for source in self.sources.values())

    def share_bytes(self, share: Share) -> int:
        """Bytes of the checkpoint that one rank keeps."""
        return sum(
            copy.source_region.num_elements * dtypes.BITS[self.sources[copy.source].dtype] // 8
            for copy in share.copies
        )

    def casts(self) -> tuple[tuple[str, str, str], ...]:
        """(target, stored dtype, parameter dtype) wherever the two differ."""
        found = {
            (b.target, self.sources[b.source].dtype, self.target(b.target).dtype): None
            for b in self.bindings
        }
        return tuple(key for key in found if key[1] != key[2])

    @cached_property
    def digest(self) -> str:
        """A sha256 of all that does not depend on the rank; equal on all ranks of a load."""
        facts = [
            [(b.target, b.part, b.source, b.fused) for b in self.bindings],
            [(s.name, s.dtype, s.shape, s.file, s.offset_bytes) for s in self.sources.values()],
            [(t.name, t.dtype, t.layout.local_shape, t.layout.tp_size) for t in self.targets],
            [(t.target, t.source, t.twin) for t in self.ties],
            [s.source for s in self.skipped],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make_plan(
    targets: Iterable[Target],
    sources: Mapping[str, Source],
    *,
    ranks: Sequence[Ranks],
    names: Names | None = None,
    where: str = "the checkpoint",
) -> Plan:
    """Every copy of the given ranks, proved; or a PlanError with every problem.

    targets   the parameters, with layouts for the ranks' tp_size
    sources   the checkpoint's tensors by name, from its headers
    where     what messages call the checkpoint
    """
    targets = tuple(targets)
    names = names or Names()
    _check_ranks(targets, ranks)
    binder = _Binder(sources, names, where)
    for target in targets:
        binder.bind(target)
    skipped = binder.leftovers()
    if binder.problems:
        raise PlanError(binder.problems)
    by_name = {target.name: target for target in targets}
    prover = _Prover()
    problems: list[LadingError] = []
    grouped: dict[str, list[Binding]] = {target.name: [] for target in targets}
    for binding in binder.bindings:
        grouped[binding.target].append(binding)
    for name, bindings in grouped.items():
        problems += prover.prove(by_name[name], bindings)
    if problems:
        raise PlanError(problems)
    used = {binding.source for binding in binder.bindings} | {tie.twin for tie in binder.ties}
    return Plan(
        targets=targets,
        sources={name: source for name, source in sources.items() if name in used},
        bindings=tuple(binder.bindings),
        shares=tuple(_share(one, grouped, by_name, prover) for one in ranks),
        ties=tuple(binder.ties),
        skipped=skipped,
    )


def _check_ranks(targets: Sequence[Target], ranks: Sequence[Ranks]) -> None:
    if not ranks:
        raise CallError("names no rank, needs at least one", subject="make_plan")
    sizes = {one.tp_size for one in ranks} | {target.layout.tp_size for target in targets}
    if len(sizes) > 1:
        raise CallError(
            f"mixes tp_size {' and '.join(map(str, sorted(sizes)))}, needs one "
            "(the ranks' and every layout's)",
            subject="make_plan",
        )
    seen: set[str] = set()
    for target in targets:
        for name in (target.name, *target.aliases):
            if name in seen:
                raise CallError("is declared twice", subject=name)
            seen.add(name)


class _Binder:
    """Finds each part's checkpoint tensor and checks shape and dtype, collecting problems."""

    def __init__(self, sources: Mapping[str, Source], names: Names, where: str) -> None:
        self.sources, self.names, self.where = sources, names, where
        self.bindings: list[Binding] = []
        self.ties: list[Tie] = []
        self.problems: list[LadingError] = []
        self.used: set[str] = set()

    def bind(self, target: Target) -> None:
        """Binds every part of a target, or notes why it cannot be."""
        before = len(self.problems)
        found: list[list[Binding]] = []
        for name in (target.name, *target.aliases):
            bindings = self._look_up(target, name)
            if bindings:
                found.append(bindings)
        if len(self.problems) > before:
            return
        if not found:
            self._note_missing(target)
            return
        first = found[0]
        for binding in first:
            self._check(target, binding)
        self.bindings += first
        for other in found[1:]:
            self._tie(target, first, other)

    def _look_up(self, target: Target, name: str) -> list[Binding]:
        """The bindings under one of a target's names; none where the file has nothing of it."""
        whole = self.names.whole(name)
        parts = target.layout.part_names
        if len(parts) == 1:
            return [self._binding(target, parts[0], whole)] if whole in self.sources else []
        try:
            stored = self.names.parts(name, len(parts))
        except LadingError as error:
            self.problems.append(error)
            return []
        present = [n for n in stored or () if n in self.sources]
        if whole in self.sources:
            if present:
                self.used.update((whole, *present))
                self.problems.append(
                    SurplusTensorError(
                        f"the checkpoint has both the fused tensor {whole!r} and "
                        f"{', '.join(map(repr, present))}, needs one of the two",
                        subject=target.name,
                    )
                )
                return []
            return [self._binding(target, part, whole, fused=True) for part in parts]
        if stored is None or not present:
            return []
        for part, source in zip(parts, stored, strict=True):
            if source not in self.sources:
                self._missing(target, part, source, fused=whole)
        return [
            self._binding(target, part, source)
            for part, source in zip(parts, stored, strict=True)
            if source in self.sources
        ]

    def _binding(
        self, target: Target, part: PartName, source: str, *, fused: bool = False
    ) -> Binding:
        self.used.add(source)
        return Binding(target=target.name, part=part, source=source, fused=fused)

    def _note_missing(self, target: Target) -> None:
        parts = target.layout.part_names
        whole = self.names.whole(target.name)
        stored = self.names.parts(target.name, len(parts)) if len(parts) > 1 else None
        if stored is None:
            self._missing(target, None, whole, fused=None)
            return
        for part, source in zip(parts, stored, strict=True):
            self._missing(target, part, source, fused=whole)

    def _missing(self, target: Target, part: PartName, source: str, *, fused: str | None) -> None:
        either = f", nor a fused {fused!r}" if fused is not None else ""
        self.problems.append(
            MissingTensorError(
                f"{self.where} has no tensor {source!r}{either}", subject=target.name, part=part
            )
        )

    def _check(self, target: Target, binding: Binding) -> None:
        source, layout = self.sources[binding.source], target.layout
        needed = layout.fused_shape if binding.fused else layout.source_shape(binding.part)
        part = None if binding.fused else binding.part
        found = f"checkpoint tensor {source.name!r} is {dtypes.spell(source.dtype, source.shape)}"
        want = f"needs {dtypes.spell(target.dtype, needed)}"
        if source.shape != needed and not (source.shape == () and needed == (1,)):
            if binding.fused and binding.part != layout.part_names[0]:
                return  # one fused tensor, one message
            self.problems.append(
                ShapeError(
                    f"{found}, {want} ({_why_shape(layout, source.shape, needed)})",
                    subject=target.name,
                    part=part,
                    file=source.file,
                )
            )
            return
        problem = dtypes.cast_problem(source.dtype, target.dtype)
        if problem is not None and not (binding.fused and binding.part != layout.part_names[0]):
            self.problems.append(
                DtypeError(
                    f"{found}, {want} ({problem})",
                    subject=target.name,
                    part=part,
                    file=source.file,
                )
            )

    def _tie(self, target: Target, kept: list[Binding], other: list[Binding]) -> None:
        """A second name of a tied parameter is in the file too: to be compared, not ignored."""
        for one, two in zip(kept, other, strict=True):
            a, b = self.sources[one.source], self.sources[two.source]
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                self.problems.append(
                    ShapeError(
                        f"tied checkpoint tensor {b.name!r} is {dtypes.spell(b.dtype, b.shape)}, needs "
                        f"{dtypes.spell(a.dtype, a.shape)} (as {a.name!r}, to which config.json ties it)",
                        subject=target.name,
                        part=one.part,
                        file=b.file,
                    )
                )
            else:
                self.ties.append(Tie(target=target.name, source=a.name, twin=b.name))

    def leftovers(self) -> tuple[Skipped, ...]:
        """What no parameter takes: skipped by a rule, or a problem."""
        skipped = []
        for name, source in self.sources.items():
            if name in self.used:
                continue
            rule = self.names.skipped_by(name)
            if rule is not None:
                skipped.append(Skipped(source=name, reason=rule.reason))
                continue
            self.problems.append(
                SurplusTensorError(
                    f"checkpoint tensor {dtypes.spell(source.dtype, source.shape)} belongs to no "
                    "parameter, and no rule skips it",
                    subject=name,
                    file=source.file,
                )
            )
        return tuple(skipped)


def _why_shape(layout: Layout, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    """Where the needed number comes from: '4096 = in_features of the layer'."""
    if len(found) != len(needed):
        return f"{len(needed)} dims"
    reasons = []
    for cut, have, want in zip(layout.cuts, found, needed, strict=True):
        if have != want:
            reasons.append(f"{want} = {cut.axis.name}" if cut.axis.name else f"{want}, not {have}")
    text = ", ".join(dict.fromkeys(reasons))
    return f"{text}; the file has it transposed" if found == needed[::-1] else text


class _Prover:
    """Placements by (layout, part, rank), each layout worked out and proved once."""

    def __init__(self) -> None:
        self._placements: dict[tuple[int, PartName, int, bool], Placement | None] = {}
        self._padding: dict[tuple[int, int], tuple[Region, ...]] = {}
        self._proved: dict[tuple[int, tuple[tuple[PartName, bool], ...]], list[str]] = {}
        # Hashing a Layout walks its values: equal layouts are interned, and then known by their id.
        self._known: dict[Layout, Layout] = {}
        self._by_id: dict[int, Layout] = {}

    def place(self, layout: Layout, binding: Binding, tp_rank: int) -> Placement | None:
        """What rank r keeps of a binding's part."""
        key = (id(self._intern(layout)), binding.part, tp_rank, binding.fused)
        try:
            return self._placements[key]
        except KeyError:
            found = layout.place(binding.part, tp_rank, fused_source=binding.fused)
            return self._placements.setdefault(key, found)

    def padding(self, layout: Layout, tp_rank: int) -> tuple[Region, ...]:
        """The boxes of rank r's parameter that are padding."""
        key = (id(self._intern(layout)), tp_rank)
        if key not in self._padding:
            self._padding[key] = layout.padding(tp_rank)
        return self._padding[key]

    def _intern(self, layout: Layout) -> Layout:
        found = self._by_id.get(id(layout))
        if found is None:
            found = self._known.setdefault(layout, layout)
            self._by_id[id(layout)] = found
        return found

    def prove(self, target: Target, bindings: Sequence[Binding]) -> list[LadingError]:
        """The faults of one target over ALL ranks of its layout; a fault is lading's or a layout's."""
        layout = self._intern(target.layout)
        key = (id(layout), tuple((b.part, b.fused) for b in bindings))
        if key not in self._proved:
            try:
                self._proved[key] = list(self._faults(layout, bindings))
            except LayoutError as error:
                self._proved[key] = [error.fact]
        return [LayoutError(fact, subject=target.name) for fact in self._proved[key]]

    def _faults(self, layout: Layout, bindings: Sequence[Binding]) -> Iterable[str]:
        kept: dict[PartName | bool, dict[Region, None]] = {}
        shape = layout.local_shape
        for rank in range(layout.tp_size):
            written = list(self.padding(layout, rank))
            for binding in bindings:
                placement = self.place(layout, binding, rank)
                if placement is None:
                    continue
                written.append(placement.target)
                kept.setdefault(True if binding.fused else binding.part, {})[placement.source] = (
                    None
                )
            yield from _fault(cover(shape, written), f"rank {rank} of {layout.tp_size}")
        for part, regions in kept.items():
            source_shape = next(iter(regions)).shape
            yield from _fault(cover(source_shape, list(regions)), f"the file's part {part!r}")


def _fault(coverage: Coverage, where: str) -> Iterable[str]:
    if coverage.missing is not None:
        yield f"elements {coverage.missing} of {list(coverage.missing.shape)} are in no copy ({where})"
    if coverage.twice is not None:
        yield f"elements {coverage.twice} of {list(coverage.twice.shape)} are in two copies ({where})"


def _share(
    ranks: Ranks,
    grouped: Mapping[str, Sequence[Binding]],
    targets: Mapping[str, Target],
    prover: _Prover,
) -> Share:
    copies: list[Copy] = []
    fills: list[Fill] = []
    for name, bindings in grouped.items():
        layout = targets[name].layout
        for binding in bindings:
            placement = prover.place(layout, binding, ranks.tp_rank)
            if placement is not None:
                copies.append(
                    Copy(
                        source=binding.source,
                        target=name,
                        part=binding.part,
                        source_region=placement.source,
                        target_region=placement.target,
                    )
                )
        fills += (Fill(target=name, region=r) for r in prover.padding(layout, ranks.tp_rank))
    return Share(ranks=ranks, copies=tuple(copies), fills=tuple(fills))
