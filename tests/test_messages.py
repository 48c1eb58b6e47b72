"""Messages in rounds, all processes played in this one, against what the plans themselves say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from lading.dtypes import storage_bytes
from lading.layouts import Layout
from lading.messages import ALIGNMENT_BYTES, Exchange, Packed, Schedule, boxes, schedule
from lading.plan import Plan, Target
from lading.ranks import Ranks
from lading.regions import Copy
from lading.routes import routes

from .oracles import Ints, numbered, positions, run, take
from .test_routes import KINDS, Params, cut, numbers_of, parameters, plan_of, source, whole


def plan(tp_size: int) -> Plan:
    """Tensors of several kinds, TP 1, 2 and 4."""
    layouts = {
        name: KINDS[kind](tp_size)
        for name, kind in (
            ("a", "column"),
            ("b", "row"),
            ("c", "replicated"),
            ("d", "two KV heads"),
            ("e", "padded vocabulary"),
        )
    }
    layouts["f"] = Layout(cuts=(cut(8), whole(1)), tp_size=tp_size)
    targets = [Target(name=n, layout=layout, dtype="BF16") for n, layout in layouts.items()]
    return plan_of(targets, [source(n, *layout.source_shape()) for n, layout in layouts.items()])


@dataclass(frozen=True)
class Case:
    """before and after: which rank of either plan each process has, -1 for none."""

    id: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    buffer_bytes: int


CASES = [
    Case("1 to 2", (0, -1), (0, 1), 2**20),
    Case("2 to 4, small", (0, 1, -1, -1), (3, 2, 1, 0), 200),
    Case("4 to 1, an element at a time", (0, 1, 2, 3), (-1, 0, -1, -1), 1),
    Case("elsewhere", (0, 1, -1, -1), (-1, -1, 1, 0), 1000),
    Case("several have one", (0, 0, 1, 1), (0, 1, 0, 1), 500),
    Case("many want one", (-1, 0, 1, -1), (0, 0, 0, 0), 64),
]


def places(ranks: Sequence[int]) -> dict[Ranks, tuple[int, ...]]:
    found: dict[Ranks, tuple[int, ...]] = {}
    for process, rank in enumerate(ranks):
        if rank >= 0:
            key = Ranks(tp_rank=rank, tp_size=max(ranks) + 1)
            found[key] = (*found.get(key, ()), process)
    return found


def schedules(case: Case, before: Plan, after: Plan) -> list[Schedule]:
    senders, receivers = places(case.before), places(case.after)
    found = routes(before, after, same_process=lambda s, r: set(receivers[r]) <= set(senders[s]))
    return [
        schedule(
            found,
            process=process,
            senders=senders,
            receivers=receivers,
            dtype_of=lambda name: before.target(name).dtype,
            buffer_bytes=case.buffer_bytes,
        )
        for process in range(len(case.before))
    ]


def put(copy: Copy, values: Ints, params: Params, counts: Params) -> None:
    """Values of the copy's source region, in its shape, into a parameter; counted."""
    values = values.transpose(copy.axes) if copy.axes else values
    where = positions(copy.target_region)
    params[copy.target].ravel()[where] = values.ravel()
    np.add.at(counts[copy.target].ravel(), where, 1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_element_arrives_once(case: Case) -> None:
    before, after = plan(max(case.before) + 1), plan(max(case.after) + 1)
    tensors = numbers_of(before)
    have, want = parameters(before, tensors), parameters(after, tensors)
    found = schedules(case, before, after)
    got: list[Params] = []
    counts: list[Params] = []
    for process, rank in enumerate(case.after):
        empty = {name: np.full_like(a, -7) for name, a in want[max(rank, 0)].items()}
        got.append(empty)
        counts.append({name: np.zeros_like(a) for name, a in empty.items()})
        for copy in found[process].kept:
            param = have[case.before[process]][copy.source]
            put(copy, take(param, copy.source_region), got[process], counts[process])
    pending = [list(one.exchanges) for one in found]
    while any(pending):
        # A process without a partner in its next round waits: take one that all partners are at.
        heads = [of_one[0] if of_one else None for of_one in pending]
        ready = [p for p, head in enumerate(heads) if head is not None and agrees(p, heads)]
        assert ready, "no process waits for ever"
        for process in ready:
            exchange = heads[process]
            assert exchange is not None
            limit = max(case.buffer_bytes, 2 * ALIGNMENT_BYTES)
            assert exchange.sent_bytes + exchange.received_bytes <= limit
            for peer, packed in exchange.receives.items():
                deliver(packed, have[case.before[peer]], got[process], counts[process])
        for process in ready:
            pending[process].pop(0)
    for process, rank in enumerate(case.after):
        for name, wanted in want[rank].items() if rank >= 0 else ():
            padding = wanted == -2
            np.testing.assert_array_equal(got[process][name][~padding], wanted[~padding])
            assert (counts[process][name] == ~padding).all()


def agrees(process: int, heads: Sequence[Exchange | None]) -> bool:
    """Whether this process and all whom its round names name one another with equal buffers."""
    waiting, seen = [process], {process}
    while waiting:
        number = waiting.pop()
        mine = heads[number]
        if mine is None:
            return False
        for peer in {*mine.sends, *mine.receives}:
            other = heads[peer]
            if other is None:
                return False
            if mine.sends.get(peer) != other.receives.get(number):
                return False
            if mine.receives.get(peer) != other.sends.get(number):
                return False
            if peer not in seen:
                seen.add(peer)
                waiting.append(peer)
    return True


def deliver(packed: Packed, sender: Params, params: Params, counts: Params) -> None:
    reached = 0
    for at, message in packed.messages:
        assert at >= reached, "messages do not overlap"
        assert at % ALIGNMENT_BYTES == 0
        size = storage_bytes(message.dtype)
        assert message.num_bytes == message.region.num_elements * size
        reached = at + message.num_bytes
        values = take(sender[message.source], message.region)
        for copy in message.copies:
            assert copy.source_region == message.region
            put(copy, values, params, counts)
    assert reached <= packed.num_bytes


def test_what_goes_to_two_places_of_a_process_is_sent_once() -> None:
    layout = Layout.replicated((50,))
    first = plan_of([Target(name="a", layout=layout, dtype="BF16")], [source("a", 50)])
    (route,) = routes(first, first)
    ranks = Ranks()
    (sent, received) = (
        schedule(
            [route, route],
            process=process,
            senders={ranks: (0,)},
            receivers={ranks: (1,)},
            dtype_of=lambda _name: "BF16",
            buffer_bytes=1000,
        )
        for process in range(2)
    )
    ((exchange,), (other,)) = sent.exchanges, received.exchanges
    assert (exchange.sent_bytes, other.received_bytes) == (112, 112)
    ((_, message),) = other.receives[0].messages
    assert len(message.copies) == 2


@pytest.mark.parametrize("limit", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("size", [(), (7,), (3, 4), (2, 1, 5), (0, 4)], ids=str)
def test_boxes_make_up_a_tensor(size: tuple[int, ...], limit: int) -> None:
    found = list(boxes(size, limit))
    assert [n for box in found for n in positions(box)] == list(numbered(size).ravel())
    assert all(box.num_elements <= limit for box in found)


def test_copies_of_messages_are_copies() -> None:
    """A box of a copy is what the copy itself does there."""
    before, after = plan(2), plan(4)
    whole_routes = routes(before, after)
    sent = schedules(Case("", (0, 1, -1, -1), (0, 1, 2, 3), 100), before, after)
    tensors = numbers_of(before)
    have = parameters(before, tensors)
    for one in sent[2].exchanges:
        for peer, packed in one.receives.items():
            for _, message in packed.messages:
                (copy,) = message.copies
                for route in whole_routes:
                    same = (route.copy.source, route.copy.target) == (copy.source, copy.target)
                    if not same or route.sender.tp_rank != peer or route.receiver.tp_rank != 2:
                        continue
                    box, full = (
                        np.full(after.target(copy.target).layout.local_shape, -1) for _ in "ab"
                    )
                    run(copy, have[peer][copy.source], box)
                    run(route.copy, have[peer][copy.source], full)
                    assert ((box == full) | (box == -1)).all()
