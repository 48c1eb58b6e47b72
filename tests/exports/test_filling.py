"""What is written, where, and how much of it is in memory at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lading
from lading import ranks as ranks_module
from lading.errors import FileError
from lading.exports import filling
from lading.exports.filling import Filling
from lading.exports.live import Live, live_parameters
from lading.exports.plan import plan_export
from lading.loading import origin_of
from lading.ranks import Ranks
from lading.transport import moving
from tests.loading_made import indices, on_meta, save, shapes
from tests.schemes.cutting import fixture

from .made import export_all, models_of, same_bits, tensors_of


@pytest.mark.parametrize(
    "name",
    ["gptq-v1-w4-g64-asym", "ct-w4a16-g64-sym", "ct010-gptq-w4a16-actorder-group", "modelopt-fp8"],
)
def test_constants_follow_from_the_declaration(name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(fixture(name), tmp_path / "in")
    (folder / "dequant_reference.safetensors").unlink()
    (folder / "logits_reference.safetensors").unlink(missing_ok=True)
    before = tensors_of(folder)
    models = models_of(folder, 2)
    shutil.rmtree(folder)
    export_all(models, tmp_path / "out")
    after = tensors_of(tmp_path / "out")
    assert after.keys() == before.keys()
    assert all(same_bits(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("staging", [1, 100, 10**6])
def test_blocks_are_bounded(staging: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = indices(shapes(), torch.bfloat16)
    full["rotary_emb.inv_freq"] = torch.rand(300)
    folder = save(tmp_path / "in", full)
    model = on_meta(Ranks(), dtype=torch.float32)  # each block has to be cast
    lading.load(model, folder)
    seen: list[int] = []
    real = filling._write

    def write(writer: object, place: object, block: filling.Block) -> None:
        seen.append(block.data.nbytes)
        real(writer, place, block)  # type: ignore[arg-type]

    monkeypatch.setattr(filling, "_write", write)
    export_all({Ranks(): model}, tmp_path / "out", staging_bytes=staging)
    assert max(seen) <= max(staging, 4)
    assert sum(seen) == sum(tensor.nbytes for tensor in full.values())
    for name, tensor in tensors_of(tmp_path / "out").items():
        assert same_bits(tensor, full[name]), name


def test_others_are_shared_out_among_processes(tmp_path: Path) -> None:
    full = indices(shapes(), torch.float32)
    for number in range(5):
        full[f"layers.{number}.rotary_emb.inv_freq"] = torch.rand(3)
    folder = save(tmp_path / "in", full)
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, folder)
    plan = plan_export(
        model,
        live_parameters(model, Ranks()),
        origin=origin_of(model),
        source=None,
        max_file_bytes=10**9,
    )
    names: list[str] = []
    for place in range(3):
        fill = Filling(plan=plan, lives={}, place=place, num_processes=3, staging_bytes=1)
        found = [job.place.name for job in fill._other_jobs(_Nothing(), 1)]  # type: ignore[arg-type]
        assert 1 <= len(found) <= 2
        names += found
    assert sorted(names) == sorted(plan.others)


class _Nothing:
    """A reader that is not asked."""


def test_the_error_of_a_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "in", indices(shapes(), torch.float32))
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, folder)
    calls: list[int] = []
    real = filling._write

    def write(writer: object, place: object, block: filling.Block) -> None:
        calls.append(block.data.nbytes)
        if len(calls) == 4:
            raise FileError("cannot be written: No space left on device", subject="x")
        real(writer, place, block)  # type: ignore[arg-type]

    monkeypatch.setattr(filling, "_write", write)
    monkeypatch.setattr(filling, "MAX_THREADS", 1)  # so that what comes after is known
    with pytest.raises(FileError, match="No space left on device"):
        lading.export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert len(calls) == 4  # what was not begun was left out


def test_as_many_threads_as_this_process_has_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as many as torch computes with: torchrun says one."""
    folder = save(tmp_path / "in", indices(shapes(), torch.float32))
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, folder)
    seen: list[int] = []
    real = filling._run
    monkeypatch.setattr(moving, "_num_cores", lambda: 6)
    monkeypatch.setattr(filling, "_run", lambda *args: (seen.append(args[3]), real(*args))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lading.export(model, tmp_path / "out")
        monkeypatch.setattr(ranks_module, "num_local", lambda group: 3)
        lading.export(model, tmp_path / "again")
    finally:
        torch.set_num_threads(before)
    assert seen == [filling.MAX_THREADS, 2]


def test_what_a_stream_still_writes_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the caller's thread, once for each GPU: the threads have streams of their own."""
    waited: list[torch.device] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def synchronize(self) -> None:
            waited.append(self.device)

    places = [torch.device(name) for name in ("cpu", "cuda:1", "cuda:1", "cuda:0")]
    tensors = {str(i): SimpleNamespace(device=place) for i, place in enumerate(places)}
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    live = Live(ranks=Ranks(), targets=(), tensors=tensors)  # type: ignore[arg-type]
    filling._finish_writes([live])
    assert waited == [torch.device("cuda:1"), torch.device("cuda:0")]
