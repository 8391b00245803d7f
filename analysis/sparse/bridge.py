"""Does DPO move the features that a sparse steering uses? DPO's δ in the features of the same autoencoder, token by token."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.controls.c16_recovery_ladder import add_steps, rows_of_steps, updates_of
from analysis.open.checkpoints import Checkpoints
from analysis.open.laid_pairs import lay_pairs
from analysis.steering.directions import split_by_prompt
from tiltmeter.scoring.depth import ratio_of_sums
from tiltmeter.sparse.autoencoder import SparseAutoencoder
from tiltmeter.sparse.feature_sets import RankOverlap
from tiltmeter.sparse.steering import SparseSteering, effective_steering
from tiltmeter.steering.recovery import RecoveryMoments
from tiltmeter.steering.sweep_logits import hidden_at

DECODED_FEATURES = 16
"""Features whose part of v* is added alone, too."""
ROWS_AT_A_TIME = 4096


class Change(NamedTuple):
    """States of the same tokens before and after DPO."""

    base: Float[Tensor, "token d_model"]
    aligned: Float[Tensor, "token d_model"]
    pairs: Int[Tensor, " token"]
    """Pair of each token."""


class Bridge(NamedTuple):
    """Everything that is said of DPO's update in terms of features."""

    overlap: RankOverlap | None
    """Rank correlation of the features that DPO moves with those that a steering uses; None: there is no steering."""
    explained: pd.DataFrame
    """A row for each number of features and order they are taken in."""
    steered: pd.DataFrame
    """R of v* and of what features hold of it, on the test half."""


@torch.no_grad()
def explained_by_features(
    sae: SparseAutoencoder,
    change: Change,
    orders: dict[str, Int[Tensor, " width"]],
    numbers: Sequence[int],
    groups: Sequence[str],
) -> pd.DataFrame:
    """Share of ΔH, and of v* = mean δ, that the decoded change of some features holds: 1 − ‖δ − Δf_S W_dec‖² / ‖δ‖².

    Args:
        orders: name → features, those taken first at the front.
        numbers: of features.
        groups: prompt of each pair.

    Returns:
        A row for each order and number: ``explained_update`` with its interval over prompts, ``explained_v_star`` and ``cosine``,
        that of v* and its part. Below 0 the part is further from the update than nothing.
    """
    n_pairs = len(groups)
    rows = []
    parts = torch.arange(len(change.base)).split(ROWS_AT_A_TIME)
    whole = (change.aligned - change.base).double()
    v_star, energy = (
        whole.mean(0),
        torch.zeros(n_pairs, dtype=torch.float64).index_add(0, change.pairs, whole.square().sum(1)),
    )
    for name, order in orders.items():
        for k in sorted({min(k, sae.width) for k in numbers}):
            kept = torch.zeros(sae.width, dtype=torch.bool)
            kept[order[:k]] = True
            left, mean = torch.zeros(n_pairs, dtype=torch.float64), torch.zeros_like(v_star)
            for at in parts:
                moved = moved_by(sae, change.base[at], change.aligned[at], kept)
                left.index_add_(0, change.pairs[at], (whole[at] - moved).square().sum(1))
                mean += moved.sum(0)
            mean /= len(whole)
            lost = ratio_of_sums(left.tolist(), energy.tolist(), groups)
            rows.append(
                {
                    "order": name, "n_features": k, "explained_update": 1 - lost.value, "explained_update_low": 1 - lost.high,
                    "explained_update_high": 1 - lost.low,
                    "explained_v_star": float(1 - (v_star - mean).square().sum() / v_star.square().sum()),
                    "cosine": float(torch.nn.functional.cosine_similarity(v_star, mean, dim=0)),
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@torch.no_grad()
def moved_by(
    sae: SparseAutoencoder, base: Tensor, aligned: Tensor, kept: Tensor | None = None
) -> Float[Tensor, "token d_model"]:
    """Δf W_dec of each token, of some features or of all, float64 on the CPU."""
    weight = sae.encoder_weight
    before, after = (x.to(weight.device, weight.dtype) for x in (base, aligned))
    moved = sae.encode(after) - sae.encode(before)
    if kept is not None:
        moved = moved * kept.to(moved)
    return sae.move(moved, like=before).double().cpu()


@torch.no_grad()
def steered_by_features(
    dpo: Checkpoints,
    sae: SparseAutoencoder,
    top: Int[Tensor, " some"],
    *,
    steering: SparseSteering | None,
    n_prompts: int | None,
    seed: int,
) -> pd.DataFrame:
    """R of the base moved at the autoencoder's site by v*, by what features hold of it, and by the steering's own mean.

    All are means over tokens that tokens of responses are predicted from, of the estimation half of the prompts; R is of the other
    half. ``own`` is each token's own update, the most that moving states at this site can do.

    Args:
        top: features whose part is added alone.
        steering: a trained one; None: there is none.
    """
    estimation, test = split_by_prompt(dpo.pairs, seed=seed)
    base, aligned, site = dpo.base.model, dpo.aligned.model, sae.site
    fitted, laid = (lay_pairs(pairs[:n_prompts], aligned, device=base.device) for pairs in (estimation, test))
    kept = torch.zeros(sae.width, dtype=torch.bool)
    kept[top] = True
    means: dict[str, list[Tensor]] = {"v_star": [], "decoded": [], f"decoded_{len(top)}": []}
    if steering is not None:
        means["fsrl"] = []
    for one in fitted:
        before, after = (hidden_at(of, one.batch, site)[one.predicting] for of in (base, aligned))
        means["v_star"].append((after - before).double().cpu())
        means["decoded"].append(moved_by(sae, before, after))
        means[f"decoded_{len(top)}"].append(moved_by(sae, before, after, kept))
        if steering is not None:
            changed = effective_steering(sae.encode(before), steering.steering(before))
            means["fsrl"].append(sae.move(changed, like=before).double().cpu())
    vectors = {name: torch.cat(rows).mean(0) for name, rows in means.items()}
    groups = [pair.group for pair in test[:n_prompts]]
    moments = RecoveryMoments([1.0] * (len(vectors) + 1), n_rows=len(groups))
    for one in laid:
        own = updates_of(dpo, one, site)
        steps = [vector.to(own.device).expand(len(own), -1) for vector in vectors.values()]
        add_steps(moments, dpo, one, site, [*steps, own])
    table = pd.DataFrame(rows_of_steps(moments, site, [*vectors, "own"], groups))
    return table.assign(norm=[*(float(vector.norm()) for vector in vectors.values()), float("nan")])
