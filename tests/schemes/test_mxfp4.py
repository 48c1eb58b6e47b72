"""gpt-oss's MXFP4 experts: the fixture, pieces, alternating rows."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from lading.errors import LayoutError
from lading.layers import Layer
from lading.schemes.mxfp4 import Mxfp4Blocks, dequantize_blocks, split_pairs
from tests.schemes.decoding import Tensors, fixture_folder, found_of


def pieces(scheme: Mxfp4Blocks, layer: Layer, tensors: Tensors, tp_size: int) -> torch.Tensor:
    """[E, O, I], put together from the ranks' pieces."""
    found = found_of(tensors, layer.output.size, layer.input.size)
    decoded = []
    for rank in range(tp_size):
        kept = {}
        for spec in scheme.specs(layer, found):
            place = layer.layout(spec, tp_size).place(None, rank)
            assert place is not None
            piece = tensors[spec.name]
            for dim, (start, size) in enumerate(
                zip(place.source.start, place.source.size, strict=True)
            ):
                piece = piece.narrow(dim, start, size)
            kept[spec.name] = piece
        decoded.append(dequantize_blocks(kept[scheme.blocks], kept[scheme.scales]))
    return torch.cat(decoded, dim=2 if layer.kind.value == "row" else 1)


def test_fixture_decodes_as_modelopt_does() -> None:
    folder = fixture_folder("mxfp4-gptoss")
    with (
        safe_open(folder / "model.safetensors", "pt") as stored,
        safe_open(folder / "dequant_reference.safetensors", "pt") as references,
    ):
        names = list(references.keys())
        assert len(names) == 4
        for name in names:
            projection = name.rpartition(".")[2]
            reference = references.get_tensor(name).transpose(1, 2)  # [E, O, I]
            experts, outputs, inputs = reference.shape
            tensors = {
                f"{projection}_{kind}": stored.get_tensor(f"{name}_{kind}")
                for kind in ("blocks", "scales")
            }
            is_gate_up = projection == "gate_up_proj"
            scheme = Mxfp4Blocks(projection=projection, experts=experts, pairs=is_gate_up)
            layer = Layer.column(inputs, [outputs]) if is_gate_up else Layer.row(inputs, outputs)
            for tp_size in (1, 2, 4):
                decoded = pieces(scheme, layer, tensors, tp_size)
                assert torch.equal(decoded.to(reference.dtype), reference)


def test_blocks_decode_as_written_down() -> None:
    table = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(256, (3, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 6, 3), generator=generator, dtype=torch.uint8)
    weight = dequantize_blocks(blocks, scales)
    assert weight.shape == (3, 6, 96)
    for e, o, i in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        code = int(blocks[e, o, i // 32, i % 32 // 2]) >> (4 * (i % 2)) & 15
        value = -table[code & 7] if code & 8 else table[code & 7]
        assert weight[e, o, i] == value * 2.0 ** (int(scales[e, o, i // 32]) - 127)


def test_gate_and_up_alternate() -> None:
    rows = torch.arange(12.0).reshape(1, 6, 2)
    gate, up = split_pairs(rows)
    assert gate[0, :, 0].tolist() == [0, 4, 8]
    assert up[0, :, 0].tolist() == [2, 6, 10]


def refused(scheme: Mxfp4Blocks, layer: Layer, tp_size: int) -> str:
    found = found_of({}, layer.output.size, layer.input.size)
    with pytest.raises(LayoutError) as info:
        layer.layout(scheme.specs(layer, found)[0], tp_size)
    return str(info.value)


def test_cuts_through_pairs_and_groups_are_refused() -> None:
    scheme = Mxfp4Blocks(projection="gate_up_proj", experts=4, pairs=True)
    assert refused(scheme, Layer.column(32, [12]), 4) == (
        "TP 4 cuts 12 columns into 3 per rank; rows of gate and up alternate and "
        "3 = 1 * 2 + 1. Try: TP 1, 2, 3 or 6."
    )
    scheme = Mxfp4Blocks(projection="down_proj", experts=4, pairs=False)
    assert refused(scheme, Layer.row(2880, 12), 4) == (
        "TP 4 cuts 2880 columns into 720 per rank; one scale covers a group of 32 inputs and "
        "720 = 22 * 32 + 16. Try: TP 1, 2, 3, 5 or 6."
    )
