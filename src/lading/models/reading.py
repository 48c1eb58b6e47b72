"""Reads a config's values one by one: each is checked, and every problem is kept, none raised.

A value with a problem comes back as a stand-in, so that reading goes on; `sound` says whether the
values that a further check combines were themselves right. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from lading.errors import ConfigError

__all__ = ["Reader", "spell"]

LARGEST = 1e38
"""Numbers end here: beyond it fp32, in which they are used, is infinite."""


class Reader:
    """Typed look-ups in one object of config.json.

    scope      the object's own key, "" for the whole file
    problems   what was found wrong so far, in the order of reading
    """

    def __init__(
        self,
        raw: Mapping[str, Any],
        *,
        file: str,
        scope: str = "",
        problems: list[ConfigError] | None = None,
    ) -> None:
        self.raw, self.file, self.scope = raw, file, scope
        self.problems: list[ConfigError] = [] if problems is None else problems
        self._unsound: set[str] = set()

    def inner(self, key: str) -> Reader:
        """A reader of the object under `key`; of an empty one where the key is absent or null."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.note(key, f"is {spell(value)}, needs an object or null")
            value = None
        return Reader(value or {}, file=self.file, scope=self.path(key), problems=self.problems)

    def path(self, key: str) -> str:
        """The key as messages name it: 'rope_scaling.factor'."""
        return f"{self.scope}.{key}" if self.scope else key

    def note(self, key: str, fact: str, *, hint: str | None = None) -> None:
        """Keeps a problem of a key."""
        self._unsound.add(key)
        self.problems.append(ConfigError(fact, subject=self.path(key), file=self.file, hint=hint))

    def sound(self, *keys: str) -> bool:
        """Whether none of these keys has a problem."""
        return self._unsound.isdisjoint(keys)

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """An int; a missing key gives `default`, and is a problem without one."""
        value = self._take(key, default, f"an int of at least {least}", lambda v: _is_int(v, least))
        return least if value is None else int(value)

    def optional_integer(
        self, key: str, default: int | None = None, *, least: int = 1
    ) -> int | None:
        """An int or None: null is None, a missing key gives `default`."""
        if key not in self.raw:
            return default
        return None if self.raw[key] is None else self.integer(key, least=least)

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0; a missing key gives `default`, and is a problem without one."""
        value = self._take(key, default, "a number above 0", is_number)
        return 1.0 if value is None else float(value)

    def optional_number(self, key: str) -> float | None:
        """A number above 0, None where the key is missing or null."""
        return self.number(key) if self.given(key) else None

    def flag(self, key: str, default: bool) -> bool:
        """Either true or false."""
        value = self._take(key, default, "true or false", lambda v: isinstance(v, bool))
        return default if value is None else bool(value)

    def numbers(self, key: str, length: int | None, why: str) -> tuple[float, ...]:
        """A list of exactly `length` numbers above 0; of any length where that is not known."""
        value = self._take(
            key,
            None,
            "a list of numbers above 0",
            lambda v: isinstance(v, list) and all(map(is_number, v)),
        )
        if value is not None and length is not None and len(value) != length:
            self.note(key, f"has {len(value)} numbers, needs {length} ({why})")
        return () if value is None else tuple(map(float, value))

    def integers(self, key: str, below: int, why: str) -> tuple[int, ...]:
        """A list of ints from 0 to `below` - 1; empty where the key is missing or null."""
        if not self.given(key):
            return ()
        value = self.raw[key]
        if not isinstance(value, list) or not all(_is_int(item, 0) for item in value):
            self.note(key, f"is {spell(value)}, needs a list of ints of at least 0")
            return ()
        beyond = [item for item in value if item >= below]
        if beyond:
            self.note(key, f"has {beyond[0]}, needs 0 to {below - 1} ({why})")
        return tuple(value)

    def _take(self, key: str, default: Any, needed: str, fits: Callable[[Any], bool]) -> Any:
        """The value, or the default, or None after noting a problem."""
        if key not in self.raw:
            if default is None:
                self.note(key, f"is missing, needs {needed}")
            return default
        value = self.raw[key]
        if fits(value):
            return value
        self.note(key, f"is {spell(value)}, needs {needed}")
        return None


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether it is a number above 0 that fp32 can hold; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < LARGEST


def spell(value: Any) -> str:
    """The value as JSON, cut off after 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
