"""Names of modules that a config leaves out."""

from __future__ import annotations

import pytest

from lading.errors import ConfigError
from lading.schemes.ignoring import ignored_names, matching
from lading.schemes.options import Options

GATE = "model.layers.0.mlp.gate"


@pytest.mark.parametrize(
    ("module", "name", "matches"),
    [
        (GATE, "gate", True),
        (f"{GATE}_proj", "gate", False),
        (GATE, "mlp.gate", True),
        (GATE, "model.layers.0", True),
        (GATE, "model.layers.0.", True),
        ("model.layers.01.mlp.gate", "model.layers.0", False),
        (GATE, "model.layers.*.mlp", True),
        (GATE, "model.layers.0*", True),
        (GATE, "*.mlp.*", True),
        (GATE, "*gate", True),
        (GATE, "re:.*gate$", True),
        (f"{GATE}_proj", "re:.*gate$", False),
        ("lm_head", "lm_head", True),
        ("model.lm_head_norm", "lm_head", False),
    ],
)
def test_names_stand_for_modules(module: str, name: str, matches: bool) -> None:
    assert (matching(module, ("nothing", name)) == name) is matches


def test_lists_are_joined_and_checked() -> None:
    options = Options(raw={"ignore": ["a"], "exclude_modules": ["b"], "other": ["re:("]})
    assert ignored_names(options, "ignore", "exclude_modules", "missing") == ("a", "b")
    with pytest.raises(ConfigError, match=r"other: is .* needs regular expressions after re: \("):
        ignored_names(options, "other")
