"""From a folder to a ready model in one call: config.json → family → model on meta → load."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from lading import dtypes, models, owners, ranks as ranks_module
from lading.checkpoint import Checkpoint, open_checkpoint
from lading.errors import CallError, ConfigError
from lading.loading import (
    PathLike,
    Prepared,
    Progress,
    default_device,
    run_load,
    targets_of,
)
from lading.plan import make_plan
from lading.ranks import Ranks
from lading.schemes import quant_config_of
from lading.transport import DEFAULT_STAGING_BYTES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lading.loading import LoadReport

__all__ = ["from_pretrained", "model_dtype", "prepare_pretrained"]


def from_pretrained(
    path: PathLike,
    *,
    ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    progress: Progress | None = None,
) -> models.CausalLM:
    """A ready model of this rank from a Hugging Face checkpoint folder.

    Under torchrun the folder is all it needs: the process group is joined if nobody has, and the rank
    is the process's own. The model has `load_report`, what the load did.

    ranks    this process's rank; by default `lading.ranks.current()`
    device   by default this rank's GPU, or the CPU where there is none
    dtype    of the parameters; by default config.json's, else the one that most tensors have
    Raises a PlanError with every problem, the same on all ranks, before anything is read.
    """
    if ranks is None:
        kind = torch.device(device).type if device is not None else None
        ranks_module.join_world(
            device_type=kind or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        ranks = ranks_module.current()
    model, _ = load_pretrained(
        path,
        ranks=ranks,
        group=group,
        device=device,
        dtype=dtype,
        staging_bytes=staging_bytes,
        progress=progress,
    )
    return model


def load_pretrained(
    path: PathLike,
    *,
    ranks: Ranks,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    progress: Progress | None = None,
) -> tuple[models.CausalLM, LoadReport]:
    """`from_pretrained` for a known rank, with the report of what was done."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CallError(f"dtype is {dtype!r}, needs a floating point torch.dtype", subject="from_pretrained")
    place = torch.device(device) if device is not None else default_device(ranks)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    model, report = run_load(
        lambda: prepare_pretrained(path, ranks=ranks, group=group, dtype=dtype),
        ranks=ranks,
        group=group,
        device=place,
        staging_bytes=staging_bytes,
        progress=progress,
    )
    assert isinstance(model, models.CausalLM), "prepare_pretrained builds a CausalLM"
    return model, report


def prepare_pretrained(
    path: PathLike,
    *,
    ranks: Ranks,
    group: ProcessGroup | None = None,
    dtype: torch.dtype | None = None,
) -> Prepared:
    """The model on meta and its proved plan; nothing is read but headers and config.json."""
    checkpoint = open_checkpoint(path)
    if checkpoint.config is None:
        raise ConfigError(
            "is missing, needs one beside the weights (it says which model this is)",
            subject="config.json",
            file=checkpoint.folder,
        )
    config = models.parse_config(checkpoint.config)
    chosen = dtype if dtype is not None else dtypes.to_torch(model_dtype(checkpoint, config.dtype))
    names = models.FAMILIES[config.family].names
    quant_config = quant_config_of(checkpoint, names)
    declaration = models.declare(config)
    models.targets(declaration, ranks.tp_size, dtypes.from_torch(chosen), quant_config)  # all problems
    with torch.device("meta"):
        model = models.CausalLM(
            config, ranks=ranks, group=group, dtype=chosen, quant_config=quant_config
        )
    owners.name_parameters(model)
    plan = make_plan(
        targets_of(model, ranks), checkpoint.tensors, ranks=[ranks], names=names
    )
    return Prepared(model=model, checkpoint=checkpoint, plan=plan)


def model_dtype(checkpoint: Checkpoint, declared: str | None) -> str:
    """The dtype that config.json declares, else the one of most checkpoint bytes."""
    if declared is not None:
        return declared
    sizes: Counter[str] = Counter()
    for source in checkpoint.tensors.values():
        sizes[source.dtype] += source.num_bytes
    floats = [code for code, _ in sizes.most_common() if code in ("F64", "F32", "BF16", "F16")]
    if not floats:
        raise ConfigError("declares no dtype, and no tensor has one", subject="config.json", file=checkpoint.folder)
    return floats[0]
