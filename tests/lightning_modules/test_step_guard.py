"""Steps whose numbers are wrong are not learned from: weights and moments as before, the pairs named, an end to patience."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lightning_modules.dpo import DPOModule
from lightning_modules.step_guard import ACTIVE_FROM, WINDOW, StepGuard
from tests.faults.faulty import Kept, poison
from tests.tiny_models import fit, lightning_warnings, make_data
from tiltmeter.errors import NumericalStop, UserError

pytestmark = lightning_warnings


def verdicts(losses: Iterable[float], norms: Iterable[float], **options: Any) -> list[str | None]:
    guard = StepGuard(**({"max_skipped_steps": 3, "spike_sigmas": 6.0} | options))
    return [guard.refuse(loss=loss, norm=norm) for loss, norm in zip(losses, norms, strict=True)]


def by_definition(values: list[float], at: int) -> float:
    """Standard deviations above the mean of the 128 values before."""
    before = np.array(values[max(0, at - WINDOW) : at])
    return float((values[at] - before.mean()) / before.std(ddof=1))


def test_a_spike_is_what_the_definition_says() -> None:
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(0.6, 0.01, 400).tolist(), rng.normal(3, 0.1, 400).tolist()
    for at in (30, 70, 200, 205, 390):
        losses[at] += 0.08
    norms[300] += 5
    found = verdicts(losses, norms)
    expected = [at for at in range(ACTIVE_FROM, 400) if max(by_definition(losses, at), by_definition(norms, at)) > 6]
    assert expected
    assert 30 not in expected, "not active yet"
    assert [at for at, verdict in enumerate(found) if verdict] == expected
    assert str(found[300]).startswith("gradient norm")


def test_values_far_below_are_no_spikes_and_a_lasting_change_is_learned_from() -> None:
    rng = np.random.default_rng(1)
    low = [*rng.normal(0.6, 0.01, 80), 0.1]
    assert verdicts(low, [1.0] * 81) == [None] * 81
    raised = [*rng.normal(0.6, 0.01, 80), *rng.normal(1.2, 0.01, 40)]
    found = verdicts(raised, [1.0] * 120)
    assert found[80]
    assert found[90:] == [None] * 30


def test_spikes_can_be_switched_off_and_what_is_not_finite_never_enters_the_window() -> None:
    losses = [0.6, 0.61] * 40 + [math.nan, math.inf, 50.0]
    assert [bool(v) for v in verdicts(losses, [1.0] * 83)[-3:]] == [True, True, True]
    assert [bool(v) for v in verdicts(losses, [1.0] * 83, spike_sigmas=None)[-3:]] == [True, True, False]
    assert verdicts([0.6], [math.inf]) == ["loss or gradient not finite"]


def test_a_restored_guard_judges_as_the_first_one_would_have() -> None:
    rng = np.random.default_rng(2)
    guard, other = (StepGuard(max_skipped_steps=3, spike_sigmas=6.0) for _ in range(2))
    for loss in rng.normal(0.6, 0.01, 150):
        guard.refuse(loss=loss, norm=1.0)
    guard.refuse(loss=math.nan, norm=1.0)
    other.load_state_dict(guard.state_dict())
    assert (other.n_refused, other.n_not_finite_in_a_row) == (1, 1)
    assert other.refuse(loss=0.68, norm=1.0) == guard.refuse(loss=0.68, norm=1.0) is not None


def train(is_bad: Callable[[int], bool], *, gradient: bool = False, **options: Any) -> Kept:
    module, kept = DPOModule(learning_rate=3e-3, weight_decay=0.1, **options), Kept()
    poison(module, lambda step: math.nan if is_bad(step) else 1.0, gradient_only=gradient)
    data = make_data(12, pairs_per_step=2, tokens_per_micro_batch=60)
    fit(module, data, family="llama", dtype="float32", max_steps=6, callbacks=[kept])
    return kept


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient only"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(
    gradient: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    kept, clean = train(lambda step: step == 3, gradient=gradient), train(lambda step: False)
    assert_close(kept.weights[2], clean.weights[2], rtol=0, atol=0)
    assert_close(kept.weights[3], kept.weights[2], rtol=0, atol=0)
    assert_close(kept.moments[3], kept.moments[2], rtol=0, atol=0)
    moved = [name for name, value in kept.weights[4].items() if not torch.equal(value, kept.weights[3][name])]
    assert moved, "the next step is taken"
    rates = [[row["train/learning_rate"] for row in run.logged] for run in (kept, clean)]
    assert rates[0] == rates[1], "the schedule goes on"
    assert [row["alarm/skipped_steps"] for row in kept.logged] == [0, 0, 0, 1, 1, 1]
    (said,) = re.findall(r"step 3: .*", capsys.readouterr().out)
    named = "every loss is finite" if gradient else "memory/"
    assert f"loss or gradient not finite ({named}" in said
    assert said.endswith("; skipped, nothing was updated")


def test_too_many_in_a_row_end_the_run_and_one_good_step_in_between_does_not() -> None:
    assert [row["alarm/skipped_steps"] for row in train(lambda step: step != 2, max_skipped_steps=3).logged][-1] == 5
    with pytest.raises(NumericalStop, match=r"^step 3: .*memory/.* 3 in a row \(module\.max_skipped_steps=2\)"):
        train(lambda step: step != 0, max_skipped_steps=2)
    with pytest.raises(NumericalStop, match=r"^step 0: "):
        train(lambda step: True, max_skipped_steps=0)


@pytest.mark.parametrize(("option", "value"), [("max_skipped_steps", -1), ("spike_sigmas", 0.0)])
def test_limits_that_make_no_sense(option: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^module\.{option}"):
        DPOModule(learning_rate=1e-3, **{option: value})
