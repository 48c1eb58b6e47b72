"""Many small tensors: what each costs, beside safetensors' get_tensor + copy_.

    python benchmarks/small_tensors.py [--tensors 20000] [--kib 16] [--runs 5] [--profile]

Fills the same parameters, in memory that exists and was touched, from the page cache; the sides
alternate in one process. `transport` is the engine's part alone, from a plan that is made; `load`
is `lading.load` from the folder: headers, plan, proof, checks, copies, marks. Prints Markdown.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import lading
from lading.plan import make_plan
from lading.ranks import Ranks
from lading.targeting import names_of, targets_of
from lading.transport import Transport

PER_MODULE = 100


def names(count: int) -> list[str]:
    """Two levels, as a model's."""
    return [f"layers.{i // PER_MODULE}.p{i % PER_MODULE}" for i in range(count)]


def make_checkpoint(folder: Path, count: int, num_bytes: int, files: int = 4) -> None:
    """Random bits in a few files with an index."""
    weight_map: dict[str, str] = {}
    share = -(-count // files)
    for number in range(files):
        chosen = names(count)[number * share : (number + 1) * share]
        file = f"model-{number}.safetensors"
        bits = torch.randint(-(2**15), 2**15, (len(chosen), num_bytes // 2), dtype=torch.int16)
        rows = zip(chosen, bits.view(torch.bfloat16), strict=True)
        save_file({name: row.clone() for name, row in rows}, folder / file)
        weight_map.update(dict.fromkeys(chosen, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_model(count: int, num_bytes: int) -> nn.Module:
    """Plain parameters, which every rank keeps whole."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(-(-count // PER_MODULE)))
    for name in names(count):
        _, layer, leaf = name.split(".")
        data = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
        setattr(model.layers[int(layer)], leaf, nn.Parameter(data, requires_grad=False))
    return model


def peer(folder: Path, params: dict[str, torch.Tensor]) -> None:
    """Each tensor by itself."""
    with torch.no_grad():
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as handle:
                for name in handle.keys():  # noqa: SIM118  # not a dict
                    params[name].copy_(handle.get_tensor(name))


def wrong(folder: Path, params: dict[str, torch.Tensor]) -> int:
    """How many parameters are not what safetensors reads."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                same = (
                    params[name].view(torch.int16).equal(handle.get_tensor(name).view(torch.int16))
                )
                count += not same
    return count


def main() -> None:
    """Prints the table, or with --profile what the time of `lading.load` is spent on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--kib", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    count, num_bytes = options.tensors, options.kib * 1024
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, count, num_bytes)
        model = make_model(count, num_bytes)
        params = dict(model.named_parameters())
        ranks = Ranks()
        checkpoint = lading.open_checkpoint(folder)
        plan = make_plan(
            targets_of(model, ranks), checkpoint.tensors, ranks=[ranks], names=names_of(model)
        )
        memory = {key: param.detach() for key, param in params.items()}

        def transport() -> None:
            with checkpoint.reader() as reader:
                Transport(reader=reader).run(plan, plan.shares[0], memory, lambda _: None)

        def load() -> None:
            lading.load(model, folder, ranks=ranks, device="cpu")

        if options.profile:
            for side in (transport, load):
                side()
                profile = cProfile.Profile()
                profile.runcall(side)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
            return
        sides = {
            "get_tensor + copy_": lambda: peer(folder, params),
            "lading transport": transport,
            "lading.load": load,
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(options.runs + 1):
            for side, work in sides.items():
                for param in params.values() if turn == options.runs else ():
                    param.zero_()
                began = time.perf_counter()
                work()
                if turn:  # the first warms the page cache
                    seconds[side].append(time.perf_counter() - began)
                if turn == options.runs:
                    assert not wrong(folder, params), f"{side}: elements differ"
        print(f"{count:,} tensors of {options.kib} KiB, medians of {options.runs}, alternating\n")
        print("| | seconds | us / tensor | peer / this |\n| --- | --- | --- | --- |")
        base = seconds["get_tensor + copy_"]
        for side, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(base, own, strict=True))
            median = statistics.median(own)
            print(f"| {side} | {median:.3f} | {median / count * 1e6:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
