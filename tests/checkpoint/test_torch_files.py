"""torch's own files: tensors only, and nothing in them is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lading.checkpoint import Checkpoint, open_checkpoint
from lading.dtypes import BITS, to_torch
from lading.errors import CallError, FileError, PlanError

from .files_made import write_index

NAME = "pytorch_model.bin"


def open_state(folder: Path, state: object) -> Checkpoint:
    torch.save(state, folder / NAME)
    return open_checkpoint(folder)


def problems_of(path: Path) -> list[str]:
    with pytest.raises(PlanError) as caught:
        open_checkpoint(path)
    return [str(problem) for problem in caught.value.problems]


def bytes_of(checkpoint: Checkpoint, name: str) -> bytes:
    buffer = bytearray(checkpoint.tensors[name].num_bytes)
    with checkpoint.reader() as reader:
        reader.read_into(checkpoint.tensors[name], 0, memoryview(buffer))
        assert reader.bytes_read == len(buffer)
    return bytes(buffer)


@pytest.mark.parametrize("dtype", sorted(set(BITS) - {"F6_E2M3", "F6_E3M2"}))
def test_every_dtype(dtype: str, tmp_path: Path) -> None:
    stored = torch.randint(0, 2, (3, 64), dtype=torch.uint8)
    tensor = stored.view(to_torch(dtype))
    checkpoint = open_state(tmp_path, {"w": tensor})
    source = checkpoint.tensors["w"]
    assert (source.dtype, source.storage_shape) == (dtype, tuple(tensor.shape))
    assert torch.Size(source.shape).numel() * BITS[dtype] == source.num_bytes * 8
    assert (source.offset_bytes, source.num_bytes, source.file) == (0, 192, NAME)
    assert list(bytes_of(checkpoint, "w")) == stored.reshape(-1).tolist()


def test_tensors_of_every_stride(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "transposed": base.t(),
        "offset": base[2:],
        "step": base[:, ::2],
        "scalar": base[1, 1],
        "parameter": torch.nn.Parameter(base),
        "empty": base[:0],
        "conjugate": torch.complex(base, base).conj(),
        "negative": torch.complex(base, base).conj().imag,
    }
    checkpoint = open_state(tmp_path, state)
    assert checkpoint.format == "torch"
    assert checkpoint.metadata == {NAME: {}}
    for name, tensor in state.items():
        expected = (
            tensor.detach()
            .resolve_conj()
            .resolve_neg()
            .clone(memory_format=torch.contiguous_format)
        )
        data = bytes_of(checkpoint, name)
        assert list(data) == expected.reshape(-1).view(torch.uint8).tolist()


def test_a_range_of_a_tensor(tmp_path: Path) -> None:
    matrix = torch.arange(12, dtype=torch.uint8).reshape(3, 4).t()
    checkpoint = open_state(tmp_path, {"w": matrix})
    with checkpoint.reader() as reader:
        for start in (0, 5, 9):
            buffer = bytearray(3)
            reader.read_into(checkpoint.tensors["w"], start, memoryview(buffer))
            assert list(buffer) == matrix.reshape(-1)[start : start + 3].tolist()
        assert reader.bytes_read == 9
    with pytest.raises(CallError, match="the reader is closed"):
        reader.read_into(checkpoint.tensors["w"], 0, memoryview(buffer))


def test_an_index_of_torch_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {f: f"pytorch_model-0000{n}-of-00002.bin" for n, f in ((1, "a"), (2, "b"))}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert {s.name: s.file for s in checkpoint.tensors.values()} == weight_map
    assert bytes_of(checkpoint, "b") == bytes.fromhex("0000803f") * 3


class Unsafe:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_an_unsafe_pickle_is_not_run(legacy: bool, tmp_path: Path) -> None:
    target = tmp_path / "made"
    state = {"w": torch.ones(2), "x": Unsafe(str(target))}
    torch.save(state, tmp_path / NAME, _use_new_zipfile_serialization=not legacy)
    (message,) = problems_of(tmp_path)
    assert not target.exists()
    assert message == (
        f"{NAME}: is not a zip archive, needs the format that torch.save has written since "
        "torch 1.6. Try: convert it to safetensors."
        if legacy
        else f"{NAME}: holds Python objects that are not tensors, and loading them could run any "
        "code; needs tensors only. Try: convert it to safetensors where you trust it."
    )


def test_entries_that_are_no_tensors(tmp_path: Path) -> None:
    state = {
        "state_dict": {"w": torch.ones(2)},
        "epoch": 3,
        7: torch.ones(1),
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "expanded": torch.ones(1).expand(2**40),
        "complex128": torch.ones(1, dtype=torch.complex128),
        "good": torch.ones(1),
    }
    torch.save(state, tmp_path / NAME)
    flat = "needs a tensor (a file of weights is one flat dict of tensors)"
    assert problems_of(tmp_path) == [
        f"state_dict: is a dict of 1 entries, {flat}. In {NAME}. "
        "Try: save the dict under 'state_dict' alone, as safetensors.",
        f"epoch: is of type int, {flat}. In {NAME}.",
        f"7: the key is of type int, needs a string. In {NAME}.",
        f"sparse: is a torch.sparse_coo tensor on cpu, needs plain values on the CPU. In {NAME}.",
        f"meta: is a torch.strided tensor on meta, needs plain values on the CPU. In {NAME}.",
        f"expanded: has 4398046511104 bytes, the file stores 4 of them. In {NAME}. "
        "Try: save a contiguous copy of it.",
        f"complex128: is torch.complex128, which no safetensors file has. In {NAME}.",
    ]


def test_a_file_that_is_no_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / NAME)
    assert problems_of(tmp_path) == [
        f"{NAME}: holds a value of type list, needs a dict of tensors."
    ]


def test_a_damaged_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / NAME)
    whole = (tmp_path / NAME).read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / NAME).write_bytes(whole[:size])
        (message,) = problems_of(tmp_path)
        assert message.startswith(f"{NAME}: is not a whole file of torch.save (")
    (tmp_path / NAME).write_bytes(b"version https://git-lfs")
    (message,) = problems_of(tmp_path)
    assert message.endswith("Try: git lfs pull.")


def test_a_file_that_changes_after_the_plan(tmp_path: Path) -> None:
    checkpoint = open_state(tmp_path, {"w": torch.ones(4)})
    torch.save({"w": torch.ones(4000)}, tmp_path / NAME)
    with pytest.raises(FileError, match="its size when the plan was made"):
        bytes_of(checkpoint, "w")
    torch.save({"w": torch.ones(2, 2)}, tmp_path / NAME)
    size = (tmp_path / NAME).stat().st_size
    if size == checkpoint.file_bytes[NAME]:
        with pytest.raises(FileError) as caught:
            bytes_of(checkpoint, "w")
        assert str(caught.value) == (
            f"w: is not what it was when the plan was made. In {NAME}. Try: plan again."
        )
