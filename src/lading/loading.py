"""The verb `load` (the file is not named so: `lading.load` is the function): a checkpoint into the
parameters of one rank's model, all or nothing.

Every rank plans and checks before any rank writes, and no rank raises while another waits: each
stage ends with one exchange of verdicts, after which all ranks go on or all raise the same error.

A model on the meta device gets its memory here, and gets it only when everything has been read: a
load that fails leaves it as it was. A model with live memory is written in place; if that fails
half-way it is marked, and its forward pass refuses until a load succeeds.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lading import owners
from lading import ranks as ranks_module
from lading.checkpoint import Checkpoint
from lading.collecting import Pause, uncollected
from lading.errors import CallError
from lading.names import Names
from lading.nn.base import allow_forward, refuse_forward
from lading.placing import Notes, check_memory, install, memory_for, note_written, place_of
from lading.plan import Plan, Share, make_plan
from lading.ranks import Ranks
from lading.shards.folder import open_any, reading
from lading.targeting import check_built_for, names_of, ranks_of, targets_of, tensors_of
from lading.transport import Limits, Moved, Stats, Transport, gpus_for
from lading.verdicts import agreed, all_well, check_equal

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lading.transport.cuda import Gpus

__all__ = ["LoadReport", "Origin", "Progress", "load", "origin_of"]

PathLike = str | os.PathLike[str]


class Progress(Protocol):
    """Told of a load as it goes; the library itself prints nothing."""

    def start(self, total_bytes: int) -> None:
        """The load begins; this rank will keep so many bytes of the checkpoint."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes are in place."""

    def finish(self) -> None:
        """The load has ended, well or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did. Bytes are this rank's, except `checkpoint_bytes`.

    ranks               this rank
    checkpoint_bytes    of all tensors that the load used, each counted once
    parameter_bytes     of this rank's parameters, padding included
    read_bytes, excess_bytes   read from files; read but not kept
    seconds             wall time until every rank had its parameters
    num_copies          copies executed
    casts               (parameter, stored dtype, parameter dtype) where values were rounded
    skipped             (checkpoint tensor, reason)
    plan_seconds, move_seconds   of them until the plan was proved; in the transport
    stats, pinned_bytes   what the transport's threads did; page-locked memory that they used
    exchanged_bytes     of what this rank keeps, but another one has read
    """

    ranks: Ranks
    checkpoint_bytes: int
    parameter_bytes: int
    read_bytes: int
    excess_bytes: int
    seconds: float
    num_copies: int
    casts: tuple[tuple[str, str, str], ...]
    skipped: tuple[tuple[str, str], ...]
    plan_seconds: float = 0.0
    move_seconds: float = 0.0
    stats: Stats = field(default_factory=Stats)
    pinned_bytes: int = 0
    exchanged_bytes: int = 0

    def __str__(self) -> str:
        giga, rate = self.checkpoint_bytes / 1e9, self.checkpoint_bytes / 1e9 / self.seconds
        return f"{giga:.3g} GB in {self.seconds:.3g} s, {rate:.3g} GB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A load that only has to be executed.

    walk   over the model: one for all steps
    """

    model: nn.Module
    checkpoint: Checkpoint
    plan: Plan
    walk: owners.Walk


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a model was filled from.

    plan         of the load: this rank's share, the bindings of all
    checkpoint   its headers; its files may be gone or changed since
    """

    plan: Plan
    checkpoint: Checkpoint


_origins: weakref.WeakKeyDictionary[nn.Module, Origin] = weakref.WeakKeyDictionary()


def origin_of(model: nn.Module) -> Origin | None:
    """What `load` last filled this model from; None where it never did, or has failed since."""
    return _origins.get(model)


def note_origin(model: nn.Module, origin: Origin | None) -> None:
    """What the model has from now on been filled from, when not `load` has filled it."""
    if origin is None:
        _origins.pop(model, None)
    else:
        _origins[model] = origin


def load(
    model: nn.Module,
    path: PathLike | Checkpoint,
    *,
    ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    names: Names | None = None,
    limits: Limits | None = None,
    exchange: bool | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Fills a model's parameters (and persistent buffers) from a checkpoint; proved, or not at all.

    model     built for one rank from `lading.nn` layers; other parameters are taken as replicated.
              On the meta device it gets its memory on `device`
    path      a folder, pre-sharded or not, a .safetensors file, an index, or what `open_checkpoint`
              returned
    ranks     this process's rank: by default the one that the model's layers were built for
    group     over which ranks agree; the default group where it is this rank's
    device    for parameters on meta: by default the GPU that has others of the model, else this
              rank's GPU where there is one, else the CPU
    limits    host and GPU memory that the load may use besides the parameters, and its threads
    exchange  whether ranks of a group read for one another what several of them need; None = where
              that is faster
    names     naming rules; by default `packed_modules_mapping` of the model, and the usual ones
    Raises a PlanError with every problem before anything is written, the same on all ranks; a
    FileError where reading fails.
    """
    walk = owners.Walk(model)
    ranks = ranks or ranks_of(model, walk)
    if device is None:  # the GPU that has the model may be another than this rank's usual one
        device = next((param.device for _, param in walk.params if param.is_cuda), None)

    def prepare() -> Prepared:
        checkpoint = path if isinstance(path, Checkpoint) else open_any(path)
        owners.name_all(walk)
        check_built_for(model, ranks, walk)
        plan = make_plan(
            targets_of(model, ranks, walk),
            checkpoint.tensors,
            ranks=[ranks],
            names=(names or names_of(model)).fitting(checkpoint.tensors),
        )
        return Prepared(model=model, checkpoint=checkpoint, plan=plan, walk=walk)

    _, report = run_load(
        prepare,
        ranks=ranks,
        group=group,
        device=device,
        limits=limits,
        exchange=exchange,
        progress=progress,
    )
    return report


def run_load(
    prepare: Callable[[], Prepared],
    *,
    ranks: Ranks,
    group: ProcessGroup | None,
    device: torch.device | str | None,
    limits: Limits | None,
    exchange: bool | None,
    progress: Progress | None,
) -> tuple[nn.Module, LoadReport]:
    """Prepares, agrees, executes, agrees, and only then hands the memory to the model."""
    group = ranks_module.group_of(ranks, group)
    began = time.perf_counter()
    # Under inference_mode the memory could not be written by the transport's threads.
    with torch.inference_mode(False), uncollected() as pause, ExitStack() as stack:
        use = limits if isinstance(limits, Limits) else Limits()
        num_local = ranks_module.num_local(group)
        load = _Load(
            ranks=ranks,
            group=group,
            progress=progress,
            pause=pause,
            gpus=stack.enter_context(gpus_for(use, num_local)),
        )
        options = {"limits": use, "num_local": num_local, "exchange": exchange}

        def begin() -> None:
            check_options(limits, exchange)
            load.begin(prepare, device, stack, options)

        _, found = all_well(begin, lambda _: load.facts(), group)
        check_equal([digest for digest, _ in found])
        if any(wants for _, wants in found):  # where nobody does, one exchange of verdicts less
            load.transport.settle(all_well(load.allocate, lambda offer: offer, group)[1])
        else:
            load.transport.settle(())
        try:
            moved = agreed(load.execute, _no_facts, group)
        except BaseException as error:
            load.give_up(error)
            raise
        load.hand_over()
    return load.prepared.model, load.report(moved, time.perf_counter() - began)


def check_options(limits: object, exchange: object) -> None:
    """Raises a CallError for what `load` cannot mean."""
    if limits is not None and not isinstance(limits, Limits):
        raise CallError(f"is {limits!r}, needs a lading.Limits", subject="limits")
    if exchange is not None and not isinstance(exchange, bool):
        raise CallError(f"is {exchange!r}, needs True, False or None", subject="exchange")


@dataclass(slots=True, kw_only=True)
class _Load:
    """The steps of one load on this rank, and what is known after each.

    pause     of the collector
    todo      the plan that is executed: of a pre-sharded folder another than `prepared.plan`, which
              is the checkpoint's that the folder holds
    tensors   what the plan fills, by target name; `memory` is where their bytes go
    """

    ranks: Ranks
    group: ProcessGroup | None
    progress: Progress | None
    pause: Pause
    gpus: Gpus
    place: torch.device = field(init=False)
    prepared: Prepared = field(init=False)
    todo: Plan = field(init=False)
    transport: Transport = field(init=False)
    tensors: dict[str, torch.Tensor] = field(init=False)
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    plan_seconds: float = 0.0
    move_seconds: float = 0.0
    _aside: _Aside | None = None

    def begin(
        self,
        prepare: Callable[[], Prepared],
        device: torch.device | str | None,
        stack: ExitStack,
        options: Mapping[str, Any],
    ) -> None:
        """Until all is known that can be found wrong before anything is written.

        Also what only this rank can get wrong, a GPU that is gone, say, is everyone's verdict.
        """
        self.place = place_of(device, self.ranks)
        if self.place.type == "cuda":
            torch.cuda.set_device(self.place)
            self.gpus.begin(self.place)
        started = time.perf_counter()
        self.prepared = prepare()
        self.plan_seconds = time.perf_counter() - started
        plan = self.prepared.plan
        self.todo, reader = reading(self.prepared.checkpoint, plan, self.ranks)
        self.transport = Transport(
            reader=stack.enter_context(reader),
            gpus=self.gpus,
            # Of a pre-sharded folder each rank has its own file, and another plan.
            group=self.group if self.todo is plan else None,
            meanwhile=self._meanwhile,
            **options,
        )
        self.transport.compare(self.todo, self.todo.share(self.ranks))
        self.tensors = tensors_of(self.prepared.model, plan, self.prepared.walk)
        check_memory(self.tensors)

    def facts(self) -> tuple[str, bool]:
        """What has to be equal on all ranks before any of them writes; whether this one would
        exchange bytes with the others.
        """
        if self.group is None:
            return "", False
        return self.prepared.plan.digest, self.transport.wants(self.todo)

    def allocate(self) -> object:
        """Takes the memory; what this rank offers to exchange."""
        for name, tensor in self.tensors.items():
            is_new = tensor.is_meta
            self.memory[name] = memory_for(tensor, self.place) if is_new else tensor.detach()
        return self.transport.offer(self.todo, self.todo.share(self.ranks), self.memory)

    def execute(self) -> Moved:
        """Fills the memory."""
        if not self.memory:
            self.allocate()
        started = time.perf_counter()
        share = self.todo.share(self.ranks)
        moved = _execute(self.todo, share, self.transport, self.memory, self.progress)
        if self.todo is not self.prepared.plan:
            # A rank's own file has its padding too, and could have anything there.
            self.transport.fill(self.prepared.plan.share(self.ranks), self.memory)
        self.move_seconds = time.perf_counter() - started
        return moved

    def give_up(self, error: BaseException) -> None:
        """Marks a model whose memory may have been written in part."""
        model = self.prepared.model
        note_written(self.tensors.values())
        _origins.pop(model, None)
        # Another rank may have failed before this one has begun to write; that is not known.
        if any(not tensor.is_meta for tensor in self.tensors.values()):
            refuse_forward(model, str(error) or type(error).__name__)

    def hand_over(self) -> None:
        """Gives the model its memory: every rank has all of it."""
        model, plan, walk = self.prepared.model, self.prepared.plan, self.prepared.walk
        install(model, plan, self.memory, self.tensors, walk, self._known().notes)
        allow_forward(model, walk)
        _origins[model] = Origin(plan=plan, checkpoint=self.prepared.checkpoint)

    def report(self, moved: Moved, seconds: float) -> LoadReport:
        """What was done, in so many seconds of wall time."""
        return LoadReport(
            ranks=self.ranks,
            read_bytes=moved.read_bytes,
            excess_bytes=moved.excess_bytes,
            exchanged_bytes=moved.received_bytes,
            seconds=max(seconds, 1e-9),
            num_copies=moved.num_copies,
            plan_seconds=self.plan_seconds,
            move_seconds=self.move_seconds,
            stats=self.transport.stats,
            pinned_bytes=self.transport.pinned_bytes,
            **self._known().totals,
        )

    def _meanwhile(self) -> None:
        self._known()
        self.pause.catch_up()

    def _known(self) -> _Aside:
        if self._aside is None:
            self._aside = _Aside.of(self.prepared.plan, self.tensors)
        return self._aside


@dataclass(frozen=True, slots=True)
class _Aside:
    """What is worked out while bytes are being moved, as nobody has to wait for it then.

    totals   what a report says of the plan
    """

    totals: dict[str, Any]
    notes: Notes

    @staticmethod
    def of(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> _Aside:
        """Of a plan and the tensors that it fills."""
        totals = {
            "checkpoint_bytes": plan.checkpoint_bytes(),
            "parameter_bytes": plan.parameter_bytes(),
            "casts": plan.casts(),
            "skipped": tuple((s.source, s.reason) for s in plan.skipped),
        }
        return _Aside(totals, Notes.of(tensors.values()))


def _no_facts(_done: object) -> None:
    """Nothing of it has to be equal on all ranks."""


def _execute(
    plan: Plan,
    share: Share,
    transport: Transport,
    memory: Mapping[str, torch.Tensor],
    progress: Progress | None,
) -> Moved:
    if progress is None:
        return transport.run(plan, share, memory, _ignore)
    try:
        progress.start(plan.share_bytes(share))
    except Exception as error:
        transport.abandon(error)
        raise
    try:
        return transport.run(plan, share, memory, progress.advance)
    finally:
        progress.finish()


def _ignore(_num_bytes: int) -> None:
    return None
