"""Packed bits, one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lading.schemes.bits import e2m1, e8m0, low_nibbles_first, spread, unpack_dense, unpack_padded

WORDS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=7)


def value(words: list[int], start: int, bits: int) -> int:
    """The bits start : start + bits of the words, the first word's least significant first."""
    return sum(
        ((words[at // 32] & 0xFFFFFFFF) >> at % 32 & 1) << place
        for place, at in enumerate(range(start, start + bits))
    )


@given(words=WORDS, bits=st.integers(2, 8))
def test_dense_streams(words: list[int], bits: int) -> None:
    expected = [value(words, j * bits, bits) for j in range(len(words) * 32 // bits)]
    packed = torch.tensor([words, words], dtype=torch.int32)
    assert unpack_dense(packed, bits, 1).tolist() == [expected, expected]
    assert unpack_dense(packed.t(), bits, 0).t().tolist() == [expected, expected]


@given(words=WORDS, bits=st.integers(2, 8))
def test_padded_words(words: list[int], bits: int) -> None:
    expected = [
        value(words, 32 * word + place * bits, bits)
        for word in range(len(words))
        for place in range(32 // bits)
    ]
    packed = torch.tensor([words], dtype=torch.int32)
    assert unpack_padded(packed, bits, 1).tolist() == [expected]
    assert unpack_padded(packed.t(), bits, 0).t().tolist() == [expected]


def test_nibbles_and_tables() -> None:
    packed = torch.tensor([0x10, 0x32, 0xFE], dtype=torch.uint8)
    assert low_nibbles_first(packed).tolist() == [0, 1, 2, 3, 14, 15]
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert e2m1(torch.arange(16)).tolist() == [*values, *(-v for v in values)]
    assert math.copysign(1, e2m1(torch.tensor([8])).item()) == -1


def test_exponents() -> None:
    found = e8m0(torch.arange(256, dtype=torch.uint8))
    assert found[:255].tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert found[255].isnan()
    assert torch.equal(
        e8m0(torch.tensor([127], dtype=torch.uint8).view(torch.float8_e8m0fnu)), torch.ones(1)
    )


@pytest.mark.parametrize(("offset", "expected"), [(0, "aaaab"), (2, "aabbb"), (3, "abbbb")])
def test_entries_are_spread_from_an_offset(offset: int, expected: str) -> None:
    found = spread(torch.tensor([0, 1]), 0, 4, offset, 5)
    assert "".join("ab"[i] for i in found) == expected
