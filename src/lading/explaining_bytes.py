"""What a byte of a file belongs to: of a checkpoint's own files, and of a pre-sharded folder's.

A pre-sharded folder stands for a checkpoint whose files need not be there; a byte of one of those
is explained like any other. A byte of a rank's file is an element of that rank's parameter, and so
one of a checkpoint tensor. From headers alone, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from lading import dtypes
from lading.checkpoint import Checkpoint, Source
from lading.errors import CallError
from lading.explaining import Explanation, close_names, explain, header_index
from lading.plan import Plan
from lading.shards.folder import Sharded
from lading.views import unravel

__all__ = ["explain_byte"]


def explain_byte(
    plan: Plan, checkpoint: Checkpoint, file: str, byte: int, *, rank: int | None = None
) -> Explanation:
    """What the byte of a file belongs to, as `explain` says it of the entry's tensor.

    Of a rank's file in a pre-sharded folder: as `explain` says it of the rank's parameter, for as
    many ranks as the folder has, whatever `plan` is for.
    Raises a CallError for a file that is not the checkpoint's, or a byte that is no tensor's.
    """
    served_by = checkpoint.served_by
    sharded = served_by if isinstance(served_by, Sharded) else None
    if sharded is not None and file in sharded.file_bytes:
        return _of_rank_file(plan, checkpoint, sharded, file, byte, rank)
    if file not in checkpoint.file_bytes:
        names = [*checkpoint.file_bytes, *(sharded.file_bytes if sharded is not None else ())]
        raise CallError(
            f"is no file of {checkpoint.folder} that has tensors",
            subject=file,
            hint=close_names(file, names),
        )
    if checkpoint.format != "safetensors":
        raise CallError("is no safetensors file: its tensors have no byte offsets", subject=file)
    source, at = _entry_of(checkpoint.tensors, file, byte, checkpoint.file_bytes[file])
    index = header_index(source, unravel(at, source.storage_shape))
    return explain(plan, checkpoint, source.name, index=index, rank=rank, kind="tensor")


def _of_rank_file(
    plan: Plan, checkpoint: Checkpoint, sharded: Sharded, file: str, byte: int, rank: int | None
) -> Explanation:
    size = sharded.file_bytes[file]
    for number, stored in enumerate(sharded.stored):
        if not any(source.file == file for source in stored.values()):
            continue
        if rank not in (None, number):
            fact = f"is {rank}, needs {number} (whose file {file} is)"
            raise CallError(fact, subject="rank")
        parameter, at = _entry_of(stored, file, byte, size)
        shape = sharded.plan.target(parameter.name).layout.local_shape
        return explain(
            sharded.plan,
            checkpoint,
            parameter.name,
            index=unravel(at, shape),
            rank=number,
            kind="parameter",
        )
    source, at = _entry_of(sharded.rest, file, byte, size)
    index = header_index(source, unravel(at, source.storage_shape))
    return explain(plan, checkpoint, source.name, index=index, rank=rank, kind="tensor")


def _entry_of(
    tensors: Mapping[str, Source], file: str, byte: int, file_bytes: int
) -> tuple[Source, int]:
    """The tensor that has the byte, and which of its stored entries it is in."""
    if not 0 <= byte < file_bytes:
        raise CallError(f"byte is {byte}, needs 0 to {file_bytes - 1}", subject=file)
    for source in tensors.values():
        if source.file == file and 0 <= byte - source.offset_bytes < source.num_bytes:
            return source, (byte - source.offset_bytes) // dtypes.storage_bytes(source.dtype)
    raise CallError(f"byte {byte} is in the file's header, needs one of a tensor's", subject=file)
