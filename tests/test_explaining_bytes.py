"""Bytes of the files of a pre-sharded folder, against what safetensors reads there. (Those of a
checkpoint's own files are asked for by the tests of explaining.)
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import lading
from lading.errors import CallError
from lading.explaining_bytes import explain_byte
from lading.preflight import Preflight, preflight
from lading.ranks import all_ranks
from tests.sharding.made import made, stored, with_tensors

T = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 tokens, padded; 8 heads that share 2 KV heads; a tensor that no rank keeps."""
    folder = made(tmp_path_factory.mktemp("bytes") / "source", dtype="float32")
    return with_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.rand(5))


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    lading.shard(source, tp_size=T, out=source.parent / "tp4", sync=False)
    return source.parent / "tp4"


@pytest.fixture(scope="module")
def before(folder: Path) -> Preflight:
    return preflight(folder, all_ranks(2))


def rank_file(rank: int) -> str:
    return f"model-rank-{rank:05}-of-{T:05}.safetensors"


def data_start(file: Path) -> int:
    with file.open("rb") as opened:
        return 8 + int.from_bytes(opened.read(8), "little")


@pytest.mark.parametrize("rank", range(T))
def test_every_byte_is_that_of_the_tensor(
    rank: int, source: Path, folder: Path, before: Preflight
) -> None:
    file, chance = folder / rank_file(rank), random.Random(rank)
    raw, full = file.read_bytes(), stored(source)
    kept = 0
    with safe_open(file, "pt") as opened:
        for _ in range(200):
            byte = chance.randrange(data_start(file), len(raw))
            found = explain_byte(before.plan, before.checkpoint, file.name, byte)
            assert (found.kind, found.tp_size) == ("parameter", T)
            value = opened.get_tensor(found.name)[found.index]
            at = byte - (byte - data_start(file)) % 4  # all tensors are of 4 bytes an element
            assert value.numpy().tobytes() == raw[at : at + 4]
            if not found.entries:
                assert (found.padding[0].tp_rank, value) == (rank, 0)
                assert "embed_tokens" in found.name or "lm_head" in found.name
                continue
            (entry,) = found.entries
            assert full[entry.source.name][entry.index] == value
            assert (file.name, at, at + 4) in entry.stored
            assert rank in {element.ranks.tp_rank for element in entry.elements}
            kept += 1
    assert kept > 100


def test_padding(folder: Path, before: Preflight) -> None:
    """The last rank's rows of the vocabulary are 96 to 127, of which 101 and more are padding."""
    file = folder / rank_file(3)
    with safe_open(file, "pt") as opened:
        assert list(opened.get_tensor("model.embed_tokens.weight").shape) == [32, 24]
    start = data_start(file)
    for row, is_padding in ((4, False), (5, True), (31, True)):
        byte = start + row * 24 * 4
        found = explain_byte(before.plan, before.checkpoint, file.name, byte)
        assert (found.name, found.index) == ("model.embed_tokens.weight", (row, 0))
        assert bool(found.padding) == is_padding
        assert bool(found.entries) != is_padding


def test_what_no_rank_keeps(source: Path, folder: Path, before: Preflight) -> None:
    file, name = folder / "model-rest.safetensors", "model.layers.0.self_attn.rotary_emb.inv_freq"
    byte = data_start(file) + 3 * 4
    found = explain_byte(before.plan, before.checkpoint, file.name, byte + 1)
    assert (found.kind, found.name, found.index) == ("tensor", name, (3,))
    (entry,) = found.entries
    assert entry.stored == (("model-rest.safetensors", byte, byte + 4),)
    raw = (source / entry.source.file).read_bytes()
    assert raw[entry.start_byte : entry.stop_byte] == file.read_bytes()[byte : byte + 4]


def test_the_original_files_too(source: Path, before: Preflight) -> None:
    file = source / "model.safetensors"
    byte = file.stat().st_size - 1
    found = explain_byte(before.plan, before.checkpoint, file.name, byte)
    with safe_open(file, "pt") as opened:
        assert found.name in opened.keys()  # noqa: SIM118
    assert found.entries[0].stop_byte == byte + 1


@pytest.mark.parametrize(
    ("file", "byte", "rank", "message"),
    [
        (rank_file(1), 3, None, f"{rank_file(1)}: byte 3 is in the file's header, needs one of"),
        (rank_file(1), 10**9, None, f"{rank_file(1)}: byte is 1000000000, needs 0 to "),
        (rank_file(1), 5000, 2, f"rank: is 2, needs 1 (whose file {rank_file(1)} is)."),
        (rank_file(9), 3, None, f"that has tensors. Try: {rank_file(0)[:11]}"),
        ("model-rest.safetensors", 3, None, "byte 3 is in the file's header"),
    ],
)
def test_refused(file: str, byte: int, rank: int | None, message: str, before: Preflight) -> None:
    with pytest.raises(CallError) as caught:
        explain_byte(before.plan, before.checkpoint, file, byte, rank=rank)
    assert message in str(caught.value)
