"""What the parallel layers share: parameters made from a `Layer` value, loaders, and the guard that
refuses to compute with weights that were only partly loaded.

Letters: T = tp_size, O = output size, I = input size, both over all ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from lading import dtypes, owners, writing
from lading import ranks as ranks_module
from lading.errors import DeclarationError, LadingError, NotLoadedError
from lading.layers import Layer
from lading.layouts import Layout, PartName
from lading.ledger import Ledger
from lading.nn.stored import KernelFormat, parameter_of
from lading.parameter import BasevLLMParameter, load_part
from lading.plan import Target
from lading.ranks import Ranks
from lading.schemes import PartView, QuantConfig
from lading.schemes.targets import layer_targets
from lading.specs import TensorSpec, dense_specs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LayerLoader",
    "LoadableModule",
    "ParallelLayer",
    "check_loaded",
    "check_usable",
    "start_load",
]


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
        # to_empty() and conversions that need new memory make plain Parameters: keep ours, layout
        # and all.
        before = dict(self._parameters)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._parameters[name]
            if new is None or new is old or not isinstance(old, BasevLLMParameter):
                continue
            if not isinstance(new, BasevLLMParameter):
                self._parameters[name] = _replaced(old, new.data)
        return self


class LayerLoader:
    """A layer's `weight_loader`, as its parameters hold it: without keeping the layer alive.

    A bound method would make a cycle of layer and parameter, and a model that is dropped would keep
    its memory until the garbage collector runs: with the next model, twice the memory.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._owner().weight_loader(*args, **keywords)

    @property
    def __self__(self) -> Any:
        """The layer, as of a bound method."""
        return self._owner()

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerLoader:
        layer = self._owner()
        return LayerLoader(memo.get(id(layer), layer))

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self._owner()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layer = weakref.ref(state["layer"])

    def _owner(self) -> Any:
        layer = self._layer()
        if layer is None:
            raise NotLoadedError("its layer is gone, needs the layer that it was made by")
        return layer


class ParallelLayer(LoadableModule):
    """A layer whose parameters are one rank's share of a `Layer`.

    ranks    this rank's place; `lading.ranks.current()` by default
    group    the process group of the forward pass; the default group by default
    prefix   the layer's qualified name, for messages; also found when the model is named
    quant_config   a QuantConfig: the layer's stored tensors are then those of its scheme
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
        if quant_config is not None and not isinstance(quant_config, QuantConfig):
            raise DeclarationError(
                f"quant_config is {type(quant_config).__name__}, needs a QuantConfig "
                "(lading.schemes.quant_config_of)",
                subject=prefix or type(self).__name__,
            )
        self.layer = layer
        self.quant = quant_config.for_layer(prefix, layer) if quant_config is not None else None
        self.disable_tp = disable_tp
        self.ranks = Ranks() if disable_tp else (ranks or ranks_module.current())
        self.group = group
        self.prefix = prefix
        self.kernel: KernelFormat | None = None
        self.tp_rank, self.tp_size = self.ranks.tp_rank, self.ranks.tp_size
        self.params_dtype = torch.get_default_dtype() if params_dtype is None else params_dtype
        self._specs: dict[str, TensorSpec] = {}
        for spec in layer.specs() if self.quant is None else self.quant.specs:
            if spec.constant is None:
                self._specs[spec.attribute] = spec
                self.register_parameter(spec.attribute, self._parameter(spec))
        if not layer.bias:
            self.register_parameter("bias", None)

    def _layout(self, spec: TensorSpec) -> Layout:
        fused = self.quant is not None and self.quant.fused
        try:
            return _shared_layout(self.layer, spec, self.tp_size, fused)
        except LadingError as error:
            name = self.prefix or type(self).__name__
            if self.quant is not None:
                name = f"{name}.{spec.name}"
            raise error.located(subject=name) from None

    def _dtype(self, spec: TensorSpec) -> torch.dtype:
        stored = self.quant.dtype(spec.name) if self.quant is not None else None
        return self.params_dtype if stored is None else dtypes.to_torch(stored)

    def _parameter(self, spec: TensorSpec) -> BasevLLMParameter:
        layout = self._layout(spec)
        data = torch.empty(layout.local_shape, dtype=self._dtype(spec))
        with ranks_module.as_current(self.ranks):
            param = parameter_of(spec, layout, data, LayerLoader(self))
        param.tp_layout = layout
        param.qualified_name = f"{self.prefix}.{spec.attribute}" if self.prefix else None
        param.stored_leaf = spec.name if spec.attribute != spec.name else ""
        param.stored_shape = spec.stored
        return param

    def expected_targets(self, prefix: str) -> list[Target]:
        """The stored tensors of the layer that are compared with constants, and not kept.

        prefix   the layer's qualified name
        """
        if self.quant is None:
            return []
        found = layer_targets(
            prefix,
            self.layer,
            self.quant,
            dtype=dtypes.from_torch(self.params_dtype),
            layout_of=self._layout,
        )
        return [target for target in found if target.expected is not None]

    def dequantized_weight(self) -> torch.Tensor:
        """float32 [O, I], this rank's weight decoded; a dense one is widened."""
        if self.quant is None:
            return self._parameters["weight"].detach().float()  # type: ignore[union-attr]
        parts = [self.dequantized_part(part.name) for part in self.layer.output.parts]
        weight = torch.cat(parts)
        rows = self.layer.output.local_size(self.tp_size)
        return F.pad(weight, (0, 0, 0, rows - len(weight)))  # a padded vocabulary

    def dequantized_part(self, part: PartName) -> torch.Tensor:
        """float32 [O, I] of one part, without padding, decoded from this rank's own entries."""
        dense = self.layer.layout(dense_specs(bias=False)[0], self.tp_size)
        place = dense.place(part, self.tp_rank)
        if place is None:
            return torch.empty(0, dense.local_shape[1], device=next(self.parameters()).device)
        if self.quant is None:
            weight = self._parameters["weight"]
            assert weight is not None, "a dense layer has a weight"
            return writing.view_of(weight.detach(), place.target).float()
        tensors, offsets = {}, {}
        for name, spec in self._specs.items():
            param = self._parameters[name]
            assert isinstance(param, BasevLLMParameter), "specs make our parameters"
            tensors[spec.name], found = _part_of(param, spec, part, self.tp_rank)
            offsets.update({(spec.name, dim): offset for dim, offset in found.items()})
        view = PartView(
            outputs=place.source.size[0],
            inputs=place.source.size[1],
            first_output=place.source.start[0],
            first_input=place.source.start[1],
            offsets=offsets,
        )
        return self.quant.scheme.dequantize(tensors, view)

    def process_weights_after_loading(self, kernel: KernelFormat | None = None) -> None:
        """Where an engine puts its kernel's own weights: `kernel.pack(layer)`, once loaded.

        Raises a NotLoadedError where elements were never loaded. Without a kernel the weights stay
        as they are stored, and each forward pass decodes them.
        """
        self.require_loaded()
        if kernel is not None:
            kernel.pack(self)
            self.kernel = kernel

    def restore_weights(self) -> None:
        """The stored weights again, by the kernel's declared inverse, for updates and export.

        Raises a DeclarationError where the kernel declares none.
        """
        kernel, self.kernel = self.kernel, None
        if kernel is None:
            return
        if kernel.unpack is None:
            self.kernel = kernel
            raise DeclarationError(
                f"{type(kernel).__name__} declares no inverse, needs a new load to get the stored "
                "weights back",
                subject=self.prefix or type(self).__name__,
            )
        kernel.unpack(self)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """X @ weight.T + bias with this rank's weight, decoded or by the engine's kernel."""
        if self.kernel is not None:
            return self.kernel.apply(self, x, bias)
        if self.quant is None:
            return F.linear(x, self._parameters["weight"], bias)  # type: ignore[arg-type]
        return F.linear(x, self.dequantized_weight().to(x.dtype), bias)

    def weight_loader(
        self,
        param: BasevLLMParameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: PartName = None,
    ) -> None:
        """Loads a full checkpoint tensor: one part, or all parts where it is fused on disk.

        loaded_shard_id   the part: 'q', 'k', 'v', or 0, 1, ... in a merged layer; None for a tensor
                          that holds all parts, or for a layer of one
        Padding rows become zero. Raises what the parameter's own load calls raise.
        """
        layout = param.tp_layout
        names = layout.part_names if layout is not None else (None,)
        if loaded_shard_id is not None and len(names) == 1 and len(self.layer.output.parts) > 1:
            loaded_shard_id = None  # the same tensor for every part: a replicated one
        loaded_weight = self._viewed(param, loaded_weight, loaded_shard_id)
        if loaded_shard_id is not None or len(names) == 1:
            load_part(param, loaded_weight, part=loaded_shard_id, ranks=self.ranks)
            return
        for name in names:
            load_part(param, loaded_weight, part=name, ranks=self.ranks, fused_source=True)

    def _viewed(
        self, param: BasevLLMParameter, loaded: torch.Tensor, part: PartName
    ) -> torch.Tensor:
        """The tensor in the view that the layout counts in, where the file has another."""
        layout = param.tp_layout
        if param.stored_shape is None or layout is None:
            return loaded
        name = part if layout.fused_dim is not None else None
        fused = name is None and layout.fused_dim is not None
        needed = layout.fused_shape if fused else layout.source_shape(name)
        if loaded.numel() != prod(needed):
            return loaded  # the load says what is wrong
        return loaded.reshape(needed)

    def extra_repr(self) -> str:
        """Full sizes, rank, bias."""
        outputs = " + ".join(str(part.size) for part in self.layer.output.parts)
        return f"in={self.layer.input.size}, out={outputs}, {self.ranks}, bias={self.layer.bias}"


def _shared_layout(layer: Layer, spec: TensorSpec, tp_size: int, fused_source: bool) -> Layout:
    """One value for equal layers: a model has the same ones in each block."""
    try:
        return _layout_of(layer, spec, tp_size, fused_source)
    except TypeError:  # of a declaration that cannot be hashed, as it holds a list
        return layer.layout(spec, tp_size, fused_source=fused_source)


@lru_cache(maxsize=1024)
def _layout_of(layer: Layer, spec: TensorSpec, tp_size: int, fused_source: bool) -> Layout:
    return layer.layout(spec, tp_size, fused_source=fused_source)


def _replaced(old: BasevLLMParameter, data: torch.Tensor) -> BasevLLMParameter:
    """The same object over other memory, so that whoever else holds it (a tied layer, an engine)
    keeps it; another one like it where torch cannot swap (weak references).
    """
    new = like(old, data)
    try:
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    except RuntimeError:
        return new
    return old


def like(old: BasevLLMParameter, data: torch.Tensor) -> BasevLLMParameter:
    """A parameter of the same class and state over other memory, nothing of it loaded."""
    new: BasevLLMParameter = torch.Tensor._make_subclass(type(old), data, old.requires_grad)
    vars(new).update(vars(old))
    new._ledger = Ledger()
    return new


def _part_of(
    param: BasevLLMParameter, spec: TensorSpec, part: PartName, tp_rank: int
) -> tuple[torch.Tensor, dict[int, int]]:
    """One part of a parameter, with its dims as the scheme declared them, and straddling
    offsets.
    """
    layout = param.tp_layout
    assert layout is not None, "parameters of layers have layouts"
    name = part if layout.fused_dim is not None else None
    place = layout.place(name, tp_rank, fused_source=layout.fused_source)
    assert place is not None, "a part that is kept has scales"
    tensor = writing.view_of(param.detach(), place.target)
    offsets = {
        dim: layout.offset(name, tp_rank, dim)
        for dim, cut in enumerate(layout.cuts)
        if cut.straddle
    }
    if spec.per_part:
        return tensor.squeeze(0), {dim - 1: offset for dim, offset in offsets.items()}
    return tensor, offsets


def _require_complete(param: BasevLLMParameter) -> None:
    layout = param.tp_layout
    padding = layout.padding(param.tp_rank) if layout is not None else ()
    missing = param._ledger.missing(param, padding)
    if missing is None:
        return
    part: PartName = None
    for name in layout.part_names if layout is not None else ():
        assert layout is not None, "part names come from a layout"
        placement = layout.place(name, param.tp_rank, fused_source=layout.fused_source)
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
    The forward pass of a layer refuses parameters of which only some elements were loaded; of one
    that no load has touched it cannot know whether its caller has filled it some other way. Only
    this call takes it for missing.
    """
    check_usable(model)
    for name, param in model.named_parameters():
        if isinstance(param, BasevLLMParameter):
            if not param._ledger.is_begun:
                raise NotLoadedError("was never loaded, needs to be", subject=name)
            _require_complete(param)


def check_usable(model: nn.Module) -> None:
    """Raises a NotLoadedError where a load has failed half-way, or weights have no memory yet."""
    owners.name_parameters(model)
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Refusal):
                raise hook.error(module)
    for name, param in model.named_parameters():
        if param.device.type == "meta":
            raise NotLoadedError("has no memory yet (it is on the meta device)", subject=name)


class _Refusal:
    """A forward hook of the modules of a model that a failed load has left half-written."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def error(self, module: nn.Module) -> NotLoadedError:
        return NotLoadedError(
            f"its weights are partly overwritten by a load that failed ({self.reason}), needs a "
            "load that succeeds",
            subject=type(module).__name__,
        )

    def __call__(self, module: nn.Module, _args: object) -> None:
        raise self.error(module)


def refuse_forward(model: nn.Module, reason: str) -> None:
    """Marks a model, and each of its modules, as unusable until a load succeeds."""
    allow_forward(model)
    for module in model.modules():
        module.register_forward_pre_hook(_Refusal(reason))
    start_load(model)  # what was noted as loaded is no longer so


def allow_forward(model: nn.Module, walk: owners.Walk | None = None) -> None:
    """Takes the marks of `refuse_forward` away.

    walk   over the model, where somebody has made one
    """
    for _, module in model.named_modules() if walk is None else walk.modules:
        if module._forward_pre_hooks:
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, _Refusal):
                    del module._forward_pre_hooks[key]


def start_load(model: nn.Module) -> None:
    """Lets the next loads write other bytes than the last ones did.

    Without it a part that is written twice with different bytes is an error, as the sign of two
    checkpoint tensors that claim one place. Training stacks call it before each update.
    """
    for param in model.parameters():
        if isinstance(param, BasevLLMParameter):
            param._ledger.start()
