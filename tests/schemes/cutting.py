"""Checkpoints by module, and what each rank decodes of them, cut by `Layout`.

For the tests of `integer`, `floating` and `compressed_tensors`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lading.dtypes import from_torch
from lading.layers import Layer
from lading.schemes.base import Found, PartView, Scheme, Stored

FIXTURES = Path(
    os.environ.get("LADING_FIXTURES")
    or Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures"
)
Tensors = dict[str, torch.Tensor]


def fixture(name: str) -> Path:
    """The folder of a checkpoint; skips the test where there is none."""
    folder = FIXTURES / name
    if not folder.is_dir():
        pytest.skip(f"no fixture {name} (LADING_FIXTURES says where they are)")
    return folder


def read(file: Path) -> Tensors:
    """All tensors of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def modules(folder: Path) -> dict[str, tuple[Tensors, torch.Tensor]]:
    """For each module of the reference: its stored tensors and its decoded weight."""
    stored = read(folder / "model.safetensors")
    decoded = read(folder / "dequant_reference.safetensors")
    result = {}
    for name, reference in decoded.items():
        module = name.removesuffix(".weight")
        own = {
            key.removeprefix(f"{module}."): tensor
            for key, tensor in stored.items()
            if key.startswith(f"{module}.")
        }
        result[module] = (own, reference)
    return result


def found_of(
    tensors: Mapping[str, torch.Tensor],
    outputs: int,
    inputs: int,
    *,
    module: str = "model.layers.0.mlp.up_proj",
    fused: bool = False,
) -> Found:
    """What the headers would show of these tensors."""
    return Found(
        module=module,
        tensors={
            name: Stored(dtype=from_torch(t.dtype), shape=tuple(t.shape), file="model.safetensors")
            for name, t in tensors.items()
        },
        outputs=outputs,
        inputs=inputs,
        fused=fused,
    )


@dataclass(frozen=True)
class Piece:
    """What one rank decodes of one part: `value`, at these rows and columns of the full weight."""

    rows: slice
    columns: slice
    value: torch.Tensor


def pieces(
    scheme: Scheme, layer: Layer, found: Found, tensors: Tensors, tp_size: int
) -> Iterator[Piece]:
    """Every piece of every rank. The parts of a layer are side by side in `tensors`."""
    specs = [spec for spec in scheme.specs(layer, found) if spec.constant is None]
    layouts = {s.name: layer.layout(s, tp_size, fused_source=found.fused) for s in specs}
    before = 0
    for part in layer.output.parts:
        for rank in range(tp_size):
            own, offsets = {}, {}
            for spec in specs:
                layout = layouts[spec.name]
                name = part.name if layout.fused_dim is not None else None
                place = layout.place(name, rank, fused_source=found.fused)
                assert place is not None
                region = place.source
                kept = tensors[spec.name].reshape(region.shape)
                for dim, (start, size) in enumerate(zip(region.start, region.size, strict=True)):
                    kept = kept.narrow(dim, start, size)
                    offsets[spec.name, dim] = layout.offset(name, rank, dim)
                own[spec.name] = kept.clone()
            first, last = part.span(rank, tp_size)
            left, right = layer.input.parts[0].span(rank, tp_size)
            view = PartView(
                outputs=last - first,
                inputs=right - left,
                first_output=first,
                first_input=left,
                offsets=offsets,
            )
            rows = slice(before + first, before + last)
            yield Piece(rows, slice(left, right), scheme.dequantize(own, view))
        before += part.size


def whole(scheme: Scheme, found: Found, tensors: Tensors) -> torch.Tensor:
    """The decoded weight of a module on one rank."""
    layer = Layer.replicated(found.inputs, found.outputs)
    [piece] = pieces(scheme, layer, found, tensors, 1)
    return piece.value


def check_cuts(
    scheme: Scheme, layer: Layer, found: Found, tensors: Tensors, tp_sizes: tuple[int, ...]
) -> None:
    """Every rank's decoded pieces are the cut of the decoded whole, and together cover it."""
    full = whole(scheme, found, tensors)
    for tp_size in tp_sizes:
        seen = torch.zeros_like(full, dtype=torch.bool)
        for piece in pieces(scheme, layer, found, tensors, tp_size):
            assert piece.value.dtype == torch.float32
            assert torch.equal(piece.value, full[piece.rows, piece.columns]), (tp_size, piece.rows)
            seen[piece.rows, piece.columns] = True
        assert bool(seen.all())
