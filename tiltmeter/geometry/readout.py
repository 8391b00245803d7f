"""Readouts: can a label be read off hidden states by a linear map, and by the same one before and after training?

A readout is fitted on the base's states and applied to held-out states of the base, of the policy, and of the policy less its mean
change; and fitted anew on the policy's. Knowledge is kept where the new one is as good; the readout has moved where the old one is
worse on the policy. A constant shift moves scores and no ranks: it is seen in accuracy at the base's threshold, never in AUC.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import StratifiedGroupKFold  # type: ignore[import-untyped]
from torch import Tensor

from tiltmeter.stats.jackknife import LOG_ODDS, Interval, jackknife_intervals
from tiltmeter.stats.proportions import pooled_share_interval

N_FOLDS, N_PERMUTATIONS, INVERSE_STRENGTH = 5, 19, 1.0
MARGIN = 0.05
"""Difference of AUC within which two readouts are called equally good."""
LEAST_TEXTS = 30
Applied = Literal["base", "policy", "policy_less_shift", "retrained"]
"""Readout of the base on the base, on the policy, on the policy less its mean change; and the policy's own on the policy."""
APPLIED: tuple[Applied, ...] = get_args(Applied)
Change = Literal["unchanged", "changed", "not told apart"]
UNCHANGED, CHANGED, UNTOLD = get_args(Change)
Array = NDArray[np.float64]
Labels = NDArray[np.bool_]
Splits = Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]
"""Rows to fit on and rows to test on."""
Direction = Callable[[Array, Labels], tuple[Array, float]]
"""From rows and labels to weights and an intercept."""


class Quality(NamedTuple):
    """Quality of scores that tell labels, out of fold, each with its 95 % interval over groups (of the texts, not of the fits)."""

    auc: dict[Applied, Interval]
    accuracy: dict[Applied, Interval]
    """Balanced: the mean over both labels of the share that is on the right side of the readout's own threshold."""
    difference: dict[Applied, Interval]
    """AUC less that of the base on the base."""
    verdict: dict[Applied, Change]


class Readout(NamedTuple):
    """A label's readout before and after."""

    quality: Quality
    by_means: Quality
    """The same of the difference of the two labels' means in place of the logistic weights."""
    cosine: float
    """Cosine of the logistic weights fitted on the base and on the policy, on all texts."""
    cosine_by_means: float
    cosine_of_halves: float
    """Cosine of the logistic weights fitted on two halves of the base's texts: what another sample does."""
    null: Interval
    """AUC on the base with labels permuted: mean, least and largest."""
    p_value: float
    """(1 + permutations with at least the observed AUC) / (1 + permutations)."""


def readout(
    base: Float[Tensor, "text d_model"],
    policy: Float[Tensor, "text d_model"],
    labels: Bool[Tensor, " text"],
    groups: Sequence[str],
    *,
    n_folds: int = N_FOLDS,
    n_permutations: int = N_PERMUTATIONS,
    margin: float = MARGIN,
    seed: int = 0,
) -> Readout:
    """Fit and apply the readouts of one label, out of fold.

    Logistic regression with an intercept, C = 1 on dimensions scaled by the training folds to variance 1 and rows to about norm 1.
    The mean change that is taken off the policy is of the training folds.

    Args:
        base, policy: states of the same texts, all finite.
        groups: a name for each text; texts of one prompt share it and are never on both sides of a split.
        n_folds: parts that take their turn as the held-out one.
        n_permutations: random labellings of the null.
        margin: of :attr:`Quality.verdict`, by two one-sided tests at 5 %.
        seed: of folds, permutations and halves.

    Raises:
        ValueError: lengths that differ, rows that are not finite, fewer than 30 texts, labels of one kind, or too few groups.
    """
    before, after, y, splits = _folded(base, policy, labels, groups, n_folds, seed)
    scores = _out_of_fold(before, after, y, splits, _logistic)
    quality = quality_of_scores(scores, labels, groups, margin=margin)
    by_means = quality_of_scores(_out_of_fold(before, after, y, splits, _means), labels, groups, margin=margin)
    rng = np.random.default_rng(seed)
    null = np.array([_null_auc(before, rng.permutation(y), splits) for _ in range(n_permutations)])
    p_value = (1 + int((null >= quality.auc["base"].value - 1e-12).sum())) / (1 + n_permutations)
    half = np.isin(np.asarray(groups), rng.permutation(sorted(set(groups)))[: len(set(groups)) // 2])
    has_both = all(len(set(y[part].tolist())) == 2 for part in (half, ~half))
    return Readout(
        quality,
        by_means,
        _cosine(_logistic(before, y)[0], _logistic(after, y)[0]),
        _cosine(_means(before, y)[0], _means(after, y)[0]),
        _cosine(*(_logistic(before[part], y[part])[0] for part in (half, ~half))) if has_both else math.nan,
        Interval(float(null.mean()), float(null.min()), float(null.max())),
        p_value,
    )


def readout_aucs(
    base: Float[Tensor, "text d_model"],
    policy: Float[Tensor, "text d_model"],
    labels: Bool[Tensor, " text"],
    groups: Sequence[str],
    *,
    n_folds: int = N_FOLDS,
    seed: int = 0,
) -> dict[Applied, float]:
    """AUC of the logistic readouts alone, out of fold, as :func:`readout` finds them: without intervals, null and halves.

    Ten fits of one label, cheap enough to take while a model trains.

    Args:
        base, policy, labels, groups, n_folds, seed: see :func:`readout`.

    Raises:
        ValueError: as :func:`readout`.
    """
    before, after, y, splits = _folded(base, policy, labels, groups, n_folds, seed)
    scores = _out_of_fold(before, after, y, splits, _logistic)
    return {applied: _auc(row, y) for applied, row in zip(APPLIED, scores, strict=True)}


def quality_of_scores(
    scores: Float[Tensor, "applied text"],
    labels: Bool[Tensor, " text"],
    groups: Sequence[str],
    *,
    margin: float = MARGIN,
) -> Quality:
    """AUC, balanced accuracy and differences of AUC of scores, with intervals over groups, and what they say.

    ``unchanged``: the 90 % interval of the difference to the base lies within ± margin (two one-sided tests at 5 %). ``changed``:
    the 95 % interval leaves 0 out. Otherwise not told apart.

    Args:
        scores: log-odds of each text by each of :data:`APPLIED`, out of fold.
        groups: texts of equal name are left out together.
        margin: difference of AUC that is too small to matter.
    """
    values = scores.double()

    def aucs(weights: Tensor) -> Tensor:
        return torch.stack([weighted_auc(row, labels, weights) for row in values], dim=1)

    def differences(weights: Tensor) -> Tensor:
        found = aucs(weights)
        return found - found[:, :1]

    auc, accuracy = jackknife_intervals(aucs, groups, scale=LOG_ODDS), balanced_accuracies(values, labels, groups)
    wide, narrow = (jackknife_intervals(differences, groups, level=level) for level in (0.95, 0.9))
    verdicts = [_verdict(w, n, margin) for w, n in zip(wide, narrow, strict=True)]
    return Quality(*(dict(zip(APPLIED, of, strict=True)) for of in (auc, accuracy, wide, verdicts)))  # type: ignore[arg-type]


def balanced_accuracies(
    scores: Float[Tensor, "applied text"], labels: Bool[Tensor, " text"], groups: Sequence[str]
) -> list[Interval]:
    """Mean over both labels of the share of texts on their side of score 0, with the 95 % interval of a weighted share over groups.

    >>> found = balanced_accuracies(torch.tensor([[1.0, 2.0, -1.0, 3.0]]), torch.tensor([True, True, False, False]), list("abcd"))
    >>> found[0].value
    0.75
    """
    weights = torch.where(labels, labels.sum(), (~labels).sum()).double().reciprocal() * len(labels) / 2
    right = ((scores > 0) == labels).double() * weights
    return [pooled_share_interval(row.tolist(), weights.tolist(), groups) for row in right]


def weighted_auc(
    scores: Float[Tensor, " text"], labels: Bool[Tensor, " text"], weights: Float[Tensor, "resample text"]
) -> Float[Tensor, " resample"]:
    """Probability that a text with the label has the higher score than one without, ties half; texts count as weighted.

    >>> weighted_auc(torch.tensor([0.1, 0.4, 0.3, 0.9]), torch.tensor([False, False, True, True]), torch.ones(1, 4)).tolist()
    [0.75]
    """
    yes, no = scores[labels, None], scores[None, ~labels]
    wins = (yes > no).to(weights) + 0.5 * (yes == no).to(weights)
    w_yes, w_no = weights[:, labels], weights[:, ~labels]
    return (w_yes @ wins * w_no).sum(1) / (w_yes.sum(1) * w_no.sum(1))


def _verdict(wide: Interval, narrow: Interval, margin: float) -> Change:
    if -margin < narrow.low and narrow.high < margin:
        return UNCHANGED
    return CHANGED if wide.low > 0 or wide.high < 0 else UNTOLD


def _folded(
    base: Tensor, policy: Tensor, labels: Tensor, groups: Sequence[str], n_folds: int, seed: int
) -> tuple[Array, Array, Labels, Splits]:
    """Rows, labels and splits that keep a group together, checked."""
    before, after, y = base.double().cpu().numpy(), policy.double().cpu().numpy(), labels.cpu().numpy()
    _check(before, after, y, groups, n_folds)
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return before, after, y, list(folds.split(before, y, groups=groups))


def _check(before: Array, after: Array, y: Labels, groups: Sequence[str], n_folds: int) -> None:
    if before.shape != after.shape or not len(before) == len(y) == len(groups):
        raise ValueError(
            f"readout: expected states of the same texts, got {before.shape}, {after.shape} and {len(y)} labels"
        )
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("readout: expected finite states, got NaN or infinity")
    if len(y) < LEAST_TEXTS:
        raise ValueError(f"readout: expected at least {LEAST_TEXTS} texts, got {len(y)}")
    least = min(
        len({g for g, is_yes in zip(groups, y.tolist(), strict=True) if is_yes == side}) for side in (True, False)
    )
    if least < n_folds:
        raise ValueError(f"readout: expected each label in at least {n_folds} groups, got {least}")


def _out_of_fold(
    before: Array, after: Array, y: Labels, splits: Splits, fit: Direction
) -> Float[Tensor, "applied text"]:
    """Scores of each text by the readouts of the folds that it is not in."""
    found = np.zeros((len(APPLIED), len(y)))
    for train, test in splits:
        old, new = fit(before[train], y[train]), fit(after[train], y[train])
        shift = (after[train] - before[train]).mean(0)
        asked = ((old, before[test]), (old, after[test]), (old, after[test] - shift), (new, after[test]))
        for row, ((weights, intercept), states) in enumerate(asked):
            found[row, test] = states @ weights + intercept
    return torch.from_numpy(found)


def _null_auc(before: Array, y: Labels, splits: Splits) -> float:
    scores = np.zeros(len(y))
    for train, test in splits:
        weights, intercept = _logistic(before[train], y[train])
        scores[test] = before[test] @ weights + intercept
    return _auc(torch.from_numpy(scores), y)


def _auc(scores: Tensor, y: Labels) -> float:
    ones = torch.ones(1, len(y), dtype=torch.float64)
    return float(weighted_auc(scores, torch.from_numpy(y), ones)[0])


def _logistic(rows: Array, y: Labels) -> tuple[Array, float]:
    """Logistic weights and intercept on unscaled rows."""
    mean = rows.mean(0)
    scale = rows.std(0) * math.sqrt(rows.shape[1])
    scale[scale == 0] = 1.0  # a dimension that never differs
    fitted = LogisticRegression(C=INVERSE_STRENGTH, max_iter=1000).fit((rows - mean) / scale, y)
    weights: Array = fitted.coef_[0] / scale
    return weights, float(fitted.intercept_[0] - mean @ weights)


def _means(rows: Array, y: Labels) -> tuple[Array, float]:
    """Difference of the labels' means, with its threshold midway between them."""
    yes, no = rows[y].mean(0), rows[~y].mean(0)
    return yes - no, float(-(yes - no) @ (yes + no) / 2)


def _cosine(one: Array, other: Array) -> float:
    length = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / length if length > 0 else math.nan
