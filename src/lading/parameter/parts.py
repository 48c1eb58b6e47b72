"""Loading by what a parameter declares of itself, where the field's calls cannot say it."""

from __future__ import annotations

import torch

from lading import owners, writing
from lading.errors import CallError, DeclarationError, LadingError
from lading.layouts import PartName
from lading.parameter.base import BasevLLMParameter
from lading.parameter.checks import as_needed, check_values
from lading.ranks import Ranks

__all__ = ["load_part"]


def load_part(
    param: BasevLLMParameter,
    loaded_weight: torch.Tensor,
    *,
    part: PartName = None,
    ranks: Ranks,
    fused_source: bool = False,
) -> None:
    """Loads one part by the parameter's own declared layout, padding included.

    The way of `lading.nn` for what the field's four calls cannot say: a padded vocabulary. Raises
    what those calls raise, and a DeclarationError where the parameter declares no layout.
    """
    layout = param.tp_layout
    why = "the declared layout"
    try:
        if layout is None:
            raise DeclarationError("declares no layout, needs `tp_layout`")
        if layout.tp_size != ranks.tp_size:
            raise CallError(f"is loaded as {ranks}, needs a rank of {layout.tp_size} ({why})")
        if layout.local_shape != tuple(param.shape):
            raise DeclarationError(
                f"has shape {list(param.shape)}, needs {list(layout.local_shape)} ({why})"
            )
        placement = layout.place(part, ranks.tp_rank, fused_source=fused_source)
        needed = layout.fused_shape if fused_source else layout.source_shape(part)
        if placement is None:
            check_values(as_needed(loaded_weight, needed, param.dtype, why), param.data)
        else:
            source, target = placement.source, placement.target
            param._load(loaded_weight, source=source, target=target, part=part, why=why)
        for box in layout.padding(ranks.tp_rank):
            writing.fill(param.data, box)
            param._ledger.note(param, box)
    except LadingError as error:
        # Only now: the search for a name walks all objects, and disturbs threads that load.
        raise error.located(subject=owners.name_of(param)) from None
