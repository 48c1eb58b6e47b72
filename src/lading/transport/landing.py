"""Copies by value on a GPU: bytes go there as they are stored, a bounded amount at a time, and are
cast or permuted there. While one half of the room fills, what is in the other is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lading import dtypes, writing
from lading.plan import Plan
from lading.regions import Copy, Region, reordered
from lading.transport.cuda import Gpu
from lading.transport.engine import Engine, Stats
from lading.transport.faults import problem_of
from lading.transport.host import Advance, Moved, blocks, located, position
from lading.transport.jobs import JobList, Piece, common_runs
from lading.transport.sorting import Opened

__all__ = ["ALIGN_BYTES", "Landed", "Landing", "batches"]

ALIGN_BYTES = 512


@dataclass(frozen=True, slots=True)
class Landed:
    """A box of a copy, `inner` in its own coordinates; its bytes are `at` bytes into the room."""

    copy: Copy
    inner: Region
    at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """Copies of one plan into parameters on one GPU.

    room_bytes   of GPU memory, for both halves together
    stats, moved   are added to
    """

    plan: Plan
    tensors: Mapping[str, torch.Tensor]
    opened: Opened
    gpu: Gpu
    room_bytes: int
    stats: Stats
    moved: Moved
    advance: Advance

    def run(self, copies: Sequence[Copy], device: torch.device) -> None:
        """Raises the error of the first copy, in file order, that failed."""
        engine = Engine(chunk_bytes=self.gpu.buffer_bytes)
        half = max(self.room_bytes // 2, ALIGN_BYTES)
        halves = [torch.empty(half, dtype=torch.uint8, device=device) for _ in range(2)]
        before: tuple[torch.Tensor, list[Landed]] = halves[1], []
        for number, batch in enumerate(batches(self.plan, copies, half)):
            self.gpu.follow()  # the half that is filled now was read from a moment ago
            self._fill(batch, halves[number % 2], before, engine)
            self._note(before[1])
            before = halves[number % 2], batch
        self._write(*before)
        self._note(before[1])
        torch.cuda.current_stream(device).synchronize()
        self.stats.add(engine.stats)
        self.moved.num_copies += len(copies)

    def _fill(
        self,
        batch: Sequence[Landed],
        room: torch.Tensor,
        before: tuple[torch.Tensor, list[Landed]],
        engine: Engine,
    ) -> None:
        """Fills one half while what landed in the other before is written."""
        address = writing.address(room)
        assert address is not None, "new memory is dense"
        plan, opened, pending = self.plan, self.opened, JobList()
        for one in batch:
            source = plan.sources[one.copy.source]
            with located(source, one.copy.target, one.copy.part):
                file = opened.number(source.file)
            region = one.copy.source_region.compose(one.inner)
            grid = common_runs(region, Region.whole(region.size))
            piece = Piece(grid, dtypes.storage_bytes(source.dtype))
            pending.add(piece, file, source.offset_bytes, address + one.at, False)
        jobs, owners = pending.jobs()
        read, write = engine.stats.read_bytes, partial(self._write, *before)
        fault = engine.run(jobs, opened.descriptors, device=self.gpu, meanwhile=write)
        opened.files.count(engine.stats.read_bytes - read)
        self.moved.read_bytes += engine.stats.read_bytes - read
        if fault is not None:
            owner = batch[int(owners[min(fault.job, len(owners) - 1)])].copy
            raise problem_of(fault, plan.sources[owner.source], owner, opened)

    def _write(self, room: torch.Tensor, landed: Sequence[Landed]) -> None:
        for one in landed:
            source, target = self.plan.sources[one.copy.source], self.tensors[one.copy.target]
            num_bytes = one.inner.num_elements * dtypes.storage_bytes(source.dtype)
            values = room[one.at : one.at + num_bytes].view(dtypes.to_torch(source.dtype))
            values = writing.permuted(values.view(one.inner.size), one.copy)
            into = reordered(one.inner, one.copy.axes) if one.copy.axes else one.inner
            with (
                located(source, one.copy.target, one.copy.part),
                torch.inference_mode(target.is_inference()),
            ):
                writing.check_values(values, target.dtype)
                writing.write(target, one.copy.target_region.compose(into), values)

    def _note(self, landed: Sequence[Landed]) -> None:
        for one in landed:
            size = dtypes.storage_bytes(self.plan.sources[one.copy.source].dtype)
            self.moved.kept_bytes += one.inner.num_elements * size
            self.advance(one.inner.num_elements * size)


def batches(plan: Plan, copies: Sequence[Copy], room_bytes: int) -> Iterator[list[Landed]]:
    """Boxes of copies, in file order, as many as fit the room at a time."""
    batch: list[Landed] = []
    at = 0
    for copy in sorted(copies, key=lambda copy: position(plan.sources[copy.source], copy)):
        size = dtypes.storage_bytes(plan.sources[copy.source].dtype)
        whole = Region.whole(copy.source_region.size)
        fits = copy.source_region.num_elements * size <= room_bytes
        boxes = [whole] if fits else list(blocks(whole, room_bytes // size))
        for inner in boxes:
            num_bytes = inner.num_elements * size
            if at + num_bytes > room_bytes and batch:
                yield batch
                batch, at = [], 0
            batch.append(Landed(copy, inner, at))
            at = -(-(at + num_bytes) // ALIGN_BYTES) * ALIGN_BYTES
    if batch:
        yield batch
