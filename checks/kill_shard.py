"""Kills shard, reshard and merge at random moments, and fills their disk: all or nothing?

    python checks/kill_shard.py --times 200
    python checks/kill_shard.py --times 0 --full      (as root: mounts a small tmpfs)

Each time one of the three verbs runs in a process of its own and gets SIGKILL at a random moment of
its run. After that the destination has to be absent or whole, the source what it was, and a rerun
has to succeed and leave nothing but its result. Exits 1 where that is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from lading.demo import write_checkpoint
from lading.errors import FileError
from lading.sharding.verbs import shard

CODE = """
import sys
from lading.sharding.verbs import merge, reshard_files, shard
verb, source, out = sys.argv[1:]
sys.stdout.write("ready\\n")
sys.stdout.flush()
sys.stdin.readline()
if verb == "shard":
    shard(source, tp_size=4, out=out)
elif verb == "reshard":
    reshard_files(source, tp_size=8, out=out)
else:
    merge(source, out=out)
"""


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def start(verb: str, source: Path, out: Path) -> subprocess.Popen[str]:
    """The verb in a process that waits for a line before it begins."""
    command = [sys.executable, "-c", CODE, verb, str(source), str(out)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None, "it was asked for"
    process.stdout.readline()
    return process


def run(process: subprocess.Popen[str], seconds: float | None) -> float:
    """Lets it begin, kills it after so long, if at all; how long it ran."""
    assert process.stdin is not None, "it was asked for"
    began = time.perf_counter()
    process.stdin.write("go\n")
    process.stdin.flush()
    if seconds is not None:
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    process.wait()
    took = time.perf_counter() - began
    process.stdin.close()
    if process.stdout is not None:
        process.stdout.close()
    return took


def kills(base: Path, times: int, random_state: random.Random) -> int:
    """How many of the kills left something that is not right."""
    original = base / "original"
    original.mkdir()
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8}
    write_checkpoint(str(original), **sizes, num_key_value_heads=8, head_dim=64, vocab_size=32000)
    sharded = base / "sharded"
    shard(original, tp_size=2, out=sharded)
    sources = {"shard": original, "reshard": sharded, "merge": sharded}
    needed, before, seconds = {}, {}, {}
    for verb, source in sources.items():
        out = base / f"whole-{verb}"
        seconds[verb] = run(start(verb, source, out), None)
        needed[verb], before[verb] = hashes(out), hashes(source)
        shutil.rmtree(out)
    if needed["merge"] != before["shard"]:
        print("merge does not give the original back")
        return 1
    outcomes: Counter[str] = Counter()
    wrong = 0
    for at in range(times):
        verb = ("shard", "reshard", "merge")[at % 3]
        place = base / f"place-{verb}"
        place.mkdir(exist_ok=True)
        out = place / "out"
        run(start(verb, sources[verb], out), random_state.uniform(0, 1.1 * seconds[verb]))
        found = [path.name for path in place.iterdir()]
        state = "whole" if out.exists() else "begun" if found else "not begun"
        problems = []
        if out.exists() and hashes(out) != needed[verb]:
            problems.append("the destination is a mix")
        if hashes(sources[verb]) != before[verb]:
            problems.append("the source has changed")
        if not out.exists():
            run(start(verb, sources[verb], out), None)
            if not out.exists() or hashes(out) != needed[verb]:
                problems.append("the rerun failed")
            if [path.name for path in place.iterdir()] != ["out"]:
                problems.append("the rerun left something behind")
        outcomes[f"{verb}: {state}"] += 1
        for problem in problems:
            print(f"kill {at} of {verb}: {problem}")
        wrong += bool(problems)
        shutil.rmtree(place)
    for name in sorted(outcomes):
        print(f"{name:20} {outcomes[name]}")
    return wrong


def take(disk: Path, num_bytes: int) -> None:
    """Takes space away as soon as somebody else has begun to write."""
    while num_bytes and not any(disk.glob(".out.*.lading")):
        time.sleep(0.0005)
    if num_bytes:
        with contextlib.suppress(OSError), open(disk / "taken", "wb") as file:
            file.write(bytes(num_bytes))


def full_disk(base: Path) -> int:
    """The same on tmpfs of sizes up to what is needed; how many times something was not right."""
    original = base / "full-original"
    original.mkdir()
    write_checkpoint(str(original), hidden_size=256, vocab_size=20000)
    before = hashes(original)
    size = sum(path.stat().st_size for path in original.iterdir())
    disk = base / "disk"
    disk.mkdir()
    wrong = 0
    for share, taken in ((0.05, 0.0), (0.9, 0.0), (1.5, 0.0), (1.5, 0.6), (1.2, 0.9)):
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", str(disk)],
            check=True,
        )
        try:
            taker = threading.Thread(target=take, args=(disk, int(taken * size)))
            taker.start()
            try:
                shard(original, tp_size=2, out=disk / "out")
                message = "written"
            except FileError as error:
                message = str(error)
            taker.join()
            left = sorted(set(os.listdir(disk)) - {"taken"})
            is_right = left == (["out"] if message == "written" else [])
            is_right = is_right and hashes(original) == before
            wrong += not is_right
            found = message if is_right else f"{message} WRONG: left {left}"
            print(f"disk of {share:.0%}, {taken:.0%} taken on the way: {found}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return wrong


def main() -> int:
    """0 where nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="fill a tmpfs; needs root")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lading-kill-") as folder:
        wrong = 0
        if options.times:
            wrong += kills(Path(folder), options.times, random.Random(options.seed))
        if options.full:
            wrong += full_disk(Path(folder))
    print("wrong:", wrong)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
