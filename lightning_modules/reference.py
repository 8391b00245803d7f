"""Where a DPO run's reference log-probs come from: a cache on disk as far as it is right, the model itself for the rest."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tiltmeter.batch import TokenizedPair
from tiltmeter.reference_cache import ReferenceCache, hash_pairs

N_CHECKED = 8
"""Rows of the cache that every run recomputes before it believes the others."""
_TOLERANCE = {"32-true": 1e-4, "64-true": 1e-9}
_TOLERANCE_16_BIT = 3e-2
"""Accepted difference of a sum of log-probs, relative to 1 + its size: other batches round differently."""

Compute = Callable[[Sequence[int]], Tensor]
"""Rows → [row of the split, 2] log-probs under the reference, NaN elsewhere."""


def cached_reference(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[int],
    *,
    cache: ReferenceCache | None,
    compute: Compute,
    precision: str,
    share: Callable[[tuple[Tensor, str]], tuple[Tensor, str]],
    is_first: bool,
    first_step: Sequence[int] = (),
) -> tuple[Tensor, str]:
    """[row of the split, 2] reference log-probs of the asked rows (NaN elsewhere), and one line on where they came from.

    Every process must call this. The first one reads and writes the cache; what it read is shared, so that processes
    agree also where they don't share a disk. Before a cache is believed, some of its rows are computed again and compared.

    Args:
        pairs: the split's pairs as they are trained, in order.
        rows: rows that are needed.
        cache: None: compute everything.
        compute: runs the reference over some rows, on all processes together.
        precision: the trainer's, for the tolerance of the check.
        share: sends the first process's value to the others.
        is_first: this is the first process.
        first_step: those of the rows that make up the first optimizer step. They are computed here whatever the cache
            holds, by themselves and so in the micro-batches of training: other shapes round differently, and the first
            loss has to be ln 2 to the last bit.
    """
    rest = [row for row in rows if row not in set(first_step)]

    def compute_apart(wanted: Sequence[int]) -> Tensor:
        return compute(wanted).cpu().double() if wanted else torch.full((len(pairs), 2), torch.nan, dtype=torch.float64)

    fresh = compute_apart(first_step)
    if cache is None:
        return torch.where(fresh.isnan(), compute_apart(rest), fresh), f"Reference: {len(rows)} pairs computed"
    hashes = hash_pairs(pairs)
    known, complaint = share(cache.lookup(hashes) if is_first else (torch.full_like(fresh, torch.nan), ""))
    wanted = torch.zeros(len(pairs), dtype=torch.bool)
    wanted[list(rows)] = True
    known[~wanted] = torch.nan
    found = (~known.isnan().any(1)).nonzero()[:, 0].tolist()
    if found:
        checked = [row for row in first_step if row in set(found)] or found[:: max(1, len(found) // N_CHECKED)][
            :N_CHECKED
        ]
        again = fresh if checked[0] in first_step else compute_apart(checked)
        difference = _largest_difference(known[checked], again[checked])
        if not difference <= _TOLERANCE.get(precision, _TOLERANCE_16_BIT):
            complaint, found, known = (
                f"recomputed rows differ by {difference:.1g}",
                [],
                torch.full_like(fresh, torch.nan),
            )
    known = torch.where(fresh.isnan(), known, fresh)
    missing = (wanted & known.isnan().any(1)).nonzero()[:, 0].tolist()
    if missing:
        known[missing] = compute_apart(missing)[missing]
    if len(found) < len(rows) and is_first:
        try:
            cache.store(hashes, known)
        except OSError as error:
            complaint = f"could not be written, {error.strerror or error}"
    line = f"Reference: {len(found)} pairs found in {cache.folder}, {len(rows) - len(found)} computed"
    return known, line + (f" (cache not used: {complaint})" if complaint else "")


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs() / (1 + b.abs())).max())
