"""The base of the parameter classes: rank, loader, checks, and the one path by which they load.

Letters: T = tp_size; r = tp_rank; S = ranks that share a KV head.
"""

from __future__ import annotations

import copy as copying
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch.nn import Parameter
from torch.overrides import is_tensor_like

from lading import owners, writing
from lading.errors import CallError, DeclarationError, KeywordError, LadingError, ShapeError
from lading.layouts import Layout, PartName, piece_of, span_of_piece
from lading.ledger import Ledger
from lading.parameter.checks import as_needed, check_values, whole_number
from lading.ranks import explicit_current, world
from lading.regions import Copy, Region

__all__ = ["BasevLLMParameter", "WeightLoader", "load_call", "set_lazy_view_device"]

WeightLoader = Callable[..., Any]
_F = TypeVar("_F", bound=Callable[..., Any])

QKV_SLOTS = {"q": 0, "k": 1, "v": 2}
_RANK_ATTRIBUTES = ("tp_rank", "tp_size")

_lazy_view_devices: dict[str, Callable[[torch.Tensor], None]] = {
    "xla": torch._sync  # type: ignore[attr-defined]
}


def set_lazy_view_device(device_type: str, sync: Callable[[torch.Tensor], None] | None) -> None:
    """Declares that views of a device's tensors reach the tensor late: loaders end with `sync`.

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
    """Makes a load call's errors carry the parameter's name, and wrong keywords errors of ours."""
    name = method.__name__
    allowed = [key for key in inspect.signature(method).parameters if key != "self"]

    @functools.wraps(method)
    def call(self: BasevLLMParameter, *args: Any, **keywords: Any) -> Any:
        try:
            if len(args) > len(allowed):
                raise KeywordError(f"{name} got {len(args)} values, needs {', '.join(allowed)}")
            given = allowed[: len(args)]
            for key in keywords:
                if key not in allowed:
                    raise KeywordError(
                        f"{name} got keyword {key!r}, needs some of: {', '.join(allowed)}"
                    )
                if key in given:
                    raise KeywordError(f"{name} got {key} twice, needs it once")
            if not args and "loaded_weight" not in keywords:
                raise KeywordError(f"{name} got no loaded_weight, needs a tensor")
            loaded = args[0] if args else keywords["loaded_weight"]
            if not is_tensor_like(loaded):  # type: ignore[no-untyped-call]
                raise CallError(f"loaded_weight is {type(loaded).__name__}, needs a tensor")
            return method(self, *args, **keywords)
        except LadingError as error:
            raise error.located(subject=owners.name_of(self)) from None

    return call  # type: ignore[return-value]


class BasevLLMParameter(Parameter):
    """A parameter that every rank holds whole.

    data            1-D to 4-D (or 0-d), any dtype, any device, also meta
    weight_loader   called by engines as weight_loader(param, loaded_weight, ...); may be None. It
                    can be set, and deleted: reading it then raises AttributeError

    `tp_rank` and `tp_size` are plain attributes stamped at construction. What counts at load time
    is, first to last: `tp_rank=` of the call; the attributes, where they were overwritten; what
    `lading.ranks.set_current` set; the stamp, if `set_current` had set it; torch.distributed's
    world. Where only a rank is known, T follows from the loaded tensor.
    """

    # Whether the parts that merged and qkv loads put in one place may differ. A plain parameter
    # holds what no rank and no part owns (compressed-tensors' `weight_shape` of q, k and v): the
    # last one stays.
    _parts_may_differ: ClassVar[bool] = True

    _weight_loader: WeightLoader | None
    tp_rank: int
    tp_size: int
    qualified_name: str | None
    tp_layout: Layout | None
    stored_leaf: str = ""
    """What follows the module's name in the checkpoint, where that is not the parameter's own."""
    stored_shape: tuple[int, ...] | None = None
    """The checkpoint tensor's shape, where it is another view of the layout's elements."""
    stored_order: tuple[int, ...] = ()
    """Which dim of the stored form each dim is, once `permute_param_layout_` has permuted them."""
    _stamp: tuple[int, int, bool]
    _overwritten: frozenset[str]

    def __new__(cls, data: torch.Tensor | None = None, **_: Any) -> BasevLLMParameter:
        if data is not None and not isinstance(data, torch.Tensor):
            raise DeclarationError(
                f"data is {type(data).__name__}, needs a tensor", subject=cls.__name__
            )
        return super().__new__(cls, data, requires_grad=False)

    def __init__(self, data: torch.Tensor, weight_loader: WeightLoader | None = None) -> None:
        self.weight_loader = weight_loader
        chosen = explicit_current()
        ranks = chosen or world()
        # Past __setattr__: the stamp is what later assignments are told from.
        vars(self).update(tp_rank=ranks.tp_rank, tp_size=ranks.tp_size)
        self._stamp = (ranks.tp_rank, ranks.tp_size, chosen is not None)
        self._overwritten = frozenset()
        self.qualified_name = None
        self.tp_layout = None
        self._ledger = Ledger()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _RANK_ATTRIBUTES:
            # Assigned, even if to the stamped number: from now on it is what counts.
            self._overwritten = vars(self).get("_overwritten", frozenset()) | {name}
        super().__setattr__(name, value)

    @property
    def _ledger(self) -> Ledger:
        facts = vars(self)
        kept = facts["_ledger"].kept_by(self)
        facts["_ledger"] = kept
        return kept  # type: ignore[no-any-return]

    @_ledger.setter
    def _ledger(self, ledger: Ledger) -> None:
        vars(self)["_ledger"] = ledger.kept_by(self)

    @property
    def weight_loader(self) -> WeightLoader | None:
        """The loader given at construction or set since."""
        try:
            return self._weight_loader
        except AttributeError:
            raise AttributeError(f"weight_loader of {type(self).__name__} was deleted") from None

    @weight_loader.setter
    def weight_loader(self, loader: WeightLoader | None) -> None:
        device_type = self.device.type
        if (
            loader is not None
            and device_type in _lazy_view_devices
            and not isinstance(loader, _SyncedLoader)
        ):
            loader = _SyncedLoader(loader, device_type)
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
        self._load_whole(loaded_weight, part=shard_id, parts_may_differ=self._parts_may_differ)

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
        self._load_whole(loaded_weight, part=shard_id, parts_may_differ=self._parts_may_differ)

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

    def _load_whole(
        self,
        loaded_weight: torch.Tensor,
        *,
        part: PartName = None,
        parts_may_differ: bool = False,
    ) -> None:
        region = Region.whole(self.data.shape)
        self._load(
            loaded_weight,
            source=region,
            target=region,
            part=part,
            why="the parameter's shape",
            parts_may_differ=parts_may_differ,
        )

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
        """The rank's own piece of a full tensor along `dim` → entries offset : offset + size."""
        shape = tuple(self.data.shape)
        if offset < 0 or size < 0 or offset + size > shape[dim]:
            raise CallError(
                f"entries {offset}:{offset + size} of dim {dim}, "
                f"needs a range inside 0:{shape[dim]} (the parameter's size)",
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
        if pieces > 1:
            why = f"{size * pieces} = {pieces} pieces * {size}"
        else:
            why = "the parameter's shape" if size == shape[dim] else f"{size} = the part's size"
        self._load(loaded_weight, source=source, target=target, part=part, why=why)

    def _piece(
        self, tp_rank: int | None, num_sharing: int, size: int, full: int | None, part: PartName
    ) -> tuple[int, int]:
        """(number of pieces, this rank's piece)."""
        rank, tp_size, world_size = self._rank_and_size(tp_rank)
        if tp_size is None:
            # Only a rank was handed over (as engines with several groups do): the tensor tells T,
            # which divides the world where there is one.
            if not size:
                return 1, 0  # nothing to cut
            found = full // size if full is not None else 1
            if world_size > 1 and (not found or world_size % (found * num_sharing)):
                tp_size = world_size
            elif rank // num_sharing >= found:
                least = (rank // num_sharing + 1) * size
                raise ShapeError(
                    f"tensor has {full} entries along the cut dim, needs at least {least} "
                    f"({size} for each piece up to rank {rank}'s)",
                    part=part,
                )
            else:
                return found, rank // num_sharing
        if tp_size % num_sharing:
            raise CallError(
                f"num_heads is {num_sharing}, needs a divisor of {tp_size} (the ranks that share "
                "a KV head are neighbours in the tensor-parallel group)",
                part=part,
            )
        if rank >= tp_size:
            raise CallError(
                f"tp_rank is {rank}, needs 0 to {tp_size - 1} (tp_size is {tp_size})", part=part
            )
        pieces = tp_size // num_sharing
        return pieces, piece_of(rank, tp_size, pieces)

    def _rank_and_size(self, tp_rank: int | None) -> tuple[int, int | None, int]:
        """Rank and T that count now, and the world's size; T is None where only a rank is known."""
        stamped_rank, stamped_size, was_chosen = self._stamp
        own_rank = "tp_rank" in self._overwritten or self.tp_rank != stamped_rank
        own_size = "tp_size" in self._overwritten or self.tp_size != stamped_size
        chosen = explicit_current()
        if chosen is not None:
            now = (chosen.tp_rank, chosen.tp_size)
        elif was_chosen:
            now = (stamped_rank, stamped_size)
        else:
            everyone = world()
            now = (everyone.tp_rank, everyone.tp_size)
        asked = self.tp_rank if own_rank and tp_rank is None else tp_rank
        rank = now[0] if asked is None else whole_number("tp_rank", asked)
        if own_size:
            return rank, whole_number("tp_size", self.tp_size, least=1), now[1]
        is_known = chosen is not None or was_chosen or asked is None
        return rank, now[1] if is_known else None, now[1]

    def _load(
        self,
        loaded_weight: torch.Tensor,
        *,
        source: Region,
        target: Region,
        why: str,
        part: PartName = None,
        parts_may_differ: bool = False,
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
            loaded_weight = as_needed(loaded_weight, source.shape, data.dtype, why)
            check_values(loaded_weight, data)
            values = writing.view_of(loaded_weight, copy.source_region)
            ledger = self._ledger
            ledger.check(self, data, copy, values, any_part=not parts_may_differ)
            writing.write(data, copy.target_region, values)
            ledger.note(self, copy.target_region, part)
        except LadingError as error:
            raise error.located(part=part) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> BasevLLMParameter:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        data = torch.Tensor.detach(self).clone(memory_format=torch.preserve_format)
        new = _rebuild(type(self), data, self.requires_grad)
        memo[id(self)] = new
        for key, value in vars(self).items():
            if key != "_ledger":
                vars(new)[key] = _copied(value, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "_ledger"}
        args = (type(self), torch.Tensor.detach(self), self.requires_grad)
        return _rebuild, args, state, None, None, _set_state


def _rebuild(
    cls: type[BasevLLMParameter], data: torch.Tensor, requires_grad: bool
) -> BasevLLMParameter:
    new: BasevLLMParameter = torch.Tensor._make_subclass(cls, data, requires_grad)
    new._ledger = Ledger(is_begun=True)  # what its original had is not known here
    return new


def _set_state(param: BasevLLMParameter, state: dict[str, Any]) -> None:
    param.__dict__.update(state)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, but a bound method, wherever it is, brings no layer along: it follows its layer
    into a copied model, and stays with the old one where a parameter is copied alone.
    """
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, memo.get(id(value.__self__), value.__self__))
    if isinstance(value, functools.partial):
        func = _copied(value.func, memo)
        return functools.partial(func, *value.args, **value.keywords)
    if isinstance(value, _SyncedLoader):
        return _SyncedLoader(_copied(value.loader, memo), value.device_type)
    return copying.deepcopy(value, memo)
