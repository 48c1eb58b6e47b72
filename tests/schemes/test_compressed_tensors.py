"""compressed-tensors: real checkpoints of many formats, configs, and contradictions."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from lading.errors import LadingError, LayoutError
from lading.layers import Layer
from lading.schemes.base import Found, Stored
from lading.schemes.cache_scales import CacheScales
from lading.schemes.compressed_tensors import parse_compressed_tensors
from lading.schemes.floating import Fp8, Mxfp4, Nvfp4, ScaleLayout
from lading.schemes.integer import PackedInt, PlainInt
from tests.schemes.cutting import check_cuts, fixture, found_of, modules, pieces, whole

GROUP = ScaleLayout.GROUP
FOLDERS = {
    "ct-fp8-block": Fp8(layout=ScaleLayout.BLOCK, block=(128, 128)),
    "ct-fp8-dynamic-channel": Fp8(layout=ScaleLayout.CHANNEL, block=(1, 1)),
    "ct-fp8-static-tensor": Fp8(layout=ScaleLayout.TENSOR, block=(1, 1)),
    "ct-gptq-w4a16-actorder-weight": PackedInt(bits=4, layout=GROUP, group_size=64),
    "ct-int8-w8a8-channel": PlainInt(layout=ScaleLayout.CHANNEL),
    "ct-mixed-fp8attn-w4mlp": None,
    "ct-moe-w4a16-g64": PackedInt(bits=4, layout=GROUP, group_size=64),
    "ct-mxfp4a16": Mxfp4(),
    "ct-nvfp4a16": Nvfp4(),
    "ct-phi3-w4a16-g64-asym": PackedInt(bits=4, layout=GROUP, group_size=64, symmetric=False),
    "ct-qwen2bias-int8-w8a8": PlainInt(layout=ScaleLayout.CHANNEL),
    "ct-w3a16-g64-sym": PackedInt(bits=3, layout=GROUP, group_size=64),
    "ct-w4a16-channel-sym": PackedInt(bits=4, layout=ScaleLayout.CHANNEL),
    "ct-w4a16-g128-asym": PackedInt(bits=4, layout=GROUP, group_size=128, symmetric=False),
    "ct-w4a16-g64-sym": PackedInt(bits=4, layout=GROUP, group_size=64),
    "ct010-gptq-w4a16-actorder-group": PackedInt(
        bits=4, layout=GROUP, group_size=64, act_order=True
    ),
    "ct010-marlin24-truth-g128": None,
}


def declared(folder: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    section: dict[str, Any] = config["quantization_config"]
    return section


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints(name: str) -> None:
    folder = fixture(name)
    quantization = parse_compressed_tensors(declared(folder))
    decoded = 0
    for module, (tensors, reference) in modules(folder).items():
        outputs, inputs = reference.shape
        found = found_of(tensors, outputs, inputs, module=module)
        layer = Layer.replicated(inputs, outputs)
        scheme = quantization.scheme_for(layer, found)
        assert scheme is not None
        expected = FOLDERS[name]
        assert expected is None or scheme == expected
        value = whole(scheme, found, tensors)
        assert torch.equal(value.to(reference.dtype), reference), module
        decoded += 1
    assert decoded


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints_are_cut(name: str) -> None:
    folder = fixture(name)
    quantization = parse_compressed_tensors(declared(folder))
    checked = 0
    for module, (tensors, reference) in modules(folder).items():
        if ".layers.0." not in module or ".experts.1" in module:
            continue
        outputs, inputs = reference.shape
        is_row = module.endswith(("o_proj", "down_proj"))
        make = Layer.row if is_row else lambda i, o: Layer.column(i, [o])
        layer = make(inputs, outputs)
        found = found_of(tensors, outputs, inputs, module=module)
        scheme = quantization.scheme_for(layer, found)
        assert scheme is not None
        for tp_size in (2, 4):
            try:
                for spec in scheme.specs(layer, found):
                    if spec.constant is None:
                        layer.layout(spec, tp_size)
            except LayoutError:
                continue  # which cuts are refused: test_refused_cuts
            check_cuts(scheme, layer, found, tensors, (tp_size,))
            checked += 1
    assert checked >= 5


def test_fused_module_is_cut_by_part() -> None:
    """Phi-3: q, k, v side by side on disk, with packed zero points."""
    folder = fixture("ct-phi3-w4a16-g64-asym")
    tensors, reference = modules(folder)["model.layers.1.self_attn.qkv_proj"]
    found = found_of(tensors, 512, 256, module="model.layers.1.self_attn.qkv_proj", fused=True)
    layer = Layer.qkv(256, 64, 4, 2)
    scheme = parse_compressed_tensors(declared(folder)).scheme_for(layer, found)
    assert scheme is not None
    for tp_size in (1, 2, 4):
        for piece in pieces(scheme, layer, found, tensors, tp_size):
            expected = reference[piece.rows, piece.columns]
            assert torch.equal(piece.value.to(reference.dtype), expected)


def test_mixed_precision_chooses_by_module() -> None:
    folder = fixture("ct-mixed-fp8attn-w4mlp")
    quantization = parse_compressed_tensors(declared(folder))
    chosen = {}
    for module, (tensors, reference) in modules(folder).items():
        outputs, inputs = reference.shape
        found = found_of(tensors, outputs, inputs, module=module)
        scheme = quantization.scheme_for(Layer.replicated(inputs, outputs), found)
        assert scheme is not None
        chosen[module.split(".")[3]] = scheme.name
    assert chosen == {
        "self_attn": "FP8, one scale an output",
        "mlp": "int4 packed, groups of 64",
    }


def test_refused_cuts() -> None:
    folder = fixture("ct-w4a16-g128-asym")
    tensors, _ = modules(folder)["model.layers.0.self_attn.o_proj"]
    found = found_of(tensors, 256, 256, module="model.layers.0.self_attn.o_proj")
    layer = Layer.row(256, 256)
    scheme = parse_compressed_tensors(declared(folder)).scheme_for(layer, found)
    assert scheme is not None
    specs = {spec.name: spec for spec in scheme.specs(layer, found)}
    with pytest.raises(LayoutError) as caught:
        layer.layout(specs["weight_scale"], 4)
    assert str(caught.value) == (
        "TP 4 cuts 256 columns into 64 per rank; one scale covers a group of 128 inputs and "
        "64 = 0 * 128 + 64. Try: TP 1 or 2."
    )


# --- configs


def config(**changes: Any) -> dict[str, Any]:
    """A W4A16 config; group__weights__x is x of the weights of group_0."""
    made: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 64,
                },
            }
        },
        "ignore": ["lm_head"],
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        inner = made["config_groups"]["group_0"] if path else made
        for step in path[1:]:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return made


def stored(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, Stored]:
    return {name: Stored(dtype=d, shape=s, file="a.safetensors") for name, (d, s) in shapes.items()}


def w4(group_size: int = 64, bits: int = 4) -> dict[str, Stored]:
    return stored(
        weight_packed=("I32", (256, 256 * bits // 32)),
        weight_scale=("BF16", (256, 256 // group_size)),
        weight_shape=("I64", (2,)),
    )


def found(
    tensors: dict[str, Stored], module: str = "model.layers.0.mlp.up_proj", inputs: int = 256
) -> Found:
    return Found(module=module, tensors=tensors, outputs=256, inputs=inputs)


LAYER = Layer.column(256, [256])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"format": "int4-quantized"},
            'quantization_config.format: is "int4-quantized", needs pack-quantized, '
            "int-quantized, float-quantized, naive-quantized, nvfp4-pack-quantized, "
            "mxfp4-pack-quantized, mxfp8-quantized, marlin-24, mixed-precision or dense.",
            id="format",
        ),
        pytest.param(
            {"format": "dense"},
            'quantization_config.format: is "dense", needs pack-quantized, int-quantized, '
            "float-quantized, naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, "
            "mxfp8-quantized or marlin-24 (quantization_config.config_groups['group_0'] has "
            "weights).",
            id="dense with weights",
        ),
        pytest.param(
            {"format": "mixed-precision"},
            "quantization_config.config_groups['group_0'].format: is missing, needs "
            "pack-quantized, int-quantized, float-quantized, naive-quantized, "
            "nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp8-quantized or marlin-24.",
            id="mixed without format",
        ),
        pytest.param(
            {"quant_method": "gptq"},
            'quantization_config.quant_method: is "gptq", needs compressed-tensors.',
            id="method",
        ),
        pytest.param(
            {"config_groups": ["W4A16"]},
            'quantization_config.config_groups: is ["W4A16"], needs an object or null.',
            id="groups",
        ),
        pytest.param(
            {"ignore": "lm_head"},
            'quantization_config.ignore: is "lm_head", needs a list of strings or null.',
            id="ignore",
        ),
        pytest.param(
            {"ignore": ["re:(gate"]},
            'quantization_config.ignore: is ["re:(gate"], needs regular expressions after re: '
            "(missing ), unterminated subpattern at position 0).",
            id="expression",
        ),
        pytest.param(
            {"group__targets": []},
            "quantization_config.config_groups['group_0'].targets: is [], needs a list of at "
            "least one string.",
            id="targets",
        ),
        pytest.param(
            {"group__weights__num_bits": 9},
            "quantization_config.config_groups['group_0'].weights.num_bits: is 9, needs 2, 3, 4, "
            "5, 6, 7 or 8.",
            id="bits",
        ),
        pytest.param(
            {"group__weights__strategy": "token"},
            "quantization_config.config_groups['group_0'].weights.strategy: is \"token\", needs "
            "tensor, channel or group.",
            id="strategy",
        ),
        pytest.param(
            {"group__weights__type": "float"},
            "quantization_config.config_groups['group_0'].weights.type: is \"float\", needs "
            '"int" (format pack-quantized).',
            id="type",
        ),
        pytest.param(
            {"group__weights__group_size": None},
            "quantization_config.config_groups['group_0'].weights.group_size: is missing, needs "
            "an int of at least 1 (strategy group).",
            id="group size",
        ),
        pytest.param(
            {"group__weights__actorder": "random"},
            "quantization_config.config_groups['group_0'].weights.actorder: is \"random\", needs "
            "group, dynamic, weight or static.",
            id="order",
        ),
        pytest.param(
            {"group__weights__dynamic": True},
            "quantization_config.config_groups['group_0'].weights.dynamic: is true, needs false "
            "(weights are stored).",
            id="dynamic weights",
        ),
        pytest.param(
            {
                "format": "float-quantized",
                "group__weights__type": "float",
                "group__weights__num_bits": 8,
                "group__weights__symmetric": False,
            },
            "quantization_config.config_groups['group_0'].weights.symmetric: is false, needs "
            "true (floats have no zero points).",
            id="asymmetric floats",
        ),
        pytest.param(
            {
                "format": "float-quantized",
                "group__weights__type": "float",
                "group__weights__num_bits": 8,
                "group__weights__strategy": "block",
                "group__weights__block_structure": [128],
            },
            "quantization_config.config_groups['group_0'].weights.block_structure: is [128], "
            "needs two ints of at least 1: outputs, inputs.",
            id="block",
        ),
        pytest.param(
            {
                "format": "nvfp4-pack-quantized",
                "group__weights__type": "float",
                "group__weights__strategy": "tensor_group",
                "group__weights__group_size": 32,
            },
            "quantization_config.config_groups['group_0'].weights.group_size: is 32, needs 16 "
            "(format nvfp4-pack-quantized).",
            id="NVFP4 groups",
        ),
        pytest.param(
            {"group__input_activations__dynamic": "global"},
            "quantization_config.config_groups['group_0'].input_activations.dynamic: is "
            '"global", needs true, false or "local".',
            id="dynamic inputs",
        ),
        pytest.param(
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            'quantization_config.sparsity_config.format: is "sparse-24-bitmask", needs dense or '
            "marlin-24.",
            id="sparsity",
        ),
        pytest.param(
            {"transform_config": {"config_groups": {"u": 1}}},
            'quantization_config.transform_config.config_groups: is {"u": 1}, needs none (the '
            "inputs would be rotated, too).",
            id="transforms",
        ),
        pytest.param(
            {"kv_cache_scheme": {"strategy": "channel"}},
            'quantization_config.kv_cache_scheme.strategy: is "channel", needs tensor or '
            "attn_head.",
            id="kv cache",
        ),
    ],
)
def test_refused_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LadingError) as caught:
        parse_compressed_tensors(config(**changes))
    assert str(caught.value) == message


def test_a_target_of_two_groups_is_refused() -> None:
    raw = config()
    raw["config_groups"]["group_1"] = copy.deepcopy(raw["config_groups"]["group_0"])
    with pytest.raises(LadingError) as caught:
        parse_compressed_tensors(raw)
    assert str(caught.value) == (
        "quantization_config.config_groups['group_1'].targets: has \"Linear\", a target of "
        "'group_0' as well, needs each target in one group."
    )


def test_defaults_are_those_of_the_format() -> None:
    """No strategy: from the group size. No version, no ignore, no bits: 8. "128x64" is a block."""
    raw = config(ignore=None, group__weights__strategy=None, group__weights__group_size=-1)
    [group] = parse_compressed_tensors(raw).groups
    assert (group.weights.layout, group.weights.group_size) == (ScaleLayout.CHANNEL, 0)
    raw = config(
        format="naive-quantized",
        group__weights={
            "type": "FLOAT",
            "strategy": "block",
            "block_structure": "128x64",
        },
    )
    [group] = parse_compressed_tensors(raw).groups
    assert (group.weights.bits, group.weights.block) == (8, (128, 64))
    raw = config(group__weights__actorder=True)
    assert parse_compressed_tensors(raw).groups[0].weights.act_order


def test_groups_without_weights_are_none() -> None:
    raw = config(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"})
    raw["config_groups"]["group_1"] = {"targets": ["re:.*self_attn$"], "weights": None}
    parsed = parse_compressed_tensors(raw)
    assert [group.name for group in parsed.groups] == ["group_0"]
    assert parsed.kv_cache == CacheScales(
        required=("k_scale", "v_scale"), per_head=False, says="kv_cache_scheme with stored scales"
    )
    assert parse_compressed_tensors({"kv_cache_scheme": None}).groups == ()


@pytest.mark.parametrize(
    ("targets", "bits"),
    [
        pytest.param((["Linear"], ["re:.*up_proj"]), 8, id="expression before class"),
        pytest.param((["re:.*mlp.*"], ["model.layers.0.mlp.up_proj"]), 8, id="name first"),
        pytest.param((["re:.*up_proj"], ["re:.*mlp.*"]), 8, id="expressions by their text"),
        pytest.param((["re:model.layers.0"], ["re:up_proj"]), 4, id="from the beginning"),
    ],
)
def test_which_group_a_module_belongs_to(targets: Any, bits: int) -> None:
    raw = config(group__targets=targets[0])
    other = copy.deepcopy(raw["config_groups"]["group_0"])
    other["targets"] = targets[1]
    other["weights"]["num_bits"] = 8
    raw["config_groups"]["group_1"] = other
    scheme = parse_compressed_tensors(raw).scheme_for(LAYER, found(w4(bits=bits)))
    assert scheme == PackedInt(bits=bits, layout=GROUP, group_size=64)


# --- headers against configs


def test_what_is_dense_in_the_file_is_dense() -> None:
    quantization = parse_compressed_tensors(config())
    dense = stored(weight=("BF16", (256, 256)), bias=("BF16", (256,)))
    assert quantization.scheme_for(LAYER, found(dense)) is None
    assert quantization.scheme_for(LAYER, found({})) is None


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        pytest.param(
            {"ignore": ["re:.*up_proj$"]},
            w4(),
            'model.layers.0.mlp.up_proj: config.json says that "re:.*up_proj$" is not quantised '
            "(ignore), the checkpoint has weight_packed int32[256, 32], weight_scale "
            "bf16[256, 4], weight_shape int64[2]. In a.safetensors.",
            id="ignored",
        ),
        pytest.param(
            {"group__targets": ["re:.*self_attn"]},
            w4(),
            "model.layers.0.mlp.up_proj: config.json says nothing of it (no target of "
            "config_groups fits), the checkpoint has weight_packed int32[256, 32], weight_scale "
            "bf16[256, 4], weight_shape int64[2]. In a.safetensors.",
            id="no group",
        ),
        pytest.param(
            {},
            w4(group_size=32),
            "checkpoint tensor 'model.layers.0.mlp.up_proj.weight_scale' is bf16[256, 8], needs "
            "bf16[256, 4] (256 outputs and 256 inputs of the layer; config.json: int4 packed, "
            "groups of 64). In a.safetensors.",
            id="groups",
        ),
        pytest.param(
            {},
            w4(bits=8),
            "checkpoint tensor 'model.layers.0.mlp.up_proj.weight_packed' is int32[256, 64], "
            "needs int32[256, 32] (256 outputs and 256 inputs of the layer; config.json: int4 "
            "packed, groups of 64). In a.safetensors.",
            id="bits",
        ),
        pytest.param(
            {"format": "int-quantized"},
            w4(),
            "model.layers.0.mlp.up_proj: config.json says int4, groups of 64, the checkpoint has "
            "no weight, weight_packed int32[256, 32], weight_shape int64[2]; needs weight, "
            "weight_scale. In a.safetensors.",
            id="format",
        ),
        pytest.param(
            {},
            w4() | stored(weight_zero_point=("I32", (32, 4))),
            "model.layers.0.mlp.up_proj: config.json says int4 packed, groups of 64, the "
            "checkpoint has weight_zero_point int32[32, 4]; needs weight_packed, weight_scale, "
            "weight_shape. In a.safetensors.",
            id="zero points",
        ),
        pytest.param(
            {"group__weights__actorder": "group"},
            w4(),
            "model.layers.0.mlp.up_proj: config.json says int4 packed, groups of 64, act-order, "
            "the checkpoint has no weight_g_idx; needs weight_packed, weight_scale, "
            "weight_g_idx, weight_shape. In a.safetensors.",
            id="no indices",
        ),
        pytest.param(
            {"group__weights__num_bits": 8, "format": "int-quantized"},
            stored(weight=("F8_E4M3", (256, 256)), weight_scale=("BF16", (256, 4))),
            "checkpoint tensor 'model.layers.0.mlp.up_proj.weight' is fp8_e4m3[256, 256], needs "
            "int8 (config.json: int8, groups of 64). In a.safetensors.",
            id="dtype",
        ),
        pytest.param(
            {"group__input_activations": {"dynamic": False, "strategy": "tensor"}},
            w4(),
            "model.layers.0.mlp.up_proj: config.json says int4 packed, groups of 64, with static "
            "input scales, the checkpoint has no input_scale. In a.safetensors.",
            id="no input scale",
        ),
        pytest.param(
            {},
            w4() | stored(input_scale=("BF16", (1,))),
            "model.layers.0.mlp.up_proj: config.json says int4 packed, groups of 64, with no "
            "static input scales, the checkpoint has input_scale bf16[1]. In a.safetensors.",
            id="input scale",
        ),
    ],
)
def test_contradictions(changes: dict[str, Any], tensors: dict[str, Stored], message: str) -> None:
    with pytest.raises(LadingError) as caught:
        parse_compressed_tensors(config(**changes)).scheme_for(LAYER, found(tensors))
    assert str(caught.value) == message


def three_bits(inputs: int, words: int) -> Found:
    tensors = stored(
        weight_packed=("I32", (256, words)),
        weight_scale=("BF16", (256, 1)),
        weight_shape=("I64", (2,)),
    )
    return found(tensors, inputs=inputs)


def test_words_of_three_bits_are_told_apart_by_their_number() -> None:
    channel = {"strategy": "channel", "num_bits": 3}
    quantization = parse_compressed_tensors(config(group__weights=channel))
    for inputs, words, padded in ((256, 26, True), (256, 24, False), (10, 1, False)):
        scheme = quantization.scheme_for(Layer.column(inputs, [256]), three_bits(inputs, words))
        assert scheme == PackedInt(bits=3, layout=ScaleLayout.CHANNEL, padded=padded)
    with pytest.raises(LadingError) as caught:
        quantization.scheme_for(Layer.column(20, [256]), three_bits(20, 2))
    assert str(caught.value) == (
        "model.layers.0.mlp.up_proj: config.json says int3 packed, the checkpoint has "
        "weight_packed int32[256, 2]; needs more than 20 inputs to tell a dense stream of bits "
        "(compressed-tensors 0.18 and newer) from 10 values per word (older): both take 2 words. "
        "In a.safetensors."
    )
    with pytest.raises(LadingError, match=r"is int32\[256, 25\], needs int32\[256, 24\]"):
        quantization.scheme_for(Layer.column(256, [256]), three_bits(256, 25))
