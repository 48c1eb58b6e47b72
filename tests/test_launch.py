"""Ranks as processes of this host: results, errors, deaths, Ctrl-C, and nothing left behind."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from lading import launch
from lading import ranks as ranks_module
from lading.errors import CallError, FileError, RankError
from lading.ranks import Ranks

SECONDS = 20
"""No failure of a rank may take longer: the start of the processes included."""


# Work: pickled by name, so it stands in a module.


def places(ranks: Ranks, *args: Any) -> Any:
    import torch

    every = ranks_module.exchange((ranks.tp_rank, args), ranks_module.group_of(ranks, None))
    return ranks.tp_rank, every, torch.get_num_threads(), os.getpid()


def rank_1_dies(ranks: Ranks, number: int) -> None:
    if ranks.tp_rank == 1:
        os.kill(os.getpid(), number)
    ranks_module.exchange(None, ranks_module.group_of(ranks, None))


def rank_1_exits(ranks: Ranks) -> None:
    if ranks.tp_rank == 1:
        os._exit(7)
    time.sleep(600)


def rank_1_raises(ranks: Ranks) -> None:
    if ranks.tp_rank == 1:
        raise ZeroDivisionError("of all things")
    time.sleep(600)


def all_raise(ranks: Ranks) -> None:
    raise FileError("is gone", subject="the file")


def rank_1_raises_early(ranks: Ranks) -> None:
    if ranks.tp_rank == 1:
        raise ZeroDivisionError("of all things")


def sleeps(ranks: Ranks, folder: str) -> None:
    Path(folder, f"rank-{os.getpid()}").touch()
    time.sleep(600)


def holds_the_gil(ranks: Ranks, folder: str) -> None:
    """As torch does while it waits for a file in a folder that is gone."""
    Path(folder, f"rank-{os.getpid()}").touch()
    ctypes.PyDLL(None).sleep(600)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; nothing may be left there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_one_rank_runs_here() -> None:
    ((rank, every, _, pid),) = launch.run_ranks(places, 1, ("x",))
    assert (rank, every, pid) == (0, [(0, ("x",))], os.getpid())


def test_results_come_in_rank_order(temporary: Path) -> None:
    results = launch.run_ranks(places, 3, ("x",))
    assert [one[0] for one in results] == [0, 1, 2]
    assert all(one[1] == [(rank, ("x",)) for rank in range(3)] for one in results)
    cores = len(os.sched_getaffinity(0))
    assert {one[2] for one in results} == {max(1, cores // 3)}
    assert not any(is_alive(one[3]) for one in results)
    assert not list(temporary.glob("lading*"))


def test_a_killed_rank_ends_all(temporary: Path) -> None:
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        launch.run_ranks(rank_1_dies, 2, (int(signal.SIGKILL),))
    assert time.monotonic() - began < SECONDS
    assert caught.value.rank == 1
    assert str(caught.value) == (
        "the process was killed by SIGKILL, as the system does when memory runs out; the other "
        "ranks were stopped. On rank 1."
    )
    assert not list(temporary.glob("lading*"))


def test_a_rank_that_exits_ends_all() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"ended with exit code 7 and no result.* On rank 1"):
        launch.run_ranks(rank_1_exits, 2)
    assert time.monotonic() - began < SECONDS


def test_a_rank_that_raises_ends_all() -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match=r"^ZeroDivisionError: of all things. On rank 1") as caught:
        launch.run_ranks(rank_1_raises, 2)
    assert time.monotonic() - began < SECONDS
    assert "rank_1_raises" in str(caught.value.__cause__)


def test_one_error_of_all_ranks() -> None:
    with pytest.raises(FileError, match=r"^the file: is gone\.$"):
        launch.run_ranks(all_raise, 2)


@pytest.mark.parametrize(
    ("number", "work"),
    [
        (signal.SIGINT, sleeps),
        (signal.SIGTERM, sleeps),
        (signal.SIGKILL, sleeps),
        (signal.SIGKILL, holds_the_gil),
    ],
)
def test_a_signal_to_the_command_ends_all_ranks(
    tmp_path: Path, number: signal.Signals, work: Any, request: pytest.FixtureRequest
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    code = (
        "import sys, test_launch; from lading import cli, launch\n"
        "cli.app.registered_commands.clear()\n"
        "@cli.app.command()\n"
        "def wait(folder: str) -> None:\n"
        f"    launch.run_ranks(test_launch.{work.__name__}, 2, (folder,))\n"
        "if __name__ == '__main__':\n"
        f"    sys.argv = ['lading', 'wait', {str(marks)!r}]\n"
        "    cli.main()\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # short: a socket goes there
    request.addfinalizer(lambda: shutil.rmtree(temporary, ignore_errors=True))
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(marks.iterdir())) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    pids = [int(mark.name.removeprefix("rank-")) for mark in marks.iterdir()]
    request.addfinalizer(lambda: kill_all(pids))
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=SECONDS)
    deadline = time.monotonic() + SECONDS
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert "Traceback" not in errors
        assert [entry for entry in temporary.iterdir() if entry.name.startswith("lading")] == []


class _Stop(Exception):
    """What the handlers of these tests raise."""


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal whose handler raises."""

    def stop(_number: int, _frame: object) -> None:
        raise _Stop

    before = signal.signal(request.param, stop)
    yield request.param
    assert signal.signal(request.param, before) is stop


def test_an_interrupted_start_leaves_no_process(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes while the server of processes is asked for the second rank's number."""
    pids: list[int] = []
    read: Callable[[int], int] = vars(forkserver)["read_signed"]

    def interrupted(fd: int) -> int:
        value = read(fd)
        if value > 0:  # a process's number, not its exit code
            pids.append(value)
            if len(pids) == 2:
                signal.raise_signal(number)
        return value

    monkeypatch.setattr(forkserver, "read_signed", interrupted)
    try:
        with pytest.raises(_Stop):
            launch.run_ranks(places, 2)
        assert len(pids) == 2
        assert not any(map(is_alive, pids))
    finally:
        kill_all(pids)


def test_an_interrupt_outlives_a_start_that_fails(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(process: BaseProcess) -> None:
        signal.raise_signal(number)
        raise OSError("no more processes")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", fails)
    with pytest.raises(_Stop) as caught:
        launch.run_ranks(places, 2)
    assert isinstance(caught.value.__context__, OSError)


def test_the_second_interrupt_of_a_start_is_not_held_back(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may hang."""
    steps = []

    def hangs(process: BaseProcess) -> None:
        for step in range(3):
            signal.raise_signal(number)
            steps.append(step)

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", hangs)
    with pytest.raises(_Stop):
        launch.run_ranks(places, 2)
    assert steps == [0]


def test_an_interrupt_while_the_server_starts_is_not_lost(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []

    def starts() -> None:
        os.kill(os.getpid(), number)
        done.append(number)

    monkeypatch.setattr(forkserver, "ensure_running", starts)
    with pytest.raises(_Stop):
        launch.warm_up(2)
    assert done == ([number] if number == signal.SIGINT else [])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_any_error_of_a_rank_of_torchrun_is_told_to_all(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, test_launch\n"
        "from lading import launch\n"
        "from lading.errors import RankError\n"
        "try:\n"
        "    launch.run_ranks(test_launch.rank_1_raises_early, 2)\n"
        "except RankError as error:\n"
        f"    open({str(tmp_path)!r} + '/rank-' + os.environ['RANK'], 'w').write(str(error))\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, str(script)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=60,
        check=True,
    )
    for rank in range(2):
        told = (tmp_path / f"rank-{rank}").read_text()
        assert told == "ZeroDivisionError: of all things. On rank 1."


def test_an_early_interrupt() -> None:
    """As a terminal does, while the server of processes imports torch."""
    with tempfile.TemporaryDirectory() as folder:  # short: sockets are made in it
        _interrupt_early(Path(folder))


def _interrupt_early(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lading", "demo", "--json"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any(entry.name.startswith("lading") for entry in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=SECONDS)
    # Wherever in the command's own start the signal lands, its status and its word are the same,
    # and the server of processes, which gets the signal too, says nothing.
    assert process.returncode == 130
    assert errors.endswith("interrupted\n")
    assert "forkserver" not in errors


def test_device_of_a_host_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    two = Ranks(tp_rank=0, tp_size=2)
    assert launch.device_of(two, None) == "cpu"
    assert launch.device_of(two, "cpu") == "cpu"
    with pytest.raises(CallError, match=r"^--device cuda: this host has 1 GPUs, needs 2"):
        launch.device_of(two, "cuda")


def test_join_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.join_size() is None
    assert launch.is_first()
    for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(key, "3")
    assert launch.join_size() == 3
    assert not launch.is_first()
    with pytest.raises(CallError, match=r"needs 3 .WORLD_SIZE"):
        launch.run_ranks(places, 2)
