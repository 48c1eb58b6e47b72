"""What any nn.Parameter can do, and the state that callers of the classes rely on."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lading.parameter
from lading.parameter import (
    BasevLLMParameter,
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
    SharedWeightParameter,
    _ColumnvLLMParameter,
    set_lazy_view_device,
)
from lading.ranks import Ranks, as_current

from .made import ALL, bits, make, numbered, poisoned

FREE = (
    "quant_method",
    "is_transposed",
    "scale_type",
    "pack_factor",
    "needs_scalar_to_array",
    "is_sharded_weight",
    "shard_id",
    "param_name",
)


class Linear(nn.Module):
    """As engines write it: the layer's bound method is the loader of its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = ModelWeightParameter(
            data=torch.zeros(2, 3), input_dim=1, output_dim=0, weight_loader=self.load
        )
        self.num_loads = 0

    def load(self, param: ModelWeightParameter, loaded_weight: torch.Tensor) -> None:
        self.num_loads += 1
        param.load_column_parallel_weight(loaded_weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Linear(), Linear()
        self.tied = self.one


def test_the_public_names() -> None:
    assert set(lading.parameter.__all__) == {
        "BasevLLMParameter",
        "BlockQuantScaleParameter",
        "ChannelQuantScaleParameter",
        "GroupQuantScaleParameter",
        "ModelWeightParameter",
        "PackedColumnParameter",
        "PackedvLLMParameter",
        "PerTensorScaleParameter",
        "RowvLLMParameter",
        "SharedWeightParameter",
        "_ColumnvLLMParameter",
        "_adjust_shard_indexes_for_marlin",
        "_adjust_shard_indexes_for_packing",
        "load_part",
        "permute_param_layout_",
        "set_lazy_view_device",
    }
    assert all(hasattr(lading.parameter, name) for name in lading.parameter.__all__)


@pytest.mark.parametrize("cls", [*ALL, SharedWeightParameter])
def test_subclass_relations(cls: type[Any]) -> None:
    both = {
        ModelWeightParameter,
        GroupQuantScaleParameter,
        BlockQuantScaleParameter,
        PackedvLLMParameter,
    }
    column = {_ColumnvLLMParameter, ChannelQuantScaleParameter, PackedColumnParameter} | both
    assert issubclass(cls, BasevLLMParameter)
    assert issubclass(cls, _ColumnvLLMParameter) == (cls in column)
    assert issubclass(cls, RowvLLMParameter) == (cls in both | {RowvLLMParameter})
    assert issubclass(cls, ModelWeightParameter) == (
        cls in {ModelWeightParameter, PackedvLLMParameter}
    )
    assert issubclass(cls, PackedColumnParameter) == (cls is PackedColumnParameter)
    if cls is not SharedWeightParameter:
        param = make(cls, torch.zeros(2, 2))
        assert isinstance(param, nn.Parameter)
        assert type(param) is cls
        exact = {RowvLLMParameter, BasevLLMParameter}
        assert (type(param) in exact) == (cls in exact)


@pytest.mark.parametrize("keywords", list(itertools.permutations(range(5), 5))[::7])
def test_keywords_in_any_order(keywords: tuple[int, ...]) -> None:
    facts: list[tuple[str, Any]] = [
        ("data", torch.zeros(2, 2, dtype=torch.int32)),
        ("weight_loader", None),
        ("input_dim", 0),
        ("output_dim", 1),
        ("packed_dim", 0),
    ]
    param = PackedvLLMParameter(
        **dict(facts[i] for i in keywords), packed_factor=Fraction(32, 3), marlin_tile_size=16
    )
    assert (param.input_dim, param.output_dim, param.packed_dim) == (0, 1, 0)
    assert (param.packed_factor, param.marlin_tile_size) == (Fraction(32, 3), 16)
    assert param.weight_loader is None


@pytest.mark.parametrize("keyword", ["output_dim", "input_dim", "packed_dim", "packed_factor"])
def test_a_missing_constructor_keyword(keyword: str) -> None:
    facts: dict[str, Any] = {"output_dim": 0, "input_dim": 1, "packed_dim": 0, "packed_factor": 8}
    del facts[keyword]
    with pytest.raises(TypeError, match=keyword):
        PackedvLLMParameter(data=torch.zeros(2, 2), weight_loader=None, **facts)
    with pytest.raises(TypeError, match="output_dims"):
        ModelWeightParameter(data=torch.zeros(2, 2), input_dim=0, output_dim=0, output_dims=1)


@pytest.mark.parametrize("cls", ALL)
def test_state_and_properties(cls: type[Any]) -> None:
    param = make(cls, torch.zeros(2, 2, dtype=torch.int32), packed_factor=4)
    for field in ("input_dim", "output_dim", "packed_dim", "packed_factor", "marlin_tile_size"):
        assert hasattr(param, field) == (f"_{field}" in vars(param))
        if hasattr(param, field):
            assert getattr(param, field) == vars(param)[f"_{field}"]
            with pytest.raises(AttributeError):
                setattr(param, field, 1)
            vars(param)[f"_{field}"] = 3  # callers change the backing field
            assert getattr(param, field) == 3
    assert vars(param)["_weight_loader"] is None
    assert not param.requires_grad
    for name in FREE:
        assert not hasattr(param, name)
        setattr(param, name, "mine")
        assert vars(param)[name] == "mine"
    assert not hasattr(cls, "__slots__")


def test_data_of_any_kind() -> None:
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.bfloat16):
        for num_dims in range(1, 5):
            for device in ("cpu", "meta"):
                data = torch.empty([2] * num_dims, dtype=dtype, device=device)
                param = GroupQuantScaleParameter(data=data, input_dim=0, output_dim=num_dims - 1)
                assert (param.dtype, param.dim(), param.device.type) == (dtype, num_dims, device)
                assert type(param.data) is torch.Tensor


def test_data_that_is_a_parameter_or_requires_grad() -> None:
    source = nn.Parameter(torch.ones(2))
    param = RowvLLMParameter(data=source, input_dim=0, weight_loader=None)
    assert not param.requires_grad
    assert param.data_ptr() == source.data_ptr()


def test_placeholders_are_filled_in_later() -> None:
    """Engines build parameters whose memory comes with `.data`."""
    param = PackedvLLMParameter(
        data=torch.empty(0), input_dim=0, output_dim=1, packed_dim=1, packed_factor=8
    )
    param.data = torch.zeros(2, 2, dtype=torch.int32)
    param.load_column_parallel_weight(torch.ones(2, 2, dtype=torch.int32))
    assert param.data.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "loader", [print, lambda *_: None, functools.partial(print, end=""), Linear().load]
)
def test_weight_loader(loader: Callable[..., Any]) -> None:
    param = BasevLLMParameter(data=torch.zeros(1), weight_loader=loader)
    assert param.weight_loader == loader
    param.weight_loader = None
    assert param.weight_loader is None
    del param.weight_loader
    assert not hasattr(param, "weight_loader")
    with pytest.raises(AttributeError, match="weight_loader of BasevLLMParameter was deleted"):
        _ = param.weight_loader
    param.weight_loader = loader
    assert param.weight_loader == loader


def test_a_loader_is_called_with_its_parameter() -> None:
    layer = Linear()
    layer.weight.weight_loader(layer.weight, torch.ones(2, 3))
    assert layer.num_loads == 1
    assert layer.weight.data.sum() == 6


def test_cloning_by_class_and_dict() -> None:
    """Engines keep a parameter's class and state over other memory: on meta, or materialised."""
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        old = PackedvLLMParameter(
            data=poisoned((2, 2), torch.int32),
            input_dim=0,
            output_dim=1,
            packed_dim=1,
            packed_factor=8,
            weight_loader=None,
        )
    old.load_column_parallel_weight(numbered((2, 4), torch.int32))
    for _ in range(3):
        new = torch.empty_like(old.data)
        new.__class__ = old.__class__
        new.__dict__ = old.__dict__.copy()
        assert type(new) is PackedvLLMParameter
        assert (new.packed_dim, new.packed_factor, new.tp_rank) == (1, 8, 1)
        # Memory that was never loaded takes any bytes, even at an address that was loaded before.
        new.load_column_parallel_weight(numbered((2, 4), torch.int32) + 1)
        assert new.data.tolist() == [[3, 4], [7, 8]]
        del new
    assert old.data.tolist() == [[2, 3], [6, 7]]
    assert old._ledger.missing(old, ()) is None
    new = nn.Parameter(old.data.to("meta"), requires_grad=False)
    new.__class__, new.__dict__ = old.__class__, dict(old.__dict__)
    new.load_column_parallel_weight(numbered((2, 4), torch.int32))
    assert old._ledger is not new._ledger


def test_state_dict() -> None:
    model = Model()
    model.one.weight.load_column_parallel_weight(numbered((2, 3), torch.float32))
    state = model.state_dict()
    assert {name: type(tensor) for name, tensor in state.items()} == {
        "one.weight": torch.Tensor,
        "two.weight": torch.Tensor,
        "tied.weight": torch.Tensor,
    }
    other = Model()
    other.load_state_dict(state)
    assert torch.equal(other.one.weight.data, numbered((2, 3), torch.float32))
    assert type(other.one.weight) is ModelWeightParameter
    kept = model.state_dict(keep_vars=True)["one.weight"]
    assert kept is model.one.weight


@pytest.mark.parametrize("cls", ALL)
def test_deepcopy(cls: type[Any]) -> None:
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        param = make(cls, numbered((2, 3), torch.float32).t())
    param.extra = {"list": [1]}
    new = copy.deepcopy(param)
    assert type(new) is cls
    assert torch.equal(new.data, param.data)
    assert new.stride() == param.stride()
    assert new.data_ptr() != param.data_ptr()
    assert {k: v for k, v in vars(new).items() if k != "_ledger"} == {
        k: v for k, v in vars(param).items() if k != "_ledger"
    }
    assert new.extra["list"] is not param.extra["list"]
    assert new.tp_rank == 1
    assert copy.deepcopy([param, param])[0] is not param


def test_deepcopy_of_a_model_takes_its_loaders_along() -> None:
    model = Model()
    model.one.weight.later = model.one.load
    model.two.weight.weight_loader = functools.partial(model.two.load)
    new = copy.deepcopy(model)
    new.one.weight.weight_loader(new.one.weight, torch.ones(2, 3))
    new.two.weight.weight_loader(new.two.weight, torch.ones(2, 3))
    assert new.tied is new.one
    assert (new.one.num_loads, new.two.num_loads) == (1, 1)
    assert (model.one.num_loads, model.two.num_loads) == (0, 0)
    assert new.one.weight.later.__self__ is new.one
    assert model.one.weight.data.sum() == 0
    assert new.one.weight.data.sum() == 6


def test_deepcopy_of_a_parameter_alone_copies_no_layer() -> None:
    layer = Linear()
    new = copy.deepcopy(layer.weight)
    assert new.weight_loader.__self__ is layer


def test_deepcopy_forgets_what_was_loaded() -> None:
    param = make(BasevLLMParameter, torch.zeros(2))
    param.load_column_parallel_weight(torch.ones(2))
    new = copy.deepcopy(param)
    new.load_column_parallel_weight(torch.zeros(2))
    assert (param.data.tolist(), new.data.tolist()) == ([1, 1], [0, 0])


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch_save(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [through_pickle, through_torch_save])
def test_pickle(through: Callable[[Any], Any]) -> None:
    for cls in ALL:
        param = make(cls, numbered((2, 2), torch.float32))
        param.note = "kept"
        new = through(param)
        assert type(new) is cls
        assert torch.equal(new.data, param.data)
        assert new.note == "kept"
        assert not new.requires_grad
        new.load_row_parallel_weight(torch.zeros(2, 2))
    model = Model()
    model.one.weight.load_column_parallel_weight(torch.ones(2, 3))
    new = through(model)
    new.one.weight.weight_loader(new.one.weight, torch.zeros(2, 3))
    assert (new.one.num_loads, model.one.num_loads) == (1, 0)
    assert new.one.weight.data.sum() == 0


def test_moving_and_converting() -> None:
    model = Model()
    param = model.one.weight
    model.to(torch.bfloat16)
    assert model.one.weight is param
    assert param.dtype == torch.bfloat16
    assert type(param) is ModelWeightParameter
    param.load_column_parallel_weight(torch.ones(2, 3))
    assert param.data.dtype == torch.bfloat16
    assert type(param.to(torch.float32)) is torch.Tensor


def test_arithmetic_gives_plain_tensors() -> None:
    param = make(BasevLLMParameter, torch.ones(2, 2))
    for result in (param + 1, param.t(), param[0], param.data, param.detach(), param.clone()):
        assert type(result) is torch.Tensor


def test_swap_tensors() -> None:
    """Parameters on meta get their memory by a swap, which weak references would forbid."""
    old = make(ModelWeightParameter, torch.empty(2, 2, device="meta"))
    new = make(ModelWeightParameter, torch.zeros(2, 2))
    old.load_column_parallel_weight(torch.ones(2, 2))
    torch.utils.swap_tensors(old, new)
    assert old.device.type == "cpu"
    old.load_column_parallel_weight(torch.ones(2, 2))
    assert old.data.sum() == 4


@pytest.mark.parametrize("cls", [ModelWeightParameter, ChannelQuantScaleParameter])
def test_compile(cls: type[Any]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = make(cls, torch.ones(2, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight.t() if self.weight.output_dim == 1 else self.weight
            return F.linear(x, weight) * self.weight.data.sum()

    layer = Layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(4, 3)
    assert torch.equal(compiled(x), layer(x))
    layer.weight.load_column_parallel_weight(torch.full((2, 3), 2.0))
    assert torch.equal(compiled(x), layer(x))


@pytest.fixture
def synced() -> Any:
    """A device whose views are lazy, played by meta."""
    seen: list[torch.Tensor] = []
    set_lazy_view_device("meta", seen.append)
    yield seen
    set_lazy_view_device("meta", None)


def test_lazy_views_are_synchronised_after_each_call(synced: list[torch.Tensor]) -> None:
    calls: list[tuple[Any, ...]] = []

    def loader(param: torch.Tensor, *args: Any, **keywords: Any) -> str:
        assert len(synced) == len(calls)  # not before the loader has run
        calls.append((param, args, keywords))
        return "result"

    on_meta = make(BasevLLMParameter, torch.empty(2, device="meta"))
    on_meta.weight_loader = loader
    wrapped = on_meta.weight_loader
    assert wrapped is not loader
    assert wrapped(on_meta, 1, shard="q") == "result"
    assert wrapped(on_meta, 2) == "result"
    assert [param is on_meta for param in synced] == [True, True]
    assert calls[0][1:] == ((1,), {"shard": "q"})
    on_meta.weight_loader = wrapped  # set again: not wrapped twice
    assert on_meta.weight_loader is wrapped
    built = BasevLLMParameter(data=torch.empty(2, device="meta"), weight_loader=loader)
    built.weight_loader(built)
    assert synced[-1] is built
    assert copy.deepcopy(built).weight_loader.loader is loader


def test_lazy_views_concern_their_device_only(synced: list[torch.Tensor]) -> None:
    loader = Linear().load
    assert BasevLLMParameter(data=torch.zeros(2), weight_loader=loader).weight_loader == loader
    param = BasevLLMParameter(data=torch.empty(2, device="meta"), weight_loader=None)
    assert param.weight_loader is None
    assert not synced


def test_a_synced_loader_follows_its_layer(synced: list[torch.Tensor]) -> None:
    class OnMeta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_loads = 0
            self.weight = BasevLLMParameter(
                data=torch.empty(2, device="meta"), weight_loader=self.load
            )

        def load(self, param: BasevLLMParameter, loaded_weight: torch.Tensor) -> None:
            self.num_loads += 1

    layer = OnMeta()
    new = copy.deepcopy(layer)
    new.weight.weight_loader(new.weight, torch.ones(2))
    assert (layer.num_loads, new.num_loads) == (0, 1)
    assert synced == [new.weight] or synced[0] is new.weight


def test_per_tensor_scales_know_the_slots() -> None:
    param = PerTensorScaleParameter(data=torch.zeros(3), weight_loader=None)
    assert param.qkv_idxs == {"q": 0, "k": 1, "v": 2}
    assert [param._shard_id_as_int(i) for i in ("q", "k", "v", 0, 7)] == [0, 1, 2, 0, 7]
    param._load_into_shard_id(torch.tensor([4.0]), "v", shard_offset=1)
    assert bits(param.data) == bits(torch.tensor([0.0, 0.0, 4.0]))
