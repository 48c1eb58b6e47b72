"""Permuting a parameter's dims in place, its declared dims with them."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

from lading import owners
from lading.errors import CallError, LadingError
from lading.parameter.base import BasevLLMParameter
from lading.parameter.checks import dim_of, whole_number

__all__ = ["permute_param_layout_"]


def permute_param_layout_(
    param: Parameter, input_dim: int, output_dim: int, packed_dim: int | None = None
) -> Parameter:
    """Permutes a parameter in place so that its inputs and outputs run along the given dims.

    Returns the same object. Other dims keep their order, and `packed_dim` follows. A 2-D parameter
    may know only one of its dims. Raises a CallError where `packed_dim` is given and would have to
    be another dim: elements are never repacked.

    Example: [out, in / 8] with packed_dim 1 → input_dim=0, output_dim=1 gives [in / 8, out], and
    packed_dim 0.
    """
    facts = vars(param)
    try:
        order = _order(param, _whole_dims(param, input_dim=input_dim, output_dim=output_dim))
        packed = _dim_of(param, "packed_dim")
        goes_to = order.index(packed) if packed is not None else None
        if packed_dim is not None and packed_dim != goes_to:
            where = f"goes to dim {goes_to}" if goes_to is not None else "does not exist"
            raise CallError(
                f"packed_dim is asked to be {packed_dim}, but it {where} "
                "(elements are not repacked)"
            )
    except LadingError as error:
        raise error.located(subject=owners.name_of(param)) from None
    if isinstance(param, BasevLLMParameter):
        param._ledger.permute(param, order)
        if param.tp_layout is not None:
            param.tp_layout = param.tp_layout.permuted(order)
        before = param.stored_order or tuple(range(param.dim()))
        param.stored_order = tuple(before[dim] for dim in order)
    else:
        param.data = param.data.permute(*order)
    for key, dim in (("input_dim", input_dim), ("output_dim", output_dim), ("packed_dim", goes_to)):
        for spelling in (f"_{key}", key):
            if spelling in facts:
                facts[spelling] = dim
    return param


def _whole_dims(param: Parameter, **asked: int) -> tuple[int, int]:
    """The asked dims of inputs and outputs, if they are two dims of the parameter."""
    for keyword, dim in asked.items():
        if whole_number(keyword, dim) >= param.dim():
            raise CallError(f"{keyword} is {dim}, needs 0 to {param.dim() - 1}")
    inputs, outputs = asked.values()
    if inputs == outputs:
        raise CallError(f"input_dim and output_dim are both {inputs}, needs two dims")
    return inputs, outputs


def _order(param: Parameter, asked: tuple[int, int]) -> tuple[int, ...]:
    """Which of the parameter's present dims goes to each place."""
    num_dims = param.dim()
    have_in, have_out = _dim_of(param, "input_dim"), _dim_of(param, "output_dim")
    known = have_in if have_in is not None else have_out
    if known is None:
        raise CallError("has neither input_dim nor output_dim, needs one of them")
    if (have_in is None or have_out is None) and num_dims != 2:
        raise CallError(
            f"has {num_dims} dims and only one of input_dim and output_dim, needs both, or 2 dims"
        )
    have_in = 1 - known if have_in is None else have_in
    have_out = 1 - known if have_out is None else have_out
    if have_in == have_out:
        raise CallError(f"has its inputs and outputs both along dim {have_in}, needs two dims")
    chosen = dict(zip(asked, (have_in, have_out), strict=True))
    rest = iter(dim for dim in range(num_dims) if dim not in (have_in, have_out))
    return tuple(chosen[i] if i in chosen else next(rest) for i in range(num_dims))


def _dim_of(param: Parameter, key: str) -> int | None:
    """A dim that a parameter declares, in our classes' field or as an engine's plain attribute."""
    facts: dict[str, Any] = vars(param)
    value = facts.get(f"_{key}", facts.get(key))
    return dim_of(value, tuple(param.shape)) if isinstance(value, int) else None
