"""Frozen values that are made by the thousand: one for each tensor of a checkpoint.

The `__init__` of a frozen dataclass goes through `object.__setattr__` for each field: 1.1 us for
six of them, where setting the slots themselves takes 0.4 us (CPython 3.11).
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

__all__ = ["quick"]

_C = TypeVar("_C", bound=type[Any])


def quick(cls: _C) -> _C:
    """A frozen dataclass with slots and keyword-only fields gets an `__init__` that sets them.

    What it takes, checks (`__post_init__`) and refuses to change stays what it was.

    Example: `@quick` over `@dataclass(frozen=True, slots=True, kw_only=True)`.
    """
    made = fields(cls)
    names = [field.name for field in made]
    assert all(f.init and f.kw_only and f.default_factory is MISSING for f in made), cls
    scope: dict[str, Any] = {f"_set_{name}": vars(cls)[name].__set__ for name in names}
    lines = [f"def __init__(self, *, {', '.join(names)}):"]
    lines += [f"    _set_{name}(self, {name})" for name in names]
    if "__post_init__" in vars(cls):
        lines.append("    self.__post_init__()")
    exec("\n".join(lines), scope)
    init, before = scope["__init__"], cls.__init__
    init.__kwdefaults__ = {f.name: f.default for f in made if f.default is not MISSING}
    init.__qualname__, init.__module__ = before.__qualname__, cls.__module__
    init.__annotations__ = before.__annotations__
    cls.__init__ = init
    return cls
