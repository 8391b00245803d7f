"""What a model prefers and whether it still works, on one log-odds scale and without a judge: teacher-forced log-probs alone.

Of a pair of answers that are opposite in polarity (chosen and rejected), L_p = −log P(positive) and L_n = −log P(negative):

    PrefOdds = log [P(positive) / P(negative)] = L_n − L_p
    UtilOdds = log [(P(positive) + P(negative)) / (1 − P(positive) − P(negative))]

(Xu et al., "Why Steering Works", arXiv 2602.02343). PrefOdds says which answer, UtilOdds how probable it is that the model gives
either of them: it falls when steering breaks the model. P is of a whole answer, so L is a sum over its tokens; with long
answers UtilOdds is nearly the log-prob of the likelier one. How both decay over strengths: :mod:`tiltmeter.scoring.odds_decay`.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Figure, Scores, Side, grouped_mean_figure
from tiltmeter.stats.jackknife import jackknife_interval

SCORER = "teacher-forced log-probs"


def preference_odds(loss_positive: Float[Tensor, "*n"], loss_negative: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """L_n − L_p in nats, in float64: above 0 where the positive answer is the more probable one; NaN unless both L are finite.

    >>> preference_odds(torch.tensor([1.0]), torch.tensor([3.0])).tolist()
    [2.0]
    """
    difference = loss_negative.to(torch.float64) - loss_positive.to(torch.float64)
    return difference.masked_fill(~difference.isfinite(), torch.nan)


def utility_odds(loss_positive: Float[Tensor, "*n"], loss_negative: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log [(e^−L_p + e^−L_n) / (1 − e^−L_p − e^−L_n)] in nats, in float64.

    With s = log (e^−L_p + e^−L_n) it is s − log (1 − e^s), which neither under- nor overflows. NaN where it has no value: the two
    are certain together (s = 0), they are no probabilities of two different answers (s > 0), or one L isn't finite.

    >>> round(float(utility_odds(torch.tensor([1.0]), torch.tensor([3.0]))), 6)
    -0.33236
    """
    either = torch.logaddexp(-loss_positive.to(torch.float64), -loss_negative.to(torch.float64))
    known = loss_positive.isfinite() & loss_negative.isfinite() & (either < 0)
    safe = either.where(known, -1.0)
    return (safe - log1mexp(safe)).masked_fill(~known, torch.nan)


def log1mexp(x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log(1 − e^x) for x < 0 without cancellation (Mächler 2012): log(−expm1 x) above −ln 2, log1p(−e^x) below.

    >>> [round(y, 6) for y in log1mexp(torch.tensor([-1e-12, -50.0], dtype=torch.float64)).tolist()]
    [-27.631021, -0.0]
    """
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def odds_scores(
    loss_positive: Sequence[float], loss_negative: Sequence[float], *, groups: Sequence[str], of: Side = "policy"
) -> Scores:
    """``preference_odds`` and ``utility_odds``: means over pairs in nats, with intervals over prompts.

    Args:
        loss_positive: −log π(chosen | x) of each pair, summed over its tokens, in nats; NaN: missing.
        loss_negative: of the rejected answers.
        groups: a name for each pair; pairs of one prompt share it.
        of: whose log-probs they are.

    Returns:
        Figures, and columns of the same names with a value a pair; what has no value is NaN and counted.

    Raises:
        ValueError: lengths that differ.
    """
    if len({len(loss_positive), len(loss_negative), len(groups)}) > 1:
        raise ValueError(
            f"odds_scores: expected columns of one length, got {len(loss_positive)}, {len(loss_negative)}, {len(groups)}"
        )
    losses = [torch.tensor(column, dtype=torch.float64) for column in (loss_positive, loss_negative)]
    columns = {"preference_odds": preference_odds(*losses).tolist(), "utility_odds": utility_odds(*losses).tolist()}
    figures = [grouped_mean_figure(name, of, column, groups, scorer=SCORER) for name, column in columns.items()]
    return Scores(figures, {f"{name}/{of}": column for name, column in columns.items()})


def perplexity_figure(
    log_probs: Sequence[float], n_tokens: Sequence[int], *, groups: Sequence[str], of: Side = "policy"
) -> Figure:
    """``perplexity`` of given texts: exp(−Σ log π / Σ tokens), so every token weighs the same; 1 … ∞.

    It depends on the tokenizer: compare models that share one. Teacher-forced on neutral or reference text it shows damage
    done by steering (control C18) before anything is generated.

    Args:
        log_probs: log π of each text, summed over its tokens, in nats; NaN: missing.
        n_tokens: tokens that the sums are over; texts without any count as missing.
        groups: a name for each text; those of one prompt share it.
        of: whose log-probs they are.

    Raises:
        ValueError: lengths that differ.

    >>> perplexity_figure([-2.0, -6.0], [1, 3], groups=["a", "b"]).value == math.exp(2)
    True
    """
    read = [
        (log_prob, n, group)
        for log_prob, n, group in zip(log_probs, n_tokens, groups, strict=True)
        if n > 0 and math.isfinite(log_prob)
    ]
    n_missing = len(log_probs) - len(read)
    if not read or n_missing > MAX_MISSING_SHARE * len(log_probs):
        return Figure("perplexity", of, math.nan, math.nan, math.nan, len(read), n_missing, SCORER)
    sums, counts = (torch.tensor([one[i] for one in read], dtype=torch.float64) for i in range(2))
    nats = jackknife_interval(lambda drawn: -(drawn @ sums) / (drawn @ counts), [group for _, _, group in read])
    value, low, high = torch.tensor(nats, dtype=torch.float64).exp().tolist()
    return Figure("perplexity", of, value, low, high, len(read), n_missing, SCORER)
