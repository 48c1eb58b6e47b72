"""The parameter classes that are cut along outputs or inputs, and the one of scalars.

Letters: O = outputs, I = inputs, both local; T = tp_size; r = tp_rank; S = ranks that share a KV
head.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lading.errors import CallError, DeclarationError, KeywordError, LayoutError
from lading.layouts import PartName
from lading.parameter.base import QKV_SLOTS, BasevLLMParameter, WeightLoader, load_call
from lading.parameter.checks import dim_of, whole_number
from lading.regions import Region

__all__ = [
    "BlockQuantScaleParameter",
    "ChannelQuantScaleParameter",
    "GroupQuantScaleParameter",
    "ModelWeightParameter",
    "PerTensorScaleParameter",
    "RowvLLMParameter",
]


class _ColumnvLLMParameter(BasevLLMParameter):
    """A parameter that is cut along its outputs. `output_dim` is the dim that they run along."""

    _output_dim: int

    def __init__(
        self,
        output_dim: int,
        *,
        data: torch.Tensor,
        weight_loader: WeightLoader | None = None,
        **more: Any,
    ) -> None:
        self._output_dim = output_dim
        super().__init__(data=data, weight_loader=weight_loader, **more)

    @property
    def output_dim(self) -> int:
        """The dim along which the outputs run."""
        return self._output_dim

    @load_call
    def load_column_parallel_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """The rank's own piece along the outputs, [T*O, I] -> [O, I]."""
        dim = dim_of(self.output_dim, tuple(self.data.shape))
        self._load_piece(
            loaded_weight,
            dim=dim,
            offset=0,
            size=self.data.shape[dim],
            tp_rank=tp_rank,
            presharded=use_presharded_weights,
        )

    @load_call
    def load_merged_column_weight(
        self,
        loaded_weight: torch.Tensor,
        shard_id: PartName = None,
        shard_offset: int | None = None,
        shard_size: int | None = None,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """The rank's own piece of one part into rows shard_offset : shard_offset + shard_size."""
        if shard_id is not None:
            self._check_part(shard_id)
        dim, offset, size = self._local_entries(
            "load_merged_column_weight", shard_offset, shard_size, shard_id
        )
        self._load_piece(
            loaded_weight,
            dim=dim,
            offset=offset,
            size=size,
            tp_rank=tp_rank,
            presharded=use_presharded_weights,
            part=shard_id,
        )

    @load_call
    def load_qkv_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
        shard_id: PartName = None,
        shard_offset: int | None = None,
        shard_size: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        """The rank's own piece of q, k or v; `num_heads` = S, the ranks that share one KV head."""
        if shard_id is None:
            raise KeywordError("load_qkv_weight got no shard_id, needs 'q', 'k' or 'v'")
        slot = self._shard_id_as_int(shard_id)
        if slot > 2:
            raise CallError(f"shard_id is {shard_id!r}, needs 'q', 'k', 'v', 0, 1 or 2")
        part = "qkv"[slot]
        num_sharing = 1
        if slot and num_heads is None:
            raise KeywordError(
                "load_qkv_weight got no num_heads, needs the number of ranks that share a KV head",
                part=part,
            )
        if slot:
            num_sharing = whole_number("num_heads", num_heads, least=1, part=part)
        dim, offset, size = self._local_entries("load_qkv_weight", shard_offset, shard_size, part)
        self._load_piece(
            loaded_weight,
            dim=dim,
            offset=offset,
            size=size,
            tp_rank=tp_rank,
            presharded=use_presharded_weights,
            part=part,
            num_sharing=num_sharing,
        )

    def _check_part(self, shard_id: PartName) -> None:
        names = self.tp_layout.part_names if self.tp_layout is not None else ()
        known = (
            shard_id in names if len(names) > 1 else not isinstance(shard_id, int) or shard_id >= 0
        )
        if isinstance(shard_id, bool) or not known:
            want = (
                f"one of {', '.join(map(repr, names))}"
                if len(names) > 1
                else "an int of at least 0"
            )
            raise CallError(f"shard_id is {shard_id!r}, needs {want}")

    def _local_entries(
        self, call: str, offset: int | None, size: int | None, part: PartName
    ) -> tuple[int, int, int]:
        """(dim, offset, size): logical numbers → stored entries along the output dim, exactly."""
        for keyword, value in (("shard_offset", offset), ("shard_size", size)):
            if value is None:
                raise KeywordError(f"{call} got no {keyword}, needs it in local rows", part=part)
        first = whole_number("shard_offset", offset, part=part)
        count = whole_number("shard_size", size, part=part)
        dim = dim_of(self.output_dim, tuple(self.data.shape))
        try:
            count, first = self._stored(count, first, dim)
        except LayoutError as error:
            raise error.located(part=part) from None
        return dim, first, count

    def _stored(self, size: int, offset: int, dim: int) -> tuple[int, int]:
        """(size, offset) in stored entries; packed classes divide them."""
        return size, offset


class RowvLLMParameter(BasevLLMParameter):
    """A parameter that is cut along its inputs. `input_dim` is the dim that they run along."""

    # All parts share the inputs, so what says how the inputs run (GPTQ's `g_idx`) is one for all.
    _parts_may_differ: ClassVar[bool] = False

    _input_dim: int

    def __init__(
        self,
        input_dim: int,
        *,
        data: torch.Tensor,
        weight_loader: WeightLoader | None = None,
        **more: Any,
    ) -> None:
        self._input_dim = input_dim
        super().__init__(data=data, weight_loader=weight_loader, **more)

    @property
    def input_dim(self) -> int:
        """The dim along which the inputs run."""
        return self._input_dim

    @load_call
    def load_row_parallel_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """The rank's own piece along the inputs, [O, T*I] -> [O, I]; a 0-d tensor fits (1,)."""
        if loaded_weight.dim() == 0 and tuple(self.data.shape) == (1,):
            self._load_whole(loaded_weight)
            return
        dim = dim_of(self.input_dim, tuple(self.data.shape))
        self._load_piece(
            loaded_weight,
            dim=dim,
            offset=0,
            size=self.data.shape[dim],
            tp_rank=tp_rank,
            presharded=use_presharded_weights,
        )


class ModelWeightParameter(_ColumnvLLMParameter, RowvLLMParameter):
    """The weight of a linear layer: cut along outputs or inputs, whichever is called."""


class GroupQuantScaleParameter(_ColumnvLLMParameter, RowvLLMParameter):
    """Scales of groups of inputs: one dim of outputs, one of groups."""


class ChannelQuantScaleParameter(_ColumnvLLMParameter):
    """Scales of output channels."""


class BlockQuantScaleParameter(_ColumnvLLMParameter, RowvLLMParameter):
    """Scales of blocks of outputs by inputs."""


class PerTensorScaleParameter(BasevLLMParameter):
    """One scalar for each part of a (fused) layer: [number of parts].

    Column and row loads take the tensor whole; merged and qkv loads put a scalar, 0-d or (1,), into
    slot `shard_id` ('q', 'k', 'v' = 0, 1, 2).
    """

    def __init__(
        self, *, data: torch.Tensor, weight_loader: WeightLoader | None = None, **more: Any
    ) -> None:
        self.qkv_idxs = dict(QKV_SLOTS)
        super().__init__(data=data, weight_loader=weight_loader, **more)

    @load_call
    def load_merged_column_weight(
        self,
        loaded_weight: torch.Tensor,
        shard_id: PartName = None,
        shard_offset: int | None = None,
        shard_size: int | None = None,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """A scalar into slot `shard_id`."""
        self._load_slot("load_merged_column_weight", loaded_weight, shard_id)

    @load_call
    def load_qkv_weight(  # type: ignore[override]  # the slot comes second, as in the reference
        self,
        loaded_weight: torch.Tensor,
        shard_id: PartName = None,
        shard_offset: int | None = None,
        shard_size: int | None = None,
        num_heads: int | None = None,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """A scalar into slot `shard_id`."""
        self._load_slot("load_qkv_weight", loaded_weight, shard_id)

    @load_call
    def _load_into_shard_id(
        self,
        loaded_weight: torch.Tensor,
        shard_id: PartName = None,
        shard_offset: int | None = None,
        shard_size: int | None = None,
        num_heads: int | None = None,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        # The reference's name for it; subclasses of engines call it.
        self._load_slot("_load_into_shard_id", loaded_weight, shard_id)

    def _load_slot(self, call: str, loaded_weight: torch.Tensor, shard_id: PartName) -> None:
        if shard_id is None:
            raise KeywordError(f"{call} got no shard_id, needs the scalar's slot")
        slot = self._shard_id_as_int(shard_id)
        shape = tuple(self.data.shape)
        if not shape:
            raise DeclarationError("has no dims, needs one entry for each part")
        if slot >= shape[0]:
            raise CallError(
                f"shard_id is {shard_id!r}, slot {slot}, needs a slot of 0 to {shape[0] - 1} "
                "(the parameter has one for each part)"
            )
        rest = [(0, n) for n in shape[1:]]
        self._load(
            loaded_weight,
            source=Region.whole((1, *shape[1:])),
            target=Region.box(shape, [(slot, slot + 1), *rest]),
            part=shard_id,
            why="one scalar for each part" if len(shape) == 1 else "one entry for each part",
        )
