"""Parallel layers: what engines build models from."""

from lading.nn.base import LayerLoader, LoadableModule, ParallelLayer, check_loaded, start_load
from lading.nn.embedding import ParallelLMHead, VocabParallelEmbedding
from lading.nn.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

__all__ = [
    "ColumnParallelLinear",
    "LayerLoader",
    "LoadableModule",
    "MergedColumnParallelLinear",
    "ParallelLMHead",
    "ParallelLayer",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "check_loaded",
    "start_load",
]
