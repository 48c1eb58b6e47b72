"""Plans from sources and targets made by hand: what is bound, what is refused, what is proved."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.checkpoint import Source
from lading.dtypes import BITS
from lading.errors import (
    CallError,
    DeclarationError,
    DtypeError,
    LadingError,
    LayoutError,
    MissingTensorError,
    PlanError,
    ShapeError,
    SurplusTensorError,
)
from lading.layers import Layer
from lading.layouts import Axis, Cut, Layout, PartName, Placement
from lading.names import Names, SkipRule
from lading.plan import Binding, Fill, Plan, Skipped, Target, Tie, make_plan
from lading.ranks import Ranks, all_ranks
from lading.regions import Region

from .oracles import index_of, numbered, run

NORM, QKV, MLP, DOWN = (
    "norm.weight",
    "attn.qkv_proj.weight",
    "mlp.gate_up_proj.weight",
    "down.weight",
)
Q, K, V = (f"attn.{n}_proj.weight" for n in "qkv")
GATE, UP = "mlp.gate_proj.weight", "mlp.up_proj.weight"


def source(name: str, *shape: int, dtype: str = "BF16", file: str = "a.safetensors") -> Source:
    num_bytes = prod(shape) * BITS[dtype] // 8
    return Source(
        name=name, dtype=dtype, shape=shape, file=file, offset_bytes=64, num_bytes=num_bytes
    )


def target(name: str, layer: Layer, tp_size: int = 1, *, aliases: Sequence[str] = ()) -> Target:
    layout = layer.layout(layer.specs()[0], tp_size)
    return Target(name=name, layout=layout, dtype="BF16", aliases=tuple(aliases))


def qkv(tp_size: int = 1) -> Target:
    """6 q heads and 2 KV heads of 4, from 5 inputs."""
    return target(QKV, Layer.qkv(5, 4, 6, 2), tp_size)


def down(tp_size: int = 1) -> Target:
    return target(DOWN, Layer.row(12, 5), tp_size)


PARTS = [source(Q, 24, 5), source(K, 8, 5), source(V, 8, 5)]
FUSED = source(QKV, 40, 5)


def plan(
    targets: Sequence[Target],
    sources: Sequence[Source],
    *,
    ranks: Sequence[Ranks] | None = None,
    names: Names | None = None,
) -> Plan:
    tp_size = targets[0].layout.tp_size
    by_name = {one.name: one for one in sources}
    return make_plan(targets, by_name, ranks=ranks or all_ranks(tp_size), names=names)


def test_a_plan_of_parts() -> None:
    found = plan([qkv(2), down(2)], [*PARTS, source(DOWN, 5, 12)])
    assert found.bindings == (
        Binding(target=QKV, part="q", source=Q, fused=False),
        Binding(target=QKV, part="k", source=K, fused=False),
        Binding(target=QKV, part="v", source=V, fused=False),
        Binding(target=DOWN, part=None, source=DOWN, fused=False),
    )
    share = found.share(Ranks(tp_rank=1, tp_size=2))
    boxes = [(c.source, str(c.source_region), str(c.target_region)) for c in share.copies]
    assert boxes == [
        (Q, "[12:24, 0:5]", "[0:12, 0:5]"),
        (K, "[4:8, 0:5]", "[12:16, 0:5]"),
        (V, "[4:8, 0:5]", "[16:20, 0:5]"),
        (DOWN, "[0:5, 6:12]", "[0:5, 0:6]"),
    ]
    assert share.fills == ()
    assert found.tp_size == 2
    assert found.target(QKV) == qkv(2)
    assert list(found.sources) == [Q, K, V, DOWN]


def test_a_plan_of_a_tensor_that_is_fused_on_disk() -> None:
    found = plan([qkv(2)], [FUSED])
    assert {(b.source, b.fused) for b in found.bindings} == {(QKV, True)}
    boxes = [str(copy.source_region) for copy in found.shares[1].copies]
    assert boxes == ["[12:24, 0:5]", "[28:32, 0:5]", "[36:40, 0:5]"]


@pytest.mark.parametrize("is_fused", [False, True], ids=["parts", "fused"])
@pytest.mark.parametrize("tp_size", [1, 2, 6])
def test_what_the_copies_do(tp_size: int, is_fused: bool) -> None:
    """Every rank's parameters, element by element, against numpy."""
    targets = [
        qkv(tp_size),
        down(tp_size),
        target("e.weight", Layer.embedding(101, 3, pad_to=8), tp_size),
    ]
    sources = [*([FUSED] if is_fused else PARTS), source(DOWN, 5, 12), source("e.weight", 101, 3)]
    found = plan(targets, sources)
    data = {s.name: numbered(s.shape) for s in sources}
    if is_fused:
        data |= dict(zip((Q, K, V), np.split(data[QKV], [24, 32]), strict=True))
    else:
        data |= {K: data[K] + 1000, V: data[V] + 2000}
    vocabulary = np.zeros((-(-101 // 24) * 24, 3), dtype=np.int64)
    vocabulary[:101] = data["e.weight"]
    for share in found.shares:
        rank = share.ranks.tp_rank
        local = {t.name: np.full(t.layout.local_shape, -1) for t in targets}
        for copy in share.copies:
            run(copy, data[copy.source], local[copy.target])
        for fill in share.fills:
            local[fill.target][index_of(fill.region)] = 0
        kv_head = slice(4 * (rank // max(tp_size // 2, 1)), None)
        heads = 4 * max(2 // tp_size, 1)
        wanted = [np.split(data[Q], tp_size)[rank]] + [data[n][kv_head][:heads] for n in (K, V)]
        np.testing.assert_array_equal(local[QKV], np.concatenate(wanted))
        np.testing.assert_array_equal(local[DOWN], np.split(data[DOWN], tp_size, axis=1)[rank])
        rows = len(local["e.weight"])
        kept = vocabulary[rank * rows : (rank + 1) * rows]
        np.testing.assert_array_equal(local["e.weight"], kept)


def test_padding_is_filled() -> None:
    found = plan(
        [target("e.weight", Layer.embedding(101, 3, pad_to=8), 5)], [source("e.weight", 101, 3)]
    )
    fills = [[str(fill.region) for fill in share.fills] for share in found.shares]
    assert fills == [[], [], [], [], ["[5:24, 0:3]"]]
    assert found.shares[4].fills[0] == Fill(
        target="e.weight", region=Region.box((24, 3), [(5, 24), (0, 3)])
    )
    empty = plan(
        [target("e.weight", Layer.embedding(9, 3, pad_to=8), 4)], [source("e.weight", 9, 3)]
    )
    assert [len(share.copies) for share in empty.shares] == [1, 1, 1, 0]


def test_a_scalar_in_the_file_is_one_element_in_the_model() -> None:
    one = Target(name="scale", layout=Layout.replicated((1,)), dtype="F32")
    (copy,) = plan([one], [source("scale", dtype="F32")]).shares[0].copies
    assert copy.source_region == Region.whole((1,))
    with pytest.raises(PlanError):
        plan([replace(one, layout=Layout.replicated((2,)))], [source("scale", dtype="F32")])


def test_skipped_by_a_rule() -> None:
    rule = SkipRule(pattern=r"mtp\..*", reason="no such layer here")
    found = plan([down()], [source(DOWN, 5, 12), source("mtp.x", 3)], names=Names.of(skips=[rule]))
    assert found.skipped == (Skipped(source="mtp.x", reason="no such layer here"),)
    assert list(found.sources) == [DOWN]


EMBED = target("embed.weight", Layer.embedding(101, 3, pad_to=8), aliases=["lm_head.weight"])


@pytest.mark.parametrize("name", ["embed.weight", "lm_head.weight"])
def test_a_tied_parameter_under_either_name(name: str) -> None:
    found = plan([EMBED], [source(name, 101, 3)])
    assert found.bindings == (Binding(target="embed.weight", part=None, source=name, fused=False),)
    assert found.ties == ()


def test_a_tied_twin_is_noted() -> None:
    found = plan([EMBED], [source("lm_head.weight", 101, 3), source("embed.weight", 101, 3)])
    assert found.ties == (Tie(target="embed.weight", source="embed.weight", twin="lm_head.weight"),)
    assert [b.source for b in found.bindings] == ["embed.weight"]
    assert set(found.sources) == {"embed.weight", "lm_head.weight"}


def test_a_fused_twin_is_compared_once() -> None:
    tied = replace(qkv(), aliases=("other.qkv_proj.weight",))
    found = plan([tied], [FUSED, source("other.qkv_proj.weight", 40, 5)])
    assert found.ties == (Tie(target=QKV, source=QKV, twin="other.qkv_proj.weight"),)


def test_two_names_that_are_one_in_the_file_are_no_tie() -> None:
    names = Names(renames=((r"^lm_head\.", "embed."),))
    found = plan([EMBED], [source("embed.weight", 101, 3)], names=names)
    assert found.ties == ()
    assert len(found.bindings) == 1


def test_casts_are_listed() -> None:
    found = plan(
        [down(), target(NORM, Layer.replicated(1, 5))],
        [source(DOWN, 5, 12, dtype="F32"), source(NORM, 5, 1)],
    )
    assert found.casts() == ((DOWN, "F32", "BF16"),)


def test_bytes() -> None:
    found = plan([qkv(6), down(6)], [*PARTS, source(DOWN, 5, 12, dtype="F32")])
    assert found.parameter_bytes() == 2 * (12 * 5 + 5 * 2)
    assert found.checkpoint_bytes() == 2 * 40 * 5 + 4 * 60
    assert [found.share_bytes(share) for share in found.shares] == [2 * 12 * 5 + 4 * 10] * 6


def test_the_digest_is_that_of_the_load_not_of_the_rank() -> None:
    targets, sources = [qkv(2), down(2)], [*PARTS, source(DOWN, 5, 12)]
    one, two = (plan(targets, sources, ranks=[rank]) for rank in all_ranks(2))
    assert one != two
    assert one.digest == two.digest == plan(targets, sources).digest
    others = [
        plan([qkv(), down()], sources),
        plan([down(2), qkv(2)], sources),
        plan([qkv(2), replace(down(2), dtype="F32")], sources),
        plan(targets, [*PARTS, replace(source(DOWN, 5, 12), offset_bytes=0)]),
        plan(targets, [*PARTS, source(DOWN, 5, 12, dtype="F32")]),
        plan(targets, [*PARTS, source(DOWN, 5, 12, file="b")]),
        plan(targets, [FUSED, source(DOWN, 5, 12)]),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_pickled() -> None:
    found = plan([qkv(2)], PARTS)
    assert pickle.loads(pickle.dumps(found)) == found


def test_the_share_of_another_rank() -> None:
    found = plan([qkv(2)], PARTS, ranks=[Ranks(tp_rank=1, tp_size=2)])
    with pytest.raises(CallError) as caught:
        found.share(Ranks(tp_rank=0, tp_size=2))
    assert str(caught.value) == "plan: was made for rank 1 of 2, needs rank 0 of 2."


@dataclass(frozen=True)
class Problem:
    """What one plan is refused for, with the whole text of each problem."""

    id: str
    make: Callable[[], object]
    problems: list[tuple[type[LadingError], str]]


def packed(tp_size: int = 1) -> Target:
    reason = "int4 packs 8 columns per int32 entry"
    rows, columns = Axis.of(5, max_pieces=1, name="out_features"), Axis.of(96, name="in_features")
    cuts = (Cut(axis=rows), Cut(axis=columns, grain=Fraction(8), reason=reason))
    return Target(name="qweight", layout=Layout(cuts=cuts, tp_size=tp_size), dtype="I32")


PROBLEMS = [
    Problem(
        "a part is missing",
        lambda: plan([qkv()], PARTS[:2]),
        [
            (
                MissingTensorError,
                "attn.qkv_proj.weight, part 'v': the checkpoint has no tensor "
                "'attn.v_proj.weight', nor a fused 'attn.qkv_proj.weight'.",
            )
        ],
    ),
    Problem(
        "all is missing",
        lambda: plan([qkv(), down()], []),
        [
            *(
                (
                    MissingTensorError,
                    f"attn.qkv_proj.weight, part '{n}': the checkpoint has no tensor "
                    f"'attn.{n}_proj.weight', nor a fused 'attn.qkv_proj.weight'.",
                )
                for n in "qkv"
            ),
            (MissingTensorError, "down.weight: the checkpoint has no tensor 'down.weight'."),
        ],
    ),
    Problem(
        "parts without a naming rule",
        lambda: plan([replace(qkv(), name="attn.wqkv.weight")], []),
        [
            (
                MissingTensorError,
                "attn.wqkv.weight: the checkpoint has no tensor 'attn.wqkv.weight'.",
            )
        ],
    ),
    Problem(
        "a naming rule of another number of parts",
        lambda: plan([qkv()], PARTS, names=Names.of({"qkv_proj": ["q_proj", "kv_proj"]})),
        [
            (
                DeclarationError,
                "attn.qkv_proj.weight: has 3 parts, the naming rule for 'qkv_proj' names 2: "
                "q_proj, kv_proj.",
            ),
            *(
                (
                    SurplusTensorError,
                    f"attn.{n}_proj.weight: checkpoint tensor bf16[{rows}, 5] belongs to no "
                    "parameter, and no rule skips it. In a.safetensors.",
                )
                for n, rows in (("q", 24), ("k", 8), ("v", 8))
            ),
        ],
    ),
    Problem(
        "surplus",
        lambda: plan([down()], [source(DOWN, 5, 12), source("bias", 5)]),
        [
            (
                SurplusTensorError,
                "bias: checkpoint tensor bf16[5] belongs to no parameter, and no rule skips it. "
                "In a.safetensors.",
            )
        ],
    ),
    Problem(
        "fused and in parts",
        lambda: plan([qkv()], [FUSED, PARTS[1]]),
        [
            (
                SurplusTensorError,
                "attn.qkv_proj.weight: the checkpoint has both the fused tensor "
                "'attn.qkv_proj.weight' and 'attn.k_proj.weight', needs one of the two.",
            )
        ],
    ),
    Problem(
        "input size",
        lambda: plan([down(3)], [source(DOWN, 5, 14)]),
        [
            (
                ShapeError,
                "down.weight: checkpoint tensor 'down.weight' is bf16[5, 14], needs bf16[5, 12] "
                "(12 = in_features of the layer). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "both sizes, transposed",
        lambda: plan([down()], [source(DOWN, 12, 5)]),
        [
            (
                ShapeError,
                "down.weight: checkpoint tensor 'down.weight' is bf16[12, 5], needs bf16[5, 12] "
                "(5 = out_features of the layer, 12 = in_features of the layer; the file has it "
                "transposed). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "dims",
        lambda: plan([down()], [source(DOWN, 60)]),
        [
            (
                ShapeError,
                "down.weight: checkpoint tensor 'down.weight' is bf16[60], needs bf16[5, 12] "
                "(2 dims). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "heads of a part, not of the layer",
        lambda: plan([qkv()], [PARTS[0], source(K, 12, 5), PARTS[2]]),
        [
            (
                ShapeError,
                "attn.qkv_proj.weight, part 'k': checkpoint tensor 'attn.k_proj.weight' is "
                "bf16[12, 5], needs bf16[8, 5] (8 = 2 KV heads of 4). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "rows of a part without units",
        lambda: plan(
            [target(MLP, Layer.column(5, [6, 9]))], [source(GATE, 6, 5), source(UP, 6, 5)]
        ),
        [
            (
                ShapeError,
                "mlp.gate_up_proj.weight, part 1: checkpoint tensor 'mlp.up_proj.weight' is "
                "bf16[6, 5], needs bf16[9, 5] (9 = the part's share of out_features of the layer). "
                "In a.safetensors.",
            )
        ],
    ),
    Problem(
        "a fused tensor is one problem, not three",
        lambda: plan([qkv()], [source(QKV, 42, 5)]),
        [
            (
                ShapeError,
                "attn.qkv_proj.weight: checkpoint tensor 'attn.qkv_proj.weight' is bf16[42, 5], "
                "needs bf16[40, 5] (40 = out_features of the layer). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "packed columns",
        lambda: plan([packed()], [source("qweight", 5, 96, dtype="I32")]),
        [
            (
                ShapeError,
                "qweight: checkpoint tensor 'qweight' is int32[5, 96], needs int32[5, 12] "
                "(12 = 96 / 8: in_features; int4 packs 8 columns per int32 entry). "
                "In a.safetensors.",
            )
        ],
    ),
    Problem(
        "dtype",
        lambda: plan([down()], [source(DOWN, 5, 12, dtype="I32")]),
        [
            (
                DtypeError,
                "down.weight: checkpoint tensor 'down.weight' is int32[5, 12], needs bf16[5, 12] "
                "(bf16 does not hold every int32). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "dtype of a fused tensor, once",
        lambda: plan([replace(qkv(), dtype="I8")], [FUSED]),
        [
            (
                DtypeError,
                "attn.qkv_proj.weight: checkpoint tensor 'attn.qkv_proj.weight' is bf16[40, 5], "
                "needs int8[40, 5] (a float does not fit into an integer). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "a tied twin of another shape",
        lambda: plan([EMBED], [source("embed.weight", 101, 3), source("lm_head.weight", 104, 3)]),
        [
            (
                ShapeError,
                "embed.weight: tied checkpoint tensor 'lm_head.weight' is bf16[104, 3], needs "
                "bf16[101, 3] (as 'embed.weight', to which it is tied). In a.safetensors.",
            )
        ],
    ),
    Problem(
        "everything at once, in the order of parameters, then of tensors",
        lambda: plan(
            [target(NORM, Layer.replicated(1, 5)), qkv(), replace(down(), dtype="I8")],
            [
                source("x", 3),
                PARTS[0],
                source(V, 9, 5),
                source(DOWN, 5, 12),
                source("y", 3, file="b.safetensors"),
            ],
        ),
        [
            (MissingTensorError, "norm.weight: the checkpoint has no tensor 'norm.weight'."),
            (
                MissingTensorError,
                "attn.qkv_proj.weight, part 'k': the checkpoint has no tensor "
                "'attn.k_proj.weight', nor a fused 'attn.qkv_proj.weight'.",
            ),
            (
                ShapeError,
                "attn.qkv_proj.weight, part 'v': checkpoint tensor 'attn.v_proj.weight' is "
                "bf16[9, 5], needs bf16[8, 5] (8 = 2 KV heads of 4). In a.safetensors.",
            ),
            (
                DtypeError,
                "down.weight: checkpoint tensor 'down.weight' is bf16[5, 12], needs int8[5, 12] "
                "(a float does not fit into an integer). In a.safetensors.",
            ),
            (
                SurplusTensorError,
                "x: checkpoint tensor bf16[3] belongs to no parameter, and no rule skips it. "
                "In a.safetensors.",
            ),
            (
                SurplusTensorError,
                "y: checkpoint tensor bf16[3] belongs to no parameter, and no rule skips it. "
                "In b.safetensors.",
            ),
        ],
    ),
]


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.id)
def test_problems(case: Problem) -> None:
    with pytest.raises(PlanError) as caught:
        case.make()
    found = [(type(problem), str(problem)) for problem in caught.value.problems]
    assert found == case.problems


@dataclass(frozen=True)
class Fails:
    id: str
    make: Callable[[], object]
    text: str


FAILS = [
    Fails(
        "no rank",
        lambda: make_plan([down()], {}, ranks=[]),
        "make_plan: names no rank, needs at least one.",
    ),
    Fails(
        "mixed sizes",
        lambda: plan([down(2), down(3)], [], ranks=[Ranks(tp_size=2)]),
        "make_plan: mixes tp_size 2 and 3, needs one (the ranks' and every layout's).",
    ),
    Fails(
        "ranks of another size",
        lambda: plan([down(2)], [], ranks=all_ranks(4)),
        "make_plan: mixes tp_size 2 and 4, needs one (the ranks' and every layout's).",
    ),
    Fails("declared twice", lambda: plan([down(), down()], []), "down.weight: is declared twice."),
    Fails(
        "an alias that is a parameter",
        lambda: plan([EMBED, target("lm_head.weight", Layer.column(3, [101]))], []),
        "lm_head.weight: is declared twice.",
    ),
    Fails(
        "torch's name of a dtype",
        lambda: replace(down(), dtype="bfloat16"),
        f"down.weight: is of dtype 'bfloat16', needs one of: {', '.join(BITS)}.",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused_at_once(case: Fails) -> None:
    with pytest.raises((CallError, DeclarationError)) as caught:
        case.make()
    assert str(caught.value) == case.text


def wrong_by_one(found: Placement, rank: int) -> Placement:
    start = (found.source.start[0] + 1, *found.source.start[1:])
    return replace(found, source=replace(found.source, start=start)) if rank == 0 else found


def overlapping(found: Placement, rank: int) -> Placement:
    return replace(
        found, target=Region.box(found.target.shape, [(0, n) for n in found.source.size])
    )


@pytest.mark.parametrize(
    "sabotage",
    [wrong_by_one, overlapping, lambda found, rank: None if rank == 1 else found],
    ids=["shifted by one", "overlapping", "dropped"],
)
def test_the_proof_finds_sabotage(
    sabotage: Callable[[Placement, int], Placement | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the regions tells: shapes and names are right."""
    targets, sources = [qkv(2), target("e.weight", Layer.column(3, [8]), 2)], [*PARTS]
    sources.append(source("e.weight", 8, 3))
    assert plan(targets, sources)
    honest = Layout.place

    def place(
        layout: Layout, part: PartName, tp_rank: int, *, fused_source: bool = False
    ) -> Placement | None:
        found = honest(layout, part, tp_rank, fused_source=fused_source)
        assert found is not None
        return sabotage(found, tp_rank) if part == "k" else found

    monkeypatch.setattr(Layout, "place", place)
    # Also where the rank that is wrong is not the one that is planned: all ranks are proved.
    for rank in all_ranks(2):
        with pytest.raises(PlanError) as caught:
            plan(targets, sources, ranks=[rank])
        assert {problem.subject for problem in caught.value.problems} == {QKV}
        assert {type(problem) for problem in caught.value.problems} == {LayoutError}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_subset_of_the_tensors(data: st.DataObject) -> None:
    """A plan exists only for the parts, or for the fused tensor, and for nothing besides."""
    everything = [*PARTS, FUSED, source(DOWN, 5, 12), source("x", 3)]
    kept = data.draw(st.lists(st.sampled_from(everything), unique_by=lambda s: s.name))
    names = {one.name for one in kept}
    is_whole = names in ({Q, K, V, DOWN}, {QKV, DOWN})
    if is_whole:
        assert set(plan([qkv(2), down(2)], kept).sources) == names
    else:
        with pytest.raises(PlanError):
            plan([qkv(2), down(2)], kept)
