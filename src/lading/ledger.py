"""What of a parameter has been written by loads, so that nothing is written twice or left out.

A ledger belongs to one parameter's memory: when the memory is replaced (`param.data = ...`) or
changed by someone else (`param[:] = ...`), what was noted no longer holds and is forgotten. Regions
are in the parameter's local coordinates.
"""

from __future__ import annotations

import weakref

import torch

from lading import writing
from lading.errors import ConflictError
from lading.layouts import PartName
from lading.regions import Copy, Region, cover, reordered

__all__ = ["Ledger", "Place", "place_of"]

# Devices whose tensors have a storage to recognise their memory by; lazy ones have none.
_WITH_STORAGE = ("cpu", "cuda", "meta")


Place = tuple[weakref.ref[torch.UntypedStorage] | None, int, tuple[int, ...], tuple[int, ...]]
"""Which memory a parameter has, seen how: storage, offset, shape, stride. The weak reference keeps
no memory alive, and no other storage can equal it, as an address that is used again would.
"""


def place_of(param: torch.Tensor) -> Place:
    """Where a parameter is."""
    if param.device.type not in _WITH_STORAGE:
        return None, 0, param.shape, ()
    storage = weakref.ref(param.untyped_storage())
    return storage, int(param.storage_offset()), param.shape, param.stride()


def _version_of(param: torch.Tensor) -> int:
    return 0 if param.is_inference() else param._version


def _memory_of(param: torch.Tensor) -> tuple[Place, int]:
    return place_of(param), _version_of(param)


class Ledger:
    """The regions of one parameter that loads have written.

    shared    whether several parameters over one tensor keep this ledger together
    is_begun  whether any load was ever noted; unlike the notes it outlives the memory, so that a
              loaded parameter that was moved (`.to()`) is not taken for one that never was
    """

    def __init__(self, *, shared: bool = False, is_begun: bool = False) -> None:
        self.is_begun = is_begun
        self._notes: dict[Region, PartName] = {}
        self._memory: tuple[Place, int] | None = None
        self._shared = shared
        self._owner: int | None = None

    def start(self) -> None:
        """Forgets everything: the next loads may write other bytes."""
        self._forget()
        self.is_begun = False

    def _forget(self) -> None:
        self._notes, self._memory = {}, None

    def kept_by(self, param: torch.Tensor) -> Ledger:
        """The ledger itself, or a copy where it is another parameter's (a clone by `__dict__`).

        The parameter is known by its id: a weak reference to it would forbid
        `torch.utils.swap_tensors`. An id that is used again does no harm, memory is compared too.
        """
        if self._shared or self._owner == id(param):
            return self
        kept = self
        if self._owner is not None:
            kept = Ledger()
            kept._notes, kept._memory = dict(self._notes), self._memory
        kept._owner = id(param)
        return kept

    def note(self, param: torch.Tensor, region: Region, part: PartName = None) -> None:
        """Remembers that a region was written, by which part."""
        self._refresh(param)
        if self._memory is None:
            self._memory = _memory_of(param)
        self._notes[region] = part
        self.is_begun = True

    def note_all(self, param: torch.Tensor, whole: Region, place: Place) -> None:
        """Remembers that one load has written everything; what was noted before is forgotten.

        whole, place   the region that is the whole parameter, and where it is
        """
        self._notes, self._memory = {whole: None}, (place, _version_of(param))
        self.is_begun = True

    def check(
        self,
        param: torch.Tensor,
        data: torch.Tensor,
        copy: Copy,
        values: torch.Tensor,
        *,
        any_part: bool = True,
    ) -> None:
        """Raises a ConflictError where `values` would overwrite what was loaded, with other bytes.

        any_part   False: only what the same part wrote counts
        """
        self._refresh(param)
        if not self._notes or type(values) not in (torch.Tensor, torch.nn.Parameter):
            return
        if "meta" in (data.device.type, values.device.type):
            return
        region = copy.target_region
        for written, part in self._notes.items():
            if _are_apart(written, region) or not (any_part or part == copy.part):
                continue
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
        """A box that loads have not written, though they wrote others; None where all or none."""
        self._refresh(param)
        if not self._notes:
            return None
        return cover(tuple(param.shape), [*padding, *self._notes]).missing

    def permute(self, param: torch.Tensor, order: tuple[int, ...]) -> None:
        """Permutes the parameter's dims in place, and what is noted with them."""
        self._refresh(param)
        param.data = param.data.permute(*order)
        if self._notes:
            self._notes = {reordered(r, order): part for r, part in self._notes.items()}
            self._memory = _memory_of(param)

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        # What was written was written into this memory, in this process: a copy starts empty.
        return Ledger, ()

    def _refresh(self, param: torch.Tensor) -> None:
        if self._memory is not None and self._memory != _memory_of(param):
            self._forget()


def _are_apart(one: Region, two: Region) -> bool:
    """Whether even the boxes around two regions share nothing: cheap, and nearly always so."""
    for a, n, s, b, m, t in zip(
        one.start, one.size, one.step, two.start, two.size, two.step, strict=True
    ):
        if a + (n - 1) * s < b or b + (m - 1) * t < a:
            return True
    return False
