"""What processes send to one another when a model is cut in another way: routes as messages, in
rounds of bounded size. Pure: the same on every process, no torch, no group.

A process is its number in the group. In a round a process sends each other one at most one buffer,
in which messages lie one after the other; a round ends where some process' share of it is full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lading import dtypes
from lading.ranks import Ranks
from lading.regions import Copy, Region
from lading.routes import Route

__all__ = ["Exchange", "Message", "Packed", "Schedule", "schedule"]

ALIGNMENT_BYTES = 16
"""Where a message may begin in a buffer: a multiple of the size of every dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A box of one process' parameter, for one other process.

    source, region   the sender's parameter, and the box in its coordinates
    copies           what the receiver does with it: each copies all of the box
    num_bytes        without the gap before the next message
    """

    sender: int
    receiver: int
    source: str
    region: Region
    dtype: str
    copies: tuple[Copy, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Messages to or from one process in one buffer, each with where it begins there."""

    num_bytes: int
    messages: tuple[tuple[int, Message], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One round of one process: what it sends to whom, and what comes from whom."""

    sends: Mapping[int, Packed]
    receives: Mapping[int, Packed]

    @property
    def sent_bytes(self) -> int:
        """Of all buffers to send."""
        return sum(packed.num_bytes for packed in self.sends.values())

    @property
    def received_bytes(self) -> int:
        """Of all buffers to receive."""
        return sum(packed.num_bytes for packed in self.receives.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """All that one process does.

    kept        copies from its own source to its own target
    exchanges   its rounds, in order; one without it is left out
    """

    kept: tuple[Copy, ...]
    exchanges: tuple[Exchange, ...]


def schedule(
    found: Iterable[Route],
    *,
    process: int,
    senders: Mapping[Ranks, Sequence[int]],
    receivers: Mapping[Ranks, Sequence[int]],
    dtype_of: Callable[[str], str],
    buffer_bytes: int,
) -> Schedule:
    """What one process does for these routes; every process finds the same rounds.

    senders, receivers   the processes that hold a rank of the first model, of the second
    dtype_of             of a parameter of the first model
    buffer_bytes         of what a process has in memory on its way, in and out together
    """
    kept: list[Copy] = []
    grouped: dict[tuple[int, int, str, Region], list[Copy]] = {}
    for route in found:
        holders = senders[route.sender]
        for number, receiver in enumerate(receivers[route.receiver]):
            if receiver not in holders:
                sender = holders[number % len(holders)]
                key = (sender, receiver, route.copy.source, route.copy.source_region)
                grouped.setdefault(key, []).append(route.copy)
            elif receiver == process:
                kept.append(route.copy)
    limit = max(buffer_bytes // 2 // ALIGNMENT_BYTES, 1) * ALIGNMENT_BYTES
    rounds = _Rounds(process, limit)
    for (sender, receiver, source, region), copies in grouped.items():
        dtype = dtype_of(source)
        size = dtypes.storage_bytes(dtype)
        for inner in boxes(region.size, max(limit // size, 1)):
            box = region.compose(inner)
            message = Message(
                sender=sender,
                receiver=receiver,
                source=source,
                region=box,
                dtype=dtype,
                copies=tuple(_of_box(copy, box) for copy in copies),
                num_bytes=box.num_elements * size,
            )
            rounds.add(message)
    return Schedule(kept=tuple(kept), exchanges=rounds.finish())


def _of_box(copy: Copy, box: Region) -> Copy:
    """The share of a copy that comes from a box of its source."""
    found = copy.invert().restrict(box)
    assert found is not None, "the box is in the copy's region"
    return found.invert()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(slots=True)
class _Rounds:
    """Fills one round after the other, for all processes; keeps what is this one's."""

    process: int
    limit: int
    _sent: dict[int, int] = field(default_factory=dict)
    _received: dict[int, int] = field(default_factory=dict)
    _open: list[Message] = field(default_factory=list)
    _done: list[Exchange] = field(default_factory=list)

    def add(self, message: Message) -> None:
        """Adds a message to this round, or to the next where it is full for either end."""
        size = _padded(message.num_bytes)
        sent = self._sent.get(message.sender, 0) + size
        received = self._received.get(message.receiver, 0) + size
        if max(sent, received) > self.limit and (self._sent or self._received):
            self._close()
            sent = received = size
        self._sent[message.sender] = sent
        self._received[message.receiver] = received
        if self.process in (message.sender, message.receiver):
            self._open.append(message)

    def finish(self) -> tuple[Exchange, ...]:
        """The rounds, when all messages are in them."""
        self._close()
        return tuple(self._done)

    def _close(self) -> None:
        if self._open:
            sends = [m for m in self._open if m.sender == self.process]
            receives = [m for m in self._open if m.receiver == self.process]
            self._done.append(
                Exchange(
                    sends=_pack((message.receiver, message) for message in sends),
                    receives=_pack((message.sender, message) for message in receives),
                )
            )
        self._open = []
        self._sent, self._received = {}, {}


def _pack(messages: Iterable[tuple[int, Message]]) -> dict[int, Packed]:
    by_peer: dict[int, list[Message]] = {}
    for peer, message in messages:
        by_peer.setdefault(peer, []).append(message)
    found = {}
    for peer, of_peer in by_peer.items():
        at, placed = 0, []
        for message in of_peer:
            placed.append((at, message))
            at += _padded(message.num_bytes)
        found[peer] = Packed(num_bytes=at, messages=tuple(placed))
    return found


def boxes(size: tuple[int, ...], limit: int) -> Iterator[Region]:
    """Boxes of at most `limit` elements that make up a tensor of this size, in row-major order."""
    waiting = [Region.whole(size)]
    while waiting:
        box = waiting.pop()
        if not box.num_elements:
            continue
        dim = next((d for d, n in enumerate(box.size) if n > 1), None)
        if box.num_elements <= limit or dim is None:
            yield box
            continue
        row = box.num_elements // box.size[dim]
        step = max(limit // row, 1)
        parts = []
        for at in range(0, box.size[dim], step):
            count = min(step, box.size[dim] - at)
            start = (*box.start[:dim], box.start[dim] + at, *box.start[dim + 1 :])
            sizes = (*box.size[:dim], count, *box.size[dim + 1 :])
            parts.append(Region(shape=box.shape, start=start, size=sizes, step=box.step))
        waiting += reversed(parts)
