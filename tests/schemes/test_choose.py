"""Layers of checkpoints through config, plan, load and decoding: what has gone wrong silently
elsewhere, what becomes of scales that a cut goes through, and contradictions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lading import models
from lading.checkpoint import Source, open_checkpoint
from lading.errors import CallError, LadingError, LayoutError, NotLoadedError, PlanError
from lading.layers import Layer
from lading.models import parse_config
from lading.names import Names
from lading.nn import QKVParallelLinear
from lading.preflight import preflight, read
from lading.ranks import Ranks, all_ranks
from lading.schemes import (
    QuantConfig,
    Quantization,
    Straddle,
    describe,
    quant_config_of,
    quantization_of,
)
from lading.schemes.awq import parse_awq
from lading.schemes.compressed_tensors import parse_compressed_tensors
from lading.schemes.fp8 import parse_fp8
from lading.schemes.gptq import parse_gptq
from lading.schemes.modelopt import parse_modelopt
from tests.schemes.checkpoints import (
    FP8_CONFIG,
    GPTQ_CONFIG,
    Tensors,
    bits,
    decoded,
    fp8,
    fp8_static,
    gptq,
    load_layer,
    model_tensors,
    write_model,
)

FOUR = Names.of({"four": ["a", "b", "c", "d"]})
GATE_UP = ("gate_proj", "up_proj")
BLOCKS = parse_fp8({"quant_method": "fp8", "weight_block_size": [128, 128]})


def blocks_of(outputs: int, inputs: int) -> Tensors:
    return {
        "weight": fp8(outputs, inputs),
        "weight_scale_inv": torch.rand(-(-outputs // 128), -(-inputs // 128)),
    }


def times_blocks(tensors: Tensors) -> torch.Tensor:
    """The decoded weight, element by element."""
    weight, scale = tensors["weight"].float(), tensors["weight_scale_inv"]
    rows, columns = torch.meshgrid(
        torch.arange(weight.shape[0]), torch.arange(weight.shape[1]), indexing="ij"
    )
    return weight * scale[rows // 128, columns // 128]


def named(module: str, tensors: Tensors) -> Tensors:
    return {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}


# --- silent elsewhere


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("sizes", [(448, 448), (192, 192), (64, 64, 64, 64)], ids=str)
def test_merged_block_scales(
    sizes: tuple[int, ...], fused: bool, tp_size: int, tmp_path: Path
) -> None:
    """Blocks of 128 go through the cuts and, in fused files, through the parts."""
    prefix = "four" if len(sizes) == 4 else "gate_up_proj"
    stored = ("a", "b", "c", "d") if len(sizes) == 4 else GATE_UP
    layer = Layer.column(320, list(sizes))
    tensors: Tensors = {}
    if fused:
        own = blocks_of(sum(sizes), 320)
        tensors = named(prefix, own)
        expected = list(torch.split(times_blocks(own), list(sizes)))
    else:
        expected = []
        for name, size in zip(stored, sizes, strict=True):
            own = blocks_of(size, 320)
            tensors |= named(name, own)
            expected.append(times_blocks(own))
    layers = load_layer(tmp_path, prefix, layer, tensors, BLOCKS, tp_size, names=FOUR)
    for found, needed in zip(decoded(layers).values(), expected, strict=True):
        assert torch.equal(found, needed)


def test_a_slot_that_no_scale_was_loaded_into(tmp_path: Path) -> None:
    """Two of three scalars: the forward pass refuses, and says which is missing."""
    tensors: Tensors = {}
    for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        tensors |= named(name, fp8_static(size, 64))
    write_model(tmp_path, tensors, FP8_CONFIG)
    config = QuantConfig(parse_fp8(FP8_CONFIG), open_checkpoint(tmp_path).tensors, Names())
    layer = QKVParallelLinear(
        64, 16, 4, 2, bias=False, quant_config=config, prefix="qkv_proj", ranks=Ranks()
    )
    for part in ("q", "k", "v"):
        for leaf in ("weight", "weight_scale", "input_scale"):
            param = layer.get_parameter(leaf)
            if (part, leaf) != ("k", "weight_scale"):
                layer.weight_loader(param, tensors[f"{part}_proj.{leaf}"], part)
    with pytest.raises(NotLoadedError) as caught:
        layer(torch.zeros(1, 64))
    assert str(caught.value) == (
        "qkv_proj.weight_scale, part 'k': elements [1:2] of [3] were never loaded, needs all of "
        "them."
    )
    layer.weight_loader(layer.get_parameter("weight_scale"), tensors["k_proj.weight_scale"], "k")
    for part, scale in zip(("q", "k", "v"), layer.get_parameter("weight_scale"), strict=True):
        weight = tensors[f"{part}_proj.weight"].float() * tensors[f"{part}_proj.weight_scale"]
        assert scale == tensors[f"{part}_proj.weight_scale"]
        assert torch.equal(layer.dequantized_part(part), weight)


def packed(**weights: Any) -> Any:
    made = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, **weights}
    return parse_compressed_tensors(
        {
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": made}},
        }
    )


@pytest.mark.parametrize(("padded", "words"), [(True, 8), (False, 8)])
def test_three_bit_zero_points_with_40_rows_per_rank(
    padded: bool, words: int, tmp_path: Path
) -> None:
    """80 zero points are 8 words of 10 whole values, or a dense stream of 7.5."""
    quantization = packed(num_bits=3, symmetric=False)
    count = -(-320 // 10) if padded else 320 * 3 // 32
    tensors = {
        "weight_packed": bits(80, count),
        "weight_scale": torch.rand(80, 10),
        "weight_zero_point": bits(words, 10),
        "weight_shape": torch.tensor([80, 320]),
    }

    def attempt(tp_size: int) -> torch.Tensor:
        layer = Layer.column(320, [80])
        stored = named("up_proj", tensors)
        return decoded(load_layer(tmp_path, "up_proj", layer, stored, quantization, tp_size))[None]

    one = attempt(1)
    values = [
        [_value(row, j, padded) for j in range(320)] for row in tensors["weight_packed"].tolist()
    ]
    zeros = torch.tensor(
        [
            [_value(column, j, padded) for j in range(80)]
            for column in tensors["weight_zero_point"].t().tolist()
        ]
    ).t()
    groups = torch.arange(320) // 32
    expected = (torch.tensor(values) - zeros[:, groups]) * tensors["weight_scale"][:, groups]
    assert torch.equal(one, expected)
    if padded:
        assert torch.equal(attempt(2), expected)
        return
    with pytest.raises(LayoutError) as caught:
        attempt(2)
    assert str(caught.value) == (
        "up_proj.weight_zero_point: TP 2 cuts 80 rows into 40 per rank; int3 packs 32 zero points "
        "into 3 int32 entries and 40 = 1 * 32 + 8. Try: TP 1."
    )


def _value(words: list[int], j: int, padded: bool) -> int:
    """Value j of int32 words of three bits, bit by bit."""
    start = j // 10 * 32 + j % 10 * 3 if padded else 3 * j
    return sum(
        ((words[at // 32] & 0xFFFFFFFF) >> (at % 32) & 1) << i
        for i, at in enumerate(range(start, start + 3))
    )


def test_a_head_of_a_vocabulary_of_100(tmp_path: Path) -> None:
    """100 zero points of 4 bits are 12 words and a half: no tool can have written them."""
    quantization = parse_gptq(GPTQ_CONFIG | {"lm_head": True})
    layer = Layer.embedding(100, 64, pad_to=64)
    tensors = named("lm_head", gptq(100, 64))
    with pytest.raises(LadingError) as caught:
        load_layer(tmp_path, "lm_head", layer, tensors, quantization, 1, head=True)
    assert str(caught.value) == (
        "lm_head.qzeros: has 100 columns; int4 packs 8 columns per int32 entry and "
        "100 = 12 * 8 + 4."
    )


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_a_head_whose_padding_begins_inside_a_rank(tp_size: int, tmp_path: Path) -> None:
    quantization = parse_gptq(GPTQ_CONFIG | {"lm_head": True})
    layer = Layer.embedding(104, 64, pad_to=64)
    own = gptq(104, 64)
    layers = load_layer(
        tmp_path, "lm_head", layer, named("lm_head", own), quantization, tp_size, head=True
    )
    full = torch.cat([one.dequantized_part(None) for one in layers])
    shifts = torch.arange(8) * 4
    codes = (own["qweight"].unsqueeze(1) >> shifts[:, None]) & 15
    zeros = (((own["qzeros"].unsqueeze(2) >> shifts) & 15) + 1) & 15
    groups = torch.arange(64) // 16
    zeros, scales = zeros.flatten(1)[groups], own["scales"].float()[groups]
    assert torch.equal(full, ((codes.flatten(0, 1) - zeros) * scales).t())
    padded = torch.cat([one.dequantized_weight() for one in layers])
    assert not padded[104:].any()


def test_the_shape_is_compared_for_each_part(tmp_path: Path) -> None:
    """Each of q, k, v has a weight_shape of its own; none is kept, each has to be right."""
    quantization = packed(symmetric=True)
    tensors: Tensors = {}
    for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
        own = {
            "weight_packed": bits(size, 8),
            "weight_scale": torch.rand(size, 2),
            "weight_shape": torch.tensor([size, 64]),
        }
        tensors |= named(name, own)
    layer = Layer.qkv(64, 16, 4, 2)
    for tp_size in (1, 2, 4):
        for one in load_layer(tmp_path, "qkv_proj", layer, tensors, quantization, tp_size):
            assert "weight_shape" not in dict(one.named_parameters())
    tensors["k_proj.weight_shape"] = torch.tensor([64, 64])
    with pytest.raises(LadingError) as caught:
        load_layer(tmp_path, "qkv_proj", layer, tensors, quantization, 2)
    assert str(caught.value) == (
        "qkv_proj.weight_shape: checkpoint tensor 'k_proj.weight_shape' has 64 at 0, needs 32 "
        "(the sizes of the declared layer). In model.safetensors."
    )


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_channel_scale_may_be_flat(tp_size: int, tmp_path: Path) -> None:
    """[O] and [O, 1] are the same numbers; [O] under groups is not, and is refused."""
    int8 = parse_compressed_tensors(
        {
            "format": "int-quantized",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
                }
            },
        }
    )
    tensors: Tensors = {}
    needed = []
    for name in GATE_UP:
        own = {"weight": bits(6, 8, dtype=torch.int8), "weight_scale": torch.rand(6)}
        tensors |= named(name, own)
        needed.append(own["weight"].float() * own["weight_scale"].unsqueeze(1))
    layers = load_layer(tmp_path, "gate_up_proj", Layer.column(8, [6, 6]), tensors, int8, tp_size)
    assert layers[0].get_parameter("weight_scale").shape == (12 // tp_size, 1)
    assert torch.equal(torch.cat(list(decoded(layers).values())), torch.cat(needed))


def test_a_flat_scale_under_groups_is_refused(tmp_path: Path) -> None:
    tensors = {"weight_packed": bits(8, 8), "weight_scale": torch.rand(8)}
    with pytest.raises(LadingError) as caught:
        load_layer(
            tmp_path,
            "up_proj",
            Layer.column(64, [8]),
            named("up_proj", tensors),
            packed(group_size=64),
            1,
        )
    assert str(caught.value) == (
        "up_proj: checkpoint tensor 'up_proj.weight_scale' is fp32[8], needs fp32[8, 1] (8 "
        "outputs and 64 inputs of the layer; config.json: int4 packed, groups of 64). In "
        "model.safetensors."
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_one_scale_of_a_module_that_is_fused_on_disk(
    shape: tuple[int, ...], tp_size: int, tmp_path: Path
) -> None:
    own = {"weight": fp8(128, 64), "weight_scale": torch.rand(shape)}
    quantization = parse_fp8({"quant_method": "fp8"})
    if shape == (1, 1):  # only compressed-tensors says by config that it is one for the tensor
        quantization = parse_compressed_tensors(
            {
                "format": "float-quantized",
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"},
                    }
                },
            }
        )
    layer = Layer.qkv(64, 16, 4, 2)
    layers = load_layer(tmp_path, "qkv_proj", layer, named("qkv_proj", own), quantization, tp_size)
    for one in layers:
        assert one.get_parameter("weight_scale").tolist() == [float(own["weight_scale"])] * 3
    needed = own["weight"].float() * own["weight_scale"].reshape(())
    assert torch.equal(torch.cat(list(decoded(layers).values())), needed)


# --- scales that a cut goes through


def test_straddling_blocks_are_kept_twice_or_refused(tmp_path: Path) -> None:
    def attempt(layer: Layer, prefix: str, own: Tensors, tp_size: int, policy: Straddle) -> Any:
        stored = named(prefix, own)
        return decoded(
            load_layer(
                tmp_path, prefix, layer, stored, BLOCKS, tp_size, names=FOUR, straddle=policy
            )
        )

    own = blocks_of(192, 384)
    row, column = Layer.row(384, 192), Layer.column(384, [192])
    for layer, tp_size in ((row, 2), (row, 4), (column, 2), (column, 3)):
        found = attempt(layer, "up_proj", own, tp_size, Straddle.DUPLICATE)[None]
        assert torch.equal(found, times_blocks(own))
    found = attempt(row, "up_proj", own, 3, Straddle.REFUSE)[None]
    assert torch.equal(found, times_blocks(own))
    with pytest.raises(LayoutError) as caught:
        attempt(row, "up_proj", own, 2, Straddle.REFUSE)
    assert str(caught.value) == (
        "up_proj.weight_scale_inv: TP 2 cuts 384 columns into 192 per rank; one scale covers 128 "
        "inputs, no entry may be kept twice, and 192 = 1 * 128 + 64. Try: TP 1 or 3."
    )
    with pytest.raises(LayoutError) as caught:
        attempt(column, "up_proj", own, 2, Straddle.REFUSE)
    assert str(caught.value) == (
        "up_proj.weight_scale_inv: TP 2 cuts 192 rows into 96 per rank; one scale covers 128 "
        "outputs, no entry may be kept twice, and 96 = 0 * 128 + 96. Try: TP 1."
    )
    with pytest.raises(LayoutError) as caught:
        attempt(Layer.column(384, [96, 96]), "gate_up_proj", own, 1, Straddle.REFUSE)
    assert str(caught.value) == (
        "gate_up_proj, part 0: ends at row 96 of gate_up_proj.weight_scale_inv; one scale covers "
        "128 outputs, no entry may be kept twice, and 96 = 0 * 128 + 96."
    )


def test_policies_have_names(tmp_path: Path) -> None:
    folder = write_model(tmp_path, model_tensors(fp8_static), FP8_CONFIG)
    checkpoint = open_checkpoint(folder)
    config = quant_config_of(checkpoint, Names(), straddle="refuse")
    assert config is not None
    assert config.straddle is Straddle.REFUSE
    with pytest.raises(CallError) as caught:
        quant_config_of(checkpoint, Names(), straddle="copy")
    assert str(caught.value) == (
        "quant_config_of: straddle is 'copy', needs one of: duplicate, refuse."
    )


# --- act-order


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_act_order_under_a_row_cut(tp_size: int, tmp_path: Path) -> None:
    """Each rank has its inputs' indices, which count over all ranks, and all scales."""
    own = gptq(16, 64)
    own["g_idx"] = own["g_idx"][torch.randperm(64)]
    quantization = parse_gptq(GPTQ_CONFIG | {"desc_act": True})
    layer = Layer.row(64, 16)
    layers = load_layer(
        tmp_path, "down_proj", layer, named("down_proj", own), quantization, tp_size
    )
    shifts = torch.arange(8) * 4
    codes = ((own["qweight"].unsqueeze(1) >> shifts[:, None]) & 15).flatten(0, 1)
    zeros = (((own["qzeros"].unsqueeze(2) >> shifts) & 15) + 1).flatten(1) & 15
    index = own["g_idx"].long()
    needed = ((codes - zeros[index]) * own["scales"].float()[index]).t()
    assert torch.equal(decoded(layers)[None], needed)
    assert layers[0].get_parameter("scales").shape == (4, 16)


def test_an_order_that_the_config_denies_is_refused(tmp_path: Path) -> None:
    own = gptq(16, 64)
    own["g_idx"] = own["g_idx"].flip(0)
    with pytest.raises(LadingError) as caught:
        load_layer(
            tmp_path,
            "down_proj",
            Layer.row(64, 16),
            named("down_proj", own),
            parse_gptq(GPTQ_CONFIG),
            2,
        )
    assert str(caught.value) == (
        "down_proj.g_idx: checkpoint tensor 'down_proj.g_idx' has 3 at 0, needs 0 (groups in "
        "order, as the config declares). In model.safetensors."
    )


def test_parts_in_one_order_may_have_each_their_own(tmp_path: Path) -> None:
    """q, k and v of an act-order checkpoint have a g_idx each."""
    quantization = parse_gptq(GPTQ_CONFIG | {"desc_act": True})
    tensors: Tensors = {}
    needed = {}
    shifts = torch.arange(8) * 4
    for part, size in (("q", 64), ("k", 32), ("v", 32)):
        own = gptq(size, 64)
        own["g_idx"] = own["g_idx"][torch.randperm(64)]
        tensors |= named(f"{part}_proj", own)
        codes = ((own["qweight"].unsqueeze(1) >> shifts[:, None]) & 15).flatten(0, 1)
        zeros = (((own["qzeros"].unsqueeze(2) >> shifts) & 15) + 1).flatten(1) & 15
        index = own["g_idx"].long()
        needed[part] = ((codes - zeros[index]) * own["scales"].float()[index]).t()
    for tp_size in (1, 2, 4):
        layers = load_layer(
            tmp_path, "qkv_proj", Layer.qkv(64, 16, 4, 2), tensors, quantization, tp_size
        )
        for part, weight in decoded(layers).items():
            assert torch.equal(weight, needed[part])


# --- contradictions, from headers alone


def problems_of(folder: Path, tp_size: int = 2) -> str:
    """The first problem."""
    with pytest.raises(LadingError) as caught:
        preflight(folder, all_ranks(tp_size))
    error = caught.value
    return str(error.problems[0] if isinstance(error, PlanError) else error)


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[f"model.layers.0.{name}"]

    return change


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"model.layers.0.{name}"] = tensor

    return change


@pytest.mark.parametrize(
    ("config", "change", "text"),
    [
        pytest.param(
            GPTQ_CONFIG,
            without("mlp.down_proj.scales"),
            "model.layers.0.mlp.down_proj: config.json says GPTQ int4, groups of 16, the "
            "checkpoint has no scales; needs qweight, qzeros, scales, g_idx. In "
            "model.safetensors.",
            id="no scale",
        ),
        pytest.param(
            GPTQ_CONFIG,
            without("self_attn.k_proj.qzeros"),
            "model.layers.0.self_attn.k_proj: config.json says GPTQ int4, groups of 16, the "
            "checkpoint has no qzeros; needs qweight, qzeros, scales, g_idx. In "
            "model.safetensors.",
            id="no zero point",
        ),
        pytest.param(
            GPTQ_CONFIG,
            with_tensor("mlp.down_proj.weight_scale", torch.ones(64)),
            "model.layers.0.mlp.down_proj: config.json says GPTQ int4, groups of 16, the "
            "checkpoint has weight_scale fp32[64]; needs qweight, qzeros, scales, g_idx. In "
            "model.safetensors.",
            id="one more scale",
        ),
        pytest.param(
            GPTQ_CONFIG,
            with_tensor("mlp.down_proj.qzeros_2", torch.ones(64)),
            "model.layers.0.mlp.down_proj.qzeros_2: checkpoint tensor fp32[64] belongs to no "
            "parameter, and no rule skips it. In model.safetensors.",
            id="one more tensor",
        ),
        pytest.param(
            GPTQ_CONFIG,
            with_tensor("mlp.down_proj.qweight", torch.ones(16, 64)),
            "model.layers.0.mlp.down_proj: checkpoint tensor "
            "'model.layers.0.mlp.down_proj.qweight' is fp32[16, 64], needs int32 (config.json: "
            "GPTQ int4, groups of 16). In model.safetensors.",
            id="wrong dtype",
        ),
        pytest.param(
            GPTQ_CONFIG | {"group_size": 32},
            lambda tensors: None,
            "model.layers.0.self_attn.qkv_proj: checkpoint tensor "
            "'model.layers.0.self_attn.q_proj.qzeros' is int32[4, 8], needs int32[2, 8] (64 "
            "outputs and 64 inputs of the layer; config.json: GPTQ int4, groups of 32). In "
            "model.safetensors.",
            id="group size",
        ),
        pytest.param(
            GPTQ_CONFIG | {"bits": 8},
            lambda tensors: None,
            "model.layers.0.self_attn.qkv_proj: checkpoint tensor "
            "'model.layers.0.self_attn.q_proj.qweight' is int32[8, 64], needs int32[16, 64] (64 "
            "outputs and 64 inputs of the layer; config.json: GPTQ int8, groups of 16). In "
            "model.safetensors.",
            id="bits",
        ),
        pytest.param(
            GPTQ_CONFIG | {"quant_method": "squeeze"},
            lambda tensors: None,
            "quantization_config: quant_method is 'squeeze', needs one of: auto-round, awq, "
            "bitsandbytes, compressed-tensors, fp8, gptq, hqq, modelopt. In config.json.",
            id="method",
        ),
        pytest.param(
            FP8_CONFIG,
            lambda tensors: None,
            "model.layers.0.self_attn.q_proj: config.json says quant_method fp8, the checkpoint "
            "has g_idx int32[64], qweight int32[8, 64], qzeros int32[4, 8], scales fp16[4, 64]; "
            "needs one of weight_scale_inv and weight_scale. In model.safetensors.",
            id="other method",
        ),
    ],
)
def test_contradictions(
    config: dict[str, Any], change: Callable[[Tensors], None], text: str, tmp_path: Path
) -> None:
    tensors = model_tensors(gptq)
    change(tensors)
    assert problems_of(write_model(tmp_path, tensors, config)) == text


def test_parts_of_several_schemes_are_refused(tmp_path: Path) -> None:
    tensors = model_tensors(gptq)
    module = "model.layers.0.mlp.up_proj"
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{module}.{leaf}"]
    tensors[f"{module}.weight"] = torch.randn(128, 64).bfloat16()
    assert problems_of(write_model(tmp_path, tensors, GPTQ_CONFIG)) == (
        "model.layers.0.mlp.gate_up_proj: 'model.layers.0.mlp.gate_proj' is GPTQ int4, groups of "
        "16 and 'model.layers.0.mlp.up_proj' is dense, needs one scheme (the two are parts of "
        "one layer)."
    )


# --- where a config is found


@pytest.mark.parametrize(
    ("file", "raw", "needed"),
    [
        (
            "hf_quant_config.json",
            {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}},
            parse_modelopt({"quant_algo": "FP8"}),
        ),
        ("quantize_config.json", {"bits": 4, "group_size": 128}, None),
        (
            "quant_config.json",
            {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
            parse_awq({"bits": 4, "group_size": 128}),
        ),
    ],
    ids=["ModelOpt", "GPTQ", "AWQ"],
)
def test_configs_in_files_of_their_own(
    file: str, raw: dict[str, Any], needed: Quantization | None, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, model_tensors(gptq), None)
    (folder / file).write_text(json.dumps(raw))
    expected = needed or parse_gptq({"bits": 4, "group_size": 128})
    assert quantization_of(open_checkpoint(folder)) == expected


def test_other_words_for_a_method(tmp_path: Path) -> None:
    def make(outputs: int, inputs: int) -> Tensors:
        return {"weight": fp8(outputs, inputs), "weight_scale": torch.rand(outputs, 1)}

    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    found = read(write_model(tmp_path, model_tensors(make), config))
    assert describe(found.quant_config, found.declaration.layers) == {
        "FP8, one scale an output": 4,
        "not quantised": 2,
    }


# --- speed


def test_many_modules_are_chosen_by_kind() -> None:
    """48 layers of 128 experts, 75,000 tensors: 0.4 s where each by itself took 2.4 s."""
    config = parse_config(
        {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_size": 256,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "vocab_size": 128,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }
    )
    declaration = models.declare(config)
    sources: dict[str, Source] = {}

    def add(name: str, dtype: str, *shape: int) -> None:
        sources[name] = Source(
            name=name, dtype=dtype, shape=shape, file="a", offset_bytes=0, num_bytes=0
        )

    for path, layer in declaration.layers:
        if layer.kind.value in ("embedding", "replicated"):
            add(f"{path}.weight", "BF16", layer.output.size, layer.input.size)
            continue
        names = Names().parts(f"{path}.weight", len(layer.output.parts)) or (f"{path}.weight",)
        for name, part in zip(names, layer.output.parts, strict=True):
            module, inputs = name.removesuffix(".weight"), layer.input.size
            add(f"{module}.qweight", "I32", inputs // 8, part.size)
            add(f"{module}.qzeros", "I32", inputs // 64, part.size // 8)
            add(f"{module}.scales", "F16", inputs // 64, part.size)
            add(f"{module}.g_idx", "I32", inputs)
    assert len(sources) > 70_000
    chosen = QuantConfig(parse_gptq(GPTQ_CONFIG | {"group_size": 64}), sources, Names())
    began = time.process_time()
    found = models.targets(declaration, 2, "BF16", chosen)
    assert time.process_time() - began < 3  # 0.4 s on one core that does nothing else
    assert len(found) == len({target.name for target in found})
    schemes = {id(chosen.for_layer(path, layer)) for path, layer in declaration.layers}
    assert len(schemes) == 5  # qkv, o, gate_up, down of experts, dense
    assert json.dumps([target.name for target in found[:2]])
