"""Python's cyclic garbage collector, told to wait.

A plan of a large model is a million small values in trees. While they are made the collector goes
through them, and through all that torch has made, again and again, to look for cycles that are not
there: 0.8 of 3.4 s for the index of DeepSeek-V3 (benchmarks/README.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected meanwhile; whoever had the collector paused keeps it so.

    Example: `with uncollected(): ...`, or `@uncollected()` over a function.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
