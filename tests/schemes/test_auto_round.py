"""auto-round: which packings, which settings for which module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lading.errors import ConfigError
from lading.schemes.auto_round import parse_auto_round
from lading.schemes.awq import Awq
from lading.schemes.gptq import Gptq
from tests.schemes.stored_modules import Module, layer_of, module_of

CONFIG = {
    "quant_method": "auto-round",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "data_type": "int",
    "packing_format": "auto_round:auto_gptq",
}


def gptq(bits: int, group_size: int) -> Module:
    """As auto-round stores it: without g_idx."""
    groups = 256 // group_size
    tensors = {
        "qweight": torch.zeros(8 * bits, 256, dtype=torch.int32),
        "qzeros": torch.zeros(groups, 8 * bits, dtype=torch.int32),
        "scales": torch.zeros(groups, 256).half(),
    }
    return module_of("model.layers.0.mlp.up_proj", tensors, torch.zeros(256, 256))


def scheme_for(config: dict[str, Any], name: str, module: Module) -> Any:
    quantization = parse_auto_round(CONFIG | config)
    return quantization.scheme_for(layer_of(module), replace(module.found, module=name))


def test_packings() -> None:
    module = gptq(4, 128)
    assert scheme_for({}, "a", module) == Gptq(bits=4, group_size=128, zeros_minus_one=True)
    tensors = {
        "qweight": torch.zeros(256, 32, dtype=torch.int32),
        "qzeros": torch.zeros(2, 32, dtype=torch.int32),
        "scales": torch.zeros(2, 256).half(),
    }
    module = module_of("a", tensors, torch.zeros(256, 256))
    awq = {"packing_format": "auto_round:auto_awq", "sym": False}
    assert scheme_for(awq, "a", module) == Awq(group_size=128)


def test_a_name_counts_before_an_expression() -> None:
    extra = {
        "extra_config": {
            ".*layers\\.[01]\\.mlp.*": {"bits": 2, "group_size": 32},
            "model.layers.0.mlp.up_proj": {"bits": 8},
            "lm_head": {"bits": 16, "data_type": "fp"},
        }
    }
    up = "model.layers.0.mlp.up_proj"
    assert scheme_for(extra, up, gptq(8, 128)) == Gptq(bits=8, group_size=128)
    two = Gptq(bits=2, group_size=32)
    assert scheme_for(extra, "model.layers.1.mlp.up_proj", gptq(2, 32)) == two
    assert scheme_for(extra, "model.layers.2.mlp.up_proj", gptq(4, 128)).bits == 4
    dense = module_of("lm_head", {"weight": torch.zeros(8, 8)}, torch.zeros(8, 8))
    assert scheme_for(extra, "lm_head", dense) is None
    assert scheme_for(extra, up, dense) is None
    with pytest.raises(ConfigError) as caught:
        scheme_for(extra, "lm_head", gptq(4, 128))
    assert str(caught.value) == (
        'lm_head: config.json says that it is not quantised (extra_config "lm_head"), the '
        "checkpoint has qweight int32[32, 256], qzeros int32[2, 32], scales fp16[2, 256]; needs a "
        "weight of the model's dtype. In model.safetensors."
    )


IMPOSSIBLE = [
    (
        {"packing_format": "auto_round:exllamav2"},
        'quantization_config.packing_format: is "auto_round:exllamav2", needs auto_round:auto_gptq '
        "or auto_round:auto_awq.",
    ),
    (
        {"packing_format": None},
        "quantization_config.packing_format: is missing, needs auto_round:auto_gptq or "
        "auto_round:auto_awq.",
    ),
    ({"bits": 16}, "quantization_config.bits: is 16, needs 2, 3, 4 or 8."),
    ({"bits": 5}, "quantization_config.bits: is 5, needs 2, 3, 4, 8, 16 or 32."),
    (
        {"packing_format": "auto_round:auto_awq", "bits": 8},
        "quantization_config.bits: is 8, needs 4, 16 or 32.",
    ),
    (
        {"data_type": "mx_fp"},
        'quantization_config.data_type: is "mx_fp", needs int, where bits are fewer than 16.',
    ),
    (
        {"extra_config": {"a": {"data_type": "fp8"}}},
        "quantization_config.extra_config['a'].data_type: is \"fp8\", needs int, where bits are "
        "fewer than 16.",
    ),
    (
        {"extra_config": {"(a": {}}},
        "quantization_config.extra_config['(a']: is no regular expression: missing ), unterminated "
        "subpattern at position 0.",
    ),
]


@pytest.mark.parametrize(("changes", "text"), IMPOSSIBLE, ids=lambda value: str(value)[:40])
def test_impossible_configs(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_auto_round(CONFIG | changes)
    assert str(caught.value) == text
