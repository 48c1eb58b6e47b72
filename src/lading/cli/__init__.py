"""The command `lading`: demo, load, plan, verify, dequantize, inspect; the way back in `cli_back`.

Results go to stdout, as text or with --json as one line of JSON; progress, notes and errors to
stderr, of rank 0 only. Exit status: 0 = done and right, 1 = a check failed (the checkpoint, the
plan or what was loaded is wrong), 2 = the command line is, 130 = interrupted.

JSON: every object has "ok" and "command"; where ok is false, "error" has the error's facts.

    plan      summary (tp_size, ranks, num_parameters, proof, digest, ...), plan (lading.plan_json)
    load      tp_size, dtype, checkpoint_bytes, seconds, gigabytes_per_second, ranks, casts, skipped
    verify    elements_compared, mismatches, first_mismatches, reader, logits, load;
              with --digest digests (regions_compared, mismatches)
    dequantize   tp_size, out, num_tensors
    inspect   folder, format, num_tensors, num_bytes, files, tensors, config, tp_sizes,
              pre_sharded (for how many ranks, null where it is not)
    demo      folder, plan (a summary), load, verify

Everything but typer is imported by the command that needs it, so that plan, inspect and --help
start without torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lading.cli import back as cli_back
from lading.cli import bench as cli_bench
from lading.cli.running import (
    STREAM_ERRORS,
    Device,
    Dir,
    Dtype,
    Json,
    Straddle,
    StraddleName,
    Tp,
    device_name,
    dtype_code,
    interrupted,
    is_first,
    lost,
    on_ranks,
    quiet,
    run_command,
    say_error,
    show,
    terminal_look,
    tp_of,
)
from lading.errors import LadingError, PlanError

if TYPE_CHECKING:
    from lading.checkpoint import Checkpoint
    from lading.models import ModelConfig
    from lading.verify import RankCheck

__all__ = ["app", "main"]

app = typer.Typer(
    name="lading",
    help="Loads model checkpoints into tensor-parallel PyTorch models, "
    "by a plan that is proved before a byte is read.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: lading demo",
)


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
        if error.errno not in STREAM_ERRORS or error.filename is not None:
            raise
        sys.exit(lost(error))
    except KeyboardInterrupt:
        sys.exit(interrupted())
    sys.exit(0)


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

        done = demo.run(quiet if as_json else show, terminal_look(), keep=keep)
        if not as_json:
            from lading.report import Line

            folder = keep if keep is not None else "DIR"
            show(
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

    run_command("demo", work, as_json)


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
    size = tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import launch, report

        results = on_ranks(
            launch.load_rank,
            path,
            size,
            dtype_code(dtype),
            device_name(device),
            straddle.value,
            as_json,
        )
        if not as_json:
            from lading.report import Line

            show((*report.load_report(results), Line(text=""), Line(text=report.speed(results))))
        return True, report.load_json(results)

    run_command("load", work, as_json)


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
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write the plan as JSON.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plans and proves a load from the files' headers alone: no weights, no GPU, no torch."""
    size = tp_of(tp)
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
        found = preflight.preflight(path, ranks, dtype=dtype_code(dtype), straddle=straddle.value)
        value = plan_to_json(found.plan) if as_json or out is not None else {}
        if out is not None and is_first():
            write_json(out, value)
        if not as_json:
            title = (
                f"{os.path.basename(found.checkpoint.folder)} ({found.config.family}) at TP {size}"
            )
            look = terminal_look()
            show(report.plan_report(found.plan, look=look, title=title, one_rank=rank is not None))
        return True, {"summary": report.plan_json(found.plan), "plan": value} if as_json else {}

    run_command("plan", work, as_json)


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
    digest: Annotated[
        bool,
        typer.Option("--digest", help="Compare the digest of each region that a rank holds, too."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Loads, compares every element with what safetensors reads, and logits with transformers."""
    size = tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import report
        from lading.verify import refuse_sharded, verify_rank

        refuse_sharded(path)
        checks: list[RankCheck] = on_ranks(
            verify_rank,
            path,
            size,
            dtype_code(dtype),
            device_name(device),
            straddle.value,
            as_json,
            logits,
            digest,
        )
        digests = [one.digests for one in checks if one.digests is not None]
        if not as_json:
            elements = [one.elements for one in checks]
            show(report.checks_report(elements, checks[0].logits))
            if digests:
                show(report.digest_checks_report(digests))
            show((report.Line(text=report.speed([one.load for one in checks])),))
        ok = checks[0].logits.ok
        errors = [error for one in checks if (error := one.elements.error()) is not None]
        errors += [mismatch.error() for one in digests for mismatch in one.mismatches]
        value = _checks_json(checks) | {"load": report.load_json([one.load for one in checks])}
        if digests:
            value["digests"] = report.digest_checks_json(digests)
        if errors:
            value["error"] = errors[0].to_dict()
            if not as_json:
                say_error(errors[0])
        return ok and not errors, value

    run_command("verify", work, as_json)


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
    size = tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import launch
        from lading.report import Line

        found = on_ranks(
            launch.dequantize_rank,
            path,
            size,
            None,
            device_name(device),
            straddle.value,
            as_json,
            out,
            dense,
        )
        if not as_json:
            show((Line(text=f"{found[0]} weights in {out}"),))
        return True, {"tp_size": size, "out": out, "num_tensors": found[0]}

    run_command("dequantize", work, as_json)


@app.command()
def inspect(path: Dir, as_json: Json = False) -> None:
    """Shows the files, tensors, dtypes and sizes, and what the config declares."""

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import report
        from lading.shards.folder import Sharded

        checkpoint, facts, sizes = _facts(path)
        served_by = checkpoint.served_by
        pre_sharded = served_by.plan.tp_size if isinstance(served_by, Sharded) else None
        if not as_json:
            if pre_sharded is not None:
                text = f"pre-sharded for {pre_sharded} ranks; it holds this checkpoint:"
                show((report.Line(text=text), report.Line(text="")))
            shown = [(key, str(value)) for key, value in facts.items() if value is not None]
            show(report.inspect_report(checkpoint, shown))
        value = report.inspect_json(checkpoint)
        value["config"] = facts
        value["tp_sizes"] = sizes
        value["pre_sharded"] = pre_sharded
        return True, value

    run_command("inspect", work, as_json)


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


def _checks_json(checks: Sequence[RankCheck]) -> dict[str, Any]:
    from lading import report

    return report.checks_json([one.elements for one in checks], checks[0].logits)


app.add_typer(cli_back.app)
app.add_typer(cli_bench.app)
