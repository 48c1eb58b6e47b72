"""Quantisation formats as tables of tensor specs, each with its dequantisation."""

from lading.schemes.base import Found, PartView, Quantization, Scheme, Stored
from lading.schemes.choose import (
    LayerScheme,
    QuantConfig,
    Straddle,
    quant_config_of,
    quantization_of,
)
from lading.schemes.describing import describe

__all__ = [
    "Found",
    "LayerScheme",
    "PartView",
    "QuantConfig",
    "Quantization",
    "Scheme",
    "Stored",
    "Straddle",
    "describe",
    "quant_config_of",
    "quantization_of",
]
