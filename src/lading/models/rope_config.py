"""The rotary position embedding of a model as a value, and its parsing from config.json. No torch.

Two spellings are read. Until transformers 4: `rope_theta`, `partial_rotary_factor` at the top, and
`rope_scaling: {"type" or "rope_type": ..., ...}`; since 5 everything in `rope_parameters`. Where
both are there they have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lading.models.families import Family
from lading.models.reading import Reader, spell

__all__ = ["RopeConfig", "read_rope"]

DEFAULT_THETA = 10000.0
"""RoFormer's base (arXiv:2104.09864, section 3.2.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """How positions become angles; `lading.models.rope` has the formulas.

    kind                  default, linear, dynamic, llama3, yarn or longrope
    theta                 the base of the frequencies
    partial_rotary_factor the share of a head that is rotated, its first elements
    rotary_dim            how many elements that is
    max_position          longest sequence that the model was made for
    original_max_position longest sequence before the scaling; None for kinds that do not ask
    factor                how much longer sequences become (all kinds but default; None = longrope
                          takes max_position / original_max_position)
    low_freq_factor, high_freq_factor                             llama3
    beta_fast, beta_slow, mscale, mscale_all_dim, truncate        yarn
    attention_factor                                              yarn, longrope; None = by formula
    short_factor, long_factor                                     longrope: one number a frequency
    """

    kind: str = "default"
    theta: float = DEFAULT_THETA
    partial_rotary_factor: float = 1.0
    rotary_dim: int
    max_position: int
    original_max_position: int | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What a kind reads beside theta: numbers it cannot do without, numbers it can."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    original_max_position: bool = False
    per_frequency: tuple[str, ...] = ()


_KINDS: Mapping[str, _Kind] = {
    "default": _Kind(),
    "linear": _Kind(required=("factor",)),
    "dynamic": _Kind(required=("factor",)),
    "llama3": _Kind(
        required=("factor", "low_freq_factor", "high_freq_factor"), original_max_position=True
    ),
    "yarn": _Kind(
        required=("factor",),
        optional=("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        original_max_position=True,
    ),
    "longrope": _Kind(
        optional=("factor", "attention_factor"),
        original_max_position=True,
        per_frequency=("short_factor", "long_factor"),
    ),
}


def read_rope(top: Reader, family: Family, *, head_dim: int, max_position: int) -> RopeConfig:
    """The rotary embedding that config.json describes; problems go to the reader."""
    inner = _inner(top)
    kind = _kind(inner, family)
    theta = _agreed(top, inner, "rope_theta")
    rotary_dim, partial = _rotary_dim(top, inner, family, head_dim)
    facts = _KINDS[kind]
    values: dict[str, Any] = {key: inner.number(key) for key in facts.required}
    values.update({key: inner.number(key) for key in facts.optional if inner.given(key)})
    for key in facts.per_frequency:
        why = f"one for each pair of the {rotary_dim} rotated elements of a head"
        values[key] = inner.numbers(key, rotary_dim // 2 if rotary_dim else None, why)
    if facts.original_max_position:
        values["original_max_position"] = _original(top, inner, family, max_position)
    if kind == "yarn":
        values["truncate"] = inner.flag("truncate", True)
    if kind == "llama3" and inner.sound("high_freq_factor", "low_freq_factor"):
        low, high = values["low_freq_factor"], values["high_freq_factor"]
        if high <= low:
            fact = f"is {high:g}, needs more than {low:g} (low_freq_factor)"
            inner.note("high_freq_factor", fact)
    if kind == "dynamic" and rotary_dim == 2:
        inner.note("rope_type", 'is "dynamic", needs heads of more than 2 rotated elements')
    return RopeConfig(
        kind=kind,
        theta=family.rope_theta if theta is None else theta,
        partial_rotary_factor=partial,
        rotary_dim=rotary_dim,
        max_position=max_position,
        **values,
    )


def _inner(top: Reader) -> Reader:
    """The object of the newer or of the older spelling; an empty one where there is neither."""
    newer, older = top.inner("rope_parameters"), top.inner("rope_scaling")
    if newer.raw and older.raw and dict(newer.raw) != dict(older.raw):
        top.note(
            "rope_scaling",
            f"is {spell(older.raw)}, needs to equal rope_parameters, {spell(newer.raw)}, or to be "
            "left out",
        )
    inner = newer if newer.raw else older
    for key, value in inner.raw.items():
        if isinstance(value, Mapping):
            inner.note(key, f"is {spell(value)}, needs a number (one rotation for all layers)")
    return inner


def _kind(inner: Reader, family: Family) -> str:
    """The kind by its present name; "default" also after a problem."""
    found, older = inner.raw.get("rope_type"), inner.raw.get("type")
    if found is not None and older is not None and found != older:
        inner.note(
            "type",
            f"is {spell(older)}, needs to equal rope_type, {spell(found)}, or to be left out",
        )
    found = older if found is None else found
    found = "default" if found is None else found
    kind = family.rope_aliases.get(found, found) if isinstance(found, str) else None
    if kind not in family.rope_kinds:
        known = ", ".join([*family.rope_kinds, *family.rope_aliases])
        inner.note(
            "rope_type" if inner.given("rope_type") else "type",
            f"is {spell(found)}, needs one of: {known} (what lading knows for {family.model_type})",
        )
        return "default"
    assert kind is not None, "None is no rope kind"
    return kind


def _agreed(top: Reader, inner: Reader, key: str) -> float | None:
    """A number at the top or in the inner object; where both have it they have to agree."""
    high = top.optional_number(key)
    low = inner.optional_number(key)
    if high is not None and low is not None and high != low and top.sound(key) and inner.sound(key):
        inner.note(key, f"is {low:g}, needs {high:g} (the file's other {key})")
    return high if low is None else low


def _rotary_dim(top: Reader, inner: Reader, family: Family, head_dim: int) -> tuple[int, float]:
    """(rotated elements of a head, their share of the head); 0 elements after a problem."""
    key = "partial_rotary_factor"
    found = _agreed(top, inner, key)
    partial = 1.0 if found is None else found
    where = inner if inner.given(key) else top
    if not where.sound(key):
        return 0, 1.0
    if partial > 1 or (partial < 1 and not family.partial_rotary):
        most = (
            "at most 1" if family.partial_rotary else f"1 ({family.model_type} rotates whole heads)"
        )
        where.note(key, f"is {partial:g}, needs {most}")
        return 0, 1.0
    dim = int(head_dim * partial)  # truncated: the format's definition, not a shortcut
    if dim < 2 or dim % 2:
        if top.sound("head_dim", "hidden_size", "num_attention_heads"):
            share = f" = {head_dim} * {partial:g}" if partial != 1 else ""
            top.note(
                "head_dim", f"leaves {dim}{share} elements to rotate, needs an even number above 0"
            )
        return 0, partial
    return dim, partial


def _original(top: Reader, inner: Reader, family: Family, max_position: int) -> int:
    """The length before scaling: at the top, in the inner object, or the family's default."""
    key = "original_max_position_embeddings"
    high = top.optional_integer(key, family.original_max_position, least=2)
    low = inner.optional_integer(key, least=2)
    if high is not None and low is not None and high != low and top.sound(key) and inner.sound(key):
        if top.given(key):
            inner.note(key, f"is {low}, needs {high} (the file's other {key})")
        else:
            inner.note(
                key,
                f"is {low}, needs {high} ({family.model_type} reads {key} at the top of the file, "
                f"where a missing one means {high})",
                hint=f'"{key}": {low} at the top of the file',
            )
    if low is not None and (high is None or not top.given(key)):
        return low
    return max_position if high is None else high
