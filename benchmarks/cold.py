"""Cold loads: beside a plain O_DIRECT read of the same bytes, and what the disk is asked for.

    python benchmarks/cold.py [--gigabytes 2] [--runs 5] [--tp 1 2 4]

Before each run the files' pages are dropped (posix_fadvise), and cachestat says whether they are
gone. `direct` reads all bytes of the files past the page cache, 4 MiB each, by 8 and by 16 threads,
into the same buffers again and again: nothing of it has to arrive anywhere. Sides alternate; each
run is a process of its own. "disk / checkpoint" is `read_bytes` of /proc/self/io, summed over the
rank processes, which are joined by gloo, over the checkpoint's bytes. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CHUNK = 4 * 2**20


def drop(folder: Path) -> float:
    """Empties the page cache of the files; the part of their bytes that stays."""
    from lading.transport.residency import resident_bytes

    left = total = 0
    for path in folder.glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        total += path.stat().st_size
        left += resident_bytes(fd, path.stat().st_size) or 0
        os.close(fd)
    return left / total


def disk_bytes() -> int:
    """What this process has had read from the disk so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def read_direct(folder: Path, num_threads: int) -> float:
    """Seconds in which all bytes of the files are read past the page cache."""
    pieces = []
    for path in sorted(folder.glob("*.safetensors")):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        pieces += [(fd, at) for at in range(0, path.stat().st_size, CHUNK)]
    places = iter(pieces)
    lock = threading.Lock()

    def work() -> None:
        buffer = mmap.mmap(-1, CHUNK)  # pages are aligned
        while True:
            with lock:
                fd, at = next(places, (-1, 0))
            if fd < 0:
                return
            os.preadv(fd, [buffer], at)

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def load_rank(ranks: Any, folder: str) -> tuple[float, int, int]:
    """One rank's load: seconds, bytes that it asked files for, bytes from the disk."""
    from lading.pretrained import load_pretrained

    before = disk_bytes()
    _, report = load_pretrained(folder, ranks=ranks, device="cpu")
    return report.seconds, report.read_bytes, disk_bytes() - before


def one_run(folder: Path, side: str, tp_size: int) -> dict[str, float]:
    """In a process of its own: imports come before the pages are dropped."""
    from lading.launch import run_ranks, warm_up

    warm_up(tp_size)
    import lading.models.decoder
    import lading.pretrained  # noqa: F401

    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    resident = drop(folder)
    if side.startswith("direct"):
        seconds = read_direct(folder, int(side.removeprefix("direct ")))
        return {"seconds": seconds, "resident": resident, "size": size}
    found = run_ranks(load_rank, tp_size, (str(folder),))
    return {
        "seconds": max(one[0] for one in found),
        "read": sum(one[1] for one in found),
        "disk": sum(one[2] for one in found),
        "resident": resident,
        "size": size,
    }


def measure(folder: Path, side: str, tp_size: int) -> dict[str, float]:
    """`one_run` in a new process."""
    command = [sys.executable, __file__, "--folder", str(folder), "--side", side]
    done = subprocess.run(
        [*command, "--tp", str(tp_size)], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The tables, or one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--side")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(one_run(options.folder, options.side, options.tp[0])))
        return
    from load import make_checkpoint

    with tempfile.TemporaryDirectory(dir=".") as name:  # on a disk: /tmp may be memory
        folder = options.folder or Path(name)
        if options.folder is None:
            make_checkpoint(folder, options.gigabytes, "dense")
        sides = [("direct 8", 1), ("direct 16", 1), *(("lading", size) for size in options.tp)]
        found: dict[tuple[str, int], list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.runs):
            for (side, tp_size), results in found.items():
                results.append(measure(folder, side, tp_size))
        print_tables(found)


def print_tables(found: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Medians; ratios pair the runs of a turn with the faster of the two direct reads."""
    best = [
        min(a["seconds"], b["seconds"])
        for a, b in zip(found["direct 8", 1], found["direct 16", 1], strict=True)
    ]
    size = found["direct 8", 1][0]["size"]
    print(f"{size / 1e9:.2f} GB, medians of {len(best)}, alternating\n")
    print("| | seconds | GB/s | of the plain read | disk / checkpoint | read / checkpoint |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (side, tp_size), results in found.items():
        seconds = statistics.median(one["seconds"] for one in results)
        ratio = statistics.median(a / one["seconds"] for a, one in zip(best, results, strict=True))
        name, cells = f"{side} threads", ["", ""]
        if side == "lading":
            name = f"lading, TP {tp_size}"
            cells = [
                f"{statistics.median(one[key] for one in results) / size:.3f}"
                for key in ("disk", "read")
            ]
        row = [name, f"{seconds:.2f}", f"{size / seconds / 1e9:.2f}", f"{ratio:.2f}", *cells]
        print(f"| {' | '.join(row)} |")
    resident = max(one["resident"] for results in found.values() for one in results)
    print(f"\nresident before a run: at most {resident:.1%}")


if __name__ == "__main__":
    main()
