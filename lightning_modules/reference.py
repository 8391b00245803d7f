"""Reference log-probs of a DPO run: from a cache on disk as far as it is right, from the model itself for the rest."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tiltmeter.pairs.batch import TokenizedPair
from tiltmeter.pairs.reference_cache import Kept, ReferenceCache, hash_pairs

N_CHECKED = 8
"""Rows of the cache, about, that every run recomputes before it believes the others."""

MicroBatches = Sequence[Sequence[int]]
"""Rows that go through the model together, in order."""
Compute = Callable[[Sequence[int]], Tensor]
"""Rows → [row of the split, 2] log-probs under the reference, NaN elsewhere."""


def cached_reference(
    pairs: Sequence[TokenizedPair],
    rows: Sequence[int],
    *,
    cache: ReferenceCache | None,
    compute: Compute,
    micro_batches: Callable[[Sequence[int]], MicroBatches],
    recompute: Callable[[MicroBatches], Tensor],
    share: Callable[[Any], Any],
    is_first: bool,
    first_step: Sequence[int] = (),
) -> tuple[Tensor, str]:
    """[row of the split, 2] reference log-probs of the asked rows (NaN elsewhere), and one line on where they came from.

    Every process must call this. The first one reads and writes the cache; what it read is shared, so that processes
    agree also where they don't share a disk. Before a cache is believed, some of its rows are computed again in the very
    micro-batches that they were computed in, and must come out the same to the last bit; else nothing of it is used or kept.

    Args:
        pairs: the split's pairs as they are trained, in order.
        rows: rows that are needed.
        cache: None: compute everything.
        compute: runs the reference over some rows, on all processes together.
        micro_batches: those in which ``compute`` does so, on any process.
        recompute: runs it over given micro-batches, on every process alike; a table as that of ``compute``.
        share: sends the first process's value to the others.
        is_first: this is the first process.
        first_step: those of the rows that make up the first optimizer step. They are computed here whatever the cache
            holds, by themselves and so in the micro-batches of training: other shapes round differently, and the first
            loss has to be ln 2 to the last bit.
    """
    apart = set(first_step)
    rest = [row for row in rows if row not in apart]

    def compute_some(wanted: Sequence[int]) -> Tensor:
        return compute(wanted).cpu().double() if wanted else torch.full((len(pairs), 2), torch.nan, dtype=torch.float64)

    fresh = compute_some(first_step)
    if cache is None:
        return torch.where(fresh.isnan(), compute_some(rest), fresh), f"Reference: {len(rows)} pairs computed"
    hashes = hash_pairs(pairs)
    kept: Kept = share(cache.lookup(hashes) if is_first else None)
    wanted = torch.zeros(len(pairs), dtype=torch.bool)
    wanted[list(rows)] = True
    n_found, complaint = int((wanted & ~kept.log_probs.isnan().any(1)).sum()), kept.complaint
    if n_found:
        complaint = share(_check(kept, recompute))
    if complaint:
        n_found, kept.log_probs = 0, torch.full_like(fresh, torch.nan)
    known = torch.where(wanted[:, None], torch.where(fresh.isnan(), kept.log_probs, fresh), torch.nan)
    missing = (wanted & known.isnan().any(1)).nonzero()[:, 0].tolist()
    if missing:
        known[missing] = compute_some(missing)[missing]
    if n_found < len(rows) and is_first:
        computed = [*micro_batches(first_step), *micro_batches(missing)]
        try:
            cache.store(hashes, known, computed, beside_others=not complaint)
        except OSError as error:
            complaint = f"could not be written, {error.strerror or error}"
    line = f"Reference: {n_found} pairs found in {cache.folder}, {len(rows) - n_found} computed"
    return known, line + (f" (cache not used: {complaint})" if complaint else "")


def _check(kept: Kept, recompute: Callable[[MicroBatches], Tensor]) -> str:
    """Why what is kept is not to be believed; empty: it was computed again, some of it, and is the same."""
    whole = kept.micro_batches
    if not whole:
        return "no micro-batch of it is whole among these pairs, so that nothing can be compared"
    n_checked = math.ceil(N_CHECKED * len(whole) / sum(map(len, whole)))
    batches = whole[:: max(1, len(whole) // n_checked)][:n_checked]
    checked = [row for batch in batches for row in batch]
    again, before = recompute(batches).cpu().double()[checked], kept.log_probs[checked]
    if torch.equal(again, before):
        return ""
    return f"recomputed rows differ by {float(((again - before).abs() / (1 + before.abs())).max()):.1g}"
