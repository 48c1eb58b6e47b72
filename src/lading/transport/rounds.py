"""What a group of ranks reads once: which checkpoint tensors, in which bands, in which rounds. No
torch, no files: plan facts only, so that every rank finds the same.

A *shared* tensor is one that several ranks need in small strided runs, or keep entirely. Its rows
are cut into N bands, one a rank, whoever needs them; each rank reads its own band and hands on what
the others need of it. Several bands, as many as fit a bucket, make a round; a tensor whose bands do
not fit is cut into slabs of rows first.

Letters: N = ranks of the group, R = rows, along the first dim that has more than one entry.

    rows 0:R, rank r   band r*R//N : (r+1)*R//N

Example: a row cut of [4096, 14336] bf16 over 4 ranks: runs of 7 KiB. Rank 1 reads rows 1024:2048,
one run of 29 MB, keeps columns 3584:7168 of them, and sends three blocks of [1024, 3584].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

from lading import dtypes
from lading.binding import Binding, Target
from lading.checkpoint import Source
from lading.layouts import Layout, PartName, Placement
from lading.plan import Plan
from lading.regions import Copy, Region
from lading.transport.engine import DEFAULT_GAP_BYTES
from lading.transport.jobs import common_runs

__all__ = ["ALIGN_BYTES", "Block", "Round", "Rounds", "Shared", "Sharing", "Slab", "plan_rounds"]

ALIGN_BYTES = 128
"""Where bands and messages begin in a buffer: what a GPU reads at a time."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Which tensors are worth an exchange.

    run_bytes     shorter runs make a cut strided: 16 KiB is where the engine's reads slow down
    cost          of reading the runs, in bytes for each that is kept: a gap is read or, where it is
                  larger, skipped by a call that costs as much as `DEFAULT_GAP_BYTES`. Cheaper cuts
                  are not worth it
    share_bytes   of the rank that keeps most of the tensor: what is smaller costs more to hand
                  round, message by message, than to read
    """

    run_bytes: int = 16 * 2**10
    cost: float = 1.0
    share_bytes: int = 2**20


AUTOMATIC = Sharing(run_bytes=2 * 2**10, cost=3.0)
"""Where nobody has asked for it: other runs the engine reads as fast as dense ones, and an
exchange, for which it drains, costs more. On two ranks it does so at a cost of 2: runs of 1 KiB,
every other one, took 0.032 s with each rank reading its own, and 0.043 s (benchmarks/README.md).
"""

LEAST_BYTES = 256 * 2**20
"""Of all that is exchanged, where nobody has asked for it: less does not pay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What one rank needs of one band, for one of the tensor's bindings.

    binding   position in `Shared.bindings`
    band      in the band's own coordinates
    target    in the parameter's
    """

    binding: int
    band: Region
    target: Region


class Kind:
    """What tensors of one shape, dtype and cut have in common, for all ranks.

    needs[r]   of each binding that rank r keeps a box of: its position, and where the box lies
    lo, hi     the rows that are read, along `dim`
    """

    def __init__(
        self, needs: Sequence[Sequence[tuple[int, Placement]]], dim: int, rows: Span, size: int
    ) -> None:
        self.needs, self.dim, self.element_bytes = needs, dim, size
        self.lo, self.hi = rows
        first = next(placement for of_rank in needs for _, placement in of_rank)
        self.shape = first.source.shape
        self.row_bytes = prod(self.shape[dim + 1 :]) * size
        self._blocks: dict[tuple[int, int, int, int], tuple[Block, ...]] = {}
        distinct = {p.source for of_rank in needs for _, p in of_rank}
        self._packed = sum(self._width(box) for box in distinct if not _is_dense(box, dim))
        self._landed = max(
            sum(0 if _is_dense(p.target, dim) else self._width(p.source) for _, p in of_rank)
            for of_rank in needs
        )
        self._room = ALIGN_BYTES * sum(map(len, needs))
        self.facts = repr((needs, dim, rows, size))

    def _width(self, region: Region) -> int:
        """Bytes of a row of a region."""
        return region.num_elements // max(region.size[self.dim], 1) * self.element_bytes

    def room(self, rows: int) -> tuple[int, int, int]:
        """The most bytes that so many rows take on any rank: the band, what is packed to be sent,
        what is received before it is copied to where it belongs.
        """
        band = -(-rows // len(self.needs))
        packed, landed = band * self._packed, rows * self._landed
        return (
            padded(band * self.row_bytes),
            packed + self._room if packed else 0,
            landed + self._room * len(self.needs) if landed else 0,
        )

    def slabs(self, bucket_bytes: int) -> list[Span] | None:
        """The rows in parts whose room fits a bucket; None where not even one row does."""
        rows = self.hi - self.lo
        count = min(max(-(-part // bucket_bytes) for part in self.room(rows)), rows)
        while max(self.room(-(-rows // count))) > bucket_bytes:
            if count >= rows:
                return None
            count = min(count * 2 if count < 8 else count + count // 8, rows)
        return list(pairwise(self.lo + rows * i // count for i in range(count + 1)))

    def band(self, slab: Span, rank: int) -> Span:
        """The rows of a slab that one rank reads."""
        lo, rows = slab[0], slab[1] - slab[0]
        size = len(self.needs)
        return lo + rows * rank // size, lo + rows * (rank + 1) // size

    def band_region(self, slab: Span, rank: int) -> Region:
        """The same as a box of the tensor."""
        spans = [(0, n) for n in self.shape]
        spans[self.dim] = self.band(slab, rank)
        return Region.box(self.shape, spans)

    def blocks(self, slab: Span, reader: int, keeper: int) -> tuple[Block, ...]:
        """What `keeper` needs of the band that `reader` reads."""
        key = (*slab, reader, keeper)
        found = self._blocks.get(key)
        if found is None:
            found = self._blocks[key] = tuple(self._find(slab, reader, keeper))
        return found

    def _find(self, slab: Span, reader: int, keeper: int) -> Iterator[Block]:
        band = self.band_region(slab, reader)
        for binding, placement in self.needs[keeper]:
            back = Copy(
                source="",
                target="",
                part=None,
                source_region=placement.target,
                target_region=placement.source,
            ).restrict(band)
            if back is not None:
                yield Block(
                    binding=binding,
                    band=back.target_region.inside(band),
                    target=back.source_region,
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A checkpoint tensor, or one part of it, that the group reads once."""

    source: Source
    bindings: tuple[Binding, ...]
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Rows of a shared tensor whose bands are exchanged in one round.

    at   where the band begins in the buffer, on every rank
    """

    shared: Shared
    rows: Span
    at: int


Round = tuple[Slab, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """All that a group exchanges.

    keys   (target, part, source) of the copies that come this way
    band_bytes, packed_bytes, landed_bytes   the most that a round needs, as `Kind.room` has them
    """

    rounds: tuple[Round, ...] = ()
    keys: frozenset[tuple[str, PartName, str]] = frozenset()
    band_bytes: int = 0
    packed_bytes: int = 0
    landed_bytes: int = 0
    digest: str = ""


def is_worth(plan: Plan) -> bool:
    """Whether ranks should exchange where nobody has asked for it; from plan facts only."""
    shared = _Finder(plan, lambda _: True, AUTOMATIC).shared()
    return sum((one.kind.hi - one.kind.lo) * one.kind.row_bytes for one in shared) >= LEAST_BYTES


def plan_rounds(
    plan: Plan,
    usable: Callable[[Target], bool],
    *,
    sharing: Sharing,
    bucket_bytes: int,
) -> Rounds:
    """The rounds of a plan, in the order of the files; the same on every rank of the plan's T.

    usable   whether a target's memory can be sent from and received into, on every rank
    """
    found = list(_Finder(plan, usable, sharing).shared())
    order = {file: i for i, file in enumerate(dict.fromkeys(s.file for s in plan.sources.values()))}
    found.sort(key=lambda one: (order[one.source.file], one.source.offset_bytes, one.kind.lo))
    filling = _Filling(bucket_bytes)
    hashed = hashlib.sha256(repr((plan.tp_size, bucket_bytes)).encode())
    kept = [one for one in found if filling.add(one)]
    kinds: dict[int, int] = {}
    for one in kept:
        if id(one.kind) not in kinds:
            kinds[id(one.kind)] = len(kinds)
            hashed.update(one.kind.facts.encode())
        bound = [(b.target, b.part, b.fused) for b in one.bindings]
        source = one.source
        facts = (source.name, source.file, source.offset_bytes, bound, kinds[id(one.kind)])
        hashed.update(repr(facts).encode())
    filling.close()
    return Rounds(
        rounds=tuple(filling.rounds),
        keys=frozenset((b.target, b.part, b.source) for one in kept for b in one.bindings),
        band_bytes=filling.most[0],
        packed_bytes=filling.most[1],
        landed_bytes=filling.most[2],
        digest=hashed.hexdigest(),
    )


def padded(num_bytes: int) -> int:
    """Up to where the next band or message may begin."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def _is_dense(region: Region, dim: int) -> bool:
    """Whether any of the region's rows, along `dim`, are one run of memory."""
    inner = range(dim + 1, len(region.shape))
    return (
        all(region.size[d] == 1 for d in range(dim))
        and (region.step[dim] == 1 or region.size[dim] < 2)
        and all(region.size[d] == region.shape[d] for d in inner)
    )


@dataclass(slots=True)
class _Filling:
    """Fills one round after the other."""

    bucket_bytes: int
    rounds: list[Round] = field(default_factory=list)
    most: list[int] = field(default_factory=lambda: [0, 0, 0])
    _open: list[Slab] = field(default_factory=list)
    _used: list[int] = field(default_factory=lambda: [0, 0, 0])

    def add(self, shared: Shared) -> bool:
        """False where a bucket cannot hold a row of it."""
        slabs = shared.kind.slabs(self.bucket_bytes)
        if slabs is None:
            return False
        for rows in slabs:
            room = shared.kind.room(rows[1] - rows[0])
            if any(u + r > self.bucket_bytes for u, r in zip(self._used, room, strict=True)):
                self.close()
            self._open.append(Slab(shared=shared, rows=rows, at=self._used[0]))
            self._used = [u + r for u, r in zip(self._used, room, strict=True)]
        return True

    def close(self) -> None:
        if self._open:
            self.rounds.append(tuple(self._open))
        self.most = [max(pair) for pair in zip(self.most, self._used, strict=True)]
        self._open, self._used = [], [0, 0, 0]


@dataclass(slots=True)
class _Finder:
    """Finds what is worth an exchange. Layouts are few and bindings many: each kind is worked out
    once.
    """

    plan: Plan
    usable: Callable[[Target], bool]
    sharing: Sharing
    _layouts: dict[Layout, int] = field(default_factory=dict)
    _known: dict[int, int] = field(default_factory=dict)
    _placements: dict[tuple[int, PartName, bool], list[Placement | None]] = field(
        default_factory=dict
    )
    _kinds: dict[
        tuple[int, tuple[tuple[int, PartName, bool], ...]], list[tuple[Kind, tuple[int, ...]]]
    ] = field(default_factory=dict)

    def shared(self) -> Iterator[Shared]:
        grouped: dict[str, list[Binding]] = {}
        for binding in self.plan.bindings:
            grouped.setdefault(binding.source, []).append(binding)
        for name, bindings in grouped.items():
            source = self.plan.sources[name]
            if source.num_bytes < self.sharing.share_bytes:
                continue
            targets = [self.plan.target(binding.target) for binding in bindings]
            if not all(
                target.expected is None and target.dtype == source.dtype and self.usable(target)
                for target in targets
            ):
                continue
            facts = tuple(
                (self._layout(t), b.part, b.fused) for t, b in zip(targets, bindings, strict=True)
            )
            key = (dtypes.storage_bytes(source.dtype), facts)
            if key not in self._kinds:
                self._kinds[key] = list(self._work_out(targets, bindings, key[0]))
            for kind, positions in self._kinds[key]:
                yield Shared(
                    source=source, bindings=tuple(bindings[i] for i in positions), kind=kind
                )

    def _work_out(
        self, targets: Sequence[Target], bindings: Sequence[Binding], size: int
    ) -> Iterator[tuple[Kind, tuple[int, ...]]]:
        """The kinds of one source, each with the positions of its bindings."""
        placed = [self._placed(t, b) for t, b in zip(targets, bindings, strict=True)]
        found = [p for of_binding in placed for p in of_binding if p is not None]
        shapes = {p.source.shape for p in found}
        if len(shapes) != 1:
            return
        (shape,) = shapes
        dim = next((d for d, n in enumerate(shape) if n > 1), None)
        if dim is None:
            return
        if any(self._is_strided(p, size) for p in found):
            yield from self._kind(placed, range(len(placed)), dim, (0, shape[dim]), size)
            return
        for i, of_binding in enumerate(placed):
            boxes = [p.source for p in of_binding if p is not None]
            distinct = set(boxes)
            if len(distinct) == len(boxes):
                continue
            lo = min(box.start[dim] for box in distinct)
            hi = max(box.start[dim] + (box.size[dim] - 1) * box.step[dim] + 1 for box in distinct)
            if sum(b.num_elements for b in distinct) == (hi - lo) * prod(shape[dim + 1 :]):
                yield from self._kind(placed, [i], dim, (lo, hi), size)

    def _kind(
        self,
        placed: Sequence[Sequence[Placement | None]],
        positions: Iterable[int],
        dim: int,
        rows: Span,
        size: int,
    ) -> Iterator[tuple[Kind, tuple[int, ...]]]:
        positions = tuple(positions)
        needs = [
            [(at, p) for at, i in enumerate(positions) if (p := placed[i][rank]) is not None]
            for rank in range(self.plan.tp_size)
        ]
        most = max(sum(p.source.num_elements for _, p in of_rank) for of_rank in needs)
        if most * size >= self.sharing.share_bytes:
            yield Kind(needs, dim, rows, size), positions

    def _layout(self, target: Target) -> int:
        """One number for equal layouts. Hashing walks their values: each object is hashed once."""
        number = self._known.get(id(target.layout))
        if number is None:
            number = self._layouts.setdefault(target.layout, len(self._layouts))
            self._known[id(target.layout)] = number
        return number

    def _placed(self, target: Target, binding: Binding) -> list[Placement | None]:
        key = (self._layout(target), binding.part, binding.fused)
        found = self._placements.get(key)
        if found is None:
            found = self._placements[key] = [
                target.layout.place(binding.part, rank, fused_source=binding.fused)
                for rank in range(self.plan.tp_size)
            ]
        return found

    def _is_strided(self, placement: Placement, size: int) -> bool:
        run = common_runs(placement.source, placement.target).length * size
        runs = placement.source.runs()
        if runs.num_runs < 2 or run >= self.sharing.run_bytes:
            return False
        gap = min((runs.strides[-1] - runs.length) * size, DEFAULT_GAP_BYTES)
        return run + gap >= run * self.sharing.cost
