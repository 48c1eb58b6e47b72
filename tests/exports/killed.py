"""Exports that are killed at random points: `python -m tests.exports.killed --times 10`.

A process loads the model of each rank once. Each round it forks the ranks of an export, which meet
in a process group, and kills one of them, or all, with SIGKILL at a random moment. After each round
the destination is absent (or the checkpoint that it was), or complete, byte for byte; then the same
export, unharmed, succeeds, and leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import lading
from lading import ranks as ranks_module
from lading.ranks import Ranks

from .made import files_of, models_of

FAILED = 3
DEADLINE_SECONDS = 60.0


def main() -> None:
    """Prints what happened; the exit status is 1 where a guarantee was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    models: Any = models_of(options.folder, options.tp)
    with tempfile.TemporaryDirectory(prefix="lading-killed-") as place:
        rounds = Rounds(options.folder, models, Path(place), random.Random(options.seed))
        for number in range(options.times):
            rounds.run(number)
        print(rounds.summary())
    sys.exit(1 if rounds.problems else 0)


class Rounds:
    """Kills, and what was found after each."""

    def __init__(self, folder: Path, models: Any, place: Path, chance: random.Random) -> None:
        self.folder, self.models, self.place, self.chance = folder, models, place, chance
        self.source = files_of(folder)
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}
        self.out = place / "out"
        begun = self.start(overwrite=False)
        if self.wait(begun) != [0] * len(models):
            sys.exit("the export fails without being killed")
        self.seconds = time.monotonic() - self.began
        self.complete = files_of(self.out)
        shutil.rmtree(self.out)

    def run(self, number: int) -> None:
        """One export that is killed, and one that is not."""
        replacing = number % 2 == 1
        before: dict[str, str] = {}
        if replacing:
            self.out.mkdir()
            (self.out / "model.safetensors").write_bytes(b"an old checkpoint")
            before = files_of(self.out)
        started = self.start(overwrite=replacing)
        time.sleep(self.chance.uniform(0, 1.1 * self.seconds))
        victims = started if self.chance.random() < 0.5 else [self.chance.choice(started)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        statuses = self.wait(started)
        found = files_of(self.out) if self.out.exists() else {}
        state = "complete" if found == self.complete else "as before"
        if found not in (before, self.complete):
            self.problems.append(f"round {number}: the destination has {sorted(found)}")
        if statuses == [0] * len(started) and state != "complete":
            self.problems.append(f"round {number}: all ranks said that they were done")
        self.counts[state] = self.counts.get(state, 0) + 1
        left = len(list(self.place.iterdir())) - self.out.exists()
        self.counts["with something left"] = self.counts.get("with something left", 0) + (left > 0)
        if self.wait(self.start(overwrite=True)) != [0] * len(self.models):
            self.problems.append(f"round {number}: the rerun failed")
        if files_of(self.out) != self.complete:
            self.problems.append(f"round {number}: the rerun is not complete")
        if [path.name for path in self.place.iterdir()] != ["out"]:
            names = sorted(path.name for path in self.place.iterdir())
            self.problems.append(f"round {number}: the rerun left {names}")
        if files_of(self.folder) != self.source:
            self.problems.append(f"round {number}: the source has changed")
        shutil.rmtree(self.out)

    def start(self, *, overwrite: bool) -> list[int]:
        """The processes of all ranks, when all are about to export."""
        meeting = tempfile.mktemp(prefix="lading-meeting-")
        receiving, sending = os.pipe()
        pids = []
        for ranks in self.models:
            pid = os.fork()
            if pid == 0:
                self.export(ranks, meeting, sending, overwrite)
            pids.append(pid)
        for _ in pids:
            os.read(receiving, 1)
        os.close(receiving)
        os.close(sending)
        self.began = time.monotonic()
        return pids

    def export(self, ranks: Ranks, meeting: str, sending: int, overwrite: bool) -> None:
        """The life of one rank."""
        status = FAILED
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # the dead ranks' peers complain
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            if ranks.tp_size > 1:
                ranks_module.join_file(meeting, ranks=ranks, device_type="cpu")
            os.write(sending, b".")
            lading.export(self.models[ranks], self.out, ranks=ranks, overwrite=overwrite)
            status = 0
        finally:
            os._exit(status)

    def wait(self, pids: list[int]) -> list[int]:
        """The exit statuses, all of them within the deadline."""
        statuses = []
        deadline = time.monotonic() + DEADLINE_SECONDS
        for pid in pids:
            while True:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                if time.monotonic() > deadline:
                    self.problems.append(f"process {pid} of {pids} did not end")
                    os.kill(pid, signal.SIGKILL)
                    _, status = os.waitpid(pid, 0)
                    break
                time.sleep(0.002)
            statuses.append(os.waitstatus_to_exitcode(status))
        return statuses

    def summary(self) -> str:
        """In words."""
        counts = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return "\n".join([f"after the kills: {counts}", *self.problems])


if __name__ == "__main__":
    main()
