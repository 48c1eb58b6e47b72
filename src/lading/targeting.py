"""What a model wants: its parameters as targets of a plan, its names, its rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lading import dtypes
from lading import ranks as ranks_module
from lading.errors import CallError, DeclarationError, LadingError, PlanError
from lading.layouts import Axis, Cut, Layout
from lading.names import Names
from lading.nn.base import ParallelLayer
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


def targets_of(model: nn.Module, ranks: Ranks) -> tuple[Target, ...]:
    """What a load has to fill: every parameter and persistent buffer, tied ones once.

    Raises a PlanError where a parameter does not say how it is cut, or was built for other ranks.
    """
    problems: list[LadingError] = []
    named: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in state_of(model):
        named.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, ParallelLayer)]
    uncut = {id(param) for _, m in layers if m.disable_tp for param in m.parameters()}
    targets = []
    for key, (name, *aliases) in named.items():
        try:
            layout = _layout_of(tensors[key], ranks, whole=key in uncut)
            dtype = dtypes.from_torch(tensors[key].dtype)
        except LadingError as error:
            problems.append(error.located(subject=name))
            continue
        except LookupError as error:
            problems.append(DeclarationError(str(error), subject=name))
            continue
        targets.append(
            Target(
                name=name,
                layout=layout,
                dtype=dtype,
                aliases=tuple(aliases),
                **_stored_as(tensors[key]),
            )
        )
    for prefix, layer in layers:
        for target in layer.expected_targets(prefix):
            if layer.disable_tp:
                target = replace(target, layout=_uncut(target.layout, ranks.tp_size))
            targets.append(target)
    if problems:
        raise PlanError(problems, what="the model")
    return tuple(targets)


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters, then persistent buffers, under each of their names.

    One walk: torch's own iterators take one each, which counts with thousands of modules.
    """
    params: list[tuple[str, torch.Tensor]] = []
    buffers: list[tuple[str, torch.Tensor]] = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        params += [(dot + name, p) for name, p in module._parameters.items() if p is not None]
        if module._buffers:
            passing = module._non_persistent_buffers_set
            held = module._buffers.items()
            buffers += [(dot + k, b) for k, b in held if b is not None and k not in passing]
    return params + buffers


def _stored_as(tensor: torch.Tensor) -> dict[str, Any]:
    """How a parameter's tensor is called and shaped in the file, where that is not the usual."""
    if not isinstance(tensor, BasevLLMParameter):
        return {}
    return {"leaf": tensor.stored_leaf, "stored": tensor.stored_shape}


def _uncut(layout: Layout, tp_size: int) -> Layout:
    """A layout of one rank as that of T ranks which all keep everything."""

    def whole(axis: Axis) -> Axis:
        return replace(axis, parts=tuple(replace(part, max_pieces=1) for part in axis.parts))

    cuts: tuple[Cut, ...] = tuple(replace(cut, axis=whole(cut.axis)) for cut in layout.cuts)
    return replace(layout, cuts=cuts, tp_size=tp_size)


def _layout_of(tensor: torch.Tensor, ranks: Ranks, *, whole: bool) -> Layout:
    """The declared layout, or replicated for tensors that no rank cuts.

    whole   the parameter's layer does without tensor parallelism
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, BasevLLMParameter):
        return Layout.replicated(shape, ranks.tp_size)
    layout = tensor.tp_layout
    if layout is None:
        cut_by_none = type(tensor) in (BasevLLMParameter, PerTensorScaleParameter)
        if ranks.tp_size == 1 or whole or cut_by_none:
            return Layout.replicated(shape, ranks.tp_size)
        raise DeclarationError(
            f"{type(tensor).__name__} does not say how it is cut over {ranks.tp_size} ranks, needs "
            "a layout",
            hint="build it with a layer of lading.nn, or set its tp_layout",
        )
    if whole:
        layout = _uncut(layout, ranks.tp_size)
    if layout.tp_size != ranks.tp_size:
        raise DeclarationError(
            f"was built for {layout.tp_size} ranks, needs {ranks.tp_size} (the load's tp_size)"
        )
    if layout.local_shape != shape:
        raise DeclarationError(
            f"has shape {list(shape)}, needs {list(layout.local_shape)} (its own layout's)"
        )
    return layout


def check_built_for(model: nn.Module, ranks: Ranks) -> None:
    """Raises a CallError where the model's forward pass takes itself for another rank."""
    for layer in model.modules():
        if not isinstance(layer, ParallelLayer) or layer.tp_size != ranks.tp_size:
            continue  # another tp_size is every parameter's problem
        if layer.tp_rank != ranks.tp_rank:
            raise CallError(
                f"was built for {layer.ranks}, needs {ranks} (the load's)",
                subject=type(model).__name__,
            )


def ranks_of(model: nn.Module) -> Ranks:
    """The rank that the model's layers were built for; the current one where they do not say."""
    found = {m.ranks for m in model.modules() if isinstance(m, ParallelLayer) and m.tp_size > 1}
    if len(found) > 1:
        raise CallError(
            f"has layers built for {' and '.join(sorted(map(str, found)))}, needs one rank",
            subject=type(model).__name__,
        )
    return found.pop() if found else ranks_module.current()


def tensors_of(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The tensors that a plan fills, by target name: not those that it only compares."""
    state = dict(state_of(model))
    return {target.name: state[target.name] for target in plan.targets if target.expected is None}
