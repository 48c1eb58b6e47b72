"""Values that are not what they should be, and where the error says that they stand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from lading.errors import LayoutError, PlanFileError
from lading.json_values import (
    MAX_INT,
    read_bool,
    read_int,
    read_items,
    read_list,
    read_mapping,
    read_object,
    read_text,
    short,
)


def test_values_come_back_as_they_are() -> None:
    assert read_int(MAX_INT, "x") == MAX_INT
    assert read_int(-1, "x", at_least=-1) == -1
    assert read_bool(True, "x") is True
    assert read_text("", "x") == ""
    assert read_items([1], "x") == [1]
    assert read_list([1, 2], "x", read_int) == [1, 2]
    assert read_object({"a": 1, "c": 2}, "x", "a", "b c") == {"a": 1, "c": 2}


@dataclass(frozen=True)
class Fails:
    id: str
    read: Callable[[], Any]
    text: str


def refuse(value: object, at: str) -> None:
    raise LayoutError("is 3, needs 4", part="k")


FAILS = [
    Fails("a flag", lambda: read_int(True, "x"), f"x: is True, needs an int from 0 to {MAX_INT}."),
    Fails("half", lambda: read_int(1.0, "x"), f"x: is 1.0, needs an int from 0 to {MAX_INT}."),
    Fails("too much", lambda: read_int(9, "x", at_most=8), "x: is 9, needs an int from 0 to 8."),
    Fails("0", lambda: read_bool(0, "x"), "x: is 0, needs true or false."),
    Fails("null", lambda: read_text(None, "x"), "x: is None, needs a string."),
    Fails("text of letters", lambda: read_items("ab", "x"), "x: is 'ab', needs a list."),
    Fails("no object", lambda: read_mapping([], "x"), "x: is [], needs an object."),
    Fails("a key", lambda: read_mapping({1: 2}, "x"), "x: has the key 1, needs strings."),
    Fails("missing", lambda: read_object({"a": 1}, "x", "a b"), "x: has no key 'b', needs a, b."),
    Fails(
        "unknown",
        lambda: read_object({"a": 1, "z": 2}, "x", "a", "b"),
        "x: has the key 'z', needs no others than a, b.",
    ),
    Fails(
        "an item",
        lambda: read_list([1, "2"], "x", read_int),
        f"x[1]: is '2', needs an int from 0 to {MAX_INT}.",
    ),
    Fails(
        "an item that its own type refuses",
        lambda: read_list([1], "x", refuse),
        "x[0]: cannot be: part 'k': is 3, needs 4.",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused(case: Fails) -> None:
    with pytest.raises(PlanFileError) as caught:
        case.read()
    assert str(caught.value) == case.text


def test_long_values_are_cut() -> None:
    assert len(short("x" * 10_000)) <= 80
    assert len(short(10**1000)) <= 80
