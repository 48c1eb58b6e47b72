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

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lading.checkpoint import outline_like
from lading.digesting.files import differing_ranks_of
from lading.errors import CallError, CheckpointError, FileError, LadingError, PlanError
from lading.preflight import preflight
from lading.ranks import all_ranks
from lading.sharding.moving import DEFAULT_MEMORY_BYTES, Collected
from lading.sharding.writing import (
    Job,
    Options,
    ShardReport,
    check_digests,
    index_apart,
    new_folder,
    open_writers,
    other_file,
)
from lading.shards.bands import Files, Shards, views_of
from lading.shards.files import MANIFEST
from lading.shards.folder import Original, Sharded, is_sharded, open_sharded
from lading.shards.manifest import Manifest, OriginalFile
from lading.shards.plans import plan_at, stored_plan

if TYPE_CHECKING:
    from lading.loading import Progress

__all__ = ["ShardReport", "merge", "reshard_files", "shard"]

Path = str | os.PathLike[str]

MAX_TP_SIZE = 4096

_REMADE = ("the checkpoint came as torch files; these are safetensors files of the same tensors",)


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
    overwrite      a checkpoint that is at `out` is replaced, when the new one is complete; never
                   what is read
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
    files = tuple(OriginalFile.of_head(f.name, f.num_bytes, f.head) for f in outline.files)
    index, others = index_apart(outline.copied, outline.written)
    original = Original(
        files=files,
        sources=outline.places,
        index=index,
        others=others,
        came_as=checkpoint.format,
    )
    options = Options(
        out=out, overwrite=overwrite, memory_bytes=memory_bytes, sync=sync, progress=progress
    )
    with checkpoint.reader() as reader:
        source = Files(sources=checkpoint.tensors, reader=reader)
        job = Job(plan=plan, original=original, inputs=checkpoint.inputs, options=options)
        return job.run(source, reader, checkpoint.tensors, None, outline.notes, began)


def reshard_files(
    path: Path | Sharded,
    *,
    tp_size: int,
    out: Path,
    overwrite: bool = False,
    verify: bool = True,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    sync: bool = True,
    progress: Progress | None = None,
) -> ShardReport:
    """Turns a pre-sharded folder into one of another number of ranks, file to file.

    path      what `shard` wrote, or what `describe_shards` returned
    tp_size   M, the new number of ranks
    verify    compare each tensor's digest with the manifest's; without it the work takes little
              more than half of the CPU time, and damaged bytes are passed on
    Others as of `shard`. Raises a PlanError where M would cut through a packed word, a group or a
    block, with the sizes that work; a CheckpointError for a tensor whose bytes are not those that
    were sharded.

    Example: of 4 ranks to 2: rank 0's new file has rows of the old files 0 and 1.
    """
    began = time.perf_counter()
    _check_tp(tp_size, "reshard")
    sharded = path if isinstance(path, Sharded) else _open(path)
    original, known = _original_of(sharded)
    plan = plan_at(sharded.form or sharded.plan, tp_size)
    options = Options(
        out=out, overwrite=overwrite, memory_bytes=memory_bytes, sync=sync, progress=progress
    )
    views = views_of([sharded.plan, plan])
    with sharded.open_files() as reader:
        source = Shards(sharded.plan, sharded.stored, views, reader=reader)
        job = Job(
            plan=plan,
            original=original,
            inputs=sharded.inputs,
            options=options,
            digests=known,
            wrong=lambda names: differing_ranks_of(sharded, names),
        )
        return job.run(source, reader, sharded.rest, None if verify else known, (), began)


def merge(
    path: Path | Sharded,
    *,
    out: Path,
    overwrite: bool = False,
    verify: bool = True,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    sync: bool = True,
    progress: Progress | None = None,
) -> ShardReport:
    """Puts a pre-sharded folder together again: the original files, equal byte for byte.

    A checkpoint that came as torch files becomes safetensors files of the same tensors; the
    report's `notes` say so.

    path     what `shard` or `reshard_files` wrote, or what `describe_shards` returned
    verify   as of `reshard_files`
    Others as of `shard`. Raises a CheckpointError for a tensor whose bytes are not those that were
    sharded.
    """
    began = time.perf_counter()
    sharded = path if isinstance(path, Sharded) else _open(path)
    original, known = _original_of(sharded)
    options = Options(
        out=out, overwrite=overwrite, memory_bytes=memory_bytes, sync=sync, progress=progress
    )
    total = sum(file.num_bytes for file in original.files)
    views = views_of([sharded.plan])
    with (
        sharded.open_files() as reader,
        new_folder(options, sharded.inputs, total, total) as (out_folder, mover),
    ):
        for file in original.files:
            out_folder.create_file(file.name, file.num_bytes, file.head)
        with open_writers(out_folder, [file.name for file in original.files]) as writers:
            collected = Collected(original.sources) if verify and known is not None else None
            source = Shards(sharded.plan, sharded.stored, views, reader=reader)
            target = Files(sources=original.sources, writers=writers)
            mover.run(sharded.plan, views, source, target, collected)
            rest = tuple(sharded.rest)
            mover.copy_rest(rest, reader, sharded.rest, original.sources, writers, collected)
        if collected is not None and known is not None:
            found = collected.digests()
            check_digests(found, known, lambda names: differing_ranks_of(sharded, names))
        for place, name in original.others:
            out_folder.copy(place, name)
        if original.index is not None:
            out_folder.write(original.index.name, original.index.text.encode())
        if options.sync:
            small = [name for _, name in original.others]
            small += [] if original.index is None else [original.index.name]
            out_folder.sync([file.name for file in original.files] + small)
        out_folder.publish()
    return ShardReport(
        path=out_folder.path,
        tp_size=None,
        files=tuple(file.name for file in original.files),
        num_bytes=total,
        notes=_REMADE if original.came_as == "torch" else (),
        seconds=max(time.perf_counter() - began, 1e-9),
    )


def _check_tp(tp_size: int, verb: str) -> None:
    if type(tp_size) is not int or not 1 <= tp_size <= MAX_TP_SIZE:
        raise CallError(
            f"tp_size is {tp_size!r}, needs an int from 1 to {MAX_TP_SIZE}", subject=verb
        )


# --------------------------------------------------------------------------------- what was sharded


def _open(path: Path) -> Sharded:
    if not is_sharded(path):
        raise FileError(
            f"has no {MANIFEST}, needs a folder that lading shard wrote", subject=os.fspath(path)
        )
    return open_sharded(path)


def _original_of(sharded: Sharded) -> tuple[Original, Mapping[str, str] | None]:
    """What the files were made from, and its digests where they are known."""
    manifest = sharded.manifest
    if manifest is None:
        assert sharded.original is not None, "a folder without a manifest was described"
        return sharded.original, None
    original = Original(
        files=manifest.files,
        sources=manifest.sources,
        index=manifest.index,
        others=_checked_others(sharded, manifest),
        came_as=manifest.came_as,
    )
    return original, manifest.digests


def _checked_others(sharded: Sharded, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """(path, name) of the small files, which have to be what they were."""
    problems: list[LadingError] = []
    found = []
    for other in manifest.others:
        path = os.path.join(sharded.folder, other.name)
        try:
            have = other_file(path, other.name)
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
