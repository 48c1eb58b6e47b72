"""Names of parameters and names of checkpoint tensors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lading.errors import DeclarationError
from lading.names import DEFAULT_FUSED, DEFAULT_SKIPS, Names, SkipRule


@dataclass(frozen=True)
class Expect:
    id: str
    target: str
    num_parts: int
    parts: tuple[str, ...] | None


PARTS = [
    Expect(
        "qkv",
        "model.layers.3.self_attn.qkv_proj.weight",
        3,
        (
            "model.layers.3.self_attn.q_proj.weight",
            "model.layers.3.self_attn.k_proj.weight",
            "model.layers.3.self_attn.v_proj.weight",
        ),
    ),
    Expect(
        "gate_up, another leaf",
        "mlp.gate_up_proj.weight_scale_inv",
        2,
        ("mlp.gate_proj.weight_scale_inv", "mlp.up_proj.weight_scale_inv"),
    ),
    Expect("a module at the top", "gate_up_proj.bias", 2, ("gate_proj.bias", "up_proj.bias")),
    Expect("no rule", "mlp.down_proj.weight", 2, None),
    Expect("only part of the name", "mlp.my_gate_up_proj.weight", 2, None),
    Expect("no module", "weight", 2, None),
]


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.id)
def test_parts(case: Expect) -> None:
    assert Names().parts(case.target, case.num_parts) == case.parts


def test_renames_are_applied_in_order_before_the_parts_are_found() -> None:
    names = Names(renames=((r"^model\.", "transformer."), (r"layers\.(\d+)", r"h.\1")))
    target = "model.layers.3.self_attn.qkv_proj.weight"
    assert names.whole(target) == "transformer.h.3.self_attn.qkv_proj.weight"
    parts = names.parts(target, 3)
    assert parts is not None
    assert parts[1] == "transformer.h.3.self_attn.k_proj.weight"
    assert names.whole("lm_head.weight") == "lm_head.weight"


def test_rules_of_a_model_come_on_top_of_the_defaults() -> None:
    rule = SkipRule(pattern=r"mtp\..*", reason="the model has no such layer")
    names = Names.of({"qkv_proj": ["c_attn"], "experts": ["w1", "w3"]}, [rule])
    assert names.fused == {
        "qkv_proj": ("c_attn",),
        "gate_up_proj": ("gate_proj", "up_proj"),
        "experts": ("w1", "w3"),
    }
    assert names.skips == (*DEFAULT_SKIPS, rule)
    assert dict(DEFAULT_FUSED)["qkv_proj"] == ("q_proj", "k_proj", "v_proj")
    assert Names.of() == Names()


@pytest.mark.parametrize(
    ("tensor", "is_skipped"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("rotary_emb.inv_freq", True),
        ("rotary_emb.inv_freq_scale", False),
        ("my_rotary_emb.inv_freq", False),
        ("model.norm.weight", False),
    ],
    ids=str,
)
def test_skipped(tensor: str, is_skipped: bool) -> None:
    rule = Names().skipped_by(tensor)
    assert rule == (DEFAULT_SKIPS[0] if is_skipped else None)


def test_the_first_rule_that_matches_gives_the_reason() -> None:
    rules = [SkipRule(pattern=p, reason=p) for p in ("other", r"mtp\..*", ".*")]
    found = Names(skips=tuple(rules)).skipped_by("mtp.fc.weight")
    assert found is rules[1]


def test_a_rule_of_another_number_of_parts() -> None:
    with pytest.raises(DeclarationError) as caught:
        Names().parts("mlp.gate_up_proj.weight", 3)
    assert str(caught.value) == (
        "mlp.gate_up_proj.weight: has 3 parts, the naming rule for 'gate_up_proj' names 2: "
        "gate_proj, up_proj."
    )


def test_a_skip_rule_that_cannot_be() -> None:
    with pytest.raises(DeclarationError) as caught:
        SkipRule(pattern="mtp.(", reason="")
    assert str(caught.value) == (
        "skip rule: 'mtp.(' is no regular expression: missing ), unterminated subpattern at "
        "position 4."
    )


@pytest.mark.parametrize(
    ("rename", "fact"),
    [
        (("(", ""), "missing ), unterminated subpattern at position 0"),
        (("a", r"\2"), "invalid group reference 2 at position 1"),
        (("a", r"\g<x>"), "unknown group name 'x'"),
    ],
    ids=str,
)
def test_a_rename_that_cannot_be(rename: tuple[str, str], fact: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        Names(renames=(rename,))
    pair = f"({rename[0]!r}, {rename[1]!r})"
    assert str(caught.value) == f"rename rule: {pair} cannot be: {fact}."


def test_the_spelling_of_the_file_chooses_the_rules() -> None:
    other = Names(renames=((r"\.w2\.", ".down_proj."),))
    another = Names(renames=((r"^model\.", ""),))
    names = Names(others=((r".*\.down_proj\..*", other), (r"layers\..*", another)))
    assert names.fitting(["model.layers.0.w2.weight"]) is names
    assert names.fitting(["model.norm.weight", "model.layers.0.down_proj.qweight"]) is other
    assert names.fitting({"layers.0.w2.weight": None}) is another
    assert names.fitting(["layers.0.down_proj.weight"]) is other
    assert Names().fitting([]) == Names()


def test_a_spelling_that_cannot_be() -> None:
    with pytest.raises(DeclarationError) as caught:
        Names(others=(("(", Names()),))
    assert str(caught.value) == (
        "other names: '(' is no regular expression: missing ), unterminated subpattern at "
        "position 0."
    )
