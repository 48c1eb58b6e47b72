"""Copies as jobs: each byte of a copy in exactly one run, checked against numpy's indices."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.regions import Copy, Region, reordered
from lading.transport.jobs import FIELDS, JobList, Jobs, Piece, common_runs, job_rows

from ..oracles import copies, index_of, numbered


def in_one_order(copy: Copy) -> tuple[Region, Region]:
    """The copy's regions, the source's dims in the order of the target's."""
    order = copy.axes or tuple(range(len(copy.source_region.shape)))
    return reordered(copy.source_region, order), copy.target_region


def execute(jobs: Jobs, file: bytes, target: np.ndarray) -> None:  # type: ignore[type-arg]
    """What the jobs mean, byte run by byte run."""
    for _, offset, to, run, rows, file_stride, target_stride, _ in jobs.tolist():
        for i in range(rows):
            at = offset + i * file_stride
            assert 0 <= at <= at + run <= len(file)
            ctypes.memmove(to + i * target_stride, file[at : at + run], run)


@settings(max_examples=200, deadline=None)
@given(copy=copies("x", "y"), direct=st.booleans())
def test_a_copy_is_what_numpy_does(copy: Copy, direct: bool) -> None:
    source, target = in_one_order(copy)
    full = numbered(source.shape)
    needed = np.full(target.shape, -1, dtype=np.int64)
    needed[index_of(target) if needed.ndim else ()] = full[index_of(source)] if full.ndim else full
    found = np.full(target.shape, -1, dtype=np.int64)
    grid = common_runs(source, target)
    assert grid.length * grid.num_runs == source.num_elements
    rows = job_rows(
        grid, file=3, offset=16, address=found.ctypes.data, element_bytes=8, direct=direct
    )
    jobs = np.array(rows, dtype=np.int64).reshape(-1, len(FIELDS))
    assert int((jobs[:, 3] * jobs[:, 4]).sum()) == 8 * source.num_elements
    assert (jobs[:, 0] == 3).all()
    assert (jobs[:, 7] == direct).all()
    assert (jobs[:, 3] > 0).all()
    assert (jobs[:, 4] > 0).all()
    execute(jobs, bytes(16) + full.tobytes(), found)
    assert np.array_equal(found, needed)


@pytest.mark.parametrize(
    ("source", "target", "runs"),
    [
        # rows: one run, whatever is beside it
        (Region.box((12, 6), [(4, 8), (0, 6)]), Region.whole((4, 6)), (24, ())),
        # columns: a run a row
        (Region.box((4, 6), [(0, 4), (3, 6)]), Region.whole((4, 3)), (3, (4,))),
        # a view of three dims whose outer two are one grid
        (Region.box((2, 3, 8), [(0, 2), (0, 3), (2, 4)]), Region.whole((2, 3, 2)), (2, (6,))),
        # dense in the source, not in the target
        (Region.whole((4, 3)), Region.box((4, 6), [(0, 4), (0, 3)]), (3, (4,))),
        # every other row
        (
            Region(shape=(9, 5), start=(1, 0), size=(4, 5), step=(2, 1)),
            Region.whole((4, 5)),
            (5, (4,)),
        ),
        (Region.whole(()), Region.whole(()), (1, ())),
    ],
)
def test_runs_are_as_long_as_can_be(
    source: Region, target: Region, runs: tuple[int, tuple[int, ...]]
) -> None:
    grid = common_runs(source, target)
    assert (grid.length, grid.counts) == runs


def test_regions_of_different_sizes_are_a_bug() -> None:
    with pytest.raises(ValueError, match="different sizes"):
        common_runs(Region.whole((2, 3)), Region.whole((3, 2)))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_list_has_the_jobs_of_all_its_copies_in_file_order(data: st.DataObject) -> None:
    given_copies = data.draw(st.lists(copies("x", "y"), min_size=1, max_size=4))
    pieces = [
        (Piece(common_runs(*in_one_order(c)), 4), common_runs(*in_one_order(c)))
        for c in given_copies
    ]
    numbers = st.integers(0, len(pieces) - 1)
    listed = JobList()
    needed = []
    for copy in range(data.draw(st.integers(0, 8))):
        piece, grid = pieces[data.draw(numbers)]
        file, offset, address = (data.draw(st.integers(0, top)) for top in (2, 10_000, 1 << 47))
        direct = data.draw(st.booleans())
        listed.add(piece, file, offset, address, direct)
        rows = job_rows(
            grid, file=file, offset=offset, address=address, element_bytes=4, direct=direct
        )
        needed += [(row, copy) for row in rows]
    jobs, owners = listed.jobs()
    assert jobs.dtype == np.int64
    assert jobs.flags["C_CONTIGUOUS"]
    found = [(tuple(row), owner) for row, owner in zip(jobs.tolist(), owners.tolist(), strict=True)]
    assert sorted(found) == sorted(needed)
    places = [row[:2] for row, _ in found]
    assert places == sorted(places)
