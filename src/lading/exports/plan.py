"""What an export does, before it does it: the plan of all ranks, the files, and who writes what.

The plan comes from the model's origin (its bindings, proved again for the parameters as they are
now), from a checkpoint that the caller names, or, for a model that comes from nowhere, from its
naming rules. Files are opened for headers only. Every rank finds the same.

Letters: S = a checkpoint tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, runtime_checkable

from torch import nn

from lading import dtypes
from lading.binding import Binding, Target, stored_names, stored_shape
from lading.checkpoint import (
    Checkpoint,
    Outline,
    Source,
    outline_like,
    outline_new,
)
from lading.checkpoint.files import file_size
from lading.checkpoint.outline import json_bytes
from lading.errors import CallError, DeclarationError, LadingError, MissingTensorError, PlanError
from lading.exports.live import Live
from lading.loading import Origin, PathLike, origin_of
from lading.names import Names
from lading.plan import Check, Plan, make_plan, prove_bindings
from lading.ranks import Ranks, all_ranks
from lading.regions import Copy
from lading.routes import pieces
from lading.shards.folder import Sharded, open_any
from lading.targeting import names_of

__all__ = ["ExportPlan", "Other", "plan_export", "plan_from_names", "stored_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Other:
    """A checkpoint tensor that no rank keeps.

    source   where to read it, None where its file is gone
    check    a constant: its values follow from the declaration
    """

    source: Source | None
    check: Check | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """An export that only has to be executed.

    plan         of all ranks, for the parameters as they are
    outline      the files
    checkpoint   whose form they take, None for new files
    duties       what each rank writes: the copies that it reads backwards
    twins        tied tensors: S -> those that have the same bytes
    others       what no rank keeps, by name
    """

    plan: Plan
    outline: Outline
    checkpoint: Checkpoint | None
    duties: Mapping[Ranks, tuple[Copy, ...]]
    twins: Mapping[str, tuple[str, ...]]
    others: Mapping[str, Other]

    @property
    def digest(self) -> str:
        """Equal on all ranks of an export."""
        facts = [
            [(file.name, file.num_bytes, file.head.hex()) for file in self.outline.files],
            [(name, place.file, place.offset_bytes) for name, place in self.outline.places.items()],
            [name for _, name in self.outline.copied],
        ]
        text = self.plan.digest + json.dumps(facts)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_export(
    model: nn.Module,
    live: Live,
    *,
    origin: Origin | None,
    source: PathLike | Checkpoint | None,
    max_file_bytes: int,
) -> ExportPlan:
    """The plan of all ranks and the files that they fill.

    live     of one rank; the others' differ in values only
    origin   what the model was loaded from, where that is to be repeated
    source   the checkpoint to repeat, instead
    Raises a PlanError with every problem.
    """
    if live.ranks.ep_size > 1:
        fact = f"was built for {live.ranks}, needs a model without expert parallelism"
        raise CallError(fact, subject=type(model).__name__)
    ranks = all_ranks(live.ranks.tp_size)
    if source is not None:
        checkpoint = source if isinstance(source, Checkpoint) else open_any(source)
        names = names_of(model).fitting(checkpoint.tensors)
        plan = make_plan(live.targets, checkpoint.tensors, ranks=ranks, names=names)
        return _finish(plan, checkpoint, _like(checkpoint))
    if origin is not None:
        plan = _again(live, origin, ranks)
        return _finish(plan, origin.checkpoint, _like(origin.checkpoint))
    plan = plan_from_names(live, names_of(model), ranks)
    outline = outline_new(
        [(s.name, s.dtype, s.shape) for s in plan.sources.values()], max_file_bytes=max_file_bytes
    )
    return _finish(plan, None, _with_config(outline, model))


def _like(checkpoint: Checkpoint) -> Outline:
    """The checkpoint's files; of a pre-sharded folder those that it was made from."""
    sharded = checkpoint.served_by
    if not isinstance(sharded, Sharded):
        return outline_like(checkpoint)
    manifest = sharded.manifest
    if manifest is None:
        fact = "has no manifest, and nothing else says which files its tensors were in"
        raise CallError(fact, subject=checkpoint.folder, hint="as_new=True")
    written = {}
    if manifest.index is not None:
        written[manifest.index.name] = manifest.index.text.encode()
    heads = {file.name: file.head for file in manifest.files}
    return outline_like(checkpoint, heads=heads, written=written)


def _finish(plan: Plan, checkpoint: Checkpoint | None, outline: Outline) -> ExportPlan:
    others = _others(plan, checkpoint)
    twins: dict[str, tuple[str, ...]] = {}
    for tie in plan.ties:
        twins[tie.source] = (*twins.get(tie.source, ()), tie.twin)
    duties, written = _duties(plan, others)
    have = {*written, *others, *(twin for found in twins.values() for twin in found)}
    assert have == set(outline.places), "each tensor of the files comes from somewhere"
    made = sorted(name for name, other in others.items() if other.source is None)
    if made and checkpoint is not None:
        note = f"made from the declaration, as their files are gone: {', '.join(made)}"
        outline = replace(outline, notes=(*outline.notes, note))
    if checkpoint is not None:
        outline = replace(outline, notes=(*outline.notes, *_rounded(plan)))
    return ExportPlan(
        plan=plan,
        outline=outline,
        checkpoint=checkpoint,
        duties=duties,
        twins=twins,
        others=others,
    )


def _rounded(plan: Plan) -> Iterator[str]:
    """Says where the load has rounded what the file had: those values cannot come back."""
    counts = Counter(
        (stored, have) for _, stored, have in plan.casts() if not dtypes.is_lossless(stored, have)
    )
    for (stored, have), count in counts.items():
        yield (
            f"{count} parameter{'s' if count != 1 else ''} of the model in {dtypes.printed(have)}, "
            f"of the checkpoint in {dtypes.printed(stored)}: the values are those of "
            f"{dtypes.printed(have)}"
        )


def _duties(
    plan: Plan, others: Mapping[str, Other]
) -> tuple[dict[Ranks, tuple[Copy, ...]], set[str]]:
    """Who writes which piece, the load shared out evenly; and the tensors that they make up."""
    found: dict[Ranks, list[Copy]] = {share.ranks: [] for share in plan.shares}
    load = dict.fromkeys(found, 0)
    twins = {tie.twin for tie in plan.ties}
    written = set()
    for name, source in plan.sources.items():
        if name in others or name in twins:
            continue
        written.add(name)
        if not source.num_bytes:
            continue
        for piece in pieces(plan, name):
            holder = min(piece.holders, key=lambda one: load[one.ranks])
            load[holder.ranks] += piece.region.num_elements * dtypes.storage_bytes(source.dtype)
            found[holder.ranks].append(holder.copy)
    return {ranks: tuple(copies) for ranks, copies in found.items()}, written


def _others(plan: Plan, checkpoint: Checkpoint | None) -> dict[str, Other]:
    """What no rank keeps; a PlanError names what is neither in a file nor in the declaration."""
    checks = {check.source: check for check in plan.checks()}
    names = [*checks, *(skipped.source for skipped in plan.skipped)]
    reasons = {skipped.source: skipped.reason for skipped in plan.skipped}
    found: dict[str, Other] = {}
    problems: list[LadingError] = []
    for name in names:
        source = _readable(checkpoint, name) if checkpoint is not None else None
        found[name] = Other(source=source, check=checks.get(name))
        if source is None and name not in checks:
            fact = f"cannot be written: no rank keeps it ({reasons[name]}), and its file is gone"
            file = checkpoint.tensors[name].file if checkpoint is not None else None
            problems.append(MissingTensorError(fact, subject=name, file=file))
    if problems:
        raise PlanError(problems, what="the export")
    return found


def _readable(checkpoint: Checkpoint, name: str) -> Source | None:
    """The tensor, None where its file is gone."""
    source = checkpoint.tensors[name]
    path = os.path.join(checkpoint.folder, *source.file.split("/"))
    is_there = checkpoint.served_by is not None or file_size(path) is not None
    return source if is_there else None


# ----------------------------------------------------------------------------- the plan of a load


def _again(live: Live, origin: Origin, ranks: Sequence[Ranks]) -> Plan:
    """The plan of the load, of all ranks, for the parameters as they are now."""
    known = {target.name: target for target in origin.plan.targets if target.expected is None}
    now = {target.name: target for target in live.targets if target.expected is None}
    hint = "as_new=True, or source= with a checkpoint that has what the model has"
    problems: list[LadingError] = [
        DeclarationError(f"is {fact}", subject=name, hint=hint)
        for fact, names in (
            ("a parameter that the model did not have when it was loaded", now.keys() - known),
            ("no longer a parameter of its own, needs to be (it was loaded)", known.keys() - now),
        )
        for name in sorted(names)
    ]
    if problems:
        raise PlanError(problems, what="the export")
    constants = [target for target in origin.plan.targets if target.expected is not None]
    return prove_bindings(
        [*live_order(origin.plan.targets, now), *constants],
        origin.checkpoint.tensors,
        origin.plan.bindings,
        ranks=ranks,
        ties=origin.plan.ties,
        skipped=origin.plan.skipped,
    )


def live_order(targets: Sequence[Target], now: Mapping[str, Target]) -> Iterator[Target]:
    """The targets as they are now, in the order of the load."""
    return (now[target.name] for target in targets if target.name in now)


# -------------------------------------------------------------------------------- a new checkpoint


def plan_from_names(live: Live, names: Names, ranks: Sequence[Ranks]) -> Plan:
    """A plan of tensors that are nowhere yet: those that the naming rules ask for."""
    sources: dict[str, Source] = {}
    bindings: list[Binding] = []
    problems: list[LadingError] = []
    for target in live.targets:
        try:
            found = list(stored_parts(target, names))
        except LadingError as error:
            problems.append(error.located(subject=target.name))
            continue
        for binding, source in found:
            other = sources.setdefault(source.name, source)
            if other is not source and not binding.fused:
                fact = f"would be stored as {source.name!r}, as another parameter is too"
                problems.append(DeclarationError(fact, subject=target.name))
            bindings.append(binding)
    if problems:
        raise PlanError(problems, what="the export")
    return prove_bindings(live.targets, sources, bindings, ranks=ranks)


def stored_parts(target: Target, names: Names) -> Iterator[tuple[Binding, Source]]:
    """Each part of a target, and the tensor that it will be: its own, where a rule names it."""
    layout = target.layout
    name = stored_names(target)[0]
    parts, whole = layout.part_names, names.whole(name)
    stored = None
    if len(parts) > 1 and not layout.fused_source:
        stored = names.parts(name, len(parts), target.leaf)
    for at, part in enumerate(parts):
        fused = len(parts) > 1 and stored is None
        shape = layout.fused_shape if fused else layout.source_shape(part)
        source = stored[at] if stored is not None else whole
        binding = Binding(target=target.name, part=part, source=source, fused=fused)
        yield binding, _new_source(target, source, shape)


def _new_source(target: Target, name: str, shape: tuple[int, ...]) -> Source:
    if target.stored is not None:
        shape = stored_shape(target.stored, shape)
    num_bytes = prod(shape) * dtypes.storage_bytes(target.dtype)
    if target.dtype == "F4":
        shape = (*shape[:-1], shape[-1] * 2)  # headers count single values
    return Source(
        name=name, dtype=target.dtype, shape=shape, file="", offset_bytes=0, num_bytes=num_bytes
    )


@runtime_checkable
class _Config(Protocol):
    """A config that can say itself, as those of transformers do."""

    def to_json_string(self) -> str:
        """The text of a config.json."""


def _with_config(outline: Outline, model: nn.Module) -> Outline:
    config: Any = vars(model).get("config")
    data = None
    if isinstance(config, Mapping):
        data = json_bytes(dict(config))
    elif isinstance(config, _Config):
        data = config.to_json_string().encode()
    if data is not None:
        return replace(outline, written={**outline.written, "config.json": data})
    why = "the model was not loaded from a checkpoint, and has none"
    if origin_of(model) is not None:
        why = "as_new takes none from the checkpoint that was loaded, and the model has none"
    note = f"there is no config.json: {why}"
    return replace(outline, notes=(*outline.notes, note))
