"""Loading on GPUs, beside InstantTensor and safetensors, in one run: see README.md here.

    torchrun --nproc-per-node N benchmarks/gpu.py FOLDER [--runs 5] [--sweep]

FOLDER gets a checkpoint of Llama-3-8B's shapes (16 GB) unless it has one. All loaders run in turns
on parameters that exist already; time is from a barrier until every rank has its parameters. After
the timed runs every element of every rank is compared with what safetensors slices from the file.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

import lading
from lading.ranks import Ranks
from lading.transport import moving

GB = 1e9
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def shapes(config: dict) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape, and the dim that is cut."""
    h, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocab, h), 0
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield p + "self_attn.q_proj.weight", (h, h), 0
        yield p + "self_attn.k_proj.weight", (kv, h), 0
        yield p + "self_attn.v_proj.weight", (kv, h), 0
        yield p + "self_attn.o_proj.weight", (h, h), 1
        yield p + "mlp.gate_proj.weight", (inter, h), 0
        yield p + "mlp.up_proj.weight", (inter, h), 0
        yield p + "mlp.down_proj.weight", (h, inter), 1
        yield p + "input_layernorm.weight", (h,), None
        yield p + "post_attention_layernorm.weight", (h,), None
    yield "model.norm.weight", (h,), None
    yield "lm_head.weight", (vocab, h), 0


def make(folder: str, config: dict, files: int = 4) -> None:
    """Random values: zeros could be faster than real data."""
    os.makedirs(folder, exist_ok=True)
    every = list(shapes(config))
    total = sum(torch.Size(s).numel() * 2 for _, s, _ in every)
    held: dict[str, torch.Tensor] = {}
    size, number, where = 0, 1, {}
    generator = torch.Generator(device="cuda").manual_seed(0)
    for k, (name, shape, _) in enumerate(every):
        value = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        held[name] = value.mul_(0.02).cpu()
        size += held[name].numel() * 2
        if (size > total / files and number < files) or k == len(every) - 1:
            file = f"model-{number:05d}-of-{files:05d}.safetensors"
            save_file(held, f"{folder}/{file}", metadata={"format": "pt"})
            where.update(dict.fromkeys(held, file))
            held, size, number = {}, 0, number + 1
    with open(f"{folder}/model.safetensors.index.json", "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": where}, f)
    with open(f"{folder}/config.json", "w") as f:
        json.dump(config, f)


class Bench:
    """One rank of the benchmark."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.files = sorted(glob.glob(f"{folder}/*.safetensors"))
        self.bytes = sum(map(os.path.getsize, self.files))
        self.cut = {name: dim for name, _, dim in shapes(CONFIG)}
        self.device = torch.device("cuda", torch.cuda.current_device())
        ranks = Ranks(tp_rank=self.rank, tp_size=self.size)
        self.model = lading.from_pretrained(folder, ranks=ranks, device=self.device)
        self.parts: dict[str, torch.Tensor] = {}

    def share(self, name: str, full: torch.Tensor) -> torch.Tensor:
        dim = self.cut[name]
        if dim is None:
            return full
        n = full.shape[dim] // self.size
        return full.narrow(dim, self.rank * n, n)

    def allocate_parts(self) -> None:
        """The peers' parameters: one for each checkpoint tensor, this rank's share."""
        for name, shape, _ in shapes(CONFIG):
            meta = self.share(name, torch.empty(shape, dtype=torch.bfloat16, device="meta"))
            self.parts[name] = torch.empty(meta.shape, dtype=torch.bfloat16, device=self.device)

    def timed(self, work: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def ceiling(self) -> float:
        """Page-locked host memory to the GPU, all ranks at once, in GB/s of all together."""
        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True).fill_(1)
        room = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        took = []
        for _ in range(5):

            def copy() -> None:
                for _ in range(4):
                    room.copy_(host, non_blocking=True)

            took.append(self.timed(copy))
        return self.size * 4 * host.numel() / statistics.median(took) / GB

    def lading(self) -> None:
        self.report = lading.load(self.model, self.folder)

    def lading_exchange(self) -> None:
        """Row cuts are read once, by bands, and exchanged."""
        lading.load(self.model, self.folder, exchange=True)

    def lading_meta(self) -> None:
        ranks = Ranks(tp_rank=self.rank, tp_size=self.size)
        lading.from_pretrained(self.folder, ranks=ranks, device=self.device)

    def instanttensor(self) -> None:
        from instanttensor import Backend
        from instanttensor import safe_open as opened

        group = dist.group.WORLD if self.size > 1 else None
        with opened(
            self.files,
            framework="pt",
            device=self.rank,
            process_group=group,
            copy=False,
            backend=Backend.MMAP,
        ) as f:
            for name, value in f.tensors():
                self.parts[name].copy_(self.share(name, value))

    def prefetch(self) -> None:
        for file in self.files:
            with safe_open(file, "pt", device=str(self.device)) as f:
                plan = {}
                for name in f.keys():  # noqa: SIM118
                    n = self.parts[name].shape[0]
                    is_cut = self.cut[name] == 0 and self.size > 1
                    plan[name] = slice(self.rank * n, (self.rank + 1) * n) if is_cut else None
                loader = f.prefetch(plan, device=str(self.device))
                for name in plan:
                    value = loader.take(name)
                    whole = self.cut[name] == 1
                    self.parts[name].copy_(self.share(name, value) if whole else value)
                loader.close()

    def narrow_copy(self) -> None:
        for file in self.files:
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118
                    self.parts[name].copy_(self.share(name, f.get_tensor(name)))

    def check(self) -> int:
        """How many of lading's parameters differ from what safetensors slices."""
        wrong = 0
        state = dict(self.model.named_parameters())
        groups = {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}
        for file in self.files:
            with safe_open(file, "pt") as f:
                for name in f.keys():  # noqa: SIM118
                    value = self.share(name, f.get_tensor(name)).to(self.device)
                    found = self.find(state, name, groups)
                    wrong += not torch.equal(value.view(torch.int16), found.view(torch.int16))
        return wrong

    def find(self, state: dict, name: str, groups: dict) -> torch.Tensor:
        """Where a checkpoint tensor's share lies in a fused parameter."""
        if name in state:
            return state[name]
        prefix, leaf, _ = name.rsplit(".", 2)
        h, kv, inter = (
            CONFIG["hidden_size"] // self.size,
            1024 // self.size,
            CONFIG["intermediate_size"] // self.size,
        )
        starts = {"q_proj": (0, h), "k_proj": (h, kv), "v_proj": (h + kv, kv)}
        starts |= {"gate_proj": (0, inter), "up_proj": (inter, inter)}
        fused = "qkv_proj" if leaf in ("q_proj", "k_proj", "v_proj") else "gate_up_proj"
        return state[f"{prefix}.{fused}.weight"].narrow(0, *starts[leaf])


def say(bench: Bench, text: str) -> None:
    if bench.rank == 0:
        print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--peers", nargs="*", default=["instanttensor", "prefetch", "narrow_copy"])
    args = parser.parse_args()
    local = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    if not os.path.exists(f"{args.folder}/config.json") and local == 0:
        began = time.perf_counter()
        make(args.folder, CONFIG)
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
        torch.cuda.empty_cache()
    dist.barrier()
    bench = Bench(args.folder)
    rate = bench.ceiling()
    say(bench, f"{bench.size} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    say(bench, f"ceiling {rate:.1f} GB/s")
    if args.sweep:
        sweep(bench)
    bench.allocate_parts()
    loaders = {"lading": bench.lading, "lading_meta": bench.lading_meta}
    if bench.size > 1:
        loaders["lading_exchange"] = bench.lading_exchange
    loaders |= {name: vars(Bench)[name].__get__(bench) for name in args.peers}
    took: dict[str, list[float]] = {name: [] for name in loaders}
    for run in range(args.runs + 1):
        for name, work in list(loaders.items()):
            try:
                seconds = bench.timed(work)
            except Exception as error:
                say(bench, f"{name} cannot run: {error!r:.300}")
                del loaders[name]
                continue
            if run:  # the first warms up
                took[name].append(seconds)
    ours = statistics.median(took["lading"])
    for name, seconds in took.items():
        if seconds:
            median = statistics.median(seconds)
            say(
                bench,
                f"{name:14} {median:.3f} s ({min(seconds):.3f} to {max(seconds):.3f}) "
                f"{bench.bytes / median / GB:6.1f} GB/s, {bench.bytes / median / GB / rate:.2f} of "
                f"the ceiling, lading is {median / ours:.2f} x",
            )
    wrong = torch.tensor([bench.check()], device=bench.device)
    dist.all_reduce(wrong)
    report = bench.report
    say(bench, f"wrong tensors: {int(wrong)}; {report}; read {report.read_bytes}")
    shard = report.parameter_bytes
    say(
        bench,
        f"over the bus / shard bytes {report.stats.moved_bytes / shard:.4f}, exchanged "
        f"{report.exchanged_bytes}, page-locked {report.pinned_bytes}, "
        f"plan {report.plan_seconds:.3f} s, move {report.move_seconds:.3f} s",
    )
    dist.destroy_process_group()


def sweep(bench: Bench) -> None:
    """Threads, chunk and depth of the engine, in turns."""
    kinds = (8, 1, 4), (12, 1, 2), (12, 1, 4), (12, 2, 2), (14, 1, 2), (14, 1, 4), (14, 2, 2)
    took: dict[tuple[int, int, int], list[float]] = {kind: [] for kind in kinds}
    for run in range(6):
        for threads, chunk, depth in kinds:
            moving.GPU_CHUNK_BYTES, moving.DEPTH = chunk << 20, depth
            limits = lading.Limits(num_threads=threads)
            load = partial(lading.load, bench.model, bench.folder, limits=limits)
            bench.timed(load)  # locks memory of this shape
            if run:
                took[threads, chunk, depth].append(bench.timed(load))
    for (threads, chunk, depth), seconds in took.items():
        median = statistics.median(seconds)
        say(
            bench,
            f"threads {threads:2} chunk {chunk} MiB depth {depth}: {median:.3f} s "
            f"{bench.bytes / median / GB:.1f} GB/s",
        )


if __name__ == "__main__":
    main()
