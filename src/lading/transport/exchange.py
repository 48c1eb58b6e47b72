"""Bytes that several ranks need, read once by the group: each rank reads its bands, and hands on to
each other rank what that one needs of them (`rounds` says which).

One round is read while the one before is exchanged. A band lies in memory on the parameters' own
device; what others need of it is sent from there where it is contiguous, and packed first where
not; what arrives goes straight into the parameter where it belongs to contiguous memory of it,
and through a buffer otherwise. On a GPU the exchange is work of the current stream: the engine's
streams follow it before a band's memory is read into again, and it gets a band when the engine's
copies have arrived.

A rank that fails goes on taking part in all rounds, with memory that holds anything, and raises
afterwards: nobody waits for it for ever, and the caller exchanges verdicts anyhow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from lading import dtypes, writing
from lading import ranks as ranks_module
from lading.binding import Binding, Target
from lading.layouts import PartName
from lading.plan import Plan, Share
from lading.regions import Copy, Region
from lading.transport.host import Advance, Moved, located
from lading.transport.jobs import JobList, Piece, common_runs
from lading.transport.rounds import Block, Rounds, Sharing, Slab, padded, plan_rounds
from lading.transport.sorting import Opened

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BUCKET_BYTES", "Bands", "Exchange", "plan_exchange"]

BUCKET_BYTES = 128 * 2**20
"""Of a round's bands on each rank: at 45 GB/s they take 3 ms, a run of the engine takes far less to
begin and to end."""

Message = tuple[int, torch.Tensor]


@dataclass(slots=True)
class Bands:
    """What one rank reads in a round. owners[i] is what the i-th copy of `jobs` belongs to."""

    jobs: JobList = field(default_factory=JobList)
    owners: list[tuple[str, Binding]] = field(default_factory=list)


Read = Callable[[Bands, Callable[[], None]], None]
"""Reads the bands, calls its second argument meanwhile, raises a LadingError where that fails."""


def plan_exchange(
    plan: Plan,
    share: Share,
    tensors: Mapping[str, torch.Tensor],
    group: ProcessGroup,
    *,
    sharing: Sharing,
    device_bytes: int,
) -> Exchange | None:
    """This rank's exchange, with its buffers, at most `device_bytes`; None where there is nothing.

    tensors   the parameters; those take part that are dense, on one device, and not made in
              inference mode
    """
    place = next(
        (t.device for t in tensors.values() if ranks_module.carries(group, t.device.type)), None
    )
    if place is None or plan.tp_size < 2:
        return None
    copies = {(c.target, c.part, c.source): c for c in share.copies}
    odd = {copy.target for copy in copies.values() if copy.axes}

    def usable(target: Target) -> bool:
        tensor = tensors.get(target.name)
        return (
            tensor is not None
            and tensor.device == place
            and target.name not in odd
            and not tensor.is_inference()
            and tensor.dtype == dtypes.to_torch(target.dtype)
            and writing.address(tensor) is not None
        )

    bucket_bytes = min(BUCKET_BYTES, device_bytes // 4)
    rounds = plan_rounds(plan, usable, sharing=sharing, bucket_bytes=max(bucket_bytes, 1))
    if not rounds.rounds:
        return None
    _check_own(rounds, share.ranks.tp_rank, copies)
    return Exchange(plan, rounds, share.ranks.tp_rank, tensors, group, place)


def _check_own(rounds: Rounds, rank: int, copies: Mapping[tuple[str, PartName, str], Copy]) -> None:
    """What the rounds bring this rank is just what its share of the plan says."""
    for kinds in rounds.rounds:
        for slab in kinds:
            shared = slab.shared
            for at, placement in shared.kind.needs[rank]:
                binding = shared.bindings[at]
                copy = copies[binding.target, binding.part, binding.source]
                assert (copy.source_region, copy.target_region) == (
                    placement.source,
                    placement.target,
                ), "a share is what its plan's layouts say"


@dataclass(slots=True)
class Exchange:
    """This rank's part in the rounds.

    keys      (target, part, source) of the copies that come this way
    failure   why this rank only seems to take part
    """

    _plan: Plan
    _rounds: Rounds
    _rank: int
    _tensors: Mapping[str, torch.Tensor]
    _group: ProcessGroup
    _device: torch.device
    failure: Exception | None = None
    _next: int = 0
    _bands: list[torch.Tensor] = field(default_factory=list)
    _packed: torch.Tensor | None = None
    _landed: torch.Tensor | None = None
    _is_broken: bool = False

    def __post_init__(self) -> None:
        found = self._rounds
        new = partial(torch.empty, dtype=torch.uint8, device=self._device)
        self._bands = [new(found.band_bytes) for _ in self._rounds.rounds[:2]]
        self._packed, self._landed = new(found.packed_bytes), new(found.landed_bytes)

    @property
    def keys(self) -> frozenset[tuple[str, PartName, str]]:
        return self._rounds.keys

    @property
    def device(self) -> torch.device:
        """Where the parameters and the bands are."""
        return self._device

    @property
    def buffer_bytes(self) -> int:
        """Memory besides the parameters."""
        found = self._rounds
        return len(self._bands) * found.band_bytes + found.packed_bytes + found.landed_bytes

    @property
    def offer(self) -> tuple[str, str, str]:
        """What has to be equal on all ranks, or none may exchange: the rounds, the kind of memory,
        and, unless they were told to, the host.
        """
        return self._rounds.digest, self._device.type, os.uname().nodename

    def run(self, read: Read, opened: Opened, moved: Moved, advance: Advance) -> None:
        """Reads all rounds and exchanges all but the last, which `finish` does.

        Raises, when all rounds are over, what went wrong on this rank.
        """
        for number in range(len(self._rounds.rounds)):
            before = partial(self._exchange_until, number, moved, advance)
            if self.failure is None:
                try:
                    read(self._to_read(number, opened), before)
                except Exception as error:
                    self.failure = self.failure or error
            before()
        if self.failure is not None:
            self.finish(moved, advance)
            raise self.failure

    def finish(self, moved: Moved, advance: Advance) -> None:
        """Takes part in the rounds that are left, and lets go of the memory."""
        self._exchange_until(len(self._rounds.rounds), moved, advance)
        self._bands, self._packed, self._landed = [], None, None

    def wait(self) -> None:
        """Returns when everything has arrived."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def abandon(self, error: Exception) -> None:
        """Takes part in the rounds that are left without reading: this rank has failed."""
        self.failure = self.failure or error
        self.finish(Moved(), lambda _: None)
        self.wait()

    def _exchange_until(self, number: int, moved: Moved, advance: Advance) -> None:
        on_gpu = self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else nullcontext():
            while self._next < number and not self._is_broken:
                self._next += 1
                self._take_part(self._next - 1, moved, advance)

    def _take_part(self, number: int, moved: Moved, advance: Advance) -> None:
        work = _Passing(self, number)
        try:
            work.collect(with_values=self.failure is None)
        except Exception as error:
            self.failure = self.failure or error
            work = _Passing(self, number)
            work.collect(with_values=False)
        try:
            ranks_module.swap(work.sends, work.receives, self._group)
        except Exception as error:  # another rank is gone: nothing more can be sent
            self._is_broken = True
            self.failure = self.failure or error
            raise self.failure from None
        if self.failure is not None:
            return
        try:
            work.write()
            moved.kept_bytes += work.kept_bytes
            moved.received_bytes += sum(tensor.numel() for _, tensor in work.receives)
            moved.given_bytes += work.given_bytes
            advance(work.kept_bytes)
        except Exception as error:
            self.failure = error

    def _to_read(self, number: int, opened: Opened) -> Bands:
        """Jobs for this rank's bands of a round. Raises a FileError."""
        address = writing.address(self._bands[number % 2])
        assert address is not None, "new memory is dense"
        bands = Bands()
        for slab in self._rounds.rounds[number]:
            shared = slab.shared
            source, kind = shared.source, shared.kind
            region = kind.band_region(slab.rows, self._rank)
            if not region.num_elements:
                continue
            with located(source, shared.bindings[0].target, shared.bindings[0].part):
                file = opened.number(source.file)
            grid = common_runs(region, Region.whole(region.size))
            piece = Piece(grid, kind.element_bytes)
            # No other rank reads these bytes: past the page cache, where the file is not in it.
            is_direct = opened.is_cold[file]
            bands.jobs.add(piece, file, source.offset_bytes, address + slab.at, is_direct)
            bands.owners.append((source.name, shared.bindings[0]))
        return bands


class _Passing:
    """The messages of one rank in one round."""

    def __init__(self, exchange: Exchange, number: int) -> None:
        self.sends: list[Message] = []
        self.receives: list[Message] = []
        self.kept_bytes = 0
        self.given_bytes = 0
        self._of = exchange
        self._slabs = exchange._rounds.rounds[number]
        self._memory = exchange._bands[number % 2]
        self._used = [0, 0]  # of the memory for what is packed, for what has landed
        self._writes: list[tuple[torch.Tensor, Region, torch.Tensor]] = []

    def collect(self, *, with_values: bool) -> None:
        """All messages; `with_values`: what is sent is what was read."""
        rank, size = self._of._rank, self._of._plan.tp_size
        for slab in self._slabs:
            band = self._band(slab)
            packed: dict[Region, torch.Tensor] = {}
            for peer in range(size):
                if peer == rank:
                    self._keep(slab, band)
                    continue
                for block in slab.shared.kind.blocks(slab.rows, rank, peer):
                    message = packed.get(block.band)
                    if message is None:
                        message = self._message(band, block.band, with_values)
                        packed[block.band] = message
                    self.sends.append((peer, message))
                for block in slab.shared.kind.blocks(slab.rows, peer, rank):
                    self.receives.append((peer, self._place(slab, block)))
            self.given_bytes += band.numel() * band.element_size()

    def write(self) -> None:
        """Copies to where it belongs what this rank read itself, and what has landed in buffers."""
        with torch.no_grad():
            for target, region, values in self._writes:
                writing.write(target, region, values)

    def _band(self, slab: Slab) -> torch.Tensor:
        kind = slab.shared.kind
        region = kind.band_region(slab.rows, self._of._rank)
        num_bytes = region.num_elements * kind.element_bytes
        return _typed(self._memory[slab.at : slab.at + num_bytes], slab, region.size)

    def _keep(self, slab: Slab, band: torch.Tensor) -> None:
        rank = self._of._rank
        for block in slab.shared.kind.blocks(slab.rows, rank, rank):
            values = writing.view_of(band, block.band)
            self._writes.append((self._target(slab, block), block.target, values))
            num_bytes = values.numel() * values.element_size()
            self.kept_bytes += num_bytes
            self.given_bytes -= num_bytes

    def _message(self, band: torch.Tensor, region: Region, with_values: bool) -> torch.Tensor:
        """A box of the band as bytes: where they lie, or packed."""
        values = writing.view_of(band, region)
        if values.is_contiguous():
            return writing.byte_view(values)
        room = self._room(0, values.numel() * values.element_size())
        if with_values:
            packed = room.view(values.dtype).view(values.shape)
            writing.write(packed, Region.whole(packed.shape), values)
        return room

    def _place(self, slab: Slab, block: Block) -> torch.Tensor:
        """Where a message is received: the parameter itself, or memory from which it is copied."""
        target = self._target(slab, block)
        num_bytes = block.target.num_elements * slab.shared.kind.element_bytes
        self.kept_bytes += num_bytes
        place = writing.landing(target, block.target)
        if place is None:
            place = self._room(1, num_bytes)
            self._writes.append((target, block.target, _typed(place, slab, block.target.size)))
        return place

    def _room(self, which: int, num_bytes: int) -> torch.Tensor:
        memory = (self._of._packed, self._of._landed)[which]
        at = self._used[which]
        self._used[which] = padded(at + num_bytes)
        assert memory is not None, "buffers are kept until the last round"
        assert at + num_bytes <= memory.numel(), "a round has its room"
        return memory[at : at + num_bytes]

    def _target(self, slab: Slab, block: Block) -> torch.Tensor:
        return self._of._tensors[slab.shared.bindings[block.binding].target]


def _typed(memory: torch.Tensor, slab: Slab, size: tuple[int, ...]) -> torch.Tensor:
    return memory.view(dtypes.to_torch(slab.shared.source.dtype)).view(size)
