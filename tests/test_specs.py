"""The stored tensors of a layer that is not quantised."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lading.specs import Along, Dim, bias_spec, dense_specs


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "weight and bias"])
def test_dense(bias: bool) -> None:
    weight, *others = dense_specs(bias=bias)
    assert weight.name == "weight"
    assert [dim.along for dim in weight.dims] == [Along.OUTPUT, Along.INPUT]
    assert weight.dtypes == ()
    assert others == ([bias_spec()] if bias else [])


def test_bias() -> None:
    spec = bias_spec()
    assert (spec.name, spec.dims) == ("bias", (Dim(along=Along.OUTPUT),))


def test_a_dim_is_of_single_elements_unless_it_says_more() -> None:
    dim = Dim(along=Along.INPUT)
    assert (dim.grain, dim.ragged, dim.straddle, dim.align) == (Fraction(1), False, False, 1)
