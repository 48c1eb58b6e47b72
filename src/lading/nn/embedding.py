"""Vocabulary-parallel embedding and language-model head, with a padded vocabulary.

Letters: V = vocabulary, P = V padded up to a multiple of `padding_size` and of T, H = hidden size.
Rank r keeps rows r*P/T : (r+1)*P/T; rows at and after V are padding: zero, in no checkpoint.

Example: V = 101, padding_size = 64, T = 3: P = 192, 64 rows a rank; rank 1 holds rows 64:101 and 27
rows of padding, rank 2 padding alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lading import ranks as ranks_module
from lading.errors import CallError, DeclarationError
from lading.layers import Layer
from lading.nn.base import ParallelLayer
from lading.parameter import BasevLLMParameter
from lading.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ParallelLMHead", "VocabParallelEmbedding"]

DEFAULT_VOCAB_PADDING_SIZE = 64
"""The field's default (vLLM): keeps the rows of a rank aligned for matrix units."""


class VocabParallelEmbedding(ParallelLayer):
    """Token ids [...] -> [..., H], rows of the table cut over the ranks.

    num_embeddings       V
    org_num_embeddings   V of the checkpoint, num_embeddings by default
    padding_size         the declared multiple of the padding
    """

    weight: BasevLLMParameter
    bias: BasevLLMParameter | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_VOCAB_PADDING_SIZE,
        quant_config: object | None = None,
        prefix: str = "",
        *,
        bias: bool = False,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if org_num_embeddings is not None and org_num_embeddings != num_embeddings:
            raise DeclarationError(
                f"has {num_embeddings} rows of which the checkpoint has {org_num_embeddings}, "
                "needs the two equal (added rows have no place in a checkpoint)",
                subject=prefix or type(self).__name__,
            )
        super().__init__(
            Layer.embedding(num_embeddings, embedding_dim, pad_to=padding_size, bias=bias),
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            ranks=ranks,
            group=group,
        )
        (rows,) = self.layer.output.parts
        self.num_embeddings = self.org_vocab_size = num_embeddings
        self.embedding_dim, self.padding_size = embedding_dim, padding_size
        self.num_embeddings_padded = num_embeddings + rows.padding(self.tp_size)
        self.num_embeddings_per_partition = self.num_embeddings_padded // self.tp_size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The rows of the given ids, summed over the ranks (each row is on one)."""
        self.require_loaded()
        self._check_ids(input_ids)
        if self.tp_size == 1:
            return F.embedding(input_ids, self.weight)
        size = self.num_embeddings_per_partition
        local = input_ids - self.tp_rank * size
        elsewhere = (local < 0) | (local >= size)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return ranks_module.all_reduce(rows, self.ranks, self.group)

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        # On a GPU the look would wait for the device; there an id beyond V finds padding, zeros.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.num_embeddings:
            raise CallError(
                f"token ids go from {low} to {high}, needs 0 to {self.num_embeddings - 1} "
                "(the vocabulary size)",
                subject=self.prefix or type(self).__name__,
            )


class ParallelLMHead(VocabParallelEmbedding):
    """Hidden states [..., H] -> logits [..., V], padding stripped, on every rank."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_VOCAB_PADDING_SIZE,
        quant_config: object | None = None,
        prefix: str = "",
        *,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            params_dtype,
            org_num_embeddings,
            padding_size,
            quant_config,
            prefix,
            bias=bias,
            ranks=ranks,
            group=group,
        )

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> ParallelLMHead:
        """Uses the embedding's table: one parameter under two names."""
        if embed_tokens.weight.shape != self.weight.shape:
            raise DeclarationError(
                f"is tied to a table of {list(embed_tokens.weight.shape)}, needs "
                f"{list(self.weight.shape)} (the head's own shape)",
                subject=self.prefix or type(self).__name__,
            )
        self.weight = embed_tokens.weight
        return self

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits over the whole vocabulary."""
        self.require_loaded()
        logits = self.product(hidden_states, self.bias)
        whole = ranks_module.all_gather(logits, self.ranks, self.group)
        return whole[..., : self.num_embeddings]
