"""What tests of decoding share: the fixtures, headers of tensors in memory, pieces of layouts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lading import dtypes
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme, Stored
from lading.specs import dense_specs

Tensors = Mapping[str, torch.Tensor]


def fixture_folder(name: str) -> Path:
    """A fixture's folder; the test is skipped where there are none."""
    beside = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures"
    folder = Path(os.environ.get("LADING_FIXTURES", beside)) / name
    if not folder.is_dir():
        pytest.skip(f"no fixture {name} in {folder.parent}")
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    """The quantization_config of a fixture."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return dict(config["quantization_config"])


def references(folder: Path) -> Iterator[tuple[str, Tensors, torch.Tensor]]:
    """(module, its tensors by leaf, the third party's dense weight)."""
    with (
        safe_open(folder / "model.safetensors", "pt") as stored,
        safe_open(folder / "dequant_reference.safetensors", "pt") as reference,
    ):
        names = list(stored.keys())
        for name in reference.keys():  # noqa: SIM118
            module = name.removesuffix(".weight")
            leaves = [n.removeprefix(f"{module}.") for n in names if n.startswith(f"{module}.")]
            tensors = {leaf: stored.get_tensor(f"{module}.{leaf}") for leaf in leaves}
            yield module, tensors, reference.get_tensor(name)


def found_of(
    tensors: Tensors, outputs: int, inputs: int, *, module: str = "layer", fused: bool = False
) -> Found:
    """The headers of tensors in memory."""
    stored = {
        name: Stored(dtype=dtypes.from_torch(tensor.dtype), shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    return Found(module=module, tensors=stored, outputs=outputs, inputs=inputs, fused=fused)


def layer_of(weight: torch.Tensor, module: str) -> Layer:
    """The layer that a Llama has under this name."""
    outputs, inputs = weight.shape
    if module.endswith(("o_proj", "down_proj")):
        return Layer.row(inputs, outputs)
    return Layer.column(inputs, [outputs])


def decode(
    scheme: Scheme,
    layer: Layer,
    tensors: Tensors,
    *,
    tp_size: int = 1,
    rank: int = 0,
    found: Found | None = None,
) -> torch.Tensor:
    """What a rank decodes of a layer of one part, from the entries that the layout gives it."""
    found = found or found_of(tensors, layer.output.size, layer.input.size)
    kept: dict[str, torch.Tensor] = {}
    offsets: dict[tuple[str, int], int] = {}
    for spec in scheme.specs(layer, found):
        if spec.constant is not None:
            continue
        layout = layer.layout(spec, tp_size)
        part = layout.part_names[0]
        shape = layout.source_shape(part)
        if spec.stored is None:
            assert tuple(tensors[spec.name].shape) in (shape, ())
        place = layout.place(part, rank)
        assert place is not None
        piece = tensors[spec.name].reshape(shape)
        for dim, (start, size) in enumerate(
            zip(place.source.start, place.source.size, strict=True)
        ):
            piece = piece.narrow(dim, start, size)
            offsets[spec.name, dim] = layout.offset(part, rank, dim)
        kept[spec.name] = piece
    dense = layer.layout(dense_specs(bias=False)[0], tp_size).place(None, rank)
    assert dense is not None
    view = PartView(
        outputs=dense.source.size[0],
        inputs=dense.source.size[1],
        first_output=dense.source.start[0],
        first_input=dense.source.start[1],
        offsets=offsets,
    )
    weight = scheme.dequantize(kept, view)
    assert weight.dtype is torch.float32
    return weight


def joined(scheme: Scheme, layer: Layer, tensors: Tensors, tp_size: int) -> torch.Tensor:
    """The pieces of all ranks, put together along the cut dim."""
    pieces = [decode(scheme, layer, tensors, tp_size=tp_size, rank=r) for r in range(tp_size)]
    return torch.cat(pieces, dim=1 if layer.kind.value == "row" else 0)
