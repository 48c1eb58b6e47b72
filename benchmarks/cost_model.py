"""What a read costs: the two constants by which row cuts are read whole or run by run.

    python benchmarks/cost_model.py

Reads a file of 256 MB from the page cache through the reader that loading uses: runs of 1 KiB, one
call each, and blocks of 8 MiB. Prints seconds a call and bytes a second, medians of 5.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from lading.checkpoint import ByteReader

SIZE, RUN, BLOCK = 256 * 2**20, 2**10, 8 * 2**20


def main() -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "file").write_bytes(bytes(SIZE))
        calls, rates = [], []
        with ByteReader(folder, {"file": SIZE}) as reader:
            run, block = memoryview(bytearray(RUN)), memoryview(bytearray(BLOCK))
            for _ in range(6):
                began = time.perf_counter()
                for at in range(0, SIZE, 64 * RUN):
                    reader.read_into("file", at, run)
                calls.append((time.perf_counter() - began) / (SIZE // (64 * RUN)))
                began = time.perf_counter()
                for at in range(0, SIZE, BLOCK):
                    reader.read_into("file", at, block)
                rates.append(SIZE / (time.perf_counter() - began))
        print(f"{statistics.median(calls[1:]) * 1e6:.1f} us a call of {RUN} bytes")
        print(f"{statistics.median(rates[1:]) / 1e9:.1f} GB/s in blocks of {BLOCK} bytes")


if __name__ == "__main__":
    main()
