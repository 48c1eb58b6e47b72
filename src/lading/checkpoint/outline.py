"""Which files an export writes: their names, headers and sizes, and where each tensor lies in them.

`outline_like` repeats a checkpoint: its files, with the very bytes of its headers where they can
still be read, its index, config.json and all other small files. `outline_new` makes files for
tensors that come from nowhere. Nothing is written here, and no tensor is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from lading.checkpoint.files import file_size, list_folder, read_header_bytes, read_json
from lading.checkpoint.folder import is_safetensors
from lading.checkpoint.header import encode_header
from lading.checkpoint.sources import Checkpoint, Source
from lading.dtypes import BITS, storage_bytes
from lading.errors import FileError, IndexFileError, LadingError, PlanError

__all__ = ["OutFile", "Outline", "outline_like", "outline_new"]

_INDEX = "model.safetensors.index.json"
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".onnx_data", ".ot", ".tflite"),
)
"""What holds weights in some format: not copied, as it would not follow a change of the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutFile:
    """A file of weights: its first bytes (length and header), and its size with them."""

    name: str
    head: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """What a folder will hold.

    files     of weights
    places    by tensor: dtype, shape, file and offset, all of the new files
    copied    (path of the original, name): small files, copied byte for byte
    written   small files that are made: name -> bytes
    notes     what differs from the original, in words
    """

    files: tuple[OutFile, ...]
    places: Mapping[str, Source]
    copied: tuple[tuple[str, str], ...] = ()
    written: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.num_bytes for file in self.files)


def outline_like(
    checkpoint: Checkpoint,
    *,
    heads: Mapping[str, bytes] | None = None,
    written: Mapping[str, bytes] | None = None,
) -> Outline:
    """The files of a checkpoint again.

    heads     by file: its first bytes, where they are known from elsewhere than the files
    written   small files that are known from elsewhere than the folder

    From torch files the same tensors go into safetensors files, one for each. Where the files of a
    safetensors checkpoint are gone, headers are made from what is known of them; the notes say so.
    Raises a PlanError where files are there, and are no longer what they were.
    """
    others = _others(checkpoint)
    others = replace(others, written={**others.written, **(written or {})})
    if heads is not None:
        sizes = checkpoint.file_bytes
        known = [OutFile(name=n, head=h, num_bytes=sizes[n]) for n, h in heads.items()]
        return replace(others, files=tuple(known), places=dict(checkpoint.tensors))
    if checkpoint.format == "torch":
        note = "the checkpoint has torch files; the same tensors are in safetensors files"
        return _remade(checkpoint, others, (note,), names=_torch_names(checkpoint.file_bytes))
    files: list[OutFile] = []
    problems: list[LadingError] = []
    gone = []
    for name, size in checkpoint.file_bytes.items():
        path = os.path.join(checkpoint.folder, *name.split("/"))
        if file_size(path) is None:
            gone.append(name)
            continue
        try:
            files.append(_original(checkpoint, path, name, size))
        except LadingError as error:
            problems.append(error)
    if problems:
        raise PlanError(problems, what="the source checkpoint")
    if gone:
        note = f"{', '.join(gone)} cannot be read any more, so headers were made anew"
        same = {name: name for name in checkpoint.file_bytes}
        return _remade(checkpoint, others, (note,), names=same)
    return replace(others, files=tuple(files), places=dict(checkpoint.tensors))


def outline_new(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, max_file_bytes: int
) -> Outline:
    """New files for these tensors, in their order, an index where there are several files.

    tensors          (name, dtype, shape as a header counts it)
    max_file_bytes   of the tensors in a file; one that is larger has a file of its own
    """
    groups: list[list[Source]] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        num_bytes = prod(shape) * BITS[dtype] // 8
        if groups[-1] and size + num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        size += num_bytes
        groups[-1].append(
            Source(
                name=name, dtype=dtype, shape=shape, file="", offset_bytes=0, num_bytes=num_bytes
            )
        )
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    # Wide dtypes first, so that every tensor begins at a multiple of its element's size.
    by_file = {
        name: sorted(group, key=lambda source: -storage_bytes(source.dtype))
        for name, group in zip(names, groups, strict=True)
    }
    return _made(by_file, {name: {"format": "pt"} for name in by_file})


def _original(checkpoint: Checkpoint, path: str, name: str, size: int) -> OutFile:
    head, header = read_header_bytes(path, name=name)
    found = {key: (t.dtype, t.shape, t.start, t.stop) for key, t in header.tensors.items()}
    known = {
        s.name: (s.dtype, s.shape, s.offset_bytes, s.offset_bytes + s.num_bytes)
        for s in checkpoint.tensors.values()
        if s.file == name
    }
    if found != known or header.file_bytes != size:
        raise FileError(
            "has other tensors than when the model was loaded from it",
            subject=name,
            hint="as_new=True, which takes nothing from it",
        )
    return OutFile(name=name, head=head, num_bytes=size)


def _remade(
    checkpoint: Checkpoint, others: Outline, notes: tuple[str, ...], *, names: Mapping[str, str]
) -> Outline:
    """The checkpoint's tensors in new files of the given names, each file's in their old order."""
    by_file: dict[str, list[Source]] = {names[old]: [] for old in checkpoint.file_bytes}
    for source in checkpoint.tensors.values():
        by_file[names[source.file]].append(source)
    metadata = {names[old]: found for old, found in checkpoint.metadata.items()}
    if checkpoint.format == "torch":
        metadata = {name: {"format": "pt"} for name in by_file}
    made = _made(by_file, metadata)
    has_index = any(name.endswith(".safetensors.index.json") for _, name in others.copied)
    written = {**others.written, **({} if has_index else made.written)}
    return replace(
        others,
        files=made.files,
        places={name: made.places[name] for name in checkpoint.tensors},
        written=written,
        notes=(*others.notes, *notes),
    )


def _made(
    by_file: Mapping[str, Sequence[Source]], metadata: Mapping[str, Mapping[str, str]]
) -> Outline:
    files, places = [], {}
    for name, sources in by_file.items():
        found = metadata.get(name) or None
        head = encode_header([(s.name, s.dtype, s.shape) for s in sources], found)
        at = len(head)
        for source in sources:
            places[source.name] = replace(source, file=name, offset_bytes=at)
            at += source.num_bytes
        files.append(OutFile(name=name, head=head, num_bytes=at))
    written = {}
    if len(files) > 1:
        total = sum(place.num_bytes for place in places.values())
        weight_map = {name: places[name].file for name in sorted(places)}
        written[_INDEX] = json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
    return Outline(files=tuple(files), places=places, written=written)


def json_bytes(value: object) -> bytes:
    """A small JSON file."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _torch_names(files: Iterable[str]) -> dict[str, str]:
    """pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors."""
    found = {}
    for file in files:
        head, _, leaf = file.rpartition("/")
        stem = leaf.rpartition(".")[0].removeprefix("pytorch_")
        found[file] = f"{head}/{stem}.safetensors" if head else f"{stem}.safetensors"
    return found


def _others(checkpoint: Checkpoint) -> Outline:
    """All that is no weights: an Outline with `copied`, `written` and notes only."""
    folder = checkpoint.folder
    if not os.path.isdir(folder):
        note = f"{folder} is gone, and with it the tokenizer and what else was beside the weights"
        if checkpoint.config is None:
            return Outline(files=(), places={}, notes=(note,))
        config = {"config.json": json_bytes(dict(checkpoint.config))}
        note += "; config.json is written from what was read"
        return Outline(files=(), places={}, written=config, notes=(note,))
    copied, left = [], []
    for name in list_folder(folder):
        path = os.path.join(folder, name)
        if name in checkpoint.file_bytes:
            continue
        if not os.path.isfile(path):
            left += [name] if not name.startswith(".") else []
        elif _comes_along(checkpoint, path, name):
            copied.append((path, name))
        else:
            left.append(name)
    notes = []
    if left and checkpoint.served_by is None:  # else they are what it is served from
        notes.append(f"left out: {', '.join(left)} (folders, and weights in other files)")
    if not any(name == "config.json" for _, name in copied):
        notes.append("there is no config.json")
    return Outline(files=(), places={}, copied=tuple(copied), notes=tuple(notes))


def _comes_along(checkpoint: Checkpoint, path: str, name: str) -> bool:
    if name == "lading.json":
        return False  # it describes other files
    if not name.endswith(".index.json"):
        return not name.endswith(_WEIGHTS)
    if not is_safetensors(name.removesuffix(".index.json")) or checkpoint.format == "torch":
        return False
    try:
        tree = read_json(path, name=name, error=IndexFileError)
    except LadingError:
        return False
    placed = {source.name: source.file for source in checkpoint.tensors.values()}
    return isinstance(tree, dict) and tree.get("weight_map") == placed
