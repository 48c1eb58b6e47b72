"""What a model wants: its parameters as targets of a plan, its names, its rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from lading import dtypes
from lading import ranks as ranks_module
from lading.errors import CallError, DeclarationError, LadingError, PlanError
from lading.layouts import Axis, Cut, Layout
from lading.names import Names
from lading.nn.base import ParallelLayer
from lading.owners import Walk
from lading.parameter import BasevLLMParameter, PerTensorScaleParameter
from lading.plan import Plan, Target
from lading.ranks import Ranks

__all__ = ["check_built_for", "names_of", "ranks_of", "state_of", "targets_of", "tensors_of"]


def names_of(model: nn.Module) -> Names:
    """The usual naming rules with the model's own `packed_modules_mapping`, where it declares
    one.
    """
    for scope in (vars(model), *(vars(cls) for cls in type(model).__mro__)):
        if isinstance(scope.get("names"), Names):
            return scope["names"]  # type: ignore[no-any-return]
        mapping = scope.get("packed_modules_mapping")
        if isinstance(mapping, Mapping):
            return Names.of(mapping)
    return Names()


def targets_of(model: nn.Module, ranks: Ranks, walk: Walk | None = None) -> tuple[Target, ...]:
    """What a load has to fill: every parameter and persistent buffer, tied ones once.

    walk   over the model, where somebody has made one
    Raises a PlanError where a parameter does not say how it is cut, or was built for other ranks.
    """
    walk = walk or Walk(model)
    problems: list[LadingError] = []
    named: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, tensor in state_of(model, walk):
        named.setdefault(id(tensor), (tensor, []))[1].append(name)
    layers: dict[int, tuple[str, ParallelLayer]] = {}
    for prefix, module in walk.modules:
        if isinstance(module, ParallelLayer):
            layers.setdefault(id(module), (prefix, module))
    uncut = {id(param) for _, m in layers.values() if m.disable_tp for param in m.parameters()}
    layouts = _Layouts(ranks)
    targets = []
    for key, (tensor, (name, *aliases)) in named.items():
        try:
            targets.append(_target_of(name, aliases, tensor, layouts, whole=key in uncut))
        except LadingError as error:
            problems.append(error.located(subject=name))
        except LookupError as error:
            problems.append(DeclarationError(str(error), subject=name))
    for prefix, layer in layers.values():
        for target in layer.expected_targets(prefix):
            if layer.disable_tp:
                target = replace(target, layout=_uncut(target.layout, ranks.tp_size))
            targets.append(target)
    if problems:
        raise PlanError(problems, what="the model")
    return tuple(targets)


def state_of(model: nn.Module, walk: Walk | None = None) -> list[tuple[str, torch.Tensor]]:
    """Parameters, then persistent buffers, under each of their names.

    walk   as of `targets_of`
    """
    walk = walk or Walk(model)
    return [*walk.params, *walk.buffers]


def _target_of(
    name: str, aliases: Sequence[str], tensor: torch.Tensor, layouts: _Layouts, *, whole: bool
) -> Target:
    """A parameter or buffer, with what is not usual of its tensor's name and shape in the file."""
    layout = layouts.of(tensor, whole=whole)
    leaf, stored = "", None
    if isinstance(tensor, BasevLLMParameter):
        leaf, stored = tensor.stored_leaf, tensor.stored_shape
    return Target(
        name=name,
        layout=layout,
        dtype=layouts.code(tensor.dtype),
        aliases=tuple(aliases),
        leaf=leaf,
        stored=stored,
    )


def _uncut(layout: Layout, tp_size: int) -> Layout:
    """A layout of one rank as that of T ranks which all keep everything."""

    def whole(axis: Axis) -> Axis:
        return replace(axis, parts=tuple(replace(part, max_pieces=1) for part in axis.parts))

    cuts: tuple[Cut, ...] = tuple(replace(cut, axis=whole(cut.axis)) for cut in layout.cuts)
    return replace(layout, cuts=cuts, tp_size=tp_size)


class _Layouts:
    """The layouts of a model's tensors. Equal ones become one object, whose shape is worked out
    once: the same layers stand in a model many times.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._by_id: dict[int, tuple[Layout, tuple[int, ...]]] = {}
        self._known: dict[Layout, tuple[Layout, tuple[int, ...]]] = {}
        self._asked: list[Layout] = []  # kept, so that an id is one layout
        self._codes: dict[torch.dtype, str] = {}

    def code(self, dtype: torch.dtype) -> str:
        """The safetensors name of a dtype; a LookupError where the format has none."""
        found = self._codes.get(dtype)
        if found is None:
            found = self._codes[dtype] = dtypes.from_torch(dtype)
        return found

    def of(self, tensor: torch.Tensor, *, whole: bool) -> Layout:
        """The declared layout, or replicated for tensors that no rank cuts.

        whole   the parameter's layer does without tensor parallelism
        """
        shape, tp_size = tensor.shape, self._ranks.tp_size
        if not isinstance(tensor, BasevLLMParameter):
            return Layout.replicated(shape, tp_size)
        layout = tensor.tp_layout
        if layout is None:
            cut_by_none = type(tensor) in (BasevLLMParameter, PerTensorScaleParameter)
            if tp_size == 1 or whole or cut_by_none:
                return Layout.replicated(shape, tp_size)
            raise DeclarationError(
                f"{type(tensor).__name__} does not say how it is cut over {tp_size} ranks, needs "
                "a layout",
                hint="build it with a layer of lading.nn, or set its tp_layout",
            )
        if whole:
            layout = _uncut(layout, tp_size)
        if layout.tp_size != tp_size:
            raise DeclarationError(
                f"was built for {layout.tp_size} ranks, needs {tp_size} (the load's tp_size)"
            )
        layout, local_shape = self._shared(layout)
        if local_shape != shape:
            raise DeclarationError(
                f"has shape {list(shape)}, needs {list(local_shape)} (its own layout's)"
            )
        return layout

    def _shared(self, layout: Layout) -> tuple[Layout, tuple[int, ...]]:
        found = self._by_id.get(id(layout))
        if found is None:
            found = self._known.get(layout)
            if found is None:
                found = self._known[layout] = (layout, layout.local_shape)
            self._by_id[id(layout)] = found
            self._asked.append(layout)
        return found


def check_built_for(model: nn.Module, ranks: Ranks, walk: Walk | None = None) -> None:
    """Raises a CallError where the model's forward pass takes itself for another rank.

    walk   as of `targets_of`
    """
    for _, layer in (walk or Walk(model)).modules:
        if not isinstance(layer, ParallelLayer) or layer.tp_size != ranks.tp_size:
            continue  # another tp_size is every parameter's problem
        if layer.tp_rank != ranks.tp_rank:
            raise CallError(
                f"was built for {layer.ranks}, needs {ranks} (the load's)",
                subject=type(model).__name__,
            )


def ranks_of(model: nn.Module, walk: Walk | None = None) -> Ranks:
    """The rank that the model's layers were built for; the current one where they do not say.

    walk   as of `targets_of`
    """
    modules = (walk or Walk(model)).modules
    layers = [m for _, m in modules if isinstance(m, ParallelLayer) and m.tp_size > 1]
    found = set({id(layer.ranks): layer.ranks for layer in layers}.values())
    if len(found) > 1:
        raise CallError(
            f"has layers built for {' and '.join(sorted(map(str, found)))}, needs one rank",
            subject=type(model).__name__,
        )
    return found.pop() if found else ranks_module.current()


def tensors_of(model: nn.Module, plan: Plan, walk: Walk | None = None) -> dict[str, torch.Tensor]:
    """The tensors that a plan fills, by target name: not those that it only compares.

    walk   as of `targets_of`
    """
    state = dict(state_of(model, walk))
    return {target.name: state[target.name] for target in plan.targets if target.expected is None}
