"""Rotary position embedding: inverse frequencies and attention scaling of every kind, in fp32.

Element pairs j = 0 .. d/2 - 1 of a head turn by position * f_j; the unscaled frequency is

    f_j = theta^(-2j/d)         RoFormer (Su et al. 2021, arXiv:2104.09864), section 3.2.2

Letters: d = rotated elements of a head, s = factor, L = length before scaling, n = sequence length.

    kind       frequency                                                    attention scaling
    default    f_j                                                          1
    linear     f_j / s                                                      1
    dynamic    f_j with theta * (s*n/L - (s - 1))^(d/(d-2)), n >= L         1
    llama3     f_j, f_j / s, or between the two, by wavelength              1
    yarn       f_j, f_j / s, or between the two, by index j                 0.1 ln s + 1
    longrope   f_j / short_j up to L tokens, f_j / long_j beyond            sqrt(1 + ln s / ln L)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from lading.errors import ConfigError
from lading.models.rope_config import RopeConfig

__all__ = ["inverse_frequencies", "rotate", "tables"]

Result = tuple[torch.Tensor, float]


def inverse_frequencies(
    rope: RopeConfig, *, seq_len: int | None = None, device: torch.device | str | None = None
) -> Result:
    """(frequencies [d / 2], the factor on cos and sin).

    seq_len   n, for the kinds that look at it (dynamic, longrope); None = no longer than L
    device    of the result; the numbers are worked out on the CPU, and so the same everywhere
    Raises a ConfigError for an unknown kind.

    Example: d = 4, theta = 10000, linear with s = 2: [1, 0.01] / 2 = [0.5, 0.005], scaling 1.
    """
    formula = _FORMULAS.get(rope.kind)
    if formula is None:
        raise ConfigError(
            f'is "{rope.kind}", needs one of: {", ".join(_FORMULAS)}', subject="rope_type"
        )
    frequencies, scaling = formula(rope, seq_len)
    return frequencies.to(device if device is not None else "cpu"), scaling


def depends_on_length(rope: RopeConfig) -> bool:
    """Whether the frequencies change with the sequence length."""
    return rope.kind in ("dynamic", "longrope")


def tables(
    position_ids: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gives cos and sin: [..., n] positions -> [..., n, d], angles in fp32, results in `dtype`."""
    angles = position_ids.unsqueeze(-1).float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [B, heads, n, D] turned by cos and sin [B, n, d]; elements d : D stay as they are.

    Element j is paired with j + d/2, the order of Hugging Face checkpoints (RoFormer's paper pairs
    2j with 2j + 1; checkpoints are permuted to match).
    """
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    dim = cos.shape[-1]
    turned, rest = heads[..., :dim], heads[..., dim:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def _powers(rope: RopeConfig, theta: float | None = None) -> torch.Tensor:
    """theta^(2j/d)."""
    steps = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device="cpu")
    base: float = rope.theta if theta is None else theta
    return torch.pow(base, steps / rope.rotary_dim)


def _factor(rope: RopeConfig) -> float:
    """s; for longrope without one, the lengths' ratio."""
    return rope.max_position / _original(rope) if rope.factor is None else rope.factor


def _original(rope: RopeConfig) -> int:
    """L; the length that the model was made for, where no other is told."""
    return rope.max_position if rope.original_max_position is None else rope.original_max_position


def _default(rope: RopeConfig, _seq_len: int | None) -> Result:
    return 1.0 / _powers(rope), 1.0


def _linear(rope: RopeConfig, _seq_len: int | None) -> Result:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return 1.0 / _powers(rope) / _factor(rope), 1.0


def _dynamic(rope: RopeConfig, seq_len: int | None) -> Result:
    """Dynamic NTK scaling (bloc97 and emozilla 2023; YaRN, arXiv:2309.00071, section 3.3)."""
    length = max(rope.max_position, seq_len or 0)
    factor, dim = _factor(rope), rope.rotary_dim
    stretch = factor * length / rope.max_position - (factor - 1)
    return 1.0 / _powers(rope, rope.theta * stretch ** (dim / (dim - 2))), 1.0


def _llama3(rope: RopeConfig, _seq_len: int | None) -> Result:
    """Llama 3.1's scaling (Meta 2024, `apply_scaling` of llama-models).

    With a wavelength w = 2 pi / f: w < L/high keeps f, w > L/low takes f/s, between them the two
    are mixed by (L/w - low) / (high - low).
    """
    low, high = rope.low_freq_factor, rope.high_freq_factor
    assert low is not None, "llama3 is parsed with a low_freq_factor"
    assert high is not None, "llama3 is parsed with a high_freq_factor"
    frequencies = 1.0 / _powers(rope)
    turns = _original(rope) / (2 * math.pi / frequencies)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - keep) * frequencies / _factor(rope) + keep * frequencies, 1.0


def _yarn(rope: RopeConfig, _seq_len: int | None) -> Result:
    """YaRN (Peng et al. 2023, arXiv:2309.00071), sections 3.2 and 3.4.

    Pairs that turn more than beta_fast times within L tokens keep f, those below beta_slow take
    f/s, with a linear ramp over the index between; `truncate` rounds the ramp's ends outwards.
    """
    dim, theta, length = rope.rotary_dim, rope.theta, _original(rope)

    def index_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001  # the reference's guard against 0 / 0
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((steps - first) / width).clamp(0.0, 1.0)
    powers, factor = _powers(rope), _factor(rope)
    frequencies = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    return frequencies, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: RopeConfig, factor: float) -> float:
    """0.1 ln s + 1 (YaRN, section 3.4), or the ratio of two such terms (DeepSeek-V2's config)."""

    def term(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return term(rope.mscale) / term(rope.mscale_all_dim)
    return term(1.0)


def _longrope(rope: RopeConfig, seq_len: int | None) -> Result:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753); the scaling is Phi-3's (arXiv:2404.14219)."""
    length, factor = _original(rope), _factor(rope)
    chosen = rope.long_factor if (seq_len or 0) > length else rope.short_factor
    frequencies = 1.0 / (torch.tensor(chosen, dtype=torch.float32, device="cpu") * _powers(rope))
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    return frequencies, math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0


_FORMULAS: Mapping[str, Callable[[RopeConfig, int | None], Result]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
