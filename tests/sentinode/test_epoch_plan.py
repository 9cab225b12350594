"""Every row of an epoch is trained on exactly once, however the workers, batches and interruptions fall."""

import math

import numpy as np
import pytest

from sentinode.epoch_plan import EpochPlan, dealt_in_steps


def own_rows(plan: EpochPlan, rank: int) -> list[int]:
    return [row for step in plan.of_rank(rank) for batch in step.batches for row in batch.rows[: batch.own].tolist()]


def order_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(rows)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 8, 32])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 31, 33, 64, 65, 257])
def test_every_row_is_dealt_exactly_once(rows: int, batch_size: int, world_size: int, accumulate: int) -> None:
    order = dealt_in_steps(order_of(rows), world_size, batch_size)
    plan = EpochPlan(order, world_size, batch_size, accumulate)
    ranks = [plan.of_rank(rank) for rank in range(world_size)]
    full, left = divmod(rows, batch_size * world_size)
    batches = max(1, full + (4 * left > batch_size * world_size))  # a small rest joins the last one
    assert {len(steps) for steps in ranks} == {math.ceil(batches / accumulate)}, "workers would wait for each other"
    dealt = []
    for steps in zip(*ranks, strict=True):
        mine = [row for step in steps for batch in step.batches for row in batch.rows[: batch.own].tolist()]
        assert {len(step.batches) for step in steps} == {len(steps[0].batches)}
        for step in steps:
            assert sorted(step.all_rows.tolist()) == sorted(mine)
            assert all(2 <= len(batch.rows) <= max(2, math.ceil(1.25 * batch_size)) for batch in step.batches)
        dealt.extend(mine)
    assert sorted(dealt) == list(range(rows))


@pytest.mark.parametrize("rows", [50, 64, 67])
@pytest.mark.parametrize("world_size", [2, 4])
def test_steps_do_not_depend_on_the_number_of_workers_but_on_their_rows(rows: int, world_size: int) -> None:
    order = order_of(rows)
    alone = EpochPlan(dealt_in_steps(order, 1, 16), 1, 16).of_rank(0)
    together = EpochPlan(dealt_in_steps(order, world_size, 16 // world_size), world_size, 16 // world_size).of_rank(0)
    assert [set(step.all_rows.tolist()) for step in alone] == [set(step.all_rows.tolist()) for step in together]


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_last_step_of_a_few_rows_joins_the_one_before(world_size: int) -> None:
    order = dealt_in_steps(order_of(154_017), world_size, 32 // world_size)  # one row more than 4,813 batches of 32
    steps = EpochPlan(order, world_size, 32 // world_size).of_rank(0)
    assert len(steps) == 4813
    assert [len(step.all_rows) for step in steps[-2:]] == [32, 33]


def test_a_borrowed_row_is_another_one_and_from_just_before() -> None:
    plan = EpochPlan(order_of(7), 1, 3)
    last = plan.of_rank(0)[-1].batches[0]
    before = plan.of_rank(0)[-2].batches[0]
    assert last.own == 1
    assert last.rows[1] == before.rows[-1]


def test_a_worker_without_rows_borrows_two() -> None:
    plan = EpochPlan(dealt_in_steps(order_of(4), 3, 1), 3, 1)
    last = plan.of_rank(1)[-1].batches[0]
    assert last.own == 0
    assert len(set(last.rows.tolist())) == 2


def test_one_row_in_all_borrows_itself() -> None:
    assert EpochPlan(order_of(1), 1, 8).of_rank(0)[0].batches[0].rows.tolist() == [0, 0]


@pytest.mark.parametrize("batches_done", [0, 1, 3, 6])
def test_the_rest_of_an_interrupted_epoch_is_what_would_have_come(batches_done: int) -> None:
    order = order_of(67)
    whole = EpochPlan(order, 2, 4)
    rest = EpochPlan(order, 2, 4, done=[(2, batches_done)])
    for rank in range(2):
        expected, left = whole.of_rank(rank)[batches_done:], rest.of_rank(rank)
        assert len(expected) == len(left)
        for one, other in zip(expected, left, strict=True):
            np.testing.assert_array_equal(one.all_rows, other.all_rows)
            np.testing.assert_array_equal(one.batches[0].rows, other.batches[0].rows)
    assert rest.part_done_after(rest.steps - 1) == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_nothing_is_left_of_an_epoch_whose_batches_are_all_done(world_size: int) -> None:
    order = order_of(66)
    batches = sum(len(step.batches) for step in EpochPlan(order, 2, 4).of_rank(0))
    assert EpochPlan(order, world_size, 4, done=[(2, batches)]).of_rank(0) == []


@pytest.mark.parametrize("history", [[(2, 3)], [(3, 2), (1, 4)], [(1, 5), (2, 1), (4, 1)]])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_with_other_numbers_of_workers_every_row_still_counts_once(history: list[tuple[int, int]], world_size: int) -> None:
    order = order_of(101)
    trained: list[int] = []
    for index, (workers, batches) in enumerate(history):
        plan = EpochPlan(order, workers, 4, done=history[:index])
        for rank in range(workers):
            for step in plan.of_rank(rank)[:batches]:
                trained += [row for batch in step.batches for row in batch.rows[: batch.own].tolist()]
    last = EpochPlan(order, world_size, 4, done=history)
    if history[-1][0] == world_size:  # goes on where it was
        assert last.steps_done == history[-1][1]
    for rank in range(world_size):
        trained += own_rows(last, rank)
    assert sorted(trained) == list(range(101))


def test_the_part_that_is_done_grows_to_one() -> None:
    plan = EpochPlan(order_of(67), 2, 4, 2)
    parts = [plan.part_done_after(step) for step in range(plan.steps)]
    assert parts == sorted(parts)
    assert parts[0] == pytest.approx(16 / 67)
    assert parts[-1] == 1.0
    changed = EpochPlan(order_of(67), 1, 4, 2, done=[(2, 4)])
    assert changed.part_done_after(0) == pytest.approx((32 + 8) / 67)
