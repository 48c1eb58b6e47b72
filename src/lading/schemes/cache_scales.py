"""The scales of a quantised KV cache: scalars beside the layers, which decode no weight. No torch.

    where                         names                          shape
    attention module              k_scale, v_scale               [], [1] or [H, 1, 1], H = KV heads
    its projections (2024 files)  k_proj.output_scale, v_proj... [], [1]
    zero points, where asymmetric k_zero_point, ...              as the scale

Scalars are the same on every rank. One scale for each head is cut as the k part of a qkv layer is:
one entry for each head size of its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from lading.schemes.base import Stored
from lading.schemes.config_groups import word
from lading.schemes.options import Options
from lading.specs import Along, Dim, TensorSpec

__all__ = ["KvCache", "parse_kv_cache"]

DTYPES = ("F32", "BF16", "F16")
ZERO_DTYPES = ("I8", "F8_E4M3", *DTYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCache:
    """How a KV cache is quantised.

    bits, is_float   of one entry
    per_head         one scale for each KV head, not for the layer
    dynamic          scales are computed at run time: nothing is stored
    symmetric        there are no zero points
    """

    bits: int = 8
    is_float: bool = True
    per_head: bool = False
    dynamic: bool = False
    symmetric: bool = True

    def names(self) -> tuple[str, ...]:
        """What the attention module has, under the names of today."""
        if self.dynamic:
            return ()
        kinds = ("scale",) if self.symmetric else ("scale", "zero_point")
        return tuple(f"{which}_{kind}" for kind in kinds for which in ("k", "v"))

    def canonical(self, name: str) -> str | None:
        """'k_proj.output_scale' -> 'k_scale', today's names as they are, None for any other."""
        for which in ("k", "v"):
            for kind in ("scale", "zero_point"):
                if name in (f"{which}_{kind}", f"{which}_proj.output_{kind}"):
                    return f"{which}_{kind}"
        return None

    def spec(self, name: str, stored: Stored, head_size: int) -> TensorSpec:
        """The spec of one scale or zero point, relative to the k or v part of the qkv layer."""
        dtypes = DTYPES if name.endswith("scale") else ZERO_DTYPES
        one = Dim(along=Along.FIXED)
        if self.per_head:
            heads = Dim(
                along=Along.OUTPUT,
                grain=Fraction(head_size),
                reason=f"one scale covers a KV head of {head_size}",
            )
            return TensorSpec(name=name, dims=(heads, one, one), dtypes=dtypes)
        return TensorSpec(
            name=name, dims=(one,), dtypes=dtypes, stored=None if stored.shape else ()
        )


def parse_kv_cache(options: Options | None) -> KvCache | None:
    """The kv_cache_scheme of a compressed-tensors config."""
    if options is None:
        return None
    return KvCache(
        bits=options.integer("num_bits", 8, allowed=(4, 8)),
        is_float=word(options, "type", ("int", "float"), "int") == "float",
        per_head=word(options, "strategy", ("tensor", "attn_head"), "tensor") == "attn_head",
        dynamic=options.flag("dynamic", False),
        symmetric=options.flag("symmetric", True),
    )
