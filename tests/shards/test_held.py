"""What each rank holds, summed apart: against sums of slices that are written out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lading.digests.sums import part_hex, sums_of
from lading.preflight import preflight
from lading.ranks import all_ranks
from lading.regions import Region
from lading.routes import pieces
from lading.sharding.verbs import shard
from lading.shards.bands import views_of
from lading.shards.folder import open_sharded
from lading.shards.held import parts_of, rank_digests
from tests.sharding.made import made, stored

PREFIX = "model.layers.1"
"""8 heads of 6 that share 2 KV heads; hidden size 24, inner size 48."""


@pytest.mark.parametrize("tp_size", [2, 8])
def test_what_the_manifest_records(tp_size: int, tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    shard(source, tp_size=tp_size, out=tmp_path / "out")
    manifest = open_sharded(tmp_path / "out").manifest
    assert manifest is not None
    full = stored(source)
    for leaf, dim, count in (
        ("self_attn.q_proj", 0, tp_size),
        ("self_attn.k_proj", 0, 2),
        ("mlp.up_proj", 0, tp_size),
        ("mlp.down_proj", 1, tp_size),
    ):
        name = f"{PREFIX}.{leaf}.weight"
        tensor = full[name].view(torch.int16).numpy().view(np.uint16)
        step = tensor.shape[dim] // count
        for rank, found in enumerate(manifest.ranks[name]):
            at = rank * count // tp_size * step
            spans = [(0, n) for n in tensor.shape]
            spans[dim] = at, at + step
            part = tensor[tuple(slice(*span) for span in spans)]
            sums = sums_of("BF16", tensor.shape, Region.box(tensor.shape, spans), part.copy())
            assert found == part_hex("BF16", tensor.shape, sums), (name, rank)
    assert f"{PREFIX}.input_layernorm.weight" not in manifest.ranks


def test_parts_make_up_the_tensor(tmp_path: Path) -> None:
    plan = preflight(made(tmp_path / "source"), all_ranks(4)).plan
    parts = parts_of(plan, views_of([plan]))
    for name, found in parts.items():
        count = np.zeros(plan.sources[name].shape, int)
        for number, region in found:
            assert number < len(pieces(plan, name))
            rows, columns = (
                slice(a, a + n) for a, n in zip(region.start, region.size, strict=True)
            )
            count[rows, columns] += 1
        assert (count == 1).all(), name
    assert f"{PREFIX}.mlp.up_proj.weight" in parts
    assert "model.norm.weight" not in parts  # all ranks hold all of it


def test_a_rank_that_holds_an_element_twice_counts_it_once(tmp_path: Path) -> None:
    plan = preflight(made(tmp_path / "source"), all_ranks(2)).plan
    name = f"{PREFIX}.mlp.up_proj.weight"
    asked: list[tuple[int, int]] = []

    def sums(tensor: str, number: int, at: int):  # type: ignore[no-untyped-def]
        assert tensor == name
        asked.append((number, at))
        shape = plan.sources[name].shape
        return sums_of("BF16", shape, Region.box(shape, [(0, 1), (0, 1)]), b"ab")

    assert len(set(rank_digests(plan, plan.sources[name], sums))) == 1
    assert len(asked) == len(set(asked)) == 2
