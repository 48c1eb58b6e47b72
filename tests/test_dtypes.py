"""Dtype names and what may become what, against torch: every value of each small dtype is tried."""

from __future__ import annotations

import itertools

import pytest
import torch

from lading import dtypes
from lading.dtypes import (
    BITS,
    cast_problem,
    from_torch,
    is_cast,
    is_lossless,
    printed,
    spell,
    to_torch,
)

SMALL = [code for code, bits in BITS.items() if bits in (8, 16) and not code.startswith("F6")]
WHOLES = [*dtypes._INTS]
FLOATS = [code for code in SMALL if code not in WHOLES]
MODEL = ["F64", "F32", "BF16", "F16"]


def every_value(code: str) -> torch.Tensor:
    """Each bit pattern of a dtype of 8 or 16 bits."""
    if code == "BOOL":
        return torch.tensor([False, True])
    bits = BITS[code]
    whole = torch.uint8 if bits == 8 else torch.int16
    low = 0 if bits == 8 else -(2**15)
    patterns = torch.arange(low, low + 2**bits, dtype=torch.int64).to(whole)
    return patterns.view(to_torch(code))


def survives(source: str, target: str) -> bool:
    """Whether every value of `source` is the same number after a visit to `target`."""
    values = every_value(source)
    exact = values.to(torch.float64)  # holds every value of up to 16 bits
    back = values.to(to_torch(target)).to(torch.float64)
    return bool(torch.equal(exact.nan_to_num(nan=-0.5), back.nan_to_num(nan=-0.5)))


@pytest.mark.parametrize("target", ["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "U8", "I8"])
@pytest.mark.parametrize("source", SMALL)
def test_lossless_means_that_every_value_survives(source: str, target: str) -> None:
    float_to_whole = source in FLOATS and target in WHOLES
    survived = not float_to_whole and survives(source, target)
    assert is_lossless(source, target) == survived


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("F32", "F64", True),
        ("F64", "F32", False),
        ("F32", "BF16", False),
        ("I32", "F64", True),
        ("I32", "F32", False),
        ("I64", "F64", False),
        ("U32", "I64", True),
        ("U32", "I32", False),
        ("U64", "I64", False),
        ("I64", "U64", False),
        ("F4", "BF16", True),
        ("F6_E2M3", "BF16", True),
        ("F6_E3M2", "F16", True),
        ("F8_E8M0", "F16", False),
        ("C64", "F32", False),
        ("U8", "BOOL", False),
    ],
)
def test_lossless_of_wide_and_rare_dtypes(source: str, target: str, expected: bool) -> None:
    assert is_lossless(source, target) is expected


def test_a_dtype_holds_itself_and_nothing_is_stored_in_small_floats() -> None:
    assert all(is_lossless(code, code) and cast_problem(code, code) is None for code in BITS)
    for source, target in itertools.product(BITS, BITS):
        if source != target and target not in MODEL and target[0] in "BF" and target != "BOOL":
            assert cast_problem(source, target) is not None


def test_a_cast_is_among_the_dtypes_of_models() -> None:
    casts = {(a, b) for a, b in itertools.product(BITS, BITS) if is_cast(a, b)}
    assert casts == set(itertools.product(MODEL, MODEL))
    assert all(cast_problem(a, b) is None for a, b in casts)


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ("BF16", "I32", "a float does not fit into an integer"),
        ("I64", "I32", "the integer would be narrowed"),
        ("I8", "U8", "the integer would be narrowed"),
        ("BF16", "F8_E4M3", "fp8_e4m3 is a storage format, not a dtype to round into"),
        ("U8", "F4", "fp4 is a storage format, not a dtype to round into"),
        ("I32", "BF16", "bf16 does not hold every int32"),
        ("F8_E8M0", "F16", "fp16 does not hold every e8m0"),
    ],
)
def test_cast_problem(source: str, target: str, text: str) -> None:
    assert cast_problem(source, target) == text


@pytest.mark.parametrize("code", BITS)
def test_every_dtype_is_printed(code: str) -> None:
    assert printed(code)
    assert len({printed(other) for other in BITS}) == len(BITS)


@pytest.mark.parametrize(
    ("code", "shape", "text"),
    [
        ("BF16", (4096, 14336), "bf16[4096, 14336]"),
        ("I32", (7,), "int32[7]"),
        ("F8_E4M3", (), "fp8_e4m3[]"),
        ("U8", (0, 3), "uint8[0, 3]"),
        ("BOOL", (1,), "bool[1]"),
    ],
)
def test_spell(code: str, shape: tuple[int, ...], text: str) -> None:
    assert spell(code, shape) == text


@pytest.mark.parametrize("code", [code for code in BITS if not code.startswith("F6")])
def test_torch_and_back(code: str) -> None:
    dtype = to_torch(code)
    assert from_torch(dtype) == code
    per_entry = 2 if code == "F4" else 1  # torch's entry of fp4 holds two
    assert dtype.itemsize * 8 == BITS[code] * per_entry


def test_dtypes_that_the_other_side_lacks() -> None:
    with pytest.raises(LookupError) as caught:
        to_torch("F6_E2M3")
    assert str(caught.value) == f"torch {torch.__version__} has no dtype for F6_E2M3"
    with pytest.raises(LookupError) as caught:
        from_torch(torch.complex128)
    assert str(caught.value) == "safetensors files have no dtype for torch.complex128"


def test_the_tables_speak_of_the_same_dtypes() -> None:
    # A dtype added to one table only would be a KeyError in an error message.
    assert set(dtypes._PRINTED) == set(BITS)
    assert set(dtypes._TORCH) <= set(BITS)
    assert set(dtypes._FLOATS) | set(dtypes._INTS) | {"C64", "F8_E8M0"} == set(BITS)
