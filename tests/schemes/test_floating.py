"""FP8, NVFP4, MXFP4 and MXFP8: bit patterns against a decoder of single values, and their cuts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lading.errors import ConfigError, LayoutError
from lading.layers import Layer
from lading.schemes.base import Found
from lading.schemes.floating import Fp8, Mxfp4, Nvfp4, ScaleLayout
from tests.schemes.cutting import check_cuts, found_of, whole

TENSOR, CHANNEL = ScaleLayout.TENSOR, ScaleLayout.CHANNEL
BLOCK, GROUP = ScaleLayout.BLOCK, ScaleLayout.GROUP


def e4m3(code: int) -> float:
    """OCP FP8 E4M3: bias 7, no infinities, 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def e2m1(code: int) -> float:
    """OCP FP4 E2M1: bias 1."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -value if code & 8 else value


def codes(shape: tuple[int, ...], top: int = 256) -> torch.Tensor:
    """Random bytes, without the two NaN of E4M3."""
    random = np.random.default_rng(sum(shape))
    values = random.integers(0, top, shape).astype(np.uint8)
    return torch.from_numpy(np.where(values & 0x7F == 0x7F, 0, values).astype(np.uint8))


def decoded(
    weight: torch.Tensor, scale_at: Callable[[int, int], float], *, divide: bool = False
) -> torch.Tensor:
    """Each byte by itself, times the scale of its place."""
    outputs, inputs = weight.shape
    result = torch.zeros(outputs, inputs)
    for n in range(outputs):
        for k in range(inputs):
            value, scale = np.float32(e4m3(int(weight[n, k]))), np.float32(scale_at(n, k))
            result[n, k] = float(value / scale if divide else value * scale)
    return result


FP8_CASES: dict[str, tuple[ScaleLayout, tuple[int, ...], Callable[[int, int], Any]]] = {
    "[]": (TENSOR, (), lambda n, k: ()),
    "[1]": (TENSOR, (1,), lambda n, k: (0,)),
    "[O]": (CHANNEL, (20,), lambda n, k: (n,)),
    "[O, 1]": (CHANNEL, (20, 1), lambda n, k: (n, 0)),
    "[O/b, I/c]": (BLOCK, (3, 5), lambda n, k: (n // 8, k // 7)),
    "[O/b, 1, I/c, 1]": (BLOCK, (3, 1, 5, 1), lambda n, k: (n // 8, 0, k // 7, 0)),
    "[O, I/g]": (GROUP, (20, 10), lambda n, k: (n, k // 3)),
}


@pytest.mark.parametrize("case", FP8_CASES)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8(case: str, divide: bool, dtype: torch.dtype) -> None:
    """20 outputs in blocks of 8, 30 inputs in blocks of 7: the last blocks are partial."""
    layout, shape, at = FP8_CASES[case]
    random = np.random.default_rng(3)
    scale = torch.from_numpy(random.uniform(0.01, 3, shape or (1,))).to(dtype).reshape(shape)
    weight = codes((20, 30))
    name = "weight_scale_inv"
    scheme = Fp8(
        layout=layout, block=(8, 7) if layout is BLOCK else (1, 3), scale=name, divide=divide
    )
    tensors = {"weight": weight.view(torch.float8_e4m3fn), name: scale}
    found = found_of(tensors, 20, 30)
    expected = decoded(weight, lambda n, k: float(scale[at(n, k)]), divide=divide)
    assert torch.equal(whole(scheme, found, tensors), expected)
    check_cuts(scheme, Layer.column(30, [20]), found, tensors, (2, 4, 5))
    check_cuts(scheme, Layer.row(30, 20), found, tensors, (2, 5) if layout is GROUP else (2, 3, 5))
    spec = scheme.specs(Layer.row(30, 20), found)[1]
    assert spec.stored == (() if shape == () else None)


def test_blocks_of_a_fused_module_go_through_its_cuts() -> None:
    """Parts of 12 and 8 outputs side by side, in blocks of 8: the second begins inside a block."""
    scheme = Fp8(layout=BLOCK, block=(8, 8))
    weight = codes((20, 24))
    scale = torch.arange(1.0, 10.0).reshape(3, 3)
    tensors = {"weight": weight.view(torch.float8_e4m3fn), "weight_scale": scale}
    found = found_of(tensors, 20, 24, fused=True)
    layer = Layer.column(24, [12, 8], names=["gate", "up"])
    check_cuts(scheme, layer, found, tensors, (1, 2, 4))


def test_the_one_scale_of_a_fused_module_is_that_of_each_part() -> None:
    scheme, weight = Fp8(layout=TENSOR), codes((20, 24))
    tensors = {
        "weight": weight.view(torch.float8_e4m3fn),
        "weight_scale": torch.tensor([0.3]),
        "input_scale": torch.tensor([2.0]),
    }
    found = found_of(tensors, 20, 24, fused=True)
    layer = Layer.column(24, [12, 8], names=["gate", "up"])
    check_cuts(scheme, layer, found, tensors, (1, 2, 4))
    assert [layer.layout(s, 2).local_shape for s in scheme.specs(layer, found)[1:]] == [(2,), (2,)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8(dtype: torch.dtype) -> None:
    scheme = Fp8(layout=GROUP, block=(1, 32), exponents=True)
    weight, exponents = codes((6, 192)), codes((6, 6), 40) + 107
    tensors = {
        "weight": weight.view(torch.float8_e4m3fn),
        "weight_scale": exponents.view(dtype),
    }
    found = found_of(tensors, 6, 192)
    expected = decoded(weight, lambda n, k: 2.0 ** (int(exponents[n, k // 32]) - 127))
    assert torch.equal(whole(scheme, found, tensors), expected)
    check_cuts(scheme, Layer.row(192, 6), found, tensors, (2, 3, 6))
    check_cuts(scheme, Layer.column(192, [6]), found, tensors, (2, 3))
    assert scheme.name == "MXFP8, groups of 32"


def test_block_scales_may_be_exponents() -> None:
    scheme = Fp8(layout=BLOCK, block=(4, 4))
    weight, exponents = codes((8, 8)), codes((2, 2), 40) + 107
    tensors = {
        "weight": weight.view(torch.float8_e4m3fn),
        "weight_scale": exponents.view(torch.float8_e8m0fnu),
    }
    expected = decoded(weight, lambda n, k: 2.0 ** (int(exponents[n // 4, k // 4]) - 127))
    assert torch.equal(whole(scheme, found_of(tensors, 8, 8), tensors), expected)


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_nvfp4(divide: bool, shape: tuple[int, ...]) -> None:
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    if not divide:  # ModelOpt's names
        names = ("weight", "weight_scale", "weight_scale_2")
    scheme = Nvfp4(weight=names[0], scale=names[1], global_scale=names[2], divide=divide)
    packed, scale = codes((6, 48)), codes((6, 6), 127)
    top = torch.full(shape, 3.7)
    tensors = {names[0]: packed, names[1]: scale.view(torch.float8_e4m3fn), names[2]: top}
    expected = torch.zeros(6, 96)
    for n in range(6):
        for k in range(96):
            nibble = int(packed[n, k // 2]) >> (4 * (k % 2)) & 15
            s = np.float32(e4m3(int(scale[n, k // 16])))
            s = s / np.float32(3.7) if divide else s * np.float32(3.7)
            expected[n, k] = float(np.float32(e2m1(nibble)) * s)
    found = found_of(tensors, 6, 96)
    assert torch.equal(whole(scheme, found, tensors), expected)
    check_cuts(scheme, Layer.row(96, 6), found, tensors, (2, 3, 6))
    check_cuts(scheme, Layer.column(96, [6]), found, tensors, (2, 3))


def test_each_part_has_its_own_global_scale() -> None:
    """Two parts in one parameter: their scalars lie side by side, each rank has all of them."""
    scheme, layer = Nvfp4(), Layer.column(32, [4, 4], names=["gate", "up"])
    found = Found(module="m", tensors={}, outputs=4, inputs=32)
    spec = scheme.specs(layer, found)[2]
    layout = layer.layout(spec, 2)
    assert spec.name == "weight_global_scale"
    assert layout.local_shape == (2,)
    places = [layout.place("up", rank) for rank in (0, 1)]
    assert [place.target.start for place in places if place is not None] == [(1,), (1,)]


def test_mxfp4() -> None:
    scheme = Mxfp4()
    packed, exponents = codes((6, 48)), codes((6, 3), 40) + 107
    tensors = {"weight_packed": packed, "weight_scale": exponents}
    expected = torch.zeros(6, 96)
    for n in range(6):
        for k in range(96):
            nibble = int(packed[n, k // 2]) >> (4 * (k % 2)) & 15
            expected[n, k] = e2m1(nibble) * 2.0 ** (int(exponents[n, k // 32]) - 127)
    found = found_of(tensors, 6, 96)
    assert torch.equal(whole(scheme, found, tensors), expected)
    check_cuts(scheme, Layer.row(96, 6), found, tensors, (3,))
    with pytest.raises(LayoutError) as caught:
        Layer.row(96, 6).layout(scheme.specs(Layer.row(96, 6), found)[1], 2)
    assert str(caught.value) == (
        "TP 2 cuts 96 columns into 48 per rank; one scale covers a group of 32 inputs and "
        "48 = 1 * 32 + 16. Try: TP 1 or 3."
    )
    with pytest.raises(LayoutError) as caught:
        Layer.row(90, 6).layout(scheme.specs(Layer.row(90, 6), found)[0], 2)
    assert str(caught.value) == (
        "TP 2 cuts 90 columns into 45 per rank; fp4 packs 2 inputs per uint8 entry and "
        "45 = 22 * 2 + 1. Try: TP 1, 3 or 5."
    )


def test_impossible_blocks() -> None:
    with pytest.raises(ConfigError) as caught:
        Fp8(layout=GROUP, block=(2, 32))
    assert str(caught.value) == "FP8 scales of groups cover (2, 32)."
    assert Fp8(layout=BLOCK).name == "FP8, blocks of 128 x 128"
