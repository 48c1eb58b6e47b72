"""Digests of what each rank holds of a checkpoint tensor: which rank's file is the damaged one.

The digest of a tensor says that an element has changed, not where. Beside it the manifest has one
digest for each rank that holds less than all: of the elements that the rank holds, each once. They
come from sums of the tensor's pieces, which add up to the tensor's own. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lading.checkpoint import Source
from lading.digests.sums import Sums, hex_of, part_hex
from lading.plan import Plan
from lading.ranks import Ranks
from lading.regions import Region
from lading.routes import Holding, holdings, pieces
from lading.shards.bands import Views
from lading.views import seen_as

__all__ = ["RankDifference", "differing_ranks", "parts_of", "rank_digests"]

SumsOf = Callable[[str, int, int], Sums]
"""Of (tensor, number of its piece, number of the piece's holder)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDifference:
    """What a rank holds of a tensor is not what was sharded.

    regions      in the checkpoint tensor's coordinates
    parameters   of the rank that have them
    """

    tensor: str
    ranks: Ranks
    file: str
    regions: tuple[str, ...]
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.tensor}: {self.fact}"

    @property
    def fact(self) -> str:
        """Without the tensor's name."""
        return (
            f"rank {self.ranks.tp_rank} holds other bytes of region {' and '.join(self.regions)} "
            f"than were sharded ({', '.join(self.parameters)} in {self.file})"
        )


def parts_of(plan: Plan, views: Views) -> dict[str, tuple[tuple[int, Region], ...]]:
    """Of each tensor of several pieces: (number of a piece, a region of it in the view)."""
    return {
        name: tuple(
            (number, copy.source_region)
            for number, piece in enumerate(pieces(plan, name))
            for copy in seen_as(piece.holders[0].copy, views[name])
        )
        for name in holdings(plan)
        if len(pieces(plan, name)) > 1
    }


def rank_digests(plan: Plan, source: Source, sums_of: SumsOf) -> tuple[str, ...]:
    """By rank: the digest of what it holds of a tensor that has several pieces."""
    return tuple(
        part_hex(source.dtype, source.shape, sums)
        for sums in _sums_by_rank(plan, source.name, sums_of)
    )


def differing_ranks(
    plan: Plan,
    source: Source,
    file_of: Callable[[int], str],
    sums_of: SumsOf,
    digest: str,
    by_rank: tuple[str, ...] | None,
) -> list[RankDifference]:
    """The ranks that hold something else than was sharded.

    file_of   a rank's file
    digest    of the whole tensor
    by_rank   what `rank_digests` gave; None where that is not known
    """
    name = source.name
    if len(pieces(plan, name)) == 1:
        needed: tuple[str, ...] | None = (digest,) * plan.tp_size
        hex_from = hex_of
    else:
        needed, hex_from = by_rank, part_hex
    if needed is None:
        return []
    found = []
    for rank, sums in enumerate(_sums_by_rank(plan, name, sums_of)):
        if hex_from(source.dtype, source.shape, sums) == needed[rank]:
            continue
        held = [one for one in holdings(plan)[name] if one.ranks.tp_rank == rank]
        if held:
            found.append(_difference(name, file_of(rank), held))
    return found


def _difference(name: str, file: str, held: Sequence[Holding]) -> RankDifference:
    return RankDifference(
        tensor=name,
        ranks=held[0].ranks,
        file=file,
        regions=tuple(dict.fromkeys(str(one.copy.source_region) for one in held)),
        parameters=tuple(dict.fromkeys(one.copy.target for one in held)),
    )


def _sums_by_rank(plan: Plan, name: str, sums_of: SumsOf) -> list[Sums]:
    """Of the elements that each rank holds, each once."""
    found = [Sums() for _ in range(plan.tp_size)]
    for number, piece in enumerate(pieces(plan, name)):
        seen: set[int] = set()
        for at, holder in enumerate(piece.holders):
            rank = holder.ranks.tp_rank
            if rank not in seen:
                seen.add(rank)
                found[rank] += sums_of(name, number, at)
    return found
