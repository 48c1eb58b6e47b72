"""Rates are measured on the files themselves, by the threads that are asked for, and end."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lading.benching import ceilings
from lading.checkpoint import Checkpoint, open_checkpoint
from lading.errors import FileError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MIN_SECONDS", 0.02)
    monkeypatch.setattr(ceilings, "BUFFER_BYTES", 2**24)
    monkeypatch.setattr(ceilings, "MAX_BYTES", 2**20)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {f"t{i}": torch.full((301, 1000), float(i)) for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path)


def test_memcpy() -> None:
    assert 1e7 < ceilings.memcpy_rate(2) < 1e12


def test_page_cache(checkpoint: Checkpoint) -> None:
    found = ceilings.page_cache_rate(checkpoint, 3)
    assert found is not None
    assert 1e6 < found < 1e12


def test_disk(checkpoint: Checkpoint) -> None:
    found = ceilings.disk_rate(checkpoint)
    assert found is None or 1e5 < found < 1e12  # None: a file system without O_DIRECT


def test_a_file_that_is_gone_ends_all_threads(checkpoint: Checkpoint) -> None:
    Path(checkpoint.folder, "model.safetensors").unlink()
    before = threading.active_count()
    with pytest.raises(FileError):
        ceilings.page_cache_rate(checkpoint, 2)
    assert threading.active_count() == before


def test_every_byte_of_every_file_has_its_turn(checkpoint: Checkpoint) -> None:
    sizes = {"model.safetensors": checkpoint.file_bytes["model.safetensors"]}
    with replace(checkpoint).reader() as reader:
        assert reader.files is not None
        pieces = ceilings._Pieces(reader.files, list(sizes), 1_000_000)
        taken = [pieces.take() for _ in range(-(-sizes["model.safetensors"] // 1_000_000))]
        again = pieces.take()
    assert [offset for _, offset, _ in taken] == list(range(0, sum(sizes.values()), 1_000_000))
    assert sum(size for _, _, size in taken) == sum(sizes.values())
    assert again == taken[0]


def test_an_error_of_one_thread_is_raised() -> None:
    def work(worker: int) -> int:
        if worker == 1:
            raise RuntimeError("as asked")
        return 1

    with pytest.raises(RuntimeError, match="as asked"):
        ceilings._rate(2, work)
