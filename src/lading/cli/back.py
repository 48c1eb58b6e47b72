"""The commands about the way back: explain, export, shard, reshard, merge, digest.

Each stands in a section of its own. JSON, beside "ok" and "command":

    explain   name, kind, tp_size, dtype, shape, index, tensor, notes, entries, boxes, padding
    export    path, tp_size, files, bytes, tensors, copied, casts, padding, notes, seconds, ranks
    digest    kind, total, tensors, replicas, left_out, recorded, ranks, num_bytes, seconds;
              with --against differences, against (its total)
    shard, reshard, merge   path, tp_size (of merge: null), files, bytes, seconds, notes
"""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lading.cli.running import (
    Device,
    Dir,
    Dtype,
    Json,
    Straddle,
    StraddleName,
    Tp,
    device_name,
    dtype_code,
    on_ranks,
    run_command,
    show,
    tp_of,
)

if TYPE_CHECKING:
    from lading.progress import Bar
    from lading.sharding.verbs import ShardReport

__all__ = ["app"]

app = typer.Typer()

# ----------------------------------------------------------------------------------------- explain


class KindName(str, Enum):
    """What a name is that both a parameter and a checkpoint tensor have."""

    PARAMETER = "parameter"
    TENSOR = "tensor"


@app.command()
def explain(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A parameter, a checkpoint tensor, or with --byte a file of the checkpoint.",
        ),
    ],
    path: Dir,
    tp: Tp = None,
    index: Annotated[
        str | None,
        typer.Option(metavar="I,J", help="One element. Default: all regions.", show_default=False),
    ] = None,
    byte: Annotated[
        int | None,
        typer.Option(
            metavar="B", min=0, help="What holds this byte of the file.", show_default=False
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(metavar="R", min=0, help="Only this rank. Default: all.", show_default=False),
    ] = None,
    kind: Annotated[
        KindName | None,
        typer.Option(
            "--as",
            help="What NAME means where both have it. Default: parameter with --rank, else tensor.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = None,
    straddle: Straddle = StraddleName.DUPLICATE,
    as_json: Json = False,
) -> None:
    """Shows where elements are: in parameters, checkpoint tensors and files; from headers alone."""
    size = tp_of(tp)
    place = _index_of(index)
    if byte is not None and (place is not None or kind is not None):
        raise typer.BadParameter(
            "says which element, needs no --index or --as", param_hint="--byte"
        )

    if not os.path.lexists(path) and os.path.lexists(name):
        raise typer.BadParameter("comes before DIR", param_hint="NAME")

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import explaining, explaining_bytes, preflight, report
        from lading.ranks import all_ranks

        before = preflight.preflight(
            path, all_ranks(size), dtype=dtype_code(dtype), straddle=straddle.value
        )
        if byte is not None:
            asked = before.plan, before.checkpoint, name, byte
            found = explaining_bytes.explain_byte(*asked, rank=rank)
        else:
            found = explaining.explain(
                before.plan,
                before.checkpoint,
                name,
                index=place,
                rank=rank,
                kind=None if kind is None else kind.value,
            )
        if not as_json:
            show(report.explain_report(found))
        return True, report.explain_json(found) if as_json else {}

    run_command("explain", work, as_json)


def _index_of(text: str | None) -> tuple[int, ...] | None:
    """'5,3' or '[5, 3]' as numbers; '' or '[]' is the index of a number."""
    if text is None:
        return None
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    try:
        return tuple(int(part) for part in inner.split(",")) if inner else ()
    except ValueError:
        problem = f"is {text!r}, needs whole numbers with commas between them"
        raise typer.BadParameter(problem, param_hint="--index") from None


# ------------------------------------------------------------------------------------------ export


@app.command()
def export(
    path: Dir,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="The folder to write.")],
    tp: Tp = None,
    dtype: Dtype = None,
    device: Device = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace FOLDER and all in it, where it holds a checkpoint."
        ),
    ] = False,
    straddle: Straddle = StraddleName.DUPLICATE,
    as_json: Json = False,
) -> None:
    """Loads on N processes and writes the checkpoint again: the same files, byte for byte."""
    size = tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import launch, report
        from lading.checkpoint import check_output_folder

        check_output_folder(out, overwrite=overwrite, inputs=[path])
        results = on_ranks(
            launch.export_rank,
            path,
            size,
            dtype_code(dtype),
            device_name(device),
            straddle.value,
            as_json,
            out,
            overwrite,
        )
        if not as_json:
            show(report.export_report(results))
        return True, report.export_json(results) if as_json else {}

    run_command("export", work, as_json)


# --------------------------------------------------------------------------- shard, reshard, merge

Out = Annotated[str, typer.Option("--out", "-o", metavar="FOLDER", help="The folder to write.")]
NewTp = Annotated[int, typer.Option("--tp", metavar="N", min=1, max=1024, help="Number of ranks.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace FOLDER and all in it, where it holds a checkpoint."),
]
Verify = Annotated[
    bool, typer.Option(help="Compare each tensor's digest with the one that `lading shard` took.")
]
Sharded = Annotated[str, typer.Argument(metavar="DIR", help="A folder that `lading shard` wrote.")]


@app.command()
def shard(
    path: Dir,
    tp: NewTp,
    out: Out,
    straddle: Straddle = StraddleName.DUPLICATE,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Cuts a checkpoint into one file a rank, which a rank loads by one sequential read."""

    def write(bar: Bar | None) -> ShardReport:
        from lading.sharding import verbs as sharding

        return sharding.shard(
            path, tp_size=tp, out=out, straddle=straddle.value, overwrite=overwrite, progress=bar
        )

    _run_alone("shard", "sharding", write, as_json)


@app.command()
def reshard(
    path: Sharded,
    tp: NewTp,
    out: Out,
    overwrite: Overwrite = False,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Turns a folder of `lading shard` into one of another number of ranks, file to file."""

    def write(bar: Bar | None) -> ShardReport:
        from lading.sharding import verbs as sharding

        return sharding.reshard_files(
            path, tp_size=tp, out=out, overwrite=overwrite, verify=verify, progress=bar
        )

    _run_alone("reshard", "resharding", write, as_json)


@app.command()
def merge(
    path: Sharded,
    out: Out,
    overwrite: Overwrite = False,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Puts a folder of `lading shard` together again: the original files, byte for byte."""

    def write(bar: Bar | None) -> ShardReport:
        from lading.sharding import verbs as sharding

        return sharding.merge(path, out=out, overwrite=overwrite, verify=verify, progress=bar)

    _run_alone("merge", "merging", write, as_json)


def _run_alone(
    verb: str, doing: str, write: Callable[[Bar | None], ShardReport], as_json: bool
) -> None:
    """Runs a verb that writes a folder from files, in one process, and says what it wrote."""
    _check_alone()

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import progress
        from lading.ranks import Ranks

        return True, _written(write(progress.bar_of(Ranks(), doing)), as_json)

    run_command(verb, work, as_json)


def _check_alone() -> None:
    """Every process of a launcher would write the same folder."""
    from lading.launch import join_size

    size = join_size()
    if size is not None and size > 1:
        fact = f"goes from files to files in one process, needs no launcher (WORLD_SIZE is {size})"
        raise typer.BadParameter(fact, param_hint="this command")


def _written(done: ShardReport, as_json: bool) -> dict[str, Any]:
    """Says what was written, or gives it as JSON values."""
    if not as_json:
        from lading.report import Line, spell_bytes

        files = "the original files" if not done.notes else "safetensors files"
        form = files if done.tp_size is None else f"{done.tp_size} ranks"
        size, rate = spell_bytes(done.num_bytes), spell_bytes(done.num_bytes / done.seconds)
        speed = f"{size} in {done.seconds:.3g} s, {rate}/s"
        lines = [f"{done.path}: {form}", *done.notes, speed]
        show([Line(text=line) for line in lines])
    return {
        "path": done.path,
        "tp_size": done.tp_size,
        "files": list(done.files),
        "bytes": done.num_bytes,
        "seconds": done.seconds,
        "notes": list(done.notes),
    }


# ------------------------------------------------------------------------------------------ digest


@app.command()
def digest(
    path: Dir,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Compare with this folder, tensor by tensor.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prints a digest of each tensor: the same for a checkpoint and `lading shard` of it."""

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import report
        from lading.digesting import verb as digesting

        found = digesting.digest(path)
        ok, value = found.ok, found.to_dict() if as_json else {}
        if against is None:
            if not as_json:
                show(report.digest_report(found))
            return ok, value
        other = digesting.digest(against)
        differences = found.differences(other)
        if not as_json:
            show(report.digest_summary(found))
            show(report.differences_report(differences, found, against))
        value["differences"] = [{"tensor": d.tensor, "fact": d.fact} for d in differences]
        value["against"] = other.total
        return ok and other.ok and not differences, value

    run_command("digest", work, as_json)
