"""`bench_rank`: what is counted, what peers may do, what the report makes of the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lading import report
from lading.benching import bench, ceilings, peers
from lading.benching.bench import Options, PeerRuns, RankBench, Run, bench_rank
from lading.benching.ceilings import Ceilings
from lading.benching.peers import PEERS, Job, Peer
from lading.demo import write_checkpoint
from lading.errors import CallError
from lading.launch import run_ranks
from lading.ranks import Ranks
from lading.verify import ElementCheck


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("llama")
    write_checkpoint(str(path))
    return str(path)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(ceilings, "BUFFER_BYTES", 2**24)
    monkeypatch.setattr(ceilings, "MAX_BYTES", 2**20)


def stored(folder: str) -> dict[str, torch.Tensor]:
    return {
        k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()
    }


def alone(folder: str, **options: Any) -> RankBench:
    return bench_rank(Ranks(), folder, None, "cpu", Options(**options))


def with_peer(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    peer = Peer(**{"name": "other", "package": "safetensors", **fields})
    monkeypatch.setattr(bench, "PEERS", {**PEERS, "other": peer})


def test_counts_what_the_files_hold(folder: str) -> None:
    found = alone(folder, runs=2, against=("safetensors",))
    size = sum(tensor.nbytes for tensor in stored(folder).values())
    assert found.checkpoint_bytes == found.shard_bytes == size
    assert [run.read_bytes for run in found.runs] == [size] * 2
    assert all(run.seconds > run.plan_seconds + run.move_seconds > 0 for run in found.runs)
    assert all(run.resident is None for run in found.runs)
    assert (found.elements.num_mismatches, found.device, found.peak_device_bytes) == (0, "cpu", 0)
    (peer,) = found.peers
    assert (peer.name, peer.problem, len(peer.seconds)) == ("safetensors", None, 2)


def test_ranks_share_the_bytes(folder: str) -> None:
    options = Options(runs=1, against=("safetensors", "transformers"))
    found = run_ranks(bench_rank, 2, (folder, None, "cpu", options))
    tensors = stored(folder)
    twice = sum(t.nbytes for k, t in tensors.items() if t.dim() == 1)  # norms, on both ranks
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert sum(one.shard_bytes for one in found) == size + twice
    assert [one.elements.num_mismatches for one in found] == [0, 0]
    assert [peer.problem for peer in found[1].peers] == [None, "is run at TP 1 only"]
    facts = report.bench_json(found, cold=False)
    assert (facts["tp_size"], facts["verified"]["mismatches"]) == (2, 0)


def test_cold_runs_are_told_from_warm_ones(folder: str) -> None:
    found = alone(folder, runs=1, against=(), cold=True)
    (run,) = found.runs
    assert run.resident is None or 0 <= run.resident <= 1
    assert "not cold" in text(replace(found, runs=(replace(run, resident=0.5),)), cold=True)
    assert "not cold" not in text(replace(found, runs=(replace(run, resident=0.0),)), cold=True)
    assert "does not say" in text(replace(found, runs=(replace(run, resident=None),)), cold=True)


def test_a_gpu_is_started_before_its_memory_is_counted(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank runs in this process, where nobody has asked for a GPU before."""
    begun: list[torch.device] = []

    def count(device: torch.device) -> None:
        if device not in begun:
            raise RuntimeError("Invalid device argument 1: did you call init?")
        raise KeyboardInterrupt  # far enough without a GPU

    monkeypatch.setattr(bench, "device_of", lambda ranks, device: "cuda:1")
    monkeypatch.setattr(torch.cuda, "set_device", begun.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", count)
    with pytest.raises(KeyboardInterrupt):
        alone(folder, runs=1, against=())


def test_a_peer_that_fails_is_a_line(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_job: Job) -> None:
        raise ValueError("no such\nluck")

    with_peer(monkeypatch, fill=fail)
    found = alone(folder, runs=1, against=("other", "safetensors"))
    assert [peer.problem for peer in found.peers] == ["failed: ValueError: no such", None]
    assert "- other: failed: ValueError: no such\n" in text(found)


def test_a_peer_with_other_values_is_a_line(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(job: Job) -> Mapping[str, torch.Tensor]:
        memory = PEERS["safetensors"].fill(job) or {}
        memory["model.norm.weight"] += 1
        return memory

    with_peer(monkeypatch, fill=shifted)
    (peer,) = alone(folder, runs=1, against=("other",)).peers
    assert peer.problem == "gives other values than lading for model.norm.weight"
    assert peer.seconds == ()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"package": "no-such-package"}, "is not installed"),
        ({"refuses": lambda _job: "needs the moon"}, "needs the moon"),
    ],
    ids=["missing", "refuses"],
)
def test_a_peer_that_cannot_run(
    folder: str, monkeypatch: pytest.MonkeyPatch, fields: Any, problem: str
) -> None:
    with_peer(monkeypatch, fill=lambda job: job.memory(), **fields)
    (peer,) = alone(folder, runs=1, against=("other",)).peers
    assert peer.problem == problem


def test_options_that_cannot_be_meant() -> None:
    known = "safetensors, prefetch, instanttensor, fastsafetensors, transformers"
    with pytest.raises(CallError) as unknown:
        Options(against=("vllm",))
    assert str(unknown.value) == f"against: is 'vllm', needs one of: {known}."
    with pytest.raises(CallError) as none:
        Options(runs=0)
    assert str(none.value) == "runs: is 0, needs at least 1."


# ------------------------------------------------------------------------------------------ report


def run_of(seconds: float, **changes: Any) -> Run:
    return replace(
        Run(
            seconds=seconds,
            plan_seconds=0.5,
            move_seconds=seconds - 1,
            read_bytes=600,
            moved_bytes=510,
            calls=3,
            read_seconds=3.0,
            wait_seconds=1.0,
            resident=None,
        ),
        **changes,
    )


def made(tp_rank: int, device: str, seconds: tuple[float, ...], **changes: Any) -> RankBench:
    elements = ElementCheck(
        tp_rank=tp_rank, num_elements=7, num_mismatches=0, first=None, reader="safetensors 0"
    )
    peer = PeerRuns(name="other", version="1.2", seconds=tuple(4 * s for s in seconds))
    value = RankBench(
        tp_rank=tp_rank,
        device=device,
        checkpoint_bytes=1000,
        parameter_bytes=520,
        shard_bytes=500,
        num_threads=2,
        runs=tuple(map(run_of, seconds)),
        peak_host_bytes=11 + tp_rank,
        peak_device_bytes=0,
        pinned_bytes=0,
        ceilings=Ceilings(memcpy=800.0, page_cache=250.0, host_to_device=400.0),
        elements=elements,
        peers=(peer,),
    )
    return replace(value, **changes)


def text(*ranks: RankBench, cold: bool = False) -> str:
    return report.render(report.bench_report(ranks, cold=cold), report.Look())


def test_numbers_of_two_ranks() -> None:
    ranks = [made(0, "cpu", (2.0, 2.0, 9.0)), made(1, "cpu", (4.0, 5.0, 6.0))]
    facts = report.bench_json(ranks, cold=False)
    assert facts["seconds"] == 5.0  # of each turn's slower rank: 4, 5, 9
    assert facts["bytes_per_second"] == 1000 / 5
    assert facts["ceilings"]["page_cache"] == 500.0
    assert (facts["limit"], facts["fraction_of_limit"]) == ("page_cache", 1000 / 5 / 500)
    assert facts["read_per_checkpoint_byte"] == 1.2
    assert facts["bus_per_shard_byte"] is None
    assert facts["stages"]["read_and_copy"] == 4.0
    assert facts["peak_host_bytes"] == 12
    (peer,) = facts["peers"]
    assert peer["seconds"] == 20.0  # of each turn's slowest rank: 16, 20, 36
    assert peer["lading_is_faster_by"] == 4.0


def test_numbers_of_a_gpu() -> None:
    ranks = [made(0, "cuda:0", (3.0,), pinned_bytes=64)]
    facts = report.bench_json(ranks, cold=False)
    assert (facts["device"], facts["limit"]) == ("cuda", "host_to_device")
    assert facts["bus_per_shard_byte"] == 510 / 500
    assert (facts["stages"]["read"], facts["stages"]["copy_and_exchange"]) == (1.5, 0.5)
    assert "over the bus: 1.020 of the ranks' shards" in text(*ranks)
    assert "64 B page-locked" in text(*ranks)


def test_the_disk_limits_cold_runs() -> None:
    rates = Ceilings(memcpy=800.0, page_cache=250.0, disk=100.0)
    facts = report.bench_json([made(0, "cpu", (10.0,), ceilings=rates)], cold=True)
    assert (facts["limit"], facts["fraction_of_limit"]) == ("disk", 0.5)


def test_elements_that_differ_are_told() -> None:
    bad = ElementCheck(tp_rank=0, num_elements=7, num_mismatches=2, first=None, reader="x")
    assert "✗ 2 of 7 elements differ" in text(made(0, "cpu", (1.0,), elements=bad))


def test_report_has_every_loader() -> None:
    shown = text(made(0, "cpu", (2.0,)))
    assert "other 1.2" in shown
    assert "4.00 x" in shown


def test_peers_of_the_command_are_known() -> None:
    from lading.cli.bench import PeerName

    assert [name.value for name in PeerName] == [*peers.PEERS, "none"]
