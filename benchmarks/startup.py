"""How long it takes until lading is there: beside an interpreter that does nothing.

    python benchmarks/startup.py [--runs 15]

Each run is a process of its own; they alternate. Medians, in seconds of the wall.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import lading": ["-c", "import lading"],
    "lading --help": ["-m", "lading", "--help"],
    "lading bench --help": ["-m", "lading", "bench", "--help"],
    "import lading, import torch": ["-c", "import lading, torch"],
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(options.runs + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first compiles and warms
                seconds[name].append(time.perf_counter() - began)
    print(f"medians of {options.runs}\n\n| | seconds |\n| --- | --- |")
    for name, taken in seconds.items():
        print(f"| {name} | {statistics.median(taken):.3f} |")


if __name__ == "__main__":
    main()
