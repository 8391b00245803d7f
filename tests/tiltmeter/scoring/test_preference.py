"""What a policy prefers: figures worked by hand, the strict rule at step 0, and sources apart."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiltmeter.errors import UserError
from tiltmeter.pairs.preference_losses import PairLogProbs
from tiltmeter.scoring.preference import kl_figures, preference_scores, preference_scores_of_validation
from tiltmeter.scoring.scorer import Figure, Scores

NAMES = ("preference_accuracy", "preference_ties", "reward_margin", "logp_drift_chosen", "logp_drift_rejected")
finite = st.floats(-1e3, 1e3)


def by_name(scores: Scores) -> dict[str, Figure]:
    return {figure.name: figure for figure in scores.figures}


def test_figures_by_hand_over_all_and_by_source() -> None:
    scores = preference_scores(
        [-1.0, -2.0, 0.5, 1.0],
        [-5.0, -1.0, 0.5, -1.0],
        beta=0.1,
        groups=["a", "b", "c", "d"],
        sources=["hh/y", "hh/x", "hh/x", "hh/y"],
    )
    figures = by_name(scores)
    assert [name.partition("/")[0] for name in figures] == [*NAMES] * 3
    assert [name.partition("/")[2] for name in figures] == [""] * 5 + ["hh/x"] * 5 + ["hh/y"] * 5
    assert figures["preference_accuracy"].value == 0.5, "4 − 1 nats and 2 nats; equal is wrong"
    assert figures["preference_ties"].value == 0.25
    assert figures["reward_margin"].value == pytest.approx(0.1 * (4 - 1 + 0 + 2) / 4)
    assert figures["logp_drift_chosen"].value == pytest.approx(-1.5 / 4)
    assert figures["logp_drift_rejected"].value == pytest.approx(-6.5 / 4)
    assert figures["preference_accuracy/hh/x"].value == 0.0
    assert figures["preference_accuracy/hh/y"].value == 1.0
    assert figures["reward_margin/hh/y"].value == pytest.approx(0.3)
    assert [figure.n for figure in scores.figures] == [4] * 5 + [2] * 10
    assert {figure.of for figure in scores.figures} == {"both"}
    margin = figures["reward_margin"]
    assert margin.low < margin.value < margin.high
    assert scores.columns["preference_accuracy"] == [1, 0, 0, 1]


def test_accuracy_by_margin_counts_each_pair_by_how_clear_it_was() -> None:
    drifts = [1.0, -1.0, 1.0, -1.0, 1.0], [0.0] * 5
    told = {"beta": 0.1, "groups": list("abcde"), "sources": ["x", "x", "x", "y", "y"]}
    figures = by_name(preference_scores(*drifts, **told, weights=[3.0, 1.0, -5.0, 2.0, math.nan]))  # type: ignore[arg-type]
    assert figures["preference_accuracy_by_margin"].value == pytest.approx(3 / 6)
    assert figures["preference_accuracy_by_margin/x"].value == pytest.approx(3 / 4), "a margin below 0 doesn't count"
    assert figures["preference_accuracy_by_margin/y"].value == 0.0
    assert [figures[f"preference_accuracy_by_margin{of}"].n for of in ("", "/x", "/y")] == [3, 2, 1]
    whole = figures["preference_accuracy_by_margin"]
    assert whole.low < whole.value < whole.high
    equal = by_name(preference_scores(*drifts, **told, weights=[0.02] * 5))  # type: ignore[arg-type]
    for of in ("", "/x", "/y"):
        plain = equal[f"preference_accuracy{of}"]._replace(name=f"preference_accuracy_by_margin{of}")
        assert equal[plain.name][2:5] == pytest.approx(plain[2:5])
    assert "preference_accuracy_by_margin/y" not in by_name(
        preference_scores(*drifts, **told, weights=[1.0, 1.0, 1.0, 0.0, math.nan])  # type: ignore[arg-type]
    )


def test_before_the_first_step_accuracy_is_zero_and_all_are_ties() -> None:
    figures = by_name(preference_scores([0.0] * 5, [0.0] * 5, beta=0.1, groups=list("abcde"), sources=["one"] * 5))
    assert [figures[name].value for name in NAMES] == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert len(figures) == 5, "one source alone is not said twice"


def test_missing_pairs_are_counted_never_wrong() -> None:
    drift = [1.0] * 39 + [math.nan]
    figures = by_name(preference_scores(drift, [0.0] * 40, beta=1.0, groups=list(map(str, range(40)))))
    assert (figures["preference_accuracy"].value, figures["preference_accuracy"].n_missing) == (1.0, 1)
    assert figures["logp_drift_rejected"].n == 40
    many = by_name(preference_scores([math.nan] * 2 + [1.0] * 8, [0.0] * 10, beta=1.0, groups=list("abcdefghij")))
    assert math.isnan(many["preference_accuracy"].value)


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    prompt = np.repeat(rng.normal(size=50), 8)
    apart = preference_scores(prompt.tolist(), [0.0] * 400, beta=1.0, groups=list(map(str, range(400)))).figures[2]
    together = preference_scores(
        prompt.tolist(), [0.0] * 400, beta=1.0, groups=[str(i // 8) for i in range(400)]
    ).figures[2]
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 2 * (apart.high - apart.low)


@given(st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=6), st.floats(0.01, 10))
def test_margins_are_those_of_the_loss_and_of_what_validation_yields(
    rows: list[tuple[float, ...]], beta: float
) -> None:
    pairs = PairLogProbs(*(torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)))
    chosen, rejected = (ratio.tolist() for ratio in pairs.log_ratios())
    groups = list(map(str, range(len(rows))))
    scores = preference_scores(chosen, rejected, beta=beta, groups=groups)
    assert scores.columns["reward_margin"] == pytest.approx((beta * pairs.margins()).tolist(), abs=1e-9)
    table = {"rewards/chosen": [beta * x for x in chosen], "rewards/rejected": [beta * x for x in rejected]}
    validated = preference_scores_of_validation(table, beta=beta, groups=groups)
    for name in NAMES[2:]:
        assert validated.columns[name] == pytest.approx(scores.columns[name], abs=1e-6)


def test_equal_rewards_of_a_validation_stay_ties() -> None:
    table = {"rewards/chosen": [0.1, 0.3000001], "rewards/rejected": [0.1, 0.3]}
    scores = preference_scores_of_validation(table, beta=0.07, groups=["a", "b"])
    assert scores.columns["preference_ties"] == [1, 0]
    assert scores.columns["preference_accuracy"] == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.0}, {"beta": math.inf}, {"groups": ["a"]}, {"sources": ["a"]}, {"drift_rejected": [1.0]}],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any]) -> None:
    options = {"drift_chosen": [1.0, 2.0], "drift_rejected": [1.0, 2.0], "beta": 1.0, "groups": ["a", "b"]} | changes
    with pytest.raises(ValueError, match="columns of one length and beta above 0"):
        preference_scores(**options)  # type: ignore[arg-type]


def test_a_table_without_rewards_is_one_line() -> None:
    with pytest.raises(UserError, match=r"held_out.csv: .* got no rewards/chosen, rewards/rejected"):
        preference_scores_of_validation({"nll": [1.0]}, beta=0.1, groups=["a"])


def test_kl_by_hand_and_per_token_as_a_ratio_of_sums() -> None:
    kl, per_token = kl_figures([-3.0, -9.0, -1.0], [-4.0, -19.0, -0.5], [2, 20, 1], groups=["a", "b", "c"])
    assert (kl.name, per_token.name, kl.of) == ("kl", "kl_per_token", "both")
    assert kl.value == pytest.approx((1 + 10 - 0.5) / 3)
    assert per_token.value == pytest.approx(10.5 / 23)
    assert per_token.low < per_token.value < per_token.high


def test_kl_of_a_known_distribution_is_found() -> None:
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    drawn = torch.multinomial(p, 6000, replacement=True, generator=torch.Generator().manual_seed(0)).view(2000, 3)
    policy, reference = (x.log()[drawn].sum(1).tolist() for x in (p, q))
    kl, per_token = kl_figures(policy, reference, [3] * 2000, groups=list(map(str, range(2000))))
    truth = float((p * (p / q).log()).sum())
    assert kl.low < 3 * truth < kl.high
    assert per_token.value == pytest.approx(kl.value / 3)
    assert per_token.low == pytest.approx(kl.low / 3, rel=0.05)


def test_completions_without_tokens_have_no_kl_per_token() -> None:
    kl, per_token = kl_figures([math.nan, -1.0], [0.0, -2.0], [0, 0], groups=["a", "b"])
    assert math.isnan(kl.value)
    assert (math.isnan(per_token.value), per_token.n, per_token.n_missing) == (True, 0, 2)
