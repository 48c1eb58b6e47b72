"""quant_method fp8: fixtures, cuts through blocks, every kind of scale, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lading.errors import LadingError
from lading.layers import Layer
from lading.schemes.floating import Fp8, ScaleLayout
from lading.schemes.fp8 import Fp8Quantization, parse_fp8
from tests.schemes.decoding import (
    config_of,
    decode,
    fixture_folder,
    found_of,
    joined,
    layer_of,
    references,
)

INVERSE = {"weight_scale_semantics": "inverse"}


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [
        ("autofp8-static", ScaleLayout.TENSOR, 14),
        ("fp8-block128", ScaleLayout.BLOCK, 14),
        ("fp8-block128-qwen3moe", ScaleLayout.BLOCK, 32),
    ],
)
def test_fixtures_decode_as_their_writers_do(name: str, layout: ScaleLayout, count: int) -> None:
    folder = fixture_folder(name)
    quantization = parse_fp8(config_of(folder))
    for module, tensors, reference in references(folder):
        layer = layer_of(reference, module)
        found = found_of(tensors, *reference.shape, module=module)
        scheme = quantization.scheme_for(layer, found)
        assert isinstance(scheme, Fp8)
        assert scheme.layout is layout
        assert torch.equal(decode(scheme, layer, tensors).to(reference.dtype), reference)
        for tp_size in (2, 4):  # pieces of 32 to 256: inside, on and across blocks of 128
            assert torch.equal(joined(scheme, layer, tensors, tp_size), reference)
        count -= 1
    assert count == 0


def made(outputs: int, inputs: int, name: str, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """A module with random weights: every finite FP8 value."""
    generator = torch.Generator().manual_seed(outputs * inputs)
    codes = torch.randint(256, (outputs, inputs), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return {"weight": codes.view(torch.float8_e4m3fn), name: scale}


def e4m3(code: int) -> float:
    """OCP FP8 E4M3, by its definition."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def slowly(
    tensors: dict[str, torch.Tensor], scale: np.ndarray, block: tuple[int, int], *, divide: bool
) -> torch.Tensor:
    """FORMATS 3.4 and 3.5, element by element; `scale` is [rows, columns] of blocks."""
    codes = tensors["weight"].view(torch.uint8).numpy()
    out = np.empty(codes.shape, dtype=np.float32)
    for i, j in np.ndindex(codes.shape):
        value, s = np.float32(e4m3(int(codes[i, j]))), scale[i // block[0], j // block[1]]
        out[i, j] = value / s if divide else value * s
    return torch.from_numpy(out)


def block_scales(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    if dtype in (torch.uint8, torch.float8_e8m0fnu):
        codes = torch.randint(110, 140, (rows, columns), generator=generator, dtype=torch.uint8)
        return codes.view(dtype)
    return (torch.rand(rows, columns, generator=generator) + 0.1).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str
)
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"), [(60, 60, (16, 8)), (30, 90, (128, 128)), (120, 12, (7, 5))]
)
def test_blocks_of_any_size_and_scale(
    outputs: int, inputs: int, block: tuple[int, int], dtype: torch.dtype
) -> None:
    scale = block_scales(-(-outputs // block[0]), -(-inputs // block[1]), dtype)
    tensors = made(outputs, inputs, "weight_scale_inv", scale)
    quantization = parse_fp8({"weight_block_size": list(block), "scale_fmt": "ue8m0"})
    numbers = scale.to(torch.float32).numpy()
    if dtype is torch.uint8:
        numbers = np.float32(2) ** (numbers - 127)
    needed = slowly(tensors, numbers, block, divide=False)
    for layer in (Layer.column(inputs, [outputs]), Layer.row(inputs, outputs)):
        scheme = quantization.scheme_for(layer, found_of(tensors, outputs, inputs))
        assert scheme == Fp8(
            layout=ScaleLayout.BLOCK, block=block, scale="weight_scale_inv", scalars=()
        )
        for tp_size in (1, 2, 3):
            assert torch.equal(joined(scheme, layer, tensors, tp_size), needed)


@pytest.mark.parametrize(
    ("config", "name", "shape", "divide"),
    [
        ({}, "weight_scale", (), False),
        ({}, "weight_scale", (1,), False),
        ({}, "weight_scale", (30,), False),
        ({}, "weight_scale", (30, 1), False),
        ({}, "weight_scale_inv", (), False),
        (INVERSE, "weight_scale_inv", (), True),
        (INVERSE, "weight_scale_inv", (30,), True),
        (INVERSE | {"weight_scale_method": "row"}, "weight_scale_inv", (30,), True),
        (INVERSE | {"weight_block_size": [15, 10]}, "weight_scale_inv", (2, 4), True),
    ],
    ids=str,
)
def test_the_scale_multiplies_or_divides(
    config: dict[str, Any], name: str, shape: tuple[int, ...], divide: bool
) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    tensors = made(30, 40, name, scale)
    layer = Layer.column(40, [30])
    scheme = parse_fp8(config).scheme_for(layer, found_of(tensors, 30, 40))
    assert isinstance(scheme, Fp8)
    assert scheme.divide is divide
    rows = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    block = (30 // rows.shape[0], 40 // rows.shape[1])
    needed = slowly(tensors, rows.numpy(), block, divide=divide)
    for tp_size in (1, 2, 3, 5):
        assert torch.equal(joined(scheme, layer, tensors, tp_size), needed)


def test_static_inputs_have_a_scale() -> None:
    scalar = torch.tensor(0.5)
    for name in ("input_scale", "activation_scale"):
        tensors = made(8, 8, "weight_scale", scalar) | {name: scalar}
        found = found_of(tensors, 8, 8)
        scheme = parse_fp8({"activation_scheme": "static"}).scheme_for(Layer.row(8, 8), found)
        assert scheme is not None
        assert [spec.name for spec in scheme.specs(Layer.row(8, 8), found)] == [
            "weight",
            "weight_scale",
            name,
        ]


def module_problem(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(LadingError) as info:
        parse_fp8(config).scheme_for(Layer.row(256, 256), found_of(tensors, 256, 256))
    return str(info.value)


def test_contradictions_name_both_sides() -> None:
    one = made(256, 256, "weight_scale", torch.tensor(1.0))
    block = made(256, 256, "weight_scale_inv", torch.ones(2, 2))
    rows = made(256, 256, "weight_scale_inv", torch.ones(256))
    b128 = {"weight_block_size": [128, 128]}
    assert module_problem({}, rows) == (
        "layer: config.json says no weight_scale_semantics, the checkpoint has weight_scale_inv "
        "fp32[256]; one a row, it may multiply or divide: needs the config to say which."
    )
    assert module_problem(INVERSE, one) == (
        'layer: config.json says weight_scale_semantics "inverse", the checkpoint has weight_scale '
        "fp32[]; needs weight_scale_inv."
    )
    assert module_problem({}, block) == (
        "layer: config.json says quant_method fp8 and no weight_block_size, the checkpoint has "
        "weight_scale_inv fp32[2, 2]; needs one scale, or one for each of 256 outputs."
    )
    assert module_problem({"weight_block_size": [64, 64]}, block) == (
        "checkpoint tensor 'layer.weight_scale_inv' is fp32[2, 2], needs fp32[4, 4] (256 outputs "
        "and 256 inputs of the layer; config.json: FP8, blocks of 64 x 64, dynamic inputs)."
    )
    assert module_problem(b128, one).startswith(
        "checkpoint tensor 'layer.weight_scale' is fp32[], needs fp32[2, 2] ("
    )
    assert module_problem(b128 | {"modules_to_not_convert": ["layer"]}, block) == (
        'layer: config.json says that "layer" is not quantised (ignored_layers or '
        "modules_to_not_convert), the checkpoint has weight fp8_e4m3[256, 256], weight_scale_inv "
        "fp32[2, 2]; needs a weight of the model's dtype."
    )
    assert module_problem({"activation_scheme": "static"}, one) == (
        "layer: config.json says FP8, one scale a tensor, static inputs, the checkpoint has no "
        "input_scale."
    )
    assert module_problem({}, one | {"input_scale": torch.tensor(1.0)}) == (
        "layer: config.json says FP8, one scale a tensor, dynamic inputs, the checkpoint has "
        "input_scale fp32[]; needs weight, weight_scale."
    )
    assert module_problem({"fmt": "e5m2"}, one) == (
        "checkpoint tensor 'layer.weight' is fp8_e4m3[256, 256], needs fp8_e5m2 (config.json: FP8, "
        "one scale a tensor, dynamic inputs)."
    )
    assert module_problem({}, {"weight": one["weight"]}) == (
        "layer: config.json says quant_method fp8, the checkpoint has weight fp8_e4m3[256, 256]; "
        "needs one of weight_scale_inv and weight_scale."
    )


def test_configs_are_checked() -> None:
    def problem(config: dict[str, Any]) -> str:
        with pytest.raises(LadingError) as info:
            parse_fp8(config)
        return str(info.value).removeprefix("quantization_config.")

    assert problem({"activation_scheme": "token"}) == (
        'activation_scheme: is "token", needs "static" or "dynamic".'
    )
    for size in ([128], [128, 0], 128, [128, True], "128"):
        assert problem({"weight_block_size": size}).endswith(
            "needs two ints of at least 1, or null."
        )
    assert problem({"weight_scale_semantics": "direct"}) == (
        'weight_scale_semantics: is "direct", needs "inverse".'
    )
    assert problem({"weight_scale_method": "block"}) == (
        'weight_scale_method: is "block", needs a weight_block_size beside it.'
    )
    assert problem({"fmt": "e4m3", "format": "float8_e5m2"}) == (
        'fmt: is "e4m3", needs the same as format.'
    )
    assert problem({"scale_fmt": "e5m2"}) == 'scale_fmt: is "e5m2", needs "ue8m0" or "float".'
    assert problem({"ignored_layers": "lm_head"}) == (
        'ignored_layers: is "lm_head", needs a list of strings or null.'
    )


def test_a_dense_module_is_dense_whatever_the_config_says() -> None:
    found = found_of({"weight": torch.ones(4, 8, dtype=torch.bfloat16)}, 4, 8)
    for ignored in ((), ("layer",)):
        quantization = Fp8Quantization(ignored=ignored)
        assert quantization.scheme_for(Layer.replicated(8, 4), found) is None
