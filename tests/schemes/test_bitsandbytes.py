"""bitsandbytes: the fixture, cuts, synthetic bytes against a slow decoder, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lading.errors import CheckpointError, LadingError, LayoutError
from lading.layers import Layer
from lading.schemes.base import PartView, Stored
from lading.schemes.bitsandbytes import BnbInt8, parse_bitsandbytes
from lading.schemes.bnb4 import Bnb4
from tests.schemes.decoding import (
    config_of,
    decode,
    fixture_folder,
    found_of,
    joined,
    layer_of,
    references,
)

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
TABLE = torch.linspace(-1, 1, 16).to(torch.float32)


def made(
    outputs: int,
    inputs: int,
    *,
    nested: bool = False,
    kind: str = "nf4",
    block: int = 64,
    storage: torch.dtype = torch.uint8,
) -> dict[str, torch.Tensor]:
    """A module's tensors, of random bytes."""
    generator = torch.Generator().manual_seed(outputs * inputs + nested)
    num_bytes, num_blocks = outputs * inputs // 2, -(-outputs * inputs // block)
    packed = torch.randint(256, (num_bytes,), generator=generator, dtype=torch.uint8)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": block,
        "dtype": "bfloat16",
        "shape": [outputs, inputs],
    }
    tensors = {
        "weight": packed.view(storage).reshape(-1, 1),
        "weight.absmax": torch.rand(num_blocks, generator=generator),
        "weight.quant_map": TABLE.clone(),
    }
    if nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.0371}
        scales = torch.randint(256, (num_blocks,), generator=generator, dtype=torch.uint8)
        tensors["weight.absmax"] = scales
        tensors["weight.nested_absmax"] = torch.rand(-(-num_blocks // 256), generator=generator)
        tensors["weight.nested_quant_map"] = torch.randn(256, generator=generator)
    text = json.dumps(state).encode()
    name = f"weight.quant_state.bitsandbytes__{kind}"
    tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def slowly(tensors: dict[str, torch.Tensor], outputs: int, inputs: int, block: int) -> torch.Tensor:
    """FORMATS 3.8, element by element."""
    packed = tensors["weight"].contiguous().view(torch.uint8).reshape(-1).numpy()
    table = tensors["weight.quant_map"].numpy()
    absmax = tensors["weight.absmax"].numpy()
    out = np.empty(outputs * inputs, dtype=np.float32)
    for i in range(outputs * inputs):
        byte = int(packed[i // 2])
        scale = absmax[i // block]
        if "weight.nested_absmax" in tensors:
            code = tensors["weight.nested_quant_map"].numpy()[scale]
            outer = tensors["weight.nested_absmax"].numpy()[i // block // 256]
            scale = np.float32(code * outer) + np.float32(0.0371)
        out[i] = table[byte & 15 if i % 2 else byte >> 4] * scale
    return torch.from_numpy(out).reshape(outputs, inputs)


def test_fixture_decodes_as_bitsandbytes_does() -> None:
    folder = fixture_folder("bnb-nf4")
    quantization = parse_bitsandbytes(config_of(folder))
    count = 0
    for module, tensors, reference in references(folder):
        layer = layer_of(reference, module)
        found = found_of(tensors, *reference.shape, module=module)
        scheme = quantization.scheme_for(layer, found)
        assert scheme == Bnb4(kind="nf4", block=64)
        assert torch.equal(decode(scheme, layer, tensors).to(reference.dtype), reference)
        for tp_size in (2, 4):
            assert torch.equal(
                joined(scheme, layer, tensors, tp_size).to(reference.dtype), reference
            )
        count += 1
    assert count == 14


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs", "block"),
    [(6, 64, 64), (4, 96, 64), (10, 320, 64), (3, 128, 32), (300, 64, 64), (24, 832, 64)],
)
def test_bytes_decode_as_written_down(outputs: int, inputs: int, block: int, nested: bool) -> None:
    tensors = made(outputs, inputs, nested=nested, block=block)
    layer = Layer.replicated(inputs, outputs)
    found = found_of(tensors, outputs, inputs)
    scheme = parse_bitsandbytes(NF4).scheme_for(layer, found)
    assert scheme == Bnb4(kind="nf4", block=block, nested=nested)
    assert torch.equal(decode(scheme, layer, tensors), slowly(tensors, outputs, inputs, block))


@pytest.mark.parametrize(
    ("layer", "nested", "tp_sizes"),
    [
        pytest.param(Layer.column(64, [600]), False, (2, 3, 4, 5), id="rows of one block"),
        pytest.param(Layer.column(64, [600]), True, (2, 3, 4, 5), id="nested scales of 256 rows"),
        pytest.param(Layer.column(96, [768]), False, (2, 3, 4), id="blocks across rows"),
        pytest.param(Layer.column(96, [1536]), True, (3,), id="512 rows are 3 nested scales"),
        pytest.param(Layer.column(1280, [192]), True, (3,), id="64 rows are 5 nested scales"),
        pytest.param(Layer.row(960, 36), False, (3, 5), id="inputs"),
        pytest.param(Layer.row(960, 36), True, (3, 5), id="inputs, nested scales whole"),
    ],
)
def test_pieces_are_cuts_of_the_whole(
    layer: Layer, nested: bool, tp_sizes: tuple[int, ...]
) -> None:
    tensors = made(layer.output.size, layer.input.size, nested=nested)
    scheme = Bnb4(kind="nf4", nested=nested)
    whole = decode(scheme, layer, tensors)
    for tp_size in tp_sizes:
        assert torch.equal(joined(scheme, layer, tensors, tp_size), whole), tp_size


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.int8])
def test_bytes_may_be_stored_as_another_dtype(storage: torch.dtype) -> None:
    plain, viewed = made(8, 128), made(8, 128, storage=storage)
    scheme, layer = Bnb4(kind="nf4"), Layer.row(128, 8)
    assert parse_bitsandbytes(NF4).scheme_for(layer, found_of(viewed, 8, 128)) == scheme
    assert torch.equal(
        joined(scheme, layer, viewed, 2).nan_to_num(), joined(scheme, layer, plain, 2)
    )


def test_int8_is_divided_by_127() -> None:
    tensors = {
        "weight": torch.randint(-127, 128, (12, 20), dtype=torch.int8),
        "SCB": torch.rand(12),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    layer = Layer.column(20, [12])
    scheme = parse_bitsandbytes({"load_in_8bit": True}).scheme_for(layer, found_of(tensors, 12, 20))
    assert scheme == BnbInt8()
    # The literal of int8_vectorwise_dequant.
    needed = tensors["weight"] * tensors["SCB"].view(-1, 1) * 7.874015718698502e-3
    for tp_size in (1, 2, 3, 4):
        assert torch.equal(joined(scheme, layer, tensors, tp_size), needed)
    by_inputs = Layer.row(20, 12)
    for tp_size in (2, 5):
        assert torch.equal(joined(scheme, by_inputs, tensors, tp_size), needed)


def refused(layer: Layer, tensors: dict[str, torch.Tensor], tp_size: int) -> str:
    with pytest.raises(LayoutError) as info:
        joined(Bnb4(kind="nf4", nested="weight.nested_absmax" in tensors), layer, tensors, tp_size)
    return str(info.value)


def test_cuts_through_blocks_are_refused() -> None:
    assert refused(Layer.row(320, 8), made(8, 320), 2) == (
        "TP 2 cuts 320 columns into 160 per rank; one scale covers a block of 64 inputs and "
        "160 = 2 * 64 + 32. Try: TP 1 or 5."
    )
    assert refused(Layer.row(96, 8), made(8, 96), 2) == (
        "TP 2 cuts 96 columns into 48 per rank; blocks of 64 run across rows of 96 inputs and "
        "48 = 0 * 96 + 48. Try: TP 1."
    )
    assert refused(Layer.column(96, [6]), made(6, 96), 2) == (
        "TP 2 cuts 6 rows into 3 per rank; blocks of 64 run across rows of 96 inputs and "
        "3 = 1 * 2 + 1. Try: TP 1 or 3."
    )
    assert refused(Layer.column(1280, [96]), made(96, 1280, nested=True), 2) == (
        "TP 2 cuts 96 rows into 48 per rank; one nested scale covers 256 blocks of 64 and "
        "48 = 0 * 64 + 48. Try: TP 1."
    )


def test_the_state_must_agree() -> None:
    tensors = made(8, 128)
    name = "weight.quant_state.bitsandbytes__nf4"
    scheme = Bnb4(kind="nf4")

    def problem(text: bytes) -> str:
        state = {name: torch.tensor(list(text), dtype=torch.uint8)}
        with pytest.raises(CheckpointError) as info:
            scheme.dequantize({**tensors, **state}, PartView(outputs=8, inputs=128))
        return str(info.value)

    told = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [8, 128]}
    assert problem(json.dumps(told | {"blocksize": 128}).encode()) == (
        "weight.quant_state says nf4, blocks of 128 under nested blocks of 256, the tensors have "
        "nf4, blocks of 64 under 256."
    )
    assert problem(json.dumps(told | {"shape": [4, 128]}).encode()) == (
        "weight.quant_state says [4, 128], the rank holds outputs 0:8 and inputs 0:128."
    )
    for text in (b"\xff\xfe", b"[1]", b"{}", b"", b"[" * 100_000, b'{"shape": 3}'):
        assert "needs a JSON object with quant_type, blocksize and shape" in problem(text)


def config_problem(config: dict[str, Any]) -> str:
    with pytest.raises(LadingError) as info:
        parse_bitsandbytes(config)
    return str(info.value)


def test_configs_are_checked() -> None:
    assert config_problem({}) == (
        "quantization_config.load_in_4bit: is missing, needs one of load_in_4bit and load_in_8bit "
        "to be true."
    )
    assert config_problem({"load_in_4bit": 1}) == (
        "quantization_config.load_in_4bit: is 1, needs true or false."
    )
    assert config_problem(NF4 | {"bnb_4bit_quant_type": "af4"}) == (
        'quantization_config.bnb_4bit_quant_type: is "af4", needs "nf4" or "fp4".'
    )


def module_problem(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    with pytest.raises(LadingError) as info:
        parse_bitsandbytes(config).scheme_for(Layer.replicated(64, 4), found_of(tensors, 4, 64))
    return str(info.value)


def test_contradictions_name_both_sides() -> None:
    tensors = made(4, 64)
    assert module_problem(NF4 | {"bnb_4bit_quant_type": "fp4"}, tensors) == (
        "layer: config.json says bitsandbytes fp4, the checkpoint has weight uint8[128, 1], "
        "weight.absmax fp32[4], weight.quant_map fp32[16], "
        "weight.quant_state.bitsandbytes__nf4 uint8[77]; needs weight, weight.absmax, "
        "weight.quant_map, weight.quant_state.bitsandbytes__fp4."
    )
    assert module_problem(NF4 | {"bnb_4bit_use_double_quant": True}, tensors) == (
        "layer: config.json says bnb_4bit_use_double_quant true, the checkpoint has "
        "weight.absmax fp32[4]."
    )
    assert module_problem(NF4 | {"llm_int8_skip_modules": ["layer"]}, tensors).startswith(
        'layer: config.json says that "layer" is not quantised (llm_int8_skip_modules), the '
        "checkpoint has weight uint8[128, 1], "
    )
    short = {**tensors, "weight": tensors["weight"][:100]}
    assert module_problem(NF4, short) == (
        "layer: config.json says bitsandbytes nf4, the checkpoint has weight uint8[100, 1]; needs "
        "128 bytes (4 * 64 elements of 4 bits)."
    )
    few = {**tensors, "weight.absmax": torch.ones(3)}
    assert module_problem(NF4, few) == (
        "layer: config.json says bitsandbytes nf4, the checkpoint has weight.absmax fp32[3]; needs "
        "4 scales (4 * 64 elements in blocks of 64)."
    )
    assert module_problem({"load_in_8bit": True}, tensors).endswith("; needs weight, SCB.")


def test_a_dense_module_is_dense() -> None:
    found = found_of({"weight": torch.ones(4, 64, dtype=torch.bfloat16)}, 4, 64)
    layer = Layer.replicated(64, 4)
    assert parse_bitsandbytes(NF4).scheme_for(layer, found) is None
    packed = replace(found, tensors={"weight": Stored(dtype="BF16", shape=(64, 1))})
    assert parse_bitsandbytes(NF4).scheme_for(layer, packed) is None
