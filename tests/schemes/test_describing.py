"""Counts of layers by scheme."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lading import models
from lading.models import parse_config
from lading.preflight import read
from lading.schemes import describe
from tests.schemes.checkpoints import GPTQ_CONFIG, MODEL, gptq, model_tensors, write_model
from tests.schemes.cutting import fixture


def test_a_dense_model() -> None:
    layers = models.declare(parse_config(MODEL)).layers
    assert describe(None, layers) == {"not quantised": 6}


def test_layers_are_counted_by_scheme(tmp_path: Path) -> None:
    tensors = model_tensors(gptq)
    module = "model.layers.0.mlp.down_proj"
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{module}.{leaf}"]
    tensors[f"{module}.weight"] = torch.randn(64, 128).bfloat16()
    found = read(write_model(tmp_path, tensors, GPTQ_CONFIG))
    counts = describe(found.quant_config, found.declaration.layers)
    assert counts == {"GPTQ int4, groups of 16": 3, "not quantised": 3}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        (
            "ct-mixed-fp8attn-w4mlp",
            {"FP8, one scale an output": 4, "int4 packed, groups of 64": 4, "not quantised": 2},
        ),
        ("modelopt-nvfp4", {"NVFP4, groups of 16": 8, "not quantised": 2}),
    ],
)
def test_real_checkpoints(name: str, counts: dict[str, int]) -> None:
    found = read(fixture(name))
    assert describe(found.quant_config, found.declaration.layers) == counts
