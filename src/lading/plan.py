"""A plan: every copy from checkpoint tensors to parameters, for a set of ranks, proved.

`make_plan` is pure: declarations, headers and ranks in, a frozen value out, or every problem at
once (a PlanError). It opens no file, touches no tensor and needs no torch, so that all ranks can be
planned in one process. Which tensor goes where does not depend on the rank, so all ranks reach one
verdict.

What a plan proves, from the regions alone:
    each element of each parameter is written exactly once, or is declared padding;
    each element of each used checkpoint tensor is kept by at least one rank: none is dropped;
    each checkpoint tensor is used, compared with its tied twin, skipped by a rule, or an error.
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
    DeclarationError,
    DtypeError,
    LadingError,
    LayoutError,
    MissingTensorError,
    PlanError,
    ShapeError,
    SurplusTensorError,
)
from lading.layouts import Layout, PartName
from lading.names import Names
from lading.proof import Worked, work_out
from lading.ranks import Ranks
from lading.regions import Copy, Region
from lading.specs import Constant

__all__ = [
    "Binding",
    "Check",
    "Expected",
    "Fill",
    "Plan",
    "Share",
    "Skipped",
    "Target",
    "Tie",
    "make_plan",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a stored tensor's values have to be; such a tensor is compared and not kept.

    constant        which rule
    outputs, inputs, group   O, I of the stored tensor's part, and the group size, for the rules
    """

    constant: Constant
    outputs: tuple[tuple[PartName, int], ...] = ()
    inputs: int = 0
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A parameter (or buffer) to fill.

    name      qualified name in the model
    layout    its parts and cuts; its tp_size is that of the ranks
    dtype     in the safetensors spelling, "BF16"
    aliases   other names of the same tensor (tied weights)
    leaf      what follows the module's name in the checkpoint, where that is not the last component
              of the name: "weight.absmax"
    stored    the checkpoint tensor's shape where it is another view of the layout's elements; -1
              stands for all that is left
    expected  the values that the tensor must have: then it is no parameter, but compared
    """

    name: str
    layout: Layout
    dtype: str
    aliases: tuple[str, ...] = ()
    leaf: str = ""
    stored: tuple[int, ...] | None = None
    expected: Expected | None = None

    def __post_init__(self) -> None:
        if self.dtype not in dtypes.BITS:
            raise DeclarationError(
                f"is of dtype {self.dtype!r}, needs one of: {', '.join(dtypes.BITS)}",
                subject=self.name,
            )


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
class Check:
    """A checkpoint tensor whose values follow from the declaration: read, compared, not kept.

    numbers   SHAPE: (O, I); GROUP_INDEX: (number of inputs, group size); ZERO: none
    """

    target: str
    source: str
    constant: Constant
    numbers: tuple[int, ...]


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
        return sum(
            prod(t.layout.local_shape) * dtypes.storage_bytes(t.dtype)
            for t in self.targets
            if t.expected is None
        )

    def checks(self) -> tuple[Check, ...]:
        """The tensors that are compared with what the declaration says."""
        found = {}
        for binding in self.bindings:
            expected = self.target(binding.target).expected
            if expected is not None:
                numbers = _expected_numbers(expected, binding)
                check = Check(
                    target=binding.target,
                    source=binding.source,
                    constant=expected.constant,
                    numbers=numbers,
                )
                found[binding.source] = check
        return tuple(found.values())

    def checkpoint_bytes(self) -> int:
        """Bytes of the checkpoint tensors that are used, each counted once."""
        return sum(source.num_bytes for source in self.sources.values())

    def share_bytes(self, share: Share) -> int:
        """Bytes of the checkpoint that one rank keeps."""
        return sum(
            copy.source_region.num_elements * dtypes.storage_bytes(self.sources[copy.source].dtype)
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
            [(c.source, c.constant.value, c.numbers) for c in self.checks()],
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
    _check_ranks(targets, ranks)
    layouts = work_out({target.name: target.layout for target in targets})
    binder = _Binder(sources, names or Names(), where, layouts)
    for target in targets:
        binder.bind(target)
    skipped = binder.leftovers()
    if binder.problems:
        raise PlanError(binder.problems)
    return _assemble(
        targets,
        sources,
        binder.bindings,
        ranks=ranks,
        ties=tuple(binder.ties),
        skipped=skipped,
        layouts=layouts,
    )


def prove_bindings(
    targets: Sequence[Target],
    sources: Mapping[str, Source],
    bindings: Sequence[Binding],
    *,
    ranks: Sequence[Ranks],
    ties: tuple[Tie, ...] = (),
    skipped: tuple[Skipped, ...] = (),
) -> Plan:
    """The plan of bindings that somebody else has found, checked and proved like make_plan's own.

    Each binding names a target, one of its parts, and a source that exist: the caller has checked
    that. Shapes, dtypes and coverage are checked here, all problems raised in one PlanError.
    """
    _check_ranks(targets, ranks)
    layouts = work_out({target.name: target.layout for target in targets})
    by_name = {target.name: target for target in targets}
    problems = [
        _binding_problem(by_name[b.target], layouts[b.target], b, sources[b.source])
        for b in bindings
    ] + [_tie_problem(tie, sources, None) for tie in ties]
    found = [problem for problem in problems if problem is not None]
    if found:
        raise PlanError(found)
    return _assemble(
        targets, sources, bindings, ranks=ranks, ties=ties, skipped=skipped, layouts=layouts
    )


def _assemble(
    targets: Sequence[Target],
    sources: Mapping[str, Source],
    bindings: Sequence[Binding],
    *,
    ranks: Sequence[Ranks],
    ties: tuple[Tie, ...],
    skipped: tuple[Skipped, ...],
    layouts: Mapping[str, Worked],
) -> Plan:
    grouped: dict[str, list[Binding]] = {target.name: [] for target in targets}
    for binding in bindings:
        grouped[binding.target].append(binding)
    problems = [
        LayoutError(fact, subject=name)
        for name, of_target in grouped.items()
        for fact in layouts[name].faults(tuple((b.part, b.fused) for b in of_target))
    ]
    if problems:
        raise PlanError(problems)
    used = {binding.source for binding in bindings} | {tie.twin for tie in ties}
    compared = frozenset(target.name for target in targets if target.expected is not None)
    return Plan(
        targets=tuple(targets),
        sources={name: source for name, source in sources.items() if name in used},
        bindings=tuple(bindings),
        shares=tuple(_share(one, grouped, layouts, compared) for one in ranks),
        ties=ties,
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

    def __init__(
        self,
        sources: Mapping[str, Source],
        names: Names,
        where: str,
        layouts: Mapping[str, Worked],
    ) -> None:
        self.sources, self.names, self.where, self.layouts = sources, names, where, layouts
        self.bindings: list[Binding] = []
        self.ties: list[Tie] = []
        self.problems: list[LadingError] = []
        self.used: set[str] = set()

    def bind(self, target: Target) -> None:
        """Binds every part of a target, or notes why it cannot be."""
        before = len(self.problems)
        found: list[list[Binding]] = []
        for name in _stored_names(target):
            bindings = self._look_up(target, name)
            if bindings:
                found.append(bindings)
        is_found = len(self.problems) == before
        if is_found and not found:
            self._note_missing(target)
            return
        layout = self.layouts[target.name]
        first = found[0] if found else []
        for binding in first:  # of what is there, also where a part is missing
            problem = _binding_problem(target, layout, binding, self.sources[binding.source])
            if problem is not None:
                self.problems.append(problem)
        if not is_found:
            return
        self.bindings += first
        for other in found[1:]:
            self._tie(target, first, other)

    def _look_up(self, target: Target, name: str) -> list[Binding]:
        """The bindings under one of a target's names; none where the file has nothing of it."""
        whole = self.names.whole(name)
        parts = self.layouts[target.name].part_names
        if len(parts) == 1:
            return [self._binding(target, parts[0], whole)] if whole in self.sources else []
        try:
            stored = self.names.parts(name, len(parts), target.leaf)
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
        parts = self.layouts[target.name].part_names
        name = _stored_names(target)[0]
        whole = self.names.whole(name)
        stored = self.names.parts(name, len(parts), target.leaf) if len(parts) > 1 else None
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

    def _tie(self, target: Target, kept: list[Binding], other: list[Binding]) -> None:
        """A second name of a tied parameter is in the file too: to be compared, not ignored."""
        found = {
            Tie(target=target.name, source=one.source, twin=two.source): one.part
            for one, two in zip(kept, other, strict=True)
            if one.source != two.source  # two names of the model may be one in the file
        }
        for tie, part in found.items():
            problem = _tie_problem(tie, self.sources, part)
            if problem is not None:
                self.problems.append(problem)
            else:
                self.ties.append(tie)

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


def _binding_problem(
    target: Target, worked: Worked, binding: Binding, source: Source
) -> LadingError | None:
    """Why this checkpoint tensor cannot be that part, None where it can."""
    layout = worked.layout
    needed = worked.source_shape(binding.part, fused=binding.fused)
    # A 0-d tensor is as good as one of one element: scales are stored both ways.
    shape = source.storage_shape
    is_fitting = shape == needed or (shape == () and needed == (1,))
    if target.stored is not None:
        needed = _stored_shape(target.stored, needed)
        is_fitting = shape == needed
    problem = dtypes.cast_problem(source.dtype, target.dtype)
    if is_fitting and problem is None:
        return None
    if binding.fused and binding.part != worked.part_names[0]:
        return None  # one fused tensor, one message
    found = f"checkpoint tensor {source.name!r} is {dtypes.spell(source.dtype, source.shape)}"
    want = f"needs {dtypes.spell(target.dtype, needed)}"
    part = None if binding.fused else binding.part
    if not is_fitting:
        why = "as the format stores it"
        if target.stored is None:
            why = _why_shape(layout, binding, source.shape, needed)
        return ShapeError(
            f"{found}, {want} ({why})", subject=target.name, part=part, file=source.file
        )
    return DtypeError(
        f"{found}, {want} ({problem})", subject=target.name, part=part, file=source.file
    )


def _stored_names(target: Target) -> tuple[str, ...]:
    """The target's names as the checkpoint spells them, before naming rules."""
    names = (target.name, *target.aliases)
    if not target.leaf:
        return names
    return tuple(f"{name.rpartition('.')[0]}.{target.leaf}" for name in names)


def _stored_shape(pattern: tuple[int, ...], needed: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a pattern with one -1 has for the elements of `needed`."""
    rest = prod(n for n in pattern if n != -1)
    return tuple(prod(needed) // rest if n == -1 else n for n in pattern)


def _expected_numbers(expected: Expected, binding: Binding) -> tuple[int, ...]:
    if expected.constant is Constant.SHAPE:
        sizes = dict(expected.outputs)
        outputs = sum(sizes.values()) if binding.fused else sizes[binding.part]
        return outputs, expected.inputs
    if expected.constant is Constant.GROUP_INDEX:
        return expected.inputs, expected.group
    return ()


def _tie_problem(tie: Tie, sources: Mapping[str, Source], part: PartName) -> LadingError | None:
    """Why two checkpoint tensors cannot be equal, None where they can."""
    a, b = sources[tie.source], sources[tie.twin]
    if (a.shape, a.dtype) == (b.shape, b.dtype):
        return None
    return ShapeError(
        f"tied checkpoint tensor {b.name!r} is {dtypes.spell(b.dtype, b.shape)}, needs "
        f"{dtypes.spell(a.dtype, a.shape)} (as {a.name!r}, to which it is tied)",
        subject=tie.target,
        part=part,
        file=b.file,
    )


def _why_shape(
    layout: Layout, binding: Binding, found: tuple[int, ...], needed: tuple[int, ...]
) -> str:
    """Where the needed number comes from: '4096 = in_features of the layer'."""
    if len(found) != len(needed):
        return f"{len(needed)} dims"
    reasons = {
        _why_entries(layout, dim, binding, want): None
        for dim, (have, want) in enumerate(zip(found, needed, strict=True))
        if have != want
    }
    text = ", ".join(reasons)
    return f"{text}; the file has it transposed" if found == needed[::-1] else text


def _why_entries(layout: Layout, dim: int, binding: Binding, want: int) -> str:
    cut = layout.cuts[dim]
    name, size = cut.axis.name or "the declared size", cut.axis.size
    if dim == layout.fused_dim and not binding.fused:
        part = next(part for part in cut.axis.parts if part.name == binding.part)
        name, size = f"the part's share of {name}", part.size
        if part.unit > 1:
            name = f"{size // part.unit} {part.unit_name or 'units'} of {part.unit}"
    if cut.grain == 1:
        return f"{want} = {name}"
    rounded = ", rounded up" if want * cut.grain != size else ""
    reason = f"; {cut.reason}" if cut.reason else ""
    return f"{want} = {size} / {cut.grain}{rounded}: {name}{reason}"


def _share(
    ranks: Ranks,
    grouped: Mapping[str, Sequence[Binding]],
    layouts: Mapping[str, Worked],
    compared: frozenset[str],
) -> Share:
    copies: list[Copy] = []
    fills: list[Fill] = []
    for name, bindings in grouped.items():
        layout = layouts[name]
        if name in compared:
            continue
        for binding in bindings:
            placement = layout.place(binding.part, ranks.tp_rank, fused=binding.fused)
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
        fills += (Fill(target=name, region=region) for region in layout.padding(ranks.tp_rank))
    return Share(ranks=ranks, copies=tuple(copies), fills=tuple(fills))
