"""The progress bar: drawn on a terminal, by rank 0, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from lading.progress import Bar, bar_of
from lading.ranks import Ranks


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bar_of(Ranks(), "loading") is None


def test_no_bar_on_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bar_of(Ranks(tp_rank=1, tp_size=2), "loading") is None


def test_bar_draws_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    bar = bar_of(Ranks(), "loading")
    assert isinstance(bar, Bar)
    bar.start(1000)
    bar.advance(400)
    bar.advance(600)
    bar.finish()
    assert "loading" in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_a_bar_may_finish_without_a_start() -> None:
    bar = Bar("loading")
    bar.advance(1)
    bar.finish()
