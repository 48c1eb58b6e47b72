"""Ranks that read for one another, over gloo: the same bytes, each read once, and no rank waits."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lading
from lading import loading
from lading import ranks as ranks_module
from lading.checkpoint import Source, open_checkpoint
from lading.errors import FileError, LadingError
from lading.launch import run_ranks
from lading.layers import Layer
from lading.layouts import Axis, Cut, Layout
from lading.plan import Target, make_plan
from lading.ranks import Ranks
from lading.specs import Along, Dim, TensorSpec, dense_specs
from lading.transport import Limits, Moved, Transport, moving
from lading.transport.engine import Engine
from lading.transport.exchange import Bands, Exchange, plan_exchange
from lading.transport.rounds import Sharing

from ..loading_made import Block, Spoiling, break_disk, indices, local, on_meta, save, shapes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are for Linux")

SHARING = Sharing(run_bytes=4096, share_bytes=64)
SECONDS = 20.0
"""Far beyond what an exchange takes, far below a process group's own timeout."""

(WEIGHT,) = dense_specs(bias=False)
PACKED = TensorSpec(
    name="qweight",
    dims=(
        Dim(along=Along.INPUT, grain=Fraction(8), reason="eight a word"),
        Dim(along=Along.OUTPUT),
    ),
)
TURNED = TensorSpec(name="weight", dims=(Dim(along=Along.INPUT), Dim(along=Along.OUTPUT)))


class Case:
    """Targets for T ranks, the checkpoint's tensors, and by hand what each rank has to hold.

    exchanged   the tensors that have to be read once by the group
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.targets: list[Target] = []
        self.full: dict[str, torch.Tensor] = {}
        self.needed: dict[str, Callable[[int], torch.Tensor]] = {}
        self.exchanged: set[str] = set()

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Bytes that differ; never those of a NaN, which no comparison finds equal."""
        count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        values = (torch.arange(count) * 7 + len(self.full) * 13) % 113
        self.full[name] = values.to(torch.uint8).view(dtype).reshape(shape)
        return self.full[name]

    def add(
        self,
        name: str,
        layout: Layout,
        code: str,
        needed: Callable[[int], torch.Tensor],
        *exchanged: str,
    ) -> None:
        self.targets.append(Target(name=name, layout=layout, dtype=code))
        self.needed[name] = needed
        self.exchanged |= set(exchanged)


def piece(full: torch.Tensor, pieces: int, size: int, rank: int, dim: int = 0) -> torch.Tensor:
    """Of `pieces` equal pieces, each of which size / pieces neighbours keep."""
    return full.chunk(pieces, dim)[rank * pieces // size]


def case_of(size: int) -> Case:
    case = Case(size)
    add_cut(case)
    add_attention(case)
    add_packed(case)
    add_whole(case)
    return case


def add_cut(case: Case) -> None:
    size = case.size
    for name, rows, dtype, code in (
        ("row", 37, torch.bfloat16, "BF16"),
        ("few", 2, torch.uint8, "U8"),
        ("fp8", 31, torch.float8_e4m3fn, "F8_E4M3"),
    ):
        full = case.tensor(f"{name}.weight", (rows, 48 * size), dtype)
        layout = Layer.row(48 * size, rows).layout(WEIGHT, size)
        take = partial(lambda full, rank: full.chunk(size, 1)[rank], full)
        case.add(f"{name}.weight", layout, code, take, f"{name}.weight")
    experts = case.tensor("experts.weight", (1, 5, 3, 8 * size), torch.float32)
    cuts = [Cut(axis=Axis.of(n, max_pieces=1)) for n in (1, 5, 3)]
    layout = Layout(cuts=(*cuts, Cut(axis=Axis.of(8 * size))), tp_size=size)
    case.add(
        *("experts.weight", layout, "F32"),
        lambda rank: experts.chunk(size, 3)[rank],
        "experts.weight",
    )
    # [in, vocabulary of 20 padded to 16 a rank]: only ranks 0 and 1 keep anything of it
    columns = case.tensor("turned.weight", (130, 20), torch.int32)
    layout = Layer.embedding(20, 130, pad_to=16 * size).layout(TURNED, size)
    padded = torch.zeros(130, 16 * size, dtype=torch.int32)
    padded[:, :20] = columns
    case.add(
        *("turned.weight", layout, "I32"), lambda rank: padded.chunk(size, 1)[rank], "turned.weight"
    )


def kv_heads(size: int) -> int:
    return 2 if size == 4 else 1


def add_attention(case: Case) -> None:
    """KV heads that neighbours share, q, k, v each by themselves and side by side."""
    size, kv = case.size, kv_heads(case.size)
    layout = Layer.qkv(64, 3, 2 * size, kv).layout(WEIGHT, size)
    sizes = [6 * size, 3 * kv, 3 * kv]
    counts = [size, kv, kv]

    def fused(parts: list[torch.Tensor], rank: int) -> torch.Tensor:
        both = zip(parts, counts, strict=True)
        return torch.cat([piece(part, pieces, size, rank) for part, pieces in both])

    parts = [
        case.tensor(f"one.{p}_proj.weight", (n, 64), torch.bfloat16)
        for p, n in zip("qkv", sizes, strict=True)
    ]
    shared = ("one.k_proj.weight", "one.v_proj.weight") if kv < size else ()
    case.add("one.qkv_proj.weight", layout, "BF16", partial(fused, parts), *shared)
    whole = case.tensor("two.qkv_proj.weight", (sum(sizes), 64), torch.bfloat16)
    case.add("two.qkv_proj.weight", layout, "BF16", partial(fused, list(torch.split(whole, sizes))))
    if kv < size:
        case.exchanged.add("two.qkv_proj.weight")


def add_packed(case: Case) -> None:
    """GPTQ's [in / 8, out]: outputs are columns, side by side and each by itself."""
    size, kv = case.size, kv_heads(case.size)
    layout = Layer.qkv(8 * 41, 4, 2 * size, kv).layout(PACKED, size)
    sizes, counts = [8 * size, 4 * kv, 4 * kv], [size, kv, kv]

    def fused(parts: list[torch.Tensor], rank: int) -> torch.Tensor:
        both = zip(parts, counts, strict=True)
        return torch.cat([piece(part, pieces, size, rank, 1) for part, pieces in both], 1)

    names = [f"three.{p}_proj.qweight" for p in "qkv"]
    parts = [case.tensor(name, (41, n), torch.int32) for name, n in zip(names, sizes, strict=True)]
    strided = [name for name, pieces in zip(names, counts, strict=True) if pieces > 1]
    shared = [name for name, pieces in zip(names, counts, strict=True) if pieces < size]
    case.add(*("three.qkv_proj.qweight", layout, "I32"), partial(fused, parts), *strided, *shared)
    whole = case.tensor("four.qkv_proj.qweight", (41, sum(sizes)), torch.int32)
    parts = list(torch.split(whole, sizes, 1))
    case.add("four.qkv_proj.qweight", layout, "I32", partial(fused, parts), "four.qkv_proj.qweight")


def add_whole(case: Case) -> None:
    """Replicated tensors; one that is cast, one that is tiny; a padded vocabulary, its rows cut."""
    size = case.size
    for name, rows, columns, dtype, code in (
        ("norm", 300, 64, torch.float32, "F32"),
        ("line", 1, 999, torch.uint8, "U8"),
        ("fp4", 7, 40, torch.float4_e2m1fn_x2, "F4"),
    ):
        full = case.tensor(f"{name}.weight", (rows, columns), dtype)
        layout = Layout.replicated((rows, columns), size)
        take = partial(lambda full, rank: full, full)
        case.add(f"{name}.weight", layout, code, take, f"{name}.weight")
    cast = case.tensor("cast.weight", (50, 9), torch.bfloat16)
    layout = Layout.replicated((50, 9), size)
    case.add("cast.weight", layout, "F32", lambda rank: cast.to(torch.float32))
    tiny = case.tensor("tiny.weight", (3,), torch.float32)
    case.add("tiny.weight", Layout.replicated((3,), size), "F32", lambda rank: tiny)
    full = case.tensor("embed.weight", (101, 6), torch.float32)
    layout = Layer.embedding(101, 6, pad_to=8).layout(WEIGHT, size)
    padded = torch.zeros(layout.local_shape[0] * size, 6)
    padded[:101] = full
    case.add("embed.weight", layout, "F32", lambda rank: padded.chunk(size)[rank])


OPTIONS: dict[str, dict[str, Any]] = {
    "one bucket": {},
    "small buckets": {"limits": Limits(device_bytes=4 * 8192)},
    "no room": {"limits": Limits(device_bytes=4)},
    "past the page cache": {"direct": True, "limits": Limits(device_bytes=4 * 20_000)},
    "one thread": {"limits": Limits(num_threads=1)},
    "by default": {"exchange": None},
}


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def loads(ranks: Ranks, folder: str) -> dict[str, dict[str, Any]]:
    """Each way of loading: which targets are wrong, and what was moved."""
    patch = pytest.MonkeyPatch()  # of a process that ends soon
    patch.setattr(moving, "Engine", partial(Engine, gap_bytes=0))
    group = ranks_module.group_of(ranks, None)
    case = case_of(ranks.tp_size)
    checkpoint = open_checkpoint(folder)
    plan = make_plan(case.targets, checkpoint.tensors, ranks=[ranks])
    share = plan.share(ranks)
    found = {}
    for name, options in OPTIONS.items():
        needed = {n: take(ranks.tp_rank) for n, take in case.needed.items()}
        memory = {
            n: torch.full((t.nbytes,), 0xEE, dtype=torch.uint8).view(t.dtype).view(t.shape)
            for n, t in needed.items()
        }
        told: list[int] = []
        with checkpoint.reader() as reader:
            transport = Transport(
                reader=reader, group=group, **{"exchange": True, "sharing": SHARING, **options}
            )
            transport.compare(plan, share)
            moved = transport.run(plan, share, memory, told.append)
        found[name] = {
            "wrong": [n for n, tensor in memory.items() if not same(tensor, needed[n])],
            "read": moved.read_bytes,
            "kept": (moved.kept_bytes, sum(told), plan.share_bytes(share)),
            "received": moved.received_bytes,
            "excess": moved.excess_bytes,
            "copies": (moved.num_copies, len(share.copies)),
            "straight": sum(
                memory_bytes(plan, copy)
                for copy in share.copies
                if copy.source not in case.exchanged
            ),
        }
    return found


def memory_bytes(plan: Any, copy: Any) -> int:
    source = plan.sources[copy.source]
    return int(
        copy.source_region.num_elements
        * source.num_bytes
        // torch.Size(source.storage_shape).numel()
    )


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_rank_has_its_own(size: int, tmp_path: Path) -> None:
    case = case_of(size)
    save_file(case.full, tmp_path / "model.safetensors")
    results = run_ranks(loads, size, (str(tmp_path),))
    for name in OPTIONS:
        for result in (ranks[name] for ranks in results):
            assert result["wrong"] == [], name
            assert len(set(result["kept"])) == 1, f"{name}: what is told is what is kept"
            assert result["copies"][0] == result["copies"][1], name
    stored = load_file(tmp_path / "model.safetensors")
    once = sum(stored[name].nbytes for name in case.exchanged)
    for name in ("one bucket", "one thread"):
        rest = sum(ranks[name]["straight"] for ranks in results)
        assert sum(ranks[name]["read"] for ranks in results) == once + rest, "each byte once"
        assert all(ranks[name]["excess"] == 0 for ranks in results), name
        assert all(ranks[name]["received"] > 0 for ranks in results)
    for name in ("small buckets", "past the page cache"):
        assert all(ranks[name]["received"] > 0 for ranks in results)
    for name in ("no room", "by default"):
        assert all(ranks[name]["received"] == 0 for ranks in results)


def no_memory(*_: object, **__: object) -> None:
    raise torch.cuda.OutOfMemoryError("on a GPU that is full")


def differing(ranks: Ranks, folder: str, how: str) -> tuple[int, list[str]]:
    """Rank 1 has another bucket than the others, or no memory for it: nobody exchanges, everybody
    loads.
    """
    case = case_of(ranks.tp_size)
    checkpoint = open_checkpoint(folder)
    plan = make_plan(case.targets, checkpoint.tensors, ranks=[ranks])
    needed = {n: take(ranks.tp_rank) for n, take in case.needed.items()}
    memory = {n: torch.zeros_like(t) for n, t in needed.items()}
    with checkpoint.reader() as reader:
        transport = Transport(
            reader=reader,
            group=ranks_module.group_of(ranks, None),
            exchange=True,
            sharing=SHARING,
            limits=Limits(device_bytes=2**20),
        )
        if ranks.tp_rank == 1 and how == "limits":
            transport.limits = Limits(device_bytes=2**14)
        elif ranks.tp_rank == 1:
            pytest.MonkeyPatch().setattr(moving, "plan_exchange", no_memory)
        moved = transport.run(plan, plan.share(ranks), memory, lambda _: None)
    return moved.received_bytes, [n for n, t in memory.items() if not same(t, needed[n])]


@pytest.mark.parametrize("how", ["limits", "no memory"])
def test_ranks_that_would_exchange_otherwise(how: str, tmp_path: Path) -> None:
    save_file(case_of(3).full, tmp_path / "model.safetensors")
    assert run_ranks(differing, 3, (str(tmp_path), how)) == [(0, [])] * 3


# -------------------------------------------------------------------------------------- the verb


class Failing(Spoiling):
    """A progress object that fails when it is told of bytes."""

    def advance(self, num_bytes: int) -> None:
        raise ValueError("the terminal is gone")


def raises() -> None:
    raise ValueError("no terminal")


def spoil(how: str, folder: Path) -> Spoiling:
    victim = max(folder.glob("*.safetensors"))
    if how == "disk":
        return Spoiling(partial(break_disk, victim))
    if how == "shorter":
        return Spoiling(partial(shorten, victim))
    return Failing() if how == "advance" else Spoiling(raises)


def shorten(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 700)


def verb(ranks: Ranks, folder: str, how: str, *, live: bool) -> dict[str, Any]:
    """`lading.load` with an exchange; something happens on rank 1 when all has been checked."""
    path = Path(folder)
    patch = pytest.MonkeyPatch()  # of a process that ends soon
    patch.setattr(moving, "Engine", partial(Engine, gap_bytes=0))
    patch.setattr(loading, "Transport", partial(Transport, sharing=SHARING))
    model: nn.Module = on_meta(ranks, kv_heads=2, dtype=torch.float64)
    if live:
        model = Block(ranks, kv_heads=2, dtype=torch.float64)
    progress = spoil(how, path) if how and ranks.tp_rank == 1 else None
    began = time.perf_counter()
    found: dict[str, Any] = {"error": None}
    try:
        limits = Limits(device_bytes=4 * 2048, num_threads=1)
        report = lading.load(
            model,
            path,
            ranks=ranks,
            device="cpu",
            limits=limits,
            exchange=True,
            progress=progress,
        )
        found["report"] = (report.read_bytes, report.exchanged_bytes, report.excess_bytes)
    except LadingError as error:
        found["error"] = str(error)
    found["seconds"] = time.perf_counter() - began
    if found["error"] is None:
        stored = {}
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                stored.update({name: handle.get_tensor(name) for name in handle.keys()})  # noqa: SIM118
        needed = local(stored, ranks, 2)
        state = model.state_dict()
        found["wrong"] = [n for n, t in needed.items() if not torch.equal(state[n], t)]
        return found
    found["left"] = sorted({p.device.type for p in model.parameters()})
    try:
        if live:
            model(torch.zeros(6, dtype=torch.float64))
    except LadingError as error:
        found["forward"] = type(error).__name__
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", indices(shapes(kv_heads=2)), files=3)


@pytest.mark.parametrize("live", [False, True], ids=["meta", "live"])
def test_the_verb(live: bool, folder: Path) -> None:
    results = run_ranks(partial(verb, live=live), 4, (str(folder), ""))
    assert [result["error"] for result in results] == [None] * 4
    assert [result["wrong"] for result in results] == [[]] * 4
    assert all(result["report"][1] > 0 for result in results)
    assert all(result["report"][2] == 0 for result in results), "nothing was read in vain"


@pytest.mark.parametrize("live", [False, True], ids=["meta", "live"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("disk", "Input/output error"),
        ("shorter", "the file ended after"),
        ("start", "no terminal"),
        ("advance", "the terminal is gone"),
    ],
)
def test_a_rank_that_fails(how: str, words: str, live: bool, folder: Path) -> None:
    results = run_ranks(partial(verb, live=live), 4, (str(folder), how))
    texts = {result["error"] for result in results}
    assert len(texts) == 1, texts
    assert words in str(texts.pop())
    assert all(result["seconds"] < SECONDS for result in results)
    assert all(result["left"] == (["cpu"] if live else ["meta"]) for result in results)
    assert all(("forward" in result) is live for result in results)


# --------------------------------------------------------------------------------- one rank alone


def alone(patch: pytest.MonkeyPatch, swap: Callable[..., None]) -> tuple[Exchange, Any]:
    """Rank 0 of 2 with a replicated tensor in three rounds of 24 rows; the other rank is `swap`."""
    patch.setattr(ranks_module, "carries", lambda *_: True)
    patch.setattr(ranks_module, "swap", swap)
    source = Source(
        name="w.weight", dtype="U8", shape=(72, 10), file="f", offset_bytes=0, num_bytes=720
    )
    target = Target(name="w.weight", layout=Layout.replicated((72, 10), 2), dtype="U8")
    plan = make_plan([target], {source.name: source}, ranks=[Ranks(tp_size=2)])
    memory = {"w.weight": torch.zeros(72, 10, dtype=torch.uint8)}
    group: Any = None
    found = plan_exchange(
        plan, plan.shares[0], memory, group, sharing=SHARING, device_bytes=4 * 128
    )
    assert found is not None, "it is worth it"
    return found, memory["w.weight"]


class NoFile:
    """Stands for the open files: nothing is read."""

    is_cold = (False,)

    def number(self, _: str) -> int:
        return 0


def test_a_round_is_exchanged_while_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Never before it has been read, and never while its own memory is read into again."""
    calls: list[str] = []
    addresses: list[int] = []
    sent: list[int] = []

    def swap(sends: list[Any], receives: list[Any], _: object) -> None:
        calls.append("swap")
        sent.extend(tensor.data_ptr() for _, tensor in sends)

    def read(bands: Bands, meanwhile: Callable[[], None]) -> None:
        jobs, _ = bands.jobs.jobs()
        addresses.append(int(jobs[0, 2]))
        calls.append("begin")
        meanwhile()
        calls.append("end")

    exchange, _ = alone(monkeypatch, swap)
    opened: Any = NoFile()
    moved = Moved()
    exchange.run(read, opened, moved, lambda _: None)
    first, later = ["begin", "end"], ["begin", "swap", "end"]
    rounds = len(addresses)
    assert rounds > 2
    assert calls == first + later * (rounds - 1), "the last is left for `finish`"
    exchange.finish(moved, lambda _: None)
    exchange.finish(moved, lambda _: None)
    assert calls == first + later * (rounds - 1) + ["swap"]
    assert sent == addresses, "what was read in a round is what is sent in it"
    assert addresses[0::2] == [addresses[0]] * len(addresses[0::2]) != addresses[1::2]
    assert (moved.kept_bytes, moved.received_bytes, moved.given_bytes) == (720, 360, 0)


def test_a_rank_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a message cannot be sent, no other is tried."""
    calls: list[int] = []

    def swap(*_: object) -> None:
        calls.append(1)
        raise RuntimeError("connection closed by peer")

    exchange, memory = alone(monkeypatch, swap)
    opened: Any = NoFile()
    with pytest.raises(RuntimeError, match="connection closed"):
        exchange.run(lambda _, meanwhile: meanwhile(), opened, Moved(), lambda _: None)
    exchange.abandon(ValueError("again"))
    assert calls == [1]
    assert not memory.any()


def test_a_rank_that_cannot_read_takes_part_in_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    exchange, memory = alone(monkeypatch, lambda *_: calls.append(1))
    opened: Any = NoFile()
    reads: list[int] = []

    def read(*_: object) -> None:
        reads.append(1)
        raise FileError("cannot be read")

    moved = Moved()
    with pytest.raises(FileError):
        exchange.run(read, opened, moved, lambda _: None)
    assert len(reads) == 1
    assert len(calls) > 2
    assert (moved.kept_bytes, moved.received_bytes) == (0, 0)
    assert not memory.any(), "what it sent was not written here"
