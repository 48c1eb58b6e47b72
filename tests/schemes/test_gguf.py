"""GGUF: the fixture, its permuted rows, each kind of block, damaged headers."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lading.errors import CallError, ConfigError, DtypeError, HeaderError, LadingError, LayoutError
from lading.schemes.gguf import GgufWeight, decode_blocks, read_weight, weights_of
from lading.schemes.gguf_header import KINDS, GgufHeader, GgufTensor, parse_gguf
from tests.schemes.decoding import fixture_folder

LLAMA = {
    "general.architecture": "llama",
    "llama.embedding_length": 8,
    "llama.attention.head_count": 2,
}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, value: Any) -> bytes:
    """A key with its value, of the type that Python's suggests."""
    if isinstance(value, str):
        return text(name) + struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        inner = [text(v) if isinstance(v, str) else struct.pack("<I", v) for v in value]
        kind = 8 if value and isinstance(value[0], str) else 4
        return text(name) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(inner)
    return text(name) + struct.pack("<II", 4, value)


def file_of(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]],
    version: int = 3,
) -> bytes:
    """A file: name → (shape, number of its kind, bytes)."""
    alignment = int(metadata.get("general.alignment", 32))
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(key(name, value) for name, value in metadata.items())
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += b"\0" * (-len(data) % alignment)
        dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + dims
        head += struct.pack("<IQ", kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % alignment) + data


def f32(*shape: int) -> tuple[tuple[int, ...], int, bytes]:
    return shape, 0, np.arange(np.prod(shape), dtype=np.float32).tobytes()


SMALL = file_of(
    LLAMA | {"tokens": ["a", "bc"], "counts": [1, 2]},
    {
        "token_embd.weight": f32(3, 8),
        "blk.0.attn_q.weight": f32(8, 8),
        "output_norm.weight": f32(8),
    },
)


def test_fixture_decodes_as_gguf_does() -> None:
    folder = fixture_folder("gguf-q8_0")
    raw = (folder / "model.gguf").read_bytes()
    header = parse_gguf(raw)
    assert len(header.tensors) == 21
    assert len(weights_of(header)) == 21
    count = 0
    with safe_open(folder / "dequant_reference.safetensors", "pt") as references:
        for name in references.keys():  # noqa: SIM118
            reference = references.get_tensor(name)
            stored = GgufWeight(name=name, tensor=header.tensors[name])  # in the file's order
            assert torch.equal(read_weight(stored, raw), reference)
            outputs, inputs = reference.shape
            for tp_size in (2, 4):
                rows = [
                    (r * outputs // tp_size, (r + 1) * outputs // tp_size) for r in range(tp_size)
                ]
                cut = [read_weight(stored, raw, rows=span) for span in rows]
                assert torch.equal(torch.cat(cut), reference)
                columns = [
                    (r * inputs // tp_size, (r + 1) * inputs // tp_size) for r in range(tp_size)
                ]
                cut = [read_weight(stored, raw, columns=span) for span in columns]
                assert torch.equal(torch.cat(cut, dim=1), reference)
            count += 1
    assert count == 16


def test_rows_come_in_the_order_of_the_model() -> None:
    """Another tool quantised the same weights, under the model's names and in its order."""
    folder, other = fixture_folder("gguf-q8_0"), fixture_folder("autofp8-static")
    raw = (folder / "model.gguf").read_bytes()
    weights = weights_of(parse_gguf(raw))
    with safe_open(other / "dequant_reference.safetensors", "pt") as references:
        for name in references.keys():  # noqa: SIM118
            reference = references.get_tensor(name)
            weight = read_weight(weights[name], raw)
            assert (weight - reference).norm() < 0.03 * reference.norm()  # FP8 keeps 3 bits
            some = read_weight(weights[name], raw, rows=(70, 101), columns=(32, 192))
            assert torch.equal(some, weight[70:101, 32:192])


@pytest.mark.parametrize("number", [0, 1, 30, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("columns", [32, 96])
def test_blocks_decode_as_written_down(number: int, columns: int) -> None:
    kind, rows = KINDS[number], 3
    rng = np.random.default_rng(number)
    data = rng.integers(256, size=(rows, columns // kind.block * kind.block_bytes), dtype=np.uint8)
    if kind.block == 1:  # no infinities and NaNs: clear the highest exponent bit
        data[:, kind.block_bytes - 1 :: kind.block_bytes] &= 0xBF
    else:
        for row in data:
            for at in range(0, len(row), kind.block_bytes):
                row[at : at + 2] = np.frombuffer(np.float16(rng.random()).tobytes(), np.uint8)
                if number in (3, 7):
                    row[at + 2 : at + 4] = np.frombuffer(np.float16(-3.7).tobytes(), np.uint8)
    decoded = decode_blocks(kind.name, torch.from_numpy(data)).numpy()
    assert decoded.shape == (rows, columns)
    for row in range(rows):
        for column in range(columns):
            needed = slowly(number, data[row].tobytes(), column)
            assert decoded[row, column] == needed, (row, column)


def slowly(number: int, row: bytes, column: int) -> np.float32:
    """One element of a row, as `ggml-quants.c` reads it."""
    kind = KINDS[number]
    block, inner = divmod(column, kind.block)
    raw = row[block * kind.block_bytes : (block + 1) * kind.block_bytes]
    if number == 0:
        return np.float32(np.frombuffer(raw, np.float32)[0])
    if number == 1:
        return np.float32(np.frombuffer(raw, np.float16)[0])
    if number == 30:
        return np.float32(np.frombuffer(b"\0\0" + raw, np.float32)[0])
    d = np.float32(np.frombuffer(raw[:2], np.float16)[0])
    if number == 8:
        return np.float32(struct.unpack_from("b", raw, 2 + inner)[0]) * d
    byte = raw[kind.block_bytes - 16 + inner % 16]
    q = byte >> 4 if inner >= 16 else byte & 15
    if number in (6, 7):
        bits = int.from_bytes(raw[kind.block_bytes - 20 : kind.block_bytes - 16], "little")
        q |= (bits >> inner & 1) << 4
    if number in (3, 7):
        m = np.float32(np.frombuffer(raw[2:4], np.float16)[0])
        return np.float32(np.float32(q) * d) + m
    return np.float32(q - (8 if number == 2 else 16)) * d


def test_a_header_is_read() -> None:
    header = parse_gguf(SMALL)
    assert header.version == 3
    assert header.metadata == LLAMA | {"counts": (1, 2)}
    weights = weights_of(header)
    assert {name: weight.head_size for name, weight in weights.items()} == {
        "model.embed_tokens.weight": 0,
        "model.layers.0.self_attn.q_proj.weight": 4,
        "model.norm.weight": 0,
    }
    q = read_weight(weights["model.layers.0.self_attn.q_proj.weight"], SMALL)
    assert (q[:, 0] / 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # pairs of a head lie side by side
    norm = weights["model.norm.weight"]
    assert read_weight(norm, SMALL).tolist() == list(range(8))
    assert read_weight(norm, SMALL, rows=(2, 5)).tolist() == [2, 3, 4]
    assert read_weight(norm, SMALL, rows=(2, 2)).numel() == 0
    assert parse_gguf(file_of(LLAMA, {}, version=2)).version == 2
    head = SMALL[: header.tensors["token_embd.weight"].start]
    assert parse_gguf(head, len(SMALL)) == header


def problem(raw: bytes) -> str:
    with pytest.raises(HeaderError) as info:
        parse_gguf(raw)
    return str(info.value)


def test_damage_is_named() -> None:
    assert problem(b"GG") == "header: the file starts with b'GG', needs b'GGUF'."
    assert problem(b"GGUF\x01\0\0\0") == "header: its version is 1, needs 2 or 3."
    assert problem(b"GGUF\0\0\0\x03") == (
        "header: its version is 50331648, needs 2 or 3 (the file is big-endian)."
    )
    assert problem(SMALL[:10]) == (
        "header: needs 8 bytes at byte 8, 2 are left (it is cut off, or not a GGUF file)."
    )
    assert problem(b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63)) == (
        "header: says that 9223372036854775808 keys follow, needs at most 0 (in the 0 bytes that "
        "are left)."
    )
    twice = b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * key("a", 1)
    assert problem(twice) == "a: is a key that the header has twice."
    assert problem(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 13) * 9
    ) == ("a: is of type 13, needs 0 to 12.")
    nested = text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(40)
    assert problem(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + nested) == (
        "a: is an array of type 9, needs numbers or strings."
    )
    assert problem(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2) + b"\xff\xff" + bytes(9)) == (
        "header: has a string at byte 32 that is no UTF-8."
    )


def test_impossible_tensors_are_named() -> None:
    one = {"t": f32(2, 8)}
    assert problem(file_of({}, {"t": ((2, 8), 99, b"")})).startswith(
        "t: is of type 99, needs one of: 0 (F32), 1 (F16), 2 (Q4_0), "
    )
    assert problem(file_of({}, {"t": ((2, 8), 8, bytes(68))})) == (
        "t: has rows of 8 elements, needs a multiple of 32 (a block of Q8_0)."
    )
    assert problem(file_of({}, {"t": ((2, 0), 0, b"")})) == (
        "t: has dims [0, 2], needs 1 to 9223372036854775807 elements."
    )
    assert problem(file_of({}, {"t": ((1,) * 5, 0, bytes(4))})) == "t: has 5 dims, needs 1 to 4."
    assert problem(file_of({}, {"t" * 65: f32(1)})) == (
        "header: has a name of 65 bytes at byte 32, needs at most 64."
    )
    assert problem(file_of({}, one)[:-1]) == "t: is at bytes 96:160, the file ends at 159."
    assert problem(_aligned(0)) == "general.alignment: is 0, needs an int of at least 1."
    raw = file_of({}, one)
    assert problem(raw[:57] + struct.pack("<Q", 8) + raw[65:]) == (
        "t: begins at byte 8, needs a multiple of 32."
    )
    two = file_of({}, {"t": f32(2, 8), "u": f32(2, 8)})
    at = two.index(struct.pack("<Q", 64))
    assert problem(two[:at] + struct.pack("<Q", 32) + two[at + 8 :]) == (
        "u: begins at byte 160, inside 't', which ends at 192."
    )


def _aligned(alignment: int) -> bytes:
    raw = file_of({"general.alignment": 32}, {})
    return raw.replace(struct.pack("<I", 32), struct.pack("<I", alignment))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_headers_raise_nothing_else(data: st.DataObject) -> None:
    raw = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 400))
        patch = data.draw(st.binary(min_size=1, max_size=8))
        raw[at : at + len(patch)] = patch
    cut = bytes(raw[: data.draw(st.sampled_from([len(raw), 30, 100, 200, 300]))])
    try:
        header = parse_gguf(cut)
    except HeaderError:
        return
    assert all(t.start + t.num_bytes <= len(cut) for t in header.tensors.values())
    try:
        for weight in weights_of(header).values():
            read_weight(weight, cut)
    except (ConfigError, DtypeError):
        return


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 3))
def test_noise_raises_nothing_else(noise: bytes, num_tensors: int, num_keys: int) -> None:
    try:
        header = parse_gguf(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_keys) + noise)
    except HeaderError:
        return
    assert isinstance(header, GgufHeader)


def refused(kind: type[LadingError], weight: GgufWeight, raw: bytes = SMALL, **span: Any) -> str:
    with pytest.raises(kind) as info:
        read_weight(weight, raw, **span)
    return str(info.value)


def test_reads_are_checked() -> None:
    raw = file_of({}, {"t": ((2, 64), 8, bytes(136))})
    weight = GgufWeight(name="w", tensor=parse_gguf(raw).tensors["t"])
    assert refused(LayoutError, weight, raw, columns=(0, 48)) == (
        "w: column 48 is inside a block of 32 (Q8_0): 48 = 1 * 32 + 16."
    )
    assert refused(CallError, weight, raw, rows=(1, 3)) == (
        "rows 1:3 are asked for, needs a range in 0:2."
    )
    assert refused(CallError, weight, raw[:-1]) == (
        "w: 231 bytes are given, needs the file up to byte 232."
    )
    k_quant = GgufTensor(name="t", kind=KINDS[12], shape=(1, 256), start=0)
    assert refused(DtypeError, GgufWeight(name="w", tensor=k_quant), bytes(144)) == (
        "is Q4_K, needs one of: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 (others are not "
        "decoded)."
    )


def unknown(metadata: dict[str, Any], name: str = "output.weight", rows: int = 8) -> str:
    with pytest.raises(ConfigError) as info:
        weights_of(parse_gguf(file_of(metadata, {name: f32(rows, 8)})))
    return str(info.value)


def test_other_architectures_are_refused() -> None:
    assert unknown(LLAMA | {"general.architecture": "qwen2"}) == (
        "general.architecture: is 'qwen2', needs \"llama\"."
    )
    assert unknown(LLAMA, "blk.0.ssm_in.weight") == (
        'blk.0.ssm_in.weight: is no tensor of an architecture "llama" that is known here.'
    )
    assert unknown(LLAMA, "blk.0.attn_q.weight", rows=6) == (
        "blk.0.attn_q.weight: has 6 rows, needs whole heads of 4: 6 = 1 * 4 + 2."
    )
    assert unknown(LLAMA | {"llama.attention.key_length": 3}) == (
        "llama.attention.key_length: is 3, needs an even int of at least 2."
    )
    assert unknown(LLAMA | {"llama.attention.head_count": 3}) == (
        "llama.attention.head_count: is 3 and llama.embedding_length 8, needs ints that divide (or "
        "llama.attention.key_length)."
    )
