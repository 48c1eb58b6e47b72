"""A pre-sharded folder, opened: checked files, and two ways to read it.

As the original checkpoint: `Sharded.checkpoint` has the original tensors by name, and its reader
puts any of their bytes together from the ranks' files. Whatever takes a checkpoint takes it, with
any number of ranks.

As a rank's own parameters: where a plan gives a rank exactly what its file holds, `reading` makes
the trivial plan, file to parameters, one sequential read.

No torch. Letters: T = tp_size, r = tp_rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lading import dtypes
from lading.checkpoint import (
    Checkpoint,
    Header,
    Reader,
    Source,
    open_checkpoint,
    read_header,
    read_json,
)
from lading.checkpoint.files import file_size
from lading.checkpoint.sources import SafetensorsReader, sources_of
from lading.errors import (
    CheckpointError,
    ConfigError,
    FileError,
    LadingError,
    PlanError,
    PlanFileError,
)
from lading.layouts import Layout
from lading.plan import Binding, Plan, Target, prove_bindings
from lading.ranks import Ranks
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
from lading.shards.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    OriginalFile,
    OriginalIndex,
    manifest_from_json,
)

__all__ = ["Sharded", "is_sharded", "open_any", "open_sharded", "reading"]

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """What a pre-sharded folder knows of the checkpoint that it comes from.

    sources   the tensors where the original files have them
    others    (path of the file to copy, name)
    came_as   "safetensors"; "torch" where the files are made from torch's
    """

    files: tuple[OriginalFile, ...]
    sources: Mapping[str, Source]
    index: OriginalIndex | None
    others: tuple[tuple[str, str], ...]
    came_as: str = "safetensors"


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """Files that hold the parameters of T ranks.

    folder      absolute
    plan        from the original checkpoint's tensors to all ranks
    stored      by rank: where each parameter is
    rest        where the tensors are that no rank keeps
    file_bytes  the size of each of these files
    manifest    None where the folder has none: then `original` says what `merge` writes
    form        the plan whose layouts hold for other numbers of ranks, where that is not `plan`
    """

    folder: str
    plan: Plan
    stored: tuple[Mapping[str, Source], ...]
    rest: Mapping[str, Source]
    file_bytes: Mapping[str, int]
    manifest: Manifest | None = None
    config: Mapping[str, Any] | None = None
    sources: Mapping[str, Source] = field(default_factory=dict)
    original: Original | None = None
    form: Plan | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The original checkpoint, served from the ranks' files."""
        origin = self.manifest or self.original
        files = origin.files if origin is not None else ()
        return Checkpoint(
            folder=self.folder,
            tensors=self.sources,
            file_bytes={file.name: file.num_bytes for file in files},
            metadata={file.name: file.parsed().metadata for file in files},
            config=self.config,
            format="safetensors",
            served_by=self,
        )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The folder, and the files in it that are read: what no verb may write over."""
        return self.folder, *(os.path.join(self.folder, name) for name in self.file_bytes)

    def reader(self) -> Reader:
        """A reader of the original tensors' bytes."""
        from lading.shards.reader import ShardedReader  # with numpy, which plans do without

        return ShardedReader(self.plan, self.stored, self.rest, self.open_files())

    def open_files(self) -> Reader:
        """A reader of the ranks' own files."""
        return SafetensorsReader(self.folder, self.file_bytes)


def is_sharded(path: Path) -> bool:
    """Whether this is a folder with a manifest."""
    return file_size(os.path.join(path, MANIFEST)) is not None


def open_any(path: Path) -> Checkpoint:
    """What `open_checkpoint` gives; of a pre-sharded folder the original checkpoint."""
    return open_sharded(path).checkpoint if is_sharded(path) else open_checkpoint(path)


def open_sharded(path: Path) -> Sharded:
    """The pre-sharded folder at `path`, its manifest proved and each file compared with it.

    Headers are read, no tensor. Raises a PlanFileError for a manifest that is wrong, a PlanError
    with every file that is missing, of another size, of another run, or lacks a tensor.
    """
    folder = os.path.abspath(os.fspath(path))
    value = read_json(
        os.path.join(folder, MANIFEST),
        name=MANIFEST,
        error=PlanFileError,
        limit_bytes=MAX_MANIFEST_BYTES,
    )
    try:
        manifest = manifest_from_json(value)
    except PlanFileError as error:
        error.located(file=MANIFEST)
        raise
    del value
    problems: list[LadingError] = []
    files = _Files(folder, manifest, problems)
    plan, size = manifest.plan, manifest.tp_size
    num_bytes = data_bytes_of_rank(plan)
    heads = [header_of_rank(plan, r, manifest.id) for r in range(size)]
    stored = [files.check(rank_file(r, size), head, num_bytes) for r, head in enumerate(heads)]
    originals = rest_of(plan, manifest.sources)
    rest: Mapping[str, Source] = {}
    if originals:
        num_bytes = sum(source.num_bytes for source in originals)
        rest = files.check(REST, header_of_rest(originals, manifest.id), num_bytes)
    config = files.config()
    if problems:
        raise PlanError(problems, what="the pre-sharded folder")
    return Sharded(
        folder=folder,
        plan=plan,
        stored=tuple(stored),
        rest=rest,
        file_bytes=files.file_bytes,
        manifest=manifest,
        config=config,
        sources=manifest.sources,
    )


@dataclass(slots=True)
class _Files:
    """The files of a folder, compared with its manifest one after another."""

    folder: str
    manifest: Manifest
    problems: list[LadingError]
    file_bytes: dict[str, int] = field(default_factory=dict)

    def check(self, name: str, head: bytes, num_bytes: int) -> Mapping[str, Source]:
        """The tensors of a file that has to be this head and so many bytes; faults are noted."""
        needed = parse_head(head, len(head) + num_bytes)
        size = file_size(os.path.join(self.folder, name))
        hint = "copy that file again, or shard again"
        if size is None:
            fact = f"is missing, {MANIFEST} needs it (tp_size is {self.manifest.tp_size})"
            self.problems.append(FileError(fact, subject=name, hint=hint))
            return {}
        if size != needed.file_bytes:
            fact = f"is {size} bytes, needs {needed.file_bytes} (as {MANIFEST} says)"
            self.problems.append(FileError(fact, subject=name, hint=hint))
            return {}
        try:
            found = read_header(os.path.join(self.folder, name), name=name)
        except LadingError as error:
            self.problems.append(error)
            return {}
        before = len(self.problems)
        self._compare(name, found, needed)
        if len(self.problems) > before:
            return {}
        self.file_bytes[name] = size
        return sources_of(found, name)

    def _compare(self, name: str, found: Header, needed: Header) -> None:
        for key, wanted in needed.metadata.items():
            have = found.metadata.get(key)
            if have == wanted:
                continue
            fact = f"its {key} is {have!r}, needs {wanted!r} (as {MANIFEST} says)"
            if key == "lading.id":
                fact = f"is of another run: {fact}"
            elif key == "lading.layouts":
                fact = f"was cut by other layouts than those of {MANIFEST}'s plan: {fact}"
            self.problems.append(CheckpointError(fact, subject=name))
            return
        for tensor, info in needed.tensors.items():
            other = found.tensors.get(tensor)
            want = dtypes.spell(info.dtype, info.shape)
            if other is None:
                fact = f"is not in the file, needs to be there as {want}"
            elif (other.dtype, other.shape) != (info.dtype, info.shape):
                fact = f"is {dtypes.spell(other.dtype, other.shape)}, needs {want}"
            elif other.start != info.start:
                fact = f"begins at byte {other.start}, needs {info.start}"
            else:
                continue
            fact += f" (as {MANIFEST} says)"
            self.problems.append(CheckpointError(fact, subject=tensor, file=name))
        for tensor in found.tensors.keys() - needed.tensors.keys():
            fact = f"is in the file, {MANIFEST} knows no such tensor there"
            self.problems.append(CheckpointError(fact, subject=tensor, file=name))

    def config(self) -> Mapping[str, Any] | None:
        """config.json, None where there is none."""
        path = os.path.join(self.folder, "config.json")
        if file_size(path) is None:
            return None
        try:
            config = read_json(path, name="config.json")
        except LadingError as error:
            self.problems.append(error)
            return None
        if not isinstance(config, dict):
            fact = f"is of type {type(config).__name__}, needs a JSON object"
            self.problems.append(ConfigError(fact, subject="config.json"))
            return None
        return config


# ------------------------------------------------------------------------------- the trivial plan


def reading(checkpoint: Checkpoint, plan: Plan, ranks: Ranks) -> tuple[Plan, Reader]:
    """The plan by which a rank reads, and the reader of its bytes.

    plan   from the checkpoint to the rank's parameters
    Of a pre-sharded folder whose file of this rank is just what the plan asks for: file to
    parameters, each a whole tensor, proved like any plan. Otherwise the plan itself.
    """
    sharded = checkpoint.served_by
    if not isinstance(sharded, Sharded) or not _is_same(sharded.plan, plan, ranks):
        return plan, checkpoint.reader()
    stored = sharded.stored[ranks.tp_rank]
    sources = {**sharded.rest, **stored}
    targets: list[Target] = []
    bindings: list[Binding] = []
    for target in plan.targets:
        if target.expected is not None:
            targets.append(target)
            bindings += (b for b in plan.bindings if b.target == target.name)
            continue
        layout = Layout.replicated(target.layout.local_shape, ranks.tp_size)
        targets.append(replace(target, layout=layout, leaf="", stored=None))
        bindings.append(Binding(target=target.name, part=None, source=target.name, fused=False))
    return prove_bindings(targets, sources, bindings, ranks=[ranks]), sharded.open_files()


def _is_same(held: Plan, asked: Plan, ranks: Ranks) -> bool:
    """Whether a rank's file has what the other plan gives the rank: the same copies and fills."""
    if held.tp_size != ranks.tp_size or ranks.ep_size != 1:
        return False
    one, two = held.shares[ranks.tp_rank], asked.share(ranks)
    kept = {t.name for t in held.targets if t.expected is None}
    wanted = {t.name for t in asked.targets if t.expected is None}
    constants = {check.source for check in asked.checks()}
    return (
        wanted <= kept
        and not constants & kept  # one name would be two tensors
        and _moves(one.copies, wanted) == _moves(two.copies, wanted)
        and {(f.target, f.region) for f in one.fills if f.target in wanted}
        == {(f.target, f.region) for f in two.fills}
    )


def _moves(copies: Sequence[Any], wanted: set[str]) -> set[tuple[Any, ...]]:
    return {
        (c.source, c.target, c.source_region, c.target_region, c.axes)
        for c in copies
        if c.target in wanted
    }
