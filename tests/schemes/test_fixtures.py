"""Every real checkpoint, on every number of ranks that its sizes allow: stored elements, decoded
weights and logits; and the exact refusal elsewhere.

Oracles: the files read with safetensors and cut with torch (`lading.verify`), the weights and the
logits that third parties decoded and computed. Ranks are threads of one process.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lading import ranks as ranks_module
from lading.decoding import decoded_weights
from lading.errors import LadingError
from lading.models import CausalLM
from lading.preflight import tp_sizes
from lading.pretrained import load_pretrained
from lading.ranks import Ranks, all_ranks
from lading.verify import verify
from tests.schemes.cutting import FIXTURES, fixture

FLOAT32 = 1e-5
"""Of the largest logit: the reference ran in fp32 on weights that are equal bit for bit."""

SIXTEEN_BITS = 0.02
"""Of the largest logit: the reference ran in 16 bits, or quantised its inputs as well."""


@dataclass(frozen=True)
class Case:
    """What a checkpoint allows.

    sizes       the tensor-parallel sizes that work; 4 q heads allow no others than 1, 2 and 4
    tolerance   of the logits, relative to the largest; None without a reference
    """

    sizes: tuple[int, ...] = (1, 2, 4)
    tolerance: float | None = SIXTEEN_BITS


CASES = {
    "autofp8-static": Case(tolerance=None),
    "awq-gemm-w4-g64": Case(tolerance=None),
    "bnb-nf4": Case(tolerance=None),
    "ct-fp8-block": Case(),
    "ct-fp8-dynamic-channel": Case(),
    "ct-fp8-static-tensor": Case(),
    "ct-gptq-w4a16-actorder-weight": Case(),
    "ct-int8-w8a8-channel": Case(),
    "ct-mixed-fp8attn-w4mlp": Case(tolerance=None),
    "ct-moe-w4a16-g64": Case(),
    "ct-mxfp4a16": Case(tolerance=FLOAT32),
    "ct-nvfp4a16": Case(),
    "ct-phi3-w4a16-g64-asym": Case(),
    "ct-qwen2bias-int8-w8a8": Case(),
    "ct-w3a16-g64-sym": Case(),
    "ct-w4a16-channel-sym": Case(),
    "ct-w4a16-g128-asym": Case(sizes=(1, 2)),
    "ct-w4a16-g64-sym": Case(),
    "ct010-gptq-w4a16-actorder-group": Case(),
    "fp8-block128": Case(tolerance=FLOAT32),
    "fp8-block128-qwen3moe": Case(tolerance=FLOAT32),
    "gptq-phi3-w4-g64": Case(),
    "gptq-v1-w3-g64-sym": Case(),
    "gptq-v1-w4-g64-asym": Case(),
    "gptq-v1-w4-g64-sym": Case(),
    "gptq-v1-w4-g64-sym-descact": Case(),
    "gptq-v1-w8-g64-sym": Case(),
    "gptq-v2-w4-g64-sym": Case(),
    "hqq-native-4bit-g64": Case(sizes=(1,), tolerance=None),
    "marlin-w4-g128": Case(tolerance=None),
    "modelopt-fp8": Case(tolerance=None),
    "modelopt-nvfp4": Case(tolerance=None),
}
OTHERS = ("ct010-marlin24-truth-g128", "gguf-q8_0", "mxfp4-gptoss")
"""No models: single layers, a file of dequantised weights, expert tensors. Their own tests decode
them.
"""


class Threads:
    """The collectives of the forward pass, over threads of one process."""

    def __init__(self, tp_size: int) -> None:
        self.tp_size = tp_size
        self._barrier = threading.Barrier(tp_size)
        self._values: dict[int, torch.Tensor] = {}

    def gather(self, tensor: torch.Tensor, ranks: Ranks) -> list[torch.Tensor]:
        self._values[ranks.tp_rank] = tensor
        self._barrier.wait(timeout=30)
        values = [self._values[rank] for rank in range(self.tp_size)]
        self._barrier.wait(timeout=30)
        return values

    def all_reduce(self, tensor: torch.Tensor, ranks: Ranks, group: object) -> torch.Tensor:
        return torch.stack(self.gather(tensor, ranks)).sum(0)

    def all_gather(self, tensor: torch.Tensor, ranks: Ranks, group: object) -> torch.Tensor:
        return torch.cat(self.gather(tensor, ranks), dim=-1)


def load_all(folder: Path, tp_size: int) -> list[CausalLM]:
    """The model of each rank, in fp32."""
    return [
        load_pretrained(folder, ranks=ranks, device="cpu", dtype=torch.float32)[0]
        for ranks in all_ranks(tp_size)
    ]


def assembled(models: list[CausalLM]) -> dict[str, torch.Tensor]:
    """The decoded weights of all ranks, put together under the checkpoint's names."""
    pieces: dict[str, list[tuple[list[slice], torch.Tensor]]] = {}
    shapes = {}
    for model in models:
        for decoded, owner in decoded_weights(model, model.names, model.ranks):
            region, values = decoded.region, decoded.values()
            shapes[decoded.name] = region.shape
            box = [slice(a, a + n) for a, n in zip(region.start, region.size, strict=True)]
            if owner:
                pieces.setdefault(decoded.name, []).append((box, values))
    whole = {}
    for name, found in pieces.items():
        counts = torch.zeros(shapes[name], dtype=torch.int8)
        full = torch.empty(shapes[name])
        for box, values in found:
            full[tuple(box)] = values
            counts[tuple(box)] += 1
        assert bool((counts == 1).all()), name
        whole[name] = full
    return whole


def logits_of(
    models: list[CausalLM], input_ids: torch.Tensor, patch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Each rank's logits."""
    threads = Threads(len(models))
    if len(models) > 1:
        patch.setattr(ranks_module, "all_reduce", threads.all_reduce)
        patch.setattr(ranks_module, "all_gather", threads.all_gather)

    def run(model: CausalLM) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids)
        return logits

    with ThreadPoolExecutor(len(models)) as pool:
        return list(pool.map(run, models))


@pytest.mark.parametrize(
    ("name", "tp_size"), [(name, size) for name, case in CASES.items() for size in case.sizes]
)
def test_loads_exactly(name: str, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fixture(name)
    models = load_all(folder, tp_size)
    for model in models:
        check = verify(folder, model, model.ranks)
        assert check.error() is None
        assert check.num_elements > 0
    weights = assembled(models)
    references = load_file(folder / "dequant_reference.safetensors")
    assert weights.keys() == references.keys()
    for module, reference in references.items():
        assert torch.equal(weights[module].to(reference.dtype), reference), module
    tolerance = CASES[name].tolerance
    assert (folder / "logits_reference.safetensors").exists() == (tolerance is not None)
    if tolerance is not None:
        expected = load_file(folder / "logits_reference.safetensors")
        limit = tolerance * float(expected["logits"].abs().max())
        for logits in logits_of(models, expected["input_ids"], monkeypatch):
            assert float((logits - expected["logits"]).abs().max()) <= limit


@pytest.mark.parametrize("name", CASES)
def test_sizes_that_work_are_known_before_anything_is_read(name: str) -> None:
    assert tp_sizes(fixture(name), 16) == CASES[name].sizes


def test_no_fixture_is_left_out() -> None:
    folders = (
        {path.name for path in FIXTURES.iterdir() if path.is_dir()} if FIXTURES.is_dir() else set()
    )
    if not folders:
        pytest.skip(f"no fixtures in {FIXTURES} (LADING_FIXTURES says where they are)")
    assert folders == {*CASES, *OTHERS}
