"""What a checkpoint holds: values that a plan is made from, and the readers that serve their bytes.

No file is opened before `Checkpoint.reader()` is asked for bytes. Offsets of a `Source` count bytes
from the beginning of its file; offsets given to a reader count from the beginning of the tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Protocol

from lading.checkpoint.files import ByteReader, Stamp
from lading.checkpoint.header import Header, Row, TensorInfo, storage_shape
from lading.records import quick

__all__ = ["Checkpoint", "Reader", "SafetensorsReader", "Source"]


@quick
@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One tensor of a checkpoint.

    name           as the checkpoint spells it
    dtype          by its safetensors name, "BF16"
    shape          in elements of the dtype; F4 counts single values (see `storage_shape`)
    file           relative to the folder, with forward slashes
    offset_bytes   where its bytes begin in the file; 0 in torch files, where the name finds them
    num_bytes      how many it has, in row-major order without gaps
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset_bytes: int
    num_bytes: int

    @property
    def storage_shape(self) -> tuple[int, ...]:
        """The shape of the torch tensor that holds it: F4 [O, I] -> [O, I / 2], others as is."""
        return storage_shape(self.dtype, self.shape)


def sources_of(header: Header, file: str) -> dict[str, Source]:
    """The tensors of a safetensors file, by name, in the order of its bytes."""
    return {name: source_of(name, info, file) for name, info in header.tensors.items()}


def source_of(name: str, info: TensorInfo, file: str) -> Source:
    """One tensor of a safetensors file: its name there, and its entry in the header."""
    return Source(
        name=name,
        dtype=info.dtype,
        shape=info.shape,
        file=file,
        offset_bytes=info.start,
        num_bytes=info.num_bytes,
    )


def sources_in(rows: Iterable[Row], file: str) -> dict[str, Source]:
    """The same from the rows of a header that nobody needs otherwise."""
    return {
        name: Source(
            name=name,
            dtype=dtype,
            shape=shape,
            file=file,
            offset_bytes=start,
            num_bytes=stop - start,
        )
        for name, dtype, shape, start, stop in rows
    }


class Reader(Protocol):
    """Bytes of sources; usable from several threads, closed after the last read has returned."""

    @property
    def bytes_read(self) -> int:
        """How many bytes were delivered so far."""

    def read_into(self, source: Source, offset_bytes: int, buffer: memoryview) -> None:
        """Fills `buffer` from byte `offset_bytes` of the tensor on. Raises FileError."""

    @property
    def files(self) -> ByteReader | None:
        """The files themselves, where a tensor's bytes lie at its own offset; None elsewhere."""

    def close(self) -> None: ...

    def __enter__(self) -> Reader: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Server(Protocol):
    """Has the tensors' bytes where they are not in files of their own."""

    def reader(self) -> Reader:
        """A reader of the tensors' bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What is on disk, checked: every tensor is whole, in one file, and where the index says.

    folder       absolute
    tensors      by name; in the order of the files, then of the bytes in each file
    file_bytes   the size of each file that has tensors
    metadata     the `__metadata__` of each file; empty for torch files
    config       config.json, None where there is none
    stamps       of safetensors files: one that has got another header since is not read
    served_by    what has the bytes where `folder` has other files than these: a pre-sharded folder
    """

    folder: str
    tensors: Mapping[str, Source]
    file_bytes: Mapping[str, int]
    metadata: Mapping[str, Mapping[str, str]]
    config: Mapping[str, Any] | None
    format: Literal["safetensors", "torch"]
    stamps: Mapping[str, Stamp] = field(default_factory=dict, compare=False, repr=False)
    served_by: Server | None = field(default=None, compare=False)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The folder, and the files in it that have tensors: what no verb may write over."""
        files = () if self.served_by is not None else self.file_bytes
        return self.folder, *(os.path.join(self.folder, *name.split("/")) for name in files)

    def reader(self) -> Reader:
        """A reader of the tensors' bytes: `with checkpoint.reader() as reader: ...`."""
        if self.served_by is not None:
            return self.served_by.reader()
        if self.format == "safetensors":
            return SafetensorsReader(self.folder, self.file_bytes, self.stamps)
        from lading.checkpoint.torch_files import TorchReader

        return TorchReader(self.folder, self.file_bytes)


class SafetensorsReader:
    """A Reader of safetensors files."""

    def __init__(
        self, folder: str, file_bytes: Mapping[str, int], stamps: Mapping[str, Stamp] | None = None
    ) -> None:
        self._bytes = ByteReader(folder, file_bytes, stamps)

    @property
    def bytes_read(self) -> int:
        return self._bytes.bytes_read

    @property
    def files(self) -> ByteReader:
        return self._bytes

    def read_into(self, source: Source, offset_bytes: int, buffer: memoryview) -> None:
        check_range(source, offset_bytes, buffer)
        self._bytes.read_into(source.file, source.offset_bytes + offset_bytes, buffer)

    def close(self) -> None:
        self._bytes.close()

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_range(source: Source, offset_bytes: int, buffer: memoryview) -> None:
    """No plan reads past its tensor, where the bytes of the next would look like its own."""
    stop = offset_bytes + buffer.nbytes
    assert 0 <= offset_bytes <= stop <= source.num_bytes, (
        f"bytes [{offset_bytes}, {stop}) of {source.name} were asked for, it has {source.num_bytes}"
    )
