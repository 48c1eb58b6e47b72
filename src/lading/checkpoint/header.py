"""The safetensors header: bytes to a checked value, and back.

Layout of a file (the format's README, and `src/tensor.rs` of safetensors 0.8, whose reader is the
oracle of the tests):

    8 bytes    N, the length of the header, little-endian
    N bytes    JSON: {"name": {"dtype": "BF16", "shape": [O, I], "data_offsets": [start, stop]}},
               for every tensor, and perhaps "__metadata__": {str: str}; padded with spaces
    the rest   the tensors, without holes and without overlap; offsets count from here

Whatever that reader refuses is refused here, and also: a key given twice, a field that the format
does not have. A header comes from a stranger, so every damage is a `HeaderError`, never another
exception, and nothing is allocated on its word. Here is no I/O and no torch.

Shapes count elements of the dtype. F4 packs two elements into a byte, and torch's
`float4_e2m1fn_x2` counts the bytes: torch [2, 12] is F4 [2, 24] here (`storage_shape` translates).
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from typing import Any, NoReturn

from lading.dtypes import BITS, printed, spell
from lading.errors import CallError, HeaderError
from lading.records import quick

__all__ = [
    "MAX_HEADER_BYTES",
    "PREFIX_BYTES",
    "Entries",
    "Header",
    "Row",
    "TensorInfo",
    "encode_header",
    "header_length",
    "parse_entries",
    "parse_header",
    "storage_shape",
]

PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # safetensors 0.8, MAX_HEADER_SIZE
_MAX_ELEMENTS = 2**64 - 1  # the format's integers are u64
_LFS_PREFIX = b"version "  # a git LFS pointer file starts "version https://git-lfs..."

_FIELDS = {"dtype", "shape", "data_offsets"}
_BY_BYTES = itemgetter(3, 4)

Row = tuple[str, str, tuple[int, ...], int, int]
"""A tensor's name, dtype, shape, and where its bytes start and stop in the file."""

Entries = tuple[list[Row], dict[str, str]]
"""The rows of a header in the order of their bytes, and its metadata."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a file; `start` and `stop` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Of the tensor as it is stored."""
        return self.stop - self.start

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """The shape of the torch tensor that holds it: see `storage_shape`."""
        return storage_shape(self.dtype, self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a safetensors file says of itself; made by `parse_header` only.

    tensors      by name, in the order of their bytes; they cover data_start to the end of the file
    metadata     the `__metadata__` entries, often {"format": "pt"}
    data_start   where the first tensor begins, in bytes from the beginning of the file
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def file_bytes(self) -> int:
        """The size of the file: the tensors cover it to its end."""
        return max((info.stop for info in self.tensors.values()), default=self.data_start)


def storage_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the torch tensor that stores `shape` elements of `dtype`.

    F4 [..., I] -> [..., I / 2]: two elements per torch entry. Every other dtype: unchanged.
    Raises HeaderError where an odd I leaves half an entry, as safetensors' torch reader does.
    """
    if dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise HeaderError(
            f"is {spell(dtype, shape)}, needs an even last dim (a torch entry holds two fp4 values)"
        )
    return (*shape[:-1], shape[-1] // 2)


def header_length(prefix: bytes, file_bytes: int) -> int:
    """The length N of the header in bytes, from the first 8 bytes of a file of `file_bytes`.

    Raises HeaderError for a length that cannot be, so that nobody allocates it.
    """
    if len(prefix) < PREFIX_BYTES:
        _fail_damaged(
            f"the file has {len(prefix)} bytes, needs {PREFIX_BYTES} for the header's length"
        )
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if prefix[:PREFIX_BYTES] == _LFS_PREFIX:
        raise HeaderError(
            "the file starts with 'version ', needs the header's length (it looks like a git LFS "
            "pointer, which stands for a file that was not fetched)",
            subject="header",
            hint="git lfs pull",
        )
    if length == 0:
        _fail_damaged("its length is 0 bytes, needs at least 2 (an empty header is {})")
    if length > MAX_HEADER_BYTES:
        _fail_damaged(
            f"its length is {length} bytes, needs at most {MAX_HEADER_BYTES} (the format's limit)"
        )
    if length > file_bytes - PREFIX_BYTES:
        _fail_damaged(
            f"its length is {length} bytes, the file has only {file_bytes - PREFIX_BYTES} after "
            f"the first {PREFIX_BYTES} (it is cut off, or not a safetensors file)"
        )
    return length


def parse_header(raw: bytes, file_bytes: int) -> Header:
    """The checked header of a file of `file_bytes`; `raw` is what follows the 8-byte length.

    Raises HeaderError with the tensor's name as subject, or "header" where it is not one tensor's.

    Example: a file of 76 bytes whose 64-byte header is {"w":{"dtype":"U8","shape":[2,2],
    "data_offsets":[0,4]}} and spaces -> data_start 72, tensors {"w": U8 (2, 2), start 72, stop 76}.
    """
    data_start = PREFIX_BYTES + len(raw)
    tensors, metadata = parse_entries(raw, file_bytes)
    infos = {
        name: TensorInfo(dtype=dtype, shape=shape, start=start, stop=stop)
        for name, dtype, shape, start, stop in tensors
    }
    return Header(tensors=infos, metadata=metadata, data_start=data_start)


def parse_entries(raw: bytes, file_bytes: int) -> Entries:
    """What `parse_header` says, as plain values. Raises as it does."""
    text = _decoded(raw)
    plain = _parse_plain(text)
    if plain is not None:
        with suppress(HeaderError):  # which error comes first is found below
            return _entries(plain, PREFIX_BYTES + len(raw), file_bytes)
    return _entries(_parse_json(text), PREFIX_BYTES + len(raw), file_bytes)


def _entries(tree: Any, data_start: int, file_bytes: int) -> Entries:
    if type(tree) is not dict:
        _fail(f"is {_short.repr(tree)}, needs a JSON object")
    metadata = _metadata(tree.pop("__metadata__", None))
    data_bytes = file_bytes - data_start
    rows = [_row(name, entry, data_start, data_bytes) for name, entry in tree.items()]
    rows.sort(key=_BY_BYTES)
    _check_cover(rows, data_start, file_bytes)
    return rows, metadata


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file: length, JSON, spaces up to a multiple of 8.

    tensors    (name, dtype, shape as the header counts it), in the order of their bytes
    metadata   written as `__metadata__` unless None

    Raises CallError for what no header can say. The bytes of `tensors` must follow without holes.
    """
    tree: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        if name in tree or name == "__metadata__":
            raise CallError("is named twice, or is not a tensor's name", subject=name)
        if dtype not in BITS:
            raise CallError(f"dtype is {dtype!r}, needs one of {_known()}", subject=name)
        if any(size < 0 for size in shape) or prod(shape) * BITS[dtype] % 8:
            raise CallError(f"{spell(dtype, shape)} is not a whole number of bytes", subject=name)
        stop = offset + prod(shape) * BITS[dtype] // 8
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    try:
        raw = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CallError(f"{error.object[error.start]!r} is not Unicode", subject="header") from None
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        fact = f"has {len(raw)} bytes, needs at most {MAX_HEADER_BYTES} (the format's limit)"
        raise CallError(fact, subject="header")
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw


def _fail(fact: str, subject: str = "header") -> NoReturn:
    raise HeaderError(fact, subject=subject)


def _fail_damaged(fact: str, subject: str = "header") -> NoReturn:
    """For what no writer leaves, but a copy or a download that went wrong does."""
    raise HeaderError(fact, subject=subject, hint="copy or download the file again")


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _fail_damaged(f"is not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x})")


def _parse_plain(text: str) -> Any:
    """The tree of a header as writers write it; None where it has to be looked at more closely.

    json keeps one of two values of one key, and a Python hook that finds them takes as long as the
    rest of the parse. Without escapes a string is what lies between two quotes, and n entries that
    are as they have to be are 5 n of them (name, three fields, dtype): a key more would be counted.
    """
    if "\\" in text or "-0" in text:
        return None
    try:
        tree = json.loads(text, parse_float=_refuse_number, parse_constant=_refuse_number)
    except (HeaderError, RecursionError, ValueError):
        return None
    if type(tree) is not dict:
        return None
    num_strings = 5 * len(tree)
    if "__metadata__" in tree:
        metadata = tree["__metadata__"]
        if type(metadata) is not dict:
            return None
        num_strings += 2 * len(metadata) - 4
    return tree if text.count('"') == 2 * num_strings else None


def _parse_json(text: str) -> Any:
    # json takes "-0" for 0, where the format has no sign; a Python hook for every integer would
    # cost more than the rest of the parse, so it is used only where the text has one.
    parse_int = _unsigned if "-0" in text else None
    try:
        tree = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=parse_int,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
        if "\\ud" in text or "\\uD" in text:  # json lets half a surrogate pair through
            json.dumps(tree, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        _fail_damaged(f"is not JSON ({error.msg} at character {error.pos})")
    except RecursionError:
        _fail("is nested too deeply to be a header")
    except UnicodeEncodeError:
        _fail("is not Unicode (it has half of a surrogate pair)")
    except ValueError as error:  # an integer with thousands of digits
        _fail(f"is not a header ({error})")
    return tree


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                _fail(f"has the key {_short.repr(key)} twice")
            seen.add(key)
    return tree


def _unsigned(text: str) -> int:
    if text == "-0":
        _refuse_number(text)
    return int(text)


def _refuse_number(text: str) -> NoReturn:
    _fail(f"has the number {_short.repr(text)[1:-1]}, needs integers without sign only")


def _metadata(value: Any) -> dict[str, str]:
    if value is None:  # absent, or null, which the reference reader takes too
        return {}
    if type(value) is not dict:
        _fail(f"__metadata__ is {_short.repr(value)}, needs a JSON object of strings")
    for key, text in value.items():
        if type(text) is not str:
            _fail(f"__metadata__ {_short.repr(key)} is {_short.repr(text)}, needs a string")
    return value


def _row(name: str, entry: Any, data_start: int, data_bytes: int) -> Row:
    """One checked entry. The common path is short on purpose: large models have 100,000 of them."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        _fail_entry(name, entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if type(dtype) is str else None
    if bits is None:
        _fail(f"dtype is {_short.repr(dtype)}, needs one of {_known()}", name)
    count = _num_elements(name, shape)
    if type(offsets) is not list or len(offsets) != 2:
        _fail_offsets(name, offsets)
    start, stop = offsets
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop:
        _fail_offsets(name, offsets)
    if stop > data_bytes:
        _fail_damaged(
            f"its bytes are [{start}, {stop}) of the data, the file has only {max(data_bytes, 0)} "
            "of them (it is cut off)",
            name,
        )
    if count * bits != (stop - start) * 8:
        _fail_size(name, dtype, shape, count * bits, stop - start)
    return name, dtype, tuple(shape), data_start + start, data_start + stop


def _num_elements(name: str, shape: Any) -> int:
    if type(shape) is not list:
        _fail(f"shape is {_short.repr(shape)}, needs a list of integers >= 0", name)
    count = 1
    for size in shape:
        if type(size) is not int or size < 0:  # bool is an int to isinstance
            _fail(f"shape is {_short.repr(shape)}, needs a list of integers >= 0", name)
        count *= size
        if size > _MAX_ELEMENTS or count > _MAX_ELEMENTS:
            _fail(f"shape is {_short.repr(shape)}, needs fewer than 2^64 elements", name)
    return count


def _fail_offsets(name: str, offsets: Any) -> NoReturn:
    fact = f"data_offsets are {_short.repr(offsets)}, needs [start, stop] with 0 <= start <= stop"
    _fail(fact, name)


def _fail_entry(name: str, entry: Any) -> NoReturn:
    if type(entry) is not dict:
        _fail(f"its entry is {_short.repr(entry)}, needs a JSON object", name)
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in entry]
    if missing:
        _fail(f"its entry lacks {_listed(missing)}", name)
    unknown = [key for key in entry if key not in _FIELDS]
    fact = f"its entry has {_listed(unknown)}, needs dtype, shape and data_offsets only"
    _fail(fact, name)


def _fail_size(name: str, dtype: str, shape: list[int], needed_bits: int, found: int) -> NoReturn:
    sizes = _short.repr(shape) if len(shape) > 8 else str(shape)
    if needed_bits % 8:
        fact = f"{printed(dtype)}{sizes} is {needed_bits} bits, needs a whole number of bytes"
        _fail(fact, name)
    _fail(
        f"has {found} bytes, needs {needed_bits // 8} (the size of {printed(dtype)}{sizes})", name
    )


def _check_cover(rows: Sequence[Row], data_start: int, file_bytes: int) -> None:
    """Tensors in order of `start` touch each other from `data_start` to the end of the file."""
    reached, previous = data_start, ""
    for name, _, _, start, stop in rows:
        if start < reached:
            _fail(
                f"begins at byte {start} of the file, inside tensor {_short.repr(previous)}, "
                f"which ends at {reached}",
                name,
            )
        if start > reached:
            fact = f"begins at byte {start} of the file, needs {reached} (holes are not allowed)"
            _fail(fact, name)
        reached, previous = stop, name
    if reached != file_bytes:
        _fail_damaged(
            f"its tensors end at byte {reached}, the file has {file_bytes} bytes "
            "(nothing may follow the last tensor)"
        )


def _known() -> str:
    return ", ".join(sorted(BITS))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(_short.repr(name) for name in names)
