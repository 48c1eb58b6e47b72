"""The verb `reshard`: from a live model to a live model that is cut in another way, without files.

Every process of a group may hold a rank of the source, a rank of the target, both, or neither. The
two plans together say which elements go from which parameter to which (`lading.routes`); each goes
once, to who needs it: straight from parameter to parameter where one process has both, else in
messages between two processes, in rounds that keep to a bounded buffer (`lading.messages`).

Weights stay as they are stored: nothing is cast, decoded or quantised again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from lading import loading, messages, owners, placing
from lading import ranks as ranks_module
from lading.binding import Target, Tie
from lading.errors import CallError, DeclarationError, LadingError, PlanError
from lading.exports.live import Live, live_parameters, stored_form
from lading.exports.plan import plan_from_names, stored_parts
from lading.loading import Origin
from lading.names import Names
from lading.nn import ParallelLayer
from lading.nn.base import allow_forward, refuse_forward
from lading.plan import Plan, prove_bindings
from lading.ranks import Ranks, all_ranks
from lading.resharding.carrying import Carrier
from lading.routes import routes
from lading.targeting import names_of
from lading.verdicts import agreed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DEFAULT_BUFFER_BYTES", "ReshardReport", "reshard"]

DEFAULT_BUFFER_BYTES = 2**28


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardReport:
    """What a reshard did, on this process.

    source_ranks, target_ranks   what the process holds of either model, None for nothing
    kept_bytes      from its own source to its own target
    sent_bytes, received_bytes   to and from other processes
    buffer_bytes    of memory for messages
    num_rounds      in which it took part
    seconds         until every process had its parameters
    """

    source_ranks: Ranks | None
    target_ranks: Ranks | None
    kept_bytes: int
    sent_bytes: int
    received_bytes: int
    buffer_bytes: int
    num_rounds: int
    seconds: float

    def __str__(self) -> str:
        moved, received = (self.kept_bytes + self.received_bytes) / 1e9, self.received_bytes / 1e9
        return f"{moved:.3g} GB in {self.seconds:.3g} s, {received:.3g} of them received"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """What a process tells the others of its source or of its target.

    targets       of rank 0 only: the other ranks' differ in values only
    fingerprint   of what has to be equal on all ranks
    """

    ranks: Ranks
    names: Names
    targets: tuple[Target, ...] | None
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """What every process tells the others: what it holds, and where.

    plan     a plan's fingerprint, where one was passed
    origin   what the source was loaded from; told by its rank 0
    """

    source: _Side | None
    target: _Side | None
    plan: str | None
    origin: Origin | None
    device_types: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """This process' models."""

    source: Live | None
    target: Live | None
    offer: _Offer


def reshard(
    source: nn.Module | Plan | None,
    target: nn.Module | None,
    *,
    source_ranks: Ranks | None = None,
    target_ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    buffer_bytes: int = DEFAULT_BUFFER_BYTES,
) -> ReshardReport:
    """Fills a model from a live one that is cut over another number of ranks, or lies elsewhere.

    Every process of the group calls it, whether it holds a rank of either model or not.

    source    the model of this process' rank; None, or the plan that it was loaded by, where this
              process has none
    target    the model to fill, None where this process has none; on the meta device it gets its
              memory on `device`, else it is written in place
    source_ranks, target_ranks   which ranks they are: by default those that their layers were built
              for. Each rank of either has to be in some process; several processes may hold one
    group     the processes of both; by default all
    device    for parameters on meta: this process' GPU where there is one, else the CPU
    buffer_bytes   of memory for messages, on each process
    Raises a PlanError with every difference before anything is written, the same on all processes.

    Example: TP 4 on processes 0-3 becomes TP 2 on processes 4 and 5 of a group of 6:
        reshard(model if rank < 4 else None, new_model if rank >= 4 else None)
    """
    began = time.perf_counter()
    group, place = ranks_module.meeting(group)

    def look() -> _Own:
        if buffer_bytes < 1:
            raise CallError(f"is {buffer_bytes}, needs at least 1", subject="buffer_bytes")
        own = _look(source, target, source_ranks, target_ranks)
        _choose_gpu(own, placing.place_of(device, place), place, group)
        return own

    with torch.inference_mode(False):
        own: _Own = agreed(look, _nothing, group)
        offers = ranks_module.exchange(own.offer, group)
        work: Carrier
        work, _ = agreed(
            lambda: _prepare(own, offers, target, place, group, buffer_bytes),
            lambda done: done[1],
            group,
        )
        agreed(lambda: work.allocate(device), _nothing, group)
        try:
            agreed(work.move, _nothing, group)
        except BaseException as error:
            if target is not None and work.is_in_place:
                loading.note_origin(target, None)
                refuse_forward(target, str(error) or type(error).__name__)
            raise
        if target is not None and own.target is not None:
            work.install(target)
            allow_forward(target)
            loading.note_origin(target, _carried_origin(offers, own.target))
    return ReshardReport(
        source_ranks=own.source.ranks if own.source else None,
        target_ranks=own.target.ranks if own.target else None,
        kept_bytes=work.kept_bytes,
        sent_bytes=work.sent_bytes,
        received_bytes=work.received_bytes,
        buffer_bytes=work.buffer_bytes,
        num_rounds=len(work.todo.exchanges),
        seconds=max(time.perf_counter() - began, 1e-9),
    )


def _nothing(_done: object) -> None:
    """Nothing of it has to be equal on all processes."""


# ----------------------------------------------------------------------------- what processes have


def _look(
    source: nn.Module | Plan | None,
    target: nn.Module | None,
    source_ranks: Ranks | None,
    target_ranks: Ranks | None,
) -> _Own:
    if target is not None and source is target:
        raise CallError("is the source itself, needs another model", subject="target")
    held = wanted = None
    if isinstance(source, nn.Module):
        held = live_parameters(source, source_ranks or _built_for(source))
    if target is not None:
        owners.name_parameters(target)
        _check_not_packed(target)
        wanted = stored_form(target, target_ranks or _built_for(target))
    tensors = [
        tensor for live in (held, wanted) if live is not None for tensor in live.tensors.values()
    ]
    offer = _Offer(
        source=_side(source, held),
        target=_side(target, wanted),
        plan=_fingerprint(source.targets) if isinstance(source, Plan) else None,
        origin=_origin_of(source),
        device_types=frozenset(tensor.device.type for tensor in tensors) - {"meta"},
    )
    return _Own(source=held, target=wanted, offer=offer)


def _origin_of(source: nn.Module | Plan | None) -> Origin | None:
    if not isinstance(source, nn.Module) or _built_for(source).tp_rank != 0:
        return None
    return loading.origin_of(source)


def _carried_origin(offers: Sequence[_Offer], live: Live) -> Origin | None:
    """What the source was loaded from, as the target's own: so that an export repeats it.

    None where the target's parameters are not made of the same checkpoint tensors.
    """
    origin = next((offer.origin for offer in offers if offer.origin is not None), None)
    if origin is None:
        return None
    now = {target.name: target for target in live.targets}
    loaded = origin.plan.targets
    if {target.name for target in loaded} != now.keys():
        return None
    if any(t.layout.part_names != now[t.name].layout.part_names for t in loaded):
        return None
    try:
        plan = prove_bindings(
            [now[target.name] for target in loaded],
            origin.checkpoint.tensors,
            origin.plan.bindings,
            ranks=[live.ranks],
            ties=origin.plan.ties,
            skipped=origin.plan.skipped,
        )
    except LadingError:
        return None
    return Origin(plan=plan, checkpoint=origin.checkpoint)


def _built_for(model: nn.Module) -> Ranks:
    """The rank that a model's layers were built for; one of one where none is cut."""
    found = {m.ranks for m in model.modules() if isinstance(m, ParallelLayer) and m.tp_size > 1}
    if len(found) > 1:
        raise CallError(
            f"has layers built for {' and '.join(sorted(map(str, found)))}, needs one rank",
            subject=type(model).__name__,
        )
    return found.pop() if found else Ranks()


def _check_not_packed(model: nn.Module) -> None:
    problems: list[LadingError] = [
        DeclarationError(
            f"holds its weights in the format of {type(module.kernel).__name__}, needs the stored "
            "form",
            subject=name,
            hint="layer.restore_weights() before the reshard",
        )
        for name, module in model.named_modules()
        if isinstance(module, ParallelLayer) and module.kernel is not None
    ]
    if problems:
        raise PlanError(problems, what="the target model")


def _choose_gpu(own: _Own, default: torch.device, place: Ranks, group: ProcessGroup | None) -> None:
    """Makes this process' GPU the current one: NCCL's own calls go by that."""
    models = [live for live in (own.source, own.target) if live is not None]
    tensors = [tensor for live in models for tensor in live.tensors.values()]
    found = next((tensor.device for tensor in tensors if tensor.is_cuda), default)
    if found.type != "cuda" and group is not None and not ranks_module.carries(group, "cpu"):
        found = ranks_module.gpu_of(group) or placing.default_device(place)
    if found.type == "cuda":
        torch.cuda.set_device(found)


def _side(model: nn.Module | Plan | None, live: Live | None) -> _Side | None:
    if live is None or not isinstance(model, nn.Module):
        return None
    kept = _kept(live.targets)
    return _Side(
        ranks=live.ranks,
        names=names_of(model),
        targets=kept if live.ranks.tp_rank == 0 else None,
        fingerprint=_fingerprint(kept),
    )


def _kept(targets: Sequence[Target]) -> tuple[Target, ...]:
    """Those that are parameters: constants follow from the declaration on either side."""
    return tuple(target for target in targets if target.expected is None)


def _fingerprint(targets: Sequence[Target]) -> str:
    """Equal for the ranks of one model."""
    facts = [(t.name, t.dtype, t.layout.local_shape, t.layout.tp_size) for t in _kept(targets)]
    return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()


# ------------------------------------------------------------------------------- what goes where


def _prepare(
    own: _Own,
    offers: Sequence[_Offer],
    target: nn.Module | None,
    place: Ranks,
    group: ProcessGroup | None,
    buffer_bytes: int,
) -> tuple[Carrier, str]:
    """This process' share of the plans that follow from what all have told; a digest of them."""
    senders = _places([offer.source for offer in offers], "source")
    receivers = _places([offer.target for offer in offers], "target")
    before, after = _plans(offers)
    described = _fingerprint(before.targets)
    for number, offer in enumerate(offers):
        if offer.plan not in (None, described):
            raise CallError(
                f"process {number} passed a plan of another model, needs that of the source",
                subject="source",
            )

    def in_one_process(sender: Ranks, receiver: Ranks) -> bool:
        return set(receivers[receiver]) <= set(senders[sender])

    found = routes(before, after, same_process=in_one_process)
    todo = messages.schedule(
        found,
        process=place.tp_rank,
        senders=senders,
        receivers=receivers,
        dtype_of=lambda name: before.target(name).dtype,
        buffer_bytes=buffer_bytes,
    )
    types = frozenset(kind for offer in offers for kind in offer.device_types)
    on_gpu = group is not None and _on_gpu(group, types)
    digest = hashlib.sha256(f"{before.digest} {after.digest} {len(found)} {on_gpu}".encode())
    share = after.share(own.target.ranks) if own.target is not None else None
    carrier = Carrier(
        source=own.source,
        target=own.target,
        model=target,
        after=after,
        share=share,
        todo=todo,
        place=place,
        group=group,
        on_gpu=on_gpu,
    )
    return carrier, digest.hexdigest()


def _on_gpu(group: ProcessGroup, types: frozenset[str]) -> bool:
    """Whether messages are in GPU memory: where all models are, if the group can, or if it must."""
    if types == {"cuda"} and ranks_module.carries(group, "cuda"):
        return True
    return not ranks_module.carries(group, "cpu")


def _places(sides: Sequence[_Side | None], what: str) -> dict[Ranks, tuple[int, ...]]:
    """The processes that hold each rank of a model. Raises a CallError where one is nowhere."""
    found: dict[Ranks, tuple[int, ...]] = {}
    first = None
    for number, side in enumerate(sides):
        if side is None:
            continue
        found[side.ranks] = (*found.get(side.ranks, ()), number)
        if first is None:
            first = number, side
        if side.ranks.tp_size != first[1].ranks.tp_size:
            raise CallError(
                f"is {first[1].ranks} on process {first[0]} and {side.ranks} on process {number}, "
                "needs ranks of one model",
                subject=what,
            )
        if side.fingerprint != first[1].fingerprint:
            raise CallError(
                f"has other parameters on process {number} than on process {first[0]}, needs the "
                "same model on all ranks",
                subject=what,
            )
    if first is None:
        raise CallError("no process of the group has one, needs every rank of it", subject=what)
    size = first[1].ranks.tp_size
    missing = [ranks for ranks in all_ranks(size) if ranks not in found]
    if missing:
        raise CallError(
            f"no process of the group has {', '.join(map(str, missing))}, needs every rank",
            subject=what,
        )
    return found


def _plans(offers: Sequence[_Offer]) -> tuple[Plan, Plan]:
    """Both models' plans of all ranks, over the tensors that a checkpoint of theirs would have.

    Each by its own naming rules; by the rules without renames where only those agree: a model that
    was loaded knows how its checkpoint was spelt, a new one does not.
    """
    source = next(o.source for o in offers if o.source is not None and o.source.targets is not None)
    target = next(o.target for o in offers if o.target is not None and o.target.targets is not None)
    found = [
        (_plan(source, one, twins=True), _plan(target, two, twins=False))
        for one, two in ((source.names, target.names), (_plain(source), _plain(target)))
    ]
    fitting = (pair for pair in found if pair[1].sources.keys() <= pair[0].sources.keys())
    return next(fitting, found[0])


def _plain(side: _Side) -> Names:
    return replace(side.names, renames=(), others=())


def _plan(side: _Side, names: Names, *, twins: bool) -> Plan:
    """A model's plan; with `twins` its tied weights go by all their names.

    Those of a target do not: from two tensors that differ no tied one can be made.
    """
    assert side.targets is not None, "the caller has chosen one with targets"
    live = Live(ranks=side.ranks, targets=side.targets, tensors={})
    plan = plan_from_names(live, names, all_ranks(side.ranks.tp_size))
    if not twins:
        return plan
    ties: list[Tie] = []
    sources = dict(plan.sources)
    for target in side.targets:
        first = [source for _, source in stored_parts(target, names)]
        for alias in target.aliases:
            other = replace(target, name=alias, aliases=())
            for one, (_, twin) in zip(first, stored_parts(other, names), strict=True):
                if twin.name not in sources:
                    sources[twin.name] = twin
                    ties.append(Tie(target=target.name, source=one.name, twin=twin.name))
    return replace(plan, sources=sources, ties=tuple(ties))
