"""Folders of ranks' files that other tools wrote, described so that they can be resharded.

What such a folder lacks is what its tensors are. `describe_shards` says it with values: the layouts
of lading's own declaration of the model, and for tensors that are cut otherwise a layout of their
own. Two kinds are known:

    sharded_state   of vLLM and its relatives (ShardedStateLoader): one or more files a rank, named
                    model-rank-{rank}-part-{part}.safetensors, of the engine's own parameters. They
                    are cut and fused as lading's are, and have the same names
    raw rows        a fused tensor's rows, parts in order, dealt out to the ranks evenly and without
                    regard to the parts: rank r has rows r*R : (r+1)*R of [q; k; v]

Dense models only: of a quantised one the parameters are what a kernel made of them. Also a dense
parameter may have been changed after its load; where its shape is the same nobody can tell. No
torch.

Letters: T = tp_size, R = rows of a fused tensor / T.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lading import dtypes, models
from lading.checkpoint import Source, outline_new, read_header, read_json, source_of
from lading.checkpoint.files import file_size, list_folder
from lading.errors import (
    CallError,
    ConfigError,
    DtypeError,
    FileError,
    LadingError,
    LayoutError,
    MissingTensorError,
    PlanError,
    ShapeError,
    SurplusTensorError,
)
from lading.layouts import Axis, Cut, Layout
from lading.names import Names
from lading.plan import Target, make_plan
from lading.ranks import all_ranks
from lading.sharding.writing import index_apart
from lading.shards.folder import Original, Sharded, is_sharded
from lading.shards.manifest import OriginalFile

__all__ = ["IGNORED", "describe_shards"]

Path = str | os.PathLike[str]
Tensors = Mapping[str, Source]

MAX_FILE_BYTES = 5 * 10**9
_PATTERN = re.compile(r"model-rank-(\d{1,6})-part-(\d{1,6})\.safetensors", re.ASCII)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")

IGNORED = (r".*\.attn\._[kqv]_scale", r".*\._prob_scale", r".*rotary_emb\.(cos_sin_cache|inv_freq)")
"""Buffers that engines save with their parameters, and make anew when they load."""


def describe_shards(
    path: Path,
    *,
    tp_size: int,
    files: Sequence[Sequence[str]] | None = None,
    renames: Mapping[str, str] | None = None,
    raw_rows: Sequence[str] = (),
    ignored: Sequence[str] = IGNORED,
) -> Sharded:
    """A folder of T ranks' files of another tool as what `reshard_files` and `merge` take.

    path       the folder, with the model's config.json
    files      for each rank the names of its files; by default those of sharded_state
    renames    regular expression → replacement, in order, from a stored name to lading's: what the
               checkpoint calls it, with q, k, v fused as qkv_proj and gate, up as gate_up_proj
    raw_rows   regular expressions of whole names, lading's, of fused parameters that are cut in raw
               rows
    ignored    regular expressions of whole stored names of tensors that are no weights
    Raises a PlanError with every tensor that is missing, unknown, or of another shape or dtype; a
    ConfigError for a quantised model.

    Headers are read, no tensor. `merge` writes the tensors in model order, a parameter that is cut
    in raw rows as one fused tensor.

    Example: `lading.merge(lading.describe_shards("vllm-tp8", tp_size=8), out="llama")`.
    """
    folder = os.path.abspath(os.fspath(path))
    if is_sharded(folder):
        raise CallError("is a folder of lading shard, which describes itself", subject=folder)
    by_rank = _rank_files(folder, tp_size, files)
    config, targets, names = _declared(folder, tp_size)
    found = tuple(_tensors(folder, of_rank, renames or {}, ignored) for of_rank in by_rank)
    raw = [t.name for t in targets if _matches(t.name, raw_rows)]
    problems: list[LadingError] = []
    held = [_raw_rows(t, problems) if t.name in raw else t for t in targets]
    stored = _matched(found, held, problems)
    if problems:
        raise PlanError(problems, what=f"the files of {tp_size} ranks")
    dtype_of = {name: source.dtype for name, source in stored[0].items()}
    held = [replace(t, dtype=dtype_of[t.name]) for t in held]
    declared = [replace(t, dtype=dtype_of[t.name]) for t in targets]
    outline = outline_new(_originals(declared, names, raw), max_file_bytes=MAX_FILE_BYTES)
    ranks = all_ranks(tp_size)
    index, _ = index_apart((), outline.written)
    return Sharded(
        folder=folder,
        plan=make_plan(held, outline.places, ranks=ranks, names=names, where=folder),
        form=make_plan(declared, outline.places, ranks=ranks, names=names, where=folder),
        stored=stored,
        rest={},
        file_bytes={
            name: file_size(os.path.join(folder, name)) or 0
            for of_rank in by_rank
            for name in of_rank
        },
        config=config,
        sources=outline.places,
        original=Original(
            files=tuple(OriginalFile.of_head(f.name, f.num_bytes, f.head) for f in outline.files),
            sources=outline.places,
            index=index,
            others=_others(folder),
        ),
    )


# --------------------------------------------------------------------------------------- the files


def _rank_files(
    folder: str, tp_size: int, files: Sequence[Sequence[str]] | None
) -> tuple[tuple[str, ...], ...]:
    """The names of each rank's files, in order."""
    if files is not None:
        if len(files) != tp_size:
            fact = f"are of {len(files)} ranks, needs {tp_size} (tp_size)"
            raise CallError(fact, subject="describe_shards, files")
        for name in (name for of_rank in files for name in of_rank):
            if os.path.basename(name) != name or not name.endswith(".safetensors"):
                fact = f"names {name!r}, needs .safetensors files in the folder itself"
                raise CallError(fact, subject="describe_shards, files")
        return tuple(tuple(of_rank) for of_rank in files)
    found: dict[int, dict[int, str]] = {}
    for name in list_folder(folder):
        match = _PATTERN.fullmatch(name)
        if match is not None:
            found.setdefault(int(match[1]), {})[int(match[2])] = name
    if sorted(found) != list(range(tp_size)):
        have = ", ".join(map(str, sorted(found))) or "none"
        raise FileError(
            f"has files model-rank-{{rank}}-part-{{part}}.safetensors of these ranks: {have}; "
            f"needs 0 to {tp_size - 1} (tp_size is {tp_size})",
            subject=folder,
        )
    for rank, parts in found.items():
        if sorted(parts) != list(range(len(parts))):
            have = ", ".join(map(str, sorted(parts)))
            raise FileError(f"has parts {have} of rank {rank}, needs all from 0 on", subject=folder)
    return tuple(tuple(found[r][part] for part in sorted(found[r])) for r in range(tp_size))


def _tensors(
    folder: str, files: Sequence[str], renames: Mapping[str, str], ignored: Sequence[str]
) -> dict[str, Source]:
    """The tensors of one rank by lading's names."""
    found: dict[str, Source] = {}
    for file in files:
        header = read_header(os.path.join(folder, file), name=file)
        for stored, info in header.tensors.items():
            if _matches(stored, ignored):
                continue
            name = stored
            for pattern, replacement in renames.items():
                name = re.sub(pattern, replacement, name)
            if name in found:
                fact = f"is the name of {found[name].name!r} and of {stored!r}, needs one"
                raise CallError(fact, subject=name, file=file)
            found[name] = source_of(stored, info, file)
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _others(folder: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (os.path.join(folder, name), name)
        for name in list_folder(folder)
        if not name.endswith(_WEIGHTS) and os.path.isfile(os.path.join(folder, name))
    )


# ---------------------------------------------------------------------------------- what they hold


def _declared(folder: str, tp_size: int) -> tuple[dict[str, Any], tuple[Target, ...], Names]:
    """config.json, the parameters that follow from it, and the naming rules."""
    path = os.path.join(folder, "config.json")
    if file_size(path) is None:
        fact = "is missing, needs one beside the files (it says which model this is)"
        raise ConfigError(fact, subject="config.json", file=folder)
    tree = read_json(path, name="config.json")
    config = models.parse_config(tree)
    if config.quantization is not None:
        raise ConfigError(
            "declares a quantised model, needs a dense one (an engine saves quantised weights in "
            "the form of its kernels)",
            subject="quantization_config",
            file="config.json",
        )
    targets = models.targets(models.declare(config), tp_size, config.dtype or "BF16")
    return tree, targets, models.FAMILIES[config.family].names


def _raw_rows(target: Target, problems: list[LadingError]) -> Target:
    """The same parameter cut in raw rows of the fused tensor: one part, whatever it is made of."""
    shape = target.layout.fused_shape
    cuts = [Cut(axis=Axis.of(shape[0]))]
    cuts += [Cut(axis=Axis.of(n, max_pieces=1)) for n in shape[1:]]
    try:
        layout = Layout(cuts=tuple(cuts), tp_size=target.layout.tp_size)
    except LayoutError as error:
        problems.append(error.located(subject=target.name))
        return target
    return replace(target, layout=layout)


def _originals(
    targets: Sequence[Target], names: Names, raw: Sequence[str]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of the checkpoint tensors that these parameters are made of."""
    for target in targets:
        parts = target.layout.part_names
        stored = names.parts(target.name, len(parts), target.leaf) if len(parts) > 1 else None
        if stored is None or target.name in raw:
            yield names.whole(target.name), target.dtype, target.layout.fused_shape
            continue
        for name, part in zip(stored, parts, strict=True):
            yield name, target.dtype, target.layout.source_shape(part)


def _matched(
    found: Sequence[Tensors], targets: Sequence[Target], problems: list[LadingError]
) -> tuple[dict[str, Source], ...]:
    """For each rank where each parameter is; faults are noted, each name's on its first rank."""
    matched: list[dict[str, Source]] = []
    blamed: set[str] = set()

    def blame(problem: LadingError, rank: int) -> None:
        if problem.subject not in blamed:
            blamed.add(problem.subject or "")
            problem.rank = rank
            problems.append(problem)

    for rank, tensors in enumerate(found):
        mine: dict[str, Source] = {}
        left = dict(tensors)
        for target in targets:
            there = [name for name in (target.name, *target.aliases) if name in left]
            copies = [left.pop(name) for name in there]
            problem = _problem(target, copies, found)
            if problem is not None:
                blame(problem, rank)
            else:
                mine[target.name] = copies[0]
        for name, source in left.items():
            fact = (
                f"is {dtypes.spell(source.dtype, source.shape)}, and the model has no such tensor"
            )
            blame(SurplusTensorError(fact, subject=name, file=source.file), rank)
        matched.append(mine)
    return tuple(matched)


def _problem(
    target: Target, copies: Sequence[Source], found: Sequence[Tensors]
) -> LadingError | None:
    needed = target.layout.local_shape
    if not copies:
        return MissingTensorError("no file of the rank has it", subject=target.name)
    first = next((f[target.name] for f in found if target.name in f), copies[0])
    for source in copies:
        have = dtypes.spell(source.dtype, source.shape)
        if source.shape != needed:
            want = dtypes.spell(source.dtype, needed)
            fact = f"is {have}, needs {want} (what a rank keeps of it)"
            return ShapeError(fact, subject=target.name, file=source.file)
        if source.dtype != first.dtype:
            fact = f"is {have}, needs {dtypes.spell(first.dtype, needed)} (as on another rank)"
            return DtypeError(fact, subject=target.name, file=source.file)
    return None
