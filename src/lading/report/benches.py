"""A bench as text and as JSON values."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lading.report.blocks import Block, Line, Table, count_of, spell_bytes

if TYPE_CHECKING:
    from lading.benching.bench import PeerRuns, RankBench, Run

COLD_ENOUGH = 0.02
"""Of the files' bytes at most so many may be resident where a run counts as cold."""


def bench_report(ranks: Sequence[RankBench], *, cold: bool) -> tuple[Block, ...]:
    """Stages, rates beside the machine's, bytes, memory, peers, and what was checked."""
    facts = bench_json(ranks, cold=cold)
    title = (
        f"{spell_bytes(facts['checkpoint_bytes'])} at TP {len(ranks)} on {facts['device']}, "
        f"{'cold' if cold else 'warm'}, median of {count_of(len(ranks[0].runs), 'run')}"
    )
    return (
        Line(text=title, style="bold"),
        Line(text=""),
        _loaders(facts),
        Line(text=""),
        _stages(facts),
        Line(text=""),
        _rates(facts),
        Line(text=""),
        *_notes(facts, cold),
    )


def _loaders(facts: dict[str, Any]) -> Table:
    """lading and the peers that ran: seconds, rate, and lading's over it."""
    own = facts["seconds"]
    rows = [("lading", f"{own:.3g} s", _rate(facts["bytes_per_second"]), "")]
    rows += [
        (
            f"{peer['name']} {peer['version']}",
            f"{peer['seconds']:.3g} s",
            _rate(facts["checkpoint_bytes"] / peer["seconds"]),
            f"{peer['lading_is_faster_by']:.2f} x",
        )
        for peer in facts["peers"]
        if peer["problem"] is None
    ]
    heads = ("loader", "until all ranks have it", "checkpoint bytes", "lading is faster by")
    return Table(heads=heads, rows=tuple(rows), right=(1, 2, 3))


def _stages(facts: dict[str, Any]) -> Table:
    stages, seconds = facts["stages"], facts["seconds"]
    rows = tuple(
        (name.replace("_", " "), f"{value:.3g} s", f"{value / seconds:.0%}")
        for name, value in stages.items()
        if value is not None
    )
    return Table(heads=("stage of lading", "slowest rank", "of all"), rows=rows, right=(1, 2))


def _rates(facts: dict[str, Any]) -> Table:
    """What the machine can do, and the bytes that went that way in a load."""
    rows = tuple(
        (
            name.replace("_", " "),
            _rate(rate),
            f"{facts['kept_bytes_per_second'] / rate:.0%}"
            + (" <- limit" if name == facts["limit"] else ""),
        )
        for name, rate in facts["ceilings"].items()
        if rate
    )
    heads = ("measured on this machine", "all ranks at once", "a load reaches")
    return Table(heads=heads, rows=rows, right=(1,))


def _notes(facts: dict[str, Any], cold: bool) -> list[Block]:
    lines = [
        f"read from files: {spell_bytes(facts['read_bytes'])}, "
        f"{facts['read_per_checkpoint_byte']:.3f} of the checkpoint, over all ranks",
    ]
    if facts["bus_per_shard_byte"] is not None:
        lines.append(f"over the bus: {facts['bus_per_shard_byte']:.3f} of the ranks' shards")
    extra = f"peak memory beyond the parameters, of a rank: {spell_bytes(facts['peak_host_bytes'])}"
    if facts["bus_per_shard_byte"] is not None:
        extra += (
            f" of the host ({spell_bytes(facts['pinned_bytes'])} page-locked), "
            f"{spell_bytes(facts['peak_device_bytes'])} of the GPU"
        )
    blocks: list[Block] = [Line(text=text) for text in (*lines, extra)]
    if cold:
        blocks += _cold_notes(facts)
    for peer in facts["peers"]:
        if peer["problem"] is not None:
            blocks.append(Line(text=f"- {peer['name']}: {peer['problem']}", style="yellow"))
    checked = facts["verified"]
    good, total = checked["mismatches"] == 0, checked["elements_compared"]
    if any(peer["problem"] is None for peer in facts["peers"]):
        what = (
            "- peers fill the same parameters by lading's plan, which only lading's time includes"
        )
        blocks.append(Line(text=what, style="dim"))
    text = f"✓ all {total:,} elements are what {checked['reader']} reads"
    if not good:
        text = f"✗ {checked['mismatches']:,} of {total:,} elements differ from what is stored"
    return [*blocks, Line(text=text, style="green" if good else "red")]


def _cold_notes(facts: dict[str, Any]) -> list[Block]:
    resident = facts["resident"]
    if resident is None:
        text = "cold runs: this system does not say what is in its page cache"
    elif resident > COLD_ENOUGH:
        text = (
            f"not cold: up to {resident:.0%} of the bytes were still in the page cache (another "
            "process maps the files, or the file system keeps them)"
        )
    else:
        return []
    return [Line(text=text, style="yellow")]


def _rate(bytes_per_second: float) -> str:
    return f"{spell_bytes(bytes_per_second)}/s"


def bench_json(ranks: Sequence[RankBench], *, cold: bool) -> dict[str, Any]:
    """The same as JSON values. Seconds of a stage are the slowest rank's medians.

    limit   the ceiling that a load of this kind cannot pass: the bus for GPUs, the disk where the
            files are cold, else the page cache
    """
    first = ranks[0]
    seconds = statistics.median(_slowest(ranks))
    kept = sum(one.shard_bytes for one in ranks)
    read = sum(_median(one.runs, lambda run: run.read_bytes) for one in ranks)
    moved = sum(_median(one.runs, lambda run: run.moved_bytes) for one in ranks)
    is_cuda = first.device.startswith("cuda")
    rates = {
        name: _total(
            [
                {
                    "memcpy": one.ceilings.memcpy,
                    "page_cache": one.ceilings.page_cache,
                    "disk": one.ceilings.disk,
                    "host_to_device": one.ceilings.host_to_device,
                }[name]
                for one in ranks
            ]
        )
        for name in ("memcpy", "page_cache", "disk", "host_to_device")
    }
    limit = "disk" if cold and rates["disk"] else "host_to_device" if is_cuda else "page_cache"
    limit_rate = rates[limit]
    return {
        "tp_size": len(ranks),
        "device": first.device.partition(":")[0],
        "cold": cold,
        "runs": len(first.runs),
        "num_threads": first.num_threads,
        "checkpoint_bytes": first.checkpoint_bytes,
        "seconds": seconds,
        "bytes_per_second": first.checkpoint_bytes / seconds,
        "kept_bytes_per_second": kept / seconds,
        "stages": _stage_seconds(ranks),
        "ceilings": rates,
        "limit": limit if limit_rate else None,
        "fraction_of_limit": kept / seconds / limit_rate if limit_rate else None,
        "read_bytes": read,
        "read_per_checkpoint_byte": read / first.checkpoint_bytes,
        "bus_per_shard_byte": moved / kept if is_cuda else None,
        "peak_host_bytes": max(one.peak_host_bytes for one in ranks),
        "peak_device_bytes": max(one.peak_device_bytes for one in ranks),
        "pinned_bytes": max(one.pinned_bytes for one in ranks),
        "resident": max(
            (run.resident for run in first.runs if run.resident is not None), default=None
        ),
        "peers": [_peer_json(number, ranks) for number in range(len(first.peers))],
        "verified": {
            "elements_compared": sum(one.elements.num_elements for one in ranks),
            "mismatches": sum(one.elements.num_mismatches for one in ranks),
            "reader": first.elements.reader,
        },
        "ranks": [_rank_json(one) for one in ranks],
    }


def _stage_seconds(ranks: Sequence[RankBench]) -> dict[str, float | None]:
    """Plan, read and copy, the rest; with a bus, what the threads waited for on it."""

    def slowest(number: Callable[[Run], float]) -> float:
        return max(_median(one.runs, number) for one in ranks)

    is_cuda = ranks[0].device.startswith("cuda")
    busy = slowest(lambda run: run.read_seconds + run.wait_seconds)
    share = slowest(lambda run: run.read_seconds) / busy if busy else 0.0
    moving = slowest(lambda run: run.move_seconds)
    told_apart = is_cuda and busy > 0
    return {
        "plan": slowest(lambda run: run.plan_seconds),
        "read_and_copy": None if told_apart else moving,
        "read": moving * share if told_apart else None,
        "copy_and_exchange": moving * (1 - share) if told_apart else None,
        "memory_and_agreement": slowest(
            lambda run: max(run.seconds - run.plan_seconds - run.move_seconds, 0.0)
        ),
    }


def _peer_json(number: int, ranks: Sequence[RankBench]) -> dict[str, Any]:
    peers: list[PeerRuns] = [one.peers[number] for one in ranks]
    first = peers[0]
    value: dict[str, Any] = {
        "name": first.name,
        "version": first.version,
        "problem": first.problem,
        "seconds": None,
        "lading_is_faster_by": None,
    }
    if first.problem is None and first.seconds:
        slowest = [max(taken) for taken in zip(*(peer.seconds for peer in peers), strict=True)]
        pairs = zip(slowest, _slowest(ranks), strict=True)
        value["seconds"] = statistics.median(slowest)
        value["lading_is_faster_by"] = statistics.median(a / b for a, b in pairs)
    return value


def _rank_json(one: RankBench) -> dict[str, Any]:
    return {
        "tp_rank": one.tp_rank,
        "device": one.device,
        "parameter_bytes": one.parameter_bytes,
        "shard_bytes": one.shard_bytes,
        "peak_host_bytes": one.peak_host_bytes,
        "peak_device_bytes": one.peak_device_bytes,
        "pinned_bytes": one.pinned_bytes,
        "runs": [
            {
                "seconds": run.seconds,
                "plan_seconds": run.plan_seconds,
                "move_seconds": run.move_seconds,
                "read_bytes": run.read_bytes,
                "moved_bytes": run.moved_bytes,
                "calls": run.calls,
                "thread_read_seconds": run.read_seconds,
                "thread_wait_seconds": run.wait_seconds,
                "resident": run.resident,
            }
            for run in one.runs
        ],
    }


def _slowest(ranks: Sequence[RankBench]) -> list[float]:
    """Of each turn, the seconds of the slowest rank."""
    return [
        max(turn) for turn in zip(*([r.seconds for r in one.runs] for one in ranks), strict=True)
    ]


def _median(runs: Sequence[Run], number: Callable[[Run], float]) -> float:
    return statistics.median(number(run) for run in runs)


def _total(rates: Sequence[float | None]) -> float | None:
    """Over all ranks; None where one of them could not measure it."""
    known = [rate for rate in rates if rate is not None]
    return sum(known) if len(known) == len(rates) else None
