"""Every file that lading writes is opened here: small files at once, large ones range by range.

A small file is the old one or the new one, never half. A large one is made at its full size and
filled by offset, by several processes at a time. What the bytes mean is not known here. An error of
the operating system becomes a FileError with the system's own words and the file as its subject.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from lading.checkpoint.files import Path, kind_of, os_error
from lading.errors import FileError

__all__ = [
    "FileLock",
    "FileWriter",
    "check_output",
    "copy_file",
    "sync",
    "write_file",
    "write_json",
]


def check_output(path: Path, *, inputs: Sequence[str] = ()) -> None:
    """Whether a file can be made at `path` without harm: called before any work is done for it.

    inputs   files that are read for it, and so may not be replaced by it
    Raises FileError where its folder is missing, or it is there and is no regular file (a folder,
    a device), or is one of `inputs`.
    """
    name = os.fspath(path)
    folder = os.path.dirname(os.path.abspath(name))
    if not os.path.isdir(folder):
        raise FileError(f"cannot be written: there is no folder {folder}", subject=name)
    try:
        status = os.stat(name)
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(status.st_mode):
        raise FileError(
            f"is {kind_of(status.st_mode)}, needs a file or nothing there", subject=name
        )
    for other in inputs:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(status, os.stat(other)):
                fact = "is one of the checkpoint's own files, needs another name"
                raise FileError(fact, subject=name)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file; readers see the old one or the new one, never half. Raises FileError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    def write(temporary: str) -> None:
        with open(temporary, "x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())

    _replace(os.fspath(path), write)


def copy_file(source: Path, target: Path) -> None:
    """Copies the bytes of a file; `target` is the old one or the new one, never half.

    Raises FileError.
    """
    _replace(os.fspath(target), lambda temporary: shutil.copyfile(source, temporary))


def write_file(path: Path, data: bytes) -> None:
    """Writes a new file. Raises FileError, also where there is one already."""
    try:
        with open(path, "xb") as stream:
            stream.write(data)
    except OSError as error:
        raise os_error("written", error, os.path.basename(path)) from None


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk. Raises FileError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems cannot sync folders; what they promise is then theirs.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
                raise
        finally:
            os.close(fd)
    except OSError as error:
        raise os_error("written to the disk", error, os.path.basename(path)) from None


class FileLock:
    """An empty file that one process holds until it releases it, or ends, whatever ends it.

    is_sure   False where the file system has no locks: then nobody knows who else holds it
    """

    def __init__(self, path: str, fd: int, *, is_sure: bool) -> None:
        self._path, self._fd, self.is_sure = path, fd, is_sure

    @staticmethod
    def take(path: str) -> FileLock | None:
        """The lock of this path, its file made where it is missing; None where somebody has it."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise os_error("created", error, os.path.basename(path)) from None
        is_sure = True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except OSError:
            is_sure = False
        try:  # whoever held it before may have removed the file in between
            is_same = os.path.samestat(os.fstat(fd), os.stat(path))
        except OSError:
            is_same = False
        if not is_same:
            os.close(fd)
            return None
        return FileLock(path, fd, is_sure=is_sure)

    def release(self, *, remove: bool = True) -> None:
        """Lets go, once; the file goes too unless `remove` is False."""
        fd, self._fd = self._fd, -1
        if fd == -1:
            return
        if remove:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        os.close(fd)


class FileWriter:
    """Writes bytes at offsets of a file that several processes fill together.

    One of them calls `create`, each opens it and writes its own ranges, and when all are done one
    calls `publish`: only then does the file have its name.
    """

    def __init__(self, path: str) -> None:
        self._name = os.path.basename(path)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError as error:
            raise os_error("opened for writing", error, self._name) from None

    @staticmethod
    def create(path: str, num_bytes: int) -> FileWriter:
        """A new file of this size; what an earlier attempt left under the name goes."""
        name = os.path.basename(path)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            os.ftruncate(fd, num_bytes)
            os.close(fd)
        except OSError as error:
            raise os_error("created", error, name) from None
        return FileWriter(path)

    @staticmethod
    def publish(path: str, name: str) -> None:
        """Gives a complete file its name, in place of what has it."""
        try:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, name)
        except OSError as error:
            raise os_error("renamed", error, os.path.basename(name)) from None

    @staticmethod
    def discard(path: str) -> None:
        """Removes what a failed attempt left, if anything."""
        with contextlib.suppress(OSError):
            os.unlink(path)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """All of `data` at byte `offset`."""
        view = memoryview(data)
        try:
            while view.nbytes:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise os_error("written", error, self._name) from None

    def write_runs(self, offsets: Iterable[int], length: int, data: memoryview) -> None:
        """The next `length` bytes of `data` at each of the offsets."""
        fd, at = self._fd, 0
        try:
            for offset in offsets:
                written = os.pwrite(fd, data[at : at + length], offset)
                if written != length:
                    self.write(offset + written, data[at + written : at + length])
                at += length
        except OSError as error:
            raise os_error("written", error, self._name) from None

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def _replace(path: str, write: Callable[[str], object]) -> None:
    check_output(path)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        try:
            write(temporary)
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise
    except (OSError, shutil.Error) as error:
        raise os_error("written", error, path) from error
