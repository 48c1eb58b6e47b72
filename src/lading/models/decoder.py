"""The one decoder of all families, in plain PyTorch: a forward pass to verify loads against.

It has no cache and no kernels of its own. What a family has or has not (biases, q and k norms, tied
embeddings, windows, rotations, experts) is in its declaration and its ModelConfig; no family is
named here.

Letters: B = batch, S = tokens, H = hidden size, D = head size, V = vocabulary, T = tp_size,
E = experts, K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from lading import ranks as ranks_module
from lading.errors import CallError, ConfigError
from lading.models import rope
from lading.models.building import Builder
from lading.models.config import ExpertsConfig, ModelConfig
from lading.models.declaration import DEFAULT_VOCAB_PADDING, declare
from lading.models.families import FAMILIES
from lading.models.rope_config import RopeConfig
from lading.nn import (
    LoadableModule,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from lading.ranks import Ranks
from lading.schemes import QuantConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CausalLM", "build"]

CosSin = tuple[torch.Tensor, torch.Tensor]


class _Rotary:
    """cos and sin of positions; frequencies are worked out when they are first needed.

    Not a module: it holds no weights, so that building on the meta device leaves nothing to fill.
    """

    def __init__(self, config: RopeConfig) -> None:
        self.config = config
        self._known: tuple[tuple[int | None, torch.device], torch.Tensor, float] | None = None

    def __call__(self, position_ids: torch.Tensor, dtype: torch.dtype, *, in_order: bool) -> CosSin:
        """[B or 1, S] -> cos, sin [B or 1, S, d].

        in_order   positions are 0 .. S - 1, and need not be looked at for their largest
        """
        length = None
        if rope.depends_on_length(self.config) and position_ids.numel():
            length = position_ids.shape[-1] if in_order else int(position_ids.max()) + 1
        key = (length, position_ids.device)
        if self._known is None or self._known[0] != key:
            found = rope.inverse_frequencies(
                self.config, seq_len=length, device=position_ids.device
            )
            self._known = (key, *found)
        return rope.tables(position_ids, self._known[1], self._known[2], dtype)


class Attention(LoadableModule):
    """Grouped-query attention over this rank's heads.

    k_scale, v_scale, ... are there where the checkpoint has scales of a quantised KV cache; this
    forward pass, which has no cache, does not use them.
    """

    def __init__(self, config: ModelConfig, builder: Builder, path: str) -> None:
        super().__init__()
        self.qkv_proj = builder.layer(QKVParallelLinear, f"{path}.qkv_proj")
        self.q_norm = builder.optional_norm(f"{path}.q_norm")
        self.k_norm = builder.optional_norm(f"{path}.k_norm")
        self.o_proj = builder.layer(RowParallelLinear, f"{path}.o_proj")
        for scale in builder.cache_scales(path):
            assert scale.qualified_name is not None, "the builder names them"
            self.register_parameter(scale.qualified_name.rpartition(".")[2], scale)
        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads

    def forward(self, x: torch.Tensor, cos_sin: CosSin, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; `mask` [S, S] is True where a token looks, None = all before."""
        q, k, v = self.qkv_proj(x).split(self.qkv_proj.output_partition_sizes, dim=-1)
        q, k, v = (heads.unflatten(-1, (-1, self.head_dim)) for heads in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        y = F.scaled_dot_product_attention(
            rope.rotate(q, *cos_sin),
            rope.rotate(k, *cos_sin),
            v,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        result: torch.Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return result


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)).

    down             the name of the second layer
    reduce_results   sums over the ranks; else each rank gives its own share of the sum
    """

    def __init__(
        self, builder: Builder, path: str, *, down: str = "down_proj", reduce_results: bool = True
    ) -> None:
        super().__init__()
        self.gate_up_proj = builder.layer(MergedColumnParallelLinear, f"{path}.gate_up_proj")
        self._down = down
        self.add_module(
            down,
            builder.layer(RowParallelLinear, f"{path}.{down}", reduce_results=reduce_results),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: torch.Tensor = self.get_submodule(self._down)(F.silu(gate) * up)
        return result


class SparseMLP(nn.Module):
    """A weighted sum of the MLPs that a router chooses for each token.

    Every rank has its share of every expert, and the same router. The ranks' shares are added once
    for all experts, not expert by expert.
    """

    def __init__(self, experts: ExpertsConfig, builder: Builder, path: str) -> None:
        super().__init__()
        self.per_token, self.normalised = experts.per_token, experts.normalised
        self.ranks, self.group = builder.ranks, builder.group
        self.gate = builder.layer(ReplicatedLinear, f"{path}.gate")
        self.experts = nn.ModuleList(
            MLP(builder, f"{path}.experts.{index}", down=experts.down, reduce_results=False)
            for index in range(experts.num_experts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.route(tokens)
        result = torch.zeros_like(tokens)
        for index in torch.unique(chosen).tolist():
            token, place = (chosen == index).nonzero(as_tuple=True)
            share = self.experts[index](tokens[token]) * weights[token, place].unsqueeze(-1)
            result.index_add_(0, token, share)
        return ranks_module.all_reduce(result, self.ranks, self.group).view_as(x)

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B * S, H] -> each token's experts [B * S, K] and, before them, their weights.

        Probabilities over all E experts are in fp32, the weights in the dtype of the tokens.
        """
        probabilities = F.softmax(self.gate(tokens), dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(tokens.dtype), chosen


class Block(nn.Module):
    """Attention and MLP, or experts, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, builder: Builder, index: int) -> None:
        super().__init__()
        path, experts = f"model.layers.{index}", config.experts_of(index)
        self.input_layernorm = builder.norm(f"{path}.input_layernorm")
        self.self_attn = Attention(config, builder, f"{path}.self_attn")
        self.post_attention_layernorm = builder.norm(f"{path}.post_attention_layernorm")
        self._mlp = "mlp" if experts is None else experts.block
        path = f"{path}.{self._mlp}"
        mlp = MLP(builder, path) if experts is None else SparseMLP(experts, builder, path)
        self.add_module(self._mlp, mlp)

    def forward(self, x: torch.Tensor, cos_sin: CosSin, mask: torch.Tensor | None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, mask)
        x = x + self.get_submodule(self._mlp)(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Token ids to normalised hidden states."""

    def __init__(self, config: ModelConfig, builder: Builder) -> None:
        super().__init__()
        self.windows = config.sliding_windows
        self.embed_tokens = builder.layer(VocabParallelEmbedding, "model.embed_tokens")
        self.layers = nn.ModuleList(
            Block(config, builder, index) for index in range(config.num_layers)
        )
        self.norm = builder.norm("model.norm")
        self.rotary = _Rotary(config.rope)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """[B, S] -> [B, S, H]."""
        x = self.embed_tokens(input_ids)
        length, in_order = input_ids.shape[1], position_ids is None
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).unsqueeze(0)
        cos_sin = self.rotary(position_ids, x.dtype, in_order=in_order)
        masks = {w: _window_mask(w, length, x.device) for w in set(self.windows)}
        for window, block in zip(self.windows, self.layers, strict=True):
            x = block(x, cos_sin, masks[window])
        hidden: torch.Tensor = self.norm(x)
        return hidden


def _window_mask(window: int | None, length: int, device: torch.device) -> torch.Tensor | None:
    """[S, S], True where token i sees j: i - window < j <= i; None where that is every j <= i."""
    if window is None or window >= length:
        return None
    places = torch.arange(length, device=device)
    back = places.unsqueeze(1) - places
    return (back >= 0) & (back < window)


class CausalLM(nn.Module):
    """A decoder with a language-model head: one rank's share, under the checkpoint's names.

    config        from `parse_config`
    ranks         this rank's place; `lading.ranks.current()` by default
    group         the process group of the forward pass; the default group by default
    dtype         of the parameters
    pad_vocab_to  as of `declare`
    quant_config  chooses each layer's scheme; None for a dense checkpoint
    Raises a LayoutError, naming the layer, where T does not divide it. Under
    `with torch.device("meta")` it is built without memory.

    Example: 32 q heads, 8 KV heads and T = 16: each rank has 2 q heads and 1 KV head, which it
    shares with a neighbour.
    """

    packed_modules_mapping: Mapping[str, list[str]]

    def __init__(
        self,
        config: ModelConfig,
        *,
        ranks: Ranks | None = None,
        group: ProcessGroup | None = None,
        dtype: torch.dtype,
        pad_vocab_to: int = DEFAULT_VOCAB_PADDING,
        quant_config: QuantConfig | None = None,
    ) -> None:
        super().__init__()
        if config.quantization is not None and quant_config is None:
            method = config.quantization.get("quant_method")
            raise ConfigError(
                f"is there (quant_method {method!r}), needs a quant_config that knows the headers "
                "(lading.schemes.quant_config_of, as from_pretrained does)",
                subject="quantization_config",
            )
        self.config = config
        self.ranks = ranks if ranks is not None else ranks_module.current()
        self.names = FAMILIES[config.family].names if quant_config is None else quant_config.names
        fused = FAMILIES[config.family].fused
        self.packed_modules_mapping = {name: list(parts) for name, parts in fused.items()}
        self.declaration = declare(config, pad_vocab_to=pad_vocab_to)
        builder = Builder(
            entries=dict(self.declaration.entries),
            ranks=self.ranks,
            group=group,
            dtype=dtype,
            eps=config.rms_norm_eps,
            quant_config=quant_config,
        )
        self.model = Decoder(config, builder)
        # A tied head uses the embedding's memory, and so needs none of its own even for a moment.
        with torch.device("meta" if config.tie_word_embeddings else torch.get_default_device()):
            self.lm_head = builder.layer(ParallelLMHead, "lm_head")
        self._tie()
        self.eval()

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, S] token ids -> [B, S, V] logits, on every rank.

        position_ids   [B, S] or [1, S], 0 .. S - 1 by default. They turn the heads; which token
                       sees which goes by place in the sequence
        """
        if input_ids.dim() != 2:
            raise CallError(
                f"input_ids have shape {list(input_ids.shape)}, needs [B, S]", subject="forward"
            )
        if position_ids is not None and position_ids.shape not in (
            input_ids.shape,
            (1, input_ids.shape[1]),
        ):
            raise CallError(
                f"position_ids have shape {list(position_ids.shape)}, needs "
                f"{list(input_ids.shape)} (as input_ids)",
                subject="forward",
            )
        logits: torch.Tensor = self.lm_head(self.model(input_ids, position_ids))
        return logits

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> CausalLM:
        # to_empty() gives each name of a tied parameter memory of its own: tie them again.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.tie_weights(self.model.embed_tokens)


def build(
    config: ModelConfig,
    ranks: Ranks | None = None,
    *,
    group: ProcessGroup | None = None,
    dtype: torch.dtype,
    device: torch.device | str = "meta",
) -> CausalLM:
    """The model of one rank on a device; on meta, the default, it has no memory until loaded."""
    with torch.device(device):
        return CausalLM(config, ranks=ranks, group=group, dtype=dtype)
