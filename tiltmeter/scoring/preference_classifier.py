"""Can the preference be read off hidden states? Accuracy of a linear probe on pairs that it has not seen.

A logistic regression without intercept on h_chosen − h_rejected of one site and position: it learns a direction along which
preferred responses lie further. An intercept would be meaningless, since a pair's two differences ±d are one observation.
High accuracy for policy AND base means that the preference was linearly readable before any training.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import GroupKFold  # type: ignore[import-untyped]
from torch import Tensor

from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Figure, Side
from tiltmeter.stats.jackknife import NO_INTERVAL, Interval
from tiltmeter.stats.proportions import share_interval

N_FOLDS = 5
N_FLIPS = 50
INVERSE_STRENGTH = 1.0


class PreferenceClassifier(NamedTuple):
    """Accuracy that a probe reached out of fold, and that it reaches where there is nothing to learn."""

    accuracy: Interval
    """Share of held-out pairs on the right side, with a 95 % interval over prompts (of the pairs, not of the fit)."""
    hits: list[bool]
    """A verdict a pair; a pair exactly on the plane is wrong."""
    null: Interval
    """Mean accuracy with labels flipped at random, and the central 95 % of the flips."""
    p_value: float
    """(1 + flips with at least the observed accuracy) / (1 + flips)."""


def preference_classifier(
    differences: Float[Tensor, "pair d_model"],
    groups: Sequence[str],
    *,
    n_folds: int = N_FOLDS,
    n_flips: int = N_FLIPS,
    seed: int = 0,
) -> PreferenceClassifier:
    r"""Out-of-fold accuracy of a logistic probe w on d_i = h_chosen − h_rejected, and its null.

    .. math:: \min_w \; \tfrac12 \|w\|^2 + C \sum_i \log(1 + e^{-\langle w, x_i\rangle}), \qquad C = 1

    with x = d scaled, by the training folds alone, to root mean square 1 in every dimension and then to norm about 1, so that
    C means the same at any width. Pairs of one prompt are never on both sides of a split. The null repeats all of it
    with the sign of every d flipped at random.

    Args:
        differences: one row a pair, all finite.
        groups: a name for each pair; pairs of one prompt share it.
        n_folds: parts that take their turn as the held-out one.
        n_flips: random labellings of the null.
        seed: of the flips and of which prompts are together in a fold.

    Raises:
        ValueError: lengths that differ, rows that are not finite, or fewer prompts than folds.
    """
    rows = differences.detach().cpu().double().numpy()
    if len(groups) != len(rows) or not np.isfinite(rows).all():
        raise ValueError(
            f"preference_classifier: expected {len(rows)} finite rows and as many groups, got {len(groups)}"
        )
    if len(set(groups)) < n_folds:
        raise ValueError(f"preference_classifier: expected at least {n_folds} prompts, got {len(set(groups))}")
    splits = list(GroupKFold(n_folds, shuffle=True, random_state=seed).split(rows, groups=groups))
    rng = np.random.default_rng(seed)
    hits = _out_of_fold(rows, splits, rng)
    accuracy = share_interval(hits.astype(float).tolist(), groups)
    flips = np.array(
        [_out_of_fold(rows * rng.choice([-1.0, 1.0], (len(rows), 1)), splits, rng).mean() for _ in range(n_flips)]
    )
    low, high = np.quantile(flips, [0.025, 0.975])
    p_value = (1 + int((flips >= accuracy.value - 1e-12).sum())) / (1 + n_flips)
    return PreferenceClassifier(
        accuracy, hits.tolist(), Interval(float(flips.mean()), float(low), float(high)), p_value
    )


def classifier_figures(
    chosen: Float[Tensor, "pair d_model"],
    rejected: Float[Tensor, "pair d_model"],
    groups: Sequence[str],
    *,
    of: Side,
    where: str,
    seed: int = 0,
) -> list[Figure]:
    """``preference_probe_accuracy`` of one model's states, and ``preference_probe_null`` beside it.

    Args:
        chosen, rejected: hidden states of a site at a position of each response, one row a pair; NaN: missing.
        groups: a name for each pair; pairs of one prompt share it.
        of: whose states they are.
        where: site and position, such as ``layer_05 response_last``; goes into the scorer's name.

    Returns:
        Both are NaN where too many pairs are missing, or there are fewer prompts than folds.
    """
    differences = chosen.detach().cpu().double() - rejected.detach().cpu().double()
    there = differences.isfinite().all(1)
    names = [group for group, kept in zip(groups, there.tolist(), strict=True) if kept]
    n_missing = len(groups) - len(names)
    scorer = f"logistic probe at {where}, {N_FOLDS} folds by prompt, C = {INVERSE_STRENGTH:g}"
    if len(set(names)) < N_FOLDS or n_missing > MAX_MISSING_SHARE * len(groups):
        accuracy = null = NO_INTERVAL
    else:
        accuracy, _, null, _ = preference_classifier(differences[there], names, seed=seed)
    return [
        Figure("preference_probe_accuracy", of, *accuracy, len(names), n_missing, scorer),
        Figure("preference_probe_null", of, *null, len(names), n_missing, f"{scorer}, labels flipped {N_FLIPS} times"),
    ]


def classifier_direction(differences: Float[Tensor, "pair d_model"], *, seed: int = 0) -> Float[Tensor, " d_model"]:
    """Weights u of the same probe on all pairs, in log-odds per unit of activation: P(chosen is preferred) = σ(⟨u, d⟩), float64.

    The scaling that the fit uses is taken back out, so u acts on hidden states as they are. As a vector to steer with, its norm
    says nothing about a fitting strength (:func:`tiltmeter.steering.controls.norm_matched`). A probe is made for reading, not for
    writing: it weighs quiet dimensions up, where :func:`tiltmeter.geometry.directions.difference_of_means` does not.

    Args:
        differences: h_chosen − h_rejected, one row a pair, all finite.
        seed: of the signs of the rows.

    Raises:
        ValueError: fewer than two rows, or rows that are not finite.
    """
    rows = differences.detach().cpu().double().numpy()
    if len(rows) < 2 or not np.isfinite(rows).all():
        raise ValueError(f"classifier_direction: expected at least two rows, all finite, got {len(rows)}")
    return torch.from_numpy(_fit(rows, np.random.default_rng(seed)))


def _out_of_fold(
    rows: NDArray[np.float64], splits: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Whether each pair is on the right side for the probe of the other folds."""
    hits = np.zeros(len(rows), dtype=bool)
    for train, test in splits:
        hits[test] = rows[test] @ _fit(rows[train], rng) > 0
    return hits


def _fit(rows: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Weights of the probe on unscaled rows."""
    scale = np.sqrt(np.square(rows).mean(0) * rows.shape[1])
    scale[scale == 0] = 1.0  # a dimension that never differs
    # ±d are one observation: any one sign of each has the same likelihood, and the solver needs both labels
    signs = np.resize([1.0, -1.0], len(rows))
    rng.shuffle(signs)
    probe = LogisticRegression(C=INVERSE_STRENGTH, fit_intercept=False, max_iter=1000)
    probe.fit(rows / scale * signs[:, None], signs)
    weights: NDArray[np.float64] = probe.coef_[0] / scale
    return weights
