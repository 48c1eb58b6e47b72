"""Bytes from files into memory: any region, any buffer, and what is read in excess is counted."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lading.checkpoint import Checkpoint, open_checkpoint
from lading.errors import CheckpointError
from lading.layers import Layer
from lading.layouts import Layout
from lading.names import Names
from lading.plan import Expected, Plan, Target, make_plan
from lading.ranks import Ranks, all_ranks
from lading.regions import Copy, Region
from lading.specs import Constant, dense_specs
from lading.transport import HostTransport, Moved, host

from ..oracles import copies, index_of, numbered

CODES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


def moved(
    checkpoint: Checkpoint,
    plan: Plan,
    ranks: Ranks,
    memory: dict[str, torch.Tensor],
    **options: Any,
) -> Moved:
    with checkpoint.reader() as reader:
        transport = HostTransport(reader=reader, **options)
        transport.compare(plan, plan.share(ranks))
        return transport.run(plan, plan.share(ranks), memory, lambda _: None)


def one_weight(
    folder: Path, layer: Layer, tensor: torch.Tensor, tp_size: int, code: str
) -> tuple[Checkpoint, Plan]:
    """The checkpoint of one weight "w.weight", and the plan of all ranks."""
    save_file({"w.weight": tensor}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    layout = layer.layout(dense_specs(bias=False)[0], tp_size)
    target = Target(name="w.weight", layout=layout, dtype=code)
    return checkpoint, make_plan([target], checkpoint.tensors, ranks=all_ranks(tp_size))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_layer_is_what_safetensors_slices(data: st.DataObject, tmp_path: Path) -> None:
    size = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8]), "tp_size")
    kind = data.draw(st.sampled_from(["column", "row", "whole", "vocabulary"]))
    cut, other = size * data.draw(st.integers(1, 9)), data.draw(st.integers(1, 17))
    if kind == "vocabulary":
        cut = data.draw(st.integers(1, 60))
    layer = {
        "column": lambda: Layer.column(other, [cut]),
        "row": lambda: Layer.row(cut, other),
        "whole": lambda: Layer.replicated(cut, other),
        "vocabulary": lambda: Layer.embedding(cut, other, pad_to=4),
    }[kind]()
    shape = (other, cut) if kind in ("row", "whole") else (cut, other)
    stored, kept = data.draw(st.sampled_from([("F64", "F64"), ("F32", "F64"), ("F32", "BF16")]))
    full = torch.arange(math.prod(shape)).reshape(shape).to(CODES[stored]) % 251
    checkpoint, plan = one_weight(tmp_path, layer, full, size, kept)
    ranks = Ranks(tp_rank=data.draw(st.integers(0, size - 1)), tp_size=size)
    memory = torch.full(plan.targets[0].layout.local_shape, -1, dtype=CODES[kept])
    found = moved(
        checkpoint,
        plan,
        ranks,
        {"w.weight": memory},
        staging_bytes=data.draw(st.sampled_from([1, 8, 40, 200, 1 << 20]), "staging_bytes"),
        num_threads=data.draw(st.integers(1, 3)),
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        part = file.get_slice("w.weight")
        rows, cols = memory.shape
        r = ranks.tp_rank
        needed = {
            "column": lambda: part[r * rows : (r + 1) * rows],
            "row": lambda: part[:, r * cols : (r + 1) * cols],
            "whole": lambda: part[:],
            "vocabulary": lambda: part[min(r * rows, cut) : min((r + 1) * rows, cut)],
        }[kind]()
    assert torch.equal(memory[: len(needed)], needed.to(CODES[kept]))
    assert bool((memory[len(needed) :] == 0).all())
    assert found.kept_bytes == needed.numel() * needed.element_size()
    assert found.excess_bytes >= 0


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_copy_is_what_numpy_does(data: st.DataObject, tmp_path: Path) -> None:
    copy: Copy = data.draw(copies("x", "y"))
    full = numbered(copy.source_region.shape)
    save_file({"x": torch.from_numpy(full)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    needed = np.full(copy.target_region.shape, -1)
    values = full[index_of(copy.source_region)] if full.ndim else full
    if copy.axes:
        values = values.transpose(copy.axes)
    needed[index_of(copy.target_region) if needed.ndim else ()] = values
    staging = data.draw(st.sampled_from([1, 16, 100, 1 << 20]))
    for dtype in (torch.int64, torch.int32):
        target = torch.full(copy.target_region.shape, -1, dtype=dtype)
        with checkpoint.reader() as reader:
            transport = HostTransport(reader=reader, staging_bytes=staging)
            transport._copy(checkpoint.tensors["x"], copy, target, lambda _: None)
        assert np.array_equal(target.numpy(), needed)
        assert transport.moved.kept_bytes == 8 * copy.source_region.num_elements


@pytest.mark.parametrize(
    ("rows", "cols", "size", "excess"),
    [
        # 16 runs of 32 bytes, gaps of 96: 1440 bytes more cost less than 15 more calls
        (16, 16, 4, 15 * 96),
        # 4 runs of 32 kB, gaps of 96 kB: each gap costs more than a call
        (4, 16384, 4, 0),
    ],
)
def test_gaps_are_read_where_that_is_cheaper(
    rows: int, cols: int, size: int, excess: int, tmp_path: Path
) -> None:
    full = torch.arange(rows * cols, dtype=torch.float64).reshape(rows, cols)
    checkpoint, plan = one_weight(tmp_path, Layer.row(cols, rows), full, size, "F64")
    ranks = Ranks(tp_rank=1, tp_size=size)
    memory = torch.zeros(rows, cols // size, dtype=torch.float64)
    found = moved(checkpoint, plan, ranks, {"w.weight": memory})
    assert torch.equal(memory, full.chunk(size, 1)[1])
    assert found.excess_bytes == excess
    assert found.read_bytes == memory.nbytes + excess


def test_no_thread_holds_more_than_its_buffer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = torch.arange(64 * 48, dtype=torch.float64).reshape(64, 48)
    checkpoint, plan = one_weight(tmp_path, Layer.row(48, 64), full, 3, "F32")
    sizes: list[int] = []
    real = host.HostTransport._staging_for

    def staging_for(self: HostTransport, num_bytes: int) -> torch.Tensor:
        found = real(self, num_bytes)
        sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(host.HostTransport, "_staging_for", staging_for)
    memory = torch.zeros(64, 16)
    ranks = Ranks(tp_rank=2, tp_size=3)
    moved(checkpoint, plan, ranks, {"w.weight": memory}, staging_bytes=1000)
    assert max(sizes) == 1000
    assert torch.equal(memory, full[:, 32:].float())


def test_long_direct_reads_report_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "DIRECT_CHUNK_BYTES", 100)
    full = torch.arange(60, dtype=torch.float64).reshape(10, 6)
    checkpoint, plan = one_weight(tmp_path, Layer.column(6, [10]), full, 2, "F64")
    steps: list[int] = []
    memory = torch.zeros(5, 6, dtype=torch.float64)
    ranks = Ranks(tp_rank=1, tp_size=2)
    with checkpoint.reader() as reader:
        transport = HostTransport(reader=reader)
        transport.run(plan, plan.share(ranks), {"w.weight": memory}, steps.append)
    assert steps == [100, 100, 40]
    assert torch.equal(memory, full[5:])


def test_ctrl_c_ends_all_threads_before_it_is_raised(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((3,), float(i)) for i in range(500)}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    layout = Layout.replicated((3,))
    targets = [Target(name=name, layout=layout, dtype="F32") for name in tensors]
    plan = make_plan(targets, checkpoint.tensors, ranks=[Ranks()])
    memory = {name: torch.full((3,), -1.0) for name in tensors}
    started = threading.Event()

    def advance(_: int) -> None:
        if not started.is_set():
            started.set()
            # A real signal: a main thread that waits for a lock notices no other.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.02)

    with checkpoint.reader() as reader:
        transport = HostTransport(reader=reader, num_threads=2)
        with pytest.raises(KeyboardInterrupt):
            transport.run(plan, plan.share(Ranks()), memory, advance)
    before = {name: t.clone() for name, t in memory.items()}
    time.sleep(0.1)
    assert all(torch.equal(t, before[name]) for name, t in memory.items())
    assert any(bool((t == -1).all()) for t in memory.values())


def ordered(outputs: int, group: int) -> list[int]:
    return [i // group for i in range(outputs)]


Spoil = Callable[[list[int]], list[int]]


@pytest.mark.parametrize("staging", [4, 40, 1 << 20])
@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        (ordered(24, 8), None),
        ([0] * 24, None),  # how some tools say it
        ([0] * 16 + [2] * 8, "has 0 at 8, needs 1"),
        (ordered(16, 8) + [1] * 8, "has 1 at 16, needs 2"),
        ([*ordered(23, 8), 7], "has 7 at 23, needs 2"),
    ],
)
def test_groups_in_order(
    values: list[int], wrong: str | None, staging: int, tmp_path: Path
) -> None:
    expected = Expected(constant=Constant.GROUP_INDEX, inputs=24, group=8)
    tensor = torch.tensor(values, dtype=torch.int32)
    checked(tmp_path, tensor, "I32", expected, staging, wrong, "groups in order, as the config")


@pytest.mark.parametrize(
    ("values", "wrong"), [([0.0] * 5, None), ([0, 0, 0, 0.5, 0], "has 0.5 at 3, needs 0.0")]
)
def test_zeros(values: list[float], wrong: str | None, tmp_path: Path) -> None:
    expected = Expected(constant=Constant.ZERO)
    checked(tmp_path, torch.tensor(values), "F32", expected, 8, wrong, "the model declares no such")


@pytest.mark.parametrize(("values", "wrong"), [([7, 24], None), ([7, 23], "has 23 at 1, needs 24")])
def test_sizes(values: list[int], wrong: str | None, tmp_path: Path) -> None:
    expected = Expected(constant=Constant.SHAPE, outputs=((None, 7),), inputs=24)
    checked(tmp_path, torch.tensor(values), "I64", expected, 8, wrong, "the sizes of the declared")


def checked(
    folder: Path,
    tensor: torch.Tensor,
    code: str,
    expected: Expected,
    staging: int,
    wrong: str | None,
    why: str,
) -> None:
    save_file({"a.x": tensor}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    layout = Layout.replicated(tuple(tensor.shape))
    target = Target(name="a.x", layout=layout, dtype=code, expected=expected)
    plan = make_plan([target], checkpoint.tensors, ranks=[Ranks()], names=Names())
    with torch.device("meta"):  # the caller's default device is of no concern
        if wrong is None:
            moved(checkpoint, plan, Ranks(), {}, staging_bytes=staging)
            return
        with pytest.raises(CheckpointError) as caught:
            moved(checkpoint, plan, Ranks(), {}, staging_bytes=staging)
    text = str(caught.value)
    assert text.startswith(f"a.x: checkpoint tensor 'a.x' {wrong} ({why}")
    assert text.endswith("). In model.safetensors.")


@pytest.mark.parametrize("limit", [1, 3, 7, 20, 1000])
def test_blocks_cover_a_region_once_and_fit(limit: int) -> None:
    region = Region(shape=(5, 4, 9), start=(1, 0, 2), size=(3, 4, 3), step=(1, 1, 2))
    seen = np.zeros(region.size, dtype=int)
    for block in host.blocks(region, limit):
        seen[index_of(block)] += 1
        assert host._span(region.compose(block)) <= limit
    assert bool((seen == 1).all())
