"""Other loaders, filling the same parameters as lading does: what `lading bench` runs beside it.

Each is called as its own documentation says. The names, cuts and target regions come from lading's
plan; how the bytes come to memory is the peer's own way. A peer that is not installed, does not do
what is asked, or fails, is a sentence, never an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

from lading import dtypes, writing
from lading.checkpoint import Checkpoint
from lading.plan import Plan, Share
from lading.regions import Copy

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["PEERS", "Job", "Peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a peer has to do: the same as lading, on the same rank.

    is_cold   the files are not in the page cache
    """

    checkpoint: Checkpoint
    plan: Plan
    share: Share
    device: torch.device
    group: ProcessGroup | None
    is_cold: bool = False
    _by_file: dict[str, dict[str, list[Copy]]] = field(default_factory=dict)

    @property
    def tp_size(self) -> int:
        """T."""
        return self.share.ranks.tp_size

    def paths(self) -> list[str]:
        """The files that this rank needs something of."""
        return [os.path.join(self.checkpoint.folder, file) for file in self.by_file()]

    def by_file(self) -> Mapping[str, Mapping[str, list[Copy]]]:
        """The rank's copies: by file, then by checkpoint tensor."""
        if not self._by_file:
            for copy in self.share.copies:
                file = self.plan.sources[copy.source].file
                self._by_file.setdefault(file, {}).setdefault(copy.source, []).append(copy)
        return self._by_file

    def memory(self) -> dict[str, torch.Tensor]:
        """New parameters, with their padding filled."""
        import torch

        found = {
            target.name: torch.empty(
                target.layout.local_shape,
                dtype=dtypes.to_torch(target.dtype),
                device=self.device,
            )
            for target in self.plan.targets
            if target.expected is None
        }
        for fill in self.share.fills:
            writing.fill(found[fill.target], fill.region)
        return found


Fill = Callable[[Job], "dict[str, torch.Tensor] | None"]
"""Fills new parameters; None where it makes a model of its own kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A loader.

    package    what has to be installed
    fill       what is timed
    refuses    why it cannot do a job, None where it can
    """

    name: str
    package: str
    fill: Fill
    refuses: Callable[[Job], str | None] = lambda _: None

    def version(self) -> str | None:
        """What is installed, None where nothing is."""
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None

    def problem(self, job: Job) -> str | None:
        """Why it cannot run, None where it can."""
        if self.version() is None:
            return "is not installed"
        if job.checkpoint.format != "safetensors" or job.checkpoint.served_by is not None:
            return "needs a folder of safetensors files"
        return self.refuses(job)


def _place(copies: list[Copy], values: torch.Tensor, memory: Mapping[str, torch.Tensor]) -> None:
    """The regions of a whole checkpoint tensor into parameters: narrow and copy_."""
    for copy in copies:
        part = writing.permuted(writing.view_of(values, copy.source_region), copy)
        writing.write(memory[copy.target], copy.target_region, part)


def _safetensors(job: Job) -> dict[str, torch.Tensor]:
    """The way of most engines: a mapped tensor, narrowed, copy_ into the parameter."""
    from safetensors import safe_open

    memory = job.memory()
    for path, (_, wanted) in zip(job.paths(), job.by_file().items(), strict=True):
        with safe_open(path, "pt") as handle:
            for name, copies in wanted.items():
                _place(copies, handle.get_tensor(name), memory)
    return memory


def _prefetch(job: Job) -> dict[str, torch.Tensor]:
    """safetensors 0.9: the tensors, or rows of them, that are wanted are read ahead by threads."""
    from safetensors import safe_open

    memory = job.memory()
    for path, (_, wanted) in zip(job.paths(), job.by_file().items(), strict=True):
        with safe_open(path, "pt", device=str(job.device)) as handle:
            rows = {name: _rows(copies) for name, copies in wanted.items()}
            loader = handle.prefetch(rows, device=str(job.device))
            for name, copies in wanted.items():
                values = loader.take(name)
                if rows[name] is None:
                    _place(copies, values, memory)
                else:
                    region = copies[0].target_region
                    writing.write(memory[copies[0].target], region, values.reshape(region.size))
            loader.close()
    return memory


def _rows(copies: list[Copy]) -> slice | None:
    """The rows that a tensor's only copy takes whole; None where it needs more than a slice."""
    region = copies[0].source_region
    is_whole = region.size[1:] == region.shape[1:]
    if len(copies) > 1 or copies[0].axes or not region.shape or not is_whole:
        return None
    if region.step[0] != 1 or region.size == region.shape:
        return None
    return slice(region.start[0], region.start[0] + region.size[0])


def _no_prefetch(_job: Job) -> str | None:
    major, minor, *_ = metadata.version("safetensors").split(".")
    if (int(major), int(minor)) < (0, 9):
        return "needs safetensors 0.9 or newer"
    return None


def _streamed(tensors: Iterator[tuple[str, Any]], job: Job) -> dict[str, torch.Tensor]:
    """Loaders that give one whole tensor after another."""
    memory = job.memory()
    wanted = {name: copies for one in job.by_file().values() for name, copies in one.items()}
    for name, values in tensors:
        _place(wanted.get(name, []), values, memory)
    return memory


def _instanttensor(job: Job) -> dict[str, torch.Tensor]:
    package = import_module("instanttensor")
    # Its own choice reads past the page cache, whatever that has.
    backend = None if job.is_cold else package.Backend.MMAP
    options = {"process_group": job.group, "copy": False, "backend": backend}
    files = [os.path.join(job.checkpoint.folder, f) for f in sorted(job.checkpoint.file_bytes)]
    number = job.device.index or 0
    with package.safe_open(files, framework="pt", device=number, **options) as handle:
        return _streamed(handle.tensors(), job)


def _fastsafetensors(job: Job) -> dict[str, torch.Tensor]:
    package = import_module("fastsafetensors")
    loader = package.ParallelLoader(
        pg=package.SingleGroup(),
        hf_weights_files=job.paths(),
        queue_size=0,
        use_tqdm_on_load=False,
        device=str(job.device),
        nogds=True,
    )
    try:
        return _streamed(loader.iterate_weights(), job)
    finally:
        loader.close()


def _transformers(job: Job) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    options = {} if job.device.type == "cpu" else {"device_map": str(job.device)}
    AutoModelForCausalLM.from_pretrained(job.checkpoint.folder, dtype="auto", **options)


def _only_cuda(job: Job) -> str | None:
    return None if job.device.type == "cuda" else "loads to CUDA devices only"


def _only_alone(job: Job) -> str | None:
    return None if job.tp_size == 1 else "is run at TP 1 only"


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(name="safetensors", package="safetensors", fill=_safetensors),
        Peer(name="prefetch", package="safetensors", fill=_prefetch, refuses=_no_prefetch),
        Peer(
            name="instanttensor",
            package="instanttensor",
            fill=_instanttensor,
            refuses=_only_cuda,
        ),
        Peer(name="fastsafetensors", package="fastsafetensors", fill=_fastsafetensors),
        Peer(name="transformers", package="transformers", fill=_transformers, refuses=_only_alone),
    )
}
"""By name, in the order in which they run."""
