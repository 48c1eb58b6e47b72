"""JSON values that are believed to be nothing until they were looked at: objects, lists, numbers.

Each function takes a value and where it stands ("sources[3].shape", the subject of the error), and
returns it as what it should be, or raises a PlanFileError. What a value means is not known here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from lading.errors import LadingError, PlanFileError

__all__ = [
    "MAX_INT",
    "fail",
    "read_bool",
    "read_int",
    "read_items",
    "read_list",
    "read_mapping",
    "read_object",
    "read_text",
    "short",
]

MAX_INT = 2**63 - 1

_T = TypeVar("_T")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


def short(value: object) -> str:
    """The value as messages show it: long ones are cut."""
    return _short.repr(value)


def read_object(value: object, at: str, keys: str, optional: str = "") -> dict[str, Any]:
    """A JSON object that has all of `keys` and nothing but `optional` ones besides."""
    found = read_mapping(value, at)
    needed = keys.split()
    for key in needed:
        if key not in found:
            fail(at, f"has no key {key!r}, needs {', '.join(needed)}")
    for key in found:
        if key not in needed and key not in optional.split():
            known = ", ".join((*needed, *optional.split()))
            fail(at, f"has the key {short(key)}, needs no others than {known}")
    return found


def read_mapping(value: object, at: str) -> dict[str, Any]:
    """An object. Raises a PlanFileError that names the place `at`, as all of these do."""
    if not isinstance(value, dict):
        fail(at, f"is {short(value)}, needs an object")
    for key in value:
        if not isinstance(key, str):
            fail(at, f"has the key {short(key)}, needs strings")
    return value


def read_items(value: object, at: str) -> list[Any]:
    """A list of anything."""
    if not isinstance(value, list):
        fail(at, f"is {short(value)}, needs a list")
    return value


def read_list(value: object, at: str, parse: Callable[[object, str], _T]) -> list[_T]:
    """Each item, parsed; what a value's own type refuses becomes a fault of the file."""
    return [_parsed(parse, item, f"{at}[{i}]") for i, item in enumerate(read_items(value, at))]


def _parsed(parse: Callable[[object, str], _T], value: object, at: str) -> _T:
    try:
        return parse(value, at)
    except PlanFileError:
        raise
    except LadingError as error:
        raise PlanFileError(f"cannot be: {error}", subject=at) from error


def read_int(value: object, at: str, *, at_least: int = 0, at_most: int = MAX_INT) -> int:
    """An int in a range; true is none."""
    if type(value) is not int or not at_least <= value <= at_most:
        fail(at, f"is {short(value)}, needs an int from {at_least} to {at_most}")
    return value


def read_bool(value: object, at: str) -> bool:
    """true or false; 1 is neither."""
    if not isinstance(value, bool):
        fail(at, f"is {short(value)}, needs true or false")
    return value


def read_text(value: object, at: str) -> str:
    """A string."""
    if not isinstance(value, str):
        fail(at, f"is {short(value)}, needs a string")
    return value


def fail(at: str, fact: str) -> NoReturn:
    """Raises the PlanFileError of the place `at`."""
    raise PlanFileError(fact, subject=at)
