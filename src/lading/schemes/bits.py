"""Packed bits to numbers: the primitives that every scheme's decoding is made of. Plain PyTorch.

Letters: b = bits of an element, n = elements, W = words.

    dense stream     element j is at bits j*b : (j+1)*b of the words, which may cross words: n*b/32
    words padded words     32 // b elements in a word, the high bits zero: ceil(n / (32 // b)) words
Bits count from the least significant of the first word (little endian).
"""

from __future__ import annotations

import torch

__all__ = ["e2m1", "e8m0", "low_nibbles_first", "spread", "unpack_dense", "unpack_padded"]

# FP4 E2M1 (OCP Microscaling Formats v1.0, 5.3.3): sign, two exponent bits, one mantissa bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_dense(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 [..., W, ...] -> int32 [..., 32*W/b, ...] of values 0 to 2^b - 1, from a dense stream.

    Example: b = 3: 3 words hold 32 values; values 10 and 21 cross words.
    """
    dim %= words.dim()
    words = words.movedim(dim, -1)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    following = torch.zeros_like(wide)
    following[..., :-1] = wide[..., 1:]
    pairs = wide | (
        following << 32
    )  # the sign bit of the pair is only ever shifted out of the mask
    starts = torch.arange(words.shape[-1] * 32 // bits, device=words.device) * bits
    values = (pairs[..., starts // 32] >> (starts % 32)) & ((1 << bits) - 1)
    return values.to(torch.int32).movedim(-1, dim)


def unpack_padded(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32 [..., W, ...] -> int32 [..., W * (32 // b), ...], each word by itself."""
    dim %= words.dim()
    words = words.movedim(dim, -1)
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    values = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return values.flatten(-2).movedim(-1, dim)


def low_nibbles_first(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., n/2] -> uint8 [..., n]: the low nibble is the even element."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def e2m1(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes -> float32: bit 3 is the sign, the rest indexes 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    return table[codes.to(torch.int64)]


def e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 (or float8_e8m0fnu) exponents -> float32 2^(e - 127); 255 is NaN (OCP MX v1.0,
    5.4.1).
    """
    codes = exponents.view(torch.uint8).to(torch.int32)
    values = torch.ldexp(torch.ones(codes.shape, device=codes.device), codes - 127)
    return values.masked_fill(codes == 255, torch.nan)


def spread(scales: torch.Tensor, dim: int, grain: int, offset: int, size: int) -> torch.Tensor:
    """One entry for each `grain` elements -> one for each of `size` elements, from element `offset`
    on.

    offset   where the first element lies inside the first entry's elements
    Example: entries [a, b], grain 4, offset 2, size 5 -> [a, a, b, b, b].
    """
    index = (torch.arange(size, device=scales.device) + offset) // grain
    return scales.index_select(dim, index)
