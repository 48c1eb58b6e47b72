"""The calls that inference engines make, in their dialects, for each quantisation's tensors.

A dialect is how a layer hands its rank over; a scheme is the parameters that it creates for a fused
qkv projection and the checkpoint tensors that it loads into them.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

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
    _ColumnvLLMParameter,
)
from lading.ranks import Ranks, as_current

from .made import bits

HIDDEN, HEAD_DIM, HEADS, KV_HEADS = 128, 32, 8, 2
FULL = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}

Parameters = dict[str, Any]
Part = dict[str, torch.Tensor]


class Projection:
    """A fused qkv projection of one rank."""

    def __init__(self, rank: int, tp_size: int) -> None:
        self.tp_rank, self.tp_size = rank, tp_size
        self.replicas = max(1, tp_size // KV_HEADS)
        pieces = {"q": tp_size, "k": tp_size // self.replicas, "v": tp_size // self.replicas}
        self.local = {part: FULL[part] // pieces[part] for part in FULL}
        self.offset = {"q": 0, "k": self.local["q"], "v": self.local["q"] + self.local["k"]}
        self.output_size = sum(self.local.values())

    def piece(self, part: str) -> int:
        return self.tp_rank if part == "q" else self.tp_rank // self.replicas


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    count = torch.empty(shape, dtype=dtype).numel() * torch.empty(0, dtype=dtype).element_size()
    noise = torch.Generator().manual_seed(seed)
    # No byte above 63: finite, and small, in every float format.
    return (
        torch.randint(0, 64, (count,), dtype=torch.uint8, generator=noise)
        .view(dtype)
        .reshape(shape)
    )


# Each scheme: rows and columns that one entry covers, by tensor; None = not along outputs.
def unquantised(layer: Projection) -> Parameters:
    return {
        "weight": ModelWeightParameter(
            data=torch.empty(layer.output_size, HIDDEN, dtype=torch.bfloat16),
            input_dim=1,
            output_dim=0,
            weight_loader=None,
        ),
        "bias": _ColumnvLLMParameter(
            data=torch.empty(layer.output_size), output_dim=0, weight_loader=None
        ),
    }


def unquantised_part(part: str) -> Part:
    return {
        "weight": random((FULL[part], HIDDEN), torch.bfloat16, ord(part)),
        "bias": random((FULL[part],), torch.bfloat16, ord(part)),  # into an fp32 parameter
    }


def fp8(layer: Projection) -> Parameters:
    return {
        "weight": ModelWeightParameter(
            data=torch.empty(layer.output_size, HIDDEN, dtype=torch.float8_e4m3fn),
            input_dim=1,
            output_dim=0,
            weight_loader=None,
        ),
        "weight_scale": PerTensorScaleParameter(data=torch.empty(3), weight_loader=None),
        "input_scale": PerTensorScaleParameter(data=torch.empty(3), weight_loader=None),
        "channel_scale": ChannelQuantScaleParameter(
            data=torch.empty(layer.output_size, 1), output_dim=0, weight_loader=None
        ),
        "weight_scale_inv": BlockQuantScaleParameter(
            data=torch.empty(layer.output_size // 32, HIDDEN // 32),
            input_dim=1,
            output_dim=0,
            weight_loader=None,
        ),
    }


def fp8_part(part: str) -> Part:
    return {
        "weight": random((FULL[part], HIDDEN), torch.float8_e4m3fn, ord(part)),
        "weight_scale": random((), torch.float32, ord(part)),
        "input_scale": random((1,), torch.float32, ord(part)),
        "channel_scale": random((FULL[part], 1), torch.bfloat16, ord(part)),
        "weight_scale_inv": random((FULL[part] // 32, HIDDEN // 32), torch.float32, ord(part)),
    }


def gptq(bits_per_weight: int) -> Callable[[Projection], Parameters]:
    def create(layer: Projection) -> Parameters:
        factor = Fraction(32, bits_per_weight)
        return {
            "qweight": PackedvLLMParameter(
                data=torch.empty(int(HIDDEN / factor), layer.output_size, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=0,
                packed_factor=factor,
                weight_loader=None,
            ),
            "qzeros": PackedvLLMParameter(
                data=torch.empty(2, int(layer.output_size / factor), dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=1,
                packed_factor=factor,
                weight_loader=None,
            ),
            "channel_qzeros": PackedColumnParameter(
                data=torch.empty(1, int(layer.output_size / factor), dtype=torch.int32),
                output_dim=1,
                packed_dim=1,
                packed_factor=factor,
                weight_loader=None,
            ),
            "scales": GroupQuantScaleParameter(
                data=torch.empty(2, layer.output_size, dtype=torch.float16),
                input_dim=0,
                output_dim=1,
                weight_loader=None,
            ),
            "g_idx": RowvLLMParameter(
                data=torch.empty(HIDDEN, dtype=torch.int32), input_dim=0, weight_loader=None
            ),
            "weight_shape": BasevLLMParameter(
                data=torch.empty(2, dtype=torch.int64), weight_loader=None
            ),
        }

    return create


def gptq_part(bits_per_weight: int) -> Callable[[str], Part]:
    def create(part: str) -> Part:
        words, seed = FULL[part] * bits_per_weight // 32, ord(part)
        return {
            "qweight": random((HIDDEN * bits_per_weight // 32, FULL[part]), torch.int32, seed),
            "qzeros": random((2, words), torch.int32, seed),
            "channel_qzeros": random((1, words), torch.int32, seed),
            "scales": random((2, FULL[part]), torch.float16, seed),
            "g_idx": torch.arange(HIDDEN, dtype=torch.int32) // 64,
            "weight_shape": torch.tensor([FULL[part], HIDDEN]),
        }

    return create


def marlin(layer: Projection) -> Parameters:
    return {
        "B": PackedvLLMParameter(
            data=torch.empty(HIDDEN // 16, layer.output_size * 16 // 8, dtype=torch.int32),
            input_dim=0,
            output_dim=1,
            packed_dim=1,
            packed_factor=8,
            marlin_tile_size=16,
            weight_loader=None,
        )
    }


def marlin_part(part: str) -> Part:
    return {"B": random((HIDDEN // 16, FULL[part] * 16 // 8), torch.int32, ord(part))}


SCHEMES = {
    "unquantised": (unquantised, unquantised_part),
    "fp8": (fp8, fp8_part),
    "gptq-4": (gptq(4), gptq_part(4)),
    "gptq-3": (gptq(3), gptq_part(3)),
    "marlin": (marlin, marlin_part),
}


def early(layer: Projection, param: Any, loaded: torch.Tensor, part: str) -> None:
    """The rank is the world's."""
    offset, size = rows_of(layer, param, part)
    with as_current(Ranks(tp_rank=layer.tp_rank, tp_size=layer.tp_size)):
        param.load_qkv_weight(
            loaded_weight=loaded,
            num_heads=layer.replicas,
            shard_id=part,
            shard_offset=offset,
            shard_size=size,
        )


def late(layer: Projection, param: Any, loaded: torch.Tensor, part: str) -> None:
    """The rank is stamped on the parameter, which the layer overwrites; it is given again."""
    param.tp_rank, param.tp_size = layer.tp_rank, layer.tp_size
    offset, size = rows_of(layer, param, part)
    param.load_qkv_weight(
        loaded_weight=loaded,
        num_heads=layer.replicas,
        shard_id=part,
        shard_offset=offset,
        shard_size=size,
        tp_rank=layer.tp_rank,
    )


def rank_in_the_call(layer: Projection, param: Any, loaded: torch.Tensor, part: str) -> None:
    """The rank of the layer's own group is given with each call, and nothing else."""
    offset, size = rows_of(layer, param, part)
    param.load_qkv_weight(
        loaded,
        tp_rank=layer.tp_rank,
        use_presharded_weights=False,
        num_heads=layer.replicas,
        shard_id=part,
        shard_offset=offset,
        shard_size=size,
    )


def rows_of(layer: Projection, param: Any, part: str) -> tuple[int, int]:
    """Local and unpacked; engines divide only block scales themselves."""
    block = 32 if isinstance(param, BlockQuantScaleParameter) else 1
    return layer.offset[part] // block, layer.local[part] // block


def expected(layer: Projection, param: Any, loaded: dict[str, torch.Tensor]) -> torch.Tensor:
    """All parts' own pieces side by side along the outputs, or one entry for each part."""
    if isinstance(param, PerTensorScaleParameter):
        return torch.stack([tensor.reshape(()) for tensor in loaded.values()])
    if not isinstance(param, _ColumnvLLMParameter):
        return loaded["v"]
    pieces = []
    for part, tensor in loaded.items():
        count = layer.tp_size if part == "q" else layer.tp_size // layer.replicas
        pieces.append(tensor.tensor_split(count, dim=param.output_dim)[layer.piece(part)])
    return torch.cat(pieces, dim=param.output_dim)


@pytest.mark.parametrize("dialect", [early, late, rank_in_the_call], ids=lambda d: d.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_qkv(scheme: str, tp_size: int, dialect: Callable[..., None]) -> None:
    create, parts_of = SCHEMES[scheme]
    parts = {part: parts_of(part) for part in FULL}
    for rank in range(tp_size):
        layer = Projection(rank, tp_size)
        for name, param in create(layer).items():
            loaded = {part: parts[part][name] for part in FULL}
            for part, tensor in loaded.items():
                dialect(layer, param, tensor, part)
            want = expected(layer, param, loaded).to(param.dtype)
            assert bits(param) == bits(want), name


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_row_parallel(tp_size: int) -> None:
    """What a row-parallel layer loads: cut along inputs, or whole."""
    inputs = HIDDEN // tp_size
    weight = random((64, HIDDEN), torch.float8_e4m3fn, 1)
    words = random((HIDDEN // 8, 64), torch.int32, 2)
    scale = random((64, 1), torch.float32, 3)
    for rank in range(tp_size):
        own = {"tp_rank": rank, "use_presharded_weights": False}
        for ranks, keywords in ((Ranks(tp_rank=rank, tp_size=tp_size), {}), (None, own)):
            with as_current(ranks):
                param: Any = ModelWeightParameter(
                    data=torch.empty(64, inputs, dtype=weight.dtype), input_dim=1, output_dim=0
                )
                param.load_row_parallel_weight(loaded_weight=weight, **keywords)
                assert bits(param) == bits(weight[:, rank * inputs : (rank + 1) * inputs])
                param = PackedvLLMParameter(
                    data=torch.empty(inputs // 8, 64, dtype=torch.int32),
                    input_dim=0,
                    output_dim=1,
                    packed_dim=0,
                    packed_factor=8,
                )
                param.load_row_parallel_weight(words, **keywords)
                count = inputs // 8
                assert torch.equal(param.data, words[rank * count : (rank + 1) * count])
                param = ChannelQuantScaleParameter(data=torch.empty(64, 1), output_dim=0)
                param.load_row_parallel_weight(scale, **keywords)
                assert torch.equal(param.data, scale)
                param = PerTensorScaleParameter(data=torch.empty(1), weight_loader=None)
                param.load_row_parallel_weight(torch.tensor(2.0), **keywords)
                assert param.data.tolist() == [2.0]


def test_parts_fused_on_disk() -> None:
    """Layers cut the parts themselves, and take packed offsets from the parameter."""
    full = random((16, 96), torch.int32, 5)  # three parts of 256 outputs, packed by 8
    for rank in range(2):
        with as_current(Ranks(tp_rank=rank, tp_size=2)):
            param = PackedvLLMParameter(
                data=torch.empty(16, 48, dtype=torch.int32),
                input_dim=0,
                output_dim=1,
                packed_dim=1,
                packed_factor=8,
                weight_loader=None,
            )
            for part in range(3):
                size, offset = param.adjust_shard_indexes_for_packing(
                    shard_size=256, shard_offset=256 * part
                )
                param.load_merged_column_weight(
                    loaded_weight=full.narrow(param.output_dim, offset, size),
                    shard_id=part,
                    shard_offset=128 * part,
                    shard_size=128,
                )
        want = torch.cat([full[:, 32 * p + 16 * rank :][:, :16] for p in range(3)], dim=1)
        assert torch.equal(param.data, want)


def test_loaders_are_overridden_and_removed() -> None:
    """Models give single parameters a loader of their own: the old attribute goes first."""
    param = ModelWeightParameter(
        data=torch.zeros(2, 2), input_dim=1, output_dim=0, weight_loader=print
    )
    delattr(param, "weight_loader")
    assert not hasattr(param, "weight_loader")
    assert getattr(param, "weight_loader", "default") == "default"
    for key, value in {"weight_loader": len, "quant_method": "fp8"}.items():
        assert not hasattr(param, key)
        setattr(param, key, value)
    assert param.weight_loader is len


def test_a_scale_of_all_parts_fills_every_slot() -> None:
    param = PerTensorScaleParameter(data=torch.zeros(3), weight_loader=None)
    for slot in range(param.data.shape[0]):
        param.load_qkv_weight(loaded_weight=torch.tensor(2.0), shard_id=slot, tp_rank=1)
    assert param.data.tolist() == [2, 2, 2]


def test_whole_tensors_of_fused_layers() -> None:
    """`type(param) in (RowvLLMParameter, BasevLLMParameter)`: no shard id, no offsets."""
    for param in (
        RowvLLMParameter(data=torch.zeros(4), input_dim=0, weight_loader=None),
        BasevLLMParameter(data=torch.zeros(4), weight_loader=None),
    ):
        assert type(param) in (RowvLLMParameter, BasevLLMParameter)
        param.load_merged_column_weight(loaded_weight=torch.ones(4), tp_rank=1)
        param.load_qkv_weight(loaded_weight=torch.ones(4), tp_rank=1)
        assert param.data.sum() == 4
