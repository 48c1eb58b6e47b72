"""Which entries of each stored tensor a rank keeps, for every format, any sizes and ranks.

The oracle knows no grains, layouts or specs: for each format it has a function from one output or
input to the stored entries that decode it, written down from the format's description. A cut is
possible where no two pieces need the same entry (or where the format's scales may be kept twice),
and a rank keeps what its elements need: nothing else, and in order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lading.errors import LadingError, LayoutError
from lading.layers import Layer
from lading.layouts import Layout
from lading.schemes.awq import Awq
from lading.schemes.base import Found, Scheme, Stored
from lading.schemes.bnb4 import STATE, Bnb4
from lading.schemes.floating import Fp8, Mxfp4, Nvfp4, ScaleLayout
from lading.schemes.gptq import Gptq
from lading.schemes.integer import PackedInt, PlainInt
from lading.schemes.marlin import Marlin, Marlin24
from lading.schemes.smoothed import PairedInt4, SmoothedInt8
from lading.specs import TensorSpec

Entries = Callable[[int], set[int]]
OUT, IN, WHOLE, PARTS = "outputs", "inputs", "whole", "parts"


@dataclass(frozen=True)
class D:
    """One dim: along which axis, and the entries of one element.

    partial    the last entry may be of fewer elements
    twice      an entry may be kept by two ranks
    multiple   pieces are multiples of so many elements
    """

    along: str
    entries: Entries = lambda j: {j}
    partial: bool = False
    twice: bool = False
    multiple: int = 1


def by(size: int) -> Entries:
    return lambda j: {j // size}


def stream(bits: int) -> Entries:
    """The words of value j in a dense stream."""
    return lambda j: {j * bits // 32, (j * bits + bits - 1) // 32}


@dataclass(frozen=True)
class Format:
    """A scheme, what its module has, and the oracle's dims of each tensor."""

    scheme: Scheme
    tensors: dict[str, tuple[D, ...]]
    found: dict[str, Stored] = field(default_factory=dict)


def formats(bits: int, group: int, inputs: int) -> dict[str, Format]:
    """Every format; `group` inputs under one scale where the format leaves a choice."""
    o, i = D(OUT), D(IN)
    groups = D(IN, by(group), partial=True)
    whole_groups = D(WHOLE, by(group), partial=True)
    one = D("one")
    gptq_bits = bits if bits in (2, 3, 4, 8) else 4
    words_in, words_out = D(IN, stream(gptq_bits)), D(OUT, stream(gptq_bits))
    dense, padded = stream(bits), by(32 // bits)
    eights = D(OUT, by(8))
    exact = D(IN, by(group))
    state = f"{STATE}nf4"
    bnb = {
        "weight": Stored(dtype="U8", shape=(2, 1)),
        "weight.absmax": Stored(dtype="F32", shape=(2,)),
        "weight.quant_map": Stored(dtype="F32", shape=(16,)),
        state: Stored(dtype="U8", shape=(9,)),
    }
    marlin_group = -1 if group % 2 else 128
    marlin_scale = one if marlin_group == -1 else D(IN, by(128))
    column = D(OUT, multiple=64)

    def marlin(height: int) -> tuple[D, ...]:
        return D(IN, by(height)), D(OUT, lambda j: {2 * j, 2 * j + 1}, multiple=64)

    return {
        "gptq": Format(
            Gptq(bits=gptq_bits, group_size=group),
            {"qweight": (words_in, o), "qzeros": (groups, words_out), "scales": (groups, o)},
        ),
        "gptq, act-order": Format(
            Gptq(bits=gptq_bits, group_size=group, act_order=True),
            {
                "qweight": (words_in, o),
                "qzeros": (whole_groups, words_out),
                "scales": (whole_groups, o),
                "g_idx": (i,),
            },
        ),
        "awq": Format(
            Awq(group_size=group),
            {"qweight": (i, eights), "qzeros": (exact, eights), "scales": (exact, o)},
        ),
        "packed, dense": Format(
            PackedInt(bits=bits, layout=ScaleLayout.GROUP, group_size=group, symmetric=False),
            {
                "weight_packed": (o, D(IN, dense, partial=True)),
                "weight_scale": (o, groups),
                "weight_zero_point": (D(OUT, dense, partial=True), groups),
            },
        ),
        "packed, padded": Format(
            PackedInt(
                bits=bits,
                layout=ScaleLayout.GROUP,
                group_size=group,
                symmetric=False,
                padded=True,
            ),
            {
                "weight_packed": (o, D(IN, padded, partial=True)),
                "weight_scale": (o, groups),
                "weight_zero_point": (D(OUT, padded, partial=True), groups),
            },
        ),
        "packed, act-order": Format(
            PackedInt(bits=bits, layout=ScaleLayout.GROUP, group_size=group, act_order=True),
            {
                "weight_packed": (o, D(IN, dense, partial=True)),
                "weight_scale": (o, whole_groups),
                "weight_g_idx": (i,),
            },
        ),
        "int8, channel": Format(
            PlainInt(layout=ScaleLayout.CHANNEL), {"weight": (o, i), "weight_scale": (o, one)}
        ),
        "int8, group": Format(
            PlainInt(layout=ScaleLayout.GROUP, group_size=group),
            {"weight": (o, i), "weight_scale": (o, groups)},
        ),
        "fp8, tensor": Format(
            Fp8(layout=ScaleLayout.TENSOR), {"weight": (o, i), "weight_scale": (D(PARTS),)}
        ),
        "fp8, block": Format(
            Fp8(layout=ScaleLayout.BLOCK, block=(12, group)),
            {
                "weight": (o, i),
                "weight_scale": (
                    D(OUT, by(12), partial=True, twice=True),
                    D(IN, by(group), partial=True, twice=True),
                ),
            },
        ),
        "mxfp8": Format(
            Fp8(layout=ScaleLayout.GROUP, block=(1, 32), exponents=True),
            {"weight": (o, i), "weight_scale": (o, D(IN, by(32)))},
        ),
        "nvfp4": Format(
            Nvfp4(),
            {
                "weight_packed": (o, D(IN, by(2))),
                "weight_scale": (o, D(IN, by(16))),
                "weight_global_scale": (D(PARTS),),
            },
        ),
        "mxfp4": Format(
            Mxfp4(), {"weight_packed": (o, D(IN, by(2))), "weight_scale": (o, D(IN, by(32)))}
        ),
        "modelopt int4": Format(
            PairedInt4(group_size=group),
            {"weight": (D(OUT, by(2)), i), "weight_scale": (o, exact)},
        ),
        "modelopt int8": Format(SmoothedInt8(), {"weight": (o, i), "weight_scale": (o,)}),
        "bitsandbytes": Format(
            Bnb4(kind="nf4", block=32 if inputs % 64 else 64),
            {
                "weight": (o, D(IN, by(2))),
                "weight.absmax": (o, D(IN, by(32 if inputs % 64 else 64))),
            },
            bnb,
        ),
        "marlin": Format(
            Marlin.of(marlin_group, inputs), {"B": marlin(16), "s": (marlin_scale, column)}
        ),
        "marlin 2:4": Format(
            Marlin24.of(marlin_group, inputs, compressed_tensors=False),
            {"B_24": marlin(32), "B_meta": marlin(32), "s": (marlin_scale, column)},
        ),
    }


NAMES = tuple(formats(4, 32, 64))


def elements_of(dim: D, layer: Layer, part: int, tp_size: int) -> list[list[int]] | None:
    """The logical elements of one part that each rank has; None where they do not divide."""
    axis = layer.output if dim.along == OUT else layer.input
    one = axis.parts[part if dim.along == OUT else 0]
    if dim.along not in (OUT, IN):
        size = one.size if dim.along == WHOLE else 1
        return [list(range(size))] * tp_size
    pieces = min(tp_size, one.max_pieces or tp_size)
    if one.size // one.unit % pieces or tp_size % pieces:
        return None
    length = one.size // pieces
    starts = [rank // (tp_size // pieces) * length for rank in range(tp_size)]
    return [list(range(start, start + length)) for start in starts]


def needs(dim: D, layer: Layer, part: int, tp_size: int) -> list[range] | None:
    """The entries that each rank needs, None where they cannot be cut."""
    elements = elements_of(dim, layer, part, tp_size)
    if elements is None:
        return None
    size = max(rows[-1] for rows in elements) + 1
    entries = [{e for j in rows for e in dim.entries(j)} for rows in elements]
    is_full = max(map(max, entries)) not in dim.entries(size) if dim.along in (OUT, IN) else True
    if not is_full and not dim.partial:
        return None  # the file cannot be: it would have a part of an entry
    for rows, mine in zip(elements, entries, strict=True):
        others = [e for r, e in zip(elements, entries, strict=True) if r != rows]
        if any(mine & other for other in others) and not dim.twice:
            return None
        if len(rows) != size and len(rows) % dim.multiple:
            return None
    if not is_full and not dim.twice and len({len(e) for e in entries}) > 1:
        return None
    return [range(min(e), max(e) + 1) for e in entries]


LAYERS = ("row", "column", "merged", "qkv", "replicated")


def layer_of(kind: str, outputs: int, inputs: int) -> Layer:
    if kind == "row":
        return Layer.row(inputs, outputs)
    if kind == "replicated":
        return Layer.replicated(inputs, outputs)
    if kind == "qkv":
        return Layer.qkv(inputs, max(outputs // 8, 1), 8, 2)
    return Layer.column(inputs, [outputs] if kind == "column" else [outputs, outputs // 2 or 1])


SIZES = st.one_of(
    st.integers(1, 12).map(lambda n: n * 64),
    st.integers(1, 40).map(lambda n: n * 16),
    st.integers(1, 60).map(lambda n: n * 10),
    st.integers(2, 200),
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(LAYERS),
    outputs=SIZES,
    inputs=SIZES,
    bits=st.integers(2, 8),
    group=st.sampled_from((10, 12, 16, 32, 64, 100)),
    tp_size=st.integers(1, 8),
)
def test_ranks_keep_what_their_elements_need(
    name: str, kind: str, outputs: int, inputs: int, bits: int, group: int, tp_size: int
) -> None:
    if name == "bitsandbytes":
        inputs = -(-inputs // 32) * 32  # rows of whole blocks; others: the format's own tests
    layer = layer_of(kind, outputs, inputs)
    form = formats(bits, group, inputs)[name]
    found = Found(
        module="module", tensors=form.found, outputs=layer.output.parts[0].size, inputs=inputs
    )
    try:
        specs = {spec.name: spec for spec in form.scheme.specs(layer, found)}
    except LadingError:
        assume(not name.startswith("marlin"))
        raise
    for tensor, dims in form.tensors.items():
        parts = range(len(layer.output.parts))
        needed = [[needs(dim, layer, part, tp_size) for dim in dims] for part in parts]
        possible = all(one is not None for of_part in needed for one in of_part)
        layout = layout_of(layer, specs[tensor], tp_size)
        assert (layout is not None) == possible, tensor
        for part in parts if layout is not None else ():
            check_part(layout, layer, dims, needed[part], part, tp_size)


def layout_of(layer: Layer, spec: TensorSpec, tp_size: int) -> Layout | None:
    """None where the cut is refused."""
    try:
        return layer.layout(spec, tp_size)
    except LayoutError:
        return None


def check_part(
    layout: Layout | None,
    layer: Layer,
    dims: tuple[D, ...],
    needed: list[list[range] | None],
    part: int,
    tp_size: int,
) -> None:
    """Each rank's boxes hold, entry by entry, what its elements need."""
    assert layout is not None
    name = layer.output.parts[part].name if layout.fused_dim is not None else None
    shape = layout.source_shape(name)
    index = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    for rank in range(tp_size):
        place = layout.place(name, rank)
        assert place is not None
        kept = index
        for dim, (start, size) in enumerate(
            zip(place.source.start, place.source.size, strict=True)
        ):
            kept = kept.narrow(dim, start, size)
        wanted = index
        for number, (dim, ranges) in enumerate(zip(dims, needed, strict=True)):
            assert ranges is not None
            own = ranges[rank]
            elements = elements_of(dim, layer, part, tp_size)
            assert elements is not None
            if dim.twice:
                first = place.source.start[number]
                grain = int(layout.cuts[number].grain)
                offset = layout.offset(name, rank, number)
                assert first * grain + offset == elements[rank][0]
                assert set(own) <= set(range(first, first + place.source.size[number]))
                wanted = wanted.narrow(number, first, place.source.size[number])
            else:
                wanted = wanted.narrow(number, own.start, len(own))
        assert torch.equal(kept, wanted)
