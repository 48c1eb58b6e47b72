"""Pieces and routes against brute force: every rank's parameters as arrays of element numbers."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lading import models
from lading import routes as routes_module
from lading.checkpoint import Source
from lading.dtypes import BITS
from lading.errors import CallError, LayoutError, PlanError
from lading.layers import Layer
from lading.layouts import Axis, Cut, Layout, Part
from lading.plan import Plan, Skipped, Target, make_plan
from lading.preflight import preflight
from lading.ranks import Ranks, all_ranks
from lading.regions import Copy, Region
from lading.routes import Route, holdings, pieces, routes

from .models.made import CASES, Case, oracle, stored
from .oracles import Ints, numbered, positions, run, take
from .schemes.checkpoints import (
    FP8_CONFIG,
    GPTQ_CONFIG,
    fp8_static,
    gptq,
    model_tensors,
    write_model,
)

FEW = settings(max_examples=80, deadline=None)
Params = dict[str, Ints]
PADDING = -2


def source(name: str, *shape: int, dtype: str = "BF16") -> Source:
    num_bytes = prod(shape) * BITS[dtype] // 8
    return Source(
        name=name, dtype=dtype, shape=shape, file="a.safetensors", offset_bytes=0,
        num_bytes=num_bytes,
    )  # fmt: skip


def numbers_of(plan: Plan) -> Params:
    """Every checkpoint tensor, no two elements of all of them equal."""
    found: Params = {}
    at = 0
    for name in holdings(plan):
        shape = plan.sources[name].storage_shape
        found[name] = numbered(shape) + at
        at += found[name].size
    return found


def parameters(plan: Plan, tensors: Mapping[str, Ints]) -> dict[int, Params]:
    """What a load gives each rank: by the plan's own copies, which the plan's tests check."""
    found: dict[int, Params] = {}
    for share in plan.shares:
        of_rank = {
            t.name: np.full(t.layout.local_shape, -1) for t in plan.targets if t.expected is None
        }
        for copy in share.copies:
            run(copy, tensors[copy.source], of_rank[copy.target])
        for fill in share.fills:
            take(of_rank[fill.target], fill.region)  # it is a region of it
            mask = np.zeros(fill.region.shape, dtype=bool)
            mask.ravel()[positions(fill.region)] = True
            of_rank[fill.target].reshape(fill.region.shape)[mask] = PADDING
        found[share.ranks.tp_rank] = of_rank
    return found


def check_pieces(plan: Plan) -> None:
    tensors = numbers_of(plan)
    held = parameters(plan, tensors)
    for name, tensor in tensors.items():
        seen: Counter[int] = Counter()
        for piece in pieces(plan, name):
            values = take(tensor, piece.region)
            seen.update(int(n) for n in values.ravel())
            wanted = {
                rank
                for rank, params in held.items()
                if any(np.isin(values, param).any() for param in params.values())
            }
            assert [h.ranks.tp_rank for h in piece.holders] == sorted(
                h.ranks.tp_rank for h in piece.holders
            )
            assert {h.ranks.tp_rank for h in piece.holders} == wanted
            for holder in piece.holders:
                assert holder.copy.source_region == piece.region
                out = np.full(tensor.size, -1)
                param = held[holder.ranks.tp_rank][holder.copy.target]
                run(holder.copy.invert(), param, out.reshape(piece.region.shape))
                where = positions(piece.region)
                assert (out[where] == tensor.ravel()[where]).all()
        assert seen == Counter(int(n) for n in tensor.ravel())


def check_routes(before: Plan, after: Plan, **how: Any) -> tuple[Route, ...]:
    tensors = numbers_of(before)
    have, want = parameters(before, tensors), parameters(after, tensors)
    written: dict[tuple[int, str], Ints] = {}
    got: dict[int, Params] = {}
    for share in after.shares:
        rank = share.ranks.tp_rank
        got[rank] = {name: np.full_like(a, -1) for name, a in want[rank].items()}
        written.update({(rank, name): np.zeros_like(a) for name, a in want[rank].items()})
    found = routes(before, after, **how)
    for route in found:
        sender, receiver = route.sender.tp_rank, route.receiver.tp_rank
        param = have[sender][route.copy.source]
        run(route.copy, param, got[receiver][route.copy.target])
        counts = written[receiver, route.copy.target].reshape(route.copy.target_region.shape)
        counts.ravel()[positions(route.copy.target_region)] += 1
    for rank, params in want.items():
        for name, wanted in params.items():
            padding = wanted == PADDING
            np.testing.assert_array_equal(got[rank][name][~padding], wanted[~padding])
            assert (written[rank, name] == ~padding).all(), "each element once, padding never"
    return found


def plan_of(
    targets: Sequence[Target], sources: Sequence[Source], ranks: Sequence[Ranks] | None = None
) -> Plan:
    by_name = {one.name: one for one in sources}
    return make_plan(targets, by_name, ranks=ranks or all_ranks(targets[0].layout.tp_size))


def one(layout: Layout, *, name: str = "w.weight", stored: tuple[int, ...] | None = None) -> Plan:
    """A plan of one tensor of one part."""
    shape = layout.source_shape() if stored is None else stored
    target = Target(name=name, layout=layout, dtype="BF16", stored=stored)
    return plan_of([target], [source(name, *shape)])


def cut(size: int, *, pieces: int | None = None, unit: int = 1, pad_to: int = 0, **how: Any) -> Cut:
    part = Part(size=size, max_pieces=pieces, unit=unit, pad_to=pad_to)
    return Cut(axis=Axis(parts=(part,)), **how)


def whole(size: int) -> Cut:
    return cut(size, pieces=1)


def straddled(size: int, tp_size: int, grain: int) -> Layout:
    """Scales, one for `grain` rows: an entry that a cut goes through is kept on both sides."""
    return Layout(
        cuts=(cut(size, grain=Fraction(grain), ragged=True, straddle=True), whole(3)),
        tp_size=tp_size,
    )


KINDS: dict[str, Callable[[int], Layout]] = {
    "column": lambda t: Layout(cuts=(cut(120), whole(5)), tp_size=t),
    "row": lambda t: Layout(cuts=(whole(5), cut(120)), tp_size=t),
    "replicated": lambda t: Layout.replicated((7, 3), t),
    "a number": lambda t: Layout.replicated((), t),
    "two KV heads": lambda t: Layout(cuts=(cut(24, pieces=2, unit=12), whole(5)), tp_size=t),
    "padded vocabulary": lambda t: Layout(cuts=(cut(101, pad_to=8), whole(3)), tp_size=t),
    "packed rows": lambda t: Layout(cuts=(cut(960, grain=Fraction(8)), whole(3)), tp_size=t),
    "3 bits": lambda t: Layout(cuts=(whole(3), cut(3840, grain=Fraction(32, 3))), tp_size=t),
    "straddled scales": lambda t: straddled(192, t, 128),
    "straddled scales, more": lambda t: straddled(720, t, 50),
}


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("before", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cut(kind: str, before: int, after: int) -> None:
    try:
        plans = one(KINDS[kind](before)), one(KINDS[kind](after))
    except LayoutError:
        assert {before, after} & {3, 5, 6, 8}, "these divide"
        return
    check_routes(*plans)
    if before == after:
        check_pieces(plans[0])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 1), (4, 8), (8, 2), (2, 2)])
@pytest.mark.parametrize("fused", [(False, False), (True, True)], ids=["parts", "fused"])
def test_qkv_with_shared_heads(before: int, after: int, fused: tuple[bool, bool]) -> None:
    def made(tp_size: int, is_fused: bool) -> Plan:
        layer = Layer.qkv(5, 4, 16, 2)
        name = "attn.qkv_proj.weight"
        target = Target(name=name, layout=layer.layout(layer.specs()[0], tp_size), dtype="BF16")
        parts = [
            source(f"attn.{n}_proj.weight", o, 5) for n, o in zip("qkv", (64, 8, 8), strict=True)
        ]
        return plan_of([target], [source(name, 80, 5)] if is_fused else parts)

    plans = made(before, fused[0]), made(after, fused[1])
    check_pieces(plans[0])
    check_routes(*plans)


def test_one_tensor_in_two_views() -> None:
    """A fused [3 * D, I] that one plan sees as [3, D, I], cut inside each third."""
    thirds = Layout(cuts=(whole(3), cut(8), whole(6)), tp_size=4)
    rows = Layout(cuts=(cut(24), whole(6)), tp_size=3)
    columns = Layout(cuts=(whole(24), cut(6)), tp_size=2)
    plans = [one(thirds, stored=(24, 6)), one(rows), one(columns)]
    for before in plans:
        for after in plans:
            check_routes(before, after)
    assert len(routes(plans[2], plans[0])) == 4 * 2, "a box of columns stays one box"


def test_views_without_a_common_one() -> None:
    first = one(Layout(cuts=(whole(4), cut(6)), tp_size=2), stored=(24,))
    second = one(Layout(cuts=(cut(6), whole(4)), tp_size=3), stored=(24,))
    check_routes(first, second)
    check_routes(second, first)


@st.composite
def layouts(draw: Callable[..., Any], sizes: tuple[int, ...], units: tuple[int, ...]) -> Layout:
    """A cut of a tensor of these logical sizes, along one dim or none, whichever way."""
    tp_size = draw(st.sampled_from([1, 2, 3, 4, 6]))
    dim = draw(st.integers(0, len(sizes)))
    limit = draw(st.sampled_from([None, 1, 2, 3]))
    cuts = [
        cut(size, pieces=limit if at == dim else 1, unit=unit)
        for at, (size, unit) in enumerate(zip(sizes, units, strict=True))
    ]
    try:
        return Layout(cuts=tuple(cuts), tp_size=tp_size)
    except LayoutError:
        assume(False)
        raise


@FEW
@given(st.data())
def test_random_layouts(data: st.DataObject) -> None:
    units = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    sizes = tuple(unit * data.draw(st.sampled_from([1, 2, 3, 4, 6])) for unit in units)
    before, after = (one(data.draw(layouts(sizes, units))) for _ in range(2))
    check_pieces(before)
    check_routes(before, after)


def strided(plan: Plan) -> Plan:
    """The plan of one tensor with rank r keeping every T-th row of it: no layout says that yet."""
    (target,) = plan.targets
    rows, columns = plan.sources[target.name].shape
    shares = []
    tp_size = plan.tp_size
    for share in plan.shares:
        start, size = share.ranks.tp_rank, rows // tp_size
        region = Region(
            shape=(rows, columns), start=(start, 0), size=(size, columns), step=(tp_size, 1)
        )
        (old,) = share.copies
        copy = Copy(
            source=old.source, target=old.target, part=None, source_region=region,
            target_region=Region.whole((size, columns)),
        )  # fmt: skip
        shares.append(replace(share, copies=(copy,)))
    return replace(plan, shares=tuple(shares))


@pytest.mark.parametrize("other", [1, 2, 3, 4])
@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_strided_regions(tp_size: int, other: int) -> None:
    plain = one(Layout(cuts=(cut(24), whole(3)), tp_size=tp_size))
    every = strided(plain)
    check_pieces(every)
    plan = one(Layout(cuts=(cut(24), whole(3)), tp_size=other))
    check_routes(every, plan)
    check_routes(plan, every)
    if other > 1:
        check_routes(every, strided(plan))


def test_axes_in_another_order() -> None:
    """A parameter that holds the transpose of the checkpoint's tensor."""
    plain = one(Layout(cuts=(cut(8), whole(6)), tp_size=2))
    (target,) = plain.targets
    shares = []
    for share in plain.shares:
        (old,) = share.copies
        copy = replace(old, axes=(1, 0), target_region=Region.whole((6, 4)))
        shares.append(replace(share, copies=(copy,)))
    turned = replace(
        plain,
        shares=tuple(shares),
        targets=(replace(target, layout=Layout(cuts=(whole(6), cut(8)), tp_size=2)),),
    )
    check_pieces(turned)
    other = one(Layout(cuts=(cut(8), whole(6)), tp_size=4))
    check_routes(turned, other)
    check_routes(other, turned)
    check_routes(turned, turned)


def model_plan(case: Case, tp_size: int, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    config = models.parse_config(case.raw())
    sources = {name: source(name, *shape) for name, shape in shapes.items()}
    names = models.FAMILIES[config.family].names.fitting(sources)
    targets = models.targets(models.declare(config), tp_size, "BF16")
    return make_plan(targets, sources, ranks=all_ranks(tp_size), names=names)


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """The shapes that transformers gives the model's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in stored(oracle(case)).items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_whole_models(case: Case) -> None:
    shapes = shapes_of(case)
    plans = []
    for tp_size in (1, 2, 3, 6):
        try:
            plans.append(model_plan(case, tp_size, shapes))
        except PlanError:
            assert tp_size > 1, "one rank is always possible"
    assert len(plans) > 1
    for before, after in zip(plans, [*plans[1:], plans[0]], strict=True):
        check_routes(before, after)
    check_pieces(plans[-1])


@pytest.mark.parametrize("scheme", ["gptq", "fp8"])
def test_whole_quantised_models(scheme: str, tmp_path: Path) -> None:
    """Packed words, groups, scalars of several parts, constants, a padded vocabulary."""
    make = {"gptq": gptq, "fp8": fp8_static}[scheme]
    configs: dict[str, dict[str, Any]] = {"gptq": GPTQ_CONFIG, "fp8": dict(FP8_CONFIG)}
    folder = write_model(tmp_path, model_tensors(make), configs[scheme])
    plans = [preflight(folder, all_ranks(tp_size)).plan for tp_size in (1, 2, 4)]
    for before in plans:
        check_pieces(before)
        for after in plans:
            check_routes(before, after)


def test_who_sends_is_balanced() -> None:
    """8 ranks hold all; 2 new processes need it: each of the 8 sends a share."""

    def targets(tp_size: int) -> list[Target]:
        layout = Layout.replicated((100,), tp_size)
        return [Target(name=f"norm.{i}", layout=layout, dtype="BF16") for i in range(16)]

    sources = [source(f"norm.{i}", 100) for i in range(16)]
    before, after = plan_of(targets(8), sources), plan_of(targets(2), sources)
    found = check_routes(before, after, same_process=lambda _one, _two: False)
    assert set(Counter(route.sender.tp_rank for route in found).values()) == {4}


def test_what_the_receiver_has_is_not_sent() -> None:
    def layout(tp_size: int) -> Layout:
        return Layout(cuts=(cut(24, pieces=2, unit=12), whole(5)), tp_size=tp_size)

    found = check_routes(one(layout(4)), one(layout(2)))
    assert [(r.sender.tp_rank, r.receiver.tp_rank) for r in found] == [(0, 0), (2, 1)]
    moved = check_routes(
        one(layout(4)),
        one(layout(2)),
        same_process=lambda a, b: a.tp_rank == 3 - b.tp_rank,  # ranks 3 and 2 become 0 and 1
    )
    assert [(r.sender.tp_rank, r.receiver.tp_rank) for r in moved] == [(0, 0), (2, 1)]


def test_routes_of_some_receivers() -> None:
    layout = Layout(cuts=(cut(24), whole(5)), tp_size=2)
    target = Target(name="w.weight", layout=layout, dtype="BF16")
    some = plan_of([target], [source("w.weight", 24, 5)], [Ranks(tp_rank=1, tp_size=2)])
    found = check_routes(one(Layout(cuts=(cut(24), whole(5)), tp_size=4)), some)
    assert [(r.sender.tp_rank, r.receiver.tp_rank) for r in found] == [(2, 1), (3, 1)]


def test_ranks_that_were_not_planned() -> None:
    layout = Layout(cuts=(cut(24), whole(5)), tp_size=4)
    target = Target(name="w.weight", layout=layout, dtype="BF16")
    ranks = [Ranks(tp_rank=r, tp_size=4) for r in (2, 0)]
    some = plan_of([target], [source("w.weight", 24, 5)], ranks)
    message = "plan: is not made for rank 1 of 4, rank 3 of 4, needs all ranks (who holds it)."
    for call in (lambda: pieces(some, "w.weight"), lambda: routes(some, some)):
        with pytest.raises(PlanError) as caught:
            call()
        assert str(caught.value) == message
    assert [h.ranks.tp_rank for h in holdings(some)["w.weight"]] == [0, 2], "in rank order"


def test_an_element_that_nobody_holds() -> None:
    plan = one(Layout(cuts=(cut(24), whole(5)), tp_size=2))
    first, second = plan.shares
    plan = replace(plan, shares=(first, replace(second, copies=())))
    with pytest.raises(PlanError) as caught:
        pieces(plan, "w.weight")
    assert str(caught.value) == (
        "w.weight: elements [12:24, 0:5] of [24, 5] are held by no rank, needs exactly one piece."
    )
    with pytest.raises(PlanError, match="are held by no rank"):
        routes(plan, plan)


def test_a_tensor_that_nobody_keeps() -> None:
    with pytest.raises(CallError) as caught:
        pieces(one(Layout.replicated((3,))), "other")
    assert str(caught.value) == "other: no rank of the plan keeps any of it."


def test_plans_of_different_checkpoints() -> None:
    def plan(**shapes: tuple[int, ...]) -> Plan:
        targets = [
            Target(name=n, layout=Layout.replicated(s), dtype="BF16") for n, s in shapes.items()
        ]
        return plan_of(targets, [source(n, *s) for n, s in shapes.items()])

    before = plan(a=(3,), b=(4, 2), d=(5,))
    after = plan(a=(3,), b=(2, 4), c=(5,))
    with pytest.raises(PlanError) as caught:
        routes(before, after)
    assert str(caught.value) == (
        "the pair of plans has 3 problems:\n"
        "  c: no rank of the first plan keeps it, the second one needs it. In a.safetensors.\n"
        "  d: ranks of the first plan keep it, the second one knows no such tensor. "
        "In a.safetensors.\n"
        "  b: is bf16[4, 2] in the first plan, needs bf16[2, 4] (the second one's). "
        "In a.safetensors."
    )


def test_plans_of_different_dtypes() -> None:
    def plan(dtype: str) -> Plan:
        target = Target(name="a", layout=Layout.replicated((3,)), dtype="F32")
        return plan_of([target], [source("a", 3, dtype=dtype)])

    with pytest.raises(PlanError, match=r"a: is bf16\[3\] in the first plan, needs fp16\[3\]"):
        routes(plan("BF16"), plan("F16"))


@dataclass(frozen=True)
class Tied:
    id: str
    before: bool
    after: bool


@pytest.mark.parametrize(
    "case",
    [Tied("untied", True, False), Tied("tied", False, True), Tied("both", True, True)],
    ids=lambda case: case.id,
)
def test_tied_weights(case: Tied) -> None:
    """The twin of a tied tensor is held where the tensor is."""

    def plan(tp_size: int, *, tied: bool) -> Plan:
        layout = Layout(cuts=(cut(101, pad_to=8), whole(3)), tp_size=tp_size)
        names = ("embed.weight", "head.weight")
        first = Target(
            name=names[0], layout=layout, dtype="BF16", aliases=names[1:] if tied else ()
        )
        second = replace(first, name=names[1], aliases=())
        targets = [first] if tied else [first, second]
        return plan_of(targets, [source(name, 101, 3) for name in names])

    before, after = plan(2, tied=case.before), plan(4, tied=case.after)
    sent = sum(route.copy.target_region.num_elements for route in routes(before, after))
    assert sent == 101 * 3 * (1 if case.after else 2)
    if case.before and not case.after:
        from_of = {r.copy.target: r.copy.source for r in routes(before, after)}
        assert from_of == {"embed.weight": "embed.weight", "head.weight": "embed.weight"}


def test_what_the_second_plan_skips() -> None:
    layout = Layout.replicated((3,))
    both = plan_of(
        [Target(name=n, layout=layout, dtype="BF16") for n in "ab"], [source(n, 3) for n in "ab"]
    )
    less = plan_of([Target(name="a", layout=layout, dtype="BF16")], [source("a", 3)])
    less = replace(less, skipped=(Skipped(source="b", reason="of no use"),))
    assert [route.copy.target for route in routes(both, less)] == ["a"]
    with pytest.raises(PlanError, match="b: no rank of the first plan keeps it"):
        routes(less, both)


def test_a_fused_scale_that_parts_share() -> None:
    """One number on disk for q, k and v: each rank holds it three times."""
    parts = tuple(Part(name=n, size=1, max_pieces=1) for n in "qkv")
    layout = Layout(cuts=(Cut(axis=Axis(parts=parts, scalars=True)),), tp_size=2)
    target = Target(name="attn.qkv_proj.scale", layout=layout, dtype="F32")
    plan = plan_of([target], [source("attn.qkv_proj.scale", 1, dtype="F32")])
    (piece,) = pieces(plan, "attn.qkv_proj.scale")
    assert [h.ranks.tp_rank for h in piece.holders] == [0, 0, 0, 1, 1, 1]
    assert [str(h.copy.target_region) for h in piece.holders[:3]] == ["[0:1]", "[1:2]", "[2:3]"]
    check_routes(plan, plan)


def test_plans_are_let_go() -> None:
    plan = one(Layout.replicated((3,)))
    pieces(plan, "w.weight")
    assert pieces(plan, "w.weight") is pieces(plan, "w.weight"), "worked out once"
    key = id(plan)
    assert key in routes_module._known
    del plan
    gc.collect()
    assert key not in routes_module._known
