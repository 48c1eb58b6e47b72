"""Scales of a KV cache: found, loaded beside the layers, refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lading.errors import LadingError
from lading.layers import Layer
from lading.preflight import preflight
from lading.pretrained import load_pretrained
from lading.ranks import all_ranks
from lading.schemes.base import Stored
from lading.schemes.cache_scales import CacheScales, found_scales
from lading.verify import verify
from tests.schemes.checkpoints import (
    FP8_CONFIG,
    Tensors,
    fp8_static,
    model_tensors,
    write_model,
)

QKV = Layer.qkv(64, 16, 4, 2)
ATTENTION = "model.layers.0.self_attn"
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


def compressed(**kv: Any) -> dict[str, Any]:
    """FP8 of one scale a tensor with a quantised KV cache."""
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": {**KV_SCHEME, **kv},
    }


def with_scales(**scales: torch.Tensor) -> Tensors:
    tensors = model_tensors(fp8_static)
    for name, scale in scales.items():
        tensors[f"{ATTENTION}.{name.replace('__', '.')}"] = scale
    return tensors


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize(
    ("config", "names"),
    [
        (FP8_CONFIG | {"kv_cache_scheme": "static"}, ("k_scale", "v_scale")),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
            ("k_proj__k_scale", "v_proj__v_scale"),
        ),
        (compressed(), ("k_proj__output_scale", "v_proj__output_scale")),
        (compressed(), ("k_scale", "v_scale")),
    ],
    ids=["AutoFP8", "ModelOpt", "compressed-tensors of 2024", "compressed-tensors"],
)
def test_every_rank_has_the_numbers(
    config: dict[str, Any],
    names: tuple[str, str],
    shape: tuple[int, ...],
    tp_size: int,
    tmp_path: Path,
) -> None:
    scales = {name: torch.rand(shape) for name in names}
    folder = write_model(tmp_path, with_scales(**scales), config)
    for ranks in all_ranks(tp_size):
        model, _ = load_pretrained(folder, ranks=ranks, device="cpu")
        attention = model.get_submodule(ATTENTION)
        for name, scale in zip(("k_scale", "v_scale"), scales.values(), strict=True):
            assert attention.get_parameter(name).tolist() == [float(scale)]
        assert verify(folder, model, ranks).error() is None


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2,), (2, 1, 1)], ids=str)
def test_a_number_for_each_head_is_cut_with_the_heads(
    shape: tuple[int, ...], tp_size: int, tmp_path: Path
) -> None:
    scales = {name: torch.rand(shape) for name in ("k_scale", "v_scale")}
    folder = write_model(tmp_path, with_scales(**scales), compressed(strategy="attn_head"))
    for ranks in all_ranks(tp_size):
        model, _ = load_pretrained(folder, ranks=ranks, device="cpu")
        for name, scale in scales.items():
            local = model.get_submodule(ATTENTION).get_parameter(name)
            head = ranks.tp_rank * 2 // tp_size
            expected = scale if tp_size == 1 else scale[head : head + 1]
            assert torch.equal(local, expected)
        assert verify(folder, model, ranks).error() is None


def test_zero_points_of_an_asymmetric_cache(tmp_path: Path) -> None:
    scales = {name: torch.rand(1) for name in ("k_scale", "v_scale")}
    zeros = {name: torch.ones(1, dtype=torch.int8) for name in ("k_zero_point", "v_zero_point")}
    config = compressed(type="int", symmetric=False)
    folder = write_model(tmp_path, with_scales(**scales, **zeros), config)
    model, _ = load_pretrained(folder, ranks=all_ranks(2)[1], device="cpu")
    assert model.get_submodule(ATTENTION).get_parameter("v_zero_point").dtype is torch.int8


def problem(tensors: Tensors, config: dict[str, Any], folder: Path) -> str:
    with pytest.raises(LadingError) as caught:
        preflight(write_model(folder, tensors, config), all_ranks(2))
    return str(caught.value)


def test_contradictions(tmp_path: Path) -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert problem(with_scales(), compressed(), tmp_path) == (
        "model.layers.0.self_attn: config.json says kv_cache_scheme with stored scales, the "
        "checkpoint has no scales of it; needs k_scale, v_scale."
    )
    assert problem(with_scales(k_scale=one), FP8_CONFIG, tmp_path) == (
        "model.layers.0.self_attn: config.json says nothing of a KV cache, the checkpoint has "
        "k_scale; needs k_scale, v_scale."
    )
    assert problem(with_scales(k_scale=one, k_proj__k_scale=one), FP8_CONFIG, tmp_path) == (
        "model.layers.0.self_attn: the checkpoint has k_scale and k_proj.k_scale, needs one of "
        "them (k_scale)."
    )
    assert problem(with_scales(k_scale=two, v_scale=two), compressed(), tmp_path) == (
        "model.layers.0.self_attn: checkpoint tensor 'k_scale' is fp32[2], needs [] or [1]. In "
        "model.safetensors."
    )
    wrong = with_scales(k_scale=torch.ones(3), v_scale=one)
    assert problem(wrong, FP8_CONFIG, tmp_path) == (
        "model.layers.0.self_attn: checkpoint tensor 'k_scale' is fp32[3], needs [] or [1] or [2] "
        "or [2, 1, 1] (2 heads). In model.safetensors."
    )
    assert problem(with_scales(k_scale=one.int(), v_scale=one), FP8_CONFIG, tmp_path) == (
        "model.layers.0.self_attn: checkpoint tensor 'k_scale' is int32[1], needs fp32 or bf16 or "
        "fp16. In model.safetensors."
    )


def test_a_dynamic_cache_stores_nothing(tmp_path: Path) -> None:
    preflight(write_model(tmp_path, with_scales(), compressed(dynamic=True)), all_ranks(2))


def test_one_number_for_both(tmp_path: Path) -> None:
    config = FP8_CONFIG | {"kv_cache_scheme": "static"}
    folder = write_model(tmp_path, with_scales(kv_scale=torch.tensor(0.5)), config)
    model, _ = load_pretrained(folder, ranks=all_ranks(2)[1], device="cpu")
    assert model.get_submodule(ATTENTION).get_parameter("kv_scale").tolist() == [0.5]


def test_only_the_cache_may_be_quantised(tmp_path: Path) -> None:
    """ModelOpt: quant_algo null; the weights are dense."""
    config = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"}
    tensors = model_tensors(lambda o, i: {"weight": torch.randn(o, i).bfloat16()})
    for which in ("k", "v"):
        tensors[f"{ATTENTION}.{which}_proj.{which}_scale"] = torch.tensor(0.5)
    folder = write_model(tmp_path, tensors, config)
    model, _ = load_pretrained(folder, ranks=all_ranks(2)[1], device="cpu")
    assert model.get_submodule(ATTENTION).get_parameter("v_scale").tolist() == [0.5]
    assert problem(with_scales(), config, tmp_path).startswith(
        "TP 2 has 4 problems:\n  model.layers.0.self_attn.q_proj: config.json says that only the "
        "KV cache is quantised (quant_algo null), the checkpoint has input_scale fp32[], weight "
        "fp8_e4m3[64, 64], weight_scale fp32[]; needs a weight of the model's dtype."
    )


def test_heads_are_those_of_the_part() -> None:
    stored = {
        "q_scale": Stored(dtype="F32", shape=(4,)),
        "k_scale": Stored(dtype="F32", shape=(2,)),
        "v_scale": Stored(dtype="F32", shape=(2,)),
    }
    scales = {s.name: s for s in found_scales(CacheScales(), stored, QKV)}
    assert {n: s.layout(QKV, 4).local_shape for n, s in scales.items()} == {
        "q_scale": (1,),
        "k_scale": (1,),
        "v_scale": (1,),
    }
    assert scales["q_scale"].layout(QKV, 2).local_shape == (2,)
