"""One verdict on every rank: no rank raises while another waits in a collective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lading import ranks as ranks_module
from lading.errors import LadingError, RankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["agreed", "all_well", "check_equal"]


def agreed(work: Callable[[], Any], facts: Callable[[Any], Any], group: ProcessGroup | None) -> Any:
    """This rank's result once every rank has one; the same error on every rank otherwise, also
    where facts of the results differ.
    """
    result, found = all_well(work, facts, group)
    check_equal(found)
    return result


def check_equal(found: Sequence[Any]) -> None:
    """Raises a RankError where ranks found different facts."""
    for rank, other in enumerate(found):
        if other != found[0]:
            raise RankError(
                f"ranks 0 and {rank} made different plans: they see different checkpoints or "
                "models, needs the same on every rank"
            )


def all_well(
    work: Callable[[], Any], facts: Callable[[Any], Any], group: ProcessGroup | None
) -> tuple[Any, list[Any]]:
    """This rank's result and every rank's facts, once every rank has a result; the same error on
    every rank otherwise.
    """
    result: Any = None
    told: Any = None
    error: LadingError | None = None
    try:
        result = work()
        told = facts(result)
    except LadingError as found:
        error = found
    except (
        Exception
    ) as found:  # whatever it is: a rank that raised alone would leave the others waiting
        if group is None:
            raise
        error = RankError(f"{type(found).__name__}: {found}")
        error.__cause__ = found
    verdicts = ranks_module.exchange((error, told), group)
    failed = [(rank, verdict) for rank, (verdict, _) in enumerate(verdicts) if verdict is not None]
    if failed:
        rank, first = failed[0]
        if error is not None and str(error) == str(first):
            first = error  # keeps this rank's own traceback
        if len(failed) < len(verdicts) and len(verdicts) > 1:
            first.rank = rank
        raise first
    return result, [found for _, found in verdicts]
