"""Exact tests of yes-or-no outcomes that come in pairs: the same prompts under two conditions."""

from collections.abc import Sequence

from scipy.stats import binomtest


def more_often(ones: Sequence[float], others: Sequence[float]) -> float:
    """p-value of McNemar's exact test, one-sided: is the outcome 1 more frequent among ``ones`` than among ``others``?

    Only pairs that differ count; where neither condition matters each is as likely to go either way, so their number is
    binomial at ½ (McNemar 1947). 1 where no pair differs.

    Args:
        ones, others: 0 or 1, in the same order.

    Raises:
        ValueError: lengths that differ.

    >>> more_often([1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0])
    0.0625
    """
    if len(ones) != len(others):
        raise ValueError(f"more_often: expected outcomes in pairs, got {len(ones)} and {len(others)}")
    more = sum(a > b for a, b in zip(ones, others, strict=True))
    less = sum(a < b for a, b in zip(ones, others, strict=True))
    return float(binomtest(more, more + less, alternative="greater").pvalue) if more + less else 1.0
