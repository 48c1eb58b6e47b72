"""Compares loaded parameters with an independent read of the files, and logits with transformers.

Independent means: tensors come from the `safetensors` library (torch's own files from
`torch.load`), one whole tensor at a time, and are cut with torch.chunk and torch.cat by the sizes
of the declared parts. Regions, copies and plans, which the load is made of, are not used here.
Which tensor belongs to which parameter is (the naming rules): the logits tell whether it is right.

torch is imported by the functions, so that results can travel to a process without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite, lcm
from typing import TYPE_CHECKING, Any, TypeVar

from lading import ranks as ranks_module
from lading.checkpoint import Checkpoint, open_checkpoint
from lading.errors import CallError, LadingError, RankError, VerifyError
from lading.launch import RankLoad, load_model
from lading.layouts import Cut, Layout, Part, PartName
from lading.names import Names
from lading.ranks import Ranks
from lading.shards.folder import is_sharded

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from lading.digesting.models import DigestCheck
    from lading.loading import Progress
    from lading.models import CausalLM

__all__ = [
    "ElementCheck",
    "LogitCheck",
    "Mismatch",
    "RankCheck",
    "compare_logits",
    "refuse_sharded",
    "verify",
    "verify_rank",
]

T = TypeVar("T")

LOGIT_TOLERANCE = 1e-5
"""Of the largest logit, at least of 1: sums in another order differ by some 1e-6 of it in fp32."""

MAX_LOGIT_BYTES = 4 * 10**9
"""Larger checkpoints are not built a second and a third time in fp32 unless that is asked for."""

NUM_SEQUENCES, NUM_TOKENS = 2, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """The first element that is not what the file says.

    tensor            the checkpoint tensor
    index             in the rank's parameter
    found, expected   the values, as text: NaN is no JSON
    """

    parameter: str
    part: PartName
    tensor: str
    file: str
    index: tuple[int, ...]
    found: str
    expected: str

    def __str__(self) -> str:
        part = "" if self.part is None else f", part {self.part!r}"
        return f"{self.parameter}{part}: {self.fact}"

    @property
    def fact(self) -> str:
        """What is wrong, without whose fault."""
        return (
            f"element {list(self.index)} is {self.found}, needs {self.expected} (checkpoint tensor "
            f"{self.tensor!r})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementCheck:
    """What one rank compared.

    num_elements     elements of its parameters, padding (which has to be zero) included
    num_mismatches   of them not bit for bit what the file says
    first            the first of these
    reader           what read the files: "safetensors 0.8.0"
    """

    tp_rank: int
    num_elements: int
    num_mismatches: int
    first: Mismatch | None
    reader: str

    def error(self) -> VerifyError | None:
        """The mismatch as an error, None where there is none."""
        if self.first is None:
            return None
        error = VerifyError(
            f"{self.first.fact}; {self.num_mismatches} of the rank's {self.num_elements} elements "
            "differ",
            subject=self.first.parameter,
            part=self.first.part,
            file=self.first.file,
        )
        error.rank = self.tp_rank
        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitCheck:
    """How the model's logits compare with those of transformers; the same on every rank.

    compared    False where there was nothing to compare with: `reason` says why
    nan         where both have NaN, which says nothing of the rest: in words
    tolerance   the largest difference that is allowed: LOGIT_TOLERANCE * max(1, largest logit)
    """

    compared: bool
    reason: str | None = None
    nan: str | None = None
    num_logits: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    max_abs_diff: float = 0.0
    tolerance: float = 0.0
    transformers_version: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is known to be wrong."""
        return not self.compared or (self.nan is None and self.max_abs_diff <= self.tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCheck:
    """All that one rank of `lading verify` did; `digests` only where that was asked for."""

    load: RankLoad
    elements: ElementCheck
    logits: LogitCheck
    digests: DigestCheck | None = None


def refuse_sharded(path: str) -> None:
    """Raises a CallError for a folder that no independent reader can read."""
    if is_sharded(path):
        raise CallError(
            "is a pre-sharded folder, needs the original checkpoint (which other readers can read)",
            subject=path,
            hint=f"lading digest {path}, or lading merge {path} --out DIR",
        )


def verify_rank(
    ranks: Ranks,
    path: str,
    dtype: str | None,
    device: str | None,
    logits: bool | None,
    digest: bool = False,
    straddle: str = "duplicate",
) -> RankCheck:
    """The work of each rank of `lading verify`: load, compare elements, compare logits.

    logits     True = must be compared, False = not, None = where it can be done
    digest     compare the digest of each region too (this one takes regions from the plan)
    straddle   "duplicate" or "refuse": scales whose group a cut goes through
    """
    from lading import progress

    refuse_sharded(path)
    model, loaded = load_model(ranks, path, dtype, device, straddle=straddle)
    group = ranks_module.group_of(ranks, None)
    bar = progress.bar_of(ranks, "verifying")
    names = model.names
    check_all = partial(verify, path, model, ranks, names=names, progress=bar)
    elements = _together(check_all, group)
    del check_all
    digests = None
    if digest:
        from lading.digesting.models import check_digests

        bar = progress.bar_of(ranks, "comparing digests")
        compare = partial(check_digests, model, path, ranks, names=names, progress=bar)
        digests = _together(compare, group)
        del compare
    config, quantised = model.config, _is_quantised(model)
    del model
    if logits is False:
        check = LogitCheck(compared=False, reason="not asked for")
    elif logits is None and quantised:
        check = LogitCheck(
            compared=False, reason="the checkpoint is quantised (--logits compares anyway)"
        )
    elif logits is None and loaded.checkpoint_bytes > MAX_LOGIT_BYTES:
        check = LogitCheck(
            compared=False, reason="the checkpoint is larger than 4 GB (--logits compares anyway)"
        )
    else:
        limits = (config.vocab_size, min(NUM_TOKENS, config.max_position))
        check = compare_logits(path, ranks, limits, device=device, group=group, straddle=straddle)
        if logits and not check.compared:
            raise CallError(f"cannot be compared: {check.reason}", subject="logits")
    return RankCheck(load=loaded, elements=elements, logits=check, digests=digests)


def _is_quantised(model: nn.Module) -> bool:
    """Whether any layer is: config.json does not always say so, as with HQQ."""
    from lading.nn import ParallelLayer

    return any(isinstance(m, ParallelLayer) and m.quant is not None for m in model.modules())


def _together(work: Callable[[], T], group: ProcessGroup | None) -> T:
    """The work's result once every rank has one; one rank's error on all ranks otherwise."""
    result: Any = None
    error: LadingError | None = None
    try:
        result = work()
    except LadingError as found:
        error = found
    except Exception as found:
        if group is None:
            raise
        error = RankError(f"{type(found).__name__}: {found}")
    for rank, other in enumerate(ranks_module.exchange(error, group)):
        if other is not None:
            other.rank = rank if other.rank is None else other.rank
            raise other
    return result  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------- elements


def verify(
    path: str | os.PathLike[str],
    model: nn.Module,
    ranks: Ranks,
    *,
    names: Names | None = None,
    progress: Progress | None = None,
) -> ElementCheck:
    """Compares every parameter and persistent buffer of a rank's model with the files, bit for bit.

    path    the checkpoint that the model was loaded from
    names   naming rules; by default the model's, as for `lading.load`
    Raises a VerifyError where there is nothing to compare a parameter with, or shapes differ.
    Elements that differ are counted and returned; `.error()` of the result makes an error of them.
    """
    from lading.targeting import names_of

    checkpoint = open_checkpoint(path)
    rules = (names or names_of(model)).fitting(checkpoint.tensors)
    num_elements = num_mismatches = 0
    first: Mismatch | None = None
    tensors = _tensors(model)
    if progress is not None:
        progress.start(sum(t.numel() * t.element_size() for _, t in tensors.values()))
    try:
        with _Files(checkpoint) as files:
            for tensor_names, tensor in tensors.values():
                bad, one = _compare(tensor, tensor_names, files, rules, ranks)
                num_elements += tensor.numel()
                num_mismatches += bad
                first = first or one
                if progress is not None:
                    progress.advance(tensor.numel() * tensor.element_size())
            reader = files.reader
    finally:
        if progress is not None:
            progress.finish()
    return ElementCheck(
        tp_rank=ranks.tp_rank,
        num_elements=num_elements,
        num_mismatches=num_mismatches,
        first=first,
        reader=reader,
    )


def _tensors(model: nn.Module) -> dict[int, tuple[list[str], torch.Tensor]]:
    """Every parameter and persistent buffer once, with all its names."""
    found: dict[int, tuple[list[str], torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), ([], tensor))[0].append(name)
    return found


def _compare(
    tensor: torch.Tensor, names: list[str], files: _Files, rules: Names, ranks: Ranks
) -> tuple[int, Mismatch | None]:
    """(how many elements differ, the first) under each name that the files know."""
    layout = _layout_of(tensor, ranks)
    num_mismatches, first, found = 0, None, False
    for name in names:
        at = 0
        for part, stored, expected in _pieces(name, tensor, layout, files, rules, ranks):
            found = True
            dim = layout.fused_dim or 0
            size = expected.shape[dim] if expected.dim() else 0
            local = tensor.detach()
            if layout.fused_dim is not None:
                local = local.narrow(dim, at, min(size, local.shape[dim] - at))
            if local.shape != expected.shape:
                raise VerifyError(
                    f"has shape {list(local.shape)}, needs {list(expected.shape)} (the rank's "
                    f"piece of checkpoint tensor {stored!r})",
                    subject=name,
                    part=part,
                    file=files.files[stored],
                )
            bad, index = _differing(local.cpu(), expected.to(tensor.dtype))
            if bad and first is None:
                place = tuple(i + (at if d == layout.fused_dim else 0) for d, i in enumerate(index))
                first = Mismatch(
                    parameter=name,
                    part=part,
                    tensor=stored,
                    file=files.files[stored],
                    index=place,
                    found=_spell(local.cpu()[index]),
                    expected=_spell(expected.to(tensor.dtype)[index]),
                )
            num_mismatches += bad
            at += size
    if not found:
        raise VerifyError("no checkpoint tensor belongs to it, needs one", subject=names[0])
    return min(num_mismatches, tensor.numel()), first


def _layout_of(tensor: torch.Tensor, ranks: Ranks) -> Layout:
    """The declared parts; whole on every rank where none are declared."""
    from lading.parameter import BasevLLMParameter

    declared = tensor.tp_layout if isinstance(tensor, BasevLLMParameter) else None
    return (
        declared if declared is not None else Layout.replicated(tuple(tensor.shape), ranks.tp_size)
    )


def _pieces(
    name: str, tensor: torch.Tensor, layout: Layout, files: _Files, rules: Names, ranks: Ranks
) -> Iterator[tuple[PartName, str, torch.Tensor]]:
    """(part, checkpoint tensor, what this rank should hold of it), part by part."""
    leaf, is_viewed = _stored_as(tensor)
    if leaf:
        name = f"{name.rpartition('.')[0]}.{leaf}"
    parts = layout.part_names
    whole = rules.whole(name)
    if whole in files.files:
        full = files.tensor(whole)
        full = full.reshape(layout.fused_shape) if is_viewed else full
        for part in parts:
            yield part, whole, _cut(full, layout, part, ranks, is_fused=len(parts) > 1)
        return
    stored = rules.parts(name, len(parts), leaf) if len(parts) > 1 else None
    if stored is None or not all(one in files.files for one in stored):
        return
    for part, one in zip(parts, stored, strict=True):
        full = files.tensor(one)
        full = full.reshape(layout.source_shape(part)) if is_viewed else full
        yield part, one, _cut(full, layout, part, ranks, is_fused=False)


def _stored_as(tensor: torch.Tensor) -> tuple[str, bool]:
    """(what the checkpoint calls it where not as the model, whether it is another view there)."""
    from lading.parameter import BasevLLMParameter

    if not isinstance(tensor, BasevLLMParameter):
        return "", False
    return tensor.stored_leaf, tensor.stored_shape is not None


def _cut(
    tensor: torch.Tensor, layout: Layout, name: PartName, ranks: Ranks, *, is_fused: bool
) -> torch.Tensor:
    """The rank's piece of a part: padded with zeros, then one chunk along each dim.

    is_fused   the tensor has all parts side by side
    """
    import torch

    if tensor.dim() == 0 and len(layout.cuts) == 1:
        tensor = tensor.reshape(1)
    for dim, cut in enumerate(layout.cuts):
        part = _part(cut, name)
        has_others = is_fused and len(cut.axis.parts) > 1 and not cut.axis.scalars
        if cut.straddle:
            first, last = _straddling(cut, part, ranks, is_fused=has_others)
            tensor = tensor.narrow(dim, first, last - first)
            continue
        if has_others:
            sizes = [ceil(one.size / cut.grain) for one in cut.axis.parts]
            tensor = torch.split(tensor, sizes, dim)[cut.axis.parts.index(part)]
        if part.pad_to:
            shape = list(tensor.shape)
            shape[dim] = int(_padding(part, ranks) / cut.grain)
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim)
        num_pieces = _num_pieces(part, ranks)
        chunks = torch.chunk(tensor, num_pieces, dim)
        if len(chunks) != num_pieces or len({chunk.shape for chunk in chunks}) > 1:
            raise VerifyError(f"{tensor.shape[dim]} entries are not {num_pieces} equal pieces")
        tensor = chunks[ranks.tp_rank // (ranks.tp_size // num_pieces)]
    return tensor


def _num_pieces(part: Part, ranks: Ranks) -> int:
    return min(ranks.tp_size, part.max_pieces or ranks.tp_size)


def _padding(part: Part, ranks: Ranks) -> int:
    return -part.size % lcm(part.pad_to, ranks.tp_size) if part.pad_to else 0


def _straddling(cut: Cut, part: Part, ranks: Ranks, *, is_fused: bool) -> tuple[int, int]:
    """The stored entries, first to last + 1, that have an element of the rank's piece; every rank
    keeps as many as the one with most.
    """
    grain, num_pieces = int(cut.grain), _num_pieces(part, ranks)
    before = cut.axis.parts[: cut.axis.parts.index(part)] if is_fused else ()
    base, whole = sum(one.size for one in before), cut.axis.size if is_fused else part.size
    length = (part.size + _padding(part, ranks)) // num_pieces
    touched: list[set[int]] = []
    for piece in range(num_pieces):
        elements = range(base + piece * length, base + min((piece + 1) * length, part.size))
        touched.append({element // grain for element in elements})
    count = max(map(len, touched))
    mine = touched[ranks.tp_rank // (ranks.tp_size // num_pieces)]
    num_entries = ceil(whole / grain)
    first = min(min(mine, default=num_entries), num_entries - count)
    return first, first + count


def _part(cut: Cut, name: PartName) -> Part:
    parts = cut.axis.parts
    return parts[0] if len(parts) == 1 else next(part for part in parts if part.name == name)


def _differing(one: torch.Tensor, two: torch.Tensor) -> tuple[int, tuple[int, ...]]:
    """How many elements have other bits, and the index of the first."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if not one.dtype.is_complex:
        bits = whole[one.element_size()]
        one, two = one.contiguous().view(bits), two.contiguous().view(bits)
    wrong = (one != two).flatten()
    count = int(wrong.sum())
    if not count:
        return 0, ()
    place = int(wrong.to(torch.uint8).argmax())
    index: list[int] = []
    for size in reversed(one.shape):
        index.insert(0, place % size)
        place //= size
    return count, tuple(index)


def _spell(value: torch.Tensor) -> str:
    return f"{value.item():.9g}" if value.dtype.is_floating_point else str(value.item())


class _Files:
    """A checkpoint's tensors through the library that owns the format, one at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.format = checkpoint.folder, checkpoint.format
        self.files: dict[str, str] = {}
        self.reader = ""
        self._names = tuple(checkpoint.file_bytes)
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> _Files:
        for file in self._names:
            self._handles[file] = handle = self._open(os.path.join(self.folder, file))
            self.files.update((name, file) for name in handle.keys())  # noqa: SIM118
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._handles.clear()

    def _open(self, path: str) -> Any:
        if self.format == "torch":
            import torch

            self.reader = f"torch.load of torch {torch.__version__}"
            state: Mapping[str, torch.Tensor] = torch.load(
                path, map_location="cpu", weights_only=True, mmap=True
            )
            return state
        import safetensors

        self.reader = f"safetensors {safetensors.__version__}"
        return self._stack.enter_context(safetensors.safe_open(path, framework="pt"))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        handle = self._handles[self.files[name]]
        found: torch.Tensor = handle[name] if self.format == "torch" else handle.get_tensor(name)
        return found


# ------------------------------------------------------------------------------------------ logits


def compare_logits(
    path: str,
    ranks: Ranks,
    limits: tuple[int, int],
    *,
    device: str | None,
    group: ProcessGroup | None,
    straddle: str = "duplicate",
) -> LogitCheck:
    """The logits of the checkpoint loaded in fp32 on these ranks against those of transformers, in
    fp32 on rank 0, for fixed random token ids. The same result on every rank.

    limits   (vocabulary size, tokens of a sequence)
    """
    import torch

    reason = ranks_module.exchange(_obstacle(path) if ranks.tp_rank == 0 else None, group)[0]
    if reason is not None:
        return LogitCheck(compared=False, reason=reason)
    model, _ = load_model(ranks, path, "F32", device, what="loading in fp32", straddle=straddle)
    vocab_size, num_tokens = limits
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (NUM_SEQUENCES, num_tokens), generator=random)
    ours = _together(partial(_logits, model, ids), group)
    with_nan = next(filter(None, ranks_module.exchange(_parameter_with_nan(model), group)), None)
    del model
    check: LogitCheck | None = None
    if ranks.tp_rank == 0:
        try:
            check = _against_transformers(path, ids, ours, with_nan)
        except Exception as error:  # whatever it is: the other ranks wait for a word
            words = str(error).partition("\n")[0]
            check = LogitCheck(
                compared=False,
                reason=f"transformers failed with {type(error).__name__}: {words}",
            )
    found: LogitCheck | None = ranks_module.exchange(check, group)[0]
    assert found is not None, "rank 0 always has a verdict"
    return found


def _obstacle(path: str) -> str | None:
    """Why transformers cannot be asked, None where it can."""
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        return "transformers is not installed (pip install transformers)"
    if not os.path.isdir(path):
        return "transformers loads folders, and this is a file"
    return None


def _logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    """[sequences, tokens, vocabulary], on the CPU."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(ids.to(device)).float().cpu()  # type: ignore[no-any-return]


def _parameter_with_nan(model: nn.Module) -> str | None:
    """The first that has NaN, of those that hold floats."""
    for name, param in model.named_parameters():
        if param.dtype.is_floating_point and param.element_size() > 1 and param.isnan().any():
            return name
    return None


def _against_transformers(
    path: str, ids: torch.Tensor, ours: torch.Tensor, with_nan: str | None
) -> LogitCheck:
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            local_files_only=True,
            attn_implementation="eager",
            **{"dtype" if version >= (4, 56) else "torch_dtype": torch.float32},
        )
        model.eval()
        with torch.inference_mode():
            theirs = model(ids).logits
    if theirs.shape != ours.shape:
        raise ValueError(f"its logits have shape {list(theirs.shape)}, ours {list(ours.shape)}")
    nan = None
    if bool(ours.isnan().any()) and bool(theirs.isnan().any()):
        first = f" (of the parameters, {with_nan} is the first with NaN)" if with_nan else ""
        nan = f"NaN in the logits of both{first}"
    largest = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    return LogitCheck(
        compared=True,
        nan=nan,
        num_logits=ours.numel(),
        num_sequences=ids.shape[0],
        num_tokens=ids.shape[1],
        max_abs_diff=difference if difference == difference else float("inf"),
        tolerance=LOGIT_TOLERANCE * max(1.0, largest if isfinite(largest) else 0.0),
        transformers_version=transformers.__version__,
    )
