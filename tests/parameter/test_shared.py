"""SharedWeightParameter: partitions of equal keys are one tensor while a model holds it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Hashable, Iterator

import pytest
import torch
from torch import nn

from lading.errors import CallError, ConflictError, DeclarationError, KeywordError, ShapeError
from lading.parameter import BasevLLMParameter, ModelWeightParameter, SharedWeightParameter
from lading.ranks import Ranks, as_current

from .made import numbered, refused

MERGED, QKV = "load_merged_column_weight", "load_qkv_weight"


@pytest.fixture(autouse=True)
def _no_key_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert not list(SharedWeightParameter.tensors_registry)


def shared(*keys: Hashable) -> SharedWeightParameter:
    param = SharedWeightParameter(weight_loader=None)
    param.qualified_name = "rotation"
    for index, key in enumerate(keys):
        param.add_partition(index, key, size=(2, 2), dtype=torch.float32)
    return param


class Layer(nn.Module):
    def __init__(self, *keys: Hashable) -> None:
        super().__init__()
        self.rotation = shared(*keys)


def test_equal_keys_share_across_a_model() -> None:
    one, two = shared("a", "b"), shared("b", "c")
    assert one.partitions[1].data.data_ptr() == two.partitions[0].data.data_ptr()
    assert len({p.data.data_ptr() for m in (one, two) for p in m.partitions.values()}) == 3
    one.load_merged_column_weight(torch.ones(2, 2), shard_id=1)
    assert two.partitions[0].data.sum() == 4
    assert type(one.partitions[0]) is ModelWeightParameter
    assert isinstance(one, BasevLLMParameter)
    assert (one.partitions[0].input_dim, one.partitions[0].output_dim) == (1, 0)


def test_arguments_are_those_of_torch_empty() -> None:
    param = SharedWeightParameter(input_dim=0, output_dim=1, weight_loader=None)
    param.add_partition(0, "positional", 3, 4, dtype=torch.bfloat16)
    param.add_partition(2, ("a", "tuple"), (5, 6), device="meta")
    assert list(param.partitions) == [0, 2]
    assert param.partitions[0].dtype == torch.bfloat16
    assert (tuple(param.partitions[0].shape), param.partitions[2].is_meta) == ((3, 4), True)
    assert (param.partitions[0].input_dim, param.partitions[0].output_dim) == (0, 1)
    other = SharedWeightParameter(weight_loader=None)
    other.add_partition(0, "positional", 3, 4, dtype=torch.bfloat16, device="meta")
    assert not other.partitions[0].is_meta  # the tensor that is there already


def test_nothing_is_kept_alive() -> None:
    one, two = shared("a"), shared("a")
    del one
    gc.collect()
    assert "a" in SharedWeightParameter.tensors_registry
    del two
    gc.collect()
    assert "a" not in SharedWeightParameter.tensors_registry


@pytest.mark.parametrize("call", ["load_column_parallel_weight", "load_row_parallel_weight"])
def test_loads_of_the_only_partition(call: str) -> None:
    param = shared("a")
    getattr(param, call)(numbered((2, 2), torch.float32))
    assert param.partitions[0].data.tolist() == [[0, 1], [2, 3]]
    text = "rotation: has partitions [0, 1], needs just partition 0 for a load without shard_id."
    with refused(CallError, text):
        getattr(shared("a", "b"), call)(torch.ones(2, 2))


def test_loads_by_part() -> None:
    param = shared("q", "k", "v")
    for index, part in enumerate("qkv"):
        param.load_qkv_weight(
            torch.full((2, 2), float(index)),
            shard_id=part,
            shard_offset=64 * index,
            shard_size=64,
            num_heads=1,
        )
    assert [p.data[0, 0].item() for p in param.partitions.values()] == [0, 1, 2]
    param.load_merged_column_weight(
        loaded_weight=torch.full((2, 2), 2.0), shard_id=2, shard_offset=0, shard_size=2
    )


def test_one_key_takes_one_content() -> None:
    one, two = shared("a"), shared("a")
    one.load_column_parallel_weight(torch.ones(2, 2))
    two.load_column_parallel_weight(torch.ones(2, 2))
    text = (
        "rotation: elements [0:2, 0:2] were loaded before, with other bytes. "
        "Try: lading.start_load(model) before loading new weights into a loaded model."
    )
    with refused(ConflictError, text, one.partitions[0]):
        two.load_column_parallel_weight(torch.zeros(2, 2))


def test_one_rank_only() -> None:
    text = (
        "SharedWeightParameter: is declared on 2 ranks, needs one (shared partitions are not cut)."
    )
    with as_current(Ranks(tp_rank=0, tp_size=2)), refused(DeclarationError, text):
        SharedWeightParameter(weight_loader=None)


def test_data_belongs_to_the_partitions() -> None:
    param = shared("a")
    with pytest.raises(ValueError, match=r"has no data of its own; read partitions\[index\].data"):
        _ = param.data
    with pytest.raises(ValueError, match=r"has no data of its own; set partitions\[index\].data"):
        param.data = torch.zeros(1)
    with pytest.raises(CallError, match="loaded through its SharedWeightParameter"):
        param.partitions[0].weight_loader(param.partitions[0], torch.ones(2, 2))


def test_after_loading() -> None:
    one, two = shared("a"), shared("a")
    one.load_column_parallel_weight(torch.ones(2, 2))
    one.process_weights_after_loading()
    assert type(one.partitions[0]) is nn.Parameter
    assert not one.partitions[0].requires_grad
    assert one.partitions[0].data_ptr() == two.partitions[0].data_ptr()
    with refused(
        CallError, "rotation: partition 0 was processed after loading, and takes no weights."
    ):
        one.load_column_parallel_weight(torch.ones(2, 2))
    two.partitions[0].data.add_(1)
    assert one.partitions[0].data.sum() == 8


def test_refusals() -> None:
    param = shared("a", "b")
    for keywords, error, text in [
        (
            {},
            KeywordError,
            "load_merged_column_weight got no shard_id, needs the partition's index.",
        ),
        ({"shard_id": 2}, CallError, "shard_id is 2, needs one of [0, 1]."),
        ({"shard_id": "v"}, CallError, "shard_id is 'v', needs one of [0, 1]."),
        (
            {"shard_id": -1},
            CallError,
            "shard_id is -1, needs 'q', 'k', 'v' or an int of at least 0.",
        ),
    ]:
        with refused(error, f"rotation: {text}"):
            param.load_merged_column_weight(torch.ones(2, 2), **keywords)
    with refused(
        ShapeError, "rotation: tensor is fp32[4, 2], needs fp32[2, 2] (the parameter's shape)."
    ):
        param.load_qkv_weight(torch.ones(4, 2), shard_id="q")
    with refused(CallError, "rotation: partition 1 exists already, needs a new index."):
        param.add_partition(1, "c", 2, 2)
    with refused(CallError, "rotation: partition index is -1, needs an int of at least 0."):
        param.add_partition(-1, "c", 2, 2)
    with refused(
        DeclarationError,
        "rotation: key 'a' is shared as fp32[2, 2], needs bf16[2, 3] for partition 2.",
    ):
        param.add_partition(2, "a", 2, 3, dtype=torch.bfloat16)
    assert list(param.partitions) == [0, 1]


def test_state_dict_has_no_data_of_it() -> None:
    layer = Layer("a")
    assert layer.state_dict()["rotation"].numel() == 0
    layer.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"set partitions\[index\].data instead"):
        layer.to(torch.bfloat16)


def test_deepcopy_shares_within_the_copy() -> None:
    model = nn.ModuleList([Layer("a", "b"), Layer("a")])
    model[0].rotation.load_merged_column_weight(torch.ones(2, 2), shard_id=0)
    model[0].rotation.partitions[1].note = "kept"
    new = copy.deepcopy(model)
    old_a, new_a = model[1].rotation.partitions[0], new[1].rotation.partitions[0]
    assert new_a.data.sum() == 4
    assert new_a.data.data_ptr() != old_a.data.data_ptr()
    assert new_a.data.data_ptr() == new[0].rotation.partitions[0].data.data_ptr()
    assert new[0].rotation.partitions[1].note == "kept"
    new[1].rotation.load_column_parallel_weight(torch.full((2, 2), 2.0))
    assert (new[0].rotation.partitions[0].data.sum(), old_a.data.sum()) == (8, 4)
    with pytest.raises(ConflictError):
        new[0].rotation.load_merged_column_weight(torch.ones(2, 2), shard_id=0)
    model[0].rotation.process_weights_after_loading()
    assert type(copy.deepcopy(model)[0].rotation.partitions[0]) is nn.Parameter


def test_pickle() -> None:
    layer = Layer("a", "b")
    layer.rotation.load_merged_column_weight(torch.ones(2, 2), shard_id=0)
    new = pickle.loads(pickle.dumps(layer)).rotation
    assert type(new) is SharedWeightParameter
    assert new.partitions[0].data.sum() == 4
    assert new.partitions[0].data.data_ptr() != layer.rotation.partitions[0].data.data_ptr()
    model = nn.ModuleList([Layer("a"), Layer("a")])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    one, two = torch.load(file, weights_only=False)
    assert one.rotation.partitions[0].data_ptr() == two.rotation.partitions[0].data_ptr()
