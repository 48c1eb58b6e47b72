"""Typed look-ups: what they return, and what they say."""

from __future__ import annotations

import pytest

from lading.errors import ConfigError
from lading.schemes.options import Options, one_of

OPTIONS = Options(
    raw={
        "size": 7,
        "flag": True,
        "word": "gemm",
        "words": ["a", "b"],
        "objects": {"+:a": {"size": 8}, "-:b": {}, "c": None},
        "null": None,
    }
)


def test_values() -> None:
    assert OPTIONS.integer("size") == 7
    assert OPTIONS.integer("size", allowed=(7, 8)) == 7
    assert OPTIONS.integer("null", 3) == 3
    assert OPTIONS.group_size("size") == 7
    assert OPTIONS.group_size("null", -1) == -1
    assert OPTIONS.flag("flag", False)
    assert OPTIONS.flag("null", True)
    assert OPTIONS.word("word") == "gemm"
    assert OPTIONS.word("null") is None
    assert OPTIONS.words("words") == ("a", "b")
    assert OPTIONS.words("null") == ()
    assert OPTIONS.given("size")
    assert not OPTIONS.given("null")
    assert [name for name, _ in OPTIONS.objects("objects")] == ["+:a", "-:b", "c"]
    assert OPTIONS.objects("objects")[0][1].integer("size") == 8
    assert OPTIONS.objects("null") == ()


def test_messages() -> None:
    with pytest.raises(ConfigError) as caught:
        OPTIONS.integer("word")
    assert str(caught.value) == 'quantization_config.word: is "gemm", needs an int.'
    with pytest.raises(ConfigError) as caught:
        raise OPTIONS.problem("size", "8", hint="8")
    assert str(caught.value) == "quantization_config.size: is 7, needs 8. Try: 8."
    long = Options(raw={"a": "x" * 80}, scope="s")
    with pytest.raises(ConfigError) as caught:
        long.flag("a", False)
    assert str(caught.value) == f's.a: is "{"x" * 56}..., needs true or false.'
    assert one_of((4,)) == "4"
