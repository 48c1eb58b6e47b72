"""What a parallel layer is, as a value: its two axes, the tensors that lie along them. No torch.

The layers of `lading.nn` are built from these values, model families are lists of them, and a plan
needs nothing else: so a load can be planned for any ranks without building a model.

Letters: T = tp_size, O = output size, I = input size, both over all ranks.

    kind         outputs                       inputs                        bias
    replicated   whole on every rank           whole                         whole
    column       O/T rows, per part            whole                         cut like the outputs
    row          whole                         I/T columns                   whole, added once
    embedding    padded vocabulary / T rows    whole                         cut like the outputs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from lading.errors import DeclarationError, LayoutError
from lading.layouts import Axis, Cut, Layout, Part
from lading.specs import Along, Dim, TensorSpec, dense_specs

__all__ = ["Kind", "Layer"]


OUT, IN = "out_features of the layer", "in_features of the layer"


class Kind(str, Enum):
    """How a layer is parallel."""

    REPLICATED = "replicated"
    COLUMN = "column"
    ROW = "row"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A parallel layer: how it is parallel, its axes, whether it has a bias."""

    kind: Kind
    output: Axis
    input: Axis
    bias: bool = False

    @staticmethod
    def replicated(input_size: int, output_size: int, *, bias: bool = False) -> Layer:
        """The whole layer on every rank."""
        _check_sizes(input_size, output_size)
        return Layer(
            kind=Kind.REPLICATED,
            output=Axis.of(output_size, max_pieces=1, name=OUT),
            input=Axis.of(input_size, max_pieces=1, name=IN),
            bias=bias,
        )

    @staticmethod
    def column(
        input_size: int,
        output_sizes: Sequence[int],
        *,
        names: Sequence[str | int] | None = None,
        bias: bool = False,
    ) -> Layer:
        """Outputs cut; one part for each of `output_sizes`, named 0, 1, ... or as given."""
        _check_sizes(input_size, *output_sizes)
        if len(output_sizes) == 1:
            parts: tuple[Part, ...] = (Part(size=output_sizes[0]),)
        else:
            chosen = range(len(output_sizes)) if names is None else names
            if len(chosen) != len(output_sizes):
                raise DeclarationError(
                    f"a column layer has {len(output_sizes)} output sizes, needs as many names: "
                    f"{', '.join(map(repr, chosen))}"
                )
            parts = tuple(Part(name=n, size=s) for n, s in zip(chosen, output_sizes, strict=True))
        return Layer(
            kind=Kind.COLUMN,
            output=Axis(parts=parts, name=OUT),
            input=Axis.of(input_size, max_pieces=1, name=IN),
            bias=bias,
        )

    @staticmethod
    def qkv(
        hidden_size: int,
        head_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        v_head_size: int | None = None,
        bias: bool = False,
    ) -> Layer:
        """q, k, v side by side; with more ranks than KV heads, neighbours share a KV head."""
        v_size = head_size if v_head_size is None else v_head_size
        _check_sizes(hidden_size, head_size, num_heads, num_kv_heads, v_size)
        if num_heads % num_kv_heads:
            raise LayoutError(
                f"{num_heads} q heads do not share {num_kv_heads} KV heads equally: {num_heads} = "
                f"{num_kv_heads} * {num_heads // num_kv_heads} + {num_heads % num_kv_heads}"
            )
        q = Part(name="q", size=num_heads * head_size, unit=head_size, unit_name="q heads")
        shared = num_kv_heads
        k, v = (
            Part(name=n, size=shared * s, max_pieces=shared, unit=s, unit_name="KV heads")
            for n, s in (("k", head_size), ("v", v_size))
        )
        return Layer(
            kind=Kind.COLUMN,
            output=Axis(parts=(q, k, v), name=OUT),
            input=Axis.of(hidden_size, max_pieces=1, name=IN),
            bias=bias,
        )

    @staticmethod
    def row(input_size: int, output_size: int, *, bias: bool = False) -> Layer:
        """Inputs cut; each rank's product is summed over the ranks."""
        _check_sizes(input_size, output_size)
        return Layer(
            kind=Kind.ROW,
            output=Axis.of(output_size, max_pieces=1, name=OUT),
            input=Axis.of(input_size, name=IN),
            bias=bias,
        )

    @staticmethod
    def embedding(vocab_size: int, hidden_size: int, *, pad_to: int, bias: bool = False) -> Layer:
        """Vocabulary rows, padded to a multiple of `pad_to` and of T, then cut."""
        _check_sizes(vocab_size, hidden_size, pad_to)
        rows = Part(size=vocab_size, pad_to=pad_to, unit_name="vocabulary rows")
        return Layer(
            kind=Kind.EMBEDDING,
            output=Axis(parts=(rows,), name="vocabulary size"),
            input=Axis.of(hidden_size, max_pieces=1, name=IN),
            bias=bias,
        )

    def specs(self) -> tuple[TensorSpec, ...]:
        """The stored tensors of the layer."""
        return dense_specs(bias=self.bias)

    def layout(self, spec: TensorSpec, tp_size: int, *, fused_source: bool = False) -> Layout:
        """How one of the layer's tensors is made of parts and cut across T ranks.

        fused_source   the checkpoint stores all parts of the layer side by side
        """
        cuts = tuple(self._cut(dim) for dim in spec.dims)
        is_fused = fused_source and len(self.output.parts) > 1
        return Layout(cuts=cuts, tp_size=tp_size, fused_source=is_fused)

    def _cut(self, dim: Dim) -> Cut:
        return Cut(
            axis=self._axis(dim),
            grain=dim.grain,
            ragged=dim.ragged,
            reason=dim.reason,
            straddle=dim.straddle,
            align=dim.align,
            align_reason=dim.align_reason,
        )

    def _axis(self, dim: Dim) -> Axis:
        if dim.along is Along.OUTPUT:
            return self.output
        if dim.along is Along.INPUT:
            return self.input
        if dim.along is Along.WHOLE_INPUT:
            return Axis.of(self.input.size, max_pieces=1, name=IN)
        if dim.along is Along.PARTS:
            parts = self.output.parts
            sizes = dim.sizes or (1,) * len(parts)
            slots = tuple(
                Part(name=part.name, size=size, max_pieces=1)
                for part, size in zip(parts, sizes, strict=True)
            )
            return Axis(parts=slots, name="one number for each part", scalars=True)
        return Axis.of(dim.size, max_pieces=1, name="fixed by the format")


def _check_sizes(*sizes: int) -> None:
    for size in sizes:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise DeclarationError(f"a layer size is {size!r}, needs an int of at least 1")
