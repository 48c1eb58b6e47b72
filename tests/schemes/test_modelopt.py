"""ModelOpt: fixtures, each algorithm against a slow decoder, refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from lading.errors import LadingError, LayoutError
from lading.layers import Layer
from lading.schemes.floating import Fp8, Nvfp4
from lading.schemes.modelopt import parse_modelopt
from lading.schemes.smoothed import PairedInt4, SmoothedInt8
from tests.schemes.decoding import (
    config_of,
    decode,
    fixture_folder,
    found_of,
    joined,
    layer_of,
    references,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@pytest.mark.parametrize("name", ["modelopt-fp8", "modelopt-nvfp4"])
def test_fixtures_decode_as_modelopt_does(name: str) -> None:
    folder = fixture_folder(name)
    both = (config_of(folder), json.loads((folder / "hf_quant_config.json").read_text()))
    first, second = map(parse_modelopt, both)
    assert first == second == parse_modelopt(both[1]["quantization"])
    count = 0
    for module, tensors, reference in references(folder):
        layer = layer_of(reference, module)
        scheme = first.scheme_for(layer, found_of(tensors, *reference.shape, module=module))
        assert isinstance(scheme, Fp8 if name == "modelopt-fp8" else Nvfp4)
        assert torch.equal(decode(scheme, layer, tensors).to(reference.dtype), reference)
        for tp_size in (2, 4):
            assert torch.equal(joined(scheme, layer, tensors, tp_size), reference)
        count += 1
    assert count == 14


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1).to(dtype)


def bytes_of(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def fp8_of(*shape: int) -> torch.Tensor:
    codes = bytes_of(*shape)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(torch.float8_e4m3fn)


def made(algorithm: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """The tensors of a module, as the tables of FORMATS 3.6 say."""
    weight = {"weight": fp8_of(outputs, inputs)}
    if algorithm == "FP8":
        return weight | {"weight_scale": torch.tensor(0.37), "input_scale": torch.tensor(2.0)}
    if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
        return weight | {"weight_scale": random((outputs,))}
    if algorithm == "FP8_PB_WO":
        blocks = (-(-outputs // 128), 1, -(-inputs // 128), 1)
        return weight | {"weight_scale": random(blocks)}
    if algorithm == "MXFP8":
        return weight | {"weight_scale": bytes_of(outputs, inputs // 32) // 8 + 110}
    if algorithm == "NVFP4":
        return {
            "weight": bytes_of(outputs, inputs // 2),
            "weight_scale": fp8_of(outputs, inputs // 16),
            "weight_scale_2": torch.tensor(0.013),
            "input_scale": torch.tensor(1.5),
        }
    if algorithm == "W4A16_AWQ":
        return {
            "weight": bytes_of(outputs // 2, inputs),
            "weight_scale": random((outputs, inputs // 128)),
            "pre_quant_scale": random((inputs,), torch.bfloat16),
        }
    assert algorithm == "W8A8_SQ_PER_CHANNEL"
    return {
        "weight": bytes_of(outputs, inputs).view(torch.int8),
        "weight_scale": random((outputs,)),
        "input_scale": torch.tensor(1.5),
        "pre_quant_scale": random((inputs,)),
    }


def slowly(
    algorithm: str, tensors: dict[str, torch.Tensor], outputs: int, inputs: int
) -> np.ndarray:
    """Element by element."""
    weight = tensors["weight"]
    codes = weight.view(torch.uint8).numpy()
    scale = tensors["weight_scale"]
    exponents = scale.numpy() if scale.dtype is torch.uint8 else None
    scale_values = scale.to(torch.float32).numpy()
    smooth = tensors.get("pre_quant_scale")
    out = np.empty((outputs, inputs), dtype=np.float32)
    for o, k in np.ndindex(outputs, inputs):
        if algorithm == "NVFP4":
            code = int(codes[o, k // 2]) >> (4 * (k % 2)) & 15
            value = np.float32(-E2M1[code & 7] if code & 8 else E2M1[code & 7])
            s = scale_values[o, k // 16] * tensors["weight_scale_2"].numpy()
        elif algorithm == "W4A16_AWQ":
            code = int(codes[o // 2, k]) >> (4 * (o % 2)) & 15
            value, s = np.float32(code - 16 if code > 7 else code), scale_values[o, k // 128]
        else:
            value = np.float32(weight[o, k].to(torch.float32).item())
            if algorithm == "FP8":
                s = scale_values
            elif algorithm == "FP8_PB_WO":
                s = scale_values[o // 128, 0, k // 128, 0]
            elif exponents is not None:
                s = np.float32(2.0) ** (int(exponents[o, k // 32]) - 127)
            else:
                s = scale_values[o]
        out[o, k] = value * s
        if smooth is not None:
            out[o, k] *= np.float32(smooth[k].to(torch.float32).item())
    return out


@pytest.mark.parametrize(
    ("algorithm", "outputs", "inputs"),
    [
        ("FP8", 60, 30),
        ("FP8_PER_CHANNEL_PER_TOKEN", 60, 30),
        ("FP8_PB_WO", 180, 192),
        ("MXFP8", 60, 192),
        ("NVFP4", 60, 96),
        ("W4A16_AWQ", 60, 768),
        ("W8A8_SQ_PER_CHANNEL", 60, 30),
    ],
)
def test_each_algorithm_decodes_and_cuts(algorithm: str, outputs: int, inputs: int) -> None:
    tensors = made(algorithm, outputs, inputs)
    needed = torch.from_numpy(slowly(algorithm, tensors, outputs, inputs))
    quantization = parse_modelopt({"quant_algo": algorithm.lower()})
    for layer in (Layer.column(inputs, [outputs]), Layer.row(inputs, outputs)):
        scheme = quantization.scheme_for(layer, found_of(tensors, outputs, inputs))
        assert scheme is not None
        for tp_size in (1, 2, 3):
            assert torch.equal(joined(scheme, layer, tensors, tp_size), needed)


def test_parts_have_their_own_pre_quant_scale() -> None:
    tensors = made("W8A8_SQ_PER_CHANNEL", 8, 16)
    layer = Layer.column(16, [8, 8], names=["gate", "up"])
    specs = {s.name: s for s in SmoothedInt8().specs(layer, found_of(tensors, 8, 16))}
    layout = layer.layout(specs["pre_quant_scale"], 2)
    assert layout.local_shape == (2, 16)
    assert layout.source_shape("up") == (1, 16)


def test_cuts_through_pairs_are_refused() -> None:
    with pytest.raises(LayoutError) as info:
        joined(PairedInt4(group_size=128), Layer.column(128, [6]), made("W4A16_AWQ", 6, 128), 2)
    assert str(info.value) == (
        "TP 2 cuts 6 rows into 3 per rank; int4 packs 2 outputs per uint8 entry and "
        "3 = 1 * 2 + 1. Try: TP 1 or 3."
    )


def test_mixed_precision_names_each_module() -> None:
    quantization = parse_modelopt(
        {
            "quant_algo": "MIXED_PRECISION",
            "quantized_layers": {
                "a": {"quant_algo": "FP8"},
                "b": {"quant_algo": "NVFP4", "group_size": 16},
            },
        }
    )
    layer = Layer.row(32, 8)
    fp8, nvfp4 = made("FP8", 8, 32), made("NVFP4", 8, 32)
    assert isinstance(quantization.scheme_for(layer, found_of(fp8, 8, 32, module="a")), Fp8)
    assert isinstance(quantization.scheme_for(layer, found_of(nvfp4, 8, 32, module="b")), Nvfp4)
    dense = found_of({"weight": torch.ones(8, 32)}, 8, 32, module="a")
    assert quantization.scheme_for(layer, dense) is None
    with pytest.raises(LadingError) as info:
        quantization.scheme_for(layer, found_of(fp8, 8, 32, module="c"))
    assert str(info.value) == (
        "c: config.json says quant_algo MIXED_PRECISION and nothing of this module in "
        "quantized_layers, the checkpoint has weight fp8_e4m3[8, 32], weight_scale fp32[], "
        "input_scale fp32[]; needs a weight of the model's dtype."
    )


def module_problem(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(LadingError) as info:
        parse_modelopt(config).scheme_for(Layer.row(256, 8), found_of(tensors, 8, 256))
    return str(info.value)


def test_contradictions_name_both_sides() -> None:
    assert module_problem({"quant_algo": "FP8"}, made("NVFP4", 8, 256)) == (
        "layer: config.json says quant_algo FP8, the checkpoint has weight_scale_2 fp32[]; needs "
        "weight, weight_scale, input_scale."
    )
    assert module_problem({"quant_algo": "NVFP4"}, made("FP8", 8, 256)) == (
        "layer: config.json says quant_algo NVFP4, the checkpoint has no weight_scale_2; needs "
        "weight, weight_scale, weight_scale_2, input_scale."
    )
    assert module_problem({"quant_algo": "NVFP4", "group_size": 32}, made("NVFP4", 8, 256)) == (
        "checkpoint tensor 'layer.weight_scale' is fp8_e4m3[8, 16], needs fp8_e4m3[8, 8] (8 "
        "outputs and 256 inputs of the layer; config.json: quant_algo NVFP4)."
    )
    ignoring = {"quant_algo": "FP8", "exclude_modules": ["lay*"]}
    assert module_problem(ignoring, made("FP8", 8, 256)) == (
        'layer: config.json says that "lay*" is not quantised (ignore or exclude_modules), the '
        "checkpoint has weight fp8_e4m3[8, 256], weight_scale fp32[], input_scale fp32[]; needs a "
        "weight of the model's dtype."
    )
    smoothed = made("W8A8_SQ_PER_CHANNEL", 8, 256) | {"pre_quant_scale": torch.ones(8)}
    assert module_problem({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, smoothed).startswith(
        "checkpoint tensor 'layer.pre_quant_scale' is fp32[8], needs fp32[256] ("
    )


def test_configs_are_checked() -> None:
    def problem(config: dict[str, Any]) -> str:
        with pytest.raises(LadingError) as info:
            parse_modelopt(config)
        return str(info.value)

    names = (
        "FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8, NVFP4, W4A16_NVFP4, W4A16_AWQ, "
        "W8A8_SQ_PER_CHANNEL"
    )
    assert problem({"quant_algo": "W4A8_AWQ"}) == (
        f'quantization_config.quant_algo: is "W4A8_AWQ", needs {names} or MIXED_PRECISION.'
    )
    assert problem({}).startswith("quantization_config.quant_algo: is missing, needs FP8, ")
    assert problem({"quant_algo": "MIXED_PRECISION"}) == (
        "quantization_config.quantized_layers: is missing, needs the algorithm of each module "
        "(MIXED_PRECISION)."
    )
    nested = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "X"}}}
    assert problem(nested).startswith(
        "quantization_config.quantized_layers['a'].quant_algo: is \"X\", needs FP8, "
    )
    assert problem({"quant_algo": "W4A16_AWQ", "has_zero_point": True}) == (
        "quantization_config.has_zero_point: is true, needs false for W4A16_AWQ."
    )
    assert problem({"quant_algo": "NVFP4", "group_size": 0}) == (
        "quantization_config.group_size: is 0, needs an int of at least 1."
    )
