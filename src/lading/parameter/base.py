"""The base of the parameter classes: rank, loader, checks, and the one path by which they load.

Letters: T = tp_size; r = tp_rank; S = ranks that share a KV head.
"""

from __future__ import annotations

import copy as copying
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn import Parameter

from lading import dtypes, owners, writing
from lading.errors import CallError, DeclarationError, KeywordError, LadingError, ShapeError
from lading.layouts import Layout, PartName, piece_of, span_of_piece
from lading.ledger import Ledger
from lading.ranks import Ranks, explicit_current, world
from lading.regions import Copy, Region

__all__ = ["BasevLLMParameter", "WeightLoader", "load_part", "set_lazy_view_device"]

WeightLoader = Callable[..., Any]
_F = TypeVar("_F", bound=Callable[..., Any])

QKV_SLOTS = {"q": 0, "k": 1, "v": 2}

_lazy_view_devices: dict[str, Callable[[torch.Tensor], None]] = {"xla": torch._sync}


def set_lazy_view_device(device_type: str, sync: Callable[[torch.Tensor], None] | None) -> None:
    """Declares that views of a device's tensors reach the tensor late: loaders then end with `sync`.

    On XLA a write into a view is folded into its base only when the base is synchronised; without
    that, every loaded part keeps a second copy of the parameter alive. None undeclares the device.
    """
    if sync is None:
        _lazy_view_devices.pop(device_type, None)
    else:
        _lazy_view_devices[device_type] = sync


class _SyncedLoader:
    """A weight loader that synchronises its parameter after each call. (A class: it pickles.)"""

    def __init__(self, loader: WeightLoader, device_type: str) -> None:
        self.loader, self.device_type = loader, device_type

    def __call__(self, param: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        result = self.loader(param, *args, **keywords)
        sync = _lazy_view_devices.get(self.device_type)
        if sync is not None:
            sync(param)
        return result


def load_call(method: _F) -> _F:
    """Makes a load call's errors carry the parameter's name, and unknown keywords an error of ours."""
    allowed = [name for name in inspect.signature(method).parameters if name != "self"]

    @functools.wraps(method)
    def call(self: BasevLLMParameter, *args: Any, **keywords: Any) -> Any:
        try:
            for keyword in keywords:
                if keyword not in allowed:
                    raise KeywordError(
                        f"{method.__name__} got keyword {keyword!r}, "
                        f"needs some of: {', '.join(allowed)}"
                    )
            if "loaded_weight" not in keywords and not args:
                raise KeywordError(f"{method.__name__} got no loaded_weight, needs a tensor")
            return method(self, *args, **keywords)
        except LadingError as error:
            raise error.located(subject=owners.name_of(self)) from None

    return call  # type: ignore[return-value]


class BasevLLMParameter(Parameter):
    """A parameter that every rank holds whole.

    data            1-D to 4-D (or 0-d), any dtype, any device, also meta
    weight_loader   called by engines as weight_loader(param, loaded_weight, ...); may be None. It can
                    be set, and deleted: reading it then raises AttributeError

    `tp_rank` and `tp_size` are plain attributes stamped at construction. What counts at load time is,
    first to last: `tp_rank=` of the call; the attributes, where they were overwritten; what
    `lading.ranks.set_current` set; the stamp, if `set_current` had set it; torch.distributed's world.
    """

    _weight_loader: WeightLoader | None
    tp_rank: int
    tp_size: int
    qualified_name: str | None
    tp_layout: Layout | None

    def __new__(cls, data: torch.Tensor | None = None, **_: Any) -> BasevLLMParameter:
        if data is not None and not isinstance(data, torch.Tensor):
            raise DeclarationError(
                f"data is {type(data).__name__}, needs a tensor", subject=cls.__name__
            )
        return super().__new__(cls, data, requires_grad=False)  # type: ignore[no-any-return]

    def __init__(self, data: torch.Tensor, weight_loader: WeightLoader | None = None) -> None:
        device_type = data.device.type
        if device_type in _lazy_view_devices and weight_loader is not None:
            weight_loader = _SyncedLoader(weight_loader, device_type)
        self._weight_loader = weight_loader
        chosen = explicit_current()
        ranks = chosen or world()
        self.tp_rank, self.tp_size = ranks.tp_rank, ranks.tp_size
        self._stamp = (ranks.tp_rank, ranks.tp_size, chosen is not None)
        self.qualified_name = None
        self.tp_layout = None
        self._ledger = Ledger()

    @property
    def weight_loader(self) -> WeightLoader | None:
        """The loader given at construction or set since."""
        try:
            return self._weight_loader
        except AttributeError:
            raise AttributeError(f"weight_loader of {type(self).__name__} was deleted") from None

    @weight_loader.setter
    def weight_loader(self, loader: WeightLoader | None) -> None:
        self._weight_loader = loader

    @weight_loader.deleter
    def weight_loader(self) -> None:
        del self._weight_loader

    @load_call
    def load_column_parallel_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """Takes the tensor whole; `tp_rank` and `use_presharded_weights` make no difference."""
        self._load_whole(loaded_weight)

    @load_call
    def load_row_parallel_weight(
        self,
        loaded_weight: torch.Tensor,
        tp_rank: int | None = None,
        use_presharded_weights: bool = False,
    ) -> None:
        """Takes the tensor whole."""
        self._load_whole(loaded_weight)

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
        """Takes the tensor whole."""
        self._load_whole(loaded_weight)

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
        """Takes the tensor whole."""
        self._load_whole(loaded_weight)

    def _assert_and_load(self, loaded_weight: torch.Tensor) -> None:
        # The reference's name for it; subclasses of engines call it.
        self._load_whole(loaded_weight)

    def _shard_id_as_int(self, shard_id: str | int) -> int:
        """'q', 'k', 'v' or 0, 1, 2, ... → the slot."""
        if isinstance(shard_id, str) and shard_id in QKV_SLOTS:
            return QKV_SLOTS[shard_id]
        if isinstance(shard_id, int) and not isinstance(shard_id, bool) and shard_id >= 0:
            return shard_id
        raise CallError(f"shard_id is {shard_id!r}, needs 'q', 'k', 'v' or an int of at least 0")

    def _load_whole(self, loaded_weight: torch.Tensor) -> None:
        region = Region.whole(self.data.shape)
        self._load(loaded_weight, source=region, target=region, why="the parameter's shape")

    def _load_piece(
        self,
        loaded_weight: torch.Tensor,
        *,
        dim: int,
        offset: int,
        size: int,
        tp_rank: int | None,
        presharded: bool,
        part: PartName = None,
        num_sharing: int = 1,
    ) -> None:
        """This rank's piece of a full tensor along `dim` → entries offset : offset + size."""
        shape = tuple(self.data.shape)
        check_dim(dim, shape)
        if offset < 0 or size < 0 or offset + size > shape[dim]:
            raise CallError(
                f"entries {offset}:{offset + size} of dim {dim}, needs a range inside 0:{shape[dim]} "
                "(the parameter's size)",
                part=part,
            )
        full = loaded_weight.shape[dim] if dim < loaded_weight.dim() else None
        pieces, piece = (
            (1, 0) if presharded else self._piece(tp_rank, num_sharing, size, full, part)
        )
        spans = [(0, n) for n in shape]
        needed = [*shape]
        needed[dim] = size * pieces
        target = Region.box(shape, [*spans[:dim], (offset, offset + size), *spans[dim + 1 :]])
        inner = span_of_piece(size * pieces, pieces, piece)
        source = Region.box(needed, [*spans[:dim], inner, *spans[dim + 1 :]])
        why = (
            f"{size * pieces} = {pieces} pieces * {size}" if pieces > 1 else "the parameter's shape"
        )
        self._load(loaded_weight, source=source, target=target, part=part, why=why)

    def _piece(
        self, tp_rank: int | None, num_sharing: int, size: int, full: int | None, part: PartName
    ) -> tuple[int, int]:
        """(number of pieces, this rank's piece)."""
        rank, tp_size = self._rank_and_size(tp_rank)
        if num_sharing < 1:
            raise CallError(f"num_heads is {num_sharing}, needs at least 1", part=part)
        if tp_size is None:
            # Only a rank was handed over (as engines with several groups do): the tensor tells T.
            found = full // size if full is not None and size else 1
            if rank // num_sharing >= found:
                raise ShapeError(
                    f"tensor has {full} entries, needs at least {(rank // num_sharing + 1) * size} "
                    f"({size} for each piece up to that of rank {rank})",
                    part=part,
                )
            return found, rank // num_sharing
        if tp_size % num_sharing:
            raise CallError(
                f"num_heads is {num_sharing}, needs a divisor of {tp_size} (the ranks that share "
                "a KV head are neighbours in the tensor-parallel group)",
                part=part,
            )
        pieces = tp_size // num_sharing
        return pieces, piece_of(rank, tp_size, pieces)

    def _rank_and_size(self, tp_rank: int | None) -> tuple[int, int | None]:
        """Rank and T that count now; T is None where only a rank is known."""
        rank, size = self.tp_rank, self.tp_size
        stamped_rank, stamped_size, was_chosen = self._stamp
        known = True
        if (rank, size) == (stamped_rank, stamped_size):
            chosen = explicit_current()
            if chosen is not None:
                rank, size = chosen.tp_rank, chosen.tp_size
            elif not was_chosen:
                everyone = world()
                rank, size = everyone.tp_rank, everyone.tp_size
                known = False
        elif size == stamped_size and rank >= size:
            known = False
            tp_rank = rank if tp_rank is None else tp_rank
        if tp_rank is not None and not known:
            if not isinstance(tp_rank, int) or isinstance(tp_rank, bool) or tp_rank < 0:
                raise CallError(f"tp_rank is {tp_rank!r}, needs an int of at least 0")
            return tp_rank, None
        rank = rank if tp_rank is None else tp_rank
        Ranks(tp_rank=rank, tp_size=size)  # checks that the two go together
        return rank, size

    def _load(
        self,
        loaded_weight: torch.Tensor,
        *,
        source: Region,
        target: Region,
        why: str,
        part: PartName = None,
    ) -> None:
        """Checks everything, then writes. `source.shape` is the full shape that is needed."""
        try:
            copy = Copy(
                source="checkpoint tensor",
                target=self.qualified_name or "parameter",
                part=part,
                source_region=source,
                target_region=target,
            )
            data = self.data
            loaded_weight = _as_needed(loaded_weight, source.shape, data.dtype, why)
            writing.check_dtypes(loaded_weight.dtype, data.dtype)
            values = writing.view_of(loaded_weight, copy.source_region)
            writing.check_values(values, data.dtype)
            self._ledger.check(self, data, copy, values)
            writing.write(data, copy.target_region, values)
            self._ledger.note(self, copy.target_region)
        except LadingError as error:
            raise error.located(part=part) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> BasevLLMParameter:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        data = torch.Tensor.detach(self).clone(memory_format=torch.preserve_format)
        new = _rebuild(type(self), data, self.requires_grad)
        memo[id(self)] = new
        for key, value in self.__dict__.items():
            new.__dict__[key] = (
                _copied_loader(value, memo)
                if key == "_weight_loader"
                else copying.deepcopy(value, memo)
            )
        new._ledger = Ledger()
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "_ledger"}
        args = (type(self), torch.Tensor.detach(self), self.requires_grad)
        return _rebuild, args, state, None, None, _set_state


def _rebuild(
    cls: type[BasevLLMParameter], data: torch.Tensor, requires_grad: bool
) -> BasevLLMParameter:
    new: BasevLLMParameter = torch.Tensor._make_subclass(cls, data, requires_grad)  # type: ignore[assignment]
    new._ledger = Ledger()
    return new


def _set_state(param: BasevLLMParameter, state: dict[str, Any]) -> None:
    param.__dict__.update(state)


def _copied_loader(loader: Any, memo: dict[int, Any]) -> Any:
    """A bound method follows its layer into a copied model; copying a parameter alone copies no layer."""
    if isinstance(loader, types.MethodType) and id(loader.__self__) in memo:
        return types.MethodType(loader.__func__, memo[id(loader.__self__)])
    return loader


def check_dim(dim: int, shape: tuple[int, ...]) -> None:
    if not 0 <= dim < len(shape):
        raise DeclarationError(f"is cut along dim {dim}, needs a dim of its shape {list(shape)}")


def _as_needed(
    loaded: torch.Tensor, needed: tuple[int, ...], dtype: torch.dtype, why: str
) -> torch.Tensor:
    """The tensor, if it has the full shape that is needed; a 0-d one fits (1,)."""
    shape = tuple(loaded.shape)
    if shape == needed:
        return loaded
    if shape == () and needed == (1,):
        return loaded.reshape(1)
    transposed = "; it is transposed" if len(shape) == 2 and shape == needed[::-1] else ""
    raise ShapeError(
        f"tensor is {_spelt(loaded.dtype, shape)}, needs {_spelt(dtype, needed)} ({why}{transposed})"
    )


def _spelt(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    try:
        return dtypes.spell(dtypes.from_torch(dtype), shape)
    except LookupError:
        return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def load_part(
    param: BasevLLMParameter,
    loaded_weight: torch.Tensor,
    *,
    part: PartName = None,
    ranks: Ranks,
    fused_source: bool = False,
) -> None:
    """Loads one part by the parameter's own declared layout, padding included.

    The way of `lading.nn` for what the field's four calls cannot say: a padded vocabulary. Raises
    what those calls raise, and a DeclarationError where the parameter declares no layout.
    """
    layout = param.tp_layout
    name = owners.name_of(param)
    if layout is None:
        raise DeclarationError("declares no layout, needs `tp_layout`", subject=name)
    try:
        placement = layout.place(part, ranks.tp_rank, fused_source=fused_source)
        for box in layout.padding(ranks.tp_rank):
            writing.fill(param.data, box)
            param._ledger.note(param, box)
        needed = layout.fused_shape if fused_source else layout.source_shape(part)
        if placement is None:
            _as_needed(loaded_weight, needed, param.dtype, "the declared layout")
            return
        param._load(
            loaded_weight,
            source=placement.source,
            target=placement.target,
            part=part,
            why="the declared layout",
        )
    except LadingError as error:
        raise error.located(subject=name) from None
