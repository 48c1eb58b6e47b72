"""Export of a live model beside `cp -r` of the same files, in turns, warm.

    python benchmarks/export.py [--gigabytes 4] [--times 5] [--folder PATH] [--sync]

One rank in one process, its parameters on the CPU. Prints the best and the median wall time of
each, the ratio of the bests, and the memory that the process has taken besides the model. Without
--sync nothing waits for the disk, as `cp` does not. The files are compared with the source's.
"""

from __future__ import annotations

import argparse
import filecmp
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from load import make_checkpoint

import lading


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--sync", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as base:
        source, out, copy = Path(base, "source"), Path(base, "out"), Path(base, "copy")
        source.mkdir()
        make_checkpoint(source, args.gigabytes, "dense")
        model = lading.from_pretrained(source, device="cpu")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        took: dict[str, list[float]] = {"cp": [], "export": []}
        for _ in range(args.times + 1):  # the first warms up
            for name, folder in (("cp", copy), ("export", out)):
                shutil.rmtree(folder, ignore_errors=True)
                began = time.perf_counter()
                if name == "cp":
                    subprocess.run(["cp", "-r", source, copy], check=True)
                else:
                    lading.export(model, out, sync=args.sync)
                took[name].append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        files = [path.name for path in source.iterdir()]
        equal = filecmp.cmpfiles(source, out, files, shallow=False)[0]
        best = {name: min(seconds[1:]) for name, seconds in took.items()}
        for name, seconds in took.items():
            print(
                f"{name:7} best {best[name]:.2f} s, median {statistics.median(seconds[1:]):.2f} s"
            )
        print(f"export is {best['cp'] / best['export']:.2f} of cp")
        print(f"memory beside the model: {(after - before) / 1e6:.3f} GB")
        print(f"equal files: {len(equal)} of {len(files)}")


if __name__ == "__main__":
    main()
