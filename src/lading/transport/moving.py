"""`Transport`: one rank's share of a plan, from files into parameters, each byte moved once.

A copy takes one of two ways. *Straight*: both ends are boxes of row-major memory of one dtype, so
it is a few jobs of the engine, whose threads read the file's bytes right into the parameter, or,
for a GPU, into page-locked buffers and on from there. *By value*: the bytes pass through memory in
which torch can cast or permute them, a bounded piece at a time.

How a file is read follows from where its bytes are. In the page cache: through it. Not there, on a
disk of this machine: past it (O_DIRECT), by more threads; but what several ranks of one host need
goes through the page cache, so that the disk is read once. Behind a network: through the cache, by
more threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from lading import ranks as ranks_module
from lading import writing
from lading.checkpoint import Reader
from lading.errors import CallError
from lading.plan import Plan, Share
from lading.regions import Copy
from lading.transport.cuda import Gpu, Gpus
from lading.transport.engine import Engine, Fault, Stats, native_engine
from lading.transport.exchange import Bands, Exchange, plan_exchange
from lading.transport.faults import problem_of
from lading.transport.host import DEFAULT_STAGING_BYTES, Advance, HostTransport, Moved
from lading.transport.jobs import Jobs
from lading.transport.landing import Landing
from lading.transport.residency import huge_pages
from lading.transport.rounds import AUTOMATIC, Sharing, is_worth
from lading.transport.sorting import Opened, Sorting, Straight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Limits", "Transport", "gpus_for"]

COLD_CHUNK_BYTES = 4 * 2**20
COLD_THREADS = 24
"""So many reads of this size keep a disk, or a network, busy (benchmarks/README.md)."""

VALUES_BYTES = 256 * 2**20
"""GPU memory through which copies pass that change dtype or order."""

MIN_CHUNK_BYTES = 64 * 2**10
"""A direct read is not worth its call below this, whatever the limits say."""

MAX_HOST_THREADS = 4
MAX_GPU_THREADS = 14
SPARE_CORES = 8
"""One core of so many is left to the thread that starts the copies, and to the interpreter."""

GPU_CHUNK_BYTES = 512 * 2**10
DEPTH = 8
"""Page-locked buffers of this size for each thread: more leave the processor's cache."""

PYTHON_CHUNK_FACTOR = 4
"""The engine in Python takes this many of them at once: each of its copies costs more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a load may use on each rank. Raises a CallError where that is nothing.

    staging_bytes   host memory of each thread, for copies that change dtype or order and for reads
                    past the page cache
    pinned_bytes    page-locked host memory, for GPUs
    device_bytes    GPU memory besides the parameters
    num_threads     that read; None = what the cores of this host allow for each of its ranks
    """

    staging_bytes: int = DEFAULT_STAGING_BYTES
    pinned_bytes: int = 512 * 2**20
    device_bytes: int = 512 * 2**20
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for name, value in (
            ("staging_bytes", self.staging_bytes),
            ("pinned_bytes", self.pinned_bytes),
            ("device_bytes", self.device_bytes),
            ("num_threads", 1 if self.num_threads is None else self.num_threads),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CallError(
                    f"{name} is {value!r}, needs an int of at least 1", subject="Limits"
                )


@dataclass(slots=True)
class Transport:
    """Executes one rank's share of a plan.

    reader      serves the checkpoint's bytes
    num_local   ranks of this host that load the same files at the same time
    gpus        page-locked memory; made where it is missing
    direct      reads past the page cache: None = where the file is cold; for tests, or where it
                is known
    group       the ranks of the plan, which then may read for one another
    exchange    whether they do. None: with NCCL where all ranks are on this host, and enough bytes
                are kept by several ranks or lie in runs so short that reading them costs more
                (`rounds.AUTOMATIC`); never with gloo, as its sockets carry less than the page
                cache gives each rank, and a cold file is read from the disk once anyway. True:
                also with gloo, and between hosts
    sharing     which tensors take part; None = what `exchange` says
    meanwhile   what the caller has to do while bytes are being moved; called at most once
    """

    reader: Reader
    limits: Limits = field(default_factory=Limits)
    num_local: int = 1
    direct: bool | None = None
    moved: Moved = field(default_factory=Moved)
    stats: Stats = field(default_factory=Stats)
    pinned_bytes: int = 0
    gpus: Gpus | None = None
    group: ProcessGroup | None = None
    exchange: bool | None = None
    sharing: Sharing | None = None
    meanwhile: Callable[[], None] | None = None
    _exchange: Exchange | None = None
    _is_settled: bool = False

    def compare(self, plan: Plan, share: Share) -> None:
        """All that can be found wrong before anything is written: files, constants, tied twins."""
        self._host().compare(plan, share)

    def wants(self, plan: Plan) -> bool:
        """Whether bytes would be exchanged, from plan facts alone; if so, call `offer`."""
        group = self.group if self.reader.files is not None else None
        if group is None or self.exchange is False:
            return False
        if self.exchange is None and not (
            self.num_local == plan.tp_size and ranks_module.carries(group, "cuda")
        ):
            return False
        return bool(self.exchange) or is_worth(plan)

    def offer(self, plan: Plan, share: Share, tensors: Mapping[str, torch.Tensor]) -> object:
        """Plans what this rank exchanges with the others, and takes the memory for it.

        Every rank's offer goes to `settle` on every rank. None where there is nothing to exchange,
        or no memory for it.
        """
        self._exchange = None
        group = self.group
        if group is not None and self.wants(plan):
            limit = self.limits.device_bytes
            sharing = self.sharing or (Sharing() if self.exchange else AUTOMATIC)
            with suppress(torch.cuda.OutOfMemoryError):  # a load does without rather than fail
                self._exchange = plan_exchange(
                    plan, share, tensors, group, sharing=sharing, device_bytes=limit
                )
        offer = self._exchange.offer if self._exchange is not None else None
        return offer[:2] if offer is not None and self.exchange else offer

    def settle(self, offers: Sequence[object]) -> None:
        """The ranks exchange if all of them offered the same."""
        if any(offer != offers[0] for offer in offers):
            self._exchange = None
        self._is_settled = True

    def abandon(self, error: Exception) -> None:
        """This rank has failed before or in `run`: it lets the others finish their exchange."""
        if self._exchange is not None:
            with suppress(Exception):  # the first error is the one that is told
                self._exchange.abandon(error)

    def run(
        self, plan: Plan, share: Share, tensors: Mapping[str, torch.Tensor], advance: Advance
    ) -> Moved:
        """Fills the tensors, by target name. `advance` is told kept bytes as they arrive.

        Call `compare` before. Raises the error of the first copy, in file order, that failed; what
        was not begun by then is left out, and nothing is written after this has returned. No rank
        of a group waits for one that has failed.
        """
        if self.group is not None and not self._is_settled:
            self.settle(ranks_module.exchange(self.offer(plan, share, tensors), self.group))
        try:
            return self._run(plan, share, tensors, advance)
        except Exception as error:
            self.abandon(error)
            raise

    def _run(
        self, plan: Plan, share: Share, tensors: Mapping[str, torch.Tensor], advance: Advance
    ) -> Moved:
        self.fill(share, tensors)
        files = self.reader.files
        if files is None:
            return self._host().run(plan, replace(share, fills=()), tensors, advance)
        opened = Opened(files, self.direct)
        copies = self._begin_exchange(plan, share, opened, advance)
        sorting = Sorting(plan, copies, tensors, opened, num_local=self.num_local)

        def meanwhile() -> None:
            self._finish_exchange(advance)
            sorting.prepare()
            others, self.meanwhile = self.meanwhile, None
            if others is not None:
                others()

        while (straight := sorting.take()) is not None:
            for device, work in straight.items():
                self._run_straight(plan, work, opened, device, advance, meanwhile)
        self._finish_exchange(advance)
        for device, others in sorting.values.items():
            self._run_values(plan, share, others, tensors, device, advance)
        if self._exchange is not None:
            self._exchange.wait()
        return self.moved

    def _begin_exchange(
        self, plan: Plan, share: Share, opened: Opened, advance: Advance
    ) -> Sequence[Copy]:
        """All but the last round of the exchange; the copies that do not come that way."""
        exchange = self._exchange
        if exchange is None:
            return share.copies
        rest = [c for c in share.copies if (c.target, c.part, c.source) not in exchange.keys]
        read = partial(self._read_bands, plan, opened, exchange.device)
        exchange.run(read, opened, self.moved, advance)
        self.moved.num_copies += len(share.copies) - len(rest)
        return rest

    def _finish_exchange(self, advance: Advance) -> None:
        """The last round. Raises what has gone wrong in it."""
        if self._exchange is not None:
            self._exchange.finish(self.moved, advance)
            if self._exchange.failure is not None:
                raise self._exchange.failure

    def _read_bands(
        self,
        plan: Plan,
        opened: Opened,
        device: torch.device,
        bands: Bands,
        meanwhile: Callable[[], None],
    ) -> None:
        jobs, owners = bands.jobs.jobs()
        fault, _ = self._move(jobs, opened, device, lambda _: None, meanwhile)
        if fault is not None:
            source, binding = bands.owners[int(owners[min(fault.job, len(owners) - 1)])]
            raise problem_of(fault, plan.sources[source], binding, opened)

    def fill(self, share: Share, tensors: Mapping[str, torch.Tensor]) -> None:
        """Zeroes what the share declares padding."""
        for fill in share.fills:
            with torch.inference_mode(tensors[fill.target].is_inference()):
                writing.fill(tensors[fill.target], fill.region)

    def _host(self) -> HostTransport:
        host = HostTransport(
            reader=self.reader, staging_bytes=self.limits.staging_bytes, moved=self.moved
        )
        if self.limits.num_threads is not None:
            host.num_threads = self.limits.num_threads
        return host

    def _run_straight(
        self,
        plan: Plan,
        work: Straight,
        opened: Opened,
        device: torch.device,
        advance: Advance,
        meanwhile: Callable[[], None],
    ) -> None:
        if device.type == "cpu":
            _advise(work.large.values())
        jobs, owners = work.jobs.jobs()
        fault, num_bytes = self._move(jobs, opened, device, advance, meanwhile)
        self.moved.kept_bytes += num_bytes
        if fault is not None:
            owner = work.copies[int(owners[min(fault.job, len(owners) - 1)])]
            raise problem_of(fault, plan.sources[owner.source], owner, opened)
        self.moved.num_copies += len(work.copies)

    def _move(
        self,
        jobs: Jobs,
        opened: Opened,
        device: torch.device,
        advance: Advance,
        meanwhile: Callable[[], None],
    ) -> tuple[Fault | None, int]:
        """One run of the engine: what went wrong, and how many bytes were moved."""
        engine = Engine(threads=num_threads(self.limits, self.num_local, device.type))
        if any(opened.is_cold) or any(opened.is_remote):
            if self.limits.num_threads is None:
                engine.threads = max(engine.threads, COLD_THREADS)
            engine.chunk_bytes = min(
                COLD_CHUNK_BYTES, max(self.limits.staging_bytes, MIN_CHUNK_BYTES)
            )
        gpu = self._gpu(device) if device.type == "cuda" else None
        if gpu is not None:
            engine.chunk_bytes = gpu.buffer_bytes
        fault = engine.run(
            jobs,
            opened.descriptors,
            device=gpu,
            advance=advance,
            meanwhile=meanwhile,
        )
        opened.files.count(engine.stats.read_bytes)
        self.stats.add(engine.stats)
        self.moved.read_bytes += engine.stats.read_bytes
        return fault, engine.stats.moved_bytes

    def _gpu(self, device: torch.device) -> Gpu:
        """The GPU's page-locked buffers, which the caller of this transport unlocks in the end."""
        if self.gpus is None:
            self.gpus = gpus_for(self.limits, self.num_local)
        gpu = self.gpus.ready(device)
        gpu.follow()
        self.pinned_bytes = max(self.pinned_bytes, gpu.pinned_bytes)
        return gpu

    def _run_values(
        self,
        plan: Plan,
        share: Share,
        copies: list[Copy],
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        advance: Advance,
    ) -> None:
        files = self.reader.files
        if device.type != "cuda" or files is None:
            rest = Share(ranks=share.ranks, copies=tuple(copies), fills=())
            self._host().run(plan, rest, tensors, advance)
            return
        landing = Landing(
            plan=plan,
            tensors=tensors,
            opened=Opened(files, self.direct),
            gpu=self._gpu(device),
            room_bytes=min(self.limits.device_bytes, VALUES_BYTES),
            stats=self.stats,
            moved=self.moved,
            advance=advance,
        )
        landing.run(copies, device)


def num_threads(limits: Limits, num_local: int, device_type: str) -> int:
    """Threads that read on each of `num_local` ranks of this host."""
    if limits.num_threads is not None:
        return limits.num_threads
    cores = max(1, _num_cores() // max(1, num_local))
    if device_type == "cuda":
        return min(cores - cores // SPARE_CORES, MAX_GPU_THREADS)
    return min(cores, MAX_HOST_THREADS)


def gpu_buffers(native: bool) -> tuple[int, int]:
    """The bytes of each page-locked buffer, and how many each thread has; of either engine."""
    factor = 1 if native else PYTHON_CHUNK_FACTOR
    return GPU_CHUNK_BYTES * factor, max(1, DEPTH // factor)


def gpus_for(limits: Limits, num_local: int) -> Gpus:
    """Page-locked memory for whatever GPU is asked for; unlocked when it is closed."""
    buffer_bytes, depth = gpu_buffers(native_engine() is not None)
    return Gpus(
        threads=num_threads(limits, num_local, "cuda"),
        depth=depth,
        buffer_bytes=buffer_bytes,
        pinned_bytes=limits.pinned_bytes,
    )


def _advise(targets: Iterable[torch.Tensor]) -> None:
    """Huge pages for large memory that nobody has touched yet: fewer faults while it is filled."""
    pages = huge_pages()
    for target in targets:
        address = writing.address(target)
        if address is not None:
            pages.use(address, target.nbytes)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if "sched_getaffinity" in vars(os) else os.cpu_count() or 1
