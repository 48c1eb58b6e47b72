"""Partitions that share tensors by key across a model.

Transforms applied to "gate" and "up" (Hadamard matrices, say) are the same tensor in every layer:
each layer declares its partitions by a key, and equal keys share one tensor. Not for tensor
parallelism: one rank only, as in the field's engines.
"""

from __future__ import annotations

import copy as copying
from collections.abc import Hashable
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch.nn import Parameter

from lading import owners
from lading.errors import CallError, DeclarationError, KeywordError, LadingError
from lading.layouts import PartName
from lading.ledger import Ledger
from lading.parameter.base import BasevLLMParameter, WeightLoader, load_call
from lading.parameter.checks import spelt, whole_number
from lading.parameter.classes import ModelWeightParameter

__all__ = ["SharedWeightParameter"]


class _Shared:
    """One shared tensor and what has been loaded into it, alive while a partition holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.ledger = Ledger(shared=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        new = _Shared(copying.deepcopy(self.tensor, memo))
        memo[id(self)] = new
        return new


class SharedWeightParameter(BasevLLMParameter):
    """A parameter that is a set of partitions, which may share their tensors with other layers.

    partitions   index → ModelWeightParameter; filled by `add_partition`
    Reading or setting `.data` raises: ask a partition. Raises a DeclarationError at TP > 1.
    A deep copy of a model shares among its own layers, not with the model it came from.

    Example: two layers call add_partition(0, "hadamard-64", 64, 64): one [64, 64] tensor for both.
    """

    tensors_registry: ClassVar[WeakValueDictionary[Hashable, _Shared]] = WeakValueDictionary()

    def __new__(cls, **_: Any) -> SharedWeightParameter:
        return super().__new__(cls, data=None)  # type: ignore[return-value]

    def __init__(
        self, *, input_dim: int = 1, output_dim: int = 0, weight_loader: WeightLoader | None = None
    ) -> None:
        super().__init__(data=torch.empty(0), weight_loader=weight_loader)
        self._input_dim, self._output_dim = input_dim, output_dim
        self.partitions: dict[int, Parameter] = {}
        self._held: dict[int, _Shared] = {}
        if self.tp_size > 1:
            raise DeclarationError(
                f"is declared on {self.tp_size} ranks, needs one (shared partitions are not cut)",
                subject=type(self).__name__,
            )

    def add_partition(self, index: int, data_key: Hashable, *args: Any, **kwargs: Any) -> None:
        """Adds partition `index`, sharing the tensor of `data_key`.

        args, kwargs   those of torch.empty, used where no live tensor has the key yet
        Raises a DeclarationError where the key's tensor has another shape or dtype.
        """
        try:
            self._held[index] = shared = self._share(index, data_key, args, kwargs)
        except LadingError as error:
            raise error.located(subject=owners.name_of(self)) from None
        self.partitions[index] = self._over(shared)

    def _share(
        self, index: int, key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> _Shared:
        if whole_number("partition index", index) in self.partitions:
            raise CallError(f"partition {index} exists already, needs a new index")
        shared = self.tensors_registry.get(key)
        if shared is None:
            shared = self.tensors_registry[key] = _Shared(torch.empty(*args, **kwargs))
            return shared
        wanted = torch.empty(*args, **{**kwargs, "device": "meta"})
        have = shared.tensor
        if (wanted.shape, wanted.dtype) != (have.shape, have.dtype):
            raise DeclarationError(
                f"key {key!r} is shared as {spelt(have.dtype, have.shape)}, "
                f"needs {spelt(wanted.dtype, wanted.shape)} for partition {index}"
            )
        return shared

    def _over(self, shared: _Shared) -> ModelWeightParameter:
        partition = ModelWeightParameter(
            data=shared.tensor,
            input_dim=self._input_dim,
            output_dim=self._output_dim,
            weight_loader=_no_loader,
        )
        partition._ledger = shared.ledger
        return partition

    @load_call
    def load_column_parallel_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """Takes the tensor whole into the only partition."""
        self._only()._load_whole(loaded_weight)

    @load_call
    def load_row_parallel_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """Takes the tensor whole into the only partition."""
        self._only()._load_whole(loaded_weight)

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
        """Takes the tensor whole into partition `shard_id`; offset and size make no difference."""
        self._partition("load_merged_column_weight", shard_id)._load_whole(loaded_weight)

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
        """Takes the tensor whole into partition `shard_id`; offset and size make no difference."""
        self._partition("load_qkv_weight", shard_id)._load_whole(loaded_weight)

    def process_weights_after_loading(self) -> None:
        """Turns every partition into a plain parameter over the same shared memory."""
        for index, partition in self.partitions.items():
            self.partitions[index] = Parameter(partition.data, requires_grad=False)

    @property
    def data(self) -> torch.Tensor:
        """Raises: the parameter has no data of its own."""
        raise ValueError(
            f"{type(self).__name__} has no data of its own; read partitions[index].data instead"
        )

    @data.setter
    def data(self, _value: torch.Tensor) -> None:
        raise ValueError(
            f"{type(self).__name__} has no data of its own; set partitions[index].data instead"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BasevLLMParameter:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        new = super().__deepcopy__(memo)
        assert isinstance(new, SharedWeightParameter), "a copy is of the same class"
        for index, partition in self.partitions.items():
            # Over the copied shared tensor, so that the copied layers share it too.
            over: Parameter = self._over(new._held[index])
            if not isinstance(partition, ModelWeightParameter):
                over = Parameter(over.data, requires_grad=False)
            vars(over).update(
                (key, value)
                for key, value in vars(new.partitions[index]).items()
                if key != "_ledger"
            )
            new.partitions[index] = over
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What is shared, and with whom, holds in this process only.
        rebuild, args, state, *rest = super().__reduce_ex__(protocol)
        return rebuild, args, {**state, "_held": {}}, *rest

    def _only(self) -> ModelWeightParameter:
        if list(self.partitions) != [0]:
            raise CallError(
                f"has partitions {list(self.partitions)}, needs just partition 0 for a load "
                "without shard_id"
            )
        return self._loadable(0)

    def _partition(self, call: str, shard_id: PartName) -> ModelWeightParameter:
        if shard_id is None:
            raise KeywordError(f"{call} got no shard_id, needs the partition's index")
        index = self._shard_id_as_int(shard_id)
        if index not in self.partitions:
            raise CallError(f"shard_id is {shard_id!r}, needs one of {list(self.partitions)}")
        return self._loadable(index)

    def _loadable(self, index: int) -> ModelWeightParameter:
        partition = self.partitions[index]
        if not isinstance(partition, ModelWeightParameter):
            raise CallError(f"partition {index} was processed after loading, and takes no weights")
        return partition


def _no_loader(*_: Any, **__: Any) -> None:
    raise CallError("a partition is loaded through its SharedWeightParameter, not by itself")
