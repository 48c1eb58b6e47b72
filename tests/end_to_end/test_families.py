"""Real checkpoints in real processes: logits and every element, against transformers and the
file.
"""

from __future__ import annotations

import pytest

from lading.launch import run_ranks

from . import work
from .checkpoints import FAMILIES, checkpoint

TOLERANCE = 1e-5


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_elements(family: str, tp_size: int) -> None:
    tied, files = family in ("llama", "qwen2"), 1 if family == "mistral" else 3
    folder = checkpoint(family, tied=tied, files=files)
    for rank, found in enumerate(run_ranks(work.logits, tp_size, [str(folder)])):
        assert found["elements"] == 0, f"rank {rank}"
        assert found["distance"] <= TOLERANCE, f"rank {rank}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_eight_ranks_share_two_kv_heads(family: str) -> None:
    folder = checkpoint(family, tied=family == "phi3", files=2)
    for found in run_ranks(work.logits, 8, [str(folder)]):
        assert found["elements"] == 0
        assert found["distance"] <= TOLERANCE


def test_three_ranks_of_three_heads() -> None:
    folder = checkpoint("qwen3", heads=3, kv_heads=3)
    # 88 columns of the down projection do not divide by 3: the refusal names the sizes that do.
    found = run_ranks(work.load_error, 3, [str(folder)])
    texts = {result["error"] for result in found}
    assert len(texts) == 1
    assert "TP 3 does not cut 88" in texts.pop()


def test_untied_and_tied_checkpoints_differ_only_in_the_head() -> None:
    folder = checkpoint("llama", tied=False, files=2)
    for found in run_ranks(work.logits, 2, [str(folder)]):
        assert found["elements"] == 0
        assert found["distance"] <= TOLERANCE
