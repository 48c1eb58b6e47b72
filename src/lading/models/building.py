"""Layers from their declaration: each size is written once, in `lading.models.declaration`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from lading import dtypes
from lading import ranks as ranks_module
from lading.layers import Kind, Layer
from lading.layouts import Layout
from lading.models.declaration import Shape
from lading.nn import (
    ColumnParallelLinear,
    LayerLoader,
    LoadableModule,
    MergedColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lading.parameter import BasevLLMParameter, load_part
from lading.ranks import Ranks
from lading.schemes import QuantConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Builder", "RMSNorm", "build_layer"]

_L = TypeVar("_L", bound=ParallelLayer)


def build_layer(
    layer: Layer,
    *,
    prefix: str,
    ranks: Ranks,
    group: ProcessGroup | None,
    dtype: torch.dtype,
    head: bool = False,
    quant_config: QuantConfig | None = None,
    reduce_results: bool = True,
) -> ParallelLayer:
    """The module of a layer, one rank's share of it.

    prefix   its qualified name
    head     a vocabulary layer gives logits instead of taking ids
    quant_config   chooses the layer's scheme; None = dense
    reduce_results a row-parallel layer sums over the ranks; else its caller does
    Raises a LayoutError, with the prefix, where the layer does not divide.

    Example: Layer.qkv(96, 16, 6, 2) gives a QKVParallelLinear of 6 q heads and 2 KV heads of 16.
    """
    built = _module(
        layer,
        prefix=prefix,
        ranks=ranks,
        group=group,
        dtype=dtype,
        head=head,
        quant_config=quant_config,
        reduce_results=reduce_results,
    )
    assert built.layer == layer, f"{prefix} was built from other sizes than it declares"
    return built


def _module(
    layer: Layer,
    *,
    prefix: str,
    ranks: Ranks,
    group: ProcessGroup | None,
    dtype: torch.dtype,
    head: bool,
    quant_config: QuantConfig | None,
    reduce_results: bool,
) -> ParallelLayer:
    inputs, bias, parts = layer.input.size, layer.bias, layer.output.parts
    if layer.kind is Kind.EMBEDDING:
        cls = ParallelLMHead if head else VocabParallelEmbedding
        return cls(
            layer.output.size,
            inputs,
            bias=bias,
            params_dtype=dtype,
            quant_config=quant_config,
            padding_size=parts[0].pad_to,
            prefix=prefix,
            ranks=ranks,
            group=group,
        )
    if tuple(part.name for part in parts) == ("q", "k", "v"):
        q, k, v = parts
        return QKVParallelLinear(
            inputs,
            q.unit,
            q.size // q.unit,
            k.size // k.unit,
            bias=bias,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=prefix,
            v_head_size=v.unit,
            return_bias=False,
            ranks=ranks,
            group=group,
        )
    if len(parts) > 1:
        return MergedColumnParallelLinear(
            inputs,
            [part.size for part in parts],
            bias=bias,
            params_dtype=dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=False,
            ranks=ranks,
            group=group,
        )
    if layer.kind is Kind.ROW:
        return RowParallelLinear(
            inputs,
            layer.output.size,
            bias=bias,
            params_dtype=dtype,
            reduce_results=reduce_results,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=False,
            ranks=ranks,
            group=group,
        )
    plain: type[ColumnParallelLinear | ReplicatedLinear] = {
        Kind.COLUMN: ColumnParallelLinear,
        Kind.REPLICATED: ReplicatedLinear,
    }[layer.kind]
    return plain(
        inputs,
        layer.output.size,
        bias=bias,
        params_dtype=dtype,
        quant_config=quant_config,
        prefix=prefix,
        return_bias=False,
        ranks=ranks,
        group=group,
    )


class RMSNorm(LoadableModule):
    """Gives x / sqrt(mean(x^2) + eps) * weight, the mean in fp32 (arXiv:1910.07467).

    The quotient is rounded to x's dtype before it meets the weight, as the families' own models do
    (modeling_llama.py of transformers 5.23). Every rank holds the weight whole.
    """

    weight: BasevLLMParameter

    def __init__(
        self, shape: tuple[int, ...], *, eps: float, prefix: str, ranks: Ranks, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.eps = eps
        with ranks_module.as_current(ranks):
            weight = BasevLLMParameter(
                data=torch.ones(shape, dtype=dtype), weight_loader=LayerLoader(self)
            )
        weight.tp_layout = Layout.replicated(shape, ranks.tp_size)
        weight.qualified_name = f"{prefix}.weight"
        self.weight = weight

    def weight_loader(self, param: BasevLLMParameter, loaded_weight: torch.Tensor) -> None:
        """Takes the tensor whole."""
        param.load_column_parallel_weight(loaded_weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The normalised vectors, in x's dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def extra_repr(self) -> str:
        """Size and eps."""
        return f"{self.weight.shape[-1]}, eps={self.eps}"


def _load_scale(param: BasevLLMParameter, loaded_weight: torch.Tensor, *, ranks: Ranks) -> None:
    """Takes a full tensor: all of it, or the heads of this rank."""
    load_part(param, loaded_weight, ranks=ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """Builds a declaration's modules by their paths, for one rank.

    entries   those of the Declaration, by path or name
    eps       of the norms
    """

    entries: Mapping[str, Layer | Shape]
    ranks: Ranks
    group: ProcessGroup | None
    dtype: torch.dtype
    eps: float
    quant_config: QuantConfig | None = None

    def layer(self, kind: type[_L], path: str, *, reduce_results: bool = True) -> _L:
        """The layer declared at a path; `kind` is the class that its declaration comes out as.

        reduce_results   as of `build_layer`
        """
        layer = self.entries[path]
        assert isinstance(layer, Layer), f"{path} is declared as a vector"
        built = build_layer(
            layer,
            prefix=path,
            ranks=self.ranks,
            group=self.group,
            dtype=self.dtype,
            head=issubclass(kind, ParallelLMHead),
            quant_config=self.quant_config,
            reduce_results=reduce_results,
        )
        assert isinstance(built, kind), f"{path} is declared as {type(built).__name__}"
        return built

    def cache_scales(self, path: str) -> tuple[BasevLLMParameter, ...]:
        """The parameters of an attention module's KV cache scales, none where none are stored.

        path   the module's name; its qkv layer is `path`.qkv_proj
        """
        qkv = self.entries[f"{path}.qkv_proj"]
        assert isinstance(qkv, Layer), f"{path}.qkv_proj is declared as a vector"
        if self.quant_config is None:
            return ()
        made = []
        for scale in self.quant_config.cache_scales(path, qkv):
            layout = scale.layout(qkv, self.ranks.tp_size)
            with ranks_module.as_current(self.ranks):
                param = BasevLLMParameter(
                    data=torch.empty(layout.local_shape, dtype=dtypes.to_torch(scale.dtype)),
                    weight_loader=partial(_load_scale, ranks=self.ranks),
                )
            param.tp_layout = layout
            param.qualified_name = f"{path}.{scale.name}"
            param.stored_leaf = scale.leaf if scale.leaf != scale.name else ""
            param.stored_shape = scale.spec.stored
            made.append(param)
        return tuple(made)

    def optional_norm(self, path: str) -> RMSNorm | None:
        """The norm declared at a path, None where none is declared."""
        return self.norm(path) if f"{path}.weight" in self.entries else None

    def norm(self, path: str) -> RMSNorm:
        """The norm declared at a path."""
        shape = self.entries[f"{path}.weight"]
        assert not isinstance(shape, Layer), f"{path} is declared as a layer"
        return RMSNorm(shape, eps=self.eps, prefix=path, ranks=self.ranks, dtype=self.dtype)
