"""The verb `dequantize`: the file, against what third parties decoded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lading
from lading.demo import write_checkpoint
from lading.errors import CallError, FileError
from lading.launch import run_ranks
from lading.ranks import Ranks, all_ranks

from .end_to_end.checkpoints import checkpoint

FIXTURES = Path(
    os.environ.get(
        "LADING_FIXTURES", Path(__file__).resolve().parents[1] / ".." / "shared" / "fixtures"
    )
)


def fixture(name: str) -> Path:
    path = FIXTURES / name
    if not path.is_dir():
        pytest.skip(f"no fixture {name}: set LADING_FIXTURES")
    return path


def dequantized(ranks: Ranks, folder: str, out: str, dense: bool) -> int:
    return lading.dequantize(folder, out, ranks=ranks, device="cpu", dense=dense)


@pytest.mark.parametrize(
    ("name", "tp_size"),
    [
        ("gptq-phi3-w4-g64", 2),
        ("fp8-block128", 2),
        ("ct-w4a16-g64-sym", 2),
        ("ct-w4a16-g64-sym", 1),
    ],
)
def test_the_references(name: str, tp_size: int, tmp_path: Path) -> None:
    folder, out = fixture(name), tmp_path / "out.safetensors"
    reference = load_file(folder / "dequant_reference.safetensors")
    counts = run_ranks(dequantized, tp_size, [str(folder), str(out), False])
    found = load_file(out)
    assert counts == [len(found)] * tp_size
    assert set(found) == set(reference)
    for key, weight in found.items():
        assert weight.dtype is torch.float32
        assert torch.equal(weight.to(reference[key].dtype), reference[key]), key
    assert os.listdir(tmp_path) == ["out.safetensors"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(str(path))
    return path


@pytest.mark.parametrize("tp_size", [1, 2])
def test_all_layers_of_a_dense_checkpoint(tp_size: int, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run_ranks(dequantized, tp_size, [str(dense), str(out), True])
    full: dict[str, torch.Tensor] = {}
    for file in dense.glob("*.safetensors"):
        full.update(load_file(file))
    matrices = {name: t.float() for name, t in full.items() if t.dim() == 2}
    found = load_file(out)
    assert set(found) == set(matrices)
    assert all(torch.equal(t, matrices[name]) for name, t in found.items())


def test_layers_that_are_fused_on_disk_stay_so(tmp_path: Path) -> None:
    folder, out = checkpoint("phi3"), tmp_path / "out.safetensors"
    run_ranks(dequantized, 2, [str(folder), str(out), True])
    full = load_file(folder / "model.safetensors")
    found = load_file(out)
    assert set(found) == {name for name, t in full.items() if t.dim() == 2}
    assert all(torch.equal(t, full[name]) for name, t in found.items())


def test_a_tied_head_is_written_once(dense: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((dense / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    full: dict[str, torch.Tensor] = {}
    for file in dense.glob("*.safetensors"):
        full.update(load_file(file))
    del full["lm_head.weight"]
    save_file(full, tmp_path / "model.safetensors")
    lading.dequantize(tmp_path, tmp_path / "out.safetensors", device="cpu", dense=True)
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == {name for name, t in full.items() if t.dim() == 2}


def test_nothing_to_decode(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CallError) as caught:
        lading.dequantize(dense, tmp_path / "out.safetensors", device="cpu")
    assert str(caught.value) == (
        f"{dense}: has no quantised layer, needs one (its weights are stored as they are). "
        "Try: dense=True (--all): the weights as they are, in float32."
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ranks", all_ranks(2), ids=str)
def test_a_rank_alone(ranks: Ranks, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(CallError) as caught:
        dequantized(ranks, str(dense), str(tmp_path / "out.safetensors"), True)
    assert str(caught.value) == (
        f"dequantize: is called as {ranks} by a process that is in no group of that size, needs "
        "all ranks (each writes its own share of the file). "
        "Try: lading dequantize --tp, or torchrun."
    )
    assert os.listdir(tmp_path) == []


def broken(ranks: Ranks, folder: str, out: str) -> int:
    """Rank 1's disk is full."""
    from lading.checkpoint import FileWriter

    def write(self: FileWriter, offset: int, data: Any) -> None:
        raise FileError("cannot be written: No space left on device", subject="out")

    if ranks.tp_rank == 1:
        FileWriter.write = write  # type: ignore[method-assign]
    return lading.dequantize(folder, out, ranks=ranks, device="cpu", dense=True)


def test_a_failure_leaves_no_file(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        run_ranks(broken, 2, [str(dense), str(tmp_path / "out.safetensors")])
    assert str(caught.value) == "out: cannot be written: No space left on device. On rank 1."
    assert os.listdir(tmp_path) == []


def test_a_file_that_cannot_be_made(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "missing" / "out.safetensors"
    with pytest.raises(FileError) as caught:
        lading.dequantize(dense, out, device="cpu", dense=True)
    assert f"cannot be written: there is no folder {out.parent}" in str(caught.value)


def test_the_checkpoint_is_not_overwritten(dense: Path) -> None:
    before = {path.name: path.read_bytes() for path in dense.iterdir()}
    out = next(path for path in dense.iterdir() if path.suffix == ".safetensors")
    with pytest.raises(FileError, match="is one of the checkpoint's own files"):
        lading.dequantize(dense, out, device="cpu", dense=True)
    assert {path.name: path.read_bytes() for path in dense.iterdir()} == before
