"""permute_param_layout_ against torch.permute, for every pair of dims."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lading.errors import CallError, DeclarationError
from lading.layouts import Axis, Cut, Layout, Part
from lading.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
    permute_param_layout_,
)

from .made import make, numbered, refused

SHAPES = {2: (3, 4), 3: (3, 4, 5), 4: (2, 3, 4, 5)}
PAIRS = [(n, *pair) for n in SHAPES for pair in itertools.permutations(range(n), 2)]


def order_of(num_dims: int, have: tuple[int, int], want: tuple[int, int]) -> list[int]:
    """Which dim goes where: the two as asked, the rest as they were."""
    rest = [dim for dim in range(num_dims) if dim not in have]
    return [
        have[0] if place == want[0] else have[1] if place == want[1] else rest.pop(0)
        for place in range(num_dims)
    ]


@pytest.mark.parametrize(("num_dims", "have_in", "have_out"), PAIRS)
def test_every_permutation(num_dims: int, have_in: int, have_out: int) -> None:
    for want_in, want_out in itertools.permutations(range(num_dims), 2):
        order = order_of(num_dims, (have_in, have_out), (want_in, want_out))
        for packed in range(num_dims):
            data = numbered(SHAPES[num_dims], torch.int32)
            param = PackedvLLMParameter(
                data=data,
                input_dim=have_in,
                output_dim=have_out,
                packed_dim=packed,
                packed_factor=8,
            )
            goes_to = order.index(packed)
            keywords = {"packed_dim": goes_to} if packed % 2 else {}
            result = permute_param_layout_(param, want_in, want_out, **keywords)
            assert result is param
            assert torch.equal(param.data, data.permute(order))
            assert param.data.data_ptr() == data.data_ptr()
            assert (param.input_dim, param.output_dim) == (want_in, want_out)
            assert param.packed_dim == goes_to
        plain = nn.Parameter(numbered(SHAPES[num_dims], torch.float32))
        plain.input_dim, plain.output_dim = have_in, have_out
        assert permute_param_layout_(plain, input_dim=want_in, output_dim=want_out) is plain
        assert torch.equal(plain.data, numbered(SHAPES[num_dims], torch.float32).permute(order))
        assert (plain.input_dim, plain.output_dim) == (want_in, want_out)
        assert not hasattr(plain, "packed_dim")


@pytest.mark.parametrize("cls", [ChannelQuantScaleParameter, RowvLLMParameter])
def test_two_dims_of_which_one_is_known(cls: type[Any]) -> None:
    for have, want in itertools.product(range(2), repeat=2):
        param = make(cls, numbered((3, 4)), input_dim=have, output_dim=have)
        mine, other = ("input_dim", "output_dim")[:: 1 if cls is RowvLLMParameter else -1]
        permute_param_layout_(param, **{mine: want, other: 1 - want})
        data = numbered((3, 4))
        assert torch.equal(param.data, data if have == want else data.t())
        assert getattr(param, mine) == want
        assert not hasattr(param, other)


def test_dims_counted_from_the_end() -> None:
    param = GroupQuantScaleParameter(data=numbered((3, 4)), input_dim=-1, output_dim=-2)
    permute_param_layout_(param, input_dim=0, output_dim=1)
    assert torch.equal(param.data, numbered((3, 4)).t())
    assert (param.input_dim, param.output_dim) == (0, 1)


def test_a_declared_layout_follows() -> None:
    cuts = (
        Cut(axis=Axis(parts=(Part(name=0, size=4), Part(name=1, size=2)))),
        Cut(axis=Axis.of(3)),
    )
    param = ModelWeightParameter(data=numbered((6, 3)), input_dim=1, output_dim=0)
    param.tp_layout = Layout(cuts=cuts)
    permute_param_layout_(param, input_dim=0, output_dim=1)
    assert param.tp_layout == Layout(cuts=cuts[::-1])
    assert param.tp_layout.local_shape == tuple(param.shape)


def refusals() -> list[Any]:
    two = {"input_dim": 1, "output_dim": 0}
    return [
        (ModelWeightParameter, (2, 3), two, (0, 0), {}, CallError,
         "input_dim and output_dim are both 0, needs two dims."),
        (ModelWeightParameter, (2, 3), two, (2, 0), {}, CallError,
         "input_dim is 2, needs 0 to 1."),
        (ModelWeightParameter, (2, 3), two, (0, -1), {}, CallError,
         "output_dim is -1, needs an int of at least 0."),
        (ModelWeightParameter, (2, 3), {"input_dim": 0, "output_dim": 0}, (0, 1), {}, CallError,
         "has its inputs and outputs both along dim 0, needs two dims."),
        (ModelWeightParameter, (2, 3), {"input_dim": 2, "output_dim": 0}, (0, 1), {},
         DeclarationError, "is cut along dim 2, needs a dim of its shape [2, 3]."),
        (ModelWeightParameter, (2, 3), two, (0, 1), {"packed_dim": 0}, CallError,
         "packed_dim is asked to be 0, but it does not exist (elements are not repacked)."),
        (PackedvLLMParameter, (2, 3), {**two, "packed_dim": 1}, (0, 1), {"packed_dim": 1},
         CallError,
         "packed_dim is asked to be 1, but it goes to dim 0 (elements are not repacked)."),
        (RowvLLMParameter, (2, 3, 4), {"input_dim": 1}, (0, 1), {}, CallError,
         "has 3 dims and only one of input_dim and output_dim, needs both, or 2 dims."),
    ]  # fmt: skip


@pytest.mark.parametrize(("cls", "shape", "facts", "want", "more", "error", "text"), refusals())
def test_refusals(
    cls: type[Any],
    shape: tuple[int, ...],
    facts: dict[str, int],
    want: tuple[int, int],
    more: dict[str, int],
    error: Any,
    text: str,
) -> None:
    param = make(cls, numbered(shape), **facts)
    state = {key: value for key, value in vars(param).items() if key != "_ledger"}
    with refused(error, f"{cls.__name__}: {text}", param):
        permute_param_layout_(param, input_dim=want[0], output_dim=want[1], **more)
    assert tuple(param.shape) == shape
    assert {key: value for key, value in vars(param).items() if key != "_ledger"} == state


def test_a_parameter_that_says_nothing() -> None:
    param = nn.Parameter(torch.zeros(2, 3))
    with refused(
        CallError, "Parameter: has neither input_dim nor output_dim, needs one of them.", param
    ):
        permute_param_layout_(param, input_dim=0, output_dim=1)
