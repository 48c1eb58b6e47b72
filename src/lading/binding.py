"""Which checkpoint tensor is which part of which parameter: found by name, checked by header.

The same for every rank, and collected: each parameter that has nothing, each tensor that nothing
takes, each shape and dtype that does not fit is one problem of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from lading import dtypes
from lading.checkpoint import Source
from lading.errors import (
    DeclarationError,
    DtypeError,
    LadingError,
    MissingTensorError,
    ShapeError,
    SurplusTensorError,
)
from lading.layouts import Layout, PartName
from lading.names import Names
from lading.proof import Worked
from lading.records import quick
from lading.specs import Constant

__all__ = [
    "Binder",
    "Binding",
    "Expected",
    "Skipped",
    "Target",
    "Tie",
    "binding_problem",
    "tie_problem",
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


@quick
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


@quick
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


class Binder:
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
        if self._bind_plain(target):
            return
        before = len(self.problems)
        found: list[list[Binding]] = []
        for name in stored_names(target):
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
            problem = binding_problem(target, layout, binding, self.sources[binding.source])
            if problem is not None:
                self.problems.append(problem)
        if not is_found:
            return
        self.bindings += first
        for other in found[1:]:
            self._tie(target, first, other)

    def _bind_plain(self, target: Target) -> bool:
        """Binds a target of one part and one name whose tensor is what it needs: most are."""
        if target.aliases or target.leaf or target.stored is not None:
            return False
        worked = self.layouts[target.name]
        if worked.part_names != (None,):
            return False
        whole = self.names.whole(target.name)
        source = self.sources.get(whole)
        if source is None or source.dtype != target.dtype or source.dtype == "F4":
            return False
        if source.shape != worked.source_shape(None, fused=False):
            return False
        self.bindings.append(self._binding(target, None, whole))
        return True

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
        if len(present) < len(stored):
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
        name = stored_names(target)[0]
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
            problem = tie_problem(tie, self.sources, part)
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


def stored_names(target: Target) -> tuple[str, ...]:
    """The target's names as the checkpoint spells them, before naming rules."""
    names = (target.name, *target.aliases)
    if not target.leaf:
        return names
    return tuple(f"{name.rpartition('.')[0]}.{target.leaf}" for name in names)


def binding_problem(
    target: Target, worked: Worked, binding: Binding, source: Source
) -> LadingError | None:
    """Why this checkpoint tensor cannot be that part, None where it can."""
    layout = worked.layout
    needed = worked.source_shape(binding.part, fused=binding.fused)
    if source.shape == needed and source.dtype == target.dtype != "F4" and target.stored is None:
        return None
    # A 0-d tensor is as good as one of one element: scales are stored both ways.
    shape = source.storage_shape
    is_fitting = shape == needed or (shape == () and needed == (1,))
    if target.stored is not None:
        needed = stored_shape(target.stored, needed)
        is_fitting = shape == needed
    problem = dtypes.load_problem(source.dtype, target.dtype)
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


def stored_shape(pattern: tuple[int, ...], needed: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a pattern with one -1 has for the elements of `needed`."""
    rest = prod(n for n in pattern if n != -1)
    return tuple(prod(needed) // rest if n == -1 else n for n in pattern)


def tie_problem(tie: Tie, sources: Mapping[str, Source], part: PartName) -> LadingError | None:
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
