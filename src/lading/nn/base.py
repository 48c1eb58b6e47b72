"""What the parallel layers share: parameters made from a `Layer` value, loaders, and the guard that
refuses to compute with weights that were only partly loaded.

Letters: T = tp_size, O = output size, I = input size, both over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lading import owners, ranks as ranks_module
from lading.errors import DeclarationError, LadingError, NotLoadedError
from lading.layers import Layer
from lading.layouts import PartName
from lading.ledger import Ledger
from lading.parameter import BasevLLMParameter, ModelWeightParameter, _ColumnvLLMParameter
from lading.ranks import Ranks
from lading.specs import Along, TensorSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LoadableModule", "ParallelLayer", "check_loaded", "start_load"]


class LoadableModule(nn.Module):
    """A module whose parameters stay what they are when they get new memory, and are guarded."""

    def require_loaded(self) -> None:
        """Raises a NotLoadedError where a load has begun and left elements unwritten."""
        if torch.compiler.is_compiling():
            return
        for param in self._parameters.values():
            if isinstance(param, BasevLLMParameter):
                _require_complete(param)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LoadableModule:
        # to_empty() and conversions that need new memory make plain Parameters: keep ours, layout and all.
        before = dict(self._parameters)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._parameters[name]
            if new is None or new is old or not isinstance(old, BasevLLMParameter):
                continue
            if not isinstance(new, BasevLLMParameter):
                self._parameters[name] = like(old, new.data)
        return self


class ParallelLayer(LoadableModule):
    """A layer whose parameters are one rank's share of a `Layer`.

    ranks    this rank's place; `lading.ranks.current()` by default
    group    the process group of the forward pass; the default group by default
    prefix   the layer's qualified name, for messages; also found when the model is named
    Raises a LayoutError where the layer does not divide, with the TP sizes that work.
    """

    def __init__(
        self,
        layer: Layer,
        *,
        params_dtype: torch.dtype | None,
        quant_config: object | None,
        prefix: str,
        ranks: Ranks | None,
        group: ProcessGroup | None,
        disable_tp: bool = False,
    ) -> None:
        super().__init__()
        if quant_config is not None:
            raise DeclarationError(
                f"quant_config is {type(quant_config).__name__}, needs None (quantised layers are "
                "not built yet)",
                subject=prefix or type(self).__name__,
            )
        self.layer = layer
        self.ranks = Ranks() if disable_tp else (ranks or ranks_module.current())
        self.group = group
        self.prefix = prefix
        self.tp_rank, self.tp_size = self.ranks.tp_rank, self.ranks.tp_size
        self.params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        for spec in layer.specs():
            self.register_parameter(spec.name, self._parameter(spec))
        if not layer.bias:
            self.register_parameter("bias", None)

    def _parameter(self, spec: TensorSpec) -> BasevLLMParameter:
        name = f"{self.prefix}.{spec.name}" if self.prefix else spec.name
        try:
            layout = self.layer.layout(spec, self.tp_size)
        except LadingError as error:
            raise error.located(subject=self.prefix or type(self).__name__) from None
        data = torch.empty(layout.local_shape, dtype=self.params_dtype)
        with ranks_module.as_current(self.ranks):
            param = _parameter_of(spec, data, self.weight_loader, is_cut=_is_cut(layout.cuts[0].axis.parts))
        param.tp_layout = layout
        param.qualified_name = name if self.prefix else None
        return param

    def weight_loader(
        self,
        param: BasevLLMParameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: PartName = None,
    ) -> None:
        """Loads a full checkpoint tensor: one part, or all parts where it is fused on disk."""
        raise DeclarationError("has no loader of its own", subject=type(self).__name__)

    def extra_repr(self) -> str:
        """Full sizes, rank, bias."""
        outputs = " + ".join(str(part.size) for part in self.layer.output.parts)
        return f"in={self.layer.input.size}, out={outputs}, {self.ranks}, bias={self.layer.bias}"


def like(old: BasevLLMParameter, data: torch.Tensor) -> BasevLLMParameter:
    """A parameter of the same class and state over other memory, nothing of it loaded."""
    new: BasevLLMParameter = torch.Tensor._make_subclass(type(old), data, old.requires_grad)  # type: ignore[assignment]
    vars(new).update(vars(old))
    new._ledger = Ledger()
    return new


def _is_cut(parts: tuple[Any, ...]) -> bool:
    return any(part.max_pieces != 1 for part in parts)


def _parameter_of(
    spec: TensorSpec, data: torch.Tensor, loader: Callable[..., Any], *, is_cut: bool
) -> BasevLLMParameter:
    """The class that says what the tensor's dims are; a vector along whole outputs is a plain one."""
    along = [dim.along for dim in spec.dims]
    if along == [Along.OUTPUT, Along.INPUT]:
        return ModelWeightParameter(data=data, output_dim=0, input_dim=1, weight_loader=loader)
    if is_cut:
        return _ColumnvLLMParameter(data=data, output_dim=0, weight_loader=loader)
    return BasevLLMParameter(data=data, weight_loader=loader)


def _require_complete(param: BasevLLMParameter) -> None:
    layout = param.tp_layout
    padding = layout.padding(param.tp_rank) if layout is not None else ()
    missing = param._ledger.missing(param, padding)
    if missing is None:
        return
    part: PartName = None
    for name in layout.part_names if layout is not None else ():
        placement = layout.place(name, param.tp_rank) if layout is not None else None
        if placement is not None and placement.target.intersect(missing) is not None:
            part = name
            break
    raise NotLoadedError(
        f"elements {missing} of {list(missing.shape)} were never loaded, needs all of them",
        subject=owners.name_of(param),
        part=part,
    )


def check_loaded(model: nn.Module) -> None:
    """Raises a NotLoadedError, naming parameter and part, where loads have left elements unwritten.

    For loaders that call `param.load_*` or `weight_loader` themselves: call it when they are done.
    """
    owners.name_parameters(model)
    for name, param in model.named_parameters():
        if param.device.type == "meta":
            raise NotLoadedError("has no memory yet (it is on the meta device)", subject=name)
        if isinstance(param, BasevLLMParameter):
            _require_complete(param)


def start_load(model: nn.Module) -> None:
    """Lets the next loads write other bytes than the last ones did.

    Without it a part that is written twice with different bytes is an error, as the sign of two
    checkpoint tensors that claim one place. Training stacks call it before each update.
    """
    for param in model.parameters():
        if isinstance(param, BasevLLMParameter):
            param._ledger.start()
