"""shard, reshard and merge: files against their own sha256, rank files against cuts made by torch,
loads of pre-sharded folders against independent reads of the original files.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lading
from lading.checkpoint import files as checkpoint_files
from lading.demo import write_checkpoint
from lading.errors import CallError, ConflictError, DtypeError, FileError, PlanError
from lading.preflight import preflight
from lading.pretrained import load_pretrained
from lading.ranks import Ranks, all_ranks
from lading.sharding.verbs import merge, reshard_files, shard
from lading.shards.folder import open_sharded
from lading.shards.plans import plan_at
from lading.verify import verify
from tests.end_to_end.checkpoints import checkpoint
from tests.schemes.cutting import fixture
from tests.schemes.test_fixtures import CASES
from tests.sharding.made import edit_json, hashes, made, rank_tensors, stored, with_tensors


def round_trips(source: Path, sizes: tuple[int, ...], work: Path) -> None:
    """shard n -> reshard m -> merge for all pairs; equal contents are checked once."""
    needed = {
        name: value
        for name, value in hashes(source).items()
        if not name.endswith((".pt", "_reference.safetensors"))
    }
    direct = {}
    for n in sizes:
        shard(source, tp_size=n, out=work / f"tp{n}", sync=False)
        direct[n] = hashes(work / f"tp{n}")
        merge(work / f"tp{n}", out=work / f"merged{n}", sync=False)
        assert hashes(work / f"merged{n}") == needed, f"merge of TP {n}"
    for n in sizes:
        for m in sizes:
            out = work / f"tp{n}-tp{m}"
            reshard_files(work / f"tp{n}", tp_size=m, out=out, sync=False)
            assert hashes(out) == direct[m], f"TP {n} to TP {m}"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"files": 3}),
        ("mistral", {"kv_heads": 4}),
        ("qwen2", {"tied": True}),
        ("qwen3", {"files": 2}),
        ("phi3", {}),
    ],
    ids=str,
)
def test_families(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    # 8 heads that share 2 or 4 KV heads; 101 tokens, padded
    round_trips(checkpoint(family, **options), (1, 2, 4, 8), tmp_path)


@pytest.mark.parametrize(("heads", "kv_heads", "inner", "tp"), [(3, 3, 60, 3), (5, 1, 40, 5)])
def test_odd_sizes(heads: int, kv_heads: int, inner: int, tp: int, tmp_path: Path) -> None:
    source = made(
        tmp_path / "source",
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        num_hidden_layers=7,
        dtype="float32",
    )
    round_trips(source, (1, tp), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_quantised_formats(name: str, tmp_path: Path) -> None:
    source, sizes = fixture(name), CASES[name].sizes
    round_trips(source, sizes, tmp_path)
    most = sizes[-1]
    for ranks in all_ranks(most):
        model, _ = load_pretrained(tmp_path / f"tp{most}", ranks=ranks, device="cpu")
        found = verify(source, model, ranks, names=model.names)
        assert (found.first, found.num_mismatches) == (None, 0)
    assert lading.digest(tmp_path / f"tp{most}").ok
    file = tmp_path / f"tp{most}" / f"model-rank-{most - 1:05}-of-{most:05}.safetensors"
    raw = bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    parameter = next(key for key in header if "layers.0.self_attn.o_proj" in key)
    raw[8 + int.from_bytes(raw[:8], "little") + header[parameter]["data_offsets"][0]] ^= 1
    file.write_bytes(raw)
    (wrong,) = lading.digest(tmp_path / f"tp{most}").ranks
    assert (wrong.ranks.tp_rank, wrong.parameters) == (most - 1, (parameter,))


# ------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_rank_files(tp_size: int, tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    report = shard(source, tp_size=tp_size, out=tmp_path / "out")
    full = stored(source)
    for rank in range(tp_size):
        name = f"model-rank-{rank:05}-of-{tp_size:05}.safetensors"
        assert report.files[rank] == name
        found, needed = load_file(tmp_path / "out" / name), rank_tensors(full, rank, tp_size)
        assert found.keys() == needed.keys()
        for key, tensor in needed.items():
            assert torch.equal(found[key], tensor), (rank, key)
    assert report.tp_size == tp_size
    assert report.num_bytes == sum(
        file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")
    )


def test_parameters_are_in_model_order(tmp_path: Path) -> None:
    shard(made(tmp_path / "source"), tp_size=2, out=tmp_path / "out")
    raw = (tmp_path / "out" / "model-rank-00001-of-00002.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    metadata = header.pop("__metadata__")
    assert (metadata["lading.rank"], metadata["lading.tp_size"]) == ("00001", "00002")
    assert len(metadata["lading.id"]) == 64
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    plan = preflight(tmp_path / "source", all_ranks(2)).plan
    assert names == [target.name for target in plan.targets]


def test_what_no_rank_keeps_travels(tmp_path: Path) -> None:
    full = stored(made(tmp_path / "first", tie_word_embeddings=True))
    source = with_tensors(
        tmp_path / "first",
        lm_head__weight=full["model.embed_tokens.weight"].clone(),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.rand(3),
    )
    round_trips(source, (1, 2, 4), tmp_path)
    rest = load_file(tmp_path / "tp2" / "model-rest.safetensors")
    assert rest.keys() == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}


def test_tied_tensors_that_differ(tmp_path: Path) -> None:
    full = stored(made(tmp_path / "source", tie_word_embeddings=True))
    twin = full["model.embed_tokens.weight"].clone()
    twin[100, 3] = -twin[100, 3]
    source = with_tensors(tmp_path / "source", lm_head__weight=twin)
    with pytest.raises(ConflictError) as caught:
        shard(source, tp_size=2, out=tmp_path / "out")
    assert str(caught.value) == (
        "model.embed_tokens.weight: checkpoint tensors 'model.embed_tokens.weight' and "
        "'lm_head.weight' differ, needs equal ones (the parameter is tied to both). In "
        "model.safetensors."
    )
    assert not (tmp_path / "out").exists()


def test_torch_files(tmp_path: Path) -> None:
    full = stored(made(tmp_path / "first"))
    source = tmp_path / "source"
    source.mkdir()
    torch.save(full, source / "pytorch_model.bin")
    (source / "config.json").write_bytes((tmp_path / "first" / "config.json").read_bytes())
    report = shard(source, tp_size=2, out=tmp_path / "tp2")
    assert any("torch files" in note for note in report.notes)
    reshard_files(tmp_path / "tp2", tp_size=4, out=tmp_path / "tp4")
    for place, out in (("tp2", "out"), ("tp4", "out4")):
        assert merge(tmp_path / place, out=tmp_path / out).notes == (
            "the checkpoint came as torch files; these are safetensors files of the same tensors",
        )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == full.keys()
    assert all(torch.equal(found[name], full[name]) for name in full)


def test_without_digests(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=2, out=tmp_path / "tp2")
    reshard_files(tmp_path / "tp2", tp_size=4, out=tmp_path / "tp4")
    reshard_files(tmp_path / "tp2", tp_size=4, out=tmp_path / "fast", verify=False)
    fast, checked = hashes(tmp_path / "fast"), hashes(tmp_path / "tp4")
    assert {name for name in checked if fast[name] != checked[name]} == {"lading.json"}
    manifest = json.loads((tmp_path / "tp4" / "lading.json").read_text())
    assert len(manifest["ranks"]["model.layers.0.self_attn.q_proj.weight"]) == 4
    assert json.loads((tmp_path / "fast" / "lading.json").read_text()) == manifest | {"ranks": {}}
    assert merge(tmp_path / "fast", out=tmp_path / "merged", verify=False).notes == ()
    assert hashes(tmp_path / "merged") == hashes(source)


@pytest.mark.parametrize("memory_bytes", [1, 1000, 10**5])
def test_any_memory_will_do(memory_bytes: int, tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1, "vocab_size": 11, "hidden_size": 8, "intermediate_size": 16}
    source = made(tmp_path / "source", **changes)
    options: dict[str, Any] = {"memory_bytes": memory_bytes, "sync": False}
    shard(source, tp_size=2, out=tmp_path / "tp2", **options)
    reshard_files(tmp_path / "tp2", tp_size=4, out=tmp_path / "tp4", **options)
    merge(tmp_path / "tp4", out=tmp_path / "out", **options)
    assert hashes(tmp_path / "out") == hashes(source)


class Told:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.total, self.done, self.ended = 0, 0, False

    def start(self, total_bytes: int) -> None:
        self.total = total_bytes

    def advance(self, num_bytes: int) -> None:
        self.done += num_bytes

    def finish(self) -> None:
        self.ended = True


def test_progress(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    total = sum(tensor.nbytes for tensor in stored(source).values())
    told = Told()
    shard(source, tp_size=8, out=tmp_path / "tp8", progress=told)
    assert (told.total, told.done, told.ended) == (total, total, True)


# -------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_loading(tp_size: int, dtype: torch.dtype | None, tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=2, out=tmp_path / "tp2")
    for ranks in all_ranks(tp_size):
        one, _ = load_pretrained(source, ranks=ranks, device="cpu", dtype=dtype)
        two, report = load_pretrained(tmp_path / "tp2", ranks=ranks, device="cpu", dtype=dtype)
        needed = dict(one.named_parameters())
        for name, param in two.named_parameters():
            assert param.dtype == needed[name].dtype
            assert torch.equal(param, needed[name]), name
        if tp_size == 2:  # its own file, each byte of it once, in as many copies as parameters
            name = f"model-rank-{ranks.tp_rank:05}-of-00002.safetensors"
            own = load_file(tmp_path / "tp2" / name)
            assert report.num_copies == len(own)
            assert report.read_bytes == sum(tensor.nbytes for tensor in own.values())
        assert report.excess_bytes == 0 or tp_size == 4
        assert verify(source, two, ranks, names=two.names).first is None


def test_loading_into_a_model_of_ones_own(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=2, out=tmp_path / "tp2")
    ranks = Ranks(tp_rank=1, tp_size=2)
    model, _ = load_pretrained(source, ranks=ranks, device="cpu")
    needed = {name: param.clone() for name, param in model.named_parameters()}
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    lading.load(model, tmp_path / "tp2", names=model.names)
    assert all(torch.equal(param, needed[name]) for name, param in model.named_parameters())


# ---------------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["ct-fp8-block", "gptq-v1-w4-g64-sym", "ct-nvfp4a16", "bnb-nf4"])
def test_plans_at_another_size_are_those_of_the_model(name: str) -> None:
    source = fixture(name)
    plans = {n: preflight(source, all_ranks(n)).plan for n in CASES[name].sizes}
    for before in plans.values():
        for m, needed in plans.items():
            found = plan_at(before, m)
            assert found.targets == needed.targets
            assert found.shares == needed.shares


def test_a_cut_through_a_group(tmp_path: Path) -> None:
    shard(fixture("ct-w4a16-g128-asym"), tp_size=2, out=tmp_path / "tp2")
    with pytest.raises(PlanError) as caught:
        reshard_files(tmp_path / "tp2", tp_size=4, out=tmp_path / "out")
    assert caught.value.hint == "TP 1, 2: there every layer divides"
    problem = caught.value.problems[0]
    assert str(problem) == (
        "model.layers.0.self_attn.o_proj.weight_scale: TP 4 cuts 256 columns into 64 per rank; "
        "one scale covers a group of 128 inputs and 64 = 0 * 128 + 64. Try: TP 1 or 2."
    )
    assert not (tmp_path / "out").exists()


def test_parts_of_different_dtypes(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    name = "model.layers.1.self_attn.k_proj.weight"
    with_tensors(source, **{name.replace(".", "__"): stored(source)[name].float()})
    with pytest.raises(PlanError) as caught:
        shard(source, tp_size=2, out=tmp_path / "out")
    (problem,) = caught.value.problems
    assert isinstance(problem, DtypeError)
    assert str(problem) == (
        "model.layers.1.self_attn.qkv_proj.weight: its parts are stored in different dtypes "
        "('model.layers.1.self_attn.q_proj.weight' is BF16, "
        "'model.layers.1.self_attn.k_proj.weight' is F32), needs one."
    )


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("tp_size", [0, -1, True, 2.0, "2", 10**9])
def test_tp_sizes_that_cannot_be(tp_size: Any, tmp_path: Path) -> None:
    for verb in (shard, reshard_files):
        with pytest.raises(CallError, match=r"tp_size is .*, needs an int from 1 to 4096"):
            verb(tmp_path, tp_size=tp_size, out=tmp_path / "out")


def test_folders_of_the_other_kind(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=2, out=tmp_path / "tp2")
    with pytest.raises(CallError) as caught:
        shard(tmp_path / "tp2", tp_size=4, out=tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/tp2: is a pre-sharded folder, needs a checkpoint in its original form. Try: "
        f"lading reshard {tmp_path}/tp2 --tp 4 --out {tmp_path}/out."
    )
    for verb in (merge, lambda path, out: reshard_files(path, tp_size=2, out=out)):
        with pytest.raises(FileError) as missing:
            verb(source, out=tmp_path / "out")
        assert str(missing.value) == (
            f"{source}: has no lading.json, needs a folder that lading shard wrote."
        )
    with pytest.raises(FileError) as open_error:
        lading.open_checkpoint(tmp_path / "tp2")
    assert str(open_error.value) == (
        f"{tmp_path}/tp2: is a pre-sharded folder (lading.json is there), needs the original "
        f"checkpoint. Try: lading.load, which takes it, or lading merge {tmp_path}/tp2 --out DIR."
    )


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=4, out=tmp_path / "tp4")
    file = tmp_path / "tp4" / "model-rank-00002-of-00004.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    before, raw = load_file(file)[name].clone(), bytearray(file.read_bytes())
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    at = 8 + int.from_bytes(raw[:8], "little") + header[name]["data_offsets"][0] + 17
    raw[at] ^= 4
    file.write_bytes(raw)
    assert not torch.equal(load_file(file)[name], before)
    for verb in (merge, lambda path, out: reshard_files(path, tp_size=2, out=out)):
        with pytest.raises(PlanError) as caught:
            verb(tmp_path / "tp4", out=tmp_path / "out")
        (problem,) = caught.value.problems
        assert problem.subject == name
        assert (
            "the ranks' files were damaged, or the manifest edited); rank 2 holds other bytes of "
            "region [0:24, 24:36] than were sharded (model.layers.1.mlp.down_proj.weight in "
            "model-rank-00002-of-00004.safetensors)."
        ) in str(problem)
        assert not (tmp_path / "out").exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_small_files_that_were_edited(tmp_path: Path) -> None:
    shard(made(tmp_path / "source"), tp_size=2, out=tmp_path / "tp2")
    edit_json(tmp_path / "tp2" / "config.json", rope_theta=20000.0)
    (tmp_path / "tp2" / "README.md").unlink()
    with pytest.raises(PlanError) as caught:
        merge(tmp_path / "tp2", out=tmp_path / "out")
    assert [str(problem) for problem in caught.value.problems] == [
        "README.md: is missing.",
        "config.json: is not what it was when the checkpoint was sharded (as lading.json says).",
    ]


# ---------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("at", [0, 1, 7, 30])
def test_a_full_disk(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(tmp_path / "source")
    before, calls, real = hashes(source), 0, os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(checkpoint_files.os, "pwrite", pwrite)
    with pytest.raises(FileError, match="cannot be written: No space left on device"):
        shard(source, tp_size=2, out=tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert hashes(source) == before
    shard(source, tp_size=2, out=tmp_path / "out")
    merge(tmp_path / "out", out=tmp_path / "merged")
    assert hashes(tmp_path / "merged") == before


def test_an_output_that_is_there(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=2, out=tmp_path / "out")
    before = hashes(tmp_path / "out")
    with pytest.raises(FileError, match="is there and is not empty"):
        shard(source, tp_size=4, out=tmp_path / "out")
    assert hashes(tmp_path / "out") == before
    shard(source, tp_size=4, out=tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").glob("model-rank-*"))) == 4
    shard(source, tp_size=2, out=tmp_path / "out", overwrite=True)
    assert hashes(tmp_path / "out") == before


def test_an_output_that_is_read(tmp_path: Path) -> None:
    source, sharded = made(tmp_path / "source"), tmp_path / "tp2"
    shard(source, tp_size=2, out=sharded)
    (tmp_path / "link").symlink_to(sharded)
    before = [hashes(source), hashes(sharded)]
    for place in (source, source / "new"):
        with pytest.raises(FileError, match=r"is read, needs a place apart. Try: another folder"):
            shard(source, tp_size=2, out=place, overwrite=True)
    for place in (sharded, sharded / "new", tmp_path / "link"):
        with pytest.raises(FileError, match=r"is read, needs a place apart. Try: another folder"):
            reshard_files(sharded, tp_size=4, out=place, overwrite=True)
        with pytest.raises(FileError, match=r"is read, needs a place apart. Try: another folder"):
            merge(sharded, out=place, overwrite=True)
    assert [hashes(source), hashes(sharded)] == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "tp2", "link"}


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_a_kill(delay: float, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    write_checkpoint(str(tmp_path / "source"), hidden_size=768, vocab_size=9000)
    before = hashes(tmp_path / "source")
    code = "import sys; from lading.sharding.verbs import shard\n"
    code += "shard(sys.argv[1], tp_size=2, out=sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out")]
    process = subprocess.Popen(command)
    while process.poll() is None and len(list(tmp_path.iterdir())) == 1:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()
    assert hashes(tmp_path / "source") == before
    if (tmp_path / "out").exists():
        open_sharded(tmp_path / "out")
    else:
        shard(tmp_path / "source", tp_size=2, out=tmp_path / "out")
    merge(tmp_path / "out", out=tmp_path / "merged")
    assert hashes(tmp_path / "merged") == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "merged"}


# ------------------------------------------------------------------------------- the command line


def test_commands(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from lading.cli import app

    def run(*words: str) -> Any:
        done = CliRunner().invoke(app, [*words, "--json"])
        value = json.loads(done.stdout)
        assert (done.exit_code == 0) == value["ok"]
        return value

    source = made(tmp_path / "source")
    out = run("shard", str(source), "--tp", "2", "--out", str(tmp_path / "tp2"))
    assert (out["tp_size"], len(out["files"])) == (2, 2)
    out = run("reshard", str(tmp_path / "tp2"), "--tp", "8", "--out", str(tmp_path / "tp8"))
    assert (out["tp_size"], len(out["files"])) == (8, 8)
    out = run("merge", str(tmp_path / "tp8"), "--out", str(tmp_path / "merged"))
    assert out["tp_size"] is None
    assert hashes(tmp_path / "merged") == hashes(source)
    out = run("reshard", str(tmp_path / "tp2"), "--tp", "3", "--out", str(tmp_path / "tp3"))
    assert out["error"]["problems"][0]["hint"] == "TP 1, 2, 4 or 8"
    out = run("plan", str(tmp_path / "tp8"), "--tp", "4")
    assert out["summary"]["tp_size"] == 4
