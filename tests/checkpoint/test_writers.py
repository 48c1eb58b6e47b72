"""Locks, ranges and small files. (check_output, write_json, copy_file: test_files)"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lading.checkpoint.writers import FileLock, FileWriter, sync, write_file
from lading.errors import FileError


def test_a_lock_is_held_until_it_is_released(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    lock = FileLock.take(path)
    assert lock is not None
    assert lock.is_sure
    assert FileLock.take(path) is None
    lock.release()
    assert not os.path.exists(path)
    lock.release()  # once is enough
    again = FileLock.take(path)
    assert again is not None
    again.release(remove=False)
    assert os.path.exists(path)


def test_a_lock_falls_with_its_process(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    code = (
        "import os, signal, sys\nfrom lading.checkpoint.writers import FileLock\n"
        "lock = FileLock.take(sys.argv[1])\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    source = Path(__file__).parents[2] / "src"
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, env={"PYTHONPATH": str(source)}, check=False)
    assert done.returncode == -9
    assert os.path.exists(path)
    assert FileLock.take(path) is not None


def test_without_locks_nobody_is_sure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock.take(str(tmp_path / "lock"))
    assert lock is not None
    assert not lock.is_sure


def test_a_lock_whose_file_has_gone_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "lock")
    real = fcntl.flock

    def flock(fd: int, how: int) -> None:
        real(fd, how)
        os.unlink(path)  # whoever had it before has cleaned up

    monkeypatch.setattr(fcntl, "flock", flock)
    assert FileLock.take(path) is None


def test_runs_go_where_they_belong(tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    with FileWriter.create(path, 12) as file:
        file.write_runs([1, 9, 5], 2, memoryview(b"abcdef"))
    assert Path(path).read_bytes() == b"\0ab\0\0ef\0\0cd\0"


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = str(tmp_path / "file"), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:2], at))
    with FileWriter.create(path, 12) as file:
        file.write_runs([6, 0], 5, memoryview(b"abcdefghij"))
    assert Path(path).read_bytes() == b"fghij\0abcde\0"


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FileWriter.create(str(tmp_path / "file"), 100) as file:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
            file.write_runs([0, 20], 10, memoryview(bytes(20)))
            with pytest.raises(FileError, match="file: cannot be written: File too large"):
                file.write_runs([80], 10, memoryview(bytes(10)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_small_files_are_new(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"one")
    with pytest.raises(FileError, match="a: cannot be written: File exists"):
        write_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", b"one")
    sync(tmp_path / "a")
    sync(tmp_path)
    with pytest.raises(FileError, match="b: cannot be written to the disk: No such file"):
        sync(tmp_path / "b")

    def fsync(_fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)  # some file systems sync no folders
    with pytest.raises(FileError, match="a: cannot be written to the disk: Invalid argument"):
        sync(tmp_path / "a")
