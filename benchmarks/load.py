"""Loads a Llama-shaped checkpoint rank by rank, beside safetensors + narrow + copy_.

    python benchmarks/load.py [--kind dense|gptq] [--gigabytes 2] [--tp 1 2 8] [--runs 5]
                              [--small-pages]

`dense` is bf16; `gptq` is int4 in groups of 128, with four tensors for each linear layer. With
--small-pages lading does not ask for huge pages for the new parameters.

Both sides fill the same parameters of one rank after another, in one process each, alternating,
from the page cache; each run is its own process, so that its peak memory is its own. A rank's
model is given back before the next rank's load, outside of the time. Prints a Markdown table:
medians, the peer's time over lading's, bytes read over bytes kept, and memory beyond the
parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 2048, 16, 8, 5632, 32000


GROUP = 128


def tensors_of(
    name: str, shape: tuple[int, ...], kind: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The stored tensors of a module [O, I]: name → dtype and shape."""
    if kind == "dense" or len(shape) == 1:
        return {f"{name}.weight": ("bf16", shape)}
    outputs, inputs = shape
    return {
        f"{name}.qweight": ("int32", (inputs // 8, outputs)),
        f"{name}.qzeros": ("int32", (inputs // GROUP, outputs // 8)),
        f"{name}.scales": ("fp16", (inputs // GROUP, outputs)),
        f"{name}.g_idx": ("g_idx", (inputs,)),
    }


def make_checkpoint(folder: Path, gigabytes: float, kind: str) -> None:
    """Random weights in files of about 1 GB, with an index and a config."""
    import torch
    from safetensors.torch import save_file

    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    stored = [tensors_of(name, shape, kind) for name, shape in shapes.items()]
    sizes = {"bf16": 2, "fp16": 2, "int32": 4, "g_idx": 4}
    per_layer = sum(
        sizes[dtype] * torch.Size(shape).numel() for one in stored for dtype, shape in one.values()
    )
    num_layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal pending, number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(pending, folder / file)
        weight_map.update(dict.fromkeys(pending, file))
        pending = {}

    noise = torch.randn(1 << 24).to(torch.bfloat16)

    def random(shape: tuple[int, ...], dtype: str = "bf16") -> torch.Tensor:
        count = torch.Size(shape).numel()
        if dtype == "g_idx":
            return torch.arange(count, dtype=torch.int32) // GROUP
        if dtype == "int32":
            return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
        values = noise.repeat(-(-count // noise.numel()))[:count].view(shape).clone()
        return values.half() if dtype == "fp16" else values

    pending["model.embed_tokens.weight"] = random((VOCABULARY, HIDDEN))
    for layer in range(num_layers):
        for one in stored:
            for name, (dtype, shape) in one.items():
                pending[f"model.layers.{layer}.{name}"] = random(shape, dtype)
        if sum(t.nbytes for t in pending.values()) > 1e9:
            flush()
    pending["model.norm.weight"] = random((HIDDEN,))
    pending["lm_head.weight"] = random((VOCABULARY, HIDDEN))
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if kind == "gptq":
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
        }
    (folder / "config.json").write_text(json.dumps(config))


def run_lading(folder: Path, tp_size: int) -> tuple[float, int]:
    """Seconds and bytes read of `from_pretrained` for every rank, one after another."""
    from lading import all_ranks
    from lading.pretrained import load_pretrained

    seconds, read = 0.0, 0
    for ranks in all_ranks(tp_size):
        began = time.perf_counter()
        model, report = load_pretrained(folder, ranks=ranks, device="cpu")
        seconds += time.perf_counter() - began
        read += report.read_bytes
        del model
    return seconds, read


OUTPUT_DIM = {"weight": 0, "qweight": 1, "qzeros": 1, "scales": 1, "g_idx": None}
INPUT_DIM = {"weight": 1, "qweight": 0, "qzeros": 0, "scales": 0, "g_idx": 0}
FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def run_peer(folder: Path, tp_size: int) -> tuple[float, int]:
    """The same with safe_open, narrow and copy_, into fused parameters of the same shapes."""
    import torch
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    seconds, kept = 0.0, 0
    for rank in range(tp_size):
        began = time.perf_counter()
        model: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(index.values()):
            with safe_open(folder / file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118  # not a dict
                    local = handle.get_tensor(name)
                    module, leaf = name.split(".")[-2:]
                    is_row = module in ("o_proj", "down_proj")
                    dim = INPUT_DIM[leaf] if is_row else OUTPUT_DIM[leaf]
                    if dim is not None and (local.dim() > 1 or is_row):
                        size = local.shape[dim] // tp_size
                        local = local.narrow(dim, rank * size, size)
                    kept += local.nbytes
                    if module not in FUSED or leaf == "g_idx":
                        model[name] = torch.empty(local.shape, dtype=local.dtype).copy_(local)
                        continue
                    _copy_part(model, name, local, OUTPUT_DIM[leaf] or 0, tp_size)
        seconds += time.perf_counter() - began
        del model
    return seconds, kept


def _copy_part(
    model: dict[str, torch.Tensor], name: str, local: torch.Tensor, dim: int, tp_size: int
) -> None:
    """One part into its place in a fused parameter."""
    import torch

    module, leaf = name.split(".")[-2:]
    fused, position = FUSED[module]
    kv = HIDDEN // HEADS * KV_HEADS
    rows = [HIDDEN, kv, kv] if fused == "qkv_proj" else [INTERMEDIATE] * 2
    words = 8 if leaf == "qzeros" else 1
    sizes = [n // tp_size // words for n in rows]
    key = name.replace(module, fused)
    if key not in model:
        shape = list(local.shape)
        shape[dim] = sum(sizes)
        model[key] = torch.empty(shape, dtype=local.dtype)
    at = sum(sizes[:position])
    model[key].narrow(dim, at, sizes[position]).copy_(local)


def peak_bytes() -> int:
    """Of this process; `ru_maxrss` would begin with what the process that started it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":\t") for line in lines)["VmHWM"].split()[0]) * 1024


def measure(folder: Path, side: str, tp_size: int, small_pages: bool) -> dict[str, float]:
    """One run in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--side",
        side,
        "--tp",
        str(tp_size),
        *(["--small-pages"] if small_pages else []),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The table, or one side's run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kind", choices=["dense", "gptq"], default="dense")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--small-pages", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--side", choices=["lading", "peer"])
    options = parser.parse_args()
    if options.side:
        # Imports are not a part of the time, on either side.
        import safetensors.torch  # noqa: F401
        import torch

        import lading.models.decoder
        import lading.pretrained  # noqa: F401
        from lading.transport import sorting

        torch.set_num_threads(2)
        if options.small_pages:
            sorting.HUGE_TENSOR_BYTES = 2**62
        run = run_lading if options.side == "lading" else run_peer
        seconds, read = run(options.folder, options.tp[0])
        print(json.dumps({"seconds": seconds, "read": read, "peak": peak_bytes()}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if options.folder is None:
            make_checkpoint(folder, options.gigabytes, options.kind)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB, {options.runs} runs, alternating\n")
        print(
            "| TP | lading s | peer s | peer / lading | read / kept | peak lading GB "
            "| peak peer GB |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for tp_size in options.tp:
            both: dict[str, list[dict[str, float]]] = {"lading": [], "peer": []}
            for turn in range(options.runs + 1):
                for side, results in both.items():
                    result = measure(folder, side, tp_size, options.small_pages)
                    if turn:  # the first warms the page cache
                        results.append(result)
            pairs = zip(both["peer"], both["lading"], strict=True)
            ratio = statistics.median(peer["seconds"] / own["seconds"] for peer, own in pairs)
            own, peer = (
                {key: statistics.median(r[key] for r in both[side]) for key in both[side][0]}
                for side in ("lading", "peer")
            )
            print(
                f"| {tp_size} | {own['seconds']:.2f} | {peer['seconds']:.2f} | {ratio:.2f} "
                f"| {own['read'] / peer['read']:.3f} | {own['peak'] / 1e9:.2f} "
                f"| {peer['peak'] / 1e9:.2f} |"
            )


if __name__ == "__main__":
    main()
