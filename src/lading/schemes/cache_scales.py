"""The scales of a quantised KV cache: numbers beside the layers, which decode no weight. No torch.

    where                        names                                    written by
    attention module             k_scale, v_scale                         compressed-tensors
    its k and v projections      k_proj.k_scale, v_proj.v_scale           ModelOpt
                                 qkv_proj.k_scale, qkv_proj.v_scale       (fused on disk)
                                 k_proj.output_scale, v_proj.output_scale compressed-tensors of 2024
    zero points, asymmetric      k_zero_point, v_zero_point, and alike
    queries, where quantised     q_scale, q_proj.q_scale
    one for both, on its own     kv_scale                                 AutoFP8 of 2024

Shapes are [] or [1], the same on every rank, or one number for each KV head, [H] or [H, 1, 1]: then
they are cut as the k part of a qkv layer is. Letters: H = KV heads (q_scale: q heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from lading import dtypes
from lading.errors import ConfigError, DtypeError, ShapeError
from lading.layers import Layer
from lading.layouts import Axis, Layout
from lading.schemes.base import Stored
from lading.schemes.config_groups import word
from lading.schemes.options import Options
from lading.specs import Along, Dim, TensorSpec

__all__ = ["LEAVES", "CacheScale", "CacheScales", "found_scales", "parse_kv_cache"]

DTYPES = ("F32", "BF16", "F16")
ZERO_DTYPES = ("I8", "F8_E4M3", *DTYPES)
NAMES: Mapping[str, tuple[str, ...]] = {
    f"{which}_{kind}": (
        f"{which}_{kind}",
        f"{which}_proj.{which}_{kind}",
        f"{which}_proj.output_{kind}",
        f"qkv_proj.{which}_{kind}",
    )
    for kind in ("scale", "zero_point")
    for which in ("q", "k", "v")
} | {"kv_scale": ("kv_scale",)}
"""Today's name → the names that files have, below the attention module."""

LEAVES = tuple(leaf for leaves in NAMES.values() for leaf in leaves)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScales:
    """What a config says of a KV cache's scales.

    required    today's names of those that have to be stored
    per_head    one number for each head, not for the layer; None where the config does not say
    says        the config's words, for messages
    """

    required: tuple[str, ...] = ()
    per_head: bool | None = None
    says: str = "kv_cache_scheme"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScale:
    """One stored scale or zero point.

    name    of the parameter in the attention module, "k_scale"
    leaf    in the checkpoint, below the attention module, "k_proj.output_scale"
    dtype   as stored
    spec    relative to one part of the qkv layer: `layout`
    part    whose: "k"
    """

    name: str
    leaf: str
    dtype: str
    spec: TensorSpec
    part: str

    def layout(self, qkv: Layer, tp_size: int) -> Layout:
        """How T ranks hold it."""
        return _part_of(qkv, self.part).layout(self.spec, tp_size)


def found_scales(
    declared: CacheScales | None, stored: Mapping[str, Stored], qkv: Layer
) -> tuple[CacheScale, ...]:
    """The scales of one attention module, by today's names.

    declared   what the config says; None where it says nothing
    stored     those of LEAVES that the checkpoint has
    qkv        the fused layer of parts "q", "k", "v"
    Raises a LadingError for a missing scale, one under two names, a wrong shape or dtype.
    """
    found: dict[str, CacheScale] = {}
    for name, leaves in NAMES.items():
        present = [leaf for leaf in leaves if leaf in stored]
        if len(present) > 1:
            raise ConfigError(
                f"the checkpoint has {' and '.join(present)}, needs one of them ({name})"
            )
        if present:
            leaf = present[0]
            found[name] = _scale(name, leaf, stored[leaf], qkv, declared or CacheScales())
    needed = set(declared.required if declared is not None else ())
    if "kv_scale" in found:
        needed -= {"k_scale", "v_scale"}
    for kind in ("scale", "zero_point"):
        both = {f"k_{kind}", f"v_{kind}"}
        needed |= both if both & found.keys() else set()
    missing = [name for name in NAMES if name in needed and name not in found]
    if missing:
        says = declared.says if declared is not None else "nothing of a KV cache"
        raise ConfigError(
            f"config.json says {says}, the checkpoint has {', '.join(found) or 'no scales of it'}; "
            f"needs {', '.join(name for name in NAMES if name in needed)}"
        )
    return tuple(found.values())


def _scale(name: str, leaf: str, stored: Stored, qkv: Layer, declared: CacheScales) -> CacheScale:
    allowed = DTYPES if name.endswith("scale") else ZERO_DTYPES
    shown = f"checkpoint tensor {leaf!r} is {dtypes.spell(stored.dtype, stored.shape)}"
    if stored.dtype not in allowed:
        needed = " or ".join(map(dtypes.printed, allowed))
        raise DtypeError(f"{shown}, needs {needed}", file=stored.file or None)
    part = _part_of(qkv, name[0]).output.parts[0]
    heads = part.size // part.unit
    is_scalar = stored.shape in ((), (1,)) and declared.per_head is not True
    is_per_head = stored.shape in ((heads,), (heads, 1, 1)) and declared.per_head is not False
    if not is_scalar and not is_per_head:
        needed = "[] or [1]" if not declared.per_head else ""
        by_head = f"[{heads}] or [{heads}, 1, 1] ({heads} heads)"
        words = [w for w in (needed, by_head if declared.per_head is not False else "") if w]
        raise ShapeError(f"{shown}, needs {' or '.join(words)}", file=stored.file or None)
    one = Dim(along=Along.FIXED)
    dims: tuple[Dim, ...] = (one,)
    if not is_scalar:
        by_heads = Dim(
            along=Along.OUTPUT,
            grain=Fraction(part.unit),
            reason=f"one scale covers a head of {part.unit}",
        )
        dims = (by_heads, *([one] * (len(stored.shape) - 1)))
    spec = TensorSpec(
        name=name,
        dims=dims,
        dtypes=allowed,
        stored=() if not stored.shape else None,
    )
    return CacheScale(name=name, leaf=leaf, dtype=stored.dtype, spec=spec, part=name[0])


def _part_of(qkv: Layer, name: str) -> Layer:
    """The q, k or v part as a layer of its own."""
    part = next(part for part in qkv.output.parts if part.name == name)
    return Layer(kind=qkv.kind, output=Axis(parts=(part,), name=qkv.output.name), input=qkv.input)


def parse_kv_cache(options: Options | None) -> CacheScales | None:
    """The kv_cache_scheme of a compressed-tensors config."""
    if options is None:
        return None
    options.integer("num_bits", 8, allowed=(4, 8))
    word(options, "type", ("int", "float"), "int")
    per_head = word(options, "strategy", ("tensor", "attn_head"), "tensor") == "attn_head"
    if options.flag("dynamic", False):
        return CacheScales(per_head=per_head)
    kinds = ("scale",) if options.flag("symmetric", True) else ("scale", "zero_point")
    return CacheScales(
        required=tuple(f"{which}_{kind}" for kind in kinds for which in ("k", "v")),
        per_head=per_head,
        says="kv_cache_scheme with stored scales",
    )
