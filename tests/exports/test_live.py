"""The bytes of copies, block by block, against numpy and brute force; what has no stored form."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lading
from lading.errors import DtypeError, NotLoadedError
from lading.exports import live
from lading.exports.live import blocks, boxes, bytes_of, has_bits, live_parameters
from lading.nn import RowParallelLinear
from lading.parameter import BasevLLMParameter, permute_param_layout_
from lading.ranks import Ranks
from lading.regions import Copy, Region
from tests.loading_made import indices, on_meta, save, shapes


@given(st.lists(st.integers(0, 5), max_size=4), st.integers(1, 30))
def test_boxes_come_one_after_the_other(size: list[int], limit: int) -> None:
    whole = torch.arange(math.prod(size)).reshape(size)
    found: list[int] = []
    for box in boxes(tuple(size), limit):
        assert 0 < box.num_elements <= limit
        index = tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))
        found += whole[index].reshape(-1).tolist()
    assert found == whole.reshape(-1).tolist()


@st.composite
def copies(draw: st.DrawFn) -> Copy:
    """A strided box of S, held in any order of dims somewhere in a larger parameter."""
    num_dims = draw(st.integers(1, 3))
    size = [draw(st.integers(1, 4)) for _ in range(num_dims)]
    axes = tuple(draw(st.permutations(range(num_dims))))

    def region(sizes: list[int]) -> Region:
        start = [draw(st.integers(0, 2)) for _ in sizes]
        step = [draw(st.integers(1, 3)) if n > 1 else 1 for n in sizes]
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(start, sizes, step, strict=True)]
        shape = tuple(end + draw(st.integers(0, 2)) for end in ends)
        return Region(shape=shape, start=tuple(start), size=tuple(sizes), step=tuple(step))

    return Copy(
        source="s",
        target="t",
        part=None,
        source_region=region(size),
        target_region=region([size[axis] for axis in axes]),
        axes=() if axes == tuple(range(num_dims)) else axes,
    )


@settings(deadline=None)
@given(copies(), st.integers(1, 64))
def test_blocks_are_the_source_region_in_row_order(copy: Copy, limit: int) -> None:
    target = torch.arange(math.prod(copy.target_region.shape), dtype=torch.int32)
    target = target.reshape(copy.target_region.shape)
    found = np.full(copy.source_region.shape, -1, dtype=np.int32)
    count = 0
    for region, data in blocks(target, copy, "I32", limit):
        assert data.nbytes <= max(limit, 4)
        values = iter(np.frombuffer(data, dtype=np.int32))
        for index in elements(region):
            assert found[index] == -1
            found[index] = next(values)
            count += 1
    assert count == copy.source_region.num_elements
    order = copy.axes or tuple(range(len(copy.source_region.size)))
    sources, targets = copy.source_region, copy.target_region
    for inner in itertools.product(*map(range, sources.size)):
        at = tuple(a + i * s for a, i, s in zip(sources.start, inner, sources.step, strict=True))
        moved = [inner[axis] for axis in order]
        held = tuple(a + i * s for a, i, s in zip(targets.start, moved, targets.step, strict=True))
        assert found[at] == target[held]


def elements(region: Region) -> itertools.product[tuple[int, ...]]:
    dims = zip(region.start, region.size, region.step, strict=True)
    return itertools.product(*(range(a, a + (n - 1) * s + 1, s) for a, n, s in dims))


def test_a_contiguous_block_is_not_copied() -> None:
    target = torch.zeros(6, 4)
    region = Region.box((6, 4), [(2, 5), (0, 4)])
    copy = Copy(source="s", target="t", part=None, source_region=region, target_region=region)
    ((_, data),) = blocks(target, copy, "F32", 10**6)
    target[2, 0] = 1.0
    assert np.frombuffer(data, dtype=np.float32)[0] == 1.0


def test_bytes_of_a_gpu_go_through_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One buffer for each thread, which grows; here of memory that is not locked."""
    asked: list[tuple[int, bool]] = []
    real = torch.empty

    def empty(size: int, *, dtype: torch.dtype, device: str, pin_memory: bool) -> torch.Tensor:
        assert device == "cpu", "whatever the default is: other memory cannot be locked"
        asked.append((size, pin_memory))
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(live, "_thread", live._Thread())
    monkeypatch.setattr(torch, "empty", empty)
    values = torch.arange(90, dtype=torch.uint8)
    taken = [live._fetched(values[:n]) for n in (40, 30, 60)]
    assert asked == [(40, True), (60, True)]
    assert taken[0].data_ptr() == taken[1].data_ptr()
    assert [t.tolist() for t in taken[1:]] == [list(range(30)), list(range(60))]
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(live._fetched, values).result()
    assert other.tolist() == list(range(90))
    assert taken[2].tolist() == list(range(60))  # another thread's buffer is another


# --------------------------------------------------------------------------------- changes of dtype

ALL_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_bf16_comes_back_from_fp32() -> None:
    # The payloads of NaNs too, which torch's own cast does not keep.
    wide = (ALL_BF16.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    assert bytes(bytes_of(wide, "BF16")) == ALL_BF16.view(torch.uint8).numpy().tobytes()


def test_every_finite_fp16_comes_back_from_wider_dtypes() -> None:
    every = ALL_BF16.view(torch.int16).view(torch.float16)
    every = every[~every.isnan()]
    for dtype in (torch.float32, torch.float64):
        assert bytes(bytes_of(every.to(dtype), "F16")) == every.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [
        (1 + 2.0**-8, torch.float32, "BF16"),
        (2.0**-140, torch.float32, "BF16"),
        (1e5, torch.float32, "F16"),
        (1 + 2.0**-11, torch.float32, "F16"),
        (1 + 2.0**-8, torch.float16, "BF16"),
        (1e300, torch.float64, "F32"),
    ],
)
def test_a_value_that_would_be_lost(value: float, dtype: torch.dtype, stored: str) -> None:
    values = torch.tensor([1.0, value, float("inf"), float("nan")], dtype=dtype)
    with pytest.raises(DtypeError, match=r"^1 values of "):
        bytes_of(values, stored)


def test_widening_loses_nothing() -> None:
    found = torch.frombuffer(bytearray(bytes_of(ALL_BF16, "F32")), dtype=torch.float32)
    finite = ~ALL_BF16.isnan()
    assert torch.equal(found[finite], ALL_BF16[finite].float())


def test_bits_are_seen() -> None:
    assert not has_bits(torch.zeros(3, 4)[:, ::2])
    assert has_bits(torch.tensor([0.0, -0.0]))
    assert has_bits(torch.tensor([0.0, 1.0]).to(torch.float8_e4m3fn))
    assert not has_bits(torch.zeros(0))


# ------------------------------------------------------------------------------------- stored forms


def test_parameters_as_they_are_stored(tmp_path: Path) -> None:
    full = indices(shapes(), torch.float32)
    save(tmp_path, full)
    ranks = Ranks(tp_rank=1, tp_size=2)
    model = on_meta(ranks, dtype=torch.float32)
    lading.load(model, tmp_path, ranks=ranks)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        if isinstance(param, BasevLLMParameter) and param.dim() == 2:
            permute_param_layout_(param, input_dim=0, output_dim=1)
            permute_param_layout_(param, input_dim=1, output_dim=0)
            permute_param_layout_(param, input_dim=0, output_dim=1)
    assert model.up.weight.shape == (6, 120)
    live = live_parameters(model, ranks)
    targets = {target.name: target for target in live.targets}
    assert targets.keys() == live.tensors.keys() == before.keys() | {"scale"}
    for name, tensor in before.items():
        assert torch.equal(live.tensors[name], tensor), name
        assert targets[name].layout.local_shape == tensor.shape


def test_a_load_into_permuted_parameters_makes_that_the_stored_form(tmp_path: Path) -> None:
    layer = RowParallelLinear(8, 6, bias=False, ranks=Ranks())
    permute_param_layout_(layer.weight, input_dim=0, output_dim=1)
    model = nn.Module()
    model.add_module("layer", layer)
    stored = torch.arange(48.0).reshape(8, 6)
    save(tmp_path, {"layer.weight": stored})
    lading.load(model, tmp_path)
    assert torch.equal(live_parameters(model, Ranks()).tensors["layer.weight"], stored)


def test_weights_that_are_not_there() -> None:
    with pytest.raises(NotLoadedError, match="has no memory yet"):
        live_parameters(on_meta(Ranks()), Ranks())
