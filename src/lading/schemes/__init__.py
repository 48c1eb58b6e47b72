"""Quantisation formats as tables of tensor specs, each with its dequantisation."""

from lading.schemes.base import Found, PartView, Quantization, Scheme, Stored
from lading.schemes.choose import LayerScheme, QuantConfig, quant_config_of, quantization_of

__all__ = [
    "Found",
    "LayerScheme",
    "PartView",
    "QuantConfig",
    "Quantization",
    "Scheme",
    "Stored",
    "quant_config_of",
    "quantization_of",
]
