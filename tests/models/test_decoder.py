"""The decoder against transformers: logits to 1e-5 in fp32, on one rank and on several."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lading.errors import CallError, ConfigError, LayoutError
from lading.models import CausalLM, build, parse_config, tp_sizes
from lading.ranks import Ranks, all_ranks

from .made import (
    CASES,
    Case,
    Together,
    fill,
    ids,
    loaded,
    logits_of_ranks,
    oracle,
    over_cases,
    stored,
)

BY_ID = {case.id: case for case in CASES}


@over_cases
def test_logits(case: Case) -> None:
    reference = oracle(case)
    model = loaded(case, stored(reference), Ranks())
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids(case)), reference(ids(case)).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("case", "tp_size"),
    [
        pytest.param(case, tp_size, id=f"{case.id}-{tp_size}")
        for case in CASES
        for tp_size in tp_sizes(parse_config(case.raw()), up_to=6)
        if tp_size > 1
    ],
)
def test_logits_of_ranks(case: Case, tp_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = oracle(case)
    models = [loaded(case, stored(reference), ranks) for ranks in all_ranks(tp_size)]
    expected = reference(ids(case)).logits.detach()
    for found in logits_of_ranks(models, ids(case), monkeypatch):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_position_ids_turn_the_heads() -> None:
    case = BY_ID["phi3-longrope-long"]
    reference = oracle(case)
    model = loaded(case, stored(reference), Ranks())
    for positions in (torch.arange(17) + 3, torch.arange(17) + 30):
        with torch.no_grad():
            expected = reference(ids(case), position_ids=positions.unsqueeze(0)).logits
            found = model(ids(case), positions.unsqueeze(0))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_lengths_change_the_frequencies_and_back() -> None:
    """A short sequence after a long one has the short one's frequencies again."""
    case = BY_ID["llama-dynamic"]
    reference = oracle(case)
    model = loaded(case, stored(reference), Ranks())
    for length in (5, 19, 7, 12):
        some = ids(case)[:, :length]
        fresh = oracle(case)
        with torch.no_grad():
            torch.testing.assert_close(model(some), fresh(some).logits, rtol=1e-5, atol=1e-5)


def test_bf16() -> None:
    case = BY_ID["qwen3"]
    reference = oracle(case).to(torch.bfloat16)
    model = CausalLM(parse_config(case.raw()), dtype=torch.bfloat16)
    fill(model, stored(reference))
    with torch.no_grad():
        found, expected = model(ids(case)), reference(ids(case)).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_meta_then_memory_keeps_the_tie_and_the_loaders() -> None:
    case = BY_ID["qwen2-tied"]
    reference = oracle(case)
    model = build(parse_config(case.raw()), dtype=torch.float32)
    assert {param.device.type for param in model.parameters()} == {"meta"}
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    again = loaded(case, stored(reference), Ranks())
    for (name, param), (other, filled) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == other
        assert type(param) is type(filled)
        assert param.tp_layout == filled.tp_layout
        param.data.copy_(filled.data)
    with torch.no_grad():
        torch.testing.assert_close(model(ids(case)), again(ids(case)))


def test_a_tied_head_on_the_cpu_has_one_tensor() -> None:
    model = CausalLM(parse_config(BY_ID["qwen2-tied"].raw()), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_more_ranks_than_kv_heads() -> None:
    model = build(
        parse_config(BY_ID["llama"].raw()), Ranks(tp_rank=4, tp_size=6), dtype=torch.bfloat16
    )
    attention = model.model.layers[0].self_attn
    assert (attention.num_heads, attention.num_kv_heads) == (1, 1)


def test_heads_that_do_not_divide() -> None:
    config = parse_config(BY_ID["llama"].raw())
    with pytest.raises(LayoutError) as caught:
        CausalLM(config, ranks=Ranks(tp_size=4), dtype=torch.float32)
    assert str(caught.value) == (
        "model.layers.0.self_attn.qkv_proj, part 'q': TP 4 does not cut 6 q heads into 4 equal "
        "pieces: 6 = 4 * 1 + 2. Try: TP 1, 2 or 6."
    )


def test_quantised_weights_need_their_headers() -> None:
    raw = {**BY_ID["llama"].raw(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ConfigError) as caught:
        CausalLM(parse_config(raw), dtype=torch.float32)
    assert str(caught.value) == (
        "quantization_config: is there (quant_method 'gptq'), needs a quant_config that knows the "
        "headers (lading.schemes.quant_config_of, as from_pretrained does)."
    )


def test_shapes_of_inputs() -> None:
    model = CausalLM(parse_config(BY_ID["llama"].raw()), dtype=torch.float32)
    with pytest.raises(CallError) as caught:
        model(torch.zeros(5, dtype=torch.long))
    assert str(caught.value) == "forward: input_ids have shape [5], needs [B, S]."
    with pytest.raises(CallError) as caught:
        model(torch.zeros(2, 5, dtype=torch.long), torch.zeros(5, dtype=torch.long))
    assert str(caught.value) == (
        "forward: position_ids have shape [5], needs [2, 5] (as input_ids)."
    )


def test_a_layer_of_experts_is_summed_over_the_ranks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not expert by expert: the sum is over attention, experts and embedding."""
    case = BY_ID["qwen3-moe"]
    checkpoint = stored(oracle(case))
    models = [loaded(case, checkpoint, ranks) for ranks in all_ranks(2)]
    experts = models[0].model.layers[0].mlp.experts
    assert not any(expert.down_proj.reduce_results for expert in experts)
    sums: list[torch.Size] = []

    class Counting(Together):
        def all_reduce(self, tensor: torch.Tensor, ranks: Ranks, group: object) -> torch.Tensor:
            if ranks.tp_rank == 0:
                sums.append(tensor.shape)
            return super().all_reduce(tensor, ranks, group)

    logits_of_ranks(models, ids(case), monkeypatch, Counting(2))
    each_layer = [torch.Size([2, 19, 48]), torch.Size([38, 48])]
    assert sums == [torch.Size([2, 19, 48]), *each_layer * 2]


def test_experts_without_a_token() -> None:
    case = BY_ID["qwen3-moe"]
    reference = oracle(case)
    model = loaded(case, stored(reference), Ranks())
    some = ids(case)[:1, :1]
    with torch.no_grad():
        torch.testing.assert_close(model(some), reference(some).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_bf16_of_experts(name: str) -> None:
    """Close to fp32 where no rounding sends a token to another expert: to all of them, here."""
    case = BY_ID[name]
    all_experts = replace(case, keys={**case.keys, "num_experts_per_tok": 3, "num_experts": 3})
    if name == "mixtral":
        del all_experts.keys["num_experts"]
    reference = oracle(all_experts).to(torch.bfloat16)
    model = CausalLM(parse_config(all_experts.raw()), dtype=torch.bfloat16)
    fill(model, stored(reference))
    with torch.no_grad():
        found, expected = model(ids(case)), reference(ids(case)).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
