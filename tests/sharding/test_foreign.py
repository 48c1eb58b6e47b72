"""Folders of ranks' files in the manner of other tools, cut by torch: merged and resharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lading
from lading.errors import CallError, ConfigError, FileError, LadingError, PlanError
from lading.pretrained import load_pretrained
from lading.ranks import all_ranks
from lading.sharding.foreign import describe_shards
from lading.sharding.verbs import merge, reshard_files
from tests.sharding.made import edit_json, made, rank_tensors, stored

Tensors = dict[str, torch.Tensor]


def saved_state(folder: Path, source: Path, tp_size: int, parts: int = 2) -> Path:
    """What vLLM's `save_sharded_state` writes: parts of each rank's state dict, and buffers."""
    full = stored(source)
    ranks = [rank_tensors(full, rank, tp_size) for rank in range(tp_size)]
    for tensors in ranks:
        tensors["model.layers.0.self_attn.attn._k_scale"] = torch.ones(())
    write(folder, ranks, parts)
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write(folder: Path, ranks: list[Tensors], parts: int = 1) -> None:
    folder.mkdir()
    for rank, tensors in enumerate(ranks):
        names = list(tensors)
        for part in range(parts):
            mine = {name: tensors[name].contiguous() for name in names[part::parts]}
            save_file(mine, folder / f"model-rank-{rank}-part-{part}.safetensors")


def assert_equal(found: Mapping[str, torch.Tensor], needed: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == needed.keys()
    for name, tensor in needed.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_sharded_state(tp_size: int, tied: bool, tmp_path: Path) -> None:
    source = made(tmp_path / "source", tie_word_embeddings=tied)
    state = saved_state(tmp_path / "state", source, tp_size)
    described = describe_shards(state, tp_size=tp_size)
    merge(described, out=tmp_path / "merged")
    assert_equal(stored(tmp_path / "merged"), stored(source))
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    for m in (1, 2, 8):
        out = tmp_path / f"tp{m}"
        reshard_files(described, tp_size=m, out=out)
        for rank in range(m):
            found = load_file(out / f"model-rank-{rank:05}-of-{m:05}.safetensors")
            assert_equal(found, rank_tensors(stored(source), rank, m))


def test_what_was_resharded_loads(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    state = saved_state(tmp_path / "state", source, 4)
    reshard_files(describe_shards(state, tp_size=4), tp_size=2, out=tmp_path / "tp2")
    for ranks in all_ranks(2):
        one, _ = load_pretrained(source, ranks=ranks, device="cpu")
        two, _ = load_pretrained(tmp_path / "tp2", ranks=ranks, device="cpu")
        assert_equal(dict(two.named_parameters()), dict(one.named_parameters()))
    merge(tmp_path / "tp2", out=tmp_path / "merged")
    assert_equal(stored(tmp_path / "merged"), stored(source))


def test_loading_a_described_folder(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    state = saved_state(tmp_path / "state", source, 4)
    checkpoint = describe_shards(state, tp_size=4).checkpoint
    for size in (1, 2, 4):
        for ranks in all_ranks(size):
            model, _ = load_pretrained(source, ranks=ranks, device="cpu")
            needed = {name: param.clone() for name, param in model.named_parameters()}
            with torch.no_grad():
                for param in model.parameters():
                    param.zero_()
            lading.load(model, checkpoint, ranks=ranks)
            assert_equal(dict(model.named_parameters()), needed)


def test_the_tied_name(tmp_path: Path) -> None:
    # Of tensors that share memory the engine keeps one name, whichever.
    source = made(tmp_path / "source", tie_word_embeddings=True)
    ranks = [rank_tensors(stored(source), rank, 2) for rank in range(2)]
    for tensors in ranks:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    write(tmp_path / "state", ranks)
    (tmp_path / "state" / "config.json").write_bytes((source / "config.json").read_bytes())
    merge(describe_shards(tmp_path / "state", tp_size=2), out=tmp_path / "merged")
    assert_equal(stored(tmp_path / "merged"), stored(source))


@pytest.mark.parametrize("tp_size", [2, 4])
def test_raw_rows(tp_size: int, tmp_path: Path) -> None:
    # 8 heads and 2 KV heads of 6: 72 rows of q, k and v together, 18 on each of 4 ranks
    source = made(tmp_path / "source", num_hidden_layers=1)
    full = stored(source)
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    qkv = torch.cat([full[f"{attention}.{part}_proj.weight"] for part in "qkv"])
    gate_up = torch.cat([full[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up")])
    ranks = []
    for rank in range(tp_size):
        tensors = {
            f"decoder.{name}": tensor for name, tensor in rank_tensors(full, rank, tp_size).items()
        }
        tensors[f"decoder.{attention}.linear_qkv.weight"] = qkv.chunk(tp_size)[rank]
        del tensors[f"decoder.{attention}.qkv_proj.weight"]
        tensors[f"decoder.{mlp}.gate_up_proj.weight"] = gate_up.chunk(tp_size)[rank]
        ranks.append(tensors)
    write(tmp_path / "state", ranks)
    (tmp_path / "state" / "config.json").write_bytes((source / "config.json").read_bytes())
    described = describe_shards(
        tmp_path / "state",
        tp_size=tp_size,
        files=[[f"model-rank-{rank}-part-0.safetensors"] for rank in range(tp_size)],
        renames={r"^decoder\.": "", r"\.linear_qkv\.": ".qkv_proj."},
        raw_rows=[r".*\.qkv_proj\.weight", r".*\.gate_up_proj\.weight"],
    )
    merge(described, out=tmp_path / "merged")
    needed = {
        name: tensor
        for name, tensor in full.items()
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj"))
    }
    needed |= {f"{attention}.qkv_proj.weight": qkv, f"{mlp}.gate_up_proj.weight": gate_up}
    assert_equal(stored(tmp_path / "merged"), needed)
    for m in (1, 2, 8):
        reshard_files(described, tp_size=m, out=tmp_path / f"tp{m}")
        for rank in range(m):
            found = load_file(tmp_path / f"tp{m}" / f"model-rank-{rank:05}-of-{m:05}.safetensors")
            assert_equal(found, rank_tensors(full, rank, m))


def test_raw_rows_of_three_ranks(tmp_path: Path) -> None:
    # q has 18 rows, k and v 18 each: with 3 heads on 3 ranks rank 0 has q, rank 1 k, rank 2 v
    source = made(
        tmp_path / "source",
        num_attention_heads=3,
        num_key_value_heads=3,
        intermediate_size=30,
        num_hidden_layers=1,
        vocab_size=192,
    )
    full = stored(source)
    attention = "model.layers.0.self_attn"
    ranks = []
    for rank in range(3):
        tensors = {
            name: tensor.chunk(3)[rank] if name.startswith(("model.embed", "lm_head")) else tensor
            for name, tensor in full.items()
            if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate", "up_proj"))
        }
        for name in (f"{attention}.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            tensors[name] = tensors[name].chunk(3, 1)[rank]
        gates = [full[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        both = torch.cat([one.chunk(3)[rank] for one in gates])
        tensors["model.layers.0.mlp.gate_up_proj.weight"] = both
        qkv = full[f"{attention}.{'qkv'[rank]}_proj.weight"]
        tensors[f"{attention}.qkv_proj.weight"] = qkv
        ranks.append(tensors)
    write(tmp_path / "state", ranks)
    (tmp_path / "state" / "config.json").write_bytes((source / "config.json").read_bytes())
    described = describe_shards(tmp_path / "state", tp_size=3, raw_rows=[r".*qkv_proj\.weight"])
    reshard_files(described, tp_size=3, out=tmp_path / "tp3")
    for rank in range(3):
        found = load_file(tmp_path / "tp3" / f"model-rank-{rank:05}-of-00003.safetensors")
        parts = [full[f"{attention}.{part}_proj.weight"].chunk(3)[rank] for part in "qkv"]
        assert torch.equal(found[f"{attention}.qkv_proj.weight"], torch.cat(parts))


# ------------------------------------------------------------------------------------------ faults


def change(
    name: str, make: Callable[[torch.Tensor], torch.Tensor] | None
) -> Callable[[Path], None]:
    """Rank 1's tensor made into another, or taken away."""

    def edit(folder: Path) -> None:
        for file in folder.glob("model-rank-1-*"):
            tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
            if name in tensors:
                tensor = tensors.pop(name)
                if make is not None:
                    tensors[name] = make(tensor)
                save_file(tensors, file)

    return edit


def surplus(folder: Path) -> None:
    file = folder / "model-rank-0-part-0.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    save_file(tensors | {"more": torch.zeros(2)}, file)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (change(NORM, None), f"{NORM}: no file of the rank has it. On rank 1."),
        (
            change(NORM, lambda t: t[:-1].clone()),
            f"{NORM}: is bf16[23], needs bf16[24] (what a rank keeps of it). In "
            "model-rank-1-part-0.safetensors. On rank 1.",
        ),
        (
            change(NORM, lambda t: t.float()),
            f"{NORM}: is fp32[24], needs bf16[24] (as on another rank). In "
            "model-rank-1-part-0.safetensors. On rank 1.",
        ),
        (
            surplus,
            "more: is fp32[2], and the model has no such tensor. In "
            "model-rank-0-part-0.safetensors. On rank 0.",
        ),
    ],
)
def test_faults(edit: Callable[[Path], None], text: str, tmp_path: Path) -> None:
    state = saved_state(tmp_path / "state", made(tmp_path / "source"), 2, parts=1)
    edit(state)
    with pytest.raises(PlanError) as caught:
        describe_shards(state, tp_size=2)
    assert [str(problem) for problem in caught.value.problems] == [text]


@pytest.mark.parametrize(
    ("edit", "options", "kind", "text"),
    [
        (
            lambda f: (f / "model-rank-1-part-1.safetensors").unlink(),
            {},
            PlanError,
            "no file of the rank has it",
        ),
        (
            lambda f: (f / "model-rank-1-part-0.safetensors").unlink(),
            {},
            FileError,
            "has parts 1 of rank 1, needs all from 0 on.",
        ),
        (
            lambda f: None,
            {"tp_size": 4},
            FileError,
            "of these ranks: 0, 1; needs 0 to 3 (tp_size is 4).",
        ),
        (lambda f: (f / "config.json").unlink(), {}, ConfigError, "config.json: is missing"),
        (
            lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "fp8"}),
            {},
            ConfigError,
            "quantization_config: declares a quantised model, needs a dense one",
        ),
        (lambda f: None, {"files": [["a.safetensors"]]}, CallError, "are of 1 ranks, needs 2"),
        (
            lambda f: None,
            {"files": [["../a.safetensors"], []]},
            CallError,
            "names '../a.safetensors', needs .safetensors files in the folder itself",
        ),
    ],
)
def test_folders_that_cannot_be(
    edit: Callable[[Path], Any],
    options: dict[str, Any],
    kind: type[LadingError],
    text: str,
    tmp_path: Path,
) -> None:
    state = saved_state(tmp_path / "state", made(tmp_path / "source"), 2)
    edit(state)
    with pytest.raises(kind) as caught:
        describe_shards(state, **{"tp_size": 2, **options})
    assert text in str(caught.value)
