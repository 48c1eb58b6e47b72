"""The original tensors' bytes, read from files that hold ranks' parameters. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from lading import dtypes
from lading.checkpoint import Reader, Source
from lading.checkpoint.sources import check_range
from lading.plan import Plan
from lading.regions import Region
from lading.shards.bands import Band, Shards, bytes_of, views_of

__all__ = ["ShardedReader", "flat_boxes"]


class ShardedReader:
    """The original tensors' bytes, put together from the ranks' files; a `Reader`.

    plan     of all ranks
    stored   by rank: where each parameter is
    rest     where the tensors are that no rank keeps
    files    of the ranks; closed with this one
    """

    def __init__(
        self,
        plan: Plan,
        stored: Sequence[Mapping[str, Source]],
        rest: Mapping[str, Source],
        files: Reader,
    ) -> None:
        self._rest, self._files = rest, files
        self._views = views_of([plan])
        self._shards = Shards(plan, stored, self._views, reader=files)

    @property
    def bytes_read(self) -> int:
        return self._files.bytes_read

    @property
    def files(self) -> None:
        """A tensor's bytes lie in several files."""
        return None

    def read_into(self, source: Source, offset_bytes: int, buffer: memoryview) -> None:
        check_range(source, offset_bytes, buffer)
        view = buffer.cast("B")
        rest = self._rest.get(source.name)
        if rest is not None:
            self._files.read_into(rest, offset_bytes, view)
            return
        shape = self._views[source.name]
        size = dtypes.storage_bytes(source.dtype)
        first, last = offset_bytes // size, -(-(offset_bytes + view.nbytes) // size)
        at = -(offset_bytes % size)  # where the first element's first byte would be in the buffer
        for box in flat_boxes(shape, first, last):
            band = Band(boxes=((source.name, box),))
            values = bytes_of(self._shards.read(band)[source.name])
            begin, end = max(at, 0), min(at + values.nbytes, view.nbytes)
            view[begin:end] = values[begin - at : end - at]
            at += values.nbytes

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> ShardedReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def flat_boxes(shape: tuple[int, ...], first: int, last: int) -> Iterator[Region]:
    """The elements first:last of a tensor, row-major, as boxes, in order; each is one run.

    Example: 2:11 of [4, 3] -> [0:1, 2:3], [1:3, 0:3], [3:4, 0:2].
    """
    if last <= first:
        return
    if not shape:
        yield Region.whole(())
        return
    row = 1
    for n in shape[1:]:
        row *= n
    whole = [(0, n) for n in shape[1:]]
    begin, end = -(-first // row), last // row
    if begin > end:  # inside one row
        yield from _in_row(shape, end, first - end * row, last - end * row)
        return
    if first < begin * row:
        yield from _in_row(shape, begin - 1, first - (begin - 1) * row, row)
    if begin < end:
        yield Region.box(shape, [(begin, end), *whole])
    if end * row < last:
        yield from _in_row(shape, end, 0, last - end * row)


def _in_row(shape: tuple[int, ...], row: int, first: int, last: int) -> Iterator[Region]:
    for box in flat_boxes(shape[1:], first, last):
        yield Region(shape=shape, start=(row, *box.start), size=(1, *box.size), step=(1, *box.step))
