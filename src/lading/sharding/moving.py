"""Runs a move from one end to another (see `bands`): threads, digests on the way, bounded memory.

Every byte passes here once, so its digest costs no second read. No torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from lading import dtypes
from lading.checkpoint import FileWriter, Reader, Source
from lading.digests.sums import Sums, hex_of, num_stored, sums_of
from lading.errors import CallError
from lading.plan import Plan
from lading.regions import Region
from lading.shards.bands import Array, Band, End, Views, bands, index_of

__all__ = ["DEFAULT_MEMORY_BYTES", "Collected", "Mover"]

DEFAULT_MEMORY_BYTES = 2**28
MAX_BAND_BYTES = 2 * 2**20
"""Larger bands leave the cache between reading, hashing and writing: 1.7 s of CPU for 1.94 GB, with
16 MiB 2.6 s (merge, TP 4, 2 cores)."""
MAX_THREADS = 4

_COPIES = 6
"""How many times a band may be in memory: its values, windows of them, their digests' words."""


@dataclass(slots=True)
class Collected:
    """The digests of tensors, from pieces in any order and of any thread.

    sources   the tensors, as their headers have them
    parts     of some tensors: numbers and regions of what is summed apart; together all of it
    """

    sources: Mapping[str, Source]
    parts: Mapping[str, Sequence[tuple[int, Region]]] = field(default_factory=dict)
    _sums: dict[tuple[str, int], Sums] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, region: Region, values: Array | memoryview) -> None:
        """Elements of a region, in its row-major order."""
        source = self.sources[name]
        found = [
            (number, sums_of(source.dtype, source.shape, part, part_values))
            for number, part, part_values in self._split(name, region, values)
        ]
        with self._lock:
            for number, sums in found:
                self._sums[name, number] = self.part(name, number) + sums

    def _split(
        self, name: str, region: Region, values: Array | memoryview
    ) -> Iterator[tuple[int, Region, Array | memoryview]]:
        if name not in self.parts or isinstance(values, memoryview):
            yield 0, region, values
            return
        for number, part in self.parts[name]:
            both = part.intersect(region)
            if both == region:
                yield number, region, values
            elif both is not None:
                yield number, both, values[index_of(both.inside(region))]

    def part(self, name: str, number: int) -> Sums:
        """What was added of a part; of a tensor without parts, all."""
        return self._sums.get((name, number), Sums())

    def digests(self) -> dict[str, str]:
        """By tensor. Raises a CallError where not all of a tensor was added."""
        totals = dict.fromkeys(self.sources, Sums())
        for (name, _), sums in self._sums.items():
            totals[name] += sums
        return {
            name: hex_of(source.dtype, source.shape, totals[name])
            for name, source in self.sources.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Mover:
    """How much memory a move may take, and whom it tells.

    memory_bytes   of all bands that are on their way
    advance        is told of bytes as they arrive, of one thread at a time
    """

    memory_bytes: int = DEFAULT_MEMORY_BYTES
    advance: Callable[[int], None] = lambda _num_bytes: None
    num_threads: int = field(default_factory=lambda: min(os.cpu_count() or 1, MAX_THREADS))

    def __post_init__(self) -> None:
        if self.memory_bytes < 1:
            raise CallError(f"is {self.memory_bytes}, needs at least 1", subject="memory_bytes")

    @property
    def band_bytes(self) -> int:
        """The most that a band has."""
        return max(1, min(self.memory_bytes // (self.num_threads * _COPIES), MAX_BAND_BYTES))

    def run(
        self, plan: Plan, views: Views, source: End, target: End, collected: Collected | None
    ) -> None:
        """Moves all that ranks keep. Raises the first error, when no thread writes any more.

        collected   takes the digests; None = they are not wanted
        """
        work = _Work(bands(plan, views, self.band_bytes), source, target, collected, self.advance)
        with ThreadPoolExecutor(self.num_threads) as pool:
            try:
                for future in [pool.submit(work.run) for _ in range(self.num_threads)]:
                    future.result()
            finally:
                work.stop.set()

    def copy_rest(
        self,
        names: Sequence[str],
        reader: Reader,
        old: Mapping[str, Source],
        new: Mapping[str, Source],
        writers: Mapping[str, FileWriter],
        collected: Collected | None,
    ) -> None:
        """Tensors that no rank keeps, each in runs of its bytes, from where they were."""
        for name in names:
            source, place = old[name], new[name]
            item = dtypes.storage_bytes(source.dtype)
            step = max(self.band_bytes // item, 1) * item
            for at in range(0, source.num_bytes, step):
                memory = memoryview(bytearray(min(step, source.num_bytes - at)))
                reader.read_into(source, at, memory)
                if collected is not None:
                    first, count = at // item, memory.nbytes // item
                    whole = num_stored(source.dtype, source.shape)
                    collected.add(name, Region.box((whole,), [(first, first + count)]), memory)
                writers[place.file].write(place.offset_bytes + at, memory)
                self.advance(memory.nbytes)


class _Work:
    """Bands that threads take one after another."""

    def __init__(
        self,
        todo: Iterator[Band],
        source: End,
        target: End,
        collected: Collected | None,
        advance: Callable[[int], None],
    ) -> None:
        self.todo, self.source, self.target = todo, source, target
        self.collected, self.advance = collected, advance
        self.stop = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        """One thread's work. An error of one stops all."""
        try:
            while not self.stop.is_set():
                with self._lock:
                    band = next(self.todo, None)
                if band is None:
                    return
                self._move(band)
        except BaseException:
            self.stop.set()
            raise

    def _move(self, band: Band) -> None:
        values = self.source.read(band)
        for name, box in band.boxes:
            if self.collected is not None:
                self.collected.add(name, box, values[name])
        self.target.write(band, values)
        with self._lock:
            self.advance(sum(array.nbytes for array in values.values()))
