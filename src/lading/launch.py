"""Starts the ranks of a command on this host, or joins those that torchrun started.

The command's process needs no torch: it plans, starts N processes, and collects one result of
each. The processes come from a server that has imported torch once (start method "forkserver";
"spawn" where a system has none), never from a fork of a process that may hold a GPU. They meet
through a file in a temporary folder. Whatever happens to one of them, all end within seconds: when
one has failed, the others get `GRACE_SECONDS` to tell their own story (the usual case: the same
error on all ranks), and are then killed. A rank whose parent is gone ends by itself.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_all_start_methods, get_context
from typing import TYPE_CHECKING, Any

from lading import ranks as ranks_module
from lading.errors import CallError, LadingError, RankError
from lading.ranks import Ranks, all_ranks

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess
    from types import FrameType

    from lading.exports.verb import ExportReport
    from lading.loading import LoadReport
    from lading.models import CausalLM

__all__ = [
    "RankLoad",
    "export_rank",
    "join_size",
    "load_rank",
    "run_ranks",
    "warm_up",
]

GRACE_SECONDS = 3.0
"""How long the other ranks may go on after one has failed: enough for the end of an exchange."""

PRELOADED = ("torch", "torch.distributed", "lading.pretrained")

Work = Callable[..., Any]


def join_size() -> int | None:
    """WORLD_SIZE where torchrun (or a launcher like it) started this process, else None."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    size = os.environ["WORLD_SIZE"]
    return int(size) if size.isdecimal() else None


def is_first() -> bool:
    """Whether this process prints: rank 0, or the only one."""
    return join_size() is None or os.environ["RANK"] == "0"


# ----------------------------------------------------------------------------------- the processes


def run_ranks(
    work: Work, tp_size: int, args: Sequence[Any] = (), *, device: str | None = "cpu"
) -> list[Any]:
    """`work(ranks, *args)` on every rank: its results, in rank order.

    work     a function of a module, as it is pickled by its name
    device   "cpu" or "cuda", None = see `device_of`: what the process group is for

    One rank runs in this process; under torchrun this process is one of the ranks, and every one of
    them gets all results. Raises what the ranks raised; a RankError that names the rank where a
    process died, or met an error that is not lading's.
    """
    if join_size() is not None:
        return _join(work, tp_size, args, device)
    if tp_size == 1:
        return [work(Ranks(), *args)]
    return _start(work, tp_size, args, device)


def warm_up(tp_size: int) -> None:
    """Lets the server of processes import torch while the caller goes on with something else."""
    if tp_size > 1 and join_size() is None and _start_method() == "forkserver":
        from multiprocessing import forkserver, resource_tracker

        get_context("forkserver").set_forkserver_preload(list(PRELOADED))
        resource_tracker.ensure_running()  # here, as its start unblocks SIGINT
        # The server inherits it: a Ctrl-C is not its business. Here it comes late, but it comes.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _held_back() -> Iterator[None]:
    """The first SIGINT or SIGTERM is handled after the block; another one at once."""
    main = threading.current_thread() is threading.main_thread()  # only there handlers run
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    handlers: dict[int, Any] = {n: h for n in numbers if callable(h := signal.getsignal(n))}
    held: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        if held:  # the server of processes may hang: the user is let go
            handlers[number](number, frame)
        held.append(number)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def _start_method() -> str:
    return "forkserver" if "forkserver" in get_all_start_methods() else "spawn"


def _join(work: Work, tp_size: int, args: Sequence[Any], device: str | None) -> list[Any]:
    if join_size() != tp_size:
        raise CallError(
            f"is {tp_size}, needs {join_size()} (WORLD_SIZE of the launcher)", subject="tp_size"
        )
    kind = device_of(Ranks(tp_rank=int(os.environ["RANK"]), tp_size=tp_size), device).split(":")[0]
    joined = ranks_module.join_world(device_type=kind)
    ranks = ranks_module.current()
    outcome: Any = None
    try:
        outcome = work(ranks, *args)
    except Exception as error:  # whatever it is: the other ranks wait for a word
        outcome = _failure(error, ranks)
    outcomes = ranks_module.exchange(outcome, ranks_module.group_of(ranks, None))
    if joined:
        ranks_module.leave_world()
    return _results(dict(enumerate(outcomes)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """A rank's error; `trace` where it is not lading's own."""

    error: LadingError
    trace: str | None = None


def _failure(error: BaseException, ranks: Ranks) -> _Failure:
    """Of the error that is being handled."""
    if isinstance(error, LadingError):
        return _Failure(error=error)
    found = RankError(f"{type(error).__name__}: {error}")
    found.rank = ranks.tp_rank
    return _Failure(error=found, trace=traceback.format_exc())


def _start(work: Work, tp_size: int, args: Sequence[Any], device: str | None) -> list[Any]:
    context: Any = get_context(_start_method())  # typeshed gives the two contexts no common type
    warm_up(tp_size)
    with tempfile.TemporaryDirectory(prefix="lading-") as folder:
        meeting = os.path.join(folder, "ranks")
        processes: list[BaseProcess] = []
        pipes: list[Connection] = []
        lifelines: list[Connection] = []
        try:
            for ranks in all_ranks(tp_size):
                receiving, sending = context.Pipe(duplex=False)
                theirs, ours = context.Pipe(duplex=False)
                pipes.append(receiving)
                lifelines.append(ours)
                process = context.Process(
                    target=_run_one,
                    args=(sending, theirs, work, ranks, tuple(args), meeting, device),
                    name=f"lading rank {ranks.tp_rank}",
                    daemon=True,
                )
                with _held_back():  # a process whose start is cut short is nobody's to end
                    process.start()
                    processes.append(process)
                sending.close()
                theirs.close()
            outcomes = _collect(processes, pipes)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for pipe in (*pipes, *lifelines):
                pipe.close()
    return _results(outcomes)


def _collect(processes: Sequence[BaseProcess], pipes: Sequence[Connection]) -> dict[int, Any]:
    """What each rank sent, or how it died; only those that failed in time once one has failed."""
    outcomes: dict[int, Any] = {}
    deadline: float | None = None
    while len(outcomes) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            break
        # A process that died closes its end of the pipe: no need to wait for the process itself.
        for pipe in connection.wait(list(waiting), timeout=left):
            rank = waiting[pipe]  # type: ignore[index]  # wait() returns what it was given
            outcomes[rank] = _received(pipes[rank], processes[rank])
            if isinstance(outcomes[rank], _Failure) and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
    return outcomes


def _received(pipe: Connection, process: BaseProcess) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join(GRACE_SECONDS)
        return _Failure(error=_died(process))


class _DiedError(RankError):
    """A rank's process ended without a word."""


def _died(process: BaseProcess) -> RankError:
    code, rank = process.exitcode, int(process.name.rpartition(" ")[2])
    if code is not None and code < 0:
        try:
            how = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was killed by signal {-code}"
        if -code == signal.SIGKILL:
            how += ", as the system does when memory runs out"
    else:
        how = f"ended with exit code {code} and no result"
    error = _DiedError(f"the process {how}; the other ranks were stopped")
    error.rank = rank
    return error


def _results(outcomes: dict[int, Any]) -> list[Any]:
    """The results; or the error nearest the cause: a death, then lading's own, then others."""
    failures = {rank: o for rank, o in outcomes.items() if isinstance(o, _Failure)}
    if not failures:
        return [outcomes[rank] for rank in sorted(outcomes)]

    def order(rank: int) -> tuple[int, int]:
        failure = failures[rank]
        if isinstance(failure.error, _DiedError):
            return 0, rank
        return (1 if failure.trace is None else 2), rank

    first = failures[min(failures, key=order)]
    if isinstance(first.error, _DiedError):
        error = RankError(first.error.fact)
        error.rank = first.error.rank
        raise error
    raise first.error from (RuntimeError(first.trace) if first.trace else None)


def _run_one(
    pipe: Connection,
    lifeline: Connection,
    work: Work,
    ranks: Ranks,
    args: tuple[Any, ...],
    meeting: str,
    device: str | None,
) -> None:
    """The life of one rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends all
    _end_with_parent(lifeline)
    try:
        _join_file(meeting, ranks, device)
        outcome = work(ranks, *args)
    except BaseException as error:
        outcome = _failure(error, ranks)
    pipe.send(outcome)
    pipe.close()
    if not isinstance(outcome, _Failure):
        ranks_module.leave_world()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(outcome, _Failure):
        os._exit(1)  # a process group that has failed may not let an orderly exit through


def _join_file(meeting: str, ranks: Ranks, device: str | None) -> None:
    import torch

    interface = _loopback()
    if interface is not None:  # all ranks are on this host: its name need not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    torch.set_num_threads(max(1, _num_cores() // ranks.tp_size))
    place = device_of(ranks, device)
    kind = place.split(":")[0]
    if kind == "cuda":
        torch.cuda.set_device(place)
    ranks_module.join_file(meeting, ranks=ranks, device_type=kind)


def device_of(ranks: Ranks, device: str | None) -> str:
    """Where a rank's parameters go: "cpu", "cuda:3".

    device   "cpu", "cuda", or None = GPUs where this host has one for each of its ranks, else CPU
    Raises a CallError where GPUs are asked for and there are too few.
    """
    import torch

    from lading.placing import default_device

    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.tp_size))
    num_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if num_gpus >= num_local:
        return str(default_device(ranks))
    if device == "cuda":
        raise CallError(
            f"this host has {num_gpus} GPUs, needs {num_local} (one for each of its ranks)",
            subject="--device cuda",
            hint="--device cpu",
        )
    return "cpu"


def _end_with_parent(lifeline: Connection) -> None:
    """Ends this process when the other end of `lifeline`, the parent's alone, is closed.

    By the kernel's SIGIO, as a thread needs the GIL, and torch holds it for minutes while it waits
    for a file in a folder that is gone. Nothing is ever written: only the end gives a signal.
    """
    if sys.platform == "linux":  # elsewhere SIGIO is ignored by default
        import fcntl

        signal.signal(signal.SIGIO, signal.SIG_DFL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
        _end_at_close(lifeline, 0)  # it may have been closed before
    threading.Thread(target=_end_at_close, args=(lifeline, None), daemon=True).start()


def _end_at_close(lifeline: Connection, timeout: float | None) -> None:
    if lifeline.poll(timeout):
        os._exit(1)


def _loopback() -> str | None:
    try:
        present = {name for _, name in socket.if_nameindex()}
    except OSError:
        return None
    return next((name for name in ("lo", "lo0") if name in present), None)


def _num_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -------------------------------------------------------------------------------------------- load


@dataclass(frozen=True, slots=True, kw_only=True)
class RankLoad:
    """What one rank's load did, without torch, as it travels between processes.

    checkpoint_bytes   of all tensors that the load used, each counted once
    read_bytes, excess_bytes   read from files; of it not kept
    """

    tp_rank: int
    device: str
    dtype: str
    checkpoint_bytes: int
    parameter_bytes: int
    read_bytes: int
    excess_bytes: int
    num_copies: int
    seconds: float
    casts: tuple[tuple[str, str, str], ...]
    skipped: tuple[tuple[str, str], ...]


def load_rank(
    ranks: Ranks, path: str, dtype: str | None, device: str | None, straddle: str = "duplicate"
) -> RankLoad:
    """The work of each rank of `lading load`."""
    return load_model(ranks, path, dtype, device, straddle=straddle)[1]


def load_model(
    ranks: Ranks,
    path: str,
    dtype: str | None,
    device: str | None,
    *,
    what: str = "loading",
    straddle: str = "duplicate",
) -> tuple[CausalLM, RankLoad]:
    """A rank's model and what its load did, with the progress bar of rank 0.

    dtype    of the parameters, "BF16"; None = as config.json says
    device   "cpu", "cuda", None: see `device_of`
    what     the word beside the progress bar
    straddle   "duplicate" or "refuse": scales whose group a cut goes through
    """
    from lading import dtypes, progress
    from lading.pretrained import load_pretrained

    model, report = load_pretrained(
        path,
        ranks=ranks,
        device=device_of(ranks, device),
        dtype=None if dtype is None else dtypes.to_torch(dtype),
        straddle=straddle,
        progress=progress.bar_of(ranks, what),
    )
    return model, _summary(report, model)


def _summary(report: LoadReport, model: CausalLM) -> RankLoad:
    from lading import dtypes

    largest = max(model.parameters(), key=lambda param: param.numel())
    return RankLoad(
        tp_rank=report.ranks.tp_rank,
        device=str(largest.device),
        dtype=dtypes.from_torch(largest.dtype),
        checkpoint_bytes=report.checkpoint_bytes,
        parameter_bytes=report.parameter_bytes,
        read_bytes=report.read_bytes,
        excess_bytes=report.excess_bytes,
        num_copies=report.num_copies,
        seconds=report.seconds,
        casts=report.casts,
        skipped=report.skipped,
    )


# -------------------------------------------------------------------------------------- dequantize


def dequantize_rank(
    ranks: Ranks,
    path: str,
    dtype: str | None,
    device: str | None,
    out: str,
    dense: bool,
    straddle: str = "duplicate",
) -> int:
    """The work of each rank of `lading dequantize`: the number of tensors in the file."""
    from lading.decoding import dequantize
    from lading.progress import bar_of

    return dequantize(
        path,
        out,
        ranks=ranks,
        device=device_of(ranks, device),
        dense=dense,
        straddle=straddle,
        progress=bar_of(ranks, "loading"),
    )


# ------------------------------------------------------------------------------------------ export


def export_rank(
    ranks: Ranks,
    path: str,
    dtype: str | None,
    device: str | None,
    out: str,
    overwrite: bool,
    straddle: str = "duplicate",
) -> ExportReport:
    """The work of each rank of `lading export`: loads, and writes its share of what it loaded."""
    from lading.exports.verb import export
    from lading.progress import bar_of

    model, _ = load_model(ranks, path, dtype, device, straddle=straddle)
    return export(model, out, ranks=ranks, overwrite=overwrite, progress=bar_of(ranks, "exporting"))
