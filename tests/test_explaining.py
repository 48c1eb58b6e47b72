"""Where elements are, against brute force: tensors whose elements are all different, really loaded.

An element is then found by its value: in the file's bytes, and in every rank's parameters.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lading
from lading.checkpoint import Checkpoint, Source
from lading.errors import CallError
from lading.explaining import Explanation, Kind, explain
from lading.explaining_bytes import explain_byte
from lading.layouts import Axis, Cut, Layout, Part
from lading.plan import Plan, Skipped, Target, Tie, make_plan
from lading.preflight import preflight
from lading.pretrained import load_pretrained
from lading.ranks import Ranks, all_ranks
from lading.targeting import state_of

from .schemes.checkpoints import GPTQ_CONFIG, MODEL, Tensors, gptq, model_tensors


def tagged(tensors: Tensors) -> Tensors:
    """The same shapes with values that differ from one another, as far as the dtype has them."""
    counter = itertools.count(1)
    for tensor in tensors.values():
        if tensor.dtype in (torch.int32, torch.float32):
            tags = torch.tensor([next(counter) for _ in range(tensor.numel())])
            tensor.copy_(tags.reshape(tensor.shape))
    return tensors


def write(folder: Path, tensors: Tensors, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(MODEL | config))
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return str(folder)


def dense(folder: Path, *, tied: bool = False) -> str:
    tensors = model_tensors(lambda o, i: {"weight": torch.empty(o, i)})
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.empty(101, 64)
    tensors = tagged({name: tensor.float() for name, tensor in tensors.items()})
    if tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    more = {"tie_word_embeddings": True} if tied else {}
    return write(folder, tensors, vocab_size=101, torch_dtype="float32", **more)


def quantised(folder: Path) -> str:
    torch.manual_seed(3)
    tensors = model_tensors(gptq)
    order = {n: t.clone() for n, t in tensors.items() if n.endswith("g_idx")}
    return write(folder, tagged(tensors) | order, quantization_config=GPTQ_CONFIG)


@dataclass
class Loaded:
    """A checkpoint, its plan, and what every rank has of it."""

    folder: str
    tp_size: int

    def __post_init__(self) -> None:
        before = preflight(self.folder, all_ranks(self.tp_size))
        self.plan, self.checkpoint = before.plan, before.checkpoint
        self.params = {
            ranks.tp_rank: {
                name: tensor.detach()
                for name, tensor in state_of(load_pretrained(self.folder, ranks=ranks)[0])
            }
            for ranks in all_ranks(self.tp_size)
        }
        self.raw = {
            file: Path(self.folder, file).read_bytes() for file in self.checkpoint.file_bytes
        }

    def bits(self, rank: int, name: str, index: tuple[int, ...]) -> bytes:
        value = self.params[rank][name][index].reshape(1).contiguous()
        return value.view(torch.uint8).numpy().tobytes()

    def ask(self, name: str, **how: Any) -> Explanation:
        return explain(self.plan, self.checkpoint, name, **how)

    def holders(self, bits: bytes, dtype: torch.dtype) -> set[tuple[int, str, tuple[int, ...]]]:
        """Every parameter's elements that have these bits."""
        wanted = torch.frombuffer(bytearray(bits), dtype=dtype)[0]
        own = {target.name for target in self.plan.targets}
        return {
            (rank, name, tuple(int(n) for n in place))
            for rank, params in self.params.items()
            for name, param in params.items()
            if param.dtype == dtype and name in own
            for place in torch.nonzero(param == wanted)
        }


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    make = tmp_path_factory.mktemp
    return {
        "dense, 2": Loaded(dense(make("dense")), 2),
        "dense, 4": Loaded(dense(make("dense")), 4),
        "tied, 2": Loaded(dense(make("tied"), tied=True), 2),
        "gptq, 2": Loaded(quantised(make("gptq")), 2),
        "gptq, 4": Loaded(quantised(make("gptq")), 4),
    }


NAMES = ["dense, 2", "dense, 4", "tied, 2", "gptq, 2", "gptq, 4"]


def some_index(shape: tuple[int, ...], chance: random.Random) -> tuple[int, ...]:
    return tuple(chance.choice([0, n - 1, chance.randrange(n)]) for n in shape)


@pytest.mark.parametrize("which", NAMES)
def test_from_the_parameter_to_the_byte(which: str, loads: dict[str, Loaded]) -> None:
    here, chance = loads[which], random.Random(1)
    paddings = 0
    for rank, params in here.params.items():
        for name, param in params.items():
            for _ in range(3):
                index = some_index(tuple(param.shape), chance)
                found = here.ask(name, index=index, rank=rank)
                assert (found.kind, found.shape) == ("parameter", tuple(param.shape))
                bits = here.bits(rank, name, index)
                if found.padding:
                    paddings += 1
                    assert [r.tp_rank for r in found.padding] == [rank]
                    assert (found.entries, set(bits)) == ((), {0})
                    continue
                (entry,) = found.entries
                assert here.raw[entry.source.file][entry.start_byte : entry.stop_byte] == bits
                own = [e for e in entry.elements if e.ranks.tp_rank == rank]
                assert index in [e.index for e in own]
    assert paddings, "a vocabulary that is padded is among them"


@pytest.mark.parametrize("which", NAMES)
def test_from_the_tensor_to_everyone_who_holds_it(which: str, loads: dict[str, Loaded]) -> None:
    here, chance = loads[which], random.Random(2)
    kinds = {"I32": torch.int32, "F32": torch.float32}
    for name, source in here.checkpoint.tensors.items():
        for _ in range(3):
            index = some_index(source.shape, chance)
            found = here.ask(name, index=index, kind="tensor")
            (entry,) = found.entries
            assert (entry.source, entry.index) == (source, index)
            bits = here.raw[source.file][entry.start_byte : entry.stop_byte]
            for element in entry.elements:
                own = here.bits(element.ranks.tp_rank, element.parameter, element.index)
                assert own == bits
            if source.dtype in kinds and not name.endswith("g_idx"):
                elements = {(e.ranks.tp_rank, e.parameter, e.index) for e in entry.elements}
                assert elements == here.holders(bits, kinds[source.dtype])
            back = explain_byte(here.plan, here.checkpoint, source.file, entry.stop_byte - 1)
            assert (back.name, back.entries) == (name, (entry,))


@pytest.mark.parametrize("which", NAMES)
def test_boxes_say_the_same(which: str, loads: dict[str, Loaded]) -> None:
    """Without an index: the regions of each tensor, of each parameter, against the plan's own."""
    here = loads[which]
    copies = {
        (share.ranks.tp_rank, c.source, str(c.source_region), c.target, str(c.target_region))
        for share in here.plan.shares
        for c in share.copies
    }
    found: dict[Kind, set[tuple[Any, ...]]] = {"tensor": set(), "parameter": set()}
    names: dict[Kind, list[str]] = {
        "tensor": [n for n in here.checkpoint.tensors if n not in {t.twin for t in here.plan.ties}],
        "parameter": [target.name for target in here.plan.targets],
    }
    for kind, of_kind in names.items():
        for name in of_kind:
            for box in here.ask(name, kind=kind).boxes:
                if box.source is None:
                    assert "embed" in box.parameter or "lm_head" in box.parameter
                    continue
                regions = box.source.name, str(box.source_region), box.parameter
                found[kind] |= {
                    (ranks.tp_rank, *regions, str(box.target_region)) for ranks in box.ranks
                }
    assert found == {"tensor": copies, "parameter": copies}


def test_what_an_entry_covers(loads: dict[str, Loaded]) -> None:
    """int4 in int32, packed along the inputs; zeros along the outputs, one for 16 inputs."""
    here, module = loads["gptq, 2"], "model.layers.0.self_attn.k_proj"

    def covered(leaf: str, index: tuple[int, int]) -> list[tuple[int, str, int, int]]:
        (entry,) = here.ask(f"{module}.{leaf}", index=index).entries
        return [(c.dim, c.axis, c.start, c.stop) for c in entry.covered]

    inputs, outputs = "in_features of the layer", "part 'k' of out_features of the layer"
    assert covered("qweight", (5, 9)) == [(0, inputs, 40, 48)]
    assert covered("qzeros", (3, 2)) == [(0, inputs, 48, 64), (1, outputs, 16, 24)]
    assert covered("scales", (1, 7)) == [(0, inputs, 16, 32)]
    (entry,) = here.ask(f"{module}.qweight", index=(5, 9)).entries
    assert "8" in entry.covered[0].reason


def test_one_rank_of_a_tensor(loads: dict[str, Loaded]) -> None:
    here = loads["dense, 4"]
    name = "model.layers.0.self_attn.k_proj.weight"
    ranks = {
        rank: [
            e.ranks.tp_rank for e in here.ask(name, index=(20, 3), rank=rank).entries[0].elements
        ]
        for rank in (None, 0, 2, 3)
    }
    assert ranks == {None: [2, 3], 0: [], 2: [2], 3: [3]}, "the second KV head, of 16 rows"
    assert [b.ranks[0].tp_rank for b in here.ask(name, rank=3).boxes] == [3]


def test_a_parameters_index_on_every_rank(loads: dict[str, Loaded]) -> None:
    here = loads["dense, 4"]
    found = here.ask("model.layers.0.self_attn.qkv_proj.weight", index=(20, 3))
    held = [[e.ranks.tp_rank for e in entry.elements] for entry in found.entries]
    assert held == [[0, 1], [2, 3]], "row 20 is a row of k: two ranks have the same one"
    norm = here.ask("model.norm.weight", index=(5,), kind="parameter")
    assert [len(entry.elements) for entry in norm.entries] == [4]


def test_names_that_are_both(loads: dict[str, Loaded]) -> None:
    here, name = loads["dense, 2"], "model.layers.0.self_attn.o_proj.weight"
    tensor, param = here.ask(name), here.ask(name, rank=1)
    assert (tensor.kind, tensor.shape) == ("tensor", (64, 64))
    assert (param.kind, param.shape) == ("parameter", (64, 32))
    assert here.ask(name, kind="parameter").shape == (64, 32)
    assert here.ask(name, kind="tensor", rank=1).shape == (64, 64)
    assert tensor.notes == ("a parameter has this name, too; this is the checkpoint tensor",)
    assert param.notes == ("a checkpoint tensor has this name, too; this is the parameter",)


def test_ties(loads: dict[str, Loaded]) -> None:
    here = loads["tied, 2"]
    assert here.plan.ties == (
        Tie(
            target="model.embed_tokens.weight",
            source="model.embed_tokens.weight",
            twin="lm_head.weight",
        ),
    )
    twin = here.ask("lm_head.weight", kind="tensor", index=(3, 4))
    assert twin.notes[0] == (
        "is tied to model.embed_tokens.weight, and has to be equal to it: it is compared, and the "
        "ranks keep the other"
    )
    (entry,) = twin.entries
    assert [(e.ranks.tp_rank, e.parameter) for e in entry.elements] == [
        (0, "model.embed_tokens.weight")
    ]
    alias = here.ask("lm_head.weight", kind="parameter")
    assert alias.notes[0] == "is another name of model.embed_tokens.weight"
    assert any("its twin lm_head.weight is stored, too" in note for note in alias.notes)


def test_constants(loads: dict[str, Loaded]) -> None:
    here = loads["gptq, 2"]
    name = "model.layers.0.mlp.down_proj.g_idx"
    found = here.ask(name, index=(17,), kind="tensor")
    assert found.notes[0] == (
        "is compared with what the declaration says (group index), no rank keeps it"
    )
    assert found.entries[0].elements == ()


def made(
    layout: Layout, dtype: str = "BF16", *, stored: str | None = None, offset: int = 64, **how: Any
) -> tuple[Plan, Checkpoint]:
    """A plan and headers of one tensor without a file."""
    shape = layout.source_shape()
    source = Source(
        name="w",
        dtype=stored or dtype,
        shape=(*shape[:-1], shape[-1] * 2) if dtype == "F4" else shape,
        file="a.safetensors",
        offset_bytes=offset,
        num_bytes=4 * 6,
    )
    plan = make_plan(
        [Target(name="w", layout=layout, dtype=dtype)],
        {"w": source},
        ranks=all_ranks(layout.tp_size),
    )
    checkpoint = Checkpoint(
        folder="/folder",
        tensors={"w": source},
        file_bytes={"a.safetensors": offset + 24},
        metadata={},
        config=None,
        format=how.get("format", "safetensors"),
    )
    return plan, checkpoint


def columns(tp_size: int) -> Layout:
    def cut(size: int, pieces: int | None) -> Cut:
        return Cut(axis=Axis(parts=(Part(size=size, max_pieces=pieces),)))

    return Layout(cuts=(cut(4, 1), cut(6, None)), tp_size=tp_size)


def test_two_fp4_values_in_an_entry() -> None:
    plan, checkpoint = made(columns(3), "F4")
    assert checkpoint.tensors["w"].shape == (4, 12)
    for column, first in ((7, 6), (6, 6), (8, 8)):
        (entry,) = explain(plan, checkpoint, "w", index=(2, column)).entries
        assert (entry.index, entry.start_byte) == ((2, first), 64 + (2 * 12 + first) // 2)
        assert entry.stop_byte == entry.start_byte + 1
        (element,) = entry.elements
        assert (element.ranks.tp_rank, element.index) == (first // 4, (2, first % 4 // 2))


def test_files_without_offsets() -> None:
    plan, checkpoint = made(columns(2), "U8", format="torch", offset=0)
    found = explain(plan, checkpoint, "w", index=(1, 2))
    assert (found.has_offsets, found.entries[0].start_byte) == (False, 8)
    with pytest.raises(CallError, match="its tensors have no byte offsets"):
        explain_byte(plan, checkpoint, "a.safetensors", 3)


def test_casts_and_skipped_tensors() -> None:
    plan, checkpoint = made(columns(2), "F32", stored="BF16")
    assert explain(plan, checkpoint, "w", kind="parameter").notes[0] == (
        "values are cast from bf16 to fp32"
    )
    assert explain(plan, checkpoint, "w").notes[0] == "values are cast from bf16 to fp32 in w"
    empty = make_plan([], {}, ranks=[Ranks()])
    skipped = Plan(
        targets=(),
        sources={},
        bindings=(),
        shares=empty.shares,
        skipped=(Skipped(source="w", reason="of no use"),),
    )
    found = explain(skipped, checkpoint, "w", index=(1, 1))
    assert found.notes == ("is skipped, no rank keeps it: of no use",)
    assert found.entries[0].elements == ()


@dataclass(frozen=True)
class Fails:
    id: str
    name: str
    how: dict[str, Any]
    message: str


LONG = "model.layers.0.self_attn.o_proj.weight"
FAILS = [
    Fails(
        "misspelt",
        "model.layers.0.self_attn.o_prj.weight",
        {},
        f"Try: {LONG} or ",
    ),
    Fails("nothing like it", "zzz", {}, "zzz: is neither a parameter nor a checkpoint tensor of "),
    Fails(
        "no parameter",
        "model.layers.0.self_attn.q_proj.weight",
        {"kind": "parameter"},
        "is no parameter of ",
    ),
    Fails(
        "dims",
        LONG,
        {"index": (1,)},
        f"{LONG}: index [1] has 1, needs 2 numbers (its shape is [64, 64]).",
    ),
    Fails(
        "outside",
        LONG,
        {"index": (1, 64)},
        f"{LONG}: index [1, 64] is outside of it, needs at most [63, 63] (its shape is [64, 64]).",
    ),
    Fails("below", LONG, {"index": (-1, 3)}, "index [-1, 3] is outside of it"),
    Fails(
        "outside of the rank's",
        LONG,
        {"index": (1, 32), "rank": 1},
        "needs at most [63, 31] (its shape is [64, 32]).",
    ),
    Fails("rank", LONG, {"rank": 2}, "rank: is 2, needs 0 to 1 (TP is 2)."),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused(case: Fails, loads: dict[str, Loaded]) -> None:
    with pytest.raises(CallError) as caught:
        loads["dense, 2"].ask(case.name, **case.how)
    assert case.message in str(caught.value)


@pytest.mark.parametrize(
    ("file", "byte", "message"),
    [
        ("model.safetensors", 3, "model.safetensors: byte 3 is in the file's header, needs one of"),
        ("model.safetensors", 10**9, "model.safetensors: byte is 1000000000, needs 0 to "),
        ("mode.safetensors", 3, "that has tensors. Try: model.safetensors."),
    ],
)
def test_refused_bytes(file: str, byte: int, message: str, loads: dict[str, Loaded]) -> None:
    here = loads["dense, 2"]
    with pytest.raises(CallError) as caught:
        explain_byte(here.plan, here.checkpoint, file, byte)
    assert message in str(caught.value)


def test_a_pre_sharded_folder(tmp_path: Path) -> None:
    """Each copy of an entry in the ranks' files, and what the original file had."""
    (tmp_path / "in").mkdir()
    folder, out = quantised(tmp_path / "in"), tmp_path / "out"
    lading.shard(folder, tp_size=4, out=out)
    here, original = preflight(out, all_ranks(2)), Loaded(folder, 2)
    chance = random.Random(3)
    for name, source in here.checkpoint.tensors.items():
        index = some_index(source.shape, chance)
        found = explain(here.plan, here.checkpoint, name, index=index, kind="tensor")
        assert found.notes[-1].startswith("the folder is pre-sharded")
        (entry,) = found.entries
        bits = original.raw[entry.source.file][entry.start_byte : entry.stop_byte]
        assert len(bits) == entry.stop_byte - entry.start_byte
        copies = [(out / file).read_bytes()[a:b] for file, a, b in entry.stored]
        assert copies, "it is in some file"
        assert set(copies) == {bits}
