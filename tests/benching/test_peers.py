"""Each peer fills what it is told to, compared with torch's own chunks of the stored tensors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from lading.benching import peers
from lading.benching.peers import PEERS, Job, Peer
from lading.checkpoint import open_checkpoint
from lading.layers import Layer
from lading.layouts import Layout
from lading.plan import Target, make_plan
from lading.ranks import Ranks

TP = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers")
    shapes = {"a.gate_proj": (6, 5), "a.up_proj": (9, 5), "a.down_proj": (4, 9), "norm": (7,)}
    count = 0
    tensors = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        tensors[f"{name}.weight"] = torch.arange(count, count + size).float().view(shape)
        count += size
    save_file(tensors, path / "model.safetensors")
    return path


def job(folder: Path, rank: int) -> Job:
    ranks = Ranks(tp_rank=rank, tp_size=TP)
    layers = {
        "a.gate_up_proj": Layer.column(5, [6, 9]),
        "a.down_proj": Layer.row(9, 4),
    }
    targets = [
        Target(name=f"{n}.weight", layout=layer.layout(layer.specs()[0], TP), dtype="F32")
        for n, layer in layers.items()
    ]
    targets.append(Target(name="norm.weight", layout=Layout.replicated((7,), TP), dtype="F32"))
    checkpoint = open_checkpoint(folder)
    plan = make_plan(targets, checkpoint.tensors, ranks=[ranks])
    return Job(
        checkpoint=checkpoint,
        plan=plan,
        share=plan.share(ranks),
        device=torch.device("cpu"),
        group=None,
    )


def expected(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    stored = load_file(folder / "model.safetensors")

    def piece(name: str, dim: int) -> torch.Tensor:
        return stored[f"a.{name}.weight"].chunk(TP, dim)[rank]

    return {
        "a.gate_up_proj.weight": torch.cat([piece("gate_proj", 0), piece("up_proj", 0)]),
        "a.down_proj.weight": piece("down_proj", 1),
        "norm.weight": stored["norm.weight"],
    }


def same(found: dict[str, torch.Tensor] | None, wanted: dict[str, torch.Tensor]) -> bool:
    assert found is not None
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("rank", range(TP))
def test_safetensors(folder: Path, rank: int) -> None:
    assert same(PEERS["safetensors"].fill(job(folder, rank)), expected(folder, rank))


class Prefetching:
    """safe_open of safetensors 0.9 as far as it is used: prefetch({name: rows}), take, close."""

    def __init__(self, path: str, framework: str, device: str = "cpu") -> None:
        self.tensors = load_file(path, device=device)
        self.asked: dict[str, slice | None] = {}

    def __enter__(self) -> Prefetching:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def prefetch(self, rows: dict[str, slice | None], device: str) -> Prefetching:
        asked.append(rows)
        self.asked = dict(rows)
        return self

    def take(self, name: str) -> torch.Tensor:
        rows = self.asked.pop(name)
        return self.tensors[name] if rows is None else self.tensors[name][rows]

    def close(self) -> None:
        assert not self.asked, "each is taken once"


asked: list[dict[str, slice | None]] = []


@pytest.mark.parametrize("rank", range(TP))
def test_prefetch(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "safe_open", Prefetching)
    asked.clear()
    assert same(PEERS["prefetch"].fill(job(folder, rank)), expected(folder, rank))
    (rows,) = asked
    assert rows == {
        "a.gate_proj.weight": slice(2 * rank, 2 * rank + 2),
        "a.up_proj.weight": slice(3 * rank, 3 * rank + 3),
        "a.down_proj.weight": None,  # columns
        "norm.weight": None,  # all of it
    }


def test_streamed_tensors(folder: Path) -> None:
    """Loaders that hand out every tensor of the files, wanted or not."""
    stored = load_file(folder / "model.safetensors")
    everything = iter([*stored.items(), ("nobody.wants.it", torch.zeros(3))])
    assert same(peers._streamed(everything, job(folder, 1)), expected(folder, 1))


@pytest.mark.parametrize(("is_cold", "backend"), [(False, "mapped"), (True, None)])
def test_instanttensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_cold: bool, backend: str | None
) -> None:
    """As 0.2.2 is called; warm files it reads by the backend that uses the page cache."""
    seen: list[dict[str, Any]] = []

    class Opened:
        def __init__(self, files: list[str], **options: Any) -> None:
            self.files = files
            seen.append(options)

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            for file in self.files:
                yield from load_file(file).items()

    package = SimpleNamespace(safe_open=Opened, Backend=SimpleNamespace(MMAP="mapped"))
    monkeypatch.setitem(sys.modules, "instanttensor", package)
    found = PEERS["instanttensor"].fill(replace(job(folder, 2), is_cold=is_cold))
    assert same(found, expected(folder, 2))
    (options,) = seen
    assert options == {
        "framework": "pt",
        "device": 0,
        "process_group": None,
        "copy": False,
        "backend": backend,
    }


def test_versions() -> None:
    def peer(package: str) -> Peer:
        return Peer(name="x", package=package, fill=lambda job: job.memory())

    assert peer("safetensors").version() == safetensors.__version__
    assert peer("no-such-package").version() is None


@pytest.mark.parametrize(
    ("version", "problem"),
    [("0.8.0", "needs safetensors 0.9 or newer"), ("0.9.0rc1", None), ("1.0.0", None)],
)
def test_prefetch_needs_a_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, problem: Any
) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: version)
    assert PEERS["prefetch"].problem(job(folder, 0)) == problem


def test_what_cannot_be_asked_of_a_peer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: "9.9.9")
    found = job(folder, 0)
    assert PEERS["instanttensor"].problem(found) == "loads to CUDA devices only"
    assert PEERS["transformers"].problem(found) == "is run at TP 1 only"
    assert PEERS["fastsafetensors"].problem(found) is None
