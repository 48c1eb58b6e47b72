"""A folder that appears whole: what is there before, in between and after; and what is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lading.checkpoint import OutputFolder, check_output_folder, output
from lading.errors import FileError


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(folder: OutputFolder, text: bytes = b"new") -> None:
    folder.create_file("sub/model.safetensors", 8, b"head")
    with folder.writer("sub/model.safetensors") as file:
        file.write(4, text)
    folder.write("config.json", b"{}")
    folder.sync(["sub/model.safetensors", "config.json"])


NEW = {"sub/model.safetensors": b"headnew\0", "config.json": b"{}"}


def old_checkpoint(path: Path) -> dict[str, bytes]:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"old")
    return content(path)


@pytest.mark.parametrize("before", ["nothing", "empty"])
def test_it_appears_when_it_is_published(before: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if before == "empty":
        path.mkdir()
    folder = OutputFolder.create(path)
    fill(folder)
    assert path.exists() == (before == "empty")
    assert not path.exists() or content(path) == {}
    folder.publish()
    assert content(path) == NEW
    folder.discard()  # after the fact: nothing
    assert content(path) == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_what_is_discarded_was_never_there(tmp_path: Path) -> None:
    folder = OutputFolder.create(tmp_path / "out")
    fill(folder)
    folder.discard()
    assert os.listdir(tmp_path) == []


def test_a_process_that_joined_removes_nothing(tmp_path: Path) -> None:
    folder = OutputFolder.create(tmp_path / "out")
    folder.create_file("a", 4)
    other = OutputFolder.join(tmp_path / "out", folder.temporary)
    with other.writer("a") as file:
        file.write(1, b"bc")
    other.discard()
    folder.publish()
    assert content(tmp_path / "out") == {"a": b"\0bc\0"}


@pytest.mark.parametrize("exchanged", [True, False])
def test_it_replaces_a_checkpoint(
    exchanged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    old_checkpoint(path)
    if not exchanged:
        monkeypatch.setattr(output, "_exchange", lambda _one, _two: False)
    folder = OutputFolder.create(path, overwrite=True)
    fill(folder)
    assert content(path) == {"model.safetensors": b"old"}
    folder.publish()
    assert content(path) == NEW
    assert os.listdir(tmp_path) == ["out"]


def test_the_old_one_stays_where_the_new_one_cannot_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    before = old_checkpoint(path)
    monkeypatch.setattr(output, "_exchange", lambda _one, _two: False)
    folder = OutputFolder.create(path, overwrite=True)
    fill(folder)
    real = os.rename

    def rename(one: str, two: str) -> None:
        if one == folder.temporary and not path.exists():
            raise OSError(errno.EIO, "Input/output error")
        real(one, two)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(FileError, match="cannot be replaced: Input/output error"):
        folder.publish()
    folder.discard()
    assert content(path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_checkpoint_that_came_meanwhile_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    folder = OutputFolder.create(path)
    fill(folder)
    before = old_checkpoint(path)
    with pytest.raises(FileError, match="cannot be published: Directory not empty"):
        folder.publish()
    folder.discard()
    assert content(path) == before


def test_two_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out"
    one, two = OutputFolder.create(path), OutputFolder.create(path)  # both are alive
    fill(one, b"one")
    fill(two, b"two")
    two.publish()
    with pytest.raises(FileError):
        one.publish()
    one.discard()
    assert content(path)["sub/model.safetensors"] == b"headtwo\0"
    assert os.listdir(tmp_path) == ["out"]


KILLED = """
import os, signal, sys
from lading.checkpoint import OutputFolder, output
folder = OutputFolder.create(sys.argv[1], overwrite=True)
folder.write("model.safetensors", b"new")
if sys.argv[2] == "between":
    output._exchange = lambda one, two: False
    real, calls = os.rename, []
    def rename(one, two):
        calls.append(one)
        if one == folder.temporary and len(calls) > 1:
            if not os.path.exists(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
        real(one, two)
    os.rename = rename
    folder.publish()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["before", "between"])
def test_what_a_killed_process_left_goes(moment: str, tmp_path: Path) -> None:
    path = tmp_path / "out"
    before = old_checkpoint(path)
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), moment],
        env={"PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-9, "")
    assert path.exists() == (moment == "before")
    assert len(os.listdir(tmp_path)) > 1
    # The next one puts the old folder back, before it does anything else.
    folder = OutputFolder.create(path, overwrite=True)
    assert content(path) == before
    folder.discard()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("is_there", [False, True])
def test_what_was_left_of_a_place_beside_it_stays(is_there: bool, tmp_path: Path) -> None:
    """`out.x` was killed between its renames: `out` neither takes nor removes its old folder."""
    left = ".out.x.0123abcd.lading"
    (tmp_path / f"{left}.lock").touch()
    before = old_checkpoint(tmp_path / f"{left}.old")
    if is_there:
        (tmp_path / "out").mkdir()
    OutputFolder.create(tmp_path / "out").discard()
    assert content(tmp_path / f"{left}.old") == before
    assert (tmp_path / "out").exists() == is_there
    OutputFolder.create(tmp_path / "out.x").discard()
    assert content(tmp_path / "out.x") == before


def test_nobodys_folder_is_removed_that_somebody_fills(tmp_path: Path) -> None:
    folder = OutputFolder.create(tmp_path / "out")
    fill(folder)
    OutputFolder.create(tmp_path / "out").discard()
    folder.publish()
    assert content(tmp_path / "out") == NEW


def test_links_are_followed_to_the_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "out")
    folder = OutputFolder.create(tmp_path / "link")
    fill(folder)
    folder.publish()
    assert content(tmp_path / "real" / "out") == NEW
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("name", "overwrite", "text"),
    [
        ("no/out", False, "cannot be written: there is no folder {0}/no."),
        ("file", True, "is there and is no folder, needs a folder or nothing there."),
        (
            "full",
            False,
            "is there and is not empty, needs an empty folder or nothing there. Try: another name, "
            "or overwrite=True (--overwrite), which replaces the whole folder.",
        ),
        (
            "mine",
            True,
            "holds no checkpoint, and only a checkpoint's folder is overwritten (all that is in it "
            "would go).",
        ),
    ],
)
def test_places_that_are_refused(name: str, overwrite: bool, text: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, file in (("full", "model.safetensors"), ("mine", "thesis.tex")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("")
    before = content(tmp_path)
    for refuse in (check_output_folder, OutputFolder.create):
        with pytest.raises(FileError) as error:
            refuse(tmp_path / name, overwrite=overwrite)
        assert str(error.value) == f"{tmp_path / name}: {text.format(tmp_path)}"
    assert content(tmp_path) == before


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "out")
    inner = tmp_path / "out" / "source"
    inner.mkdir()
    blobs = tmp_path / "blobs"
    linked = tmp_path / "linked"
    old_checkpoint(blobs)
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(blobs / "model.safetensors")
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    before = content(tmp_path)
    for place, read, text in (
        ("out", "out", "is the folder {}, which is read"),
        ("out", "alias", "is the folder {}, which is read"),
        ("alias", "out", "is the folder {}, which is read"),
        ("out", "out/source", "has the folder {} inside, which is read"),
        ("out", "alias/source", "has the folder {} inside, which is read"),
        ("out/new", "out", "lies in the folder {}, which is read"),
        ("out/source/new", "out", "lies in the folder {}, which is read"),
        ("alias/new", "out", "lies in the folder {}, which is read"),
        ("out", "out/model.safetensors", "holds model.safetensors, which is read"),
        ("blobs", "linked", "holds model.safetensors, which is read as {}/model.safetensors"),
        ("blobs", "linked/model.safetensors", "holds model.safetensors, which is read as {}"),
    ):
        for overwrite in (True, False):
            inputs = [str(tmp_path / read)]
            with pytest.raises(FileError) as error:
                check_output_folder(tmp_path / place, overwrite=overwrite, inputs=inputs)
            needed = f"{text.format(inputs[0])}, needs a place apart. Try: another folder."
            assert str(error.value) == f"{tmp_path / place}: {needed}", (place, read)
    assert content(tmp_path) == before


def test_places_beside_what_is_read(tmp_path: Path) -> None:
    old_checkpoint(tmp_path / "out")
    old_checkpoint(tmp_path / "out2")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "out2" / "model.safetensors")
    inputs = [str(tmp_path / name) for name in ("out2", "linked", "linked/model.safetensors", "no")]
    check_output_folder(tmp_path / "out", overwrite=True, inputs=inputs)
    check_output_folder(tmp_path / "new", inputs=inputs)


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"needs {2**62} bytes, its file system has \d+ free"):
        check_output_folder(tmp_path / "out", needed_bytes=2**62)
