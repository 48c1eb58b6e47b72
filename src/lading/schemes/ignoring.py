"""Modules that a config names as not quantised, and words that it chooses from. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from lading.schemes.base import Found
from lading.schemes.evidence import contradiction, spelt
from lading.schemes.options import Options, one_of

__all__ = ["choice", "ignored_names", "matching", "refuse_ignored", "shown"]

_Value = TypeVar("_Value")


def choice(options: Options, key: str, known: Mapping[str, _Value], default: _Value) -> _Value:
    """What a word stands for, in any case of letters; `default` where the key is missing."""
    word = options.word(key)
    if word is None:
        return default
    if word.lower() not in known:
        raise options.problem(key, one_of([f'"{name}"' for name in known]))
    return known[word.lower()]


def ignored_names(options: Options, *keys: str) -> tuple[str, ...]:
    """The names of all lists under these keys, of which most configs have one."""
    names = []
    for key in keys:
        for name in options.words(key):
            if name.startswith("re:"):
                try:
                    re.compile(name[3:])
                except re.error as error:
                    raise options.problem(key, f"regular expressions after re: ({error})") from None
            names.append(name)
    return tuple(names)


def matching(module: str, names: tuple[str, ...]) -> str | None:
    """The first name that stands for the module: a run of its dotted components, or a wildcard.

    Example: "gate", "model.layers.0", "model.layers.*.mlp" and "re:.*gate$" stand for
    model.layers.0.mlp.gate; "gate" does not stand for model.layers.0.mlp.gate_proj.
    """
    for name in names:
        if name.startswith("re:"):
            if re.match(name[3:], module):
                return name
            continue
        run = f"*.{name.strip('.')}.*"
        if any(
            fnmatchcase(module, form) or fnmatchcase(f".{module}.", form) for form in (name, run)
        ):
            return name
    return None


def refuse_ignored(found: Found, key: str, names: tuple[str, ...]) -> None:
    """Raises where the config says that the module is not quantised, and its tensors that it is."""
    name = matching(found.module, names)
    if name is not None:
        raise contradiction(
            found,
            f'that "{name}" is not quantised ({key})',
            shown(found),
            "needs a weight of the model's dtype",
        )


def shown(found: Found) -> list[str]:
    """'weight fp8_e4m3[256, 256]' for each tensor but the bias."""
    return [f"{name} {spelt(stored)}" for name, stored in found.tensors.items() if name != "bias"]
