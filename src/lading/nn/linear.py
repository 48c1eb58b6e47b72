"""Parallel linear layers. Constructors, attributes and loaders follow the field's conventions
(vLLM's
`model_executor/layers/linear.py`), so that an engine's model code reads the same.

Forward passes return `(output, bias)` as there, bias only with `skip_bias_add`; `return_bias=False`
returns the output alone.

Letters: T = tp_size, O = output size, I = input size, both over all ranks; N = tokens.

    layer                        input              local weight     output
    ReplicatedLinear             [N, I]             [O, I]           [N, O]
    ColumnParallelLinear         [N, I]             [O/T, I]         [N, O/T]   (gathered: [N, O])
    MergedColumnParallelLinear   [N, I]             [sum O_i/T, I]   [N, sum O_i/T]
    QKVParallelLinear            [N, I]             q, k, v pieces   [N, (q + k + v heads) * D]
    RowParallelLinear            [N, I/T]           [O, I/T]         [N, O], summed over the ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lading import ranks as ranks_module
from lading.errors import DeclarationError
from lading.layers import Layer
from lading.nn.base import ParallelLayer
from lading.parameter import BasevLLMParameter
from lading.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "ReplicatedLinear",
    "RowParallelLinear",
]

LinearOutput = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


class _ParallelLinear(ParallelLayer):
    """A linear layer: sizes as engines read them, and the local product."""

    weight: BasevLLMParameter
    bias: BasevLLMParameter | None

    def __init__(
        self,
        layer: Layer,
        *,
        skip_bias_add: bool,
        params_dtype: torch.dtype | None,
        quant_config: object | None,
        prefix: str,
        return_bias: bool,
        disable_tp: bool,
        ranks: Ranks | None,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__(
            layer,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            ranks=ranks,
            group=group,
            disable_tp=disable_tp,
        )
        self.skip_bias_add, self.return_bias = skip_bias_add, return_bias
        self.input_size, self.output_size = layer.input.size, layer.output.size
        self.input_size_per_partition = layer.input.local_size(self.tp_size)
        self.output_partition_sizes = [
            stop - start for start, stop in (p.span(0, self.tp_size) for p in layer.output.parts)
        ]
        self.output_size_per_partition = sum(self.output_partition_sizes)

    def _result(self, output: torch.Tensor) -> LinearOutput:
        if not self.return_bias:
            return output
        return output, self.bias if self.skip_bias_add else None

    def _own_bias(self) -> torch.Tensor | None:
        return None if self.skip_bias_add else self.bias


class ReplicatedLinear(_ParallelLinear):
    """[N, I] -> [N, O], the whole layer on every rank."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: object | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            Layer.replicated(input_size, output_size, bias=bias),
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
            disable_tp=disable_tp,
            ranks=ranks,
            group=group,
        )

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """X @ weight.T + bias."""
        self.require_loaded()
        return self._result(self.product(x, self._own_bias()))


class ColumnParallelLinear(_ParallelLinear):
    """[N, I] -> [N, O/T]: rows of the weight cut over the ranks.

    output_sizes    several parts side by side, each cut by itself
    gather_output   gives [N, O] on every rank, parts in their full order
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: object | None = None,
        output_sizes: Sequence[int] | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
        _layer: Layer | None = None,
    ) -> None:
        sizes = list(output_sizes) if output_sizes else [output_size]
        if _layer is None and sum(sizes) != output_size:
            raise DeclarationError(
                f"output_sizes {sizes} add up to {sum(sizes)}, needs {output_size} (output_size)",
                subject=prefix or type(self).__name__,
            )
        super().__init__(
            _layer if _layer is not None else Layer.column(input_size, sizes, bias=bias),
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
            disable_tp=disable_tp,
            ranks=ranks,
            group=group,
        )
        self.gather_output = gather_output

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """X @ weight.T + bias, this rank's outputs or, gathered, all of them."""
        self.require_loaded()
        output = self.product(x, self._own_bias())
        return self._result(self._gathered(output) if self.gather_output else output)

    def _gathered(self, output: torch.Tensor) -> torch.Tensor:
        """[N, sum O_i/T] of every rank -> [N, sum O_i], part by part in full order."""
        whole = ranks_module.all_gather(output, self.ranks, self.group)
        if len(self.output_partition_sizes) == 1 or self.tp_size == 1:
            return whole
        by_rank = [
            torch.split(chunk, self.output_partition_sizes, dim=-1)
            for chunk in whole.chunk(self.tp_size, dim=-1)
        ]
        return torch.cat([piece for part in zip(*by_rank, strict=True) for piece in part], dim=-1)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """[N, I] -> [N, sum O_i/T]: several column parallel layers in one product (gate and up).

    `weight_loader(param, loaded_weight, i)` loads part i; without i the tensor holds all parts.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: object | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            input_size,
            sum(output_sizes),
            bias=bias,
            gather_output=gather_output,
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            output_sizes=output_sizes,
            prefix=prefix,
            return_bias=return_bias,
            disable_tp=disable_tp,
            ranks=ranks,
            group=group,
        )
        self.output_sizes = list(output_sizes)


class QKVParallelLinear(ColumnParallelLinear):
    """[N, I] -> [N, q | k | v]: the projections of (grouped-query) attention in one product.

    Over T ranks, with H = total_num_heads, K = total_num_kv_heads, D = head_size:
        part "q"       [H*D, I]  -> [H/T*D, I]
        part "k", "v"  [K*D, I]  -> [K/T*D, I]    for T <= K
                                    [D, I]        for T > K: T/K neighbouring ranks keep the same
                                                  head
    Example: 32 q heads, 8 KV heads of 128, T = 16: q 4096 -> 256 rows; k, v 1024 -> 128 rows, each
    held by 2 ranks.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: object | None = None,
        prefix: str = "",
        *,
        v_head_size: int | None = None,
        return_bias: bool = True,
        disable_tp: bool = False,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        try:
            layer = Layer.qkv(
                hidden_size,
                head_size,
                total_num_heads,
                kv_heads,
                v_head_size=v_head_size,
                bias=bias,
            )
        except DeclarationError as error:
            raise error.located(subject=prefix or type(self).__name__) from None
        super().__init__(
            hidden_size,
            layer.output.size,
            bias=bias,
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
            disable_tp=disable_tp,
            ranks=ranks,
            group=group,
            _layer=layer,
        )
        self.hidden_size, self.head_size = hidden_size, head_size
        self.v_head_size = head_size if v_head_size is None else v_head_size
        self.total_num_heads, self.total_num_kv_heads = total_num_heads, kv_heads
        # As in the field, with each KV head counted once for every rank that holds it.
        self.output_sizes = [size * self.tp_size for size in self.output_partition_sizes]
        self.output_size = sum(self.output_sizes)
        self.num_heads = total_num_heads // self.tp_size
        self.num_kv_heads = max(1, kv_heads // self.tp_size)
        self.num_kv_head_replicas = max(1, self.tp_size // kv_heads)


class RowParallelLinear(_ParallelLinear):
    """[N, I/T] -> [N, O]: columns of the weight cut over the ranks, products summed.

    input_is_parallel   the input is this rank's [N, I/T] already; else it is [N, I] and is cut here
    reduce_results      sums over the ranks; else each rank returns its own product
    The bias is held whole by every rank and added once, by rank 0, before the sum.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: object | None = None,
        prefix: str = "",
        *,
        return_bias: bool = True,
        disable_tp: bool = False,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
    ) -> None:
        if bias and not reduce_results and not skip_bias_add:
            raise DeclarationError(
                "has a bias and does not sum over the ranks, needs skip_bias_add=True (rank 0's "
                "product alone would have it)",
                subject=prefix or type(self).__name__,
            )
        super().__init__(
            Layer.row(input_size, output_size, bias=bias),
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            return_bias=return_bias,
            disable_tp=disable_tp,
            ranks=ranks,
            group=group,
        )
        self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """X @ weight.T, summed over the ranks, + bias."""
        self.require_loaded()
        if not self.input_is_parallel and self.tp_size > 1:
            x = x.chunk(self.tp_size, dim=-1)[self.tp_rank].contiguous()
        output = self.product(x, self._own_bias() if self.tp_rank == 0 else None)
        if self.reduce_results:
            output = ranks_module.all_reduce(output, self.ranks, self.group)
        return self._result(output)
