"""What the processes of test_exporting_ranks run: importable functions of a rank."""

from __future__ import annotations

import resource
from typing import Any

import lading
from lading.errors import LadingError
from lading.ranks import Ranks


def export(ranks: Ranks, folder: str, out: str, fault: str = "") -> dict[str, Any]:
    """Loads, does what the fault asks for on the last rank, and exports."""
    model = lading.from_pretrained(folder, ranks=ranks, device="cpu")
    if ranks.tp_rank == ranks.tp_size - 1:
        FAULTS[fault](model)
    try:
        report = lading.export(model, out, ranks=ranks)
    except LadingError as error:
        return {"error": str(error), "type": type(error).__name__, "written": 0}
    return {"error": None, "type": None, "written": report.written_bytes}


def _none(_model: Any) -> None:
    return None


def _full(_model: Any) -> None:
    """No file of this process may grow beyond 20 kB: what a full disk does, for everyone."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def _replica(model: Any) -> None:
    dict(model.named_parameters())["model.norm.weight"].data[5] += 1


def _broken(model: Any) -> None:
    """An error that is not lading's, in the middle of the work."""
    from lading.exports import verb as exporting

    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("nobody expected it")

    exporting.digests_of = fail  # type: ignore[attr-defined]


FAULTS = {"": _none, "full": _full, "replica": _replica, "broken": _broken}
