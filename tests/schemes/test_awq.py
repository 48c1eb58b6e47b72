"""AWQ gemm: a real checkpoint, random bits against a slow decoder, configs that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lading.errors import ConfigError, LayoutError, ShapeError
from lading.layers import Layer
from lading.schemes.awq import Awq, parse_awq
from tests.schemes.stored_modules import (
    FIXTURES,
    Module,
    assert_cuts,
    fixture_modules,
    layer_of,
    module_of,
)

FOLDER = "awq-gemm-w4-g64"
CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def slowly(rows: list[list[int]]) -> list[list[int]]:
    """FORMATS 3.2, one nibble at a time: nibble j of a word is column order[j] of its eight."""
    result = []
    for words in rows:
        values = [0] * (8 * len(words))
        for at, word in enumerate(words):
            for j, column in enumerate(COLUMN_OF_NIBBLE):
                values[8 * at + column] = ((word & 0xFFFFFFFF) >> (4 * j)) & 15
        result.append(values)
    return result


def made(group_size: int, outputs: int, inputs: int) -> Module:
    torch.manual_seed(0)
    size = inputs if group_size == -1 else group_size
    shapes = {"qweight": (inputs, outputs // 8), "qzeros": (inputs // size, outputs // 8)}
    tensors = {
        name: torch.randint(-(2**31), 2**31, shape).to(torch.int32)
        for name, shape in shapes.items()
    }
    tensors["scales"] = torch.rand(inputs // size, outputs).bfloat16()
    scales = tensors["scales"].float()
    codes, zeros = (slowly(tensors[name].tolist()) for name in shapes)
    weight = torch.empty(outputs, inputs)
    for k in range(inputs):
        for n in range(outputs):
            weight[n, k] = (codes[k][n] - zeros[k // size][n]) * scales[k // size, n]
    return module_of("model.layers.0.mlp.down_proj", tensors, weight)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_fixture(tp_size: int) -> None:
    modules = list(fixture_modules(FOLDER))
    config = json.loads((FIXTURES / FOLDER / "config.json").read_text())["quantization_config"]
    quantization = parse_awq(config)
    for module in modules:
        layer = layer_of(module)
        scheme = quantization.scheme_for(layer, module.found)
        assert scheme == Awq(group_size=64)
        assert scheme.name == "AWQ int4, groups of 64"
        assert_cuts(layer, scheme, module, tp_size)
    head = module_of("lm_head", {"weight": torch.zeros(8, 8)}, torch.zeros(8, 8))
    assert quantization.scheme_for(layer_of(head), head.found) is None


@pytest.mark.parametrize("group_size", [32, -1])
def test_random_bits_in_odd_sizes(group_size: int) -> None:
    module = made(group_size, 24, 160)
    scheme = Awq(group_size=group_size)
    for tp_size in (1, 5):
        assert_cuts(Layer.row(160, 24), scheme, module, tp_size)
    for tp_size in (1, 3):
        assert_cuts(Layer.column(160, [24]), scheme, module, tp_size)


def test_cuts_through_words_and_groups_are_refused() -> None:
    module = made(32, 24, 160)
    with pytest.raises(LayoutError) as caught:
        assert_cuts(Layer.column(160, [24]), Awq(group_size=32), module, 2)
    assert str(caught.value) == (
        "TP 2 cuts 24 columns into 12 per rank; AWQ packs 8 columns per int32 entry and "
        "12 = 1 * 8 + 4. Try: TP 1 or 3."
    )
    with pytest.raises(LayoutError) as caught:
        assert_cuts(Layer.row(160, 24), Awq(group_size=32), module, 2)
    assert str(caught.value) == (
        "TP 2 cuts 160 rows into 80 per rank; one scale covers a group of 32 inputs and "
        "80 = 2 * 32 + 16. Try: TP 1 or 5."
    )


def test_other_spellings() -> None:
    short = {"w_bit": 4, "q_group_size": 128, "version": "GEMM", "modules_to_not_convert": None}
    assert parse_awq(short).scheme == Awq(group_size=128)
    other = {"bits": 4, "group_size": -1, "checkpoint_format": "gemm", "format": "gemm"}
    assert parse_awq(other).scheme == Awq(group_size=-1)
    assert Awq(group_size=-1).name == "AWQ int4, one scale an output"


IMPOSSIBLE = [
    (
        {"version": "gemv"},
        'quantization_config.version: is "gemv", needs gemm (gemv: its groups are padded to whole '
        "words, so no slice of a row is a row).",
    ),
    (
        {"version": "gemv_fast"},
        'quantization_config.version: is "gemv_fast", needs gemm (gemv_fast: it interleaves four '
        "outputs and 64 inputs in int16 entries).",
    ),
    (
        {"version": "Marlin"},
        'quantization_config.version: is "Marlin", needs gemm (marlin: AutoAWQ\'s Marlin layout '
        "permutes scales and has no zero points).",
    ),
    ({"version": "exllama"}, 'quantization_config.version: is "exllama", needs gemm.'),
    (
        {"checkpoint_format": "gemv"},
        'quantization_config.checkpoint_format: is "gemv", needs gemm (gemv: its groups are padded '
        "to whole words, so no slice of a row is a row).",
    ),
    (
        {"backend": "llm-awq"},
        'quantization_config.backend: is "llm-awq", needs autoawq (llm-awq has a layout of its own '
        "in int16).",
    ),
    ({"bits": 8}, "quantization_config.bits: is 8, needs 4."),
    ({"w_bit": 3}, "quantization_config.w_bit: is 3, needs 4."),
    ({"zero_point": "yes"}, 'quantization_config.zero_point: is "yes", needs true or false.'),
    (
        {"group_size": None},
        "quantization_config.group_size: is missing, needs -1 or an int of at least 1.",
    ),
    (
        {"modules_to_not_convert": "lm_head"},
        'quantization_config.modules_to_not_convert: is "lm_head", needs a list of strings or '
        "null.",
    ),
]


@pytest.mark.parametrize(("changes", "text"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_impossible_configs(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_awq(CONFIG | changes)
    assert str(caught.value) == text


def test_modules_to_not_convert_are_whole_components() -> None:
    module = made(32, 24, 64)
    layer = layer_of(module)
    near = parse_awq(CONFIG | {"modules_to_not_convert": ["down", "0.mlp.gate", "visual"]})
    assert near.scheme_for(layer, module.found) == Awq(group_size=32)
    listed = parse_awq(CONFIG | {"modules_to_not_convert": ["lm_head", "model.layers.0."]})
    with pytest.raises(ConfigError) as caught:
        listed.scheme_for(layer, module.found)
    assert str(caught.value) == (
        'model.layers.0.mlp.down_proj: config.json says that "model.layers.0." is not quantised '
        "(modules_to_not_convert), the checkpoint has qweight int32[64, 3], qzeros int32[2, 3], "
        "scales bf16[2, 24]; needs a weight of the model's dtype. In model.safetensors."
    )


def test_headers_that_contradict_the_config() -> None:
    module = made(32, 24, 64)
    with pytest.raises(ShapeError) as caught:
        parse_awq(CONFIG | {"group_size": 16}).scheme_for(layer_of(module), module.found)
    assert str(caught.value) == (
        "checkpoint tensor 'model.layers.0.mlp.down_proj.qzeros' is int32[2, 3], needs int32[4, 3] "
        "(24 outputs and 64 inputs of the layer; config.json: AWQ int4, groups of 16). "
        "In model.safetensors."
    )


def test_schemes_check_themselves() -> None:
    with pytest.raises(ConfigError, match="AWQ groups are of 0 inputs, needs -1 or above 0"):
        Awq(group_size=0)
