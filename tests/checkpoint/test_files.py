"""Reading: every way in which a file system disappoints."""

from __future__ import annotations

import errno
import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lading.checkpoint import (
    ByteReader,
    Checkpoint,
    check_output,
    copy_file,
    open_checkpoint,
    read_header,
    read_json,
    write_json,
)
from lading.checkpoint import files as files_module
from lading.errors import CallError, ConfigError, FileError, HeaderError, IndexFileError

from .files_made import raw_file, write_tensors


def message_of(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return str(caught.value)


def test_read_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, Infinity], "b": 1, "b": 1}')
    assert read_json(path) == {"a": [1, float("inf")], "b": 1}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            b"{",
            "x: is not JSON (Expecting property name enclosed in double quotes at line 1, "
            "column 2).",
        ),
        (b'"\xff"', "x: is not UTF-8 (byte 1 is 0xff)."),
        (b'{"a": 1, "a": 2}', "x: is not usable JSON (key 'a' has two values)."),
        (b"[" * 200_000, "x: is JSON nested too deeply."),
    ],
)
def test_bad_json(raw: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(IndexFileError) as caught:
        read_json(tmp_path / "x", name="x", error=IndexFileError)
    assert message_of(caught) == message
    with pytest.raises(ConfigError):
        read_json(tmp_path / "x")


def test_json_of_many_digits(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("9" * 5000)
    with pytest.raises(ConfigError, match="x: is not usable JSON"):
        read_json(tmp_path / "x", name="x")


def test_json_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[1, 2]")
    with pytest.raises(FileError) as caught:
        read_json(tmp_path / "x", name="x", limit_bytes=5)
    assert message_of(caught) == "x: is 6 bytes, at most 5 are read as JSON."


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(FileError) as caught:
            read_header(path, name="x")
        return message_of(caught)

    assert message(tmp_path / "none") == "x: cannot be opened: No such file or directory."
    assert message(tmp_path) == "x: is a directory, needs a file."
    os.mkfifo(tmp_path / "pipe")
    assert message(tmp_path / "pipe") == "x: is a device, pipe or socket, needs a file."
    assert message(tmp_path / "a\0b") == "x: cannot be opened: embedded null byte."
    (tmp_path / "loop").symlink_to("loop")
    assert message(tmp_path / "loop") == "x: cannot be opened: Too many levels of symbolic links."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "x").touch(mode=0)
    with pytest.raises(FileError) as caught:
        read_json(tmp_path / "x", name="x")
    assert message_of(caught) == "x: cannot be opened: Permission denied."


def test_header_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw_file([]))
    with pytest.raises(HeaderError) as caught:
        read_header(tmp_path / "x.safetensors", name="x.safetensors")
    assert message_of(caught) == "header: is [], needs a JSON object. In x.safetensors."
    assert caught.value.file == "x.safetensors"


def test_a_header_whose_length_is_a_lie_is_not_allocated(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes((2**60).to_bytes(8, "little"))
    with pytest.raises(HeaderError) as caught:
        read_header(tmp_path / "x", name="x.safetensors")
    assert str(caught.value).endswith("In x.safetensors. Try: copy or download the file again.")


def test_a_header_of_a_large_sparse_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", [("w", "BF16", (2**20, 2**12))])
    header = read_header(tmp_path / "x")
    assert header.tensors["w"].num_bytes == 2**33
    assert header.file_bytes == (tmp_path / "x").stat().st_size


DATA = bytes(range(100))


def reader_of(folder: Path, **file_bytes: int) -> ByteReader:
    (folder / "x").write_bytes(DATA)
    return ByteReader(str(folder), file_bytes or {"x": 100})


def test_byte_reader(tmp_path: Path) -> None:
    with reader_of(tmp_path) as reader:
        buffer = bytearray(10)
        reader.read_into("x", 5, memoryview(buffer))
        assert buffer == DATA[5:15]
        reader.read_into("x", 90, memoryview(buffer).cast("H"))
        assert buffer == DATA[90:]
        reader.read_into("x", 100, memoryview(bytearray()))
        assert reader.bytes_read == 20
    with pytest.raises(CallError) as caught:
        reader.read_into("x", 0, memoryview(buffer))
    assert message_of(caught) == "x: the reader is closed."


def test_close_closes_every_file(tmp_path: Path) -> None:
    reader = reader_of(tmp_path)
    reader.read_into("x", 0, memoryview(bytearray(1)))
    (fd,) = reader._fds.values()
    reader.close()
    reader.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_file_of_another_size_is_refused(tmp_path: Path) -> None:
    with reader_of(tmp_path, x=101) as reader, pytest.raises(FileError) as caught:
        reader.read_into("x", 0, memoryview(bytearray(1)))
    assert message_of(caught) == (
        "x: is 100 bytes, needs 101 (its size when the plan was made; it has changed since). "
        "Try: plan again."
    )


def test_a_file_that_shrinks_while_open(tmp_path: Path) -> None:
    with reader_of(tmp_path) as reader:
        reader.read_into("x", 0, memoryview(bytearray(1)))
        os.truncate(tmp_path / "x", 60)
        with pytest.raises(FileError) as caught:
            reader.read_into("x", 50, memoryview(bytearray(20)))
        assert reader.bytes_read == 1
    assert message_of(caught) == (
        "x: needs 20 bytes at offset 50, the file ended after 10 "
        "(it was 100 bytes when the plan was made)."
    )


def test_files_that_are_gone_or_unknown(tmp_path: Path) -> None:
    with reader_of(tmp_path, gone=1) as reader:
        with pytest.raises(FileError) as caught:
            reader.read_into("gone", 0, memoryview(bytearray(1)))
        assert message_of(caught) == "gone: cannot be opened: No such file or directory."
        with pytest.raises(CallError) as unknown:
            reader.read_into("x", 0, memoryview(bytearray(1)))
        assert message_of(unknown) == "x: is not a file of this checkpoint."


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    with reader_of(tmp_path) as reader:
        buffer = bytearray(50)
        reader.read_into("x", 20, memoryview(buffer))
        assert buffer == DATA[20:70]
        assert reader.bytes_read == 50


def test_one_call_moves_a_limited_number_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_MAX_CALL_BYTES", 8)
    with reader_of(tmp_path) as reader:
        buffer = bytearray(50)
        reader.read_into("x", 0, memoryview(buffer))
        assert buffer == DATA[:50]


def test_an_input_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with reader_of(tmp_path) as reader:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(FileError) as caught:
            reader.read_into("x", 3, memoryview(bytearray(1)))
    assert message_of(caught) == "x: cannot be read at offset 3: Input/output error."


def test_many_threads_share_a_reader(tmp_path: Path) -> None:
    results: list[bool] = []
    with reader_of(tmp_path) as reader:

        def work(start: int) -> None:
            for _ in range(50):
                buffer = bytearray(10)
                reader.read_into("x", start, memoryview(buffer))
                results.append(buffer == DATA[start : start + 10])

        threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 400
        assert reader.bytes_read == 4000
        assert len(reader._fds) == 1


def test_write_json_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    write_json(path, {"é": [1]})
    write_json(path, {"é": [2]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": [2]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert os.listdir(tmp_path) == ["index.json"]
    with pytest.raises(FileError) as caught:
        write_json("/dev/null/x", 1)
    assert message_of(caught) == ("/dev/null/x: cannot be written: there is no folder /dev/null.")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("/dev/null", "is a device, pipe or socket, needs a file or nothing there"),
        (".", "is a directory, needs a file or nothing there"),
        ("no/such/folder", "cannot be written: there is no folder "),
    ],
)
def test_what_is_no_file_is_not_replaced(
    target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "from").touch()
    for write in (check_output, partial(write_json, value=1), partial(copy_file, "from")):
        with pytest.raises(FileError, match=f"^{target}: {words}"):
            write(target)
    assert os.listdir(tmp_path) == ["from"]


def test_an_output_that_is_an_input(tmp_path: Path) -> None:
    stored = tmp_path / "model.safetensors"
    stored.touch()
    (tmp_path / "link").symlink_to(stored)
    check_output(stored)
    check_output(tmp_path / "new", inputs=[str(stored)])
    for name in ("model.safetensors", "link"):
        with pytest.raises(FileError, match="is one of the checkpoint's own files"):
            check_output(tmp_path / name, inputs=["/no/such", str(stored)])


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "x"
    write_json(path, 1)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FileError, match="cannot be written: No space left on device"):
        write_json(path, 2)
    assert os.listdir(tmp_path) == ["x"]
    assert read_json(path) == 1


def test_copy_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    copy_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == DATA
    with pytest.raises(FileError) as caught:
        copy_file(tmp_path / "none", tmp_path / "b")
    assert "No such file or directory" in message_of(caught)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_forgotten_files_are_read_again_and_no_further(tmp_path: Path) -> None:
    from lading.transport.residency import resident_bytes

    size = 32 * 2**20
    (tmp_path / "f").write_bytes(bytes(range(256)) * (size // 256))
    with ByteReader(str(tmp_path), {"f": size}) as reader:
        reader.forget("f")
        before = resident_bytes(reader.descriptor("f"), size)
        reader.read_no_further("f")
        buffer = memoryview(bytearray(256))
        reader.read_into("f", 8 * 2**20, buffer)
        after = resident_bytes(reader.descriptor("f"), size)
    assert bytes(buffer) == bytes(range(256))
    if before == 0:  # elsewhere the file system keeps its pages, or nobody says what is there
        assert after is not None
        assert 0 < after <= 64 * 2**10


def refused(checkpoint: Checkpoint) -> str:
    with checkpoint.reader() as reader:
        assert reader.files is not None
        with pytest.raises(FileError) as caught:
            reader.files.descriptor("model.safetensors")
        return str(caught.value)


def test_a_file_with_another_header_of_the_same_size_is_another_file(tmp_path: Path) -> None:
    """Two tensors have changed places: each read at its old offset would give the other."""
    path = tmp_path / "model.safetensors"
    one, two = torch.arange(6.0), torch.arange(6.0) + 10
    save_file({"a": one, "b": two}, path)
    checkpoint = open_checkpoint(tmp_path)
    raw = path.read_bytes()
    swapped = raw.replace(b'"a"', b'"c"').replace(b'"b"', b'"a"').replace(b'"c"', b'"b"')
    for replace in (False, True):
        if replace:
            (tmp_path / "new").write_bytes(swapped)
            os.replace(tmp_path / "new", path)
        else:
            path.write_bytes(swapped)
        os.utime(path, ns=(1, 1))  # a clock that is too coarse to see the change would hide it
        assert refused(checkpoint) == (
            "model.safetensors: has another header than when the plan was made (it has changed "
            "since). Try: plan again."
        )
        path.write_bytes(raw)


def test_a_file_that_was_copied_or_touched_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0)}, path)
    checkpoint = open_checkpoint(tmp_path)
    (tmp_path / "copy").write_bytes(path.read_bytes())
    os.replace(tmp_path / "copy", path)
    with checkpoint.reader() as reader:
        assert reader.files is not None
        assert reader.files.descriptor("model.safetensors") >= 0
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert "has another header" in refused(checkpoint)
