"""lading: model checkpoints into tensor-parallel PyTorch models, by a plan proved before a byte is
read.

Names are imported when they are first used, so that `import lading` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lading.checkpoint import Checkpoint, open_checkpoint
    from lading.decoding import dequantize
    from lading.errors import LadingError, PlanError
    from lading.loading import LoadReport, load
    from lading.names import Names, SkipRule
    from lading.nn import check_loaded, start_load
    from lading.owners import name_parameters
    from lading.plan import Plan, make_plan
    from lading.pretrained import from_pretrained
    from lading.ranks import Ranks, all_ranks

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "LadingError",
    "LoadReport",
    "Names",
    "Plan",
    "PlanError",
    "Ranks",
    "SkipRule",
    "all_ranks",
    "check_loaded",
    "dequantize",
    "from_pretrained",
    "load",
    "make_plan",
    "name_parameters",
    "open_checkpoint",
    "start_load",
]

_HOMES = {
    "Checkpoint": "checkpoint",
    "LadingError": "errors",
    "LoadReport": "loading",
    "Names": "names",
    "Plan": "plan",
    "PlanError": "errors",
    "Ranks": "ranks",
    "SkipRule": "names",
    "all_ranks": "ranks",
    "check_loaded": "nn",
    "dequantize": "decoding",
    "from_pretrained": "pretrained",
    "load": "loading",
    "make_plan": "plan",
    "name_parameters": "owners",
    "open_checkpoint": "checkpoint",
    "start_load": "nn",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        return import_module(f"{__name__}.{name}") if name in _ROOMS else _missing(name)
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


_ROOMS = ("checkpoint", "errors", "models", "names", "nn", "parameter", "plan", "ranks")


def _missing(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
