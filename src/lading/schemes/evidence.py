"""What the headers show, compared with what a scheme needs. No torch, no formats.

Letters: O = outputs, I = inputs, g = grain of a dim.

    dim along          entries of a stored module
    OUTPUT             O / g, over all parts where the module is fused; rounded up where ragged
    INPUT, WHOLE_INPUT I / g, rounded up where ragged
    PARTS              1
    FIXED              its own size
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lading.dtypes import printed, spell
from lading.errors import ConfigError, DtypeError, ShapeError
from lading.schemes.base import Found, Stored
from lading.specs import Along, Dim, TensorSpec

__all__ = ["MODEL_DTYPES", "check", "contradiction", "expected_shape", "is_dense", "spelt"]

MODEL_DTYPES = ("BF16", "F16", "F32")
"""The dtypes of what is not quantised, and of most scales."""


def is_dense(found: Found) -> bool:
    """Whether the module is as a model without quantisation stores it: a weight in a model's dtype,
    and nothing that describes it.
    """
    weight = found.tensors.get("weight")
    return (
        weight is not None
        and weight.dtype in (*MODEL_DTYPES, "F64")
        and not any(name.startswith(("weight_", "weight.")) for name in found.tensors)
    )


def expected_shape(spec: TensorSpec, found: Found) -> tuple[int, ...] | None:
    """The shape that the file needs; None where only the layout can say what is wrong with it."""
    if spec.stored is not None:
        return None if -1 in spec.stored else spec.stored
    sizes = [_entries(dim, found) for dim in spec.dims]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def check(specs: Sequence[TensorSpec], found: Found, declared: str) -> None:
    """Raises where the headers contradict the specs: a tensor more, one less, shape or dtype.

    Tensors of other business (bias, scales of a KV cache) are left to whoever plans the load.
    declared   what the config says of the module, for messages: "int4 packed, groups of 64"
    """
    names = {spec.name for spec in specs}
    missing = [spec.name for spec in specs if spec.name not in found.tensors]
    surplus = [
        name
        for name in found.tensors
        if name not in names and name.startswith(("weight", "input_"))
    ]
    if missing or surplus:
        words = [f"no {name}" for name in missing]
        words += [f"{name} {spelt(found.tensors[name])}" for name in surplus]
        raise contradiction(found, declared, words, f"needs {', '.join(s.name for s in specs)}")
    for spec in specs:
        stored = found.tensors[spec.name]
        shape = expected_shape(spec, found)
        if shape is not None and stored.shape != shape:
            raise _located(
                ShapeError(
                    f"checkpoint tensor '{found.module}.{spec.name}' is {spelt(stored)}, needs "
                    f"{spell(stored.dtype, shape)} ({_sizes(spec, found)}config.json: {declared})"
                ),
                stored,
            )
        if spec.dtypes and stored.dtype not in spec.dtypes:
            raise _located(
                DtypeError(
                    f"checkpoint tensor '{found.module}.{spec.name}' is {spelt(stored)}, needs "
                    f"{' or '.join(map(printed, spec.dtypes))} (config.json: {declared})"
                ),
                stored,
            )


def contradiction(
    found: Found, declared: str, shown: Iterable[str], needed: str = ""
) -> ConfigError:
    """The error for a module whose tensors are not what the config says."""
    files = {stored.file for stored in found.tensors.values()} - {""}
    return ConfigError(
        f"config.json says {declared}, the checkpoint has {', '.join(shown) or 'no tensors'}"
        f"{f'; {needed}' if needed else ''}",
        subject=found.module,
        file=min(files) if len(files) == 1 else None,
    )


def spelt(stored: Stored) -> str:
    """'bf16[256, 4]'."""
    return spell(stored.dtype, stored.shape)


def _entries(dim: Dim, found: Found) -> int | None:
    if dim.along is Along.PARTS:
        return 1
    if dim.along is Along.FIXED:
        return dim.size
    count = (found.outputs if dim.along is Along.OUTPUT else found.inputs) / dim.grain
    if dim.ragged:
        return -(-count.numerator // count.denominator)
    return count.numerator if count.denominator == 1 else None


def _sizes(spec: TensorSpec, found: Found) -> str:
    along = {dim.along for dim in spec.dims if dim.grain != 1 or dim.along is Along.OUTPUT}
    words = [f"{found.outputs} outputs"] if Along.OUTPUT in along else []
    if along & {Along.INPUT, Along.WHOLE_INPUT}:
        words.append(f"{found.inputs} inputs")
    return f"{' and '.join(words)} of the layer; " if words else ""


def _located(error: ShapeError | DtypeError, stored: Stored) -> ShapeError | DtypeError:
    error.file = stored.file or None
    return error
