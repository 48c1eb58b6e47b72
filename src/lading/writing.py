"""The one place that writes into parameters.

Ways in: `write` copies a tensor into a region of a parameter, `fill` zeroes declared padding,
`memory` hands out the bytes of a contiguous region so that a file can be read straight into them,
`landing` those that a message can be received into, `address` says where a parameter's memory
begins. Nobody else calls `copy_`, `fill_` or asks for an address.

Regions are in the parameter's own local coordinates, possibly of a reshaped view of it.
"""

from __future__ import annotations

from typing import Any

import torch

from lading import dtypes
from lading.errors import DtypeError
from lading.regions import Copy, Region

__all__ = [
    "address",
    "check_dtypes",
    "check_values",
    "fill",
    "landing",
    "memory",
    "same_bits",
    "view_of",
    "write",
]


def view_of(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The elements of a region as a view: view operations only, so that lazy tensors stay lazy."""
    if tuple(tensor.shape) != region.shape:
        tensor = tensor.reshape(region.shape)
    for dim, (n, start, size, step) in enumerate(
        zip(region.shape, region.start, region.size, region.step, strict=True)
    ):
        if step != 1 and size > 1:
            index = (slice(None),) * dim + (slice(start, start + (size - 1) * step + 1, step),)
            tensor = tensor[index]
        elif size != n:
            tensor = tensor.narrow(dim, start, size)
    return tensor


def permuted(tensor: torch.Tensor, copy: Copy) -> torch.Tensor:
    """A source view with its dims in the target's order."""
    return tensor.permute(copy.axes) if copy.axes else tensor


def write(target: torch.Tensor, region: Region, values: torch.Tensor) -> None:
    """Copies `values`, of the region's sizes, into that region of `target`; one `copy_`.

    The caller has checked shape and dtype; a shape that would broadcast is our own bug.
    """
    view = _own_view(target, region)
    assert view.shape == values.shape, "shapes are checked before anything is written"
    with torch.no_grad():
        if values.dtype == view.dtype == torch.float4_e2m1fn_x2:
            # torch before 2.10 copies pairs of fp4 only as the bytes that they are.
            view, values = view.view(torch.uint8), values.view(torch.uint8)
        view.copy_(values)


def fill(target: torch.Tensor, region: Region) -> None:
    """Zeroes a region: declared padding, nothing else is ever filled."""
    _own_view(target, region).zero_()


def _own_view(target: torch.Tensor, region: Region) -> torch.Tensor:
    """`view_of` for writing: never a copy, in which what is written would be lost unnoticed."""
    same = tuple(target.shape) == region.shape
    return view_of(target if same else target.view(region.shape), region)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as uint8 [number of bytes]."""
    flat = tensor.reshape(-1)
    if flat.stride() != (1,):  # contiguous is also one element with any stride
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8)


def memory(target: torch.Tensor, region: Region) -> memoryview | None:
    """The writable bytes of a region of a CPU parameter, None where they are not contiguous."""
    if target.device.type != "cpu" or not target.is_contiguous():
        return None
    view = view_of(target, region)
    if not view.is_contiguous():
        return None
    flat = byte_view(view.detach())
    array: Any = flat.numpy()  # its stubs declare no buffer
    return memoryview(array).cast("B") if flat.numel() else memoryview(bytearray())


def landing(target: torch.Tensor, region: Region) -> torch.Tensor | None:
    """The bytes of a region as uint8 [number of bytes], wherever they are, for a message to be
    received straight into the parameter; None where they are not contiguous.
    """
    if not target.is_contiguous():
        return None
    view = view_of(target.detach(), region)
    return byte_view(view) if view.is_contiguous() else None


def address(tensor: torch.Tensor) -> int | None:
    """Where a tensor's memory begins, for engines that write whole runs; None where its elements
    are not row-major without gaps.
    """
    return tensor.data_ptr() if tensor.is_contiguous() else None


def memory_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor on that are its own alone: up to its last one
    where its elements are row-major without gaps, else those of its first element.
    """
    first = tensor.data_ptr()
    return first, first + (tensor.nbytes if tensor.is_contiguous() else tensor.element_size())


def check_dtypes(source: torch.dtype, target: torch.dtype) -> None:
    """Raises a DtypeError where writing `source` values into `target` could lose them unnoticed."""
    if source == target:
        return
    try:
        names = dtypes.from_torch(source), dtypes.from_torch(target)
    except LookupError as error:
        raise DtypeError(f"tensor is {source}, needs {target} ({error})") from None
    problem = dtypes.cast_problem(*names)
    if problem is not None:
        have, want = map(dtypes.printed, names)
        raise DtypeError(f"tensor is {have}, needs {want} ({problem})")


def check_values(values: torch.Tensor, target: torch.dtype) -> None:
    """Raises a DtypeError where a finite value would become infinite in `target`.

    Only plain tensors with memory are looked at: lazy and recording tensors have no values yet.
    """
    if type(values) not in (torch.Tensor, torch.nn.Parameter) or values.device.type == "meta":
        return
    floats = values.dtype.is_floating_point and target.is_floating_point
    if values.dtype == target or not floats or not values.numel():
        return
    limit = torch.finfo(target).max
    if torch.finfo(values.dtype).max <= limit:
        return
    values = values.detach()
    low, high = torch.aminmax(values)  # NaN where any value is NaN: then look at each
    largest = max(-float(low), float(high))
    if largest <= limit:
        return
    lost = torch.isfinite(values) & ~torch.isfinite(values.to(target))
    if bool(lost.any()):
        worst = float(values[lost].abs().max())
        name = dtypes.printed(dtypes.from_torch(target))
        raise DtypeError(
            f"{int(lost.sum())} values are too large for {name}: "
            f"up to {worst:g}, needs at most {limit:g}"
        )


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bytes (NaN equals the same NaN)."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    # As bytes: not every dtype can be compared (float4), and -0.0 is not 0.0.
    bits = [byte_view(tensor.detach().contiguous()) for tensor in (one, two)]
    return torch.equal(*bits)
