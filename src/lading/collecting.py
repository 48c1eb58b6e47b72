"""Python's cyclic garbage collector, told to wait.

A plan of a large model is a million small values in trees. While they are made the collector goes
through them, and through all that torch has made, again and again, to look for cycles that are not
there: 0.8 of 3.4 s for the index of DeepSeek-V3 (benchmarks/README.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Pause", "uncollected"]


class Pause:
    """The collector while it waits.

    is_ours   False where somebody else had it paused before
    """

    def __init__(self, *, is_ours: bool) -> None:
        self.is_ours = is_ours

    def catch_up(self) -> None:
        """Looks through what has been made so far, at a moment when nobody waits for it: it is what
        the end of the pause would bring otherwise.
        """
        if self.is_ours:
            gc.collect(0)


@contextmanager
def uncollected() -> Iterator[Pause]:
    """Nothing is collected meanwhile; whoever had the collector paused keeps it so.

    Example: `with uncollected(): ...`, or `@uncollected()` over a function.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield Pause(is_ours=was_enabled)
    finally:
        if was_enabled:
            gc.enable()
