"""Which files are the checkpoint: from a path, a folder's names, or an index.

Names only; no tensor and no header is looked at. The words for a folder with the stem "model":

    index     model.safetensors.index.json           says which tensor is in which file
    single    model.safetensors                      everything
    set       model-00001-of-00003.safetensors ...   used without an index when complete
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lading.checkpoint.files import file_size, list_folder
from lading.errors import FileError, IndexFileError, LadingError

__all__ = ["Entry", "find_entry", "is_safetensors", "parse_weight_map"]

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
PRE_SHARDED = "lading.json"
"""The manifest of a pre-sharded folder (`lading.manifest`), whose files are no whole tensors."""

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<total>\d{1,9})", re.ASCII)
_WANTED = (
    "needs model.safetensors.index.json, model.safetensors, a complete set of "
    "model-00001-of-0000N.safetensors, or the same of pytorch_model.bin"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where to begin: either `files`, or an `index` that will name them.

    rival   a single file beside the index; the index must name it, or nobody knows which is meant
    """

    folder: str
    files: tuple[str, ...] = ()
    index: str | None = None
    rival: str | None = None


@dataclass(slots=True)
class _Stem:
    """The files of a folder that share a stem and a suffix."""

    index: str | None = None
    single: str | None = None
    sets: dict[tuple[int, str], dict[int, str]] = field(default_factory=dict)

    def labels(self) -> list[str]:
        sets = [
            re.sub(r"-\d+-of-", "-*-of-", next(iter(files.values())))
            for files in self.sets.values()
        ]
        return [name for name in (self.index, self.single) if name is not None] + sets


def is_safetensors(file: str) -> bool:
    """By its name, as everybody tells them from torch's own."""
    return file.endswith(".safetensors")


def find_entry(path: str | os.PathLike[str]) -> Entry:
    """What a folder, a weight file or an index offers. Raises FileError where that is not clear."""
    shown = os.fspath(path)
    full = os.path.abspath(shown)
    if os.path.isdir(full):
        return _entry_of_folder(full, shown)
    folder, name = os.path.split(full)
    if file_size(full) is None:
        raise FileError("does not exist", subject=shown, hint=_hub_hint(shown))
    if name.endswith(".index.json"):
        return Entry(folder=folder, index=name)
    if name.endswith(_SUFFIXES):
        return Entry(folder=folder, files=(name,))
    fact = f"is not a checkpoint, needs a folder, an .index.json or one of {', '.join(_SUFFIXES)}"
    raise FileError(fact, subject=shown, hint=_gguf_hint([name]))


def parse_weight_map(tree: Any, index: str) -> tuple[dict[str, str], list[LadingError]]:
    """Tensor name -> file name, of those entries that can be; and what is wrong with the others.

    `metadata.total_size` is not compared: tools disagree on what it counts.
    Raises IndexFileError where the index as a whole cannot be used.
    """
    if not isinstance(tree, dict):
        raise IndexFileError(
            f"is of type {type(tree).__name__}, needs a JSON object", subject=index
        )
    if "weight_map" not in tree:
        raise IndexFileError("has no weight_map, needs tensor names -> files", subject=index)
    weight_map = tree["weight_map"]
    if not isinstance(weight_map, dict):
        fact = f"its weight_map is of type {type(weight_map).__name__}, needs a JSON object"
        raise IndexFileError(fact, subject=index)
    if not weight_map:
        raise IndexFileError("its weight_map is empty, needs tensor names -> files", subject=index)
    for name, file in weight_map.items():
        if type(file) is not str:
            fact = f"weight_map gives it a value of type {type(file).__name__}, needs a file name"
            raise IndexFileError(fact, subject=name, file=index)
    files = set(weight_map.values())
    impossible = {file: problem for file in files if (problem := _name_problem(file))}
    problems: list[LadingError] = [
        IndexFileError(f"names the file {file!r}, which {impossible[file]}", subject=index)
        for file in sorted(impossible)
    ]
    possible = weight_map
    if impossible:
        possible = {name: file for name, file in weight_map.items() if file not in impossible}
    if len({is_safetensors(file) for file in files - impossible.keys()}) == 2:
        raise IndexFileError("names safetensors files and torch files, needs one", subject=index)
    return possible, problems


def _name_problem(file: str) -> str | None:
    """Why a name from an index may not be opened, None where it may. Links are not followed here:
    the hub's cache is made of links to files elsewhere.
    """
    if "\0" in file or "\\" in file:
        return "has a NUL or a backslash"
    if posixpath.isabs(file):
        return "is absolute, needs a name within the folder"
    if ".." in file.split("/"):
        return "leaves the folder"
    if file != posixpath.normpath(file):
        return "is not in its plain form"
    if not file.endswith(_SUFFIXES):
        return f"is not one of {', '.join(_SUFFIXES)}"
    if any("\ud800" <= char <= "\udfff" for char in file):
        return "is not Unicode"
    return None


def _entry_of_folder(folder: str, shown: str) -> Entry:
    names = list_folder(folder)
    if PRE_SHARDED in names:
        fact = f"is a pre-sharded folder ({PRE_SHARDED} is there), needs the original checkpoint"
        hint = f"lading.load, which takes it, or lading merge {shown} --out DIR"
        raise FileError(fact, subject=shown, hint=hint)
    stems = _stems(names, ".safetensors")
    if "model" in stems:
        return _entry_of_stem(folder, shown, stems["model"])
    if len(stems) == 1:
        return _entry_of_stem(folder, shown, *stems.values())
    if stems:
        _fail_ambiguous(shown, [label for stem in stems.values() for label in stem.labels()])
    # Only under its standard name: other .bin files are optimizer states, arguments, tokenizers.
    stem = _stems(names, ".bin").get("pytorch_model")
    if stem is not None:
        return _entry_of_stem(folder, shown, stem)
    raise FileError(f"{_found(names)}, {_WANTED}", subject=shown, hint=_gguf_hint(names))


def _stems(names: Sequence[str], suffix: str) -> dict[str, _Stem]:
    stems: dict[str, _Stem] = {}
    for name in names:
        if name.endswith(f"{suffix}.index.json"):
            stems.setdefault(name.removesuffix(f"{suffix}.index.json"), _Stem()).index = name
        elif name.endswith(suffix):
            plain = name.removesuffix(suffix)
            match = _NUMBERED.fullmatch(plain)
            if match is None:
                stems.setdefault(plain, _Stem()).single = name
            else:
                key = (len(match["number"]), match["total"])
                sets = stems.setdefault(match["stem"], _Stem()).sets
                sets.setdefault(key, {})[int(match["number"])] = name
    return stems


def _entry_of_stem(folder: str, shown: str, stem: _Stem) -> Entry:
    if stem.index is not None:
        return Entry(folder=folder, index=stem.index, rival=stem.single)
    if len(stem.labels()) > 1:
        _fail_ambiguous(shown, stem.labels())
    if stem.single is not None:
        return Entry(folder=folder, files=(stem.single,))
    ((_, total), files) = next(iter(stem.sets.items()))
    _check_complete(stem.labels()[0], int(total), files)
    return Entry(folder=folder, files=tuple(files[number] for number in sorted(files)))


def _check_complete(label: str, total: int, files: dict[int, str]) -> None:
    # Some tools count from 0. A range is not made from `total`, which may be any number.
    first = 0 if 0 in files else 1
    missing = (number for number in range(first, first + total) if number not in files)
    shown = list(islice(missing, 10))
    num_missing = total - sum(first <= number < first + total for number in files)
    if num_missing or len(files) != total:
        more = f" and {num_missing - len(shown)} more" if num_missing > len(shown) else ""
        raise FileError(
            f"{len(files)} of {total} files are there, number {', '.join(map(str, shown))}{more} "
            "is missing (without an index, a set must be complete)",
            subject=label,
            hint="fetch the missing files",
        )


def _fail_ambiguous(shown: str, labels: list[str]) -> None:
    raise FileError(
        f"has {_listed(labels)}; needs one of them (nothing says which is meant)",
        subject=shown,
        hint="remove the others, or give the path of the file or index that is meant",
    )


def _found(names: Sequence[str]) -> str:
    return f"has only {_listed(names)}" if names else "is empty"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _hub_hint(shown: str) -> str | None:
    """A path like "org/model" is most often meant as a name on the hub."""
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", shown) is None:
        return None
    if shown.lower().endswith((*_SUFFIXES, ".gguf", ".json")):
        return None
    if os.path.isdir(shown.partition("/")[0]):
        return None
    return f"hf download {shown}, and give the folder that it prints"


def _gguf_hint(names: Sequence[str]) -> str | None:
    if any(name.endswith(".gguf") for name in names):
        return "lading dequantize, which reads GGUF files"
    return None
