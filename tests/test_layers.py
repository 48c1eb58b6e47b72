"""Layers as values: which tensors they have, and how each is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import pytest

from lading.errors import DeclarationError, LayoutError
from lading.layers import Layer
from lading.specs import Along, Dim, TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Expect:
    """For T ranks: the checkpoint's shape of each part, and the local shape, of weight and bias."""

    id: str
    layer: Layer
    tp_size: int
    parts: dict[str | int | None, Shape]
    weight: Shape
    bias: Shape


CASES = [
    Expect("replicated", Layer.replicated(6, 4, bias=True), 3, {None: (4, 6)}, (4, 6), (4,)),
    Expect("column", Layer.column(6, [12], bias=True), 3, {None: (12, 6)}, (4, 6), (4,)),
    Expect(
        "merged, unequal",
        Layer.column(6, [12, 3], bias=True),
        3,
        {0: (12, 6), 1: (3, 6)},
        (5, 6),
        (5,),
    ),
    Expect(
        "merged, named",
        Layer.column(6, [12, 12], names=["gate", "up"], bias=True),
        2,
        {"gate": (12, 6), "up": (12, 6)},
        (12, 6),
        (12,),
    ),
    Expect(
        "qkv",
        Layer.qkv(6, 4, 6, 2, bias=True),
        6,
        {"q": (24, 6), "k": (8, 6), "v": (8, 6)},
        (12, 6),
        (12,),
    ),
    Expect(
        "qkv, another v",
        Layer.qkv(6, 4, 3, 3, v_head_size=5, bias=True),
        3,
        {"q": (12, 6), "k": (12, 6), "v": (15, 6)},
        (13, 6),
        (13,),
    ),
    Expect("row", Layer.row(12, 5, bias=True), 3, {None: (5, 12)}, (5, 4), (5,)),
    Expect(
        "embedding",
        Layer.embedding(101, 6, pad_to=64, bias=True),
        3,
        {None: (101, 6)},
        (64, 6),
        (64,),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_shapes(case: Expect) -> None:
    weight, bias = (case.layer.layout(spec, case.tp_size) for spec in case.layer.specs())
    assert {name: weight.source_shape(name) for name in weight.part_names} == case.parts
    assert weight.local_shape == case.weight
    assert bias.local_shape == case.bias
    assert [spec.name for spec in case.layer.specs()] == ["weight", "bias"]


def test_a_packed_tensor_lies_the_other_way_round() -> None:
    """GPTQ's qweight is [I / 8, O]: its first dim runs along the inputs."""
    spec = TensorSpec(
        name="qweight",
        dims=(
            Dim(along=Along.INPUT, grain=Fraction(8), reason="int4 packs 8 rows per int32 entry"),
            Dim(along=Along.OUTPUT),
        ),
        dtypes=("I32",),
    )
    layout = Layer.row(96, 5).layout(spec, 3)
    assert (layout.source_shape(), layout.local_shape) == ((12, 5), (4, 5))
    with pytest.raises(LayoutError) as caught:
        Layer.row(96, 5).layout(spec, 8)
    assert str(caught.value) == (
        "TP 8 cuts 96 rows into 12 per rank; int4 packs 8 rows per int32 entry and "
        "12 = 1 * 8 + 4. Try: TP 1, 2, 3, 4 or 6."
    )


def test_a_number_for_each_part() -> None:
    spec = TensorSpec(name="scale", dims=(Dim(along=Along.PARTS),))
    layout = Layer.qkv(5, 2, 6, 2).layout(spec, 2)
    assert (layout.part_names, layout.local_shape) == (("q", "k", "v"), (3,))
    assert (layout.source_shape("k"), layout.fused_shape) == ((1,), (1,))
    assert Layer.row(4, 4).layout(spec, 2).local_shape == (1,)


def test_dims_that_no_rank_cuts() -> None:
    dims = (Dim(along=Along.WHOLE_INPUT, grain=Fraction(4)), Dim(along=Along.FIXED, size=7))
    layout = Layer.row(96, 5).layout(TensorSpec(name="x", dims=dims), 3)
    assert layout.source_shape() == layout.local_shape == (24, 7)


def test_everything_that_a_dim_says_reaches_the_cut() -> None:
    dim = Dim(
        along=Along.OUTPUT,
        grain=Fraction(2),
        ragged=True,
        straddle=True,
        reason="because",
        align=3,
        align_reason="tiles",
    )
    layer = Layer.column(5, [6, 12])
    layout = layer.layout(TensorSpec(name="x", dims=(dim,)), 2, fused_source=True)
    (cut,) = layout.cuts
    assert (cut.axis, cut.grain, cut.ragged) == (layer.output, Fraction(2), True)
    assert cut.straddle
    assert (cut.reason, cut.align, cut.align_reason) == ("because", 3, "tiles")
    assert layout.fused_source
    one = Layer.column(5, [12]).layout(TensorSpec(name="x", dims=(dim,)), 2, fused_source=True)
    assert not one.fused_source, "one part is not fused"


@dataclass(frozen=True)
class Fails:
    id: str
    make: Callable[[], object]
    error: type[DeclarationError]
    text: str


FAILS = [
    Fails(
        "heads",
        lambda: Layer.qkv(6, 4, 8, 3),
        LayoutError,
        "8 q heads do not share 3 KV heads equally: 8 = 3 * 2 + 2.",
    ),
    Fails(
        "no size",
        lambda: Layer.row(0, 4),
        DeclarationError,
        "a layer size is 0, needs an int of at least 1.",
    ),
    Fails(
        "a flag for a size",
        lambda: Layer.replicated(True, 4),
        DeclarationError,
        "a layer size is True, needs an int of at least 1.",
    ),
    Fails(
        "half a size",
        lambda: Layer.embedding(101, 4.0, pad_to=64),  # type: ignore[arg-type]
        DeclarationError,
        "a layer size is 4.0, needs an int of at least 1.",
    ),
    Fails(
        "fewer names than parts",
        lambda: Layer.column(4, [4, 4], names=["gate"]),
        DeclarationError,
        "a column layer has 2 output sizes, needs as many names: 'gate'.",
    ),
    Fails(
        "no output",
        lambda: Layer.column(4, []),
        LayoutError,
        "an axis has no part, needs at least one.",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused(case: Fails) -> None:
    with pytest.raises(case.error) as caught:
        case.make()
    assert str(caught.value) == case.text
    assert type(caught.value) is case.error
