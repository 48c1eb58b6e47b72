"""Ranks as values, the rank of a thread, and the collectives: alone, and over two processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from lading import launch
from lading import ranks as ranks_module
from lading.errors import CallError
from lading.ranks import Ranks, all_ranks, as_current, current, explicit_current, set_current


@dataclass(frozen=True)
class Fails:
    id: str
    make: Callable[[], object]
    text: str


FAILS = [
    Fails(
        "rank too many",
        lambda: Ranks(tp_rank=3, tp_size=3),
        "Ranks: tp_rank is 3, needs 0 to 2 (tp_size is 3).",
    ),
    Fails(
        "negative expert rank",
        lambda: Ranks(ep_rank=-1, ep_size=2),
        "Ranks: ep_rank is -1, needs 0 to 1 (ep_size is 2).",
    ),
    Fails("no ranks", lambda: Ranks(tp_size=0), "Ranks: tp_size is 0, needs at least 1."),
    Fails("a flag", lambda: Ranks(tp_rank=False), "Ranks: tp_rank is False, needs an int."),
    Fails(
        "a string",
        lambda: Ranks(ep_size="2"),  # type: ignore[arg-type]
        "Ranks: ep_size is '2', needs an int.",
    ),
    Fails(
        "all of none", lambda: all_ranks(0), "all_ranks: tp_size is 0, needs an int of at least 1."
    ),
    Fails(
        "current of another kind",
        lambda: set_current(3),  # type: ignore[arg-type]
        "set_current: is 3, needs a Ranks or None.",
    ),
    Fails(
        "two ranks in one process",
        lambda: ranks_module.all_reduce(torch.ones(2, 3), Ranks(tp_size=2), None),
        "forward: rank 0 of 2 has to combine a tensor of shape [2, 3] with the other ranks, but "
        "this process is in no process group of that size. "
        "Try: start the ranks with torchrun, or pass group= to the layer.",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused(case: Fails) -> None:
    with pytest.raises(CallError) as caught:
        case.make()
    assert str(caught.value) == case.text


def test_values() -> None:
    assert Ranks() == Ranks(tp_rank=0, tp_size=1, ep_rank=0, ep_size=1)
    assert [r.tp_rank for r in all_ranks(5)] == [0, 1, 2, 3, 4]
    assert {r.tp_size for r in all_ranks(5)} == {5}
    assert str(Ranks(tp_rank=2, tp_size=5)) == "rank 2 of 5"
    text = "rank 0 of 1, expert rank 1 of 3"
    assert str(Ranks(ep_rank=1, ep_size=3)) == text


def test_the_rank_of_a_thread() -> None:
    one, two = all_ranks(2)
    seen: list[Ranks | None] = []
    with as_current(one):
        thread = threading.Thread(target=lambda: seen.append(explicit_current()))
        thread.start()
        thread.join()
        with as_current(two):
            assert current() == two
        assert current() == one
        with as_current(None):
            assert current() == Ranks()
    assert explicit_current() is None
    assert seen == [None]


def test_the_rank_comes_back_after_an_exception() -> None:
    with pytest.raises(KeyError), as_current(Ranks(tp_rank=1, tp_size=2)):
        raise KeyError
    assert explicit_current() is None


def test_alone() -> None:
    assert current() == ranks_module.world() == Ranks()
    assert ranks_module.group_of(Ranks(), None) is None
    assert ranks_module.group_of(Ranks(tp_rank=1, tp_size=3), None) is None, "a dry run"
    assert ranks_module.exchange("mine", None) == ["mine"]
    tensor = torch.ones(2)
    assert ranks_module.all_reduce(tensor, Ranks(), None) is tensor
    assert ranks_module.all_gather(tensor, Ranks(), None) is tensor
    ranks_module.leave_world()


def test_join_world_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert ranks_module.join_world(device_type="cpu") is False


@pytest.mark.parametrize(("local", "gpu"), [("1", 1), ("6", 2), (None, 3)])
def test_join_world_takes_this_process_own_gpu(
    monkeypatch: pytest.MonkeyPatch, local: str | None, gpu: int
) -> None:
    """Before the group is made: each rank's first collective would go to GPU 0 otherwise."""
    done: list[object] = []
    launcher = {"RANK": "7", "WORLD_SIZE": "8", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", done.append)
    assert ranks_module.join_world(device_type="cuda") is True
    assert done == [gpu, "nccl"]
    assert ranks_module.join_world(device_type="cpu") is True
    assert done == [gpu, "nccl", "gloo"]


def test_join_world_for_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(CallError) as caught:
        ranks_module.join_world(device_type="cuda")
    assert str(caught.value) == "device: is 'cuda', but this process sees no GPU."


@pytest.mark.parametrize("bound", [None, torch.device("cuda", 2)])
def test_verdicts_go_by_the_gpu_of_the_group(
    monkeypatch: pytest.MonkeyPatch, bound: torch.device | None
) -> None:
    """Not by the current one, where the group was bound to another."""
    current: list[object] = ["the current one"]

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def gather(value: object, size: int, _group: object) -> list[object]:
        return [value, size, current[-1]]

    group: Any = SimpleNamespace(bound_device_id=bound)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _group: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda _group: "nccl")
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(ranks_module, "_exchange_on_gpu", gather)
    found = ranks_module.exchange("well", group)
    assert found == ["well", 2, bound or "the current one"]
    assert current == ["the current one"]


def in_a_group(rank: int, folder: str) -> None:
    """What one of two processes sees; writes it down for the test."""
    ranks = Ranks(tp_rank=rank, tp_size=2)
    ranks_module.join_file(f"{folder}/meet", ranks=ranks, device_type="cpu")
    seen: dict[str, Any] = {
        "world": current(),
        "own group": ranks_module.group_of(ranks, None) is not None,
        "a dry run of 3 is alone": ranks_module.group_of(Ranks(tp_size=3), None) is None,
        "joins once": ranks_module.join_world(device_type="cpu"),
    }
    group = ranks_module.group_of(ranks, None)
    assert group is not None
    seen["exchange"] = ranks_module.exchange({"rank": rank}, group)
    for name, sizes in (("long", (4000, 9000)), ("longest", (4090, 4080)), ("empty", (0, 0))):
        found = ranks_module.exchange(b"\x80" * sizes[rank], group)
        seen[name] = [one == b"\x80" * n for one, n in zip(found, sizes, strict=True)]
    tensor = torch.tensor([[1.0, 2.0, 3.0]]) * (rank + 1)
    seen["gather"] = ranks_module.all_gather(tensor, ranks, None).tolist()
    seen["reduce"] = ranks_module.all_reduce(tensor, ranks, group).tolist()
    try:
        ranks_module.group_of(Ranks(tp_rank=1 - rank, tp_size=2), group)
    except CallError as error:
        seen["other"] = str(error)
    ranks_module.leave_world()
    seen["left"] = ranks_module.world()
    torch.save(seen, f"{folder}/{rank}")


def test_two_processes(tmp_path: Path) -> None:
    spawn(in_a_group, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for rank in range(2):
        other = 1 - rank
        assert torch.load(tmp_path / str(rank), weights_only=False) == {
            "world": Ranks(tp_rank=rank, tp_size=2),
            "own group": True,
            "a dry run of 3 is alone": True,
            "joins once": False,
            "exchange": [{"rank": 0}, {"rank": 1}],
            "long": [True, True],
            "longest": [True, True],
            "empty": [True, True],
            "gather": [[1.0, 2.0, 3.0, 2.0, 4.0, 6.0]],
            "reduce": [[3.0, 6.0, 9.0]],
            "other": f"group: the process group says rank {rank} of 2, needs rank {other} of 2.",
            "left": Ranks(),
        }


# ------------------------------------------------------------------------- messages between ranks


def sends_around(place: Ranks) -> tuple[object, bool, bool, list[int], list[int]]:
    """Each rank sends its number to the next, and to the one after it another."""
    group, found = ranks_module.meeting(None)
    assert group is not None
    right, left = (place.tp_rank + 1) % 3, (place.tp_rank - 1) % 3
    sends = {
        right: torch.full((5,), place.tp_rank, dtype=torch.uint8),
        left: torch.full((2,), 100 + place.tp_rank, dtype=torch.uint8),
    }
    receives = {
        right: torch.zeros(2, dtype=torch.uint8),
        left: torch.zeros(5, dtype=torch.uint8),
    }
    ranks_module.send_and_receive(sends, receives, group)
    ranks_module.send_and_receive({}, {}, group)
    carries = [ranks_module.carries(group, kind) for kind in ("cpu", "cuda")]
    return found, carries[0], carries[1], receives[left].tolist(), receives[right].tolist()


def test_send_and_receive() -> None:
    found = launch.run_ranks(sends_around, 3)
    for rank, (place, on_cpu, on_gpu, left, right) in enumerate(found):
        assert place == Ranks(tp_rank=rank, tp_size=3)
        assert (on_cpu, on_gpu) == (True, False), "gloo is for the CPU"
        assert left == [(rank - 1) % 3] * 5
        assert right == [100 + (rank + 1) % 3] * 2


def test_a_process_that_meets_nobody() -> None:
    assert ranks_module.meeting(None) == (None, Ranks())
