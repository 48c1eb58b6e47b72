"""Strided boxes in tensors, and copies between them. Pure arithmetic: no torch, no formats.

A `Region` lives in the coordinates of one tensor, seen row-major as `shape`; the view may have
another rank than the tensor itself (a 0-d scale seen as [1], a fused [3*D, I] seen as [3, D, I]),
its number of elements is always the tensor's. A `Copy` says that a region of a source equals a
region of a target.

Letters: d = a dim, n = elements along it.

    Region(shape=(8, 6), start=(2, 0), size=(4, 6), step=(1, 1))   [2:6, 0:6]
    Region(shape=(8, 6), start=(1, 0), size=(4, 6), step=(2, 1))   [1:8:2, 0:6]: the odd rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import gcd, lcm, prod

from lading.records import quick

__all__ = ["Copy", "Coverage", "Region", "cover", "merge", "partition", "reordered"]

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A strided box: along dim d the `size[d]` indices start[d], start[d] + step[d], ...

    shape   of the whole tensor, in elements
    start, size, step   one number a dim; steps are at least 1; a size may be 0
    Raises a ValueError where the box leaves the tensor.
    """

    shape: Ints
    start: Ints
    size: Ints
    step: Ints

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.start) == len(self.size) == len(self.step):
            raise ValueError(
                f"region of {len(self.shape)} dims has {self.start}, {self.size}, {self.step}"
            )
        for n, start, size, step in zip(self.shape, self.start, self.size, self.step, strict=True):
            last = start + (size - 1) * step if size else start
            if start < 0 or size < 0 or step < 1 or last >= n + (not size):
                raise ValueError(f"region {self} leaves the tensor of shape {list(self.shape)}")

    @staticmethod
    def whole(shape: Sequence[int]) -> Region:
        """Every element of a tensor of this shape."""
        shape = tuple(shape)
        return Region(shape=shape, start=(0,) * len(shape), size=shape, step=(1,) * len(shape))

    @staticmethod
    def box(shape: Sequence[int], spans: Sequence[tuple[int, int]]) -> Region:
        """The dense box with one (start, stop) a dim."""
        return Region(
            shape=tuple(shape),
            start=tuple(start for start, _ in spans),
            size=tuple(stop - start for start, stop in spans),
            step=(1,) * len(spans),
        )

    @property
    def num_elements(self) -> int:
        """How many elements the region has."""
        return prod(self.size)

    @property
    def is_whole(self) -> bool:
        """Whether the region is the whole tensor."""
        return self.size == self.shape

    def __str__(self) -> str:
        spans = []
        for start, size, step in zip(self.start, self.size, self.step, strict=True):
            stop = start + (size - 1) * step + 1 if size else start
            spans.append(f"{start}:{stop}" + (f":{step}" if step != 1 and size > 1 else ""))
        return f"[{', '.join(spans)}]"

    def intersect(self, other: Region) -> Region | None:
        """The elements in both, None where there are none. Both live in the same tensor view."""
        if self.shape != other.shape:
            raise ValueError(
                f"regions of different tensors: {list(self.shape)}, {list(other.shape)}"
            )
        dims = []
        mine = zip(self.start, self.size, self.step, strict=True)
        theirs = zip(other.start, other.size, other.step, strict=True)
        for one, two in zip(mine, theirs, strict=True):
            both = _intersect_progressions(one, two)
            if both is None:
                return None
            dims.append(both)
        start, size, step = zip(*dims, strict=True) if dims else ((), (), ())
        return Region(shape=self.shape, start=start, size=size, step=step)

    def compose(self, inner: Region) -> Region:
        """`inner`, given in the coordinates of this box, in the coordinates of the tensor."""
        if inner.shape != self.size:
            raise ValueError(f"a region of {list(inner.shape)} inside a box of {list(self.size)}")
        start, step = [], []
        mine = zip(self.shape, self.start, self.step, strict=True)
        theirs = zip(inner.start, inner.size, inner.step, strict=True)
        for (n, a, s), (b, size, t) in zip(mine, theirs, strict=True):
            start.append(a + b * s if size else min(a + b * s, n))  # nothing may begin at the end
            step.append(s * t if size > 1 else 1)
        return Region(shape=self.shape, start=tuple(start), size=inner.size, step=tuple(step))

    def inside(self, outer: Region) -> Region:
        """The region, which lies in `outer`, in the coordinates of that box: compose's inverse."""
        if self.shape != outer.shape:
            raise ValueError(
                f"regions of different tensors: {list(self.shape)}, {list(outer.shape)}"
            )
        start, step = [], []
        mine = zip(self.start, self.size, self.step, strict=True)
        theirs = zip(outer.start, outer.size, outer.step, strict=True)
        for (a, size, s), (b, n, t) in zip(mine, theirs, strict=True):
            both = _intersect_progressions((a, size, s), (b, n, t))
            if (both[1] if both is not None else 0) != size:
                raise ValueError(f"region {self} is not inside {outer}")
            # Nothing is inside everything: where it begins is kept only as far as it can be.
            start.append((a - b) // t if size else min(max((a - b) // t, 0), n))
            step.append(s // t if size > 1 else 1)
        return Region(shape=outer.size, start=tuple(start), size=self.size, step=tuple(step))

    def runs(self) -> Runs:
        """The region as equal runs of neighbouring elements in row-major memory."""
        return Runs.of(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """`length` neighbouring elements at every offset of a grid: how a region lies in memory.

    first     offset of the first run, in elements
    length    elements in each run
    counts, strides   the grid: counts[i] runs that are strides[i] elements apart, outermost first
    """

    first: int
    length: int
    counts: Ints
    strides: Ints

    @staticmethod
    def of(region: Region) -> Runs:
        """The longest runs: inner dims that the region takes whole are folded into the run."""
        first, stride, length = 0, 1, 1
        counts: list[int] = []
        strides: list[int] = []
        folding = True
        dims = zip(region.shape, region.start, region.size, region.step, strict=True)
        for n, start, size, step in reversed(list(dims)):
            first += start * stride
            if folding and (step == 1 or size == 1):
                length *= size
                folding = size == n
            elif size != 1:
                folding = False
                if strides and strides[0] * counts[0] == stride * step:
                    counts[0] *= size  # the outer grid goes on where the inner one ends
                else:
                    counts.insert(0, size)
                    strides.insert(0, stride * step)
            stride *= n
        return Runs(first=first, length=length, counts=tuple(counts), strides=tuple(strides))

    @property
    def num_runs(self) -> int:
        """How many runs there are."""
        return prod(self.counts)

    def offsets(self) -> Iterator[int]:
        """The offset of each run, in elements, in row-major order of the region."""
        if len(self.counts) == 1:  # nearly always, and a range is several times as fast
            count, stride = self.counts[0], self.strides[0]
            yield from range(self.first, self.first + count * stride, stride)
            return
        for index in product(*map(range, self.counts)):
            yield self.first + sum(i * s for i, s in zip(index, self.strides, strict=True))


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A source region that equals a target region, element by element.

    source, target   names of the two tensors
    part             which part of a fused target this is, None where it has only one
    source_region, target_region   in each tensor's own coordinates
    axes             target dim i runs along source dim axes[i]; () when all are in the same order
    """

    source: str
    target: str
    part: str | int | None
    source_region: Region
    target_region: Region
    axes: Ints = ()

    def __post_init__(self) -> None:
        sizes = self.source_region.size
        if self.axes:
            if sorted(self.axes) != list(range(len(sizes))):
                fact = f"axes {self.axes} are no permutation of {self.source_region}'s dims"
                raise ValueError(fact)
            sizes = self.permuted(sizes)
        if sizes != self.target_region.size:
            raise ValueError(
                f"copy of {self.source_region} into {self.target_region}: sizes differ"
            )

    def permuted(self, dims: Ints) -> Ints:
        """One number for each source dim, in the order of the target's dims."""
        return tuple(dims[axis] for axis in self.axes) if self.axes else dims

    def invert(self) -> Copy:
        """The copy back: target → source."""
        back = tuple(self.axes.index(i) for i in range(len(self.axes)))
        return Copy(
            source=self.target,
            target=self.source,
            part=self.part,
            source_region=self.target_region,
            target_region=self.source_region,
            axes=back,
        )

    def restrict(self, target_box: Region) -> Copy | None:
        """The share of this copy that falls into a box of the target, None where none does."""
        both = self.target_region.intersect(target_box)
        if both is None:
            return None
        inner = both.inside(self.target_region)
        order = tuple(self.axes.index(i) for i in range(len(self.axes)))
        if order:
            inner = reordered(inner, order)
        return Copy(
            source=self.source,
            target=self.target,
            part=self.part,
            source_region=self.source_region.compose(inner),
            target_region=both,
            axes=self.axes,
        )

    def then(self, after: Copy) -> Copy | None:
        """The copy that does this one and then `after`, whose source is this one's target.

        None where nothing passes through. A→B [2:6] and B→C [4:8] give A→C of B's [4:6].
        """
        if after.source != self.target:
            raise ValueError(
                f"{after.source!r} is not the target of the first copy, {self.target!r}"
            )
        first = self.restrict(after.source_region)
        if first is None:
            return None
        second = after.invert().restrict(first.target_region)
        if second is None:
            return None
        axes = (
            tuple(first.axes[a] for a in after.axes)
            if first.axes and after.axes
            else first.axes or after.axes
        )
        return Copy(
            source=first.source,
            target=after.target,
            part=after.part,
            source_region=first.source_region,
            target_region=second.source_region,
            axes=() if axes == tuple(range(len(axes))) else axes,
        )


def reordered(region: Region, order: Ints) -> Region:
    """The region in a tensor whose dim i is this one's dim order[i]."""
    return Region(
        shape=tuple(region.shape[i] for i in order),
        start=tuple(region.start[i] for i in order),
        size=tuple(region.size[i] for i in order),
        step=tuple(region.step[i] for i in order),
    )


Progression = tuple[int, int, int]


def _intersect_progressions(one: Progression, two: Progression) -> Progression | None:
    """The common members of two arithmetic progressions (start, size, step), None where none."""
    (a, n, s), (b, m, t) = one, two
    if not n or not m:
        return None
    common = gcd(s, t)
    if (b - a) % common:
        return None
    step = s // common * t
    # x = a + s*i with s*i = b - a (mod t): the smallest such x that is not before either start.
    i = (b - a) // common * pow(s // common, -1, t // common) if t != common else 0
    first = a + s * i
    low, high = max(a, b), min(a + (n - 1) * s, b + (m - 1) * t)
    first += -(-(low - first) // step) * step
    if first > high:
        return None
    size = (high - first) // step + 1
    return first, size, step if size > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a set of regions does to a tensor: which elements none, and which more than one, has.

    missing   a box of elements that no region has, None where every element is covered
    twice     a box of elements that two regions have, None where there is none
    writers   the positions, in the given order, of two regions that share `twice`
    """

    missing: Region | None
    twice: Region | None
    writers: tuple[int, int] | None

    @property
    def is_exact(self) -> bool:
        """Every element exactly once."""
        return self.missing is None and self.twice is None


def cover(shape: Sequence[int], regions: Sequence[Region]) -> Coverage:
    """Whether the regions cover a tensor exactly once; a witness box where they do not.

    Exact for strided boxes. The tensor is cut, dim by dim, into slabs in which the set of regions
    does not change; cost O(regions * slabs), and one region alone is answered at once.
    """
    shape = tuple(shape)
    for region in regions:
        if region.shape != shape:
            raise ValueError(f"region of {list(region.shape)} in a tensor of {list(shape)}")
    alive = [i for i, region in enumerate(regions) if region.num_elements]
    if len(alive) == 1 and regions[alive[0]].is_whole:
        return Coverage(missing=None, twice=None, writers=None)
    missing: list[Region] = []
    twice: list[tuple[Region, tuple[int, int]]] = []
    if prod(shape):
        _cover_dim(shape, regions, alive, (), missing, twice)
    return Coverage(
        missing=missing[0] if missing else None,
        twice=twice[0][0] if twice else None,
        writers=twice[0][1] if twice else None,
    )


def _cover_dim(
    shape: Ints,
    regions: Sequence[Region],
    active: list[int],
    prefix: tuple[Progression, ...],
    missing: list[Region],
    twice: list[tuple[Region, tuple[int, int]]],
) -> None:
    """Finds faults among `active` within the slab that `prefix` fixes along the first dims."""
    dim = len(prefix)
    if not active or dim == len(shape):
        dims = (*prefix, *((0, n, 1) for n in shape[dim:]))
        start, size, step = zip(*dims, strict=True) if dims else ((), (), ())
        box = Region(shape=shape, start=start, size=size, step=step)
        if not active and not missing:
            missing.append(box)
        elif len(active) > 1 and not twice:
            twice.append((box, (active[0], active[1])))
        return
    for slab, inside in _slabs(shape[dim], [(i, regions[i]) for i in active], dim):
        _cover_dim(shape, regions, inside, (*prefix, slab), missing, twice)
        if missing and twice:
            return


def partition(
    shape: Sequence[int], regions: Sequence[Region]
) -> tuple[tuple[Region, tuple[int, ...]], ...]:
    """Disjoint boxes, each with the positions of the regions that have all of it.

    A region has all or nothing of a box; together the boxes are the union of the regions. In
    row-major order of where they begin.

    Example: rows 0:4 and 2:6 of 8 -> [0:2] of the first, [2:4] of both, [4:6] of the second.
    """
    shape = tuple(shape)
    for region in regions:
        if region.shape != shape:
            raise ValueError(f"region of {list(region.shape)} in a tensor of {list(shape)}")
    alive = [i for i, region in enumerate(regions) if region.num_elements]
    return tuple(_partition_dim(shape, regions, alive, ())) if alive else ()


def _partition_dim(
    shape: Ints, regions: Sequence[Region], active: list[int], prefix: tuple[Progression, ...]
) -> Iterator[tuple[Region, tuple[int, ...]]]:
    dim = len(prefix)
    if dim == len(shape):
        start, size, step = zip(*prefix, strict=True) if prefix else ((), (), ())
        yield Region(shape=shape, start=start, size=size, step=step), tuple(active)
        return
    for slab, inside in _slabs(shape[dim], [(i, regions[i]) for i in active], dim):
        if inside:
            yield from _partition_dim(shape, regions, inside, (*prefix, slab))


def _slabs(
    n: int, active: list[tuple[int, Region]], dim: int
) -> Iterator[tuple[Progression, list[int]]]:
    """Cuts 0..n into progressions along which the set of active regions is constant."""
    if all(region.size[dim] == n for _, region in active):  # dims that nobody cuts
        yield (0, n, 1), [i for i, _ in active]
        return
    bounds: set[int] = {0, n}
    for _, region in active:
        bounds.add(region.start[dim])
        bounds.add(region.start[dim] + (region.size[dim] - 1) * region.step[dim] + 1)
    cuts = sorted(bounds)
    waiting = sorted(active, key=lambda item: item[1].start[dim])
    position, here = 0, []
    for low, high in pairwise(cuts):
        while position < len(waiting) and waiting[position][1].start[dim] <= low:
            here.append(waiting[position])
            position += 1
        here = [(i, r) for i, r in here if low <= r.start[dim] + (r.size[dim] - 1) * r.step[dim]]
        period = lcm(*(region.step[dim] for _, region in here)) if here else 1
        for phase in range(min(period, high - low)):
            first = low + phase
            size = (high - 1 - first) // period + 1
            inside = sorted(i for i, r in here if (first - r.start[dim]) % r.step[dim] == 0)
            yield (first, size, period if size > 1 else 1), inside


def merge(copies: Sequence[Copy]) -> list[Copy]:
    """The same copies with neighbours joined: where source and target both go on along one dim.

    Parts q, k, v that lie side by side in a file and in a parameter become one copy. Order is kept;
    the part's name is lost where copies of different parts are joined.
    """
    out: list[Copy] = []
    for copy in copies:
        joined = _joined(out[-1], copy) if out else None
        if joined is not None:
            out[-1] = joined
        else:
            out.append(copy)
    return out


def _joined(one: Copy, two: Copy) -> Copy | None:
    if (one.source, one.target, one.axes) != (two.source, two.target, two.axes) or one.axes:
        return None
    a, b, c, d = one.source_region, two.source_region, one.target_region, two.target_region
    if a.shape != b.shape or c.shape != d.shape or a.step != b.step or c.step != d.step:
        return None
    differing = [
        i for i in range(len(a.size)) if (a.start[i], c.start[i]) != (b.start[i], d.start[i])
    ]
    if len(differing) != 1 or any(
        x != y for i, (x, y) in enumerate(zip(a.size, b.size, strict=True)) if i != differing[0]
    ):
        return None
    (dim,) = differing
    if b.start[dim] != a.start[dim] + a.size[dim] * a.step[dim]:
        return None
    if d.start[dim] != c.start[dim] + c.size[dim] * c.step[dim]:
        return None
    size = (*a.size[:dim], a.size[dim] + b.size[dim], *a.size[dim + 1 :])
    return Copy(
        source=one.source,
        target=one.target,
        part=one.part if one.part == two.part else None,
        source_region=Region(shape=a.shape, start=a.start, size=size, step=a.step),
        target_region=Region(shape=c.shape, start=c.start, size=size, step=c.step),
    )
