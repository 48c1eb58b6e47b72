"""One tensor seen as several shapes: copies brought to one view. Pure arithmetic: no torch.

Two plans may see one checkpoint tensor differently: a fused [3*D, I] as [3, D, I], a scale as [] or
[1]. To compare their regions both are seen in the coarsest shape of which both are views: a shape
whose dims, multiplied together in order, give the dims of each. Where there is none, that is the
flat shape [n], in which a region is as many boxes as it has runs of neighbouring elements.

    [6, 4] and [2, 3, 4]   -> [2, 3, 4]
    [6, 4] and [24]        -> [6, 4]
    [6, 4] and [4, 6]      -> [24]
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise, product
from math import prod

from lading.regions import Copy, Ints, Region, reordered

__all__ = ["common_shape", "ravel", "seen_as", "through", "unravel"]

Progression = tuple[int, int, int]  # start, size, step
Line = tuple[int, int, int, int]  # the number of elements of a dim, then a progression in it


def common_shape(shapes: Collection[Ints]) -> Ints:
    """The coarsest shape in which a tensor of each of these shapes can be seen.

    Raises a ValueError where they have different numbers of elements.
    """
    distinct = list(dict.fromkeys(shapes))
    if len({prod(shape) for shape in distinct}) != 1:
        raise ValueError(f"shapes {', '.join(map(str, map(list, distinct)))} of one tensor")
    if len(distinct) == 1:
        return distinct[0]
    total = prod(distinct[0])
    if total < 2:
        return (total,)
    strides = sorted({stride for shape in distinct for stride in _strides(shape)} | {total})
    if any(outer % inner for inner, outer in pairwise(strides)):
        return (total,)
    return tuple(outer // inner for inner, outer in pairwise(strides))[::-1]


def seen_as(copy: Copy, shape: Ints) -> tuple[Copy, ...]:
    """The same copy with its source seen as `shape`: what `common_shape` gave for it, or [n].

    The target is seen differently, too, where that takes fewer copies. Nothing for no elements.
    """
    if copy.source_region.shape == shape:
        return (copy,)
    if not copy.source_region.num_elements:
        return ()
    if prod(shape) == 1:
        return (_element(copy, shape),)
    factors = _factors(copy.source_region.shape, shape)
    if factors is None:
        assert shape == (prod(shape),), f"{shape} is no view of {copy.source_region.shape}"
        return tuple(_flat(copy))
    return tuple(_split(copy, shape, factors))


def _strides(shape: Sequence[int]) -> Iterator[int]:
    """Elements from one index to the next along each dim, innermost first."""
    stride = 1
    for n in reversed(shape):
        yield stride
        stride *= n


def _factors(shape: Ints, view: Ints) -> list[Ints] | None:
    """The dims of `view` that make up each dim of `shape`; None where view does not refine it."""
    rest, found = list(view), []
    for n in shape:
        took: list[int] = []
        while prod(took) < n:
            if not rest:
                return None
            took.append(rest.pop(0))
        if prod(took) != n:
            return None
        found.append(tuple(took))
    return None if rest else found


def _element(copy: Copy, shape: Ints) -> Copy:
    """A copy of the one element that its source has: any target is a row of elements."""
    runs = copy.target_region.runs()
    ones = (1,) * (len(shape) - 1)
    target = Region(
        shape=(*ones, prod(copy.target_region.shape)),
        start=(*(0 for _ in ones), runs.first),
        size=(*ones, 1),
        step=(*ones, 1),
    )
    return _copy(copy, Region.whole(shape), target)


def _copy(copy: Copy, source: Region, target: Region, axes: Ints = ()) -> Copy:
    return Copy(
        source=copy.source,
        target=copy.target,
        part=copy.part,
        source_region=source,
        target_region=target,
        axes=() if axes == tuple(range(len(axes))) else axes,
    )


def _flat(copy: Copy) -> Iterator[Copy]:
    """One copy for each run of elements that are neighbours in the source and in the target."""
    source, target = copy.source_region, copy.target_region
    if copy.axes:
        back = tuple(copy.axes.index(i) for i in range(len(copy.axes)))
        offsets = reordered_offsets(target, back)
        length, starts = 1, zip(offsets_of(source), offsets, strict=True)
    else:
        length = min(source.runs().length, target.runs().length)
        starts = zip(_starts(source, length), _starts(target, length), strict=True)
    for a, b in starts:
        yield _copy(
            copy,
            Region.box((prod(source.shape),), [(a, a + length)]),
            Region.box((prod(target.shape),), [(b, b + length)]),
        )


def _starts(region: Region, length: int) -> Iterator[int]:
    """Where each `length` elements of a region begin: a run, or an equal share of one."""
    runs = region.runs()
    for offset in runs.offsets():
        yield from range(offset, offset + runs.length, length)


def offsets_of(region: Region) -> Iterator[int]:
    """The offset of each element in row-major memory, in row-major order of the region."""
    strides = tuple(_strides(region.shape))[::-1]
    return _offsets(region, strides)


def reordered_offsets(region: Region, order: Ints) -> Iterator[int]:
    """`offsets_of`, in the row-major order of the region whose dim i is this one's order[i]."""
    strides = tuple(_strides(region.shape))[::-1]
    return _offsets(reordered(region, order), tuple(strides[i] for i in order))


def _offsets(region: Region, strides: Ints) -> Iterator[int]:
    dims = zip(region.start, region.size, region.step, strides, strict=True)
    axes = [[(a + i * s) * stride for i in range(n)] for a, n, s, stride in dims]
    return (sum(index) for index in product(*axes))


def _split(copy: Copy, shape: Ints, factors: Sequence[Ints]) -> Iterator[Copy]:
    """The copies into which dims fall apart when each becomes several, or goes away."""
    source, rank = copy.source_region, len(copy.source_region.shape)
    axes = copy.axes or tuple(range(rank))
    order = tuple(axes.index(dim) for dim in range(rank))
    target = reordered(copy.target_region, order)
    choices = []
    for dim in range(rank):
        one = (source.start[dim], source.size[dim], source.step[dim])
        two = (target.shape[dim], target.start[dim], target.size[dim], target.step[dim])
        choices.append(list(_divided(one, two, factors[dim])))
    first = [sum(len(f) for f in factors[:dim]) for dim in range(rank)]  # of the new source dims
    for chosen in product(*choices):
        progressions = [p for pieces, _ in chosen for p in pieces]
        lines: list[tuple[Line, int | None]] = []
        for dim in axes:  # in the target's own order
            new: list[int | None] = list(range(first[dim], first[dim] + len(factors[dim])))
            lines += zip(chosen[dim][1], new or [None], strict=True)
        joined = _joined(lines)
        n, start, size, step = zip(*(line for line, _ in joined), strict=True)
        yield _copy(
            copy,
            _region(shape, progressions),
            Region(shape=n, start=start, size=size, step=step),
            tuple(axis for _, axis in joined),
        )


def _region(shape: Ints, progressions: Sequence[Progression]) -> Region:
    start, size, step = zip(*progressions, strict=True)
    return Region(shape=shape, start=start, size=size, step=step)


def _joined(lines: Sequence[tuple[Line, int | None]]) -> list[tuple[Line, int]]:
    """The target's dims without those that have no dim of the source any more: one index each."""
    kept: list[tuple[Line, int]] = []
    waiting: list[Line] = []
    for (n, start, size, step), axis in lines:
        if axis is None:
            waiting.append((n, start, size, step))
            continue
        for m, at, _, _ in reversed(waiting):
            start += at * n
            n *= m
        waiting = []
        kept.append(((n, start, size, step), axis))
    for m, at, _, _ in waiting:  # after the last: it takes each m-th element
        (n, start, size, step), axis = kept[-1]
        kept[-1] = (n * m, start * m + at, size, step * m if size > 1 else 1), axis
    return kept


def _divided(
    source: Progression, target: Line, factors: Ints
) -> Iterator[tuple[tuple[Progression, ...], tuple[Line, ...]]]:
    """Pieces of one dim, split into dims of these sizes: source and target dims of each piece."""
    if len(factors) == 0:
        yield (), (target,)
        return
    if len(factors) == 1:
        yield (source,), (target,)
        return
    inner = prod(factors[1:])
    n, at, _, step = target
    done = 0
    for rows, columns in _grid(source, inner):
        (_, num_rows, _), (_, num_columns, _) = rows, columns
        first = at + done * step
        done += num_rows * num_columns
        whole = _two_dims(n, first, step, num_rows, num_columns)
        if whole is not None:
            outer, line = whole
            for pieces, lines in _divided(columns, line, factors[1:]):
                yield (rows, *pieces), (outer, *lines)
            continue
        for row in range(num_rows):
            one = (rows[0] + row * rows[2], 1, 1)
            line = (n, first + row * num_columns * step, num_columns, step)
            for pieces, lines in _divided(columns, line, factors[1:]):
                yield (one, *pieces), ((1, 0, 1, 1), *lines)


def _two_dims(n: int, at: int, step: int, rows: int, columns: int) -> tuple[Line, Line] | None:
    """rows * columns elements from `at` of n on, each `step` further, as a box of two dims."""
    if rows == 1:
        return (1, 0, 1, 1), (n, at, columns, step if columns > 1 else 1)
    if columns == 1:
        return (n, at, rows, step), (1, 0, 1, 1)
    if step == 1 and not n % columns and not at % columns:
        return (n // columns, at // columns, rows, 1), (columns, 0, columns, 1)
    return None


def _grid(line: Progression, inner: int) -> Iterator[tuple[Progression, Progression]]:
    """A progression as boxes of (rows, columns), a row having `inner` elements; in its order."""
    start, size, step = line
    if size > 1 and not step % inner:
        yield (start // inner, size, step // inner), (start % inner, 1, 1)
        return
    first, count, columns = 0, 0, (0, 0, 0)
    while size:
        row, column = divmod(start, inner)
        here = min(size, -(-(inner - column) // step))
        found = (column, here, step if here > 1 else 1)
        if count and found == columns and row == first + count:
            count += 1
        else:
            if count:
                yield (first, count, 1), columns
            first, count, columns = row, 1, found
        start, size = start + here * step, size - here
    if count:
        yield (first, count, 1), columns


def through(copy: Copy, at: int) -> int | None:
    """Where element `at` of a copy's source lies in its target, both row-major; None if nowhere."""
    region, onto = copy.source_region, copy.target_region
    inner = []
    places = unravel(at, region.shape)
    for place, start, size, step in zip(
        places, region.start, region.size, region.step, strict=True
    ):
        number, off = divmod(place - start, step)
        if off or not 0 <= number < size:
            return None
        inner.append(number)
    turned = copy.permuted(tuple(inner))
    found = tuple(a + n * s for a, n, s in zip(onto.start, turned, onto.step, strict=True))
    return ravel(found, onto.shape)


def ravel(index: Ints, shape: Ints) -> int:
    """The row-major position of an index."""
    at = 0
    for place, n in zip(index, shape, strict=True):
        at = at * n + place
    return at


def unravel(at: int, shape: Ints) -> Ints:
    """The index of a row-major position: ravel's inverse."""
    places = []
    for n in reversed(shape):
        at, place = divmod(at, n)
        places.append(place)
    return tuple(reversed(places))
