"""How fast digests are, against sha256 of hashlib over the same bytes, in one process and run.

    python benchmarks/digest.py [--gigabytes 0.5] [--repeat 3]

Prints GB/s, the best of the repeats, each repeat of both right after the other: of memory by one
thread; of a safetensors file in the page cache by lading.digest, and by sha256 with as many threads
(each has its share of the file: more than sha256 of one file could use).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import lading
from lading.digesting.files import BLOCK_BYTES, MAX_THREADS
from lading.digests.sums import sums_of
from lading.regions import Region

COLUMNS = 4096
CASES = {
    "bf16[R, 4096]": ("BF16", Region.whole),
    "bf16[R, 4096], an eighth of its columns": (
        "BF16",
        lambda shape: Region.box(shape, ((0, shape[0]), (512, 1024))),
    ),
    "fp8[R, 8192]": ("F8_E4M3", Region.whole),
    "fp8[R, 8191]": ("F8_E4M3", Region.whole),
}


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def compare(
    name: str, num_bytes: int, ours: Callable[[], object], sha: Callable[[], object]
) -> None:
    pairs = [(seconds(ours), seconds(sha)) for _ in range(arguments.repeat)]
    one, two = (num_bytes / 1e9 / min(column) for column in zip(*pairs, strict=True))
    print(f"{name:45} {one:6.2f} GB/s   sha256 {two:6.2f} GB/s   x {one / two:.2f}")


def memory(num_bytes: int) -> None:
    random = np.random.default_rng(0)
    for name, (dtype, region_of) in CASES.items():
        item = 2 if dtype == "BF16" else 1
        columns = COLUMNS * 2 // item - name.startswith("fp8[R, 8191")
        shape = (num_bytes // (columns * item), columns)
        values = random.integers(0, 256, shape[0] * columns * item, np.uint8)
        values = values.view(f"u{item}").reshape(shape)
        region = region_of(shape)
        part = values[:, region.start[1] : region.start[1] + region.size[1]]
        flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        compare(
            name,
            part.nbytes,
            partial(sums_of, dtype, shape, region, part),
            partial(hashlib.sha256, flat.data),
        )


def files(num_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = num_bytes // 8 // (COLUMNS * 2)
        random = np.random.default_rng(0)
        tensors = {
            f"layers.{i}.weight": random.integers(0, 2**15, (rows, COLUMNS), np.uint16)
            for i in range(8)
        }
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        name = f"a file, {threads} threads"
        compare(name, num_bytes, lambda: lading.digest(folder), lambda: sha_of(path, threads))


def sha_of(path: Path, threads: int) -> None:
    share = path.stat().st_size // threads

    def work(number: int) -> None:
        digest, block = hashlib.sha256(), bytearray(BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            file.seek(number * share)
            for _ in range(share // BLOCK_BYTES):
                file.readinto(block)
                digest.update(block)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    memory(int(arguments.gigabytes * 1e9))
    files(int(arguments.gigabytes * 1e9))
