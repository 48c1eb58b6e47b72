"""See _engine.c. Addresses and counts are plain numbers."""

from typing import NewType

Run = NewType("Run", object)

def start(
    jobs: int,
    num_jobs: int,
    files: int,
    num_files: int,
    threads: int,
    chunk: int,
    gap: int,
    buffer_bytes: int,
    buffers: int,
    num_buffers: int,
    streams: int,
    num_streams: int,
    cuda: int,
    /,
) -> Run:
    """Begins to move; the arrays are copied, the memory they speak of is not."""

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

def advise(address: int, num_bytes: int, /) -> None:
    """Asks for huge pages."""
