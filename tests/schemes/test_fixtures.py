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
from torch import nn

from lading import ranks as ranks_module
from lading.checkpoint import open_checkpoint
from lading.decoding import decoded_weights
from lading.errors import LadingError, LayoutError, PlanError
from lading.layers import Layer
from lading.loading import load
from lading.models import CausalLM, build_layer, targets
from lading.names import Names, SkipRule
from lading.nn import ParallelLayer
from lading.preflight import preflight, read, tp_sizes
from lading.pretrained import load_pretrained
from lading.ranks import Ranks, all_ranks
from lading.schemes import QuantConfig, quant_config_of
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


@pytest.mark.parametrize(
    ("name", "tp_size", "text"),
    [
        (
            "ct-w4a16-g128-asym",
            4,
            "model.layers.0.self_attn.o_proj.weight_scale: TP 4 cuts 256 columns into 64 per rank; "
            "one scale covers a group of 128 inputs and 64 = 0 * 128 + 64. Try: TP 1 or 2.",
        ),
        (
            "hqq-native-4bit-g64",
            2,
            "model.layers.0.self_attn.qkv_proj.W_q, part 'q': TP 2 cuts 256 rows into 128 per "
            "rank; HQQ packs 2 outputs from all over an int4 weight into one entry and 128 = 0 * "
            "512 + 128. Try: TP 1.",
        ),
        (
            "bnb-nf4",
            8,
            "model.layers.0.self_attn.o_proj.weight.absmax: TP 8 cuts 256 columns into 32 per "
            "rank; one scale covers a block of 64 inputs and 32 = 0 * 64 + 32. Try: TP 1, 2 or 4.",
        ),
        (
            "marlin-w4-g128",
            8,
            "model.layers.0.self_attn.o_proj.s: TP 8 cuts 512 rows into 64 per rank; one scale "
            "covers a group of 128 inputs and 64 = 0 * 128 + 64. Try: TP 1, 2 or 4.",
        ),
        (
            "fp8-block128",
            3,
            "model.layers.0.self_attn.qkv_proj.weight, part 'q': TP 3 does not cut 4 q heads into "
            "3 equal pieces: 4 = 3 * 1 + 1. Try: TP 1, 2 or 4.",
        ),
    ],
)
def test_other_sizes_are_refused_with_the_reason(name: str, tp_size: int, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        preflight(fixture(name), all_ranks(tp_size))
    problems = list(map(str, caught.value.problems))
    assert text in problems
    works = ", ".join(map(str, CASES[name].sizes))
    assert caught.value.hint == f"TP {works}: there every layer divides"


@pytest.mark.parametrize("name", ["fp8-block128", "fp8-block128-qwen3moe", "ct-fp8-block"])
def test_blocks_that_a_cut_goes_through_may_be_refused(name: str) -> None:
    """k and v have 128 outputs, one block: TP 2 cuts it."""
    found = read(fixture(name))
    config = quant_config_of(found.checkpoint, found.names, straddle="refuse")
    targets(found.declaration, 1, found.dtype, config)
    with pytest.raises(PlanError) as caught:
        targets(found.declaration, 2, found.dtype, config)
    scale = "weight_scale" if name == "ct-fp8-block" else "weight_scale_inv"
    assert str(caught.value.problems[0]) == (
        f"model.layers.0.self_attn.qkv_proj.{scale}, part 'k': TP 2 cuts 128 rows into 64 per "
        "rank; one scale covers 128 outputs, no entry may be kept twice, and 64 = 0 * 128 + 64. "
        "Try: TP 1."
    )


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_single_layers_in_sparse_tiles(tp_size: int) -> None:
    """A checkpoint without a model: Marlin 2:4 layers, each loaded by itself."""
    folder = fixture("ct010-marlin24-truth-g128")
    config = quant_config_of(open_checkpoint(folder), Names())
    for name, reference in load_file(folder / "dequant_reference.safetensors").items():
        path = name.removesuffix(".weight")
        outputs, inputs = reference.shape
        is_row = path.endswith(("o_proj", "down_proj"))
        layer = Layer.row(inputs, outputs) if is_row else Layer.column(inputs, [outputs])
        if path.endswith("k_proj") and tp_size == 4:
            with pytest.raises(LayoutError) as caught:
                layer_of(folder, path, layer, config, all_ranks(4)[0])
            assert str(caught.value) == (
                f"{path}.weight_packed: TP 4 cuts 128 columns into 32 per rank; a Marlin tile is "
                "64 outputs wide and 32 = 0 * 64 + 32. Try: TP 1 or 2."
            )
            continue
        if path.endswith("o_proj") and tp_size == 4:
            with pytest.raises(LayoutError, match="one scale covers a group of 128 inputs"):
                layer_of(folder, path, layer, config, all_ranks(4)[0])
            continue
        pieces = [layer_of(folder, path, layer, config, ranks) for ranks in all_ranks(tp_size)]
        weight = torch.cat([one.dequantized_weight() for one in pieces], int(is_row))
        assert torch.equal(weight, reference)


def layer_of(
    folder: Path, path: str, layer: Layer, config: QuantConfig | None, ranks: Ranks
) -> ParallelLayer:
    """One layer of a file that holds others as well."""
    module = build_layer(
        layer, prefix=path, ranks=ranks, group=None, dtype=torch.float32, quant_config=config
    )
    model = nn.Module()
    model.add_module("only", module)
    escaped = path.replace(".", r"\.")
    skips = (SkipRule(pattern=f"(?!{escaped}\\.).*", reason="another layer"),)
    load(model, folder, ranks=ranks, names=Names(renames=(("^only", path),), skips=skips))
    return module


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ct010-marlin24-truth-g128", "model_type: is missing"),
        ("gguf-q8_0", "config.json: is missing, needs one beside the weights"),
        ("mxfp4-gptoss", 'model_type: is "gpt_oss", needs one of: llama'),
    ],
)
def test_what_is_no_model_is_refused(name: str, text: str) -> None:
    with pytest.raises(LadingError) as caught:
        read(fixture(name))
    assert text in str(caught.value)


def test_no_fixture_is_left_out() -> None:
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixtures in {FIXTURES} (LADING_FIXTURES says where they are)")
    assert {path.name for path in FIXTURES.iterdir() if path.is_dir()} == {*CASES, *OTHERS}
