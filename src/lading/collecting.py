"""Python's cyclic garbage collector, told to wait.

A plan of a large model is a million small values in trees. While they are made the collector goes
through all of them again and again to look for cycles that are not there: 0.8 of 3.4 s for the
index of DeepSeek-V3 (benchmarks/README.md).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

__all__ = ["uncollected"]

P = ParamSpec("P")
T = TypeVar("T")


def uncollected(work: Callable[P, T]) -> Callable[P, T]:
    """The same function, during which nothing is collected; whoever had it paused keeps it so."""

    @wraps(work)
    def working(*args: P.args, **kwargs: P.kwargs) -> T:
        if not gc.isenabled():
            return work(*args, **kwargs)
        gc.disable()
        try:
            return work(*args, **kwargs)
        finally:
            gc.enable()

    return working
