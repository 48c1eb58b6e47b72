"""Marlin tiles: real checkpoints, and a packer written from the lists that the tools publish."""

from __future__ import annotations

import json

import pytest
import torch

from lading.errors import ConfigError, LayoutError
from lading.layers import Layer
from lading.schemes.base import Scheme
from lading.schemes.gptq import parse_gptq
from lading.schemes.marlin import Marlin, Marlin24
from tests.schemes.stored_modules import (
    FIXTURES,
    Module,
    assert_cuts,
    fixture_modules,
    layer_of,
    module_of,
)

DENSE, SPARSE = "marlin-w4-g128", "ct010-marlin24-truth-g128"
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


def order_of_tile(*, sparse: bool) -> list[int]:
    """Stored position -> position in four 16x16 tiles side by side, each row by row."""
    order: list[int] = []
    for thread in range(32):
        column = thread // 4
        for j in range(4):
            places = []
            for block in (0, 1):
                for row in (0, 1, 8, 9):
                    at = 16 * (2 * (thread % 4) + row)
                    if sparse:
                        at += 256 * (column // 2) + 8 * (column % 2) + 4 * block + j
                    else:
                        at += 256 * j + column + 8 * block
                    places.append(at)
            order += [places[e] for e in INTERLEAVE]
    return order


def packed(codes: torch.Tensor, *, sparse: bool) -> torch.Tensor:
    """[K, N] of 0 to 15 -> int32 [K/16, 2N]."""
    inputs, outputs = codes.shape
    order = order_of_tile(sparse=sparse)
    rows = []
    for tile in range(0, inputs, 16):
        words = []
        for block in range(0, outputs, 64):
            flat = [
                int(codes[tile + k, block + 16 * t + n])
                for t in range(4)
                for k in range(16)
                for n in range(16)
            ]
            stored = [flat[at] for at in order]
            for word in range(0, 1024, 8):
                value = sum(code << (4 * e) for e, code in enumerate(stored[word : word + 8]))
                words.append(value - 2**32 * (value >= 2**31))
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def reordered_meta(entries: list[list[int]], outputs: int, inputs: int) -> torch.Tensor:
    """CUTLASS's order of [N][K/16] entries, seen as int16 [K/32, 2N]."""
    memory = [0] * (outputs * inputs // 16)
    for n in range(outputs):
        for c in range(inputs // 16):
            row = n // 64 * 64 + n % 2 * 2 + n % 8 // 4 + n % 4 // 2 * 32 + n % 64 // 8 * 4
            column = c
            if row % 2 == 0 and c % 2 == 1:
                row, column = row + 1, c - 1
            elif row % 2 == 1 and c % 2 == 0:
                row, column = row - 1, c + 1
            value = entries[n][c]
            at = column // 2 * outputs * 2 + row * 2 + column % 2
            memory[at] = value - 2**16 * (value >= 2**15)
    return torch.tensor(memory, dtype=torch.int16).reshape(inputs // 32, 2 * outputs)


def permuted(scales: torch.Tensor, order: list[int]) -> torch.Tensor:
    return scales.reshape(-1, len(order))[:, order].reshape(scales.shape)


GROUPED = [i + 8 * j for i in range(8) for j in range(8)]
SINGLE = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
GROUPED_24 = [8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)]


def made_dense(group_size: int, outputs: int, inputs: int) -> Module:
    torch.manual_seed(0)
    size = inputs if group_size == -1 else group_size
    codes = torch.randint(0, 16, (inputs, outputs))
    scales = torch.rand(inputs // size, outputs).half()
    weight = ((codes - 8) * scales.float().repeat_interleave(size, 0)).t()
    tensors = {
        "B": packed(codes, sparse=False),
        "s": permuted(scales, GROUPED if size < inputs else SINGLE),
    }
    return module_of("a.down_proj", tensors, weight)


def made_sparse(group_size: int, outputs: int, inputs: int, names: tuple[str, str, str]) -> Module:
    torch.manual_seed(0)
    size = inputs if group_size == -1 else group_size
    kept = torch.randint(0, 16, (inputs // 2, outputs))
    weight = torch.zeros(outputs, inputs)
    entries = [[0] * (inputs // 16) for _ in range(outputs)]
    for n in range(outputs):
        for four in range(inputs // 4):
            for e, place in enumerate(sorted(torch.randperm(4)[:2].tolist())):
                weight[n, 4 * four + place] = float(kept[2 * four + e, n] - 8)
                entries[n][four // 4] |= place << (4 * (four % 4) + 2 * e)
    scales = torch.rand(inputs // size, outputs).half()
    weight *= scales.float().repeat_interleave(size, 0).t()
    tensors = (
        packed(kept, sparse=True),
        reordered_meta(entries, outputs, inputs),
        permuted(scales, GROUPED_24) if size < inputs else scales,
    )
    return module_of("a.down_proj", dict(zip(names, tensors, strict=True)), weight)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_dense_fixture(tp_size: int) -> None:
    modules = list(fixture_modules(DENSE))
    config = json.loads((FIXTURES / DENSE / "config.json").read_text())["quantization_config"]
    for module in modules:
        layer = layer_of(module)
        scheme = parse_gptq(config).scheme_for(layer, module.found)
        assert scheme == Marlin(group_size=128, one_group=False)
        assert scheme.name == "Marlin int4, groups of 128"
        assert_cuts(layer, scheme, module, tp_size)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_sparse_fixture(tp_size: int) -> None:
    for module in fixture_modules(SPARSE):
        layer = layer_of(module)
        scheme = Marlin24.of(128, module.found.inputs, compressed_tensors=True)
        assert scheme.one_group == (module.found.inputs == 256)
        assert scheme.name == "Marlin 2:4 int4, groups of 128"
        if tp_size == 4 and module.found.module.endswith(("o_proj", "k_proj")):
            with pytest.raises(LayoutError):
                assert_cuts(layer, scheme, module, tp_size)
        else:
            assert_cuts(layer, scheme, module, tp_size)


@pytest.mark.parametrize(("group_size", "inputs", "tp_size"), [(128, 384, 3), (-1, 80, 5)])
def test_made_dense_tiles(group_size: int, inputs: int, tp_size: int) -> None:
    module = made_dense(group_size, 192, inputs)
    scheme = Marlin.of(group_size, inputs)
    assert_cuts(Layer.row(inputs, 192), scheme, module, tp_size)
    assert_cuts(Layer.column(inputs, [192]), scheme, module, 3)


def test_one_group_of_the_layer_is_not_one_group_of_a_rank() -> None:
    assert Marlin.of(128, 128).one_group
    module = made_dense(128, 64, 128)
    assert_cuts(Layer.column(128, [64]), Marlin.of(128, 128), module, 1)
    assert not Marlin.of(128, 256).one_group
    assert_cuts(Layer.row(256, 64), Marlin.of(128, 256), made_dense(128, 64, 256), 2)


@pytest.mark.parametrize(("group_size", "inputs", "tp_size"), [(128, 384, 3), (-1, 160, 5)])
def test_made_sparse_tiles(group_size: int, inputs: int, tp_size: int) -> None:
    module = made_sparse(group_size, 128, inputs, ("B_24", "B_meta", "s"))
    scheme = Marlin24.of(group_size, inputs, compressed_tensors=False)
    assert_cuts(Layer.row(inputs, 128), scheme, module, tp_size)
    assert_cuts(Layer.column(inputs, [128]), scheme, module, 2)


def test_two_groups_are_ordered_as_one_by_compressed_tensors_alone() -> None:
    module = made_sparse(128, 64, 256, ("B_24", "B_meta", "s"))
    scheme = Marlin24.of(128, 256, compressed_tensors=False)
    assert not scheme.one_group
    assert_cuts(Layer.row(256, 64), scheme, module, 2)
    other = Marlin24.of(128, 256, compressed_tensors=True)
    assert other.one_group
    assert (other.packed, other.meta, other.scale) == ("weight_packed", "meta", "scale_packed")
    assert not Marlin24.of(128, 384, compressed_tensors=True).one_group


@pytest.mark.parametrize(
    ("layer", "scheme", "tp_size", "text"),
    [
        (
            Layer.column(128, [128]),
            Marlin.of(-1, 128),
            4,
            "TP 4 cuts 128 columns into 32 per rank; a Marlin tile is 64 outputs wide and "
            "32 = 0 * 64 + 32. Try: TP 1 or 2.",
        ),
        (
            Layer.row(96, 64),
            Marlin.of(-1, 96),
            4,
            "TP 4 cuts 96 rows into 24 per rank; a Marlin tile is 16 inputs high and "
            "24 = 1 * 16 + 8. Try: TP 1, 2, 3 or 6.",
        ),
        (
            Layer.row(96, 64),
            Marlin24.of(-1, 96, compressed_tensors=True),
            2,
            "TP 2 cuts 96 rows into 48 per rank; a Marlin 2:4 tile is 32 inputs high and "
            "48 = 1 * 32 + 16. Try: TP 1 or 3.",
        ),
    ],
    ids=["outputs", "inputs", "sparse inputs"],
)
def test_cuts_through_tiles_are_refused(
    layer: Layer, scheme: Scheme, tp_size: int, text: str
) -> None:
    weight = torch.zeros(layer.output.size, layer.input.size)
    found = module_of("a", {}, weight).found
    spec = scheme.specs(layer, found)[0]
    with pytest.raises(LayoutError) as caught:
        layer.layout(spec, tp_size)
    assert str(caught.value) == text


def test_parts_in_one_tensor_are_whole_tiles() -> None:
    layer = Layer.qkv(128, 16, 8, 2)
    module = module_of("a.qkv_proj", {}, torch.zeros(192, 128), fused=True)
    with pytest.raises(ConfigError) as caught:
        Marlin.of(128, 128).specs(layer, module.found)
    assert str(caught.value) == (
        "a.qkv_proj, part 'k': has 32 outputs; a Marlin tile is 64 outputs wide and "
        "32 = 0 * 64 + 32."
    )
    module = module_of("a.k_proj", {}, torch.zeros(96, 128))
    with pytest.raises(ConfigError) as caught:
        Marlin.of(128, 128).specs(Layer.column(128, [96]), module.found)
    assert str(caught.value) == (
        "a.k_proj: has 96 outputs; a Marlin tile is 64 outputs wide and 96 = 1 * 64 + 32."
    )


def test_schemes_check_themselves() -> None:
    text = "Marlin groups are of 64 inputs, needs 128 or all of them"
    with pytest.raises(ConfigError, match=text):
        Marlin.of(64, 128)
    with pytest.raises(ConfigError, match=text):
        Marlin24.of(64, 128, compressed_tensors=True)
