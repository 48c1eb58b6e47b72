"""The matrices of a GGUF file, cut for a rank and decoded: rows for a column cut, blocks of columns
for a row cut. The format itself is `lading.schemes.gguf`'s; here its bytes are read.

Letters: O = rows, I = columns.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from lading.checkpoint.files import ByteReader, file_size, list_folder
from lading.errors import DtypeError, FileError, HeaderError, LadingError, PlanError
from lading.layers import Layer
from lading.ranks import Ranks
from lading.regions import Region
from lading.schemes.gguf import DECODED, decode_blocks
from lading.schemes.gguf_header import GgufHeader, GgufTensor, parse_gguf
from lading.specs import Along, Dim, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["GgufPiece", "gguf_file", "gguf_weights", "read_gguf"]

HEADER_BYTES = 2**24
"""So much is read for the header first (a vocabulary is in it), then four times as much, ..."""

ROW_PARALLEL = ("attn_output", "ffn_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPiece:
    """What a rank holds of one matrix.

    region   where it lies in the full matrix [O, I]
    owner    whether this rank is the first to hold it: always, since all matrices are cut
    """

    path: str
    tensor: GgufTensor
    region: Region
    owner: bool

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.tensor.name

    def values(self) -> torch.Tensor:
        """float32 of the region's size: its rows are read whole, and only its blocks decoded."""
        import torch

        kind, width = self.tensor.kind, self.tensor.row_bytes
        (row, left), (rows, columns) = self.region.start, self.region.size
        data = torch.empty(rows, width, dtype=torch.uint8)
        folder, file = os.path.split(os.path.abspath(self.path))
        size = file_size(Path(self.path))
        with ByteReader(folder, {file: size or 0}) as reader:
            buffer = memoryview(data.numpy()).cast("B")  # type: ignore[arg-type]  # has a buffer
            reader.read_into(file, self.tensor.start + row * width, buffer)
        first, last = (at // kind.block * kind.block_bytes for at in (left, left + columns))
        return decode_blocks(kind.name, data[:, first:last].contiguous())


def gguf_file(path: str | os.PathLike[str]) -> str | None:
    """The GGUF file that a path means: itself, or the only weights of a folder."""
    name = os.fspath(path)
    if name.endswith(".gguf"):
        return name
    if not os.path.isdir(name):
        return None
    found = list_folder(Path(name))
    files = [file for file in found if file.endswith(".gguf")]
    others = [file for file in found if file in ("model.safetensors", "pytorch_model.bin")]
    others += [file for file in found if file.endswith(".index.json")]
    return os.path.join(name, files[0]) if len(files) == 1 and not others else None


def read_gguf(path: str) -> GgufHeader:
    """The checked header of a file. Raises a FileError or a HeaderError."""
    folder, file = os.path.split(os.path.abspath(path))
    size = file_size(Path(path))
    if size is None:
        raise FileError("does not exist", subject=path)
    taken = HEADER_BYTES
    with ByteReader(folder, {file: size}) as reader:
        while True:
            raw = bytearray(min(taken, size))
            reader.read_into(file, 0, memoryview(raw))
            try:
                return parse_gguf(memoryview(raw), size)
            except HeaderError as error:
                if taken >= size or taken > 2**30:
                    raise error.located(file=file) from None
            taken *= 4


def gguf_weights(path: str, ranks: Ranks) -> Iterator[GgufPiece]:
    """This rank's piece of every matrix; vectors are left out.

    Raises a PlanError with every matrix whose blocks a cut goes through, or of an unknown kind.
    """
    problems: list[LadingError] = []
    pieces = []
    for tensor in read_gguf(path).tensors.values():
        if len(tensor.shape) != 2:
            continue
        try:
            pieces.append(_piece(path, tensor, ranks))
        except LadingError as error:
            problems.append(error.located(subject=tensor.name, file=os.path.basename(path)))
    if problems:
        raise PlanError(problems, what=f"TP {ranks.tp_size}")
    yield from pieces


def _piece(path: str, tensor: GgufTensor, ranks: Ranks) -> GgufPiece:
    if tensor.kind.name not in DECODED:
        raise DtypeError(f"is {tensor.kind.name}, needs one of: {', '.join(DECODED)}")
    rows, columns = tensor.shape
    is_row = any(f".{name}." in tensor.name for name in ROW_PARALLEL)
    layer = Layer.row(columns, rows) if is_row else Layer.column(columns, [rows])
    reason = f"{tensor.kind.name} packs {tensor.kind.block} columns into one block"
    blocks = Dim(along=Along.INPUT, grain=Fraction(tensor.kind.block), reason=reason)
    spec = TensorSpec(name="blocks", dims=(Dim(along=Along.OUTPUT), blocks))
    layout = layer.layout(spec, ranks.tp_size)
    place = layout.place(None, ranks.tp_rank)
    assert place is not None, "nothing is padded"
    block = tensor.kind.block
    (row, left), (num_rows, num_blocks) = place.source.start, place.source.size
    spans = [(row, row + num_rows), (left * block, (left + num_blocks) * block)]
    return GgufPiece(path=path, tensor=tensor, region=Region.box(tensor.shape, spans), owner=True)
