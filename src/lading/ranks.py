"""Who am I among the ranks: a value, and the one place that asks torch.distributed.

Everything else takes `Ranks` as an argument. The drop-in constructors of `lading.parameter` and
`lading.nn` call `current()` by default, because code written against the field's classes passes
none.

The collectives that lading needs stand here too, so that torch.distributed is imported by one file:
`exchange` (every rank's verdict, for loading), `send_and_receive` and `swap` (for resharding and
loading), `all_reduce` and `all_gather` (for forward passes).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lading.errors import CallError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Ranks", "all_ranks", "as_current", "current", "explicit_current", "set_current"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """One rank's place among the tensor-parallel ranks, and among the expert-parallel ones.

    Raises a CallError where a rank is not in 0 .. size - 1.
    """

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1

    def __post_init__(self) -> None:
        for name, rank, size in (
            ("tp", self.tp_rank, self.tp_size),
            ("ep", self.ep_rank, self.ep_size),
        ):
            for field, value in ((f"{name}_rank", rank), (f"{name}_size", size)):
                if not isinstance(value, int) or isinstance(value, bool):
                    raise CallError(f"{field} is {value!r}, needs an int", subject="Ranks")
            if size < 1:
                raise CallError(f"{name}_size is {size}, needs at least 1", subject="Ranks")
            if not 0 <= rank < size:
                raise CallError(
                    f"{name}_rank is {rank}, needs 0 to {size - 1} ({name}_size is {size})",
                    subject="Ranks",
                )

    def __str__(self) -> str:
        text = f"rank {self.tp_rank} of {self.tp_size}"
        return (
            text if self.ep_size == 1 else f"{text}, expert rank {self.ep_rank} of {self.ep_size}"
        )


def all_ranks(tp_size: int) -> tuple[Ranks, ...]:
    """Every rank of a tensor-parallel group, in order."""
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        raise CallError(f"tp_size is {tp_size!r}, needs an int of at least 1", subject="all_ranks")
    return tuple(Ranks(tp_rank=rank, tp_size=tp_size) for rank in range(tp_size))


class _Local(threading.local):
    value: Ranks | None = None


_local = _Local()


def set_current(ranks: Ranks | None) -> None:
    """The rank that this thread's constructors and loads see; None asks torch.distributed."""
    if ranks is not None and not isinstance(ranks, Ranks):
        raise CallError(f"is {ranks!r}, needs a Ranks or None", subject="set_current")
    _local.value = ranks


def explicit_current() -> Ranks | None:
    """What `set_current` set in this thread, None where it set nothing."""
    return _local.value


@contextmanager
def as_current(ranks: Ranks | None) -> Iterator[None]:
    """`set_current` for a block; restores what was before, also after an exception."""
    before = _local.value
    set_current(ranks)
    try:
        yield
    finally:
        _local.value = before


def current() -> Ranks:
    """What `set_current` set in this thread, else the world of torch.distributed, else one rank."""
    return _local.value if _local.value is not None else world()


def world() -> Ranks:
    """The process's rank in torch.distributed's default group; one rank where there is none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(tp_rank=dist.get_rank(), tp_size=dist.get_world_size())


def join_world(*, device_type: str) -> bool:
    """Joins the process group that a launcher (torchrun) described in the environment.

    Returns whether it joined: False where a group exists already or no launcher started us. NCCL
    for CUDA, gloo otherwise.
    """
    import torch.distributed as dist

    if not dist.is_available() or dist.is_initialized():
        return False
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return False
    if device_type == "cuda":
        import torch

        if not torch.cuda.device_count():
            raise CallError("is 'cuda', but this process sees no GPU", subject="device")
        # What NCCL is asked for first goes by the current GPU, which is 0 in every new process.
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        torch.cuda.set_device(local % torch.cuda.device_count())
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return True


def join_file(path: str, *, ranks: Ranks, device_type: str) -> None:
    """Joins a group of processes of one host that meet in a file."""
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{path}",
        rank=ranks.tp_rank,
        world_size=ranks.tp_size,
    )


def leave_world() -> None:
    """Leaves the default process group, if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def group_of(ranks: Ranks, group: ProcessGroup | None) -> ProcessGroup | None:
    """The process group over which these ranks agree, None where this process acts alone.

    With no group given it is the default one, if `ranks` is this process's own place in it: a dry
    run that loops over ranks in one process is alone. Raises a CallError where a given group
    disagrees.
    """
    import torch.distributed as dist

    if group is not None:
        place = (dist.get_rank(group), dist.get_world_size(group))
        if place != (ranks.tp_rank, ranks.tp_size):
            raise CallError(
                f"the process group says rank {place[0]} of {place[1]}, needs {ranks}",
                subject="group",
            )
        return group if ranks.tp_size > 1 else None
    if ranks.tp_size == 1 or world() != ranks:
        return None
    return dist.group.WORLD


def num_local(group: ProcessGroup | None) -> int:
    """How many ranks of the group run on this host: LOCAL_WORLD_SIZE, which torchrun sets, else all
    of them.
    """
    if group is None:
        return 1
    import torch.distributed as dist

    size = dist.get_world_size(group)
    told = os.environ.get("LOCAL_WORLD_SIZE", "")
    return min(size, int(told)) if told.isdecimal() and int(told) else size


def exchange(value: Any, group: ProcessGroup | None) -> list[Any]:
    """Every rank's value, in rank order; the one collective that loading calls to reach a verdict.

    Values are pickled: they come from the ranks of the caller's own group, never from a file.
    """
    if group is None:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * dist.get_world_size(group)
    if dist.get_backend(group) == "nccl":
        import torch

        # A group that was bound to a GPU means that one, whatever the current one is.
        bound = gpu_of(group)
        with nullcontext() if bound is None else torch.cuda.device(bound):
            return _exchange_on_gpu(value, len(values), group)
    if dist.get_backend(group) == "gloo":
        return _exchange_on_cpu(value, len(values), group)
    dist.all_gather_object(values, value, group=group)
    return values


def gpu_of(group: ProcessGroup) -> torch.device | None:
    """The GPU that a group was bound to when it was made (`device_id=`), None where it was not."""
    return group.bound_device_id


NOTE_BYTES = 4096


def _exchange_on_gpu(value: Any, size: int, group: ProcessGroup) -> list[Any]:
    """As all_gather_object, in one collective instead of two where the values are small: verdicts
    are, and each collective that the host waits for costs a millisecond.
    """
    import torch
    import torch.distributed as dist

    note = _note(value)
    notes = torch.empty(size * len(note), dtype=torch.uint8, device="cuda")
    dist.all_gather_into_tensor(notes, note.to("cuda"), group=group)
    return _values(notes.cpu(), value, size, group)


def _exchange_on_cpu(value: Any, size: int, group: ProcessGroup) -> list[Any]:
    """The same with gloo."""
    import torch
    import torch.distributed as dist

    note = _note(value)
    notes = torch.empty(size, len(note), dtype=torch.uint8, device="cpu")
    dist.all_gather(list(notes), note, group=group)
    return _values(notes.view(-1), value, size, group)


def _note(value: Any) -> torch.Tensor:
    """A value's length as pickled, and its bytes where they are few; of one size on all ranks."""
    import pickle

    import torch

    data = pickle.dumps(value)
    kept = data if len(data) <= NOTE_BYTES else b""
    note = bytearray(len(data).to_bytes(8, "little") + kept.ljust(NOTE_BYTES, b"\0"))
    return torch.frombuffer(note, dtype=torch.uint8)


def _values(notes: torch.Tensor, value: Any, size: int, group: ProcessGroup) -> list[Any]:
    """What the notes of all ranks say; by another way where one of them had no room."""
    import pickle

    import torch.distributed as dist

    data: bytes = notes.numpy().tobytes()
    found = [data[at : at + 8 + NOTE_BYTES] for at in range(0, len(data), 8 + NOTE_BYTES)]
    lengths = [int.from_bytes(one[:8], "little") for one in found]
    if max(lengths) > NOTE_BYTES:  # all ranks see the same lengths
        values: list[Any] = [None] * size
        dist.all_gather_object(values, value, group=group)
        return values
    return [pickle.loads(one[8 : 8 + n]) for one, n in zip(found, lengths, strict=True)]


def meeting(group: ProcessGroup | None) -> tuple[ProcessGroup | None, Ranks]:
    """The group in which processes meet that are no ranks of one model, and this one's place in it.

    With none given it is the default one. The group is None where this process is alone.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None, Ranks()
    size = dist.get_world_size(group)
    if size < 2:
        return None, Ranks()
    return group or dist.group.WORLD, Ranks(tp_rank=dist.get_rank(group), tp_size=size)


def carries(group: ProcessGroup, device_type: str) -> bool:
    """Whether the group sends tensors in "cpu" or "cuda" memory: gloo the one, NCCL the other."""
    import torch.distributed as dist

    backends = dist.get_backend_config(group)
    found = dict(pair.split(":", 1) for pair in backends.split(",") if ":" in pair)
    backend = found.get(device_type, backends)
    return ("nccl" in backend) == (device_type == "cuda")


def send_and_receive(
    sends: Mapping[int, torch.Tensor], receives: Mapping[int, torch.Tensor], group: ProcessGroup
) -> None:
    """One message to and from each of these ranks of the group; returns when all have arrived.

    Both ends name one another in the same call, and their tensors have equal sizes. With NCCL it is
    the current stream that waits.
    """
    swap(list(sends.items()), list(receives.items()), group)


def swap(
    sends: Sequence[tuple[int, torch.Tensor]],
    receives: Sequence[tuple[int, torch.Tensor]],
    group: ProcessGroup,
) -> None:
    """`send_and_receive` of any number of messages (rank, tensor) to and from each rank; those of a
    pair of ranks arrive in the order in which both name them.
    """
    import torch.distributed as dist

    operations = [
        dist.P2POp(what, tensor, dist.get_global_rank(group, peer), group)
        for what, messages in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in messages
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()


def _needs_group(tensor: torch.Tensor, ranks: Ranks, group: ProcessGroup | None) -> ProcessGroup:
    found = group_of(ranks, group)
    if found is None:
        raise CallError(
            f"{ranks} has to combine a tensor of shape {list(tensor.shape)} with the other ranks, "
            "but this process is in no process group of that size",
            subject="forward",
            hint="start the ranks with torchrun, or pass group= to the layer",
        )
    return found


def all_reduce(tensor: torch.Tensor, ranks: Ranks, group: ProcessGroup | None) -> torch.Tensor:
    """The sum over the ranks of tensors of one shape."""
    if ranks.tp_size == 1:
        return tensor
    import torch.distributed as dist

    dist.all_reduce(tensor, group=_needs_group(tensor, ranks, group))
    return tensor


def all_gather(tensor: torch.Tensor, ranks: Ranks, group: ProcessGroup | None) -> torch.Tensor:
    """Tensors [..., n] of every rank, side by side along the last dim: [..., tp_size * n]."""
    if ranks.tp_size == 1:
        return tensor
    import torch
    import torch.distributed as dist

    tensor = tensor.contiguous()
    pieces = [torch.empty_like(tensor) for _ in range(ranks.tp_size)]
    dist.all_gather(pieces, tensor, group=_needs_group(tensor, ranks, group))
    return torch.cat(pieces, dim=-1)
