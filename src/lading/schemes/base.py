"""What a scheme is: which tensors a layer is stored as, and how they decode.

A `Scheme` is a frozen value, chosen for one layer from what config.json declares and from what the
headers show. `specs` gives the layer's tensors as data, from which layouts, plans and parameters
follow by the one arithmetic of `layouts`; no scheme cuts anything itself. `dequantize` decodes what
one rank holds of one part.

Letters: O = outputs, I = inputs of one part on one rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lading.layers import Layer
from lading.specs import TensorSpec

if TYPE_CHECKING:
    import torch

    from lading.schemes.cache_scales import CacheScales

__all__ = ["Found", "PartView", "Quantization", "Scheme", "Stored"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor as its header shows it: dtype in the safetensors spelling, shape, file."""

    dtype: str
    shape: tuple[int, ...]
    file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the headers show of one stored module.

    module   its name in the checkpoint, "model.layers.0.self_attn.q_proj"
    tensors  by what follows the module's name and a dot: "qweight", "weight.absmax", ...
    outputs, inputs   O and I over all ranks: of the part, or of all parts where `fused`
    fused    the module holds all parts of a fused layer side by side
    """

    module: str
    tensors: Mapping[str, Stored]
    outputs: int
    inputs: int
    fused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PartView:
    """What one rank holds of one part, in logical elements.

    outputs, inputs              O and I
    first_output, first_input    where they begin in the full part
    offsets                      (tensor, dim) → where the first element lies inside the first
                                 stored entry; only for entries that a cut goes through, 0 elsewhere
    """

    outputs: int
    inputs: int
    first_output: int = 0
    first_input: int = 0
    offsets: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def offset(self, tensor: str, dim: int) -> int:
        """Elements of the first entry that belong to the rank before."""
        return self.offsets.get((tensor, dim), 0)


class Scheme(ABC):
    """How one layer is quantised. Subclasses are frozen dataclasses; equal values are equal
    schemes.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """For reports: "GPTQ int4, groups of 128"."""

    @abstractmethod
    def specs(self, layer: Layer, found: Found) -> tuple[TensorSpec, ...]:
        """The layer's stored tensors, without its bias.

        Raises a LadingError where the headers contradict the scheme in a way that only it can see.
        """

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, torch.Tensor], view: PartView) -> torch.Tensor:
        """float32 [O, I] from the rank's own entries of one part, by tensor name."""


class Quantization(ABC):
    """One checkpoint's quantisation, parsed from its config: which scheme each module has."""

    @abstractmethod
    def scheme_for(self, layer: Layer, found: Found) -> Scheme | None:
        """The scheme of a stored module, None where it is dense.

        Raises a ConfigError where the declared scheme is not known or contradicts the headers.
        """

    @abstractmethod
    def said_of(self, layer: Layer, module: str) -> Hashable:
        """What the config says of a module's name: equal values and equal headers have one scheme.

        A checkpoint of experts has tens of thousands of modules and a handful of such values.
        """

    def cache_scales(self) -> CacheScales | None:
        """What the config says of the scales of a KV cache, None where it says nothing."""
        return None
