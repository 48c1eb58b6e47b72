"""Parallel linear layers: what each rank keeps, and what all ranks together compute."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lading.errors import DeclarationError, LayoutError, ShapeError
from lading.launch import run_ranks
from lading.nn import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lading.parameter import BasevLLMParameter, ModelWeightParameter
from lading.ranks import Ranks, all_ranks

from . import work
from .made import kept, numbered, on_ranks

DOUBLE = torch.float64
SIZES = (1, 2, 3, 4, 6, 8)
# T, KV heads: cut, as many as ranks, shared by 2, 3 and 4 neighbours
QKV_SIZES = [(1, 2), (2, 2), (2, 6), (3, 6), (3, 3), (4, 2), (6, 2), (6, 6), (8, 4), (8, 2)]


def param(layer: ParallelLayer, name: str) -> BasevLLMParameter:
    found = layer.get_parameter(name)
    assert isinstance(found, BasevLLMParameter)
    return found


def load(layer: ParallelLayer, name: str, full: torch.Tensor, part: Any = None) -> None:
    param(layer, name).weight_loader(param(layer, name), full, part)


@pytest.mark.parametrize("size", SIZES)
def test_column_keeps_rows(size: int) -> None:
    weight, bias = numbered(24, 7), numbered(24, start=500)
    for ranks in all_ranks(size):
        layer = ColumnParallelLinear(7, 24, params_dtype=DOUBLE, ranks=ranks)
        load(layer, "weight", weight)
        load(layer, "bias", bias)
        assert torch.equal(layer.weight, kept([(weight, size)], ranks))
        assert layer.bias is not None
        assert torch.equal(layer.bias, kept([(bias, size)], ranks))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_merged_keeps_rows_of_each_part(size: int, fused: bool) -> None:
    gate, up = numbered(24, 7), numbered(72, 7, start=1000)
    for ranks in all_ranks(size):
        layer = MergedColumnParallelLinear(7, [24, 72], params_dtype=DOUBLE, ranks=ranks)
        for name, one, two in (("weight", gate, up), ("bias", gate[:, 0], up[:, 0])):
            if fused:
                load(layer, name, torch.cat([one, two]))
            else:
                load(layer, name, two, 1)
                load(layer, name, one, 0)
            needed = kept([(one, size), (two, size)], ranks)
            assert torch.equal(param(layer, name), needed)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("size", "kv_heads"), QKV_SIZES)
def test_qkv_keeps_heads(size: int, kv_heads: int, fused: bool) -> None:
    q = numbered(24 * 5, 7)
    k, v = (numbered(kv_heads * 5, 7, start=n) for n in (5000, 9000))
    pieces = min(size, kv_heads)
    for ranks in all_ranks(size):
        layer = QKVParallelLinear(7, 5, 24, kv_heads, params_dtype=DOUBLE, ranks=ranks)
        for name, parts in (("weight", (q, k, v)), ("bias", (q[:, 1], k[:, 1], v[:, 1]))):
            if fused:
                load(layer, name, torch.cat(parts))
            else:
                for shard, tensor in zip("vkq", parts[::-1], strict=True):
                    load(layer, name, tensor, shard)
            needed = kept(list(zip(parts, (size, pieces, pieces), strict=True)), ranks)
            assert torch.equal(param(layer, name), needed)
        assert layer.num_heads == 24 // size
        assert layer.num_kv_heads == max(1, kv_heads // size)
        assert layer.num_kv_head_replicas == max(1, size // kv_heads)


@pytest.mark.parametrize("size", SIZES)
def test_row_keeps_columns_and_the_whole_bias(size: int) -> None:
    weight, bias = numbered(7, 24), numbered(7)
    for ranks in all_ranks(size):
        layer = RowParallelLinear(24, 7, params_dtype=DOUBLE, ranks=ranks)
        load(layer, "weight", weight)
        load(layer, "bias", bias)
        assert torch.equal(layer.weight, kept([(weight.T, size)], ranks).T)
        assert layer.bias is not None
        assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("make", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_whole_layers(make: type[Any]) -> None:
    weight, bias = numbered(7, 5), numbered(7)
    extra: dict[str, Any] = {} if make is ReplicatedLinear else {"disable_tp": True}
    layer = make(5, 7, params_dtype=DOUBLE, ranks=Ranks(tp_rank=2, tp_size=3), **extra)
    load(layer, "weight", weight)
    load(layer, "bias", bias)
    assert torch.equal(layer.weight, weight)
    x = work.random(3, 5)
    torch.testing.assert_close(layer(x)[0], F.linear(x, weight, bias))


def column(ranks: Ranks, **extra: Any) -> ParallelLayer:
    layer = ColumnParallelLinear(30, 24, params_dtype=DOUBLE, ranks=ranks, **extra)
    return work.filled(layer, (work.random(24, 30), work.random(24)))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_column_forward(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = work.random(5, 30), work.random(24, 30), work.random(24)
    full = F.linear(x, w, b)
    for rank, (y, none) in enumerate(on_ranks(monkeypatch, size, lambda r: column(r)(x))):
        torch.testing.assert_close(y, full.chunk(size, -1)[rank])
        assert none is None
    work_gathered = on_ranks(monkeypatch, size, lambda r: column(r, gather_output=True)(x)[0])
    for y in work_gathered:
        torch.testing.assert_close(y, full)
    skipped = on_ranks(monkeypatch, size, lambda r: column(r, skip_bias_add=True)(x))
    for rank, (y, bias) in enumerate(skipped):
        torch.testing.assert_close(y, F.linear(x, w).chunk(size, -1)[rank])
        assert torch.equal(bias, b.chunk(size)[rank])
    for y in on_ranks(monkeypatch, size, lambda r: column(r, return_bias=False)(x)):
        assert isinstance(y, torch.Tensor)


@pytest.mark.parametrize("size", [2, 4])
def test_gather_puts_unequal_parts_in_full_order(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, parts = work.random(5, 30), [(work.random(n, 30), work.random(n)) for n in (4, 12, 8)]

    def forward(ranks: Ranks) -> torch.Tensor:
        layer = MergedColumnParallelLinear(
            30, [4, 12, 8], gather_output=True, params_dtype=DOUBLE, ranks=ranks
        )
        output: torch.Tensor = work.filled(layer, *parts)(x)[0]
        return output

    full = torch.cat([F.linear(x, w, b) for w, b in parts], -1)
    for y in on_ranks(monkeypatch, size, forward):
        torch.testing.assert_close(y, full)


@pytest.mark.parametrize("is_parallel", [True, False])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_row_forward(size: int, is_parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = work.random(2, 3, 30), work.random(9, 30), work.random(9)

    def forward(ranks: Ranks, **extra: Any) -> Any:
        layer = RowParallelLinear(
            30, 9, input_is_parallel=is_parallel, params_dtype=DOUBLE, ranks=ranks, **extra
        )
        piece = x.chunk(size, -1)[ranks.tp_rank] if is_parallel else x
        return work.filled(layer, (w, b))(piece)

    for y, none in on_ranks(monkeypatch, size, forward):
        torch.testing.assert_close(y, F.linear(x, w, b))
        assert none is None
    for y, bias in on_ranks(monkeypatch, size, lambda r: forward(r, skip_bias_add=True)):
        torch.testing.assert_close(y, F.linear(x, w))
        assert torch.equal(bias, b)
    products = on_ranks(
        monkeypatch, size, lambda r: forward(r, skip_bias_add=True, reduce_results=False)
    )
    for rank, (y, _) in enumerate(products):
        piece, cols = x.chunk(size, -1)[rank], w.chunk(size, -1)[rank]
        torch.testing.assert_close(y, F.linear(piece, cols))


def test_real_processes() -> None:
    # T = 3: ranks 1 and 2 of the vocabulary of 101 hold padding, rank 2 nothing else
    for found in run_ranks(work.distances, 3):
        assert set(found) == {"column", "merged", "row", "embedding", "head"}
        assert max(found.values()) < 1e-12, found


def test_no_group_to_combine_over() -> None:
    layer = RowParallelLinear(4, 3, ranks=Ranks(tp_rank=1, tp_size=2))
    load(layer, "weight", torch.ones(3, 4))
    load(layer, "bias", torch.ones(3))
    with pytest.raises(ValueError, match="forward: rank 1 of 2 has to combine") as caught:
        layer(torch.ones(5, 2))
    assert str(caught.value) == (
        "forward: rank 1 of 2 has to combine a tensor of shape [5, 3] with the other ranks, but "
        "this process is in no process group of that size. "
        "Try: start the ranks with torchrun, or pass group= to the layer."
    )


def test_compiles_as_one_graph() -> None:
    layer = ColumnParallelLinear(6, 4, return_bias=False)
    load(layer, "weight", numbered(4, 6).float())
    load(layer, "bias", numbered(4).float())
    x = torch.ones(2, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


Positional = Callable[[], Any]


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (ReplicatedLinear, "input_size output_size bias skip_bias_add params_dtype quant_config"),
        (
            ColumnParallelLinear,
            "input_size output_size bias gather_output skip_bias_add params_dtype quant_config "
            "output_sizes prefix",
        ),
        (
            MergedColumnParallelLinear,
            "input_size output_sizes bias gather_output skip_bias_add params_dtype quant_config",
        ),
        (
            QKVParallelLinear,
            "hidden_size head_size total_num_heads total_num_kv_heads bias skip_bias_add "
            "params_dtype quant_config prefix",
        ),
        (
            RowParallelLinear,
            "input_size output_size bias input_is_parallel skip_bias_add params_dtype "
            "reduce_results quant_config prefix",
        ),
        (
            VocabParallelEmbedding,
            "num_embeddings embedding_dim params_dtype org_num_embeddings padding_size "
            "quant_config prefix",
        ),
        (
            ParallelLMHead,
            "num_embeddings embedding_dim bias params_dtype org_num_embeddings padding_size "
            "quant_config prefix",
        ),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_positional_arguments_are_vllms(cls: type[Any], names: str) -> None:
    # vllm/model_executor/layers/linear.py and vocab_parallel_embedding.py, 0.6.6
    given = list(inspect.signature(cls).parameters)
    assert given[: len(names.split())] == names.split()


def test_attributes_engines_read() -> None:
    ranks = Ranks(tp_rank=1, tp_size=4)
    qkv = QKVParallelLinear(64, 8, 8, 2, False, prefix="layers.0.qkv_proj", ranks=ranks)
    assert (qkv.input_size, qkv.output_size) == (64, 128)
    assert qkv.output_partition_sizes == [16, 8, 8]
    assert qkv.output_size_per_partition == 32
    assert (qkv.total_num_heads, qkv.total_num_kv_heads, qkv.head_size) == (8, 2, 8)
    assert (qkv.tp_rank, qkv.tp_size) == (1, 4)
    assert qkv.bias is None
    assert type(qkv.weight) is ModelWeightParameter
    assert (qkv.weight.output_dim, qkv.weight.input_dim) == (0, 1)
    row = RowParallelLinear(64, 6, ranks=ranks)
    assert (row.input_size_per_partition, row.output_size_per_partition) == (16, 6)
    assert row.weight.shape == (6, 16)
    assert row.bias is not None
    assert row.bias.shape == (6,)
    assert set(row.state_dict()) == {"weight", "bias"}
    assert repr(row) == "RowParallelLinear(in=64, out=6, rank 1 of 4, bias=True)"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_heads_that_do_not_divide(rank: int) -> None:
    with pytest.raises(LayoutError) as caught:
        QKVParallelLinear(64, 8, 8, 2, prefix="a.qkv_proj", ranks=Ranks(tp_rank=rank, tp_size=3))
    assert str(caught.value) == (
        "a.qkv_proj, part 'q': TP 3 does not cut 8 q heads into 3 equal pieces: 8 = 3 * 2 + 2. "
        "Try: TP 1, 2, 4 or 8."
    )


def test_kv_heads_that_do_not_share() -> None:
    with pytest.raises(LayoutError) as caught:
        QKVParallelLinear(64, 8, 6, 2, prefix="a.qkv_proj", ranks=Ranks(tp_size=3))
    assert str(caught.value) == (
        "a.qkv_proj, part 'k': TP 3 does not share 2 KV heads among neighbouring ranks: "
        "3 = 2 * 1 + 1. Try: TP 1, 2 or 6."
    )
    with pytest.raises(LayoutError) as caught:
        QKVParallelLinear(64, 8, 6, 4)
    assert str(caught.value) == (
        "QKVParallelLinear: 6 q heads do not share 4 KV heads equally: 6 = 4 * 1 + 2."
    )


def test_refused_declarations() -> None:
    with pytest.raises(DeclarationError) as caught:
        RowParallelLinear(8, 8, reduce_results=False, prefix="o_proj")
    assert str(caught.value) == (
        "o_proj: has a bias and does not sum over the ranks, needs skip_bias_add=True "
        "(rank 0's product alone would have it)."
    )
    with pytest.raises(DeclarationError) as caught:
        ColumnParallelLinear(8, 10, output_sizes=[4, 5], prefix="up")
    assert str(caught.value) == ("up: output_sizes [4, 5] add up to 9, needs 10 (output_size).")


@pytest.mark.parametrize("size", [2, 4])
def test_a_wrong_tensor_is_wrong_on_every_rank(size: int) -> None:
    for ranks in all_ranks(size):
        layer = MergedColumnParallelLinear(
            6, [8, 16], False, prefix="gate_up", params_dtype=DOUBLE, ranks=ranks
        )
        with torch.no_grad():
            layer.weight.fill_(-1)
        with pytest.raises(ShapeError) as caught:
            load(layer, "weight", numbered(12, 6), 0)
        assert str(caught.value) == (
            "gate_up.weight, part 0: tensor is fp64[12, 6], needs fp64[8, 6] (the declared layout)."
        )
        with pytest.raises(ShapeError) as caught:
            load(layer, "weight", numbered(25, 6))
        assert "is fp64[25, 6], needs fp64[24, 6]" in str(caught.value)
        with pytest.raises(LayoutError) as unknown:
            load(layer, "weight", numbered(8, 6), 2)
        assert str(unknown.value) == "gate_up.weight: has no part 2, needs one of: 0, 1."
        assert bool((layer.weight == -1).all())
