"""Which rank counts: the call's, the attributes, what is current, or the world."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lading import ranks as ranks_module
from lading.errors import ShapeError
from lading.parameter import (
    BasevLLMParameter,
    ModelWeightParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)
from lading.ranks import Ranks, all_ranks, as_current, set_current

from .made import numbered, poisoned, refused

T = 3


def weight() -> ModelWeightParameter:
    return ModelWeightParameter(data=poisoned((2, 1)), input_dim=1, output_dim=0)


def piece(param: torch.Tensor) -> int:
    """Which piece of two rows the parameter holds."""
    first, second = param.data.flatten().tolist()
    assert second == first + 1
    return int(first) // 2


FULL = numbered((2 * T, 1))


def inside_both(ranks: Ranks) -> ModelWeightParameter:
    with as_current(ranks):
        param = weight()
        param.load_column_parallel_weight(FULL)
    return param


def built_inside_loaded_outside(ranks: Ranks) -> ModelWeightParameter:
    with as_current(ranks):
        param = weight()
    param.load_column_parallel_weight(FULL)
    return param


def built_outside_loaded_inside(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    with as_current(ranks):
        param.load_column_parallel_weight(FULL)
    return param


def built_as_another_rank(ranks: Ranks) -> ModelWeightParameter:
    with as_current(Ranks(tp_rank=4, tp_size=5)):
        param = weight()
    with as_current(ranks):
        param.load_column_parallel_weight(FULL)
    return param


def with_set_current(ranks: Ranks) -> ModelWeightParameter:
    set_current(ranks)
    try:
        param = weight()
        param.load_column_parallel_weight(FULL)
    finally:
        set_current(None)
    return param


def attributes_overwritten(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    param.tp_rank, param.tp_size = ranks.tp_rank, ranks.tp_size
    param.load_column_parallel_weight(FULL)
    return param


def attributes_beat_the_current_rank(ranks: Ranks) -> ModelWeightParameter:
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        param = weight()
        param.tp_rank, param.tp_size = ranks.tp_rank, ranks.tp_size
        param.load_column_parallel_weight(FULL)
    return param


def attributes_overwritten_with_their_own_values(ranks: Ranks) -> ModelWeightParameter:
    with as_current(ranks):
        param = weight()
    param.tp_rank, param.tp_size = ranks.tp_rank, ranks.tp_size
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        param.load_column_parallel_weight(FULL)
    return param


def attributes_overwritten_in_the_dict(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    vars(param).update(tp_rank=ranks.tp_rank, tp_size=ranks.tp_size)
    if ranks.tp_rank == 0:  # the size alone differs then
        assert param.tp_size == T
    param.load_column_parallel_weight(FULL)
    return param


def rank_alone_overwritten(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    param.tp_rank = ranks.tp_rank
    param.load_column_parallel_weight(FULL)
    return param


def rank_alone_overwritten_where_t_is_known(ranks: Ranks) -> ModelWeightParameter:
    with as_current(Ranks(tp_rank=1, tp_size=T)):
        param = weight()
        param.tp_rank = ranks.tp_rank
        param.load_column_parallel_weight(FULL)
    return param


def rank_of_the_call(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    param.load_column_parallel_weight(FULL, tp_rank=ranks.tp_rank)
    return param


def rank_of_the_call_second(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    param.load_column_parallel_weight(FULL, ranks.tp_rank, use_presharded_weights=False)
    return param


def rank_of_the_call_beats_all(ranks: Ranks) -> ModelWeightParameter:
    with as_current(Ranks(tp_rank=2, tp_size=T)):
        param = weight()
        param.tp_rank = 1
        param.load_column_parallel_weight(FULL, tp_rank=ranks.tp_rank)
    return param


def rank_of_a_row_call(ranks: Ranks) -> RowvLLMParameter:
    param = RowvLLMParameter(data=poisoned((2,)), input_dim=0, weight_loader=None)
    param.load_row_parallel_weight(FULL.flatten(), ranks.tp_rank)
    return param


def rank_of_a_merged_call(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    param.load_merged_column_weight(
        loaded_weight=FULL,
        shard_id=0,
        shard_offset=0,
        shard_size=2,
        use_presharded_weights=False,
        tp_rank=ranks.tp_rank,
    )
    return param


def rank_of_a_qkv_call(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    param.load_qkv_weight(
        FULL, ranks.tp_rank, shard_id="q", shard_offset=0, shard_size=2, num_heads=1
    )
    return param


def presharded(ranks: Ranks) -> ModelWeightParameter:
    param = weight()
    own = FULL[2 * ranks.tp_rank : 2 * ranks.tp_rank + 2]
    param.load_column_parallel_weight(own, ranks.tp_rank, use_presharded_weights=True)
    return param


def presharded_part(ranks: Ranks) -> ModelWeightParameter:
    with as_current(ranks):
        param = weight()
        own = FULL[2 * ranks.tp_rank : 2 * ranks.tp_rank + 2]
        param.load_qkv_weight(
            own,
            shard_id="k",
            shard_offset=0,
            shard_size=2,
            num_heads=1,
            use_presharded_weights=True,
        )
    return param


def loaded_in_another_thread(ranks: Ranks) -> ModelWeightParameter:
    with as_current(ranks):
        param = weight()
        thread = threading.Thread(target=param.load_column_parallel_weight, args=(FULL,))
        thread.start()
        thread.join()
    return param


STYLES = [
    inside_both,
    built_inside_loaded_outside,
    built_outside_loaded_inside,
    built_as_another_rank,
    with_set_current,
    attributes_overwritten,
    attributes_beat_the_current_rank,
    attributes_overwritten_with_their_own_values,
    attributes_overwritten_in_the_dict,
    rank_alone_overwritten,
    rank_alone_overwritten_where_t_is_known,
    rank_of_the_call,
    rank_of_the_call_second,
    rank_of_the_call_beats_all,
    rank_of_a_row_call,
    rank_of_a_merged_call,
    rank_of_a_qkv_call,
    presharded,
    presharded_part,
    loaded_in_another_thread,
]


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.__name__)
def test_ranks(style: Callable[[Ranks], torch.Tensor]) -> None:
    for ranks in all_ranks(T):
        assert piece(style(ranks)) == ranks.tp_rank


def test_the_stamp() -> None:
    assert (weight().tp_rank, weight().tp_size) == (0, 1)
    with as_current(Ranks(tp_rank=2, tp_size=4)):
        param = weight()
    assert vars(param)["tp_rank"] == 2
    assert vars(param)["tp_size"] == 4
    param.tp_rank = 1
    assert vars(param)["tp_rank"] == 1


def test_switching_tensor_parallelism_off_for_one_layer() -> None:
    """Engines overwrite rank and size for a layer that is not cut."""
    with as_current(Ranks(tp_rank=1, tp_size=2)):
        param = weight()
        param.tp_rank, param.tp_size = 0, 1
        param.load_column_parallel_weight(FULL[:2])
        assert piece(param) == 0
        with refused(
            ShapeError,
            "ModelWeightParameter: tensor is int64[6, 1], needs int64[2, 1] "
            "(the parameter's shape).",
            param,
        ):
            param.load_column_parallel_weight(FULL)


def test_one_rank_without_a_group() -> None:
    param = weight()
    param.load_column_parallel_weight(FULL[:2])
    assert piece(param) == 0
    with refused(
        ShapeError,
        "ModelWeightParameter: tensor is int64[6, 1], needs int64[2, 1] (the parameter's shape).",
        param,
    ):
        param.load_column_parallel_weight(FULL)


def test_shared_heads_with_the_rank_of_the_call() -> None:
    for rank in range(4):
        param = weight()
        param.load_qkv_weight(
            loaded_weight=FULL[:4],
            num_heads=2,
            shard_id="v",
            shard_offset=0,
            shard_size=2,
            tp_rank=rank,
            use_presharded_weights=False,
        )
        assert piece(param) == rank // 2


def test_a_world_bounds_what_a_rank_alone_may_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a world of 4, a group has 1, 2 or 4 ranks: 3 pieces are a tensor that is too short."""
    monkeypatch.setattr("lading.parameter.base.world", lambda: Ranks(tp_rank=2, tp_size=4))
    param = weight()
    param.load_column_parallel_weight(numbered((8, 1)))
    assert piece(param) == 2
    other = weight()
    other.load_column_parallel_weight(numbered((4, 1)), tp_rank=1)  # a group of two
    assert piece(other) == 1
    for rows in (6, 12, 1):
        with refused(
            ShapeError,
            f"ModelWeightParameter: tensor is int64[{rows}, 1], needs int64[8, 1] "
            "(8 = 4 pieces * 2).",
            other,
        ):
            other.load_column_parallel_weight(numbered((rows, 1)), tp_rank=1)


def test_the_world_of_torch_distributed(tmp_path: Path) -> None:
    """Ranks of a real process group are seen without any call of ours."""
    import torch.multiprocessing as mp

    mp.spawn(_load_in_a_group, args=(str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in range(2)] == [
        [[0], [1]],
        [[2], [3]],
    ]


def _load_in_a_group(rank: int, meet: str, out: str) -> None:
    param = weight()  # built before there is a group
    ranks_module.join_file(meet, ranks=Ranks(tp_rank=rank, tp_size=2), device_type="cpu")
    param.load_column_parallel_weight(numbered((4, 1)))
    torch.save(param.data, f"{out}/{rank}.pt")
    ranks_module.leave_world()


def test_threads_load_different_parameters() -> None:
    """Each thread is its own rank, and none sees another's."""
    size, rows = 8, 50
    full = numbered((size * 4, 64))
    results: dict[int, list[ModelWeightParameter]] = {}
    failures: list[BaseException] = []
    start = threading.Barrier(size)

    def work(ranks: Ranks) -> None:
        try:
            start.wait()
            done = []
            with as_current(ranks):
                for _ in range(rows):
                    param = ModelWeightParameter(
                        data=poisoned((4, 64)), input_dim=1, output_dim=0, weight_loader=None
                    )
                    param.load_merged_column_weight(
                        full[: size * 2], shard_id=0, shard_offset=0, shard_size=2
                    )
                    param.load_merged_column_weight(
                        full[size * 2 :], shard_id=1, shard_offset=2, shard_size=2
                    )
                    done.append(param)
            results[ranks.tp_rank] = done
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(ranks,)) for ranks in all_ranks(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for rank, params in results.items():
        want = torch.cat([full[2 * rank : 2 * rank + 2], full[2 * (size + rank) :][:2]])
        assert all(torch.equal(param.data, want) for param in params)


def test_classes_that_are_not_cut_take_ranks_too() -> None:
    for cls in (BasevLLMParameter, PackedvLLMParameter):
        facts = {} if cls is BasevLLMParameter else {"input_dim": 0, "output_dim": 0}
        packing = {} if cls is BasevLLMParameter else {"packed_factor": 8, "packed_dim": 0}
        param = cls(data=poisoned((2,)), weight_loader=None, **facts, **packing)
        param.load_row_parallel_weight(numbered((2,)), tp_rank=0, use_presharded_weights=True)
        param.load_column_parallel_weight(numbered((2,)), 0, True)
        assert param.data.tolist() == [0, 1]
