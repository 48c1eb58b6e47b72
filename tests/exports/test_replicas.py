"""Copies on several ranks: equal ones pass, and each difference is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lading
from lading.errors import ConflictError
from lading.exports.live import Live, live_parameters
from lading.exports.replicas import (
    BLOCK_BYTES,
    DIGEST_BYTES,
    check_replicas,
    digests_of,
    has_padding_values,
)
from lading.loading import origin_of
from lading.plan import Plan, prove_bindings
from lading.ranks import Ranks, all_ranks
from tests.loading_made import indices, on_meta, save, shapes

Models = dict[Ranks, nn.Module]


def loaded(folder: Path, tp_size: int, *, kv_heads: int = 16) -> tuple[Plan, Models]:
    """A plan of all ranks, and their models."""
    save(folder, indices(shapes(kv_heads=kv_heads), torch.float32))
    models: Models = {}
    for ranks in all_ranks(tp_size):
        models[ranks] = on_meta(ranks, kv_heads=kv_heads, dtype=torch.float32)
        lading.load(models[ranks], folder, ranks=ranks)
    origin = origin_of(models[Ranks(tp_size=tp_size)])
    assert origin is not None
    plan = origin.plan
    sources = origin.checkpoint.tensors
    whole = prove_bindings(plan.targets, sources, plan.bindings, ranks=all_ranks(tp_size))
    return whole, models


def lives_of(models: Models) -> dict[Ranks, Live]:
    return {ranks: live_parameters(model, ranks) for ranks, model in models.items()}


def check(plan: Plan, models: Models) -> None:
    """As real ranks do: each digests its own, all compare."""
    lives = lives_of(models)
    check_replicas(plan, [digests_of(plan, {ranks: live}) for ranks, live in lives.items()])


def test_equal_copies_pass(tmp_path: Path) -> None:
    plan, models = loaded(tmp_path, 8, kv_heads=2)
    check(plan, models)


def test_what_one_rank_alone_holds_is_not_read(tmp_path: Path) -> None:
    plan, models = loaded(tmp_path, 4, kv_heads=4)
    digests = digests_of(plan, lives_of(models))
    # norm, scale and o_proj.bias are on all ranks; nothing else is on two.
    assert {len(found) for found in digests.values()} == {3 * DIGEST_BYTES}


def change_norm(models: Models) -> None:
    models[Ranks(tp_rank=5, tp_size=8)].get_parameter("norm").data[2] = -0.0


def change_buffer(models: Models) -> None:
    models[Ranks(tp_rank=0, tp_size=8)].get_buffer("scale")[1] = 5


def change_head(models: Models) -> None:
    qkv = models[Ranks(tp_rank=6, tp_size=8)].get_parameter("qkv_proj.weight")
    qkv.data[-1, 0] += 1  # the last row of v


COPIES = "needs equal ones (they are copies of the same elements)."


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            change_norm,
            "norm: rank 0 of 8 and rank 5 of 8 hold other values for checkpoint tensor 'norm' "
            f"[0:6] of [6], {COPIES}",
        ),
        (
            change_buffer,
            "scale: rank 0 of 8 and rank 1 of 8 hold other values for checkpoint tensor 'scale' "
            f"[0:3] of [3], {COPIES}",
        ),
        (
            change_head,
            "qkv_proj.weight, part 'v': rank 4 of 8 and rank 6 of 8 hold other values for "
            f"checkpoint tensor 'v_proj.weight' [3:6, 0:6] of [6, 6], {COPIES}",
        ),
    ],
)
def test_a_difference_is_named(change: Callable[[Models], None], text: str, tmp_path: Path) -> None:
    plan, models = loaded(tmp_path, 8, kv_heads=2)
    change(models)
    with pytest.raises(ConflictError) as error:
        check(plan, models)
    assert str(error.value) == text


class Wide(nn.Module):
    """One replicated tensor of several blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3 * BLOCK_BYTES // 400, 100))


def test_a_difference_is_located_to_a_block(tmp_path: Path) -> None:
    wide = Wide()
    save(tmp_path, {"weight": wide.weight.data.clone()})
    models: Models = {ranks: Wide() for ranks in all_ranks(3)}
    for ranks, model in models.items():
        lading.load(model, tmp_path, ranks=ranks)
    origin = origin_of(models[Ranks(tp_size=3)])
    assert origin is not None
    plan = prove_bindings(
        origin.plan.targets, origin.checkpoint.tensors, origin.plan.bindings, ranks=all_ranks(3)
    )
    check(plan, models)
    rows = BLOCK_BYTES // 400
    models[Ranks(tp_rank=1, tp_size=3)].get_parameter("weight").data[2 * rows + 7, 99] = 1.0
    with pytest.raises(ConflictError) as error:
        check(plan, models)
    assert f"'weight' [{2 * rows}:{3 * rows}, 0:100] of [{3 * BLOCK_BYTES // 400}, 100]" in str(
        error.value
    )


def test_padding_with_values(tmp_path: Path) -> None:
    plan, models = loaded(tmp_path, 2)
    for ranks, live in lives_of(models).items():
        assert has_padding_values(plan.share(ranks), live.tensors) == []
    last = Ranks(tp_rank=1, tp_size=2)
    models[last].get_parameter("embed.weight").data[-1, 5] = 1.0  # 37 words in 40 rows
    live = live_parameters(models[last], last)
    assert has_padding_values(plan.share(last), live.tensors) == ["embed.weight"]
