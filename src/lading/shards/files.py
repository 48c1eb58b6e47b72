"""The files of a pre-sharded folder: their names, what is in which order in them, their headers.

All of it follows from the plan of all ranks. No torch.

Letters: r = tp_rank.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping, Sequence
from math import prod

from lading import dtypes
from lading.checkpoint import Header, Source, encode_header, header_length, parse_header
from lading.checkpoint.header import PREFIX_BYTES
from lading.plan import Plan, Target

__all__ = [
    "MANIFEST",
    "REST",
    "data_bytes_of_rank",
    "header_of_rank",
    "header_of_rest",
    "layouts_id",
    "parameters_of",
    "parse_head",
    "rank_file",
    "rest_of",
]

MANIFEST = "lading.json"
REST = "model-rest.safetensors"

_NO_ID = "0" * 64


def rank_file(tp_rank: int, tp_size: int) -> str:
    """(1, 4) -> 'model-rank-00001-of-00004.safetensors'."""
    return f"model-rank-{tp_rank:05}-of-{tp_size:05}.safetensors"


def parameters_of(plan: Plan) -> tuple[Target, ...]:
    """The targets that a rank holds, in the order in which its file has them.

    Model order, but those whose bytes are no multiple of 8 come last, wide elements first: then
    every tensor begins at a multiple of its element, as other readers of the format need it.
    """
    return tuple(target for target, _ in _held(plan))


def rest_of(plan: Plan, sources: Mapping[str, Source]) -> tuple[Source, ...]:
    """The checkpoint tensors that no rank keeps, in the order of the file that has them."""
    kept = {binding.source for binding in plan.bindings} - {c.source for c in plan.checks()}
    rest = [source for name, source in sources.items() if name not in kept]
    return tuple(sorted(rest, key=lambda s: _late(s.dtype, s.num_bytes)))


def _late(dtype: str, num_bytes: int) -> int:
    """0 for what keeps those after it aligned, else more for narrower elements."""
    return 0 if not num_bytes % 8 else 9 - dtypes.storage_bytes(dtype)


_Held = tuple[tuple[Target, tuple[int, ...]], ...]
_known: dict[int, tuple[weakref.ref[Plan], _Held]] = {}


def _held(plan: Plan) -> _Held:
    """`parameters_of` with their local shapes, worked out once for each plan and layout."""
    known = _known.get(id(plan))
    if known is not None and known[0]() is plan:
        return known[1]
    shapes: dict[int, tuple[int, ...]] = {}
    for target in plan.targets:
        if id(target.layout) not in shapes:
            shapes[id(target.layout)] = target.layout.local_shape
    kept = [(t, shapes[id(t.layout)]) for t in plan.targets if t.expected is None]
    held = tuple(sorted(kept, key=lambda one: _late(one[0].dtype, _num_bytes(*one))))
    key = id(plan)
    _known[key] = weakref.ref(plan, lambda _gone: _known.pop(key, None)), held
    return held


def _num_bytes(target: Target, shape: tuple[int, ...]) -> int:
    return prod(shape) * dtypes.storage_bytes(target.dtype)


def header_of_rank(plan: Plan, tp_rank: int, identity: str = _NO_ID) -> bytes:
    """The first bytes of rank r's file; as many for every identity and rank."""
    tensors = [(t.name, t.dtype, _header_shape(t, shape)) for t, shape in _held(plan)]
    metadata = {"format": "pt", "lading.id": identity, "lading.layouts": layouts_id(plan)}
    metadata |= {"lading.rank": f"{tp_rank:05}", "lading.tp_size": f"{plan.tp_size:05}"}
    return encode_header(tensors, metadata)


def layouts_id(plan: Plan) -> str:
    """A sha256 of how the parameters are cut, by which a manifest that was edited is known: another
    layout may be as consistent, and give other parameters at another TP size.
    """
    known = _layouts.get(id(plan))
    if known is not None and known[0]() is plan:
        return known[1]
    hashed = hashlib.sha256()
    layouts = {id(target.layout): target.layout for target in plan.targets}
    spelled = {key: repr(layout) for key, layout in layouts.items()}
    numbers: dict[str, int] = {}  # equal layouts may be one object or several
    for target in plan.targets:
        text = spelled[id(target.layout)]
        if text not in numbers:
            numbers[text] = len(numbers)
            hashed.update(text.encode())
        hashed.update(repr((target.name, target.dtype, numbers[text])).encode())
    identity, key = hashed.hexdigest(), id(plan)
    _layouts[key] = weakref.ref(plan, lambda _gone: _layouts.pop(key, None)), identity
    return identity


_layouts: dict[int, tuple[weakref.ref[Plan], str]] = {}


def _header_shape(target: Target, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The local shape as a header counts it: F4 by single values."""
    return (*shape[:-1], shape[-1] * 2) if target.dtype == "F4" and shape else shape


def header_of_rest(rest: Sequence[Source], identity: str = _NO_ID) -> bytes:
    """The first bytes of the file of tensors that no rank keeps."""
    tensors = [(source.name, source.dtype, source.shape) for source in rest]
    return encode_header(tensors, {"format": "pt", "lading.id": identity})


def parse_head(head: bytes, file_bytes: int) -> Header:
    """The header in the first bytes of a file that `header_of_rank` and its like wrote."""
    length = header_length(head[:PREFIX_BYTES], file_bytes)
    return parse_header(head[PREFIX_BYTES : PREFIX_BYTES + length], file_bytes)


def data_bytes_of_rank(plan: Plan) -> int:
    """Bytes of the tensors in each rank's file."""
    return sum(_num_bytes(*held) for held in _held(plan))
