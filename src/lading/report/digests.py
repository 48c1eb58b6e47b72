"""Digests as text and as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lading import dtypes
from lading.report.blocks import Block, Line, Table, count_of, spell_bytes

if TYPE_CHECKING:
    from lading.digesting.models import DigestCheck
    from lading.digesting.report import Difference, DigestReport


def digest_report(found: DigestReport) -> tuple[Block, ...]:
    """Every tensor's digest, what is wrong with copies of it, and the value of all."""
    rows = tuple(
        (value.hex, dtypes.spell(value.dtype, value.shape), name)
        for name, value in found.tensors.items()
    )
    return (Table(heads=("digest", "stored", "tensor"), rows=rows), *digest_summary(found))


def digest_summary(found: DigestReport) -> tuple[Block, ...]:
    """The value of all tensors, and what is wrong with copies."""
    seconds = max(found.seconds, 1e-9)
    speed = f"{spell_bytes(found.num_bytes)} in {found.seconds:.3g} s"
    return (
        *(Line(text=f"✗ {one}", style="red") for one in found.replicas),
        *(
            Line(text=f"✗ {name}: has another digest than lading.json records", style="red")
            for name in found.recorded
        ),
        *(Line(text=f"✗ {one}", style="red") for one in found.ranks),
        Line(text=f"{found.total}  total of {count_of(len(found.tensors), 'tensor')}"),
        Line(text=f"{speed}, {spell_bytes(found.num_bytes / seconds)}/s"),
    )


def differences_report(
    differences: Sequence[Difference], found: DigestReport, other: str
) -> tuple[Block, ...]:
    """How two folders differ; `found` is the first, `other` the second's name."""
    if not differences:
        text = f"✓ all {count_of(len(found.tensors), 'tensor')} are those of {other}"
        return (Line(text=text, style="green"),)
    verb = "differs" if len(differences) == 1 else "differ"
    head = f"✗ {count_of(len(differences), 'tensor')} {verb} from those of {other}:"
    return (
        Line(text=head, style="red"),
        *(Line(text=f"  {one}", style="red") for one in differences),
    )


def digest_checks_report(checks: Sequence[DigestCheck]) -> tuple[Block, ...]:
    """What ranks hold against the files, region by region."""
    total = sum(one.num_regions for one in checks)
    wrong = [mismatch for one in checks for mismatch in one.mismatches]
    ranks = count_of(len(checks), "rank")
    if not wrong:
        text = f"✓ digests: all {count_of(total, 'region')} on {ranks} are what the files have"
        return (Line(text=text, style="green"),)
    lines = [
        f"  rank {one.tp_rank}, {one.parameter}"
        + (f", part {one.part!r}" if one.part is not None else "")
        + f": {one.fact}"
        for one in wrong
    ]
    head = f"✗ digests: {len(wrong):,} of {count_of(total, 'region')} on {ranks} differ"
    return tuple(Line(text=text, style="red") for text in (head, *lines))


def digest_checks_json(checks: Sequence[DigestCheck]) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "regions_compared": sum(one.num_regions for one in checks),
        "mismatches": [
            {
                "tp_rank": one.tp_rank,
                "tensor": one.tensor,
                "file": one.file,
                "parameter": one.parameter,
                "part": one.part,
                "region": one.region,
                "element": one.element,
            }
            for check in checks
            for one in check.mismatches
        ],
    }
