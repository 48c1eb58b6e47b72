"""Every file that lading reads is opened here, and every file that it writes in `writers` (a test
reads the sources and holds us to it).

What lives here: whole small files (JSON, headers), `ByteReader` for the payload, torch's own files.
What the bytes mean is not known here. An error of the
operating system becomes a FileError with the system's own words and the file as its subject.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from lading.checkpoint.header import (
    PREFIX_BYTES,
    Entries,
    Header,
    header_length,
    parse_entries,
    parse_header,
)
from lading.errors import (
    CallError,
    CheckpointError,
    ConfigError,
    FileError,
    HeaderError,
    LadingError,
)

__all__ = [
    "ByteReader",
    "Stamp",
    "file_size",
    "list_folder",
    "load_torch_file",
    "read_entries",
    "read_header",
    "read_header_bytes",
    "read_json",
]

Path = str | os.PathLike[str]
_T = TypeVar("_T")

_MIB = 1 << 20
_O_DIRECT: int = vars(os).get("O_DIRECT", 0)  # Linux has it
_CAN_ADVISE = "posix_fadvise" in vars(os)
_MAX_CALL_BYTES = 1 << 30  # one preadv moves at most 2^31 - 4096 bytes on Linux; macOS refuses more


def read_json(
    path: Path,
    *,
    name: str | None = None,
    error: type[LadingError] = ConfigError,
    limit_bytes: int = 64 * _MIB,
) -> Any:
    """The JSON value in a file. NaN and Infinity are taken: configs of Mamba models have them.

    name    what errors call the file; its path unless given
    error   the class raised for bytes that are not JSON, or an object that gives one key two values

    Raises FileError for a file that cannot be read or is longer than `limit_bytes`.
    """
    name = os.fspath(path) if name is None else name
    with _opened(path, name) as (fd, size):
        if size > limit_bytes:
            raise FileError(
                f"is {size} bytes, at most {limit_bytes} are read as JSON", subject=name
            )
        raw = bytearray(size)
        _read_exact(fd, memoryview(raw), 0, name, size)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_without_conflict)
    except UnicodeDecodeError as bad:
        fact = f"is not UTF-8 (byte {bad.start} is 0x{raw[bad.start]:02x})"
    except json.JSONDecodeError as bad:
        fact = f"is not JSON ({bad.msg} at line {bad.lineno}, column {bad.colno})"
    except RecursionError:
        fact = "is JSON nested too deeply"
    except ValueError as bad:  # a key with two values, an integer with thousands of digits
        fact = f"is not usable JSON ({bad})"
    raise error(fact, subject=name)


def read_header(path: Path, *, name: str | None = None) -> Header:
    """The checked header of a safetensors file; nothing else of the file is read.

    Raises FileError, or HeaderError with `name` (the path unless given) as its file.
    """
    raw, size, _ = _read_head(path, name)
    return _parsed(parse_header, raw, size, path, name)


def read_entries(path: Path, *, name: str | None = None) -> tuple[Entries, int, Stamp]:
    """The same as plain values (`header.parse_entries`), the size of the file, and what tells it
    from another. Raises as `read_header` does.
    """
    raw, size, stamp = _read_head(path, name)
    return _parsed(parse_entries, raw, size, path, name), size, stamp


def read_header_bytes(path: Path, *, name: str | None = None) -> tuple[bytes, Header]:
    """The first bytes of a safetensors file as they are (its length and its header), and the
    checked header in them. Raises as `read_header` does.
    """
    raw, size, _ = _read_head(path, name)
    header = _parsed(parse_header, raw, size, path, name)
    return len(raw).to_bytes(PREFIX_BYTES, "little") + raw, header


class Stamp(NamedTuple):
    """What tells whether a file is still the one whose header was read, of whatever size it is.

    status   its device, inode and time of change: while they are equal it is
    digest   of its header, which decides where they are not: a copy, a file that was touched
    """

    status: tuple[int, int, int]
    digest: bytes

    @staticmethod
    def of(fd: int, raw: bytes) -> Stamp:
        """Of an open file with this header."""
        return Stamp(_status(fd), hashlib.blake2b(raw, digest_size=16).digest())


def _status(fd: int) -> tuple[int, int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _read_head(path: Path, name: str | None) -> tuple[bytes, int, Stamp]:
    """What follows the header's length, the size of the file, and its stamp."""
    name = os.fspath(path) if name is None else name
    with _opened(path, name) as (fd, size):
        raw = _head_of(fd, size, path, name)
        return raw, size, Stamp.of(fd, raw)


def _head_of(fd: int, size: int, path: Path, name: str) -> bytes:
    prefix = bytearray(min(PREFIX_BYTES, size))
    _read_exact(fd, memoryview(prefix), 0, name, size)
    length = _parsed(header_length, bytes(prefix), size, path, name)
    raw = bytearray(length)
    _read_exact(fd, memoryview(raw), PREFIX_BYTES, name, size)
    return bytes(raw)


def _parsed(
    parse: Callable[[bytes, int], _T], raw: bytes, size: int, path: Path, name: str | None
) -> _T:
    try:
        return parse(raw, size)
    except HeaderError as error:
        error.located(file=os.fspath(path) if name is None else name)
        raise


class ByteReader:
    """Bytes of the files of one folder, at any offset, from any number of threads.

    folder       where they are
    file_bytes   the size that each file had when its header was read; a file of another size is
                 another file, and is refused
    stamps       of the files whose headers are known: one with another header is refused too

    Each file is opened at its first read and stays open until `close`, which must come after the
    last read has returned. `bytes_read` counts what was delivered.
    """

    def __init__(
        self, folder: str, file_bytes: Mapping[str, int], stamps: Mapping[str, Stamp] | None = None
    ) -> None:
        self.folder = folder
        self.bytes_read = 0
        self._file_bytes = dict(file_bytes)
        self._stamps = dict(stamps or {})
        self._fds: dict[str, int] = {}
        self._direct_fds: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read_into(self, file: str, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes of `file` from byte `offset` on.

        Raises FileError where the file is gone, has another size, ends early or cannot be read.
        """
        view = buffer.cast("B")
        fd = self._fds.get(file)
        if fd is None:
            fd = self._open(file)
        _read_exact(fd, view, offset, file, self._file_bytes[file])
        with self._lock:
            self.bytes_read += view.nbytes

    def descriptor(self, file: str) -> int:
        """The open file, for reads at offsets. Raises as `read_into` does."""
        fd = self._fds.get(file)
        return self._open(file) if fd is None else fd

    def direct_descriptor(self, file: str) -> int:
        """The file opened for reads past the page cache; -1 where the system has no such reads."""
        self.descriptor(file)  # it is there, and what it was
        with self._lock:
            if file not in self._direct_fds:
                flags = os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT
                try:
                    fd = os.open(os.path.join(self.folder, file), flags) if _O_DIRECT else -1
                except OSError:
                    fd = -1
                if fd >= 0 and not os.path.sameopenfile(fd, self._fds[file]):
                    os.close(fd)  # another file has been put in its place meanwhile
                    fd = -1
                self._direct_fds[file] = fd
            return self._direct_fds[file]

    def file_bytes(self, file: str) -> int:
        """The size that the file had when its header was read."""
        return self._file_bytes[file]

    def read_no_further(self, file: str) -> None:
        """Asks the system to read what it is asked for, and nothing after it: readers of pieces
        would have the disk read the gaps too, 8 MiB at the end of each piece on some machines.
        """
        if _CAN_ADVISE:
            with contextlib.suppress(OSError):
                os.posix_fadvise(self.descriptor(file), 0, 0, os.POSIX_FADV_RANDOM)

    def forget(self, file: str) -> None:
        """Asks the system to drop the file's pages from its page cache, as a benchmark needs."""
        if _CAN_ADVISE:
            fd = self.descriptor(file)
            with contextlib.suppress(OSError):
                os.fdatasync(fd)  # pages that are not on the disk yet cannot be dropped
            with contextlib.suppress(OSError):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def count(self, num_bytes: int) -> None:
        """Notes bytes that were read from a descriptor."""
        with self._lock:
            self.bytes_read += num_bytes

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for fd in (*self._fds.values(), *self._direct_fds.values()):
                if fd >= 0:
                    os.close(fd)
            self._fds.clear()
            self._direct_fds.clear()

    def __enter__(self) -> ByteReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, file: str) -> int:
        with self._lock:
            if self._closed:
                raise CallError("the reader is closed", subject=file)
            if file not in self._file_bytes:
                raise CallError("is not a file of this checkpoint", subject=file)
            if file not in self._fds:  # another thread may have been first
                fd, size = _open(os.path.join(self.folder, file), file)
                try:
                    self._check(fd, size, file)
                except BaseException:
                    os.close(fd)
                    raise
                self._fds[file] = fd
            return self._fds[file]

    def _check(self, fd: int, size: int, file: str) -> None:
        """Raises a FileError where it is not the file that was planned for."""
        if size != self._file_bytes[file]:
            raise _changed(file, size, self._file_bytes[file])
        stamp = self._stamps.get(file)
        if stamp is None or stamp.status == _status(fd):
            return
        with contextlib.suppress(LadingError):  # it has no header any more
            if Stamp.of(fd, _head_of(fd, size, file, file)).digest == stamp.digest:
                return
        fact = "has another header than when the plan was made (it has changed since)"
        raise FileError(fact, subject=file, hint="plan again")


def load_torch_file(path: Path, *, name: str, file_bytes: int | None = None) -> Any:
    """The object in a file of torch.save, its tensors mapped from the file, not read.

    Nothing in the file is run: torch's restricted unpickler knows tensors and containers only.
    Raises CheckpointError for a file that needs more than that, FileError for one that is damaged,
    cannot be read, or is not `file_bytes` long.
    """
    import torch

    with _opened(path, name) as (fd, size):
        if file_bytes is not None and size != file_bytes:
            raise _changed(name, size, file_bytes)
        magic = os.pread(fd, 8, 0)
    if not magic.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            "is not a zip archive, needs the format that torch.save has written since torch 1.6",
            subject=name,
            hint="git lfs pull" if magic == b"version " else "convert it to safetensors",
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise CheckpointError(
            "holds Python objects that are not tensors, and loading them could run any code; "
            "needs tensors only",
            subject=name,
            hint="convert it to safetensors where you trust it",
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # all kinds, OSError included, for a damaged file
        words = str(error).partition("\n")[0]
        raise FileError(f"is not a whole file of torch.save ({words})", subject=name) from error


def list_folder(path: Path) -> tuple[str, ...]:
    """The names in a folder, sorted. Raises FileError."""
    try:
        return tuple(sorted(os.listdir(path)))
    except (OSError, ValueError) as error:
        raise os_error("listed", error, os.fspath(path)) from error


def file_size(path: Path) -> int | None:
    """The size of a file in bytes, None where there is none (a link to nothing included)."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[int, int]]:
    fd, size = _open(path, name)
    try:
        yield fd, size
    finally:
        os.close(fd)


def _open(path: Path, name: str) -> tuple[int, int]:
    """A descriptor and the size of a regular file."""
    try:
        # Without O_NONBLOCK a named pipe would wait here for its writer; files do not notice it.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: NUL or a surrogate in the name
        raise os_error("opened", error, name) from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise FileError(f"is {kind_of(status.st_mode)}, needs a file", subject=name)
    return fd, status.st_size


def kind_of(mode: int) -> str:
    """What is there instead of a file, in words, by the `st_mode` of its status."""
    return "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"


def _read_exact(fd: int, view: memoryview, offset: int, name: str, file_bytes: int) -> None:
    """Fills `view`. Reads may be short (network file systems, signals); Python repeats on EINTR."""
    done = 0
    while done < view.nbytes:
        try:
            count = os.preadv(fd, [view[done : done + _MAX_CALL_BYTES]], offset + done)
        except OSError as error:
            raise os_error(f"read at offset {offset + done}", error, name) from error
        if count == 0:
            raise ended(name, view.nbytes, offset, done, file_bytes)
        done += count


def ended(name: str, wanted: int, offset: int, got: int, file_bytes: int) -> FileError:
    """What to say of a file that is shorter than it was: `got` of `wanted` bytes came."""
    return FileError(
        f"needs {wanted} bytes at offset {offset}, the file ended after {got} "
        f"(it was {file_bytes} bytes when the plan was made)",
        subject=name,
    )


def read_problem(name: str, code: int, offset: int) -> FileError:
    """What to say of a read that the operating system refused with this errno."""
    return os_error(f"read at offset {offset}", OSError(code, os.strerror(code)), name)


def _without_conflict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A key repeated with the same value is only untidy; with another value, one would be lost.
    tree = dict(pairs)
    if len(tree) != len(pairs):
        for key, value in pairs:
            if tree[key] != value:
                raise ValueError(f"key {key!r} has two values")
    return tree


def _changed(name: str, size: int, planned: int) -> FileError:
    fact = (
        f"is {size} bytes, needs {planned} (its size when the plan was made; it has changed since)"
    )
    return FileError(fact, subject=name, hint="plan again")


def os_error(verb: str, error: OSError | ValueError, name: str) -> FileError:
    """The system's own words: `os_error("opened", error, "x")` -> "x: cannot be opened: ..."."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return FileError(f"cannot be {verb}: {words}", subject=name)
