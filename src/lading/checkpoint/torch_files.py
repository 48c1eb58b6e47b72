"""torch `.bin` files as sources: the same values and the same reader as safetensors files have.

torch writes a zip archive with a pickle, so what a file holds is known only to torch's restricted
unpickler (`files.load_torch_file`); tensors are mapped, not read, until a reader is asked for their
bytes. Anything but one flat dict of plain tensors is an error. torch is imported when a file is
opened, never by importing this module.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lading.checkpoint.files import file_size, load_torch_file
from lading.checkpoint.sources import Source, check_range
from lading.dtypes import from_torch
from lading.errors import CallError, CheckpointError, FileError, LadingError

if TYPE_CHECKING:
    import torch

__all__ = ["TorchReader", "torch_sources"]

_FLAT = "needs a tensor (a file of weights is one flat dict of tensors)"


def torch_sources(folder: str, file: str) -> tuple[list[Source], int, list[LadingError]]:
    """The tensors of one file, the size of the file, and what is wrong with its entries.

    Raises FileError or CheckpointError where the file as a whole cannot be used.
    """
    path = os.path.join(folder, file)
    state = load_torch_file(path, name=file)
    if not isinstance(state, dict):
        fact = f"holds a value of type {type(state).__name__}, needs a dict of tensors"
        raise CheckpointError(fact, subject=file)
    sources: list[Source] = []
    problems: list[LadingError] = []
    for name, value in state.items():
        try:
            sources.append(_source(name, value, file))
        except LadingError as error:
            problems.append(error)
    return sources, file_size(path) or 0, problems


def _source(name: Any, value: Any, file: str) -> Source:
    import torch

    def bad(fact: str, hint: str | None = None) -> CheckpointError:
        return CheckpointError(fact, subject=str(name), file=file, hint=hint)

    if not isinstance(name, str):
        raise bad(f"the key is of type {type(name).__name__}, needs a string")
    if isinstance(value, dict):
        hint = f"save the dict under {name!r} alone, as safetensors"
        raise bad(f"is a dict of {len(value)} entries, {_FLAT}", hint)
    if not isinstance(value, torch.Tensor):
        raise bad(f"is of type {type(value).__name__}, {_FLAT}")
    if value.layout != torch.strided or value.device.type != "cpu":
        raise bad(f"is a {value.layout} tensor on {value.device}, needs plain values on the CPU")
    try:
        dtype = from_torch(value.dtype)
    except LookupError as error:
        raise bad(f"is {value.dtype}, which no safetensors file has") from error
    num_bytes = value.numel() * value.element_size()
    if num_bytes > value.untyped_storage().nbytes():
        # An expanded tensor of 1 stored byte may claim terabytes.
        fact = f"has {num_bytes} bytes, the file stores {value.untyped_storage().nbytes()} of them"
        raise bad(fact, "save a contiguous copy of it")
    return Source(
        name=name,
        dtype=dtype,
        shape=_header_shape(dtype, tuple(value.shape)),
        file=file,
        offset_bytes=0,
        num_bytes=num_bytes,
    )


def _header_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A torch shape as a header counts it: the inverse of `header.storage_shape`."""
    return (*shape[:-1], shape[-1] * 2) if dtype == "F4" and shape else shape


class TorchReader:
    """A Reader of torch files; each is mapped at its first read and stays so until `close`."""

    def __init__(self, folder: str, file_bytes: Mapping[str, int]) -> None:
        self.bytes_read = 0
        self._folder = folder
        self._file_bytes = dict(file_bytes)
        self._states: dict[str, dict[str, torch.Tensor]] = {}
        # The contiguous copy of the tensor read last, so that reading it in chunks copies it once.
        self._copy: tuple[Source, torch.Tensor] | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def files(self) -> None:
        """A tensor's bytes lie somewhere in a zip archive: torch finds them."""
        return None

    def read_into(self, source: Source, offset_bytes: int, buffer: memoryview) -> None:
        import torch

        check_range(source, offset_bytes, buffer)
        view = buffer.cast("B")
        if view.nbytes == 0:  # torch.frombuffer takes no empty buffer
            return
        with self._lock:
            stored = self._stored_bytes(source)
        target = torch.frombuffer(view, dtype=torch.uint8)
        target.copy_(stored[offset_bytes : offset_bytes + view.nbytes])
        with self._lock:
            self.bytes_read += view.nbytes

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._states.clear()
            self._copy = None

    def __enter__(self) -> TorchReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _stored_bytes(self, source: Source) -> torch.Tensor:
        """The tensor as uint8 [num_bytes], row-major; the lock is held."""
        if self._closed:
            raise CallError("the reader is closed", subject=source.file)
        if self._copy is not None and self._copy[0] == source:
            return self._copy[1]
        tensor = self._state(source.file).get(source.name)
        if tensor is None or _source(source.name, tensor, source.file) != source:
            fact = "is not what it was when the plan was made"
            raise FileError(fact, subject=source.name, file=source.file, hint="plan again")
        return self._flat(source, tensor)

    def _flat(self, source: Source, tensor: torch.Tensor) -> torch.Tensor:
        import torch

        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        flat = plain.reshape(-1).view(torch.uint8)
        if flat.data_ptr() != tensor.data_ptr():
            self._copy = (source, flat)
        return flat

    def _state(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._file_bytes:
            raise CallError("is not a file of this checkpoint", subject=file)
        if file not in self._states:
            path = os.path.join(self._folder, file)
            self._states[file] = load_torch_file(path, name=file, file_bytes=self._file_bytes[file])
        return self._states[file]
