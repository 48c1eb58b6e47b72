"""The sums of `digests` of torch tensors, wherever they are: what numpy gives of the same bytes.

Tensors in host memory are summed where they lie, by numpy. On other devices the sums are made there
in 64-bit integers, whose arithmetic wraps and so is exact in any order; what comes back is six
numbers. Nothing is written into a tensor, and no more than a block of one is copied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lading import dtypes, writing
from lading.digests.rows import NUM_LANES, Tile, column_parts, row_weights, tiles_of
from lading.digests.sums import Sums, check_region, point_sums, row_bytes, sums_of
from lading.errors import CallError
from lading.regions import Copy, Region

__all__ = ["copy_sums", "sums_of_tensor"]

BLOCK_UNITS = 2**22
"""Words that a device converts at a time, some 100 MB of its memory. An H200 sums 29 GB/s of bf16
with it, 8 with 2^20, 40 with 2^25."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sums_of_tensor(
    dtype: str, shape: tuple[int, ...], region: Region, values: torch.Tensor
) -> Sums:
    """The sums of the elements of a region of a checkpoint tensor of this dtype and shape.

    values   the elements, of the region's sizes; any strides, any device that has int64
    Raises a CallError where sizes do not fit.
    """
    item = check_region(dtype, shape, region)
    if values.element_size() != item or tuple(values.shape) != region.size:
        raise CallError(
            f"is {values.dtype}{list(values.shape)}, needs elements of {item} bytes "
            f"{list(region.size)}",
            subject=f"region {region}",
        )
    bits = values.detach().view(_BITS[item])
    if bits.device.type == "cpu":
        return sums_of(dtype, shape, region, _array(bits))
    lanes = torch.zeros(NUM_LANES, dtype=torch.int64, device=bits.device)
    for tile in tiles_of(region, row_bytes(dtype, shape), item):
        part = bits
        if tile.num_elements != region.num_elements:
            bits = bits.reshape(-1)
            part = bits[tile.first : tile.first + tile.num_elements]
        if tile.is_grid:
            lanes += grid_sums(tile, part, item)
        else:
            found = point_sums(tile, _array(part.cpu()), item)
            lanes += torch.from_numpy(found.view(np.int64)).to(lanes.device)
    return Sums(
        lanes=tuple(lane % 2**64 for lane in lanes.tolist()), num_elements=region.num_elements
    )


def _array(bits: torch.Tensor) -> Any:
    return bits.numpy()


def grid_sums(tile: Tile, bits: torch.Tensor, item: int) -> torch.Tensor:
    """int64 [lanes] of a grid, on the tensor's device: `digests.grid_sums` in integers."""
    bits = bits.reshape(len(tile.rows), len(tile.columns))
    lanes = torch.zeros(NUM_LANES, dtype=torch.int64, device=bits.device)
    for columns, weights in column_parts(tile.columns, item):
        of_lanes = torch.from_numpy(np.ascontiguousarray(weights.integers.T)).to(bits.device)
        ones = torch.from_numpy(weights.ones.view(np.int64)[:, None]).to(bits.device)
        step = max(BLOCK_UNITS // len(weights.integers), 1)
        for at in range(0, len(tile.rows), step):
            units = _units(bits[at : at + step, columns], weights.are_words)
            sums = torch.stack([(units * weight).sum(1) for weight in of_lanes]) + ones
            rows = np.ascontiguousarray(row_weights(tile.rows[at : at + step]).T)
            lanes += (sums * torch.from_numpy(rows.view(np.int64)).to(bits.device)).sum(1)
    return lanes


def _units(bits: torch.Tensor, are_words: bool) -> torch.Tensor:
    """[rows, elements] -> int64 [rows, words] or [rows, bytes]."""
    if not are_words:
        return bits.to(torch.int64)
    flat = bits.reshape(-1).contiguous()
    if flat.element_size() == 1 and flat.storage_offset() % 2:
        flat = flat.clone()  # torch views bytes as words only from an even address on
    return flat.view(torch.int16).view(len(bits), -1).to(torch.int64) & 0xFFFF


def copy_sums(copy: Copy, dtype: str, shape: tuple[int, ...], tensor: torch.Tensor) -> Sums:
    """The sums of a copy's source region, from the parameter that is its target.

    dtype, shape   of the checkpoint tensor; the parameter is of the same dtype
    """
    if tensor.dtype != dtypes.to_torch(dtype):
        raise CallError(
            f"is {tensor.dtype}, needs {dtypes.printed(dtype)} (the checkpoint's)",
            subject=copy.target,
        )
    values = writing.view_of(tensor.detach(), copy.target_region)
    if copy.axes:
        values = values.permute(copy.invert().axes)
    total = Sums()
    for inner in row_blocks(copy.source_region.size):
        region = copy.source_region.compose(inner)
        total += sums_of_tensor(dtype, shape, region, writing.view_of(values, inner))
    return total


def row_blocks(size: tuple[int, ...]) -> list[Region]:
    """Boxes of a few rows each, so that what has to be copied is small; in order."""
    whole = Region.whole(size)
    dim = next((d for d, n in enumerate(size) if n > 1), None)
    if dim is None or whole.num_elements <= BLOCK_UNITS:
        return [whole]
    step = max(size[dim] * BLOCK_UNITS // whole.num_elements, 1)
    rest = [(0, n) for n in size]
    return [
        Region.box(size, [*rest[:dim], (at, min(at + step, size[dim])), *rest[dim + 1 :]])
        for at in range(0, size[dim], step)
    ]
