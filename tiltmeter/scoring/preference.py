"""Preferences of a policy, by log-probs: does it rank held-out pairs as people did, and how far has it moved from its base?

The implicit reward of a response is r = β · log(π/π₀) (arXiv 2305.18290). At step 0 the policy is its base: every margin is
exactly 0, and since accuracy is strict (equal is wrong, as in TRL and the authors' code) it is 0 there, not ½. The share of
ties is a figure of its own, so that this can be seen. Accuracy says nothing of what a model writes: chosen responses usually
lose log-prob too (both drifts below 0), only less than rejected ones.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from tiltmeter.errors import UserError
from tiltmeter.scoring.scorer import MAX_MISSING_SHARE, Figure, Scores, grouped_mean_figure
from tiltmeter.stats.jackknife import NO_INTERVAL, jackknife_interval
from tiltmeter.stats.proportions import pooled_share_interval

SCORER = "implicit reward"


def preference_scores(
    drift_chosen: Sequence[float],
    drift_rejected: Sequence[float],
    *,
    beta: float,
    groups: Sequence[str],
    sources: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> Scores:
    """Preference accuracy, ties, reward margin and drift of held-out pairs, over all and over each source's.

    Figures, with n and intervals over prompts: ``preference_accuracy`` (share with m > 0), ``preference_ties`` (share with
    m = 0), ``reward_margin`` (mean m = β (Δ_chosen − Δ_rejected)), ``logp_drift_chosen`` and ``logp_drift_rejected`` (mean Δ,
    nats). Of several sources each has its own: ``preference_accuracy/<source>``.

    Args:
        drift_chosen: Δ = log π − log π₀ of each chosen response, summed over its tokens, in nats; NaN: missing.
        drift_rejected: of each rejected response.
        beta: of the loss.
        groups: a name for each pair; pairs of one prompt share it.
        sources: where each pair comes from, such as ``hh/harmless-base_test``; None: from one place.
        weights: by how much people preferred each chosen response, such as the difference of two scores; then there is also
            ``preference_accuracy_by_margin`` = Σ w [m > 0] / Σ w over the pairs with w > 0. None: not known.

    Returns:
        Figures, and columns of the same names with a value a pair.

    Raises:
        ValueError: lengths that differ, or β not above 0.

    >>> scores = preference_scores([-1.0, 2.0, 0.0], [-3.0, 4.0, 0.0], beta=0.5, groups=["a", "b", "c"])
    >>> [(figure.name, round(figure.value, 3)) for figure in scores.figures[:3]]
    [('preference_accuracy', 0.333), ('preference_ties', 0.333), ('reward_margin', 0.0)]
    """
    n = len(drift_chosen)
    labels = [""] * n if sources is None else list(sources)
    known = [math.nan] * n if weights is None else list(weights)
    if {len(drift_rejected), len(groups), len(labels), len(known)} != {n} or not 0 < beta < math.inf:
        raise ValueError(
            f"preference_scores: expected columns of one length and beta above 0, got lengths {n}, {len(drift_rejected)}, "
            f"{len(groups)}, {len(labels)}, {len(known)} and beta {beta}"
        )
    margins = [beta * (chosen - rejected) for chosen, rejected in zip(drift_chosen, drift_rejected, strict=True)]
    columns = {
        "preference_accuracy": [_share(margin, margin > 0) for margin in margins],
        "preference_ties": [_share(margin, margin == 0) for margin in margins],
        "reward_margin": margins,
        "logp_drift_chosen": list(drift_chosen),
        "logp_drift_rejected": list(drift_rejected),
    }
    parts = {"": list(range(n))} | _rows_by_source(labels)
    figures = [
        _mean_of(rows, name + suffix, column, groups, is_share=name in ("preference_accuracy", "preference_ties"))
        for suffix, rows in parts.items()
        for name, column in columns.items()
    ]
    weighed = list(zip(columns["preference_accuracy"], known, groups, strict=True))
    for suffix, rows in parts.items():
        figures += _accuracy_by_margin(f"preference_accuracy_by_margin{suffix}", [weighed[i] for i in rows])
    return Scores(figures, columns)


def _mean_of(
    rows: Sequence[int], name: str, column: Sequence[float], groups: Sequence[str], *, is_share: bool
) -> Figure:
    values, names = [column[i] for i in rows], [groups[i] for i in rows]
    return grouped_mean_figure(name, "both", values, names, scorer=SCORER, is_share=is_share)


def _rows_by_source(sources: Sequence[str]) -> dict[str, list[int]]:
    """``/SOURCE`` → its rows, where there are several sources."""
    names = sorted(set(sources))
    of = {f"/{name}": [i for i, source in enumerate(sources) if source == name] for name in names}
    return of if len(names) > 1 else {}


def _accuracy_by_margin(name: str, weighed: Sequence[tuple[float, float, str]]) -> list[Figure]:
    """Figure of (right or wrong, weight, group) of the pairs whose weight is above 0; none where there are no such pairs."""
    weighed = [row for row in weighed if row[1] > 0]
    if not weighed:
        return []
    there = [row for row in weighed if not math.isnan(row[0])]
    n_missing = len(weighed) - len(there)
    if n_missing > MAX_MISSING_SHARE * len(weighed):
        return [Figure(name, "both", *NO_INTERVAL, len(there), n_missing, SCORER)]
    scale = len(there) / sum(w for _, w, _ in there)  # so that equal margins have the interval of the plain share
    weighted, counts = zip(*((c * w * scale, w * scale) for c, w, _ in there), strict=True)
    interval = pooled_share_interval(weighted, counts, [group for *_, group in there])
    return [Figure(name, "both", *interval, len(there), n_missing, SCORER)]


def preference_scores_of_validation(
    table: Mapping[str, Sequence[float]],
    *,
    beta: float,
    groups: Sequence[str],
    sources: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
) -> Scores:
    """:func:`preference_scores` from what a validation yields of every pair (``held_out.csv``): Δ = reward / β.

    Args:
        table: ``rewards/chosen`` and ``rewards/rejected``, a value a pair
            (:data:`~tiltmeter.pairs.preference_losses.PAIR_METRICS`).

    Raises:
        UserError: a column is missing.
    """
    missing = [name for name in ("rewards/chosen", "rewards/rejected") if name not in table]
    if missing:
        raise UserError(f"held_out.csv: expected the columns of a preference run, got no {', '.join(missing)}")
    chosen, rejected = ([float(r) / beta for r in table[f"rewards/{side}"]] for side in ("chosen", "rejected"))
    return preference_scores(chosen, rejected, beta=beta, groups=groups, sources=sources, weights=weights)


def kl_figures(
    policy: Sequence[float], reference: Sequence[float], n_tokens: Sequence[int], *, groups: Sequence[str]
) -> list[Figure]:
    """KL(π ‖ π₀) in nats, estimated on the policy's own completions: ``kl`` a completion, and ``kl_per_token``.

    Means of log π − log π₀, unbiased where completions were drawn from π itself (temperature 1, nothing cut from the
    distribution); under other decoding it is the same mean, of other text. Single values may be below 0. Per token it is
    Σ (log π − log π₀) / Σ tokens: long completions weigh more.

    Args:
        policy: log π of each completion, summed over its tokens; NaN: missing.
        reference: log π₀ of the same tokens.
        n_tokens: tokens that the sums are over.
        groups: a name for each completion; those of one prompt share it.

    Raises:
        ValueError: lengths that differ.

    >>> [figure.value for figure in kl_figures([-1.0, -2.0], [-2.0, -5.0], [1, 3], groups=["a", "b"])]
    [2.0, 1.0]
    """
    differences = [a - b for a, b in zip(policy, reference, strict=True)]
    scorer = "log π − log π₀ on own completions"
    whole = grouped_mean_figure("kl", "both", differences, groups, scorer=scorer)
    counted = [
        (difference, n, group)
        for difference, n, group in zip(differences, n_tokens, groups, strict=True)
        if n > 0 and not math.isnan(difference)
    ]
    n_missing = len(differences) - len(counted)
    if not counted or n_missing > MAX_MISSING_SHARE * len(differences):
        return [whole, Figure("kl_per_token", "both", *NO_INTERVAL, len(counted), n_missing, scorer)]
    sums, counts = (torch.tensor([one[i] for one in counted], dtype=torch.float64) for i in range(2))
    interval = jackknife_interval(lambda drawn: drawn @ sums / (drawn @ counts), [group for _, _, group in counted])
    return [whole, Figure("kl_per_token", "both", *interval, len(counted), n_missing, scorer)]


def _share(margin: float, is_so: bool) -> float:
    return math.nan if math.isnan(margin) else float(is_so)
