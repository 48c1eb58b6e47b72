"""Reports: folding, spelling, what is printed of a plan, and that nothing is cut."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest

from lading import report
from lading.checkpoint import Source
from lading.layers import Layer
from lading.layouts import Axis, Cut, Layout, Part
from lading.names import Names, SkipRule
from lading.plan import Plan, Target, make_plan
from lading.ranks import Ranks, all_ranks
from lading.report import Line, Look, Table, fold, render, spell_bytes

Row = tuple[str, ...]


@dataclass(frozen=True)
class Expect:
    """Rows, and what they fold to."""

    id: str
    rows: list[Row]
    folded: list[tuple[Row, int]]


FOLDS = [
    Expect("nothing", [], []),
    Expect("no layer", [("norm.weight", "[4]")], [(("norm.weight", "[4]"), 1)]),
    Expect(
        "equal layers",
        [("layers.0.w", "[4]"), ("layers.1.w", "[4]"), ("layers.2.w", "[4]")],
        [(("layers.{0..2}.w", "[4]"), 3)],
    ),
    Expect(
        "a printed column differs",
        [("layers.0.w", "[4]"), ("layers.1.w", "[4]"), ("layers.2.w", "[8]")],
        [(("layers.{0..1}.w", "[4]"), 2), (("layers.2.w", "[8]"), 1)],
    ),
    Expect(
        "a gap",
        [("layers.0.w",), ("layers.1.w",), ("layers.3.w",)],
        [(("layers.{0..1}.w",), 2), (("layers.3.w",), 1)],
    ),
    Expect(
        "the source's layer goes along",
        [("layers.4.qkv.w", "h.4.q.w"), ("layers.5.qkv.w", "h.5.q.w")],
        [(("layers.{4..5}.qkv.w", "h.{4..5}.q.w"), 2)],
    ),
    Expect(
        "the source is of another layer",
        [("layers.4.w", "h.4.w"), ("layers.5.w", "h.4.w")],
        [(("layers.4.w", "h.4.w"), 1), (("layers.5.w", "h.4.w"), 1)],
    ),
    Expect(
        "experts within layers",
        [(f"layers.{layer}.experts.{e}.w", "[2]") for layer in range(2) for e in range(3)],
        [(("layers.{0..1}.experts.{0..2}.w", "[2]"), 6)],
    ),
    Expect(
        "layers with other numbers of experts",
        [(f"layers.{layer}.experts.{e}.w",) for layer in range(2) for e in range(2 + layer)],
        [(("layers.0.experts.{0..1}.w",), 2), (("layers.1.experts.{0..2}.w",), 3)],
    ),
    Expect(
        "names in sentences",
        [
            ("a.0.b", "has no 'x.0.q.w', nor 'x.0.qkv.w'"),
            ("a.1.b", "has no 'x.1.q.w', nor 'x.1.qkv.w'"),
        ],
        [(("a.{0..1}.b", "has no 'x.{0..1}.q.w', nor 'x.{0..1}.qkv.w'"), 2)],
    ),
    Expect("numbers out of order", [("a.1.w",), ("a.0.w",)], [(("a.{0..1}.w",), 2)]),
    Expect("two equal rows", [("a.0.w",), ("a.0.w",)], [(("a.0.w",), 1), (("a.0.w",), 1)]),
]


@pytest.mark.parametrize("case", FOLDS, ids=lambda case: case.id)
def test_fold(case: Expect) -> None:
    assert fold(case.rows) == case.folded


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_600, "1.00 MB"),
        (16_060_556_288, "16.1 GB"),
        (811_000_000_000, "811 GB"),
        (999_940_000_000, "1.00 TB"),
        (9_996_000_000, "10.0 GB"),
    ],
)
def test_spell_bytes(num_bytes: int, text: str) -> None:
    assert spell_bytes(num_bytes) == text


def made_plan(
    tp_size: int, *, ranks: tuple[Ranks, ...] | None = None, stored: str = "BF16"
) -> Plan:
    """Two layers of qkv (6 q heads, 2 KV heads of 4), a table of 101 rows, a skipped tensor."""
    qkv, table = Layer.qkv(8, 4, 6, 2), Layer.embedding(101, 8, pad_to=64)

    def layout(layer: Layer) -> Layout:
        return layer.layout(layer.specs()[0], tp_size)

    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (101, 8), "junk": (3,)}
    targets = [Target(name="embed.weight", layout=layout(table), dtype="BF16", aliases=("head.w",))]
    for index in range(2):
        path = f"layers.{index}.attn"
        targets.append(Target(name=f"{path}.qkv_proj.weight", layout=layout(qkv), dtype="BF16"))
        for part, rows in (("q", 24), ("k", 8), ("v", 8)):
            shapes[f"{path}.{part}_proj.weight"] = (rows, 8)
    sources = {
        name: Source(
            name=name, dtype=stored, shape=shape, file="m.safetensors", offset_bytes=0, num_bytes=9
        )
        for name, shape in shapes.items()
    }
    names = Names.of(skips=[SkipRule(pattern="junk", reason="nobody needs it")])
    return make_plan(targets, sources, ranks=ranks or all_ranks(tp_size), names=names)


def text_of(plan: Plan, *, one_rank: bool = False, look: Look | None = None) -> str:
    look = look or Look()
    return render(report.plan_report(plan, look=look, title="it", one_rank=one_rank), look)


def test_plan_report_of_all_ranks() -> None:
    assert text_of(made_plan(2)) == (
        "it\n"
        "\n"
        "rank  parameters  of the checkpoint  copies  padding\n"
        "0        1.66 kB            1.66 kB       7      0 B\n"
        "1        1.66 kB            1.23 kB       7    432 B\n"
        "\n"
        "parameter  on each rank\n"
        "  part  checkpoint tensor                 is            cut\n"
        "embed.weight  bf16[64, 8], also head.w\n"
        "        same name                         bf16[101, 8]  2 pieces\n"
        "layers.{0..1}.attn.qkv_proj.weight  bf16[20, 8], 2 layers\n"
        "  q     layers.{0..1}.attn.q_proj.weight  bf16[24, 8]   2 pieces\n"
        "  k     layers.{0..1}.attn.k_proj.weight  bf16[8, 8]    2 pieces\n"
        "  v     layers.{0..1}.attn.v_proj.weight  bf16[8, 8]    2 pieces\n"
        "\n"
        "padding, set to zero, in no checkpoint tensor:\n"
        "  embed.weight: [37:64, 0:8] on rank 1\n"
        "\n"
        "skipped:\n"
        "  junk: nobody needs it\n"
        "\n"
        "✓ 1,664 elements in 3 parameters on 2 ranks: each written exactly once\n"
        "  216 of them are declared padding, zeros\n"
        "✓ 8 checkpoint tensors: 7 used, 1 skipped\n"
    )


def test_plan_report_of_one_rank_has_regions() -> None:
    text = text_of(made_plan(6, ranks=(Ranks(tp_rank=4, tp_size=6),)), one_rank=True)
    assert "4     [16:20, 0:8]  [0:4, 0:8]\n" in text
    assert "4     [4:8, 0:8]    [4:8, 0:8]\n" in text
    assert "on rank 4 of 6: each written exactly once" in text


def test_shared_pieces_are_said() -> None:
    text = text_of(made_plan(6))
    assert "bf16[8, 8]    2 pieces, each on 3 ranks\n" in text


def test_equal_ranks_share_a_row() -> None:
    text = text_of(made_plan(6))
    assert "\n0..2 " in text
    assert "\n3 " in text
    assert "\n4..5 " in text


def test_where_groups_ranks() -> None:
    text = render([report.where(made_plan(6), look=Look())], Look())
    assert "0..2  [0:4, 0:8]     [4:8, 0:8]\n" in text
    assert "3..5  [4:8, 0:8]     [4:8, 0:8]\n" in text


def test_a_rank_of_padding_only() -> None:
    table = Layer.embedding(5, 8, pad_to=64)
    target = Target(name="w", layout=table.layout(table.specs()[0], 2), dtype="BF16")
    source = Source(name="w", dtype="BF16", shape=(5, 8), file="m", offset_bytes=0, num_bytes=80)
    for ranks in (all_ranks(2), (Ranks(tp_rank=1, tp_size=2),)):
        plan = make_plan([target], {"w": source}, ranks=ranks, names=Names.of())
        text = render([report.where(plan, look=Look())], Look())
        assert "1     nothing" in text
        assert "padding only\n" in text


def test_shared_scales_are_said() -> None:
    """192 rows on 2 ranks, one scale for 128: rank 0 needs entry 0, rank 1 both."""
    for size, said in ((192, "whole"), (320, "2 pieces, shared"), (256, "2 pieces")):
        axis = Axis(parts=(Part(name=None, size=size),), name="out_features")
        cut = Cut(axis=axis, grain=Fraction(128), ragged=True, straddle=True)
        target = Target(name="s", layout=Layout(cuts=(cut,), tp_size=2), dtype="F32")
        source = Source(
            name="s",
            dtype="F32",
            shape=(-(-size // 128),),
            file="m",
            offset_bytes=0,
            num_bytes=-(-size // 128) * 4,
        )
        plan = make_plan([target], {"s": source}, ranks=all_ranks(2), names=Names.of())
        (section,) = report.overview(plan, look=Look()).sections
        assert section.rows[0][-1] == said


def test_casts_are_said() -> None:
    text = text_of(made_plan(2, stored="F32"))
    assert "cast:\n  embed.weight: fp32 to bf16\n" in text
    assert "  layers.{0..1}.attn.qkv_proj.weight: fp32 to bf16 (2 tensors)\n" in text


def test_plan_json() -> None:
    value = report.plan_json(made_plan(2))
    assert value["num_parameters"] == 3
    assert value["num_elements"] == 1664  # of both ranks, as the text has it
    assert value["num_tensors_skipped"] == 1
    assert [one["tp_rank"] for one in value["ranks"]] == [0, 1]
    assert [one["padding_elements"] for one in value["ranks"]] == [0, 27 * 8]
    assert value["skipped"] == [{"tensor": "junk", "reason": "nobody needs it"}]
    assert value["proof"] == (
        "1,664 elements in 3 parameters on 2 ranks: each written exactly once; "
        "8 checkpoint tensors: 7 used, 1 skipped"
    )


@pytest.mark.parametrize("width", [0, 60, 80, 120])
def test_nothing_is_cut(width: int) -> None:
    look = Look(width=width)
    words = ["a" * 70, "b" * 70]
    text = render([Table(heads=("x", "y"), rows=(tuple(words),)), Line(text=" ".join(words))], look)
    assert "…" not in text
    for letter in "ab":
        assert text.count(letter) == 140
    if width:
        assert max(map(len, text.splitlines())) <= width
    else:
        assert " ".join(words) in text.splitlines()


def test_lines_fit_a_terminal() -> None:
    plan = made_plan(2)
    for width in (80, 120):
        look = Look(width=width)
        assert max(map(len, text_of(plan, look=look).splitlines())) <= width


def test_names_are_shortened_only_in_little_space() -> None:
    assert "…q_proj.weight" in text_of(made_plan(2), look=Look(width=80))
    assert "layers.{0..1}.attn.q_proj.weight" in text_of(made_plan(2), look=Look(width=120))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "colour"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
        (io.StringIO(), {"FORCE_COLOR": "1"}, False),
    ],
)
def test_colour_is_for_terminals(stream: Any, environ: dict[str, str], colour: bool) -> None:
    look = report.look_of(stream, environ)
    assert look.colour is colour
    text = render([Line(text="it", style="bold green")], look)
    assert ("\x1b[" in text) is colour
    assert (look.width > 0) is stream.isatty()
