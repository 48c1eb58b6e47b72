"""The verb `dequantize`: a quantised checkpoint, loaded on N ranks, as one file of float32 weights.

(The file is not named so: `lading.dequantize` is the function.) Every rank decodes what it holds
and writes it into its place in the file; no rank holds a full tensor of several ranks. Names are
the checkpoint's own: a layer that is fused on disk is one tensor, others are one for each part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from lading import ranks as ranks_module
from lading.checkpoint import FileWriter, check_output, encode_header
from lading.errors import CallError
from lading.gguf import gguf_file, gguf_weights
from lading.layouts import Layout, PartName
from lading.loading import PathLike
from lading.names import Names
from lading.nn import ParallelLayer
from lading.pretrained import load_pretrained
from lading.ranks import Ranks
from lading.regions import Region
from lading.schemes import quantization_of
from lading.shards.folder import open_any
from lading.specs import dense_specs
from lading.verdicts import agreed

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from lading.loading import Progress

__all__ = ["Decoded", "decoded_weights", "dequantize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What this rank holds of one weight of the checkpoint, and how to decode it.

    name     in the checkpoint, "model.layers.0.mlp.down_proj.weight"
    region   where it lies in the full weight [O, I]
    values   decodes it: float32, of the region's size
    """

    name: str
    region: Region
    values: Callable[[], torch.Tensor]


def decoded_weights(
    model: nn.Module,
    names: Names,
    ranks: Ranks,
    *,
    dense: bool = False,
    stored: Collection[str] = (),
) -> Iterator[tuple[Decoded, bool]]:
    """Each part of each quantised layer that this rank holds, and whether it is the first to.

    dense   also layers that are not quantised
    stored  the names of the checkpoint's tensors: those layers may be fused on disk, too
    Neighbouring ranks may hold the same piece; the first of them is its owner.
    """
    seen: set[int] = set()
    for prefix, layer in model.named_modules():
        if not isinstance(layer, ParallelLayer) or (layer.quant is None and not dense):
            continue
        weight = layer._parameters.get("weight")
        if weight is not None and id(weight) in seen:
            continue  # tied: the checkpoint has it under its first name
        seen.add(id(weight))
        layout = layer.layer.layout(dense_specs(bias=False)[0], ranks.tp_size)
        fused = layer.quant is not None and layer.quant.fused
        if layer.quant is None and len(layout.part_names) > 1:
            fused = names.whole(f"{prefix}.weight") in stored
        for part, name in _stored_names(layout, names, f"{prefix}.weight", fused):
            place = layout.place(part, ranks.tp_rank, fused_source=fused)
            if place is None:
                continue
            owner = all(
                (other := layout.place(part, rank, fused_source=fused)) is None
                or other.source != place.source
                for rank in range(ranks.tp_rank)
            )
            values = partial(layer.dequantized_part, part)
            yield Decoded(name=name, region=place.source, values=values), owner


def _stored_names(
    layout: Layout, names: Names, target: str, fused: bool
) -> list[tuple[PartName, str]]:
    parts = layout.part_names
    stored = names.parts(target, len(parts)) if len(parts) > 1 and not fused else None
    if stored is None:
        return [(part, names.whole(target)) for part in parts]
    return list(zip(parts, stored, strict=True))


def dequantize(
    path: PathLike,
    out: str | os.PathLike[str],
    *,
    ranks: Ranks | None = None,
    group: ProcessGroup | None = None,
    device: torch.device | str | None = None,
    dense: bool = False,
    straddle: str = "duplicate",
    progress: Progress | None = None,
) -> int:
    """Writes float32 weights of a checkpoint's quantised layers into one safetensors file.

    out     the file; it appears when it is complete
    ranks   this process's rank; every rank of the group calls this, and all see the same file
            system
    dense   also the weights of layers that are not quantised
    straddle   as of `from_pretrained`
    A GGUF file gives all its matrices, under its own names and in its own order of rows.
    Gives the number of tensors. Raises what a load raises, the same on all ranks, and a CallError
    where the checkpoint has nothing to decode.
    """
    ranks = ranks or ranks_module.current()
    if ranks.tp_size > 1 and ranks_module.group_of(ranks, group) is None:
        raise CallError(
            f"is called as {ranks} by a process that is in no group of that size, needs all "
            "ranks (each writes its own share of the file)",
            subject="dequantize",
            hint="lading dequantize --tp, or torchrun",
        )
    group = ranks_module.group_of(ranks, group)
    gguf = gguf_file(path)
    agreed(lambda: _check(path, gguf, out, dense=dense), _nothing, group)
    if gguf is not None:
        weights = agreed(lambda: list(gguf_weights(gguf, ranks)), len, group)
        mine = [(Decoded(name=w.name, region=w.region, values=w.values), w.owner) for w in weights]
        return write_decoded(mine, out, ranks=ranks, group=group)
    model, _ = load_pretrained(
        path, ranks=ranks, group=group, device=device, straddle=straddle, progress=progress
    )
    stored = agreed(lambda: open_any(path).tensors.keys(), sorted, group) if dense else ()
    mine = list(decoded_weights(model, model.names, ranks, dense=dense, stored=stored))
    return write_decoded(mine, out, ranks=ranks, group=group)


def write_decoded(
    mine: list[tuple[Decoded, bool]],
    out: str | os.PathLike[str],
    *,
    ranks: Ranks,
    group: ProcessGroup | None,
) -> int:
    """Writes what all ranks hold into one file, each piece by its owner; the number of tensors."""
    shapes = agreed(lambda: _full_shapes(mine, group), lambda found: sorted(found.items()), group)
    header = encode_header([(name, "F32", shape) for name, shape in shapes.items()], {})
    starts, end = {}, len(header)
    for name, shape in shapes.items():
        starts[name] = end
        end += 4 * shape[0] * shape[1]
    temporary = f"{os.fspath(out)}.partial"
    try:
        agreed(lambda: _create(temporary, header, end, ranks), _nothing, group)
        agreed(lambda: _write(temporary, mine, starts), _nothing, group)
        agreed(lambda: _finish(temporary, out, ranks), _nothing, group)
    except BaseException:
        if ranks.tp_rank == 0:
            FileWriter.discard(temporary)
        raise
    return len(shapes)


def _check(path: PathLike, gguf: str | None, out: str | os.PathLike[str], *, dense: bool) -> None:
    """What can be known to fail before anything is loaded."""
    if gguf is not None:
        check_output(os.fspath(out), inputs=[gguf])
        return
    checkpoint = open_any(path)
    inputs = [os.path.join(checkpoint.folder, file) for file in checkpoint.file_bytes]
    check_output(os.fspath(out), inputs=inputs)
    if not dense and quantization_of(checkpoint) is None:
        raise CallError(
            "has no quantised layer, needs one (its weights are stored as they are)",
            subject=os.fspath(path),
            hint="dense=True (--all): the weights as they are, in float32",
        )


def _nothing(_done: None) -> None:
    """No facts to compare."""


def _full_shapes(
    mine: list[tuple[Decoded, bool]], group: ProcessGroup | None
) -> dict[str, tuple[int, int]]:
    """The full shape of every weight that some rank holds, in name order."""
    found: dict[str, tuple[int, int]] = {}
    for everyones in ranks_module.exchange([(d.name, d.region.shape) for d, _ in mine], group):
        found.update(everyones)
    if not found:
        raise CallError(
            "has no quantised layer, needs one (its weights are stored as they are)",
            subject="dequantize",
        )
    return dict(sorted(found.items()))


def _create(temporary: str, header: bytes, num_bytes: int, ranks: Ranks) -> None:
    if ranks.tp_rank == 0:
        with FileWriter.create(temporary, num_bytes) as file:
            file.write(0, header)


def _write(temporary: str, mine: list[tuple[Decoded, bool]], starts: dict[str, int]) -> None:
    with FileWriter(temporary) as file:
        for decoded, is_owner in mine:
            if not is_owner:
                continue
            values = decoded.values().cpu().contiguous()
            bytes_of = memoryview(values.numpy()).cast("B")  # type: ignore[arg-type]
            runs = decoded.region.runs()
            length = runs.length * 4
            for number, first in enumerate(runs.offsets()):
                at = number * length
                file.write(starts[decoded.name] + first * 4, bytes_of[at : at + length])


def _finish(temporary: str, out: str | os.PathLike[str], ranks: Ranks) -> None:
    if ranks.tp_rank == 0:
        FileWriter.publish(temporary, os.fspath(out))
