"""The progress bar of a load: on stderr, on a terminal, of rank 0. Nothing else is ever drawn."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from lading.ranks import Ranks

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Bar", "bar_of"]


def bar_of(ranks: Ranks, what: str) -> Bar | None:
    """A bar for rank 0 where stderr is a terminal, None elsewhere."""
    return Bar(what) if ranks.tp_rank == 0 and sys.stderr.isatty() else None


class Bar:
    """A `lading.loading.Progress` that draws with rich: bytes in place, speed, time left."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def start(self, total_bytes: int) -> None:
        """Draws the bar."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,  # the last line of the report says what the bar would
        )
        self._task = self._progress.add_task(self.what, total=total_bytes)
        self._progress.start()

    def advance(self, num_bytes: int) -> None:
        """Draws on; rich itself limits how often."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, num_bytes)

    def finish(self) -> None:
        """Removes the bar."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None
