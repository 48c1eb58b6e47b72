"""Which copies go straight, and how their files are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lading.checkpoint import open_checkpoint
from lading.errors import FileError
from lading.layers import Layer
from lading.layouts import Layout
from lading.plan import Plan, Target, make_plan
from lading.ranks import Ranks, all_ranks
from lading.specs import dense_specs
from lading.transport import sorting
from lading.transport.sorting import Opened, Sorting, Straight

from .made import O_DIRECT

CPU = torch.device("cpu")


def sorted_out(
    folder: Path,
    full: Mapping[str, torch.Tensor],
    targets: list[Target],
    memory: Mapping[str, torch.Tensor],
    *,
    ranks: Ranks | None = None,
    direct: bool | None = False,
    num_local: int = 1,
) -> tuple[list[dict[torch.device, Straight]], Sorting, Plan]:
    """All batches."""
    ranks = ranks or Ranks()
    save_file(dict(full), folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    plan = make_plan(targets, checkpoint.tensors, ranks=all_ranks(ranks.tp_size))
    with checkpoint.reader() as reader:
        assert reader.files is not None
        opened = Opened(reader.files, direct)
        copies = plan.share(ranks).copies
        found = Sorting(plan, copies, memory, opened, num_local=num_local)
        batches = []
        while (batch := found.take()) is not None:
            found.prepare()
            found.prepare()  # once more does nothing
            batches.append(batch)
        assert found.take() is None
    return batches, found, plan


def whole(name: str, code: str, shape: tuple[int, ...] = (4, 6)) -> Target:
    return Target(name=name, layout=Layout.replicated(shape), dtype=code)


def test_what_goes_straight(tmp_path: Path) -> None:
    full = {name: torch.arange(24.0).reshape(4, 6) + i for i, name in enumerate("abc")}
    memory = {
        "a": torch.zeros(4, 6),
        "b": torch.zeros(4, 6, dtype=torch.float64),  # cast
        "c": torch.zeros(4, 12)[:, ::2],  # memory with gaps
    }
    targets = [whole("a", "F32"), whole("b", "F64"), whole("c", "F32")]
    (batch,), found, _ = sorted_out(tmp_path, full, targets, memory)
    assert [copy.target for copy in batch[CPU].copies] == ["a"]
    assert [copy.target for copy in found.values[CPU]] == ["b", "c"]
    jobs, owners = batch[CPU].jobs.jobs()
    assert (jobs[:, 3] * jobs[:, 4]).tolist() == [96]
    assert jobs[0, 2] == memory["a"].data_ptr()
    assert owners.tolist() == [0]


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7])
def test_batches_have_each_copy_once(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "BATCH_COPIES", size)
    full = {f"w{i}": torch.full((3,), float(i)) for i in range(6)}
    memory = {name: torch.zeros(3) for name in full}
    targets = [whole(name, "F32", (3,)) for name in full]
    batches, _, plan = sorted_out(tmp_path, full, targets, memory)
    seen = [copy for batch in batches for work in batch.values() for copy in work.copies]
    assert seen == list(plan.share(Ranks()).copies)
    assert len(batches) == -(-6 // size)


@pytest.mark.parametrize(
    ("layer", "num_local", "direct"),
    [
        (Layer.column(6, [4]), 1, True),
        (Layer.column(6, [4]), 2, True),  # its own rows, whoever else reads
        (Layer.row(6, 4), 1, True),
        (Layer.row(6, 4), 2, False),  # other ranks need the same pages
        (Layer.replicated(6, 4), 2, False),  # all ranks need all
    ],
)
def test_what_ranks_share_goes_through_the_page_cache(
    layer: Layer, num_local: int, direct: bool, tmp_path: Path
) -> None:
    layout = layer.layout(dense_specs(bias=False)[0], 2)
    target = Target(name="w.weight", layout=layout, dtype="F32")
    memory = {"w.weight": torch.zeros(layout.local_shape)}
    full = {"w.weight": torch.arange(24.0).reshape(4, 6)}
    ranks = Ranks(tp_rank=1, tp_size=2)
    (batch,), found, _ = sorted_out(
        tmp_path, full, [target], memory, ranks=ranks, direct=True, num_local=num_local
    )
    jobs, _ = batch[CPU].jobs.jobs()
    descriptors = found._opened.descriptors
    past_it = {bool(job[7]) and descriptors[job[0]][1] >= 0 for job in jobs.tolist()}
    assert past_it == {direct and bool(O_DIRECT)}


@pytest.mark.skipif(not O_DIRECT, reason="no direct reads here")
def test_shared_rows_are_read_in_spans_but_not_what_all_ranks_keep(tmp_path: Path) -> None:
    full = {name: torch.arange(24.0).reshape(4, 6) for name in ("cut.weight", "whole.weight")}
    layers = {"cut.weight": Layer.row(6, 4), "whole.weight": Layer.replicated(6, 4)}
    specs = {name: layer.layout(dense_specs(bias=False)[0], 2) for name, layer in layers.items()}
    targets = [Target(name=name, layout=specs[name], dtype="F32") for name in full]
    memory = {name: torch.zeros(layout.local_shape) for name, layout in specs.items()}
    (batch,), found, _ = sorted_out(
        tmp_path, full, targets, memory, ranks=Ranks(tp_rank=1, tp_size=2), direct=True, num_local=2
    )
    jobs, _ = batch[CPU].jobs.jobs()
    opened = found._opened
    number = opened.number("model.safetensors")
    assert {(rows > 1, file, direct) for file, _, _, _, rows, _, _, direct in jobs.tolist()} == {
        (True, opened.through_cache(number), 1),
        (False, number, 0),
    }
    assert opened.names == ["model.safetensors"] * 2
    assert opened.descriptors[0][0] == opened.descriptors[1][0]
    assert opened.is_cold == [True, True]


def test_large_parameters_are_noted(tmp_path: Path) -> None:
    full = {"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 10)}
    memory = {name: torch.empty_like(t) for name, t in full.items()}
    targets = [whole("a", "F32", (1 << 20,)), whole("b", "F32", (1 << 10,))]
    (batch,), _, _ = sorted_out(tmp_path, full, targets, memory)
    assert [t is memory["a"] for t in batch[CPU].large.values()] == [True]


@pytest.mark.parametrize(
    ("resident", "remote", "cold"),
    [
        (0, False, True),
        (49, False, True),
        (51, False, False),
        (None, False, False),
        (0, True, False),
    ],
)
def test_cold_and_remote_files(
    resident: int | None, remote: bool, cold: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sorting, "is_remote", lambda _: remote)
    monkeypatch.setattr(
        sorting, "resident_part", lambda _, n: None if resident is None else resident / 100
    )
    save_file({"w": torch.zeros(1000)}, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path).reader() as reader:
        assert reader.files is not None
        opened = Opened(reader.files, None)
        assert opened.number("model.safetensors") == opened.number("model.safetensors") == 0
        fd, direct_fd = opened.descriptors[0]
        assert opened.is_remote == [remote]
        assert opened.is_cold == [cold and direct_fd >= 0]
        assert fd >= 0
        assert direct_fd == -1 or cold


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(10)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan([whole("w", "F32", (10,))], checkpoint.tensors, ranks=[Ranks()])
    (tmp_path / "model.safetensors").unlink()
    with checkpoint.reader() as reader:
        assert reader.files is not None
        copies, memory = plan.share(Ranks()).copies, {"w": torch.zeros(10)}
        found = Sorting(plan, copies, memory, Opened(reader.files, None), num_local=1)
        with pytest.raises(FileError, match=r"^w: checkpoint tensor 'w' cannot be read: the file "):
            found.take()
