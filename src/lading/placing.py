"""Where parameters lie: the device of a rank, memory for parameters on meta, and its hand-over."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lading import writing
from lading.errors import CallError, DeclarationError, LadingError, PlanError
from lading.ledger import Ledger, Place
from lading.ledger import place_of as ledger_place
from lading.nn.base import like
from lading.owners import Walk
from lading.parameter import BasevLLMParameter
from lading.plan import Plan
from lading.ranks import Ranks
from lading.regions import Region
from lading.targeting import tensors_of

__all__ = [
    "Notes",
    "check_memory",
    "default_device",
    "install",
    "known_device",
    "memory_for",
    "note_written",
    "place_of",
]


def memory_for(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Memory of a meta tensor's shape and strides.

    Not `empty_like`: of a meta tensor that imports sympy, a second or two in a new process.
    """
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=place)


def place_of(device: torch.device | str | None, ranks: Ranks) -> torch.device:
    """The device of parameters on meta; "cuda" without a number is this rank's GPU.

    Raises a CallError for a device that torch does not know, or that has no memory.
    """
    if device is None:
        return default_device(ranks)
    place = known_device(device)
    if place.type == "meta":
        raise CallError("is meta, needs one that has memory", subject="device")
    if place.type != "cuda":
        return place
    if not torch.cuda.is_available():
        raise CallError(f"is {str(place)!r}, but this process sees no GPU", subject="device")
    return default_device(ranks) if place.index is None else place


def known_device(device: torch.device | str) -> torch.device:
    """Raises a CallError for a device that torch does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        words = str(error).partition("\n")[0]
        raise CallError(
            f"is {device!r}, needs a device of torch ({words})", subject="device"
        ) from None


def default_device(ranks: Ranks) -> torch.device:
    """This rank's GPU (LOCAL_RANK, else the TP rank, modulo the GPUs), or the CPU where there is
    none.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", ranks.tp_rank))
    return torch.device("cuda", local % torch.cuda.device_count())


@dataclass(slots=True)
class Notes:
    """What is to be noted of live parameters once they are loaded.

    Made while their bytes are being moved, as nobody has to wait for it then.
    """

    _notes: list[tuple[BasevLLMParameter, Ledger, Region, Place]]

    @staticmethod
    def of(tensors: Iterable[torch.Tensor]) -> Notes:
        """Of those tensors that keep a ledger."""
        wholes: dict[tuple[int, ...], Region] = {}
        notes = []
        for tensor in tensors:
            if isinstance(tensor, BasevLLMParameter):
                place = ledger_place(tensor)
                whole = wholes.get(tensor.shape)
                if whole is None:
                    whole = wholes[tensor.shape] = Region.whole(tensor.shape)
                notes.append((tensor, tensor._ledger, whole, place))
        return Notes(notes)

    def write(self) -> None:
        """Every element of them is loaded."""
        for tensor, ledger, whole, place in self._notes:
            ledger.note_all(tensor, whole, place)
            if tensor.stored_order:
                tensor.stored_order = ()  # the file had its dims in the order that they have now


def check_memory(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a PlanError with all parameters whose elements share memory, with one another or with
    another parameter's: whatever is written last would be in both.

    Of tensors that are not row-major only the first element is looked at: what lies between theirs
    may be another's.
    """
    problems: list[LadingError] = []
    spans: dict[torch.device, list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        device = tensor.device
        if device.type not in ("cpu", "cuda"):
            continue
        if not tensor.is_contiguous() and _is_expanded(tensor):
            fact = "has elements that share memory (it was expanded), needs one place for each"
            problems.append(DeclarationError(fact, subject=name))
            continue
        first, stop = writing.memory_of(tensor)
        if stop > first:
            spans.setdefault(device, []).append((first, stop, name))
    for of_device in spans.values():
        reached, other = 0, ""
        for first, stop, name in sorted(of_device):
            if first < reached:
                fact = f"lies in the memory of {other}, needs its own"
                hint = "register one nn.Parameter under both names, or give each its own memory"
                problems.append(DeclarationError(fact, subject=name, hint=hint))
            if stop > reached:
                reached, other = stop, name
    if problems:
        raise PlanError(problems, what="the model")


def _is_expanded(tensor: torch.Tensor) -> bool:
    return any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def note_written(tensors: Iterable[torch.Tensor]) -> None:
    """Tells autograd that tensors were written in place, by whatever means: a backward pass that
    needs what was in them before then says so.
    """
    for tensor in tensors:
        if not tensor.is_meta and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def install(
    model: nn.Module,
    plan: Plan,
    memory: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor] | None = None,
    walk: Walk | None = None,
    notes: Notes | None = None,
) -> None:
    """Gives parameters on meta their memory, keeping each object, and notes everything as
    loaded.

    tensors, walk   what `tensors_of` has found in the model, and a walk over it, where somebody
                    has them
    notes           of the tensors, where none is on meta and somebody has made them
    """
    tensors = tensors_of(model, plan, walk) if tensors is None else tensors
    note_written(tensors.values())
    if any(tensor.is_meta for tensor in tensors.values()):
        for name, tensor in tensors.items():
            if tensor.is_meta:
                _materialise(model, name, tensor, memory[name])
        tensors = tensors_of(model, plan)
        notes = None
    (notes or Notes.of(tensors.values())).write()


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
