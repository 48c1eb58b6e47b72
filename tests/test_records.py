"""A quick value beside the plain dataclass of the same body: they may not be told apart."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import FrozenInstanceError, asdict, dataclass, fields, replace
from typing import Any

import pytest

from lading.records import quick


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    name: str
    size: tuple[int, ...]
    part: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("needs a name")


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Quick:
    name: str
    size: tuple[int, ...]
    part: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("needs a name")


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Unchecked:
    name: str


@pytest.mark.parametrize("given", [{"part": "q"}, {}])
def test_fields_and_defaults(given: dict[str, Any]) -> None:
    one = Quick(name="w", size=(2, 3), **given)
    assert asdict(one) == asdict(Plain(name="w", size=(2, 3), **given))
    assert repr(one) == repr(Plain(name="w", size=(2, 3), **given)).replace("Plain", "Quick")
    assert Unchecked(name="").name == ""


def test_equality_and_hash() -> None:
    one, same, other = (Quick(name=n, size=(1,)) for n in ("a", "a", "b"))
    assert one == same
    assert hash(one) == hash(same) == hash(Plain(name="a", size=(1,)))
    assert one != other
    assert one != Plain(name="a", size=(1,))


@pytest.mark.parametrize(
    "given",
    [{}, {"name": "w"}, {"name": "w", "size": (), "more": 1}],
    ids=["none", "one is missing", "one too many"],
)
def test_what_it_does_not_take(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Plain(**given)
    with pytest.raises(TypeError):
        Quick(**given)
    with pytest.raises(TypeError):
        Quick("w", ())  # type: ignore[misc]


def test_it_is_checked_and_frozen() -> None:
    with pytest.raises(ValueError, match="needs a name"):
        Quick(name="", size=())
    one = Quick(name="w", size=())
    with pytest.raises(FrozenInstanceError):
        one.name = "x"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        one.more = 1  # type: ignore[attr-defined]


def test_replace_pickle_and_copy() -> None:
    one = Quick(name="w", size=(4,), part="k")
    assert replace(one, name="v") == Quick(name="v", size=(4,), part="k")
    with pytest.raises(ValueError, match="needs a name"):
        replace(one, name="")
    assert pickle.loads(pickle.dumps(one)) == one
    assert copy.deepcopy(one) == one


def test_what_is_said_of_it() -> None:
    assert inspect.signature(Quick) == inspect.signature(Plain)
    assert [f.name for f in fields(Quick)] == ["name", "size", "part"]
    assert Quick.__init__.__annotations__ == Plain.__init__.__annotations__
