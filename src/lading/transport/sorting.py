"""Which copies go straight, as jobs, and which by value: what a small tensor costs in Python.

A copy goes straight where both ends are boxes of row-major memory of one dtype. Copies are sorted a
batch at a time, the next one while the engine moves the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from lading import dtypes, writing
from lading.checkpoint.files import ByteReader
from lading.plan import Plan
from lading.regions import Copy
from lading.transport.host import located
from lading.transport.jobs import Grid, JobList, Piece, common_runs
from lading.transport.residency import is_remote, resident_part

__all__ = ["Opened", "Sorting", "Straight"]

BATCH_COPIES = 4096
"""Sorted in 10 ms, by when the engine has moved as many copies of 16 KiB."""

HUGE_TENSOR_BYTES = 4 * 2**20
"""Memory of at least this size is worth huge pages."""

WARM = 0.5
"""A file of which less is in the page cache counts as cold."""


@dataclass(slots=True)
class Straight:
    """The copies that the engine does on one device, and their jobs.

    large   parameters that are worth huge pages, by id
    """

    copies: list[Copy] = field(default_factory=list)
    jobs: JobList = field(default_factory=JobList)
    large: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What copies between the same two regions, of one dtype, have in common.

    is_shared   other ranks of this host need bytes from the same pages of the file
    is_cut      rows of it are cut: it is many runs
    is_large    the bytes are worth huge pages
    """

    dtype: torch.dtype
    piece: Piece
    is_shared: bool
    is_cut: bool
    is_large: bool


class Sorting:
    """Sorts the copies of a rank.

    values   those that go by value, by device, as far as they have been sorted
    """

    def __init__(
        self,
        plan: Plan,
        copies: Sequence[Copy],
        tensors: Mapping[str, torch.Tensor],
        opened: Opened,
        *,
        num_local: int,
    ) -> None:
        self.values: dict[torch.device, list[Copy]] = {}
        self._plan, self._copies, self._tensors = plan, copies, tensors
        self._opened, self._num_local = opened, num_local
        self._kinds: dict[tuple[int, int, str], _Kind] = {}
        self._begun = 0
        self._ready: dict[torch.device, Straight] | None = None

    def take(self) -> dict[torch.device, Straight] | None:
        """The next batch of what goes straight, by device; None after the last."""
        self.prepare()
        ready, self._ready = self._ready, None
        return ready

    def prepare(self) -> None:
        """Has the next batch ready. Raises a FileError for a file that cannot be opened."""
        if self._ready is None and self._begun < len(self._copies):
            batch = self._copies[self._begun : self._begun + BATCH_COPIES]
            self._begun += len(batch)
            self._ready = self._sorted_out(batch)

    def _sorted_out(self, copies: Sequence[Copy]) -> dict[torch.device, Straight]:
        works: dict[torch.device, Straight | None] = {}
        sources, tensors, values = self._plan.sources, self._tensors, self.values
        opened, kinds, numbers = self._opened, self._kinds, self._opened.numbers
        name: str | None = None
        for copy in copies:
            source = sources[copy.source]
            if copy.target != name:  # the parts of a parameter come one after another
                name, target = copy.target, tensors[copy.target]
                device, dtype = target.device, target.dtype
                if device not in works:
                    works[device] = Straight() if device.type in ("cpu", "cuda") else None
                work = works[device]
                address = writing.address(target) if work is not None else None
            if work is None or address is None or copy.axes:
                values.setdefault(device, []).append(copy)
                continue
            key = (id(copy.source_region), id(copy.target_region), source.dtype)
            kind = kinds.get(key)
            if kind is None:
                kind = kinds[key] = self._kind_of(copy, source.dtype)
            if kind.dtype != dtype:
                values.setdefault(device, []).append(copy)
                continue
            file = numbers.get(source.file)
            if file is None:
                with located(source, copy.target, copy.part):
                    file = opened.number(source.file)
            is_direct = opened.is_cold[file] and (kind.is_cut or not kind.is_shared)
            if is_direct and kind.is_shared:
                file = opened.through_cache(file)
            work.jobs.add(kind.piece, file, source.offset_bytes, address, is_direct)
            work.copies.append(copy)
            if kind.is_large:
                work.large[id(target)] = target
        return {device: work for device, work in works.items() if work and work.copies}

    def _kind_of(self, copy: Copy, code: str) -> _Kind:
        grid, size = common_runs(copy.source_region, copy.target_region), dtypes.storage_bytes(code)
        return _Kind(
            dtype=dtypes.to_torch(code),
            piece=Piece(grid, size),
            is_shared=self._num_local > 1 and _is_shared(copy, grid, self._plan.tp_size),
            is_cut=grid.num_runs > 1,
            is_large=grid.length * grid.num_runs * size >= HUGE_TENSOR_BYTES,
        )


def _is_shared(copy: Copy, grid: Grid, tp_size: int) -> bool:
    """Whether other ranks need bytes from the same pages of the file: rows that are cut, or
    elements that several ranks keep.
    """
    region = copy.source_region
    return grid.num_runs > 1 or region.num_elements * tp_size > prod(region.shape)


class Opened:
    """The files of a run, numbered as jobs number them."""

    def __init__(self, files: ByteReader, direct: bool | None) -> None:
        self.names: list[str] = []
        self.descriptors: list[tuple[int, int]] = []
        self.is_cold: list[bool] = []
        self.is_remote: list[bool] = []
        self.files = files
        self._direct = direct
        self.numbers: dict[str, int] = {}
        self._through_cache: dict[int, int] = {}

    def number(self, file: str) -> int:
        """The number of a file. Raises a FileError."""
        known = self.numbers.get(file)
        if known is not None:
            return known
        fd = self.files.descriptor(file)
        remote = bool(is_remote(fd))
        cold = self._direct if self._direct is not None else not remote and self._is_cold(fd, file)
        direct_fd = self.files.direct_descriptor(file) if cold else -1
        if cold:
            self.files.read_no_further(file)  # what is read past the page cache is not read twice
        self.names.append(file)
        self.descriptors.append((fd, direct_fd))
        self.is_cold.append(cold and direct_fd >= 0)
        self.is_remote.append(remote)
        self.numbers[file] = len(self.names) - 1
        return self.numbers[file]

    def through_cache(self, number: int) -> int:
        """Another number of a cold file: by it, direct jobs too are read through the page cache.

        That is for rows that are cut, of which the ranks of this host need all: whole spans, gaps
        included. A disk answers a read of each run by itself ten times slower than large ones.
        """
        if number not in self._through_cache:
            self._through_cache[number] = len(self.names)
            self.names.append(self.names[number])
            self.descriptors.append((self.descriptors[number][0], -1))
            self.is_cold.append(True)
            self.is_remote.append(self.is_remote[number])
        return self._through_cache[number]

    def _is_cold(self, fd: int, file: str) -> bool:
        found = resident_part(fd, self.files.file_bytes(file))
        return found is not None and found < WARM
