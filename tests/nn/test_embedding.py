"""Vocabulary-parallel layers: padding is zero, in no checkpoint, and in no logits."""

from __future__ import annotations

import pytest
import torch

from lading.errors import CallError, DeclarationError, ShapeError
from lading.nn import ParallelLMHead, VocabParallelEmbedding
from lading.ranks import Ranks, all_ranks

from . import work
from .made import numbered, on_ranks

DOUBLE = torch.float64
# T, rows a rank keeps: 101 is padded to 128, 192, 320 and 512
SIZES = [(1, 128), (2, 64), (3, 64), (5, 64), (8, 16)]


@pytest.mark.parametrize(("size", "rows"), SIZES)
def test_rows_and_padding(size: int, rows: int) -> None:
    table = numbered(101, 6)
    padded = torch.zeros(rows * size, 6, dtype=DOUBLE)
    padded[:101] = table
    for ranks in all_ranks(size):
        layer = VocabParallelEmbedding(101, 6, DOUBLE, ranks=ranks)
        with torch.no_grad():
            layer.weight.fill_(-1)
        layer.weight.weight_loader(layer.weight, table)
        assert torch.equal(layer.weight, padded.chunk(size)[ranks.tp_rank])
        assert layer.num_embeddings_padded == rows * size
        assert layer.num_embeddings_per_partition == rows


@pytest.mark.parametrize("size", [1, 3, 5])
def test_embedding_forward(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, ids = work.random(101, 6), torch.tensor([[0, 63, 64, 65], [100, 99, 7, 0]])

    def forward(ranks: Ranks) -> torch.Tensor:
        layer = work.filled(VocabParallelEmbedding(101, 6, DOUBLE, ranks=ranks), (table, None))
        output: torch.Tensor = layer(ids)
        return output

    for y in on_ranks(monkeypatch, size, forward):
        assert torch.equal(y, table[ids])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_logits_without_padding(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table, bias, hidden = work.random(101, 6), work.random(101), work.random(2, 3, 6)

    def forward(ranks: Ranks) -> torch.Tensor:
        layer = ParallelLMHead(101, 6, True, DOUBLE, ranks=ranks)
        output: torch.Tensor = work.filled(layer, (table, bias))(hidden)
        return output

    for y in on_ranks(monkeypatch, size, forward):
        assert y.shape == (2, 3, 101)
        torch.testing.assert_close(y, hidden @ table.T + bias)


def test_tied_head_is_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    table, hidden = work.random(101, 6), work.random(4, 6)

    def forward(ranks: Ranks) -> torch.Tensor:
        embedding = VocabParallelEmbedding(101, 6, DOUBLE, ranks=ranks)
        head = ParallelLMHead(101, 6, params_dtype=DOUBLE, ranks=ranks).tie_weights(embedding)
        assert head.weight is embedding.weight
        work.filled(embedding, (table, None))
        output: torch.Tensor = head(hidden)
        return output

    for y in on_ranks(monkeypatch, 3, forward):
        torch.testing.assert_close(y, hidden @ table.T)


def test_tied_to_another_shape() -> None:
    embedding = VocabParallelEmbedding(101, 6)
    with pytest.raises(DeclarationError) as caught:
        ParallelLMHead(101, 8, prefix="lm_head").tie_weights(embedding)
    assert str(caught.value) == (
        "lm_head: is tied to a table of [128, 6], needs [128, 8] (the head's own shape)."
    )


@pytest.mark.parametrize("bad", [[-1, 5], [3, 101]])
def test_ids_outside_of_the_vocabulary(bad: list[int]) -> None:
    layer = VocabParallelEmbedding(101, 6, prefix="embed", ranks=Ranks(tp_rank=1, tp_size=2))
    with pytest.raises(CallError) as caught:
        layer(torch.tensor(bad))
    assert str(caught.value) == (
        f"embed: token ids go from {bad[0]} to {bad[1]}, needs 0 to 100 (the vocabulary size)."
    )


def test_added_rows_are_refused() -> None:
    with pytest.raises(DeclarationError) as caught:
        VocabParallelEmbedding(110, 6, org_num_embeddings=101)
    assert str(caught.value) == (
        "VocabParallelEmbedding: has 110 rows of which the checkpoint has 101, needs the two "
        "equal (added rows have no place in a checkpoint)."
    )


@pytest.mark.parametrize("rank", range(5))
def test_a_short_table_is_short_on_ranks_of_padding_too(rank: int) -> None:
    layer = VocabParallelEmbedding(
        101, 6, DOUBLE, prefix="embed", ranks=Ranks(tp_rank=rank, tp_size=5)
    )
    with pytest.raises(ShapeError) as caught:
        layer.weight.weight_loader(layer.weight, numbered(100, 6))
    assert str(caught.value) == (
        "embed.weight: tensor is fp64[100, 6], needs fp64[101, 6] (the declared layout)."
    )
