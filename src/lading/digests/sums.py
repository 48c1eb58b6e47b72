"""Digests of tensors that do not depend on how the tensor is cut. No torch here (see
`tensor_digests` for parameters), no files.

A `Sums` is what some of a tensor's elements contribute; sums of disjoint pieces add up, in any
order and grouping, to those of the whole, and from those comes the digest. So each rank sums what
it holds, row cuts and column cuts alike, and nothing is gathered.

Definition (version 1), of the tensor's bytes in row-major order, little-endian, as in its file:

    W         bytes of a row: those of the last dim where they are 64 to 2^18, else 8192
    p         a byte's position in the tensor; row r = p // W, column c = p % W
    s(n)      output n (from 0) of the generator splitmix64 with seed 0
    v[l](j)   s(16 j + l) >> 39, made odd: the weight of a 16-bit word of a row, below 2^25
    u[l](r)   s(16 r + 8 + l), made odd: the weight of a row
    S[l]      sum over p of (byte + 1) * 256^(c % 2) * v[l](c // 2) * u[l](r)  modulo 2^64
    digest    sha256 of the version, dtype, shape and S[0] .. S[5]; of a part also of its number of
              elements (`part_hex`)

The shape is the header's and W that of the stored bytes (F4: two values a byte); a view of the
tensor, [3, D, I] of [3 D, I], has the same bytes in the same order and so the same digest. The
tensor's name is not in it.

What it notices. A difference within one 16-bit word (a flipped bit, an element of up to 16 bits) by
proof: |difference| < 2^16, times an odd v < 2^25, is not 0, and times an odd u it is not 0 modulo
2^64, in every lane. Bytes that are missing or given twice by the +1, and by the count. All other
differences (swapped elements or rows, a shift, pages of zeros) unless all six lanes are 0 at once:
for two tensors chosen without regard to the weights, and weights drawn at random, a lane misses
with a probability of about 2^-24 (a sum of word differences times v is 0 for at most one of the
2^24 values of the last v), so the six with about 2^-144. This is multilinear hashing (Carter and
Wegman 1979; modulo a power of two: Lemire and Kaser, "Strongly universal string hashing is fast",
2014). splitmix64: Steele, Lea and Flood 2014, and Vigna's splitmix64.c.

What it does not: the weights are public and the sums linear, so whoever wants two tensors of one
digest can compute them. It finds faults, not forgers; for those there is sha256 of the files.

Why in this form: the sum over a row is exact in float64. At most 2^11 words of up to 2^16 + 256
(the +1 of both bytes included), times 2^25, stay below 2^53, whatever the order of summation; so
the processor's matrix product does it, several times as fast as multiplying 64-bit integers, and
faster than sha256 with its own instruction (benchmarks/digest.py). Only the one number a row and
lane is multiplied modulo 2^64.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from lading import dtypes
from lading.digests.rows import (
    BLOCK_ROWS,
    NUM_LANES,
    ONES,
    Tile,
    byte_weights,
    column_parts,
    row_weights,
    tiles_of,
    word_weights,
)
from lading.errors import CallError
from lading.regions import Region

__all__ = [
    "NUM_LANES",
    "Sums",
    "TensorDigest",
    "digest_of_bytes",
    "part_hex",
    "sums_of",
    "total_of",
]

Array = npt.NDArray[Any]
Buffer = bytes | bytearray | memoryview | Array
"""Bytes, or an array of elements."""

VERSION = 1
MIN_ROW_BYTES, MAX_ROW_BYTES, FLAT_ROW_BYTES = 64, 2**18, 8192
"""Of the canonical rows: shorter ones would cost a row's weights too often, longer ones a table."""

CHUNK_WORDS = 2**11
"""Words whose weighted sum is below 2^53, and so exact in float64."""

SPAN_WORDS = 2**13
"""Words of a row that are converted together: reading them goes faster than by the chunk."""

PRODUCT_WORDS = 2**15
"""Words of one matrix product: times six lanes below 2^18, from where OpenBLAS starts threads."""

BLOCK_WORDS = 2**18
"""Words converted at a time, 2 MiB of float64."""

_MASK = 2**64 - 1
_NATIVE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """What a set of elements contributes to the digest of their tensor.

    lanes          S[0] .. S[5] of these elements, modulo 2^64
    num_elements   how many they are, in stored elements (F4: bytes)
    """

    lanes: tuple[int, ...] = (0,) * NUM_LANES
    num_elements: int = 0

    def __add__(self, other: Sums) -> Sums:
        lanes = zip(self.lanes, other.lanes, strict=True)
        return Sums(
            lanes=tuple((a + b) & _MASK for a, b in lanes),
            num_elements=self.num_elements + other.num_elements,
        )


class TensorDigest:
    """The digest of one tensor, collected piece by piece in any order.

    dtype, shape   as the safetensors header has them: "BF16", elements of the dtype

    Example: `TensorDigest("BF16", (8, 6))`, `add_flat(0, first 30 elements)`, `add_flat(30, the
    rest)`, `hexdigest()`.
    """

    def __init__(self, dtype: str, shape: Sequence[int]) -> None:
        self.dtype, self.shape = dtype, tuple(shape)
        self.sums = Sums()

    def add(self, region: Region, data: Buffer) -> None:
        """Elements of a region: see `sums_of`."""
        self.sums += sums_of(self.dtype, self.shape, region, data)

    def add_flat(self, first: int, data: Buffer) -> None:
        """Neighbouring stored elements from element `first` on, in row-major order."""
        item = dtypes.storage_bytes(self.dtype)
        size, rest = divmod(_as_array(data).nbytes, item)
        if rest:
            raise CallError(
                f"has {size * item + rest} bytes, needs a multiple of {item} "
                f"({dtypes.printed(self.dtype)})",
                subject="data",
            )
        whole = num_stored(self.dtype, self.shape)
        if not 0 <= first <= first + size <= whole:
            raise CallError(
                f"is elements {first} to {first + size}, needs 0 to {whole} of "
                f"{dtypes.spell(self.dtype, self.shape)}",
                subject="data",
            )
        self.add(Region.box((whole,), ((first, first + size),)), data)

    def add_sums(self, sums: Sums) -> None:
        """What somebody else has summed."""
        self.sums += sums

    def hexdigest(self) -> str:
        """The digest. Raises a CallError unless as many elements were added as the tensor has."""
        return hex_of(self.dtype, self.shape, self.sums)


def digest_of_bytes(dtype: str, shape: Sequence[int], data: Buffer) -> str:
    """The digest of a whole tensor from its bytes in row-major order."""
    digest = TensorDigest(dtype, shape)
    digest.add_flat(0, data)
    return digest.hexdigest()


def hex_of(dtype: str, shape: Sequence[int], sums: Sums) -> str:
    """The digest of a tensor whose elements have these sums: 64 hexadecimal digits.

    Raises a CallError where the sums are not those of all its elements.
    """
    needed = num_stored(dtype, shape)
    if sums.num_elements != needed:
        raise CallError(
            f"has the sums of {sums.num_elements} elements, needs {needed} "
            f"({dtypes.spell(dtype, tuple(shape))})",
            subject="digest",
        )
    return _hex(f"lading digest {VERSION} {dtype} {list(shape)} ", sums)


def part_hex(dtype: str, shape: Sequence[int], sums: Sums) -> str:
    """The digest of some of a tensor's elements, of which the sums tell how many and where."""
    return _hex(f"lading part {VERSION} {dtype} {list(shape)} {sums.num_elements} ", sums)


def _hex(facts: str, sums: Sums) -> str:
    raw = b"".join(lane.to_bytes(8, "little") for lane in sums.lanes)
    return hashlib.sha256(facts.encode() + raw).hexdigest()


def total_of(digests: dict[str, str]) -> str:
    """One value for many tensors, by name; the order in which they are given does not matter."""
    lines = "".join(f"{name}\0{digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()


def num_stored(dtype: str, shape: Sequence[int]) -> int:
    """Stored elements of a tensor: F4 [O, I] has O * I / 2, F6 is counted in bytes."""
    return prod(shape) * dtypes.BITS[dtype] // (8 * dtypes.storage_bytes(dtype))


def row_bytes(dtype: str, shape: Sequence[int]) -> int:
    """W of a tensor."""
    last, rest = divmod((shape[-1] if shape else 1) * dtypes.BITS[dtype], 8)
    return last if not rest and MIN_ROW_BYTES <= last <= MAX_ROW_BYTES else FLAT_ROW_BYTES


def sums_of(dtype: str, shape: Sequence[int], region: Region, data: Buffer) -> Sums:
    """The sums of the elements of a region.

    region   of the tensor's stored elements, in any view of it that has as many
    data     the elements, in the region's row-major order: bytes, or an array of the stored
             elements' size (its dtype is not looked at), contiguous or not
    Raises a CallError where the numbers of elements or bytes do not fit.
    """
    item = check_region(dtype, shape, region)
    array = _elements(data, region, item)
    flat: Array | None = None
    lanes = np.zeros(NUM_LANES, np.uint64)
    for tile in tiles_of(region, row_bytes(dtype, shape), item):
        if tile.num_elements == region.num_elements:
            part = array
        else:
            flat = array.reshape(-1) if flat is None else flat
            part = flat[tile.first : tile.first + tile.num_elements]
        lanes += grid_sums(tile, part, item) if tile.is_grid else point_sums(tile, part, item)
    return Sums(lanes=tuple(int(lane) for lane in lanes), num_elements=region.num_elements)


def check_region(dtype: str, shape: Sequence[int], region: Region) -> int:
    """Bytes of a stored element; a CallError where the region is of another tensor."""
    needed = num_stored(dtype, shape)
    if prod(region.shape) != needed:
        raise CallError(
            f"is of a tensor of {prod(region.shape)} elements, needs {needed} "
            f"({dtypes.spell(dtype, tuple(shape))})",
            subject=f"region {region}",
        )
    return dtypes.storage_bytes(dtype)


def _as_array(data: Buffer) -> Array:
    return data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)


def _elements(data: Buffer, region: Region, item: int) -> Array:
    """The data as unsigned integers, of the region's sizes."""
    data = _as_array(data)
    if data.nbytes != region.num_elements * item:
        raise CallError(
            f"has {data.nbytes} bytes, needs {region.num_elements * item} "
            f"({region.num_elements} elements of {item})",
            subject=f"region {region}",
        )
    if data.itemsize != item:
        data = np.ascontiguousarray(data).reshape(-1).view(_NATIVE[item])
    return data.view(_NATIVE[item]).reshape(region.size)


# --------------------------------------------------------------------------------------------- sums


class _Thread(threading.local):
    block: Array | None = None


_thread = _Thread()


def grid_sums(tile: Tile, data: Array, item: int) -> Array:
    """uint64 [lanes] of a grid; data has its elements in order."""
    data = data.reshape(len(tile.rows), len(tile.columns))
    lanes = np.zeros(NUM_LANES, np.uint64)
    for columns, weights in column_parts(tile.columns, item):
        for at in range(0, len(tile.rows), BLOCK_ROWS):
            units = _units(data[at : at + BLOCK_ROWS, columns], weights.are_words)
            sums = np.tile(weights.ones, (len(units), 1))
            for low in range(0, units.shape[1], SPAN_WORDS):
                high = low + SPAN_WORDS
                _add_products(sums, units[:, low:high], weights.floats[low:high])
            lanes += (sums * row_weights(tile.rows[at : at + BLOCK_ROWS])).sum(0, dtype=np.uint64)
    return lanes


def _units(data: Array, are_words: bool) -> Array:
    """[rows, elements] -> [rows, words] or [rows, bytes], in the order of memory of their file."""
    if not are_words:
        return data
    if data.strides[-1] != data.itemsize:
        data = np.ascontiguousarray(data)
    if sys.byteorder == "big":
        data = data.astype(data.dtype.newbyteorder("<"))
    return data.view("<u2")


def _add_products(sums: Array, units: Array, weights: Array) -> None:
    """sums += units @ weights, exactly: at most SPAN_WORDS units, CHUNK_WORDS in a product."""
    num_units = units.shape[1]
    step = BLOCK_WORDS // num_units
    products = np.empty((min(step, len(units)), NUM_LANES))
    for at in range(0, len(units), step):
        part = units[at : at + step]
        block = _block(part.shape)
        np.copyto(block, part)
        for low in range(0, num_units, CHUNK_WORDS):
            high = low + CHUNK_WORDS
            _multiply(block[:, low:high], weights[low:high], products)
            sums[at : at + step] += products[: len(part)].astype(np.uint64)


def _multiply(block: Array, weights: Array, products: Array) -> None:
    """products = block @ weights, in products so small that no BLAS starts threads for them."""
    rows, num_units = block.shape
    together = max(PRODUCT_WORDS // num_units, 1)
    even = rows // together * together
    if even:
        stack = block[:even].reshape(-1, together, num_units)
        np.matmul(stack, weights, out=products[:even].reshape(-1, together, NUM_LANES))
    if even < rows:
        np.matmul(block[even:], weights, out=products[even:rows])


def _block(shape: tuple[int, ...]) -> Array:
    """float64 memory of this thread, valid until the next call."""
    if _thread.block is None:
        _thread.block = np.empty(BLOCK_WORDS)
    return _thread.block[: prod(shape)].reshape(shape)


def point_sums(tile: Tile, data: Array, item: int) -> Array:
    """uint64 [lanes] of points; data has one element for each."""
    values = np.ascontiguousarray(data.reshape(-1))
    assert not isinstance(tile.columns, range), "of points each has a column of its own"
    units = _units(values[:, None], item > 1).astype(np.uint64)
    if item > 1:
        words = tile.columns[:, None] * (item // 2) + np.arange(item // 2)
        weights = word_weights(words.reshape(-1)).reshape(*words.shape, NUM_LANES)
    else:
        weights = byte_weights(tile.columns)[:, None]
    units += np.uint64(ONES[item > 1])
    sums = (units[:, :, None] * weights.astype(np.uint64)).sum(1, dtype=np.uint64)
    found: Array = (sums * row_weights(tile.rows)).sum(0, dtype=np.uint64)
    return found
