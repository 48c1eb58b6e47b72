"""The demo end to end, and the checkpoint that it makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lading import cli, demo
from lading.checkpoint import open_checkpoint
from lading.errors import CallError
from lading.report import Block, Look, render


def run(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lading", *args],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_demo_from_the_shell(tmp_path: Path) -> None:
    done = run("demo", TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout
    assert "✓ 237,888 elements in 21 parameters on 2 ranks: each written exactly once\n" in text
    assert "✓ 30 checkpoint tensors: 30 used, 0 skipped\n" in text
    assert "model.layers.{0..2}.self_attn.qkv_proj.weight  bf16[80, 96], 3 layers\n" in text
    assert "✓ elements: all 237,888 on 2 ranks are what safetensors" in text
    assert "logits: " in text
    assert "kB/s" not in text
    assert "MB/s" not in text
    assert not list(tmp_path.glob("lading*"))


def test_keep_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()

    def say(_blocks: tuple[Block, ...]) -> None:
        pytest.fail("nothing may be done")

    with pytest.raises(CallError, match="is not empty, needs a new or empty folder"):
        demo.run(say, Look(), keep=str(tmp_path))


def test_steps_and_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    look, folder = Look(width=80), str(tmp_path / "kept")
    done = demo.run(lambda blocks: told.append(render(blocks, look)), look, keep=folder)
    assert done.ok
    assert len(told) == 3
    assert all(len(line) <= 80 for text in told for line in text.splitlines())
    assert len(open_checkpoint(folder).tensors) == 30

    monkeypatch.setattr(demo, "run", lambda *_, **__: done)  # once is enough
    result = CliRunner().invoke(cli.app, ["demo", "--json", "--keep", folder])
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert set(value) == {"ok", "command", "folder", "plan", "load", "verify"}
    assert value["ok"] is True
    assert value["folder"] == folder
    assert value["verify"]["elements_compared"] == 237888
    assert value["verify"]["mismatches"] == 0


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        folder.mkdir()
        demo.write_checkpoint(str(folder), seed=seed)
    name = "model-00001-of-00002.safetensors"
    one, two, three = ((folder / name).read_bytes() for folder in folders)
    assert one == two != three
