"""The header of a GGUF file: bytes to a checked value.

Layout of a file, versions 2 and 3, little-endian (`docs/gguf.md` of ggml):

    4 bytes    "GGUF"
    u32, u64, u64   version, number of tensors, number of keys
    each key   string key, u32 type, value
    each tensor   string name, u32 number of dims, u64 each dim, u32 type, u64 offset of its bytes
    padding to a multiple of general.alignment (32 where the key is missing)
    the tensors   offsets count from here and are multiples of the alignment
    string     u64 length in bytes, UTF-8;   array   u32 type, u64 count, values

Dims are in ggml's order, the innermost first: a weight of O outputs and I inputs is (I, O) there
and [O, I] here. A header comes from a stranger, so every damage is a `HeaderError`, never another
exception, and nothing is allocated on its word. Here is no I/O and no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NoReturn

from lading.errors import HeaderError

__all__ = ["KINDS", "GgufHeader", "GgufTensor", "Kind", "Value", "parse_gguf"]

Value = str | int | float | bool | tuple[int | float, ...]

DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_KEY_BYTES = 65_535
_MAX_NAME_BYTES = 64  # GGML_MAX_NAME
_MAX_KEPT = 65_536  # numbers of an array: one for each layer, not one for each token
_MAX_ELEMENTS = 2**63 - 1
_KEY_BYTES, _INFO_BYTES = 13, 32  # the least that a key, or a tensor, takes

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A type of tensor: `block` elements of a row take `block_bytes`."""

    name: str
    block: int
    block_bytes: int


KINDS: Mapping[int, Kind] = {
    number: Kind(name=name, block=block, block_bytes=size)
    for number, name, block, size in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (30, "BF16", 1, 2),
    )
}
"""ggml's types by number (`ggml.h`, enum ggml_type); those that are missing are not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of a file.

    name     as the file spells it: "blk.0.attn_q.weight"
    shape    outermost dim first, [O, I]
    start    its first byte, from the beginning of the file
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of the innermost dim."""
        return self.shape[-1] // self.kind.block * self.kind.block_bytes

    @property
    def num_rows(self) -> int:
        """Rows of all outer dims."""
        return prod(self.shape[:-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.row_bytes * self.num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says of itself; made by `parse_gguf` only.

    tensors     by name, in the file's order; inside the file, none overlaps another
    metadata    its keys, without arrays of strings and without arrays too long to describe layers
    """

    version: int
    tensors: Mapping[str, GgufTensor]
    metadata: Mapping[str, Value]


def parse_gguf(raw: bytes | memoryview, file_bytes: int | None = None) -> GgufHeader:
    """The checked header of a file.

    raw          the file, or so much of its beginning that the header is in it; a memory map reads
                 only what is looked at
    file_bytes   of the whole file; None where `raw` is all of it

    Raises HeaderError with the key or tensor as subject, "header" where it is neither's.
    """
    return _Parser(memoryview(raw), len(raw) if file_bytes is None else file_bytes).parse()


class _Parser:
    """Reads on through the header, from `at`."""

    def __init__(self, raw: memoryview, file_bytes: int) -> None:
        self.raw, self.file_bytes, self.at = raw, file_bytes, 0
        self.subject = "header"

    def parse(self) -> GgufHeader:
        if bytes(self.raw[:4]) != b"GGUF":
            self._fail(f"the file starts with {bytes(self.raw[:4])!r}, needs b'GGUF'")
        self.at = 4
        version = self._number("I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            why = " (the file is big-endian)" if swapped else ""
            self._fail(f"its version is {version}, needs 2 or 3{why}")
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        metadata = self._metadata(self._count(num_keys, "keys", _KEY_BYTES))
        infos = self._infos(self._count(num_tensors, "tensors", _INFO_BYTES))
        return GgufHeader(version=version, tensors=self._placed(infos, metadata), metadata=metadata)

    def _metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        seen: set[str] = set()
        for _ in range(count):
            self.subject = "header"
            key = self._string(_MAX_KEY_BYTES)
            self.subject = key
            if key in seen:
                self._fail("is a key that the header has twice")
            seen.add(key)
            value = self._value(self._number("I"))
            if value is not None:
                metadata[key] = value
        self.subject = "header"
        return metadata

    def _value(self, kind: int) -> Value | None:
        """None for an array that is passed over."""
        if kind == _STRING:
            return self._string(None)
        if kind in _SCALARS:
            return self._scalar(kind)
        if kind != _ARRAY:
            self._fail(f"is of type {kind}, needs 0 to {max(_SCALARS)}")
        inner, count = self._number("I"), self._number("Q")
        if inner == _STRING:
            for _ in range(self._count(count, "strings", 8)):
                self._pass(self._number("Q"))
            return None
        if inner not in _SCALARS:
            self._fail(f"is an array of type {inner}, needs numbers or strings")
        size = struct.calcsize(_SCALARS[inner])
        self._count(count, "numbers", size)
        if count > _MAX_KEPT:
            self._pass(count * size)
            return None
        return tuple(self._scalar(inner) for _ in range(count))

    def _infos(self, count: int) -> list[tuple[str, Kind, tuple[int, ...], int]]:
        infos, seen = [], set()
        for _ in range(count):
            self.subject = "header"
            name = self._string(_MAX_NAME_BYTES)
            self.subject = name
            if name in seen:
                self._fail("is a tensor that the header has twice")
            seen.add(name)
            num_dims = self._number("I")
            if not 1 <= num_dims <= _MAX_DIMS:
                self._fail(f"has {num_dims} dims, needs 1 to {_MAX_DIMS}")
            dims = tuple(self._number("Q") for _ in range(num_dims))
            if not all(dims) or prod(dims) > _MAX_ELEMENTS:
                self._fail(f"has dims {list(dims)}, needs 1 to {_MAX_ELEMENTS} elements")
            number = self._number("I")
            kind = KINDS.get(number)
            if kind is None:
                known = ", ".join(f"{n} ({k.name})" for n, k in KINDS.items())
                self._fail(f"is of type {number}, needs one of: {known}")
            if dims[0] % kind.block:
                self._fail(
                    f"has rows of {dims[0]} elements, needs a multiple of {kind.block} (a block of "
                    f"{kind.name})"
                )
            infos.append((name, kind, dims[::-1], self._number("Q")))
        self.subject = "header"
        return infos

    def _placed(
        self,
        infos: list[tuple[str, Kind, tuple[int, ...], int]],
        metadata: Mapping[str, Value],
    ) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1:
            self.subject = "general.alignment"
            self._fail(f"is {alignment!r}, needs an int of at least 1")
        data = -(-self.at // alignment) * alignment
        tensors = {}
        for name, kind, shape, offset in infos:
            tensor = GgufTensor(name=name, kind=kind, shape=shape, start=data + offset)
            self.subject = name
            if offset % alignment:
                self._fail(f"begins at byte {offset}, needs a multiple of {alignment}")
            if tensor.start + tensor.num_bytes > self.file_bytes:
                self._fail(
                    f"is at bytes {tensor.start}:{tensor.start + tensor.num_bytes}, the file ends "
                    f"at {self.file_bytes}"
                )
            tensors[name] = tensor
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.start)
        for one, following in pairwise(in_order):
            if one.start + one.num_bytes > following.start:
                self.subject = following.name
                self._fail(
                    f"begins at byte {following.start}, inside {one.name!r}, which ends at "
                    f"{one.start + one.num_bytes}"
                )
        return tensors

    def _count(self, count: int, what: str, least_bytes: int) -> int:
        """A number of things that follow, each of at least so many bytes."""
        left = len(self.raw) - self.at
        if count * least_bytes > left:
            self._fail(
                f"says that {count} {what} follow, needs at most {left // least_bytes} (in the "
                f"{left} bytes that are left)"
            )
        return count

    def _string(self, most: int | None) -> str:
        length = self._number("Q")
        if most is not None and length > most:
            self._fail(f"has a name of {length} bytes at byte {self.at}, needs at most {most}")
        start = self.at
        self._pass(length)
        try:
            return str(self.raw[start : self.at], "utf-8")
        except UnicodeDecodeError:
            self._fail(f"has a string at byte {start} that is no UTF-8")

    def _scalar(self, kind: int) -> int | float | bool:
        code = _SCALARS[kind]
        start = self.at
        self._pass(struct.calcsize(code))
        value: int | float | bool = struct.unpack_from(f"<{code}", self.raw, start)[0]
        return value

    def _number(self, code: str) -> int:
        """An unsigned integer."""
        start = self.at
        self._pass(struct.calcsize(f"<{code}"))
        return int.from_bytes(self.raw[start : self.at], "little")

    def _pass(self, num_bytes: int) -> None:
        left = len(self.raw) - self.at
        if num_bytes > left:
            self._fail(
                f"needs {num_bytes} bytes at byte {self.at}, {left} are left (it is cut off, or "
                "not a GGUF file)"
            )
        self.at += num_bytes

    def _fail(self, fact: str) -> NoReturn:
        raise HeaderError(fact, subject=self.subject)
