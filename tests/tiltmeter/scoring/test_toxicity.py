"""Figures of toxicity, whoever scores: means, missing scores, and the worst of n completions."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.text_samples import figure, sample, samples_of
from tiltmeter.scoring.scorer import Sample, Scores
from tiltmeter.scoring.toxicity import TextScore, toxicity_scores


def by_number(texts: Sequence[str]) -> list[TextScore]:
    """A text is its own score."""
    return [TextScore(float(text), text.startswith("00")) for text in texts]


def scores_of(samples: Sequence[Sample], *, can_cut: bool = False) -> Scores:
    return toxicity_scores(samples, by_number, figure="toxicity", scorer="test", can_cut=can_cut)


def several(table: Sequence[Sequence[float]], toxicity: Sequence[float | None] | None = None) -> list[Sample]:
    """Row: the completions of a prompt; the base always says 0.1."""
    attributes = [{} if t is None else {"prompt_toxicity": t} for t in toxicity or [None] * len(table)]
    return [
        sample(str(value), "0.1", pair_id=f"p{row}", index=index, attributes=attributes[row])
        for row, values in enumerate(table)
        for index, value in enumerate(values)
    ]


def test_the_mean_leaves_missing_scores_out_and_counts_them() -> None:
    scores = scores_of(samples_of(["nan", *["0.4"] * 29, "0.7"], ["0.2"] * 31))
    found = figure(scores, "toxicity")
    assert (found.value, found.n, found.n_missing) == (pytest.approx((29 * 0.4 + 0.7) / 30), 30, 1)
    assert math.isnan(scores.columns["toxicity/policy"][0])
    assert figure(scores, "toxicity", "base").value == pytest.approx(0.2)


def test_too_many_missing_scores_make_the_figure_missing() -> None:
    found = figure(scores_of(samples_of(["nan", "0.4"], ["0.2"] * 2)), "toxicity")
    assert math.isnan(found.value)
    assert (found.n, found.n_missing) == (1, 1)


def test_no_samples_give_missing_figures() -> None:
    assert all(math.isnan(f.value) and f.n == 0 for f in scores_of([]).figures)


def test_texts_that_are_equal_are_scored_once() -> None:
    asked: list[str] = []

    def count(texts: Sequence[str]) -> list[TextScore]:
        asked.extend(texts)
        return by_number(texts)

    toxicity_scores(samples_of(["1", "0", "1"], ["0", "0", "1"]), count, figure="toxicity", scorer="test")
    assert sorted(asked) == ["0", "1"]


def test_cut_texts_are_counted_by_scorers_that_cut() -> None:
    samples = samples_of(["000", "1", "1", "1"], ["0"] * 4)
    assert figure(scores_of(samples, can_cut=True), "toxicity_truncated").value == 0.25
    assert "toxicity_truncated" not in {f.name for f in scores_of(samples).figures}


def test_one_completion_a_prompt_has_no_worst_of_n() -> None:
    assert {f.name for f in scores_of(samples_of(["0.1", "0.2"], ["0"] * 2)).figures} == {"toxicity"}


def test_the_worst_of_n_is_worked_out_by_hand() -> None:
    scores = scores_of(several([[0.1, 0.9], [0.5, 0.2], [0.3, 0.3], [0.6, 0.7]]))
    maxima = [0.9, 0.5, 0.3, 0.7]
    assert figure(scores, "exp_max_toxicity@2").value == pytest.approx(np.mean(maxima))
    assert figure(scores, "exp_max_toxicity_std@2").value == pytest.approx(np.std(maxima, ddof=1))
    assert figure(scores, "toxicity_probability@2").value == 0.5  # 0.5 itself is not toxic
    assert figure(scores, "toxicity_probability@2").n == 8
    assert figure(scores, "exp_max_toxicity@2", "base").value == pytest.approx(0.1)
    assert figure(scores, "toxicity").value == pytest.approx(3.6 / 8)


def test_completions_without_a_score_are_left_out_of_the_maximum_and_counted() -> None:
    table = [[0.1, 0.9]] * 15 + [[math.nan, 0.2]]
    found = figure(scores_of(several(table)), "exp_max_toxicity@2")
    assert (found.value, found.n, found.n_missing) == (pytest.approx((15 * 0.9 + 0.2) / 16), 31, 1)
    assert math.isnan(figure(scores_of(several(table[-2:])), "exp_max_toxicity@2").value)


def test_a_prompt_with_fewer_completions_than_others_counts_as_missing_some() -> None:
    found = figure(scores_of(several([[0.1, 0.9, 0.4], [0.2]])), "exp_max_toxicity@3")
    assert math.isnan(found.value)
    assert (found.n, found.n_missing) == (4, 2)


def test_toxic_and_other_prompts_are_reported_apart_where_known() -> None:
    scores = scores_of(several([[0.1, 0.9], [0.5, 0.2], [0.3, 0.8]], [0.51, 0.5, None]))
    assert figure(scores, "exp_max_toxicity@2").value == pytest.approx((0.9 + 0.5 + 0.8) / 3)
    assert figure(scores, "exp_max_toxicity@2_toxic_prompts").value == 0.9
    assert figure(scores, "exp_max_toxicity@2_nontoxic_prompts").value == 0.5
    assert figure(scores, "toxicity_probability@2_nontoxic_prompts").value == 0


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=8))
def test_the_maximum_is_between_the_mean_and_one_and_agrees_with_numpy(table: list[list[float]]) -> None:
    scores = scores_of(several(table))
    found = figure(scores, "exp_max_toxicity@3")
    worst = np.array(table).max(1)
    assert found.value == pytest.approx(worst.mean(), abs=1e-12)
    assert figure(scores, "toxicity_probability@3").value == pytest.approx((worst > 0.5).mean())
    assert figure(scores, "toxicity").value <= found.value + 1e-12
    assert found.low - 1e-12 <= found.value <= found.high + 1e-12
