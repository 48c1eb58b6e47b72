"""See _engine.c. Tables are arrays of int64."""

from typing import NewType

Run = NewType("Run", object)

def start(
    jobs: bytes,
    files: bytes,
    buffers: bytes,
    streams: bytes,
    cuda: bytes,
    threads: int,
    chunk: int,
    gap: int,
    buffer_bytes: int,
    /,
) -> Run:
    """Begins to move. The tables are kept, the memory that they speak of is not."""

def wait(run: Run, seconds: float, /) -> tuple[int, int]:
    """(whether it has ended, bytes moved so far), after `seconds` at the latest."""

def stop(run: Run, /) -> None:
    """Lets no thread take another unit."""

def result(
    run: Run, /
) -> tuple[tuple[int, int, int, int, int, int], tuple[int, int, int, int, int]]:
    """Of a run that has ended: (kind, code, job, offset, wanted, got) of its fault, kind 0 where
    there was none; (bytes read, bytes moved, calls, nanoseconds of reading, of waiting).
    """
