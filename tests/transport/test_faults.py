"""Faults of the engine in the words of the parameter that met them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lading.errors import DeviceError
from lading.layers import Layer
from lading.ranks import Ranks
from lading.transport import engine, faults
from lading.transport.engine import Fault
from lading.transport.faults import problem_of
from lading.transport.sorting import Opened

from .test_moving import one

WORDS = os.strerror(errno.EIO)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            {"kind": engine.FAILED_READ, "code": errno.EIO, "offset": 96},
            f"'w.weight' cannot be read: the file cannot be read at offset 96: {WORDS}. In model",
        ),
        (
            {"kind": engine.FILE_ENDED, "offset": 96, "wanted": 40, "got": 7},
            "cannot be read: the file needs 40 bytes at offset 96, the file ended after 7",
        ),
        (
            {"kind": engine.FAILED_CUDA, "code": 700},
            "w.weight: cannot take the parameters: the driver's words of 700. In model.safeten",
        ),
        (
            {"kind": engine.NO_MEMORY, "code": errno.ENOMEM},
            f"the engine: cannot start: {os.strerror(errno.ENOMEM)}.",
        ),
    ],
    ids=["an error of read", "the file ends", "the driver", "no memory"],
)
def test_what_is_said(
    fault: dict[str, int], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(code: int, fact: str) -> DeviceError:
        return DeviceError(f"{fact}: the driver's words of {code}")

    monkeypatch.setattr(faults, "cuda_problem", told)
    full = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    checkpoint, plan = one(tmp_path, Layer.column(4, [3]), full, 1)
    (copy,) = plan.share(Ranks()).copies
    numbers = {"code": 0, "job": 0, "offset": 0, "wanted": 0, "got": 0, **fault}
    with checkpoint.reader() as reader:
        assert reader.files is not None
        opened = Opened(reader.files, None)
        opened.number("model.safetensors")
        found = problem_of(Fault(**numbers), plan.sources["w.weight"], copy, opened)
    assert text in str(found), str(found)
