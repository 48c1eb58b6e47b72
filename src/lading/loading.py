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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from lading import dtypes, owners
from lading import ranks as ranks_module
from lading.checkpoint import Checkpoint
from lading.collecting import uncollected
from lading.errors import (
    CallError,
    DeclarationError,
    LadingError,
    PlanError,
    RankError,
)
from lading.layouts import Axis, Cut, Layout
from lading.names import Names
from lading.nn.base import ParallelLayer, allow_forward, like, refuse_forward
from lading.parameter import BasevLLMParameter, PerTensorScaleParameter
from lading.plan import Plan, Share, Target, make_plan
from lading.ranks import Ranks
from lading.regions import Region
from lading.shards.folder import open_any, reading
from lading.transport import Limits, Moved, Stats, Transport, gpus_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LoadReport", "Origin", "Progress", "load", "names_of", "origin_of", "targets_of"]

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
    """A load that only has to be executed."""

    model: nn.Module
    checkpoint: Checkpoint
    plan: Plan


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
    device    for parameters on meta: this rank's GPU where there is one, else the CPU
    limits    host and GPU memory that the load may use besides the parameters, and its threads
    exchange  whether ranks of a group read for one another what several of them need; None = where
              that is faster
    names     naming rules; by default `packed_modules_mapping` of the model, and the usual ones
    Raises a PlanError with every problem before anything is written, the same on all ranks; a
    FileError where reading fails.
    """
    ranks = ranks or ranks_of(model)

    def prepare() -> Prepared:
        checkpoint = path if isinstance(path, Checkpoint) else open_any(path)
        owners.name_parameters(model)
        _check_built_for(model, ranks)
        plan = make_plan(
            targets_of(model, ranks),
            checkpoint.tensors,
            ranks=[ranks],
            names=(names or names_of(model)).fitting(checkpoint.tensors),
        )
        return Prepared(model=model, checkpoint=checkpoint, plan=plan)

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
    lasted: dict[str, float] = {}

    def begin() -> tuple[torch.device, Prepared, Transport, Plan]:
        # Also what only this rank can get wrong, a GPU that is gone, say, is everyone's verdict.
        place = place_of(device, ranks)
        if place.type == "cuda":
            torch.cuda.set_device(place)
            gpus.begin(place)
        started = time.perf_counter()
        prepared = prepare()
        lasted["plan"] = time.perf_counter() - started
        todo, reader = reading(prepared.checkpoint, prepared.plan, ranks)
        transport = Transport(
            reader=stack.enter_context(reader),
            limits=use,
            num_local=num_local,
            gpus=gpus,
            # Of a pre-sharded folder each rank has its own file, and another plan.
            group=group if todo is prepared.plan else None,
            exchange=exchange,
        )
        transport.compare(todo, todo.share(ranks))
        return place, prepared, transport, todo

    # Under inference_mode the memory could not be written by the transport's threads.
    with torch.inference_mode(False), uncollected(), ExitStack() as stack:
        use, num_local = limits or Limits(), ranks_module.num_local(group)
        gpus = stack.enter_context(gpus_for(use, num_local))
        begun, found = all_well(begin, partial(_facts, group), group)
        check_equal([digest for digest, _ in found])
        place, prepared, transport, todo = begun
        model, plan = prepared.model, prepared.plan
        tensors = _tensors_of(model, plan)
        memory: dict[str, torch.Tensor] = {}

        def allocate() -> object:
            for name, tensor in tensors.items():
                memory[name] = memory_for(tensor, place) if tensor.is_meta else tensor.detach()
            return transport.offer(todo, todo.share(ranks), memory)

        def execute() -> Moved:
            if not memory:
                allocate()
            started = time.perf_counter()
            moved = _execute(todo, todo.share(ranks), transport, memory, progress)
            lasted["move"] = time.perf_counter() - started
            return moved

        if any(wants for _, wants in found):  # where nobody does, one exchange of verdicts less
            transport.settle(all_well(allocate, lambda offer: offer, group)[1])
        else:
            transport.settle(())
        try:
            moved = agreed(execute, _no_facts, group)
        except BaseException as error:
            _origins.pop(model, None)
            # Another rank may have failed before this one has begun to write; that is not known.
            if any(not tensor.is_meta for tensor in tensors.values()):
                refuse_forward(model, str(error) or type(error).__name__)
            raise
        install(model, plan, memory)
    allow_forward(model)
    _origins[model] = Origin(plan=plan, checkpoint=prepared.checkpoint)
    report = _report(plan, ranks, moved, time.perf_counter() - began)
    return model, replace(
        report,
        plan_seconds=lasted["plan"],
        move_seconds=lasted["move"],
        stats=transport.stats,
        pinned_bytes=transport.pinned_bytes,
    )


def memory_for(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Memory of a meta tensor's shape and strides.

    Not `empty_like`: of a meta tensor that imports sympy, a second or two in a new process.
    """
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=place)


def _facts(
    group: ProcessGroup | None, begun: tuple[torch.device, Prepared, Transport, Plan]
) -> tuple[str, bool]:
    """What has to be equal on all ranks before any of them writes; whether this one would exchange
    bytes with the others.
    """
    _, prepared, transport, todo = begun
    return ("", False) if group is None else (prepared.plan.digest, transport.wants(todo))


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


def agreed(work: Callable[[], Any], facts: Callable[[Any], Any], group: ProcessGroup | None) -> Any:
    """This rank's result once every rank has one; the same error on every rank otherwise, also
    where facts of the results differ.
    """
    result, found = all_well(work, facts, group)
    check_equal(found)
    return result


def check_equal(found: Sequence[Any]) -> None:
    """Raises a RankError where ranks found different facts."""
    for rank, other in enumerate(found):
        if other != found[0]:
            raise RankError(
                f"ranks 0 and {rank} made different plans: they see different checkpoints or "
                "models, needs the same on every rank"
            )


def all_well(
    work: Callable[[], Any], facts: Callable[[Any], Any], group: ProcessGroup | None
) -> tuple[Any, list[Any]]:
    """This rank's result and every rank's facts, once every rank has a result; the same error on
    every rank otherwise.
    """
    result: Any = None
    error: LadingError | None = None
    try:
        result = work()
    except LadingError as found:
        error = found
    except (
        Exception
    ) as found:  # whatever it is: a rank that raised alone would leave the others waiting
        if group is None:
            raise
        error = RankError(f"{type(found).__name__}: {found}")
        error.__cause__ = found
    verdicts = ranks_module.exchange((error, None if error else facts(result)), group)
    failed = [(rank, verdict) for rank, (verdict, _) in enumerate(verdicts) if verdict is not None]
    if failed:
        rank, first = failed[0]
        if error is not None and str(error) == str(first):
            first = error  # keeps this rank's own traceback
        if len(failed) < len(verdicts) and len(verdicts) > 1:
            first.rank = rank
        raise first
    return result, [found for _, found in verdicts]


def place_of(device: torch.device | str | None, ranks: Ranks) -> torch.device:
    """The device of parameters on meta; "cuda" without a number is this rank's GPU.

    Raises a CallError for a device that torch does not know, or that has no memory.
    """
    if device is None:
        return default_device(ranks)
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        words = str(error).partition("\n")[0]
        raise CallError(
            f"is {device!r}, needs a device of torch ({words})", subject="device"
        ) from None
    if place.type == "meta":
        raise CallError("is meta, needs one that has memory", subject="device")
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise CallError(f"is {str(place)!r}, but this process sees no GPU", subject="device")
    return default_device(ranks) if place.index is None else place


def default_device(ranks: Ranks) -> torch.device:
    """This rank's GPU (LOCAL_RANK, else the TP rank, modulo the GPUs), or the CPU where there is
    none.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", ranks.tp_rank))
    return torch.device("cuda", local % torch.cuda.device_count())


def names_of(model: nn.Module) -> Names:
    """The usual naming rules with the model's own `packed_modules_mapping`, where it declares
    one.
    """
    for scope in (vars(model), *(vars(cls) for cls in type(model).__mro__)):
        if isinstance(scope.get("names"), Names):
            return scope["names"]  # type: ignore[no-any-return]
        mapping = scope.get("packed_modules_mapping")
        if isinstance(mapping, Mapping):
            return Names.of(mapping)
    return Names()


def targets_of(model: nn.Module, ranks: Ranks) -> tuple[Target, ...]:
    """What a load has to fill: every parameter and persistent buffer, tied ones once.

    Raises a PlanError where a parameter does not say how it is cut, or was built for other ranks.
    """
    problems: list[LadingError] = []
    named: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in state_of(model):
        named.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    layers = [(p, m) for p, m in model.named_modules() if isinstance(m, ParallelLayer)]
    uncut = {id(param) for _, m in layers if m.disable_tp for param in m.parameters()}
    targets = []
    for key, (name, *aliases) in named.items():
        try:
            layout = _layout_of(tensors[key], ranks, whole=key in uncut)
            dtype = dtypes.from_torch(tensors[key].dtype)
        except LadingError as error:
            problems.append(error.located(subject=name))
            continue
        except LookupError as error:
            problems.append(DeclarationError(str(error), subject=name))
            continue
        targets.append(
            Target(
                name=name,
                layout=layout,
                dtype=dtype,
                aliases=tuple(aliases),
                **_stored_as(tensors[key]),
            )
        )
    for prefix, layer in layers:
        for target in layer.expected_targets(prefix):
            if layer.disable_tp:
                target = replace(target, layout=_uncut(target.layout, ranks.tp_size))
            targets.append(target)
    if problems:
        raise PlanError(problems, what="the model")
    return tuple(targets)


def state_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = list(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.append((f"{prefix}.{name}" if prefix else name, buffer))
    return found


def _stored_as(tensor: torch.Tensor) -> dict[str, Any]:
    """How a parameter's tensor is called and shaped in the file, where that is not the usual."""
    if not isinstance(tensor, BasevLLMParameter):
        return {}
    return {"leaf": tensor.stored_leaf, "stored": tensor.stored_shape}


def _uncut(layout: Layout, tp_size: int) -> Layout:
    """A layout of one rank as that of T ranks which all keep everything."""

    def whole(axis: Axis) -> Axis:
        return replace(axis, parts=tuple(replace(part, max_pieces=1) for part in axis.parts))

    cuts: tuple[Cut, ...] = tuple(replace(cut, axis=whole(cut.axis)) for cut in layout.cuts)
    return replace(layout, cuts=cuts, tp_size=tp_size)


def _layout_of(tensor: torch.Tensor, ranks: Ranks, *, whole: bool) -> Layout:
    """The declared layout, or replicated for tensors that no rank cuts.

    whole   the parameter's layer does without tensor parallelism
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, BasevLLMParameter):
        return Layout.replicated(shape, ranks.tp_size)
    layout = tensor.tp_layout
    if layout is None:
        cut_by_none = type(tensor) in (BasevLLMParameter, PerTensorScaleParameter)
        if ranks.tp_size == 1 or whole or cut_by_none:
            return Layout.replicated(shape, ranks.tp_size)
        raise DeclarationError(
            f"{type(tensor).__name__} does not say how it is cut over {ranks.tp_size} ranks, needs "
            "a layout",
            hint="build it with a layer of lading.nn, or set its tp_layout",
        )
    if whole:
        layout = _uncut(layout, ranks.tp_size)
    if layout.tp_size != ranks.tp_size:
        raise DeclarationError(
            f"was built for {layout.tp_size} ranks, needs {ranks.tp_size} (the load's tp_size)"
        )
    if layout.local_shape != shape:
        raise DeclarationError(
            f"has shape {list(shape)}, needs {list(layout.local_shape)} (its own layout's)"
        )
    return layout


def _check_built_for(model: nn.Module, ranks: Ranks) -> None:
    """Raises a CallError where the model's forward pass takes itself for another rank."""
    for layer in model.modules():
        if not isinstance(layer, ParallelLayer) or layer.tp_size != ranks.tp_size:
            continue  # another tp_size is every parameter's problem
        if layer.tp_rank != ranks.tp_rank:
            raise CallError(
                f"was built for {layer.ranks}, needs {ranks} (the load's)",
                subject=type(model).__name__,
            )


def ranks_of(model: nn.Module) -> Ranks:
    """The rank that the model's layers were built for; the current one where they do not say."""
    found = {m.ranks for m in model.modules() if isinstance(m, ParallelLayer) and m.tp_size > 1}
    if len(found) > 1:
        raise CallError(
            f"has layers built for {' and '.join(sorted(map(str, found)))}, needs one rank",
            subject=type(model).__name__,
        )
    return found.pop() if found else ranks_module.current()


def _tensors_of(model: nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    state = dict(state_of(model))
    return {target.name: state[target.name] for target in plan.targets if target.expected is None}


def install(model: nn.Module, plan: Plan, memory: Mapping[str, torch.Tensor]) -> None:
    """Gives parameters on meta their memory, keeping each object, and notes everything as
    loaded.
    """
    tensors = _tensors_of(model, plan)
    if any(tensor.is_meta for tensor in tensors.values()):
        for name, tensor in tensors.items():
            if tensor.is_meta:
                _materialise(model, name, tensor, memory[name])
        tensors = _tensors_of(model, plan)
    for tensor in tensors.values():
        if isinstance(tensor, BasevLLMParameter):
            tensor._ledger.start()
            tensor._ledger.note(tensor, Region.whole(tensor.shape))
            if tensor.stored_order:
                tensor.stored_order = ()  # the file had its dims in the order that they have now


def _materialise(model: nn.Module, name: str, old: torch.Tensor, data: torch.Tensor) -> None:
    """Swaps the memory in, so that every holder of the parameter sees it loaded.

    Tensors with weak references cannot be swapped (torch.utils.swap_tensors): there the model gets
    a new object of the same class under each of the parameter's names.
    """
    new: torch.Tensor
    if isinstance(old, BasevLLMParameter):
        new = like(old, data)
    else:
        new = data
        if isinstance(old, nn.Parameter):  # of any class
            new = torch.Tensor._make_subclass(type(old), data, old.requires_grad)
        vars(new).update(vars(old))
    try:
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    except RuntimeError:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, held in table.items():
                    if held is old:
                        table[key] = new  # type: ignore[assignment]


def _report(plan: Plan, ranks: Ranks, moved: Moved, seconds: float) -> LoadReport:
    return LoadReport(
        ranks=ranks,
        checkpoint_bytes=plan.checkpoint_bytes(),
        parameter_bytes=plan.parameter_bytes(),
        read_bytes=moved.read_bytes,
        excess_bytes=moved.excess_bytes,
        exchanged_bytes=moved.received_bytes,
        seconds=max(seconds, 1e-9),
        num_copies=moved.num_copies,
        casts=plan.casts(),
        skipped=tuple((s.source, s.reason) for s in plan.skipped),
    )
