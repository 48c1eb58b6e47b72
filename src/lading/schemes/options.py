"""Typed look-ups in a quantization_config: the first wrong value is a ConfigError. No torch.

It names the key, what was found and what is needed:
    quantization_config.bits: is 5, needs 2, 3, 4 or 8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lading.errors import ConfigError

__all__ = ["Options", "one_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One object of a config.

    scope   the object's own place, for messages: "quantization_config.dynamic['+:.*up_proj']"

    A key that is null counts as missing, as it does for the tools that write these configs.
    """

    raw: Mapping[str, Any]
    scope: str = "quantization_config"

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def integer(
        self, key: str, default: int | None = None, *, allowed: Sequence[int] | None = None
    ) -> int:
        """An int, one of `allowed` where that is given; without a default it must be there."""
        needed = one_of(allowed) if allowed is not None else "an int"
        value = self._value(key, default, needed)
        if not _is_int(value) or (allowed is not None and value not in allowed):
            raise self.problem(key, needed)
        return int(value)

    def group_size(self, key: str = "group_size", default: int | None = None) -> int:
        """At least 1, or -1 for one group over all inputs."""
        needed = "-1 or an int of at least 1"
        value = self._value(key, default, needed)
        if not _is_int(value) or (value < 1 and value != -1):
            raise self.problem(key, needed)
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """Either true or false."""
        value = self._value(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.problem(key, "true or false")
        return value

    def word(self, key: str) -> str | None:
        """A string, None where the key is missing."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, str):
            raise self.problem(key, "a string")
        return value

    def words(self, key: str) -> tuple[str, ...]:
        """A list of strings; () where the key is missing."""
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise self.problem(key, "a list of strings or null")
        return tuple(value)

    def objects(self, key: str) -> tuple[tuple[str, Options], ...]:
        """An object of objects, in the file's order; () where the key is missing."""
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, Mapping):
            raise self.problem(key, "an object or null")
        result = []
        for name, inner in value.items():
            scope = f"{self.scope}.{key}[{name!r}]"
            if inner is not None and not isinstance(inner, Mapping):
                raise ConfigError(f"is {_spell(inner)}, needs an object", subject=scope)
            result.append((str(name), Options(raw=inner or {}, scope=scope)))
        return tuple(result)

    def problem(self, key: str, needed: str, *, hint: str | None = None) -> ConfigError:
        """What is wrong with a key: what is there, and what has to be."""
        found = "is missing" if not self.given(key) else f"is {_spell(self.raw[key])}"
        return ConfigError(f"{found}, needs {needed}", subject=f"{self.scope}.{key}", hint=hint)

    def _value(self, key: str, default: Any, needed: str) -> Any:
        if self.given(key):
            return self.raw[key]
        if default is None:
            raise self.problem(key, needed)
        return default


def one_of(values: Sequence[Any]) -> str:
    """(2, 3, 4) -> '2, 3 or 4'."""
    words = [str(value) for value in values]
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _spell(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
