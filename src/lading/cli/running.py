"""What every command of the command line shares: its options, how its work is run, what is said.

The commands themselves are in `cli` and `cli_back`; each gives `run_command` its work, which
returns whether the check was passed, and the facts for --json. Results go to stdout, errors to
stderr, of rank 0 only. Nothing but typer is imported before a command needs it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lading.errors import MAX_PRINTED_PROBLEMS, LadingError, PlanError

if TYPE_CHECKING:
    from lading.report import Block, Look

__all__ = [
    "STREAM_ERRORS",
    "Device",
    "DeviceName",
    "Dir",
    "Dtype",
    "DtypeName",
    "Json",
    "Straddle",
    "StraddleName",
    "Tp",
    "device_name",
    "dtype_code",
    "give",
    "interrupted",
    "is_first",
    "lost",
    "mutter",
    "on_ranks",
    "quiet",
    "run_command",
    "say_error",
    "show",
    "terminal_look",
    "tp_of",
]

MAX_TP = 1024


class DtypeName(str, Enum):
    """The dtypes that a model may be loaded in."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class DeviceName(str, Enum):
    """Where parameters may go."""

    CPU = "cpu"
    CUDA = "cuda"


class StraddleName(str, Enum):
    """What becomes of scales whose group a cut goes through."""

    DUPLICATE = "duplicate"
    REFUSE = "refuse"


STREAM_ERRORS = (errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EFBIG, errno.EDQUOT, errno.EBADF)

_CODES = {DtypeName.BF16: "BF16", DtypeName.FP16: "F16", DtypeName.FP32: "F32"}

Dir = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="A checkpoint folder, a weight file, an index, or a folder of `lading shard`.",
    ),
]
Tp = Annotated[
    int | None,
    typer.Option(
        "--tp",
        metavar="N",
        min=1,
        max=MAX_TP,
        help="Tensor-parallel ranks. Default: 1; under torchrun, its number of processes.",
        show_default=False,
    ),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(help="Of the parameters. Default: as config.json says.", show_default=False),
]
Device = Annotated[
    DeviceName | None,
    typer.Option(
        help="Default: cuda where there is a GPU for each rank, else cpu.", show_default=False
    ),
]
Straddle = Annotated[
    StraddleName,
    typer.Option(
        help="Quantisation scales that a cut goes through: kept by both ranks, or refused."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")]


def tp_of(tp: int | None) -> int:
    """--tp, which under torchrun may be left out and may not contradict."""
    from lading.launch import join_size

    size = join_size()
    if size is not None and tp not in (None, size):
        problem = f"is {tp}, needs {size} (WORLD_SIZE of the launcher)"
        raise typer.BadParameter(problem, param_hint="--tp")
    return size or tp or 1


def on_ranks(
    work: Callable[..., Any],
    path: str,
    tp_size: int,
    dtype: str | None,
    device: str | None,
    straddle: str,
    as_json: bool,
    *more: Any,
) -> list[Any]:
    """Runs a rank's work on every rank; what can be known to fail without them fails before."""
    from lading import launch, preflight, report
    from lading.gguf import gguf_file
    from lading.ranks import all_ranks

    if launch.join_size() is None:
        launch.warm_up(tp_size)
    if launch.join_size() is None and gguf_file(path) is None:
        plan = preflight.preflight(path, all_ranks(tp_size), dtype=dtype, straddle=straddle).plan
        if not as_json:
            show((*report.proof_block(plan), report.Line(text="")))
    return launch.run_ranks(work, tp_size, (path, dtype, device, *more, straddle), device=device)


def dtype_code(dtype: DtypeName | None) -> str | None:
    """bf16 -> "BF16"."""
    return None if dtype is None else _CODES[dtype]


def device_name(device: DeviceName | None) -> str | None:
    """What torch calls the device."""
    return None if device is None else device.value


def run_command(
    command: str, work: Callable[[], tuple[bool, dict[str, Any]]], as_json: bool
) -> None:
    """Runs a command's work and ends the process as its outcome asks for."""
    try:
        ok, value = work()
    except LadingError as error:
        if as_json:
            give({"ok": False, "command": command, "error": error.to_dict()})
        else:
            say_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(interrupted()) from None
    if as_json:
        give({"ok": ok, "command": command, **value})
    if not ok:
        raise typer.Exit(1)


def is_first() -> bool:
    """Whether this process is rank 0, which speaks for all."""
    from lading import launch

    return launch.is_first()


def terminal_look() -> Look:
    """How stdout takes text."""
    from lading.report import look_of

    return look_of(sys.stdout, os.environ)


def show(blocks: Sequence[Block]) -> None:
    """Prints a report."""
    from lading.report import render

    _write(render(blocks, terminal_look()))


def quiet(_blocks: Sequence[Block]) -> None:
    """`show` under --json."""
    return None


def give(value: dict[str, Any]) -> None:
    """Prints one line of JSON."""
    _write(json.dumps(value) + "\n")


def _write(text: str) -> None:
    if not is_first():
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise typer.Exit(lost(error)) from None


def say_error(error: LadingError) -> None:
    """The message on stderr; equal problems of equal layers as one line."""
    if not is_first():
        return
    from lading.report import Line, look_of, render

    if error.__cause__ is not None and type(error.__cause__) is RuntimeError:
        sys.stderr.write(f"{error.__cause__}\n")  # where another rank was, as it told
    lines = [Line(text=text) for text in _lines(error)]
    first = Line(text=f"error: {lines[0].text}", style="red")
    sys.stderr.write(render((first, *lines[1:]), look_of(sys.stderr, os.environ)))


def _lines(error: LadingError) -> list[str]:
    from lading.report import fold

    if not isinstance(error, PlanError) or len(error.problems) == 1:
        return str(error).splitlines()
    rows = []
    for problem in error.problems:
        text = str(problem)
        subject = problem.subject or ""
        rows.append((subject, text.removeprefix(subject)))
    folded = fold(rows)
    shown = [
        f"  {subject}{text}{f' ({count} layers)' if count > 1 else ''}"
        for (subject, text), count in folded[:MAX_PRINTED_PROBLEMS]
    ]
    left = len(folded) - MAX_PRINTED_PROBLEMS
    if left > 0:
        shown.append(f"  ... and {left} more (--json has all)")
    if error.hint is not None:
        shown.append(f"  Try: {error.hint}.")
    return [f"{error.fact}:", *shown]


def lost(error: OSError) -> int:
    """Says that stdout takes no more; the exit status. Nothing is written to it at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # whoever read it has gone (`| head`)
        return 128 + signal.SIGPIPE
    mutter(f"error: stdout cannot be written: {error.strerror or error}\n")
    return 1


def interrupted() -> int:
    """Says so; the exit status."""
    if is_first():
        mutter("interrupted\n")
    return 128 + signal.SIGINT


def mutter(text: str) -> None:
    """To stderr, if that takes it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
