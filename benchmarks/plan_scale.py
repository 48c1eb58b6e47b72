"""How long planning takes for an index as large as DeepSeek-V3's: 91,991 tensors in 163 files.

    python benchmarks/plan_scale.py [--tp 1 2 16 64] [--runs 3] [--profile]

The files are written here: headers with that model's names, dtypes and shapes, and holes where the
weights would be, so nothing of them takes room. Planned is one rank of each TP size, in a process
of its own, through the code that `lading plan` runs: open the headers, recognise the quantisation,
declare the targets, bind, prove, copy. Medians of the runs, in seconds of the wall and of the CPU.

The model: 61 layers and the one for multi-token prediction, FP8 with 128 x 128 block scales, 256
routed experts, each cut over the ranks. Letters: H = hidden size, I = intermediate size.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import math
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from lading import models
from lading.checkpoint import Checkpoint, open_checkpoint
from lading.checkpoint.header import encode_header
from lading.layers import Layer
from lading.models.declaration import Declaration, Entry
from lading.names import Names
from lading.plan import Plan, make_plan
from lading.ranks import Ranks
from lading.schemes.choose import quant_config_of

NUM_FILES, NUM_LAYERS, NUM_DENSE, NUM_EXPERTS = 163, 61, 3, 256
H, VOCABULARY, HEADS, Q_RANK, KV_RANK, ROPE, QK, V = 7168, 129280, 128, 1536, 512, 64, 192, 128
DENSE_I, EXPERT_I, BLOCK = 18432, 2048, 128
NUM_TENSORS = 91991

Stored = tuple[str, str, tuple[int, ...]]


def tensors() -> Iterator[Stored]:
    """Name, dtype and shape of every tensor, layer by layer."""
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, H)
    for layer in range(NUM_LAYERS + 1):
        yield from layer_tensors(f"model.layers.{layer}", layer)
    yield "model.norm.weight", "BF16", (H,)
    yield "lm_head.weight", "BF16", (VOCABULARY, H)


def layer_tensors(at: str, layer: int) -> Iterator[Stored]:
    """Those of one layer; the last one has an embedding and a head of its own."""
    attention = {
        "q_a_proj": (Q_RANK, H),
        "q_b_proj": (HEADS * QK, Q_RANK),
        "kv_a_proj_with_mqa": (KV_RANK + ROPE, H),
        "kv_b_proj": (HEADS * (QK - ROPE + V), KV_RANK),
        "o_proj": (H, HEADS * V),
    }
    for name, shape in attention.items():
        yield from fp8(f"{at}.self_attn.{name}", shape)
    yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (Q_RANK,)
    yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (KV_RANK,)
    yield f"{at}.input_layernorm.weight", "BF16", (H,)
    yield f"{at}.post_attention_layernorm.weight", "BF16", (H,)
    if layer < NUM_DENSE:
        yield from mlp(f"{at}.mlp", DENSE_I)
        return
    yield f"{at}.mlp.gate.weight", "BF16", (NUM_EXPERTS, H)
    yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (NUM_EXPERTS,)
    yield from mlp(f"{at}.mlp.shared_experts", EXPERT_I)
    for expert in range(NUM_EXPERTS):
        yield from mlp(f"{at}.mlp.experts.{expert}", EXPERT_I)
    if layer == NUM_LAYERS:
        yield f"{at}.embed_tokens.weight", "BF16", (VOCABULARY, H)
        yield f"{at}.enorm.weight", "BF16", (H,)
        yield f"{at}.hnorm.weight", "BF16", (H,)
        yield f"{at}.eh_proj.weight", "BF16", (H, 2 * H)
        yield f"{at}.shared_head.norm.weight", "BF16", (H,)
        yield f"{at}.shared_head.head.weight", "BF16", (VOCABULARY, H)


def mlp(at: str, size: int) -> Iterator[Stored]:
    """Gate, up, down."""
    yield from fp8(f"{at}.gate_proj", (size, H))
    yield from fp8(f"{at}.up_proj", (size, H))
    yield from fp8(f"{at}.down_proj", (H, size))


def fp8(module: str, shape: tuple[int, int]) -> Iterator[Stored]:
    """A weight and its scales."""
    yield f"{module}.weight", "F8_E4M3", shape
    scales = tuple(-(-size // BLOCK) for size in shape)
    yield f"{module}.weight_scale_inv", "F32", scales


def make_checkpoint(folder: Path) -> None:
    """The files, the index, the config."""
    stored = list(tensors())
    assert len(stored) == NUM_TENSORS, f"{len(stored)} tensors, DeepSeek-V3 has {NUM_TENSORS}"
    sizes = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
    weight_map = {}
    share = -(-len(stored) // NUM_FILES)
    for number in range(NUM_FILES):
        chosen = stored[number * share : (number + 1) * share]
        file = f"model-{number + 1:05}-of-{NUM_FILES:06}.safetensors"
        header = encode_header(chosen, {"format": "pt"})
        with open(folder / file, "wb") as stream:
            stream.write(header)
            data = sum(sizes[dtype] * math.prod(shape) for _, dtype, shape in chosen)
            stream.truncate(len(header) + data)
        weight_map.update({name: file for name, _, _ in chosen})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
    }
    config = {"model_type": "deepseek_v3", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))


def declaration() -> Declaration:
    """The model as lading would declare it: lading's own families have no multi-head latent
    attention, so it is written here, of the values that they are made of.
    """
    vocabulary = Layer.embedding(VOCABULARY, H, pad_to=64)
    entries: list[Entry] = [("model.embed_tokens", vocabulary)]
    attention: list[Entry] = [
        ("self_attn.q_a_proj", Layer.replicated(H, Q_RANK)),
        ("self_attn.q_a_layernorm.weight", (Q_RANK,)),
        ("self_attn.q_b_proj", Layer.column(Q_RANK, [HEADS * QK])),
        ("self_attn.kv_a_proj_with_mqa", Layer.replicated(H, KV_RANK + ROPE)),
        ("self_attn.kv_a_layernorm.weight", (KV_RANK,)),
        ("self_attn.kv_b_proj", Layer.column(KV_RANK, [HEADS * (QK - ROPE + V)])),
        ("self_attn.o_proj", Layer.row(HEADS * V, H)),
        ("input_layernorm.weight", (H,)),
        ("post_attention_layernorm.weight", (H,)),
    ]
    expert = (Layer.column(H, [EXPERT_I] * 2), Layer.row(EXPERT_I, H))
    experts: list[Entry] = [
        ("mlp.gate", Layer.replicated(H, NUM_EXPERTS)),
        ("mlp.gate.e_score_correction_bias", (NUM_EXPERTS,)),
    ]
    for name in ("shared_experts", *(f"experts.{e}" for e in range(NUM_EXPERTS))):
        experts += [(f"mlp.{name}.gate_up_proj", expert[0]), (f"mlp.{name}.down_proj", expert[1])]
    dense: list[Entry] = [
        ("mlp.gate_up_proj", Layer.column(H, [DENSE_I] * 2)),
        ("mlp.down_proj", Layer.row(DENSE_I, H)),
    ]
    prediction: list[Entry] = [
        ("embed_tokens", vocabulary),
        ("enorm.weight", (H,)),
        ("hnorm.weight", (H,)),
        ("eh_proj", Layer.replicated(2 * H, H)),
        ("shared_head.norm.weight", (H,)),
        ("shared_head.head", vocabulary),
    ]
    for layer in range(NUM_LAYERS + 1):
        block = attention + (dense if layer < NUM_DENSE else experts)
        block += prediction if layer == NUM_LAYERS else []
        entries += ((f"model.layers.{layer}.{name}", what) for name, what in block)  # type: ignore[misc]
    entries += [("model.norm.weight", (H,)), ("lm_head", vocabulary)]
    return Declaration(entries=tuple(entries))


def plan_one(folder: Path, tp_size: int, marks: list[tuple[str, float]]) -> tuple[Checkpoint, Plan]:
    """Everything from the folder to the proved plan of the last rank."""
    checkpoint = open_checkpoint(folder)
    marks.append(("open", time.perf_counter()))
    names = Names()
    quant = quant_config_of(checkpoint, names, straddle="duplicate")
    targets = models.targets(declaration(), tp_size, "BF16", quant)
    marks.append(("declare", time.perf_counter()))
    ranks = [Ranks(tp_rank=tp_size - 1, tp_size=tp_size)]
    plan = make_plan(targets, checkpoint.tensors, ranks=ranks, names=names)
    marks.append(("plan", time.perf_counter()))
    assert plan.digest, "what ranks compare is a part of the time"
    marks.append(("digest", time.perf_counter()))
    return checkpoint, plan


def measure(folder: Path, tp_size: int) -> dict[str, float]:
    """One run in this process: seconds of each stage, of all, and of the CPU."""
    marks = [("", time.perf_counter())]
    cpu = time.process_time()
    _, plan = plan_one(folder, tp_size, marks)
    cpu = time.process_time() - cpu
    stages = {name: at - before for (_, before), (name, at) in pairwise(marks)}
    wall = marks[-1][1] - marks[0][1]
    copies = len(plan.shares[0].copies)
    return {**stages, "wall": wall, "cpu": cpu, "copies": copies}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 16, 64])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.folder, options.tp[0])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        if options.profile:
            profile = cProfile.Profile()
            profile.runcall(plan_one, folder, options.tp[0], [])
            pstats.Stats(profile).sort_stats("tottime").print_stats(30)
            return
        stages = ("open", "declare", "plan", "digest", "wall", "cpu")
        print(f"{NUM_TENSORS:,} tensors in {NUM_FILES} files, one rank, seconds\n")
        print(f"| TP | copies | {' | '.join(stages)} |\n{'| --- ' * (len(stages) + 2)}|")
        for tp_size in options.tp:
            command = [sys.executable, __file__, "--one", "--folder", str(folder)]
            found: list[dict[str, float]] = []
            for _ in range(options.runs):
                done = subprocess.run(
                    [*command, "--tp", str(tp_size)], check=True, capture_output=True, text=True
                )
                found.append(json.loads(done.stdout))
            cells = [f"{statistics.median(one[key] for one in found):.2f}" for key in stages]
            print(f"| {tp_size} | {found[0]['copies']:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
