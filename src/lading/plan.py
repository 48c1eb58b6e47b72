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
from lading.binding import (
    Binder,
    Binding,
    Expected,
    Skipped,
    Target,
    Tie,
    binding_problem,
    tie_problem,
)
from lading.checkpoint import Source
from lading.collecting import uncollected
from lading.errors import (
    CallError,
    LayoutError,
    PlanError,
)
from lading.names import Names
from lading.proof import Worked, work_out
from lading.ranks import Ranks
from lading.regions import Copy, Region
from lading.specs import Constant

_ENCODE = json.JSONEncoder(check_circular=False).encode

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
class Fill:
    """A box of a local parameter that is declared padding, and is set to zero."""

    target: str
    region: Region


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
        shapes = self._local_shapes
        return sum(
            prod(shapes[id(t.layout)]) * dtypes.storage_bytes(t.dtype)
            for t in self.targets
            if t.expected is None
        )

    def checks(self) -> tuple[Check, ...]:
        """The tensors that are compared with what the declaration says."""
        return self._checks

    @cached_property
    def _checks(self) -> tuple[Check, ...]:
        if all(target.expected is None for target in self.targets):
            return ()
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
        found: dict[tuple[str, str, str], None] = {}
        for binding in self.bindings:
            stored, wanted = self.sources[binding.source].dtype, self.target(binding.target).dtype
            if stored != wanted:
                found[binding.target, stored, wanted] = None
        return tuple(found)

    @cached_property
    def _local_shapes(self) -> Mapping[int, tuple[int, ...]]:
        """Of each layout, by its id: targets share a few, and a shape at 64 ranks takes 0.1 ms."""
        layouts = {id(target.layout): target.layout for target in self.targets}
        return {key: layout.local_shape for key, layout in layouts.items()}

    @cached_property
    def digest(self) -> str:
        """A sha256 of all that does not depend on the rank; equal on all ranks of a load."""
        shapes = self._local_shapes
        facts = [
            [(b.target, b.part, b.source, b.fused) for b in self.bindings],
            [(s.name, s.dtype, s.shape, s.file, s.offset_bytes) for s in self.sources.values()],
            [(t.name, t.dtype, shapes[id(t.layout)], t.layout.tp_size) for t in self.targets],
            [(c.source, c.constant.value, c.numbers) for c in self.checks()],
            [(t.target, t.source, t.twin) for t in self.ties],
            [s.source for s in self.skipped],
        ]
        return hashlib.sha256(_ENCODE(facts).encode()).hexdigest()


@uncollected()
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
    binder = Binder(sources, names or Names(), where, layouts)
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
        binding_problem(by_name[b.target], layouts[b.target], b, sources[b.source])
        for b in bindings
    ] + [tie_problem(tie, sources, None) for tie in ties]
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
        for fact in layouts[name].faults(tuple([(b.part, b.fused) for b in of_target]))
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


def _expected_numbers(expected: Expected, binding: Binding) -> tuple[int, ...]:
    if expected.constant is Constant.SHAPE:
        sizes = dict(expected.outputs)
        outputs = sum(sizes.values()) if binding.fused else sizes[binding.part]
        return outputs, expected.inputs
    if expected.constant is Constant.GROUP_INDEX:
        return expected.inputs, expected.group
    return ()


def _share(
    ranks: Ranks,
    grouped: Mapping[str, Sequence[Binding]],
    layouts: Mapping[str, Worked],
    compared: frozenset[str],
) -> Share:
    copies: list[Copy] = []
    fills: list[Fill] = []
    rank = ranks.tp_rank
    for name, bindings in grouped.items():
        layout = layouts[name]
        if name in compared:
            continue
        for binding in bindings:
            placement = layout.place(binding.part, rank, fused=binding.fused)
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
        for region in layout.padding(rank):
            fills.append(Fill(target=name, region=region))
    return Share(ranks=ranks, copies=tuple(copies), fills=tuple(fills))
