"""The command `lading bench`. JSON, beside "ok" and "command": see `report.bench_json`.

Nothing but typer is imported before the command needs it.
"""

from __future__ import annotations

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
    say_error,
    show,
    tp_of,
)

if TYPE_CHECKING:
    from lading.benching.bench import RankBench

__all__ = ["app"]

app = typer.Typer()


class PeerName(str, Enum):
    """The loaders that can run beside lading: those of `lading.peers`, and none of them."""

    SAFETENSORS = "safetensors"
    PREFETCH = "prefetch"
    INSTANTTENSOR = "instanttensor"
    FASTSAFETENSORS = "fastsafetensors"
    TRANSFORMERS = "transformers"
    NONE = "none"


@app.command()
def bench(
    path: Dir,
    tp: Tp = None,
    runs: Annotated[int, typer.Option(min=1, help="Loads that are timed, of each loader.")] = 5,
    against: Annotated[
        list[PeerName] | None,
        typer.Option(
            metavar="NAME",
            help="A loader to run beside it, or none; may be given again. Default: all of "
            f"{', '.join(name.value for name in PeerName if name.value != 'none')}.",
            show_default=False,
        ),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Empty the page cache of the files before each run.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    straddle: Straddle = StraddleName.DUPLICATE,
    as_json: Json = False,
) -> None:
    """Times loads on N processes, beside what this machine can do and what other loaders do."""
    size = tp_of(tp)

    def work() -> tuple[bool, dict[str, Any]]:
        from lading import report
        from lading.benching.bench import Options, bench_rank, known_peers
        from lading.verify import refuse_sharded

        refuse_sharded(path)
        chosen = known_peers() if against is None else [name.value for name in against]
        names = tuple(dict.fromkeys(name for name in chosen if name != PeerName.NONE.value))
        found: list[RankBench] = on_ranks(
            bench_rank,
            path,
            size,
            dtype_code(dtype),
            device_name(device),
            straddle.value,
            as_json,
            Options(runs=runs, against=names, cold=cold),
        )
        if not as_json:
            show(report.bench_report(found, cold=cold))
        value = report.bench_json(found, cold=cold)
        errors = [error for one in found if (error := one.elements.error()) is not None]
        if errors:
            value["error"] = errors[0].to_dict()
            if not as_json:
                say_error(errors[0])
        return not errors, value

    run_command("bench", work, as_json)
