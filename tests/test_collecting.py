"""The collector waits during the work, and does after it what it did before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lading.collecting import uncollected


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    was = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if was else gc.disable)()


@uncollected()
def is_collected(depth: int, *, fail: bool = False) -> list[bool]:
    if fail:
        raise ValueError("as asked")
    return [gc.isenabled(), *(is_collected(depth - 1) if depth else ())]


def test_paused_and_resumed() -> None:
    assert is_collected(2) == [False] * 3
    assert gc.isenabled()


def test_resumed_after_an_error() -> None:
    with pytest.raises(ValueError, match="as asked"):
        is_collected(0, fail=True)
    assert gc.isenabled()


def test_left_as_the_caller_had_it() -> None:
    gc.disable()
    assert is_collected(1) == [False] * 2
    assert not gc.isenabled()


@pytest.mark.parametrize("is_ours", [True, False])
def test_catching_up_is_for_who_paused_it(is_ours: bool) -> None:
    if not is_ours:
        gc.disable()
    seen: list[int] = []
    gc.callbacks.append(lambda phase, info: seen.append(info["generation"]))
    try:
        with uncollected() as pause:
            pause.catch_up()
            assert not gc.isenabled()
    finally:
        gc.callbacks.pop()
    assert seen == ([0, 0] if is_ours else [])  # its start and its stop, the young ones only


def test_is_called_what_it_was() -> None:
    assert is_collected.__name__ == "is_collected"
