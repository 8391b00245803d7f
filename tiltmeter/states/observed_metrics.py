"""Observations of the probe as flat metrics: pure functions from hidden states to names and numbers.

Names are those of :mod:`tiltmeter.metric_names`. Matrices are ``base``, ``policy``, ``delta`` (the update ΔH = h_π − h_0) and
``random_update`` (ΔH after a random weight change of the same norm, :mod:`tiltmeter.weights.random_update`).
"""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from tiltmeter.geometry.consistency import cosine, in_sample_cosines, leave_one_out_cosines, split_half
from tiltmeter.geometry.directions import steering_vector
from tiltmeter.geometry.projections import (
    hyperplane_distances,
    logit_gaps,
    projection_change,
    share_preferred,
    summarize_projections,
)
from tiltmeter.geometry.rows import RowGeometry, Variant, in_own_span, outlier_dims, row_geometry
from tiltmeter.geometry.similarity import linear_cka, one_row_a_prompt
from tiltmeter.metric_names import at, matrix, metric
from tiltmeter.models.layers import FINAL_POST_NORM, Unembedding
from tiltmeter.scoring.depth import even_share, first_token_share
from tiltmeter.states.capture import HiddenStates, Reading, ReadPoint
from tiltmeter.states.probe_set import PreferenceDirections
from tiltmeter.states.state_pair import StatePair
from tiltmeter.stats.nulls import sign_flip_null

Metrics = dict[str, float]

N_FLIPS = 200
"""Sign flips behind the null bands logged while training."""
LEAST_PROMPTS = 4
"""Prompts from which there is a debiased CKA."""


def spectral_metrics(pair: StatePair, point: ReadPoint, *, variants: Sequence[Variant] = ("raw", "centred")) -> Metrics:
    """Entropies, ranks and shares of ΔH, H_policy and H_base at one site and position (METHOD §2).

    ``shift_share`` is f, the share of the matrix that is one constant row; with it ``top1_energy`` ρ₁ and ``sigma_ratio``
    σ₂/σ₁ are not independent evidence, since ρ₁ ≥ f always. Figures without a direction (ΔH = 0) are left out.
    """
    (before, after), update = pair.rows(point), pair.update(point)
    if not len(before):
        return {}
    metrics: Metrics = {}
    without, told = outlier_dims(before)
    for name, whole in {"base": before, "policy": after, "delta": update}.items():
        for variant in variants:
            of = matrix(name, variant)
            rows = whole[told] if variant == "outlier_dims_removed" else whole
            found = row_geometry(rows, variant, without=without) if len(rows) else None
            figures = _spectral_figures(found, of, with_mean=variant == "raw") if found else {}
            metrics |= {at(key, point): value for key, value in figures.items()}
    norms = {"update_norm": update, "state_norm": before.double()}
    metrics |= {at(metric(key), point): float(x.norm(dim=1).mean()) for key, x in norms.items()}
    return known(metrics)


def _spectral_figures(found: RowGeometry, of: str, *, with_mean: bool) -> Metrics:
    """Figures of one matrix under their names before the site; those about its mean row only where it was not taken out."""
    s = found.spectrum
    figures = {
        metric("spectral_entropy", of, "energy"): s.entropy_energy,
        metric("spectral_entropy", of, "singular"): s.entropy_singular,
        metric("normalized_entropy", of, "energy"): s.normalized_entropy_energy,
        metric("normalized_entropy", of, "singular"): s.normalized_entropy_singular,
        metric("effective_rank", of, "energy"): s.effective_rank_energy,
        metric("effective_rank", of, "singular"): s.effective_rank_singular,
        metric("participation_ratio", of): s.participation_ratio,
        metric("stable_rank", of): s.stable_rank,
        metric("top1_energy", of): s.top1_energy,
        metric("sigma_ratio", of): s.sigma_ratio,
    }
    if with_mean:
        figures |= {metric("shift_share", of): found.shift_share}
        figures |= {metric("top_direction_cosine", of): found.cos_top_mean}
    return figures


def random_update_figures(changed: StatePair, point: ReadPoint) -> Metrics:
    """The figures of ΔH after one random weight change, by their names before the site.

    What :func:`spectral_metrics` says of ``delta`` and :func:`consistency_metrics` of the cosines, under ``random_update``; and
    ``mean_cosine/split_half/random_update``.

    Args:
        changed: the base's states beside those read under the changed weights.
    """
    updates = in_own_span(changed.update(point))
    if len(updates) < 2 or not updates.any():
        return {}
    figures = {
        metric("update_norm", "random_update"): float(updates.norm(dim=1).mean()),
        metric("similarity", "cka", "random_update"): _cka(changed, point),
        metric("mean_cosine", "in_sample", "random_update"): float(in_sample_cosines(updates).nanmean()),
        metric("mean_cosine", "leave_one_out", "random_update"): float(leave_one_out_cosines(updates).nanmean()),
        metric("mean_cosine", "split_half", "random_update"): float(split_half(updates).cosines.nanmean()),
    }
    figures |= _spectral_figures(row_geometry(updates), "random_update", with_mean=True)
    return known(
        figures | _spectral_figures(row_geometry(updates, "centred"), "random_update_centred", with_mean=False)
    )


def consistency_metrics(
    pair: StatePair, point: ReadPoint, *, previous: Float[Tensor, " d_model"] | None = None
) -> Metrics:
    """Do all updates point the same way? Cosines with the mean update v*, in-sample and leave-one-out, with null bands.

    ``mean_cosine/…/base`` is that of the base's own states with their mean: what alike tokens give without any update.

    Args:
        previous: v* of the observation before; gives ``direction_settled``, the cosine between the two.
    """
    (before, after), updates = pair.rows(point), pair.update(point)
    if len(updates) < 2 or not updates.any():
        return {}
    band = sign_flip_null(updates, n_flips=N_FLIPS).band()
    metrics = {
        metric("mean_cosine", "in_sample"): float(in_sample_cosines(updates).nanmean()),
        metric("mean_cosine", "leave_one_out"): float(leave_one_out_cosines(updates).nanmean()),
        metric("mean_cosine", "in_sample", "base"): float(in_sample_cosines(before).nanmean()),
        metric("mean_cosine", "leave_one_out", "base"): float(leave_one_out_cosines(before).nanmean()),
        metric("mean_cosine", "in_sample_null_high"): band["mean_cosine_in_sample"][1],
        metric("mean_cosine", "leave_one_out_null_high"): band["mean_cosine_leave_one_out"][1],
        metric("shift_share", "null_high"): band["shift_share"][1],
    }
    if previous is not None:
        now = steering_vector(before, after)
        metrics[metric("direction_settled")] = float(cosine(now, previous))
    return known({at(key, point): value for key, value in metrics.items()})


def similarity_metrics(pair: StatePair, point: ReadPoint) -> Metrics:
    """Debiased linear CKA of base and policy at one site and position, one row a prompt; nothing with fewer than four prompts."""
    return known({at(metric("similarity", "cka"), point): _cka(pair, point)})


def _cka(pair: StatePair, point: ReadPoint) -> float:
    base, policy = (one_row_a_prompt(rows, pair.clusters_of(point)) for rows in pair.rows(point))
    return linear_cka(base, policy) if len(base) >= LEAST_PROMPTS else math.nan


def depth_metrics(kl: Sequence[Float[Tensor, " _"]], clusters: Sequence[str]) -> Metrics:
    """Share of KL(π ‖ π₀) in the first tokens of responses, and what it is if spread evenly; nothing while the models are the same.

    Args:
        kl: nats at each token of each response.
        clusters: prompt of each response.
    """
    share = first_token_share(kl, clusters).value
    if math.isnan(share):
        return {}
    even = even_share([len(of) for of in kl])
    return {metric("depth", "first_token_share"): share, metric("depth", "even_share"): even}


def projection_metrics(
    pair: StatePair, site: str, directions: PreferenceDirections, *, head: Unembedding | None = None
) -> Metrics:
    """⟨h, v⟩/‖v‖ at ``diverge`` under both models, for v and v̄, with paired intervals over prompts.

    Args:
        head: unembedding of the base model; gives the hyperplane's side at ``final_post_norm``.
    """
    point = ReadPoint(site, "diverge")
    (before, after), pairs = pair.rows(point), pair.base[point].pair_index
    names, moved = pair.clusters_of(point), bool(pair.update(point).any())
    metrics: Metrics = {}
    for kind, v in (("projection", directions.token), ("projection_sequence", directions.sequence[pairs])):
        change = projection_change(before, after, v)
        means = {"base": float(change.base.nanmean()), "policy": float(change.policy.nanmean())}
        metrics |= {at(metric(kind, name), point): value for name, value in means.items()}
        if not moved:  # before the first step there is no update to speak of
            continue
        summary = summarize_projections(change, names)
        ends = summary.change.named("delta") | summary.share_grown.named("share_grown")
        metrics |= {at(metric(kind, end), point): value for end, value in ends.items()}
        steering = steering_vector(before, after)[None]
        kind_name = "token" if kind == "projection" else "sequence"
        metrics[at(metric("direction_cosine", kind_name), point)] = float(cosine(v, steering).nanmean())
    if site == FINAL_POST_NORM and moved:
        grown = metric("projection", "share_grown")
        metrics[grown] = metrics[at(grown, point)]
        if head is not None:
            gaps = logit_gaps(before.to(head.weight.device), head, directions.chosen_ids, directions.rejected_ids).cpu()
            share = share_preferred(hyperplane_distances(after, directions.token, gaps))
            metrics[metric("hyperplane", "share_preferred")] = share
    return known(metrics)


def observation_metrics(
    pair: StatePair,
    directions: PreferenceDirections,
    *,
    head: Unembedding | None = None,
    previous: Mapping[ReadPoint, Tensor] | None = None,
) -> Metrics:
    """Everything above for whatever a probe has read, in one call: what a loop or a callback of any trainer logs.

    Args:
        head: unembedding of the base model; see :func:`projection_metrics`.
        previous: :meth:`~tiltmeter.states.state_pair.StatePair.steering_vectors` of the observation before.
    """
    metrics: Metrics = {}
    for point in pair.policy:
        if point.position == "diverge":
            metrics |= projection_metrics(pair, point.site, directions, head=head)
        else:
            metrics |= spectral_metrics(pair, point)
            metrics |= consistency_metrics(pair, point, previous=(previous or {}).get(point))
    return metrics


def known(metrics: Metrics) -> Metrics:
    """Without those that are NaN: what has no value isn't logged."""
    return {name: value for name, value in metrics.items() if value == value}


def states_to_tensors(states: Reading) -> dict[str, Tensor]:
    """Readings as plain tensors, for checkpoints."""
    return {
        f"{point.site}/{point.position}/{name}": value
        for point, found in states.items()
        for name, value in zip(found._fields, found, strict=True)
    }


def states_from_tensors(tensors: Mapping[str, Tensor]) -> dict[ReadPoint, HiddenStates]:
    """The inverse of :func:`states_to_tensors`."""
    points = dict.fromkeys(tuple(key.split("/")[:2]) for key in tensors)
    return {
        ReadPoint(site, position): HiddenStates(*(tensors[f"{site}/{position}/{n}"] for n in HiddenStates._fields))  # type: ignore[arg-type]
        for site, position in points
    }
