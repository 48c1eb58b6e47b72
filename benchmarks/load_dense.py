"""Loads a Llama-shaped checkpoint rank by rank, beside safetensors + narrow + copy_.

    python benchmarks/load_dense.py [--gigabytes 2] [--tp 1 2 8] [--runs 5]

Both sides fill the same parameters of one rank after another, in one process each, alternating, from
the page cache; each run is its own process, so that its peak memory is its own. Prints a Markdown table:
medians, the peer's time over lading's, bytes read over bytes kept, and memory beyond the parameters.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 2048, 16, 8, 5632, 32000


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Random bf16 weights in files of about 1 GB, with an index and a config."""
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
    per_layer = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
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

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].view(shape).clone()

    pending["model.embed_tokens.weight"] = random((VOCABULARY, HIDDEN))
    for layer in range(num_layers):
        for name, shape in shapes.items():
            pending[f"model.layers.{layer}.{name}.weight"] = random(shape)
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
    (folder / "config.json").write_text(json.dumps(config))


def run_lading(folder: Path, tp_size: int) -> tuple[float, int]:
    """Seconds and bytes read of `from_pretrained` for every rank, one after another."""
    from lading import all_ranks
    from lading.pretrained import load_pretrained

    read = 0
    began = time.perf_counter()
    for ranks in all_ranks(tp_size):
        _, report = load_pretrained(folder, ranks=ranks, device="cpu")
        read += report.read_bytes
    return time.perf_counter() - began, read


def run_peer(folder: Path, tp_size: int) -> tuple[float, int]:
    """The same with safe_open, narrow and copy_, into fused parameters of the same shapes."""
    import torch
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    began = time.perf_counter()
    kept = 0
    fused = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}
    group = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gu", "up_proj": "gu"}
    for rank in range(tp_size):
        model: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(index.values()):
            with safe_open(folder / file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118  # not a dict
                    full = handle.get_tensor(name)
                    leaf = name.split(".")[-2]
                    dim = 1 if leaf in ("o_proj", "down_proj") else 0
                    if full.dim() == 2:
                        size = full.shape[dim] // tp_size
                        full = full.narrow(dim, rank * size, size)
                    if leaf not in fused:
                        model[name] = torch.empty(full.shape, dtype=full.dtype).copy_(full)
                    else:
                        key = name.replace(leaf, group[leaf])
                        kv = HIDDEN // HEADS * KV_HEADS // tp_size
                        sizes = (
                            [HIDDEN // tp_size, kv, kv]
                            if group[leaf] == "qkv"
                            else [INTERMEDIATE // tp_size] * 2
                        )
                        if key not in model:
                            model[key] = torch.empty(sum(sizes), HIDDEN, dtype=full.dtype)
                        at = sum(sizes[: fused[leaf]])
                        model[key].narrow(0, at, sizes[fused[leaf]]).copy_(full)
                    kept += full.nbytes
        del model
    return time.perf_counter() - began, kept


def measure(folder: Path, side: str, tp_size: int) -> dict[str, float]:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(folder), "--side", side, "--tp", str(tp_size)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """The table, or one side's run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--side", choices=["lading", "peer"])
    options = parser.parse_args()
    if options.side:
        import torch  # not a part of the time

        torch.set_num_threads(2)
        run = run_lading if options.side == "lading" else run_peer
        seconds, read = run(options.folder, options.tp[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "read": read, "peak": peak}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = options.folder or Path(name)
        if options.folder is None:
            make_checkpoint(folder, options.gigabytes)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB, {options.runs} runs, alternating\n")
        print("| TP | lading s | peer s | peer / lading | read / kept | peak lading GB | peak peer GB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for tp_size in options.tp:
            both: dict[str, list[dict[str, float]]] = {"lading": [], "peer": []}
            for turn in range(options.runs + 1):
                for side, results in both.items():
                    result = measure(folder, side, tp_size)
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
                f"| {own['read'] / peer['read']:.3f} | {own['peak'] / 1e9:.2f} | {peer['peak'] / 1e9:.2f} |"
            )


if __name__ == "__main__":
    main()
