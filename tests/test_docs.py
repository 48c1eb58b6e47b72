"""The documentation says what is so: errors, names, links, and code that runs."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import lading
from lading import cli, errors, launch, parameter
from lading.demo import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"])


def blocks(page: Path) -> list[str]:
    """The Python code of a page."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def test_every_error_is_explained() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    named = set(re.findall(r"`(\w+Error)`", text))
    assert set(errors.__all__) == named


def test_every_parameter_class_is_listed() -> None:
    text = (ROOT / "docs/parameters.md").read_text()
    classes = {name for name in parameter.__all__ if name.endswith("Parameter")}
    assert classes - {"_ColumnvLLMParameter"} <= set(re.findall(r"`(\w+)`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_python(page: Path) -> None:
    for block in blocks(page):
        compile(block, str(page), "exec")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder but for DIR, a checkpoint; the current one."""
    checkpoint = tmp_path / "DIR"
    checkpoint.mkdir()
    write_checkpoint(
        str(checkpoint), num_attention_heads=8, num_key_value_heads=4, intermediate_size=128
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["concepts", "moving", "back", "dependencies"])
def test_code_of_a_page_runs(page: str, folder: Path) -> None:
    names: dict[str, Any] = {}
    found = blocks(ROOT / f"docs/{page}.md")
    assert found
    for block in found:
        exec(compile(block, f"docs/{page}.md", "exec"), names)


def test_the_way_back_ends_where_it_began(folder: Path) -> None:
    names: dict[str, Any] = {}
    for block in blocks(ROOT / "docs/back.md"):
        exec(compile(block, "docs/back.md", "exec"), names)
    for file in sorted((folder / "DIR").iterdir()):
        for out in ("OUT", "MERGED"):
            assert (folder / out / file.name).read_bytes() == file.read_bytes()


def spread(ranks: lading.Ranks, folder: str) -> list[str]:
    """Where what the page's live reshard gave this process is not what the files have."""
    names: dict[str, Any] = {}
    (block,) = (block for block in blocks(ROOT / "docs/back.md") if "def spread" in block)
    exec(compile(block, "docs/back.md", "exec"), names)
    target = names["spread"](folder, ranks.tp_rank)
    return [str(one) for one in lading.digest(target).differences(lading.digest(folder))]


def test_the_live_reshard_of_the_page(folder: Path) -> None:
    assert launch.run_ranks(spread, 2, [str(folder / "DIR")]) == [[], []]


# ----------------------------------------------------------------------------- the command line


GROUP: Any = typer.main.get_command(cli.app)


def commands(page: Path) -> list[list[str]]:
    """The lines of a page that call lading, without what shells do with them."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
        for line in block.splitlines():
            for call in line.split("&&"):
                words = shlex.split(call, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\w+", words[0]):
                    words = words[1:]
                if words and os.path.basename(words[0]) == "lading":
                    found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page: Path) -> None:
    for name, *words in commands(page):
        with GROUP.commands[name].make_context(name, list(words)):
            pass


def test_the_readme_has_every_command() -> None:
    assert {words[0] for words in commands(ROOT / "README.md")} == set(GROUP.commands)


# ----------------------------------------------------------------------------------------- numbers


def rows(page: str, head: str) -> dict[str, list[str]]:
    """The table that begins with this cell: first cell, without its quotes -> the other cells."""
    lines = (ROOT / page).read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |"))
    found = {}
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        found[first] = rest
    return found


def test_limits_are_those_of_the_page() -> None:
    limits = lading.Limits()
    needed = {}
    for name, (default, *_) in rows("docs/moving.md", "field").items():
        number, _, unit = default.partition(" ")
        assert unit in ("MiB", "")
        needed[name.strip("`")] = None if number == "None" else int(number) * 2**20
    assert needed == {name: getattr(limits, name) for name in needed}
    assert needed.keys() == set(limits.__dataclass_fields__)


def test_the_manifest_has_the_fields_of_the_page(folder: Path) -> None:
    lading.shard("DIR", tp_size=2, out="TP2")
    tree = json.loads((folder / "TP2" / "lading.json").read_text())
    named = [
        name
        for cell in rows("docs/back.md", "field of `lading.json`")
        for name in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(named) == sorted(tree)


def test_public_names() -> None:
    for name in lading.__all__:
        assert name in dir(lading)
        assert callable(vars(lading).get(name) or getattr(lading, name))
