"""shard, reshard and merge beside `cp -r` of the same files, in turns, warm.

    python benchmarks/shard.py --gigabytes 2 --times 5 [--folder /dev/shm/x] [--sync]

Prints the best and the median wall time of each, CPU seconds (a busy machine shows less in these),
the ratio of `cp`'s best to each verb's best, and the largest resident set. Without --sync nothing
waits for the disk, as `cp` does not.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lading.demo import write_checkpoint
from lading.sharding.verbs import merge, reshard_files, shard


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in found)


def peak_bytes() -> int:
    """The largest resident set since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def forget_peak() -> None:
    """From now on the peak is counted anew: making the checkpoint took memory of its own."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--sync", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lading-shard-", dir=options.folder) as folder:
        base = Path(folder)
        run(base, options.gigabytes, options.times, sync=options.sync)
    return 0


def run(base: Path, gigabytes: float, times: int, *, sync: bool) -> None:
    """Makes a checkpoint and times each verb on it."""
    source = base / "source"
    source.mkdir()
    layers = max(1, round((gigabytes - 0.5) / 0.36))
    _, size = write_checkpoint(
        str(source),
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=32000,
    )
    forget_peak()
    copied, four, two, merged = (base / name for name in ("cp", "tp4", "tp2", "merged"))

    def copy(folder: Path) -> Callable[[], object]:
        return lambda: subprocess.run(["cp", "-r", str(folder), str(copied)], check=True)

    works: dict[str, tuple[Callable[[], object], Path]] = {
        "cp": (copy(source), copied),
        "shard": (lambda: shard(source, tp_size=4, out=four, sync=sync), four),
        "cp of TP 4": (copy(four), copied),
        "reshard": (lambda: reshard_files(four, tp_size=2, out=two, sync=sync), two),
        "merge": (lambda: merge(four, out=merged, sync=sync), merged),
        "reshard, no digests": (
            lambda: reshard_files(four, tp_size=2, out=two, sync=sync, verify=False),
            two,
        ),
        "merge, no digests": (lambda: merge(four, out=merged, sync=sync, verify=False), merged),
    }
    walls: dict[str, list[float]] = {name: [] for name in works}
    cpus: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times):
        for name, (work, out) in works.items():
            shutil.rmtree(out, ignore_errors=True)
            began, used = time.perf_counter(), cpu_seconds()
            work()
            walls[name].append(time.perf_counter() - began)
            cpus[name].append(cpu_seconds() - used)
            if out is copied:
                shutil.rmtree(out)
    print(f"{size / 1e9:.3g} GB, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(f"{'':20} {'best s':>8} {'median':>8} {'CPU s':>8} {'of cp':>8}")
    best = min(walls["cp"])
    for name in works:
        wall, cpu = sorted(walls[name]), min(cpus[name])
        median = wall[len(wall) // 2]
        print(f"{name:20} {wall[0]:8.2f} {median:8.2f} {cpu:8.2f} {best / wall[0]:8.2f}")
    print(f"peak {peak_bytes() / 1e6:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
