"""`lading bench` as a command: what it prints, how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lading import cli, verify
from lading.benching import ceilings
from lading.demo import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "BUFFER_BYTES", 2**24)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *args])


def test_text(folder: str) -> None:
    result = run(folder, "--runs", "1", "--device", "cpu", "--against", "safetensors")
    assert result.exit_code == 0, result.output
    for words in ("at TP 1 on cpu, warm, median of 1 run", "<- limit", "✓ all", "safetensors 0."):
        assert words in result.stdout


def test_json(folder: str) -> None:
    result = run(folder, "--runs", "2", "--device", "cpu", "--against", "none", "--json")
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert (value["ok"], value["command"], value["tp_size"], value["runs"]) == (True, "bench", 1, 2)
    assert value["peers"] == []
    assert value["verified"]["mismatches"] == 0
    assert value["read_per_checkpoint_byte"] == 1.0


def test_peers_that_are_not_known_are_a_usage_error(folder: str) -> None:
    result = run(folder, "--against", "vllm")
    assert result.exit_code == 2
    for name in ("safetensors", "prefetch", "instanttensor", "fastsafetensors", "transformers"):
        assert name in result.output


def test_no_such_folder(tmp_path: Path) -> None:
    result = run(str(tmp_path / "none"), "--runs", "1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False


def test_wrong_elements_fail(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = verify._differing
    monkeypatch.setattr(verify, "_differing", lambda a, b: real(a, b + 1))
    result = run(folder, "--runs", "1", "--device", "cpu", "--against", "none", "--json")
    value = json.loads(result.stdout)
    assert (result.exit_code, value["ok"]) == (1, False)
    assert value["verified"]["mismatches"] > 0
    assert value["error"]["subject"]
