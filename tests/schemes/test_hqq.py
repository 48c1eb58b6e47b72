"""HQQ: the fixture, cuts, synthetic words against a slow decoder, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lading.errors import CheckpointError, LadingError, LayoutError
from lading.layers import Layer
from lading.schemes.base import PartView, Stored
from lading.schemes.hqq import Hqq, HqqQuantization, hqq_from_evidence, parse_hqq
from tests.schemes.decoding import (
    decode,
    fixture_folder,
    found_of,
    joined,
    layer_of,
    references,
)

ROWS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def made(bits: int, outputs: int, inputs: int, group: int) -> tuple[dict[str, Any], torch.Tensor]:
    """A module's tensors and its weight, packed and computed element by element as FORMATS 3.10."""
    rng = np.random.default_rng(bits * outputs + inputs)
    rows, per = outputs * inputs // group, ROWS[bits]
    codes = rng.integers(1 << bits, size=(rows, group))
    scale = rng.random(rows).astype(np.float32)
    zero = (rng.random(rows) * (1 << bits)).astype(np.float32)
    num_packed = -(-rows // per)
    packed = np.zeros((num_packed, group), dtype=np.int64)
    weight = np.empty((rows, group), dtype=np.float32)
    for row in range(rows):
        for column in range(group):
            weight[row, column] = (np.float32(codes[row, column]) - zero[row]) * scale[row]
            shift = bits * (per - 1 - row // num_packed)
            packed[row % num_packed, column] |= int(codes[row, column]) << shift
    tensors = {
        "W_q": torch.tensor(packed).to(torch.int32 if bits == 3 else torch.uint8),
        "scale": torch.tensor(scale).reshape(-1, 1),
        "zero": torch.tensor(zero).reshape(-1, 1),
        "shape": torch.tensor([outputs, inputs]),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(group, dtype=torch.int32),
        "axis": torch.tensor(1, dtype=torch.int32),
        "view_as_float": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, torch.tensor(weight).reshape(outputs, inputs)


def test_fixture_decodes_as_hqq_does() -> None:
    folder = fixture_folder("hqq-native-4bit-g64")
    count = 0
    for module, tensors, reference in references(folder):
        layer = layer_of(reference, module)
        found = found_of(tensors, *reference.shape, module=module)
        quantization = hqq_from_evidence({f"{module}.{k}": v for k, v in found.tensors.items()})
        assert quantization == HqqQuantization()
        scheme = quantization.scheme_for(layer, found)
        assert scheme == Hqq(bits=4, group_size=64)
        assert {spec.name for spec in scheme.specs(layer, found)} == set(tensors)
        assert torch.equal(decode(scheme, layer, tensors).to(reference.dtype), reference)
        if layer.kind.value == "row":
            for tp_size in (2, 4):
                assert torch.equal(joined(scheme, layer, tensors, tp_size), reference)
        count += 1
    assert count == 14


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(24, 40, 8), (16, 96, 32), (8, 15, 5), (6, 64, 16), (40, 8, 8)]
)
def test_words_decode_as_written_down(bits: int, outputs: int, inputs: int, group: int) -> None:
    tensors, weight = made(bits, outputs, inputs, group)
    layer = Layer.replicated(inputs, outputs)
    if (outputs * inputs // group) % ROWS[bits] and bits != 3:
        pytest.skip("hqq packs whole rows only")
    found = found_of(tensors, outputs, inputs)
    scheme = HqqQuantization().scheme_for(layer, found)
    assert scheme == Hqq(bits=bits, group_size=group)
    assert torch.equal(decode(scheme, layer, tensors), weight)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_inputs_can_be_cut_between_groups(bits: int) -> None:
    tensors, weight = made(bits, 16, 120, 8)
    for tp_size in (3, 5):
        pieces = joined(Hqq(bits=bits, group_size=8), Layer.row(120, 16), tensors, tp_size)
        assert torch.equal(pieces, weight)


def test_outputs_of_8_bits_can_be_cut() -> None:
    tensors, weight = made(8, 30, 64, 16)
    for tp_size in (2, 3, 5):
        pieces = joined(Hqq(bits=8, group_size=16), Layer.column(64, [30]), tensors, tp_size)
        assert torch.equal(pieces, weight)


def refused(bits: int, layer: Layer, group: int = 16) -> str:
    tensors, _ = made(bits, layer.output.size, layer.input.size, group)
    with pytest.raises(LayoutError) as info:
        joined(Hqq(bits=bits, group_size=group), layer, tensors, 2)
    return str(info.value)


def test_other_cuts_are_refused() -> None:
    assert refused(4, Layer.column(64, [16])) == (
        "TP 2 cuts 16 rows into 8 per rank; HQQ packs 2 outputs from all over an int4 weight into "
        "one entry and 8 = 0 * 16 + 8. Try: TP 1."
    )
    assert refused(3, Layer.column(64, [20])) == (
        "TP 2 cuts 20 rows into 10 per rank; HQQ packs 10 outputs from all over an int3 weight "
        "into one entry and 10 = 0 * 20 + 10. Try: TP 1."
    )
    assert refused(3, Layer.row(64, 20)) == (
        "TP 2 cuts 64 columns into 32 per rank; HQQ packs int3 rows of groups that end inside rows "
        "of the weight and 32 = 0 * 64 + 32. Try: TP 1."
    )
    assert refused(4, Layer.row(48, 4)) == (
        "TP 2 cuts 48 columns into 24 per rank; one scale covers a group of 16 inputs and "
        "24 = 1 * 16 + 8. Try: TP 1 or 3."
    )


def test_fused_parts_of_several_sizes_are_refused_alike() -> None:
    layer = Layer.qkv(64, 8, 4, 1)
    found = found_of(made(4, 32, 64, 16)[0], 32, 64)
    codes = Hqq(bits=4, group_size=16).specs(layer, found)[0]
    assert layer.layout(codes, 1).local_shape == (24, 64)
    with pytest.raises(LayoutError, match="part 'q': TP 2 cuts 32 rows into 16 per rank; HQQ"):
        layer.layout(codes, 2)
    whole = found_of(made(4, 48, 64, 16)[0], 48, 64, fused=True)
    with pytest.raises(LayoutError) as info:
        Hqq(bits=4, group_size=16).specs(layer, whole)
    assert str(info.value) == (
        "layer.W_q holds all parts of the layer in one tensor, whose bytes have outputs from all "
        "over it (HQQ int4, groups of 16); needs one tensor for each part."
    )


def test_metadata_must_agree() -> None:
    tensors, _ = made(4, 8, 32, 16)
    del tensors["shape"]
    view = PartView(outputs=8, inputs=32)

    def problem(name: str, value: torch.Tensor) -> str:
        with pytest.raises(CheckpointError) as info:
            Hqq(bits=4, group_size=16).dequantize({**tensors, name: value}, view)
        return str(info.value)

    assert problem("nbits", torch.tensor(3)) == (
        "nbits is 3, needs 4 (HQQ int4, groups of 16, as the shapes of W_q and scale show)."
    )
    assert problem("axis", torch.tensor([0])).startswith("axis is 0, needs 1 (")
    assert problem("view_as_float", torch.tensor(1)).startswith("view_as_float is 1, needs 0 (")
    assert problem("packing", torch.tensor(list(b"4bit_32"), dtype=torch.uint8)) == (
        "packing is b'4bit_32', needs b'4bit_u8' (HQQ int4, groups of 16)."
    )


def module_problem(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(LadingError) as info:
        parse_hqq(config).scheme_for(Layer.replicated(32, 8), found_of(tensors, 8, 32))
    return str(info.value)


def test_contradictions_name_both_sides() -> None:
    tensors, _ = made(4, 8, 32, 16)
    shown = "the checkpoint has W_q uint8[8, 16], scale fp32[16, 1], zero fp32[16, 1]"
    config = {"quant_config": {"weight_quant_params": {"nbits": 8, "group_size": 16}}}
    assert module_problem(config, tensors) == (
        f"layer: config.json says HQQ int8, groups of 16, {shown}; is HQQ int4, groups of 16."
    )
    config = {"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32}}}
    assert module_problem(config, tensors) == (
        f"layer: config.json says HQQ int4, groups of 32, {shown}; is HQQ int4, groups of 16."
    )
    assert module_problem({"skip_modules": ["layer"]}, tensors).startswith(
        'layer: config.json says that "layer" is not quantised (skip_modules), the checkpoint has '
    )
    nested = {name: tensor for name, tensor in tensors.items() if name != "zero"}
    assert module_problem({}, nested).endswith(
        "needs W_q, scale, zero (scales that are quantised themselves are not read)."
    )
    by_output = {**tensors, "scale": torch.ones(1, 16)}
    assert module_problem({}, by_output).endswith(
        "needs scale [groups, 1] (groups along the inputs)."
    )
    uneven = {**tensors, "scale": torch.ones(3, 1)}
    assert module_problem({}, uneven).endswith(
        "needs whole groups of the 32 inputs (8 * 32 = 3 * 85 + 1)."
    )
    floats = {**tensors, "W_q": torch.ones(8, 16, dtype=torch.float16)}
    assert module_problem({}, floats).endswith("needs W_q of 16 rows of 16, packed by bits.")


def test_configs_are_checked() -> None:
    def problem(weights: Any) -> str:
        with pytest.raises(LadingError) as info:
            parse_hqq({"quant_config": {"weight_quant_params": weights}})
        return str(info.value)

    scope = "quantization_config.quant_config['weight_quant_params']"
    assert problem({"nbits": 5}) == f"{scope}.nbits: is 5, needs 1, 2, 3, 4 or 8."
    assert problem({}) == f"{scope}.nbits: is missing, needs 1, 2, 3, 4 or 8."
    assert problem({"nbits": 4, "axis": 0}) == (
        f"{scope}.axis: is 0, needs 1 (groups along the inputs)."
    )
    assert problem({"nbits": 4, "view_as_float": True}) == (
        f"{scope}.view_as_float: is true, needs false."
    )
    assert problem(3) == f"{scope}: is 3, needs an object."


def test_only_hqq_is_taken_for_hqq() -> None:
    assert hqq_from_evidence({"lm_head.weight": Stored(dtype="BF16", shape=(2, 2))}) is None
    alone = {"a.W_q": Stored(dtype="U8", shape=(2, 2))}
    assert hqq_from_evidence(alone) is None
    dense = found_of({"weight": torch.ones(8, 32)}, 8, 32)
    assert HqqQuantization().scheme_for(Layer.replicated(32, 8), dense) is None
