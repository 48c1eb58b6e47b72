"""Integer weights: bit patterns of every width against a decoder of single bits, and their cuts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lading.errors import ConfigError, LayoutError
from lading.layers import Layer
from lading.schemes.base import Found
from lading.schemes.floating import ScaleLayout
from lading.schemes.integer import PackedInt, PlainInt, num_words
from tests.schemes.cutting import Tensors, check_cuts, found_of, whole

Ints = npt.NDArray[np.int64]
TENSOR, CHANNEL, GROUP = ScaleLayout.TENSOR, ScaleLayout.CHANNEL, ScaleLayout.GROUP


def pack(codes: Ints, bits: int, *, padded: bool) -> Ints:
    """Rows of codes -> rows of words, bit by bit."""
    rows, size = codes.shape
    per_word = 32 // bits
    words = [0] * num_words(size, bits, padded=padded)
    packed = np.zeros((rows, len(words)), dtype=np.int64)
    for row in range(rows):
        bitmap = [0] * (32 * len(words))
        for j, code in enumerate(codes[row]):
            start = (j // per_word) * 32 + (j % per_word) * bits if padded else j * bits
            for b in range(bits):
                bitmap[start + b] = (int(code) >> b) & 1
        for w in range(len(words)):
            value = sum(bit << b for b, bit in enumerate(bitmap[32 * w : 32 * w + 32]))
            packed[row, w] = value - (1 << 32) if value >= 1 << 31 else value
    return packed


def int32(values: Ints) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values).astype(np.int32))


class Made:
    """A packed module of random codes, scales and zero points; its weight, decoded one by one."""

    def __init__(self, scheme: PackedInt, outputs: int, inputs: int) -> None:
        random = np.random.default_rng(outputs * 1000 + inputs * 10 + scheme.bits)
        limit = 1 << scheme.bits
        codes = random.integers(0, limit, (outputs, inputs))
        codes[0, :2] = (0, limit - 1)
        size = scheme.group_size or inputs
        num_groups = -(-inputs // size)
        groups = np.arange(inputs) // size
        if scheme.act_order:
            groups = random.permutation(groups)
        # Powers of two: products are exact in every dtype, so numbers compare without rounding.
        scales = 2.0 ** random.integers(-6, 6, (outputs, num_groups))
        zeros = np.full((outputs, num_groups), limit // 2)
        self.tensors: Tensors = {
            "weight_packed": int32(pack(codes, scheme.bits, padded=scheme.padded)),
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if scheme.layout is TENSOR:
            scales[:] = scales[0, 0]
        if not scheme.symmetric:
            zeros = random.integers(0, limit, (outputs, num_groups))
            if scheme.layout is TENSOR:
                zeros[:] = zeros[0, 0]
                zero = torch.tensor([zeros[0, 0] - limit // 2], dtype=torch.int8)
            else:
                zero = int32(pack(zeros.T, scheme.bits, padded=scheme.padded).T)
            self.tensors["weight_zero_point"] = zero
        if scheme.act_order:
            self.tensors["weight_g_idx"] = int32(groups)
        scale = torch.from_numpy(scales).to(torch.bfloat16)
        self.tensors["weight_scale"] = scale[0] if scheme.layout is TENSOR else scale
        self.weight = torch.zeros(outputs, inputs)
        for n in range(outputs):
            for k in range(inputs):
                g = groups[k]
                self.weight[n, k] = float((codes[n, k] - zeros[n, g]) * scales[n, g])
        self.found: Found = found_of(self.tensors, outputs, inputs)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("layout", "group_size", "act_order"),
    [(TENSOR, 0, False), (CHANNEL, 0, False), (GROUP, 20, False), (GROUP, 20, True)],
    ids=["tensor", "channel", "group", "act-order"],
)
def test_every_width(
    bits: int, symmetric: bool, layout: ScaleLayout, group_size: int, act_order: bool
) -> None:
    """Sizes that end in the middle of a word."""
    for padded in (False, True) if 32 % bits else (False,):
        scheme = PackedInt(
            bits=bits,
            layout=layout,
            group_size=group_size,
            symmetric=symmetric,
            act_order=act_order,
            padded=padded,
        )
        made = Made(scheme, 7, 60)
        assert torch.equal(whole(scheme, made.found, made.tensors), made.weight)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_cuts(bits: int, symmetric: bool) -> None:
    """Columns and rows over 2, 3, 4 and 5 ranks; act-order groups go through the cuts."""
    for padded in (False, True) if 32 % bits else (False,):
        word = 32 // bits if padded else 32
        for layout, act_order in ((TENSOR, False), (CHANNEL, False), (GROUP, False), (GROUP, True)):
            scheme = PackedInt(
                bits=bits,
                layout=layout,
                group_size=(word * 4 if act_order else word) if layout is GROUP else 0,
                symmetric=symmetric,
                act_order=act_order,
                padded=padded,
            )
            for tp_size in (2, 3, 4, 5):
                size = word * 12 if tp_size != 5 else word * 20
                made = Made(scheme, 6, size)
                check_cuts(scheme, Layer.row(size, 6), made.found, made.tensors, (tp_size,))
            made = Made(scheme, word * 12, word * 4)
            sizes = (word * 12,)
            layer = Layer.column(word * 4, sizes)
            check_cuts(scheme, layer, made.found, made.tensors, (2, 3, 4))


def test_a_fused_module_is_cut_by_part() -> None:
    scheme = PackedInt(bits=3, layout=GROUP, group_size=32, symmetric=False)
    made = Made(scheme, 192, 64)
    found = found_of(made.tensors, 192, 64, fused=True)
    layer = Layer.column(64, [128, 64], names=["gate", "up"])
    check_cuts(scheme, layer, found, made.tensors, (1, 2))


def test_indices_that_were_never_ordered() -> None:
    """-1 throughout: the groups in order, counted from the first input of the full layer."""
    scheme = PackedInt(bits=4, layout=GROUP, group_size=16, act_order=True)
    plain = PackedInt(bits=4, layout=GROUP, group_size=16)
    made = Made(plain, 8, 64)
    tensors = {**made.tensors, "weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    found = found_of(tensors, 8, 64)
    assert torch.equal(whole(scheme, found, tensors), made.weight)
    check_cuts(scheme, Layer.row(64, 8), found, tensors, (2, 4, 8))


@pytest.mark.parametrize(
    ("scheme", "layer", "name", "tp_size", "message"),
    [
        pytest.param(
            PackedInt(bits=3, layout=CHANNEL),
            Layer.row(96, 8),
            "weight_packed",
            2,
            "TP 2 cuts 96 columns into 48 per rank; int3 packs 32 columns into 3 int32 entries "
            "and 48 = 1 * 32 + 16. Try: TP 1 or 3.",
            id="dense 3 bits",
        ),
        pytest.param(
            PackedInt(bits=3, layout=CHANNEL, padded=True),
            Layer.row(96, 8),
            "weight_packed",
            2,
            "TP 2 cuts 96 columns into 48 per rank; int3 packs 10 columns per int32 entry and "
            "48 = 4 * 10 + 8. Try: TP 1.",
            id="padded 3 bits",
        ),
        pytest.param(
            PackedInt(bits=4, layout=CHANNEL, symmetric=False),
            Layer.column(32, [24]),
            "weight_zero_point",
            2,
            "TP 2 cuts 24 rows into 12 per rank; int4 packs 8 zero points per int32 entry and "
            "12 = 1 * 8 + 4. Try: TP 1 or 3.",
            id="zero points",
        ),
        pytest.param(
            PackedInt(bits=4, layout=GROUP, group_size=32),
            Layer.row(128, 8),
            "weight_scale",
            8,
            "TP 8 cuts 128 columns into 16 per rank; one scale covers a group of 32 inputs and "
            "16 = 0 * 32 + 16. Try: TP 1, 2 or 4.",
            id="groups",
        ),
    ],
)
def test_refused_cuts(
    scheme: PackedInt, layer: Layer, name: str, tp_size: int, message: str
) -> None:
    found = Found(module="m", tensors={}, outputs=layer.output.size, inputs=layer.input.size)
    [spec] = [spec for spec in scheme.specs(layer, found) if spec.name == name]
    with pytest.raises(LayoutError) as caught:
        layer.layout(spec, tp_size)
    assert str(caught.value) == message


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("layout", [TENSOR, CHANNEL, GROUP])
def test_one_value_per_byte(layout: ScaleLayout, symmetric: bool) -> None:
    outputs, inputs, size = 30, 60, 12 if layout is GROUP else 0
    scheme = PlainInt(layout=layout, group_size=size, symmetric=symmetric)
    random = np.random.default_rng(5)
    shape = {TENSOR: (1,), CHANNEL: (outputs, 1), GROUP: (outputs, inputs // 12)}[layout]
    weight = random.integers(-128, 128, (outputs, inputs))
    scales = 2.0 ** random.integers(-6, 6, shape)
    zeros = random.integers(-128, 128, shape)
    tensors = {
        "weight": torch.from_numpy(weight.astype(np.int8)),
        "weight_scale": torch.from_numpy(scales).to(torch.float16),
        "input_scale": torch.ones(1),
        "input_zero_point": torch.zeros(1, dtype=torch.int8),
    }
    if not symmetric:
        tensors["weight_zero_point"] = torch.from_numpy(zeros.astype(np.int8))
    expected = torch.zeros(outputs, inputs)
    for n in range(outputs):
        for k in range(inputs):
            at = {TENSOR: (0,), CHANNEL: (n, 0), GROUP: (n, k // 12)}[layout]
            z = 0 if symmetric else zeros[at]
            expected[n, k] = float((weight[n, k] - z) * scales[at])
    found = found_of(tensors, outputs, inputs)
    assert torch.equal(whole(scheme, found, tensors), expected)
    check_cuts(scheme, Layer.row(inputs, outputs), found, tensors, (5,))
    check_cuts(scheme, Layer.column(inputs, [outputs]), found, tensors, (2, 3, 5))
    names = [spec.name for spec in scheme.specs(Layer.row(inputs, outputs), found)]
    assert names[-2:] == ["input_scale", "input_zero_point"]


def test_names() -> None:
    assert PackedInt(
        bits=4, layout=GROUP, group_size=128, symmetric=False, act_order=True
    ).name == ("int4 packed, groups of 128, zero points, act-order")
    assert PlainInt(layout=TENSOR).name == "int8, one scale a tensor"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PackedInt(bits=9, layout=CHANNEL),
            "int9 weights, needs 2 to 8 bits.",
        ),
        (
            lambda: PackedInt(bits=4, layout=CHANNEL, act_order=True),
            "act-order with one scale a channel, needs groups.",
        ),
        (
            lambda: PlainInt(layout=GROUP),
            "integer weights with one scale a group and groups of 0, needs groups of at least 1 "
            "input, or one scale a channel or tensor and groups of 0.",
        ),
        (lambda: PlainInt(bits=1, layout=CHANNEL), "int1 weights in bytes, needs 2 to 8 bits."),
    ],
)
def test_impossible_schemes(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == message
