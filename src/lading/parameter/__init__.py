"""Parameters that know their own layout, and so load themselves on any rank.

The classes keep the names and the calls of the field's reference, vLLM's
`model_executor/parameter.py` (v0.6.6, and the additions of later engines), so that code written for
them runs unchanged. What is different: every load is a `Copy` worked out by the arithmetic that
plans use, checked in full before anything is written, and every refusal says what to do.

Letters: O = outputs, I = inputs, both local; T = tp_size; r = tp_rank; S = ranks that share a KV
head.

    call                          takes (full)              writes
    load_column_parallel_weight   [T*O, I]                  rows r*O : (r+1)*O
    load_row_parallel_weight      [O, T*I]                  columns r*I : (r+1)*I
    load_merged_column_weight     [T*size, I]               piece r into rows offset : offset + size
    load_qkv_weight               [T/S*size, I]             piece r // S likewise (S = 1 for q)

Sizes and offsets given by callers are local and logical; packed classes divide them by the packed
factor when the packed dim is the output dim, exactly or with a LayoutError.

Example: int4 words along the inputs, 800 inputs at T = 4: `input_dim` has 800 / 8 / 4 = 25 entries
a rank, and rank 1 keeps entries 25:50.
"""

from lading.parameter.base import BasevLLMParameter, set_lazy_view_device
from lading.parameter.classes import (
    BlockQuantScaleParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
    RowvLLMParameter,
    _ColumnvLLMParameter,
)
from lading.parameter.packed import PackedColumnParameter, PackedvLLMParameter
from lading.parameter.packing import (
    _adjust_shard_indexes_for_marlin,
    _adjust_shard_indexes_for_packing,
)
from lading.parameter.parts import load_part
from lading.parameter.permute import permute_param_layout_
from lading.parameter.shared import SharedWeightParameter

__all__ = [
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
]
