"""Matrices of a GGUF file on ranks: cut by rows or by blocks of columns, each exactly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lading.errors import FileError, HeaderError, PlanError
from lading.gguf import gguf_file, gguf_weights, read_gguf
from lading.ranks import Ranks, all_ranks

FIXTURES = Path(
    os.environ.get(
        "LADING_FIXTURES", Path(__file__).resolve().parents[1] / ".." / "shared" / "fixtures"
    )
)
FOLDER = FIXTURES / "gguf-q8_0"
needs_fixture = pytest.mark.skipif(not FOLDER.is_dir(), reason="the fixtures are not here")


@needs_fixture
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_pieces_make_the_reference(tp_size: int) -> None:
    full: dict[str, torch.Tensor] = {}
    for ranks in all_ranks(tp_size):
        for piece in gguf_weights(str(FOLDER / "model.gguf"), ranks):
            whole = full.setdefault(piece.name, torch.full(piece.tensor.shape, float("nan")))
            (row, column), (rows, columns) = piece.region.start, piece.region.size
            whole[row : row + rows, column : column + columns] = piece.values()
    with safe_open(FOLDER / "dequant_reference.safetensors", "pt") as reference:
        assert set(full) == set(reference.keys())
        for name, weight in full.items():
            assert torch.equal(weight, reference.get_tensor(name)), name


@needs_fixture
def test_a_cut_through_a_block_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        list(gguf_weights(str(FOLDER / "model.gguf"), Ranks(tp_rank=0, tp_size=16)))
    texts = {str(problem) for problem in caught.value.problems}
    assert (
        "blk.0.attn_output.weight: TP 16 cuts 256 columns into 16 per rank; Q8_0 packs 32 columns "
        "into one block and 16 = 0 * 32 + 16. In model.gguf. Try: TP 1, 2, 4 or 8."
    ) in texts


def test_which_file_is_meant(tmp_path: Path) -> None:
    assert gguf_file(tmp_path) is None
    (tmp_path / "a.gguf").touch()
    assert gguf_file(tmp_path) == str(tmp_path / "a.gguf")
    assert gguf_file(tmp_path / "b.gguf") == str(tmp_path / "b.gguf")
    (tmp_path / "model.safetensors").touch()
    assert gguf_file(tmp_path) is None


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_gguf(str(tmp_path / "none.gguf"))
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    with pytest.raises(HeaderError):
        read_gguf(str(tmp_path / "short.gguf"))
