"""What ranks hold of stored modules, cut by their layouts, and what it decodes to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lading import dtypes
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme, Stored

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(os.environ.get("LADING_FIXTURES", ROOT / ".." / "shared" / "fixtures"))
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Module:
    """A stored module with its values, and what it decodes to where that is known."""

    found: Found
    tensors: Tensors
    weight: torch.Tensor


def module_of(name: str, tensors: Tensors, weight: torch.Tensor, *, fused: bool = False) -> Module:
    """The module of these tensors; its sizes are the weight's."""
    stored = {
        key: Stored(
            dtype=dtypes.from_torch(tensor.dtype),
            shape=tuple(tensor.shape),
            file="model.safetensors",
        )
        for key, tensor in tensors.items()
    }
    outputs, inputs = weight.shape
    found = Found(module=name, tensors=stored, outputs=outputs, inputs=inputs, fused=fused)
    return Module(found, tensors, weight)


def fixture_modules(folder: str) -> Iterator[Module]:
    """Every module of a fixture that its reference decodes; skips where there are no fixtures."""
    path = FIXTURES / folder
    if not path.is_dir():
        pytest.skip(f"no fixture {folder}: set LADING_FIXTURES")
    tensors = load_file(path / "model.safetensors")
    for name, weight in load_file(path / "dequant_reference.safetensors").items():
        start = name.removesuffix("weight")
        own = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
        fused = "qkv_proj" in name
        yield module_of(start.removesuffix("."), own, weight, fused=fused)


def layer_of(module: Module) -> Layer:
    """The parallel layer that a Llama has under this name."""
    outputs, inputs = module.weight.shape
    if module.found.module.endswith(("o_proj", "down_proj")):
        return Layer.row(inputs, outputs)
    if module.found.module.endswith("qkv_proj"):
        return Layer.qkv(inputs, 64, outputs // 64 - 4, 2)
    return Layer.column(inputs, [outputs])


def pieces(
    layer: Layer, scheme: Scheme, module: Module, tp_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each rank and part: what its own entries decode to, and the cut of the whole weight."""
    specs = [spec for spec in scheme.specs(layer, module.found) if spec.constant is None]
    fused = module.found.fused
    start = 0
    for part in layer.output.parts:
        for rank in range(tp_size):
            (top, bottom), (left, right) = (
                axis.span(rank, tp_size) for axis in (part, layer.input.parts[0])
            )
            held = {}
            for spec in specs:
                layout = layer.layout(spec, tp_size, fused_source=fused)
                name = part.name if layout.fused_dim is not None else None
                placement = layout.place(name, rank, fused_source=fused)
                assert placement is not None
                assert placement.source.shape == tuple(module.tensors[spec.name].shape)
                box = zip(placement.source.start, placement.source.size, strict=True)
                held[spec.name] = module.tensors[spec.name][tuple(slice(a, a + n) for a, n in box)]
            view = PartView(
                outputs=bottom - top, inputs=right - left, first_output=top, first_input=left
            )
            cut = module.weight[start + top : start + bottom, left:right]
            yield scheme.dequantize(held, view), cut
        start += part.size


def assert_cuts(layer: Layer, scheme: Scheme, module: Module, tp_size: int) -> None:
    """Every piece decodes to the cut of the whole, bit for bit in the whole's dtype."""
    for decoded, cut in pieces(layer, scheme, module, tp_size):
        assert decoded.dtype is torch.float32
        assert torch.equal(decoded.to(cut.dtype), cut)
