"""The proof of coverage: it passes what covers, and says what a layout leaves out or has twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from lading.layers import Layer
from lading.layouts import Layout, PartName, Placement
from lading.proof import Worked, work_out
from lading.regions import Region

Place = Callable[[Placement | None, PartName, int], Placement | None]


def layout_of(layer: Layer, tp_size: int) -> Layout:
    return layer.layout(layer.specs()[0], tp_size)


QKV = layout_of(Layer.qkv(5, 2, 6, 2), 6)
VOCAB = layout_of(Layer.embedding(101, 4, pad_to=8), 5)
MERGED = layout_of(Layer.column(5, [6, 9]), 3)


@pytest.mark.parametrize("layout", [QKV, VOCAB, MERGED], ids=["qkv", "vocabulary", "merged"])
@pytest.mark.parametrize("fused", [False, True], ids=["parts", "fused"])
def test_layouts_that_cover(layout: Layout, fused: bool) -> None:
    names = layout.part_names
    assert Worked(layout).faults(tuple((name, fused and len(names) > 1) for name in names)) == ()


def moved(region: Region, by: int) -> Region:
    return replace(region, start=(region.start[0] + by, *region.start[1:]))


@dataclass(frozen=True)
class Sabotage:
    """What `place` answers instead, and what the proof of MERGED says to it."""

    id: str
    place: Place
    faults: tuple[str, ...]


def _shift_source(found: Placement | None, part: PartName, rank: int) -> Placement | None:
    shifted = found is not None and (part, rank) == (0, 0)
    return replace(found, source=moved(found.source, 1)) if found and shifted else found


def _shift_target(found: Placement | None, part: PartName, rank: int) -> Placement | None:
    shifted = found is not None and (part, rank) == (0, 1)
    return replace(found, target=moved(found.target, 1)) if found and shifted else found


def _drop(found: Placement | None, part: PartName, rank: int) -> Placement | None:
    return None if (part, rank) == (1, 2) else found


def _leave(found: Placement | None, part: PartName, rank: int) -> Placement | None:
    leaving = found is not None and (part, rank) == (1, 2)
    return replace(found, source=moved(found.source, 1)) if found and leaving else found


FAULT = "needs exactly one (a fault of its layout)"
SABOTAGES = [
    Sabotage(
        "a source a row too far",
        _shift_source,
        (
            f"elements [0:1, 0:5] of part 0's checkpoint tensor [6, 5] are in no copy, {FAULT}",
            f"elements [2:3, 0:5] of part 0's checkpoint tensor [6, 5] are in two copies, {FAULT}",
        ),
    ),
    Sabotage(
        "a target a row too far",
        _shift_target,
        (
            f"elements [0:1, 0:5] of rank 1's parameter [5, 5] are in no copy, {FAULT}",
            f"elements [2:3, 0:5] of rank 1's parameter [5, 5] are in two copies, {FAULT}",
        ),
    ),
    Sabotage(
        "a piece dropped",
        _drop,
        (
            f"elements [2:5, 0:5] of rank 2's parameter [5, 5] are in no copy, {FAULT}",
            f"elements [6:9, 0:5] of part 1's checkpoint tensor [9, 5] are in no copy, {FAULT}",
        ),
    ),
    Sabotage(
        "past the end",
        _leave,
        ("region [7:10, 0:5] leaves the tensor of shape [9, 5] (a fault of its layout)",),
    ),
]


def sabotage(monkeypatch: pytest.MonkeyPatch, place: Place) -> None:
    honest = Layout.place

    def dishonest(
        layout: Layout, part: PartName, tp_rank: int, *, fused_source: bool = False
    ) -> Placement | None:
        return place(honest(layout, part, tp_rank, fused_source=fused_source), part, tp_rank)

    monkeypatch.setattr(Layout, "place", dishonest)


@pytest.mark.parametrize("case", SABOTAGES, ids=lambda case: case.id)
def test_sabotage_is_found(case: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotage(monkeypatch, case.place)
    assert Worked(MERGED).faults(((0, False), (1, False))) == case.faults


def test_padding_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "padding", lambda layout, tp_rank: ())
    assert Worked(VOCAB).faults(((None, False),)) == (
        f"elements [5:24, 0:4] of rank 4's parameter [24, 4] are in no copy, {FAULT}",
    )


def test_a_part_that_is_bound_to_nothing() -> None:
    assert Worked(MERGED).faults(((0, False),)) == tuple(
        f"elements [2:5, 0:5] of rank {rank}'s parameter [5, 5] are in no copy, {FAULT}"
        for rank in range(3)
    )


def test_equal_layouts_are_worked_out_once() -> None:
    again = layout_of(Layer.column(5, [6, 9]), 3)
    assert again is not MERGED
    found = work_out({"a": MERGED, "b": again, "c": QKV, "d": MERGED})
    assert found["a"] is found["b"] is found["d"]
    assert found["c"].layout is QKV
    assert found["a"].place(0, 1, fused=False) is found["b"].place(0, 1, fused=False)
    assert found["a"].source_shape(1, fused=False) == (9, 5)
    assert found["a"].source_shape(1, fused=True) == (15, 5)
