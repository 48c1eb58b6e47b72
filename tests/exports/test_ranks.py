"""Exports by real processes: who writes what, one verdict for all ranks, kills, full disks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lading.launch import run_ranks
from tests.end_to_end.checkpoints import checkpoint

from . import work
from .made import files_of, tensors_of


def without_logits(folder: Path) -> dict[str, str]:
    found = files_of(folder)
    del found["logits.pt"]
    return found


def test_every_rank_writes_its_share(tmp_path: Path) -> None:
    folder = checkpoint("qwen2", tied=True, files=3)
    out = tmp_path / "out"
    results = run_ranks(work.export, 4, [str(folder), str(out)])
    assert [result["error"] for result in results] == [None] * 4
    assert files_of(out) == without_logits(folder)
    total = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    written = [result["written"] for result in results]
    assert sum(written) == total
    assert max(written) < 1.05 * total / 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (
            "full",
            "FileError",
            "model-N-of-00004.safetensors: cannot be written: File too large. On rank 1.",
        ),
        (
            "replica",
            "ConflictError",
            "model.norm.weight: rank 0 of 2 and rank 1 of 2 hold other values for checkpoint "
            "tensor 'model.norm.weight' [0:64] of [64], needs equal ones (they are copies of the "
            "same elements).",
        ),
        ("broken", "RankError", "ZeroDivisionError: nobody expected it. On rank 1."),
    ],
)
def test_one_verdict_for_all(fault: str, kind: str, text: str, tmp_path: Path) -> None:
    folder = checkpoint("llama", files=3)
    source = files_of(folder)
    results = run_ranks(work.export, 2, [str(folder), str(tmp_path / "out"), fault])
    found = [re.sub(r"model-\d+", "model-N", result["error"]) for result in results]
    assert [result["type"] for result in results] == [kind] * 2
    assert found == [text] * 2
    assert list(tmp_path.iterdir()) == []
    assert files_of(folder) == source


def test_kills_leave_all_or_nothing() -> None:
    folder = checkpoint("llama", files=3)
    command = [sys.executable, "-m", "tests.exports.killed", str(folder), "--times", "10"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        cwd=root,
        env={"PYTHONPATH": str(root / "src"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, ""), done.stdout


def test_the_command(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=3)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lading", "export", str(folder), "-o", str(out)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], capture_output=True, text=True, check=False)

    done = run("--tp", "2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    value = json.loads(done.stdout)
    assert value["ok"]
    assert value["command"] == "export"
    assert value["tp_size"] == 2
    assert value["files"] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert sum(rank["written_bytes"] for rank in value["ranks"]) < value["bytes"]
    assert files_of(out) == without_logits(folder)

    done = run()
    assert done.returncode == 1
    assert done.stdout == ""
    assert "is there and is not empty, needs an empty folder or nothing there" in done.stderr

    done = run("--overwrite")
    assert (done.returncode, done.stderr) == (0, "")
    assert "30 tensors in 4 files, 3 other files copied" in done.stdout
    assert "left out: logits.pt" in done.stdout
    assert files_of(out) == without_logits(folder)
