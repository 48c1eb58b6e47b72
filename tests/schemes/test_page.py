"""docs/quantisation.md says what is so: real checkpoints, methods, sizes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lading.checkpoint import open_checkpoint
from lading.layers import Layer
from lading.models import build_layer
from lading.names import Names
from lading.ranks import Ranks
from lading.schemes import quant_config_of
from lading.schemes.choose import METHODS
from tests.schemes.checkpoints import FP8_CONFIG, fp8_static, model_tensors, write_model
from tests.schemes.test_fixtures import CASES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "quantisation.md").read_text()


def rows(first: str) -> list[list[str]]:
    """The cells of the table whose head begins so."""
    table = PAGE[PAGE.index(f"| {first} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.split("\n")[2:]]


def test_sizes_of_real_checkpoints() -> None:
    """`test_fixtures` loads each of them at these sizes and finds no others."""
    written = {name: tuple(map(int, sizes.split(", "))) for name, sizes, _ in rows("checkpoint")}
    assert written == {name: case.sizes for name, case in CASES.items()}


def test_every_method_is_listed() -> None:
    named = {name for cell, *_ in rows("`quant_method`") for name in re.findall(r"`(.+?)`", cell)}
    assert named == set(METHODS)


def test_a_kernel_is_put_in_and_taken_out(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0], space)
    folder = write_model(tmp_path, model_tensors(fp8_static), FP8_CONFIG)
    config = quant_config_of(open_checkpoint(folder), Names())
    path = "model.layers.0.mlp.down_proj"
    layer = build_layer(
        Layer.row(128, 64),
        prefix=path,
        ranks=Ranks(),
        group=None,
        dtype=torch.float32,
        quant_config=config,
    )
    for name, param in layer.named_parameters():
        layer.weight_loader(param, model_tensors(fp8_static)[f"{path}.{name}"])
    x = torch.randn(2, 128)
    before = layer(x)
    space["use_kernels"](torch.nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)  # the kernel is bf16's
    assert torch.allclose(layer(x.bfloat16()).float(), before, rtol=0.05, atol=0.5)
    layer.restore_weights()
    assert torch.equal(layer(x), before)
