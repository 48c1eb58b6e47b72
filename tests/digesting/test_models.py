"""Digests of live models over all ranks, against the folder's; faults on one rank."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lading
from lading import launch
from lading.demo import write_checkpoint
from lading.digesting.models import check_digests, combined, digest_of_model, held_by
from lading.digesting.report import DigestReport
from lading.errors import CallError, PlanError
from lading.loading import load
from lading.pretrained import load_pretrained
from lading.ranks import Ranks, all_ranks
from tests import loading_made
from tests.digests import oracle
from tests.end_to_end.checkpoints import checkpoint
from tests.schemes.checkpoints import (
    FP8_CONFIG,
    GPTQ_CONFIG,
    Tensors,
    fp8_static,
    gptq,
    model_tensors,
    write_model,
)


def report_of(models: list[nn.Module]) -> DigestReport:
    """What all ranks together say, in one process."""
    mine = [
        held_by(model, ranks) for model, ranks in zip(models, all_ranks(len(models)), strict=True)
    ]
    return combined(mine[0], [one.sums for one in mine], time.perf_counter())


def models_of(folder: Path, tp_size: int, **options: Any) -> list[nn.Module]:
    return [
        load_pretrained(folder, ranks=ranks, device="cpu", **options)[0]
        for ranks in all_ranks(tp_size)
    ]


def hexes(report: DigestReport) -> dict[str, str]:
    return {name: value.hex for name, value in report.tensors.items()}


# ------------------------------------------------------------------------------ the same at any TP


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", False)])
def test_families(family: str, tied: bool, tp_size: int) -> None:
    """Two KV heads for up to 8 ranks, a padded vocabulary of 101, biases, three files."""
    folder = checkpoint(family, tied=tied, files=3)
    models = models_of(folder, tp_size)
    found = report_of(models)
    assert hexes(found) == oracle.of_folder(folder)
    assert (found.kind, found.ok, found.left_out) == ("model", True, {})
    for model, ranks in zip(models, all_ranks(tp_size), strict=True):
        check = check_digests(model, folder, ranks)
        assert (check.tp_rank, check.mismatches) == (ranks.tp_rank, ())
        assert check.num_bytes > 0


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("three")
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 96}
    write_checkpoint(str(path), hidden_size=48, vocab_size=101, **changes)
    return path


def test_three_ranks_of_three_heads(three: Path) -> None:
    assert hexes(report_of(models_of(three, 3))) == oracle.of_folder(three)


FORMATS: dict[str, tuple[Callable[[int, int], Tensors], dict[str, Any]]] = {
    "gptq": (gptq, GPTQ_CONFIG),
    "fp8": (fp8_static, FP8_CONFIG),
}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised(name: str, tp_size: int, tmp_path: Path) -> None:
    make, config = FORMATS[name]
    torch.manual_seed(3)
    folder = write_model(tmp_path, model_tensors(make), config)
    models = models_of(folder, tp_size)
    found = report_of(models)
    expected = oracle.of_folder(folder)
    constants = {key for key in expected if key.endswith(".g_idx")}
    assert set(found.left_out) == constants
    assert hexes(found) == {k: v for k, v in expected.items() if k not in constants}
    assert found.differences(lading.digest(folder)) == ()
    assert lading.digest(folder).differences(found) == ()
    for model, ranks in zip(models, all_ranks(tp_size), strict=True):
        assert check_digests(model, folder, ranks).mismatches == ()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tp_size", [1, 3, 6, 12])
def test_blocks_of_layers(tmp_path: Path, fused: bool, tp_size: int) -> None:
    """Fused parameters that come whole or in parts; 3 KV heads, up to 4 ranks each."""
    heads = {"heads": 12, "kv_heads": 3}
    needed = loading_made.shapes(**heads, fused=fused)
    folder = loading_made.save(tmp_path, loading_made.indices(needed, torch.float32), 2)
    models: list[nn.Module] = []
    for ranks in all_ranks(tp_size):
        model = loading_made.on_meta(ranks, **heads, dtype=torch.float32)
        load(model, folder, ranks=ranks, device="cpu")
        models.append(model)
    assert hexes(report_of(models)) == oracle.of_folder(folder)


def test_a_stored_twin_of_a_tied_tensor(tmp_path: Path) -> None:
    """No rank keeps it; it was compared when it was loaded, and has the same digest."""
    write_checkpoint(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tensors = {k: t for f in tmp_path.glob("*.safetensors") for k, t in load_file(f).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for file in tmp_path.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    found = report_of(models_of(tmp_path, 2))
    assert hexes(found) == oracle.of_folder(tmp_path)


def test_tensors_without_elements(tmp_path: Path) -> None:
    tensors = {"rows": torch.zeros(0, 5), "columns": torch.zeros(4, 0), "one": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(torch.empty_like(tensor)))
    load(model, tmp_path)
    assert hexes(lading.digest(model)) == oracle.of_folder(tmp_path)


def test_dtypes_that_lose_nothing(three: Path) -> None:
    """bf16 values in fp32 parameters are the file's again; the check casts the file's."""
    models = models_of(three, 3, dtype=torch.float32)
    assert hexes(report_of(models)) == oracle.of_folder(three)
    for model, ranks in zip(models, all_ranks(3), strict=True):
        assert check_digests(model, three, ranks).mismatches == ()


def test_values_that_were_rounded(tmp_path: Path) -> None:
    """fp32 in bf16 parameters: other digests than the file's, but the regions can be compared."""
    write_checkpoint(str(tmp_path), dtype="float32")
    (model,) = models_of(tmp_path, 1, dtype=torch.bfloat16)
    expected = oracle.of_folder(tmp_path)
    found = hexes(report_of([model]))
    assert all(found[name] != value for name, value in expected.items())
    assert check_digests(model, tmp_path).mismatches == ()


def test_values_that_the_file_cannot_hold(three: Path) -> None:
    """fp32 parameters of a bf16 checkpoint, changed since."""
    (model,) = models_of(three, 1, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        parameters[name].data += 1e-7
    with pytest.raises(PlanError) as caught:
        held_by(model, Ranks())
    first, second = sorted(caught.value.problems, key=lambda problem: str(problem.subject))
    assert first.subject == "model.layers.0.mlp.down_proj.weight"
    assert second.subject == "model.norm.weight"
    assert "needs a cast that loses nothing" in str(second)


def test_padding_is_no_part(three: Path) -> None:
    models = models_of(three, 3)
    before = hexes(report_of(models))
    last = dict(models[2].named_parameters())["model.embed_tokens.weight"]
    assert not last[-1].any()
    with torch.no_grad():
        last[-1] = 7
    assert hexes(report_of(models)) == before
    assert check_digests(models[2], three, Ranks(tp_rank=2, tp_size=3)).mismatches == ()


# ----------------------------------------------------------------------------- faults on one rank


def flip(model: nn.Module, name: str, index: tuple[int, ...], bit: int = 0) -> None:
    """Flips a bit of one bf16 element of a parameter."""
    bits = dict(model.named_parameters())[name].data.view(torch.int16)
    bits[index] = int(bits[index]) ^ (1 << bit)


def test_a_flipped_bit_is_named(three: Path) -> None:
    """Row 3 of rank 1's k, in its fused parameter of 16 + 16 + 16 rows, is row 19 of the file's."""
    models = models_of(three, 3)
    head = json.loads((three / "config.json").read_text())["head_dim"]
    name = "model.layers.1.self_attn.qkv_proj.weight"
    flip(models[1], name, (head + 3, 5), bit=14)
    found = report_of(models)
    (one,) = found.differences(lading.digest(three))
    assert one.tensor == "model.layers.1.self_attn.k_proj.weight"
    assert found.ok  # nobody else holds it
    checks = [check_digests(m, three, r) for m, r in zip(models, all_ranks(3), strict=True)]
    assert [len(check.mismatches) for check in checks] == [0, 1, 0]
    (wrong,) = checks[1].mismatches
    assert (wrong.tp_rank, wrong.tensor) == (1, "model.layers.1.self_attn.k_proj.weight")
    assert (wrong.parameter, wrong.part) == (name, "k")
    assert (wrong.region, wrong.element) == (f"[{head}:{2 * head}, 0:48]", f"[{head + 3}, 5]")
    file = wrong.file
    assert str(wrong.error()) == (
        f"{name}, part 'k': region [{head}:{2 * head}, 0:48] of checkpoint tensor "
        "'model.layers.1.self_attn.k_proj.weight' has another digest than in the file, needs the "
        f"same (element [{head + 3}, 5] differs). In {file}. On rank 1."
    )


def test_a_flipped_bit_of_a_row_cut(three: Path) -> None:
    """Rank 2 holds columns 64:96 of the down projection; the last element, the lowest bit."""
    models = models_of(three, 3)
    name = "model.layers.0.mlp.down_proj.weight"
    flip(models[2], name, (47, 31))
    (wrong,) = check_digests(models[2], three, Ranks(tp_rank=2, tp_size=3)).mismatches
    assert (wrong.region, wrong.element) == ("[0:48, 64:96]", "[47, 95]")


def test_a_replica_that_differs() -> None:
    """Four ranks share two KV heads: ranks 2 and 3 hold the same rows of k."""
    folder = checkpoint("llama", files=3)
    models = models_of(folder, 4)
    name = "model.layers.2.self_attn.qkv_proj.weight"
    parameters = dict(models[3].named_parameters())
    rows = parameters[name].shape[0]  # 2 q heads, k, v, of 12 rows each
    assert rows == 48
    with torch.no_grad():
        parameters[name][24 + 1, 2] += 1
    found = report_of(models)
    assert [str(one) for one in found.replicas] == [
        "model.layers.2.self_attn.k_proj.weight: region [12:24, 0:64] differs on rank 2 "
        f"({name}) and on rank 3 ({name}), needs the same bytes (both hold it)"
    ]
    assert not found.ok
    value = json.loads(json.dumps(found.to_dict()))
    assert value["replicas"][0]["ranks"] == [2, 3]


def test_zeros_for_a_rank(three: Path) -> None:
    models = models_of(three, 3)
    for parameter in models[1].parameters():
        parameter.data.zero_()
    found = check_digests(models[1], three, Ranks(tp_rank=1, tp_size=3))
    assert len(found.mismatches) == found.num_regions


# ----------------------------------------------------------------------------------------- ranks


def over_the_group(ranks: Ranks, folder: str, wrong: bool) -> dict[str, Any]:
    model, _ = load_pretrained(folder, ranks=ranks, device="cpu")
    if wrong and ranks.tp_rank == 1:
        flip(model, "model.norm.weight", (0,))
    return lading.digest(model).to_dict()


def test_ranks_exchange_their_sums(three: Path) -> None:
    for one in launch.run_ranks(over_the_group, 3, (str(three), True)):
        found = {name: value["digest"] for name, value in one["tensors"].items()}
        assert found == oracle.of_folder(three)
        (replica,) = one["replicas"]
        assert (replica["tensor"], replica["ranks"]) == ("model.norm.weight", [0, 1])


def one_rank_lost_its_origin(ranks: Ranks, folder: str) -> str:
    model, _ = load_pretrained(folder, ranks=ranks, device="cpu")
    if ranks.tp_rank == 1:
        from lading.loading import _origins

        _origins.pop(model)
    try:
        digest_of_model(model)
    except CallError as error:
        return str(error)
    return ""


def test_every_rank_raises(three: Path) -> None:
    found = launch.run_ranks(one_rank_lost_its_origin, 3, (str(three),))
    assert set(found) == {
        "CausalLM: was not filled by lading.load (or a load has failed since), needs to know its "
        "checkpoint's tensors. On rank 1. Try: lading.load(model, DIR)."
    }


def test_alone(three: Path) -> None:
    (model, *_) = models_of(three, 3)
    with pytest.raises(CallError) as caught:
        lading.digest(model)
    assert str(caught.value) == (
        "digest: rank 0 of 3 holds a part of each tensor, and this process is in no process group "
        "of that size, needs the other ranks' sums. Try: start the ranks with torchrun, or pass "
        "group=."
    )


def test_something_else() -> None:
    with pytest.raises(CallError) as caught:
        lading.digest(7)  # type: ignore[arg-type]
    assert str(caught.value) == "digest: is a int, needs a path, a Checkpoint or a model."


def test_a_model_that_was_not_loaded() -> None:
    model = nn.Linear(3, 3)
    with pytest.raises(CallError, match="was not filled by"):
        lading.digest(model)
