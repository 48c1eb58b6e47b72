"""From a folder to a ready model in one call: config.json → family → model on meta → load."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lading import dtypes, models, owners
from lading import ranks as ranks_module
from lading.errors import CallError
from lading.loading import PathLike, Prepared, Progress, run_load
from lading.placing import known_device
from lading.preflight import preflight
from lading.ranks import Ranks
from lading.transport import Limits

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lading.loading import LoadReport

__all__ = ["from_pretrained", "load_pretrained", "prepare_pretrained"]


def from_pretrained(
    path: PathLike,
    *,
    ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    straddle: str = "duplicate",
    limits: Limits | None = None,
    exchange: bool | None = None,
    progress: Progress | None = None,
) -> models.CausalLM:
    """A ready model of this rank from a Hugging Face checkpoint folder.

    Under torchrun the folder is all it needs: the process group is joined if nobody has, and the
    rank is the process's own. The model has `load_report`, what the load did.

    ranks    this process's rank; by default `lading.ranks.current()`
    device   by default this rank's GPU, or the CPU where there is none
    dtype    of the parameters; by default config.json's, else the one that most tensors have
    straddle   what becomes of a scale block that a cut goes through: "duplicate" keeps it on both
             sides, with its offset, "refuse" refuses the cut
    Raises a PlanError with every problem, the same on all ranks, before anything is read.
    """
    if ranks is None:
        kind = known_device(device).type if device is not None else None
        ranks_module.join_world(
            device_type=kind or ("cuda" if torch.cuda.is_available() else "cpu")
        )
        ranks = ranks_module.current()
    model, report = load_pretrained(
        path,
        ranks=ranks,
        group=group,
        device=device,
        dtype=dtype,
        straddle=straddle,
        limits=limits,
        exchange=exchange,
        progress=progress,
    )
    vars(model)["load_report"] = report
    return model


def load_pretrained(
    path: PathLike,
    *,
    ranks: Ranks,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    straddle: str = "duplicate",
    limits: Limits | None = None,
    exchange: bool | None = None,
    progress: Progress | None = None,
) -> tuple[models.CausalLM, LoadReport]:
    """`from_pretrained` for a known rank, with the report of what was done."""
    model, report = run_load(
        lambda: prepare_pretrained(path, ranks=ranks, group=group, dtype=dtype, straddle=straddle),
        ranks=ranks,
        group=group,
        device=device,
        limits=limits,
        exchange=exchange,
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
    straddle: str = "duplicate",
) -> Prepared:
    """The model on meta and its proved plan; nothing is read but headers and config.json."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CallError(
            f"dtype is {dtype!r}, needs a floating point torch.dtype", subject="from_pretrained"
        )
    code = dtypes.from_torch(dtype) if dtype is not None else None
    found = preflight(path, [ranks], dtype=code, straddle=straddle)
    read = found.read
    with torch.device("meta"):
        model = models.CausalLM(
            read.config,
            ranks=ranks,
            group=group,
            dtype=dtypes.to_torch(read.dtype),
            quant_config=read.quant_config,
        )
    model.names = read.names
    walk = owners.Walk(model)
    owners.name_all(walk)
    return Prepared(model=model, checkpoint=read.checkpoint, plan=found.plan, walk=walk)
