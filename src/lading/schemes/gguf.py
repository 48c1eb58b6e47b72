"""GGUF files as a source of dense weights: names of Hugging Face, rows decoded to float32.

A row of I elements is I/32 blocks, each by itself:

    Q8_0   fp16 d, 32 int8 q                                       W = q * d
    Q4_0   fp16 d, 16 bytes                                        W = (q - 8) * d
    Q4_1   fp16 d, fp16 m, 16 bytes                                W = q * d + m
    Q5_0   fp16 d, u32 of fifth bits, 16 bytes                     W = (q - 16) * d
    Q5_1   fp16 d, fp16 m, u32 of fifth bits, 16 bytes             W = q * d + m
           byte j holds elements j (low nibble) and j + 16 (high nibble); bit i is the fifth of i
    F32, F16, BF16   as they are

So any rows decode by themselves, and any columns in whole blocks. In files of architecture "llama",
rows of q and k are permuted in each head: of head size D, row 2*j + t of a head is row t*D/2 + j of
the model's (convert_hf_to_gguf.py of llama.cpp, `permute`). Here is no I/O. Letters: O = rows,
I = columns, D = head size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.errors import CallError, ConfigError, DtypeError, LayoutError
from lading.schemes.gguf_header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    import torch

__all__ = ["DECODED", "GgufWeight", "decode_blocks", "read_weight", "weights_of"]

DECODED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
"""The kinds that `decode_blocks` knows."""

_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PERMUTED = ("attn_q", "attn_k")
_DERIVED = ("rope_freqs.weight",)
"""Follows from the config: the factors of rotary frequencies."""

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)")
_OUTER = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufWeight:
    """A tensor under the model's name.

    name        as Hugging Face's Llama has it: "model.layers.0.self_attn.q_proj.weight"
    head_size   D, where rows are permuted in each head; 0 elsewhere
    """

    name: str
    tensor: GgufTensor
    head_size: int = 0


def weights_of(header: GgufHeader) -> dict[str, GgufWeight]:
    """Every weight of a file of architecture "llama", by the model's name.

    Raises a ConfigError for another architecture, whose names and permutations differ, and for a
    tensor that a Llama does not have.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f'is {architecture!r}, needs "llama"', subject="general.architecture")
    head_size = _head_size(header.metadata)
    weights = {}
    for tensor in header.tensors.values():
        if tensor.name in _DERIVED:
            continue
        stem, name = _renamed(tensor.name)
        size = head_size if stem in _PERMUTED else 0
        rows, _ = _matrix(tensor)
        if size and rows % size:
            raise ConfigError(
                f"has {rows} rows, needs whole heads of {size}: {rows} = {rows // size} * {size} + "
                f"{rows % size}",
                subject=tensor.name,
            )
        weights[name] = GgufWeight(name=name, tensor=tensor, head_size=size)
    return weights


def read_weight(
    weight: GgufWeight,
    raw: bytes | memoryview,
    *,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> torch.Tensor:
    """float32 [rows, columns] in the model's order; of a weight of one dim, [rows].

    raw             the whole file; a memory map reads only the rows that are asked for
    rows, columns   (start, stop) in the model's coordinates, None = all

    Raises a LayoutError where columns cut a block, a CallError where they leave the weight.
    Example: q of 4 heads of 64, rows 64:128 -> head 1: the file's rows 64:128, in another order.
    """
    import torch

    tensor, kind = weight.tensor, weight.tensor.kind
    num_rows, num_columns = _matrix(tensor)
    first, last = _span(rows, num_rows, "rows")
    left, right = _span(columns, num_columns, "columns")
    for at in (left, right):
        if at % kind.block:
            raise LayoutError(
                f"column {at} is inside a block of {kind.block} ({kind.name}): "
                f"{at} = {at // kind.block} * {kind.block} + {at % kind.block}",
                subject=weight.name,
            )
    order, low, high = _file_rows(first, last, weight.head_size)
    width = num_columns // kind.block * kind.block_bytes
    start = tensor.start + low * width
    part = memoryview(raw)[start : start + (high - low) * width]
    if len(part) != (high - low) * width:
        raise CallError(
            f"{len(raw)} bytes are given, needs the file up to byte {start + (high - low) * width}",
            subject=weight.name,
        )
    if not part:
        return torch.empty(0, right - left)
    data = torch.frombuffer(bytearray(part), dtype=torch.uint8).reshape(high - low, width)
    begin, end = (at // kind.block * kind.block_bytes for at in (left, right))
    values = decode_blocks(kind.name, data[:, begin:end])
    values = values[torch.tensor([row - low for row in order])]
    return values.reshape(-1) if len(tensor.shape) == 1 else values


def decode_blocks(kind: str, data: torch.Tensor) -> torch.Tensor:
    """float32 [O, I] of U8 [O, bytes]: whole blocks of each row. A DtypeError for other kinds."""
    import torch

    if kind not in DECODED:
        raise DtypeError(f"is {kind}, needs one of: {', '.join(DECODED)} (others are not decoded)")
    num_rows = len(data)
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
    if plain is not None:
        return data.contiguous().view(plain).to(torch.float32)
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24}[kind]
    blocks = data.reshape(-1, size)
    scale, rest = _half(blocks[:, :2]), blocks[:, 2:]
    if kind == "Q8_0":
        return (rest.contiguous().view(torch.int8) * scale).reshape(num_rows, -1)
    least = torch.zeros_like(scale)
    if kind in ("Q4_1", "Q5_1"):
        least, rest = _half(rest[:, :2]), rest[:, 2:]
    codes = rest[:, -16:]
    values = torch.cat((codes & 0xF, codes >> 4), dim=1).to(torch.int32)
    if kind in ("Q5_0", "Q5_1"):
        bits = rest[:, :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=data.device)
        values |= (bits & 1).flatten(1).to(torch.int32) << 4
    zero = {"Q4_0": 8, "Q5_0": 16}.get(kind)
    decoded = values * scale + least if zero is None else (values - zero) * scale
    return decoded.reshape(num_rows, -1)


def _half(pair: torch.Tensor) -> torch.Tensor:
    import torch

    return pair.contiguous().view(torch.float16).to(torch.float32)


def _file_rows(first: int, last: int, head_size: int) -> tuple[list[int], int, int]:
    """Where the model's rows first:last are in the file, and the span that covers them."""
    if not head_size:
        return list(range(first, last)), first, last
    half = head_size // 2
    order = []
    for row in range(first, last):
        head, inner = divmod(row, head_size)
        order.append(head * head_size + inner % half * 2 + inner // half)
    return order, min(order, default=first), max(order, default=first - 1) + 1


def _matrix(tensor: GgufTensor) -> tuple[int, int]:
    """(rows, columns); of one dim, as many rows of one column: such tensors have no blocks."""
    if len(tensor.shape) > 1:
        return tensor.num_rows, tensor.shape[-1]
    if tensor.kind.block > 1:
        raise DtypeError(
            f"is {tensor.kind.name} of one dim, needs two for blocks", subject=tensor.name
        )
    return tensor.shape[0], 1


def _span(span: tuple[int, int] | None, size: int, word: str) -> tuple[int, int]:
    first, last = (0, size) if span is None else span
    if not 0 <= first <= last <= size:
        raise CallError(f"{word} {first}:{last} are asked for, needs a range in 0:{size}")
    return first, last


def _renamed(name: str) -> tuple[str, str]:
    """('attn_q', 'model.layers.0.self_attn.q_proj.weight') of 'blk.0.attn_q.weight'."""
    match = _LAYER.fullmatch(name)
    if match is not None and match[2] in _IN_LAYER:
        return match[2], f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"
    match = _OUTER.fullmatch(name)
    if match is not None and match[1] in _WHOLE:
        return match[1], f"{_WHOLE[match[1]]}.{match[2]}"
    raise ConfigError('is no tensor of an architecture "llama" that is known here', subject=name)


def _head_size(metadata: Mapping[str, object]) -> int:
    """llama.attention.key_length, or embedding_length / head_count."""
    size = metadata.get("llama.attention.key_length")
    if size is None:
        hidden = metadata.get("llama.embedding_length")
        heads = metadata.get("llama.attention.head_count")
        if not isinstance(hidden, int) or not isinstance(heads, int) or heads < 1 or hidden % heads:
            raise ConfigError(
                f"is {heads!r} and llama.embedding_length {hidden!r}, needs ints that divide (or "
                "llama.attention.key_length)",
                subject="llama.attention.head_count",
            )
        size = hidden // heads
    if not isinstance(size, int) or isinstance(size, bool) or size < 2 or size % 2:
        raise ConfigError(
            f"is {size!r}, needs an even int of at least 2", subject="llama.attention.key_length"
        )
    return size
