"""Declarations: what is declared is what is built, what transformers has, and what divides."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from lading.checkpoint import Source
from lading.errors import CallError, LayoutError, PlanError
from lading.models import FAMILIES, build, declare, parse_config, targets, tp_sizes
from lading.plan import Target, make_plan
from lading.ranks import all_ranks

from .made import CASES, COMMON, Case, oracle, over_cases, stored

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


def sources_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Source]:
    """The headers of float32 tensors of these shapes."""
    return {
        name: Source(
            name=name,
            dtype="F32",
            shape=tuple(t.shape),
            file="model.safetensors",
            offset_bytes=0,
            num_bytes=t.nbytes,
        )
        for name, t in tensors.items()
    }


@over_cases
def test_plans_against_the_tensors_of_transformers(case: Case) -> None:
    """Every tensor of a saved model is used, none is missing, at every TP size that works."""
    config = parse_config(case.raw())
    sources = sources_of(stored(oracle(case)))
    for tp_size in tp_sizes(config):
        plan = make_plan(
            targets(declare(config), tp_size, "BF16"),
            sources,
            ranks=all_ranks(tp_size),
            names=FAMILIES[config.family].names,
        )
        assert set(plan.sources) == set(sources)


# What other tools make of "block_sparse_moe.experts.0.w1", w2 and w3 of a Mixtral checkpoint.
SPELLINGS = {
    "llmcompressor": "block_sparse_moe.experts.{}.{}",
    "gptqmodel": "mlp.experts.{}.{}",
}


@pytest.mark.parametrize("tool", SPELLINGS)
def test_mixtral_in_the_spelling_of_other_tools(tool: str) -> None:
    case = BY_ID["mixtral"]
    spelt = {}
    for name, tensor in stored(oracle(case)).items():
        head, _, rest = name.partition("block_sparse_moe.experts.")
        if rest:
            expert, module, leaf = rest.split(".")
            module = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[module]
            name = f"{head}{SPELLINGS[tool].format(expert, module)}.{leaf}"
        elif tool == "gptqmodel":
            name = name.replace("block_sparse_moe", "mlp")
        spelt[name] = tensor
    sources = sources_of(spelt)
    plan = make_plan(
        targets(declare(parse_config(case.raw())), 2, "BF16"),
        sources,
        ranks=all_ranks(2),
        names=FAMILIES["mixtral"].names.fitting(sources),
    )
    assert set(plan.sources) == set(spelt)
    by_part = {(binding.target, binding.part): binding.source for binding in plan.bindings}
    experts = SPELLINGS[tool].format(2, "{}_proj")
    target = "model.layers.1.block_sparse_moe.experts.2.gate_up_proj.weight"
    assert by_part[target, 0] == f"model.layers.1.{experts.format('gate')}.weight"
    assert by_part[target, 1] == f"model.layers.1.{experts.format('up')}.weight"


def test_experts_stored_side_by_side_are_no_surplus_in_silence() -> None:
    """As transformers 5 has them in memory: not read yet, and said so."""
    case = BY_ID["qwen3-moe"]
    with pytest.raises(PlanError) as caught:
        make_plan(
            targets(declare(parse_config(case.raw())), 1, "BF16"),
            sources_of(oracle(case).state_dict()),
            ranks=all_ranks(1),
            names=FAMILIES["qwen3_moe"].names,
        )
    text = "\n".join(map(str, caught.value.problems))
    assert "model.layers.0.mlp.experts.4.down_proj.weight" in text
    assert (
        "model.layers.1.mlp.experts.gate_up_proj: checkpoint tensor fp32[5, 36, 48] belongs to no "
        "parameter, and no rule skips it. In model.safetensors."
    ) in text


def test_a_model_of_many_experts_is_declared_at_once() -> None:
    """Each distinct layout is worked out once: 12 627 entries, 77 ms on one core."""
    raw = {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
    }
    config = parse_config(raw)
    start = time.process_time()
    found = targets(declare(config), 8, "BF16")
    assert time.process_time() - start < 1
    assert len(found) == 48 * (2 * 128 + 7) + 3
    assert len({id(target.layout) for target in found}) == 8


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
