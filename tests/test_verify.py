"""verify() finds what it should: one element, one bit, any part, padding, either file format."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from lading import verify as verify_module
from lading.demo import write_checkpoint
from lading.errors import VerifyError
from lading.layouts import Axis, Cut, Layout, Part
from lading.nn import ParallelLayer
from lading.pretrained import load_pretrained
from lading.ranks import Ranks, all_ranks
from lading.verify import ElementCheck, LogitCheck, compare_logits, verify

QKV = "model.layers.1.self_attn.qkv_proj.weight"
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path))
    return str(path)


def model_of(folder: str, ranks: Ranks, dtype: torch.dtype | None = None) -> torch.nn.Module:
    return load_pretrained(folder, ranks=ranks, dtype=dtype)[0]


def flip(model: torch.nn.Module, name: str, index: tuple[int, ...]) -> None:
    """Another value, the nearest that there is."""
    data = model.get_parameter(name).data
    bits = data.view(torch.int16)
    bits[index] ^= 1


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.float32])
def test_a_right_load_is_right(folder: str, tp_size: int, dtype: torch.dtype | None) -> None:
    for ranks in all_ranks(tp_size):
        model = model_of(folder, ranks, dtype)
        check = verify(folder, model, ranks)
        assert check.num_mismatches == 0
        assert check.first is None
        assert check.error() is None
        assert check.num_elements == sum(param.numel() for param in model.parameters())
        assert check.reader.startswith("safetensors ")


@pytest.mark.parametrize(
    ("name", "index", "part", "tensor"),
    [
        (QKV, (0, 0), "q", "model.layers.1.self_attn.q_proj.weight"),
        (QKV, (47, 95), "q", "model.layers.1.self_attn.q_proj.weight"),
        (QKV, (48, 0), "k", "model.layers.1.self_attn.k_proj.weight"),
        (QKV, (79, 95), "v", "model.layers.1.self_attn.v_proj.weight"),
        (EMBED, (36, 3), None, EMBED),
        (EMBED, (63, 3), None, EMBED),  # padding
        ("model.norm.weight", (95,), None, "model.norm.weight"),
    ],
)
def test_one_bit_is_found(
    folder: str, name: str, index: tuple[int, ...], part: str | None, tensor: str
) -> None:
    ranks = Ranks(tp_rank=1, tp_size=2)
    model = model_of(folder, ranks)
    flip(model, name, index)
    check = verify(folder, model, ranks)
    assert check.num_mismatches == 1
    assert check.first is not None
    assert (check.first.parameter, check.first.part) == (name, part)
    assert (check.first.tensor, check.first.index) == (tensor, index)
    assert check.first.found != check.first.expected


def test_the_message(folder: str) -> None:
    ranks = Ranks(tp_rank=1, tp_size=2)
    model = model_of(folder, ranks)
    with torch.no_grad():
        model.get_parameter(QKV)[50, 7] = 3.5
        model.get_parameter(QKV)[60, 7] = 3.5
    expected = float(model_of(folder, ranks).get_parameter(QKV)[50, 7])
    error = verify(folder, model, ranks).error()
    assert isinstance(error, VerifyError)
    assert str(error) == (
        f"{QKV}, part 'k': element [50, 7] is 3.5, needs {expected:.9g} (checkpoint tensor "
        "'model.layers.1.self_attn.k_proj.weight'); 2 of the rank's 118944 elements differ. "
        f"In {verify_file(folder)}. On rank 1."
    )


def verify_file(folder: str) -> str:
    with open(f"{folder}/model.safetensors.index.json", encoding="utf-8") as stream:
        weight_map: dict[str, str] = json.load(stream)["weight_map"]
    return weight_map["model.layers.1.self_attn.k_proj.weight"]


def test_swapped_parts_are_found(folder: str) -> None:
    model = model_of(folder, Ranks())
    weight = model.get_parameter("model.layers.0.mlp.gate_up_proj.weight").data
    weight.copy_(torch.cat(weight.chunk(2)[::-1]))
    check = verify(folder, model, Ranks())
    assert check.num_mismatches > weight.numel() * 0.9


def test_another_ranks_share_is_found(folder: str) -> None:
    one, two = all_ranks(2)
    assert verify(folder, model_of(folder, one), one).num_mismatches == 0
    assert verify(folder, model_of(folder, two), one).num_mismatches > 0


def test_tied_embeddings(tmp_path: Path) -> None:
    write_checkpoint(str(tmp_path), tie_word_embeddings=True)
    model = model_of(str(tmp_path), Ranks())
    assert verify(tmp_path, model, Ranks()).num_mismatches == 0
    flip(model, EMBED, (0, 0))
    check = verify(tmp_path, model, Ranks())
    assert check.num_mismatches == 1


def test_torch_files(folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        state |= load_file(file)
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(f"{folder}/config.json", tmp_path)
    ranks = Ranks(tp_rank=0, tp_size=2)
    model = model_of(str(tmp_path), ranks)
    check = verify(tmp_path, model, ranks)
    assert check.num_mismatches == 0
    assert check.reader.startswith("torch.load of torch ")
    flip(model, QKV, (5, 5))
    assert verify(tmp_path, model, ranks).num_mismatches == 1


def test_nothing_to_compare_with(folder: str) -> None:
    model = model_of(folder, Ranks())
    model.register_buffer("extra", torch.zeros(3))
    with pytest.raises(VerifyError, match=r"^extra: no checkpoint tensor belongs to it"):
        verify(folder, model, Ranks())


def test_another_shape(folder: str) -> None:
    model = model_of(folder, Ranks())
    model.get_submodule("model.norm").weight = torch.nn.Parameter(torch.zeros(95))
    with pytest.raises(VerifyError, match=r"has shape \[95\], needs \[96\]"):
        verify(folder, model, Ranks())


def test_logits(folder: str) -> None:
    pytest.importorskip("transformers")
    check = compare_logits(folder, Ranks(), (101, 24), device="cpu", group=None)
    assert check.compared
    assert check.ok
    assert check.num_logits == 2 * 24 * 101
    assert (check.num_sequences, check.num_tokens) == (2, 24)
    assert 0 < check.max_abs_diff <= check.tolerance < 1e-3


def test_wrong_logits_are_found(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    load = verify_module.load_model

    def swapped(*args: object, **more: object) -> object:
        model, report = load(*args, **more)  # type: ignore[arg-type]
        weight = model.get_parameter("model.layers.0.mlp.gate_up_proj.weight").data
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))
        return model, report

    monkeypatch.setattr(verify_module, "load_model", swapped)
    check = compare_logits(folder, Ranks(), (101, 24), device="cpu", group=None)
    assert check.compared
    assert not check.ok


def test_nan_on_both_sides(folder: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.safetensors"):
        state = load_file(file)
        if "model.norm.weight" in state:
            state["model.norm.weight"][3] = float("nan")
            save_file(state, file, metadata={"format": "pt"})
    check = compare_logits(str(tmp_path), Ranks(), (101, 24), device="cpu", group=None)
    assert check.compared
    assert not check.ok
    assert check.nan == (
        "NaN in the logits of both (of the parameters, model.norm.weight is the first with NaN)"
    )
    assert verify(tmp_path, model_of(str(tmp_path), Ranks()), Ranks()).num_mismatches == 0


def test_quantised_is_what_the_layers_are(folder: str) -> None:
    model = model_of(folder, Ranks())
    assert not verify_module._is_quantised(model)
    layer = next(m for m in model.modules() if isinstance(m, ParallelLayer))
    layer.quant = object()  # type: ignore[assignment]
    assert verify_module._is_quantised(model)


def test_without_transformers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    check = compare_logits(folder, Ranks(), (101, 24), device="cpu", group=None)
    assert check == LogitCheck(
        compared=False, reason="transformers is not installed (pip install transformers)"
    )


def test_transformers_that_fails_is_no_verdict(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> LogitCheck:
        raise RuntimeError("no such model\nat all")

    monkeypatch.setattr(verify_module, "_against_transformers", fails)
    check = compare_logits(folder, Ranks(), (101, 24), device="cpu", group=None)
    assert not check.compared
    assert check.reason == "transformers failed with RuntimeError: no such model"


def test_results_need_no_torch() -> None:
    check = ElementCheck(tp_rank=0, num_elements=1, num_mismatches=0, first=None, reader="")
    assert "torch" not in vars(verify_module)
    assert check.error() is None


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("grain", [1, 5, 8, 64, 128])
def test_cuts_through_block_scales(tp_size: int, is_fused: bool, grain: int) -> None:
    """The pieces of straddling entries are those of the layout, which is worked out otherwise."""
    rows = Axis(
        parts=(
            Part(name="q", size=12 * 40),
            Part(name="k", size=2 * 40, max_pieces=2, unit=40),
        ),
        name="out_features",
    )
    if tp_size % 2 and tp_size > 1:
        return  # two KV heads are shared by an even number of ranks
    cut = Cut(axis=rows, grain=Fraction(grain), ragged=True, straddle=True)
    layout = Layout(cuts=(cut,), tp_size=tp_size, fused_source=is_fused)
    for ranks in all_ranks(tp_size):
        for part in ("q", "k"):
            shape = layout.fused_shape if is_fused else layout.source_shape(part)
            placement = layout.place(part, ranks.tp_rank, fused_source=is_fused)
            assert placement is not None
            (start,), (size,) = placement.source.start, placement.source.size
            whole = torch.arange(shape[0])
            found = verify_module._cut(whole, layout, part, ranks, is_fused=is_fused)
            assert found.tolist() == list(range(start, start + size))
