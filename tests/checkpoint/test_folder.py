"""Which files of a folder are the checkpoint, by their names alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from lading.checkpoint.folder import Entry, find_entry, parse_weight_map
from lading.errors import FileError, IndexFileError

NEEDS = (
    "needs model.safetensors.index.json, model.safetensors, a complete set of "
    "model-00001-of-0000N.safetensors, or the same of pytorch_model.bin"
)
REMOVE = "Try: remove the others, or give the path of the file or index that is meant."


@dataclass(frozen=True)
class Expect:
    id: str
    names: tuple[str, ...]
    files: tuple[str, ...] = ()
    index: str | None = None
    rival: str | None = None


@dataclass(frozen=True)
class Fails:
    id: str
    names: tuple[str, ...]
    message: str


SET = tuple(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
INDEX = "model.safetensors.index.json"

FOUND = [
    Expect("single", ("model.safetensors", "config.json"), ("model.safetensors",)),
    Expect("index", (INDEX, *SET), index=INDEX),
    Expect(
        "index and single", (INDEX, "model.safetensors"), index=INDEX, rival="model.safetensors"
    ),
    Expect("set", SET, SET),
    Expect(
        "set from 0",
        ("m-0-of-2.safetensors", "m-1-of-2.safetensors"),
        ("m-0-of-2.safetensors", "m-1-of-2.safetensors"),
    ),
    Expect(
        "set of ten",
        tuple(f"m-{n}-of-10.safetensors" for n in range(10)),
        tuple(f"m-{n}-of-10.safetensors" for n in range(10)),
    ),
    Expect("another name", ("adapter_model.safetensors", "a.bin"), ("adapter_model.safetensors",)),
    Expect(
        "standard name first",
        ("adapter_model.safetensors", "consolidated.safetensors", "model.safetensors"),
        ("model.safetensors",),
    ),
    Expect(
        "another index",
        ("unet.safetensors.index.json", "unet-1-of-1.safetensors"),
        index="unet.safetensors.index.json",
    ),
    Expect(
        "safetensors before torch",
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors",),
    ),
    Expect("torch", ("pytorch_model.bin", "training_args.bin"), ("pytorch_model.bin",)),
    Expect("torch index", ("pytorch_model.bin.index.json",), index="pytorch_model.bin.index.json"),
]

FAILS = [
    Fails("empty", (), f"F: is empty, {NEEDS}."),
    Fails(
        "others only",
        ("a.gguf", "training_args.bin"),
        f"F: has only a.gguf, training_args.bin, {NEEDS}. "
        "Try: lading dequantize, which reads GGUF files.",
    ),
    Fails(
        "many others",
        tuple(f"{n:02}" for n in range(12)),
        f"F: has only 00, 01, 02, 03, 04, 05, 06, 07, 08, 09 and 2 more, {NEEDS}.",
    ),
    Fails(
        "two names",
        ("a.safetensors", "b-1-of-2.safetensors", "b-2-of-2.safetensors"),
        "F: has a.safetensors, b-*-of-2.safetensors; needs one of them (nothing says which is "
        f"meant). {REMOVE}",
    ),
    Fails(
        "single and set",
        ("model.safetensors", *SET),
        "F: has model.safetensors, model-*-of-00003.safetensors; needs one of them (nothing says "
        f"which is meant). {REMOVE}",
    ),
    Fails(
        "two sets",
        (*SET, "model-00001-of-00001.safetensors"),
        "F: has model-*-of-00001.safetensors, model-*-of-00003.safetensors; needs one of them "
        f"(nothing says which is meant). {REMOVE}",
    ),
    Fails(
        "incomplete set",
        SET[1:],
        "model-*-of-00003.safetensors: 2 of 3 files are there, number 1 is missing (without an "
        "index, a set must be complete). Try: fetch the missing files.",
    ),
    Fails(
        "a set of a billion",
        ("model-00002-of-999999999.safetensors",),
        "model-*-of-999999999.safetensors: 1 of 999999999 files are there, number 1, 3, 4, 5, 6, "
        "7, 8, 9, 10, 11 and 999999988 more is missing (without an index, a set must be complete). "
        "Try: fetch the missing files.",
    ),
]


@pytest.mark.parametrize("case", FOUND, ids=lambda case: case.id)
def test_found(case: Expect, tmp_path: Path) -> None:
    for name in case.names:
        (tmp_path / name).touch()
    assert find_entry(tmp_path) == Entry(
        folder=str(tmp_path), files=case.files, index=case.index, rival=case.rival
    )


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_not_found(case: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "F").mkdir()
    for name in case.names:
        (tmp_path / "F" / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError) as caught:
        find_entry("F")
    assert str(caught.value) == case.message


def test_paths_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b-1-of-2.safetensors", "x.index.json", "x.bin", "x.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    folder = os.getcwd()
    assert find_entry("x.bin") == Entry(folder=folder, files=("x.bin",))
    assert find_entry(Path("b-1-of-2.safetensors")).files == ("b-1-of-2.safetensors",)
    assert find_entry("./x.index.json") == Entry(folder=folder, index="x.index.json")
    with pytest.raises(FileError) as caught:
        find_entry("x.txt")
    assert str(caught.value) == (
        "x.txt: is not a checkpoint, needs a folder, an .index.json or one of .safetensors, .bin, "
        ".pt, .pth."
    )


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("org/Model-7B", " Try: hf download org/Model-7B, and give the folder that it prints."),
        ("./org/model", ""),
        ("here/model", ""),
        ("org/model.gguf", ""),
        ("org/model/x", ""),
        ("/nowhere/at/all", ""),
        ("x.safetensors", ""),
        ("a\0b", ""),
    ],
)
def test_a_path_to_nothing(
    path: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(FileError) as caught:
        find_entry(path)
    assert str(caught.value) == f"{path}: does not exist.{hint}"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "i.json: is of type list, needs a JSON object."),
        ({}, "i.json: has no weight_map, needs tensor names -> files."),
        ({"weight_map": []}, "i.json: its weight_map is of type list, needs a JSON object."),
        ({"weight_map": {}}, "i.json: its weight_map is empty, needs tensor names -> files."),
        (
            {"weight_map": {"a": 1}},
            "a: weight_map gives it a value of type int, needs a file name. In i.json.",
        ),
        (
            {"weight_map": {"a": "a.safetensors", "b": "b.bin"}},
            "i.json: names safetensors files and torch files, needs one.",
        ),
    ],
)
def test_an_index_that_is_none(tree: object, message: str) -> None:
    with pytest.raises(IndexFileError) as caught:
        parse_weight_map(tree, "i.json")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("/etc/x.bin", "is absolute, needs a name within the folder"),
        ("../x.safetensors", "leaves the folder"),
        ("a/../../x.safetensors", "leaves the folder"),
        ("a/../x.safetensors", "leaves the folder"),
        ("./x.safetensors", "is not in its plain form"),
        ("a//x.safetensors", "is not in its plain form"),
        ("a\\x.safetensors", "has a NUL or a backslash"),
        ("x\0.safetensors", "has a NUL or a backslash"),
        ("\ud800.safetensors", "is not Unicode"),
        ("", "is not in its plain form"),
        ("x.py", "is not one of .safetensors, .bin, .pt, .pth"),
    ],
)
def test_file_names_that_are_not_opened(file: str, why: str) -> None:
    weight_map = {"a": file, "b": "sub/good.safetensors"}
    possible, problems = parse_weight_map({"weight_map": weight_map}, "i.json")
    assert possible == {"b": "sub/good.safetensors"}
    assert [str(problem) for problem in problems] == [
        f"i.json: names the file {file!r}, which {why}."
    ]
