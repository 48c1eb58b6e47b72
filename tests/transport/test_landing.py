"""Copies by value on a GPU: what fits the room at a time, what is refused, what a failure leaves.

That they give the right bytes is tested beside all other ways, in test_moving.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lading.checkpoint import open_checkpoint
from lading.errors import DtypeError, FileError
from lading.layers import Layer
from lading.plan import Target, make_plan
from lading.ranks import Ranks
from lading.specs import dense_specs
from lading.transport import Limits, Transport
from lading.transport.landing import ALIGN_BYTES, batches

from ..oracles import index_of, numbered
from .test_moving import NATIVE, Gpus, OnGpu, one, small_units

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are for Linux")


@pytest.mark.parametrize("native", [True, False])
def test_an_overflow_on_the_gpu_is_refused(native: bool, tmp_path: Path) -> None:
    full = torch.arange(3000, dtype=torch.float32).reshape(300, 10)
    full[250, 3] = 1e30
    save_file({"w.weight": full}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    layout = Layer.column(10, [300]).layout(dense_specs(bias=False)[0], 1)
    target = Target(name="w.weight", layout=layout, dtype="F16")
    plan = make_plan([target], checkpoint.tensors, ranks=[Ranks()])
    memory = torch.zeros(300, 10, dtype=torch.float16).as_subclass(OnGpu)
    gpus: Any = Gpus()
    with checkpoint.reader() as reader, small_units(native and NATIVE, on_gpu=True):
        transport = Transport(reader=reader, gpus=gpus, limits=Limits(device_bytes=3000))
        with pytest.raises(DtypeError, match="1 values are too large for fp16"):
            transport.run(plan, plan.share(Ranks()), {"w.weight": memory}, lambda _: None)
    assert all(not left for left in gpus.gpu.pending.values())


@pytest.mark.parametrize("room", [512, 1024, 5000, 1 << 20])
def test_batches_fit_and_have_each_element_once(room: int, tmp_path: Path) -> None:
    full = torch.arange(40 * 48, dtype=torch.float64).reshape(40, 48)
    _, plan = one(tmp_path, Layer.row(48, 40), full, 3)
    share = plan.share(Ranks(tp_rank=1, tp_size=3))
    seen = numbered((40, 16)) * 0
    for batch in batches(plan, share.copies, room):
        stop = 0
        for landed in batch:
            assert landed.at % ALIGN_BYTES == 0
            assert landed.at >= stop
            stop = landed.at + landed.inner.num_elements * 8
            assert stop <= room
            seen[index_of(landed.inner)] += 1
    assert bool((seen == 1).all())


@pytest.mark.parametrize("native", [True, False])
def test_a_file_that_ends_early_is_named_and_what_landed_before_stays(
    native: bool, tmp_path: Path
) -> None:
    full = torch.arange(6000, dtype=torch.float64).reshape(600, 10)
    checkpoint, _ = one(tmp_path, Layer.column(10, [600]), full, 1)
    layout = Layer.column(10, [600]).layout(dense_specs(bias=False)[0], 1)
    target = Target(name="w.weight", layout=layout, dtype="F32")
    plan = make_plan([target], checkpoint.tensors, ranks=[Ranks()])
    memory = torch.full((600, 10), -1.0).as_subclass(OnGpu)
    gpus: Any = Gpus()
    with checkpoint.reader() as reader, small_units(native and NATIVE, on_gpu=True):
        transport = Transport(reader=reader, gpus=gpus, limits=Limits(device_bytes=3000))
        path = tmp_path / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 80 * 100)
        with pytest.raises(FileError, match=r"w\.weight.*model\.safetensors"):
            transport.run(plan, plan.share(Ranks()), {"w.weight": memory}, lambda _: None)
    assert all(not left for left in gpus.gpu.pending.values())
    values = torch.Tensor(memory)
    assert bool(((values == full.float()) | (values == -1)).all())
    assert bool((values[-100:] == -1).all())
