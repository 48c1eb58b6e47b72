"""Who writes what: every byte of every file once, shared out evenly; the names of new tensors."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lading
from lading.errors import CallError, LadingError, PlanError
from lading.exports.live import live_parameters
from lading.exports.plan import ExportPlan, plan_export
from lading.loading import origin_of
from lading.names import Names
from lading.nn import MergedColumnParallelLinear
from lading.ranks import Ranks, all_ranks
from tests.end_to_end.checkpoints import checkpoint
from tests.loading_made import indices, on_meta, save, shapes
from tests.schemes.cutting import fixture

from .made import models_of


def planned(model: nn.Module, ranks: Ranks, **chosen: Any) -> ExportPlan:
    defaults: dict[str, Any] = {
        "origin": origin_of(model),
        "source": None,
        "max_file_bytes": 10**9,
    }
    return plan_export(model, live_parameters(model, ranks), **(defaults | chosen))


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_every_byte_is_written_once(tp_size: int) -> None:
    models = models_of(checkpoint("qwen2", files=3), tp_size)
    plans = [planned(model, ranks) for ranks, model in models.items()]
    assert len({plan.digest for plan in plans}) == 1
    plan = plans[0]
    counts = {
        name: torch.zeros(place.num_bytes // 4, dtype=torch.int8)
        for name, place in plan.outline.places.items()
    }
    load = []
    for copies in plan.duties.values():
        load.append(0)
        for copy in copies:
            for first in copy.source_region.runs().offsets():
                counts[copy.source][first : first + copy.source_region.runs().length] += 1
            load[-1] += copy.source_region.num_elements
    assert all(bool((count == 1).all()) for count in counts.values())
    assert max(load) - min(load) < 0.05 * sum(load)
    assert len(load) == tp_size


def test_constants_and_skipped_tensors_are_others() -> None:
    models = models_of(fixture("gptq-v1-w4-g64-sym"), 2)
    plan = planned(*_first(models))
    checked = {check.source for check in plan.plan.checks()}
    assert checked
    assert plan.others.keys() == checked
    assert all(
        other.source is not None and other.check is not None for other in plan.others.values()
    )


def _first(models: dict[Ranks, nn.Module]) -> tuple[nn.Module, Ranks]:
    ranks, model = next(iter(models.items()))
    return model, ranks


def test_constants_without_their_files_are_declared(tmp_path: Path) -> None:
    folder = shutil.copytree(fixture("gptq-v1-w4-g64-sym"), tmp_path / "in")
    model, ranks = _first(models_of(folder, 2))
    shutil.rmtree(folder)
    plan = planned(model, ranks)
    assert all(other.source is None for other in plan.others.values())
    assert any(note.startswith("made from the declaration") for note in plan.outline.notes)


def test_the_names_of_new_tensors(tmp_path: Path) -> None:
    save(tmp_path, indices(shapes(), torch.float32))
    for ranks in all_ranks(2):
        model = on_meta(ranks, dtype=torch.float32)
        lading.load(model, tmp_path, ranks=ranks)
        plan = planned(model, ranks, origin=None)
        found = {name: place.shape for name, place in plan.outline.places.items()}
        assert found == shapes()
        assert plan.checkpoint is None


class Two(nn.Module):
    """Two parameters that a naming rule gives one name."""

    names = Names(renames=(("two", "one"),))

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(2))
        self.two = nn.Parameter(torch.ones(2))


def test_two_parameters_of_one_name() -> None:
    with pytest.raises(PlanError) as error:
        planned(Two(), Ranks(), origin=None)
    assert str(error.value) == "two: would be stored as 'one', as another parameter is too."


def test_parts_that_no_rule_names_stay_side_by_side() -> None:
    model = nn.Module()
    layer = MergedColumnParallelLinear(4, [6, 2], False, ranks=Ranks(tp_size=2))
    torch.nn.init.ones_(layer.weight)
    model.add_module("anything", layer)
    plan = planned(model, Ranks(tp_size=2), origin=None)
    assert {name: p.shape for name, p in plan.outline.places.items()} == {"anything.weight": (8, 4)}


def test_the_config_of_a_model_that_has_one() -> None:
    class Configured(nn.Linear):
        config: Any

    model = Configured(2, 2)
    assert "there is no config.json" in planned(model, Ranks(), origin=None).outline.notes[0]
    model.config = {"model_type": "x"}
    outline = planned(model, Ranks(), origin=None).outline
    assert outline.written["config.json"] == b'{\n  "model_type": "x"\n}\n'
    assert outline.notes == ()


def test_a_source_that_does_not_fit(tmp_path: Path) -> None:
    model, ranks = _first(models_of(checkpoint("llama", files=3), 2))
    other = checkpoint("qwen3", files=3)
    with pytest.raises(PlanError) as error:
        planned(model, ranks, source=other)
    text = str(error.value)
    assert "q_norm.weight: checkpoint tensor fp32[12] belongs to no parameter" in text


def test_expert_parallel_ranks_are_refused() -> None:
    with pytest.raises(CallError) as error:
        planned(nn.Linear(2, 2), Ranks(ep_rank=1, ep_size=2), origin=None)
    assert "needs a model without expert parallelism" in str(error.value)


def test_parameters_that_came_and_went(tmp_path: Path) -> None:
    save(tmp_path, indices(shapes(), torch.float32))
    model = on_meta(Ranks(), dtype=torch.float32)
    lading.load(model, tmp_path)
    model.extra = nn.Parameter(torch.zeros(2))
    del model.norm
    with pytest.raises(PlanError) as error:
        planned(model, Ranks())
    problems: list[LadingError] = list(error.value.problems)
    assert [(p.subject, p.fact) for p in problems] == [
        ("extra", "is a parameter that the model did not have when it was loaded"),
        ("norm", "is no longer a parameter of its own, needs to be (it was loaded)"),
    ]


def test_where_a_model_comes_from_is_known_while_it_is_true(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    save(one, indices(shapes(), torch.float32))
    save(two, indices(shapes(), torch.float32))
    model = on_meta(Ranks(), dtype=torch.float32)
    assert origin_of(model) is None
    for folder in (one, two):
        lading.load(model, folder)
        origin = origin_of(model)
        assert origin is not None
        assert origin.checkpoint.folder == str(folder)
    with pytest.raises(PlanError):  # nothing was touched: it is still what it was
        lading.load(model, save(tmp_path / "bad", {"x": torch.zeros(1)}))
    assert origin_of(model) == origin
    checkpoint_of_two = lading.open_checkpoint(two)
    (two / "model.safetensors").write_bytes(b"")
    with pytest.raises(LadingError):
        lading.load(model, checkpoint_of_two)
