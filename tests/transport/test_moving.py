"""Every way from a file into a parameter gives the same bytes, counts them, and fails cleanly."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lading.checkpoint import Checkpoint, open_checkpoint
from lading.errors import CallError, FileError
from lading.layers import Layer
from lading.layouts import Layout
from lading.plan import Plan, Target, make_plan
from lading.ranks import Ranks, all_ranks
from lading.specs import Along, Dim, TensorSpec, dense_specs
from lading.transport import HostTransport, Limits, Moved, Transport, landing, moving, sorting
from lading.transport.engine import BLOCK_BYTES, Engine, native_engine
from lading.transport.residency import resident_bytes

from .made import O_DIRECT, FakeGpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are for Linux")

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}
Tensors = dict[str, torch.Tensor]
CHUNK = 4 * BLOCK_BYTES


class Case:
    """Targets, the checkpoint's tensors, and by hand what each rank has to hold."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.targets: list[Target] = []
        self.full: Tensors = {}
        self.needed: dict[str, Callable[[int], torch.Tensor]] = {}
        self._next = 1

    def tensor(self, name: str, shape: tuple[int, ...], code: str) -> torch.Tensor:
        number = self._next
        self._next += 1
        count = torch.Size(shape).numel()
        values = (torch.arange(count) * 7 + number * 13) % 251
        self.full[name] = values.reshape(shape).to(TORCH[code])
        return self.full[name]

    def add(
        self, name: str, layout: Layout, code: str, needed: Callable[[int], torch.Tensor]
    ) -> None:
        self.targets.append(Target(name=name, layout=layout, dtype=code))
        self.needed[name] = lambda rank: needed(rank).to(TORCH[code])


def rows(full: torch.Tensor, pieces: int, size: int) -> Callable[[int], torch.Tensor]:
    return lambda rank: full.chunk(pieces)[rank * pieces // size]


PACKED = TensorSpec(
    name="weight",
    dims=(
        Dim(along=Along.INPUT, grain=Fraction(8), reason="eight a word"),
        Dim(along=Along.OUTPUT),
    ),
)


def add_layer(draw: Callable[..., Any], case: Case, index: int) -> None:
    size, name = case.size, f"l{index}"
    kinds = ["column", "row", "whole", "vocabulary", "qkv", "merged", "packed", "packed row"]
    kind = draw(st.sampled_from(kinds))
    stored, kept = draw(
        st.sampled_from(
            [("F32", "F32"), ("BF16", "BF16"), ("U8", "U8"), ("F32", "BF16"), ("F32", "F64")]
        )
    )
    n, other = size * draw(st.integers(1, 60)), draw(st.sampled_from([1, 3, 17, 64, 230]))
    (spec,) = dense_specs(bias=False)
    if kind == "column":
        full = case.tensor(f"{name}.weight", (n, other), stored)
        layout = Layer.column(other, [n]).layout(spec, size)
        case.add(f"{name}.weight", layout, kept, rows(full, size, size))
    elif kind == "row":
        full = case.tensor(f"{name}.weight", (other, n), stored)
        layout = Layer.row(n, other).layout(spec, size)
        case.add(f"{name}.weight", layout, kept, lambda rank: full.chunk(size, 1)[rank])
    elif kind == "whole":
        full = case.tensor(f"{name}.weight", (other, n), stored)
        layout = Layer.replicated(n, other).layout(spec, size)
        case.add(f"{name}.weight", layout, kept, lambda rank: full)
    elif kind == "vocabulary":
        n = draw(st.integers(1, 60))
        full = case.tensor(f"{name}.weight", (n, other), stored)
        layout = Layer.embedding(n, other, pad_to=4).layout(spec, size)
        local = layout.local_shape[0]
        padded = torch.zeros(local * size, other, dtype=full.dtype)
        padded[:n] = full
        case.add(f"{name}.weight", layout, kept, rows(padded, size, size))
    elif kind == "merged":
        parts = [case.tensor(f"{name}.{p}_proj.weight", (n, other), stored) for p in ("gate", "up")]
        layout = Layer.column(other, [n, n]).layout(spec, size)
        case.add(
            f"{name}.gate_up_proj.weight",
            layout,
            kept,
            lambda rank: torch.cat([p.chunk(size)[rank] for p in parts]),
        )
    elif kind == "qkv":  # KV heads that neighbours share
        heads, kv, head = size * 2, draw(st.sampled_from([1, size])), draw(st.integers(1, 5))
        q, k, v = (
            case.tensor(f"{name}.{p}_proj.weight", (c * head, other), stored)
            for p, c in (("q", heads), ("k", kv), ("v", kv))
        )
        layout = Layer.qkv(other, head, heads, kv).layout(spec, size)
        parts = [rows(q, size, size), rows(k, kv, size), rows(v, kv, size)]
        case.add(
            f"{name}.qkv_proj.weight",
            layout,
            kept,
            lambda rank: torch.cat([part(rank) for part in parts]),
        )
    elif kind == "packed":  # [in / 8, out], outputs cut: a run a row
        full = case.tensor(f"{name}.weight", (other, n), "I32")
        layout = Layer.column(other * 8, [n]).layout(PACKED, size)
        case.add(f"{name}.weight", layout, "I32", lambda rank: full.chunk(size, 1)[rank])
    else:  # [in / 8, out], inputs cut
        full = case.tensor(f"{name}.weight", (n, other), "I32")
        layout = Layer.row(n * 8, other).layout(PACKED, size)
        case.add(f"{name}.weight", layout, "I32", rows(full, size, size))


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    case = Case(draw(st.sampled_from([1, 2, 3, 4, 5])))
    for index in range(draw(st.integers(1, 5))):
        add_layer(draw, case, index)
    return case


class OnGpu(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)


class _OneGpu(FakeGpu):
    pinned_bytes = 1

    def follow(self) -> None:
        assert all(not left for left in self.pending.values()), "all has been waited for"


class Gpus:
    def __init__(self) -> None:
        self.gpu = _OneGpu(2, 2, CHUNK)

    def ready(self, _device: torch.device) -> FakeGpu:
        return self.gpu


class _Stream:
    def synchronize(self) -> None: ...


@contextmanager
def small_units(native: bool, *, on_gpu: bool = False) -> Iterator[None]:
    """Units of 16 KiB, by one engine; GPU memory is this host's."""
    empty = torch.empty

    def on_host(*args: Any, device: object = None, **options: Any) -> torch.Tensor:
        return empty(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        options = {"native": native}
        for module in (moving, landing):
            patch.setattr(
                module, "Engine", lambda **o: Engine(**{"chunk_bytes": CHUNK, **o, **options})
            )
        patch.setattr(moving, "COLD_CHUNK_BYTES", CHUNK)
        patch.setattr(sorting, "BATCH_COPIES", 3)
        if on_gpu:
            patch.setattr(torch, "empty", on_host)
            patch.setattr(torch.cuda, "current_stream", lambda _: _Stream())
        yield


NATIVE = native_engine() is not None
PATHS: dict[str, tuple[bool, dict[str, Any]]] = {
    "native": (True, {}),
    "python": (False, {}),
    "native, direct": (True, {"direct": True}),
    "python, direct": (False, {"direct": True}),
    "native, shared": (True, {"direct": True, "num_local": 2}),
    "native, GPU": (True, {"gpus": Gpus}),
    "python, GPU": (False, {"gpus": Gpus}),
    "native, GPU, direct": (True, {"gpus": Gpus, "direct": True}),
}


def moved(
    path: str, checkpoint: Checkpoint, plan: Plan, ranks: Ranks, memory: Tensors
) -> tuple[Moved, list[int]]:
    told: list[int] = []
    share = plan.share(ranks)
    with checkpoint.reader() as reader:
        if path == "by value":
            by_value = HostTransport(reader=reader, staging_bytes=300)
            return by_value.run(plan, share, memory, told.append), told
        native, options = PATHS[path]
        on_gpu = "gpus" in options
        options = {**options, "gpus": Gpus()} if on_gpu else options
        limits = Limits(staging_bytes=300, device_bytes=3000, num_threads=2)
        transport = Transport(reader=reader, limits=limits, **options)
        transport.compare(plan, share)
        with small_units(native, on_gpu=on_gpu):
            if on_gpu:
                memory = {name: t.as_subclass(OnGpu) for name, t in memory.items()}
            found = transport.run(plan, share, memory, told.append)
        return found, told


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_all_paths_give_the_same_bytes(data: st.DataObject, tmp_path: Path) -> None:
    case = data.draw(cases())
    ranks = Ranks(tp_rank=data.draw(st.integers(0, case.size - 1)), tp_size=case.size)
    save_file(case.full, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    plan = make_plan(case.targets, checkpoint.tensors, ranks=all_ranks(case.size))
    kept = {
        sum(
            c.source_region.num_elements * case.full[c.source].element_size()
            for c in plan.share(ranks).copies
        )
    }
    for path in ["by value", *(p for p, (native, _) in PATHS.items() if NATIVE or not native)]:
        memory = {
            t.name: torch.full(t.layout.local_shape, 77).to(TORCH[t.dtype]) for t in case.targets
        }
        found, told = moved(path, checkpoint, plan, ranks, memory)
        for target in case.targets:
            needed = case.needed[target.name](ranks.tp_rank)
            assert torch.equal(memory[target.name], needed), (path, target.name)
        assert {found.kept_bytes, sum(told)} == kept, path
        assert found.num_copies == len(plan.share(ranks).copies)
        assert found.excess_bytes == found.read_bytes - found.kept_bytes
        assert found.excess_bytes >= 0, path


def one(folder: Path, layer: Layer, full: torch.Tensor, size: int) -> tuple[Checkpoint, Plan]:
    """The checkpoint of one weight, "w.weight", in float64 or float32."""
    save_file({"w.weight": full}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    layout = layer.layout(dense_specs(bias=False)[0], size)
    code = {TORCH[c]: c for c in TORCH}[full.dtype]
    target = Target(name="w.weight", layout=layout, dtype=code)
    return checkpoint, make_plan([target], checkpoint.tensors, ranks=all_ranks(size))


PLAIN = ["native", "python"] if NATIVE else ["python"]


@pytest.mark.parametrize("path", PLAIN)
def test_a_column_cut_reads_its_own_bytes_only(path: str, tmp_path: Path) -> None:
    full = torch.arange(300 * 70, dtype=torch.float64).reshape(300, 70)
    checkpoint, plan = one(tmp_path, Layer.column(70, [300]), full, 3)
    memory = {"w.weight": torch.zeros(100, 70, dtype=torch.float64)}
    found, _ = moved(path, checkpoint, plan, Ranks(tp_rank=1, tp_size=3), memory)
    assert torch.equal(memory["w.weight"], full[100:200])
    assert (found.read_bytes, found.kept_bytes, found.excess_bytes) == (56_000, 56_000, 0)


@pytest.mark.parametrize("path", PLAIN)
@pytest.mark.parametrize(
    ("width", "gaps"),
    [
        (48, 39 * 256 - 2 * 256),  # 3 units of 16 rows, each read in one go
        (1536, 0),  # a gap of 8 KiB costs more than a call
    ],
)
def test_a_row_cut_reads_small_gaps(path: str, width: int, gaps: int, tmp_path: Path) -> None:
    full = torch.arange(40 * width, dtype=torch.float64).reshape(40, width)
    checkpoint, plan = one(tmp_path, Layer.row(width, 40), full, 3)
    memory = {"w.weight": torch.zeros(40, width // 3, dtype=torch.float64)}
    found, _ = moved(path, checkpoint, plan, Ranks(tp_rank=2, tp_size=3), memory)
    assert torch.equal(memory["w.weight"], full[:, width // 3 * 2 :])
    per_unit = max(1, CHUNK // (width // 3 * 8))
    breaks = -(-40 // per_unit) - 1
    assert found.kept_bytes == memory["w.weight"].nbytes
    assert found.excess_bytes == ((39 - breaks) * 256 if gaps else 0)


def test_what_it_reads_is_counted_by_the_reader(tmp_path: Path) -> None:
    full = torch.arange(300 * 7, dtype=torch.float64).reshape(300, 7)
    checkpoint, plan = one(tmp_path, Layer.column(7, [300]), full, 1)
    memory = {"w.weight": torch.zeros(300, 7, dtype=torch.float64)}
    with checkpoint.reader() as reader:
        transport = Transport(reader=reader)
        found = transport.run(plan, plan.share(Ranks()), memory, lambda _: None)
        assert reader.bytes_read == found.read_bytes == full.nbytes == transport.stats.read_bytes
        assert transport.stats.moved_bytes == full.nbytes


def shrink(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def break_disk(file: Path) -> None:
    """The open descriptors of a file become those of something that gives EIO."""
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    for fd in os.listdir("/proc/self/fd"):
        link = Path(f"/proc/self/fd/{fd}")
        if link.is_symlink() and os.readlink(link) == str(file):
            os.dup2(memory, int(fd), inheritable=False)
    os.close(memory)


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (
            shrink,
            r"needs \d+ bytes at offset \d+, the file ended after \d+ \(it was \d+ bytes when ",
        ),
        (break_disk, r"cannot be read at offset \d+: Input/output error\."),
    ],
)
def test_files_that_fail_after_the_plan(
    path: str, spoil: Callable[[Path], None], fact: str, tmp_path: Path
) -> None:
    native, options = PATHS[path]
    if native and not NATIVE:
        pytest.skip("not built")
    full = torch.arange(300 * 70, dtype=torch.float64).reshape(300, 70)
    checkpoint, plan = one(tmp_path, Layer.column(70, [300]), full, 3)
    memory = torch.full((100, 70), -1, dtype=torch.float64)
    on_gpu = "gpus" in options
    options = {**options, "gpus": Gpus()} if on_gpu else options
    share = plan.share(Ranks(tp_rank=2, tp_size=3))
    with checkpoint.reader() as reader:
        transport = Transport(reader=reader, **options)
        transport.compare(plan, share)
        assert reader.files is not None
        if "direct" in options and spoil is break_disk:
            reader.files.direct_descriptor("model.safetensors")
        spoil(tmp_path / "model.safetensors")
        target = memory.as_subclass(OnGpu) if on_gpu else memory
        with small_units(native, on_gpu=on_gpu), pytest.raises(FileError, match=fact) as caught:
            transport.run(plan, share, {"w.weight": target}, lambda _: None)
    text = str(caught.value)
    assert text.startswith("w.weight: checkpoint tensor 'w.weight' cannot be read: the file ")
    assert "In model.safetensors." in text
    needed = full[200:]
    assert bool(((memory == needed) | (memory == -1)).all())
    assert bool((memory == -1).any())


def test_a_file_put_in_anothers_place_is_not_read_directly(tmp_path: Path) -> None:
    """The descriptor for direct reads is opened later: by then the name may be another file's."""
    full = torch.arange(3000, dtype=torch.float64).reshape(300, 10)
    checkpoint, plan = one(tmp_path, Layer.column(10, [300]), full, 1)
    memory = torch.zeros(300, 10, dtype=torch.float64)
    with checkpoint.reader() as reader:
        transport = Transport(reader=reader, direct=True)
        transport.compare(plan, plan.share(Ranks()))
        save_file({"w.weight": -full}, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "model.safetensors")
        transport.run(plan, plan.share(Ranks()), {"w.weight": memory}, lambda _: None)
    assert torch.equal(memory, full)


def test_a_progress_bar_that_fails(tmp_path: Path) -> None:
    full = torch.arange(3000, dtype=torch.float64).reshape(300, 10)
    checkpoint, plan = one(tmp_path, Layer.column(10, [300]), full, 1)
    memory = torch.zeros(300, 10, dtype=torch.float64)

    def advance(_: int) -> None:
        raise ZeroDivisionError("of all things")

    with checkpoint.reader() as reader, pytest.raises(ZeroDivisionError):
        Transport(reader=reader).run(plan, plan.share(Ranks()), {"w.weight": memory}, advance)


def peak_bytes(work: Callable[[], object]) -> int:
    """How much more memory was resident at its peak than before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    work()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("code", ["F32", "BF16"])
def test_no_more_memory_than_allowed(direct: bool, code: str, tmp_path: Path) -> None:
    full = torch.arange(48 * 2**18, dtype=torch.float32).reshape(2**13, -1)
    save_file({"w.weight": full}, tmp_path / "model.safetensors")
    needed = full.to(TORCH[code])
    del full
    checkpoint = open_checkpoint(tmp_path)
    layout = Layer.column(needed.shape[1], [2**13]).layout(dense_specs(bias=False)[0], 1)
    target = Target(name="w.weight", layout=layout, dtype=code)
    plan = make_plan([target], checkpoint.tensors, ranks=[Ranks()])
    memory = torch.full_like(needed, -1)
    limits = Limits(staging_bytes=2**20, num_threads=2)
    with checkpoint.reader() as reader:
        transport = Transport(reader=reader, limits=limits, direct=direct)

        def run() -> None:
            transport.run(plan, plan.share(Ranks()), {"w.weight": memory}, lambda _: None)

        extra = peak_bytes(run)
    assert torch.equal(memory, needed)
    assert extra < 16 * 2**20, "of 50 MB"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"staging_bytes": 0}, "Limits: staging_bytes is 0, needs an int of at least 1."),
        ({"pinned_bytes": -1}, "Limits: pinned_bytes is -1, needs an int of at least 1."),
        ({"device_bytes": 2.5}, "Limits: device_bytes is 2.5, needs an int of at least 1."),
        ({"num_threads": True}, "Limits: num_threads is True, needs an int of at least 1."),
    ],
)
def test_limits_that_cannot_be_meant(options: dict[str, Any], text: str) -> None:
    with pytest.raises(CallError) as caught:
        Limits(**options)
    assert str(caught.value) == text


def test_threads_are_shared_by_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_num_cores", lambda: 24)
    count = moving.num_threads
    assert count(Limits(), 1, "cpu") == moving.MAX_HOST_THREADS
    assert count(Limits(), 1, "cuda") == moving.MAX_GPU_THREADS
    assert count(Limits(), 8, "cuda") == 3
    assert count(Limits(), 2, "cuda") == 11, "one of 12 cores starts the copies"
    assert count(Limits(), 100, "cpu") == 1
    assert count(Limits(num_threads=7), 100, "cpu") == 7


def test_a_number_of_threads_is_a_limit_also_where_files_are_cold(tmp_path: Path) -> None:
    full = torch.arange(3000, dtype=torch.float64).reshape(300, 10)
    checkpoint, plan = one(tmp_path, Layer.column(10, [300]), full, 1)
    memory = torch.zeros(300, 10, dtype=torch.float64)
    seen: list[Engine] = []

    def made(**options: Any) -> Engine:
        seen.append(Engine(**options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, checkpoint.reader() as reader:
        patch.setattr(moving, "Engine", made)
        transport = Transport(reader=reader, direct=True, limits=Limits(num_threads=2))
        transport.run(plan, plan.share(Ranks()), {"w.weight": memory}, lambda _: None)
    assert [engine.threads for engine in seen] == [2]


@pytest.mark.parametrize(
    ("path", "calls"),
    [("native", 64), ("python", 64), ("native, shared", 1), ("python, shared", 1)],
)
def test_rows_that_ranks_of_a_host_share_come_from_a_cold_disk_in_one_read(
    path: str, calls: int, tmp_path: Path
) -> None:
    engine, _, is_shared = path.partition(", ")
    if is_shared and not O_DIRECT:
        pytest.skip("no direct reads here")
    if engine == "native" and not NATIVE:
        pytest.skip("none was built")
    full = torch.arange(64 * 4096, dtype=torch.float32).reshape(64, 4096)
    checkpoint, plan = one(tmp_path, Layer.row(4096, 64), full, 2)
    memory = torch.zeros(64, 2048)
    with pytest.MonkeyPatch.context() as patch, checkpoint.reader() as reader:
        patch.setattr(moving, "Engine", partial(Engine, native=engine == "native"))
        options: dict[str, Any] = {"direct": True, "num_local": 2} if is_shared else {}
        transport = Transport(reader=reader, **options)
        ranks = Ranks(tp_rank=1, tp_size=2)
        transport.run(plan, plan.share(ranks), {"w.weight": memory}, lambda _: None)
    assert torch.equal(memory, full[:, 2048:])
    assert transport.stats.calls == calls


def test_cold_files_are_read_past_the_page_cache(tmp_path: Path) -> None:
    full = torch.arange(1 << 17, dtype=torch.float64).reshape(1 << 10, -1)
    checkpoint, plan = one(tmp_path, Layer.column(128, [1 << 10]), full, 1)
    file = tmp_path / "model.safetensors"
    fd = os.open(file, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        left = resident_bytes(fd, file.stat().st_size)
        if left is None or left > file.stat().st_size // 10:
            pytest.skip("nobody can say what is in the page cache, or it stays there")
        memory = torch.zeros(1 << 10, 128, dtype=torch.float64)
        with checkpoint.reader() as reader:
            assert reader.files is not None
            if reader.files.direct_descriptor(file.name) < 0:
                pytest.skip("no direct reads here")
            found = Transport(reader=reader).run(
                plan, plan.share(Ranks()), {"w.weight": memory}, lambda _: None
            )
        after = resident_bytes(fd, file.stat().st_size)
    finally:
        os.close(fd)
    assert torch.equal(memory, full)
    assert found.excess_bytes < 2 * BLOCK_BYTES * (1 + full.nbytes // moving.COLD_CHUNK_BYTES)
    assert after is not None
    assert after < file.stat().st_size // 4
