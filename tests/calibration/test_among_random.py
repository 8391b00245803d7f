"""How often one more random vector is called above or below random, and how often a real effect is found, by simulation.

A world: a figure of every vector on every prompt, with a part that all vectors share (how hard a prompt is), a part of the
vector, and noise of its own for each vector and prompt. Rates are over sets of vectors; a bound is the nominal rate and 2.6
standard errors of the simulation, taken over sets since judgements in a set share their draws.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltmeter.stats.among_random import ABOVE, BELOW, among_random
from tiltmeter.stats.bootstrap import prompt_resamples

pytestmark = pytest.mark.slow
N_SETS, N_PROMPTS, N_RESAMPLES = 300, 32, 300
NOMINAL = 0.025

Spread = Callable[[np.random.Generator, int], np.ndarray]
SPREADS: dict[str, Spread] = {
    "none": lambda rng, n: np.zeros(n),
    "as between prompts": lambda rng, n: rng.normal(size=n),
    "4 x between prompts": lambda rng, n: 2 * rng.normal(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 1,
}


def world(rng: np.random.Generator, n_vectors: int, spread: Spread) -> Tensor:
    """Figures on all prompts and on resamples of them, a column a vector."""
    by_prompt = 3 * rng.normal(size=(N_PROMPTS, 1)) + rng.normal(size=(N_PROMPTS, n_vectors)) + spread(rng, n_vectors)
    figures = torch.from_numpy(by_prompt)
    names = [str(i) for i in range(N_PROMPTS)]
    seed = int(rng.integers(2**31))
    return prompt_resamples(lambda w: w @ figures / w.sum(1, keepdim=True), names, n_resamples=N_RESAMPLES, seed=seed)


def rates(called: list[list[str]], verdict: str) -> tuple[float, float]:
    """Share of a verdict, and its standard error over sets."""
    shares = np.array([np.mean([one == verdict for one in of_set]) for of_set in called])
    return float(shares.mean()), float(shares.std() / math.sqrt(len(shares)))


@pytest.mark.parametrize("name", SPREADS)
def test_each_random_vector_against_the_others_is_rarely_above_or_below(name: str) -> None:
    rng = np.random.default_rng(0)
    called = []
    for _ in range(N_SETS):
        drawn = world(rng, 20, SPREADS[name])
        others = [[j for j in range(20) if j != i] for i in range(20)]
        called.append([among_random(drawn[:, i], drawn[:, others[i]]).verdict for i in range(20)])
    limit = (
        NOMINAL if name != "skewed" else 1 / 20
    )  # of 19 draws no rank is rarer; only normal draws have the t interval
    for verdict in (ABOVE, BELOW):
        rate, error = rates(called, verdict)
        assert rate <= limit + 2.6 * error, (verdict, rate, error)


@pytest.mark.parametrize("name", SPREADS)
def test_one_more_vector_against_99_is_rarely_above_or_below_whatever_their_distribution(name: str) -> None:
    rng = np.random.default_rng(1)
    called = []
    for _ in range(2 * N_SETS):
        drawn = world(rng, 100, SPREADS[name])
        called.append([among_random(drawn[:, 0], drawn[:, 1:]).verdict])
    for verdict in (ABOVE, BELOW):
        rate, error = rates(called, verdict)
        assert rate <= NOMINAL + 2.6 * max(error, math.sqrt(NOMINAL / len(called))), (verdict, rate)


@pytest.mark.parametrize("n_random", [19, 99])
def test_a_vector_five_standard_deviations_above_random_ones_is_found(n_random: int) -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(N_SETS):
        drawn = world(rng, n_random + 1, SPREADS["as between prompts"])
        found.append(among_random(drawn[:, 0] + 5 * math.sqrt(1 + 1 / N_PROMPTS), drawn[:, 1:]).verdict)
    assert np.mean([one == ABOVE for one in found]) >= 0.9


def test_a_vector_that_differs_on_few_prompts_alone_is_rarely_above() -> None:
    """Its mean over all prompts is that of random ones, which do not vary: only its own prompts can make it stand out."""
    rng = np.random.default_rng(3)
    called = []
    for _ in range(2 * N_SETS):
        own = 5 * rng.normal(size=(N_PROMPTS, 1))
        random = rng.normal(size=(N_PROMPTS, 99)) * 0.1
        figures, names = torch.from_numpy(np.hstack([own, random])), [str(i) for i in range(N_PROMPTS)]
        seed = int(rng.integers(2**31))
        drawn = prompt_resamples(
            lambda w, x=figures: w @ x / w.sum(1, keepdim=True), names, n_resamples=N_RESAMPLES, seed=seed
        )
        called.append([among_random(drawn[:, 0], drawn[:, 1:]).verdict])
    rate, error = rates(called, ABOVE)
    assert rate <= NOMINAL + 0.01 + 2.6 * error, "the percentile bootstrap of 32 prompts is a little narrow"
