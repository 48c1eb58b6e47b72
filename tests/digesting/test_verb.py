"""`lading.digest`, `lading digest` and `lading verify --digest`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lading
from lading import cli
from lading.checkpoint import open_checkpoint
from lading.demo import write_checkpoint
from lading.digesting.models import DigestCheck, DigestMismatch
from tests.digests import oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path), num_attention_heads=4, num_key_value_heads=2)
    return str(path)


@pytest.fixture(scope="module")
def sharded(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("out") / "sharded"
    lading.shard(folder, tp_size=2, out=path, sync=False)
    return str(path)


def run(*args: str) -> Any:
    return CliRunner().invoke(cli.app, list(args))


def test_whatever_it_is_given(folder: str, sharded: str) -> None:
    expected = oracle.of_folder(Path(folder))
    model = lading.from_pretrained(folder, device="cpu")
    kinds = {}
    for what in (folder, Path(folder), open_checkpoint(folder), sharded, model):
        found = lading.digest(what)
        assert {name: value.hex for name, value in found.tensors.items()} == expected
        kinds[found.kind] = found.total
    assert set(kinds) == {"checkpoint", "shards", "model"}
    assert len(set(kinds.values())) == 1


def test_text(folder: str) -> None:
    result = run("digest", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    expected = oracle.of_folder(Path(folder))
    name = "model.norm.weight"
    (line,) = (line for line in lines if line.endswith(f" {name}"))
    assert line.split() == [expected[name], "bf16[96]", name]
    total = lading.digest(folder).total
    assert lines[-2] == f"{total}  total of {len(expected)} tensors"


def test_json(folder: str) -> None:
    result = run("digest", folder, "--json")
    (line,) = result.stdout.splitlines()
    value = json.loads(line)
    assert (value["ok"], value["command"], value["kind"]) == (True, "digest", "checkpoint")
    found = {name: one["digest"] for name, one in value["tensors"].items()}
    assert found == oracle.of_folder(Path(folder))


@pytest.mark.parametrize("order", [0, 1])
def test_against_the_same(folder: str, sharded: str, order: int) -> None:
    one, two = (folder, sharded)[:: 1 - 2 * order]
    result = run("digest", one, "--against", two)
    assert result.exit_code == 0
    assert result.stdout.endswith(f"✓ all 30 tensors are those of {two}\n")


def test_against_another(folder: str, tmp_path: Path) -> None:
    write_checkpoint(str(tmp_path), num_attention_heads=4, num_key_value_heads=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 128
    file.write_bytes(raw)
    result = run("digest", folder, "--against", str(tmp_path))
    assert result.exit_code == 1
    *_, head, last = result.stdout.splitlines()
    assert head == f"✗ 1 tensor differs from those of {tmp_path}:"
    before = oracle.of_folder(Path(folder))
    changed = [n for n, value in oracle.of_folder(tmp_path).items() if value != before[n]]
    assert len(changed) == 1
    assert last.startswith(f"  {changed[0]}: has digests ")
    value = json.loads(run("digest", folder, "--against", str(tmp_path), "--json").stdout)
    assert value["ok"] is False
    assert [one["tensor"] for one in value["differences"]] == changed
    assert value["against"] != value["total"]


def test_no_folder(tmp_path: Path) -> None:
    result = run("digest", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_files_need_no_torch(folder: str) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lading; print(lading.digest(sys.argv[1]).total)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.strip() == lading.digest(folder).total


def test_verify(folder: str) -> None:
    result = run("verify", folder, "--no-logits", "--digest", "--device", "cpu")
    assert result.exit_code == 0
    assert "✓ digests: all 30 regions on 1 rank are what the files have\n" in result.stdout


def test_verify_in_json(folder: str) -> None:
    args = ("verify", folder, "--no-logits", "--device", "cpu", "--json")
    value = json.loads(run(*args, "--digest").stdout)
    assert value["digests"] == {"regions_compared": 30, "mismatches": []}
    assert "digests" not in json.loads(run(*args).stdout)


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_that_fails(folder: str, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    mismatch = DigestMismatch(
        tp_rank=0,
        tensor="t",
        file="f",
        parameter="p",
        part="k",
        region="[0:2, 0:3]",
        element="[1, 2]",
    )

    def wrong(*_args: Any, **_named: Any) -> DigestCheck:
        return DigestCheck(tp_rank=0, num_regions=4, num_bytes=8, mismatches=(mismatch,))

    monkeypatch.setattr("lading.digesting.models.check_digests", wrong)
    options = ["--no-logits", "--digest", "--device", "cpu", *(["--json"] if as_json else [])]
    result = run("verify", folder, *options)
    assert result.exit_code == 1
    fact = (
        "region [0:2, 0:3] of checkpoint tensor 't' has another digest than in the file, needs "
        "the same (element [1, 2] differs)"
    )
    if as_json:
        value = json.loads(result.stdout)
        assert value["ok"] is False
        assert value["error"]["message"] == f"p, part 'k': {fact}. In f. On rank 0."
        assert value["digests"]["mismatches"][0]["region"] == "[0:2, 0:3]"
        return
    assert "✗ digests: 1 of 4 regions on 1 rank differ\n" in result.stdout
    assert f"  rank 0, p, part 'k': {fact}\n" in result.stdout
    assert result.stderr == f"error: p, part 'k': {fact}. In f. On rank 0.\n"
