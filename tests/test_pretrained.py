"""From a folder to a ready model: dtype, device, report, errors. In real processes: end_to_end."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lading
from lading.demo import write_checkpoint
from lading.errors import CallError, ConfigError, LadingError, PlanError
from lading.loading import LoadReport
from lading.nn import check_loaded
from lading.pretrained import load_pretrained, prepare_pretrained
from lading.ranks import Ranks, all_ranks, as_current


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(str(path))
    return path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def test_one_call(folder: Path) -> None:
    model = lading.from_pretrained(folder)
    check_loaded(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    full = stored(folder)
    down = model.get_parameter("model.layers.2.mlp.down_proj.weight")
    assert torch.equal(down, full["model.layers.2.mlp.down_proj.weight"])
    report = vars(model)["load_report"]
    assert isinstance(report, LoadReport)
    assert report.checkpoint_bytes == sum(t.nbytes for t in full.values())
    assert report.casts == ()


@pytest.mark.parametrize("ranks", all_ranks(2), ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_dtype(ranks: Ranks, dtype: torch.dtype, folder: Path) -> None:
    model, report = load_pretrained(folder, ranks=ranks, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}
    name = "model.layers.1.self_attn.o_proj.weight"
    needed = stored(folder)[name].chunk(2, dim=1)[ranks.tp_rank].to(dtype)
    assert torch.equal(model.get_parameter(name), needed)
    assert len(report.casts) == len(dict(model.named_parameters()))
    assert {cast[1] for cast in report.casts} == {"BF16"}


def test_the_current_rank(folder: Path) -> None:
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        model = lading.from_pretrained(folder, device="cpu")
    needed = stored(folder)["model.layers.0.mlp.down_proj.weight"].chunk(2, dim=1)[1]
    assert torch.equal(model.get_parameter("model.layers.0.mlp.down_proj.weight"), needed)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"dtype": torch.int8},
            "from_pretrained: dtype is torch.int8, needs a floating point torch.dtype.",
        ),
        (
            {"dtype": "bfloat16"},
            "from_pretrained: dtype is 'bfloat16', needs a floating point torch.dtype.",
        ),
        ({"device": "meta"}, "device: is meta, needs one that has memory."),
    ],
)
def test_calls_that_cannot_be_meant(options: dict[str, object], text: str, folder: Path) -> None:
    with pytest.raises(CallError) as caught:
        lading.from_pretrained(folder, **options)  # type: ignore[arg-type]
    assert str(caught.value) == text


@pytest.mark.parametrize("ranks", all_ranks(4), ids=str)
def test_ranks_that_do_not_divide(ranks: Ranks, folder: Path) -> None:
    with pytest.raises(PlanError) as caught:
        lading.from_pretrained(folder, ranks=ranks, device="cpu")
    assert len(caught.value.problems) == 3
    assert str(caught.value.problems[0]) == (
        "model.layers.0.self_attn.qkv_proj, part 'q': TP 4 does not cut 6 q heads into 4 equal "
        "pieces: 6 = 4 * 1 + 2. Try: TP 1 or 2."
    )


def test_no_config(folder: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        lading.from_pretrained(tmp_path)
    assert str(caught.value) == (
        "config.json: is missing, needs one beside the weights (it says which model this is). "
        f"In {tmp_path}. Try: lading inspect for what the files hold."
    )


def test_a_config_that_does_not_fit_the_weights(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 168}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored(folder), tmp_path / "model.safetensors")
    with pytest.raises(PlanError) as caught:
        lading.from_pretrained(tmp_path)
    assert len(caught.value.problems) == 9  # gate, up and down of 3 layers
    assert (
        "  model.layers.0.mlp.down_proj.weight: checkpoint tensor "
        "'model.layers.0.mlp.down_proj.weight' is bf16[96, 160], needs bf16[96, 168] "
        "(168 = in_features of the layer). In model.safetensors.\n"
    ) in str(caught.value)


def test_prepared_but_not_read(folder: Path) -> None:
    prepared = prepare_pretrained(folder, ranks=Ranks(tp_rank=1, tp_size=2))
    assert {p.device.type for p in prepared.model.parameters()} == {"meta"}
    assert [share.ranks for share in prepared.plan.shares] == [Ranks(tp_rank=1, tp_size=2)]
    with pytest.raises(LadingError, match="has no memory yet"):
        check_loaded(prepared.model)


def test_a_dropped_model_is_freed_at_once(folder: Path) -> None:
    model = lading.from_pretrained(folder, ranks=Ranks(), device="cpu")
    layer = weakref.ref(model.model.layers[0].self_attn.qkv_proj)
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None  # no cycle that only the garbage collector would find
    finally:
        gc.enable()
