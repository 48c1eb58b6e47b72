"""Copies of the same elements on several ranks, compared by digests: nothing is gathered.

Each rank digests what others hold too, block by block, in the order in which the plan has it; the
digests are exchanged, and every rank finds the same first difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch

from lading import dtypes, writing
from lading.errors import ConflictError, LadingError
from lading.exports.live import Live, blocks, boxes, has_bits
from lading.plan import Plan, Share
from lading.ranks import Ranks
from lading.routes import Holding, Piece, pieces

__all__ = ["Digests", "check_replicas", "digests_of", "has_padding_values"]

BLOCK_BYTES = 2**20
"""What one digest is of, and so how closely a difference is located."""

DIGEST_BYTES = 16

Digests = dict[Ranks, bytes]
"""Of each rank, the digests of all that it holds as others do, one after the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copies:
    """A piece with several holders, and the dtype that the checkpoint has it in."""

    piece: Piece
    dtype: str

    @property
    def limit(self) -> int:
        """Elements of a block."""
        return BLOCK_BYTES // dtypes.storage_bytes(self.dtype)


def _shared(plan: Plan) -> Iterator[_Copies]:
    unkept = {tie.twin for tie in plan.ties} | {check.source for check in plan.checks()}
    for name, source in plan.sources.items():
        if name in unkept or not source.num_bytes:
            continue
        for piece in pieces(plan, name):
            if len(piece.holders) > 1:
                yield _Copies(piece=piece, dtype=source.dtype)


def digests_of(plan: Plan, lives: Mapping[Ranks, Live]) -> Digests:
    """The digests of these ranks' copies. Raises a DtypeError as `lading.live.blocks` does."""
    found = {ranks: bytearray() for ranks in lives}
    for copies in _shared(plan):
        for holder in copies.piece.holders:
            live = lives.get(holder.ranks)
            if live is None:
                continue
            try:
                tensor = live.tensors[holder.copy.target]
                for _, data in blocks(tensor, holder.copy, copies.dtype, BLOCK_BYTES):
                    found[holder.ranks] += blake2b(data, digest_size=DIGEST_BYTES).digest()
            except LadingError as error:
                raise error.located(subject=holder.copy.target, part=holder.copy.part) from None
    return {ranks: bytes(digests) for ranks, digests in found.items()}


def check_replicas(plan: Plan, everyones: Sequence[Digests]) -> None:
    """Raises a ConflictError with both ranks, tensor and region where two copies differ."""
    known = {ranks: digests for found in everyones for ranks, digests in found.items()}
    at = dict.fromkeys(known, 0)
    for copies in _shared(plan):
        piece = copies.piece
        inner = list(boxes(piece.region.size, copies.limit))
        taken: list[tuple[Holding, bytes]] = []
        for holder in piece.holders:
            start = at[holder.ranks]
            at[holder.ranks] = start + len(inner) * DIGEST_BYTES
            taken.append((holder, known[holder.ranks][start : at[holder.ranks]]))
        first, needed = taken[0]
        for holder, found in taken[1:]:
            if found == needed:
                continue
            number = next(
                i
                for i in range(len(inner))
                if found[i * DIGEST_BYTES :][:DIGEST_BYTES]
                != needed[i * DIGEST_BYTES :][:DIGEST_BYTES]
            )
            raise _difference(piece, first, holder, str(piece.region.compose(inner[number])))


def _difference(piece: Piece, one: Holding, two: Holding, region: str) -> ConflictError:
    places = f"{one.ranks} and {two.ranks} hold other values"
    if one.ranks == two.ranks:
        places = f"{one.ranks} holds other values in {one.copy.target_region} and "
        places += str(two.copy.target_region)
    return ConflictError(
        f"{places} for checkpoint tensor {piece.source!r} {region} of "
        f"{list(piece.region.shape)}, needs equal ones (they are copies of the same elements)",
        subject=two.copy.target,
        part=two.copy.part,
    )


def has_padding_values(share: Share, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The parameters of which some padding is not zero."""
    found = {
        fill.target: None
        for fill in share.fills
        if has_bits(writing.view_of(tensors[fill.target], fill.region))
    }
    return list(found)
