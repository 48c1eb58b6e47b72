"""A model's parameters as the checkpoint stores them: the reading side of export.

`live_parameters` refuses a model whose stored form is gone (a kernel's own format, a load that
failed) and undoes permuted dims; `blocks` gives the bytes of one copy, piece by piece, in the
dtype of the file. Nothing is written into a parameter, and no more than a block is copied.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lading import dtypes, writing
from lading.errors import DeclarationError, DtypeError, LadingError, PlanError
from lading.nn import ParallelLayer
from lading.nn.base import LoadableModule, check_usable
from lading.parameter import BasevLLMParameter
from lading.plan import Target
from lading.ranks import Ranks
from lading.regions import Copy, Ints, Region, reordered
from lading.targeting import state_of, targets_of

__all__ = ["Live", "blocks", "boxes", "bytes_of", "has_bits", "live_parameters", "stored_form"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """One rank's parameters, their dims in the order of the stored form.

    targets   what a load would fill, and the constants that it would compare
    tensors   by target's name: views of the parameters
    """

    ranks: Ranks
    targets: tuple[Target, ...]
    tensors: Mapping[str, torch.Tensor]


def live_parameters(model: nn.Module, ranks: Ranks) -> Live:
    """The parameters (and persistent buffers) that an export reads.

    Raises a NotLoadedError where weights are missing or half-written, a PlanError where a kernel
    holds weights in a format of its own, or a parameter does not say how it is cut.
    """
    check_usable(model)
    problems: list[LadingError] = []
    for name, module in model.named_modules():
        if isinstance(module, LoadableModule):
            module.require_loaded()
        if isinstance(module, ParallelLayer) and module.kernel is not None:
            problems.append(_packed(name, module))
    if problems:
        raise PlanError(problems, what="the model")
    return stored_form(model, ranks)


def stored_form(model: nn.Module, ranks: Ranks) -> Live:
    """The parameters with their dims in the order of the stored form, whatever they hold.

    Raises a PlanError where a parameter does not say how it is cut.
    """
    state = dict(state_of(model))
    targets, tensors = [], {}
    for target in targets_of(model, ranks):
        if target.expected is None:
            tensor = state[target.name]
            order = tensor.stored_order if isinstance(tensor, BasevLLMParameter) else ()
            if order:
                back = tuple(order.index(dim) for dim in range(len(order)))
                target = replace(target, layout=target.layout.permuted(back))
                tensors[target.name] = tensor.detach().permute(back)
            else:
                tensors[target.name] = tensor.detach()
        targets.append(target)
    return Live(ranks=ranks, targets=tuple(targets), tensors=tensors)


def _packed(name: str, layer: ParallelLayer) -> LadingError:
    kernel: Any = layer.kernel
    hint = "layer.restore_weights() before the export" if kernel.unpack is not None else None
    way = "" if hint else " (the kernel declares no way back: load the model again)"
    return DeclarationError(
        f"holds its weights in the format of {type(kernel).__name__}, needs the stored form{way}",
        subject=name,
        hint=hint,
    )


def blocks(
    tensor: torch.Tensor, copy: Copy, dtype: str, limit_bytes: int
) -> Iterator[tuple[Region, memoryview]]:
    """The bytes of a copy's source region, read from its target: (region, bytes in row order).

    tensor       the copy's target, with the values
    dtype        of the checkpoint tensor; a change of dtype that loses a bit is a DtypeError
    limit_bytes  of a block; regions are in the checkpoint tensor's coordinates, one after the other
    The bytes are the parameter's own memory where they lie there in that order, and are not to be
    written to; else a copy that is valid until the next block.
    """
    wanted = dtypes.to_torch(dtype)
    back = copy.invert().axes
    limit = max(limit_bytes // dtypes.storage_bytes(dtype), 1)
    for inner in boxes(copy.source_region.size, limit):
        into = reordered(inner, copy.axes) if copy.axes else inner
        target_region = copy.target_region.compose(into)
        own = None
        if not copy.axes and tensor.dtype == wanted:
            own = writing.memory(tensor, target_region)
        if own is None:
            values = writing.view_of(tensor, target_region)
            own = bytes_of(values.permute(back) if back else values, dtype)
        yield copy.source_region.compose(inner), own


def boxes(size: Ints, limit: int) -> Iterator[Region]:
    """Boxes of at most `limit` elements whose row-major elements, one box after the other, are
    those of a tensor of this size.
    """
    yield from _cut(Region.whole(size), limit, 0)


def _cut(box: Region, limit: int, dim: int) -> Iterator[Region]:
    if box.num_elements <= limit or dim == len(box.size):
        if box.num_elements:
            yield box
        return
    row = box.num_elements // box.size[dim]
    count = max(limit // row, 1)
    for at in range(0, box.size[dim], count):
        size = min(count, box.size[dim] - at)
        start = (*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :])
        sizes = (*box.size[:dim], size, *box.size[dim + 1 :])
        narrow = Region(shape=box.shape, start=start, size=sizes, step=box.step)
        yield from _cut(narrow, limit, dim + 1)


def bytes_of(values: torch.Tensor, dtype: str) -> memoryview:
    """The values in row-major order, as the bytes of a file of this dtype: of a GPU's values valid
    until this thread's next call.

    Raises a DtypeError where the change of dtype loses a bit.
    """
    values = _as_stored(values.detach(), dtypes.to_torch(dtype))
    if values.element_size() == 1:
        values = values.view(torch.uint8)  # not every torch copies fp4 otherwise
    flat = writing.byte_view(values.contiguous())
    if not flat.numel():
        return memoryview(b"")
    flat = _fetched(flat) if flat.is_cuda else flat.cpu()
    array: Any = flat.numpy()  # its stubs declare no buffer
    return memoryview(array).cast("B")


class _Thread(threading.local):
    locked: torch.Tensor | None = None


_thread = _Thread()


def _fetched(flat: torch.Tensor) -> torch.Tensor:
    """Bytes of a GPU in page-locked memory of this thread: other memory the driver copies twice.

    They have arrived when this returns: the current stream has been waited for.
    """
    locked = _thread.locked
    if locked is None or locked.numel() < flat.numel():
        locked = _thread.locked = None  # before there are two
        with torch.cuda.device(flat.device):
            locked = torch.empty(flat.numel(), dtype=torch.uint8, device="cpu", pin_memory=True)
        _thread.locked = locked
    room = locked[: flat.numel()]
    writing.write(room, Region.whole((flat.numel(),)), flat)
    return room


def has_bits(values: torch.Tensor) -> bool:
    """Whether any bit is set; -0.0 has one."""
    if values.element_size() == 1:
        values = values.view(torch.uint8)
    return bool(writing.byte_view(values.contiguous()).any())


def _as_stored(values: torch.Tensor, wanted: torch.dtype) -> torch.Tensor:
    if values.dtype == wanted or not values.numel():
        return values.to(wanted)
    if (values.dtype, wanted) == (torch.float32, torch.bfloat16):
        # The upper half of the bits: torch's own cast would not keep the payload of a NaN.
        bits = values.contiguous().view(torch.int32)
        lost = (bits & 0xFFFF) != 0
        cast = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    else:
        cast = values.to(wanted)
        if writing.same_bits(cast.to(values.dtype), values):
            return cast
        again = cast.to(values.dtype)
        lost = (again != values) & ~(again.isnan() & values.isnan())
    if bool(lost.any()):
        have, want = (dtypes.printed(dtypes.from_torch(d)) for d in (values.dtype, wanted))
        raise DtypeError(
            f"{int(lost.sum())} values of {have} are no {want} values, needs a cast that loses "
            f"nothing ({want} is the checkpoint's dtype)",
            hint=f"model.to({wanted}) before the export, or as_new=True (a file in {have})",
        )
    return cast
