"""open_checkpoint on whole folders."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lading.checkpoint
from lading.checkpoint import Checkpoint, Source, open_checkpoint
from lading.errors import ConfigError, FileError, HeaderError, IndexFileError, PlanError

from .files_made import write_index, write_tensors

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def problems_of(path: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(path)
    assert caught.value.what == "the checkpoint"
    return [str(problem) for problem in caught.value.problems]


def two_files(folder: Path) -> None:
    write_tensors(folder / ONE, [("a", "BF16", (2, 3)), ("b", "F4", (2, 4))], {"format": "pt"})
    write_tensors(folder / TWO, [("c", "I64", ())])
    write_index(folder, {"c": TWO, "b": ONE, "a": ONE})


def test_an_indexed_checkpoint(tmp_path: Path) -> None:
    two_files(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    checkpoint = open_checkpoint(tmp_path)
    start = checkpoint.tensors["a"].offset_bytes
    assert list(checkpoint.tensors.values()) == [
        Source(name="a", dtype="BF16", shape=(2, 3), file=ONE, offset_bytes=start, num_bytes=12),
        Source(name="b", dtype="F4", shape=(2, 4), file=ONE, offset_bytes=start + 12, num_bytes=4),
        Source(
            name="c",
            dtype="I64",
            shape=(),
            file=TWO,
            offset_bytes=checkpoint.tensors["c"].offset_bytes,
            num_bytes=8,
        ),
    ]
    assert checkpoint.tensors["b"].storage_shape == (2, 2)
    assert checkpoint.folder == str(tmp_path)
    assert checkpoint.file_bytes == {f: (tmp_path / f).stat().st_size for f in (ONE, TWO)}
    assert checkpoint.metadata == {ONE: {"format": "pt"}, TWO: {}}
    assert checkpoint.config == {"hidden_size": 3}
    assert checkpoint.format == "safetensors"
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint
    assert open_checkpoint(tmp_path / INDEX) == checkpoint
    (tmp_path / INDEX).unlink()
    assert open_checkpoint(tmp_path) == checkpoint


def test_the_bytes_of_every_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3).bfloat16(), "c": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "model.safetensors"))
    assert checkpoint.config is None
    with checkpoint.reader() as reader:
        for name, tensor in tensors.items():
            buffer = bytearray(tensor.nbytes)
            reader.read_into(checkpoint.tensors[name], 0, memoryview(buffer))
            assert list(buffer) == tensor.reshape(-1).view(torch.uint8).tolist()
        row = torch.empty(7)
        view = memoryview(bytearray(28))
        reader.read_into(checkpoint.tensors["a"], 28, view)
        row = torch.frombuffer(view, dtype=torch.float32)
        assert torch.equal(row, tensors["a"][1])
        assert reader.bytes_read == sum(t.nbytes for t in tensors.values()) + 28
        with pytest.raises(AssertionError, match=r"bytes \[0, 7\) of b were asked for, it has 6"):
            reader.read_into(checkpoint.tensors["b"], 0, memoryview(bytearray(7)))


def test_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_tensors(blobs / "abcdef", [("a", "U8", (2,))])
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcdef")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.tensors["a"].file == "model.safetensors"
    with checkpoint.reader() as reader:
        reader.read_into(checkpoint.tensors["a"], 0, memoryview(bytearray(2)))
    link = open_checkpoint(snapshot / "model.safetensors")
    assert link == checkpoint


def test_files_in_a_folder_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_tensors(tmp_path / "sub" / "x.safetensors", [("a", "U8", (2,))])
    write_index(tmp_path, {"a": "sub/x.safetensors"})
    assert open_checkpoint(tmp_path).tensors["a"].file == "sub/x.safetensors"


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    two_files(tmp_path)
    write_tensors(tmp_path / "model.safetensors", [("a", "U8", (2,))])
    assert problems_of(tmp_path) == [
        "model.safetensors: is there beside model.safetensors.index.json, which does not name it; "
        "needs one of them (nothing says which is meant). Try: remove model.safetensors or "
        "model.safetensors.index.json, or give the path of the one that is meant."
    ]
    write_index(tmp_path, {"a": "model.safetensors"})
    assert open_checkpoint(tmp_path).tensors["a"].file == "model.safetensors"


def test_every_problem_at_once(tmp_path: Path) -> None:
    names = [f"{n}.safetensors" for n in range(5)]
    write_tensors(
        tmp_path / names[0], [("a", "U8", (1,)), ("extra", "U8", (1,)), ("x", "U8", (1,))]
    )
    (tmp_path / names[1]).write_bytes(bytes(8))
    write_tensors(tmp_path / names[3], [("a", "U8", (1,))])
    (tmp_path / names[4]).symlink_to("nothing")
    write_index(
        tmp_path,
        {
            "a": names[0],
            "b": names[1],
            "c": names[2],
            "d": names[2],
            "e": names[3],
            "f": names[4],
            "x": names[3],
            "g": "../g.safetensors",
        },
    )
    (tmp_path / "config.json").write_text("[]")
    assert problems_of(tmp_path) == [
        f"{INDEX}: names the file '../g.safetensors', which leaves the folder.",
        "header: its length is 0 bytes, needs at least 2 (an empty header is {}). "
        "In 1.safetensors. Try: copy or download the file again.",
        f"2.safetensors: is missing, the index places 2 tensors in it. In {INDEX}. "
        "Try: fetch that file.",
        f"4.safetensors: is missing, the index places 1 tensor in it. In {INDEX}. "
        "Try: fetch that file.",
        "a: is in 0.safetensors and in 3.safetensors, needs to be in one file.",
        "e: the index places it in 3.safetensors, it is not there.",
        "x: the index places it in 3.safetensors, it is in 0.safetensors.",
        "extra: is in the file, the index does not name it. In 0.safetensors.",
        "config.json: is of type list, needs a JSON object.",
    ]
    with pytest.raises(PlanError) as caught:
        open_checkpoint(tmp_path)
    kinds = {type(problem) for problem in caught.value.problems}
    assert kinds >= {IndexFileError, HeaderError, FileError, ConfigError}


def test_one_problem_is_its_own_message(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(PlanError) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value) == f"{INDEX}: has no weight_map, needs tensor names -> files."


@pytest.mark.parametrize(
    "raw", ["{", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}']
)
def test_a_damaged_index(raw: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(raw)
    (message,) = problems_of(tmp_path)
    assert message.startswith(f"{INDEX}: is not")


def test_a_damaged_config(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", [])
    (tmp_path / "config.json").write_text("{'a': 1}")
    (message,) = problems_of(tmp_path)
    assert message.startswith("config.json: is not JSON (")


def test_the_same_tensor_in_two_files_without_an_index(tmp_path: Path) -> None:
    write_tensors(tmp_path / ONE, [("a", "U8", (1,))])
    write_tensors(tmp_path / TWO, [("a", "U8", (1,))])
    assert problems_of(tmp_path) == [f"a: is in {ONE} and in {TWO}, needs to be in one file."]


def test_a_checkpoint_of_100_000_tensors_opens_in_seconds(tmp_path: Path) -> None:
    weight_map: dict[str, str] = {}
    for number in range(100):
        file = f"model-{number:05}.safetensors"
        names = [f"model.layers.{number}.mlp.experts.{i}.up_proj.weight" for i in range(1000)]
        write_tensors(tmp_path / file, [(name, "BF16", (2048, 7168)) for name in names])
        weight_map |= dict.fromkeys(names, file)
    write_index(tmp_path, weight_map)
    start = time.perf_counter()
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.tensors) == 100_000
    assert time.perf_counter() - start < 15  # about 1 s measured; the rest is for busy machines


def test_safetensors_need_no_torch(tmp_path: Path) -> None:
    two_files(tmp_path)
    code = (
        "import sys; from lading.checkpoint import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "with checkpoint.reader() as reader:\n"
        "    reader.read_into(checkpoint.tensors['a'], 0, memoryview(bytearray(12)))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_public_names() -> None:
    for name in lading.checkpoint.__all__:
        assert name in vars(lading.checkpoint)
    assert lading.checkpoint.__all__ == sorted(lading.checkpoint.__all__)
    assert Checkpoint.__module__ == "lading.checkpoint.sources"


def test_values_are_json(tmp_path: Path) -> None:
    two_files(tmp_path)
    os.truncate(tmp_path / TWO, 10)
    with pytest.raises(PlanError) as caught:
        open_checkpoint(tmp_path)
    assert json.loads(json.dumps(caught.value.to_dict()))["problems"][0]["file"] == TWO
