"""Loads a checkpoint several times on every rank and says how fast, beside the machine and peers.

`bench_rank` is one rank's work, started by `launch.run_ranks`. A run's time is the wall time from a
barrier of all ranks until every rank has its parameters, in new memory, the model and the plan
included. lading and the peers take turns; the first turn warms up and is not counted. At the end
every element of lading's last load is compared with an independent read, and every element that a
peer left with lading's.

torch is imported by the functions: results travel to a process without it.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lading import ranks as ranks_module
from lading.benching import ceilings
from lading.benching.ceilings import Ceilings
from lading.benching.peers import PEERS, Job, Peer
from lading.checkpoint import Checkpoint
from lading.errors import CallError, LadingError
from lading.launch import device_of
from lading.ranks import Ranks
from lading.verify import ElementCheck, refuse_sharded, verify

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from lading.loading import LoadReport, Progress
    from lading.models import CausalLM

__all__ = ["Options", "PeerRuns", "RankBench", "Run", "bench_rank", "known_peers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked for.

    against   names of peers
    cold      the page cache is emptied of the files before each run
    """

    runs: int = 5
    against: tuple[str, ...] = tuple(PEERS)
    cold: bool = False

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise CallError(f"is {self.runs}, needs at least 1", subject="runs")
        for name in self.against:
            if name not in PEERS:
                known = ", ".join(PEERS)
                raise CallError(f"is {name!r}, needs one of: {known}", subject="against")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load of one rank. Seconds of the threads are sums over them.

    seconds        until every rank had its parameters
    plan_seconds   headers, the model, the plan and its proof
    move_seconds   in the transport: reading and copying
    read_bytes, moved_bytes   from the files; to where the parameters are
    resident       the part of the files' bytes that was in the page cache before; None = not known
    """

    seconds: float
    plan_seconds: float
    move_seconds: float
    read_bytes: int
    moved_bytes: int
    calls: int
    read_seconds: float
    wait_seconds: float
    resident: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRuns:
    """A peer's runs; or why there are none, or are not the same."""

    name: str
    version: str | None
    seconds: tuple[float, ...] = ()
    problem: str | None = None
    resident: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBench:
    """What one rank measured.

    checkpoint_bytes   of the tensors that a load uses
    parameter_bytes, shard_bytes   of this rank's parameters; of the checkpoint that it keeps
    peak_host_bytes, peak_device_bytes   of the first load, beyond the parameters
    pinned_bytes       page-locked
    num_threads        that read
    """

    tp_rank: int
    device: str
    checkpoint_bytes: int
    parameter_bytes: int
    shard_bytes: int
    num_threads: int
    runs: tuple[Run, ...]
    peak_host_bytes: int
    peak_device_bytes: int
    pinned_bytes: int
    ceilings: Ceilings
    elements: ElementCheck
    peers: tuple[PeerRuns, ...]


def known_peers() -> tuple[str, ...]:
    """The names that `Options.against` takes."""
    return tuple(PEERS)


def bench_rank(
    ranks: Ranks,
    path: str,
    dtype: str | None,
    device: str | None,
    options: Options,
    straddle: str = "duplicate",
) -> RankBench:
    """The work of each rank of `lading bench`."""
    import torch

    from lading import progress

    refuse_sharded(path)
    place = torch.device(device_of(ranks, device))
    if place.type == "cuda":
        torch.cuda.set_device(place)  # starts it: a GPU at rest has no memory to count
    bench = _Bench(
        path=path,
        ranks=ranks,
        group=ranks_module.group_of(ranks, None),
        place=place,
        dtype=dtype,
        straddle=straddle,
        options=options,
    )
    return bench.run(progress.bar_of(ranks, "loading"))


@dataclass(slots=True, kw_only=True)
class _Bench:
    path: str
    ranks: Ranks
    group: ProcessGroup | None
    place: torch.device
    dtype: str | None
    straddle: str
    options: Options
    _runs: list[Run] = field(default_factory=list)
    _last: tuple[CausalLM, LoadReport] | None = None
    _host_bytes: int = 0
    _device_bytes: int = 0

    def run(self, bar: Progress | None) -> RankBench:
        first = self._load()  # warms up, and counts memory
        assert self._last is not None, "a load that returned has a model"
        model, report = self._last
        job = self._job(model)
        del model  # the next load gives it back
        wanted = [PEERS[name] for name in self.options.against]
        problems = {peer.name: self._told(peer.problem(job)) for peer in wanted}
        playing = [peer for peer in wanted if problems[peer.name] is None]
        seconds: dict[str, list[tuple[float, float | None]]] = {peer.name: [] for peer in wanted}
        turns = self.options.runs * (1 + len(playing)) + len(playing)
        if bar is not None:
            bar.start(turns * report.checkpoint_bytes)
        try:
            for turn in range(self.options.runs + 1):
                if turn:
                    self._runs.append(self._load())
                    _tell(bar, report.checkpoint_bytes)
                for peer in playing:
                    if problems[peer.name] is None:
                        taken = self._peer(peer, job, problems)
                        seconds[peer.name] += [taken] if turn and taken is not None else []
                    _tell(bar, report.checkpoint_bytes)
        finally:
            if bar is not None:
                bar.finish()
        return self._result(first, job, seconds, problems)

    # ------------------------------------------------------------------------------------- lading

    def _load(self) -> Run:
        """One load into new memory; the one before is given back first."""
        from lading import dtypes
        from lading.loading import run_load
        from lading.models import CausalLM
        from lading.pretrained import prepare_pretrained

        is_first, self._last = self._last is None, None
        dtype = None if self.dtype is None else dtypes.to_torch(self.dtype)
        planned = [0.0]

        def prepare() -> Any:
            before = time.perf_counter()
            try:
                return prepare_pretrained(
                    self.path,
                    ranks=self.ranks,
                    group=self.group,
                    dtype=dtype,
                    straddle=self.straddle,
                )
            finally:
                planned[0] = time.perf_counter() - before

        resident = self._cleared()
        before = self._watched(is_first)
        began = time.perf_counter()
        model, report = run_load(
            prepare,
            ranks=self.ranks,
            group=self.group,
            device=self.place,
            limits=None,
            exchange=None,
            progress=None,
        )
        seconds = self._until_all(began)
        assert isinstance(model, CausalLM), "prepare_pretrained builds a CausalLM"
        self._last = model, report
        if is_first:
            self._note_memory(before, report.parameter_bytes)
        stats = report.stats
        return Run(
            seconds=seconds,
            plan_seconds=planned[0],
            move_seconds=report.move_seconds,
            read_bytes=report.read_bytes,
            moved_bytes=stats.moved_bytes,
            calls=stats.calls,
            read_seconds=stats.read_seconds,
            wait_seconds=stats.wait_seconds,
            resident=resident,
        )

    def _watched(self, is_first: bool) -> int:
        """Peak memory of this process so far, in bytes; the device's is counted from here."""
        import torch

        if is_first and self.place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.place)
        return _peak_host_bytes()

    def _note_memory(self, before: int, parameter_bytes: int) -> None:
        import torch

        is_cuda = self.place.type == "cuda"
        kept = 0 if is_cuda else parameter_bytes
        self._host_bytes = max(_peak_host_bytes() - before - kept, 0)
        if is_cuda:
            self._device_bytes = torch.cuda.max_memory_allocated(self.place) - parameter_bytes

    # -------------------------------------------------------------------------------------- peers

    def _job(self, model: CausalLM) -> Job:
        from lading.loading import origin_of

        origin = origin_of(model)
        assert origin is not None, "a loaded model has an origin"
        return Job(
            checkpoint=origin.checkpoint,
            plan=origin.plan,
            share=origin.plan.share(self.ranks),
            device=self.place,
            group=self.group,
            is_cold=self.options.cold,
        )

    def _peer(
        self, peer: Peer, job: Job, problems: dict[str, str | None]
    ) -> tuple[float, float | None] | None:
        """A peer's time; None, and the problem noted on every rank, where it failed on one."""
        resident = self._cleared()
        problem, memory = None, None
        began = time.perf_counter()
        try:
            memory = peer.fill(job)
            self._synchronise()
        except Exception as error:  # whatever a foreign package raises is one line of the report
            problem = f"failed: {_first_line(error)}"
        problem = self._told(problem)
        seconds = time.perf_counter() - began
        if problem is None and memory is not None:
            problem = self._told(self._difference(memory))
        problems[peer.name] = problem
        return (seconds, resident) if problem is None else None

    def _difference(self, memory: dict[str, torch.Tensor]) -> str | None:
        """Where a peer's parameters are not lading's, bit for bit."""
        from lading import writing

        assert self._last is not None, "lading loads first"
        state = self._last[0].state_dict(keep_vars=True)
        for name, tensor in memory.items():
            if not writing.same_bits(tensor, state[name].detach()):
                return f"gives other values than lading for {name}"
        return None

    # -------------------------------------------------------------------------------------- ranks

    def _told(self, problem: str | None) -> str | None:
        """The first rank's problem, on every rank."""
        found = ranks_module.exchange(problem, self.group)
        return next((one for one in found if one is not None), None)

    def _synchronise(self) -> None:
        import torch

        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)

    def _until_all(self, began: float) -> float:
        self._synchronise()
        ranks_module.exchange(None, self.group)
        return time.perf_counter() - began

    def _cleared(self) -> float | None:
        """Empties the page cache where that is asked for; all ranks leave this together."""
        resident: float | None = None
        problem: LadingError | None = None
        try:
            if self.options.cold and self.ranks.tp_rank == 0:
                resident = _forget(self._checkpoint())
        except LadingError as error:
            problem = error
        found = ranks_module.exchange((resident, problem), self.group)
        if found[0][1] is not None:
            raise found[0][1]
        return found[0][0]  # type: ignore[no-any-return]

    def _checkpoint(self) -> Checkpoint:
        from lading.checkpoint import open_checkpoint

        return open_checkpoint(self.path)

    # ------------------------------------------------------------------------------------- result

    def _result(
        self,
        first: Run,
        job: Job,
        seconds: dict[str, list[tuple[float, float | None]]],
        problems: dict[str, str | None],
    ) -> RankBench:
        from lading.transport import Limits
        from lading.transport.moving import num_threads

        assert self._last is not None, "there is at least one run"
        model, report = self._last
        threads = num_threads(Limits(), ranks_module.num_local(self.group), self.place.type)
        elements = verify(self.path, model, self.ranks, names=model.names)
        self._last = None
        del model
        return RankBench(
            tp_rank=self.ranks.tp_rank,
            device=str(self.place),
            checkpoint_bytes=report.checkpoint_bytes,
            parameter_bytes=report.parameter_bytes,
            shard_bytes=job.plan.share_bytes(job.share),
            num_threads=threads,
            runs=tuple(self._runs),
            peak_host_bytes=self._host_bytes,
            peak_device_bytes=self._device_bytes,
            pinned_bytes=report.pinned_bytes,
            ceilings=self._ceilings(job, threads),
            elements=elements,
            peers=tuple(
                PeerRuns(
                    name=name,
                    version=PEERS[name].version(),
                    seconds=tuple(one for one, _ in taken),
                    resident=tuple(resident for _, resident in taken),
                    problem=problems[name],
                )
                for name, taken in seconds.items()
            ),
        )

    def _ceilings(self, job: Job, num_threads: int) -> Ceilings:
        """Each is measured on all ranks at once."""

        def together(measure: Callable[[], float | None]) -> float | None:
            ranks_module.exchange(None, self.group)
            return measure()

        is_cuda, checkpoint = self.place.type == "cuda", job.checkpoint
        to_device = partial(ceilings.host_to_device_rate, self.place)
        memcpy = partial(ceilings.memcpy_rate, num_threads)
        size = ceilings.LOCKED_BYTES if is_cuda else ceilings.BUFFER_BYTES
        cached = partial(ceilings.page_cache_rate, checkpoint, num_threads, size)
        disk = together(partial(ceilings.disk_rate, checkpoint)) if self.options.cold else None
        return Ceilings(
            memcpy=None if is_cuda else together(memcpy),
            page_cache=together(cached),
            disk=disk,
            host_to_device=together(to_device) if is_cuda else None,
        )


def _forget(checkpoint: Checkpoint) -> float | None:
    """Asks the system to drop the files' pages; the part of them that is still there."""
    from lading.transport.residency import resident_bytes

    total = sum(checkpoint.file_bytes.values())
    left: list[int | None] = []
    with checkpoint.reader() as reader:
        if reader.files is None:
            return None
        for file, size in checkpoint.file_bytes.items():
            reader.files.forget(file)
            left.append(resident_bytes(reader.files.descriptor(file), size))
    known: Sequence[int] = [one for one in left if one is not None]
    return sum(known) / total if len(known) == len(left) and total else None


def _tell(bar: Progress | None, num_bytes: int) -> None:
    if bar is not None:
        bar.advance(num_bytes)


def _first_line(error: BaseException) -> str:
    words = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {words}"[:200] if words else type(error).__name__


def _peak_host_bytes() -> int:
    """ru_maxrss: kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
