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
    from lading.digesting.report import DigestReport
    from lading.digesting.verb import digest
    from lading.errors import LadingError, PlanError
    from lading.exports.verb import ExportReport, export
    from lading.loading import LoadReport, load
    from lading.names import Names, SkipRule
    from lading.nn import check_loaded, start_load
    from lading.owners import name_parameters
    from lading.plan import Plan, make_plan
    from lading.pretrained import from_pretrained
    from lading.ranks import Ranks, all_ranks
    from lading.resharding.verb import ReshardReport, reshard
    from lading.sharding.foreign import describe_shards
    from lading.sharding.verbs import ShardReport, merge, reshard_files, shard
    from lading.transport import Limits, release_pinned

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "DigestReport",
    "ExportReport",
    "LadingError",
    "Limits",
    "LoadReport",
    "Names",
    "Plan",
    "PlanError",
    "Ranks",
    "ReshardReport",
    "ShardReport",
    "SkipRule",
    "all_ranks",
    "check_loaded",
    "dequantize",
    "describe_shards",
    "digest",
    "export",
    "from_pretrained",
    "load",
    "make_plan",
    "merge",
    "name_parameters",
    "open_checkpoint",
    "release_pinned",
    "reshard",
    "reshard_files",
    "shard",
    "start_load",
]

_HOMES = {
    "Checkpoint": "checkpoint",
    "DigestReport": "digesting.report",
    "ExportReport": "exports.verb",
    "LadingError": "errors",
    "Limits": "transport",
    "LoadReport": "loading",
    "Names": "names",
    "Plan": "plan",
    "PlanError": "errors",
    "Ranks": "ranks",
    "ReshardReport": "resharding.verb",
    "ShardReport": "sharding.verbs",
    "SkipRule": "names",
    "all_ranks": "ranks",
    "check_loaded": "nn",
    "dequantize": "decoding",
    "describe_shards": "sharding.foreign",
    "digest": "digesting.verb",
    "export": "exports.verb",
    "from_pretrained": "pretrained",
    "load": "loading",
    "make_plan": "plan",
    "merge": "sharding.verbs",
    "name_parameters": "owners",
    "open_checkpoint": "checkpoint",
    "release_pinned": "transport",
    "reshard": "resharding.verb",
    "reshard_files": "sharding.verbs",
    "shard": "sharding.verbs",
    "start_load": "nn",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        return import_module(f"{__name__}.{name}") if name in _ROOMS else _missing(name)
    from lading.collecting import uncollected

    with uncollected():  # it would go through all that torch has made: 0.1 s of a first load
        value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


_ROOMS = ("checkpoint", "errors", "models", "names", "nn", "parameter", "plan", "ranks")


def _missing(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
