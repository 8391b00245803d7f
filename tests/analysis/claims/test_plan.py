"""Power of a planned study: the numbers that it gives are right in simulated studies, and what can't be decided is said."""

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp, ttest_ind

from analysis.claims.claim import read_claims
from analysis.claims.evidence import judge_all
from analysis.claims.plan import plan_table, prompts_needed, seeds_needed
from benchmarks.verdicts import CLAIMS, study_of


@pytest.mark.parametrize(("effect", "n_arms"), [(1.5, 1), (0.8, 1), (2.0, 2), (1.0, 2)])
def test_planned_number_of_seeds_decides_nine_of_ten_simulated_studies(effect: float, n_arms: int) -> None:
    n = int(seeds_needed(effect, math.sqrt(n_arms), tail=0.05, n_arms=n_arms))
    rng, found = np.random.default_rng(0), 0
    for _ in range(2000):
        own = rng.normal(effect, 1, n)
        test = (
            ttest_1samp(own, 0, alternative="greater")
            if n_arms == 1
            else ttest_ind(own, rng.normal(0, 1, n), alternative="greater")
        )
        found += test.pvalue <= 0.05
    assert 0.88 < found / 2000 < 0.97
    if n > 3:
        assert seeds_needed(effect * 1.3, math.sqrt(n_arms), tail=0.05, n_arms=n_arms) < n


def test_planned_number_of_prompts_falls_with_the_square_of_the_effect() -> None:
    few, many = (prompts_needed(effect, 0.1, 64, tail=0.025) for effect in (0.4, 0.1))
    assert many == pytest.approx(16 * few, rel=0.15)
    assert prompts_needed(0.0, 0.1, 64, tail=0.025) == math.inf
    assert math.isnan(prompts_needed(0.1, math.nan, 0, tail=0.025))


def test_pilot_has_a_row_for_every_comparison_and_says_what_no_number_decides() -> None:
    arms = study_of("dpo = sft + seed", 0)
    table = plan_table(judge_all(read_claims(CLAIMS), arms), arms).set_index(["claim", "against"])
    assert {"threshold", "sft_chosen", "random_update", "base_states"} <= {against for _, against in table.index}
    assert table.loc[("K4", "random_update"), "seeds"] == 3
    assert table.loc[("K4", "sft_chosen"), "seeds"] > 3
    assert (table["seeds_there"] == 3).all()
