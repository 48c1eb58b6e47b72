"""What follows from a layout, worked out once, and the proof that it covers. Pure: no torch.

Many targets of a plan share a few layouts. `work_out` gives equal layouts one `Worked`, which keeps
their shapes and placements, and says over all ranks at once what is wrong with them: which elements
of a local parameter are in no copy or in two, which elements of a checkpoint tensor no rank keeps.

Letters: r = tp_rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from lading.errors import LayoutError
from lading.layouts import Layout, PartName, Placement
from lading.regions import Coverage, Region, cover

__all__ = ["Worked", "work_out"]

Stored = tuple[PartName, bool]
"""A part, and whether its checkpoint tensor holds all parts side by side."""


class Worked:
    """A layout and what follows from it; each answer is computed when it is first asked for."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.part_names = layout.part_names
        self._shapes: dict[Stored, tuple[int, ...]] = {}
        self._placements: dict[tuple[PartName, bool, int], Placement | None] = {}
        self._padding: dict[int, tuple[Region, ...]] = {}
        self._faults: dict[tuple[Stored, ...], tuple[str, ...]] = {}

    def source_shape(self, part: PartName, *, fused: bool) -> tuple[int, ...]:
        """The shape that a part's checkpoint tensor needs."""
        shape = self._shapes.get((part, fused))
        if shape is None:
            shape = self.layout.fused_shape if fused else self.layout.source_shape(part)
            self._shapes[part, fused] = shape
        return shape

    def place(self, part: PartName, tp_rank: int, *, fused: bool) -> Placement | None:
        """What rank r keeps of a part, None where that is nothing but padding."""
        key = (part, fused, tp_rank)
        try:
            return self._placements[key]
        except KeyError:
            found = self.layout.place(part, tp_rank, fused_source=fused)
            return self._placements.setdefault(key, found)

    def padding(self, tp_rank: int) -> tuple[Region, ...]:
        """The boxes of rank r's parameter that are padding."""
        found = self._padding.get(tp_rank)
        if found is None:
            found = self._padding[tp_rank] = self.layout.padding(tp_rank)
        return found

    def faults(self, stored: tuple[Stored, ...]) -> tuple[str, ...]:
        """What is wrong over ALL ranks where these parts are stored; () when proved."""
        found = self._faults.get(stored)
        if found is None:
            try:
                found = tuple(self._prove(stored))
            except LayoutError as error:
                found = (error.fact,)
            except ValueError as error:  # a region that leaves its tensor
                found = (f"{error} (a fault of its layout)",)
            self._faults[stored] = found
        return found

    def _prove(self, stored: tuple[Stored, ...]) -> Iterator[str]:
        kept: dict[str, dict[Region, None]] = {}
        for rank in range(self.layout.tp_size):
            written = list(self.padding(rank))
            for part, fused in stored:
                placement = self.place(part, rank, fused=fused)
                if placement is not None:
                    written.append(placement.target)
                    kept.setdefault(_tensor(part, fused), {})[placement.source] = None
            where = f"rank {rank}'s parameter"
            yield from _faults(cover(self.layout.local_shape, written), where)
        for tensor, regions in kept.items():
            shape = next(iter(regions)).shape
            coverage = cover(shape, list(regions))
            if self.layout.shares_entries:  # an entry that a cut goes through is kept on both sides
                coverage = replace(coverage, twice=None, writers=None)
            yield from _faults(coverage, tensor)


def _tensor(part: PartName, fused: bool) -> str:
    if fused:
        return "the fused checkpoint tensor"
    return "the checkpoint tensor" if part is None else f"part {part!r}'s checkpoint tensor"


def _faults(coverage: Coverage, where: str) -> Iterator[str]:
    for region, found in ((coverage.missing, "no copy"), (coverage.twice, "two copies")):
        if region is not None:
            yield (
                f"elements {region} of {where} {list(region.shape)} are in {found}, "
                "needs exactly one (a fault of its layout)"
            )


def work_out(layouts: Mapping[str, Layout]) -> dict[str, Worked]:
    """Each name's layout, worked out; equal layouts are one.

    Hashing a layout walks its values, so each object is hashed once.
    """
    known: dict[Layout, Worked] = {}
    by_id: dict[int, Worked] = {}  # the mapping keeps the layouts alive, so an id is one layout
    found: dict[str, Worked] = {}
    for name, layout in layouts.items():
        worked = by_id.get(id(layout))
        if worked is None:
            worked = known.get(layout)
            if worked is None:
                worked = known[layout] = Worked(layout)
            by_id[id(layout)] = worked
        found[name] = worked
    return found
