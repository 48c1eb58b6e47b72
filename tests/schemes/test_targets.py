"""What a plan fills for one layer: the same as the layer's parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from lading import dtypes
from lading.checkpoint import open_checkpoint
from lading.layers import Layer
from lading.models import build_layer
from lading.names import Names
from lading.ranks import Ranks
from lading.schemes import QuantConfig
from lading.schemes.gptq import parse_gptq
from lading.schemes.targets import layer_targets
from tests.schemes.checkpoints import GPTQ_CONFIG, gptq, model_tensors, write_model


def test_targets_are_the_parameters_and_the_constants(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path, model_tensors(gptq), GPTQ_CONFIG))
    config = QuantConfig(parse_gptq(GPTQ_CONFIG), checkpoint.tensors, Names())
    path, layer = "model.layers.0.self_attn.qkv_proj", Layer.qkv(64, 16, 4, 2)
    scheme = config.for_layer(path, layer)
    assert scheme is not None
    found = layer_targets(
        path, layer, scheme, dtype="F32", layout_of=lambda spec: layer.layout(spec, 2)
    )
    module = build_layer(
        layer,
        prefix=path,
        ranks=Ranks(tp_rank=1, tp_size=2),
        group=None,
        dtype=torch.float32,
        quant_config=config,
    )
    parameters = {f"{path}.{n}": p for n, p in module.named_parameters()}
    kept = {target.name: target for target in found if target.expected is None}
    assert kept.keys() == parameters.keys()
    for name, target in kept.items():
        assert target.layout.local_shape == tuple(parameters[name].shape)
        assert target.dtype == dtypes.from_torch(parameters[name].dtype)
    [index] = [target for target in found if target.expected is not None]
    assert index.name == f"{path}.g_idx"
    assert index.expected is not None
    assert (index.expected.inputs, index.expected.group) == (64, 16)


def test_a_dense_layer_has_a_weight() -> None:
    layer = Layer.row(64, 32, bias=True)
    found = layer_targets(
        "o_proj", layer, None, dtype="BF16", layout_of=lambda spec: layer.layout(spec, 2)
    )
    assert [(t.name, t.dtype, t.layout.local_shape) for t in found] == [
        ("o_proj.weight", "BF16", (32, 32)),
        ("o_proj.bias", "BF16", (32,)),
    ]
