"""How a parameter is made of parts and cut across ranks: the one arithmetic of packed, scaled and
padded dims. Pure: no torch, no formats, no files.

A parallel layer has two axes, its outputs and its inputs, in logical elements (rows of the weight,
columns of it). Each tensor of the layer lies along one or both: a `Cut` says along which axis a dim
runs and how many logical elements one stored entry covers (its grain). A `Layout` is one Cut a dim.
From it follow, for any number of ranks, the shape of each checkpoint tensor, the local shape, and
which box of the file goes to which box of the parameter.

Letters: T = tp_size, r = tp_rank, P = pieces of a part, g = grain, O = outputs, I = inputs.

    part of n elements, P pieces:  piece p holds p*n/P : (p+1)*n/P; rank r keeps piece r // (T / P)
    stored entries of a:b          a/g : b/g, and both divide exactly, or it is a LayoutError

Example: 32 q heads and 8 KV heads of 128 at T = 16: q has 16 pieces of 256 rows; k and v have 8
pieces of 128 rows, each kept by 2 neighbouring ranks. In int4 packed along the outputs (g = 8) that
is 32 + 16 + 16 entries a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import lcm

from lading.errors import LayoutError
from lading.regions import Ints, Region

__all__ = ["Axis", "Cut", "Layout", "Part", "Placement", "entries", "piece_of", "span_of_piece"]

Span = tuple[int, int]
PartName = str | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One checkpoint tensor inside a (fused) parameter, along one axis, in logical elements.

    name        'q', 'k', 0, ...; None where the parameter has one part only
    size        n, over all ranks
    max_pieces  at most so many distinct pieces: None = one a rank (cut), num_kv_heads = shared by
                neighbouring ranks when there are more ranks, 1 = replicated
    unit        elements that must stay together, e.g. head_dim: a piece is a multiple of it
    unit_name   what a unit is called in messages: "q heads"; "" = rows or columns, as the dim is
    pad_to      the size is padded up to a multiple of this and of T; 0 = never padded
    """

    name: PartName = None
    size: int
    max_pieces: int | None = None
    unit: int = 1
    unit_name: str = ""
    pad_to: int = 0

    def __post_init__(self) -> None:
        if self.size < 0 or self.unit < 1 or self.pad_to < 0:
            raise LayoutError(
                f"part of {self.size} elements in units of {self.unit}, needs positive numbers",
                part=self.name,
            )
        if self.max_pieces is not None and self.max_pieces < 1:
            raise LayoutError(f"has {self.max_pieces} pieces, needs at least 1", part=self.name)
        for found, number in (("has", self.size), ("is padded to a multiple of", self.pad_to)):
            if number % self.unit:
                raise LayoutError(
                    f"{found} {number} elements, needs a multiple of {self.unit} "
                    f"(one of its {self.unit_name or 'units'})",
                    part=self.name,
                )

    def padding(self, tp_size: int) -> int:
        """Elements that no checkpoint tensor has, after the last one."""
        return -self.size % lcm(self.pad_to, tp_size) if self.pad_to else 0

    def pieces(self, tp_size: int, word: str = "elements") -> int:
        """P: how many distinct pieces T ranks hold; a LayoutError where they would be unequal.

        word   what an element is called in the message, where the part has no name for its units
        """
        limit = tp_size if self.max_pieces is None else self.max_pieces
        count = min(tp_size, limit)
        units = (self.size + self.padding(tp_size)) // self.unit
        word = self.unit_name or word
        if units % count:
            raise LayoutError(
                f"TP {tp_size} does not cut {units} {word} into {count} equal pieces: "
                f"{units} = {count} * {units // count} + {units % count}",
                part=self.name,
                hint=suggest_tp(self.divides, tp_size),
            )
        if tp_size % count:
            raise LayoutError(
                f"TP {tp_size} does not share {count} {word} among neighbouring ranks: "
                f"{tp_size} = {count} * {tp_size // count} + {tp_size % count}",
                part=self.name,
                hint=suggest_tp(self.divides, tp_size),
            )
        return count

    def divides(self, tp_size: int) -> bool:
        """Whether T ranks can hold equal pieces."""
        count = min(tp_size, tp_size if self.max_pieces is None else self.max_pieces)
        return not ((self.size + self.padding(tp_size)) // self.unit % count or tp_size % count)

    def span(self, tp_rank: int, tp_size: int) -> Span:
        """What rank r keeps, in the part's own padded coordinates."""
        pieces = self.pieces(tp_size)
        size = self.size + self.padding(tp_size)
        return span_of_piece(size, pieces, piece_of(tp_rank, tp_size, pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of a layer: its parts, side by side. Most axes have one part without a name.

    name     what its length is called in messages: "out_features", "in_features", "vocabulary size"
    scalars  the parts are numbers of the format: a checkpoint tensor that is fused on disk has one
             number for all of them
    """

    parts: tuple[Part, ...]
    name: str = ""
    scalars: bool = False

    def __post_init__(self) -> None:
        if not self.parts:
            raise LayoutError("an axis has no part, needs at least one")
        seen: set[PartName] = set()
        for part in self.parts:
            if part.name in seen:
                raise LayoutError(
                    "is the name of two parts, needs to be that of one", part=part.name
                )
            seen.add(part.name)

    @staticmethod
    def of(size: int, *, max_pieces: int | None = None, name: str = "") -> Axis:
        """An axis of one part."""
        return Axis(parts=(Part(size=size, max_pieces=max_pieces),), name=name)

    @property
    def size(self) -> int:
        """Logical elements of all parts, without padding."""
        return sum(part.size for part in self.parts)

    def local_size(self, tp_size: int) -> int:
        """Logical elements that each rank keeps, with padding."""
        return sum(stop - start for start, stop in (p.span(0, tp_size) for p in self.parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How one dim of a tensor runs along an axis.

    grain    g: logical elements per stored entry. 8 for int4 in int32, 128 for a block scale,
             Fraction(32, 3) for 3-bit, Fraction(1, 2) where an element takes two entries
    ragged   whether the last entry of a part may cover fewer elements (block scales)
    reason   why the grain is what it is, for messages: "int4 packs 8 rows per int32 entry"
    straddle whether an entry that a cut goes through is kept on both sides of it (block scales):
             each rank then keeps the entries that cover its piece, all ranks equally many, and
             `Layout.offset` says where its piece begins in the first
    align    pieces are whole multiples of so many elements, where the grain does not say so
             (tiles); align_reason is why, for messages
    """

    axis: Axis
    grain: Fraction = Fraction(1)
    ragged: bool = False
    reason: str = ""
    straddle: bool = False
    align: int = 1
    align_reason: str = ""

    def __post_init__(self) -> None:
        if self.grain <= 0:
            raise LayoutError(f"has a grain of {self.grain}, needs a positive number")
        if self.straddle and self.grain.denominator != 1:
            raise LayoutError(f"straddles with a grain of {self.grain}, needs a whole number")
        if self.align < 1:
            raise LayoutError(f"has pieces that are multiples of {self.align}, needs at least 1")

    def num_entries(self, size: int) -> int:
        """Stored entries of `size` logical elements from an entry's start."""
        return entries(0, size, self, size)[1]

    def check(self, part: Part, tp_size: int, word: str) -> None:
        """Raises a LayoutError where a piece of the part is no whole number of entries."""
        pieces = part.pieces(tp_size, word)
        if self._is_whole(part, tp_size):
            return
        padded = part.size + part.padding(tp_size)
        unit, piece = self.grain.numerator, padded // pieces
        if not self._is_aligned(part, tp_size):
            unit, why = self.align, self.align_reason or f"pieces are multiples of {self.align}"
            raise LayoutError(
                f"TP {tp_size} cuts {padded} {word} into {piece} per rank; {why} and "
                f"{piece} = {piece // unit} * {unit} + {piece % unit}",
                part=part.name,
                hint=suggest_tp(lambda t: self.fits(part, t), tp_size),
            )
        found = f"TP {tp_size} cuts {padded} {word} into {piece} per rank"
        if pieces == 1 or not piece % unit:  # what is on disk, without the padding, is no whole
            found, piece = f"has {part.size} {word}", part.size
        reason = self.reason or f"one stored entry covers {self.grain} {word}"
        raise LayoutError(
            f"{found}; {reason} and {piece} = {piece // unit} * {unit} + {piece % unit}",
            part=part.name,
            hint=suggest_tp(lambda t: self.fits(part, t), tp_size),
        )

    def fits(self, part: Part, tp_size: int) -> bool:
        """Whether T ranks can hold equal pieces of whole entries."""
        return part.divides(tp_size) and self._is_whole(part, tp_size)

    def _is_aligned(self, part: Part, tp_size: int) -> bool:
        pieces = part.pieces(tp_size)
        return pieces == 1 or not (part.size + part.padding(tp_size)) // pieces % self.align

    def _is_whole(self, part: Part, tp_size: int) -> bool:
        if not self._is_aligned(part, tp_size):
            return False
        pieces = part.pieces(tp_size)
        if self.straddle or (self.ragged and pieces == 1):
            return True
        piece = (part.size + part.padding(tp_size)) // pieces
        # Padding may begin in the middle of a rank's piece: whole entries come before it, too.
        return not piece % self.grain.numerator and (
            self.ragged or not part.size % self.grain.numerator
        )


def piece_of(tp_rank: int, tp_size: int, pieces: int) -> int:
    """Which piece rank r keeps: r // (T / P)."""
    return tp_rank // (tp_size // pieces)


def span_of_piece(size: int, pieces: int, piece: int) -> Span:
    """Where piece p of P lies in `size` elements. Raises a LayoutError where they do not divide."""
    if size % pieces:
        raise LayoutError(
            f"{size} elements are not {pieces} equal pieces: "
            f"{size} = {pieces} * {size // pieces} + {size % pieces}"
        )
    length = size // pieces
    return piece * length, (piece + 1) * length


def entries(start: int, stop: int, cut: Cut, end: int) -> Span:
    """The stored entries of logical elements start:stop, exactly, or a LayoutError.

    `end` is where the part ends: there, and only there, a ragged grain may round up.
    """
    if cut.grain.numerator == cut.grain.denominator:
        return start, stop
    first = start / cut.grain
    last = stop / cut.grain
    if cut.ragged and stop == end:
        last = Fraction(-(-last.numerator // last.denominator))
    for value, at in ((first, start), (last, stop)):
        if value.denominator != 1:
            raise LayoutError(
                f"element {at} is inside a stored entry: "
                f"{cut.reason or f'one entry covers {cut.grain} elements'}"
            )
    return int(first), int(last)


def suggest_tp(fits: Callable[[int], bool], asked: int) -> str | None:
    """'TP 1, 2, 4 or 5': the sizes up to the one asked for, or 8, for which `fits` holds."""
    sizes = [size for size in range(1, max(asked, 8) + 1) if fits(size)][-8:]
    if not sizes:
        return None
    head = ", ".join(map(str, sizes[:-1]))
    return f"TP {head} or {sizes[-1]}" if head else f"TP {sizes[-1]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What a rank keeps of one part: boxes of the checkpoint tensor and of the parameter."""

    source: Region
    target: Region


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One Cut a dim, for T ranks. At most one dim is of several parts, at most one is padded.

    fused_source   the checkpoint tensor holds all parts side by side. Only straddling entries
                   depend on it: which parts share an entry, and so how many entries each keeps
    Raises a LayoutError (with part, numbers, the TP sizes that work) where a cut does not divide.
    """

    cuts: tuple[Cut, ...]
    tp_size: int = 1
    fused_source: bool = False
    _local_shape: Ints | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tp_size < 1:
            raise LayoutError(f"tp_size is {self.tp_size}, needs at least 1")
        fused = [dim for dim, cut in enumerate(self.cuts) if len(cut.axis.parts) > 1]
        if len(fused) > 1:
            raise LayoutError(f"dims {fused} both have several parts, needs at most one such dim")
        padded = [d for d, cut in enumerate(self.cuts) if any(p.pad_to for p in cut.axis.parts)]
        if len(padded) > 1:
            raise LayoutError(f"dims {padded} are both padded, needs at most one such dim")
        try:
            for dim, cut in enumerate(self.cuts):
                for part in cut.axis.parts:
                    cut.check(part, self.tp_size, "rows" if dim == 0 else "columns")
        except LayoutError as error:
            error.hint = suggest_tp(self._fits, self.tp_size)  # the part knew only what fits itself
            raise

    def __hash__(self) -> int:
        # Sizes tell most layouts apart, and a plan hashes one a target: of 92,000 targets, walking
        # all values took 0.2 s of 1.4 s more (CPython 3.11).
        return hash((self.tp_size, *[p.size for cut in self.cuts for p in cut.axis.parts]))

    @staticmethod
    def replicated(shape: tuple[int, ...], tp_size: int = 1) -> Layout:
        """Every rank keeps the whole tensor."""
        return _replicated(tuple(shape), tp_size)

    def _fits(self, tp_size: int) -> bool:
        return all(cut.fits(part, tp_size) for cut in self.cuts for part in cut.axis.parts)

    def permuted(self, order: Sequence[int]) -> Layout:
        """The layout of the tensor whose dim i is this one's dim order[i]."""
        return Layout(
            cuts=tuple(self.cuts[i] for i in order),
            tp_size=self.tp_size,
            fused_source=self.fused_source,
        )

    @property
    def shares_entries(self) -> bool:
        """Whether two ranks may keep the same stored entry of a part without being replicas."""
        return any(cut.straddle for cut in self.cuts)

    @property
    def fused_dim(self) -> int | None:
        """The dim along which several parts lie, None where there is one part."""
        for dim, cut in enumerate(self.cuts):
            if len(cut.axis.parts) > 1:
                return dim
        return None

    @property
    def part_names(self) -> tuple[PartName, ...]:
        """The parts in their order in the parameter; (None,) where there is one."""
        dim = self.fused_dim
        return (None,) if dim is None else tuple(part.name for part in self.cuts[dim].axis.parts)

    def source_shape(self, part: PartName = None) -> tuple[int, ...]:
        """The shape of one part's checkpoint tensor, in stored entries, without padding."""
        chosen = self._chosen(part)
        return tuple([c.num_entries(p.size) for c, p in zip(self.cuts, chosen, strict=True)])

    @property
    def fused_shape(self) -> tuple[int, ...]:
        """The shape of a checkpoint tensor that holds all parts side by side, in stored entries."""
        return tuple(
            cut.axis.parts[0].size if cut.axis.scalars else cut.num_entries(cut.axis.size)
            for cut in self.cuts
        )

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of the parameter on each rank, in stored entries, with padding."""
        found = self._local_shape
        if found is None:  # asked for by each parameter, each placement, each plan
            sizes = [[self._piece_entries(cut, p) for p in cut.axis.parts] for cut in self.cuts]
            found = tuple(map(sum, sizes))
            object.__setattr__(self, "_local_shape", found)
        return found

    def place(
        self, part: PartName, tp_rank: int, *, fused_source: bool = False
    ) -> Placement | None:
        """What rank r keeps of a part; None where its piece is nothing but padding.

        fused_source   the checkpoint tensor holds all parts side by side
        """
        assert 0 <= tp_rank < self.tp_size, f"rank {tp_rank} of a layout for {self.tp_size} ranks"
        if self.shares_entries and fused_source != self.fused_source and self.fused_dim is not None:
            stored = ("each by itself", "side by side")
            raise LayoutError(
                f"was declared for parts that are stored {stored[self.fused_source]}, the "
                f"checkpoint stores them {stored[fused_source]}",
                part=part,
            )
        sources: list[Span] = []
        targets: list[Span] = []
        for cut, chosen in zip(self.cuts, self._chosen(part), strict=True):
            start, stop = chosen.span(tp_rank, self.tp_size)
            stop = min(stop, chosen.size)
            if stop <= start and chosen.size:
                return None
            if cut.straddle:
                first, last = self._window(cut, chosen, tp_rank)
                offset = 0
            else:
                offset = self._source_offset(cut, chosen) if fused_source else 0
                first, last = entries(start, stop, cut, chosen.size)
            sources.append((offset + first, offset + last))
            at = self._target_offset(cut, chosen)
            targets.append((at, at + last - first))
        shape = self.fused_shape if fused_source else self.source_shape(part)
        return Placement(
            source=Region.box(shape, sources), target=Region.box(self.local_shape, targets)
        )

    def offset(self, part: PartName, tp_rank: int, dim: int) -> int:
        """Logical elements of the first kept entry that come before rank r's piece of a part."""
        cut, chosen = self.cuts[dim], self._chosen(part)[dim]
        if not cut.straddle:
            return 0
        start = self._base(cut, chosen) + chosen.span(tp_rank, self.tp_size)[0]
        return start - self._window(cut, chosen, tp_rank)[0] * int(cut.grain)

    def padding(self, tp_rank: int) -> tuple[Region, ...]:
        """The boxes of the local parameter that no checkpoint tensor fills."""
        boxes = []
        for dim, cut in enumerate(self.cuts):
            for part in cut.axis.parts:
                start, stop = part.span(tp_rank, self.tp_size)
                if stop <= part.size:
                    continue
                at = self._target_offset(cut, part)
                left, num_entries = max(part.size - start, 0), self._piece_entries(cut, part)
                if cut.straddle and left:
                    continue  # every rank that has an element keeps as many entries as the others
                used = entries(0, left, cut, left)[1]
                if used == num_entries:
                    continue  # a ragged last entry covers the padding, too
                spans = [(0, n) for n in self.local_shape]
                spans[dim] = (at + used, at + num_entries)
                boxes.append(Region.box(self.local_shape, spans))
        return tuple(boxes)

    def _chosen(self, name: PartName) -> tuple[Part, ...]:
        """One part a dim: the one of this name along the fused dim, the only one along others."""
        fused, known = self.fused_dim, self.part_names
        if name not in known:
            names = ", ".join(map(repr, known)) if fused is not None else "none"
            raise LayoutError(f"has no part {name!r}, needs one of: {names}")
        chosen = [cut.axis.parts[0] for cut in self.cuts]
        if fused is not None:
            chosen[fused] = self.cuts[fused].axis.parts[known.index(name)]
        return tuple(chosen)

    def _base(self, cut: Cut, part: Part) -> int:
        """Logical elements before a part in the checkpoint tensor."""
        if not self.fused_source:
            return 0
        return sum(other.size for other in cut.axis.parts[: cut.axis.parts.index(part)])

    def _window(self, cut: Cut, part: Part, tp_rank: int) -> Span:
        """The entries that cover rank r's piece, as many for every rank, all inside the tensor.

        Grain 128, 192 rows on 2 ranks: rank 0 needs entries 0:1, rank 1 (rows 96:192) 0:2. Both
        keep 0:2.
        """
        grain, base = int(cut.grain), self._base(cut, part)
        whole = cut.axis.size if self.fused_source else part.size
        num_stored = -(-whole // grain)
        spans = [part.span(rank, self.tp_size) for rank in range(self.tp_size)]
        start = base + spans[tp_rank][0]
        ends = [(base + a, base + min(b, part.size)) for a, b in spans if a < part.size]
        count = max((-(-b // grain) - a // grain for a, b in ends), default=0)
        first = min(start // grain, num_stored - count)
        return first, first + count

    def _piece_entries(self, cut: Cut, part: Part) -> int:
        if cut.straddle:
            first, last = self._window(cut, part, 0)
            return last - first
        start, stop = part.span(0, self.tp_size)
        return entries(0, stop - start, cut, stop - start)[1]

    def _target_offset(self, cut: Cut, part: Part) -> int:
        parts = cut.axis.parts
        return sum(self._piece_entries(cut, other) for other in parts[: parts.index(part)])

    def _source_offset(self, cut: Cut, part: Part) -> int:
        if cut.axis.scalars:
            return 0
        at = sum(other.size for other in cut.axis.parts[: cut.axis.parts.index(part)])
        return entries(at, at, cut, -1)[0]


@lru_cache(maxsize=1024)
def _replicated(shape: tuple[int, ...], tp_size: int) -> Layout:
    """One value for equal shapes: models have thousands of norms, biases and scales."""
    cuts = tuple(Cut(axis=Axis.of(n, max_pieces=1)) for n in shape)
    return Layout(cuts=cuts, tp_size=tp_size)
