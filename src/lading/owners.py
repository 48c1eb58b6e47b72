"""Whose parameter is it: qualified names for messages, and which parameters a model has.

`name_parameters` gives every parameter of a model its qualified name. lading's verbs and layers
call it; where nobody has, `name_of` looks for the module that holds the parameter. That search
walks the interpreter's objects, so it runs only while an error message is being made.
"""

from __future__ import annotations

import gc

import torch
from torch import nn

__all__ = ["name_of", "name_parameters"]


def name_parameters(model: nn.Module, prefix: str = "") -> None:
    """Tells each of the model's parameters its qualified name; a tied one keeps its first."""
    for name, param in model.named_parameters(prefix=prefix):
        if "qualified_name" in vars(param):
            vars(param)["qualified_name"] = name


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
