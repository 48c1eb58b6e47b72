"""The dtypes of checkpoint files: names, bits, how they print, what each may become.

A dtype is known by its name in the safetensors format ("BF16", "F8_E4M3", ...); that is what plans
hold and what JSON shows. torch is imported only by the two functions that translate, so that
headers and plans can be read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BITS", "cast_problem", "from_torch", "load_problem", "printed", "spell", "to_torch"]

# Bits per element as the header counts elements (safetensors 0.8, `Dtype` in src/tensor.rs).
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_PRINTED: dict[str, str] = {
    "BOOL": "bool",
    "F4": "fp4",
    "F6_E2M3": "fp6_e2m3",
    "F6_E3M2": "fp6_e3m2",
    "F8_E5M2": "fp8_e5m2",
    "F8_E4M3": "fp8_e4m3",
    "F8_E8M0": "e8m0",
    "F8_E4M3FNUZ": "fp8_e4m3fnuz",
    "F8_E5M2FNUZ": "fp8_e5m2fnuz",
    "F16": "fp16",
    "BF16": "bf16",
    "F32": "fp32",
    "F64": "fp64",
    "C64": "complex64",
} | {
    f"{kind}{bits}": f"{word}{bits}"
    for bits in (8, 16, 32, 64)
    for kind, word in (("I", "int"), ("U", "uint"))
}

_TORCH: dict[str, str] = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
_FROM_TORCH = {f"torch.{name}": code for code, name in _TORCH.items()}

# Significand bits (with the hidden one), and the range [2^low, 2^(high+1)) of the finite values,
# subnormal ones too: a float holds every value of another iff all three are at least as wide.
_FLOATS: dict[str, tuple[int, int, int]] = {
    "F4": (2, -1, 2),
    "F6_E2M3": (4, -3, 2),
    "F6_E3M2": (3, -4, 4),
    "F8_E4M3": (4, -9, 8),
    "F8_E5M2": (3, -16, 15),
    "F8_E4M3FNUZ": (4, -10, 7),
    "F8_E5M2FNUZ": (3, -17, 15),
    "F16": (11, -24, 15),
    "BF16": (8, -133, 127),
    "F32": (24, -149, 127),
    "F64": (53, -1074, 1023),
}
_INTS: dict[str, tuple[int, int]] = {  # (bits of magnitude, 1 when signed)
    "BOOL": (1, 0),
    "U8": (8, 0),
    "U16": (16, 0),
    "U32": (32, 0),
    "U64": (64, 0),
    "I8": (7, 1),
    "I16": (15, 1),
    "I32": (31, 1),
    "I64": (63, 1),
}
_MODEL_DTYPES = ("F64", "F32", "BF16", "F16")


def printed(code: str) -> str:
    """'BF16' -> 'bf16', 'I32' -> 'int32', 'F8_E4M3' -> 'fp8_e4m3'."""
    return _PRINTED[code]


def spell(code: str, shape: tuple[int, ...]) -> str:
    """('BF16', (4096, 14336)) -> 'bf16[4096, 14336]'."""
    return f"{printed(code)}[{', '.join(map(str, shape))}]"


def storage_bytes(code: str) -> int:
    """Bytes of one element of the torch tensor that holds it: 1 for F4, two of which share it."""
    return max(BITS[code] // 8, 1)


def is_lossless(source: str, target: str) -> bool:
    """Whether every value of dtype `source` is a value of dtype `target`."""
    if source == target:
        return True
    if source in _INTS and target in _INTS:
        (bits, signed), (target_bits, target_signed) = _INTS[source], _INTS[target]
        return target != "BOOL" and bits <= target_bits and signed <= target_signed
    if source in _INTS and target in _FLOATS:
        return _INTS[source][0] <= _FLOATS[target][0] and target in _MODEL_DTYPES
    if source in _FLOATS and target in _FLOATS:
        (digits, low, high), (t_digits, t_low, t_high) = _FLOATS[source], _FLOATS[target]
        return target in _MODEL_DTYPES and digits <= t_digits and low >= t_low and high <= t_high
    # E8M0 is the powers of two 2^-127 .. 2^127; the lowest is subnormal in F32 and BF16.
    return source == "F8_E8M0" and target in ("BF16", "F32", "F64")


def is_cast(source: str, target: str) -> bool:
    """Whether the change is one that a model's own dtype asks for: fp64, fp32, bf16, fp16.

    Such a change rounds; a value that would become infinite is still refused when it is met.
    """
    return source in _MODEL_DTYPES and target in _MODEL_DTYPES


def cast_problem(source: str, target: str) -> str | None:
    """Why values of `source` may not be written into `target`, None where they may."""
    if is_lossless(source, target) or is_cast(source, target):
        return None
    kinds = (source in _INTS, target in _INTS)
    if kinds == (False, True):
        return "a float does not fit into an integer"
    if kinds == (True, True):
        return "the integer would be narrowed"
    if target not in _MODEL_DTYPES:
        return f"{printed(target)} is a storage format, not a dtype to round into"
    return f"{printed(target)} does not hold every {printed(source)}"


def load_problem(source: str, target: str) -> str | None:
    """Why a checkpoint tensor of dtype `source` may not fill a parameter of dtype `target`.

    Stricter than `cast_problem`: integers, bools and storage formats are never weights of a model
    dtype, though each of their values could be written. They are the sign of a quantised checkpoint
    whose config does not say so.
    """
    if source == target or is_cast(source, target):
        return None
    problem = cast_problem(source, target)
    if problem is None and target in _MODEL_DTYPES:
        return f"{printed(source)} looks quantised, and config.json declares no scheme for it"
    return problem


def to_torch(code: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; a LookupError where this torch has none."""
    import torch

    name = _TORCH.get(code)
    dtype = vars(torch).get(name) if name is not None else None
    if not isinstance(dtype, torch.dtype):
        raise LookupError(f"torch {torch.__version__} has no dtype for {code}")
    return dtype


def from_torch(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype; a LookupError where the format has none."""
    code = _FROM_TORCH.get(str(dtype))
    if code is None:
        raise LookupError(f"safetensors files have no dtype for {dtype}")
    return code
