"""Random calls: a refusal that writes nothing, or exactly the elements by brute force."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.errors import LadingError
from lading.ranks import Ranks, as_current

from .made import ALL, COLUMN, ROW, bits, make, moved, numbered, poisoned, times

MANY = settings(max_examples=300, deadline=None)
sizes = st.integers(0, 6)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def outcome(param: Any, call: str, loaded: torch.Tensor, **keywords: Any) -> LadingError | None:
    """What a call raised; if it raised, it has written nothing."""
    before, raised = bits(param), None
    try:
        getattr(param, call)(loaded, **keywords)
    except LadingError as error:
        raised = error
    if raised is not None:
        assert bits(param) == before
        assert str(raised).startswith(type(param).__name__)
    return raised


@MANY
@given(data=st.data(), cls=st.sampled_from(COLUMN), shape=shapes, tp_size=st.integers(1, 6))
def test_merged_and_qkv(
    data: st.DataObject, cls: type[Any], shape: list[int], tp_size: int
) -> None:
    draw = data.draw
    dim = draw(st.integers(0, len(shape) - 1))
    rank = draw(st.integers(0, tp_size - 1))
    offset, size = draw(sizes), draw(sizes)
    pieces = draw(st.sampled_from([tp_size, tp_size, 1, 2, 3]))
    sharing = draw(st.sampled_from([1, tp_size, 2]))
    part = draw(st.sampled_from("qkv"))
    is_qkv = draw(st.booleans())
    full = list(shape)
    full[dim] = size * pieces + draw(st.sampled_from([0, 0, 0, 1, -1]))
    if full[dim] < 0:
        return
    packed = {"packed_dim": (dim + 1) % len(shape), "packed_factor": 1}
    with as_current(Ranks(tp_rank=rank, tp_size=tp_size)):
        param = make(cls, poisoned(shape), output_dim=dim, input_dim=0, **packed)
        where: dict[str, Any] = {"shard_id": part, "shard_offset": offset, "shard_size": size}
        call = "load_qkv_weight" if is_qkv else "load_merged_column_weight"
        if is_qkv:
            where["num_heads"] = sharing
        error = outcome(param, call, numbered(full), **where)
    shared = sharing if is_qkv and part != "q" else 1
    legal = (
        tp_size % shared == 0
        and full[dim] == size * (tp_size // shared)
        and offset + size <= shape[dim]
    )
    assert legal == (error is None)
    if error is None:
        first = rank // shared * size
        want = moved(shape, full, dim, at=offset, size=size, first=first)
        assert torch.equal(param.data, want)


@MANY
@given(data=st.data(), cls=st.sampled_from(ALL), shape=shapes, tp_size=st.integers(1, 6))
def test_column_and_row(
    data: st.DataObject, cls: type[Any], shape: list[int], tp_size: int
) -> None:
    draw = data.draw
    dim = draw(st.integers(0, len(shape) - 1))
    rank = draw(st.integers(0, tp_size - 1))
    is_row = draw(st.booleans())
    full = [n + draw(st.sampled_from([0, 0, 0, 0, 1])) for n in shape]
    full[dim] = full[dim] * draw(st.sampled_from([tp_size, tp_size, 1, 2]))
    packed = {"packed_dim": 0, "packed_factor": 4}
    with as_current(Ranks(tp_rank=rank, tp_size=tp_size)):
        param = make(cls, poisoned(shape), output_dim=dim, input_dim=dim, **packed)
        call = "load_row_parallel_weight" if is_row else "load_column_parallel_weight"
        error = outcome(param, call, numbered(full))
    is_cut = cls in (ROW if is_row else COLUMN)
    assert (full == times(shape, dim, tp_size if is_cut else 1)) == (error is None)
    if error is None:
        first = rank * shape[dim] if is_cut else 0
        assert torch.equal(param.data, moved(shape, full, dim, at=0, size=shape[dim], first=first))
