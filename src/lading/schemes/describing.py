"""What a quantised checkpoint is, in words: how many layers have which scheme. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lading.layers import Layer
from lading.schemes.choose import QuantConfig

__all__ = ["DENSE", "describe"]

DENSE = "not quantised"


def describe(
    quant_config: QuantConfig | None, layers: Iterable[tuple[str, Layer]]
) -> dict[str, int]:
    """The number of layers of each scheme, most first: {"GPTQ int4, groups of 128": 128, ...}.

    layers   by path, `Declaration.layers`; fused ones (q, k, v) count once
    Raises a LadingError where config and headers contradict each other.
    """
    counts: Counter[str] = Counter()
    for path, layer in layers:
        scheme = quant_config.for_layer(path, layer) if quant_config is not None else None
        counts[DENSE if scheme is None else scheme.scheme.name] += 1
    return dict(counts.most_common())
