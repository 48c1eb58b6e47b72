"""What has ended a run of the engine, as an error about the parameter that it was for."""

from __future__ import annotations

import os

from lading.binding import Binding
from lading.checkpoint import Source
from lading.checkpoint.files import ended, read_problem
from lading.errors import DeviceError, FileError, LadingError
from lading.regions import Copy
from lading.transport import engine as engines
from lading.transport.cuda import cuda_problem
from lading.transport.engine import Fault
from lading.transport.host import located
from lading.transport.sorting import Opened

__all__ = ["problem_of"]


def problem_of(fault: Fault, source: Source, copy: Copy | Binding, opened: Opened) -> LadingError:
    """The error of the copy, out of `source`, that met the fault; the files are the run's."""
    if fault.kind == engines.FAILED_CUDA:
        error: LadingError = cuda_problem(fault.code, "cannot take the parameters")
        return error.located(subject=copy.target, part=copy.part, file=source.file)
    if fault.kind == engines.NO_MEMORY:
        return DeviceError(f"cannot start: {os.strerror(fault.code)}", subject="the engine")
    try:
        with located(source, copy.target, copy.part):
            if fault.kind == engines.FILE_ENDED:
                size = opened.files.file_bytes(source.file)
                raise ended(source.file, fault.wanted, fault.offset, fault.got, size)
            raise read_problem(source.file, fault.code, fault.offset)
    except FileError as found:
        return found
