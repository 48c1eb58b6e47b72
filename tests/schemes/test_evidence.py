"""Shapes that a module's headers need."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lading.errors import DtypeError
from lading.schemes.base import Found, Stored
from lading.schemes.evidence import check, expected_shape, is_dense
from lading.specs import Along, Dim, TensorSpec

FOUND = Found(module="m", tensors={}, outputs=20, inputs=96)


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        ((Dim(along=Along.OUTPUT), Dim(along=Along.INPUT, grain=Fraction(8))), (20, 12)),
        ((Dim(along=Along.INPUT, grain=Fraction(32, 3)),), (9,)),
        ((Dim(along=Along.INPUT, grain=Fraction(64), ragged=True),), (2,)),
        ((Dim(along=Along.INPUT, grain=Fraction(64)),), None),
        ((Dim(along=Along.WHOLE_INPUT, grain=Fraction(48)),), (2,)),
        ((Dim(along=Along.PARTS), Dim(along=Along.FIXED, size=5)), (1, 5)),
    ],
    ids=["words", "streams", "ragged", "not whole", "whole inputs", "parts"],
)
def test_shapes_follow_from_dims(dims: tuple[Dim, ...], shape: tuple[int, ...] | None) -> None:
    assert expected_shape(TensorSpec(name="a", dims=dims), FOUND) == shape


def test_another_view_needs_its_own_shape() -> None:
    dims = (Dim(along=Along.OUTPUT),)
    assert expected_shape(TensorSpec(name="a", dims=dims, stored=(20, 1)), FOUND) == (20, 1)
    assert expected_shape(TensorSpec(name="a", dims=dims, stored=(-1, 1)), FOUND) is None


def test_dense_modules_have_a_weight_and_nothing_that_describes_it() -> None:
    def found(**tensors: str) -> Found:
        stored = {name: Stored(dtype=dtype, shape=(20, 96)) for name, dtype in tensors.items()}
        return Found(module="m", tensors=stored, outputs=20, inputs=96)

    assert is_dense(found(weight="BF16", bias="F32"))
    assert not is_dense(found(weight="F8_E4M3"))
    assert not is_dense(found(weight="BF16", weight_scale="F32"))
    assert not is_dense(found(qweight="I32"))


def test_a_dtype_that_the_format_has_not() -> None:
    tensors = {"a": Stored(dtype="F16", shape=(20,), file="x.safetensors")}
    found = Found(module="m", tensors=tensors, outputs=20, inputs=96)
    with pytest.raises(DtypeError) as caught:
        check([TensorSpec(name="a", dims=(Dim(along=Along.OUTPUT),), dtypes=("I32",))], found, "x")
    assert str(caught.value) == (
        "checkpoint tensor 'm.a' is fp16[20], needs int32 (config.json: x). In x.safetensors."
    )
