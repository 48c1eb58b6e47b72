"""The commands about the way back: what they print, as text and as JSON, and how they exit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from lading import cli
from lading.demo import write_checkpoint

from ..schemes.checkpoints import GPTQ_CONFIG, gptq, model_tensors, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path))
    return str(path)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def value_of(result: Result) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    value: dict[str, Any] = json.loads(line)
    return value


# ----------------------------------------------------------------------------------------- explain

QKV, K = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.self_attn.k_proj.weight"
EMBED = "model.embed_tokens.weight"


def test_explain_the_regions_of_a_parameter(folder: str) -> None:
    found = run("explain", QKV, folder, "--tp", "2", "--rank", "1")
    assert found.exit_code == 0
    title, _, heads, *rows = found.stdout.splitlines()
    assert title == f"{QKV}: parameter on each of 2 ranks, bf16[80, 96]"
    words = " ".join(heads.split())
    assert words == "rank parameter part its region checkpoint tensor its region"
    assert [" ".join(row.split()) for row in rows] == [
        f"rank 1 {QKV} {part} [{at}, 0:96] of [80, 96] "
        f"model.layers.0.self_attn.{part}_proj.weight [{of}, 0:96] of [{rows}, 96]"
        for part, at, of, rows in (
            ("q", "0:48", "48:96", 96),
            ("k", "48:64", "16:32", 32),
            ("v", "64:80", "16:32", 32),
        )
    ]


def test_explain_an_element(folder: str) -> None:
    found = value_of(run("explain", K, folder, "--tp", "2", "--index", "20,3", "--json"))
    (entry,) = found["entries"]
    start, stop = entry["bytes"]
    raw = Path(folder, entry["file"]).read_bytes()[start:stop]
    stored = load_file(Path(folder, entry["file"]))[K][20, 3]
    assert raw == stored.reshape(1).view(torch.uint8).numpy().tobytes()
    assert entry["held"] == [{"rank": 1, "parameter": QKV, "part": "k", "index": [52, 3]}]
    assert (found["ok"], found["command"], found["kind"]) == (True, "explain", "tensor")
    text = run("explain", K, folder, "--tp", "2", "--index", "[20, 3]").stdout
    assert text.splitlines() == [
        f"{K} [20, 3]: checkpoint tensor, bf16[32, 96]",
        f"  in {entry['file']}, bytes {found['tensor']['bytes'][0]}:{found['tensor']['bytes'][1]}",
        "",
        f"  {K} [20, 3] bf16",
        f"    bytes {start}:{stop} of {entry['file']}",
        f"    rank 1: {QKV} [52, 3], part k",
    ]
    by_byte = run("explain", entry["file"], folder, "--tp", "2", "--byte", str(stop - 1), "--json")
    assert value_of(by_byte)["entries"] == [entry]


def test_explain_padding_and_replicas(folder: str) -> None:
    found = run("explain", EMBED, folder, "--tp", "2", "--rank", "1", "--index", "60,3")
    assert "  is padding on rank 1: no tensor fills it" in found.stdout.splitlines()
    boxes = run("explain", EMBED, folder, "--tp", "2", "--as", "parameter").stdout
    assert "[37:64, 0:96] of [64, 96]  padding" in boxes
    norm = run("explain", "model.norm.weight", folder, "--tp", "2", "--index", "5").stdout
    assert "    ranks 0, 1: model.norm.weight [5]" in norm.splitlines()
    assert "  a parameter has this name, too; this is the checkpoint tensor" in norm.splitlines()


def test_explain_a_packed_entry(tmp_path: Path) -> None:
    write_model(tmp_path, model_tensors(gptq), GPTQ_CONFIG)
    name = "model.layers.0.mlp.down_proj.qweight"
    found = run("explain", name, str(tmp_path), "--tp", "2", "--rank", "1", "--index", "1,3")
    lines = [line.strip() for line in found.stdout.splitlines()]
    assert f"{name} [9, 3] i32" in lines or f"{name} [9, 3] int32" in lines
    assert any(line.startswith("covers 72:80 of in_features of the layer (") for line in lines)
    constant = run(
        "explain", "model.layers.0.mlp.down_proj.g_idx", str(tmp_path), "--index", "7", "--as",
        "tensor",
    )  # fmt: skip
    assert "    no rank asked for keeps it" in constant.stdout.splitlines()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["model.embed_token.weight"], 1, f"Try: {EMBED}"),
        ([EMBED, "--index", "101,0"], 1, "needs at most [100, 95] (its shape is [101, 96])"),
        ([EMBED, "--index", "1,x"], 2, "is '1,x', needs whole numbers with commas between"),
        ([EMBED, "--index", "1", "--byte", "3"], 2, "needs no --index or --as"),
        ([EMBED, "--rank", "7"], 1, "rank: is 7, needs 0 (TP is 1)"),
    ],
)
def test_explain_refuses(args: list[str], code: int, message: str, folder: str) -> None:
    name, *rest = args
    found = run("explain", name, folder, *rest)
    assert found.exit_code == code
    said = " ".join(found.stderr.replace("│", " ").split())
    assert message in said
    if code == 1:
        error = value_of(run("explain", name, folder, *rest, "--json"))["error"]
        assert message in error["message"]


def test_explain_with_its_arguments_swapped(folder: str) -> None:
    found = run("explain", folder, QKV)
    assert found.exit_code == 2
    assert "NAME" in found.stderr
    assert "comes before DIR" in found.stderr


# --------------------------------------------------------------------------- shard, reshard, merge


def test_there_and_back(folder: str, tmp_path: Path) -> None:
    two, one, out = (str(tmp_path / name) for name in ("two", "one", "out"))
    first = run("shard", folder, "--tp", "2", "-o", two)
    assert first.exit_code == 0
    size = sum(path.stat().st_size for path in Path(two).glob("*.safetensors"))
    head, speed = first.stdout.splitlines()
    assert head == f"{two}: 2 ranks"
    assert speed.startswith(f"{size / 1000:.0f} kB in ")
    assert value_of(run("reshard", two, "--tp", "1", "-o", one, "--json"))["tp_size"] == 1
    merged = value_of(run("merge", one, "-o", out, "--json"))
    assert merged["tp_size"] is None
    files = sorted(path.name for path in Path(folder).iterdir())
    assert sorted(path.name for path in Path(out).iterdir()) == files
    for name in files:
        assert Path(out, name).read_bytes() == Path(folder, name).read_bytes()
    assert run("digest", folder, "--against", two).exit_code == 0


@pytest.mark.parametrize("verb", ["shard", "reshard", "merge"])
def test_one_process_writes_files(
    verb: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    out = tmp_path / "out"
    tp = [] if verb == "merge" else ["--tp", "2"]
    found = run(verb, folder, *tp, "-o", str(out))
    assert found.exit_code == 2
    assert "in one process, needs no launcher" in " ".join(found.stderr.replace("│", " ").split())
    assert not out.exists()


@pytest.mark.parametrize("verb", ["verify", "bench"])
def test_what_needs_the_original_says_so_first(verb: str, folder: str, tmp_path: Path) -> None:
    two = str(tmp_path / "two")
    run("shard", folder, "--tp", "2", "-o", two)
    found = run(verb, two, "--tp", "2")
    assert (found.exit_code, found.stdout) == (1, "")
    assert "is a pre-sharded folder, needs the original checkpoint (which other" in found.stderr


def test_digest_names_the_rank_of_a_flipped_bit(folder: str, tmp_path: Path) -> None:
    two, name = str(tmp_path / "two"), "model.layers.0.self_attn.o_proj.weight"
    run("shard", folder, "--tp", "2", "-o", two)
    file = Path(two, "model-rank-00001-of-00002.safetensors")
    raw = bytearray(file.read_bytes())
    size = int.from_bytes(raw[:8], "little")
    raw[8 + size + json.loads(raw[8 : 8 + size])[name]["data_offsets"][0]] ^= 1
    file.write_bytes(raw)
    shown = run("digest", two)
    fact = "rank 1 holds other bytes of region [0:96, 48:96] than were sharded "
    fact += f"({name} in {file.name})"
    assert shown.exit_code == 1
    assert f"✗ {name}: {fact}" in shown.stdout.splitlines()
    value = value_of(run("digest", two, "--json"))
    assert value["ranks"] == [
        {
            "tensor": name,
            "rank": 1,
            "file": file.name,
            "regions": ["[0:96, 48:96]"],
            "parameters": [name],
        }
    ]


def test_merge_says_that_torch_files_became_others(folder: str, tmp_path: Path) -> None:
    two, source = str(tmp_path / "two"), tmp_path / "torch"
    source.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    for given, files in ((str(source), "safetensors files"), (folder, "the original files")):
        run("shard", given, "--tp", "2", "-o", two, "--overwrite")
        shown = run("merge", two, "-o", f"{two}-{files[:3]}").stdout.splitlines()
        assert shown[0].endswith(f": {files}")
        assert ("the checkpoint came as torch files" in shown[1]) == (given == str(source))


def test_inspect_says_what_is_pre_sharded(folder: str, tmp_path: Path) -> None:
    two = str(tmp_path / "two")
    assert run("shard", folder, "--tp", "2", "-o", two).exit_code == 0
    shown = run("inspect", two).stdout.splitlines()
    assert shown[0] == "pre-sharded for 2 ranks; it holds this checkpoint:"
    assert value_of(run("inspect", two, "--json"))["pre_sharded"] == 2
    assert value_of(run("inspect", folder, "--json"))["pre_sharded"] is None
    assert not run("inspect", folder).stdout.startswith("pre-sharded")
