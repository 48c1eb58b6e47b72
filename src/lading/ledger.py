"""What of a parameter has been written by loads, so that nothing is written twice or left out.

A ledger belongs to one parameter's memory: when the memory is replaced (`param.data = ...`) or changed
by someone else (`param[:] = ...`), what was noted no longer holds and is forgotten. Regions are in the
parameter's local coordinates.
"""

from __future__ import annotations

import torch

from lading import writing
from lading.errors import ConflictError
from lading.regions import Copy, Region, cover, reordered

__all__ = ["Ledger"]

_Key = tuple[tuple[int, ...], int, int]


class Ledger:
    """The regions of one parameter that loads have written."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._key: _Key | None = None

    def start(self) -> None:
        """Forgets everything: the next loads may write other bytes."""
        self._regions, self._key = [], None

    def note(self, param: torch.Tensor, region: Region) -> None:
        """Remembers that a region was written."""
        self._refresh(param)
        self._key = _key(param)
        if region not in self._regions:
            self._regions.append(region)

    def check(
        self, param: torch.Tensor, data: torch.Tensor, copy: Copy, values: torch.Tensor
    ) -> None:
        """Raises a ConflictError where `values` would overwrite what a load wrote, with other bytes."""
        self._refresh(param)
        if not self._regions or type(values) not in (torch.Tensor, torch.nn.Parameter):
            return
        if "meta" in (data.device.type, values.device.type):
            return
        region = copy.target_region
        for written in self._regions:
            both = written.intersect(region)
            if both is None:
                continue
            inner = both.inside(region)
            new = writing.view_of(values.detach(), inner).to(data.device, data.dtype)
            if not writing.same_bits(writing.view_of(data, both), new):
                raise ConflictError(
                    f"elements {both} were loaded before, with other bytes",
                    hint="lading.start_load(model) before loading new weights into a loaded model",
                )

    def missing(self, param: torch.Tensor, padding: tuple[Region, ...]) -> Region | None:
        """A box that loads have not written although they wrote others; None where all or none is."""
        self._refresh(param)
        if not self._regions:
            return None
        disjoint: list[Region] = []
        for region in [*padding, *self._regions]:
            if all(region.intersect(other) is None for other in disjoint):
                disjoint.append(region)
        return cover(tuple(param.shape), disjoint).missing

    def permute(self, param: torch.Tensor, order: tuple[int, ...]) -> None:
        """Follows a permutation of the parameter's dims, after it was made."""
        self._regions = [reordered(region, order) for region in self._regions]
        self._key = _key(param) if self._regions else None

    def _refresh(self, param: torch.Tensor) -> None:
        if self._key is not None and self._key != _key(param):
            self.start()


def _key(param: torch.Tensor) -> _Key:
    # Lazy and fake tensors have no address; theirs is never compared, and shape and version remain.
    has_memory = param.device.type in ("cpu", "cuda")
    data = torch.Tensor.detach(param)
    return tuple(param.shape), data.data_ptr() if has_memory else 0, param._version
