"""Plans there and back, and what a plan file that has been tampered with is refused for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.checkpoint import Source
from lading.errors import PlanFileError
from lading.layers import Layer
from lading.layouts import Axis, Cut, Layout, Part
from lading.names import Names, SkipRule
from lading.plan import Expected, Plan, Target, make_plan
from lading.plan_json import MAX_RANKS, plan_from_json, plan_to_json
from lading.ranks import Ranks, all_ranks
from lading.specs import Along, Constant, Dim, TensorSpec

Json = Any


def source(name: str, *shape: int, dtype: str = "BF16", num_bytes: int = 0) -> Source:
    return Source(
        name=name,
        dtype=dtype,
        shape=shape,
        file="sub/a.safetensors",
        offset_bytes=64,
        num_bytes=num_bytes,
    )


def target(name: str, layout: Layout, dtype: str = "BF16", *aliases: str) -> Target:
    return Target(name=name, layout=layout, dtype=dtype, aliases=aliases)


def plan(tp_size: int = 3, *, fused: bool = False) -> Plan:
    """Parts, padding, a tie, a cast, a skip, a 3-bit tensor, a 0-d scale, expert ranks."""
    layers = {
        "qkv_proj.weight": Layer.qkv(5, 2, 6, 3),
        "gate_up_proj.weight": Layer.column(5, [6, 12], names=["gate", 7]),
        "embed.weight": Layer.embedding(101, 3, pad_to=4),
    }
    layouts = {n: layer.layout(layer.specs()[0], tp_size) for n, layer in layers.items()}
    axis = Axis(parts=(Part(size=96 * tp_size),), name="in_features")
    packed = (Cut(axis=Axis.of(4, max_pieces=1)), Cut(axis=axis, grain=Fraction(32, 3), reason="3"))
    ragged = (Cut(axis=Axis.of(300, max_pieces=1), grain=Fraction(128), ragged=True),)
    targets = [
        target("qkv_proj.weight", layouts["qkv_proj.weight"]),
        target("gate_up_proj.weight", layouts["gate_up_proj.weight"]),
        target("embed.weight", layouts["embed.weight"], "BF16", "lm_head.weight"),
        target("packed", Layout(cuts=packed, tp_size=tp_size), "I32"),
        target("blocks", Layout(cuts=ragged, tp_size=tp_size), "F32"),
        target("scale", Layout.replicated((1,), tp_size), "F32"),
        target("other_scale", Layout.replicated((1,), tp_size), "F32"),
    ]
    parts = [("q_proj.weight", 12), ("k_proj.weight", 6), ("v_proj.weight", 6)]
    shapes: list[tuple[str, str, tuple[int, ...]]] = [
        *(
            [("qkv_proj.weight", "BF16", (24, 5))]
            if fused
            else [(n, "BF16", (s, 5)) for n, s in parts]
        ),
        ("gate_proj.weight", "BF16", (6, 5)),
        ("up_proj.weight", "F32", (12, 5)),
        ("embed.weight", "BF16", (101, 3)),
        ("lm_head.weight", "BF16", (101, 3)),
        ("packed", "I32", (4, 9 * tp_size)),
        ("blocks", "F32", (3,)),
        ("scale", "F32", ()),
        ("other_scale", "F32", (1,)),
        ("mtp.x", "BOOL", (2, 0)),
    ]
    sources = {}
    for name, dtype, shape in shapes:
        size = {"BF16": 2, "F32": 4, "I32": 4, "BOOL": 1}[dtype]
        for n in shape:
            size *= n
        sources[name] = source(name, *shape, dtype=dtype, num_bytes=size)
    skips = [SkipRule(pattern=r"mtp\..*", reason="no such layer")]
    ranks = [replace(one, ep_rank=1, ep_size=2) for one in all_ranks(tp_size)]
    return make_plan(targets, sources, ranks=ranks, names=Names.of(skips=skips))


def plan_of_formats(tp_size: int = 2) -> Plan:
    """What quantised tensors declare: numbers of parts, blocks, tiles, other views, constants."""
    layer = Layer.column(5, [6, 12])
    blocks = Dim(along=Along.OUTPUT, grain=Fraction(4), straddle=True, ragged=True, reason="fp8")
    tiles = Dim(along=Along.OUTPUT, align=3, align_reason="tiles")

    def layout(dim: Dim, *, fused: bool = False) -> Layout:
        return layer.layout(TensorSpec(name="", dims=(dim,)), tp_size, fused_source=fused)

    one = Layout.replicated((4, 6), tp_size)
    shape = Expected(constant=Constant.SHAPE, outputs=((None, 4),), inputs=6)
    index = Expected(constant=Constant.GROUP_INDEX, inputs=6, group=3)
    targets = [
        target("gate_up_proj.scale", layout(Dim(along=Along.PARTS)), "F32"),
        target("gate_up_proj.blocks", layout(blocks, fused=True), "F32"),
        target("gate_up_proj.tiles", layout(tiles), "F32"),
        Target(name="o.qweight", layout=one, dtype="U8", leaf="weight.data", stored=(-1, 1)),
        Target(
            name="o.shape",
            layout=Layout.replicated((2,), tp_size),
            dtype="I64",
            expected=shape,
        ),
        Target(
            name="o.g_idx",
            layout=Layout.replicated((6,), tp_size),
            dtype="I32",
            expected=index,
        ),
    ]
    sources = [
        source("gate_proj.scale", dtype="F32", num_bytes=4),
        source("up_proj.scale", 1, dtype="F32", num_bytes=4),
        source("gate_up_proj.blocks", 5, dtype="F32", num_bytes=20),
        source("gate_up_proj.tiles", 18, dtype="F32", num_bytes=72),
        source("o.weight.data", 24, 1, dtype="U8", num_bytes=24),
        source("o.shape", 2, dtype="I64", num_bytes=16),
        source("o.g_idx", 6, dtype="I32", num_bytes=24),
    ]
    return make_plan(targets, {s.name: s for s in sources}, ranks=all_ranks(tp_size))


def instances(value: object) -> Iterator[object]:
    """The dataclass instances in a value, and in their fields."""
    if is_dataclass(value):
        yield value
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from instances(item)


def test_every_field_is_tried() -> None:
    """A field that is added and not written would come back as its default, and pass unnoticed."""
    values: dict[str, set[str]] = {}
    defaults: dict[str, str] = {}
    for one in (*instances(plan()), *instances(plan(fused=True)), *instances(plan_of_formats())):
        assert is_dataclass(one)
        for field in fields(one):
            if field.compare:
                name = f"{type(one).__name__}.{field.name}"
                values.setdefault(name, set()).add(repr(getattr(one, field.name)))
                defaults[name] = repr(field.default)
    untried = [name for name, found in values.items() if found <= {defaults[name]}]
    # Copies of a plan keep the order of dims.
    assert untried == ["Copy.axes"]


def through_text(value: Plan) -> Json:
    return json.loads(json.dumps(plan_to_json(value), allow_nan=False))


@pytest.mark.parametrize("tp_size", [1, 3, 6])
@pytest.mark.parametrize("fused", [False, True], ids=["parts", "fused"])
def test_there_and_back(tp_size: int, fused: bool) -> None:
    one = plan(tp_size, fused=fused)
    back = plan_from_json(through_text(one))
    assert back == one
    assert back.digest == one.digest, "the order of sources, too"
    assert plan_to_json(back) == plan_to_json(one)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_formats_there_and_back(tp_size: int) -> None:
    one = plan_of_formats(tp_size)
    back = plan_from_json(through_text(one))
    assert back == one
    assert (back.digest, back.checks()) == (one.digest, one.checks())


def test_a_plan_of_some_ranks() -> None:
    one = replace(plan(), shares=plan().shares[1:2])
    assert plan_from_json(through_text(one)) == one


def test_what_is_written() -> None:
    layer = Layer.column(6, [4, 4], names=["gate", "up"])
    one = make_plan(
        [target("gate_up_proj.weight", layer.layout(layer.specs()[0], 2))],
        {n: source(n, 4, 6, num_bytes=48) for n in ("gate_proj.weight", "up_proj.weight")},
        ranks=[Ranks(tp_rank=1, tp_size=2)],
    )
    file = {"dtype": "BF16", "shape": [4, 6], "file": "sub/a.safetensors", "bytes": [64, 48]}
    up = {"target": "gate_up_proj.weight", "part": "up", "source": "up_proj.weight"}
    gate = {"target": "gate_up_proj.weight", "part": "gate", "source": "gate_proj.weight"}
    assert plan_to_json(one) == {
        "format": "lading.plan",
        "version": 1,
        "tp_size": 2,
        "ranks": [[1, 2, 0, 1]],
        "sources": {"gate_proj.weight": file, "up_proj.weight": file},
        "layouts": [
            {
                "dims": [
                    {
                        "axis": "out_features of the layer",
                        "parts": [{"size": 4, "name": "gate"}, {"size": 4, "name": "up"}],
                    },
                    {"axis": "in_features of the layer", "parts": [{"size": 6, "max_pieces": 1}]},
                ]
            }
        ],
        "targets": [{"name": "gate_up_proj.weight", "layout": 0, "dtype": "BF16"}],
        "bindings": [gate | {"fused": False}, up | {"fused": False}],
        "ties": [],
        "skipped": [],
        "shares": [
            {
                "copies": [
                    gate | {"from": [[2, 4], [0, 6]], "to": [[0, 2], [0, 6]]},
                    up | {"from": [[2, 4], [0, 6]], "to": [[2, 4], [0, 6]]},
                ],
                "fills": [],
            }
        ],
    }


def test_layouts_are_written_once() -> None:
    value = plan_to_json(plan())
    positions = {one["name"]: one["layout"] for one in value["targets"]}
    assert positions["scale"] == positions["other_scale"]
    assert len(value["layouts"]) == len(set(positions.values())) == 6


@dataclass(frozen=True)
class Tampered:
    """One value of the file of `plan()` is replaced; the whole text of what reading it raises."""

    id: str
    path: tuple[str | int, ...]
    value: Json
    text: str


KEYS = "format, version, tp_size, ranks, sources, layouts, targets, bindings, ties, skipped, shares"
Q = "sources['q_proj.weight']"
DELETED = object()
TAMPERED = [
    Tampered("no object", (), [], "plan: is [], needs an object."),
    Tampered("another format", ("format",), "x", "format: is 'x', needs 'lading.plan'."),
    Tampered("a later version", ("version",), 2, "version: is 2, needs 1."),
    Tampered("a version that equals 1", ("version",), True, "version: is True, needs 1."),
    Tampered("a key missing", ("ties",), DELETED, f"plan: has no key 'ties', needs {KEYS}."),
    Tampered("a key too many", ("x",), 1, f"plan: has the key 'x', needs no others than {KEYS}."),
    Tampered(
        "as many ranks as one likes",
        ("tp_size",),
        10**9,
        f"tp_size: is 1000000000, needs an int from 1 to {MAX_RANKS}.",
    ),
    Tampered(
        "half a rank", ("tp_size",), 3.0, f"tp_size: is 3.0, needs an int from 1 to {MAX_RANKS}."
    ),
    Tampered("no ranks", ("ranks",), [], "ranks: names 0 ranks, needs at least one and each once."),
    Tampered(
        "a rank twice",
        ("ranks",),
        [[0, 3, 0, 1]] * 2,
        "ranks: names 2 ranks, needs at least one and each once.",
    ),
    Tampered(
        "a rank of others",
        ("ranks", 0),
        [0, 4, 0, 1],
        "ranks[0]: is [0, 4, 0, 1], needs [tp_rank, 3, ep_rank, ep_size].",
    ),
    Tampered(
        "a rank that cannot be",
        ("ranks", 0),
        [3, 3, 0, 1],
        "ranks[0]: cannot be: Ranks: tp_rank is 3, needs 0 to 2 (tp_size is 3).",
    ),
    Tampered(
        "a rank less",
        ("ranks", 2),
        DELETED,
        "shares: has 3 shares, needs 2 (one for each rank).",
    ),
    Tampered("sources in a list", ("sources",), [], "sources: is [], needs an object."),
    Tampered(
        "a negative size",
        ("sources", "q_proj.weight", "shape", 0),
        -12,
        f"{Q}.shape[0]: is -12, needs an int from 0 to 9223372036854775807.",
    ),
    Tampered(
        "more bytes than the tensor has",
        ("sources", "q_proj.weight", "bytes"),
        [64, 240],
        f"{Q}.bytes: counts 240, needs 120 (bf16[12, 5]).",
    ),
    Tampered(
        "bytes before the file",
        ("sources", "q_proj.weight", "bytes"),
        [-64, 120],
        f"{Q}.bytes[0]: is -64, needs an int from 0 to 9223372036854775807.",
    ),
    Tampered(
        "bytes without an offset",
        ("sources", "q_proj.weight", "bytes"),
        [120],
        f"{Q}.bytes: is [120], needs [offset, count].",
    ),
    *(
        Tampered(
            f"file {file!r}",
            ("sources", "q_proj.weight", "file"),
            file,
            f"{Q}.file: is {file!r}, needs a file inside the checkpoint's folder.",
        )
        for file in ("../x", "/etc/x", "a/../x", "", "a\\..\\x", "C:/x", "a//x", "x\0y", ".")
    ),
    Tampered(
        "file that is none",
        ("sources", "q_proj.weight", "file"),
        None,
        f"{Q}.file: is None, needs a string.",
    ),
    Tampered(
        "a source that nothing uses",
        ("sources", "x"),
        {"dtype": "BOOL", "shape": [], "file": "x", "bytes": [0, 1]},
        "sources['x']: is in no binding and no tie, needs to be in one.",
    ),
    Tampered(
        "a source of another shape",
        ("sources", "q_proj.weight"),
        {"dtype": "BF16", "shape": [5, 12], "file": "x", "bytes": [0, 120]},
        "plan: is not proved: qkv_proj.weight, part 'q': checkpoint tensor 'q_proj.weight' is "
        "bf16[5, 12], needs bf16[12, 5] (12 = 6 q heads of 2, 5 = in_features of the layer; the "
        "file has it transposed). In x.",
    ),
    Tampered(
        "a source of a dtype that loses values",
        ("sources", "packed", "dtype"),
        "F32",
        "plan: is not proved: packed: checkpoint tensor 'packed' is fp32[4, 27], needs "
        "int32[4, 27] (a float does not fit into an integer). In sub/a.safetensors.",
    ),
    Tampered(
        "an unknown dtype of a target",
        ("targets", 0, "dtype"),
        "bf16",
        "targets[0].dtype: is 'bf16', needs one of: BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, "
        "F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ, I16, U16, F16, BF16, I32, U32, F32, C64, F64, "
        "I64, U64.",
    ),
    Tampered(
        "a layout that is not there",
        ("targets", 0, "layout"),
        6,
        "targets[0].layout: is 6, needs the position of one of 6 layouts.",
    ),
    Tampered(
        "a layout from the end",
        ("targets", 0, "layout"),
        -1,
        "targets[0].layout: is -1, needs an int from 0 to 9223372036854775807.",
    ),
    Tampered(
        "a target twice",
        ("targets", 1, "name"),
        "qkv_proj.weight",
        "targets[1].name: is 'qkv_proj.weight', needs a name of its own.",
    ),
    Tampered(
        "an alias that is a target",
        ("targets", 0, "aliases"),
        ["packed"],
        "plan: is not proved: packed: is declared twice.",
    ),
    Tampered(
        "a layout that does not divide",
        ("layouts", 1, "dims", 0, "parts", 1, "size"),
        13,
        "layouts[1]: cannot be: part 7: TP 3 does not cut 13 rows into 3 equal pieces: "
        "13 = 3 * 4 + 1. Try: TP 1.",
    ),
    Tampered(
        "an axis without parts",
        ("layouts", 1, "dims", 0, "parts"),
        [],
        "layouts[1].dims[0]: cannot be: an axis has no part, needs at least one.",
    ),
    Tampered(
        "a part without size",
        ("layouts", 1, "dims", 0, "parts", 1, "size"),
        DELETED,
        "layouts[1].dims[0].parts[1]: has no key 'size', needs size.",
    ),
    Tampered(
        "pieces of no number",
        ("layouts", 1, "dims", 0, "parts", 1, "max_pieces"),
        "all",
        "layouts[1].dims[0].parts[1].max_pieces: is 'all', needs an int from 0 to "
        "9223372036854775807.",
    ),
    Tampered(
        "grain of nothing",
        ("layouts", 3, "dims", 1, "grain"),
        0,
        "layouts[3].dims[1]: cannot be: has a grain of 0, needs a positive number.",
    ),
    *(
        Tampered(
            f"grain {grain!r}",
            ("layouts", 3, "dims", 1, "grain"),
            grain,
            f"layouts[3].dims[1].grain: is {grain!r}, needs a number or 'n/d'.",
        )
        for grain in ("32/0", "32", "-32/3", "1e3/1", "3²/1", "9" * 19 + "/1")
    ),
    Tampered(
        "ragged by a number",
        ("layouts", 4, "dims", 0, "ragged"),
        1,
        "layouts[4].dims[0].ragged: is 1, needs true or false.",
    ),
    Tampered(
        "a binding of no target",
        ("bindings", 0, "target"),
        "x",
        "bindings[0].target: is 'x', needs a name from targets.",
    ),
    Tampered(
        "a binding of no source",
        ("bindings", 0, "source"),
        "x",
        "bindings[0].source: is 'x', needs a name from sources.",
    ),
    Tampered(
        "a binding of no part",
        ("bindings", 0, "part"),
        "o",
        "bindings[0].part: is 'o', needs one of: 'q', 'k', 'v'.",
    ),
    Tampered(
        "a part that is a list",
        ("bindings", 0, "part"),
        ["q"],
        "bindings[0].part: is ['q'], needs a string, an int or null.",
    ),
    Tampered(
        "fused, of one part",
        ("bindings", 5, "fused"),
        True,
        "bindings[5].fused: is true, needs false ('embed.weight' has one part).",
    ),
    Tampered(
        "a binding less",
        ("bindings", 0),
        DELETED,
        "plan: is not proved: qkv_proj.weight: elements [0:4, 0:5] of rank 0's parameter [8, 5] "
        "are in no copy, needs exactly one (a fault of its layout).",
    ),
    Tampered(
        "a part twice",
        ("bindings", 1),
        {"target": "qkv_proj.weight", "part": "q", "source": "q_proj.weight", "fused": False},
        "plan: is not proved: qkv_proj.weight: elements [4:6, 0:5] of rank 0's parameter [8, 5] "
        "are in no copy, needs exactly one (a fault of its layout).",
    ),
    Tampered(
        "another part's tensor",
        ("bindings", 1, "source"),
        "v_proj.weight",
        "sources['k_proj.weight']: is in no binding and no tie, needs to be in one.",
    ),
    Tampered(
        "a tie of what is not bound",
        ("ties", 0, "source"),
        "packed",
        "ties[0]: ties 'packed' to 'embed.weight', needs a binding of the two.",
    ),
    Tampered(
        "a tie with itself",
        ("ties", 0, "twin"),
        "embed.weight",
        "ties[0].twin: is 'embed.weight', needs another tensor than the source.",
    ),
    Tampered(
        "a tie of another shape",
        ("ties", 0, "twin"),
        "packed",
        "plan: is not proved: embed.weight: tied checkpoint tensor 'packed' is int32[4, 27], needs "
        "bf16[101, 3] (as 'embed.weight', to which it is tied). In sub/a.safetensors.",
    ),
    Tampered(
        "skipped and used",
        ("skipped", 0, "source"),
        "packed",
        "skipped[0].source: is 'packed', needs a tensor that is not among the sources.",
    ),
    Tampered(
        "a copy less",
        ("shares", 1, "copies", -1),
        DELETED,
        "shares[1].copies: has 9 copies, needs 10 (for rank 1 of 3, expert rank 1 of 2).",
    ),
    Tampered(
        "a copy of another source",
        ("shares", 1, "copies", 1, "source"),
        "v_proj.weight",
        "shares[1].copies[1].source: is 'v_proj.weight', needs 'k_proj.weight' "
        "(the order of the bindings).",
    ),
    Tampered(
        "a copy of another row",
        ("shares", 1, "copies", 1, "from"),
        [[3, 5], [0, 5]],
        "shares[1].copies[1]: is k_proj.weight [3:5, 0:5] to qkv_proj.weight, part 'k' [4:6, 0:5], "
        "needs k_proj.weight [2:4, 0:5] to qkv_proj.weight, part 'k' [4:6, 0:5] "
        "(from layout and binding, for rank 1 of 3, expert rank 1 of 2).",
    ),
    Tampered(
        "a copy past the end",
        ("shares", 1, "copies", 1, "from"),
        [[5, 7], [0, 5]],
        "shares[1].copies[1].from: region [5:7, 0:5] leaves the tensor of shape [6, 5].",
    ),
    Tampered(
        "a copy of fewer elements",
        ("shares", 1, "copies", 1, "from"),
        [[2, 3], [0, 5]],
        "shares[1].copies[1]: copies [2:3, 0:5] to [4:6, 0:5], needs equal sizes.",
    ),
    Tampered(
        "a copy of fewer dims",
        ("shares", 1, "copies", 1, "to"),
        [[4, 6]],
        "shares[1].copies[1].to: has 1 dims, needs 2 (the tensor is [8, 5]).",
    ),
    *(
        Tampered(
            f"span {span}",
            ("shares", 1, "copies", 1, "to", 0),
            span,
            f"shares[1].copies[1].to[0]: is {span}, needs [start, stop] or [start, stop, step].",
        )
        for span in ([6, 4], [4], [4, 6, 0], [4, 6, 1, 1])
    ),
    Tampered(
        "a fill less",
        ("shares", 2, "fills"),
        [],
        "shares[2].fills: has 0 fills, needs 1 (for rank 2 of 3, expert rank 1 of 2).",
    ),
    Tampered(
        "a fill of what is loaded",
        ("shares", 2, "fills", 0, "to", 0, 0),
        0,
        "shares[2].fills[0]: is zeros to embed.weight [0:36, 0:3], needs zeros to embed.weight "
        "[29:36, 0:3] (from layout and binding, for rank 2 of 3, expert rank 1 of 2).",
    ),
    Tampered(
        "a fill of another parameter",
        ("shares", 2, "fills", 0, "target"),
        "packed",
        "shares[2].fills[0].target: is 'packed', needs 'embed.weight' (the order of the targets).",
    ),
]


FORMATS = [
    Tampered(
        "another view of fewer elements",
        ("targets", 3, "stored"),
        [24, 1, 1],
        "plan: is not proved: o.qweight: checkpoint tensor 'o.weight.data' is uint8[24, 1], needs "
        "uint8[24, 1, 1] (as the format stores it). In sub/a.safetensors.",
    ),
    Tampered(
        "a view of nothing",
        ("targets", 3, "stored"),
        [0, -1],
        "targets[3].stored: is [0, -1], needs sizes of at least 1 and at most one -1.",
    ),
    Tampered(
        "a view that may be anything",
        ("targets", 3, "stored"),
        [-1, -1],
        "targets[3].stored: is [-1, -1], needs sizes of at least 1 and at most one -1.",
    ),
    Tampered(
        "a constant of no rule",
        ("targets", 4, "expected", "constant"),
        "one",
        "targets[4].expected.constant: is 'one', needs a name from the rules.",
    ),
    Tampered(
        "a shape of other parts",
        ("targets", 4, "expected", "outputs"),
        [["q", 4]],
        "targets[4].expected.outputs: is [('q', 4)], needs one size for each of the parts [None].",
    ),
    Tampered(
        "a size of no part",
        ("targets", 4, "expected", "outputs", 0),
        [4],
        "targets[4].expected.outputs[0]: is [4], needs [part, size].",
    ),
    Tampered(
        "groups of nothing",
        ("targets", 5, "expected", "group"),
        0,
        "targets[5].expected.group: is 0, needs at least 1.",
    ),
    Tampered(
        "tiles of nothing",
        ("layouts", 2, "dims", 0, "align"),
        0,
        "layouts[2].dims[0]: cannot be: has pieces that are multiples of 0, needs at least 1.",
    ),
    Tampered(
        "blocks of parts that are stored by themselves",
        ("layouts", 1, "fused_source"),
        False,
        "plan: is not proved: gate_up_proj.blocks: was declared for parts that are stored each by "
        "itself, the checkpoint stores them side by side.",
    ),
]


@pytest.mark.parametrize("case", FORMATS, ids=lambda case: case.id)
def test_tampered_formats(case: Tampered) -> None:
    with pytest.raises(PlanFileError) as caught:
        plan_from_json(tampered(through_text(plan_of_formats()), case.path, case.value))
    assert str(caught.value) == case.text


def test_another_view_has_as_many_elements() -> None:
    value = through_text(plan_of_formats())
    value["targets"][3]["stored"] = [12, 1]
    value["sources"]["o.weight.data"] |= {"shape": [12, 1], "bytes": [0, 12]}
    with pytest.raises(PlanFileError) as caught:
        plan_from_json(value)
    text = "bindings[6]: takes [12, 1] as [4, 6], needs as many elements."
    assert str(caught.value) == text


def tampered(value: Json, path: tuple[str | int, ...], new: Json) -> Json:
    """The value with one place changed, or taken out."""
    if not path:
        return new
    value = copy.deepcopy(value)
    place = value
    for step in path[:-1]:
        place = place[step]
    if new is DELETED:
        del place[path[-1]]
    else:
        place[path[-1]] = new
    return value


@pytest.mark.parametrize("case", TAMPERED, ids=lambda case: case.id)
def test_tampered(case: Tampered) -> None:
    with pytest.raises(PlanFileError) as caught:
        plan_from_json(tampered(through_text(plan()), case.path, case.value))
    assert str(caught.value) == case.text


def test_a_fused_tensor_is_one_tensor() -> None:
    value = through_text(plan(fused=True))
    value["bindings"][1]["source"] = "gate_proj.weight"
    with pytest.raises(PlanFileError) as caught:
        plan_from_json(value)
    text = "is 'gate_proj.weight', needs 'qkv_proj.weight' (which holds all parts)."
    assert str(caught.value) == f"bindings[1].source: {text}"


def test_names_that_json_cannot_have() -> None:
    value: dict[Any, Any] = {**through_text(plan()), "sources": {1: {}}}
    with pytest.raises(PlanFileError) as caught:
        plan_from_json(value)
    assert str(caught.value) == "sources: has the key 1, needs strings."


JSONS = [through_text(plan()), through_text(plan_of_formats())]


def _items(value: Json) -> Any:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _paths(value: Json, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    found = [path]
    for key, item in _items(value):
        found += _paths(item, (*path, key))
    return found


PATHS = [(value, path) for value in JSONS for path in _paths(value)]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), JUNK | st.just(DELETED))
def test_whatever_is_changed(place: tuple[Json, tuple[str | int, ...]], junk: Json) -> None:
    """Any value anywhere: a PlanFileError, or a plan that is proved once more."""
    file, path = place
    value = tampered(file, path, junk) if path or junk is not DELETED else None
    try:
        found = plan_from_json(value)
    except PlanFileError:
        return
    assert plan_from_json(through_text(found)) == found
    assert found.digest


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PATHS), st.sampled_from(PATHS))
def test_values_of_other_places(
    place: tuple[Json, tuple[str | int, ...]], other: tuple[Json, tuple[str | int, ...]]
) -> None:
    """Values of the right type in the wrong place come furthest."""
    value, steps = other
    for step in steps:
        value = value[step]
    try:
        found = plan_from_json(tampered(*place, value))
    except PlanFileError:
        return
    assert plan_from_json(through_text(found)) == found
    assert found.digest
