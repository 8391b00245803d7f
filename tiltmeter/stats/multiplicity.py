"""Several tests at once: p-values adjusted so that the chance of any false one stays at the level."""

from collections.abc import Sequence


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests adjusted by Holm's step-down method (1979), in their order; independence is not needed.

    The smallest is multiplied by n, the next by n − 1 …, none above 1 nor below one before it.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, so_far = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for place, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = so_far
    return adjusted
