"""One group of a compressed-tensors config. Whole configs: test_compressed_tensors."""

from __future__ import annotations

from typing import Any

import pytest

from lading.errors import ConfigError
from lading.schemes.config_groups import Inputs, parse_group
from lading.schemes.floating import ScaleLayout
from lading.schemes.options import Options


def group(weights: Any, inputs: Any = None, **more: Any) -> Any:
    raw = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, **more}
    return parse_group("g", Options(raw=raw), "naive-quantized")


@pytest.mark.parametrize(
    ("weights", "layout", "block"),
    [
        ({}, ScaleLayout.TENSOR, (1, 1)),
        ({"group_size": -1}, ScaleLayout.CHANNEL, (1, 1)),
        ({"group_size": 32}, ScaleLayout.GROUP, (1, 32)),
        (
            {"type": "float", "strategy": "block", "block_structure": "16x32"},
            ScaleLayout.BLOCK,
            (16, 32),
        ),
    ],
    ids=["tensor", "channel", "group", "block"],
)
def test_what_a_scale_covers(
    weights: dict[str, Any], layout: ScaleLayout, block: tuple[int, int]
) -> None:
    found = group({"num_bits": 8, **weights}).weights
    assert (found.layout, found.block) == (layout, block)


def test_inputs_need_scalars_where_they_are_static() -> None:
    assert group({"num_bits": 8}).inputs == Inputs()
    assert group({"num_bits": 8}, {"dynamic": True}).inputs == Inputs()
    assert group({"num_bits": 8}, {"num_bits": 8}).inputs == Inputs(
        needed=("input_scale",), allowed=("input_zero_point",)
    )


def test_a_group_of_its_own_format() -> None:
    four = group({"num_bits": 4, "group_size": 32}, format="pack-quantized")
    assert (four.format, four.weights.bits) == ("pack-quantized", 4)
    with pytest.raises(ConfigError) as caught:
        group({"num_bits": 4}, format="squeezed")
    assert str(caught.value) == (
        'quantization_config.format: is "squeezed", needs pack-quantized, int-quantized, '
        "float-quantized, naive-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, "
        "mxfp8-quantized or marlin-24."
    )
