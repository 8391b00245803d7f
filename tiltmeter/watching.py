"""What an observation of the probe says, as flat metrics: pure functions from hidden states to names and numbers.

Names follow one scheme, ``<what>/<of which matrix>/<site>``: sites as in :mod:`tiltmeter.layers`, matrices ``delta`` (the
update ΔH = h_π − h_0), ``policy`` and ``base``, with ``_centred`` (and other variants) behind the matrix. Readings at another
position than ``prompt_last`` carry it behind the site (``layer_03@response_last``), save that ``projection`` is always at
``diverge``, where v is defined.
"""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from tiltmeter.capture import HiddenStates, ReadPoint
from tiltmeter.consistency import cosine, in_sample_cosines, leave_one_out_cosines
from tiltmeter.directions import steering_vector
from tiltmeter.geometry import Variant, row_geometry
from tiltmeter.layers import FINAL_POST_NORM, Unembedding
from tiltmeter.positions import Position
from tiltmeter.probe import PreferenceDirections, matching_rows
from tiltmeter.projections import (
    hyperplane_distances,
    logit_gaps,
    projection_change,
    share_preferred,
    summarize_projections,
)
from tiltmeter.stats.nulls import sign_flip_null

States = Mapping[ReadPoint, HiddenStates]
Metrics = dict[str, float]

_USUAL: Position = "prompt_last"
N_FLIPS = 200
"""Sign flips behind the null bands logged while training."""


def spectral_metrics(
    base: States, policy: States, point: ReadPoint, *, variants: Sequence[Variant] = ("raw", "centred")
) -> Metrics:
    """Entropies, ranks and shares of ΔH, H_policy and H_base at one site and position (METHOD §2).

    ``shift_share`` is f, the share of the matrix that is one constant row; with it ``top1_energy`` ρ₁ and ``sigma_ratio``
    σ₂/σ₁ are not independent evidence, since ρ₁ ≥ f always. Figures without a direction (ΔH = 0) are left out.
    """
    rows = dict(zip(("base", "policy"), matching_rows(base, policy, point), strict=True))
    rows["delta"] = rows["policy"].double() - rows["base"].double()
    metrics: Metrics = {}
    for name, matrix in rows.items():
        for variant in variants:
            of = name if variant == "raw" else f"{name}_{variant}"
            found = row_geometry(matrix, variant)
            s = found.spectrum
            figures = {
                f"spectral_entropy/{of}/energy": s.entropy_energy,
                f"spectral_entropy/{of}/singular": s.entropy_singular,
                f"normalized_entropy/{of}/energy": s.normalized_entropy_energy,
                f"normalized_entropy/{of}/singular": s.normalized_entropy_singular,
                f"effective_rank/{of}": s.effective_rank_energy,
                f"participation_ratio/{of}": s.participation_ratio,
                f"stable_rank/{of}": s.stable_rank,
                f"top1_energy/{of}": s.top1_energy,
                f"sigma_ratio/{of}": s.sigma_ratio,
            }
            if variant == "raw":
                figures |= {f"shift_share/{of}": found.shift_share, f"top_direction_cosine/{of}": found.cos_top_mean}
            metrics |= {f"{key}/{place(point)}": value for key, value in figures.items()}
    norms = {"update_norm": rows["delta"], "state_norm": rows["base"].double()}
    metrics |= {f"{key}/{place(point)}": float(x.norm(dim=1).mean()) for key, x in norms.items()}
    return known(metrics)


def consistency_metrics(
    base: States, policy: States, point: ReadPoint, *, previous: Float[Tensor, " d_model"] | None = None
) -> Metrics:
    """Do all updates point the same way? Cosines with the mean update v*, in-sample and leave-one-out, with null bands.

    Args:
        previous: v* of the observation before; gives ``direction_settled``, the cosine between the two.
    """
    before, after = matching_rows(base, policy, point)
    updates = after.double() - before.double()
    if len(updates) < 2 or not updates.any():
        return {}
    band = sign_flip_null(updates, n_flips=N_FLIPS).band()
    metrics = {
        f"mean_cosine/in_sample/{place(point)}": float(in_sample_cosines(updates).nanmean()),
        f"mean_cosine/leave_one_out/{place(point)}": float(leave_one_out_cosines(updates).nanmean()),
        f"mean_cosine/in_sample_null_high/{place(point)}": band["mean_cosine_in_sample"][1],
        f"mean_cosine/leave_one_out_null_high/{place(point)}": band["mean_cosine_leave_one_out"][1],
        f"shift_share/null_high/{place(point)}": band["shift_share"][1],
    }
    if previous is not None:
        now = steering_vector(before, after)
        metrics[f"direction_settled/{place(point)}"] = float(cosine(now, previous))
    return known(metrics)


def projection_metrics(
    base: States,
    policy: States,
    site: str,
    directions: PreferenceDirections,
    *,
    clusters: Sequence[str],
    head: Unembedding | None = None,
) -> Metrics:
    """⟨h, v⟩/‖v‖ at ``diverge`` under both models, for v and v̄, with paired bootstrap intervals over prompts.

    Args:
        clusters: prompt of every pair of the probe.
        head: unembedding of the base model; gives the hyperplane's side at ``final_post_norm``.
    """
    point = ReadPoint(site, "diverge")
    before, after = matching_rows(base, policy, point)
    pairs = base[point].pair_index
    names = [clusters[i] for i in pairs.tolist()]
    moved = bool((after.double() - before.double()).any())
    metrics: Metrics = {}
    for kind, v in (("projection", directions.token), ("projection_sequence", directions.sequence[pairs])):
        change = projection_change(before, after, v)
        means = {"base": float(change.base.nanmean()), "policy": float(change.policy.nanmean())}
        metrics |= {f"{kind}/{name}/{site}": value for name, value in means.items()}
        if not moved:  # before the first step there is no update to speak of
            continue
        summary = summarize_projections(change, names)
        for name, interval in (("delta", summary.change), ("share_grown", summary.share_grown)):
            ends = {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
            metrics |= {f"{kind}/{end}/{site}": value for end, value in ends.items()}
        steering = steering_vector(before, after)[None]
        kind_name = "token" if kind == "projection" else "sequence"
        metrics[f"direction_cosine/{kind_name}/{site}"] = float(cosine(v, steering).nanmean())
    if site == FINAL_POST_NORM and moved:
        metrics["projection/share_grown"] = metrics[f"projection/share_grown/{site}"]
        if head is not None:
            gaps = logit_gaps(before.to(head.weight.device), head, directions.chosen_ids, directions.rejected_ids).cpu()
            metrics["hyperplane/share_preferred"] = share_preferred(hyperplane_distances(after, directions.token, gaps))
    return known(metrics)


def observation_metrics(
    base: States,
    policy: States,
    directions: PreferenceDirections,
    *,
    head: Unembedding | None = None,
    clusters: Sequence[str] | None = None,
    previous: Mapping[ReadPoint, Tensor] | None = None,
) -> Metrics:
    """Everything above for whatever a probe has read, in one call: what a loop or a callback of any trainer logs.

    Args:
        head: unembedding of the base model; see :func:`projection_metrics`.
        clusters: prompt of every pair of the probe; None: no two pairs share one.
        previous: :func:`steering_vectors` of the observation before.
    """
    metrics: Metrics = {}
    for point in policy:
        if point.position == "diverge":
            names = clusters or [str(row) for row in range(len(directions.sequence))]
            metrics |= projection_metrics(base, policy, point.site, directions, clusters=names, head=head)
        else:
            metrics |= spectral_metrics(base, policy, point)
            before = None if previous is None else previous[point]
            metrics |= consistency_metrics(base, policy, point, previous=before)
    return metrics


def place(point: ReadPoint) -> str:
    """How a site and position end a metric's name.

    >>> place(ReadPoint("layer_03", "prompt_last")), place(ReadPoint("layer_03", "diverge"))
    ('layer_03', 'layer_03@diverge')
    """
    return point.site if point.position == _USUAL else f"{point.site}@{point.position}"


def known(metrics: Metrics) -> Metrics:
    """Without those that are NaN: what has no value isn't logged."""
    return {name: value for name, value in metrics.items() if value == value}


def steering_vectors(base: States, policy: States) -> dict[ReadPoint, Tensor]:
    """v* at every site and position."""
    return {point: steering_vector(*matching_rows(base, policy, point)) for point in policy}


def states_to_tensors(states: States) -> dict[str, Tensor]:
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
