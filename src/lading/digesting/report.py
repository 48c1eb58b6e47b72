"""What a digest says of a checkpoint, of pre-sharded files or of a model on ranks: values.

Sums of pieces become digests of tensors here; who summed them, of what, is not known. No torch.

A piece of a checkpoint tensor that several ranks hold is summed by each of them. The first counts,
the others are compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lading import dtypes
from lading.checkpoint import Source
from lading.digests.sums import Sums, hex_of, total_of
from lading.plan import Plan
from lading.ranks import Ranks
from lading.routes import holdings, pieces
from lading.shards.held import RankDifference

__all__ = ["Difference", "DigestReport", "Held", "ReplicaDifference", "TensorDigestValue"]

Held = Mapping[tuple[str, int, int], Sums]
"""By (checkpoint tensor, number of its piece, number of the piece's holder)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigestValue:
    """The digest of a checkpoint tensor; dtype and shape are in it, the name is not."""

    dtype: str
    shape: tuple[int, ...]
    hex: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaDifference:
    """A piece that two ranks hold, not with the same bytes. Nothing says which of them is right.

    region       in the checkpoint tensor's coordinates
    ranks        the first holder, the one that differs from it
    parameters   their parameters
    """

    tensor: str
    region: str
    ranks: tuple[Ranks, Ranks]
    parameters: tuple[str, str]

    def __str__(self) -> str:
        (one, two), (mine, other) = self.ranks, self.parameters
        return (
            f"{self.tensor}: region {self.region} differs on rank {one.tp_rank} ({mine}) and on "
            f"rank {two.tp_rank} ({other}), needs the same bytes (both hold it)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A checkpoint tensor in which two reports differ, and how, in words."""

    tensor: str
    fact: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.fact}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestReport:
    """Digests by checkpoint tensor, in the order of the checkpoint.

    kind       "checkpoint", "shards" or "model"
    replicas   copies of the same elements that differ
    left_out   checkpoint tensors of which a model holds nothing, and why
    recorded   tensors whose digest is not the one that the folder's own manifest records
    ranks      where the folder's files differ from what its manifest records: rank and region
    num_bytes  of the checkpoint's tensors that have digests
    seconds    wall time
    """

    kind: str
    tensors: Mapping[str, TensorDigestValue]
    replicas: tuple[ReplicaDifference, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    recorded: tuple[str, ...] = ()
    ranks: tuple[RankDifference, ...] = ()
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> str:
        """One value for all of `tensors`, names included; their order does not matter."""
        return total_of({name: value.hex for name, value in self.tensors.items()})

    @property
    def ok(self) -> bool:
        """Whether all copies agree, with each other and with the manifest."""
        return not (self.replicas or self.recorded or self.ranks)

    def differences(self, other: DigestReport) -> tuple[Difference, ...]:
        """The tensors that are not the same in both. What a model leaves out is not compared."""
        found = []
        for name, mine in self.tensors.items():
            theirs = other.tensors.get(name)
            if theirs is None:
                if name not in other.left_out:
                    found.append(Difference(tensor=name, fact="is in the first only"))
            elif (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                one, two = (dtypes.spell(v.dtype, v.shape) for v in (mine, theirs))
                found.append(Difference(tensor=name, fact=f"is {one} and {two}"))
            elif mine.hex != theirs.hex:
                fact = f"has digests {mine.hex} and {theirs.hex}"
                found.append(Difference(tensor=name, fact=fact))
        for name in other.tensors:
            if name not in self.tensors and name not in self.left_out:
                found.append(Difference(tensor=name, fact="is in the second only"))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "kind": self.kind,
            "total": self.total,
            "tensors": {
                name: {"dtype": v.dtype, "shape": list(v.shape), "digest": v.hex}
                for name, v in self.tensors.items()
            },
            "replicas": [
                {
                    "tensor": one.tensor,
                    "region": one.region,
                    "ranks": [ranks.tp_rank for ranks in one.ranks],
                    "parameters": list(one.parameters),
                }
                for one in self.replicas
            ],
            "left_out": dict(self.left_out),
            "recorded": list(self.recorded),
            "ranks": [
                {
                    "tensor": one.tensor,
                    "rank": one.ranks.tp_rank,
                    "file": one.file,
                    "regions": list(one.regions),
                    "parameters": list(one.parameters),
                }
                for one in self.ranks
            ],
            "num_bytes": self.num_bytes,
            "seconds": self.seconds,
        }


def value_of(source: Source, sums: Sums) -> TensorDigestValue:
    """The digest of a tensor of which all elements are summed."""
    text = hex_of(source.dtype, source.shape, sums)
    return TensorDigestValue(dtype=source.dtype, shape=source.shape, hex=text)


def sums_by_tensor(plan: Plan, held: Held) -> tuple[dict[str, Sums], tuple[ReplicaDifference, ...]]:
    """(the sums of every checkpoint tensor that ranks hold, where their copies differ).

    plan   of all ranks
    held   by all ranks
    """
    # Of a tensor without elements nobody holds a piece, and yet it is there.
    bound = dict.fromkeys(binding.source for binding in plan.bindings)
    totals = {name: Sums() for name in bound if not plan.sources[name].num_bytes}
    differing = []
    for name in holdings(plan):
        total = Sums()
        for number, piece in enumerate(pieces(plan, name)):
            first, *others = (held[name, number, at] for at in range(len(piece.holders)))
            total += first
            for at, sums in enumerate(others, start=1):
                if sums != first:
                    one, two = piece.holders[0], piece.holders[at]
                    differing.append(
                        ReplicaDifference(
                            tensor=name,
                            region=str(piece.region),
                            ranks=(one.ranks, two.ranks),
                            parameters=(one.copy.target, two.copy.target),
                        )
                    )
        totals[name] = total
    return totals, tuple(differing)
