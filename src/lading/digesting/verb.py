"""The verb `digest` (the file is not named so: `lading.digest` is the function): of files or of a
model, whichever it is given. torch is imported only for a model.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lading.checkpoint import Checkpoint
from lading.digesting.files import digest_of_checkpoint, digest_of_path
from lading.digesting.report import DigestReport
from lading.ranks import Ranks

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

__all__ = ["digest"]


def digest(
    what: str | os.PathLike[str] | Checkpoint | nn.Module,
    *,
    ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
) -> DigestReport:
    """A digest of every checkpoint tensor: the same of files and of a model, for every tp_size.

    what    a checkpoint's path, a pre-sharded folder, or a model that `load` has filled: of that
            each rank sums what it holds, all ranks call this, and all get the report
    ranks   for a model: this process's rank, by default the one that its layers were built for
    group   for a model: of all ranks; the default group where it is this rank's

    Of a model: padding is no part of it; a tied tensor's twin has the same digest as the tensor;
    constants and skipped tensors, of which no rank holds anything, are in `left_out`. Values count
    in the checkpoint's dtype, as an export would write them: those that a load has rounded differ.

    Raises what opening the files raises; a CallError for a model whose origin or other ranks are
    unknown, a PlanError where the checkpoint's dtype does not hold a parameter's values.

    Example: `lading.digest("DIR").differences(lading.digest(model))` -> () where the model has what
    the folder has.
    """
    if isinstance(what, Checkpoint):
        return digest_of_checkpoint(what)
    if isinstance(what, str | os.PathLike):
        return digest_of_path(what)
    from lading.digesting.models import digest_of_model

    return digest_of_model(what, ranks, group)
