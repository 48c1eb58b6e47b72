"""Live models cut anew, on processes that meet over gloo, against loads of the same checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lading
from lading import launch, models, writing
from lading import ranks as ranks_module
from lading.errors import CallError, LadingError, NotLoadedError, PlanError
from lading.loading import origin_of
from lading.nn import ParallelLayer, check_loaded
from lading.parameter import BasevLLMParameter, permute_param_layout_
from lading.plan import Plan
from lading.pretrained import load_pretrained, prepare_pretrained
from lading.ranks import Ranks
from lading.regions import Region
from lading.resharding.verb import ReshardReport, reshard
from lading.targeting import state_of

from ..schemes.checkpoints import GPTQ_CONFIG, MODEL, Tensors, gptq, model_tensors


def dense(outputs: int, inputs: int) -> Tensors:
    return {"weight": torch.randn(outputs, inputs).bfloat16()}


def write(folder: Path, make: Callable[[int, int], Tensors], **config: Any) -> str:
    """A model of 4 q heads and 2 KV heads with a vocabulary of 101, which no rank count divides."""
    torch.manual_seed(5)
    tensors = model_tensors(make)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(101, 64).bfloat16()
    raw = MODEL | {"vocab_size": 101} | config
    if raw["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    (folder / "config.json").write_text(json.dumps(raw))
    save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    def folder(name: str) -> Path:
        return tmp_path_factory.mktemp(name)

    return {
        "dense": write(folder("dense"), dense),
        "tied": write(folder("tied"), dense, tie_word_embeddings=True),
        "gptq": write(folder("gptq"), gptq, quantization_config=GPTQ_CONFIG),
    }


@dataclass(frozen=True)
class Case:
    """before and after: which TP rank of either model each process has; -1 for none."""

    id: str
    folder: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    on_meta: bool = True
    buffer_bytes: int = 2**20


CASES = [
    Case("1 to 2", "dense", (0, -1), (0, 1)),
    Case("2 to 4", "dense", (0, 1, -1, -1), (0, 1, 2, 3)),
    Case("4 to 1", "dense", (0, 1, 2, 3), (0, -1, -1, -1)),
    Case("2 to 4, quantised", "gptq", (0, 1, -1, -1), (0, 1, 2, 3)),
    Case("4 to 1, quantised", "gptq", (0, 1, 2, 3), (-1, -1, -1, 0), on_meta=False),
    Case("4 to 2, other processes, tied", "tied", (2, 0, 1, 3), (-1, 1, 0, -1)),
    Case("2 to 2, elsewhere, in place", "dense", (0, 1, -1), (-1, 0, 1), on_meta=False),
    Case("2 to 1, three times", "gptq", (1, 0, -1), (0, 0, 0), buffer_bytes=1000),
    Case("1 on both to 2", "dense", (0, 0), (1, 0), buffer_bytes=1),
]


def ranks_in(places: tuple[int, ...], process: int) -> Ranks | None:
    size = max(places) + 1
    return Ranks(tp_rank=places[process], tp_size=size) if places[process] >= 0 else None


def values(model: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in state_of(model)
    }


def loaded(folder: str, ranks: Ranks) -> models.CausalLM:
    """By a load of this process alone, whatever its place in the group is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "group_of", lambda _ranks, _group: None)
        return load_pretrained(folder, ranks=ranks)[0]


def new_model(folder: str, ranks: Ranks, *, on_meta: bool) -> models.CausalLM:
    model = prepare_pretrained(folder, ranks=ranks).model
    assert isinstance(model, models.CausalLM)
    if not on_meta:
        model.to_empty(device="cpu")
        for _, tensor in state_of(model):
            tensor.detach().view(torch.uint8).fill_(77)
    return model


def work(place: Ranks, folder: str, case: Case) -> tuple[ReshardReport, int]:
    """One process: reshards, and compares with a load of its own."""
    one = ranks_in(case.before, place.tp_rank)
    two = ranks_in(case.after, place.tp_rank)
    source = loaded(folder, one) if one is not None else None
    if source is not None:  # all that is loaded later is other than what the source has
        before = values(source)
    target = new_model(folder, two, on_meta=case.on_meta) if two is not None else None
    params = dict(target.named_parameters()) if target is not None else {}
    done = reshard(
        source, target, source_ranks=one, target_ranks=two, buffer_bytes=case.buffer_bytes
    )
    if source is not None:
        assert values(source) == before, "the source is as it was"
    size = 0
    if target is not None:
        assert two is not None
        wanted = values(loaded(folder, two))
        found = values(target)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if found[name] != wanted[name]] == []
        check_loaded(target)
        assert dict(target.named_parameters()).keys() == params.keys()
        assert all(p is params[n] for n, p in target.named_parameters()), "the same objects"
        size = sum(map(len, {id(t): values(target)[n] for n, t in state_of(target)}.values()))
    return done, size


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_as_if_it_had_been_loaded(case: Case, folders: dict[str, str]) -> None:
    found = launch.run_ranks(work, len(case.before), (folders[case.folder], case))
    reports = [report for report, _ in found]
    for process, (report, size) in enumerate(found):
        assert report.source_ranks == ranks_in(case.before, process)
        assert report.target_ranks == ranks_in(case.after, process)
        assert report.buffer_bytes <= max(case.buffer_bytes, 32)
        assert report.kept_bytes + report.received_bytes <= size, "each element once"
    assert sum(r.sent_bytes for r in reports) == sum(r.received_bytes for r in reports)
    if case.id == "1 to 2":
        assert reports[0].received_bytes == 0, "the process has it all"
        assert reports[1].received_bytes == reports[0].sent_bytes < found[0][1]


# ------------------------------------------------------------------------------- one process alone


def alone(folder: str, tp_rank: int = 0, tp_size: int = 1) -> models.CausalLM:
    return loaded(folder, Ranks(tp_rank=tp_rank, tp_size=tp_size))


class Plain(nn.Module):
    """Parameters of no layer: every rank has all of them."""

    def __init__(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape).to(dtype)))


def test_a_process_that_is_alone(folders: dict[str, str]) -> None:
    source = alone(folders["gptq"])
    target = new_model(folders["gptq"], Ranks(), on_meta=True)
    report = reshard(source, target)
    assert values(target) == values(source)
    assert (report.received_bytes, report.num_rounds, report.buffer_bytes) == (0, 0, 0)
    stored = load_file(Path(folders["gptq"], "model.safetensors"))
    kept = sum(t.nbytes for name, t in stored.items() if not name.endswith("g_idx"))
    assert report.kept_bytes == kept, "padding and constants are nobody's"
    assert "GB in" in str(report)


def test_a_number_and_nothing() -> None:
    source, target = (Plain(scale=(), rows=(0, 3), one=(1,)) for _ in range(2))
    reshard(source, target)
    assert values(target) == values(source)


def test_an_export_of_the_target_repeats_the_files(folders: dict[str, str], tmp_path: Path) -> None:
    source = alone(folders["gptq"])
    target = new_model(folders["gptq"], Ranks(), on_meta=True)
    reshard(source, target)
    out = tmp_path / "out"
    lading.export(target, out)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == Path(folders["gptq"], name).read_bytes()


def test_permuted_parameters(folders: dict[str, str]) -> None:
    source = alone(folders["dense"])
    target = new_model(folders["dense"], Ranks(), on_meta=False)
    for model in (source, target):
        for index, layer in enumerate(model.modules()):
            param = layer._parameters.get("weight")
            if isinstance(param, BasevLLMParameter) and param.dim() == 2 and index % 2:
                permute_param_layout_(param, input_dim=0, output_dim=1)
    assert any(t.stored_order for _, t in state_of(source) if isinstance(t, BasevLLMParameter))
    reshard(source, target)
    assert values(target) == values(source)
    again = new_model(folders["dense"], Ranks(), on_meta=True)
    reshard(target, again)
    assert values(again) == values(alone(folders["dense"]))


@dataclass(frozen=True)
class Fails:
    id: str
    source: Callable[[], nn.Module | Plan | None]
    target: Callable[[], nn.Module | None]
    message: str
    how: dict[str, Any] = field(default_factory=dict)


FAILS = [
    Fails(
        "no source",
        lambda: None,
        lambda: Plain(a=(3,)),
        "source: no process of the group has one, needs every rank of it.",
    ),
    Fails(
        "no target",
        lambda: Plain(a=(3,)),
        lambda: None,
        "target: no process of the group has one, needs every rank of it.",
    ),
    Fails(
        "a rank is missing",
        lambda: Plain(a=(3,)),
        lambda: Plain(a=(3,)),
        "source: no process of the group has rank 0 of 3, rank 1 of 3, needs every rank.",
        {"source_ranks": Ranks(tp_rank=2, tp_size=3)},
    ),
    Fails(
        "other parameters",
        lambda: Plain(a=(3,), b=(2, 4), d=(1,)),
        lambda: Plain(a=(3,), b=(4, 2), c=(1,)),
        "the pair of plans has 3 problems:\n"
        "  c: no rank of the first plan keeps it, the second one needs it.\n"
        "  d: ranks of the first plan keep it, the second one knows no such tensor.\n"
        "  b: is fp32[2, 4] in the first plan, needs fp32[4, 2] (the second one's).",
    ),
    Fails(
        "another dtype",
        lambda: Plain(a=(3,)),
        lambda: Plain(a=(3,), dtype=torch.bfloat16),
        "a: is fp32[3] in the first plan, needs bf16[3] (the second one's).",
    ),
    Fails(
        "no memory for messages",
        lambda: Plain(a=(3,)),
        lambda: Plain(a=(3,)),
        "buffer_bytes: is 0, needs at least 1.",
        {"buffer_bytes": 0},
    ),
    Fails(
        "a source without memory",
        lambda: Plain(a=(3,)).to("meta"),
        lambda: Plain(a=(3,)),
        "a: has no memory yet (it is on the meta device).",
    ),
]


@pytest.mark.parametrize("case", FAILS, ids=lambda case: case.id)
def test_refused(case: Fails) -> None:
    source, target = case.source(), case.target()
    before = values(target) if target is not None else None
    with pytest.raises(LadingError) as caught:
        reshard(source, target, **case.how)
    assert str(caught.value) == case.message
    assert target is None or values(target) == before, "nothing was changed"


def test_a_model_into_itself() -> None:
    model = Plain(a=(3,))
    with pytest.raises(CallError, match="target: is the source itself, needs another model"):
        reshard(model, model)


def test_a_layer_in_a_kernels_format(folders: dict[str, str]) -> None:
    class Kernel:
        unpack = None

        def pack(self, layer: Any) -> None:
            pass

    source = alone(folders["dense"])
    target = alone(folders["dense"])
    layer = target.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(layer, ParallelLayer)
    layer.process_weights_after_loading(Kernel())  # type: ignore[arg-type]
    with pytest.raises(
        PlanError, match=r"o_proj: holds its weights in the format of Kernel, needs"
    ):
        reshard(source, target)


def test_tied_weights_into_untied_ones(folders: dict[str, str]) -> None:
    """The twin of a tied tensor is what the tensor is; the other way round nothing says so."""
    tied, untied = (alone(folders[name]) for name in ("tied", "dense"))
    reshard(tied, untied)
    found = dict(untied.named_parameters())
    embedding = tied.model.embed_tokens.weight
    assert torch.equal(found["model.embed_tokens.weight"], embedding)
    assert torch.equal(found["lm_head.weight"], embedding)
    with pytest.raises(PlanError, match=r"lm_head\.weight: ranks of the first plan keep it"):
        reshard(alone(folders["dense"]), alone(folders["tied"]))


# ------------------------------------------------------------------------------ several processes


def a_plan_instead(place: Ranks, folder: str, wrong: bool) -> bool:
    """Process 1 has the plan of the source, or of something else."""
    source: Any = alone(folder)
    if place.tp_rank == 1:
        source = origin_of(source).plan  # type: ignore[union-attr]
        if wrong:
            source = replace(source, targets=source.targets[1:])
    target = new_model(folder, place, on_meta=True)
    reshard(source, target)
    return values(target) == values(loaded(folder, place))


def test_a_plan_in_place_of_a_source(folders: dict[str, str]) -> None:
    assert launch.run_ranks(a_plan_instead, 2, (folders["dense"], False)) == [True, True]
    with pytest.raises(CallError) as caught:
        launch.run_ranks(a_plan_instead, 2, (folders["dense"], True))
    assert str(caught.value).startswith(
        "source: process 1 passed a plan of another model, needs that of the source"
    )


def breaks(place: Ranks, folder: str, on_meta: bool) -> tuple[str, bool, bool]:
    """Writing fails on process 1 in the middle of the rounds."""
    source = alone(folder) if place.tp_rank == 0 else None
    model = new_model(folder, place, on_meta=on_meta)
    calls = []
    real = writing.write

    def write(target: torch.Tensor, region: Region, values: torch.Tensor) -> None:
        calls.append(1)
        if place.tp_rank == 1 and len(calls) == 9:
            raise MemoryError("no more of it")
        real(target, region, values)

    writing.write = write
    try:
        reshard(source, model, buffer_bytes=4096)
    except LadingError as error:
        message = str(error)
    finally:
        writing.write = real
    try:
        model(torch.tensor([[1, 2]]))
        usable = True
    except (NotLoadedError, RuntimeError, NotImplementedError):
        usable = False
    return message, usable, all(t.is_meta for _, t in state_of(model))


@pytest.mark.parametrize("on_meta", [True, False], ids=["on meta", "in place"])
def test_a_process_that_fails_half_way(on_meta: bool, folders: dict[str, str]) -> None:
    found = launch.run_ranks(breaks, 2, (folders["dense"], on_meta))
    assert [usable for _, usable, _ in found] == [False, False]
    assert [is_meta for _, _, is_meta in found] == [on_meta, on_meta]
    for message, _, _ in found:
        assert "MemoryError: no more of it" in message


def different(place: Ranks, folders: dict[str, str]) -> None:
    ranks = Ranks(tp_rank=place.tp_rank, tp_size=2)
    source = loaded(folders["tied" if place.tp_rank else "dense"], ranks)
    target = new_model(folders["dense"], Ranks(), on_meta=True) if place.tp_rank == 0 else None
    reshard(source, target)


def test_processes_that_disagree(folders: dict[str, str]) -> None:
    with pytest.raises(CallError) as caught:
        launch.run_ranks(different, 2, (folders,))
    assert str(caught.value).startswith(
        "source: has other parameters on process 1 than on process 0, needs the same model on all"
    )
