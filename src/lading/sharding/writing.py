"""Writing a pre-sharded folder, whole or not at all: what `shard` and `reshard_files` share.

The bytes come from either end of a move (see `bands`). Their digests are taken on the way and give
the folder its identity, so headers are written last. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lading.checkpoint import (
    ByteReader,
    FileWriter,
    OutputFolder,
    Reader,
    Source,
    check_output_folder,
    sources_of,
)
from lading.checkpoint.files import file_size
from lading.errors import CheckpointError, ConflictError, FileError, LadingError, PlanError
from lading.plan import Plan
from lading.sharding.moving import Collected, Mover
from lading.shards.bands import Files, Shards, Views, views_of
from lading.shards.files import (
    MANIFEST,
    REST,
    data_bytes_of_rank,
    header_of_rank,
    header_of_rest,
    parse_head,
    rank_file,
    rest_of,
)
from lading.shards.folder import Original
from lading.shards.held import RankDifference, parts_of, rank_digests
from lading.shards.manifest import (
    Manifest,
    OriginalIndex,
    OtherFile,
    manifest_from_json,
    manifest_to_json,
)

if TYPE_CHECKING:
    from lading.loading import Progress

__all__ = [
    "Job",
    "Options",
    "ShardReport",
    "check_digests",
    "index_apart",
    "new_folder",
    "open_writers",
    "other_file",
]

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """What was written.

    path        the folder
    tp_size     of its files; None for a Hugging Face checkpoint
    files       of weights
    num_bytes   of those files
    seconds     wall time until the folder was there
    notes       what did not come along, in words
    """

    path: str
    tp_size: int | None
    files: tuple[str, ...]
    num_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        giga, rate = self.num_bytes / 1e9, self.num_bytes / 1e9 / self.seconds
        return f"{giga:.3g} GB in {self.seconds:.3g} s, {rate:.3g} GB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    out: Path
    overwrite: bool
    memory_bytes: int
    sync: bool
    progress: Progress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A pre-sharded folder that is to be written.

    inputs    folders that are read
    digests   those that have to come out
    wrong     where a pre-sharded folder that is read has other bytes of these tensors
    """

    plan: Plan
    original: Original
    inputs: tuple[str, ...]
    options: Options
    digests: Mapping[str, str] | None = None
    wrong: Callable[[Sequence[str]], Sequence[RankDifference]] = lambda _names: ()

    def run(
        self,
        source: Files | Shards,
        reader: Reader,
        rest: Mapping[str, Source],
        known: Mapping[str, str] | None,
        notes: tuple[str, ...],
        began: float,
    ) -> ShardReport:
        """Writes and publishes it.

        source         where the elements come from that ranks keep
        reader, rest   where those come from that none keeps
        known          digests that are taken over as they are; None = they are worked out
        """
        sizes = self._sizes()
        moved = sum(one.num_bytes for one in self.original.sources.values())
        views = source.views if isinstance(source, Shards) else views_of([self.plan])
        with new_folder(self.options, self.inputs, sum(sizes.values()), moved) as (out, mover):
            for name, num_bytes in sizes.items():
                out.create_file(name, num_bytes, self._head(name, None))
            with open_writers(out, list(sizes)) as writers:
                collected = None if known is not None else self._collected(views)
                self._fill(source, reader, rest, writers, mover, collected)
                digests = collected.digests() if collected is not None else known or {}
                if self.digests is not None:
                    check_digests(digests, self.digests, self.wrong)
                self._check_twins(digests)
                others = tuple(other_file(path, name) for path, name in self.original.others)
                manifest = Manifest(
                    plan=self.plan,
                    files=self.original.files,
                    index=self.original.index,
                    others=others,
                    digests=digests,
                    ranks=self._rank_digests(collected),
                    came_as=self.original.came_as,
                )
                for name, writer in writers.items():
                    writer.write(0, self._head(name, manifest.id))
            value = manifest_to_json(manifest)
            manifest_from_json(value)  # what could not be read back is not published
            out.write(MANIFEST, (json.dumps(value, separators=(",", ":")) + "\n").encode())
            for path, name in self.original.others:
                out.copy(path, name)
            if self.options.sync:
                out.sync([*sizes, MANIFEST, *(name for _, name in self.original.others)])
            out.publish()
        return ShardReport(
            path=out.path,
            tp_size=self.plan.tp_size,
            files=tuple(sizes),
            num_bytes=sum(sizes.values()),
            seconds=max(time.perf_counter() - began, 1e-9),
            notes=notes,
        )

    def _collected(self, views: Views) -> Collected:
        return Collected(self.original.sources, parts=parts_of(self.plan, views))

    def _rank_digests(self, collected: Collected | None) -> dict[str, tuple[str, ...]]:
        if collected is None:
            return {}
        return {
            name: rank_digests(
                self.plan,
                self.original.sources[name],
                lambda tensor, number, _holder: collected.part(tensor, number),
            )
            for name in collected.parts
        }

    def _rest(self) -> tuple[Source, ...]:
        return rest_of(self.plan, self.original.sources)

    def _head(self, name: str, identity: str | None) -> bytes:
        """The first bytes of a file: as many with an identity as without."""
        known = {} if identity is None else {"identity": identity}
        if name == REST:
            return header_of_rest(self._rest(), **known)
        size = self.plan.tp_size
        rank = next(r for r in range(size) if rank_file(r, size) == name)
        return header_of_rank(self.plan, rank, **known)

    def _sizes(self) -> dict[str, int]:
        """The size of each file of weights."""
        size = self.plan.tp_size
        num_bytes = len(header_of_rank(self.plan, 0)) + data_bytes_of_rank(self.plan)
        sizes = {rank_file(rank, size): num_bytes for rank in range(size)}
        rest = self._rest()
        if rest:
            sizes[REST] = len(header_of_rest(rest)) + sum(source.num_bytes for source in rest)
        return sizes

    def _fill(
        self,
        source: Files | Shards,
        reader: Reader,
        rest: Mapping[str, Source],
        writers: Mapping[str, FileWriter],
        mover: Mover,
        collected: Collected | None,
    ) -> None:
        sizes = self._sizes()
        size = self.plan.tp_size
        first = _places(rank_file(0, size), self._head, sizes)
        stored = [  # the files differ in their metadata only
            {name: replace(place, file=rank_file(rank, size)) for name, place in first.items()}
            for rank in range(size)
        ]
        views = source.views if isinstance(source, Shards) else views_of([self.plan])
        target = Shards(self.plan, stored, views, writers=writers)
        mover.run(self.plan, views, source, target, collected)
        names = [one.name for one in self._rest()]
        if names:
            places = _places(REST, self._head, sizes)
            mover.copy_rest(names, reader, rest, places, writers, collected)

    def _check_twins(self, digests: Mapping[str, str]) -> None:
        for tie in self.plan.ties:
            if digests[tie.source] != digests[tie.twin]:
                sources = self.original.sources
                raise ConflictError(
                    f"checkpoint tensors {tie.source!r} and {tie.twin!r} differ, needs equal ones "
                    "(the parameter is tied to both)",
                    subject=tie.target,
                    file=sources[tie.twin].file,
                )


def _places(
    name: str, head_of: Callable[[str, str | None], bytes], sizes: Mapping[str, int]
) -> dict[str, Source]:
    """Where a file that is to be written has its tensors."""
    header = parse_head(head_of(name, None), sizes[name])
    return sources_of(header, name)


@contextmanager
def new_folder(
    options: Options, inputs: Sequence[str], num_bytes: int, moved_bytes: int
) -> Iterator[tuple[OutputFolder, Mover]]:
    """A folder that is filled inside, and goes unless it was published; and what moves bytes.

    num_bytes, moved_bytes   of its weights; of the checkpoint, as progress counts them
    """
    progress = options.progress
    mover = Mover(memory_bytes=options.memory_bytes)
    if progress is not None:
        mover = replace(mover, advance=progress.advance)
    check_output_folder(
        options.out, overwrite=options.overwrite, inputs=inputs, needed_bytes=num_bytes
    )
    out = OutputFolder.create(options.out, overwrite=options.overwrite)
    try:
        if progress is not None:
            progress.start(moved_bytes)
        try:
            yield out, mover
        finally:
            if progress is not None:
                progress.finish()
    finally:
        out.discard()


@contextmanager
def open_writers(out: OutputFolder, names: Sequence[str]) -> Iterator[dict[str, FileWriter]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(out.writer(name)) for name in names}


def index_apart(
    copied: Sequence[tuple[str, str]], written: Mapping[str, bytes]
) -> tuple[OriginalIndex | None, tuple[tuple[str, str], ...]]:
    """The index, which would name files that a pre-sharded folder does not have, and the others."""
    ending = ".safetensors.index.json"
    index = None
    for path, name in copied:
        if name.endswith(ending):
            index = OriginalIndex(name=name, text=_read(path, name).decode())
    for name, data in written.items():
        if name.endswith(ending):
            index = OriginalIndex(name=name, text=data.decode())
    return index, tuple(pair for pair in copied if not pair[1].endswith(ending))


def other_file(path: str, name: str) -> OtherFile:
    data = _read(path, name)
    return OtherFile(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _read(path: str, name: str) -> bytes:
    """A small file, whole."""
    size = file_size(path)
    if size is None:
        raise FileError("is missing", subject=name)
    data = bytearray(size)
    with ByteReader(os.path.dirname(path), {os.path.basename(path): size}) as reader:
        reader.read_into(os.path.basename(path), 0, memoryview(data))
    return bytes(data)


def check_digests(
    digests: Mapping[str, str],
    known: Mapping[str, str],
    wrong: Callable[[Sequence[str]], Sequence[RankDifference]],
) -> None:
    """Raises a PlanError with each tensor whose bytes are not those that were sharded."""
    names = [name for name, digest in digests.items() if digest != known[name]]
    if not names:
        return
    places: dict[str, list[RankDifference]] = {name: [] for name in names}
    for one in wrong(names):
        places[one.tensor].append(one)
    problems: list[LadingError] = []
    for name, found in places.items():
        fact = f"has the digest {digests[name]}, needs {known[name]} (as {MANIFEST} says; the "
        fact += "ranks' files were damaged, or the manifest edited)"
        fact += "".join(f"; {one.fact}" for one in found)
        hint = "lading shard of the original checkpoint"
        problems.append(CheckpointError(fact, subject=name, hint=hint))
    raise PlanError(problems, what="the pre-sharded folder")
