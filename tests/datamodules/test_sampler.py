from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.sampler import (
    MICRO_BATCH_COST,
    StepPlan,
    StepSampler,
    bucketed_order,
    epoch_order,
    fill_rows,
    group_by_length,
    plan_step,
)

lengths_of_rows = st.lists(st.integers(1, 200), min_size=1, max_size=40)
budgets = st.integers(1, 500)


def sampler(lengths: list[int], **options: object) -> StepSampler:
    defaults = {"pairs_per_step": 8, "tokens_per_micro_batch": 300, "shuffle": True, "seed": 3}
    return StepSampler(lengths, **(defaults | options))


def real_rows(plan: StepPlan) -> list[int]:
    return [row for group in plan.micro_batches[: len(plan.micro_batches) - plan.n_fillers] for row in group]


@given(st.integers(1, 100), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch_alone(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed=seed, epoch=epoch, shuffle=True)
    assert sorted(order) == list(range(n))
    assert (order == epoch_order(n, seed=seed, epoch=epoch, shuffle=True)).all()
    assert (epoch_order(n, seed=seed, epoch=epoch, shuffle=False) == np.arange(n)).all()


def test_other_seeds_and_other_epochs_give_other_orders() -> None:
    orders = {tuple(epoch_order(50, seed=s, epoch=e, shuffle=True)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@given(lengths_of_rows, budgets)
def test_groups_hold_every_row_once_and_stay_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = group_by_length(range(len(lengths)), lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= budget
    spans = [(lengths[group[0]], lengths[group[-1]]) for group in groups]
    assert spans == sorted(spans, reverse=True), "from long to short: no group reaches into the next"


@given(lengths_of_rows, budgets, st.integers(1, 5), st.randoms())
def test_processes_share_a_step_exactly_and_run_equally_many_micro_batches(
    lengths: list[int], budget: int, world_size: int, random: Random
) -> None:
    rows = list(range(len(lengths)))
    random.shuffle(rows)
    world_size = min(world_size, len(rows))
    plans = [
        plan_step(rows, lengths, tokens_per_micro_batch=budget, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert sorted(row for plan in plans for row in real_rows(plan)) == sorted(rows)
    assert len({len(plan.micro_batches) for plan in plans}) == 1
    assert min(plan.n_fillers for plan in plans) == 0, "nobody runs more than the busiest needs"
    shares = [len(real_rows(plan)) for plan in plans]
    assert max(shares) - min(shares) <= 1
    for plan in plans:
        assert plan.rows == tuple(rows)
        fillers = plan.micro_batches[len(plan.micro_batches) - plan.n_fillers :]
        assert all(len(group) == 1 and group[0] in rows for group in fillers)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_a_step_with_fewer_pairs_than_processes_gives_the_idle_ones_a_weightless_pair(world_size: int) -> None:
    plans = [
        plan_step([4], [9] * 5, tokens_per_micro_batch=50, rank=r, world_size=world_size) for r in range(world_size)
    ]
    assert [plan.n_fillers for plan in plans] == [0] + [1] * (world_size - 1)
    assert {plan.micro_batches for plan in plans} == {((4,),)}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [24, 37])
def test_every_process_count_sees_the_same_steps(world_size: int, n_rows: int) -> None:
    lengths = np.random.default_rng(0).integers(10, 150, n_rows).tolist()
    alone = list(sampler(lengths))
    ranks = [list(sampler(lengths, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len(alone) == len(sampler(lengths)) == -(-n_rows // 8)
    for step, plans in zip(alone, zip(*ranks, strict=True), strict=True):
        assert {plan.rows for plan in plans} == {step.rows}
        assert Counter(row for plan in plans for row in real_rows(plan)) == Counter(step.rows)
    assert Counter(row for step in alone for row in step.rows) == Counter(range(n_rows))


@given(st.lists(st.integers(1, 200), min_size=4, max_size=40), st.integers(1, 4))
def test_tokens_of_processes_differ_by_no_more_than_one_long_pair(lengths: list[int], world_size: int) -> None:
    plans = [
        plan_step(range(len(lengths)), lengths, tokens_per_micro_batch=10**6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    tokens = [sum(lengths[row] for row in real_rows(plan)) for plan in plans]
    assert max(tokens) - min(tokens) <= max(lengths)


@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resuming_gives_the_rest_of_the_epoch_and_then_whole_epochs(start: int) -> None:
    lengths = list(range(10, 43))
    whole, resumed = sampler(lengths), sampler(lengths, start_step=start)
    whole.set_epoch(2)
    resumed.set_epoch(2)
    assert list(resumed) == list(whole)[start:]
    whole.set_epoch(3)
    resumed.set_epoch(3)
    assert list(resumed) == list(whole)
    assert len(resumed) == len(whole) == 5


def test_length_groups_pairs_only_inside_a_step() -> None:
    lengths = list(range(1, 65))
    steps = [step.rows for step in sampler(lengths)]
    order = epoch_order(64, seed=3, epoch=0, shuffle=True).tolist()
    assert [row for rows in steps for row in rows] == order


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), budgets)
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths: list[int], budget: int) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(len(g) * max(lengths[r] for r in g) + MICRO_BATCH_COST for g in groups)

    order = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    cheapest = None
    for cuts in range(2 ** (len(order) - 1)):
        groups = [[order[0]]]
        for i, row in enumerate(order[1:]):
            if cuts >> i & 1:
                groups.append([])
            groups[-1].append(row)
        if all(len(g) == 1 or len(g) * lengths[g[0]] <= budget for g in groups):
            cheapest = cost(groups) if cheapest is None else min(cheapest, cost(groups))
    assert cost(group_by_length(range(len(lengths)), lengths, budget)) == cheapest


@given(lengths_of_rows, budgets)
def test_packed_groups_hold_every_row_once_within_the_budget_and_leave_no_two_that_fit_together(
    lengths: list[int], budget: int
) -> None:
    groups = fill_rows(range(len(lengths)), lengths, budget)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    sums = [sum(lengths[row] for row in group) for group in groups]
    assert all(total <= budget or len(group) == 1 for total, group in zip(sums, groups, strict=True))
    assert all(sums[i] + sums[j] > budget for i in range(len(sums)) for j in range(i))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 7), st.integers(1, 5), st.integers(0, 3))
def test_buckets_hold_every_row_once_and_sort_only_among_their_own_steps(
    lengths: list[int], per_step: int, bucket_steps: int, epoch: int
) -> None:
    options = {"pairs_per_step": per_step, "bucket_steps": bucket_steps, "seed": 1, "epoch": epoch}
    order = epoch_order(len(lengths), seed=1, epoch=epoch, shuffle=True)
    bucketed = bucketed_order(order, lengths, **options)
    size = per_step * bucket_steps
    for at in range(0, len(order), size):
        assert sorted(bucketed[at : at + size]) == sorted(order[at : at + size])
    assert (bucketed == bucketed_order(order, lengths, **options)).all()


def test_buckets_make_steps_of_similar_length_in_random_order() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(10, 500, 320)]

    def spread(bucket_steps: int) -> float:
        order = sampler(lengths, bucket_steps=bucket_steps).order(0)
        return float(np.mean([np.ptp([lengths[row] for row in order[at : at + 8]]) for at in range(0, 320, 8)]))

    assert spread(20) < 0.2 * spread(1)
    longest = [max(lengths[row] for row in plan.rows) for plan in sampler(lengths, bucket_steps=40)]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
