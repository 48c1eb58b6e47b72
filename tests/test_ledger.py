"""The ledger: what was written, into which memory, and when that is forgotten."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.errors import ConflictError
from lading.ledger import Ledger, place_of
from lading.regions import Copy, Region


def box(*spans: tuple[int, int], shape: tuple[int, ...] = (6, 4)) -> Region:
    return Region.box(shape, spans)


def copy_to(region: Region, part: str | int | None = None) -> Copy:
    return Copy(
        source="file",
        target="parameter",
        part=part,
        source_region=Region.whole(region.size),
        target_region=region,
    )


def test_missing() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    assert ledger.missing(param, ()) is None
    ledger.note(param, box((0, 2), (0, 4)))
    ledger.note(param, box((0, 2), (0, 4)))
    assert str(ledger.missing(param, ())) == "[2:6, 0:4]"
    ledger.note(param, box((1, 5), (0, 4)))  # overlaps what is there
    assert str(ledger.missing(param, ())) == "[5:6, 0:4]"
    assert ledger.missing(param, (box((5, 6), (0, 4)),)) is None
    ledger.start()
    assert ledger.missing(param, ()) is None


def test_all_at_once_is_what_start_and_note_are() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    ledger.note(param, box((0, 2), (0, 4)), "q")
    place = place_of(param)
    param[0] = 1  # what a copy by value does between the two: the version counts from the note on
    ledger.note_all(param, Region.whole((6, 4)), place)
    assert ledger.is_begun
    assert ledger.missing(param, ()) is None
    with pytest.raises(ConflictError):
        ledger.check(param, param, copy_to(box((3, 4), (0, 4))), torch.ones(1, 4))
    param[1] = 1
    ledger.check(param, param, copy_to(box((3, 4), (0, 4))), torch.ones(1, 4))
    ledger.note(param, box((0, 2), (0, 4)))
    assert str(ledger.missing(param, ())) == "[2:6, 0:4]", "somebody else has written: forgotten"


def test_all_at_once_in_other_memory() -> None:
    param, ledger = torch.nn.Parameter(torch.zeros(6, 4), requires_grad=False), Ledger()
    ledger.note_all(param, Region.whole((6, 4)), place_of(param))
    param.data = torch.zeros(6, 4)
    ledger.check(param, param, copy_to(box((3, 4), (0, 4))), torch.ones(1, 4))
    ledger.note(param, box((0, 1), (0, 4)))
    assert str(ledger.missing(param, ())) == "[1:6, 0:4]"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=6))
def test_missing_is_what_no_box_has(corners: list[tuple[int, int, int, int]]) -> None:
    param, ledger = torch.zeros(6, 6), Ledger()
    seen = torch.zeros(6, 6, dtype=torch.bool)
    for a, b, c, d in corners:
        rows, columns = (min(a, b), max(a, b) + 1), (min(c, d), max(c, d) + 1)
        ledger.note(param, box(rows, columns, shape=(6, 6)))
        seen[slice(*rows), slice(*columns)] = True
    missing = ledger.missing(param, ())
    assert (missing is None) == bool(seen.all())
    if missing is not None:
        (a, b), (n, m) = missing.start, missing.size
        assert not seen[a : a + n, b : b + m].any()


def test_conflicts() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    region = Region(shape=(6, 4), start=(1, 0), size=(3, 4), step=(2, 1))  # rows 1, 3, 5
    ledger.check(param, param, copy_to(region), torch.ones(3, 4))
    param.data[1::2] = 1
    ledger.note(param, region)
    ledger.check(param, param.data, copy_to(region), torch.ones(3, 4))
    ledger.check(param, param.data, copy_to(box((0, 1), (0, 4))), torch.zeros(1, 4))
    ledger.check(param, param.data, copy_to(box((2, 2), (0, 4))), torch.zeros(0, 4))
    values = torch.zeros(6, 4)
    values[1::2] = 1
    ledger.check(param, param.data, copy_to(box((0, 6), (0, 4))), values)
    values[5, 3] = 2
    with pytest.raises(ConflictError) as caught:
        ledger.check(param, param.data, copy_to(box((0, 6), (0, 4))), values)
    assert str(caught.value) == (
        "elements [1:6:2, 0:4] were loaded before, with other bytes. "
        "Try: lading.start_load(model) before loading new weights into a loaded model."
    )


def test_only_the_same_part_counts_where_parts_may_differ() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    whole, other = box((0, 6), (0, 4)), torch.ones(6, 4)
    ledger.note(param, whole, "q")
    ledger.check(param, param, copy_to(whole, "k"), other, any_part=False)
    for part, any_part in (("q", False), ("k", True)):
        with pytest.raises(ConflictError):
            ledger.check(param, param, copy_to(whole, part), other, any_part=any_part)


def test_what_has_no_values_is_not_compared() -> None:
    class Lazy(torch.Tensor):
        pass

    on_meta, ledger = torch.zeros(6, 4, device="meta"), Ledger()
    whole = box((0, 6), (0, 4))
    ledger.note(on_meta, whole)
    ledger.check(on_meta, on_meta, copy_to(whole), torch.ones(6, 4))
    assert ledger.missing(on_meta, ()) is None
    param, ledger = torch.zeros(6, 4), Ledger()
    ledger.note(param, whole)
    ledger.check(param, param, copy_to(whole), torch.ones(6, 4, device="meta"))
    ledger.check(param, param, copy_to(whole), torch.ones(6, 4).as_subclass(Lazy))


def test_memory_is_neither_kept_nor_confused() -> None:
    ledger = Ledger()
    param = torch.nn.Parameter(torch.zeros(6, 4), requires_grad=False)
    ledger.note(param, box((0, 6), (0, 2)))
    storage = weakref.ref(param.untyped_storage())
    for _ in range(20):  # the allocator likes to hand out the same address again
        param.data = torch.empty(0)
        assert storage() is None
        param.data = torch.zeros(6, 4)
        assert ledger.missing(param, ()) is None
        ledger.note(param, box((0, 6), (0, 2)))
        storage = weakref.ref(param.untyped_storage())
    reference = weakref.ref(param)
    del param
    gc.collect()
    assert reference() is None


def test_changes_are_noticed() -> None:
    param = torch.nn.Parameter(torch.zeros(4, 4), requires_grad=False)
    whole = box((0, 4), (0, 2), shape=(4, 4))

    def refill() -> None:
        param[:] = 1

    def turn() -> None:
        param.data = param.data.t()

    def shift() -> None:
        param.data = torch.zeros(32)[16:].reshape(4, 4)

    for change in (refill, turn, shift):
        ledger = Ledger()
        ledger.note(param, whole)
        assert ledger.missing(param, ()) is not None
        change()
        assert ledger.missing(param, ()) is None
    ledger = Ledger()
    ledger.note(param, whole)
    param.data.zero_()  # through `.data`, as loads themselves write: not seen
    assert ledger.missing(param, ()) is not None


def test_permuting() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    ledger.note(param, box((0, 2), (0, 4)))
    ledger.permute(param, (1, 0))
    assert tuple(param.shape) == (4, 6)
    assert str(ledger.missing(param, ())) == "[0:4, 2:6]"
    other, stale = torch.zeros(6, 4), Ledger()
    stale.note(other, box((0, 2), (0, 4)))
    other.data = torch.zeros(6, 4)
    stale.permute(other, (1, 0))
    assert stale.missing(other, ()) is None


def test_a_ledger_is_of_one_parameter() -> None:
    one, two, ledger = torch.zeros(6, 4), torch.zeros(6, 4), Ledger()
    assert ledger.kept_by(one) is ledger
    ledger.note(one, box((0, 2), (0, 4)))
    copied = ledger.kept_by(two)
    assert copied is not ledger
    assert copied.missing(two, ()) is None
    assert ledger.missing(one, ()) is not None
    alias = one.view(6, 4)
    assert ledger.kept_by(alias).missing(alias, ()) is not None  # the same memory
    together = Ledger(shared=True)
    assert together.kept_by(one) is together.kept_by(two) is together


def test_copies_and_pickles_start_empty() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    ledger.note(param, box((0, 2), (0, 4)))
    for new in (copy.deepcopy(ledger), pickle.loads(pickle.dumps(ledger))):
        assert new.missing(param, ()) is None
    plain = torch.nn.Parameter(param)
    vars(plain)["_ledger"] = ledger  # engines copy a parameter's state onto plain ones
    assert torch.equal(pickle.loads(pickle.dumps(plain)), param)


def test_inference_tensors() -> None:
    with torch.inference_mode():
        param = torch.zeros(6, 4)
    ledger = Ledger()
    ledger.note(param, box((0, 2), (0, 4)))
    assert ledger.missing(param, ()) is not None


def test_a_copied_tensor_is_other_memory() -> None:
    param, ledger = torch.zeros(6, 4), Ledger()
    ledger.note(param, box((0, 2), (0, 4)))
    new = copy.deepcopy(param)
    assert ledger.kept_by(new).missing(new, ()) is None
