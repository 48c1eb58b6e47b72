"""The stored tensors of a layer, as data: which axis each dim runs along, with which grain. No
torch.

A scheme of `lading.schemes` is a function from a layer to such specs; a dense layer has the two of
`dense_specs`. Letters: O = outputs, I = inputs.

    GPTQ, 4 bits, groups of 128:
        qweight  [I/8, O]     (INPUT, grain 8), (OUTPUT, 1)
        qzeros   [I/128, O/8] (INPUT, grain 128), (OUTPUT, grain 8)
        scales   [I/128, O]   (INPUT, grain 128), (OUTPUT, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

__all__ = ["Along", "Constant", "Dim", "TensorSpec", "dense_specs"]


class Along(str, Enum):
    """What a dim of a tensor runs along.

    OUTPUT, INPUT   an axis of the layer, cut as the layer is
    WHOLE_INPUT     the inputs, on every rank whole (scales that act-order indices point into)
    PARTS           one entry for each part of a fused layer (scalars)
    FIXED           a size of its own, the same on every rank
    """

    OUTPUT = "output"
    INPUT = "input"
    WHOLE_INPUT = "whole input"
    PARTS = "parts"
    FIXED = "fixed"


class Constant(str, Enum):
    """A stored tensor whose value follows from the declaration: compared with it, and not kept.

    SHAPE         the two sizes (O, I) of the part
    GROUP_INDEX   element i is i // group size: the groups in order
    ZERO          all elements are zero
    """

    SHAPE = "shape"
    GROUP_INDEX = "group index"
    ZERO = "zero"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dim:
    """One dim of a stored tensor.

    along     what it runs along
    grain     logical elements per stored entry
    ragged    the last entry of a part may cover fewer elements
    straddle  an entry that a cut goes through is kept by the ranks on both sides (block scales);
              without it such a cut is refused
    size      of a FIXED dim
    sizes     of a PARTS dim: entries of each part; () = one each
    reason    why the grain is what it is, for messages: "int4 packs 8 rows per int32 entry"
    align     pieces are whole multiples of so many logical elements, where a grain does not say so
              (tiles); align_reason says why: "Marlin tiles hold 64 outputs"
    """

    along: Along
    grain: Fraction = Fraction(1)
    ragged: bool = False
    straddle: bool = False
    size: int = 1
    sizes: tuple[int, ...] = ()
    reason: str = ""
    align: int = 1
    align_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One stored tensor of a layer.

    name      the last component of its name: "weight", "bias", "qweight", ...
    dims      one a dim of the parameter
    dtypes    those that the format allows, in the safetensors spelling; the parameter takes the
              file's. () = the model's dtype, to which a file may be cast
    stored    the file's shape where it is another view of the same elements; -1 stands for all that
              is left: (-1, 1) for a flattened column
    constant  what the values have to be, for tensors that are not parameters
    group     group size of a GROUP_INDEX constant
    per_part  the first dim was put before the format's own: one entry for each part of a fused
              layer
    """

    name: str
    dims: tuple[Dim, ...]
    dtypes: tuple[str, ...] = ()
    stored: tuple[int, ...] | None = None
    constant: Constant | None = None
    group: int = 0
    per_part: bool = False

    @property
    def attribute(self) -> str:
        """The parameter's name in its module: "weight.absmax" is weight_absmax there."""
        return self.name.replace(".", "_")


def dense_specs(*, bias: bool) -> tuple[TensorSpec, ...]:
    """The tensors of a layer that is not quantised: weight [O, I] and, on demand, bias [O]."""
    weight = TensorSpec(name="weight", dims=(Dim(along=Along.OUTPUT), Dim(along=Along.INPUT)))
    return (weight, bias_spec()) if bias else (weight,)


def bias_spec() -> TensorSpec:
    """Bias [O], in the model's dtype."""
    return TensorSpec(name="bias", dims=(Dim(along=Along.OUTPUT),))
