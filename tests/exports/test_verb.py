"""load → export: files with the same sha256; and what an export refuses, with nothing changed.

The oracles are the files that transformers and others wrote, and safetensors. All ranks are in one
process here; test_exporting_ranks has real ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lading
from lading.errors import ConflictError, DtypeError, FileError, LadingError, PlanError
from lading.nn import ParallelLayer
from lading.parameter import BasevLLMParameter, permute_param_layout_
from lading.ranks import Ranks, all_ranks
from lading.sharding.verbs import shard
from tests.end_to_end.checkpoints import FAMILIES, checkpoint
from tests.loading_made import indices, on_meta, save, shapes
from tests.schemes.cutting import fixture
from tests.schemes.test_fixtures import CASES

from .made import export_all, files_of, models_of, same_bits, tensors_of

OWN = {"logits.pt", "logits_reference.safetensors", "dequant_reference.safetensors"}
"""What the tests put beside a checkpoint: weights in other files, which are left out."""


def expected(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in files_of(folder).items() if name not in OWN}


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_files(family: str, tp_size: int, tmp_path: Path) -> None:
    # 101 words are padded, 2 KV heads are shared at TP 4 and 8, qwen2 has biases.
    tied, files = family in ("llama", "qwen2"), 1 if family == "mistral" else 3
    folder = checkpoint(family, tied=tied, files=files)
    report = export_all(models_of(folder, tp_size), tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(folder)
    assert report.num_bytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert report.padding == ()
    assert report.casts == ()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_three_ranks_of_three_heads(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", indices(shapes(heads=3, kv_heads=3)), files=2)
    models: dict[Ranks, nn.Module] = {}
    for ranks in all_ranks(3):
        models[ranks] = on_meta(ranks, heads=3, kv_heads=3, dtype=torch.float64)
        lading.load(models[ranks], folder, ranks=ranks)
    export_all(models, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(folder)


@pytest.mark.parametrize(
    ("name", "tp_size"), [(name, case.sizes[-1]) for name, case in CASES.items()]
)
def test_every_quantised_format(name: str, tp_size: int, tmp_path: Path) -> None:
    folder = fixture(name)
    # Its norms are fp32 and its config says fp16: only a load into fp32 loses nothing.
    dtype = torch.float32 if name == "awq-gemm-w4-g64" else None
    export_all(models_of(folder, tp_size, dtype), tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(folder)


def test_what_the_load_has_rounded_is_said(tmp_path: Path) -> None:
    folder = fixture("awq-gemm-w4-g64")
    report = export_all(models_of(folder, 2), tmp_path / "out")
    assert (
        "7 parameters of the model in fp16, of the checkpoint in fp32: the values are those of fp16"
        in report.notes
    )
    before, after = tensors_of_file(folder / "model.safetensors"), tensors_of(tmp_path / "out")
    for name, tensor in before.items():
        rounded = tensor.half().float() if tensor.dtype == torch.float32 else tensor
        assert same_bits(after[name], rounded), name


@pytest.mark.parametrize("name", ["gptq-v1-w4-g64-asym", "fp8-block128", "ct-w4a16-g64-sym"])
def test_dtypes_go_back(name: str, tmp_path: Path) -> None:
    folder = fixture(name)
    report = export_all(models_of(folder, 2, torch.float32), tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(folder)
    assert report.casts
    assert {cast[1] for cast in report.casts} == {"F32"}


def test_values_that_the_file_cannot_hold(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", indices(shapes(), torch.bfloat16))
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, folder)
    model.norm.data[2] *= 1.001
    with pytest.raises(DtypeError) as error:
        lading.export(model, tmp_path / "out")
    assert str(error.value) == (
        "norm: 1 values of fp32 are no bf16 values, needs a cast that loses nothing (bf16 is the "
        "checkpoint's dtype). Try: model.to(torch.bfloat16) before the export, or as_new=True (a "
        "file in fp32)."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_changed_model_gives_its_values(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=2)
    models = models_of(folder, 4)
    for model in models.values():
        for name, param in model.named_parameters():
            if "layernorm" in name or "down_proj" in name:
                param.data.mul_(2)  # exact, so that what is expected is known
    export_all(models, tmp_path / "out")
    before, after = tensors_of(folder), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        factor = 2 if "layernorm" in name or "down_proj" in name else 1
        assert same_bits(after[name], tensor * factor), name
    assert files_of(folder).keys() - OWN == files_of(tmp_path / "out").keys()


# ----------------------------------------------------------------------------------- found faults


def test_a_changed_replica_is_named(tmp_path: Path) -> None:
    models = models_of(checkpoint("qwen3", files=2), 4)
    broken = dict(models[Ranks(tp_rank=3, tp_size=4)].named_parameters())
    name = "model.layers.1.self_attn.qkv_proj.weight"
    head = 12  # 2 q heads of 12, then one k head that ranks 2 and 3 share
    broken[name].data[2 * head + 5, 7] += 1
    with pytest.raises(ConflictError) as error:
        export_all(models, tmp_path / "out")
    assert str(error.value) == (
        f"{name}, part 'k': rank 2 of 4 and rank 3 of 4 hold other values for checkpoint tensor "
        "'model.layers.1.self_attn.k_proj.weight' [12:24, 0:64] of [24, 64], needs equal ones "
        "(they are copies of the same elements)."
    )
    assert list(tmp_path.iterdir()) == []


def test_padding_with_values_is_said(tmp_path: Path) -> None:
    folder = checkpoint("mistral")
    models = models_of(folder, 2)
    last = dict(models[Ranks(tp_rank=1, tp_size=2)].named_parameters())["lm_head.weight"]
    last.data[-1, 3] = 1.0  # the vocabulary ends before
    report = export_all(models, tmp_path / "out")
    assert report.padding == ("lm_head.weight",)
    assert files_of(tmp_path / "out") == expected(folder)


class Doubled:
    """A kernel that keeps something else than the stored weights."""

    unpack: Callable[[ParallelLayer], None] | None = None

    def pack(self, layer: ParallelLayer) -> None:
        weight = layer._parameters["weight"]
        assert weight is not None
        weight.data = weight.data * 2

    def apply(self, layer: ParallelLayer, x: Any, bias: Any) -> Any:
        raise NotImplementedError


def test_a_kernels_own_format_is_refused(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=2)
    model = lading.from_pretrained(folder, ranks=Ranks(), device="cpu")
    layers = dict(model.named_modules())
    for number in (0, 1):
        layer = layers[f"model.layers.{number}.mlp.down_proj"]
        assert isinstance(layer, ParallelLayer)
        layer.process_weights_after_loading(Doubled())
    with pytest.raises(PlanError) as error:
        lading.export(model, tmp_path / "out")
    assert [str(problem) for problem in error.value.problems] == [
        f"model.layers.{number}.mlp.down_proj: holds its weights in the format of Doubled, needs "
        "the stored form (the kernel declares no way back: load the model again)."
        for number in (0, 1)
    ]


def test_a_kernel_with_a_way_back(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=3)
    model = lading.from_pretrained(folder, ranks=Ranks(), device="cpu")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, ParallelLayer)
    kernel = Doubled()
    kernel.unpack = lambda packed: vars(packed)["_parameters"]["weight"].data.div_(2)
    layer.process_weights_after_loading(kernel)
    with pytest.raises(PlanError, match=r"Try: layer.restore_weights\(\) before the export"):
        lading.export(model, tmp_path / "out")
    layer.restore_weights()
    lading.export(model, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(folder)


def test_permuted_parameters_go_back(tmp_path: Path) -> None:
    folder = checkpoint("qwen2", files=2)
    models = models_of(folder, 2)
    for model in models.values():
        for param in model.parameters():
            if isinstance(param, BasevLLMParameter) and param.dim() == 2:
                permute_param_layout_(param, input_dim=0, output_dim=1)
    export_all(models, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(folder)


# ----------------------------------------------------------------------------------- destinations


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=2)
    model = lading.from_pretrained(folder, ranks=Ranks(), device="cpu")
    out = shutil.copytree(folder, tmp_path / "out")
    (out / "note.txt").write_text("mine")
    before = files_of(out)
    with pytest.raises(FileError, match="is there and is not empty, needs an empty folder"):
        lading.export(model, out)
    assert files_of(out) == before
    lading.export(model, out, overwrite=True)
    assert files_of(out) == expected(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{}, {"as_new": True}, {"source": "other"}], ids=str)
def test_over_the_checkpoint_itself(options: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama", files=2), tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    if "source" in options:
        options = {"source": shutil.copytree(folder, tmp_path / "other")}
    before = files_of(folder)
    models = models_of(folder, 2)
    for place in ("model", "link", "link/new"):
        with pytest.raises(FileError, match=r"which is read, needs a place apart. Try: another fo"):
            export_all(models, tmp_path / place, overwrite=True, **options)
    assert files_of(folder) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"model", "link", "other"}


# ---------------------------------------------------------------------------------- other sources


def test_files_that_are_gone(tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama", tied=True, files=2), tmp_path / "in")
    models = models_of(folder, 2)
    before, config = tensors_of(folder), (folder / "config.json").read_text()
    shutil.rmtree(folder)
    report = export_all(models, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], tensor) for name, tensor in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(config)
    assert any("cannot be read any more" in note for note in report.notes)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()


def test_tensors_that_only_files_have(tmp_path: Path) -> None:
    tensors = indices(shapes(), torch.float32)
    tensors["rotary_emb.inv_freq"] = torch.rand(3)
    tensors["a.rotary_emb.inv_freq"] = torch.rand(5)
    folder = save(tmp_path / "in", tensors, files=2)
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, folder)
    lading.export(model, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(folder)
    shutil.rmtree(folder)
    with pytest.raises(PlanError) as error:
        lading.export(model, tmp_path / "again")
    assert [(p.subject, p.fact) for p in error.value.problems] == [
        (
            name,
            "cannot be written: no rank keeps it (rotary frequencies are computed from "
            "config.json), and its file is gone",
        )
        for name in ("rotary_emb.inv_freq", "a.rotary_emb.inv_freq")
    ]


def test_a_file_that_has_changed(tmp_path: Path) -> None:
    folder = save(tmp_path / "in", indices(shapes(), torch.float32))
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, folder)
    save(folder, {"other": torch.zeros(3)})
    with pytest.raises(PlanError, match="has other tensors than when the model was loaded"):
        lading.export(model, tmp_path / "out")


def test_a_tied_twin_is_written_twice(tmp_path: Path) -> None:
    folder = checkpoint("llama", tied=True)
    twice = tmp_path / "in"
    shutil.copytree(folder, twice)
    tensors = tensors_of(twice)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save(twice, tensors)
    export_all(models_of(twice, 2), tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(twice)


def test_torch_files_become_safetensors(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = checkpoint("qwen2", tied=True, files=1)
    tensors = tensors_of(whole)
    shutil.copy(whole / "config.json", folder)
    names = list(tensors)
    groups = {"pytorch_model-00001-of-00002.bin": names[::2]}
    groups["pytorch_model-00002-of-00002.bin"] = names[1::2]
    for file, group in groups.items():
        torch.save({name: tensors[name] for name in group}, folder / file)
    weight_map = {name: file for file, group in groups.items() for name in group}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    report = export_all(models_of(folder, 2), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    assert sorted(files_of(tmp_path / "out")) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert any("has torch files" in note for note in report.notes)


@pytest.mark.parametrize("name", ["gptq-v1-w4-g64-asym", ""])
def test_a_pre_sharded_folder_gives_the_original_files(name: str, tmp_path: Path) -> None:
    folder = fixture(name) if name else checkpoint("qwen2", files=3)
    shard(folder, tp_size=2, out=tmp_path / "shards")
    for tp_size in (2, 4):
        out = tmp_path / str(tp_size)
        report = export_all(models_of(tmp_path / "shards", tp_size), out)
        assert files_of(out) == expected(folder)
        assert report.notes == ()


def test_parameters_made_in_inference_mode(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=3)
    with torch.inference_mode():
        models = models_of(folder, 2, torch.float64)  # each block is cast
        export_all(models, tmp_path / "out")
    assert files_of(tmp_path / "out") == expected(folder)


def test_another_source(tmp_path: Path) -> None:
    one, two = checkpoint("llama", files=3), checkpoint("llama", files=1)
    report = export_all(models_of(one, 2), tmp_path / "out", source=two)
    assert files_of(tmp_path / "out") == expected(two)
    assert report.files == ("model.safetensors",)


# -------------------------------------------------------------------------------- new checkpoints


@pytest.mark.parametrize("name", ["gptq-v1-w4-g64-asym", "modelopt-nvfp4", "ct-int8-w8a8-channel"])
def test_as_new_has_the_same_tensors(name: str, tmp_path: Path) -> None:
    folder = fixture(name)
    report = export_all(models_of(folder, 2), tmp_path / "out", as_new=True)
    before = {
        key: value
        for file in folder.glob("model*.safetensors")
        for key, value in tensors_of_file(file).items()
    }
    after = tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert same_bits(after[key], tensor.reshape(after[key].shape)), key
    assert report.notes == (
        "there is no config.json: as_new takes none from the checkpoint that was loaded, and the "
        "model has none",
    )


def tensors_of_file(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(file))


def test_a_model_from_nowhere(tmp_path: Path) -> None:
    full = indices(shapes(), torch.float32)
    folder = save(tmp_path / "in", full)
    models: dict[Ranks, nn.Module] = {}
    for ranks in all_ranks(4):
        models[ranks] = on_meta(ranks, dtype=torch.float32)
        lading.load(models[ranks], folder, ranks=ranks)
    report = export_all(models, tmp_path / "out", as_new=True, max_file_bytes=5000)
    found = tensors_of(tmp_path / "out")
    assert found.keys() == full.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in full.items())
    assert len(report.files) > 2
    for file in report.files:
        held = tensors_of_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in held.values()) <= 5000 or len(held) == 1
    assert lading.open_checkpoint(tmp_path / "out").tensors.keys() == full.keys()


def test_a_tie_that_was_cut(tmp_path: Path) -> None:
    folder = checkpoint("llama", tied=True)
    model = lading.from_pretrained(folder, ranks=Ranks(), device="cpu")
    weight = model.get_parameter("lm_head.weight").data.clone() * 2
    vars(model.get_submodule("lm_head"))["_parameters"]["weight"] = nn.Parameter(weight)
    with pytest.raises(PlanError) as error:
        lading.export(model, tmp_path / "out")
    assert str(error.value) == (
        "lm_head.weight: is a parameter that the model did not have when it was loaded. Try: "
        "as_new=True, or source= with a checkpoint that has what the model has."
    )
    lading.export(model, tmp_path / "out", as_new=True)
    found, before = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert found.keys() == before.keys() | {"lm_head.weight"}
    # A plain parameter says nothing of padding, and is written with the 27 rows of it.
    head = found["lm_head.weight"]
    assert torch.equal(head[:101], before["model.embed_tokens.weight"] * 2)
    assert not head[101:].any()


def test_transformers_reads_what_was_exported(tmp_path: Path) -> None:
    import transformers

    from tests.end_to_end.inputs import input_ids

    folder = checkpoint("qwen3", tied=False, files=3)
    export_all(models_of(folder, 4), tmp_path / "same")
    export_all(models_of(folder, 4), tmp_path / "new", as_new=True)
    shutil.copy(folder / "config.json", tmp_path / "new")
    logits = torch.load(folder / "logits.pt", weights_only=True)
    for name in ("same", "new"):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.float32
        )
        with torch.no_grad():
            assert torch.equal(model.eval()(input_ids()).logits, logits)


# ------------------------------------------------------------------------------------------- calls


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"staging_bytes": 0}, "export: staging_bytes is 0, needs at least 1."),
        ({"max_file_bytes": -1}, "export: max_file_bytes is -1, needs at least 1."),
        (
            {"as_new": True, "source": "x"},
            "export, source: is given together with as_new=True, which takes nothing from it; "
            "needs one of them.",
        ),
        (
            {"ranks": Ranks(tp_rank=1, tp_size=2)},
            "export: is called as rank 1 of 2 by a process that is in no group of that size, needs "
            "all ranks (each writes its own share of the files). Try: start the ranks with "
            "torchrun.",
        ),
    ],
)
def test_calls_that_cannot_be_meant(call: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(LadingError) as error:
        lading.export(nn.Linear(2, 2), tmp_path / "out", **call)
    assert str(error.value) == text
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    folder = checkpoint("llama", files=2)
    told: list[int] = []

    class Bar:
        def start(self, total_bytes: int) -> None:
            told.append(-total_bytes)

        def advance(self, num_bytes: int) -> None:
            told.append(num_bytes)

        def finish(self) -> None:
            assert sum(told) == 0

    model = lading.from_pretrained(folder, ranks=Ranks(), device="cpu")
    report = lading.export(model, tmp_path / "out", progress=Bar())
    assert -told[0] == report.written_bytes == sum(t.nbytes for t in tensors_of(folder).values())
