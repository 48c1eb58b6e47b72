"""Faults in real processes: every rank ends with the same error, within seconds, nothing loaded."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lading.launch import run_ranks

from . import work
from .checkpoints import checkpoint

SECONDS = 20.0
"""Far beyond what an exchange takes, far below a process group's own timeout."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("qwen2", files=3), copy)
    return copy


def test_a_disk_that_fails_on_one_rank(folder: Path) -> None:
    results = run_ranks(work.load_error, 2, [str(folder), 1])
    texts = {result["error"] for result in results}
    assert len(texts) == 1, texts
    text = texts.pop()
    assert "Input/output error" in text
    assert "On rank 1." in text
    assert all(result["seconds"] < SECONDS for result in results)
    assert all(result["left"] == ["meta"] for result in results)


@pytest.mark.parametrize("engine", ["native", "python"])
def test_a_file_that_shrinks_while_it_is_read(
    engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LADING_ENGINE", engine)
    results = run_ranks(work.load_error, 2, [str(folder), 0, "shorter"])
    texts = {result["error"] for result in results}
    assert len(texts) == 1, texts
    victim = max(folder.glob("*.safetensors"))
    text = texts.pop()
    assert re.search(r"needs \d+ bytes at offset \d+, the file ended after \d+ \(it was ", text)
    assert f"In {victim.name}." in text
    assert all(result["seconds"] < SECONDS for result in results)
    assert all(result["left"] == ["meta"] for result in results)


def test_a_missing_tensor(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            del tensors[name]
            save_file(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        "\n".join(line for line in index.read_text().splitlines() if f'"{name}"' not in line)
    )
    texts = {result["error"] for result in run_ranks(work.load_error, 2, [str(folder)])}
    assert texts == {
        "model.layers.1.self_attn.qkv_proj.weight, part 'k': the checkpoint has no tensor "
        f"{name!r}, nor a fused 'model.layers.1.self_attn.qkv_proj.weight'."
    }


def test_a_missing_file(folder: Path) -> None:
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.unlink()
    texts = {result["error"] for result in run_ranks(work.load_error, 2, [str(folder)])}
    assert len(texts) == 1
    assert victim.name in texts.pop()


def test_a_truncated_file(folder: Path) -> None:
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-100])
    texts = {result["error"] for result in run_ranks(work.load_error, 2, [str(folder)])}
    assert len(texts) == 1
    assert victim.name in texts.pop()
