"""Files that repeat a checkpoint's, and new ones; safetensors is the oracle of what is readable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lading.checkpoint import Outline, open_checkpoint, outline_like, outline_new
from lading.errors import PlanError

from .files_made import raw_file


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(15.0).reshape(3, 5),
        "b.scale": torch.arange(3, dtype=torch.int8),
        "c.weight": torch.arange(7.0).to(torch.bfloat16),
        "d": torch.tensor(2.0),
    }


def made(folder: Path, *, index: bool = True) -> Path:
    folder.mkdir()
    items = list(tensors().items())
    weight_map: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        group = dict(items[number - 1 :: 2])
        save_file(group, folder / file, metadata={"format": "pt", "by": str(number)})
        weight_map |= dict.fromkeys(group, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"model_type": "x"}')
    return folder


def written(outline: Outline, folder: Path, values: Mapping[str, torch.Tensor]) -> Path:
    """What a writer makes of an outline."""
    folder.mkdir()
    for file in outline.files:
        data = bytearray(file.num_bytes)
        data[: len(file.head)] = file.head
        for name, place in outline.places.items():
            if place.file == file.name:
                raw = values[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                assert len(raw) == place.num_bytes
                data[place.offset_bytes : place.offset_bytes + len(raw)] = raw
        (folder / file.name).write_bytes(data)
    for path, name in outline.copied:
        shutil.copyfile(path, folder / name)
    for name, text in outline.written.items():
        (folder / name).write_bytes(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def assert_holds(folder: Path, values: Mapping[str, torch.Tensor]) -> None:
    found = loaded(folder)
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("index", [True, False])
def test_the_same_bytes(index: bool, tmp_path: Path) -> None:
    folder = made(tmp_path / "in", index=index)
    outline = outline_like(open_checkpoint(folder))
    assert contents(written(outline, tmp_path / "out", tensors())) == contents(folder)
    assert outline.num_bytes == sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert outline.notes == ()


def test_headers_of_any_writer_are_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    header = (
        '{ "z" : {"shape":[2],"dtype":"U8","data_offsets":[1,3]}, "__metadata__":{},\n'
        '"a":{"data_offsets":[0,1],"dtype":"U8","shape":[1]}}   '
    )
    data = raw_file(None, b"\1\2\3", raw=header.encode())
    (folder / "model.safetensors").write_bytes(data)
    values = {"a": torch.tensor([1], dtype=torch.uint8)}
    values["z"] = torch.tensor([2, 3], dtype=torch.uint8)
    outline = outline_like(open_checkpoint(folder))
    assert contents(written(outline, tmp_path / "out", values)) == contents(folder)


def test_what_comes_along_and_what_does_not(tmp_path: Path) -> None:
    folder = made(tmp_path / "in")
    along = {".gitattributes", "README.md", "tokenizer.json", "modeling.py", "merges.txt"}
    left = {"pytorch_model.bin", "x.gguf", "consolidated.00.pth", "tf_model.h5"}
    left |= {"pytorch_model.bin.index.json", "other.safetensors.index.json"}
    for name in along | left:
        (folder / name).write_text("{}")
    (folder / "original").mkdir()
    (folder / ".cache").mkdir()
    outline = outline_like(open_checkpoint(folder))
    assert {name for _, name in outline.copied} == along | {
        "config.json",
        "model.safetensors.index.json",
    }
    (note,) = outline.notes
    assert note.startswith("left out: ")
    assert all(name in note for name in (*left, "original"))
    assert ".cache" not in note


def test_files_that_are_gone(tmp_path: Path) -> None:
    folder = made(tmp_path / "in")
    checkpoint = open_checkpoint(folder)
    before = checkpoint.metadata
    shutil.rmtree(folder)
    outline = outline_like(checkpoint)
    out = written(outline, tmp_path / "out", tensors())
    assert_holds(out, tensors())
    again = open_checkpoint(out)
    assert again.metadata == before
    assert again.config == {"model_type": "x"}
    assert len(outline.notes) == 2


def test_one_file_that_has_changed(tmp_path: Path) -> None:
    folder = made(tmp_path / "in")
    checkpoint = open_checkpoint(folder)
    file = folder / "model-00001-of-00002.safetensors"
    save_file({"a.weight": torch.zeros(3, 4)}, file)
    with pytest.raises(PlanError) as error:
        outline_like(checkpoint)
    assert str(error.value) == (
        "model-00001-of-00002.safetensors: has other tensors than when the model was loaded from "
        "it. Try: as_new=True, which takes nothing from it."
    )


def test_heads_that_are_known(tmp_path: Path) -> None:
    folder = made(tmp_path / "in")
    checkpoint = open_checkpoint(folder)
    heads = {file.name: file.head for file in outline_like(checkpoint).files}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    outline = outline_like(checkpoint, heads=heads, written={"model.safetensors.index.json": b"x"})
    assert {file.name: file.head for file in outline.files} == heads
    assert outline.written == {"model.safetensors.index.json": b"x"}
    assert outline.places == checkpoint.tensors


def test_new_files(tmp_path: Path) -> None:
    rows = [("a.weight", "F32", (3, 5)), ("b.scale", "I8", (3,)), ("c.weight", "BF16", (7,))]
    rows.append(("d", "F32", ()))
    one = outline_new(rows, max_file_bytes=10**6)
    assert [file.name for file in one.files] == ["model.safetensors"]
    assert one.written == {}
    assert_holds(written(one, tmp_path / "one", tensors()), tensors())
    # Whatever the order, each tensor begins at a multiple of its element's size.
    sizes = {"F32": 4, "BF16": 2, "I8": 1}
    assert all(p.offset_bytes % sizes[p.dtype] == 0 for p in one.places.values())
    two = outline_new(rows, max_file_bytes=63)
    out = written(two, tmp_path / "two", tensors())
    assert [file.name for file in two.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert_holds(out, tensors())
    checkpoint = open_checkpoint(out)
    assert checkpoint.tensors.keys() == tensors().keys()
    assert checkpoint.tensors["b.scale"].file == "model-00001-of-00002.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 60 + 3 + 14 + 4}


def test_a_tensor_larger_than_a_file_may_be() -> None:
    outline = outline_new(
        [("a", "U8", (10,)), ("b", "U8", (100,)), ("c", "U8", (1,))], max_file_bytes=20
    )
    assert [place.file[6:11] for place in outline.places.values()] == ["00001", "00002", "00003"]
