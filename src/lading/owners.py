"""Whose parameter is it: qualified names for messages, and which parameters a model has.

`name_parameters` gives every parameter of a model its qualified name. lading's verbs and layers
call it; where nobody has, `name_of` looks for the module that holds the parameter. That search
walks the interpreter's objects, so it runs only while an error message is being made.

A `Walk` over a model serves all steps of a load: torch's own iterators take one each, and several
times as long.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import nn

__all__ = ["Walk", "name_all", "name_of", "name_parameters"]


class Walk:
    """One walk over a model. What it has found holds until a module gets another child or tensor.

    modules   every module by its path; one that stands in several places, under each of them: what
              `named_modules(remove_duplicate=False)` gives, in its order
    """

    def __init__(self, model: nn.Module, prefix: str = "") -> None:
        self.modules: list[tuple[str, nn.Module]] = []
        _walk(prefix, model, self.modules)

    @cached_property
    def params(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters, under each of their names."""
        found: list[tuple[str, nn.Parameter]] = []
        for path, module in self.modules:
            if module._parameters:
                dot = f"{path}." if path else ""
                for name, param in module._parameters.items():
                    if param is not None:
                        found.append((dot + name, param))
        return found

    @cached_property
    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """Persistent buffers, under each of their names."""
        found: list[tuple[str, torch.Tensor]] = []
        for path, module in self.modules:
            if module._buffers:
                dot = f"{path}." if path else ""
                passing, held = module._non_persistent_buffers_set, module._buffers.items()
                found += [(dot + k, b) for k, b in held if b is not None and k not in passing]
        return found


def _walk(path: str, module: nn.Module, found: list[tuple[str, nn.Module]]) -> None:
    found.append((path, module))
    if module._modules:
        dot = f"{path}." if path else ""
        for name, child in module._modules.items():
            if child is not None:
                _walk(dot + name, child, found)


def name_parameters(model: nn.Module, prefix: str = "") -> None:
    """Tells each of the model's parameters its qualified name; a tied one keeps its first."""
    _name(model.named_parameters(prefix=prefix))


def name_all(walk: Walk) -> None:
    """`name_parameters` of a model that has been walked over."""
    _name(walk.params)


def _name(params: Iterable[tuple[str, nn.Parameter]]) -> None:
    seen: set[int] = set()
    for name, param in params:
        if id(param) not in seen:
            seen.add(id(param))
            facts = vars(param)
            if "qualified_name" in facts:
                facts["qualified_name"] = name


def name_of(param: torch.Tensor) -> str:
    """The parameter's qualified name, or its class where it is in no model."""
    known = vars(param).get("qualified_name")
    if known is not None:
        return str(known)
    found = _search(param)
    return found if found is not None else type(param).__name__


def _search(param: torch.Tensor) -> str | None:
    kinds = _subclasses(nn.Module)  # a set: `issubclass` of every object takes twice as long
    modules = [thing for thing in gc.get_objects() if type(thing) in kinds]
    parents: dict[int, tuple[nn.Module, str]] = {}
    holder: tuple[nn.Module, str] | None = None
    for module in modules:
        facts = vars(module)
        for name, child in facts.get("_modules", {}).items():
            if child is not None:
                parents.setdefault(id(child), (module, name))
        for name, held in facts.get("_parameters", {}).items():
            if held is param:
                holder = holder or (module, name)
    if holder is None:
        return None
    module, path = holder
    seen: set[int] = set()
    while id(module) in parents and id(module) not in seen:
        seen.add(id(module))
        module, name = parents[id(module)]
        path = f"{name}.{path}"
    return path


def _subclasses(cls: type[nn.Module]) -> set[type[nn.Module]]:
    found, waiting = {cls}, [cls]
    while waiting:
        new = set(type.__subclasses__(waiting.pop())) - found
        found |= new
        waiting.extend(new)
    return found
