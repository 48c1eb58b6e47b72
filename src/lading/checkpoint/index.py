"""`open_checkpoint`: from a path to a `Checkpoint`, with every file's header read and compared.

Headers, the index and config.json are read, never a tensor. Everything that is wrong with the files
is found before anything is raised.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lading.checkpoint.files import Stamp, file_size, read_entries, read_json
from lading.checkpoint.folder import Entry, find_entry, is_safetensors, parse_weight_map
from lading.checkpoint.sources import Checkpoint, Source, sources_in
from lading.collecting import uncollected
from lading.errors import (
    CheckpointError,
    ConfigError,
    FileError,
    IndexFileError,
    LadingError,
    PlanError,
)

__all__ = ["open_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What one file holds."""

    sources: Mapping[str, Source]
    file_bytes: int
    metadata: Mapping[str, str]
    stamp: Stamp | None = None


@uncollected()
def open_checkpoint(path: str | os.PathLike[str], *, with_config: bool = True) -> Checkpoint:
    """The checkpoint at a folder, a weight file (.safetensors, .bin) or an .index.json.

    In a folder: model.safetensors.index.json, or model.safetensors, or a complete set of
    model-00001-of-0000N.safetensors; else the only other .safetensors checkpoint there; else the
    same of pytorch_model.bin.

    with_config   False = config.json is not opened, and counts as missing

    Raises
        FileError   there is no checkpoint, or nothing says which of several is meant
        PlanError   every problem of the files: headers that lie, files that are missing, tensors
                    that are not where the index places them, a config.json that is not an object

    Example: a folder with an index and four files -> tensors in the order of the files and of the
    bytes in each, `tensors["model.norm.weight"]` = Source(dtype="BF16", shape=(4096,), ...).
    """
    entry = find_entry(path)
    problems: list[LadingError] = []
    files: Sequence[str] = entry.files
    weight_map: dict[str, str] | None = None
    if entry.index is not None:
        weight_map = _read_index(entry, entry.index, problems)
        files = sorted(set(weight_map.values()))
    contents = _read_files(entry.folder, files, weight_map, entry.index, problems)
    tensors = _merge(contents, problems)
    if weight_map is not None:
        _compare(weight_map, contents, tensors, problems)
    config = _read_config(entry.folder, problems) if with_config else None
    if problems:
        raise PlanError(problems, what="the checkpoint")
    return Checkpoint(
        folder=entry.folder,
        tensors=tensors,
        file_bytes={file: found.file_bytes for file, found in contents.items()},
        metadata={file: found.metadata for file, found in contents.items()},
        stamps={file: found.stamp for file, found in contents.items() if found.stamp is not None},
        config=config,
        format="safetensors" if all(map(is_safetensors, files)) else "torch",
    )


def _read_index(entry: Entry, index: str, problems: list[LadingError]) -> dict[str, str]:
    path = os.path.join(entry.folder, index)
    try:
        tree = read_json(path, name=index, error=IndexFileError)
        weight_map, found = parse_weight_map(tree, index)
    except CheckpointError as error:
        problems.append(error)
        return {}
    problems += found
    if entry.rival is not None and entry.rival not in weight_map.values():
        problems.append(
            FileError(
                f"is there beside {index}, which does not name it; needs one of them (nothing says "
                "which is meant)",
                subject=entry.rival,
                hint=f"remove {entry.rival} or {index}, or give the path of the one that is meant",
            )
        )
    return weight_map


def _read_files(
    folder: str,
    files: Sequence[str],
    weight_map: Mapping[str, str] | None,
    index: str | None,
    problems: list[LadingError],
) -> dict[str, _Contents]:
    """By file, in order, those that could be read."""
    placed = Counter(weight_map.values()) if weight_map is not None else {}
    contents: dict[str, _Contents] = {}
    for file in files:
        try:
            if file in placed and file_size(os.path.join(folder, file)) is None:
                raise _missing(file, placed[file], index)
            contents[file] = _read_file(folder, file, problems)
        except CheckpointError as error:
            problems.append(error)
    return contents


def _missing(file: str, count: int, index: str | None) -> FileError:
    tensors = f"{count} tensor{'s' if count != 1 else ''}"
    fact = f"is missing, the index places {tensors} in it"
    return FileError(fact, subject=file, file=index, hint="fetch that file")


def _read_file(folder: str, file: str, problems: list[LadingError]) -> _Contents:
    if not is_safetensors(file):
        from lading.checkpoint.torch_files import torch_sources

        found, size, bad = torch_sources(folder, file)
        problems += bad
        return _Contents(sources={s.name: s for s in found}, file_bytes=size, metadata={})
    (rows, metadata), size, stamp = read_entries(os.path.join(folder, file), name=file)
    sources = sources_in(rows, file)
    return _Contents(sources=sources, file_bytes=size, metadata=metadata, stamp=stamp)


def _merge(contents: Mapping[str, _Contents], problems: list[LadingError]) -> dict[str, Source]:
    tensors: dict[str, Source] = {}
    for file, found in contents.items():
        if tensors.keys().isdisjoint(found.sources):
            tensors.update(found.sources)
            continue
        for name, source in found.sources.items():
            other = tensors.setdefault(name, source)
            if other is not source:
                fact = f"is in {other.file} and in {file}, needs to be in one file"
                problems.append(CheckpointError(fact, subject=name))
    return tensors


def _compare(
    weight_map: Mapping[str, str],
    contents: Mapping[str, _Contents],
    tensors: Mapping[str, Source],
    problems: list[LadingError],
) -> None:
    """The index against the headers, both ways. A file that could not be read is a problem already,
    and so are the tensors that it should hold.
    """
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is not None and found.file == file:
            continue
        if file in contents and name not in contents[file].sources:
            there = f"it is in {tensors[name].file}" if name in tensors else "it is not there"
            problems.append(IndexFileError(f"the index places it in {file}, {there}", subject=name))
    for name, source in tensors.items():
        if name not in weight_map:
            fact = "is in the file, the index does not name it"
            problems.append(IndexFileError(fact, subject=name, file=source.file))


def _read_config(folder: str, problems: list[LadingError]) -> Mapping[str, Any] | None:
    path = os.path.join(folder, "config.json")
    if file_size(path) is None:
        return None
    try:
        config = read_json(path, name="config.json")
    except LadingError as error:
        problems.append(error)
        return None
    if not isinstance(config, dict):
        fact = f"is of type {type(config).__name__}, needs a JSON object"
        problems.append(ConfigError(fact, subject="config.json"))
        return None
    return config
