"""Every tensor of a model as data: what its decoder is built from and what a plan fills. No torch.

Names are the checkpoint's own, with q, k, v and gate, up fused:

    model.embed_tokens                       embedding    [V, H]
    model.layers.{i}.input_layernorm.weight  vector       [H]
    model.layers.{i}.self_attn.qkv_proj      column       [(heads + 2 * KV heads) * D, H]
    model.layers.{i}.self_attn.q_norm.weight vector       [D], and k_norm, where the family has them
    model.layers.{i}.self_attn.o_proj        row          [H, heads * D]
    model.layers.{i}.post_attention_layernorm.weight      [H], a vector
    model.layers.{i}.mlp.gate_up_proj        column       [2 * I, H]
    model.layers.{i}.mlp.down_proj           row          [H, I]
    model.norm.weight                        vector       [H]
    lm_head                                  embedding    [V, H], tied to model.embed_tokens or not

In a layer with experts, in place of the MLP (some families have other names for mlp, down_proj):

    model.layers.{i}.mlp.gate                replicated   [E, H]
    model.layers.{i}.mlp.experts.{e}.gate_up_proj         [2 * I_e, H], column
    model.layers.{i}.mlp.experts.{e}.down_proj            [H, I_e], row

Letters: V = vocabulary, H = hidden size, I = intermediate size, D = head size, E = experts of
I_e each.
"""

from __future__ import annotations

from dataclasses import dataclass

from lading import dtypes
from lading.collecting import uncollected
from lading.errors import CallError, LadingError, LayoutError, PlanError
from lading.layers import Layer
from lading.layouts import Layout
from lading.models.config import ExpertsConfig, ModelConfig
from lading.plan import Target
from lading.schemes.choose import LayerScheme, QuantConfig
from lading.schemes.targets import layer_targets
from lading.specs import TensorSpec

__all__ = ["DEFAULT_VOCAB_PADDING", "Declaration", "declare", "targets", "tp_sizes"]

DEFAULT_VOCAB_PADDING = 64
"""As of `lading.nn.VocabParallelEmbedding`."""

Shape = tuple[int, ...]
Entry = tuple[str, Layer] | tuple[str, Shape]


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """Every tensor of a model, in model order.

    entries   (module path, Layer) for layers, (parameter name, shape) for vectors, which every rank
              holds whole
    tied      (name, kept name) of parameters that are one tensor
    """

    entries: tuple[Entry, ...]
    tied: tuple[tuple[str, str], ...] = ()

    @property
    def layers(self) -> tuple[tuple[str, Layer], ...]:
        """The linear and embedding layers, by module path."""
        return tuple((path, what) for path, what in self.entries if isinstance(what, Layer))

    @property
    def vectors(self) -> tuple[tuple[str, Shape], ...]:
        """The replicated vectors, by parameter name."""
        return tuple((name, what) for name, what in self.entries if not isinstance(what, Layer))

    @property
    def distinct_layers(self) -> tuple[Layer, ...]:
        """Each different layer once: a handful, whatever the depth of the model."""
        return tuple(dict.fromkeys(layer for _, layer in self.layers))


def declare(config: ModelConfig, *, pad_vocab_to: int = DEFAULT_VOCAB_PADDING) -> Declaration:
    """The tensors of a model.

    pad_vocab_to   the vocabulary is padded up to a multiple of this and of the number of ranks
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    vocabulary = Layer.embedding(config.vocab_size, hidden, pad_to=pad_vocab_to)
    blocks: dict[ExpertsConfig | None, list[Entry]] = {}
    entries: list[Entry] = [("model.embed_tokens", vocabulary)]
    for index in range(config.num_layers):
        experts = config.experts_of(index)
        if experts not in blocks:
            blocks[experts] = _block(config, hidden, head_dim, experts)
        block = blocks[experts]
        entries += ((f"model.layers.{index}.{name}", what) for name, what in block)  # type: ignore[misc]
    entries += [("model.norm.weight", (hidden,)), ("lm_head", vocabulary)]
    tied = (("lm_head.weight", "model.embed_tokens.weight"),) if config.tie_word_embeddings else ()
    return Declaration(entries=tuple(entries), tied=tied)


def _block(
    config: ModelConfig, hidden: int, head_dim: int, experts: ExpertsConfig | None
) -> list[Entry]:
    """One decoder block; the layers are shared by all blocks of its kind, which are equal."""
    norms: list[Entry] = [
        ("self_attn.q_norm.weight", (head_dim,)),
        ("self_attn.k_norm.weight", (head_dim,)),
    ]
    qkv = Layer.qkv(hidden, head_dim, config.num_heads, config.num_kv_heads, bias=config.qkv_bias)
    return [
        ("input_layernorm.weight", (hidden,)),
        ("self_attn.qkv_proj", qkv),
        *(norms if config.qk_norm else []),
        ("self_attn.o_proj", Layer.row(config.num_heads * head_dim, hidden, bias=config.o_bias)),
        ("post_attention_layernorm.weight", (hidden,)),
        *(_mlp(config, hidden) if experts is None else _experts(experts, hidden)),
    ]


def _mlp(config: ModelConfig, hidden: int) -> list[Entry]:
    size, bias = config.intermediate_size, config.mlp_bias
    return [
        ("mlp.gate_up_proj", Layer.column(hidden, [size] * 2, bias=bias)),
        ("mlp.down_proj", Layer.row(size, hidden, bias=bias)),
    ]


def _experts(experts: ExpertsConfig, hidden: int) -> list[Entry]:
    """The router and the experts, which are equal and share their layers."""
    gate_up = Layer.column(hidden, [experts.intermediate_size] * 2)
    down = Layer.row(experts.intermediate_size, hidden)
    entries: list[Entry] = [
        (f"{experts.block}.gate", Layer.replicated(hidden, experts.num_experts))
    ]
    for index in range(experts.num_experts):
        path = f"{experts.block}.experts.{index}"
        entries += [(f"{path}.gate_up_proj", gate_up), (f"{path}.{experts.down}", down)]
    return entries


@uncollected()
def targets(
    declaration: Declaration,
    tp_size: int,
    dtype: str,
    quant_config: QuantConfig | None = None,
) -> tuple[Target, ...]:
    """What a load has to fill on each of `tp_size` ranks, tied parameters once.

    dtype          of every parameter, in the safetensors spelling: "BF16"; quantised tensors have
                   their own
    quant_config   chooses each layer's scheme; None for a dense checkpoint
    Raises a PlanError with a LayoutError for each layer that does not divide; its subject is the
    layer's path.
    """
    if dtype not in dtypes.BITS:
        raise CallError(
            f"dtype is {dtype!r}, needs one of {', '.join(dtypes.BITS)}", subject="targets"
        )
    if not isinstance(tp_size, int) or isinstance(tp_size, bool) or tp_size < 1:
        raise CallError(f"tp_size is {tp_size!r}, needs an int of at least 1", subject="targets")
    layouts = _Layouts(tp_size)
    quantised = _Quantised(quant_config, layouts, dtype)
    aliases: dict[str, tuple[str, ...]] = {}
    for name, kept in declaration.tied:
        aliases[kept] = (*aliases.get(kept, ()), name)
    alias_names = {name for name, _ in declaration.tied}
    found: list[Target] = []
    for path, what in declaration.entries:
        if isinstance(what, Layer):
            found += quantised.cache_targets(path, what)
            stored = quantised.targets(path, what)
            if stored is not None:
                found += stored
                continue
            named = [(f"{path}.{name}", layout) for name, layout in layouts.of_layer(path, what)]
        else:
            named = [(path, layouts.of_vector(what))]
        for name, layout in named:
            if name not in alias_names:
                found.append(
                    Target(name=name, layout=layout, dtype=dtype, aliases=aliases.get(name, ()))
                )
    if layouts.problems:
        raise PlanError(layouts.problems, what=f"TP {tp_size}")
    return tuple(found)


class _Layouts:
    """Layouts for T ranks, each distinct one built once: blocks are equal and share theirs."""

    def __init__(self, tp_size: int) -> None:
        self.tp_size = tp_size
        self.problems: list[LadingError] = []
        self._layers: dict[Layer, tuple[tuple[str, Layout], ...] | LayoutError] = {}
        self._vectors: dict[Shape, Layout] = {}

    def of_layer(self, path: str, layer: Layer) -> tuple[tuple[str, Layout], ...]:
        """(name, layout) of each tensor of the layer; none after a problem."""
        known = self._layers.get(layer)
        if known is None:
            known = self._layers[layer] = self._build(layer)
        if isinstance(known, LayoutError):
            self.problems.append(
                LayoutError(known.fact, subject=path, part=known.part, hint=known.hint)
            )
            return ()
        return known

    def of_vector(self, shape: Shape) -> Layout:
        """The layout of a replicated tensor."""
        if shape not in self._vectors:
            self._vectors[shape] = Layout.replicated(shape, self.tp_size)
        return self._vectors[shape]

    def _build(self, layer: Layer) -> tuple[tuple[str, Layout], ...] | LayoutError:
        try:
            return tuple((spec.name, self._layout(layer, spec)) for spec in layer.specs())
        except LayoutError as error:
            return error

    def _layout(self, layer: Layer, spec: TensorSpec) -> Layout:
        return layer.layout(spec, self.tp_size)


class _Quantised:
    """Targets of quantised layers; those of equal layers with one scheme are built once."""

    def __init__(self, config: QuantConfig | None, layouts: _Layouts, dtype: str) -> None:
        self._config, self._layouts, self._dtype = config, layouts, dtype
        self._known: dict[tuple[int, int], tuple[LayerScheme, list[Target]]] = {}

    def targets(self, path: str, layer: Layer) -> list[Target] | None:
        """The targets of a layer, none after a problem; None for a dense layer."""
        if self._config is None:
            return None
        try:
            scheme = self._config.for_layer(path, layer)
        except LadingError as error:
            self._layouts.problems.append(error)
            return []
        if scheme is None:
            return None
        key = (id(scheme), id(layer))  # the declaration keeps the layer, the value the scheme
        if key not in self._known:
            try:
                self._known[key] = (scheme, self._build(layer, scheme))
            except LayoutError as error:
                subject = f"{path}.{error.subject}"
                self._layouts.problems.append(
                    LayoutError(error.fact, subject=subject, part=error.part, hint=error.hint)
                )
                return []
        return [_renamed(target, f"{path}.{target.name}") for target in self._known[key][1]]

    def cache_targets(self, path: str, layer: Layer) -> list[Target]:
        """The targets of the KV cache's scales, which lie beside the qkv layer of this path."""
        attention, _, name = path.rpartition(".")
        if self._config is None or name != "qkv_proj":
            return []
        try:
            scales = self._config.cache_scales(attention, layer)
        except LadingError as error:
            self._layouts.problems.append(error)
            return []
        found = []
        for scale in scales:
            try:
                layout = scale.layout(layer, self._layouts.tp_size)
            except LayoutError:
                continue  # the qkv layer, cut by the same heads, says so
            found.append(
                Target(
                    name=f"{attention}.{scale.name}",
                    layout=layout,
                    dtype=scale.dtype,
                    leaf=scale.leaf if scale.leaf != scale.name else "",
                    stored=scale.spec.stored,
                )
            )
        return found

    def _build(self, layer: Layer, scheme: LayerScheme) -> list[Target]:
        """The targets, each under the name that it has in its layer."""

        def layout_of(spec: TensorSpec) -> Layout:
            try:
                return layer.layout(spec, self._layouts.tp_size, fused_source=scheme.fused)
            except LayoutError as error:
                raise error.located(subject=spec.name) from None

        named = layer_targets("", layer, scheme, dtype=self._dtype, layout_of=layout_of)
        return [_renamed(target, target.name.removeprefix(".")) for target in named]


def _renamed(target: Target, name: str) -> Target:
    return Target(
        name=name,
        layout=target.layout,
        dtype=target.dtype,
        aliases=target.aliases,
        leaf=target.leaf,
        stored=target.stored,
        expected=target.expected,
    )


def tp_sizes(config: ModelConfig, up_to: int = 64) -> tuple[int, ...]:
    """The tensor-parallel sizes, 1 to `up_to`, at which every layer divides.

    Example: 6 q heads, 2 KV heads, intermediate size 96: 1, 2 and 6 (3 does not share 2 KV heads).
    """
    layers = declare(config).distinct_layers
    return tuple(size for size in range(1, up_to + 1) if _divides(layers, size))


def _divides(layers: tuple[Layer, ...], tp_size: int) -> bool:
    layouts = _Layouts(tp_size)
    for layer in layers:
        layouts.of_layer("", layer)
    return not layouts.problems
