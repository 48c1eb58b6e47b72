"""Plans of the same bindings in another form: in stored dtypes, and for other numbers of ranks.

Both follow from a plan alone: its bindings stay, and its layouts say how each dim is made of parts,
what a packed word, a group or a block covers, and so which numbers of ranks can cut it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lading.checkpoint import Source
from lading.errors import DtypeError, LadingError, LayoutError, PlanError
from lading.layouts import Layout, suggest_tp
from lading.plan import Plan, Target, prove_bindings
from lading.ranks import all_ranks

__all__ = ["plan_at", "stored_plan"]

MAX_SUGGESTED = 64


def stored_plan(plan: Plan, sources: Mapping[str, Source]) -> Plan:
    """The same plan with each parameter in the dtype that its checkpoint tensors are stored in.

    sources   the checkpoint's tensors, where their files have them
    Raises a PlanError where parts of one parameter are stored in different dtypes.
    """
    stored: dict[str, dict[str, str]] = {}
    for binding in plan.bindings:
        dtype = sources[binding.source].dtype
        stored.setdefault(binding.target, {}).setdefault(dtype, binding.source)
    problems: list[LadingError] = []
    targets: list[Target] = []
    for target in plan.targets:
        found = stored[target.name]
        if target.expected is None and len(found) > 1:
            shown = ", ".join(f"{name!r} is {dtype}" for dtype, name in found.items())
            fact = f"its parts are stored in different dtypes ({shown}), needs one"
            problems.append(DtypeError(fact, subject=target.name))
            continue
        dtype = next(iter(found)) if target.expected is None else target.dtype
        targets.append(replace(target, dtype=dtype))
    if problems:
        raise PlanError(problems, what="the shards")
    return prove_bindings(
        targets,
        {**sources},
        plan.bindings,
        ranks=[share.ranks for share in plan.shares],
        ties=plan.ties,
        skipped=plan.skipped,
    )


def plan_at(plan: Plan, tp_size: int) -> Plan:
    """The plan of the same bindings for another number of ranks, proved; no model code is asked.

    Raises a PlanError with every layout that does not divide, and the sizes at which all do.
    """
    known: dict[Layout, Layout | LayoutError] = {}
    targets: list[Target] = []
    problems: list[LadingError] = []
    for target in plan.targets:
        made = known.get(target.layout)
        if made is None:
            made = known[target.layout] = _layout_at(target.layout, tp_size)
        if isinstance(made, Layout):
            targets.append(replace(target, layout=made))
            continue
        problems.append(LayoutError(made.fact, subject=target.name, part=made.part))
    if problems:
        layouts = tuple(known)
        fitting = suggest_tp(lambda size: _all_fit(layouts, size), tp_size)
        for problem in problems:
            problem.hint = fitting
        error = PlanError(problems, what=f"TP {tp_size}")
        sizes = [size for size in range(1, MAX_SUGGESTED + 1) if _all_fit(layouts, size)]
        error.hint = f"TP {', '.join(map(str, sizes))}: there every layer divides"
        raise error
    return prove_bindings(
        targets,
        plan.sources,
        plan.bindings,
        ranks=all_ranks(tp_size),
        ties=plan.ties,
        skipped=plan.skipped,
    )


def _layout_at(layout: Layout, tp_size: int) -> Layout | LayoutError:
    try:
        return replace(layout, tp_size=tp_size)
    except LayoutError as error:
        return error


def _all_fit(layouts: Sequence[Layout], tp_size: int) -> bool:
    return all(isinstance(_layout_at(layout, tp_size), Layout) for layout in layouts)
