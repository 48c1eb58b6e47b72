"""A plan read backwards, and two plans put together. Pure: no torch, no files, no processes.

A plan is a relation between elements of checkpoint tensors and elements of parameters. Read from
the parameters to the checkpoint it says who holds what: `holdings` and `pieces`. One plan backwards
and then another forwards says what goes from which rank's parameter to which: `routes`. Nothing
here knows what a layout is.

Letters: S = a checkpoint tensor. T = tp_size.

What is proved, from the regions alone: pieces cover each S exactly once; routes bring each element
of each parameter, declared padding apart, exactly once.

    k_proj.weight [256, 64], 2 KV heads, T = 4: ranks 0 and 1 hold rows 0:128, 2 and 3 the others.
    pieces            [0:128, 0:64] held by ranks 0, 1; [128:256, 0:64] held by ranks 2, 3
    routes, T 4 -> 2  rank 0 has its 128 rows itself; rank 1 gets its own from rank 2 or from rank 3
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lading import dtypes
from lading.errors import (
    CallError,
    DtypeError,
    LadingError,
    LayoutError,
    MissingTensorError,
    PlanError,
    ShapeError,
    SurplusTensorError,
)
from lading.plan import Plan
from lading.ranks import Ranks
from lading.regions import Copy, Ints, Region, cover, partition
from lading.views import common_shape, seen_as

__all__ = ["Holding", "Piece", "Route", "holdings", "pieces", "routes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One rank's copy of a region of a checkpoint tensor.

    ranks   who holds it
    copy    from the checkpoint tensor to the parameter
    """

    ranks: Ranks
    copy: Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A box of a checkpoint tensor whose elements the same ranks hold.

    source    the checkpoint tensor, S
    region    in S's coordinates, in the view that the holders' copies have
    holders   in rank order, each copy restricted to the region; never empty. One rank may hold an
              element several times: a scale of several parts, an entry that two parts share
    """

    source: str
    region: Region
    holders: tuple[Holding, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What goes from one rank's parameter to another's.

    sender, receiver   ranks of the first plan and of the second
    copy               source = the sender's parameter, target = the receiver's
    """

    sender: Ranks
    receiver: Ranks
    copy: Copy


def holdings(plan: Plan) -> Mapping[str, tuple[Holding, ...]]:
    """Who holds what of each checkpoint tensor, in rank order, by the tensor's name.

    Tensors that nobody keeps are not in it: twins of tied ones, constants, what a rule skips.
    """
    return _inverse(plan).holdings


def pieces(plan: Plan, source: str) -> tuple[Piece, ...]:
    """Disjoint boxes that cover a checkpoint tensor exactly once, with all holders of each.

    Raises a PlanError where the plan was not made for all ranks, or leaves an element to nobody; a
    CallError where no rank keeps the tensor.
    """
    inverse = _inverse(plan)
    inverse.check_ranks()
    return inverse.pieces(source)


def routes(
    before: Plan, after: Plan, *, same_process: Callable[[Ranks, Ranks], bool] | None = None
) -> tuple[Route, ...]:
    """From whose parameter each element of each parameter of the second plan comes.

    Each comes from exactly one sender: from the receiver's own process where that holds it, else
    from the holder that has the fewest bytes to send so far. Every process finds the same routes.

    before         for all its ranks; `after` may be for some of its ranks only
    same_process   whether a rank of the first plan and one of the second are one process; by
                   default those with equal numbers
    Raises a PlanError with every difference where the two are not plans of one checkpoint.
    """
    inverse, onward = _inverse(before), _inverse(after)
    inverse.check_ranks()
    _check_same(before, after, inverse.holdings, onward.holdings)
    chosen = _Senders(same_process or _same_rank)
    known: dict[tuple[_Key, _Key], tuple[tuple[_Offer, ...], ...]] = {}
    found: list[Route] = []
    twins = {tie.twin: tie.source for tie in before.ties}
    for name, wanted in onward.holdings.items():
        held = inverse.holdings[name if name in inverse.holdings else twins[name]]
        key = _key(held), _key(wanted)
        offers = known.get(key)
        if offers is None:
            offers = known[key] = _offers(name, held, wanted)
        bits = dtypes.BITS[before.sources[name].dtype]
        for receiver, of_one in zip(wanted, offers, strict=True):
            for offer in of_one:
                at, onto = chosen.best(receiver.ranks, held, offer, bits)
                sender = held[at]
                copy = Copy(
                    source=sender.copy.target,
                    target=receiver.copy.target,
                    part=receiver.copy.part,
                    source_region=onto.source_region,
                    target_region=onto.target_region,
                    axes=onto.axes,
                )
                found.append(Route(sender=sender.ranks, receiver=receiver.ranks, copy=copy))
    return tuple(found)


class _Inverse:
    """What follows from one plan, read backwards; each answer is worked out when first asked for.

    Equal layouts give equal regions, so what is found for one layer's tensor holds for the others.
    """

    def __init__(self, plan: Plan) -> None:
        self.tp_size = plan.tp_size
        self.ep_size = plan.shares[0].ranks.ep_size
        self.ranks = tuple(sorted((share.ranks for share in plan.shares), key=_place))
        found: dict[str, list[Holding]] = {}
        for share in sorted(plan.shares, key=lambda share: _place(share.ranks)):
            for copy in share.copies:
                if copy.source_region.num_elements:
                    found.setdefault(copy.source, []).append(Holding(ranks=share.ranks, copy=copy))
        self.holdings = {name: tuple(held) for name, held in found.items()}
        self._boxes: dict[_Key, tuple[_Box, ...]] = {}
        self._pieces: dict[str, tuple[Piece, ...]] = {}

    def check_ranks(self) -> None:
        """Raises a PlanError where some of the ranks were not planned."""
        wanted = product(range(self.tp_size), range(self.ep_size))
        places = set(map(_place, self.ranks))
        missing = [
            Ranks(tp_rank=tp, tp_size=self.tp_size, ep_rank=ep, ep_size=self.ep_size)
            for tp, ep in wanted
            if (tp, ep) not in places
        ]
        if missing:
            fact = f"is not made for {', '.join(map(str, missing))}, needs all ranks (who holds it)"
            raise PlanError([CallError(fact, subject="plan")])

    def pieces(self, source: str) -> tuple[Piece, ...]:
        """See the function `pieces`."""
        done = self._pieces.get(source)
        if done is not None:
            return done
        held = self.holdings.get(source)
        if held is None:
            raise CallError("no rank of the plan keeps any of it", subject=source)
        key = _key(held)
        boxes = self._boxes.get(key)
        if boxes is None:
            boxes = self._boxes[key] = tuple(_boxes(source, [holding.copy for holding in held]))
        found = tuple(
            Piece(
                source=source,
                region=box.region,
                holders=tuple(_restricted(held[at], copy) for at, copy in box.copies),
            )
            for box in boxes
        )
        return self._pieces.setdefault(source, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Box:
    """A piece of any tensor that is cut like this one.

    copies   (position among the tensor's holdings, that copy restricted to the region); of another
             layer's tensor only the names differ
    """

    region: Region
    copies: tuple[tuple[int, Copy], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Offer:
    """A box that a receiver needs.

    senders   (position among the tensor's holdings, the copy from that holder to the receiver)
    """

    num_elements: int
    senders: tuple[tuple[int, Copy], ...]


_Key = tuple[tuple[Ranks, Region, Region, Ints], ...]
"""All that pieces and routes depend on, but for names."""


def _key(held: Sequence[Holding]) -> _Key:
    return tuple((h.ranks, h.copy.source_region, h.copy.target_region, h.copy.axes) for h in held)


def _place(ranks: Ranks) -> tuple[int, int]:
    return ranks.tp_rank, ranks.ep_rank


def _same_rank(one: Ranks, two: Ranks) -> bool:
    return _place(one) == _place(two)


def _restricted(holding: Holding, copy: Copy) -> Holding:
    own = Copy(
        source=holding.copy.source,
        target=holding.copy.target,
        part=holding.copy.part,
        source_region=copy.source_region,
        target_region=copy.target_region,
        axes=copy.axes,
    )
    return Holding(ranks=holding.ranks, copy=own)


def _within(copy: Copy, source_box: Region) -> Copy | None:
    """The share of a copy that comes from a box of its source, None where none does."""
    found = copy.invert().restrict(source_box)
    return found.invert() if found is not None else None


def _in_view(copies: Sequence[Copy], shape: Ints) -> list[tuple[int, Copy]]:
    """(position, copy) of all that the copies become when the source is seen as `shape`."""
    return [(at, one) for at, copy in enumerate(copies) for one in seen_as(copy, shape)]


def _boxes(source: str, copies: Sequence[Copy], shape: Ints | None = None) -> Iterator[_Box]:
    """Disjoint boxes that cover the source exactly, each with the copies of it; proved here.

    shape   in which the source is seen; by default the coarsest that all copies have in common
    """
    if shape is None:
        shape = common_shape([copy.source_region.shape for copy in copies])
    seen = _in_view(copies, shape)
    found = partition(shape, [copy.source_region for _, copy in seen])
    coverage = cover(shape, [region for region, _ in found])
    if not coverage.is_exact:
        which, words = coverage.missing, "are held by no rank"
        if which is None:
            which, words = coverage.twice, "are in two pieces"
        fact = f"elements {which} of {list(shape)} {words}, needs exactly one piece"
        raise PlanError([LayoutError(fact, subject=source)])
    for region, inside in found:
        held = [(seen[i][0], _within(seen[i][1], region)) for i in inside]
        yield _Box(region=region, copies=tuple((at, copy) for at, copy in held if copy is not None))


def _offers(
    source: str, held: Sequence[Holding], wanted: Sequence[Holding]
) -> tuple[tuple[_Offer, ...], ...]:
    """For each copy that a receiver makes, the boxes of which it consists, with all senders."""
    back, onward = [h.copy for h in held], [h.copy for h in wanted]
    shape = common_shape([copy.source_region.shape for copy in (*back, *onward)])
    boxes = tuple(_boxes(source, back, shape))
    offers = []
    for copy in onward:
        found: list[_Offer] = []
        for one in seen_as(copy, shape):
            parts: list[Region] = []
            for box in boxes:
                both = one.source_region.intersect(box.region)
                if both is None:
                    continue
                parts.append(both.inside(one.source_region))
                senders = tuple((at, _through(sender, one, both)) for at, sender in box.copies)
                found.append(_Offer(num_elements=both.num_elements, senders=senders))
            coverage = cover(one.source_region.size, parts)
            if not coverage.is_exact:
                fact = f"{one.source_region} is not sent exactly once, needs each element once"
                raise PlanError([LayoutError(fact, subject=source)])
        offers.append(tuple(found))
    return tuple(offers)


def _through(sender: Copy, receiver: Copy, box: Region) -> Copy:
    """The copy from the sender's parameter to the receiver's, of a box of the tensor of both."""
    one, two = _within(sender, box), _within(receiver, box)
    assert one is not None, "the box is in the sender's region"
    assert two is not None, "the box is in the receiver's region"
    back = one.invert()
    axes: Ints = ()
    if back.axes or two.axes:
        same = tuple(range(len(box.size)))
        first, second = back.axes or same, two.axes or same
        axes = tuple(first[axis] for axis in second)
        axes = () if axes == same else axes
    return Copy(
        source=back.source,
        target=two.target,
        part=two.part,
        source_region=back.source_region,
        target_region=two.target_region,
        axes=axes,
    )


class _Senders:
    """Who sends: the receiver's own process, else the one that has the least to send so far."""

    def __init__(self, same_process: Callable[[Ranks, Ranks], bool]) -> None:
        self.same_process = same_process
        self.bits: dict[Ranks, int] = {}
        self._same: dict[tuple[Ranks, Ranks], bool] = {}

    def best(
        self, receiver: Ranks, held: Sequence[Holding], offer: _Offer, bits: int
    ) -> tuple[int, Copy]:
        """One of the offer's senders; counts what it sends."""
        for at, copy in offer.senders:
            if self._is_same(held[at].ranks, receiver):
                return at, copy
        at, copy = min(offer.senders, key=lambda one: self.bits.get(held[one[0]].ranks, 0))
        sender = held[at].ranks
        self.bits[sender] = self.bits.get(sender, 0) + offer.num_elements * bits
        return at, copy

    def _is_same(self, sender: Ranks, receiver: Ranks) -> bool:
        found = self._same.get((sender, receiver))
        if found is None:
            found = self._same[sender, receiver] = self.same_process(sender, receiver)
        return found


def _check_same(
    before: Plan,
    after: Plan,
    held: Mapping[str, tuple[Holding, ...]],
    wanted: Mapping[str, tuple[Holding, ...]],
) -> None:
    """Raises a PlanError with every difference between the two plans' checkpoints."""
    twins = {tie.twin for tie in before.ties}
    problems: list[LadingError] = [
        MissingTensorError(
            "no rank of the first plan keeps it, the second one needs it",
            subject=name,
            file=after.sources[name].file or None,
        )
        for name in wanted
        if name not in held and name not in twins
    ]
    known = {*after.sources, *(skipped.source for skipped in after.skipped)}
    problems += [
        SurplusTensorError(
            "ranks of the first plan keep it, the second one knows no such tensor",
            subject=name,
            file=before.sources[name].file or None,
        )
        for name in held
        if name not in known
    ]
    for name, two in after.sources.items():
        one = before.sources.get(name)
        if one is None:
            continue
        fact = (
            f"is {dtypes.spell(one.dtype, one.shape)} in the first plan, needs "
            f"{dtypes.spell(two.dtype, two.shape)} (the second one's)"
        )
        if one.shape != two.shape:
            problems.append(ShapeError(fact, subject=name, file=one.file or None))
        elif one.dtype != two.dtype:
            problems.append(DtypeError(fact, subject=name, file=one.file or None))
    if problems:
        raise PlanError(problems, what="the pair of plans")


_known: dict[int, tuple[weakref.ref[Plan], _Inverse]] = {}


def _inverse(plan: Plan) -> _Inverse:
    """The plan read backwards; once for each plan object, for as long as that lives."""
    key = id(plan)
    found = _known.get(key)
    if found is not None and found[0]() is plan:
        return found[1]
    inverse = _Inverse(plan)
    _known[key] = weakref.ref(plan, lambda _gone: _known.pop(key, None)), inverse
    return inverse
