"""Declarations: what is declared is what is built, what transformers has, and what divides."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lading.checkpoint import Source
from lading.errors import CallError, LayoutError, PlanError
from lading.models import FAMILIES, build, declare, parse_config, targets, tp_sizes
from lading.plan import Target, make_plan
from lading.ranks import all_ranks

from .made import CASES, COMMON, Case, oracle, over_cases

BY_ID = {case.id: case for case in CASES}


@over_cases
@pytest.mark.parametrize("tp_size", [1, 2, 3, 6])
def test_built_as_declared(case: Case, tp_size: int) -> None:
    """Names, order, local shapes, dtypes, layouts and aliases of the built model."""
    config = parse_config(case.raw())
    if tp_size not in tp_sizes(config):
        with pytest.raises(PlanError):
            targets(declare(config), tp_size, "BF16")
        return
    declared = targets(declare(config), tp_size, "BF16")
    for ranks in all_ranks(tp_size):
        model = build(config, ranks, dtype=torch.bfloat16)
        names: dict[int, list[str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        built = [
            Target(
                name=names[id(param)][0],
                layout=param.tp_layout,
                dtype={torch.bfloat16: "BF16"}[param.dtype],
                aliases=tuple(names[id(param)][1:]),
            )
            for param in model.parameters()
        ]
        assert sorted(built, key=str) == sorted(declared, key=str)
        for param, target in zip(model.parameters(), built, strict=True):
            assert tuple(param.shape) == target.layout.local_shape
        assert not list(model.buffers())


@over_cases
def test_plans_against_the_tensors_of_transformers(case: Case) -> None:
    """Every tensor of a saved model is used, none is missing, at every TP size that works."""
    config = parse_config(case.raw())
    state = oracle(case).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    sources = {
        name: Source(
            name=name,
            dtype="F32",
            shape=tuple(t.shape),
            file="model.safetensors",
            offset_bytes=0,
            num_bytes=t.nbytes,
        )
        for name, t in state.items()
    }
    for tp_size in tp_sizes(config):
        plan = make_plan(
            targets(declare(config), tp_size, "BF16"),
            sources,
            ranks=all_ranks(tp_size),
            names=FAMILIES[config.family].names,
        )
        assert set(plan.sources) == set(state)


def test_equal_layers_share_their_layout() -> None:
    found = targets(declare(parse_config(BY_ID["llama-biases-tied"].raw())), 3, "BF16")
    by_name = {target.name: target for target in found}
    for leaf in ("self_attn.qkv_proj.weight", "mlp.down_proj.bias", "input_layernorm.weight"):
        first, second = (by_name[f"model.layers.{i}.{leaf}"].layout for i in (0, 1))
        assert first is second
    assert by_name["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
    assert "lm_head.weight" not in by_name


def test_what_does_not_divide_is_said_for_every_layer() -> None:
    with pytest.raises(PlanError) as caught:
        targets(declare(parse_config(BY_ID["llama"].raw())), 4, "BF16")
    assert all(isinstance(problem, LayoutError) for problem in caught.value.problems)
    half = "into 4 equal pieces: 66 = 4 * 16 + 2. Try: TP 1, 2, 3 or 6."
    lines = ["TP 4 has 6 problems:"]
    for path in ("model.layers.0", "model.layers.1"):
        lines += [
            f"  {path}.self_attn.qkv_proj, part 'q': TP 4 does not cut 6 q heads into 4 equal "
            "pieces: 6 = 4 * 1 + 2. Try: TP 1, 2 or 6.",
            f"  {path}.mlp.gate_up_proj, part 0: TP 4 does not cut 66 rows {half}",
            f"  {path}.mlp.down_proj: TP 4 does not cut 66 columns {half}",
        ]
    assert str(caught.value) == "\n".join(lines)


def test_tp_sizes() -> None:
    assert tp_sizes(parse_config(BY_ID["llama"].raw())) == (1, 2, 6)
    assert tp_sizes(parse_config(BY_ID["llama"].raw()), up_to=2) == (1, 2)
    raw = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
    }
    assert tp_sizes(parse_config(raw)) == (1, 2, 4, 8, 16, 32, 64)


def test_vocabulary_padding_is_declared() -> None:
    config = parse_config(COMMON | {"model_type": "llama"})
    embedding = targets(declare(config), 3, "F32")[0]
    assert embedding.layout.local_shape == (64, 48)
    embedding = targets(declare(config, pad_vocab_to=1), 3, "F32")[0]
    assert embedding.layout.local_shape == (34, 48)


def test_calls_that_cannot_be_meant() -> None:
    declaration = declare(parse_config(COMMON | {"model_type": "llama"}))
    with pytest.raises(CallError) as caught:
        targets(declaration, 0, "BF16")
    assert str(caught.value) == "targets: tp_size is 0, needs an int of at least 1."
    with pytest.raises(CallError, match="targets: dtype is 'bfloat16', needs one of BOOL"):
        targets(declaration, 1, "bfloat16")


def test_sizes_are_written_once() -> None:
    """A block more is a block more everywhere."""
    config = parse_config(BY_ID["qwen3"].raw())
    longer = replace(config, num_layers=3, sliding_windows=(None,) * 3)
    extra = len(declare(longer).entries) - len(declare(config).entries)
    assert extra == 8
    assert len(list(build(longer, dtype=torch.float32).model.layers)) == 3


def test_no_torch_is_needed_to_declare() -> None:
    code = (
        "import sys\n"
        "from lading.models import declare, parse_config, targets, tp_sizes\n"
        f"config = parse_config({COMMON | {'model_type': 'llama'}!r})\n"
        "targets(declare(config), 2, 'BF16'), tp_sizes(config)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
