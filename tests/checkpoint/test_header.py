"""The codec against byte literals, against the safetensors library, and against noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lading.checkpoint import Header, TensorInfo, encode_header, header_length, parse_header
from lading.checkpoint.header import MAX_HEADER_BYTES
from lading.dtypes import BITS, to_torch
from lading.errors import CallError, HeaderError

from .files_made import entry, raw_file

# The library has no types for it.
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize

KNOWN = (
    "BF16, BOOL, C64, F16, F32, F4, F64, F6_E2M3, F6_E3M2, F8_E4M3, F8_E4M3FNUZ, F8_E5M2, "
    "F8_E5M2FNUZ, F8_E8M0, I16, I32, I64, I8, U16, U32, U64, U8"
)
U8 = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


def parse(file: bytes) -> Header:
    length = header_length(file[:8], len(file))
    return parse_header(file[8 : 8 + length], len(file))


def test_bytes_of_a_small_file() -> None:
    raw = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}  '
    )
    file = b"\x58\0\0\0\0\0\0\0" + raw + b"\1\2\3\4"
    assert len(raw) == 0x58
    assert encode_header([("w", "U8", (2, 2))], {"format": "pt"}) == file[:-4]
    header = parse(file)
    assert header.tensors == {"w": TensorInfo(dtype="U8", shape=(2, 2), start=96, stop=100)}
    assert (header.metadata, header.data_start, header.file_bytes) == ({"format": "pt"}, 96, 100)


def test_the_example_of_parse_header() -> None:
    raw = b'{"w":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}'.ljust(64)
    header = parse_header(raw, 76)
    assert header.data_start == 72
    assert header.tensors == {"w": TensorInfo(dtype="U8", shape=(2, 2), start=72, stop=76)}


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    tree = {"b": entry("U8", [2], 1, 3), "z": entry("U8", [0], 0, 0), "a": entry("U8", [1], 0, 1)}
    assert list(parse(raw_file(tree, b"abc")).tensors) == ["z", "a", "b"]


def test_an_empty_header_and_null_metadata() -> None:
    assert parse(raw_file({})).tensors == {}
    assert parse(raw_file({"__metadata__": None})).metadata == {}
    assert parse(raw_file({})).file_bytes == 10


@dataclass(frozen=True)
class Fails:
    id: str
    file: bytes
    message: str
    refused_by_library: bool = True


BAD = [
    Fails(
        "no bytes",
        b"",
        "header: the file has 0 bytes, needs 8 for the header's length."
        " Try: copy or download the file again.",
    ),
    Fails(
        "length 0",
        bytes(8),
        "header: its length is 0 bytes, needs at least 2 (an empty header is {})."
        " Try: copy or download the file again.",
    ),
    Fails(
        "length 2^60",
        (2**60).to_bytes(8, "little") + b"{}",
        "header: its length is 1152921504606846976 bytes, needs at most 100000000 (the format's "
        "limit). Try: copy or download the file again.",
    ),
    Fails(
        "length past the end",
        b"\x09\0\0\0\0\0\0\0{}",
        "header: its length is 9 bytes, the file has only 2 after the first 8 (it is cut off, or "
        "not a safetensors file). Try: copy or download the file again.",
    ),
    Fails(
        "git lfs",
        b"version https://git-lfs.github.com/spec/v1\n",
        "header: the file starts with 'version ', needs the header's length (it looks like a git "
        "LFS pointer, which stands for a file that was not fetched). Try: git lfs pull.",
    ),
    Fails(
        "not utf-8",
        raw_file(0, raw=b"{\xff}"),
        "header: is not UTF-8 (byte 1 is 0xff). Try: copy or download the file again.",
    ),
    Fails(
        "not json",
        raw_file(0, raw=b"{]"),
        "header: is not JSON (Expecting property name enclosed in double quotes at character 1)."
        " Try: copy or download the file again.",
    ),
    Fails(
        "nul padding",
        raw_file(0, raw=b"{}\0\0"),
        "header: is not JSON (Extra data at character 2). Try: copy or download the file again.",
    ),
    Fails("not an object", raw_file([1]), "header: is [1], needs a JSON object."),
    Fails(
        "deep",
        raw_file(0, raw=b'{"a":' * 200_000),
        "header: is nested too deeply to be a header.",
    ),
    Fails(
        "surrogate",
        raw_file(0, raw=b'{"__metadata__":{"a":"\\uD800"}}'),
        "header: is not Unicode (it has half of a surrogate pair).",
    ),
    Fails(
        "duplicate key",
        raw_file(0, b"ab", raw=b'{"a":%s,"a":%s}' % ((json.dumps(U8).encode(),) * 2)),
        "header: has the key 'a' twice.",
        refused_by_library=False,
    ),
    Fails(
        "duplicate field",
        raw_file(0, b"ab", raw=b'{"a":{"dtype":"U8","dtype":"U8"}}'),
        "header: has the key 'dtype' twice.",
    ),
    Fails(
        "duplicate field beside one that is missing",
        raw_file(
            0,
            b"a",
            raw=b'{"a":{"dtype":"U8","shape":[1]},'
            b'"b":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}',
        ),
        "header: has the key 'shape' twice.",
    ),
    Fails(
        "duplicate key in the metadata",
        raw_file(0, raw=b'{"__metadata__":{"a":"b","a":"b"}}'),
        "header: has the key 'a' twice.",
        refused_by_library=False,
    ),
    Fails(
        "metadata twice",
        raw_file(0, raw=b'{"__metadata__":{"a":"b"},"__metadata__":{"a":"b"}}'),
        "header: has the key '__metadata__' twice.",
        refused_by_library=False,
    ),
    Fails(
        "fields three times, beside metadata that is null",
        raw_file(
            0,
            b"a",
            raw=b'{"__metadata__":null,"w":{"dtype":"U8","dtype":"U8","dtype":"U8","shape":[1],'
            b'"data_offsets":[0,1]}}',
        ),
        "header: has the key 'dtype' twice.",
    ),
    Fails(
        "keys five times, beside metadata that is null",
        raw_file(
            0,
            b"a",
            raw=b'{"__metadata__":null,"a":7,"a":7,"a":8,"a":8,'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        ),
        "header: has the key 'a' twice.",
    ),
    Fails(
        "metadata not an object",
        raw_file({"__metadata__": [1]}),
        "header: __metadata__ is [1], needs a JSON object of strings.",
    ),
    Fails(
        "metadata of numbers",
        raw_file({"__metadata__": {"a": 1}}),
        "header: __metadata__ 'a' is 1, needs a string.",
    ),
    Fails("entry not an object", raw_file({"a": 1}), "a: its entry is 1, needs a JSON object."),
    Fails(
        "entry lacks fields",
        raw_file({"a": {"dtype": "U8"}}),
        "a: its entry lacks 'shape', 'data_offsets'.",
    ),
    Fails(
        "entry has another field",
        raw_file({"a": U8 | {"scale": 2}}, b"ab"),
        "a: its entry has 'scale', needs dtype, shape and data_offsets only.",
        refused_by_library=False,
    ),
    Fails(
        "unknown dtype",
        raw_file({"a": U8 | {"dtype": "F7"}}, b"ab"),
        f"a: dtype is 'F7', needs one of {KNOWN}.",
    ),
    Fails(
        "dtype not a string",
        raw_file({"a": U8 | {"dtype": ["U8"]}}, b"ab"),
        f"a: dtype is ['U8'], needs one of {KNOWN}.",
    ),
    Fails(
        "shape not a list",
        raw_file({"a": U8 | {"shape": 2}}, b"ab"),
        "a: shape is 2, needs a list of integers >= 0.",
    ),
    Fails(
        "bool in shape",
        raw_file({"a": entry("U8", [True], 0, 1)}, b"a"),
        "a: shape is [True], needs a list of integers >= 0.",
    ),
    Fails(
        "negative shape",
        raw_file({"a": entry("U8", [-1, -2], 0, 2)}, b"ab"),
        "a: shape is [-1, -2], needs a list of integers >= 0.",
    ),
    Fails(
        "float",
        raw_file({"a": U8 | {"shape": [2.0]}}, b"ab"),
        "header: has the number 2.0, needs integers without sign only.",
    ),
    Fails(
        "NaN",
        raw_file({"a": float("nan")}),
        "header: has the number NaN, needs integers without sign only.",
    ),
    Fails(
        "minus zero",
        raw_file(0, b"ab", raw=b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[-0,2]}}'),
        "header: has the number -0, needs integers without sign only.",
    ),
    Fails(
        "2^64 elements",
        raw_file({"a": entry("U8", [2**40, 2**40, 0], 0, 0)}),
        "a: shape is [1099511627776, 1099511627776, 0], needs fewer than 2^64 elements.",
    ),
    Fails(
        "2^70 in a shape of 0 elements",
        raw_file({"a": entry("U8", [0, 2**70], 0, 0)}),
        "a: shape is [0, 1180591620717411303424], needs fewer than 2^64 elements.",
    ),
    Fails(
        "one offset",
        raw_file({"a": U8 | {"data_offsets": [0]}}, b"ab"),
        "a: data_offsets are [0], needs [start, stop] with 0 <= start <= stop.",
    ),
    Fails(
        "negative offset",
        raw_file({"a": entry("U8", [3], -1, 2)}, b"ab"),
        "a: data_offsets are [-1, 2], needs [start, stop] with 0 <= start <= stop.",
    ),
    Fails(
        "reversed offsets",
        raw_file({"a": entry("U8", [2], 2, 0)}, b"ab"),
        "a: data_offsets are [2, 0], needs [start, stop] with 0 <= start <= stop.",
    ),
    Fails(
        "past the end",
        raw_file({"a": U8}, b"a"),
        "a: its bytes are [0, 2) of the data, the file has only 1 of them (it is cut off)."
        " Try: copy or download the file again.",
    ),
    Fails(
        "wrong size",
        raw_file({"a": entry("BF16", [3, 2], 0, 2)}, b"ab"),
        "a: has 2 bytes, needs 12 (the size of bf16[3, 2]).",
    ),
    Fails(
        "half a byte",
        raw_file({"a": entry("F4", [3], 0, 1)}, b"a"),
        "a: fp4[3] is 12 bits, needs a whole number of bytes.",
    ),
    Fails(
        "overlap",
        raw_file({"a": U8, "b": entry("U8", [2], 1, 3)}, b"abc"),
        "b: begins at byte 129 of the file, inside tensor 'a', which ends at 130.",
    ),
    Fails(
        "hole",
        raw_file({"a": U8, "b": entry("U8", [2], 3, 5)}, b"abcde"),
        "b: begins at byte 131 of the file, needs 130 (holes are not allowed).",
    ),
    Fails(
        "trailing bytes",
        raw_file({"a": U8}, b"abc"),
        "header: its tensors end at byte 70, the file has 71 bytes (nothing may follow the last "
        "tensor). Try: copy or download the file again.",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.id)
def test_a_damaged_header_says_what_is_wrong(case: Fails) -> None:
    with pytest.raises(HeaderError) as caught:
        parse(case.file)
    assert str(caught.value) == case.message


@pytest.mark.parametrize(
    "case", [case for case in BAD if case.refused_by_library], ids=lambda case: case.id
)
def test_the_library_refuses_it_too(case: Fails) -> None:
    with pytest.raises(safetensors.SafetensorError):
        deserialize(case.file)


def test_a_number_of_5000_digits() -> None:
    raw = b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,0]}}' % (b"9" * 5000)
    with pytest.raises(HeaderError, match="header: is not a header"):
        parse(raw_file(0, raw=raw))


def test_a_length_at_the_limit_and_one_past_it() -> None:
    limit = MAX_HEADER_BYTES
    assert header_length(limit.to_bytes(8, "little"), limit + 8) == limit
    with pytest.raises(HeaderError):
        header_length((limit + 1).to_bytes(8, "little"), limit + 9)


def test_a_file_cut_off_at_every_byte() -> None:
    file = save({"a": torch.arange(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, {"k": "v"})
    parse(file)
    for size in range(len(file)):
        with pytest.raises(HeaderError):
            parse(file[:size])


def tensor_of(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bytes as a torch tensor; the shape counts torch's entries."""
    torch_dtype = to_torch(dtype)
    count = torch.empty(shape, dtype=torch_dtype).nbytes
    data = torch.randint(0, 2, (count,), dtype=torch.uint8)
    return data.view(torch_dtype).reshape(shape)


@pytest.mark.parametrize("dtype", sorted(set(BITS) - {"F6_E2M3", "F6_E3M2"}))
def test_what_the_library_writes_is_read(dtype: str, tmp_path: Path) -> None:
    tensors = {
        "matrix": tensor_of(dtype, (3, 4)),
        "row": tensor_of(dtype, (2,)),
        "none": tensor_of(dtype, (2, 0)),
    }
    if dtype != "F4":  # the library writes no fp4 of zero dims: half a byte
        tensors["scalar"] = tensor_of(dtype, ())
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = (tmp_path / "x.safetensors").read_bytes()
    header = parse(file)
    assert header.metadata == {"k": "v"}
    assert header.tensors.keys() == tensors.keys()
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as oracle:
        for name, info in header.tensors.items():
            assert info.dtype == oracle.get_slice(name).get_dtype() == dtype
            assert list(info.shape) == oracle.get_slice(name).get_shape()
            assert info.storage_shape == tuple(tensors[name].shape)
            stored = tensors[name].reshape(-1).view(torch.uint8).tolist()
            assert list(file[info.start : info.stop]) == stored


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "größe": "\u2603 \\ud800"}])
def test_what_encode_header_writes_is_read_by_the_library(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    tensors = [
        ("a", "BF16", (3, 4)),
        ("é\n☃", "I64", ()),
        ("f4", "F4", (2, 6)),
        ("f6", "F6_E2M3", (4,)),
        ("none", "F32", (0, 5)),
        ("b", "U8", (7,)),
    ]
    head = encode_header(tensors, metadata)
    assert len(head) % 8 == 0
    file = head + bytes(24 + 8 + 6 + 3 + 0 + 7)
    (tmp_path / "x.safetensors").write_bytes(file)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as oracle:
        assert set(oracle.keys()) == {name for name, _, _ in tensors}
        assert (oracle.metadata() or {}) == (metadata or {})
        for name, dtype, shape in tensors:
            assert oracle.get_slice(name).get_dtype() == dtype
            assert oracle.get_slice(name).get_shape() == list(shape)
        assert oracle.get_tensor("f4").shape == (2, 3)
    header = parse(file)
    assert [(name, t.dtype, t.shape) for name, t in header.tensors.items()] == tensors
    assert header.metadata == (metadata or {})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "a: is named twice, or is not a tensor's name."),
        (
            [("__metadata__", "U8", (1,))],
            "__metadata__: is named twice, or is not a tensor's name.",
        ),
        ([("a", "X", (1,))], f"a: dtype is 'X', needs one of {KNOWN}."),
        ([("a", "F4", (3,))], "a: fp4[3] is not a whole number of bytes."),
        ([("a", "U8", (-1,))], "a: uint8[-1] is not a whole number of bytes."),
        ([("\ud800", "U8", (1,))], "header: '\\ud800' is not Unicode."),
    ],
)
def test_encode_header_refuses(
    tensors: list[tuple[str, str, tuple[int, ...]]], message: str
) -> None:
    with pytest.raises(CallError) as caught:
        encode_header(tensors)
    assert str(caught.value) == message


def test_an_odd_row_of_fp4_has_no_torch_shape() -> None:
    info = TensorInfo(dtype="F4", shape=(4, 3), start=8, stop=14)
    with pytest.raises(HeaderError) as caught:
        _ = info.storage_shape
    assert str(caught.value) == (
        "is fp4[4, 3], needs an even last dim (a torch entry holds two fp4 values)."
    )


SPECS = st.lists(
    st.tuples(
        st.text(max_size=6).filter(lambda name: name != "__metadata__"),
        st.sampled_from(sorted(BITS)),
        st.lists(st.integers(0, 3), max_size=3).map(lambda dims: (*dims, 8)),
    ),
    max_size=4,
    unique_by=lambda spec: spec[0],
)


@settings(max_examples=200, deadline=None)
@given(SPECS, st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
def test_any_header_comes_back(specs: list[Any], metadata: dict[str, str] | None) -> None:
    head = encode_header(specs, metadata)
    size = len(head)
    for _, dtype, shape in specs:
        size += torch.Size(shape).numel() * BITS[dtype] // 8
    header = parse_header(head[8:], size)
    # Empty tensors share their offset with a neighbour, so only the others have an order.
    assert {(n, t.dtype, t.shape) for n, t in header.tensors.items()} == set(specs)
    assert header.metadata == (metadata or {})
    deserialize(head + bytes(size - len(head)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64), st.integers(-4, 200))
def test_noise_is_a_header_error(raw: bytes, file_bytes: int) -> None:
    assert_header_or_error(raw, file_bytes)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F4", "BF16"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 9) | st.integers(), max_size=3) | JSON,
    }
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON), st.integers(0, 12)
)
def test_json_of_another_kind_is_a_header_error(tree: dict[str, Any], data_bytes: int) -> None:
    raw = json.dumps(tree).encode("utf-8", "surrogatepass")
    assert_not_laxer_than_the_library(raw_file(0, bytes(data_bytes), raw=raw))


VALID = save({"a": torch.arange(3), "bb": torch.ones(2, 2), "c": torch.zeros(0)}, {"k": "v-01"})


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_a_mutated_header_is_a_header_or_an_error(data: st.DataObject) -> None:
    file = bytearray(VALID)
    tokens = [
        b"0",
        b"-",
        b"-0",
        b"9",
        b".5",
        b"1e9",
        b'"',
        b"\\",
        b"\\ud800",
        b"{",
        b"]",
        b",",
        b"\xff",
    ]
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(file)))
        stop = start + data.draw(st.integers(0, 3))
        file[start:stop] = data.draw(st.sampled_from(tokens) | st.binary(max_size=3))
    if data.draw(st.booleans()):  # a right length, so that the damage is seen in the JSON
        file[:8] = (VALID[0] + len(file) - len(VALID)).to_bytes(8, "little", signed=True)
    assert_not_laxer_than_the_library(bytes(file))


NAMES = st.text(st.sampled_from('ab:,{}[]" \\-0\u00e9'), max_size=5).filter("__metadata__".__ne__)


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4), st.data())
def test_a_key_twice_is_refused_whatever_it_is(names: list[str], data: st.DataObject) -> None:
    """The members are written one by one, so the test knows which are there twice."""
    names += data.draw(st.lists(st.sampled_from(names), max_size=1))
    fields = ("dtype", "shape", "data_offsets")
    members, is_twice = [], len(set(names)) < len(names)
    for at, name in enumerate(names):
        values = {"dtype": '"U8"', "shape": "[1]", "data_offsets": f"[{at},{at + 1}]"}
        chosen = [*fields, *data.draw(st.lists(st.sampled_from(fields), max_size=1))]
        is_twice |= len(chosen) > len(fields)
        inner = ",".join(f'"{field}": {values[field]}' for field in chosen)
        spelt = json.dumps(name, ensure_ascii=data.draw(st.booleans()))
        members.append(f"{spelt}: {{{inner}}}")
    raw = "{" + ",".join(members) + "}"
    size = 8 + len(raw.encode()) + len(names)
    if is_twice:
        with pytest.raises(HeaderError, match="twice"):
            parse_header(raw.encode(), size)
    else:
        assert list(parse_header(raw.encode(), size).tensors) == names


def assert_header_or_error(raw: bytes, file_bytes: int) -> None:
    try:
        assert isinstance(parse_header(raw, file_bytes), Header)
    except HeaderError as error:
        str(error)  # can be printed


def assert_not_laxer_than_the_library(file: bytes) -> None:
    try:
        header = parse(file)
    except HeaderError as error:
        str(error)  # can be printed
    else:
        oracle = dict(deserialize(file))  # raises where the library refuses
        assert header.tensors.keys() == oracle.keys()
        for name, info in header.tensors.items():
            assert oracle[name]["dtype"] == info.dtype
            assert oracle[name]["shape"] == list(info.shape)
            assert bytes(oracle[name]["data"]) == file[info.start : info.stop]
