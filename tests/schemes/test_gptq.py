"""GPTQ: real checkpoints, random bits against a slow decoder, configs and contradictions."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from lading.errors import CheckpointError, ConfigError, LadingError, LayoutError
from lading.layers import Layer
from lading.schemes.base import PartView
from lading.schemes.gptq import Container, Gptq, parse_gptq
from lading.schemes.marlin import Marlin, Marlin24
from lading.specs import Along, Constant
from tests.schemes.stored_modules import (
    FIXTURES,
    Module,
    assert_cuts,
    fixture_modules,
    layer_of,
    module_of,
    pieces,
)

FOLDERS = [
    "gptq-phi3-w4-g64",
    "gptq-v1-w3-g64-sym",
    "gptq-v1-w4-g64-asym",
    "gptq-v1-w4-g64-sym",
    "gptq-v1-w4-g64-sym-descact",
    "gptq-v1-w8-g64-sym",
    "gptq-v2-w4-g64-sym",
]
CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def random_words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def stream(words: list[int], bits: int) -> list[int]:
    """A dense stream of little-endian words, as one large integer."""
    whole = sum((word & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
    return [(whole >> (bits * at)) & (2**bits - 1) for at in range(len(words) * 32 // bits)]


def slowly(tensors: dict[str, torch.Tensor], scheme: Gptq) -> torch.Tensor:
    """FORMATS 3.1, one element at a time."""
    qweight, qzeros = tensors["qweight"].tolist(), tensors["qzeros"].tolist()
    codes = [stream([row[n] for row in qweight], scheme.bits) for n in range(len(qweight[0]))]
    zeros = [stream(row, scheme.bits) for row in qzeros]
    inputs = len(codes[0])
    size = inputs if scheme.group_size == -1 else scheme.group_size
    index = [i // size for i in range(inputs)]
    if scheme.act_order and scheme.group_size != -1:
        index = tensors["g_idx"].tolist()
    scales = tensors["scales"].float()
    weight = torch.empty(len(codes), inputs)
    for n, column in enumerate(codes):
        for k, code in enumerate(column):
            zero = zeros[index[k]][n]
            if scheme.zeros_minus_one:
                zero = (zero + 1) % 2**scheme.bits
            weight[n, k] = (code - zero) * scales[index[k], n]
    return weight


def made(
    scheme: Gptq, outputs: int, inputs: int, *, index: bool = True, decode: bool = False
) -> Module:
    """A module of random bits; of zero weights where they are not wanted."""
    torch.manual_seed(0)
    groups = 1 if scheme.group_size == -1 else -(-inputs // scheme.group_size)
    tensors = {
        "qweight": random_words(inputs * scheme.bits // 32, outputs),
        "qzeros": random_words(groups, outputs * scheme.bits // 32),
        "scales": torch.rand(groups, outputs).half(),
    }
    size = inputs if scheme.group_size == -1 else scheme.group_size
    if index:
        order = torch.randperm(inputs) if scheme.act_order else torch.arange(inputs)
        tensors["g_idx"] = (order // size).int()
    weight = slowly(tensors, scheme) if decode else torch.zeros(outputs, inputs)
    return module_of("model.layers.0.mlp.down_proj", tensors, weight)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("folder", FOLDERS)
def test_fixtures(folder: str, tp_size: int) -> None:
    modules = list(fixture_modules(folder))
    config = json.loads((FIXTURES / folder / "config.json").read_text())["quantization_config"]
    beside = json.loads((FIXTURES / folder / "quantize_config.json").read_text())
    quantization = parse_gptq(config)
    assert parse_gptq(beside) == quantization
    for module in modules:
        layer = layer_of(module)
        scheme = quantization.scheme_for(layer, module.found)
        assert scheme is not None
        assert_cuts(layer, scheme, module, tp_size)
        if tp_size == 1:
            outputs, inputs = module.weight.shape
            assert_cuts(
                Layer.replicated(inputs, outputs),
                scheme,
                replace(module, found=replace(module.found, fused=False)),
                1,
            )


@pytest.mark.parametrize("folder", FOLDERS)
def test_fixtures_leave_the_head_dense(folder: str) -> None:
    module = next(fixture_modules(folder))
    config = json.loads((FIXTURES / folder / "config.json").read_text())["quantization_config"]
    dense = module_of("lm_head", {"weight": module.weight.half()}, module.weight)
    assert parse_gptq(config).scheme_for(layer_of(dense), dense.found) is None


SYNTHETIC = [
    Gptq(bits=bits, group_size=size, act_order=order, zeros_minus_one=v1)
    for bits in (2, 3, 4, 8)
    for size, order, v1 in ((32, False, True), (-1, True, False), (16, True, True))
]


@pytest.mark.parametrize("scheme", SYNTHETIC, ids=lambda s: f"{s.name}, v{2 - s.zeros_minus_one}")
def test_random_bits_in_odd_sizes(scheme: Gptq) -> None:
    module = made(scheme, 96, 160, decode=True)
    for tp_size in (1, 5):
        assert_cuts(Layer.row(160, 96), scheme, module, tp_size)
    for tp_size in (1, 3):
        assert_cuts(Layer.column(160, [96]), scheme, module, tp_size)


def test_the_last_group_may_be_short() -> None:
    scheme = Gptq(bits=4, group_size=64)
    module = made(scheme, 24, 96, decode=True)
    assert module.tensors["scales"].shape == (2, 24)
    assert_cuts(Layer.column(96, [24]), scheme, module, 3)
    with pytest.raises(LayoutError, match="one scale covers a group of 64 inputs"):
        assert_cuts(Layer.row(96, 24), scheme, module, 2)


def test_fused_parts_with_neighbours_sharing_kv_heads() -> None:
    scheme = Gptq(bits=4, group_size=32)
    layer = Layer.qkv(64, 16, 4, 2)
    module = made(scheme, layer.output.size, 64, decode=True)
    module = replace(module, found=replace(module.found, fused=True))
    for tp_size in (1, 2, 4):
        assert_cuts(layer, scheme, module, tp_size)


def test_zero_points_of_v1_wrap() -> None:
    scheme = Gptq(bits=4, group_size=-1)
    tensors = {
        "qweight": torch.tensor([[0x76543210] * 8], dtype=torch.int32),
        "qzeros": torch.tensor([[0x7EDCBA0F]], dtype=torch.int32),
        "scales": torch.ones(1, 8),
    }
    weight = scheme.dequantize(tensors, PartView(outputs=8, inputs=8))
    assert [-int(row[0]) for row in weight] == [0, 1, 11, 12, 13, 14, 15, 8]
    assert weight[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def specs_of(scheme: Gptq, module: Module) -> dict[str, tuple[Any, ...]]:
    specs = scheme.specs(layer_of(module), module.found)
    return {s.name: (*(d.along for d in s.dims), s.constant, s.group) for s in specs}


def test_which_tensors_there_are() -> None:
    inputs, outputs, whole = Along.INPUT, Along.OUTPUT, Along.WHOLE_INPUT
    ordered = Gptq(bits=4, group_size=32, act_order=True)
    assert specs_of(ordered, made(ordered, 32, 64)) == {
        "qweight": (inputs, outputs, None, 0),
        "qzeros": (whole, outputs, None, 0),
        "scales": (whole, outputs, None, 0),
        "g_idx": (inputs, None, 0),
    }
    plain = Gptq(bits=4, group_size=32)
    assert specs_of(plain, made(plain, 32, 64))["g_idx"] == (inputs, Constant.GROUP_INDEX, 32)
    assert "g_idx" not in specs_of(plain, made(plain, 32, 64, index=False))
    single = Gptq(bits=4, group_size=-1, act_order=True)
    assert specs_of(single, made(single, 32, 64)) == {
        "qweight": (inputs, outputs, None, 0),
        "qzeros": (Along.FIXED, outputs, None, 0),
        "scales": (Along.FIXED, outputs, None, 0),
        "g_idx": (inputs, Constant.GROUP_INDEX, 64),
    }
    assert [s.name for s in (ordered, plain, single)] == [
        "GPTQ int4, groups of 32, act-order",
        "GPTQ int4, groups of 32",
        "GPTQ int4, one scale an output",
    ]


def chosen(config: dict[str, Any], name: str, *, outputs: int = 256, inputs: int = 256) -> Any:
    """The scheme that a config gives to a module, whatever its tensors are."""
    quantization = parse_gptq(CONFIG | config)
    scheme = Gptq(bits=4, group_size=32)
    try:
        module = made(scheme, outputs, inputs)
        return quantization.scheme_for(layer_of(module), replace(module.found, module=name))
    except LadingError as error:
        return str(error)


def test_dynamic_rules_count_in_order_from_the_beginning_of_the_name() -> None:
    rules = {
        "-:.*layers\\.1\\.": {},
        "+:.*down_proj": {"bits": 8, "group_size": 64},
        ".*up_proj": {"desc_act": True, "mse": 2.4},
        "mlp": {"bits": 2},
    }
    quantization = parse_gptq(CONFIG | {"dynamic": rules})
    eight = Gptq(bits=8, group_size=64)
    module = made(eight, 32, 64)

    def scheme_for(name: str, source: Module) -> Any:
        return quantization.scheme_for(layer_of(source), replace(source.found, module=name))

    assert scheme_for("model.layers.0.mlp.down_proj", module) == eight
    ordered = Gptq(bits=4, group_size=32, act_order=True)
    assert scheme_for("model.layers.0.mlp.up_proj", made(ordered, 32, 64)) == ordered
    plain = Gptq(bits=4, group_size=32)
    assert scheme_for("model.layers.0.mlp.gate_proj", made(plain, 32, 64)) == plain
    dense = module_of("x", {"weight": torch.zeros(32, 64)}, torch.zeros(32, 64))
    assert scheme_for("model.layers.1.mlp.down_proj", dense) is None
    assert scheme_for("model.layers.0.mlp.down_proj", dense) is None
    with pytest.raises(ConfigError) as caught:
        scheme_for("model.layers.1.mlp.down_proj", module)
    assert str(caught.value) == (
        'model.layers.1.mlp.down_proj: config.json says that it is not quantised (dynamic "-:'
        '.*layers\\.1\\."), the checkpoint has qweight int32[16, 32], qzeros int32[1, 8], scales '
        "fp16[1, 32], g_idx int32[64]; needs a weight of the model's dtype. In model.safetensors."
    )


def test_the_head_is_quantised_where_nothing_says_otherwise() -> None:
    scheme = Gptq(bits=4, group_size=32)
    assert chosen({}, "lm_head") == scheme
    assert chosen({"lm_head": True}, "lm_head") == scheme
    assert chosen({"lm_head": False}, "model.lm_head.x") == scheme
    assert chosen({"lm_head": False, "dynamic": {"lm_head": {}}}, "lm_head") == scheme
    assert chosen({"lm_head": False}, "lm_head").startswith(
        "lm_head: config.json says that it is not quantised (lm_head false), the checkpoint has "
    )


def test_lists_of_what_is_quantised_do_not_outweigh_the_headers() -> None:
    listed = {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}
    assert chosen(listed, "model.layers.0.mlp.down_proj") == Gptq(bits=4, group_size=32)


def test_formats() -> None:
    assert parse_gptq(CONFIG).container is Container.V1
    assert parse_gptq(CONFIG | {"checkpoint_format": "gptq_v2"}).container is Container.V2
    assert parse_gptq(CONFIG | {"format": "gptq_v2"}).container is Container.V2
    marlin = CONFIG | {"group_size": 128, "is_marlin_format": True}
    assert parse_gptq(marlin).container is Container.MARLIN
    assert parse_gptq(marlin | {"checkpoint_format": "marlin"}).container is Container.MARLIN
    tiles = parse_gptq(CONFIG | {"group_size": -1, "checkpoint_format": "marlin_24"})
    assert tiles.container is Container.MARLIN_24


def test_marlin_schemes() -> None:
    weight = torch.zeros(64, 256)
    tensors = {"B": random_words(16, 128), "s": torch.ones(2, 64).half()}
    module = module_of("a", tensors, weight)
    config = CONFIG | {"group_size": 128, "checkpoint_format": "marlin"}
    scheme = parse_gptq(config).scheme_for(layer_of(module), module.found)
    assert scheme == Marlin(group_size=128, one_group=False)
    sparse = {
        "B_24": random_words(8, 128),
        "B_meta": random_words(8, 128).short(),
        "s": torch.ones(2, 64).half(),
    }
    module = module_of("a", sparse, weight)
    config = CONFIG | {"group_size": 128, "checkpoint_format": "marlin_24"}
    scheme = parse_gptq(config).scheme_for(layer_of(module), module.found)
    assert scheme == Marlin24(group_size=128, one_group=False)


IMPOSSIBLE = [
    ({"bits": 5}, "quantization_config.bits: is 5, needs 2, 3, 4 or 8."),
    ({"bits": True}, "quantization_config.bits: is true, needs 2, 3, 4 or 8."),
    ({"bits": None}, "quantization_config.bits: is missing, needs 2, 3, 4 or 8."),
    ({"group_size": 0}, "quantization_config.group_size: is 0, needs -1 or an int of at least 1."),
    ({"desc_act": "no"}, 'quantization_config.desc_act: is "no", needs true or false.'),
    ({"sym": 1}, "quantization_config.sym: is 1, needs true or false."),
    ({"lm_head": "yes"}, 'quantization_config.lm_head: is "yes", needs true or false.'),
    (
        {"checkpoint_format": "gptq_p"},
        'quantization_config.checkpoint_format: is "gptq_p", needs gptq, gptq_v2, marlin or '
        "marlin_24.",
    ),
    ({"format": 2}, "quantization_config.format: is 2, needs a string."),
    (
        {"checkpoint_format": "gptq", "format": "gptq_v2"},
        "quantization_config: checkpoint_format, format and is_marlin_format say gptq and gptq_v2, "
        "needs one of them.",
    ),
    (
        {"pack_dtype": "int64"},
        'quantization_config.pack_dtype: is "int64", needs int32, the only width that is known to '
        "be written.",
    ),
    (
        {"is_marlin_format": True, "bits": 8, "group_size": 128},
        "quantization_config.bits: is 8, needs 4.",
    ),
    (
        {"is_marlin_format": True},
        "quantization_config.group_size: is 32, needs 128 or -1 (marlin stores nothing else).",
    ),
    (
        {"is_marlin_format": True, "group_size": 128, "desc_act": True},
        "quantization_config.desc_act: is true, needs false (marlin stores nothing else).",
    ),
    (
        {"is_marlin_format": True, "group_size": 128, "sym": False},
        "quantization_config.sym: is false, needs true (marlin stores nothing else).",
    ),
    ({"dynamic": []}, "quantization_config.dynamic: is [], needs an object or null."),
    (
        {"dynamic": {"+:a": 8}},
        "quantization_config.dynamic['+:a']: is 8, needs an object.",
    ),
    (
        {"dynamic": {"+:a": {"bits": 6}}},
        "quantization_config.dynamic['+:a'].bits: is 6, needs 2, 3, 4 or 8.",
    ),
    (
        {"dynamic": {"-:(a": {}}},
        "quantization_config.dynamic['-:(a']: is no regular expression: missing ), unterminated "
        "subpattern at position 0.",
    ),
    (
        {"dynamic": {"+:a": {"format": "gptq_v2"}}},
        "quantization_config.dynamic['+:a'].format: is \"gptq_v2\", needs no other layout than "
        "that of the whole checkpoint.",
    ),
]


@pytest.mark.parametrize(("changes", "text"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_impossible_configs(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gptq(CONFIG | changes)
    assert str(caught.value) == text


CONTRADICTIONS = [
    (
        {"bits": 8},
        "checkpoint tensor 'a.qweight' is int32[32, 256], needs int32[64, 256] (256 outputs and "
        "256 inputs of the layer; config.json: GPTQ int8, groups of 32). In model.safetensors.",
    ),
    (
        {"group_size": 64},
        "checkpoint tensor 'a.qzeros' is int32[8, 32], needs int32[4, 32] (256 outputs and 256 "
        "inputs of the layer; config.json: GPTQ int4, groups of 64). In model.safetensors.",
    ),
    (
        {"checkpoint_format": "marlin", "group_size": -1},
        "a: config.json says Marlin int4, one scale an output, the checkpoint has no B, no s; "
        "needs B, s. In model.safetensors.",
    ),
]


@pytest.mark.parametrize(("changes", "text"), CONTRADICTIONS, ids=["bits", "group", "layout"])
def test_headers_that_contradict_the_config(changes: dict[str, Any], text: str) -> None:
    assert chosen(changes, "a") == text


def test_act_order_needs_its_index() -> None:
    module = made(Gptq(bits=4, group_size=32), 32, 64, index=False)
    with pytest.raises(ConfigError) as caught:
        parse_gptq(CONFIG | {"desc_act": True}).scheme_for(layer_of(module), module.found)
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj: config.json says GPTQ int4, groups of 32, act-order, the "
        "checkpoint has no g_idx; needs qweight, qzeros, scales, g_idx. In model.safetensors."
    )
    single = CONFIG | {"desc_act": True, "group_size": -1}
    module = made(Gptq(bits=4, group_size=-1), 32, 64, index=False)
    assert parse_gptq(single).scheme_for(layer_of(module), module.found) is not None


def test_an_index_beyond_the_groups_is_refused() -> None:
    scheme = Gptq(bits=4, group_size=32, act_order=True)
    module = made(scheme, 32, 64)
    module.tensors["g_idx"][3] = 2
    with pytest.raises(CheckpointError) as caught:
        list(pieces(Layer.row(64, 32), scheme, module, 1))
    assert str(caught.value) == "g_idx has groups 0 to 2, needs them in 0 to 1 (2 rows of scales)."


@pytest.mark.parametrize(
    ("scheme", "layer", "text"),
    [
        (
            Gptq(bits=4, group_size=-1),
            Layer.row(800, 8),
            "TP 8 cuts 800 rows into 100 per rank; int4 packs 8 rows per int32 entry and "
            "100 = 12 * 8 + 4. Try: TP 1, 2, 4 or 5.",
        ),
        (
            Gptq(bits=3, group_size=-1),
            Layer.column(32, [96]),
            "TP 2 cuts 96 columns into 48 per rank; int3 packs 32 columns per 3 int32 entries and "
            "48 = 1 * 32 + 16. Try: TP 1 or 3.",
        ),
        (
            Gptq(bits=8, group_size=128),
            Layer.row(256, 8),
            "TP 4 cuts 256 rows into 64 per rank; one scale covers a group of 128 inputs and "
            "64 = 0 * 128 + 64. Try: TP 1 or 2.",
        ),
    ],
    ids=["rows", "columns", "groups"],
)
def test_cuts_through_entries_are_refused(scheme: Gptq, layer: Layer, text: str) -> None:
    tp_size = int(text.split()[1])
    module = made(scheme, layer.output.size, layer.input.size)
    with pytest.raises(LayoutError) as caught:
        assert_cuts(layer, scheme, module, tp_size)
    assert str(caught.value) == text


def test_schemes_check_themselves() -> None:
    with pytest.raises(ConfigError, match="GPTQ codes are of 5 bits, needs 2, 3, 4 or 8"):
        Gptq(bits=5, group_size=128)
    with pytest.raises(ConfigError, match="GPTQ groups are of 0 inputs, needs -1 or above 0"):
        Gptq(bits=4, group_size=0)
