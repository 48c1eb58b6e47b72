"""Digests of folders: Hugging Face's, torch's own files, pre-sharded ones; faults in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lading
from lading.checkpoint import open_checkpoint
from lading.demo import write_checkpoint
from lading.digesting import files as file_digests
from lading.digesting.files import digest_of_path, region_blocks, region_sums
from lading.digests.sums import sums_of
from lading.errors import FileError
from lading.regions import Region
from tests import oracles
from tests.digests import oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Divides by 3: 3 heads, 3 KV heads, intermediate size 96; vocabulary 101."""
    path = tmp_path_factory.mktemp("three")
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96}
    write_checkpoint(str(path), hidden_size=48, vocab_size=101, **changes)
    return path


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight heads share two KV heads."""
    path = tmp_path_factory.mktemp("eight")
    write_checkpoint(str(path), num_attention_heads=8, num_key_value_heads=2)
    return path


def test_a_folder(folder: Path) -> None:
    found = digest_of_path(folder)
    assert {name: value.hex for name, value in found.tensors.items()} == oracle.of_folder(folder)
    assert (found.kind, found.ok) == ("checkpoint", True)
    assert list(found.tensors) == list(open_checkpoint(folder).tensors)
    assert found.num_bytes == sum(
        t.nbytes for file in folder.glob("*.safetensors") for t in load_file(file).values()
    )


def test_small_blocks_and_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of_path(folder)
    monkeypatch.setattr(file_digests, "BLOCK_BYTES", 500)
    monkeypatch.setattr(file_digests, "JOB_BYTES", 3000)
    assert digest_of_path(folder).tensors == before.tensors


def test_split_into_other_files(folder: Path, tmp_path: Path) -> None:
    """The files' number, order, names and padding are no part of it; the tensors' names of the
    total only.
    """
    tensors = {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
    names = sorted(tensors)[::-1]
    index: dict[str, str] = {}
    for i in range(3):
        file = f"part-{i}.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, tmp_path / file)
        index |= dict.fromkeys(names[i::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    one, two = digest_of_path(folder), digest_of_path(tmp_path)
    assert one.differences(two) == ()
    assert one.total == two.total


def test_torch_files(folder: Path, tmp_path: Path) -> None:
    tensors = {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert digest_of_path(tmp_path).total == digest_of_path(folder).total


@given(st.data())
def test_regions_of_a_file(folder: Path, data: st.DataObject) -> None:
    checkpoint = open_checkpoint(folder)
    source = checkpoint.tensors["model.layers.0.mlp.down_proj.weight"]
    region = data.draw(oracles.regions(source.shape))
    raw = load_file(folder / source.file)[source.name].view(torch.int16).numpy()
    wanted = raw[oracles.index_of(region)]
    with checkpoint.reader() as reader:
        blocks = [array.copy() for _, array in region_blocks(reader, source, region)]
        found = region_sums(reader, source, region)
    flat = np.concatenate([np.zeros(0, np.uint16), *(block.reshape(-1) for block in blocks)])
    assert flat.tobytes() == wanted.tobytes()
    assert found == sums_of(source.dtype, source.shape, region, np.ascontiguousarray(wanted))


def test_reading_runs_and_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A narrow column cut of wide rows is read run by run, another with its gaps."""
    tensor = torch.arange(6 * 40000, dtype=torch.int32).view(6, 40000)
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    source = checkpoint.tensors["t"]
    region = Region.box((6, 40000), ((0, 6), (100, 110)))
    for seconds, num_bytes in ((0.0, 6 * 10 * 4), (1.0, (5 * 40000 + 10) * 4)):
        monkeypatch.setattr(file_digests, "SECONDS_PER_READ", seconds)
        with checkpoint.reader() as reader:
            ((_, found),) = region_blocks(reader, source, region)
            assert found.tolist() == tensor[:, 100:110].tolist()
            assert reader.bytes_read == num_bytes


@pytest.mark.parametrize("tp_size", [1, 3])
def test_pre_sharded(folder: Path, tmp_path: Path, tp_size: int) -> None:
    lading.shard(folder, tp_size=tp_size, out=tmp_path / "out", sync=False)
    found = digest_of_path(tmp_path / "out")
    assert {name: value.hex for name, value in found.tensors.items()} == oracle.of_folder(folder)
    assert (found.kind, found.ok) == ("shards", True)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_pre_sharded_with_shared_heads(eight: Path, tmp_path: Path, tp_size: int) -> None:
    lading.shard(eight, tp_size=tp_size, out=tmp_path / "out", sync=False)
    found = digest_of_path(tmp_path / "out")
    assert {name: value.hex for name, value in found.tensors.items()} == oracle.of_folder(eight)
    assert found.differences(digest_of_path(eight)) == ()


def flip(file: Path, name: str, element: int) -> None:
    """Flips the lowest bit of one bf16 element of a tensor in a file."""
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + size])[name]["data_offsets"]
    raw[8 + size + start + 2 * element] ^= 1
    file.write_bytes(raw)


def test_a_replica_that_differs(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lading.shard(folder, tp_size=3, out=out, sync=False)
    flip(out / "model-rank-00001-of-00003.safetensors", "model.norm.weight", 5)
    found = digest_of_path(out)
    assert [str(one) for one in found.replicas] == [
        "model.norm.weight: region [0:48] differs on rank 0 (model.norm.weight) and on rank 1 "
        "(model.norm.weight), needs the same bytes (both hold it)"
    ]
    assert found.recorded == ()  # the first holder's copy is the one that counts
    assert [str(one) for one in found.ranks] == [
        "model.norm.weight: rank 1 holds other bytes of region [0:48] than were sharded "
        "(model.norm.weight in model-rank-00001-of-00003.safetensors)"
    ]
    assert not found.ok


@pytest.mark.parametrize(
    ("rank", "parameter", "element", "tensor", "region"),
    [
        (5, "model.layers.1.mlp.down_proj.weight", 7, "mlp.down_proj", "[0:96, 100:120]"),
        (7, "model.layers.1.mlp.gate_up_proj.weight", 0, "mlp.gate_proj", "[140:160, 0:96]"),
        (6, "model.layers.1.self_attn.qkv_proj.weight", 0, "self_attn.q_proj", "[96:112, 0:96]"),
        (6, "model.layers.1.self_attn.qkv_proj.weight", 1600, "self_attn.k_proj", "[16:32, 0:96]"),
        (0, "model.layers.1.self_attn.qkv_proj.weight", 4000, "self_attn.v_proj", "[0:16, 0:96]"),
        (0, "model.layers.1.input_layernorm.weight", 3, "input_layernorm", "[0:96]"),
    ],
)
def test_the_rank_and_region_of_a_flipped_bit(
    rank: int, parameter: str, element: int, tensor: str, region: str, eight: Path, tmp_path: Path
) -> None:
    out, file = tmp_path / "out", f"model-rank-{rank:05}-of-00008.safetensors"
    lading.shard(eight, tp_size=8, out=out, sync=False)
    flip(out / file, parameter, element)
    found = digest_of_path(out)
    assert [str(one) for one in found.ranks] == [
        f"model.layers.1.{tensor}.weight: rank {rank} holds other bytes of region {region} than "
        f"were sharded ({parameter} in {file})"
    ]
    assert not found.ok


def test_a_manifest_without_the_ranks_digests(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lading.shard(folder, tp_size=3, out=out, sync=False)
    manifest = json.loads((out / "lading.json").read_text())
    del manifest["ranks"], manifest["came_as"]
    (out / "lading.json").write_text(json.dumps(manifest | {"version": 1}))
    assert digest_of_path(out).ok
    flip(out / "model-rank-00002-of-00003.safetensors", "model.layers.1.mlp.down_proj.weight", 7)
    found = digest_of_path(out)
    assert (found.recorded, found.ranks) == (("model.layers.1.mlp.down_proj.weight",), ())


def test_an_edited_digest_of_a_rank(folder: Path, tmp_path: Path) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj.weight"
    lading.shard(folder, tp_size=3, out=out, sync=False)
    manifest = json.loads((out / "lading.json").read_text())
    manifest["ranks"][name][1] = "0" * 64
    (out / "lading.json").write_text(json.dumps(manifest))
    (one,) = digest_of_path(out).ranks
    assert (one.tensor, one.ranks.tp_rank) == (name, 1)


def test_an_element_that_differs_from_the_manifest(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lading.shard(folder, tp_size=3, out=out, sync=False)
    flip(out / "model-rank-00002-of-00003.safetensors", "model.layers.1.mlp.down_proj.weight", 7)
    found = digest_of_path(out)
    assert found.recorded == ("model.layers.1.mlp.down_proj.weight",)
    assert [(one.ranks.tp_rank, one.regions) for one in found.ranks] == [(2, ("[0:48, 64:96]",))]
    assert not found.ok
    (one,) = found.differences(digest_of_path(folder))
    assert one.tensor == "model.layers.1.mlp.down_proj.weight"
    assert one.fact.startswith("has digests ")


def test_differences(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path, tensors in (
        (
            one,
            {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4), "same": torch.ones(2)},
        ),
        (
            two,
            {
                "b": torch.zeros(2, 2),
                "c": torch.ones(4),
                "d": torch.zeros(4),
                "same": torch.ones(2),
            },
        ),
    ):
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
    hexes = [oracle.of_folder(path)["c"] for path in (one, two)]
    found = digest_of_path(one).differences(digest_of_path(two))
    assert [str(each) for each in found] == [
        "a: is in the first only",
        "b: is fp32[4] and fp32[2, 2]",
        f"c: has digests {hexes[0]} and {hexes[1]}",
        "d: is in the second only",
    ]


def test_a_file_that_ends_early(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    checkpoint = open_checkpoint(tmp_path)
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-10])
    with pytest.raises(FileError, match="it has changed since"):
        file_digests.digest_of_checkpoint(checkpoint)
