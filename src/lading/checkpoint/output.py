"""A folder that appears whole: filled under a temporary name beside its place, then renamed.

    path                        out           where it will be
    temporary                   .out.3f9a12bc.lading
    what it replaces            .out.3f9a12bc.lading.old     only where names cannot be exchanged
    the lock of its maker       .out.3f9a12bc.lading.lock

One process makes the folder and holds the lock; any number of them fill its files; the maker
publishes. At every instant the place has what it had before, or the new folder. Where the maker is
killed the lock falls with it, and the next folder that is made for the same place removes what was
left. The bytes are written by `writers`, like all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Sequence

from lading.checkpoint.writers import FileLock, FileWriter, copy_file, sync, write_file
from lading.errors import FileError

__all__ = ["OutputFolder", "check_output_folder"]

Path = str | os.PathLike[str]

_SUFFIX = ".lading"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def check_output_folder(
    path: Path, *, overwrite: bool = False, inputs: Sequence[str] = (), needed_bytes: int = 0
) -> None:
    """Whether a folder can be made at `path` without harm: called before any work is done for it.

    overwrite      a folder of checkpoint files that is there may be replaced
    inputs         folders and files that are read for it. None of these folders may be the place,
                   have it inside or lie in it, and no file, links followed, may lie in it
    needed_bytes   what it will take
    Raises FileError where its parent is missing, something else is there, the disk is too small, or
    the place and the inputs are not apart.
    """
    name, full = os.fspath(path), os.path.realpath(path)
    parent = os.path.dirname(full)
    if not os.path.isdir(parent):
        raise FileError(f"cannot be written: there is no folder {parent}", subject=name)
    for other in inputs:
        _check_apart(name, full, os.fspath(other))
    _check_place(name, full, overwrite=overwrite)
    free = _free_bytes(parent)
    if free is not None and free < needed_bytes:
        raise FileError(
            f"needs {needed_bytes} bytes, its file system has {free} free", subject=name
        )


def _check_apart(name: str, full: str, other: str) -> None:
    """What is read outlives what is written: the place is not in, around or at an input."""
    place, real = _identity(full), os.path.realpath(other)
    found = None
    if os.path.isdir(real):
        source = _identity(real)
        if source == place:
            found = f"is the folder {other}, which is read"
        elif source in _identities_above(full):
            found = f"lies in the folder {other}, which is read"
        elif place is not None and place in _identities_above(real):
            found = f"has the folder {other} inside, which is read"
        else:  # a cache's folder has links to files that are elsewhere
            for link in _linked_files(real):
                _check_apart(name, full, link)
    elif place is not None and place in _identities_above(real):
        found = f"holds {os.path.basename(real)}, which is read"
        found += "" if real == os.path.abspath(other) else f" as {other}"
    if found is not None:
        raise FileError(f"{found}, needs a place apart", subject=name, hint="another folder")


def _linked_files(folder: str) -> list[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_symlink() and entry.is_file()]
    return []


def _identity(path: str) -> tuple[int, int] | None:
    """What a folder is, under whatever name (mounts, letter case); None where nothing is."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities_above(path: str) -> set[tuple[int, int] | None]:
    """Of the folders that have this path inside."""
    found: set[tuple[int, int] | None] = set()
    while (parent := os.path.dirname(path)) != path:
        path = parent
        found.add(_identity(path))
    return found - {None}


def _check_place(name: str, full: str, *, overwrite: bool) -> None:
    try:
        mode = os.lstat(full).st_mode
        entries = os.listdir(full) if stat.S_ISDIR(mode) else []
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError(f"cannot be listed: {error.strerror}", subject=name) from None
    if not stat.S_ISDIR(mode):
        raise FileError("is there and is no folder, needs a folder or nothing there", subject=name)
    if not entries:
        return
    if not overwrite:
        raise FileError(
            "is there and is not empty, needs an empty folder or nothing there",
            subject=name,
            hint="another name, or overwrite=True (--overwrite), which replaces the whole folder",
        )
    if "lading.json" not in entries and not any(e.endswith(_WEIGHTS) for e in entries):
        raise FileError(
            "holds no checkpoint, and only a checkpoint's folder is overwritten (all that is in it "
            "would go)",
            subject=name,
        )


def _free_bytes(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize if found.f_blocks else None  # 0: it does not say


class OutputFolder:
    """The folder while it is filled: `create` by one process, `join` by the others."""

    def __init__(self, path: str, temporary: str, lock: FileLock | None, *, overwrite: bool):
        self.path = path
        self.temporary = temporary
        self._lock = lock
        self._overwrite = overwrite

    @staticmethod
    def create(path: Path, *, overwrite: bool = False) -> OutputFolder:
        """A new, empty temporary folder; those that killed processes left for this place go.

        Raises FileError as `check_output_folder` does, and where the system refuses.
        """
        check_output_folder(path, overwrite=overwrite)
        full = os.path.realpath(path)
        _remove_stale(full)
        head, base = os.path.split(full)
        while True:
            temporary = os.path.join(head, f".{base}.{os.urandom(4).hex()}{_SUFFIX}")
            lock = FileLock.take(f"{temporary}.lock")
            if lock is None:
                continue  # somebody was cleaning up in this very moment
            try:
                os.mkdir(temporary)
            except OSError as error:
                lock.release()
                raise _failed("created", error, os.fspath(path)) from None
            return OutputFolder(full, temporary, lock, overwrite=overwrite)

    @staticmethod
    def join(path: Path, temporary: str) -> OutputFolder:
        """The same folder in another process: it fills files, and neither publishes nor removes."""
        return OutputFolder(os.path.realpath(path), temporary, None, overwrite=False)

    def place(self, name: str) -> str:
        """The path of a file while the folder is filled."""
        return os.path.join(self.temporary, *name.split("/"))

    def create_file(self, name: str, num_bytes: int, head: bytes = b"") -> None:
        """A file at its full size that begins with `head`."""
        self._make_parents(name)
        with FileWriter.create(self.place(name), num_bytes) as file:
            file.write(0, head)

    def writer(self, name: str) -> FileWriter:
        """Writes ranges of a file that `create_file` made."""
        return FileWriter(self.place(name))

    def write(self, name: str, data: bytes) -> None:
        """A small file."""
        self._make_parents(name)
        write_file(self.place(name), data)

    def copy(self, source: Path, name: str) -> None:
        """A file that is a copy of another."""
        self._make_parents(name)
        copy_file(source, self.place(name))

    def sync(self, names: Iterable[str]) -> None:
        """Waits until these files are on the disk."""
        for name in names:
            sync(self.place(name))

    def publish(self) -> None:
        """Gives the folder its name: from here on it is there, whole. Only its maker calls this."""
        assert self._lock is not None, "the process that made the folder publishes it"
        for folder, _, _ in os.walk(self.temporary, topdown=False):
            sync(folder)
        try:
            os.rename(self.temporary, self.path)  # over nothing, or over an empty folder
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not self._overwrite:
                raise _failed("published", error, self.path) from None
            self._replace()
        with contextlib.suppress(FileError):  # it is there; only a power cut could still undo it
            sync(os.path.dirname(self.path))
        self._release()

    def discard(self) -> None:
        """Removes what was filled; in a process that joined, and after `publish`, nothing."""
        if self._lock is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self._release()

    def _make_parents(self, name: str) -> None:
        try:
            os.makedirs(os.path.dirname(self.place(name)), exist_ok=True)
        except OSError as error:
            raise _failed("created", error, name) from None

    def _replace(self) -> None:
        """The new folder for the old one: in one step where the system can exchange two names."""
        old = f"{self.temporary}.old"
        try:
            if _exchange(self.temporary, self.path):
                old = self.temporary
            else:
                # Between the two renames nothing is at the place. Where a kill hits that moment,
                # the next `create` puts the old folder back.
                os.rename(self.path, old)
                try:
                    os.rename(self.temporary, self.path)
                except OSError:
                    os.rename(old, self.path)
                    raise
        except OSError as error:
            raise _failed("replaced", error, self.path) from None
        shutil.rmtree(old, ignore_errors=True)

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            left = [self.temporary, f"{self.temporary}.old"]
            lock.release(remove=not any(map(os.path.lexists, left)))


def _remove_stale(full: str) -> None:
    """Removes the temporary folders of this place whose makers are gone."""
    head, base = os.path.split(full)
    # Of this place only: a place beside it, `out.old` beside `out`, has locks that begin the same.
    own = re.compile(rf"\.{re.escape(base)}\.[0-9a-f]{{8}}{re.escape(_SUFFIX)}\.lock")
    for name in os.listdir(head):
        if own.fullmatch(name) is None:
            continue
        lock = FileLock.take(os.path.join(head, name))
        if lock is None:
            continue
        if not lock.is_sure:
            lock.release(remove=False)
            continue
        temporary = os.path.join(head, name.removesuffix(".lock"))
        old = f"{temporary}.old"
        if os.path.isdir(old) and not os.path.lexists(full):
            os.rename(old, full)
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)
        lock.release(remove=not any(map(os.path.lexists, (temporary, old))))


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; macOS calls it RENAME_SWAP, with the same value


def _exchange(one: str, two: str) -> bool:
    """Exchanges two names in one step; False where this system or file system cannot."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(one), os.fsencode(two)
        if sys.platform == "darwin":
            done = library.renamex_np(*paths, ctypes.c_uint(_RENAME_EXCHANGE))
        else:
            flags = ctypes.c_uint(_RENAME_EXCHANGE)
            done = library.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], flags)
    except (OSError, AttributeError):  # no such library, no such function in it
        return False
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))


def _failed(verb: str, error: OSError, name: str) -> FileError:
    return FileError(f"cannot be {verb}: {error.strerror or error}", subject=name)
