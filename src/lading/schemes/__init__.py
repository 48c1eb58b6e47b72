"""Quantisation formats as tables of tensor specs, each with its dequantisation."""
