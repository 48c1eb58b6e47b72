"""Which scheme each layer of a checkpoint has: the one table from `quant_method` to a parser.

`quantization_of` finds what a checkpoint declares; `QuantConfig` joins it with the headers. It is
what layers take as `quant_config`, as in the field: `for_layer(prefix, layer)` gives a layer's
scheme and its stored tensors, or None where the layer is dense.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from lading import dtypes
from lading.checkpoint import Checkpoint, Source, read_json
from lading.checkpoint.files import file_size
from lading.errors import CallError, ConfigError, DtypeError, LadingError, LayoutError
from lading.layers import Layer
from lading.names import Names
from lading.schemes.base import Found, Quantization, Scheme, Stored
from lading.schemes.cache_scales import LEAVES, CacheScale, found_scales
from lading.specs import Along, Constant, Dim, TensorSpec, bias_spec

__all__ = [
    "METHODS",
    "LayerScheme",
    "QuantConfig",
    "Straddle",
    "quant_config_of",
    "quantization_of",
]

METHODS: Mapping[str, tuple[str, str]] = {
    "auto-round": ("auto_round", "parse_auto_round"),
    "awq": ("awq", "parse_awq"),
    "bitsandbytes": ("bitsandbytes", "parse_bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "parse_compressed_tensors"),
    "fp8": ("fp8", "parse_fp8"),
    "gptq": ("gptq", "parse_gptq"),
    "hqq": ("hqq", "parse_hqq"),
    "modelopt": ("modelopt", "parse_modelopt"),
}
"""quant_method → (module of this package, its parser)."""

_ALIASES = {
    "awq_marlin": "awq",
    "fbgemm_fp8": "fp8",
    "intel/auto-round": "auto-round",
    "modelopt_fp4": "modelopt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScheme:
    """How one layer is stored.

    scheme   its scheme
    specs    its stored tensors with the bias; in a fused layer a tensor that follows neither
             outputs nor parts has one entry for each part
    dtypes   of each tensor in the file, where the format leaves a choice; by tensor name
    fused    the file holds all parts side by side
    """

    scheme: Scheme
    specs: tuple[TensorSpec, ...]
    dtypes: tuple[tuple[str, str], ...]
    fused: bool

    def dtype(self, name: str) -> str | None:
        """The stored dtype of a tensor, None where the model's counts."""
        return dict(self.dtypes).get(name)


class Straddle(str, Enum):
    """What becomes of a stored scale that a cut goes through: a block of outputs or inputs.

    DUPLICATE   the ranks on both sides keep it, with the offset at which they use it: exact
    REFUSE      such a cut is an error, for kernels that know no offsets
    """

    DUPLICATE = "duplicate"
    REFUSE = "refuse"


Fact = tuple[str, str, tuple[int, ...]]
Facts = tuple[Fact, ...]
"""(name, dtype, shape) of each tensor of a module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Module:
    """Where a layer, or one part of it, is stored."""

    name: str
    facts: Facts
    outputs: int
    fused: bool


class QuantConfig:
    """A checkpoint's quantisation and its headers: chooses the scheme of each layer.

    quantization   what the config declares
    sources        the checkpoint's tensors
    names          naming rules, for the parts of fused layers
    straddle       what becomes of scales that a cut goes through
    """

    def __init__(
        self,
        quantization: Quantization,
        sources: Mapping[str, Source],
        names: Names,
        *,
        straddle: Straddle = Straddle.DUPLICATE,
    ) -> None:
        self.quantization, self.sources, self.names = quantization, sources, names
        self.straddle = straddle
        self._sorted = sorted(sources)
        self._known: dict[tuple[str, int], LayerScheme | None] = {}
        self._alike: dict[Hashable, LayerScheme | None] = {}
        self._layers: dict[Layer, int] = {}
        self._seen: dict[int, tuple[Layer, int]] = {}

    def for_layer(self, prefix: str, layer: Layer) -> LayerScheme | None:
        """The scheme of the layer of this name, None where it is dense.

        Raises a LadingError where config and headers contradict each other, or parts differ.
        Layers of which the config says the same and the headers show the same share one value:
        18,600 modules of 48 layers of 128 experts took 2.4 s one by one, 0.4 s so.
        """
        number = self._number(layer)
        key = (prefix, number)
        if key not in self._known:
            try:
                self._known[key] = self._choose(prefix, layer, number)
            except LadingError as error:
                raise error.located(subject=prefix) from None
        return self._known[key]

    def cache_scales(self, attention: str, qkv: Layer) -> tuple[CacheScale, ...]:
        """The stored scales of an attention module's KV cache; none where there are none.

        attention   the module's name, "model.layers.0.self_attn"
        qkv         its fused layer of parts "q", "k", "v"
        Raises a LadingError where config and headers contradict each other.
        """
        whole = self.names.whole(f"{attention}.").removesuffix(".")
        tensors = {
            leaf: self.sources[f"{whole}.{leaf}"]
            for leaf in LEAVES
            if f"{whole}.{leaf}" in self.sources
        }
        stored = {
            leaf: Stored(dtype=s.dtype, shape=s.shape, file=s.file) for leaf, s in tensors.items()
        }
        try:
            return found_scales(self.quantization.cache_scales(), stored, qkv)
        except LadingError as error:
            raise error.located(subject=attention) from None

    def _number(self, layer: Layer) -> int:
        """The same number for equal layers: hashing a layer's axes for each tensor takes longer
        than all else.
        """
        seen = self._seen.get(id(layer))
        if seen is None:
            number = self._layers.setdefault(layer, len(self._layers))
            self._seen[id(layer)] = seen = (layer, number)  # kept, so that no other has its id
        return seen[1]

    def _choose(self, prefix: str, layer: Layer, number: int) -> LayerScheme | None:
        modules = self._modules(prefix, layer)
        if not modules:
            return None  # nothing of it is in the file: the plan says what is missing
        said = tuple(
            (self.quantization.said_of(layer, one.name), one.facts, one.fused) for one in modules
        )
        key = (number, said)
        if key not in self._alike:
            self._alike[key] = self._scheme(layer, [self._found(layer, one) for one in modules])
        return self._alike[key]

    def _scheme(self, layer: Layer, found: list[Found]) -> LayerScheme | None:
        schemes = {one.module: self.quantization.scheme_for(layer, one) for one in found}
        first, scheme = next(iter(schemes.items()))
        for module, other in schemes.items():
            if other != scheme:
                raise ConfigError(
                    f"{first!r} is {_named(scheme)} and {module!r} is {_named(other)}, needs one "
                    "scheme (the two are parts of one layer)"
                )
        if scheme is None:
            return None
        specs = [_per_part(spec, layer, found) for spec in scheme.specs(layer, found[0])]
        if self.straddle is Straddle.REFUSE:
            specs = [_unshared(spec, layer, found[0]) for spec in specs]
        specs += self._biases(layer, found)
        stored = tuple(self._dtypes(specs, found))
        return LayerScheme(scheme=scheme, specs=tuple(specs), dtypes=stored, fused=found[0].fused)

    def _modules(self, prefix: str, layer: Layer) -> list[_Module]:
        """What is stored of the layer: one module, or one for each part."""
        whole = self.names.whole(f"{prefix}.").removesuffix(".")
        parts = layer.output.parts
        facts = self._facts(whole)
        if facts or len(parts) == 1:
            modules = [(whole, layer.output.size, facts)]
        else:
            stored = self.names.parts(f"{prefix}.weight", len(parts)) or ()
            names = [name.removesuffix(".weight") for name in stored]
            sizes = [part.size for part in parts]
            modules = [(n, size, self._facts(n)) for n, size in zip(names, sizes, strict=False)]
        return [
            _Module(name=name, facts=facts, outputs=size, fused=name == whole and len(parts) > 1)
            for name, size, facts in modules
            if facts
        ]

    def _facts(self, module: str) -> Facts:
        start = f"{module}."
        at, length = bisect_left(self._sorted, start), len(start)
        facts = []
        while at < len(self._sorted) and self._sorted[at].startswith(start):
            source = self.sources[self._sorted[at]]
            facts.append((source.name[length:], source.dtype, source.shape))
            at += 1
        return tuple(facts)

    def _found(self, layer: Layer, module: _Module) -> Found:
        return Found(
            module=module.name,
            tensors={
                name: Stored(
                    dtype=dtype, shape=shape, file=self.sources[f"{module.name}.{name}"].file
                )
                for name, dtype, shape in module.facts
            },
            outputs=module.outputs,
            inputs=layer.input.size,
            fused=module.fused,
        )

    def _biases(self, layer: Layer, found: list[Found]) -> list[TensorSpec]:
        if layer.bias:
            return [bias_spec()]
        if not any("bias" in one.tensors for one in found):
            return []
        # Older GPTQ tools write a bias of zeros for every layer: dropped if it is one, refused if
        # not.
        return [replace(bias_spec(), dtypes=("F16", "BF16", "F32"), constant=Constant.ZERO)]

    def _dtypes(self, specs: list[TensorSpec], found: list[Found]) -> list[tuple[str, str]]:
        """The file's dtype of each tensor of which the format leaves a choice."""
        chosen = []
        for spec in specs:
            if not spec.dtypes:
                continue
            stored = {
                one.module: one.tensors[spec.name] for one in found if spec.name in one.tensors
            }
            for module, tensor in stored.items():
                if tensor.dtype not in spec.dtypes:
                    allowed = " or ".join(dtypes.printed(code) for code in spec.dtypes)
                    raise DtypeError(
                        f"checkpoint tensor {module + '.' + spec.name!r} is "
                        f"{dtypes.spell(tensor.dtype, tensor.shape)}, needs {allowed}",
                        file=tensor.file or None,
                    )
            kinds = {tensor.dtype for tensor in stored.values()}
            if len(kinds) > 1:
                listed = ", ".join(f"{m}: {dtypes.printed(t.dtype)}" for m, t in stored.items())
                raise DtypeError(f"{spec.name!r} has several dtypes ({listed}), needs one")
            chosen.append((spec.name, kinds.pop() if kinds else spec.dtypes[0]))
        return chosen


def _named(scheme: Scheme | None) -> str:
    return "dense" if scheme is None else scheme.name


def _unshared(spec: TensorSpec, layer: Layer, found: Found) -> TensorSpec:
    """The spec of which no entry may be kept twice.

    Raises a LayoutError where two parts that lie side by side share an entry whatever the cut.
    """
    if not any(dim.straddle for dim in spec.dims):
        return spec
    for dim in spec.dims:
        at = 0
        for part in layer.output.parts[:-1] if dim.straddle and dim.along is Along.OUTPUT else ():
            at, grain = at + part.size, int(dim.grain)
            if found.fused and at % grain:
                raise LayoutError(
                    f"ends at row {at} of {found.module}.{spec.name}; {dim.reason}, no entry may "
                    f"be kept twice, and {at} = {at // grain} * {grain} + {at % grain}",
                    part=part.name,
                )
    dims = tuple(
        replace(dim, straddle=False, reason=f"{dim.reason}, no entry may be kept twice,")
        if dim.straddle
        else dim
        for dim in spec.dims
    )
    return replace(spec, dims=dims)


def _per_part(spec: TensorSpec, layer: Layer, found: list[Found]) -> TensorSpec:
    """In a fused layer, entries for each part of a tensor that follows neither outputs nor parts.

    A vector of a fixed size, such as a JSON text, may have another size in each part.
    """
    along = [dim.along for dim in spec.dims]
    parts = layer.output.parts
    if len(parts) == 1 or Along.OUTPUT in along or Along.PARTS in along:
        return spec
    stored = [one.tensors[spec.name].shape for one in found if spec.name in one.tensors]
    is_vector = along == [Along.FIXED] and all(len(shape) == 1 for shape in stored)
    if is_vector and len(stored) in (1, len(parts)):
        sizes = tuple(shape[0] for shape in stored) * (len(parts) // len(stored))
        return replace(spec, dims=(Dim(along=Along.PARTS, sizes=sizes),))
    shape = stored[0] if stored else spec.stored
    dims = (Dim(along=Along.PARTS), *spec.dims)
    return replace(spec, dims=dims, stored=shape, per_part=True)


def quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """What a checkpoint declares, None for a dense one.

    Looked for in this order: `quantization_config` (or `compression_config`) of config.json,
    hf_quant_config.json (ModelOpt), quantize_config.json (GPTQ), quant_config.json (AWQ), tensors
    that only HQQ writes. Raises a ConfigError for an unknown method.
    """
    config = checkpoint.config or {}
    raw = config.get("quantization_config") or config.get("compression_config")
    file = "config.json"
    if raw is None:
        raw, file = _beside(Path(checkpoint.folder))
    if raw is None:
        hqq = import_module("lading.schemes.hqq")
        found: Quantization | None = hqq.hqq_from_evidence(checkpoint.tensors)
        return found
    if not isinstance(raw, Mapping):
        raise ConfigError(f"is {raw!r}, needs an object", subject="quantization_config", file=file)
    method = raw.get("quant_method")
    if method is None and "quant_algo" in raw:
        method = "modelopt"
    if method == "mxfp4":
        raise ConfigError(
            "quant_method is 'mxfp4' (gpt-oss), whose expert layers are not built yet; single "
            "tensors decode with lading.schemes.mxfp4",
            subject="quantization_config",
            file=file,
        )
    name = _ALIASES.get(str(method).lower(), str(method).lower())
    if name not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise ConfigError(
            f"quant_method is {method!r}, needs one of: {known}",
            subject="quantization_config",
            file=file,
        )
    module, parser = METHODS[name]
    parse = vars(import_module(f"lading.schemes.{module}"))[parser]
    try:
        quantization: Quantization = parse(raw)
    except LadingError as error:
        raise error.located(subject="quantization_config", file=file) from None
    return quantization


def _beside(folder: Path) -> tuple[Any, str]:
    """The quantisation that older tools and ModelOpt write into a file of its own."""
    name = "hf_quant_config.json"
    if file_size(folder / name) is not None:
        raw = read_json(folder / name)
        inner = raw.get("quantization") if isinstance(raw, Mapping) else None
        if isinstance(inner, Mapping):
            return {"quant_method": "modelopt", **inner}, name
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if file_size(folder / name) is not None:
            raw = read_json(folder / name)
            if isinstance(raw, Mapping):
                return {"quant_method": method, **raw}, name
    return None, name


def quant_config_of(
    checkpoint: Checkpoint, names: Names, *, straddle: Straddle | str = Straddle.DUPLICATE
) -> QuantConfig | None:
    """What layers of a model take as `quant_config`, None for a dense checkpoint.

    straddle   "duplicate" or "refuse" scales that a cut goes through (see `Straddle`)
    """
    known = [policy.value for policy in Straddle]
    if straddle not in known:
        raise CallError(
            f"straddle is {straddle!r}, needs one of: {', '.join(known)}", subject="quant_config_of"
        )
    quantization = quantization_of(checkpoint)
    if quantization is None:
        return None
    return QuantConfig(quantization, checkpoint.tensors, names, straddle=Straddle(straddle))
