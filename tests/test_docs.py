"""The documentation says what is so: errors, names, links, and code that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lading
from lading import errors, parameter
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


def test_code_of_the_concepts_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "DIR"
    checkpoint.mkdir()
    write_checkpoint(
        str(checkpoint), num_attention_heads=8, num_key_value_heads=4, intermediate_size=128
    )
    monkeypatch.chdir(tmp_path)
    for block in blocks(ROOT / "docs/concepts.md"):
        exec(compile(block, "docs/concepts.md", "exec"), {})


def test_public_names() -> None:
    for name in lading.__all__:
        assert name in dir(lading)
        assert callable(vars(lading).get(name) or getattr(lading, name))
