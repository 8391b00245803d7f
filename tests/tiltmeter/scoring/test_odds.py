"""PrefOdds, UtilOdds and perplexity: golden values, other ways to compute them, and what has no value."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_models import make_model, random_pairs
from tiltmeter.pairs.batch import collate_pairs
from tiltmeter.pairs.log_probs import sequence_log_probs
from tiltmeter.scoring.odds import log1mexp, odds_scores, perplexity_figure, preference_odds, utility_odds


def exact(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_golden_values() -> None:
    assert preference_odds(exact(1), exact(3)).tolist() == [2.0]
    assert float(utility_odds(exact(1), exact(3))) == pytest.approx(-0.332360, abs=5e-7)


@given(st.floats(0.01, 0.99), st.floats(0.001, 0.999))
def test_it_is_the_formula_where_that_can_be_computed(total: float, share: float) -> None:
    p, n = total * share, total * (1 - share)
    losses = exact(-math.log(p)), exact(-math.log(n))
    assert float(preference_odds(*losses)) == pytest.approx(math.log(p / n), abs=1e-9)
    assert float(utility_odds(*losses)) == pytest.approx(math.log((p + n) / (1 - p - n)), rel=1e-9, abs=1e-9)
    assert float(utility_odds(*losses[::-1])) == pytest.approx(float(utility_odds(*losses)))


def test_long_answers_do_not_underflow_and_certain_ones_do_not_cancel() -> None:
    assert utility_odds(exact(2000), exact(2000)).tolist() == pytest.approx([math.log(2) - 2000])
    tiny = 1e-14  # P = 1 − tiny: the formula itself has lost it
    assert float(utility_odds(exact(tiny), exact(1e4))) == pytest.approx(-math.log(tiny))
    assert log1mexp(exact(-1e-300, -1e-3, -40)).tolist() == pytest.approx(
        [math.log(1e-300), math.log(-math.expm1(-1e-3)), -math.exp(-40)]
    )


def test_what_is_no_probability_has_no_value() -> None:
    cases = [(0.1, 0.1), (0.0, 800.0), (-1.0, 5.0), (math.nan, 1.0), (1.0, math.inf), (math.inf, math.inf)]
    positive, negative = (exact(*column) for column in zip(*cases, strict=True))
    assert utility_odds(positive, negative).isnan().all()
    assert preference_odds(positive, negative).isnan().tolist() == [False, False, False, True, True, True]


def test_scores_are_means_over_pairs_with_what_is_missing_counted() -> None:
    losses = [1.0] * 40, [3.0] * 39 + [math.nan]
    scores = odds_scores(*losses, groups=[f"p{i // 2}" for i in range(40)], of="base")
    preference, utility = scores.figures
    assert (preference.name, preference.of, preference.value) == ("preference_odds", "base", 2.0)
    assert utility.value == pytest.approx(-0.332360, abs=5e-7)
    assert (utility.n, utility.n_missing) == (39, 1)
    assert math.isnan(scores.columns["utility_odds/base"][-1])
    nearly_all = odds_scores([1.0, 1.0], [3.0, math.nan], groups=["a", "b"])
    assert math.isnan(nearly_all.figures[0].value), "half are missing"
    with pytest.raises(ValueError, match="expected columns of one length, got 1, 2, 1"):
        odds_scores([1.0], [1.0, 2.0], groups=["a"])


def test_odds_of_a_model_are_those_of_its_own_probabilities() -> None:
    """One-token answers: the two probabilities stand in one softmax."""
    model = make_model("llama", torch.float64).eval()
    pairs = [pair._replace(chosen_ids=[5], rejected_ids=[9]) for pair in random_pairs(4)]
    batch = collate_pairs(pairs, pair_index=range(4))
    with torch.no_grad():
        losses = -sequence_log_probs(model, batch)
        logits = [model(torch.tensor([pair.prompt_ids])).logits[0, -1] for pair in pairs]
    p = torch.stack(logits).double().softmax(-1)[:, [5, 9]]
    scores = odds_scores(losses[:4].tolist(), losses[4:].tolist(), groups=list("abcd"))
    expected = (p[:, 0] / p[:, 1]).log()
    assert scores.columns["preference_odds/policy"] == pytest.approx(expected.tolist(), rel=1e-4)
    either = p.sum(1)
    assert scores.columns["utility_odds/policy"] == pytest.approx((either / (1 - either)).log().tolist(), rel=1e-4)


def test_perplexity_weighs_tokens_and_not_texts() -> None:
    found = perplexity_figure([-3.0, -0.5, -12.0], [3, 1, 4], groups=["a", "b", "c"])
    assert found.value == pytest.approx(math.exp(15.5 / 8))
    assert found.low < found.value < found.high
    uniform = perplexity_figure([-7 * math.log(50)], [7], groups=["a"])
    assert uniform.value == pytest.approx(50)


def test_perplexity_of_texts_without_tokens_is_missing() -> None:
    found = perplexity_figure([-3.0] * 30 + [0.0], [3] * 30 + [0], groups=[str(i) for i in range(31)])
    assert (found.n, found.n_missing) == (30, 1)
    assert found.value == pytest.approx(math.e)
    for log_probs, counts in (([], []), ([0.0], [0]), ([math.nan, -1.0], [1, 1]), ([-math.inf], [2])):
        assert math.isnan(perplexity_figure(log_probs, counts, groups=["a"] * len(counts)).value)
