"""What the layers share: the guard, copies, moves between devices, updates."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lading.errors import ConflictError, DeclarationError, NotLoadedError
from lading.nn import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    check_loaded,
    start_load,
)
from lading.parameter import BasevLLMParameter, ModelWeightParameter
from lading.ranks import Ranks, as_current

from .made import numbered


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(6, 2, 4, 2, False)
        self.o_proj = RowParallelLinear(8, 6)


def loaded(*, but: str = "") -> Attention:
    model = Attention()
    weight = model.qkv_proj.weight
    for part, rows in (("q", 8), ("k", 4), ("v", 4)):
        if part != but:
            weight.weight_loader(weight, numbered(rows, 6), part)
    model.o_proj.weight.weight_loader(model.o_proj.weight, numbered(6, 8))
    assert model.o_proj.bias is not None
    model.o_proj.bias.weight_loader(model.o_proj.bias, numbered(6))
    return model


@pytest.mark.parametrize(
    ("part", "box"), [("q", "[0:8, 0:6]"), ("k", "[8:12, 0:6]"), ("v", "[12:16, 0:6]")]
)
def test_a_part_that_was_never_loaded(part: str, box: str) -> None:
    model = loaded(but=part)
    text = (
        f"qkv_proj.weight, part {part!r}: elements {box} of [16, 6] were never loaded, "
        "needs all of them."
    )
    with pytest.raises(NotLoadedError) as caught:
        check_loaded(model)
    assert str(caught.value) == text
    with pytest.raises(NotLoadedError) as caught:
        model.qkv_proj(torch.ones(1, 6))
    assert str(caught.value) == text
    with pytest.raises(NotLoadedError):
        model.qkv_proj.process_weights_after_loading()


def test_all_loaded() -> None:
    model = loaded()
    check_loaded(model)
    assert model.qkv_proj(torch.ones(3, 6))[0].shape == (3, 16)
    model.qkv_proj.process_weights_after_loading()


def test_meta_is_not_loaded() -> None:
    with torch.device("meta"):
        model = Attention()
    with pytest.raises(NotLoadedError) as caught:
        check_loaded(model)
    assert str(caught.value) == ("qkv_proj.weight: has no memory yet (it is on the meta device).")


def test_new_bytes_need_a_new_load() -> None:
    model = loaded()
    weight = model.qkv_proj.weight
    new = -numbered(4, 6)
    with pytest.raises(ConflictError) as caught:
        weight.weight_loader(weight, new, "k")
    assert str(caught.value) == (
        "qkv_proj.weight, part 'k': elements [8:12, 0:6] were loaded before, with other bytes. "
        "Try: lading.start_load(model) before loading new weights into a loaded model."
    )
    weight.weight_loader(weight, numbered(4, 6), "k")  # the same bytes again are no conflict
    start_load(model)
    weight.weight_loader(weight, new, "k")
    assert torch.equal(weight[8:12].double(), new)
    with pytest.raises(NotLoadedError, match="part 'q'"):
        check_loaded(model)


LAYERS: list[Any] = [
    lambda: ReplicatedLinear(6, 4),
    lambda: ColumnParallelLinear(6, 4),
    lambda: MergedColumnParallelLinear(6, [4, 2]),
    lambda: QKVParallelLinear(6, 2, 4, 2),
    lambda: RowParallelLinear(6, 4),
    lambda: VocabParallelEmbedding(11, 6),
    lambda: ParallelLMHead(11, 6, bias=True),
]


@pytest.mark.parametrize("make", LAYERS)
def test_memory_from_meta_keeps_classes_objects_and_layouts(make: Any) -> None:
    with torch.device("meta"), as_current(Ranks(tp_rank=1, tp_size=2)):
        layer = make()
    before = dict(layer.named_parameters())
    layer.to_empty(device="cpu")
    for name, param in layer.named_parameters():
        assert param is before[name]
        assert isinstance(param, BasevLLMParameter)
        assert type(param) is not BasevLLMParameter or name == "bias"
        assert param.device.type == "cpu"
        assert not param.requires_grad
        assert param.tp_layout is not None
        assert param.tp_layout.local_shape == tuple(param.shape)
        assert (param.tp_rank, param.tp_size) == (1, 2)
    layer.to(torch.float64)
    assert {type(p) for p in layer.parameters()} == {type(p) for p in before.values()}
    assert {p.dtype for p in layer.parameters()} == {torch.float64}


def test_memory_for_a_parameter_that_somebody_watches() -> None:
    import weakref

    with torch.device("meta"):
        layer = ColumnParallelLinear(6, 4, False)
    watched = weakref.ref(layer.weight)  # torch swaps no tensor that has one
    layer.to_empty(device="cpu")
    assert watched() is not layer.weight
    assert type(layer.weight) is ModelWeightParameter
    assert layer.weight.device.type == "cpu"
    layer.weight.weight_loader(layer.weight, numbered(4, 6))
    assert torch.equal(layer.weight.double(), numbered(4, 6))


@pytest.mark.parametrize("make", LAYERS)
def test_state_dict(make: Any) -> None:
    layer = make()
    with torch.no_grad():  # fresh memory may hold NaN, which equals nothing
        for param in layer.parameters():
            param.copy_(numbered(*param.shape))
    has_bias = layer.bias is not None
    assert list(layer.state_dict()) == (["weight", "bias"] if has_bias else ["weight"])
    other = make()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)


def test_a_copy_loads_itself() -> None:
    model = loaded()
    other = copy.deepcopy(model)
    assert type(other.qkv_proj.weight) is ModelWeightParameter
    assert other.qkv_proj.weight.weight_loader.__self__ is other.qkv_proj
    assert torch.equal(other.qkv_proj.weight, model.qkv_proj.weight)
    new = -numbered(8, 6)
    other.qkv_proj.weight.weight_loader(other.qkv_proj.weight, new, "q")
    assert torch.equal(other.qkv_proj.weight[:8].double(), new)
    assert torch.equal(model.qkv_proj.weight[:8].double(), -new)
    check_loaded(model)


def test_pickle() -> None:
    layer = loaded().o_proj
    other = pickle.loads(pickle.dumps(layer))
    assert type(other.weight) is ModelWeightParameter
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other(torch.ones(2, 8))[0], layer(torch.ones(2, 8))[0])


def test_a_foreign_quant_config() -> None:
    with pytest.raises(DeclarationError) as caught:
        ColumnParallelLinear(6, 4, quant_config={"bits": 4}, prefix="up")
    assert str(caught.value) == (
        "up: quant_config is dict, needs a QuantConfig (lading.schemes.quant_config_of)."
    )


class Doubling:
    """A kernel that holds its weights doubled, and halves them in the product."""

    def __init__(self, *, has_inverse: bool) -> None:
        self.unpack = self._halve if has_inverse else None

    def pack(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data * 2

    def _halve(self, layer: Any) -> None:
        layer.weight.data = layer.weight.data / 2

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight / 2, bias)


def test_an_engines_kernel_and_the_way_back() -> None:
    layer = loaded().o_proj
    x, stored = torch.ones(2, 8), layer.weight.detach().clone()
    expected = layer(x)[0]
    layer.process_weights_after_loading(Doubling(has_inverse=True))
    assert torch.equal(layer.weight, stored * 2)
    assert torch.equal(layer(x)[0], expected)
    layer.restore_weights()
    assert torch.equal(layer.weight, stored)
    assert torch.equal(layer(x)[0], expected)
    layer.prefix = "o_proj"
    layer.process_weights_after_loading(Doubling(has_inverse=False))
    with pytest.raises(DeclarationError) as caught:
        layer.restore_weights()
    assert str(caught.value) == (
        "o_proj: Doubling declares no inverse, needs a new load to get the stored weights back."
    )
    assert torch.equal(layer(x)[0], expected)


@pytest.mark.parametrize("size", [1, 2])
def test_dequantized_weight_of_a_dense_layer(size: int) -> None:
    layer = VocabParallelEmbedding(11, 6, torch.bfloat16, ranks=Ranks(tp_size=size))
    table = numbered(11, 6).bfloat16()
    layer.weight.weight_loader(layer.weight, table)
    assert layer.dequantized_weight().dtype is torch.float32
    assert torch.equal(layer.dequantized_weight()[:11], table.float())
    assert torch.equal(layer.dequantized_part(None), table.float())
