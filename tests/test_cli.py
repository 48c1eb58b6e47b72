"""The commands: what they print, as text and as JSON, and how they exit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lading import __version__, cli
from lading.demo import write_checkpoint
from lading.verify import verify_rank

COMMAND = [sys.executable, "-m", "lading"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path))
    return str(path)


@pytest.fixture(scope="module")
def three_heads(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Divides by 3: 3 heads, 3 KV heads, intermediate size 96."""
    path = tmp_path_factory.mktemp("three")
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96}
    write_checkpoint(str(path), hidden_size=48, **changes)
    return str(path)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def shell(
    *args: str, command: list[str] = COMMAND, **environ: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *args],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def value_of(result: Result) -> dict[str, Any]:
    (line,) = result.stdout.splitlines()
    value: dict[str, Any] = json.loads(line)
    return value


# ------------------------------------------------------------------------------- usage, exit codes


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 0
    for name in ("demo", "load", "plan", "verify", "inspect"):
        assert name in result.stdout


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"lading {__version__}\n")


@dataclass(frozen=True)
class Fails:
    """A command line that is refused: exit status, and what stderr says."""

    id: str
    args: tuple[str, ...]
    exit_code: int
    says: str


FAILS = [
    Fails("no such command", ("lode",), 2, "No such command"),
    Fails("no folder", ("plan",), 2, "Missing argument"),
    Fails("TP 0", ("plan", "DIR", "--tp", "0"), 2, "'--tp'"),
    Fails("TP that is no number", ("load", "DIR", "--tp", "two"), 2, "'--tp'"),
    Fails("TP beyond all hosts", ("load", "DIR", "--tp", "100000"), 2, "'--tp'"),
    Fails("rank beyond TP", ("plan", "DIR", "--tp", "2", "--rank", "2"), 2, "needs 0 to 1"),
    Fails("rank of one", ("plan", "DIR", "--rank", "1"), 2, "is 1, needs 0"),
    Fails("rank below 0", ("plan", "DIR", "--rank", "-1"), 2, "'--rank'"),
    Fails("unknown dtype", ("load", "DIR", "--dtype", "int8"), 2, "'--dtype'"),
    Fails("unknown device", ("load", "DIR", "--device", "tpu"), 2, "'--device'"),
    Fails("wrong path", ("plan", "/no/such"), 1, "error: /no/such: does not exist.\n"),
    Fails(
        "a name on the hub",
        ("inspect", "org/model"),
        1,
        "error: org/model: does not exist. Try: hf download org/model, and give the folder that it "
        "prints.\n",
    ),
    Fails("wrong path of a load", ("load", "/no/such"), 1, "error: /no/such: does not exist.\n"),
    Fails(
        "TP that does not divide",
        ("load", "DIR", "--tp", "4"),
        1,
        "error: TP 4 has 3 problems:\n"
        "  model.layers.{0..2}.self_attn.qkv_proj, part 'q': TP 4 does not cut 6 q heads into 4 "
        "equal pieces: 6 = 4 * 1 + 2. Try: TP 1 or 2. (3 layers)\n"
        "  Try: TP 1, 2: there every layer divides.\n",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refusals(case: Fails, folder: str) -> None:
    result = run(*(folder if arg == "DIR" else arg for arg in case.args))
    assert result.exit_code == case.exit_code
    assert result.stdout == ""
    if case.says.startswith("error"):
        assert result.stderr == case.says
    else:
        assert case.says in result.stderr
    assert "Traceback" not in result.stderr


def test_an_error_in_json(folder: str) -> None:
    result = run("plan", folder, "--tp", "4", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    value = value_of(result)
    assert (value["ok"], value["command"]) == (False, "plan")
    assert value["error"]["error"] == "PlanError"
    assert len(value["error"]["problems"]) == 3


def test_no_config(folder: str, tmp_path: Path) -> None:
    for file in Path(folder).glob("model*"):
        shutil.copy(file, tmp_path)
    result = run("plan", str(tmp_path))
    assert result.exit_code == 1
    assert "config.json: is missing, needs one beside the weights" in result.stderr
    shown = run("inspect", str(tmp_path))
    assert shown.exit_code == 0
    assert "there is no config.json" in shown.stdout
    assert "model.layers.{0..2}.mlp.up_proj.weight" in shown.stdout


def test_unknown_architecture(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("plan", str(tmp_path))
    assert result.exit_code == 1
    assert '"mamba"' in result.stderr
    shown = run("inspect", str(tmp_path), "--json")
    assert shown.exit_code == 0
    value = value_of(shown)
    assert value["tp_sizes"] is None
    assert '"mamba"' in value["config"]["problem"]
    assert len(value["tensors"]) == 30


def test_a_config_that_is_no_json(folder: str, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text("{")
    assert run("plan", str(tmp_path)).exit_code == 1
    shown = run("inspect", str(tmp_path), "--json")
    assert shown.exit_code == 0
    value = value_of(shown)
    assert value["config"]["problem"].startswith("config.json: is not JSON")
    assert len(value["tensors"]) == 30


def test_missing_tensors_fold(folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copy(f"{folder}/config.json", tmp_path)
    state = {
        name: tensor
        for file in Path(folder).glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if "k_proj" not in name
    }
    save_file(state, tmp_path / "model.safetensors")
    result = run("plan", str(tmp_path), "--tp", "2")
    assert result.exit_code == 1
    assert "error: the plan has 3 problems:\n" in result.stderr
    assert "model.layers.{0..2}.self_attn.qkv_proj.weight, part 'k'" in result.stderr
    assert "(3 layers)" in result.stderr


# ----------------------------------------------------------------------------------- plan, inspect


def test_plan(folder: str) -> None:
    result = run("plan", folder, "--tp", "2")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "at TP 2\n" in result.stdout
    assert "✓ 237,888 elements in 21 parameters on 2 ranks" in result.stdout
    assert "  k     model.layers.{0..2}.self_attn.k_proj.weight  bf16[32, 96]   2 pieces\n" in (
        result.stdout
    )


def test_plan_of_one_rank(folder: str) -> None:
    result = run("plan", folder, "--tp", "2", "--rank", "1")
    assert result.exit_code == 0
    assert "[16:32, 0:96]   [48:64, 0:96]\n" in result.stdout


def test_plan_in_json_is_a_plan(folder: str, tmp_path: Path) -> None:
    from lading.plan_json import plan_from_json

    out = tmp_path / "plan.json"
    result = run("plan", folder, "--tp", "2", "--json", "--out", str(out))
    assert (result.exit_code, result.stderr) == (0, "")
    value = value_of(result)
    assert set(value) == {"ok", "command", "summary", "plan"}
    assert value["summary"]["tp_size"] == 2
    plan = plan_from_json(value["plan"])
    assert plan.digest == value["summary"]["digest"]
    assert plan_from_json(json.loads(out.read_text())) == plan


def test_plan_of_one_rank_in_json(folder: str) -> None:
    value = value_of(run("plan", folder, "--tp", "2", "--rank", "1", "--json"))
    assert [one["tp_rank"] for one in value["summary"]["ranks"]] == [1]


def test_plan_dtype(folder: str) -> None:
    result = run("plan", folder, "--dtype", "fp32")
    assert "fp32[192, 96]" not in result.stdout
    assert "fp32[160, 96], 3 layers" in result.stdout
    assert "cast:\n  model.embed_tokens.weight: bf16 to fp32\n" in result.stdout


def test_inspect(folder: str) -> None:
    result = run("inspect", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    for text in (
        f"{folder}: safetensors, 2 files, 30 tensors, 464 kB\n",
        "heads              6 of 16, 2 KV heads\n",
        "TP sizes           1, 2\n",
        "bf16        30  464 kB\n",
        "model.layers.{0..2}.self_attn.k_proj.weight          bf16[32, 96]   6.14 kB  3\n",
    ):
        assert text in result.stdout


def test_inspect_in_json(folder: str) -> None:
    value = value_of(run("inspect", folder, "--json"))
    assert value["tp_sizes"] == [1, 2]
    assert value["num_tensors"] == len(value["tensors"]) == 30
    assert value["config"]["family"] == "llama"
    assert {"name", "dtype", "shape", "num_bytes", "file"} == set(value["tensors"][0])


# ------------------------------------------------------------------------------------ load, verify


def test_load(three_heads: str) -> None:
    result = run("load", three_heads)
    assert (result.exit_code, result.stderr) == (0, "")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("158 kB in ")
    assert last.endswith("/s")
    assert "0     cpu     bf16" in result.stdout


def test_load_in_json(three_heads: str) -> None:
    result = shell("load", three_heads, "--tp", "3", "--json", "--dtype", "fp32")
    assert (result.returncode, result.stderr) == (0, "")
    value = json.loads(result.stdout)
    assert value["ok"] is True
    assert (value["command"], value["tp_size"], value["dtype"]) == ("load", 3, "F32")
    assert [one["tp_rank"] for one in value["ranks"]] == [0, 1, 2]
    speed = value["checkpoint_bytes"] / value["seconds"] / 1e9
    assert value["gigabytes_per_second"] == pytest.approx(speed)
    assert len(value["casts"]) == 21


def test_verify(three_heads: str) -> None:
    result = shell("verify", three_heads, "--tp", "3")
    assert (result.returncode, result.stderr) == (0, "")
    assert "✓ elements: all " in result.stdout
    assert "logits: " in result.stdout


def test_verify_in_json(folder: str) -> None:
    value = value_of(run("verify", folder, "--no-logits", "--json"))
    assert value["ok"] is True
    assert value["mismatches"] == 0
    assert value["elements_compared"] == 237216
    assert value["logits"]["compared"] is False
    assert value["logits"]["reason"] == "not asked for"
    assert value["load"]["tp_size"] == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_that_fails(folder: str, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    from lading.verify import Mismatch

    def wrong(*args: Any) -> Any:
        found = verify_rank(*args)
        first = Mismatch(
            parameter="p",
            part="k",
            tensor="t",
            file="f",
            index=(1, 2),
            found="0.5",
            expected="0.25",
        )
        elements = replace(found.elements, num_mismatches=1, first=first)
        return replace(found, elements=elements)

    monkeypatch.setattr("lading.verify.verify_rank", wrong)
    result = run("verify", folder, "--no-logits", *(["--json"] if as_json else []))
    assert result.exit_code == 1
    if as_json:
        value = value_of(result)
        assert value["ok"] is False
        assert value["error"]["error"] == "VerifyError"
        assert value["first_mismatches"][0]["index"] == [1, 2]
    else:
        assert "✗ elements: 1 of 237,216 differ from what safetensors" in result.stdout
        assert result.stderr == (
            "error: p, part 'k': element [1, 2] is 0.5, needs 0.25 (checkpoint tensor 't'); 1 of "
            "the rank's 237216 elements differ. In f. On rank 0.\n"
        )


# --------------------------------------------------------------------------------------- processes


def test_no_torch_where_none_is_needed(folder: str) -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from lading import cli\n"
        f"for args in (['--help'], ['inspect', {folder!r}], ['plan', {folder!r}, '--json']):\n"
        "    result = CliRunner().invoke(cli.app, args)\n"
        "    assert result.exit_code == 0, result.output\n"
        "    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (args, heavy)\n"
    )
    result = shell("-c", code, command=[sys.executable])
    assert (result.returncode, result.stderr) == (0, "")


def test_a_reader_that_leaves(folder: str) -> None:
    """`lading plan DIR --json | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [*COMMAND, "plan", folder, "--json"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert process.returncode == 141
    assert process.stderr == b""


@pytest.mark.parametrize("args", [("plan", "DIR"), ("plan", "DIR", "--json"), ("--help",)])
def test_a_full_disk(folder: str, args: tuple[str, ...]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        process = subprocess.run(
            [*COMMAND, *(folder if arg == "DIR" else arg for arg in args)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert process.returncode == 1
    assert process.stderr == "error: stdout cannot be written: No space left on device\n"


def test_closed_streams(folder: str) -> None:
    line = f"{sys.executable} -m lading inspect {folder}"
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        result = shell("-c", f"{line} {closed}", command=["bash"])
        assert (result.returncode, result.stderr) == (0, "")
    result = shell("-c", f"{line}/no >&-", command=["bash"])
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)


def test_a_terminal_in_ascii(folder: str) -> None:
    result = shell("plan", folder, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, "")
    assert "? 237,216 elements" in result.stdout


def test_torchrun(three_heads: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3"]
    command = [*torchrun, "-m", "lading"]
    result = shell("load", three_heads, "--json", command=command, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()  # rank 0 only
    value = json.loads(line)
    assert value["tp_size"] == len(value["ranks"]) == 3


def test_torchrun_decides_tp(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    planned = value_of(run("plan", folder, "--json"))
    assert planned["summary"]["tp_size"] == 2
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "plan.json"
    result = run("plan", folder, "--out", str(out))
    assert (result.exit_code, result.output, out.exists()) == (0, "", False)
    monkeypatch.setenv("RANK", "0")
    result = run("load", folder, "--tp", "4")
    assert result.exit_code == 2
    assert "is 4, needs 2 (WORLD_SIZE of the launcher)" in result.stderr.replace("\n│", "")
