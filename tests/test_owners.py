"""Qualified names: given by whoever has the model, else searched while a message is made."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import nn

from lading.errors import ShapeError
from lading.owners import Walk, name_of, name_parameters
from lading.parameter import BasevLLMParameter, ModelWeightParameter


def weight() -> ModelWeightParameter:
    return ModelWeightParameter(
        data=torch.zeros(2, 2), input_dim=1, output_dim=0, weight_loader=None
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Module()
        self.qkv_proj.register_parameter("weight", weight())


class Model(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(num_layers))
        self.register_module("absent", None)
        self.register_parameter("none", None)


def message(param: ModelWeightParameter) -> str:
    with pytest.raises(ShapeError) as caught:
        param.load_column_parallel_weight(torch.zeros(3, 2))
    return str(caught.value)


NEEDS = "tensor is fp32[3, 2], needs fp32[2, 2] (the parameter's shape)."


def test_a_model_that_nobody_named() -> None:
    one, two = Model(), Model(5)
    assert message(one.layers[1].qkv_proj.weight) == f"layers.1.qkv_proj.weight: {NEEDS}"
    assert message(two.layers[4].qkv_proj.weight) == f"layers.4.qkv_proj.weight: {NEEDS}"
    assert name_of(two.layers[0].qkv_proj.weight) == "layers.0.qkv_proj.weight"


def test_names_are_not_kept_by_a_search() -> None:
    model = Model()
    param = model.layers[0].qkv_proj.weight
    assert name_of(param) == "layers.0.qkv_proj.weight"
    outer = nn.Module()
    outer.model = model
    assert name_of(param) == "model.layers.0.qkv_proj.weight"
    del outer
    gc.collect()
    assert name_of(param) == "layers.0.qkv_proj.weight"


def test_a_parameter_in_no_model() -> None:
    assert message(weight()) == f"ModelWeightParameter: {NEEDS}"
    assert name_of(nn.Parameter(torch.zeros(1))) == "Parameter"
    assert name_of(torch.zeros(1)) == "Tensor"
    assert name_of(nn.Linear(1, 1).weight) == "weight"


def test_named_models() -> None:
    model = Model()
    name_parameters(model, "language_model")
    param = model.layers[0].qkv_proj.weight
    assert message(param) == f"language_model.layers.0.qkv_proj.weight: {NEEDS}"
    name_parameters(model)
    assert param.qualified_name == "layers.0.qkv_proj.weight"


def test_a_tied_parameter_keeps_its_first_name() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Module(), nn.Module()
    tied = weight()
    model.head.weight = tied
    model.embed.weight = tied
    name_parameters(model)
    assert name_of(tied) == "embed.weight"
    unnamed = nn.Module()
    unnamed.one, unnamed.two = nn.Module(), nn.Module()
    both = weight()
    unnamed.one.weight = unnamed.two.weight = both
    assert name_of(both) in ("one.weight", "two.weight")


def test_plain_parameters_take_no_attribute() -> None:
    model = nn.Linear(2, 2)
    name_parameters(model)
    assert "qualified_name" not in vars(model.weight)


def test_modules_in_a_circle() -> None:
    one, two = nn.Module(), nn.Module()
    one.two = two
    two.__dict__["_modules"]["one"] = one
    two.weight = weight()
    assert name_of(two.weight).endswith("two.weight")
    del two._modules["one"]


def test_the_name_is_in_the_error() -> None:
    model = Model()
    param = model.layers[0].qkv_proj.weight
    with pytest.raises(ShapeError) as caught:
        param.load_column_parallel_weight(torch.zeros(3, 2))
    assert caught.value.subject == "layers.0.qkv_proj.weight"
    assert caught.value.to_dict()["subject"] == "layers.0.qkv_proj.weight"


def test_searching_while_others_build_models() -> None:
    stop = threading.Event()

    def build() -> None:
        while not stop.is_set():
            Model(3)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        model = Model()
        for _ in range(5):
            assert name_of(model.layers[1].qkv_proj.weight) == "layers.1.qkv_proj.weight"
    finally:
        stop.set()
        thread.join()


def test_a_base_parameter_of_a_buffer_like_holder() -> None:
    holder = nn.ParameterList([BasevLLMParameter(data=torch.zeros(1), weight_loader=None)])
    assert name_of(holder[0]) == "0"


def test_one_walk_is_what_torch_walks() -> None:
    model = Model()
    model.register_module("again", model.layers[0])  # one module, and its tensors, in two places
    model.layers[1].register_buffer("kept", torch.zeros(1))
    model.layers[1].register_buffer("passing", torch.zeros(1), persistent=False)
    model.layers[1].register_buffer("none", None)
    model.extra = nn.Parameter(torch.zeros(1))
    walk = Walk(model)
    assert walk.modules == list(model.named_modules(remove_duplicate=False))
    wanted = model.named_parameters(remove_duplicate=False)
    assert [(n, id(p)) for n, p in walk.params] == [(n, id(p)) for n, p in wanted]
    assert [name for name, _ in walk.buffers] == ["layers.1.kept"]
    assert {n for n, _ in walk.params + walk.buffers} == set(model.state_dict())


def test_a_walk_below_a_prefix() -> None:
    model = Model()
    wanted = model.named_parameters(prefix="outer")
    assert [name for name, _ in Walk(model, "outer").params] == [name for name, _ in wanted]


def test_a_shared_parameter_keeps_its_first_name() -> None:
    model = Model()
    model.register_module("again", model.layers[1])
    name_parameters(model)
    assert name_of(model.layers[1].qkv_proj.weight) == "layers.1.qkv_proj.weight"


def test_names_of_modules_that_hold_one_another() -> None:
    """A child that knows its parent: torch's own walk comes to an end, and so does this one."""
    model = Model()
    model.layers[0].parent = model
    name_parameters(model)
    assert name_of(model.layers[1].qkv_proj.weight) == "layers.1.qkv_proj.weight"
