"""The verb `export` (the file is not named so: `lading.export` is the function): the parameters of
a tensor-parallel model as a Hugging Face checkpoint, all or nothing.

It reads a plan from its targets to its sources. Which bytes of which file a rank writes follows
from the plan of all ranks, so every rank knows it without asking: fused parameters come apart,
pieces come together, padding stays behind. Copies that several ranks hold are compared by digests
first; the rank with the least to do so far writes them. Every stage ends with one exchange of
verdicts; the folder gets its name when all ranks agree that it is complete.

Letters: S = a checkpoint tensor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lading import ranks as ranks_module
from lading.checkpoint import Checkpoint, OutputFolder, check_output_folder
from lading.errors import CallError
from lading.exports.filling import Filling
from lading.exports.live import Live, live_parameters
from lading.exports.plan import ExportPlan, plan_export
from lading.exports.replicas import Digests, check_replicas, digests_of, has_padding_values
from lading.loading import PathLike, Progress, origin_of
from lading.ranks import Ranks
from lading.targeting import ranks_of
from lading.verdicts import agreed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ExportReport", "export"]

DEFAULT_MAX_FILE_BYTES = 5 * 10**9
"""What `save_pretrained` of transformers takes for the size of a file."""

DEFAULT_STAGING_BYTES = 64 * 2**20
"""Copied at a time, by all threads together, of parameters whose memory is not that of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What an export did. The same on all ranks but for `ranks` and `written_bytes`.

    path               the folder
    files              of weights
    num_bytes          of those files
    written_bytes      by this process
    num_tensors        in the files
    copied             small files that came along, byte for byte
    casts              (parameter, its dtype, the file's) where they differ; no value was lost
    padding            parameters whose padding is not zero: it was left behind
    notes              what is not as in the checkpoint that the model was loaded from
    seconds            wall time until the folder was there
    """

    ranks: Ranks
    path: str
    files: tuple[str, ...]
    num_bytes: int
    written_bytes: int
    num_tensors: int
    copied: tuple[str, ...]
    casts: tuple[tuple[str, str, str], ...]
    padding: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        giga, rate = self.num_bytes / 1e9, self.num_bytes / 1e9 / self.seconds
        return f"{giga:.3g} GB in {self.seconds:.3g} s, {rate:.3g} GB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller of `export` chose."""

    path: PathLike
    source: PathLike | Checkpoint | None
    as_new: bool
    overwrite: bool
    max_file_bytes: int
    staging_bytes: int
    sync: bool


def export(
    model: nn.Module,
    path: PathLike,
    *,
    ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
    source: PathLike | Checkpoint | None = None,
    as_new: bool = False,
    overwrite: bool = False,
    max_file_bytes: int = DEFAULT_MAX_FILE_BYTES,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    sync: bool = True,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes a model's parameters into a folder, as the checkpoint that they were loaded from.

    Every rank of the group calls it, and all see the same file system. A model that `load` or
    `from_pretrained` filled is written as it came: the same files, names, order, dtypes and
    headers, so that files of a model that did not change are equal byte for byte; config.json, the
    tokenizer and other small files are copied. Any other model is written under the names of its
    naming rules, tied weights once.

    path       a folder that is not there yet, or is empty; its parent is there
    ranks      this process's rank: by default the one that the model's layers were built for
    group      of all ranks; the default group where it is this rank's
    source     the checkpoint whose form the files take, where it is not the one loaded from
    as_new     takes nothing from any checkpoint: new names, new files, dtypes of the parameters
    overwrite  a checkpoint that is at `path` is replaced, when the new one is complete; never the
               one that the model was loaded from
    max_file_bytes   of one file, where no checkpoint says how tensors are split
    staging_bytes    of host memory that the copying takes, besides what the model has
    sync       wait until the disk has the bytes, so that also a power cut leaves all or nothing

    Raises, the same on all ranks and with `path` as it was before: a ConflictError that names both
    ranks where copies of the same elements differ; a DtypeError where the file's dtype does not
    hold a value; a NotLoadedError or PlanError where the model has no stored form; a FileError.

    Example: Llama of 2 files on 4 ranks, `lading.export(model, "out")` on each: out/ has the 2
    files, each rank wrote a quarter of their bytes.
    """
    ranks = ranks or ranks_of(model)
    if ranks.tp_size > 1 and ranks_module.group_of(ranks, group) is None:
        raise CallError(
            f"is called as {ranks} by a process that is in no group of that size, needs all ranks "
            "(each writes its own share of the files)",
            subject="export",
            hint="start the ranks with torchrun",
        )
    options = Options(
        path=path,
        source=source,
        as_new=as_new,
        overwrite=overwrite,
        max_file_bytes=max_file_bytes,
        staging_bytes=staging_bytes,
        sync=sync,
    )
    group = ranks_module.group_of(ranks, group)
    return export_models({ranks: model}, options, group=group, progress=progress)[0]


def export_models(
    models: Mapping[Ranks, nn.Module],
    options: Options,
    *,
    group: ProcessGroup | None = None,
    progress: Progress | None = None,
) -> list[ExportReport]:
    """`export` of one rank in each process of the group; or, without one, of all ranks in this."""
    began = time.perf_counter()
    first, path = next(iter(models)), os.path.realpath(options.path)
    assert group is not None or len(models) == first.tp_size, "all ranks are here, or in the group"

    def prepare() -> _Work:
        _check_options(options)
        lives = {ranks: live_parameters(model, ranks) for ranks, model in models.items()}
        return _prepare(models[first], lives, options)

    with torch.inference_mode(False), torch.no_grad():
        work = agreed(prepare, lambda done: (done.plan.digest, path, options.overwrite), group)
        found = agreed(work.compare, _no_facts, group)
        everyones = ranks_module.exchange(found, group)
        digests = [of_rank for of_rank, _ in everyones]
        agreed(lambda: check_replicas(work.plan.plan, digests), _no_facts, group)
        padding = sorted({name for _, names in everyones for name in names})
        written = _write(work, group, options, progress, is_maker=first.tp_rank == 0)
    seconds = time.perf_counter() - began
    return [_report(ranks, work.plan, path, written, tuple(padding), seconds) for ranks in models]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What this process does: its ranks' shares of the plan.

    place, num_processes   which of how many; what belongs to no rank is shared out among them
    """

    plan: ExportPlan
    lives: Mapping[Ranks, Live]
    place: int
    num_processes: int

    def compare(self) -> tuple[Digests, list[str]]:
        """The digests of what other ranks hold too; names of parameters with values in padding."""
        names = []
        for ranks, live in self.lives.items():
            names += has_padding_values(self.plan.plan.share(ranks), live.tensors)
        return digests_of(self.plan.plan, self.lives), names


def _no_facts(_done: object) -> None:
    """Nothing of it has to be equal on all ranks."""


def _check_options(options: Options) -> None:
    for name, value in (
        ("staging_bytes", options.staging_bytes),
        ("max_file_bytes", options.max_file_bytes),
    ):
        if value < 1:
            raise CallError(f"{name} is {value}, needs at least 1", subject="export")
    if options.as_new and options.source is not None:
        raise CallError(
            "is given together with as_new=True, which takes nothing from it; needs one of them",
            subject="export, source",
        )


def _prepare(model: nn.Module, lives: Mapping[Ranks, Live], options: Options) -> _Work:
    live = next(iter(lives.values()))
    plan = plan_export(
        model,
        live,
        origin=None if options.as_new else origin_of(model),
        source=options.source,
        max_file_bytes=options.max_file_bytes,
    )
    origin = origin_of(model)
    read = [plan.checkpoint, None if origin is None else origin.checkpoint]
    inputs = [path for checkpoint in read if checkpoint is not None for path in checkpoint.inputs]
    check_output_folder(
        options.path,
        overwrite=options.overwrite,
        inputs=inputs,
        needed_bytes=plan.outline.num_bytes,
    )
    everyone = plan.plan.tp_size
    is_alone = len(lives) == everyone
    return _Work(
        plan=plan,
        lives=lives,
        place=0 if is_alone else live.ranks.tp_rank,
        num_processes=1 if is_alone else everyone,
    )


def _write(
    work: _Work,
    group: ProcessGroup | None,
    options: Options,
    progress: Progress | None,
    *,
    is_maker: bool,
) -> int:
    """Fills the folder and publishes it; the bytes that this process wrote."""
    folder: OutputFolder | None = None
    outline = work.plan.outline

    def create() -> OutputFolder | None:
        nonlocal folder
        if not is_maker:
            return None
        folder = OutputFolder.create(options.path, overwrite=options.overwrite)
        for file in outline.files:
            folder.create_file(file.name, file.num_bytes, file.head)
        for path, name in outline.copied:
            folder.copy(path, name)
        for name, data in outline.written.items():
            folder.write(name, data)
        return folder

    def finish() -> None:
        assert folder is not None, "it was made, or joined"
        if options.sync:
            names = [file.name for file in outline.files]
            small = [name for _, name in outline.copied] + list(outline.written)
            folder.sync(names[work.place :: work.num_processes])
            folder.sync(small if is_maker else [])

    def publish() -> None:
        if is_maker:
            assert folder is not None, "its maker made it"
            folder.publish()

    try:
        agreed(create, _no_facts, group)
        temporaries = ranks_module.exchange(folder.temporary if folder else None, group)
        if folder is None:
            (temporary,) = (found for found in temporaries if found is not None)
            folder = OutputFolder.join(options.path, temporary)
        filled = folder
        filling = Filling(
            plan=work.plan,
            lives=work.lives,
            place=work.place,
            num_processes=work.num_processes,
            staging_bytes=options.staging_bytes,
            num_local=ranks_module.num_local(group),
        )
        written: int = agreed(lambda: filling.run(filled, progress), _no_facts, group)
        agreed(finish, _no_facts, group)
        agreed(publish, _no_facts, group)
    except BaseException:
        if folder is not None:
            folder.discard()
        raise
    return written


def _report(
    ranks: Ranks,
    plan: ExportPlan,
    path: str,
    written: int,
    padding: tuple[str, ...],
    seconds: float,
) -> ExportReport:
    outline = plan.outline
    return ExportReport(
        ranks=ranks,
        path=path,
        files=tuple(file.name for file in outline.files),
        num_bytes=outline.num_bytes,
        written_bytes=written,
        num_tensors=len(outline.places),
        copied=tuple(name for _, name in outline.copied),
        casts=tuple((name, have, stored) for name, stored, have in plan.plan.casts()),
        padding=padding,
        notes=outline.notes,
        seconds=max(seconds, 1e-9),
    )
