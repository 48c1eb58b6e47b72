"""What can be known of a load before any process is started: config, headers, and the proved plan.

No torch, no process group: the command line plans with it in a fraction of a second, and
`from_pretrained` builds its model on the same answer.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lading import models
from lading.checkpoint import Checkpoint
from lading.errors import ConfigError, LayoutError, PlanError
from lading.layouts import suggest_tp
from lading.models import Declaration, ModelConfig
from lading.names import Names
from lading.plan import Plan, make_plan
from lading.ranks import Ranks
from lading.schemes import QuantConfig, quant_config_of
from lading.shards.folder import open_any

__all__ = ["Preflight", "Read", "preflight", "read", "tp_sizes", "tp_sizes_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """A checkpoint folder's headers and config, understood.

    names          the naming rules in which the checkpoint is spelt
    quant_config   chooses each layer's scheme, None for a dense checkpoint
    dtype          of the parameters, "BF16": config.json's, else the one of most bytes
    """

    checkpoint: Checkpoint
    config: ModelConfig
    declaration: Declaration
    names: Names
    quant_config: QuantConfig | None
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preflight:
    """What was read, and the proved plan of the ranks that were asked for."""

    read: Read
    plan: Plan

    @property
    def checkpoint(self) -> Checkpoint:
        """The headers."""
        return self.read.checkpoint

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.read.config


def read(
    path: str | os.PathLike[str], *, dtype: str | None = None, straddle: str = "duplicate"
) -> Read:
    """Headers and config.json of a folder, pre-sharded or not; no payload.

    dtype      of the parameters, in place of the declared one
    straddle   "duplicate" or "refuse": for scale blocks that a cut goes through
    Raises a FileError, ConfigError, or a PlanError with every problem.
    """
    checkpoint = open_any(path)
    if checkpoint.config is None:
        raise ConfigError(
            "is missing, needs one beside the weights (it says which model this is)",
            subject="config.json",
            file=checkpoint.folder,
            hint="lading inspect for what the files hold",
        )
    config = models.parse_config(checkpoint.config)
    names = models.FAMILIES[config.family].names.fitting(checkpoint.tensors)
    return Read(
        checkpoint=checkpoint,
        config=config,
        declaration=models.declare(config),
        names=names,
        quant_config=_quant_config(checkpoint, names, straddle),
        dtype=dtype or config.dtype or _most_common_dtype(checkpoint),
    )


def preflight(
    path: str | os.PathLike[str],
    ranks: Sequence[Ranks],
    *,
    dtype: str | None = None,
    straddle: str = "duplicate",
) -> Preflight:
    """The plan of a checkpoint folder, from headers alone.

    ranks      to plan for; all have one tp_size
    dtype      of the parameters, "BF16"; by default config.json's, else the one of most bytes
    straddle   "duplicate" or "refuse": for scale blocks that a cut goes through
    Raises a FileError, or a PlanError with every problem.
    """
    found = read(path, dtype=dtype, straddle=straddle)
    try:
        targets = models.targets(
            found.declaration, ranks[0].tp_size, found.dtype, found.quant_config
        )
    except PlanError as error:
        if all(isinstance(problem, LayoutError) for problem in error.problems):
            sizes = ", ".join(map(str, tp_sizes_of(found)))
            if sizes:
                error.hint = f"TP {sizes}: there every layer divides"
            fitting = suggest_tp(set(tp_sizes_of(found)).__contains__, ranks[0].tp_size)
            for problem in error.problems:
                problem.hint = fitting  # it knew what fits its own layer only
        raise
    plan = make_plan(targets, found.checkpoint.tensors, ranks=ranks, names=found.names)
    return Preflight(read=found, plan=plan)


def tp_sizes(path: str | os.PathLike[str], up_to: int = 64) -> tuple[int, ...]:
    """The tensor-parallel sizes at which every layer divides, as it is stored.

    Raises a LadingError where what is stored fits no scheme.
    """
    return tp_sizes_of(read(path), up_to)


def tp_sizes_of(found: Read, up_to: int = 64) -> tuple[int, ...]:
    """`tp_sizes` of what was read already."""
    sizes = models.tp_sizes(found.config, up_to)
    if found.quant_config is None:
        return sizes
    fitting = []
    for size in sizes:
        try:
            models.targets(found.declaration, size, found.dtype, found.quant_config)
        except PlanError as error:
            if not all(isinstance(problem, LayoutError) for problem in error.problems):
                raise
        else:
            fitting.append(size)
    return tuple(fitting)


QUANTISED_NAMES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax")
"""Names that only quantising tools give."""


def _quant_config(checkpoint: Checkpoint, names: Names, straddle: str) -> QuantConfig | None:
    """The checkpoint's quantisation; a ConfigError where tensors have one that nothing declares."""
    found = quant_config_of(checkpoint, names, straddle=straddle)
    if found is not None:
        return found
    for name, source in checkpoint.tensors.items():
        if name.endswith(QUANTISED_NAMES):
            raise ConfigError(
                f"is missing, needs to say how {name!r} is quantised (only quantising tools give "
                "such names)",
                subject="quantization_config",
                file="config.json" if checkpoint.config is not None else source.file,
                hint="the config.json that came with these files",
            )
    return None


def _most_common_dtype(checkpoint: Checkpoint) -> str:
    sizes: Counter[str] = Counter()
    for source in checkpoint.tensors.values():
        sizes[source.dtype] += source.num_bytes
    floats = [code for code, _ in sizes.most_common() if code in ("F64", "F32", "BF16", "F16")]
    if not floats:
        raise ConfigError(
            "declares no dtype, and no tensor has one",
            subject="config.json",
            file=checkpoint.folder,
            hint="--dtype bf16",
        )
    return floats[0]
