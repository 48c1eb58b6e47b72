"""Moves between a checkpoint's files and ranks' files, in memory, against numpy's indexing.

The oracle executes each copy of the plan on whole arrays (`tests.oracles.run`); here everything
goes band by band, through bytes at offsets.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lading.checkpoint import Source
from lading.errors import LadingError
from lading.layouts import Axis, Cut, Layout, Part
from lading.plan import Plan, Target, make_plan
from lading.ranks import all_ranks
from lading.shards.bands import Files, Shards, array_of, bands, bytes_of, views_of
from tests.oracles import run

SIZES = {"U8": 1, "F4": 1, "BF16": 2, "I32": 4, "F64": 8}


class Memory:
    """Files that are byte arrays: a Reader and a writer, which counts its calls."""

    def __init__(self, num_bytes: int) -> None:
        self.raw = bytearray(num_bytes)
        self.calls = 0

    def read_into(self, source: Source, offset_bytes: int, buffer: memoryview) -> None:
        assert 0 <= offset_bytes <= offset_bytes + buffer.nbytes <= source.num_bytes
        start = source.offset_bytes + offset_bytes
        buffer[:] = self.raw[start : start + buffer.nbytes]
        self.calls += 1

    def write(self, offset: int, data: memoryview) -> None:
        assert 0 <= offset <= offset + data.nbytes <= len(self.raw)
        self.raw[offset : offset + data.nbytes] = data
        self.calls += 1


def places(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Source], int]:
    """Tensors one after another, from an odd offset on; and where the last one ends."""
    found, at = {}, 7
    for name, (dtype, shape) in shapes.items():
        header = (*shape[:-1], shape[-1] * 2) if dtype == "F4" else shape
        size = prod(shape) * SIZES[dtype]
        found[name] = Source(
            name=name, dtype=dtype, shape=header, file="f", offset_bytes=at, num_bytes=size
        )
        at += size
    return found, at


def filled(sources: Mapping[str, Source], end: int) -> tuple[Memory, dict[str, Any]]:
    """A file in which every byte tells where it is, and its tensors as arrays."""
    memory = Memory(end)
    memory.raw[:] = np.random.default_rng(5).integers(0, 256, end, dtype=np.uint8).tobytes()
    arrays = {}
    for name, source in sources.items():
        dtype = f"u{SIZES[source.dtype]}"
        raw = memory.raw[source.offset_bytes : source.offset_bytes + source.num_bytes]
        arrays[name] = np.frombuffer(bytes(raw), dtype=dtype).reshape(source.storage_shape)
    return memory, arrays


def needed_of(plan: Plan, arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every rank's parameters, copy by copy."""
    found = []
    for share in plan.shares:
        mine = {
            t.name: np.zeros(t.layout.local_shape, dtype=f"u{SIZES[t.dtype]}") for t in plan.targets
        }
        for copy in share.copies:
            run(copy, arrays[copy.source], mine[copy.target])
        found.append(mine)
    return found


def shards_of(plan: Plan) -> tuple[list[dict[str, Source]], Memory]:
    """Where each rank's parameters are in one long file of zeros."""
    shapes = {
        f"{rank}/{t.name}": (t.dtype, t.layout.local_shape)
        for rank in range(plan.tp_size)
        for t in plan.targets
    }
    found, end = places(shapes)
    stored = [
        {t.name: found[f"{rank}/{t.name}"] for t in plan.targets} for rank in range(plan.tp_size)
    ]
    return stored, Memory(end)


def move(plan: Plan, views: Any, source: Any, target: Any, band_bytes: int) -> int:
    """Runs it; the largest band in bytes."""
    most = 0
    for band in bands(plan, views, band_bytes):
        values = source.read(band)
        most = max(most, sum(array.nbytes for array in values.values()))
        target.write(band, values)
    return most


def check(targets: Mapping[int, tuple[Target, ...]], n: int, m: int, band_bytes: int) -> None:
    """Files -> n ranks -> m ranks -> files, each compared with whole arrays."""
    one = targets[n]
    shapes = {
        name: (t.dtype, t.layout.source_shape(part))
        for t in one
        for name, part in zip(names_of(t), t.layout.part_names, strict=True)
    }
    sources, end = places(shapes)
    file, arrays = filled(sources, end)
    from lading.names import Names

    names = Names.of({"fused": ["q", "k", "v"]})
    before = make_plan(one, sources, ranks=all_ranks(n), names=names)
    after = make_plan(targets[m], sources, ranks=all_ranks(m), names=names)
    views = views_of([before, after])
    limit = max([band_bytes, *(SIZES[s.dtype] for s in sources.values())])

    stored, ranks = shards_of(before)
    end_of_files = Files(sources=sources, reader=file)  # type: ignore[arg-type]
    shards = Shards(before, stored, views, reader=ranks, writers={"f": ranks})  # type: ignore[arg-type, dict-item]
    assert move(before, views, end_of_files, shards, band_bytes) <= limit
    compare(before, stored, ranks, needed_of(before, arrays))

    others, more = shards_of(after)
    new = Shards(after, others, views, writers={"f": more})  # type: ignore[dict-item]
    assert move(before, views, shards, new, band_bytes) <= limit
    compare(after, others, more, needed_of(after, arrays))

    back = Memory(end)
    into = Files(sources=sources, writers={"f": back})  # type: ignore[dict-item]
    move(before, views, shards, into, band_bytes)
    assert back.raw[7:] == file.raw[7:]


def names_of(target: Target) -> list[str]:
    if len(target.layout.part_names) == 1:
        return [target.name]
    return [target.name.replace("fused", str(part)) for part in target.layout.part_names]


def compare(plan: Plan, stored: Any, memory: Memory, needed: list[dict[str, Any]]) -> None:
    for rank, mine in enumerate(needed):
        for name, array in mine.items():
            place = stored[rank][name]
            raw = memory.raw[place.offset_bytes : place.offset_bytes + place.num_bytes]
            assert bytes(raw) == array.tobytes(), (rank, name)


@st.composite
def targets_of(draw: Any) -> Any:
    """Targets for 1, 2, 3, 4 and 6 ranks: fused along either dim, packed, padded, shared."""
    unit = draw(st.sampled_from((1, 2, 3)))
    heads, kv_heads = draw(st.sampled_from(((12, 12), (12, 2), (12, 1), (6, 3), (24, 4))))
    inputs = draw(st.integers(1, 2)) * 12
    grain = draw(st.sampled_from((1, 2, 4)))
    other = draw(st.sampled_from((1, 2)))
    swapped = draw(st.booleans())
    dtype = draw(st.sampled_from(tuple(SIZES)))
    outputs = Axis(
        parts=(
            Part(name="q", size=heads * unit * other, unit=unit * other),
            Part(name="k", size=kv_heads * unit * other, unit=unit * other, max_pieces=kv_heads),
            Part(name="v", size=kv_heads * unit * other, unit=unit * other, max_pieces=kv_heads),
        )
    )
    whole = Cut(axis=Axis.of(inputs * grain, max_pieces=1), grain=Fraction(grain))
    cuts = (Cut(axis=outputs, grain=Fraction(other)), whole)
    rows = draw(st.integers(1, 30))
    found = {}
    for size in (1, 2, 3, 4, 6):
        try:
            found[size] = (
                Target(
                    name="fused.weight",
                    dtype=dtype,
                    layout=Layout(cuts=cuts[::-1] if swapped else cuts, tp_size=size),
                ),
                Target(
                    name="row.weight",
                    dtype="BF16",
                    layout=Layout(
                        cuts=(
                            Cut(axis=Axis.of(rows, max_pieces=1)),
                            Cut(axis=Axis.of(inputs)),
                        ),
                        tp_size=size,
                    ),
                ),
                Target(
                    name="vocabulary.weight",
                    dtype="U8",
                    layout=Layout(
                        cuts=(
                            Cut(axis=Axis(parts=(Part(size=rows, pad_to=4),))),
                            Cut(axis=Axis.of(3, max_pieces=1)),
                        ),
                        tp_size=size,
                    ),
                ),
                Target(name="norm", dtype="F64", layout=Layout.replicated((rows,), size)),
            )
        except LadingError:
            continue
    return found


@settings(max_examples=40, deadline=None)
@given(targets=targets_of(), data=st.data())
def test_moves(targets: Any, data: Any) -> None:
    assume(targets)
    n = data.draw(st.sampled_from(sorted(targets)))
    m = data.draw(st.sampled_from(sorted(targets)))
    check(targets, n, m, data.draw(st.sampled_from((9, 64, 300, 10**6))))


def test_parts_side_by_side_are_written_together() -> None:
    # q, k, v of 4, 2, 2 columns a rank: rows of all parts are one call, not one a row and part
    sizes = {"q": 8, "k": 4, "v": 4}
    axis = Axis(parts=tuple(Part(name=name, size=size) for name, size in sizes.items()))
    layout = Layout(cuts=(Cut(axis=Axis.of(10, max_pieces=1)), Cut(axis=axis)), tp_size=2)
    targets = (Target(name="fused.weight", dtype="I32", layout=layout),)
    sources, end = places({f"{p}.weight": ("I32", (10, n)) for p, n in sizes.items()})
    file, _ = filled(sources, end)
    from lading.names import Names

    names = Names.of({"fused": ["q", "k", "v"]})
    plan = make_plan(targets, sources, ranks=all_ranks(2), names=names)
    views = views_of([plan])
    stored, ranks = shards_of(plan)
    shards = Shards(plan, stored, views, reader=ranks, writers={"f": ranks})  # type: ignore[arg-type, dict-item]
    move(plan, views, Files(sources=sources, reader=file), shards, 10**6)  # type: ignore[arg-type]
    assert ranks.calls == 2  # one a rank
    assert file.calls == 3  # one a tensor


def test_padding_beside_a_part_is_written_as_zeros() -> None:
    layout = Layout(
        cuts=(
            Cut(axis=Axis.of(4, max_pieces=1)),
            Cut(axis=Axis(parts=(Part(size=5, pad_to=4),))),
        ),
        tp_size=2,
    )
    sources, end = places({"w": ("U8", (4, 5))})
    file, arrays = filled(sources, end)
    plan = make_plan((Target(name="w", dtype="U8", layout=layout),), sources, ranks=all_ranks(2))
    stored, ranks = shards_of(plan)
    ranks.raw[:] = b"\xff" * len(ranks.raw)
    shards = Shards(plan, stored, views_of([plan]), writers={"f": ranks})  # type: ignore[dict-item]
    move(plan, views_of([plan]), Files(sources=sources, reader=file), shards, 10**6)  # type: ignore[arg-type]
    compare(plan, stored, ranks, needed_of(plan, arrays))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)])
def test_bytes_of(shape: tuple[int, ...]) -> None:
    array = array_of(shape, "BF16")
    array[...] = 258
    assert bytes(bytes_of(array)) == b"\x02\x01" * prod(shape)
