"""The command `lading`: demo, load, plan, verify, dequantize, inspect.

Results go to stdout, as text or with --json as one line of JSON; progress, notes and errors to
stderr, of rank 0 only. Exit status: 0 = done and right, 1 = a check failed (the checkpoint, the
plan or what was loaded is wrong), 2 = the command line is, 130 = interrupted.

JSON: every object has "ok" and "command"; where ok is false, "error" has the error's facts.

    plan      summary (tp_size, ranks, num_parameters, proof, digest, ...), plan (lading.plan_json)
    load      tp_size, dtype, checkpoint_bytes, seconds, gigabytes_per_second, ranks, casts, skipped
    verify    elements_compared, mismatches, first_mismatches, reader, logits, load
    dequantize   tp_size, out, num_tensors
    inspect   folder, format, num_tensors, num_bytes, files, tensors, config, tp_sizes
    demo      folder, plan (a summary), load, verify

Everything but typer is imported by the command that needs it, so that plan, inspect and --help
start without torch.
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
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lading.errors import MAX_PRINTED_PROBLEMS, LadingError, PlanError

if TYPE_CHECKING:
    from lading.checkpoint import Checkpoint
    from lading.models import ModelConfig
    from lading.report import Block, Look
    from lading.verify import RankCheck

__all__ = ["app", "main"]

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


_STREAM_ERRORS = (errno.ENOSPC, errno.EIO, errno.EPIPE, errno.EFBIG, errno.EDQUOT, errno.EBADF)

_CODES = {DtypeName.BF16: "BF16", DtypeName.FP16: "F16", DtypeName.FP32: "F32"}

app = typer.Typer(
    name="lading",
    help="Loads model checkpoints into tensor-parallel PyTorch models, "
    "by a plan that is proved before a byte is read.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: lading demo",
)

Dir = Annotated[
    str,
    typer.Argument(metavar="DIR", help="A checkpoint folder, a weight file or an index."),
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
    typer.Option(help="Quantisation scales that a cut goes through: kept by both ranks, or not."),
]
Json = Annotated[bool, typer.Option("--json", help="One line of JSON instead of text.")]


def main() -> NoReturn:
    """The entry point: runs the command and exits."""
    # A stream that the shell has closed (`>&-`) is None, and its number is free for other files.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal in ASCII
    signal.signal(signal.SIGTERM, _terminated)  # so that ranks end and folders are removed
    try:
        try:
            app(prog_name="lading")
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.errno not in _STREAM_ERRORS or error.filename is not None:
            raise
        sys.exit(_lost(error))
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    sys.exit(0)


def _lost(error: OSError) -> int:
    """Says that stdout takes no more; the exit status. Nothing is written to it at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # whoever read it has gone (`| head`)
        return 128 + signal.SIGPIPE
    _mutter(f"error: stdout cannot be written: {error.strerror or error}\n")
    return 1


def _interrupted() -> int:
    if _is_first():
        _mutter("interrupted\n")
    return 128 + signal.SIGINT


def _mutter(text: str) -> None:
    """To stderr, if that takes it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _terminated(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="The version of lading.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from lading import __version__

        typer.echo(f"lading {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


# ---------------------------------------------------------------------------------------- commands


@app.command()
def demo(
    keep: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Keep the checkpoint here.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Makes a small checkpoint, loads it on 2 ranks, proves and verifies it, and shows it all."""

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import demo, report

        done = demo.run(_quiet if as_json else _show, _look(), keep=keep)
        if not as_json:
            from lading.report import Line

            folder = keep if keep is not None else "DIR"
            _show(
                (
                    Line(text=""),
                    Line(text="Yours:  lading inspect DIR  |  lading plan DIR --tp N  |  "),
                    Line(text="        lading load DIR --tp N  |  lading verify DIR --tp N"),
                )
                if keep is None
                else (Line(text=""), Line(text=f"Kept:   lading plan {folder} --tp 2 --rank 1"))
            )
        value = {
            "folder": keep,
            "plan": report.plan_json(done.preflight.plan),
            "load": report.load_json([one.load for one in done.checks]),
            "verify": _checks_json(done.checks),
        }
        return done.ok, value

    _run("demo", work, as_json)


@app.command()
def load(
    path: Dir,
    tp: Tp = None,
    dtype: Dtype = None,
    device: Device = None,
    straddle: Straddle = StraddleName.DUPLICATE,
    as_json: Json = False,
) -> None:
    """Loads a checkpoint on N processes of this host (under torchrun: on its processes)."""
    size = _tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import launch, report

        results = _on_ranks(
            launch.load_rank, path, size, _code(dtype), _name(device), straddle.value, as_json
        )
        if not as_json:
            from lading.report import Line

            _show((*report.load_report(results), Line(text=""), Line(text=report.speed(results))))
        return True, report.load_json(results)

    _run("load", work, as_json)


@app.command()
def plan(
    path: Dir,
    tp: Tp = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", min=0, help="Every region of this rank.", show_default=False),
    ] = None,
    dtype: Dtype = None,
    straddle: Straddle = StraddleName.DUPLICATE,
    out: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the plan as JSON.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plans and proves a load from the files' headers alone: nothing is read, no GPU, no torch."""
    size = _tp_of(tp)
    if rank is not None and rank >= size:
        allowed = f"0 to {size - 1}" if size > 1 else "0"
        problem = f"is {rank}, needs {allowed} (--tp is {size})"
        raise typer.BadParameter(problem, param_hint="--rank")

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import preflight, report
        from lading.checkpoint import write_json
        from lading.plan_json import plan_to_json
        from lading.ranks import Ranks, all_ranks

        ranks = all_ranks(size) if rank is None else (Ranks(tp_rank=rank, tp_size=size),)
        found = preflight.preflight(path, ranks, dtype=_code(dtype), straddle=straddle.value)
        value = plan_to_json(found.plan) if as_json or out is not None else {}
        if out is not None and _is_first():
            write_json(out, value)
        if not as_json:
            title = (
                f"{os.path.basename(found.checkpoint.folder)} ({found.config.family}) at TP {size}"
            )
            look = _look()
            _show(report.plan_report(found.plan, look=look, title=title, one_rank=rank is not None))
        return True, {"summary": report.plan_json(found.plan), "plan": value} if as_json else {}

    _run("plan", work, as_json)


@app.command()
def verify(
    path: Dir,
    tp: Tp = None,
    dtype: Dtype = None,
    device: Device = None,
    straddle: Straddle = StraddleName.DUPLICATE,
    logits: Annotated[
        bool | None,
        typer.Option(
            "--logits/--no-logits",
            help="Compare logits with transformers. Default: where it is installed and the "
            "checkpoint has at most 4 GB.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Loads, compares every element with what safetensors reads, and logits with transformers."""
    size = _tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import report
        from lading.verify import verify_rank

        checks: list[RankCheck] = _on_ranks(
            verify_rank, path, size, _code(dtype), _name(device), straddle.value, as_json, logits
        )
        if not as_json:
            elements = [one.elements for one in checks]
            _show(report.checks_report(elements, checks[0].logits))
            _show((report.Line(text=report.speed([one.load for one in checks])),))
        ok = checks[0].logits.ok
        errors = [error for one in checks if (error := one.elements.error()) is not None]
        value = _checks_json(checks) | {"load": report.load_json([one.load for one in checks])}
        if errors:
            value["error"] = errors[0].to_dict()
            if not as_json:
                _say_error(errors[0])
        return ok and not errors, value

    _run("verify", work, as_json)


@app.command()
def dequantize(
    path: Dir,
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FILE", help="The safetensors file to write.")
    ],
    tp: Tp = None,
    device: Device = None,
    straddle: Straddle = StraddleName.DUPLICATE,
    dense: Annotated[
        bool, typer.Option("--all", help="Also the weights of layers that are not quantised.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Loads a quantised checkpoint on N processes and writes its weights decoded, in float32."""
    size = _tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import launch
        from lading.report import Line

        found = _on_ranks(
            launch.dequantize_rank,
            path,
            size,
            None,
            _name(device),
            straddle.value,
            as_json,
            out,
            dense,
        )
        if not as_json:
            _show((Line(text=f"{found[0]} weights in {out}"),))
        return True, {"tp_size": size, "out": out, "num_tensors": found[0]}

    _run("dequantize", work, as_json)


@app.command()
def inspect(path: Dir, as_json: Json = False) -> None:
    """Shows the files, tensors, dtypes and sizes, and what the config declares."""

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import report

        checkpoint, facts, sizes = _facts(path)
        if not as_json:
            shown = [(key, str(value)) for key, value in facts.items() if value is not None]
            _show(report.inspect_report(checkpoint, shown))
        value = report.inspect_json(checkpoint)
        value["config"] = facts
        value["tp_sizes"] = sizes
        return True, value

    _run("inspect", work, as_json)


def _facts(path: str) -> tuple[Checkpoint, dict[str, Any], list[int] | None]:
    """The headers; what config.json declares, or why lading cannot say; TP sizes where it can."""
    from lading import preflight
    from lading.schemes import describe

    try:
        found = preflight.read(path)
    except LadingError as error:
        return _facts_without(path, error)
    facts = _config_facts(found.config)
    sizes: list[int] | None = None
    try:
        schemes = describe(found.quant_config, found.declaration.layers)
        if found.quant_config is not None:
            counts = [f"{name} ({count} layers)" for name, count in schemes.items()]
            facts["quantised"] = "; ".join(counts)
        sizes = list(preflight.tp_sizes_of(found))
    except LadingError as error:
        facts["problem"] = str(error)
    else:
        facts["TP sizes"] = ", ".join(map(str, sizes)) or "none up to 64"
    return found.checkpoint, facts, sizes


def _facts_without(
    path: str, error: LadingError
) -> tuple[Checkpoint, dict[str, Any], list[int] | None]:
    """The same where `error` is why lading cannot load it; raises it where the files are why."""
    from lading import models
    from lading.checkpoint import open_checkpoint

    problems = error.problems if isinstance(error, PlanError) else (error,)
    is_damaged = all(problem.subject == "config.json" for problem in problems)
    try:
        checkpoint = open_checkpoint(path)
    except PlanError:
        if not is_damaged:
            raise
        return open_checkpoint(path, with_config=False), {"problem": str(error)}, None
    if checkpoint.config is None:
        missing = "there is no config.json: plan, load and verify need one"
        return checkpoint, {"missing": missing}, None
    facts: dict[str, Any] = {}
    with contextlib.suppress(LadingError):
        facts = _config_facts(models.parse_config(checkpoint.config))
    return checkpoint, {**facts, "problem": str(error)}, None


def _config_facts(config: ModelConfig) -> dict[str, Any]:
    from lading import dtypes

    return {
        "family": config.family,
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "heads": f"{config.num_heads} of {config.head_dim}, {config.num_kv_heads} KV heads",
        "intermediate size": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position,
        "tied embeddings": "yes" if config.tie_word_embeddings else "no",
        "dtype": None if config.dtype is None else dtypes.printed(config.dtype),
        "quantization": (config.quantization or {}).get("quant_method"),
    }


# ----------------------------------------------------------------------------------------- running


def _tp_of(tp: int | None) -> int:
    """--tp, which under torchrun may be left out and may not contradict."""
    from lading.launch import join_size

    size = join_size()
    if size is not None and tp not in (None, size):
        problem = f"is {tp}, needs {size} (WORLD_SIZE of the launcher)"
        raise typer.BadParameter(problem, param_hint="--tp")
    return size or tp or 1


def _on_ranks(
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
            _show((*report.proof_block(plan), report.Line(text="")))
    return launch.run_ranks(work, tp_size, (path, dtype, device, *more, straddle), device=device)


def _code(dtype: DtypeName | None) -> str | None:
    return None if dtype is None else _CODES[dtype]


def _name(device: DeviceName | None) -> str | None:
    return None if device is None else device.value


def _checks_json(checks: Sequence[RankCheck]) -> dict[str, Any]:
    from lading import report

    return report.checks_json([one.elements for one in checks], checks[0].logits)


def _run(command: str, work: Callable[[], tuple[bool, dict[str, Any]]], as_json: bool) -> None:
    """Runs a command's work and ends the process as its outcome asks for."""
    try:
        ok, value = work()
    except LadingError as error:
        if as_json:
            _give({"ok": False, "command": command, "error": error.to_dict()})
        else:
            _say_error(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(_interrupted()) from None
    if as_json:
        _give({"ok": ok, "command": command, **value})
    if not ok:
        raise typer.Exit(1)


def _is_first() -> bool:
    from lading.launch import is_first

    return is_first()


def _look() -> Look:
    from lading.report import look_of

    return look_of(sys.stdout, os.environ)


def _show(blocks: Sequence[Block]) -> None:
    from lading.report import render

    _write(render(blocks, _look()))


def _quiet(_blocks: Sequence[Block]) -> None:
    return None


def _give(value: dict[str, Any]) -> None:
    _write(json.dumps(value) + "\n")


def _write(text: str) -> None:
    if not _is_first():
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise typer.Exit(_lost(error)) from None


def _say_error(error: LadingError) -> None:
    """The message on stderr; equal problems of equal layers as one line."""
    if not _is_first():
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
