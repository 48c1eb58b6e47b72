"""Modules that a config names as not quantised, and words that it chooses from. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import translate
from functools import lru_cache
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
    if not names:
        return None
    runs, patterns = _matchers(names)
    parts = module.split(".")
    ends = range(1, len(parts) + 1)
    found = [
        place
        for stop in ends
        for start in range(stop)
        if (place := runs.get(".".join(parts[start:stop]))) is not None
    ]
    dotted = f".{module}."
    found += [
        place
        for place, pattern in patterns
        if pattern.match(module) or (not _is_re(names[place]) and pattern.match(dotted))
    ]
    return names[min(found)] if found else None


def _is_re(name: str) -> bool:
    return name.startswith("re:")


@lru_cache(maxsize=16)
def _matchers(
    names: tuple[str, ...],
) -> tuple[Mapping[str, int], tuple[tuple[int, re.Pattern[str]], ...]]:
    """(place of each name without wildcards, (place, expression) of each other name).

    Lists are long and modules many: 18,000 modules and 60 names took 5 s name by name, 0.2 s so.
    """
    runs: dict[str, int] = {}
    patterns = []
    for place, name in enumerate(names):
        if _is_re(name):
            patterns.append((place, re.compile(name[3:])))
        elif any(sign in name for sign in "*?["):
            forms = (name, f"*.{name.strip('.')}.*")
            patterns.append((place, re.compile("|".join(map(translate, forms)))))
        else:
            runs.setdefault(name.strip("."), place)
    return runs, tuple(patterns)


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
