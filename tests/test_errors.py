"""The tree of errors: who is whose child, what is printed, and that facts survive a pickle."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import re

import pytest

from lading import errors
from lading.errors import (
    CallError,
    CheckpointError,
    LadingError,
    MissingTensorError,
    PlanError,
    ShapeError,
)

CLASSES = [
    thing
    for thing in vars(errors).values()
    if inspect.isclass(thing) and issubclass(thing, LadingError)
]
PLAIN = [cls for cls in CLASSES if cls is not PlanError]
BUILTINS = {
    "LayoutError": [ValueError],
    "ShapeError": [ValueError],
    "DtypeError": [ValueError],
    "CallError": [ValueError],
    "KeywordError": [ValueError, TypeError],
    "ConflictError": [ValueError],
    "NotLoadedError": [RuntimeError],
    "DeviceError": [RuntimeError],
    "RankError": [RuntimeError],
}


def test_the_drawn_tree_is_the_tree() -> None:
    """Each class stands in the docstring, under its parent; the list of names has all of them."""
    drawn = re.findall(r"^    ((?:[│ ]   )*)(?:[├└]── )?(\w+Error)", str(errors.__doc__), re.M)
    path: list[str] = []
    parents: dict[str, str] = {}
    for indent, name in drawn:
        depth = len(indent) // 4 + (name != "LadingError")
        path = [*path[:depth], name]
        parents[name] = path[depth - 1] if depth else "Exception"
    assert parents == {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    assert sorted(errors.__all__) == sorted(cls.__name__ for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_what_else_an_error_is(cls: type[LadingError]) -> None:
    found = [kind for kind in (ValueError, TypeError, RuntimeError) if issubclass(cls, kind)]
    assert found == BUILTINS.get(cls.__name__, [])


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_pickled_with_all_facts(cls: type[LadingError]) -> None:
    error = cls("is 3, needs 4", subject="x.weight", part="k", file="a.safetensors", hint="TP 2")
    error.rank = 2
    for back in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(back) is cls
        assert vars(back) == vars(error)
        assert back.args == error.args
        assert str(back) == str(error)
        assert back.to_dict() == error.to_dict()


def test_a_plan_error_pickled_with_its_problems() -> None:
    problems = [
        ShapeError("is bf16[3], needs bf16[4]", subject="a", part=0),
        MissingTensorError("has no tensor", subject="b", file="c"),
    ]
    error = PlanError(problems, what="the checkpoint")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is PlanError
    assert (back.what, back.fact) == ("the checkpoint", "the checkpoint has 2 problems")
    assert [p.to_dict() for p in back.problems] == [p.to_dict() for p in problems]
    assert [type(p) for p in back.problems] == [ShapeError, MissingTensorError]
    assert str(back) == str(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (LadingError("is 3"), "is 3."),
        (LadingError("is it?"), "is it?"),
        (LadingError("is 3", subject="x"), "x: is 3."),
        (LadingError("is 3", part=0), "part 0: is 3."),
        (LadingError("is 3", subject="x", part="k"), "x, part 'k': is 3."),
        (LadingError("is 3", file="f"), "is 3. In f."),
        (LadingError("is 3", hint="4"), "is 3. Try: 4."),
        (
            LadingError("is 3", subject="x", part="k", file="f", hint="4 or 5."),
            "x, part 'k': is 3. In f. Try: 4 or 5.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_printed(error: LadingError, text: str) -> None:
    assert str(error) == text


def test_printed_with_the_rank_that_met_it() -> None:
    error = LadingError("is 3", subject="x", file="f", hint="4")
    error.rank = 2
    assert str(error) == "x: is 3. In f. On rank 2. Try: 4."


def test_located_keeps_what_is_known() -> None:
    error = CallError("is 3", part="k")
    assert error.located(subject="x", part="v", file="f") is error
    assert str(error) == "x, part 'k': is 3. In f."
    assert str(error.located(subject="y")) == "x, part 'k': is 3. In f."


def test_facts_are_json() -> None:
    facts = ShapeError("is 3", subject="x", part=0, file="f", hint="4").to_dict()
    assert json.loads(json.dumps(facts)) == {
        "error": "ShapeError",
        "subject": "x",
        "part": 0,
        "fact": "is 3",
        "file": "f",
        "hint": "4",
        "rank": None,
        "message": "x, part 0: is 3. In f. Try: 4.",
    }


def test_a_plan_error_of_one_problem_is_that_problem() -> None:
    error = PlanError([CheckpointError("is gone", subject="x")])
    assert str(error) == "x: is gone."
    assert error.fact == "the plan has 1 problem"


def test_a_plan_error_prints_20_of_25() -> None:
    problems = [CheckpointError("is gone", subject=f"x{i}") for i in range(25)]
    lines = str(PlanError(iter(problems))).splitlines()
    assert lines[0] == "the plan has 25 problems:"
    assert lines[1:21] == [f"  x{i}: is gone." for i in range(20)]
    assert lines[21:] == ["  ... and 5 more (`.problems` or --json has all)"]
    assert len(PlanError(problems).to_dict()["problems"]) == 25
    assert len(str(PlanError(problems[:20])).splitlines()) == 21, "20 are no more than 20"
