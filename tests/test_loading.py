"""The verb `load`: every element in its place, or nothing changed, or marked as unusable."""

from __future__ import annotations

import copy
import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import lading
from lading import loading, targeting, verdicts
from lading.errors import (
    CallError,
    ConflictError,
    DtypeError,
    FileError,
    LadingError,
    NotLoadedError,
    PlanError,
    RankError,
)
from lading.layouts import Layout
from lading.loading import LoadReport
from lading.names import Names
from lading.nn import (
    ColumnParallelLinear,
    ParallelLayer,
    ParallelLMHead,
    VocabParallelEmbedding,
    check_loaded,
)
from lading.parameter import BasevLLMParameter, ModelWeightParameter
from lading.placing import place_of
from lading.ranks import Ranks, all_ranks
from lading.transport import Limits
from lading.writing import same_bits

from .loading_made import Block, Spoiling, break_disk, indices, local, on_meta, save, shapes

# 16 KV heads are cut at these sizes; 2 and 4 are shared by neighbours where there are more ranks.
SIZES = [
    (1, 16),
    (2, 16),
    (3, 3),
    (4, 16),
    (4, 2),
    (6, 2),
    (6, 6),
    (8, 4),
    (12, 4),
    (16, 16),
    (16, 2),
]


@pytest.mark.parametrize(("size", "kv_heads"), SIZES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_every_element_is_the_planned_one(
    size: int, kv_heads: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    heads = 48 if size in (3, 6, 12) else 16
    full = indices(shapes(heads=heads, kv_heads=kv_heads), dtype)
    folder = save(tmp_path, full, files=3)
    for ranks in all_ranks(size):
        model = on_meta(ranks, heads=heads, kv_heads=kv_heads, dtype=dtype)
        report = lading.load(model, folder, device="cpu")
        expected = local(full, ranks, kv_heads)
        state = model.state_dict()
        assert set(state) == set(expected)
        for name, tensor in state.items():
            assert tensor.shape == expected[name].shape, name
            assert torch.equal(tensor, expected[name]), name
        assert report.ranks == ranks
        assert report.parameter_bytes == sum(t.nbytes for t in state.values())
        assert report.checkpoint_bytes == sum(t.nbytes for t in full.values())


@pytest.mark.parametrize("ranks", all_ranks(4), ids=str)
def test_fused_on_disk_is_the_same(ranks: Ranks, tmp_path: Path) -> None:
    full = indices(shapes())
    fused = {name: t for name, t in full.items() if name in shapes(fused=True)}
    for leaf in ("weight", "bias"):
        fused[f"qkv_proj.{leaf}"] = torch.cat([full[f"{p}_proj.{leaf}"] for p in "qkv"])
    fused["gate_up_proj.weight"] = torch.cat([full[f"{p}_proj.weight"] for p in ("gate", "up")])
    assert {name: tuple(t.shape) for name, t in fused.items()} == shapes(fused=True)
    model = on_meta(ranks, dtype=torch.float64)
    lading.load(model, save(tmp_path, fused), device="cpu")
    expected = local(full, ranks, 16)
    assert all(torch.equal(t, expected[name]) for name, t in model.state_dict().items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", indices(shapes()), files=2)


RANK = Ranks(tp_rank=1, tp_size=4)


def block() -> Block:
    model = Block(RANK, dtype=torch.float64)
    with torch.no_grad():  # fresh memory may hold NaN, which equals nothing
        for param in model.parameters():
            param.fill_(-1)
    return model


def meta() -> Block:
    return on_meta(RANK, dtype=torch.float64)


def contents(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    # By bits: memory that nobody wrote may hold NaN, which equals nothing.
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


def expected() -> dict[str, torch.Tensor]:
    return local(indices(shapes()), RANK, 16)


def test_meta_gets_memory_and_keeps_each_object(folder: Path) -> None:
    model = meta()
    before = dict(model.named_parameters())
    classes = {name: type(param) for name, param in before.items()}
    lading.load(model, folder, device="cpu")
    for name, param in model.named_parameters():
        assert param is before[name]
        assert type(param) is classes[name]
        assert not param.requires_grad
    assert same(contents(model), expected())
    check_loaded(model)
    lading.load(model, folder)  # now into live memory
    assert same(contents(model), expected())


def test_meta_stays_meta_where_reading_fails(folder: Path) -> None:
    model = meta()
    with pytest.raises(FileError):
        lading.load(model, folder, device="cpu", progress=failing(folder))
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    lading.load(model, folder, device="cpu")
    assert same(contents(model), expected())


def failing(folder: Path) -> Spoiling:
    """The disk fails when the second file's tensors are read; the first is whole."""
    return Spoiling(lambda: break_disk(folder / "model-00002-of-00002.safetensors"))


@pytest.mark.parametrize("engine", ["python", "native"])
def test_a_live_model_that_failed_half_way_refuses_until_healed(
    engine: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LADING_ENGINE", engine)
    model = block()
    lading.load(model, folder)
    with pytest.raises(FileError) as caught:
        lading.load(model, folder, progress=failing(folder))
    reason = str(caught.value)
    assert re.fullmatch(
        r"[a-z_]+\.(weight|bias)(, part .+)?: checkpoint tensor '.+' cannot be read: the file "
        r"cannot be read at offset \d+: Input/output error\. "
        r"In model-00002-of-00002\.safetensors\.",
        reason,
    )
    text = (
        f"Block: its weights are partly overwritten by a load that failed ({reason}), needs a "
        "load that succeeds."
    )
    with pytest.raises(NotLoadedError) as refused:
        model(torch.ones(1, 6))
    assert str(refused.value) == text
    with pytest.raises(NotLoadedError) as refused:
        check_loaded(model)
    assert str(refused.value) == text
    with pytest.raises(NotLoadedError, match="ColumnParallelLinear: its weights are partly"):
        model.up(torch.ones(1, 6))
    lading.load(model, folder)
    assert same(contents(model), expected())
    model(torch.ones(1, 6))
    model.up(torch.ones(1, 6, dtype=torch.float64))
    check_loaded(model)


def remove(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def shrink(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 8)


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (remove, r"cannot be opened: No such file or directory\."),
        (
            shrink,
            r"is \d+ bytes, needs \d+ \(its size when the plan was made; it has changed since\)\.",
        ),
    ],
)
def test_a_file_that_changes_after_the_plan(
    spoil: Callable[[Path], None], fact: str, folder: Path
) -> None:
    model = block()
    before = contents(model)
    checkpoint = lading.open_checkpoint(folder)
    spoil(folder)
    with pytest.raises(FileError) as caught:
        lading.load(model, checkpoint)
    assert re.fullmatch(
        rf"[a-z_.]+(, part .+)?: checkpoint tensor '[a-z_.]+' cannot be read: the file {fact} "
        r"In model-00002-of-00002\.safetensors\.( Try: plan again\.)?",
        str(caught.value),
    )
    assert same(contents(model), before)
    model(torch.ones(1, 6))  # nothing was written: nothing to refuse


def test_a_plan_that_fails_leaves_all_untouched(tmp_path: Path) -> None:
    full = indices(shapes())
    del full["k_proj.weight"]
    full["norm"] = full["norm"][:5].clone()
    full["other"] = torch.zeros(2)
    model = block()
    before = contents(model)
    with pytest.raises(PlanError) as caught:
        lading.load(model, save(tmp_path, full))
    assert str(caught.value) == (
        "the plan has 3 problems:\n"
        "  norm: checkpoint tensor 'norm' is fp64[5], needs fp64[6] (6 = the declared size). "
        "In model.safetensors.\n"
        "  qkv_proj.weight, part 'k': the checkpoint has no tensor 'k_proj.weight', nor a fused "
        "'qkv_proj.weight'.\n"
        "  other: checkpoint tensor fp32[2] belongs to no parameter, and no rule skips it. "
        "In model.safetensors."
    )
    assert same(contents(model), before)
    model(torch.ones(1, 6))


def test_part_of_the_model_on_meta(folder: Path) -> None:
    model = block()
    live = model.up.weight
    with torch.device("meta"):
        model.o_proj = meta().o_proj
    lading.load(model, folder, device="cpu")
    assert model.up.weight is live
    assert same(contents(model), expected())


def test_buffers_that_are_not_persistent_are_left_alone(folder: Path) -> None:
    model = block()
    model.cache += 5
    lading.load(model, folder)
    assert model.cache.tolist() == [5, 5]
    assert torch.equal(model.scale, indices(shapes())["scale"])


def test_memory_that_is_not_contiguous(folder: Path) -> None:
    model = block()
    for param in model.parameters():
        wide = torch.zeros(*param.shape[:-1], param.shape[-1] * 2, dtype=torch.float64)
        param.data = wide[..., ::2]
        assert param.dim() == 1 or not param.is_contiguous()
    lading.load(model, folder)
    assert same(contents(model), expected())


@pytest.mark.parametrize(
    ("device", "wanted"), [(None, torch.device("cuda", 1)), ("cpu", "cpu")], ids=["default", "told"]
)
def test_a_model_on_a_gpu_stays_there(
    monkeypatch: pytest.MonkeyPatch, device: str | None, wanted: object
) -> None:
    """Whatever LOCAL_RANK says: the current device would change under the process group."""
    asked: list[object] = []

    def run(_prepare: object, **options: Any) -> tuple[None, None]:
        asked.append(options["device"])
        return None, None

    model = on_meta(Ranks())
    held = [SimpleNamespace(is_cuda=False), SimpleNamespace(is_cuda=True, device=wanted)]
    monkeypatch.setattr(loading.owners.Walk, "params", [("weight", param) for param in held])
    monkeypatch.setattr(loading, "run_load", run)
    lading.load(model, "nowhere", ranks=Ranks(), device=device)
    assert asked == [wanted]


def test_under_inference_mode_and_a_default_device(folder: Path) -> None:
    with torch.inference_mode(), torch.device("meta"):
        model = Block(RANK, dtype=torch.float64)
        lading.load(model, folder, device="cpu", limits=Limits(staging_bytes=100))
    assert same(contents(model), expected())
    assert not any(param.is_inference() for param in model.parameters())
    with torch.inference_mode():
        live = block()
    lading.load(live, folder, limits=Limits(staging_bytes=100))
    assert same(contents(live), expected())


@pytest.mark.parametrize("staging", [1, 8, 50, 1 << 20])
@pytest.mark.parametrize("ranks", [RANK, Ranks(tp_rank=15, tp_size=16)], ids=str)
def test_any_staging_buffer_gives_the_same(staging: int, ranks: Ranks, folder: Path) -> None:
    model = on_meta(ranks, dtype=torch.float32)  # cast: nothing is read straight into place
    report = lading.load(model, folder, device="cpu", limits=Limits(staging_bytes=staging))
    needed = local(indices(shapes()), ranks, 16)
    assert same(contents(model), {name: t.float() for name, t in needed.items()})
    assert set(report.casts) == {(name, "F64", "F32") for name in needed}
    assert report.read_bytes - report.excess_bytes == 2 * sum(
        t.nbytes
        for name, t in model.state_dict().items()
        if "embed" not in name
        if "head" not in name
    ) + sum(8 * int((needed[n] != 0).sum()) for n in ("embed.weight", "head.weight"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_progress(dtype: torch.dtype, folder: Path) -> None:
    seen = Spoiling()
    lading.load(on_meta(RANK, dtype=dtype), folder, device="cpu", progress=seen)
    (word, total), *steps, last = seen.calls
    assert (word, last) == ("start", "finish")
    assert sum(steps) == total
    needed = expected()
    padding = sum(8 * int((needed[n] == 0).sum()) for n in ("embed.weight", "head.weight"))
    assert total == sum(t.nbytes for t in needed.values()) - padding
    failed = failing(folder)
    with pytest.raises(FileError):
        lading.load(meta(), folder, device="cpu", progress=failed)
    assert failed.calls[0] == ("start", total)
    assert failed.calls[-1] == "finish"


def test_a_progress_object_that_fails(folder: Path) -> None:
    class Broken(Spoiling):
        def advance(self, num_bytes: int) -> None:
            raise ZeroDivisionError("of all things")

    model = meta()
    with pytest.raises(ZeroDivisionError):
        lading.load(model, folder, device="cpu", progress=Broken())
    assert model.up.weight.is_meta


def test_report_as_text() -> None:
    report = LoadReport(
        ranks=Ranks(),
        checkpoint_bytes=16_060_000_000,
        parameter_bytes=1,
        read_bytes=1,
        excess_bytes=0,
        seconds=0.81,
        num_copies=1,
        casts=(),
        skipped=(),
    )
    assert str(report) == "16.1 GB in 0.81 s, 19.8 GB/s"


def test_report_of_what_was_skipped(tmp_path: Path) -> None:
    full = indices(shapes())
    full["rotary_emb.inv_freq"] = torch.zeros(4)
    report = lading.load(meta(), save(tmp_path, full), device="cpu")
    reason = "rotary frequencies are computed from config.json"
    assert report.skipped == (("rotary_emb.inv_freq", reason),)
    assert report.casts == ()
    assert report.num_copies == 16  # one for each checkpoint tensor that is used


def overflowing(value: float) -> dict[str, torch.Tensor]:
    full = {name: t.bfloat16() for name, t in indices(shapes()).items()}
    full["up.weight"][70, 2] = value
    full["up.weight"][71, 3] = -value
    return full


def test_an_overflow_is_refused(tmp_path: Path) -> None:
    model = on_meta(RANK, dtype=torch.float16)
    with pytest.raises(DtypeError) as caught:
        lading.load(model, save(tmp_path, overflowing(1e38)), device="cpu")
    assert str(caught.value) == (
        "up.weight: checkpoint tensor 'up.weight': 2 values are too large for fp16: up to "
        "9.96921e+37, needs at most 65504. In model.safetensors."
    )
    assert model.up.weight.is_meta


@pytest.mark.parametrize("value", [60000.0, float("inf"), float("nan")])
def test_casts_that_lose_no_value(value: float, tmp_path: Path) -> None:
    full = overflowing(value)
    model = on_meta(RANK, dtype=torch.float16)
    report = lading.load(model, save(tmp_path, full), device="cpu")
    needed = local({name: t.half() for name, t in full.items()}, RANK, 16)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, needed[name], rtol=0, atol=0, equal_nan=True)
    assert set(report.casts) == {(name, "BF16", "F16") for name in needed}


class Tied(nn.Module):
    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        options: Any = {"padding_size": 4, "params_dtype": torch.float64, "ranks": ranks}
        self.embed = VocabParallelEmbedding(37, 6, **options)
        self.head = ParallelLMHead(37, 6, **options).tie_weights(self.embed)


@pytest.mark.parametrize("ranks", all_ranks(3), ids=str)
@pytest.mark.parametrize(
    "names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]]
)
def test_tied(ranks: Ranks, names: list[str], tmp_path: Path) -> None:
    table = indices({"embed.weight": (37, 6)})["embed.weight"]
    folder = save(tmp_path, {name: table.clone() for name in names})
    with torch.device("meta"):
        model = Tied(ranks)
    lading.load(model, folder, device="cpu")
    assert model.head.weight is model.embed.weight
    padded = torch.cat([table, torch.zeros(11, 6)])  # 48 rows: a multiple of 4 and of 3
    assert torch.equal(model.head.weight, padded.chunk(3)[ranks.tp_rank])


@pytest.mark.parametrize("staging", [8, 1 << 20])
def test_twins_that_differ(staging: int, tmp_path: Path) -> None:
    table = indices({"embed.weight": (37, 6)})["embed.weight"]
    other = table.clone()
    other[20, 3] = -1
    folder = save(tmp_path, {"embed.weight": table, "head.weight": other})
    model = Tied(Ranks(tp_rank=1, tp_size=3))
    before = contents(model)
    with pytest.raises(ConflictError) as caught:
        lading.load(model, folder, limits=Limits(staging_bytes=staging))
    where = "[20:21, 3:4]" if staging == 8 else "[16:32, 0:6]"
    assert str(caught.value) == (
        "embed.weight: is tied, but checkpoint tensors 'embed.weight' and 'head.weight' differ "
        f"in {where}. In model.safetensors."
    )
    assert same(contents(model), before)
    model.embed.require_loaded()  # nothing was written: nothing to refuse


def test_renamed_checkpoints_and_others(tmp_path: Path) -> None:
    full = indices(shapes())
    other = Names(renames=((r"^", "transformer."),))
    names = Names(others=((r"transformer\..*", other),))
    for i, tensors in enumerate((full, {f"transformer.{k}": t for k, t in full.items()})):
        model = meta()
        lading.load(model, save(tmp_path / str(i), tensors), names=names, device="cpu")
        assert same(contents(model), expected())
        model = meta()
        vars(model)["names"] = names
        lading.load(model, tmp_path / str(i), device="cpu")
        assert same(contents(model), expected())


def test_packed_modules_mapping_of_the_model(tmp_path: Path) -> None:
    class Model(Block):
        packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"gate_up_proj": ["w1", "w3"]}

    full = indices(shapes())
    full["w1.weight"] = full.pop("gate_proj.weight")
    full["w3.weight"] = full.pop("up_proj.weight")
    model = Model(RANK, dtype=torch.float64)
    lading.load(model, save(tmp_path, full))
    assert torch.equal(model.gate_up_proj.weight[:12], full["w1.weight"][12:24])
    assert torch.equal(model.gate_up_proj.weight[12:], full["w3.weight"][12:24])


def refused(model: nn.Module, folder: Path, **options: Any) -> str:
    before = {name: t.device.type for name, t in model.state_dict().items()}
    with pytest.raises(LadingError) as caught:
        lading.load(model, folder, **options)
    assert {name: t.device.type for name, t in model.state_dict().items()} == before
    return str(caught.value)


def test_another_rank_than_the_models(folder: Path) -> None:
    assert refused(meta(), folder, ranks=Ranks(tp_rank=2, tp_size=4)) == (
        "Block: was built for rank 1 of 4, needs rank 2 of 4 (the load's)."
    )
    model = nn.Sequential(ColumnParallelLinear(6, 8, False, prefix="x", ranks=RANK))
    assert refused(model, folder, ranks=Ranks(tp_rank=1, tp_size=2)) == (
        "0.weight: was built for 4 ranks, needs 2 (the load's tp_size)."
    )
    mixed = nn.Sequential(
        ColumnParallelLinear(6, 8, ranks=RANK), ColumnParallelLinear(8, 8, ranks=Ranks(tp_size=4))
    )
    assert refused(mixed, folder) == (
        "Sequential: has layers built for rank 0 of 4 and rank 1 of 4, needs one rank."
    )


def test_a_parameter_that_does_not_say_how_it_is_cut(tmp_path: Path) -> None:
    model = nn.Module()
    data = torch.zeros(4, 6)
    param = ModelWeightParameter(data=data, output_dim=0, input_dim=1, weight_loader=None)
    model.register_parameter("w", param)
    folder = save(tmp_path, {"w": torch.ones(4, 6)})
    assert refused(model, folder, ranks=Ranks(tp_size=2)) == (
        "w: ModelWeightParameter does not say how it is cut over 2 ranks, needs a layout. "
        "Try: build it with a layer of lading.nn, or set its tp_layout."
    )
    lading.load(model, folder, ranks=Ranks())
    assert torch.equal(param, torch.ones(4, 6))
    param.data = torch.zeros(4, 6)
    param.tp_layout = Layout.replicated((4, 6), 2)
    lading.load(model, folder, ranks=Ranks(tp_rank=1, tp_size=2))
    assert torch.equal(param, torch.ones(4, 6))
    param.data = torch.zeros(4, 7)
    assert refused(model, folder, ranks=Ranks(tp_rank=1, tp_size=2)) == (
        "w: has shape [4, 7], needs [4, 6] (its own layout's)."
    )


def test_foreign_parameters_keep_their_class(tmp_path: Path) -> None:
    class Scale(nn.Parameter):
        pass

    with torch.device("meta"):
        model = nn.Module()
        model.s = Scale(torch.zeros(3))
        model.s.note = "kept"
    param = model.s
    lading.load(
        model,
        save(tmp_path, {"s": torch.arange(3.0)}),
        ranks=Ranks(tp_rank=1, tp_size=2),
        device="cpu",
    )
    assert model.s is param
    assert type(param) is Scale
    assert param.note == "kept"
    assert param.requires_grad
    assert param.tolist() == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_layers_without_tensor_parallelism(rank: int, tmp_path: Path) -> None:
    ranks = Ranks(tp_rank=rank, tp_size=3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = lading.nn.QKVParallelLinear(5, 2, 4, 2, ranks=ranks, disable_tp=True)
            self.up = ColumnParallelLinear(5, 6, False, ranks=ranks)

    full = indices(
        {
            **{f"{p}_proj.weight": (8 if p == "q" else 4, 5) for p in "qkv"},
            **{f"{p}_proj.bias": (8 if p == "q" else 4,) for p in "qkv"},
            "up.weight": (6, 5),
        },
        torch.float32,
    )
    model = Model()
    lading.load(model, save(tmp_path, full))
    for leaf in ("weight", "bias"):
        whole = torch.cat([full[f"{p}_proj.{leaf}"] for p in "qkv"])
        assert torch.equal(model.qkv_proj.get_parameter(leaf), whole)
    assert torch.equal(model.up.weight, full["up.weight"].chunk(3)[rank])


def test_torch_files(tmp_path: Path) -> None:
    full = indices(shapes())
    full["up.weight"] = torch.cat([full["up.weight"], full["up.weight"]], 1).t()[:6].t()
    assert not full["up.weight"].is_contiguous()
    torch.save(full, tmp_path / "pytorch_model.bin")
    for dtype in (torch.float64, torch.float32):
        model = on_meta(RANK, dtype=dtype)
        lading.load(model, tmp_path, device="cpu", limits=Limits(staging_bytes=200))
        needed = local(full, RANK, 16)
        assert same(contents(model), {name: t.to(dtype) for name, t in needed.items()})


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_number_of_threads(threads: int, dtype: torch.dtype, folder: Path) -> None:
    model = on_meta(RANK, dtype=dtype)
    limits = Limits(staging_bytes=64, num_threads=threads)
    lading.load(model, folder, device="cpu", limits=limits)
    assert same(contents(model), {name: t.to(dtype) for name, t in expected().items()})


def test_what_was_read(folder: Path) -> None:
    """What is kept, and gaps that are shorter than what a call costs."""
    model = meta()
    report = lading.load(model, folder, device="cpu")
    needed = expected()
    padding = sum(8 * int((needed[n] == 0).sum()) for n in ("embed.weight", "head.weight"))
    kept = sum(t.nbytes for t in needed.values()) - padding
    assert report.read_bytes - report.excess_bytes == kept
    most = sum((folder / name).stat().st_size for name in os.listdir(folder))
    assert 2 * 5 * 3 * 12 * 8 <= report.excess_bytes < most - kept, "at least row cuts have gaps"


def test_weights_that_are_updated(folder: Path, tmp_path: Path) -> None:
    model = block()
    lading.load(model, folder)
    new = {name: -t for name, t in indices(shapes()).items()}
    lading.load(model, save(tmp_path / "new", new))
    needed = local(new, RANK, 16)
    assert same(contents(model), needed)
    lading.start_load(model)
    weight = model.up.weight
    weight.weight_loader(weight, -new["up.weight"])
    assert torch.equal(weight, -needed["up.weight"])


def test_calls_that_cannot_be_meant(folder: Path) -> None:
    with pytest.raises(CallError) as caught:
        Limits(staging_bytes=0)
    assert str(caught.value) == "Limits: staging_bytes is 0, needs an int of at least 1."
    assert refused(meta(), folder, device="meta") == "device: is meta, needs one that has memory."
    assert refused(meta(), folder, device="gpu").startswith(
        "device: is 'gpu', needs a device of torch (Expected one of cpu, cuda,"
    )


def test_cuda_is_this_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.MonkeyPatch.context() as none:
        none.setattr(torch.cuda, "is_available", lambda: False)
        assert place_of(None, RANK) == torch.device("cpu")
        with pytest.raises(CallError) as caught:
            place_of("cuda", RANK)
        assert str(caught.value) == "device: is 'cuda', but this process sees no GPU."
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    last = Ranks(tp_rank=3, tp_size=4)
    assert place_of(None, last) == place_of("cuda", last) == torch.device("cuda:1")
    assert place_of("cuda:0", last) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert place_of("cuda", last) == torch.device("cuda:0")


def test_targets_are_what_the_layers_declare() -> None:
    targets = {target.name: target for target in targeting.targets_of(meta(), RANK)}
    assert set(targets) == set(expected())
    for name, tensor in meta().state_dict(keep_vars=True).items():
        if isinstance(tensor, BasevLLMParameter):
            assert targets[name].layout == tensor.tp_layout
    layers = [m for m in meta().modules() if isinstance(m, ParallelLayer)]
    assert len(layers) == 7


def test_facts_that_fail_are_a_verdict_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the other rank would wait in an exchange to which this one never comes."""
    told: list[Any] = []

    def exchange(value: Any, _group: object) -> list[Any]:
        told.append(value)
        return [value, (None, "facts")]

    monkeypatch.setattr(verdicts.ranks_module, "exchange", exchange)
    group: Any = object()
    with pytest.raises(RankError, match=r"MemoryError: all of it\. On rank 0\.$"):
        verdicts.all_well(lambda: None, lambda _: _fail(MemoryError("all of it")), group)
    assert len(told) == 1


def _fail(error: Exception) -> None:
    raise error


# ------------------------------------------------------------- what is done once for all layers


def test_equal_layers_share_their_layouts() -> None:
    one, two = (ColumnParallelLinear(4, 8, ranks=Ranks(tp_size=2), prefix=p) for p in "ab")
    other = ColumnParallelLinear(4, 16, ranks=Ranks(tp_size=2))
    assert one.weight.tp_layout is two.weight.tp_layout
    assert one.weight.tp_layout != other.weight.tp_layout


def test_equal_layouts_of_a_model_become_one() -> None:
    ranks = Ranks(tp_size=2)
    model = nn.ModuleList(ColumnParallelLinear(4, 8, ranks=ranks) for _ in range(3))
    for layer in model:
        layer.weight.tp_layout = copy.deepcopy(layer.weight.tp_layout)
    assert len({id(layer.weight.tp_layout) for layer in model}) == 3
    targets = [t for t in targeting.targets_of(model, ranks) if t.name.endswith("weight")]
    assert [t.name for t in targets] == [f"{i}.weight" for i in range(3)]
    assert len({id(t.layout) for t in targets}) == 1
    assert targets[0].layout == model[0].weight.tp_layout


def test_a_layout_of_another_shape_is_found_among_equal_ones() -> None:
    ranks = Ranks(tp_size=2)
    model = nn.ModuleList(ColumnParallelLinear(4, 8, ranks=ranks) for _ in range(3))
    model[1].weight.data = torch.zeros(5, 4)
    with pytest.raises(lading.PlanError, match=re.escape("1.weight: has shape [5, 4], needs [4,")):
        targeting.targets_of(model, ranks)


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_left_as_it_was(folder: Path, is_enabled: bool) -> None:
    was = gc.isenabled()
    seen: list[int] = []
    model = block()
    (gc.enable if is_enabled else gc.disable)()
    gc.callbacks.append(lambda phase, info: seen.append(info["generation"]))
    try:
        lading.load(model, folder)
        assert gc.isenabled() == is_enabled
    finally:
        gc.callbacks.pop()
        (gc.enable if was else gc.disable)()
    assert bool(seen) == is_enabled, "what the pause put off is done while bytes are being moved"
    assert same(contents(model), expected())


def test_two_parameters_in_one_memory(folder: Path) -> None:
    """What is written last would be in both."""
    model = block()
    before = contents(model)
    model.qkv_proj.bias.data = model.qkv_proj.weight.data.view(-1)[: len(model.qkv_proj.bias)]
    with pytest.raises(lading.PlanError) as caught:
        lading.load(model, folder)
    text = str(caught.value)
    assert "qkv_proj.weight: lies in the memory of qkv_proj.bias" in text or (
        "qkv_proj.bias: lies in the memory of qkv_proj.weight, needs its own" in text
    ), text
    assert "register one nn.Parameter under both names" in text
    model.qkv_proj.bias.data = before["qkv_proj.bias"].clone()
    assert same_bits(model.qkv_proj.weight, before["qkv_proj.weight"])


def test_neighbours_in_one_memory_are_no_trouble(folder: Path) -> None:
    """Parameters that are slices of one flat buffer, one after another."""
    model = block()
    params = list(model.parameters())
    flat = torch.full((sum(p.numel() for p in params),), -1.0, dtype=torch.float64)
    at = 0
    for param in params:
        param.data = flat[at : at + param.numel()].view(param.shape)
        at += param.numel()
    lading.load(model, folder)
    assert same(contents(model), expected())


def test_an_expanded_parameter_is_refused_before_anything_is_written(folder: Path) -> None:
    model = block()
    before = contents(model)
    bias = model.qkv_proj.bias
    bias.data = torch.zeros(1, dtype=torch.float64).expand(len(bias))
    with pytest.raises(lading.PlanError) as caught:
        lading.load(model, folder)
    assert str(caught.value) == (
        "qkv_proj.bias: has elements that share memory (it was expanded), needs one place for each."
    )
    assert same_bits(model.o_proj.weight, before["o_proj.weight"])


def test_a_backward_pass_that_needs_the_old_values_says_so(folder: Path) -> None:
    model = block()
    weight = model.o_proj.weight.requires_grad_()
    x = torch.ones(weight.shape[1], dtype=torch.float64, requires_grad=True)
    loss = (weight @ x).sum()
    before = weight._version
    lading.load(model, folder)
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_checkpoint_that_was_rewritten_after_it_was_opened(folder: Path) -> None:
    """Of the same size: k and v have changed places, and each would be loaded as the other."""
    checkpoint = lading.open_checkpoint(folder)
    for path in folder.glob("*.safetensors"):
        raw = path.read_bytes()
        swapped = raw.replace(b'"k_proj.', b'"x_proj.').replace(b'"v_proj.', b'"k_proj.')
        path.write_bytes(swapped.replace(b'"x_proj.', b'"v_proj.'))
        os.utime(path, ns=(1, 1))
    model = block()
    before = contents(model)
    with pytest.raises(FileError, match="has another header than when the plan was made"):
        lading.load(model, checkpoint)
    assert same(contents(model), before)
    model(torch.ones(1, 6))  # nothing was written: nothing to refuse
    lading.load(model, folder)


def test_options_of_another_type(folder: Path) -> None:
    limits: Any = {"num_threads": 2}
    exchange: Any = "yes"
    assert refused(meta(), folder, limits=limits) == (
        "limits: is {'num_threads': 2}, needs a lading.Limits."
    )
    assert refused(meta(), folder, exchange=exchange) == (
        "exchange: is 'yes', needs True, False or None."
    )
