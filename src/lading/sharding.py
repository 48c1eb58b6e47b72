"""The verbs from files to files: `shard`, `reshard_files` and `merge`.

    shard           a Hugging Face checkpoint -> a pre-sharded folder (see `manifest`)
    reshard_files   a pre-sharded folder of T ranks -> one of another number of ranks
    merge           a pre-sharded folder -> the Hugging Face checkpoint, byte for byte

Stored entries move; none is decoded, cast or quantised again, and no GPU, model code or torch is
needed. What goes where follows from the plan, for other numbers of ranks from its layouts: they
say what a packed word, a group or a block covers, and refuse a cut that would go through one.

Every byte is read once and written once (per rank that keeps it), and its digest is taken on the
way: `shard` puts it into the manifest, the other two compare it. Everything is written beside its
place and gets its name at the end, so that a failure, a full disk or a kill leaves nothing there.
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

from lading.bands import Files, Shards, views_of
from lading.checkpoint import (
    ByteReader,
    FileWriter,
    OutputFolder,
    Reader,
    Source,
    check_output_folder,
    outline_like,
)
from lading.checkpoint.files import file_size
from lading.errors import (
    CallError,
    CheckpointError,
    ConflictError,
    FileError,
    LadingError,
    PlanError,
)
from lading.manifest import (
    MANIFEST,
    REST,
    Manifest,
    OriginalFile,
    OriginalIndex,
    OtherFile,
    data_bytes_of_rank,
    header_of_rank,
    header_of_rest,
    manifest_from_json,
    manifest_to_json,
    parse_head,
    rank_file,
    rest_of,
)
from lading.moving import DEFAULT_MEMORY_BYTES, Collected, Mover
from lading.plan import Plan
from lading.preflight import preflight
from lading.ranks import all_ranks
from lading.shard_plans import plan_at, stored_plan
from lading.sharded import Sharded, is_sharded, open_sharded

if TYPE_CHECKING:
    from lading.loading import Progress

__all__ = ["ShardReport", "merge", "reshard_files", "shard"]

Path = str | os.PathLike[str]

MAX_TP_SIZE = 4096


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
class _Original:
    """What a pre-sharded folder knows of the checkpoint that it comes from.

    sources   the tensors where the original files have them
    others    (path of the file to copy, name)
    """

    files: tuple[OriginalFile, ...]
    sources: Mapping[str, Source]
    index: OriginalIndex | None
    others: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Options:
    out: Path
    overwrite: bool
    memory_bytes: int
    sync: bool
    progress: Progress | None


def shard(
    path: Path,
    *,
    tp_size: int,
    out: Path,
    straddle: str = "duplicate",
    overwrite: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    sync: bool = True,
    progress: Progress | None = None,
) -> ShardReport:
    """Cuts a checkpoint folder into one file a rank, and writes what the way back needs.

    path           a Hugging Face checkpoint folder
    tp_size        T, the number of ranks
    out            a folder that is not there yet, or is empty
    straddle       "duplicate" or "refuse": for scale blocks that a cut goes through
    overwrite      a checkpoint that is at `out` is replaced, when the new one is complete
    memory_bytes   for what is on its way from file to file
    sync           wait until the disk has the bytes, so that also a power cut leaves all or nothing

    Raises a PlanError with every problem before anything is written; a ConflictError where tied
    tensors differ; a FileError. `out` is then as it was before.

    Example: `lading.shard("llama", tp_size=4, out="llama-tp4")` writes 4 files; on each of 4 ranks
    `lading.from_pretrained("llama-tp4")` reads one of them from its beginning to its end.
    """
    began = time.perf_counter()
    _check_tp(tp_size, "shard")
    if is_sharded(path):
        raise CallError(
            "is a pre-sharded folder, needs a checkpoint in its original form",
            subject=os.fspath(path),
            hint=f"lading reshard {os.fspath(path)} --tp {tp_size} --out {os.fspath(out)}",
        )
    found = preflight(path, all_ranks(tp_size), straddle=straddle)
    checkpoint = found.checkpoint
    outline = outline_like(checkpoint)
    plan = stored_plan(found.plan, outline.places)
    files = tuple(
        OriginalFile(name=f.name, num_bytes=f.num_bytes, header=f.head[8:].decode())
        for f in outline.files
    )
    index, others = _index_apart(outline.copied, outline.written)
    original = _Original(files=files, sources=outline.places, index=index, others=others)
    options = _Options(
        out=out, overwrite=overwrite, memory_bytes=memory_bytes, sync=sync, progress=progress
    )
    with checkpoint.reader() as reader:
        source = Files(sources=checkpoint.tensors, reader=reader)
        job = _Job(plan=plan, original=original, inputs=(checkpoint.folder,), options=options)
        return job.run(source, reader, checkpoint.tensors, None, outline.notes, began)


def reshard_files(
    path: Path | Sharded,
    *,
    tp_size: int,
    out: Path,
    overwrite: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    sync: bool = True,
    progress: Progress | None = None,
) -> ShardReport:
    """Turns a pre-sharded folder into one of another number of ranks, file to file.

    path      what `shard` wrote
    tp_size   M, the new number of ranks
    Others as of `shard`. Raises a PlanError where M would cut through a packed word, a group or a
    block, with the sizes that work; a CheckpointError for a tensor whose bytes are not those that
    were sharded.

    Example: of 4 ranks to 2: rank 0's new file has rows of the old files 0 and 1.
    """
    began = time.perf_counter()
    _check_tp(tp_size, "reshard")
    sharded = path if isinstance(path, Sharded) else _open(path)
    manifest = _manifest_of(sharded)
    plan = plan_at(sharded.plan, tp_size)
    original = _Original(
        files=manifest.files,
        sources=manifest.sources,
        index=manifest.index,
        others=_checked_others(sharded, manifest),
    )
    options = _Options(
        out=out, overwrite=overwrite, memory_bytes=memory_bytes, sync=sync, progress=progress
    )
    views = views_of([sharded.plan, plan])
    with sharded.open_files() as reader:
        source = Shards(sharded.plan, sharded.stored, views, reader=reader)
        job = _Job(plan=plan, original=original, inputs=(sharded.folder,), options=options)
        return job.run(source, reader, sharded.rest, manifest, (), began)


def merge(
    path: Path | Sharded,
    *,
    out: Path,
    overwrite: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    sync: bool = True,
    progress: Progress | None = None,
) -> ShardReport:
    """Puts a pre-sharded folder together again: the original files, equal byte for byte.

    path   what `shard` or `reshard_files` wrote
    Others as of `shard`. Raises a CheckpointError for a tensor whose bytes are not those that were
    sharded.
    """
    began = time.perf_counter()
    sharded = path if isinstance(path, Sharded) else _open(path)
    manifest = _manifest_of(sharded)
    others = _checked_others(sharded, manifest)
    options = _Options(
        out=out, overwrite=overwrite, memory_bytes=memory_bytes, sync=sync, progress=progress
    )
    total = sum(file.num_bytes for file in manifest.files)
    views = views_of([sharded.plan])
    with (
        sharded.open_files() as reader,
        _folder(options, (sharded.folder,), total, total) as (out_folder, mover),
    ):
        for file in manifest.files:
            out_folder.create_file(file.name, file.num_bytes, file.head)
        with _writers(out_folder, [file.name for file in manifest.files]) as writers:
            collected = Collected(manifest.sources)
            source = Shards(sharded.plan, sharded.stored, views, reader=reader)
            target = Files(sources=manifest.sources, writers=writers)
            mover.run(sharded.plan, views, source, target, collected)
            rest = tuple(sharded.rest)
            mover.copy_rest(rest, reader, sharded.rest, manifest.sources, writers, collected)
        _check_digests(collected.digests(), manifest)
        for place, name in others:
            out_folder.copy(place, name)
        if manifest.index is not None:
            out_folder.write(manifest.index.name, manifest.index.text.encode())
        if options.sync:
            small = [name for _, name in others]
            small += [] if manifest.index is None else [manifest.index.name]
            out_folder.sync([file.name for file in manifest.files] + small)
        out_folder.publish()
    return ShardReport(
        path=out_folder.path,
        tp_size=None,
        files=tuple(file.name for file in manifest.files),
        num_bytes=total,
        seconds=max(time.perf_counter() - began, 1e-9),
    )


def _check_tp(tp_size: int, verb: str) -> None:
    if type(tp_size) is not int or not 1 <= tp_size <= MAX_TP_SIZE:
        raise CallError(
            f"tp_size is {tp_size!r}, needs an int from 1 to {MAX_TP_SIZE}", subject=verb
        )


# ---------------------------------------------------------------------- writing pre-sharded folders


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A pre-sharded folder that is to be written.

    inputs   folders that are read
    """

    plan: Plan
    original: _Original
    inputs: tuple[str, ...]
    options: _Options

    def run(
        self,
        source: Files | Shards,
        reader: Reader,
        rest: Mapping[str, Source],
        known: Manifest | None,
        notes: tuple[str, ...],
        began: float,
    ) -> ShardReport:
        """Writes and publishes it.

        source         where the elements come from that ranks keep
        reader, rest   where those come from that none keeps
        known          of a folder that was sharded before: its digests have to come out again
        """
        sizes = self._sizes()
        moved = sum(one.num_bytes for one in self.original.sources.values())
        with _folder(self.options, self.inputs, sum(sizes.values()), moved) as (out, mover):
            for name, num_bytes in sizes.items():
                out.create_file(name, num_bytes, self._head(name, None))
            with _writers(out, list(sizes)) as writers:
                digests = self._fill(source, reader, rest, writers, mover)
                if known is not None:
                    _check_digests(digests, known)
                self._check_twins(digests)
                others = tuple(_other(path, name) for path, name in self.original.others)
                manifest = Manifest(
                    plan=self.plan,
                    files=self.original.files,
                    index=self.original.index,
                    others=others,
                    digests=digests,
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
    ) -> dict[str, str]:
        sizes = self._sizes()
        stored = [
            _places(rank_file(rank, self.plan.tp_size), self._head, sizes)
            for rank in range(self.plan.tp_size)
        ]
        views = source.views if isinstance(source, Shards) else views_of([self.plan])
        collected = Collected(self.original.sources)
        target = Shards(self.plan, stored, views, writers=writers)
        mover.run(self.plan, views, source, target, collected)
        names = [one.name for one in self._rest()]
        if names:
            places = _places(REST, self._head, sizes)
            mover.copy_rest(names, reader, rest, places, writers, collected)
        return collected.digests()

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
    return {
        tensor: Source(
            name=tensor,
            dtype=info.dtype,
            shape=info.shape,
            file=name,
            offset_bytes=info.start,
            num_bytes=info.num_bytes,
        )
        for tensor, info in header.tensors.items()
    }


@contextmanager
def _folder(
    options: _Options, inputs: Sequence[str], num_bytes: int, moved_bytes: int
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
def _writers(out: OutputFolder, names: Sequence[str]) -> Iterator[dict[str, FileWriter]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(out.writer(name)) for name in names}


def _index_apart(
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


def _other(path: str, name: str) -> OtherFile:
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


# --------------------------------------------------------------------------------- what was sharded


def _open(path: Path) -> Sharded:
    if not is_sharded(path):
        raise FileError(
            f"has no {MANIFEST}, needs a folder that lading shard wrote", subject=os.fspath(path)
        )
    return open_sharded(path)


def _manifest_of(sharded: Sharded) -> Manifest:
    assert sharded.manifest is not None, "a folder of another tool becomes one of ours first"
    return sharded.manifest


def _checked_others(sharded: Sharded, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """(path, name) of the small files, which have to be what they were."""
    problems: list[LadingError] = []
    found = []
    for other in manifest.others:
        path = os.path.join(sharded.folder, other.name)
        try:
            have = _other(path, other.name)
        except FileError as error:
            problems.append(error)
            continue
        if have != other:
            fact = f"is not what it was when the checkpoint was sharded (as {MANIFEST} says)"
            problems.append(CheckpointError(fact, subject=other.name))
        found.append((path, other.name))
    if problems:
        raise PlanError(problems, what="the pre-sharded folder")
    return tuple(found)


def _check_digests(digests: Mapping[str, str], manifest: Manifest) -> None:
    """Raises a PlanError with each tensor whose bytes are not those that were sharded."""
    problems: list[LadingError] = [
        CheckpointError(
            f"has the digest {digest}, needs {manifest.digests[name]} (as {MANIFEST} says; the "
            "ranks' files were damaged, or the manifest edited)",
            subject=name,
            hint="lading shard of the original checkpoint",
        )
        for name, digest in digests.items()
        if digest != manifest.digests[name]
    ]
    if problems:
        raise PlanError(problems, what="the pre-sharded folder")
