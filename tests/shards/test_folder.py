"""Pre-sharded folders opened: faults of their files, any bytes of the original tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lading
from lading.checkpoint import open_checkpoint
from lading.errors import LadingError, PlanError, PlanFileError
from lading.preflight import preflight
from lading.ranks import Ranks, all_ranks
from lading.sharding.verbs import merge, shard
from lading.shards.folder import is_sharded, open_any, open_sharded, reading
from lading.shards.reader import flat_boxes
from tests.oracles import positions
from tests.sharding.made import made


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the same on 2 ranks."""
    base = tmp_path_factory.mktemp("sharded")
    source = made(base / "source")
    shard(source, tp_size=2, out=base / "tp2")
    return source, base / "tp2"


RANK_0 = "model-rank-00000-of-00002.safetensors"
RANK_1 = "model-rank-00001-of-00002.safetensors"


def test_what_is_pre_sharded(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, tp2 = folders
    assert (is_sharded(source), is_sharded(tp2), is_sharded(tmp_path)) == (False, True, False)


def test_the_original_checkpoint_is_seen(folders: tuple[Path, Path]) -> None:
    source, tp2 = folders
    needed, found = open_checkpoint(source), open_any(tp2)
    assert found.tensors == needed.tensors
    assert list(found.tensors) == list(needed.tensors)
    assert found.file_bytes == needed.file_bytes
    assert found.metadata == needed.metadata
    assert found.config == needed.config
    assert open_any(source) == needed


def test_any_bytes(folders: tuple[Path, Path]) -> None:
    source, tp2 = folders
    random = np.random.default_rng(3)
    with open_checkpoint(source).reader() as one, open_any(tp2).reader() as two:
        for tensor in open_checkpoint(source).tensors.values():
            for _ in range(20):
                start, stop = sorted(random.integers(0, tensor.num_bytes + 1, 2).tolist())
                needed, found = bytearray(stop - start), bytearray(stop - start)
                one.read_into(tensor, start, memoryview(needed))
                two.read_into(tensor, start, memoryview(found))
                assert found == needed, (tensor.name, start, stop)
        assert two.bytes_read > 0


@given(
    shape=st.lists(st.integers(1, 5), max_size=4).map(tuple), ends=st.tuples(*[st.floats(0, 1)] * 2)
)
def test_flat_boxes(shape: tuple[int, ...], ends: tuple[float, float]) -> None:
    total = int(np.prod(shape, dtype=np.int64))
    first, last = sorted(round(end * total) for end in ends)
    boxes = list(flat_boxes(shape, first, last))
    assert [at for box in boxes for at in positions(box)] == list(range(first, last))
    assert all(box.runs().num_runs == 1 for box in boxes)
    assert len(boxes) <= 2 * len(shape) + 1


def test_a_rank_reads_its_file_in_order(folders: tuple[Path, Path]) -> None:
    source, tp2 = folders
    for ranks in all_ranks(2):
        asked = preflight(source, [ranks]).plan
        plan, reader = reading(open_any(tp2), asked, ranks)
        reader.close()
        name = (RANK_0, RANK_1)[ranks.tp_rank]
        tensors = load_file(tp2 / name)
        assert {s.file for s in plan.sources.values()} == {name}
        assert plan.sources.keys() == tensors.keys()
        assert all(c.source_region.is_whole for c in plan.shares[0].copies)
        assert plan.shares[0].fills == ()
        offsets = [plan.sources[c.source].offset_bytes for c in plan.shares[0].copies]
        assert offsets == sorted(offsets)


def test_another_plan_reads_the_original(folders: tuple[Path, Path]) -> None:
    source, tp2 = folders
    for size in (1, 4):
        for ranks in all_ranks(size):
            asked = preflight(source, [ranks]).plan
            plan, reader = reading(open_any(tp2), asked, ranks)
            reader.close()
            assert plan is asked


# ------------------------------------------------------------------------------------------ faults


def without(folder: Path, name: str) -> None:
    """A rank file from which one tensor is gone, with the size that it had."""
    tensors = load_file(folder / RANK_1)
    raw = (folder / RANK_1).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    size = len(raw)
    tensors[f"{name}.x"] = tensors.pop(name)
    save_file(tensors, folder / RANK_1, metadata=header["__metadata__"])
    pad = size - (folder / RANK_1).stat().st_size
    if pad > 0:  # headers may have spaces
        new = (folder / RANK_1).read_bytes()
        length = int.from_bytes(new[:8], "little")
        text = new[8 : 8 + length] + b" " * pad
        (folder / RANK_1).write_bytes(len(text).to_bytes(8, "little") + text + new[8 + length :])


def renamed(folder: Path) -> None:
    raw = (folder / RANK_1).read_bytes()
    (folder / RANK_1).write_bytes(raw.replace(b'"model.norm.weight"', b'"model.norm.weighs"', 1))


def other_rank(folder: Path) -> None:
    shutil.copy(folder / RANK_0, folder / RANK_1)


def other_run(folder: Path) -> None:
    made(folder / "other", rope_theta=5.0)
    file = folder / "other" / "model-00001-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    shard(folder / "other", tp_size=2, out=folder / "others")
    shutil.copy(folder / "others" / RANK_1, folder / RANK_1)


def cut_off(folder: Path) -> None:
    with open(folder / RANK_0, "r+b") as file:
        file.truncate((folder / RANK_0).stat().st_size - 3)


def other_dtype(folder: Path) -> None:
    raw = (folder / RANK_0).read_bytes()
    old = b'"model.norm.weight":{"dtype":"BF16"'
    new = b'"model.norm.weight":{"dtype":"F16" '
    assert old in raw
    (folder / RANK_0).write_bytes(raw.replace(old, new, 1))


def no_header(folder: Path) -> None:
    raw = bytearray((folder / RANK_0).read_bytes())
    raw[10] = 0
    (folder / RANK_0).write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / RANK_1).unlink(), f"{RANK_1}: is missing, lading.json needs it"),
        (cut_off, f"{RANK_0}: is "),
        (
            renamed,
            "model.norm.weight: is not in the file, needs to be there as bf16[24] (as lading.json "
            f"says). In {RANK_1}.",
        ),
        (other_rank, f"{RANK_1}: its lading.rank is '00000', needs '00001' (as lading.json says)"),
        (other_run, f"{RANK_1}: is of another run: its lading.id is '"),
        (
            other_dtype,
            f"model.norm.weight: is fp16[24], needs bf16[24] (as lading.json says). In {RANK_0}.",
        ),
        (no_header, "header: "),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: is of type list, needs a"),
    ],
)
def test_damaged_files(
    damage: Callable[[Path], Any], text: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    damage(copy)
    for verb in (open_sharded, lambda path: merge(path, out=tmp_path / "out")):
        with pytest.raises(PlanError) as caught:
            verb(copy)
        assert any(str(problem).startswith(text) for problem in caught.value.problems), str(
            caught.value
        )
    assert not (tmp_path / "out").exists()


def test_a_damaged_manifest(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    raw = (copy / "lading.json").read_bytes()
    for cut, kind in ((len(raw) // 2, "is not JSON"), (0, "is not JSON")):
        (copy / "lading.json").write_bytes(raw[:cut])
        with pytest.raises(PlanFileError, match=kind):
            open_sharded(copy)


@pytest.mark.parametrize("seed", range(30))
def test_no_edit_of_the_manifest_is_believed(
    seed: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """A random byte of the manifest changed: refused, or it does not matter to what is merged."""
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    random = np.random.default_rng(seed)
    raw = bytearray((copy / "lading.json").read_bytes())
    raw[int(random.integers(len(raw)))] = int(random.integers(32, 127))
    (copy / "lading.json").write_bytes(raw)
    try:
        merge(copy, out=tmp_path / "out", sync=False)
    except LadingError:
        assert not (tmp_path / "out").exists()
    else:
        for file in folders[0].iterdir():
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_another_layout_in_the_manifest(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Consistent in itself, and of the same shapes at this TP size: only the rank files know."""
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    text = (copy / "lading.json").read_text()
    edited = re.sub(r'("unit":)6\b', r"\g<1>3", text)  # a head of 6 rows
    assert edited != text, "the plan says how long a head is"
    (copy / "lading.json").write_text(edited)
    with pytest.raises(
        PlanError, match=r"was cut by other layouts than those of lading\.json's plan"
    ):
        open_any(copy)


def test_padding_in_a_rank_file_is_not_believed(tmp_path: Path) -> None:
    """Vocabulary 101 on 2 ranks: the last row of rank 1 is padding, whatever its file has there."""
    source = made(tmp_path / "source", vocab_size=101)
    shard(source, tp_size=2, out=tmp_path / "tp2")
    ranks = Ranks(tp_rank=1, tp_size=2)
    needed = lading.from_pretrained(source, ranks=ranks, device="cpu")
    name = "model.embed_tokens.weight"
    rows = needed.get_parameter(name)
    assert not rows[-1].any(), "the model pads its vocabulary"
    with (tmp_path / "tp2" / RANK_1).open("r+b") as handle:
        raw = handle.read()
        length = int.from_bytes(raw[:8], "little")
        stop = json.loads(raw[8 : 8 + length])[name]["data_offsets"][1]
        handle.seek(8 + length + stop - 1)
        handle.write(b"\x40")
    found = lading.from_pretrained(tmp_path / "tp2", ranks=ranks, device="cpu")
    assert torch.equal(found.get_parameter(name), rows)
