"""Typed look-ups in one object of a quantisation config; the first problem is raised. No torch.

What a key means is the business of each format's parser. A key that is absent or null has the
default; without one it is a ConfigError, as is a value of another type.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from lading.errors import ConfigError

__all__ = ["Keys", "shown"]


class Keys:
    """One object of the config.

    raw    the object
    path   its own key, "quantization_config.config_groups.group_0"
    """

    def __init__(self, raw: Any, path: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"is {shown(raw)}, needs an object", subject=path)
        self.raw: Mapping[str, Any] = raw
        self.path = path

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.raw.get(key) is not None

    def refuse(self, key: str, needed: str) -> NoReturn:
        """Raises the ConfigError of a key: what it is, what it needs to be."""
        found = f"is {shown(self.raw[key])}" if key in self.raw else "is missing"
        raise ConfigError(f"{found}, needs {needed}", subject=f"{self.path}.{key}")

    def inner(self, key: str) -> Keys | None:
        """The object under a key; None where it is absent, null or empty."""
        return Keys(self.raw[key], f"{self.path}.{key}") if self.raw.get(key) not in (None, {}) else None

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int | None = None
    ) -> int:
        """An int from `least` to `most`."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self.refuse(key, _range(least, most))
        if most is not None and value > most:
            self.refuse(key, _range(least, most))
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Either true or false."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return default if value is None else value

    def word(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of the allowed words, in lower or upper case."""
        value = self.raw.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value.lower() not in allowed:
            self.refuse(key, f"{'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}")
        return value.lower()

    def words(self, key: str) -> tuple[str, ...]:
        """A list of texts; none where the key is absent or null."""
        value = self.raw.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            self.refuse(key, "a list of texts")
        return tuple(value)


def shown(value: Any) -> str:
    """The value as JSON, cut off after 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _range(least: int, most: int | None) -> str:
    return f"an int of at least {least}" if most is None else f"an int from {least} to {most}"
