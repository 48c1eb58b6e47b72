"""Permuting a parameter's dims in place, its declared dims with them."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

from lading import owners
from lading.errors import CallError
from lading.parameter.base import BasevLLMParameter

__all__ = ["permute_param_layout_"]


def permute_param_layout_(
    param: Parameter, input_dim: int, output_dim: int, packed_dim: int | None = None
) -> Parameter:
    """Permutes a parameter in place so that inputs and outputs run along the given dims; returns it.

    Other dims keep their order, and `packed_dim` follows. A 2-D parameter may know only one of its
    dims. Raises a CallError where `packed_dim` is given and would have to be another dim: elements
    are never repacked.

    Example: [out, in / 8] with packed_dim 1 → input_dim=0, output_dim=1 gives [in / 8, out], packed_dim 0.
    """
    facts = vars(param)
    name = owners.name_of(param)
    have_in, have_out = _dim_of(facts, "input_dim"), _dim_of(facts, "output_dim")
    num_dims = param.dim()
    if have_in is None or have_out is None:
        if have_in is None and have_out is None:
            raise CallError("has neither input_dim nor output_dim, needs one of them", subject=name)
        if num_dims != 2:
            raise CallError(
                f"has {num_dims} dims and only one of input_dim and output_dim, needs both, or 2 dims",
                subject=name,
            )
        have_in = 1 - have_out if have_in is None and have_out is not None else have_in
        have_out = 1 - have_in if have_out is None and have_in is not None else have_out
    assert have_in is not None and have_out is not None, "one of the two was set, the other follows"
    for keyword, dim in (("input_dim", input_dim), ("output_dim", output_dim)):
        if not isinstance(dim, int) or not 0 <= dim < num_dims:
            raise CallError(f"{keyword} is {dim!r}, needs 0 to {num_dims - 1}", subject=name)
    if input_dim == output_dim:
        raise CallError(
            f"input_dim and output_dim are both {input_dim}, needs two dims", subject=name
        )
    rest = iter(dim for dim in range(num_dims) if dim not in (have_in, have_out))
    chosen = {input_dim: have_in, output_dim: have_out}
    order = tuple(chosen[i] if i in chosen else next(rest) for i in range(num_dims))
    packed = _dim_of(facts, "packed_dim")
    if packed_dim is not None and (packed is None or order.index(packed) != packed_dim):
        where = f"goes to dim {order.index(packed)}" if packed is not None else "does not exist"
        raise CallError(
            f"packed_dim is asked to be {packed_dim}, but it {where} (elements are not repacked)",
            subject=name,
        )
    _permute(param, order)
    for key, dim in (("input_dim", input_dim), ("output_dim", output_dim)):
        _set_dim(facts, key, dim)
    if packed is not None:
        _set_dim(facts, "packed_dim", order.index(packed))
    return param


def _dim_of(facts: dict[str, Any], key: str) -> int | None:
    """A dim that a parameter declares, in our classes' field or as an engine's plain attribute."""
    value = facts.get(f"_{key}", facts.get(key))
    return value if isinstance(value, int) else None


def _set_dim(facts: dict[str, Any], key: str, dim: int) -> None:
    for spelling in (f"_{key}", key):
        if spelling in facts:
            facts[spelling] = dim


def _permute(param: Parameter, order: tuple[int, ...]) -> None:
    param.data = param.data.permute(*order)
    if isinstance(param, BasevLLMParameter):
        if param.tp_layout is not None:
            param.tp_layout = param.tp_layout.permuted(order)
        param._ledger.permute(param, order)
