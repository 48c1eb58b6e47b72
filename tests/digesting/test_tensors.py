"""Torch tensors give the sums of their bytes: on the CPU, and with the arithmetic of devices."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lading import dtypes
from lading.digesting import tensors as tensor_digests
from lading.digesting.tensors import copy_sums, sums_of_tensor
from lading.digests.rows import tiles_of
from lading.digests.sums import Sums, row_bytes, sums_of
from lading.errors import CallError
from lading.regions import Region
from tests import oracles
from tests.digests import oracle

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def has_dtype(code: str) -> bool:
    try:
        dtypes.to_torch(code)
    except LookupError:
        return False
    return True


CODES = [code for code in dtypes.BITS if has_dtype(code)]


def random_tensor(code: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits; of F4 `shape` counts the stored elements."""
    random = torch.Generator().manual_seed(seed)
    raw = torch.randint(
        256, (prod(shape) * dtypes.storage_bytes(code),), dtype=torch.uint8, generator=random
    )
    return raw.view(dtypes.to_torch(code)).view(shape)


def raw_of(tensor: torch.Tensor) -> bytes:
    bits = tensor.view(BITS[tensor.element_size()]).contiguous()
    return bits.reshape(-1).view(torch.uint8).numpy().tobytes()


def header_shape(code: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 2 * shape[-1]) if code == "F4" else shape


def on_device(code: str, shape: tuple[int, ...], region: Region, values: torch.Tensor) -> Any:
    """The sums of a region that is one grid, with the arithmetic of devices."""
    item = dtypes.storage_bytes(code)
    (tile,) = tiles_of(region, row_bytes(code, shape), item)
    found = tensor_digests.grid_sums(tile, values.view(BITS[item]), item)
    return tuple(lane % 2**64 for lane in found.tolist())


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    "spans",
    [((0, 7), (0, 70)), ((2, 5), (0, 70)), ((0, 7), (3, 33)), ((0, 7), (3, 4)), ((1, 2), (5, 67))],
)
def test_every_dtype(code: str, spans: tuple[tuple[int, int], ...]) -> None:
    stored = (7, 70)
    tensor, shape = random_tensor(code, stored), header_shape(code, stored)
    region = Region.box(stored, spans)
    values = tensor.view(BITS[tensor.element_size()])[slice(*spans[0]), slice(*spans[1])]
    item = tensor.element_size()
    where = [at * item + i for at in oracles.positions(region) for i in range(item)]
    expected = oracle.lanes(70 * item, raw_of(tensor), where)
    found = sums_of_tensor(code, shape, region, values.view(tensor.dtype))
    assert found == sums_of(code, shape, region, raw_of(values))
    assert found.lanes == expected
    assert on_device(code, shape, region, values) == expected


@pytest.mark.parametrize("shape", [(5, 4097), (3, 9000), (70, 65)])
def test_blocks_of_devices(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_digests, "BLOCK_UNITS", 2000)
    tensor = random_tensor("U8", shape)
    found = on_device("U8", shape, Region.whole(shape), tensor)
    assert found == oracle.lanes(shape[1], raw_of(tensor))


def test_words_of_bytes_that_begin_anywhere() -> None:
    """Two bytes are a word of their tensor, wherever they lie in the memory of another."""
    memory = random_tensor("U8", (3 + 5 * 70,))
    values = memory[3:].view(5, 70)
    assert values.is_contiguous()
    found = on_device("U8", (5, 70), Region.whole((5, 70)), values)
    assert found == oracle.lanes(70, raw_of(values))


@given(oracles.copies("s", "t", (6, 5, 40)), st.sampled_from(["BF16", "I32", "U8"]))
def test_copies(copy: Any, code: str) -> None:
    """Read from the parameter, whatever its order of dims and steps, it is the tensor's region."""
    shape, region = (6, 5, 40), copy.source_region
    whole = random_tensor(code, shape)
    item = whole.element_size()
    flat = whole.view(BITS[item]).reshape(-1)
    parameter = random_tensor(code, copy.target_region.shape, seed=1)
    source = flat.view(region.shape).numpy()[oracles.index_of(region)]
    values = source.transpose(copy.axes) if copy.axes else source
    parameter.view(BITS[item]).numpy()[oracles.index_of(copy.target_region)] = values
    where = [at * item + i for at in oracles.positions(region) for i in range(item)]
    expected = oracle.lanes(oracle.width(40 * item), raw_of(whole), where)
    found = copy_sums(copy, code, shape, parameter)
    assert found == Sums(lanes=expected, num_elements=region.num_elements)


def test_blocks_of_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_digests, "BLOCK_UNITS", 100)
    boxes = tensor_digests.row_blocks((1, 9, 30))
    assert [str(box) for box in boxes] == [f"[0:1, {at}:{at + 3}, 0:30]" for at in (0, 3, 6)]
    assert tensor_digests.row_blocks(()) == [Region.whole(())]


def test_another_size_or_dtype() -> None:
    region = Region.box((4, 64), ((0, 2), (0, 64)))
    with pytest.raises(CallError) as caught:
        sums_of_tensor("BF16", (4, 64), region, torch.zeros(2, 64))
    expected = "region [0:2, 0:64]: is torch.float32[2, 64], needs elements of 2 bytes [2, 64]."
    assert str(caught.value) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [(300, 4096), (70, 65), (5000, 2), ()])
def test_gpu(code: str, shape: tuple[int, ...]) -> None:
    if code == "F4" and not shape:
        return
    tensor, full = random_tensor(code, shape), header_shape(code, shape)
    regions = [Region.whole(shape)]
    if shape:
        regions.append(Region.box(shape, [(1, n) for n in shape]))
    for region in regions:
        bits = tensor.view(BITS[tensor.element_size()])
        values = bits[
            tuple(slice(a, a + n) for a, n in zip(region.start, region.size, strict=True))
        ]
        on_gpu = values.cuda().view(tensor.dtype)
        assert sums_of_tensor(code, full, region, on_gpu) == sums_of(
            code, full, region, raw_of(values)
        )
