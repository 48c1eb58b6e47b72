"""Model families as data, and one decoder that is built from it.

`parse_config`, `declare` and `targets` need no torch; what builds modules is imported when
it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lading.models.config import ExpertsConfig, ModelConfig, parse_config
from lading.models.declaration import Declaration, declare, targets, tp_sizes
from lading.models.families import FAMILIES, Experts, Family
from lading.models.rope_config import RopeConfig

if TYPE_CHECKING:
    from lading.models.building import build_layer
    from lading.models.decoder import CausalLM, build

__all__ = [
    "FAMILIES",
    "CausalLM",
    "Declaration",
    "Experts",
    "ExpertsConfig",
    "Family",
    "ModelConfig",
    "RopeConfig",
    "build",
    "build_layer",
    "declare",
    "parse_config",
    "targets",
    "tp_sizes",
]

_HOMES = {"CausalLM": "decoder", "build": "decoder", "build_layer": "building"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = vars(import_module(f"{__name__}.{_HOMES[name]}"))[name]
    globals()[name] = value
    return value
