"""What the kernel says of a file, against what was done to it."""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from lading.transport import residency
from lading.transport.residency import is_remote, resident_bytes, resident_part

SIZE = (1 << 20) + 123


@pytest.fixture
def fd(tmp_path: Path) -> int:  # type: ignore[misc]
    path = tmp_path / "x.bin"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDWR)
    if resident_bytes(fd, SIZE) is None:
        os.close(fd)
        pytest.skip("this kernel has no cachestat")
    yield fd  # type: ignore[misc]
    os.close(fd)


def test_a_file_just_written_is_resident(fd: int) -> None:
    assert resident_bytes(fd, SIZE) == SIZE
    assert resident_bytes(fd, 10) == 10
    assert resident_bytes(fd, 0) == 0


def test_a_file_that_was_dropped_is_not(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    left = resident_bytes(fd, SIZE)
    assert left is not None
    if left == SIZE:
        pytest.skip("this file system keeps what it has")
    assert left < SIZE // 10
    os.pread(fd, SIZE, 0)
    assert resident_bytes(fd, SIZE) == SIZE


def test_a_descriptor_of_nothing() -> None:
    assert resident_bytes(1 << 20, 10) is None
    assert resident_part(1 << 20, 10) is None
    assert resident_part(1 << 20, 1 << 40) is None
    assert is_remote(1 << 20) is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_local_folder_is_not_remote(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    known = {"ext2/ext3", "tmpfs", "overlayfs", "xfs", "btrfs"}
    try:
        command = ["stat", "-f", "-c", "%T", str(tmp_path)]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if told not in known:
            pytest.skip("nobody knows what this is")
        assert is_remote(fd) is False
    finally:
        os.close(fd)


@pytest.mark.parametrize("size", [SIZE, 40 << 20], ids=["all of it", "samples"])
@pytest.mark.parametrize("read", [0, 0.25, 0.75, 1])
def test_the_part_that_is_resident(size: int, read: float, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if resident_bytes(fd, size) != 0:
            pytest.skip("this file system keeps what it has, or nobody can say")
        for at in range(0, int(size * read), 1 << 20):
            os.pread(fd, min(1 << 20, int(size * read) - at), at)
        found = resident_part(fd, size)
    finally:
        os.close(fd)
    assert found is not None
    assert abs(found - read) < 0.1


class Library:
    """A C library on another machine: a file system, and page counts."""

    def __init__(self, kind: int = 0, pages: int | None = None) -> None:
        self.kind, self.pages = kind, pages

    def fstatfs(self, _fd: int, answer: object) -> int:
        struct.pack_into("q", answer, 0, self.kind)  # type: ignore[arg-type]
        return 0

    def syscall(self, number: int, _fd: int, span: bytes, answer: object, flags: int) -> int:
        assert (number, struct.unpack("QQ", span)[0], flags) == (451, 0, 0)
        if self.pages is None:
            return -1
        struct.pack_into("Q", answer, 0, self.pages)  # type: ignore[arg-type]
        return 0


@pytest.mark.parametrize(
    ("kind", "answer"),
    [(0x6969, True), (0xFF534D42, True), (-(1 << 32) + 0xFF534D42, True), (0xEF53, False)],
)
def test_network_file_systems(kind: int, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_library", lambda: Library(kind))
    assert is_remote(3) is answer


def test_pages_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "_library", lambda: Library(pages=3))
    monkeypatch.setattr(residency.mmap, "PAGESIZE", 65536)
    assert resident_bytes(3, 1 << 20) == 3 * 65536
    assert resident_bytes(3, 100_000) == 100_000


def test_kernels_and_systems_that_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(residency, "_library", lambda: Library(pages=None))
        assert resident_bytes(3, 100) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert resident_bytes(0, 100) is None
    assert is_remote(0) is None


def test_advice_is_only_advice() -> None:
    """Memory that is not there, or less than a page of it, is no error."""
    residency.HugePages().use(4096 * 10, 4096 * 6000)
    residency.HugePages().use(4097, 3)


class Pages:
    """A C library and a clock: touching the first `fast` huge pages takes no time, others 6 ms."""

    def __init__(self, fast: int) -> None:
        self.fast, self.now = fast, 0.0
        self.touched = 0
        self.advice: list[tuple[int, int]] = []

    def perf_counter(self) -> float:
        return self.now

    def madvise(self, _address: object, num_bytes: ctypes.c_size_t, advice: int) -> int:
        self.advice.append((advice, num_bytes.value))
        if advice == residency.MADV_POPULATE_WRITE:
            self.touched += 1
            self.now += 0.0001 if self.touched <= self.fast else 0.006
        return 0


def test_what_one_load_found_of_huge_pages_holds_for_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = Pages(fast=3)
    monkeypatch.setattr(residency, "_library", lambda: pages)
    monkeypatch.setattr(residency, "time", pages)
    residency.huge_pages.cache_clear()
    try:
        residency.huge_pages().use(1 << 30, 100 << 21)
        assert pages.touched == 5, "the fourth and the fifth were slow"
        assert pages.advice[-1] == (residency.MADV_NOHUGEPAGE, 1 << 21)
        residency.huge_pages().use(2 << 30, 100 << 21)
        assert pages.touched == 5, "no more are tried"
    finally:
        residency.huge_pages.cache_clear()


def test_one_slow_huge_page_is_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages(fast=1000)
    monkeypatch.setattr(residency, "_library", lambda: pages)
    monkeypatch.setattr(residency, "time", pages)
    huge = residency.HugePages()
    huge.use(1 << 30, 2 << 21)
    pages.fast = 0
    huge.use(2 << 30, 1 << 21)
    pages.fast = 1000
    huge.use(3 << 30, 5 << 21)
    assert pages.touched == 2 + 1 + 5
