"""Digests of a live model: each rank sums the pieces of checkpoint tensors that it holds.

`digest_of_model` puts the sums of all ranks together; `check_digests` compares each rank's regions
with the same regions of the files, and narrows a difference down to one element. Parameters are
only read, and sent nowhere: ranks exchange six numbers for each piece.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lading import dtypes
from lading import ranks as ranks_module
from lading.checkpoint import Checkpoint, Reader, Source
from lading.digesting.files import region_blocks
from lading.digesting.report import DigestReport, sums_by_tensor, value_of
from lading.digesting.tensors import copy_sums, sums_of_tensor
from lading.digests.sums import Sums, sums_of
from lading.errors import CallError, LadingError, PlanError, VerifyError
from lading.exports.live import Live, blocks, live_parameters
from lading.layouts import PartName
from lading.loading import Progress, origin_of
from lading.names import Names
from lading.plan import Plan, make_plan, prove_bindings
from lading.ranks import Ranks, all_ranks
from lading.regions import Copy, Region
from lading.routes import holdings, pieces
from lading.shards.folder import open_any
from lading.targeting import names_of, ranks_of
from lading.verdicts import agreed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DigestCheck", "DigestMismatch", "check_digests", "digest_of_model", "held_by"]

STAGING_BYTES = 2**24
"""Of a block that has another dtype or order in the parameter than in the file."""

Held = dict[tuple[str, int, int], Sums]


def digest_of_model(
    model: nn.Module, ranks: Ranks | None = None, group: ProcessGroup | None = None
) -> DigestReport:
    """The digests of the checkpoint tensors that the ranks' models hold; see `lading.digest`.

    All ranks call it and get the same report. Raises, on all ranks alike, a CallError where a model
    was not filled by `load`, or where the other ranks cannot be asked.
    """
    if not isinstance(model, nn.Module):
        fact = f"is a {type(model).__name__}, needs a path, a Checkpoint or a model"
        raise CallError(fact, subject="digest")
    began = time.perf_counter()
    ranks = ranks or ranks_of(model)
    group = ranks_module.group_of(ranks, group)
    if group is None and ranks.tp_size > 1:
        raise CallError(
            f"{ranks} holds a part of each tensor, and this process is in no process group of that "
            "size, needs the other ranks' sums",
            subject="digest",
            hint="start the ranks with torchrun, or pass group=",
        )
    me = ranks
    held: Mine = agreed(lambda: held_by(model, me), lambda done: done.plan.digest, group)
    everyone = ranks_module.exchange(held.sums, group)
    return combined(held, everyone, began)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mine:
    """What one rank has summed.

    plan      of all ranks
    sources   of the checkpoint that the model was loaded from
    """

    plan: Plan
    sources: Mapping[str, Source]
    sums: Held


def held_by(model: nn.Module, ranks: Ranks) -> Mine:
    """The sums of every piece that this rank holds.

    Raises a CallError for a model that `load` did not fill, a PlanError with every tensor of the
    checkpoint whose dtype does not hold the parameter's values.
    """
    origin = origin_of(model)
    if origin is None:
        raise CallError(
            "was not filled by lading.load (or a load has failed since), needs to know its "
            "checkpoint's tensors",
            subject=type(model).__name__,
            hint="lading.load(model, DIR)",
        )
    live = live_parameters(model, ranks)
    plan = prove_bindings(
        live.targets,
        origin.plan.sources,
        origin.plan.bindings,
        ranks=all_ranks(ranks.tp_size),
        ties=origin.plan.ties,
        skipped=origin.plan.skipped,
    )
    sums: Held = {}
    problems: list[LadingError] = []
    for name in holdings(plan):
        try:
            sums |= _pieces_of(plan, name, live)
        except LadingError as error:
            problems.append(error.located(subject=name))
    if problems:
        raise PlanError(problems, what="the model")
    return Mine(plan=plan, sources=origin.checkpoint.tensors, sums=sums)


def _pieces_of(plan: Plan, name: str, live: Live) -> Held:
    source, found = plan.sources[name], {}
    for number, piece in enumerate(pieces(plan, name)):
        for at, holder in enumerate(piece.holders):
            if holder.ranks == live.ranks:
                found[name, number, at] = _held_sums(source, holder.copy, live)
    return found


def _held_sums(source: Source, copy: Copy, live: Live) -> Sums:
    """Of a copy's source region in the dtype of the file."""
    tensor = live.tensors[copy.target]
    if tensor.dtype == dtypes.to_torch(source.dtype):
        return copy_sums(copy, source.dtype, source.shape, tensor)
    total = Sums()
    for region, data in blocks(tensor, copy, source.dtype, STAGING_BYTES):
        total += sums_of(source.dtype, source.shape, region, data)
    return total


def combined(mine: Mine, everyone: list[Held], began: float) -> DigestReport:
    """The report from what all ranks have summed."""
    plan, sources = mine.plan, mine.sources
    held = {key: sums for one in everyone for key, sums in one.items()}
    totals, replicas = sums_by_tensor(plan, held)
    for tie in plan.ties:
        if tie.source in totals:
            totals[tie.twin] = totals[tie.source]
    left_out = {s.source: s.reason for s in plan.skipped}
    for check in plan.checks():
        left_out[check.source] = "follows from the declaration, no rank keeps it"
    values = {name: value_of(sources[name], totals[name]) for name in sources if name in totals}
    return DigestReport(
        kind="model",
        tensors=values,
        replicas=replicas,
        left_out={name: left_out[name] for name in sources if name in left_out},
        num_bytes=sum(sources[name].num_bytes for name in values),
        seconds=time.perf_counter() - began,
    )


# ---------------------------------------------------------------------------- against the files


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestMismatch:
    """A region of a checkpoint tensor that a rank does not hold as the file has it.

    region   all that the rank's parameter has of the tensor, in the tensor's coordinates
    element  one element in it that differs, found by halving the region
    """

    tp_rank: int
    tensor: str
    file: str
    parameter: str
    part: PartName
    region: str
    element: str

    @property
    def fact(self) -> str:
        """What is wrong, without whose fault."""
        return (
            f"region {self.region} of checkpoint tensor {self.tensor!r} has another digest than in "
            f"the file, needs the same (element {self.element} differs)"
        )

    def error(self) -> VerifyError:
        """The mismatch as an error that names the rank."""
        error = VerifyError(self.fact, subject=self.parameter, part=self.part, file=self.file)
        error.rank = self.tp_rank
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestCheck:
    """What one rank compared: the regions of checkpoint tensors that it holds, each by its digest.

    num_bytes    of these regions, in the parameters' dtypes
    mismatches   all of them, in the order of the parameters
    """

    tp_rank: int
    num_regions: int
    num_bytes: int
    mismatches: tuple[DigestMismatch, ...]


def check_digests(
    model: nn.Module,
    path: str | os.PathLike[str] | Checkpoint,
    ranks: Ranks | None = None,
    *,
    names: Names | None = None,
    progress: Progress | None = None,
) -> DigestCheck:
    """Compares each region that a rank's model holds with the files, digest by digest.

    path    a checkpoint, or a pre-sharded folder
    names   naming rules; by default the model's, as for `lading.load`
    Where a parameter has another dtype than its tensor, the file's values are cast as a load casts
    them. Raises a PlanError where the files are not a checkpoint of this model.
    """
    ranks = ranks or ranks_of(model)
    checkpoint = path if isinstance(path, Checkpoint) else open_any(path)
    live = live_parameters(model, ranks)
    plan = make_plan(
        live.targets,
        checkpoint.tensors,
        ranks=[ranks],
        names=(names or names_of(model)).fitting(checkpoint.tensors),
    )
    copies = [copy for copy in plan.share(ranks).copies if copy.source_region.num_elements]
    found, num_bytes = [], 0
    if progress is not None:
        progress.start(sum(_num_bytes(copy, live) for copy in copies))
    try:
        with checkpoint.reader() as reader:
            for copy in copies:
                pair = _Pair(reader=reader, source=plan.sources[copy.source], live=live)
                if pair.differs(copy):
                    found.append(_mismatch(pair, copy, ranks))
                num_bytes += _num_bytes(copy, live)
                if progress is not None:
                    progress.advance(_num_bytes(copy, live))
    finally:
        if progress is not None:
            progress.finish()
    return DigestCheck(
        tp_rank=ranks.tp_rank,
        num_regions=len(copies),
        num_bytes=num_bytes,
        mismatches=tuple(found),
    )


def _num_bytes(copy: Copy, live: Live) -> int:
    return copy.source_region.num_elements * live.tensors[copy.target].element_size()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A checkpoint tensor in its file, and in a rank's parameter."""

    reader: Reader
    source: Source
    live: Live

    def differs(self, copy: Copy) -> bool:
        """Whether the copy's two ends have other digests, in the parameter's dtype."""
        tensor = self.live.tensors[copy.target]
        dtype = self._dtype(tensor)
        held = copy_sums(copy, dtype, self.source.shape, tensor)
        total = Sums()
        for region, data in region_blocks(self.reader, self.source, copy.source_region):
            total += self._file_sums(dtype, region, data, tensor.dtype)
        return held != total

    def _dtype(self, tensor: torch.Tensor) -> str:
        if tensor.dtype == dtypes.to_torch(self.source.dtype):
            return self.source.dtype
        return dtypes.from_torch(tensor.dtype)

    def _file_sums(self, dtype: str, region: Region, data: Any, into: torch.dtype) -> Sums:
        if dtype == self.source.dtype:
            return sums_of(dtype, self.source.shape, region, data)
        whole = torch.from_numpy(np.array(data).view(f"i{data.itemsize}"))
        values = whole.view(dtypes.to_torch(self.source.dtype)).to(into)
        return sums_of_tensor(dtype, self.source.shape, region, values)


def _mismatch(pair: _Pair, copy: Copy, ranks: Ranks) -> DigestMismatch:
    box = copy
    while box.source_region.num_elements > 1:
        first, second = _halves(box)
        box = first if pair.differs(first) else second
    return DigestMismatch(
        tp_rank=ranks.tp_rank,
        tensor=copy.source,
        file=pair.source.file,
        parameter=copy.target,
        part=copy.part,
        region=str(copy.source_region),
        element=str(list(box.source_region.start)),
    )


def _halves(copy: Copy) -> tuple[Copy, Copy]:
    """The copy in two, along its source's first dim that has more than one index."""
    region = copy.source_region
    dim = next(d for d, size in enumerate(region.size) if size > 1)
    half = region.size[dim] // 2
    return _part(copy, dim, 0, half), _part(copy, dim, half, region.size[dim])


def _part(copy: Copy, dim: int, low: int, high: int) -> Copy:
    inner = Region.whole(copy.source_region.size)
    spans = [(0, n) for n in inner.size]
    spans[dim] = low, high
    box = copy.source_region.compose(Region.box(inner.size, spans))
    found = copy.invert().restrict(box)
    assert found is not None, "a part of the region is in it"
    return found.invert()
