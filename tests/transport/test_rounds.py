"""What is exchanged, from plan facts alone: each need met once, from bands that are read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.checkpoint import Source
from lading.layers import Layer
from lading.layouts import Axis, Cut, Layout
from lading.plan import Plan, Target, make_plan
from lading.ranks import all_ranks
from lading.specs import dense_specs
from lading.transport.rounds import AUTOMATIC, Rounds, Sharing, plan_rounds

from ..oracles import index_of, numbered, take
from .test_moving import Case, cases

(WEIGHT,) = dense_specs(bias=False)
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int32: "I32", torch.uint8: "U8"}
EVERYTHING = Sharing(run_bytes=1 << 30, share_bytes=1)


def sources_of(tensors: dict[str, torch.Tensor]) -> dict[str, Source]:
    found, at = {}, 0
    for name, tensor in tensors.items():
        found[name] = Source(
            name=name,
            dtype=CODES[tensor.dtype],
            shape=tuple(tensor.shape),
            file="model.safetensors",
            offset_bytes=at,
            num_bytes=tensor.nbytes,
        )
        at += tensor.nbytes
    return found


def plan_of(case: Case) -> Plan:
    return make_plan(case.targets, sources_of(case.full), ranks=all_ranks(case.size))


def one(layout: Layout, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Plan:
    tensors = {"w.weight": torch.zeros(shape, dtype=dtype)}
    target = Target(name="w.weight", layout=layout, dtype=CODES[dtype])
    return make_plan([target], sources_of(tensors), ranks=all_ranks(layout.tp_size))


def rounds_of(plan: Plan, sharing: Sharing = EVERYTHING, bucket_bytes: int = 1 << 20) -> Rounds:
    return plan_rounds(plan, lambda _: True, sharing=sharing, bucket_bytes=bucket_bytes)


@settings(max_examples=60, deadline=None)
@given(case=cases(), bucket_bytes=st.sampled_from([600, 3000, 50_000, 1 << 20]))
def test_every_need_is_met_once(case: Case, bucket_bytes: int) -> None:
    plan = plan_of(case)
    found = rounds_of(plan, bucket_bytes=bucket_bytes)
    order = [(slab.shared.source.offset_bytes, slab.rows) for part in found.rounds for slab in part]
    assert order == sorted(order), "in the order of the file"
    read = {name: np.zeros(source.shape, dtype=int) for name, source in plan.sources.items()}
    for rank in range(case.size):
        copies = {(c.target, c.part, c.source): c for c in plan.shares[rank].copies}
        written = {t.name: np.full(t.layout.local_shape, -1) for t in plan.targets}
        for part in found.rounds:
            for slab in part:
                shared = slab.shared
                kind = shared.kind
                own = kind.band_region(slab.rows, rank)
                read[shared.source.name].reshape(own.shape)[index_of(own)] += 1
                for reader in range(case.size):
                    band = take(numbered(shared.source.shape), kind.band_region(slab.rows, reader))
                    for block in kind.blocks(slab.rows, reader, rank):
                        target = written[shared.bindings[block.binding].target]
                        view = target.reshape(block.target.shape)
                        assert (view[index_of(block.target)] == -1).all(), "once"
                        view[index_of(block.target)] = take(band, block.band)
        for key in found.keys & copies.keys():
            copy = copies[key]
            needed = take(numbered(plan.sources[copy.source].shape), copy.source_region)
            assert (take(written[copy.target], copy.target_region) == needed).all()
            view = written[copy.target].reshape(copy.target_region.shape)
            view[index_of(copy.target_region)] = -1
        assert all((array == -1).all() for array in written.values()), "nothing else"
    exchanged = {source for _, _, source in found.keys}
    for name, counts in read.items():
        assert (counts == (1 if name in exchanged else 0)).all()


@settings(max_examples=60, deadline=None)
@given(case=cases(), bucket_bytes=st.sampled_from([600, 3000, 50_000]))
def test_a_round_has_room(case: Case, bucket_bytes: int) -> None:
    """Counted message by message, as they lie in the buffers, on every rank."""
    found = rounds_of(plan_of(case), bucket_bytes=bucket_bytes)
    limits = (found.band_bytes, found.packed_bytes, found.landed_bytes)
    assert max(limits) <= bucket_bytes
    for part in found.rounds:
        for rank in range(case.size):
            used = [0, 0, 0]
            for slab in part:
                kind, size = slab.shared.kind, slab.shared.kind.element_bytes
                band = kind.band_region(slab.rows, rank)
                used[0] = max(used[0], slab.at + band.num_elements * size)
                peers = [peer for peer in range(case.size) if peer != rank]
                sent = {b.band for p in peers for b in kind.blocks(slab.rows, rank, p)}
                received = [b.target for p in peers for b in kind.blocks(slab.rows, p, rank)]
                for which, boxes in ((1, sent), (2, received)):
                    for box in boxes:
                        if box.runs().num_runs > 1:
                            used[which] += -(-box.num_elements * size // 128) * 128
            assert all(u <= limit for u, limit in zip(used, limits, strict=True))


ROW = Layer.row(4 * 1024, 512).layout(WEIGHT, 4)  # [512, 4096] -> [512, 1024]
TWO = Layer.row(2 * 256, 4096).layout(WEIGHT, 2)  # runs of 1 KiB, every other
EIGHT = Layer.row(8 * 256, 4096).layout(WEIGHT, 8)
WHOLE = Layer.replicated(512, 2048).layout(WEIGHT, 4)


@pytest.mark.parametrize(
    ("layout", "shape", "sharing", "is_exchanged"),
    [
        pytest.param(ROW, (512, 4096), Sharing(), True, id="runs of 4 KiB, 2 MiB each"),
        pytest.param(ROW, (512, 4096), Sharing(run_bytes=4096), False, id="no shorter than that"),
        pytest.param(ROW, (512, 4096), Sharing(share_bytes=2**21), True, id="just enough"),
        pytest.param(ROW, (512, 4096), Sharing(share_bytes=2**21 + 1), False, id="too little"),
        pytest.param(ROW, (512, 4096), AUTOMATIC, False, id="long runs are read as fast"),
        pytest.param(TWO, (4096, 512), AUTOMATIC, False, id="half of the gaps are kept anyway"),
        pytest.param(TWO, (4096, 512), Sharing(cost=2.0), True, id="the same, but asked for"),
        pytest.param(EIGHT, (4096, 2048), AUTOMATIC, True, id="1 of 8 KiB: four more a call"),
        pytest.param(WHOLE, (2048, 512), Sharing(), True, id="replicated"),
        pytest.param(
            Layer.replicated(511, 512).layout(WEIGHT, 4), (512, 511), Sharing(), False, id="small"
        ),
        pytest.param(
            Layer.column(512, [8192]).layout(WEIGHT, 4), (8192, 512), Sharing(), False, id="rows"
        ),
        pytest.param(Layout.replicated((), 4), (), Sharing(share_bytes=1), False, id="a scalar"),
        pytest.param(
            Layout.replicated((1, 1), 4), (1, 1), Sharing(share_bytes=1), False, id="one element"
        ),
    ],
)
def test_what_is_exchanged(
    layout: Layout, shape: tuple[int, ...], sharing: Sharing, is_exchanged: bool
) -> None:
    assert bool(rounds_of(one(layout, shape), sharing).rounds) is is_exchanged


def bands(found: Rounds, rank: int) -> list[Sequence[tuple[int, int]]]:
    return [[s.shared.kind.band(s.rows, rank) for s in part] for part in found.rounds]


def test_bands_of_an_example() -> None:
    found = rounds_of(one(Layer.row(4 * 3, 10).layout(WEIGHT, 4), (10, 12)))
    assert [bands(found, rank) for rank in range(4)] == [
        [[(0, 2)]],
        [[(2, 5)]],
        [[(5, 7)]],
        [[(7, 10)]],
    ]


def test_a_tensor_larger_than_a_bucket_is_cut_into_slabs() -> None:
    found = rounds_of(one(WHOLE, (2048, 512)), bucket_bytes=300_000)
    # 4 bands of 2048 bytes a row: at most 146 rows a band, so 4 slabs of 512 rows
    assert bands(found, 1) == [[(128, 256)], [(640, 768)], [(1152, 1280)], [(1664, 1792)]]
    assert rounds_of(one(WHOLE, (2048, 512)), bucket_bytes=2047).rounds == (), "not even a row"


def test_a_first_dim_of_one_entry_is_not_cut() -> None:
    cut = Cut(axis=Axis.of(12))
    whole = [Cut(axis=Axis.of(n, max_pieces=1)) for n in (1, 7)]
    found = rounds_of(one(Layout(cuts=(*whole, cut), tp_size=3), (1, 7, 12)))
    assert [bands(found, rank) for rank in range(3)] == [[[(0, 2)]], [[(2, 4)]], [[(4, 7)]]]


def test_only_usable_targets_of_the_same_dtype() -> None:
    plan = one(WHOLE, (2048, 512))
    found = plan_rounds(plan, lambda _: False, sharing=EVERYTHING, bucket_bytes=1 << 20)
    assert found.rounds == ()
    target = Target(name="w.weight", layout=WHOLE, dtype="BF16")
    cast = make_plan([target], plan.sources, ranks=all_ranks(4))
    assert rounds_of(cast).rounds == ()


def test_of_a_fused_tensor_only_the_shared_parts() -> None:
    """6 q heads of 4 rows, 1 KV head that three ranks keep: rows 24:28 and 28:32 of 32."""
    layout = Layer.qkv(5, 4, 6, 1).layout(WEIGHT, 3)
    sources = sources_of({"qkv_proj.weight": torch.zeros(32, 5)})
    target = Target(name="qkv_proj.weight", layout=layout, dtype="F32")
    found = rounds_of(make_plan([target], sources, ranks=all_ranks(3)))
    rows = [(slab.shared.bindings[0].part, slab.rows) for slab in found.rounds[0]]
    assert rows == [("k", (24, 28)), ("v", (28, 32))]


def test_the_digest_is_of_what_is_exchanged() -> None:
    first = rounds_of(one(WHOLE, (2048, 512)))
    assert rounds_of(one(WHOLE, (2048, 512))).digest == first.digest
    others = [
        rounds_of(one(ROW, (512, 4096))),
        rounds_of(one(WHOLE, (2048, 512)), bucket_bytes=1 << 19),
        rounds_of(one(Layer.replicated(512, 2048).layout(WEIGHT, 2), (2048, 512))),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 4
