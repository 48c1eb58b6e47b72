"""Checks and times, with NCCL: the way back from GPUs, live reshards, exchanges, cold loads.

    torchrun --nproc-per-node N checks/gpu_back.py FOLDER [--gigabytes 4] [--only PART ...]
                                [--swap] [--device cpu]

FOLDER gets random checkpoints unless it has them: bf16, GPTQ and FP8, large and odd, about three
times `--gigabytes`; twice as much is needed besides. Each part prints one line `name: figures`, and
the others go on where one fails. What is loaded, resharded and exported is compared, every bit,
with safetensors slices or with the files. With --swap rank r has GPU N - 1 - r: neither its number
nor LOCAL_RANK's. With --device cpu (gloo, say --gigabytes 0.01) its own logic can be tried out.
Exits 1 where anything differs or fails.

    export        lading.export of the parameters, every file's sha256, beside `cp -r`
    small         the same for odd sizes, GPTQ and FP8; digests, reshards; three groups: NCCL or
                  gloo with GPU parameters, NCCL with CPU parameters
    reshard       TP N to TP 1 on each rank; TP 1 on rank 0 to TP N
    digest        of the live model and of the files
    exchange      exchange=False, True and None: runs under 2 KiB; replicated matrices
    gptq          column cuts of [in, out]: seconds, bytes over the bus / shard bytes
    cold          no page resident, beside a plain O_DIRECT read by 16 threads
    faults        a file that is cut off, before and after its header was read, on all ranks or one
    streams       export, digest and reshard in a stream that is still writing the parameters
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_checkpoints import Shape, differing, make, make_replicated, plain_model, same_bits
from gpu_files import disk_bytes, drop, read_direct, sha256
from torch import nn

import lading
from lading.loading import origin_of
from lading.pretrained import load_pretrained, prepare_pretrained
from lading.ranks import Ranks

GB = 1e9
LARGE = Shape(hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=32000)
TINY = Shape(
    hidden=60, intermediate=154, heads=6, kv_heads=2, head_dim=10, vocabulary=1001, layers=3
)
QUANTISED = dict(hidden=512, intermediate=1024, heads=4, kv_heads=2, head_dim=128, vocabulary=1001)
NARROW = Shape(hidden=4096, intermediate=1792, heads=16, kv_heads=4, head_dim=64, vocabulary=1024)
"""At TP 2 its row cuts are runs of 1024 and 1792 bytes, a third of its bytes."""


class Check:
    """One rank."""

    def __init__(self, args: argparse.Namespace) -> None:
        local, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        self.on_gpu = args.device == "cuda"
        self.device = torch.device("cpu")
        if self.on_gpu:
            self.device = torch.device("cuda", local_size - 1 - local if args.swap else local)
            torch.cuda.set_device(self.device)
        # A rank that waits for one that has failed is told so; the making of files takes its time.
        limit = timedelta(seconds=90 + 20 * args.gigabytes)
        if self.on_gpu:
            dist.init_process_group("nccl", device_id=self.device, timeout=limit)
        else:
            dist.init_process_group("gloo", timeout=limit)
        self.gloo = dist.new_group(backend="gloo", timeout=limit)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.ranks = Ranks(tp_rank=self.rank, tp_size=self.size)
        self.folder, self.gigabytes = Path(args.folder), args.gigabytes
        self.shapes = {
            "large": LARGE.of_size(args.gigabytes),
            "gptq": Shape(**{**vars(LARGE), "kind": "gptq"}).of_size(args.gigabytes),
            "narrow": NARROW.of_size(args.gigabytes * 0.4),
            "tiny": TINY,
            "tiny-gptq": Shape(**QUANTISED, kind="gptq", layers=2),
            "tiny-fp8": Shape(**QUANTISED, kind="fp8", layers=2),
        }
        self.plain = (8, max(64, int((args.gigabytes * GB / 8 / 16) ** 0.5) // 64 * 64))

    def prepare(self) -> str:
        """Makes what is missing."""
        began = time.perf_counter()
        if self.rank == 0:
            for name, shape in self.shapes.items():
                make(self.folder / name, shape, self.device, 2 if shape.layers < 4 else 4)
            make_replicated(self.folder / "plain", *self.plain)
        if self.on_gpu:
            torch.cuda.empty_cache()
        self.wait()
        sizes = {name: f"{shape.num_bytes / GB:.3g}" for name, shape in self.shapes.items()}
        machine = torch.cuda.get_device_name() if self.on_gpu else "CPU"
        machine = f"{self.size} x {machine}, torch {torch.__version__}"
        machine += f"; made in {time.perf_counter() - began:.1f} s"
        return f"{machine}; GB: {sizes}, plain {self.plain}"

    # ----------------------------------------------------------------------------------- measuring

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        dist.barrier(group=self.gloo)

    def timed(self, work: Callable[[], Any]) -> float:
        """Until all ranks have done it."""
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    @contextmanager
    def extra_memory(self) -> Iterator[list[float]]:
        """Into the list: the most GPU memory that was allocated besides what is there now, MB."""
        found: list[float] = []
        if not self.on_gpu:
            yield found
            found.append(0.0)
            return
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        found.append((torch.cuda.max_memory_allocated(self.device) - before) / 1e6)

    def everyones(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.gloo)
        return found

    def none_wrong(self, wrong: list[str], what: str) -> None:
        """Raises, on all ranks, what any of them found wrong."""
        told = [
            f"rank {rank}: {one}" for rank, of in enumerate(self.everyones(wrong)) for one in of
        ]
        if told:
            raise ValueError(f"{what}: {len(told)} differ: {', '.join(told[:4])}")

    # --------------------------------------------------------------------------------------- models

    def load(self, name: str, **options: Any) -> tuple[nn.Module, Any]:
        """This rank's model, every bit of it compared."""
        options = {"device": self.device, "ranks": self.ranks, **options}
        model, report = load_pretrained(self.folder / name, **options)
        self.compare(model, name)
        return model, report

    def compare(self, model: nn.Module, name: str, ranks: Ranks | None = None) -> None:
        ranks = ranks or self.ranks
        shape, at = self.shapes[name], (ranks.tp_rank, ranks.tp_size)
        self.none_wrong(differing(model, self.folder / name, shape, *at), f"{name} at {ranks}")

    def on_meta(self, name: str, ranks: Ranks) -> nn.Module:
        return prepare_pretrained(self.folder / name, ranks=ranks).model

    # ---------------------------------------------------------------------------------------- parts

    def export(self) -> str:
        """The large model, in turns with cp."""
        model, _ = self.load("large")
        source, out, copy = (self.folder / name for name in ("large", "out", "copy"))
        took: dict[str, list[float]] = {"cp": [], "export": []}
        extra = 0.0
        for _ in range(3):
            self.remove(copy, out)
            took["cp"].append(self.timed(lambda: self.copy(source, copy)))
            self.remove(copy)
            with self.extra_memory() as memory:
                back = lambda: lading.export(model, out, sync=False)  # noqa: E731
                took["export"].append(self.timed(back))
            extra = max(extra, memory[0])
        self.same_files(source, out)
        self.remove(copy, out)
        size, best = self.shapes["large"].num_bytes, min(took["export"])
        ratios = [one / two for one, two in zip(took["cp"], took["export"], strict=True)]
        spelt = {name: [round(one, 2) for one in every] for name, every in took.items()}
        return (
            f"{best:.2f} s, {size / best / GB:.2f} GB/s, {statistics.median(ratios):.2f} of cp's "
            f"speed {spelt}; extra GPU memory {max(self.everyones(extra)):.0f} MB; files equal"
        )

    def small(self) -> str:
        groups: dict[str, dict[str, Any]] = {"": {}, "gloo": {"group": self.gloo}}
        if self.on_gpu:
            groups["cpu"] = {"device": "cpu"}
        done = []
        for name in ("tiny", "tiny-gptq", "tiny-fp8"):
            for label, options in groups.items():
                for exchange in (None, True):
                    model, _ = self.load(name, **options, exchange=exchange)
                self.there_and_back(model, name, options)
                done.append(f"{name} {label}".strip())
        return f"{', '.join(done)}: loaded, exported, digested, resharded; equal"

    def there_and_back(self, model: nn.Module, name: str, options: dict[str, Any]) -> None:
        out, group = self.folder / "out", options.get("group")
        self.remove(out)
        lading.export(model, out, group=group, sync=False)
        self.same_files(self.folder / name, out)
        live = lading.digest(model, group=group)
        files = lading.digest(self.folder / name)
        self.none_wrong([str(one) for one in files.differences(live)], f"digest of {name}")
        whole, place = self.on_meta(name, Ranks()), options.get("device", self.device)
        lading.reshard(model, whole, group=group, device=place, buffer_bytes=2**20)
        self.compare(whole, name, Ranks())
        cut = self.on_meta(name, self.ranks)
        source = whole if self.rank == 0 else None
        lading.reshard(source, cut, group=group, device=place, buffer_bytes=2**20)
        self.compare(cut, name)

    def reshard(self) -> str:
        """The large model to other numbers of ranks, and back."""
        model, _ = self.load("large")
        told = []
        for _ in range(2):  # the first meets NCCL's channels for the first time
            whole = self.on_meta("large", Ranks())
            with self.extra_memory() as memory:
                joined = self.resharded(model, whole)
            own = sum(tensor.nbytes for tensor in whole.state_dict().values())
            told.append(f"TP {self.size} to 1: {joined}, extra {memory[0] - own / 1e6:.0f} MB")
        self.compare(whole, "large", Ranks())
        del model
        source = whole if self.rank == 0 else None
        for _ in range(2):
            cut = self.on_meta("large", self.ranks)
            told.append(f"TP 1 on rank 0 to {self.size}: {self.resharded(source, cut)}")
        self.compare(cut, "large")
        return "; ".join(told) + "; equal"

    def resharded(self, source: nn.Module | None, target: nn.Module) -> str:
        reports: list[Any] = []
        seconds = self.timed(
            lambda: reports.append(lading.reshard(source, target, device=self.device))
        )
        moved = [one.kept_bytes + one.received_bytes for one in self.everyones(reports[0])]
        over = [one.received_bytes for one in self.everyones(reports[0])]
        return (
            f"{seconds:.3f} s, {sum(moved) / seconds / GB:.1f} GB/s into parameters, "
            f"{sum(over) / GB:.2f} GB of them received, {reports[0].num_rounds} rounds, "
            f"buffers {reports[0].buffer_bytes / 1e6:.0f} MB"
        )

    def digest(self) -> str:
        """Of the large model."""
        model, _ = self.load("large")
        reports: list[Any] = []
        lading.digest(model)
        seconds = self.timed(lambda: reports.append(lading.digest(model)))
        began = time.perf_counter()
        files = lading.digest(self.folder / "large") if self.rank == 0 else None
        spent = time.perf_counter() - began
        found = [str(one) for one in files.differences(reports[0])] if files is not None else []
        self.none_wrong(found, "digest")
        size = self.shapes["large"].num_bytes / GB
        return (
            f"live {seconds:.2f} s, {size / seconds:.1f} GB/s; files {spent:.2f} s, "
            f"{size / spent:.1f} GB/s; equal"
        )

    def exchange(self) -> str:
        """What the ranks read for one another, and whether lading's own choice is the faster."""
        narrow, _ = self.load("narrow")
        plain = plain_model(*self.plain).to_empty(device=self.device)
        cases = {"runs under 2 KiB": ("narrow", narrow), "replicated": ("plain", plain)}
        told = []
        for label, (name, model) in cases.items():
            took: dict[Any, list[float]] = {False: [], True: [], None: []}
            passed: dict[Any, int] = {}
            for turn in range(6):
                for chosen, seconds in took.items():
                    self.zero(model)
                    spent, report = self.timed_load(model, name, chosen)
                    seconds += [spent] if turn else []
                    passed[chosen] = sum(self.everyones(report.exchanged_bytes))
                    if turn == 0:
                        self.none_wrong(self.wrong_of(model, name), f"{name}, exchange={chosen}")
            median = {chosen: statistics.median(seconds) for chosen, seconds in took.items()}
            size = sum(path.stat().st_size for path in (self.folder / name).glob("*.safetensors"))
            spelt = ", ".join(
                f"{chosen} {seconds:.3f} s ({passed[chosen] / 1e6:.0f} MB exchanged)"
                for chosen, seconds in median.items()
            )
            gain = median[False] / median[True]
            right = "right" if (passed[None] > 0) == (gain > 1) else "wrong"
            right = "nothing" if self.size == 1 else f"{right} ({gain:.2f} x by exchanging)"
            told.append(f"{label}, {size / GB:.2f} GB: {spelt}; the automatic choice is {right}")
        return "; ".join(told)

    def timed_load(self, model: nn.Module, name: str, exchange: bool | None) -> tuple[float, Any]:
        reports: list[Any] = []
        seconds = self.timed(lambda: reports.append(self.again(model, name, exchange)))
        return seconds, reports[0]

    def again(self, model: nn.Module, name: str, exchange: bool | None) -> Any:
        return lading.load(model, self.folder / name, ranks=self.ranks, exchange=exchange)

    def zero(self, model: nn.Module) -> None:
        for tensor in model.state_dict().values():
            tensor.detach().view(torch.uint8).zero_()

    def wrong_of(self, model: nn.Module, name: str) -> list[str]:
        if name != "plain":
            return differing(model, self.folder / name, self.shapes[name], self.rank, self.size)
        from safetensors.torch import load_file

        stored = load_file(self.folder / "plain" / "model.safetensors")
        return [key for key, one in model.state_dict().items() if not same_bits(one, stored[key])]

    def gptq(self) -> str:
        """Loads of the large GPTQ checkpoint."""
        model, _ = self.load("gptq")
        took = []
        for _ in range(4):
            self.zero(model)
            seconds, report = self.timed_load(model, "gptq", None)
            took.append(seconds)
        self.compare(model, "gptq")
        origin = origin_of(model)
        assert origin is not None, "it was loaded"
        share = origin.plan.share_bytes(origin.plan.share(self.ranks))
        sums = [
            sum(one)
            for one in zip(
                *self.everyones((report.stats.moved_bytes, share, report.read_bytes)), strict=True
            )
        ]
        seconds, size = statistics.median(took[1:]), self.shapes["gptq"].num_bytes
        return (
            f"{seconds:.3f} s, {size / seconds / GB:.1f} GB/s, moved / shard bytes "
            f"{sums[0] / sums[1]:.4f}, read / checkpoint bytes {sums[2] / size:.4f}; equal"
        )

    def cold(self) -> str:
        """Loads of the large model, beside the disk."""
        model, _ = self.load("large")
        files = sorted((self.folder / "large").glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files)
        took: dict[str, list[float]] = {"direct": [], "load": []}
        disk: dict[str, list[float]] = {"direct": [], "load": []}
        left = 0.0
        works: dict[str, Callable[[], Any]] = {
            "direct": lambda: read_direct(files) if self.rank == 0 else None,
            "load": lambda: self.again(model, "large", None),
        }
        for _ in range(2):
            for name, work in works.items():
                if self.rank == 0:
                    left = max(left, drop(files) / size)
                before = disk_bytes()
                took[name].append(self.timed(work))
                disk[name].append(sum(self.everyones(disk_bytes() - before)) / size)
        self.compare(model, "large")
        ratio = min(took["direct"]) / min(took["load"])
        return (
            f"load {size / min(took['load']) / GB:.2f} GB/s ({took['load']}), plain O_DIRECT "
            f"{size / min(took['direct']) / GB:.2f} GB/s ({took['direct']}), {ratio:.2f} of it; "
            f"disk bytes / checkpoint bytes: load {disk['load']}, direct {disk['direct']}; "
            f"resident before at most {left:.1%}; equal"
        )

    def faults(self) -> str:
        """The same error on all ranks, a model as it was, a group that still works."""
        told = []
        for where in ("all ranks", "the last rank"):
            for when in ("before the header", "after the header"):
                own = where == "all ranks" or self.rank == self.size - 1
                told.append(f"{where}, {when}: {self.fault(own, when)}")
        self.load("tiny")  # the group still works
        return "; ".join(told)

    def fault(self, is_own: bool, when: str) -> str:
        folder = self.folder / f"cut-{self.rank}"
        self.remove()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder / "tiny", folder)
        model = self.on_meta("tiny", self.ranks)
        path: Any = lading.open_checkpoint(folder) if when == "after the header" else folder
        if is_own:
            file = sorted(folder.glob("*.safetensors"))[-1]
            os.truncate(file, file.stat().st_size - 1000)
        self.wait()
        text = "nothing was raised"
        try:
            lading.load(model, path, ranks=self.ranks, device=self.device)
        except lading.LadingError as error:
            text = f"{type(error).__name__}: {error}"
        shutil.rmtree(folder)
        changed = [name for name, tensor in model.state_dict().items() if not tensor.is_meta]
        self.none_wrong(changed, "a load that failed gave memory")
        texts = set(self.everyones(text))
        if len(texts) > 1 or "nothing was raised" in texts:
            raise ValueError(f"the ranks tell other stories: {texts}")
        return " ".join(text.split())[:160]

    def streams(self) -> str:
        """What a side stream writes late is what is exported, digested and sent."""
        if not self.on_gpu:
            return "needs a GPU"
        model, _ = self.load("tiny")
        out, whole = self.folder / "out", self.on_meta("tiny", Ranks())
        before = lading.digest(model)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        works: dict[str, Callable[[], Any]] = {
            "export": lambda: lading.export(model, out, sync=False),
            "digest": lambda: lading.digest(model),
            "reshard": lambda: lading.reshard(model, whole, device=self.device),
            "load": lambda: self.again(model, "tiny", None),
        }
        found: dict[str, Any] = {}
        self.remove(out)
        with torch.cuda.stream(side):
            for name, work in works.items():
                torch.cuda._sleep(2 * 10**9)  # a second or so
                self.zero(model)
                if name != "load":
                    for tensor in model.state_dict().values():
                        tensor.detach().fill_(0.5)
                found[name] = work()
        torch.cuda.synchronize(self.device)
        wrong = [k for k, v in whole.state_dict().items() if not bool((v == 0.5).all())]
        self.none_wrong([k for k in wrong if "embed" not in k and "lm_head" not in k], "reshard")
        self.compare(model, "tiny")
        same = [n for n, v in found["digest"].tensors.items() if v.hex == before.tensors[n].hex]
        self.none_wrong(same, "digest saw the old values")
        late = lading.digest(out).differences(found["digest"]) if self.rank == 0 else ()
        self.none_wrong([str(one) for one in late], "export")
        self.remove(out)
        return "export, digest, reshard and load see what their stream has written; equal"

    # ---------------------------------------------------------------------------------------- files

    def copy(self, source: Path, copy: Path) -> None:
        if self.rank == 0:
            subprocess.run(["cp", "-r", "--reflink=never", source, copy], check=True)

    def remove(self, *folders: Path) -> None:
        self.wait()
        if self.rank == 0:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
        self.wait()

    def same_files(self, one: Path, two: Path) -> None:
        wrong = []
        if self.rank == 0:
            names = sorted({path.name for folder in (one, two) for path in folder.iterdir()})
            with ThreadPoolExecutor() as pool:
                pairs = zip(
                    pool.map(sha256, (one / n for n in names)),
                    pool.map(sha256, (two / n for n in names)),
                    strict=True,
                )
                wrong = [name for name, (a, b) in zip(names, pairs, strict=True) if a != b]
        self.none_wrong(wrong, f"files of {one.name}")


PARTS = ("export", "small", "reshard", "digest", "exchange", "gptq", "cold", "faults", "streams")


def main() -> int:
    """0 where everything is equal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--swap", action="store_true")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    check = Check(parser.parse_args())
    args = parser.parse_args()
    failed = 0
    for name in ("prepare", *args.only):
        began, text, problem = time.perf_counter(), "", None
        try:
            text = getattr(check, name)()
        except Exception:
            problem = "".join(traceback.format_exc().splitlines(keepends=True)[-8:])
        if check.on_gpu:
            torch.cuda.empty_cache()
        problems = [one for one in check.everyones(problem) if one is not None]
        failed += bool(problems)
        if check.rank == 0:
            text = f"FAILED\n{problems[0]}" if problems else text
            print(f"{name}: {text} [{time.perf_counter() - began:.1f} s]", flush=True)
    dist.destroy_process_group()
    if check.rank == 0:
        print(f"{failed} parts failed" if failed else "all well", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
